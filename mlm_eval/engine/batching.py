"""The one loop over a set: packed by length, dealt to the copies of the model, joined in order.

No item is repeated or dropped, and results come back in the order of the items, so they do not
depend on the layout beyond the rounding of the forward itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mlm_eval.ranks.collectives import gather_over_dp
from mlm_eval.ranks.mesh import Mesh

T = TypeVar("T")

OnProgress = Callable[[int, int], None]
"""Called on rank 0 with (work done, work in all)."""

DEFAULT_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Padded tokens of a forward pass on each rank, by the kind of device."""


def pack(lengths: Sequence[int], budget: int, riders: Collection[int] = ()) -> list[list[int]]:
    """Return batches of item indices, longest first, each of at most `budget` padded tokens.

    An item longer than the budget is a batch of its own. Items of one length stay in order; those
    among `riders` share the line of the one before and cost nothing.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    current: list[int] = []
    lines = 0
    for index in order:
        # Sorted by length: the first of a batch decides its width.
        width = lengths[current[0]] if current else lengths[index]
        if current and index not in riders and width * (lines + 1) > budget:
            batches.append(current)
            current, lines = [], 0
        current.append(index)
        lines += index not in riders
    if current:
        batches.append(current)
    return batches


def map_batches(
    run: Callable[[list[int]], T],
    batches: Sequence[list[int]],
    mesh: Mesh,
    *,
    work: Sequence[int] | None = None,
    already_done: int = 0,
    on_progress: OnProgress | None = None,
    before_join: Callable[[], None] | None = None,
) -> list[tuple[list[int], T]]:
    """Return every batch with what `run` returns for it, on every rank the same.

    Each copy of the model runs its share of the batches: `batches[dp_rank::dp]`. Collectives: those
    of `run`; one gather of the results over dp.

    Args:
        run: Takes a batch, runs on all tp ranks of a copy. Tensors that it returns, alone or in a
            tuple, may be on a GPU: they are copied to the CPU after the last batch, so that the
            host need not wait for the device before it.
        batches: What `pack` returned.
        mesh: The layout.
        work: Of each item, for `on_progress`; None: 1.
        already_done: Work done by an earlier run.
        on_progress: Called when batches have finished.
        before_join: Called when this copy's batches are done.
    """
    meter = _Meter(batches, mesh, work, already_done, on_progress)
    results = []
    for batch in batches[mesh.dp_rank :: mesh.dp]:
        results.append(run(batch))
        meter.started(batch)
    if before_join is not None:
        before_join()
    gathered = gather_over_dp([_on_cpu(result) for result in results], mesh)
    meter.finish()
    return [(batch, gathered[i % mesh.dp][i // mesh.dp]) for i, batch in enumerate(batches)]


def in_order(results: Iterable[tuple[list[int], Iterable[T]]]) -> list[T]:
    """Return the results of all items in the items' order, given batches and their results."""
    found = {i: item for batch, items in results for i, item in zip(batch, items, strict=True)}
    return [found[index] for index in range(len(found))]


def pad_rows(
    rows: Iterable[Tensor], *, value: int = 0, multiple: int = 1, least: int = 0
) -> Tensor:
    """Return rows of different lengths as one tensor `[rows, width]`, padded on the right.

    The width is the longest row's length, or `least` where that is more, rounded up to `multiple`.
    """
    padded = pad_sequence(list(rows), batch_first=True, padding_value=value)
    width = max(least, padded.shape[1])
    return F.pad(padded, (0, width + -width % multiple - padded.shape[1]), value=value)


def _on_cpu(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.cpu()
    if isinstance(result, tuple):
        return tuple(_on_cpu(part) for part in result)
    return result


class _Meter:
    """Progress without a wait for the device at each batch: CUDA events say what has finished."""

    MOST_AHEAD = 8

    def __init__(
        self,
        batches: Sequence[list[int]],
        mesh: Mesh,
        work: Sequence[int] | None,
        already_done: int,
        on_progress: OnProgress | None,
    ) -> None:
        self.work = work
        self.done = already_done
        pending = sum(map(self._work_of, batches))
        own = sum(map(self._work_of, batches[:: mesh.dp]))
        self.total = already_done + pending
        # Rank 0 sees its own batches; the other copies of the model go at about the same pace.
        self.scale = pending / own if own else 1.0
        self.on_progress = on_progress if mesh.rank == 0 else None
        self.reported: int | None = None
        self.waiting: deque[tuple[torch.cuda.Event, int]] = deque()

    def _work_of(self, batch: list[int]) -> int:
        return len(batch) if self.work is None else sum(self.work[i] for i in batch)

    def started(self, batch: list[int]) -> None:
        """Note a batch that the device has been given."""
        if not torch.cuda.is_initialized():
            self._advance(self._work_of(batch))
            return
        event = torch.cuda.Event()
        event.record()
        self.waiting.append((event, self._work_of(batch)))
        if len(self.waiting) > self.MOST_AHEAD:
            self.waiting[0][0].synchronize()
        while self.waiting and self.waiting[0][0].query():
            self._advance(self.waiting.popleft()[1])

    def finish(self) -> None:
        """Report that all is done: the other copies of the model are, too."""
        self._report(self.total)

    def _advance(self, work: int) -> None:
        self.done += round(work * self.scale)
        self._report(min(self.done, self.total))

    def _report(self, done: int) -> None:
        if self.on_progress is not None and done != self.reported:
            self.reported = done
            self.on_progress(done, self.total)
