"""What this process prints to: a stream that is closed, full or poor in letters never ends the run.

Text that a terminal has no letters for is written as escapes. What nobody can read, because the
reader of a pipe has left or the stream was closed, is dropped. What a full disk has not taken is
noted, for the exit code to tell.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

_NOBODY_READS = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ECONNRESET, errno.ENXIO)


class _Patient(io.RawIOBase):
    """A descriptor that takes all bytes, whatever becomes of them."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.fault: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def write(self, data: Any) -> int:
        try:
            return os.write(self.number, data)
        except OSError as error:
            if error.errno not in _NOBODY_READS:
                self.fault = self.fault or error
            return len(data)


_patient: dict[str, _Patient] = {}


def open_streams() -> None:
    """Make stdout and stderr streams that every text can be written to; once, at the start.

    A descriptor that is closed is opened to /dev/null: otherwise the next file that is opened would
    get its number, and what libraries print would go there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if old is not None and not _is_own(old, number):
            continue  # somebody collects what is printed
        _patient[name] = raw = _Patient(number)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=getattr(old, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=raw.isatty() or number == 2,
        )
        setattr(sys, name, stream)


def _is_own(stream: Any, number: int) -> bool:
    """Whether a stream is the interpreter's own for a descriptor."""
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == number
    except (OSError, ValueError):
        return False


def close_streams() -> OSError | None:
    """Write out what is buffered; return why stdout does not hold all that was printed, if so."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    return _patient["stdout"].fault if "stdout" in _patient else None
