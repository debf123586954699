"""FP8 in blocks: 8-bit floats, and a float for each block of a matrix (DeepSeek V3 as published).

A value is that of the matrix times that of its block, in `..._scale_inv`, in spite of that name.
Source: `weight_dequant` in DeepSeek-V3's inference/kernel.py; transformers'
integrations/finegrained_fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from mlm_eval.checkpoints.config import is_of_kind
from mlm_eval.checkpoints.dtypes import STORED_DTYPES
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Index, LazyTensor, take

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = "_scale_inv"
_KINDS = {
    "fmt": "e4m3",
    "scale_fmt": "float",
    "expert_dtype": "fp8",
    "activation_scheme": "dynamic",
}
"""Settings besides the size of blocks, with the value that each may have."""


class BlockScaledTensor(LazyTensor):
    """A matrix `[out, in]`, or one of each expert, of 8-bit floats and a scale for each block.

    It is read as float32: `scales` `[ceil(out / rows), ceil(in / columns)]` multiply the values of
    their blocks, of which the last ones may be partial.
    """

    kind = STORED_DTYPES["float32"]

    def __init__(self, values: LazyTensor, scales: LazyTensor, block: tuple[int, int]) -> None:
        self.values, self.scales, self.block = values, scales, block
        self.shape = values.shape

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        import torch

        leading = len(self.shape) - 2
        scales = self.scales.read(dim, index) if dim < leading else self.scales.read()
        scales = scales.float()
        for matrix_dim, step in enumerate(self.block):
            place = leading + matrix_dim
            blocks = torch.arange(self.shape[place]) // step  # the block of each row or column
            blocks = take(blocks, 0, index) if dim == place else blocks
            scales = scales.index_select(place, blocks)
        return self.values.read(dim, index).float() * scales


def is_fp8(settings: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a `quantization_config` is of this kind."""
    return isinstance(settings, Mapping) and settings.get("quant_method") == "fp8"


def with_fp8_unpacked(
    tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], where: str
) -> dict[str, LazyTensor]:
    """Return a model's tensors with pairs of 8-bit values and scales as the matrices they are.

    Args:
        tensors: By name.
        settings: `quantization_config` of config.json, whose method is fp8.
        where: That file, for messages.

    Raises:
        InputError: The values are quantised in another way, or a pair is not whole.
    """
    block = settings.get("weight_block_size")
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(is_of_kind(size, "int") and size > 0 for size in block)
    ):
        raise InputError(
            f"{where}: weight_block_size (in quantization_config) is {block!r}, expected two sizes "
            "such as [128, 128]; mlm-eval dequantises fp8 in blocks only"
        )
    for key, known in _KINDS.items():
        if settings.get(key, known) != known:
            raise InputError(
                f"{where}: {key} (in quantization_config) is {settings[key]!r}; mlm-eval "
                f"dequantises fp8 weights with {known!r} only"
            )
    found = dict(tensors)
    for name, scales in tensors.items():
        if not name.endswith(_SCALES):
            continue
        stem = name.removesuffix(_SCALES)
        values = found.get(stem)
        if values is None:
            raise InputError(
                f"{where}: the files hold {name} but not {stem}; copy all files of the model"
            )
        steps = (1,) * (len(values.shape) - 2) + (block[0], block[1])
        grid = tuple(-(-size // step) for size, step in zip(values.shape, steps, strict=False))
        if len(values.shape) not in (2, 3) or scales.shape != grid:
            raise InputError(
                f"{where}: {name} has shape {list(scales.shape)} for {stem} of "
                f"{list(values.shape)} in blocks of {list(block)}; files of two models may be mixed"
            )
        if values.kind.name != "float8_e4m3fn" or not scales.kind.is_floating_point:
            raise InputError(
                f"{where}: {stem} is stored as {values.kind} with scales as {scales.kind}; "
                "mlm-eval dequantises float8_e4m3fn with scales of float32"
            )
        del found[name]
        found[stem] = BlockScaledTensor(values, scales, (block[0], block[1]))
    return found
