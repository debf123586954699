"""One writer at a time: locks of folders, which end with the process that holds them.

They are flock(2)'s, so a killed process leaves none behind. A file system without such locks (some
network ones) lets everybody in.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from mlm_eval.checkpoints.errors import InputError

LOCK_FILE = "lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Lock:
    """A lock that this process holds until `release`."""

    sure: bool
    """False where the file system has no locks: others may write too."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Take the lock of a file or folder.

        Args:
            path: What is locked.
            create: Make the file.

        Raises:
            BlockingIOError: Another process holds it, or has it and has just removed the file.
            OSError: The path cannot be opened.
        """
        self.path, self.sure = path, True
        flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
        self.descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.sure = False
            if error.errno not in _NO_LOCKS:
                self.release()
                raise
        here = os.stat(path) if os.path.exists(path) else None
        if here is None or not os.path.samestat(here, os.fstat(self.descriptor)):
            self.release()
            raise BlockingIOError(errno.EWOULDBLOCK, "it was removed meanwhile", str(path))

    def release(self) -> None:
        """Let others in."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def lock_folder(folder: Path, *, what: str) -> Lock:
    """Return the lock of a folder, by a file `lock` in it that says who has it.

    Args:
        folder: Made where it is missing.
        what: What is written there, for the message.

    Raises:
        InputError: Another process has it.
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    try:
        lock = Lock(path, create=True)
    except BlockingIOError:
        owner = ""
        with suppress(OSError, ValueError):
            owner = path.read_text(encoding="utf-8")[:200].strip()
        raise InputError(
            f"{what} is being written by another run ({owner or 'just now'}); wait for its end, or "
            "choose another output"
        ) from None
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    owner = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
    try:
        os.ftruncate(lock.descriptor, 0)
        os.write(lock.descriptor, owner.encode())
    except OSError:  # the disk is full
        unlock_folder(lock)
        raise
    return lock


def unlock_folder(lock: Lock) -> None:
    """Give up the lock of a folder, and remove its file and, where that was all, the folder."""
    with suppress(OSError):
        lock.path.unlink()
    lock.release()
    with suppress(OSError):
        lock.path.parent.rmdir()
