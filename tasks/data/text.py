"""Text, JSON and digests of the tasks' files: one reader, which names what is wrong and where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        InputError: It cannot be read, or is not UTF-8.
    """
    return decode(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """Return a file's content.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


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


def json_field(entry: Any, name: str, kind: type, where: str) -> Any:
    """Return a field of a JSON object.

    Raises:
        InputError: `entry` is not an object, has no such field, or its value is of another kind.
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
