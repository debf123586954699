"""The options of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.dtypes import DTYPE_CHOICES, DTYPE_NAMES
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.options import DATA, RUN, again, given, option
from mlm_eval.tasks.finetune.recipe import Recipe
from mlm_eval.training.settings import (
    Hyperparameters,
    RunSettings,
    TrainSettings,
    check_options,
    values_of,
)

DEFAULT_SEED = 1234
"""Megatron's."""

_INSTEAD = "(repeatable; file, folder or `datasets` name)"


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of `--seeds 1,2,3`.

    Raises:
        ValueError: One of them is no number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError("must be comma-separated numbers, such as 1,2,3") from None


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunSettings):
    """What to fine-tune on, and how."""

    output_dir: Path = option("Folder for the result, the model, the states and the logs.")
    data: str | None = option(
        "The benchmark's folder, or a `datasets` name; or give --train and --dev.", None
    )
    """The folder as published; RACE also an archive of it, or a folder of archives."""
    recipe: str | None = option("Name of a recipe, or a TOML file.", None)
    """None: the paper's for its smallest model."""
    overrides: Mapping[str, Any] = given(Recipe, "the recipe's")
    """Fields of the recipe that are given here instead."""
    seeds: Sequence[int] = option(
        "One run for each, such as 1,2,3,4,5.",
        (DEFAULT_SEED,),
        parse=parse_seeds,
        written=str(DEFAULT_SEED),
    )
    """The record has each run and the median."""
    resume: bool = option("Resume from the last saved state.", False, flag="--resume")
    eval_only: bool = option(
        "Train nothing: evaluate a fine-tuned checkpoint.", False, flag="--eval-only"
    )
    train: Sequence[str] = option(
        f"Data to train on {_INSTEAD}.", (), shown="what --data has", group=DATA
    )
    dev: Sequence[str] = option(
        f"Data to evaluate on {_INSTEAD}.", (), shown="what --data has", group=DATA
    )
    test: Sequence[str] = option(
        f"Data to test at the end {_INSTEAD}.", (), shown="what --data has", group=DATA
    )
    train_limit: int | None = option(
        "First N examples to train on.", None, least=1, shown="all", group=DATA
    )
    """All training sets together."""
    dev_limit: int | None = option(
        "First N examples of each dev set.", None, least=1, shown="all", group=DATA
    )
    test_limit: int | None = option(
        "First N examples of each test set.", None, least=1, shown="all", group=DATA
    )
    dtype: str = again(
        RunSettings,
        "dtype",
        help="Dtype of the matrix products: auto (bfloat16 on CUDA, float32 on the CPU), "
        f"{DTYPE_CHOICES}. With --eval-only that of the evaluation: auto on CUDA is the "
        "checkpoint's.",
    )
    eval_dtype: str = option(
        "Dtype of the matrix products of evaluations while training: auto (--dtype on CUDA, "
        f"float32 on the CPU), {DTYPE_CHOICES}.",
        "auto",
        choices=("auto", *DTYPE_NAMES),
        group=RUN,
    )

    def __post_init__(self) -> None:
        """Check what can be checked before any data is read.

        Raises:
            InputError: An option is impossible.
        """
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(
                f"--seeds {','.join(map(str, self.seeds))}: give different, comma-separated "
                f"numbers from 0 on"
            )
        check_options(type(self), vars(self))
        check_options(Recipe, self.overrides)

    def train_settings(self, recipe: Recipe, *, seed: int, dtype: str) -> TrainSettings:
        """Return the trainer's settings for one run."""
        given = values_of(Hyperparameters, recipe) | values_of(RunSettings, self)
        return TrainSettings(**{**given, "seed": seed, "dtype": dtype})
