"""Commands that train: race, mnli, qqp, squad, mlm, lm; and ensemble, for their predictions."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.app import TRAINING, app
from mlm_eval.cli.command import build
from mlm_eval.cli.options import Options, Output, finetuning, pretraining, signature
from mlm_eval.cli.run import ModelRun
from mlm_eval.options import RunOptions, TokenizerOptions
from mlm_eval.ranks.launch import shutdown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tqdm import tqdm

    from mlm_eval.reporting.results import Result
    from mlm_eval.training.settings import TrainingProgress

FINETUNING = {
    "race": "RACE: which of four answers does the article support? Trains on middle and high.",
    "mnli": "MNLI: does the premise entail the hypothesis? Reports matched and mismatched.",
    "qqp": "QQP: do two questions ask the same? Reports accuracy and F1.",
    "squad": "SQuAD 1.1 and 2.0: where in the paragraph does the answer stand? Reports EM and F1.",
}

PRETRAINING = {
    "mlm": """Train a BERT on text: masked tokens, and sentence order where it has that head.

    Example: mlm-eval mlm --init bert.toml --data text.txt --tokenizer words --output-dir out""",
    "lm": """Train a GPT on text: each token from the ones before.

    Example: mlm-eval lm --ckpt gpt2_345m --data text.txt --output-dir out --tp 2""",
}


def _register(name: str, text: str, options: Options, body: Callable[[str, Any], None]) -> None:
    """Add a command with these options, which calls `body` with its name and their values."""

    def command(**values: Any) -> None:
        body(name, values)

    command.__signature__ = signature(options)  # type: ignore[attr-defined]
    app.command(name, rich_help_panel=TRAINING, help=text)(command)


# ---- fine-tuning -------------------------------------------------------------------------------


def _finetune(task: str, values: dict[str, Any]) -> None:
    from mlm_eval.reporting.text import training_text
    from mlm_eval.tasks.finetune.options import FinetuneOptions, Observer
    from mlm_eval.tasks.finetune.run import finetune

    given = _fields(FinetuneOptions, values)
    given |= {name: tuple(values[name] or ()) for name in ("train", "dev", "test")}
    options = FinetuneOptions(**{**given, "seeds": parse_seeds(values["seeds"])})
    run = _model_run(values)
    place = run.start()
    words = run.tokenizer()
    load = run.join(place)
    warnings = _Warnings(run)
    warnings.tell(run.checkpoint.provenance.warnings)
    with training_bars(run) as bars:
        observer = Observer(
            say=bars.say,
            warn=lambda text: warnings.tell([text]),
            on_step=bars.on_step,
            on_evaluation=bars.on_evaluation,
        )
        result = finetune(
            task, run.checkpoint, options, tokenizer=words, load=load, observer=observer
        )
    warnings.tell(result.warnings)
    _finish(run, result, training_text(result, folder=values["output_dir"]), values["output"])


# ---- language models ---------------------------------------------------------------------------


def _pretrain(kind: str, values: dict[str, Any]) -> None:
    from mlm_eval.checkpoints.config import parse_overrides
    from mlm_eval.checkpoints.dtypes import training_dtype
    from mlm_eval.cli.run import chosen_tokenizer
    from mlm_eval.reporting.text import training_text
    from mlm_eval.tasks.language.pretraining import TextSettings, pretrain, start_from
    from mlm_eval.training.settings import TrainSettings

    if (values["ckpt"] is None) == (values["init"] is None):
        raise InputError("give either --ckpt, to go on from a checkpoint, or --init, for a new one")
    files = {name: tuple(values[name] or ()) for name in ("data", "dev")}
    text = TextSettings(**{**_fields(TextSettings, values), **files})
    # What auto means depends on the device, which is not known yet.
    dtype = training_dtype(values["dtype"], "cpu")
    settings = TrainSettings(**{**_fields(TrainSettings, values), "dtype": dtype})
    checkpoint = None
    if values["init"] is not None:
        words = chosen_tokenizer(
            "",
            TokenizerOptions(
                tokenizer=values["tokenizer"],
                vocab_file=values["vocab_file"],
                merge_file=values["merge_file"],
            ),
        )
        if words is None:
            raise InputError("--init needs the vocabulary of the new model; give --tokenizer")
        overrides = parse_overrides(values["set_"] or [])
        checkpoint = start_from(
            kind, init=values["init"], tokenizer=words, seed=values["seed"], overrides=overrides
        )
    run = _model_run(values, checkpoint)
    place = run.start()
    words = run.tokenizer()
    dtype = training_dtype(values["dtype"], place.device)
    settings = dataclasses.replace(settings, dtype=dtype)
    engine = run.join(place)(run.checkpoint, "float32")
    warnings = _Warnings(run)
    warnings.tell(run.checkpoint.provenance.warnings)
    with training_bars(run) as bars:
        result = pretrain(
            kind,
            engine,
            words,
            text,
            settings,
            output_dir=values["output_dir"],
            resume=values["resume"],
            say=bars.say,
            on_progress=bars.on_step,
            on_evaluation=bars.on_evaluation,
        )
    warnings.tell(result.warnings)
    _finish(run, result, training_text(result, folder=values["output_dir"]), values["output"])


for _name, _what in FINETUNING.items():
    _example = f"mlm-eval {_name} --ckpt bert_345m --data {_name.upper()} --output-dir out --tp 2"
    _register(_name, f"{_what}\n\nExample: {_example}", finetuning(_name), _finetune)
for _name, _what in PRETRAINING.items():
    _register(_name, _what, pretraining(_name), _pretrain)


# ---- ensembles ---------------------------------------------------------------------------------


@app.command(rich_help_panel=TRAINING)
def ensemble(
    predictions: Annotated[
        list[Path], typer.Option(help="File or folder of saved predictions (repeatable).")
    ],
    output: Output = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write the ensemble's own predictions here.")
    ] = None,
) -> None:
    """Average the probabilities of several fine-tuned models, as the paper's ensemble rows do.

    Example: mlm-eval ensemble --predictions seed-1/predictions --predictions seed-2/predictions
    """
    from mlm_eval.reporting.text import training_text
    from mlm_eval.tasks.finetune.predictions import ensemble as join

    result = join(predictions, output=output_dir)
    print(training_text(result, folder=output_dir))
    if output is not None:
        result.write(output)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of `--seeds 1,2,3`.

    Raises:
        InputError: One of them is no number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--seeds {text!r}: give numbers divided by commas, such as 1,2,3"
        ) from None


def _model_run(values: dict[str, Any], checkpoint: Any = None) -> ModelRun:
    """Return the run of a command that trains: weights in float32, the stored vocabulary."""
    values = {**values, "ckpt": values["ckpt"] or "", "overrides": values["set_"]}
    options = build(RunOptions, {**values, "dtype": "float32"})
    return ModelRun(options, checkpoint=checkpoint)


def _fields(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of those options that are fields of a dataclass."""
    return {f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}


def _finish(run: ModelRun, result: Result, text: str, output: Path | None) -> None:
    run.tell(text)
    if output is not None and run.is_main:
        result.write(output)
    shutdown()


# ---- what people see meanwhile -----------------------------------------------------------------


class _Warnings:
    """Prints each warning of a run once: some are known at its start, its record has them all."""

    def __init__(self, run: ModelRun) -> None:
        self.run = run
        self.told: set[str] = set()

    def tell(self, warnings: Sequence[str]) -> None:
        """Print those that have not been printed."""
        fresh = [text for text in dict.fromkeys(warnings) if text not in self.told]
        self.told.update(fresh)
        self.run.warn(fresh)


class TrainingBars:
    """What a training run shows: lines, and on a terminal a bar of steps and one of an evaluation.

    Attributes:
        on_step: Draws the bar of steps, with the loss and the time left; None off a terminal.
        on_evaluation: Draws the bar of a set that is evaluated; None off a terminal.
    """

    def __init__(self, run: ModelRun) -> None:
        self.run = run
        drawn = run.is_main and sys.stderr.isatty()
        self.on_step = self._step if drawn else None
        self.on_evaluation = self._evaluation if drawn else None
        self.steps: tqdm[Any] | None = None
        self.rows: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        """Print a line for people who watch, above the bars."""
        if self.on_step is None:
            self.run.say(text)
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            self.run.say(text)

    def close(self) -> None:
        """Leave the bars as they are."""
        for bar in (self.rows, self.steps):
            if bar is not None:
                bar.close()
        self.rows = self.steps = None

    def _step(self, progress: TrainingProgress) -> None:
        from tqdm import tqdm

        if self.steps is not None and progress.step <= self.steps.n:  # the next seed's run
            self.close()
        if self.steps is None:
            self.steps = tqdm(
                total=progress.total_steps,
                desc="training",
                dynamic_ncols=True,
                file=sys.stderr,
                # tqdm's own speed would count the evaluations as steps.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )
        self.steps.set_postfix_str(
            f"{tqdm.format_interval(progress.seconds_left)} left, loss {progress.loss:.4f}, "
            f"accuracy {100 * progress.accuracy:.1f} %, "
            f"{progress.samples_per_second:.1f} samples/s",
            refresh=False,
        )
        self.steps.update(progress.step - self.steps.n)

    def _evaluation(self, name: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.rows is None:
            self.rows = tqdm(
                total=total,
                desc=f"evaluating {name}",
                unit="row",
                dynamic_ncols=True,
                leave=False,
                file=sys.stderr,
            )
        self.rows.update(done - self.rows.n)
        if done >= total:
            self.rows.close()
            self.rows = None


@contextmanager
def training_bars(run: ModelRun) -> Iterator[TrainingBars]:
    """Give the bars of a run, and close them."""
    bars = TrainingBars(run)
    try:
        yield bars
    finally:
        bars.close()
