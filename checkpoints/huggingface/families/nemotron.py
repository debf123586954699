"""Nemotron-H: hybrids of Mamba-2, attention, MLPs and experts, one branch a layer.

Source: the modeling and configuration files of transformers 5.23.
"""

from __future__ import annotations

import dataclasses

from mlm_eval.checkpoints.huggingface.families.family import ATTENTION, DECODER_LAYER, Family, Row
from mlm_eval.checkpoints.huggingface.fields import (
    CAUSAL_FIELDS,
    VOCAB_SIZE,
    Field,
    Use,
    other_fields,
    read_field,
    refused_field,
    setting_field,
    tied_field,
)
from mlm_eval.checkpoints.huggingface.layout import EXPERTS, SPLIT_QKV
from mlm_eval.checkpoints.parameters import MAMBA_VECTORS

_THEIRS = "backbone.layers.{i}"
"""As published files have it, and transformers writes it; its own modules are called model."""
_MIXER = f"{_THEIRS}.mixer"
_MLP = f"{DECODER_LAYER}.mlp"


def _rows() -> tuple[Row, ...]:
    """Return the names of all parts; a layer has those of its kind, and one norm."""
    mamba = f"{DECODER_LAYER}.mixer"
    qkv = tuple(f"{_MIXER}.{which}_proj" for which in "qkv")
    bias = f"{_MIXER}.gate.e_score_correction_bias"
    experts, shared = f"{_MLP}.experts", f"{_MLP}.shared_experts"
    in_layers = (
        Row(f"{DECODER_LAYER}.input_layernorm", (f"{_THEIRS}.norm",), False),
        Row(f"{DECODER_LAYER}.pre_mlp_layernorm", (f"{_THEIRS}.norm",), False),
        *(Row(f"{mamba}.{name}", (f"{_MIXER}.{name}",), tensor=True) for name in MAMBA_VECTORS),
        Row(f"{mamba}.in_proj", (f"{_MIXER}.in_proj",), False),
        Row(f"{mamba}.conv1d", (f"{_MIXER}.conv1d",)),
        Row(f"{mamba}.norm", (f"{_MIXER}.norm",), False),
        Row(f"{mamba}.out_proj", (f"{_MIXER}.out_proj",), False),
        Row(f"{ATTENTION}.linear_qkv", qkv, False, SPLIT_QKV),
        Row(f"{ATTENTION}.linear_proj", (f"{_MIXER}.o_proj",), False),
        Row(f"{_MLP}.linear_fc1", (f"{_MIXER}.up_proj",), False),
        Row(f"{_MLP}.linear_fc2", (f"{_MIXER}.down_proj",), False),
        Row(f"{_MLP}.router", (f"{_MIXER}.gate",), False),
        Row(f"{_MLP}.router.expert_bias", (bias,), tensor=True),
        Row(
            f"{experts}.linear_fc1",
            (f"{_MIXER}.experts.{{e}}.up_proj",),
            False,
            EXPERTS,
            whole=f"{_MIXER}.experts.up_proj",
        ),
        Row(
            f"{experts}.linear_fc2",
            (f"{_MIXER}.experts.{{e}}.down_proj",),
            False,
            EXPERTS,
            whole=f"{_MIXER}.experts.down_proj",
        ),
        Row(f"{shared}.linear_fc1", (f"{_MIXER}.shared_experts.up_proj",), False),
        Row(f"{shared}.linear_fc2", (f"{_MIXER}.shared_experts.down_proj",), False),
    )
    return (
        Row("embedding.word_embeddings", ("backbone.embeddings",), False),
        *(dataclasses.replace(row, optional=True) for row in in_layers),
        Row("decoder.final_layernorm", ("backbone.norm_f",), False),
        Row("output_layer", ("lm_head",), False, optional=True),
    )


NEMOTRON_H = Family(
    model_type="nemotron_h",
    model_class="NemotronHForCausalLM",
    prefix="backbone.",
    other_prefix="model.",
    hybrid=True,
    shared=CAUSAL_FIELDS,
    constants={
        "normalization": "RMSNorm",
        "position_embedding_type": "none",
        "hidden_dropout": 0.0,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    fields=(
        VOCAB_SIZE,
        setting_field("hidden_size", "hidden_size", 4096),
        Field(
            "layers_block_type",
            Use.READ,
            "each layer's kind",
            aliases=("layer_types",),
            nullable=True,
        ),
        read_field("hybrid_override_pattern", "the same, a letter each", nullable=True),
        setting_field("num_attention_heads", "num_attention_heads", 32),
        setting_field("num_query_groups", "num_key_value_heads", 8, nullable=True),
        setting_field("kv_channels", "head_dim", 128),
        setting_field("ffn_hidden_size", "intermediate_size", 21504),
        setting_field(
            "activation",
            "mlp_hidden_act",
            "relu2",
            codes={"relu2": "squared_relu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"},
        ),
        setting_field("max_position_embeddings", "max_position_embeddings", 4096),
        setting_field("attention_dropout", "attention_dropout", 0.0),
        setting_field("init_method_std", "initializer_range", 0.02),
        setting_field("layernorm_epsilon", "layer_norm_epsilon", 1e-5),
        setting_field("mamba_num_heads", "mamba_num_heads", 128),
        setting_field("mamba_head_dim", "mamba_head_dim", 64),
        setting_field("mamba_num_groups", "n_groups", 8),
        setting_field("mamba_state_dim", "ssm_state_size", 128),
        setting_field("mamba_conv_width", "conv_kernel", 4),
        setting_field("mamba_min_time_step", "time_step_min", 0.001),
        setting_field("num_experts", "n_routed_experts", 8, alias="num_local_experts"),
        setting_field("moe_router_topk", "num_experts_per_tok", 2),
        setting_field("moe_ffn_hidden_size", "moe_intermediate_size", 7688),
        setting_field(
            "moe_shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", 7688
        ),
        read_field("routed_scaling_factor", "multiplies the experts' weights", 1.0),
        read_field("n_group", "the number of groups", 1),
        read_field("topk_group", "the number of groups that are kept", 1),
        read_field("norm_topk_prob", "whether the chosen experts' weights add up to 1", True),
        read_field(
            "num_nextn_predict_layers", "layers for multi-token prediction, which are left out", 0
        ),
        tied_field(False),
        refused_field(
            "mamba_hidden_act", "another activation than silu", "silu", "swish", default="silu"
        ),
        refused_field("use_conv_bias", "a convolution without a bias", True, default=True),
        refused_field("use_bias", "biases in Mamba's linear layers", False, default=False),
        refused_field("mlp_bias", "biases in its MLPs", False, default=False),
        refused_field("attention_bias", "biases in its attention", False, default=False),
        refused_field("mamba_proj_bias", "biases in Mamba's linear layers", False, default=False),
        refused_field("moe_latent_size", "experts that work in a latent width", None),
        *other_fields(
            Use.NUMERICS,
            "kernels and caches of the same function",
            "chunk_size",
            "mamba_ssm_cache_dtype",
            "moe_shared_expert_overlap",
            "residual_in_fp32",
            "use_mamba_kernels",
            "num_logits_to_keep",
            "output_router_logits",
        ),
        *other_fields(
            Use.TRAINING,
            "how weights were drawn, and what training drops",
            "time_step_max",
            "time_step_floor",
            "rescale_prenorm_residual",
            "hidden_dropout",
        ),
        *other_fields(
            Use.METADATA,
            "read nowhere: sizes that other keys say, or of heads that are left out",
            "expand",
            "num_hidden_layers",
            "n_shared_experts",
            "time_step_limit",
            "mtp_layers_block_type",
            "mtp_hybrid_override_pattern",
        ),
    ),
    rows=_rows(),
)
