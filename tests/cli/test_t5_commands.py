"""Commands with a T5: score, convert and verify work, the others refuse it in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import random_models
from support.command_line import Run, assert_one_sentence
from support.configs import T5

from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch

pytest_plugins = ["support.command_line_fixtures"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of two files."""
    folder = tmp_path_factory.mktemp("t5") / "model"
    return write_megatron_torch(random_models.checkpoint(T5), folder, tp=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("wikitext103", "--data", "x.txt"),
        ("lambada", "--data", "x.txt"),
        ("generate", "--prompt", "hello"),
        ("race", "--data", ".", "--output-dir", "out"),
        ("squad", "--data", ".", "--output-dir", "out"),
        ("lm", "--data", "x.txt", "--output-dir", "out"),
        ("mlm", "--data", "x.txt", "--output-dir", "out"),
        ("plan",),
        ("bench", "--tp", "1"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_not_for_a_t5_is_one_sentence(
    arguments: tuple[str, ...],
    model: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("a line\n")
    ended = run(arguments[0], "--ckpt", model, *arguments[1:])
    assert_one_sentence(ended)
    assert "T5" in ended.err, ended


def test_score_takes_pairs(model: Path, run: Run, tmp_path: Path):
    lines, scores = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    pair = {"encoder_tokens": [1, 2, 3], "encoder_mask": [1, 1, 0], "tokens": [4, 5, 6]}
    lines.write_text(json.dumps(pair) + "\n")
    ended = run("score", "--ckpt", model, "--input", lines, "--output", scores)
    assert ended.code == 0, ended
    [record] = map(json.loads, scores.read_text().splitlines())
    assert record["logprobs"][0] is None and len(record["logprobs"]) == 3
    lines.write_text('{"text": "hello"}\n')
    ended = run("score", "--ckpt", model, "--input", lines, "--output", scores, "--overwrite")
    assert_one_sentence(ended)
    assert "holds text, but a T5 takes ids" in ended.err


def test_sizes_change_nothing(model: Path, run: Run, tmp_path: Path):
    for number, options in enumerate((("megatron", "--tp", 4), ("torch_dist",))):
        other = tmp_path / str(number)
        ended = run("convert", "--ckpt", model, "--output", other, "--to", *options)
        assert ended.code == 0, ended
        ended = run("verify", "--ckpt", model, "--against", other)
        assert ended.code == 0 and ended.out.startswith("verdict: the same"), ended
