"""Faults of the surroundings, named as such: no memory, disk or package, ranks that are gone.

They are nobody's bug, so a traceback and a request to report them would mislead.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from mlm_eval.checkpoints.errors import PACKAGES, InputError, first_line, not_installed

DISK_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than its file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only",
}

_PATH_FAULTS = (
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EINVAL),
)
"""What a path may lead to that no reader foresees: it is the path's fault, and has its name."""

CONNECTION_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "nccl communicator was aborted",
    "remote process exited",
    "socket timeout",
)
"""What gloo, NCCL and the store say in a rank that waits for one that has ended."""


def named_fault(error: BaseException) -> InputError | None:
    """Return what lack of memory, disk space or a package is called; None for other exceptions."""
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        return not_installed(error.name, "this command")
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        where = f"{error.filename} cannot be written: " if error.filename else ""
        return InputError(
            f"{where}{DISK_FAULTS[error.errno]} ({error.strerror}); make room, or choose another "
            "place"
        )
    if isinstance(error, OSError) and error.errno in _PATH_FAULTS and error.filename is not None:
        return InputError(f"{os.fsdecode(error.filename)} cannot be used ({error.strerror})")
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):  # pathlib's own
        return InputError(f"{first_line(error)}; name a path that leads to a file")
    if is_lack_of_memory(error):
        return _no_memory(error, "lower --batch-tokens or --micro-batch, or raise --tp")
    return None


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether a device or the machine had no memory for a tensor."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "can't allocate mem" in str(error)


def _no_memory(error: BaseException, advice: str) -> InputError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"the run does not fit the memory ({first}); {advice}")


@contextlib.contextmanager
def advising_on_memory(advice: str) -> Iterator[None]:
    """Say what to change where the body has no memory.

    Raises:
        InputError: It had none.
    """
    try:
        yield
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        raise _no_memory(error, advice) from error


def lost_peers(error: BaseException, rank: int) -> str | None:
    """Return the sentence for a rank whose peers are gone; None for any other exception."""
    text = str(error).lower()
    if not isinstance(error, RuntimeError) or not any(part in text for part in CONNECTION_LOST):
        return None
    return (
        f"rank {rank} lost the others; the cause stands in their output (under Slurm, "
        "srun --kill-on-bad-exit=1 ends a step with its first failure)"
    )
