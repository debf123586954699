"""Models of text and images, of which the language model is read: Gemma 3 from 4B on, Llama 4.

Their config.json holds the language model's as `text_config`; a text without images is computed by
it alone.
Source: Gemma3ForConditionalGeneration and Llama4ForConditionalGeneration of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import LazyTensor

_TEXT_MODELS = {"gemma3": "gemma3_text", "llama4": "llama4_text"}
"""model_type of a model of text and images -> that of its language model."""

_OF_IMAGES = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\.")
_WHOLE = ("quantization_config", "tie_word_embeddings", "dtype", "torch_dtype")
"""Keys that stand for the whole model where the language model's part does not say them."""


def text_config(hf: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Return the language model's config.json; None where the model is none of text and images.

    Raises:
        InputError: It holds no settings of a language model.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in _TEXT_MODELS:
        return None
    part = hf.get("text_config")
    if not isinstance(part, dict):
        raise InputError(
            f"{where} describes a {kind} model of text and images, but its text_config is {part!r};"
            " copy the file again"
        )
    if part.get("model_type", _TEXT_MODELS[kind]) != _TEXT_MODELS[kind]:
        raise InputError(
            f"{where}: the language model of a {kind} model is of model_type "
            f"{part['model_type']!r}, expected {_TEXT_MODELS[kind]!r}; correct the file"
        )
    whole = {key: hf[key] for key in _WHOLE if key in hf and key not in part}
    return {**whole, **part, "model_type": _TEXT_MODELS[kind]}


def text_tensors(
    tensors: Mapping[str, LazyTensor], where: str
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Return the language model's tensors under its own names, and the names that are left out.

    Raises:
        InputError: Two tensors have one name.
    """
    kept: dict[str, LazyTensor] = {}
    left = [name for name in tensors if _OF_IMAGES.match(name)]
    for name, tensor in tensors.items():
        if _OF_IMAGES.match(name):
            continue
        name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name)
        name = name.replace("model.lm_head.", "lm_head.")
        if name in kept:
            raise InputError(
                f"{where} has {name} under two names; the folder may hold two models: give one of "
                "a single model"
            )
        kept[name] = tensor
    return kept, left
