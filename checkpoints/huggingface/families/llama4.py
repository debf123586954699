"""Llama 4's language model: one expert of a few beside a shared one, layers without positions.

Source: the modeling and configuration files of transformers 5.23.
"""

from __future__ import annotations

from mlm_eval.checkpoints.huggingface.families.family import DECODER_LAYER, Family, Row
from mlm_eval.checkpoints.huggingface.families.llama import RMS_ROPE, llama_fields, llama_rows
from mlm_eval.checkpoints.huggingface.fields import (
    Use,
    bias_field,
    other_fields,
    read_field,
    refused_field,
    setting_field,
)
from mlm_eval.checkpoints.huggingface.layout import EXPERTS_TRANSPOSED, GATE_UP

_MLP = f"{DECODER_LAYER}.mlp"
_MODULES = "model.layers.{i}.feed_forward"


def _mlp_rows(canonical: str, theirs: str) -> tuple[Row, ...]:
    """Return the names of one plain MLP, which only some layers have."""
    first = (f"{theirs}.gate_proj", f"{theirs}.up_proj")
    return (
        Row(f"{canonical}.linear_fc1", first, False, GATE_UP, optional=True),
        Row(f"{canonical}.linear_fc2", (f"{theirs}.down_proj",), False, optional=True),
    )


def _expert_row(canonical: str, name: str) -> Row:
    return Row(
        f"{_MLP}.experts.{canonical}.weight",
        (f"{_MODULES}.experts.{name}",),
        layout=EXPERTS_TRANSPOSED,
        optional=True,
        tensor=True,
    )


def _rows() -> tuple[Row, ...]:
    """Return Llama's names, with a router, experts and a shared one in some layers."""
    rows: list[Row] = []
    for row in llama_rows("attention_bias", "attention_bias"):
        if not row.canonical.startswith(f"{_MLP}."):
            rows.append(row)
        elif row.canonical.endswith(".linear_fc1"):
            rows += _mlp_rows(_MLP, _MODULES)
            rows.append(Row(f"{_MLP}.router", (f"{_MODULES}.router",), False, optional=True))
            rows.append(_expert_row("linear_fc1", "gate_up_proj"))
            rows.append(_expert_row("linear_fc2", "down_proj"))
            rows += _mlp_rows(f"{_MLP}.shared_experts", f"{_MODULES}.shared_expert")
    return tuple(rows)


LLAMA4 = Family(
    model_type="llama4_text",
    model_class="Llama4ForCausalLM",
    constants={
        **RMS_ROPE,
        "rotary_interleaved": True,
        "moe_router_score_function": "sigmoid",
        "moe_apply_probs_on_input": True,
    },
    theta=500000.0,
    windows="chunks",
    fields=(
        *(
            field
            for field in llama_fields(5120, 48, 40, 8, 16384, 131072)
            if field.setting not in ("ffn_hidden_size", "num_query_groups")
        ),
        setting_field("num_query_groups", "num_key_value_heads", 8, nullable=True),
        setting_field("kv_channels", "head_dim", 128),
        setting_field("layernorm_epsilon", "rms_norm_eps", 1e-5),
        bias_field("attention_bias", False),
        setting_field("ffn_hidden_size", "intermediate_size_mlp", 16384),
        setting_field("moe_ffn_hidden_size", "intermediate_size", 8192),
        setting_field("num_experts", "num_local_experts", 16),
        setting_field("moe_router_topk", "num_experts_per_tok", 1),
        setting_field("qk_l2_norm", "use_qk_norm", True),
        read_field("moe_layers", "the layers with experts", nullable=True),
        read_field("interleave_moe_layer_step", "else every so many layers one has them", 1),
        read_field("no_rope_layers", "0 for a layer without rotary positions", nullable=True),
        read_field("no_rope_layer_interval", "else every so many layers one has none", 4),
        read_field("attention_chunk_size", "limits the positions, with a warning", 8192),
        read_field("attn_temperature_tuning", "alike: from floor_scale on", True),
        read_field("floor_scale", "positions before which nothing is tuned", 8192),
        read_field("attn_scale", "how much is tuned", 0.1),
        refused_field("sliding_window", "a sliding window", None),
        *other_fields(Use.METADATA, "which outputs are returned", "output_router_logits"),
        *other_fields(
            Use.NUMERICS,
            "the kind of cache that text is generated with, and the file's own compression",
            "cache_implementation",
            "for_llm_compression",
        ),
        *other_fields(
            Use.TRAINING,
            "the loss that balances the experts, and noise",
            "router_aux_loss_coef",
            "router_jitter_noise",
        ),
        *other_fields(
            Use.METADATA,
            "of the model of text and images",
            "boi_token_index",
            "eoi_token_index",
            "idx",
            "image_size",
            "image_token_id",
            "image_token_index",
            "multi_modal_projector_bias",
            "norm_eps",
            "num_channels",
            "patch_size",
            "pixel_shuffle_ratio",
            "projector_dropout",
            "projector_input_dim",
            "projector_output_dim",
            "text_config",
            "vision_config",
            "vision_feature_layer",
            "vision_feature_select_strategy",
            "vision_output_dim",
        ),
    ),
    rows=_rows(),
)
