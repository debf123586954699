"""lm-evaluation-harness' own command line, on a checkpoint that only we can open."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError, require
from mlm_eval.cli.command import command
from mlm_eval.cli.run import ModelRun
from mlm_eval.cli.screen import progress
from mlm_eval.options import BosOption, RunOptions, again, option

if TYPE_CHECKING:
    from mlm_eval.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)
class HarnessOptions(BosOption, RunOptions):
    """The options of `harness`; the harness has its own for what a field without one says."""

    arguments: tuple[str, ...] = option(
        "After `--`: what `lm-eval run` takes (--tasks, --num_fewshot, --limit, --output_path, "
        "...). --model_args may set max_length, max_gen_toks, prefix_token_id, add_bos_token and "
        "seed.",
        positional=True,
        metavar="-- LM_EVAL_ARGUMENTS",
    )

    bos: str = again(
        BosOption,
        "bos",
        help="yes: the begin-of-text token stands before each text; no: it does not; auto: where "
        "the tokenizer's files say so.",
    )
    output: None = None
    overwrite: bool = False
    limit: None = None
    seed: int = 0
    full_digest: bool = False


@command("harness", HarnessOptions, order=("ckpt", "arguments"))
def harness(options: HarnessOptions) -> None:
    """Its log-likelihoods are those of the harness' hf backend on the converted model.

    Example: mlm-eval harness --ckpt gpt2_345m --tokenizer gpt2 --tp 2 -- --tasks lambada_openai
    """
    require("lm_eval", "mlm-eval harness")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness draws bars into log files, too
    from mlm_eval.engine.generate import CACHE_BYTES
    from mlm_eval.harness.command import read_arguments, run_command_line
    from mlm_eval.harness.model import MegatronLM

    arguments = list(options.arguments)
    given = read_arguments(arguments)
    if options.bos != "auto":
        asked = options.bos == "yes"
        if given.setdefault("add_bos_token", asked) != asked:
            raise InputError(
                f"--bos {options.bos} and --model_args add_bos_token={given['add_bos_token']} "
                "contradict each other; give one of them"
            )
    run = ModelRun(options)
    run.refuse_t5("lm-evaluation-harness")
    tokenizer = run.tokenizer()

    def body(engine: Engine) -> None:
        lm = MegatronLM(engine, tokenizer, bar=lambda: progress(engine.is_main), **given)
        lm.lead(lambda: run_command_line(lm, arguments))
        run.print_result(f"scored by mlm-eval: {lm.summary()}")

    place = run.start(lambda: run.scoring_need(cache=CACHE_BYTES))
    run.on_ranks(body, placement=place)
