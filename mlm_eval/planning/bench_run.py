"""The speed of one model at one tensor-parallel size, measured on its ranks.

A step is what the toolkit does in earnest: a forward pass of the engine over full rows of which
every position is scored, or a whole step of the trainer, update included. On the same ranks it is
also measured how fast the device multiplies square matrices (one rank alone, then all at once), and
how long the all-reduces of a step take by themselves.

Weights of a new model are drawn without a file, by each rank for its shard only.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.checkpoints.config import ModelConfig, parse_overrides
from mlm_eval.checkpoints.dtypes import STORED_DTYPES, resolve_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Index, LazyTensor
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import Parameter, parameters
from mlm_eval.engine.encode import BertInput
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.score import Request
from mlm_eval.model.initial import initial_tensor
from mlm_eval.model.tensor_parallel import reduce_over_ranks
from mlm_eval.planning.bench_options import BenchOptions
from mlm_eval.planning.bench_study import MASKED_EVERY, BenchPoint
from mlm_eval.ranks.collectives import (
    AllReduceCounter,
    AllReduceCounts,
    barrier,
    from_main,
    max_over_ranks,
    sum_over_ranks,
)
from mlm_eval.ranks.mesh import is_main, num_ranks
from mlm_eval.training.data import NO_LABEL, Sample
from mlm_eval.training.objectives import CausalLM, MaskedLM, Objective
from mlm_eval.training.optimization import Schedule
from mlm_eval.training.settings import Counters, TrainSettings
from mlm_eval.training.step import Stepper

LEARNING_RATE = 1e-5
"""Learning rate of the measured steps: they need finite numbers, and learn nothing from noise."""

SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
"""Sides of the square matrices whose products are timed; the fastest is the peak."""

PRODUCT_SECONDS = 0.5
"""A product of one size is repeated for at least so long."""

SLOW_PRODUCT = 2.0
"""Seconds of a product after which no larger one is tried (float16 on some CPUs)."""


@dataclass(frozen=True)
class Measured:
    """What was measured on one point; rates in units of 1e12 operations a second."""

    step_seconds: list[float]
    """Time of each timed step, on its slowest rank."""
    peak_tflops: float
    """The fastest matrix product of rank 0 while the other ranks wait."""
    busy_over_alone: float
    """A rank's rate of such products with all ranks busy, the mean over the ranks, relative to its
    rate alone; 1 for one rank."""
    all_reduces: int
    """All-reduces of a step."""
    all_reduce_bytes: int
    """What they carry, on a rank."""
    all_reduce_seconds: float
    """How long they take by themselves, one after the other."""
    threads: int
    """Threads of a rank."""
    device_name: str
    """Name of rank 0's device."""
    load_seconds: float
    """Time to make or read the weights."""


def measure_point(point: BenchPoint, options: BenchOptions) -> Measured:
    """Return the figures of a point; all its ranks call it, and get the same.

    Raises:
        InputError: The model cannot be read, cut or run so, or its numbers are not finite.
    """
    engine = _load(point, options)
    step = (_training if options.trains else _inference)(engine, options)
    for _ in range(options.warmup_steps - 1):
        step()
    with AllReduceCounter() as counter:
        step()
    calls = counter.counts
    seconds = time_steps(step, options.steps, engine.device)
    peak, busy_over_alone = products(engine.device, resolve_dtype(options.dtype))
    return Measured(
        step_seconds=seconds,
        peak_tflops=peak / 1e12,
        busy_over_alone=busy_over_alone,
        all_reduces=calls.total(),
        all_reduce_bytes=sum(n * size * dtype.itemsize for (size, dtype), n in calls.items()),
        all_reduce_seconds=time_all_reduces(calls, engine),
        threads=torch.get_num_threads(),
        device_name=device_name(engine.device),
        load_seconds=engine.load_seconds,
    )


# --- the model -----------------------------------------------------------------------------------


class Drawn(LazyTensor):
    """Initial weights of which only the part that is read is drawn.

    What tensor-parallel ranks share is the same on all of them. Their shards are other numbers than
    those of another tensor-parallel size: fit for timing, not for results.
    """

    def __init__(self, config: ModelConfig, parameter: Parameter, seed: int) -> None:
        self.shape, self.kind = parameter.shape, STORED_DTYPES["float32"]
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


def _load(point: BenchPoint, options: BenchOptions) -> Engine:
    if options.ckpt is not None:
        checkpoint = open_checkpoint(options.ckpt, parse_overrides(options.overrides))
    else:
        checkpoint = drawn_checkpoint(point.config, seed=options.seed)
    return Engine.load(
        checkpoint,
        tp=point.tp,
        dp=1,
        dtype="float32" if options.trains else options.dtype,
        device=f"cuda:{torch.cuda.current_device()}" if options.device == "cuda" else "cpu",
        batch_tokens=options.batch * options.row_length(checkpoint.config),
    )


# --- a step --------------------------------------------------------------------------------------


def _rows(engine: Engine, options: BenchOptions, *, more: int = 0) -> list[Tensor]:
    """Return the batch's rows of random tokens, the same on every rank, `more` tokens longer."""
    noise = torch.Generator().manual_seed(options.seed)
    shape = (options.batch, options.row_length(engine.config) + more)
    return list(torch.randint(engine.config.vocab_size, shape, generator=noise))


def _inference(engine: Engine, options: BenchOptions) -> Callable[[], object]:
    """Return a step of inference: log-probabilities of every position of the batch.

    They come back on the CPU, so the device has finished when it returns.
    """
    if engine.config.family == "bert":
        inputs = [BertInput(row) for row in _rows(engine, options)]
        return lambda: engine.encode(inputs, states=False, score=True)
    requests = [Request(row, len(row) - 1) for row in _rows(engine, options, more=1)]
    return lambda: engine.score(requests)


def _training(engine: Engine, options: BenchOptions) -> Callable[[], object]:
    """Return a step of training: forward, backward, clipping, update."""
    objective: Objective
    if engine.config.family == "gpt":
        objective = CausalLM()
        pairs = [(row[:-1], row[1:]) for row in _rows(engine, options, more=1)]
    else:
        objective = MaskedLM()
        pairs = [(row, _hidden(row)) for row in _rows(engine, options)]
    data = [
        Sample([row], [torch.zeros_like(row)], label, index)
        for index, (row, label) in enumerate(pairs)
    ]
    settings = TrainSettings(
        lr=LEARNING_RATE,
        global_batch=options.batch,
        micro_batch=options.forward_rows,
        hidden_dropout=options.hidden_dropout,
        attention_dropout=options.attention_dropout,
        dtype=options.dtype,
        seed=options.seed,
        recompute=options.recompute,
    )
    total = options.warmup_steps + options.steps
    schedule = Schedule(LEARNING_RATE, LEARNING_RATE, total, warmup=0.0)
    stepper = Stepper(engine, data, objective, settings, schedule, Counters())
    numbers = itertools.count()

    def step() -> None:
        number = next(numbers)
        result = stepper.take(number, list(range(options.batch)), updates=number, save_due=False)
        if result.broken:
            raise InputError(
                f"the loss of training step {number + 1} in {options.dtype} is not finite; "
                "try --dtype bfloat16 or float32"
            )

    return step


def _hidden(row: Tensor) -> Tensor:
    """Return labels of a masked language model; position 0 holds the order of the segments."""
    label = torch.full_like(row, NO_LABEL)
    label[0] = 0
    label[1::MASKED_EVERY] = row[1::MASKED_EVERY]
    return label


# --- clocks --------------------------------------------------------------------------------------


def _wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(seconds: list[float], device: torch.device) -> list[float]:
    """Return each of the times on its slowest rank."""
    times = torch.tensor(seconds, dtype=torch.float64, device=device)
    return list(max_over_ranks(times).tolist())


def _clock(run: Callable[[], object], device: torch.device, *, times: int = 1) -> float:
    """Return the seconds of a call, the mean over `times` of them in a row."""
    started = time.perf_counter()
    for _ in range(times):
        run()
    _wait(device)
    return (time.perf_counter() - started) / times


def time_steps(step: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Return the seconds of each step on its slowest rank; all ranks begin it together."""
    seconds = []
    for _ in range(count):
        _wait(device)
        barrier()
        seconds.append(_clock(step, device))
    return _slowest(seconds, device)


def products(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the operations a second of rank 0's fastest product, and busy over alone."""
    best, mean, side = 0.0, 0.0, 0
    barrier()
    if is_main():
        for tried in SIDES[device.type]:
            seconds = product_seconds(device, dtype, tried)
            if 2 * tried**3 / min(seconds) > best:
                best, side = 2 * tried**3 / min(seconds), tried
                mean = 2 * tried**3 * len(seconds) / sum(seconds)
            if min(seconds) > SLOW_PRODUCT:
                break
    if num_ranks() == 1:
        return best, 1.0
    best, mean, side = from_main((best, mean, side))
    barrier()
    seconds = product_seconds(device, dtype, side)
    busy = 2 * side**3 * len(seconds) / sum(seconds)
    total = sum_over_ranks(torch.tensor(busy, dtype=torch.float64, device=device))
    return best, float(total) / num_ranks() / mean


def product_seconds(device: torch.device, dtype: torch.dtype, side: int) -> list[float]:
    """Return how long products of two square matrices take, called as the model's layers call them.

    For `PRODUCT_SECONDS`, and at least two of them after one that does not count.
    """
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    burst = 10 if device.type == "cuda" else 1  # so that starting them does not count
    seconds: list[float] = []
    product = functools.partial(F.linear, left, right)
    product()
    _wait(device)
    end = time.perf_counter() + PRODUCT_SECONDS
    while len(seconds) < 2 or time.perf_counter() < end:
        seconds.append(_clock(product, device, times=burst))
    return seconds


def time_all_reduces(calls: AllReduceCounts, engine: Engine, repeats: int = 5) -> float:
    """Return the seconds of a model's sums of these sizes, one after the other, on all ranks."""
    total, device, tp = 0.0, engine.device, engine.mesh.tensor_parallel
    for (size, dtype), count in calls.items():
        tensor = torch.zeros(size, dtype=dtype, device=device)
        add = functools.partial(reduce_over_ranks, tensor, tp)
        add()  # the first one of a size may set up buffers
        _wait(device)
        barrier()
        total += count * _clock(add, device, times=repeats)
    return _slowest([total], device)[0]


def device_name(device: torch.device) -> str:
    """Return the device's product name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "CPU")
