"""verify as a command: what it says of models that differ where a short probe does not look."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_models
from support.command_line import Run, assert_one_sentence, read
from support.configs import BERT, GPT, LLAMA

from mlm_eval.checkpoints.config import ModelConfig, RopeScaling
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.open import open_checkpoint

pytest_plugins = ["support.command_line_fixtures"]

WORDS = "embedding.word_embeddings.weight"
LONG = dataclasses.replace(GPT, max_position_embeddings=256, vocab_size=300)
ROTARY = dataclasses.replace(LLAMA, vocab_size=300, rotary_base=500_000.0)


def save(place: Path, model: ModelConfig, state: dict[str, Any], **sizes: int) -> Path:
    return write_megatron_torch(random_models.checkpoint(model, state), place, **sizes)


def test_models_that_a_short_probe_calls_the_same(run: Run, tmp_path: Path) -> None:
    """Late positions, rows of an untied input table, and how rotary frequencies are stretched."""
    state = random_models.state_dict(LONG, std=0.02)
    positions = "embedding.position_embeddings.weight"
    late = state[positions].clone()
    late[64:] += 0.01
    untied = random_models.state_dict(ROTARY, std=0.02)
    words = untied[WORDS].clone()
    words[290] += 0.01
    save(tmp_path / "a", LONG, state, tp=2)
    save(tmp_path / "late", LONG, {**state, positions: late})
    save(tmp_path / "u", ROTARY, untied)
    save(tmp_path / "words", ROTARY, {**untied, WORDS: words}, tp=2)
    save(tmp_path / "stretched", dataclasses.replace(ROTARY, rope_scaling=RopeScaling()), untied)
    for one, other, said in (
        ("a", "late", f"{positions} [64, 0]"),
        ("u", "words", f"{WORDS} [290, 0]"),
        ("u", "stretched", "rope_scaling is None in --ckpt and RopeScaling(factor=8.0"),
    ):
        ended = run("verify", "--ckpt", tmp_path / one, "--against", tmp_path / other)
        assert ended.code == 3 and ended.out.startswith("verdict: DIFFERENT\n"), ended
        assert said in ended.out.splitlines()[1]
        ended = run("verify", "--ckpt", tmp_path / one, "--against", tmp_path / one)
        assert ended.code == 0 and ended.out.startswith("verdict: the same\n"), ended


@pytest.mark.parametrize("model", [LONG, ROTARY, dataclasses.replace(BERT, vocab_size=300)])
def test_there_and_back_is_the_same_but_for_its_padding(
    model: ModelConfig, run: Run, tmp_path: Path
) -> None:
    """Padding is lost on the way to Hugging Face, and made anew on the way back."""
    save(tmp_path / "a", model, random_models.state_dict(model), tp=2)
    if model.family == "gpt":
        words = random_models.byte_vocabulary(tmp_path / "a" / "tokenizer")
    else:
        words = tmp_path / "a" / "tokenizer"
        words.mkdir()
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"p{n}" for n in range(251))]
        (words / "vocab.txt").write_text("\n".join(pieces))
    convert(open_checkpoint(tmp_path / "a"), "hf", tmp_path / "hf", tokenizer=words)
    hf = open_checkpoint(tmp_path / "hf")
    assert hf.config.vocab_size == 256
    convert(hf, "megatron", tmp_path / "m", tp=4, pp=2, vocab="true", tokenizer=words)
    sides = ["--ckpt", tmp_path / "a", "--against"]
    for other, rows in (("hf", 256), ("m", 512)):
        output = tmp_path / f"{other}.json"
        ended = run("verify", *sides, tmp_path / other, "--output", output)
        assert ended.code == 0, ended
        assert ended.out.startswith("verdict: the same over the first 256 rows of the vocabulary\n")
        record = read(output)
        assert record["same"] and record["max_difference"] == 0.0 and not record["differences"]
        assert record["padding"] == {
            "entries": 256,
            "rows": [44, rows - 256],
            "largest": record["padding"]["largest"],
            "same": False,
        }
        strict = run("verify", *sides, tmp_path / other, "--vocab", "padded")
        assert strict.code == 3 and "rows 256 to" in strict.out
    ended = run("verify", "--ckpt", tmp_path / "hf", "--against", tmp_path / "m")
    assert ended.code == 0 and "rows 256 to 511" in ended.out


def test_without_a_tokenizer_padding_is_not_guessed(run: Run, tmp_path: Path) -> None:
    state = random_models.state_dict(LONG)
    save(tmp_path / "a", LONG, state)
    wider = dataclasses.replace(LONG, vocab_size=320)
    rows = torch.cat([state[WORDS], torch.randn(20, LONG.hidden_size)])
    save(tmp_path / "b", wider, {**state, WORDS: rows})
    sides = ["verify", "--ckpt", tmp_path / "a", "--against", tmp_path / "b"]
    ended = run(*sides)
    assert ended.code == 3 and "--tokenizer DIR" in ended.out
    words = random_models.byte_vocabulary(tmp_path / "words")
    assert run(*sides, "--tokenizer", words).code == 0
    assert_one_sentence(run(*sides, "--vocab", "true"), "--vocab true needs the tokenizer's size")
    assert_one_sentence(run(*sides, "--vocab", "some"), "use padded or true")
    many = tmp_path / "many"
    many.mkdir()
    pieces = ["[UNK]", *(f"p{n}" for n in range(400))]
    (many / "vocab.txt").write_text("\n".join(pieces))
    assert_one_sentence(run(*sides, "--tokenizer", many), "401 entries", "320 rows")


def test_special_tokens_that_never_had_a_row_are_no_entries(run: Run, tmp_path: Path) -> None:
    """A padding token that a tokenizer's files name, which the shorter table has no row for."""
    state = random_models.state_dict(LONG)
    full = dataclasses.replace(LONG, vocab_size=256)
    words = random_models.byte_vocabulary(tmp_path / "words")
    (words / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    save(tmp_path / "a", LONG, state)
    for rows, code in ((256, 0), (255, 3)):
        shorter = dataclasses.replace(full, vocab_size=rows)
        save(tmp_path / f"b{rows}", shorter, {**state, WORDS: state[WORDS][:rows]})
        for sides in (("a", f"b{rows}"), (f"b{rows}", "a")):
            one, other = (tmp_path / side for side in sides)
            ended = run("verify", "--ckpt", one, "--against", other, "--tokenizer", words)
            assert ended.code == code, ended


def test_half_precision_is_said(run: Run, tmp_path: Path) -> None:
    source = random_models.checkpoint(ROTARY)
    for tp in (1, 2):
        convert(source, "megatron", tmp_path / f"wide{tp}", tp=tp)
        convert(source, "torch_dist", tmp_path / f"half{tp}", tp=3 - tp, dtype="float16")
        output = tmp_path / f"verify{tp}.json"
        sides = ["--ckpt", tmp_path / f"wide{tp}", "--against", tmp_path / f"half{tp}"]
        ended = run("verify", *sides, "--output", output)
        assert ended.code == 0, ended
        assert ended.out.startswith("verdict: the same, after rounding to float16\n")
        record = read(output)
        assert record["weights"]["rounded_to"] == ["float16"] and record["max_difference"] > 1e-5


def test_what_is_not_a_number_is_a_difference_that_can_be_written_down(
    run: Run, tmp_path: Path
) -> None:
    state = random_models.state_dict(LONG)
    name = "decoder.layers.1.mlp.linear_fc1.bias"
    broken = state[name].clone()
    broken[7] = torch.nan
    save(tmp_path / "a", LONG, {**state, name: broken}, tp=2)
    sides = ["--ckpt", tmp_path / "a", "--against", tmp_path / "a"]
    ended = run("verify", *sides, "--output", tmp_path / "verify.json")
    assert ended.code == 3 and f"layer 1: {name} [7] is nan in --ckpt, nan in" in ended.out, ended
    record = read(tmp_path / "verify.json")
    assert not record["same"] and record["max_difference"] is None
    first = record["weights"]["first"]
    assert (first["tensor"], first["index"], first["layer"]) == (name, [7], 1)


@pytest.mark.long
def test_an_approximation_is_called_what_it_is(run: Run, tmp_path: Path) -> None:
    model = dataclasses.replace(BERT, activation="gelu_tanh")
    save(tmp_path / "bert", model, random_models.state_dict(model))
    given = ["convert", "--ckpt", tmp_path / "bert", "--to", "hf", "--output", tmp_path / "hf"]
    ended = run(*given, "--allow-approximate")
    assert ended.code == 0, ended
    assert "verdict: approximate, as allowed\n" in ended.out and "DIFFERENT" not in ended.out
    assert "the LM head gets the tanh GELU too" in ended.out
    compared = run("verify", "--ckpt", tmp_path / "bert", "--against", tmp_path / "hf")
    assert compared.code == 3 and "head_activation is gelu in --ckpt" in compared.out
