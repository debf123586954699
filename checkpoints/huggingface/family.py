"""What a table of a Hugging Face family is made of, and how its rows become parameter names.

A `Row` pairs a canonical module with its Hugging Face modules; `{i}` runs over the layers, `{i-1}`
is the layer before and `{last}` the last one (BERT's original order keeps a norm behind each layer
where Megatron has it before the next one). A `Field` pairs a setting with its key in config.json
and the value that transformers takes where the key is absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlm_eval.checkpoints.huggingface.layout import SAME, Layout


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
    kind: str  # ModelConfig.family
    model_class: str
    """The class with its language-model head; `Bert` and `MegatronBert` take a head's name."""
    prefix: str
    """What the base model's names begin with, in a model with a head."""
    rows: tuple[Row, ...]
    fields: tuple[Field, ...]
    activations: Mapping[str, str]
    activation: str
    """transformers' default."""
    activation_key: str = "hidden_act"
    tied: bool = False
    """transformers' default of tie_word_embeddings."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """ModelConfig settings that every model of the family has."""
    switches: Mapping[str, bool] = field(default_factory=dict)
    """Keys of config.json that rows name as their `bias`, with transformers' defaults."""
    refusals: tuple[Refusal, ...] = ()
    partial_rotary: float | None = None
    """transformers' default share of rotated channels; None where all are."""
    sliding_window: int | None = None
    """transformers' default of sliding_window."""


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
