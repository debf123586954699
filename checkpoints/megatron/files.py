"""The files of Megatron's `torch` format: where they are, what each holds, what they must share.

Each tensor-parallel rank and pipeline stage wrote one, mp_rank_XX[_YYY]/model_optim_rng.pt.
Source: docs/megatron.md, "Folders and files", "Top-level keys".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safe_pickle import Stub, is_scalar, printable
from mlm_eval.checkpoints.files.state_dict import plain_tensor
from mlm_eval.checkpoints.files.torch_file import TorchFile, read_torch_file
from mlm_eval.checkpoints.lazy import LazyTensor, StoredTensor
from mlm_eval.checkpoints.megatron import names
from mlm_eval.checkpoints.megatron.args import saved_args
from mlm_eval.checkpoints.megatron.relatives import refuse_relative, refuse_state_dict

MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
"""The second: distributed optimizer of 2022-03 to 2023-05, with optim.pt in folders of its own."""

RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?")

_MAX_DEPTH = 16  # of the dicts in `model`; Megatron nests four
_MAX_TENSORS = 1_000_000

SAME_RUN = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "padded_vocab_size",
    "ffn_hidden_size",
    "tensor_model_parallel_size",
    "model_parallel_size",
    "pipeline_model_parallel_size",
    "consumed_train_samples",
    "seed",
)
"""Args that are equal in all files of one save."""


@dataclass
class RankFile:
    """One file: the flat tensors of each model chunk, and the rest."""

    path: Path
    torch_file: TorchFile
    args: dict[str, Any]
    chunks: list[dict[str, LazyTensor]]
    version: float | None
    """As saved; None where the file has none."""
    iteration: int | None


def scan_ranks(folder: Path) -> dict[tuple[int, ...], Path]:
    """Return the model files by the numbers in their folder's name.

    Folders without one are skipped: they hold a part of the optimizer.

    Raises:
        InputError: There is no model file.
    """
    paths: dict[tuple[int, ...], Path] = {}
    folders = 0
    others: set[str] = set()
    for entry in sorted(folder.iterdir()):
        match = RANK_FOLDER.fullmatch(entry.name)
        if not match or not entry.is_dir():
            continue
        folders += 1
        for name in MODEL_FILES:
            if (entry / name).is_file():
                paths[tuple(int(part) for part in match.groups() if part)] = entry / name
                break
        else:
            others.update(file.name for file in entry.iterdir())
    if not paths:
        refuse_relative(folder)
        found = f" (found {', '.join(sorted(others)[:4])})" if others else ""
        raise InputError(
            f"{folder} has {folders} mp_rank_XX folder(s) but no {MODEL_FILES[0]} in them{found}; "
            "copy the model files too"
        )
    return paths


def read_rank(path: Path) -> RankFile:
    """Return the contents of one file; no weight is read.

    Raises:
        InputError: The file is missing or damaged, or is not a Megatron model file.
    """
    torch_file = read_torch_file(path)
    value = torch_file.value
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__}, not the dictionary that Megatron saves; give "
            "--ckpt a Megatron checkpoint"
        )
    chunk_keys = sorted(
        (key for key in value if isinstance(key, str) and re.fullmatch(r"model\d+", key)),
        key=lambda key: int(key[5:]),
    ) or [key for key in ("model", "sd") if key in value]
    chunks = [_flatten(value[key], path) for key in chunk_keys if isinstance(value[key], dict)]
    if not any(chunks):
        refuse_state_dict(path, filter(is_scalar, map(str, value)))
        found = ", ".join(printable(str(key)) for key in list(value)[:5] if is_scalar(key))
        raise InputError(
            f"{path} has no 'model' entry with tensors in it (found {found or 'nothing'}); give "
            "--ckpt a Megatron model file"
        )
    version = _number(value, "checkpoint_version", path)
    iteration = _number(value, "iteration" if "iteration" in value else "total_iters", path)
    return RankFile(
        path,
        torch_file,
        saved_args(value.get("args"), str(path)),
        chunks,
        version=version,
        iteration=None if iteration is None else int(iteration),
    )


def _number(value: Mapping[Any, Any], key: str, path: Path) -> float | None:
    number = value.get(key)
    if number is None or (type(number) in (int, float) and 0 <= number < 2**53):
        return number
    raise InputError(
        f"{path}: {key} is not a number; the file is damaged or not Megatron's, copy it again"
    )


def _flatten(tree: Mapping[Any, Any], path: Path) -> dict[str, LazyTensor]:
    """Return the tensors in nested dicts under names joined by dots.

    Raises:
        InputError: A name is unreadable, the dicts are nested too deeply, or a value is a tensor
            of a kind that is not read.
    """
    flat: dict[str, LazyTensor] = {}
    left: list[tuple[str, int, Mapping[Any, Any]]] = [("", 1, tree)]
    seen = 0
    while left:
        prefix, depth, branch = left.pop()
        seen += len(branch)
        if depth > _MAX_DEPTH or seen > _MAX_TENSORS:
            raise InputError(
                f"{path} holds dictionaries nested without end; give --ckpt a Megatron model file"
            )
        for key, value in branch.items():
            if not isinstance(value, dict | StoredTensor | Stub):
                continue
            name = f"{prefix}{key}" if isinstance(key, str | int) else ""
            if not name or name != printable(name):
                raise InputError(
                    f"{path} has a parameter of an unreadable name ({printable(name) or 'none'}); "
                    "give --ckpt a Megatron model file"
                )
            if isinstance(value, dict):
                left.append((f"{name}.", depth + 1, value))
            elif not names.is_ignored(name) and (tensor := plain_tensor(value, name, str(path))):
                flat[name] = tensor
    return flat


def parallel_sizes(file: RankFile) -> tuple[int | None, int | None]:
    """Return the tensor- and pipeline-parallel sizes of the run; None and None where not saved.

    Raises:
        InputError: A size is 0.
    """
    args = file.args
    tp = args.get("tensor_model_parallel_size", args.get("model_parallel_size"))
    if tp is None:
        return None, None
    pp = args.get("pipeline_model_parallel_size")
    if tp < 1 or pp == 0:
        raise InputError(
            f"{file.path}: its args say {tp} tensor-parallel x {pp} pipeline ranks; the file is "
            "damaged, copy it again"
        )
    return tp, pp or 1


def check_same_run(files: dict[tuple[int, int], RankFile], tp: int, where: Path) -> None:
    """Refuse files that were not saved together.

    Raises:
        InputError: The files come from different saves, or were swapped.
    """
    first = files[0, 0]
    ranks = {}
    for rank, file in files.items():
        pairs = [
            ("iteration", first.iteration, file.iteration),
            ("checkpoint_version", first.version, file.version),
            *((f"args.{key}", first.args.get(key), file.args.get(key)) for key in SAME_RUN),
        ]
        for key, ours, theirs in pairs:
            if ours != theirs and is_scalar(ours) and is_scalar(theirs):
                raise InputError(
                    f"{where} mixes two checkpoints: {key} is {ours} in {first.path.parent.name} "
                    f"and {theirs} in {file.path.parent.name}; copy all ranks of one save"
                )
        if file.args.get("rank") is not None:
            ranks[rank] = file.args["rank"]
    # Training saves each file's own global rank; converters repeat one, which says nothing.
    if len(set(ranks.values())) < len(files):
        return
    for (t, p), saved in ranks.items():
        # In every mapping of ranks the tensor-parallel one runs fastest, and later stages have
        # higher ranks.
        if saved % tp != t or (p and saved < ranks[t, p - 1]):
            raise InputError(
                f"{files[t, p].path} was saved by rank {saved}, which is not tensor-parallel rank "
                f"{t} of pipeline stage {p}: the mp_rank folders were renamed or swapped; copy "
                "them again from their source"
            )
