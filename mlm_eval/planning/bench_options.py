"""The options of `mlm-eval bench` that say how a speed is measured. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError

INFER, TRAIN = "infer", "train"
MODES = (INFER, TRAIN)


@dataclass(frozen=True)
class BenchOptions:
    """How each point of a series is measured; plain values, which reach the ranks in a file."""

    device: str
    """`cpu` or `cuda`."""
    dtype: str
    """Of the matrix products; training keeps its weights in float32."""
    mode: str = INFER
    batch: int = 8
    """Rows of a step."""
    micro_batch: int | None = None
    """Rows of a forward pass in training; None: the whole batch."""
    seq_length: int | None = None
    """Tokens of a row; None: the model's positions, at most 1,024."""
    steps: int = 10
    """Steps that are timed."""
    warmup_steps: int = 3
    """Steps before them, at least 1."""
    recompute: bool = False
    """Training with activation checkpointing."""
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    seed: int = 1234
    """Of weights and tokens."""
    ckpt: str | None = None
    """A checkpoint; None: new models."""
    overrides: tuple[str, ...] = ()
    """The checkpoint's `--set`."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: One of them is impossible.
        """
        if self.mode not in MODES:
            raise InputError(f"--mode {self.mode!r} is unknown; use {' or '.join(MODES)}")
        if self.mode == INFER and (self.micro_batch is not None or self.recompute):
            raise InputError("--micro-batch and --recompute belong to --mode train")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                option = name.replace("_", "-")
                raise InputError(f"--{option} is {getattr(self, name)}; it must lie in [0, 1)")

    @property
    def trains(self) -> bool:
        """Whether a step is a training step."""
        return self.mode == TRAIN

    @property
    def forward_rows(self) -> int:
        """Rows of a forward pass."""
        return min(self.micro_batch or self.batch, self.batch)

    def row_length(self, config: ModelConfig) -> int:
        """Return the tokens of a row of this model."""
        return self.seq_length or min(1024, config.max_position_embeddings)


def parse_sizes(text: str) -> list[int] | None:
    """Return the sizes of `--tp 1,2,4,8`, ascending; None for `auto`.

    Raises:
        InputError: One of them is no positive number.
    """
    if text == "auto":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--tp {text!r}: give comma-separated sizes such as 1,2,4,8, or auto")
    return sorted({int(part) for part in parts})


def parse_scale(text: str) -> float | None:
    """Return the factor of `--scale`; None for `auto`.

    Raises:
        InputError: It is no number in (0, 1].
    """
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise InputError(
            f"--scale {text!r}: give a number above 0 and up to 1, such as 0.1, or auto"
        )
    return value


def cores() -> int:
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0))
