"""A real BERT learns real questions by heart: RACE middle on two tensor-parallel ranks, bfloat16.

Minutes on two cores, so outside the default run:

    pytest -m "slow and realdata" tests/finetune/test_overfit.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.folders.real_race import first_passages
from support.ranks import run_ranks

from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import load_tokenizer
from mlm_eval.engine.engine import Engine
from mlm_eval.tasks.finetune.run import finetune
from mlm_eval.tasks.finetune.settings import FinetuneOptions

pytest_plugins = ["support.folders.minilm_fixtures"]

QUESTIONS = 64
EPOCHS = 12


@pytest.fixture
def passages(shared_data: Path, tmp_path: Path) -> Path:
    """The first passages of train/middle, more than enough for the questions."""
    return first_passages(shared_data, "train", tmp_path / "middle", count=QUESTIONS)


def train_on_a_rank(checkpoint: Path, words: Path, passages: Path, output: Path) -> dict[str, Any]:
    """Return the metrics of a run that is evaluated on what it was trained on."""
    options = FinetuneOptions(
        output_dir=output,
        train=(str(passages),),
        dev=(str(passages),),
        train_limit=QUESTIONS,
        dev_limit=QUESTIONS,
        overrides={
            "epochs": EPOCHS,
            "lr": 1.5e-4,
            "lr_decay": "linear",
            "global_batch": 8,
            "warmup": 0.1,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_length": 128,
        },
        micro_batch=8,
        dtype="bfloat16",
    )
    result = finetune(
        "race",
        open_checkpoint(checkpoint),
        options,
        tokenizer=load_tokenizer(directory=words),
        load=lambda c, dtype: Engine.load(c, tp=2, dp=1, dtype=dtype, device="cpu"),
    )
    return result.metrics


@pytest.mark.slow
@pytest.mark.realdata
def test_real_questions_are_learnt_by_heart(
    minilm: Path,
    megatron: Path,
    passages: Path,
    tmp_path: Path,
) -> None:
    arguments = (train_on_a_rank, megatron, minilm, passages, tmp_path / "out")
    for metrics in run_ranks(2, *arguments, seconds=3600):
        assert metrics["dev"]["total"] == QUESTIONS
        assert metrics["dev"]["accuracy"] >= 0.95
