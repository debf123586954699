"""How the property tests search: the same examples on every machine, nothing kept on the disk."""

from __future__ import annotations

from hypothesis import settings


def thorough(examples: int) -> settings:
    """Return the settings of a property that is tried on that many examples."""
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None)
