"""Questions on passages as rows: windows of a passage, and the place of the answer in each.

passage      b0 b1 b2 b3 b4 b5 b6          answer b4 b5, windows of 4 tokens, stride 3
window 0     [CLS] q [SEP] b0 b1 b2 b3 [SEP]            label (0, 0): not in it
window 1     [CLS] q [SEP] b3 b4 b5 b6 [SEP]            label (4, 5)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.tasks.data.tokens import Integers, Ragged, TextTokens
from mlm_eval.tasks.finetune.features import PairFeatures, special_ids
from mlm_eval.tasks.finetune.recipe import Recipe
from mlm_eval.tasks.finetune.task import Example


@dataclass(frozen=True)
class SpanExample(Example):
    """A question on a passage.

    Attributes:
        answers: The true answers and where each starts in the passage, in characters; empty where
            there is none, or none is known.
    """

    answers: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class SpanFeatures(PairFeatures):
    """The windows of all questions, a question's one after the other.

    Attributes:
        question: Number of each window's question, `[windows]`.
        char_starts: Where each token of a passage starts, in characters.
        char_stops: Where it ends, exclusive.
    """

    question: Integers
    char_starts: Ragged
    char_stops: Ragged


def window_features(
    examples: Sequence[SpanExample],
    questions: Ragged,
    passages: TextTokens,
    *,
    tokenizer: Tokenizer,
    recipe: Recipe,
) -> SpanFeatures:
    """Return the windows of all questions with the places of their first true answers.

    Args:
        examples: The questions.
        questions: Their tokens.
        passages: Tokens of the passages, with offsets.
        tokenizer: The model's own.
        recipe: For the lengths.
    """
    assert passages.starts is not None and passages.stops is not None
    lengths = np.minimum(questions.lengths, recipe.max_query_length)
    columns: dict[str, list[int]] = {name: [] for name in ("question", "second", "start", "stop")}
    labels: list[tuple[int, int]] = []
    for number, example in enumerate(examples):
        count = int(passages.tokens.offsets[example.second + 1])
        count -= int(passages.tokens.offsets[example.second])
        answer = None
        if example.answers:
            text, begin = example.answers[0]
            starts, stops = passages.starts[example.second], passages.stops[example.second]
            answer = token_span(starts, stops, begin, begin + len(text))
        before = int(lengths[number]) + 2  # [CLS] question [SEP]
        room = recipe.seq_length - before - 1
        for start, stop in windows(count, room, recipe.doc_stride):
            for name, value in zip(columns, (number, example.second, start, stop), strict=True):
                columns[name].append(value)
            inside = answer is not None and start <= answer[0] and answer[1] < stop
            shift = before - start
            labels.append((answer[0] + shift, answer[1] + shift) if answer and inside else (0, 0))
    arrays = {name: np.array(values, dtype=np.int64) for name, values in columns.items()}
    cls_id, sep_id = special_ids(tokenizer)
    return SpanFeatures(
        firsts=questions,
        seconds=passages.tokens,
        first=arrays["question"],
        **arrays,
        labels=np.array(labels, dtype=np.int64).reshape(-1, 2),
        rows=1,
        max_first=recipe.max_query_length,
        max_length=recipe.seq_length,
        cls_id=cls_id,
        sep_id=sep_id,
        char_starts=passages.starts,
        char_stops=passages.stops,
    )


def windows(count: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the windows of a passage of `count` tokens.

    They start `stride` tokens apart, nearer where a window is shorter than that, and the last one
    ends with the passage.
    """
    start = 0
    while True:
        stop = min(start + room, count)
        yield start, stop
        if stop == count:
            return
        start += min(stride, room)


def token_span(starts: Integers, stops: Integers, begin: int, end: int) -> tuple[int, int] | None:
    """Return the first and last token that a span of characters touches; None: it touches none."""
    first = int(np.searchsorted(stops, begin, side="right"))
    last = int(np.searchsorted(starts, end, side="left")) - 1
    return (first, last) if first <= last else None
