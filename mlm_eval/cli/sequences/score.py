"""score: log-probabilities of given sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.folders.kept_scores import kept_beside
from mlm_eval.cli.command import command
from mlm_eval.cli.run import ModelRun, chosen_tokenizer
from mlm_eval.cli.screen import Screen, phase, progress
from mlm_eval.cli.sequences.standard_input import STDIN, STDIN_NAME, standard_input
from mlm_eval.cli.series.evaluation import Evaluation, Outcome
from mlm_eval.cli.series.loop import run_series
from mlm_eval.cli.zero_shot import ResumeOptions, kept_scores
from mlm_eval.options import FILE, BosOption, SeriesOptions, option

if TYPE_CHECKING:
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.checkpoints.tokenizers.begin_of_text import BeginOfText
    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.resume import Identified
    from mlm_eval.tasks.zero_shot.sequences import GivenSequences, InputLine


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ResumeOptions, BosOption, SeriesOptions):
    """The options of `score`."""

    input: Path = option(
        'JSON lines: {"tokens": [...]} or {"text": "..."}; for BERT also with '
        '"tokentypes" and "padding_mask", or {"choices": [[...], [...]]}; for T5 '
        '{"encoder_tokens": [...], "encoder_mask": [...], "tokens": [...]}. Or a parquet file with '
        "such columns, or text (.txt), a sequence a line. - is stdin."
    )
    input_format: str = option(
        "auto (parquet by its content, text by the name's .txt, else JSON lines), jsonl, text or "
        "parquet.",
        "auto",
        choices=("auto", "jsonl", "text", "parquet"),
    )
    output: Path = option(
        'JSON lines: the input\'s own fields, "tokens", "logprobs", "greedy", "sum_logprob"; - is '
        "stdout.",
        writes=FILE,
    )
    stride: int | None = option(
        "Tokens that each further window scores, where a sequence is too long for one.",
        None,
        least=1,
    )


@dataclass(frozen=True)
class ScoreText:
    """The input, taken apart for a model."""

    given: GivenSequences
    lines: list[InputLine]
    tokenizer: Tokenizer | None
    begin: BeginOfText


class ScoreEvaluation(Evaluation[ScoreText]):
    """`score`, on one model or on a series of them."""

    task = "score"

    def __init__(self, options: ScoreOptions) -> None:
        self.options, self.limit = options, options.limit
        self.asked = {
            "bos": options.bos,
            "stride": options.stride,
            "vocab": options.vocab,
            "dtype": options.dtype,
        }
        self._content: tuple[str, bytes] | None = None
        self._texts: dict[tuple[Any, ...], ScoreText] = {}

    def run_alone(self) -> None:
        """Score with the one model."""
        options = self.options
        Screen.expect(options.output)
        run = ModelRun(options.one(options.ckpt[0], options.output))
        # Faults of a file are found before ranks are started; standard input is read once, by one
        # rank.
        text = self.prepare(run) if options.input != STDIN else None

        def body(engine: Engine) -> None:
            outcome = self.evaluate(run, engine, text or self.prepare(run))
            if run.is_main:
                limited = f" (LIMITED to the first {options.limit})" if options.limit else ""
                count = outcome.entry["lines"]
                run.print_result(f"{count:,} line(s) scored{limited}: {options.output}")

        run.on_ranks(body)

    def prepare(self, run: ModelRun) -> ScoreText:
        """See `Evaluation`: models of one tokenizer and family share the lines."""
        from mlm_eval.checkpoints.files.text_file import read_bytes
        from mlm_eval.checkpoints.tokenizers.begin_of_text import choose_begin
        from mlm_eval.tasks.zero_shot.sequences import GivenSequences, parse_lines

        options, config = self.options, run.checkpoint.config
        tokenizer = chosen_tokenizer(run.options.ckpt, options)
        family = config.family
        if family != "gpt" and options.bos == "yes":
            raise InputError(f"--bos yes is for GPT models; this is a {family.upper()} checkpoint")
        begin = choose_begin(options.bos, tokenizer if family == "gpt" else None)
        if self._content is None:
            from_stdin = options.input == STDIN
            name = STDIN_NAME if from_stdin else str(options.input)
            self._content = name, standard_input() if from_stdin else read_bytes(options.input)
        key = family, None if tokenizer is None else tokenizer.sha256
        if key not in self._texts:
            given = GivenSequences.of(*self._content, options.input_format)
            with phase("reading and tokenizing the lines"):
                lines = parse_lines(
                    given, tokenizer, family=family, limit=options.limit, begin=begin.ids
                )
            self._texts[key] = ScoreText(given, lines, tokenizer, begin)
        if options.is_series:  # else the first look is the engine's own, at the model as it is cut
            from mlm_eval.tasks.zero_shot.score import check_lines

            check_lines(self._texts[key].lines, config)
        return self._texts[key]

    def data(self, text: ScoreText) -> dict[str, Any]:
        """See `Evaluation`."""
        return {"path": str(self.options.input), "sha256": text.given.digest}

    def parts(self, model: Identified, text: ScoreText) -> dict[str, Any]:
        """See `Evaluation`."""
        from mlm_eval.tasks.zero_shot.score import resume_parts

        return resume_parts(model, text.given, text.tokenizer, self.options.stride, text.begin.ids)

    def evaluate(self, run: ModelRun, engine: Engine, text: ScoreText) -> Outcome:
        """See `Evaluation`; the lines are written to the run's output."""
        from mlm_eval.checkpoints.files.output import write_text
        from mlm_eval.engine.resume import resume_key
        from mlm_eval.reporting.text import work_text
        from mlm_eval.tasks.data.text import sha256
        from mlm_eval.tasks.zero_shot.score import (
            lines_of,
            longest_row,
            mean_logprob,
            score_lines,
            score_work,
        )

        options, lines = self.options, text.lines
        if text.begin.warning is not None and any(line.is_text for line in lines):
            run.warn([text.begin.warning])
        if text.tokenizer is not None and any(line.is_text for line in lines):
            run.warn_of_misfit(text.tokenizer)
        if empty := [line.where for line in lines if line.is_empty]:
            run.warn([f"{len(empty):,} line(s) hold no token, the first is {empty[0]}"])
        run.warn(run.checkpoint.length_warnings(longest_row(engine.config, lines)))
        count, tokens, flops = score_work(engine, lines, options.stride)
        run.log_once(work_text("sequence(s)", count, tokens, flops))
        parts = self.parts(engine, text)
        with kept_scores(run, count, parts, restart=options.restart) as partial:
            unit = "rows" if engine.config.family == "bert" else "tok"
            with progress(run.is_main, unit) as on_progress:
                records = list(
                    score_lines(
                        engine,
                        lines,
                        stride=options.stride,
                        on_progress=on_progress,
                        partial=partial,
                    )
                )
            mean = mean_logprob(records)
            entry: dict[str, Any] = {"lines": len(records), "mean_logprob": mean}
            output = run.options.output
            if output is not None and run.is_main:
                content = lines_of(records)
                if partial is not None and (self.limit or not options.is_series):
                    partial.expect(content, count)
                elif partial is not None:
                    partial.flush()  # what is kept says whose the lines are, until they are listed
                write_text(output, content)
                if options.is_series:
                    entry["key"] = resume_key({**parts, "limit": self.limit})
                    entry["sha256"] = sha256([output.read_bytes()])
            if partial is not None and run.is_main and (self.limit or not options.is_series):
                partial.remove(count)
        return Outcome(*_shown(mean), entry)

    def known(
        self,
        path: Path,
        parts: Mapping[str, Any],
        entry: Mapping[str, Any] | None,
        *,
        overwrite: bool,
    ) -> Outcome | None:
        """See `Evaluation`: lines do not say whose they are, the list of the series does."""
        from mlm_eval.engine.resume import resume_key
        from mlm_eval.reporting.existing import is_result
        from mlm_eval.tasks.data.text import sha256

        if path.is_file() and path.stat().st_size and not overwrite and is_result(path):
            if entry is not None and entry.get("sha256") == sha256([path.read_bytes()]):
                if entry.get("key") == resume_key(parts):
                    said = {k: entry.get(k) for k in ("lines", "mean_logprob", "key", "sha256")}
                    return Outcome(*_shown(entry.get("mean_logprob")), said)
                self.refuse_other(path, "other settings, or another checkpoint")
            if kept_beside(path).is_dir():
                return None  # written, and stopped before it was listed
        self.check_place(path, overwrite=overwrite)
        return None


def _shown(mean: float | None) -> tuple[str, str]:
    return "mean log-probability", "none" if mean is None else f"{mean:.6f}"


@command("score", ScoreOptions, order=("ckpt", "input", "input_format", "output", "stride"))
def score_command(options: ScoreOptions) -> None:
    """GPT: each token given the ones before. BERT: each given the whole input. T5: the decoder's.

    Example: mlm-eval score --ckpt gpt2_345m --input sequences.jsonl --output scores.jsonl --tp 2
    """
    evaluation = ScoreEvaluation(options)
    if options.is_series:
        run_series(options, evaluation)
    else:
        evaluation.run_alone()
