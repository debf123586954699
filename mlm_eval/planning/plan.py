"""What a run will need before it starts: memory on each rank, floating-point operations, time.

From the model's settings alone: no weight is read. The benchmarks' sizes come from
`mlm_eval.tasks.workloads`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.parameters import allowed_tp, check_tp, num_parameters
from mlm_eval.model.flops import forward_flops
from mlm_eval.model.memory import (
    Memory,
    TrainingBatch,
    evaluation_memory,
    local_parameters,
    training_memory,
)

OUTSIDE = 1 << 30
"""Bytes left free on a device: the CUDA context, workspaces of libraries, fragmentation."""

BACKWARD = 2
"""The backward pass costs twice the forward pass."""


@dataclass(frozen=True)
class Passes:
    """Forward passes of one shape."""

    count: int
    """How many sequences."""
    length: int
    """Input positions of each."""
    last_rows: int
    """Positions of the last layer that are computed whole."""
    head_rows: int
    """Positions whose logits are computed."""


def spread(total: int, count: int) -> list[tuple[int, int]]:
    """Return `count` numbers, equal or 1 apart, with the sum `total`, as (how many, value)."""
    low, more = divmod(total, count)
    return [(n, value) for n, value in ((count - more, low), (more, low + 1)) if n]


@dataclass(frozen=True)
class Training:
    """A fine-tuning."""

    passes: Sequence[Passes]
    """One epoch."""
    epochs: int
    batch: TrainingBatch
    """A rank's micro-batch."""
    heads: Mapping[str, Any]
    """Settings of the model with the task's head."""


@dataclass(frozen=True)
class Workload:
    """What a benchmark asks of a model."""

    task: str
    title: str
    """What is run, for people."""
    passes: Sequence[Passes]
    """The evaluation."""
    training: Training | None = None
    """None for zero-shot tasks."""

    def scored_rows(self, batch_tokens: int) -> int:
        """Return the most positions of an evaluation's batch whose logits are computed."""
        if not self.passes:
            return 0
        usual = max(self.passes, key=lambda p: p.count)
        others = (batch_tokens // usual.length) * usual.head_rows
        return others + max(p.head_rows for p in self.passes)


@dataclass(frozen=True)
class SizeNeeds:
    """What one tensor-parallel size needs on the fullest rank."""

    tp: int
    vocab_size: int
    """Rows of the vocabulary in all ranks together."""
    parameters: int
    """On the rank."""
    evaluation: Memory
    """Scoring."""
    training: Mapping[str, Memory]
    """By task."""


@dataclass(frozen=True)
class TaskCost:
    """What a task costs, over all ranks."""

    task: str
    title: str
    """What is run."""
    evaluation_flops: float
    """Of one evaluation; 0 where there is none."""
    training_flops: float
    """Of the whole fine-tuning, evaluations after each epoch included; 0 without."""
    tp: int
    """Ranks that the times are for."""
    evaluation_seconds: float | None
    """At the throughput that was given; None without one."""
    training_seconds: float | None


@dataclass(frozen=True)
class ResourcePlan:
    """The plan of one model; see `make_plan`."""

    name: str
    config: ModelConfig
    parameters: int
    paper_parameters: int | None
    allowed_tp: Sequence[int]
    settings: Mapping[str, Any]
    layouts: Sequence[SizeNeeds]
    work: Sequence[TaskCost]
    device_memory: float | None
    smallest_tp: Mapping[str, int | None]
    """The smallest size that fits, for `evaluation` and each training task; {} without a device."""

    def fits(self, memory: Memory) -> bool | None:
        """Return whether it fits the device; None if none was given."""
        if self.device_memory is None:
            return None
        return memory.total + OUTSIDE <= self.device_memory

    def to_dict(self) -> dict[str, Any]:
        """Return the record of `mlm-eval plan --json`."""

        def memory(need: Memory) -> dict[str, Any]:
            return {**dataclasses.asdict(need), "total": need.total, "fits": self.fits(need)}

        return {
            "model": self.name,
            "num_parameters": self.parameters,
            "paper_parameters": self.paper_parameters,
            "allowed_tp": list(self.allowed_tp),
            "config": self.config.to_dict(),
            "settings": dict(self.settings),
            "device_memory": self.device_memory,
            "left_free": OUTSIDE,
            "layouts": [
                {
                    "tp": layout.tp,
                    "vocab_size": layout.vocab_size,
                    "parameters_per_rank": layout.parameters,
                    "evaluation": memory(layout.evaluation),
                    "training": {task: memory(m) for task, m in layout.training.items()},
                }
                for layout in self.layouts
            ],
            "smallest_tp": dict(self.smallest_tp),
            "tasks": [dataclasses.asdict(work) for work in self.work],
        }


def make_plan(
    name: str,
    config_of: Callable[[int], ModelConfig],
    workloads: Sequence[Workload],
    *,
    itemsize: int,
    batch_tokens: int,
    device: str = "cuda",
    tp: int | None = None,
    device_memory: float | None = None,
    throughput: float | None = None,
    paper_parameters: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> ResourcePlan:
    """Return what a model's runs need at each tensor-parallel size that divides the model.

    Args:
        name: Of the model, for people.
        config_of: Returns the model's settings for a tensor-parallel size, which may decide how
            far the vocabulary is padded.
        workloads: The benchmarks.
        itemsize: Bytes of a weight in evaluation.
        batch_tokens: Padded tokens of a forward pass in evaluation.
        device: `cuda` or `cpu`.
        tp: Only this size.
        device_memory: Bytes of a device.
        throughput: Floating-point operations a second that a device sustains.
        paper_parameters: The paper's count.
        settings: More entries for the record.

    Raises:
        InputError: `tp` does not divide the model.
    """
    config = config_of(1)
    if tp is not None:
        check_tp(config, tp)
    sizes = [tp] if tp is not None else allowed_tp(config)
    layouts = [
        _needs(size, config_of(size), workloads, itemsize, batch_tokens, device=device)
        for size in sizes
    ]
    plan = ResourcePlan(
        name=name,
        config=config,
        parameters=num_parameters(config),
        paper_parameters=paper_parameters,
        allowed_tp=allowed_tp(config),
        settings={
            **(settings or {}),
            "device": device,
            "itemsize": itemsize,
            "batch_tokens": batch_tokens,
        },
        layouts=layouts,
        work=[],
        device_memory=device_memory,
        smallest_tp={},
    )
    smallest = _smallest(plan) if device_memory is not None else {}
    work = [_work(plan, smallest, workload, throughput) for workload in workloads]
    return dataclasses.replace(plan, work=work, smallest_tp=smallest)


def _needs(
    tp: int,
    config: ModelConfig,
    workloads: Sequence[Workload],
    itemsize: int,
    batch_tokens: int,
    *,
    device: str,
) -> SizeNeeds:
    scored = max((w.scored_rows(batch_tokens) for w in workloads), default=0)
    evaluation = evaluation_memory(
        config, tp=tp, itemsize=itemsize, batch_tokens=batch_tokens, scored_rows=scored
    )
    training = {
        w.task: training_memory(
            dataclasses.replace(config, **w.training.heads), w.training.batch, tp=tp
        )
        for w in workloads
        if w.training is not None
    }
    if device == "cpu":
        evaluation = evaluation.on_cpu()
        training = {task: need.on_cpu() for task, need in training.items()}
    return SizeNeeds(tp, config.vocab_size, local_parameters(config, tp), evaluation, training)


def _smallest(plan: ResourcePlan) -> dict[str, int | None]:
    needs: dict[str, int | None] = {"evaluation": None}
    needs |= dict.fromkeys(plan.layouts[0].training, None)
    for layout in reversed(plan.layouts):
        for need, memory in (("evaluation", layout.evaluation), *layout.training.items()):
            if plan.fits(memory):
                needs[need] = layout.tp
    return needs


def _work(
    plan: ResourcePlan,
    smallest: Mapping[str, int | None],
    workload: Workload,
    throughput: float | None,
) -> TaskCost:
    training = workload.training
    evaluation = _forward(plan.config, workload.passes)
    trained = 0.0
    if training is not None:
        recompute = 1 if training.batch.recompute else 0
        epoch = _forward(plan.config, training.passes) * (1 + BACKWARD + recompute)
        trained = training.epochs * (epoch + evaluation)
    # Times are for the size that fits the larger need.
    need = workload.task if training is not None else "evaluation"
    tp = smallest.get(need) or plan.layouts[-1 if smallest else 0].tp
    rate = None if throughput is None else throughput * tp
    return TaskCost(
        workload.task,
        workload.title,
        evaluation,
        trained,
        tp,
        None if rate is None else evaluation / rate,
        None if rate is None else trained / rate,
    )


def _forward(config: ModelConfig, passes: Sequence[Passes]) -> float:
    return math.fsum(
        p.count * forward_flops(config, p.length, last_rows=p.last_rows, head_rows=p.head_rows)
        for p in passes
    )


_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}


def parse_throughput(text: str) -> float:
    """Return floating-point operations a second: `400TFLOPS` is 400e12.

    Raises:
        InputError: It is no rate.
    """
    found = re.fullmatch(
        r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgtp]?)(flops?(?:/s)?)?\s*", text.lower()
    )
    if found is None or float(found[1]) == 0:
        raise InputError(
            f"--throughput {text!r} is no rate; write 400TFLOPS, 1.5PFLOPS or operations a second"
        )
    return float(found[1]) * _FACTORS[found[2]]
