"""Commands that train: race, mnli, qqp, squad, mlm, lm; and ensemble, for their predictions."""

from __future__ import annotations

import dataclasses
import glob
import sys
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.command import command
from mlm_eval.cli.run import ModelRun, chosen_tokenizer, print_beside
from mlm_eval.cli.screen import Screen
from mlm_eval.options import FOLDER, RUN, RunOptions, again, nested, option
from mlm_eval.ranks.launch import shutdown
from mlm_eval.tasks.finetune.settings import FinetuneOptions, Recipe, load_recipe
from mlm_eval.tasks.language.settings import MaskedTextSettings, TextSettings
from mlm_eval.training.settings import Listener, RunSettings, TrainSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tqdm import tqdm

    from mlm_eval.checkpoints.checkpoint import Checkpoint
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.cli.run import Load
    from mlm_eval.ranks.layout import Need
    from mlm_eval.reporting.results import Result
    from mlm_eval.training.settings import TrainingProgress

EXAMPLES = {
    "mlm": "mlm-eval mlm --init bert.toml --data text.txt --tokenizer words --output-dir out",
    "lm": "mlm-eval lm --ckpt gpt2_345m --data text.txt --output-dir out --tp 2",
}

ORDER = (
    "ckpt", "init", "data", "output_dir", "recipe", "epochs", "lr", "global_batch", "seq_length",
    "seed", "seeds", "resume", "restart", "overwrite", "eval_only", "tp", "dp", "device",
    "tokenizer", "dtype",
    "eval_dtype", "max_steps", "evaluate_every", "save_minutes", "save_every", "keep",
    "micro_batch", "recompute", "dp_mode", "batch_tokens", "vocab_file", "merge_file", "overrides",
)  # fmt: skip
"""The order of the options within each group of the help; others follow."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun(RunOptions):
    """Where a run that trains computes: weights in float32, the stored vocabulary."""

    dtype: str = "float32"
    vocab: str = "padded"
    limit: None = None
    overwrite: bool = False
    seed: int = 0
    compile_model: bool = False
    full_digest: bool = False
    batch_tokens: int | None = again(RunOptions, "batch_tokens", group=RUN)
    vocab_file: Path | None = again(RunOptions, "vocab_file", group=RUN)
    merge_file: Path | None = again(RunOptions, "merge_file", group=RUN)
    overrides: tuple[str, ...] = again(RunOptions, "overrides", group=RUN)
    output: Path | None = again(RunOptions, "output", group=RUN)


# ---- fine-tuning -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand:
    """The options of `race`, `mnli`, `qqp` and `squad`."""

    options: FinetuneOptions = nested(FinetuneOptions)
    run: TrainingRun = nested(TrainingRun)


def _finetune(task: str, given: FinetuneCommand) -> None:
    run = ModelRun(given.run)

    def train(tokenizer: Tokenizer, load: Load, bars: TrainingBars) -> Result:
        from mlm_eval.tasks.finetune.run import finetune

        return finetune(
            task, run.checkpoint, given.options, tokenizer=tokenizer, load=load, listener=bars
        )

    def need() -> Need:
        from mlm_eval.tasks.workloads import finetuning_need

        tokens = run.gpu_batch_tokens
        return finetuning_need(task, run.checkpoint.config, given.options, batch_tokens=tokens)

    trains = not given.options.eval_only
    _train(
        run,
        train,
        folder=given.options.output_dir,
        need=need,
        settings=given.options,
        trains=trains,
    )


def _train(
    run: ModelRun,
    train: Callable[[Tokenizer, Load, TrainingBars], Result],
    *,
    folder: Path,
    need: Callable[[], Need],
    settings: RunSettings,
    trains: bool = True,
) -> None:
    """Train on every rank, with bars; print the figures, and write the record."""
    from mlm_eval.reporting.text import training_text
    from mlm_eval.training.trackers import check_trackers

    run.refuse_t5("training")
    check_trackers(settings.log)
    Screen.keeps = folder
    place = run.start(need, trains=trains)
    tokenizer = run.tokenizer()
    load = run.join(place)
    advising = run.advising_on_training_memory(place, settings)
    with closing(TrainingBars(run)) as bars, advising:
        bars.warn(*run.checkpoint.provenance.warnings)
        result = train(tokenizer, load, bars)
    bars.warn(*result.warnings)
    run.print_result(training_text(result, folder=folder))
    if run.options.output is not None and run.is_main:
        result.write(run.options.output)
    shutdown()


# ---- language models ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TextRun(TrainingRun):
    """The same, from a checkpoint or from a new model."""

    ckpt: str | None = again(  # type: ignore[assignment]  # None with --init
        RunOptions, "ckpt", help="Checkpoint to start from.", default=None
    )


@dataclass(frozen=True, kw_only=True)
class PretrainCommand:
    """The options of `lm`."""

    init: str | None = option(
        "Or a new model: the name of a size, or a TOML file.", None, reads=True, names="sizes"
    )
    text: TextSettings = nested(TextSettings)
    output_dir: Path = again(FinetuneOptions, "output_dir")
    resume: bool = again(FinetuneOptions, "resume")
    restart: bool = again(FinetuneOptions, "restart")
    overwrite: bool = again(FinetuneOptions, "overwrite")
    settings: TrainSettings = nested(TrainSettings)
    run: TextRun = nested(TextRun)


@dataclass(frozen=True, kw_only=True)
class MaskedCommand(PretrainCommand):
    """The options of `mlm`."""

    text: TextSettings = nested(MaskedTextSettings)


def _pretrain(given: PretrainCommand) -> None:
    if (given.run.ckpt is None) == (given.init is None):
        raise InputError("give either --ckpt, to start from a checkpoint, or --init, for a new one")
    run = ModelRun(given.run, checkpoint=None if given.init is None else _new_model(given))

    def train(tokenizer: Tokenizer, load: Load, bars: TrainingBars) -> Result:
        from mlm_eval.tasks.language.pretraining import pretrain

        return pretrain(
            load(run.checkpoint, "float32"),
            tokenizer,
            given.text,
            given.settings,
            output_dir=given.output_dir,
            restart=given.restart,
            overwrite=given.overwrite,
            listener=bars,
        )

    def need() -> Need:
        from mlm_eval.tasks.workloads import pretraining_need

        tokens = run.gpu_batch_tokens
        config, settings = run.checkpoint.config, given.settings
        return pretraining_need(config, given.text, settings, batch_tokens=tokens)

    _train(run, train, folder=given.output_dir, need=need, settings=given.settings)


def _new_model(given: PretrainCommand) -> Checkpoint:
    """Return the model that `--init` names."""
    from mlm_eval.checkpoints.config import parse_overrides
    from mlm_eval.tasks.language.pretraining import start_from

    tokenizer = chosen_tokenizer("", given.run)
    if tokenizer is None:
        raise InputError("--init needs the vocabulary of the new model; give --tokenizer")
    assert given.init is not None
    return start_from(
        given.text,
        init=given.init,
        tokenizer=tokenizer,
        seed=given.settings.seed,
        overrides=parse_overrides(given.run.overrides),
    )


def _defaults(task: str) -> dict[str, str]:
    """Return what the help of a task says for the defaults that its recipe has."""
    versions = ("squad-v1", "squad-v2") if task == "squad" else (task,)
    names = [f"{version}-megatron-336m" for version in versions]
    recipes = [load_recipe(name, task=task) for name in names]
    said = {"recipe": ", or ".join(names) + " for SQuAD 2.0" * (task == "squad")}
    for field in dataclasses.fields(Recipe):
        values = dict.fromkeys(getattr(recipe, field.name) for recipe in recipes)
        if None not in values:
            words = ("no", "yes")
            texts = [words[v] if isinstance(v, bool) else str(v) for v in values]
            said[field.name] = f"{' or '.join(texts)}, the recipe's"
    return said


for _task in ("race", "mnli", "qqp", "squad"):
    _example = f"mlm-eval {_task} --ckpt bert_345m --data {_task.upper()} --output-dir out --tp 2"
    command(
        _task,
        FinetuneCommand,
        help=f"Example: {_example}",
        order=ORDER,
        shown=_defaults(_task),
    )(partial(_finetune, _task))
for _kind, _options in (("mlm", MaskedCommand), ("lm", PretrainCommand)):
    command(_kind, _options, help=f"Example: {EXAMPLES[_kind]}", order=ORDER)(_pretrain)


# ---- ensembles ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EnsembleOptions:
    """The options of `ensemble`."""

    predictions: tuple[Path, ...] = option(
        "File or folder of saved predictions, or a pattern such as 'seed-*/predictions' "
        "(repeatable)."
    )
    more: tuple[Path, ...] = option("More of them.", (), positional=True)
    output: Path | None = again(RunOptions, "output")
    output_dir: Path | None = option(
        "Write the ensemble's own predictions here.", None, writes=FOLDER
    )
    overwrite: bool = again(RunOptions, "overwrite")


def matching(paths: Iterable[Path]) -> list[Path]:
    """Return paths, a pattern replaced by what it matches.

    Raises:
        InputError: A pattern matches nothing.
    """
    found: list[Path] = []
    for path in paths:
        if path.exists() or not glob.has_magic(str(path)):
            found.append(path)
            continue
        matches = sorted(glob.glob(str(path.expanduser())))
        if not matches:
            raise InputError(f"nothing matches {path}; correct the pattern")
        found += map(Path, matches)
    return found


@command("ensemble", EnsembleOptions, config=False)
def ensemble(options: EnsembleOptions) -> None:
    """They must have answered the same examples.

    Example: mlm-eval ensemble --predictions 'out/seed-*/predictions'
    """
    from mlm_eval.reporting.text import training_text
    from mlm_eval.tasks.finetune.predictions import ensemble_result

    paths = matching((*options.predictions, *options.more))
    result = ensemble_result(paths, output=options.output_dir, overwrite=options.overwrite)
    print_beside(training_text(result, folder=options.output_dir), options.output)
    if options.output is not None:
        result.write(options.output)


# ---- what people see meanwhile -----------------------------------------------------------------


class TrainingBars(Listener):
    """Prints a run's lines and warnings; on a terminal, bars of its steps and of an evaluation."""

    def __init__(self, run: ModelRun) -> None:
        self.run = run
        self.drawn = run.is_main and sys.stderr.isatty() and not Screen.quiet
        self.warned: set[str] = set()
        self.steps: tqdm[Any] | None = None
        self.rows: tqdm[Any] | None = None

    def log(self, text: str) -> None:
        """Print a line for people who watch, above the bars."""
        if not self.drawn:
            self.run.log(text)
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            self.run.log(text)

    def warn(self, *warnings: str) -> None:
        """Print those that have not been printed yet: a record repeats the early ones."""
        fresh = [text for text in dict.fromkeys(warnings) if text not in self.warned]
        self.warned.update(fresh)
        self.run.warn(fresh)

    def close(self) -> None:
        """Leave the bars as they are."""
        for bar in (self.rows, self.steps):
            if bar is not None:
                bar.close()
        self.rows = self.steps = None

    def on_step(self, progress: TrainingProgress) -> None:
        """Draw the bar of steps, with the loss and the time left."""
        if not self.drawn:
            return
        from tqdm import tqdm

        if self.steps is not None and progress.step <= self.steps.n:  # the next seed's run
            self.close()
        if self.steps is None:
            # tqdm's own speed would count the evaluations as steps.
            shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self.steps = _bar(progress.total_steps, "training", bar_format=shape)
        self.steps.set_postfix_str(
            f"{tqdm.format_interval(progress.seconds_left)} left, loss {progress.loss:.4f}, "
            f"accuracy {100 * progress.accuracy:.1f} %, "
            f"{progress.samples_per_second:.1f} samples/s",
            refresh=False,
        )
        self.steps.update(progress.step - self.steps.n)

    def on_evaluation(self, name: str, done: int, total: int) -> None:
        """Draw the bar of a set that is evaluated."""
        if not self.drawn:
            return
        if self.rows is None:
            self.rows = _bar(total, f"evaluating {name}", unit="row", leave=False)
        self.rows.update(done - self.rows.n)
        if done >= total:
            self.rows.close()
            self.rows = None


def _bar(total: int, title: str, **settings: Any) -> tqdm[Any]:
    from tqdm import tqdm

    return tqdm(total=total, desc=title, dynamic_ncols=True, file=sys.stderr, **settings)
