"""Runs command lines, in this process or as a user does; fixtures for test_cli*.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import random_models

from mlm_eval import cli
from mlm_eval.checkpoints.megatron_writer import write_megatron_torch

CONFIG = random_models.config(vocab_size=256, max_position_embeddings=32)
TEXT = " = Title = \n \n " + " ".join(f"word{n} , <unk>" for n in range(60)) + " \n"
PASSAGES = ["the cat saw a dog", "one two three", "he said no no", "x yy zzz"]
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_", "MLM_EVAL_L")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: quick, for one rank."""
    for name in [name for name in os.environ if name.startswith(OF_A_LAUNCHER)]:
        monkeypatch.delenv(name)

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mlm-eval", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = cli._main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        return Ended(code, *capsys.readouterr())

    return run


def started(*arguments: object, command: tuple[str, ...] = ("-P", "-m", "mlm_eval")) -> Any:
    """Start a command line as a user does, in an environment without a launcher."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_A_LAUNCHER)}
    return subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )


def as_user(*arguments: object, command: tuple[str, ...] = ("-P", "-m", "mlm_eval")) -> Ended:
    """Run a command line as a user does, to its end."""
    process = started(*arguments, command=command)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return Ended(process.returncode, out, err)


def read(path: Path) -> dict[str, Any]:
    """Return a record."""
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def assert_one_sentence(ended: Ended, *parts: str) -> None:
    """Wrong input: exit code 2, and one line on stderr that says all of `parts`."""
    assert ended.code == 2, ended
    assert ended.out == ""
    lines = [line for line in ended.err.splitlines() if not line.startswith("work ahead: ")]
    assert len(lines) == 1 and lines[0].startswith("mlm-eval: "), ended.err
    for part in parts:
        assert part in lines[0], (part, lines[0])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two files with its tokenizer, a text, passages, and lines to score."""
    folder = tmp_path_factory.mktemp("cli")
    write_megatron_torch(random_models.checkpoint(CONFIG), folder / "gpt", tp=2)
    random_models.byte_vocabulary(folder / "gpt" / "tokenizer")
    (folder / "wiki.tokens").write_text(TEXT)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in PASSAGES)
    (folder / "passages.jsonl").write_text(rows)
    (folder / "lines.jsonl").write_text('{"tokens": [1, 2, 3]}\n{"text": "abc"}\n')
    return folder


@pytest.fixture
def wiki(folder: Path) -> list[object]:
    """A WikiText run on that checkpoint."""
    return ["wikitext103", "--ckpt", folder / "gpt", "--data", folder / "wiki.tokens"]


@pytest.fixture
def cloze(folder: Path) -> list[object]:
    """A LAMBADA run on that checkpoint."""
    return ["lambada", "--ckpt", folder / "gpt", "--data", folder / "passages.jsonl"]
