"""What a family is: its rows of names and its keys of config.json, read in both directions.

A `Row` pairs a canonical module with its Hugging Face modules; `{i}` runs over the layers, `{i-1}`
is the layer before and `{last}` the last one (BERT's original order has a norm after each layer
where Megatron has it before the next one), and `{e}` runs over a layer's experts. `fields` says of
each key of config.json what it does (see `fields.Field`), with the value that transformers takes
where the key is absent.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mlm_eval.checkpoints.huggingface.fields import CAUSAL_FIELDS, ROTARY_FIELDS, Field
from mlm_eval.checkpoints.huggingface.layout import SAME, Layout

DECODER_LAYER = "decoder.layers.{i}"
"""A decoder layer's canonical name, in rows."""
ATTENTION = f"{DECODER_LAYER}.self_attention"


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
    tensor: bool = False
    """The names are those of single tensors, not of modules with weights and biases."""
    whole: str = ""
    """Full name of the one tensor that holds all of it in canonical layout, which some files have
    instead: the modules of transformers 5 hold a layer's experts in two."""

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
    other_prefix: str = ""
    """The same in files of another age."""
    hybrid: bool = False
    """Layers are of different kinds, with one branch each."""
    shared: tuple[Field, ...] = (*CAUSAL_FIELDS, *ROTARY_FIELDS)
    """Keys that many families read alike; `fields` wins."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """ModelConfig settings that every model of the family has."""
    partial_rotary: float | None = None
    """transformers' default share of rotated channels; None where all are."""
    theta: float = 10000.0
    """transformers' default rotary base."""
    absent_rotary: Mapping[str, Any] = field(default_factory=dict)
    """The rotary settings of a file that has none."""
    local_theta: float | None = None
    """The same of layers with a window, whose settings then are their own; None: as of all."""
    windows: str = ""
    """Which layers attend within `sliding_window`: `all`, those `after` max_window_layers, every
    second one `before` it, or those that `alternate` with others; `chunks` are Llama 4's. Empty:
    transformers' class computes no window."""
    window_period: int = 0
    """Of windows that alternate: every so many layers one has none."""
    scaled_embeddings: bool = False
    """Embeddings are multiplied by the root of the hidden size."""
    gated: Family | None = None
    """The same family's table where the activation's word begins with `gated-`."""
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

    @property
    def latent(self) -> bool:
        """Whether keys and values come from a latent."""
        return bool(self.constants.get("multi_latent_attention"))

    @cached_property
    def activation(self) -> Field | None:
        """The key that names the activation; None where all models of the family have one."""
        return next((row for row in self.fields if row.setting == "activation"), None)

    @cached_property
    def activations(self) -> set[str]:
        """The activations that its models can have, by ModelConfig's names."""
        if self.activation is None:
            return {self.constants["activation"]}
        return set(self.activation.codes.values())

    @cached_property
    def classes(self) -> set[str]:
        """Names of the classes whose function is read, in small letters."""
        if self.kind == "t5":
            stem = self.model_class.removesuffix("ForConditionalGeneration")
            t5_ends = ("ForConditionalGeneration", "Model", "WithLMHeadModel")
            return {f"{stem}{end}".lower() for end in t5_ends}
        stem = self.model_class.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        ends = ("Model", "ForCausalLM", "LMHeadModel") if self.kind == "gpt" else BERT_ENDS
        return {f"{stem}{end}".lower() for end in ends}

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """Keys of config.json that rows name as their `bias`."""
        return tuple(row.key for row in self.fields if row.switch)


IGNORED_TENSORS = re.compile(
    r"(^|\.)(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|(^|\.)position_ids$"
    r"|EncDecAttention\.relative_attention_bias\.weight$"
)
"""Buffers that older versions of transformers stored: causal masks, rotary tables, positions. And a
table of the first T5 files that transformers ignores: cross-attention has no positions."""


@dataclass(frozen=True)
class Entry:
    """One canonical parameter and the Hugging Face tensors that hold it."""

    canonical: str
    patterns: tuple[str, ...]
    """Names, in which `{e}` stands for the number of an expert."""
    layout: Layout
    optional: bool
    whole: str = ""
    """See `Row`."""
    experts: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names; of experts, all parts of one before those of the next."""
        if not any("{e}" in pattern for pattern in self.patterns):
            return self.patterns
        return tuple(
            pattern.replace("{e}", str(expert))
            for expert in range(self.experts)
            for pattern in self.patterns
        )


def entries(
    family: Family,
    num_layers: int,
    switches: Mapping[str, bool],
    *,
    experts: int = 0,
    decoder_layers: int = 0,
) -> Iterator[Entry]:
    """Yield the parameters of a model, in the order of transformers' own files.

    Where layers differ (a plain MLP in some, experts in others), each has the entries of all kinds.
    T5's `num_layers` are its encoder's.
    """

    def stack(row: Row) -> str:
        return row.canonical.split(".")[0] if "{i}" in row.canonical else ""

    for in_layers, group in itertools.groupby(family.rows, stack):
        rows = list(group)
        if in_layers == "decoder" and decoder_layers:
            num_layers = decoder_layers
        for layer in range(num_layers if in_layers else 1):
            places = {"{i}": str(layer), "{i-1}": str(layer - 1), "{last}": str(num_layers - 1)}
            for row in rows:
                if layer > 0 or "{i-1}" not in "".join(row.names):
                    yield from _row_entries(row, places, switches, experts)


def _row_entries(
    row: Row, places: Mapping[str, str], switches: Mapping[str, bool], experts: int
) -> Iterator[Entry]:
    canonical, whole, *names = (
        re.sub(r"\{.*?\}", lambda place: places.get(place[0], place[0]), name)
        for name in (row.canonical, row.whole, *row.names)
    )
    if row.tensor:
        yield Entry(canonical, tuple(names), row.layout, row.optional, whole, experts)
        return
    for leaf, present in (("weight", row.weight), ("bias", row.has_bias(switches))):
        if present:
            filled = tuple(f"{name}.{leaf}" for name in names)
            yield Entry(f"{canonical}.{leaf}", filled, row.layout, row.optional, whole, experts)
