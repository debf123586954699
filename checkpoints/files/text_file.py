r"""Text and JSON files: one reader for settings, tokenizers and data alike.

It takes off a byte order mark, ends lines with "\n" alone, and names what is wrong and where: a
pointer or a page in place of the file, another encoding, compression, bytes that are no text.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.stand_in import (
    HEAD_BYTES,
    describe_compression,
    describe_missing,
    refuse_special,
    refuse_stand_in,
)

_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


LARGEST_SETTINGS = 1 << 25
"""Bytes of a file of settings, an index or a vocabulary; the largest known have half of that."""

_MOST_LEVELS = 100
"""Lists and objects within one another; files of ours and of other projects have a dozen."""

_MOST_BITS = 1000
"""Of a whole number: there is no float above 2^1024."""

_ENDLESS = re.compile("[0-9]{30}")
"""In every tenth character of a text: such a number, which has 302 digits or more, may be there."""

_MOST_BRACKETS = 1 << 21
"""Lists and objects of a JSON text; an empty one takes 64 bytes of memory and 3 of the text."""


def read_text(path: Path, *, most: int | None = None) -> str:
    r"""Return a file's text, without a byte order mark, its lines ended by "\n".

    Args:
        path: The file.
        most: Bytes that it may have; None: any number.

    Raises:
        InputError: It cannot be read, stands in for the real file, or is not UTF-8.
    """
    return decode(read_bytes(path, most=most), str(path))


def read_bytes(path: Path, *, most: int | None = None) -> bytes:
    """Return a file's content; see `read_text`.

    Raises:
        InputError: It cannot be read, is no file, is too large, or stands in for the real file (see
            `refuse_stand_in`).
    """
    try:
        refuse_special(path)
        with path.open("rb") as stream:
            content = stream.read() if most is None else stream.read(most + 1)
    except FileNotFoundError:
        raise InputError(f"{describe_missing(path)}; give the path of a file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder where a file was expected") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if most is not None and len(content) > most:
        raise InputError(f"{path} has more than {most:,} bytes, far more than such a file has")
    refuse_stand_in(path, content)
    return content


def decode(content: bytes, path: str) -> str:
    r"""Return bytes as text; a byte order mark goes, and "\r\n" becomes "\n".

    Raises:
        InputError: They are not UTF-8.
    """
    for mark, encoding in _OTHER_MARKS:
        if content.startswith(mark):
            raise InputError(
                f"{path} is {encoding} text; save it as UTF-8 (`iconv -f {encoding} -t UTF-8`)"
            )
    if what := describe_compression(content[:HEAD_BYTES]):
        raise InputError(f"{path} {what}")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line} is not UTF-8 text (byte 0x{content[error.start]:02x}); expected "
            f"the file as published, so get it again or convert it"
        ) from error


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text.

    Args:
        text: The text.
        where: Its file, and line if it is one of many, for the message.

    Raises:
        InputError: It is not JSON.
    """
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        raise InputError(f"{where} holds more lists and objects than any such file; get it again")
    try:
        return json_value(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        raise InputError(
            f"{where}{line} is not JSON ({error.msg} at column {error.colno}); if "
            "the file is damaged, get it again"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of endless digits, endless nesting
        raise InputError(f"{where} is not JSON ({str(error)[:80]}); get the file again") from None


def json_value(text: str | bytes) -> Any:
    """Return the value of a JSON text, in which no name has two values.

    Raises:
        ValueError: It is not JSON, or nested deeper than what walks it later can follow, or an
            object gives a name twice, with different values: which one counts would depend on the
            reader; or a whole number is larger than any float.
        RecursionError: It is nested without end.
    """
    if isinstance(text, bytes):  # as json.loads does itself
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    value = json.loads(
        text,
        object_pairs_hook=_once,
        # Only where it may be needed: called for each number it takes longer than all the rest.
        parse_int=_whole_number if _ENDLESS.search(text[::10]) else None,
    )
    if text.count("[") + text.count("{") > _MOST_LEVELS:
        _check_depth(value)
    return value


def _whole_number(digits: str) -> int:
    number = int(digits)
    if number.bit_length() > _MOST_BITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return number


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_LEVELS):
        inside = (part.values() if isinstance(part, dict) else part for part in level)
        level = [part for parts in inside for part in parts if isinstance(part, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {_MOST_LEVELS} deep")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next((name for name, value in pairs if found[name] != value), None)
        if twice is not None:
            raise ValueError(f"{shown(twice)} stands in one object twice, with different values")
    return found


def read_json(path: Path, *, most: int = LARGEST_SETTINGS) -> Any:
    """Return the JSON value in a file of at most so many bytes.

    Raises:
        InputError: The file is missing, unreadable, too large, or no JSON.
    """
    return parse_json(read_text(path, most=most), str(path))


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 63


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text", lambda value: isinstance(value, str)),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "whole": ("a whole number", _is_whole),
    "count": ("a whole number from 0 up", lambda value: _is_whole(value) and value >= 0),
    "number": ("a finite number", _is_number),
    "list": ("a list", lambda value: isinstance(value, list)),
    "texts": (
        "a list of texts",
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    ),
    "text or texts": (
        "a text or a list of them",
        lambda value: all(
            isinstance(p, str) for p in (value if isinstance(value, list) else [value])
        ),
    ),
    "text or object of texts": (
        "a text or an object of them",
        lambda value: all(
            isinstance(p, str) for p in (value.values() if isinstance(value, dict) else [value])
        ),
    ),
    "numbers": (
        "a list of finite numbers",
        lambda value: isinstance(value, list) and all(map(_is_number, value)),
    ),
    "object": ("an object", lambda value: isinstance(value, dict)),
}
"""Kinds of JSON values by our words for them: how they are described, and what is one."""


def misfit(value: Any, schema: Mapping[str, str]) -> str | None:
    """Return what is wrong with a JSON value that is read back, in words; None: nothing.

    Args:
        value: What was read.
        schema: The kind of each field that is looked at, one of `_KINDS`, by its name; dots lead
            into objects. With a "?" it may be missing or null.
    """
    if not isinstance(value, dict):
        return f"it holds {shown(value)}, expected an object"
    for path, kind in schema.items():
        place: Any = value
        for name in path.split("."):
            place = place.get(name) if isinstance(place, dict) else None
        if place is None and kind.endswith("?"):
            continue
        expected, fits = _KINDS[kind.removesuffix("?")]
        if place is None:
            return f"it has no {path!r}, expected {expected}"
        if not fits(place):
            return f"its {path} is {shown(place)}, expected {expected}"
    return None


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Return the table in a TOML file.

    Args:
        path: The file.
        what: What it should be, for the message: "a TOML file of options".

    Raises:
        InputError: The file is missing, unreadable, too large, or no TOML.
    """
    import tomllib  # here to keep `--help` quick

    text = read_text(path, most=_LARGEST_TOML)
    if any(line.count(".") > _MOST_DOTS for line in text.split("\n")):  # a table for each
        raise InputError(f"{path} is not {what}: a line of it has more than {_MOST_DOTS} dots")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # endless digits, endless nesting
        raise InputError(f"{path} is not {what} ({str(error)[:80]})") from None


_LARGEST_TOML = 1 << 20
_MOST_DOTS = 1000


def read_json_object(path: Path, *, most: int = LARGEST_SETTINGS) -> dict[str, Any]:
    """Return the JSON object in a file of at most so many bytes.

    Raises:
        InputError: The file is missing, unreadable, or holds something else.
    """
    value = read_json(path, most=most)
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__}, expected a JSON object; copy the file again"
        )
    return value
