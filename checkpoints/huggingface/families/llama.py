"""The names and keys that Llama introduced, which most families since then share."""

from __future__ import annotations

from collections.abc import Mapping

from mlm_eval.checkpoints.huggingface.families.family import ATTENTION, DECODER_LAYER, Row
from mlm_eval.checkpoints.huggingface.fields import (
    GATED,
    VOCAB_SIZE,
    Field,
    read_field,
    setting_field,
    tied_field,
)
from mlm_eval.checkpoints.huggingface.layout import GATE_UP, SAME, SPLIT_QKV

RMS_ROPE = {"normalization": "RMSNorm", "position_embedding_type": "rope", "hidden_dropout": 0.0}
"""Settings of every model with RMSNorm and rotary positions."""
HEAD_DIM = setting_field("kv_channels", "head_dim", None, nullable=True)
RMS_EPSILON = setting_field("layernorm_epsilon", "rms_norm_eps", 1e-6)


def llama_fields(
    hidden: int,
    layers: int,
    heads: int,
    groups: int | None,
    ffn: int,
    positions: int,
    *,
    std: float = 0.02,
    tied: bool = False,
    activation: str = "silu",
    codes: Mapping[str, str] = GATED,
    width: str = "ffn_hidden_size",
) -> tuple[Field, ...]:
    """Return the keys that Llama introduced and many families share, with their defaults.

    `intermediate_size` is our setting `width`, of an expert where no layer has a plain MLP.
    """
    return (
        VOCAB_SIZE,
        setting_field("hidden_size", "hidden_size", hidden),
        setting_field("num_layers", "num_hidden_layers", layers),
        setting_field("num_attention_heads", "num_attention_heads", heads),
        setting_field("num_query_groups", "num_key_value_heads", groups, nullable=True),
        setting_field(width, "intermediate_size", ffn),
        setting_field("activation", "hidden_act", activation, codes=codes),
        setting_field("max_position_embeddings", "max_position_embeddings", positions),
        setting_field("attention_dropout", "attention_dropout", 0.0),
        setting_field("init_method_std", "initializer_range", std),
        tied_field(tied),
        read_field("rope_theta", "the rotary base, where the rotary settings have none"),
        read_field("partial_rotary_factor", "the share of rotated channels, alike"),
    )


def llama_rows(
    qkv_bias: bool | str,
    output_bias: bool | str = False,
    mlp_bias: bool | str = False,
    *,
    norm_bias: bool = False,
    qk_norm: bool = False,
    fc1: tuple[str, ...] = ("gate_proj", "up_proj"),
    fc2: str = "down_proj",
) -> tuple[Row, ...]:
    """Return the names that Llama introduced and many families share.

    Args:
        qkv_bias: Whether queries, keys and values have biases (see `Row`).
        output_bias: The same for the attention's output.
        mlp_bias: The same for the MLP.
        norm_bias: LayerNorm rather than RMSNorm.
        qk_norm: Whether queries and keys are normed.
        fc1: The MLP's first matrix; two where it is gated.
        fc2: The MLP's second matrix.
    """
    theirs = "model.layers.{i}."
    attention = f"{theirs}self_attn."
    qkv = tuple(f"{attention}{which}_proj" for which in "qkv")
    norms = tuple(
        Row(f"{ATTENTION}.{which}_layernorm", (f"{attention}{which}_norm",), False)
        for which in "qk"
    )
    mlp_in = tuple(f"{theirs}mlp.{name}" for name in fc1)
    return (
        Row("embedding.word_embeddings", ("model.embed_tokens",), False),
        Row(f"{DECODER_LAYER}.input_layernorm", (f"{theirs}input_layernorm",), norm_bias),
        Row(f"{ATTENTION}.linear_qkv", qkv, qkv_bias, SPLIT_QKV),
        *(norms if qk_norm else ()),
        Row(f"{ATTENTION}.linear_proj", (f"{attention}o_proj",), output_bias),
        Row(
            f"{DECODER_LAYER}.pre_mlp_layernorm", (f"{theirs}post_attention_layernorm",), norm_bias
        ),
        Row(
            f"{DECODER_LAYER}.mlp.linear_fc1", mlp_in, mlp_bias, GATE_UP if len(fc1) == 2 else SAME
        ),
        Row(f"{DECODER_LAYER}.mlp.linear_fc2", (f"{theirs}mlp.{fc2}",), mlp_bias),
        Row("decoder.final_layernorm", ("model.norm",), norm_bias),
        Row("output_layer", ("lm_head",), False, optional=True),
    )


def window_field(default: int | None) -> Field:
    """Return the key of the sliding window."""
    return read_field(
        "sliding_window", "keys that a query sees, its own included", default, nullable=True
    )


WINDOW_SWITCHES = (
    window_field(4096),
    read_field("use_sliding_window", "whether there is a sliding window", False),
    read_field("max_window_layers", "layers from here on attend within the window", 28),
)
"""Qwen's keys of a window that only some layers have."""
