"""Accuracy and F1 of a yes-or-no question, GLUE's pair of figures for QQP."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlm_eval.tasks.finetune.metrics import accuracy


class AccuracyF1(accuracy.Accuracy):
    """Accuracy with its counts, and the F1 of class 1: 0 where there is no class 1 at all."""

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        predicted, true = np.asarray(predictions) == 1, np.asarray(references) == 1
        hits = int((predicted & true).sum())
        marked = int(predicted.sum()) + int(true.sum())
        f1 = 2 * hits / marked if marked else 0.0
        return {**super()._compute(predictions, references), "f1": f1}
