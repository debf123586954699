"""Logit parity: of two checkpoints, and of a conversion and what it was made from.

Both sides run the same fixed tokens. Each result of a conversion is computed in a fresh process: a
Hugging Face folder by plain transformers, a Megatron one by this package's own readers and engine,
started anew (`python -m mlm_eval.engine.verify FOLDER PROBE OUTPUT`).
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.convert import Comparison
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import LazyTensor, Mapped
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.engine.engine import Engine
from mlm_eval.model.bert import BERT
from mlm_eval.model.gpt import GPT

TOLERANCE = 2e-4
"""Largest difference of a log-probability or logit between right implementations, float32; a wrong
GELU gives 5e-4 and more."""

PROBE_LENGTH = 64


def probe(config: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """Return fixed inputs: two rows of random tokens, the second padded at its end for BERT."""
    generator = torch.Generator().manual_seed(1234)
    length = min(PROBE_LENGTH, config.max_position_embeddings)
    inputs = {"tokens": torch.randint(0, vocab_size, (2, length), generator=generator)}
    if config.family == "bert":
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, length - length // 4 :] = 0
        types = torch.zeros(2, length, dtype=torch.int64)
        if config.num_tokentypes > 1:
            types[:, length // 2 :] = 1
        inputs.update(padding_mask=mask, tokentypes=types)
    return inputs


@torch.inference_mode()
def outputs(checkpoint: Checkpoint, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's logits on a probe, computed by the engine in float32 on the CPU.

    Returns:
        `logits` `[batch, seq, vocab]` where the model has a language-model head, the logits of
        each task head by its name, and `states` `[batch, seq, hidden]` where it has no head at
        all.
    """
    model = Engine.load(checkpoint, dtype=torch.float32).model
    if isinstance(model, GPT):
        return {"logits": F.linear(model(inputs["tokens"]), model.output_layer.table)}
    assert isinstance(model, BERT)
    states = model(inputs["tokens"], inputs["padding_mask"], inputs["tokentypes"])
    found = model.head_logits(states)
    if model.config.qa_head:
        found["qa_head"] = model.qa_head(states)
    if model.config.lm_head:
        table, bias = model.output_layer.table, model.output_layer.bias
        found["logits"] = F.linear(model.lm_head(states), table, bias)
    return found or {"states": states}


def compare(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    *,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """Return how far two sets of outputs are apart, over the vocabulary that both have.

    Positions of padding are left out: they mean nothing and eras differ in them.

    Raises:
        InputError: The two models have no output in common.
    """
    names = sorted(set(ours) & set(theirs))
    if not names:
        raise InputError(
            f"nothing to compare: one model gives {', '.join(sorted(ours))}, the other "
            f"{', '.join(sorted(theirs))}"
        )
    keep = inputs.get("padding_mask", torch.ones_like(inputs["tokens"])).bool()
    by_output, mean, agreement = {}, None, 1.0
    for name in names:
        a, b = ours[name].float(), theirs[name].float()
        if name == "logits":
            size = min(a.shape[-1], b.shape[-1])
            a, b = (x[..., :size].log_softmax(dim=-1)[keep] for x in (a, b))  # [N, V]
            agreement = (a.argmax(-1) == b.argmax(-1)).double().mean().item()
        elif a.dim() == 3:
            a, b = a[keep], b[keep]
        if a.shape != b.shape:
            raise InputError(
                f"the outputs {name} have shapes {list(a.shape)} and {list(b.shape)}; "
                "these are models of two kinds"
            )
        gap = (a - b).abs()
        by_output[name] = gap.max().item()
        if mean is None or name == "logits":
            mean = gap.double().mean().item()
    worst = max(by_output.values(), key=lambda gap: float("inf") if gap != gap else gap)
    assert mean is not None
    return Comparison(worst, mean, agreement, tolerance, by_output)


def compare_checkpoints(
    a: Checkpoint, b: Checkpoint, *, tolerance: float = TOLERANCE
) -> Comparison:
    """Return how far two checkpoints are apart.

    Raises:
        InputError: One is a GPT and the other a BERT.
    """
    if a.config.family != b.config.family:
        raise InputError(
            f"{a.provenance.path} is a {a.config.family.upper()} model and {b.provenance.path} a "
            f"{b.config.family.upper()} model; give two checkpoints of one kind"
        )
    positions = min(a.config.max_position_embeddings, b.config.max_position_embeddings)
    config = dataclasses.replace(a.config, max_position_embeddings=positions)
    inputs = probe(config, min(a.config.vocab_size, b.config.vocab_size))
    return compare(outputs(a, inputs), outputs(b, inputs), inputs, tolerance=tolerance)


def verify_conversion(
    source: Checkpoint,
    result: Path,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """Return how far a converted folder is from its source, the result's side in a fresh process.

    Args:
        source: What was converted. With `dtype` its weights are rounded the same way first, so
            that the comparison shows faults of the conversion and not the rounding that was asked
            for.
        result: The folder.
        to: `hf` (plain transformers), `megatron` or `torch_dist` (this package).
        dtype: The dtype that the conversion was asked to write.
        tolerance: See `Comparison`.

    Raises:
        InputError: The folder cannot be loaded.
    """
    vocab = min(source.config.vocab_size, open_checkpoint(result).config.vocab_size)
    inputs = probe(source.config, vocab)
    theirs = _in_fresh_process(result, inputs, transformers=to == "hf")
    return compare(outputs(rounded(source, dtype), inputs), theirs, inputs, tolerance=tolerance)


def rounded(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Checkpoint:
    """Return the checkpoint with its weights rounded to `dtype` as they are read."""
    if dtype is None:
        return checkpoint
    tensors: dict[str, LazyTensor] = {
        name: Mapped(tensor, lambda values: values.to(dtype))
        for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


def _in_fresh_process(
    folder: Path, inputs: dict[str, Tensor], *, transformers: bool
) -> dict[str, Tensor]:
    module = "mlm_eval.engine.plain_transformers" if transformers else "mlm_eval.engine.verify"
    with tempfile.TemporaryDirectory(prefix="mlm-eval-") as scratch:
        question, answer = Path(scratch, "probe.safetensors"), Path(scratch, "out.safetensors")
        save_file(inputs, question)
        command = [sys.executable, "-P", "-m", module, str(folder), str(question), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            reader = "transformers" if transformers else "mlm-eval"
            raise InputError(f"{folder} cannot be loaded by {reader}: {reason}")
        return load_file(answer)


if __name__ == "__main__":  # the fresh process of `verify_conversion`
    folder, question, answer = (Path(argument) for argument in sys.argv[1:4])
    found = outputs(open_checkpoint(folder), load_file(question))
    save_file({name: values.contiguous() for name, values in found.items()}, answer)
