"""Commands on checkpoints as files: inspect, convert, verify."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mlm_eval.cli.app import CHECKPOINTS, app
from mlm_eval.cli.options import (
    Ckpt,
    Config,
    FullDigest,
    MergeFile,
    Output,
    Sets,
    TokenizerDir,
    VocabFile,
)
from mlm_eval.cli.run import find_words, progress


@app.command(rich_help_panel=CHECKPOINTS)
def inspect(
    ckpt: Ckpt,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record.")] = False,
    set_: Sets = None,
    full_digest: FullDigest = False,
    config: Config = None,
) -> None:
    """Show what a checkpoint is: format, sizes, settings and where each came from.

    Loads no weights.

    Example: mlm-eval inspect --ckpt checkpoints/gpt2_345m
    """
    import json

    from mlm_eval.checkpoints.checkpoint import full_digest as hash_everything
    from mlm_eval.checkpoints.config import parse_overrides
    from mlm_eval.checkpoints.open import open_checkpoint
    from mlm_eval.reporting.text import inspect_record, inspect_text

    checkpoint = open_checkpoint(ckpt, parse_overrides(set_ or []), allow_hostile=True)
    digest = hash_everything(checkpoint) if full_digest else checkpoint.provenance.digest
    record = inspect_record(checkpoint, digest)
    print(json.dumps(record, indent=2, default=str) if as_json else inspect_text(record))


@app.command(rich_help_panel=CHECKPOINTS)
def convert(
    ckpt: Ckpt,
    to: Annotated[str, typer.Option(help="hf, megatron (torch format) or torch_dist.")],
    output: Annotated[Path, typer.Option(help="Folder to make; it appears whole or not at all.")],
    tp: Annotated[
        int | None,
        typer.Option(min=1, help="Tensor-parallel size to write; default: as it was saved."),
    ] = None,
    pp: Annotated[
        int | None, typer.Option(min=1, help="Pipeline size to write; default: as it was saved.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    vocab: Annotated[
        str | None,
        typer.Option(
            help="hf: true (the tokenizer's entries) or padded (all stored rows). Default: true "
            "where the tokenizer is known."
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file (hf).")] = "5GB",
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare the result's logits with the source's first."),
    ] = False,
    allow_approximate: Annotated[
        bool,
        typer.Option(
            "--allow-approximate",
            help="Convert what the target cannot express exactly; measured and recorded.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is at --output.")
    ] = False,
    tokenizer: TokenizerDir = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    set_: Sets = None,
    config: Config = None,
) -> None:
    """Change a checkpoint's format or its parallel sizes. One process; memory for a few tensors.

    Example: mlm-eval convert --ckpt gpt2_345m --to hf --output gpt2_345m_hf --verify

    Example: mlm-eval convert --ckpt gpt2_tp8 --to megatron --tp 2 --output gpt2_tp2
    """
    from mlm_eval.checkpoints.config import parse_overrides
    from mlm_eval.checkpoints.open import open_checkpoint
    from mlm_eval.engine.conversion import convert_checked
    from mlm_eval.reporting.text import comparison_text

    checkpoint = open_checkpoint(ckpt, parse_overrides(set_ or []))
    words = find_words(ckpt, tokenizer, vocab_file, merge_file)
    for warning in checkpoint.provenance.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    with progress(True, unit="B") as on_progress:
        done = convert_checked(
            checkpoint,
            to,
            output,
            tp=tp,
            pp=pp,
            dtype=dtype,
            max_shard_size=max_shard_size,
            vocab=vocab,
            tokenizer=words,
            verify=verify,
            allow_approximate=allow_approximate,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    for note in done.conversion.notes:
        print(f"note: {note}", file=sys.stderr)
    for warning in [*done.conversion.warnings, *done.conversion.approximations]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{ckpt} -> {output} ({to})")
    if done.comparison is not None:
        print(comparison_text(done.comparison))


@app.command(rich_help_panel=CHECKPOINTS)
def verify(
    ckpt: Ckpt,
    against: Annotated[str, typer.Option(help="The other checkpoint, of any format.")],
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of a log-probability that passes.")
    ] = 2e-4,
    output: Output = None,
    set_: Sets = None,
    config: Config = None,
) -> None:
    """Compare two checkpoints by their logits on the same tokens; exit code 3: they differ.

    Example: mlm-eval verify --ckpt gpt2_tp8 --against gpt2_hf
    """
    from mlm_eval.checkpoints.config import parse_overrides
    from mlm_eval.checkpoints.open import open_checkpoint
    from mlm_eval.engine.verify import compare_checkpoints
    from mlm_eval.reporting.results import write_json
    from mlm_eval.reporting.text import comparison_text

    overrides = parse_overrides(set_ or [])
    first, second = open_checkpoint(ckpt, overrides), open_checkpoint(against)
    comparison = compare_checkpoints(first, second, tolerance=tolerance)
    print(comparison_text(comparison))
    if output is not None:
        sides = {"ckpt": str(first.provenance.path), "against": str(second.provenance.path)}
        write_json(output, {**sides, **comparison.to_dict()})
    if not comparison.same:
        raise typer.Exit(3)
