"""The dtypes of weights and of arithmetic: their names, what `auto` means, and a cast that is safe.

What a file says of a dtype is a `Dtype`: its name and its size. torch is imported when values are
first needed, so that `--help` and `inspect` need none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPE_NAMES = ("float32", "bfloat16", "float16")
"""What `--dtype` accepts besides `auto`."""

DTYPE_CHOICES = f"{', '.join(DTYPE_NAMES[:-1])} or {DTYPE_NAMES[-1]}"
"""The same names, as a sentence lists them."""

WEIGHT_DTYPES = (*DTYPE_NAMES, "float64")
"""Dtypes of stored weights that we read."""


@dataclass(frozen=True)
class Dtype:
    """One of torch's dtypes, known without torch."""

    name: str
    itemsize: int

    @property
    def is_floating_point(self) -> bool:
        """Whether it is one of floats, those of 8 bits and fewer included."""
        return self.name.startswith(("float", "bfloat"))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself; torch is imported for it."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype

    def __repr__(self) -> str:
        return f"torch.{self.name}"


_SIZES = {
    1: """bool uint8 int8 qint8 quint8 quint4x2 quint2x4 bits8 bits1x8 bits2x4 bits4x2
    float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2""",
    2: "float16 bfloat16 int16 uint16 bits16",
    4: "float32 int32 uint32 qint32 complex32",
    8: "float64 int64 uint64 complex64",
    16: "complex128",
}

STORED_DTYPES = {
    name: Dtype(name, size) for size, names in _SIZES.items() for name in names.split()
}
"""The dtypes that files may name, but for integers of less than 8 bits."""


def described(dtype: torch.dtype | Dtype) -> Dtype:
    """Return what is known of a dtype without torch."""
    return dtype if isinstance(dtype, Dtype) else STORED_DTYPES[dtype_name(dtype)]


def widest(dtypes: Iterable[Dtype]) -> Dtype:
    """Return the dtype that holds the values of all, as torch promotes them."""
    return functools.reduce(_wider, dtypes)


def _wider(one: Dtype, other: Dtype) -> Dtype:
    if one == other:
        return one
    import torch

    return described(torch.promote_types(one.torch_dtype, other.torch_dtype))


def dtype_name(dtype: torch.dtype | Dtype | str) -> str:
    """Return the name without `torch.` before it."""
    return str(dtype).removeprefix("torch.")


def resolve_dtype(
    dtype: torch.dtype | str, *, auto: str | None = None, option: str = "--dtype"
) -> torch.dtype:
    """Return torch's dtype; `auto`, where it is allowed, is the dtype of that name.

    Raises:
        InputError: The name is unknown; the message names the option.
    """
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    name = auto if dtype == "auto" and auto is not None else dtype
    if name not in DTYPE_NAMES:
        known = DTYPE_NAMES if auto is None else ("auto", *DTYPE_NAMES)
        raise InputError(f"{option} {dtype!r} is unknown; use {', '.join(known)}")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def evaluation_dtype(dtype: torch.dtype | str, params_dtype: str, device: str) -> torch.dtype:
    """Return the compute dtype of a run: `auto` is the checkpoint's on CUDA, float32 on the CPU.

    Args:
        dtype: A dtype, its name, or `auto`.
        params_dtype: The checkpoint's.
        device: `cuda` or `cpu`.
    """
    stored = params_dtype if params_dtype in DTYPE_NAMES else "float32"
    return resolve_dtype(dtype, auto=stored if device == "cuda" else "float32")


def training_dtype(dtype: str, device: str) -> str:
    """Return the name of a training run's dtype: `auto` is bfloat16 on CUDA, float32 on the CPU."""
    return dtype_name(resolve_dtype(dtype, auto="bfloat16" if device == "cuda" else "float32"))


def cast(values: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    """Return the values in another dtype; None: in their own.

    Raises:
        InputError: Finite values of `name` are beyond the range of `dtype`.
    """
    import torch

    if dtype is None or values.dtype == dtype:
        return values
    result = values.to(dtype)
    limit = torch.finfo(dtype).max
    if limit < torch.finfo(values.dtype).max and bool((result.isinf() & values.isfinite()).any()):
        largest = values[values.isfinite()].abs().max().item()
        raise InputError(
            f"{name} has values up to {largest:.3g}, beyond the {limit:.3g} of "
            f"{dtype_name(dtype)}; choose --dtype bfloat16 or float32"
        )
    return result
