"""Faults of the surroundings, named as such: lack of memory, a full disk, ranks that are gone.

They are nobody's bug, so a traceback and a request to report them would mislead.
"""

from __future__ import annotations

import errno

from mlm_eval.checkpoints.errors import InputError

DISK_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than its file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only",
}

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
    """Return what lack of memory or of disk space is called; None for any other exception."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        where = f"{error.filename} cannot be written: " if error.filename else ""
        return InputError(
            f"{where}{DISK_FAULTS[error.errno]} ({error.strerror}); make room, or choose another "
            "place"
        )
    kind = type(error).__name__
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate mem" in text:
        first = text.splitlines()[0] if text else kind
        return InputError(
            f"the run does not fit the memory ({first}); lower --batch-tokens or --micro-batch, or "
            "raise --tp"
        )
    return None


def lost_peers(error: BaseException, rank: int) -> str | None:
    """Return the sentence for a rank whose peers are gone; None for any other exception."""
    text = str(error).lower()
    if not isinstance(error, RuntimeError) or not any(part in text for part in CONNECTION_LOST):
        return None
    return (
        f"rank {rank} lost the others; the cause stands in their output (under Slurm, "
        "srun --kill-on-bad-exit=1 ends a step with its first failure)"
    )
