"""What SQuAD's two metrics have in common: how answers are compared, and the form of the input.

Answers are compared after lower-casing, without punctuation, articles and superfluous white space,
and the best over the true answers counts. Source: the official evaluation scripts' rules.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

from mlm_eval.tasks.finetune.metrics import local

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


def best(figure: Figure, prediction: str, truths: Sequence[str]) -> float:
    """Return the highest figure of a normalized answer over the true ones."""
    return max(figure(prediction, truth) for truth in truths)


class AnswersMetric(local.LocalMetric):
    """A metric of answers; the form of its input is that of the Hub's metrics."""

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
                    "predictions": {**prediction, **self.more_of_predictions()},
                    "references": {"id": datasets.Value("string"), "answers": answers},
                }
            ),
        )

    def more_of_predictions(self) -> dict[str, Any]:
        """Return the fields of a prediction beside `id` and `prediction_text`."""
        return {}
