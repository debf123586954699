"""Curves: figures over training, a line for each run, the paper's figure as a level.

The horizontal axis counts iterations. Samples and tokens are further scales of the same axis where
they are in one proportion to the iterations in all runs; else they get panels of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.reporting.plots import svg_element
from mlm_eval.reporting.tables import Column, TaskRow, TaskTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Curves, measured by mlm-eval"
"""What the picture's file says of itself."""

AXES = {
    "iteration": "iteration",
    "samples": "samples trained on",
    "tokens": "tokens trained on",
}
"""Field of a row's place -> what stands at its axis."""

LOGARITHMIC_FROM = 5.0
"""Perplexities whose largest is so many times the smallest are drawn on a logarithmic axis."""


def curve_png(comparisons: Sequence[TaskTable], path: Path) -> None:
    """Draw the curves of all comparisons into one picture."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with rc_context({"font.size": 10}):
        figure = draw_curves(comparisons)
        FigureCanvasAgg(figure).print_png(str(path), metadata={"Title": TITLE})


def curve_plot(comparison: TaskTable) -> str:
    """Return the curves of a comparison as an SVG element."""
    label = f"{comparison.title} over training"
    return svg_element(lambda: draw_curves([comparison]), salt=comparison.task, label=label)


def draw_curves(comparisons: Sequence[TaskTable]) -> Any:
    """Return a figure with a line of panels for each column that is drawn.

    Raises:
        InputError: There is none.
    """
    from matplotlib.figure import Figure

    shown = [
        (comparison, column)
        for comparison in comparisons
        for column in comparison.columns
        if column.key in comparison.drawn
    ]
    if not shown:
        raise InputError(
            "no record has a figure for a curve; leave --curve out, or give other records"
        )
    grids = [_panels(comparison.rows) for comparison, _ in shown]
    widest = max(len(panels) for panels in grids)
    deepest = max(len(panel) for panels in grids for panel in panels)
    size = max(7.5, 4.6 * widest), (3.6 + 0.5 * deepest) * len(shown)
    figure = Figure(figsize=size, layout="constrained")
    parts = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, (comparison, column), panels in zip(parts, shown, grids, strict=True):
        axes = part.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        part.suptitle(comparison.title, fontsize="large")
        for panel, scales in zip(axes, panels, strict=True):
            _draw(panel, comparison, column, scales)
        axes[0].set_ylabel(column.title)
        handles, labels = axes[0].get_legend_handles_labels()
        axes[-1].legend(handles, labels, frameon=False, fontsize="small")
    return figure


def _panels(rows: Sequence[TaskRow]) -> list[dict[str, float]]:
    """Return the scales of each panel's axis, with how many units an iteration is of each."""
    panels: list[dict[str, float]] = [{"iteration": 1.0}]
    for name in ("samples", "tokens"):
        known = [row.place for row in rows if getattr(row.place, name) is not None]
        ratios = [getattr(place, name) / place.iteration for place in known if place.iteration]
        if not ratios:
            continue
        if len(known) == len(rows) and max(ratios) <= 1.001 * min(ratios):
            panels[0][name] = ratios[0]
        else:
            panels.append({name: 1.0})
    return panels


def _draw(panel: Axes, comparison: TaskTable, column: Column, scales: dict[str, float]) -> None:
    first = next(iter(scales))
    values: list[float] = []
    for index, name in enumerate(dict.fromkeys(row.name for row in comparison.rows)):
        points: list[tuple[int, float, float]] = sorted(
            (place, figure, row.errors.get(column.key, 0.0))
            for row in comparison.rows
            if row.name == name
            and (place := getattr(row.place, first)) is not None
            and (figure := row.figures.get(column.key)) is not None
        )
        if not points:
            continue
        x, y, errors = ([point[part] for point in points] for part in range(3))
        limited = any(row.limited for row in comparison.rows if row.name == name)
        label = f"{name} (limited)" if limited else name
        panel.plot(x, y, "o-", color=f"C{index % 10}", markersize=4, label=label)
        if any(errors):
            low = [value - error for value, error in zip(y, errors, strict=True)]
            high = [value + error for value, error in zip(y, errors, strict=True)]
            panel.fill_between(x, low, high, color=f"C{index % 10}", alpha=0.15, linewidth=0)
        values += y
    for level in comparison.levels:
        if level.key == column.key:
            label = f"paper, {level.model}: {level.value:.{column.decimals}f}"
            label += " (nearest size)" if level.note else ""
            panel.axhline(level.value, color="#555", linestyle="--", linewidth=1, label=label)
            values.append(level.value)
    if not column.higher_is_better and min(values, default=0) > 0:
        _maybe_logarithmic(panel, max(values) / min(values))
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel(AXES[first])
    panel.xaxis.set_major_formatter(_whole if first == "iteration" else _counted)
    panel.set_xlim(left=0)
    for number, (name, ratio) in enumerate(list(scales.items())[1:], start=1):
        scale = panel.twiny()
        scale.xaxis.set_ticks_position("bottom")
        scale.xaxis.set_label_position("bottom")
        scale.spines["bottom"].set_position(("outward", 38 * number))
        scale.spines[["top", "right", "left"]].set_visible(False)
        scale.set_xlim(*(ratio * end for end in panel.get_xlim()))
        scale.set_xlabel(AXES[name])
        scale.xaxis.set_major_formatter(_counted)


def _maybe_logarithmic(panel: Axes, ratio: float) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if ratio < LOGARITHMIC_FROM:
        return
    panel.set_yscale("log")
    steps = (1.0, 2.0, 5.0) if ratio < 1000 else (1.0,)
    panel.yaxis.set_major_locator(LogLocator(subs=steps))
    panel.yaxis.set_major_formatter("{x:,g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _whole(value: float, _: float) -> str:
    return f"{value:,.0f}"


def _counted(value: float, _: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"
