"""The record of a fine-tuning: figures of every seed, their median, and what they depend on."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlm_eval.reporting.results import Result, checkpoint_record, versions
from mlm_eval.reporting.text import sets_to_show

if TYPE_CHECKING:
    from mlm_eval.engine.engine import Engine
    from mlm_eval.tasks.finetune.run import _Job
    from mlm_eval.training.settings import TrainReport

Run = dict[str, Any]
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


def score(run: Run) -> float:
    """Return a run's score on the dev sets: what seeds are ordered by."""
    dev = run["metrics"]["dev"]
    return float(dev["f1"] if "exact" in dev else dev["accuracy"])


def median_run(runs: Sequence[Run]) -> Run:
    """Return the run with the median dev score; of an even number the lower of the middle two."""
    ranked = sorted(runs, key=score)
    return ranked[(len(ranked) - 1) // 2]


def medians(runs: Sequence[Run], chosen: Run) -> dict[str, Any]:
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


def training_result(job: _Job, runs: Sequence[Run], chosen: Run) -> Result:
    """Return the record of a fine-tuning with one or more seeds."""
    of_seeds = {
        str(run["seed"]): {**without_lists(run["metrics"]), "best": run["best"]} for run in runs
    }
    totals = {
        name: sum(run[name] for run in runs)
        for name in ("load_seconds", "train_seconds", "eval_seconds")
    }
    samples = sum(run["samples"] for run in runs)
    warnings = [
        *job.warnings,
        *dict.fromkeys(text for run in runs for text in run["checkpoint_warnings"]),
    ]
    evaluations = {str(run["seed"]): run["evaluations"] for run in runs}
    return Result(
        task=job.task.name,
        protocol="megatron-paper",
        metrics={**chosen["metrics"], "median": medians(runs, chosen), "seeds": of_seeds},
        counts={**job.prepared.counts, "steps": chosen["steps"], "epochs": chosen["epochs"]},
        settings={
            **chosen["engine"],
            **_settings(job),
            "folders": {str(run["seed"]): str(job._folder(run["seed"])) for run in runs},
            "evaluations": evaluations,
            "warnings": warnings,
        },
        checkpoint=checkpoint_record(job.checkpoint),
        timing={
            **totals,
            "samples_per_second": samples / max(totals["train_seconds"], 1e-9),
        },
        versions=versions(),
    )


def evaluation_result(
    job: _Job, engine: Engine, metrics: Mapping[str, Any], seconds: float
) -> Result:
    """Return the record of an evaluation without training."""
    rows = sum(len(part.features) * part.features.rows for part in job.prepared.parts)
    return Result(
        task=job.task.name,
        protocol="megatron-paper",
        metrics=dict(metrics),
        counts=job.prepared.counts,
        settings={**engine.describe(), **_settings(job), "warnings": job.warnings},
        checkpoint=checkpoint_record(job.checkpoint),
        timing={
            "load_seconds": engine.load_seconds,
            "eval_seconds": seconds,
            "rows_per_second": rows / max(seconds, 1e-9),
        },
        versions=versions(),
    )


def _settings(job: _Job) -> dict[str, Any]:
    options, recipe = job.options, dataclasses.asdict(job.recipe)
    recipe.pop("task")
    own = ("micro_batch", "recompute", "dp_mode", "max_steps", "evaluate_every")
    limits = ("train_limit", "dev_limit", "test_limit")
    version = next((part.version for part in job.prepared.parts if part.version), "")
    return {
        "tokenizer": job.tokenizer.record(),
        "recipe": job.prepared.recipe_name,
        **recipe,
        **{name: getattr(options, name) for name in (*own, *limits)},
        "version": version,
        "seeds": [] if options.eval_only else list(options.seeds),
        "eval_only": options.eval_only,
        "data": job.prepared.data,
    }


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
            told = (
                f"correct / total = {entry['correct']} / {entry['total']} = "
                f"{100 * entry['accuracy']:.4f} %"
            )
            if "f1" in entry:
                told += f", F1 = {100 * entry['f1']:.4f} %"
        else:
            told = f"exact = {entry['exact']:.4f} %, F1 = {entry['f1']:.4f} % of {entry['total']}"
        lines.append(f" > {f'|{title}| ' if title else ''}metrics for {name}: {told}")
    return lines
