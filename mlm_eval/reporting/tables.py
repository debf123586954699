"""Tables of published and measured figures: the paper's, and comparisons of any records.

What is compared with what, and whether it may be, is decided where the tables are built
(`mlm_eval.tasks.paper`, `mlm_eval.tasks.comparison`). Here every figure already has its difference
and the reasons why it is not comparable. `mlm_eval.reporting.render` writes the tables,
`mlm_eval.reporting.plots` and `mlm_eval.reporting.curves` draw them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PUBLISHED, MEASURED = "paper", "measured"


@dataclass(frozen=True)
class Column:
    """One figure of a table."""

    key: str
    """Name in the cells of a row."""
    title: str
    decimals: int
    """As many as the paper prints."""
    higher_is_better: bool = True
    """Accuracies; not perplexities."""


@dataclass(frozen=True)
class Cell:
    """One figure."""

    value: float | None
    """The figure, in the unit of its column; None where there is none to show (not finite)."""
    published: float | None = None
    """The paper's figure that it is compared with."""
    notes: tuple[str, ...] = ()
    """Why it is not comparable with the paper's; empty if it is."""
    record: str = ""
    """File of the result record; empty for published figures."""

    @property
    def difference(self) -> float | None:
        """Measured minus published."""
        if self.value is None or self.published is None:
            return None
        return self.value - self.published


@dataclass(frozen=True)
class Place:
    """How far a model was trained, as far as its checkpoint says."""

    iteration: int | None = None
    samples: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class TableRow:
    """The figures of one model."""

    model: str
    kind: str
    """`PUBLISHED` or `MEASURED`."""
    cells: Mapping[str, Cell]
    """By column; a missing one was not measured."""
    parameters: int | None = None
    """Number of parameters of a measured model, with all stored rows of the vocabulary."""
    compared_with: str | None = None
    """The published model that it is compared with."""
    notes: tuple[str, ...] = ()
    """Why the model as a whole is not comparable (its size)."""
    limited: bool = False
    """Some of its figures are of a part of the data."""
    digest: str = ""
    """Digest of the checkpoint."""
    place: Place = Place()
    """Where in its training a measured model is."""

    def value(self, key: str) -> float | None:
        """Return the figure of a column; None where there is none to show."""
        cell = self.cells.get(key)
        return None if cell is None else cell.value

    @property
    def as_in_paper(self) -> bool:
        """Whether protocol, data and size are those of the published row."""
        return not self.notes and not any(cell.notes for cell in self.cells.values())


@dataclass(frozen=True)
class Table:
    """One table of the paper, with measured rows among the published ones."""

    number: int
    """Number of the paper's table."""
    title: str
    columns: Sequence[Column]
    rows: Sequence[TableRow]
    """Published and measured, in the order to show them."""
    runs: Sequence[str]
    """How each measured figure came about: one sentence a record."""
    source: str
    """Where the published rows are from."""

    @property
    def caption(self) -> str:
        """The line above the table."""
        return f"Table {self.number} of the Megatron-LM paper. {self.title}"


@dataclass(frozen=True)
class TaskRow:
    """The figures of one record, or of a part of one."""

    name: str
    """Of the run that the model comes from."""
    figures: Mapping[str, float | None]
    """By column, in its unit; None where there is none to show (not finite)."""
    run: str = ""
    """How it was measured, in a few words."""
    place: Place = Place()
    parameters: int | None = None
    record: str = ""
    digest: str = ""
    limited: bool = False
    notes: tuple[str, ...] = ()
    """What keeps it from being the paper's figure, where the paper has one."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Standard errors of figures."""


@dataclass(frozen=True)
class Level:
    """A published figure, to compare all rows with."""

    model: str
    key: str
    """Its column."""
    value: float
    note: str = ""
    """Why it is no figure of the measured models; empty if it is."""


@dataclass(frozen=True)
class TaskTable:
    """Records of one task, side by side; over training, where they are of iterations."""

    task: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[TaskRow]
    levels: Sequence[Level] = ()
    drawn: Sequence[str] = ()
    """The columns that a curve shows."""
    source: str = ""
    """Where the levels are from."""

    @property
    def caption(self) -> str:
        """The line above the table."""
        return f"{self.title}. Measured by mlm-eval."


def short_count(number: int) -> str:
    """Return a number of parameters in the paper's way: 355M, 8.3B."""
    if number >= 999_500_000:
        return f"{number / 1e9:.1f}B"
    if number >= 9_950_000:
        return f"{number / 1e6:.0f}M"
    return f"{number / 1e6:.1f}M" if number >= 99_500 else f"{number:,}"
