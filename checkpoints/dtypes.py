"""The dtypes of weights and of arithmetic: their names, what `auto` means, and a cast that is safe.

torch is imported when it is first needed, because `--help` reads the names.
"""

from __future__ import annotations

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


def dtype_name(dtype: torch.dtype | str) -> str:
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
