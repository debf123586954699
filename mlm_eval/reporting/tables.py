"""Tables of published and measured figures, and their text in Markdown, LaTeX, CSV and HTML.

What is compared with what, and whether it may be, is decided where the tables are built
(`mlm_eval.tasks.paper`). Here every figure already has its difference and the reasons why it is not
comparable; they become footnotes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

FORMATS = ("md", "latex", "csv", "html")

PUBLISHED, MEASURED, DIFFERENCE = "paper", "measured", "difference"
LIMITED = "LIMITED RUN"


@dataclass(frozen=True)
class Column:
    """One figure of a table.

    Attributes:
        key: Name in the cells of a row.
        title: What people read.
        decimals: As many as the paper prints.
        higher_is_better: Accuracies; not perplexities.
    """

    key: str
    title: str
    decimals: int
    higher_is_better: bool = True


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        value: In the unit of its column; None where there is none to show (not finite).
        published: The paper's figure that it is compared with.
        notes: Why it is not comparable with the paper's; empty if it is.
        record: File of the result record; empty for published figures.
    """

    value: float | None
    published: float | None = None
    notes: tuple[str, ...] = ()
    record: str = ""

    @property
    def difference(self) -> float | None:
        """Measured minus published."""
        if self.value is None or self.published is None:
            return None
        return self.value - self.published


@dataclass(frozen=True)
class Row:
    """The figures of one model.

    Attributes:
        model: Its name.
        kind: `PUBLISHED` or `MEASURED`.
        cells: By column; what is missing was not measured.
        parameters: Of a measured model, all stored rows of the vocabulary counted.
        compared_with: The published model that it is compared with.
        notes: Why the model as a whole is not comparable (its size).
        limited: Some of its figures are of a part of the data.
        digest: Of the checkpoint.
    """

    model: str
    kind: str
    cells: Mapping[str, Cell]
    parameters: int | None = None
    compared_with: str | None = None
    notes: tuple[str, ...] = ()
    limited: bool = False
    digest: str = ""

    @property
    def as_in_paper(self) -> bool:
        """Whether protocol, data and size are those of the published row."""
        return not self.notes and not any(cell.notes for cell in self.cells.values())


@dataclass(frozen=True)
class Table:
    """One table of the paper, with measured rows among the published ones.

    Attributes:
        number: Of the paper's table.
        title: What it shows.
        columns: Its figures.
        rows: Published and measured, in the order to show them.
        runs: How each measured figure came about: one sentence a record.
        source: Where the published rows are from.
    """

    number: int
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    runs: Sequence[str] = ()
    source: str = ""

    @property
    def caption(self) -> str:
        """What stands above the table."""
        return f"Table {self.number} of the Megatron-LM paper. {self.title}"


@dataclass
class _Footnotes:
    """Notes in the order of their first use."""

    texts: list[str] = field(default_factory=list)

    def mark(self, note: str) -> str:
        if note not in self.texts:
            self.texts.append(note)
        return _letters(self.texts.index(note))

    def marks(self, notes: Sequence[str]) -> list[str]:
        return [self.mark(note) for note in notes]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter([(_letters(i), text) for i, text in enumerate(self.texts)])


def _letters(number: int) -> str:
    """Return a, b, ..., z, aa, ab, ..."""
    letters = ""
    number += 1
    while number:
        number, place = divmod(number - 1, 26)
        letters = chr(ord("a") + place) + letters
    return letters


@dataclass(frozen=True)
class _Style:
    """How a format writes what is not plain text."""

    better: tuple[str, str]
    """Marks of columns where less, and where more, is better."""
    minus: str

    def escape(self, text: str) -> str:
        return text

    def marked(self, text: str, marks: Sequence[str]) -> str:
        return f"{text} ({', '.join(marks)})" if marks else text


class _Markdown(_Style):
    def escape(self, text: str) -> str:
        return re.sub(r"([|\\`*<>])", r"\\\1", text)


class _Latex(_Style):
    SPECIAL = {
        **{mark: f"\\{mark}" for mark in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }

    def escape(self, text: str) -> str:
        escaped = "".join(self.SPECIAL.get(letter, letter) for letter in text)
        return escaped.replace("--", "-{}-")  # else one dash, not the beginning of an option

    def marked(self, text: str, marks: Sequence[str]) -> str:
        return text + (rf"\textsuperscript{{{','.join(marks)}}}" if marks else "")


class _Html(_Style):
    def escape(self, text: str) -> str:
        import html

        return html.escape(text)

    def marked(self, text: str, marks: Sequence[str]) -> str:
        return text + (f"<sup>{','.join(marks)}</sup>" if marks else "")


MARKDOWN = _Markdown(("↓", "↑"), "-")
LATEX = _Latex((r"$\downarrow$", r"$\uparrow$"), "$-$")
HTML = _Html(("↓", "↑"), "\N{MINUS SIGN}")


def render(tables: Sequence[Table], fmt: str) -> str:
    """Return the tables as text in one of `FORMATS`.

    Raises:
        InputError: There is no such format.
    """
    if fmt not in FORMATS:
        raise InputError(f"--format {fmt} is unknown; choose {', '.join(FORMATS)}")
    if fmt == "csv":
        return str(long_frame(tables).to_csv(index=False, lineterminator="\n"))
    if fmt == "html":
        from mlm_eval.reporting.page import html_page

        return html_page(tables)
    one = {"md": _markdown, "latex": _latex}[fmt]
    return "\n".join(one(table) for table in tables)


def long_frame(tables: Sequence[Table]) -> DataFrame:
    """Return all figures, one a line, unrounded, as machines want them."""
    from pandas import DataFrame

    lines = []
    for table in tables:
        for row in table.rows:
            for column in table.columns:
                cell = row.cells.get(column.key)
                if cell is None:
                    continue
                notes = [*row.notes, *cell.notes]
                lines.append(
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
                        "as_in_paper": None if row.kind == PUBLISHED else not notes,
                        "limited": None if row.kind == PUBLISHED else row.limited,
                        "why_not": "; ".join(notes) or None,
                        "record": cell.record or None,
                        "digest": row.digest or None,
                    }
                )
    frame = DataFrame(lines)
    return frame.astype({"parameters": "Int64"})


def wide_frame(table: Table, style: _Style) -> tuple[DataFrame, list[str], list[tuple[str, str]]]:
    """Return a table as people read it, the kind of each line, and the footnotes.

    A measured row is followed by its differences from the published row of its size.
    """
    from pandas import DataFrame

    notes = _Footnotes()
    titles = [
        f"{style.escape(column.title)} {style.better[column.higher_is_better]}"
        for column in table.columns
    ]
    lines: list[list[str]] = []
    kinds: list[str] = []
    for row in table.rows:
        line = [_name(row, style, notes), row.kind, _count(row)]
        line += [_figure(row.cells.get(c.key), c, style, notes) for c in table.columns]
        lines.append([*line, _verdict(row)])
        kinds.append(row.kind)
        if any(cell.difference is not None for cell in row.cells.values()):
            gaps = [_gap(row.cells.get(c.key), c, style) for c in table.columns]
            kinds.append(DIFFERENCE)
            title = style.escape(f"{DIFFERENCE} from {row.compared_with}")
            lines.append(["", title, "", *gaps, ""])
    frame = DataFrame(lines, columns=["model", "figures", "parameters", *titles, "as in the paper"])
    return frame, kinds, list(notes)


def _name(row: Row, style: _Style, notes: _Footnotes) -> str:
    name = style.escape(row.model) + (f" ({LIMITED})" if row.limited else "")
    return style.marked(name, notes.marks(row.notes))


def _count(row: Row) -> str:
    return "" if row.parameters is None else short_count(row.parameters)


def short_count(number: int) -> str:
    """Return a number of parameters in the paper's way: 355M, 8.3B."""
    if number >= 999_500_000:
        return f"{number / 1e9:.1f}B"
    if number >= 9_950_000:
        return f"{number / 1e6:.0f}M"
    return f"{number / 1e6:.1f}M" if number >= 99_500 else f"{number:,}"


def _figure(cell: Cell | None, column: Column, style: _Style, notes: _Footnotes) -> str:
    if cell is None:
        return ""
    text = "none" if cell.value is None else f"{cell.value:.{column.decimals}f}"
    return style.marked(text, notes.marks(cell.notes))


def _gap(cell: Cell | None, column: Column, style: _Style) -> str:
    if cell is None or cell.difference is None:
        return ""
    text = f"{abs(cell.difference):.{column.decimals}f}"
    if float(text) == 0.0:
        return text
    return ("+" if cell.difference > 0 else style.minus) + text


def _verdict(row: Row) -> str:
    if row.kind == PUBLISHED:
        return ""
    return "yes" if row.as_in_paper else "no"


def _markdown(table: Table) -> str:
    frame, _, notes = wide_frame(table, MARKDOWN)
    numbers = range(2, len(frame.columns) - 1)
    rule = ["---:" if i in numbers else "---" for i in range(len(frame.columns))]
    lines = [list(map(str, frame.columns)), rule, *(list(map(str, r)) for r in frame.values)]
    parts = [f"**{MARKDOWN.escape(table.caption)}**", ""]
    parts += ["| " + " | ".join(line) + " |" for line in lines]
    parts += [""]
    if notes:
        parts += [f"- ({mark}) {MARKDOWN.escape(text)}" for mark, text in notes] + [""]
    if table.runs:
        parts += ["Measured:", "", *(f"- {MARKDOWN.escape(run)}" for run in table.runs), ""]
    if table.source:
        parts += [f"Published: {MARKDOWN.escape(table.source)}", ""]
    return "\n".join(parts)


def _latex(table: Table) -> str:
    frame, _, notes = wide_frame(table, LATEX)
    numbers = range(2, len(frame.columns) - 1)
    formats = "".join("r" if i in numbers else "l" for i in range(len(frame.columns)))
    body = frame.to_latex(index=False, escape=False, column_format=formats)
    small = [rf"\textsuperscript{{{mark}}} {LATEX.escape(text)}." for mark, text in notes]
    small += [f"Measured: {LATEX.escape(run)}." for run in table.runs]
    if table.source:
        small += [f"Published: {LATEX.escape(table.source)}."]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs,graphicx}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{LATEX.escape(table.caption)}}}",
            rf"\label{{tab:megatron-{table.number}}}",
            r"\resizebox{\textwidth}{!}{%",
            body.rstrip("\n") + "}",
            r"\par\smallskip\raggedright\footnotesize",
            "\\\\\n".join(small) + r"\par",
            r"\end{table}",
            "",
        ]
    )
