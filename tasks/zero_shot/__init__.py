"""Zero-shot benchmarks: a file each, listed here, and `score` for given sequences.

To add one: a file like `lambada.py` that exports an object of a subclass of `ZeroShot`
(`benchmark.py`), and the object in `BENCHMARKS`. Its command, its record, its rows on the terminal
and in the reports, and its entry in `mlm-eval plan` come from the object.
"""

from __future__ import annotations

from typing import Any

from mlm_eval.tasks.zero_shot.benchmark import ZeroShot
from mlm_eval.tasks.zero_shot.lambada import LAMBADA
from mlm_eval.tasks.zero_shot.wikitext103 import WIKITEXT103

BENCHMARKS: tuple[ZeroShot[Any], ...] = (WIKITEXT103, LAMBADA)
"""In the order of the help and of the paper's columns."""


def benchmarks() -> dict[str, ZeroShot[Any]]:
    """Return all benchmarks by name."""
    return {benchmark.name: benchmark for benchmark in BENCHMARKS}
