"""Sizes as people write them: `5GB`, `500 MB`, `80GiB`, `1000`."""

from __future__ import annotations

import re

from mlm_eval.checkpoints.errors import InputError, shown

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_bytes(size: int | str, option: str) -> int:
    """Return a number of bytes: `80GB` is 80e9, `80GiB` 80 * 2**30, a bare number bytes.

    Args:
        size: What was given.
        option: The option that takes it, for the message.

    Raises:
        InputError: `size` is not a size, or it is less than one byte.
    """
    found = _SIZE.fullmatch(str(size)) if len(str(size)) < 100 else None
    number = 0
    if found is not None and (found[2] or not found[3]):
        base = 1024 if found[3] else 1000
        exact = float(found[1]) * base ** " kmgt".index(found[2].lower() or " ")
        number = int(exact) if exact < 1 << 62 else 0
    if number < 1:
        raise InputError(
            f"{option} {shown(str(size))} is not a size; write 80GB, 24GiB or a number of bytes"
        )
    return number
