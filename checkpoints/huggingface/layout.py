"""How tensors of a Hugging Face model hold a canonical parameter: each layout in both directions.

`pack` goes from Hugging Face to canonical, `unpack` back; both return views that read late, and one
undoes the other exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.lazy import (
    Concat,
    LazyTensor,
    RowOrder,
    Selected,
    Stacked,
    Transposed,
    Unstacked,
    rows_between,
)
from mlm_eval.checkpoints.parameters import group_order

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


class Layout:
    """One tensor on either side, unchanged; the other layouts derive from it."""

    def shapes(self, shape: Shape, config: ModelConfig) -> list[Shape]:
        """Return the shapes of the Hugging Face tensors that hold a parameter of `shape`."""
        return [shape]

    def pack(self, parts: list[LazyTensor], config: ModelConfig) -> LazyTensor:
        """Return the canonical parameter that Hugging Face tensors hold."""
        return parts[0]

    def unpack(self, tensor: LazyTensor, config: ModelConfig) -> list[LazyTensor]:
        """Return the Hugging Face tensors of a canonical parameter."""
        return [tensor]


class Conv1D(Layout):
    """GPT-2's linear layers keep weights `[in, out]`."""

    def shapes(self, shape: Shape, config: ModelConfig) -> list[Shape]:
        """See `Layout`."""
        return [shape[::-1]]

    def pack(self, parts: list[LazyTensor], config: ModelConfig) -> LazyTensor:
        """See `Layout`."""
        return _transpose(parts[0])

    def unpack(self, tensor: LazyTensor, config: ModelConfig) -> list[LazyTensor]:
        """See `Layout`."""
        return [_transpose(tensor)]


class Conv1DQKV(Conv1D):
    """GPT-2's c_attn: `[in, out]`, the outputs being all queries, all keys, all values."""

    def pack(self, parts: list[LazyTensor], config: ModelConfig) -> LazyTensor:
        """See `Layout`."""
        return Selected(_transpose(parts[0]), _group_order(config))

    def unpack(self, tensor: LazyTensor, config: ModelConfig) -> list[LazyTensor]:
        """See `Layout`."""
        return [_transpose(Selected(tensor, _group_order(config).rows.argsort()))]


class SplitQKV(Layout):
    """Queries, keys and values in three tensors."""

    def shapes(self, shape: Shape, config: ModelConfig) -> list[Shape]:
        """See `Layout`."""
        return [(rows, *shape[1:]) for rows in _qkv_rows(config)]

    def pack(self, parts: list[LazyTensor], config: ModelConfig) -> LazyTensor:
        """See `Layout`."""
        return Selected(Concat(parts, 0), _group_order(config))

    def unpack(self, tensor: LazyTensor, config: ModelConfig) -> list[LazyTensor]:
        """See `Layout`."""
        places = _group_order(config).rows.argsort().split(_qkv_rows(config))
        return [Selected(tensor, rows) for rows in places]


class SplitKV(Layout):
    """Keys and values of cross-attention in two tensors; ours have each head's key, then value."""

    def shapes(self, shape: Shape, config: ModelConfig) -> list[Shape]:
        """See `Layout`."""
        return [(shape[0] // 2, *shape[1:])] * 2

    def pack(self, parts: list[LazyTensor], config: ModelConfig) -> LazyTensor:
        """See `Layout`."""
        count, channels = 2 * parts[0].shape[0], config.kv_channels
        order = RowOrder(count, _exchanged, count, (2, -1, channels))  # [k|v, H, d]
        return Selected(Concat(parts, 0), order)

    def unpack(self, tensor: LazyTensor, config: ModelConfig) -> list[LazyTensor]:
        """See `Layout`."""
        order = _exchanged(tensor.shape[0], (-1, 2, config.kv_channels))  # [H, k|v, d]
        return [Selected(tensor, rows) for rows in order.chunk(2)]


class GateUp(Layout):
    """The gate and the up branch of a gated MLP in two tensors."""

    def shapes(self, shape: Shape, config: ModelConfig) -> list[Shape]:
        """See `Layout`."""
        return [(shape[0] // 2, *shape[1:])] * 2

    def pack(self, parts: list[LazyTensor], config: ModelConfig) -> LazyTensor:
        """See `Layout`."""
        return Concat(parts, 0)

    def unpack(self, tensor: LazyTensor, config: ModelConfig) -> list[LazyTensor]:
        """See `Layout`."""
        rows = tensor.shape[0]
        halves = (rows_between(0, rows // 2), rows_between(rows // 2, rows))
        return [Selected(tensor, half) for half in halves]


class ExpertsTransposed(Layout):
    """The matrices of all experts in one tensor `[experts, in, out]`."""

    def shapes(self, shape: Shape, config: ModelConfig) -> list[Shape]:
        """See `Layout`."""
        return [(shape[0], *shape[:0:-1])]

    def pack(self, parts: list[LazyTensor], config: ModelConfig) -> LazyTensor:
        """See `Layout`."""
        return self._each(parts[0], lambda part: part)

    def unpack(self, tensor: LazyTensor, config: ModelConfig) -> list[LazyTensor]:
        """See `Layout`."""
        return [self._each(tensor, lambda part: part)]

    def _each(
        self, tensor: LazyTensor, rows: Callable[[LazyTensor], LazyTensor], *, before: bool = False
    ) -> LazyTensor:
        """Return each expert's part transposed, its rows reordered `before` or after that."""
        parts = [Unstacked(tensor, number) for number in range(tensor.shape[0])]
        if before:
            return Stacked([_transpose(rows(part)) for part in parts])
        return Stacked([rows(_transpose(part)) for part in parts])


class ExpertsAlternating(ExpertsTransposed):
    """The same, or their biases `[experts, out]`; gate and up alternate along the outputs."""

    def pack(self, parts: list[LazyTensor], config: ModelConfig) -> LazyTensor:
        """See `Layout`."""
        count = 2 * config.moe_ffn_hidden_size
        order = RowOrder(count, _exchanged, count, (-1, 2))
        return self._each(parts[0], lambda part: Selected(part, order))

    def unpack(self, tensor: LazyTensor, config: ModelConfig) -> list[LazyTensor]:
        """See `Layout`."""
        order = _exchanged(2 * config.moe_ffn_hidden_size, (2, -1))
        return [self._each(tensor, lambda part: Selected(part, order), before=True)]


class OfExperts(Layout):
    """All experts of a layer, each in tensors of its own, in the layout of a single MLP."""

    def __init__(self, single: Layout) -> None:
        self.single = single

    def shapes(self, shape: Shape, config: ModelConfig) -> list[Shape]:
        """See `Layout`."""
        return self.single.shapes(shape[1:], config) * shape[0]

    def pack(self, parts: list[LazyTensor], config: ModelConfig) -> LazyTensor:
        """See `Layout`."""
        each = len(parts) // config.num_experts
        return Stacked(
            [
                self.single.pack(parts[first : first + each], config)
                for first in range(0, len(parts), each)
            ]
        )

    def unpack(self, tensor: LazyTensor, config: ModelConfig) -> list[LazyTensor]:
        """See `Layout`."""
        if isinstance(tensor, Stacked):
            experts = tensor.parts
        else:
            experts = [Unstacked(tensor, number) for number in range(tensor.shape[0])]
        return [part for expert in experts for part in self.single.unpack(expert, config)]


SAME, CONV1D, CONV1D_QKV = Layout(), Conv1D(), Conv1DQKV()
SPLIT_QKV, SPLIT_KV, GATE_UP = SplitQKV(), SplitKV(), GateUp()
EXPERTS_TRANSPOSED, EXPERTS_ALTERNATING = ExpertsTransposed(), ExpertsAlternating()
EXPERTS, EXPERTS_GATE_UP = OfExperts(SAME), OfExperts(GATE_UP)


def _transpose(tensor: LazyTensor) -> LazyTensor:
    if len(tensor.shape) == 1:  # a bias
        return tensor
    return tensor.source if isinstance(tensor, Transposed) else Transposed(tensor)


def _qkv_rows(config: ModelConfig) -> list[int]:
    groups = config.num_query_groups * config.kv_channels
    return [config.num_attention_heads * config.kv_channels, groups, groups]


def _group_order(config: ModelConfig) -> RowOrder:
    return group_order(config.num_attention_heads, config.num_query_groups, config.kv_channels)


def _exchanged(count: int, shape: tuple[int, ...]) -> Tensor:
    """Return the numbers of `count` rows that stand as `shape`, its first two dims exchanged."""
    import torch

    return torch.arange(count).view(shape).transpose(0, 1).reshape(-1)
