"""Benchmarks without training: each is one file that exports one object, listed here.

    benchmark.py     `ZeroShot`: what a benchmark is; scoring and record, the same for all
    wikitext103.py   word-level perplexity, as in the paper's appendix E
    lambada.py       accuracy of the last word of a passage
    score.py         log-probabilities of given lines, for `mlm-eval score`
    sequences.py     what `mlm-eval score` is given: JSON lines, lines of text, parquet
    generation.py    continuations of given prompts, for `mlm-eval generate`

To add one: a file like `lambada.py`, and its name in `BENCHMARKS` below. Its command, its record,
its rows on the terminal and in the reports, and its entry in `mlm-eval plan` come from its object.
This room imports `tasks.data` and `mlm_eval` without the command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlm_eval.tasks.zero_shot.benchmark import ZeroShot

BENCHMARKS = {
    "wikitext103": "The paper's perplexity: per original word, overlapping windows, stride 32.",
    "lambada": "The paper's cloze accuracy: is the last word of each passage the greedy choice?",
}
"""What each measures, in the order of the help and of the paper's columns.

The object of `last-bytes` is `LAST_BYTES` in `last_bytes.py`; it is imported when it is asked for.
"""


def benchmarks() -> dict[str, ZeroShot[Any]]:
    """Return all benchmarks by name."""
    files = {name: name.replace("-", "_") for name in BENCHMARKS}
    return {
        name: getattr(import_module(f"{__name__}.{file}"), file.upper())
        for name, file in files.items()
    }
