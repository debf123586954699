"""The files of Megatron's `torch` format: where they are, what each holds, what they must share.

Each tensor-parallel rank and pipeline stage wrote one, mp_rank_XX[_YYY]/model_optim_rng.pt.
Source: docs/megatron.md, "Folders and files", "Top-level keys".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safe_pickle import Stub, is_scalar, printable
from mlm_eval.checkpoints.files.state_dict import plain_tensor
from mlm_eval.checkpoints.files.torch_file import TorchFile, read_torch_file
from mlm_eval.checkpoints.lazy import Concat, LazyTensor, Stacked, StoredTensor, Transposed
from mlm_eval.checkpoints.megatron import names
from mlm_eval.checkpoints.megatron.args import saved_args
from mlm_eval.checkpoints.megatron.relatives import refuse_relative, refuse_state_dict
from mlm_eval.checkpoints.parameters import REPLICATED, Parameter, ShardRule, cut_dim

MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
"""The second: distributed optimizer of 2022-03 to 2023-05, with optim.pt in folders of its own."""

RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?")

_MAX_DEPTH = 16  # of the dicts in `model`; Megatron nests four
_MAX_TENSORS = 1_000_000

Rank = tuple[int, int, int]
"""Tensor-parallel rank, pipeline stage and expert-parallel rank of a file, 0 without experts."""

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
    label: str = ""
    """What messages call it; empty: by its folder's name."""

    @property
    def called(self) -> str:
        """What messages call it."""
        return self.label or self.path.parent.name


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
    chunks = [flat_tensors(value[key], path) for key in chunk_keys if isinstance(value[key], dict)]
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


_SECOND_BRANCH = re.compile(r"(?P<first>.+\.mlp\.dense_h_to_4h)_2\.(?P<leaf>weight|bias)")


def read_flat_rank(path: Path, args: dict[str, Any], *, oldest: bool) -> RankFile:
    """Return the contents of one file that holds a state dict and nothing else, as NeMo writes it.

    Args:
        path: The file.
        args: What stands elsewhere.
        oldest: Its QKV rows are in the order of version 0.

    Raises:
        InputError: The file is missing or damaged, or is not a state dict.
    """
    torch_file = read_torch_file(path)
    value = torch_file.value
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    flat = flat_tensors(value, path) if isinstance(value, dict) else {}
    if not flat:
        raise InputError(f"{path} holds no weights; copy the file again")
    for name in [name for name in flat if _SECOND_BRANCH.fullmatch(name)]:
        match = _SECOND_BRANCH.fullmatch(name)
        assert match
        gate = f"{match['first']}.{match['leaf']}"
        if gate not in flat:
            raise InputError(f"{path} has {name} without {gate}; copy the file again")
        flat[gate] = Concat([flat[gate], flat.pop(name)], 0)
    return RankFile(path, torch_file, args, [flat], version=0.0 if oldest else 3.0, iteration=None)


def _number(value: Mapping[Any, Any], key: str, path: Path) -> float | None:
    number = value.get(key)
    if number is None or (type(number) in (int, float) and 0 <= number < 2**53):
        return number
    raise InputError(
        f"{path}: {key} is not a number; the file is damaged or not Megatron's, copy it again"
    )


def flat_tensors(tree: Mapping[Any, Any], path: Path) -> dict[str, LazyTensor]:
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


def check_same_run(files: dict[Rank, RankFile], tp: int, where: Path) -> None:
    """Refuse files that were not saved together.

    Raises:
        InputError: The files come from different saves, or were swapped.
    """
    first = files[0, 0, 0]
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
                    f"{where} mixes two checkpoints: {key} is {ours} in {first.called} "
                    f"and {theirs} in {file.called}; copy all ranks of one save"
                )
        if file.args.get("rank") is not None:
            ranks[rank] = file.args["rank"]
    # Training saves each file's own global rank; converters repeat one, which says nothing.
    if len(set(ranks.values())) < len(files):
        return
    for (t, p, e), saved in ranks.items():
        # In every mapping of ranks the tensor-parallel one runs fastest, and later stages have
        # higher ranks.
        if saved % tp != t or (p and saved < ranks[t, p - 1, e]):
            raise InputError(
                f"{files[t, p, e].path} was saved by rank {saved}, which is not tensor-parallel "
                f"rank {t} of pipeline stage {p}: the mp_rank folders were renamed or swapped; "
                "copy them again from their source"
            )


# ---- experts -------------------------------------------------------------------------------------
# In the `torch` format a rank holds some experts, by local numbers, and of each of them a part of
# its width: see `layout.ExpertLayout`. Source: docs/megatron.md, "Mixtures of experts".

NUMBERED = re.compile(r"(?P<head>.+\.mlp\.experts\.)(?P<number>\d+)\.(?P<tail>linear_fc[12]\.\w+)")
"""Canonical name of one expert's matrix, before the experts of a layer are stacked."""

_SLABS = re.compile(r"(?P<head>.+\.mlp\.experts\.)weight(?P<number>[12])")


def split_slabs(tensors: Mapping[str, LazyTensor], ep: int) -> dict[str, LazyTensor]:
    """Return a file's tensors with the legacy grouped matrices as one matrix an expert.

    `weight1` has the shape `[hidden, experts * width]` but holds `[experts, hidden, width]`, which
    stand on the left of the product; `weight2` is `[experts * width, hidden]`.
    Source: megatron/core/transformer/moe/experts.py, GroupedMLP (core 0.16).

    Args:
        tensors: By flat key.
        ep: Expert-parallel size: the file holds one in so many of the router's experts.
    """
    found: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        match = _SLABS.fullmatch(key)
        if not match:
            found[key] = tensor
            continue
        router = tensors.get(match["head"].replace(".experts.", ".router.") + "weight")
        experts = router.shape[0] // ep if router is not None else 0
        if not experts or len(tensor.shape) != 2 or not isinstance(tensor, StoredTensor):
            found[key] = tensor  # refused by its name
            continue
        rows, columns = tensor.shape
        shape = (rows, columns // experts) if match["number"] == "1" else (rows // experts, columns)
        size = shape[0] * shape[1]
        for expert in range(experts):
            slab = StoredTensor(
                tensor.file,
                tensor.offset + expert * size * tensor.kind.itemsize,
                tensor.kind,
                shape,
                (shape[1], 1),
                tensor.checksum,
            )
            linear = f"local_experts.{expert}.linear_fc{match['number']}.weight"
            found[match["head"] + linear] = Transposed(slab)
    return found


def stack_experts(tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """Return tensors under canonical names with the numbered experts of each layer stacked.

    Raises:
        InputError: An expert is missing, or differs from the others in shape or dtype.
    """
    found: dict[str, LazyTensor] = {}
    numbered: dict[str, dict[int, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if match := NUMBERED.fullmatch(name):
            whole = match["head"] + match["tail"]
            numbered.setdefault(whole, {})[int(match["number"])] = tensor
            found.setdefault(whole, tensor)  # keeps the order of the forward pass
        else:
            found[name] = tensor
    counts = {len(parts) for parts in numbered.values()}
    for name, parts in numbered.items():
        lost = sorted(set(range(max(counts))) - set(parts))
        if lost:
            raise InputError(
                f"{where} lacks expert {lost[0]} of {max(counts)} of {name}; copy all files of one "
                "save"
            )
        ordered = [parts[number] for number in sorted(parts)]
        if len({(part.shape, part.kind) for part in ordered}) > 1:
            raise InputError(
                f"{where}: the experts of {name} differ in shape or dtype; two checkpoints may be "
                "mixed, copy all files of one save"
            )
        found[name] = Stacked(ordered)
    return found


def stacked_shapes(parts: Mapping[str, Sequence[LazyTensor]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's experts together, given the parts of each one's matrices."""
    shapes: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    for name, pieces in parts.items():
        match = NUMBERED.fullmatch(name)
        assert match, name
        whole = match["head"] + match["tail"]
        dim, shape = cut_dim(whole), list(pieces[0].shape)
        if dim is not None:
            shape[dim - 1] = sum(piece.shape[dim - 1] for piece in pieces)
        counts[whole] = counts.get(whole, 0) + 1
        shapes[whole] = (counts[whole], *shape)
    return shapes


def merge_experts(
    parts: Mapping[str, Sequence[LazyTensor]], table: Mapping[str, Parameter], where: str
) -> dict[str, LazyTensor]:
    """Return all experts of each layer as one tensor, given the parts of each one's matrices.

    Raises:
        InputError: An expert is missing.
    """
    merged: dict[str, LazyTensor] = {}
    for name, pieces in parts.items():
        match = NUMBERED.fullmatch(name)
        assert match, name
        parameter = table.get(match["head"] + match["tail"])
        rule = REPLICATED if parameter is None else parameter.rule
        dim = None if rule.dim is None else rule.dim - 1
        merged[name] = ShardRule(dim, blocks=rule.blocks).merge(pieces)
    return stack_experts(merged, where)
