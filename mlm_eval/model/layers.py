"""The small parts of a layer: norms, activations, the MLP; and what they need of the host."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.model.tensor_parallel import (
    SINGLE,
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    copy_to_region,
    reduce_from_region,
)


class Norm(nn.Module):
    """LayerNorm or RMSNorm, computed in float32 and rounded once; a centred gain holds (gain - 1).

    One that works inside a parallel region, on a rank's own heads, takes the region's `tp`: its
    weights, the same on all ranks, then get the sum of the ranks' gradients.
    """

    def __init__(
        self,
        config: ModelConfig,
        width: int,
        *,
        bias: bool,
        tp: TensorParallel = SINGLE,
        epsilon: float | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.rms = config.normalization == "RMSNorm"
        self.epsilon = config.layernorm_epsilon if epsilon is None else epsilon
        self.centred = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` normalised over its last dim, in the wider dtype of `x` and the weights."""
        gain = copy_to_region(self.weight, self.tp)
        bias = None if self.bias is None else copy_to_region(self.bias, self.tp)
        if not self.rms and not self.centred and x.dtype == gain.dtype:
            return F.layer_norm(x, gain.shape, gain, bias, self.epsilon)
        dtype = torch.promote_types(x.dtype, gain.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        x, gain = x.to(wide), gain.to(wide)
        gain = gain + 1 if self.centred else gain
        if self.rms:
            x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon) * gain
        else:
            bias = None if bias is None else bias.to(wide)
            x = F.layer_norm(x, gain.shape, gain, bias, self.epsilon)
        return x.to(dtype)


def norm(config: ModelConfig) -> Norm:
    """Return a norm over the hidden dim."""
    return Norm(config, config.hidden_size, bias=config.normalization == "LayerNorm")


POST_OPS = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
"""Activation -> oneDNN's name and algorithm of it."""


class Activation(nn.Module):
    """The activation of a model's MLPs; a gated one takes `[gate; up]` and halves the last dim.

    Source: megatron/core/transformer/mlp.py (core 0.16).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.activation
        self.gated = config.gated
        self.clamp = config.activation_func_clamp_value
        self.offset = config.glu_linear_offset
        self.post_op = POST_OPS.get(self.kind)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., width]`."""
        if not self.gated:
            return activate(x, self.kind)
        gate, up = x.chunk(2, dim=-1)
        if self.clamp is not None:
            gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        if self.offset:
            up = up + self.offset
        return activate(gate, self.kind) * up


def activate(x: Tensor, kind: str) -> Tensor:
    """Return an activation's values, a gated one's those of its gate."""
    if kind in ("gelu", "geglu"):
        return F.gelu(x)
    if kind in ("gelu_tanh", "geglu_tanh"):
        return F.gelu(x, approximate="tanh")
    if kind == "relu":
        return F.relu(x)
    if kind == "squared_relu":
        return F.relu(x).square()
    if kind == "quick_geglu":
        return x * torch.sigmoid(1.702 * x)
    assert kind == "swiglu", kind
    return F.silu(x)


class MLP(nn.Module):
    """The two-layer MLP, cut by columns then by rows."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.activation = Activation(config)
        local = config.ffn_hidden_size // tp.size
        bias = config.add_bias_linear
        rows = 2 * local if config.gated else local
        self.linear_fc1 = ColumnParallelLinear(config.hidden_size, rows, bias=bias, tp=tp)
        self.linear_fc2 = RowParallelLinear(local, config.hidden_size, bias=bias, tp=tp)
        if config.branch_layernorm:
            self.linear_fc2.post_layernorm = norm(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[batch, seq, hidden]`."""
        return self.linear_fc2(self.linear_fc1(x, self.activation))  # type: ignore[no-any-return]


class LinearBranch(nn.Module):
    """One square matrix in the place of attention or MLP; each rank computes some outputs."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        rows = config.hidden_size // tp.size
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(rows)) if config.add_bias_linear else None

    def forward(self, x: Tensor) -> Tensor:
        """Return `[batch, seq, hidden]`; one all-reduce, of zeros but on one rank."""
        out = F.linear(copy_to_region(x, self.tp), self.weight, self.bias)
        before = self.tp.rank * out.shape[-1]
        padded = F.pad(out, (before, x.shape[-1] - before - out.shape[-1]))
        return reduce_from_region(padded, self.tp)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on `device`; to a GPU through pinned memory, without waiting.

    What a forward pass needs of the host (ids, numbers of heads) goes through here: a copy of
    pageable memory, as `torch.tensor(..., device=device)` makes one, waits until the device has
    done all before, and leaves it idle.
    """
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
