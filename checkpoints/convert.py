"""One call for every change of format or parallel sizes: canonical tensors in, any writer out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.comparison import Comparison
from mlm_eval.checkpoints.dtypes import resolve_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.megatron.layout import (
    NAMES,
    is_for_v25,
    padded_vocabulary,
    save_layout,
    saved_ep,
)
from mlm_eval.checkpoints.memory.host import keep_freed_memory
from mlm_eval.checkpoints.soundness.odd_values import watched
from mlm_eval.checkpoints.soundness.replicas import compare_replicas
from mlm_eval.checkpoints.tokenizer import (
    Tokenizer,
    check_fits,
    entries_within,
    load_tokenizer,
)
from mlm_eval.checkpoints.tokenizers.copying import copy_tokenizer
from mlm_eval.checkpoints.tokenizers.tokenizer_type import added_entries, with_tokenizer_type

TARGET_FORMATS = ("hf", "megatron", "torch_dist")


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote."""

    path: Path
    to: str
    """`hf`, `megatron` or `torch_dist`."""
    notes: list[str]
    """What changed on the way, exactly (a folded gain, rows of padding left out)."""
    approximations: list[str]
    """What the target cannot express; empty for an exact conversion."""
    warnings: list[str]
    """What the user should know."""
    comparison: Comparison | None
    """How far the result is from its source, where that was measured."""
    missing: tuple[str, ...] = ()
    """What the folder lacks that its readers expect (a tokenizer)."""


def convert(
    checkpoint: Checkpoint,
    to: str,
    path: str | Path,
    *,
    names: str | None = None,
    tp: int | None = None,
    pp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    vocab: str | None = None,
    true_vocab_size: int | None = None,
    tokenizer: Tokenizer | str | Path | tuple[Path, Path] | None = None,
    verify: bool = False,
    compare: Callable[..., Comparison] | None = None,
    allow_approximate: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write `checkpoint` in another format, tensor by tensor.

    The folder is compared with its source before it takes its name: with `verify`, or where the
    conversion is approximate by nature; then nothing else may differ, and the README.md says what
    was measured.

    Args:
        checkpoint: What to convert, of any format.
        to: `hf`, `megatron` (torch format) or `torch_dist`.
        path: Folder to create; it appears whole or not at all.
        names: `core` (megatron-core's parameter names) or `legacy` (Megatron v2.5's, for that
            version to load); None: the source's, megatron-core's where it has neither. For
            `megatron`.
        tp: Tensor-parallel size of the result; None: the source's. Not for `hf`.
        pp: Pipeline size of the result; None: the source's. Not for `hf`.
        ep: Expert-parallel size of the result; None: the source's. For mixtures of experts.
        etp: Ranks that share an expert's width; None: see `LayoutOptions`.
        dtype: Dtype of the weights; None or `auto` keeps that of each.
        max_shard_size: Largest safetensors file (`hf`).
        vocab: `true` (the tokenizer's entries; Megatron's own padding of them for Megatron
            targets) or `padded` (the stored rows); None: true for `hf` and for legacy names where
            the tokenizer's size is known and the source is Megatron's, which pads, or
            `true_vocab_size` is stated; else the stored rows, so that a change of sizes and back
            gives the same bits.
        true_vocab_size: The tokenizer's size; None: that of `tokenizer`.
        tokenizer: The tokenizer to write with the model, or its folder or file, or its vocabulary
            and merges.
        verify: Refuse a result whose settings, weights or outputs differ from the source's.
        compare: Measures the difference: `mlm_eval.engine.verify.verify_conversion`, passed in
            because it needs the models, which nothing else here does.
        allow_approximate: Convert although the target cannot express the model exactly.
        overwrite: Replace an existing checkpoint.
        on_progress: Called with (bytes written, bytes in all).

    Raises:
        InputError: The target is unknown, exists, or cannot express the model; a size does not
            divide it; the tokenizer does not fit; or the result differs from its source.
    """
    keep_freed_memory()  # each piece that is written reuses the memory of the one before
    if verify and compare is None:
        raise InputError("verify=True needs compare=verify_conversion, from mlm_eval.engine.verify")
    if to not in TARGET_FORMATS:
        raise InputError(f"--to {to!r} is unknown; use {', '.join(TARGET_FORMATS)}")
    _check_names(names, to)
    if to == "hf" and not {tp, pp, ep, etp} <= {None, 1}:
        raise InputError(
            "--tp, --pp, --ep and --etp are for Megatron targets; a Hugging Face folder has no "
            "ranks"
        )
    if dtype == "auto":
        dtype = None
    if dtype is not None:
        dtype = resolve_dtype(dtype, auto="float32")
    if to == "hf" and vocab is None and true_vocab_size is not None:
        vocab = "true"  # a size that the caller states is a reason to cut any source to it
    tokenizer = _load(tokenizer)
    misfit = None
    if tokenizer is not None:
        misfit = check_fits(tokenizer, checkpoint.config.vocab_size, checkpoint.config.family)
        entries = entries_within(tokenizer, checkpoint.config.vocab_size)
        true_vocab_size = true_vocab_size or entries
    if vocab not in (None, "true", "padded"):
        raise InputError(f"--vocab {vocab!r} is unknown; use padded or true")
    if vocab == "true" and true_vocab_size is None:
        raise InputError(
            "--vocab true needs the tokenizer's size; give --tokenizer or --vocab-file"
        )
    checkpoint, odd = watched(checkpoint)
    large_replicas = compare_replicas(checkpoint.replicas, checkpoint.provenance.path)
    notes: list[str] = []
    missing: tuple[str, ...] = ()
    approximations: list[str] = []
    warnings: list[str] = []
    given_vocab = vocab
    if to == "megatron" and vocab is None and true_vocab_size is not None:
        # Megatron v2.5 takes one number of rows only, which follows from its tokenizer.
        source = checkpoint.provenance.names
        vocab = "true" if is_for_v25(checkpoint.config, names, source=source) else None
    sizes: dict[str, Any] = {
        "tp": tp or checkpoint.provenance.tensor_parallel,
        "pp": pp or checkpoint.provenance.pipeline_parallel,
        "ep": ep or saved_ep(checkpoint),
        "etp": etp,
        "dtype": dtype,
        "true_vocab_size": true_vocab_size if vocab == "true" else None,
    }
    expected: dict[str, Any] = {"to": to, "dtype": dtype, "entries": sizes["true_vocab_size"]}
    target = checkpoint
    if to != "hf" and tokenizer is not None:
        target = with_tokenizer_type(checkpoint, tokenizer)
        sizes["added_entries"] = added_entries(tokenizer, target.provenance.args)
    if given_vocab is None and vocab == "true" and checkpoint.provenance.format == "huggingface":
        # Its rows are no padding: none of them is cut that nobody asked to cut.
        added = sizes.get("added_entries", 0)
        rows, _ = padded_vocabulary(checkpoint, sizes["tp"], true_vocab_size, None, added=added)
        if rows < checkpoint.config.vocab_size:
            sizes["true_vocab_size"] = expected["entries"] = None
    write: Callable[..., Any]
    written = None  # names of the parameters
    if to == "hf":
        from mlm_eval.checkpoints.huggingface.plan import plan_huggingface
        from mlm_eval.checkpoints.huggingface.write import write_huggingface

        plan = plan_huggingface(
            checkpoint,
            dtype=dtype,
            vocab=vocab,
            true_vocab_size=true_vocab_size,
            tokenizer=tokenizer,
            allow_approximate=allow_approximate,
        )
        notes, approximations, warnings = plan.notes, plan.approximations, plan.warnings
        expected |= {
            "entries": plan.hf["vocab_size"],
            "left_out": plan.left_out,
            "approximate": plan.approximate,
            "approximations": approximations,
        }
        missing = plan.tokenizer.warnings if tokenizer is None else ()
        write = partial(write_huggingface, plan, max_shard_size=max_shard_size)
    elif to == "megatron":
        from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch

        layout = save_layout(target, names, **sizes)
        written, notes, warnings = layout.names, list(layout.notes), list(layout.warnings)
        write = partial(write_megatron_torch, target, names=names, **sizes)
    else:
        from mlm_eval.checkpoints.megatron.write_dist import write_torch_dist

        write = partial(write_torch_dist, target, **sizes)
        written = "core"
    if written == "core":
        from mlm_eval.checkpoints.megatron.args import unheard_warnings

        warnings = [*warnings, *unheard_warnings(checkpoint.config)]
    comparison = None

    def finish(folder: Path) -> None:
        nonlocal comparison
        if to != "hf" and tokenizer is not None:
            copy_tokenizer(tokenizer, folder / "tokenizer")
        if compare is not None and (verify or approximations):
            comparison = compare(checkpoint, folder, **expected)
            if not comparison.as_allowed:
                raise InputError(
                    "the converted checkpoint differs from its source by "
                    f"{comparison.max_difference:.3g} ({'; '.join(comparison.differences())}), so "
                    f"{path} was not written; check the settings that `mlm-eval inspect` shows as "
                    "assumed, and report this if they are right"
                )
            if approximations:
                _record(folder, comparison)

    write(target=Path(path), overwrite=overwrite, finish=finish, on_progress=on_progress)
    warnings = [*large_replicas, *odd.warnings(), *warnings]
    if misfit is not None:
        warnings = [misfit, *warnings]
    if left := checkpoint.provenance.training_state:
        notes = [*notes, f"weights only: the source's {', '.join(left)} is not carried along"]
    return Conversion(Path(path), to, notes, approximations, warnings, comparison, missing)


def _check_names(names: str | None, to: str) -> None:
    """Refuse a choice of parameter names that a target format does not have.

    Raises:
        InputError: The names are unknown, or the format has others.
    """
    if names is None:
        return
    if names not in NAMES:
        raise InputError(f"--names {names!r} is unknown; use {', '.join(NAMES)}")
    if to == "hf" or (to == "torch_dist" and names == "legacy"):
        what = "a Hugging Face folder has its own" if to == "hf" else "torch_dist has core names"
        raise InputError(f"--names {names} is for --to megatron; {what}, leave it out")


def _load(tokenizer: Tokenizer | str | Path | tuple[Path, Path] | None) -> Tokenizer | None:
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, tuple):
        return load_tokenizer(vocab_file=tokenizer[0], merge_file=tokenizer[1])
    return load_tokenizer(directory=tokenizer)


def _record(folder: Path, comparison: Comparison) -> None:
    with (folder / "README.md").open("a", encoding="utf-8") as readme:
        readme.write(
            "\n## Measured difference\n\n"
            "Against the source, on the same random tokens in float32: largest difference of a "
            f"log-probability or logit {comparison.max_difference:.3g}, mean "
            f"{comparison.mean_difference:.3g}, same most likely token at "
            f"{100 * comparison.greedy_agreement:.2f} % of the positions.\n"
        )
