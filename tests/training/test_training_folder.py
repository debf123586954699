"""Whose the files of a training folder are: a run is resumed, and nothing of others is lost."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.runs import training_runs

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.folders.locks import lock_folder, unlock_folder
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.engine.engine import Engine
from mlm_eval.training import loop
from mlm_eval.training.loop import train
from mlm_eval.training.objectives import Classification
from mlm_eval.training.settings import Listener, TrainingProgress
from mlm_eval.training.state import WEIGHTS, read_state

CHANGES = {"max_steps": None, "epochs": 3, "global_batch": 8}


def broken(folder: Path, steps: int = 1) -> None:
    """Leave an interrupted run of classification, with states, in a folder."""

    class Ends(Listener):
        def on_step(self, progress: TrainingProgress) -> None:
            if progress.step > steps:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            Engine.load(training_runs.model_for("classification_head")),
            training_runs.samples("classification_head", 26),
            Classification(),
            training_runs.settings(**CHANGES, save_minutes=0.0),
            output_dir=folder,
            listener=Ends(),
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_another_run_changes_nothing_in_a_folder(tmp_path):
    broken(tmp_path)
    before = contents(tmp_path)
    assert "state/started.json" in before and "state/step-00000001/progress.json" in before
    with pytest.raises(InputError, match="holds another run: lr 0.002, now 0.5"):
        training_runs.run(1, 1, "classification_head", tmp_path, CHANGES | {"lr": 0.5})
    model = training_runs.model_for("classification_head")
    model = dataclasses.replace(
        model, provenance=dataclasses.replace(model.provenance, digest="of other weights")
    )
    with pytest.raises(InputError, match="another checkpoint"):
        train(
            Engine.load(model),
            training_runs.samples("classification_head", 26),
            Classification(),
            training_runs.settings(**CHANGES, save_minutes=0.0),
            output_dir=tmp_path,
        )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("how", ["restart", "replace"])
@pytest.mark.parametrize("lr", [0.002, 0.5])
def test_a_run_is_discarded_when_that_is_said(tmp_path, how, lr):
    """`restart`: whatever it is; `replace`: where it is another one. Nothing of others goes."""
    broken(tmp_path, 3)
    notes = [tmp_path / name for name in ("notes.txt", "state/notes.txt", "tensorboard/notes.txt")]
    for note in notes:
        note.write_text("mine")
    report, _ = training_runs.run(
        1, 1, "classification_head", tmp_path, CHANGES | {"lr": lr, "max_steps": 5}, **{how: True}
    )
    lines = training_runs.metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and report.steps == 5
    assert max(line["lr"] for line in lines) <= lr
    assert [note.read_text() for note in notes] == ["mine"] * 3
    assert not (tmp_path / "state" / "lock").exists()


OTHERS = {
    "metrics.jsonl": '{"accuracy": 1}\n{"accuracy": 2}\n',
    "training.png": "my photo",
    "checkpoint/thesis.txt": "years",
    "checkpoint-best/mp_rank_00/model_optim_rng.pt": "weights",
    "checkpoint-series/iter_0000002/mp_rank_00/model_optim_rng.pt": "of another run",
    "state/data.csv": "a,b",
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_others_are_not_replaced(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text(OTHERS[name])
    for how in ({}, {"restart": True}, {"replace": True}):
        with pytest.raises(InputError, match=r"(move it away|another output folder)"):
            training_runs.run(1, 1, "classification_head", tmp_path, CHANGES, **how)
        assert (tmp_path / name).read_text() == OTHERS[name]
    kept = contents(tmp_path)
    assert {path for path in kept if path != "state/lock"} == {name}


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint",
        "checkpoint-best",
        "checkpoint-series",
        "state",
        "metrics.jsonl",
        "training.png",
    ],
)
@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "to nothing"])
def test_a_link_in_the_folder_is_not_followed(tmp_path, name, there):
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "out"
    if there:
        (elsewhere / "mp_rank_00").mkdir(parents=True)
        (elsewhere / "mp_rank_00" / "model_optim_rng.pt").write_text("weights")
    output.mkdir()
    (output / name).symlink_to(elsewhere)
    before = contents(tmp_path)
    for how in ({}, {"restart": True}, {"replace": True}):
        with pytest.raises(InputError, match=f"{name} is a link to "):
            training_runs.run(1, 1, "classification_head", output, CHANGES, **how)
    assert contents(tmp_path) == before and (output / name).is_symlink()


def test_what_somebody_puts_into_a_checkpoint_stays(tmp_path):
    """It is not lost, and it ends no run."""
    changes = CHANGES | {"epochs": 2}
    training_runs.run(1, 1, "classification_head", tmp_path, changes, scores=[0.1, 0.2])
    (tmp_path / "checkpoint-best" / "notes.txt").write_text("mine")
    (tmp_path / "state" / "finished.json").unlink()
    broken_again = [0.3, 0.4]
    for name in ("checkpoint", "metrics.jsonl", "training.png"):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "checkpoint-best").rename(tmp_path / "aside")
    with pytest.MonkeyPatch.context() as patched:
        original = loop.TrainingLog

        def opened(folder: Path, **given: Any) -> Any:
            (tmp_path / "aside").rename(tmp_path / "checkpoint-best")
            return original(folder, **given)

        patched.setattr(loop, "TrainingLog", opened)
        training_runs.run(1, 1, "classification_head", tmp_path, changes, scores=broken_again)
    assert (tmp_path / "checkpoint-best.kept-1" / "notes.txt").read_text() == "mine"
    assert open_checkpoint(tmp_path / "checkpoint-best").provenance.iteration == 6


def test_two_runs_do_not_write_one_folder(tmp_path):
    lock = lock_folder(tmp_path / "state", what="here")
    with pytest.raises(InputError, match=r"is being written by another run \(process \d+ on "):
        training_runs.run(1, 1, "classification_head", tmp_path, CHANGES)
    unlock_folder(lock)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"counters": {}}', '{"identity": {}, "counters": {"step": -5}}', "[" * 99999,
     '{"identity": {"settings": {}, "model": {}}, "counters": {"more": 1}}',
     '{"identity": {"settings": {}, "model": {}}, "counters": {"step": -5}}'],
    ids=range(8),
)  # fmt: skip
@pytest.mark.parametrize(
    "name",
    [
        "started.json",
        pytest.param("finished.json", marks=pytest.mark.long),
        pytest.param("step-00000001/progress.json", marks=pytest.mark.long),
    ],
)
def test_a_damaged_state_is_named_and_discarded(tmp_path, name, content):
    path = tmp_path / "state" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    changes = CHANGES | {"max_steps": 1}
    with pytest.raises(InputError, match=f"{path.name} cannot be read .* with --restart"):
        training_runs.run(1, 1, "classification_head", tmp_path, changes)
    training_runs.run(1, 1, "classification_head", tmp_path, changes, restart=True)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n\n", b"[1]\n2\n", b'{"loss": 1}\n{}\n', b"[" * 99_999 + b"\n\n"],
    ids=["no text", "lists", "no step", "deep"],
)  # fmt: skip
def test_metrics_of_no_run_are_named(tmp_path, content):
    broken(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"metrics.jsonl, line 1, is not of a training run; dis"):
        training_runs.run(1, 1, "classification_head", tmp_path, CHANGES)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "lacks encoder.layers.2.*; it is the state of another model"),
        ({"vocab_size": 58}, "has shape .*, expected .*; it is the state of another model"),
    ],
)
def test_a_state_of_another_model_is_refused(tmp_path, change, message):
    broken(tmp_path)
    config = dataclasses.replace(training_runs.model_for("classification_head").config, **change)
    (step,) = (tmp_path / "state").glob("step-*")
    with pytest.raises(InputError, match=message):
        read_state(step, config, WEIGHTS)
