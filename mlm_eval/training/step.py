"""One step of training: micro-batches forward and backward, the gradient's norm, the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_eval.checkpoints.dtypes import resolve_dtype
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.products import float32_products
from mlm_eval.model.dropout import Dropout, sample_keys
from mlm_eval.model.t5 import T5
from mlm_eval.ranks.collectives import sum_over_dp, sum_over_ranks
from mlm_eval.training.data import Sample, collate, deal, sample_length
from mlm_eval.training.objectives import Objective
from mlm_eval.training.optimization import (
    LossScale,
    Schedule,
    gradient_norm,
    make_optimizer,
    scale_gradients,
)
from mlm_eval.training.replicas import Replicas
from mlm_eval.training.settings import Counters, TrainSettings


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank."""

    loss: float
    """Mean over the samples of the global batch."""
    hits: float
    """Correct predictions."""
    predictions: float
    """Predictions."""
    norm: float
    """Of the gradient, before clipping."""
    lr: float
    """Learning rate."""
    moved: bool
    """Whether the weights moved: float16 skips a step whose gradient overflows."""
    broken: bool
    """Loss or gradient is not finite, and no smaller loss scale can help."""
    save_due: bool
    """Whether it is time to save a state, by rank 0's clock."""


class Stepper:
    """The model under training with its optimizer."""

    def __init__(
        self,
        engine: Engine,
        data: Sequence[Sample],
        objective: Objective,
        settings: TrainSettings,
        schedule: Schedule,
        counters: Counters,
    ) -> None:
        """Wrap the engine's model for its layout and make the optimizer.

        Args:
            engine: Holds the weights to start from.
            data: The samples.
            objective: The loss.
            settings: How to train.
            schedule: The learning rate.
            counters: Where the run stands.
        """
        settings = settings.on(engine.device.type)
        self.engine, self.mesh, self.data = engine, engine.mesh, data
        self.objective, self.settings, self.schedule = objective, settings, schedule
        assert not isinstance(engine.model, T5), "the commands refuse to train a T5"
        self.replicas = Replicas(
            engine.model,
            objective,
            engine.mesh,
            mode=settings.dp_mode,
            recompute=settings.recompute,
            dtype=resolve_dtype(settings.dtype),
        )
        self.optimizer = make_optimizer(self.replicas.trained, settings)
        self.scale = LossScale(
            active=settings.dtype == "float16",
            value=counters.loss_scale,
            good_steps=counters.good_steps,
        )

    def rehearse(self) -> None:
        """Run one sample for nothing: DDP regroups the gradients after its first backward pass.

        Sums over three and more ranks depend on the grouping. With this pass a resumed run has the
        same grouping in each step as one that was never stopped.
        """
        self._forward_and_backward([self.data[0]], 0, 1.0, factor=0.0, last=True)
        self.optimizer.zero_grad(set_to_none=True)

    def take(self, step: int, numbers: list[int], *, updates: int, save_due: bool) -> StepResult:
        """Take one step.

        Args:
            step: Its number, from 0.
            numbers: The samples of its global batch.
            updates: Steps before it that moved the weights; the learning rate goes by them, as in
                Megatron.
            save_due: Whether rank 0 wants all ranks to save a state after the step.
        """
        settings, trained = self.settings, self.replicas.trained
        sums = self._gradients(step, numbers)
        loss, hits, predictions, save_due = self._over_ranks(sums, save_due)
        # DDP and FSDP2 have taken the mean over dp. It becomes a sum here, in float32: a factor of
        # dp in the loss would have float16 overflow at one layout and not at another.
        norm = gradient_norm(trained, self.mesh, over_dp=self.replicas.sharded)
        norm *= self.mesh.dp / self.scale.value
        lr = self.schedule(updates)
        finite = math.isfinite(norm)
        if finite:
            factor = self.mesh.dp / self.scale.value
            if settings.clip_grad > 0:
                factor *= min(1.0, settings.clip_grad / (norm + 1e-6))
            if factor != 1.0:
                scale_gradients(trained, factor)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.update(finite=finite)
        broken = not finite and (not self.scale.active or self.scale.exhausted)
        loss /= len(numbers)
        return StepResult(loss, hits, predictions, norm, lr, finite, broken, save_due)

    def _gradients(self, step: int, numbers: list[int]) -> Tensor:
        """Run this rank's share of a step; return (sum of losses, hits, predictions) float64.

        The gradients are then the mean over dp of the ranks' parts: dp times too small.
        """
        mesh = self.mesh
        lengths = [sample_length(self.data, number) for number in numbers]
        micro_batches = deal(
            lengths,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp,
            micro_batch=self.settings.micro_batch,
        )
        chosen = [[self.data[numbers[i]] for i in positions] for positions in micro_batches]
        mean_weight = self._mean_weight(chosen, len(numbers))
        sums = torch.zeros(3, dtype=torch.float64, device=self.engine.device)
        factor = self.scale.value / len(numbers)
        for index, samples in enumerate(chosen):
            last = index + 1 == len(chosen)
            if samples:
                sums += self._forward_and_backward(
                    samples, step, mean_weight, factor=factor, last=last
                )
            else:  # the other ranks have one micro-batch more
                stand_in = self.data[numbers[lengths.index(min(lengths))]]
                self._forward_and_backward([stand_in], step, mean_weight, factor=0.0, last=last)
        return sums

    def _mean_weight(self, chosen: list[list[Sample]], samples: int) -> float:
        if type(self.objective).weight is Objective.weight:
            return 1.0
        weight = sum(self.objective.weight(sample) for part in chosen for sample in part)
        total = torch.tensor(weight, dtype=torch.float64, device=self.engine.device)
        return float(sum_over_dp(total, self.mesh)) / samples

    def _forward_and_backward(
        self,
        samples: list[Sample],
        step: int,
        mean_weight: float,
        *,
        factor: float,
        last: bool,
    ) -> Tensor:
        settings, device = self.settings, self.engine.device
        # Matrix units of GPUs want sizes in eights.
        multiple = 8 if device.type == "cuda" else 1
        batch = collate(samples, mean_weight=mean_weight, device=device, multiple=multiple)
        dropout = None
        if settings.hidden_dropout > 0 or settings.attention_dropout > 0:
            keys = sample_keys(settings.seed, step, batch.row_numbers)
            dropout = Dropout(keys, settings.hidden_dropout, settings.attention_dropout)
        halved = settings.dtype != "float32"
        autocast = torch.autocast(device.type, resolve_dtype(settings.dtype), enabled=halved)
        with self.replicas.accumulating(last=last), float32_products():
            with autocast:
                loss, sums = self.replicas.module(batch, dropout, factor)
            loss.backward()
        return sums  # type: ignore[no-any-return]

    def _over_ranks(self, sums: Tensor, save_due: bool) -> tuple[float, float, float, bool]:
        """Return sums of losses, hits and predictions over all ranks, and rank 0's `save_due`."""
        if self.mesh.tp_rank > 0:  # its numbers are those of its group's first rank
            sums = torch.zeros_like(sums)
        due = float(save_due and self.engine.is_main)
        everything = torch.cat([sums, sums.new_full((1,), due)])
        loss, hits, predictions, due = sum_over_ranks(everything).tolist()
        return loss, hits, predictions, due > 0
