"""The speed of one layout: timed steps, the device's own matrix products, the all-reduces.

A step is what the toolkit does in earnest: a forward pass of the engine over full rows of which
every position is scored, or a whole step of the trainer, update included. Beside it, on the same
ranks: how fast the device multiplies square matrices (one rank alone, then all at once), and how
long the all-reduces of a step take by themselves.

Weights of a new model are drawn without a file, by each rank for its shard only.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.checkpoints.config import ModelConfig, parse_overrides
from mlm_eval.checkpoints.dtypes import resolve_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Index, LazyTensor
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import Parameter, parameters
from mlm_eval.engine.batching import Request
from mlm_eval.engine.encode import BertInput
from mlm_eval.engine.engine import Engine
from mlm_eval.model.flops import forward_flops
from mlm_eval.model.initial import initial_tensor
from mlm_eval.planning.bench_clocks import (
    device_name,
    products,
    time_all_reduces,
    time_steps,
)
from mlm_eval.planning.plan import BACKWARD
from mlm_eval.ranks.collectives import counting_all_reduces
from mlm_eval.training.data import NO_LABEL, Sample
from mlm_eval.training.objectives import CausalLM, MaskedLM, Objective
from mlm_eval.training.optimization import Schedule
from mlm_eval.training.settings import Counters, TrainSettings
from mlm_eval.training.step import Stepper

MODES = ("infer", "train")

LEARNING_RATE = 1e-5
"""Of the measured steps: what is learnt from noise does not matter, finite numbers do."""

MASKED_EVERY = 7
"""One token of so many is hidden in a training row of BERT: its 15 %."""


@dataclass(frozen=True)
class Job:
    """One layout, and how it is measured; plain values, so that it can go through a file.

    Attributes:
        tp: Tensor-parallel size: the number of ranks.
        mode: `infer` or `train`.
        device: `cpu` or `cuda`.
        dtype: Of the matrix products; training keeps its weights in float32.
        batch: Rows of a step.
        micro_batch: Rows of a forward pass in training.
        seq_length: Tokens of a row.
        steps: Steps that are timed.
        warmup_steps: Steps before them, at least 1.
        recompute: Training with activation checkpointing.
        hidden_dropout: Of training.
        attention_dropout: Of training.
        seed: Of weights and tokens.
        model: Settings of a new model; None: the checkpoint's.
        ckpt: A checkpoint; None: a new model.
        overrides: The checkpoint's `--set`.
    """

    tp: int
    mode: str
    device: str
    dtype: str
    batch: int
    micro_batch: int
    seq_length: int
    steps: int
    warmup_steps: int
    recompute: bool = False
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    seed: int = 1234
    model: dict[str, Any] | None = None
    ckpt: str | None = None
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """What was measured on one layout; rates in units of 1e12 operations a second.

    Attributes:
        step_seconds: Of each timed step, on its slowest rank.
        peak_tflops: The fastest matrix product of rank 0 while the other ranks wait.
        busy_over_alone: A rank's rate of such products with all ranks busy, the mean over the
            ranks, relative to its rate alone; 1 for one rank.
        all_reduces: All-reduces of a step.
        all_reduce_bytes: What they carry, on a rank.
        all_reduce_seconds: How long they take by themselves, one after the other.
        threads: Of a rank.
        device_name: Of rank 0.
        load_seconds: Making or reading the weights.
    """

    step_seconds: list[float]
    peak_tflops: float
    busy_over_alone: float
    all_reduces: int
    all_reduce_bytes: int
    all_reduce_seconds: float
    threads: int
    device_name: str
    load_seconds: float


# --- operations ----------------------------------------------------------------------------------


def predicted_rows(config: ModelConfig, length: int, *, mode: str) -> int:
    """Return the positions of a row whose logits over the vocabulary are computed."""
    if not config.lm_head:
        return 0
    if config.family == "bert" and mode == "train":
        return len(range(1, length, MASKED_EVERY))
    return length


def step_flops(
    config: ModelConfig, *, mode: str, batch: int, length: int, recompute: bool = False
) -> float:
    """Return the floating-point operations of a step, over all ranks.

    Inference: the forward pass, every row whole. Training: three times that, because the backward
    pass costs two forward passes; with recomputation the layers' forward pass once more.
    """
    head_rows = predicted_rows(config, length, mode=mode)
    forward = forward_flops(config, length, last_rows=length, head_rows=head_rows)
    if mode == "infer":
        return batch * forward
    again = forward_flops(config, length, last_rows=length, head_rows=0) if recompute else 0.0
    return batch * ((1 + BACKWARD) * forward + again)


def attention_share(config: ModelConfig, length: int) -> float:
    """Return the share of scores and weighted values in the operations of a forward pass."""
    width = config.num_attention_heads * config.kv_channels
    attention = 4 * length**2 * width * config.num_layers
    return attention / step_flops(config, mode="infer", batch=1, length=length)


# --- models without a file -----------------------------------------------------------------------


class Drawn(LazyTensor):
    """Initial weights of which only the part that is read is drawn.

    What tensor-parallel ranks share is the same on all of them. Their shards are other numbers than
    those of another layout: fit for timing, not for results.
    """

    def __init__(self, config: ModelConfig, parameter: Parameter, seed: int) -> None:
        self.shape, self.dtype = parameter.shape, torch.float32
        self.config, self.parameter, self.seed = config, parameter, seed

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        shape, first = list(self.shape), 0
        if index is not None:
            entries = torch.arange(shape[dim])[index]
            shape[dim] = entries.numel()
            first = int(entries[0]) if entries.numel() else 0
        part = dataclasses.replace(self.parameter, shape=tuple(shape))
        return initial_tensor(self.config, part, seed=self.seed + first).read()


def drawn_checkpoint(config: ModelConfig, *, seed: int) -> Checkpoint:
    """Return a new model of which each rank draws its own shard; see `Drawn`."""
    tensors = {name: Drawn(config, p, seed) for name, p in parameters(config).items()}
    provenance = Provenance(Path("a new model"), "memory", digest=f"noise, seed {seed}")
    return Checkpoint(config, tensors, provenance).check()


# --- one layout ----------------------------------------------------------------------------------


def measure(job: Job) -> Measured:
    """Return the figures of a layout; all its ranks call it, and get the same.

    Raises:
        InputError: The model cannot be read, cut or run so, or its numbers are not finite.
    """
    engine = _load(job)
    step = (_training if job.mode == "train" else _inference)(engine, job)
    for _ in range(job.warmup_steps - 1):
        step()
    with counting_all_reduces() as calls:
        step()
    seconds = time_steps(step, job.steps, engine.device)
    peak, busy_over_alone = products(engine.device, resolve_dtype(job.dtype))
    return Measured(
        step_seconds=seconds,
        peak_tflops=peak / 1e12,
        busy_over_alone=busy_over_alone,
        all_reduces=calls.total(),
        all_reduce_bytes=sum(n * size * dtype.itemsize for (size, dtype), n in calls.items()),
        all_reduce_seconds=time_all_reduces(calls, engine.device),
        threads=torch.get_num_threads(),
        device_name=device_name(engine.device),
        load_seconds=engine.load_seconds,
    )


def _load(job: Job) -> Engine:
    if job.ckpt is not None:
        checkpoint = open_checkpoint(job.ckpt, parse_overrides(job.overrides))
    else:
        assert job.model is not None
        checkpoint = drawn_checkpoint(ModelConfig(**job.model), seed=job.seed)
    device = f"cuda:{torch.cuda.current_device()}" if job.device == "cuda" else "cpu"
    return Engine.load(
        checkpoint,
        tp=job.tp,
        dp=1,
        dtype="float32" if job.mode == "train" else job.dtype,
        device=device,
        batch_tokens=job.batch * job.seq_length,
    )


def _rows(engine: Engine, job: Job, length: int) -> list[Tensor]:
    """Return the batch's rows of random tokens, the same on every rank."""
    noise = torch.Generator().manual_seed(job.seed)
    shape = (job.batch, length)
    return list(torch.randint(engine.config.vocab_size, shape, generator=noise))


def _inference(engine: Engine, job: Job) -> Callable[[], None]:
    """Return a step of inference: log-probabilities of every position of the batch."""
    if engine.config.family == "bert":
        inputs = [BertInput(row) for row in _rows(engine, job, job.seq_length)]
        return lambda: _drop(engine.encode(inputs, states=False, score=True))
    requests = [Request(row, job.seq_length) for row in _rows(engine, job, job.seq_length + 1)]
    return lambda: _drop(engine.score(requests))


def _drop(result: object) -> None:
    """The results are on the CPU by now: what a device has to do for them is done."""


def _training(engine: Engine, job: Job) -> Callable[[], None]:
    """Return a step of training: forward, backward, clipping, update."""
    objective: Objective = MaskedLM()
    if engine.config.family == "gpt":
        objective = CausalLM()
        rows = _rows(engine, job, job.seq_length + 1)
        pairs = [(row[:-1], row[1:]) for row in rows]
    else:
        pairs = [(row, _hidden(row)) for row in _rows(engine, job, job.seq_length)]
    data = [
        Sample([row], [torch.zeros_like(row)], label, index)
        for index, (row, label) in enumerate(pairs)
    ]
    settings = TrainSettings(
        lr=LEARNING_RATE,
        global_batch=job.batch,
        micro_batch=job.micro_batch,
        hidden_dropout=job.hidden_dropout,
        attention_dropout=job.attention_dropout,
        dtype=job.dtype,
        seed=job.seed,
        recompute=job.recompute,
    )
    total = job.warmup_steps + job.steps
    schedule = Schedule(LEARNING_RATE, LEARNING_RATE, total, warmup=0.0)
    stepper = Stepper(engine, data, objective, settings, schedule, Counters())
    numbers = itertools.count()

    def step() -> None:
        number = next(numbers)
        result = stepper.take(number, list(range(job.batch)), updates=number, wish=False)
        if result.broken:
            raise InputError(
                f"the loss of training step {number + 1} in {job.dtype} is not finite; "
                "try --dtype bfloat16 or float32"
            )

    return step


def _hidden(row: Tensor) -> Tensor:
    """Return labels of a masked language model; position 0 holds the segments' order."""
    label = torch.full_like(row, NO_LABEL)
    label[0] = 0
    label[1::MASKED_EVERY] = row[1::MASKED_EVERY]
    return label
