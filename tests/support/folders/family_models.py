"""Models beyond dense ones for the tests of what is written: experts, latents, newer variants."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlm_eval.checkpoints.config import ModelConfig, YarnScaling
from support.configs import LLAMA

# Four layers, so that two pipeline stages may differ, and rows that four ranks share.
_BASE = dataclasses.replace(LLAMA, num_layers=4, vocab_size=52)
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "moe_layers": (0, 1, 2, 3),
    "moe_ffn_hidden_size": 12,
    "moe_router_topk": 2,
}
_EXPERTS_ALONE = {**_EXPERTS, "ffn_hidden_size": 12}
"""Where no layer has a plain MLP its width is that of the experts: no file says another."""

_BIASES = {"add_bias_linear": True, "add_qkv_bias": True}
_LATENTS: dict[str, Any] = {
    "multi_latent_attention": True,
    "num_query_groups": 4,
    "kv_channels": 6,
    "kv_lora_rank": 12,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "qk_layernorm": True,
}
_DEEPSEEK: dict[str, Any] = {
    **_EXPERTS,
    **_LATENTS,
    "moe_layers": (1, 2, 3),
    "q_lora_rank": 16,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_shared_expert_intermediate_size": 8,
}

FAMILY_MODELS: dict[str, ModelConfig] = {
    name: dataclasses.replace(_BASE, **changes)
    for name, changes in {
        "mixtral": _EXPERTS_ALONE,
        "gated shared expert": {
            **_EXPERTS_ALONE,
            "moe_router_pre_softmax": True,
            "moe_shared_expert_intermediate_size": 8,
            "moe_shared_expert_gate": True,
            "add_qkv_bias": True,
        },
        "every second layer, with biases": {
            **_EXPERTS,
            **_BIASES,
            "moe_layers": (0, 2),
            "moe_router_bias": True,
            "activation": "gelu",
            "normalization": "LayerNorm",
            "position_embedding_type": "learned_absolute",
        },
        "on the input": {
            **_EXPERTS_ALONE,
            "moe_router_topk": 1,
            "moe_router_score_function": "sigmoid",
            "moe_apply_probs_on_input": True,
            "qk_l2_norm": True,
            "no_rope_layers": (1, 3),
        },
        "deepseek": _DEEPSEEK,
        "latents, YaRN": {
            **_LATENTS,
            "yarn": YarnScaling(4.0, 8, mscale=0.7, mscale_all_dim=0.5),
            # (0.1 x 0.5 ln 4 + 1)^2 / sqrt(8 + 4)
            "softmax_scale": 12**-0.5 * 1.0693147180559945**2,
        },
        "latents with biases": {
            **_LATENTS,
            "add_bias_linear": True,
            "normalization": "LayerNorm",
            "activation": "gelu",
        },
        "windows and sinks": {
            **_EXPERTS_ALONE,
            **_BIASES,
            "moe_router_bias": True,
            "window_size": 3,
            "window_layers": (0, 2),
            "softmax_type": "learnable",
            "activation": "quick_geglu",
            "activation_func_clamp_value": 0.5,
            "glu_linear_offset": 1.0,
            "yarn": YarnScaling(8.0, 8, round_range=False),
        },
        "output gates": {"attention_output_gate": True, "softmax_type": "off-by-one"},
        "geglu": {"activation": "geglu", "softmax_scale": 0.4},
        "tanh geglu": {"activation": "geglu_tanh", "window_size": 5, "window_layers": (0, 1, 2, 3)},
        "l2 norm": {"qk_l2_norm": True},
    }.items()
}
