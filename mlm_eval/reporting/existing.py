"""What stands already where a result is to be written: whether it is one, and of the whole data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.files.stand_in import refuse_special
from mlm_eval.checkpoints.files.text_file import json_value

LIMITS = ("limit", "train_limit", "dev_limit", "test_limit")
"""The options, and settings in a record, that leave out some of the data."""

_OF_LINES = {"logprobs", "head_logits", "logprob"}
"""Of which a line of ours has one."""

_MOST = 1 << 28
"""Bytes of a record that are read at most."""

_PAGES = (
    b"<title>Measured beside the Megatron-LM paper</title>",
    b"<title>Measured by mlm-eval</title>",
    b" of the Megatron-LM paper. ",
    b". Measured by mlm-eval.",
    b"Title\0Curves, measured by mlm-eval",
    b"table,model,kind,parameters,figure,value,",
)
"""What the pages of `report` begin with, within their first bytes."""


def is_result(path: Path) -> bool:
    """Return whether a file is one that a command has written with `--output` or `--plot`."""
    head = _head(path)
    if head.startswith(b"\x89PNG"):
        return b"Matplotlib" in head
    return _record(path) is not None or _is_lines(head) or is_page(path)


def is_page(path: Path) -> bool:
    """Return whether a file is a page of `report`, of any format."""
    head = _head(path)
    return any(mark in head for mark in _PAGES)


def holds_more(path: Path, limits: Mapping[str, int]) -> str | None:
    """Return why a result may not be replaced by one of fewer data, in words; None: it may.

    Args:
        path: A result that is there.
        limits: Those of `LIMITS` that the new one is under.
    """
    record = _record(path)
    if record is not None:
        settings = record.get("settings")
        known = settings if isinstance(settings, dict) else {}
        if all(known.get(name) is None for name in LIMITS):
            return "a result of all the data"
        return None
    if "limit" in limits and _is_lines(_head(path)):
        with path.open("rb") as stream:
            lines = sum(1 for line in stream if line.strip())
        if lines > limits["limit"]:
            return f"{lines:,} results"
    return None


def json_record(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None where there is none."""
    try:
        refuse_special(path)
        found = json_value(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(1 << 16)


def _record(path: Path) -> dict[str, Any] | None:
    """Return a record of an evaluation, a training, a measurement or a comparison."""
    if not _head(path).lstrip().startswith(b"{") or path.stat().st_size > _MOST:
        return None
    found = json_record(path)
    kinds = ({"task", "settings", "versions"}, {"ckpt", "against", "same"})
    return found if found is not None and any(kind <= set(found) for kind in kinds) else None


def _is_lines(head: bytes) -> bool:
    """Return whether a file begins with a line of `score` or of `--save-examples`."""
    try:
        first = json.loads(head.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return b'"logprobs": [' in head.partition(b"\n")[0]  # cut off: a long one
    return isinstance(first, dict) and bool(_OF_LINES & set(first))
