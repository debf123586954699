"""The zero-shot benchmarks as commands, and the scores that an interrupted run keeps."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.command import command
from mlm_eval.cli.run import ModelRun
from mlm_eval.cli.screen import Screen, phase, progress
from mlm_eval.options import RunOptions, nested, option
from mlm_eval.tasks.zero_shot import benchmarks

if TYPE_CHECKING:
    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.resume import PartialScores
    from mlm_eval.tasks.zero_shot.benchmark import ZeroShot


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """What becomes of the scores that an interrupted run has kept beside its output."""

    resume: bool = option(
        "An interrupted run of the same --output is resumed with and without this.",
        False,
        flag="--resume",
    )
    restart: bool = option("Discard what an interrupted run has kept.", False, flag="--restart")


def register(benchmark: ZeroShot[Any]) -> None:
    """Add the command of a benchmark."""
    kind = dataclasses.make_dataclass(
        benchmark.name,
        [
            ("own", Any, nested(benchmark.options)),
            ("resuming", ResumeOptions, nested(ResumeOptions)),
            ("run", RunOptions, nested(RunOptions)),
        ],
        kw_only=True,
    )

    @command(benchmark.name, kind, help=inspect.getdoc(benchmark), order=("ckpt",))
    def run(options: Any) -> None:
        restart = options.resuming.restart
        run_benchmark(ModelRun(options.run), benchmark, options.own, restart=restart)


for _benchmark in benchmarks().values():
    register(_benchmark)


def run_benchmark(run: ModelRun, benchmark: ZeroShot[Any], own: Any, *, restart: bool) -> None:
    """Run a benchmark on the ranks that it needs.

    Args:
        run: The command's.
        benchmark: What is run.
        own: The benchmark's own options.
        restart: Discard the scores that an interrupted run has kept beside its output.

    Raises:
        InputError: The model is not a GPT, or an option is wrong.
    """
    from mlm_eval.checkpoints.checkpoint import full_digest
    from mlm_eval.reporting.text import result_text, work_text

    options, config = run.options, run.checkpoint.config
    if config.family != "gpt":
        raise InputError(
            f"{run.checkpoint.provenance.path} is a {config.family.upper()} checkpoint; "
            f"{benchmark.name} needs a GPT model (left to right)"
        )
    if options.output is not None:
        Screen.keeps = kept_beside(options.output)
    place = run.start()
    tokenizer = run.tokenizer()
    with phase("reading and tokenizing the text"):
        work = benchmark.work_for(config, own, tokenizer=tokenizer, limit=options.limit)

    def body(engine: Engine) -> None:
        tokens = sum(request.length for request in work.requests)
        run.log(work_text(benchmark.unit, len(work.requests), tokens, engine.flops(work.requests)))
        parts = benchmark.resume_parts(engine, work, tokenizer)
        with kept_scores(run, len(work.requests), parts, restart=restart) as partial:
            with progress(run.is_main) as on_progress:
                result = benchmark.score(
                    engine, work, tokenizer=tokenizer, on_progress=on_progress, partial=partial
                )
            result.settings.update(engine.describe(), seed=options.seed)
            if options.full_digest and run.is_main:
                result.checkpoint["full_digest"] = full_digest(engine.checkpoint)
            run.warn(result.warnings)
            run.print_result(result_text(result, benchmark.title, benchmark.rows(result)))
            line = benchmark.megatron_line(result)
            if line is not None:
                run.print_result(line)
            if options.output is not None and run.is_main:
                result.write(options.output)
            if partial is not None and run.is_main:
                partial.remove(len(work.requests))

    run.on_ranks(body, placement=place)


def kept_beside(output: Path) -> Path:
    """Return the folder that keeps the scores of an interrupted run of this output."""
    output = Path(os.path.realpath(output))
    return output.with_name(output.name + ".partial")


@contextmanager
def kept_scores(
    run: ModelRun, count: int, parts: dict[str, Any], *, restart: bool
) -> Iterator[PartialScores | None]:
    """Yield the scores of `count` requests kept beside the output; None without a file.

    On Ctrl-C in a single process, what is done is written before leaving.
    """
    from mlm_eval.checkpoints.files.output import is_stream
    from mlm_eval.engine.resume import PartialScores

    output = run.options.output
    if output is None or is_stream(output):
        yield None
        return
    folder = kept_beside(output)
    partial = PartialScores(folder, parts, restart=restart, replace=run.options.overwrite)
    with closing(partial):
        known = sum(index < count for index in partial.finished())
        if known:
            run.log(
                f"resumes at {100 * known / count:.0f} %: {known:,} of {count:,} are done, kept in "
                f"{folder.name}"
            )
        try:
            yield partial
        except KeyboardInterrupt:
            partial.flush()
            raise
