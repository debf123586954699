"""LAMBADA: how a passage is cut, what counts as a hit, and its data.

All of it is held to docs/megatron.md, "LAMBADA".
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.random_models import byte_vocabulary
from support.runs.scripted_engine import NothingDone, ScriptedEngine, log_prob

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer
from mlm_eval.engine.engine import Engine
from mlm_eval.reporting.results import Result
from mlm_eval.tasks.zero_shot import lambada
from mlm_eval.tasks.zero_shot.benchmark import Work
from mlm_eval.tasks.zero_shot.lambada import LAMBADA, ClozeOptions

PASSAGES = ["the cat saw a dog", "one\ntwo  three two", "a b", 'he said "no"', "x yy zzz ww\n"]


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    """A byte-level vocabulary without merges: one id a byte."""
    return load_tokenizer(directory=byte_vocabulary(tmp_path / "vocabulary"))


def write_lines(path: Path, passages: list[str] = PASSAGES) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    return path


def prepare(
    data: str | Path | None,
    *,
    tokenizer: Tokenizer,
    positions: int,
    limit: int | None = None,
    **options: Any,
) -> Work:
    """Return the requests for a model with this tokenizer's vocabulary."""
    sizes: Any = SimpleNamespace(
        family="gpt", vocab_size=tokenizer.vocab_size, max_position_embeddings=positions
    )
    own = ClozeOptions(data=None if data is None else str(data), **options)
    return LAMBADA.work_for(sizes, own, tokenizer=tokenizer, limit=limit)


@pytest.mark.parametrize(
    ("text", "context", "word"),
    [
        ("the cat saw", "the cat", " saw"),
        ("the cat\nsaw", "the cat", " saw"),  # the blank before the word becomes one space
        ("  the cat \n saw \n", "the cat", " saw"),
        ("a saw b saw", "a saw b", " saw"),  # the last of several places
        ("in a", "in", " a"),
        ('x "you?"', "x", ' "you?"'),
        ("tab\tsep\u00a0end", "tab\tsep", " end"),  # any white space parts words
    ],
)
def test_the_last_word_and_what_stands_before_it(tokenizer, text, context, word):
    found = lambada.split_target(text, tokenizer, target="word")
    assert found == (tokenizer.encode(context), tokenizer.encode(word))


def test_megatrons_default_target_is_the_last_token_of_the_text_as_it_is(tokenizer):
    context, label = lambada.split_target("the cat \n", tokenizer, target="last-token")
    assert context + label == tokenizer.encode("the cat \n")
    assert label == tokenizer.encode("\n")


@pytest.mark.parametrize(
    ("misses", "correct"),
    [
        (set(), 5),
        ({(0, 1)}, 4),  # the last token of " dog"
        ({(0, 4), (3, 2)}, 3),  # its first, the space; and one inside ' "no"'
        ({(0, 1), (0, 2), (0, 3), (0, 4)}, 4),  # four misses in one word are one miss
        ({(n, 1) for n in range(5)}, 0),
    ],
)
def test_a_word_counts_only_if_all_its_tokens_are_greedy(tmp_path, tokenizer, misses, correct):
    engine = ScriptedEngine(misses)
    result = LAMBADA.evaluate(engine, write_lines(tmp_path / "f.jsonl"), tokenizer=tokenizer)
    assert result.metrics["num_correct"] == correct
    assert result.metrics["accuracy"] == correct / 5
    hits = [1.0] * correct + [0.0] * (5 - correct)
    assert result.metrics["accuracy_stderr"] == pytest.approx(
        statistics.stdev(hits) / math.sqrt(5), abs=1e-15
    )


@pytest.mark.parametrize("target", ["word", "last-token"])
def test_every_passage_is_scored_once_in_order(tmp_path, tokenizer, target):
    engine = ScriptedEngine()
    path = write_lines(tmp_path / "f.jsonl")
    result = LAMBADA.evaluate(engine, path, tokenizer=tokenizer, target=target)

    nll, target_tokens = 0.0, 0
    for text, request in zip(PASSAGES, engine.scored, strict=True):
        context, label = lambada.split_target(text, tokenizer, target=target)
        assert request.tokens.dtype == torch.int64
        assert request.tokens.tolist() == context + label
        assert request.num_scored == len(label)
        target_tokens += len(label)
        for place in range(len(label)):
            nll -= log_prob(tuple(context + label[:place]), label[place])
    assert result.metrics["nll_sum"] == nll
    assert result.metrics["target_ppl"] == pytest.approx(math.exp(nll / 5), rel=1e-12)
    assert result.counts == {"examples": 5, "target_tokens": target_tokens, "truncated": 0}
    assert (
        result.protocol == {"word": "megatron-paper", "last-token": "megatron-last-token"}[target]
    )
    assert result.settings["target"] == target


def test_a_single_passage_has_no_standard_error(tmp_path, tokenizer):
    result = LAMBADA.evaluate(
        ScriptedEngine(), write_lines(tmp_path / "f.jsonl"), tokenizer=tokenizer, limit=1
    )
    assert math.isnan(result.metrics["accuracy_stderr"])
    metrics = json.loads(result.to_json())["metrics"]
    assert metrics["accuracy_stderr"] is None
    assert "more than one example" in metrics["accuracy_stderr_note"]
    assert metrics["accuracy"] == 1.0


def test_limit_keeps_the_first_passages_and_says_so(tmp_path, tokenizer):
    path = write_lines(tmp_path / "f.jsonl")
    engine = ScriptedEngine({(1, 1)})
    result = LAMBADA.evaluate(engine, path, tokenizer=tokenizer, limit=2)
    assert result.counts["examples"] == len(engine.scored) == 2
    assert result.metrics["accuracy"] == 0.5
    assert result.settings["limit"] == 2
    assert result.settings["data"]["examples"] == 5
    assert any("only the first 2 of 5 passages" in warning for warning in result.warnings)


def test_a_passage_too_long_keeps_its_end(tmp_path, tokenizer):
    words = "one two three four five six"
    path = write_lines(tmp_path / "f.jsonl", [words, "a b", f"{words} e"])
    engine = ScriptedEngine(positions=12)
    result = LAMBADA.evaluate(engine, path, tokenizer=tokenizer)
    assert engine.scored[0].tokens.tolist() == tokenizer.encode(words)[-13:]
    assert engine.scored[0].num_scored == 4
    assert engine.scored[1].tokens.tolist() == tokenizer.encode("a b")
    assert len(engine.scored[2].tokens) == 13
    assert result.counts["truncated"] == 2
    (warning,) = result.settings["warnings"]
    assert "2 passages are longer than the model's 12 positions" in warning
    exact = prepare(path, tokenizer=tokenizer, positions=len(words) - 1)
    assert (
        exact.counts["truncated"] == 1
    )  # positions + 1 tokens fit: the last one is only predicted


def test_a_word_longer_than_the_model_is_refused(tmp_path, tokenizer):
    path = write_lines(tmp_path / "f.jsonl", ["a b", "a abcdef"])
    with pytest.raises(InputError, match="f.jsonl, line 2: the last word has 7 tokens"):
        prepare(path, tokenizer=tokenizer, positions=6)
    assert prepare(path, tokenizer=tokenizer, positions=7).requests[1].num_scored == 7


@pytest.mark.parametrize("text", ["alone", " alone ", "", " \n "])
def test_a_passage_without_context_is_refused(tmp_path, tokenizer, text):
    path = write_lines(tmp_path / "f.jsonl", ["a b", text])
    with pytest.raises(InputError, match="f.jsonl, line 2: .* has no context before its last word"):
        prepare(path, tokenizer=tokenizer, positions=64)


@pytest.mark.parametrize("text", ["", "x"])
def test_a_passage_of_one_token_has_none_either(tmp_path, tokenizer, text):
    path = write_lines(tmp_path / "f.jsonl", ["a b", text])
    with pytest.raises(InputError, match="line 2: .* before its last token"):
        prepare(path, tokenizer=tokenizer, positions=64, target="last-token")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a b"', "line 3 is not JSON .*column 15."),
        ("a b", "line 3 is not JSON"),
        ('["a b"]', "line 3 holds .*expected a JSON object"),
        ('{"txt": "a b"}', "line 3: 'text' is missing; expected a string"),
        ('{"text": 7}', "line 3: 'text' is 7; expected a string"),
        ('{"text": "a \\ud800"}', "line 3 holds half of a surrogate pair"),
    ],
)
def test_malformed_lines_are_named(tmp_path, tokenizer, line, message):
    path = tmp_path / "f.jsonl"
    path.write_text(f'{{"text": "a b"}}\n\n{line}\n{{"text": "c d"}}\n')
    with pytest.raises(InputError, match=f"f.jsonl, {message}"):
        prepare(path, tokenizer=tokenizer, positions=64)


def test_lines_end_at_newlines_alone(tmp_path, tokenizer):
    path = tmp_path / "f.jsonl"
    texts = ["one\u2028two three", "four\x85five six", "seven\x0ceight nine"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes("\r\n".join(lines).encode())
    work = prepare(path, tokenizer=tokenizer, positions=64)
    assert [tokenizer.decode(r.tokens.tolist()) for r in work.requests] == texts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "words"}, "--target words is unknown; choose word or last-token"),
        ({"limit": 0}, "--limit 0"),
    ],
)
def test_settings_out_of_range(tmp_path, tokenizer, settings, message):
    path = write_lines(tmp_path / "f.jsonl")
    with pytest.raises(InputError, match=message):
        prepare(path, tokenizer=tokenizer, positions=64, **settings)


def test_record_and_what_is_passed_to_the_engine(tmp_path, tokenizer):
    path = write_lines(tmp_path / "f.jsonl")
    engine = ScriptedEngine()
    progress, partial = object(), NothingDone()
    result = LAMBADA.evaluate(
        engine, path, tokenizer=tokenizer, on_progress=progress, partial=partial
    )  # fmt: skip
    assert engine.passed == {"on_progress": progress, "partial": partial}
    record = json.loads(result.to_json())
    assert record["task"] == "lambada"
    assert {"accuracy", "accuracy_stderr", "num_correct", "target_ppl"} <= set(record["metrics"])
    assert record["settings"]["data"] == {
        "path": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "examples": 5,
        "paper_file": False,
        "warnings": record["settings"]["data"]["warnings"],
    }
    assert "is not the paper's file (5 passages" in record["settings"]["data"]["warnings"][0]
    assert record["settings"]["tokenizer"]["kind"] == "gpt2-bpe"
    assert record["timing"]["eval_seconds"] == 0.5


def test_a_set_gives_the_requests_and_the_digest_of_the_file(tmp_path, tokenizer):
    import datasets

    passages = [*PASSAGES, 'caf\u00e9 \U0001f600 "\\ end']
    path = write_lines(tmp_path / "f.jsonl", passages)
    datasets.Dataset.from_dict({"text": passages}).save_to_disk(tmp_path / "set")
    from_file = prepare(path, tokenizer=tokenizer, positions=64)
    from_set = prepare(tmp_path / "set", tokenizer=tokenizer, positions=64)
    assert [r.tokens.tolist() for r in from_set.requests] == [
        r.tokens.tolist() for r in from_file.requests
    ]
    assert from_set.settings["data"]["sha256"] == from_file.settings["data"]["sha256"]


def test_the_default_is_openais_text_on_the_hub(tokenizer, monkeypatch):
    import datasets

    calls = []

    def offline(path: str, config: str | None, *, split: str) -> None:
        calls.append((path, config, split))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for data in (None, "lambada_openai"):
        with pytest.raises(
            InputError, match="EleutherAI/lambada_openai:test is not in the local cache.*--data"
        ):
            prepare(data, tokenizer=tokenizer, positions=64)
    assert calls == [("EleutherAI/lambada_openai", None, "test")] * 2


def test_megatrons_line():
    """As Megatron v2.5 printed it for the small file (oracles/README.md)."""
    metrics = lambada.cloze_metrics(54, examples=120, nll_sum=1.0)
    result = Result("lambada", "megatron-paper", metrics, {"examples": 120}, {}, {}, {}, {})
    assert LAMBADA.megatron_line(result) == (
        " validation results on LAMBADA | number correct: 5.4000E+01 | "
        "total examples: 1.2000E+02 | avg accuracy: 4.5000E-01"
    )


@pytest.mark.realdata
def test_the_papers_file(shared_data, tmp_path):
    import datasets

    gpt2 = load_tokenizer(directory=shared_data / "gpt2")
    path = shared_data / "lambada" / "lambada_test.jsonl"
    work = prepare(path, tokenizer=gpt2, positions=1024)
    assert work.settings["data"]["paper_file"] is True
    assert work.settings["data"]["examples"] == len(work.requests) == 5_153
    assert work.settings["data"]["warnings"] == work.settings["warnings"] == []
    assert Counter(r.num_scored for r in work.requests) == {1: 4_013, 2: 913, 3: 208, 4: 16, 5: 3}
    assert max(r.tokens.numel() for r in work.requests) == 224

    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    whole = [gpt2.encode(text) for text in texts]
    same = sum(t == r.tokens.tolist() for t, r in zip(whole, work.requests, strict=True))
    assert same == 5_146
    last = prepare(path, tokenizer=gpt2, positions=1024, target="last-token")
    assert [r.tokens.tolist() for r in last.requests] == whole
    assert {r.num_scored for r in last.requests} == {1}

    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "set")
    from_set = prepare(tmp_path / "set", tokenizer=gpt2, positions=1024, limit=1)
    assert from_set.settings["data"]["sha256"] == lambada.PAPER_DIGEST
    assert from_set.settings["data"]["paper_file"] is True


@pytest.mark.realdata
def test_the_small_file_that_megatron_ran(shared_data, oracles):
    gpt2 = load_tokenizer(directory=shared_data / "gpt2")
    work = prepare(oracles / "zeroshot" / "lambada_small.jsonl", tokenizer=gpt2, positions=256)
    assert len(work.requests) == 120
    assert max(r.tokens.numel() for r in work.requests) <= 101
    assert work.counts["truncated"] == 0

    engine = Engine.load(open_checkpoint(oracles / "v25_gpt2vocab_tp2_trained"))
    result = LAMBADA.score(engine, work, tokenizer=gpt2)
    assert LAMBADA.megatron_line(result) == (
        " validation results on LAMBADA | number correct: 5.4000E+01 | "
        "total examples: 1.2000E+02 | avg accuracy: 4.5000E-01"
    )
