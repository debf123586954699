"""Folders of zarr arrays, a folder a tensor, read without the zarr package.

Megatron wrote them from 2023 to core 0.15: version 2 of the format, chunks without compression, in
row-major order. A chunk is a file of its own, `0.3.0`, whole also where it reaches over the edge of
its array. bfloat16, which the format does not have, stands as a dtype of that name.
Source: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html; docs/megatron.md, "zarr".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.dtypes import STORED_DTYPES, Dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.distcp import Tiled
from mlm_eval.checkpoints.files.text_file import read_json_object
from mlm_eval.checkpoints.lazy import LazyTensor, MappedFile, StoredTensor, Unstacked, row_major
from mlm_eval.checkpoints.soundness.copies import copied_on_purpose, copied_parts, refuse_copied

ARRAY = ".zarray"
"""The file in each array's folder that describes it."""

_DTYPES = {
    "<f4": STORED_DTYPES["float32"],
    "<f2": STORED_DTYPES["float16"],
    "<f8": STORED_DTYPES["float64"],
    "bfloat16": STORED_DTYPES["bfloat16"],
    "|u1": STORED_DTYPES["uint8"],
    "<i8": STORED_DTYPES["int64"],
}
_MOST_CHUNKS = 1 << 20


@dataclass(frozen=True)
class ZarrArray:
    """One array: what its `.zarray` says."""

    folder: Path
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    """Shape of a whole chunk."""
    kind: Dtype

    def files(self) -> Iterator[tuple[tuple[int, ...], Path]]:
        """Yield the offsets of each chunk in the array, and its file."""
        counts = [-(-size // part) for size, part in zip(self.shape, self.chunk, strict=True)]
        for numbers in itertools.product(*map(range, counts)):
            offsets = tuple(n * part for n, part in zip(numbers, self.chunk, strict=True))
            yield offsets, self.folder / (".".join(map(str, numbers)) or "0")


@dataclass(frozen=True)
class ZarrFolder:
    """The arrays of a folder, by name; no value has been read."""

    path: Path
    tensors: dict[str, ZarrArray]
    objects: dict[str, Any] = field(default_factory=dict)
    """Always empty: what is no array lies in files of its own."""
    _same: list[str] = field(default_factory=list)

    def tensor(self, key: str, *, stacked: bool = False) -> LazyTensor:
        """Return an array, merged from its chunks.

        Args:
            key: Its name.
            stacked: Whether its first dim is that of layers, which may be meant to be the same.

        Raises:
            InputError: A chunk is missing, or has another length, or the array holds no value.
        """
        array = self.tensors[key]
        if 0 in array.shape:
            raise InputError(
                f"{array.folder / ARRAY} gives the shape {list(array.shape)}, which holds no "
                "value; copy the checkpoint again"
            )
        tiles = []
        strides = row_major(array.chunk)
        for offsets, path in array.files():
            expected = math.prod(array.chunk) * array.kind.itemsize
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                what = "is missing" if found is None else f"has {found:,} of {expected:,} bytes"
                raise InputError(
                    f"{path} {what}: the save did not finish, or was not copied whole; copy it "
                    "again, or use the checkpoint of an earlier iteration"
                )
            inside = zip(array.shape, offsets, array.chunk, strict=True)
            shape = [min(size - offset, part) for size, offset, part in inside]
            tiles.append((offsets, StoredTensor(MappedFile(path), 0, array.kind, shape, strides)))
        if len(tiles) == 1:
            return tiles[0][1]
        if len(array.shape) > 1:
            self._compare(key, tiles, stacked=stacked)
        return Tiled(tiles, array.shape)

    def _compare(
        self, key: str, tiles: list[tuple[tuple[int, ...], StoredTensor]], *, stacked: bool
    ) -> None:
        """Note layers that are the same; refuse slices that are.

        Raises:
            InputError: A chunk is a copy of another slice, or of one slice of a layer alone.
        """
        said = f"two chunks of {key} are the same"
        by_slice: dict[tuple[int, ...], dict[int, StoredTensor]] = {}
        by_layer: dict[int, dict[int, StoredTensor]] = {}
        for number, (offsets, tile) in enumerate(tiles):
            layer, rest = (offsets[0], offsets[1:]) if stacked else (0, offsets)
            by_slice.setdefault(rest, {})[layer] = tile
            by_layer.setdefault(layer, {})[number] = tile
        if any(map(copied_parts, by_layer.values())):
            refuse_copied(said, self.path)
        found = [said if copied_parts(layers) else None for layers in by_slice.values()]
        self._same.extend(copied_on_purpose(found, self.path))

    def same_layers(self) -> list[str]:
        """Return which of the tensors that were asked for have layers that are the same."""
        more = f", and so for {len(self._same) - 1} more" if len(self._same) > 1 else ""
        return [self._same[0] + more] if self._same else []

    def layers(self, key: str) -> Iterator[LazyTensor]:
        """Yield the entries of an array along its first dim, in order."""
        whole = self.tensor(key, stacked=True)
        for number in range(whole.shape[0]):
            yield Unstacked(whole, number)


def is_array(folder: Path) -> bool:
    """Return whether a folder is a zarr array."""
    return (folder / ARRAY).is_file()


def holds_arrays(folder: Path) -> bool:
    """Return whether a folder holds zarr arrays."""
    return folder.is_dir() and any(is_array(entry) for entry in folder.iterdir())


def open_arrays(folder: Path) -> ZarrFolder:
    """Return the arrays of a folder.

    Raises:
        InputError: An array is compressed, filtered, or of another version of the format.
    """
    found = sorted(entry for entry in folder.iterdir() if is_array(entry))
    return ZarrFolder(folder, {entry.name: _read_array(entry) for entry in found})


def _read_array(folder: Path) -> ZarrArray:
    path = folder / ARRAY
    about = read_json_object(path)
    expected = {"zarr_format": 2, "compressor": None, "filters": None, "order": "C"}
    for name, value in expected.items():
        if about.get(name) != value:
            raise InputError(
                f"{path}: {name} is {about.get(name)!r}, where Megatron writes {value!r}; use the "
                "checkpoint as Megatron wrote it"
            )
    if about.get("dimension_separator", ".") != ".":
        raise InputError(f"{path}: its chunks are not named 0.0; use the one that Megatron wrote")
    shape, chunk = (_sizes(about.get(name), path) for name in ("shape", "chunks"))
    kind = _DTYPES.get(str(about.get("dtype")))
    if kind is None:
        raise InputError(f"{path}: dtype {about.get('dtype')!r} is not one that Megatron writes")
    fits = len(shape) == len(chunk) and all(part > 0 for part in chunk)
    if not fits or math.prod(-(-s // c) for s, c in zip(shape, chunk, strict=True)) > _MOST_CHUNKS:
        raise InputError(
            f"{path}: chunks {list(chunk)} do not fit the shape {list(shape)}; copy the checkpoint "
            "again"
        )
    return ZarrArray(folder, shape, chunk, kind)


def _sizes(value: Any, path: Path) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(type(n) is int and 0 <= n < 2**40 for n in value)
    if not whole:
        raise InputError(f"{path} holds {value!r} for a list of sizes; copy the checkpoint again")
    return tuple(value)
