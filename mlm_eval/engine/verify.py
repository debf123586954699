"""Two models compared: two checkpoints, or a conversion and what it was made from.

Settings and all weights are compared in canonical form (`weights.py`). Both sides also run the same
fixed tokens, unless settings and weights leave nothing to measure. The result of a conversion runs
in a fresh process: a Hugging Face folder by plain transformers, a Megatron one by this package's
own readers and engine, started anew (`python -m mlm_eval.engine.verify FOLDER PROBE OUTPUT`).
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.comparison import Comparison, PaddingComparison, WeightComparison
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import dtype_name
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import LazyTensor, Mapped, cast_to
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import stays_float32
from mlm_eval.checkpoints.soundness.odd_values import watched
from mlm_eval.checkpoints.soundness.replicas import compare_replicas
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.weights import (
    Labels,
    compare_settings,
    compare_weights,
    evident_entries,
    one_form,
    only_last_rows,
)
from mlm_eval.model.attention import Context, rotary_tables
from mlm_eval.model.bert import BERT
from mlm_eval.model.gpt import GPT
from mlm_eval.model.t5 import T5
from mlm_eval.ranks.signals import PARENT, die_with_parent

TOLERANCE = 2e-4
"""Largest difference of a log-probability between right implementations in float32, as a share of
the logits' spread; a wrong GELU gives five times that in small random models."""

FEW = 0.25
"""The same for heads of a few values and for states, as a share of the tolerance: no softmax adds
up the errors of a whole vocabulary."""

ROUNDING = 2.0**-20
"""The same as a share of the largest logit: what float32 leaves of sums as large as that."""

SMALLEST = 2e-6
"""The same where an output is hardly spread at all."""

PROBE_BYTES = 256 << 20
"""Logits of one side, float32."""

PROBE_POSITIONS = 4096
"""Most positions of a row: attention takes their square."""

ROWS_AT_A_TIME = 64
"""Positions whose log-probabilities are computed in float64 at a time."""

CONVERTED: Labels = ("the source", "the result")
OPTIONS: Labels = ("--ckpt", "--against")


def probe(config: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """Return fixed inputs: rows of random tokens, up to the last position that the model takes.

    Every id comes once before one comes twice. For BERT there are two rows, the second padded at
    its end; for T5 the second row of the encoder's input is.

    Returns:
        `tokens` `[rows, seq]`; for BERT also `padding_mask` and `tokentypes`, for T5, whose
        decoder takes them, `encoder_tokens` and `encoder_mask`; and, where not every position fits,
        `positions` `[seq]`, spread evenly from the first to the last, but for T5 and with ALiBi,
        where transformers takes none, the first ones.
    """
    generator = torch.Generator().manual_seed(1234)
    length = config.max_position_embeddings
    fitting = max(PROBE_BYTES // (4 * vocab_size), 8) if config.lm_head else 2 * PROBE_POSITIONS
    rows = 2 if config.family != "gpt" or 2 * length <= fitting else 1
    taken = min(length, fitting // rows, PROBE_POSITIONS)
    repeats = -(-rows * taken // vocab_size)
    ids = torch.cat([torch.randperm(vocab_size, generator=generator) for _ in range(repeats)])
    inputs = {"tokens": ids[: rows * taken].view(rows, taken)}
    if config.family == "t5":
        mask = torch.ones(rows, taken, dtype=torch.int64)
        mask[1, taken - taken // 4 :] = 0
        return {"encoder_tokens": inputs["tokens"].flip(0, 1), "encoder_mask": mask, **inputs}
    if taken < length and not config.alibi:
        inputs["positions"] = torch.linspace(0, length - 1, taken, dtype=torch.float64).long()
    if config.family == "bert":
        mask = torch.ones(rows, taken, dtype=torch.int64)
        mask[1, taken - taken // 4 :] = 0
        types = torch.zeros(rows, taken, dtype=torch.int64)
        if config.num_tokentypes > 1:
            types[:, taken // 2 :] = 1
        inputs.update(padding_mask=mask, tokentypes=types)
    return inputs


@torch.inference_mode()
def outputs(checkpoint: Checkpoint, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's logits on a probe, computed by the engine in float32 on the CPU.

    Returns:
        `logits` `[batch, seq, vocab]` where the model has a language-model head, the logits of
        each task head by its name, and `states` `[batch, seq, hidden]` where it has no head at
        all, with `pooled` `[batch, hidden]` where it has a pooler.
    """
    model = Engine.load(checkpoint, dtype=torch.float32, device="cpu").model
    if isinstance(model, T5):
        states = model(inputs["encoder_tokens"], inputs["encoder_mask"], inputs["tokens"])
        logits = model.output_layer.logits(states.flatten(0, 1))
        return {"logits": logits.view(*states.shape[:2], -1)}
    states = _states(model, inputs)
    if isinstance(model, GPT):
        logits = model.output_layer.logits(states.flatten(0, 1))
        return {"logits": logits.view(*states.shape[:-1], -1)}
    found = model.head_logits(states)
    if model.config.qa_head:
        found["qa_head"] = model.qa_head(states)
    if model.config.lm_head:
        table, bias = model.output_layer.table, model.output_layer.bias
        found["logits"] = F.linear(model.lm_head(states), table, bias)
    if not found:
        found["states"] = states
        if model.config.pooler:
            found["pooled"] = model.pooler(states)
    return found


def _states(model: GPT | BERT, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the final states `[batch, seq, hidden]`, at the probe's positions."""
    tokens, config = inputs["tokens"], model.config
    positions = inputs.get("positions", torch.arange(tokens.shape[1]))
    if isinstance(model, GPT):
        return model.at_positions(tokens, positions)
    cos, sin = rotary_tables(config, int(positions[-1]) + 1, tokens.device)
    if cos is not None and sin is not None:
        cos, sin = cos[positions], sin[positions]
    types, mask = inputs.get("tokentypes"), inputs.get("padding_mask")
    embedded = model.embedding(tokens, types, positions.expand_as(tokens))
    assert mask is not None
    key_mask = mask.bool()[:, None, None, :]
    context = Context(causal=False, key_mask=key_mask, cos=cos, sin=sin)
    states = model.encoder(embedded, context)
    assert isinstance(states, Tensor)
    return states


def compare(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    *,
    tolerance: float = TOLERANCE,
    entries: int | None = None,
    sides: Labels = OPTIONS,
) -> Comparison:
    """Return how far two sets of outputs are apart.

    Positions of padding are left out: they mean nothing and eras differ in them.

    Args:
        ours: Outputs by name.
        theirs: The other model's.
        inputs: What both were computed for.
        tolerance: The largest difference that passes, as a share of the output's spread.
        entries: Rows of the vocabulary that logits are compared over; None: those that both have.
        sides: What phrases call the two.
    """
    keep = inputs.get("padding_mask", torch.ones_like(inputs["tokens"])).bool()
    odd = [
        f"only {side} gives {name}"
        for side, mine, other in ((sides[0], ours, theirs), (sides[1], theirs, ours))
        for name in sorted(set(mine) - set(other))
    ]
    by_output, allowed, means, agreement = {}, {}, {}, 1.0
    for name in sorted(set(ours) & set(theirs)):
        a, b = ours[name], theirs[name]
        if name == "logits":
            size = min(a.shape[-1], b.shape[-1], entries or a.shape[-1])
            a, b = a[..., :size], b[..., :size]
        if a.dim() == 3:
            a, b = a[keep], b[keep]
        if a.shape != b.shape:
            odd.append(
                f"{name} are {list(a.shape)} in {sides[0]} and {list(b.shape)} in {sides[1]}"
            )
            continue
        found = _gaps(a, b, log_probs=name == "logits")
        by_output[name], means[name] = found["largest"], found["mean"]
        share = tolerance if name == "logits" else FEW * tolerance
        allowed[name] = max(share * found["spread"], ROUNDING * found["height"], SMALLEST)
        if name == "logits":
            agreement = found["agreement"]
    worst = max(
        by_output.values(), key=lambda gap: float("inf") if gap != gap else gap, default=0.0
    )
    mean = means.get("logits", next(iter(means.values()), 0.0))
    positions = inputs.get("positions", torch.arange(keep.shape[1]))
    return Comparison(
        worst,
        mean,
        agreement,
        tolerance,
        by_output,
        allowed=allowed,
        outputs=tuple(odd),
        tokens=int(keep.sum()),
        last_position=int(positions[-1]),
        sides=sides,
    )


def _gaps(a: Tensor, b: Tensor, *, log_probs: bool) -> dict[str, float]:
    """Return the largest and the mean difference of two outputs `[rows, n]`, and their scale.

    `spread` is the root mean square of our logits around their row's mean (of a head's few values
    around zero), `height` the largest of both sides' absolute values, `agreement` the share of rows
    with the same largest one. Sums are float64.
    """
    largest = total = squares = height = 0.0
    agreeing = 0
    for mine, other in zip(a.split(ROWS_AT_A_TIME), b.split(ROWS_AT_A_TIME), strict=True):
        x, y = mine.double(), other.double()
        height = max(height, x.abs().max().item(), y.abs().max().item())
        squares += (x - x.mean(-1, keepdim=True) if log_probs else x).square().sum().item()
        agreeing += int((x.argmax(-1) == y.argmax(-1)).sum())
        if log_probs:
            x, y = x.log_softmax(-1), y.log_softmax(-1)
        gap = (x - y).abs()
        total += gap.sum().item()
        highest = gap.max().item()
        largest = highest if highest != highest or highest > largest else largest
    return {
        "largest": largest,
        "mean": total / a.numel(),
        "spread": (squares / a.numel()) ** 0.5,
        "height": height,
        "agreement": agreeing / len(a),
    }


def compare_checkpoints(
    a: Checkpoint,
    b: Checkpoint,
    *,
    tolerance: float = TOLERANCE,
    entries: int | None = None,
    vocab: str | None = None,
    sides: Labels = OPTIONS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Return how far two checkpoints are apart.

    Outputs are computed where the two differ in weights, settings or form; where they do not, they
    are the same ones.

    Args:
        a: A checkpoint.
        b: Another one.
        tolerance: The largest difference of an output that passes, as a share of its spread.
        entries: The tokenizer's; None where no tokenizer is known.
        vocab: `true`: the verdict is about the tokenizer's entries; `padded`: about all rows. None:
            `true` where the tokenizer is known, or where the rows that one side alone has are
            zeros or copies of one row, which no trained entries are.
        sides: What phrases call the two.
        on_progress: Called with (bytes of weights compared, bytes in all).

    Raises:
        InputError: One is a GPT and the other a BERT, or `vocab` is `true` and the tokenizer's size
            unknown.
    """
    if a.config.family != b.config.family:
        raise InputError(
            f"{a.provenance.path} is a {a.config.family.upper()} model and {b.provenance.path} a "
            f"{b.config.family.upper()} model; give two checkpoints of one kind"
        )
    if vocab not in (None, "true", "padded"):
        raise InputError(f"--vocab {vocab!r} is unknown; use padded or true")
    if vocab == "true" and entries is None:
        raise InputError(
            "--vocab true needs the tokenizer's size; give --tokenizer or --vocab-file"
        )
    if entries is None and vocab is None:
        entries = evident_entries(a, b)
    vocab = vocab or ("padded" if entries is None else "true")
    (a, of_a), (b, of_b) = watched(a), watched(b)
    drifted = [compare_replicas(side.replicas, side.provenance.path) for side in (a, b)]
    ours, theirs, forms = one_form(a, b)
    settings, notes = compare_settings(ours.config, theirs.config, sides)
    notes += _heads_of_one(ours, theirs, sides)
    weights, padding = compare_weights(
        ours, theirs, entries=entries, sides=sides, on_progress=on_progress
    )
    structure = (*weights.structure, *_odd_copies(a, b, sides))
    weights = dataclasses.replace(weights, forms=tuple(forms), structure=structure)
    if entries is None and only_last_rows(weights, ours.config, theirs.config):
        notes.append(
            "all that differs are rows of the vocabulary; if they only pad it, say so by naming "
            "the tokenizer with --tokenizer DIR"
        )
    for side, odd, drift in zip(sides, (of_a, of_b), drifted, strict=True):
        notes += [f"{side}: {text}" for text in [*odd.warnings(), *drift]]
    told: dict[str, Any] = {"settings": tuple(settings), "weights": weights, "padding": padding}
    told |= {"vocab": vocab, "notes": tuple(notes)}
    over = entries if vocab == "true" else None
    if weights.identical and not settings and (vocab == "true" or padding is None or padding.same):
        return _implied(a.config, tolerance, sides, told)
    shared = _shared(a.config, b.config)
    inputs = probe(shared, min(shared.vocab_size, over or shared.vocab_size))
    found = compare(
        outputs(a, inputs),
        outputs(b, inputs),
        inputs,
        tolerance=tolerance,
        entries=over,
        sides=sides,
    )
    if weights.rounded_to and not weights.differing:
        # The outputs are those of the weights as stored: they differ by what rounding does.
        told["allowed"] = dict.fromkeys(found.by_output, float("inf"))
    return dataclasses.replace(found, **told)


def _shared(a: ModelConfig, b: ModelConfig) -> ModelConfig:
    """Return the config of inputs that both models take."""
    return dataclasses.replace(
        a,
        vocab_size=min(a.vocab_size, b.vocab_size),
        max_position_embeddings=min(a.max_position_embeddings, b.max_position_embeddings),
        num_tokentypes=min(a.num_tokentypes, b.num_tokentypes),
        lm_head=a.lm_head or b.lm_head,
    )


def _implied(
    config: ModelConfig, tolerance: float, sides: Labels, told: Mapping[str, Any]
) -> Comparison:
    """Return the comparison of two models of the same weights and settings: nothing to run."""
    heads = {
        "logits": config.lm_head,
        "binary_head": config.binary_head,
        "classification_head": bool(config.num_classes),
        "multichoice_head": config.multichoice_head,
        "qa_head": config.qa_head,
    }
    names = [name for name, present in heads.items() if present] or ["states"]
    same = dict.fromkeys(names, 0.0)
    return Comparison(0.0, 0.0, 1.0, tolerance, same, measured=False, sides=sides, **told)


def _odd_copies(a: Checkpoint, b: Checkpoint, sides: Labels) -> list[str]:
    """Return what is odd within one side alone: Megatron computes with both copies."""
    if a.provenance.odd_copies == b.provenance.odd_copies:
        return []
    pairs = zip(sides, (a.provenance, b.provenance), strict=True)
    return [f"in {side} {what}" for side, provenance in pairs for what in provenance.odd_copies]


def verify_conversion(
    source: Checkpoint,
    result: Path,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    entries: int | None = None,
    left_out: Collection[str] = (),
    approximate: Mapping[str, Any] | None = None,
    approximations: Collection[str] = (),
    tolerance: float = TOLERANCE,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Return how far a converted folder is from its source, the result's side in a fresh process.

    Args:
        source: What was converted. With `dtype` its weights are rounded the same way first, so
            that the comparison shows faults of the conversion and not the rounding that was asked
            for.
        result: The folder.
        to: `hf` (plain transformers), `megatron` or `torch_dist` (this package).
        dtype: The dtype that the conversion was asked to write.
        entries: Rows of the vocabulary that the conversion was to keep; None: all of the source's.
        left_out: Parts of the source that it was to leave out (`pooler`; `mtp`, the heads of
            multi-token prediction).
        approximate: Settings that it was to change, which changes the function; and parameters, by
            name, that the target takes for zeros.
        approximations: What they change, a sentence each.
        tolerance: See `Comparison`.
        on_progress: Called with (bytes of weights compared, bytes in all).

    Raises:
        InputError: The folder cannot be loaded.
    """
    source = _without(source, left_out)
    entries = source.config.vocab_size if entries is None else entries
    written = open_checkpoint(result)
    approximate = approximate or {}
    settings_changed = {name: value for name, value in approximate.items() if "." not in name}
    changed = dataclasses.replace(source.config, **settings_changed)
    ours, theirs, forms = one_form(
        dataclasses.replace(source, config=changed), written, rounded=True
    )
    settings, notes = compare_settings(ours.config, theirs.config, CONVERTED)
    settings += _heads_of_one(ours, theirs, CONVERTED)
    weights, padding = compare_weights(
        ours, theirs, entries=entries, sides=CONVERTED, on_progress=on_progress
    )
    weights = dataclasses.replace(weights, forms=tuple(forms))
    told: dict[str, Any] = {
        "settings": (*settings, *_unasked(weights, dtype), *_lost_rows(padding, theirs.config)),
        "weights": weights,
        "padding": padding,
        "vocab": "padded" if padding is None else "true",
        "notes": tuple(notes),
    }
    inputs = probe(_shared(ours.config, written.config), min(entries, written.config.vocab_size))
    answers = _in_fresh_process(result, inputs, transformers=to == "hf")

    def against(checkpoint: Checkpoint) -> Comparison:
        found = outputs(rounded(checkpoint, dtype), inputs)
        return compare(
            found, answers, inputs, tolerance=tolerance, entries=entries, sides=CONVERTED
        )

    exact = dataclasses.replace(against(_with_zeros(ours, approximate)), **told)
    if not approximations or not exact.same:
        return exact
    measured = against(dataclasses.replace(ours, config=source.config))
    told["allowed"] = dict.fromkeys(measured.by_output, float("inf"))
    return dataclasses.replace(measured, **told, approximations=tuple(approximations))


def _with_zeros(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """Return a checkpoint with some of its parameters set to zero."""
    tensors = dict(checkpoint.tensors)
    for name in set(names) & set(tensors):
        tensors[name] = Mapped(tensors[name], torch.zeros_like)
    return dataclasses.replace(checkpoint, tensors=tensors)


def _without(checkpoint: Checkpoint, parts: Collection[str]) -> Checkpoint:
    """Return a checkpoint without some of its parts, each a setting and the start of its names.

    `mtp` stands for the heads of multi-token prediction, which no setting of the model names.
    """
    if "mtp" in parts:
        checkpoint = dataclasses.replace(checkpoint, prediction_heads={})
    parts = [part for part in parts if part != "mtp"]
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if name.partition(".")[0] not in parts
    }
    absent: dict[str, Any] = dict.fromkeys(parts, False)
    config = dataclasses.replace(checkpoint.config, **absent)
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def _heads_of_one(ours: Checkpoint, theirs: Checkpoint, sides: Labels) -> list[str]:
    """Return a phrase where one side alone has heads of multi-token prediction."""
    has = [bool(side.prediction_heads) for side in (ours, theirs)]
    if has[0] == has[1]:
        return []
    return [
        f"only {sides[has.index(True)]} has heads of multi-token prediction, which no output needs"
    ]


def _unasked(weights: WeightComparison, dtype: torch.dtype | None) -> list[str]:
    asked = None if dtype is None else dtype_name(dtype)
    return [f"weights were rounded to {name}" for name in weights.rounded_to if name != asked]


def _lost_rows(padding: PaddingComparison | None, written: ModelConfig) -> list[str]:
    """Return a phrase where the rows of padding that were kept are others than the source's."""
    if padding is None or padding.largest == 0.0:
        return []
    return [f"{padding}, of which the result keeps {written.vocab_size - padding.entries:,}"]


def rounded(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Checkpoint:
    """Return the checkpoint with its weights rounded to `dtype` as they are read."""
    if dtype is None:
        return checkpoint
    tensors: dict[str, LazyTensor] = {
        name: tensor if stays_float32(name) else cast_to(tensor, dtype)
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
        environment = os.environ | {PARENT: str(os.getpid())}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            reader = "transformers" if transformers else "mlm-eval"
            raise InputError(f"{folder} cannot be loaded by {reader}: {reason}")
        return load_file(answer)


if __name__ == "__main__":  # the fresh process of `verify_conversion`
    die_with_parent(int(os.environ[PARENT]))
    folder, question, answer = (Path(argument) for argument in sys.argv[1:4])
    found = outputs(open_checkpoint(folder), load_file(question))
    save_file({name: values.contiguous() for name, values in found.items()}, answer)
