"""Runs command lines as a user does, and reads what they leave; for test_cli*.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import random_models

CONFIG = random_models.config(vocab_size=256, max_position_embeddings=32)
TEXT = " = Title = \n \n " + " ".join(f"word{n} , <unk>" for n in range(60)) + " \n"
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_", "MLM_EVAL_L")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]

MEANWHILE = re.compile(r"^work ahead: |^warning: .* is another text| \.\.\.$|: [\d:]+ so far$")
"""Lines of a command at work; phases are named where they take long."""


def started(
    *arguments: object,
    command: tuple[str, ...] = ("-P", "-m", "mlm_eval"),
    cwd: Path | None = None,
    alone: bool = False,
) -> Any:
    """Start a command line as a user does, in an environment without a launcher.

    Args:
        arguments: Of the command line.
        command: What Python runs.
        cwd: Where; None: here.
        alone: In a process group of its own, as a shell starts it: Ctrl-C reaches all of it.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_A_LAUNCHER)}
    return subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        start_new_session=alone,
    )


def as_user(
    *arguments: object,
    command: tuple[str, ...] = ("-P", "-m", "mlm_eval"),
    cwd: Path | None = None,
) -> Ended:
    """Run a command line as a user does, to its end."""
    process = started(*arguments, command=command, cwd=cwd)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return Ended(process.returncode, out, err)


def on(checkpoint: object, line: Sequence[object]) -> list[object]:
    """Return a command line with another --ckpt."""
    place = line.index("--ckpt") + 1
    return [*line[:place], checkpoint, *line[place + 1 :]]


def read(path: Path) -> dict[str, Any]:
    """Return a record."""
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def assert_one_sentence(ended: Ended, *parts: str) -> None:
    """Wrong input: exit code 2, and one line on stderr that says all of `parts`."""
    assert ended.code == 2, ended
    assert ended.out == ""
    lines = [line for line in ended.err.splitlines() if not MEANWHILE.search(line)]
    assert len(lines) == 1 and lines[0].startswith("mlm-eval: "), ended.err
    for part in parts:
        assert part in lines[0], (part, lines[0])
