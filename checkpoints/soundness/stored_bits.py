"""Tensors told apart by the bytes of their files, without torch, which takes a second to import.

A checkpoint that is opened is looked at this way: most of what ranks should hold alike is alike bit
by bit, and what they should not differs in the first row. Only what is left asks torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlm_eval.checkpoints.dtypes import Dtype
from mlm_eval.checkpoints.lazy import (
    Concat,
    LazyTensor,
    Selected,
    StoredTensor,
    Transposed,
    row_major,
)

if TYPE_CHECKING:
    from torch import Tensor


def sample(tensor: LazyTensor) -> bytes:
    """Return bits out of the middle of a tensor: a row, or of a view what its source has there.

    Not of the first rows, with which a whole record would be summed. By bits NaN equals itself.
    """
    if isinstance(tensor, StoredTensor) and tensor.stride[1:] == row_major(tensor.shape[1:]):
        rows = max(tensor.shape[0], 1)
        row = tensor.stride[0] * tensor.kind.itemsize
        return b"".join(tensor.file.blocks(tensor.offset + rows // 2 * row, tensor.nbytes // rows))
    if isinstance(tensor, Concat):
        return b"".join(map(sample, tensor.parts))
    if isinstance(tensor, Transposed):
        return sample(tensor.source)
    if isinstance(tensor, Selected) and tensor.shape == tensor.source.shape:
        return sample(tensor.source)
    middle = tensor.shape[0] // 2
    return bits(tensor.read(0, slice(middle, middle + 1)))


def same_values(one: LazyTensor, other: LazyTensor) -> bool | None:
    """Return whether two tensors are equal; None where the bytes of files do not tell."""
    if one is other:
        return True
    if one.shape != other.shape or one.kind != other.kind:
        return None
    if isinstance(one, Transposed) and isinstance(other, Transposed):
        return same_values(one.source, other.source)
    if isinstance(one, Concat) and isinstance(other, Concat) and one.dim == other.dim:
        found = {same_values(a, b) for a, b in zip(one.parts, other.parts, strict=False)}
        return found == {True} or None
    if not isinstance(one, StoredTensor) or not isinstance(other, StoredTensor):
        return None
    if not one.stride == other.stride == row_major(one.shape):
        return None
    pairs = zip(
        one.file.blocks(one.offset, one.nbytes),
        other.file.blocks(other.offset, other.nbytes),
        strict=True,
    )
    odd = next(((a, b) for a, b in pairs if a != b), None)
    return odd is None or _first_difference(*odd, one.kind)


def _first_difference(one: bytes, other: bytes, kind: Dtype) -> bool | None:
    """Return False where the first values that differ in bits differ as numbers too, else None."""
    size = kind.itemsize
    at = next(at for at in range(0, len(one), size) if one[at : at + size] != other[at : at + size])
    zero = all(
        not any(block[at : at + size - 1]) and block[at + size - 1] in (0, 0x80)
        for block in (one, other)
    )
    return None if zero else False


def bits(values: Tensor) -> bytes:
    """Return the bits of values, rows first."""
    import torch

    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
