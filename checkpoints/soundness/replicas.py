"""Tensors that all tensor-parallel ranks hold whole, and that must be the same on each.

Norms, position embeddings, biases of row-parallel layers, routers, the pooler, the matrix of an LM
head. Training lets them drift by rounding; more means that files of two checkpoints are mixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import LazyTensor, runs
from mlm_eval.checkpoints.soundness.stored_bits import same_values

if TYPE_CHECKING:
    from torch import Tensor

DRIFT = 0.1
"""Largest difference between copies on different ranks, relative to their largest value."""

OPENING_BYTES = 64 << 20
"""Replicas of so many bytes are compared when a checkpoint is opened, the smallest first; what is
left over only where everything is read."""

RankCopies = Mapping[str, Mapping[str, LazyTensor]]
"""Canonical name -> what each rank holds. The first is used; the key of another says which two."""


def split_by_size(replicas: RankCopies) -> tuple[RankCopies, RankCopies]:
    """Return the replicas that are compared when a checkpoint is opened, and the others."""
    sizes = {name: sum(t.nbytes for t in held.values()) for name, held in replicas.items()}
    first: dict[str, Mapping[str, LazyTensor]] = {}
    total = 0
    for name in sorted(sizes, key=lambda name: sizes[name]):
        total += sizes[name]
        if total > OPENING_BYTES:
            break
        first[name] = replicas[name]
    return first, {name: held for name, held in replicas.items() if name not in first}


def compare_replicas(replicas: RankCopies, where: object) -> list[str]:
    """Return a warning if replicas have drifted apart.

    Raises:
        InputError: They differ by more than drift.
    """
    drifted, worst = 0, 0.0
    for name, ranks, gap, scale in _gaps(replicas):
        if not gap <= DRIFT * scale:  # also catches NaN
            raise InputError(
                f"{where} mixes two checkpoints: {name} differs by {gap:.3g} between {ranks}, "
                "where it should be the same; copy all ranks of one save"
            )
        drifted, worst = drifted + (gap > 0), max(worst, gap)
    if not drifted:
        return []
    return [
        f"{drifted} replicated tensor(s) differ between tensor-parallel ranks by up to {worst:.2g} "
        "(rounding drift in training, or damage); rank 0's are used"
    ]


def _gaps(replicas: RankCopies) -> Iterator[tuple[str, str, float, float]]:
    for name, held in replicas.items():
        (_, reference), *others = held.items()
        for ranks, tensor in others:
            yield name, ranks, *gap_of(tensor, reference)


def gap_of(tensor: LazyTensor, reference: LazyTensor) -> tuple[float, float]:
    """Return the largest difference (infinite for other shapes), and the largest value.

    Where they are the same no value is looked at, and the second is 1.
    """
    if tensor.shape != reference.shape or tensor.kind != reference.kind:
        return math.inf, 1.0
    if same_values(tensor, reference):
        return 0.0, 1.0
    gaps = [_gap(a, b) for a, b in zip(runs(tensor), runs(reference), strict=True)]
    worst = [gap for gap, _ in gaps]
    gap = next((g for g in worst if math.isnan(g)), max(worst, default=0.0))
    return gap, max((scale for _, scale in gaps), default=0.0) or 1.0


def _gap(values: Tensor, reference: Tensor) -> tuple[float, float]:
    import torch

    gap = 0.0
    if not torch.equal(values, reference):
        same = (values == reference) | (values.isnan() & reference.isnan())
        gap = (values.float() - reference.float()).masked_fill(same, 0).abs().max().item()
    return gap, reference.float().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
