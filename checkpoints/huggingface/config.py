"""config.json to ModelConfig and back, by the fields of `families`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlm_eval.checkpoints.config import (
    SETTING_KINDS,
    ModelConfig,
    RopeScaling,
    YarnScaling,
    mscale_of,
    yarn_mscale,
)
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.experts import read_latent_sizes, read_mixture, write_mixture
from mlm_eval.checkpoints.huggingface.families.family import Family
from mlm_eval.checkpoints.huggingface.fields import Use
from mlm_eval.checkpoints.huggingface.layers.hybrids import (
    read_hybrid,
    with_current_names,
    write_hybrid,
)
from mlm_eval.checkpoints.huggingface.reader import DEFAULT, Found, HubConfigReader
from mlm_eval.checkpoints.huggingface.t5 import read_t5, write_t5
from mlm_eval.checkpoints.huggingface.windows import (
    read_windows,
    rotary_of_full_layers,
    write_two_bases,
    write_windows,
)

ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""Kinds of rotary positions, and the settings without which transformers does not load them."""
ROTARY_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
)
YARN_NUMBERS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
"""What YaRN takes besides its factor and its original length; transformers has all defaults."""


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
    hf = with_current_names(hf) if family.hybrid else hf
    r = HubConfigReader(overrides, where, hf=hf, family=family)
    _refuse(r)
    _list_unknown(r)
    r.set("family", family.kind, "config.json model_type")
    r.set("vocab_size", found.vocab_size, "weights")
    r.set("params_dtype", found.params_dtype, "weights")
    for name, value in family.constants.items():
        r.set(name, value, f"every {family.model_type} model")
    _sizes(r, family)
    with_experts = read_hybrid(r, family)
    found.check_layers(r.values["num_layers"], where)
    if with_experts:
        read_mixture(r, family)
    if family.kind == "gpt" and not family.hybrid:
        read_windows(r, family)
    r.switches = {key: bool(r.look(key, "bool")[0]) for key in family.switches}
    for name, value in bias_settings(family, r.switches).items():
        r.set(name, value, "config.json")
    for name, value in found.heads.items():
        r.set(name, value, "weights")
    _activation(r, family)
    if family.rotary:
        one_base = family.local_theta is None
        _rotary(r if one_base else rotary_of_full_layers(r, family), family)
        if r.values.get("qk_l2_norm") and r.values.get("yarn"):
            raise InputError(
                f"{where}: YaRN (in rope_parameters) before an L2 norm of queries and keys is not "
                "computed by mlm-eval"
            )
    tied, source = r.look("tie_word_embeddings", "bool")
    if found.untied:
        tied, source = False, "weights"
    if family.kind == "t5":
        read_t5(r, family, found)
        return _finish(r)
    if family.kind == "bert" and not tied:
        if r.values["lm_head"]:
            raise InputError(
                f"{where}: the LM head has an output table of its own ({source}: "
                "tie_word_embeddings is off, or two tables differ), which no Megatron BERT has; "
                "mlm-eval computes tied ones only"
            )
        tied = True  # there is no output table at all
    r.set("untie_embeddings_and_output_weights", not tied, source)
    return _finish(r)


def _finish(r: HubConfigReader) -> HubConfigReader:
    try:
        return r.finish()
    except InputError as error:  # it names our setting: name the file's key too
        setting = str(error).partition(" ")[0]
        raise InputError(f"{r.where}: {r.sources.get(setting, setting)}: {error}") from None


def bias_settings(family: Family, switches: Mapping[str, bool]) -> dict[str, bool]:
    """Return which biases a model has, by the names of ModelConfig.

    Where only some linear layers have one, the others get zeros: the same function.
    """
    biased = {
        row.canonical.rpartition(".")[2]
        for row in family.rows
        if row.has_bias(switches) and not row.tensor
    }
    linear = {"linear_proj", "linear_fc1", "linear_fc2"}
    everywhere = bool(family.constants.get("add_bias_linear"))
    return {
        "add_qkv_bias": "linear_qkv" in biased,
        "add_bias_linear": everywhere or bool(biased & linear),
    }


def _refuse(r: HubConfigReader) -> None:
    """Refuse what changes the function and is not computed."""
    for key, row in r.family.table.items():
        value = r.hf.get(key, row.default)
        if row.use is Use.REFUSED and value not in row.harmless:
            raise InputError(
                f"{r.where} describes a model with {row.reason} ({key} is {value!r}), "
                "which mlm-eval does not compute"
            )


def _list_unknown(r: HubConfigReader) -> None:
    """Warn of keys that stand in no table, and of classes that are not the family's."""
    unknown = sorted(set(r.hf) - set(r.family.table))
    if unknown:
        r.warnings.append(
            f"config.json has {len(unknown)} key(s) that transformers does not read for "
            f"{r.family.model_type} models, nor mlm-eval: {', '.join(unknown)}; if the model was "
            "trained with code of its own that reads them, it may be another model"
        )
    if r.hf.get("auto_map"):
        r.warnings.append(
            "config.json names code of the model's own (auto_map), which is not run: mlm-eval "
            f"computes transformers' {r.family.model_type} model"
        )
    stated = r.hf.get("architectures")
    classes = [str(name) for name in stated] if isinstance(stated, list) else []
    if classes and not set(map(str.lower, classes)) & r.family.classes:
        r.warnings.append(
            f"config.json names the class {classes[0]}, which is none of transformers' "
            f"{r.family.model_type} classes; mlm-eval computes what those compute"
        )


def _sizes(r: HubConfigReader, family: Family) -> None:
    for row in family.fields:
        if row.setting and not row.codes:
            value, source = r.look(row.key, SETTING_KINDS[row.setting])
            value = r.set(row.setting, value, source)
            if SETTING_KINDS[row.setting] == "int" and value is not None and value < 1:
                raise InputError(
                    f"{r.where}: {row.key} is {value}, but must be at least 1 ({source})"
                )
    hidden, heads = r.values["hidden_size"], r.values["num_attention_heads"]
    if r.values.get("num_query_groups") is None:
        r.set("num_query_groups", heads, "one per attention head")
    read_latent_sizes(r, family)
    if r.values.get("kv_channels") is None:
        if heads < 1 or hidden % heads:
            raise InputError(
                f"{r.where}: {heads} attention heads do not divide the hidden size {hidden}; "
                "correct the file"
            )
        r.set("kv_channels", hidden // heads, "hidden size / heads")
        if "head_dim" in family.table:
            _agrees(r, "head_dim", "int", r.values["kv_channels"], "hidden size / heads")
    if r.values.get("ffn_hidden_size", 0) is None:
        r.set("ffn_hidden_size", 4 * hidden, f"{DEFAULT}: 4 x hidden size")
    if family.scaled_embeddings:
        r.set("embedding_multiplier", hidden**0.5, f"every {family.model_type} model")
    if "query_pre_attn_scalar" in family.table:
        scalar, source = r.look("query_pre_attn_scalar", "int")
        if not 1 <= scalar <= 1 << 30:
            raise InputError(f"{r.where}: query_pre_attn_scalar is {scalar}, expected 1 to 2^30")
        r.set("softmax_scale", scalar**-0.5, source)


def _agrees(r: HubConfigReader, key: str, kind: str, value: Any, source: str) -> None:
    """Refuse a key that says again what another says, but something else."""
    stated = r.hf.get(key)
    if stated is not None and r.checked(key, stated, kind) != value:
        raise InputError(
            f"{r.where}: {key} is {stated!r}, but {source} is {value!r}; {r.family.model_type} "
            "models have one value for both, correct the file"
        )


def _activation(r: HubConfigReader, family: Family) -> None:
    if family.activation is None:
        return
    key, codes = family.activation.key, family.activation.codes
    name, source = r.look(key, "str")
    if name not in codes and "activation" not in r.overrides:
        raise InputError(
            f"{r.where}: {key} {name!r} is not supported for {family.model_type}; known are "
            f"{', '.join(codes)}"
        )
    activation = r.set("activation", codes.get(name), f"{source} {name}")
    # transformers has one activation for the MLP and the LM head.
    if family.kind == "bert" and r.values["lm_head"]:
        if activation not in ("gelu", "gelu_tanh"):
            raise InputError(
                f"{r.where}: {key} {name!r} is not supported for a {family.model_type} model with "
                "an LM head, which has GELU in Megatron"
            )
        r.set("head_activation", activation, f"{source} {name}")


def _rotary(r: HubConfigReader, family: Family) -> None:
    """Read the rotary settings, in the order of transformers' `convert_rope_params_to_dict`."""
    # rope_parameters is transformers 5's name; the older rope_scaling wins where there is one.
    within = "rope_scaling" if r.hf.get("rope_scaling") else "rope_parameters"
    part = r.hf.get(within)
    if within == "rope_parameters" and part is None:
        part = family.absent_rotary
    part = part or {}
    if not isinstance(part, dict):
        raise InputError(f"{r.where}: {within} is {part!r}, expected an object; correct the file")
    part = {key: value for key, value in part.items() if value is not None}
    unknown = sorted(key for key in part if key not in ROTARY_KEYS and part[key])
    if unknown:
        raise InputError(
            f"{r.where}: the rotary setting {unknown[0]} (in {within}) is not supported; known are "
            f"{', '.join(ROTARY_KEYS)}"
        )

    def lookup(key: str, old_key: str, default: float) -> tuple[float, str]:
        value, source = default, DEFAULT
        if key in part:
            value, source = r.checked(key, part[key], "float"), f"config.json {within} {key}"
        elif r.hf.get(old_key) is not None:
            value = r.checked(old_key, r.hf[old_key], "float")
            source = f"config.json {old_key}"
        if key != old_key:  # a copy, which transformers 5 does not read
            _agrees(r, key, "float", value, old_key)
        return value, source

    base_key, share_key = family.rotary_keys
    r.set("rotary_base", *lookup("rope_theta", base_key, family.theta))
    share, source = lookup("partial_rotary_factor", share_key, family.partial_rotary or 1.0)
    if share != 1.0 and family.partial_rotary is None:
        raise InputError(
            f"{r.where}: partial_rotary_factor is {share}, but {family.model_type} models rotate "
            "all channels; correct the file"
        )
    r.set("rotary_percent", share, source)
    channels = r.values["qk_pos_emb_head_dim" if family.latent else "kv_channels"]
    if 0 < share <= 1.0 and int(channels * share) % 2:
        raise InputError(
            f"{r.where}: {share_key} is {share} ({source}): of heads of {channels} channels that "
            f"is an odd number, {int(channels * share)}, but they are rotated in pairs; correct "
            "the file"
        )
    if family.local_theta is not None and "type" in part and "rope_type" not in part:
        # transformers 5 puts such settings into a table that says rope_type "default" already.
        raise InputError(
            f"{r.where}: rope_scaling has the older key type ({part['type']!r}) and no rope_type; "
            "transformers 4 scales positions by it, transformers 5 does not in "
            f"{family.model_type} models; write rope_type in its place, or leave both out if "
            "nothing is scaled"
        )
    kind = part.get("rope_type", part.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise InputError(
            f"{r.where}: rotary positions of type {kind!r} ({within}) are not supported; "
            f"known are {', '.join(ROPE_TYPES)}"
        )
    numbers = {}
    for key in ROPE_TYPES[kind]:
        if key not in part:
            raise InputError(
                f"{r.where}: {within} is of type {kind} but has no {key}, which transformers needs "
                "too; correct the file"
            )
        numbers[key] = r.checked(key, part[key], "float")
    original = "original_max_position_embeddings"
    passed_over = set(part) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if family.latent and kind != "default":
        passed_over -= {"mscale_all_dim"}
        _scale_scores(r, part, within)
    passed_over -= {*numbers, *([original] if kind in ("llama3", "yarn") else [])}
    if kind == "yarn":
        passed_over -= {*YARN_NUMBERS, "truncate"}
    if passed_over:
        r.warnings.append(
            f"config.json {within}: {', '.join(sorted(passed_over))} is not read for rotary "
            f"positions of type {kind}, as in transformers"
        )
    other = r.hf.get("rope_parameters")
    if within == "rope_scaling" and isinstance(other, dict):
        wins = {"rope_theta": r.values["rotary_base"], **part}
        lost = sorted(key for key, value in other.items() if wins.get(key) not in (value, None))
        if lost:
            r.warnings.append(
                f"config.json has rope_scaling and rope_parameters, and they differ in "
                f"{', '.join(lost)}; rope_scaling wins, as in transformers"
            )
    if kind == "linear":
        r.set("rotary_seq_len_interpolation_factor", numbers["factor"], f"config.json {within}")
    elif kind in ("llama3", "yarn"):
        # The top level wins over rope_scaling; and it is the file's own length that stands in,
        # not one that a window or --set has shortened.
        positions, _ = r.look("max_position_embeddings", "int")
        positions = r.checked(original, r.hf.get(original, part.get(original, positions)), "int")
        if kind == "llama3":
            scaling = RopeScaling(**numbers, original_max_position=positions)
            r.set("rope_scaling", scaling, f"config.json {within}")
        else:
            yarn = _yarn(r, part, numbers["factor"], positions)
            r.set("yarn", yarn, f"config.json {within}")


def _scale_scores(r: HubConfigReader, part: Mapping[str, Any], within: str) -> None:
    """Take the factor of latent attention's scores (`yarn_apply_mscale` of DeepSeek's classes)."""
    if not part.get("mscale_all_dim"):
        return
    stretch = r.checked("mscale_all_dim", part["mscale_all_dim"], "float")
    factor = r.checked("factor", part.get("factor", 1.0), "float")
    channels = r.values["qk_head_dim"] + r.values["qk_pos_emb_head_dim"]
    scale = channels**-0.5 * yarn_mscale(factor, stretch) ** 2
    r.set("softmax_scale", scale, f"config.json {within} mscale_all_dim")


def _yarn(
    r: HubConfigReader, part: Mapping[str, Any], factor: float, positions: int
) -> YarnScaling:
    """Return YaRN's settings; the factor of the angles is kept as the mscale that gives it.

    Source: `_compute_yarn_parameters` in transformers' modeling_rope_utils.py.
    """
    given = {key: r.checked(key, part[key], "float") for key in YARN_NUMBERS if part.get(key)}
    mscale, mscale_all_dim = given.get("mscale"), given.get("mscale_all_dim")
    angles = None
    if "attention_factor" in part:
        angles = r.checked("attention_factor", part["attention_factor"], "float")
    elif mscale is None or mscale_all_dim is None:  # transformers takes both or none
        mscale = None
        if r.family.latent:
            angles = yarn_mscale(factor, 1.0)
        else:
            mscale_all_dim = None
    numbers = [*given.values(), *([] if angles is None else [angles])]
    if not all(map(math.isfinite, numbers)) or (angles is not None and angles <= 0):
        raise InputError(
            f"{r.where}: YaRN's {', '.join(YARN_NUMBERS)} must be finite and attention_factor "
            "above 0; correct the file"
        )
    if angles is not None:
        if factor <= 1 and angles != 1.0:
            raise InputError(
                f"{r.where}: attention_factor is {angles} with a factor of {factor:g}, at which "
                "YaRN scales nothing; correct the file"
            )
        # Latent attention's scores take mscale_all_dim too, so that it stays.
        mscale_all_dim = (mscale_all_dim or 0.0) if r.family.latent else 0.0
        mscale = mscale_of(factor, angles * yarn_mscale(factor, mscale_all_dim))
    return YarnScaling(
        factor=factor,
        original_max_position=positions,
        beta_fast=given.get("beta_fast", 32.0),
        beta_slow=given.get("beta_slow", 1.0),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        round_range=r.checked("truncate", part.get("truncate", True), "bool"),
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
    for row in family.fields:
        if row.codes:
            names = {ours: theirs for theirs, ours in reversed(list(row.codes.items()))}
            hf[row.key] = names[config.activation]
        elif row.setting:
            value = getattr(config, row.setting)
            wide = SETTING_KINDS[row.setting] == "float" and value is not None
            hf[row.written or row.key] = float(value) if wide else value
        elif row.use is Use.REFUSED and row.default is not None:
            hf[row.key] = row.harmless[0]
    hf.update(write_mixture(config, family))
    hf.update(write_hybrid(config, family))
    hf.update(switches)
    hf["tie_word_embeddings"] = not config.untie_embeddings_and_output_weights
    if family.kind == "t5":
        hf.update(write_t5(config))
    hf.update(write_windows(config, family))
    if "query_pre_attn_scalar" in family.table:
        scale = config.kv_channels**-0.5 if config.softmax_scale is None else config.softmax_scale
        hf["query_pre_attn_scalar"] = round(scale**-2)
    if config.rotary:
        rotary = _write_rotary(config, family)
        hf.update(rotary if family.local_theta is None else write_two_bases(config, rotary))
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
    elif config.yarn is not None:
        scaling = _write_yarn(config.yarn)
    elif config.rotary_seq_len_interpolation_factor is not None:
        factor = float(config.rotary_seq_len_interpolation_factor)
        scaling = {"rope_type": "linear", "factor": factor}
    base, share = float(config.rotary_base), float(config.rotary_percent)
    parameters = {"rope_type": "default", "rope_theta": base, **scaling}
    old_base, old_share = family.rotary_keys
    hf: dict[str, Any] = {"rope_parameters": parameters, old_base: base}
    if family.partial_rotary is not None:
        parameters["partial_rotary_factor"] = hf[old_share] = share
    if scaling:
        hf["rope_scaling"] = scaling
    return hf


def _write_yarn(yarn: YarnScaling) -> dict[str, Any]:
    """Return YaRN's settings as transformers reads them."""
    part: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": float(yarn.factor),
        "original_max_position_embeddings": yarn.original_max_position,
        "beta_fast": float(yarn.beta_fast),
        "beta_slow": float(yarn.beta_slow),
        "truncate": yarn.round_range,
    }
    if yarn.mscale and yarn.mscale_all_dim:
        part |= {"mscale": float(yarn.mscale), "mscale_all_dim": float(yarn.mscale_all_dim)}
        return part
    if yarn.mscale_all_dim:
        part["mscale_all_dim"] = float(yarn.mscale_all_dim)
    if not math.isclose(yarn.attention_factor, yarn_mscale(yarn.factor, 1.0), rel_tol=1e-12):
        part["attention_factor"] = yarn.attention_factor
    return part
