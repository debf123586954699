"""A mixture of experts: a router sends each token to a few MLPs, which run in one pass by expert.

Every tensor-parallel rank holds a part of the width of every expert, columns of the first matrix
and rows of the second, as of a dense MLP: the ranks' work is equal wherever the router sends the
tokens, and one all-reduce joins routed and shared experts. The router is replicated.
Source: megatron/core/transformer/moe (core 0.16); docs/megatron.md, "Mixtures of experts".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.model.layers import Activation
from mlm_eval.model.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    copy_to_region,
    linear,
    onednn_takes,
    reduce_from_region,
    without_autocast,
)


class Router(nn.Module):
    """Chooses the experts of each token, and how much each of them counts; computed in float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.topk = config.moe_router_topk
        self.score_function = config.moe_router_score_function
        self.pre_softmax = config.moe_router_pre_softmax
        self.num_groups = config.moe_router_num_groups
        self.group_topk = config.moe_router_group_topk
        self.group_experts = config.group_experts
        self.scaling_factor = config.moe_router_topk_scaling_factor or 1.0
        count = config.num_experts
        self.weight = nn.Parameter(torch.empty(count, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(count)) if config.moe_router_bias else None
        expert_bias = config.moe_router_enable_expert_bias
        # It decides the choice only, so no gradient reaches it.
        self.expert_bias = (
            nn.Parameter(torch.empty(count), requires_grad=False) if expert_bias else None
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights, float32, and the numbers of the chosen experts, `[tokens, topk]`."""
        bias = None if self.bias is None else self.bias.float()
        with without_autocast(x):
            logits = F.linear(x.float(), self.weight.float(), bias)  # [N, E]
        if self.score_function == "sigmoid":
            scores = logits.sigmoid()
            preference = scores if self.expert_bias is None else scores + self.expert_bias.float()
            chosen = self._choose(preference)
            weights = scores.gather(1, chosen)
            if self.topk > 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        elif self.pre_softmax:
            scores = logits.softmax(dim=-1)
            chosen = self._choose(scores)
            weights = scores.gather(1, chosen)
        else:
            chosen = self._choose(logits)
            weights = logits.gather(1, chosen).softmax(dim=-1)
        return weights * self.scaling_factor, chosen

    def _choose(self, preference: Tensor) -> Tensor:
        """Return the numbers of the preferred experts `[tokens, topk]`, within the best groups.

        A group counts by the sum of its best experts, `topk // group_topk` in Megatron.
        """
        if self.num_groups:
            groups = preference.unflatten(1, (self.num_groups, -1))  # [N, groups, E / groups]
            best = groups.topk(self.group_experts, dim=-1).values.sum(dim=-1)
            kept = torch.zeros_like(best, dtype=torch.bool)
            kept.scatter_(1, best.topk(self.group_topk, dim=-1).indices, True)
            preference = groups.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)
        return preference.topk(self.topk, dim=-1).indices


class ExpertLinear(nn.Module):
    """One matrix of each expert: `weight` `[experts, out, in]`, `bias` `[experts, out]`."""

    def __init__(self, experts: int, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(experts, outputs)) if bias else None

    def forward(
        self, x: Tensor, expert: int, *, bias: bool = True, activation: Activation | None = None
    ) -> Tensor:
        """Return one expert's outputs `[rows, out]`."""
        own = self.bias[expert] if bias and self.bias is not None else None
        return linear(x, self.weight[expert], own, activation)


class Experts(nn.Module):
    """All experts, of each of which this rank holds a part."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        h, local = config.hidden_size, config.moe_ffn_hidden_size // tp.size
        rows, bias = (2 * local if config.gated else local), config.add_bias_linear
        self.activation = Activation(config)
        self.linear_fc1 = ExpertLinear(config.num_experts, h, rows, bias=bias)
        self.linear_fc2 = ExpertLinear(config.num_experts, local, h, bias=bias)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Return this rank's share of the outputs `[rows, hidden]`, without the second biases.

        Args:
            x: Rows in the order of the experts, `[rows, hidden]`.
            counts: How many of them each expert has.
        """
        second = self.linear_fc2.weight
        out = x.new_empty(len(x), second.shape[1]) if onednn_takes(x, second) else None
        rows, rooms = x.split(counts), (x if out is None else out).split(counts)
        parts = []
        for expert, (part, room) in enumerate(zip(rows, rooms, strict=True)):
            if not len(part):
                continue
            # What goes through one expert goes through both of its matrices while it is cached.
            wide = self.linear_fc1(part, expert, activation=self.activation)
            if out is None:
                parts.append(self.linear_fc2(wide, expert, bias=False))
            else:
                torch.mm(wide, second[expert].t(), out=room)
        return torch.cat(parts) if out is None else out


class SharedExpert(nn.Module):
    """The expert of every token; with a gate its output is multiplied by the sigmoid of a logit."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        local = config.moe_shared_expert_intermediate_size // tp.size
        self.tp = tp
        self.activation = Activation(config)
        rows = 2 * local if config.gated else local
        h = config.hidden_size
        self.linear_fc1 = ColumnParallelLinear(h, rows, bias=False, tp=tp)
        self.linear_fc2 = RowParallelLinear(local, h, bias=False, tp=tp)
        gate = config.moe_shared_expert_gate
        self.gate_weight = nn.Parameter(torch.empty(1, config.hidden_size)) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's share of the output."""
        out = linear(self.linear_fc1(x, self.activation), self.linear_fc2.weight, None)
        if self.gate_weight is not None:
            out = out * copy_to_region(F.linear(x, self.gate_weight).sigmoid(), self.tp)
        return out


class MixtureOfExperts(nn.Module):
    """Router, routed experts and shared expert: what stands in the place of an MLP."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weigh_input = config.moe_apply_probs_on_input
        self.router = Router(config)
        self.experts = Experts(config, tp)
        shared = bool(config.moe_shared_expert_intermediate_size)
        self.shared_experts = SharedExpert(config, tp) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., hidden]`; one all-reduce forward."""
        tokens = x.flatten(0, -2)  # [N, h]
        weights, chosen = self.router(tokens)
        out = self._routed(tokens, copy_to_region(weights, self.tp), chosen)
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens)
        out = reduce_from_region(out, self.tp)
        if self.experts.linear_fc2.bias is not None:
            out = out + self._second_bias(weights, chosen, out.dtype)
        return out.view_as(x)

    def _routed(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs on this rank, `[tokens, hidden]`.

        Each token stands once for each of its experts, all of an expert's tokens side by side; the
        outputs go back to the tokens' order before they are summed, so that the sum does not depend
        on which other tokens there are. The host waits for the device once: it has to know the
        sizes of the experts' parts.
        """
        flat = chosen.flatten()
        order = flat.argsort(stable=True)  # [N * k], by expert
        counts = flat.bincount(minlength=self.router.weight.shape[0]).tolist()
        rows = copy_to_region(tokens, self.tp)[order // chosen.shape[1]]
        if self.weigh_input:
            rows = rows * weights.flatten()[order, None].to(rows.dtype)
        out = self.experts(rows, counts)[order.argsort()].unflatten(0, chosen.shape)  # [N, k, h]
        if self.weigh_input:
            return out.sum(dim=1)  # type: ignore[no-any-return]
        return (out * weights[:, :, None].to(out.dtype)).sum(dim=1)  # type: ignore[no-any-return]

    def _second_bias(self, weights: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weighted biases of the experts' second matrices, added once after the sum."""
        table = self.experts.linear_fc2.bias
        assert table is not None
        biases = table[chosen]  # [N, k, h]
        if self.weigh_input:
            return biases.sum(dim=1).to(dtype)
        return (biases * weights[:, :, None].to(biases.dtype)).sum(dim=1).to(dtype)
