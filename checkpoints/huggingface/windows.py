"""Layers that attend within a window, and their rotary base: config.json's ways to say which.

transformers' `sliding_window` counts the query's own position, Megatron's `window_size` the keys
before it. Where a class has no windows but its cache heeds the key, positions end at the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.families.family import Family
from mlm_eval.checkpoints.huggingface.reader import HubConfigReader

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(r: HubConfigReader, family: Family) -> None:
    """Take which layers have a window; limit the positions where the family computes none.

    Raises:
        InputError: The keys contradict each other, or ask for layers of another kind.
    """
    window, source = r.look("sliding_window", "int")
    if "use_sliding_window" in family.table:
        window = window if r.look("use_sliding_window", "bool")[0] else None
    types = _layer_types(r, family, window)
    flags = [name == SLIDING for name in types]
    if window is None:
        if any(flags):
            raise InputError(
                f"{r.where}: layer_types is {types!r}, but sliding_window is null; correct the file"
            )
        return
    positions = r.values["max_position_embeddings"]
    two_bases = family.local_theta is not None
    if not any(flags) or (window >= positions and not two_bases):
        return  # up to there a window changes nothing
    if not family.windows:
        _limit(r, family, window)
        return
    if window < 2:
        raise InputError(f"{r.where}: sliding_window is {window}, expected at least 2 positions")
    r.set("window_size", window - 1, source)
    r.set("window_layers", tuple(n for n, flag in enumerate(flags) if flag), source)


def _layer_types(r: HubConfigReader, family: Family, window: int | None) -> list[str]:
    """Return each layer's kind, as transformers' class fills it in where layer_types is absent."""
    layers = r.values["num_layers"]
    stated = r.hf.get("layer_types")
    if stated is not None:
        known = {FULL, "attention", *([SLIDING] if window else [])}
        names = stated if isinstance(stated, list) else []
        if len(names) != layers or not all(name in list(known) for name in names):
            raise InputError(
                f"{r.where}: layer_types is {stated!r}, expected {layers} of "
                f"{', '.join(sorted(known))}; mlm-eval does not compute other layers"
            )
        if family.windows in (
            "after",
            "before",
            "alternate",
        ):  # elsewhere transformers does not ask
            return [str(name) for name in names]
    if family.windows == "after":
        first = r.look("max_window_layers", "int")[0] if window is not None else layers
        return [SLIDING if number >= first else FULL for number in range(layers)]
    if family.windows == "before":
        stop = r.look("max_window_layers", "int")[0] if window is not None else 0
        return [SLIDING if n < stop and n % 2 == 0 else FULL for n in range(layers)]
    if family.windows == "alternate":
        period = family.window_period
        if "sliding_window_pattern" in family.table:
            period, _ = r.look("sliding_window_pattern", "int")
            if period < 1:
                raise InputError(
                    f"{r.where}: sliding_window_pattern is {period}, expected 1 or more"
                )
        return [SLIDING if (number + 1) % period else FULL for number in range(layers)]
    return [FULL if window is None else SLIDING] * layers


def _limit(r: HubConfigReader, family: Family, window: int) -> None:
    positions = r.values["max_position_embeddings"]
    if window < 1:
        raise InputError(f"{r.where}: sliding_window is {window}, expected at least 1 position")
    if not family.rotary:
        raise InputError(
            f"{r.where} describes a model with a sliding window (sliding_window is {window}), "
            f"which mlm-eval does not compute for {family.model_type} models"
        )
    if "max_position_embeddings" in r.overrides:
        raise InputError(
            f"{r.where}: attention is limited to a window of {window} positions, which mlm-eval "
            f"computes only up to that length; use --set max_position_embeddings={window} or less"
        )
    r.set("max_position_embeddings", window, "config.json sliding_window")
    r.warnings.append(
        f"the model attends within a sliding window of {window} positions; it is used up to that "
        f"length, where the window changes nothing, and not up to {positions}"
    )


def write_windows(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the keys that say which layers have a window; none where the family has no such key.

    What they cannot say is lost, which `plan` finds by reading them back.
    """
    keys = {row.key for row in family.fields}
    if "sliding_window" not in keys:
        return {}
    windowed = bool(config.window_layers)
    hf: dict[str, Any] = {"sliding_window": config.window_size + 1 if windowed else None}
    if family.windows == "alternate" and not windowed:  # transformers makes a mask of it anyway
        hf["sliding_window"] = config.max_position_embeddings
    if "use_sliding_window" in keys:
        hf["use_sliding_window"] = windowed
        hf["max_window_layers"] = min(config.window_layers, default=config.num_layers)
    if family.windows == "alternate" or (windowed and family.windows in ("after", "before")):
        flags = [number in config.window_layers for number in range(config.num_layers)]
        hf["layer_types"] = [SLIDING if flag else FULL for flag in flags]
    return hf


# ---- two rotary bases --------------------------------------------------------------------------


def rotary_of_full_layers(r: HubConfigReader, family: Family) -> HubConfigReader:
    """Return the reader of the rotary settings of layers without a window, in one base's keys.

    Takes the base of the layers with one, as Gemma 3's config class completes it.

    Raises:
        InputError: The keys are not two sets of settings, or windowed layers are scaled.
    """
    both = r.hf.get("rope_parameters") or {}
    full, sliding = (_part(r, both, name) for name in (FULL, SLIDING))
    scaling = r.hf.get("rope_scaling")
    if scaling is not None:
        full |= _part(r, {"rope_scaling": scaling}, "rope_scaling")
    base = r.hf.get("rope_theta", family.theta)
    full.setdefault("rope_theta", r.checked("rope_theta", base, "float"))
    source, local = "rope_parameters rope_theta", sliding.get("rope_theta")
    if local is None:
        source = "rope_local_base_freq"
        local = r.hf.get(source, family.local_theta)
    kind = sliding.get("rope_type", sliding.get("type", "default"))
    others = sorted(set(sliding) - {"rope_type", "type", "rope_theta"})
    if kind != "default" or others:
        raise InputError(
            f"{r.where}: the rotary positions of {SLIDING} (in rope_parameters) are scaled "
            f"({', '.join(others) or kind}), which mlm-eval does not compute"
        )
    local = r.checked(source, local, "float")
    if r.values.get("window_layers"):
        r.set("rotary_base_local", local, f"config.json {source}")
    passed = ("rope_parameters", "rope_scaling", "rope_theta")
    hf = {key: value for key, value in r.hf.items() if key not in passed}
    one = HubConfigReader(r.overrides, r.where, hf=hf | {"rope_parameters": full}, family=family)
    one.values, one.sources, one.warnings = r.values, r.sources, r.warnings
    return one


def _part(r: HubConfigReader, both: Any, name: str) -> dict[str, Any]:
    part = both.get(name) if isinstance(both, dict) else both
    if not isinstance(both, dict) or not isinstance(part, dict | None):
        raise InputError(
            f"{r.where}: {name if isinstance(both, dict) else 'rope_parameters'} is {part!r}, "
            "expected an object; correct the file"
        )
    if name == FULL and both and not {FULL, SLIDING} & set(both):
        raise InputError(
            f"{r.where}: rope_parameters is {both!r}, expected {FULL} and {SLIDING}; correct the "
            "file"
        )
    return {key: value for key, value in (part or {}).items() if value is not None}


def write_two_bases(config: ModelConfig, one_base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of both kinds of layers, given those of one base."""
    base = config.rotary_base if config.rotary_base_local is None else config.rotary_base_local
    sliding = {"rope_type": "default", "rope_theta": float(base)}
    both = {FULL: one_base["rope_parameters"], SLIDING: sliding}
    return {**one_base, "rope_parameters": both, "rope_local_base_freq": float(base)}
