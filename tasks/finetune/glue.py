"""MNLI and QQP: is a sentence true given another, do two questions ask the same? From GLUE's files.

Columns and labels are those of Megatron-LM's tasks/glue. A field may hold bare quotes: a tab ends a
field, a line ends a row, and nothing is quoted.
Source: docs/megatron.md, "Text preparation", "GLUE".
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.text_file import read_text
from mlm_eval.tasks.data.sources import DatasetName
from mlm_eval.tasks.data.text import digest, json_field, sha256
from mlm_eval.tasks.finetune.features import clean_text
from mlm_eval.tasks.finetune.task import ChoiceTask, Example, ExampleSet
from mlm_eval.training.objectives import Classification

UNKNOWN = -1
"""The Hub's label of a test set."""

Pair = tuple[str, str, str, int | None]
"""A row's id, its two texts, and its class where that is known."""


class Glue(ChoiceTask):
    """A task of GLUE that takes two texts and gives a class.

    Attributes:
        folder: As GLUE names it.
        files: Files of each role in that folder.
        hub_labels: Our number of each label of the Hub.
    """

    head = "classification_head"
    objective = Classification
    folder: ClassVar[str]
    files: ClassVar[dict[str, tuple[str, ...]]]
    hub_labels: ClassVar[tuple[int, ...]]

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

    @abstractmethod
    def parse(self, rows: Sequence[list[str]], path: str) -> tuple[list[Pair], list[str]]:
        """Return what a file's rows hold, and warnings.

        Args:
            rows: The header first.
            path: The file, for messages.

        Raises:
            InputError: The columns are not GLUE's, or a row has no text or no known label.
        """

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

    def parse(self, rows: Sequence[list[str]], path: str) -> tuple[list[Pair], list[str]]:
        """See `Glue.parse`; a header of 10 columns is a test set's, which has no labels."""
        columns = len(rows[0])
        if columns < 10:
            raise InputError(
                f"{path} has a header of {columns} columns; MNLI's have 10 (test), 12 (train) or "
                f"16 (dev), divided by tabs"
            )
        labelled = columns != 10
        pairs: list[Pair] = []
        for line, row in enumerate(rows[1:], start=2):
            # More labels of single annotators than the header names: the last one is the label, as
            # in Megatron. Anything else may be a sentence that a tab cut in two.
            votes = labelled and {cell.strip() for cell in row[10:]} <= {*self.classes, "-", ""}
            if len(row) < columns or (len(row) > columns and not votes):
                raise InputError(
                    f"{path}, line {line} has {len(row)} columns, its header {columns}; expected "
                    f"the file as GLUE publishes it"
                )
            first, second = (clean_text(row[column].strip()) for column in (8, 9))
            if not first or not second:
                raise InputError(f"{path}, line {line} has an empty sentence in column 8 or 9")
            label = row[-1].strip()
            if labelled and label not in self.classes:
                raise InputError(
                    f"{path}, line {line} has the label {label!r}; expected one of "
                    f"{', '.join(self.classes)} in the last column"
                )
            number = self.classes.index(label) if labelled else None
            pairs.append((row[0].strip(), first, second, number))
        return pairs, []


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

    def parse(self, rows: Sequence[list[str]], path: str) -> tuple[list[Pair], list[str]]:
        """See `Glue.parse`; as in Megatron, rows without six columns or two texts are left out."""
        columns = len(rows[0])
        if columns not in (3, 6):
            raise InputError(
                f"{path} has a header of {columns} columns; QQP's have 6 (train, dev) or 3 (test), "
                f"divided by tabs"
            )
        labelled = columns == 6
        first_column = 3 if labelled else 1
        pairs: list[Pair] = []
        skipped: list[int] = []
        for line, row in enumerate(rows[1:], start=2):
            sides = [clean_text(text.strip()) for text in row[first_column : first_column + 2]]
            if len(row) != columns or not all(sides):
                skipped.append(line)
                continue
            label = row[5].strip() if labelled else None
            if label not in ("0", "1", None):
                raise InputError(f"{path}, line {line} has the label {label!r}; expected 0 or 1")
            number = None if label is None else int(label)
            pairs.append((row[0].strip(), sides[0], sides[1], number))
        warnings = []
        if skipped:
            some = ", ".join(map(str, skipped[:5])) + (", ..." if len(skipped) > 5 else "")
            warnings.append(
                f"{path}: {len(skipped)} row(s) without {columns} columns or with an empty side "
                f"are left out, as Megatron does (line {some})"
            )
        return pairs, warnings

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


def set_name(file: str) -> str:
    """Return the name of a file's set: dev_matched.tsv -> dev-matched.

    Megatron strips the letters of `.tsv` from the end, which makes `de` of QQP's dev.tsv; here it
    stays dev.
    """
    return file.removesuffix(".tsv").replace("_", "-")
