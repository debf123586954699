"""How many ranks a run gets, and which GPU each of them; CUDA devices are made up here."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import random_models
from support.ranks import run_ranks
from torch.distributed.distributed_c10d import _get_default_store

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.model.costs.memory import (
    OUTSIDE,
    EvaluationNeed,
    TrainingBatch,
    local_parameters,
)
from mlm_eval.model.sizes import named_config
from mlm_eval.planning.plan import plan_record
from mlm_eval.ranks import layout
from mlm_eval.ranks.layout import (
    RankDevice,
    agree_on_gpus,
    check_distinct,
    choose_layout,
    crosses_machines,
    gpu_index,
    pick_device,
)
from mlm_eval.ranks.world import World
from mlm_eval.tasks.finetune.settings import FinetuneOptions
from mlm_eval.tasks.language.settings import TextSettings
from mlm_eval.tasks.workloads import finetuning_need, pretraining_need, workloads
from mlm_eval.training.settings import TrainSettings

GIB = 1 << 30


SMALL = random_models.GPT  # four heads
# The paper's 8.3 billion parameters, 32 heads: 16.6 GB in half precision.
LARGE = ModelConfig(
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


LLAMA_13B = ModelConfig(
    family="gpt",
    num_layers=40,
    hidden_size=5120,
    num_attention_heads=40,
    num_query_groups=40,
    kv_channels=128,
    ffn_hidden_size=13824,
    vocab_size=32000,
    max_position_embeddings=4096,
    position_embedding_type="rope",
    normalization="RMSNorm",
    activation="swiglu",
    add_bias_linear=False,
    add_qkv_bias=False,
    untie_embeddings_and_output_weights=True,
)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretend that there are devices with so much free memory, in GiB, which nobody opens."""

    def opened(index: int) -> None:
        raise AssertionError("the parent of the ranks takes a context on a device")

    def pretend(*free: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        for name in ("mem_get_info", "set_device", "get_device_properties", "init"):
            monkeypatch.setattr(torch.cuda, name, opened)
        monkeypatch.setattr(
            layout, "free_on_gpus", lambda: tuple(int(amount * GIB) for amount in free)
        )

    return pretend


def evaluation(config: ModelConfig, **changes: int) -> EvaluationNeed:
    settings = {"itemsize": 2, "batch_tokens": 4096, **changes}
    return EvaluationNeed(config, **settings)


def choose(config: ModelConfig, **asked: Any) -> tuple[int, int]:
    asked.setdefault("need", evaluation(config))
    return choose_layout(config, **{"tp": None, "dp": None, "device": "cpu", **asked})


def room(need: Any, tp: int, dp: int) -> float:
    """Return the GiB that a rank needs at a layout."""
    return (need(tp, dp).total + OUTSIDE) / GIB


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
    need = evaluation(LARGE)
    for tp in (1, 2, 4, 8):
        gpus(*[room(need, tp, 1)] * 8)
        assert choose(LARGE, device="cuda") == (tp, 8 // tp)
    gpus(*[80.0] * 7, room(need, 2, 1))  # the fullest device decides
    assert choose(LARGE, device="cuda") == (2, 4)
    gpus(*[80.0] * 7, room(need, 2, 1))
    assert choose(LARGE, device="cuda", dp=4) == (1, 4)  # it is not used


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
    gpus(5.0, 4.0)
    told = r"tp 2 x dp 1 each rank needs \d+\.\d GB, 8\.\d GB of them weights, and GPU 1 of 2 has"
    with pytest.raises(InputError, match=told + r" least free, 4\.3 GB; lower --batch-tokens"):
        choose(LARGE, device="cuda")
    with pytest.raises(InputError, match=r"tp 1 x dp 2 .* GPU 1 of 2"):
        choose(LARGE, device="cuda", dp=2)
    gpus(5.0)
    with pytest.raises(InputError, match="tp 1 x dp 2.*GPU 0 of 1"):
        choose(LARGE, device="cuda", dp=2)


def test_only_sizes_that_divide_the_model_are_tried(gpus):
    config = random_models.config(num_attention_heads=6, num_query_groups=2, ffn_hidden_size=96)
    need = evaluation(config)
    gpus(*[room(need, 3, 1)] * 6)
    assert choose(config, device="cuda", need=need) == (3, 2)
    gpus(*[room(need, 2, 1)] * 6)
    assert choose(config, device="cuda", need=need, trains=True) == (2, 3)
    gpus(*[room(need, 3, 1)] * 6)  # copies of a key/value head cannot be trained
    with pytest.raises(InputError, match="tp 2.*--micro-batch, or use --recompute, --dp-mode"):
        choose(config, device="cuda", need=need, trains=True)


# --- what is needed: one estimate for plan and for the runs ---


def test_a_bigger_batch_or_a_cache_needs_more_devices(gpus):
    """A 13B model's weights alone fit 31.2 GiB; with its activations, or with a cache, not."""
    gpus(*[31.2] * 4)
    for changes, expected in (
        ({"batch_tokens": 4096}, (1, 4)),
        ({"batch_tokens": 131_072}, (2, 2)),
        ({"batch_tokens": 32_768, "cache": 4 << 30}, (2, 2)),
    ):
        need = evaluation(LLAMA_13B, **changes)
        assert choose(LLAMA_13B, device="cuda", need=need) == expected


@pytest.mark.parametrize(
    ("name", "found"), [("bert-336m", (1, 8)), ("bert-1.3b", (2, 4)), ("bert-3.9b", (5, 1))]
)
def test_a_training_is_laid_out_by_what_it_needs(name: str, found: tuple[int, int], gpus):
    """Weights alone would fit one GPU; with gradients, moments and activations they do not."""
    config = named_config(name, tp=8)
    options = FinetuneOptions(data="x", output_dir=Path("x"), overrides={"global_batch": 64})
    need = finetuning_need("race", config, options, batch_tokens=32_768)
    gpus(*[80.0] * 8)
    assert choose(config, device="cuda", need=need, trains=True) == found
    assert room(need, *found) <= 80.0
    assert all(room(need, tp, 8 // tp) > 80.0 for tp in (1, 2, 4) if tp < found[0])


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("dp", [1, 8])
@pytest.mark.parametrize("tp", [1, 2])
def test_plan_and_the_runs_agree_about_a_training(tp: int, dp: int, mode: str):
    def planned(name: str, task: str) -> int:
        config = named_config(name, tp=tp)
        record = plan_record(
            name,
            lambda _: config,
            workloads(config, task=task, batch=TrainingBatch(rows=4, length=1, half=True)),
            itemsize=2,
            batch_tokens=32_768,
            tp=tp,
            dp=dp,
            sharded=mode == "fsdp2",
        )
        (layout,) = record["layouts"]
        return int(layout["training"][task]["total"])

    how = {"dp_mode": mode, "micro_batch": 4}
    options = FinetuneOptions(
        data="x", output_dir=Path("x"), recipe="race-megatron-336m", dtype="bfloat16", **how
    )
    config = named_config("bert-336m", tp=tp)
    need = finetuning_need("race", config, options, batch_tokens=32_768)
    assert planned("bert-336m", "race") == need(tp, dp).total

    config = named_config("gpt2-355m", tp=tp)
    settings = TrainSettings(lr=1e-4, global_batch=32, epochs=1, dtype="bfloat16", **how)
    text = TextSettings(data=[Path("x")])
    need = pretraining_need(config, text, settings, batch_tokens=32_768)
    assert planned("gpt2-355m", "lm") == need(tp, dp).total


def test_sharding_and_smaller_batches_need_less():
    config = named_config("gpt2-2.5b")
    text = TextSettings(data=[Path("x")], seq_length=1024)

    def total(tp: int, dp: int, **changes: Any) -> int:
        settings = TrainSettings(**{"lr": 1e-4, "global_batch": 32, "epochs": 1, **changes})
        return pretraining_need(config, text, settings, batch_tokens=4096)(tp, dp).total

    whole = total(1, 8)
    for changes in ({"dp_mode": "fsdp2"}, {"recompute": True}, {"micro_batch": 1}):
        assert total(1, 8, **changes) < whole, changes
    sharded = {"dp_mode": "fsdp2", "micro_batch": 1, "recompute": True}
    assert total(1, 8, **sharded) < total(1, 4, **sharded)
    # Evaluations gather the whole model beside the shards of weights and moments.
    count = local_parameters(config, 1)
    assert total(1, 8, **sharded) >= 4 * count + 12 * count // 8
    assert total(1, 1, dp_mode="fsdp2") == total(1, 1)


# --- running ranks ---


def test_running_ranks_get_the_smallest_tp_that_fits_each_of_them():
    need = evaluation(LARGE)
    asked: dict[str, Any] = {"device": "cuda", "running": 8, "need": need}
    for tp in (1, 2, 4, 8):
        free = [80 * GIB] * 7 + [int(room(need, tp, 1) * GIB) + 1]
        found = choose(LARGE, free=lambda free=free: free, **asked)
        assert found == (tp, 8 // tp)
    with pytest.raises(InputError, match="the run does not fit: at tp 8 x dp 1"):
        choose(LARGE, free=lambda: [GIB] * 8, **asked)
    assert choose(LARGE, free=lambda: [GIB] * 8, tp=1, **asked) == (1, 8)


def test_copies_of_the_model_stay_on_one_machine_where_they_can():
    need = evaluation(LARGE)
    asked: dict[str, Any] = {"device": "cuda", "running": 4, "need": need}
    free = [int(room(need, 2, 1) * GIB) + 1] * 4
    near, far = ["a", "a", "b", "b"], ["a", "b", "a", "b"]
    assert not crosses_machines(near, 2) and crosses_machines(far, 2)
    assert choose(LARGE, free=lambda: free, machines=near, **asked) == (2, 2)
    assert choose(LARGE, free=lambda: free, machines=far, **asked) == (2, 2)  # nothing else fits
    small = [int(room(need, 4, 1) * GIB) + 1] * 4
    assert choose(LARGE, free=lambda: small, machines=near, **asked) == (4, 1)


def view(machine: str, *gpus: str) -> dict[str, Any]:
    return {"machine": machine, "gpus": list(gpus)}


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        # All GPUs of two machines; each its own; two near ones each; a pod for each.
        ([view("a", "0", "1")] * 2 + [view("b", "2", "3")] * 2, [0, 1, 0, 1]),
        ([view("a", str(n)) for n in range(4)], [0, 0, 0, 0]),
        ([view("a", "0", "1")] * 2 + [view("a", "2", "3")] * 2, [0, 1, 0, 1]),
        ([view("a", "0"), view("b", "0")], [0, 0]),
    ],
    ids=["all", "own", "near", "pods"],
)
def test_each_rank_takes_its_own_gpu(views: list[dict[str, Any]], expected: list[int]):
    assert [gpu_index(views, rank) for rank in range(len(views))] == expected


@pytest.mark.parametrize("gpus", [(), ("0",), ("0", "1", "2")])
def test_more_ranks_than_gpus_are_refused(gpus: tuple[str, ...]):
    """`srun -n4 --gres=gpu:1`: NCCL would speak of a duplicate GPU."""
    with pytest.raises(InputError, match=rf"4 ranks on one machine .* see {len(gpus)} GPU"):
        gpu_index([view("a", *gpus)] * 4, 3)


def test_two_ranks_that_share_a_gpu_are_refused():
    devices = [RankDevice("a", 0, "x", 1), RankDevice("b", 0, "x", 1), RankDevice("a", 1, "y", 1)]
    check_distinct(devices)
    with pytest.raises(InputError, match=r"ranks 0 and 3 have the same GPU \(x\)"):
        check_distinct([*devices, RankDevice("a", 0, "x", 1)])


def meet(seen: list[list[str]], free: list[int]) -> tuple[list[dict[str, Any]], list[int]]:
    """Agree on GPUs with the other ranks; each sees those of its rank in `seen`."""
    world = World(dist.get_rank(), dist.get_world_size(), 0, 1, "torchrun")
    selected: list[int] = []
    own = seen[world.rank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: len(own))
        patch.setattr(torch.cuda, "set_device", selected.append)
        patch.setattr(torch.cuda, "mem_get_info", lambda index: (free[world.rank], 99))
        patch.setattr(layout, "gpu_uuid", lambda index: own[index])
        devices = agree_on_gpus(_get_default_store(), world)
    return [dataclasses.asdict(device) for device in devices], selected


@pytest.mark.process
def test_ranks_tell_each_other_their_gpus():
    results = run_ranks(2, meet, [["x", "y"], ["x", "y"]], [70, 50])
    assert [selected for _, selected in results] == [[0], [1]]
    first, second = (devices for devices, _ in results)
    assert first == second
    assert [(d["uuid"], d["free"]) for d in first] == [("x", 70), ("y", 50)]


# --- the parent ---


def test_free_memory_is_read_by_a_child_that_ends(monkeypatch: pytest.MonkeyPatch):
    commands = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "a warning\n[7, 5]\n", "")

    layout.free_on_gpus.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        assert layout.free_on_gpus() == (7, 5) and layout.free_on_gpus() == (7, 5)
    assert len(commands) == 1 and commands[0][0] == sys.executable
    layout.free_on_gpus.cache_clear()
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: CUDA is busy\n")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *given, **options: failed)
        with pytest.raises(InputError, match=r"RuntimeError: CUDA is busy\); give --tp and --dp"):
            layout.free_on_gpus()
    layout.free_on_gpus.cache_clear()


@pytest.mark.process
def test_the_child_prints_a_number_for_each_device():
    done = subprocess.run(
        [sys.executable, "-P", "-c", layout.LOOK], capture_output=True, text=True, check=True
    )
    assert len(json.loads(done.stdout)) == torch.cuda.device_count()


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
