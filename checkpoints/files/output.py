"""Folders that are there whole or not at all: written beside the target, renamed at the end."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlm_eval.checkpoints.errors import InputError

_OF_A_CHECKPOINT = re.compile(
    r"latest_checkpointed_iteration\.txt|iter_\d{7,}|release|mp_rank_\d.*|\.metadata|.+\.safetensors"
)


@contextmanager
def output_folder(target: Path, *, overwrite: bool = False, needs: int = 0) -> Iterator[Path]:
    """Give an empty folder beside `target`, which becomes `target` when the block ends well.

    A block that raises leaves the target as it was. A killed process leaves a hidden folder
    `.NAME.partial-*` beside it, never a target with half of the files.

    Args:
        target: The folder to make; its parents are made too.
        overwrite: Replace a checkpoint that is there. A folder that holds no checkpoint is
            never replaced.
        needs: Bytes about to be written.

    Raises:
        InputError: The target exists, cannot be written, or there is no room.
    """
    target = target.expanduser().resolve()
    _check_target(target, overwrite)
    try:
        partial = _beside(target, "partial")
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{target} cannot be written ({error.strerror}); choose another output folder"
        ) from None
    try:
        free = shutil.disk_usage(partial).free
        if free < needs:
            raise InputError(
                f"{target} needs {needs / 1e9:.2f} GB where its disk has {free / 1e9:.2f} GB free; "
                "make room or choose another output folder"
            )
        yield partial
        _replace(partial, target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        raise InputError(
            f"{target} could not be written to the end ({error.strerror}); nothing was left there, "
            "make room or choose another output folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_source(files: Iterable[Path], target: Path) -> None:
    """Refuse to replace the folder that is being read.

    Raises:
        InputError: One of `files` is in `target`.
    """
    folder = target.expanduser().resolve()
    if any(file.resolve().is_relative_to(folder) for file in files):
        raise InputError(
            f"{target} holds the checkpoint that is being converted; choose another output folder"
        )


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        names = [entry.name for entry in target.iterdir()]
        if not names:
            return
        if overwrite:
            if any(_OF_A_CHECKPOINT.fullmatch(name) for name in names):
                return
            raise InputError(
                f"{target} holds no checkpoint (found {', '.join(sorted(names)[:3])}), so it is "
                "not replaced; "
                "choose another output folder"
            )
    elif not target.exists() and not target.is_symlink():
        return
    raise InputError(
        f"{target} already exists; choose another output folder"
        + (", or replace the checkpoint in it with --overwrite" if target.is_dir() else "")
    )


def _replace(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; what was there moves aside first and is removed last."""
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(partial, target)
        return
    old = _beside(target, "old")
    os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}-{uuid.uuid4().hex[:12]}")
