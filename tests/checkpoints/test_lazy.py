"""Every lazy view reads what the eager tensor would give, for any slice and any index."""

from __future__ import annotations

import itertools
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.properties import thorough
from torch import Tensor

from mlm_eval.checkpoints import lazy
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import (
    Computed,
    Concat,
    Index,
    InMemory,
    LazyTensor,
    Mapped,
    MappedFile,
    Selected,
    StoredTensor,
    Transposed,
    as_index,
    span,
    take,
)

Pair = tuple[LazyTensor, Tensor]
"""A view, and the tensor that it stands for."""


class Source:
    """Makes tensors of random values, and files that hold them at any byte offset."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = itertools.count()
        self.generator = torch.Generator().manual_seed(5)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator).mul(50).to(dtype)

    def stored(self, tensor: Tensor, *, gap: int = 0) -> StoredTensor:
        """Write the storage of `tensor` to a file; `gap` bytes before it spoil its alignment."""
        path = self.folder / f"{next(self.files)}.bin"
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        path.write_bytes(b"." * (16 + gap) + whole.numpy().tobytes())
        offset = 16 + gap + tensor.storage_offset() * tensor.element_size()
        return StoredTensor(MappedFile(path), offset, tensor.dtype, tensor.shape, tensor.stride())


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@st.composite
def stored(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, source: Source) -> Pair:
    """A tensor in a file: strided, transposed or expanded, and at any byte."""
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    first = draw(st.integers(0, 2))
    sizes = [first + size * step for size, step in zip(shape, steps, strict=True)]
    x = source.random(*(sizes[dim] for dim in order), dtype=dtype)
    x = x.permute(*(order.index(dim) for dim in range(len(shape))))
    for dim, (size, step) in enumerate(zip(shape, steps, strict=True)):
        x = x.narrow(dim, first, size * step)[(slice(None),) * dim + (slice(None, None, step),)]
    if draw(st.booleans()) and shape[0]:
        x = x[:1].expand(shape)
    x = x if x.numel() else torch.empty(shape, dtype=dtype)  # without an offset of its own
    assert x.shape == shape
    return source.stored(x, gap=draw(st.sampled_from([0, 0, 1, 3]))), x


def in_memory(shape: tuple[int, ...], dtype: torch.dtype, source: Source) -> st.SearchStrategy:
    def made() -> Pair:
        x = source.random(*shape, dtype=dtype)
        return InMemory(x), x

    return st.builds(made)


@st.composite
def concatenated(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, source: Source, depth: int
) -> Pair:
    """Two to four parts along any dim, some of them empty."""
    dim = draw(st.integers(0, len(shape) - 1))
    cuts = draw(st.lists(st.integers(0, shape[dim]), min_size=1, max_size=3))
    edges = [0, *sorted(cuts), shape[dim]]
    sizes = [stop - start for start, stop in itertools.pairwise(edges)]
    parts = [
        draw(views((*shape[:dim], size, *shape[dim + 1 :]), dtype, source, depth)) for size in sizes
    ]
    return Concat([view for view, _ in parts], dim), torch.cat([x for _, x in parts], dim)


@st.composite
def selected(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, source: Source, depth: int
) -> Pair:
    """A run of rows, a permutation, or rows in any order, again and again."""
    rows = draw(st.integers(max(shape[0], 1), shape[0] + 3))
    start = draw(st.integers(0, rows - shape[0]))
    kinds = st.just(list(range(start, start + shape[0])))
    kinds |= st.permutations(range(rows)).map(lambda order: order[: shape[0]])
    kinds |= st.lists(st.integers(0, rows - 1), min_size=shape[0], max_size=shape[0])
    order = torch.tensor(draw(kinds), dtype=torch.int64)
    view, x = draw(views((rows, *shape[1:]), dtype, source, depth))
    return Selected(view, order), x[order]


@st.composite
def views(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, source: Source, depth: int
) -> Pair:
    """A view of that shape over views over tensors in files and in memory."""
    leaf = stored(shape, dtype, source) | in_memory(shape, dtype, source)
    if not depth:
        return draw(leaf)
    deeper = (dtype, source, depth - 1)
    kinds: list[Any] = [leaf, concatenated(shape, *deeper), selected(shape, *deeper)]
    below = views(shape, *deeper)
    kinds.append(
        below.map(lambda pair: (Mapped(pair[0], lambda x: x + 1), pair[1] + 1))
        | below.map(lambda pair: (Computed(shape, dtype, pair[0].read), pair[1]))
    )
    if len(shape) == 2:
        flipped = views((shape[1], shape[0]), *deeper)
        kinds.append(flipped.map(lambda pair: (Transposed(pair[0]), pair[1].t())))
    return draw(st.one_of(kinds))


@st.composite
def indices(draw: st.DrawFn, size: int) -> Index:
    """All, a slice (from the end, beyond it, empty), or rows in any order."""
    ends = st.none() | st.integers(-size - 1, size + 50)
    found: list[Any] = [st.none(), st.builds(slice, ends, ends)]
    places = st.lists(st.integers(0, size - 1), max_size=2 * size) if size else st.just([])
    runs = st.integers(0, size).map(lambda start: list(range(start, size)))
    found.append((places | runs).map(lambda order: torch.tensor(order, dtype=torch.int64)))
    return draw(st.one_of(found))


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("tensors"))


@pytest.mark.long
@thorough(200)
@given(data=st.data())
def test_reads_what_the_eager_tensor_gives(shared_source: Source, data: st.DataObject):
    ndim = data.draw(st.sampled_from([2, 2, 1, 3]))
    shape = tuple(data.draw(st.lists(st.integers(0, 7), min_size=ndim, max_size=ndim)))
    dtype = data.draw(st.sampled_from(DTYPES))
    view, eager = data.draw(views(shape, dtype, shared_source, data.draw(st.integers(0, 3))))
    assert view.shape == eager.shape == shape
    assert view.dtype == eager.dtype
    assert view.numel == eager.numel()
    assert view.nbytes == eager.numel() * eager.element_size()
    assert torch.equal(view.read(), eager)
    before = eager.clone()
    for dim in range(eager.ndim):
        for index in data.draw(st.lists(indices(shape[dim]), min_size=1, max_size=6)):
            if index is None:
                expected = eager
            elif isinstance(index, slice):
                places = list(range(*index.indices(shape[dim])))
                expected = eager.index_select(dim, torch.tensor(places, dtype=torch.int64))
            else:
                expected = eager.index_select(dim, index)
            found = view.read(dim, index)
            assert found.shape == expected.shape, (dim, index)
            assert torch.equal(found, expected), (dim, index)
            assert found.dtype == eager.dtype
    assert torch.equal(eager, before)


def test_scalars(source: Source):
    x = torch.tensor(2.5)
    for view in (source.stored(x), source.stored(x, gap=1), InMemory(x)):
        assert view.shape == ()
        assert view.numel == 1
        assert torch.equal(view.read(), x)


def test_slices_are_views_of_the_file(source: Source):
    a = source.stored(source.random(40, 8))
    both = Concat([a, a], 0)
    whole = a.read()
    for part in (a.read(0, slice(5, 9)), both.read(0, slice(5, 9)), a.read(1, slice(2, 4))):
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert both.read(0, slice(38, 42)).shape == (4, 8)  # of two parts: a copy


def test_one_rank_reads_only_its_part(tmp_path: Path):
    """A file larger than the memory: the slices of one rank touch a few pages of it."""
    path = tmp_path / "sparse.bin"
    rows, width = 1 << 22, 1 << 12  # 64 GiB of float32, none of it on the disk
    with path.open("wb") as stream:
        stream.truncate(rows * width * 4)
        stream.seek(100 * width * 4)
        stream.write(torch.arange(4.0).numpy().tobytes())
    x = StoredTensor(MappedFile(path), 0, torch.float32, (rows, width), (width, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part = x.read(0, slice(99, 102))
    assert part[1, :5].tolist() == [0, 1, 2, 3, 0]
    assert part.sum() == 6
    assert x.read(0, torch.tensor([rows - 1, 100])).sum() == 6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_file_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.bin"
    path.write_bytes(b"x" * 16)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(lazy.mmap, "mmap", refuse)
    x = StoredTensor(MappedFile(path), 0, torch.float32, (4,), (1,))
    assert x.read().shape == (4,)  # by torch

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", fail)
    x = StoredTensor(MappedFile(path), 0, torch.float32, (4,), (1,))
    with pytest.raises(InputError, match=f"{path} cannot be mapped.*Cannot allocate memory.*copy"):
        x.read()


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (5,), (1,)),
        (4, (4,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (-4, (1,), (1,)),
        (0, (2,), (-1,)),
        (1 << 40, (1,), (1,)),
    ],
)
def test_a_tensor_beyond_the_end_of_its_file(
    offset: int, shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
):
    path = tmp_path / "x.bin"
    path.write_bytes(b"x" * 16)
    StoredTensor(MappedFile(path), 0, torch.float32, (4,), (1,)).read()
    with pytest.raises(InputError, match=f"{path} is cut off or damaged.*copy the file again"):
        StoredTensor(MappedFile(path), offset, torch.float32, shape, stride)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    "dtypes", list(itertools.permutations([torch.float32, torch.bfloat16, torch.float16]))
)
def test_parts_of_several_dtypes_are_one_of_the_widest(dtypes: tuple[torch.dtype, ...], dim: int):
    parts = [torch.randn(4, 4).to(dtype) for dtype in dtypes]
    whole = Concat([InMemory(part) for part in parts], dim)
    expected = torch.cat([part.float() for part in parts], dim)
    assert whole.dtype == torch.float32
    scattered = torch.tensor([7, 0, 11, 4])
    for index in (None, slice(2, 9), slice(1, 3), scattered):
        values = whole.read(dim, index)
        chosen = expected if index is None else take(expected, dim, index)
        assert values.dtype == torch.float32 and torch.equal(values, chosen)


def test_concat_refuses_ragged_parts():
    with pytest.raises(AssertionError, match="ragged"):
        Concat([InMemory(torch.zeros(2, 3)), InMemory(torch.zeros(2, 4))], 0)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ([], slice(0, 0)),
        ([3], slice(3, 4)),
        ([3, 4, 5], slice(3, 6)),
        ([0, 1], slice(0, 2)),
        ([5, 4, 3], None),
        ([3, 5], None),
        ([3, 3], None),
        ([3, 5, 4, 6], None),  # first and last fit a run, what is between does not
        ([3, 3, 5], None),
    ],
)
def test_as_index_finds_ascending_runs(order: list[int], expected: slice | None):
    index = as_index(torch.tensor(order, dtype=torch.int64))
    if expected is None:
        assert isinstance(index, Tensor)
        assert index.tolist() == order
    else:
        assert index == expected
    x = torch.arange(10)
    assert take(x, 0, index).tolist() == order


def test_span_is_pythons():
    assert span(slice(None), 5) == (0, 5)
    assert span(slice(-2, None), 5) == (3, 5)
    assert span(slice(3, 99), 5) == (3, 5)
    assert span(slice(4, 2), 5) == (4, 4)
    with pytest.raises(AssertionError):
        span(slice(0, 4, 2), 5)


def test_views_show_shape_and_dtype():
    assert repr(InMemory(torch.zeros(2, 3))) == "InMemory(shape=[2, 3], dtype=torch.float32)"
