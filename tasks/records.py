"""Result records read from files, and the figures of the paper's tables that they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.reporting.existing import LIMITS
from mlm_eval.tasks.zero_shot import benchmarks

FINE_TUNED = ("mnli", "qqp", "squad1", "squad2", "race")
"""The benchmarks of Table 5; SQuAD's two versions are benchmarks of their own."""

# Figure of a table -> name of the set in a record's metrics.
SETS = {
    "mnli": {"mnli_m": "dev-matched", "mnli_mm": "dev-mismatched"},
    "qqp": {"qqp": "dev"},
    "race": {"race": "test", "race_m": "test-middle", "race_h": "test-high"},
}


@dataclass(frozen=True)
class ResultRecord:
    """A result record that was read from a file."""

    path: str
    benchmark: str
    """The task; for SQuAD with its version: `squad1`, `squad2`."""
    values: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The figures: of the median over seeds where there is one."""
        metrics: Mapping[str, Any] = self.values["metrics"]
        median = metrics.get("median")
        return median if isinstance(median, dict) else metrics

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the run."""
        settings: Mapping[str, Any] = self.values["settings"]
        return settings

    @property
    def limits(self) -> list[str]:
        """The options that limited the run to a part of the data, with their values."""
        given = [name for name in LIMITS if self.settings.get(name) is not None]
        return [f"--{name.replace('_', '-')} {self.settings[name]}" for name in given]

    @property
    def model(self) -> tuple[str, str, Any]:
        """Checkpoint's digest and settings, ensemble: equal in records of the same model."""
        checkpoint = self.values["checkpoint"]
        config = json.dumps(checkpoint.get("config"), sort_keys=True)
        # Records without a digest cannot be known to be of one model.
        return checkpoint.get("digest") or self.path, config, self.settings.get("ensemble")


def tables_of_benchmarks() -> dict[str, int]:
    """Return the number of the paper's table of each benchmark."""
    zero_shot = [name for name, benchmark in benchmarks().items() if benchmark.paper is not None]
    return dict.fromkeys(zero_shot, 3) | dict.fromkeys(FINE_TUNED, 5)


def read_record(path: str | Path) -> ResultRecord:
    """Return the result record that `--output` wrote, or a fine-tuning's `result.json`.

    Raises:
        InputError: The file is not a result record of a task in the paper's tables.
    """
    file = Path(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; give the files that --output wrote, or a result.json"
        ) from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; give the result.json in it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a result record: {error}") from None
    fault = _fault(values)
    if fault is not None:
        raise InputError(
            f"{path} is not a result record: {fault}; give a file that `mlm-eval wikitext103`, "
            "`lambada`, `race`, `mnli`, `qqp` or `squad` wrote"
        )
    benchmark = values["task"]
    if benchmark == "squad":
        benchmark = f"squad{_squad_version(values, path)}"
    tables = tables_of_benchmarks()
    if benchmark not in tables:
        raise InputError(
            f"{path} is a record of {benchmark!r}, which is in no table of the paper; known are "
            f"{', '.join(sorted({*tables, 'squad'} - {'squad1', 'squad2'}))}"
        )
    record = ResultRecord(str(path), benchmark, values)
    list(paper_figures(record))  # a fault in the metrics is found here, where the file is named
    return record


def _fault(values: Any) -> str | None:
    if not isinstance(values, dict):
        return f"it holds a {type(values).__name__}, expected an object"
    for name in ("task", "protocol"):
        if not isinstance(values.get(name), str):
            return f"it has no {name!r}"
    for name in ("metrics", "counts", "settings", "checkpoint"):
        if not isinstance(values.get(name), dict):
            return f"its {name!r} is missing or no object"
    if not isinstance(values["checkpoint"].get("num_parameters"), int):
        return "its checkpoint has no num_parameters"
    return None


def _squad_version(values: Mapping[str, Any], path: str | Path) -> int:
    """Return 1 or 2."""
    settings = values["settings"]
    names = " ".join(str(settings.get(name, "")) for name in ("version", "recipe"))
    found = re.search(r"\bv?([12])(?:\.[01])?\b", f"{names} {values['protocol']}")
    if found is None:
        raise InputError(
            f"{path}: its settings do not say which version of SQuAD it is (1.1 or 2.0)"
        )
    return int(found[1])


def paper_figures(record: ResultRecord) -> Iterator[tuple[str, float | None, list[str]]]:
    """Yield (column, value, notes on what that value is instead of the paper's) of a record.

    Raises:
        InputError: The metrics are not those of the task.
    """
    metrics = record.metrics
    zero_shot = benchmarks().get(record.benchmark)
    if zero_shot is not None:
        assert zero_shot.paper is not None
        value = _number(record, metrics, zero_shot.paper.metric)
        yield record.benchmark, _percent(value) if zero_shot.paper.percent else value, []
    elif record.benchmark.startswith("squad"):
        entry = find_set(metrics, "dev") or metrics
        for key, name in (("f1", "f1"), ("em", "exact")):
            yield f"{record.benchmark}_{key}", _number(record, entry, name), []
    else:
        yield from _accuracies(record, metrics)


def _accuracies(
    record: ResultRecord, metrics: Mapping[str, Any]
) -> Iterator[tuple[str, float | None, list[str]]]:
    found = 0
    for key, name in SETS[record.benchmark].items():
        notes = []
        entry = find_set(metrics, name)
        if entry is None and name.startswith("test"):
            entry = find_set(metrics, name.replace("test", "dev"))
            notes = ["development set; the paper's RACE figures are of the test set"]
        if entry is None:
            continue
        found += 1
        yield key, _percent(_number(record, entry, "accuracy")), notes
    if not found:
        names = ", ".join(SETS[record.benchmark].values())
        raise InputError(f"{record.path}: its metrics hold none of {names}; is it a finished run?")


def find_set(metrics: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Return the figures of a set; None if the metrics do not hold it."""
    entry = metrics.get(name)
    return entry if isinstance(entry, dict) else None


def _number(record: ResultRecord, metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    if value is None and f"{name}_note" in metrics:  # infinity, or not a number
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InputError(
            f"{record.path}: its metrics hold {value!r} for {name!r} of {record['task']}; expected "
            "a number"
        )
    return float(value)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100.0 * value
