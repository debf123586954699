"""Records of any task side by side, and the paper's figures as levels: what `--curve` draws.

A task that the paper's tables hold has their figures here; of another task all numbers in its
metrics that a reader compares are shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.reporting.tables import Column, Level, TaskRow, TaskTable, short_count
from mlm_eval.tasks.language.settings import LANGUAGE
from mlm_eval.tasks.paper import (
    differences,
    load_paper,
    match_size,
    paper_columns,
    refuse_limited,
    run_name,
    run_parts,
    size_in_parameters,
)
from mlm_eval.tasks.records import ResultRecord, paper_figures, tables_of_benchmarks

TITLES = {
    "lm": "Language models",
    "mlm": "Masked language models",
    "score": "Scored lines",
    "bench": "Speed",
    "harness": "lm-evaluation-harness",
    "wikitext103": "WikiText-103",
    "lambada": "LAMBADA",
    "squad1": "SQuAD 1.1",
    "squad2": "SQuAD 2.0",
}
"""Of others the task's name in capitals."""

OF_TRAINING = {
    "loss": Column("loss", "dev loss (nats)", 4, higher_is_better=False),
    "perplexity": Column("perplexity", "dev perplexity", 2, higher_is_better=False),
    "accuracy": Column("accuracy", "dev accuracy (%)", 2),
    "order_accuracy": Column("order_accuracy", "order (%)", 2),
    "final_training_loss": Column("final_training_loss", "last loss", 4, higher_is_better=False),
}
OF_BENCH = {
    "tokens_per_second": Column("tokens_per_second", "tokens/s", 0),
    "seconds_per_step": Column("seconds_per_step", "s/step", 4, higher_is_better=False),
    "tflops_per_rank": Column("tflops_per_rank", "TFLOP/s per rank", 4),
    "share_of_peak": Column("share_of_peak", "share of peak (%)", 1),
    "efficiency": Column("efficiency", "efficiency (%)", 1),
}
OF_LINES = {
    "avg_loss": Column("avg_loss", "loss (nats per token)", 4, higher_is_better=False),
    "ppl": Column("ppl", "perplexity per token", 2, higher_is_better=False),
    "greedy_share": Column("greedy_share", "greedy tokens (%)", 2),
}
COLUMNS: Mapping[str, Mapping[str, Column]] = {
    "lm": OF_TRAINING,
    "mlm": OF_TRAINING,
    "bench": OF_BENCH,
    "score": OF_LINES,
}
"""What is shown of a task's metrics, where not all of them are."""

AXIS_TITLES = {
    "wikitext103": "perplexity per word of the original text",
    "lambada": "accuracy (%)",
}


def build_comparisons(
    records: Sequence[ResultRecord], *, curve: bool = False, include_limited: bool = False
) -> list[TaskTable]:
    """Return a comparison for each task of the records, in the order in which these come.

    Args:
        records: Of any tasks.
        curve: They are iterations of runs, and are put in order.
        include_limited: Also take records of limited runs, and mark them.

    Raises:
        InputError: A record is of a limited run; or, for a curve, says no iteration.
    """
    if not include_limited:
        refuse_limited(records)
    if curve and not records:
        raise InputError("no result record was given; name a series, or files that --output wrote")
    names = dict(zip(map(id, records), _names(records), strict=True))
    tasks = dict.fromkeys(record.benchmark for record in records)
    found = []
    for task in tasks:
        mine = [record for record in records if record.benchmark == task]
        if curve:
            mine = _in_order(mine, names)
        found.append(_comparison(task, mine, [names[id(record)] for record in mine]))
    return found


def _in_order(records: Sequence[ResultRecord], names: Mapping[int, str]) -> list[ResultRecord]:
    for record in records:
        if record.place.iteration is None:
            raise InputError(
                f"{record.path} says no iteration of its checkpoint, so it has no place on a "
                "curve; leave it out, or leave out --curve"
            )
    order = {name: index for index, name in enumerate(dict.fromkeys(names.values()))}
    return sorted(records, key=lambda r: (order[names[id(r)]], r.place.iteration))


def _comparison(task: str, records: Sequence[ResultRecord], names: Sequence[str]) -> TaskTable:
    table = tables_of_benchmarks().get(task)
    rows, columns = [], dict[str, Column]()
    for record, name in zip(records, names, strict=True):
        figures = _figures(record)
        columns |= {column.key: column for column, _ in figures}
        settings, checkpoint = record.settings, record["checkpoint"]
        rows.append(
            TaskRow(
                name,
                {column.key: value for column, value in figures},
                run=_run(settings),
                place=record.place,
                parameters=checkpoint.get("num_parameters"),
                record=record.path,
                digest=str(checkpoint.get("digest") or ""),
                limited=bool(record.limits),
                notes=() if table is None else tuple(_notes(record, table)),
                errors=_errors(record),
            )
        )
    drawn = [key for key in columns if key in ("loss", "accuracy", *paper_keys(task))]
    levels = [] if table is None else _levels(table, records[0], list(columns))
    source = load_paper()["source"]
    return TaskTable(
        task,
        TITLES.get(task, task.upper()),
        list(columns.values()),
        rows,
        levels,
        drawn or list(columns)[:6],
        f"{source['title']}, arXiv {source['arxiv']}, Table {table}" if levels else "",
    )


def paper_keys(task: str) -> list[str]:
    """Return the columns of the paper's tables that a task has figures for."""
    table = tables_of_benchmarks().get(task)
    columns = () if table is None else paper_columns(table)
    return [c.key for c in columns if c.key == task or c.key.startswith(f"{task}_")]


def _figures(record: ResultRecord) -> list[tuple[Column, float | None]]:
    """Return what is shown of a record, each figure in the unit of its column."""
    table = tables_of_benchmarks().get(record.benchmark)
    if table is not None:
        columns = {column.key: column for column in paper_columns(table)}
        return [
            (_retitled(columns[key], record.benchmark), value)
            for key, value, _ in paper_figures(record)
        ]
    known = COLUMNS.get(record.benchmark)
    found = []
    for name, value in record.metrics.items():
        if type(value) not in (int, float) or (known is not None and name not in known):
            continue
        lower = record.settings.get("lower_is_better") or ()
        column = Column(name, name, 4, name not in lower) if known is None else known[name]
        scale = 100.0 if column.title.endswith("(%)") else 1.0
        found.append((column, scale * value if math.isfinite(value) else None))
    return found


def _retitled(column: Column, task: str) -> Column:
    """Return the column of a zero-shot benchmark with its unit: the title names the benchmark."""
    title = AXIS_TITLES.get(task, f"{column.title} (%)")
    return Column(column.key, title, column.decimals, column.higher_is_better)


def _errors(record: ResultRecord) -> dict[str, float]:
    error = record.metrics.get("accuracy_stderr")
    if record.benchmark == "lambada" and isinstance(error, float):
        return {"lambada": 100.0 * error}
    return {}


def _notes(record: ResultRecord, table: int) -> list[str]:
    """Return how a record differs from the paper's figure; see `paper.differences`."""
    row, notes = match_size(record, load_paper()[f"table{table}"]["rows"])
    own = [note for _, _, notes_of_figure in paper_figures(record) for note in notes_of_figure]
    return list(dict.fromkeys([*notes, *own, *differences(record, row["size"] if row else None)]))


def _levels(table: int, record: ResultRecord, keys: Sequence[str]) -> list[Level]:
    """Return the published figures of a record's size; where there is none, of the nearest."""
    rows = [
        row
        for row in load_paper()[f"table{table}"]["rows"]
        if "size" in row and not row.get("ensemble")
    ]
    matched, _ = match_size(record, rows)
    count = max(record["checkpoint"]["num_parameters"], 1)
    nearest = matched or min(
        rows, key=lambda row: abs(math.log(size_in_parameters(row["size"]) / count))
    )
    size = short_count(size_in_parameters(nearest["size"]))
    note = "" if matched else f"the paper's nearest size, {size} parameters"
    model = nearest["model"]
    return [Level(model, key, float(nearest[key]), note) for key in keys if key in nearest]


def _run(settings: Mapping[str, Any]) -> str:
    """Return in a few words how a figure was measured."""
    told = [str(settings["dtype"])] if isinstance(settings.get("dtype"), str) else []
    sizes = {name: settings.get(name) for name in ("tp", "dp")}
    if all(type(size) is int for size in sizes.values()):
        told.append(f"tp {sizes['tp']} x dp {sizes['dp']}")
    told += [settings["mode"]] if isinstance(settings.get("mode"), str) else []
    return ", ".join(told)


def _names(records: Sequence[ResultRecord]) -> list[str]:
    """Return the name of each record's run: its folder's, with folders above where two share it."""
    parts = [_parts(record) for record in records]
    names = [run_name(r) if own is None else own[-1] for r, own in zip(records, parts, strict=True)]
    paths = [tuple(own or [name]) for own, name in zip(parts, names, strict=True)]
    for depth in range(2, 1 + max(map(len, paths), default=0)):
        runs: dict[str, set[tuple[str, ...]]] = {}
        for name, path in zip(names, paths, strict=True):
            runs.setdefault(name, set()).add(path)
        if all(len(of_name) == 1 for of_name in runs.values()):
            break
        names = [
            "/".join(path[-depth:]) if len(runs[name]) > 1 else name
            for name, path in zip(names, paths, strict=True)
        ]
    return names


def _parts(record: ResultRecord) -> list[str] | None:
    """Return the path of a record's run; None: its name is not the end of one."""
    if record.benchmark in LANGUAGE:
        return list(Path(record.path).absolute().parts[1:-1]) or None
    if record.benchmark == "score":
        return [Path(record.path).stem]
    if record.settings.get("ensemble"):
        return None
    return run_parts(record) or None
