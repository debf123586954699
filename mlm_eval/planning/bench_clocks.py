"""What `bench` times: steps on all ranks, matrix products, all-reduces by themselves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
"""Sides of the square matrices whose products are timed; the fastest is the peak."""

PRODUCT_SECONDS = 0.5
"""At least so long is a product of one size repeated."""

SLOW_PRODUCT = 2.0
"""Seconds of a product after which no larger one is tried (float16 on some CPUs)."""


def _wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def _over_ranks(values: list[float], op: Any, device: torch.device) -> list[float]:
    """Return each value's sum, or largest, over the ranks."""
    together = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(together, op=op)
    result: list[float] = together.tolist()
    return result


def time_steps(step: Callable[[], None], count: int, device: torch.device) -> list[float]:
    """Return the seconds of each step on its slowest rank; all ranks begin it together."""
    seconds = []
    for _ in range(count):
        _wait(device)
        _meet()
        started = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return _over_ranks(seconds, dist.ReduceOp.MAX, device)


def products(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the operations a second of rank 0's fastest product, and busy over alone."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    best, mean, side = 0.0, 0.0, 0
    _meet()
    if size == 1 or dist.get_rank() == 0:
        for tried in SIDES[device.type]:
            seconds = product_seconds(device, dtype, tried)
            if 2 * tried**3 / min(seconds) > best:
                best, side = 2 * tried**3 / min(seconds), tried
                mean = 2 * tried**3 * len(seconds) / sum(seconds)
            if min(seconds) > SLOW_PRODUCT:
                break
    if size == 1:
        return best, 1.0
    best, mean, chosen = _over_ranks([best, mean, float(side)], dist.ReduceOp.SUM, device)
    side = int(chosen)
    _meet()
    seconds = product_seconds(device, dtype, side)
    busy = 2 * side**3 * len(seconds) / sum(seconds)
    (total,) = _over_ranks([busy], dist.ReduceOp.SUM, device)
    return best, total / size / mean


def product_seconds(device: torch.device, dtype: torch.dtype, side: int) -> list[float]:
    """Return how long products of two square matrices take, called as the model's layers call them.

    For `PRODUCT_SECONDS`, and at least two of them after one that does not count.
    """
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    burst = 10 if device.type == "cuda" else 1  # so that starting them does not count
    seconds: list[float] = []
    F.linear(left, right)
    _wait(device)
    end = time.perf_counter() + PRODUCT_SECONDS
    while len(seconds) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        for _ in range(burst):
            F.linear(left, right)
        _wait(device)
        seconds.append((time.perf_counter() - started) / burst)
    return seconds


Calls = Counter[tuple[int, torch.dtype]]
"""How many all-reduces there were of each (number of values, dtype)."""


@contextmanager
def noting_all_reduces() -> Iterator[Calls]:
    """Count the all-reduces of the body: what they carry depends on dtype, mode and dropout."""
    calls: Calls = Counter()
    all_reduce = dist.all_reduce

    def noting(tensor: Tensor, *args: Any, **named: Any) -> Any:
        calls[tensor.numel(), tensor.dtype] += 1
        return all_reduce(tensor, *args, **named)

    dist.all_reduce = noting
    try:
        yield calls
    finally:
        dist.all_reduce = all_reduce


def time_all_reduces(calls: Calls, device: torch.device, repeats: int = 5) -> float:
    """Return the seconds of all-reduces of these sizes, one after the other; all ranks call it."""
    total = 0.0
    for (size, dtype), count in calls.items():
        tensor = torch.zeros(size, dtype=dtype, device=device)
        dist.all_reduce(tensor)  # the first one of a size may set up buffers
        _wait(device)
        dist.barrier()
        started = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(tensor)
        _wait(device)
        total += count * (time.perf_counter() - started) / repeats
    return max(_over_ranks([total], dist.ReduceOp.MAX, device))


def device_name(device: torch.device) -> str:
    """Return what people call the device."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "CPU")
