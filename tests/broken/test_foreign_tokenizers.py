"""Tokenizers that cannot be a model's: every command that reads texts refuses them or warns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import random_models
from support.command_line import CONFIG, Run, assert_one_sentence

from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.tokenizer import check_fits, load_tokenizer

pytest_plugins = ["support.command_line_fixtures"]

LETTERS = [*"abcdefghijklmnopqrstuvwxyzTĠĊ0123456789.,'-=@<>", "<|endoftext|>"]
COMMANDS = ("wikitext103", "lambada", "score", "generate", "convert")


def bpe(folder: Path, entries: dict[str, int]) -> Path:
    """Write a vocabulary of bytes and no merges."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(entries))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def word_pieces(folder: Path) -> Path:
    """Write a vocabulary of BERT's."""
    folder.mkdir()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    return folder


@pytest.fixture
def commands(folder: Path, tmp_path: Path) -> Callable[[Path], dict[str, list[object]]]:
    """Return the command lines that read texts by a tokenizer of 1,024 rows' model."""
    config = dataclasses.replace(CONFIG, vocab_size=1024)
    model = tmp_path / "model"
    write_megatron_torch(random_models.checkpoint(config), model)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "the cat saw a dog"}\n')

    def make(tokenizer: Path) -> dict[str, list[object]]:
        own = ["--ckpt", model, "--tokenizer", tokenizer]
        return {
            "wikitext103": ["wikitext103", *own, "--data", folder / "wiki.tokens"],
            "lambada": ["lambada", *own, "--data", folder / "passages.jsonl"],
            "score": ["score", *own, "--input", lines, "--output", tmp_path / "scores.jsonl"],
            "generate": ["generate", *own, "--prompt", "the", "--max-new-tokens", 2],
            "convert": ["convert", *own, "--to", "hf", "--output", tmp_path / "hf"],
        }

    return make


@pytest.mark.parametrize("command", COMMANDS)
def test_word_pieces_for_a_gpt_are_warned_of(command, commands, run: Run, tmp_path):
    ended = run(*commands(word_pieces(tmp_path / "other"))[command])
    assert ended.code == 0, ended
    assert "other/vocab.txt is a vocabulary of BERT's word pieces and the model a GPT" in ended.err


@pytest.mark.parametrize("rows", ["its own", "padded"])
def test_word_pieces_of_the_models_size_are_its_tokenizer(rows, tmp_path):
    """GPTs are trained on word pieces too: their rows are the vocabulary's, or its padded ones."""
    tokenizer = load_tokenizer(directory=word_pieces(tmp_path / "own"))
    size = tokenizer.vocab_size
    assert (
        check_fits(tokenizer, size if rows == "its own" else -(-size // 128) * 128, "gpt") is None
    )
    assert check_fits(tokenizer, 50_304, "gpt") is not None


@pytest.mark.parametrize("command", COMMANDS)
def test_a_vocabulary_that_covers_few_rows_is_warned_of(command, commands, run: Run, tmp_path):
    entries = {letter: number for number, letter in enumerate(LETTERS)}
    ended = run(*commands(bpe(tmp_path / "other", entries))[command])
    assert ended.code == 0, ended
    assert f"other has {len(LETTERS)} entries and the model 1024 rows, more than any" in ended.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("last", [1024, 2**31, 2**32 - 1, 2**40])
def test_ids_outside_of_the_rows_are_refused(command, last, commands, run: Run, tmp_path):
    entries = {letter: number for number, letter in enumerate(LETTERS)} | {"zz": last}
    line = commands(bpe(tmp_path / "other", entries))[command]
    ended = run(*line)
    assert_one_sentence(ended, "other")
    assert not (tmp_path / "hf").exists() and not (tmp_path / "scores.jsonl").exists()
