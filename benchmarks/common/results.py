"""Measurements side by side: in turns, with medians and spreads, kept with their date.

A script measures pairs (`alternate`), makes a `Row` of each comparison and hands its rows to
`publish`. All scripts of a day, and all parts of a script, write into one file of
`benchmarks/results/`, and its table; this file, run as a script, prints that table.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One comparison."""

    work: str
    """What was done."""
    against: str
    """What it is compared with."""
    unit: str
    """Of `ours` and `theirs`."""
    ours: list[float]
    """Of each pair."""
    theirs: list[float]
    """Of each pair."""
    target: float | None = None
    """The ratio theirs / ours is to be at least this; None: it is for information."""

    @property
    def ratios(self) -> list[float]:
        """How many times faster we were, of each pair, sorted."""
        return sorted(b / a for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def met(self) -> bool:
        """Whether the median reaches the target."""
        return self.target is None or statistics.median(self.ratios) >= self.target

    @property
    def cells(self) -> list[str]:
        """The row of the table."""
        ratios = self.ratios
        middle = [f"{statistics.median(values):.4g}" for values in (self.ours, self.theirs)]
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        if self.target is None:
            return [self.work, self.against, self.unit, *middle, spread, "", ""]
        target = f"{self.target:.2f}"
        met = "yes" if self.met else "no"
        return [self.work, self.against, self.unit, *middle, spread, target, met]


def processor_seconds() -> float:
    """Return the time that this process and its finished children have had of the processors."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def alternate(
    ours: Work, theirs: Work, *, pairs: int, processor: bool
) -> tuple[list[float], list[float]]:
    """Return the seconds of two works, in turns, after one of each that does not count.

    Args:
        ours: A call.
        theirs: Another one.
        pairs: How often.
        processor: Count the processor's time, in which other work does not show; else the clock's.
    """
    clock = processor_seconds if processor else time.perf_counter

    def seconds(work: Work) -> float:
        started = clock()
        work()
        return clock() - started

    ours(), theirs()
    measured = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    return [pair[0] for pair in measured], [pair[1] for pair in measured]


def publish(
    part: str, rows: Sequence[Row], settings: dict[str, Any], *, said: str = "", more: bool = False
) -> bool:
    """Print a table, add it to the day's file, and return whether all targets are met.

    Args:
        part: Name of the script, or of a part of it; what stands under it that day is replaced.
        rows: What was measured.
        settings: How.
        said: What the figures show, in sentences.
        more: The pairs are added to those of the same rows that stand there.
    """
    today = datetime.date.today().isoformat()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{today}.json"
    day = json.loads(path.read_text()) if path.exists() else {}
    if more and part in day:
        before = {row["work"]: row for row in day[part]["rows"]}
        rows = [_longer(row, before[row.work]) if row.work in before else row for row in rows]
    print(_table(rows), *([said] if said else []), sep="\n\n", flush=True)
    day[part] = {
        "settings": settings | _machine(),
        "rows": [dataclasses.asdict(row) for row in rows],
        "said": said,
    }
    path.write_text(json.dumps(dict(sorted(day.items())), indent=1) + "\n")
    path.with_suffix(".md").write_text(_page(today, day))
    return all(row.met for row in rows)


def _longer(row: Row, before: dict[str, Any]) -> Row:
    """Return a row with the pairs of an earlier one in front."""
    ours, theirs = before["ours"] + row.ours, before["theirs"] + row.theirs
    return dataclasses.replace(row, ours=ours, theirs=theirs)


def _page(date: str, day: dict[str, Any]) -> str:
    """Return the page of a day: all targets in one table, then how each part was measured."""
    found = {part: [Row(**row) for row in kept["rows"]] for part, kept in sorted(day.items())}
    targets = [row for rows in found.values() for row in rows if row.target is not None]
    missed = sum(not row.met for row in targets)
    text = [
        f"# Measured on {date}",
        "The ratio says how many times better we are than what stands beside it: the median of the "
        f"pairs, and from the worst to the best. {len(targets)} targets, {missed} missed.",
        _table(targets),
        "## How, and what was measured without a target",
    ]
    for part, rows in found.items():
        told = ", ".join(f"{key} {value}" for key, value in day[part]["settings"].items())
        text.append(f"**{part}**: {told}.")
        others = [row for row in rows if row.target is None]
        text += ([_table(others)] if others else []) + [day[part].get("said", "")]
    return "\n\n".join(filter(None, text)) + "\n"


def _table(rows: Sequence[Row]) -> str:
    head = ["work", "against", "unit", "ours", "theirs", "ratio (spread)", "target", "met"]
    lines = [head, ["---"] * len(head), *(row.cells for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine() -> dict[str, Any]:
    """Return what of the machine decides how fast it is."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0].partition(": ")[2] if names else platform.machine(),
        "cores": os.cpu_count(),
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX-512 bfloat16": torch.cpu._is_avx512_bf16_supported(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    days = sorted(RESULTS.glob("*.md"))
    print(days[-1].read_text() if days else f"{RESULTS} holds no results yet")
