"""Tokenizers at the command line: added tokens are scored, and a folder without one says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from support import random_models
from support.command_line import Run

from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch

pytest_plugins = ["support.command_line_fixtures"]

LETTERS = [*"abcdefghijklmnopqrstuvwxyz.,!?", "Ġ"]
ENTRIES = len(LETTERS) + 1


def checkpoint_with_tokenizer(folder: Path) -> Path:
    """Write a GPT of 64 rows; 31 letters, the end of text and a token that was added."""
    config = dataclasses.replace(random_models.GPT, vocab_size=64)
    write_megatron_torch(random_models.checkpoint(config), folder)
    words = folder / "tokenizer"
    words.mkdir()
    vocab = {piece: index for index, piece in enumerate([*LETTERS, "<|endoftext|>"])}
    (words / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (words / "merges.txt").write_text("#version: 0.2\n")
    (words / "added_tokens.json").write_text(json.dumps({"<|user|>": ENTRIES}))
    return folder


def test_an_added_token_is_scored_as_the_one_it_is(run: Run, tmp_path: Path) -> None:
    """Its signs have no symbols here: as a string it would be refused, or cut into pieces."""
    checkpoint = checkpoint_with_tokenizer(tmp_path / "gpt")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"text": "a b<|user|>c"}) + "\n")
    output = tmp_path / "scores.jsonl"
    given = ["--ckpt", checkpoint, "--input", lines, "--output", output, "--device", "cpu"]
    ended = run("score", *given)
    assert ended.code == 0, ended
    scored = json.loads(output.read_text())
    assert scored["tokens"][-2:] == [ENTRIES, LETTERS.index("c")]


def test_a_folder_without_a_tokenizer_says_so(run: Run, tmp_path: Path) -> None:
    checkpoint = checkpoint_with_tokenizer(tmp_path / "gpt")
    given = ["convert", "--ckpt", checkpoint, "--to", "hf"]
    found = run(*given, "--output", tmp_path / "with")
    assert found.code == 0 and "tokenizer" not in found.err, found.err
    for file in (checkpoint / "tokenizer").iterdir():
        file.unlink()
    ended = run(*given, "--output", tmp_path / "without")
    assert ended.code == 0
    assert "warning: no tokenizer was found, so the folder holds none" in ended.err
    assert "give --tokenizer DIR" in ended.err
