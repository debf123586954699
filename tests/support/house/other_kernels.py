"""A pytest plugin that lets every matrix product round as on another machine: a test of the tests.

    python -m pytest -p support.house.other_kernels tests/model

Kernels for AVX2, AVX-512 and AMX, and those for other numbers of threads, add the same products
in other orders; which of them a product takes depends on its shape. One machine cannot run them
all. So each product here is changed by up to two units in the last place of its largest element,
by noise that depends on the shapes alone: the same call gives the same bits again, and a call of
another shape (another batch, chunk or layout) rounds in another way. The ranks of support.ranks do
so as well; commands that tests start as processes of their own do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VARIABLE = "MLM_EVAL_OTHER_KERNELS"  # a number that chooses the noise; inherited by the ranks
ULP = 2.0


def rounded_otherwise(function: Callable[..., Tensor], salt: int) -> Callable[..., Tensor]:
    """Return the function with results that are off by rounding, where they were rounded at all."""

    def product(*operands: Any, **options: Any) -> Tensor:
        found = function(*operands, **options)
        if found.dtype != torch.float32 or found.device.type != "cpu" or not found.numel():
            return found  # narrower ones are sums of float32, rounded
        shapes = [tuple(x.shape) for x in operands if isinstance(x, Tensor)]
        noise = torch.Generator().manual_seed(hash((salt, *shapes)) % (1 << 31))
        with torch.no_grad():
            steps = torch.rand(found.shape, generator=noise) * 2 - 1
            largest = found.abs().amax(-1, keepdim=True)
            exact = function(*map(_double, operands), **{k: _double(options[k]) for k in options})
            # Sums of whole numbers are exact in whatever order.
            change = (exact != found) * steps * (ULP * torch.finfo(found.dtype).eps) * largest
        return found + change.nan_to_num(0.0, 0.0, 0.0)

    return product


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def install(salt: int) -> None:
    """Replace the two functions in which the models, ours and transformers', multiply."""
    F.linear = rounded_otherwise(F.linear, salt)
    F.scaled_dot_product_attention = rounded_otherwise(F.scaled_dot_product_attention, salt)


def install_as_asked() -> None:
    """Do so in a process of the tests whose parent does."""
    if VARIABLE in os.environ:
        install(int(os.environ[VARIABLE]))


def pytest_configure() -> None:
    """Let the products of this process, and of the ranks that it starts, round otherwise."""
    os.environ.setdefault(VARIABLE, "1")
    install(int(os.environ[VARIABLE]))
