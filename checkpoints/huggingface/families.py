"""THE TABLES: each Hugging Face family's names and config.json keys, read in both directions.

A `Row` pairs a canonical module with its Hugging Face modules; `{i}` runs over the layers, `{i-1}`
is the layer before and `{last}` the last one (BERT's original order has a norm after each layer
where Megatron has it before the next one). A `Field` pairs a setting with its key in config.json
and the value that transformers takes where the key is absent.

Source: the modeling and configuration files of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Field:
    """One setting of both sides: ModelConfig's name, config.json's, and transformers' default."""

    setting: str
    key: str
    default: Any


@dataclass(frozen=True)
class Refusal:
    """A key of config.json that changes the mathematics, but for its harmless values."""

    key: str
    harmless: tuple[Any, ...]
    what: str
    default: Any = None


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
    activations: Mapping[str, str] = field(default_factory=lambda: dict(GATED))
    activation: str = "silu"
    """transformers' default."""
    activation_key: str = "hidden_act"
    tied: bool = False
    """transformers' default of tie_word_embeddings."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """ModelConfig settings that every model of the family has."""
    switches: Mapping[str, bool] = field(default_factory=dict)
    """Keys of config.json that rows name as their `bias`, with transformers' defaults."""
    refusals: tuple[Refusal, ...] = ()
    """Besides quantized weights, which no family has here."""
    partial_rotary: float | None = None
    """transformers' default share of rotated channels; None where all are."""
    sliding_window: int | None = None
    """transformers' default of sliding_window."""


IGNORED_TENSORS = re.compile(
    r"(^|\.)(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|(^|\.)position_ids$"
)
"""Buffers that older versions of transformers stored: causal masks, rotary tables, positions."""

QUANTIZED = Refusal("quantization_config", (None,), "quantized weights")
NO_WINDOW = Refusal("use_sliding_window", (False,), "sliding windows", False)
PARALLEL = "attention and MLP side by side (a parallel residual)"

_LAYER = "decoder.layers.{i}"

GPT2 = Family(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    prefix="transformer.",
    tied=True,
    activations=GELU,
    activation="gelu_new",
    activation_key="activation_function",
    constants={"add_bias_linear": True, "add_qkv_bias": True},
    fields=(
        Field("hidden_size", "n_embd", 768),
        Field("num_layers", "n_layer", 12),
        Field("num_attention_heads", "n_head", 12),
        Field("ffn_hidden_size", "n_inner", None),
        Field("max_position_embeddings", "n_positions", 1024),
        Field("layernorm_epsilon", "layer_norm_epsilon", 1e-5),
        Field("hidden_dropout", "resid_pdrop", 0.1),
        Field("attention_dropout", "attn_pdrop", 0.1),
        Field("init_method_std", "initializer_range", 0.02),
    ),
    refusals=(
        Refusal("scale_attn_weights", (True,), "unscaled attention scores", True),
        Refusal("scale_attn_by_inverse_layer_idx", (False,), "scores scaled by layer", False),
        Refusal("add_cross_attention", (False,), "cross-attention", False),
    ),
    rows=(
        Row("embedding.word_embeddings", ("transformer.wte",), False),
        Row("embedding.position_embeddings", ("transformer.wpe",), False),
        Row(f"{_LAYER}.input_layernorm", ("transformer.h.{i}.ln_1",)),
        Row(
            f"{_LAYER}.self_attention.linear_qkv",
            ("transformer.h.{i}.attn.c_attn",),
            layout=CONV1D_QKV,
        ),
        Row(
            f"{_LAYER}.self_attention.linear_proj",
            ("transformer.h.{i}.attn.c_proj",),
            layout=CONV1D,
        ),
        Row(f"{_LAYER}.pre_mlp_layernorm", ("transformer.h.{i}.ln_2",)),
        Row(f"{_LAYER}.mlp.linear_fc1", ("transformer.h.{i}.mlp.c_fc",), layout=CONV1D),
        Row(f"{_LAYER}.mlp.linear_fc2", ("transformer.h.{i}.mlp.c_proj",), layout=CONV1D),
        Row("decoder.final_layernorm", ("transformer.ln_f",)),
        Row("output_layer", ("lm_head",), False, optional=True),
    ),
)

_LLAMA_FIELDS = (
    Field("hidden_size", "hidden_size", 4096),
    Field("num_layers", "num_hidden_layers", 32),
    Field("num_attention_heads", "num_attention_heads", 32),
    Field("num_query_groups", "num_key_value_heads", None),
    Field("ffn_hidden_size", "intermediate_size", 11008),
    Field("max_position_embeddings", "max_position_embeddings", 2048),
    Field("attention_dropout", "attention_dropout", 0.0),
    Field("init_method_std", "initializer_range", 0.02),
)


def _llama_rows(
    qkv_bias: bool | str,
    output_bias: bool | str = False,
    mlp_bias: bool | str = False,
    *,
    norm_bias: bool = False,
    qk_norm: bool = False,
    mlp: tuple[str, str] | None = None,
) -> tuple[Row, ...]:
    """Return the names that Llama introduced and many families share.

    Args:
        qkv_bias: Whether queries, keys and values have biases (see `Row`).
        output_bias: The same for the attention's output.
        mlp_bias: The same for the MLP.
        norm_bias: LayerNorm rather than RMSNorm.
        qk_norm: Whether queries and keys are normed.
        mlp: The two matrices of an ungated MLP; None for a gated one.
    """
    own = f"{_LAYER}."
    theirs = "model.layers.{i}."
    attention, theirs_attention = f"{own}self_attention.", f"{theirs}self_attn."
    qkv = tuple(f"{theirs_attention}{which}_proj" for which in "qkv")
    norms = tuple(
        Row(
            f"{attention}{which}_layernorm",
            (f"{theirs_attention}{which}_norm",),
            False,
            optional=True,
        )
        for which in "qk"
    )
    if mlp is None:
        gate_up = (f"{theirs}mlp.gate_proj", f"{theirs}mlp.up_proj")
        mlp_rows = (
            Row(f"{own}mlp.linear_fc1", gate_up, mlp_bias, GATE_UP),
            Row(f"{own}mlp.linear_fc2", (f"{theirs}mlp.down_proj",), mlp_bias),
        )
    else:
        mlp_rows = (
            Row(f"{own}mlp.linear_fc1", (f"{theirs}mlp.{mlp[0]}",), mlp_bias),
            Row(f"{own}mlp.linear_fc2", (f"{theirs}mlp.{mlp[1]}",), mlp_bias),
        )
    return (
        Row("embedding.word_embeddings", ("model.embed_tokens",), False),
        Row(f"{own}input_layernorm", (f"{theirs}input_layernorm",), norm_bias),
        Row(f"{attention}linear_qkv", qkv, qkv_bias, SPLIT_QKV),
        *(norms if qk_norm else ()),
        Row(f"{attention}linear_proj", (f"{theirs_attention}o_proj",), output_bias),
        Row(f"{own}pre_mlp_layernorm", (f"{theirs}post_attention_layernorm",), norm_bias),
        *mlp_rows,
        Row("decoder.final_layernorm", ("model.norm",), norm_bias),
        Row("output_layer", ("lm_head",), False, optional=True),
    )


_RMS = {"normalization": "RMSNorm", "position_embedding_type": "rope", "hidden_dropout": 0.0}
_HEAD_DIM = Field("kv_channels", "head_dim", None)
_RMS_EPSILON = Field("layernorm_epsilon", "rms_norm_eps", 1e-6)

LLAMA = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    constants=_RMS,
    fields=(*_LLAMA_FIELDS, _HEAD_DIM, _RMS_EPSILON),
    switches={"attention_bias": False, "mlp_bias": False},
    rows=_llama_rows("attention_bias", "attention_bias", "mlp_bias"),
)
MISTRAL = Family(
    model_type="mistral",
    model_class="MistralForCausalLM",
    constants=_RMS,
    fields=LLAMA.fields,
    rows=_llama_rows(False),
    sliding_window=4096,
)
QWEN2 = Family(
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    constants=_RMS,
    fields=LLAMA.fields,
    refusals=(NO_WINDOW,),
    rows=_llama_rows(True),
)
QWEN3 = Family(
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    constants={**_RMS, "qk_layernorm": True},
    fields=(*_LLAMA_FIELDS, Field("kv_channels", "head_dim", 128), _RMS_EPSILON),
    switches={"attention_bias": False},
    refusals=(NO_WINDOW,),
    rows=_llama_rows("attention_bias", "attention_bias", qk_norm=True),
)
_LAYER_NORM_ROPE = {"normalization": "LayerNorm", "position_embedding_type": "rope"}
STABLELM = Family(
    model_type="stablelm",
    model_class="StableLmForCausalLM",
    constants=_LAYER_NORM_ROPE,
    fields=(
        *_LLAMA_FIELDS,
        Field("layernorm_epsilon", "layer_norm_eps", 1e-5),
        Field("hidden_dropout", "hidden_dropout", 0.0),
    ),
    switches={"use_qkv_bias": False},
    refusals=(
        Refusal("use_parallel_residual", (False,), PARALLEL, False),
        Refusal("qk_layernorm", (False,), "a norm of its own for each head", False),
    ),
    rows=_llama_rows("use_qkv_bias", norm_bias=True),
    partial_rotary=0.25,
)
STARCODER2 = Family(
    model_type="starcoder2",
    model_class="Starcoder2ForCausalLM",
    tied=True,
    activations=GELU,
    activation="gelu_pytorch_tanh",
    constants=_LAYER_NORM_ROPE,
    fields=(
        *_LLAMA_FIELDS,
        Field("layernorm_epsilon", "norm_epsilon", 1e-5),
        Field("hidden_dropout", "residual_dropout", 0.0),
    ),
    switches={"use_bias": True},
    rows=_llama_rows("use_bias", "use_bias", "use_bias", norm_bias=True, mlp=("c_fc", "c_proj")),
)
GPT_NEOX = Family(
    model_type="gpt_neox",
    model_class="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    activations=GELU,
    activation="gelu",
    constants=_LAYER_NORM_ROPE,
    fields=(
        Field("hidden_size", "hidden_size", 6144),
        Field("num_layers", "num_hidden_layers", 44),
        Field("num_attention_heads", "num_attention_heads", 64),
        Field("ffn_hidden_size", "intermediate_size", 24576),
        Field("max_position_embeddings", "max_position_embeddings", 2048),
        Field("layernorm_epsilon", "layer_norm_eps", 1e-5),
        Field("hidden_dropout", "hidden_dropout", 0.0),
        Field("attention_dropout", "attention_dropout", 0.0),
        Field("init_method_std", "initializer_range", 0.02),
    ),
    switches={"attention_bias": True},
    refusals=(Refusal("use_parallel_residual", (False,), PARALLEL, True),),
    partial_rotary=0.25,
    rows=(
        Row("embedding.word_embeddings", ("gpt_neox.embed_in",), False),
        Row(f"{_LAYER}.input_layernorm", ("gpt_neox.layers.{i}.input_layernorm",)),
        Row(  # rows [heads, 3, head]: group order as it is
            f"{_LAYER}.self_attention.linear_qkv",
            ("gpt_neox.layers.{i}.attention.query_key_value",),
            "attention_bias",
        ),
        Row(
            f"{_LAYER}.self_attention.linear_proj",
            ("gpt_neox.layers.{i}.attention.dense",),
            "attention_bias",
        ),
        Row(
            f"{_LAYER}.pre_mlp_layernorm",
            ("gpt_neox.layers.{i}.post_attention_layernorm",),
        ),
        Row(f"{_LAYER}.mlp.linear_fc1", ("gpt_neox.layers.{i}.mlp.dense_h_to_4h",)),
        Row(f"{_LAYER}.mlp.linear_fc2", ("gpt_neox.layers.{i}.mlp.dense_4h_to_h",)),
        Row("decoder.final_layernorm", ("gpt_neox.final_layer_norm",)),
        Row("output_layer", ("embed_out",), False, optional=True),
    ),
)

_BERT_FIELDS = (
    Field("hidden_size", "hidden_size", 768),
    Field("num_layers", "num_hidden_layers", 12),
    Field("num_attention_heads", "num_attention_heads", 12),
    Field("ffn_hidden_size", "intermediate_size", 3072),
    Field("max_position_embeddings", "max_position_embeddings", 512),
    Field("num_tokentypes", "type_vocab_size", 2),
    Field("layernorm_epsilon", "layer_norm_eps", 1e-12),
    Field("hidden_dropout", "hidden_dropout_prob", 0.1),
    Field("attention_dropout", "attention_probs_dropout_prob", 0.1),
    Field("init_method_std", "initializer_range", 0.02),
)
_BERT_REFUSALS = (
    Refusal("is_decoder", (False,), "a causal mask (a decoder)", False),
    Refusal("add_cross_attention", (False,), "cross-attention", False),
    Refusal("position_embedding_type", ("absolute",), "relative positions", "absolute"),
)


def _bert_rows(norms: Mapping[str, str]) -> tuple[Row, ...]:
    """Return BERT's names; the two orders differ in where the norms are."""
    own, theirs = "encoder.layers.{i}.", "bert.encoder.layer.{i}."
    attention = f"{theirs}attention."
    qkv = tuple(f"{attention}self.{which}" for which in ("query", "key", "value"))
    heads = (
        ("lm_head.dense", "cls.predictions.transform.dense"),
        ("lm_head.layer_norm", "cls.predictions.transform.LayerNorm"),
        ("binary_head", "cls.seq_relationship"),
        ("classification_head", "classifier"),
        ("multichoice_head", "classifier"),
        ("qa_head", "qa_outputs"),
    )
    in_layers = {name: norms[name] for name in norms if "{i}" in name}
    around = {name: norms[name] for name in norms if "{i}" not in name}
    return (
        Row("embedding.word_embeddings", ("bert.embeddings.word_embeddings",), False),
        Row("embedding.position_embeddings", ("bert.embeddings.position_embeddings",), False),
        Row("embedding.tokentype_embeddings", ("bert.embeddings.token_type_embeddings",), False),
        *(Row(name, (their,)) for name, their in around.items() if "layers" in name),
        *(Row(name, (their,)) for name, their in in_layers.items()),
        Row(f"{own}self_attention.linear_qkv", qkv, layout=SPLIT_QKV),
        Row(f"{own}self_attention.linear_proj", (f"{attention}output.dense",)),
        Row(f"{own}mlp.linear_fc1", (f"{theirs}intermediate.dense",)),
        Row(f"{own}mlp.linear_fc2", (f"{theirs}output.dense",)),
        *(Row(name, (their,)) for name, their in around.items() if "layers" not in name),
        Row("pooler.dense", ("bert.pooler.dense",), optional=True),
        Row("output_layer", ("cls.predictions",), optional=True, weight=False),
        Row("output_layer", ("cls.predictions.decoder",), False, optional=True),
        *(Row(name, (their,), optional=True) for name, their in heads),
    )


MEGATRON_BERT = Family(
    model_type="megatron-bert",
    kind="bert",
    model_class="MegatronBert",
    prefix="bert.",
    tied=True,
    activations=GELU,
    activation="gelu",
    fields=_BERT_FIELDS,
    refusals=_BERT_REFUSALS,
    rows=_bert_rows(
        {
            "encoder.layers.{i}.input_layernorm": "bert.encoder.layer.{i}.attention.ln",
            "encoder.layers.{i}.pre_mlp_layernorm": "bert.encoder.layer.{i}.ln",
            "encoder.final_layernorm": "bert.encoder.ln",
        }
    ),
)
ORIGINAL_BERT = Family(
    model_type="bert",
    kind="bert",
    model_class="Bert",
    prefix="bert.",
    tied=True,
    activations=GELU,
    activation="gelu",
    fields=_BERT_FIELDS,
    refusals=_BERT_REFUSALS,
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
    per_layer = [row for row in family.rows if "{i}" in row.canonical]
    first, last = family.rows.index(per_layer[0]), family.rows.index(per_layer[-1])
    for row in family.rows[:first]:
        yield from _row_entries(row, 0, num_layers, switches)
    for layer in range(num_layers):
        for row in family.rows[first : last + 1]:
            if not ("{i-1}" in "".join(row.names) and layer == 0):
                yield from _row_entries(row, layer, num_layers, switches)
    for row in family.rows[last + 1 :]:
        yield from _row_entries(row, 0, num_layers, switches)


def _row_entries(
    row: Row, layer: int, num_layers: int, switches: Mapping[str, bool]
) -> Iterator[Entry]:
    places = {"{i}": str(layer), "{i-1}": str(layer - 1), "{last}": str(num_layers - 1)}
    has_bias = switches[row.bias] if isinstance(row.bias, str) else row.bias
    for leaf, present in (("weight", row.weight), ("bias", has_bias)):
        if present:
            filled = []
            for name in (row.canonical, *row.names):
                for place, value in places.items():
                    name = name.replace(place, value)
                filled.append(f"{name}.{leaf}")
            yield Entry(filled[0], tuple(filled[1:]), row.layout, row.optional)
