"""Writes what `torch.save` writes with memory for one tensor, never for the whole state dict.

A file is a zip archive: `data.pkl` describes every tensor (dtype, shape, number of its storage),
then each storage is one stored record, its first byte at a multiple of 64 so that it can be mapped.
`torch.load` reads it since torch 1.6, with `mmap=True` and `weights_only=True` too, as far as the
values beside the tensors allow. The same contents give the same bytes: the records carry no date.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from mlm_eval.checkpoints.files.output import atomic_file
from mlm_eval.checkpoints.files.torch_file import STORAGE_DTYPES, UNTYPED
from mlm_eval.checkpoints.lazy import InMemory, LazyTensor

ALIGNMENT = 64
"""A storage's first byte stands at a multiple of this; torch's own value."""

PROTOCOL = 2
"""The pickle protocol that torch.save uses, and the only one that `weights_only=True` reads."""

FORMAT_VERSION = b"3\n"
"""Contents of the record `version`, as every torch since 1.6 writes it."""

_BLOCK = 1 << 24
_ZIP64_FROM = 1 << 30  # zipfile itself decides near 2 GiB; deciding earlier keeps the padding right

_STORAGE_TYPES: dict[torch.dtype, type] = {
    dtype.torch_dtype: getattr(torch, name)
    for name, dtype in STORAGE_DTYPES.items()
    if name != UNTYPED
}


def write_torch_file(
    value: Any, path: Path, *, on_bytes: Callable[[int], None] | None = None
) -> None:
    """Write `value` to `path`, as `torch.save(value, path)` would.

    Tensors anywhere in `value` may be `LazyTensor`s: each is read when its record is written, and
    let go of before the next. Every tensor becomes a contiguous one on the CPU with a storage of
    its own; the same object at two places stays one tensor. The file is written beside `path` and
    renamed at the end.

    Args:
        value: Anything that pickles, usually nested dicts.
        path: The file; an existing one is replaced.
        on_bytes: Called with the number of bytes of each piece of a tensor, once it is written.
    """
    with atomic_file(path) as partial, partial.open("wb") as stream:
        _write_archive(value, stream, path.stem, on_bytes)


@dataclass(frozen=True)
class _Storage:
    """Stands for a storage in the pickle, which holds its description only."""

    key: str
    dtype: torch.dtype
    numel: int


class _Pickler(pickle.Pickler):
    """Pickles tensors as references to storages, and collects the tensors."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=PROTOCOL)
        self.tensors: list[LazyTensor] = []

    def reducer_override(self, obj: Any) -> Any:
        """Describe a tensor by its storage's number; leave all else to pickle."""
        if isinstance(obj, Tensor):
            obj = InMemory(obj.detach())
        if not isinstance(obj, LazyTensor):
            return NotImplemented
        assert obj.dtype in _STORAGE_TYPES, f"torch.save has no storage type for {obj.dtype}"
        storage = _Storage(str(len(self.tensors)), obj.dtype, obj.numel)
        self.tensors.append(obj)
        stride = torch.empty(obj.shape, device="meta").stride()
        hooks: OrderedDict[Any, Any] = OrderedDict()
        return _rebuild_tensor_v2, (storage, 0, obj.shape, stride, False, hooks)

    def persistent_id(self, obj: Any) -> Any:
        """Describe a storage the way torch does: `('storage', type, key, location, elements)`."""
        if isinstance(obj, _Storage):
            return "storage", _STORAGE_TYPES[obj.dtype], obj.key, "cpu", obj.numel
        return None


def _write_archive(
    value: Any, stream: BinaryIO, prefix: str, on_bytes: Callable[[int], None] | None
) -> None:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, stream, f"{prefix}/data.pkl", buffer.getbuffer(), None)
        _write_record(archive, stream, f"{prefix}/byteorder", b"little", None)
        for key, lazy in enumerate(pickler.tensors):
            tensor = lazy.read()
            assert tensor.shape == lazy.shape and tensor.dtype == lazy.dtype, (
                f"{lazy} read {tensor.shape}"
            )
            data = row_major_bytes(tensor)
            _write_record(archive, stream, f"{prefix}/data/{key}", data, on_bytes)
            del tensor, data
        _write_record(archive, stream, f"{prefix}/version", FORMAT_VERSION, None)


def row_major_bytes(tensor: Tensor) -> memoryview:
    """Return the values in row-major order as bytes, without a copy where they already are."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write_record(
    archive: zipfile.ZipFile,
    stream: BinaryIO,
    name: str,
    data: bytes | memoryview,
    on_bytes: Callable[[int], None] | None,
) -> None:
    """Write one stored record whose contents start at a multiple of `ALIGNMENT`."""
    info = zipfile.ZipInfo(name)
    info.file_size = len(data)
    zip64 = info.file_size >= _ZIP64_FROM
    # The local header: 30 bytes, the name, 20 bytes of 64-bit sizes where needed, then our padding.
    start = stream.tell() + 30 + len(name.encode()) + (20 if zip64 else 0)
    gap = -start % ALIGNMENT
    if gap:
        gap += ALIGNMENT if gap < 4 else 0  # an extra field takes 4 bytes itself
        info.extra = b"FB" + (gap - 4).to_bytes(2, "little") + b"Z" * (gap - 4)
    with archive.open(info, "w", force_zip64=zip64) as sink:
        for at in range(0, len(data), _BLOCK):
            block = data[at : at + _BLOCK]
            sink.write(block)
            if on_bytes is not None:
                on_bytes(len(block))
