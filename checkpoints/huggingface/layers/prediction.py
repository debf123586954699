"""Heads of multi-token prediction, which DeepSeek V3 stores as layers behind the model's own.

Such a layer holds the module of a decoder layer, three norms, a projection, and copies of the word
embeddings and of the output table, which Megatron does not store a second time.
Source: the files of deepseek-ai/DeepSeek-V3 (README_WEIGHTS.md there); `MtpModel` in
modeling_layers.py of transformers 5.23, which reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import STORED_DTYPES
from mlm_eval.checkpoints.huggingface.families.family import Entry, Family, entries
from mlm_eval.checkpoints.huggingface.layout import SAME
from mlm_eval.checkpoints.lazy import LazyTensor, cast_to, zeros
from mlm_eval.checkpoints.parameters import (
    PREDICTION_NAME,
    Parameter,
    num_prediction_heads,
    prediction_parameters,
    stays_float32,
)

COUNT = "num_nextn_predict_layers"
"""The key of config.json."""

_EMBEDDINGS, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def has_place_for_heads(family: Family) -> bool:
    """Whether models of a family store such heads behind their layers."""
    return COUNT in family.table and not family.hybrid


def pack_heads(
    find: Callable[[str], LazyTensor | None],
    family: Family,
    config: ModelConfig,
    switches: Mapping[str, bool],
    count: int,
) -> dict[str, LazyTensor]:
    """Return heads by the names of `prediction_parameters`; none where they are not whole.

    Args:
        find: Returns a tensor by its Hugging Face name.
        family: The model's family.
        config: The model.
        switches: Which linear layers have biases; see `Family.switches`.
        count: The number of heads.
    """
    heads: dict[str, LazyTensor] = {}
    for parameter, entry in _entries(family, config, switches, count):
        whole = find(entry.whole) if entry.whole else None
        parts = [whole] if whole is not None else [find(name) for name in entry.names]
        layout = SAME if whole is not None else entry.layout
        fitting = [tensor for tensor in parts if tensor is not None]
        if [tensor.shape for tensor in fitting] != layout.shapes(parameter.shape, config):
            return {}
        heads[parameter.name] = layout.pack(fitting, config)
    return heads


def unpack_heads(
    heads: Mapping[str, LazyTensor],
    family: Family,
    config: ModelConfig,
    switches: Mapping[str, bool],
    tensors: Mapping[str, LazyTensor],
) -> tuple[dict[str, LazyTensor], set[str]]:
    """Return the tensors of a model's heads, by Hugging Face name, and which stay in float32.

    They are zeros where the family has a parameter that the source lacks.

    Args:
        heads: By the names of `prediction_parameters`.
        family: A family that has a place for them.
        config: The model in the family's terms.
        switches: Which linear layers have biases.
        tensors: What is written of the model itself; its tables are copied to each head.
    """
    count = num_prediction_heads(heads)
    kept = next(iter(heads.values())).kind
    found: dict[str, LazyTensor] = {}
    wide: set[str] = set()
    for parameter, entry in _entries(family, config, switches, count):
        tensor = heads.get(parameter.name) or zeros(parameter.shape, kept)
        if stays_float32(parameter.name):
            tensor = cast_to(tensor, STORED_DTYPES["float32"])
            wide.update(entry.names)
        found.update(zip(entry.names, entry.layout.unpack(tensor, config), strict=True))
    for layer in range(config.num_layers, config.num_layers + count):
        found[f"model.layers.{layer}.embed_tokens.weight"] = tensors[_EMBEDDINGS]
        table = tensors.get(_OUTPUT, tensors[_EMBEDDINGS])
        found[f"model.layers.{layer}.shared_head.head.weight"] = table
    return found, wide


def _entries(
    family: Family, config: ModelConfig, switches: Mapping[str, bool], count: int
) -> Iterator[tuple[Parameter, Entry]]:
    """Yield each parameter of the heads and the Hugging Face tensors that hold it."""
    known = entries(family, config.num_layers + count, switches, experts=config.num_experts)
    by_name = {entry.canonical: entry for entry in known}
    for name, parameter in prediction_parameters(config, count).items():
        head, part = PREDICTION_NAME.fullmatch(name).groups()  # type: ignore[union-attr]
        layer = config.num_layers + int(head)
        entry = by_name.get(f"decoder.layers.{layer}.{part.removeprefix('transformer_layer.')}")
        if entry is None:
            theirs = part.replace("final_layernorm", "shared_head.norm")
            entry = Entry(name, (f"model.layers.{layer}.{theirs}",), SAME, False)
        yield parameter, entry
