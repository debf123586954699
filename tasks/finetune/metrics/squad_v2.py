"""SQuAD 2.0's exact match and F1, where a question may have no answer.

True answers of which nothing is left after normalizing are left out; where there is no answer at
all, silence is right; and two empty answers agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from mlm_eval.tasks.finetune.metrics import answers


def f1_or_both_empty(prediction: str, truth: str) -> float:
    """Return the F1 of two normalized answers' words: 1 where both have none."""
    return answers.f1(prediction, truth) if prediction and truth else float(prediction == truth)


class SquadV2(answers.AnswersMetric):
    """SQuAD 2.0: percentages, also of questions with and without an answer, and best thresholds.

    `no_answer_probability` may be any number that is higher where an answer is less likely. Above
    `no_answer_threshold` the prediction counts as "no answer"; `best_exact` and `best_f1` are the
    figures at the thresholds `..._thresh` that suit these questions best.
    """

    def more_of_predictions(self) -> dict[str, Any]:
        """See `AnswersMetric.more_of_predictions`."""
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


@dataclass(frozen=True, slots=True)
class _Row:
    """A question's figures before any threshold."""

    exact: float
    f1: float
    has_answer: bool
    answered: bool
    odds: float

    @classmethod
    def of(cls, prediction: dict[str, Any], truths: Sequence[str]) -> _Row:
        text = answers.normalize(prediction["prediction_text"])
        # A true answer of which nothing is left is none; and without any, silence is right.
        wanted = [left for truth in truths if (left := answers.normalize(truth))] or [""]
        return cls(
            exact=answers.best(answers.exact, text, wanted),
            f1=answers.best(f1_or_both_empty, text, wanted),
            has_answer=bool(truths),
            answered=bool(prediction["prediction_text"]),
            odds=prediction["no_answer_probability"],
        )

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
