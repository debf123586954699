"""Experts and latents of config.json: what no single key says as ModelConfig does, both ways.

transformers has a class for each way to choose experts; of a model that no class fits,
`choose_mixture` says what stands in the way.
"""

from __future__ import annotations

from typing import Any

from mlm_eval.checkpoints.config import ModelConfig, is_of_kind
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.families.experts import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
)
from mlm_eval.checkpoints.huggingface.families.family import Family
from mlm_eval.checkpoints.huggingface.fields import Use
from mlm_eval.checkpoints.huggingface.layers.hybrids import sparse_layers_of_hybrid
from mlm_eval.checkpoints.huggingface.reader import HubConfigReader

GROUP_EXPERTS = {"deepseek_v2": 1, "deepseek_v3": 2, "nemotron_h": 2}
"""By how many of its best experts a group of experts counts."""

LATENT_EPSILON = 1e-6
"""Of the norms of latents in transformers' classes."""


def read_mixture(r: HubConfigReader, family: Family) -> None:
    """Take which layers have experts, and how a token's are chosen.

    Raises:
        InputError: A key has a value that transformers does not compute, or that we do not.
    """
    if "num_experts" not in {row.setting for row in family.fields}:
        return
    if "ffn_hidden_size" not in r.values:
        r.set("ffn_hidden_size", r.values["moe_ffn_hidden_size"], "the experts' width")
    r.set("moe_layers", *_sparse_layers(r, family))
    if not r.values["moe_layers"]:
        r.set("num_experts", 0, "no layer has experts")
        return
    topk = r.values["moe_router_topk"]
    if topk is None:
        raise InputError(
            f"{r.where} has no num_experts_per_tok, without which transformers does not compute a "
            f"{family.model_type} model; correct the file"
        )
    counted = family.table.get("n_shared_experts")
    if counted is not None and counted.use is Use.READ:
        count, source = r.look("n_shared_experts", "int")
        r.set(
            "moe_shared_expert_intermediate_size", count * r.values["moe_ffn_hidden_size"], source
        )
    if "routed_scaling_factor" in family.table:
        factor, source = r.look("routed_scaling_factor", "float")
        if factor <= 0:
            raise InputError(
                f"{r.where}: routed_scaling_factor is {factor:g}, expected a number above 0"
            )
        r.set("moe_router_topk_scaling_factor", factor, source)
    normalised = family.table.get("norm_topk_prob")
    if normalised is not None and normalised.use is Use.READ:
        _read_normalisation(r, family, topk)
    if "n_group" in family.table:
        _read_groups(r, family)


def _sparse_layers(r: HubConfigReader, family: Family) -> tuple[tuple[int, ...], str]:
    """Return the layers that have experts, and where that is said."""
    if family.hybrid:
        return sparse_layers_of_hybrid(r)
    layers = range(r.values["num_layers"])
    if "first_k_dense_replace" in family.table:
        first, source = r.look("first_k_dense_replace", "int")
        return tuple(layer for layer in layers if layer >= first), source
    if "decoder_sparse_step" not in family.table:
        return tuple(layers), f"every {family.model_type} model"
    step, source = r.look("decoder_sparse_step", "int")
    if step < 1:
        raise InputError(f"{r.where}: decoder_sparse_step is {step}, expected at least 1")
    dense = r.hf.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or not all(is_of_kind(number, "int") for number in dense):
        raise InputError(
            f"{r.where}: mlp_only_layers is {dense!r}, expected a list of numbers of layers"
        )
    sparse = (layer for layer in layers if (layer + 1) % step == 0 and layer not in dense)
    return tuple(sparse), "config.json mlp_only_layers" if dense else source


def _read_normalisation(r: HubConfigReader, family: Family, topk: int) -> None:
    """Take whether the weights of the chosen experts add up to 1."""
    adds_up, source = r.look("norm_topk_prob", "bool")
    if not _sigmoid(family):
        r.set("moe_router_pre_softmax", not adds_up, source)
    elif adds_up != (topk > 1):
        raise InputError(
            f"{r.where}: norm_topk_prob is {str(adds_up).lower()} with num_experts_per_tok {topk}; "
            "of sigmoid scores mlm-eval computes weights that add up to 1 where a token has "
            "several experts, and the score itself where it has one"
        )


def _read_groups(r: HubConfigReader, family: Family) -> None:
    """Take the groups within which experts are chosen."""
    if family is DEEPSEEK_V2:
        method, _ = r.look("topk_method", "str")
        if method not in ("greedy", "group_limited_greedy"):
            raise InputError(
                f"{r.where}: topk_method is {method!r}, which transformers does not compute for "
                f"{family.model_type} models; known are greedy and group_limited_greedy"
            )
        if method == "greedy":
            return
    for key, setting in (
        ("n_group", "moe_router_num_groups"),
        ("topk_group", "moe_router_group_topk"),
    ):
        value, source = r.look(key, "int")
        if value is None or value < 1:
            raise InputError(f"{r.where}: {key} is {value}, expected at least 1 ({source})")
        r.set(setting, value, source)
    each = GROUP_EXPERTS[family.model_type]
    r.set("moe_router_group_experts", each, f"every {family.model_type} model")
    groups = r.values["moe_router_num_groups"]
    if groups and r.values["num_experts"] // groups < each:
        raise InputError(
            f"{r.where}: n_group is {groups} for "
            f"{r.values['num_experts']} experts, but a group needs at least {each}"
        )


def read_latent_sizes(r: HubConfigReader, family: Family) -> None:
    """Take what latent attention has otherwise than other kinds.

    Raises:
        InputError: Keys contradict each other.
    """
    if not family.latent:
        return
    heads = r.values["num_attention_heads"]
    if r.values["num_query_groups"] != heads:
        raise InputError(
            f"{r.where}: num_key_value_heads is {r.values['num_query_groups']} for {heads} heads; "
            "latent attention has keys and values of all of them, correct the file"
        )
    if r.values["q_lora_rank"] is None:
        r.set("q_lora_rank", 0, r.sources["q_lora_rank"])
    r.set("kv_channels", r.values["v_head_dim"], r.sources["v_head_dim"])
    turned = r.values["qk_pos_emb_head_dim"]
    sums = {"qk_head_dim": r.values["qk_head_dim"] + turned}
    if family is DEEPSEEK_V3:
        sums["head_dim"] = turned
    for key, value in sums.items():
        stated = r.hf.get(key)
        if stated is not None and r.checked(key, stated, "int") != value:
            raise InputError(
                f"{r.where}: {key} is {stated}, but the other sizes say {value}; correct the file"
            )


def _sigmoid(family: Family) -> bool:
    return family.constants.get("moe_router_score_function") == "sigmoid"


def write_mixture(c: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the keys of experts and latents that no single setting says."""
    keys = {row.key for row in family.fields}
    own: dict[str, Any] = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": _dense_layers(c),
        "norm_topk_prob": not c.moe_router_pre_softmax,
        "first_k_dense_replace": c.dense_layers,
        "n_shared_experts": c.moe_shared_expert_intermediate_size // max(c.moe_ffn_hidden_size, 1),
        "routed_scaling_factor": float(c.moe_router_topk_scaling_factor or 1.0),
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
        "n_group": c.moe_router_num_groups or None,
        "topk_group": c.moe_router_group_topk or None,
    }
    if family is DEEPSEEK_V2:
        own["topk_method"] = "group_limited_greedy" if c.moe_router_num_groups else "greedy"
        own["norm_topk_prob"] = False
    elif _sigmoid(family):
        own["norm_topk_prob"] = c.moe_router_topk > 1
        if not c.moe_router_num_groups:
            own["n_group"] = own["topk_group"] = 1
    if family.latent:
        own["q_lora_rank"] = c.q_lora_rank or None
        if not c.num_experts:  # transformers wants their sizes all the same
            sizes = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
            own |= dict.fromkeys(sizes, 1)
    return {key: value for key, value in own.items() if key in keys}


def _dense_layers(c: ModelConfig) -> list[int]:
    return [layer for layer in range(c.num_layers) if layer not in c.moe_layers]


def choose_mixture(c: ModelConfig) -> tuple[Family | None, str]:
    """Return the family of a model with experts or latent attention; where there is none, why."""
    if c.multi_latent_attention:
        return _choose_deepseek(c)
    why = _unlike_all(c)
    if not why and c.moe_router_score_function == "sigmoid":
        why = "its classes with sigmoid scores have latent attention (DeepSeek V3)"
    if not why and c.moe_router_num_groups:
        why = "its classes with groups of experts have latent attention (DeepSeek)"
    if not why and c.moe_router_topk_scaling_factor is not None:
        why = "its classes with a factor of the experts' weights have latent attention (DeepSeek)"
    if why:
        return None, why
    shared = c.moe_shared_expert_intermediate_size
    if c.qk_layernorm:
        if shared:
            return None, "Qwen3-MoE, which has norms of queries and keys, has no shared expert"
        if c.add_qkv_bias or c.qk_layernorm_bias:
            return None, "Qwen3-MoE, which has norms of queries and keys, has no such biases"
        return QWEN3_MOE, ""
    if shared and not c.moe_shared_expert_gate:
        return None, "Qwen2-MoE, which has a shared expert, has a gate of it too"
    some = bool(c.dense_layers) or len(c.window_layers) not in (0, c.num_layers)
    plain = not (shared or c.add_qkv_bias or c.moe_router_pre_softmax or some)
    return (MIXTRAL if plain else QWEN2_MOE), ""


def _unlike_all(c: ModelConfig) -> str:
    """Return what no class of transformers with experts has; nothing where all fits."""
    faults = {
        "they have RMSNorm": c.normalization != "RMSNorm",
        "they have rotary positions": c.position_embedding_type != "rope",
        "they have gated MLPs": not c.gated,
        "they have no biases in linear layers": c.add_bias_linear,
        "their routers have no biases": c.moe_router_bias,
        "they weigh an expert's output, not its input": c.moe_apply_probs_on_input,
    }
    return next((why for why, there in faults.items() if there), "")


def _choose_deepseek(c: ModelConfig) -> tuple[Family | None, str]:
    why = _unlike_all(c)
    latents = "DeepSeek's classes, which have latent attention, "
    family = DEEPSEEK_V3 if c.moe_router_score_function == "sigmoid" else DEEPSEEK_V2
    each = GROUP_EXPERTS[family.model_type]
    faults = {
        f"{latents}norm the latents": not c.qk_layernorm,
        f"{latents}have plain layers first and experts in all later ones": bool(c.num_experts)
        and list(c.moe_layers) != list(range(c.dense_layers, c.num_layers)),
        f"{latents}have shared experts that are so many times as wide as a routed one": bool(
            c.moe_shared_expert_intermediate_size % max(c.moe_ffn_hidden_size, 1)
        ),
        f"{latents}have shared experts without a gate": c.moe_shared_expert_gate,
        f"of a softmax over the chosen experts {latents}have none": bool(c.num_experts)
        and c.moe_router_score_function == "softmax"
        and not c.moe_router_pre_softmax,
        f"{latents}sum the best {each} of a group": bool(c.moe_router_num_groups)
        and c.group_experts != each,
    }
    why = why or next((fault for fault, there in faults.items() if there), "")
    if why:
        return None, why
    return family, ""


def in_terms_of(c: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the settings that the same function has other values of in a family's terms."""
    changes: dict[str, Any] = {}
    if family.latent:
        # Megatron's args hold these whether or not latent attention heeds them.
        changes |= {"kv_channels": c.v_head_dim, "num_query_groups": c.num_attention_heads}
        changes |= {"rotary_percent": 1.0, "rotary_interleaved": False}
    if not c.num_experts:
        return changes
    if "ffn_hidden_size" not in {row.setting for row in family.fields}:  # no layer is dense
        changes["ffn_hidden_size"] = c.moe_ffn_hidden_size
    shared = c.moe_shared_expert_intermediate_size
    if not shared and family in (QWEN2_MOE, DEEPSEEK_V2, DEEPSEEK_V3):
        changes["moe_shared_expert_intermediate_size"] = c.moe_ffn_hidden_size  # of zeros
    if family is QWEN2_MOE:
        changes["moe_shared_expert_gate"] = True
    if family is DEEPSEEK_V3:
        changes["moe_router_enable_expert_bias"] = True
    return changes
