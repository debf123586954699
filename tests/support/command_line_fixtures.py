"""A small checkpoint with data, and command lines run in this process; a plugin of test_cli*.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from mlm_eval import cli
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.cli import screen
from support import random_models, tiny_bert
from support.command_line import CONFIG, OF_A_LAUNCHER, TEXT, Ended, Run

PASSAGES = ["the cat saw a dog", "one two three", "he said no no", "x yy zzz"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: quick, for one rank."""
    monkeypatch.setattr(screen, "PATIENCE_SECONDS", 600)  # what is printed depends on no time
    for name in [name for name in os.environ if name.startswith(OF_A_LAUNCHER)]:
        monkeypatch.delenv(name)

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mlm-eval", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = cli._main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two files with its tokenizer, a text, passages, and lines to score."""
    folder = tmp_path_factory.mktemp("cli")
    write_megatron_torch(random_models.checkpoint(CONFIG), folder / "gpt", tp=2)
    random_models.byte_vocabulary(folder / "gpt" / "tokenizer")
    (folder / "wiki.tokens").write_text(TEXT)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in PASSAGES)
    (folder / "passages.jsonl").write_text(rows)
    (folder / "lines.jsonl").write_text('{"tokens": [1, 2, 3]}\n{"text": "abc"}\n')
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of a few thousand weights with its tokenizer."""
    path = tmp_path_factory.mktemp("cli-bert") / "bert"
    tiny_bert.checkpoint(path)
    tiny_bert.write_vocabulary(path / "tokenizer")
    return path


@pytest.fixture
def wiki(folder: Path) -> list[object]:
    """A WikiText run on that checkpoint."""
    return ["wikitext103", "--ckpt", folder / "gpt", "--data", folder / "wiki.tokens"]


@pytest.fixture
def cloze(folder: Path) -> list[object]:
    """A LAMBADA run on that checkpoint."""
    return ["lambada", "--ckpt", folder / "gpt", "--data", folder / "passages.jsonl"]
