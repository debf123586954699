"""WikiText-103's windows against the loop of transformers' documentation, the peak, and two ranks.

A GPT-2 of 124M parameters with random weights scores the last 32 tokens of windows of 1,024, by
`Engine.score` and by the loop (https://huggingface.co/docs/transformers/perplexity) at its best
batch size, in turns; both must find the same loss. The peak is that of the largest product of the
model, by the fastest library that torch has. Then two ranks of one thread against one process of
two, each pair in new processes. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common.results import Row, alternate, publish

import mlm_eval
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.score import Request
from mlm_eval.ranks import launch
from mlm_eval.ranks.collectives import barrier
from mlm_eval.ranks.world import detect_world

LENGTH, STRIDE = 1024, 32
TARGETS = {"float32": (2.0, 0.75), "bfloat16": (4.0, 0.5)}
"""Against the loop; of the peak."""
RANK_TARGETS = {"float32": 1.0, "bfloat16": 0.9}
"""Of two ranks of one thread, against one process of two."""
RANKS, REPEATS = 2, 5
PARTS = ("loop", "ranks")


def documented_loop(model: Any, tokens: Tensor, batch: int) -> float:
    """Return the mean loss of the last tokens of each window, as the documentation computes it."""
    losses: list[float] = []
    with torch.no_grad():
        for start in range(0, len(tokens), batch):
            ids = tokens[start : start + batch, :-1]
            targets = ids.clone()
            targets[:, :-STRIDE] = -100
            losses += [model(ids, labels=targets).loss.item()] * len(ids)
    return statistics.mean(losses)


def our_loss(engine: Engine, tokens: Tensor) -> float:
    """Return the same of the engine.

    The documentation's loop scores the last tokens of its inputs: a window's last token is not
    seen by either.
    """
    requests = [Request(row[:-1], STRIDE) for row in tokens]
    return float(-engine.score(requests).logprobs.double().mean())


def peak(dtype: torch.dtype, seconds: Any) -> float:
    """Return the operations a second of the model's largest product, the best of two libraries."""
    x, weight = torch.randn(2048, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
    with torch.inference_mode():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        works = (
            lambda: F.linear(x, weight),
            lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        )
        best = min(statistics.median(seconds(work) for _ in range(15)) for work in works)
    return float(2 * x.shape[0] * weight.numel() / best)


def against_the_loop(folder: str, name: str, options: argparse.Namespace) -> list[Row]:
    """Return the rows of a dtype against the loop and against the peak."""
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(options.threads)
    clock = time.process_time if options.processor_time else time.perf_counter

    def seconds(work: Any) -> float:
        started = clock()
        work()
        return clock() - started

    tokens = windows(options.windows)
    dtype = getattr(torch, name)
    engine = Engine.load(mlm_eval.open_checkpoint(folder), dtype=dtype, device="cpu")
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    sizes = [size for size in (1, 2, 4) if size <= options.windows]
    times = {size: seconds(lambda s=size: documented_loop(model, tokens, s)) for size in sizes}
    batch = min(times, key=times.__getitem__)
    gap = abs(our_loss(engine, tokens) - documented_loop(model, tokens, batch))
    if gap > (1e-4 if name == "float32" else 2e-2):
        raise SystemExit(f"the losses differ by {gap}: this is not the same work")
    ours, theirs = alternate(
        lambda: our_loss(engine, tokens),
        lambda: documented_loop(model, tokens, batch),
        pairs=options.pairs,
        processor=options.processor_time,
    )
    work = f"windows of {LENGTH}, stride {STRIDE}, {name}"
    to_loop, to_peak = TARGETS[name]
    flops = engine.flops([Request(row[:-1], STRIDE) for row in tokens])
    rates = [1e-9 * flops / time for time in ours]
    peaks = [1e-9 * peak(dtype, seconds) for _ in ours]
    return [
        Row(work, f"documented loop, batch {batch}", "s", ours, theirs, to_loop),
        # Of the peak: the ratio is ours / theirs, so the two change places.
        Row(work, "peak of a product", "GFLOP/s", peaks, rates, to_peak),
    ]


def windows(count: int) -> Tensor:
    """Return windows of random tokens."""
    return torch.randint(50257, (count, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def of_ranks(folder: str, name: str, options: argparse.Namespace) -> Row:
    """Return the row of two ranks of one thread against one process of two threads."""
    report = Path(folder) / "report.json"
    words = ["--measure", folder, name, str(report), "--windows", str(options.windows)]
    command = [sys.executable, __file__, *words]

    def seconds(ranks: int) -> float:
        os.environ["OMP_NUM_THREADS"] = str(RANKS // ranks)
        if ranks == 1:
            subprocess.run(command, check=True)
        elif (result := launch.launch([], ranks=ranks, device="cpu", command=command)).exit_code:
            raise SystemExit(f"the ranks ended with {result.exit_code}: {result.message}")
        return float(json.loads(report.read_text()))

    pairs = [(seconds(RANKS), seconds(1)) for _ in range(options.pairs)]
    ours, theirs = (list(times) for times in zip(*pairs, strict=True))
    work = f"two ranks of one thread, windows, {name}"
    return Row(work, "one process of two threads", "s", ours, theirs, RANK_TARGETS[name])


def measure_here(folder: str, name: str, report: str, count: int) -> None:
    """Leave the seconds of scoring in `report`, of all ranks, or of this process alone.

    The best of some: whatever else runs stops a rank, and the others with it.
    """
    world = detect_world()
    if world is not None:
        launch.prepare_worker()
    with launch.reporting_errors(world):
        if world is not None:
            launch.init_process_group(world, device="cpu")
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        engine = Engine.load(
            mlm_eval.open_checkpoint(folder), tp=world.size if world else 1, dtype=name
        )
        tokens = windows(count)
        our_loss(engine, tokens)
        times = []
        for _ in range(REPEATS):
            barrier()
            started = time.perf_counter()
            our_loss(engine, tokens)
            times.append(time.perf_counter() - started)
        if engine.is_main:
            Path(report).write_text(json.dumps(min(times)))
        launch.shutdown()


def main() -> int:
    """Measure; print; return 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="beside the loop")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtypes", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="where other work runs beside; with --threads 1, and not of ranks",
    )
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, name, report = options.measure
        measure_here(folder, name, report, options.windows)
        return 0
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {"windows": options.windows, "layers": options.layers}
    time_of_loop = "processor" if options.processor_time else "wall"
    torch.manual_seed(1)
    met = True
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config(n_layer=options.layers)).save_pretrained(folder)
        for name in options.dtypes:
            if "loop" in options.parts:
                rows = against_the_loop(folder, name, options)
                how = {"threads": options.threads, **settings, "time": time_of_loop}
                met &= publish(f"windows, {name}", rows, how)
            if "ranks" in options.parts:
                row = of_ranks(folder, name, options)
                met &= publish(f"windows on ranks, {name}", [row], settings | {"time": "wall"})
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
