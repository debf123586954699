"""Rows longer than those that a model was trained on: a warning; longer than its positions: no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_models
from support.command_line import TEXT, Run, assert_one_sentence, read
from support.folders import synthetic
from support.paths import SAMPLES

import mlm_eval
from mlm_eval.engine.engine import Engine

pytest_plugins = ["support.command_line_fixtures"]

POSITIONS, TRAINED = 32, 8
MODELS = {
    kind: random_models.config(model, vocab_size=256, max_position_embeddings=POSITIONS)
    for kind, model in (("rope", random_models.LLAMA), ("learned", random_models.GPT))
}
SAID = f"the model was trained on rows of {TRAINED} (seq_length of its args)"


def saved(folder: Path, kind: str, **args: Any) -> Path:
    """Write such a model with these saved args."""
    config = MODELS[kind]
    model = synthetic.random_model(config)
    synthetic.write(folder, model, config, args=synthetic.args_of(config, **args))
    random_models.byte_vocabulary(folder / "tokenizer")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """A text of many windows, a passage of eleven bytes, lines of many and of few tokens."""
    files = {
        "wikitext103": TEXT * 3,
        "lambada": json.dumps({"text": "the cat saw"}),
        "score": json.dumps({"tokens": list(range(90))}),
        "short": json.dumps({"tokens": list(range(TRAINED + 1))}),
    }
    for name, text in files.items():
        (tmp_path / name).with_suffix(".jsonl").write_text(text)
    return {name: (tmp_path / name).with_suffix(".jsonl") for name in files}


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", MODELS)
def test_rows_beyond_the_trained_ones_are_computed_with_a_warning(
    run: Run, tmp_path, data, kind, monkeypatch
):
    ckpt = saved(tmp_path / "model", kind, seq_length=TRAINED)
    for task in ("wikitext103", "lambada"):
        record = tmp_path / f"{task}.json"
        ended = run(task, "--ckpt", ckpt, "--data", data[task], "--output", record)
        longest = POSITIONS if task == "wikitext103" else len("the cat saw") - 1
        assert (
            ended.code == 0 and f"rows of up to {longest} tokens are read, and {SAID}" in ended.err
        )
        assert any(SAID in warning for warning in read(record)["settings"]["warnings"])
    with monkeypatch.context() as stopped:  # what is odd is said before anything is scored
        stopped.setattr(Engine, "score", interrupted)
        ended = run("lambada", "--ckpt", ckpt, "--data", data["lambada"])
        assert ended.code == 130 and SAID in ended.err and "is not the paper's file" in ended.err
    lines = ("--output", tmp_path / "out.jsonl", "--overwrite")
    ended = run("score", "--ckpt", ckpt, "--input", data["score"], *lines)
    assert ended.code == 0 and f"up to {POSITIONS} tokens are read, and {SAID}" in ended.err
    ended = run("score", "--ckpt", ckpt, "--input", data["short"], *lines)
    assert ended.code == 0 and "trained on" not in ended.err
    fits = ("--seq-length", TRAINED, "--stride", 4)
    ended = run("wikitext103", "--ckpt", ckpt, "--data", data["wikitext103"], *fits)
    assert ended.code == 0 and "trained on" not in ended.err
    engine = mlm_eval.Engine.load(mlm_eval.open_checkpoint(ckpt), device="cpu")
    result = mlm_eval.evaluate("wikitext103", engine, data=data["wikitext103"])
    assert any(SAID in warning for warning in result.warnings)


@pytest.mark.parametrize("args", [{}, {"seq_length": POSITIONS}, {"seq_length": 2 * POSITIONS}])
def test_nothing_is_said_where_nothing_is_known_or_wrong(run: Run, tmp_path, data, args):
    ckpt = saved(tmp_path / "model", "rope", **args)
    ended = run("wikitext103", "--ckpt", ckpt, "--data", data["wikitext103"])
    assert ended.code == 0 and "trained on" not in ended.err


def test_positions_end_where_they_end(run: Run, tmp_path, data):
    line = ["wikitext103", "--data", data["wikitext103"], "--seq-length", 2 * POSITIONS]
    more = ["--set", f"max_position_embeddings={2 * POSITIONS}"]
    for kind in MODELS:
        ckpt = saved(tmp_path / kind, kind)
        assert_one_sentence(run(*line, "--ckpt", ckpt), f"the model has {POSITIONS} positions")
    assert_one_sentence(run(*line, *more, "--ckpt", tmp_path / "learned"), "position_embeddings")
    ended = run(*line, *more, "--ckpt", tmp_path / "rope")
    beyond = f"max_position_embeddings={2 * POSITIONS} goes beyond the {POSITIONS} positions"
    assert ended.code == 0 and beyond in ended.err
    hub = tmp_path / "hub"
    mlm_eval.convert(mlm_eval.open_checkpoint(tmp_path / "rope"), "hf", hub)
    random_models.byte_vocabulary(hub / "tokenizer")
    ended = run(*line, *more, "--ckpt", hub, "--tokenizer", hub / "tokenizer")
    assert ended.code == 0 and beyond in ended.err


def test_a_bert_too(run: Run, tmp_path):
    trained = mlm_eval.open_checkpoint(SAMPLES / "bert").provenance.args["seq_length"]
    rows = torch.randint(5, 100, (2, trained + 1)).tolist()
    for count, said in ((trained, False), (trained + 1, True)):
        (tmp_path / "in.jsonl").write_text(json.dumps({"tokens": rows[0][:count]}))
        lines = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / f"{count}.jsonl")
        ended = run("score", "--ckpt", "sample:bert", *lines, "--device", "cpu")
        assert ended.code == 0 and (f"trained on rows of {trained}" in ended.err) == said
