"""THE TABLES: each Hugging Face family's names and config.json keys, read in both directions.

A `Row` pairs a canonical module with its Hugging Face modules; `{i}` runs over the layers, `{i-1}`
is the layer before and `{last}` the last one (BERT's original order has a norm after each layer
where Megatron has it before the next one). `fields` says of each key of config.json what it does
(see `fields.Field`), with the value that transformers takes where the key is absent.

Source: the modeling and configuration files of transformers 5.23.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mlm_eval.checkpoints.huggingface.fields import (
    CAUSAL_FIELDS,
    COMMON_FIELDS,
    ROTARY_FIELDS,
    Field,
    Use,
    bias_field,
    other_fields,
    read_field,
    refused_field,
    setting_field,
)
from mlm_eval.checkpoints.huggingface.layout import (
    CONV1D,
    CONV1D_QKV,
    GATE_UP,
    SAME,
    SPLIT_QKV,
    Layout,
)

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
GATED = {"silu": "swiglu", "swish": "swiglu"}


@dataclass(frozen=True)
class Row:
    """One module of both sides. `bias`: always, never, or as a key of config.json says."""

    canonical: str
    names: tuple[str, ...]
    bias: bool | str = True
    layout: Layout = SAME
    optional: bool = False
    """Present only in models that have it: heads, an untied output table, QK norms."""
    weight: bool = True

    def has_bias(self, switches: Mapping[str, bool]) -> bool:
        """Return whether the module has a bias, where config.json says `switches`."""
        return switches[self.bias] if isinstance(self.bias, str) else self.bias


BERT_ENDS = (
    "Model",
    "LMHeadModel",
    "ForCausalLM",
    "ForPreTraining",
    "ForMaskedLM",
    "ForNextSentencePrediction",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForQuestionAnswering",
)
"""What the names of BERT's classes end with."""


@dataclass(frozen=True)
class Family:
    """One architecture of transformers."""

    model_type: str
    model_class: str
    """The class with its language-model head; `Bert` and `MegatronBert` take a head's name."""
    rows: tuple[Row, ...]
    fields: tuple[Field, ...]
    kind: str = "gpt"
    """ModelConfig.family."""
    prefix: str = "model."
    """What the base model's names begin with, in a model with a head."""
    shared: tuple[Field, ...] = (*CAUSAL_FIELDS, *ROTARY_FIELDS)
    """Keys that many families read alike; `fields` wins."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """ModelConfig settings that every model of the family has."""
    partial_rotary: float | None = None
    """transformers' default share of rotated channels; None where all are."""
    rotary_keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    """Base and share of rotated channels before transformers 5."""

    @cached_property
    def table(self) -> dict[str, Field]:
        """Every known key of config.json, aliases included."""
        rows = (*self.shared, *self.fields)
        return {key: row for row in rows for key in (row.key, *row.aliases)}

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated; other models have a table of positions."""
        return self.constants.get("position_embedding_type") == "rope"

    @cached_property
    def activation(self) -> Field:
        """The key that names the activation."""
        return next(row for row in self.fields if row.setting == "activation")

    @cached_property
    def classes(self) -> set[str]:
        """Names of the classes whose function is read, in small letters."""
        stem = self.model_class.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        ends = ("Model", "ForCausalLM", "LMHeadModel") if self.kind == "gpt" else BERT_ENDS
        return {f"{stem}{end}".lower() for end in ends}

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """Keys of config.json that rows name as their `bias`."""
        return tuple(row.key for row in self.fields if row.switch)


IGNORED_TENSORS = re.compile(
    r"(^|\.)(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|(^|\.)position_ids$"
)
"""Buffers that older versions of transformers stored: causal masks, rotary tables, positions."""

PARALLEL = "attention and MLP side by side (a parallel residual)"

VOCAB_SIZE = read_field("vocab_size", "must be the embeddings' number of rows")


def _tied(default: bool) -> Field:
    return read_field("tie_word_embeddings", "whether the output table is the input's", default)


_LAYER = "decoder.layers.{i}"
_ATTENTION = f"{_LAYER}.self_attention"

GPT2 = Family(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    prefix="transformer.",
    shared=CAUSAL_FIELDS,
    constants={"add_bias_linear": True, "add_qkv_bias": True},
    fields=(
        VOCAB_SIZE,
        setting_field("hidden_size", "n_embd", 768, alias="hidden_size"),
        setting_field("num_layers", "n_layer", 12, alias="num_hidden_layers"),
        setting_field("num_attention_heads", "n_head", 12, alias="num_attention_heads"),
        setting_field("ffn_hidden_size", "n_inner", None, nullable=True),
        setting_field("activation", "activation_function", "gelu_new", codes=GELU),
        setting_field(
            "max_position_embeddings", "n_positions", 1024, alias="max_position_embeddings"
        ),
        setting_field("layernorm_epsilon", "layer_norm_epsilon", 1e-5),
        setting_field("hidden_dropout", "resid_pdrop", 0.1),
        setting_field("attention_dropout", "attn_pdrop", 0.1),
        setting_field("init_method_std", "initializer_range", 0.02),
        _tied(True),
        refused_field("scale_attn_weights", "unscaled attention scores", True, default=True),
        refused_field(
            "scale_attn_by_inverse_layer_idx", "scores scaled by layer", False, default=False
        ),
        refused_field("add_cross_attention", "cross-attention", False, default=False),
        *other_fields(Use.NUMERICS, "the order of two products", "reorder_and_upcast_attn"),
        *other_fields(
            Use.TRAINING,
            "dropout",
            "embd_pdrop",
            "hidden_dropout",
            "summary_first_dropout",
            "summary_last_dropout",
        ),
        *other_fields(
            Use.METADATA,
            "of GPT2DoubleHeadsModel's second head, whose tensors are refused",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
        ),
        *other_fields(
            Use.METADATA,
            "of 2019; positions and tokens are told elsewhere",
            "n_ctx",
            "n_special",
            "predict_special_tokens",
        ),
    ),
    rows=(
        Row("embedding.word_embeddings", ("transformer.wte",), False),
        Row("embedding.position_embeddings", ("transformer.wpe",), False),
        Row(f"{_LAYER}.input_layernorm", ("transformer.h.{i}.ln_1",)),
        Row(f"{_ATTENTION}.linear_qkv", ("transformer.h.{i}.attn.c_attn",), layout=CONV1D_QKV),
        Row(f"{_ATTENTION}.linear_proj", ("transformer.h.{i}.attn.c_proj",), layout=CONV1D),
        Row(f"{_LAYER}.pre_mlp_layernorm", ("transformer.h.{i}.ln_2",)),
        Row(f"{_LAYER}.mlp.linear_fc1", ("transformer.h.{i}.mlp.c_fc",), layout=CONV1D),
        Row(f"{_LAYER}.mlp.linear_fc2", ("transformer.h.{i}.mlp.c_proj",), layout=CONV1D),
        Row("decoder.final_layernorm", ("transformer.ln_f",)),
        Row("output_layer", ("lm_head",), False, optional=True),
    ),
)


def _llama_fields(
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
) -> tuple[Field, ...]:
    """Return the keys that Llama introduced and many families share, with their defaults."""
    return (
        VOCAB_SIZE,
        setting_field("hidden_size", "hidden_size", hidden),
        setting_field("num_layers", "num_hidden_layers", layers),
        setting_field("num_attention_heads", "num_attention_heads", heads),
        setting_field("num_query_groups", "num_key_value_heads", groups, nullable=True),
        setting_field("ffn_hidden_size", "intermediate_size", ffn),
        setting_field("activation", "hidden_act", activation, codes=codes),
        setting_field("max_position_embeddings", "max_position_embeddings", positions),
        setting_field("attention_dropout", "attention_dropout", 0.0),
        setting_field("init_method_std", "initializer_range", std),
        _tied(tied),
        read_field("rope_theta", "the rotary base, where the rotary settings have none"),
        read_field("partial_rotary_factor", "the share of rotated channels, alike"),
    )


def _llama_rows(
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
        Row(f"{_ATTENTION}.{which}_layernorm", (f"{attention}{which}_norm",), False)
        for which in "qk"
    )
    mlp_in = tuple(f"{theirs}mlp.{name}" for name in fc1)
    return (
        Row("embedding.word_embeddings", ("model.embed_tokens",), False),
        Row(f"{_LAYER}.input_layernorm", (f"{theirs}input_layernorm",), norm_bias),
        Row(f"{_ATTENTION}.linear_qkv", qkv, qkv_bias, SPLIT_QKV),
        *(norms if qk_norm else ()),
        Row(f"{_ATTENTION}.linear_proj", (f"{attention}o_proj",), output_bias),
        Row(f"{_LAYER}.pre_mlp_layernorm", (f"{theirs}post_attention_layernorm",), norm_bias),
        Row(f"{_LAYER}.mlp.linear_fc1", mlp_in, mlp_bias, GATE_UP if len(fc1) == 2 else SAME),
        Row(f"{_LAYER}.mlp.linear_fc2", (f"{theirs}mlp.{fc2}",), mlp_bias),
        Row("decoder.final_layernorm", ("model.norm",), norm_bias),
        Row("output_layer", ("lm_head",), False, optional=True),
    )


_RMS = {"normalization": "RMSNorm", "position_embedding_type": "rope", "hidden_dropout": 0.0}
_HEAD_DIM = setting_field("kv_channels", "head_dim", None, nullable=True)
_RMS_EPSILON = setting_field("layernorm_epsilon", "rms_norm_eps", 1e-6)


def _window(default: int | None) -> Field:
    return read_field(
        "sliding_window", "limits the positions, with a warning", default, nullable=True
    )


_WINDOW_SWITCHES = (
    _window(4096),
    read_field("use_sliding_window", "whether there is a sliding window", False),
    read_field("max_window_layers", "layers from here on attend within the window", 28),
)

LLAMA = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    constants=_RMS,
    fields=(
        *_llama_fields(4096, 32, 32, None, 11008, 2048),
        _HEAD_DIM,
        _RMS_EPSILON,
        bias_field("attention_bias", False),
        bias_field("mlp_bias", False),
        *other_fields(Use.NUMERICS, "the order of sums, in transformers 4", "pretraining_tp"),
        refused_field("rope_interleaved", "rotary channels in pairs", False, None),
        *other_fields(
            Use.METADATA,
            "of conversions; no code reads it",
            "max_sequence_length",
            "is_llama_config",
        ),
    ),
    rows=_llama_rows("attention_bias", "attention_bias", "mlp_bias"),
)
MISTRAL = Family(
    model_type="mistral",
    model_class="MistralForCausalLM",
    constants=_RMS,
    fields=(
        *_llama_fields(4096, 32, 32, 8, 14336, 131072),
        _HEAD_DIM,
        _RMS_EPSILON,
        _window(4096),
    ),
    rows=_llama_rows(False),
)
QWEN2 = Family(
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    constants=_RMS,
    fields=(
        *_llama_fields(4096, 32, 32, 32, 22016, 32768),
        _HEAD_DIM,
        _RMS_EPSILON,
        *_WINDOW_SWITCHES,
        refused_field("use_mrope", "rotary positions in three parts", False, None),
    ),
    rows=_llama_rows(True),
)
QWEN3 = Family(
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    constants={**_RMS, "qk_layernorm": True},
    fields=(
        *_llama_fields(4096, 32, 32, 32, 22016, 32768),
        setting_field("kv_channels", "head_dim", 128),
        _RMS_EPSILON,
        bias_field("attention_bias", False),
        *_WINDOW_SWITCHES,
    ),
    rows=_llama_rows("attention_bias", "attention_bias", qk_norm=True),
)
_LAYER_NORM_ROPE = {"normalization": "LayerNorm", "position_embedding_type": "rope"}
STABLELM = Family(
    model_type="stablelm",
    model_class="StableLmForCausalLM",
    constants=_LAYER_NORM_ROPE,
    fields=(
        *_llama_fields(2560, 32, 32, 32, 6912, 4096),
        setting_field("layernorm_epsilon", "layer_norm_eps", 1e-5),
        setting_field("hidden_dropout", "hidden_dropout", 0.0),
        bias_field("use_qkv_bias", False),
        refused_field("use_parallel_residual", PARALLEL, False, default=False),
        refused_field("qk_layernorm", "a norm of its own for each head", False, default=False),
    ),
    rows=_llama_rows("use_qkv_bias", norm_bias=True),
    partial_rotary=0.25,
)
STARCODER2 = Family(
    model_type="starcoder2",
    model_class="Starcoder2ForCausalLM",
    constants=_LAYER_NORM_ROPE,
    fields=(
        *_llama_fields(
            3072,
            30,
            24,
            2,
            12288,
            4096,
            std=0.018042,
            tied=True,
            activation="gelu_pytorch_tanh",
            codes=GELU,
        ),
        _HEAD_DIM,
        setting_field("layernorm_epsilon", "norm_epsilon", 1e-5),
        setting_field("hidden_dropout", "residual_dropout", 0.0),
        bias_field("use_bias", True),
        _window(None),
        refused_field("mlp_type", "another kind of MLP", "default", None),
        refused_field("norm_type", "another kind of norm", "layer_norm", None),
        refused_field("scale_attn_weights", "unscaled attention scores", True, None),
        *other_fields(Use.TRAINING, "dropout", "embedding_dropout"),
        *other_fields(
            Use.NUMERICS,
            "the softmax's dtype, in the code that trained the model",
            "attention_softmax_in_fp32",
            "scale_attention_softmax_in_fp32",
        ),
        *other_fields(
            Use.METADATA,
            "that code's names of hidden_act and norm_epsilon, which decide",
            "activation_function",
            "layer_norm_epsilon",
        ),
    ),
    rows=_llama_rows(
        "use_bias", "use_bias", "use_bias", norm_bias=True, fc1=("c_fc",), fc2="c_proj"
    ),
)
GPT_NEOX = Family(
    model_type="gpt_neox",
    model_class="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    constants=_LAYER_NORM_ROPE,
    fields=(
        VOCAB_SIZE,
        setting_field("hidden_size", "hidden_size", 6144),
        setting_field("num_layers", "num_hidden_layers", 44),
        setting_field("num_attention_heads", "num_attention_heads", 64),
        setting_field("ffn_hidden_size", "intermediate_size", 24576),
        setting_field("activation", "hidden_act", "gelu", codes=GELU),
        setting_field("max_position_embeddings", "max_position_embeddings", 2048),
        setting_field("layernorm_epsilon", "layer_norm_eps", 1e-5),
        setting_field("hidden_dropout", "hidden_dropout", 0.0),
        setting_field("attention_dropout", "attention_dropout", 0.0),
        setting_field("init_method_std", "initializer_range", 0.02),
        _tied(False),
        bias_field("attention_bias", True),
        refused_field("use_parallel_residual", PARALLEL, False, default=True),
        read_field("rotary_emb_base", "the rotary base, where the rotary settings have none"),
        read_field("rotary_pct", "the share of rotated channels, alike"),
        read_field("rope_theta", "transformers 4's copy of rotary_emb_base; must agree"),
        read_field("partial_rotary_factor", "transformers 4's copy of rotary_pct; must agree"),
    ),
    partial_rotary=0.25,
    rotary_keys=("rotary_emb_base", "rotary_pct"),
    rows=(
        Row("embedding.word_embeddings", ("gpt_neox.embed_in",), False),
        Row(f"{_LAYER}.input_layernorm", ("gpt_neox.layers.{i}.input_layernorm",)),
        Row(  # rows [heads, 3, head]: group order as it is
            f"{_ATTENTION}.linear_qkv",
            ("gpt_neox.layers.{i}.attention.query_key_value",),
            "attention_bias",
        ),
        Row(
            f"{_ATTENTION}.linear_proj", ("gpt_neox.layers.{i}.attention.dense",), "attention_bias"
        ),
        Row(f"{_LAYER}.pre_mlp_layernorm", ("gpt_neox.layers.{i}.post_attention_layernorm",)),
        Row(f"{_LAYER}.mlp.linear_fc1", ("gpt_neox.layers.{i}.mlp.dense_h_to_4h",)),
        Row(f"{_LAYER}.mlp.linear_fc2", ("gpt_neox.layers.{i}.mlp.dense_4h_to_h",)),
        Row("decoder.final_layernorm", ("gpt_neox.final_layer_norm",)),
        Row("output_layer", ("embed_out",), False, optional=True),
    ),
)


def _bert_rows(norms: Mapping[str, str]) -> tuple[Row, ...]:
    """Return BERT's names; the two orders differ in where the norms are (the final one last)."""
    own, theirs = "encoder.layers.{i}.", "bert.encoder.layer.{i}."
    attention = f"{theirs}attention."
    qkv = tuple(f"{attention}self.{which}" for which in ("query", "key", "value"))
    *layer_norms, final_norm = (Row(name, (their,)) for name, their in norms.items())
    return (
        Row("embedding.word_embeddings", ("bert.embeddings.word_embeddings",), False),
        Row("embedding.position_embeddings", ("bert.embeddings.position_embeddings",), False),
        Row("embedding.tokentype_embeddings", ("bert.embeddings.token_type_embeddings",), False),
        *layer_norms,
        Row(f"{own}self_attention.linear_qkv", qkv, layout=SPLIT_QKV),
        Row(f"{own}self_attention.linear_proj", (f"{attention}output.dense",)),
        Row(f"{own}mlp.linear_fc1", (f"{theirs}intermediate.dense",)),
        Row(f"{own}mlp.linear_fc2", (f"{theirs}output.dense",)),
        final_norm,
        Row("pooler.dense", ("bert.pooler.dense",), optional=True),
        Row("output_layer", ("cls.predictions",), optional=True, weight=False),
        Row("output_layer", ("cls.predictions.decoder",), False, optional=True),
        Row("lm_head.dense", ("cls.predictions.transform.dense",), optional=True),
        Row("lm_head.layer_norm", ("cls.predictions.transform.LayerNorm",), optional=True),
        Row("binary_head", ("cls.seq_relationship",), optional=True),
        Row("classification_head", ("classifier",), optional=True),
        Row("multichoice_head", ("classifier",), optional=True),
        Row("qa_head", ("qa_outputs",), optional=True),
    )


def _bert_fields(hidden: int, layers: int, heads: int, ffn: int) -> tuple[Field, ...]:
    """Return the keys of both orders, whose classes have defaults of their own."""
    return (
        VOCAB_SIZE,
        setting_field("hidden_size", "hidden_size", hidden),
        setting_field("num_layers", "num_hidden_layers", layers),
        setting_field("num_attention_heads", "num_attention_heads", heads),
        setting_field("ffn_hidden_size", "intermediate_size", ffn),
        setting_field("activation", "hidden_act", "gelu", codes=GELU),
        setting_field("max_position_embeddings", "max_position_embeddings", 512),
        setting_field("num_tokentypes", "type_vocab_size", 2),
        setting_field("layernorm_epsilon", "layer_norm_eps", 1e-12),
        setting_field("hidden_dropout", "hidden_dropout_prob", 0.1),
        setting_field("attention_dropout", "attention_probs_dropout_prob", 0.1),
        setting_field("init_method_std", "initializer_range", 0.02),
        _tied(True),
        refused_field("is_decoder", "a causal mask (a decoder)", False, default=False),
        refused_field("add_cross_attention", "cross-attention", False, default=False),
        refused_field(
            "position_embedding_type", "relative positions", "absolute", default="absolute"
        ),
        refused_field("is_causal", "a causal mask", False, None),
        *other_fields(
            Use.METADATA, "lets transformers round heads down, which is refused", "embedding_size"
        ),
        *other_fields(
            Use.METADATA,
            "of Google's multilingual files; no code of transformers reads it",
            "directionality",
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
        ),
    )


MEGATRON_BERT = Family(
    model_type="megatron-bert",
    kind="bert",
    model_class="MegatronBert",
    prefix="bert.",
    shared=COMMON_FIELDS,
    fields=_bert_fields(1024, 24, 16, 4096),
    rows=_bert_rows(
        {
            "encoder.layers.{i}.input_layernorm": "bert.encoder.layer.{i}.attention.ln",
            "encoder.layers.{i}.pre_mlp_layernorm": "bert.encoder.layer.{i}.ln",
            "encoder.final_layernorm": "bert.encoder.ln",
        }
    ),
)
ORIGINAL_BERT = dataclasses.replace(
    MEGATRON_BERT,
    model_type="bert",
    model_class="Bert",
    fields=_bert_fields(768, 12, 12, 3072),
    constants={"apply_residual_connection_post_layernorm": True},
    rows=_bert_rows(
        {
            "encoder.layers.0.input_layernorm": "bert.embeddings.LayerNorm",
            "encoder.layers.{i}.input_layernorm": "bert.encoder.layer.{i-1}.output.LayerNorm",
            "encoder.layers.{i}.pre_mlp_layernorm": (
                "bert.encoder.layer.{i}.attention.output.LayerNorm"
            ),
            "encoder.final_layernorm": "bert.encoder.layer.{last}.output.LayerNorm",
        }
    ),
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        GPT2,
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        STABLELM,
        STARCODER2,
        GPT_NEOX,
        MEGATRON_BERT,
        ORIGINAL_BERT,
    )
}


@dataclass(frozen=True)
class Entry:
    """One canonical parameter and the Hugging Face tensors that hold it."""

    canonical: str
    names: tuple[str, ...]
    layout: Layout
    optional: bool


def entries(family: Family, num_layers: int, switches: Mapping[str, bool]) -> Iterator[Entry]:
    """Yield the parameters of a model, in the order of transformers' own files."""
    for in_layers, group in itertools.groupby(family.rows, lambda row: "{i}" in row.canonical):
        rows = list(group)
        for layer in range(num_layers if in_layers else 1):
            places = {"{i}": str(layer), "{i-1}": str(layer - 1), "{last}": str(num_layers - 1)}
            for row in rows:
                if layer > 0 or "{i-1}" not in "".join(row.names):
                    yield from _row_entries(row, places, switches)


def _row_entries(
    row: Row, places: Mapping[str, str], switches: Mapping[str, bool]
) -> Iterator[Entry]:
    canonical, *names = (
        re.sub(r"\{.*?\}", lambda place: places[place[0]], name)
        for name in (row.canonical, *row.names)
    )
    for leaf, present in (("weight", row.weight), ("bias", row.has_bias(switches))):
        if present:
            filled = tuple(f"{name}.{leaf}" for name in names)
            yield Entry(f"{canonical}.{leaf}", filled, row.layout, row.optional)
