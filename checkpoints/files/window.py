"""A byte range of a file, as a file of its own: an entry of an archive."""

from __future__ import annotations

import io
from typing import IO, Any


class FileWindow(io.RawIOBase):
    """The `length` bytes from `start` of a stream, which it closes where it is the `owner`."""

    def __init__(self, stream: IO[bytes], start: int, length: int, *, owner: bool = False) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0
        self._owner = owner

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place in the range; see `io.IOBase.seek`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, all that are left where it is negative."""
        left = max(self._length - self._at, 0)
        self._stream.seek(self._start + self._at)
        data = self._stream.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there are bytes; return how many there were."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the window, and the stream where it is its own."""
        if self._owner and not self.closed:
            self._stream.close()
        super().close()
