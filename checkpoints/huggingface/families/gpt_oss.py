"""gpt-oss: experts with biases, sinks, windows in every second layer, YaRN.

Source: the modeling and configuration files of transformers 5.23.
"""

from __future__ import annotations

from mlm_eval.checkpoints.huggingface.families.family import ATTENTION, DECODER_LAYER, Family, Row
from mlm_eval.checkpoints.huggingface.families.llama import (
    RMS_ROPE,
    llama_fields,
    llama_rows,
    window_field,
)
from mlm_eval.checkpoints.huggingface.fields import (
    Use,
    bias_field,
    other_fields,
    read_field,
    refused_field,
    setting_field,
)
from mlm_eval.checkpoints.huggingface.layout import EXPERTS_ALTERNATING, EXPERTS_TRANSPOSED

_MLP = f"{DECODER_LAYER}.mlp"
_MODULES = "model.layers.{i}.mlp"
_FIRST, _SECOND = f"{_MODULES}.experts.gate_up_proj", f"{_MODULES}.experts.down_proj"


_EXPERTS = (
    Row(f"{_MLP}.router", (f"{_MODULES}.router",)),
    Row(f"{_MLP}.experts.linear_fc1.weight", (_FIRST,), layout=EXPERTS_ALTERNATING, tensor=True),
    Row(
        f"{_MLP}.experts.linear_fc1.bias",
        (f"{_FIRST}_bias",),
        layout=EXPERTS_ALTERNATING,
        tensor=True,
    ),
    Row(f"{_MLP}.experts.linear_fc2.weight", (_SECOND,), layout=EXPERTS_TRANSPOSED, tensor=True),
    Row(f"{_MLP}.experts.linear_fc2.bias", (f"{_SECOND}_bias",), tensor=True),
)
_SINKS = Row(
    f"{ATTENTION}.core_attention.softmax_offset", ("model.layers.{i}.self_attn.sinks",), tensor=True
)


def _rows() -> tuple[Row, ...]:
    """Return Llama's names, with sinks, and with experts in the place of the MLP."""
    rows: list[Row] = []
    for row in llama_rows("attention_bias", "attention_bias"):
        if row.canonical.endswith(".mlp.linear_fc1"):
            rows += _EXPERTS
        elif not row.canonical.endswith(".mlp.linear_fc2"):
            rows.append(row)
        if row.canonical.endswith(".linear_qkv"):
            rows.append(_SINKS)
    return tuple(rows)


GPT_OSS = Family(
    model_type="gpt_oss",
    model_class="GptOssForCausalLM",
    constants={
        **RMS_ROPE,
        "softmax_type": "learnable",
        "glu_linear_offset": 1.0,
        "add_bias_linear": True,
        "moe_router_bias": True,
    },
    theta=150000.0,
    absent_rotary={
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    windows="alternate",
    window_period=2,
    fields=(
        *(
            field
            for field in llama_fields(2880, 36, 64, 8, 2880, 131072)
            if field.setting not in ("activation", "ffn_hidden_size", "num_query_groups")
        ),
        setting_field("num_query_groups", "num_key_value_heads", 8, nullable=True),
        setting_field("activation", "hidden_act", "silu", codes={"silu": "quick_geglu"}),
        setting_field("kv_channels", "head_dim", 64),
        setting_field("layernorm_epsilon", "rms_norm_eps", 1e-5),
        bias_field("attention_bias", True),
        window_field(128),
        setting_field("moe_ffn_hidden_size", "intermediate_size", 2880),
        setting_field("num_experts", "num_local_experts", 128, alias="num_experts"),
        setting_field("moe_router_topk", "num_experts_per_tok", 4),
        setting_field("activation_func_clamp_value", "swiglu_limit", 7.0),
        refused_field("swiglu_alpha", "another gain in its gates", 1.702, default=1.702),
        read_field("quantization_config", "MXFP4 weights are dequantised", nullable=True),
        *other_fields(
            Use.METADATA,
            "of the first release; num_experts_per_tok and the rotary settings decide",
            "experts_per_token",
            "initial_context_length",
        ),
        *other_fields(Use.METADATA, "which outputs are returned", "output_router_logits"),
        *other_fields(Use.TRAINING, "the loss that balances the experts", "router_aux_loss_coef"),
    ),
    rows=_rows(),
)
