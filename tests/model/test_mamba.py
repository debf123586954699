"""Mamba-2's scan and its layer against the recurrence, a position at a time, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support import random_models
from support.ranks import run_ranks
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.engine.engine import load_model
from mlm_eval.model import mamba
from mlm_eval.model.attention import Context
from mlm_eval.model.tensor_parallel import SINGLE
from mlm_eval.ranks.groups import make_mesh

PURE = dataclasses.replace(
    random_models.LLAMA,
    position_embedding_type="none",
    no_mlp_layers=(0, 1),
    mamba_layers=(0, 1),
    mamba_num_heads=8,
    mamba_head_dim=6,
    mamba_num_groups=2,
    mamba_state_dim=5,
    mamba_conv_width=4,
)


def by_positions(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `scan` does, from its definition, in float64."""
    x, dt, A, B, C, state = (part.double() for part in (x, dt, A, B, C, state))
    per_group = x.shape[2] // B.shape[2]
    B, C = (part.repeat_interleave(per_group, dim=2) for part in (B, C))
    s = state.permute(0, 1, 3, 4, 2).flatten(1, 2)  # [b, h, p, n]
    rows = []
    for t in range(x.shape[1]):
        added = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        s = s * (dt[:, t] * A).exp()[..., None, None] + added
        rows.append((s * C[:, t, :, None]).sum(-1))
    left = s.unflatten(1, (B.shape[2] // per_group, per_group)).permute(0, 1, 4, 2, 3)
    return torch.stack(rows, dim=1), left


def draw(batch: int, length: int, heads: int, channels: int, groups: int, states: int):
    """Return inputs of a scan; time steps and decays span what trained models have, and more."""
    noise = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise)

    dt = F.softplus(3 * normal(batch, length, heads))
    dt[:, ::7] = 0  # as behind the end of a shorter text
    A = -torch.exp(3 * torch.rand(heads, generator=noise))
    B, C = (normal(batch, length, groups, states) for _ in range(2))
    state = normal(batch, groups, states, heads // groups, channels)
    return normal(batch, length, heads, channels), dt, A, B, C, state


@pytest.mark.parametrize("length", [1, 5, 64, 200])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("span", [1 << 24, 1 << 18, 1 << 13])  # 1 << 18: three chunks, then one
@pytest.mark.parametrize("way", ["in turn", "on a GPU", "learned"])
def test_the_scan_is_its_recurrence(
    length: int, groups: int, span: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients on the CPU it goes another way, and on a GPU it writes in place."""
    if way == "on a GPU":
        monkeypatch.setattr(mamba, "takes_turns", lambda *_: False)
    monkeypatch.setattr(mamba, "SCAN_ELEMENTS", span)
    monkeypatch.setattr(mamba, "CACHED_ELEMENTS", span)
    inputs = draw(3, length, 6, 4, groups, 5)
    y, state = mamba.scan(inputs[0].requires_grad_(way == "learned"), *inputs[1:])
    expected, left = by_positions(*inputs)
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert (state - left).abs().max() <= 2e-6 * left.abs().max()


@pytest.mark.parametrize("way", ["in turn", "on a GPU"])
@pytest.mark.parametrize("step", [1e3, 1e6, 1e30])
def test_what_follows_a_step_that_forgets_all_is_as_exact(
    step: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of exponents that grow without end must not cost the short decays behind them digits."""
    if way == "on a GPU":
        monkeypatch.setattr(mamba, "takes_turns", lambda *_: False)
    x, dt, *rest = draw(2, 130, 6, 4, 3, 5)
    dt[:, 3::5] = step
    x[:, 3::5] /= step
    y, state = mamba.scan(x, dt, *rest)
    expected, left = by_positions(x, dt, *rest)
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert (state - left).abs().max() <= 2e-6 * left.abs().max()


@pytest.mark.long
@pytest.mark.parametrize("groups", [1, 8])
def test_a_long_scan_stays_within_a_hundred_thousandth(groups: int) -> None:
    """2,048 positions, 1,024 channels in 16 heads, states of 128."""
    inputs = draw(1, 2048, 16, 64, groups, 128)
    expected, _ = by_positions(*inputs)
    assert (mamba.scan(*inputs)[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_gradients_are_those_of_the_recurrence() -> None:
    inputs = [part.double().requires_grad_() for part in draw(2, 150, 6, 4, 3, 5)]
    weights = torch.linspace(-1, 1, 4, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((function(*inputs)[0] * weights).sum(), inputs)
        for function in (mamba.scan, by_positions)
    )
    for name, a, b in zip(("x", "dt", "A", "B", "C", "state"), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * b.abs().max().item(), msg=name)


def formula(layer: mamba.MambaMixer, c: ModelConfig, x: Tensor) -> Tensor:
    """Return the layer's output from the equations alone."""
    d, shared = c.mamba_width, c.mamba_num_groups * c.mamba_state_dim
    z, mixed, dt = F.linear(x, layer.in_proj.weight).split(
        [d, d + 2 * shared, c.mamba_num_heads], dim=-1
    )
    convolved = F.conv1d(
        F.pad(mixed.transpose(1, 2), (c.mamba_conv_width - 1, 0)),
        layer.conv1d.weight,
        layer.conv1d.bias,
        groups=mixed.shape[-1],
    )
    inputs, B, C = F.silu(convolved).transpose(1, 2).split([d, shared, shared], dim=-1)
    dt = F.softplus(dt + layer.dt_bias).clamp(min=c.mamba_min_time_step)
    heads = inputs.unflatten(-1, (c.mamba_num_heads, -1))
    B, C = (part.unflatten(-1, (c.mamba_num_groups, -1)) for part in (B, C))
    per_group = c.mamba_num_heads // c.mamba_num_groups
    start = heads.new_zeros(len(x), c.mamba_num_groups, B.shape[-1], per_group, c.mamba_head_dim)
    y, _ = by_positions(heads, dt, -layer.A_log.exp(), B, C, start)
    y = (y + layer.D[:, None] * heads).flatten(2) * F.silu(z)
    y = y.unflatten(-1, (c.mamba_num_groups, -1))
    epsilon = 1e-5 if c.mamba_norm_epsilon is None else c.mamba_norm_epsilon
    y = y / (y.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return F.linear(y.flatten(2) * layer.norm.weight, layer.out_proj.weight)


@pytest.mark.parametrize("change", [{}, {"mamba_min_time_step": 0.7, "mamba_norm_epsilon": 0.1}])
def test_the_layer_is_its_formula(change: dict[str, float]) -> None:
    config = dataclasses.replace(PURE, **change)
    layer = random_models.on_one_rank(config).double().decoder.layers[0].mixer
    x = torch.randn(2, 70, config.hidden_size, generator=torch.Generator().manual_seed(1)).double()
    expected = formula(layer, config, x)
    for first in (0, 66):
        torch.testing.assert_close(
            layer(x, Context(causal=True), first), expected[:, first:], rtol=1e-9, atol=1e-12
        )


def states(tp: int) -> Tensor:
    mesh = make_mesh(tp=tp, dp=1).tensor_parallel
    source = random_models.checkpoint(PURE)
    model = load_model(source, mesh, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        return model(tokens)  # type: ignore[operator, no-any-return]


@pytest.mark.process
@pytest.mark.long
def test_ranks_that_share_a_group_norm_it_together() -> None:
    [whole] = run_ranks(1, states, 1)
    for tp in (2, 4, 8):  # of two groups
        for found in run_ranks(tp, states, tp):
            torch.testing.assert_close(found, whole, rtol=0, atol=2e-5)


def test_vectors_of_heads_stay_float32_in_a_half_precision_model() -> None:
    source = random_models.checkpoint(PURE)
    model = load_model(source, SINGLE, device=torch.device("cpu"), dtype=torch.bfloat16)
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters()}
    assert {kinds[name] for name in ("A_log", "D", "dt_bias")} == {torch.float32}
    assert kinds["weight"] == torch.bfloat16
    exact = random_models.on_one_rank(PURE)(torch.arange(12)[None])
    with torch.inference_mode():
        rounded = model(torch.arange(12)[None])  # type: ignore[operator]
    assert (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()
