"""The BERT sample that ships: what it is, that it has learned, and RACE on the sample passages."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.command_line import Run, read
from support.paths import SAMPLES

import mlm_eval
from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.tokenizer import Tokenizer, find_tokenizer
from mlm_eval.tasks.language.data import (
    MaskedText,
    SpecialTokens,
    read_documents,
    tokenize_documents,
)
from mlm_eval.tasks.language.pretraining import text_metrics
from mlm_eval.tasks.zero_shot.wikitext103 import detokenize
from mlm_eval.training.data import NO_LABEL

pytest_plugins = ["support.command_line_fixtures"]

BERT = SAMPLES / "bert"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return mlm_eval.open_checkpoint(BERT)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = find_tokenizer(BERT)
    assert found is not None
    return found


def test_the_checkpoint_is_what_megatron_writes(checkpoint: Checkpoint) -> None:
    found, config = checkpoint.provenance, checkpoint.config
    assert (found.format, found.tensor_parallel, found.checkpoint_version) == (
        "megatron-torch",
        2,
        3.0,
    )
    assert found.warnings == [] and found.pickle_classes == []
    assert config.family == "bert" and config.params_dtype == "float16"
    assert config.lm_head and config.binary_head and config.pooler
    assert (config.num_layers, config.hidden_size, config.max_position_embeddings) == (4, 128, 256)


def test_plain_torch_opens_the_files() -> None:
    for rank in range(2):
        folder = next(BERT.glob("iter_*")) / f"mp_rank_{rank:02d}"
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(folder / "model_optim_rng.pt", weights_only=True)
        assert (saved["args"].tensor_model_parallel_size, saved["args"].num_layers) == (2, 4)


def test_the_vocabulary_is_its_own(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    assert tokenizer.kind == "bert-wordpiece" and tokenizer.vocab_size == 2000
    assert checkpoint.config.vocab_size == 2048
    assert tokenizer.encode("Module") == tokenizer.encode("module")


def test_it_has_learned(checkpoint: Checkpoint, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """On text that training never saw, hidden tokens are told better than by their frequency."""
    held_out = tmp_path / "text.txt"
    held_out.write_text(detokenize((SAMPLES / "text" / "wiki.sample.tokens").read_text()))
    words = tokenize_documents(
        read_documents([held_out], whole_files=False), tokenizer, end=None, sentences=True
    )
    samples = MaskedText(
        words,
        SpecialTokens.of(tokenizer),
        length=128,
        seed=1,
        pairs=True,
        probability=0.15,
        whole_words=True,
    )
    found = text_metrics(mlm_eval.Engine.load(checkpoint), samples)
    hidden = Counter(
        token
        for sample in samples
        for token in sample.label[1:].tolist()  # type: ignore[index, union-attr]
        if token != NO_LABEL
    )
    total = hidden.total()
    counts = Counter(words.tokens.tolist())  # what a unigram model of this very text knows
    unigram = -sum(n / total * math.log(counts[x] / counts.total()) for x, n in hidden.items())
    assert found["lm_loss"] < unigram
    assert found["accuracy"] > 2 * hidden.most_common(1)[0][1] / total


@pytest.mark.long
def test_race_runs_on_the_sample_passages(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--ckpt", BERT, "--data", SAMPLES / "race", "--device", "cpu", "--tp", 1]
    ended = run("race", *given, "--epochs", 2, "--lr", "1e-3", "--output-dir", out)
    assert ended.code == 0, ended.err
    metrics = read(out / "result.json")["metrics"]
    assert [metrics[f"dev-{level}"]["total"] for level in ("middle", "high")] == [12, 12]
    assert metrics["test"]["total"] == 24
    # It has trained: the loss of the last steps lies below that of the first ones.
    losses = [
        json.loads(line)["loss"]
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert all(math.isfinite(loss) for loss in losses) and len(losses) >= 4
    assert f"correct / total = {metrics['dev']['correct']} / 24" in ended.err
