"""Whose the files of a fine-tuning's folder are; what a command that is repeated does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_bert
from support.paths import SAMPLES

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer
from mlm_eval.reporting.results import Result
from mlm_eval.tasks.finetune.run import finetune
from mlm_eval.tasks.finetune.settings import FinetuneOptions
from mlm_eval.training.settings import Listener, TrainingProgress


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("bert") / "bert"
    tiny_bert.checkpoint(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    tiny_bert.write_vocabulary(folder / "tokenizer")
    return load_tokenizer(directory=folder / "tokenizer")


def options(output: Path, *, lr: float = 1e-3, **given: Any) -> FinetuneOptions:
    recipe = {"epochs": 1, "global_batch": 8, "lr": lr}
    few: dict[str, Any] = {"train_limit": 16, "dev_limit": 2, "test_limit": 2}
    few |= {"data": str(SAMPLES / "race"), "save_minutes": 0.0}
    return FinetuneOptions(output_dir=output, overrides=recipe, **{**few, **given})


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder; TensorBoard's grow at each start, and hold no result."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "tensorboard" and path.name != "lock"
    }


class Stopping(Listener):
    """Stands for a kill, after some steps over all seeds."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step(self, progress: TrainingProgress) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


class Runs:
    """Fine-tunes in a folder."""

    def __init__(self, bert: Checkpoint, words: Tokenizer, output: Path) -> None:
        self.bert, self.words, self.output = bert, words, output

    def __call__(self, *, listener: Listener | None = None, **given: Any) -> Result:
        chosen = options(self.output, **given)
        more: dict[str, Any] = {"tokenizer": self.words, "load": tiny_bert.load}
        return finetune("race", self.bert, chosen, listener=listener, **more)

    def stopped(self, steps: int, **given: Any) -> None:
        with pytest.raises(KeyboardInterrupt):
            self(listener=Stopping(steps), **given)


@pytest.fixture
def runs(bert, words, tmp_path) -> Runs:
    return Runs(bert, words, tmp_path / "out")


@pytest.mark.long
def test_an_interrupted_run_is_resumed_and_another_one_named(runs):
    expected = Runs(runs.bert, runs.words, runs.output.with_name("whole"))()
    runs.stopped(1)
    before = contents(runs.output)
    with pytest.raises(InputError, match=r"holds another run: lr 0.001, now 0.002; .* --restart"):
        runs(lr=2e-3)
    with pytest.raises(InputError, match="holds a run with one seed; .* the same --seeds"):
        runs(seeds=(1, 2))
    assert contents(runs.output) == before
    assert runs().metrics == expected.metrics


@pytest.mark.long
@pytest.mark.parametrize("how", ["restart", "overwrite"])
def test_an_interrupted_run_is_discarded_when_that_is_said(runs, how):
    runs.stopped(3, seeds=(1, 2))
    (runs.output / "notes.txt").write_text("mine")
    (runs.output / "seed-1" / "notes.txt").write_text("mine")
    result = runs(seeds=(1, 2), lr=2e-3, **{how: True})
    assert result.settings["lr"] == 2e-3 and result.settings["seeds"] == [1, 2]
    for run in ("seed-1", "seed-2"):
        lines = (runs.output / run / "metrics.jsonl").read_text().splitlines()
        rates = [line["lr"] for line in map(json.loads, lines) if "lr" in line]
        assert len(rates) == 2 and max(rates) == pytest.approx(2e-3, rel=0.5)
    assert (runs.output / "notes.txt").read_text() == "mine"
    assert (runs.output / "seed-1" / "notes.txt").read_text() == "mine"


@pytest.mark.long
def test_a_finished_run_gives_way_only_to_overwrite(runs):
    runs()
    before = contents(runs.output)
    for given in ({}, {"restart": True}, {"resume": True}, {"lr": 2e-3}, {"eval_only": True}):
        with pytest.raises(InputError, match=r"holds a (finished|training) run"):
            runs(**given)
    with pytest.raises(InputError, match="no example|does not exist"):  # nothing is lost by a slip
        runs(overwrite=True, data=str(runs.output / "nowhere"))
    assert contents(runs.output) == before
    # A run that replaces it and is interrupted is resumed by the same command, not begun again.
    runs.stopped(1, overwrite=True, lr=2e-3)
    assert not (runs.output / "result.json").exists()
    steps: list[int] = []
    heard = Listener()
    heard.on_step = lambda progress: steps.append(progress.step)  # type: ignore[method-assign]
    assert runs(overwrite=True, lr=2e-3, listener=heard).settings["lr"] == 2e-3
    assert steps == [2]


OTHERS = ("predictions/dev-middle.jsonl", "run.json", "checkpoint/thesis.txt", "metrics.jsonl")


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("how", [{}, {"restart": True}])
def test_files_of_others_are_not_replaced(runs, name, how):
    (runs.output / name).parent.mkdir(parents=True)
    (runs.output / name).write_text("years of work")
    with pytest.raises(InputError, match="would replace, and no run to resume; move it away"):
        runs(**how)
    assert {name: content for name, content in contents(runs.output).items()} == {
        name: b"years of work"
    }
