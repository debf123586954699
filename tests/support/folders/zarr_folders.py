"""zarr arrays written by the format's text, chunk by chunk, as Megatron's ranks left them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "bfloat16"}


def write_array(folder: Path, values: Tensor, chunk: Sequence[int], **about: Any) -> None:
    """Write an array: every chunk whole, what reaches over the edge filled with NaN."""
    folder.mkdir(parents=True)
    described = {
        "chunks": list(chunk),
        "compressor": None,
        "dtype": DTYPES[values.dtype],
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(values.shape),
        "zarr_format": 2,
    }
    (folder / ".zarray").write_text(json.dumps(described | about))
    counts = [-(-size // part) for size, part in zip(values.shape, chunk, strict=True)]
    for numbers in itertools.product(*map(range, counts)):
        whole = torch.full(tuple(chunk), torch.nan, dtype=values.dtype)
        box = values
        for dim, (number, part) in enumerate(zip(numbers, chunk, strict=True)):
            box = box.narrow(dim, number * part, min(part, values.shape[dim] - number * part))
        for dim, size in enumerate(box.shape):
            assert size <= whole.shape[dim]
        whole[tuple(slice(0, size) for size in box.shape)] = box
        raw = whole.contiguous().view(torch.uint8).numpy().tobytes()
        (folder / ".".join(map(str, numbers))).write_bytes(raw)
