"""The engine as a notebook uses it: texts in, figures and texts out."""

from __future__ import annotations

import pytest
import torch

import mlm_eval
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.generate import Prompt
from mlm_eval.engine.score import Request
from mlm_eval.ranks import mesh


@pytest.fixture(scope="module")
def engine() -> Engine:
    return mlm_eval.Engine.load(mlm_eval.open_checkpoint("sample:gpt"), device="cpu")


def test_texts_and_ids_are_scored_alike(engine: Engine) -> None:
    text = "An exception is raised."
    ids = engine.tokenizer.encode(text)
    request = Request(torch.tensor(ids), len(ids) - 1)
    found = engine.score([text, ids, tuple(ids), request])
    rows = found.logprobs.view(4, -1)
    assert rows.shape[1] == len(ids) - 1
    torch.testing.assert_close(rows, rows[:1].expand(4, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", ["", "a", [], [3], [1.0, 2.0], [True, False], None, 3])
def test_what_cannot_be_scored_is_said(engine: Engine, wrong: object) -> None:
    with pytest.raises(mlm_eval.InputError, match="sequence 1 is"):
        engine.score(["An exception", wrong])  # type: ignore[list-item]


def test_texts_ids_and_prompts_are_continued_alike(engine: Engine) -> None:
    text = "An exception is raised when"
    ids = engine.tokenizer.encode(text)
    made = engine.generate([text, ids, Prompt(ids, 5)], max_new_tokens=5)
    assert [found.text for found in made] == [" the exception is raised."] * 3
    assert engine.generate([text], stop=["exc"])[0].text == " the "
    warm = mlm_eval.Sampling(temperature=1.0)
    one, other = (engine.generate([text], sampling=warm, seed=seed)[0] for seed in (1, 2))
    assert one.tokens != other.tokens
    with pytest.raises(mlm_eval.InputError, match=r"write generate\(\[text\]\)"):
        engine.generate(text)
    with pytest.raises(mlm_eval.InputError, match=r"write stop=\[text\]"):
        engine.generate([text], stop="\n\n")
    for wrong in (5, [1.0], [True], None):
        with pytest.raises(mlm_eval.InputError, match="prompt 0 is"):
            engine.generate([wrong])  # type: ignore[list-item]


def test_what_is_loaded_says_what_it_is(engine: Engine) -> None:
    assert repr(engine).startswith("Engine(gpt, 1,088,256 parameters, float32 on cpu, tp 1 x dp 1,")
    assert repr(engine.checkpoint).startswith(
        "Checkpoint(gpt, 1,088,256 parameters, megatron-torch"
    )
    assert len(repr(engine)) < 300
    assert dir(mlm_eval) == sorted(mlm_eval.__all__)


def test_a_model_without_a_tokenizer_says_how_to_give_one(engine: Engine) -> None:
    from support import random_models

    bare = Engine.load(random_models.checkpoint(random_models.GPT))
    assert len(bare.score([[1, 2, 3]]).logprobs) == 2
    assert len(bare.generate([[1, 2, 3]], max_new_tokens=2)[0].tokens) == 2
    with pytest.raises(mlm_eval.InputError, match=r"tokenizer=mlm_eval.load_tokenizer"):
        bare.score(["text"])
    given = Engine.load(random_models.checkpoint(random_models.GPT), tokenizer=engine.tokenizer)
    assert given.tokenizer is engine.tokenizer


def test_a_gpu_is_the_default_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mesh.default_device() == "cpu" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert mesh.default_device() == "cuda:3"
    monkeypatch.setattr(mesh.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(mesh.dist, "get_backend", lambda: "gloo")
    assert mesh.default_device() == "cpu"
