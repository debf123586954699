"""What a run leaves to look at: metrics.jsonl, TensorBoard's files, a plot of loss and scores."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
PLOT = "training.png"
TENSORBOARD = "tensorboard"


class TrainingLog:
    """The logs of one run, written by rank 0.

    metrics.jsonl has a line for each step (`step` counts from 1: the steps done, `loss`, `lr`, ...)
    and for each evaluation (`step`, `evaluation`). A run that goes on from step n drops what the
    killed one had written after it.
    """

    def __init__(self, folder: Path, *, start: int) -> None:
        """Open the logs.

        Args:
            folder: Where they are.
            start: Steps done: later lines of an earlier run are dropped.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.lines = [line for line in read_metrics(folder) if line["step"] <= start]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        beside = folder / (METRICS + ".part")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, folder / METRICS)
        self.stream = (folder / METRICS).open("a", encoding="utf-8")
        self.board: Any = SummaryWriter(str(folder / TENSORBOARD), purge_step=start + 1)  # type: ignore[no-untyped-call]

    def step(self, line: Mapping[str, Any]) -> None:
        """Note a step: its `step`, `epoch`, and numbers."""
        self._write(line)
        for name, value in line.items():
            if name not in ("step", "epoch"):
                self.board.add_scalar(f"train/{name}", value, line["step"])

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Note an evaluation: its `step`, `epoch`, and what was measured under `evaluation`."""
        self._write(line)
        for name, value in line["evaluation"].items():
            if is_number(value):
                self.board.add_scalar(f"dev/{name}", value, line["step"])

    def _write(self, line: Mapping[str, Any]) -> None:
        self.lines.append(dict(line))
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()

    def sync(self) -> None:
        """Have everything on the disk: a state that is saved next must not be ahead of its log."""
        os.fsync(self.stream.fileno())
        self.board.flush()

    def close(self) -> None:
        """Write the plot and close the files."""
        self.stream.close()
        self.board.close()
        self.plot()

    def plot(self) -> None:
        """Write the plot of all steps so far."""
        plot(self.lines, self.folder / PLOT)


def is_number(value: Any) -> bool:
    """Return whether a value is a plain number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; the last one of a killed run may be cut off."""
    path = folder / METRICS
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw loss by step, smoothed too, and the scores of the evaluations below it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line for line in lines if "evaluation" not in line]
    evaluations = [line for line in lines if "evaluation" in line]
    names = sorted(
        {name for line in evaluations for name, v in line["evaluation"].items() if is_number(v)}
    )
    if len(names) > 1:  # it repeats one of the others
        names = [name for name in names if name != "score"]
    figure = Figure(figsize=(8, 6 if names else 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2 if names else 1, 1, sharex=True, squeeze=False)[:, 0]
    x, y = [line["step"] for line in steps], [line["loss"] for line in steps]
    axes[0].plot(x, y, color="tab:blue", alpha=0.3, linewidth=1, label="loss of a step")
    axes[0].plot(x, smoothed(y), color="tab:blue", label="smoothed")
    axes[0].set_ylabel("training loss")
    axes[0].legend()
    if names:
        for name in names:
            marked = [line for line in evaluations if is_number(line["evaluation"].get(name))]
            scores = [line["evaluation"][name] for line in marked]
            axes[1].plot([line["step"] for line in marked], scores, marker="o", label=name)
        axes[1].set_ylabel("dev")
        axes[1].legend()
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.3)
    beside = path.with_name(path.stem + ".part.png")
    canvas.print_png(str(beside))
    os.replace(beside, path)


def smoothed(values: list[float]) -> list[float]:
    """Return the running mean of the last 5% of the values, but at least of 10 where there are."""
    width = max(10, len(values) // 20)
    result = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        result.append(total / min(index + 1, width))
    return result
