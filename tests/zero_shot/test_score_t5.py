"""`mlm-eval score` with a T5: lines with an encoder's input, and what is said of wrong ones."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support import configs, random_models
from support.ranks import run_ranks

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.engine import resume, score
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.resume import PartialScores
from mlm_eval.tasks.zero_shot.score import score_lines
from mlm_eval.tasks.zero_shot.sequences import read_lines

T5 = configs.T5
POSITIONS = T5.max_position_embeddings


def noise(count: int, seed: int) -> list[int]:
    return torch.randint(50, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


LINES: list[dict[str, Any]] = [
    {"encoder_tokens": noise(POSITIONS, 1), "tokens": noise(POSITIONS + 1, 2)},
    {"encoder_tokens": noise(7, 3), "encoder_mask": [1, 0, 1, 1, 1, 0, 0], "tokens": noise(4, 4)},
    {"encoder_tokens": noise(3, 5), "tokens": [9]},
    {"encoder_tokens": noise(2, 6), "tokens": noise(12, 7)},
    {"encoder_tokens": noise(7, 3), "encoder_mask": [1] * 7, "tokens": noise(4, 4)},
]


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def records(path: str, tp: int = 1, dp: int = 1, batch_tokens: int = 4096) -> list[dict[str, Any]]:
    engine = Engine.load(random_models.checkpoint(T5), tp=tp, dp=dp, batch_tokens=batch_tokens)
    return list(score_lines(engine, read_lines(Path(path), None, family="t5")))


def test_each_token_is_scored_given_the_encoder_and_the_ones_before(tmp_path: Path):
    model = random_models.on_one_rank(T5)
    for line, record in zip(LINES, records(str(write(tmp_path, *LINES))), strict=True):
        tokens = line["tokens"]
        assert {name: record[name] for name in line} == line
        assert set(record) - set(line) == {"logprobs", "greedy", "sum_logprob"}
        assert record["sum_logprob"] == math.fsum(record["logprobs"][1:])
        assert record["logprobs"][0] is None and record["greedy"][0] is None
        encoder = torch.tensor([line["encoder_tokens"]])
        mask = torch.tensor([line.get("encoder_mask", [1] * encoder.shape[1])])
        for t in range(1, len(tokens)):
            states = model(encoder, mask, torch.tensor([tokens[:t]]))
            expected = random_models.all_log_probs(model, states[:, -1:])[0, 0]
            assert record["logprobs"][t] == pytest.approx(float(expected[tokens[t]]), abs=2e-5)
            assert record["greedy"][t] is bool(expected.argmax() == tokens[t])


@pytest.mark.process
@pytest.mark.parametrize(("tp", "dp"), [(2, 2), (1, 3), (4, 1)])
def test_layout_and_batches_change_nothing(tp: int, dp: int, tmp_path: Path):
    path = str(write(tmp_path, *LINES))
    expected = records(path)
    for found in run_ranks(tp * dp, records, path, tp, dp, 40):
        for record, one in zip(found, expected, strict=True):
            assert record["logprobs"][1:] == pytest.approx(one["logprobs"][1:], abs=2e-5)
            assert record["greedy"] == one["greedy"]


def test_an_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was scored is kept, is not scored again, and stands at its line's place."""
    monkeypatch.setattr(resume, "FLUSH_SECONDS", -1.0)  # after every batch
    lines = read_lines(write(tmp_path, *LINES), None, family="t5")
    engine = Engine.load(random_models.checkpoint(T5), batch_tokens=2 * POSITIONS)
    whole = list(score_lines(engine, lines))
    original, allowed, pairs = score.score_pairs, 2, []

    def score_pairs(model: Any, requests: Any, device: Any) -> Any:
        if len(pairs) == allowed:
            raise KeyboardInterrupt
        pairs.append(len(requests))
        return original(model, requests, device)

    monkeypatch.setattr(score, "score_pairs", score_pairs)
    with closing(PartialScores(tmp_path / "kept", {"task": "score"}, restart=False)) as partial:
        with pytest.raises(KeyboardInterrupt):
            list(score_lines(engine, lines, partial=partial))
    first, allowed = sum(pairs), 99
    pairs.clear()
    with closing(PartialScores(tmp_path / "kept", {"task": "score"}, restart=False)) as partial:
        again = list(score_lines(engine, lines, partial=partial))
    assert 0 < first < 4 and first + sum(pairs) == 4  # a line of one token is not scored
    assert again == whole


PAIR = {"encoder_tokens": [1, 2, 3], "tokens": [4, 5]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"tokens": [1, 2]}, "line 1 has no encoder_tokens, but this is a T5 .*; expected {.enc"),
        ({"text": "hello"}, "line 1 holds text, but a T5 takes ids; expected {.encoder_tokens.: "),
        ({**PAIR, "text": "x", "tokens": None}, "line 1 holds text, but a T5 takes ids"),
        ({"encoder_tokens": [1, 2]}, 'has neither "tokens", "text" nor "choices"'),
        ({**PAIR, "encoder_tokens": []}, "line 1: encoder_tokens holds no token"),
        ({**PAIR, "encoder_tokens": "abc"}, "encoder_tokens must be a list of integers"),
        ({**PAIR, "encoder_tokens": [[1]]}, "encoder_tokens must be a list of integers"),
        ({**PAIR, "encoder_tokens": [1, 50]}, "encoder_tokens holds id 50, outside the .* 50 rows"),
        ({**PAIR, "encoder_tokens": [-1]}, "encoder_tokens holds id -1, outside"),
        ({**PAIR, "encoder_tokens": [1] * 17}, "encoder_tokens has 17 tokens, .* at most 16; cut"),
        ({**PAIR, "encoder_mask": [1, 1]}, "encoder_mask and encoder_tokens differ in length"),
        ({**PAIR, "encoder_mask": [1, 2, 0]}, "encoder_mask holds a number that is neither"),
        ({**PAIR, "encoder_mask": [0, 0, 0]}, "encoder_mask keeps no token; leave it out"),
        ({**PAIR, "encoder_mask": True}, "encoder_mask must be a list of integers"),
        ({**PAIR, "tokens": [1, 50]}, "line 1 holds token id 50, outside"),
        ({**PAIR, "tokens": [1] * 18}, "line 1 has 18 tokens, the decoder takes at most 17; cut"),
        ({**PAIR, "tokentypes": [0, 0]}, "has BERT fields .* but this is a T5 checkpoint"),
        ({"choices": [[1], [2]], "encoder_tokens": [1]}, "has BERT fields .choices"),
    ],
)
def test_wrong_lines_are_named(line: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        records(str(write(tmp_path, line)))


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_other_models_take_no_encoders_input(family: str, tmp_path: Path):
    engine = Engine.load(random_models.checkpoint(getattr(configs, family.upper())))
    lines = read_lines(write(tmp_path, PAIR), None, family=family)
    with pytest.raises(InputError, match=f"line 1 has T5 fields .* this is a {family.upper()} "):
        list(score_lines(engine, lines))
