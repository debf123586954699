"""The list of a series: which checkpoints were evaluated, and where the figures of each one are.

`--output F.json` of a series holds it; the records stand beside it:

    {"task": "lambada", "settings": {...}, "versions": {...}, "run": {...},
     "series": [{"checkpoint": "runs/a/iter_0001000", "iteration": 1000,
                 "record": "F.iter_0001000.json"}, ...],
     "failed": [{"checkpoint": "runs/a/iter_0002000", "iteration": 2000, "error": "..."}]}

`settings` are what all of the records have in common; `limit` among them marks a limited series.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.files.text_file import misfit
from mlm_eval.reporting.existing import json_record

ENTRIES = "series"
"""The key of the entries, in the order of the iterations."""


def is_series(record: Mapping[str, Any]) -> bool:
    """Return whether a JSON object is the list of a series."""
    entries = record.get(ENTRIES)
    return "task" in record and isinstance(entries, list) and all(map(_is_entry, entries))


def series_records(path: Path, record: Mapping[str, Any]) -> list[Path]:
    """Return where the records of a list are: beside it, also where it is reached by a link.

    Args:
        path: The list's file.
        record: What it holds.
    """
    return [path.resolve().parent / entry["record"] for entry in record[ENTRIES]]


def read_series(path: Path) -> dict[str, Any] | None:
    """Return the list of a series that a file holds; None: it holds something else, or nothing."""
    found = json_record(path)
    return found if found is not None and is_series(found) else None


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and misfit(entry, {"checkpoint": "text", "record": "text", "name": "text?"}) is None
        and _is_beside(entry["record"])
        and "iteration" in entry
        and isinstance(entry["iteration"], int | str | None)
    )


def _is_beside(name: str) -> bool:
    """Return whether a name is that of a file in the list's folder, as long as any can be."""
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        return False
    return Path(name).name == name and name not in ("", "..") and "\0" not in name and size <= 255
