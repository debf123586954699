"""Log-probabilities of given sequences: JSON lines in, JSON lines out (`mlm-eval score`)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import write_text
from mlm_eval.checkpoints.files.text_file import read_text
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.engine.encode import BertInput, find_fault
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.resume import PartialScores
from mlm_eval.engine.score import PairRequest, Request, find_encoder_fault
from mlm_eval.tasks.data.text import check_text
from mlm_eval.tasks.zero_shot.wikitext103 import strided_windows

FORM = '{"tokens": [...]} or {"text": "..."}, one JSON object a line'

PAIR_FORM = '{"encoder_tokens": [...], "encoder_mask": [...] (1: keep; optional), "tokens": [...]}'
"""A line for a T5."""

LOGITS = {"binary_head": "binary_logits", "classification_head": "head_logits"}
"""Heads of a BERT, and what their logits are called in a record."""


@dataclass(frozen=True)
class InputLine:
    """One line of the input: one sequence, or the choices of one question."""

    where: str
    """File and line number, for messages."""
    rows: list[list[int]]
    choices: bool = False
    tokentypes: list[list[int]] | None = None
    padding_mask: list[list[int]] | None = None
    encoder_tokens: list[int] | None = None
    encoder_mask: list[int] | None = None
    is_text: bool = False
    begins: bool = False
    """Whether its first token is the begin-of-text token, put before a text."""


def read_lines(
    path: Path, tokenizer: Tokenizer | None, *, family: str = "gpt", limit: int | None = None
) -> list[InputLine]:
    """Return the lines of a JSON-lines file.

    Args:
        path: The file.
        tokenizer: The model's, for lines of text.
        family: The model's: a T5 has no lines of text.
        limit: Keep the first lines only.

    Raises:
        InputError: The file cannot be read, or a line is not of the form that `mlm-eval
            score --help` shows.
    """
    return parse_lines(read_text(path), path, tokenizer, family=family, limit=limit)


def parse_lines(
    text: str,
    path: Path,
    tokenizer: Tokenizer | None,
    *,
    family: str = "gpt",
    limit: int | None = None,
    begin: Sequence[int] = (),
) -> list[InputLine]:
    """Return the lines of the text of a file; see `read_lines`.

    `begin` is what stands before each text; given tokens stay as they are.
    """
    lines: list[InputLine] = []
    for number, content in enumerate(text.split("\n"), 1):
        if content.strip() and (limit is None or len(lines) < limit):
            lines.append(_parse(content, number, path, tokenizer, family, begin))
    if not lines:
        raise InputError(f"{path} holds no lines; expected one JSON object a line")
    return lines


def _parse(
    content: str,
    number: int,
    path: Path,
    tokenizer: Tokenizer | None,
    family: str,
    begin: Sequence[int],
) -> InputLine:
    where = f"{path}, line {number}"
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); expected {FORM}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where} holds {content!r:.80}; expected {FORM}")
    choices, is_text = "choices" in record, False
    if choices:
        rows = _lists(record["choices"], "choices", where)
    elif "tokens" in record:
        rows = _lists([record["tokens"]], "tokens", where)
    elif isinstance(record.get("text"), str):
        if family == "t5":
            raise InputError(f"{where} holds text, but a T5 takes ids; expected {PAIR_FORM}")
        if tokenizer is None:
            raise InputError(f"{where} holds text, which needs --tokenizer DIR or --vocab-file F")
        rows = [[*begin, *tokenizer.encode(check_text(record["text"], where))]]
        is_text = True
    else:
        raise InputError(f'{where} has neither "tokens", "text" nor "choices"; expected {FORM}')
    extras: dict[str, list[list[int]] | None] = {}
    for name in ("tokentypes", "padding_mask"):
        value = record.get(name)
        if value is not None:
            extras[name] = _lists(value if choices else [value], name, where)
            if [len(row) for row in extras[name] or []] != [len(row) for row in rows]:
                raise InputError(f"{where}: {name} and tokens differ in length; give one each")
    if any(not row for row in rows):
        raise InputError(f"{where} holds an empty sequence; give at least one token")
    for name in ("encoder_tokens", "encoder_mask"):
        if record.get(name) is not None:
            extras[name] = _lists([record[name]], name, where)
    first = {name: rows[0] for name, rows in extras.items() if rows and name.startswith("encoder")}
    return InputLine(
        where,
        rows,
        choices,
        extras.get("tokentypes"),
        extras.get("padding_mask"),
        is_text=is_text,
        begins=is_text and bool(begin),
        **first,
    )


def _lists(value: Any, name: str, where: str) -> list[list[int]]:
    good = isinstance(value, list) and all(
        isinstance(row, list) and all(type(item) is int and abs(item) < 1 << 62 for item in row)
        for row in value
    )
    if not good or not value:
        kind = "lists of integers, one a choice" if name == "choices" else "integers"
        raise InputError(f"{where}: {name} must be a list of {kind}")
    return value  # type: ignore[no-any-return]


def score_lines(
    engine: Engine,
    lines: Sequence[InputLine],
    *,
    stride: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    partial: PartialScores | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the output records in the order of the input.

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
    for line in lines:
        _check_line(line, engine.config)
    if engine.config.family == "bert":
        yield from _score_bert(engine, lines, on_progress, partial)
    elif engine.config.family == "t5":
        yield from _score_t5(engine, lines, on_progress, partial)
    else:
        yield from _score_gpt(engine, lines, stride, on_progress, partial)


def count_requests(engine: Engine, lines: Sequence[InputLine], stride: int | None) -> int:
    """Return how many sequences of their own the model will see for these lines."""
    if engine.config.family == "bert":
        return sum(len(line.rows) for line in lines)
    if engine.config.family == "t5":
        return sum(len(line.rows[0]) > 1 for line in lines)
    return sum(len(windows) for windows in _windows(engine, lines, stride))


def resume_parts(
    engine: Engine,
    text: str,
    tokenizer: Tokenizer | None,
    stride: int | None,
    begin: Sequence[int] = (),
) -> dict[str, Any]:
    """Return all that decides the scores of the lines of a file with this text."""
    return {
        "task": "score",
        "digest": engine.checkpoint.provenance.digest,
        "config": engine.config.to_dict(),
        "data": hashlib.sha256(text.encode()).hexdigest(),
        "tokenizer": None if tokenizer is None else tokenizer.sha256,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "vocab": engine.vocab,
        "settings": {"stride": stride, "begin": list(begin)},
    }


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
        yield {
            "tokens": line.rows[0],
            "logprobs": [None, *map(_number, scores.logprobs[span].tolist())],
            "greedy": [None, *scores.greedy[span].tolist()],
        }


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
        logprobs, greedy = scores.logprobs[span].tolist(), scores.greedy[span].tolist()
        yield {
            "tokens": line.rows[0],
            "logprobs": [None, *map(_number, logprobs)],
            "greedy": [None, *greedy],
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


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines; the file appears whole or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    write_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
