"""MXFP4: 4 bits a value, and a power of two for each 32 of them (gpt-oss as published).

Source: the OCP Microscaling Formats specification 1.0; `convert_moe_packed_tensors` in
transformers' integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.dtypes import STORED_DTYPES
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Index, LazyTensor, take

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))
"""What the 16 codes stand for: a sign, two bits of exponent and one of mantissa."""
_BIAS = 127
"""Of a scale's exponent."""


class Mxfp4Tensor(LazyTensor):
    """Matrices of experts `[experts, in, out]`, bfloat16, stored as rows of outputs.

    `blocks` is uint8 `[experts, out, in / 32, 16]`, two codes to a byte, the low half first;
    `scales` uint8 `[experts, out, in / 32]`.
    """

    def __init__(self, blocks: LazyTensor, scales: LazyTensor) -> None:
        self.blocks, self.scales = blocks, scales
        experts, rows, groups, width = blocks.shape
        self.shape = (experts, groups * width * 2, rows)
        self.kind = STORED_DTYPES["bfloat16"]

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        if dim == 1:  # a slice of it may cut a group
            return take(self._unpacked(0, None), dim, index)
        return self._unpacked(min(dim, 1), index)

    def _unpacked(self, dim: int, index: Index) -> Tensor:
        """Return some experts, or some outputs of all."""
        import torch

        blocks = self.blocks.read(dim, index)
        exponents = self.scales.read(dim, index).to(torch.int32) - _BIAS
        codes = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).flatten(3)  # [E, out, groups, 32]
        values = torch.ldexp(torch.tensor(_VALUES)[codes.int()], exponents[..., None])
        return values.flatten(2).transpose(1, 2).to(self.dtype)


def with_mxfp4_unpacked(
    tensors: Mapping[str, LazyTensor], settings: Any, where: str
) -> dict[str, LazyTensor]:
    """Return a model's tensors with pairs of blocks and scales as the matrices that they hold.

    Args:
        tensors: By name.
        settings: `quantization_config` of config.json.
        where: That file, for messages.

    Raises:
        InputError: The weights are quantised in another way, or a pair is not whole.
    """
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method != "mxfp4":
        raise InputError(
            f"{where} describes a model with quantized weights (quantization_config has "
            f"quant_method {method!r}), which mlm-eval does not compute; it dequantises mxfp4"
        )
    found = dict(tensors)
    for name, blocks in tensors.items():
        if not name.endswith(_BLOCKS):
            continue
        stem = name.removesuffix(_BLOCKS)
        scales = found.get(f"{stem}{_SCALES}")
        fits = scales is not None and len(blocks.shape) == 4
        if scales is None or not fits or scales.shape != blocks.shape[:3] or blocks.shape[3] != 16:
            raise InputError(
                f"{where}: {name} {list(blocks.shape)} has no scales that fit "
                f"({stem}{_SCALES} {'missing' if scales is None else list(scales.shape)}); copy "
                "all files of the model"
            )
        if {blocks.kind.name, scales.kind.name} != {"uint8"}:
            raise InputError(f"{where}: {name} and its scales are not uint8; copy the files again")
        if stem in found:
            raise InputError(
                f"{where}: the files hold {stem} and {name}; files of two models may be mixed"
            )
        del found[name], found[f"{stem}{_SCALES}"]
        found[stem] = Mxfp4Tensor(blocks, scales)
    return found
