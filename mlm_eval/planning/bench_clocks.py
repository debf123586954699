"""What `bench` times: steps on all ranks, matrix products, all-reduces by themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from mlm_eval.ranks.collectives import (
    AllReduceCounts,
    barrier,
    from_main,
    max_over_ranks,
    sum_over_ranks,
)
from mlm_eval.ranks.mesh import is_main, num_ranks

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


def _slowest(seconds: list[float], device: torch.device) -> list[float]:
    """Return each of the times on its slowest rank."""
    largest: list[float] = max_over_ranks(
        torch.tensor(seconds, dtype=torch.float64, device=device)
    ).tolist()
    return largest


def time_steps(step: Callable[[], None], count: int, device: torch.device) -> list[float]:
    """Return the seconds of each step on its slowest rank; all ranks begin it together."""
    seconds = []
    for _ in range(count):
        _wait(device)
        barrier()
        started = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return _slowest(seconds, device)


def products(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the operations a second of rank 0's fastest product, and busy over alone."""
    size = num_ranks()
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
    if size == 1:
        return best, 1.0
    best, mean, side = from_main((best, mean, side))
    barrier()
    seconds = product_seconds(device, dtype, side)
    busy = 2 * side**3 * len(seconds) / sum(seconds)
    total = sum_over_ranks(torch.tensor(busy, dtype=torch.float64, device=device))
    return best, float(total) / size / mean


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


def time_all_reduces(calls: AllReduceCounts, device: torch.device, repeats: int = 5) -> float:
    """Return the seconds of all-reduces of these sizes, one after the other; all ranks call it."""
    total = 0.0
    for (size, dtype), count in calls.items():
        tensor = torch.zeros(size, dtype=dtype, device=device)
        sum_over_ranks(tensor)  # the first one of a size may set up buffers
        _wait(device)
        barrier()
        started = time.perf_counter()
        for _ in range(repeats):
            sum_over_ranks(tensor)
        _wait(device)
        total += count * (time.perf_counter() - started) / repeats
    return _slowest([total], device)[0]


def device_name(device: torch.device) -> str:
    """Return what people call the device."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "CPU")
