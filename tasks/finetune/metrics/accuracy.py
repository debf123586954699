"""Accuracy: the share of right predictions, with the counts it is made of."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from mlm_eval.tasks.finetune.metrics import local


class Accuracy(local.LocalMetric):
    """Share of the predictions that equal their references: `accuracy`, `correct`, `total`."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="Share of the predictions that equal their references.",
            citation="",
            inputs_description="predictions, references: class numbers, in the same order",
            features=datasets.Features(
                {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        correct = int((np.asarray(predictions) == np.asarray(references)).sum())
        total = len(references)
        return {"accuracy": correct / total, "correct": correct, "total": total}
