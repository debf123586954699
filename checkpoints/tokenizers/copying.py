"""Copies a tokenizer's files beside a converted or trained model, but none from elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlm_eval.checkpoints.errors import InputError


def copy_tokenizer_file(source: Path, target: Path) -> None:
    """Copy a file of a tokenizer.

    A link in a folder that someone else made may name any file of this machine, whose content would
    then be part of the result. Links within the folder are followed, and so are those of a Hub
    cache, whose snapshots consist of links into its `blobs`.

    Raises:
        InputError: The file is a link that leaves its folder.
    """
    folder, real = source.parent.resolve(), source.resolve()
    cache = folder.parent.parent / "blobs"
    is_cached = folder.parent.name == "snapshots" and real.parent == cache
    if source.is_symlink() and not (real.is_relative_to(folder) or is_cached):
        raise InputError(
            f"{source} is a link to {real}, outside its folder, so it is not copied into the "
            "result; put the file itself there, or name the tokenizer by its own folder "
            "(--tokenizer)"
        )
    shutil.copyfile(source, target)
