"""Result records read from files, and the figures of the paper's tables that they hold.

What `bench`, `score` and lm-evaluation-harness write is read as records too: a point of a study, a
file of scored lines and a file of results are one each.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.text_file import (
    LARGEST_SETTINGS,
    misfit,
    parse_json,
    read_text,
)
from mlm_eval.reporting.existing import LIMITS
from mlm_eval.reporting.results import exponential
from mlm_eval.reporting.series_list import is_series, series_records
from mlm_eval.reporting.tables import Place
from mlm_eval.tasks.language.settings import LANGUAGE
from mlm_eval.tasks.zero_shot import benchmarks

FINE_TUNED = ("mnli", "qqp", "squad1", "squad2", "race")
"""The benchmarks of Table 5; SQuAD's two versions are benchmarks of their own."""

_ITERATION = re.compile(r"iter_0*(\d{1,15})(?!\d)")

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
    """The task; for SQuAD with its version: `squad1`, `squad2`; `bench`, `score`, `harness`."""
    values: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The figures: of the median over seeds where there is one."""
        metrics: Mapping[str, Any] = self.values["metrics"]
        median = metrics.get("median")
        return median if isinstance(median, dict) else metrics

    @property
    def place(self) -> Place:
        """Where in its training the model is."""
        checkpoint, counts, settings = (self[name] for name in ("checkpoint", "counts", "settings"))
        if self.benchmark in LANGUAGE:  # the model that was trained, not the one it began with
            samples, length = _count(counts, "samples_seen"), _count(settings, "seq_length")
            tokens = samples * length if samples and length else None
            return Place(_count(counts, "steps"), samples, tokens)
        iteration = _count(checkpoint, "iteration")
        if iteration is None and (named := _ITERATION.search(f"{checkpoint.get('path')}")):
            iteration = int(named[1])
        samples, tokens = (_count(checkpoint, f"consumed_{name}") for name in ("samples", "tokens"))
        return Place(iteration, samples, tokens)

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


def _count(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    return value if type(value) is int else None


def tables_of_benchmarks() -> dict[str, int]:
    """Return the number of the paper's table of each benchmark."""
    zero_shot = [name for name, benchmark in benchmarks().items() if benchmark.paper is not None]
    return dict.fromkeys(zero_shot, 3) | dict.fromkeys(FINE_TUNED, 5)


def read_results(path: str | Path) -> list[ResultRecord]:
    """Return the records of a file: one, those that a series lists, or what another tool measured.

    Raises:
        InputError: The file, or one that it lists, holds no results of ours.
    """
    values = _read_json(path)
    if isinstance(values, list):
        return [_of_lines(path, values)]
    if isinstance(values, dict):
        if isinstance(values.get("series"), list):
            return [read_record(record) for record in _listed(Path(path), values)]
        if values.get("task") == "bench":
            return list(_of_bench(path, values))
        if isinstance(values.get("results"), dict) and "n-shot" in values:
            return [_of_harness(path, values)]
    return [read_record(path)]


def _listed(path: Path, values: Mapping[str, Any]) -> list[Path]:
    """Return the records that a series lists."""
    if not is_series(values):
        raise InputError(f"{path} is not the list of a series: an entry names no record beside it")
    found = series_records(path, values)
    if not found:
        raise InputError(f"{path} lists no record yet; give it again when the series has some")
    ((record, count),) = Counter(found).most_common(1)
    if count > 1:
        raise InputError(f"{path} lists {record.name} {count} times; remove all entries but one")
    return found


def _of_bench(path: str | Path, values: Mapping[str, Any]) -> Iterator[ResultRecord]:
    """Yield a record for each point of a study."""
    settings, points = values.get("settings"), values.get("points")
    if not isinstance(settings, dict) or not isinstance(points, list):
        raise InputError(f"{path} is no record of bench: it has no settings and points")
    for point in points:
        if not isinstance(point, dict):
            raise InputError(f"{path} is no record of bench: a point is no object")
        model = settings.get("ckpt") or point.get("model")
        yield _record(
            path,
            "bench",
            metrics=point,
            settings={**settings, "tp": point.get("tp"), "dp": 1},
            checkpoint={"path": str(model), "num_parameters": _count(point, "parameters")},
        )


def _of_harness(path: str | Path, values: Mapping[str, Any]) -> ResultRecord:
    """Return a record of what lm-evaluation-harness has written, with any model."""
    config = values.get("config")
    config = config if isinstance(config, dict) else {}
    ours = config.get("mlm_eval")
    ours = ours if isinstance(ours, dict) else {}
    known = values.get("higher_is_better")
    known = known if isinstance(known, dict) else {}
    metrics, lower = {}, []
    for task, figures in values["results"].items():
        better = known.get(task)
        for name, value in figures.items() if isinstance(figures, dict) else ():
            metric, _, kind = name.partition(",")
            if type(value) in (int, float) and "stderr" not in name and kind:
                title = f"{task} {metric}" + ("" if kind == "none" else f" ({kind})")
                metrics[title] = value
                if isinstance(better, dict) and better.get(metric) is False:
                    lower.append(title)
    checkpoint = {
        "path": ours.get("path") or str(values.get("model_name") or config.get("model") or path),
        "num_parameters": _count(config, "model_num_parameters"),
        "digest": ours.get("digest"),
        "iteration": ours.get("iteration"),
        "consumed_samples": ours.get("consumed_samples"),
        "consumed_tokens": ours.get("consumed_tokens"),
    }
    settings = {**ours, "limit": config.get("limit"), "lower_is_better": lower}
    return _record(path, "harness", metrics=metrics, settings=settings, checkpoint=checkpoint)


def _of_lines(path: str | Path, lines: list[Any]) -> ResultRecord:
    """Return a record of the lines of `score`: sums over their tokens."""
    tokens, correct, total = 0, 0, 0.0
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not isinstance(line.get("logprobs"), list):
            raise InputError(f"{path}, line {number}, is no line that `mlm-eval score` wrote")
        if "finish" in line and "greedy" not in line:
            raise InputError(
                f"{path} holds texts that `mlm-eval generate` wrote, of which there is no figure"
            )
        rows = line["logprobs"] if "choices" in line else [line["logprobs"]]
        for value in (value for row in rows if isinstance(row, list) for value in row):
            if type(value) in (int, float):
                tokens, total = tokens + 1, total + value
        correct += _hits(line.get("greedy"))
    if not tokens:
        raise InputError(f"{path} holds no log-probability of a token")
    metrics = {
        "avg_loss": -total / tokens,
        "ppl": exponential(-total / tokens),
        "greedy_share": correct / tokens,
    }
    counts = {"lines": len(lines), "scored_tokens": tokens}
    checkpoint = {"path": str(path), "num_parameters": None}
    return _record(path, "score", metrics=metrics, counts=counts, checkpoint=checkpoint)


def _hits(greedy: object) -> int:
    """Return how many entries of a list, or of lists in it, are true."""
    if isinstance(greedy, list):
        return sum(_hits(entry) for entry in greedy)
    return int(greedy is True)


def _record(
    path: str | Path,
    task: str,
    *,
    metrics: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
) -> ResultRecord:
    values = {
        "task": task,
        "protocol": task,
        "metrics": metrics,
        "counts": counts or {},
        "settings": settings or {},
        "checkpoint": checkpoint,
    }
    return ResultRecord(str(path), task, values)


def _read_json(path: str | Path) -> Any:
    """Return what a JSON file holds; of a file of JSON lines a list of their values."""
    file = Path(path)
    if not file.exists():
        raise InputError(
            f"{path} does not exist; give the files that --output wrote, or a result.json"
        )
    if file.is_dir():
        raise InputError(f"{path} is a folder; give the result.json in it")
    try:
        text = read_text(file, most=LARGEST_SETTINGS)
        try:
            values = parse_json(text, str(path))
        except InputError:
            if '"logprobs"' not in text.partition("\n")[0]:
                raise
            return [parse_json(line, str(path)) for line in text.splitlines() if line.strip()]
        return [values] if isinstance(values, dict) and "logprobs" in values else values
    except InputError as error:
        raise InputError(f"{path} is not a result record: {error}") from None


_NAME = re.compile(r"[a-z0-9][\w.-]{0,63}", re.IGNORECASE | re.ASCII)
"""Of a task, which stands in titles and names of files."""


def read_record(path: str | Path) -> ResultRecord:
    """Return the result record that `--output` wrote, or a fine-tuning's `result.json`.

    Raises:
        InputError: The file is not a result record.
    """
    values = _read_json(path)
    fault = misfit(values, _SCHEMA)
    if fault is not None:
        raise InputError(
            f"{path} is not a result record: {fault}; give what a command of mlm-eval wrote with "
            "--output, a result.json of a training, or results of lm-evaluation-harness"
        )
    benchmark = values["task"]
    if _NAME.fullmatch(benchmark) is None:
        raise InputError(
            f"{path} is not a result record: its task is {shown(benchmark)}; give what a command "
            "of mlm-eval wrote"
        )
    if benchmark == "squad":
        benchmark = f"squad{_squad_version(values, path)}"
    record = ResultRecord(str(path), benchmark, values)
    if benchmark in tables_of_benchmarks():
        list(paper_figures(record))  # a fault in the metrics is found here, where the file is named
    return record


_SCHEMA = {
    "task": "text",
    "protocol": "text",
    "metrics": "object",
    "metrics.median": "object?",
    "counts": "object",
    "settings": "object",
    "settings.data": "object?",
    "settings.data.path": "text or texts?",
    "settings.data.sha256": "text or object of texts?",
    "settings.data.warnings": "texts?",
    "settings.data.sets": "object?",
    "settings.dtype": "text?",
    "settings.vocab": "text?",
    "settings.version": "text?",
    "settings.recipe": "text?",
    "settings.seq_length": "count?",
    "settings.stride": "count?",
    "settings.limit": "count?",
    "settings.seeds": "numbers?",
    "settings.warnings": "texts?",
    "checkpoint": "object",
    "checkpoint.path": "text?",
    "checkpoint.digest": "text?",
    "checkpoint.num_parameters": "count",
    "checkpoint.config": "object?",
    "checkpoint.config.family": "text?",
    "checkpoint.config.num_layers": "count?",
    "checkpoint.config.hidden_size": "count?",
    "checkpoint.config.num_attention_heads": "count?",
}
"""The fields of a record that are read here, and in `paper.py`."""


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
    if misfit({name: value}, {name: "number"}):
        raise InputError(
            f"{record.path}: its metrics hold {shown(value)} for {name!r} of {record['task']}; "
            "expected a number"
        )
    assert isinstance(value, int | float)
    return float(value)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100.0 * value
