"""`--bos`: where the begin-of-text token stands, what is scored then, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bos_tokenizers import tokenizer_json
from support.runs.scripted_engine import ScriptedEngine

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.harness.hub_encoding import HubEncoding
from mlm_eval.tasks.zero_shot.benchmark import Work
from mlm_eval.tasks.zero_shot.generation import prompt_line, read_prompts
from mlm_eval.tasks.zero_shot.lambada import LAMBADA
from mlm_eval.tasks.zero_shot.score import score_lines
from mlm_eval.tasks.zero_shot.sequences import GivenSequences, parse_lines
from mlm_eval.tasks.zero_shot.wikitext103 import WIKITEXT103

BOS = 256


@pytest.fixture
def adding(tmp_path: Path) -> Tokenizer:
    return tokenizer_json(tmp_path / "adding", begins=True)


@pytest.fixture
def plain(tmp_path: Path) -> Tokenizer:
    return tokenizer_json(tmp_path / "plain", begins=False, bos_token="<bos>")


def work_of(benchmark: Any, tokenizer: Tokenizer, text: str, tmp_path: Path, **said: Any) -> Work:
    data = tmp_path / "data"
    data.write_text(text)
    engine = ScriptedEngine(positions=said.pop("positions", 64), vocab_size=300)
    options = benchmark.options(data=str(data), **said)
    work: Work = benchmark.work_for(
        engine.checkpoint.config, options, tokenizer=tokenizer, limit=None
    )
    return work


def rows(work: Work) -> list[list[int]]:
    return [request.tokens.tolist() for request in work.requests]


def test_each_window_of_wikitext_begins_with_it_and_scores_the_same_tokens(
    plain: Tokenizer, tmp_path: Path
):
    text = "ab cd ef gh"
    ids = plain.encode(text)
    with_it = work_of(WIKITEXT103, plain, text, tmp_path, bos="yes", seq_length=5, stride=2)
    # Windows read the token and four of the text; a further one scores its last two targets.
    assert rows(with_it) == [
        [BOS, *ids[0:5]],
        [BOS, *ids[2:7]],
        [BOS, *ids[4:9]],
        [BOS, *ids[6:11]],
    ]
    assert [request.num_scored for request in with_it.requests] == [4, 2, 2, 2]
    without = work_of(WIKITEXT103, plain, text, tmp_path, bos="no", seq_length=5, stride=2)
    assert without.counts["scored_tokens"] == with_it.counts["scored_tokens"] == len(ids) - 1
    assert BOS not in {token for row in rows(without) for token in row}


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_no_window_is_longer_than_asked_and_every_target_is_scored_once(
    stride: int, plain: Tokenizer, tmp_path: Path
):
    text = "a text of some words that is cut into windows"
    ids = plain.encode(text)
    work = work_of(WIKITEXT103, plain, text, tmp_path, bos="yes", seq_length=8, stride=stride)
    targets: list[int] = []
    for request in work.requests:
        tokens = request.tokens.tolist()
        assert tokens[0] == BOS and len(tokens) <= 9 and request.num_scored < len(tokens) - 1
        targets += tokens[-request.num_scored :]
    assert targets == ids[1:]


def test_windows_without_room_are_refused(plain: Tokenizer, tmp_path: Path):
    for said, message in (
        ({"seq_length": 1, "stride": 1}, "no room for the begin-of-text token"),
        ({"seq_length": 4, "stride": 4}, "--stride 4: windows read 3 tokens; choose 1 to 3"),
    ):
        with pytest.raises(InputError, match=message):
            work_of(WIKITEXT103, plain, "ab cd", tmp_path, bos="yes", **said)


def test_each_passage_of_lambada_begins_with_it_also_where_it_is_cut(
    plain: Tokenizer, tmp_path: Path
):
    passages = ["the cat sat on it", "a long passage that is cut from the left now"]
    text = "".join(json.dumps({"text": passage}) + "\n" for passage in passages)
    work = work_of(LAMBADA, plain, text, tmp_path, bos="yes", positions=20)
    ids = plain.encode(passages[1])
    assert rows(work)[0] == [BOS, *plain.encode(passages[0])]
    assert rows(work)[1] == [BOS, *ids[-20:]]
    assert [request.num_scored for request in work.requests] == [3, 4]
    assert work.counts["truncated"] == 1


@pytest.mark.parametrize("benchmark", [WIKITEXT103, LAMBADA])
def test_records_say_what_was_asked_and_done(benchmark: Any, adding: Tokenizer, tmp_path: Path):
    text = '{"text": "the cat sat"}\n' if benchmark is LAMBADA else "the cat sat"
    more: dict[str, Any] = {} if benchmark is LAMBADA else {"seq_length": 8, "stride": 2}
    found = {}
    for asked in ("auto", "yes", "no"):
        work = work_of(benchmark, adding, text, tmp_path, bos=asked, **more)
        assert work.settings["bos"] == asked
        result = benchmark.score(ScriptedEngine(vocab_size=300), work, tokenizer=adding)
        told = [warning for warning in result.warnings if "before a text" in warning]
        found[asked] = (work.settings["bos_id"], result.protocol, len(told))
    assert found == {
        "auto": (None, "megatron-paper", 1),
        "yes": (BOS, "megatron-paper, BOS", 0),
        "no": (None, "megatron-paper", 0),
    }


def test_texts_that_are_scored_begin_with_it_and_given_tokens_do_not(plain: Tokenizer):
    text = '{"text": "abc"}\n{"tokens": [1, 2, 3]}\n'
    lines = parse_lines(GivenSequences("x", text.encode()), plain, begin=[BOS])
    engine = ScriptedEngine(vocab_size=300)
    first, second = score_lines(engine, lines)
    assert first["tokens"] == [BOS, *plain.encode("abc")] and first["bos_id"] == BOS
    assert first["logprobs"][0] is None and None not in first["logprobs"][1:]
    assert second["tokens"] == [1, 2, 3] and "bos_id" not in second


def test_every_window_of_a_long_text_begins_with_it(plain: Tokenizer):
    lines = parse_lines(GivenSequences("x", b'{"text": "abcdefghij"}\n'), plain, begin=[BOS])
    engine = ScriptedEngine(positions=4, vocab_size=300)
    [record] = score_lines(engine, lines, stride=2)
    ids = plain.encode("abcdefghij")
    assert [request.tokens.tolist() for request in engine.scored] == [
        [BOS, *ids[0:4]],
        [BOS, *ids[2:6]],
        [BOS, *ids[4:8]],
        [BOS, *ids[6:10]],
    ]
    assert [request.num_scored for request in engine.scored] == [4, 2, 2, 2]
    assert len(record["logprobs"]) == 11


def test_prompts_begin_with_it_and_given_tokens_do_not(plain: Tokenizer, tmp_path: Path):
    line = prompt_line("ab", plain, "x", [BOS])
    assert line.tokens == [BOS, *plain.encode("ab")] and line.bos_id == BOS and line.text == "ab"
    (tmp_path / "in").write_text('{"prompt": "ab", "id": 7}\n{"tokens": [5]}\n')
    first, second = read_prompts(tmp_path / "in", plain, begin=[BOS])
    assert first.tokens[0] == BOS and first.fields == {"prompt": "ab", "id": 7}
    assert second.tokens == [5] and second.bos_id is None


def test_the_harness_follows_the_tokenizer_unless_it_is_told(adding: Tokenizer, plain: Tokenizer):
    assert HubEncoding(adding).encode("a")[0] == BOS
    assert HubEncoding(plain).encode("a")[0] != BOS
    assert HubEncoding(plain, add_bos=True).encode("a")[0] == BOS
    assert HubEncoding(adding, add_bos=False).encode("a")[0] != BOS
    assert HubEncoding(adding).begin() == {"bos": "auto", "bos_id": BOS}
    assert HubEncoding(plain).begin() == {"bos": "auto", "bos_id": None}
    assert HubEncoding(plain, add_bos=True).begin() == {"bos": "yes", "bos_id": BOS}
    assert HubEncoding(adding, add_bos=False).begin() == {"bos": "no", "bos_id": None}


def test_a_window_without_it_stays_a_view(plain: Tokenizer, tmp_path: Path):
    work = work_of(WIKITEXT103, plain, "ab cd ef", tmp_path, seq_length=4, stride=2)
    storages = {request.tokens.untyped_storage().data_ptr() for request in work.requests}
    assert len(storages) == 1
    assert all(request.tokens.dtype == torch.int64 for request in work.requests)
