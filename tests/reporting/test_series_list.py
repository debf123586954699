"""The list of a series: what is one, where its records are, how far each model was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.paths import SAMPLES

import mlm_eval
from mlm_eval.reporting.results import checkpoint_record, consumed
from mlm_eval.reporting.series_list import read_series, series_records

ENTRY = {"checkpoint": "run/iter_0000001", "iteration": 1, "record": "F.iter_0000001.json"}


def test_a_list_is_known_by_its_entries(tmp_path: Path):
    path = tmp_path / "F.json"
    path.write_text(json.dumps({"task": "lambada", "series": [ENTRY]}))
    found = read_series(path)
    assert found is not None
    assert series_records(path, found) == [tmp_path / "F.iter_0000001.json"]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        *((name, True) for name in ("x" * 255, ".F.json", "..F.json", "a\\b", "é" * 127, "\udcff")),
        *(
            (name, False)
            for name in ("x" * 256, "é" * 128, "", ".", "..", "a/b", "/a", "a/", "a\0")
        ),
        ("\ud800", False),
    ],
)
def test_a_record_has_any_name_that_a_file_beside_the_list_can_have(tmp_path, name, is_one):
    path = tmp_path / "F.json"
    path.write_text(json.dumps({"task": "lambada", "series": [{**ENTRY, "record": name}]}))
    assert (read_series(path) is not None) == is_one


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 9999,
        '{"task": "lambada", "metrics": {}}',
        '{"task": "lambada", "series": 3}',
        '{"task": "lambada", "series": [{"checkpoint": "a", "record": "b"}]}',
        '{"series": []}',
    ],
)
def test_nothing_else_is_a_list(tmp_path: Path, content: str):
    path = tmp_path / "F.json"
    assert read_series(path) is None
    path.write_text(content)
    assert read_series(path) is None


def test_a_record_says_how_far_the_model_was_trained():
    record = checkpoint_record(mlm_eval.open_checkpoint(SAMPLES / "gpt"))
    assert record["iteration"] == 3000
    assert record["consumed_samples"] == 24_000 and record["consumed_tokens"] == 24_000 * 256


@pytest.mark.parametrize(
    ("args", "samples", "tokens"),
    [
        ({}, None, None),
        ({"consumed_train_samples": 0, "seq_length": 64}, None, None),
        ({"consumed_train_samples": 5}, 5, None),
        ({"consumed_train_samples": True, "seq_length": 64}, None, None),
        ({"consumed_train_samples": "5", "seq_length": 64}, None, None),
        ({"consumed_train_samples": 5, "seq_length": "64"}, 5, None),
    ],
)
def test_what_args_do_not_say_is_unknown(args, samples, tokens):
    assert consumed(args) == {"consumed_samples": samples, "consumed_tokens": tokens}
