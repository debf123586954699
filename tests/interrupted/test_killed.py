"""Commands that a signal ends at any step: nothing half-written or left, the same result next.

A command kills itself at its n-th step that opens, makes, renames or removes a file of its output
or of the checkpoint, so that every case falls where it fell before.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import TEXT, as_user, started
from support.reliability.forked import children, forked, gone, kill_at, wait_for
from support.reliability.short_form import thinned

from mlm_eval.checkpoints.open import open_checkpoint

pytest_plugins = ["support.command_line_fixtures"]

TRAINING = """--max-steps 6 --save-every 2 --micro-batch 2 --global-batch 2 --lr 0.001
--save-minutes 0 --hidden-dropout 0""".split()

COMMANDS: dict[str, list[str]] = {
    "hf": "convert --ckpt GPT --to hf --output OUT".split(),
    "megatron": "convert --ckpt GPT --to megatron --tp 1 --output OUT".split(),
    "torch_dist": "convert --ckpt GPT --to torch_dist --output OUT".split(),
    "score": "score --ckpt GPT --input LINES --output OUT --batch-tokens 30".split(),
    "wikitext103": "wikitext103 --ckpt GPT --data WIKI --output OUT".split(),
    "lm": ["lm", "--ckpt", "GPT", "--data", "TEXT", "--output-dir", "OUT", *TRAINING],
}
STEPS = {"hf": 13, "megatron": 22, "torch_dist": 22, "score": 13, "wikitext103": 13, "lm": 120}
"""So many steps each command has at least."""

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


@dataclass(frozen=True)
class Kill:
    """A command, a signal, and the step at which it comes, as a share of all."""

    command: str
    number: signal.Signals
    share: float

    def __str__(self) -> str:
        return f"{self.command}-{self.number.name}-{self.share:g}"


CASES = [
    Kill(command, number, share)
    for at, number in enumerate(SIGNALS)
    for command in COMMANDS
    for share in (0.0, 0.2 + at / 50, 0.45 + at / 50, 0.7 + at / 50, 0.9)
]


@pytest.fixture(scope="session")
def line(folder: Path) -> Callable[[str, Path], list[str]]:
    """Return the line of a command with an output."""
    (folder / "many.jsonl").write_text('{"tokens": [1, 2, 3]}\n' * 50)
    (folder / "text.txt").write_text(TEXT * 20)
    places = {"GPT": "gpt", "LINES": "many.jsonl", "WIKI": "wiki.tokens", "TEXT": "text.txt"}

    def make(command: str, output: Path) -> list[str]:
        known = {name: str(folder / place) for name, place in places.items()}
        return [(known | {"OUT": str(output)}).get(word, word) for word in COMMANDS[command]]

    return make


@pytest.fixture(scope="session")
def whole(line, tmp_path_factory) -> Callable[[str], Any]:
    """Return what a command leaves where nothing disturbs it."""
    made: dict[str, Any] = {}

    def of(command: str) -> Any:
        if command not in made:
            place = tmp_path_factory.mktemp(command)
            ended = forked(place / "log", *line(command, place / "out"))
            assert ended.code == 0, ended
            made[command] = what_is_in(place, command)
        return made[command]

    return of


def what_is_in(place: Path, command: str) -> Any:
    """Return the names of what a command has left, and its result."""
    names = sorted(p.relative_to(place).as_posix() for p in place.rglob("*"))
    names = [name for name in names if not name.startswith("log") and "/tensorboard/" not in name]
    out = place / "out"
    if command in ("score", "wikitext103"):
        lines = out.read_text().splitlines() if command == "score" else []
        figures = [json.loads(text)["logprobs"] for text in lines]
        return names, figures or json.loads(out.read_text())["metrics"]
    if command == "lm":
        out = out / "checkpoint"
    return names, {
        name: hashlib.sha256(tensor.read().contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in open_checkpoint(out).tensors.items()
    }


def same(found: Any, expected: Any) -> bool:
    """Return whether two results are the same, but for the order of sums in a batch."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if type(expected) is float:
        return bool(found == pytest.approx(expected, rel=1e-4))
    return bool(found == expected)


@pytest.mark.parametrize("kill", thinned(CASES, every=13))
def test_a_kill_at_any_step_costs_nothing(kill: Kill, line, whole, tmp_path):
    command, out = line(kill.command, tmp_path / "out"), tmp_path / "out"
    step = int(kill.share * STEPS[kill.command])
    at = kill_at(step, kill.number, steps=(str(out), ".out.", "model_optim_rng.pt"))
    ended = forked(tmp_path / "log", *command, around=at)
    assert ended.code == SIGNALS[kill.number], ended
    assert "Traceback" not in ended.err and "fault of mlm-eval" not in ended.err
    if kill.number != signal.SIGKILL:
        said = "interrupted" if kill.number == signal.SIGINT else f"stopped by {kill.number.name}"
        assert ended.err.splitlines()[-1].startswith(f"mlm-eval: {said}")
        hidden = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
        assert not hidden, hidden
    if out.exists() and kill.command != "lm":
        assert what_is_in(tmp_path, kill.command)[1] == whole(kill.command)[1]  # all of it
        command.append("--overwrite")
    ended = forked(tmp_path / "log", *command)
    assert ended.code == 0, ended
    names, result = what_is_in(tmp_path, kill.command)
    assert names == whole(kill.command)[0]
    assert same(result, whole(kill.command)[1])


# ---- with ranks ----------------------------------------------------------------------------------


RANK_CASES = [
    (whom, number, when)
    for number in SIGNALS
    for whom in ("parent", "rank")
    for when in ("loading", "scoring")
    # Of a rank that is a bare interpreter yet, Python itself tells how Ctrl-C ended it.
    if (whom, number, when) != ("rank", signal.SIGINT, "loading")
]


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("whom", "number", "when"), RANK_CASES, ids=[f"{w}-{n.name}-{t}" for w, n, t in RANK_CASES]
)
def test_a_kill_of_ranks_leaves_none(folder, tmp_path, whom, number, when):
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"tokens": [1 + n % 50 for n in range(30)]}) + "\n" * 1)
    with lines.open("a") as stream:
        stream.write('{"tokens": [1, 2, 3, 4, 5]}\n' * 20_000)
    out = tmp_path / "out.jsonl"
    line = ["score", "--ckpt", folder / "gpt", "--input", lines, "--output", out]
    line += ["--batch-tokens", 40, "--tp", 2]
    process = started(*line)
    try:
        assert wait_for(lambda: len(children(process.pid)) >= 2 or process.poll() is not None)
        ranks = children(process.pid)
        if when == "scoring":
            assert wait_for(lambda: Path(f"{out}.partial").is_dir() or process.poll() is not None)
        target = process.pid if whom == "parent" else ranks[-1]
        os.kill(target, number)
        _, err = process.communicate(timeout=90)
        code = process.returncode
        assert wait_for(lambda: all(map(gone, ranks)), seconds=30), "orphans"
    finally:
        process.kill()
    assert not out.exists() and not list(tmp_path.glob(".*"))
    if number == signal.SIGKILL and whom == "parent":
        assert code == -9
        return
    assert "Traceback" not in err and "fault of mlm-eval" not in err, err
    if whom == "parent":
        assert code == SIGNALS[number], (code, err)
    else:
        assert code in (1, 130, 143) and "mlm-eval: " in err, (code, err)
    done = as_user(*line, "--limit", 4, "--batch-tokens", 400)
    assert done.code in (0, 2), done  # kept scores are those of all lines
