"""One rank's file copied over another's: a slip that leaves shapes and settings as they should be.

Ranks of one run differ in what is cut: equal ones are refused. So do the layers of two stages, but
for a model that was made deeper with copies of its layers: where all ranks have the same, that is a
warning. One row out of the middle of a matrix tells two ranks apart; only where those are equal is
more compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import LazyTensor, runs
from mlm_eval.checkpoints.soundness.stored_bits import bits, sample

if TYPE_CHECKING:
    from torch import Tensor

_EXPERT = re.compile(r"(.+\.experts\.(?:.+\.)?)(\d+)\.")
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")

Unit = Mapping[str, LazyTensor]
"""Tensors that are copied together: a layer, or all layers of a stage."""


def copied_ranks(ranks: Mapping[int, Unit], is_cut: Callable[[str], bool]) -> str | None:
    """Return which ranks hold the same slices where each should have its own, in words.

    Args:
        ranks: The tensors of each tensor-parallel rank, under the same names.
        is_cut: Whether a tensor is cut over the ranks.
    """
    first = next(iter(ranks.values()))
    units: dict[str, list[str]] = {}
    for name, tensor in first.items():
        if len(tensor.shape) > 1 and is_cut(name):
            layer = _LAYER.match(name)
            units.setdefault(layer[0] if layer else name.partition(".")[0], []).append(name)
    for unit, names in units.items():
        held = {rank: {name: tensors[name] for name in names} for rank, tensors in ranks.items()}
        if pair := _equal_pair(held):
            where = f" in {unit.rstrip('.')}" if len(units) > 1 else ""
            return f"tensor-parallel ranks {pair[0]} and {pair[1]} hold the same slices{where}"
    return None


def copied_stages(stages: Mapping[int, Unit]) -> str | None:
    """Return which pipeline stages hold the same layers, in words."""
    layers = {
        stage: {name: t for name, t in tensors.items() if _LAYER.match(name) and len(t.shape) > 1}
        for stage, tensors in stages.items()
    }
    by_names: dict[frozenset[str], dict[int, Unit]] = {}
    for stage, held in layers.items():
        by_names.setdefault(frozenset(held), {})[stage] = held
    for group in by_names.values():
        if pair := _equal_pair(group):
            return f"pipeline stages {pair[0]} and {pair[1]} hold the same layers"
    return None


def copied_experts(ranks: Mapping[int, Unit]) -> str | None:
    """Return which expert-parallel ranks hold the same experts, in words.

    Not where experts of one rank are the same too: a model that is made of a dense one ("upcycled")
    begins with copies of its MLP. With one expert a rank nothing tells; see `has_one_expert`.
    """
    experts: dict[int, dict[str, LazyTensor]] = {}
    for name, tensor in next(iter(ranks.values()), {}).items():
        if match := _EXPERT.match(name):
            experts.setdefault(int(match[2]), {})[match[1] + name[match.end() :]] = tensor
    if _equal_pair(experts):
        return None
    pair = _equal_pair(ranks)
    return f"expert-parallel ranks {pair[0]} and {pair[1]} hold the same experts" if pair else None


def has_one_expert(tensors: Iterable[str]) -> bool:
    """Return whether a rank holds one expert of each layer."""
    return len({match[2] for name in tensors if (match := _EXPERT.match(name))}) == 1


def copied_layers(tensors: Unit) -> str | None:
    """Return which layers are the same, in words: where each layer has a file of its own."""
    layers: dict[int, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if (match := _LAYER.match(name)) and len(tensor.shape) > 1:
            layers.setdefault(int(match[1]), {})[name[match.end() :]] = tensor
    pair = _equal_pair(layers)
    return f"layers {pair[0]} and {pair[1]} are the same" if pair else None


def copied_parts(parts: Mapping[int, LazyTensor]) -> bool:
    """Return whether two parts of one tensor are the same; parts of several shapes are not."""
    return _equal_pair({number: {"part": part} for number, part in parts.items()}) is not None


def copied_on_purpose(by_rank: Sequence[str | None], where: object) -> list[str]:
    """Return what is the same on all ranks, for `deeper_or_copied`; refuse what is so on some.

    Args:
        by_rank: What was found among the stages, layers or experts of each tensor-parallel rank.
        where: The checkpoint, for messages.

    Raises:
        InputError: A file of one rank is a copy.
    """
    found = sorted({what for what in by_rank if what is not None})
    if not found or (len(found) == 1 and None not in by_rank):
        return found
    refuse_copied(found[0], where)
    raise AssertionError("refused")


def deeper_or_copied(found: Iterable[str]) -> list[str]:
    """Return the warnings of stages, layers or experts that are the same."""
    return [
        f"{what}, bit by bit: a file was copied over another one, or the model was made larger by "
        "copies of its parts and has not been trained since; if that is not meant, copy each file "
        "again from its own source"
        for what in found
    ]


def refuse_copied(found: str | None, where: object) -> None:
    """Refuse a checkpoint of which a file is a copy of another one.

    Raises:
        InputError: Something was found.
    """
    if found is not None:
        raise InputError(
            f"{where}: {found}, bit by bit: one file is a copy of the other; copy each file again "
            "from its own source"
        )


def _equal_pair(units: Mapping[int, Unit]) -> tuple[int, int] | None:
    """Return two of the units that are bit-equal and not constant; None where there are none."""
    alike: dict[Hashable, list[int]] = {}
    for number, unit in units.items():
        if name := next(iter(sorted(unit)), None):
            alike.setdefault((unit[name].shape, sample(unit[name])), []).append(number)
    pairs = (pair for numbers in alike.values() for pair in combinations(numbers, 2))
    return next((pair for pair in pairs if _same(*(units[number] for number in pair))), None)


def _same(one: Unit, other: Unit) -> bool:
    """Whether two units are bit-equal and have values that differ among themselves."""
    if one.keys() != other.keys() or any(one[k].shape != other[k].shape for k in one):
        return False
    if any(sample(one[name]) != sample(other[name]) for name in one):
        return False
    if all(_is_constant(_row(tensor)) for tensor in one.values()):
        return False  # drawn as constants: equal everywhere
    pieces: Iterable[tuple[Tensor, Tensor]] = (
        pair for name in one for pair in zip(runs(one[name]), runs(other[name]), strict=True)
    )
    if not all(bits(a) == bits(b) for a, b in pieces):
        return False
    # Vectors are alike by chance, and padding of a vocabulary may repeat the last row of it.
    return not all(_repeats_one_row(tensor) for tensor in one.values())


def _repeats_one_row(tensor: LazyTensor) -> bool:
    """Whether a tensor's rows are all the same, as where it has one only."""
    return _repeats(tensor, tensor.shape[-1])


def is_plain(tensor: LazyTensor) -> bool:
    """Whether a tensor has nothing that tells it from another: its values are all the same."""
    return _repeats(tensor, 1)


def _repeats(tensor: LazyTensor, width: int) -> bool:
    """Whether a tensor is made of the same `width` values again and again."""
    first: Tensor | None = None
    for values in runs(tensor):
        rows = values.reshape(-1, width)
        first = rows[:1] if first is None else first
        if not bool((rows == first).all()):
            return False
    return True


def _row(tensor: LazyTensor) -> Tensor:
    """Return a row out of the middle: with the first one its whole record would be summed."""
    middle = tensor.shape[0] // 2
    return tensor.read(0, slice(middle, middle + 1))


def _is_constant(values: Tensor) -> bool:
    return values.numel() < 2 or bool((values == values.flatten()[0]).all())
