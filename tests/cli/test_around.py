"""What stands around a run: names, help, the samples by name, lines of progress in a log."""

from __future__ import annotations

import pytest
from support.command_line import assert_one_sentence
from support.paths import SAMPLES

from mlm_eval.cli import run as cli_run
from mlm_eval.cli.app import commands
from mlm_eval.cli.run import heartbeat, progress

pytest_plugins = ["support.command_line_fixtures"]


def test_every_list_has_what_the_commands_take(run):
    text = run("ls").out
    for kind in ("tasks", "recipes", "sizes", "samples", "catalog"):
        names = run("ls", kind).out.split()
        assert names and f"{kind}: {', '.join(names)}" in text
    assert set(run("ls", "tasks").out.split()) <= set(commands())
    for size in run("ls", "sizes").out.split()[-2:]:
        assert run("plan", "--model", size, "--device-memory", "80GB").code == 0
    assert_one_sentence(run("ls", "recipe"), "ls 'recipe' is unknown; use tasks, recipes")


def test_samples_are_opened_by_name(run):
    for name in run("ls", "samples").out.split():
        assert run("inspect", "--ckpt", name).code == 0
    data = SAMPLES / "text" / "lambada.sample.jsonl"
    arguments = ("--data", data, "--limit", 1, "--device", "cpu", "--tp", 1)
    assert run("lambada", "--ckpt", "sample:gpt", *arguments).code == 0
    assert_one_sentence(
        run("inspect", "--ckpt", "sample:none"), "no sample 'none'", "sample:bert, sample:gpt"
    )


@pytest.mark.parametrize("command", [(), *((name,) for name in commands())], ids=str)
def test_h_is_help(run, command):
    short = run(*command, "-h")
    assert short.code == 0 and short.out == run(*command, "--help").out and "Usage" in short.out


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(cli_run.time, "monotonic", lambda: now[0])
    tell = heartbeat("scoring")
    tell(200, 1000)  # kept from an earlier run
    for seconds in range(10, 90, 10):
        now[0] = 100.0 + seconds
        tell(200 + 5 * seconds, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 35 %, 0:02:10 left",
        "scoring: 50 %, 0:01:40 left",
    ]


def test_progress_is_a_bar_on_terminals_only(monkeypatch, capsys):
    with progress(False) as callback:
        assert callback is None
    with progress(True) as callback:
        callback(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress(True) as callback:
        callback(1, 2)
    assert "50%" in capsys.readouterr().err
