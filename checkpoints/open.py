"""Opens a checkpoint: finds the folder that holds the weights, and the reader of its format.

The readers are imported when they are needed, so that opening one format does not load all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.catalog import is_catalog_name, resolve, sample_folder
from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import check_overrides
from mlm_eval.checkpoints.deepspeed.folder import Step, find_step
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.stand_in import describe_missing, refuse_stand_in
from mlm_eval.checkpoints.files.text_file import read_json_object, read_text
from mlm_eval.checkpoints.hub.download import hub_address, hub_folder
from mlm_eval.checkpoints.megatron.iteration import (
    TRACKER,
    TRAIN_STATE,
    find_iteration,
    folder_of_ranks,
    holds_ranks,
)
from mlm_eval.checkpoints.megatron.relatives import is_distributed, refuse_relative
from mlm_eval.checkpoints.projects.nemo_1 import NEMO_CONFIG, NEMO_FOLDER, nemo_root
from mlm_eval.checkpoints.projects.settings import (
    WEIGHT_PARTS,
    weights_beside,
    weights_folder,
)

_HUB_CONFIG = "config.json"

_FORMATS = (
    "Megatron's mp_rank_XX folders; .metadata with .distcp files (torch_dist, torch_dcp, "
    "fsdp_dtensor, Megatron-Bridge, NeMo, verl); folders of zarr arrays; a .nemo archive or a "
    "folder with model_config.yaml and model_weights; DeepSpeed's *-model_states.pt; a Hugging "
    "Face config.json with its weights"
)
"""What is read, in words."""


def open_checkpoint(
    path: str | Path, overrides: Mapping[str, Any] | None = None, *, allow_hostile: bool = False
) -> Checkpoint:
    """Return the checkpoint at `path`, its format detected; no weight is read yet.

    Args:
        path: A checkpoint root with its tracker file, an `iter_*` or `release` folder, a single
            `.pt`, a published zip archive, a folder of Megatron-Bridge, NeMo or verl at any of its
            doors, a `.nemo` file, a Hugging Face folder, `catalog:NAME`, `sample:NAME`, or
            `hf://org/name[@revision][/path]` on the Hugging Face hub.
        overrides: Settings that win over the file's and the catalog's (see `parse_overrides`).
        allow_hostile: Open a file even if its pickle names harmful callables (`inspect` does;
            nothing in a pickle ever runs either way).

    Raises:
        InputError: There is no checkpoint, or it is damaged, incomplete, or of an unsupported kind.
    """
    overrides = dict(overrides or {})
    check_overrides(overrides)
    if is_catalog_name(path):
        return _open_entry(path, overrides, allow_hostile=allow_hostile)
    target = sample_folder(path) or hub_folder(path) or Path(path).expanduser()
    try:
        checkpoint = _open(target, overrides)
    except PermissionError as error:
        raise InputError(
            f"{error.filename or target} cannot be read: permission denied; change its "
            "permissions, or copy the checkpoint to where you may read it"
        ) from None
    if (source := hub_address(path)) is not None:
        address = source.of_commit(checkpoint.provenance.path)
        provenance = dataclasses.replace(checkpoint.provenance, address=address)
        checkpoint = dataclasses.replace(checkpoint, provenance=provenance)
    hostile = checkpoint.provenance.hostile
    if hostile and not allow_hostile:
        more = f" and {len(hostile) - 3} more" if len(hostile) > 3 else ""
        raise InputError(
            f"{checkpoint.provenance.path} asks for {', '.join(hostile[:3])}{more} when it is "
            "unpickled, which no checkpoint needs; nothing was run, but do not trust this file: "
            "get it from its source again"
        )
    return checkpoint


def _open_entry(path: str | Path, overrides: dict[str, Any], *, allow_hostile: bool) -> Checkpoint:
    """Return a checkpoint of the catalog, with the settings that its files do not record."""
    entry, target = resolve(path)
    settings = {**entry.settings, **overrides}
    checkpoint = open_checkpoint(target, settings, allow_hostile=allow_hostile)
    from_catalog = dict.fromkeys(set(entry.settings) - set(overrides), f"catalog:{entry.name}")
    sources = {**checkpoint.provenance.config_sources, **from_catalog}
    provenance = dataclasses.replace(checkpoint.provenance, config_sources=sources)
    return dataclasses.replace(checkpoint, provenance=provenance)


def _open(target: Path, overrides: dict[str, Any]) -> Checkpoint:
    if not target.exists():
        raise InputError(
            f"{describe_missing(target)}; give --ckpt the folder or file of a checkpoint"
        )
    if not target.is_file() and not target.is_dir():
        raise InputError(f"{target} is neither a file nor a folder; give --ckpt a checkpoint")
    target = _unpacked(target)
    if (root := nemo_root(target)) is not None:
        return _open_nemo(root, overrides)
    return _open_file(target, overrides) if target.is_file() else _open_folder(target, overrides)


def _unpacked(target: Path) -> Path:
    """Return the folder that an archive is, also one that lies alone in a folder; else the path.

    Raises:
        InputError: It is damaged, holds what no checkpoint needs, or no checkpoint.
    """
    from mlm_eval.checkpoints.archives.tar_archive import archive_in, is_tar, tar_folder
    from mlm_eval.checkpoints.archives.zip_archive import is_archive, unpack

    if target.is_dir():
        archive = archive_in(target)
        if archive is None:
            return target
        target = archive
    if is_archive(target):
        return unpack(target)
    if not is_tar(target):
        return target
    folder = tar_folder(target)
    if nemo_root(folder) is None:
        raise InputError(
            f"{target} is a tar archive, and not of a NeMo model: it holds no {NEMO_CONFIG} "
            "with weights beside it; unpack it, and give --ckpt the folder of the checkpoint"
        )
    return folder


def _open_file(file: Path, overrides: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint that a file is, or that it is a part of."""
    from mlm_eval.checkpoints.files.zarr_arrays import holds_arrays, is_array
    from mlm_eval.checkpoints.huggingface.read import WEIGHT_FILE
    from mlm_eval.checkpoints.megatron.read_torch import read_model_file

    folder = file.parent
    hub_file = file.name == _HUB_CONFIG or WEIGHT_FILE.fullmatch(file.name)
    if hub_file and (folder / _HUB_CONFIG).is_file() and _holds_hub_weights(folder):
        return _open_hub_folder(folder, overrides)
    part = file.suffix == ".distcp" or file.name in WEIGHT_PARTS
    if part and (is_distributed(folder) or holds_arrays(folder)):
        return _open_iteration(folder, overrides)
    if is_array(folder):
        return _open_iteration(folder.parent, overrides)
    if (inner := weights_beside(file)) is not None:
        return _open_iteration(inner, overrides)
    if file.name in (TRACKER, TRAIN_STATE):
        return _open_iteration(find_iteration(folder), overrides)
    if file.name in ("distrib_optim.pt", "optim.pt") and (ranks := folder_of_ranks(folder)):
        return _open_iteration(ranks, overrides)
    if (found := find_step(file)) is not None:
        return _open_step(found, overrides)
    refuse_relative(file)
    if file.suffix == ".safetensors":
        refuse_stand_in(file)
        raise InputError(
            f"{file} is one file of a Hugging Face model; give --ckpt the folder with its "
            "config.json and all of its weights"
        )
    return read_model_file(file, overrides)


def _open_nemo(root: Path, overrides: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint of a NeMo 1 folder, or of an archive of one."""
    from mlm_eval.checkpoints.megatron.read_torch import read_nemo_ranks

    if (root / NEMO_FOLDER).is_dir():
        return _open_iteration(root / NEMO_FOLDER, overrides)
    return read_nemo_ranks(root, overrides)


def _snapshot(folder: Path) -> Path:
    """Return the model's own folder, where the Hugging Face hub's cache of it was given."""
    main = folder / "refs" / "main"
    if (folder / "snapshots").is_dir() and main.is_file():
        snapshot = folder / "snapshots" / read_text(main).strip()
        return snapshot if snapshot.is_dir() else folder
    return folder


def _open_folder(folder: Path, overrides: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint of a folder: its weights decide which format it is."""
    from mlm_eval.checkpoints.files.zarr_arrays import is_array

    folder = _snapshot(folder)
    inner = folder.parent if is_array(folder) else weights_folder(folder)
    if inner is not None:
        return _open_iteration(inner, overrides)
    hub = (folder / _HUB_CONFIG).is_file()
    weights = hub and _holds_hub_weights(folder)
    try:
        step = find_iteration(folder)
    except InputError:
        if weights:
            return _open_hub_folder(folder, overrides)
        if (found := find_step(folder)) is not None:
            return _open_step(found, overrides)
        refuse_relative(folder)
        raise
    if not holds_ranks(step) and not is_distributed(step):
        if not weights and (found := find_step(folder)) is not None:
            return _open_step(found, overrides)
        if not weights:
            refuse_relative(folder)
        if hub:  # without weights too: its reader says what is missing
            return _open_hub_folder(folder, overrides)
        return _open_iteration(step, overrides)
    if weights:
        raise InputError(
            f"{folder} holds two checkpoints, a Hugging Face model (config.json and its weights) "
            f"and Megatron's in {step}; give --ckpt {folder / _HUB_CONFIG} for the first, or "
            f"{_door_of(step)} for the second"
        )
    return _open_iteration(step, overrides)


def _holds_hub_weights(folder: Path) -> bool:
    from mlm_eval.checkpoints.huggingface.read import holds_weights

    return holds_weights(folder)


def _open_hub_folder(folder: Path, overrides: dict[str, Any]) -> Checkpoint:
    from mlm_eval.checkpoints.huggingface.read import read_folder

    return read_folder(folder, overrides)


def _open_step(step: Step, overrides: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint of a step of DeepSpeed."""
    from mlm_eval.checkpoints.deepspeed.read import read_step

    return read_step(step, overrides)


def _door_of(step: Path) -> Path:
    """Return a path that leads to Megatron's checkpoint in a folder, whatever else is in it."""
    ranks = sorted(entry for entry in step.iterdir() if re.match(r"mp_rank_\d", entry.name))
    return ranks[0] if ranks else step / ".metadata"


def _open_iteration(folder: Path, overrides: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint in an `iter_*` or `release` folder."""
    from mlm_eval.checkpoints.files.zarr_arrays import holds_arrays
    from mlm_eval.checkpoints.megatron.read_dist import read_arrays, read_distributed
    from mlm_eval.checkpoints.megatron.read_torch import read_ranks

    if holds_ranks(folder):
        return read_ranks(folder, overrides)
    names = {entry.name for entry in folder.iterdir()}
    if ".metadata" not in names:
        if holds_arrays(folder):
            return read_arrays(folder, overrides)
        refuse_relative(folder)
        _refuse_unreadable_format(folder, names)
    return read_distributed(folder, overrides)


def _refuse_unreadable_format(folder: Path, names: set[str]) -> None:
    """Refuse, by name, folders that hold no format that can be read.

    Raises:
        InputError: The folder holds an unfinished save, or nothing that we know.
    """
    metadata = folder / "metadata.json"
    if metadata.is_file() and read_json_object(metadata).get("sharded_backend") == "zarr":
        raise InputError(
            f"{folder} is a zarr save without arrays in it (a folder a tensor, each with a hidden "
            "file .zarray); `cp FOLDER/*` and some upload tools leave hidden files out: copy them "
            "too"
        )
    if not any(name.endswith(".distcp") for name in names):
        found = ", ".join(sorted(names)[:4]) or "nothing"
        raise InputError(
            f"{folder} holds no checkpoint that mlm-eval knows (found {found}); expected one of: "
            f"{_FORMATS}"
        )
    if metadata.is_file():  # written after .metadata: the save had ended
        raise InputError(
            f"{folder} lacks the hidden file .metadata, although its save had ended; "
            "`cp FOLDER/*` and some upload tools leave hidden files out: copy that file too"
        )
    raise InputError(
        f"{folder} is an unfinished save: it has .distcp files but neither .metadata nor "
        "metadata.json, which come last; use the checkpoint of an earlier iteration"
    )
