"""AdamW's groups, the learning rate, the true norm of the gradient, float16's loss scale."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from mlm_eval.ranks.collectives import local, sum_over_dp, sum_over_tp
from mlm_eval.ranks.mesh import Mesh
from mlm_eval.training.settings import Hyperparameters


@dataclass(frozen=True)
class Trained:
    """A parameter under training."""

    name: str
    """Canonical name."""
    parameter: nn.Parameter
    """This rank's shard of it; a DTensor over the data-parallel ranks under FSDP2."""
    over_tp: bool
    """Whether tensor-parallel ranks hold different parts of it."""


def make_optimizer(trained: Iterable[Trained], settings: Hyperparameters) -> torch.optim.AdamW:
    """Return AdamW whose decay leaves out biases and norms: those of experts, and what has one dim.

    Source: docs/megatron.md, "Training loop".
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for item in trained:
        decays = item.parameter.dim() > 1 and not item.name.endswith(".bias")
        groups[decays].append(item.parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": settings.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        fused=True,
    )


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step, Megatron's (docs/megatron.md, "Training loop").

    It rises linearly from 0 (the first step has a rate of 0). Since v2.0 it then falls to `min_lr`,
    which it would reach one step after the last. v1.0's falls by `lr / total` a step, and stands
    still for the last `warmup * total` steps: it ends at `2 * warmup * lr`.
    """

    lr: float
    """The highest rate."""
    min_lr: float
    """The rate at the end; v1.0's never falls below it."""
    total: int
    """Steps of the run."""
    warmup: float
    """Share of the steps in which the rate rises."""
    decay: str = "linear"
    """`linear`, `cosine`, or `linear-v1` for v1.0's."""

    def __call__(self, step: int) -> float:
        """Return the rate of a step, counted from 0."""
        rising = self.warmup * self.total
        if self.decay == "linear-v1":
            counted = min(step, self.total - rising)
            if rising > 0 and step <= rising:
                return self.lr * counted / rising
            return max(self.lr * (self.total - (counted - rising)) / self.total, self.min_lr)
        if rising > 0 and step <= rising:
            return self.lr * step / rising
        share = min((step - rising) / max(self.total - rising, 1e-9), 1.0)
        if self.decay == "cosine":
            height = 0.5 * (math.cos(math.pi * share) + 1)
        else:
            height = 1 - share
        return self.min_lr + (self.lr - self.min_lr) * height


def gradient_norm(trained: Iterable[Trained], mesh: Mesh, *, over_dp: bool) -> float:
    """Return the 2-norm of the whole model's gradient, the same on every rank.

    Parts of a parameter are summed over the ranks that hold them; a replicated parameter counts
    once.
    Collectives: one all-reduce over tp, and one over dp where the gradient is cut over it.

    Args:
        trained: The parameters, their gradients complete.
        mesh: The layout.
        over_dp: Each data-parallel rank holds a part of every gradient (FSDP2).
    """
    parts: tuple[list[Tensor], list[Tensor]] = [], []  # replicated over tp, cut over tp
    device = torch.device("cpu")
    for item in trained:
        device = item.parameter.device
        if item.parameter.grad is not None:
            parts[item.over_tp].append(local(item.parameter.grad))
    norms = [get_total_norm(part).to(device, torch.float64) for part in parts]
    squares = torch.stack(norms).square()
    if over_dp:
        sum_over_dp(squares, mesh)
    sum_over_tp(squares[1:], mesh)
    return math.sqrt(float(squares.sum()))


def scale_gradients(trained: Iterable[Trained], factor: float) -> None:
    """Multiply all gradients by `factor`, in place."""
    for item in trained:
        if item.parameter.grad is not None:
            local(item.parameter.grad).mul_(factor)


class LossScale:
    """The factor that keeps float16 gradients from vanishing; 1 and constant for other dtypes.

    The rule of torch.amp.GradScaler, which looks for overflow on its own rank only: here the norm
    of the whole gradient decides, so that all ranks skip the same steps.
    """

    GROWTH_INTERVAL = 2000
    SMALLEST = 2.0**-14

    def __init__(self, *, active: bool, value: float = 2.0**16, good_steps: int = 0) -> None:
        self.active = active
        self.value = value if active else 1.0
        self.good_steps = good_steps

    def update(self, *, finite: bool) -> None:
        """Halve after an overflow, double after `GROWTH_INTERVAL` steps without one."""
        if not self.active:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps == self.GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0

    @property
    def exhausted(self) -> bool:
        """Whether it has shrunk so far that the loss itself must be broken."""
        return self.active and self.value < self.SMALLEST
