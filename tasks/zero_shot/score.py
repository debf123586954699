"""Log-probabilities of given sequences, as JSON lines (`mlm-eval score`)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import write_text
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.engine.encode import BertInput, find_fault
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.resume import Identified, PartialScores, deciding_parts
from mlm_eval.engine.score import PairRequest, Request, find_encoder_fault
from mlm_eval.model.costs.flops import forward_flops
from mlm_eval.tasks.zero_shot.sequences import PAIR_FORM, GivenSequences, InputLine
from mlm_eval.tasks.zero_shot.wikitext103 import strided_windows

LOGITS = {"binary_head": "binary_logits", "classification_head": "head_logits"}
"""Heads of a BERT, and what their logits are called in a record."""


def score_lines(
    engine: Engine,
    lines: Sequence[InputLine],
    *,
    stride: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    partial: PartialScores | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the output records in the order of the input: a line's own fields and its scores.

    `sum_logprob` adds up the log-probabilities of the scored tokens (of a BERT those that its
    padding mask keeps), in nats; of nothing it is 0, and null where one of them is. A line without
    a token is no input of the model.

    Args:
        engine: The loaded model, GPT, BERT or T5.
        lines: The input.
        stride: For GPT sequences of more than positions + 1 tokens: how many tokens each further
            window scores; None: half the positions.
        on_progress: Called with (done, in all), on rank 0: tokens, or inputs of a BERT.
        partial: Scores kept of an interrupted run, and where to keep those of this one.

    Raises:
        InputError: A line does not fit the model; the message names it.
    """
    filled = [line for line in lines if not line.is_empty]
    check_lines(filled, engine.config)
    scored: Iterator[dict[str, Any]] = iter(())
    if filled and engine.config.family == "bert":
        scored = _score_bert(engine, filled, on_progress, partial)
    elif filled and engine.config.family == "t5":
        scored = _score_t5(engine, filled, on_progress, partial)
    elif filled:
        scored = _score_gpt(engine, filled, stride, on_progress, partial)
    for line in lines:
        figures = _EMPTY if line.is_empty else next(scored)
        yield {**line.fields, **figures}


_EMPTY = {"tokens": [], "logprobs": [], "greedy": [], "sum_logprob": 0.0}


def score_work(
    engine: Engine, lines: Sequence[InputLine], stride: int | None
) -> tuple[int, int, float | None]:
    """Return what the model will see: how many sequences and tokens, and the operations.

    The operations are None for a T5, whose encoder is not counted.

    Raises:
        InputError: The stride leaves gaps.
    """
    config = engine.config
    rows = [row for line in lines for row in line.rows if row]
    if config.family == "t5":
        return sum(len(row) > 1 for row in rows), sum(map(len, rows)), None
    if config.family == "bert":
        sizes = [(len(row), len(row)) for row in rows]
    else:
        windows = _windows(engine, lines, stride)
        sizes = [(stop - start - 1, scored) for found in windows for start, stop, scored in found]
    flops = sum(
        count * forward_flops(config, length, last_rows=scored, head_rows=scored)
        for (length, scored), count in Counter(sizes).items()
    )
    return len(sizes), sum(length for length, _ in sizes), flops


def longest_row(config: ModelConfig, lines: Sequence[InputLine]) -> int:
    """Return the most tokens that the model reads at once; of a T5 those of the encoder."""
    if config.family == "t5":
        return max((len(line.encoder_tokens or []) for line in lines), default=0)
    longest = max((len(row) for line in lines for row in line.rows), default=0)
    if config.family == "gpt":  # reads all but the last, by windows where they are too many
        return min(longest - 1, config.max_position_embeddings)
    return longest


def resume_parts(
    model: Identified,
    given: GivenSequences,
    tokenizer: Tokenizer | None,
    stride: int | None,
    begin: Sequence[int] = (),
) -> dict[str, Any]:
    """Return all that decides the scores of what was read."""
    settings = {"stride": stride, "begin": list(begin)}
    return deciding_parts(model, "score", data=given.digest, tokenizer=tokenizer, settings=settings)


def mean_logprob(records: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the mean log-probability of all scored tokens, in nats; None: of nothing, or NaN."""
    found: list[float] = []
    rows: list[Any] = [record.get("logprobs") for record in records]
    while rows:
        value = rows.pop()
        if isinstance(value, float):
            found.append(value)
        elif isinstance(value, list):
            rows += value
    return math.fsum(found) / len(found) if found else None


def check_lines(lines: Sequence[InputLine], config: ModelConfig) -> None:
    """Refuse lines that a model cannot score.

    Raises:
        InputError: There is one; the message names it.
    """
    for line in lines:
        if not line.is_empty:
            _check_line(line, config)


def _check_line(line: InputLine, config: ModelConfig) -> None:
    """Refuse a line that the model cannot score, by its place in the file."""
    if config.family != "t5" and (line.encoder_tokens or line.encoder_mask):
        raise InputError(
            f"{line.where} has T5 fields (encoder_tokens or encoder_mask), but this is a "
            f"{config.family.upper()} checkpoint; leave them out"
        )
    if config.family == "bert":
        for item in _bert_inputs(line):
            fault = find_fault(item, config)
            if fault is not None:
                raise InputError(f"{line.where} {fault}")
        return
    if line.choices or line.tokentypes or line.padding_mask:
        raise InputError(
            f"{line.where} has BERT fields (choices, tokentypes or padding_mask), but this is a "
            f"{config.family.upper()} checkpoint; leave them out"
        )
    if config.family == "t5":
        _check_pair(line, config)
    rows = config.vocab_size
    outside = next((token for token in line.rows[0] if not 0 <= token < rows), None)
    if outside is not None:
        raise InputError(
            f"{line.where} holds token id {outside}, outside the model's vocabulary of {rows} "
            "rows; the tokenizer does not belong to this checkpoint"
        )


def _check_pair(line: InputLine, config: ModelConfig) -> None:
    """Refuse a line that a T5 cannot score."""
    if line.encoder_tokens is None:
        raise InputError(
            f"{line.where} has no encoder_tokens, but this is a T5 checkpoint; expected {PAIR_FORM}"
        )
    tokens, mask = _encoder_input(line)
    fault = find_encoder_fault(tokens, mask, config)
    if fault is not None:
        raise InputError(f"{line.where}: {fault}")
    positions = config.max_position_embeddings
    if len(line.rows[0]) > positions + 1:
        raise InputError(
            f"{line.where} has {len(line.rows[0])} tokens, the decoder takes at most "
            f"{positions + 1}; cut them"
        )


def _encoder_input(line: InputLine) -> tuple[Tensor, Tensor]:
    tokens = torch.tensor(line.encoder_tokens or [], dtype=torch.int64)
    mask = torch.ones_like(tokens)
    if line.encoder_mask is not None:
        mask = torch.tensor(line.encoder_mask, dtype=torch.int64)
    return tokens, mask


def _score_t5(
    engine: Engine,
    lines: Sequence[InputLine],
    on_progress: Callable[[int, int], None] | None,
    partial: PartialScores | None,
) -> Iterator[dict[str, Any]]:
    requests = [
        PairRequest(torch.tensor(row, dtype=torch.int64), len(row) - 1, *_encoder_input(line))
        for line in lines
        if len(row := line.rows[0]) > 1  # a first token alone has no score
    ]
    scores = engine.score(requests, on_progress=on_progress, partial=partial)
    first = 0
    for line in lines:
        span = slice(first, first := first + len(line.rows[0]) - 1)
        yield _figures(line, scores.logprobs[span], scores.greedy[span])


def _score_gpt(
    engine: Engine,
    lines: Sequence[InputLine],
    stride: int | None,
    on_progress: Callable[[int, int], None] | None,
    partial: PartialScores | None,
) -> Iterator[dict[str, Any]]:
    requests: list[Request] = []
    spans = []
    for line, windows in zip(lines, _windows(engine, lines, stride), strict=True):
        tokens = torch.tensor(line.rows[0], dtype=torch.int64)
        first = len(requests)
        for start, stop, scored in windows:
            window = tokens[start:stop]
            if line.begins and start:
                window = torch.cat([tokens[:1], tokens[start + 1 : stop]])
            requests.append(Request(window, scored))
        spans.append((first, len(requests)))
    scores = engine.score(requests, on_progress=on_progress, partial=partial)
    for line, (first, last) in zip(lines, spans, strict=True):
        span = slice(int(scores.offsets[first]), int(scores.offsets[last]))
        yield _figures(line, scores.logprobs[span], scores.greedy[span])


def _figures(line: InputLine, logprobs: Tensor, greedy: Tensor) -> dict[str, Any]:
    """Return the figures of a sequence of which all tokens but the first are scored."""
    values = _values(logprobs) or []
    return {
        "tokens": line.rows[0],
        "logprobs": [None, *values],
        "greedy": [None, *greedy.tolist()],
        "sum_logprob": _sum(values),
        **({"bos_id": line.rows[0][0]} if line.begins else {}),
    }


def _windows(
    engine: Engine, lines: Sequence[InputLine], stride: int | None
) -> list[list[tuple[int, int, int]]]:
    """Return each line's windows for a GPT; see `strided_windows`.

    Raises:
        InputError: The stride leaves gaps.
    """
    positions = engine.config.max_position_embeddings
    stride = max(positions // 2, 1) if stride is None else stride
    if not 1 <= stride <= positions:
        raise InputError(f"--stride {stride} must lie in 1 to {positions}, the model's positions")
    return [strided_windows(len(line.rows[0]), positions, stride) for line in lines]


def _score_bert(
    engine: Engine,
    lines: Sequence[InputLine],
    on_progress: Callable[[int, int], None] | None,
    partial: PartialScores | None,
) -> Iterator[dict[str, Any]]:
    inputs = [item for line in lines for item in _bert_inputs(line)]
    outputs = iter(
        engine.encode(inputs, states=False, score=True, on_progress=on_progress, partial=partial)
    )
    for line in lines:
        mine = [next(outputs) for _ in line.rows]
        figures: dict[str, list[Any]] = {
            "choices" if line.choices else "tokens": line.rows,
            "logprobs": [_values(output.logprobs) for output in mine],
            "greedy": [_values(output.greedy) for output in mine],
            "sum_logprob": [
                _kept_sum(output.logprobs, _row(line.padding_mask, number))
                for number, output in enumerate(mine)
            ],
        }
        for head, name in LOGITS.items():
            if head in mine[0].heads:
                figures[name] = [_values(output.heads[head]) for output in mine]
        record = figures if line.choices else {name: rows[0] for name, rows in figures.items()}
        if "multichoice_head" in mine[0].heads:  # one logit a choice
            record["head_logits"] = [_number(float(o.heads["multichoice_head"])) for o in mine]
        yield record


def _bert_inputs(line: InputLine) -> list[BertInput]:
    return [
        BertInput(torch.tensor(row), _row(line.tokentypes, i), _row(line.padding_mask, i))
        for i, row in enumerate(line.rows)
    ]


def _row(rows: list[list[int]] | None, index: int) -> Tensor | None:
    return None if rows is None else torch.tensor(rows[index])


def _values(values: Tensor | None) -> list[Any] | None:
    if values is None:
        return None
    return [item if isinstance(item, bool) else _number(item) for item in values.tolist()]


def _kept_sum(logprobs: Tensor | None, mask: Tensor | None) -> float | None:
    """Return the sum over the tokens that a mask keeps; None without a masked-LM head."""
    if logprobs is None:
        return None
    return _sum(_values(logprobs if mask is None else logprobs[mask == 1]) or [])


def _sum(values: Sequence[float | None]) -> float | None:
    """Return the sum in float64; None where one of them is no number."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines; the file appears whole or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    write_text(path, lines_of(records))


def lines_of(records: Iterable[dict[str, Any]]) -> str:
    """Return JSON lines."""
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
