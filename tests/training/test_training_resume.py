"""Runs that are stopped or killed and go on: to the bit on the same layout, to 1e-5 on another."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_models
from support.ranks import run_ranks
from support.runs import training_runs, training_target
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.training import state as training_state
from mlm_eval.training.settings import TrainReport
from mlm_eval.training.step import Stepper, StepResult

STEPS, STOP = 5, 3
"""Broken runs save a state of 3 steps, and raise in place of the fourth."""

DROPPED = {"hidden_dropout": 0.2, "attention_dropout": 0.1}

Part = list[tuple[TrainReport | None, dict[str, Tensor]]]


def part(
    layout: tuple[int, int], kind: str, folder: Path, changes: dict[str, Any], **ways: Any
) -> Part:
    """Run a part of a training run on the ranks of a layout."""
    tp, dp = layout
    changes = {"max_steps": STEPS, "save_minutes": 1e6, **changes}
    return run_ranks(tp * dp, on_a_rank, tp, dp, kind, folder, changes, ways)


class Stop(Exception):
    """Ends a run in the middle."""


def on_a_rank(
    tp: int, dp: int, kind: str, folder: Path, changes: dict[str, Any], ways: dict[str, Any]
) -> tuple[TrainReport | None, dict[str, Tensor]]:
    """Train; with `stop` raise in place of that step, on every rank: none must wait for others."""
    stop, take = ways.pop("stop", None), Stepper.take

    def taken(self: Stepper, step: int, numbers: list[int], **options: Any) -> StepResult:
        if step == stop:
            raise Stop
        saves = stop is not None and step == stop - 1
        return take(self, step, numbers, **{**options, "save_due": saves})

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stepper, "take", taken)
        try:
            return training_runs.run(tp, dp, kind, folder, changes, **ways)
        except Stop:
            return None, {}


def assert_same_run(actual: Path, expected: Path, rel: float = 0.0) -> None:
    """Compare every number of every step; accuracy, too, follows the order of the samples."""
    found, wanted = training_runs.metrics(actual), training_runs.metrics(expected)
    if rel == 0.0:
        assert found == wanted
        return
    for line, other in zip(found, wanted, strict=True):
        assert line == pytest.approx(other, rel=rel, abs=1e-9)


LAYOUTS = {
    "one process": ((1, 1), {}),
    "dp 3": ((1, 3), {}),
    "fsdp2": ((1, 2), {"dp_mode": "fsdp2"}),
    "tp 2 x dp 2": ((2, 2), {}),
    "bfloat16": ((1, 1), {"dtype": "bfloat16"}),
    "float16": ((1, 1), {"dtype": "float16"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_on_the_same_layout_a_resumed_run_is_the_unbroken_one_to_the_bit(name, tmp_path):
    """With dropout on; global batches of 7 of 26 samples, so that no layout divides anything."""
    layout, changes = LAYOUTS[name]
    changes = {"global_batch": 7, **DROPPED, **changes}
    whole = part(layout, "lm", tmp_path / "whole", changes)
    part(layout, "lm", tmp_path / "broken", changes, stop=STOP)
    assert len(training_runs.metrics(tmp_path / "broken")) == STOP
    resumed = part(layout, "lm", tmp_path / "broken", changes)

    assert_same_run(tmp_path / "broken", tmp_path / "whole")
    for (report, weights), (other, expected) in zip(resumed, whole, strict=True):
        assert report is not None and other is not None
        assert report.losses == other.losses and report.steps == STEPS
        assert all(torch.equal(weights[n], expected[n]) for n in expected)


UNEVEN = dataclasses.replace(random_models.GPT, vocab_size=51)
MOVES: list[tuple[str, ModelConfig | None, tuple[int, int], str, tuple[int, int], str]] = [
    ("lm", None, (1, 1), "ddp", (2, 1), "ddp"),
    ("lm", UNEVEN, (2, 1), "ddp", (1, 1), "ddp"),
    ("lm", UNEVEN, (1, 2), "fsdp2", (2, 1), "ddp"),
    ("lm", training_runs.llama(vocab_size=51), (2, 1), "ddp", (1, 2), "fsdp2"),
    ("multichoice_head", None, (2, 2), "fsdp2", (1, 2), "ddp"),
    ("mlm", random_models.BERT, (2, 2), "ddp", (1, 2), "fsdp2"),
]


@pytest.mark.parametrize(("kind", "base", "first", "mode", "then", "other_mode"), MOVES)
def test_a_run_goes_on_at_another_layout(kind, base, first, mode, then, other_mode, tmp_path):
    """A vocabulary of 51 rows is cut into 26 and 25: a wrong cut shows in the losses."""
    part((1, 1), kind, tmp_path / "whole", {}, base=base)
    part(first, kind, tmp_path / "moved", {"dp_mode": mode}, base=base, stop=STOP)
    changes = {"dp_mode": other_mode, "micro_batch": 3, "recompute": True}
    part(then, kind, tmp_path / "moved", changes, base=base)
    assert_same_run(tmp_path / "moved", tmp_path / "whole", rel=1e-5)


def moments(folder: Path, base: ModelConfig) -> dict[str, Tensor]:
    state = training_state.StateFolder(folder / "state").latest()
    assert state is not None
    return {
        f"{kind} {name}": lazy.read().clone()
        for kind in ("weights", *training_state.MOMENTS)
        for name, lazy in training_state.read_state(state, base, kind).items()
    }


@pytest.mark.parametrize(
    ("layout", "mode"), [((2, 1), "ddp"), ((1, 2), "fsdp2"), ((2, 2), "fsdp2"), ((4, 1), "ddp")]
)
def test_a_state_holds_the_whole_model_whatever_the_layout(layout, mode, tmp_path):
    """Weights and both moments; 5 rows over 4 ranks leave the last of them none."""
    base = dataclasses.replace(training_runs.llama(num_query_groups=4), vocab_size=5)
    part((1, 1), "lm", tmp_path / "one", {}, base=base, stop=3)
    part(layout, "lm", tmp_path / "cut", {"dp_mode": mode}, base=base, stop=3)
    expected, actual = moments(tmp_path / "one", base), moments(tmp_path / "cut", base)
    assert set(actual) == set(expected) and len(expected) % 3 == 0
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5 * scale, msg=name)


# --- Kills --------------------------------------------------------------------------------------

SCORES = {1: 0.5, 2: 0.7, 3: 0.6}
"""What the evaluations after these steps say."""

KILLED = {"max_steps": 3, "evaluate_every": 1, "save_minutes": 1e6, **DROPPED}
KILLED |= {"save_every": 1, "keep": 2}


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A whole run, and its folder as it was before each change of a name on the disk.

    That is what a process leaves that is killed there.
    """
    folder = tmp_path_factory.mktemp("run") / "out"
    kept = tmp_path_factory.mktemp("snapshots")
    copies: list[Path] = []
    inside = False

    def noting(function: Any) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            nonlocal inside
            ours = "dir_fd" in options or any(str(folder) in str(arg) for arg in args)
            if ours and not inside and folder.exists():
                inside = True  # the copy changes names too
                copies.append(kept / str(len(copies)))
                shutil.copytree(folder, copies[-1])
                inside = False
            return function(*args, **options)

        return called

    with pytest.MonkeyPatch.context() as patched:
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            patched.setattr(os, name, noting(getattr(os, name)))
        training_runs.run(1, 1, "mlm", folder, KILLED, scores=list(SCORES.values()))
    return folder, copies


def goes_on(folder: Path, whole: Path) -> None:
    """Resume a run and compare all that is left at its end."""
    state = training_state.StateFolder(folder / "state")
    latest = state.latest()
    done = 3 if state.finished() else int(latest.name[5:]) if latest else 0
    left = [score for step, score in SCORES.items() if step > done]
    series = folder / "checkpoint-series"
    tracker = series / "latest_checkpointed_iteration.txt"
    if tracker.exists():
        assert open_checkpoint(series).provenance.iteration == int(tracker.read_text())
    report, last = training_runs.run(1, 1, "mlm", folder, KILLED, scores=left)

    assert_same_run(folder, whole)
    assert report is not None and report.best is not None and report.best["step"] == 2
    for name, step in (("checkpoint", 3), ("checkpoint-best", 2)):
        actual, expected = open_checkpoint(folder / name), open_checkpoint(whole / name)
        assert actual.provenance.iteration == step
        for tensor in expected.tensors:
            assert torch.equal(actual.tensors[tensor].read(), expected.tensors[tensor].read())
            if name == "checkpoint":
                assert torch.equal(actual.tensors[tensor].read(), last[tensor])
    for name in ("iter_0000002", "iter_0000003"):
        kept = [weights(f / "checkpoint-series" / name) for f in (folder, whole)]
        assert kept[0] == kept[1]
    for part_of in (".", "state", "checkpoint-series"):
        names = [{path.name for path in (f / part_of).iterdir()} for f in (folder, whole)]
        assert names[0] == names[1]


@pytest.mark.long
def test_a_killed_run_goes_on_wherever_it_was_killed(snapshots, tmp_path):
    whole, copies = snapshots
    assert len(copies) > 50
    for number in range(0, len(copies), len(copies) // 10):
        goes_on(Path(shutil.copytree(copies[number], tmp_path / str(number))), whole)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_every_single_change(snapshots, tmp_path):
    whole, copies = snapshots
    for number, copy in enumerate(copies):
        goes_on(Path(shutil.copytree(copy, tmp_path / str(number))), whole)
        shutil.rmtree(tmp_path / str(number))


def test_what_a_run_killed_at_its_end_has_left_goes(tmp_path):
    """It is over as soon as that is noted, with how it began and its last state still there."""
    folder = tmp_path / "out"
    training_runs.run(1, 1, "mlm", folder, KILLED, scores=list(SCORES.values()))
    state = training_state.StateFolder(folder / "state")
    left = {path.name for path in state.folder.iterdir()}
    shutil.copy(state.folder / training_state.FINISHED, state.folder / training_state.STARTED)
    (state.folder / "step-00000003").mkdir()
    state.tidy()
    assert {path.name for path in state.folder.iterdir()} == left


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path):
    """SIGKILL of one of two ranks; the end is that of a run that nobody touched."""
    whole = run_ranks(2, training_target.whole, tmp_path / "whole", 2, 1)[0]
    target = [sys.executable, "-P", training_target.__file__, "--ranks", "2", str(tmp_path)]
    target += ["2", "1"]
    with subprocess.Popen(target, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        wait_for(lambda: (tmp_path / "run" / "state" / "step-00000003").exists(), process)
        pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
        killed = time.monotonic()
        os.kill(pids[1], signal.SIGKILL)
        message = process.stderr.read()
    assert time.monotonic() - killed < 30
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in message and "other ranks were stopped" in message
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not (tmp_path / "run" / "checkpoint").exists()

    done = subprocess.run(target, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert whole == weights(tmp_path / "run" / "checkpoint")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def weights(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor of a checkpoint."""
    tensors = open_checkpoint(folder).tensors
    return {name: tensor.read().numpy().tobytes() for name, tensor in tensors.items()}


def test_a_disk_without_room_is_found_before_a_state_is_written(tmp_path, monkeypatch):
    folder = training_state.StateFolder(tmp_path / "state")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(training_state.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match="takes 0.00 GB, its disk has 0.00 GB free; make room"):
        folder.save(1, lambda _: {}, {}, needs=2000)
    assert not list((tmp_path / "state").iterdir())
