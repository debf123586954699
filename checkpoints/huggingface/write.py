"""Writer of Hugging Face folders that plain `from_pretrained` loads, a few tensors at a time.

The folder holds config.json, generation_config.json (causal models), model.safetensors or shards
with their index, the tokenizer where there is one, and a README.md that says what it was made from.
It is written beside the target and renamed at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mlm_eval import __version__
from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.dtypes import resolve_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import output_folder, refuse_source
from mlm_eval.checkpoints.files.safetensors_file import write_safetensors
from mlm_eval.checkpoints.huggingface.plan import Plan, plan_conversion
from mlm_eval.checkpoints.huggingface.tokenizer import TokenizerFiles, tokenizer_files
from mlm_eval.checkpoints.lazy import LazyTensor
from mlm_eval.checkpoints.tokenizer import Tokenizer, check_entries
from mlm_eval.checkpoints.vocabulary import with_rows

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", re.IGNORECASE)
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


@dataclass(frozen=True)
class Report:
    """What a conversion wrote.

    Attributes:
        path: The folder.
        model_class: The class of transformers that loads it.
        dtype: Of the weights.
        vocab_size: Rows of the vocabulary.
        num_bytes: Size of the weights.
        files: Names of the files.
        notes: Changes of form that leave the function as it is.
        approximations: What transformers computes differently; empty for an exact conversion.
        warnings: What the user should know.
    """

    path: Path
    model_class: str
    dtype: str
    vocab_size: int
    num_bytes: int
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    approximations: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def write_huggingface(
    checkpoint: Checkpoint,
    target: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    vocab: str = "true",
    true_vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    allow_approximate: bool = False,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Report:
    """Write `checkpoint` as a Hugging Face folder and return what was written.

    Args:
        checkpoint: What to convert, of any format.
        target: Folder to make.
        dtype: Of the weights; None keeps each tensor's.
        max_shard_size: Largest safetensors file, in bytes or like "500MB".
        vocab: `true` leaves out the rows that only pad the vocabulary, where its true size is
            known; `padded` keeps all stored rows.
        true_vocab_size: The tokenizer's size; None: from `tokenizer`.
        tokenizer: The tokenizer to write into the folder.
        allow_approximate: Convert although transformers computes something slightly different.
        overwrite: Replace a checkpoint that is there.
        on_progress: Told about the bytes of weights written.

    Raises:
        InputError: The target exists or cannot be written, transformers has no such model, or the
            tokenizer does not fit.
    """
    target = Path(target)
    dtype = None if dtype is None else resolve_dtype(dtype)
    limit = parse_size(max_shard_size)
    refuse_source(checkpoint.provenance.files, target)
    files = None
    if tokenizer is not None:
        config = checkpoint.config
        files = tokenizer_files(
            tokenizer, family=config.family, max_length=config.max_position_embeddings
        )
    warnings = list(files.warnings) if files is not None else []
    checkpoint, vocab_note = _choose_vocab(checkpoint, vocab, true_vocab_size, tokenizer, warnings)
    plan = plan_conversion(checkpoint, dtype=dtype, allow_approximate=allow_approximate)
    special = _special_tokens(checkpoint, files)
    plan.hf.update(special)
    shards = plan_shards(plan.tensors, limit, dtype)
    total = sum(_bytes(tensor, dtype) for tensor in plan.tensors.values())
    meter = _Meter(total, on_progress)
    with output_folder(target, overwrite=overwrite, needs=total) as folder:
        _write_json(folder / "config.json", plan.hf)
        if checkpoint.config.family == "gpt":
            known = {key: value for key, value in special.items() if value is not None}
            _write_json(folder / "generation_config.json", {"_from_model_config": True, **known})
        for name, tensors in shards.items():
            write_safetensors(folder / name, tensors, dtype=dtype, on_bytes=meter.add)
        if len(shards) > 1:
            _write_json(folder / "model.safetensors.index.json", _index(shards, total))
        if files is not None:
            files.write(folder)
        report = Report(
            path=target,
            model_class=plan.model_class,
            dtype=plan.hf["dtype"],
            vocab_size=plan.hf["vocab_size"],
            num_bytes=total,
            files=sorted([*(entry.name for entry in folder.iterdir()), "README.md"]),
            notes=[*plan.notes, *([vocab_note] if vocab_note else [])],
            approximations=plan.approximations,
            warnings=warnings,
        )
        (folder / "README.md").write_text(
            _readme(checkpoint, plan, report, vocab_note), encoding="utf-8"
        )
    return report


def parse_size(size: int | str) -> int:
    """Return a number of bytes for a size such as "5GB", in decimal units.

    Raises:
        InputError: The size is not understood, or not positive.
    """
    match = SIZE.fullmatch(str(size).strip())
    number = size if isinstance(size, int) else 0
    if match:
        number = int(float(match[1]) * UNITS[match[2].upper()])
    elif isinstance(size, str) and size.strip().isdigit():
        number = int(size)
    if number < 1:
        raise InputError(f"--max-shard-size {size!r} is no size; use something like 5GB or 500MB")
    return number


def _choose_vocab(
    checkpoint: Checkpoint,
    vocab: str,
    true_size: int | None,
    tokenizer: Tokenizer | None,
    warnings: list[str],
) -> tuple[Checkpoint, str | None]:
    """Return the checkpoint with the rows to write, and a note where some are left out.

    Megatron's softmax runs over the padding rows too: without them probabilities grow a little.
    """
    if vocab not in ("true", "padded"):
        raise InputError(f"--vocab {vocab!r} is unknown; use padded or true")
    stored = checkpoint.config.vocab_size
    size = tokenizer.vocab_size if tokenizer is not None else None
    true_size = true_size if true_size is not None else size
    largest = max(true_size or 0, size or 0)
    if largest:
        check_entries(largest, stored)
    if vocab == "true" and size is not None and true_size is not None and size > true_size:
        raise InputError(
            f"the tokenizer has {size} entries where {true_size} rows are to be kept; "
            "this is not the tokenizer of this model, or the size is wrong"
        )
    if vocab == "true" and true_size is None:
        if checkpoint.provenance.format != "huggingface":
            warnings.append(
                f"all {stored} stored rows of the vocabulary are kept, padding included, since "
                "no tokenizer says how "
                "many are true; give --tokenizer DIR"
            )
        return checkpoint, None
    if vocab == "padded" or true_size in (None, stored):
        return checkpoint, None
    assert true_size is not None
    return (
        with_rows(checkpoint, true_size),
        f"{stored - true_size} rows that pad the vocabulary are left out: {true_size} remain",
    )


def _special_tokens(checkpoint: Checkpoint, files: TokenizerFiles | None) -> dict[str, int | None]:
    """Return the ids of special tokens; null where unknown, since defaults would be wrong."""
    keys = ["bos_token_id", "eos_token_id", "pad_token_id"]
    known = {} if files is None else files.token_ids
    rows = checkpoint.config.vocab_size
    ids = {key: known.get(key) for key in keys}
    return {key: None if index is None or index >= rows else index for key, index in ids.items()}


def _bytes(tensor: LazyTensor, dtype: torch.dtype | None) -> int:
    return tensor.numel * (dtype or tensor.dtype).itemsize


def plan_shards(
    tensors: Mapping[str, LazyTensor], limit: int, dtype: torch.dtype | None
) -> dict[str, dict[str, LazyTensor]]:
    """Return file names with their tensors in order: up to `limit` bytes a file, or one tensor."""
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = _bytes(tensor, dtype)
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def _index(shards: Mapping[str, Mapping[str, LazyTensor]], total: int) -> dict[str, Any]:
    count = sum(tensor.numel for shard in shards.values() for tensor in shard.values())
    places = {name: file for file, shard in shards.items() for name in shard}
    return {
        "metadata": {"total_parameters": count, "total_size": total},
        "weight_map": dict(sorted(places.items())),
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


class _Meter:
    """Turns pieces of bytes into (done, total)."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self.total, self.report, self.done = total, report, 0

    def add(self, count: int) -> None:
        self.done += count
        if self.report is not None:
            self.report(self.done, self.total)


def _readme(checkpoint: Checkpoint, plan: Plan, report: Report, vocab_note: str | None) -> str:
    """Return the model card: what the folder was made from, and what was changed."""
    p, c = checkpoint.provenance, checkpoint.config
    name = p.path.name
    if re.fullmatch(r"release|iter_\d+", name):
        name = f"{p.path.resolve().parent.name}/{name}"
    facts = [p.format]
    if p.checkpoint_version is not None:
        facts.append(f"checkpoint version {p.checkpoint_version:.1f}")
    if p.format != "huggingface":
        facts.append(
            f"tensor parallel {p.tensor_parallel} x pipeline parallel {p.pipeline_parallel}"
        )
    if isinstance(p.iteration, int):
        facts.append(f"iteration {p.iteration}")
    key = "activation_function" if "activation_function" in plan.hf else "hidden_act"
    activation = (
        f"`{c.activation}` (from {p.config_sources.get('activation', 'the model')}), "
        f"written as `{plan.hf[key]}`"
    )
    rows = {
        "made from": f"{name}: {', '.join(facts)}",
        "digest of the source": f"`{p.digest}`",
        "weights": f"{checkpoint.num_parameters:,} parameters, {report.dtype}",
        "vocabulary": vocab_note or f"{report.vocab_size} rows, all that the source has",
        "activation": activation,
    }
    lines = [
        "---",
        "library_name: transformers",
        "---",
        "",
        f"# {plan.model_class}",
        "",
        f"Converted by mlm-eval {__version__}. Load it with "
        f"`transformers.{plan.model_class}.from_pretrained(folder)`; it needs no code of its own.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    for title, sentences in (
        ("Changes of form (the function is the same)", plan.notes),
        ("Approximations (the function differs)", report.approximations),
        ("To know about the source", [*p.warnings, *report.warnings]),
    ):
        if sentences:
            lines += ["", f"## {title}", "", *(f"- {sentence}" for sentence in sentences)]
    return "\n".join(lines) + "\n"
