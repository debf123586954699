"""WikiText-103 perplexity as in the Megatron-LM paper (appendix E), bug for bug.

The published number is per original word: the text is detokenized, cut into GPT-2 tokens and scored
in overlapping windows, and the sum of the losses is divided by the words of the file as published.
Windows for seq_length S = 8 and stride 4 over tokens 0..16 (`.` read as context, `#` scored):

    .########           window 0 scores all of its S targets
        .....####       each later one its last 4
            .....####
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.memory.host import free_memory
from mlm_eval.options import BosOption, option
from mlm_eval.reporting.results import Result, exponential
from mlm_eval.reporting.tables import Column
from mlm_eval.tasks.data.sources import DatasetName, read_data
from mlm_eval.tasks.data.text import sha256
from mlm_eval.tasks.zero_shot.benchmark import DataOption, PaperFigure, Work, ZeroShot

if TYPE_CHECKING:
    from torch import Tensor

    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.score import Scores
    from mlm_eval.planning.plan import Workload

HUB_TEST_SET = DatasetName("Salesforce/wikitext", "wikitext-103-v1")
MAX_SEQ_LENGTH = 1024
CHARACTER_BYTES = 175  # of memory, for each character of a text that is tokenized whole
MEGATRON_CLAMP = 20.0  # Megatron prints exp(min(20, x)); we never clamp, but say where it would

# The paper's file: wiki.test.tokens of WikiText-103, word level.
PAPER_TEXT_DIGEST = "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9"
PAPER_ORIGINAL_TOKENS = 245_566
PAPER_TOKENS = 270_330  # detokenized, in GPT-2's BPE
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


@dataclass(frozen=True, kw_only=True)
class WikiTextOptions(BosOption, DataOption):
    """The options of `wikitext103`."""

    data: str | None = option(
        "wiki.test.tokens, or a `datasets` name; default: the Hub's wikitext-103-v1 test.",
        None,
        reads=True,
    )
    seq_length: int | None = option("Window length; default min(1024, positions).", None, least=1)
    stride: int = option("Tokens that each further window scores.", 32, least=1)


class WikiText103(ZeroShot[WikiTextOptions]):
    """The words counted are those of the file as it was published.

    Example: mlm-eval wikitext103 --ckpt gpt2_345m --data wiki.test.tokens --tokenizer gpt2 --tp 2
    """

    name = "wikitext103"
    title = "WikiText-103 perplexity"
    unit = "windows"
    options = WikiTextOptions
    paper = PaperFigure(
        Column("wikitext103", "WikiText-103 perplexity", 2, higher_is_better=False),
        metric="adjusted_ppl",
        file="wiki.test.tokens of WikiText-103",
        settings={"seq_length": 1024, "stride": 32, "vocab": "padded"},
    )

    def prepare(
        self,
        options: WikiTextOptions,
        *,
        tokenizer: Tokenizer,
        positions: int,
        limit: int | None = None,
    ) -> Work:
        """Return the windows of the text, as views of one token tensor."""
        import torch

        from mlm_eval.checkpoints.tokenizers.begin_of_text import choose_begin
        from mlm_eval.engine.score import Request

        stride, seq_length = options.stride, options.seq_length
        seq_length = min(MAX_SEQ_LENGTH, positions) if seq_length is None else seq_length
        begin = torch.tensor(choose_begin(options.bos, tokenizer).ids, dtype=torch.int64)
        room = seq_length - begin.numel()  # of a window, for the text
        _check_settings(positions, seq_length, stride, room)
        raw = read_data(options.data, column="text", default=HUB_TEST_SET, tables=True)
        path = raw.path
        text = raw.text() if raw.rows is None else restore_text(raw.rows, path)
        _check_length(path, text)
        original_tokens = count_original_tokens(text)
        few = (
            f"{path} holds {original_tokens} word(s); expected a text of two or more, of which all "
            "but the first are predicted"
        )
        if original_tokens < 2:  # before a word of any length is taken to pieces
            raise InputError(few)
        tokens = torch.tensor(tokenizer.encode(detokenize(text)), dtype=torch.int64)
        if tokens.numel() < 2:
            raise InputError(few)
        found = strided_windows(tokens.numel(), room, stride)
        requests = [
            Request(_window(begin, tokens[start:stop]), scored)
            for start, stop, scored in found[:limit]
        ]
        return Work(
            requests,
            counts={
                "original_tokens": original_tokens,
                "tokenized_tokens": tokens.numel(),
                "scored_tokens": sum(request.num_scored for request in requests),
                "windows": len(requests),
                "total_windows": len(found),
            },
            settings={
                "seq_length": seq_length,
                "stride": stride,
                "limit": limit,
                "detokenizer": "wikitext",
                "data": _data_record(path, text, original_tokens, tokens.numel()),
                "warnings": self.limit_warnings(limit, len(requests), len(found)),
            },
            sources=[
                {"window": index, "first_token": stop - scored}
                for index, (_, stop, scored) in enumerate(found[:limit])
            ],
        )

    def metrics(self, scores: Scores, nll_sum: float, work: Work) -> dict[str, Any]:
        """Return the perplexities per token and per original word."""
        return perplexities(
            nll_sum, scored_tokens=work.counts["scored_tokens"], token_ratio=token_ratio(work)
        )

    def rows(self, result: Result) -> list[tuple[str, str]]:
        """Return the perplexities, and the windows that they come from."""
        m, c, s = result.metrics, result.counts, result.settings
        rows = [
            (
                "adjusted perplexity",
                f"{m['adjusted_ppl']:.4f}   per word of the original text, as the paper counts",
            ),
            ("plain perplexity", f"{m['ppl']:.4f}   per token"),
            (
                "average loss",
                f"{m['avg_loss']:.6f} nats per token, over {c['scored_tokens']:,} tokens",
            ),
            (
                "token ratio",
                f"{m['token_ratio']:.10f} = ({c['tokenized_tokens']:,} - 1) / "
                f"({c['original_tokens']:,} - 1)",
            ),
            (
                "protocol",
                f"windows of {s['seq_length']:,} tokens, stride {s['stride']}, "
                f"{c['windows']:,} windows",
            ),
        ]
        if m["clamped_at_20"]:
            note = "Megatron would have clamped the exponent at 20; these are not clamped"
            rows.insert(1, ("", note))
        return rows

    def megatron_line(self, result: Result) -> str:
        """Return the line that Megatron printed for these figures, clamped at exp(20)."""
        avg_loss, ratio = result.metrics["avg_loss"], result.metrics["token_ratio"]
        ppl = exponential(min(MEGATRON_CLAMP, avg_loss))
        adjusted_ppl = exponential(min(MEGATRON_CLAMP, avg_loss * ratio))
        return (
            f" validation results on WIKITEXT103 | avg loss: {avg_loss:.4E} | ppl: {ppl:.4E} | "
            f"adjusted ppl: {adjusted_ppl:.4E} | token ratio: {ratio} |"
        )

    def workload(self, positions: int) -> Workload:
        """Return the windows of the paper's file."""
        from mlm_eval.planning.plan import Passes, Workload

        length = min(MAX_SEQ_LENGTH, positions)
        found = strided_windows(PAPER_TOKENS, length, WikiTextOptions.stride)
        shapes = Counter((stop - start - 1, scored) for start, stop, scored in found)
        passes = [Passes(n, read, scored, scored) for (read, scored), n in shapes.items()]
        title = f"WikiText-103, {len(found):,} windows of {length:,} tokens"
        return Workload(self.name, title, passes)


WIKITEXT103 = WikiText103()


def _window(begin: Tensor, tokens: Tensor) -> Tensor:
    """Return a window's tokens, with what begins it; a view of the text where nothing does."""
    import torch

    return torch.cat([begin, tokens]) if begin.numel() else tokens


def token_ratio(work: Work) -> float:
    """Return the predicted tokens for each predicted word, of the whole text."""
    return (work.counts["tokenized_tokens"] - 1) / (work.counts["original_tokens"] - 1)


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
    parts, at = [], 0
    while (start := text.find(opening, at)) >= 0:
        end = text.find(closing, start + 1)
        if end < 0:  # nor does any later one have its closing mark
            break
        parts += [text[at : start + 1], text[start + 1 : end].strip(), closing]
        at = end + 1
    return "".join([*parts, text[at:]])


def count_original_tokens(text: str) -> int:
    """Return T_o: pieces between single spaces, so that a newline between two spaces is a word."""
    return len(text.strip().split(" "))


def _check_length(path: str, text: str) -> None:
    """Refuse a text that this machine has no memory to tokenize.

    Raises:
        InputError: It is that long.
    """
    need, free = len(text) * CHARACTER_BYTES, free_memory()
    if free is not None and need > free:
        raise InputError(
            f"{path} has {len(text):,} characters: to tokenize them as one text takes about "
            f"{need / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free; give a part of it"
        )


def strided_windows(num_tokens: int, seq_length: int, stride: int) -> list[tuple[int, int, int]]:
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


def data_warnings(path: str, digest: str, original_tokens: int, unk_count: int) -> list[str]:
    """Return why a text is not the paper's, in one sentence; nothing if it is."""
    if digest == PAPER_TEXT_DIGEST:
        return []
    found = f"{original_tokens:,} words and {unk_count:,} <unk>"
    same_words = original_tokens == PAPER_ORIGINAL_TOKENS
    if same_words and unk_count == WIKITEXT2_UNK_COUNT:
        what = f"is WikiText-2's test file, the same text with more words left out ({found})"
    elif same_words and unk_count == PAPER_UNK_COUNT:
        what = f"has the paper's {found} but other bytes (sha256 {digest[:12]}...)"
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


def _data_record(path: str, text: str, original_tokens: int, tokens: int) -> dict[str, Any]:
    """Return what the record says about the text; `sha256` is that of the text as a file."""
    content = text.encode()
    digest = sha256([content])
    unk_count = text.count("<unk>")
    return {
        "path": path,
        "sha256": digest,
        "bytes": len(content),
        "original_tokens": original_tokens,
        "tokenized_tokens": tokens,
        "unk_count": unk_count,
        "paper_file": digest == PAPER_TEXT_DIGEST,
        "warnings": data_warnings(path, digest, original_tokens, unk_count),
    }


def _check_settings(positions: int, seq_length: int, stride: int, room: int) -> None:
    if not 1 <= seq_length <= positions:
        raise InputError(
            f"--seq-length {seq_length}: the model has {positions} positions; choose 1 to "
            f"{positions}"
        )
    if not room:
        raise InputError("--seq-length 1 has no room for the begin-of-text token of --bos yes")
    if not 1 <= stride <= room:
        raise InputError(
            f"--stride {stride}: windows read {room} tokens; choose 1 to {room}, or "
            f"some targets would never be scored"
        )
