"""One call for every change of format or parallel sizes: canonical tensors in, any writer out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer

TARGETS = ("hf", "megatron", "torch_dist")


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        path: The folder.
        to: `hf`, `megatron` or `torch_dist`.
        notes: What changed on the way, exactly (a folded gain, a re-padded vocabulary).
        approximations: What the target cannot express; empty for an exact conversion.
        warnings: What the user should know.
    """

    path: Path
    to: str
    notes: list[str] = field(default_factory=list)
    approximations: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def convert(
    checkpoint: Checkpoint,
    to: str,
    path: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    vocab: str | None = None,
    true_vocab_size: int | None = None,
    tokenizer: Tokenizer | str | Path | tuple[Path, Path] | None = None,
    allow_approximate: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write `checkpoint` in another format, tensor by tensor.

    Args:
        checkpoint: What to convert, of any format.
        to: `hf`, `megatron` (torch format) or `torch_dist`.
        path: Folder to make; it appears whole or not at all.
        tp: Tensor-parallel size of the result; None: the source's. Not for `hf`.
        pp: Pipeline size of the result; None: the source's. Not for `hf`.
        dtype: Of the weights; None keeps each as it is.
        max_shard_size: Largest safetensors file (`hf`).
        vocab: `true` (the tokenizer's entries; Megatron's own padding of them for Megatron
            targets) or `padded` (the stored rows); None: true for `hf` where the tokenizer's size
            is known, else the stored rows, so that a change of sizes and back gives the same bits.
        true_vocab_size: The tokenizer's size, where known.
        tokenizer: The tokenizer to write into a Hugging Face folder, or its folder or file, or its
            vocabulary and merges.
        allow_approximate: Convert although the target cannot express the model exactly.
        overwrite: Replace a checkpoint that is there.
        on_progress: Called with (bytes written, bytes in all).

    Raises:
        InputError: The target is unknown, exists, or cannot express the model; a size does not
        divide it.
    """
    if to not in TARGETS:
        raise InputError(f"--to {to!r} is unknown; use {', '.join(TARGETS)}")
    common: dict[str, Any] = {"dtype": dtype, "overwrite": overwrite, "on_progress": on_progress}
    if to == "hf":
        if tp not in (None, 1) or pp not in (None, 1):
            raise InputError(
                "--tp and --pp are for Megatron targets; a Hugging Face folder has no ranks"
            )
        from mlm_eval.checkpoints.huggingface.write import write_huggingface

        if isinstance(tokenizer, tuple):
            tokenizer = load_tokenizer(vocab_file=tokenizer[0], merge_file=tokenizer[1])
        elif tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            tokenizer = load_tokenizer(directory=tokenizer)

        report = write_huggingface(
            checkpoint,
            path,
            max_shard_size=max_shard_size,
            vocab=vocab or ("true" if true_vocab_size is not None else "padded"),
            true_vocab_size=true_vocab_size,
            tokenizer=tokenizer,
            allow_approximate=allow_approximate,
            **common,
        )
        return Conversion(Path(path), to, report.notes, report.approximations, report.warnings)
    provenance = checkpoint.provenance
    sizes: dict[str, Any] = {
        "tp": tp or provenance.tensor_parallel,
        "pp": pp or provenance.pipeline_parallel,
        "true_vocab_size": true_vocab_size if vocab == "true" else None,
    }
    if to == "megatron":
        from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch

        write_megatron_torch(checkpoint, path, **sizes, **common)
    else:
        from mlm_eval.checkpoints.megatron.write_dist import write_torch_dist

        write_torch_dist(checkpoint, path, **sizes, **common)
    return Conversion(Path(path), to)
