"""Mamba-2's scan over chunks against a loop over positions, on the CPU: time and distance.

Both take the same inputs (2,048 positions, 1,024 channels in 16 heads, states of 128, float32) and
are timed alternately in one run, one call of the loop and ten of the scan, which take about as
long. (A scan alone after the loop finds the caches full of the loop's states: --scans 1 measures
that.) The loop computes all heads at once. Distances are the largest difference from the loop in
float64, relative to the largest value. Exits with 1 when the scan of one group is not 20 times
faster, or one is further away than 1e-5. (Of eight groups the scan has a fifth more products, and
moves almost twice as much; the loop takes no longer.)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common.results import Row, publish

from mlm_eval.checkpoints.memory.host import keep_freed_memory
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


def seconds(
    function: Callable[..., Tensor], inputs: Inputs, calls: int, *, of_processor: bool
) -> float:
    """Return the mean time of calls; or the processor's, which other work does not count in."""
    clock = time.process_time if of_processor else time.perf_counter
    started = clock()
    for _ in range(calls):
        function(*inputs)
    return (clock() - started) / calls


def main() -> None:
    """Print a row for each number of groups."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--scans", type=int, default=10, help="calls of the scan for one loop")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's time, where other work runs beside; with --threads 1",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as an engine does when it has loaded a model
    rows, far = [], False
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
                    seconds(function, inputs, calls, of_processor=options.processor_time)
                    for function, calls in ((by_chunks, options.scans), (by_positions, 1))
                )
                for _ in range(options.repeats)
            ]
        scans, loops = (list(times) for times in zip(*pairs, strict=True))
        work = f"Mamba-2 scan, {groups} group(s)"
        target = LEAST_SPEEDUP if groups == 1 else None
        rows.append(Row(work, "float32 loop over positions", "s", scans, loops, target))
        print(f"{groups} group(s): the loop is off by {gaps[0]:.1e}, the scan by {gaps[1]:.1e}")
        far |= gaps[1] > MOST_DISTANCE
    settings = {
        "threads": options.threads,
        "positions": options.length,
        "scans for one loop": options.scans,
        "time": "processor" if options.processor_time else "wall",
    }
    met = publish("mamba_scan", rows, settings)
    sys.exit(1 if far or not met else 0)


if __name__ == "__main__":
    main()
