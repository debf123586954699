"""Recipes: how a model is fine-tuned for a task, as TOML files; the paper's ship with this."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of one task for one model.

    Attributes:
        task: `race`, `mnli`, `qqp` or `squad`.
        lr: The highest learning rate.
        epochs: Passes over the training data.
        global_batch: Samples of a step, over all ranks; one of RACE has four rows.
        warmup: Share of the steps in which the learning rate rises from 0.
        weight_decay: Of AdamW; none on biases and norms.
        adam_beta1: Of AdamW.
        adam_beta2: Of AdamW.
        adam_eps: Of AdamW.
        clip_grad: Largest norm of the gradient; 0: any.
        hidden_dropout: Probability of dropping a unit, the head's input included.
        attention_dropout: Probability of dropping an attention weight.
        min_lr: The learning rate at the end.
        lr_decay: `linear` or `cosine`.
        keep_last: Make a step of an epoch's last samples where they do not fill a global batch.
        seq_length: Longest row, in tokens.
        max_qa_length: RACE: longest question with its answer, in tokens.
        doc_stride: SQuAD: tokens from the start of one window of a long text to the next one's.
        max_query_length: SQuAD: longest question, in tokens.
        max_answer_length: SQuAD: longest answer, in tokens.
        n_best: SQuAD: answers kept for each question.
        null_threshold: SQuAD 2.0: a question whose null score is ahead of the best answer's by more
            has no answer. None: the value with the best F1 on the dev set, as the official script
            finds it.
    """

    task: str
    lr: float
    epochs: int
    global_batch: int
    warmup: float = 0.06
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    min_lr: float = 0.0
    lr_decay: str = "linear"
    keep_last: bool = False
    seq_length: int = 512
    max_qa_length: int = 128
    doc_stride: int = 128
    max_query_length: int = 64
    max_answer_length: int = 30
    n_best: int = 20
    null_threshold: float | None = None

    def __post_init__(self) -> None:
        """Check what the trainer does not check.

        Raises:
            InputError: A length is impossible.
        """
        names = ("max_qa_length", "doc_stride", "max_query_length", "max_answer_length", "n_best")
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seq_length < 8:
            raise InputError(f"seq_length is {self.seq_length}; it must be at least 8 tokens")


FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship."""
    folder = resources.files("mlm_eval.tasks.finetune") / "recipes"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir())


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
        if field.default is dataclasses.MISSING and field.name not in checked
    ]
    if missing:
        raise InputError(f"{source} does not set {', '.join(missing)}; every recipe has to")
    return Recipe(**checked)


def _read(name: str) -> tuple[str, dict[str, Any]]:
    folder = resources.files("mlm_eval.tasks.finetune") / "recipes"
    shipped = folder / f"{name}.toml"
    if "/" not in name and shipped.is_file():
        return f"recipe {name}", tomllib.loads(shipped.read_text(encoding="utf-8"))
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(
            f"there is no recipe {name}; those that ship are {', '.join(recipe_names())}, and the "
            f"path of a TOML file is taken too"
        )
    try:
        return str(path), tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is no TOML file that can be read ({error})") from None


def _checked(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the values in the types of their fields."""
    hints = typing.get_type_hints(Recipe)
    checked = {}
    for name, value in values.items():
        if name not in FIELDS:
            raise InputError(
                f"{source} sets {name}, which no recipe has; the fields are {', '.join(FIELDS)}"
            )
        kinds = _kinds(hints[name])
        if float in kinds and type(value) is int:
            value = float(value)
        if type(value) not in kinds:  # exactly: True is an int
            expected = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise InputError(f"{source} sets {name} to {value!r}; expected {expected}")
        checked[name] = value
    return checked


def _kinds(hint: Any) -> tuple[type, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
