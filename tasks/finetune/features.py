"""From pairs of texts to the rows that BERT reads: `[CLS] A [SEP] B [SEP]`, as Megatron made them.

    tokens   [CLS] a a a [SEP] b b b b b [SEP]
    types      0   0 0 0   0   1 1 1 1 1   1

A row that would be longer than it may be loses its end, B's tail (an article's), and keeps the last
[SEP]. Rows are put together when they are read: an article stands in memory once, not once for each
of the answers to its questions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.engine.encode import QA_HEAD, BertInput
from mlm_eval.tasks.data.tokens import Integers, Ragged
from mlm_eval.training.data import Sample

if TYPE_CHECKING:
    from mlm_eval.engine.engine import Engine

SPECIAL_TOKENS = 3
"""[CLS] and two [SEP]."""


def clean_text(text: str) -> str:
    """Return a text on one line, its white space single and no space before a full stop.

    Three rounds, because each of them misses every second one of a row of full stops.
    Source: docs/megatron.md, "Text preparation"; Megatron-LM v2.5, tasks/data_utils.py.
    """
    text = re.sub(r"\s+", " ", text.replace("\n", " "))
    for _ in range(3):
        text = text.replace(" . ", ". ")
    return text


def special_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids of [CLS] and [SEP].

    Raises:
        InputError: The vocabulary has none, so it is not BERT's.
    """
    cls_id, sep_id = tokenizer.cls_id, tokenizer.sep_id
    if cls_id is None or sep_id is None:
        raise InputError(
            f"{tokenizer.source} has no [CLS] and [SEP]: fine-tuning needs the vocabulary of a "
            f"BERT model; give its own with --tokenizer or --vocab-file"
        )
    return cls_id, sep_id


@dataclass(frozen=True)
class PairFeatures(Sequence[Sample]):
    """The samples of a data set, made when they are read."""

    firsts: Ragged
    """The A's: `rows` in a row for each sample."""
    seconds: Ragged
    """The texts that B's are parts of."""
    first: Integers
    """Number of each sample's first A, `[samples]`."""
    second: Integers
    """Number of each sample's text, `[samples]`."""
    start: Integers
    """Where B begins in its text, `[samples]`."""
    stop: Integers
    """Where B ends, exclusive, `[samples]`."""
    labels: Integers
    """`[samples]`, or `[samples, 2]` for an answer's first and last position in the row. Where they
    are not known (a test set), 0."""
    rows: int
    """Rows of a sample: 4 for RACE, else 1."""
    max_first: int | None
    """A's beyond this length lose their end; None: none does."""
    max_length: int
    """Of a row."""
    cls_id: int
    """Id of [CLS]."""
    sep_id: int
    """Id of [SEP]."""

    @classmethod
    def of_whole_texts(
        cls,
        firsts: Ragged,
        seconds: Ragged,
        *,
        second: Sequence[int],
        labels: Sequence[int],
        tokenizer: Tokenizer,
        max_length: int,
        max_first: int | None = None,
    ) -> PairFeatures:
        """Return samples whose B's are whole texts, before the cut; see the attributes."""
        samples = len(second)
        rows = len(firsts) // max(samples, 1)
        assert len(firsts) == rows * samples == rows * len(labels), "as many A's for each sample"
        which = np.asarray(second, dtype=np.int64)
        cls_id, sep_id = special_ids(tokenizer)
        return cls(
            firsts=firsts,
            seconds=seconds,
            first=np.arange(samples, dtype=np.int64) * rows,
            second=which,
            start=np.zeros(samples, np.int64),
            stop=seconds.lengths[which],
            labels=np.asarray(labels, dtype=np.int64),
            rows=rows,
            max_first=max_first,
            max_length=max_length,
            cls_id=cls_id,
            sep_id=sep_id,
        )

    @property
    def width(self) -> int:
        """Tokens that every row is padded to; 0: as many as its batch needs."""
        return 0

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: Any) -> Any:
        """Return sample `index`; there are no slices."""
        if not 0 <= index < len(self):
            raise IndexError(index)  # also what ends an iteration
        rows = [self.row(index, choice) for choice in range(self.rows)]
        label = self.labels[index]
        return Sample(
            rows=[tokens for tokens, _ in rows],
            tokentypes=[types for _, types in rows],
            label=int(label) if self.labels.ndim == 1 else (int(label[0]), int(label[1])),
            index=index,
            width=self.width,
        )

    def row(self, index: int, choice: int = 0) -> tuple[Tensor, Tensor]:
        """Return the tokens of a row and their types, `[length]` int64."""
        a = self.firsts[int(self.first[index]) + choice][: self.max_first]
        b = self.seconds[int(self.second[index])][int(self.start[index]) : int(self.stop[index])]
        length = min(len(a) + len(b) + SPECIAL_TOKENS, self.max_length)
        tokens = np.empty(length, np.int64)
        tokens[0], tokens[-1] = self.cls_id, self.sep_id
        body = tokens[1:-1]  # a view: A, [SEP] and as much of B as there is room for
        body[: len(a)] = a[: len(body)]
        if len(body) > len(a):
            body[len(a)] = self.sep_id
            body[len(a) + 1 :] = b[: len(body) - len(a) - 1]
        types = np.ones(length, np.int64)
        types[: min(len(a) + 2, length - 1)] = 0
        return torch.from_numpy(tokens), torch.from_numpy(types)

    @cached_property
    def row_lengths(self) -> Integers:
        """Length of every row, `[samples * rows]`, a sample's rows together."""
        which = (self.first[:, None] + np.arange(self.rows)).ravel()
        first = self.firsts.lengths[which]
        if self.max_first is not None:
            first = np.minimum(first, self.max_first)
        second = np.repeat(self.stop - self.start, self.rows)
        lengths: Integers = np.minimum(first + second + SPECIAL_TOKENS, self.max_length)
        return lengths

    def length(self, index: int) -> int:
        """Return the length of a sample's longest row without making it."""
        first = index * self.rows
        return int(self.row_lengths[first : first + self.rows].max())

    def cut_rows(self) -> int:
        """Return how many rows have lost the end of their B."""
        uncut = dataclasses.replace(self, max_length=int(np.iinfo(np.int64).max))
        return int((uncut.row_lengths > self.max_length).sum())


@dataclass(frozen=True)
class RowInputs(Sequence[BertInput]):
    """The rows of all samples, one after the other, as the model's inputs; made when read."""

    features: PairFeatures

    def __len__(self) -> int:
        return len(self.features) * self.features.rows

    def __getitem__(self, number: Any) -> Any:
        return BertInput(*self.features.row(*divmod(number, self.features.rows)))


@dataclass(frozen=True)
class Outputs:
    """What a head says about a set."""

    values: NDArray[np.float32]
    """`[rows, outputs]` float32, a sample's rows one after the other; of a span head `[tokens, 2]`,
    the tokens of all rows one after the other."""
    offsets: NDArray[np.int64] | None
    """Span head: where each row's tokens start, and the end, `[rows + 1]`; else None."""
    rows: int
    """Rows of a sample."""

    def table(self) -> NDArray[np.float32]:
        """Return each sample's scores of its classes or choices, `[samples, classes]`."""
        assert self.offsets is None
        return self.values.reshape(-1, self.rows * self.values.shape[1])

    @classmethod
    def of(
        cls,
        engine: Engine,
        features: PairFeatures,
        *,
        head: str,
        autocast: torch.dtype | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Outputs:
        """Return the logits of a head for all rows, on every rank the same.

        Args:
            engine: Holds a BERT model with the head.
            features: The rows.
            head: `classification_head`, `multichoice_head` or `qa_head`.
            autocast: Compute matrix products in this dtype; None: in the engine's.
            on_progress: Called with (rows done, rows in all), on rank 0.
        """
        outputs = engine.encode(
            RowInputs(features),
            states=False,
            head=head,
            autocast=autocast,
            on_progress=on_progress,
        )
        logits = [output.heads[head] for output in outputs]
        if head != QA_HEAD:
            return cls(torch.stack(logits).numpy(), None, features.rows)
        offsets = np.cumsum([0, *map(len, logits)])
        return cls(torch.cat(logits).numpy(), offsets, features.rows)
