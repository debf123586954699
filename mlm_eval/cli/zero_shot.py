"""Commands that score with a GPT or BERT model: wikitext103, lambada, score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlm_eval.cli.app import ZERO_SHOT, app
from mlm_eval.cli.options import (
    BatchTokens,
    Ckpt,
    Compile,
    Config,
    Device,
    Dp,
    Dtype,
    FullDigest,
    Limit,
    MergeFile,
    Output,
    Resume,
    Seed,
    Sets,
    TokenizerDir,
    Tp,
    Vocab,
    VocabFile,
)
from mlm_eval.cli.run import ModelRun, shared

if TYPE_CHECKING:
    from mlm_eval.checkpoints.tokenizer import Tokenizer


@app.command(rich_help_panel=ZERO_SHOT)
def wikitext103(
    ckpt: Ckpt,
    data: Annotated[
        str | None,
        typer.Option(
            help="wiki.test.tokens, or a `datasets` name; default: the Hub's wikitext-103-v1 test."
        ),
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=1, help="Window length; default min(1024, positions).")
    ] = None,
    stride: Annotated[
        int, typer.Option(min=1, help="Tokens that each further window scores.")
    ] = 32,
    resume: Resume = False,
    tp: Tp = "auto",
    dp: Dp = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_tokens: BatchTokens = None,
    vocab: Vocab = "padded",
    tokenizer: TokenizerDir = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    output: Output = None,
    limit: Limit = None,
    seed: Seed = 1234,
    set_: Sets = None,
    compile_: Compile = False,
    full_digest: FullDigest = False,
    config: Config = None,
) -> None:
    """The paper's zero-shot perplexity: per original word, overlapping windows, stride 32.

    Example: mlm-eval wikitext103 --ckpt gpt2_345m --data wiki.test.tokens --tokenizer gpt2 --tp 2
    """
    run = ModelRun(**shared(locals()))

    def prepare(words: Tokenizer, positions: int) -> Any:
        from mlm_eval.tasks.zero_shot import wikitext103 as task

        return task.prepare(
            data,
            tokenizer=words,
            positions=positions,
            seq_length=seq_length,
            stride=stride,
            limit=limit,
        )

    run.zero_shot("wikitext103", "windows", prepare, resume=resume)


@app.command(rich_help_panel=ZERO_SHOT)
def lambada(
    ckpt: Ckpt,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSON lines with `text`, or a `datasets` name; default: EleutherAI/lambada_openai."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="word: all tokens of the last word (the paper's); last-token: only the last one."
        ),
    ] = "word",
    resume: Resume = False,
    tp: Tp = "auto",
    dp: Dp = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_tokens: BatchTokens = None,
    vocab: Vocab = "padded",
    tokenizer: TokenizerDir = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    output: Output = None,
    limit: Limit = None,
    seed: Seed = 1234,
    set_: Sets = None,
    compile_: Compile = False,
    full_digest: FullDigest = False,
    config: Config = None,
) -> None:
    """The paper's cloze accuracy: is the last word of each passage the model's greedy choice?

    Example: mlm-eval lambada --ckpt gpt2_345m --data lambada_test.jsonl --tokenizer gpt2
    """
    run = ModelRun(**shared(locals()))

    def prepare(words: Tokenizer, positions: int) -> Any:
        from mlm_eval.tasks.zero_shot import lambada as task

        return task.prepare(data, tokenizer=words, positions=positions, target=target, limit=limit)

    run.zero_shot("lambada", "passages", prepare, resume=resume)


@app.command(rich_help_panel=ZERO_SHOT)
def score(
    ckpt: Ckpt,
    input_: Annotated[
        Path,
        typer.Option(
            "--input",
            help='JSON lines: {"tokens": [...]} or {"text": "..."}; for BERT also with '
            '"tokentypes" and "padding_mask", or {"choices": [[...], [...]]}.',
        ),
    ],
    output: Annotated[Path, typer.Option(help='JSON lines: {"tokens", "logprobs", "greedy"}.')],
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that each further window scores, where a sequence is too long for one.",
        ),
    ] = None,
    tp: Tp = "auto",
    dp: Dp = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_tokens: BatchTokens = None,
    vocab: Vocab = "padded",
    tokenizer: TokenizerDir = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    limit: Limit = None,
    seed: Seed = 1234,
    set_: Sets = None,
    compile_: Compile = False,
    full_digest: FullDigest = False,
    config: Config = None,
) -> None:
    """Log-probabilities of given sequences.

    GPT: each token given the ones before. BERT: each token given the whole input.

    Example: mlm-eval score --ckpt gpt2_345m --input sequences.jsonl --output scores.jsonl --tp 2
    """
    ModelRun(**shared(locals())).score_file(input_, stride)
