"""Opens a checkpoint: finds the folder that holds the weights, and the reader of its format.

The readers are imported when they are needed, so that opening one format does not load all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.catalog import is_catalog_name, resolve
from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import check_overrides
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.stand_in import describe_missing
from mlm_eval.checkpoints.files.text_file import read_json_object
from mlm_eval.checkpoints.megatron.iteration import find_iteration


def open_checkpoint(
    path: str | Path, overrides: Mapping[str, Any] | None = None, *, allow_hostile: bool = False
) -> Checkpoint:
    """Return the checkpoint at `path`, its format detected; no weight is read yet.

    Args:
        path: A checkpoint root with its tracker file, an `iter_*` or `release` folder, a single
            `.pt`, a published zip archive, a Hugging Face folder, or `catalog:NAME`.
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
    target = Path(path).expanduser()
    try:
        checkpoint = _open(target, overrides)
    except PermissionError as error:
        raise InputError(
            f"{error.filename or target} cannot be read: permission denied; change its "
            "permissions, or copy the checkpoint to where you may read it"
        ) from None
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
    from mlm_eval.checkpoints.files.zip_archive import is_archive, unpack

    if not target.exists():
        raise InputError(
            f"{describe_missing(target)}; give --ckpt the folder or file of a checkpoint"
        )
    if not target.is_file() and not target.is_dir():
        raise InputError(f"{target} is neither a file nor a folder; give --ckpt a checkpoint")
    if is_archive(target):
        target = unpack(target)
    if target.suffix == ".safetensors" and (target.parent / "config.json").is_file():
        target = target.parent
    if target.is_file():
        from mlm_eval.checkpoints.megatron.read_torch import read_model_file

        return read_model_file(target, overrides)
    if (target / "config.json").is_file():
        from mlm_eval.checkpoints.huggingface.read import read_folder

        return read_folder(target, overrides)
    return _open_iteration(find_iteration(target), overrides)


def _open_iteration(folder: Path, overrides: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint in an `iter_*` or `release` folder."""
    names = {entry.name for entry in folder.iterdir()}
    if any(re.match(r"mp_rank_\d", name) and (folder / name).is_dir() for name in names):
        from mlm_eval.checkpoints.megatron.read_torch import read_ranks

        return read_ranks(folder, overrides)
    _refuse_unreadable_format(folder, names)
    from mlm_eval.checkpoints.megatron.read_dist import read_distributed

    return read_distributed(folder, overrides)


def _refuse_unreadable_format(folder: Path, names: set[str]) -> None:
    """Refuse, by name, folders that hold no format that can be read.

    Raises:
        InputError: The folder holds zarr arrays, DeepSpeed's files, an unfinished save, or nothing
            that we know.
    """
    metadata = folder / "metadata.json"
    backend = None
    if metadata.is_file():
        backend = read_json_object(metadata).get("sharded_backend")
    zarr = any((folder / name / ".zarray").is_file() for name in names)
    if backend == "zarr" or zarr:
        raise InputError(
            f"{folder} is in the zarr format, which Megatron removed in core 0.16; convert it to "
            "torch_dist first, with Megatron-LM core 0.8 to 0.15 (--dist-ckpt-format zarr to load, "
            "torch_dist to save)"
        )
    if any(re.fullmatch(r"(mp_rank|(.*_)?zero_pp_rank)_\d.*_states\.pt", name) for name in names):
        raise InputError(
            f"{folder} is a DeepSpeed checkpoint; use the tools of the project that wrote it to "
            "bring it to Megatron's form first (Megatron-DeepSpeed has "
            "tools/convert_checkpoint/deepspeed_to_megatron.py)"
        )
    if ".metadata" in names:
        return
    if not any(name.endswith(".distcp") for name in names):
        found = ", ".join(sorted(names)[:4]) or "nothing"
        raise InputError(
            f"{folder} holds no checkpoint that mlm-eval knows (found {found}); expected "
            "mp_rank_XX folders, a .metadata file with .distcp files, or a Hugging Face config.json"
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
