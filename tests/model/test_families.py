"""Experts, latent attention and the newer variants: against plain loops, cut in two, step by step.

Megatron's own outputs are in tests/engine/test_family_parity.py and tests/oracles; here stand the
parts one by one, with biases and sizes that no oracle has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import random_models
from support.ranks import run_ranks
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig, YarnScaling
from mlm_eval.checkpoints.parameters import parameters
from mlm_eval.engine.engine import load_model
from mlm_eval.model.experts import MixtureOfExperts
from mlm_eval.model.tensor_parallel import SINGLE
from mlm_eval.ranks.groups import make_mesh

LLAMA = random_models.LLAMA
EXPERTS = {
    "num_experts": 6,
    "moe_layers": (0, 1),
    "moe_ffn_hidden_size": 12,
    "moe_router_topk": 3,
}
LATENTS = {
    "multi_latent_attention": True,
    "num_query_groups": 4,
    "kv_channels": 6,
    "kv_lora_rank": 10,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "qk_layernorm": True,
}
HYBRID = {
    "num_layers": 4,
    "position_embedding_type": "none",
    "activation": "squared_relu",
    "no_mixer_layers": (1, 3),
    "no_mlp_layers": (0, 2),
    "mamba_layers": (0,),
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "mamba_num_groups": 2,
    "mamba_state_dim": 5,
    "mamba_conv_width": 4,
}
HETEROGENEOUS = {
    "num_layers": 5,
    "num_query_groups": 4,
    "layer_query_groups": (2, 0, 4, 0, 0),
    "ffn_hidden_size": 64,
    "layer_ffn_hidden_sizes": (24, 64, 0, 0, 0),
    "no_mixer_layers": (1, 4),
    "no_mlp_layers": (2, 4),
    "linear_mixer_layers": (3,),
    "linear_mlp_layers": (3,),
    "add_bias_linear": True,
    "add_qkv_bias": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": EXPERTS,
    "pre-softmax, shared and gated": {
        **EXPERTS,
        "moe_router_pre_softmax": True,
        "moe_shared_expert_intermediate_size": 8,
        "moe_shared_expert_gate": True,
    },
    "groups and sigmoid": {
        **EXPERTS,
        "moe_layers": (1,),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 3,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_shared_expert_intermediate_size": 8,
    },
    "biases": {
        **EXPERTS,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "moe_router_bias": True,
        "activation": "gelu",
    },
    "on the input": {
        **EXPERTS,
        "moe_router_topk": 1,
        "moe_router_score_function": "sigmoid",
        "moe_apply_probs_on_input": True,
        "add_bias_linear": True,
        "add_qkv_bias": True,
    },
    "latents": LATENTS,
    "latents of queries, YaRN": {
        **LATENTS,
        "q_lora_rank": 14,
        "yarn": YarnScaling(4.0, 8, mscale=0.7, mscale_all_dim=0.5),
        "softmax_scale": 0.4,
    },
    "windows and sinks": {
        "window_size": 3,
        "window_layers": (1,),
        "softmax_type": "learnable",
        "activation": "quick_geglu",
        "activation_func_clamp_value": 0.5,
        "glu_linear_offset": 1.0,
        "yarn": YarnScaling(8.0, 8, round_range=False),
    },
    "gates": {
        "attention_output_gate": True,
        "no_rope_layers": (0,),
        "qk_l2_norm": True,
        "no_l2_norm_layers": (1,),
    },
    "bloom": {
        "position_embedding_type": "alibi",
        "embedding_layernorm": True,
        "normalization": "LayerNorm",
        "activation": "gelu_tanh",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "num_query_groups": 4,
    },
    "gpt-neox": {
        "parallel_residual": True,
        "normalization": "LayerNorm",
        "activation": "gelu",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "num_query_groups": 4,
        "rotary_percent": 0.5,
    },
    "parallel, ALiBi, grouped": {"parallel_residual": True, "position_embedding_type": "alibi"},
    "off by one": {"softmax_type": "off-by-one", "activation": "geglu_tanh"},
    "hybrid": HYBRID,
    "hybrid with experts": {
        **HYBRID,
        **EXPERTS,
        "moe_layers": (3,),
        "activation": "gelu",
        "mamba_min_time_step": 0.5,
        "mamba_norm_epsilon": 0.1,
    },
    "heterogeneous": HETEROGENEOUS,
    "caps, multipliers and norms of branches": {
        "attn_logit_softcapping": 0.7,
        "final_logit_softcapping": 1.5,
        "embedding_multiplier": 3.0,
        "logit_multiplier": 0.5,
        "branch_layernorm": True,
        "layernorm_zero_centered_gamma": True,
        "window_size": 3,
        "window_layers": (0,),
        "softmax_type": "learnable",
    },
    "two rotary bases": {
        "window_size": 3,
        "window_layers": (0,),
        "rotary_base_local": 30.0,
        "rotary_seq_len_interpolation_factor": 4.0,
        "branch_layernorm": True,
        "add_bias_linear": True,
        "add_qkv_bias": True,
    },
}


def model_config(name: str) -> ModelConfig:
    return dataclasses.replace(LLAMA, **FAMILIES[name])


def tokens(config: ModelConfig) -> Tensor:
    noise = torch.Generator().manual_seed(3)
    return torch.randint(config.vocab_size, (2, 12), generator=noise)


# ---- experts -----------------------------------------------------------------------------------


def by_loops(layer: MixtureOfExperts, c: ModelConfig, x: Tensor) -> Tensor:
    """Return what the layer computes of `x` `[tokens, hidden]`, a token and an expert at a time."""

    def mlp(fc1: Tensor, b1: Tensor | None, fc2: Tensor, b2: Tensor | None, x: Tensor) -> Tensor:
        inside = F.linear(x, fc1, b1)
        if c.gated:
            gate, up = inside.chunk(2)
            inside = F.silu(gate) * up
        else:
            inside = F.gelu(inside)
        return F.linear(inside, fc2, b2)

    router, experts = layer.router, layer.experts
    outputs = []
    for token in x:
        logits = F.linear(token, router.weight, router.bias)
        if c.moe_router_score_function == "sigmoid":
            scores = logits.sigmoid()
        else:
            scores = logits.softmax(-1)
        preference = scores if router.expert_bias is None else scores + router.expert_bias
        ranked = preference.argsort(descending=True).tolist()
        if c.moe_router_num_groups:
            size = c.num_experts // c.moe_router_num_groups
            each = c.moe_router_topk // c.moe_router_group_topk
            worth = [part.sort().values[-each:].sum() for part in preference.split(size)]
            best = sorted(range(len(worth)), key=lambda group: -worth[group])
            kept = best[: c.moe_router_group_topk]
            ranked = [expert for expert in ranked if expert // size in kept]
        chosen = ranked[: c.moe_router_topk]
        weights = scores[chosen]
        if c.moe_router_topk > 1 and not c.moe_router_pre_softmax:
            weights = weights / weights.sum()
        weights = weights * (c.moe_router_topk_scaling_factor or 1.0)
        total = torch.zeros_like(token)
        for expert, weight in zip(chosen, weights, strict=True):
            own = [
                None if table is None else table[expert]
                for linear in (experts.linear_fc1, experts.linear_fc2)
                for table in (linear.weight, linear.bias)
            ]
            assert own[0] is not None and own[2] is not None
            if c.moe_apply_probs_on_input:
                total += mlp(own[0], own[1], own[2], own[3], token * weight)
            else:
                total += weight * mlp(own[0], own[1], own[2], own[3], token)
        shared = layer.shared_experts
        if shared is not None:
            out = mlp(shared.linear_fc1.weight, None, shared.linear_fc2.weight, None, token)
            if shared.gate_weight is not None:
                out = out * F.linear(token, shared.gate_weight).sigmoid()
            total += out
        outputs.append(total)
    return torch.stack(outputs)


@pytest.mark.parametrize("name", [name for name, s in FAMILIES.items() if "num_experts" in s])
def test_experts_are_their_formula(name: str) -> None:
    config = model_config(name)
    model = random_models.on_one_rank(config).double()
    layer = model.decoder.layers[config.moe_layers[0]].mlp
    x = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(1)).double()
    # The router works in float32: its weights carry that rounding, relative to themselves.
    expected = by_loops(layer, config, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6 * expected.abs().max())


@pytest.mark.parametrize("name", [name for name, s in FAMILIES.items() if "num_experts" in s])
@pytest.mark.parametrize("tokens", [1, 9])  # one token leaves most experts without any
def test_experts_are_the_same_without_gradients(name: str, tokens: int) -> None:
    """In inference mode they write their outputs where they are to stand."""
    config = model_config(name)
    layer = random_models.on_one_rank(config).decoder.layers[config.moe_layers[0]].mlp
    x = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = layer(x)
    with torch.inference_mode():
        found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_a_token_does_not_depend_on_those_beside_it() -> None:
    model = random_models.on_one_rank(model_config("groups and sigmoid"))
    layer = model.decoder.layers[1].mlp
    x = torch.randn(7, LLAMA.hidden_size, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([layer(row) for row in x.split(1)])
    torch.testing.assert_close(layer(x), alone, rtol=1e-5, atol=1e-5)


# ---- one token at a time -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_that_grows_has_the_states_of_the_whole(name: str) -> None:
    """What generation keeps, latents and keys, gives the states of a whole forward pass."""
    config = model_config(name)
    model = random_models.on_one_rank(config)
    ids = tokens(config)
    lengths = [3, 5]
    last, cache = model.start(ids[:, :5], lengths, ids.shape[1])
    whole = model(ids)
    scale = whole.abs().max().item()
    for row, length in enumerate(lengths):
        close(last[row], whole[row, length - 1], scale)
    for step in range(6):
        following = torch.stack([ids[row, n + step] for row, n in enumerate(lengths)])
        states = model.step(following, cache)
        for row, length in enumerate(lengths):
            close(states[row], whole[row, length + step], scale)


def close(actual: Tensor, expected: Tensor, scale: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * scale)


# ---- two ranks ---------------------------------------------------------------------------------


def losses_and_gradients(tp: int) -> dict[str, dict[str, Tensor]]:
    """Return each family's losses, and the gradients of what this rank holds."""
    mesh = make_mesh(tp=tp, dp=1).tensor_parallel if tp > 1 else SINGLE
    found = {}
    for name in FAMILIES:
        config = model_config(name)
        source = random_models.checkpoint(config)
        model = load_model(source, mesh, device=torch.device("cpu"), dtype=torch.float32)
        ids = tokens(config)
        losses, _ = model.losses(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        losses.mean().backward()
        gradients = {
            key: value.grad for key, value in model.named_parameters() if value.grad is not None
        }
        found[name] = {"losses": losses.detach(), **gradients}
    return found


@pytest.mark.process
def test_two_ranks_have_the_losses_and_gradients_of_one() -> None:
    [whole] = run_ranks(1, losses_and_gradients, 1)
    both = run_ranks(2, losses_and_gradients, 2)
    for name in FAMILIES:
        table = parameters(model_config(name))
        for rank, found in enumerate(both):
            assert found[name].keys() == whole[name].keys()
            torch.testing.assert_close(
                found[name]["losses"], whole[name]["losses"], atol=2e-5, rtol=0
            )
            for key, value in found[name].items():
                if key == "losses":
                    continue
                expected = whole[name][key]
                index = table[key].index(rank, 2)
                if isinstance(index, slice):
                    expected = expected.narrow(
                        table[key].dim, index.start, index.stop - index.start
                    )
                elif index is not None:
                    expected = expected.index_select(table[key].dim, index)
                scale = whole[name][key].abs().max().item()
                torch.testing.assert_close(
                    value, expected, rtol=0, atol=max(1e-4 * scale, 1e-7), msg=f"{name}: {key}"
                )
