r"""Text and JSON files: one reader for settings, tokenizers and data alike.

It takes off a byte order mark, ends lines with "\n" alone, and names what is wrong and where: a
pointer or a page in place of the file, another encoding, compression, bytes that are no text.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.stand_in import (
    HEAD_BYTES,
    describe_compression,
    describe_missing,
    refuse_stand_in,
)

_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_text(path: Path) -> str:
    r"""Return a file's text, without a byte order mark, its lines ended by "\n".

    Raises:
        InputError: It cannot be read, stands in for the real file, or is not UTF-8.
    """
    return decode(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """Return a file's content.

    Raises:
        InputError: It cannot be read, or stands in for the real file (see `refuse_stand_in`).
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{describe_missing(path)}; give the path of a file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder where a file was expected") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
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
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        raise InputError(
            f"{where}{line} is not JSON ({error.msg} at column {error.colno}); if "
            "the file is damaged, get it again"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of endless digits, endless nesting
        raise InputError(f"{where} is not JSON ({str(error)[:80]}); get the file again") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        InputError: The file is missing, unreadable, or holds something else.
    """
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__}, expected a JSON object; copy the file again"
        )
    return value
