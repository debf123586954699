"""Values that no trained weight has: found while tensors are read anyway, and named.

The smallest and the largest value tell: NaN is both where there is any. That costs a pass over
memory that has just been read, a small part of what reading costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint, with_each
from mlm_eval.checkpoints.lazy import Index, LazyTensor, Stacked

ABSURD = 1e10
"""A larger value comes from a damaged file, not from training."""

NAN, INFINITE = "NaN", "infinite values"
_SHOWN = 4


@dataclass
class OddValues:
    """The tensors with such values, and what these are; more may be added from several threads."""

    found: dict[str, set[str]] = field(default_factory=dict)

    def look(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> None:
        """Take in values of a tensor.

        Args:
            name: The tensor's.
            values: Some or all of its values, on the CPU.
            dtype: What they are computed in, which may hold less; None: the same.
        """
        if not values.numel() or not values.is_floating_point():
            return
        low, high = (float(value) for value in torch.aminmax(values))
        if math.isnan(low) or math.isnan(high):
            self._add(name, NAN)
        elif math.isinf(low) or math.isinf(high):
            self._add(name, INFINITE)
        elif (largest := max(-low, high)) > ABSURD:
            self._add(name, f"values of {largest:.1g}")
        elif dtype is not None and largest > torch.finfo(dtype).max:
            self._add(name, f"values that are infinite in {str(dtype).removeprefix('torch.')}")

    def _add(self, name: str, what: str) -> None:
        self.found.setdefault(name, set()).add(what)

    def merge(self, others: Iterable[Mapping[str, Iterable[str]]]) -> None:
        """Take in what others have found."""
        for other in others:
            for name, kinds in other.items():
                self.found.setdefault(name, set()).update(kinds)

    def phrases(self) -> list[str]:
        """Return a phrase for each such tensor."""
        return [f"{name} holds {' and '.join(sorted(k))}" for name, k in sorted(self.found.items())]

    def warnings(self) -> list[str]:
        """Return one warning that names the tensors; none where there are none."""
        phrases = self.phrases()
        if not phrases:
            return []
        more = f" and {len(phrases) - _SHOWN} more tensors" if len(phrases) > _SHOWN else ""
        return [
            f"{', '.join(phrases[:_SHOWN])}{more}: the file is damaged, or training had failed; "
            "what is computed from such weights means nothing"
        ]


class _Watched(LazyTensor):
    """A tensor whose values are looked at when they are read."""

    def __init__(self, source: LazyTensor, name: str, odd: OddValues) -> None:
        self.source, self.name, self.odd = source, name, odd
        self.shape, self.kind = source.shape, source.kind

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        values = self.source.read(dim, index)
        self.odd.look(self.name, values)
        return values


def watched(checkpoint: Checkpoint) -> tuple[Checkpoint, OddValues]:
    """Return a checkpoint whose values are looked at when they are read, and what that finds."""
    odd = OddValues()

    def watch(name: str, tensor: LazyTensor) -> LazyTensor:
        if isinstance(tensor, Stacked):  # writers take its parts one by one
            return Stacked([_Watched(part, name, odd) for part in tensor.parts])
        return _Watched(tensor, name, odd)

    return with_each(checkpoint, watch), odd
