"""Copies a tokenizer's files beside a converted or trained model, but none from elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.checkpoints.tokenizers.side_files import TOKENIZER_CONFIG

VOCABULARIES = {
    "gpt2-bpe": ("vocab.json", "merges.txt"),
    "bert-wordpiece": ("vocab.txt",),
    "tokenizer.json": ("tokenizer.json",),
    "sentencepiece": ("tokenizer.model",),
}
"""Names of the files with a vocabulary, the first of `Tokenizer.files`, by its kind."""


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's files to a folder where it is found again, whatever they were called.

    Raises:
        InputError: One of them is a link that leaves its folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = VOCABULARIES[tokenizer.kind]
    names += tuple(file.name for file in tokenizer.files[len(names) :])
    for file, name in zip(tokenizer.files, names, strict=False):
        copy_tokenizer_file(file, folder / name)
    config = folder / TOKENIZER_CONFIG
    if tokenizer.lower_case is not None and not config.is_file():
        settings = {"do_lower_case": tokenizer.lower_case}
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer_file(source: Path, target: Path) -> None:
    """Copy a file of a tokenizer; see `check_own_file`.

    Raises:
        InputError: The file is a link that leaves its folder.
    """
    check_own_file(source)
    shutil.copyfile(source, target)


def check_own_file(source: Path) -> None:
    """Refuse to pass on what a link to somewhere else leads to.

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
