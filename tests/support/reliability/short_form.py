"""The short form of a suite: every so many of its cases; `make test-reliability` runs them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], *, every: int) -> list[Any]:
    """Return cases as parameters, of which `make test` runs the first of every `every`.

    The others carry the marker `reliability`. A case's text is its id.
    """
    long = pytest.mark.reliability
    return [
        pytest.param(case, id=str(case), marks=long if at % every else ())
        for at, case in enumerate(cases)
    ]
