"""lm-evaluation-harness' own command line, on a checkpoint that only we can open."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.app import ZERO_SHOT, app
from mlm_eval.cli.options import (
    BatchTokens,
    Ckpt,
    Compile,
    Config,
    Device,
    Dp,
    Dtype,
    MergeFile,
    Sets,
    TokenizerDir,
    Tp,
    Vocab,
    VocabFile,
)
from mlm_eval.cli.run import ModelRun, progress

if TYPE_CHECKING:
    from mlm_eval.engine.engine import Engine


@app.command(rich_help_panel=ZERO_SHOT)
def harness(
    ckpt: Ckpt,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="-- LM_EVAL_ARGUMENTS",
            help="After `--`: what `lm-eval run` takes (--tasks, --num_fewshot, --limit, "
            "--output_path, ...). --model_args may set max_length, max_gen_toks, prefix_token_id, "
            "add_bos_token and seed.",
        ),
    ],
    tp: Tp = "auto",
    dp: Dp = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_tokens: BatchTokens = None,
    vocab: Vocab = "padded",
    tokenizer: TokenizerDir = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    set_: Sets = None,
    compile_: Compile = False,
    config: Config = None,
) -> None:
    """Any task of lm-evaluation-harness, on the checkpoint as it is.

    Its log-likelihoods are those of the harness' hf backend on the converted model.

    Example: mlm-eval harness --ckpt gpt2_345m --tokenizer gpt2 --tp 2 -- --tasks lambada_openai
    """
    if find_spec("lm_eval") is None:
        raise InputError(
            "lm-evaluation-harness is not installed; run: pip install 'mlm-eval[lm-eval]'"
        )
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness draws bars into log files, too
    from mlm_eval.harness.command import read_arguments, run_command_line
    from mlm_eval.harness.model import MegatronLM

    given = read_arguments(arguments)
    run = ModelRun(
        ckpt=ckpt,
        tp=tp,
        dp=dp,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        vocab=vocab,
        tokenizer=tokenizer,
        vocab_file=vocab_file,
        merge_file=merge_file,
        set_=set_,
        compile_=compile_,
        output=None,
        limit=None,
    )
    words = run.tokenizer(required=True)
    assert words is not None

    def body(engine: Engine) -> None:
        lm = MegatronLM(engine, words, bar=lambda: progress(engine.is_main), **given)
        lm.lead(lambda: run_command_line(lm, arguments))
        run.tell(f"scored by mlm-eval: {lm.summary()}")

    run.on_ranks(body)
