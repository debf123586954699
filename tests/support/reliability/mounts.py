"""Mounts that one process and its children see: a read-only folder, a small file system."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

_NEW_MOUNTS = 0x00020000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _own_mounts() -> None:
    _call("unshare", _NEW_MOUNTS)
    _call("mount", b"none", b"/", None, _RECURSIVE | _PRIVATE, None)


def read_only(folder: Path) -> Callable[[], None]:
    """Return what makes a folder read-only for this process, also where it is root's."""

    def make() -> None:
        if os.getuid() != 0:
            folder.chmod(0o555)
            return
        _own_mounts()
        place = os.fsencode(folder)
        _call("mount", place, place, None, _BIND, None)
        _call("mount", place, place, None, _BIND | _REMOUNT | _READ_ONLY, None)

    return make


def small(folder: Path, kilobytes: int) -> Callable[[], None]:
    """Return what puts a file system of so much room in a folder's place; for root."""

    def make() -> None:
        _own_mounts()
        size = f"size={kilobytes}k".encode()
        _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, size)

    return make


def may_mount(*, as_user: bool) -> bool:
    """Return whether this process can do so; tried in a fork.

    Args:
        as_user: Whether a user may, who has other ways.
    """
    if os.getuid() != 0:
        return as_user
    child = os.fork()
    if child == 0:
        try:
            _own_mounts()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0
