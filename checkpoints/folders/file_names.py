"""Names that stand in a file and become names of files: they never lead out of their folder."""

from __future__ import annotations

import unicodedata

from mlm_eval.checkpoints.errors import InputError

LONGEST = 200
"""Bytes of a name; file systems take 255, and suffixes are added."""


def safe_name(name: str, what: str) -> str:
    """Return a name that can be that of a file in any folder: one part, printable, not hidden.

    Args:
        name: As a file or an option gives it.
        what: What the name is and where it stands, for the message.

    Raises:
        InputError: It is something else, such as a path.
    """
    fault = _fault(name)
    if fault is None:
        return name
    shown = repr(name if len(name) <= 60 else name[:60] + "...")
    raise InputError(f"{what} {ascii(shown)[1:-1]} cannot name a file ({fault}); rename it")


def is_file_name(name: str) -> bool:
    """Return whether a name can be that of a file in any folder; see `safe_name`."""
    return _fault(name) is None


def _fault(name: str) -> str | None:
    if not name or not name.strip():
        return "it is empty"
    if "/" in name or "\\" in name:
        return "it is a path"
    if name[0] == ".":
        return "it begins with a dot"
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in name):
        return "it has letters that cannot be printed"
    if len(name.encode()) > LONGEST:
        return f"it has more than {LONGEST} bytes"
    return None
