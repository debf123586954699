"""Reading the tasks' own files: text, JSON, names of sets, and `datasets` by name; faults named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.tasks.data.text import DatasetName, load_dataset

HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}

DATASET_FILES = ("dataset_dict.json", "state.json")
"""What marks a folder that `datasets` saved."""


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        InputError: It cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return decode(content, str(path))


def decode(content: bytes, path: str) -> str:
    """Return bytes as text; a byte order mark goes.

    Raises:
        InputError: They are not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line} is not UTF-8 text (byte 0x{content[error.start]:02x}); expected "
            f"the file as published"
        ) from error


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text.

    Args:
        text: The text.
        where: Its file, and line if it is one of many, for the message.

    Raises:
        InputError: It is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        raise InputError(
            f"{where}{line} is not JSON ({error.msg} at column {error.colno}); is the file damaged?"
        ) from None


def take(entry: Any, name: str, kind: type, where: str) -> Any:
    """Return a field of a JSON object.

    Raises:
        InputError: `entry` is no object, has no such field, or its value is of another kind.
    """
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} holds {entry!r:.60}; expected a JSON object")
    value = entry.get(name)
    if type(value) is not kind:
        what = {str: "a string", list: "a list", int: "a number"}[kind]
        found = "missing" if name not in entry else f"{value!r:.60}"
        raise InputError(f"{where}: {name!r} is {found}; expected {what}")
    return check_text(value, where) if isinstance(value, str) else value


def check_text(text: str, where: str) -> str:
    """Return a text that can be encoded.

    Raises:
        InputError: It holds half of a surrogate pair, as broken JSON escapes make.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{where} holds half of a surrogate pair, which is no text; get it again")
    return text


def sha256(pieces: Iterable[bytes | str]) -> str:
    """Return the sha256 of pieces one after the other."""
    state = hashlib.sha256()
    for piece in pieces:
        state.update(piece.encode() if isinstance(piece, str) else piece)
    return state.hexdigest()


def digest(records: Iterable[Any]) -> str:
    """Return the sha256 of records as JSON lines: the same wherever they were read from."""
    return sha256(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def is_dataset(source: str, names: Iterable[str] = ()) -> bool:
    """Return whether `source` is for the `datasets` library: one of its folders, or no path at all.

    Args:
        source: A value of `--data` and such.
        names: What counts as a name even where a file is called so.

    Raises:
        InputError: It looks like a path, but nothing is there.
    """
    path = Path(source.partition(":")[0]).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in DATASET_FILES):
            return True
        return bool([*path.glob("*.parquet"), *path.glob("*/*.parquet")])
    if path.exists() or Path(source).expanduser().exists():
        return False
    looks_like_path = source.startswith(("/", "./", "../", "~")) or path.suffix in (
        ".gz", ".tgz", ".tar", ".txt", ".tsv", ".json",
    )  # fmt: skip
    if looks_like_path:
        raise InputError(f"{source} does not exist; give a file, a folder or a `datasets` name")
    return True


def dataset_splits(
    source: str, *, default: DatasetName, splits: Mapping[str, str], role: str
) -> Iterator[tuple[str, str, Any]]:
    """Yield (split, name for people, rows) of a `datasets` name for one role.

    Args:
        source: `NAME[:CONFIG[:SPLIT]]`, or a folder that `datasets` saved.
        default: Gives the configuration where the name says none.
        splits: Of the role, by the name that their sets get.
        role: `train`, `dev` or `test`.

    Raises:
        InputError: There is no such set or split.
    """
    path, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    local = Path(path).expanduser().is_dir()
    if path == default.path.partition("/")[2] and not local:  # the Hub's old names
        path = default.path
    chosen = config or (None if local else default.config)
    wanted = {split: _short(split)} if split else dict(splits)
    where = str(Path(path).expanduser()) if local else path
    loaded = load_dataset(DatasetName(where, chosen, None))
    if not isinstance(loaded, dict):  # a folder that holds one split
        loaded = {next(iter(wanted)): loaded}
    found = False
    for name, short in wanted.items():
        if name in loaded:
            found = True
            yield short, ":".join(part for part in (path, chosen, name) if part), loaded[name]
    if not found and (split or role != "test"):
        raise InputError(
            f"{source} has no split {' or '.join(wanted)}; it has {', '.join(loaded)}; write "
            f"{path}:{chosen or ''}:SPLIT to choose one"
        )


def _short(split: str) -> str:
    """Return Megatron's name of a split: validation_matched -> dev-matched."""
    return split.replace("validation", "dev").replace("_", "-")


def check_columns(rows: Any, columns: Iterable[str], where: str) -> None:
    """Refuse a `datasets` set that lacks a column.

    Raises:
        InputError: It does.
    """
    for column in columns:
        if column not in rows.column_names:
            raise InputError(
                f"{where} has no column {column!r}; it has {', '.join(rows.column_names)}"
            )
