"""What each key of config.json does to the function: read, refused, or why it is passed over.

A family's table (`families`) is its own fields and those here, which every family shares. A key
that stands in no table is listed in a warning: nothing of a config.json is ignored in silence.

Source: the configuration and modeling files of transformers 5.23, and the keys that its versions
since 2018 wrote (`PretrainedConfig.to_dict`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Use(StrEnum):
    """What a key of config.json does."""

    READ = "read"
    REFUSED = "refused"
    """It changes the function, but for its harmless values."""
    NUMERICS = "numerics only"
    TRAINING = "training only"
    METADATA = "no part of the function"


@dataclass(frozen=True)
class Field:
    """One key of config.json, what it does, and why."""

    key: str
    use: Use
    reason: str
    default: Any = None
    """transformers' value where the key is absent."""
    setting: str = ""
    """ModelConfig's name, where the key holds just that."""
    aliases: tuple[str, ...] = ()
    """Other names of the key; where a file has both, transformers takes these."""
    written: str = ""
    """The name that is written, where it is not `key`."""
    nullable: bool = False
    """Whether null is a value; elsewhere transformers stops there, and so does the reader."""
    switch: bool = False
    """Rows of the family name this key as their `bias`."""
    codes: Mapping[str, str] = field(default_factory=dict)
    """config.json's words -> ours; the first of each kind is the one that is written."""
    harmless: tuple[Any, ...] = ()
    """The values of a refused key that leave the function as it is; the first is written."""


GELU = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",  # exactly F.gelu(approximate="tanh"): the one to write
    "gelu_new": "gelu_tanh",  # the same function, in float arithmetic of its own
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu2": "squared_relu",
}
"""config.json's activation -> ours; the first of each kind is the one that is written."""
GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "gelu_fast": "geglu_tanh",
    "gelu": "geglu",
    "gelu_python": "geglu",
    "quick_gelu": "quick_geglu",
}
"""The same of MLPs with a gate."""

DROPOUT_AND_INIT = ("hidden_dropout", "attention_dropout", "init_method_std")
"""Settings of ModelConfig that change no result; some families do not record them."""


def setting_field(
    setting: str,
    key: str,
    default: Any,
    *,
    nullable: bool = False,
    alias: str | None = None,
    codes: Mapping[str, str] | None = None,
) -> Field:
    """Return a key that holds a setting of ModelConfig."""
    return Field(
        key,
        Use.TRAINING if setting in DROPOUT_AND_INIT else Use.READ,
        f"ModelConfig.{setting}",
        default,
        setting,
        (alias,) if alias else (),
        nullable=nullable,
        codes=codes or {},
    )


def bias_field(key: str, default: bool) -> Field:
    """Return a key that says which modules have biases."""
    return Field(key, Use.READ, "says which modules have biases", default, switch=True)


def read_field(key: str, reason: str, default: Any = None, *, nullable: bool = False) -> Field:
    """Return a key that code of its own reads."""
    return Field(key, Use.READ, reason, default, nullable=nullable)


def tied_field(default: bool) -> Field:
    """Return the key that says whether the output table is the input's."""
    return read_field("tie_word_embeddings", "whether the output table is the input's", default)


def refused_field(key: str, what: str, *harmless: Any, default: Any = None) -> Field:
    """Return a key that changes the function, but for its harmless values."""
    return Field(key, Use.REFUSED, what, default, harmless=harmless)


def other_fields(use: Use, reason: str, *keys: str) -> tuple[Field, ...]:
    """Return keys that are passed over, for one reason."""
    return tuple(Field(key, use, reason) for key in keys)


VOCAB_SIZE = read_field("vocab_size", "must be the embeddings' number of rows")

COMMON_FIELDS = (
    read_field("model_type", "chooses the family"),
    read_field("architectures", "chooses BERT's head; a class of another kind is named"),
    read_field("auto_map", "names code of the model's own, which is not run: a warning says so"),
    refused_field("quantization_config", "quantized weights", None),
    refused_field("quantization", "weights quantized by MLX", None),
    refused_field("compression_config", "compressed weights", None),
    refused_field("per_layer_config", "settings that differ between layers", None, {}),
    refused_field("pruned_heads", "pruned attention heads", None, {}),
    refused_field("transformers_weights", "weights in a file of another name", None),
    refused_field("is_encoder_decoder", "an encoder and a decoder", False, None, default=False),
    refused_field("tie_encoder_decoder", "an encoder and a decoder", False, None, default=False),
    *other_fields(
        Use.NUMERICS,
        "dtype, kernels and memory of the run that saved the file",
        "dtype",
        "torch_dtype",
        "use_bfloat16",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_flash_attn_2_enabled",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "chunk_size_feed_forward",
        "fusion_config",
        "distributed_config",
        "device_map",
        "torchscript",
        "xla_device",
    ),
    *other_fields(
        Use.TRAINING,
        "how the model was or will be trained",
        "gradient_checkpointing",
        "initializer_factor",
        "tf_legacy_loss",
        "problem_type",
        "finetuning_task",
        "classifier_dropout",
    ),
    *other_fields(
        Use.METADATA,
        "names the file, its software or its tokenizer",
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "transformers_version",
        "tokenizer_class",
        "custom_pipelines",
        "model_max_length",
        "language",
        "unsloth_fixed",
        "unsloth_version",
        "transformers.js_config",
    ),
    *other_fields(
        Use.METADATA,
        "which outputs are returned, and the names of a head's outputs; weights tell their number",
        "id2label",
        "label2id",
        "num_labels",
        "_num_labels",
        "return_dict",
        "use_return_dict",
        "output_attentions",
        "_output_attentions",
        "output_hidden_states",
        "output_past",
        "tie_last_hidden_states",
    ),
    *other_fields(
        Use.METADATA,
        "special tokens, which the tokenizer says",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "cls_token_id",
        "mask_token_id",
        "unk_token_id",
        "decoder_start_token_id",
        "prefix",
    ),
    *other_fields(
        Use.METADATA,
        "how text is generated",
        "use_cache",
        "task_specific_params",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "target_lookbehind",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    ),
    *other_fields(
        Use.METADATA,
        "of cross-attention, which is refused where it is on",
        "cross_attention_hidden_size",
    ),
)
"""What transformers' base class and its generic code read, and what older versions wrote."""

CAUSAL_FIELDS = (
    *COMMON_FIELDS,
    read_field("layer_types", "which layers attend within the sliding window", nullable=True),
    read_field("sliding_window", "limits the positions, with a warning", nullable=True),
    read_field("head_dim", "must be hidden size / heads here", nullable=True),
    refused_field("is_causal", "attention to later positions", True, default=True),
    refused_field("attention_chunk_size", "attention within chunks", None),
    refused_field("kv_sharing_modes", "keys and values that layers share", None),
    refused_field("num_kv_shared_layers", "keys and values that layers share", None, 0),  # to 5.22
    refused_field("number_of_conv_states", "convolutions", None),
    refused_field("add_cross_attention", "cross-attention", False, default=False),
    *other_fields(Use.METADATA, "causal either way", "is_decoder"),
)
"""Besides, what generic code of causal models reads (masks, caches)."""

ROTARY_FIELDS = (
    read_field("rope_parameters", "transformers 5's rotary settings", nullable=True),
    read_field("rope_scaling", "the older name, which wins", nullable=True),
    read_field(
        "original_max_position_embeddings", "of Llama-3 scaling; wins over rope_scaling's own"
    ),
)
