"""Bytes of files tell the same as values do, or nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import (
    Concat,
    InMemory,
    LazyTensor,
    MappedFile,
    Selected,
    StoredTensor,
    Transposed,
)
from mlm_eval.checkpoints.soundness.stored_bits import bits, same_values, sample

DTYPES = [torch.float32, torch.bfloat16]


def stored(path: Path, values: Tensor, *, offset: int = 0) -> StoredTensor:
    """Return values as a tensor of a file."""
    path.write_bytes(b"\x01" * offset + bits(values.contiguous()))
    shape, stride = values.shape, values.contiguous().stride()
    return StoredTensor(MappedFile(path), offset, values.dtype, shape, stride)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1.0, 1.0, True),
        (1.0, 2.0, False),
        (0.0, 2.0, False),
        (math.nan, math.nan, True),  # by bits; as numbers NaN differs from itself
        (math.nan, 1.0, False),
        (0.0, -0.0, None),
    ],
)
def test_what_bytes_tell_of_two_tensors(
    one: float, other: float, same: bool | None, dtype: torch.dtype, tmp_path: Path
):
    values = torch.arange(300_000).remainder(50).to(dtype).view(2, -1)  # several blocks of a file
    first, second = values.clone(), values.clone()
    first[-1, -5], second[-1, -5] = one, other
    a = stored(tmp_path / "a", first, offset=3)
    b = stored(tmp_path / "b", second, offset=7)
    assert same_values(a, b) is same
    assert same_values(Transposed(a), Transposed(b)) is same
    joined = same_values(Concat([a, a], 0), Concat([a, b], 0))
    assert joined is (same or None)  # of several parts only that all are equal is told
    assert same_values(a, Transposed(b)) is None
    assert same_values(InMemory(first), InMemory(second)) is None
    assert same_values(a, a) is True


def test_columns_of_a_file_are_not_compared(tmp_path: Path):
    """What stands between them may differ."""
    file = stored(tmp_path / "a", torch.arange(12.0).view(3, 4)).file
    left = StoredTensor(file, 0, torch.float32, (3, 2), (4, 1))
    right = StoredTensor(file, 8, torch.float32, (3, 2), (4, 1))
    assert same_values(left, right) is None
    assert sample(left) == bits(left.read(0, slice(1, 2)))  # a row stands together all the same


@pytest.mark.parametrize("shape", [(5,), (1, 3), (4, 3), (3, 2, 5)])
def test_a_sample_is_a_row_of_the_middle(shape: tuple[int, ...], tmp_path: Path):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()
    lazy = stored(tmp_path / "a", values, offset=2)
    middle = shape[0] // 2
    row = bits(values[middle : middle + 1])
    assert sample(lazy) == row == sample(InMemory(values))
    turned = torch.arange(shape[0]).flip(0)
    assert sample(Selected(lazy, turned)) == row
    assert sample(Concat([lazy, lazy], 0)) == row + row


def test_views_of_other_values_have_other_samples(tmp_path: Path):
    values = torch.arange(24.0).view(4, 6)
    one, other = stored(tmp_path / "a", values), stored(tmp_path / "b", values + 1)
    order = torch.tensor([3, 1, 2, 0])
    some = torch.tensor([2, 1])

    def views(lazy: LazyTensor) -> list[LazyTensor]:
        return [Transposed(lazy), Selected(lazy, order), Selected(lazy, some), Concat([lazy], 1)]

    for a, b in zip(views(one), views(other), strict=True):
        assert sample(a) == sample(a) != sample(b)


def test_a_file_that_became_shorter(tmp_path: Path):
    lazy = stored(tmp_path / "a", torch.arange(8.0))
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(InputError, match="was replaced or changed since it was opened"):
        sample(lazy)
