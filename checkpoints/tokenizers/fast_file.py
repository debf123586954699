"""A tokenizer.json is looked at before the library reads it, which believes what it holds.

The library allocates by the numbers in a file, and ends the process where one is wrong.
Source: https://github.com/huggingface/tokenizers; sentencepiece's normalizer.cc and Darts-clone for
the map of characters.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.text_file import parse_json, read_text

LARGEST_ID = 1 << 24
"""Of an entry; tables of bytes are made for all ids up to the highest."""

LARGEST_TOKENIZER = 1 << 27
"""Bytes of a tokenizer.json."""

_MOST_PARTS = 64
_MOST_GROWTH = 64
"""How many times longer a normalizer may make a text, and characters that it may put before it."""


def check_tokenizer_json(path: Path) -> None:
    """Refuse a tokenizer.json that would bring down the library, or take the memory.

    Raises:
        InputError: It is no JSON object, has impossible ids, or a normalizer that is damaged or
            multiplies the text.
    """
    content = parse_json(read_text(path, most=LARGEST_TOKENIZER), str(path))
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise InputError(f"{path} is not a readable tokenizer.json: it holds no model")
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict):
        check_ids(vocabulary.values(), path)
    added = content.get("added_tokens") or []
    if isinstance(added, list):
        check_ids((token.get("id") for token in added if isinstance(token, dict)), path)
    growth = 1.0
    for part in _parts(content, path):
        if part.get("type") == "Precompiled":
            _check_map(part.get("precompiled_charsmap"), path)
        inserted = part.get("content") if part.get("type") == "Replace" else part.get("prepend")
        if isinstance(inserted, str):
            pattern = part.get("pattern")
            replaced = pattern.get("String") if isinstance(pattern, dict) else None
            growth *= max(1.0, len(inserted) / max(1, len(replaced or "")))
        if growth > _MOST_GROWTH:
            raise InputError(
                f"{path} has a normalizer that makes a text more than {_MOST_GROWTH} times longer, "
                "which no model's normalizer does; get the file again"
            )


def check_ids(ids: Any, path: Path) -> None:
    """Refuse ids that no vocabulary has.

    Raises:
        InputError: One is no number, negative or enormous.
    """
    for index in ids:
        if type(index) is not int or not 0 <= index < LARGEST_ID:
            raise InputError(
                f"{path} gives an entry the id {shown(index)}, expected a whole number below "
                f"{LARGEST_ID:,}; is it damaged?"
            )


def _parts(content: dict[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """Yield the normalizers, and what cuts a text; those in sequences too."""
    left = [content.get(name) for name in ("normalizer", "pre_tokenizer")]
    seen = 0
    while left:
        part = left.pop()
        seen += 1
        if seen > _MOST_PARTS:
            raise InputError(f"{path} has more than {_MOST_PARTS} normalizers; get the file again")
        if isinstance(part, dict):
            yield part
            for name in ("normalizers", "pretokenizers"):
                inner = part.get(name)
                left += inner[: _MOST_PARTS + 1] if isinstance(inner, list) else []


def _check_map(encoded: Any, path: Path) -> None:
    """Refuse a damaged map of characters: a double array of 32-bit units, and the texts it names.

    Every unit that a text can lead to is visited: the library looks them up without a check.
    """
    import numpy as np

    fault = InputError(f"{path} has a damaged map of characters in its normalizer; get it again")
    if not isinstance(encoded, str):
        raise fault
    try:
        data = base64.b64decode(encoded, validate=True)
        (size,) = struct.unpack_from("<I", data)
        texts = data[4 + size :]
        texts.decode("utf-8")
    except (ValueError, struct.error):
        raise fault from None
    if size % 4 or not size or size > len(data) - 4:
        raise fault
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    letters = np.arange(1, 256)
    left, seen = [int(offsets[0])], {0}
    while left:
        node = left.pop()
        if node | 255 >= len(units):
            raise fault
        places = node ^ letters
        for place in places[(units[places] & 0x800000FF) == letters].tolist():
            if place in seen:  # ends of words are shared
                continue
            seen.add(place)
            inner = place ^ int(offsets[place])
            if units[place] >> 8 & 1:
                if inner >= len(units):
                    raise fault
                at = int(units[inner]) & 0x7FFFFFFF
                if at >= len(texts) or texts[at] & 0xC0 == 0x80:
                    raise fault
            left.append(inner)
