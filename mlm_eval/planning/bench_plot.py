"""The plot of a measured series: its scaling beside the paper's, a rank's rate and the peak."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.files.output import atomic_file
from mlm_eval.planning.bench_report import headline, how, notes, rate_unit
from mlm_eval.planning.bench_study import WEAK
from mlm_eval.reporting.tables import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURED_COLOUR, PAPER_COLOUR = "tab:blue", "tab:gray"

NOTE_SIZE = 7.5
"""Points; a line of notes has room for about `NOTE_COLUMNS` letters of that size."""
NOTE_COLUMNS = 190


def plot_bench(record: Mapping[str, Any], path: Path) -> None:
    """Draw a record of `mlm-eval bench` as a PNG file, with the sentences of the record below.

    Raises:
        InputError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    told = [f"step: {how(record)}"]
    for title, sentences in notes(record):
        told += [title, *(f"    {sentence}" for sentence in sentences)]
    lines = [
        line
        for text in told
        for line in textwrap.wrap(text, NOTE_COLUMNS, subsequent_indent="      ")
    ]
    height = 4.4 + len(lines) * NOTE_SIZE * 1.25 / 72
    figure = Figure(figsize=(10, height), layout="constrained")
    panels = [_rates]
    if len(record["points"]) > 1:
        panels.insert(0, _weak if record["settings"]["study"] == WEAK else _strong)
    for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(axes, record)
    figure.suptitle(headline(record), fontsize=12, fontweight="bold")
    figure.supxlabel("\n".join(lines), fontsize=NOTE_SIZE, x=0.01, ha="left")
    with atomic_file(path, option="--plot") as partial:
        FigureCanvasAgg(figure).print_png(str(partial))


def _places(axes: Axes, record: Mapping[str, Any]) -> range:
    """Label a place for each point with its size and model; return the places."""
    points = record["points"]
    labels = [f"tp {point['tp']}\n{short_count(point['parameters'])}" for point in points]
    axes.set_xticks(range(len(points)), labels)
    axes.set_xlim(-0.6, len(points) - 0.4)
    axes.set_xlabel("tensor-parallel size, parameters")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return range(len(points))


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize="small"
    )


def _shown(record: Mapping[str, Any], name: str) -> list[tuple[int, float]]:
    """Return (place, figure) of the points that have it."""
    return [(i, p[name]) for i, p in enumerate(record["points"]) if p[name] is not None]


def _weak(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw bars of efficiencies, as the paper's Figure 5 has them."""
    _places(axes, record)
    kinds = [
        ("measured", "efficiency", MEASURED_COLOUR),
        ("paper", "published_relative", PAPER_COLOUR),
    ]
    for shift, (label, name, colour) in zip((-0.2, 0.2), kinds, strict=True):
        shown = _shown(record, name)
        if shown:
            x, y = [place + shift for place, _ in shown], [100 * share for _, share in shown]
            axes.bar_label(axes.bar(x, y, width=0.36, color=colour, label=label), fmt="%.0f%%")
    axes.set_ylabel("weak scaling efficiency (%)")
    axes.margins(y=0.1)
    _legend(axes)


def _strong(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw lines of speed-ups beside the ideal one."""
    points = record["points"]
    places = _places(axes, record)
    ideal = [point["tp"] / points[0]["tp"] for point in points]
    axes.plot(places, ideal, ":", color="black", label="ideal")
    kinds = [
        ("paper", "published_relative", PAPER_COLOUR, 7),
        ("measured", "speedup", MEASURED_COLOUR, -14),
    ]
    for label, name, colour, above in kinds:
        shown = _shown(record, name)
        if shown:
            axes.plot(*zip(*shown, strict=True), "o-", color=colour, label=label)
            for x, y in shown[1:]:  # the first is 1 by definition
                axes.annotate(
                    f"{y:.2f}",
                    (x, y),
                    xytext=(0, above),
                    textcoords="offset points",
                    ha="center",
                    color=colour,
                )
    axes.set_ylabel("speed-up of the same step")
    axes.set_ylim(0, 1.1 * max([*ideal, *(y for _, y in _shown(record, "speedup"))]))
    _legend(axes)


def _rates(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw a rank's rate below the peak of its matrix products, alone and with all ranks busy."""
    points = record["points"]
    factor, unit = rate_unit(points)
    places = _places(axes, record)
    rates = [point["tflops_per_rank"] * factor for point in points]
    peaks = [point["peak_tflops"] * factor for point in points]
    bars = axes.bar(places, rates, width=0.5, color=MEASURED_COLOUR, label="the model's step")
    axes.bar_label(bars, [f"{p['share_of_peak']:.0%} of peak" for p in points], padding=2)
    left, right = [place - 0.3 for place in places], [place + 0.3 for place in places]
    axes.hlines(peaks, left, right, color="black", label="matrix product, alone")
    if points[-1]["tp"] > 1:
        busy = [peak * point["busy_over_alone"] for peak, point in zip(peaks, points, strict=True)]
        name = "with all ranks busy"
        axes.hlines(busy, left, right, color="tab:red", linestyles="dashed", label=name)
    axes.set_ylabel(f"{unit} of a rank")
    axes.set_ylim(0, max([*rates, *peaks]) * 1.1)
    _legend(axes)
