"""Exact match and F1 of answers, by the rules of SQuAD's two official evaluation scripts.

Both compare answers after lower-casing, without punctuation, articles and superfluous white space,
and take the best over the true answers. They differ in what is empty: version 2.0 leaves out true
answers of which nothing is left, asks for an empty prediction where there is no answer at all, and
finds two empty answers to agree; version 1.1's F1 of them is 0.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import datasets  # type: ignore[import-untyped]
import evaluate  # type: ignore[import-untyped]

from mlm_eval.tasks.metrics.local import LocalMetric

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)

Figure = Callable[[str, str], float]


def normalize(answer: str) -> str:
    """Return an answer as it is compared; the steps' order matters: "a-n" becomes an article."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def exact(prediction: str, truth: str) -> float:
    """Return 1 where two normalized answers are the same, else 0."""
    return float(prediction == truth)


def f1(prediction: str, truth: str) -> float:
    """Return the F1 of two normalized answers' words: 0 where they share none."""
    found, wanted = prediction.split(), truth.split()
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def f1_or_both_empty(prediction: str, truth: str) -> float:
    """Return the F1 of two normalized answers' words: 1 where both have none."""
    return f1(prediction, truth) if prediction and truth else float(prediction == truth)


def best(figure: Figure, prediction: str, truths: Sequence[str]) -> float:
    """Return the highest figure of a normalized answer over the true ones."""
    return max(figure(prediction, truth) for truth in truths)


class _Answers(LocalMetric):
    """What the two versions have in common: the form of the input, which is the Hub's."""

    def _info(self) -> Any:
        prediction = {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")}
        answers = {
            "text": datasets.List(datasets.Value("string")),
            "answer_start": datasets.List(datasets.Value("int32")),
        }
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: one for each question, found by id",
            features=datasets.Features(
                {
                    "predictions": {**prediction, **self._more_of_predictions()},
                    "references": {"id": datasets.Value("string"), "answers": answers},
                }
            ),
        )

    def _more_of_predictions(self) -> dict[str, Any]:
        return {}


class Squad(_Answers):
    """SQuAD 1.1: `exact_match` and `f1`, percentages; a question without a prediction counts 0."""

    def _compute(
        self, predictions: list[dict[str, Any]], references: list[dict[str, Any]]
    ) -> dict[str, Any]:
        answers = {entry["id"]: normalize(entry["prediction_text"]) for entry in predictions}
        matches = score = 0.0
        for question in references:
            if question["id"] in answers:
                truths = [normalize(text) for text in question["answers"]["text"]]
                matches += best(exact, answers[question["id"]], truths)
                score += best(f1, answers[question["id"]], truths)
        total = len(references)
        return {"exact_match": 100 * matches / total, "f1": 100 * score / total, "total": total}


class SquadV2(_Answers):
    """SQuAD 2.0: percentages, also of questions with and without an answer, and best thresholds.

    `no_answer_probability` may be any number that is higher where an answer is less likely. Above
    `no_answer_threshold` the prediction counts as "no answer"; `best_exact` and `best_f1` are the
    figures at the thresholds `..._thresh` that suit these questions best.
    """

    def _more_of_predictions(self) -> dict[str, Any]:
        return {"no_answer_probability": datasets.Value("float64")}

    def _compute(
        self,
        predictions: list[dict[str, Any]],
        references: list[dict[str, Any]],
        no_answer_threshold: float = 1.0,
    ) -> dict[str, Any]:
        known = {entry["id"]: entry for entry in predictions}
        rows = [
            _Row.of(known[question["id"]], question["answers"]["text"])
            for question in references
            if question["id"] in known
        ]
        result = _figures("", rows, no_answer_threshold)
        for name, has_answer in (("HasAns_", True), ("NoAns_", False)):
            part = [row for row in rows if row.has_answer == has_answer]
            if part:
                result |= _figures(name, part, no_answer_threshold)
        for name in ("exact", "f1"):
            score, threshold = best_threshold(rows, name)
            result |= {f"best_{name}": score, f"best_{name}_thresh": threshold}
        return result


class _Row:
    """A question's figures before any threshold."""

    __slots__ = ("answered", "exact", "f1", "has_answer", "odds")

    @classmethod
    def of(cls, prediction: dict[str, Any], truths: Sequence[str]) -> _Row:
        row = cls()
        text = normalize(prediction["prediction_text"])
        # A true answer of which nothing is left is none; and without any, silence is right.
        wanted = [left for truth in truths if (left := normalize(truth))] or [""]
        row.exact = best(exact, text, wanted)
        row.f1 = best(f1_or_both_empty, text, wanted)
        row.has_answer = bool(truths)
        row.answered = bool(prediction["prediction_text"])
        row.odds = prediction["no_answer_probability"]
        return row

    def at(self, name: str, threshold: float) -> float:
        """Return a figure where the answer is withdrawn above a threshold."""
        if self.odds > threshold:
            return float(not self.has_answer)
        return float(getattr(self, name))


def _figures(prefix: str, rows: Sequence[_Row], threshold: float) -> dict[str, Any]:
    total = len(rows)
    found: dict[str, Any] = {
        f"{prefix}{name}": 100 * sum(row.at(name, threshold) for row in rows) / total
        for name in ("exact", "f1")
    }
    return {**found, f"{prefix}total": total}


def best_threshold(rows: Sequence[_Row], name: str) -> tuple[float, float]:
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
