"""The paper's tables beside measured figures: which figure belongs where, and whether it may stand there.

A result record is compared with the published row of its size. It counts "as in the paper" only if
protocol, data and size are the paper's; every difference is named in a note. Here, in the tasks' layer,
because it takes the tasks' protocols and the names of their metrics to judge that; how a table looks
is decided by `mlm_eval.report`.
"""

from __future__ import annotations

import functools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.report import MEASURED, PUBLISHED, Cell, Column, Row, Table, short_count

COLUMNS = {
    3: (
        Column("wikitext103", "WikiText-103 perplexity", 2, higher_is_better=False),
        Column("lambada", "LAMBADA accuracy", 2),
    ),
    5: (
        Column("mnli_m", "MNLI m", 1),
        Column("mnli_mm", "MNLI mm", 1),
        Column("qqp", "QQP", 1),
        Column("squad1_f1", "SQuAD 1.1 F1", 1),
        Column("squad1_em", "SQuAD 1.1 EM", 1),
        Column("squad2_f1", "SQuAD 2.0 F1", 1),
        Column("squad2_em", "SQuAD 2.0 EM", 1),
        Column("race", "RACE", 1),
        Column("race_m", "RACE m", 1),
        Column("race_h", "RACE h", 1),
    ),
}

TABLE_OF = {
    "wikitext103": 3,
    "lambada": 3,
    "mnli": 5,
    "qqp": 5,
    "squad1": 5,
    "squad2": 5,
    "race": 5,
}
"""Benchmark -> the paper's table; SQuAD's two versions are benchmarks of their own."""

# Figure of a table -> name of the set in a record's metrics.
SETS = {
    "mnli": {"mnli_m": "dev-matched", "mnli_mm": "dev-mismatched"},
    "qqp": {"qqp": "dev"},
    "race": {"race": "test", "race_m": "test-middle", "race_h": "test-high"},
}

LIMITS = ("limit", "train_limit", "dev_limit", "test_limit")

SIZE_TOLERANCE = 0.02
"""Padding of the vocabulary and task heads change a model's count by less; the next size is far."""


@functools.cache
def load_paper() -> dict[str, Any]:
    """Return the figures of the paper: `table1` to `table8`, `figure5`, `protocol`, `source`."""
    text = resources.files(__package__).joinpath("paper.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@dataclass(frozen=True)
class Record:
    """A result record that was read from a file."""

    path: str
    benchmark: str
    """The task; for SQuAD with its version: `squad1`, `squad2`."""
    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the run."""
        settings: Mapping[str, Any] = self.values["settings"]
        return settings

    @property
    def limits(self) -> list[str]:
        """The options that kept the run to a part of the data."""
        given = [name for name in LIMITS if self.settings.get(name) is not None]
        return [f"--{name.replace('_', '-')} {self.settings[name]}" for name in given]

    @property
    def model(self) -> tuple[str, str]:
        """What makes two records those of one model: digest and settings of the checkpoint."""
        checkpoint = self.values["checkpoint"]
        config = json.dumps(checkpoint.get("config"), sort_keys=True)
        # A record without a digest belongs to no other one.
        return checkpoint.get("digest") or self.path, config


def read_record(path: str | Path) -> Record:
    """Return a result record that a command wrote with `--output`, or a fine-tuning's `result.json`.

    Raises:
        InputError: The file is no result record of a task in the paper's tables.
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
        raise InputError(f"{path} is no result record: {error}") from None
    fault = _fault(values)
    if fault is not None:
        raise InputError(
            f"{path} is no result record: {fault}; give a file that `mlm-eval wikitext103`, `lambada`, "
            "`race`, `mnli`, `qqp` or `squad` wrote"
        )
    benchmark = values["task"]
    if benchmark == "squad":
        benchmark = f"squad{_squad_version(values, path)}"
    if benchmark not in TABLE_OF:
        raise InputError(
            f"{path} is a record of {benchmark!r}, which is in no table of the paper; known are "
            f"{', '.join(sorted({*TABLE_OF, 'squad'} - {'squad1', 'squad2'}))}"
        )
    record = Record(str(path), benchmark, values)
    for _ in _figures(record):  # now, so that the fault is told with the name of the file
        pass
    return record


def _fault(values: Any) -> str | None:
    if not isinstance(values, dict):
        return f"it holds a {type(values).__name__}, expected an object"
    for name, kind in (("task", str), ("protocol", str)):
        if not isinstance(values.get(name), kind):
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
    told = " ".join(str(settings.get(name, "")) for name in ("version", "recipe"))
    found = re.search(r"\bv?([12])(?:\.[01])?\b", f"{told} {values['protocol']}")
    if found is None:
        raise InputError(f"{path}: its settings do not say which version of SQuAD it is of (1.1, 2.0)")
    return int(found[1])


# --- figures of a record -------------------------------------------------------------------------


def _figures(record: Record) -> Iterator[tuple[str, float | None, list[str]]]:
    """Yield (figure, value, why that figure is not the paper's kind) of a record.

    Raises:
        InputError: The metrics are not those of the task.
    """
    metrics = record["metrics"]
    if record.benchmark == "wikitext103":
        yield "wikitext103", _number(record, metrics, "adjusted_ppl"), []
    elif record.benchmark == "lambada":
        yield "lambada", _percent(_number(record, metrics, "accuracy")), []
    else:
        metrics = metrics["median"] if isinstance(metrics.get("median"), dict) else metrics
        if record.benchmark.startswith("squad"):
            entry = _find_set(metrics, ["dev", "squad"]) or metrics
            for key, name in (("f1", "f1"), ("em", "exact")):
                yield f"{record.benchmark}_{key}", _number(record, entry, name), []
        else:
            yield from _accuracies(record, metrics)


def _accuracies(
    record: Record, metrics: Mapping[str, Any]
) -> Iterator[tuple[str, float | None, list[str]]]:
    found = 0
    for key, name in SETS[record.benchmark].items():
        notes = []
        entry = _find_set(metrics, [name])
        if entry is None and name.startswith("test"):
            entry = _find_set(metrics, [name.replace("test", "dev")])
            notes = ["development set; the paper's RACE figures are of the test set"]
        if entry is None:
            continue
        found += 1
        yield key, _percent(_number(record, entry, "accuracy")), notes
    if not found:
        names = ", ".join(SETS[record.benchmark].values())
        raise InputError(f"{record.path}: its metrics hold none of {names}; is it a finished run?")


def _find_set(metrics: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any] | None:
    for name in names:
        if isinstance(entry := metrics.get(name), dict):
            return entry
    return None


def _number(record: Record, metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    if value is None and f"{name}_note" in metrics:  # infinity, or not a number
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InputError(
            f"{record.path}: its metrics hold {value!r} for {name!r} of {record['task']}; expected a "
            "number"
        )
    return float(value)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100.0 * value


# --- what is not as in the paper -----------------------------------------------------------------


def _differences(record: Record, size: str | None) -> list[str]:
    """Return what of a record's protocol and data is not the paper's, one sentence each."""
    rules = load_paper()["protocol"][record.benchmark]
    settings = record.settings
    notes = [
        f"limited: {option}, so the figure is of a part of the data" for option in record.limits
    ]
    if record["protocol"] not in (rules["protocol"], f"{rules['protocol']}-{record.benchmark}"):
        notes.append(f"protocol {record['protocol']}, in the paper {rules['protocol']}")
    for name, wanted in rules.get("settings", {}).items():
        if settings.get(name) != wanted:
            notes.append(f"{name} {settings.get(name, 'not recorded')}, in the paper {wanted}")
    if "file" in rules:
        notes += _other_file(record, rules["file"])
    else:
        notes += _other_training(record, rules, size)
    if any(value is None for _, value, _ in _figures(record)):
        notes.append("not a finite number; the record says why")
    return notes


def _other_file(record: Record, file: str) -> list[str]:
    data = record.settings.get("data")
    if not isinstance(data, dict):
        return [f"the data is not recorded, in the paper {file}"]
    if data.get("paper_file") is True:
        return []
    told = [text for text in data.get("warnings", []) if isinstance(text, str)]
    return told[:1] or [f"data {data.get('path', 'not recorded')}, in the paper {file}"]


def _other_training(record: Record, rules: Mapping[str, Any], size: str | None) -> list[str]:
    """Return what of a fine-tuning is not the paper's: seeds, recipe, training and evaluation sets."""
    settings, notes = record.settings, []
    metrics = record["metrics"]
    metrics = metrics["median"] if isinstance(metrics.get("median"), dict) else metrics
    for name, total in rules["totals"].items():
        entry = _find_set(metrics, ["dev", "squad"]) or metrics if name == "squad" else metrics.get(name)
        if isinstance(entry, dict) and entry.get("total", total) != total:
            where = "questions" if name == "squad" else f"examples in {name}"
            notes.append(f"{entry['total']:,} {where}, in the paper {total:,}")
    if settings.get("ensemble"):
        return notes
    if settings.get("eval_only"):
        return [*notes, "evaluation only: how the model was fine-tuned is not recorded"]
    seeds = settings.get("seeds")
    count = len(seeds) if isinstance(seeds, list) else 1
    if count != rules["seeds"]:
        notes.append(f"{count} seed(s), in the paper the median of {rules['seeds']}")
    trained = record["counts"].get("train_examples")
    if trained is not None and trained != rules.get("train_examples", trained):
        notes.append(f"trained on {trained:,} examples, in the paper {rules['train_examples']:,}")
    if settings.get("max_steps") is not None:
        notes.append(f"stopped after {settings['max_steps']} steps (--max-steps)")
    recipe = _paper_recipe(record.benchmark, size)
    if recipe is not None:
        names = {"global_batch": "batch", "lr": "lr", "epochs": "epochs"}
        for name, printed in names.items():
            if settings.get(name) != recipe[printed]:
                found = settings.get(name, "not recorded")
                notes.append(f"{printed} {found}, in the paper {recipe[printed]}")
    return notes


def _paper_recipe(benchmark: str, size: str | None) -> Mapping[str, Any] | None:
    for row in load_paper()["table6"]["rows"]:
        if (row["task"], row["size"]) == (benchmark, size):
            found: Mapping[str, Any] = row
            return found
    return None


@functools.cache
def _size_in_parameters(size: str) -> int:
    from mlm_eval.models import paper_parameters  # here: it imports torch

    return paper_parameters(size)


def _match_size(record: Record, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, list[str]]:
    """Return the published row of a record's size, or None, and what differs in the model's shape."""
    sized = [row for row in rows if "size" in row]
    wants_ensemble = bool(record.settings.get("ensemble"))
    count = record["checkpoint"]["num_parameters"]
    known = ", ".join(dict.fromkeys(short_count(_size_in_parameters(r["size"])) for r in sized))
    for row in sized:
        size = _size_in_parameters(row["size"])
        if abs(count - size) > SIZE_TOLERANCE * size:
            continue
        if bool(row.get("ensemble")) == wants_ensemble:
            return row, _other_shape(record, row["size"])
    if wants_ensemble:
        return None, [f"an ensemble of {count:,} parameters; the paper's is of its largest model"]
    return None, [f"{count:,} parameters; the paper's models have {known}"]


def _other_shape(record: Record, size: str) -> list[str]:
    config = record["checkpoint"].get("config")
    if not isinstance(config, dict):
        return []
    paper = load_paper()
    (row,) = (r for t in ("table2", "table4") for r in paper[t]["rows"] if r["size"] == size)
    names = ("num_layers", "hidden_size", "num_attention_heads")
    return [
        f"{name} {config[name]}, in the paper {row[name]}"
        for name in names
        if name in config and config[name] != row[name]
    ]


# --- tables --------------------------------------------------------------------------------------


def build_tables(
    records: Sequence[Record], *, number: int | None = None, include_limited: bool = False
) -> list[Table]:
    """Return the paper's tables that the records belong to, measured rows among the published ones.

    Records of one checkpoint share a row, as far as they are of different benchmarks.

    Args:
        records: What `read_record` returned.
        number: 3 or 5; None: those that the records belong to.
        include_limited: Take records of limited runs, too, and mark them.

    Raises:
        InputError: There is no such table, a record does not belong to it, or it is of a limited run.
    """
    if number is not None and number not in COLUMNS:
        raise InputError(f"--table {number} is not one that results belong to; choose 3 or 5")
    if not records:
        raise InputError("no result record was given; name files that --output wrote")
    for record in records:
        if number not in (None, TABLE_OF[record.benchmark]):
            raise InputError(
                f"{record.path} is a record of {record['task']}, which belongs to Table "
                f"{TABLE_OF[record.benchmark]}, not {number}; leave it or --table out"
            )
        if record.limits and not include_limited:
            raise InputError(
                f"{record.path} is of a limited run ({', '.join(record.limits)}), whose figures are not "
                "those of the whole data; leave it out, or take it in marked with --include-limited"
            )
    numbers = [number] if number else sorted({TABLE_OF[record.benchmark] for record in records})
    return [
        _table(n, [record for record in records if TABLE_OF[record.benchmark] == n])
        for n in numbers
    ]


def _table(number: int, records: Sequence[Record]) -> Table:
    paper = load_paper()
    published = paper[f"table{number}"]["rows"]
    groups = _group(records)
    names = _names(groups)
    measured: dict[str | None, list[Row]] = {}
    runs = []
    for name, group in zip(names, groups, strict=True):
        row, notes = _match_size(group[0], published)
        measured.setdefault(row["model"] if row else None, []).append(
            _measured_row(name, group, row, notes)
        )
        runs += [f"{name}, {_run(record)}" for record in group]
    rows = []
    for entry in published:
        rows.append(_published_row(entry, COLUMNS[number]))
        rows += measured.get(entry["model"], [])
    rows += measured.get(None, [])
    source = f"{paper['source']['title']}, arXiv {paper['source']['arxiv']}, Table {number}"
    title = paper[f"table{number}"]["title"]
    return Table(number, title, COLUMNS[number], rows, runs, source)


def _group(records: Sequence[Record]) -> list[list[Record]]:
    """Return the records by rows: of one model, each benchmark once."""
    groups: list[list[Record]] = []
    for record in records:
        for group in groups:
            other = group[0]
            same = (record.model, record.settings.get("ensemble")) == (
                other.model,
                other.settings.get("ensemble"),
            )
            if same and record.benchmark not in {r.benchmark for r in group}:
                group.append(record)
                break
        else:
            groups.append([record])
    return groups


def _names(groups: Sequence[Sequence[Record]]) -> list[str]:
    """Return a name for each row: the checkpoint's folder, numbered where it is not the only one."""
    names = [_name(group[0]) for group in groups]
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        if names.count(name) > 1:
            names[index] = f"{name} #{seen[name]}"
    return names


def _name(record: Record) -> str:
    parts = [
        part
        for part in Path(str(record["checkpoint"].get("path", ""))).parts
        if not re.fullmatch(r"/|iter_\d+|release|mp_rank_.*|checkpoint(-best)?|.*\.pt", part)
    ]
    name = parts[-1] if parts else Path(record.path).stem
    ensemble = record.settings.get("ensemble")
    return f"{name}, ensemble of {ensemble}" if ensemble else name


def _measured_row(
    name: str, group: Sequence[Record], row: Mapping[str, Any] | None, notes: list[str]
) -> Row:
    cells = {}
    for record in group:
        common = _differences(record, row["size"] if row else None)
        for key, value, own in _figures(record):
            published = row.get(key) if row else None
            cells[key] = Cell(value, published, (*own, *common), record.path)
    return Row(
        model=name,
        kind=MEASURED,
        cells=cells,
        parameters=group[0]["checkpoint"]["num_parameters"],
        compared_with=row["model"] if row else None,
        notes=tuple(notes),
        limited=any(record.limits for record in group),
        digest=str(group[0]["checkpoint"].get("digest") or ""),
    )


def _published_row(entry: Mapping[str, Any], columns: Sequence[Column]) -> Row:
    size = entry.get("size")
    return Row(
        model=entry["model"],
        kind=PUBLISHED,
        cells={c.key: Cell(float(entry[c.key])) for c in columns if c.key in entry},
        parameters=_size_in_parameters(size) if size else None,
    )


def _run(record: Record) -> str:
    """Return how a record's figures came about, in one line."""
    settings, checkpoint = record.settings, record["checkpoint"]
    parts = [f"{record['task']}: {record.path}"]
    for name, text in (("dtype", "{}"), ("tp", "tp {}"), ("dp", "dp {}"), ("vocab", "vocabulary {}")):
        if name in settings:
            parts.append(text.format(settings[name]))
    if isinstance(settings.get("seeds"), list):
        parts.append(f"seeds {' '.join(map(str, settings['seeds']))}")
    if isinstance(settings.get("data"), dict) and settings["data"].get("sha256"):
        parts.append(f"data sha256 {settings['data']['sha256'][:12]}")
    parts.append(f"checkpoint {checkpoint.get('path')} ({str(checkpoint.get('digest'))[:25]})")
    versions = record.values.get("versions") or {}
    parts += [f"{name} {versions[name]}" for name in ("mlm_eval", "torch") if name in versions]
    return ", ".join(parts)
