"""What a fine-tuning command is told, and whom it tells what happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.dtypes import resolve_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.tasks.finetune.recipe import FIELDS
from mlm_eval.training.settings import TrainSettings, option_name

if TYPE_CHECKING:
    from mlm_eval.tasks.finetune.recipe import Recipe
    from mlm_eval.training.settings import TrainingProgress

DEFAULT_SEED = 1234
"""Megatron's."""


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of `mlm-eval race`, `mnli`, `qqp` and `squad`: `seq_length` is `--seq-length`.

    None is "not given": a hyper-parameter then is the recipe's.

    Attributes:
        output_dir: Folder for everything that is written.
        data: The benchmark's folder as published (RACE also an archive of it, or a folder of
            archives), or a `datasets` name.
        train: Files, folders or `datasets` names (`NAME:CONFIG:SPLIT`) one by one, instead of what
            `data` has for training; repeatable.
        dev: The same for the dev sets.
        test: The same for the test sets.
        recipe: Name of a recipe, or a TOML file; None: the paper's for its smallest model.
        seeds: One run for each; reported are each and the median.
        resume: Go on with an interrupted run of the same `output_dir`.
        eval_only: Train nothing: evaluate a checkpoint that was fine-tuned for the task.
        train_limit: The first N training examples, all training sets together.
        dev_limit: The first N examples of each dev set.
        test_limit: The first N examples of each test set.
        dtype: Of the matrix products of training; `auto`: bfloat16 on CUDA, float32 on the CPU.
            With `eval_only`, of the evaluation (`auto` as for every evaluation).
        eval_dtype: Of the matrix products of evaluations while training; `auto`: `dtype` on CUDA,
            float32 on the CPU.
        micro_batch: Samples of one forward pass on one rank; changes no result.
        recompute: Run each layer again in the backward pass instead of keeping its activations.
        dp_mode: `ddp` or `fsdp2`.
        max_steps: Steps of a run, whatever `epochs` says.
        evaluate_every: Steps between evaluations; None: at the end of each epoch.
        save_minutes: Time between training states.
        epochs: As in `Recipe`, and so are all that follow.
        lr: The highest learning rate.
        global_batch: Samples of a step, over all ranks.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Of AdamW.
        adam_beta1: Of AdamW.
        adam_beta2: Of AdamW.
        adam_eps: Of AdamW.
        clip_grad: Largest norm of the gradient.
        hidden_dropout: Probability of dropping a unit.
        attention_dropout: Probability of dropping an attention weight.
        min_lr: The learning rate at the end.
        lr_decay: `linear` or `cosine`.
        keep_last: Use an epoch's last samples where they do not fill a global batch.
        seq_length: Longest row.
        max_qa_length: RACE only.
        doc_stride: SQuAD only, and so are all that follow.
        max_query_length: Longest question.
        max_answer_length: Longest answer.
        n_best: Answers kept.
        null_threshold: Of "no answer"; None: found on the dev set.
    """

    output_dir: Path
    data: str | None = None
    train: Sequence[str] = ()
    dev: Sequence[str] = ()
    test: Sequence[str] = ()
    recipe: str | None = None
    seeds: Sequence[int] = (DEFAULT_SEED,)
    resume: bool = False
    eval_only: bool = False
    train_limit: int | None = None
    dev_limit: int | None = None
    test_limit: int | None = None
    dtype: str = "auto"
    eval_dtype: str = "auto"
    micro_batch: int | None = None
    recompute: bool = False
    dp_mode: str = "ddp"
    max_steps: int | None = None
    evaluate_every: int | None = None
    save_minutes: float | None = None
    epochs: int | None = None
    lr: float | None = None
    global_batch: int | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    adam_eps: float | None = None
    clip_grad: float | None = None
    hidden_dropout: float | None = None
    attention_dropout: float | None = None
    min_lr: float | None = None
    lr_decay: str | None = None
    keep_last: bool | None = None
    seq_length: int | None = None
    max_qa_length: int | None = None
    doc_stride: int | None = None
    max_query_length: int | None = None
    max_answer_length: int | None = None
    n_best: int | None = None
    null_threshold: float | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before any data is read.

        Raises:
            InputError: An option is impossible.
        """
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(
                f"--seeds {','.join(map(str, self.seeds))}: give different numbers from 0 on, "
                f"divided by commas"
            )
        for name in ("train_limit", "dev_limit", "test_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: choose 1 or more")
        for name in ("dtype", "eval_dtype"):
            resolve_dtype(getattr(self, name), auto="float32", option=option_name(name))
        # Else the trainer would refuse them after the data were read and the model was loaded.
        names = TrainSettings.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()
        given = {name: getattr(self, name) for name in names - {"dtype"}}
        given = {name: value for name, value in given.items() if value is not None}
        TrainSettings(**{"lr": max(self.min_lr or 0.0, 0.0), **given})

    def overrides(self) -> dict[str, Any]:
        """Return the fields of a recipe that are given."""
        names = (name for name in FIELDS if name != "task")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def train_settings(self, recipe: Recipe, *, seed: int, dtype: str) -> TrainSettings:
        """Return what the trainer is told for one run."""
        own = ("micro_batch", "recompute", "dp_mode", "max_steps", "evaluate_every", "save_minutes")
        given = {name: value for name in own if (value := getattr(self, name)) is not None}
        shared = TrainSettings.__dataclass_fields__.keys() & FIELDS.keys()
        hyper = {name: getattr(recipe, name) for name in shared}
        return TrainSettings(**hyper, **given, seed=seed, dtype=dtype)


@dataclass(frozen=True)
class Observer:
    """Whom a run tells what happens; called on rank 0 only.

    Attributes:
        say: Takes a line for people who watch.
        warn: Takes a warning that a reader of the figures must know.
        on_step: Takes the trainer's progress after each step.
        on_evaluation: Takes (name of the set, rows done, rows in all).
    """

    say: Callable[[str], None] | None = None
    warn: Callable[[str], None] | None = None
    on_step: Callable[[TrainingProgress], None] | None = None
    on_evaluation: Callable[[str, int, int], None] | None = None
