"""One self-contained HTML page: the tables, a plot for each as inline SVG. Nothing is fetched."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlm_eval.reporting.tables import HTML, MEASURED, PUBLISHED, Row, Table, short_count, wide_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = """ body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin:
2rem auto; max-width: 84rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; } .scroll { overflow-x:
auto; } table { border-collapse: collapse; }
td { white-space: nowrap; } td:nth-child(2) { white-space: normal; } th, td { padding: .3rem .55rem;
text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; } th {
border-bottom: 2px solid #333; } th:nth-child(-n+2), td:nth-child(-n+2), td:last-child,
th:last-child { text-align: left; } tr.measured td { background: #eef5fb; font-weight: 600;
border-bottom: none; } tr.difference td { background: #eef5fb; color: #44515c; } tr.differs
td:last-child { color: #a33; } sup { font-weight: 400; color: #a33; } ol.notes { list-style: none;
padding: 0; font-size: .87rem; color: #333; } ul.runs { font-size: .87rem; color: #333;
padding-left: 1.2rem; overflow-wrap: anywhere; } ol.notes { overflow-wrap: anywhere; } svg {
max-width: 100%; height: auto; }
"""


def html_page(tables: Sequence[Table]) -> str:
    """Return the page; every figure, its footnotes and its run stand in it."""
    title = "Measured beside the Megatron-LM paper"
    sections = "\n".join(_section(table) for table in tables)
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"{sections}\n</body>\n</html>\n"
    )


def _section(table: Table) -> str:
    frame, kinds, notes = wide_frame(table, HTML)
    head = "".join(f"<th>{title}</th>" for title in frame.columns)
    lines = []
    for kind, line in zip(kinds, frame.values, strict=True):
        differs = " differs" if line[-1] == "no" else ""
        cells = "".join(f"<td>{text}</td>" for text in line)
        lines.append(f'<tr class="{kind}{differs}">{cells}</tr>')
    parts = [
        "<section>",
        f"<h2>{html.escape(table.caption)}</h2>",
        '<div class="scroll"><table>',
        f"<thead><tr>{head}</tr></thead>",
        "<tbody>",
        *lines,
        "</tbody>",
        "</table></div>",
    ]
    if notes:
        items = "\n".join(f"<li><sup>{mark}</sup> {HTML.escape(text)}</li>" for mark, text in notes)
        parts.append(f'<ol class="notes">\n{items}\n</ol>')
    parts.append(f"<figure>{table_plot(table)}</figure>")
    if table.runs:
        items = "\n".join(f"<li>{html.escape(run)}</li>" for run in table.runs)
        parts.append(f'<p>Measured:</p>\n<ul class="runs">\n{items}\n</ul>')
    if table.source:
        parts.append(f"<p>Published: {html.escape(table.source)}</p>")
    return "\n".join([*parts, "</section>"])


def table_plot(table: Table) -> str:
    """Return the plot of a table as an SVG element."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Text stays text, and names of parts do not depend on the time of drawing.
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"table{table.number}",
        "font.size": 10,
    }
    with rc_context(settings):
        if any(not column.higher_is_better for column in table.columns):
            figure = Figure(figsize=(9, 3.6), layout="constrained")
            _against_size(figure, table)
        else:
            figure = Figure(figsize=(9, 4.2), layout="constrained")
            _against_task(figure.add_subplot(), table)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return inline_svg(stream.getvalue(), label=table.caption)


def inline_svg(text: str, *, label: str) -> str:
    """Return the svg element of a file, without what names other places."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).rstrip()


def _against_size(figure: Any, table: Table) -> None:
    """One panel a figure, over the number of parameters."""
    panels = figure.subplots(1, len(table.columns), squeeze=False)[0]
    for panel, column in zip(panels, table.columns, strict=True):
        published = _points(table.rows, column.key)
        panel.plot(*zip(*published, strict=True), "o-", color="#555", label="paper")
        for row in table.rows:  # models of others, whose size the paper does not give
            if row.kind == PUBLISHED and row.parameters is None and column.key in row.cells:
                level = row.cells[column.key].value
                assert level is not None
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


def _points(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """Return (parameters, value) of the published models."""
    return [
        (float(row.parameters), cell.value)
        for row in rows
        if row.kind == PUBLISHED
        and row.parameters
        and (cell := row.cells.get(key)) is not None
        and cell.value is not None
    ]


def _mark(panel: Axes, row: Row, key: str, x: float, index: int) -> None:
    cell = row.cells.get(key)
    y = [] if cell is None or cell.value is None else [cell.value]
    hollow = row.limited or not row.as_in_paper
    panel.plot(
        [x] * len(y),
        y,
        "DsP*^v"[index % 6],
        color=f"C{index % 10}",
        fillstyle="none" if hollow else "full",
        markersize=9,
        label=_label(row),
    )


def _label(row: Row) -> str:
    return row.model if row.as_in_paper else f"{row.model} (not as in the paper)"


def _against_task(panel: Axes, table: Table) -> None:
    """One place a figure; the published models of the paper as lines of small marks."""
    places = range(len(table.columns))
    for row in table.rows:
        if row.kind != PUBLISHED:
            continue
        values = [
            cell.value if (cell := row.cells.get(c.key)) is not None else None
            for c in table.columns
        ]
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
