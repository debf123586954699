"""FSDP2: what a rank holds, in a step and in a save, is its part; half precision is FSDP2's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_models
from support.ranks import run_ranks
from support.runs import training_runs
from torch.utils._python_dispatch import TorchDispatchMode

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.parameters import num_parameters, parameters
from mlm_eval.engine.engine import Engine
from mlm_eval.training.data import collate
from mlm_eval.training.optimization import Schedule
from mlm_eval.training.settings import Counters
from mlm_eval.training.state import MOMENTS, WEIGHTS, collect
from mlm_eval.training.step import Stepper

pytestmark = pytest.mark.process

SIZES = {"num_layers": 3, "hidden_size": 64, "kv_channels": 16, "vocab_size": 128}
GPT = random_models.config(random_models.GPT, ffn_hidden_size=256, **SIZES)
LLAMA = random_models.config(
    random_models.LLAMA, ffn_hidden_size=128, num_query_groups=4, **SIZES
)  # gated


def stepper(tp: int, dp: int, base: ModelConfig, **changes: Any) -> Stepper:
    engine = Engine.load(training_runs.model_for("lm", base), tp=tp, dp=dp, dtype="float32")
    data = training_runs.samples("lm", 8, vocab=base.vocab_size)
    settings = training_runs.settings(dp_mode="fsdp2", global_batch=8, **changes)
    objective = training_runs.OBJECTIVES["lm"]()
    return Stepper(engine, data, objective, settings, Schedule(1e-3, 0.0, 9, 0.0), Counters())


class Watch(TorchDispatchMode):
    """Notes what becomes half precision, and what ranks gather, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.gathered: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.shapes.append(tuple(result.shape))
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered.append((args[0].dtype, args[0].nbytes))
        if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            self.gathered.append((result.dtype, result.nbytes))
        return result


def collected(tp: int, dp: int, base: ModelConfig) -> tuple[list[int], list[int], int]:
    """Return a rank's values of each kind, the bytes that hold them, and those that it gathers."""
    run = stepper(tp, dp, base)
    run.take(0, list(range(8)), updates=0, save_due=False)
    values, held = [], []
    table = parameters(run.engine.config)
    with Watch() as watch:
        for kind in (WEIGHTS, *MOMENTS):
            tensors: Any = collect(run.replicas, run.optimizer, run.mesh, kind)
            assert set(tensors) == set(table)
            for name, tensor in tensors.items():
                assert tensor.numel() == torch.Size(table[name].shape).numel(), name
            parts = [tensor.to_local() for tensor in tensors.values()]
            values.append(sum(part.numel() for part in parts))
            storages = {part.untyped_storage().data_ptr(): part for part in parts if part.numel()}
            held.append(sum(part.untyped_storage().nbytes() for part in storages.values()))
    return values, held, sum(size for _, size in watch.gathered)


@pytest.mark.parametrize("base", [GPT, LLAMA], ids=["gpt", "gated"])
@pytest.mark.parametrize(("tp", "dp"), [(1, 2), (1, 4), (2, 2)])
def test_a_save_gathers_no_whole_model(tp: int, dp: int, base: ModelConfig):
    """A model that needs fsdp2 to fit would die at its first save."""
    table = parameters(base)
    own = sum(parameter.numel(tp) // dp for parameter in table.values())
    gated = sum(parameter.numel(tp) for parameter in table.values() if parameter.rule.blocks > 1)
    assert bool(gated) == (base is LLAMA)
    for values, held, gathered in run_ranks(tp * dp, collected, tp, dp, base):
        assert values == [own] * 3
        assert all(4 * own <= size < 1.1 * 4 * own for size in held)
        assert gathered == 3 * 4 * gated  # one matrix at a time


def forward(base: ModelConfig, recompute: bool) -> tuple[list[Any], list[Any], int]:
    run = stepper(1, 2, base, dtype="bfloat16", recompute=recompute)
    batch = collate([run.data[0], run.data[1]])
    with Watch() as watch, torch.autocast("cpu", torch.bfloat16):
        loss, _ = run.replicas.module(batch, None, 1.0)
    layers: Any = run.replicas.worker.get_submodule("decoder.layers")
    groups = [layer._get_fsdp_state()._fsdp_param_group for layer in layers]
    outputs = [out for group in groups for p in group.fsdp_params for out in p.all_gather_outputs]
    assert outputs
    held = sum(out.untyped_storage().nbytes() for out in outputs)
    loss.backward()
    return watch.shapes, watch.gathered, held


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("base", [GPT, LLAMA], ids=["gpt", "gated"])
def test_half_precision_weights_of_layers_are_gathered_and_freed(
    base: ModelConfig, recompute: bool
):
    """Autocast would gather float32 and keep a copy of each matrix until the end of the step."""
    layer = [p for p in parameters(base).values() if ".layers.0." in p.name]
    matrices = {tuple(p.shape) for p in layer if len(p.shape) == 2}
    rest = num_parameters(base) - base.num_layers * sum(p.numel(1) for p in layer)
    for shapes, gathered, held in run_ranks(2, forward, base, recompute):
        assert not matrices & set(shapes)
        halves = [size for dtype, size in gathered if dtype == torch.bfloat16]
        wholes = [size for dtype, size in gathered if dtype == torch.float32]
        if not halves:  # FSDP2 gathers bytes
            sizes = sorted(size for _, size in gathered)
            halves, wholes = sizes[: base.num_layers], sizes[base.num_layers :]
        assert sum(halves) == base.num_layers * 2 * sum(p.numel(1) for p in layer)
        assert sum(wholes) == 4 * rest
        assert held == 0


def losses(mode: str, folder: Path, dtype: str) -> list[float]:
    report, weights = training_runs.run(
        1, 2, "lm", folder, {"dp_mode": mode, "dtype": dtype, "max_steps": 8}, base=LLAMA
    )
    assert {value.dtype for value in weights.values()} == {torch.float32}
    return report.losses


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_that_of_ddp(dtype: str, tmp_path: Path):
    """But for gains and biases of the layers, which are gathered in half precision too."""
    expected = run_ranks(2, losses, "ddp", tmp_path / "ddp", dtype)[0]
    actual = run_ranks(2, losses, "fsdp2", tmp_path / "fsdp2", dtype)[0]
    assert actual == pytest.approx(expected, rel=0.02)
