"""Where other projects keep the tokenizer of a checkpoint.

Megatron-Bridge: in the folder of the iteration; NeMo 2: in `context/nemo_tokenizer/`; NeMo 1: under
hashed names beside model_config.yaml, which says which file is what; verl: in `huggingface/`;
gpt-neox: in the root, by the name that its .yml has, or as GPT-NeoX-20B was published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.text_file import read_text
from mlm_eval.checkpoints.folders.file_names import is_file_name
from mlm_eval.checkpoints.projects.nemo_1 import NEMO_CONFIG
from mlm_eval.checkpoints.projects.settings import (
    BRIDGE_SETTINGS,
    STEP_TRACKER,
    neox_files,
    read_yaml,
    weights_beside,
    weights_folder,
)


def tokenizer_folders(path: Path) -> list[Path]:
    """Return the folders that may hold the tokenizer of a checkpoint, given any of its doors."""
    start = path if path.is_dir() else weights_beside(path) or path.parent
    if not start.is_dir():
        return []
    inner = weights_folder(start) or start
    found = []
    for base in (inner, inner.parent):  # the second: an array's folder was given
        if base.name == "weights":
            found += [base.parent / "context" / "nemo_tokenizer", base.parent / "context"]
        if base.name == "dist_ckpt":
            found.append(base.parent / "huggingface")
    steps = [entry for entry in start.iterdir() if (entry / BRIDGE_SETTINGS).is_file()]
    if len(steps) > 1 and (start / STEP_TRACKER).is_file():
        latest = read_text(start / STEP_TRACKER).strip()
        steps = [entry for entry in steps if entry.name.removeprefix("iter_").lstrip("0") == latest]
    if len(steps) == 1:
        found += [steps[0], steps[0] / "tokenizer"]
    return [folder for folder in found if folder.is_dir()]


_NEOX_20B = "20B_tokenizer.json"


def neox_tokenizer(path: Path) -> tuple[Path, Path | None] | None:
    """Return the files of a gpt-neox run's tokenizer, vocabulary and merges; None: there are none.

    The run's .yml has them as paths of the machine that trained it: files of the same names in the
    root, in the step, or in a folder `tokenizer` are taken for them.
    """
    start = path if path.is_dir() else path.parent
    inside = start.name.startswith("global_step")
    root = start.parent if inside else start
    latest = root / "latest"
    if not inside and not latest.is_file():
        return None
    named = start.name if inside else read_text(latest).strip()
    if not is_file_name(named):
        return None
    step = root / named
    names: dict[str, Any] = {}
    for file in neox_files(step):
        names |= {str(key).replace("-", "_"): said for key, said in read_yaml(file).items()}
    for folder in (root, step, root / "tokenizer"):
        for said in (names.get("vocab_file"), _NEOX_20B):
            if (vocabulary := _file(folder, said)) is not None:
                merges = _file(folder, names.get("merge_file"))
                return vocabulary, None if vocabulary.name.endswith("tokenizer.json") else merges
    return None


def nemo_tokenizer(root: Path) -> tuple[Path, Path | None] | None:
    """Return the files of a NeMo 1 model's tokenizer: the vocabulary, and its merges if any.

    None where the folder holds none: model_config.yaml then has a name of the Hub or a path of the
    machine that wrote it.

    Raises:
        InputError: NeMo adds tokens to it that its files do not hold, or it is one of tiktoken.
    """
    said = read_yaml(root / NEMO_CONFIG).get("tokenizer")
    if not isinstance(said, dict):
        return None
    if said.get("library") == "tiktoken":
        raise InputError(
            f"{root} has a tokenizer of tiktoken, whose rules stand in NeMo's code; it is not "
            "read: give the tokenizer.json of the model with --tokenizer"
        )
    model, vocab, merges = (
        _file(root, said.get(name)) for name in ("model", "vocab_file", "merge_file")
    )
    found = model or vocab
    if found is None:
        return None
    added = said.get("special_tokens") or said.get("additional_special_tokens")
    if added:
        raise InputError(
            f"{root / NEMO_CONFIG} adds the special tokens {str(added)[:80]} to {found.name}, "
            "which mlm-eval does not number as NeMo does; give the model's tokenizer with "
            "--tokenizer"
        )
    return found, None if model else merges


def _file(root: Path, said: Any) -> Path | None:
    """Return the file that a setting names: `nemo:HASH_tokenizer.model`."""
    if not isinstance(said, str) or not said:
        return None
    name = said.removeprefix("nemo:").rpartition("/")[2]
    path = root / name
    return path if is_file_name(name) and path.is_file() else None
