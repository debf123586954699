"""The tasks' metrics, as modules of the `evaluate` library that need no network.

    from mlm_eval.tasks import metrics
    metrics.load("squad_v2").compute(predictions=[...], references=[...])

`evaluate.load("accuracy")` fetches a script from the Hub and keeps its data below the home folder.
These come with the package and keep theirs in a folder of their own that goes with the object.
Each file has one metric, and `evaluate.load` takes the file's path too; for that the modules import
modules, not classes, which it would take for the metric.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlm_eval.tasks.finetune.metrics.local import LocalMetric

METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "accuracy_f1": ("accuracy_f1", "AccuracyF1"),
    "squad": ("squad", "Squad"),
    "squad_v2": ("squad_v2", "SquadV2"),
}


def load(name: str, **options: Any) -> LocalMetric:
    """Return a metric by name.

    Args:
        name: One of `METRICS`.
        options: Those of `evaluate.Metric`, such as `cache_dir` and `keep_in_memory`.
    """
    module, kind = METRICS[name]
    metric: LocalMetric = getattr(import_module(f"{__name__}.{module}"), kind)(**options)
    return metric
