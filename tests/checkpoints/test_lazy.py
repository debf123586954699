"""Every lazy view reads what the eager tensor would give, for any slice and any index."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
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
        self.generator = torch.Generator().manual_seed(5)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator).mul(50).to(dtype)

    def stored(self, tensor: Tensor, *, gap: int = 0) -> StoredTensor:
        """Write the storage of `tensor` to a file; `gap` bytes before it spoil its alignment."""
        path = self.folder / f"{len(list(self.folder.iterdir()))}.bin"
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        path.write_bytes(b"." * (16 + gap) + whole.numpy().tobytes())
        offset = 16 + gap + tensor.storage_offset() * tensor.element_size()
        return StoredTensor(MappedFile(path), offset, tensor.dtype, tensor.shape, tensor.stride())


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def stored(s: Source) -> Pair:
    x = s.random(9, 7)
    return s.stored(x), x


def stored_transposed(s: Source) -> Pair:
    x = s.random(7, 9).t()
    return s.stored(x), x


def stored_strided(s: Source) -> Pair:
    x = s.random(20, 30)[3:18:2, 1::4]
    return s.stored(x), x


def stored_unaligned(s: Source) -> Pair:
    x = s.random(20, 30)[3:18:2, 1::4]
    return s.stored(x, gap=3), x


def stored_half_unaligned(s: Source) -> Pair:
    x = s.random(9, 7, dtype=torch.bfloat16)
    return s.stored(x, gap=1), x


def stored_expanded(s: Source) -> Pair:
    x = s.random(1, 7).expand(9, 7)
    return s.stored(x), x


def stored_vector(s: Source) -> Pair:
    x = s.random(23, dtype=torch.float16)
    return s.stored(x), x


def stored_cube(s: Source) -> Pair:
    x = s.random(4, 6, 5).permute(2, 0, 1)
    return s.stored(x), x


def in_memory(s: Source) -> Pair:
    x = s.random(9, 7)
    return InMemory(x), x


def rows(s: Source) -> Pair:
    parts = [s.random(n, 7) for n in (4, 1, 6)]
    views = [s.stored(parts[0]), InMemory(parts[1]), s.stored(parts[2], gap=1)]
    return Concat(views, 0), torch.cat(parts)


def columns(s: Source) -> Pair:
    parts = [s.random(9, n) for n in (4, 1, 6)]
    return Concat([s.stored(part) for part in parts], 1), torch.cat(parts, dim=1)


def empty_part(s: Source) -> Pair:
    parts = [s.random(n, 7) for n in (3, 0, 5)]
    return Concat([InMemory(part) for part in parts], 0), torch.cat(parts)


def concat_of_concats(s: Source) -> Pair:
    upper, lower = columns(s), columns(s)
    return Concat([upper[0], lower[0]], 0), torch.cat([upper[1], lower[1]])


def permuted(s: Source) -> Pair:
    x = s.random(12, 7)
    order = torch.randperm(12, generator=s.generator)
    return Selected(s.stored(x), order), x[order]


def narrowed(s: Source) -> Pair:
    x = s.random(12, 7)
    return Selected(s.stored(x), torch.arange(3, 11)), x[3:11]


def repeated(s: Source) -> Pair:
    x = s.random(5, 7)
    order = torch.tensor([4, 0, 0, 3, 4, 4, 1])
    return Selected(InMemory(x), order), x[order]


def gated(s: Source) -> Pair:
    """Gate and up of two ranks, `[g0; u0]` and `[g1; u1]`, as `[g0; g1; u0; u1]`."""
    ranks = [s.random(6, 7), s.random(6, 7)]
    views = [s.stored(rank) for rank in ranks]
    halves = [(view, slice(0, 3)) for view in views] + [(view, slice(3, 6)) for view in views]
    parts: list[LazyTensor] = [
        Selected(view, torch.arange(half.start, half.stop)) for view, half in halves
    ]
    whole = torch.cat([rank[half] for half in (slice(0, 3), slice(3, 6)) for rank in ranks])
    return Concat(parts, 0), whole


def transposed(s: Source) -> Pair:
    x = s.random(7, 9)
    return Transposed(s.stored(x)), x.t()


def transposed_rows(s: Source) -> Pair:
    view, x = rows(s)
    return Transposed(view), x.t()


def selected_of_transposed(s: Source) -> Pair:
    view, x = transposed_rows(s)
    order = torch.tensor([6, 2, 2, 0])
    return Selected(view, order), x[order]


def shifted(s: Source) -> Pair:
    view, x = permuted(s)
    return Mapped(view, lambda values: values + 1), x + 1


def computed(s: Source) -> Pair:
    x = s.random(9, 7)
    return Computed(x.shape, x.dtype, lambda: x * 2), x * 2


VIEWS: list[Callable[[Source], Pair]] = [
    stored,
    stored_transposed,
    stored_strided,
    stored_unaligned,
    stored_half_unaligned,
    stored_expanded,
    stored_vector,
    stored_cube,
    in_memory,
    rows,
    columns,
    empty_part,
    concat_of_concats,
    permuted,
    narrowed,
    repeated,
    gated,
    transposed,
    transposed_rows,
    selected_of_transposed,
    shifted,
    computed,
]


def indices(size: int, rng: random.Random) -> list[Index]:
    """Return slices and index tensors of a dim: ordinary ones, and those at the edges."""
    found: list[Index] = [None, slice(None), slice(0, 0), slice(size, None), slice(1, None)]
    found += [slice(None, -1), slice(-3, None), slice(2, size + 50), slice(5, 2), slice(0, size, 1)]
    for _ in range(12):
        start = rng.randrange(size + 1)
        found.append(slice(start, rng.randrange(start, size + 1)))
    found += [torch.arange(size), torch.arange(size).flip(0), torch.empty(0, dtype=torch.int64)]
    for count in (1, 3, size, 2 * size):
        found.append(torch.tensor([rng.randrange(size) for _ in range(count)]))
    return found


@pytest.mark.parametrize("make", VIEWS, ids=lambda make: make.__name__)
def test_reads_what_the_eager_tensor_gives(make: Callable[[Source], Pair], source: Source):
    view, eager = make(source)
    assert view.shape == eager.shape
    assert view.dtype == eager.dtype
    assert view.numel == eager.numel()
    assert view.nbytes == eager.numel() * eager.element_size()
    assert torch.equal(view.read(), eager)
    rng = random.Random(make.__name__)
    before = eager.clone()
    for dim in range(eager.ndim):
        for index in indices(eager.shape[dim], rng):
            if index is None:
                expected = eager
            elif isinstance(index, slice):
                places = range(*index.indices(eager.shape[dim]))
                expected = eager.index_select(dim, torch.tensor(list(places), dtype=torch.int64))
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
