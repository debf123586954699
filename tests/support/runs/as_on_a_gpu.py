"""Evaluation on the CPU by the code that GPUs run, for what is said of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from mlm_eval.engine.products import float32_products
from mlm_eval.model import attention, mamba, tensor_parallel


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Leave out what the CPU does its own way: oneDNN's operators, scans that stay in the cache."""
    with float32_products():  # what it measures at its first use is not of the evaluation
        pass
    with (
        mock.patch.object(tensor_parallel, "onednn_takes", lambda *_: False),
        mock.patch.object(attention, "onednn_takes", lambda *_: False),
        mock.patch.object(mamba, "takes_turns", lambda *_: False),
    ):
        yield
