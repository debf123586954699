"""Layouts of other projects that hold the same models, told apart by what is in the folder or file.

None of them is read. Each is named at whatever door it is met, a root, a step, a folder of weights
or a single file, with the way out that exists; where a part of it is Megatron's own format, that
part is what to give. A reader of such a layout starts from its recogniser here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.stand_in import refuse_stand_in
from mlm_eval.checkpoints.projects.nemo_1 import NEMO_CONFIG, NEMO_FILE, NEMO_FOLDER

STEP = re.compile(r"global_step_?\d+(_universal)?")
LAYER_FILE = re.compile(r"layer_(\d{1,6})-model_(\d{1,6})-model_states\.pt")
MODULE_FILE = re.compile(r"mp_rank_(\d{1,6})_model_states\.pt")
ZERO_FILE = re.compile(r"(.*_)?zero_pp_rank_\d+.*_(optim|model)_states\.pt")
EXPERT_FILE = re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_\d+.*_states\.pt")


def is_deepspeed_file(name: str) -> bool:
    """Whether a file has one of the names of DeepSpeed's steps."""
    kinds = (LAYER_FILE, MODULE_FILE, ZERO_FILE, EXPERT_FILE)
    return any(kind.fullmatch(name) for kind in kinds)


_VERL_SHARD = re.compile(r"(model|optim|extra_state)_world_size_\d+_rank_\d+\.pt")
_OTHERS: tuple[tuple[str, str, str], ...] = (
    ("adapter_model.safetensors|adapter_model.bin", "adapters (LoRA) without their base model",
     "merge them first, with peft's merge_and_unload()"),
    (r"(?!ggml-vocab).*\.gguf", "a GGUF model of llama.cpp",
     "use the Hugging Face or Megatron checkpoint that it was made from"),
    (r"tf_model\.h5|tf_model-\d+-of-\d+\.h5", "weights of TensorFlow",
     "load it with transformers (from_tf=True, before transformers 5) and save it again"),
    (r"flax_model\.msgpack|flax_model-\d+-of-\d+\.msgpack", "weights of Flax",
     "load it with transformers (from_flax=True, before transformers 5) and save it again"),
    (r".*\.ckpt\.(index|meta|data-\d+-of-\d+)", "a checkpoint of TensorFlow 1",
     "convert it with transformers' converter of that model first"),
    (r".*\.onnx", "an ONNX model", "use the checkpoint that it was exported from"),
    (r"consolidated\.\d\d\.pth", "Meta's own release of Llama",
     "use the Hugging Face form of the same model"),
    (r"consolidated(\.\d+)?\.safetensors", "Mistral's own release",
     "use the Hugging Face form of the same model (config.json and model*.safetensors)"),
    (r"lit_model\.pth", "a LitGPT checkpoint",
     "convert it with `litgpt convert_from_litgpt` to the Hugging Face form"),
    (r"rank\d+\.safetensors|.*\.engine", "an engine of TensorRT-LLM",
     "use the checkpoint that it was built from"),
)  # fmt: skip


def refuse_relative(path: Path) -> None:
    """Refuse, by name, a folder or file that another project wrote in a form that is not read.

    Args:
        path: What was given, or the folder in which no format was found.

    Raises:
        InputError: It is one of these; the message says which, and what can be done.
    """
    if path.is_file():
        _refuse_file(path)
        return
    for recognise in _FOLDERS:
        if (what := recognise(path)) is not None:
            raise InputError(f"{path} {what}")


# ---- folders -----------------------------------------------------------------------------------


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    except OSError:
        return []


def _matching(names: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    return [name for name in names if pattern.fullmatch(name)]


def is_distributed(folder: Path) -> bool:
    """Whether a folder holds what torch.distributed.checkpoint writes."""
    names = _names(folder)
    return ".metadata" in names or any(name.endswith(".distcp") for name in names)


def _verl(folder: Path) -> str | None:
    """FSDP's parts in `global_step_N/actor/`, or its `critic/`."""
    for step in (folder, *(folder / name for name in reversed(_matching(_names(folder), STEP)))):
        for part in (step, *(step / name for name in ("actor", "critic"))):
            names = _names(part)
            if _matching(names, _VERL_SHARD):
                return (
                    "is a checkpoint of verl with FSDP's parts of its tensors; merge it to the "
                    "Hugging Face form with `python -m verl.model_merger merge --backend fsdp`, "
                    "and give --ckpt the result"
                )
    return None


def _adapters(folder: Path) -> str | None:
    """LoRA without its base: verl's `adapter_checkpoint/`, NeMo 2's `adapter_metadata.json`."""
    for step in (folder, *(folder / name for name in reversed(_matching(_names(folder), STEP)))):
        for part in (step, step / "actor", step / "weights"):
            for name in ("adapter_checkpoint", "adapter_metadata.json"):
                if (part / name).exists():
                    return (
                        f"holds adapters (LoRA) without their base model ({part / name}); merge "
                        "them into it first, with the project that made them"
                    )
    return None


def _nemo_2(folder: Path) -> str | None:
    """`weights/` beside `context/`, in another form than torch_dist."""
    if not {"weights", "context"} <= set(_names(folder)):
        return None
    if not is_distributed(folder / "weights"):
        return (
            "is a NeMo 2 checkpoint whose weights/ holds neither torch_dist nor zarr; copy all of "
            "it, or export it with NeMo to the Hugging Face form (llm.export_ckpt)"
        )
    return None


def _nemo_1(folder: Path) -> str | None:
    """NeMo's weights without `model_config.yaml`, or that file without weights."""
    names = _names(folder)
    if NEMO_CONFIG in names:
        return (
            f"holds NeMo's {NEMO_CONFIG} without weights ({NEMO_FOLDER}/, or {NEMO_FILE} in it or "
            "in a folder for each rank); copy these too"
        )
    ranks = [name for name in names if (folder / name / NEMO_FILE).is_file()]
    if NEMO_FILE in names or ranks:
        where = folder if NEMO_FILE in names else folder / ranks[0]
        return f"is {NEMO_WITHOUT_SETTINGS} (found {where / NEMO_FILE})"
    return None


NEMO_WITHOUT_SETTINGS = (
    f"a NeMo checkpoint without {NEMO_CONFIG}, which holds its settings; put that file of the "
    f"same model above the weights, which are called {NEMO_FILE}"
)


def _deepspeed(folder: Path) -> str | None:
    """Files of ranks or of layers in `global_stepN`, which the file `latest` in the root names."""
    for part in (folder, *(folder / name for name in _matching(_names(folder), STEP))):
        names = _names(part)
        zero = part / "zero"
        universal = zero.is_dir() and any(n.startswith("mp_rank") for n in names)
        if universal or any(map(is_deepspeed_file, names)) or _is_universal(zero):
            return DEEPSPEED
    names = _names(folder)
    steps = _matching(names, STEP)
    if ("latest" in names and steps) or "zero_to_fp32.py" in names:
        return DEEPSPEED
    return None


DEEPSPEED = (
    "is a DeepSpeed checkpoint; use the tools of the project that wrote it to bring it to "
    "Megatron's form first (Megatron-DeepSpeed has "
    "tools/convert_checkpoint/deepspeed_to_megatron.py, gpt-neox tools/ckpts/"
    "convert_neox_to_hf.py, a folder of transformers' Trainer zero_to_fp32.py)"
)


def _is_universal(folder: Path) -> bool:
    """Whether a folder holds DeepSpeed's universal form: a folder a parameter, with fp32.pt."""
    return any((folder / name / "fp32.pt").is_file() for name in _names(folder)[:4])


def _fsdp(folder: Path) -> str | None:
    """What accelerate and transformers' Trainer leave of FSDP, in a folder of its own."""
    for name in _names(folder):
        if re.fullmatch(r"pytorch_model_fsdp_\d+", name) and is_distributed(folder / name):
            return (
                f"holds FSDP's parts of the weights in {name}/; join them with `accelerate "
                f"merge-weights {folder / name} OUTPUT`, and give --ckpt the result with the "
                "model's config.json"
            )
    return None


def _zarr(folder: Path) -> str | None:
    """NeMo's folders of zarr arrays, which have no args."""
    for part in (folder / "weights", folder / "model_weights"):
        if any((part / name / ".zarray").is_file() for name in _names(part)):
            return (
                f"is a NeMo checkpoint, which keeps zarr arrays in {part}, without args; give "
                "--ckpt that folder, with the settings of its YAML file as --set options"
            )
    return None


def _other_frameworks(folder: Path) -> str | None:
    names = _names(folder)
    for pattern, what, way_out in _OTHERS:
        if found := _matching(names, re.compile(pattern)):
            return f"holds {what} ({found[0]}), which is not read; {way_out}"
    return None


_FOLDERS: tuple[Callable[[Path], str | None], ...] = (
    _zarr,
    _adapters,
    _verl,
    _nemo_2,
    _nemo_1,
    _deepspeed,
    _fsdp,
    _other_frameworks,
)


# ---- files -------------------------------------------------------------------------------------


def _refuse_file(path: Path) -> None:
    if is_deepspeed_file(path.name):
        raise InputError(f"{path} {DEEPSPEED}")
    if _VERL_SHARD.fullmatch(path.name):
        raise InputError(
            f"{path} is one rank's part of a checkpoint of verl; merge it to the Hugging Face form "
            "with `python -m verl.model_merger merge --backend fsdp`, and give --ckpt the result"
        )
    for pattern, what, way_out in _OTHERS:
        if re.fullmatch(pattern, path.name):
            raise InputError(f"{path} holds {what}, which is not read; {way_out}")
    if path.name == NEMO_FILE:
        raise InputError(f"{path} is {NEMO_WITHOUT_SETTINGS}")
    if path.suffix == ".nemo":
        refuse_stand_in(path)
        raise InputError(f"{path} is not the tar archive that a .nemo file is; download it again")


def refuse_state_dict(path: Path, keys: Iterable[str]) -> None:
    """Refuse, by name, a pickled dict of another project: what is in the file tells.

    Args:
        path: The file, for messages.
        keys: Names at the top of the dict.

    Raises:
        InputError: Another project wrote it.
    """
    keys = set(keys)
    flat = any(key.startswith(("model.language_model.", "model.module.")) for key in keys)
    if path.name == NEMO_FILE or (flat and all(key.startswith("model.") for key in keys)):
        raise InputError(f"{path} is {NEMO_WITHOUT_SETTINGS}")
    deepspeed = {"ds_config", "ds_version", "dp_world_size", "mp_world_size", "buffer_names"}
    if "module" in keys and keys & deepspeed:
        raise InputError(f"{path} {DEEPSPEED}")
    if "state_dict" in keys and any("lightning" in key for key in keys):
        raise InputError(
            f"{path} is a checkpoint of PyTorch Lightning; export its model to Megatron's or "
            "Hugging Face's form with the project that wrote it, and give --ckpt the result"
        )
    if "model_args" in keys and "model" in keys:
        raise InputError(
            f"{path} is a checkpoint of nanoGPT (model_args); bring it to the Hugging Face form "
            "of GPT-2 first, and give --ckpt the result"
        )
    if "cfg" in keys and "model" in keys and ("task_state" in keys or "extra_state" in keys):
        raise InputError(
            f"{path} is a checkpoint of fairseq; convert it with that project's tools to the "
            "Hugging Face form, and give --ckpt the result"
        )
