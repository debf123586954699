"""Parquet and JSON-lines files of the Hub: alone, in shards, in folders of splits and of sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.tasks.data.sources import DatasetName, load_dataset, read_data
from mlm_eval.tasks.data.tables import is_table, read_table, read_tables, split_of
from mlm_eval.tasks.data.text import LONGEST_INPUT, check_text
from mlm_eval.tasks.finetune.task import make_task

GLUE = [{"premise": "a", "hypothesis": "b", "label": i, "idx": i} for i in range(3)]
RACE = [
    {
        "example_id": f"{level}{i}.txt", "article": f"text {i}", "question": "who?",
        "answer": "B", "options": ["a", "b", "c", "d"],
    }
    for level in ("middle", "high") for i in range(2)
]  # fmt: skip
SQUAD = [
    {
        "id": "q", "title": "t", "context": "a cat sat", "question": "who?",
        "answers": {"text": ["cat"], "answer_start": [2]},
    }
]  # fmt: skip
QQP = [{"question1": "a", "question2": "b", "label": 1, "idx": 0}]
FORMS = ("parquet", "jsonl")


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(data: Path | str) -> list[str] | None:
    default = DatasetName("x/y", None)
    return read_data(str(data), column="text", default=default, tables=True).rows


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_its_column(form: str, tmp_path: Path):
    rows = [{"text": " = A = \n"}, {"text": ""}]
    path = save(tmp_path / f"test-00000-of-00001.{form}", rows)
    assert read(path) == [" = A = \n", ""]
    assert read(tmp_path) == [" = A = \n", ""]
    with pytest.raises(InputError, match="has no column 'text'; it has page"):
        read(save(tmp_path / f"other.{form}", [{"page": "a"}]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("task", "rows", "names"),
    [
        ("mnli", GLUE, ["dev-matched"]),
        ("qqp", QQP, ["dev-matched"]),
        ("squad", SQUAD, ["dev-matched"]),
        ("race", RACE, ["dev-matched-middle", "dev-matched-high"]),
    ],
)
def test_one_file_of_every_benchmark(task, rows, names, form, tmp_path):
    path = save(tmp_path / f"validation_matched-00000-of-00001.{form}", rows)
    found = make_task(task).read_part(str(path), "dev")
    assert [part.name for part in found] == names
    assert sum(len(part.examples) for part in found) == len(rows)


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_of_splits_keeps_them_apart(form: str, tmp_path: Path):
    for split, count in (("train", 3), ("validation_matched", 1), ("validation_mismatched", 2)):
        save(tmp_path / f"{split}-00000-of-00001.{form}", GLUE[:count])
    found = make_task("mnli").read(str(tmp_path), ("train", "dev"))
    sizes = {part.name: len(part.examples) for part in found}
    assert sizes == {"train": 3, "dev-matched": 1, "dev-mismatched": 2}


@pytest.mark.parametrize("form", FORMS)
def test_several_sets_in_one_folder_are_not_added_up(form: str, tmp_path: Path):
    for config in ("all", "high"):
        save(tmp_path / config / f"validation-00000-of-00001.{form}", RACE)
    with pytest.raises(InputError, match=r"several sets \(all, high\).*give one of them, such as"):
        make_task("race").read(str(tmp_path), ("dev",))
    for data in (f"{tmp_path}:all", str(tmp_path / "all")):
        found = make_task("race").read(data, ("dev",))
        assert sum(len(part.examples) for part in found) == len(RACE)


def test_shards_are_joined_in_order_and_all_are_needed(tmp_path: Path):
    for part in range(3):
        path = tmp_path / "data" / f"test-{part:05d}-of-00003.parquet"
        save(path, [{"text": f"{part}"}])
    assert read(tmp_path) == ["0", "1", "2"]
    path.unlink()
    with pytest.raises(InputError, match=r"2 file.s. for the split test .*names say 3"):
        read(tmp_path)


def test_what_is_no_table(tmp_path: Path):
    (tmp_path / "a.txt").write_text('{"article": "one passage of RACE"}')
    assert not is_table(tmp_path / "a.txt")
    assert read_tables(tmp_path) == {}
    assert split_of(Path("dev.jsonl")) == split_of(Path("valid-00000-of-00001.parquet"))
    path = save(tmp_path / "x.parquet", [{"text": "a"}])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="x.parquet is cut off or damaged"):
        read_table(path)
    (tmp_path / "y.jsonl").write_text('{"a": 1}\n{"b": 1}\n')
    with pytest.raises(InputError, match="row 2 lacks a column of the first row"):
        read_table(tmp_path / "y.jsonl")


def test_all_that_the_library_says_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The names of the configurations stand on the second line of its error."""
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("Config name is missing.\nPlease pick one of: ['all', 'high']")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match="missing. Please pick one of: .'all', 'high'."):
        load_dataset(DatasetName("x/y", None))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (lambda: ["x" * 1_000_000] * 100, "unpacks to"),
        (lambda: ["x" * 30_000_000], "unpacks to"),
        (lambda: [0] * 1_000_000, "cells"),
    ],
    ids=["a text many times", "a long text", "numbers"],
)
def test_a_small_file_of_many_bytes_is_refused(column, message, tmp_path):
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": column()})
    pyarrow.parquet.write_table(table, path, compression="zstd")
    with pytest.raises(InputError, match=f"x.parquet .*{message}"):
        read_table(path)


def test_texts_of_any_kind_are_read(tmp_path):
    texts = ["a", None, "b" * 500, "a"]
    path = tmp_path / "x.parquet"
    columns = {
        "plain": texts,
        "large": pyarrow.array(texts, pyarrow.large_string()),
        "coded": pyarrow.array(texts).dictionary_encode(),
        "lists": [["a"], [], None, ["b", "a"]],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    table = read_table(path)
    assert [table[name] for name in ("plain", "large", "coded")] == [texts] * 3
    assert table["lists"] == [["a"], [], None, ["b", "a"]]


def test_a_text_longer_than_any_model_reads_is_refused():
    assert check_text("x" * LONGEST_INPUT, "here")
    with pytest.raises(InputError, match="here holds a text of 2,097,153 characters"):
        check_text("x" * (LONGEST_INPUT + 1), "here")
