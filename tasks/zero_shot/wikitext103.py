"""WikiText-103 perplexity as in the Megatron-LM paper (appendix E), bug for bug.

The published number is per original word: the text is detokenized, cut into GPT-2 tokens and scored
in overlapping windows, and the sum of the losses is divided by the words of the file as published.
Windows for seq_length S = 8 and stride 4 over tokens 0..16 (`.` read as context, `#` scored):

    .########           window 0 scores all of its S targets
        .....####       each later one its last 4
            .....####
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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

HUB = DatasetName("Salesforce/wikitext", "wikitext-103-v1")
MAX_SEQ_LENGTH = 1024
MEGATRON_CLAMP = 20.0  # Megatron prints exp(min(20, x)); we never clamp, but say where it would

# The paper's file: wiki.test.tokens of WikiText-103, word level.
PAPER_SHA256 = "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9"
PAPER_ORIGINAL_TOKENS = 245_566
PAPER_UNK_COUNT = 2_492
WIKITEXT2_UNK_COUNT = 15_218  # its test set is the same text, with more words left out
RAW_ORIGINAL_TOKENS = 245_570
VALIDATION_ORIGINAL_TOKENS = 217_642
BLANK_LINES_LOST_ORIGINAL_TOKENS = 244_101

# Rule (b) of Megatron carries slashes over from a language that writes them around a pattern, so
# that it looks for them in the text; its replacement is the pattern's own letters.
SLASHED_DIGIT = re.compile("/' [0-9]/")
SLASHED_DIGIT_BECOMES = "/'[0-9]/"
BEFORE_BRACKETS = (
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
PAIRED_MARKS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
AFTER_BRACKETS = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize(text: str) -> str:
    """Return WikiText's words as running text, by Megatron's rules in Megatron's order.

    The order matters: ` , ` can only be found before ` @,@ ` has become `,`, and a pair of marks
    may reach across lines.
    Source: docs/megatron.md, "Detokenizer"; Megatron-LM v2.5, tasks/zeroshot_gpt/detokenizer.py.
    """
    text = text.replace("s '", "s'")
    text = SLASHED_DIGIT.sub(SLASHED_DIGIT_BECOMES, text)
    for spaced, joined in BEFORE_BRACKETS:
        text = text.replace(spaced, joined)
    for opening, closing in PAIRED_MARKS:
        text = _strip_inside(text, opening, closing)
    for spaced, joined in AFTER_BRACKETS:
        text = text.replace(spaced, joined)
    return text


def _strip_inside(text: str, opening: str, closing: str) -> str:
    """Return `text` without blanks just inside each opening mark and the next closing one."""
    inside = re.compile(f"{re.escape(opening)}([^{re.escape(closing)}]*){re.escape(closing)}")
    return inside.sub(lambda match: f"{opening}{match[1].strip()}{closing}", text)


def count_original_tokens(text: str) -> int:
    """Return T_o: pieces between single spaces, so that a newline between two spaces is a word."""
    return len(text.strip().split(" "))


def windows(num_tokens: int, seq_length: int, stride: int) -> list[tuple[int, int, int]]:
    """Return the windows that score something, as `(start, stop, num_scored)` over the tokens.

    Window i starts at token i * stride and reads seq_length + 1 tokens, or up to the end. The first
    scores all its targets, the others the last `stride` positions of a full window; what a short
    window has fewer is scored less. So every token but the first is scored once, and after the
    first window with at least seq_length - stride tokens before it. Megatron also runs up to
    seq_length / stride - 1 windows at the end that score nothing.

    Source: docs/megatron.md, "Overlapping windows".
    """
    targets = num_tokens - 1
    if targets < 1:
        return []
    count = max(math.ceil((targets - seq_length) / stride), 0) + 1
    found = []
    for start in range(0, count * stride, stride):
        stop = min(start + seq_length + 1, num_tokens)
        scored_before = 0 if start == 0 else seq_length - stride
        found.append((start, stop, stop - start - 1 - scored_before))
    return found


@dataclass(frozen=True)
class Work:
    """What will be scored, known before a model is: `requests` are views of one token tensor."""

    tokens: Tensor
    requests: list[Request]
    total_windows: int
    original_tokens: int
    settings: dict[str, Any]

    @property
    def token_ratio(self) -> float:
        """Predicted tokens for each predicted word, of the whole text."""
        return (self.tokens.numel() - 1) / (self.original_tokens - 1)


def prepare(
    data: str | Path | None,
    *,
    tokenizer: Tokenizer,
    positions: int,
    seq_length: int | None = None,
    stride: int = 32,
    limit: int | None = None,
) -> Work:
    """Return the windows of `data`; see `evaluate` for the arguments.

    Args:
        data: File or dataset.
        tokenizer: The model's own.
        positions: The model's `max_position_embeddings`.
        seq_length: Tokens read by a window.
        stride: Targets scored by each window after the first.
        limit: Keep the first windows only.

    Raises:
        InputError: The data cannot be used, or a setting is out of its range.
    """
    seq_length = min(MAX_SEQ_LENGTH, positions) if seq_length is None else seq_length
    _check_settings(positions, seq_length, stride, limit)
    path, text = _read_text(data)
    original_tokens = count_original_tokens(text)
    tokens = torch.tensor(tokenizer.encode(detokenize(text)), dtype=torch.int64)
    if original_tokens < 2 or tokens.numel() < 2:
        raise InputError(
            f"{path} holds {original_tokens} word(s); expected a text of two or more, of which all "
            f"but the first are predicted"
        )
    found = windows(tokens.numel(), seq_length, stride)
    kept = found[:limit]
    warnings = []
    if len(kept) < len(found):
        warnings.append(
            f"limit {limit}: only the first {len(kept)} of {len(found)} windows are scored; "
            f"the figures are not those of the whole text"
        )
    return Work(
        tokens=tokens,
        requests=[Request(tokens[start:stop], scored) for start, stop, scored in kept],
        total_windows=len(found),
        original_tokens=original_tokens,
        settings={
            "seq_length": seq_length,
            "stride": stride,
            "limit": limit,
            "detokenizer": "wikitext",
            "data": _data_record(path, text, original_tokens, tokens.numel()),
            "warnings": warnings,
        },
    )


def _data_record(path: str, text: str, original_tokens: int, tokens: int) -> dict[str, Any]:
    """Return what the record says about the text; `sha256` is that of the text as a file."""
    content = text.encode()
    sha256 = hashlib.sha256(content).hexdigest()
    unk_count = text.count("<unk>")
    return {
        "path": path,
        "sha256": sha256,
        "bytes": len(content),
        "original_tokens": original_tokens,
        "tokenized_tokens": tokens,
        "unk_count": unk_count,
        "paper_file": sha256 == PAPER_SHA256,
        "warnings": data_warnings(path, sha256, original_tokens, unk_count),
    }


def evaluate(
    engine: Engine,
    data: str | Path | None = None,
    *,
    tokenizer: Tokenizer,
    seq_length: int | None = None,
    stride: int = 32,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
    partial: PartialScores | None = None,
) -> Result:
    """Return the paper's zero-shot perplexity of a GPT model.

    Args:
        engine: The loaded model.
        data: The paper's wiki.test.tokens or another file of its form, a folder saved by
            `datasets`, a `datasets` name (`wikitext:wikitext-103-v1:test`), or None for that one.
        tokenizer: The model's own.
        seq_length: Tokens read by a window; None for 1024, or the model's positions if fewer.
        stride: Targets scored by each window after the first; Megatron's `--overlapping-eval`.
        limit: Score the first windows only.
        on_progress: Called with tokens done and tokens in all.
        partial: Scores kept from an interrupted run.

    Raises:
        InputError: The data cannot be used, a setting is out of its range, or the tokenizer is not
            the model's.
    """
    config = engine.checkpoint.config
    misfit = check_fits(tokenizer, config.vocab_size)
    work = prepare(
        data,
        tokenizer=tokenizer,
        positions=config.max_position_embeddings,
        seq_length=seq_length,
        stride=stride,
        limit=limit,
    )
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
    nll_sum = math.fsum(scores.nll_sums().tolist())
    scored_tokens = sum(request.num_scored for request in work.requests)
    return Result(
        task="wikitext103",
        protocol="megatron-paper",
        metrics=perplexities(nll_sum, scored_tokens=scored_tokens, token_ratio=work.token_ratio),
        counts={
            "original_tokens": work.original_tokens,
            "tokenized_tokens": work.tokens.numel(),
            "scored_tokens": scored_tokens,
            "windows": len(work.requests),
            "total_windows": work.total_windows,
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


def perplexities(nll_sum: float, *, scored_tokens: int, token_ratio: float) -> dict[str, Any]:
    """Return the metrics of a sum of losses.

    Args:
        nll_sum: Nats, summed over the scored tokens.
        scored_tokens: T - 1 for a whole text.
        token_ratio: (T - 1) / (T_o - 1); turns a loss per token into one per original word.
    """
    avg_loss = nll_sum / scored_tokens
    return {
        "adjusted_ppl": exponential(avg_loss * token_ratio),
        "ppl": exponential(avg_loss),
        "avg_loss": avg_loss,
        "nll_sum": nll_sum,
        "token_ratio": token_ratio,
        "clamped_at_20": avg_loss > MEGATRON_CLAMP or avg_loss * token_ratio > MEGATRON_CLAMP,
    }


def megatron_line(result: Result) -> str:
    """Return the line that Megatron printed for these figures, its clamp at exp(20) included."""
    avg_loss, ratio = result.metrics["avg_loss"], result.metrics["token_ratio"]
    ppl = exponential(min(MEGATRON_CLAMP, avg_loss))
    adjusted_ppl = exponential(min(MEGATRON_CLAMP, avg_loss * ratio))
    return (
        f" validation results on WIKITEXT103 | avg loss: {avg_loss:.4E} | ppl: {ppl:.4E} | "
        f"adjusted ppl: {adjusted_ppl:.4E} | token ratio: {ratio} |"
    )


def restore_text(rows: Sequence[str], name: str) -> str:
    """Return the text of the file whose lines a `datasets` set holds.

    The Hub's rows keep a line's text with its blanks and newline, but the file's blank lines (a
    space and a newline) are empty strings there. Joined as they are, T_o is 244,101 for 245,566.

    Raises:
        InputError: Some rows end with a newline and some do not.
    """
    filled = [row for row in rows if row.strip()]
    ended = sum(row.endswith("\n") for row in filled)
    if ended == len(filled):
        return "".join(row or " \n" for row in rows)
    if ended == 0:
        return "".join(f"{row or ' '}\n" for row in rows)
    raise InputError(
        f"{name}: {ended} of {len(filled)} rows end with a newline; expected all of them (the "
        f"Hub's WikiText) or none (one line a row)"
    )


def data_warnings(path: str, sha256: str, original_tokens: int, unk_count: int) -> list[str]:
    """Return why a text is not the paper's, in one sentence; nothing if it is."""
    if sha256 == PAPER_SHA256:
        return []
    found = f"{original_tokens:,} words and {unk_count:,} <unk>"
    same_words = original_tokens == PAPER_ORIGINAL_TOKENS
    if same_words and unk_count == WIKITEXT2_UNK_COUNT:
        what = f"is WikiText-2's test file, the same text with more words left out ({found})"
    elif same_words and unk_count == PAPER_UNK_COUNT:
        what = f"has the paper's {found} but other bytes (sha256 {sha256[:12]}...)"
    elif original_tokens == RAW_ORIGINAL_TOKENS and not unk_count:
        what = f"is the raw form of the test set ({found})"
    elif original_tokens == BLANK_LINES_LOST_ORIGINAL_TOKENS and unk_count == PAPER_UNK_COUNT:
        what = f"is the paper's text without its blank lines ({found})"
    elif original_tokens == VALIDATION_ORIGINAL_TOKENS and unk_count:
        what = f"is WikiText-103's validation file ({found})"
    elif not unk_count:
        what = f"holds no <unk>: it is a raw form of WikiText or another text ({found})"
    else:
        what = f"is another text ({found})"
    return [
        f"{path} {what}; the paper's numbers are for wiki.test.tokens of WikiText-103 "
        f"({PAPER_ORIGINAL_TOKENS:,} words and {PAPER_UNK_COUNT:,} <unk>)"
    ]


def _read_text(data: str | Path | None) -> tuple[str, str]:
    """Return the name of the data and its text."""
    raw = read_data(data, column="text", default=HUB)
    return raw.path, raw.text() if raw.rows is None else restore_text(raw.rows, raw.path)


def _check_settings(positions: int, seq_length: int, stride: int, limit: int | None) -> None:
    if not 1 <= seq_length <= positions:
        raise InputError(
            f"--seq-length {seq_length}: the model has {positions} positions; choose 1 to "
            f"{positions}"
        )
    if not 1 <= stride <= seq_length:
        raise InputError(
            f"--stride {stride}: windows read {seq_length} tokens; choose 1 to {seq_length}, or "
            f"some targets would never be scored"
        )
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: choose 1 or more windows")
