"""Fine-tuning that a signal ends: while it loads, trains, saves, evaluates or writes its result.

A command kills itself at the n-th call of a function or the n-th file that it opens, makes,
renames or removes, so that every case falls where it fell before. The next run goes on from what
is kept: it reaches the same weights, bit by bit, and the same answers.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import as_user, started
from support.reliability.forked import children, forked, gone, kill_at, wait_for
from support.reliability.short_form import thinned
from support.runs import tuning_lines

from mlm_eval.checkpoints.open import open_checkpoint

IMPORTS = """mlm_eval.tasks.finetune.run mlm_eval.tasks.finetune.metrics torch._dynamo
torch.utils.tensorboard matplotlib.pyplot matplotlib.figure datasets evaluate pandas""".split()

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


def kill_in(place: str, call: int, number: signal.Signals) -> Callable[[], None]:
    """Return what has a command kill itself at the n-th call of a function, the first being 0."""
    module, names = place.split(":")
    *owners, name = names.split(".")

    def install() -> None:
        owner = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        function, left = getattr(owner, name), [call]

        def called(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), number)
            return function(*arguments, **more)

        setattr(owner, name, called)

    return install


STEP = "mlm_eval.training.step:Stepper._forward_and_backward"
ANSWERS = "mlm_eval.tasks.finetune.run:_Finetuning._judge"
WHEN: dict[str, Callable[[Path, str, signal.Signals], Callable[[], None]]] = {
    "a later step": lambda out, task, number: kill_in(STEP, 5, number),
    "loading weights": lambda out, task, number: kill_at(0, number, steps=("model_optim_rng.pt",)),
    "loading data": lambda out, task, number: kill_at(1, number, steps=(f"/{task}/",)),
    "the first step": lambda out, task, number: kill_in(STEP, 1, number),
    "saving": lambda out, task, number: kill_at(6, number, steps=(f"{out}/state",)),
    "saving later": lambda out, task, number: kill_at(25, number, steps=(f"{out}/state",)),
    "saving the best": lambda out, task, number: kill_at(3, number, steps=("checkpoint-best",)),
    "evaluating": lambda out, task, number: kill_in(ANSWERS, 0, number),
    "evaluating again": lambda out, task, number: kill_in(ANSWERS, 1, number),
    "writing answers": lambda out, task, number: kill_at(0, number, steps=(f"{out}/pred",)),
    "writing the result": lambda out, task, number: kill_at(0, number, steps=("result.json",)),
    "having written it": lambda out, task, number: kill_at(2, number, steps=("result.json",)),
}
CASES = [
    f"{task} {number.name} {when}"
    for at, task in enumerate(tuning_lines.OF_TASKS)
    for nth, when in enumerate(WHEN)
    for of_signal, number in enumerate(SIGNALS)
    if task == "race" or (at + nth) % 3 == of_signal
]


@pytest.fixture(scope="session")
def tuned(tmp_path_factory) -> Path:
    """The model and the data."""
    for name in IMPORTS:  # once, for all forks
        importlib.import_module(name)
    return tuning_lines.write(tmp_path_factory.mktemp("tuned"))


@pytest.fixture(autouse=True)
def own_cache(tuned, monkeypatch) -> None:
    """Keep tokens where no other test looks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tuned / "cache"))
    monkeypatch.setenv("MPLBACKEND", "agg")


@pytest.fixture(scope="session")
def undisturbed(tuned, tmp_path_factory) -> Callable[[str], Any]:
    """Return what a task leaves where nothing disturbs it."""
    made: dict[str, Any] = {}

    def of(task: str) -> Any:
        if task not in made:
            place = tmp_path_factory.mktemp(task)
            ended = forked(place / "log", *tuning_lines.line(tuned, task, place / "out"))
            assert ended.code == 0, ended
            made[task] = left_in(place)
        return made[task]

    return of


def left_in(place: Path) -> tuple[list[str], dict[str, Any]]:
    """Return the names of what a run has left, and its weights, figures and answers."""
    out = place / "out"
    names = sorted(p.relative_to(place).as_posix() for p in place.rglob("*"))
    names = [name for name in names if not name.startswith("log") and "/tensorboard/" not in name]
    metrics = json.loads((out / "result.json").read_text())["metrics"]
    answers = {p.name: p.read_bytes() for p in (out / "predictions").glob("*.tsv")}
    rows = {p.name: p.read_text().splitlines()[1:] for p in (out / "predictions").glob("*.jsonl")}
    weights = {
        f"{kept}: {name}": hashlib.sha256(
            tensor.read().contiguous().view(torch.uint8).numpy()
        ).hexdigest()
        for kept in ("checkpoint", "checkpoint-best")
        for name, tensor in open_checkpoint(out / kept).tensors.items()
    }
    return names, {"metrics": metrics, "answers": answers, "rows": rows, "weights": weights}


@pytest.mark.parametrize("case", thinned(CASES, every=80))
def test_a_kill_while_fine_tuning_costs_nothing(case: str, tuned, undisturbed, tmp_path):
    task, name, when = case.split(" ", 2)
    number, out = signal.Signals[name], tmp_path / "out"
    line = tuning_lines.line(tuned, task, out)
    ended = forked(tmp_path / "log", *line, around=WHEN[when](out, task, number))
    assert ended.code == SIGNALS[number], ended
    assert "Traceback" not in ended.err and "fault of mlm-eval" not in ended.err
    if number != signal.SIGKILL:
        said = "interrupted" if number == signal.SIGINT else f"stopped by {name}"
        assert ended.err.splitlines()[-1].startswith(f"mlm-eval: {said}"), ended
        hidden = [path for path in tmp_path.rglob(".*") if path.name != ".metadata"]
        assert not hidden, hidden
    if (out / "result.json").exists():  # then it is the whole of it
        assert when == "having written it"
        assert left_in(tmp_path)[1] == undisturbed(task)[1]
        line.append("--overwrite")
    ended = forked(tmp_path / "log", *line)
    assert ended.code == 0, ended
    names, result = left_in(tmp_path)
    assert names == undisturbed(task)[0]
    assert result == undisturbed(task)[1]


# ---- with ranks ----------------------------------------------------------------------------------

STEPS_OF_RANKS = 40
RANK_CASES = [(whom, number) for number in SIGNALS for whom in ("parent", "rank", "all")]


@pytest.fixture(scope="session")
def undisturbed_ranks(tuned, tmp_path_factory) -> Any:
    """Return what a run of two ranks leaves where nothing disturbs it."""
    place = tmp_path_factory.mktemp("ranks")
    ended = as_user(*line_of_ranks(tuned, place / "out"))
    assert ended.code == 0, ended
    return left_in(place)


def line_of_ranks(tuned: Path, out: Path) -> list[object]:
    """Return a command that trains many steps on two ranks."""
    more = ["--dp", 2, "--max-steps", STEPS_OF_RANKS, "--evaluate-every", 10, "--epochs", 99]
    return tuning_lines.line(tuned, "qqp", out, *more)


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("whom", "number"), RANK_CASES, ids=[f"{whom}-{number.name}" for whom, number in RANK_CASES]
)
def test_a_kill_of_training_ranks_costs_nothing(whom, number, tuned, undisturbed_ranks, tmp_path):
    out = tmp_path / "out"
    line = line_of_ranks(tuned, out)
    process = started(*line, alone=True)
    try:
        assert wait_for(lambda: lines_of(out / "metrics.jsonl") > 2 or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        ranks = children(process.pid)
        assert len(ranks) >= 2
        if whom == "all":
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid if whom == "parent" else ranks[-1], number)
        _, err = process.communicate(timeout=90)
        assert wait_for(lambda: all(map(gone, ranks)), seconds=30), "orphans"
    finally:
        process.kill()
    assert "Traceback" not in err and "fault of mlm-eval" not in err, err
    if whom == "rank":
        assert process.returncode in (1, 130, 143) and "mlm-eval: " in err, err
    else:
        assert process.returncode == SIGNALS[number], err
    assert not (out / "result.json").exists()
    done = as_user(*line)
    assert done.code == 0, done
    names, result = left_in(tmp_path)
    assert names == undisturbed_ranks[0]
    assert result == undisturbed_ranks[1]


def lines_of(path: Path) -> int:
    """Return how many lines a file has; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
