"""The figures of fine-tuning runs: of one, their medians over seeds, and lines for the log."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlm_eval.reporting.text import sets_to_show

if TYPE_CHECKING:
    from mlm_eval.training.settings import TrainReport

RunRecord = dict[str, Any]
"""What a run's run.json holds: `seed`, `metrics`, `engine`, `evaluations`, ..."""

MEDIANS = ("accuracy", "f1", "exact")
"""Figures of which a median over seeds is taken."""


def report_record(report: TrainReport) -> dict[str, Any]:
    """Return what a run's record keeps of the trainer's report."""
    best = report.best
    return {
        "steps": report.steps,
        "epochs": report.epochs,
        "samples": report.samples,
        "train_seconds": report.seconds,
        "samples_per_second": report.samples_per_second,
        "last_loss": report.losses[-1] if report.losses else None,
        "evaluations": report.evaluations,
        "best": None if best is None else {name: best[name] for name in ("epoch", "step", "score")},
    }


def dev_score(run: RunRecord) -> float:
    """Return a run's score on the dev sets: what seeds are ordered by."""
    dev = run["metrics"]["dev"]
    return float(dev["f1"] if "exact" in dev else dev["accuracy"])


def median_run(runs: Sequence[RunRecord]) -> RunRecord:
    """Return the run with the median dev score; of an even number the lower of the middle two."""
    ranked = sorted(runs, key=dev_score)
    return ranked[(len(ranked) - 1) // 2]


def medians(runs: Sequence[RunRecord], chosen: RunRecord) -> dict[str, Any]:
    """Return the medians over seeds of the dev figures, with the chosen run's test figures.

    As the paper does: the dev sets choose the seed, and its test result is reported.
    """
    found: dict[str, Any] = {"seed": chosen["seed"]}
    for name, entry in without_lists(chosen["metrics"]).items():
        if not name.startswith("dev"):
            if isinstance(entry, dict):
                found[name] = entry
            continue
        found[name] = {
            figure: statistics.median(run["metrics"][name][figure] for run in runs)
            for figure in MEDIANS
            if figure in entry
        }
        found[name]["total"] = entry["total"]
    if "exact" in chosen["metrics"]:  # SQuAD
        found |= {name: found["dev"][name] for name in ("exact", "f1")}
    return found


def without_lists(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics without the lists of ids in them."""
    return {
        name: {k: v for k, v in entry.items() if not isinstance(v, list)}
        if isinstance(entry, dict)
        else entry
        for name, entry in metrics.items()
    }


def figure_lines(metrics: Mapping[str, Any], title: str = "") -> list[str]:
    """Return a line of text for each set with its figures, in the manner of Megatron's log."""
    lines = []
    for name in sets_to_show(metrics):
        entry = metrics[name]
        if "accuracy" in entry:
            text = (
                f"correct / total = {entry['correct']} / {entry['total']} = "
                f"{100 * entry['accuracy']:.4f} %"
            )
            if "f1" in entry:
                text += f", F1 = {100 * entry['f1']:.4f} %"
        else:
            text = f"exact = {entry['exact']:.4f} %, F1 = {entry['f1']:.4f} % of {entry['total']}"
        lines.append(f" > {f'|{title}| ' if title else ''}metrics for {name}: {text}")
    return lines
