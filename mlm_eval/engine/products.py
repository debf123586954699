"""Float32 products on the CPU by oneDNN, where that changes no more than the last bits.

torch computes them with MKL, which leaves processors of AMD at half of their speed. It takes oneDNN
where it is allowed to round the factors to bfloat16; oneDNN makes use of that permission on
processors with AMX alone, and elsewhere computes in float32, as fast as the processor can.
Source: https://uxlfoundation.github.io/oneDNN/dev_guide_attributes_fpmath_mode.html
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

_ONEDNN: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_CUDA: Any = torch.backends.cuda.matmul

MOST_ERROR = 2.0**-18
"""Of a float32 product, relative to the product of absolute values; bfloat16's is 2^-9."""


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Take the faster library for products in float32, where it is as exact; also as a decorator.

    The setting is of the whole process, and put back at the end. It is torch's own, which holds for
    GPUs too: where torch sees one, nothing is set. What a caller has set stays.
    """
    if (
        torch.cuda.is_available()
        or _ONEDNN.fp32_precision != "none"
        or _CUDA.fp32_precision != "none"
        or not _onednn_is_exact()
    ):
        yield
        return
    with _allowed_to_round():
        yield


@contextlib.contextmanager
def _allowed_to_round() -> Iterator[None]:
    """Set `medium` for the process, as `torch.get_float32_matmul_precision` then says.

    With oneDNN's own setting alone that function raises an error, and with it what asks it.
    """
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        # Which has set both; "none" is what they were, and what another default may reach.
        _ONEDNN.fp32_precision = _CUDA.fp32_precision = "none"


@functools.cache
def _onednn_is_exact() -> bool:
    """Return whether oneDNN keeps float32 although it may round; measured once on some shapes."""
    if torch.cpu._is_amx_tile_supported():
        return False
    with _allowed_to_round():
        return all(product_error(*shape) < MOST_ERROR for shape in ((1, 512, 512), (4, 64, 128)))


def product_error(batch: int, rows: int, inner: int) -> float:
    """Return the largest error of torch's product of random matrices, as in `MOST_ERROR`."""
    noise = torch.Generator().manual_seed(0)
    first = torch.randn(batch, rows, inner, generator=noise)
    second = torch.randn(batch, inner, rows, generator=noise)
    error = (first @ second).double() - first.double() @ second.double()
    return (error.abs() / (first.double().abs() @ second.double().abs())).max().item()
