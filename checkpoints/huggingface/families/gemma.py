"""Gemma, Gemma 2 and Gemma 3: scaled embeddings, gains about 1, norms of branches, caps, windows.

Source: the modeling and configuration files of transformers 5.23.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mlm_eval.checkpoints.huggingface.families.family import ATTENTION, DECODER_LAYER, Family, Row
from mlm_eval.checkpoints.huggingface.families.llama import (
    RMS_EPSILON,
    RMS_ROPE,
    llama_fields,
    llama_rows,
    window_field,
)
from mlm_eval.checkpoints.huggingface.fields import (
    GATED,
    Field,
    Use,
    bias_field,
    other_fields,
    read_field,
    refused_field,
    setting_field,
)

_BOTH_WAYS = refused_field(
    "use_bidirectional_attention", "attention to later positions", False, None
)
_HEAD_DIM = setting_field("kv_channels", "head_dim", 256)
_TEXT = {**RMS_ROPE, "layernorm_zero_centered_gamma": True}


def _later_fields(
    positions: int, attention_cap: tuple[Field, ...], logit_cap: float | None
) -> tuple[Field, ...]:
    """Return the keys of Gemma 2 and 3."""
    fields = llama_fields(2304, 26, 8, 4, 9216, positions, tied=True)
    cap = setting_field(
        "final_logit_softcapping", "final_logit_softcapping", logit_cap, nullable=True
    )
    return (
        *(field for field in fields if field.setting != "activation"),
        setting_field("activation", "hidden_activation", "gelu_pytorch_tanh", codes=GATED),
        _HEAD_DIM,
        RMS_EPSILON,
        refused_field("attention_bias", "biases in normed branches", False, default=False),
        read_field("query_pre_attn_scalar", "attention scores are divided by its root", 256),
        *attention_cap,
        cap,
        window_field(4096),
        *other_fields(Use.METADATA, "an older name of hidden_activation, unread", "hidden_act"),
    )


def _later_rows(*, qk_norm: bool) -> Iterator[Row]:
    """Yield the names of Gemma 2 and 3: four norms in a layer."""
    theirs = "model.layers.{i}."
    for row in llama_rows(False, qk_norm=qk_norm):
        if row.canonical.endswith(".pre_mlp_layernorm"):
            row = dataclasses.replace(row, names=(f"{theirs}pre_feedforward_layernorm",))
        yield row
        if row.canonical == f"{ATTENTION}.linear_proj":
            name = f"{theirs}post_attention_layernorm"
            yield Row(f"{ATTENTION}.linear_proj.post_layernorm", (name,), False)
        elif row.canonical == f"{DECODER_LAYER}.mlp.linear_fc2":
            name = f"{theirs}post_feedforward_layernorm"
            yield Row(f"{DECODER_LAYER}.mlp.linear_fc2.post_layernorm", (name,), False)


GEMMA = Family(
    model_type="gemma",
    model_class="GemmaForCausalLM",
    constants=_TEXT,
    fields=(
        *llama_fields(
            3072,
            28,
            16,
            16,
            24576,
            8192,
            tied=True,
            activation="gelu_pytorch_tanh",
            codes={**GATED, "gelu": "geglu_tanh"},  # the first files say gelu and mean tanh
        ),
        _HEAD_DIM,
        RMS_EPSILON,
        bias_field("attention_bias", False),
        dataclasses.replace(_BOTH_WAYS, default=None),
        *other_fields(Use.METADATA, "a later name of hidden_act, unread", "hidden_activation"),
    ),
    rows=llama_rows("attention_bias", "attention_bias"),
    scaled_embeddings=True,
)
GEMMA2 = Family(
    model_type="gemma2",
    model_class="Gemma2ForCausalLM",
    constants={**_TEXT, "branch_layernorm": True},
    fields=(
        *_later_fields(
            8192,
            (
                setting_field(
                    "attn_logit_softcapping", "attn_logit_softcapping", 50.0, nullable=True
                ),
            ),
            30.0,
        ),
        dataclasses.replace(_BOTH_WAYS, default=None),
        *other_fields(
            Use.NUMERICS,
            "the kind of cache that text is generated with",
            "cache_implementation",
        ),
    ),
    rows=tuple(_later_rows(qk_norm=False)),
    scaled_embeddings=True,
    windows="alternate",
    window_period=2,
)
GEMMA3 = Family(
    model_type="gemma3_text",
    model_class="Gemma3ForCausalLM",
    constants={**_TEXT, "branch_layernorm": True, "qk_layernorm": True},
    fields=(
        *_later_fields(
            131072,
            (
                refused_field(
                    "attn_logit_softcapping",
                    "capped attention scores, which transformers' Gemma 3 stores and leaves out",
                    None,
                ),
            ),
            None,
        ),
        dataclasses.replace(_BOTH_WAYS, default=False),
        read_field("sliding_window_pattern", "every so many layers one has no window", 6),
        read_field("rope_local_base_freq", "the rotary base of layers with a window"),
        *other_fields(
            Use.NUMERICS,
            "the kind of cache that text is generated with",
            "cache_implementation",
        ),
        *other_fields(
            Use.METADATA,
            "of the model of text and images, or kept from sliding_window_pattern",
            "_sliding_window_pattern",
            "image_size",
            "image_token_id",
            "layer_norm_eps",
            "mm_tokens_per_image",
            "patch_size",
            "text_config",
            "vision_config",
        ),
    ),
    rows=tuple(_later_rows(qk_norm=True)),
    scaled_embeddings=True,
    theta=1000000.0,
    local_theta=10000.0,
    windows="alternate",
    window_period=6,
)
