"""The base of the metrics: what `evaluate` writes goes to a folder that can be written."""

from __future__ import annotations

import tempfile
import weakref
from typing import Any

import evaluate


class LocalMetric(evaluate.Metric):
    """A metric that works offline and without a home folder."""

    def __init__(self, *args: Any, cache_dir: str | None = None, **options: Any) -> None:
        """Make the metric.

        Args:
            args: As those of `evaluate.Metric`.
            cache_dir: Where predictions are kept until `compute`; None: in a temporary folder that
                is removed with this object.
            options: As those of `evaluate.Metric`.
        """
        if cache_dir is None:
            folder = tempfile.TemporaryDirectory(prefix="mlm-eval-metric-")
            cache_dir = folder.name
            weakref.finalize(self, folder.cleanup)
        super().__init__(*args, cache_dir=cache_dir, **options)
