"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek V2 and V3.

On the Hub each expert has tensors of its own; the modules of transformers 5 hold a layer's experts
in two. DeepSeek's have latent attention besides. Layers without experts have a plain MLP.
Source: the modeling and configuration files of transformers 5.23, its conversion_mapping.py.
"""

from __future__ import annotations

import dataclasses

from mlm_eval.checkpoints.huggingface.families.family import (
    ATTENTION,
    DECODER_LAYER,
    Family,
    Row,
)
from mlm_eval.checkpoints.huggingface.families.llama import (
    HEAD_DIM,
    RMS_EPSILON,
    RMS_ROPE,
    WINDOW_SWITCHES,
    llama_fields,
    llama_rows,
    window_field,
)
from mlm_eval.checkpoints.huggingface.fields import (
    Field,
    Use,
    bias_field,
    other_fields,
    read_field,
    refused_field,
    setting_field,
)
from mlm_eval.checkpoints.huggingface.layout import (
    EXPERTS,
    EXPERTS_GATE_UP,
    GATE_UP,
)

_MLP = f"{DECODER_LAYER}.mlp"
_MODULES = "model.layers.{i}.mlp"
_OUTPUTS = (
    *other_fields(Use.METADATA, "which outputs are returned", "output_router_logits"),
    *other_fields(
        Use.TRAINING,
        "the loss that balances the experts, and noise",
        "router_aux_loss_coef",
        "router_jitter_noise",
    ),
)


def _expert_rows(
    theirs: str = _MODULES,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    router: str = "",
) -> tuple[Row, ...]:
    """Return the names of router and experts, which only layers with experts have.

    Args:
        theirs: The module that holds them.
        names: An expert's gate, up and down.
        router: Another full name of the router's weight.
    """
    gate, up, down = (f"{theirs}.experts.{{e}}.{name}" for name in names)
    first, second = f"{_MODULES}.experts.gate_up_proj", f"{_MODULES}.experts.down_proj"
    experts = f"{_MLP}.experts"
    return (
        Row(f"{_MLP}.router", (f"{theirs}.gate",), False, optional=True, whole=router),
        Row(f"{experts}.linear_fc1", (gate, up), False, EXPERTS_GATE_UP, True, whole=first),
        Row(f"{experts}.linear_fc2", (down,), False, EXPERTS, True, whole=second),
    )


def _shared_rows(theirs: str) -> tuple[Row, ...]:
    """Return the names of the expert that every token is sent to."""
    first = (f"{theirs}.gate_proj", f"{theirs}.up_proj")
    return (
        Row(f"{_MLP}.shared_experts.linear_fc1", first, False, GATE_UP, True),
        Row(f"{_MLP}.shared_experts.linear_fc2", (f"{theirs}.down_proj",), False, optional=True),
    )


def _with_experts(rows: tuple[Row, ...], experts: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return a family's rows, with a plain MLP in some layers and experts in others."""
    dense = [
        dataclasses.replace(row, optional=True) if ".mlp.linear_" in row.canonical else row
        for row in rows
    ]
    place = next(place for place, row in enumerate(dense) if ".linear_fc2" in row.canonical) + 1
    return (*dense[:place], *experts, *dense[place:])


_HUB = "model.layers.{i}.block_sparse_moe"

MIXTRAL = Family(
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    constants=RMS_ROPE,
    theta=1000000.0,
    windows="all",
    fields=(
        *llama_fields(4096, 32, 32, 8, 14336, 131072, width="moe_ffn_hidden_size"),
        HEAD_DIM,
        setting_field("layernorm_epsilon", "rms_norm_eps", 1e-5),
        window_field(None),
        setting_field("num_experts", "num_local_experts", 8, alias="num_experts"),
        setting_field("moe_router_topk", "num_experts_per_tok", 2),
        *_OUTPUTS,
    ),
    rows=_with_experts(
        llama_rows(False),
        _expert_rows(_HUB, ("w1", "w3", "w2"), f"{_MODULES}.gate.weight"),
    ),
)

_SPARSE_FIELDS = (
    setting_field("moe_router_topk", "num_experts_per_tok", 4),
    read_field("decoder_sparse_step", "every so many layers one has experts", 1),
    read_field("mlp_only_layers", "layers without experts", nullable=True),
    read_field("norm_topk_prob", "whether the chosen experts' weights add up to 1", False),
    *_OUTPUTS,
)

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    model_class="Qwen2MoeForCausalLM",
    constants={**RMS_ROPE, "moe_shared_expert_gate": True},
    windows="before",
    fields=(
        *llama_fields(2048, 24, 16, 16, 5632, 32768),
        HEAD_DIM,
        RMS_EPSILON,
        bias_field("qkv_bias", True),
        *WINDOW_SWITCHES,
        setting_field("num_experts", "num_experts", 60),
        setting_field("moe_ffn_hidden_size", "moe_intermediate_size", 1408),
        setting_field(
            "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", 5632
        ),
        *_SPARSE_FIELDS,
    ),
    rows=_with_experts(
        llama_rows("qkv_bias"),
        (
            *_expert_rows(),
            *_shared_rows(f"{_MODULES}.shared_expert"),
            Row(
                f"{_MLP}.shared_experts.gate_weight",
                (f"{_MODULES}.shared_expert_gate.weight",),
                optional=True,
                tensor=True,
            ),
        ),
    ),
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    constants={**RMS_ROPE, "qk_layernorm": True},
    windows="all",
    fields=(
        *llama_fields(2048, 24, 32, 4, 6144, 32768),
        HEAD_DIM,
        RMS_EPSILON,
        bias_field("attention_bias", False),
        window_field(4096),
        read_field("use_sliding_window", "whether there is a sliding window", False),
        *other_fields(
            Use.METADATA, "of Qwen3's dense models; here windows are in all", "max_window_layers"
        ),
        # transformers 5 has a name of its own, all files and transformers 4 the other.
        dataclasses.replace(
            setting_field("num_experts", "num_local_experts", 128, alias="num_experts"),
            written="num_experts",
        ),
        setting_field("moe_ffn_hidden_size", "moe_intermediate_size", 768),
        dataclasses.replace(_SPARSE_FIELDS[0], default=8),
        *_SPARSE_FIELDS[1:],
    ),
    rows=_with_experts(
        llama_rows("attention_bias", "attention_bias", qk_norm=True), _expert_rows()
    ),
)


def _latent_rows() -> tuple[Row, ...]:
    """Return the names of DeepSeek's attention, in the place of Llama's."""
    theirs = "model.layers.{i}.self_attn"
    names = {
        "linear_q_proj": "q_proj",
        "linear_q_down_proj": "q_a_proj",
        "q_layernorm": "q_a_layernorm",
        "linear_q_up_proj": "q_b_proj",
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
    }
    return tuple(
        Row(f"{ATTENTION}.{ours}", (f"{theirs}.{name}",), False, optional="q_" in ours)
        for ours, name in names.items()
    )


def _deepseek_rows(more: tuple[Row, ...] = ()) -> tuple[Row, ...]:
    rows = llama_rows(False)
    place = next(place for place, row in enumerate(rows) if ".linear_qkv" in row.canonical)
    shared = _shared_rows(f"{_MODULES}.shared_experts")
    return _with_experts(
        (*rows[:place], *_latent_rows(), *rows[place + 1 :]), (*_expert_rows(), *more, *shared)
    )


_LATENT = {
    **RMS_ROPE,
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "latent_layernorm_epsilon": 1e-6,  # whatever rms_norm_eps says
}


def _deepseek_fields(
    hidden: int, layers: int, heads: int, groups: int | None, ffn: int, positions: int, width: int
) -> tuple[Field, ...]:
    """Return the keys that DeepSeek V2 and V3 share, with their defaults."""
    return (
        *llama_fields(hidden, layers, heads, groups, ffn, positions),
        RMS_EPSILON,
        refused_field("attention_bias", "biases of latents", False, default=False),
        setting_field("q_lora_rank", "q_lora_rank", 1536, nullable=True),
        setting_field("kv_lora_rank", "kv_lora_rank", 512),
        setting_field("qk_head_dim", "qk_nope_head_dim", 128),
        setting_field("qk_pos_emb_head_dim", "qk_rope_head_dim", 64),
        setting_field("v_head_dim", "v_head_dim", 128),
        read_field("qk_head_dim", "must be qk_nope_head_dim + qk_rope_head_dim"),
        setting_field("moe_ffn_hidden_size", "moe_intermediate_size", width),
        refused_field("moe_layer_freq", "experts in every so many layers", 1, None),
        *_OUTPUTS,
        *other_fields(
            Use.TRAINING, "the loss that balances the experts", "aux_loss_alpha", "seq_aux"
        ),
        *other_fields(Use.NUMERICS, "the ranks of the run that trained it", "ep_size"),
        *other_fields(Use.NUMERICS, "the order of sums, in transformers 4", "pretraining_tp"),
    )


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    model_class="DeepseekV2ForCausalLM",
    constants={**_LATENT, "moe_router_pre_softmax": True},
    fields=(
        *_deepseek_fields(4096, 32, 32, None, 11008, 2048, 1407),
        refused_field("mlp_bias", "biases of MLPs", False, default=False),
        setting_field("num_experts", "n_routed_experts", 64, alias="num_experts"),
        setting_field("moe_router_topk", "num_experts_per_tok", None),
        read_field("n_shared_experts", "width of the shared expert, in experts", 2),
        read_field("first_k_dense_replace", "so many layers without experts come first", 0),
        read_field("routed_scaling_factor", "multiplies the experts' weights", 1.0),
        read_field("topk_method", "whether experts are chosen within groups", "greedy"),
        read_field("n_group", "the number of groups", nullable=True),
        read_field("topk_group", "the number of groups that are kept", nullable=True),
        refused_field(
            "norm_topk_prob", "experts' weights that add up to 1", False, None, default=False
        ),
        refused_field("scoring_func", "another score of experts", "softmax", None),
        *other_fields(Use.METADATA, "transformers takes qk_rope_head_dim", "head_dim"),
    ),
    rows=_deepseek_rows(),
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    model_class="DeepseekV3ForCausalLM",
    constants={
        **_LATENT,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    fields=(
        *_deepseek_fields(7168, 61, 128, 128, 18432, 4096, 2048),
        setting_field("num_experts", "n_routed_experts", 256, alias="num_local_experts"),
        setting_field("moe_router_topk", "num_experts_per_tok", 8),
        read_field("n_shared_experts", "width of the shared expert, in experts", 1),
        read_field("first_k_dense_replace", "so many layers without experts come first", 3),
        read_field("routed_scaling_factor", "multiplies the experts' weights", 2.5),
        read_field("n_group", "the number of groups", 8),
        read_field("topk_group", "the number of groups that are kept", 4),
        read_field("norm_topk_prob", "whether the chosen experts' weights add up to 1", True),
        refused_field("topk_method", "another choice of experts", "noaux_tc", None),
        refused_field("scoring_func", "another score of experts", "sigmoid", None),
        read_field("rope_interleave", "whether channels are rotated in pairs side by side", True),
        Field(
            "num_nextn_predict_layers",
            Use.READ,
            "layers behind the last one, for multi-token prediction",
            1,
            aliases=("num_mtp_layers",),
        ),
        read_field("head_dim", "must be qk_rope_head_dim", nullable=True),
    ),
    rows=_deepseek_rows(
        (
            Row(
                f"{_MLP}.router.expert_bias",
                (f"{_MODULES}.gate.e_score_correction_bias",),
                optional=True,
                tensor=True,
            ),
        )
    ),
)
