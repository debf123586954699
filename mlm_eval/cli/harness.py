"""lm-evaluation-harness' own command line, on a checkpoint that only we can open."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError, require
from mlm_eval.cli.command import command
from mlm_eval.cli.run import ModelRun
from mlm_eval.cli.screen import progress
from mlm_eval.cli.series.evaluation import Evaluation, Outcome
from mlm_eval.cli.series.loop import run_series
from mlm_eval.options import SeriesOptions, TokenizersBosOption, again, option

if TYPE_CHECKING:
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.resume import Identified


@dataclass(frozen=True, kw_only=True)
class HarnessOptions(TokenizersBosOption, SeriesOptions):
    """The options of `harness`; the harness has its own for what a field without one says."""

    arguments: tuple[str, ...] = option(
        "After `--`: what `lm-eval run` takes (--tasks, --num_fewshot, --limit, --output_path, "
        "...). --model_args may set max_length, max_gen_toks, prefix_token_id, add_bos_token and "
        "seed.",
        positional=True,
        metavar="-- LM_EVAL_ARGUMENTS",
    )

    output: Path | None = again(
        SeriesOptions, "output", help="Write the harness' figures as a result record (JSON) here."
    )
    limit: None = None
    seed: int = 0
    full_digest: bool = False


class HarnessEvaluation(Evaluation["Tokenizer"]):
    """`harness`, on one model or on a series of them."""

    task = "harness"

    def __init__(self, options: HarnessOptions) -> None:
        from mlm_eval.checkpoints.files.output import is_stream
        from mlm_eval.harness.command import read_arguments

        self.options, self.arguments = options, list(options.arguments)
        given, self.limit = read_arguments(self.arguments)
        self.given = given
        if options.bos != "auto":
            asked = options.bos == "yes"
            if given.setdefault("add_bos_token", asked) != asked:
                raise InputError(
                    f"--bos {options.bos} and --model_args add_bos_token={given['add_bos_token']} "
                    "contradict each other; give one of them"
                )
        if options.output is not None and is_stream(options.output):
            raise InputError(
                f"--output {options.output} is a stream, where the harness prints; name a file"
            )
        self.asked = {
            "arguments": self.arguments,
            "bos": options.bos,
            "vocab": options.vocab,
            "dtype": options.dtype,
        }

    def run_alone(self) -> None:
        """Run the harness on the one model."""
        from mlm_eval.engine.generate import CACHE_BYTES

        run = ModelRun(self.options.one(self.options.ckpt[0], self.options.output))
        tokenizer = self.prepare(run)
        place = run.start(lambda: run.scoring_need(cache=CACHE_BYTES))

        def body(engine: Engine) -> None:
            self.evaluate(run, engine, tokenizer)

        run.on_ranks(body, placement=place)

    def prepare(self, run: ModelRun) -> Tokenizer:
        """See `Evaluation`."""
        run.refuse_t5("lm-evaluation-harness")
        return run.tokenizer()

    def data(self, text: Tokenizer) -> dict[str, Any]:
        """See `Evaluation`: the tasks name their data."""
        return {}

    def parts(self, model: Identified, text: Tokenizer) -> dict[str, Any]:
        """See `Evaluation`."""
        from mlm_eval.engine.resume import deciding_parts

        settings = {"arguments": self.arguments, "bos": self.options.bos}
        return deciding_parts(model, self.task, data=None, tokenizer=text, settings=settings)

    def evaluate(self, run: ModelRun, engine: Engine, text: Tokenizer) -> Outcome:
        """See `Evaluation`; the harness prints its table."""
        from mlm_eval.harness.command import run_command_line
        from mlm_eval.harness.model import MegatronLM
        from mlm_eval.ranks.collectives import on_main
        from mlm_eval.reporting.results import write_json

        began = time.perf_counter()
        lm = MegatronLM(engine, text, bar=lambda: progress(engine.is_main), **self.given)
        found: list[dict[str, Any] | InputError] = []

        def lead() -> None:
            try:
                found.append(run_command_line(lm, self.arguments))
            except InputError as error:
                found.append(error)

        lm.lead(lead)

        def written() -> dict[str, Any]:  # or raised, on every rank
            if isinstance(found[0], InputError):
                raise found[0]
            seconds = time.perf_counter() - began
            record = self._record(engine, text, found[0], seconds)
            if run.options.output is not None:
                write_json(run.options.output, record)
            return record

        record = on_main(written)
        run.print_result(f"scored by mlm-eval: {lm.summary()}")
        return Outcome(*self.figure(record))

    def figure(self, record: Mapping[str, Any]) -> tuple[str, str]:
        """See `Evaluation`: the first task's first metric."""
        for task, metrics in record["metrics"].items():
            for name, value in metrics.items():
                if isinstance(value, (int, float)):
                    return f"{task} {name}", f"{value:.4f}"
        return "harness", "no figure"

    def _record(
        self, engine: Engine, tokenizer: Tokenizer, results: Mapping[str, Any], seconds: float
    ) -> dict[str, Any]:
        from mlm_eval.reporting.environment import run_record
        from mlm_eval.reporting.results import checkpoint_record, engine_settings, versions

        tasks = results.get("results", {})
        return {
            "task": self.task,
            "protocol": "lm-evaluation-harness",
            "metrics": {
                task: {
                    name.removesuffix(",none"): value
                    for name, value in figures.items()
                    if isinstance(value, (int, float))
                }
                for task, figures in tasks.items()
            },
            "counts": {task: n["effective"] for task, n in results.get("n-samples", {}).items()},
            "settings": {
                **engine_settings(engine, tokenizer),
                "arguments": self.arguments,
                "bos": self.options.bos,
                "limit": self.limit,
                "num_fewshot": results.get("n-shot"),
                "task_versions": results.get("versions"),
            },
            "checkpoint": checkpoint_record(engine.checkpoint),
            "timing": {"load_seconds": engine.load_seconds, "eval_seconds": seconds},
            "versions": {**versions(), "lm_eval": metadata.version("lm_eval")},
            "run": run_record(),
        }


@command("harness", HarnessOptions, order=("ckpt", "arguments"))
def harness(options: HarnessOptions) -> None:
    """Its log-likelihoods are those of the harness' hf backend on the converted model.

    Example: mlm-eval harness --ckpt gpt2_345m --tokenizer gpt2 --tp 2 -- --tasks lambada_openai
    """
    require("lm_eval", "mlm-eval harness")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness draws bars into log files, too
    from mlm_eval.engine.generate import CACHE_BYTES

    evaluation = HarnessEvaluation(options)
    if options.is_series:
        run_series(options, evaluation, cache=CACHE_BYTES)
    else:
        evaluation.run_alone()
