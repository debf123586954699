"""A plot of each table, as inline SVG for the HTML page."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import visible
from mlm_eval.reporting.tables import MEASURED, PUBLISHED, Table, TableRow, short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def table_plot(table: Table) -> str:
    """Return the plot of a table as an SVG element."""
    from matplotlib.figure import Figure

    def draw() -> Any:
        if any(not column.higher_is_better for column in table.columns):
            figure = Figure(figsize=(9, 3.6), layout="constrained")
            draw_against_size(figure, table)
        else:
            figure = Figure(figsize=(9, 4.2), layout="constrained")
            draw_against_task(figure.add_subplot(), table)
        return figure

    return svg_element(draw, salt=f"table{table.number}", label=table.caption)


def svg_element(draw: Callable[[], Any], *, salt: str, label: str) -> str:
    """Return a figure as an SVG element that fetches nothing.

    Args:
        draw: Returns the figure.
        salt: Unlike that of any other element on the page: names of parts are made from it.
        label: What it shows, for those who do not see it.
    """
    from matplotlib import rc_context

    # Text stays text, and names of parts do not depend on the time of drawing.
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 10,
    }
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names may be in any script
        stream = io.StringIO()
        figure = draw()
        for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
            for entry in legend.get_texts() if legend else ():
                entry.set_text(visible(entry.get_text()).replace("\n", " "))
                entry.set_parse_math(False)  # a name is no formula
        figure.savefig(stream, format="svg", metadata={"Date": None})
    # The element alone, without metadata, which names other places.
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    shown = html.escape(label)
    return text.replace("<svg", f'<svg role="img" aria-label="{shown}"', 1).rstrip()


def draw_against_size(figure: Any, table: Table) -> None:
    """Draw a panel for each column, over the number of parameters."""
    panels = figure.subplots(1, len(table.columns), squeeze=False)[0]
    for panel, column in zip(panels, table.columns, strict=True):
        published = _points(table.rows, column.key)
        panel.plot(*zip(*published, strict=True), "o-", color="#555", label="paper")
        for row in table.rows:  # models of others, whose size the paper does not give
            level = row.value(column.key)
            if row.kind == PUBLISHED and row.parameters is None and level is not None:
                panel.axhline(level, linestyle=":", color="#999", label=row.model)
        measured = [row for row in table.rows if row.kind == MEASURED and row.parameters]
        for index, row in enumerate(measured):
            _mark(panel, row, column.key, float(row.parameters or 0), index)
        if not column.higher_is_better:  # perplexities: what counts is their ratio
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(_plain_tick)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(lambda value, _: short_count(round(value)))
        panel.xaxis.set_minor_formatter(lambda value, _: "")
        panel.set_xlabel("parameters")
        panel.set_title(column.title)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")


def _plain_tick(value: float, _: int) -> str:
    """Return a tick of a logarithmic axis as a number: 10, 20, 50, but not all between them."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _points(rows: Sequence[TableRow], key: str) -> list[tuple[float, float]]:
    """Return (parameters, value) of the published models."""
    return [
        (float(row.parameters), value)
        for row in rows
        if row.kind == PUBLISHED and row.parameters and (value := row.value(key)) is not None
    ]


def _mark(panel: Axes, row: TableRow, key: str, x: float, index: int) -> None:
    y = [value for value in [row.value(key)] if value is not None]
    hollow = row.limited or not row.as_in_paper
    panel.plot(
        [x] * len(y),
        y,
        "DsP*^v"[index % 6],
        color=f"C{index % 10}",
        fillstyle="none" if hollow else "full",
        markersize=9,
        label=legend_label(row),
    )


def legend_label(row: TableRow) -> str:
    """Return the name of a measured model in the legend."""
    return row.model if row.as_in_paper else f"{row.model} (not as in the paper)"


def draw_against_task(panel: Axes, table: Table) -> None:
    """Draw a place for each column, the published models as rows of small marks."""
    places = range(len(table.columns))
    for row in table.rows:
        if row.kind != PUBLISHED:
            continue
        values = [row.value(column.key) for column in table.columns]
        known = [(x, y) for x, y in zip(places, values, strict=True) if y is not None]
        ours = row.model.startswith("Megatron")
        panel.plot(
            *zip(*known, strict=True),
            "_",
            markersize=16,
            markeredgewidth=2,
            color="#333" if ours else "#bbb",
            label="paper: Megatron" if ours else "paper: others",
        )
    measured = [row for row in table.rows if row.kind == MEASURED]
    for index, row in enumerate(measured):
        shift = (index + 1) * 0.6 / (len(measured) + 1) - 0.3
        for x, column in zip(places, table.columns, strict=True):
            _mark(panel, row, column.key, x + shift, index)
    panel.set_xticks(places, [column.title for column in table.columns], rotation=30, ha="right")
    panel.set_ylabel("percent")
    panel.grid(axis="y", alpha=0.3)
    handles, labels = panel.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    panel.legend(unique.values(), unique.keys(), loc="center left", bbox_to_anchor=(1.01, 0.5))
