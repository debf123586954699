"""Commands that a signal ends: what they keep, what they leave, and how the next one goes on."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Run, assert_one_sentence, started

from mlm_eval.checkpoints.huggingface import write as huggingface_write
from mlm_eval.engine import encode, score

pytest_plugins = ["support.command_line_fixtures"]

SIGNALS = [
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 143, "stopped by SIGTERM"),
    (signal.SIGHUP, 129, "stopped by SIGHUP"),
]
BATCHES = {"gpt": (score, "score_batch"), "bert": (encode, "_run_batch")}
"""What runs one batch of each kind of model."""


def lines_of(path: Path, family: str, count: int = 30) -> Path:
    """Write sequences to score; of a BERT some have choices."""
    lines: list[dict[str, Any]] = []
    for n in range(count):
        rows = [[1 + (n * 7 + i) % 20 for i in range(3 + n % 5)] for _ in range(2)]
        choices = family == "bert" and n % 3 == 0
        lines.append({"choices": rows} if choices else {"tokens": rows[0]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def after(batches: int, act: Callable[[], object], body: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that acts once, before its body runs a further time."""
    calls = itertools.count()

    def acting(*given: Any, **more: Any) -> Any:
        if next(calls) == batches:
            act()
        return body(*given, **more)

    return acting


def numbers(value: Any) -> list[Any]:
    """Return all figures of a record in their order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [figure for entry in value for figure in numbers(entry)]
    return [value]


def same_scores(found: Path, expected: Path) -> bool:
    """Return whether two files hold the same scores, but for the order of sums in a batch."""
    one, other = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (found, expected)
    )
    pairs = zip(numbers(one), numbers(other), strict=True)
    return all(a == (pytest.approx(b, rel=1e-5) if type(b) is float else b) for a, b in pairs)


@pytest.mark.parametrize(
    ("family", "number", "code", "said"),
    [
        pytest.param(family, *signal_, marks=[] if family == "bert" or n == 1 else pytest.mark.long)
        for family in BATCHES
        for n, signal_ in enumerate(SIGNALS)
        if family == "gpt" or n == 0
    ],
)
def test_score_keeps_what_it_has_done(
    run: Run, folder, bert, tmp_path, monkeypatch, family, number, code, said
):
    model = folder / "gpt" if family == "gpt" else bert
    output, expected = tmp_path / "out.jsonl", tmp_path / "expected.jsonl"
    line = ["score", "--ckpt", model, "--input", lines_of(tmp_path / "in.jsonl", family)]
    line += ["--batch-tokens", 30]
    assert run(*line, "--output", expected).code == 0

    kept = tmp_path / "out.jsonl.partial"
    module, name = BATCHES[family]
    whole, handler = getattr(module, name), signal.getsignal(number)
    stopping = after(4, lambda: os.kill(os.getpid(), number), whole)
    monkeypatch.setattr(module, name, stopping)
    ended = run(*line, "--output", output)
    assert ended.code == code and ended.out == "" and "Traceback" not in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith(f"mlm-eval: {said}; no result was written; to continue from what {kept}")
    assert last.endswith(
        f"type: {shlex.join(['mlm-eval', *map(str, line), '--output', str(output)])}"
    )
    assert signal.getsignal(number) is handler
    assert not output.exists()

    # Another run does not take them; the same one scores the rest only.
    scored: list[int] = []

    def counting(*given: Any, **more: Any) -> Any:
        scored.append(1)
        return whole(*given, **more)

    monkeypatch.setattr(module, name, counting)
    ended = run(*line, "--dtype", "bfloat16", "--output", output)
    assert_one_sentence(ended, "out.jsonl.partial holds scores", "dtype float32, now bfloat16")
    ended = run(*line, "--output", output)
    assert ended.code == 0 and "\nresumes at " in ended.err, ended.err
    assert same_scores(output, expected)
    before = len(scored)
    assert run(*line, "--output", output, "--overwrite").code == 0
    assert before < len(scored) - before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "expected.jsonl",
        "in.jsonl",
        "out.jsonl",
    ]


@pytest.mark.parametrize("how", ["--restart", "--overwrite"])
def test_score_discards_what_is_kept_when_that_is_said(
    run: Run, folder, tmp_path, monkeypatch, how
):
    line = ["score", "--ckpt", folder / "gpt", "--batch-tokens", 30]
    line += ["--input", lines_of(tmp_path / "in.jsonl", "gpt"), "--output", tmp_path / "out.jsonl"]
    whole = score.score_batch

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "score_batch", after(4, stop, whole))
    assert run(*line).code == 130
    monkeypatch.setattr(score, "score_batch", whole)
    ended = run(*line, how, "--stride", 4)
    assert ended.code == 0 and "resumes" not in ended.err
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_stream_keeps_nothing(run: Run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run(
        "score", "--ckpt", folder / "gpt", "--input", folder / "lines.jsonl", "--output", "-"
    )
    assert ended.code == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code", "said"), SIGNALS)
def test_a_conversion_that_is_stopped_leaves_nothing(
    run: Run, folder, tmp_path, monkeypatch, number, code, said
):
    def twice() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)  # the handler runs between two instructions
        finally:
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)  # a launcher's second one does not stop the cleaning

    write = huggingface_write.write_safetensors
    monkeypatch.setattr(huggingface_write, "write_safetensors", after(0, twice, write))
    line = ["convert", "--ckpt", folder / "gpt", "--to", "hf", "--output", tmp_path / "hf"]
    ended = run(*line)
    assert ended.code == code and "Traceback" not in ended.err
    last = f"mlm-eval: {said}; no result was written, and nothing was kept"
    assert ended.err.splitlines()[-1] == last
    assert list(tmp_path.iterdir()) == []


EAGER = (
    "import sys; from mlm_eval.engine import resume; resume.FLUSH_SECONDS = -1; "
    "from mlm_eval.cli import entry; entry()"
)
"""The command line, keeping scores after every batch."""


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_has_kept_its_scores(run: Run, folder, tmp_path, number):
    line = ["score", "--ckpt", folder / "gpt", "--batch-tokens", 40, "--stride", 1]
    line += ["--input", lines_of(tmp_path / "in.jsonl", "gpt", count=9000)]
    line += ["--output", tmp_path / "out.jsonl"]
    process = started(*line, command=("-P", "-c", EAGER))
    try:
        kept = tmp_path / "out.jsonl.partial"
        while process.poll() is None and len(list(kept.glob("*.safetensors"))) < 3:
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (tmp_path / "out.jsonl").exists()
    ended = run(*line, "--batch-tokens", 4000, "--limit", 20)
    assert ended.code == 0 and "\nresumes at " in ended.err, ended.err
