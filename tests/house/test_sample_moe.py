"""The mixture of experts that ships: what it is, and that it has learned, by both benchmarks."""

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
from mlm_eval.checkpoints.tokenizer import find_tokenizer
from mlm_eval.tasks.zero_shot.wikitext103 import detokenize

pytest_plugins = ["support.command_line_fixtures"]

MOE = SAMPLES / "moe"
WIKITEXT = SAMPLES / "text" / "wiki.sample.tokens"
LAMBADA = SAMPLES / "text" / "lambada.sample.jsonl"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return mlm_eval.open_checkpoint(MOE)


def test_the_checkpoint_is_what_megatron_writes(checkpoint: Checkpoint) -> None:
    found, config = checkpoint.provenance, checkpoint.config
    assert (found.format, found.names, found.checkpoint_version) == ("megatron-torch", "core", 3.0)
    assert found.warnings == [] and found.pickle_classes == []
    assert (config.num_experts, config.moe_router_topk) == (4, 2)
    assert config.moe_layers == tuple(range(config.num_layers))
    assert config.params_dtype == "float16"
    assert sum(path.stat().st_size for path in MOE.rglob("*") if path.is_file()) < 4_000_000


def test_plain_torch_opens_the_files() -> None:
    """A diagonal of tensor and expert ranks: each file has two whole experts of the four."""
    folder = next(MOE.glob("iter_*"))
    assert sorted(path.name for path in folder.iterdir()) == ["mp_rank_00_000", "mp_rank_01_001"]
    for rank in range(2):
        file = folder / f"mp_rank_{rank:02d}_{rank:03d}" / "model_optim_rng.pt"
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(file, weights_only=True)
        args, model = saved["args"], saved["model"]
        sizes = (args.tensor_model_parallel_size, args.expert_model_parallel_size)
        assert (*sizes, args.expert_tensor_parallel_size) == (2, 2, 1)
        experts = "decoder.layers.3.mlp.experts.local_experts."
        assert model[f"{experts}1.linear_fc1.weight"].shape == (2 * 128, 128)
        assert f"{experts}2.linear_fc1.weight" not in model
        assert model["decoder.layers.3.self_attention.linear_proj.weight"].shape == (128, 64)


def test_how_it_was_trained_is_told() -> None:
    record = json.loads((MOE / "training.json").read_text())
    assert record["command"][:2] == ["mlm-eval", "lm"]
    assert record["counts"]["steps"] == int((MOE / "latest_checkpointed_iteration.txt").read_text())
    assert any(line.startswith("num_experts") for line in record["model"])


def measured(run: Run, command: str, data: Path, folder: Path, *more: object) -> dict[str, float]:
    out = folder / "record.json"
    ended = run(command, "--ckpt", MOE, "--data", data, "--device", "cpu", *more, "--output", out)
    assert ended.code == 0, ended.err
    return read(out)["metrics"]  # type: ignore[no-any-return]


@pytest.mark.long
def test_wikitext103_runs_on_it(run: Run, tmp_path: Path) -> None:
    """Far below a unigram model that knows the counts of this very text, and not by heart."""
    metrics = measured(run, "wikitext103", WIKITEXT, tmp_path)
    tokenizer = find_tokenizer(MOE)
    assert tokenizer is not None
    tokens = tokenizer.encode(detokenize(WIKITEXT.read_text(encoding="utf-8")))[1:]
    counts = Counter(tokens)
    entropy = -sum(n * math.log(n / len(tokens)) for n in counts.values()) / len(tokens)
    unigram = math.exp(entropy * metrics["token_ratio"])
    assert 30 < metrics["adjusted_ppl"] < unigram / 5
    assert 100 < metrics["adjusted_ppl"] < 200


@pytest.mark.long
def test_lambada_runs_on_it(run: Run, tmp_path: Path) -> None:
    """Better than naming the commonest answer; two ranks score as one does."""
    metrics = measured(run, "lambada", LAMBADA, tmp_path)
    answers = [json.loads(line)["text"].split()[-1] for line in LAMBADA.read_text().splitlines()]
    commonest = Counter(answers).most_common(1)[0][1]
    assert commonest < metrics["num_correct"] < 0.5 * len(answers)


@pytest.mark.process
@pytest.mark.long
def test_two_ranks_score_as_one_does(run: Run, tmp_path: Path) -> None:
    one = measured(run, "lambada", LAMBADA, tmp_path)
    (tmp_path / "two").mkdir()
    two = measured(run, "lambada", LAMBADA, tmp_path / "two", "--tp", 2)
    assert two["num_correct"] == one["num_correct"]
    assert two["target_ppl"] == pytest.approx(one["target_ppl"], rel=1e-4)
