"""LAMBADA cloze accuracy as in the Megatron-LM paper: the last word of a passage from the rest.

The paper's number counts a word only if every one of its tokens is the model's first choice
(Megatron's `--strict-lambada`; here `word`). Megatron's own default asks for the last token only
(`last-token`). Either way the true tokens before it are given, so that one forward pass tells:

    tokens   context ... context | a   word        num_scored = 2
    scored                         ^   ^           both must be the argmax
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer, check_fits
from mlm_eval.engine.score import Request
from mlm_eval.reporting.results import (
    Result,
    checkpoint_record,
    engine_settings,
    exponential,
    loss_warnings,
    timing_record,
    versions,
)
from mlm_eval.tasks.data.sources import DatasetName, read_data

if TYPE_CHECKING:
    from mlm_eval.engine.batching import OnProgress
    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.resume import PartialScores

HUB = DatasetName("EleutherAI/lambada_openai", None)
TARGETS = ("word", "last-token")

# The paper's file: OpenAI's lambada_test.jsonl.
PAPER_SHA256 = "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"
PAPER_EXAMPLES = 5_153


@dataclass(frozen=True)
class Example:
    """A passage and where it stands: its line in a file, its row in a set, from 1."""

    line: int
    text: str


@dataclass(frozen=True)
class Work:
    """What will be scored, known before a model is."""

    requests: list[Request]
    truncated: int
    settings: dict[str, Any]


def split_target(text: str, tokenizer: Tokenizer, *, target: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a passage's context and of its target.

    For a word, the context is the stripped text before the last place where that word stands; it
    and the word, with one space before it, are cut into tokens each by itself. On 7 of the 5,153
    passages this gives other tokens than the whole text does; it is what Megatron scores.

    Source: docs/megatron.md, "LAMBADA"; Megatron-LM v2.5, tasks/zeroshot_gpt/datasets.py.
    """
    if target == "last-token":
        tokens = tokenizer.encode(text)
        return tokens[:-1], tokens[-1:]
    words = text.split()
    if not words:
        return [], []
    context = text[: text.rfind(words[-1])].strip()
    return tokenizer.encode(context), tokenizer.encode(f" {words[-1]}")


def prepare(
    data: str | Path | None,
    *,
    tokenizer: Tokenizer,
    positions: int,
    target: str = "word",
    limit: int | None = None,
) -> Work:
    """Return the requests of `data`, one a passage, in its order; see `evaluate` for the arguments.

    Raises:
        InputError: The data cannot be used, or a setting is unknown.
    """
    if target not in TARGETS:
        raise InputError(f"--target {target} is unknown; choose {' or '.join(TARGETS)}")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: choose 1 or more lines")
    path, examples, sha256 = _read_examples(data)
    kept = examples[:limit]
    requests = []
    truncated = 0
    for example in kept:
        context, label = split_target(example.text, tokenizer, target=target)
        if not context or not label:
            raise InputError(
                f"{path}, line {example.line}: {example.text!r:.80} has no context before its last "
                f"{'word' if target == 'word' else 'token'}; expected a passage of several words"
            )
        if len(label) > positions:
            raise InputError(
                f"{path}, line {example.line}: the last word has {len(label)} tokens, but the "
                f"model has {positions} positions; this task needs a larger model"
            )
        tokens = context + label
        truncated += len(tokens) > positions + 1
        # The last token is only predicted, never read, so positions + 1 tokens fit.
        requests.append(Request(torch.tensor(tokens[-(positions + 1) :]), len(label)))
    return Work(
        requests=requests,
        truncated=truncated,
        settings={
            "target": target,
            "limit": limit,
            "data": _data_record(path, sha256, len(examples)),
            "warnings": list(_warnings(len(kept), len(examples), truncated, positions)),
        },
    )


def evaluate(
    engine: Engine,
    data: str | Path | None = None,
    *,
    tokenizer: Tokenizer,
    target: str = "word",
    limit: int | None = None,
    on_progress: OnProgress | None = None,
    partial: PartialScores | None = None,
) -> Result:
    """Return the paper's cloze accuracy of a GPT model.

    Args:
        engine: The loaded model.
        data: A file of JSON lines with a `text` each, a folder saved by `datasets`, a `datasets`
            name, or None for EleutherAI/lambada_openai.
        tokenizer: The model's own.
        target: `word` for every token of the last word, `last-token` for Megatron's default.
        limit: Score the first passages only.
        on_progress: Called with tokens done and tokens in all.
        partial: Scores kept from an interrupted run.

    Raises:
        InputError: The data cannot be used, a setting is unknown, or the tokenizer is not the
            model's.
    """
    config = engine.checkpoint.config
    misfit = check_fits(tokenizer, config.vocab_size)
    positions = config.max_position_embeddings
    work = prepare(data, tokenizer=tokenizer, positions=positions, target=target, limit=limit)
    if misfit is not None:
        work.settings["warnings"].append(misfit)
    return score(engine, work, tokenizer=tokenizer, on_progress=on_progress, partial=partial)


def score(
    engine: Engine,
    work: Work,
    *,
    tokenizer: Tokenizer,
    on_progress: OnProgress | None = None,
    partial: PartialScores | None = None,
) -> Result:
    """Return the result of prepared work; every rank takes part and gets the same one."""
    scores = engine.score(work.requests, on_progress=on_progress, partial=partial)
    num_correct = int(scores.all_greedy().sum())
    nll_sum = math.fsum(scores.nll_sums().tolist())
    strict = work.settings["target"] == "word"
    return Result(
        task="lambada",
        protocol="megatron-paper" if strict else "megatron-last-token",
        metrics=cloze_metrics(num_correct, examples=len(work.requests), nll_sum=nll_sum),
        counts={
            "examples": len(work.requests),
            "target_tokens": sum(request.num_scored for request in work.requests),
            "truncated": work.truncated,
        },
        settings={
            **engine_settings(engine, tokenizer),
            **work.settings,
            "warnings": [*work.settings["warnings"], *loss_warnings(nll_sum)],
        },
        checkpoint=checkpoint_record(engine.checkpoint),
        timing=timing_record(engine, work.requests, scores.seconds, partial),
        versions=versions(),
    )


def cloze_metrics(num_correct: int, *, examples: int, nll_sum: float) -> dict[str, Any]:
    """Return the metrics of a count of hits and a sum of losses.

    `accuracy_stderr` is the standard error of the mean of the hits, with n - 1 in its denominator
    as in lm-evaluation-harness; `target_ppl` is per target (a word has one, however many tokens).

    Args:
        num_correct: Targets of which every token is the argmax.
        examples: Targets in all.
        nll_sum: Nats, summed over the targets' tokens.
    """
    accuracy = num_correct / examples
    variance = accuracy * (1 - accuracy) / (examples - 1) if examples > 1 else math.nan
    return {
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(variance),
        "num_correct": num_correct,
        "target_ppl": exponential(nll_sum / examples),
        "nll_sum": nll_sum,
    }


def megatron_line(result: Result) -> str:
    """Return the line that Megatron printed for these figures."""
    return (
        f" validation results on LAMBADA | number correct: {result.metrics['num_correct']:.4E} | "
        f"total examples: {result.counts['examples']:.4E} | "
        f"avg accuracy: {result.metrics['accuracy']:.4E}"
    )


def parse_json_lines(text: str, path: str) -> list[Example]:
    r"""Return the passages of a file of JSON lines, blank lines left out.

    Lines end at "\n" alone: JSON strings may hold U+2028 and others that `splitlines` cuts at.

    Raises:
        InputError: A line is not a JSON object with a string `text`.
    """
    examples = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}); "
                f'expected {{"text": "..."}} on every line'
            ) from error
        passage = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(passage, str):
            raise InputError(
                f"{path}, line {number} holds {line!r:.80}; expected an object with a string `text`"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in passage):
            raise InputError(
                f"{path}, line {number} holds half of a surrogate pair, which is no text; expected "
                f"the file as published"
            )
        examples.append(Example(number, passage))
    return examples


def _read_examples(data: str | Path | None) -> tuple[str, list[Example], str]:
    """Return the name of the data, its passages, and the sha256 of the file or of its equal.

    The rows of a set are hashed as the JSON lines that Python's own `json` writes of them: of the
    published text this is the published file, byte for byte.
    """
    raw = read_data(data, column="text", default=HUB)
    if raw.rows is None:
        assert raw.content is not None
        return raw.path, parse_json_lines(raw.text(), raw.path), _sha256([raw.content])
    lines = (json.dumps({"text": row}).encode() + b"\n" for row in raw.rows)
    examples = [Example(number, row) for number, row in enumerate(raw.rows, start=1)]
    return raw.path, examples, _sha256(lines)


def _sha256(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _data_record(path: str, sha256: str, examples: int) -> dict[str, Any]:
    paper_file = sha256 == PAPER_SHA256
    warnings = []
    if not paper_file:
        warnings.append(
            f"{path} is not the paper's file ({examples:,} passages, sha256 {sha256[:12]}...); the "
            f"paper's numbers are for OpenAI's lambada_test.jsonl ({PAPER_EXAMPLES:,} passages)"
        )
    return {
        "path": path,
        "sha256": sha256,
        "examples": examples,
        "paper_file": paper_file,
        "warnings": warnings,
    }


def _warnings(kept: int, examples: int, truncated: int, positions: int) -> Iterator[str]:
    if kept < examples:
        yield (
            f"limit {kept}: only the first {kept} of {examples} passages are scored; the figures "
            f"are not those of the whole set"
        )
    if truncated:
        yield (
            f"{truncated} passages are longer than the model's {positions} positions: only their "
            f"last {positions + 1} tokens are used"
        )
