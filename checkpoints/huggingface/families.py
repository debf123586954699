"""THE TABLES: each Hugging Face family's names and config.json keys, read in both directions.

A `Row` pairs a canonical module with its Hugging Face modules; `{i}` runs over the layers, `{i-1}`
is the layer before and `{last}` the last one (BERT's original order has a norm after each layer
where Megatron has it before the next one). A `Field` pairs a setting with its key in config.json
and the value that transformers takes where the key is absent.

Source: the modeling and configuration files of transformers 5.23.
"""

from __future__ import annotations

import dataclasses
import itertools
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

    def has_bias(self, switches: Mapping[str, bool]) -> bool:
        """Return whether the module has a bias, where config.json says `switches`."""
        return switches[self.bias] if isinstance(self.bias, str) else self.bias


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
    old_rotary_keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    """Base and share of rotated channels before transformers 5."""
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
_ATTENTION = f"{_LAYER}.self_attention"

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
        Row(f"{_ATTENTION}.linear_qkv", ("transformer.h.{i}.attn.c_attn",), layout=CONV1D_QKV),
        Row(f"{_ATTENTION}.linear_proj", ("transformer.h.{i}.attn.c_proj",), layout=CONV1D),
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
    rows=_llama_rows(
        "use_bias", "use_bias", "use_bias", norm_bias=True, fc1=("c_fc",), fc2="c_proj"
    ),
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
    old_rotary_keys=("rotary_emb_base", "rotary_pct"),
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


MEGATRON_BERT = Family(
    model_type="megatron-bert",
    kind="bert",
    model_class="MegatronBert",
    prefix="bert.",
    tied=True,
    activations=GELU,
    activation="gelu",
    fields=(
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
    ),
    refusals=(
        Refusal("is_decoder", (False,), "a causal mask (a decoder)", False),
        Refusal("add_cross_attention", (False,), "cross-attention", False),
        Refusal("position_embedding_type", ("absolute",), "relative positions", "absolute"),
    ),
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
