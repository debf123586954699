"""Benchmarks without training: each is one file that exports one object, listed here.

    benchmark.py     `ZeroShot`: what a benchmark is; scoring and record, the same for all
    wikitext103.py   word-level perplexity, as in the paper's appendix E
    lambada.py       accuracy of the last word of a passage
    score.py         log-probabilities of given lines, for `mlm-eval score`

To add one: a file like `lambada.py`, and its object in `BENCHMARKS` below. Its command, its record,
its rows on the terminal and in the reports, and its entry in `mlm-eval plan` come from the object.
This room imports `tasks.data` and `mlm_eval` without the command line.
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
