"""Lazy tensors: shape and dtype are known, the bytes stay in the file until they are needed.

A reader of a format returns `LazyTensor`s; merging ranks, reordering rows and transposing are views
over them. Reading a slice touches only the pages of that slice, so that one rank of eight reads an
eighth of a checkpoint, and a conversion holds a few tensors at a time.

What describes a tensor needs no torch, which takes a second to import: it is imported by what reads
values.
"""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import operator
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from mlm_eval.checkpoints.dtypes import Dtype, described, widest
from mlm_eval.checkpoints.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Index: TypeAlias = "slice | Tensor | None"
"""Which entries along one dim: a slice with step 1, a 1-D int64 tensor, or None for all."""

_BLOCK = 1 << 20

MOST_DIMS = 64
"""Of a tensor: torch's own limit."""


class LazyTensor(ABC):
    """A tensor of known `shape` and `dtype` whose values are read on demand."""

    shape: tuple[int, ...]
    kind: Dtype
    """Its dtype, described without torch."""

    @abstractmethod
    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """Return the values, cut along `dim` to `index`.

        The result may be a view of the mapped file: never write to it in place.
        """

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values, as torch has it: unlike `kind` it imports torch."""
        return self.kind.torch_dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes, in the stored dtype."""
        return self.numel * self.kind.itemsize

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.kind})"


class MappedFile:
    """A file whose bytes are mapped on first use; shared by the tensors stored in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._seen = self._identity()
        self._storage: torch.UntypedStorage | None = None
        self._shift = 0

    def tensor(
        self, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]
    ) -> Tensor:
        """Return a view of the file's bytes as a tensor; `offset` in bytes, `stride` in elements.

        The mapping is private and never written to, so its pages are clean: the kernel may drop
        them.
        """
        import torch

        if self._storage is None:
            self._check_same()
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

    def _identity(self) -> tuple[int, int]:
        """Return what tells the file, or the one that it stands in, from another of its name.

        Without its number: mounts of object stores give a file another one from time to time.
        """
        about = (self.path.place()[0] if isinstance(self.path, Embedded) else self.path).stat()
        return about.st_mtime_ns, about.st_size

    def _check_same(self) -> None:
        """Refuse a file that is no longer the one that was opened.

        Raises:
            InputError: It is gone, or was replaced or changed.
        """
        try:
            same = self._identity() == self._seen
        except OSError as error:
            raise InputError(
                f"{self.path} is gone since it was opened ({error.strerror}); put it back, and let "
                "nothing move or delete files of a checkpoint while it is read"
            ) from None
        if not same:
            raise self._changed()

    def _changed(self) -> InputError:
        return InputError(
            f"{self.path} was replaced or changed since it was opened; let nothing write files of "
            "a checkpoint while it is read, and start again"
        )

    def blocks(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield bytes of the file in blocks; they are read, and not mapped, without torch.

        Raises:
            InputError: The file is gone, or was replaced or changed.
        """
        self._check_same()
        with self.path.open("rb") as stream:
            stream.seek(offset)
            while length > 0:
                block = stream.read(min(length, _BLOCK))
                if not block:
                    raise self._changed()
                yield block
                length -= len(block)

    def crc(self, offset: int, length: int) -> int:
        """Return the CRC-32 of some of the file's bytes."""
        if offset < 0 or offset + length > self.size:
            return -1
        if self._storage is None:
            blocks: Iterator[Any] = self.blocks(offset, length)
        else:  # the bytes that are used, whatever has become of the path
            blocks = self._mapped_blocks(offset, length)
        return functools.reduce(lambda crc, block: zlib.crc32(block, crc), blocks, 0)

    def _mapped_blocks(self, offset: int, length: int) -> Iterator[Any]:
        import torch

        for start in range(0, length, _BLOCK):
            size = min(length - start, _BLOCK)
            yield self.tensor(offset + start, torch.uint8, (size,), (1,)).numpy().data


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
    import torch

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
    import torch

    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "must not be written to": nothing does
            buffer = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ, offset=offset)
            return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    except OSError as error:
        raise InputError(
            f"{path} cannot be mapped into memory ({error.strerror}); copy it to a local disk"
        ) from None


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a tensor whose values stand without gaps, rows first."""
    sizes = itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1)
    return tuple(sizes)[::-1] if shape else ()


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
        dtype: torch.dtype | Dtype,
        shape: Sequence[int],
        stride: Sequence[int],
        checksum: Checksum | None = None,
    ) -> None:
        self.file = file
        self.offset = offset
        self.checksum = checksum
        self.kind = described(dtype)
        self.shape = tuple(shape)
        self.stride = tuple(stride)
        end = offset + _extent(shape, stride) * self.kind.itemsize
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
            offset = self.offset + start * self.stride[dim] * self.kind.itemsize
            return self.file.tensor(offset, self.dtype, shape, self.stride)
        if self.checksum is not None and (
            index is None or isinstance(index, slice) or bool((index == 0).any())
        ):
            self.checksum.compare()
        whole = self.file.tensor(self.offset, self.dtype, self.shape, self.stride)
        return whole if index is None else take(whole, dim, index)


class InMemory(LazyTensor):
    """An ordinary tensor behind the same interface."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.kind = described(tensor.dtype)

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
        self.kind = widest(part.kind for part in parts)
        self.parts = [
            part if part.kind == self.kind else Mapped(part, self._promoted, self.kind)
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
        import torch

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
        assert len({(part.shape, part.kind) for part in parts}) == 1, "unequal parts"
        self.parts = list(parts)
        self.shape, self.kind = parts[0].shape, parts[0].kind

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        import torch

        wide = torch.promote_types(self.dtype, torch.float32)
        parts = [part.read(dim, index).to(wide) for part in self.parts]
        return torch.stack(parts).sum(dim=0).to(self.dtype)


class Stacked(LazyTensor):
    """Tensors of one shape on a new first dim, such as the experts of a layer."""

    def __init__(self, parts: Sequence[LazyTensor]) -> None:
        assert parts, "nothing to stack"
        assert len({(part.shape, part.kind) for part in parts}) == 1, "unequal parts"
        self.parts = list(parts)
        self.kind = parts[0].kind
        self.shape = (len(parts), *parts[0].shape)

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        import torch

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
        self.kind = source.kind
        self.shape = source.shape[1:]

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        return take(self.source.read(0, slice(self.number, self.number + 1))[0], dim, index)


class RowOrder:
    """Numbers of `count` rows, made when a value is first read: what `make` returns for `args`."""

    def __init__(self, count: int, make: Callable[..., Tensor], *args: Any) -> None:
        self.count = count
        self._make = functools.partial(make, *args)

    @functools.cached_property
    def rows(self) -> Tensor:
        """The numbers, a 1-D int64 tensor."""
        return self._make()


def rows_between(start: int, stop: int) -> RowOrder:
    """Return the rows from `start` to before `stop`."""
    return RowOrder(stop - start, _arange, start, stop)


def _arange(start: int, stop: int) -> Tensor:
    import torch

    return torch.arange(start, stop)


class Selected(LazyTensor):
    """The entries `order` of a tensor along dim 0, in that order: permuted or fewer rows."""

    def __init__(self, source: LazyTensor, order: RowOrder | Tensor) -> None:
        self.source = source
        self._order = order
        self.kind = source.kind
        count = order.count if isinstance(order, RowOrder) else order.numel()
        self.shape = (count, *source.shape[1:])

    @property
    def order(self) -> Tensor:
        """The number in the source of each entry."""
        return self._order.rows if isinstance(self._order, RowOrder) else self._order

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
        self.kind = source.kind
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
        dtype: torch.dtype | Dtype | None = None,
    ) -> None:
        self.source = source
        self.function = function
        self.kind = source.kind if dtype is None else described(dtype)
        self.shape = source.shape

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        return self.function(self.source.read(dim, index))


def cast_to(tensor: LazyTensor, dtype: torch.dtype | Dtype) -> LazyTensor:
    """Return a tensor that is rounded to a dtype as it is read."""
    kind = described(dtype)
    if tensor.kind == kind:
        return tensor
    return Mapped(tensor, lambda values: values.to(kind.torch_dtype), kind)


class ScaledRows(LazyTensor):
    """A tensor whose entries along dim 0 are each multiplied by a factor, in float32.

    `factors` makes the factors, a 1-D tensor, when a value is read.
    """

    def __init__(self, source: LazyTensor, factors: Callable[[], Tensor]) -> None:
        self.source = source
        self.factors = factors
        self.kind = source.kind
        self.shape = source.shape

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        factors = self.factors()
        assert factors.shape == self.shape[:1], (factors.shape, self.shape)
        factors = take(factors, 0, index) if dim == 0 else factors
        values = self.source.read(dim, index)
        factors = factors.view(-1, *(1 for _ in self.shape[1:]))
        return (values.float() * factors).to(self.dtype)


class Computed(LazyTensor):
    """A tensor that a function makes when it is read."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype | Dtype, function: Callable[[], Tensor]
    ) -> None:
        self.shape, self.kind, self.function = shape, described(dtype), function

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        return take(self.function(), dim, index)


def zeros(shape: tuple[int, ...], dtype: torch.dtype | Dtype) -> LazyTensor:
    """Return a tensor of zeros: a bias that one side of a conversion has and the other lacks."""
    return Computed(shape, dtype, functools.partial(_zeros, shape, described(dtype)))


def _zeros(shape: tuple[int, ...], kind: Dtype) -> Tensor:
    import torch

    return torch.zeros(shape, dtype=kind.torch_dtype)


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
