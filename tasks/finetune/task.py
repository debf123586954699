"""What the fine-tuning tasks have in common: examples, sets of them, how answers are judged."""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.text_file import misfit
from mlm_eval.checkpoints.folders.file_names import safe_name
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.tasks.data.sources import HUB_SPLITS, DatasetName, dataset_splits, is_dataset
from mlm_eval.tasks.data.tables import DataTable, is_table, read_table, split_of
from mlm_eval.tasks.data.tokens import tokens_of
from mlm_eval.tasks.finetune.features import Outputs, PairFeatures
from mlm_eval.tasks.finetune.settings import Recipe
from mlm_eval.training.objectives import Objective

ROLES = ("train", "dev", "test")

TASKS = {
    "race": ("race", "Race"),
    "mnli": ("glue", "Mnli"),
    "qqp": ("glue", "Qqp"),
    "squad": ("squad", "Squad"),
}
"""Module and class of each task."""

CLOSE_CALL = 1e-4
"""Two best choices whose scores differ by less may change places with the order of summation."""


@dataclass(frozen=True)
class Example:
    """One question to be answered."""

    id: str
    """Names it in its set."""
    firsts: tuple[str, ...]
    """What stands before the text, one for each row."""
    second: int
    """Number of the text in `ExampleSet.texts`."""
    label: int | None = None
    """The right choice or class; None where it is not known."""


@dataclass(frozen=True)
class ExampleSet:
    """One named set of examples, such as dev-middle."""

    name: str
    """As Megatron named it: the path's end with dashes."""
    role: str
    """`train`, `dev` or `test`."""
    path: str
    """Where it was read."""
    sha256: str
    """Of its content."""
    texts: Sequence[str]
    """What the examples are about, each once."""
    examples: Sequence[Any]
    """In the order of the data."""
    labelled: bool = True
    """Whether the right answers are known."""
    total: int = 0
    """Examples before any limit."""
    version: str = ""
    """Of the data, where there are several: SQuAD's `1.1` or `2.0`."""
    warnings: Sequence[str] = ()
    """What a reader of the figures must know."""

    def limited(self, limit: int | None) -> ExampleSet:
        """Return the first `limit` examples with the texts that they need."""
        total = len(self.examples)
        if limit is None or limit >= total:
            return dataclasses.replace(self, total=total)
        kept = self.examples[:limit]
        used = sorted({example.second for example in kept})
        places = {number: place for place, number in enumerate(used)}
        return dataclasses.replace(
            self,
            texts=[self.texts[number] for number in used],
            examples=[dataclasses.replace(e, second=places[e.second]) for e in kept],
            total=total,
        )

    def record(self) -> dict[str, Any]:
        """Return what a result record says about the set."""
        entry = {"role": self.role, "path": self.path, "sha256": self.sha256}
        examples = len(self.examples)
        return {**entry, "examples": examples, "of": max(self.total, examples)}


def merge(sets: Sequence[ExampleSet], role: str) -> ExampleSet:
    """Return sets as one, in their order."""
    texts: list[str] = []
    examples: list[Any] = []
    for part in sets:
        base = len(texts)
        texts += part.texts
        examples += [dataclasses.replace(e, second=e.second + base) for e in part.examples]
    return ExampleSet(role, role, "", "", texts, examples)


def check_names(sets: Sequence[ExampleSet]) -> Sequence[ExampleSet]:
    """Return the sets, each with a name of its own that begins with its role.

    The role alone is the name of its only set; beside others it is that of their pooled figures,
    and the set takes its file's name.

    Raises:
        InputError: A set is empty, has a name that no file can have, or that of another set.
    """
    named: dict[str, ExampleSet] = {}
    several = [role for role in ROLES if sum(part.role == role for part in sets) > 1]
    for part in sets:
        name = part.name
        if name.split("-")[0] != part.role:
            name = f"{part.role}-{name}" if name else part.role
        if name == part.role and part.role in several:
            stem = re.sub(r"[^\w.]+", "-", Path(part.path).stem)
            name = f"{part.role}-{stem.removeprefix(part.role).strip('-_') or stem}"
        safe_name(name, f"{part.path}: the set")
        if not part.examples:
            raise InputError(f"{part.path} holds no example; expected at least one for {name}")
        if name in named:
            raise InputError(
                f"{named[name].path} and {part.path} both make a set named {name}; give each of "
                f"them a name of its own, or leave one out"
            )
        named[name] = dataclasses.replace(part, name=name)
    return list(named.values())


@dataclass(frozen=True)
class Answered:
    """A set with the answers of a model, or of several together."""

    name: str
    """Of the set."""
    role: str
    """`train`, `dev` or `test`."""
    labelled: bool
    """Whether the right answers are known."""
    version: str
    """See `ExampleSet`."""
    records: Sequence[Mapping[str, Any]]
    """One for each example, in order, as JSON values: its `id`, the right answer (null where it is
    not known), and what the model holds of the possible ones."""


@dataclass(frozen=True)
class Judgement:
    """The figures of some sets, and their predictions."""

    metrics: dict[str, Any] = field(default_factory=dict)
    """By set, and pooled ones by role."""
    predictions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By set: its records, with the answers that were decided on."""

    def null_threshold(self, role: str) -> float | None:
        """Return the threshold of "no answer" that a role's sets were judged at; None: none."""
        threshold: float | None = self.metrics.get(role, {}).get("null_threshold")
        return threshold


class Task(ABC):
    """A benchmark that a model is fine-tuned for."""

    name: ClassVar[str]
    """Of the command."""
    head: ClassVar[str]
    """Name of the head that answers."""
    objective: ClassVar[type[Objective]]
    """The loss to train for."""
    classes: ClassVar[tuple[str, ...]] = ()
    """Names of a classification head's outputs, in order; empty for other heads."""
    hub: ClassVar[DatasetName]
    """Its set of the Hub, in the `datasets` library."""
    hub_splits: ClassVar[Mapping[str, Mapping[str, str]]] = HUB_SPLITS
    """Splits of each role there, by the name that their sets get."""
    hub_columns: ClassVar[tuple[str, ...]]
    """Columns there."""

    def default_recipe(self, sets: Sequence[ExampleSet]) -> str:
        """Return the name of the recipe for these sets: the paper's for its smallest model."""
        return f"{self.name}-megatron-336m"

    def read(self, data: str, roles: Sequence[str]) -> list[ExampleSet]:
        """Return the sets of a whole benchmark: its folder as published, or a `datasets` name.

        Args:
            data: The value of `--data`.
            roles: Those that are wanted; what is not there is left out.

        Raises:
            InputError: There is nothing, or it has not the benchmark's form.
        """
        if is_dataset(data):
            return [part for role in roles for part in self.read_hub(data, role)]
        return self.read_folder(Path(data).expanduser(), roles)

    def read_part(self, source: str, role: str) -> list[ExampleSet]:
        """Return the sets of one file or folder, or of a `datasets` name, as one role's.

        Args:
            source: A value of `--train`, `--dev` or `--test`.
            role: Which of them.

        Raises:
            InputError: There is nothing, or it has not the benchmark's form.
        """
        if is_dataset(source):
            return list(self.read_hub(source, role))
        path = Path(source).expanduser()
        if path.is_file() and is_table(path):
            rows = read_table(path)
            name = split_of(path).replace("validation", "dev").replace("_", "-")
            if set(self.hub_columns) <= set(rows.column_names):
                return list(self.hub_sets(rows, name, role=role, where=source))
            if (found := self.read_columns(rows, name, role=role, path=path)) is not None:
                return [found]
            if path.suffix == ".parquet":
                raise InputError(
                    f"{path} has the columns {', '.join(rows.column_names)}; expected "
                    f"{', '.join(self.hub_columns)}"
                )
        return self.read_path(path, role)

    @abstractmethod
    def read_folder(self, path: Path, roles: Sequence[str]) -> list[ExampleSet]:
        """See `read`, of a folder."""

    def read_path(self, path: Path, role: str) -> list[ExampleSet]:
        """See `read_part`, of a file or folder."""
        if path.is_dir():
            return self.read_folder(path, [role])
        return [self.read_file(path, role)]

    def read_columns(
        self, rows: DataTable, name: str, *, role: str, path: Path
    ) -> ExampleSet | None:
        """Return the set of a parquet or JSON-lines file without the Hub's columns.

        None: such a file is no table of the task, and `read_path` reads it.
        """
        return None

    def read_file(self, path: Path, role: str) -> ExampleSet:
        """Return the set of one file; not called where a task has its own `read_path`."""
        raise NotImplementedError

    def read_hub(self, source: str, role: str) -> Iterator[ExampleSet]:
        """Yield the sets of a `datasets` name that are one role's."""
        splits = dataset_splits(
            source,
            default=self.hub,
            splits=self.hub_splits[role],
            columns=self.hub_columns,
            role=role,
        )
        for name, where, rows in splits:
            yield from self.hub_sets(rows, name, role=role, where=where)

    @abstractmethod
    def hub_sets(self, rows: Any, name: str, *, role: str, where: str) -> Iterator[ExampleSet]:
        """Yield the sets of one split.

        Args:
            rows: Of the `datasets` library, with `hub_columns`.
            name: Of the split's set.
            role: Of the sets.
            where: The split, for people.

        Raises:
            InputError: A row has not the form of the benchmark's.
        """

    @abstractmethod
    def features(
        self, examples: ExampleSet, tokenizer: Tokenizer, recipe: Recipe, *, cache: Path
    ) -> PairFeatures:
        """Return the rows of a set.

        Args:
            examples: The set.
            tokenizer: The model's own.
            recipe: For the lengths.
            cache: Folder where the tokens are kept.
        """

    @abstractmethod
    def records(
        self, examples: ExampleSet, features: PairFeatures, outputs: Outputs, recipe: Recipe
    ) -> list[dict[str, Any]]:
        """Return what a model's outputs say about each example; see `Answered.records`."""

    @abstractmethod
    def merge(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return several models' records of one example as one: the paper's ensemble."""

    @abstractmethod
    def record_fault(self, record: Any) -> str | None:
        """Return what keeps a value from a file from being a record, in words; None: nothing."""

    @abstractmethod
    def judge(self, sets: Sequence[Answered], *, null_threshold: float | None = None) -> Judgement:
        """Return the figures of sets, pooled ones too, and their decided predictions.

        Args:
            sets: All that belong together: a threshold may be found on some for the others.
            null_threshold: See `Recipe`.
        """

    def submission(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Return decided predictions in the benchmark's own forms: file suffix -> text."""
        return {}

    @abstractmethod
    def summary(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return the dev sets' figures for a line: `score`, which chooses among models, first."""


def make_task(name: str) -> Task:
    """Return a task by the name of its command.

    Raises:
        InputError: There is no such task.
    """
    if name not in TASKS:
        raise InputError(
            f"there is no task {name!r} to fine-tune for; known are {', '.join(TASKS)}"
        )
    module, kind = TASKS[name]
    task: Task = getattr(import_module(f"mlm_eval.tasks.finetune.{module}"), kind)()
    return task


class ChoiceTask(Task):
    """A task whose answer is one of a few: a class, or a choice with a row of its own."""

    metric: ClassVar[str] = "accuracy"

    def features(
        self, examples: ExampleSet, tokenizer: Tokenizer, recipe: Recipe, *, cache: Path
    ) -> PairFeatures:
        """See `Task.features`."""
        firsts = [text for example in examples.examples for text in example.firsts]
        return PairFeatures.of_whole_texts(
            tokens_of(firsts, tokenizer, cache=cache).tokens,
            tokens_of(examples.texts, tokenizer, cache=cache).tokens,
            second=[example.second for example in examples.examples],
            labels=[example.label or 0 for example in examples.examples],
            tokenizer=tokenizer,
            max_length=recipe.seq_length,
            max_first=self.max_first(recipe),
        )

    def max_first(self, recipe: Recipe) -> int | None:
        """Return the length beyond which the text before the [SEP] is cut; None: it is not."""
        return None

    def records(
        self, examples: ExampleSet, features: PairFeatures, outputs: Outputs, recipe: Recipe
    ) -> list[dict[str, Any]]:
        """See `Task.records`: `id`, `label` and `probabilities`."""
        rows = digits(softmax(outputs.table()))
        return [
            {"id": example.id, "label": example.label, "probabilities": row}
            for example, row in zip(examples.examples, rows, strict=True)
        ]

    def merge(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See `Task.merge`: the mean of the probabilities."""
        mean = np.mean([record["probabilities"] for record in records], axis=0)
        return {**records[0], "probabilities": digits(mean[None])[0]}

    def record_fault(self, record: Any) -> str | None:
        """See `Task.record_fault`."""
        schema = {"id": "text", "label": "count?", "probabilities": "numbers"}
        if fault := misfit(record, schema):
            return fault
        shares, label = record["probabilities"], record.get("label")
        if "label" not in record:
            return "it has no 'label'"
        if len(shares) < 2 or not all(0 <= share <= 1.001 for share in shares):
            return f"its probabilities are {shown(shares)}"
        if label is not None and label >= len(shares):
            return f"its label is {label}, it has {len(shares)} probabilities"
        return None

    def judge(self, sets: Sequence[Answered], *, null_threshold: float | None = None) -> Judgement:
        """See `Task.judge`; all of a role's examples are pooled, as in Megatron's `overall`."""
        judgement = Judgement()
        by_role: dict[str, list[Answered]] = {}
        for part in sets:
            judgement.predictions[part.name] = [dict(record) for record in part.records]
            if part.labelled:
                by_role.setdefault(part.role, []).append(part)
                judgement.metrics[part.name] = {
                    **self.figures(part.records),
                    "close_calls": close_calls(part.records),
                }
        for role, parts in by_role.items():
            if role not in judgement.metrics:  # else it is the name of the role's one set
                judgement.metrics[role] = self.figures([r for part in parts for r in part.records])
        return judgement

    def figures(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the figures of labelled records, by our `evaluate` module."""
        from mlm_eval.tasks.finetune import metrics

        predictions = [int(np.argmax(record["probabilities"])) for record in records]
        return metrics.compute(self.metric, predictions, [record["label"] for record in records])

    def summary(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """See `Task.summary`; the score is the accuracy over all dev sets."""
        accuracy = metrics["dev"]["accuracy"]
        parts = {name: entry for name, entry in metrics.items() if name.startswith("dev-")}
        named = {name: entry["accuracy"] for name, entry in parts.items()}
        return {"score": accuracy, "accuracy": accuracy, **named}


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    """Return the probabilities of each row, float64."""
    raised = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    table: NDArray[Any] = raised / raised.sum(axis=1, keepdims=True)
    return table


def digits(table: NDArray[Any]) -> list[list[float]]:
    """Return rows of floats with nine digits, all that float32 scores are worth."""
    return [[float(f"{value:.9g}") for value in row] for row in table.tolist()]


def close_calls(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the ids of the records whose two best scores are almost the same."""
    found = []
    for record in records:
        *_, second, best = sorted(record["probabilities"])
        # The difference of two scores is that of the logarithms of their probabilities.
        if second > 0 and math.log(best / second) < CLOSE_CALL:
            found.append(record["id"])
    return found
