"""The tasks' figures: plain functions, and one `evaluate` module around them without a network.

    from mlm_eval.tasks.finetune import metrics
    metrics.load("squad_v2").compute(predictions=[...], references=[...])

`evaluate.load("accuracy")` fetches a script from the Hub and keeps its data below the home folder.
This module comes with the package and keeps its data in a folder of its own that goes with the
object; `evaluate.load` takes its path, too: `evaluate.load(metrics.__file__, "squad_v2")`.

Answers are compared after lower-casing, without punctuation, articles and superfluous white space,
and the best over the true answers counts. Source: the official SQuAD evaluation scripts' rules.
"""

from __future__ import annotations

import re
import string
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np

from mlm_eval.checkpoints.folders.unfinished import note_unfinished

# ---- classes -----------------------------------------------------------------------------------


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
    """Return the share of the predictions that equal their references, with its counts."""
    correct = int((np.asarray(predictions) == np.asarray(references)).sum())
    return {"accuracy": correct / len(references), "correct": correct, "total": len(references)}


def accuracy_f1(predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
    """Return the accuracy with its counts, and the F1 of class 1: 0 where there is no class 1.

    Source: GLUE's pair of figures for QQP.
    """
    predicted, true = np.asarray(predictions) == 1, np.asarray(references) == 1
    hits = int((predicted & true).sum())
    marked = int(predicted.sum()) + int(true.sum())
    f1 = 2 * hits / marked if marked else 0.0
    return {**accuracy(predictions, references), "f1": f1}


# ---- answers -----------------------------------------------------------------------------------

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(answer: str) -> str:
    """Return an answer as it is compared; the steps' order matters: "a-n" becomes an article."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def answer_exact(prediction: str, truth: str) -> float:
    """Return 1 where two normalized answers are the same, else 0."""
    return float(prediction == truth)


def answer_f1(prediction: str, truth: str) -> float:
    """Return the F1 of two normalized answers' words: 0 where they share none."""
    found, wanted = prediction.split(), truth.split()
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def answer_f1_or_both_empty(prediction: str, truth: str) -> float:
    """Return the F1 of two normalized answers' words: 1 where both have none."""
    return answer_f1(prediction, truth) if prediction and truth else float(prediction == truth)


def best_over(figure: Callable[[str, str], float], prediction: str, truths: Sequence[str]) -> float:
    """Return the highest figure of a normalized answer over the true ones."""
    return max(figure(prediction, truth) for truth in truths)


def squad(
    predictions: Sequence[dict[str, Any]], references: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return SQuAD 1.1's `exact_match` and `f1`, percentages; no prediction counts 0.

    Where nothing is left of an answer after normalizing, two such answers match, but their F1 is 0.
    """
    given = {entry["id"]: normalize_answer(entry["prediction_text"]) for entry in predictions}
    matches = score = 0.0
    for question in references:
        if question["id"] in given:
            truths = [normalize_answer(text) for text in question["answers"]["text"]]
            matches += best_over(answer_exact, given[question["id"]], truths)
            score += best_over(answer_f1, given[question["id"]], truths)
    total = len(references)
    return {"exact_match": 100 * matches / total, "f1": 100 * score / total, "total": total}


def squad_v2(
    predictions: Sequence[dict[str, Any]],
    references: Sequence[dict[str, Any]],
    no_answer_threshold: float = 1.0,
) -> dict[str, Any]:
    """Return SQuAD 2.0's percentages, where a question may have no answer.

    Also those of the questions with and without an answer, and the best thresholds.
    `no_answer_probability` may be any number that is higher where an answer is less likely. Above
    `no_answer_threshold` the prediction counts as "no answer"; `best_exact` and `best_f1` are the
    figures at the thresholds `..._thresh` that suit these questions best.
    """
    known = {entry["id"]: entry for entry in predictions}
    rows = [
        _Question.of(known[question["id"]], question["answers"]["text"])
        for question in references
        if question["id"] in known
    ]
    result = _figures("", rows, no_answer_threshold)
    for name, has_answer in (("HasAns_", True), ("NoAns_", False)):
        part = [row for row in rows if row.has_answer == has_answer]
        if part:
            result |= _figures(name, part, no_answer_threshold)
    for name in ("exact", "f1"):
        score, threshold = _best_threshold(rows, name)
        result |= {f"best_{name}": score, f"best_{name}_thresh": threshold}
    return result


@dataclass(frozen=True, slots=True)
class _Question:
    """A question's figures before any threshold."""

    exact: float
    f1: float
    has_answer: bool
    answered: bool
    odds: float

    @classmethod
    def of(cls, prediction: dict[str, Any], truths: Sequence[str]) -> _Question:
        text = normalize_answer(prediction["prediction_text"])
        # A true answer of which nothing is left is none; and without any, silence is right.
        wanted = [left for truth in truths if (left := normalize_answer(truth))] or [""]
        return cls(
            exact=best_over(answer_exact, text, wanted),
            f1=best_over(answer_f1_or_both_empty, text, wanted),
            has_answer=bool(truths),
            answered=bool(prediction["prediction_text"]),
            odds=prediction["no_answer_probability"],
        )

    def at(self, name: str, threshold: float) -> float:
        """Return a figure where the answer is withdrawn above a threshold."""
        if self.odds > threshold:
            return float(not self.has_answer)
        return float(getattr(self, name))


def _figures(prefix: str, rows: Sequence[_Question], threshold: float) -> dict[str, Any]:
    total = len(rows)
    found: dict[str, Any] = {
        f"{prefix}{name}": 100 * sum(row.at(name, threshold) for row in rows) / total
        for name in ("exact", "f1")
    }
    return {**found, f"{prefix}total": total}


def _best_threshold(rows: Sequence[_Question], name: str) -> tuple[float, float]:
    """Return the highest percentage that a threshold reaches, and that threshold.

    Starts with no question answered, all right where there is no answer, and lets them in by their
    odds. An answer to a question that has none costs its point, unless it is empty. The first of
    equal thresholds is taken, and 0 where nothing is gained, as in the official script.
    """
    score = float(sum(not row.has_answer for row in rows))
    best_score, threshold = score, 0.0
    for row in sorted(rows, key=lambda row: row.odds):
        score += getattr(row, name) if row.has_answer else -float(row.answered)
        if score > best_score:
            best_score, threshold = score, row.odds
    return 100 * best_score / len(rows), threshold


# ---- the `evaluate` module ---------------------------------------------------------------------

CLASSES = {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
PREDICTION = {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")}
ANSWERS = {
    "id": datasets.Value("string"),
    "answers": {
        "text": datasets.List(datasets.Value("string")),
        "answer_start": datasets.List(datasets.Value("int32")),
    },
}
ODDS = {"no_answer_probability": datasets.Value("float64")}

METRICS: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "accuracy": (accuracy, CLASSES),
    "accuracy_f1": (accuracy_f1, CLASSES),
    "squad": (squad, {"predictions": PREDICTION, "references": ANSWERS}),
    "squad_v2": (squad_v2, {"predictions": PREDICTION | ODDS, "references": ANSWERS}),
}
"""Function and form of the input of each metric; that of the answers is the Hub's."""


class LocalMetric(evaluate.Metric):
    """A metric of this module, by its name, that works offline and without a home folder."""

    def __init__(
        self, config_name: str, *args: Any, cache_dir: str | None = None, **options: Any
    ) -> None:
        """Make the metric.

        Args:
            config_name: One of `METRICS`.
            args: See `evaluate.Metric`.
            cache_dir: Where predictions are kept until `compute`; None: in a temporary folder that
                is removed with this object.
            options: See `evaluate.Metric`.
        """
        if cache_dir is None:
            folder = tempfile.TemporaryDirectory(prefix="mlm-eval-metric-")
            cache_dir = folder.name
            weakref.finalize(self, folder.cleanup)
            note_unfinished(Path(cache_dir))
        super().__init__(config_name, *args, cache_dir=cache_dir, **options)

    def _info(self) -> Any:
        function, features = METRICS[self.config_name]
        return evaluate.MetricInfo(
            description=function.__doc__,
            citation="",
            inputs_description="predictions, references: classes in order, or answers by id",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        return METRICS[self.config_name][0](predictions, references, **options)


def compute(
    name: str, predictions: Sequence[Any], references: Sequence[Any], **options: Any
) -> dict[str, Any]:
    """Return what a metric of `METRICS` makes of predictions and references."""
    found = load(name).compute(predictions=predictions, references=references, **options)
    assert found is not None
    return dict(found)


def load(name: str, **options: Any) -> LocalMetric:
    """Return a metric by name.

    Args:
        name: One of `METRICS`.
        options: Options of `evaluate.Metric`, such as `cache_dir` and `keep_in_memory`.
    """
    return LocalMetric(name, **options)
