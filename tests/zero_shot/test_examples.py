"""`--save-examples`: a line for each passage or window, in the data's order, at every layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Run, read
from support.paths import SAMPLES
from support.ranks import run_ranks

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.engine.engine import Engine
from mlm_eval.tasks.zero_shot.lambada import LAMBADA, Lambada, accuracy_text, cloze_metrics
from mlm_eval.tasks.zero_shot.wikitext103 import WIKITEXT103

pytest_plugins = ["support.command_line_fixtures"]

PASSAGES = SAMPLES / "text" / "lambada.sample.jsonl"
WIKI = SAMPLES / "text" / "wiki.sample.tokens"
GPT = SAMPLES / "gpt"
LIMIT = 12


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_passage_has_its_target_and_the_models_answer(run: Run, tmp_path):
    saved, record = tmp_path / "examples.jsonl", tmp_path / "r.json"
    command = ("lambada", "--ckpt", GPT, "--data", PASSAGES, "--limit", LIMIT)
    command += ("--save-examples", saved)
    assert run(*command, "--output", record).code == 0
    found, metrics = lines(saved), read(record)["metrics"]
    texts = [json.loads(line)["text"] for line in PASSAGES.read_text().splitlines()]
    assert [(x["line"], x["passage"]) for x in found] == list(enumerate(texts[:LIMIT], start=1))
    for line in found:
        assert line["target"] == " " + line["passage"].split()[-1]
        assert line["correct"] == (line["answer"] == line["target"])
    hits = sum(line["correct"] for line in found)
    assert hits == metrics["num_correct"] and 0 < hits < LIMIT
    total = math.fsum(line["logprob"] for line in found)
    assert -total == pytest.approx(metrics["nll_sum"], rel=1e-9)

    before = saved.read_bytes()
    again = run(*command)
    assert (
        again.code == 2
        and "examples.jsonl exists already; replace it with --overwrite" in again.err
    )
    assert saved.read_bytes() == before
    fewer = run(*command[:-3], 2, *command[-2:], "--overwrite")
    assert fewer.code == 2 and "12 results, which a limited run never replaces" in fewer.err
    assert run(*command, "--overwrite").code == 0 and saved.read_bytes() == before


def of_layout(tp: int, dp: int) -> list[dict[str, Any]]:
    """Return the lines that a rank makes of the first passages."""
    engine = Engine.load(open_checkpoint(GPT), tp=tp, dp=dp)
    tokenizer, found = engine.tokenizer, []
    assert tokenizer is not None
    own = LAMBADA.options(data=str(PASSAGES))
    config = engine.checkpoint.config
    work = LAMBADA.work_for(config, own, tokenizer=tokenizer, limit=LIMIT)
    LAMBADA.score(
        engine,
        work,
        tokenizer=tokenizer,
        on_scores=lambda scores: found.extend(LAMBADA.examples(engine, work, scores, tokenizer)),
    )
    return found


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2)])
def test_the_lines_are_the_same_at_every_layout(tp, dp):
    (alone,) = run_ranks(1, of_layout, 1, 1)
    for mine in run_ranks(2, of_layout, tp, dp):
        for line, expected in zip(mine, alone, strict=True):
            assert line.pop("logprob") == pytest.approx(expected["logprob"], abs=1e-3)
            assert line == {k: v for k, v in expected.items() if k != "logprob"}


def test_windows_tell_the_text_that_they_score(run: Run, tmp_path):
    """All of them together: the whole text but its first token."""
    text, saved, record = tmp_path / "wiki.tokens", tmp_path / "w.jsonl", tmp_path / "r.json"
    text.write_text(WIKI.read_text()[:1500])
    command = ("wikitext103", "--ckpt", GPT, "--data", text, "--seq-length", 64, "--output", record)
    assert run(*command, "--save-examples", saved).code == 0
    found, result = lines(saved), read(record)
    counts = result["counts"]
    assert [x["window"] for x in found] == list(range(counts["windows"]))
    assert [x["first_token"] for x in found][:3] == [1, 65, 97]
    assert sum(x["tokens"] for x in found) == counts["scored_tokens"]
    total = math.fsum(x["logprob"] for x in found)
    assert -total == pytest.approx(result["metrics"]["nll_sum"], rel=1e-9)
    engine = Engine.load(open_checkpoint(GPT))
    work = WIKITEXT103.work_for(
        engine.checkpoint.config,
        WIKITEXT103.options(data=str(text), seq_length=64),
        tokenizer=engine.tokenizer,
        limit=None,
    )
    whole = engine.tokenizer.decode(
        token for r in work.requests for token in r.tokens[-r.num_scored :].tolist()
    )
    assert "".join(x["text"] for x in found) == whole


def test_a_run_that_ends_before_its_answers_leaves_no_line_and_is_resumed(
    run: Run, tmp_path, monkeypatch
):
    saved, record = tmp_path / "examples.jsonl", tmp_path / "r.json"
    command = ("lambada", "--ckpt", GPT, "--data", PASSAGES, "--limit", 4)
    command += ("--save-examples", saved, "--output", record)

    def ends(*_: Any) -> Any:
        raise InputError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Lambada, "examples", ends)
        assert run(*command).code == 2
    assert not saved.exists() and not record.exists()
    done = run(*command)
    assert done.code == 0 and "resumes at 100 %: 4 of 4 are done" in done.err
    assert len(lines(saved)) == 4 and record.exists()


@pytest.mark.parametrize(
    ("hits", "examples", "text"),
    [
        (10, 67, "14.93 % +- 4.39 (10 of 67)"),
        (0, 8, "0.00 % (0 of 8; at most 32.4 % with 95 % confidence)"),
        (8, 8, "100.00 % (8 of 8; at least 67.6 % with 95 % confidence)"),
        (1, 1, "100.00 % (1 of 1; at least 20.7 % with 95 % confidence)"),
    ],
)
def test_no_hit_and_hits_only_are_shown_with_a_bound(hits, examples, text):
    metrics = cloze_metrics(hits, examples=examples, nll_sum=1.0)
    assert accuracy_text(metrics, examples) == text
