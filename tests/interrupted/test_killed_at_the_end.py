"""Commands that are ended between their result and the removal of what they kept beside it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import assert_one_sentence
from support.reliability.forked import forked

pytest_plugins = ["support.command_line_fixtures"]

COMMANDS = {
    "score": "score --ckpt GPT --input LINES".split(),
    "wikitext103": "wikitext103 --ckpt GPT --data WIKI".split(),
}
SAID = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "stopped by SIGTERM")}


@pytest.fixture
def line(folder: Path) -> Callable[[str, Path], list[str]]:
    """Return the line of a command with an output."""
    known = {"GPT": "gpt", "LINES": "lines.jsonl", "WIKI": "wiki.tokens"}

    def make(command: str, output: Path) -> list[str]:
        words = [str(folder / known[w]) if w in known else w for w in COMMANDS[command]]
        return [*words, "--output", str(output)]

    return make


def killed_where_scores_are_removed(number: signal.Signals) -> Callable[[], None]:
    """Return what ends a command when its output stands and what it kept is to go."""

    def install() -> None:
        from mlm_eval.engine import resume

        def kill(folder: Path) -> None:
            os.kill(os.getpid(), number)

        resume.discard_scores = kill  # type: ignore[assignment]

    return install


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("score", signal.SIGTERM),
        pytest.param("wikitext103", signal.SIGINT, marks=pytest.mark.reliability),
        pytest.param("score", signal.SIGINT, marks=pytest.mark.reliability),
        pytest.param("wikitext103", signal.SIGTERM, marks=pytest.mark.reliability),
    ],
)
def test_a_signal_after_the_result_says_that_it_is_written(command, number, line, tmp_path):
    out = tmp_path / "out.json"
    around = killed_where_scores_are_removed(number)
    ended = forked(tmp_path / "log", *line(command, out), around=around)
    code, said = SAID[number]
    assert ended.code == code
    assert ended.err.splitlines()[-1] == f"mlm-eval: {said}; the result was written: {out}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out.json"]


@pytest.mark.parametrize(
    "command", ["score", pytest.param("wikitext103", marks=pytest.mark.reliability)]
)
def test_what_a_killed_run_kept_of_a_whole_result_goes_with_the_next_one(command, line, tmp_path):
    out, kept = tmp_path / "out.json", tmp_path / "out.json.partial"
    around = killed_where_scores_are_removed(signal.SIGKILL)

    def kill() -> None:
        out.unlink(missing_ok=True)
        ended = forked(tmp_path / "log", *line(command, out), around=around)
        assert ended.code == -signal.SIGKILL and out.is_file() and any(kept.glob("*.safetensors"))

    kill()
    ended = forked(tmp_path / "log", *line(command, out))
    assert_one_sentence(ended, "exists already; replace it with --overwrite")
    assert not kept.exists()
    kill()
    ended = forked(tmp_path / "log", *line(command, out), "--overwrite")
    assert ended.code == 0 and "resumes" not in ended.err and not kept.exists()


@pytest.mark.reliability
def test_a_result_that_was_moved_away_does_not_finish_the_run(line, tmp_path):
    """Its scores are still good for the same command, and another one is told the truth."""
    out, kept = tmp_path / "out.json", tmp_path / "out.json.partial"
    around = killed_where_scores_are_removed(signal.SIGKILL)
    forked(tmp_path / "log", *line("wikitext103", out), around=around)
    before = out.read_bytes()
    out.write_bytes(before.replace(b"e", b"f", 1))
    forked(tmp_path / "log", *line("wikitext103", out))
    assert any(kept.iterdir())  # this file is another one
    out.unlink()
    ended = forked(tmp_path / "log", *line("wikitext103", out), "--dtype", "bfloat16")
    assert_one_sentence(ended, "a run that was ended as it wrote its output", "dtype")
    ended = forked(tmp_path / "log", *line("wikitext103", out))
    assert ended.code == 0 and "resumes at 100 %" in ended.err and not kept.exists()
