"""Damaged checkpoints of every format: a sentence, a warning or the model as it was saved.

`MLM_EVAL_FUZZ_SEEDS=1000:2000` runs that range of cases in place of the long form's first 2,400,
so that a long run is many short ones.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from support.command_line import as_user
from support.reliability import damage
from support.reliability.forked import forked
from support.reliability.short_form import thinned

LONG = os.environ.get("MLM_EVAL_FUZZ_SEEDS", "160:2400")
FIRST, LAST = map(int, LONG.split(":"))
STEP = 160

VALUES = ("bit", "bit of the beginning", "bit of the end", "bit of a small file", "zeros", "noise")
WITHOUT_CHECKSUMS = ("stream", "safetensors", "zarr", "NeMo 2, zarr")
"""Formats in which nothing tells one value of a weight from another."""

TELLING = ("torch", "NeMo 1, ranks", "stream")
"""Formats whose files repeat what they share, so that files of two runs do not fit."""


WITHOUT_NAMES = (
    *("torch_dist", "torch_dcp", "fsdp_dtensor", "zarr"),
    *("Megatron-Bridge", "NeMo 2", "NeMo 1", "NeMo 1, ranks", "verl"),
)
"""Formats whose files do not say which rank or tensor they belong to."""


def may_be_silent(format: str, kind: str) -> bool:
    """Return whether nothing in any file tells that a model is another one."""
    if format in WITHOUT_CHECKSUMS and kind in VALUES:
        return True
    if kind == "copied":
        return format == "zarr"  # of another array: one of a layer like it
    if kind == "swapped":
        return format in WITHOUT_NAMES
    return kind == "mixed" and format not in TELLING


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, damage.Sound]:
    """The sound checkpoints made so far, by format."""
    return {}


def check(first: int, last: int, sounds: dict[str, damage.Sound], folder: Path) -> Counter[str]:
    """Run a range of cases; return how many ended in what."""
    count: Counter[str] = Counter()
    wrong = []
    for format, number in damage.cases(first, last):
        if format not in sounds:
            sounds[format] = damage.sound(format, folder / format)
        root = folder / "case"
        kind, did = damage.damaged(sounds[format], number, root)
        what, said = damage.outcome(sounds[format], root)
        count[what] += 1
        if what == "fault" or (what == "silent" and not may_be_silent(format, kind)):
            wrong.append(f"{format} {number}, {kind}: {did}: {what} {said}")
    assert not wrong, "\n".join(wrong)
    return count


@pytest.mark.parametrize(
    "first",
    [
        0,
        *(pytest.param(n, marks=pytest.mark.reliability) for n in range(FIRST, LAST, STEP)),
    ],
)
def test_damage_is_said_or_does_none(first, sounds, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("damaged")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    last = STEP if first == 0 else min(first + STEP, LAST)
    count = check(first, last, sounds, folder)
    assert count["sentence"] > last - first >> 2 and count["right"], count


def scores(
    sound: damage.Sound, root: Path, folder: Path, *, process: bool
) -> tuple[int, str, list[object]]:
    """Score a line by the command; return its exit code, what it said, and the scores."""
    lines, output = folder / "in.jsonl", folder / "out.jsonl"
    lines.write_text('{"tokens": [1, 5, 3, 9, 2, 30]}\n')
    output.unlink(missing_ok=True)
    line = ["score", "--ckpt", root / sound.door, "--input", lines, "--output", output]
    line += ["--device", "cpu"]
    ended = as_user(*line) if process else forked(folder / "log", *line)
    found = json.loads(output.read_text())["logprobs"] if ended.code == 0 else []
    return ended.code, ended.err, found


COMMANDS = range(1000, 1000 + 17 * 56, 17)


@pytest.mark.process
@pytest.mark.parametrize("case", thinned(COMMANDS, every=28))
def test_commands_say_it_too(case, sounds, tmp_path_factory, monkeypatch, request):
    """As processes that a shell starts; of the short form, as forks."""
    folder = tmp_path_factory.mktemp("commands")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    ((format, number),) = damage.cases(case, case + 1)
    if format not in sounds:
        sounds[format] = damage.sound(format, folder / format)
    sound, root = sounds[format], folder / "case"
    process = request.node.get_closest_marker("reliability") is not None
    _, before, expected = scores(sound, sound.root, folder, process=False)
    kind, did = damage.damaged(sound, number, root)
    code, said, found = scores(sound, root, folder, process=process)
    assert code in (0, 2) and "Traceback" not in said, (format, kind, did, said)
    if code == 0 and said.count("warning: ") == before.count("warning: "):
        assert found == expected or may_be_silent(format, kind), (format, kind, did)
