"""What a training run is told, what it tells on the way, and what it reports at the end."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.dtypes import DTYPE_NAMES
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.training.data import Plan
from mlm_eval.training.replicas import DP_MODES


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        lr: The highest learning rate.
        epochs: Passes over the data.
        global_batch: Samples of a step, over all ranks.
        micro_batch: Samples of one forward pass on one rank; changes no result.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Of AdamW, for matrices only.
        adam_beta1: Of AdamW.
        adam_beta2: Of AdamW.
        adam_eps: Of AdamW.
        clip_grad: Largest norm of the gradient; 0: any.
        hidden_dropout: Probability of dropping a unit.
        attention_dropout: Probability of dropping an attention weight; 0 is much faster.
        dtype: Of the matrix products (autocast); weights and optimizer are float32.
        seed: Of the order, of dropout and of what is drawn anew.
        keep_last: Make a step of an epoch's last samples where they do not fill a global batch.
        recompute: Run each layer again in the backward pass instead of keeping its activations.
        dp_mode: `ddp`, or `fsdp2`: weights, gradients and moments cut over the data-parallel ranks.
        min_lr: The learning rate at the end.
        lr_decay: `linear` or `cosine`.
        max_steps: Steps of the run, in as many epochs as they need.
        evaluate_every: Steps between evaluations; None: at the end of each epoch.
        save_minutes: Time between training states; one is saved at each evaluation too.
    """

    lr: float
    epochs: int = 3
    global_batch: int = 32
    micro_batch: int = 8
    warmup: float = 0.06
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    dtype: str = "float32"
    seed: int = 1234
    keep_last: bool = False
    recompute: bool = False
    dp_mode: str = "ddp"
    min_lr: float = 0.0
    lr_decay: str = "linear"
    max_steps: int | None = None
    evaluate_every: int | None = None
    save_minutes: float = 10.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: One of them is impossible.
        """
        for name in ("epochs", "global_batch", "micro_batch", "max_steps", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{option_name(name)} is {value}; it must be at least 1")
        for name in ("hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2", "warmup"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(
                    f"{option_name(name)} is {getattr(self, name)}; it must lie in [0, 1)"
                )
        for name in ("lr", "min_lr", "weight_decay", "adam_eps", "clip_grad", "save_minutes"):
            value = getattr(self, name)
            if not (0.0 <= value < math.inf):
                raise InputError(f"{option_name(name)} is {value}; it must be 0 or more")
        if self.min_lr > self.lr:
            raise InputError(
                f"--min-lr {self.min_lr} is more than --lr {self.lr}; the rate falls from the one "
                "to the other"
            )
        for name, known in (
            ("dtype", DTYPE_NAMES),
            ("dp_mode", DP_MODES),
            ("lr_decay", ("linear", "cosine")),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{option_name(name)} {getattr(self, name)!r} is unknown; use "
                    f"{', '.join(known)}"
                )

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide the result: a run that goes on must have the same."""
        free = ("micro_batch", "recompute", "dp_mode", "save_minutes")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in free}


def option_name(name: str) -> str:
    """Return the command line's option for a setting."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run is, for a progress bar.

    Attributes:
        step: Steps done.
        total_steps: Steps of the run.
        epoch: The epoch of the last step, from 1.
        epochs: Epochs of the run.
        loss: Mean loss of the epoch so far.
        accuracy: Share of correct predictions of the epoch so far.
        lr: Learning rate of the last step.
        samples_per_second: Since this process started training, evaluations left out.
        seconds_left: At that speed, evaluations left out.
    """

    step: int
    total_steps: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    lr: float
    samples_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class TrainReport:
    """What a run did, over all its parts if it was resumed.

    Attributes:
        steps: Steps of the run.
        epochs: Epochs, a begun one included.
        samples: Samples taken, repeated ones counted again.
        losses: Loss of each step.
        evaluations: What each evaluation returned, with its `step` and `epoch` (from 1).
        best: The evaluation with the highest `score`, the first of equal ones; None without scores.
        seconds: Time spent in steps.
        samples_per_second: Over those seconds.
        checkpoint: The last weights, in Megatron torch format.
        best_checkpoint: Those of `best`.
    """

    steps: int
    epochs: int
    samples: int
    losses: list[float]
    evaluations: list[dict[str, Any]]
    best: dict[str, Any] | None
    seconds: float
    samples_per_second: float
    checkpoint: Path
    best_checkpoint: Path | None


@dataclass
class Counters:
    """What grows during a run and is saved with its state."""

    step: int = 0
    updates: int = 0
    """Steps that moved the weights: float16 skips those whose gradient overflows."""
    samples: int = 0
    seconds: float = 0.0
    epoch_loss: float = 0.0
    epoch_samples: int = 0
    epoch_hits: float = 0.0
    epoch_predictions: float = 0.0
    loss_scale: float = 2.0**16
    good_steps: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def new_epoch(self) -> None:
        """Forget the last epoch's numbers."""
        self.epoch_loss, self.epoch_samples = 0.0, 0
        self.epoch_hits, self.epoch_predictions = 0.0, 0.0

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the highest score, the first of equal ones."""
        scored = [entry for entry in self.evaluations if "score" in entry]
        return max(scored, key=lambda entry: entry["score"]) if scored else None


def training_args(settings: TrainSettings, plan: Plan, counters: Counters) -> dict[str, Any]:
    """Return how the model was trained, under Megatron's names."""
    return {
        "optimizer": "adam",
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_eps": settings.adam_eps,
        "lr": settings.lr,
        "min_lr": settings.min_lr,
        "lr_decay_style": settings.lr_decay,
        "lr_warmup_fraction": settings.warmup,
        "weight_decay": settings.weight_decay,
        "clip_grad": settings.clip_grad,
        "seed": settings.seed,
        "epochs": plan.epochs,
        "micro_batch_size": settings.micro_batch,
        "global_batch_size": settings.global_batch,
        "train_iters": plan.total_steps,
        "consumed_train_samples": counters.samples,
    }
