"""score and generate at the command line: standard input, text files, what is said of the work."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from support.command_line import Run, assert_one_sentence
from support.ranks import run_ranks

from mlm_eval.cli.sequences.standard_input import standard_input
from mlm_eval.engine import score

pytest_plugins = ["support.command_line_fixtures"]


def typed(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content))


def test_a_dash_is_stdin_and_stdout(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lines, output = folder / "lines.jsonl", tmp_path / "out.jsonl"
    line = ["score", "--ckpt", folder / "gpt"]
    assert run(*line, "--input", lines, "--output", output).code == 0
    monkeypatch.setattr(sys, "stdin", typed(lines.read_bytes()))
    ended = run(*line, "--input", "-", "--output", "-")
    assert ended.code == 0 and ended.out == output.read_text()
    assert "work ahead: 2 sequence(s), 4 tokens through the model" in ended.err
    monkeypatch.setattr(sys, "stdin", typed(b'{"tokens": "x"}'))
    wrong = run(*line, "--input", "-", "--output", "-")
    assert_one_sentence(wrong, "stdin, line 1: tokens must be")


def test_prompts_come_from_stdin(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", typed(b'{"tokens": [1, 2], "id": 3}\n'))
    line = ["generate", "--ckpt", folder / "gpt", "--max-new-tokens", 2]
    ended = run(*line, "--input", "-", "--output", "-")
    assert ended.code == 0 and json.loads(ended.out)["id"] == 3


def read_on_a_rank() -> tuple[bytes, bytes]:
    """Return what a rank gets of rank 0's input; of the others' nothing is read."""
    import torch.distributed as dist

    sys.stdin = typed(b"rank %d" % dist.get_rank())
    return standard_input(), sys.stdin.buffer.read()


@pytest.mark.process
def test_one_rank_reads_for_all():
    assert run_ranks(2, read_on_a_rank) == [(b"rank 0", b""), (b"rank 0", b"rank 1")]


def test_a_text_file_is_resumed_and_its_blank_lines_are_told(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    texts = [text for n in range(20) for text in (f"{n:02} abc", "")]
    text.write_text("\n".join(texts) + "\n")
    line = ["score", "--ckpt", folder / "gpt", "--batch-tokens", 10, "--input", text]
    whole, calls = score.score_batch, []

    def interrupted(*given: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(score, "score_batch", interrupted)
    assert run(*line, "--output", output).code == 130
    other = run(*line, "--output", output, "--input-format", "jsonl")
    assert_one_sentence(other, "in.txt, line 1 is not JSON")
    ended = run(*line, "--output", output)
    assert ended.code == 0 and "resumes at 40 %: 8 of 20" in ended.err, ended
    assert "warning: 20 line(s) hold no token, the first is " in ended.err
    records = [json.loads(record) for record in output.read_text().splitlines()]
    assert [record["text"] for record in records] == texts
    assert {record["sum_logprob"] == 0.0 for record in records[1::2]} == {True}
