"""The safetensors file format, read late and written piece by piece.

A file is: the header's length (8 bytes, little-endian), a JSON header (name -> dtype, shape, byte
range), the tensors' bytes back to back. The safetensors library imports torch to open one, so that
the header is read here; of a file that is damaged the library says what is wrong. It writes whole
state dicts only: here shapes and dtypes make the header, and then a few threads write tensors, and
runs of rows of large ones, where they belong.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from safetensors import SafetensorError, safe_open

from mlm_eval.checkpoints.dtypes import STORED_DTYPES, Dtype, cast, described
from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.stand_in import (
    describe_missing,
    refuse_special,
    refuse_stand_in,
)
from mlm_eval.checkpoints.files.text_file import LARGEST_SETTINGS
from mlm_eval.checkpoints.lazy import MOST_DIMS, LazyTensor, MappedFile, StoredTensor, row_major

if TYPE_CHECKING:
    import torch

SAFETENSORS_DTYPES: dict[str, Dtype] = {
    "F64": STORED_DTYPES["float64"],
    "F32": STORED_DTYPES["float32"],
    "F16": STORED_DTYPES["float16"],
    "BF16": STORED_DTYPES["bfloat16"],
    "F8_E4M3": STORED_DTYPES["float8_e4m3fn"],
    "F8_E5M2": STORED_DTYPES["float8_e5m2"],
    "U64": STORED_DTYPES["uint64"],
    "U32": STORED_DTYPES["uint32"],
    "U16": STORED_DTYPES["uint16"],
    "C64": STORED_DTYPES["complex64"],
    "I64": STORED_DTYPES["int64"],
    "I32": STORED_DTYPES["int32"],
    "I16": STORED_DTYPES["int16"],
    "I8": STORED_DTYPES["int8"],
    "U8": STORED_DTYPES["uint8"],
    "BOOL": STORED_DTYPES["bool"],
}
_MOST_BRACKETS = 1 << 20

PIECE_BYTES = 4 << 20
"""Larger tensors are converted and written in runs of rows of about this size. Smaller pieces take
longer. With glibc 2.36 some freed blocks are never reused, so that the conversion of a mixture of
experts may take a gigabyte (benchmarks/experts_memory.py); pieces of 2.5 MB took a third of it."""

WRITTEN_BYTES = 1 << 20
"""Written at a time: for more, Linux looks for contiguous pages, which takes it longer."""

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
        InputError: The file is missing, cut off, damaged, or no safetensors file, or a tensor is of
            a type that has no counterpart in torch.
    """
    refuse_special(path)
    try:
        header = _read_header(path)
        return SafetensorsFile(path, _stored_tensors(path, header), header)
    except FileNotFoundError:
        raise InputError(f"{describe_missing(path)}; copy all files of the model") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except InputError:
        raise
    except _NOT_OF_THIS_FILE:
        _refuse(path)


_NOT_OF_THIS_FILE = (LookupError, TypeError, ValueError, AttributeError, RecursionError)
"""What reading a header raises that does not describe its file."""


def _stored_tensors(path: Path, header: bytes) -> dict[str, StoredTensor]:
    """Return the tensors that a header describes, by name.

    They stand back to back from the header's end to the end of the file.

    Raises:
        InputError: The header names a tensor twice, of which the library takes one.
        _NOT_OF_THIS_FILE: It does not describe this file.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            raise InputError(f"{path} names {shown(twice)} twice in its header; get it again")
        return found

    about = json.loads(header.decode(), object_pairs_hook=once)
    metadata = about.pop("__metadata__", None)
    if metadata is not None and not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("no metadata")
    file, at = MappedFile(path), 8 + len(header)
    found: dict[str, StoredTensor] = {}
    for name, entry in sorted(about.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
        if isinstance(shape, list) and len(shape) > MOST_DIMS:
            raise InputError(
                f"{path} gives {shown(name)} {len(shape)} dims, more than torch's {MOST_DIMS}; get "
                "it again"
            )
        begin, stop = entry["data_offsets"]
        sizes = (begin, stop, *shape) if isinstance(shape, list) else (None,)
        if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes):
            raise ValueError("no sizes")
        start, end = 8 + len(header) + begin, 8 + len(header) + stop
        if not start == at <= end <= file.size or end - at != math.prod(shape) * kind.itemsize:
            raise ValueError("another place than that of the tensor")
        found[name] = StoredTensor(file, at, kind, shape, row_major(shape))
        at = end
    if at != file.size:
        raise ValueError("bytes of no tensor")
    return dict(sorted(found.items()))


def _refuse(path: Path) -> NoReturn:
    """Say what is wrong with a file, as far as it is damaged in the library's words.

    Raises:
        InputError: In any case.
    """
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        refuse_stand_in(path)
        what = str(error).removeprefix("Error while deserializing header: ")
    else:
        what = "its header does not describe it"
        for name in file.keys():
            code = file.get_slice(name).get_dtype()
            if code not in SAFETENSORS_DTYPES:
                raise InputError(
                    f"{path} holds {name} as {code}, a form of quantized weights that mlm-eval "
                    "does not read; use the model in float32, bfloat16 or float16"
                )
    raise InputError(
        f"{path} is cut off, damaged or no safetensors file ({what:.200}); download or copy "
        "the file again"
    )


def _read_header(path: Path) -> bytes:
    """Return the bytes of a file's header.

    Raises:
        InputError: It is larger than any.
        OSError: The file cannot be read.
        ValueError: The file ends before it does.
    """
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > LARGEST_SETTINGS:
            refuse_stand_in(path)
            raise InputError(
                f"{path} is damaged or no safetensors file: its header has {length:,} bytes; "
                "download or copy the file again"
            )
        header = stream.read(length)
    if len(start) < 8 or len(header) < length:
        raise ValueError("cut off")
    if header.count(b"[") + header.count(b"{") > _MOST_BRACKETS:
        raise InputError(f"{path} has more lists in its header than any file; get it again")
    return header


@dataclass(frozen=True)
class _Piece:
    """Some values to write: a tensor or a run of its rows, and where they go."""

    name: str
    tensor: LazyTensor
    rows: slice | None
    offset: int
    dtype: torch.dtype | None


def write_safetensors(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    dtype: torch.dtype | None = None,
    kept: Collection[str] = (),
    on_bytes: Callable[[int], None] | None = None,
) -> int:
    """Return the size of the file written, of which a few tensors or runs of rows were in memory.

    Args:
        path: A file to create.
        tensors: What to write, in this order. Several threads read them, each a tensor at a time.
        dtype: Convert to this dtype; None keeps each tensor's own.
        kept: Names of tensors that keep their own all the same.
        on_bytes: Told how many bytes of values each write added; in the order of `tensors`.

    Raises:
        InputError: A finite value becomes infinite in `dtype`.
    """
    names = {kind: name for name, kind in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    targets = {name: None if name in kept else dtype for name in tensors}
    at = 0
    for name, tensor in tensors.items():
        target = described(targets[name] or tensor.kind)
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
        for piece in _pieces(name, tensor, base + header[name]["data_offsets"][0], targets[name])
    )
    with path.open("xb", buffering=0) as stream:
        _write_at(stream.fileno(), memoryview(struct.pack("<Q", len(text)) + text), 0)
        _write_pieces(stream.fileno(), pieces, on_bytes)
    return base + at


def _write_pieces(
    file: int,
    pieces: Iterator[_Piece],
    on_bytes: Callable[[int], None] | None,
) -> None:
    """Read, convert and write pieces, each by one of a few threads."""
    import torch

    def write(piece: _Piece) -> int:
        torch.set_num_threads(1)  # one intra-op thread per writer; the pool uses the other cores
        values = cast(piece.tensor.read(0, piece.rows), piece.dtype, piece.name).contiguous()
        kept = piece.dtype or piece.tensor.dtype
        assert values.dtype == kept, f"{piece.name} was read as {values.dtype}, declared {kept}"
        # numpy has no bfloat16: write the bytes as they are.
        _write_at(file, values.view(-1).view(torch.uint8).numpy().data, piece.offset)
        return values.nbytes

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(MOST_WRITERS, len(os.sched_getaffinity(0)))) as writers:
            for written in writers.map(write, pieces):
                if on_bytes is not None:
                    on_bytes(written)
    finally:
        torch.set_num_threads(threads)  # torch starts later threads with the last number set


def _write_at(file: int, values: memoryview, offset: int) -> None:
    """Write all bytes at a place of a file."""
    while values.nbytes:
        written = os.pwrite(file, values[:WRITTEN_BYTES], offset)
        values, offset = values[written:], offset + written


def _pieces(
    name: str, tensor: LazyTensor, offset: int, dtype: torch.dtype | None
) -> Iterator[_Piece]:
    """Yield a tensor as runs of rows where the whole would be large."""
    if tensor.nbytes <= PIECE_BYTES or len(tensor.shape) < 2:
        yield _Piece(name, tensor, None, offset, dtype)
        return
    rows = max(1, PIECE_BYTES * tensor.shape[0] // tensor.nbytes)
    row_bytes = tensor.numel // tensor.shape[0] * described(dtype or tensor.kind).itemsize
    for start in range(0, tensor.shape[0], rows):
        run = slice(start, min(start + rows, tensor.shape[0]))
        yield _Piece(name, tensor, run, offset + start * row_bytes, dtype)
