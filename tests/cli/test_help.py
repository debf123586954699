"""What `--help` prints, as people see it: on a terminal of 80 columns, and without rich."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from mlm_eval.cli.app import commands, full_command
from mlm_eval.engine.batching import DEFAULT_BATCH_TOKENS

pytest_plugins = ["support.command_line_fixtures"]

COLUMNS = 80
ALL = [(), *((name,) for name in commands())]


def parameters(command: tuple[str, ...]) -> list[Any]:
    """Return what the help of a command shows, without the program's own options."""
    found = full_command(*command).params if command else []
    return [parameter for parameter in found if not getattr(parameter, "hidden", False)]


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_every_name_is_whole_and_every_line_filled(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    text = run(*command, "--help").out
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, text.splitlines())) <= COLUMNS
    words = set(re.split(r"[\s\[\],:]+", text))
    for parameter in parameters(command):
        flags = {n for n in (*parameter.opts, *parameter.secondary_opts) if n.startswith("-")}
        assert flags <= words
        assert flags or (parameter.metavar if "|" not in parameter.metavar else "") in text
    assert not re.search("<bool>|BOOLEAN", text)  # a switch has no value
    assert not re.search(r"<\w+[\[>]|\{[A-Z-]|\((True|False)", text)  # no types of Python
    intro = text.partition("\N{BOX DRAWINGS LIGHT ARC DOWN AND RIGHT}")[0].strip()
    for paragraph in re.split(r"\n\s*\n", intro):
        lines = [line.strip() for line in paragraph.splitlines()]
        for line, following in zip(lines, lines[1:], strict=False):
            assert len(line) + 1 + len(following.split()[0]) > COLUMNS - 2, line


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("data", "[OPTIONS] [TASK]"),
        ("report", "[OPTIONS] RESULTS..."),
        ("ensemble", "[OPTIONS] [MORE]..."),
        ("harness", "[OPTIONS] -- LM_EVAL_ARGUMENTS..."),
    ],
)
def test_the_usage_names_arguments_as_people_do(run, command, usage):
    first = run(command, "--help").out.strip().splitlines()[0]
    assert first.strip().endswith(f" {command} {usage}")


def with_long_choices() -> list[Any]:
    """Return the options whose choices are not shown beside their names."""
    return [
        pytest.param(parameter, id=f"{name} {parameter.opts[0]}")
        for name in commands()
        for parameter in full_command(name).params
        if "|" in (metavar := parameter.metavar or "")
        and (parameter.param_type_name == "argument" or len(metavar) > 15)
    ]


@pytest.mark.parametrize("parameter", with_long_choices())
def test_choices_stand_in_the_text_where_they_do_not_beside_it(parameter):
    said = set(re.split(r"[^\w-]+", parameter.help))
    assert set(parameter.metavar.strip("[]").split("|")) <= said


def test_the_default_of_batch_tokens_is_the_engines():
    for name in commands():
        for parameter in full_command(name).params:
            if parameter.name == "batch_tokens":
                sizes = [f"{DEFAULT_BATCH_TOKENS[kind]:,}" for kind in ("cpu", "cuda")]
                assert parameter.show_default == "{} on the CPU, {} on CUDA".format(*sizes)


WITHOUT_RICH = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "rich" else find(name, *rest)
import mlm_eval.cli
mlm_eval.cli.entry()
"""


def test_the_help_without_rich():
    asked = [sys.executable, "-P", "-c", WITHOUT_RICH, "lm", "--help"]
    ended = subprocess.run(asked, capture_output=True, text=True)
    assert ended.returncode == 0 and "\N{BOX DRAWINGS LIGHT VERTICAL}" not in ended.stdout
    for parameter in parameters(("lm",)):
        assert all(name in ended.stdout for name in parameter.opts)
