"""MNLI and QQP: is a sentence true given another, do two questions ask the same? From GLUE's files.

Columns and labels are those of Megatron-LM's tasks/glue. A field may hold bare quotes: a tab ends a
field, a line ends a row, and nothing is quoted.
Source: docs/megatron.md, "Text preparation", "GLUE".
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.tasks.data.sources import DatasetName, check_columns, dataset_splits, is_dataset
from mlm_eval.tasks.data.text import digest, json_field, read_text, sha256
from mlm_eval.tasks.finetune.features import clean_text
from mlm_eval.tasks.finetune.task import ChoiceTask, Example, ExampleSet
from mlm_eval.training.objectives import Classification, Objective

UNKNOWN = -1
"""The Hub's label of a test set."""

Parsed = tuple[list[Example], list[str], list[str]]
"""Examples, the texts that their `second` counts, and warnings."""


class Glue(ChoiceTask):
    """A task of GLUE that takes two texts and gives a class.

    Attributes:
        folder: As GLUE names it.
        files: Files of each role in that folder.
        hub_splits: Splits of each role in nyu-mll/glue, by the name that their sets get.
        hub_texts: Columns of the two texts there.
        hub_labels: Our number of each label there.
    """

    head = "classification_head"
    folder: ClassVar[str]
    files: ClassVar[dict[str, tuple[str, ...]]]
    hub_splits: ClassVar[dict[str, dict[str, str]]]
    hub_texts: ClassVar[tuple[str, str]]
    hub_labels: ClassVar[tuple[int, ...]]

    def objective(self) -> Objective:
        """See `Task.objective`."""
        return Classification()

    def read(self, data: str, roles: Sequence[str]) -> list[ExampleSet]:
        """See `Task.read`: GLUE's folder of the task, or one that holds it."""
        if is_dataset(data):
            return [part for role in roles for part in self._read_hub(data, role)]
        folder = Path(data).expanduser()
        if not folder.is_dir():
            raise InputError(
                f"{folder} is a file; --data takes GLUE's folder {self.folder}, and --train, --dev "
                f"and --test take files"
            )
        if (folder / self.folder).is_dir():
            folder = folder / self.folder
        found = [
            self._read_file(folder / name, role)
            for role in roles
            for name in self.files[role]
            if (folder / name).is_file()
        ]
        if not found:
            expected = ", ".join(name for role in roles for name in self.files[role])
            raise InputError(f"{folder} holds none of {expected}; expected GLUE's {self.folder}")
        return found

    def read_part(self, source: str, role: str) -> list[ExampleSet]:
        """See `Task.read_part`: a .tsv file."""
        if is_dataset(source):
            return list(self._read_hub(source, role))
        path = Path(source).expanduser()
        if path.is_dir():
            return self.read(source, [role])
        return [self._read_file(path, role)]

    def submission(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """See `Task.submission`: what GLUE's server takes; QQP's classes are numbers there."""
        names = self.classes if self.name == "mnli" else tuple(map(str, range(len(self.classes))))
        lines = ["index\tprediction"]
        for record in predictions:
            shares = record["probabilities"]
            lines.append(f"{record['id']}\t{names[shares.index(max(shares))]}")
        return {".tsv": "\n".join(lines) + "\n"}

    @abstractmethod
    def parse(self, rows: Sequence[list[str]], path: str) -> Parsed:
        """Return what a file's rows hold, its header first.

        Raises:
            InputError: The columns are not GLUE's, or a row has no text or no known label.
        """

    def _read_file(self, path: Path, role: str) -> ExampleSet:
        text = read_text(path)
        rows = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
        while rows and rows[-1] == [""]:
            rows.pop()
        if len(rows) < 2:
            raise InputError(f"{path} holds no rows; expected a header and rows of {self.folder}")
        examples, texts, warnings = self.parse(rows, str(path))
        return ExampleSet(
            name=set_name(path.name),
            role=role,
            path=str(path),
            sha256=sha256([text]),
            texts=texts,
            examples=examples,
            labelled=bool(examples) and examples[0].label is not None,
            warnings=warnings,
        )

    def _read_hub(self, source: str, role: str) -> Iterator[ExampleSet]:
        splits = self.hub_splits[role]
        hub = DatasetName("nyu-mll/glue", self.name, None)
        for name, where, rows in dataset_splits(source, default=hub, splits=splits, role=role):
            check_columns(rows, (*self.hub_texts, "label", "idx"), where)
            examples: list[Example] = []
            texts: list[str] = []
            records: list[Any] = []
            for number, row in enumerate(rows, start=1):
                place = f"{where}, row {number}"
                first, second = (json_field(row, column, str, place) for column in self.hub_texts)
                label = json_field(row, "label", int, place)
                if label != UNKNOWN and not 0 <= label < len(self.hub_labels):
                    raise InputError(f"{place}: the label {label} is not known for {self.folder}")
                ours = None if label == UNKNOWN else self.hub_labels[label]
                examples.append(Example(str(row["idx"]), (clean_text(first),), len(texts), ours))
                texts.append(clean_text(second))
                records.append((row["idx"], first, second, label))
            labels = {example.label is None for example in examples}
            if len(labels) > 1:
                raise InputError(f"{where} has labels in some rows only; expected all or none")
            yield ExampleSet(
                name=name,
                role=role,
                path=where,
                sha256=digest(records),
                texts=texts,
                examples=examples,
                labelled=labels == {False},
            )


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
    hub_splits = {
        "train": {"train": "train"},
        "dev": {"validation_matched": "dev-matched", "validation_mismatched": "dev-mismatched"},
        "test": {"test_matched": "test-matched", "test_mismatched": "test-mismatched"},
    }
    hub_texts = ("premise", "hypothesis")
    hub_labels = (1, 2, 0)  # entailment, neutral, contradiction

    def parse(self, rows: Sequence[list[str]], path: str) -> Parsed:
        """See `Glue.parse`; a header of 10 columns is a test set's, which has no labels."""
        columns = len(rows[0])
        if columns < 10:
            raise InputError(
                f"{path} has a header of {columns} columns; MNLI's have 10 (test), 12 (train) or "
                f"16 (dev), divided by tabs"
            )
        labelled = columns != 10
        examples: list[Example] = []
        texts: list[str] = []
        for line, row in enumerate(rows[1:], start=2):
            if len(row) != columns:
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
            examples.append(Example(row[0].strip(), (first,), len(texts), number))
            texts.append(second)
        return examples, texts, []


class Qqp(Glue):
    """QQP: do two questions ask the same? Class 1 means yes."""

    name = "qqp"
    metric = "accuracy_f1"
    classes = ("not_duplicate", "duplicate")
    folder = "QQP"
    files = {"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)}
    hub_splits = {
        "train": {"train": "train"},
        "dev": {"validation": "dev"},
        "test": {"test": "test"},
    }
    hub_texts = ("question1", "question2")
    hub_labels = (0, 1)

    def parse(self, rows: Sequence[list[str]], path: str) -> Parsed:
        """See `Glue.parse`; as in Megatron, rows without six columns or two texts are left out."""
        columns = len(rows[0])
        if columns not in (3, 6):
            raise InputError(
                f"{path} has a header of {columns} columns; QQP's have 6 (train, dev) or 3 (test), "
                f"divided by tabs"
            )
        labelled = columns == 6
        first_column = 3 if labelled else 1
        examples: list[Example] = []
        texts: list[str] = []
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
            examples.append(Example(row[0].strip(), (sides[0],), len(texts), number))
            texts.append(sides[1])
        warnings = []
        if skipped:
            some = ", ".join(map(str, skipped[:5])) + (", ..." if len(skipped) > 5 else "")
            warnings.append(
                f"{path}: {len(skipped)} row(s) without {columns} columns or with an empty side "
                f"are left out, as Megatron does (line {some})"
            )
        return examples, texts, warnings

    def summary(self, metrics: Any) -> dict[str, float]:
        """See `Task.summary`; the paper's figure is the accuracy."""
        return {**super().summary(metrics), "f1": metrics["dev"]["f1"]}


def set_name(file: str) -> str:
    """Return the name of a file's set: dev_matched.tsv -> dev-matched.

    Megatron strips the letters of `.tsv` from the end, which makes `de` of QQP's dev.tsv; here it
    stays dev.
    """
    return file.removesuffix(".tsv").replace("_", "-")
