"""Which files a checkpoint's folder consists of: what `--overwrite` may remove, and nothing else.

A name is judged, not what is in the file: those that our writers give, that Megatron-LM gives what
it saves, and that transformers gives the files of a model and its tokenizer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_TOKENIZER = (
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|"
    r"chat_template\.(jinja|json)|[\w-]*vocab\.(json|txt)|[\w-]*merges\.txt|tokenizer\.model|"
    r"spiece\.model|sentencepiece[\w.]*\.model"
)
_STEP = r"iter_\d{7,}|release"
_RANK = r"mp_rank_\d\w*"
_WEIGHTS = (
    rf"(({_STEP})/)?{_RANK}/(model_optim_rng|model_rng|model|optim|distrib_optim)\w*\.pt|"
    rf"(({_STEP})/)?(\.metadata|[\w-]+\.distcp)|"
    r"model(-\d+-of-\d+)?(\.\w+)?\.safetensors|pytorch_model(-\d+-of-\d+)?(\.\w+)?\.bin"
)
_MORE = (
    rf"latest_checkpointed_iteration\.txt|(({_STEP})/)?(common\.pt|metadata\.json)|"
    rf"({_TOKENIZER})|tokenizer/({_TOKENIZER})|"
    r"(model|pytorch_model)(\.\w+)?\.(safetensors|bin)\.index(\.\w+)?\.json"
)
_BESIDE_A_CONFIG = r"config\.json|generation_config\.json|README\.md|LICENSE[\w.]*|\.gitattributes"
_FOLDERS = rf"{_STEP}|(({_STEP})/)?{_RANK}|tokenizer"


def foreign_files(folder: Path) -> list[str]:
    """Return the paths, below a folder, of everything in it that is no part of a checkpoint.

    Those of a Hugging Face model's page (README.md, ...) are a part where its config.json is.
    """
    with_config = (folder / "config.json").is_file()
    found = _entries(folder)
    return [name for name, is_folder in found if not _is_part(name, is_folder, with_config)]


def weight_files(folder: Path) -> list[str]:
    """Return the paths, below a folder, of the files with a checkpoint's weights."""
    return [name for name, is_folder in _entries(folder) if not is_folder and _weights(name)]


def saved_steps(folder: Path) -> list[str]:
    """Return the names of the folders that hold a checkpoint each: `iter_0001000`, `release`."""
    found = {name.split("/")[0] for name in weight_files(folder)}
    return sorted(name for name in found if re.fullmatch(_STEP, name))


def remove_checkpoint(folder: Path) -> bool:
    """Remove the files of a checkpoint and the folders they leave empty; return whether all went.

    What is no part of a checkpoint stays where it is.
    """
    foreign = set(foreign_files(folder))
    for name, is_folder in sorted(_entries(folder), reverse=True):  # a folder after what is in it
        if name in foreign:
            continue
        with suppress(OSError):
            (folder / name).rmdir() if is_folder else (folder / name).unlink()
    with suppress(OSError):
        folder.rmdir()
    return not folder.exists()


def _entries(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield the path of each entry below a folder and whether it is a folder; links are none."""
    for place, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(place, name)
            yield path.relative_to(folder).as_posix(), name in folders and not path.is_symlink()


def _is_part(name: str, is_folder: bool, with_config: bool) -> bool:
    if is_folder:
        return re.fullmatch(_FOLDERS, name) is not None
    if re.fullmatch(_FOLDERS, name):  # a link to a folder, of which only the link goes
        return True
    known = f"{_WEIGHTS}|{_MORE}" + (f"|{_BESIDE_A_CONFIG}" if with_config else "")
    return re.fullmatch(known, name) is not None


def _weights(name: str) -> bool:
    return re.fullmatch(_WEIGHTS, name) is not None
