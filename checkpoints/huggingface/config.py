"""config.json to ModelConfig and back, by the fields of `families`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlm_eval.checkpoints.config import (
    SETTING_KINDS,
    ConfigBuilder,
    ModelConfig,
    RopeScaling,
    is_of_kind,
)
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.families import QUANTIZED, Family

DEFAULT = "transformers' default"
ROTARY_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclass(frozen=True)
class Found:
    """What the weights themselves tell: the size of the vocabulary, dtype, heads, tying."""

    vocab_size: int
    params_dtype: str
    untied: bool | None = None
    """True where a tied model's output table differs from its embeddings all the same."""
    heads: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class HubConfigReader(ConfigBuilder):
    """Collects the settings of config.json."""

    hf: Mapping[str, Any] = field(default_factory=dict)
    switches: dict[str, bool] = field(default_factory=dict)
    """config.json's keys that say which modules have biases."""

    def get(self, key: str, kind: str, default: Any, within: str | None = None) -> tuple[Any, str]:
        """Return a value of config.json (of its part `within`), checked, and its source."""
        part = self.hf if within is None else self.hf.get(within) or {}
        value = part.get(key)
        if value is None:
            return default, DEFAULT
        if not is_of_kind(value, kind):
            raise InputError(
                f"{self.where}: {key} is {value!r}, expected a value of type {kind}; correct the "
                "file"
            )
        return (float(value) if kind == "float" else value), f"config.json {key}"


def read_config(
    hf: Mapping[str, Any],
    family: Family,
    *,
    found: Found,
    overrides: Mapping[str, Any],
    where: str,
) -> HubConfigReader:
    """Return the config of a Hugging Face model.

    Args:
        hf: config.json.
        family: Its family, from `model_type`.
        found: What the weights tell.
        overrides: `--set` values; they win.
        where: The file, for messages.

    Raises:
        InputError: A setting is missing or of the wrong type, or changes the mathematics in a way
            that is not implemented.
    """
    for refusal in (QUANTIZED, *family.refusals):
        value = hf.get(refusal.key, refusal.default)
        if value not in refusal.harmless:
            raise InputError(
                f"{where} describes a model with {refusal.what} ({refusal.key} is {value!r}), "
                "which mlm-eval does not compute"
            )
    r = HubConfigReader(overrides, where, hf=hf)
    r.set("family", family.kind, "config.json model_type")
    r.set("vocab_size", found.vocab_size, "weights")
    r.set("params_dtype", found.params_dtype, "weights")
    for name, value in family.constants.items():
        r.set(name, value, f"every {family.model_type} model")
    _sizes(r, family)
    _window(r, family)
    r.switches = {
        key: bool(r.get(key, "bool", default)[0]) for key, default in family.switches.items()
    }
    for name, value in bias_settings(family, r.switches).items():
        r.set(name, value, "config.json")
    _activation(r, family)
    if r.values.get("position_embedding_type") == "rope":
        _rotary(r, family)
    for name, value in found.heads.items():
        r.set(name, value, "weights")
    tied, source = r.get("tie_word_embeddings", "bool", family.tied)
    if found.untied:
        tied, source = False, "weights"
    if family.kind == "bert" and not tied:
        if r.values["lm_head"]:
            raise InputError(
                f"{where}: the LM head has an output table of its own, which no Megatron BERT has; "
                "mlm-eval computes tied ones only"
            )
        tied = True  # there is no output table at all
    r.set("untie_embeddings_and_output_weights", not tied, source)
    return r.finish()


def bias_settings(family: Family, switches: Mapping[str, bool]) -> dict[str, bool]:
    """Return which biases a model has, by the names of ModelConfig.

    Where only some linear layers have one, the others get zeros: the same function.
    """
    has_bias = {row.canonical.rpartition(".")[2]: row.has_bias(switches) for row in family.rows}
    linear = ("linear_proj", "linear_fc1", "linear_fc2")
    return {
        "add_qkv_bias": has_bias["linear_qkv"],
        "add_bias_linear": any(has_bias[name] for name in linear),
    }


def _sizes(r: HubConfigReader, family: Family) -> None:
    for entry in family.fields:
        r.set(entry.setting, *r.get(entry.key, SETTING_KINDS[entry.setting], entry.default))
    hidden, heads = r.values["hidden_size"], r.values["num_attention_heads"]
    if r.values.get("num_query_groups") is None:
        r.set("num_query_groups", heads, "one per attention head")
    if r.values.get("kv_channels") is None:
        if heads < 1 or hidden % heads:
            raise InputError(
                f"{r.where}: {heads} attention heads do not divide the hidden size {hidden}; "
                "correct the file"
            )
        r.set("kv_channels", hidden // heads, "hidden size / heads")
    if r.values["ffn_hidden_size"] is None:
        r.set("ffn_hidden_size", 4 * hidden, f"{DEFAULT}: 4 x hidden size")
    if r.values["max_position_embeddings"] < 1:
        raise InputError(f"{r.where}: max_position_embeddings must be at least 1; correct the file")


def _window(r: HubConfigReader, family: Family) -> None:
    """Limit the positions to the sliding window: up to there a window changes nothing."""
    window = r.hf.get("sliding_window", family.sliding_window)
    if family.model_type in ("qwen2", "qwen3") or window is None:
        return  # these have a switch of their own, refused where it is on
    window, _ = r.get("sliding_window", "int", family.sliding_window)
    positions = r.values["max_position_embeddings"]
    if positions <= window:
        return
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


def _activation(r: HubConfigReader, family: Family) -> None:
    key = family.activation_key
    name, source = r.get(key, "str", family.activation)
    if name not in family.activations and "activation" not in r.overrides:
        raise InputError(
            f"{r.where}: {key} {name!r} is not supported for {family.model_type}; known are "
            f"{', '.join(family.activations)}"
        )
    activation = r.set("activation", family.activations.get(name), f"{source} {name}".strip())
    if family.kind == "bert":  # transformers has one activation for the MLP and the LM head
        r.set("head_activation", activation, f"{source} {name}")


def _rotary(r: HubConfigReader, family: Family) -> None:
    # rope_parameters is transformers 5's name; rope_theta and rope_scaling are older, and win.
    within = "rope_scaling" if r.hf.get("rope_scaling") else "rope_parameters"
    part = r.hf.get(within) or {}
    if not isinstance(part, dict):
        raise InputError(f"{r.where}: {within} is {part!r}, expected an object; correct the file")
    unknown = sorted(key for key, value in part.items() if key not in ROTARY_KEYS and value)
    if unknown:
        raise InputError(
            f"{r.where}: the rotary setting {unknown[0]} (in {within}) is not supported; known are "
            f"{', '.join(ROTARY_KEYS)}"
        )
    old_base, old_share = family.old_rotary_keys

    def lookup(key: str, old_key: str, default: float) -> tuple[float, str]:
        value, source = r.get(key, "float", None, within)
        return (value, source) if value is not None else r.get(old_key, "float", default)

    r.set("rotary_base", *lookup("rope_theta", old_base, 10000.0))
    share, source = lookup("partial_rotary_factor", old_share, family.partial_rotary or 1.0)
    if share != 1.0 and family.partial_rotary is None:
        raise InputError(
            f"{r.where}: partial_rotary_factor is {share}, but {family.model_type} models rotate "
            "all channels; correct the file"
        )
    r.set("rotary_percent", share, source)
    kind, source = r.get("rope_type", "str", None, within)
    if kind is None:
        kind, source = r.get("type", "str", "default", within)
    if kind == "linear":
        factor, source = r.get("factor", "float", 1.0, within)
        r.set("rotary_seq_len_interpolation_factor", factor, f"config.json {within}")
    elif kind == "llama3":
        positions = r.values["max_position_embeddings"]
        scaling = RopeScaling(
            factor=r.get("factor", "float", 8.0, within)[0],
            low_freq_factor=r.get("low_freq_factor", "float", 1.0, within)[0],
            high_freq_factor=r.get("high_freq_factor", "float", 4.0, within)[0],
            original_max_position=r.get(
                "original_max_position_embeddings", "int", positions, within
            )[0],
        )
        r.set("rope_scaling", scaling, f"config.json {within}")
    elif kind != "default":
        raise InputError(
            f"{r.where}: rotary positions of type {kind!r} ({within}) are not supported; "
            "known are default, linear and llama3"
        )


def write_config(
    config: ModelConfig, family: Family, model_class: str, *, switches: Mapping[str, bool]
) -> dict[str, Any]:
    """Return config.json for a model, without the ids of special tokens."""
    hf: dict[str, Any] = {
        "architectures": [model_class],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
    }
    for entry in family.fields:
        value = getattr(config, entry.setting)
        hf[entry.key] = float(value) if SETTING_KINDS[entry.setting] == "float" else value
    names = {ours: theirs for theirs, ours in reversed(list(family.activations.items()))}
    hf[family.activation_key] = names[config.activation]
    hf.update(switches)
    hf["tie_word_embeddings"] = not config.untie_embeddings_and_output_weights
    for refusal in family.refusals:
        if refusal.default not in refusal.harmless:
            hf[refusal.key] = refusal.harmless[0]
    if family.sliding_window is not None:
        hf["sliding_window"] = None
    if config.rotary:
        hf.update(_write_rotary(config, family))
    if config.num_classes:
        labels = [f"LABEL_{index}" for index in range(config.num_classes)]
        hf["id2label"] = {str(index): label for index, label in enumerate(labels)}
        hf["label2id"] = {label: index for index, label in enumerate(labels)}
    hf["dtype"] = config.params_dtype
    return hf


def _write_rotary(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the rotary settings, under transformers 5's name and the older ones."""
    scaling: dict[str, Any] = {}
    if config.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": float(config.rope_scaling.factor),
            "low_freq_factor": float(config.rope_scaling.low_freq_factor),
            "high_freq_factor": float(config.rope_scaling.high_freq_factor),
            "original_max_position_embeddings": config.rope_scaling.original_max_position,
        }
    elif config.rotary_seq_len_interpolation_factor is not None:
        factor = float(config.rotary_seq_len_interpolation_factor)
        scaling = {"rope_type": "linear", "factor": factor}
    base, share = float(config.rotary_base), float(config.rotary_percent)
    parameters = {"rope_type": "default", "rope_theta": base, **scaling}
    old_base, old_share = family.old_rotary_keys
    hf: dict[str, Any] = {"rope_parameters": parameters, old_base: base}
    if family.partial_rotary is not None:
        parameters["partial_rotary_factor"] = hf[old_share] = share
    if scaling:
        hf["rope_scaling"] = scaling
    return hf
