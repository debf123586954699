"""Continuations of given prompts: JSON lines in, JSON lines out (`mlm-eval generate`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.text_file import json_value, read_text
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.engine.prompts import Continuation, Prompt, Sampling, text_after
from mlm_eval.tasks.data.text import check_text

PROMPT_FORM = '{"prompt": "..."} or {"tokens": [...]}, one JSON object a line'


@dataclass(frozen=True)
class PromptLine:
    """What is to be continued, and where it stands."""

    where: str
    """File and line number, or the option, for messages."""
    text: str | None
    tokens: list[int]
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The line's fields, which come back beside the text."""
    bos_id: int | None = None
    """The begin-of-text token, where it was put before a text."""


def prompt_line(
    text: str, tokenizer: Tokenizer | None, where: str, begin: Sequence[int] = ()
) -> PromptLine:
    """Return a text as a prompt.

    Args:
        text: The text.
        tokenizer: The model's.
        where: File and line number, or the option, for messages.
        begin: What stands before it: the begin-of-text token, or nothing.

    Raises:
        InputError: There is no tokenizer, or it makes no tokens of the text.
    """
    if tokenizer is None:
        raise InputError(f"{where} holds text, which needs --tokenizer DIR or --vocab-file F")
    tokens = tokenizer.encode(check_text(text, where))
    if not tokens:
        raise InputError(f"{where} is empty; give at least one token to continue")
    return PromptLine(where, text, [*begin, *tokens], bos_id=begin[0] if begin else None)


def read_prompts(
    path: Path,
    tokenizer: Tokenizer | None,
    *,
    limit: int | None = None,
    begin: Sequence[int] = (),
) -> list[PromptLine]:
    """Return the lines of a JSON-lines file; `begin` stands before texts, not before ids.

    Raises:
        InputError: The file cannot be read, or a line is not of the form that `mlm-eval
            generate --help` shows.
    """
    return parse_prompts(read_text(path), str(path), tokenizer, limit=limit, begin=begin)


def parse_prompts(
    text: str,
    name: str,
    tokenizer: Tokenizer | None,
    *,
    limit: int | None = None,
    begin: Sequence[int] = (),
) -> list[PromptLine]:
    """Return the lines of the text of a JSON-lines file of this name; see `read_prompts`."""
    lines: list[PromptLine] = []
    for number, content in enumerate(text.split("\n"), 1):
        if content.strip() and (limit is None or len(lines) < limit):
            lines.append(_parse(content, f"{name}, line {number}", tokenizer, begin))
    if not lines:
        raise InputError(f"{name} holds no lines; expected {PROMPT_FORM}")
    return lines


def _parse(
    content: str, where: str, tokenizer: Tokenizer | None, begin: Sequence[int]
) -> PromptLine:
    try:
        record = json_value(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); expected {PROMPT_FORM}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where} holds {shown(content)}; expected {PROMPT_FORM}")
    tokens = record.get("tokens")
    if isinstance(tokens, list) and tokens and all(type(token) is int for token in tokens):
        known = (t for t in tokens if tokenizer is not None and 0 <= t < tokenizer.vocab_size)
        text = None if tokenizer is None else tokenizer.decode(known)  # others are refused later
        return PromptLine(where, text, tokens, record)
    if tokens is not None:
        raise InputError(f"{where}: tokens must be a list of at least one integer")
    if not isinstance(record.get("prompt"), str):
        raise InputError(f'{where} has neither "prompt" nor "tokens"; expected {PROMPT_FORM}')
    line = prompt_line(record["prompt"], tokenizer, where, begin)
    return dataclasses.replace(line, fields=record)


def as_prompts(
    lines: Sequence[PromptLine],
    tokenizer: Tokenizer | None,
    *,
    positions: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    seed: int,
) -> list[Prompt]:
    """Return what the engine continues: each line to its length, a stop string or its end token.

    Args:
        lines: The prompts.
        tokenizer: Its end of text ends a continuation; None: nothing but the length does.
        positions: The model's `max_position_embeddings`.
        max_new_tokens: Of each.
        sampling: How tokens are chosen.
        stop: Strings that end a text.
        seed: Line n draws its random numbers from `seed` + n, whatever stands beside it.

    Raises:
        InputError: A prompt is longer than the model's positions.
    """
    end = None if tokenizer is None else tokenizer.eot_id
    for line in lines:
        if len(line.tokens) > positions:
            raise InputError(
                f"{line.where} has {len(line.tokens):,} tokens, the model {positions:,} positions; "
                "cut it from the left"
            )
    return [
        Prompt(
            line.tokens,
            max_new_tokens,
            stop_tokens=frozenset(() if end is None else (end,)),
            stop=tuple(stop),
            sampling=sampling,
            seed=seed + number,
        )
        for number, line in enumerate(lines)
    ]


def record_of(line: PromptLine, made: Continuation) -> dict[str, Any]:
    """Return a line of the output: the input's own fields, and what the model made of it.

    The prompt's ids, where the line gave those, are `prompt_tokens`; `finish` is `stop` at a stop
    string or the end token, else `length`.
    """
    given = dict(line.fields)
    if "tokens" in given:
        given["prompt_tokens"] = given.pop("tokens")
    return given | {
        "prompt": line.text,
        "text": made.text,
        "tokens": made.tokens,
        "logprobs": made.logprobs,
        "finish": "length" if made.ended_by == "length" else "stop",
        **({} if line.bos_id is None else {"bos_id": line.bos_id}),
    }


class TextStream:
    """Prints a text while it is written; what may still change is held back."""

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: Tokenizer,
        stop: Iterable[str],
        write: Callable[[str], None],
    ) -> None:
        """Begin a text.

        Args:
            prompt: Its token ids.
            tokenizer: The model's.
            stop: Strings that end the text: what may be the beginning of one waits.
            write: Takes each new piece.
        """
        self.prompt, self.tokenizer, self.stop, self.write = prompt, tokenizer, tuple(stop), write
        self.shown = ""

    def add(self, tokens: Sequence[int]) -> None:
        """Print what is new and certain.

        Args:
            tokens: All new tokens so far.
        """
        text = text_after(self.tokenizer, self.prompt, tokens)
        text = text.rstrip("\ufffd")  # half of a character
        ends = [text.find(stop) for stop in self.stop]
        end = min((place for place in ends if place >= 0), default=len(text) - self._held(text))
        self._show(text[:end])

    def finish(self, text: str) -> None:
        """Print the rest of the whole text."""
        self._show(text)

    def _held(self, text: str) -> int:
        """Return how many letters at the end may begin a stop string."""
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        return next(
            (
                count
                for count in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-count:]) for stop in self.stop)
            ),
            0,
        )

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown) and text.startswith(self.shown):
            self.write(text[len(self.shown) :])
            self.shown = text
