"""MNLI and QQP: is a sentence true given another, do two questions ask the same? From GLUE's files.

Columns and labels are those of Megatron-LM's tasks/glue. A field may hold bare quotes: a tab ends a
field, a line ends a row, and nothing is quoted.
Source: docs/megatron.md, "Text preparation", "GLUE".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.text_file import read_text
from mlm_eval.tasks.data.sources import DatasetName
from mlm_eval.tasks.data.tables import DataTable
from mlm_eval.tasks.data.text import digest, json_field, sha256
from mlm_eval.tasks.finetune.features import clean_text
from mlm_eval.tasks.finetune.task import ChoiceTask, Example, ExampleSet
from mlm_eval.training.objectives import Classification

UNKNOWN = -1
"""The Hub's label of a test set."""

NO_GOLD = "-"
"""The gold label of SNLI and MultiNLI where the annotators did not agree."""

Pair = tuple[str, str, str, int | None]
"""A row's id, its two texts, and its class where that is known."""


class Glue(ChoiceTask):
    """A task of GLUE that takes two texts and gives a class."""

    head = "classification_head"
    objective = Classification
    folder: ClassVar[str]
    """As GLUE names it."""
    files: ClassVar[dict[str, tuple[str, ...]]]
    """Files of each role in that folder."""
    hub_labels: ClassVar[tuple[int, ...]]
    """Our number of each label of the Hub."""
    columns: ClassVar[tuple[tuple[str, ...], ...]]
    """Names of the column of the id, of each text and of the label, the first that a header has
    counts."""
    positions: ClassVar[dict[int, tuple[int, int, int, int | None]]]
    """Number of columns of GLUE's files -> the places of the same four, by which a file is read
    whose header names neither text."""
    skips: ClassVar[bool] = False
    """Rows without all columns or without a text are left out, as Megatron does."""

    def read_folder(self, path: Path, roles: Sequence[str]) -> list[ExampleSet]:
        """See `Task.read`: GLUE's folder of the task, or one that holds it."""
        if not path.is_dir():
            raise InputError(
                f"{path} is a file; --data takes GLUE's folder {self.folder}, and --train, --dev "
                f"and --test take files"
            )
        inner = path / self.folder
        folder = inner if inner.is_dir() else path
        found = [
            self.read_file(folder / name, role)
            for role in roles
            for name in self.files[role]
            if (folder / name).is_file()
        ]
        if not found:
            expected = ", ".join(name for role in roles for name in self.files[role])
            raise InputError(f"{folder} holds none of {expected}; expected GLUE's {self.folder}")
        return found

    def submission(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """See `Task.submission`: what GLUE's server takes; QQP's classes are numbers there."""
        names = self.classes if self.name == "mnli" else tuple(map(str, range(len(self.classes))))
        lines = ["index\tprediction"]
        for record in predictions:
            shares = record["probabilities"]
            lines.append(f"{record['id']}\t{names[shares.index(max(shares))]}")
        return {".tsv": "\n".join(lines) + "\n"}

    def parse(
        self, rows: Sequence[list[str]], path: str, *, first_line: int = 2
    ) -> tuple[list[Pair], list[str]]:
        """Return what a file's rows hold, and warnings.

        The header names the columns: files of one benchmark differ in their number and order. A
        header without a label is a test set's. Where it names neither text, the columns of GLUE's
        own files count, as in Megatron, with a warning.

        Args:
            rows: The header first.
            path: The file, for messages.
            first_line: Number of the line of the first row.

        Raises:
            InputError: The header names no texts, or a row has no text or no known label.
        """
        header = [name.strip() for name in rows[0]]
        warnings = []
        key, first, second, label = (self._place(header, names) for names in self.columns)
        if first is None and second is None and len(header) in self.positions:
            key, first, second, label = self.positions[len(header)]
            warnings.append(
                f"{path}: the header names no texts; columns {first + 1} and {second + 1} of "
                f"{len(header)} are taken, as in GLUE's {self.folder}"
            )
        if first is None or second is None:
            raise InputError(
                f"{path} has no column {' or '.join(self.columns[1])} beside "
                f"{' or '.join(self.columns[2])} in its header ({', '.join(header)[:120]}); "
                f"expected a file of {self.folder}, divided by tabs, with its header"
            )
        pairs: list[Pair] = []
        skipped: list[int] = []
        undecided: list[int] = []
        for line, row in enumerate(rows[1:], start=first_line):
            whole = len(row) == len(header)
            if len(row) > len(header) and label == len(header) - 1:
                # More labels of single annotators than the header names: the last one is the
                # label, as in Megatron. Anything else may be a sentence that a tab cut in two.
                votes = {cell.strip() for cell in row[max(first, second) + 1 :]}
                whole = votes <= {*self.classes, NO_GOLD, ""}
                row = [*row[:label], row[-1]] if whole else row
            sides = [clean_text(row[i].strip()) if i < len(row) else "" for i in (first, second)]
            if self.skips and not (whole and all(sides)):
                skipped.append(line)
                continue
            if not whole:
                raise InputError(
                    f"{path}, line {line} has {len(row)} columns, its header {len(header)}; "
                    f"expected the file as it is published"
                )
            if not all(sides):
                raise InputError(
                    f"{path}, line {line} has an empty {header[first]} or {header[second]}"
                )
            if label is not None and row[label].strip() == NO_GOLD:
                undecided.append(line)
                continue
            known = None
            if label is not None:
                known = self._label(row[label].strip(), header[label], f"{path}, line {line}")
            name = str(line - first_line) if key is None else row[key].strip()
            pairs.append((name, sides[0], sides[1], known))
        if skipped:
            warnings.append(
                f"{path}: {len(skipped)} row(s) without {len(header)} columns or with an empty "
                f"side are left out, as Megatron does ({_lines(skipped)})"
            )
        if undecided:
            warnings.append(
                f"{path}: {len(undecided)} row(s) without a gold label ({NO_GOLD}) are left out, "
                f"as is the custom ({_lines(undecided)})"
            )
        if not pairs:
            raise InputError(f"{path} holds no row to use: {'; '.join(warnings)}")
        return pairs, warnings

    @staticmethod
    def _place(header: Sequence[str], names: Sequence[str]) -> int | None:
        return next((header.index(name) for name in names if name in header), None)

    def _label(self, text: str, column: str, where: str) -> int:
        """Return the class of a label as it is written; a number counts as the Hub does."""
        if text in self.classes:
            return self.classes.index(text)
        if column != "gold_label" and text in map(str, range(len(self.hub_labels))):
            return self.hub_labels[int(text)]
        numbers = "" if column == "gold_label" else f" or 0 to {len(self.classes) - 1}"
        raise InputError(
            f"{where} has the label {text!r}; expected one of "
            f"{', '.join(self.classes)}{numbers} in the column {column}"
        )

    def read_file(self, path: Path, role: str) -> ExampleSet:
        """See `Task.read_file`: a .tsv file."""
        text = read_text(path)
        rows = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
        while rows and rows[-1] == [""]:
            rows.pop()
        if len(rows) < 2:
            raise InputError(f"{path} holds no rows; expected a header and rows of {self.folder}")
        pairs, warnings = self.parse(rows, str(path))
        found = pair_set(pairs, set_name(path.name), role, path=str(path), sha256=sha256([text]))
        return dataclasses.replace(found, warnings=warnings)

    def read_columns(
        self, rows: DataTable, name: str, *, role: str, path: Path
    ) -> ExampleSet | None:
        """See `Task.read_columns`: rows by the names of their columns, as in a .tsv file.

        These are SNLI's and MultiNLI's JSON lines, and their sets on the Hub, where a label of -1
        says that the annotators did not agree, or that all labels are hidden.
        """
        places = [self._place(rows.column_names, names) for names in self.columns]
        if places[1] is None or places[2] is None:
            return None
        header = [rows.column_names[place] for place in places if place is not None]
        label = None if places[3] is None else header[-1]
        table = [_cells(row, header, f"{path}, row {i}") for i, row in enumerate(rows, start=1)]
        if label is not None:
            known = [row[-1] for row in table]
            if all(text == str(UNKNOWN) for text in known):
                header, table = header[:-1], [row[:-1] for row in table]
            elif label != "gold_label":
                table = [
                    [*row[:-1], NO_GOLD if row[-1] == str(UNKNOWN) else row[-1]] for row in table
                ]
        pairs, warnings = self.parse([header, *table], str(path), first_line=1)
        found = pair_set(pairs, name, role, path=str(path), sha256=digest(table))
        return dataclasses.replace(found, warnings=warnings)

    def hub_sets(self, rows: Any, name: str, *, role: str, where: str) -> Iterator[ExampleSet]:
        """See `Task.hub_sets`: a row a pair."""
        pairs: list[Pair] = []
        records: list[Any] = []
        for number, row in enumerate(rows, start=1):
            place = f"{where}, row {number}"
            first, second = (json_field(row, name, str, place) for name in self.hub_columns[:2])
            label = json_field(row, "label", int, place)
            if label != UNKNOWN and not 0 <= label < len(self.hub_labels):
                raise InputError(f"{place}: the label {label} is not known for {self.folder}")
            ours = None if label == UNKNOWN else self.hub_labels[label]
            pairs.append((str(row["idx"]), clean_text(first), clean_text(second), ours))
            records.append((row["idx"], first, second, label))
        if len({label is None for *_, label in pairs}) > 1:
            raise InputError(f"{where} has labels in some rows only; expected all or none")
        yield pair_set(pairs, name, role, path=where, sha256=digest(records))


class Mnli(Glue):
    """MNLI: contradiction, entailment or neutral."""

    name = "mnli"
    classes = ("contradiction", "entailment", "neutral")
    folder = "MNLI"
    files = {
        "train": ("train.tsv",),
        "dev": ("dev_matched.tsv", "dev_mismatched.tsv"),
        "test": ("test_matched.tsv", "test_mismatched.tsv"),
    }
    hub = DatasetName("nyu-mll/glue", "mnli", None)
    hub_splits = {
        "train": {"train": "train"},
        "dev": {"validation_matched": "dev-matched", "validation_mismatched": "dev-mismatched"},
        "test": {"test_matched": "test-matched", "test_mismatched": "test-mismatched"},
    }
    hub_columns = ("premise", "hypothesis", "label", "idx")
    hub_labels = (1, 2, 0)  # entailment, neutral, contradiction
    columns = (
        ("index", "idx", "pairID", "id"),
        ("sentence1", "premise"),
        ("sentence2", "hypothesis"),
        ("gold_label", "label"),
    )
    positions = {10: (0, 8, 9, None), 12: (0, 8, 9, 11), 16: (0, 8, 9, 15)}


class Qqp(Glue):
    """QQP: do two questions ask the same? Class 1 means yes."""

    name = "qqp"
    metric = "accuracy_f1"
    classes = ("not_duplicate", "duplicate")
    folder = "QQP"
    files = {"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)}
    hub = DatasetName("nyu-mll/glue", "qqp", None)
    hub_columns = ("question1", "question2", "label", "idx")
    hub_labels = (0, 1)
    columns = (
        ("id", "idx", "index"),
        ("question1",),
        ("question2",),
        ("is_duplicate", "label"),
    )
    positions = {3: (0, 1, 2, None), 6: (0, 3, 4, 5)}
    skips = True

    def summary(self, metrics: Any) -> dict[str, float]:
        """See `Task.summary`; the paper's figure is the accuracy."""
        return {**super().summary(metrics), "f1": metrics["dev"]["f1"]}


def pair_set(pairs: Sequence[Pair], name: str, role: str, *, path: str, sha256: str) -> ExampleSet:
    """Return pairs as a set of examples; labelled if the first one is."""
    return ExampleSet(
        name=name,
        role=role,
        path=path,
        sha256=sha256,
        texts=[second for _, _, second, _ in pairs],
        examples=[
            Example(key, (first,), i, label) for i, (key, first, _, label) in enumerate(pairs)
        ],
        labelled=bool(pairs) and pairs[0][3] is not None,
    )


def _cells(row: Mapping[str, Any], columns: Sequence[str], where: str) -> list[str]:
    """Return some columns of a row as the text that a .tsv file would have.

    Raises:
        InputError: One is neither a text nor a number.
    """
    for name in columns:
        if type(row[name]) not in (str, int):
            raise InputError(f"{where}: {name} is {shown(row[name])}; expected a text or a number")
    return [str(row[name]) for name in columns]


def _lines(numbers: Sequence[int]) -> str:
    return "line " + ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def set_name(file: str) -> str:
    """Return the name of a file's set: dev_matched.tsv -> dev-matched.

    Megatron strips the letters of `.tsv` from the end, which makes `de` of QQP's dev.tsv; here it
    stays dev.
    """
    return file.removesuffix(".tsv").removesuffix(".txt").replace("_", "-")
