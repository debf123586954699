"""T5: an encoder and a decoder with relative positions, RMSNorm and no biases.

Source: the modeling and configuration files of transformers 5.23.
"""

from __future__ import annotations

import dataclasses

from mlm_eval.checkpoints.huggingface.families.family import Family, Row
from mlm_eval.checkpoints.huggingface.fields import (
    COMMON_FIELDS,
    VOCAB_SIZE,
    Field,
    Use,
    other_fields,
    read_field,
    refused_field,
    setting_field,
    tied_field,
)
from mlm_eval.checkpoints.huggingface.layout import GATE_UP, SPLIT_KV, SPLIT_QKV
from mlm_eval.checkpoints.parameters import RELATIVE_BIASES

ACTIVATIONS_OF_T5 = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu2": "squared_relu",
    "gated-gelu": "geglu_tanh",  # by a rule of its own: gelu_new
    "gated-gelu_new": "geglu_tanh",
    "gated-gelu_pytorch_tanh": "geglu_tanh",
    "gated-silu": "swiglu",
    "gated-swish": "swiglu",
}
"""feed_forward_proj -> ours; the first of each kind is the one that is written."""


def _stack_rows(stack: str, *, gated: bool) -> tuple[Row, ...]:
    own, theirs = f"{stack}.layers.{{i}}.", f"{stack}.block.{{i}}.layer."
    across = stack == "decoder"
    attention, mlp = f"{theirs}0.SelfAttention.", f"{theirs}{2 if across else 1}."
    inner = f"{mlp}DenseReluDense."
    fc1 = Row(f"{own}mlp.linear_fc1", (f"{inner}wi",), False)
    if gated:
        fc1 = Row(f"{own}mlp.linear_fc1", (f"{inner}wi_0", f"{inner}wi_1"), False, GATE_UP)
    cross: tuple[Row, ...] = ()
    if across:
        look = f"{theirs}1.EncDecAttention."
        cross = (
            Row(f"{own}pre_cross_attn_layernorm", (f"{theirs}1.layer_norm",), False),
            Row(f"{own}cross_attention.linear_q", (f"{look}q",), False),
            Row(f"{own}cross_attention.linear_kv", (f"{look}k", f"{look}v"), False, SPLIT_KV),
            Row(f"{own}cross_attention.linear_proj", (f"{look}o",), False),
        )
    return (
        Row(f"{own}input_layernorm", (f"{theirs}0.layer_norm",), False),
        Row(
            f"{own}self_attention.linear_qkv",
            tuple(f"{attention}{which}" for which in "qkv"),
            False,
            SPLIT_QKV,
        ),
        Row(f"{own}self_attention.linear_proj", (f"{attention}o",), False),
        *cross,
        Row(f"{own}pre_mlp_layernorm", (f"{mlp}layer_norm",), False),
        fc1,
        Row(f"{own}mlp.linear_fc2", (f"{inner}wo",), False),
        Row(f"{stack}.final_layernorm", (f"{stack}.final_layer_norm",), False),
    )


def _t5_rows(*, gated: bool) -> tuple[Row, ...]:
    positions = (
        Row(
            name.removesuffix(".weight"),
            (f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",),
            False,
        )
        for stack, name in zip(("encoder", "decoder"), RELATIVE_BIASES, strict=True)
    )
    return (
        Row("embedding.word_embeddings", ("shared",), False),
        *positions,
        *_stack_rows("encoder", gated=gated),
        *_stack_rows("decoder", gated=gated),
        Row("output_layer", ("lm_head",), False, optional=True),
        Row("output_layer", ("lm_head",), optional=True, weight=False),
    )


def _t5_fields(activation: str, layers: int, heads: int, ffn: int) -> tuple[Field, ...]:
    codes = ACTIVATIONS_OF_T5
    buckets, furthest = "relative_attention_num_buckets", "relative_attention_max_distance"
    return (
        VOCAB_SIZE,
        setting_field("hidden_size", "d_model", 512, alias="hidden_size"),
        setting_field("kv_channels", "d_kv", 64, alias="head_dim"),
        setting_field("ffn_hidden_size", "d_ff", ffn),
        setting_field("num_layers", "num_layers", layers, alias="num_hidden_layers"),
        setting_field("decoder_num_layers", "num_decoder_layers", None, nullable=True),
        setting_field("num_attention_heads", "num_heads", heads, alias="num_attention_heads"),
        setting_field(buckets, buckets, 32),
        setting_field(furthest, furthest, 128),
        setting_field("activation", "feed_forward_proj", activation, codes=codes),
        setting_field("layernorm_epsilon", "layer_norm_epsilon", 1e-6),
        # transformers has no limit; the texts that the published models saw had so many.
        setting_field("max_position_embeddings", "n_positions", 512),
        setting_field("hidden_dropout", "dropout_rate", 0.1),
        tied_field(True),
        read_field("scale_decoder_outputs", "multiplies the decoder's states by d_model^-0.5"),
        read_field("is_encoder_decoder", "T5 has both", True),
        refused_field("is_decoder", "a decoder alone", False, default=False),
        refused_field("is_causal", "one mask for both stacks", None),
        *other_fields(
            Use.METADATA, "follow from feed_forward_proj, and must", "dense_act_fn", "is_gated_act"
        ),
    )


GATED_T5 = Family(
    model_type="t5",
    kind="t5",
    model_class="T5ForConditionalGeneration",
    prefix="",
    shared=COMMON_FIELDS,
    fields=_t5_fields("relu", 6, 8, 2048),
    constants={
        "normalization": "RMSNorm",
        "position_embedding_type": "relative",
        "attention_dropout": 0.0,
    },
    rows=_t5_rows(gated=True),
)
PLAIN_T5 = dataclasses.replace(GATED_T5, rows=_t5_rows(gated=False), gated=GATED_T5)

MT5 = dataclasses.replace(
    PLAIN_T5,
    model_type="mt5",
    model_class="MT5ForConditionalGeneration",
    fields=_t5_fields("gated-gelu", 8, 6, 1024),
    gated=dataclasses.replace(
        GATED_T5,
        model_type="mt5",
        model_class="MT5ForConditionalGeneration",
        fields=_t5_fields("gated-gelu", 8, 6, 1024),
    ),
)
"""T5 v1.1 in many languages: read, and written as a T5, which computes the same."""
