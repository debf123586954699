"""Answers as spans of passages: windows of a passage as rows, and the best spans of their scores.

passage      b0 b1 b2 b3 b4 b5 b6          answer b4 b5, windows of 4 tokens, stride 3
window 0     [CLS] q [SEP] b0 b1 b2 b3 [SEP]            label (0, 0): not in it
window 1     [CLS] q [SEP] b3 b4 b5 b6 [SEP]            label (4, 5)

The score of a span is the sum of its first token's start score and its last token's end score. All
spans of a window that are short enough are compared, not only pairs of the best starts and ends:

    scores[window, first, length - 1] = start[window, first] + end[window, first + length - 1]

A token stands in several windows of a long passage. As a first token it counts only in the window
that shows most of its surroundings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.tasks.data.tokens import Integers, Ragged, TextTokens
from mlm_eval.tasks.finetune.features import Outputs, PairFeatures, special_ids
from mlm_eval.tasks.finetune.settings import Recipe
from mlm_eval.tasks.finetune.task import Example

BLOCK_TOKENS = 1 << 15
"""Padded tokens that are searched at a time."""

Floats = NDArray[np.floating[Any]]


# ---- windows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpanExample(Example):
    """A question on a passage."""

    answers: tuple[tuple[str, int], ...] = ()
    """The true answers and where each starts in the passage, in characters; empty where there is
    none, or none is known."""


@dataclass(frozen=True)
class SpanFeatures(PairFeatures):
    """The windows of all questions, a question's one after the other."""

    question: Integers
    """Number of each window's question, `[windows]`."""
    char_starts: Ragged
    """Where each token of a passage starts, in characters."""
    char_stops: Ragged
    """Where it ends, exclusive."""

    @property
    def width(self) -> int:
        """See `PairFeatures.width`: the softmax of an answer runs over padding, too."""
        return self.max_length


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


# ---- answers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spans:
    """The best spans of some windows, best first, as tokens of the passage."""

    scores: Floats
    """`[windows, n_best]`; minus infinity where a window has fewer spans."""
    first: Integers
    """Number of the first token, `[windows, n_best]`."""
    last: Integers
    """Number of the last token."""


def best_spans(
    starts: Sequence[Floats],
    ends: Sequence[Floats],
    allowed: Sequence[NDArray[np.bool_]],
    *,
    n_best: int,
    max_length: int,
) -> Spans:
    """Return the best spans of windows, counted from each window's first token.

    Args:
        starts: Start score of each token of the passage in each window.
        ends: End scores, of the same lengths.
        allowed: Which tokens an answer may start with.
        n_best: Spans for each window.
        max_length: Most tokens of a span.
    """
    count = len(starts)
    scores = np.full((count, n_best), -np.inf, np.float32)
    first, last = np.zeros((count, n_best), np.int64), np.zeros((count, n_best), np.int64)
    order = sorted(range(count), key=lambda window: -len(starts[window]))
    while order:
        width = max(len(starts[order[0]]), 1)  # sorted: the widest of the block
        size = max(BLOCK_TOKENS // width, 1)
        block, order = order[:size], order[size:]
        begin = np.full((len(block), width), -np.inf, np.float32)
        # Ends beyond the window: spans that leave it lose.
        finish = np.full((len(block), width + max_length - 1), -np.inf, np.float32)
        for line, window in enumerate(block):
            length = len(starts[window])
            begin[line, :length] = np.where(allowed[window], starts[window], -np.inf)
            finish[line, :length] = ends[window]
        band = np.lib.stride_tricks.sliding_window_view(finish, max_length, axis=1)
        sums = (begin[:, :, None] + band).reshape(len(block), -1)  # [block, width * max_length]
        kept = min(n_best, sums.shape[1])
        top = np.argpartition(-sums, kept - 1, axis=1)[:, :kept]
        values = np.take_along_axis(sums, top, axis=1)
        # Equal scores: the earlier and then the shorter span first.
        ranks = np.lexsort((top, -values), axis=1)
        top = np.take_along_axis(top, ranks, axis=1)
        values = np.take_along_axis(values, ranks, axis=1)
        scores[block, :kept] = values
        first[block, :kept] = top // max_length
        last[block, :kept] = top // max_length + top % max_length
    return Spans(scores, first, last)


def shows_most(starts: Integers, stops: Integers) -> list[NDArray[np.bool_]]:
    """Return for each window of one passage which of its tokens it shows best.

    A token's surroundings are the smaller of the numbers of tokens before and after it in the
    window, with a little weight on the window's length; of equal windows the first one counts.
    Source: BERT's run_squad.py.

    Args:
        starts: First token of each window.
        stops: Its end, exclusive.
    """
    if len(starts) == 1:
        return [np.ones(int(stops[0] - starts[0]), dtype=bool)]
    total = int(stops.max())
    best = np.full(total, -np.inf)
    owner = np.full(total, -1)
    for window, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        place = np.arange(stop - start)
        room = np.minimum(place, stop - start - 1 - place) + 0.01 * (stop - start)
        better = room > best[start:stop]
        best[start:stop][better] = room[better]
        owner[start:stop][better] = window
    return [
        owner[start:stop] == window
        for window, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True))
    ]


def best_answers(
    features: SpanFeatures,
    outputs: Outputs,
    texts: Sequence[str],
    *,
    n_best: int,
    max_length: int,
) -> list[tuple[list[tuple[str, float]], float]]:
    """Return each question's best answers with their scores, and its score of "no answer".

    Answers are different texts, best first; there may be none (a passage without tokens). The score
    of "no answer" is the lowest over the windows: one that holds an answer speaks against it.

    Args:
        features: The windows, a question's one after the other.
        outputs: Start and end scores of their tokens.
        texts: The passages.
        n_best: Answers for each question.
        max_length: Most tokens of an answer.
    """
    assert outputs.offsets is not None
    # The passage stands before the last [SEP].
    stops = outputs.offsets[:-1] + features.row_lengths - 1
    begins = stops - (features.stop - features.start)
    passages = [outputs.values[begin:stop] for begin, stop in zip(begins, stops, strict=True)]
    starts, ends = ([scores[:, column] for scores in passages] for column in (0, 1))
    bounds = np.flatnonzero(np.diff(features.question, prepend=-1, append=-1))
    allowed = [
        mask
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
        for mask in shows_most(features.start[begin:end], features.stop[begin:end])
    ]
    spans = best_spans(starts, ends, allowed, n_best=n_best, max_length=max_length)
    null = outputs.values[outputs.offsets[:-1]].sum(axis=1)
    found = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        text = texts[int(features.second[begin])]
        answers = _texts(features, spans, slice(int(begin), int(end)), text, n_best)
        found.append((answers, float(null[begin:end].min())))
    return found


def _texts(
    features: SpanFeatures, spans: Spans, windows: slice, text: str, n_best: int
) -> list[tuple[str, float]]:
    """Return the best different texts of a question's windows."""
    scores = spans.scores[windows]
    shift = features.start[windows][:, None]
    first, last = spans.first[windows] + shift, spans.last[windows] + shift
    passage = int(features.second[windows.start])
    starts, stops = features.char_starts[passage], features.char_stops[passage]
    answers: dict[str, float] = {}
    for place in np.argsort(-scores, axis=None, kind="stable"):
        score = float(scores.flat[place])
        if len(answers) == n_best or score == -np.inf:
            break
        answer = text[starts[first.flat[place]] : stops[last.flat[place]]]
        answers.setdefault(answer, score)
    return list(answers.items())
