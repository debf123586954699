"""What Megatron-Bridge's and NeMo's Gemma models compute beyond the fields of their settings.

Their classes scale embeddings, place windows and choose rotary bases in code, whatever the fields
of megatron-core's config say; the class's name, which the settings hold, tells which code ran.
Source: Megatron-Bridge, src/megatron/bridge/models/gemma; docs/megatron.md, "Layouts without args".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlm_eval.checkpoints.errors import InputError

_CLASS = re.compile(r"(?:Code)?Gemma(?P<generation>\d*)(?:Model)?(?:Provider|Config)[\w.]*")
"""Names of the classes of language models, such as Gemma2ModelProvider9B."""


def gemma_settings(provider: str, values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Return a Gemma's settings in the words of the others; None where the class is no Gemma's.

    Args:
        provider: The class that the settings name.
        values: The settings.
        where: The file, for messages.

    Raises:
        InputError: The class is another relative of Gemma's, or a setting is missing or odd.
    """
    name = provider.rpartition(".")[2]
    if "gemma" not in name.lower():
        return None
    match = _CLASS.fullmatch(name)
    if match is None or match["generation"] not in ("", "2", "3"):
        raise InputError(
            f"{where} is of {name}, which mlm-eval does not compute; it reads the language models "
            "Gemma, Gemma 2 and Gemma 3"
        )
    hidden = values.get("hidden_size")
    if type(hidden) is not int or not 0 < hidden < 1 << 31:
        raise InputError(f"{where} has hidden_size {hidden!r}; copy the file again")
    settings = {**values, "embedding_multiplier": hidden**0.5}
    if match["generation"] == "2" and settings.get("window_attn_skip_freq") is None:
        # The class gives the window to every second layer, counted from 1.
        settings["window_attn_skip_freq"] = [i % 2 for i in range(_layers(values, where))]
    if match["generation"] == "3":
        settings |= _third(values, where)
    return settings


def _third(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return Gemma 3's windows and rotary positions: two bases, the second with a linear factor."""
    found: dict[str, Any] = {}
    base = values.get("rotary_base")
    if isinstance(base, list) and len(base) == 2:
        found |= {"rotary_base_local": base[0], "rotary_base": base[1]}
    elif values.get("rotary_base_local") is None:
        found["rotary_base_local"] = 10000
    window = values.get("window_size")
    if type(window) is int:  # of transformers: the query's own position is one of them
        found["window_size"] = [window - 1, 0]
    pattern = values.get("interleaved_attn_pattern") or [5, 1]
    numbers = pattern if isinstance(pattern, list) and len(pattern) == 2 else []
    if not numbers or any(type(number) is not int or number < 0 for number in numbers):
        raise InputError(f"{where} has interleaved_attn_pattern {pattern!r}, expected two numbers")
    period = max(sum(numbers), 1)
    flags = [int((i + 1) % period != 0) for i in range(_layers(values, where))]
    found["window_attn_skip_freq"] = flags
    for name in ("seq_len_interpolation_factor", "rope_scaling"):
        if values.get(name):
            raise InputError(
                f"{where} has {name} = {values[name]!r} beside Gemma 3's own rotary scaling, which "
                "mlm-eval does not compute"
            )
    factor = values.get("rope_scaling_factor")
    if factor not in (None, 1):
        found["seq_len_interpolation_factor"] = factor
    return found | {"rope_scaling_factor": None}


def _layers(values: Mapping[str, Any], where: str) -> int:
    layers = values.get("num_layers")
    if type(layers) is not int or not 0 < layers < 1 << 16:
        raise InputError(f"{where} has num_layers {layers!r}; copy the file again")
    return layers
