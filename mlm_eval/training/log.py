"""What a run leaves to look at: metrics.jsonl, TensorBoard's files, a plot of loss and scores."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError, not_installed
from mlm_eval.checkpoints.files.output import atomic_file, write_text
from mlm_eval.checkpoints.files.text_file import json_value
from mlm_eval.training.trackers import TensorBoard, Trackers

METRICS_FILE = "metrics.jsonl"
PLOT = "training.png"
TENSORBOARD = "tensorboard"


class TrainingLog:
    """The logs of one run, written by rank 0.

    metrics.jsonl has a line for each step (`step` counts from 1: the steps done, `loss`, `lr`, ...)
    and for each evaluation (`step`, `evaluation`). A run that is resumed after step n drops what
    the killed one had written after it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        warn: Callable[[str], None],
        destinations: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the logs.

        Args:
            folder: Where they are.
            start: Steps done: later lines of an earlier run are dropped.
            warn: Takes a sentence for each log that is not written.
            destinations: Other trackers, as `--log` names them.
            config: Settings that they show beside the run.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.lines = [line for line in read_metrics(folder) if line["step"] <= start]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_text(folder / METRICS_FILE, text, option=None)
        self.stream = (folder / METRICS_FILE).open("a", encoding="utf-8")
        wanted = {"tensorboard": "the TensorBoard log of this run", "matplotlib": PLOT}
        missing = {package: what for package, what in wanted.items() if find_spec(package) is None}
        for package, what in missing.items():
            warn(f"{not_installed(package, what)}; training goes on without it")
        self.draws = "matplotlib" not in missing
        self.trackers = Trackers(
            [text for text in destinations if text not in ("tensorboard", "tensorboard:")],
            name=folder.resolve().name,
            config=config or {},
            folder=folder,
            warn=warn,
            start=start,
        )
        if "tensorboard" not in missing:
            self.trackers.add(TENSORBOARD, TensorBoard(folder / TENSORBOARD, start=start))

    def step(self, line: Mapping[str, Any]) -> None:
        """Note a step: its `step`, `epoch`, and numbers."""
        self._write(line)
        figures = {f"train/{name}": v for name, v in line.items() if name not in ("step", "epoch")}
        self.trackers.log(figures, line["step"])

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Note an evaluation: its `step`, `epoch`, and what was measured under `evaluation`."""
        self._write(line)
        figures = {f"dev/{name}": v for name, v in line["evaluation"].items() if is_number(v)}
        self.trackers.log(figures, line["step"])

    def _write(self, line: Mapping[str, Any]) -> None:
        self.lines.append(dict(line))
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()

    def sync(self) -> None:
        """Have everything on the disk: a state that is saved next must not be ahead of its log."""
        os.fsync(self.stream.fileno())
        self.trackers.flush()

    def close(self) -> None:
        """Write the plot and close the files."""
        self.stream.close()
        self.trackers.close()
        self.plot()

    def plot(self) -> None:
        """Write the plot of all steps so far, where there is something to draw with."""
        if self.draws:
            plot(self.lines, self.folder / PLOT)


def is_number(value: Any) -> bool:
    """Return whether a value is a plain number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; the last one of a killed run may be cut off.

    Raises:
        InputError: Another line is damaged, or the file cannot be read.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    texts = path.read_bytes().splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json_value(text)
            if not isinstance(line, dict) or not isinstance(line["step"], int):
                raise ValueError("no step")
        except (ValueError, KeyError, RecursionError):
            if number == len(texts):
                break
            raise InputError(
                f"{path}, line {number}, is not of a training run; discard the run with --restart, "
                "or choose another output folder"
            ) from None
        lines.append(line)
    return lines


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss of steps and evaluations, and below it the evaluations' shares (accuracies)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line for line in lines if "evaluation" not in line]
    scores = _by_name(lines)
    shares = {
        name: points
        for name, points in scores.items()
        if name != "score" and all(0.0 <= value <= 1.0 for _, value in points)
    }
    shares.pop("loss", None)
    figure = Figure(figsize=(8, 6 if shares else 4), layout="constrained")
    axes = figure.subplots(2 if shares else 1, 1, sharex=True, squeeze=False)[:, 0]
    x, y = [line["step"] for line in steps], [line["loss"] for line in steps]
    axes[0].plot(x, y, color="tab:blue", alpha=0.3, linewidth=1, label="loss of a step")
    axes[0].plot(x, smoothed(y), color="tab:blue", label="smoothed")
    if "loss" in scores:
        axes[0].plot(*zip(*scores["loss"], strict=True), "o-", color="tab:red", label="dev")
    axes[0].set_ylabel("loss")
    for name, points in shares.items():
        axes[1].plot(*zip(*points, strict=True), "o-", label=name)
        axes[1].set_ylabel("dev")
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic_file(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))


def _by_name(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of each number of the evaluations."""
    points: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.get("evaluation", {}).items():
            if is_number(value):
                points.setdefault(name, []).append((line["step"], float(value)))
    return points


def smoothed(values: list[float]) -> list[float]:
    """Return the running mean of the last 5% of the values, but at least of 10 where there are."""
    width = max(10, len(values) // 20)
    sums = [0.0, *itertools.accumulate(values)]
    ends = range(1, len(sums))
    return [(sums[end] - sums[max(0, end - width)]) / min(end, width) for end in ends]
