"""The training loop: fine-tuning and language modelling of the engine's own tensor-parallel model.

A step takes a global batch, whose samples follow from the seed alone; each data-parallel rank runs
its micro-batches, the gradients meet, are clipped by their true norm, and AdamW moves float32
weights. No number depends on the layout, on the micro-batches or on padding, beyond the rounding of
sums.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import clear_leftovers, set_aside
from mlm_eval.checkpoints.folders.checkpoint_files import foreign_files, remove_checkpoint
from mlm_eval.checkpoints.folders.locks import Lock, lock_folder, unlock_folder
from mlm_eval.checkpoints.megatron.args import check_args
from mlm_eval.checkpoints.megatron.iteration import TRACKER
from mlm_eval.checkpoints.megatron.layout import (
    check_sizes,
    choose_names,
    layout_with_same_rows,
)
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import num_parameters
from mlm_eval.checkpoints.tokenizer import Tokenizer, entries_within
from mlm_eval.checkpoints.tokenizers.copying import copy_tokenizer
from mlm_eval.checkpoints.tokenizers.tokenizer_type import added_entries, with_tokenizer_type
from mlm_eval.checkpoints.vocabulary import with_rows
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.resume import run_difference
from mlm_eval.ranks.collectives import on_main
from mlm_eval.training.data import Plan, Sample, check_data, fingerprint, set_epoch
from mlm_eval.training.log import METRICS_FILE, PLOT, TENSORBOARD, TrainingLog, read_metrics
from mlm_eval.training.objectives import Objective
from mlm_eval.training.optimization import Schedule
from mlm_eval.training.series import SERIES, CheckpointSeries
from mlm_eval.training.settings import (
    Counters,
    Listener,
    TrainingProgress,
    TrainReport,
    TrainSettings,
)
from mlm_eval.training.state import (
    WEIGHTS,
    StateFolder,
    collect,
    fill,
    read_state,
    restore_moments,
)
from mlm_eval.training.step import Stepper, StepResult
from mlm_eval.training.trackers import RUNS_FILE

CHECKPOINT, BEST_CHECKPOINT, STATE = "checkpoint", "checkpoint-best", "state"
_CHECKPOINTS = (CHECKPOINT, BEST_CHECKPOINT, SERIES)

Evaluate = Callable[[TrainingProgress], dict[str, Any]]
"""Evaluates the model after a step."""


def train(
    engine: Engine,
    data: Sequence[Sample],
    objective: Objective,
    settings: TrainSettings,
    *,
    output_dir: str | Path,
    evaluate: Evaluate | None = None,
    restart: bool = False,
    replace: bool = False,
    listener: Listener | None = None,
    title: str = "",
    decided_by: Mapping[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> TrainReport:
    """Train the engine's model and return what happened, on every rank the same; all ranks call it.

    Afterwards `engine.model` holds the last weights, and `output_dir` the logs, `checkpoint` and,
    where evaluations have a `score`, `checkpoint-best`; with `save_every` also `checkpoint-series`.

    Args:
        engine: Loaded in float32, with the head of the objective (`model.initial.with_head`).
        data: The samples, numbered from 0; `set_epoch(epoch)` is called where it exists.
        objective: The loss.
        settings: How to train.
        output_dir: Where everything goes; on several machines a folder that all of them share.
        evaluate: Called on every rank with the current weights in `engine.model`, without gradients
            and outside autocast. It returns JSON values, of which rank 0's are kept; `score`, where
            there is one, is better when higher.
        restart: Discard a run that is in `output_dir`; without, the same run is resumed from its
            last state, and another one refused.
        replace: Discard it where it is another one.
        listener: Called after each step, on rank 0.
        title: What the listener's lines begin with.
        decided_by: What else decides the result, as JSON values: a resumed run must have the same.
        args: More of Megatron's args for the files that are written.
        tokenizer: Its files are copied into the folder `tokenizer` of each checkpoint, and
            Megatron's args name its type.

    Raises:
        InputError: The folder holds another run, or another process writes it; the data or settings
            do not fit the model, the loss is not finite, or the disk is full.
    """
    settings = settings.on(engine.device.type)
    run = _Run(
        engine,
        data,
        objective,
        settings,
        output=Path(output_dir),
        evaluate=evaluate,
        listener=listener or Listener(),
        title=title,
        decided_by=decided_by or {},
        args=args or {},
        tokenizer=tokenizer,
    )
    try:
        finished = run.prepare(restart=restart, replace=replace)
        return finished or run.run()
    finally:
        run.leave()


@dataclass
class _Run:
    """One call of `train`."""

    engine: Engine
    data: Sequence[Sample]
    objective: Objective
    settings: TrainSettings
    output: Path
    evaluate: Evaluate | None
    listener: Listener
    title: str
    decided_by: Mapping[str, Any]
    args: Mapping[str, Any]
    tokenizer: Tokenizer | None

    def __post_init__(self) -> None:
        assert self.engine.dtype == torch.float32, "float32 master weights"
        self.mesh, self.config = self.engine.mesh, self.engine.config
        self.counters = Counters()
        self.lock: Lock | None = None
        self.state = StateFolder(self.output / STATE)
        self.series = _series(self.output)
        check_data(
            self.data,
            positions=self.config.max_position_embeddings,
            vocab_size=self.config.vocab_size,
            tokentypes=self.config.num_tokentypes,
        )
        self._check_result()
        settings = self.settings
        self.plan = Plan.make(len(self.data), settings)
        self.schedule = Schedule(
            settings.lr, settings.min_lr, self.plan.total_steps, settings.warmup, settings.lr_decay
        )
        self.saved_at = time.monotonic()

    def _check_result(self) -> None:
        """Fail now if the result cannot be saved."""
        if choose_names(self.config, None) == "core":
            check_args(self.config)
            check_sizes(self.config, self.mesh.tp, 1, "core")

    # ---- start -----------------------------------------------------------------------------------

    def prepare(self, *, restart: bool, replace: bool) -> TrainReport | None:
        """Load the state to resume from, wrap the model; return the report of a finished run."""
        self.identity: dict[str, Any] = {
            "digest": self.engine.checkpoint.provenance.digest,
            **self.decided_by,
            "settings": self.settings.deciding(),
            "objective": self.objective.head,
            "data": fingerprint(self.data),
            "samples": len(self.data),
            "model": self.config.to_dict(),
        }
        folder, progress = on_main(lambda: self._find(restart, replace))
        if progress is not None:
            self.counters = Counters(**progress["counters"])
            if folder is None:  # the run has finished
                written = open_checkpoint(self.output / CHECKPOINT)
                source = with_rows(written, self.config.vocab_size).tensors
                fill(self.engine.model.named_parameters(), source, self.config, self.mesh)
                return self._report()
            source = read_state(folder, self.config, WEIGHTS)
            fill(self.engine.model.named_parameters(), source, self.config, self.mesh)
        self.stepper = Stepper(
            self.engine, self.data, self.objective, self.settings, self.schedule, self.counters
        )
        if folder is not None:
            restore_moments(
                folder,
                self.stepper.replicas,
                self.stepper.optimizer,
                self.mesh,
                updates=self.counters.updates,
            )
        self.log = None
        if self.engine.is_main:
            self.log = TrainingLog(
                self.output,
                start=self.counters.step,
                warn=self.listener.warn,
                destinations=self.settings.log,
                config=self.settings.deciding(),
            )
        return None

    def leave(self) -> None:
        """Let other runs write the folder."""
        if self.lock is not None:
            unlock_folder(self.lock)
            self.lock = None

    def _find(self, restart: bool, replace: bool) -> tuple[Path | None, dict[str, Any] | None]:
        """Return the state to resume from and its progress.json; rank 0."""
        for name in (STATE, *_CHECKPOINTS, METRICS_FILE, PLOT):
            if (self.output / name).is_symlink():
                raise InputError(
                    f"{self.output / name} is a link to {os.path.realpath(self.output / name)}, "
                    "which a run would replace; remove the link, or choose another output folder"
                )
        known = None if restart else self.state.known()
        if known is not None and (differs := self._difference(known["identity"])):
            if not replace:
                raise InputError(
                    f"{self.output} holds another run: {differs}; repeat its command to resume it, "
                    "discard it with --restart, or choose another output folder"
                )
            known = None
        try:
            self.lock = lock_folder(self.state.folder, what=str(self.output))
        except OSError as error:
            raise InputError(
                f"{self.output} cannot be written ({error.strerror}); choose another output folder"
            ) from None
        if known is None and discard_training(self.output):
            self.listener.log(f"{self.output}: the run that was there is discarded")
        for name in (CHECKPOINT, BEST_CHECKPOINT):
            clear_leftovers(self.output / name)
        self.state.tidy()
        self.series.tidy()
        for name in (METRICS_FILE, PLOT):
            for leftover in self.output.glob(f".{name}.partial-{'[0-9a-f]' * 12}"):
                leftover.unlink()
        if known is None:
            self._start()
            return None, None
        finished, latest = self.state.finished(), self.state.latest()
        return (None, finished) if finished else (latest, known if latest else None)

    def _start(self) -> None:
        """Note that a run begins; rank 0.

        Raises:
            InputError: The folder holds files that it would replace.
        """
        for name in (*_CHECKPOINTS, METRICS_FILE, PLOT):
            if os.path.lexists(self.output / name):
                raise InputError(
                    f"{self.output} holds {name}, which this run would replace, and no run to "
                    "resume; move it away, or choose another output folder"
                )
        self.state.start(self._progress())

    def _difference(self, before: Mapping[str, Any]) -> str:
        """Return in words how this run differs from one of another identity; empty: it does not."""
        now = _as_json(self.identity)  # which makes lists of tuples, for example
        for part in ("settings", "model"):  # a later version may know more of them
            now[part] = {k: v for k, v in now[part].items() if k in before[part]}
        now = {name: value for name, value in now.items() if name in before}
        return run_difference({name: before[name] for name in now}, now)

    # ---- steps -----------------------------------------------------------------------------------

    def run(self) -> TrainReport:
        """Train to the end, write the checkpoint, and return the report."""
        counters, epoch_known = self.counters, -1
        if self.engine.is_main and 0 < counters.step < self.plan.total_steps:
            prefix = f"{self.title}: " if self.title else ""
            self.listener.log(f"{prefix}resumed after step {counters.step:,}")
        if self.mesh.dp > 1 and counters.step < self.plan.total_steps:
            set_epoch(self.data, self.plan.epoch_of(counters.step))
            self.stepper.rehearse()
        for step, epoch, numbers in self.plan.steps(counters.step):
            if epoch != epoch_known:
                set_epoch(self.data, epoch)
                epoch_known = epoch
            if step % self.plan.steps_per_epoch == 0:
                counters.new_epoch()
            save = self._step(step, epoch, numbers)
            if self._evaluates_after(step):
                self._evaluate(epoch)
                save = True
            if save or step + 1 == self.plan.total_steps or self._is_kept(step + 1):
                self._save()
        return self._finish()

    def _is_kept(self, steps: int) -> bool:
        """Return whether the checkpoint after so many steps is one of the series."""
        every = self.settings.save_every
        return every is not None and (steps % every == 0 or steps == self.plan.total_steps)

    def _evaluates_after(self, step: int) -> bool:
        if self.evaluate is None:
            return False
        every = self.settings.evaluate_every
        if every is None or step + 1 == self.plan.total_steps:
            return self.plan.ends_epoch(step)
        return (step + 1) % every == 0

    def _step(self, step: int, epoch: int, numbers: list[int]) -> bool:
        """Take one step; return whether it is time to save the state, on every rank the same."""
        started = time.perf_counter()
        counters = self.counters
        due = time.monotonic() - self.saved_at > 60 * self.settings.save_minutes
        done = self.stepper.take(step, numbers, updates=counters.updates, save_due=due)
        if done.broken:
            raise InputError(
                f"the loss ({done.loss}) or its gradient is not finite in step {step + 1}; lower "
                "--lr, or train in another --dtype"
            )
        counters.step = step + 1
        counters.updates += done.moved
        counters.loss_scale = self.stepper.scale.value
        counters.good_steps = self.stepper.scale.good_steps
        counters.samples += len(numbers)
        counters.epoch_samples += len(numbers)
        counters.epoch_loss += done.loss * len(numbers)
        counters.epoch_hits += done.hits
        counters.epoch_predictions += done.predictions
        counters.seconds += time.perf_counter() - started
        self._report_step(epoch, done)
        return done.save_due

    def _report_step(self, epoch: int, done: StepResult) -> None:
        """Log a step and tell the listener; rank 0."""
        counters, plan = self.counters, self.plan
        progress = self.progress = TrainingProgress(
            step=counters.step,
            total_steps=plan.total_steps,
            epoch=epoch + 1,
            epochs=plan.epochs,
            loss=counters.epoch_loss / counters.epoch_samples,
            accuracy=counters.epoch_hits / max(counters.epoch_predictions, 1.0),
            lr=done.lr,
            samples_per_second=counters.samples / max(counters.seconds, 1e-9),
            seconds_left=(plan.total_steps - counters.step) * counters.seconds / counters.step,
        )
        if self.log is None:
            return
        line = {"step": counters.step, "epoch": epoch + 1, "loss": done.loss, "lr": done.lr}
        line |= {"accuracy": progress.accuracy, "grad_norm": done.norm}
        if self.stepper.scale.active:
            line["loss_scale"] = self.stepper.scale.value
        self.log.step(line)
        self.listener.on_step(progress)

    # ---- evaluation, saving, the end -------------------------------------------------------------

    def _evaluate(self, epoch: int) -> None:
        assert self.evaluate is not None
        if self.engine.is_main:
            place = f"{self.title}, {self.progress.place}" if self.title else self.progress.place
            self.listener.log(f" > |{place}| training: {self.progress.figures}")
        self.stepper.replicas.publish()
        with torch.no_grad():
            mine = self.evaluate(self.progress)
        result = on_main(lambda: mine)
        self.stepper.replicas.release()
        when = {"step": self.counters.step, "epoch": epoch + 1}
        self.counters.evaluations.append({**when, **result})
        if self.log is not None:
            self.log.evaluation({**when, "evaluation": result})
            self.log.plot()

    def _save(self) -> None:
        """Save the state, its weights in the series, and where they are the best, there too."""
        counters = self.counters
        best = counters.best
        fresh = best is not None and best["step"] == counters.step

        def before_switch(partial: Path) -> None:
            if self.log is not None:
                self.log.sync()
            if fresh:
                self._write(partial, self.output / BEST_CHECKPOINT)
            if self._is_kept(counters.step):
                warning = self.series.add(
                    counters.step, functools.partial(self._write, partial), keep=self.settings.keep
                )
                self.listener.warn(*([warning] if warning else []))

        self.state.save(
            counters.step,
            lambda kind: collect(self.stepper.replicas, self.stepper.optimizer, self.mesh, kind),
            self._progress(),
            needs=12 * num_parameters(self.config),
            before_switch=before_switch,
        )
        self.saved_at = time.monotonic()

    def _progress(self) -> dict[str, Any]:
        return {"identity": self.identity, "counters": dataclasses.asdict(self.counters)}

    def _write(self, state: Path, target: Path) -> None:
        """Write the weights of a state in Megatron's torch format; rank 0, one tensor at a time."""
        settings, source = self.settings, self.engine.checkpoint.provenance
        config = dataclasses.replace(
            self.config,
            params_dtype="float32",
            hidden_dropout=settings.hidden_dropout,
            attention_dropout=settings.attention_dropout,
        )
        args = dict(source.args) | training_args(settings, self.plan, self.counters)
        args |= self.args
        if target.is_dir() and (foreign := foreign_files(target)):
            kept = set_aside(target)
            self.listener.warn(f"{target} held {foreign[0]}, so it is now {kept.name}")
        provenance = Provenance(
            state, "memory", names=source.names, tensor_parallel=source.tensor_parallel, args=args
        )
        checkpoint = Checkpoint(config, read_state(state, config, WEIGHTS), provenance).check()
        true_size, added = None, 0
        if self.tokenizer is not None:
            checkpoint = with_tokenizer_type(checkpoint, self.tokenizer)
            true_size = entries_within(self.tokenizer, config.vocab_size)
            added = added_entries(self.tokenizer, args)
        layout = layout_with_same_rows(checkpoint, self.mesh.tp, true_size=true_size, added=added)
        layout["iteration"] = self.counters.step
        write_megatron_torch(checkpoint, target, overwrite=True, **layout)
        if self.tokenizer is not None:
            copy_tokenizer(self.tokenizer, target / "tokenizer")

    def _finish(self) -> TrainReport:
        def finish() -> None:
            latest, target = self.state.latest(), self.output / CHECKPOINT
            assert latest is not None and self.log is not None
            tracker = target / TRACKER
            done = str(self.counters.step)
            if not tracker.is_file() or tracker.read_text() != done:
                self._write(latest, target)
            self.log.close()
            self.state.finish(self._progress())

        on_main(finish)
        self.stepper.replicas.publish()
        self.engine.model.requires_grad_(False)
        return self._report()

    def _report(self) -> TrainReport:
        counters = self.counters
        lines, seconds = on_main(lambda: (read_metrics(self.output), counters.seconds))
        best = counters.best
        return TrainReport(
            steps=counters.step,
            epochs=self.plan.epochs,
            samples=counters.samples,
            losses=[line["loss"] for line in lines if "loss" in line],
            evaluations=counters.evaluations,
            best=best,
            seconds=seconds,
            samples_per_second=counters.samples / max(seconds, 1e-9),
            checkpoint=self.output / CHECKPOINT,
            best_checkpoint=None if best is None else self.output / BEST_CHECKPOINT,
        )


def discard_training(folder: Path) -> bool:
    """Remove what `train` has written to a folder, and nothing else; return whether there was any.

    Raises:
        InputError: Something else is in the place of its states.
    """
    state = StateFolder(folder / STATE)
    if not state.has_run():  # a damaged one is discarded like a whole one
        state.known()
        return False
    _series(folder).discard()
    state.clear()
    for name in (CHECKPOINT, BEST_CHECKPOINT):
        if (folder / name).is_dir():
            remove_checkpoint(folder / name)
    for path in (folder / METRICS_FILE, folder / PLOT, folder / RUNS_FILE):
        path.unlink(missing_ok=True)
    for path in (folder / TENSORBOARD).glob("events.out.tfevents.*"):
        path.unlink()
    for path in (folder / TENSORBOARD, folder / STATE):
        with suppress(OSError):
            path.rmdir()
    return True


def _series(output: Path) -> CheckpointSeries:
    return CheckpointSeries(output / SERIES, output / STATE / "series.json")


def training_args(settings: TrainSettings, plan: Plan, counters: Counters) -> dict[str, Any]:
    """Return how the model was trained, under Megatron's names."""
    same = ("adam_beta1", "adam_beta2", "adam_eps", "lr", "min_lr", "weight_decay", "clip_grad")
    return {
        "optimizer": "adam",
        **{name: getattr(settings, name) for name in (*same, "seed")},
        # Megatron calls both of its linear schedules by one name.
        "lr_decay_style": settings.lr_decay.removesuffix("-v1"),
        "lr_warmup_fraction": settings.warmup,
        "epochs": plan.epochs,
        "micro_batch_size": settings.micro_batch,
        "global_batch_size": settings.global_batch,
        "train_iters": plan.total_steps,
        "consumed_train_samples": counters.samples,
    }


def _as_json(value: Any) -> Any:
    """Return what is left of a value after a round through JSON."""
    return json.loads(json.dumps(value))
