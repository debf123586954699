"""What a fine-tuning is set to: its recipe, a TOML file of hyperparameters, and its options.

A recipe says how a model is fine-tuned for a task; the paper's recipes ship with this.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.dtypes import DTYPE_CHOICES, DTYPE_NAMES
from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.text_file import read_toml
from mlm_eval.options import DATA, FOLDER, RUN, TASK, again, given, option
from mlm_eval.training.settings import (
    Hyperparameters,
    RunSettings,
    TrainSettings,
    check_options,
    values_of,
)

# ---- recipes -----------------------------------------------------------------------------------


squad_option = partial(option, group=TASK, only=("squad",))


@dataclass(frozen=True, kw_only=True)
class Recipe(Hyperparameters):
    """The hyperparameters of one task for one model."""

    task: str
    lr: float = again(Hyperparameters, "lr", default=MISSING)
    epochs: int = again(Hyperparameters, "epochs", default=MISSING)
    global_batch: int = again(Hyperparameters, "global_batch", default=MISSING)
    """One sample of RACE has four rows."""
    weight_decay: float = again(Hyperparameters, "weight_decay", default=0.1)
    seq_length: int = option("Longest row, in tokens.", 512, least=8)
    max_qa_length: int = option(
        "Longest question with its answer, in tokens.", 128, least=1, group=TASK, only=("race",)
    )
    doc_stride: int = squad_option(
        "Tokens from the start of one window of a long passage to the start of the next.",
        128,
        least=1,
    )
    max_query_length: int = squad_option("Longest question, in tokens.", 64, least=1)
    max_answer_length: int = squad_option("Longest answer, in tokens.", 30, least=1)
    n_best: int = squad_option("Answers kept for each question.", 20, least=1)
    null_threshold: float | None = squad_option(
        "SQuAD 2.0: a question has no answer if the null score is ahead of the best answer's by "
        "more than this. If the recipe has none, it is found on the dev sets.",
        None,
    )
    """None: the value with the best F1 on the dev set, as the official script finds it."""


RECIPES = Path(__file__).parent / "recipes"
FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship."""
    return sorted(file.name.removesuffix(".toml") for file in RECIPES.iterdir())


def load_recipe(
    name: str | Path, *, task: str, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Return a recipe with some fields replaced.

    Args:
        name: One that ships (`recipe_names`), or a TOML file.
        task: What it must be for.
        overrides: Fields that win; None values count as not given.

    Raises:
        InputError: There is no such recipe or field, a value has the wrong type or is impossible,
            or the recipe is for another task.
    """
    source, values = _read(str(name))
    stated = values.get("task")
    if stated != task:
        raise InputError(
            f"{source} is a recipe for {stated}, not for {task}; choose another --recipe"
        )
    given = {field: value for field, value in (overrides or {}).items() if value is not None}
    checked = _checked(values, source) | _checked(given, "the command line")
    missing = [
        field.name
        for field in FIELDS.values()
        if field.default is MISSING and field.name not in checked
    ]
    if missing:
        raise InputError(f"{source} does not set {', '.join(missing)}; every recipe has to")
    return Recipe(**checked)


def _read(name: str) -> tuple[str, dict[str, Any]]:
    import tomllib  # here to keep `--help` quick

    shipped = RECIPES / f"{name}.toml"
    if "/" not in name and shipped.is_file():
        return f"recipe {name}", tomllib.loads(shipped.read_text(encoding="utf-8"))
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(
            f"there is no recipe {name}; those that ship are {', '.join(recipe_names())}, and the "
            f"path of a TOML file is taken too"
        )
    return str(path), read_toml(path, "a TOML file that can be read")


_LARGEST = 1 << 31
"""Of any number in a recipe; NaN is above it, too."""


def _checked(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the values in the types of their fields."""
    hints = typing.get_type_hints(Recipe)
    checked = {}
    for name, value in values.items():
        if name not in FIELDS:
            raise InputError(
                f"{source} sets {shown(name)[1:-1]}, which no recipe has; the fields are "
                f"{', '.join(FIELDS)}"
            )
        kinds = typing.get_args(hints[name]) or (hints[name],)  # of float | None, of float
        if isinstance(value, int | float) and not abs(value) < _LARGEST:
            raise InputError(f"{source} sets {name} to {shown(value)}, which no run has")
        if float in kinds and type(value) is int:
            value = float(value)
        if type(value) not in kinds:  # exactly: True is an int
            expected = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise InputError(f"{source} sets {name} to {shown(value)}; expected {expected}")
        checked[name] = value
    return checked


# ---- options -----------------------------------------------------------------------------------

DEFAULT_SEED = 1234
"""Megatron's."""

_INSTEAD = "(repeatable; file, folder or `datasets` name)"

sources_option = partial(option, default=(), shown="what --data has", group=DATA, reads=True)
limit_option = partial(option, default=None, least=1, shown="all", group=DATA)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of `--seeds 1,2,3`.

    Raises:
        ValueError: One of them is not a number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError("must be comma-separated numbers, such as 1,2,3") from None


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunSettings):
    """What to fine-tune on, and how."""

    output_dir: Path = option(
        "Folder for the result, the model, the states and the logs.", writes=FOLDER
    )
    data: str | None = option(
        "The benchmark's folder, or a `datasets` name; or give --train and --dev.",
        None,
        reads=True,
    )
    """The folder as published; RACE also an archive of it, or a folder of archives."""
    recipe: str | None = option(
        "Name of a recipe, or a TOML file.", None, reads=True, names="recipes"
    )
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
    resume: bool = option(
        "An interrupted run is resumed with and without this.", False, flag="--resume"
    )
    restart: bool = option("Discard an interrupted run and start anew.", False, flag="--restart")
    overwrite: bool = option(
        "Replace a finished run, or an interrupted one with other settings.",
        False,
        flag="--overwrite",
    )
    eval_only: bool = option(
        "Train nothing: evaluate a fine-tuned checkpoint.", False, flag="--eval-only"
    )
    train: Sequence[str] = sources_option(f"Data to train on {_INSTEAD}.")
    dev: Sequence[str] = sources_option(f"Data to evaluate on {_INSTEAD}.")
    test: Sequence[str] = sources_option(f"Data to test at the end {_INSTEAD}.")
    train_limit: int | None = limit_option("First N examples to train on.")
    """All training sets together."""
    dev_limit: int | None = limit_option("First N examples of each dev set.")
    test_limit: int | None = limit_option("First N examples of each test set.")
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
