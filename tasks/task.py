"""What the fine-tuning tasks have in common: examples, their sets, and how predictions are judged."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.objectives import Objective
from mlm_eval.tasks.features import PairFeatures
from mlm_eval.tasks.inference import Outputs
from mlm_eval.tasks.recipe import Recipe
from mlm_eval.tasks.tokenized import tokenize
from mlm_eval.tokenizer import Tokenizer

ROLES = ("train", "dev", "test")

CLOSE_CALL = 1e-4
"""Two best choices whose scores differ by less may change places with the order of summation."""


@dataclass(frozen=True)
class Example:
    """One question to be answered.

    Attributes:
        id: Names it in its set.
        firsts: What stands before the text, one for each row.
        second: Number of the text in `ExampleSet.texts`.
        label: The right choice or class; None where it is not known.
    """

    id: str
    firsts: tuple[str, ...]
    second: int
    label: int | None = None


@dataclass(frozen=True)
class ExampleSet:
    """One named set of examples, such as dev-middle.

    Attributes:
        name: As Megatron named it: the path's end with dashes.
        role: `train`, `dev` or `test`.
        path: Where it was read.
        sha256: Of its content.
        texts: What the examples are about, each once.
        examples: In the order of the data.
        labelled: Whether the right answers are known.
        total: Examples before any limit.
        warnings: What a reader of the figures must know.
    """

    name: str
    role: str
    path: str
    sha256: str
    texts: Sequence[str]
    examples: Sequence[Any]
    labelled: bool = True
    total: int = 0
    warnings: Sequence[str] = ()

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
        return {**entry, "examples": len(self.examples), "of": self.total}


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

    Raises:
        InputError: A set is empty, or two have the same name.
    """
    named: dict[str, ExampleSet] = {}
    for part in sets:
        name = part.name
        if name.split("-")[0] != part.role:
            name = f"{part.role}-{name}" if name else part.role
        if not part.examples:
            raise InputError(f"{part.path} holds no example; expected at least one for {name}")
        if name in named:
            raise InputError(
                f"{named[name].path} and {part.path} both make a set named {name}; give each of them "
                f"a name of its own, or leave one out"
            )
        named[name] = dataclasses.replace(part, name=name)
    return list(named.values())


@dataclass(frozen=True)
class Evaluated:
    """A set with what the model says about it."""

    examples: ExampleSet
    features: PairFeatures
    outputs: Outputs


@dataclass(frozen=True)
class Judgement:
    """The figures of some sets, and their predictions.

    Attributes:
        metrics: By set, and pooled ones by role.
        predictions: By set: one record for each example, in order.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    predictions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Task(ABC):
    """A benchmark that a model is fine-tuned for.

    Attributes:
        name: Of the command.
        head: Name of the head that answers.
        classes: Names of a classification head's outputs, in order; empty for other heads.
    """

    name: ClassVar[str]
    head: ClassVar[str]
    classes: ClassVar[tuple[str, ...]] = ()

    def default_recipe(self, sets: Sequence[ExampleSet]) -> str:
        """Return the name of the recipe for these sets: the paper's for its smallest model."""
        return f"{self.name}-megatron-336m"

    def protocol(self, sets: Sequence[ExampleSet]) -> str:
        """Return the name of the rules that the figures follow."""
        return "megatron-paper"

    @abstractmethod
    def objective(self) -> Objective:
        """Return the loss to train for."""

    @abstractmethod
    def read(self, data: str, roles: Sequence[str]) -> list[ExampleSet]:
        """Return the sets of a whole benchmark: its folder as published, or a `datasets` name.

        Args:
            data: The value of `--data`.
            roles: Those that are wanted; what is not there is left out.
        """

    @abstractmethod
    def read_part(self, source: str, role: str) -> list[ExampleSet]:
        """Return the sets of one file or folder, or of a `datasets` name, as one role's.

        Args:
            source: A value of `--train`, `--dev` or `--test`.
            role: Which of them.
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
    def judge(self, sets: Sequence[Evaluated], recipe: Recipe) -> Judgement:
        """Return the figures of sets that were evaluated, and the pooled ones."""

    @abstractmethod
    def summary(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return the figures of the dev sets for a line: first `score`, which chooses among models."""

    @abstractmethod
    def ensemble(
        self, files: Sequence[Sequence[Mapping[str, Any]]], settings: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Return the predictions of several models together, and their figures where labels are known.

        Args:
            files: The prediction records of each model, the same examples in the same order.
            settings: What the files say about the set.
        """


class ChoiceTask(Task):
    """A task whose answer is one of a few: a class, or a choice with a row of its own."""

    metric: ClassVar[str] = "accuracy"

    def features(
        self, examples: ExampleSet, tokenizer: Tokenizer, recipe: Recipe, *, cache: Path
    ) -> PairFeatures:
        """See `Task.features`."""
        firsts = [text for example in examples.examples for text in example.firsts]
        return PairFeatures.of_whole_texts(
            tokenize(firsts, tokenizer, cache=cache).tokens,
            tokenize(examples.texts, tokenizer, cache=cache).tokens,
            second=[example.second for example in examples.examples],
            labels=[example.label or 0 for example in examples.examples],
            tokenizer=tokenizer,
            max_length=recipe.seq_length,
            max_first=self.max_first(recipe),
        )

    def max_first(self, recipe: Recipe) -> int | None:
        """Return the length beyond which the text before the [SEP] is cut; None: it is not."""
        return None

    def judge(self, sets: Sequence[Evaluated], recipe: Recipe) -> Judgement:
        """See `Task.judge`; correct answers are pooled by role."""
        judgement = Judgement()
        by_role: dict[str, list[tuple[NDArray[Any], list[int]]]] = {}
        for part in sets:
            examples, logits = part.examples, part.outputs.table()
            judgement.predictions[examples.name] = choice_records(examples, logits)
            if not examples.labelled:
                continue
            labels = [example.label for example in examples.examples]
            close = zip(examples.examples, close_calls(logits), strict=True)
            judgement.metrics[examples.name] = {
                **self.figures(logits, labels),
                "close_calls": [example.id for example, is_close in close if is_close],
            }
            by_role.setdefault(examples.role, []).append((logits, labels))
        for role, parts in by_role.items():
            if role not in judgement.metrics:  # else it is the name of the role's one set
                logits = np.concatenate([part[0] for part in parts])
                labels = [label for part in parts for label in part[1]]
                judgement.metrics[role] = self.figures(logits, labels)
        return judgement

    def figures(self, scores: NDArray[Any], labels: Sequence[int]) -> dict[str, Any]:
        """Return the metric of a set by our `evaluate` module."""
        from mlm_eval.tasks import metrics

        found = metrics.load(self.metric).compute(
            predictions=scores.argmax(axis=1).tolist(), references=list(labels)
        )
        assert found is not None
        return dict(found)

    def summary(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """See `Task.summary`; the score is the accuracy over all dev sets."""
        figures = {"score": metrics["dev"]["accuracy"], "accuracy": metrics["dev"]["accuracy"]}
        named = {k: v for k, v in metrics.items() if k.startswith("dev-")}
        return {**figures, **{name: entry["accuracy"] for name, entry in named.items()}}

    def ensemble(
        self, files: Sequence[Sequence[Mapping[str, Any]]], settings: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """See `Task.ensemble`: the mean of the probabilities decides."""
        tables = [np.array([record["probabilities"] for record in file]) for file in files]
        mean = np.mean(tables, axis=0)
        labels = [record["label"] for record in files[0]]
        records = [
            {"id": record["id"], "label": record["label"], "probabilities": row}
            for record, row in zip(files[0], digits(mean), strict=True)
        ]
        return records, None if None in labels else self.figures(mean, labels)


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    """Return the probabilities of each row, float64."""
    raised = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    table: NDArray[Any] = raised / raised.sum(axis=1, keepdims=True)
    return table


def close_calls(logits: NDArray[Any]) -> list[bool]:
    """Return for each row whether its two best scores are almost the same."""
    if logits.shape[1] < 2:
        return [False] * len(logits)
    two = np.partition(logits, -2, axis=1)[:, -2:]
    return list((two[:, 1] - two[:, 0] < CLOSE_CALL).tolist())


def choice_records(examples: ExampleSet, logits: NDArray[Any]) -> list[dict[str, Any]]:
    """Return a prediction record for each example: id, label (null where unknown), probabilities."""
    return [
        {"id": example.id, "label": example.label, "probabilities": row}
        for example, row in zip(examples.examples, digits(softmax(logits)), strict=True)
    ]


def digits(table: NDArray[Any]) -> list[list[float]]:
    """Return rows of floats with nine digits, all that float32 scores are worth."""
    return [[float(f"{value:.9g}") for value in row] for row in table.tolist()]
