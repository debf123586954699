"""Measurements side by side: in turns, with medians and spreads, kept with their date.

A script measures pairs (`alternate`), makes a `Row` of each comparison and hands its rows to
`publish`. All scripts of a day write into one file of `benchmarks/results/`, and its table.
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
        target = "" if self.target is None else f"{self.target:.2f}"
        return [self.work, self.against, self.unit, *middle, spread, target, "yes" * self.met]


def processor_seconds() -> float:
    """Return the time that this process and its finished children have had of the processors."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def alternate(ours: Work, theirs: Work, *, pairs: int, processor: bool) -> tuple[list[float], ...]:
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
    return tuple(list(times) for times in zip(*measured, strict=True))


def publish(script: str, rows: Sequence[Row], settings: dict[str, Any]) -> bool:
    """Print a table, add it to the day's file, and return whether all targets are met.

    Args:
        script: Its name; what it has written on the same day is replaced.
        rows: What it measured.
        settings: How.
    """
    print(_table(rows), flush=True)
    today = datetime.date.today().isoformat()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{today}.json"
    day = json.loads(path.read_text()) if path.exists() else {}
    day[script] = {
        "settings": settings | _machine(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.write_text(json.dumps(day, indent=1) + "\n")
    parts = [f"# Measured on {today}\n"]
    for name, kept in day.items():
        told = ", ".join(f"{key} {value}" for key, value in kept["settings"].items())
        parts.append(f"## {name}\n\n{told}\n\n{_table([Row(**row) for row in kept['rows']])}\n")
    path.with_suffix(".md").write_text("\n".join(parts))
    return all(row.met for row in rows)


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
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
