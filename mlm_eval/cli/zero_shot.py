"""The zero-shot benchmarks as commands, and the scores that an interrupted run keeps."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.folders.kept_scores import kept_beside
from mlm_eval.cli.command import command
from mlm_eval.cli.run import ModelRun
from mlm_eval.cli.screen import Screen, phase, progress
from mlm_eval.cli.series.evaluation import Evaluation, Outcome
from mlm_eval.cli.series.loop import run_series
from mlm_eval.options import FILE, SeriesOptions, again, nested, option
from mlm_eval.tasks.zero_shot import benchmarks
from mlm_eval.training.settings import RunSettings

if TYPE_CHECKING:
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.resume import Identified, PartialScores
    from mlm_eval.engine.score import Scores
    from mlm_eval.reporting.results import Result
    from mlm_eval.tasks.zero_shot.benchmark import Work, ZeroShot
    from mlm_eval.training.trackers import Trackers


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """What becomes of the scores that an interrupted run has kept beside its output."""

    resume: bool = option(
        "An interrupted run of the same --output is resumed with and without this.",
        False,
        flag="--resume",
    )
    restart: bool = option("Discard what an interrupted run has kept.", False, flag="--restart")


@dataclass(frozen=True, kw_only=True)
class ExamplesOption:
    """What is written of single examples."""

    save_examples: Path | None = option(
        "Write each passage or window with its log-probability, of LAMBADA also the answer, here "
        "(JSON lines). A series with --output writes a file for each checkpoint, "
        "E.iter_0001000.jsonl of E.jsonl.",
        None,
        writes=FILE,
    )


@dataclass(frozen=True, kw_only=True)
class TrackingOptions:
    """Where the figures of an evaluation go besides."""

    log: tuple[str, ...] = again(RunSettings, "log", group=None)


def register(benchmark: ZeroShot[Any]) -> None:
    """Add the command of a benchmark."""
    kind = dataclasses.make_dataclass(
        benchmark.name,
        [
            ("own", Any, nested(benchmark.options)),
            ("saving", ExamplesOption, nested(ExamplesOption)),
            ("resuming", ResumeOptions, nested(ResumeOptions)),
            ("tracking", TrackingOptions, nested(TrackingOptions)),
            ("run", SeriesOptions, nested(SeriesOptions)),
        ],
        kw_only=True,
    )

    @command(benchmark.name, kind, help=inspect.getdoc(benchmark), order=("ckpt",))
    def run(options: Any) -> None:
        from mlm_eval.checkpoints.files.output import is_stream

        examples = options.saving.save_examples
        evaluation = BenchmarkEvaluation(
            benchmark,
            options.own,
            options.run,
            restart=options.resuming.restart,
            save_examples=examples,
            destinations=options.tracking.log,
        )
        if options.run.is_series and examples is not None:
            if options.run.output is None or is_stream(examples):
                raise InputError(
                    "--save-examples writes a file for each checkpoint of a series, named as the "
                    "records are; give --output F.json, and a file for the examples"
                )
        with closing(evaluation):
            if options.run.is_series:
                run_series(options.run, evaluation)
            else:
                evaluation.run_alone()


BenchmarkText = tuple["Tokenizer", "Work"]
"""A benchmark's data as requests, and the tokenizer that made them."""


class BenchmarkEvaluation(Evaluation[BenchmarkText]):
    """A benchmark, on one model or on a series of them."""

    def __init__(
        self,
        benchmark: ZeroShot[Any],
        own: Any,
        options: SeriesOptions,
        *,
        restart: bool,
        save_examples: Path | None = None,
        destinations: Sequence[str] = (),
    ) -> None:
        """Remember what is asked for.

        Args:
            benchmark: What is run.
            own: The benchmark's own options.
            options: Those of the run.
            restart: Discard the scores that an interrupted run has kept beside its output.
            save_examples: Where single examples are written; of a series beside this.
            destinations: Trackers of the figures, as `--log` names them.

        Raises:
            InputError: A tracker is unknown, or its package is missing.
        """
        if destinations:
            from mlm_eval.checkpoints.files.output import is_stream
            from mlm_eval.training.trackers import check_trackers

            has_file = options.output is not None and not is_stream(options.output)
            check_trackers(destinations, has_folder=has_file)
        self.destinations = destinations
        self._trackers: dict[str, Trackers] = {}
        self.save_examples = save_examples
        self.benchmark, self.own, self.options, self.restart = benchmark, own, options, restart
        self.task, self.limit = benchmark.name, options.limit
        asked = {k: v for k, v in dataclasses.asdict(own).items() if k != "data"}
        self.asked = {**asked, "vocab": options.vocab, "dtype": options.dtype}
        self._works: dict[tuple[Any, ...], Work] = {}

    def run_alone(self) -> None:
        """Run the benchmark on the one model, and print all about it.

        Raises:
            InputError: The model is not a GPT, or an option is wrong.
        """
        from mlm_eval.reporting.text import result_text

        benchmark = self.benchmark
        run = ModelRun(self.options.one(self.options.ckpt[0], self.options.output))
        self._refuse_others(run)
        if self.options.output is not None:
            Screen.expect(self.options.output)
        place = run.start()
        text = self.prepare(run)

        def body(engine: Engine) -> None:
            result = self._score(run, engine, text)
            run.print_result(result_text(result, benchmark.title, benchmark.rows(result)))
            line = benchmark.megatron_line(result)
            if line is not None:
                run.print_result(line)

        run.on_ranks(body, placement=place)

    def _refuse_others(self, run: ModelRun) -> None:
        family = run.checkpoint.config.family
        if family != "gpt":
            raise InputError(
                f"{run.checkpoint.provenance.path} is a {family.upper()} checkpoint; "
                f"{self.benchmark.name} needs a GPT model (left to right)"
            )

    def prepare(self, run: ModelRun) -> BenchmarkText:
        """See `Evaluation`: models of one tokenizer, length and vocabulary share the requests."""
        self._refuse_others(run)
        config, tokenizer = run.checkpoint.config, run.tokenizer()
        key = tokenizer.sha256, config.max_position_embeddings, config.vocab_size
        if key not in self._works:
            with phase("reading and tokenizing the text"):
                self._works[key] = self.benchmark.work_for(
                    config, self.own, tokenizer=tokenizer, limit=self.options.limit
                )
        return tokenizer, self._works[key]

    def data(self, text: BenchmarkText) -> dict[str, Any]:
        """See `Evaluation`."""
        found = text[1].settings["data"]
        return {"path": found["path"], "sha256": found["sha256"]}

    def parts(self, model: Identified, text: BenchmarkText) -> dict[str, Any]:
        """See `Evaluation`."""
        tokenizer, work = text
        return self.benchmark.resume_parts(model, work, tokenizer)

    def figure(self, record: Mapping[str, Any]) -> tuple[str, str]:
        """See `Evaluation`."""
        return self.benchmark.figure(record["metrics"], record["counts"])

    def known(
        self,
        path: Path,
        parts: Mapping[str, Any],
        entry: Mapping[str, Any] | None,
        *,
        overwrite: bool,
    ) -> Outcome | None:
        """See `Evaluation`: a record without its examples, where they are wanted, is made again."""
        from mlm_eval.reporting.existing import is_result

        found = super().known(path, parts, entry, overwrite=overwrite)
        examples = self._examples_of(path)
        if examples is None or (found is not None and examples.is_file()):
            return found
        # Those of an interrupted run stand before its record does.
        interrupted = kept_beside(path).is_dir() and examples.is_file() and is_result(examples)
        if not interrupted:
            self.check_place(examples, overwrite=overwrite, flag="--save-examples")
        return None

    def _examples_of(self, record: Path | None) -> Path | None:
        """Return where the examples of a checkpoint go: in a series, named as its record is."""
        if self.save_examples is None or not self.options.is_series:
            return self.save_examples
        assert record is not None and self.options.output is not None
        listed, place = (
            Path(os.path.realpath(p)) for p in (self.options.output, self.save_examples)
        )
        middle = record.name.removeprefix(listed.stem).removesuffix(listed.suffix)
        return place.with_name(place.stem + middle + place.suffix)

    def evaluate(self, run: ModelRun, engine: Engine, text: BenchmarkText) -> Outcome:
        """See `Evaluation`."""
        result = self._score(run, engine, text)
        return Outcome(*self.benchmark.figure(result.metrics, result.counts))

    def _score(self, run: ModelRun, engine: Engine, text: BenchmarkText) -> Result:
        """Return the result of a model; its record is written."""
        from mlm_eval.checkpoints.checkpoint import full_digest
        from mlm_eval.checkpoints.files.output import write_text
        from mlm_eval.reporting.text import work_text
        from mlm_eval.tasks.zero_shot.score import write_lines

        benchmark, options = self.benchmark, run.options
        tokenizer, work = text
        tokens = sum(request.length for request in work.requests)
        flops = engine.flops(work.requests)
        run.log_once(work_text(benchmark.unit, len(work.requests), tokens, flops))
        data = work.settings.get("data") or {}  # what is odd is said before hours of work
        run.warn([*data.get("warnings", ()), *benchmark.warnings(engine.checkpoint, work)])
        parts = benchmark.resume_parts(engine, work, tokenizer)
        with kept_scores(run, len(work.requests), parts, restart=self.restart) as partial:
            examples: list[dict[str, Any]] = []
            place = self._examples_of(options.output)

            def on_scores(scores: Scores) -> None:
                if place is not None:
                    examples.extend(benchmark.examples(engine, work, scores, tokenizer))

            with progress(run.is_main) as on_progress:
                result = benchmark.score(
                    engine,
                    work,
                    tokenizer=tokenizer,
                    on_progress=on_progress,
                    partial=partial,
                    on_scores=on_scores,
                )
            result.settings.update(engine.describe(), seed=options.seed)
            if options.full_digest and run.is_main:
                result.checkpoint["full_digest"] = full_digest(engine.checkpoint)
            run.warn(result.warnings)
            if run.is_main:
                if place is not None:
                    write_lines(place, examples)
                if options.output is not None:
                    content = result.to_json()
                    if partial is not None:
                        partial.expect(content, len(work.requests))
                    write_text(options.output, content)
                self._track(run, result)
            if partial is not None and run.is_main:
                partial.remove(len(work.requests))
        return result

    def _track(self, run: ModelRun, result: Result) -> None:
        """Send the figures of a model to the trackers, one run for each training run."""
        if not self.destinations:
            return
        from mlm_eval.training.log import is_number
        from mlm_eval.training.trackers import Trackers

        path, iteration = run.checkpoint.provenance.path, run.checkpoint.provenance.iteration
        name = (path.parent if iteration is not None else path).name or self.task
        if name not in self._trackers:
            self._trackers[name] = Trackers(
                self.destinations,
                name=f"{name} {self.task}",
                config={**self.asked, "task": self.task, "limit": self.limit},
                folder=(self.options.output or Path("output")).absolute().parent,
                warn=lambda text: run.warn([text]),
            )
        figures = {f"{self.task}/{k}": float(v) for k, v in result.metrics.items() if is_number(v)}
        self._trackers[name].log(figures, iteration if isinstance(iteration, int) else 0)

    def close(self) -> None:
        """End the runs of the trackers."""
        for trackers in self._trackers.values():
            trackers.close()
        self._trackers.clear()


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


for _benchmark in benchmarks().values():
    register(_benchmark)
