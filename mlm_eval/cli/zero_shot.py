"""Commands that score with a GPT or BERT model: wikitext103, lambada, score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.cli.app import ZERO_SHOT
from mlm_eval.cli.command import command
from mlm_eval.cli.run import ModelRun
from mlm_eval.options import CheckpointOption, RunOptions, again, option

if TYPE_CHECKING:
    from mlm_eval.checkpoints.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Wiki(CheckpointOption):
    """Own."""

    data: str | None = option(
        "wiki.test.tokens, or a `datasets` name; default: the Hub's wikitext-103-v1 test.", None
    )
    seq_length: int | None = option("Window length; default min(1024, positions).", None, least=1)
    stride: int = option("Tokens that each further window scores.", 32, least=1)
    resume: bool = option(
        "Go on with an interrupted run of the same --output.", False, flag="--resume"
    )


@dataclass(frozen=True, kw_only=True)
class WikiOptions(RunOptions, Wiki):
    """All."""


@command("wikitext103", WikiOptions, panel=ZERO_SHOT)
def wikitext103(options: WikiOptions) -> None:
    """The paper's zero-shot perplexity: per original word, overlapping windows, stride 32.

    Example: mlm-eval wikitext103 --ckpt gpt2_345m --data wiki.test.tokens --tokenizer gpt2 --tp 2
    """

    def prepare(words: Tokenizer, positions: int) -> Any:
        from mlm_eval.tasks.zero_shot import wikitext103 as task

        return task.prepare(
            options.data,
            tokenizer=words,
            positions=positions,
            seq_length=options.seq_length,
            stride=options.stride,
            limit=options.limit,
        )

    ModelRun(options).zero_shot("wikitext103", "windows", prepare, resume=options.resume)


@dataclass(frozen=True, kw_only=True)
class Cloze(CheckpointOption):
    """Own."""

    data: str | None = option(
        "JSON lines with `text`, or a `datasets` name; default: EleutherAI/lambada_openai.", None
    )
    target: str = option(
        "word: all tokens of the last word (the paper's); last-token: only the last one.", "word"
    )
    resume: bool = option(
        "Go on with an interrupted run of the same --output.", False, flag="--resume"
    )


@dataclass(frozen=True, kw_only=True)
class ClozeOptions(RunOptions, Cloze):
    """All."""


@command("lambada", ClozeOptions, panel=ZERO_SHOT)
def lambada(options: ClozeOptions) -> None:
    """The paper's cloze accuracy: is the last word of each passage the model's greedy choice?

    Example: mlm-eval lambada --ckpt gpt2_345m --data lambada_test.jsonl --tokenizer gpt2
    """

    def prepare(words: Tokenizer, positions: int) -> Any:
        from mlm_eval.tasks.zero_shot import lambada as task

        return task.prepare(
            options.data,
            tokenizer=words,
            positions=positions,
            target=options.target,
            limit=options.limit,
        )

    ModelRun(options).zero_shot("lambada", "passages", prepare, resume=options.resume)


@dataclass(frozen=True, kw_only=True)
class LinesOptions(CheckpointOption):
    """What `score` reads, and how."""

    input: Path = option(
        'JSON lines: {"tokens": [...]} or {"text": "..."}; for BERT also with '
        '"tokentypes" and "padding_mask", or {"choices": [[...], [...]]}.'
    )
    output: Path = option('JSON lines: {"tokens", "logprobs", "greedy"}.')
    stride: int | None = option(
        "Tokens that each further window scores, where a sequence is too long for one.",
        None,
        least=1,
    )


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(RunOptions, LinesOptions):
    """The options of `score`."""

    output: Path = again(LinesOptions, "output")


@command("score", ScoreOptions, panel=ZERO_SHOT)
def score_command(options: ScoreOptions) -> None:
    """Log-probabilities of given sequences.

    GPT: each token given the ones before. BERT: each token given the whole input.

    Example: mlm-eval score --ckpt gpt2_345m --input sequences.jsonl --output scores.jsonl --tp 2
    """
    ModelRun(options).score_file(options.input, options.stride)
