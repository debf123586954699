"""Settings that stand once: a dataclass field carries its default, its help and its bounds.

A command takes its options from such a dataclass (`mlm_eval/cli/options.py`), a recipe its fields,
a record its values. Nothing here imports torch or typer, so that `--help` stays quick.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

KEY = "option"
"""Where a field's metadata holds its `Option`."""


@dataclass(frozen=True)
class Option:
    """What the command line shows of a field, and what it accepts."""

    help: str
    least: int | None = None
    """Smallest value of a whole number."""
    flag: str | None = None
    """The spelling, where it does not follow from the field's name; for a switch that nobody would
    switch off, the only one."""
    shown: str | None = None
    """What the help says for a default of None."""
    group: str | None = None
    """Title of its group in the help; fields of no group come first."""


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    least: int | None = None,
    flag: str | None = None,
    shown: str | None = None,
    group: str | None = None,
) -> Any:
    """Return a dataclass field that is an option of every command that takes its class.

    Args:
        help: One sentence: what the setting is.
        default: Its value where it is not given; without one it has to be given.
        least: Smallest value of a whole number.
        flag: See `Option.flag`.
        shown: What the help says for a default of None.
        group: Title of its group in the help.
    """
    return dataclasses.field(
        default=default, metadata={KEY: Option(help, least, flag, shown, group)}
    )
