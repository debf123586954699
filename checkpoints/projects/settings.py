"""Settings that other projects write beside Megatron's weights, as Megatron's args would say them.

Megatron-Bridge, NeMo and verl save `torch_dist` without args. Their settings are the fields of
megatron-core's config (NeMo 1 has words of its own, see `nemo_1.py`), as plain data: YAML is read
without any tag, and what its `_target_` names is compared as text, never looked up.
Source: docs/megatron.md, "Layouts without args".
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError, first_line, require, shown
from mlm_eval.checkpoints.files.safe_pickle import check_written_out, is_scalar
from mlm_eval.checkpoints.files.text_file import read_json_object, read_text
from mlm_eval.checkpoints.projects.gemma import gemma_settings
from mlm_eval.checkpoints.projects.nemo_1 import NEMO_CONFIG, has_oldest_order, nemo_fields

_LARGEST = 1 << 20
"""Bytes of a settings file."""

_LONG_NUMBER = 13  # digits
_MOST_LONG_NUMBERS = 1000
"""Numbers of one hash, as keys, take minutes to tell apart."""

_OF_BASE_60 = re.compile(r"(?::[0-5]?\d){100}")
"""YAML's numbers of hours, minutes and seconds, which may go on for ever."""

_MOST_ENTRIES = 1 << 20
"""Of all mappings, those that merges bring in among them."""

_YAML_ERRORS = (
    *(RecursionError, ValueError, TypeError, AttributeError, LookupError, OverflowError),
    pickle.UnpicklingError,
)
"""What the library raises beside its own errors, and `check_written_out`."""

_LONGEST = 1 << 14
"""Entries of a list, such as one a layer."""

STEP_TRACKER = "latest_checkpointed_iteration.txt"
_VERL_SETTINGS = "transformer_config.json"
BRIDGE_SETTINGS = "run_config.yaml"

WEIGHT_PARTS = (".metadata", "common.pt", "metadata.json", "train_state.pt", BRIDGE_SETTINGS)
"""Files in a folder of distributed weights that are no weights."""

_SILU = ("torch.nn.functional.silu", "torch.nn.functional.SiLU")
_GELU = ("torch.nn.functional.gelu",)
_TANH = ("fast_gelu", "openai_gelu", "gelu_impl")
"""megatron-core's and Megatron-Bridge's functions that are the tanh GELU."""

_WORDS = {
    "squared_relu": ("squared_relu",),
    "quick_geglu": ("quick_gelu",),
}

_TRANSLATED = (
    "activation_func",
    "share_embeddings_and_output_weights",
    "scale_factor",
    "hidden_act",
)

_RENAMED = {
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}

_PASSED_ON = [
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "rotary_base",
]
"""Their models are built with these, which Megatron-LM's own never received."""

GATED_GELU = "gated_gelu"
"""An arg of our own: the name of a GELU with a gate, for which Megatron-LM has no arg."""

RAN = "activation"
"""An arg of our own: the activation that ran, by our own word for it."""

ACTIVATION_ARGS = (
    *(RAN, GATED_GELU),
    *("swiglu", "squared_relu", "quick_geglu", "activation_func"),
)
"""The args by which a settings file says which activation ran."""

BESIDE = "settings_beside"
"""An arg of our own: the file that the others come from, which may not hold all of them."""

PASSED_ON = "passed_to_model"
"""Where args say which settings the model was given although Megatron-LM passes none of them."""


OF_PROVIDERS = frozenset(
    """should_pad_vocab make_vocab_size_divisible_by hf_model_id generation_config parallel_output
    scatter_embedding_sequence_parallel seq_length max_position_embeddings low_freq_factor
    high_freq_factor old_context_len bias_activation_fusion gated_linear_unit data_step_fn
    forward_step_fn transformer_layer_spec use_transformer_engine_full_layer_spec
    tp_comm_overlap_cfg tokenizer_id enable_autocast restore_modelopt_state
    interleaved_attn_pattern is_vision_language""".split()
)
"""Fields of providers beside megatron-core's, which change no output."""


@dataclass(frozen=True)
class SideSettings:
    """Settings found beside a checkpoint's weights."""

    path: Path
    format: str
    """`megatron-bridge`, `nemo` or `verl`."""
    args: dict[str, Any]
    """Under Megatron's names of arguments."""
    oldest_order: bool = False
    """Whether the QKV rows of NeMo's own layers are in the order of version 0."""


def weights_folder(root: Path) -> Path | None:
    """Return the folder with the weights of a NeMo 2 or verl checkpoint, given its root or step.

    None where the folder is neither, or holds no such weights.
    """
    for folder in (root, root.parent) if root.name == "context" else (root,):
        if (folder / "context").is_dir() and (folder / "weights").is_dir():
            return folder / "weights"
    steps = [entry for entry in root.iterdir() if entry.name.startswith("global_step_")]
    if len(steps) > 1:
        steps = [entry for entry in steps if entry.name == _latest(root)]
    for folder in (root, *steps):
        for part in (folder, folder / "actor"):
            if (part / "dist_ckpt").is_dir():
                return part / "dist_ckpt"
    return None


def weights_beside(file: Path) -> Path | None:
    """Return the folder with the weights of a NeMo 2 or verl checkpoint, given a file beside it.

    None where the file belongs to neither.
    """
    if file.parent.name == "context":
        return weights_folder(file.parent)
    if file.name in (_VERL_SETTINGS, STEP_TRACKER):
        return weights_folder(file.parent)
    return None


def _latest(root: Path) -> str | None:
    tracker = root / STEP_TRACKER
    return f"global_step_{read_text(tracker).strip()}" if tracker.is_file() else None


def find_settings(folder: Path) -> SideSettings | None:
    """Return the settings beside a folder of weights without args; None where there are none.

    Raises:
        InputError: The file cannot be read as plain data.
    """
    for name, within, project in (
        (BRIDGE_SETTINGS, "model", "megatron-bridge"),
        ("../context/model.yaml", "config", "nemo"),
    ):
        path = folder / name
        if path.is_file():
            values = read_yaml(path).get(within)
            if not isinstance(values, dict):
                raise InputError(f"{path} has no {within} with settings; copy the file again")
            return _of_file(path, project, values)
    for root in (folder, folder / ".."):
        if (root / NEMO_CONFIG).is_file():
            return nemo_settings(root)
    path = folder / ".." / _VERL_SETTINGS
    if path.is_file():
        values = read_json_object(path)
        hub = folder / "../huggingface/config.json"
        if hub.is_file():
            values = _of_hub(read_json_object(hub)) | values
        return _of_file(path, "verl", values)
    return None


def nemo_settings(root: Path) -> SideSettings:
    """Return the settings of a NeMo 1 checkpoint.

    Raises:
        InputError: They cannot be read as plain data, or ask for what is not computed.
    """
    path = root / NEMO_CONFIG
    values = read_yaml(path)
    found = _of_file(path, "nemo", nemo_fields(values, str(path.resolve())))
    return dataclasses.replace(found, oldest_order=has_oldest_order(values))


def _of_file(path: Path, project: str, values: Mapping[str, Any]) -> SideSettings:
    gemma = gemma_settings(str(values.get("_target_", "")), values, str(path))
    args = args_of_config(values if gemma is None else gemma)
    place = path.resolve()
    return SideSettings(place, project, args | {BESIDE: f"{place.parent.name}/{place.name}"})


def _of_hub(hub: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json says that megatron-core's config has no field for."""
    rotary = hub.get("rope_parameters")
    base = hub.get("rope_theta", rotary.get("rope_theta") if isinstance(rotary, dict) else None)
    found: dict[str, Any] = {
        "max_position_embeddings": hub.get("max_position_embeddings"),
        "hidden_act": hub.get("hidden_act"),
    }
    if base is not None and not hub.get("rope_scaling"):
        found |= {"rotary_base": base, "position_embedding_type": "rope"}
    if isinstance(hub.get("tie_word_embeddings"), bool):
        found["share_embeddings_and_output_weights"] = hub["tie_word_embeddings"]
    return found


def neox_files(step: Path) -> list[Path]:
    """Return the .yml files of a gpt-neox run: the step's, else the root's."""
    for folder in (step / "configs", step, step.parent / "configs", step.parent):
        files = sorted(folder.glob("*.y*ml")) if folder.is_dir() else []
        if files:
            return files
    return []


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, read as plain data: a tag is an error.

    Raises:
        InputError: The file is unreadable, no plain YAML, or holds something else.
    """
    require("yaml", str(path))
    import yaml

    text = read_text(path, most=_LARGEST)
    if _OF_BASE_60.search(text):
        raise InputError(f"{path} holds numbers that no settings have; copy the file again")
    try:
        values = yaml.load(text, Loader=_plain_loader())  # a SafeLoader
        check_written_out(values)
    except _YAML_ERRORS as error:
        raise InputError(f"{path} is not plain YAML ({shown(str(error))}); copy it again") from None
    except yaml.YAMLError as error:
        raise InputError(
            f"{path} is not plain YAML ({first_line(error)}); nothing in it was run, give the file "
            "as its project wrote it"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings; copy the file again")
    return values


@functools.cache
def _plain_loader() -> Any:
    """Return the library's loader of plain data, which counts merges and refuses doubled keys.

    A mapping that merges another one twice has twice its entries, and so on without end.
    """
    import yaml

    class PlainLoader(yaml.SafeLoader):
        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.text = stream
            self.entries, self.long_numbers, self.looked_at = 0, 0, set[int]()

        def flatten_mapping(self, node: Any) -> None:
            if id(node) not in self.looked_at:  # later it holds what it has merged, too
                self.looked_at.add(id(node))
                self._check_keys(node)
            super().flatten_mapping(node)
            self.entries += len(node.value)
            if self.entries > _MOST_ENTRIES:
                raise ValueError("its merges make more entries than any settings have")

        def _check_keys(self, node: Any) -> None:
            seen: dict[tuple[str, str], Any] = {}
            for key, value in node.value:
                if not isinstance(key.value, str):
                    continue
                if key.tag.endswith((":int", ":float")) and len(key.value) >= _LONG_NUMBER:
                    self.long_numbers += 1
                known = seen.setdefault((key.tag, key.value), value)
                if not key.tag.endswith(":merge") and not self._same(known, value):
                    raise ValueError(f"{shown(key.value)} stands in one mapping with two values")
            if self.long_numbers > _MOST_LONG_NUMBERS:
                raise ValueError("it has more long numbers as keys than any settings")

        def _same(self, one: Any, other: Any) -> bool:
            """Whether two values are one, or written alike."""
            if one is other:
                return True
            starts, ends = zip(
                *((node.start_mark.index, node.end_mark.index) for node in (one, other)),
                strict=True,
            )
            if ends[0] - starts[0] != ends[1] - starts[1]:
                return False
            return self.text[starts[0] : ends[0]] == self.text[starts[1] : ends[1]]

    return PlainLoader


def args_of_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the args that say what fields of a config say, given as plain data."""
    args: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(name, str) or name.startswith("_") or name in _TRANSLATED:
            continue
        args[_RENAMED.get(name, name)] = _plain(value)
    shared = values.get("share_embeddings_and_output_weights")
    if shared is not None:
        args["untie_embeddings_and_output_weights"] = not shared
    heads, groups = args.get("num_attention_heads"), args.get("num_query_groups")
    args["num_query_groups"] = heads if groups is None else groups
    args["group_query_attention"] = groups is not None and groups != heads
    if args.get("max_position_embeddings") is None:
        args["max_position_embeddings"] = args.get("seq_length")
    if args.get("kv_channels") is None:
        args.pop("kv_channels", None)
    if values.get("scale_factor") is not None:  # NeMo's Llama 3.1 and later
        usual = {"low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
        odd = [name for name, value in usual.items() if values.get(name, value) != value]
        if odd:
            raise InputError(
                f"the settings have {odd[0]} = {values[odd[0]]!r}, where Llama 3.1 has "
                f"{usual[odd[0]]}; mlm-eval does not compute that"
            )
        args |= {"use_rope_scaling": True, "rope_scaling_factor": float(values["scale_factor"])}
    args |= _activation(values)
    return {**args, PASSED_ON: [name for name in _PASSED_ON if args.get(name)]}


def _plain(value: Any) -> Any:
    """Return a value safe to compare and to show; an enum or a dtype is the name of its class.

    A few lines of YAML can stand for more values than fit into memory, by references to one
    another: what is nested is not walked.
    """
    if isinstance(value, dict):
        return str(value.get("_target_", "an object"))[:200]
    if isinstance(value, list):
        scalars = len(value) <= _LONGEST and all(map(is_scalar, value))
        return value if scalars else "a list of lists"
    return value if is_scalar(value) else "an object"


def _activation(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the args of a function and a gate."""
    if values.get(RAN) is not None:
        return {RAN: values[RAN]}
    function, gated = values.get("activation_func"), bool(values.get("gated_linear_unit"))
    if isinstance(function, dict):
        function = function.get("_target_")
    if function is None and gated and values.get("hidden_act") in ("silu", "swish"):
        return {"swiglu": True}  # verl's own file cannot hold a function
    if function is None:
        return {}
    text = str(function)
    of_target = values.get("activation_func")
    tanh = isinstance(of_target, dict) and of_target.get("approximate") == "tanh"
    if gated and (text.endswith(_TANH) or text in _GELU):
        return {GATED_GELU: "geglu_tanh" if tanh or text.endswith(_TANH) else "geglu"}
    if text in _SILU and gated:
        return {"swiglu": True}
    if text.endswith(_WORDS["quick_geglu"]) and gated:
        return {"quick_geglu": True}
    if text.endswith(_WORDS["squared_relu"]) and not gated:
        return {"squared_relu": True, "gated_linear_unit": False}
    if text in _GELU and not gated and not tanh:
        return {"swiglu": False, "gated_linear_unit": False}
    return {"activation_func": text}  # refused by that name, with its way out


def not_heeded(whose: str, names: list[str], most: int = 8) -> str:
    """Return the sentence that lists unknown settings."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (
        f"{whose} settings that mlm-eval does not know, which are not heeded: "
        f"{', '.join(names[:most])}{more}"
    )
