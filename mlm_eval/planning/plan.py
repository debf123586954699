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
from mlm_eval.checkpoints.parameters import (
    active_parameters,
    allowed_tp,
    check_tp,
    num_parameters,
)
from mlm_eval.model.costs.flops import forward_flops
from mlm_eval.model.costs.memory import (
    OUTSIDE,
    Memory,
    TrainingBatch,
    TrainingNeed,
    evaluation_memory,
    local_parameters,
)

NODE = 8
"""Devices of a usual node."""

BACKWARD = 2
"""The backward pass costs twice the forward pass."""


@dataclass(frozen=True)
class Passes:
    """Forward passes of one shape."""

    count: int
    """Number of sequences."""
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
    sample: TrainingBatch
    """A forward pass over one sample."""
    micro_batch: int
    """Samples of a forward pass on a rank, at the most."""
    global_batch: int
    """Samples of a step, over all ranks."""
    heads: Mapping[str, Any]
    """Settings of the model with the task's head."""

    def need(
        self, config: ModelConfig, *, batch_tokens: int, sharded: bool = False
    ) -> TrainingNeed:
        """Return what each rank needs, as the run itself sees it when it chooses its layout."""
        return TrainingNeed(
            dataclasses.replace(config, **self.heads),
            self.sample,
            micro_batch=self.micro_batch,
            global_batch=self.global_batch,
            batch_tokens=batch_tokens,
            sharded=sharded,
        )


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


def plan_record(
    name: str,
    config_of: Callable[[int], ModelConfig],
    workloads: Sequence[Workload],
    *,
    itemsize: int,
    batch_tokens: int,
    device: str = "cuda",
    tp: int | None = None,
    dp: int = 1,
    sharded: bool = False,
    device_memory: float | None = None,
    throughput: float | None = None,
    paper_parameters: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a model's runs need at each tensor-parallel size that divides the model.

    `layouts` holds for each size the weights of the fullest rank, and the bytes that evaluation and
    each training task need there; `fits` is None if no device was given. `smallest_tp` is the
    smallest size that fits, for `evaluation` and each training task; {} without a device. `tasks`
    holds floating-point operations over all ranks: of one evaluation, and of a whole fine-tuning
    with the evaluations after each epoch. `active_parameters` are those that a token meets, and
    `flops_per_token` is for a full text. Seconds are for `tp` x `dp` ranks; None without a
    throughput.

    Args:
        name: Of the model, for people.
        config_of: Returns the model's settings for a tensor-parallel size, which may decide how
            far the vocabulary is padded.
        workloads: The benchmarks.
        itemsize: Bytes of a weight in evaluation.
        batch_tokens: Padded tokens of a forward pass in evaluation.
        device: `cuda` or `cpu`.
        tp: Only this size.
        dp: Copies of the model in training.
        sharded: The copies share weights, gradients and moments (FSDP2).
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
    scored = max((w.scored_rows(batch_tokens) for w in workloads), default=0)

    def need(memory: Memory) -> dict[str, Any]:
        if device == "cpu":
            memory = memory.on_cpu()
        fits = None if device_memory is None else memory.total + OUTSIDE <= device_memory
        return {**dataclasses.asdict(memory), "total": memory.total, "fits": fits}

    def layout(size: int) -> dict[str, Any]:
        config = config_of(size)
        evaluation = evaluation_memory(
            config, tp=size, itemsize=itemsize, batch_tokens=batch_tokens, scored_rows=scored
        )
        training = {
            w.task: w.training.need(config, batch_tokens=batch_tokens, sharded=sharded)(size, dp)
            for w in workloads
            if w.training is not None
        }
        return {
            "tp": size,
            "vocab_size": config.vocab_size,
            "parameters_per_rank": local_parameters(config, size),
            "evaluation": need(evaluation),
            "training": {task: need(memory) for task, memory in training.items()},
        }

    layouts = [layout(size) for size in (allowed_tp(config) if tp is None else [tp])]
    smallest = {} if device_memory is None else _smallest(layouts)
    # Without a device the times are for the smallest size; where nothing fits, for the largest.
    default_tp = layouts[0 if device_memory is None else -1]["tp"]
    return {
        "model": name,
        "num_parameters": num_parameters(config),
        "active_parameters": active_parameters(config),
        "flops_per_token": _flops_per_token(config),
        "paper_parameters": paper_parameters,
        "allowed_tp": allowed_tp(config),
        "config": config.to_dict(),
        "settings": {
            **(settings or {}),
            "throughput": throughput,
            "device": device,
            "itemsize": itemsize,
            "batch_tokens": batch_tokens,
        },
        "device_memory": device_memory,
        "left_free": OUTSIDE,
        "layouts": layouts,
        "smallest_tp": smallest,
        "notes": _notes(smallest, device_memory),
        "tasks": [_cost(config, work, smallest, default_tp, dp, throughput) for work in workloads],
    }


def _flops_per_token(config: ModelConfig) -> float:
    """Return the operations of a forward pass over a full text with all logits, for each token."""
    length = config.max_position_embeddings
    return forward_flops(config, length, last_rows=length, head_rows=length) / length


def _notes(smallest: Mapping[str, int | None], device_memory: float | None) -> list[str]:
    """Return what an evaluation that does not fit a node means, in a sentence."""
    if device_memory is None:
        return []
    size = smallest["evaluation"]
    if size is None:
        return [
            "no tp that divides the model leaves a rank that fits: models are evaluated by tensor "
            "parallelism only, there is no pipeline evaluation yet, so this one needs larger "
            "devices"
        ]
    if size <= NODE:
        return []
    return [
        f"evaluation needs tp {size}, more than one node of {NODE} devices: its ranks then sum up "
        "over the network in each layer; there is no pipeline evaluation yet"
    ]


def layout_needs(layout: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what evaluation and each training task need at one size."""
    return {"evaluation": layout["evaluation"], **layout["training"]}


def _smallest(layouts: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    smallest: dict[str, int | None] = dict.fromkeys(layout_needs(layouts[0]))
    for layout in reversed(layouts):
        fitting = [name for name, need in layout_needs(layout).items() if need["fits"]]
        smallest |= dict.fromkeys(fitting, layout["tp"])
    return smallest


def _cost(
    config: ModelConfig,
    workload: Workload,
    smallest: Mapping[str, int | None],
    default_tp: int,
    dp: int,
    throughput: float | None,
) -> dict[str, Any]:
    training = workload.training
    evaluation = _forward(config, workload.passes)
    trained = 0.0
    if training is not None:
        epoch = _forward(config, training.passes) * (1 + BACKWARD + training.sample.recompute)
        trained = training.epochs * (epoch + evaluation)
    # Times are for the size that fits the larger need.
    tp = smallest.get("evaluation" if training is None else workload.task) or default_tp
    rate = None if throughput is None else throughput * tp * dp
    return {
        "task": workload.task,
        "title": workload.title,
        "evaluation_flops": evaluation,
        "training_flops": trained,
        "tp": tp,
        "evaluation_seconds": None if rate is None else evaluation / rate,
        "training_seconds": None if rate is None else trained / rate,
    }


def _forward(config: ModelConfig, passes: Sequence[Passes]) -> float:
    return math.fsum(
        p.count * forward_flops(config, p.length, last_rows=p.last_rows, head_rows=p.head_rows)
        for p in passes
    )


_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}


def parse_throughput(text: str) -> float:
    """Return floating-point operations a second: `400TFLOPS` is 400e12.

    Raises:
        InputError: It is not a rate.
    """
    found = re.fullmatch(
        r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgtp]?)(flops?(?:/s)?)?\s*", text.lower()
    )
    if found is None or float(found[1]) == 0:
        raise InputError(
            f"--throughput {text!r} is not a rate; write 400TFLOPS, 1.5PFLOPS or a number of "
            "operations a second"
        )
    return float(found[1]) * _FACTORS[found[2]]
