"""What a checkpoint holds beside the weights is named when it is left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import GPT
from support.paths import ORACLES, SAMPLES
from support.random_models import checkpoint

from mlm_eval.checkpoints.checkpoint import training_state
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.open import open_checkpoint

OPTIMIZER, SCHEDULE, RANDOM = "optimizer state", "learning-rate schedule", "random-number state"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("optimizer", OPTIMIZER),
        ("optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight", OPTIMIZER),
        ("chained_0.optimizer.state.param", OPTIMIZER),
        ("optimizer_state_dict", OPTIMIZER),
        ("optim.pt", OPTIMIZER),
        ("distrib_optim.pt", OPTIMIZER),
        ("layer_wise_optimizer_3.pt", OPTIMIZER),
        ("optimizer.pt", OPTIMIZER),
        ("optimizer.bin", OPTIMIZER),
        ("lr_scheduler", SCHEDULE),
        ("opt_param_scheduler", SCHEDULE),
        ("scheduler.pt", SCHEDULE),
        ("rng_state/shard_0.0_1.2", RANDOM),
        ("random_rng_state", RANDOM),
        ("rng_tracker_states", RANDOM),
        ("rng_state_3.pth", RANDOM),
        ("model", None),
        ("model_optim_rng", None),
        ("decoder.layers.self_attention.linear_qkv.weight", None),
        ("config.json", None),
    ],
)
def test_names_of_training_state(name: str, what: str | None):
    assert training_state([name]) == ([] if what is None else [what])


def left_behind(source: Path, target: Path) -> list[str]:
    """Return what a conversion says that it leaves behind."""
    done = convert(open_checkpoint(source), "megatron", target)
    return [note for note in done.notes if note.startswith("weights only: ")]


def test_a_conversion_says_what_it_leaves_behind(tmp_path: Path):
    said = left_behind(ORACLES / "v10_gpt_tp2", tmp_path / "a")
    assert said == ["weights only: the source's random-number state is not carried along"]
    assert left_behind(tmp_path / "a", tmp_path / "b") == []  # it holds no more than weights
    said = left_behind(ORACLES / "mcore016_gpt2_tp2_dist", tmp_path / "c")
    assert said == ["weights only: the source's random-number state is not carried along"]
    assert left_behind(SAMPLES / "gpt", tmp_path / "d") == []


@pytest.mark.parametrize("where", ["entry", "rank", "data-parallel rank"])
def test_an_optimizer_is_named_wherever_it_stands(where: str, tmp_path: Path):
    source = tmp_path / "source"
    write_megatron_torch(checkpoint(GPT), source, tp=2)
    folder = source / "release"
    if where == "entry":
        for file in folder.glob("mp_rank_*/model_optim_rng.pt"):
            contents: dict[str, Any] = torch.load(file, weights_only=False)
            torch.save({**contents, "optimizer": {"state": {}}, "rng_state": None}, file)
    elif where == "rank":
        (folder / "mp_rank_01" / "distrib_optim.pt").write_bytes(b"not read")
    else:
        (folder / "mp_rank_00_000").mkdir()
        (folder / "mp_rank_00_000" / "optim.pt").write_bytes(b"not read")
    said = ["weights only: the source's optimizer state is not carried along"]
    assert left_behind(source, tmp_path / "a") == said


def test_a_trainers_folder_of_hugging_face(tmp_path: Path):
    convert(checkpoint(GPT), "hf", tmp_path / "hf")
    assert left_behind(tmp_path / "hf", tmp_path / "a") == []
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.copyfile(tmp_path / "hf" / "config.json", tmp_path / "hf" / name)
    assert left_behind(tmp_path / "hf", tmp_path / "b") == [
        f"weights only: the source's {OPTIMIZER}, {SCHEDULE}, {RANDOM} is not carried along"
    ]
