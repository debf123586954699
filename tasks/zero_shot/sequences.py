"""The sequences that `mlm-eval score` is given: JSON lines, lines of text, or a parquet table."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.text_file import decode, json_value, read_bytes
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.tasks.data.tables import is_parquet, parquet_table
from mlm_eval.tasks.data.text import check_text, sha256

FORM = '{"tokens": [...]} or {"text": "..."}, one JSON object a line'

LONG_FORM = 'give it as {"tokens": [...]}, or as several lines'
"""What to do with a text that is too long to be cut into tokens."""

PAIR_FORM = '{"encoder_tokens": [...], "encoder_mask": [...] (1: keep; optional), "tokens": [...]}'
"""A line for a T5."""


@dataclass(frozen=True)
class GivenSequences:
    """A file's content that has not been taken apart."""

    name: str
    """For messages."""
    content: bytes
    form: str = "jsonl"
    """`jsonl`, `text` or `parquet`."""

    @classmethod
    def of(cls, name: str, content: bytes, form: str = "auto") -> GivenSequences:
        """Return the content in its format.

        `auto`: parquet by its first bytes, text by the name's `.txt`, else JSON lines.
        """
        if form == "auto":
            text = "text" if name.endswith(".txt") else "jsonl"
            form = "parquet" if is_parquet(content) else text
        return cls(name, content, form)

    @property
    def digest(self) -> str:
        """Return a hash that identifies the sequences; JSON lines count as decoded text."""
        if self.form == "jsonl":
            return sha256([decode(self.content, self.name)])
        return sha256([self.form, self.content])

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the place and the fields of each sequence.

        A blank line is a sequence without tokens in text, and nothing in JSON lines.

        Raises:
            InputError: A line is not a JSON object, or the table is damaged.
        """
        if self.form == "parquet":
            table = parquet_table(io.BytesIO(self.content), self.name)
            for number, row in enumerate(table, 1):
                yield f"{self.name}, row {number}", row
            return
        lines = decode(self.content, self.name).split("\n")
        if self.form == "text":
            for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
                yield f"{self.name}, line {number}", {"text": line}
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{self.name}, line {number}"
                yield where, _json_object(line, where)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json_value(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); expected {FORM}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where} holds {shown(line)}; expected {FORM}")
    return record


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
    fields: Mapping[str, Any] = field(default_factory=dict)
    """All that the line holds, as JSON values; it comes back beside the scores."""

    @property
    def is_empty(self) -> bool:
        """Whether it holds no token at all."""
        return not any(self.rows)


def read_lines(
    path: Path, tokenizer: Tokenizer | None, *, family: str = "gpt", limit: int | None = None
) -> list[InputLine]:
    """Return the lines of a file.

    Args:
        path: The file: JSON lines, `.txt`, or parquet.
        tokenizer: The model's, for lines of text.
        family: The model's: a T5 has no lines of text.
        limit: Keep the first lines only.

    Raises:
        InputError: The file cannot be read, or a line is not of the form that `mlm-eval
            score --help` shows.
    """
    given = GivenSequences.of(str(path), read_bytes(path))
    return parse_lines(given, tokenizer, family=family, limit=limit)


def parse_lines(
    given: GivenSequences,
    tokenizer: Tokenizer | None,
    *,
    family: str = "gpt",
    limit: int | None = None,
    begin: Sequence[int] = (),
) -> list[InputLine]:
    """Return the lines of what was read; see `read_lines`.

    `begin` is what stands before each text; given tokens stay as they are.
    """
    lines = [
        _parse(record, where, tokenizer, family, begin)
        for where, record in itertools.islice(given.rows(), limit)
    ]
    if not lines:
        raise InputError(f"{given.name} holds no lines; expected one JSON object a line")
    return lines


def _parse(
    record: dict[str, Any],
    where: str,
    tokenizer: Tokenizer | None,
    family: str,
    begin: Sequence[int],
) -> InputLine:
    # A table has each column in every row: what a row lacks is null there.
    present = {name for name, value in record.items() if value is not None}
    choices, is_text = "choices" in present, False
    if choices:
        rows = _lists(record["choices"], "choices", where)
    elif "tokens" in present or ("tokens" in record and "text" not in present):
        rows = _lists([record["tokens"]], "tokens", where)
    elif isinstance(record.get("text"), str):
        if family == "t5":
            raise InputError(f"{where} holds text, but a T5 takes ids; expected {PAIR_FORM}")
        if tokenizer is None:
            raise InputError(f"{where} holds text, which needs --tokenizer DIR or --vocab-file F")
        text = check_text(record["text"], where, instead=LONG_FORM)
        rows = [[*begin, *tokenizer.encode(text)]]
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
    if choices and not all(rows):
        raise InputError(f"{where} holds an empty choice; give at least one token")
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
        fields={name: _as_json(value, name, where) for name, value in record.items()},
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


def _as_json(value: Any, name: str, where: str) -> Any:
    """Return a field as JSON can write it: dates as ISO 8601, decimals as text, NaN as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_as_json(item, name, where) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item, name, where) for key, item in value.items()}
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    raise InputError(
        f"{where}: {name} is of type {type(value).__name__}, which JSON lines cannot hold; leave "
        "the column out, or make it text"
    )
