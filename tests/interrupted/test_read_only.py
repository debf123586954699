"""Targets that cannot be written, or not any more; file systems that are too small for anything."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import TEXT, assert_one_sentence
from support.reliability.forked import forked
from support.reliability.mounts import may_mount, read_only, small
from support.reliability.short_form import thinned

from mlm_eval.checkpoints.folders.locks import Lock, lock_folder

pytest_plugins = ["support.command_line_fixtures"]

COMMANDS: dict[str, list[str]] = {
    "score": "score --ckpt GPT --input LINES --output OUT".split(),
    "wikitext103": "wikitext103 --ckpt GPT --data WIKI --output OUT".split(),
    "hf": "convert --ckpt GPT --to hf --output OUT".split(),
    "torch_dist": "convert --ckpt GPT --to torch_dist --output OUT".split(),
    "megatron": "convert --ckpt GPT --to megatron --output OUT".split(),
    "lm": """lm --ckpt GPT --data TEXT --output-dir OUT --max-steps 2 --micro-batch 2
    --global-batch 2 --save-minutes 0""".split(),
}


@pytest.fixture
def line(folder: Path) -> Callable[[str, Path], list[str]]:
    """Return the line of a command with an output."""
    (folder / "text.txt").write_text(TEXT * 20)
    places = {"GPT": "gpt", "LINES": "lines.jsonl", "WIKI": "wiki.tokens", "TEXT": "text.txt"}

    def make(command: str, output: Path) -> list[str]:
        known = {name: str(folder / place) for name, place in places.items()}
        return [(known | {"OUT": str(output)}).get(word, word) for word in COMMANDS[command]]

    return make


def everything(place: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.skipif(not may_mount(as_user=True), reason="this root may not mount")
@pytest.mark.parametrize("command", thinned(COMMANDS, every=3))
def test_a_read_only_place_is_said_before_the_work(command, line, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    try:
        ended = forked(tmp_path / "log", *line(command, place / "out"), around=read_only(place))
    finally:
        place.chmod(0o755)
    assert_one_sentence(ended, "place/out", "cannot be written")
    assert not list(place.iterdir())


@pytest.mark.reliability
@pytest.mark.skipif(not may_mount(as_user=True), reason="this root may not mount")
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_to_be_replaced_in_a_read_only_place_stays(command, line, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    words = line(command, place / "out")
    assert forked(tmp_path / "log", *words).code == 0
    before = everything(place)
    again = "--restart" if command == "lm" else "--overwrite"
    try:
        ended = forked(tmp_path / "log", *words, again, around=read_only(place))
    finally:
        place.chmod(0o755)
    assert_one_sentence(ended, "place/out")
    assert everything(place) == before


def becomes(number: int, place: Path, *, after: int) -> Callable[[], None]:
    """Return what has a place refuse to be written after so many steps, as a remount does."""

    def install() -> None:
        left = [after]

        def audit(event: str, arguments: tuple[object, ...]) -> None:
            if event == "open":
                flags = arguments[2]
                writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            else:
                writes = event in ("os.mkdir", "os.rename", "os.truncate")
            if writes and str(place) in str(arguments[0]):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(number, os.strerror(number), str(arguments[0]))

        sys.addaudithook(audit)

    return install


REFUSALS = [
    f"{command} {errno.errorcode[number]} {after}"
    for after in (0, 1, 3)
    for number in (errno.EROFS, errno.EACCES)
    for command in COMMANDS
]


@pytest.mark.parametrize("case", thinned(REFUSALS, every=13))
def test_a_place_that_is_not_written_any_more_is_said(case, line, tmp_path):
    command, name, after = case.split()
    place = tmp_path / "place"
    place.mkdir()
    around = becomes(getattr(errno, name), place, after=int(after))
    ended = forked(tmp_path / "log", *line(command, place / "out"), around=around)
    assert ended.code in (0, 2), ended
    assert "Traceback" not in ended.err and "fault of mlm-eval" not in ended.err
    if ended.code == 2:
        assert str(place) in ended.err
    if ended.code == 2 and command != "lm":
        assert not list(place.rglob("*")), ended


@pytest.mark.process
@pytest.mark.reliability
@pytest.mark.skipif(not may_mount(as_user=False), reason="needs a root that may mount")
@pytest.mark.parametrize("command", ["score", "wikitext103", "lm"])
def test_a_small_shared_memory_is_enough(command, line, tmp_path):
    ranks = ["--tp", "2"]
    around = small(Path("/dev/shm"), 64)
    ended = forked(tmp_path / "log", *line(command, tmp_path / "out"), *ranks, around=around)
    assert ended.code == 0, ended


@pytest.mark.parametrize("command", thinned(["hf", "score", "wikitext103", "megatron"], every=4))
def test_a_target_that_another_run_writes_is_left_to_it(command, line, tmp_path):
    out = tmp_path / "out"
    kept = tmp_path / "out.partial"
    if command in ("score", "wikitext103"):
        lock = lock_folder(kept, what="x")
    else:
        kept = tmp_path / ".out.partial-0123456789ab"
        kept.mkdir()
        (kept / "half").write_text("written")
        lock = Lock(kept)
    before = everything(kept)
    try:
        ended = forked(tmp_path / "log", *line(command, out))
    finally:
        lock.release()
    assert_one_sentence(ended, "is being written by another", "wait for its end")
    assert not out.exists() and everything(kept) == before
    ended = forked(tmp_path / "log", *line(command, out))  # whose end has come
    assert ended.code == 0 and not kept.exists(), ended
