"""The paper's tables beside measured figures: what is compared with what, and whether it may be.

A result record is compared with the published row of its size. It counts "as in the paper" only if
protocol, data and size are the paper's; every difference is named in a note. This needs the tasks'
protocols and the names of their metrics, so it stands among the tasks; how a table looks is up to
`mlm_eval.reporting.render`.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.reporting.tables import (
    MEASURED,
    PUBLISHED,
    Cell,
    Column,
    Table,
    TableRow,
    short_count,
)
from mlm_eval.tasks.records import ResultRecord, find_set, paper_figures, tables_of_benchmarks
from mlm_eval.tasks.zero_shot import benchmarks

FINE_TUNING_COLUMNS = (
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
)

SIZE_TOLERANCE = 0.02
"""Vocabulary padding and task heads change a model's count by less; other sizes differ by more."""


@functools.cache
def load_paper() -> dict[str, Any]:
    """Return the figures of the paper: `table1` to `table8`, `figure5`, `protocol`, `source`."""
    text = resources.files(__package__).joinpath("paper.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def paper_columns(number: int) -> tuple[Column, ...]:
    """Return the columns of Table 3 or 5 of the paper."""
    if number == 5:
        return FINE_TUNING_COLUMNS
    return tuple(b.paper.column for b in benchmarks().values() if b.paper is not None)


def paper_protocol(benchmark: str) -> Mapping[str, Any]:
    """Return how the paper measured a benchmark: `protocol`, `settings`, and more."""
    zero_shot = benchmarks().get(benchmark)
    if zero_shot is not None:
        return vars(zero_shot.paper)
    rules: Mapping[str, Any] = load_paper()["protocol"][benchmark]
    return rules


# --- differences from the paper ------------------------------------------------------------------


def differences(record: ResultRecord, size: str | None) -> list[str]:
    """Return how a record's protocol and data differ from the paper's, one sentence each."""
    rules = paper_protocol(record.benchmark)
    settings = record.settings
    notes = [
        f"limited: {option}, so the figure is of a part of the data" for option in record.limits
    ]
    if record["protocol"] != rules["protocol"]:
        notes.append(f"protocol {record['protocol']}, in the paper {rules['protocol']}")
    for name, wanted in rules["settings"].items():
        if wanted != "table6" and settings.get(name) != wanted:
            notes.append(f"{name} {settings.get(name, 'not recorded')}, in the paper {wanted}")
    if "file" in rules:
        notes += _other_file(record, rules["file"])
    else:
        notes += _other_training(record, rules, size)
    if any(value is None for _, value, _ in paper_figures(record)):
        notes.append("not a finite number; the record says why")
    return notes


def _other_file(record: ResultRecord, file: str) -> list[str]:
    data = record.settings.get("data")
    if not isinstance(data, dict):
        return [f"the data is not recorded, in the paper {file}"]
    if data.get("paper_file") is True:
        return []
    warnings = [text for text in data.get("warnings", []) if isinstance(text, str)]
    return warnings[:1] or [f"data {data.get('path', 'not recorded')}, in the paper {file}"]


def _other_training(record: ResultRecord, rules: Mapping[str, Any], size: str | None) -> list[str]:
    """Return how a fine-tuning differs from the paper's: seeds, recipe, sets."""
    settings, notes = record.settings, []
    other = []
    for name, total in rules["totals"].items():
        entry = find_set(record.metrics, name)
        if entry is not None and entry.get("total", total) != total:
            other.append(f"{name} {_thousands(entry['total'])} ({total:,})")
    if other:
        notes.append(f"examples in the sets (in the paper): {', '.join(other)}")
    if settings.get("ensemble"):
        return notes
    if settings.get("eval_only"):
        return [*notes, "evaluation only: how the model was fine-tuned is not recorded"]
    seeds = settings.get("seeds")
    count = len(seeds) if isinstance(seeds, list) else 1
    if count != rules["seeds"]:
        many = "1 seed" if count == 1 else f"{count} seeds"
        notes.append(f"{many}, in the paper the median of {rules['seeds']}")
    trained = record["counts"].get("train_examples")
    if trained is not None and trained != rules.get("train_examples", trained):
        wanted = rules["train_examples"]
        notes.append(f"trained on {_thousands(trained)} examples, in the paper {wanted:,}")
    if settings.get("max_steps") is not None:
        notes.append(f"stopped after {settings['max_steps']} steps (--max-steps)")
    recipe = paper_recipe(record.benchmark, size)
    if recipe is not None:
        for name in rules["settings"]:
            if settings.get(name) != recipe[name]:
                found = settings.get(name, "not recorded")
                notes.append(f"{name} {found}, in the paper {recipe[name]}")
    return notes


def _thousands(value: Any) -> str:
    """Return a count with thousands separators; a record may hold anything."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def paper_recipe(benchmark: str, size: str | None) -> Mapping[str, Any] | None:
    """Return the row of Table 6 for a benchmark and a size; None if there is none."""
    rows: Sequence[Mapping[str, Any]] = load_paper()["table6"]["rows"]
    return next((row for row in rows if (row["task"], row["size"]) == (benchmark, size)), None)


@functools.cache
def size_in_parameters(size: str) -> int:
    """Return the number of parameters of a size that the paper names."""
    from mlm_eval.model.sizes import paper_parameters  # here: it imports torch

    return paper_parameters(size)


def match_size(record: ResultRecord, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, list[str]]:
    """Return the published row of a record's size, or None, and how its shape differs."""
    sized = [row for row in rows if "size" in row]
    wants_ensemble = bool(record.settings.get("ensemble"))
    count = record["checkpoint"]["num_parameters"]
    known = ", ".join(dict.fromkeys(short_count(size_in_parameters(r["size"])) for r in sized))
    for row in sized:
        size = size_in_parameters(row["size"])
        if abs(count - size) > SIZE_TOLERANCE * size:
            continue
        if bool(row.get("ensemble")) == wants_ensemble:
            return row, _other_shape(record, row["size"])
    if wants_ensemble:
        return None, [f"an ensemble of {count:,} parameters; the paper's is of its largest model"]
    return None, [f"{count:,} parameters; the paper's models have {known}"]


def _other_shape(record: ResultRecord, size: str) -> list[str]:
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
    records: Sequence[ResultRecord], *, number: int | None = None, include_limited: bool = False
) -> list[Table]:
    """Return the paper's tables that the records belong to, with measured rows added to them.

    Records of one checkpoint share a row if they are of different benchmarks.

    Args:
        records: What `read_record` returned.
        number: 3 or 5; None: those that the records belong to.
        include_limited: Also take records of limited runs, and mark them.

    Raises:
        InputError: There is no such table, or a record does not belong to it or is of a limited
            run.
    """
    if number is not None and number not in (3, 5):
        raise InputError(f"--table {number} holds no results of ours; choose 3 or 5")
    if not records:
        raise InputError("no result record was given; name files that --output wrote")
    table_of = tables_of_benchmarks()
    for record in records:
        if record.benchmark not in table_of:
            raise InputError(
                f"{record.path} is a record of {record.benchmark}, which is in no table of the "
                "paper; drop the file or --table"
            )
        if number not in (None, table_of[record.benchmark]):
            raise InputError(
                f"{record.path} is a record of {record['task']}, which belongs to Table "
                f"{table_of[record.benchmark]}, not {number}; drop the file or --table"
            )
    if not include_limited:
        refuse_limited(records)
    numbers = [number] if number else sorted({table_of[record.benchmark] for record in records})
    return [
        _table(n, [record for record in records if table_of[record.benchmark] == n])
        for n in numbers
    ]


def refuse_limited(records: Sequence[ResultRecord]) -> None:
    """Refuse records of a part of the data.

    Raises:
        InputError: There is one.
    """
    for record in records:
        if record.limits:
            raise InputError(
                f"{record.path} is of a limited run ({', '.join(record.limits)}), whose figures "
                "are not those of the whole data; leave it out, or have it marked with "
                "--include-limited"
            )


def _table(number: int, records: Sequence[ResultRecord]) -> Table:
    paper = load_paper()
    published = paper[f"table{number}"]["rows"]
    groups = _group(records)
    names = _names(groups)
    measured: dict[str | None, list[TableRow]] = {}
    runs = []
    for name, group in zip(names, groups, strict=True):
        row, notes = match_size(group[0], published)
        measured.setdefault(row["model"] if row else None, []).append(
            _measured_row(name, group, row, notes)
        )
        runs += [f"{name}, {_run(record)}" for record in group]
    rows = []
    for entry in published:
        rows.append(_published_row(entry, paper_columns(number)))
        rows += measured.get(entry["model"], [])
    rows += measured.get(None, [])
    source = f"{paper['source']['title']}, arXiv {paper['source']['arxiv']}, Table {number}"
    title = paper[f"table{number}"]["title"]
    return Table(number, title, paper_columns(number), rows, runs, source)


def _group(records: Sequence[ResultRecord]) -> list[list[ResultRecord]]:
    """Return the records of each row: of one model, each benchmark once."""
    groups: list[list[ResultRecord]] = []
    for record in records:
        for group in groups:
            known = {other.benchmark for other in group}
            if record.model == group[0].model and record.benchmark not in known:
                group.append(record)
                break
        else:
            groups.append([record])
    return groups


def _names(groups: Sequence[Sequence[ResultRecord]]) -> list[str]:
    """Return a name for each row: the checkpoint's folder.

    Rows that share it have the iteration with it, or a number.
    """
    names = [run_name(group[0]) for group in groups]
    places = [group[0].place.iteration for group in groups]
    names = [
        name if names.count(name) == 1 or place is None else f"{name}, iteration {place:,}"
        for name, place in zip(names, places, strict=True)
    ]
    return [
        f"{name} #{names[: index + 1].count(name)}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def run_parts(record: ResultRecord) -> list[str]:
    """Return the parts of the path of the run that a checkpoint is of, the last one its name."""
    inside = r"/|iter_\d+|release|mp_rank_.*|checkpoint(-best|-series)?|.*\.pt"
    path = Path(str(record["checkpoint"].get("path", "")))
    return [part for part in path.parts if not re.fullmatch(inside, part)]


def run_name(record: ResultRecord) -> str:
    """Return the name of the run that a checkpoint is of: its folder's."""
    parts = run_parts(record)
    name = parts[-1] if parts else Path(record.path).stem
    ensemble = record.settings.get("ensemble")
    return f"{name}, ensemble of {ensemble}" if ensemble else name


def _measured_row(
    name: str, group: Sequence[ResultRecord], row: Mapping[str, Any] | None, notes: list[str]
) -> TableRow:
    cells = {}
    for record in group:
        common = differences(record, row["size"] if row else None)
        for key, value, own in paper_figures(record):
            published = row.get(key) if row else None
            cells[key] = Cell(value, published, (*own, *common), record.path)
    return TableRow(
        model=name,
        kind=MEASURED,
        cells=cells,
        parameters=group[0]["checkpoint"]["num_parameters"],
        compared_with=row["model"] if row else None,
        notes=tuple(notes),
        limited=any(record.limits for record in group),
        place=group[0].place,
        digest=str(group[0]["checkpoint"].get("digest") or ""),
    )


def _published_row(entry: Mapping[str, Any], columns: Sequence[Column]) -> TableRow:
    size = entry.get("size")
    return TableRow(
        model=entry["model"],
        kind=PUBLISHED,
        cells={c.key: Cell(float(entry[c.key])) for c in columns if c.key in entry},
        parameters=size_in_parameters(size) if size else None,
    )


def _data_digests(data: Any) -> list[str]:
    """Return the beginnings of the data's hashes: of the one file, or of each evaluated set."""
    if not isinstance(data, dict):
        return []
    sets = data.get("sets")
    found = {"data": data, **(sets if isinstance(sets, dict) else {})}
    return [
        f"{name} sha256 {str(entry['sha256'])[:12]}"
        for name, entry in found.items()
        if isinstance(entry, dict) and entry.get("sha256")
    ]


def _run(record: ResultRecord) -> str:
    """Return how a record's figures came about, in one line."""
    settings, checkpoint = record.settings, record["checkpoint"]
    version = settings.get("version")
    task = f"{record['task']} {version}" if version else record["task"]
    parts = [f"{task}: {record.path}", f"protocol {record['protocol']}"]
    names = ["vocab", "dtype", "tp", "dp", *paper_protocol(record.benchmark)["settings"]]
    parts += [f"{name} {settings[name]}" for name in dict.fromkeys(names) if name in settings]
    if isinstance(settings.get("seeds"), list):
        parts.append(f"seeds {' '.join(map(str, settings['seeds'])) or 'none'}")
    parts += _data_digests(settings.get("data"))
    parts.append(f"checkpoint {checkpoint.get('path')} ({str(checkpoint.get('digest'))[:25]})")
    versions = record.values.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    parts += [f"{name} {versions[name]}" for name in ("mlm_eval", "torch") if name in versions]
    return ", ".join(parts)
