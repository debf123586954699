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

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def read_windows(r: HubConfigReader, family: Family) -> None:
    """Take which layers have a window; limit the positions where the family computes none.

    Raises:
        InputError: The keys contradict each other, or ask for layers of another kind.
    """
    if family.windows == "chunks":
        _read_llama4(r)
        return
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
        if family.windows in ("after", "before", "alternate"):  # the only classes that ask
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


# ---- Llama 4 -----------------------------------------------------------------------------------


def _read_llama4(r: HubConfigReader) -> None:
    """Take Llama 4's kinds of layers: with experts, with rotary positions, within chunks.

    Positions end where chunks of attention or tuned temperatures begin.

    Raises:
        InputError: A list is none of layers, or a token is sent to several experts.
    """
    layers = r.values["num_layers"]
    stated = _numbers(r, "moe_layers")
    if stated is None:
        step, source = r.look("interleave_moe_layer_step", "int")
        if step < 1:
            raise InputError(f"{r.where}: interleave_moe_layer_step is {step}, expected 1 or more")
        stated = list(range(step - 1, layers, step))
    else:
        source = "config.json moe_layers"
    sparse = tuple(sorted({number for number in stated if 0 <= number < layers}))
    topk, width = r.values["moe_router_topk"], r.values["moe_ffn_hidden_size"]
    r.set("moe_layers", sparse, source)
    r.set("moe_shared_expert_intermediate_size", width if sparse else 0, "config.json")
    if not sparse:
        r.set("num_experts", 0, "no layer has experts")
        r.set("moe_apply_probs_on_input", False, "no layer has experts")
    elif topk != 1:
        raise InputError(
            f"{r.where}: num_experts_per_tok is {topk}; mlm-eval computes Llama 4 with one expert "
            "for a token beside the shared one"
        )
    rotary = _numbers(r, "no_rope_layers")
    if rotary and len(rotary) != layers:
        raise InputError(
            f"{r.where}: no_rope_layers is {rotary}, expected 0 or 1 for each of {layers} layers"
        )
    if not rotary:
        interval, _ = r.look("no_rope_layer_interval", "int")
        if interval < 1:
            raise InputError(f"{r.where}: no_rope_layer_interval is {interval}, expected 1 or more")
        rotary = [(number + 1) % interval for number in range(layers)]
    plain = tuple(number for number in range(layers) if not rotary[number])
    r.set("no_rope_layers", plain, "config.json no_rope_layers")
    if r.values["qk_l2_norm"]:
        r.set("no_l2_norm_layers", plain, "config.json no_rope_layers")
    _limit_llama4(r, [CHUNKED if flag else FULL for flag in rotary], tuned=bool(plain))


def _limit_llama4(r: HubConfigReader, types: list[str], *, tuned: bool) -> None:
    stated = r.hf.get("layer_types")
    if stated is not None:
        names = stated if isinstance(stated, list) else []
        if len(names) != r.values["num_layers"] or not set(map(str, names)) <= {FULL, CHUNKED}:
            raise InputError(
                f"{r.where}: layer_types is {stated!r}, expected {FULL} or {CHUNKED} for each "
                "layer; mlm-eval does not compute other layers"
            )
        types = [str(name) for name in names]
    positions = r.values["max_position_embeddings"]
    limit = positions
    if CHUNKED in types:
        chunk, _ = r.look("attention_chunk_size", "int")
        if chunk < 1:
            raise InputError(f"{r.where}: attention_chunk_size is {chunk}, expected 1 or more")
        limit = min(limit, chunk)
    tuning = r.hf.get("attn_temperature_tuning", True)
    if not isinstance(tuning, int):
        raise InputError(
            f"{r.where}: attn_temperature_tuning is {tuning!r}, expected true or false"
        )
    strength, _ = r.look("attn_scale", "float")
    first, _ = r.look("floor_scale", "int")
    if tuned and tuning and strength:
        if first < 2:
            raise InputError(f"{r.where}: floor_scale is {first}, expected 2 or more")
        limit = min(limit, first - 1)
    if limit == positions:
        return
    if "max_position_embeddings" in r.overrides:
        raise InputError(
            f"{r.where}: from position {limit} on attention_chunk_size or floor_scale act, which "
            f"mlm-eval does not compute; use --set max_position_embeddings={limit} or less"
        )
    r.set("max_position_embeddings", limit, "config.json attention_chunk_size, floor_scale")
    r.warnings.append(
        f"the model attends within chunks and tunes temperatures from position {limit} on; it is "
        f"used up to that length, where neither changes anything, and not up to {positions}"
    )


def _numbers(r: HubConfigReader, key: str) -> list[int] | None:
    """Return a list of whole numbers; None where there is none."""
    value = r.hf.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or any(type(number) is not int for number in value):
        raise InputError(f"{r.where}: {key} is {value!r}, expected a list of whole numbers")
    return list(value)


def _write_llama4(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of Llama 4's layers; chunks as long as the longest text change nothing."""
    rotary = [int(number not in config.no_rope_layers) for number in range(config.num_layers)]
    return {
        "moe_layers": list(config.moe_layers),
        "interleave_moe_layer_step": 1,
        "no_rope_layers": rotary,
        "no_rope_layer_interval": 4,
        "layer_types": [CHUNKED if flag else FULL for flag in rotary],
        "attention_chunk_size": config.max_position_embeddings,
        "attn_temperature_tuning": False,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    }


# ---- writing -----------------------------------------------------------------------------------


def write_windows(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the keys that say which layers have a window; none where the family has no such key.

    What they cannot say is lost, which `plan` finds by reading them back.
    """
    if family.windows == "chunks":
        return _write_llama4(config)
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
    if not r.checked("truncate", full.get("truncate", True), "bool"):
        raise InputError(
            f"{r.where}: truncate of {FULL} (in rope_parameters) is false, which transformers does "
            f"not heed in {family.model_type} models; correct the file"
        )
    # transformers asks the part alone for the original length.
    passed = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")
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
