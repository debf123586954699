"""The options of `mlm-eval bench`. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.options import DTYPES, FILE, RunOptions, again, option

if TYPE_CHECKING:
    from mlm_eval.checkpoints.config import ModelConfig

INFER, TRAIN = "infer", "train"
MODES = (INFER, TRAIN)


def parse_sizes(text: str) -> list[int] | None:
    """Return the sizes of `--tp 1,2,4,8`, ascending; None for `auto`.

    Raises:
        ValueError: One of them is not a positive number.
    """
    if text == "auto":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError("must be comma-separated sizes such as 1,2,4,8, or auto")
    return sorted({int(part) for part in parts})


def parse_scale(text: str) -> float | None:
    """Return the factor of `--scale`; None for `auto`.

    Raises:
        ValueError: It is not a number above 0 and at most 1.
    """
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise ValueError("must be a number above 0 and up to 1, such as 0.1, or auto")
    return value


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and how; it reaches the ranks in a file."""

    study: str | None = option(
        "The paper's scaling: weak (Table 1, Figure 5) or strong (Table 8).",
        None,
        choices=("weak", "strong"),
    )
    ckpt: str | None = option("Or a checkpoint, at each --tp.", None, reads=True, once=True)
    model: str | None = option("Or a new model of a named size.", None, names="sizes")
    tp: list[int] | None = option(
        "Tensor-parallel sizes, such as 1,2,4,8; auto: those of 1,2,4,8 that the machine has GPUs "
        "(on the CPU: cores) for.",
        None,
        parse=parse_sizes,
        written="auto",
    )
    mode: str = option(
        "infer (forward passes) or train (whole training steps).", INFER, choices=MODES
    )
    scale: float | None = option(
        "Shrinks new models: layers and hidden size by about this factor, above 0 and up to 1; "
        "auto: the largest that fits the free memory.",
        1.0,
        parse=parse_scale,
        written="1",
    )
    batch: int = option("Rows of a step.", 8, least=1)
    micro_batch: int | None = option(
        "Training: rows of a forward pass; default: --batch.", None, least=1
    )
    seq_length: int | None = option(
        "Tokens of a row; default: positions, at most 1024.", None, least=2
    )
    steps: int = option("Steps that are timed.", 10, least=1)
    warmup_steps: int = option("Steps before them.", 3, least=1)
    device: str = again(RunOptions, "device")
    dtype: str = option(
        "Dtype of the matrix products: auto (bfloat16 on CUDA, float32 on CPU), float32, bfloat16 "
        "or float16. Training keeps its weights in float32.",
        "auto",
        choices=DTYPES,
    )
    recompute: bool = option("Train with activation checkpointing.", False, flag="--recompute")
    hidden_dropout: float = option("Dropout of hidden states in training.", 0.1)
    attention_dropout: float = option("Dropout of attention in training; 0 is faster.", 0.1)
    output: Path | None = again(RunOptions, "output")
    plot: Path | None = option("Draw the figures into this PNG file.", None, writes=FILE)
    overwrite: bool = again(RunOptions, "overwrite")
    seed: int = option("Seed of weights and tokens.", 1234)
    overrides: tuple[str, ...] = again(RunOptions, "overrides")
    job: Path | None = option(
        "For the ranks that bench starts: the file of the point to measure.", None, hidden=True
    )

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


def cores() -> int:
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0))
