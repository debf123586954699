"""How time and memory grow with the sequence, the layers, the ranks and the experts.

A small GPT scores one batch of 2,048 tokens in float32, on one thread a rank. Beside each measured
point stands what `mlm-eval plan` counts on: time as the operations of the pass at the rate of the
axis' reference point, memory and the bytes of all-reduces from the sizes alone. The best of some
runs counts, since what else runs can only slow one down. With more ranks than cores there is no
time. Writes the rows, a plot and a sentence for each axis to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common.memory import anonymous_bytes
from common.results import RESULTS, Row, publish
from load_memory import Peak

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.ranks import launch
from mlm_eval.ranks.world import detect_world

TOKENS = 2048
"""Of a batch."""
SCORED = 32
"""Tokens at the end of each row, as WikiText's windows have it."""
BASE = ModelConfig(
    family="gpt",
    num_layers=12,
    hidden_size=512,
    num_attention_heads=8,
    num_query_groups=8,
    kv_channels=64,
    ffn_hidden_size=2048,
    vocab_size=8192,
    max_position_embeddings=2048,
    activation="gelu_tanh",
)
WHY = {
    "sequence": "The operations count the whole square of attention, of which the causal kernel "
    "skips a half: long rows take less than planned.",
    "tp": "The plan counts operations alone: the ranks' sums come on top.",
}
"""What the models of `mlm-eval plan` leave out."""
CLOSE = 0.15
"""What a sentence calls close: the bound of plan_memory.py."""


@dataclass(frozen=True)
class Point:
    """A place on an axis."""

    value: int
    layers: int = 12
    length: int = 512
    tp: int = 1
    experts: int = 0

    @property
    def config(self) -> ModelConfig:
        """The model."""
        config = dataclasses.replace(BASE, num_layers=self.layers)
        if not self.experts:
            return config
        return dataclasses.replace(
            config,
            num_experts=self.experts,
            moe_layers=tuple(range(self.layers)),
            moe_ffn_hidden_size=1024,
            moe_router_topk=min(2, self.experts),
        )


CORES = os.cpu_count() or 1

AXES = {
    "sequence": [Point(n, length=n) for n in (256, 512, 1024, 2048)],
    "layers": [Point(n, layers=n) for n in (2, 6, 12, 24, 48)],
    "tp": [Point(n, tp=n) for n in (1, 2, 4)],
    "experts": [Point(n, layers=6, experts=n) for n in (1, 2, 4, 8, 16)],
}
REFERENCE = {"sequence": 512, "layers": 12, "tp": 1, "experts": 4}
"""The point of each axis whose rate the predicted times have."""


def measure_here(point: Point, report: Path, repeats: int, clock: Callable[[], float]) -> None:
    """Leave the seconds, the memory and the bytes sent of this rank in `report`."""
    world = detect_world()
    if world is not None:
        launch.prepare_worker()
    with launch.reporting_errors(world):
        if world is not None:
            launch.init_process_group(world, device="cpu")
        import torch

        from mlm_eval.engine.engine import Engine
        from mlm_eval.engine.score import Request
        from mlm_eval.planning.bench_run import drawn_checkpoint, time_all_reduces
        from mlm_eval.ranks.collectives import AllReduceCounter, barrier

        torch.set_num_threads(1)

        def start(point: Point, rows: int) -> tuple[Engine, list[Request]]:
            checkpoint = drawn_checkpoint(point.config, seed=1)
            engine = Engine.load(checkpoint, tp=point.tp, batch_tokens=TOKENS)
            tokens = torch.randint(BASE.vocab_size, (rows, point.length + 1))
            return engine, [Request(row, SCORED) for row in tokens]

        # What is imported and set up on the way is no part of a model.
        engine, requests = start(dataclasses.replace(point, layers=1, length=64), 1)
        engine.score(requests)
        del engine
        before = anonymous_bytes(os.getpid())
        with Peak() as peak:
            engine, requests = start(point, TOKENS // point.length)
            with AllReduceCounter() as counter:
                engine.score(requests)
            seconds = []
            for _ in range(repeats):
                barrier()
                started = clock()
                engine.score(requests)
                seconds.append(clock() - started)
        sending = time_all_reduces(counter.counts, engine) if point.tp > 1 else 0.0
        found = {
            "seconds": seconds,
            "memory": peak.bytes - before,
            "sending": sending,
            "flops": engine.flops(requests) / point.tp,
            "sent": sum(n * size * dtype.itemsize for (size, dtype), n in counter.counts.items()),
        }
        (report / f"rank{world.rank if world else 0}.json").write_text(json.dumps(found))
        launch.shutdown()


def measured(axis: str, point: Point, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a point: of the slowest and of the fullest rank."""
    words = ["--measure", axis, str(point.value), str(folder)]
    words += ["--repeats", str(options.repeats), *["--processor-time"] * options.processor_time]
    command = [sys.executable, __file__, *words]
    result = launch.launch([], ranks=point.tp, device="cpu", command=command)
    if result.exit_code:
        raise SystemExit(f"the ranks ended with {result.exit_code}: {result.message}")
    ranks = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(point.tp)]
    return dict(ranks[0]) | {"memory": max(rank["memory"] for rank in ranks)}


def planned_memory(point: Point) -> float:
    """Return the bytes of a rank by the model of `mlm-eval plan`."""
    from mlm_eval.model.costs.memory import evaluation_memory

    scored = TOKENS // point.length * SCORED
    return (
        evaluation_memory(
            point.config, tp=point.tp, itemsize=4, batch_tokens=TOKENS, scored_rows=scored
        )
        .on_cpu()
        .total
    )


def planned_bytes(point: Point) -> float:
    """Return the bytes of a rank's all-reduces: of states, two a layer and the embedding's.

    The last layer's two carry the scored rows alone; those of scores are a thousandth of it.
    """
    if point.tp == 1:
        return 0.0
    row = 4 * BASE.hidden_size
    return row * (TOKENS * (2 * point.layers - 1) + 2 * (TOKENS // point.length) * SCORED)


def rows_of(axis: str, points: list[Point], found: list[dict[str, Any]]) -> list[Row]:
    """Return measured figures beside planned ones."""
    (reference,) = (f for p, f in zip(points, found, strict=True) if p.value == REFERENCE[axis])
    rate = reference["flops"] / min(reference["seconds"])
    rows = []
    for point, figures in zip(points, found, strict=True):
        what = f"{axis} {point.value}"
        if point.tp <= CORES:
            planned = [figures["flops"] / rate]
            rows.append(Row(f"{what}, time", "planned", "s", [min(figures["seconds"])], planned))
        memory = [figures["memory"] / 1e6], [planned_memory(point) / 1e6]
        rows.append(Row(f"{what}, memory", "planned", "MB", *memory))
        if point.tp > 1:
            sent = [figures["sent"] / 1e6], [planned_bytes(point) / 1e6]
            rows.append(Row(f"{what}, all-reduces", "planned", "MB", *sent))
        if 1 < point.tp <= CORES:
            alone = [min(figures["seconds"])], [figures["sending"]]
            rows.append(Row(f"{what}, a batch", "its all-reduces by themselves", "s", *alone))
    return rows


def figures_of(rows: list[Row], kind: str) -> dict[str, tuple[float, float]]:
    """Return what was measured and planned at each point of an axis."""
    chosen = [row for row in rows if row.work.endswith(kind)]
    return {row.work.split(",")[0]: (row.ours[0], row.theirs[0]) for row in chosen}


def sentence(axis: str, rows: list[Row]) -> str:
    """Return whether an axis grows as planned, and where it does not.

    Memory is compared as a line: what a process has beside its model does not grow.
    """
    told = []
    for kind in ("time", "all-reduces"):
        found = figures_of(rows, kind)
        gaps = {at: ours / planned - 1 for at, (ours, planned) in found.items()}
        far = [f"{at.split()[1]} ({gap:+.0%})" for at, gap in gaps.items() if abs(gap) > CLOSE]
        if far:
            told.append(f"{kind} as planned but at {', '.join(far)}")
        elif gaps:
            told.append(f"{kind} as planned within {max(map(abs, gaps.values())):.1%}")
    ours, planned = zip(*figures_of(rows, "memory").values(), strict=True)
    if max(planned) - min(planned) < 1:
        told.append(
            f"memory the same at all points, as planned ({min(ours):.0f} to {max(ours):.0f} MB)"
        )
    else:
        slope, rest = statistics.linear_regression(planned, ours)
        told.append(f"memory {slope:.2f} MB for each planned one, and {rest:.0f} MB beside them")
    return f"{axis}: {'; '.join(told)}. {WHY.get(axis, '')}".strip()


def plot(axes: dict[str, list[Row]], path: Path) -> None:
    """Draw measured points and planned lines of each axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(axes), 6), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False)
    for column, (axis, rows) in enumerate(axes.items()):
        for line, (kind, unit) in enumerate((("time", "s"), ("memory", "MB"))):
            chosen = [row for row in rows if row.work.endswith(kind)]
            places = [int(row.work.split(",")[0].split()[-1]) for row in chosen]
            panel = panels[line][column]
            panel.plot(places, [statistics.median(r.theirs) for r in chosen], label="planned")
            panel.plot(places, [statistics.median(r.ours) for r in chosen], "o", label="measured")
            panel.set_xticks(places)
            panel.set_ylim(bottom=0)
            panel.set_xlabel(axis)
            panel.set_ylabel(f"{kind}, {unit}")
            panel.grid(alpha=0.3)
    panels[0][0].legend()
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument(
        "--processor-time", action="store_true", help="where other work runs beside"
    )
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        axis, value, folder = options.measure
        (point,) = (point for point in AXES[axis] if point.value == int(value))
        clock = time.process_time if options.processor_time else time.perf_counter
        measure_here(point, Path(folder), options.repeats, clock)
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as name:
        for axis in options.axes:
            figures = [measured(axis, p, Path(name), options) for p in AXES[axis]]
            found[axis] = rows_of(axis, AXES[axis], figures)
    said = "\n".join(f"- {sentence(axis, rows)}" for axis, rows in found.items())
    path = RESULTS / f"{datetime.date.today().isoformat()}-growth.png"
    plot(found, path)
    rows = [row for rows in found.values() for row in rows]
    settings = {
        "threads": "1 a rank",
        "tokens a batch": TOKENS,
        "time": "processor, best of" if options.processor_time else "wall, best of",
    }
    publish("growth", rows, settings, said=f"{said}\n\n![measured and planned]({path.name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
