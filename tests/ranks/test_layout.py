"""How many ranks a run gets, chosen before any of them starts; CUDA devices are made up here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import random_models

from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.ranks.mesh import ACTIVATION_BYTES, choose_layout, pick_device, smallest_fitting_tp

GIB = 1 << 30


def unread(config: ModelConfig) -> Checkpoint:
    """Return a checkpoint of which nobody may read a weight: none is needed to choose a layout."""
    return Checkpoint(config, {}, Provenance(Path("memory"), "megatron-torch"))


SMALL = unread(random_models.GPT)  # four heads
# The paper's 8.3 billion parameters, 32 heads: 16.6 GB in half precision.
LARGE = unread(
    ModelConfig(
        family="gpt",
        num_layers=72,
        hidden_size=3072,
        num_attention_heads=32,
        num_query_groups=32,
        kv_channels=96,
        ffn_hidden_size=4 * 3072,
        vocab_size=51200,
        max_position_embeddings=1024,
    )
)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretend that there are devices with so much free memory, in GiB."""

    def pretend(*free: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda index: (int(free[index] * GIB), 80 * GIB)
        )

    return pretend


def choose(checkpoint: Checkpoint, **asked: object) -> tuple[int, int]:
    settings = {"tp": None, "dp": None, "device": "cpu", "itemsize": 2, **asked}
    return choose_layout(checkpoint, **settings)  # type: ignore[arg-type]


def test_the_cpu_gets_one_rank_unless_more_are_asked_for():
    assert choose(SMALL) == (1, 1)
    assert choose(SMALL, tp=2) == (2, 1)
    assert choose(SMALL, dp=3) == (1, 3)
    assert choose(SMALL, tp=4, dp=2) == (4, 2)


def test_a_tp_that_does_not_divide_is_refused_with_those_that_do():
    for asked in ({"tp": 3}, {"tp": 3, "running": 3}, {"tp": 8, "dp": 1}):
        with pytest.raises(InputError, match=r"tp=[38].*it allows tp in 1, 2, 4"):
            choose(SMALL, **asked)


@pytest.mark.parametrize(
    ("asked", "layout"),
    [
        ({}, (1, 4)),
        ({"tp": 2}, (2, 2)),
        ({"dp": 2}, (2, 2)),
        ({"tp": 4}, (4, 1)),
        ({"tp": 2, "dp": 2}, (2, 2)),
    ],
)
def test_running_ranks_are_all_used(asked, layout):
    assert choose(SMALL, running=4, **asked) == layout


@pytest.mark.parametrize(
    ("running", "asked"),
    [(4, {"tp": 1, "dp": 2}), (3, {"tp": 2}), (3, {"dp": 2}), (2, {"tp": 4}), (2, {"dp": 4})],
)
def test_sizes_that_do_not_fill_the_running_ranks_are_refused(running, asked):
    with pytest.raises(InputError, match=f"{running} are running; give sizes whose product") as e:
        choose(SMALL, running=running, **asked)
    assert " 0" not in str(e.value)  # no size that nobody asked for


def test_on_cuda_the_smallest_tp_that_fits_leaves_the_rest_for_dp(gpus):
    shard = 16.6 / 1.0737  # GiB
    gpus(*[80.0] * 8)
    assert choose(LARGE, device="cuda") == (1, 8)
    gpus(*[shard / 2 + 4] * 8)
    assert choose(LARGE, device="cuda") == (2, 4)
    gpus(*[shard / 4 + 4] * 8)
    assert choose(LARGE, device="cuda") == (4, 2)
    gpus(*[80.0] * 7, shard / 2 + 4)  # the fullest device decides
    assert choose(LARGE, device="cuda") == (2, 4)
    gpus(*[80.0] * 8)
    assert choose(LARGE, device="cuda", itemsize=40) == (8, 1)


def test_on_cuda_what_is_asked_for_is_kept(gpus):
    gpus(*[80.0] * 8)
    assert choose(LARGE, device="cuda", tp=2) == (2, 4)
    assert choose(LARGE, device="cuda", tp=2, dp=1) == (2, 1)
    assert choose(LARGE, device="cuda", dp=4) == (1, 4)
    gpus(*[12.0] * 8)
    assert choose(LARGE, device="cuda", dp=4) == (2, 4)
    gpus(*[80.0] * 3)
    assert choose(LARGE, device="cuda", tp=2) == (2, 1)  # the third device stays idle


def test_a_model_that_fits_nowhere_is_refused_with_its_size(gpus):
    gpus(4.0, 4.0)
    with pytest.raises(InputError, match=r"16\.\d GB of weights.* 2 device\(s\) with 4\.3 GB free"):
        choose(LARGE, device="cuda")
    with pytest.raises(InputError, match=r"1 device\(s\)"):
        choose(LARGE, device="cuda", dp=2)


def test_only_sizes_that_divide_the_model_are_tried():
    config = random_models.config(num_attention_heads=6, num_query_groups=6, ffn_hidden_size=96)
    checkpoint = unread(config)
    weights = checkpoint.num_parameters * 4
    found = [
        smallest_fitting_tp(checkpoint, free=ACTIVATION_BYTES + free, itemsize=4, limit=6)
        for free in (weights, weights - 1, weights // 2 - 1, weights // 3 - 1)
    ]
    assert found == [1, 2, 3, 6]


def test_devices_by_name(gpus):
    gpus()
    assert pick_device("cpu") == "cpu" and pick_device("auto") == "cpu"
    with pytest.raises(InputError, match="--device cuda: torch sees no CUDA device"):
        pick_device("cuda")
    gpus(80.0)
    assert pick_device("auto") == "cuda" and pick_device("cuda") == "cuda"
    assert pick_device("cpu") == "cpu"
    with pytest.raises(InputError, match="--device 'tpu' is unknown; use auto, cpu or cuda"):
        pick_device("tpu")
