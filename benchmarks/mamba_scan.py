"""Mamba-2's scan over chunks against a loop over positions, on the CPU: time and distance.

Both take the same inputs (2,048 positions, 1,024 channels in 16 heads, states of 128, float32) and
are timed alternately in one run. The loop computes all heads at once. Distances are the largest
difference from the loop in float64, relative to the largest value. Exits with 1 when the scan is
not 20 times faster, or further away than 1e-5.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_eval.engine.products import float32_products
from mlm_eval.model.mamba import scan

LEAST_SPEEDUP, MOST_DISTANCE = 20.0, 1e-5

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""x `[1, seq, heads, channels]`, dt `[1, seq, heads]`, A `[heads]`, B and C `[1, seq, G, N]`."""


def draw(length: int, heads: int, channels: int, groups: int, states: int) -> Inputs:
    """Return inputs; the time steps and decays are those of trained models, and longer ones."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, heads, channels, generator=noise)
    dt = F.softplus(2 * torch.randn(1, length, heads, generator=noise))
    A = -torch.empty(heads).uniform_(1, 16, generator=noise)
    B, C = (torch.randn(1, length, groups, states, generator=noise) for _ in range(2))
    return x, dt, A, B, C


@float32_products()
def by_chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return the scan's outputs, with the products of the engine."""
    heads, groups = x.shape[2], B.shape[2]
    state = x.new_zeros(len(x), groups, B.shape[3], heads // groups, x.shape[3])
    return scan(x, dt, A, B, C, state)[0]


def by_positions(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return the same, a position at a time, all heads at once."""
    per_group = x.shape[2] // B.shape[2]
    B, C = (part.repeat_interleave(per_group, dim=2) for part in (B, C))  # [1, t, h, n]
    decays, inputs = (dt * A).exp(), x * dt[..., None]
    state = x.new_zeros(len(x), *x.shape[2:], B.shape[3])  # [1, h, p, n]
    rows = []
    for t in range(x.shape[1]):
        added = inputs[:, t, :, :, None] * B[:, t, :, None]
        state = state * decays[:, t, :, None, None] + added
        rows.append((state @ C[:, t, :, :, None]).squeeze(-1))
    return torch.stack(rows, dim=1)


def seconds(function: Callable[..., Tensor], inputs: Inputs, *, of_processor: bool) -> float:
    """Return the time of one call; or the processor's, which other work does not count in."""
    clock = time.process_time if of_processor else time.perf_counter
    started = clock()
    function(*inputs)
    return clock() - started


def main() -> None:
    """Print a row for each number of groups."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's time, where other work runs beside; with --threads 1",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.length} positions")
    missed = False
    for groups in options.groups:
        inputs = draw(options.length, 16, 64, groups, 128)
        a, b, c, d, e = (part.double() for part in inputs)
        exact = by_positions(a, b, c, d, e)
        with torch.inference_mode():
            gaps = [
                ((function(*inputs) - exact).abs().max() / exact.abs().max()).item()
                for function in (by_positions, by_chunks)
            ]
            pairs = [
                tuple(
                    seconds(function, inputs, of_processor=options.processor_time)
                    for function in (by_positions, by_chunks)
                )
                for _ in range(options.repeats)
            ]
        loops, scans = zip(*pairs, strict=True)
        ratio = statistics.median(loop / scan for loop, scan in pairs)
        for name, times, gap in (("loop", loops, gaps[0]), ("scan", scans, gaps[1])):
            print(
                f"{groups} group(s), {name}: median {statistics.median(times) * 1e3:.1f} ms "
                f"({min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}), off by {gap:.1e}"
            )
        print(f"{groups} group(s): {ratio:.1f} times faster (median of the pairs)")
        missed |= ratio < LEAST_SPEEDUP or gaps[1] > MOST_DISTANCE
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
