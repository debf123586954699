"""The `evaluate` modules: official figures on made-up and real answers, without network or home."""

from __future__ import annotations

import json
import os
import random
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlm_eval.tasks.finetune import metrics

# --- accuracy, F1 ---


def test_accuracy_has_its_counts():
    found = metrics.load("accuracy").compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2])
    assert found == {"accuracy": 0.75, "correct": 3, "total": 4}


@pytest.mark.parametrize(
    ("predictions", "references", "f1"),
    [
        ([1, 1, 0, 0], [1, 0, 1, 0], 0.5),
        ([1, 1, 1, 0], [1, 0, 1, 1], 2 / 3),
        ([0, 0], [0, 0], 0.0),
        ([0, 0], [1, 1], 0.0),
        ([1, 1], [1, 1], 1.0),
    ],
)
def test_f1_is_of_class_1(predictions, references, f1):
    found = metrics.load("accuracy_f1").compute(predictions=predictions, references=references)
    assert found is not None
    assert found["f1"] == pytest.approx(f1)
    assert found["accuracy"] == sum(map(int.__eq__, predictions, references)) / len(references)


def test_batches_add_up():
    metric = metrics.load("accuracy", keep_in_memory=True)
    for number in range(4):
        metric.add_batch(predictions=[number, 5], references=[number, number])
    assert metric.compute() == {"accuracy": 0.5, "correct": 4, "total": 8}


# --- SQuAD: one question at a time ---

GOLD = ["the Eiffel Tower", "Eiffel Tower, Paris"]


def squad(prediction: str, answers: list[str]) -> tuple[float, float]:
    found = metrics.load("squad").compute(
        predictions=[{"id": "q", "prediction_text": prediction}],
        references=[{"id": "q", "answers": {"text": answers, "answer_start": [0] * len(answers)}}],
    )
    assert found is not None
    return found["exact_match"], found["f1"]


def squad_v2(prediction: str, answers: list[str], odds: float = 0.0) -> dict[str, Any]:
    found = metrics.load("squad_v2").compute(
        predictions=[{"id": "q", "prediction_text": prediction, "no_answer_probability": odds}],
        references=[{"id": "q", "answers": {"text": answers, "answer_start": [0] * len(answers)}}],
    )
    assert found is not None
    return dict(found)


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Eiffel Tower", GOLD, 100, 100),
        ("an EIFFEL  tower!", GOLD, 100, 100),  # case, articles, punctuation, white space
        ("Eiffel Tower in Paris", GOLD, 0, 100 * 6 / 7),  # 3 of 4 words, 3 of the second's 3
        ("tower tower", ["tower"], 0, 100 * 2 / 3),  # a repeated word counts once
        ("London", GOLD, 0, 0),
        ("", GOLD, 0, 0),
        ("twenty-one", ["twentyone"], 100, 100),  # punctuation goes without a trace
        ("twenty one", ["twenty-one"], 0, 0),
        ("a-n island", ["island"], 100, 100),  # "an" only once the hyphen is gone
        ("U.S.A.", ["USA"], 100, 100),
        ("caf\u00e9", ["cafe"], 0, 0),  # accents count
        ("\u201cyes\u201d", ["yes"], 0, 0),  # so do quotes that are not ASCII
        ("theory", ["the ory"], 0, 0),  # articles are whole words
        ("A", ["B"], 0, 0),
    ],
)
def test_official_figures_of_an_answer(prediction, answers, exact, f1):
    assert squad(prediction, answers) == pytest.approx((exact, f1))
    found = squad_v2(prediction, answers)
    assert (found["exact"], found["f1"]) == pytest.approx((exact, f1))
    assert (found["HasAns_exact"], found["HasAns_f1"]) == pytest.approx((exact, f1))
    assert "NoAns_exact" not in found


@pytest.mark.parametrize(
    ("prediction", "answers", "version_1", "version_2"),
    [
        # Where nothing is left after normalizing: 2.0 leaves such true answers out.
        ("the", ["The"], (100, 0), (100, 100)),
        ("", ["!", "word"], (100, 0), (0, 0)),
        ("an", ["The", "word"], (100, 0), (0, 0)),
        ("word", ["a", "word"], (100, 100), (100, 100)),
    ],
)
def test_the_versions_differ_in_what_is_empty(prediction, answers, version_1, version_2):
    assert squad(prediction, answers) == version_1
    found = squad_v2(prediction, answers)
    assert (found["exact"], found["f1"]) == version_2


@pytest.mark.parametrize(
    ("prediction", "answers", "odds", "exact"),
    [
        ("", [], 0.0, 100),  # silence is right
        ("word", [], 0.0, 0),
        ("the", [], 0.0, 100),  # as good as silence, by the official rules
        ("word", [], 1.5, 100),  # withdrawn: above the threshold of 1
        ("word", [], 1.0, 0),  # at the threshold it stands
        ("word", ["word"], 1.5, 0),
        ("", ["word"], 0.0, 0),
    ],
)
def test_questions_without_an_answer(prediction, answers, odds, exact):
    found = squad_v2(prediction, answers, odds)
    assert (found["exact"], found["f1"]) == (exact, exact)
    assert found["NoAns_exact" if not answers else "HasAns_exact"] == exact


def test_the_best_threshold_by_hand():
    """By odds: right, wrong on a question without answer, right, silent on one without."""
    rows = [(-2.0, "x", ["x"]), (-1.0, "y", []), (0.5, "z u", ["z"]), (3.0, "", [])]
    found = metrics.load("squad_v2").compute(
        predictions=[
            {"id": str(i), "prediction_text": text, "no_answer_probability": odds}
            for i, (odds, text, _) in enumerate(rows)
        ],
        references=[
            {"id": str(i), "answers": {"text": answers, "answer_start": [0] * len(answers)}}
            for i, (*_, answers) in enumerate(rows)
        ],
    )
    assert found is not None
    # Exact, from 2 without any answer: 3 at -2, 2 at -1, 2, 2. F1: 3, 2, 2 2/3, 2 2/3.
    assert (found["best_exact"], found["best_exact_thresh"]) == (75.0, -2.0)
    assert (found["best_f1"], found["best_f1_thresh"]) == (75.0, -2.0)
    # At the threshold of 1 the first three stand.
    assert found["exact"] == 100 * (1 + 0 + 0 + 1) / 4
    assert found["f1"] == pytest.approx(100 * (1 + 0 + 2 / 3 + 1) / 4)


def test_unpredicted_questions():
    """Version 1.1 counts them as wrong, 2.0 leaves them out."""
    references = [
        {"id": name, "answers": {"text": ["x"], "answer_start": [0]}} for name in ("a", "b")
    ]
    predictions: list[dict[str, Any]] = [{"id": "a", "prediction_text": "x"}] * 2
    # `evaluate` wants as many of each: the second one is for the same question.
    found = metrics.load("squad").compute(predictions=predictions, references=references)
    assert found == {"exact_match": 50.0, "f1": 50.0, "total": 2}
    predictions = [{**entry, "no_answer_probability": 0.0} for entry in predictions]
    found = metrics.load("squad_v2").compute(predictions=predictions, references=references)
    assert found is not None
    assert (found["exact"], found["total"]) == (100.0, 1)


# --- SQuAD: real questions, against the rules written down a second time ---


def plain(text: str) -> list[str]:
    """Return the words that count, letter by letter."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    kept = re.sub(r"\b(a|an|the)\b", " ", kept)
    return kept.split()


def plain_f1(prediction: str, truth: str, *, version: int) -> float:
    found, wanted = plain(prediction), plain(truth)
    if version == 2 and (not found or not wanted):
        return float(found == wanted)
    rest, shared = list(wanted), 0
    for word in found:
        if word in rest:
            rest.remove(word)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(found), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def plain_scores(prediction: str, truths: list[str], *, version: int) -> tuple[float, float]:
    if version == 2:
        truths = [truth for truth in truths if plain(truth)] or [""]
    exact = max(float(plain(prediction) == plain(truth)) for truth in truths)
    return exact, max(plain_f1(prediction, truth, version=version) for truth in truths)


def questions(path: Path) -> list[tuple[str, list[str]]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return [
        (entry["id"], [answer["text"] for answer in entry["answers"]])
        for article in content["data"]
        for paragraph in article["paragraphs"]
        for entry in paragraph["qas"]
    ]


def perturbed(answers: list[str], chance: random.Random) -> str:
    """Return an answer that is right, nearly right, wrong or empty."""
    text = chance.choice(answers) if answers else chance.choice(["", "the", "some answer", "1066"])
    words = text.split()
    kind = chance.randrange(8)
    if kind == 0:
        return ""
    if kind == 1:
        return f"The {text.upper()}."
    if kind == 2 and words:
        return " ".join(words[1:])
    if kind == 3:
        return f"{text}, and an {text}"
    if kind == 4:
        return " ".join(reversed(words))
    if kind == 5:
        return text.replace(" ", "-")
    return text


def asked(
    questions: list[tuple[str, list[str]]], predictions: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return (
        [
            {"id": name, "prediction_text": text}
            for (name, _), text in zip(questions, predictions, strict=True)
        ],
        [
            {"id": name, "answers": {"text": answers, "answer_start": [0] * len(answers)}}
            for name, answers in questions
        ],
    )


@pytest.mark.realdata
def test_perturbed_answers_of_squad_1(shared_data):
    entries = questions(shared_data / "squad" / "xquad.en.json")
    chance = random.Random(1)
    predictions = [perturbed(answers, chance) for _, answers in entries]
    given, references = asked(entries, predictions)
    found = metrics.load("squad").compute(predictions=given, references=references)
    scores = [
        plain_scores(text, answers, version=1)
        for text, (_, answers) in zip(predictions, entries, strict=True)
    ]
    assert found is not None
    assert found["total"] == 1190
    assert 30 < found["exact_match"] < 70
    assert found["exact_match"] == pytest.approx(100 * sum(e for e, _ in scores) / 1190)
    assert found["f1"] == pytest.approx(100 * sum(f for _, f in scores) / 1190)


def plain_sweep(
    scores: list[float],
    odds: list[float],
    predictions: list[str],
    questions: list[tuple[str, list[str]]],
) -> tuple[float, float]:
    """Return the best percentage over all thresholds, each tried by itself, and its threshold.

    As in the official script an answer to a question without one is wrong unless it is empty.
    """
    found = []
    for threshold in (0.0, *odds):
        none_at_all = threshold == 0.0
        points = [
            float(not answers)
            if none_at_all or o > threshold
            else (score if answers else float(not text))
            for score, o, text, (_, answers) in zip(
                scores, odds, predictions, questions, strict=True
            )
        ]
        found.append((100 * sum(points) / len(points), -threshold))
    best, threshold = max(found)
    return best, -threshold


@pytest.mark.realdata
def test_perturbed_answers_of_squad_2(shared_data):
    entries = questions(shared_data / "squad" / "squad2.0_cs224n_dev-v2.0.json")
    chance = random.Random(2)
    predictions = [perturbed(answers, chance) for _, answers in entries]
    odds = [chance.gauss(-1 if answers else 1, 2) for _, answers in entries]  # know a little
    given, references = asked(entries, predictions)
    given = [{**entry, "no_answer_probability": o} for entry, o in zip(given, odds, strict=True)]
    found = metrics.load("squad_v2").compute(
        predictions=given, references=references, no_answer_threshold=0.5
    )
    assert found is not None
    scores = [
        plain_scores(text, answers, version=2)
        for text, (_, answers) in zip(predictions, entries, strict=True)
    ]

    def at(threshold: float, which: int, has_answer: bool | None = None) -> float:
        values = [
            float(not answers) if o > threshold else score[which]
            for score, o, (_, answers) in zip(scores, odds, entries, strict=True)
            if has_answer in (None, bool(answers))
        ]
        return 100 * sum(values) / len(values)

    for which, name in enumerate(("exact", "f1")):
        assert found[name] == pytest.approx(at(0.5, which))
        assert found[f"HasAns_{name}"] == pytest.approx(at(0.5, which, True))
        assert found[f"NoAns_{name}"] == pytest.approx(at(0.5, which, False))
    assert (found["total"], found["HasAns_total"], found["NoAns_total"]) == (6078, 2910, 3168)
    some = slice(2000, 3000)
    found = metrics.load("squad_v2").compute(predictions=given[some], references=references[some])
    assert found is not None
    for which, name in enumerate(("exact", "f1")):
        figures = [score[which] for score in scores[some]]
        expected = plain_sweep(figures, odds[some], predictions[some], entries[some])
        assert (found[f"best_{name}"], found[f"best_{name}_thresh"]) == pytest.approx(expected)


# --- where they work ---

OFFLINE = """
from mlm_eval.tasks.finetune import metrics
print(metrics.load("accuracy").compute(predictions=[1, 0], references=[1, 1]))
print(metrics.LocalMetric("squad").compute(
    predictions=[{"id": "1", "prediction_text": "x"}],
    references=[{"id": "1", "answers": {"text": ["x"], "answer_start": [3]}}],
))
"""


def test_metrics_work_offline_and_without_a_home(tmp_path):
    """Nothing is fetched, and nothing is written but in the folder for temporary files."""
    environment = {
        **os.environ,
        "HOME": "/dev/null/nobody",
        "HF_HOME": "/dev/null/nobody",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(tmp_path),
    }
    environment.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "{'accuracy': 0.5, 'correct': 1, 'total': 2}",
        "{'exact_match': 100.0, 'f1': 100.0, 'total': 1}",
    ]
    assert not list(tmp_path.glob("mlm-eval-metric-*"))  # they went with their metrics


def test_a_cache_folder_can_be_chosen(tmp_path):
    metric = metrics.load("accuracy", cache_dir=str(tmp_path), experiment_id="mine")
    metric.add_batch(predictions=[1], references=[1])
    assert [file for file in tmp_path.rglob("*mine*.arrow")]
    assert metric.compute() == {"accuracy": 1.0, "correct": 1, "total": 1}


def test_evaluate_finds_a_module_by_its_path(tmp_path, monkeypatch):
    """`evaluate.load` with a file of ours: for those who use that library themselves."""
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    loaded = evaluate.load(str(metrics.__file__), "accuracy", cache_dir=str(tmp_path))
    assert loaded.compute(predictions=[1, 1], references=[1, 0])["accuracy"] == 0.5


def test_every_metric_is_found():
    for name in metrics.METRICS:
        assert metrics.load(name).config_name == name
