"""Whether a series of measurements fits the free memory, and the largest scale at which it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mlm_eval.checkpoints.dtypes import resolve_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.model.memory import TrainingBatch, evaluation_memory, training_memory
from mlm_eval.planning.bench import Job, predicted_rows
from mlm_eval.planning.bench_series import BenchOptions, Layout, Series, make_job
from mlm_eval.planning.plan import OUTSIDE

PROCESS = 300 * 10**6
"""Bytes of a rank on the CPU without a model: Python and torch, gloo's buffers, the matrices whose
product is timed."""

SCALES = tuple(percent / 100 for percent in range(100, 4, -5))
"""What `--scale auto` chooses from."""


def rank_bytes(layout: Layout, job: Job) -> int:
    """Return what each rank of a layout needs, what is there before the model included."""
    config, itemsize = layout.config, resolve_dtype(job.dtype).itemsize
    predicted = predicted_rows(config, job.seq_length, mode=job.mode)
    if job.mode == "train":
        batch = TrainingBatch(
            rows=job.micro_batch,
            length=job.seq_length,
            predicted=predicted * job.micro_batch,
            hidden_dropout=job.hidden_dropout,
            attention_dropout=job.attention_dropout,
            half=job.dtype != "float32",
            recompute=job.recompute,
            accumulates=job.micro_batch < job.batch,
        )
        need = training_memory(config, batch, tp=layout.tp)
    else:
        need = evaluation_memory(
            config,
            tp=layout.tp,
            itemsize=itemsize,
            batch_tokens=job.batch * job.seq_length,
            scored_rows=job.batch * predicted,
        )
    return need.on_cpu().total + PROCESS if job.device == "cpu" else need.total + OUTSIDE


def free_bytes(device: str, ranks: int) -> int:
    """Return the memory that each of some ranks may take: an equal share on the CPU.

    Raises:
        InputError: There are fewer GPUs than ranks.
    """
    if device == "cpu":
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        (available,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return available * 1024 // ranks
    import torch

    count = torch.cuda.device_count()
    if ranks > count:
        raise InputError(
            f"tp {ranks} needs {ranks} GPUs, one for each rank, but {count} can be seen; leave it "
            "out of --tp, or use --device cpu"
        )
    return min(torch.cuda.mem_get_info(index)[0] for index in range(ranks))


def first_misfit(series: Series, jobs: Sequence[Job], local_ranks: int | None = None) -> str | None:
    """Return what does not fit the free memory, as a sentence's beginning; None if all does.

    Args:
        series: The layouts.
        jobs: Their measurements.
        local_ranks: Ranks that share this machine; None: all of a layout.
    """
    for layout, job in zip(series.layouts, jobs, strict=True):
        ranks = min(layout.tp, local_ranks or layout.tp)
        need, free = rank_bytes(layout, job), free_bytes(job.device, ranks)
        if need > free:
            each = f" on each of {ranks} ranks" if ranks > 1 else ""
            share = " for each" if ranks > 1 else ""
            return (
                f"tp {layout.tp} ({layout.model}) needs {need / 1e9:.1f} GB{each}, "
                f"{free / 1e9:.1f} GB are free{share}"
            )
    return None


def fit(
    make: Callable[[float], Series],
    options: BenchOptions,
    *,
    scale: float | None,
    local_ranks: int | None = None,
) -> tuple[Series, list[Job]]:
    """Return a series that fits the free memory, and the measurements of its layouts.

    Args:
        make: Returns the series at a scale.
        options: How to measure.
        scale: Its factor; None: the largest one that fits.
        local_ranks: Ranks that share this machine; None: all of a layout.

    Raises:
        InputError: It does not fit, or cannot be run so.
    """
    misfit = None
    for factor in SCALES if scale is None else (scale,):
        series = make(factor)
        jobs = [make_job(layout, options) for layout in series.layouts]
        misfit = first_misfit(series, jobs, local_ranks)
        if misfit is None:
            return series, jobs
    less = "leave it out of --tp, or give a smaller --batch or --seq-length"
    if options.mode == "train":
        less += ", a --micro-batch, or --recompute"
    if scale is not None and options.ckpt is None:
        less = f"shrink the models with --scale (auto finds out how much), or {less}"
    raise InputError(f"{misfit}; {less}")
