"""The engine as a notebook uses it: texts in, figures and texts out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.paths import SAMPLES

import mlm_eval
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.prompts import Prompt
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


def test_a_name_or_a_path_is_opened(tmp_path: Path) -> None:
    named = mlm_eval.Engine.load("sample:gpt", device="cpu").checkpoint
    folder = mlm_eval.Engine.load(SAMPLES / "gpt", device="cpu").checkpoint
    assert named.provenance.digest == folder.provenance.digest
    with pytest.raises(mlm_eval.InputError, match="compare=verify_conversion"):
        mlm_eval.convert(named, "hf", tmp_path / "hf", verify=True)


def test_what_is_loaded_says_what_it_is(engine: Engine) -> None:
    assert repr(engine).startswith("Engine(gpt, 1,088,256 parameters, float32 on cpu, tp 1 x dp 1,")
    assert repr(engine.tokenizer).startswith("Tokenizer(gpt2-bpe, 2,000 entries, '")
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


# --- every task by one call ---------------------------------------------------------------------

SHORT = {"max_steps": 1, "seq_length": 32, "global_batch": 2}


@pytest.mark.long
def test_a_task_is_trained_and_evaluated_by_one_call(tmp_path: Path) -> None:
    """Options of the recipe and of the run go by one set of names, as on the command line."""
    bert = mlm_eval.Engine.load(mlm_eval.open_checkpoint("sample:bert"), device="cpu")
    limits = {"train_limit": 8, "dev_limit": 2, "test_limit": 2, "seq_length": 32}
    more = {"max_steps": 1, "global_batch": 4, "lr": 1e-4, **limits}
    data = SAMPLES / "race"
    trained = mlm_eval.evaluate("race", bert, data=data, output_dir=tmp_path / "o", **more)
    assert trained.settings["lr"] == 1e-4 and trained.counts["steps"] == 1
    tuned = mlm_eval.Engine.load(
        mlm_eval.open_checkpoint(tmp_path / "o" / "checkpoint"), device="cpu"
    )
    again = mlm_eval.evaluate(
        "race",
        tuned,
        tokenizer=bert.tokenizer,
        dev=str(data / "RACE" / "dev") if (data / "RACE").exists() else str(data / "dev"),
        output_dir=tmp_path / "e",
        eval_only=True,
        dev_limit=2,
        seq_length=32,
    )
    assert again.metrics["dev"]["total"] == trained.metrics["dev"]["total"]
    # The parameters of one model are the same number in both.
    used = [result.counts["model_parameters"] for result in (trained, again)]
    assert used == [again.checkpoint["num_parameters"]] * 2
    assert trained.checkpoint["num_parameters"] > used[0]
    with pytest.raises(mlm_eval.InputError, match="race has no option epoch; did you mean epochs"):
        mlm_eval.evaluate("race", bert, data=data, output_dir=tmp_path / "x", epoch=1)
    with pytest.raises(mlm_eval.InputError, match="give output_dir=FOLDER"):
        mlm_eval.evaluate("squad", bert, data=data)


def test_language_modelling_leaves_the_engine_as_it_was(engine: Engine, tmp_path: Path) -> None:
    before = [parameter.clone() for parameter in engine.model.parameters()]
    text = str(SAMPLES / "text" / "wiki.sample.tokens")
    result = mlm_eval.evaluate("lm", engine, data=text, output_dir=tmp_path / "o", **SHORT)
    assert result.task == "lm" and result.counts["steps"] == 1
    assert all(map(torch.equal, before, engine.model.parameters()))
    with pytest.raises(mlm_eval.InputError, match="lm is trained on text; give data=FILE"):
        mlm_eval.evaluate("lm", engine, output_dir=tmp_path / "p")
    with pytest.raises(mlm_eval.InputError, match="mlm has no option mask_prob; did you mean mask"):
        mlm_eval.evaluate("mlm", engine, data=text, output_dir=tmp_path / "p", mask_prob=1)
    assert not (tmp_path / "p").exists()


def test_a_zero_shot_task_takes_the_options_of_its_command(engine: Engine) -> None:
    data = SAMPLES / "text" / "lambada.sample.jsonl"
    result = mlm_eval.evaluate("lambada", engine, data=data, limit=2, target="last-token")
    assert result.settings["target"] == "last-token"
    assert repr(result).startswith("Result(lambada, megatron-last-token: accuracy=")
    assert len(repr(result)) < 400
    with pytest.raises(
        mlm_eval.InputError, match="lambada has no option stride; it has bos, limit"
    ):
        mlm_eval.evaluate("lambada", engine, data=data, stride=3)


def test_an_unknown_task_is_refused_with_a_tokenizer_too(engine: Engine, tmp_path: Path) -> None:
    given = {"data": "x", "output_dir": tmp_path / "o", "tokenizer": engine.tokenizer}
    for more in ({}, given):
        with pytest.raises(mlm_eval.InputError, match="no task 'squadd'; evaluate knows wikitext"):
            mlm_eval.evaluate("squadd", engine, **more)
    assert not (tmp_path / "o").exists()
