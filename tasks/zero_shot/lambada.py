"""LAMBADA cloze accuracy as in the Megatron-LM paper: the last word of a passage from the rest.

The paper's number counts a word only if every one of its tokens is the model's first choice
(Megatron's `--strict-lambada`; here `word`). Megatron's own default asks for the last token only
(`last-token`). Either way the true tokens before it are given, so that one forward pass tells:

    tokens   context ... context | a   word        num_scored = 2
    scored                         ^   ^           both must be the argmax
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.text_file import parse_json
from mlm_eval.options import BosOption, option
from mlm_eval.reporting.results import Result, exponential
from mlm_eval.reporting.tables import Column
from mlm_eval.tasks.data.sources import DatasetName, read_data
from mlm_eval.tasks.data.text import check_text, json_field, sha256
from mlm_eval.tasks.zero_shot.benchmark import DataOption, PaperFigure, Work, ZeroShot

if TYPE_CHECKING:
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.score import Scores
    from mlm_eval.planning.plan import Workload

# The paper's file, OpenAI's lambada_test.jsonl: passages; with GPT-2's tokenizer, the tokens that a
# model reads (the last of each passage is only predicted) and those that are scored.
PAPER_DIGEST = "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"
PAPER_PASSAGES, PAPER_READ_TOKENS, PAPER_TARGET_TOKENS = 5_153, 425_064, 6_542


@dataclass(frozen=True, kw_only=True)
class ClozeOptions(BosOption, DataOption):
    """The options of `lambada`."""

    data: str | None = option(
        "JSON lines with `text`, or a `datasets` name; default: EleutherAI/lambada_openai.",
        None,
        reads=True,
    )
    target: str = option(
        "word: all tokens of the last word (the paper's); last-token: only the last one.",
        "word",
        choices=("word", "last-token"),
    )


class Lambada(ZeroShot[ClozeOptions]):
    """A passage is right where the greedy choices are the tokens of its last word.

    Example: mlm-eval lambada --ckpt gpt2_345m --data lambada_test.jsonl --tokenizer gpt2
    """

    name = "lambada"
    title = "LAMBADA accuracy"
    unit = "passages"
    options = ClozeOptions
    paper = PaperFigure(
        Column("lambada", "LAMBADA accuracy", 2),
        metric="accuracy",
        file="OpenAI's lambada_test.jsonl",
        settings={"target": "word", "vocab": "padded"},
        percent=True,
    )

    def prepare(
        self,
        options: ClozeOptions,
        *,
        tokenizer: Tokenizer,
        positions: int,
        limit: int | None = None,
    ) -> Work:
        """Return one request for each passage; the settings say what of them is scored."""
        import torch

        from mlm_eval.checkpoints.tokenizers.begin_of_text import choose_begin
        from mlm_eval.engine.score import Request

        target = options.target
        if target not in ("word", "last-token"):
            raise InputError(f"--target {target} is unknown; choose word or last-token")
        begin = list(choose_begin(options.bos, tokenizer).ids)
        room = positions - len(begin)
        path, passages, digest = read_passages(options.data)
        requests = []
        truncated = 0
        for line, text in passages[:limit]:
            context, label = split_target(text, tokenizer, target=target)
            if not context or not label:
                raise InputError(
                    f"{path}, line {line}: {shown(text)} has no context before its last "
                    f"{'word' if target == 'word' else 'token'}; expected a passage of several "
                    "words"
                )
            if len(label) > room:
                raise InputError(
                    f"{path}, line {line}: the last word has {len(label)} tokens, but the model "
                    f"has {positions} positions; this task needs a larger model"
                )
            tokens = context + label
            truncated += len(tokens) > room + 1
            # The last token is only predicted, never read, so positions + 1 tokens fit.
            requests.append(Request(torch.tensor(begin + tokens[-(room + 1) :]), len(label)))
        warnings = self.limit_warnings(limit, len(requests), len(passages))
        if truncated:
            warnings.append(
                f"{truncated} passages are longer than the model's {positions} positions: only "
                f"their last {room + 1} tokens are used"
            )
        return Work(
            requests,
            counts={
                "examples": len(requests),
                "target_tokens": sum(request.num_scored for request in requests),
                "truncated": truncated,
            },
            settings={
                "target": target,
                "limit": limit,
                "data": _data_record(path, digest, len(passages)),
                "warnings": warnings,
            },
            sources=[{"line": line, "passage": text} for line, text in passages[:limit]],
        )

    def examples(
        self, engine: Engine, work: Work, scores: Scores, tokenizer: Tokenizer
    ) -> list[dict[str, Any]]:
        """Return each passage with its target, the model's answer, and whether it is right.

        The answer is what the model writes greedily, as many tokens as the target has; only those
        of passages that it got wrong have to be computed. Of a model that gives NaN it is None.
        """
        from mlm_eval.engine.generate import generate
        from mlm_eval.engine.prompts import Prompt

        right = scores.all_greedy().tolist()
        told = super().examples(engine, work, scores, tokenizer)
        answers = [line["text"] if hit else None for line, hit in zip(told, right, strict=True)]
        wrong = [i for i, hit in enumerate(right) if not hit]
        if scores.logprobs.isfinite().all():
            prompts = []
            for index in wrong:
                request = work.requests[index]
                context = request.tokens[: -request.num_scored].tolist()
                prompts.append(Prompt(context, max_new_tokens=request.num_scored))
            written = generate(engine, prompts) if prompts else []
            for index, text in zip(wrong, written, strict=True):
                answers[index] = tokenizer.decode(text.tokens)
        return [
            {
                **source,
                "target": line["text"],
                "answer": answer,
                "correct": hit,
                "tokens": line["tokens"],
                "logprob": line["logprob"],
            }
            for source, line, answer, hit in zip(work.sources, told, answers, right, strict=True)
        ]

    def metrics(self, scores: Scores, nll_sum: float, work: Work) -> dict[str, Any]:
        """Return accuracy and perplexity of the targets."""
        num_correct = int(scores.all_greedy().sum())
        return cloze_metrics(num_correct, examples=len(work.requests), nll_sum=nll_sum)

    def protocol(self, settings: Mapping[str, Any]) -> str:
        """Return `megatron-paper` for whole words and nothing before a passage."""
        usual = super().protocol(settings)
        if settings["target"] == "word":
            return usual
        return usual.replace("megatron-paper", "megatron-last-token")

    def rows(self, result: Result) -> list[tuple[str, str]]:
        """Return the accuracy, and what counts as a hit."""
        m, c, s = result.metrics, result.counts, result.settings
        target = "every token of the last word" if s["target"] == "word" else "the last token only"
        return [
            ("accuracy", accuracy_text(m, c["examples"])),
            ("target perplexity", f"{m['target_ppl']:.4f}   per target"),
            ("protocol", f"greedy match of {target}"),
        ]

    def figure(self, metrics: Mapping[str, Any], counts: Mapping[str, Any]) -> tuple[str, str]:
        """Return the accuracy with its error, as `rows` does."""
        return super().figure(metrics, counts)[0], accuracy_text(metrics, counts["examples"])

    def megatron_line(self, result: Result) -> str:
        """Return the line that Megatron printed for these figures."""
        return (
            f" validation results on LAMBADA | number correct: "
            f"{result.metrics['num_correct']:.4E} | "
            f"total examples: {result.counts['examples']:.4E} | "
            f"avg accuracy: {result.metrics['accuracy']:.4E}"
        )

    def workload(self, positions: int) -> Workload:
        """Return passes of lengths near the mean whose sums are those of the paper's file.

        The work is nearly linear in the lengths.
        """
        from mlm_eval.planning.plan import Passes, Workload, spread

        passes = []
        twice = PAPER_TARGET_TOKENS - PAPER_PASSAGES
        for count, length in spread(PAPER_READ_TOKENS, PAPER_PASSAGES):
            length = min(length, positions)
            pairs = min(count, twice)
            twice -= pairs
            passes += [Passes(n, length, k, k) for n, k in ((pairs, 2), (count - pairs, 1)) if n]
        title = f"LAMBADA, {PAPER_PASSAGES:,} passages, {PAPER_READ_TOKENS:,} tokens"
        return Workload(self.name, title, passes)


LAMBADA = Lambada()


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


def accuracy_text(metrics: Mapping[str, Any], examples: int) -> str:
    """Return the accuracy with its standard error.

    Of no hit, and of hits only, that is 0, which says nothing: then with the bound that the true
    share has with 95 % confidence (Wilson's).
    """
    share, hits = 100 * metrics["accuracy"], metrics["num_correct"]
    counted = f"{hits:,} of {examples:,}"
    if 0 < hits < examples:
        return f"{share:.2f} % +- {100 * metrics['accuracy_stderr']:.2f} ({counted})"
    squared = 1.959964**2
    bound = 100 * squared / (examples + squared)
    word, bound = ("most", bound) if hits == 0 else ("least", 100 - bound)
    return f"{share:.2f} % ({counted}; at {word} {bound:.1f} % with 95 % confidence)"


def read_passages(data: str | None) -> tuple[str, list[tuple[int, str]], str]:
    r"""Return the name of the data, its passages with line numbers, and the sha256 of the file.

    Lines end at "\n" alone: JSON strings may hold U+2028 and others that `splitlines` cuts at.
    Blank lines are left out. The rows of a set are numbered from 1 and hashed as the JSON lines
    that Python's own `json` writes of them: of the published text this is the published file, byte
    for byte.

    Raises:
        InputError: There is no such data, or a line is not a JSON object with a string `text`.
    """
    raw = read_data(data, column="text", default=DatasetName("EleutherAI/lambada_openai", None))
    if raw.rows is not None:
        lines = (json.dumps({"text": row}) + "\n" for row in raw.rows)
        rows = list(enumerate(raw.rows, start=1))
        for number, row in rows:
            check_text(row, f"{raw.path}, row {number}")
        return raw.path, rows, sha256(lines)
    assert raw.content is not None
    passages = []
    for number, line in enumerate(raw.text().split("\n"), start=1):
        if line.strip():
            where = f"{raw.path}, line {number}"
            passages.append((number, json_field(parse_json(line, where), "text", str, where)))
    return raw.path, passages, sha256([raw.content])


def _data_record(path: str, digest: str, examples: int) -> dict[str, Any]:
    warning = (
        f"{path} is not the paper's file ({examples:,} passages, sha256 {digest[:12]}...); the "
        f"paper's numbers are for OpenAI's lambada_test.jsonl ({PAPER_PASSAGES:,} passages)"
    )
    paper_file = digest == PAPER_DIGEST
    return {
        "path": path,
        "sha256": digest,
        "examples": examples,
        "paper_file": paper_file,
        "warnings": [] if paper_file else [warning],
    }
