"""Commands in surroundings that take no text, no files or no care: a sentence, or the result."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command_line import TEXT, as_user, assert_one_sentence, started
from support.reliability.forked import children, forked, gone, wait_for
from support.reliability.short_form import thinned

from mlm_eval.checkpoints.folders.locks import lock_folder

pytest_plugins = ["support.command_line_fixtures"]

COMMANDS: dict[str, list[str]] = {
    "inspect": "inspect --ckpt GPT".split(),
    "help": ["--help"],
    "score --help": ["score", "--help"],
    "score": "score --ckpt GPT --input LINES --output OUT".split(),
    "wikitext103": "wikitext103 --ckpt GPT --data WIKI --output OUT".split(),
    "hf": "convert --ckpt GPT --to hf --output OUT".split(),
    "torch_dist": "convert --ckpt GPT --to torch_dist --output OUT".split(),
    "megatron": "convert --ckpt GPT --to megatron --output OUT".split(),
    "lm": """lm --ckpt GPT --data TEXT --output-dir OUT --max-steps 2 --micro-batch 2
    --global-batch 2 --save-minutes 0""".split(),
}
WRITING = ("score", "wikitext103", "hf", "torch_dist", "megatron", "lm")


def stream(number: int, encoding: str, errors: str = "strict") -> None:
    """Give a stream an encoding, as PYTHONIOENCODING and a locale do."""
    made = open(number, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
    setattr(sys, {1: "stdout", 2: "stderr"}[number], made)


def closed(*numbers: int) -> Callable[[], None]:
    """Return what closes descriptors, as `>&-` does."""

    def close() -> None:
        for number in numbers:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)

    return close


def full(number: int) -> Callable[[], None]:
    """Return what sends a descriptor to a full disk."""

    def send() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        stream(number, "utf-8")

    return send


def encoded(encoding: str) -> Callable[[], None]:
    """Return what gives stdout and stderr an encoding."""

    def encode() -> None:
        stream(1, encoding)
        stream(2, encoding, "backslashreplace")

    return encode


def left_by_its_reader() -> None:
    """Give stdout to a pipe whose reader has left, as `head -1` does."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    stream(1, "utf-8")


def in_a_folder_that_is_gone() -> None:
    """Go to a folder and remove it."""
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def with_environment(**variables: str | None) -> Callable[[], None]:
    """Return what sets variables, and removes those of None."""

    def change() -> None:
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    return change


def no_file_beyond(size: int) -> Callable[[], None]:
    """Return what makes a disk full, as far as a file is concerned: `ulimit -f`."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


SURROUNDINGS: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {
    "stdout closed": (closed(1), (0,)),
    "stderr closed": (closed(2), (0,)),
    "all closed": (closed(0, 1, 2), (0,)),
    "stdin closed": (closed(0), (0,)),
    "stdout full": (full(1), (0, 2)),
    "stderr full": (full(2), (0,)),
    "ASCII": (encoded("ascii"), (0,)),
    "Latin-1": (encoded("latin-1"), (0,)),
    "UTF-16": (encoded("utf-16"), (0,)),
    "head": (left_by_its_reader, (0,)),
    "no folder": (in_a_folder_that_is_gone, (2,)),
    "no home": (with_environment(HOME=None), (0,)),
    "home nowhere": (with_environment(HOME="/proc/nowhere", XDG_CACHE_HOME=None), (0,)),
    "cache read-only": (with_environment(XDG_CACHE_HOME="/proc"), (0,)),
    "no threads": (with_environment(OMP_NUM_THREADS="0", MKL_NUM_THREADS="x"), (0,)),
    "C locale": (with_environment(LC_ALL="C", LANG=None, PYTHONUTF8="0"), (0,)),
}
"""What happens before the command, and the exit codes that are right."""


@pytest.fixture
def line(folder: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """Return the line of a command."""
    (folder / "text.txt").write_text(TEXT * 20)
    known = {
        "GPT": str(folder / "gpt"),
        "LINES": str(folder / "lines.jsonl"),
        "WIKI": str(folder / "wiki.tokens"),
        "TEXT": str(folder / "text.txt"),
        "OUT": str(tmp_path / "out"),
    }
    return lambda command: [known.get(word, word) for word in COMMANDS[command]]


CASES = [(place, command) for place in SURROUNDINGS for command in COMMANDS]


@pytest.mark.parametrize("case", thinned(map(": ".join, CASES), every=14))
def test_poor_surroundings_cost_at_most_what_is_printed(case, line, tmp_path):
    place, _, command = case.partition(": ")
    around, codes = SURROUNDINGS[place]
    ended = forked(tmp_path / "log", *line(command), around=around)
    assert ended.code in codes, ended
    assert "Traceback" not in ended.err and "fault of mlm-eval" not in ended.err
    if command in WRITING and ended.code == 0:
        assert (tmp_path / "out").exists()


SIZES = (0, 700, 2_000, 20_000, 40_000)


@pytest.mark.parametrize(
    "case", thinned([f"{command} {size}" for size in SIZES for command in WRITING], every=7)
)
def test_a_full_disk_is_said_and_leaves_nothing(case, line, tmp_path):
    command, size = case.split()
    ended = forked(tmp_path / "log", *line(command), around=no_file_beyond(int(size)))
    assert ended.code in (0, 2), ended
    assert "Traceback" not in ended.err and "fault of mlm-eval" not in ended.err
    hidden = [path for path in tmp_path.rglob(".*") if path.name != ".metadata"]
    assert not hidden
    if ended.code == 2 and command != "lm":
        assert not (tmp_path / "out").exists()
        left = [path.name for path in tmp_path.glob("out*")]
        assert not left, left
    if int(size) > 0:
        assert ended.code == 0 or "mlm-eval: " in ended.err
    ended = forked(tmp_path / "log", *line(command), *["--overwrite"] * (ended.code == 0))
    assert ended.code == 0, ended


@pytest.mark.parametrize("command", thinned(WRITING, every=4))
def test_an_output_folder_that_disappears_is_said(command, line, tmp_path):
    """It goes when the command has begun to write there."""
    place = tmp_path / "deep"
    words = [word.replace(str(tmp_path / "out"), str(place / "out")) for word in line(command)]
    place.mkdir()

    def install() -> None:
        steps = [0]

        def audit(event: str, arguments: tuple[object, ...]) -> None:
            if event in ("open", "os.mkdir") and str(place) in str(arguments[0]):
                steps[0] += 1
                if steps[0] == 4:
                    shutil.rmtree(place, ignore_errors=True)

        sys.addaudithook(audit)

    ended = forked(tmp_path / "log", *words, around=install)
    assert ended.code in (0, 2), ended
    assert "Traceback" not in ended.err and "fault of mlm-eval" not in ended.err


@pytest.mark.parametrize(
    "name", ["with spaces", "ünïcødé-模型", "quote'\"$(x)", "-dash", "per%cent"]
)
@pytest.mark.parametrize(
    "command", ["inspect", *(pytest.param(c, marks=pytest.mark.reliability) for c in WRITING)]
)
def test_names_of_folders_may_be_odd(command, name, folder, line, tmp_path):
    place = tmp_path / name
    shutil.copytree(folder / "gpt", place / "gpt")
    words = [
        word.replace(str(folder / "gpt"), str(place / "gpt")).replace(
            str(tmp_path / "out"), str(place / "out")
        )
        for word in line(command)
    ]
    ended = forked(tmp_path / "log", *words)
    assert ended.code == 0, ended


def test_a_name_of_bytes_that_are_no_text_is_shown(folder, tmp_path):
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    shutil.copytree(os.fsencode(folder / "gpt"), place)
    ended = forked(tmp_path / "log", "inspect", "--ckpt", os.fsdecode(place))
    assert ended.code == 0 and "caf\\udce9" in ended.out, ended
    ended = forked(tmp_path / "log", "inspect", "--ckpt", os.fsdecode(place) + "x")
    assert_one_sentence(ended, "does not exist")


def test_a_folder_that_another_run_writes_is_not_entered(line, tmp_path):
    kept = tmp_path / "out" / "state"
    lock = lock_folder(kept, what="x")
    try:
        ended = forked(tmp_path / "log", *line("lm"))
    finally:
        lock.release()
    assert_one_sentence(ended, "is being written by another run (process", "wait for its end")


def test_a_file_that_is_cut_short_while_it_is_mapped_is_said(folder, tmp_path):
    gpt = tmp_path / "gpt"
    shutil.copytree(folder / "gpt", gpt)

    def install() -> None:
        from mlm_eval.checkpoints import lazy

        read = lazy.MappedFile.tensor

        def cutting(self, offset, dtype, shape, stride):
            values = read(self, offset, dtype, shape, stride)
            if len(shape) > 1 and shape[0] > 60:
                os.truncate(self.path, 0)
            return values

        lazy.MappedFile.tensor = cutting

    out = tmp_path / "out"
    line = ["convert", "--ckpt", gpt, "--to", "hf", "--output", out]
    ended = forked(tmp_path / "log", *line, around=install)
    assert_one_sentence(ended, "became shorter while it was read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt", "log"]


MANY_AT_ONCE = """
import ctypes, signal, threading
from mlm_eval.ranks.signals import say_bus_errors
say_bus_errors()
ready = threading.Barrier(8)
def read():
    ready.wait()
    getattr(ctypes.CDLL(None), "raise")(signal.SIGBUS)
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_threads_that_read_a_file_that_is_cut_short_say_it_once():
    ended = as_user(command=("-c", MANY_AT_ONCE))
    assert_one_sentence(ended, "became shorter while it was read")


@pytest.mark.parametrize("port", ["99999", "0", "-1", "x"])
def test_a_port_that_is_none_is_refused(port, line, tmp_path):
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    around = with_environment(**launcher, MASTER_PORT=port)
    ended = forked(tmp_path / "log", *line("score"), around=around)
    assert_one_sentence(ended, "MASTER_PORT", "expected a number from 1 to 65535")


def test_more_ranks_than_the_cores_take_are_refused(line, tmp_path):
    ended = forked(tmp_path / "log", *line("score"), "--dp", "500")
    assert_one_sentence(ended, "500 ranks on the CPU, too many for")


@pytest.mark.reliability
def test_a_verifying_process_ends_with_its_parent(folder, tmp_path):
    out = tmp_path / "out"
    line = ["convert", "--ckpt", folder / "gpt", "--to", "hf", "--output", out, "--verify"]
    process = started(*line)
    try:
        wait_for(lambda: bool(children(process.pid)) or process.poll() is not None)
        checking = children(process.pid)
        assert checking
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert wait_for(lambda: all(map(gone, checking)), seconds=60)
    finally:
        process.kill()


def test_numbers_are_the_same_at_odd_numbers_of_threads(line, tmp_path):
    metrics = []
    for threads in (1, 3):
        ended = forked(
            tmp_path / "log",
            *line("wikitext103"),
            "--overwrite",
            around=lambda n=threads: torch.set_num_threads(n),
        )
        assert ended.code == 0, ended
        metrics.append(json.loads((tmp_path / "out").read_text())["metrics"]["avg_loss"])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)
