"""Fields of JSON objects, and digests: what the tasks' files hold, by name and place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from mlm_eval.checkpoints.errors import InputError, shown


def json_field(entry: Any, name: str, kind: type, where: str) -> Any:
    """Return a field of a JSON object.

    Raises:
        InputError: `entry` is not an object, has no such field, or its value is of another kind.
    """
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} holds {shown(entry)}; expected a JSON object")
    value = entry.get(name)
    if type(value) is not kind:
        what = {str: "a string", list: "a list", int: "a number"}[kind]
        found = "missing" if name not in entry else shown(value)
        raise InputError(f"{where}: {name!r} is {found}; expected {what}")
    return check_text(value, where) if isinstance(value, str) else value


LONGEST_INPUT = 1 << 21
"""Characters of one text that is scored or continued: half a million tokens of most languages."""


def check_text(text: str, where: str, *, instead: str = "leave it out, or cut it") -> str:
    """Return a text that can be encoded.

    Args:
        text: The text.
        where: File and line, for messages.
        instead: What to do with one that is too long.

    Raises:
        InputError: It is longer than any model reads, or holds half of a surrogate pair, as broken
            JSON escapes make.
    """
    if len(text) > LONGEST_INPUT:
        raise InputError(
            f"{where} holds a text of {len(text):,} characters, more than the {LONGEST_INPUT:,} "
            f"that are cut into tokens at once; {instead}"
        )
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
