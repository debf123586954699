"""Folders that torch.distributed.checkpoint wrote (`.metadata`, `*.distcp`), read without it.

torch's own reader unpickles `.metadata` and every entry that is not a tensor without restriction:
it runs whatever a file asks for (docs/megatron.md, "What the pickles ask for"). Here `.metadata` is
read by our own unpickler, which knows neither torch's nor Megatron's classes: all of them arrive as
inert stubs, whatever the version that wrote them, and only their plain attributes are looked at.

Every entry of a `.distcp` file is a torch.save archive of its own. A tensor is one chunk or many;
a chunk's archive is opened when the first value of it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.dtypes import Dtype
from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.safe_pickle import state_of
from mlm_eval.checkpoints.files.stand_in import describe_missing, refuse_stand_in
from mlm_eval.checkpoints.files.torch_file import TorchFile, read_pickle, read_torch_file
from mlm_eval.checkpoints.folders.file_names import is_file_name
from mlm_eval.checkpoints.lazy import (
    MOST_DIMS,
    Index,
    LazyTensor,
    MappedFile,
    StoredTensor,
    as_index,
)

if TYPE_CHECKING:
    from torch import Tensor

METADATA = ".metadata"

_TAIL = 1024
"""Bytes at the end of an archive that hold its table of contents, with the CRC of every record."""

Tile = tuple[tuple[int, ...], LazyTensor]
"""A box of a tensor: its offsets and its values."""


@dataclass(frozen=True, order=True)
class Record:
    """Where the archive of one entry stands: `length` bytes from `offset` of a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the archive that holds its values."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    record: Record


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the folder: its shape in the whole model, and its chunks."""

    key: str
    shape: tuple[int, ...]
    kind: Dtype
    chunks: tuple[Chunk, ...]


@dataclass
class DistributedFolder:
    """What `.metadata` says about a folder; nothing else of it has been read."""

    path: Path
    tensors: dict[str, TensorEntry]
    objects: dict[str, Record]
    """The entries that are not tensors: pickled values, each to be read with `read_object`."""
    metadata: TorchFile
    _mapped: dict[str, MappedFile] = field(default_factory=dict)

    def mapped(self, name: str) -> MappedFile:
        """Return the mapping of a `.distcp` file, one for all entries in it."""
        if name not in self._mapped:
            self._mapped[name] = MappedFile(self.path / name)
        return self._mapped[name]

    def read_object(self, key: str) -> TorchFile:
        """Return an entry that is not a tensor, read by our own unpickler."""
        record = self.objects[key]
        return read_torch_file(self.path / record.file, offset=record.offset, length=record.length)

    def tensor(self, key: str) -> LazyTensor:
        """Return a tensor, merged from its chunks."""
        entry = self.tensors[key]
        tiles = [(chunk.offsets, Archived(self, entry, chunk)) for chunk in entry.chunks]
        return _assemble(tiles, entry.shape)

    def parts(self, keys: Iterable[str], file: str) -> Iterator[LazyTensor]:
        """Yield the chunks of some tensors that stand in one file."""
        for entry in (self.tensors[key] for key in keys):
            for chunk in entry.chunks:
                if chunk.record.file == file:
                    yield Archived(self, entry, chunk)

    def layers(self, key: str) -> Iterator[LazyTensor]:
        """Yield the entries of a tensor along its first dim, in order: views, one per layer."""
        entry = self.tensors[key]
        of_layer: list[list[Tile]] = [[] for _ in range(entry.shape[0])]
        for chunk in entry.chunks:
            for at in range(chunk.sizes[0]):
                tile = Archived(self, entry, chunk, at)
                of_layer[chunk.offsets[0] + at].append((chunk.offsets[1:], tile))
        for tiles in of_layer:
            yield _assemble(tiles, entry.shape[1:])

    def records(self, keys: Iterable[str]) -> Iterator[Record]:
        """Yield the records of some entries."""
        for key in keys:
            if key in self.tensors:
                yield from (chunk.record for chunk in self.tensors[key].chunks)
            else:
                yield self.objects[key]

    def damage(self, records: Iterable[Record]) -> str | None:
        """Return what is missing of the files that hold `records`, in words; None: nothing."""
        needed: dict[str, int] = {}
        for record in records:
            needed[record.file] = max(needed.get(record.file, 0), record.offset + record.length)
        for name, size in sorted(needed.items()):
            file = self.path / name
            if not file.is_file():
                return describe_missing(file, "is missing")
            found = self.mapped(name).size  # what is read later must be this file
            if found < size:
                refuse_stand_in(file)
                return f"{file} is cut off: it has {found} of at least {size} bytes"
        return None

    def tails(self, records: Iterable[Record]) -> dict[str, bytes]:
        """Return, by file, the ends of some archives: they hold the CRCs of what is in them."""
        tails = {}
        for name, group in groupby(sorted(records), attrgetter("file")):
            with (self.path / name).open("rb") as stream:
                marks = bytearray()
                for record in group:
                    size = min(record.length, _TAIL)
                    stream.seek(record.offset + record.length - size)
                    marks += stream.read(size)
                tails[name] = bytes(marks)
        return tails


def open_folder(path: Path) -> DistributedFolder:
    """Return what the `.metadata` of a folder says.

    Raises:
        InputError: `.metadata` is missing, damaged, or not torch.distributed.checkpoint's.
    """
    metadata = read_pickle(path / METADATA)
    try:
        state = state_of(metadata.value)
        tensors, objects = _entries(state["state_dict_metadata"], _records(state["storage_data"]))
    except InputError as error:
        raise InputError(
            f"{metadata.path}: {error}; copy the checkpoint again from its source"
        ) from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        asks = f"; it asks for {', '.join(metadata.hostile)}" if metadata.hostile else ""
        raise InputError(
            f"{metadata.path} is not what torch.distributed.checkpoint writes "
            f"({type(error).__name__}: {error}){asks}; copy the checkpoint again from its source"
        ) from None
    return DistributedFolder(path, tensors, objects, metadata)


def _records(storage: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], Record]:
    """Return where entries are stored, by key and first index (None: no tensor)."""
    records = {}
    for index, info in storage.items():
        where, at = state_of(info), state_of(index)
        if where.get("transform_descriptors"):
            transform = shown(where["transform_descriptors"])
            raise ValueError(f"its entries are transformed by {transform}")
        file = where["relative_path"]
        if not isinstance(file, str) or not is_file_name(file):
            raise InputError(f"an entry is in {shown(file)}, outside of the folder")
        record = Record(file, _size(where["offset"]), _size(where["length"]))
        offsets = at.get("offset")
        if not isinstance(at["fqn"], str):
            raise ValueError(f"an entry is called {shown(at['fqn'])}")
        records[at["fqn"], None if offsets is None else _sizes(offsets)] = record
    return records


def _entries(
    table: Mapping[str, Any], records: Mapping[tuple[str, tuple[int, ...] | None], Record]
) -> tuple[dict[str, TensorEntry], dict[str, Record]]:
    tensors, objects = {}, {}
    for key, stub in table.items():
        if not isinstance(key, str):
            raise ValueError(f"an entry is called {shown(key)}")
        kind = type(stub).__name__.rpartition(".")[2]
        if kind == "TensorStorageMetadata":
            state = state_of(stub)
            shape = _sizes(state["size"])
            chunks: dict[tuple[int, ...], Chunk] = {}
            if not isinstance(state["chunks"], list):
                raise ValueError(f"the chunks of {shown(key)} are {shown(state['chunks'])}")
            for chunk in map(state_of, state["chunks"]):
                offsets, sizes = _sizes(chunk["offsets"]), _sizes(chunk["sizes"])
                if 0 in sizes and 0 not in shape:
                    continue  # ranks of a sharded optimizer may own nothing of a tensor
                if offsets in chunks:
                    raise ValueError(f"two chunks of {shown(key)} are at {shown(offsets)}")
                chunks[offsets] = Chunk(offsets, sizes, records[key, offsets])
            tensors[key] = TensorEntry(
                key, shape, _dtype(state["properties"]), tuple(chunks.values())
            )
        elif kind == "BytesStorageMetadata":
            objects[key] = records[key, None]
        else:
            raise ValueError(f"entry {shown(key)} is of the unknown kind {kind}")
    return tensors, objects


def _dtype(properties: Any) -> Dtype:
    """Return the dtype of pickled TensorProperties: a tuple that it begins, or attributes."""
    state = properties.__dict__.get("stub_state")
    dtype = state[0] if isinstance(state, tuple) else state_of(properties)["dtype"]
    if not isinstance(dtype, Dtype):
        raise ValueError(f"{shown(dtype)} is not a dtype")
    return dtype


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{shown(value)} is not a size")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) > MOST_DIMS:
        raise ValueError(f"{shown(values)} are no sizes")
    return tuple(_size(value) for value in values)


def check_coverage(entry: TensorEntry, where: Path) -> None:
    """Refuse a tensor whose chunks do not make up the whole of it.

    Raises:
        InputError: Chunks are missing, lie over one another, or reach over the tensor's end.
    """
    total = 0
    for chunk in entry.chunks:
        ends = [start + size for start, size in zip(chunk.offsets, chunk.sizes, strict=False)]
        fits = len(chunk.offsets) == len(chunk.sizes) == len(entry.shape)
        if not fits or any(end > size for end, size in zip(ends, entry.shape, strict=True)):
            raise InputError(
                f"{where / METADATA}: a chunk {shown(chunk.sizes)} at {shown(chunk.offsets)} does "
                f"not fit {entry.key} {shown(entry.shape)}; copy the checkpoint again"
            )
        total += math.prod(chunk.sizes)
    if total != math.prod(entry.shape) or not entry.chunks:
        raise InputError(
            f"{where}: the stored chunks of {entry.key} hold {total} of its "
            f"{math.prod(entry.shape)} values; the checkpoint was not saved by all of its ranks"
        )
    boxes = [list(zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in entry.chunks]
    if not _are_apart(boxes, [MOST_COMPARED]):
        raise InputError(
            f"{where / METADATA}: chunks of {entry.key} lie over one another, or are cut in a way "
            "that no run cuts them; copy the checkpoint again"
        )


MOST_COMPARED = 1 << 22
"""Steps in which the chunks of a tensor must be found to lie apart."""


def _are_apart(boxes: list[list[tuple[int, int]]], steps: list[int]) -> bool:
    """Return whether no two boxes share a value; with as many as fill the whole, they do fill it.

    The first dim is cut where a box begins or ends, and what is in each slice is compared in the
    other dims.

    Args:
        boxes: The offset and size of each along each dim.
        steps: Steps that are left, in a list of one.
    """
    if len(boxes) < 2:
        return True
    if not boxes[0]:
        return False
    steps[0] -= len(boxes)
    by_start = sorted(boxes)
    edges = sorted({edge for box in boxes for edge in (box[0][0], sum(box[0]))})
    inside: list[list[tuple[int, int]]] = []
    at = 0
    for edge in edges[:-1]:
        inside = [box for box in inside if sum(box[0]) > edge]
        while at < len(by_start) and by_start[at][0][0] == edge:
            inside.append(by_start[at])
            at += 1
        steps[0] -= len(inside)
        if steps[0] < 0 or not _are_apart([box[1:] for box in inside], steps):
            return False
    return True


class Archived(LazyTensor):
    """One chunk (or one layer of a stacked chunk), its archive opened at the first read."""

    def __init__(
        self, folder: DistributedFolder, entry: TensorEntry, chunk: Chunk, layer: int | None = None
    ) -> None:
        self.folder, self.key, self.chunk, self.layer = folder, entry.key, chunk, layer
        self.kind = entry.kind
        self.shape = chunk.sizes if layer is None else chunk.sizes[1:]
        self._stored: StoredTensor | None = None

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        if self._stored is None:
            self._stored = self._open()
        return self._stored.read(dim, index)

    def _open(self) -> StoredTensor:
        record, path = self.chunk.record, self.folder.path / self.chunk.record.file
        archive = read_torch_file(
            path,
            offset=record.offset,
            length=record.length,
            mapped=self.folder.mapped(record.file),
        )
        if archive.hostile:
            raise InputError(
                f"{path} asks for {', '.join(archive.hostile)} where it holds {self.key}, which no "
                "checkpoint needs; nothing was run, but do not trust this file"
            )
        stored = archive.value
        if (
            not isinstance(stored, StoredTensor)
            or stored.shape != self.chunk.sizes
            or stored.kind != self.kind
        ):
            raise InputError(
                f"{path} holds {stored!r} at byte {record.offset}, where {METADATA} announces "
                f"{self.key} as {list(self.chunk.sizes)} {self.kind}; files of two checkpoints "
                "may be mixed, copy the folder again"
            )
        if self.layer is None:
            return stored
        start = stored.offset + self.layer * stored.stride[0] * stored.kind.itemsize
        shape, stride = stored.shape[1:], stored.stride[1:]
        return StoredTensor(stored.file, start, stored.kind, shape, stride, stored.checksum)


def _assemble(tiles: Sequence[Tile], shape: tuple[int, ...]) -> LazyTensor:
    assert tiles, "check_coverage comes first"
    if len(tiles) == 1 and tiles[0][1].shape == shape:
        return tiles[0][1]
    return Tiled(tiles, shape)


class Tiled(LazyTensor):
    """A tensor made up of boxes: what several ranks wrote, along any dims."""

    def __init__(self, tiles: Sequence[Tile], shape: Sequence[int]) -> None:
        self.tiles = list(tiles)
        self.shape = tuple(shape)
        self.kind = self.tiles[0][1].kind

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`. Tiles outside of what is asked for are not opened."""
        import torch

        if isinstance(index, torch.Tensor):
            return self._gather(dim, index)
        start = 0 if index is None else index.start or 0
        stop = self.shape[dim] if index is None or index.stop is None else index.stop
        size = list(self.shape)
        size[dim] = stop - start
        result: Tensor | None = None
        for offsets, tile in self.tiles:
            low = max(start - offsets[dim], 0)
            high = min(stop - offsets[dim], tile.shape[dim])
            if low >= high:
                continue
            part = tile.read(dim, slice(low, high))
            if list(part.shape) == size:
                return part  # one tile holds it all: no copy
            result = torch.empty(size, dtype=self.dtype) if result is None else result
            at = list(offsets)
            at[dim] = offsets[dim] + low - start
            _box(result, at, part.shape).copy_(part)
        return torch.empty(size, dtype=self.dtype) if result is None else result

    def _gather(self, dim: int, index: Tensor) -> Tensor:
        import torch

        size = list(self.shape)
        size[dim] = index.numel()
        result = torch.empty(size, dtype=self.dtype)
        for offsets, tile in self.tiles:
            inside = (index >= offsets[dim]) & (index < offsets[dim] + tile.shape[dim])
            chosen = inside.nonzero().squeeze(1)
            if not chosen.numel():
                continue
            part = tile.read(dim, as_index(index[chosen] - offsets[dim]))
            at, extent = list(offsets), list(part.shape)
            at[dim], extent[dim] = 0, size[dim]
            _box(result, at, extent).index_copy_(dim, chosen, part)
        return result


def _box(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Return a view of the box of `sizes` at `offsets`."""
    for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor
