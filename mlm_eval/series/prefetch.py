"""The next checkpoint's bytes, brought into the page cache while this one is scored.

The kernel is told which ranges of the files will be read; it reads them in the background. Of a
file that holds the optimizer too, only the weights are asked for. Whatever fails, fails silently:
then the bytes are read when they are needed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.files.distcp import Archived
from mlm_eval.checkpoints.lazy import Embedded, LazyTensor, StoredTensor

Range = tuple[int, int]
"""First byte and number of bytes; 0 bytes: to the end of the file."""

_DEPTH = 12
"""Views over views that are followed."""


def prefetch(checkpoint: Checkpoint) -> int:
    """Ask the kernel for the bytes of a checkpoint's weights; return for how many ranges."""
    asked = 0
    with suppress(Exception):
        for path, ranges in byte_ranges(checkpoint).items():
            with suppress(OSError):
                asked += _will_need(path, ranges)
    return asked


def byte_ranges(checkpoint: Checkpoint) -> dict[Path, list[Range]]:
    """Return which bytes of which files hold the weights; whole files where that is not known."""
    ranges: dict[Path, list[Range]] = defaultdict(list)
    for tensor in checkpoint.tensors.values():
        for path, first, count in _stored(tensor, _DEPTH):
            ranges[path].append((first, count))
    if not ranges:
        ranges |= {path: [(0, 0)] for path in checkpoint.provenance.files}
    return {path: sorted(set(parts)) for path, parts in ranges.items()}


def _stored(value: Any, depth: int) -> Iterator[tuple[Path, int, int]]:
    """Yield the bytes that a tensor's values come from, through the views over it."""
    if isinstance(value, StoredTensor):
        place, shift = value.file.path, 0
        if isinstance(place, Embedded):
            place, shift = place.place()
        steps = zip(value.shape, value.stride, strict=True)
        extent = 1 + sum((size - 1) * step for size, step in steps) if value.numel else 0
        yield place, shift + value.offset, extent * value.dtype.itemsize
    elif isinstance(value, Archived):
        record = value.chunk.record
        yield value.folder.path / record.file, record.offset, record.length
    elif depth and isinstance(value, LazyTensor):
        for part in vars(value).values():
            yield from _stored(part, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for part in value:
            yield from _stored(part, depth - 1)


def _will_need(path: Path, ranges: list[Range]) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first, count in ranges:
            os.posix_fadvise(descriptor, first, count, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
    return len(ranges)
