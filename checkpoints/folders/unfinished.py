"""What this process is writing beside its targets, so that nothing of it is left when it ends.

An exception removes it on its way out. A rank that is told to end inside a collective never comes
to that: `mlm_eval/ranks/signals.py` calls `remove_unfinished` for it, from another thread.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_noted: set[Path] = set()


@contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Remove a file or folder at the end of the body, unless it has been renamed by then.

    A signal that ends this process within the body removes it too.
    """
    note_unfinished(path)
    try:
        yield
    finally:
        _remove(path)
        forget_unfinished(path)


def note_unfinished(path: Path) -> None:
    """Have a signal that ends this process remove a file or folder."""
    _noted.add(path)


def forget_unfinished(path: Path) -> None:
    """Leave a file or folder alone from now on."""
    _noted.discard(path)


def remove_unfinished() -> None:
    """Remove all that is noted: this process ends now."""
    for path in list(_noted):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()
