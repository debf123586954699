"""Tables as Markdown, LaTeX, CSV and HTML.

Each format but CSV has a template in `templates/`. A template prints plain text only, and every
value is escaped for its format on the way out. The HTML page holds a plot of each table and fetches
nothing. A comparison of records is one more table on the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlm_eval.checkpoints.errors import InputError, require, visible
from mlm_eval.reporting.tables import (
    MEASURED,
    PUBLISHED,
    Cell,
    Column,
    Place,
    Table,
    TaskRow,
    TaskTable,
    short_count,
)

FORMATS = ("md", "latex", "csv", "html")

DIFFERENCE = "difference"
LIMITED = "LIMITED RUN"
LESS, MORE, MINUS = "↓", "↑", "\N{MINUS SIGN}"

MARKDOWN = str.maketrans({**{mark: f"\\{mark}" for mark in "|\\`*<>[]"}, MINUS: "-"})
LATEX = str.maketrans(
    {
        **{mark: f"\\{mark}" for mark in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        LESS: r"$\downarrow$",
        MORE: r"$\uparrow$",
        MINUS: "$-$",
    }
)
LATEX_DELIMITERS = {
    "block_start_string": "[%",
    "block_end_string": "%]",
    "variable_start_string": "[[",
    "variable_end_string": "]]",
}
"""Braces and percent signs are LaTeX's own."""


_Marked = tuple[str, list[str]]
"""The text of a cell and the letters of its footnotes."""


def render(tables: Sequence[Table | TaskTable], fmt: str, *, curves: bool = False) -> str:
    """Return the tables as text in one of `FORMATS`.

    Args:
        tables: The paper's, and comparisons.
        fmt: One of `FORMATS`.
        curves: The HTML page shows curves of the comparisons.

    Raises:
        InputError: There is no such format.
    """
    if fmt not in FORMATS:
        raise InputError(f"--format {fmt} is unknown; choose {', '.join(FORMATS)}")
    if fmt == "csv":
        return _csv(tables)
    if fmt == "html":
        require("matplotlib", "--format html")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    name, options = _TEMPLATES[fmt]
    environment = Environment(
        loader=PackageLoader(__package__),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        **options,
    )
    views = [
        _comparison_view(table, plot=curves and fmt == "html")
        if isinstance(table, TaskTable)
        else _view(table, plot=fmt == "html")
        for table in tables
    ]
    beside_paper = any(isinstance(table, Table) for table in tables)
    heading = "Measured beside the Megatron-LM paper" if beside_paper else "Measured by mlm-eval"
    return environment.get_template(name).render(tables=views, heading=heading)


def _plain(value: object) -> str:
    """Return a value as text on one line, with escapes for what cannot be seen."""
    return visible(str(value)).replace("\n", " ")


def _html(value: Any) -> Any:
    """Return a value to be escaped; what is HTML already stays."""
    return value if hasattr(value, "__html__") else _plain(value)


def _cell(value: Any) -> Any:
    """Return a value for CSV: no text that a spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    text = _plain(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _markdown(value: object) -> str:
    # An address is a text here, no link that somebody else has chosen.
    return _plain(value).translate(MARKDOWN).replace("://", "\\://")


def _latex(value: object) -> str:
    text = _plain(value).translate(LATEX)
    return text.replace("--", "-{}-")  # else it is set as one dash, not the start of an option


_TEMPLATES: dict[str, tuple[str, dict[str, Any]]] = {
    "md": ("report.md.j2", {"finalize": _markdown}),
    "latex": ("report.tex.j2", {"finalize": _latex, **LATEX_DELIMITERS}),
    "html": ("report.html.j2", {"autoescape": True, "finalize": _html}),
}
"""Template of a format, and how its values are escaped."""


def _headings(columns: Sequence[Column]) -> list[str]:
    """Return the columns' titles, each with which way is better."""
    return [f"{c.title} {MORE if c.higher_is_better else LESS}" for c in columns]


def _lettered(notes: Sequence[str]) -> list[tuple[str, str]]:
    """Return the notes with their letters."""
    return [(_letters(number), note) for number, note in enumerate(notes)]


def _view(table: Table, *, plot: bool) -> dict[str, Any]:
    """Return what a template needs of a table."""
    notes: list[str] = []
    lines = list(_lines(table, notes))
    better = _headings(table.columns)
    view = {
        "caption": table.caption,
        "label": f"megatron-{table.number}",
        "runs": table.runs,
        "source": table.source,
        "titles": ["model", "figures", "parameters", *better, "as in the paper"],
        "lines": lines,
        "notes": _lettered(notes),
        "plot": "",
    }
    if plot:
        from mlm_eval.reporting.plots import table_plot

        view["plot"] = table_plot(table)
    return view


def _comparison_view(table: TaskTable, *, plot: bool) -> dict[str, Any]:
    """Return what a template needs of a comparison; columns that say nothing are left out."""
    notes: list[str] = []

    def cells(row: TaskRow) -> list[_Marked]:
        figures = [_plain_figure(row.figures, column) for column in table.columns]
        name = f"{row.name} ({LIMITED})" if row.limited else row.name
        place = row.place
        counts = (place.iteration, place.samples, place.tokens, row.parameters)
        told = ["" if count is None else f"{count:,}" for count in counts[:2]]
        told += ["" if count is None else short_count(count) for count in counts[2:]]
        first = _marked(name, row.notes, notes)
        return [first, *((text, []) for text in (row.run, *told, *figures, row.record))]

    lines = [(MEASURED, cells(row)) for row in table.rows]
    for level in table.levels:
        row = TaskRow(level.model, {level.key: level.value}, run="paper")
        lines.append((PUBLISHED, cells(row)))
        if level.note:
            lines[-1][1][0] = _marked(level.model, [level.note], notes)
    better = _headings(table.columns)
    titles = ["model", "run", "iteration", "samples", "tokens", "parameters", *better, "record"]
    known = [i for i in range(len(titles)) if any(line[i][0] for _, line in lines)]
    view = {
        "caption": table.caption,
        "label": f"mlm-eval-{table.task}",
        "runs": [],
        "source": table.source,
        "titles": [titles[i] for i in known],
        "lines": [(kind, [line[i] for i in known]) for kind, line in lines],
        "notes": _lettered(notes),
        "plot": "",
    }
    if plot and table.drawn:
        from mlm_eval.reporting.curves import curve_plot

        view["plot"] = curve_plot(table)
    return view


def _plain_figure(figures: Mapping[str, float | None], column: Column) -> str:
    if column.key not in figures:
        return ""
    value = figures[column.key]
    return "none" if value is None else f"{value:,.{column.decimals}f}"


def _marked(text: str, reasons: Sequence[str], notes: list[str]) -> _Marked:
    """Return a text with the letters of its footnotes; those that are new join the others."""
    notes.extend(reason for reason in dict.fromkeys(reasons) if reason not in notes)
    return text, [_letters(notes.index(reason)) for reason in reasons]


def _lines(table: Table, notes: list[str]) -> Iterator[tuple[str, list[_Marked]]]:
    """Yield (kind, cells) of a table's lines; collect its footnotes in the order of first use.

    A measured row is followed by its differences from the published row of its size, a line of the
    kind `DIFFERENCE`.
    """

    def marked(text: str, reasons: Sequence[str] = ()) -> _Marked:
        return _marked(text, reasons, notes)

    for row in table.rows:
        cells = [(row.cells.get(column.key), column) for column in table.columns]
        name = f"{row.model} ({LIMITED})" if row.limited else row.model
        verdict = "yes" if row.as_in_paper else "no"
        yield (
            row.kind,
            [
                marked(name, row.notes),
                marked(row.kind),
                marked("" if row.parameters is None else short_count(row.parameters)),
                *(marked(_figure(cell, c), cell.notes if cell else ()) for cell, c in cells),
                marked("" if row.kind == PUBLISHED else verdict),
            ],
        )
        if any(cell.difference is not None for cell in row.cells.values()):
            title = f"{DIFFERENCE} from {row.compared_with}"
            texts = ["", title, "", *(_gap(cell, column) for cell, column in cells), ""]
            yield DIFFERENCE, [marked(text) for text in texts]


def _letters(number: int) -> str:
    """Return a, b, ..., z, aa, ab, ... for 0, 1, ..."""
    before, last = divmod(number, 26)
    return (_letters(before - 1) if before else "") + chr(ord("a") + last)


def _figure(cell: Cell | None, column: Column) -> str:
    if cell is None:
        return ""
    return "none" if cell.value is None else f"{cell.value:.{column.decimals}f}"


def _gap(cell: Cell | None, column: Column) -> str:
    if cell is None or cell.difference is None:
        return ""
    text = f"{abs(cell.difference):.{column.decimals}f}"
    sign = "+" if cell.difference > 0 else MINUS
    return text if float(text) == 0.0 else sign + text


def _csv(tables: Sequence[Table | TaskTable]) -> str:
    """Return all figures, one a line, unrounded, for machines."""
    import pandas

    lines = [
        {name: _cell(value) for name, value in line.items()}
        for table in tables
        for line in (_of_comparison(table) if isinstance(table, TaskTable) else _of_table(table))
    ]
    # As objects: a column of numbers with a gap would become floats.
    return pandas.DataFrame(lines, dtype=object).to_csv(index=False, lineterminator="\n")


def _of_table(table: Table) -> list[dict[str, Any]]:
    return [
        {
            "table": table.number,
            "model": row.model,
            "kind": row.kind,
            "parameters": row.parameters,
            "figure": column.key,
            "value": cell.value,
            "compared_with": row.compared_with,
            "published": cell.published,
            "difference": cell.difference,
            "as_in_paper": None if row.kind == PUBLISHED else not (row.notes or cell.notes),
            "limited": None if row.kind == PUBLISHED else row.limited,
            "why_not": "; ".join((*row.notes, *cell.notes)),
            "record": cell.record,
            "digest": row.digest,
            **_place(row.place),
        }
        for row in table.rows
        for column in table.columns
        if (cell := row.cells.get(column.key)) is not None
    ]


def _of_comparison(table: TaskTable) -> list[dict[str, Any]]:
    measured: list[dict[str, Any]] = [
        {
            "table": table.task,
            "model": row.name,
            "kind": MEASURED,
            "parameters": row.parameters,
            "figure": column.key,
            "value": row.figures[column.key],
            "limited": row.limited,
            "why_not": "; ".join(row.notes),
            "record": row.record,
            "digest": row.digest,
            **_place(row.place),
        }
        for row in table.rows
        for column in table.columns
        if column.key in row.figures
    ]
    levels = [
        {
            "table": table.task,
            "model": level.model,
            "kind": PUBLISHED,
            "figure": level.key,
            "value": level.value,
        }
        for level in table.levels
    ]
    return [dict.fromkeys(CSV_COLUMNS) | line for line in (*measured, *levels)]


CSV_COLUMNS = (
    "table", "model", "kind", "parameters", "figure", "value", "compared_with", "published",
    "difference", "as_in_paper", "limited", "why_not", "record", "digest", "iteration",
    "consumed_samples", "consumed_tokens",
)  # fmt: skip


def _place(place: Place) -> dict[str, int | None]:
    return {
        "iteration": place.iteration,
        "consumed_samples": place.samples,
        "consumed_tokens": place.tokens,
    }
