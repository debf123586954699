"""Fine-tuning: data to features, features to a trained model, evaluations, predictions, a record.

    O/result.json      the record                  O/checkpoint       the fine-tuned model
    O/predictions/     a file for each set         O/checkpoint-best  of the best evaluation
    O/run.json         the figures of the run      O/metrics.jsonl, O/training.png, O/tensorboard/

With several seeds each run has a folder O/seed-N with all of that but the record, and O/checkpoint
is that of the seed whose dev score is the median.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mlm_eval.checkpoints.dtypes import dtype_name, evaluation_dtype, training_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import output_folder
from mlm_eval.checkpoints.files.text_file import parse_json, read_text
from mlm_eval.checkpoints.folders.checkpoint_files import remove_checkpoint
from mlm_eval.checkpoints.parameters import num_parameters
from mlm_eval.checkpoints.tokenizer import Tokenizer, check_fits
from mlm_eval.checkpoints.tokenizers.copying import copy_tokenizer
from mlm_eval.engine.resume import as_json, run_difference
from mlm_eval.model.initial import with_head
from mlm_eval.ranks.collectives import on_main
from mlm_eval.ranks.mesh import is_main
from mlm_eval.reporting.results import Result, checkpoint_record, versions, write_json
from mlm_eval.tasks.data.text import sha256
from mlm_eval.tasks.finetune.data import Prepared, prepare_sets
from mlm_eval.tasks.finetune.features import Outputs, RowInputs, special_ids
from mlm_eval.tasks.finetune.figures import (
    RunRecord,
    figure_lines,
    median_run,
    medians,
    report_record,
    without_lists,
)
from mlm_eval.tasks.finetune.predictions import SUFFIX, prediction_files, write_predictions
from mlm_eval.tasks.finetune.settings import FinetuneOptions
from mlm_eval.tasks.finetune.task import Answered, ExampleSet, Judgement, Task, make_task
from mlm_eval.training.loop import BEST_CHECKPOINT, CHECKPOINT, STATE, discard_training, train
from mlm_eval.training.settings import Listener

if TYPE_CHECKING:
    from mlm_eval.checkpoints.checkpoint import Checkpoint
    from mlm_eval.engine.engine import Engine
    from mlm_eval.training.settings import TrainingProgress

RESULT, RUN, PREDICTIONS = "result.json", "run.json", "predictions"

LoadEngine = Callable[["Checkpoint", str], "Engine"]
"""Returns an engine for a checkpoint and a dtype, in the command's layout and on its device."""


def finetune(
    task: str,
    checkpoint: Checkpoint,
    options: FinetuneOptions,
    *,
    tokenizer: Tokenizer,
    load: LoadEngine,
    listener: Listener | None = None,
) -> Result:
    """Return the result of fine-tuning and evaluating a model, on every rank the same; all call it.

    Data are read, and features made, on rank 0 alone.

    Args:
        task: `race`, `mnli`, `qqp` or `squad`.
        checkpoint: A BERT model; with `eval_only` a fine-tuned one.
        options: See `FinetuneOptions`.
        tokenizer: The model's own.
        load: Called with a checkpoint and a dtype (`float32` for training), once for each seed: for
            example `lambda c, d: Engine.load(c, tp=2, dp=1, dtype=d, device="cpu")`.
        listener: Called with what happens, on rank 0.

    Raises:
        InputError: The data, the options or the model cannot be used.
    """
    heard = listener if listener and is_main() else Listener()
    output = Path(options.output_dir).expanduser()
    run = _Finetuning(make_task(task), checkpoint, options, tokenizer, load, heard, output)
    run.prepare()
    return run.evaluate_only() if options.eval_only else run.train_all()


@dataclass
class _Finetuning:
    """One call of `finetune`."""

    task: Task
    checkpoint: Checkpoint
    options: FinetuneOptions
    tokenizer: Tokenizer
    load: LoadEngine
    listener: Listener
    output: Path
    sets: dict[str, ExampleSet] = field(default_factory=dict)
    """With their texts; on rank 0 only."""

    def prepare(self) -> None:
        """Read the data and make the features, on rank 0; share them with all."""
        config = self.checkpoint.config
        if config.family != "bert":
            raise InputError(
                f"{self.checkpoint.provenance.path} is a {config.family.upper()} checkpoint; "
                "fine-tuning needs a BERT model, which reads both ways"
            )
        if self.options.eval_only:
            on_main(self._check_output)
            self._check_head()
        special_ids(self.tokenizer)
        misfit = check_fits(self.tokenizer, config.vocab_size)
        self.prepared = on_main(self._prepare)
        self.recipe = self.prepared.recipe
        self.warnings = [*([misfit] if misfit else []), *self.prepared.warnings]
        for warning in (*self.prepared.data["warnings"], *self.warnings):
            self.listener.warn(warning)

    def _prepare(self) -> Prepared:
        found = self._check_output()
        prepared, self.sets = prepare_sets(
            self.task,
            self.options,
            tokenizer=self.tokenizer,
            positions=self.checkpoint.config.max_position_embeddings,
            log=self.listener.log,
        )
        options = self.options
        if found and (options.restart or (options.overwrite and (self.output / RESULT).exists())):
            self._discard()
        self.output.mkdir(parents=True, exist_ok=True)
        return prepared

    def _check_output(self) -> bool:
        """Refuse a folder that holds another run, or something else; return whether it has one."""
        options, several = self.options, len(self.options.seeds) > 1
        result = self.output / RESULT
        single = [name for name in (STATE, BEST_CHECKPOINT) if os.path.lexists(self.output / name)]
        of_seeds = sorted(path.name for path in self.output.glob("seed-*"))
        trained = single + of_seeds
        others = [
            name for name in (CHECKPOINT, RUN, PREDICTIONS) if os.path.lexists(self.output / name)
        ]
        if options.eval_only and trained:
            raise InputError(
                f"{self.output} holds a training run ({trained[0]}); choose another --output-dir "
                "for the evaluation"
            )
        if result.exists() and not options.overwrite and not self._adds_seeds(result):
            raise InputError(
                f"{self.output} holds a finished run ({RESULT}); replace it with --overwrite, or "
                "choose another --output-dir"
            )
        if others and not (trained or result.exists() or options.overwrite):
            raise InputError(
                f"{self.output} holds {others[0]}, which this run would replace, and no run to "
                "resume; move it away, or choose another --output-dir"
            )
        anew = options.restart or (options.overwrite and result.exists())
        if (single and several or of_seeds and not several) and not anew:
            raise InputError(
                f"{self.output} holds a run with {'one seed' if several else 'several seeds'}; go "
                f"on with the same --seeds, or choose another --output-dir"
            )
        return bool(trained or others or result.exists())

    def _adds_seeds(self, result: Path) -> bool:
        """Return whether a finished run is to get further seeds: its own figures stay in it."""
        if self.options.eval_only or self.options.restart:
            return False
        record = parse_json(read_text(result), str(result))
        settings = record.get("settings") if isinstance(record, dict) else None
        seeds = settings.get("seeds") if isinstance(settings, dict) else None
        return isinstance(seeds, list) and len(seeds) > 1 and set(seeds) < set(self.options.seeds)

    def _discard(self) -> None:
        """Remove the run that is in the folder, and nothing else."""
        folders = [path for path in self.output.glob("seed-*") if path.is_dir()]
        for folder in (*folders, self.output):
            discard_training(folder)
            for name in (RUN, RESULT):
                (folder / name).unlink(missing_ok=True)
            for path in prediction_files(folder / PREDICTIONS):
                path.unlink()
            if (folder / CHECKPOINT).is_dir():  # of several seeds: that of one of them
                remove_checkpoint(folder / CHECKPOINT)
            for path in (folder / PREDICTIONS, folder):
                with suppress(OSError):
                    path.rmdir()

    # ---- training --------------------------------------------------------------------------------

    def train_all(self) -> Result:
        """Train and evaluate with every seed; return the record."""
        seeds = self.options.seeds
        runs = [self._train(seed, self._folder(seed)) for seed in seeds]
        median = median_run(runs)
        result = self._training_result(runs, median)

        def finish() -> None:
            if len(seeds) > 1:
                _link_tree(self._folder(median["seed"]) / CHECKPOINT, self.output / CHECKPOINT)
            result.write(self.output / RESULT)

        on_main(finish)
        return result

    def _folder(self, seed: int) -> Path:
        return self.output if len(self.options.seeds) == 1 else self.output / f"seed-{seed}"

    def _train(self, seed: int, folder: Path) -> dict[str, Any]:
        """Return the figures of one seed's run; those of an earlier call where it had ended."""
        ended = on_main(lambda: self._ended(folder, seed))
        if ended is not None:
            self.listener.log(f"seed {seed}: done before, {folder}")
            return ended
        if len(self.options.seeds) > 1:
            self.listener.log(f"seed {seed}: training, {folder}")
        head = self._with_head(seed)
        gc.collect()  # the last seed's model and optimizer, where they are parts of cycles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        engine = self.load(head, "float32")
        device = engine.device.type
        dtype = training_dtype(self.options.dtype, device)
        eval_dtype = evaluation_dtype(self.options.eval_dtype, dtype, device)
        autocast = None if eval_dtype == torch.float32 else eval_dtype
        features = self.prepared.train
        assert features is not None
        outputs: dict[str, Outputs] = {}
        seconds = 0.0

        def evaluate(progress: TrainingProgress) -> dict[str, Any]:
            nonlocal outputs, seconds
            outputs, seconds = self._outputs(engine, ("dev",), autocast)
            place = f"seed {seed}, {progress.place}"
            return on_main(lambda: self._judged(outputs, place, seconds))

        report = train(
            engine,
            features,
            self.task.objective(),
            self.options.train_settings(self.recipe, seed=seed, dtype=dtype),
            output_dir=folder,
            evaluate=evaluate,
            replace=self.options.overwrite,
            listener=self.listener,
            title=f"seed {seed}",
            decided_by={
                "tokenizer": self.tokenizer.sha256,
                "text": self.prepared.data["sha256"],
                "recipe": dataclasses.asdict(self.recipe),
            },
            tokenizer=self.tokenizer,
        )
        if not outputs:  # the training had ended in an earlier call
            outputs, seconds = self._outputs(engine, ("dev",), autocast)
        outputs |= self._outputs(engine, ("test",), autocast)[0]
        described = {**engine.describe(), "dtype": dtype, "eval_dtype": dtype_name(eval_dtype)}
        run_record = {
            "seed": seed,
            "identity": self._identity(seed),
            "decided_by": self._decided_by(seed),
            "engine": described,
            "checkpoint_warnings": list(head.provenance.warnings),
            "load_seconds": engine.load_seconds,
            "eval_seconds": seconds,
            **report_record(report),
        }
        return on_main(lambda: self._finish_run(folder, outputs, run_record))

    def _finish_run(
        self, folder: Path, outputs: Mapping[str, Outputs], run_record: dict[str, Any]
    ) -> dict[str, Any]:
        """Write what a run leaves beside the trainer's files; return its record. Rank 0."""
        judgement = self._write_predictions(folder, outputs, seed=run_record["seed"])
        for name in (CHECKPOINT, BEST_CHECKPOINT):
            if (folder / name).is_dir():
                copy_tokenizer(self.tokenizer, folder / name / "tokenizer")
        whole = {**run_record, "metrics": judgement.metrics}
        write_json(folder / RUN, whole)
        return whole

    def _ended(self, folder: Path, seed: int) -> dict[str, Any] | None:
        path = folder / RUN
        if not path.is_file():
            return None
        ended = parse_json(read_text(path), str(path))
        if not isinstance(ended, dict) or not {"identity", "metrics"} <= set(ended):
            raise InputError(f"{path} is damaged; discard the run with --restart")
        if ended["identity"] == self._identity(seed):
            return ended
        if self.options.overwrite:
            path.unlink()
            return None
        before, now = ended.get("decided_by"), self._decided_by(seed)
        differs = run_difference(before, now) if isinstance(before, dict) else "of an older version"
        raise InputError(
            f"{folder} holds another run: {differs}; repeat its command to resume it, discard it "
            "with --restart, or choose another --output-dir"
        )

    def _identity(self, seed: int) -> str:
        """Return a digest of what decides a run's figures."""
        settings = self.options.train_settings(self.recipe, seed=seed, dtype="float32").deciding()
        parts = (
            settings,
            self.options.dtype,
            dataclasses.asdict(self.recipe),
            [(k, v["sha256"], v["examples"]) for k, v in self.prepared.data["sets"].items()],
            self.tokenizer.sha256,
            self.checkpoint.provenance.digest,
        )
        return sha256(repr(part) for part in parts)

    def _decided_by(self, seed: int) -> dict[str, Any]:
        """Return what decides a run's figures, as JSON values: see `_identity`."""
        settings = self.options.train_settings(self.recipe, seed=seed, dtype=self.options.dtype)
        parts = {
            "settings": settings.deciding() | dataclasses.asdict(self.recipe),
            "data": self.prepared.data["sha256"],
            "tokenizer": self.tokenizer.sha256,
            "digest": self.checkpoint.provenance.digest,
        }
        return as_json(parts)  # type: ignore[no-any-return]

    def _with_head(self, seed: int) -> Checkpoint:
        task = self.task
        return with_head(self.checkpoint, task.head, num_classes=len(task.classes), seed=seed)

    # ---- evaluation ------------------------------------------------------------------------------

    def _check_head(self) -> None:
        """Refuse a checkpoint that was not fine-tuned for the task."""
        config, task = self.checkpoint.config, self.task
        found = config.num_classes if task.classes else getattr(config, task.head)
        if found != (len(task.classes) or True):
            raise InputError(
                f"{self.checkpoint.provenance.path} has no {task.head} for {task.name}; "
                f"--eval-only takes a checkpoint that `mlm-eval {task.name}` has written"
            )

    def evaluate_only(self) -> Result:
        """Evaluate a fine-tuned checkpoint; return the record."""
        engine = self.load(self._with_head(self.options.seeds[0]), self.options.dtype)
        outputs, seconds = self._outputs(engine, ("dev", "test"), None)
        return on_main(lambda: self._evaluated(engine, outputs, seconds))

    def _evaluated(self, engine: Engine, outputs: Mapping[str, Outputs], seconds: float) -> Result:
        judgement = self._write_predictions(self.output, outputs, seed=None)
        rows = sum(
            len(RowInputs(features))
            for of_role in self.prepared.evaluated.values()
            for features in of_role.values()
        )
        timing = {
            "load_seconds": engine.load_seconds,
            "eval_seconds": seconds,
            "rows_per_second": rows / max(seconds, 1e-9),
        }
        result = self._result(judgement.metrics, engine.describe(), timing=timing)
        result.write(self.output / RESULT)
        return result

    def _outputs(
        self, engine: Engine, roles: Sequence[str], autocast: torch.dtype | None
    ) -> tuple[dict[str, Outputs], float]:
        """Return the model's outputs for the sets of some roles, and the seconds that took.

        The outputs are the same on every rank.
        """
        started = time.perf_counter()
        found = {
            name: Outputs.of(
                engine,
                features,
                head=self.task.head,
                autocast=autocast,
                on_progress=partial(self.listener.on_evaluation, name),
            )
            for role in roles
            for name, features in self.prepared.evaluated[role].items()
        }
        return found, time.perf_counter() - started

    def _judged(self, outputs: Mapping[str, Outputs], place: str, seconds: float) -> dict[str, Any]:
        """Return what the trainer keeps of an evaluation; rank 0."""
        metrics = self._judge(outputs)[1].metrics
        for line in figure_lines(metrics, place):
            self.listener.log(f"{line}, elapsed time (sec): {seconds:.1f}")
        return {**self.task.summary(metrics), "metrics": without_lists(metrics)}

    def _judge(self, outputs: Mapping[str, Outputs]) -> tuple[list[Answered], Judgement]:
        answered = []
        for name, found in outputs.items():
            part = self.sets[name]
            features = self.prepared.evaluated[part.role][name]
            records = self.task.records(part, features, found, self.recipe)
            answered.append(Answered(name, part.role, part.labelled, part.version, records))
        return answered, self.task.judge(answered, null_threshold=self.recipe.null_threshold)

    def _write_predictions(
        self, folder: Path, outputs: Mapping[str, Outputs], *, seed: int | None
    ) -> Judgement:
        answered, judgement = self._judge(outputs)
        for part in answered:
            write_predictions(
                folder / PREDICTIONS / (part.name + SUFFIX),
                part,
                judgement.predictions[part.name],
                task=self.task,
                seed=seed,
                classes=list(self.task.classes),
                recipe=self.prepared.recipe_name,
                train_limit=self.options.train_limit,
                dev_limit=self.options.dev_limit,
                test_limit=self.options.test_limit,
                null_threshold=judgement.null_threshold(part.role),
                threshold_is_fixed=self.recipe.null_threshold is not None,
                data=self.prepared.data["sets"][part.name],
                checkpoint=checkpoint_record(self.checkpoint),
            )
        return judgement

    # ---- the record ------------------------------------------------------------------------------

    def _training_result(self, runs: Sequence[RunRecord], chosen: RunRecord) -> Result:
        """Return the record of a fine-tuning with one or more seeds."""
        of_seeds = {
            str(run["seed"]): {**without_lists(run["metrics"]), "best": run["best"]} for run in runs
        }
        totals = {
            name: sum(run[name] for run in runs)
            for name in ("load_seconds", "train_seconds", "eval_seconds")
        }
        samples = sum(run["samples"] for run in runs)
        warnings = [
            *self.warnings,
            *dict.fromkeys(text for run in runs for text in run["checkpoint_warnings"]),
        ]
        return self._result(
            {**chosen["metrics"], "median": medians(runs, chosen), "seeds": of_seeds},
            {
                **chosen["engine"],
                "folders": {str(run["seed"]): str(self._folder(run["seed"])) for run in runs},
                "evaluations": {str(run["seed"]): run["evaluations"] for run in runs},
                "warnings": warnings,
            },
            timing={**totals, "samples_per_second": samples / max(totals["train_seconds"], 1e-9)},
            steps=chosen["steps"],
            epochs=chosen["epochs"],
        )

    def _result(
        self,
        metrics: Mapping[str, Any],
        settings: Mapping[str, Any],
        *,
        timing: dict[str, float],
        **counts: int,
    ) -> Result:
        """Return a record of figures, with what all records of the task hold."""
        options, recipe = self.options, dataclasses.asdict(self.recipe)
        recipe.pop("task")
        own = ("micro_batch", "recompute", "dp_mode", "max_steps", "evaluate_every", "save_every")
        limits = ("train_limit", "dev_limit", "test_limit")
        of_options = {
            "tokenizer": self.tokenizer.record(),
            "recipe": self.prepared.recipe_name,
            **recipe,
            **{name: getattr(options, name) for name in (*own, *limits)},
            "version": self.prepared.version,
            "seeds": [] if options.eval_only else list(options.seeds),
            "eval_only": options.eval_only,
            "data": self.prepared.data,
        }
        return Result(
            task=self.task.name,
            protocol="megatron-paper",
            metrics=dict(metrics),
            counts={
                **self.prepared.counts,
                **counts,
                # With the task's head, without those of pretraining.
                "model_parameters": num_parameters(self._with_head(options.seeds[0]).config),
            },
            settings={"warnings": self.warnings, **settings, **of_options},
            checkpoint=checkpoint_record(self.checkpoint),
            timing=timing,
            versions=versions(),
        )


def _link_tree(source: Path, target: Path) -> None:
    """Make `target` a copy of `source`; its files are the same ones where the disk allows that."""

    def link(origin: str, place: str) -> str:
        try:
            os.link(origin, place)
        except OSError:
            shutil.copyfile(origin, place)
        return place

    with output_folder(target, overwrite=True) as partial:
        shutil.copytree(source, partial, copy_function=link, dirs_exist_ok=True)
