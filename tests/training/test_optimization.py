"""The optimizer's groups, the learning rate, norms of sharded gradients, the loss scale."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.ranks import run_ranks
from support.runs import training_runs

from mlm_eval.checkpoints.parameters import parameters
from mlm_eval.engine.engine import Engine
from mlm_eval.training.optimization import (
    LossScale,
    Schedule,
    gradient_norm,
    make_optimizer,
    scale_gradients,
)
from mlm_eval.training.settings import Counters, Hyperparameters
from mlm_eval.training.step import Stepper


def test_a_linear_schedule_by_hand():
    """Ten steps, two of them of warm-up: Megatron's get_lr at 0, 1, 2, ... steps done."""
    schedule = Schedule(lr=1.0, min_lr=0.2, total=10, warmup=0.2)
    rates = [0.0, 0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2]
    assert [schedule(step) for step in range(12)] == pytest.approx(rates)


def test_the_linear_schedule_of_v1_by_hand():
    """It falls by a share of all steps, and ends at 2 x warm-up x lr; `min_lr` is a floor."""
    schedule = Schedule(lr=1.0, min_lr=0.0, total=10, warmup=0.2, decay="linear-v1")
    rates = [0.0, 0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4, 0.4]
    assert [schedule(step) for step in range(11)] == pytest.approx(rates)
    floored = dataclasses.replace(schedule, min_lr=0.65)
    assert [floored(step) for step in (0, 1, 5, 6, 9)] == pytest.approx([0, 0.5, 0.7, 0.65, 0.65])
    at_once = dataclasses.replace(schedule, warmup=0.0)
    assert [at_once(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    # More warm-up than half of the steps: v1.0 never gets to the highest rate while it rises.
    long = dataclasses.replace(schedule, warmup=0.8)
    assert [long(step) for step in (1, 2, 5)] == pytest.approx([0.125, 0.25, 0.25])


def test_warm_up_may_end_between_two_steps():
    """Megatron keeps the fraction: 0.15 of 10 steps is a peak between the first and the second."""
    schedule = Schedule(lr=3.0, min_lr=0.0, total=10, warmup=0.15)
    assert schedule(1) == pytest.approx(2.0)
    assert schedule(2) == pytest.approx(3.0 * (1 - 0.5 / 8.5))


def test_without_warm_up_the_first_rate_is_the_highest():
    for decay in ("linear", "cosine"):
        schedule = Schedule(lr=3.0, min_lr=0.0, total=4, warmup=0.0, decay=decay)
        assert schedule(0) == 3.0
        assert schedule(2) == pytest.approx(1.5) and schedule(4) == pytest.approx(0.0)


def test_a_cosine_by_hand():
    schedule = Schedule(lr=1.0, min_lr=0.0, total=8, warmup=0.0, decay="cosine")
    assert schedule(2) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def stepper(tp: int, dp: int, kind: str = "mlm", **changes: object) -> Stepper:
    engine = Engine.load(training_runs.model_for(kind), tp=tp, dp=dp, dtype="float32")
    return Stepper(
        engine,
        training_runs.samples(kind, 8),
        training_runs.OBJECTIVES[kind](),
        training_runs.settings(**changes),
        Schedule(1.0, 0.0, 10, 0.0),
        Counters(),
    )


def test_biases_and_norms_do_not_decay():
    trained = stepper(1, 1).replicas.trained
    optimizer = make_optimizer(trained, Hyperparameters(weight_decay=0.1))
    names = {id(item.parameter): item.name for item in trained}
    decaying, still = ([names[id(p)] for p in g["params"]] for g in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(name.endswith("weight") and "norm" not in name for name in decaying)
    assert all(name.endswith("bias") or "norm" in name for name in still)
    assert sorted(decaying + still) == sorted(names.values())


def norms_on_a_rank(tp: int, dp: int, mode: str) -> tuple[float, float, float]:
    """Return the norm, the norm of all gradients gathered, and the norm after halving them."""
    step = stepper(tp, dp, dp_mode=mode)
    step._gradients(0, list(range(8)))
    trained, over_dp = step.replicas.trained, step.replicas.sharded
    norm = gradient_norm(trained, step.mesh, over_dp=over_dp)
    whole = training_runs.whole_gradients(step)
    assert set(whole) == set(parameters(step.engine.config))
    expected = torch.cat([g.double().flatten() for g in whole.values()]).norm().item()
    expected /= dp  # the mean over dp so far
    scale_gradients(trained, 0.5)
    return norm, expected, gradient_norm(trained, step.mesh, over_dp=over_dp)


@pytest.mark.parametrize(
    ("tp", "dp", "mode"), [(1, 1, "ddp"), (2, 1, "ddp"), (1, 2, "fsdp2"), (2, 2, "fsdp2")]
)
def test_the_norm_is_that_of_the_whole_gradient(tp, dp, mode):
    """Shards are summed over the ranks, what is replicated counts once."""
    for norm, expected, halved in run_ranks(tp * dp, norms_on_a_rank, tp, dp, mode):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert halved == pytest.approx(norm / 2, rel=1e-6)


@pytest.mark.parametrize(("clip", "factor"), [(0.0, 1.0), (1e9, 1.0), (0.5, 0.5)])
def test_gradients_are_clipped_as_torch_clips_them(clip, factor):
    """The update of plain AdamW after torch's own clipping."""
    step = stepper(1, 1, clip_grad=clip, weight_decay=0.3)
    step._gradients(0, list(range(8)))
    model = step.engine.model
    found = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}
    step.optimizer.zero_grad()
    done = step.take(0, list(range(8)), updates=0, save_due=False)
    parts = [g for _, g in found.values()]
    assert done.norm == pytest.approx(torch.cat([g.flatten() for g in parts]).norm().item())
    assert factor == 1.0 or done.norm > clip
    for name, (value, gradient) in found.items():
        parameter = torch.nn.Parameter(value)
        shrunk = factor / (done.norm + 1e-6) if factor < 1 else 1.0
        parameter.grad = gradient * shrunk
        decay = 0.3 if value.dim() > 1 else 0.0
        torch.optim.AdamW([parameter], lr=1.0, weight_decay=decay).step()
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-4)


def test_the_loss_scale_falls_and_rises():
    scale = LossScale(active=True, value=8.0)
    scale.update(finite=False)
    assert scale.value == 4.0 and not scale.exhausted
    for _ in range(LossScale.GROWTH_INTERVAL):
        assert scale.value == 4.0
        scale.update(finite=True)
    assert scale.value == 8.0 and scale.good_steps == 0
    for _ in range(18):
        scale.update(finite=False)
    assert scale.exhausted


def test_other_dtypes_have_no_loss_scale():
    scale = LossScale(active=False)
    scale.update(finite=False)
    assert scale.value == 1.0 and not scale.exhausted
