"""Lazy tensors: shape and dtype are known, the bytes stay in the file until they are needed.

A reader of a format returns `LazyTensor`s; merging ranks, reordering rows and transposing are views
over them. Reading a slice touches only the pages of that slice, so that one rank of eight reads an
eighth of a checkpoint, and a conversion holds a few tensors at a time.
"""

from __future__ import annotations

import functools
import math
import mmap
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mlm_eval.checkpoints.errors import InputError

Index = slice | Tensor | None
"""Which entries along one dim: a slice with step 1, a 1-D int64 tensor, or None for all."""

_CRC_BLOCK = 1 << 24


class LazyTensor(ABC):
    """A tensor of known `shape` and `dtype` whose values are read on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """Return the values, cut along `dim` to `index`.

        The result may be a view of the mapped file: never write to it in place.
        """

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes, in the stored dtype."""
        return self.numel * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype})"


class MappedFile:
    """A file whose bytes are mapped on first use; shared by the tensors stored in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._storage: torch.UntypedStorage | None = None
        self._shift = 0

    def tensor(
        self, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]
    ) -> Tensor:
        """Return a view of the file's bytes as a tensor; `offset` in bytes, `stride` in elements.

        The mapping is private and never written to, so its pages are clean: the kernel may drop
        them.
        """
        if self._storage is None:
            if self.path.stat().st_size != self.size:
                raise InputError(f"{self.path} changed its size while being read; copy it again")
            if isinstance(self.path, Embedded):
                self._storage, self._shift = _map_part(*self.path.place(), self.size)
            else:
                self._storage = _map(self.path, self.size)
        offset += self._shift
        if offset % dtype.itemsize == 0:
            view = torch.empty(0, dtype=dtype)
            return view.set_(self._storage, offset // dtype.itemsize, tuple(shape), tuple(stride))
        # The pickle-stream form of torch.save aligns nothing; torch views need whole elements.
        extent = _extent(shape, stride) * dtype.itemsize
        raw = torch.empty(0, dtype=torch.uint8).set_(self._storage, offset, (extent,), (1,))
        return raw.clone().view(dtype).as_strided(tuple(shape), tuple(stride))

    def crc(self, offset: int, length: int) -> int:
        """Return the CRC-32 of some of the file's bytes."""
        if offset < 0 or offset + length > self.size:
            return -1
        raw = self.tensor(offset, torch.uint8, (length,), (1,)).numpy().data
        value = 0
        for at in range(0, length, _CRC_BLOCK):
            value = zlib.crc32(raw[at : at + _CRC_BLOCK], value)
        return value


@dataclass(eq=False)
class Checksum:
    """What an archive says that the CRC-32 of one record is; compared once, before it is used."""

    file: MappedFile
    offset: int
    length: int
    expected: int
    record: str
    compared: bool = False

    def compare(self) -> None:
        """Refuse bytes that are not those that were written.

        Raises:
            InputError: They are others.
        """
        if self.compared:
            return
        if self.file.crc(self.offset, self.length) != self.expected:
            raise InputError(
                f"{self.file.path} is damaged: the bytes of {self.record} have another checksum "
                "than the file says they have; copy the file again"
            )
        self.compared = True


@runtime_checkable
class Embedded(Protocol):
    """A path to a file that stands in another file, such as an archive."""

    def place(self) -> tuple[Path, int]:
        """Return the other file, and the offset in it at which this one's bytes begin."""


def _map_part(path: Path, offset: int, size: int) -> tuple[torch.UntypedStorage, int]:
    """Return a storage with the `size` bytes from `offset` of a file, and where they begin in it.

    Only whole pages can be mapped, so that it may begin a little before them.
    """
    shift = offset % mmap.ALLOCATIONGRANULARITY
    return _map_read_only(path, size + shift, offset - shift), shift


def _map(path: Path, size: int) -> torch.UntypedStorage:
    """Return the bytes of a file as a storage, mapped.

    torch maps the file copy-on-write, for which the kernel may demand as much memory as the file is
    long. A larger file is mapped read-only.
    """
    try:
        mapped = torch.UntypedStorage.from_file(str(path), False, size)
        assert isinstance(mapped, torch.UntypedStorage)
        return mapped
    except (RuntimeError, UnicodeEncodeError):  # the second: a name of bytes that are no text
        return _map_read_only(path, size, 0)


def _map_read_only(path: Path, size: int, offset: int) -> torch.UntypedStorage:
    """Return `size` bytes of a file from `offset`, which begins a page.

    Raises:
        InputError: The file's system cannot map it.
    """
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "must not be written to": nothing does
            buffer = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ, offset=offset)
            return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    except OSError as error:
        raise InputError(
            f"{path} cannot be mapped into memory ({error.strerror}); copy it to a local disk"
        ) from None


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements from the first to the last one of a strided tensor."""
    if any(size == 0 for size in shape):
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


class StoredTensor(LazyTensor):
    """A tensor at a byte offset of a file.

    A `checksum` is compared by who reads the first entries along the dim that is cut: of ranks that
    read a slice each this is one, and each that reads its own file whole.
    """

    def __init__(
        self,
        file: MappedFile,
        offset: int,
        dtype: torch.dtype,
        shape: Sequence[int],
        stride: Sequence[int],
        checksum: Checksum | None = None,
    ) -> None:
        self.file = file
        self.offset = offset
        self.checksum = checksum
        self.dtype = dtype
        self.shape = tuple(shape)
        self.stride = tuple(stride)
        end = offset + _extent(shape, stride) * dtype.itemsize
        if end > file.size or offset < 0 or any(step < 0 for step in stride):
            raise InputError(
                f"{file.path} is cut off or damaged: a tensor of shape {list(shape)} would end at "
                f"byte {end}, the file has {file.size}; copy the file again"
            )

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        if isinstance(index, slice) and self.shape:
            shape = list(self.shape)
            start, stop = span(index, shape[dim])
            if self.checksum is not None and start == 0 < stop:
                self.checksum.compare()
            shape[dim] = stop - start
            offset = self.offset + start * self.stride[dim] * self.dtype.itemsize
            return self.file.tensor(offset, self.dtype, shape, self.stride)
        if self.checksum is not None and (
            not isinstance(index, Tensor) or bool((index == 0).any())
        ):
            self.checksum.compare()
        whole = self.file.tensor(self.offset, self.dtype, self.shape, self.stride)
        return whole if index is None else take(whole, dim, index)


class InMemory(LazyTensor):
    """An ordinary tensor behind the same interface."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        return take(self.tensor, dim, index)


class Concat(LazyTensor):
    """Tensors one after the other along `dim`: the merge of a column- or row-parallel parameter.

    Parts of several dtypes are cast to the one that holds them all.
    """

    def __init__(self, parts: Sequence[LazyTensor], dim: int) -> None:
        assert parts, "nothing to concatenate"
        self.dim = dim
        self.dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        self.parts = [
            part if part.dtype == self.dtype else Mapped(part, self._promoted, self.dtype)
            for part in parts
        ]
        shape = list(parts[0].shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        for part in parts:
            rest = [size for d, size in enumerate(part.shape) if d != dim]
            assert rest == [size for d, size in enumerate(shape) if d != dim], "ragged parts"
        self.shape = tuple(shape)

    def _promoted(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        if dim != self.dim or index is None:
            return torch.cat([part.read(dim, index) for part in self.parts], dim=self.dim)
        if isinstance(index, slice):
            pieces = self._pieces(*span(index, self.shape[dim]))
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self.dim)
        # A scattered index: gather from every part, then put the rows where they belong.
        size = list(self.shape)
        size[dim] = index.numel()
        result = torch.empty(size, dtype=self.dtype)
        start = 0
        for part in self.parts:
            stop = start + part.shape[dim]
            chosen = ((index >= start) & (index < stop)).nonzero().squeeze(1)
            if chosen.numel():
                values = part.read(dim, as_index(index[chosen] - start))
                result.index_copy_(dim, chosen, values)
            start = stop
        return result

    def _pieces(self, start: int, stop: int) -> list[Tensor]:
        pieces, base = [], 0
        for part in self.parts:
            low, high = max(start - base, 0), min(stop - base, part.shape[self.dim])
            if low < high:
                pieces.append(part.read(self.dim, slice(low, high)))
            base += part.shape[self.dim]
        if not pieces:  # an empty slice keeps its shape
            pieces.append(self.parts[0].read(self.dim, slice(0, 0)))
        return pieces


class Summed(LazyTensor):
    """The sum of tensors of one shape, made in float32 and rounded to their dtype."""

    def __init__(self, parts: Sequence[LazyTensor]) -> None:
        assert len({(part.shape, part.dtype) for part in parts}) == 1, "unequal parts"
        self.parts = list(parts)
        self.shape, self.dtype = parts[0].shape, parts[0].dtype

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        wide = torch.promote_types(self.dtype, torch.float32)
        parts = [part.read(dim, index).to(wide) for part in self.parts]
        return torch.stack(parts).sum(dim=0).to(self.dtype)


class Stacked(LazyTensor):
    """Tensors of one shape on a new first dim, such as the experts of a layer."""

    def __init__(self, parts: Sequence[LazyTensor]) -> None:
        assert parts, "nothing to stack"
        assert len({(part.shape, part.dtype) for part in parts}) == 1, "unequal parts"
        self.parts = list(parts)
        self.dtype = parts[0].dtype
        self.shape = (len(parts), *parts[0].shape)

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        if dim:
            return torch.stack([part.read(dim - 1, index) for part in self.parts])
        chosen = take(torch.arange(len(self.parts)), 0, index).tolist()
        if not chosen:
            return torch.empty(0, *self.shape[1:], dtype=self.dtype)
        return torch.stack([self.parts[number].read() for number in chosen])


class Unstacked(LazyTensor):
    """One entry of a tensor along its first dim, without that dim: the inverse of `Stacked`."""

    def __init__(self, source: LazyTensor, number: int) -> None:
        self.source = source
        self.number = number
        self.dtype = source.dtype
        self.shape = source.shape[1:]

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        return take(self.source.read(0, slice(self.number, self.number + 1))[0], dim, index)


class Selected(LazyTensor):
    """The entries `order` of a tensor along dim 0, in that order: permuted or fewer rows."""

    def __init__(self, source: LazyTensor, order: Tensor) -> None:
        self.source = source
        self.order = order
        self.dtype = source.dtype
        self.shape = (order.numel(), *source.shape[1:])

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        if dim == 0:
            return self.source.read(0, as_index(take(self.order, 0, index)))
        # Cut the columns first: row-parallel slices then never touch the rest of a row.
        return take(self.source.read(dim, index), 0, as_index(self.order))


class Transposed(LazyTensor):
    """A matrix with its dims exchanged (Hugging Face GPT-2 keeps linear weights `[in, out]`)."""

    def __init__(self, source: LazyTensor) -> None:
        assert len(source.shape) == 2, source.shape
        self.source = source
        self.dtype = source.dtype
        self.shape = (source.shape[1], source.shape[0])

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        return self.source.read(1 - dim, index).t()


class Mapped(LazyTensor):
    """A tensor with an elementwise function applied when read, such as adding 1 to a gain.

    `dtype` is that of the function's result; None: the source's.
    """

    def __init__(
        self,
        source: LazyTensor,
        function: Callable[[Tensor], Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.source = source
        self.function = function
        self.dtype = dtype or source.dtype
        self.shape = source.shape

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        return self.function(self.source.read(dim, index))


def cast_to(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Return a tensor that is rounded to a dtype as it is read."""
    if tensor.dtype == dtype:
        return tensor
    return Mapped(tensor, lambda values: values.to(dtype), dtype)


class ScaledRows(LazyTensor):
    """A tensor whose entries along dim 0 are each multiplied by a factor, in float32."""

    def __init__(self, source: LazyTensor, factors: Tensor) -> None:
        assert factors.shape == source.shape[:1], (factors.shape, source.shape)
        self.source = source
        self.factors = factors
        self.dtype = source.dtype
        self.shape = source.shape

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        factors = take(self.factors, 0, index) if dim == 0 else self.factors
        values = self.source.read(dim, index)
        factors = factors.view(-1, *(1 for _ in self.shape[1:]))
        return (values.float() * factors).to(self.dtype)


@dataclass(eq=False, repr=False)
class Computed(LazyTensor):
    """A tensor that a function makes when it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    function: Callable[[], Tensor]

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        return take(self.function(), dim, index)


def take(tensor: Tensor, dim: int, index: Index) -> Tensor:
    """Return `tensor` cut along `dim` to `index` (a view for slices)."""
    if index is None:
        return tensor
    if isinstance(index, slice):
        start, stop = span(index, tensor.shape[dim])
        return tensor.narrow(dim, start, stop - start)
    return tensor.index_select(dim, index)


def span(index: slice, size: int) -> tuple[int, int]:
    """Return first and end of a slice with step 1 of a dim of `size` entries, as Python has it."""
    start, stop, step = index.indices(size)
    assert step == 1, index
    return start, max(start, stop)


def as_index(order: Tensor) -> slice | Tensor:
    """Return a slice where `order` is one ascending run, else itself: slices are read as views."""
    if order.numel() == 0:
        return slice(0, 0)
    first = int(order[0])
    if int(order[-1]) - first + 1 == order.numel() and bool((order.diff() == 1).all()):
        return slice(first, first + order.numel())
    return order


def runs(tensor: LazyTensor, nbytes: int = 16 << 20) -> Iterator[Tensor]:
    """Yield a tensor's values as runs of whole rows of about `nbytes` bytes; a scalar at once."""
    if not tensor.shape:
        yield tensor.read()
        return
    count = max(1, nbytes * tensor.shape[0] // max(tensor.nbytes, 1))
    for start in range(0, tensor.shape[0], count):
        yield tensor.read(0, slice(start, min(start + count, tensor.shape[0])))
