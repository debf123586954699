"""The safetensors file format, read late and written piece by piece.

A file is: the header's length (8 bytes, little-endian), a JSON header (name -> dtype, shape, byte
range), the tensors' bytes back to back. Reading needs only the header: every tensor becomes a
`StoredTensor`, so that a slice touches its own pages only. Writing needs only shapes and dtypes
for the header; then the place of each value is known, and a few threads write tensors, and runs of
rows of large ones, where they belong (the safetensors library writes whole state dicts only).
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch

from mlm_eval.checkpoints.dtypes import cast
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import LazyTensor, MappedFile, StoredTensor

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 100_000_000
"""The library's own limit, against files that are something else."""

PIECE_BYTES = 32 << 20
"""Larger tensors are converted and written in runs of rows of about this size."""

MOST_WRITERS = 4
"""Threads that read, convert and write; each holds a piece as stored and as written."""


@dataclass(frozen=True)
class SafetensorsFile:
    """One file: its tensors, unread, and the bytes of its header."""

    path: Path
    tensors: dict[str, StoredTensor]
    header: bytes


def read_safetensors(path: Path) -> SafetensorsFile:
    """Return the tensors of a file, unread; its header must describe the whole file.

    Raises:
        InputError: The file is missing, cut off, damaged, or no safetensors file.
    """
    try:
        mapped = MappedFile(path)
        with path.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if length > LARGEST_HEADER or not 2 <= length <= mapped.size - 8:
                cut_off = mapped.size < 8 or length <= LARGEST_HEADER
                raise _damaged(path, "cut off" if cut_off else "no safetensors file")
            header = stream.read(length)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; copy all files of the model") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return SafetensorsFile(path, _tensors(path, mapped, header), header)


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path} is {what}; download or copy the file again")


def _tensors(path: Path, file: MappedFile, header: bytes) -> dict[str, StoredTensor]:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError too
        raise _damaged(path, "damaged: its header is not JSON") from None
    if not isinstance(entries, dict):
        raise _damaged(path, "damaged: its header is not a JSON object")
    entries.pop("__metadata__", None)
    base = 8 + len(header)
    tensors: dict[str, StoredTensor] = {}
    ranges = []
    for name, entry in entries.items():
        dtype, shape, first, last = _entry(path, name, entry)
        if last - first != _numel(shape) * dtype.itemsize:
            raise _damaged(path, f"damaged: {name} {shape} does not fill its byte range")
        if base + last > file.size:
            raise _damaged(
                path, f"cut off: {name} ends at byte {base + last}, the file has {file.size}"
            )
        ranges.append((first, last))
        tensors[name] = StoredTensor(file, base + first, dtype, shape, _strides(shape))
    # Back to back from the first byte to the last one: a gap or an overlap means another file's
    # header.
    at = 0
    for first, last in sorted(ranges):
        if first != at:
            raise _damaged(path, "damaged: its tensors overlap or leave gaps")
        at = last
    if base + at != file.size:
        raise _damaged(path, f"damaged: {file.size - base - at} bytes follow its last tensor")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    try:
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        shape, (first, last) = entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"damaged: its header does not describe {name}") from None
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _damaged(path, f"damaged: its header does not describe {name}")
    return dtype, list(shape), first, last


def _numel(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _strides(shape: list[int]) -> list[int]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return strides


@dataclass(frozen=True)
class _Piece:
    """Some values to write: a tensor or a run of its rows, and where they go."""

    name: str
    tensor: LazyTensor
    rows: slice | None
    offset: int


def write_safetensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    dtype: torch.dtype | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> int:
    """Return the size of the file written, of which a few tensors or runs of rows were in memory.

    Args:
        path: A file to create.
        tensors: What to write, in this order. Several threads read them, each a tensor at a time.
        dtype: Convert to this dtype; None keeps each tensor's own.
        on_bytes: Told how many bytes of values each write added; never by two threads at once.

    Raises:
        InputError: A finite value becomes infinite in `dtype`.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    at = 0
    for name, tensor in tensors.items():
        target = dtype or tensor.dtype
        size = tensor.numel * target.itemsize
        header[name] = {
            "dtype": names[target],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the values start on an 8-byte boundary
    base = 8 + len(text)
    pieces = (
        piece
        for name, tensor in tensors.items()
        for piece in _pieces(name, tensor, base + header[name]["data_offsets"][0], dtype)
    )
    with path.open("xb", buffering=0) as stream:
        _write_at(stream.fileno(), memoryview(struct.pack("<Q", len(text)) + text), 0)
        _write_pieces(stream.fileno(), pieces, dtype, on_bytes)
    return base + at


def _write_pieces(
    file: int,
    pieces: Iterator[_Piece],
    dtype: torch.dtype | None,
    on_bytes: Callable[[int], None] | None,
) -> None:
    """Read, convert and write pieces, each by one of a few threads."""
    taking, telling, failed = Lock(), Lock(), Event()

    def work() -> None:
        torch.set_num_threads(1)  # of this one: its neighbours keep the other cores busy
        while not failed.is_set():
            with taking:
                piece = next(pieces, None)
            if piece is None:
                return
            try:
                stored = piece.tensor.read(0, piece.rows)
                values = cast(stored, dtype, piece.name).contiguous()
                # numpy has no bfloat16: write the bytes as they are.
                _write_at(file, values.view(-1).view(torch.uint8).numpy().data, piece.offset)
            except BaseException:
                failed.set()
                raise
            if on_bytes is not None:
                with telling:
                    on_bytes(values.nbytes)

    count = min(MOST_WRITERS, len(os.sched_getaffinity(0)))
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count) as writers:
            for done in [writers.submit(work) for _ in range(count)]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # torch starts later threads with the last number set


def _write_at(file: int, values: memoryview, offset: int) -> None:
    """Write all bytes at a place of a file."""
    while values.nbytes:
        written = os.pwrite(file, values, offset)
        values, offset = values[written:], offset + written


def _pieces(
    name: str, tensor: LazyTensor, offset: int, dtype: torch.dtype | None
) -> Iterator[_Piece]:
    """Yield a tensor as runs of rows where the whole would be large."""
    if tensor.nbytes <= PIECE_BYTES or len(tensor.shape) < 2:
        yield _Piece(name, tensor, None, offset)
        return
    rows = max(1, PIECE_BYTES * tensor.shape[0] // tensor.nbytes)
    row_bytes = tensor.numel // tensor.shape[0] * (dtype or tensor.dtype).itemsize
    for start in range(0, tensor.shape[0], rows):
        run = slice(start, min(start + rows, tensor.shape[0]))
        yield _Piece(name, tensor, run, offset + start * row_bytes)
