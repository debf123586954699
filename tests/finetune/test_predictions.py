"""Saved predictions and ensembles of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.tasks.finetune.predictions import ensemble_result, read_predictions, write_predictions
from mlm_eval.tasks.finetune.task import Answered, close_calls, digits, make_task, softmax

CHECKPOINT = {"path": "bert", "digest": "d", "num_parameters": 336_000_000, "config": {}}


def choices(*rows: tuple[int | None, list[float]]) -> list[dict[str, Any]]:
    return [
        {"id": f"q{number}", "label": label, "probabilities": shares}
        for number, (label, shares) in enumerate(rows)
    ]


def save(
    path: Path,
    records: list[dict[str, Any]],
    *,
    name: str = "dev-middle",
    task: str = "race",
    version: str = "",
    **more: Any,
) -> Path:
    role = name.partition("-")[0]
    truth = "answers" if task == "squad" else "label"
    labelled = records[0][truth] is not None
    part = Answered(name, role, labelled, version, records)
    header: dict[str, Any] = {
        "task": make_task(task), "seed": 1, "checkpoint": CHECKPOINT, "recipe": "r",
        "train_limit": None, "dev_limit": None, "test_limit": None,
        "null_threshold": None, "threshold_is_fixed": False,
    }  # fmt: skip
    return write_predictions(path, part, records, **{**header, **more})


def test_predictions_come_back(tmp_path):
    records = choices((0, [0.75, 0.25]), (1, [0.5, 0.5]))
    path = save(tmp_path / "predictions" / "dev-middle.jsonl", records, seed=5)
    found = read_predictions(path)
    assert found.records == records
    assert (found.set_name, found.header["role"], found.header["seed"]) == ("dev-middle", "dev", 5)
    first, *rest = path.read_text().splitlines()
    assert json.loads(first)["predictions_of"] == "race"
    assert len(rest) == 2
    assert [file.name for file in path.parent.iterdir()] == ["dev-middle.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"a": 1}\n', "holds no predictions of mlm-eval"),
        ("[]\n", "holds no predictions of mlm-eval"),
        ("{\n", "p.jsonl, line 1 is not JSON"),
        (None, "p.jsonl holds 1 predictions, its first line says 2; it is not whole"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    if content is None:
        save(path, choices((0, [1.0, 0.0]), (1, [0.5, 0.5])))
        content = "\n".join(path.read_text().split("\n")[:2])
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_predictions(path)


# --- the paper's ensemble ---

ONE = choices((0, [0.6, 0.4, 0.0]), (1, [0.5, 0.3, 0.2]), (2, [0.2, 0.5, 0.3]))
TWO = choices((0, [0.1, 0.5, 0.4]), (1, [0.1, 0.6, 0.3]), (2, [0.1, 0.2, 0.7]))
THREE = choices((0, [0.9, 0.0, 0.1]), (1, [0.4, 0.3, 0.3]), (2, [0.5, 0.3, 0.2]))


def test_an_ensemble_averages_probabilities(tmp_path):
    """Alone the models have 1, 2 and 1 of 3; together all three: by means, not by votes."""
    paths = [
        save(tmp_path / str(n) / "dev-middle.jsonl", records)
        for n, records in enumerate((ONE, TWO, THREE))
    ]
    alone = [
        sum(max(range(3), key=r["probabilities"].__getitem__) == r["label"] for r in records)
        for records in (ONE, TWO, THREE)
    ]
    assert alone == [1, 2, 1]
    result = ensemble_result(paths, output=tmp_path / "together")
    assert result.task == "race"
    assert result.metrics["dev-middle"] == {
        "accuracy": 1.0,
        "correct": 3,
        "total": 3,
        "close_calls": [],
    }
    assert result.metrics["dev"]["correct"] == 3
    assert result.settings["ensemble"] == 3
    assert result.checkpoint["num_parameters"] == 336_000_000
    assert [file.name for file in (tmp_path / "together").iterdir()] == ["dev-middle.jsonl"]
    written = read_predictions(tmp_path / "together" / "dev-middle.jsonl")
    assert written.records[0]["probabilities"] == pytest.approx([1.6 / 3, 0.9 / 3, 0.5 / 3])
    assert json.loads(result.to_json())["counts"] == {"dev-middle": 3}


def test_sets_of_one_role_are_pooled_and_folders_taken(tmp_path):
    high = choices((0, [0.6, 0.4]), (0, [0.3, 0.7]))
    for seed in (1, 2):
        folder = tmp_path / f"seed-{seed}" / "predictions"
        save(folder / "dev-middle.jsonl", ONE)
        save(folder / "dev-high.jsonl", high, name="dev-high")
        save(folder / "test.jsonl", choices((None, [0.4, 0.6])), name="test")
    result = ensemble_result([tmp_path / f"seed-{seed}" / "predictions" for seed in (1, 2)])
    assert result.metrics["dev-middle"]["correct"] == 1
    assert result.metrics["dev-high"]["correct"] == 1
    assert result.metrics["dev"] == {"accuracy": 0.4, "correct": 2, "total": 5}
    assert "test" not in result.metrics  # no labels
    assert result.counts == {"dev-high": 2, "dev-middle": 3, "test": 1}


@pytest.mark.parametrize(
    ("task", "names"), [("mnli", ["neutral", "contradiction"]), ("qqp", ["1", "0"])]
)
def test_what_the_server_of_glue_takes(tmp_path, task, names):
    rows = ([0.1, 0.9], [0.6, 0.4]) if task == "qqp" else ([0.1, 0.2, 0.7], [0.4, 0.3, 0.3])
    save(tmp_path / "test.jsonl", choices(*((None, row) for row in rows)), name="test", task=task)
    assert (tmp_path / "test.tsv").read_text() == (
        f"index\tprediction\nq0\t{names[0]}\nq1\t{names[1]}\n"
    )


def test_qqp_has_f1(tmp_path):
    records = choices((1, [0.2, 0.8]), (0, [0.1, 0.9]), (1, [0.3, 0.7]))
    paths = [save(tmp_path / f"{n}.jsonl", records, name="dev", task="qqp") for n in range(2)]
    figures = ensemble_result(paths).metrics["dev"]
    assert (figures["correct"], figures["f1"]) == (2, 0.8)


@pytest.mark.parametrize("name", ["/{}/outside", "../outside", "../../../outside", "a/b", "..", ""])
def test_the_name_of_a_set_leads_nowhere_else(tmp_path, name):
    """A file of predictions may come from somebody else; its set's name becomes that of a file."""
    inside = tmp_path / "given" / "deep" / "er"
    paths = [save(inside / f"{n}.jsonl", records) for n, records in enumerate((ONE, TWO))]
    for path in paths:
        first, rest = path.read_text().split("\n", 1)
        header = {**json.loads(first), "set": name.format(tmp_path)}
        path.write_text(f"{json.dumps(header)}\n{rest}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"0\.jsonl, line 1: the set .* cannot name a file"):
        ensemble_result(paths, output=tmp_path / "together" / "deep" / "er")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match="cannot name a file"):
        save(tmp_path / "new.jsonl", ONE, name=name.format(tmp_path))


def test_faulty_ensembles_are_refused(tmp_path):
    one = save(tmp_path / "1.jsonl", ONE)
    two = save(tmp_path / "2.jsonl", TWO)
    with pytest.raises(InputError, match="there is one model for dev-middle"):
        ensemble_result([one])
    with pytest.raises(InputError, match="given twice"):
        ensemble_result([one, tmp_path / "." / "1.jsonl"])
    with pytest.raises(InputError, match="needs files of predictions"):
        ensemble_result([])
    with pytest.raises(InputError, match="are not about the same examples of dev-middle"):
        ensemble_result([one, save(tmp_path / "3.jsonl", TWO[:2])])
    other_label = [{**TWO[0], "label": 1}, *TWO[1:]]
    with pytest.raises(InputError, match="are not about the same examples"):
        ensemble_result([one, save(tmp_path / "4.jsonl", other_label)])
    with pytest.raises(InputError, match="dev-high has predictions of 1 model.s., another set th"):
        ensemble_result([one, two, save(tmp_path / "5.jsonl", ONE, name="dev-high")])
    with pytest.raises(InputError, match="holds predictions of mnli, another file those of race"):
        ensemble_result([one, save(tmp_path / "6.jsonl", TWO, task="mnli")])
    with pytest.raises(InputError, match="nothing holds no predictions"):
        (tmp_path / "nothing").mkdir()
        ensemble_result([tmp_path / "nothing"])


# --- SQuAD ---


def answers(*rows: tuple[list[str] | None, float, dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"q{number}",
            "text": "",
            "answers": truths,
            "null_odds": odds,
            "n_best": [{"text": text, "probability": share} for text, share in shares.items()],
        }
        for number, (truths, odds, shares) in enumerate(rows)
    ]


def test_an_ensemble_of_squad_finds_its_own_threshold(tmp_path):
    one = answers(
        (["x"], -4.0, {"y": 0.6, "x": 0.4}), ([], 3.0, {"z": 1.0}), (["w"], 2.0, {"w": 1.0})
    )
    two = answers(
        (["x"], -2.0, {"x": 0.9, "y": 0.1}), ([], 5.0, {"z": 1.0}), (["w"], 0.0, {"w": 1.0})
    )
    saved = {"name": "dev", "task": "squad", "version": "2.0", "null_threshold": -9.0}
    paths = [save(tmp_path / f"{n}.jsonl", rows, **saved) for n, rows in enumerate((one, two))]
    result = ensemble_result(paths, output=tmp_path / "out")
    assert result.metrics["exact"] == result.metrics["f1"] == 100.0
    assert result.metrics["dev"]["null_threshold"] == 1.0
    assert result.settings["version"] == "2.0"
    texts = [r["text"] for r in read_predictions(tmp_path / "out" / "dev.jsonl").records]
    assert texts == ["x", "", "w"]
    # And what the official script reads: answers, and how likely there is none.
    official = json.loads((tmp_path / "out" / "dev.json").read_text())
    assert official == {"q0": "x", "q1": "", "q2": "w"}
    odds = json.loads((tmp_path / "out" / "dev.null_odds.json").read_text())
    assert odds == {"q0": -3.0, "q1": 4.0, "q2": 1.0}


def test_a_fixed_threshold_stays(tmp_path):
    rows = answers((["x"], 1.0, {"x": 1.0}), ([], 3.0, {"z": 1.0}))
    saved = {"name": "dev", "task": "squad", "version": "2.0", "threshold_is_fixed": True}
    paths = [save(tmp_path / f"{n}.jsonl", rows, null_threshold=0.5, **saved) for n in range(2)]
    assert ensemble_result(paths).metrics["dev"]["null_threshold"] == 0.5
    assert ensemble_result(paths).metrics["exact"] == 50.0


def test_a_test_set_alone_takes_the_mean_of_the_models_thresholds(tmp_path):
    rows = answers((None, 1.0, {"x": 1.0}), (None, 2.5, {"z": 1.0}))
    for number, threshold in enumerate((1.0, 3.0)):
        save(
            tmp_path / f"{number}.jsonl",
            rows,
            name="test",
            task="squad",
            version="2.0",
            null_threshold=threshold,
        )
    result = ensemble_result([tmp_path], output=tmp_path / "out")
    assert result.metrics == {}
    texts = [r["text"] for r in read_predictions(tmp_path / "out" / "test.jsonl").records]
    assert texts == ["x", ""]  # the mean is 2


# --- what a record holds ---


def test_probabilities_have_nine_digits():
    import numpy as np

    table = softmax(np.array([[0.0, 1.0, -200.0], [1000.0, 1000.0, 0.0]], dtype=np.float32))
    assert table.sum(axis=1).tolist() == pytest.approx([1.0, 1.0])
    assert digits(table) == [[0.268941421, 0.731058579, 3.72187099e-88], [0.5, 0.5, 0.0]]


def test_close_calls_are_told_by_the_difference_of_scores():
    import numpy as np

    scores = np.array([[5.0, 5.00009, 1.0], [5.0, 5.0002, 1.0], [-7.0, -7.0, 300.0], [2.0, 2.0, 0]])
    records = choices(*((0, row) for row in digits(softmax(scores))))
    assert close_calls(records) == ["q0", "q3"]
