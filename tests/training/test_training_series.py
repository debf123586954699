"""Checkpoints that a run keeps on its way: which, whole, at any layout, and only its own go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.runs import training_runs

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.training.settings import Listener, TrainSettings
from mlm_eval.training.step import Stepper

TRACKER = "latest_checkpointed_iteration.txt"


def train(folder: Path, tp: int = 1, dp: int = 1, **changes: Any) -> Path:
    """Train for 5 steps of 6 samples; return the folder of the series."""
    changes = {"max_steps": 5, "save_minutes": 1e6, "save_every": 2, **changes}
    restart = changes.pop("restart", False)
    run_ranks(tp * dp, on_a_rank, tp, dp, folder, changes, restart)
    return folder / "checkpoint-series"


def on_a_rank(tp: int, dp: int, folder: Path, changes: dict[str, Any], restart: bool) -> None:
    training_runs.run(tp, dp, "lm", folder, changes, restart=restart)


def names(series: Path) -> list[str]:
    return sorted(path.name for path in series.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The series of a run in one process: after steps 2, 4 and 5."""
    return train(tmp_path_factory.mktemp("whole"))


def test_every_so_many_steps_and_the_last_are_kept(whole):
    assert names(whole) == ["iter_0000002", "iter_0000004", "iter_0000005", TRACKER]
    assert (whole / TRACKER).read_text() == "5"
    for step in (2, 4, 5):
        found = open_checkpoint(whole / f"iter_{step:07d}").provenance
        assert found.iteration == found.args["iteration"] == step
        assert found.args["consumed_train_samples"] == 6 * step
        assert found.args["seq_length"] == 16
    last, series = open_checkpoint(whole.parent / "checkpoint"), open_checkpoint(whole)
    for name, tensor in last.tensors.items():
        assert torch.equal(series.tensors[name].read(), tensor.read())


@pytest.mark.parametrize(("tp", "dp", "mode"), [(2, 1, "ddp"), (1, 2, "fsdp2")])
def test_the_series_is_the_same_at_every_layout(whole, tmp_path, tp, dp, mode):
    series = train(tmp_path, tp, dp, dp_mode=mode)
    assert names(series) == names(whole)
    for name in names(series)[:3]:
        actual, expected = open_checkpoint(series / name), open_checkpoint(whole / name)
        assert actual.provenance.tensor_parallel == tp
        for tensor, value in expected.tensors.items():
            if tensor.endswith("linear_qkv.bias"):  # the gradient of a key's bias is noise
                continue
            torch.testing.assert_close(
                actual.tensors[tensor].read(), value.read(), rtol=1e-4, atol=1e-5, msg=tensor
            )


def test_only_the_runs_own_older_ones_go(tmp_path, monkeypatch):
    """Also after a stop; with it goes no folder of another run, and nothing that holds more."""
    foreign = tmp_path / "checkpoint-series" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"

    class Stop(Exception):
        pass

    take = Stepper.take

    def stops(self: Stepper, step: int, *args: Any, **options: Any) -> Any:
        if step == 4:
            raise Stop
        return take(self, step, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "take", stops)
        with pytest.raises(Stop):
            on_a_rank(1, 1, tmp_path, {"max_steps": 9, "save_every": 2}, False)
    series = tmp_path / "checkpoint-series"
    assert names(series) == ["iter_0000002", "iter_0000004", TRACKER]
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    (series / "iter_0000002" / "notes.txt").write_text("mine")
    on_a_rank(1, 1, tmp_path, {"max_steps": 9, "save_every": 2, "keep": 2}, False)
    kept = ["iter_0000001", "iter_0000002", "iter_0000008", "iter_0000009"]
    assert names(series) == [*kept, TRACKER] and (series / TRACKER).read_text() == "9"
    assert foreign.read_text() == (series / "iter_0000002" / "notes.txt").read_text() == "mine"


def test_a_discarded_run_takes_its_series_along(tmp_path):
    train(tmp_path)
    foreign = tmp_path / "checkpoint-series" / "iter_0000001"
    foreign.mkdir()
    with pytest.raises(InputError, match="holds checkpoint-series, which this run would replace"):
        on_a_rank(1, 1, tmp_path, {"max_steps": 1}, True)
    assert names(tmp_path / "checkpoint-series") == ["iter_0000001"]
    foreign.rmdir()
    foreign.parent.rmdir()
    assert names(train(tmp_path, max_steps=2)) == ["iter_0000002", TRACKER]
    on_a_rank(1, 1, tmp_path, {"max_steps": 1}, True)
    assert not (tmp_path / "checkpoint-series").exists()


def test_a_folder_of_another_run_that_came_meanwhile_ends_no_run(tmp_path, monkeypatch):
    heard: list[str] = []
    monkeypatch.setattr(Listener, "warn", lambda _, *warnings: heard.extend(warnings))
    foreign = tmp_path / "checkpoint-series" / "iter_0000002"
    monkeypatch.setattr(
        training_runs.Slow, "on_step", lambda *_: foreign.mkdir(exist_ok=True, parents=True)
    )
    on_a_rank(1, 1, tmp_path, {"max_steps": 3, "save_every": 2}, False)
    assert names(tmp_path / "checkpoint-series") == ["iter_0000002", "iter_0000003", TRACKER]
    assert not list(foreign.iterdir())
    assert [text for text in heard if "step 2 is not kept" in text]
    assert json.loads((tmp_path / "state" / "series.json").read_text()) == {"iterations": [3]}


def test_keep_alone_is_refused():
    with pytest.raises(InputError, match="--keep means nothing without --save-every; give both"):
        TrainSettings(keep=2)
