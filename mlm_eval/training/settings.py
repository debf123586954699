"""How to train, where a run is, and what it reports.

Nothing here imports torch, because `--help` reads the settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.dtypes import DTYPE_CHOICES, DTYPE_NAMES, training_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.options import KEY, OPTIMIZER, RUN, Option, option, option_name

DP_MODES = ("ddp", "fsdp2")
LR_DECAYS = ("linear", "cosine", "linear-v1")


def check_options(kind: type[Any], values: Mapping[str, Any]) -> None:
    """Check values against the bounds and the choices of their options.

    Args:
        kind: The dataclass with the options.
        values: By the names of its fields; None is not checked.

    Raises:
        InputError: A value is impossible.
    """
    for known in dataclasses.fields(kind):
        entry, value = known.metadata.get(KEY), values.get(known.name)
        if not isinstance(entry, Option) or value is None:
            continue
        name = option_name(known.name)
        if entry.least is not None and value < entry.least:
            raise InputError(f"{name} is {value}; it must be at least {entry.least}")
        if entry.below is not None and not 0 <= value < entry.below:
            bounds = "be 0 or more" if entry.below == math.inf else f"lie in [0, {entry.below:g})"
            raise InputError(f"{name} is {value}; it must {bounds}")
        if entry.choices and value not in entry.choices:
            raise InputError(f"{name} {value!r} is unknown; use {', '.join(entry.choices)}")
        if entry.needs is not None and values.get(entry.needs) is None:
            raise InputError(f"{name} means nothing without {option_name(entry.needs)}; give both")


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What decides the result of training, beside the model, the data and the seed."""

    epochs: int = option("Passes over the training data.", 3, least=1)
    lr: float = option("Highest learning rate.", 1e-4, below=math.inf)
    """The default is the paper's for BERT (section 4.3)."""
    global_batch: int = option("Samples of a step, over all ranks.", 32, least=1)
    warmup: float = option(
        "Share of the steps in which the learning rate rises from 0.",
        0.06,
        below=1.0,
        group=OPTIMIZER,
    )
    lr_decay: str = option(
        "How the learning rate falls then: linear, cosine, or linear-v1 (Megatron v1.0's, which "
        "ends at 2 x warmup x lr).",
        "linear",
        choices=LR_DECAYS,
        group=OPTIMIZER,
    )
    min_lr: float = option("Learning rate at the end.", 0.0, below=math.inf, group=OPTIMIZER)
    weight_decay: float = option(
        "AdamW's weight decay; none on biases and norms.", 0.01, below=math.inf, group=OPTIMIZER
    )
    adam_beta1: float = option("AdamW's beta1.", 0.9, below=1.0, group=OPTIMIZER)
    adam_beta2: float = option("AdamW's beta2.", 0.999, below=1.0, group=OPTIMIZER)
    adam_eps: float = option("AdamW's epsilon.", 1e-8, below=math.inf, group=OPTIMIZER)
    clip_grad: float = option(
        "Clip the gradient to this norm; 0: do not clip.", 1.0, below=math.inf, group=OPTIMIZER
    )
    hidden_dropout: float = option(
        "Probability of dropping a unit.", 0.1, below=1.0, group=OPTIMIZER
    )
    attention_dropout: float = option(
        "Probability of dropping an attention weight; 0 is faster.",
        0.1,
        below=1.0,
        group=OPTIMIZER,
    )
    keep_last: bool = option(
        "Train on an epoch's last samples too where they do not fill a global batch.",
        False,
        group=OPTIMIZER,
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: One of them is impossible.
        """
        check_options(type(self), vars(self))
        if self.min_lr > self.lr:
            raise InputError(
                f"--min-lr {self.min_lr} is more than --lr {self.lr}; the learning rate falls from "
                "the one to the other"
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a run trains, and how often it evaluates and saves."""

    dtype: str = option(
        "Dtype of the matrix products: auto (bfloat16 on CUDA, float32 on the CPU), "
        f"{DTYPE_CHOICES}.",
        "auto",
        choices=("auto", *DTYPE_NAMES),
        group=RUN,
    )
    """By autocast; weights and the optimizer's state are float32."""
    max_steps: int | None = option(
        "Steps of the run.", None, least=1, shown="as --epochs says", group=RUN
    )
    """The run takes as many epochs as these need."""
    evaluate_every: int | None = option(
        "Steps between evaluations.", None, least=1, shown="at the end of each epoch", group=RUN
    )
    save_minutes: float = option(
        "Minutes between training states; one is saved at each evaluation too.",
        10.0,
        below=math.inf,
        group=RUN,
    )
    save_every: int | None = option(
        "Keep a checkpoint each so many steps, and the last, in checkpoint-series of OUTPUT_DIR.",
        None,
        least=1,
        shown="none",
        group=RUN,
    )
    """`--ckpt OUTPUT_DIR/checkpoint-series --iterations all` evaluates them."""
    keep: int | None = option(
        "Keep only so many of the latest of --save-every.",
        None,
        least=1,
        shown="all",
        needs="save_every",
        group=RUN,
    )
    log: tuple[str, ...] = option(
        "Follow the run in wandb:PROJECT, trackio:PROJECT, mlflow:EXPERIMENT or tensorboard:FOLDER "
        "too; tensorboard alone: beside the output (repeatable).",
        (),
        group=RUN,
        metavar="TRACKER:PLACE",
    )
    """TensorBoard's files are in OUTPUT_DIR/tensorboard with and without it."""
    micro_batch: int = option(
        "Samples of a forward pass on one rank; changes no result.", 8, least=1, group=RUN
    )
    recompute: bool = option(
        "Recompute activations in the backward pass: needs less memory.",
        False,
        flag="--recompute",
        group=RUN,
    )
    dp_mode: str = option(
        "ddp, or fsdp2: shard weights, gradients and moments over the --dp ranks.",
        "ddp",
        choices=DP_MODES,
        group=RUN,
    )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RunSettings, Hyperparameters):
    """How to train."""

    seed: int = option("Seed of the order, dropout, masks and new weights.", 1234, least=0)

    def on(self, device: str) -> TrainSettings:
        """Return the settings with the dtype that `auto` means on a device, `cuda` or `cpu`."""
        return dataclasses.replace(self, dtype=training_dtype(self.dtype, device))

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide the result: a resumed run must have the same."""
        free = ("micro_batch", "recompute", "dp_mode", "save_minutes", "save_every", "keep", "log")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in free}


def values_of(kind: type[Any], source: object) -> dict[str, Any]:
    """Return the fields of a dataclass, taken from an object that has them among others."""
    return {entry.name: getattr(source, entry.name) for entry in dataclasses.fields(kind)}


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run is, after a step."""

    step: int
    """Steps done."""
    total_steps: int
    epoch: int
    """The epoch of the last step, from 1."""
    epochs: int
    loss: float
    """Mean loss of the epoch so far."""
    accuracy: float
    """Share of correct predictions of the epoch so far."""
    lr: float
    """Learning rate of the last step."""
    samples_per_second: float
    """Since the run started, evaluations left out."""
    seconds_left: float
    """At that speed, evaluations left out."""

    @property
    def place(self) -> str:
        """Where the run is, for a log line."""
        return f"epoch {self.epoch}, step {self.step:,} of {self.total_steps:,}"

    @property
    def figures(self) -> str:
        """What training has come to in this epoch, for a log line."""
        return (
            f"loss {self.loss:.4f}, accuracy {100 * self.accuracy:.2f} %, "
            f"{self.samples_per_second:,.1f} samples/s"
        )


class Listener:
    """Callbacks of a run, called on rank 0. These do nothing."""

    def log(self, text: str) -> None:
        """Take a line for people who watch."""

    def warn(self, *warnings: str) -> None:
        """Take warnings that a reader of the figures must know."""

    def on_step(self, progress: TrainingProgress) -> None:
        """Take the progress, after each step."""

    def on_evaluation(self, name: str, done: int, total: int) -> None:
        """Take how many rows, or samples, of a set have been evaluated."""


@dataclass(frozen=True)
class TrainReport:
    """What a run did, over all its parts if it was resumed."""

    steps: int
    epochs: int
    """Passes over the data, an unfinished one included."""
    samples: int
    """Samples taken, repeated ones counted again."""
    losses: list[float]
    """Loss of each step."""
    evaluations: list[dict[str, Any]]
    """What each evaluation returned, with its `step` and `epoch` (from 1)."""
    best: dict[str, Any] | None
    """The evaluation with the highest `score`, the first of equal ones; None without scores."""
    seconds: float
    """Time spent in steps."""
    samples_per_second: float
    """Mean speed over those seconds."""
    checkpoint: Path
    """The last weights, in Megatron torch format."""
    best_checkpoint: Path | None
    """The weights of `best`."""


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
