"""Commands on checkpoints as files: inspect, convert, verify."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mlm_eval.checkpoints.errors import InputError, require
from mlm_eval.cli.command import command
from mlm_eval.cli.printing import show_text
from mlm_eval.cli.run import chosen_checkpoint, chosen_tokenizer, print_beside, tell_settings
from mlm_eval.cli.screen import phase, progress, say, say_warning
from mlm_eval.options import (
    DTYPES,
    FOLDER,
    SOFTMAX_ROWS,
    CheckpointOption,
    RunOptions,
    TokenizerOptions,
    again,
    option,
)

if TYPE_CHECKING:
    from mlm_eval.checkpoints.checkpoint import Checkpoint
    from mlm_eval.checkpoints.comparison import Comparison
    from mlm_eval.engine.batching import OnProgress


@dataclass(frozen=True, kw_only=True)
class InspectOptions(CheckpointOption):
    """The options of `inspect`."""

    ckpt: str | None = again(CheckpointOption, "ckpt", default=None)  # type: ignore[assignment]
    place: str | None = option("The checkpoint, without --ckpt.", None, positional=True, reads=True)
    as_json: bool = option("Print one JSON record.", False, flag="--json")
    overrides: tuple[str, ...] = again(RunOptions, "overrides")
    full_digest: bool = again(RunOptions, "full_digest")
    check: bool = option(
        "Read every weight: checksums, NaN and infinities, what ranks should hold alike. The exit "
        "code is 2 where something is found.",
        False,
        flag="--check",
    )


@command("inspect", InspectOptions)
def inspect(options: InspectOptions) -> None:
    """Loads no weights, but for --check.

    Example: mlm-eval inspect checkpoints/gpt2_345m

    Example: mlm-eval inspect --ckpt checkpoints/gpt2_345m --check
    """
    import json

    from mlm_eval.checkpoints.checkpoint import full_digest as hash_everything
    from mlm_eval.reporting.text import inspect_record, inspect_text

    place = options.ckpt or options.place
    if place is None or (options.ckpt and options.place):
        raise InputError("give one checkpoint: mlm-eval inspect PATH, or --ckpt PATH")
    checkpoint = chosen_checkpoint(place, options.overrides, allow_hostile=True)
    digest = hash_everything(checkpoint) if options.full_digest else checkpoint.provenance.digest
    record = inspect_record(checkpoint, digest)
    found: tuple[str, ...] = ()
    if options.check:
        from mlm_eval.checkpoints.soundness.check import check_everything

        with progress(True, unit="B", what="checking") as on_progress:
            checked = check_everything(checkpoint, on_progress=on_progress)
        record["check"], found = checked.to_dict(), checked.findings
    show_text(
        json.dumps(record, indent=2, default=str) if options.as_json else inspect_text(record)
    )
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise InputError(f"{checkpoint.provenance.path} is not sound: {found[0]}{more}")


@dataclass(frozen=True, kw_only=True)
class TargetOptions(CheckpointOption):
    """What `convert` writes, and how."""

    to: str = option(
        "hf (Hugging Face), megatron (torch format) or torch_dist.",
        choices=("hf", "megatron", "torch_dist"),
        aliases=(("huggingface", "hf"), ("hugging-face", "hf")),
    )
    output: Path = option("Folder to make; it appears whole or not at all.", writes=FOLDER)
    names: str | None = option(
        "megatron: core (megatron-core's parameter names) or legacy (Megatron v2.5's). Default: "
        "the source's, else core.",
        None,
        choices=("core", "legacy"),
    )
    tp: int | None = option(
        "Tensor-parallel size to write; default: as it was saved.", None, least=1
    )
    pp: int | None = option("Pipeline size to write; default: as it was saved.", None, least=1)
    ep: int | None = option(
        "Expert-parallel size to write; default: as it was saved.", None, least=1
    )
    etp: int | None = option(
        "Tensor-parallel ranks that share an expert; default: --tp, or 1 where experts have "
        "biases.",
        None,
        least=1,
    )
    dtype: str = option("auto (as stored), float32, bfloat16 or float16.", "auto", choices=DTYPES)
    vocab: str | None = option(
        "hf: true (the tokenizer's entries) or padded (all stored rows). Default: true where the "
        "tokenizer is known and the source is Megatron's, which pads.",
        None,
        choices=SOFTMAX_ROWS,
    )
    max_shard_size: str = option("Largest safetensors file (hf).", "5GB")
    verify: bool = option(
        "Compare the result's settings, weights and outputs with the source's first.",
        False,
        flag="--verify",
    )
    allow_approximate: bool = option(
        "Convert what the target cannot express exactly; measured and recorded.",
        False,
        flag="--allow-approximate",
    )
    push_to: str | None = option(
        "Push the folder to this repository of the Hugging Face hub too; a new one is private.",
        None,
        metavar="ORG/NAME",
    )
    overwrite: bool = option(
        "Replace a checkpoint that is at --output, and the files of --push-to.",
        False,
        flag="--overwrite",
    )


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(TokenizerOptions, TargetOptions):
    """The options of `convert`."""

    overrides: tuple[str, ...] = again(RunOptions, "overrides")


@command("convert", ConvertOptions)
def convert_checkpoint(options: ConvertOptions) -> None:
    """The new folder appears whole or not at all.

    Example: mlm-eval convert --ckpt gpt2_345m --to hf --output gpt2_345m_hf --verify

    Example: mlm-eval convert --ckpt gpt2_tp8 --to megatron --tp 2 --output gpt2_tp2
    """
    from mlm_eval.checkpoints.convert import convert
    from mlm_eval.reporting.text import comparison_text

    if options.verify and options.to == "hf":
        require("transformers", "--verify of a Hugging Face folder")

    def compare(*given: Any, **settings: Any) -> Comparison:
        from mlm_eval.engine.verify import verify_conversion  # imports the models

        say("verifying: the result is compared with its source")
        with comparing() as on_progress:
            return verify_conversion(*given, **settings, on_progress=on_progress)

    target = None
    if options.push_to is not None:
        from mlm_eval.checkpoints.hub.upload import check_target

        target = check_target(options.push_to, overwrite=options.overwrite)
    from mlm_eval.checkpoints.memory.byte_size import parse_bytes

    parse_bytes(options.max_shard_size, "--max-shard-size")
    checkpoint = chosen_checkpoint(options.ckpt, options.overrides)
    tell_settings(checkpoint)
    tokenizer = chosen_tokenizer(options.ckpt, options)
    for warning in checkpoint.provenance.warnings:
        say_warning(warning)
    with progress(True, unit="B", what="writing") as on_progress:
        done = convert(
            checkpoint,
            options.to,
            options.output,
            names=options.names,
            tp=options.tp,
            pp=options.pp,
            ep=options.ep,
            etp=options.etp,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            vocab=options.vocab,
            tokenizer=tokenizer,
            verify=options.verify,
            compare=compare,
            allow_approximate=options.allow_approximate,
            overwrite=options.overwrite,
            on_progress=on_progress,
        )
    for note in done.notes:
        say(f"note: {note}")
    for warning in [*done.warnings, *done.approximations, *done.missing]:
        say_warning(warning)
    show_text(f"{options.ckpt} -> {options.output} ({options.to})")
    if done.comparison is not None:
        show_text(comparison_text(done.comparison))
    if target is not None:
        with phase(f"pushing {options.output} to {options.push_to}"):
            address = target.push(options.output, f"Convert {options.ckpt} with mlm-eval")
        show_text(f"pushed: {address}")


@contextmanager
def comparing() -> Iterator[OnProgress | None]:
    """Yield a callback for the bytes of weights that have been compared.

    What takes time after the last of them, runs of both models, is named.
    """
    with ExitStack() as after, progress(True, unit="B", what="comparing weights") as on_progress:

        def update(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(done, total)
            if done >= total and not running:
                running.append(after.enter_context(phase("running both models")))

        running: list[None] = []
        yield update


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(TokenizerOptions, CheckpointOption):
    """The options of `verify`."""

    against: str = option("The other checkpoint, of any format.", reads=True, once=True)
    vocab: str | None = option(
        "true: the verdict is about the tokenizer's entries; padded: also about the rows that pad "
        "the vocabulary. Default: true where the tokenizer is known.",
        None,
        choices=SOFTMAX_ROWS,
    )
    tolerance: float = option(
        "Largest difference of an output that passes, as a share of the outputs' spread, where the "
        "two differ in form. Weights have to be the same.",
        2e-4,
    )
    output: Path | None = again(RunOptions, "output")
    overwrite: bool = again(RunOptions, "overwrite")
    overrides: tuple[str, ...] = again(RunOptions, "overrides")


@command("verify", VerifyOptions)
def verify(options: VerifyOptions) -> None:
    """The exit code is 3 where they differ.

    Example: mlm-eval verify --ckpt gpt2_tp8 --against gpt2_hf
    """
    from mlm_eval.engine.verify import compare_checkpoints
    from mlm_eval.reporting.results import write_json
    from mlm_eval.reporting.text import comparison_text

    first = chosen_checkpoint(options.ckpt, options.overrides)
    second = chosen_checkpoint(options.against, ())
    for side, checkpoint in (("--ckpt", first), ("--against", second)):
        for warning in checkpoint.provenance.warnings:
            say_warning(f"{side}: {warning}")
    with comparing() as on_progress:
        comparison = compare_checkpoints(
            first,
            second,
            tolerance=options.tolerance,
            entries=_entries(options, first, second),
            vocab=options.vocab,
            on_progress=on_progress,
        )
    print_beside(comparison_text(comparison), options.output)
    if options.output is not None:
        sides = {"ckpt": str(first.provenance.path), "against": str(second.provenance.path)}
        write_json(options.output, {**sides, **comparison.to_dict()})
    if not comparison.same:
        raise typer.Exit(3)


def _entries(options: VerifyOptions, first: Checkpoint, second: Checkpoint) -> int | None:
    """Return the entries of the tokenizer: of the larger one, where each side has its own.

    Raises:
        InputError: The tokenizer that was named has more entries than both models have rows.
    """
    from mlm_eval.checkpoints.tokenizer import check_entries, entries_within

    # Special tokens that were never given a row are no entries on either side.
    fewer, more = sorted((first.config.vocab_size, second.config.vocab_size))
    if options.tokenizer or options.vocab_file:
        tokenizer = chosen_tokenizer(options.ckpt, options)
        assert tokenizer is not None
        entries = entries_within(tokenizer, fewer)
        check_entries(entries, more, str(tokenizer.source))
        return entries
    found = [chosen_tokenizer(path, options) for path in (options.ckpt, options.against)]
    sizes = [entries_within(tokenizer, fewer) for tokenizer in found if tokenizer is not None]
    return min(max(sizes), more) if sizes else None
