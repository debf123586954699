"""Faults of the surroundings, named as such: no memory, disk or package, ranks that are gone.

They are nobody's bug, so a traceback and a request to report them would mislead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from mlm_eval.checkpoints.errors import PACKAGES, InputError, first_line, not_installed
from mlm_eval.ranks.world import small_number

DISK_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than its file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only",
}

_PATH_FAULTS = (
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE),
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EEXIST),
)
"""What a path may lead to that no reader foresees: it is the path's fault, and has its name."""

_OS_ERROR = re.compile(r"\(os error (\d{1,3})\)|\[Errno (\d{1,3})\]")
"""How libraries write down the number of an error that they pass on."""

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
    if (disk := _disk_fault(error)) is not None:
        return disk
    if isinstance(error, OSError) and error.errno in _PATH_FAULTS and error.filename is not None:
        return InputError(f"{os.fsdecode(error.filename)} cannot be used ({error.strerror})")
    if isinstance(error, OSError) and error.errno == errno.EIO:
        return InputError(f"a file or a disk cannot be read ({error.strerror}); copy it again")
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return InputError("a path or a name is no text in UTF-8; rename it")
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):  # pathlib's own
        return InputError(f"{first_line(error)}; name a path that leads to a file")
    if is_lack_of_memory(error):
        return _no_memory(error, "lower --batch-tokens or --micro-batch, or raise --tp")
    return None


def _disk_fault(error: BaseException) -> InputError | None:
    """Return the sentence for a disk that takes no more, also where a library has wrapped that."""
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None and (match := _OS_ERROR.search(str(cause))):
            number = int(match[1] or match[2])
        if number in DISK_FAULTS:
            name = getattr(cause, "filename", None)
            where = f"{name} cannot be written: " if name else ""
            return InputError(
                f"{where}{DISK_FAULTS[number]} ({os.strerror(number)}); make room, or choose "
                "another place"
            )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it was raised from, or while handling."""
    seen: set[int] = set()
    left = [error]
    while left and len(seen) < 32:
        cause = left.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        left += [c for c in (cause.__context__, cause.__cause__) if c is not None]
        failures = getattr(cause, "failures", None)  # of torch.distributed.checkpoint, by rank
        if isinstance(failures, dict):
            left += [c[0] for c in failures.values() if isinstance(c, tuple) and c]


_LARGEST_TERMINAL = 10_000
"""Columns or lines."""


def check_surroundings() -> None:
    """Refuse to start where libraries would die without a word.

    A size of the terminal that no terminal has is forgotten: help is laid out for it.

    Raises:
        InputError: The working folder is gone.
    """
    for name in ("COLUMNS", "LINES"):
        if not 0 < (small_number(os.environ.get(name, "")) or 0) <= _LARGEST_TERMINAL:
            os.environ.pop(name, None)
    try:
        os.getcwd()
    except OSError:
        raise InputError(
            "the working folder is gone (removed or renamed while the shell was in it); go to "
            "another one with cd"
        ) from None


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
    if not isinstance(error, RuntimeError) or not speaks_of_lost_peers(str(error)):
        return None
    return (
        f"rank {rank} lost the others; the cause stands in their output (under Slurm, "
        "srun --kill-on-bad-exit=1 ends a step with its first failure)"
    )


def speaks_of_lost_peers(text: str) -> bool:
    """Return whether a message tells of ranks that have ended, and so of no cause of its own."""
    return any(part in text.lower() for part in CONNECTION_LOST)
