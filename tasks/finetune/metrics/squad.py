"""SQuAD 1.1's exact match and F1.

Where nothing is left of an answer after normalizing, two such answers match, but their F1 is 0.
"""

from __future__ import annotations

from typing import Any

from mlm_eval.tasks.finetune.metrics import answers


class Squad(answers.AnswersMetric):
    """SQuAD 1.1: `exact_match` and `f1`, percentages; a question without a prediction counts 0."""

    def _compute(
        self, predictions: list[dict[str, Any]], references: list[dict[str, Any]]
    ) -> dict[str, Any]:
        given = {entry["id"]: answers.normalize(entry["prediction_text"]) for entry in predictions}
        matches = score = 0.0
        for question in references:
            if question["id"] in given:
                truths = [answers.normalize(text) for text in question["answers"]["text"]]
                matches += answers.best(answers.exact, given[question["id"]], truths)
                score += answers.best(answers.f1, given[question["id"]], truths)
        total = len(references)
        return {"exact_match": 100 * matches / total, "f1": 100 * score / total, "total": total}
