"""`mlm-eval mlm` and `mlm-eval lm`: masked and causal language models trained on text files."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.dtypes import resolve_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer, check_fits
from mlm_eval.checkpoints.tokenizers.tokenizer_type import added_entries
from mlm_eval.engine.batching import map_batches, pack
from mlm_eval.engine.engine import Engine
from mlm_eval.model.bert import BERT
from mlm_eval.model.gpt import GPT
from mlm_eval.model.initial import new_checkpoint
from mlm_eval.model.sizes import initial_config
from mlm_eval.ranks.collectives import on_main
from mlm_eval.reporting.results import Result, checkpoint_record, exponential, versions
from mlm_eval.reporting.text import large, training_plan
from mlm_eval.tasks.data.tokens import kept_arrays
from mlm_eval.tasks.language.data import (
    MaskedText,
    SampleRange,
    SpecialTokens,
    TextWindows,
    TokenizedText,
    read_documents,
    tokenize_documents,
)
from mlm_eval.tasks.language.settings import MaskedTextSettings, TextSettings, why_untrained
from mlm_eval.training.data import Sample, collate, sample_length
from mlm_eval.training.loop import train
from mlm_eval.training.objectives import CausalLM, MaskedLM
from mlm_eval.training.settings import Listener, TrainingProgress, TrainReport, TrainSettings

RESULT = "result.json"


def start_from(
    text: TextSettings,
    *,
    init: str | Path,
    tokenizer: Tokenizer,
    seed: int,
    overrides: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Return a new model to train on `text`: what `--init` stands for.

    Raises:
        InputError: There is no such size or file; see `sizes.initial_config`.
    """
    config = initial_config(
        init,
        family=text.family,
        vocab_entries=tokenizer.vocab_size,
        added_entries=added_entries(tokenizer, {}),
        overrides=overrides,
    )
    return new_checkpoint(config, seed=seed)


def check_start(text: TextSettings, checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[str]:
    """Return warnings about a checkpoint as the start of language-model training.

    Raises:
        InputError: It is of the other family, lacks the language-model head, or the tokenizer does
            not fit it.
    """
    config, where = checkpoint.config, checkpoint.provenance.path
    if config.family != text.family:
        other = {"bert": "lm", "gpt": "mlm"}[text.family]
        way_out = "which mlm-eval does not train"
        if config.family != "t5":
            way_out = f"train it with mlm-eval {other}"
        raise InputError(f"{where} is a {config.family.upper()} model; {way_out}")
    if why := why_untrained(config):
        raise InputError(f"{where} has {why}")
    misfit = check_fits(tokenizer, config.vocab_size, config.family)
    return [*([] if misfit is None else [misfit]), *_check_experts(checkpoint)]


AUXILIARY_LOSSES = {
    "moe_aux_loss_coeff": "a loss that balances its experts",
    "moe_z_loss_coeff": "a loss that keeps its router's logits small",
}
"""What a run of Megatron's may add to the loss of a mixture of experts, and mlm-eval does not."""


def _check_experts(checkpoint: Checkpoint) -> list[str]:
    """Return warnings about what of Megatron's training of experts is not done here.

    Raises:
        InputError: The run that saved the checkpoint added a loss for its experts.
    """
    args, where, warnings = checkpoint.provenance.args, checkpoint.provenance.path, []
    if checkpoint.config.num_experts:
        kinds = args.get("moe_router_load_balancing_type")
        balanced = any(
            "aux_loss" in str(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])
        )
        for name, what in AUXILIARY_LOSSES.items():
            coefficient = args.get(name)
            coefficients = coefficient if isinstance(coefficient, list) else [coefficient]
            acts = any(coefficients) and (balanced or name != "moe_aux_loss_coeff")
            if acts:
                raise InputError(
                    f"{where} was trained with {what} (args.{name} = {coefficient}), which "
                    f"mlm-eval does not compute; train on without it with --set {name}=0"
                )
    if checkpoint.config.moe_router_enable_expert_bias:
        warnings.append(
            "the biases that choose experts stay as they are: Megatron moves them after each step "
            "(moe_router_bias_update_rate), mlm-eval does not"
        )
    if checkpoint.prediction_heads:
        warnings.append(
            "the heads of multi-token prediction are not trained, and the result has none"
        )
    return warnings


def pretrain(
    engine: Engine,
    tokenizer: Tokenizer,
    text: TextSettings,
    settings: TrainSettings,
    *,
    output_dir: str | Path,
    restart: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Result:
    """Train a causal or, with `MaskedTextSettings`, a masked language model; every rank calls it.

    Writes what `training.loop.train` writes into `output_dir`, and result.json. An evaluation is
    the mean loss on held-out text: nats per masked or per predicted token.

    Args:
        engine: Loaded in float32, from a checkpoint or from `start_from`.
        tokenizer: Its vocabulary.
        text: The data.
        settings: How to train.
        output_dir: Where everything goes.
        restart: Discard an interrupted run in `output_dir`; without, the same run is resumed.
        overwrite: Replace a finished run in `output_dir`, or an interrupted one that is another.
        listener: Called with what happens, on rank 0.

    Raises:
        InputError: As `training.loop.train`; or the text or the tokenizer do not fit.
    """
    output, settings = Path(output_dir), settings.on(engine.device.type)
    listener = listener if listener is not None and engine.is_main else Listener()
    warnings = check_start(text, engine.checkpoint, tokenizer)
    finished = on_main((output / RESULT).exists)
    if finished and not overwrite:
        raise InputError(
            f"{output} holds a finished run ({RESULT}); replace it with --overwrite, or choose "
            "another --output-dir"
        )
    positions = engine.config.max_position_embeddings
    length = text.seq_length or positions
    least = 8 if isinstance(text, MaskedTextSettings) else 2
    if not least <= length <= positions:
        raise InputError(
            f"--seq-length is {length}; this model takes {least} to {positions} tokens"
        )
    samples = _Samples(engine, tokenizer, text, length, settings.seed, output / "text")
    objective = CausalLM() if samples.special is None else MaskedLM()
    plan = training_plan({**dataclasses.asdict(settings), "seq_length": length})
    listener.log(
        f"work ahead: to train on {len(samples.train):,} samples ({plan}), to evaluate "
        f"{len(samples.dev):,}"
    )

    def evaluate(progress: TrainingProgress) -> dict[str, Any]:
        started = time.perf_counter()
        on_progress = partial(listener.on_evaluation, "dev")
        found = text_metrics(engine, samples.dev, dtype=settings.dtype, on_progress=on_progress)
        listener.log(
            f" > |{progress.place}| metrics for dev: loss = {found['loss']:.4f}, perplexity = "
            f"{large(found['perplexity'])}, accuracy = {100 * found['accuracy']:.4f} %, "
            f"elapsed time (sec): {time.perf_counter() - started:.1f}"
        )
        return found

    on_main(lambda: (output / RESULT).unlink(missing_ok=True) if finished else None)
    report = train(
        engine,
        samples.train,
        objective,
        settings,
        output_dir=output,
        evaluate=evaluate,
        restart=restart or finished,
        replace=overwrite,
        listener=listener,
        decided_by={
            "tokenizer": tokenizer.sha256,
            "text": samples.sha256_of_all,
            "dev_share": text.dev_share,
        },
        args={"seq_length": length},
        tokenizer=tokenizer,
    )
    result = _result(engine, tokenizer, text, settings, samples, report, warnings)
    on_main(lambda: result.write(output / RESULT))
    return result


class _Samples:
    """Training and held-out samples, tokenized by rank 0 and mapped by all."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        text: TextSettings,
        length: int,
        seed: int,
        folder: Path,
    ) -> None:
        self.tokenizer, self.settings, self.length = tokenizer, text, length
        self.pairs = engine.config.binary_head
        masked = isinstance(text, MaskedTextSettings)
        self.special = SpecialTokens.of(tokenizer) if masked else None
        self.sha256: dict[str, str] = {}
        tokens = self._tokens(text.data, folder)
        whole = self._cut(tokens, seed)
        self.train: Sequence[Sample] = whole
        self.num_tokens = tokens.tokens.numel()
        # Another seed: masks of their own, which are the same at every evaluation because nobody
        # calls set_epoch on these samples.
        if text.dev:
            self.dev: Sequence[Sample] = self._cut(self._tokens(text.dev, folder), seed + 1)
            return
        count = max(1, round(len(whole) * text.dev_share))
        if len(whole) < 2:
            raise InputError(
                "the text makes a single sample, so none can be held out; give more text, or --dev"
            )
        if count == len(whole):
            raise InputError(
                f"--dev-share {text.dev_share} of {count} samples leaves none to train on; lower "
                "it, or give --dev"
            )
        self.train = SampleRange(whole, 0, len(whole) - count)
        self.dev = SampleRange(self._cut(tokens, seed + 1), len(whole) - count, len(whole))

    @property
    def sha256_of_all(self) -> str:
        """Digest of the files' contents, in their order."""
        return hashlib.sha256(" ".join(self.sha256.values()).encode()).hexdigest()

    def _cut(self, tokens: TokenizedText, seed: int) -> MaskedText | TextWindows:
        if self.special is None:
            return TextWindows(tokens, length=self.length)
        assert isinstance(self.settings, MaskedTextSettings)
        return MaskedText(
            tokens,
            self.special,
            length=self.length,
            seed=seed,
            pairs=self.pairs,
            probability=self.settings.mask_probability,
            whole_words=self.settings.whole_words,
        )

    def _tokens(self, paths: Sequence[Path], folder: Path) -> TokenizedText:
        """Return the tokens of files, kept on disk under what they were made from."""
        from safetensors.torch import load_file

        path, sha256 = on_main(lambda: self._tokenized(paths, folder))
        self.sha256 |= sha256
        return TokenizedText(**load_file(path))

    def _tokenized(self, paths: Sequence[Path], folder: Path) -> tuple[Path, dict[str, str]]:
        """Return the file with the tokens, made unless it is there, and what it is of; rank 0."""
        # Read first, so that a missing file fails before we hash it.
        mlm = self.special is not None
        documents = list(read_documents(paths, whole_files=not mlm))
        sha256 = {
            str(path): hashlib.sha256(path.expanduser().read_bytes()).hexdigest() for path in paths
        }
        parts = [self.settings.kind, self.tokenizer.sha256, *sha256.values()]
        key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
        target = folder / f"tokens-{key}.safetensors"
        end = None if mlm else self.tokenizer.eot_id

        def make() -> dict[str, Any]:
            tokens = tokenize_documents(documents, self.tokenizer, end=end, sentences=mlm)
            return {name: value.numpy() for name, value in vars(tokens).items()}

        kept_arrays(
            target, make, whole=lambda found: set(found) == set(TokenizedText.__annotations__)
        )
        return target, sha256


@torch.no_grad()
def text_metrics(
    engine: Engine,
    data: Sequence[Sample],
    *,
    dtype: str = "float32",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return loss, perplexity and accuracy of a language model on samples, on every rank the same.

    `loss` is what training lowers: the mean over masked (BERT) or predicted tokens, in nats. A BERT
    with a binary head adds the mean loss of the segments' order; then `lm_loss` and `order_loss`
    are its two parts. `score` is the negative loss.

    Args:
        engine: With the model.
        data: Samples of the kind that it was trained on.
        dtype: Dtype of the matrix products.
        on_progress: Takes (samples done, samples in all), on rank 0.
    """

    def run(indices: list[int]) -> Tensor:
        """Return sums of losses, hits, predictions; of the orders' losses, and right ones."""
        batch = collate([data[index] for index in indices], device=engine.device)
        order = None
        with torch.autocast(engine.device.type, resolve_dtype(dtype), enabled=dtype != "float32"):
            if isinstance(engine.model, BERT):
                losses, hits, count, order = MaskedLM().parts(engine.model, batch, None)
            else:
                assert isinstance(engine.model, GPT)
                losses, hits, count = CausalLM().loss_and_hits(engine.model, batch, None)
        found = [losses.sum(), hits.sum(), losses.new_full((), count)]
        if order is not None:
            exchanged = batch.labels[:, 0]
            found += [F.cross_entropy(order, exchanged, reduction="sum")]
            found += [(order.argmax(dim=-1) == exchanged).sum()]
        sums = torch.stack([value.double() for value in found])
        return F.pad(sums, (0, 5 - len(sums)))

    lengths = [sample_length(data, index) for index in range(len(data))]
    batches = pack(lengths, engine.batch_tokens)
    results = map_batches(run, batches, engine.mesh, on_progress=on_progress)
    sums = torch.stack([result for _, result in results]).sum(dim=0)
    loss, hits_in_all, tokens, order_loss, right = sums.tolist()
    loss, order_loss = loss / tokens, order_loss / len(data)
    metrics = {
        "loss": loss + order_loss,
        "perplexity": exponential(loss),
        "accuracy": hits_in_all / tokens,
        "score": -loss - order_loss,
    }
    if engine.config.binary_head:
        metrics |= {"lm_loss": loss, "order_loss": order_loss, "order_accuracy": right / len(data)}
    return metrics


def _result(
    engine: Engine,
    tokenizer: Tokenizer,
    text: TextSettings,
    settings: TrainSettings,
    samples: _Samples,
    report: TrainReport,
    warnings: list[str],
) -> Result:
    masked = text if isinstance(text, MaskedTextSettings) else None
    last = {k: v for k, v in report.evaluations[-1].items() if k not in ("step", "epoch", "score")}
    best = (
        None
        if report.best is None
        else {"step": report.best["step"], "loss": -report.best["score"]}
    )
    return Result(
        task=text.kind,
        protocol="causal-lm" if masked is None else "masked-lm",
        metrics={**last, "best": best, "final_training_loss": report.losses[-1]},
        counts={
            "training_tokens": samples.num_tokens,
            "training_samples": len(samples.train),
            "dev_samples": len(samples.dev),
            "steps": report.steps,
            "samples_seen": report.samples,
        },
        settings={
            **dataclasses.asdict(settings),
            "seq_length": samples.length,
            "mask_probability": masked and masked.mask_probability,
            "whole_words": masked and masked.whole_words,
            "vocab_size": engine.vocab_size,
            "tp": engine.tp,
            "dp": engine.dp,
            "device": engine.device.type,
            "tokenizer": tokenizer.record(),
            "data": {
                "path": ", ".join(str(path) for path in text.data),
                "dev": ", ".join(str(path) for path in text.dev)
                or f"the last {text.dev_share:.0%}",
                "sha256": samples.sha256,
            },
            "warnings": warnings,
        },
        checkpoint=checkpoint_record(engine.checkpoint),
        timing={
            "load_seconds": engine.load_seconds,
            "train_seconds": report.seconds,
            "samples_per_second": report.samples_per_second,
        },
        versions=versions(),
    )
