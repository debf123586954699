"""The state of a training run on disk, from which it can be resumed at any layout.

    OUTPUT/state/step-00000120/
        weights/  exp_avg/  exp_avg_sq/   written by torch.distributed.checkpoint
        progress.json                     step, settings, scores: everything that is not a tensor
    OUTPUT/state/started.json             what the run is, from its start on
    OUTPUT/state/finished.json            a run that is over; its weights are in OUTPUT/checkpoint
    OUTPUT/state/lock                     while a process writes here

A state is written into a folder of another name, which is renamed when all of it is on the disk: a
process killed at any moment leaves the last whole state, and at most a folder that the next start
removes. Tensors are saved as those of the whole model. torch.distributed.checkpoint takes tensors
of one name on several ranks for copies unless they are DTensors, and a DTensor assumes the sizes
that torch.chunk gives: a vocabulary is cut into those (`parameters.vocab_range`), and a gated fc1
is viewed as `[2, ffn, hidden]`, cut along dim 1, that of experts as `[experts, 2, ffn, hidden]`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError, first_line, shown
from mlm_eval.checkpoints.files.distcp import check_coverage, open_folder
from mlm_eval.checkpoints.files.output import write_text
from mlm_eval.checkpoints.files.text_file import misfit, read_json
from mlm_eval.checkpoints.folders.locks import LOCK_FILE
from mlm_eval.checkpoints.folders.unfinished import unfinished
from mlm_eval.checkpoints.lazy import Computed, LazyTensor
from mlm_eval.checkpoints.parameters import Parameter, parameters
from mlm_eval.ranks.collectives import local, on_main, whole_over_dp
from mlm_eval.ranks.mesh import Mesh, num_ranks, object_group, this_rank
from mlm_eval.training.replicas import Replicas
from mlm_eval.training.settings import Counters

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS = "weights"
PROGRESS = "progress.json"
STARTED = "started.json"
FINISHED = "finished.json"
UNFINISHED = "unfinished"
_STEP = re.compile(r"step-(\d{8,})")


class StateFolder:
    """The states of one run; every rank has one, and all ranks must see the same disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> Path | None:
        """Return the newest whole state, None where there is none."""
        if not self.folder.is_dir():
            return None
        steps = {
            int(match[1]): entry
            for entry in self.folder.iterdir()
            if (match := _STEP.fullmatch(entry.name))
        }
        return steps[max(steps)] if steps else None

    def finished(self) -> dict[str, Any] | None:
        """Return what a run that is over has left, None where there is no such run."""
        path = self.folder / FINISHED
        return read_progress(path) if path.is_file() else None

    def known(self) -> dict[str, Any] | None:
        """Return what the run here has left: at its end, its last state or its start.

        None: there is no run.

        Raises:
            InputError: It is damaged, or the folder holds something else.
        """
        if self.folder.is_symlink() or not self.folder.is_dir():
            if os.path.lexists(self.folder):
                raise InputError(f"{self.folder} is {_kind(self.folder)}; {_REMOVE}")
            return None
        for entry in sorted(self.folder.iterdir()):
            if entry.is_symlink():
                raise InputError(f"{entry} is {_kind(entry)}; {_REMOVE}")
        latest, started = self.latest(), self.folder / STARTED
        if (found := self.finished()) is not None:
            return found
        if latest is not None:
            return read_progress(latest / PROGRESS)
        if started.is_file():
            return read_progress(started)
        names = re.compile(rf"{LOCK_FILE}|\..+\.partial-[0-9a-f]{{12}}")  # killed at its start
        others = [entry for entry in self.folder.iterdir() if not names.fullmatch(entry.name)]
        if others:
            raise InputError(f"{others[0]} belongs to no training run of mlm-eval; {_REMOVE}")
        return None

    def has_run(self) -> bool:
        """Return whether there is a run, be it damaged."""
        if self.folder.is_symlink():
            return False
        marks = (self.folder / STARTED, self.folder / FINISHED)
        return self.latest() is not None or any(mark.is_file() for mark in marks)

    def start(self, progress: Mapping[str, Any]) -> None:
        """Note what the run is that begins here. Rank 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_json(self.folder / STARTED, dict(progress))

    def clear(self) -> None:
        """Remove all states, and what is known of the run. Rank 0."""
        self._remove(but=None)
        for name in (STARTED, FINISHED):
            (self.folder / name).unlink(missing_ok=True)

    def save(
        self,
        step: int,
        tensors: Callable[[str], Mapping[str, Tensor]],
        progress: Mapping[str, Any],
        *,
        needs: int,
        before_switch: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write a state, make it the latest, and remove those before it.

        Collectives: those of torch.distributed.checkpoint and of `tensors`, and broadcasts.

        Args:
            step: Steps done.
            tensors: Gives the tensors of one kind, `WEIGHTS` or a moment: see `collect`.
            progress: JSON values that go beside the tensors.
            needs: Bytes about to be written.
            before_switch: Called on rank 0 with the folder when the tensors are in it; a kill
                before its end leaves the state before this one the latest.
        """
        partial = self.folder / UNFINISHED
        target = self.folder / f"step-{step:08d}"
        with unfinished(partial) if this_rank() == 0 else nullcontext():
            on_main(lambda: self._prepare(partial, needs))
            self._write_tensors(partial, tensors)

            def switch() -> None:
                _write_json(partial / PROGRESS, dict(progress))
                if before_switch is not None:
                    before_switch(partial)
                _sync(partial)
                os.rename(partial, target)
                _sync(self.folder)
                self._remove(but=target.name)

            on_main(switch)
        return target

    def _write_tensors(self, partial: Path, tensors: Callable[[str], Mapping[str, Tensor]]) -> None:
        from torch.distributed import checkpoint as dcp

        alone = num_ranks() == 1
        try:
            with warnings.catch_warnings():  # one process is no reason to warn
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                for kind in (WEIGHTS, *MOMENTS):
                    dcp.save(
                        dict(tensors(kind)),
                        checkpoint_id=partial / kind,
                        no_dist=alone,
                        process_group=None if alone else object_group(),
                    )
        except dcp.CheckpointException as failure:
            _raise_interrupt(failure)
            raise InputError(
                f"the training state could not be written to {self.folder} "
                f"({first_line(_cause(failure))}); make room, and repeat the command to resume"
            ) from failure

    def _prepare(self, partial: Path, needs: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tidy()
        partial.mkdir()
        free = shutil.disk_usage(partial).free
        if free < needs:
            raise InputError(
                f"a training state in {self.folder} takes {needs / 1e9:.2f} GB, its disk has "
                f"{free / 1e9:.2f} GB free; make room, and repeat the command to resume"
            )

    def _remove(self, *, but: str | None) -> None:
        for entry in self.folder.iterdir():
            if entry.name != but and (_STEP.fullmatch(entry.name) or entry.name == UNFINISHED):
                shutil.rmtree(entry)

    def tidy(self) -> None:
        """Remove what a killed run has left beside its last state. Rank 0."""
        if not self.folder.is_dir():
            return
        finished = self.finished() is not None
        latest = None if finished else self.latest()
        self._remove(but=None if latest is None else latest.name)
        if finished:
            (self.folder / STARTED).unlink(missing_ok=True)
        for leftover in self.folder.glob(".*.partial-*"):
            leftover.unlink()

    def finish(self, progress: Mapping[str, Any]) -> None:
        """Note that the run is over, and remove its states: the weights are elsewhere. Rank 0."""
        _write_json(self.folder / FINISHED, dict(progress))
        (self.folder / STARTED).unlink(missing_ok=True)
        self._remove(but=None)


def collect(
    replicas: Replicas, optimizer: torch.optim.Optimizer, mesh: Mesh, kind: str
) -> dict[str, Tensor]:
    """Return the weights, or a moment, as tensors of the whole model under canonical names.

    No rank holds more than its own part: the tensors are views of what is there. Under FSDP2 a
    gated fc1 is cut anew, for which one at a time is gathered over the data-parallel ranks.
    """
    table = parameters(replicas.home.config)
    if kind == WEIGHTS:
        values: dict[str, Tensor] = dict(replicas.worker.named_parameters())
    else:  # before its first step (or where float16 has skipped all of them) Adam has no moments
        values = {
            item.name: optimizer.state[item.parameter][kind]
            if item.parameter in optimizer.state
            else torch.zeros_like(item.parameter)
            for item in replicas.trained
        }
    return {name: _whole(value, table[name], mesh) for name, value in values.items()}


def _whole(value: Tensor, parameter: Parameter, mesh: Mesh) -> Tensor:
    """Return this rank's part of a parameter as a part of the whole tensor.

    Args:
        value: The tensor-parallel shard; under FSDP2 a DTensor of it over the data-parallel ranks.
        parameter: What the table says of it.
        mesh: The layout.
    """
    rule, shape = parameter.rule, list(parameter.shape)
    dim, over_dp = rule.dim, hasattr(value, "placements")
    part = local(value)
    cut_over_dp = 0
    if rule.blocks > 1:
        assert dim is not None, parameter
        shape[dim : dim + 1] = [rule.blocks, shape[dim] // rule.blocks]
        # FSDP2 cuts dim 0. Where that holds both blocks its parts are no parts of the view.
        anew = over_dp and dim == 0
        part = whole_over_dp(value, mesh) if anew else part
        part = part.unflatten(dim, (rule.blocks, part.shape[dim] // rule.blocks))
        dim += 1
        if anew:
            cut_over_dp = 1
            rows = -(-part.shape[1] // mesh.dp)  # of torch.chunk; the last ranks may have none
            part = part[:, mesh.dp_rank * rows : (mesh.dp_rank + 1) * rows].clone()
    if mesh.device_mesh is None:
        return part
    from torch.distributed.tensor import DTensor, Replicate, Shard

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.contiguous(),
        mesh.tp_first,
        [
            Replicate() if dim is None or mesh.tp == 1 else Shard(dim),
            Shard(cut_over_dp) if over_dp else Replicate(),
        ],
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def read_state(folder: Path, config: ModelConfig, kind: str) -> dict[str, LazyTensor]:
    """Return the tensors of one kind (`WEIGHTS` or a moment) under canonical names, unread.

    Raises:
        InputError: The folder is damaged, or of another model.
    """
    folder = folder / kind
    files = open_folder(folder)
    table = parameters(config)
    found = {}
    for name, parameter in table.items():
        if name not in files.tensors:
            if kind in MOMENTS:  # it was not trained
                continue
            raise InputError(f"{folder} lacks {name}; it is the state of another model")
        check_coverage(files.tensors[name], folder)
        lazy = files.tensor(name)
        if parameter.rule.blocks > 1:
            dim = parameter.dim
            lazy = Computed(parameter.shape, lazy.dtype, functools.partial(_flat, lazy, dim))
        if lazy.shape != parameter.shape:
            raise InputError(
                f"{folder}: {name} has shape {list(lazy.shape)}, expected {list(parameter.shape)}; "
                "it is the state of another model"
            )
        found[name] = lazy
    damage = files.damage(files.records(files.tensors))
    if damage is not None:
        raise InputError(f"{damage}; the training state in {folder.parent} cannot be used")
    return found


def _flat(lazy: LazyTensor, dim: int) -> Tensor:
    return lazy.read().flatten(dim, dim + 1)


def fill(
    targets: Iterable[tuple[str, Tensor]],
    source: Mapping[str, LazyTensor],
    config: ModelConfig,
    mesh: Mesh,
) -> None:
    """Copy this rank's parts of whole tensors into `targets`, pairs of canonical name and shard."""
    table = parameters(config)
    for name, target in targets:
        with torch.no_grad():
            target.copy_(table[name].read_shard(source[name], mesh.tp_rank, mesh.tp))


def restore_moments(
    folder: Path,
    replicas: Replicas,
    optimizer: torch.optim.Optimizer,
    mesh: Mesh,
    *,
    updates: int,
) -> None:
    """Give the optimizer the moments of a state, `updates` steps after which it was saved."""
    if updates == 0:
        return
    config = replicas.home.config
    table = parameters(config)
    sources = {key: read_state(folder, config, key) for key in MOMENTS}
    for item in replicas.trained:
        device = item.parameter.device
        state: dict[str, Tensor] = {"step": torch.tensor(float(updates), device=device)}
        for key, source in sources.items():
            # A copy: what is read may be a view of the file.
            shard = table[item.name].read_shard(source[item.name], mesh.tp_rank, mesh.tp)
            value = shard.clone().to(device)
            state[key] = _like(value, item.parameter)
        optimizer.state[item.parameter] = state


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Cut a tensor over the data-parallel ranks as `parameter` is; nothing is sent."""
    if not hasattr(parameter, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)


def read_progress(path: Path) -> dict[str, Any]:
    """Return what a state says of its run, beside the tensors.

    Raises:
        InputError: The file is damaged.
    """
    try:
        progress: dict[str, Any] = read_json(path)
        if fault := misfit(progress, _SCHEMA) or misfit(progress["counters"], _COUNTERS):
            raise InputError(fault)
        if unknown := set(progress["counters"]) - {f.name for f in dataclasses.fields(Counters)}:
            raise InputError(f"it counts {shown(min(unknown))}, which is not known")
    except InputError as error:
        raise InputError(
            f"{path} cannot be read ({error}); the training state is damaged, discard it with "
            "--restart"
        ) from None
    return progress


_SCHEMA = {
    "counters": "object",
    "identity": "object",
    "identity.settings": "object",
    "identity.model": "object",
}
_COUNTERS = {
    **{name: "count?" for name in ("step", "updates", "samples", "epoch_samples", "good_steps")},
    **{name: "number?" for name in ("seconds", "epoch_loss", "epoch_hits", "loss_scale")},
    "epoch_predictions": "number?",
    "evaluations": "list?",
}
"""The fields of a state that are read back."""


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    write_text(path, json.dumps(value, indent=1), sync=True, option=None)


def _sync(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_REMOVE = "move it away, or choose another output folder"


def _kind(path: Path) -> str:
    return f"a link to {os.path.realpath(path)}" if path.is_symlink() else "not a folder"


def _raise_interrupt(failure: Any) -> None:
    """Let Ctrl-C and the like through, which torch wraps as a failure of the checkpoint."""
    for cause, _ in failure.failures.values():
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            raise cause from None


def _cause(failure: Any) -> BaseException:
    """Return what the first rank that failed has met."""
    causes: list[BaseException] = [cause for cause, _ in failure.failures.values()]
    return next(iter(causes), failure)
