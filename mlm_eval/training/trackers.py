"""Trackers that follow a run's figures: TensorBoard, Weights & Biases, Trackio, MLflow.

Each is a thin adapter over the one stream of figures: a mapping of names to numbers, and a step.
`--log wandb:PROJECT` names one; the packages are extras, and each is imported when it is asked for.

Sources: https://docs.wandb.ai/ref/python, https://huggingface.co/docs/trackio,
https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from mlm_eval.checkpoints.errors import InputError, first_line, require
from mlm_eval.checkpoints.files.output import write_text
from mlm_eval.checkpoints.files.text_file import read_json_object

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
RUNS_FILE = "trackers.json"
"""The runs that a folder's training is in each tracker, so that a resumed one goes on there."""


class Tracker(Protocol):
    """What follows a run."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Note figures of a step."""

    def flush(self) -> None:
        """Have everything written."""

    def close(self) -> None:
        """End the run."""


class TensorBoard:
    """Files that TensorBoard shows."""

    def __init__(self, folder: Path, *, start: int | None = None) -> None:
        """Open the files.

        Args:
            folder: Where they are.
            start: Steps done: figures of later steps by an earlier run are hidden; None: there
                was none.
        """
        from torch.utils.tensorboard import SummaryWriter

        purge = None if start is None else start + 1
        self.writer: Any = SummaryWriter(str(folder), purge_step=purge)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write a scalar each."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write what is waiting."""
        self.writer.flush()

    def close(self) -> None:
        """Close the files."""
        self.writer.close()


class _ProjectRun:
    """A run of wandb or trackio, whose calls are the same."""

    def __init__(self, module: Any, project: str, name: str, config: Any, **more: Any) -> None:
        self.run = module.init(project=project, name=name, config=config, resume="allow", **more)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.run.finish()


class _MlflowRun:
    """A run of an MLflow experiment."""

    def __init__(self, experiment: str, name: str, config: Mapping[str, Any], run: str | None):
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient()
        known = self.client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else self.client.create_experiment(experiment)
        self.id = run or self.client.create_run(place, run_name=name).info.run_id
        if run is None:
            for key, value in config.items():
                self.client.log_param(self.id, key, str(value)[:500])  # MLflow's limit

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.client.log_metric(self.id, name, value, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.client.set_terminated(self.id)


def check_trackers(destinations: Sequence[str], *, has_folder: bool = True) -> None:
    """Refuse trackers that are unknown, or whose package is missing, before any work.

    Args:
        destinations: As `--log` names them.
        has_folder: Whether the run has a folder of its own, for TensorBoard without one.

    Raises:
        InputError: One of them is.
    """
    for text in destinations:
        kind, where = _parts(text)
        require(kind, f"--log {text}")
        if kind != "tensorboard" and not where:
            raise InputError(f"--log {text} names no project; write --log {kind}:NAME")
        if not where and not has_folder:
            raise InputError(
                f"--log {text} names no folder; write --log {kind}:FOLDER, or give --output FILE, "
                f"beside which the folder {kind} will stand"
            )


def _parts(text: str) -> tuple[str, str]:
    kind, _, where = text.partition(":")
    if kind not in TRACKERS:
        known = ", ".join(f"{name}:..." for name in TRACKERS)
        raise InputError(f"--log {text} is no tracker; write one of {known}")
    return kind, where


class Trackers:
    """All trackers of one run; one that fails is left, with a warning, and the run goes on."""

    def __init__(
        self,
        destinations: Sequence[str],
        *,
        name: str,
        config: Mapping[str, Any],
        folder: Path,
        warn: Callable[[str], None],
        start: int | None = None,
    ) -> None:
        """Start or continue a run in each.

        Args:
            destinations: As `--log` names them.
            name: The run's name.
            config: Settings that the trackers show beside it.
            folder: For their own files; TensorBoard's, where none is named, lie in its
                `tensorboard` folder. Without `start` each run has a folder of its name there.
            warn: Takes a sentence for each tracker that fails.
            start: Steps done by an earlier part of the run that `folder` holds; None: it holds
                none, and nothing is written down to continue from.
        """
        self.warn = warn
        self.open: dict[str, Tracker] = {}
        file = folder / RUNS_FILE
        known = _known_runs(file) if start is not None else {}
        runs = {}
        for text in dict.fromkeys(destinations):
            with self._spoken(text):
                run = known.get(text) if start else None
                self.open[text], runs[text] = _started(text, name, config, folder, run, start)
        if start is not None and runs:
            write_text(file, json.dumps(runs, indent=2) + "\n", option=None)

    def add(self, name: str, tracker: Tracker) -> None:
        """Have one more follow the run."""
        self.open[name] = tracker

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Note figures of a step everywhere."""
        for text, tracker in list(self.open.items()):
            with self._spoken(text):
                tracker.log(figures, step)

    def flush(self) -> None:
        """Have everything written."""
        for text, tracker in list(self.open.items()):
            with self._spoken(text):
                tracker.flush()

    def close(self) -> None:
        """End the run everywhere."""
        for text, tracker in list(self.open.items()):
            with self._spoken(text):
                tracker.close()
        self.open.clear()

    @contextlib.contextmanager
    def _spoken(self, text: str) -> Any:
        """Keep a tracker's chatter off stdout, and its failure from ending the run."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # of whatever service, network or disk it writes to
            self.open.pop(text, None)
            self.warn(f"--log {text} failed ({first_line(error)}); the run goes on without it")


def _started(
    text: str,
    name: str,
    config: Mapping[str, Any],
    folder: Path,
    run: str | None,
    start: int | None,
) -> tuple[Tracker, str]:
    """Return a tracker and the name of its run, for a later part of the run to go on in."""
    kind, where = _parts(text)
    if kind == "tensorboard":
        place = Path(where) if where else folder / kind
        return TensorBoard(place / name if start is None else place, start=start), ""
    if kind == "mlflow":
        mlflow = _MlflowRun(where, name, config, run)
        return mlflow, mlflow.id
    if kind == "wandb":
        import wandb

        run = run or uuid4().hex[:12]
        return _ProjectRun(wandb, where, name, dict(config), id=run, dir=str(folder)), run
    import trackio

    # Its runs are known by their names alone.
    run = run or f"{name}-{uuid4().hex[:6]}"
    return _ProjectRun(trackio, where, run, dict(config)), run


def _known_runs(file: Path) -> dict[str, str]:
    """Return the runs that an earlier part was in; a damaged file knows none."""
    try:
        runs = read_json_object(file)
    except InputError:
        return {}
    return {text: run for text, run in runs.items() if isinstance(run, str)}
