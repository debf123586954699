"""What the ranks of the training tests run: small models, small data, whole runs of `train`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.parameters import parameters
from mlm_eval.engine.engine import Engine
from mlm_eval.model.initial import with_head
from mlm_eval.training.data import NO_LABEL, Sample
from mlm_eval.training.loop import train
from mlm_eval.training.objectives import (
    CausalLM,
    Classification,
    MaskedLM,
    MultipleChoice,
    Objective,
    SpanExtraction,
)
from mlm_eval.training.optimization import Schedule
from mlm_eval.training.settings import (
    Counters,
    Listener,
    TrainingProgress,
    TrainReport,
    TrainSettings,
)
from mlm_eval.training.state import _whole
from mlm_eval.training.step import Stepper
from support import random_models

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "multichoice_head": MultipleChoice,
    "classification_head": Classification,
    "qa_head": SpanExtraction,
    "mlm": MaskedLM,
    "lm": CausalLM,
}
CLASSES = 3


def model_for(kind: str, base: ModelConfig | None = None) -> Checkpoint:
    """Return random weights with what an objective trains; every head and bias is noise too."""
    if base is None:
        base = random_models.GPT if kind == "lm" else random_models.BERT
    if kind in ("lm", "mlm"):
        return random_models.checkpoint(base)
    classes = CLASSES if kind == "classification_head" else 0
    config = with_head(random_models.checkpoint(base), kind, num_classes=classes).config
    return random_models.checkpoint(config)


def samples(kind: str, count: int, *, vocab: int = 50, longest: int = 16) -> list[Sample]:
    """Return random samples of all lengths from 4 to `longest`."""
    noise = torch.Generator().manual_seed(len(kind))

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=noise))

    result = []
    for index in range(count):
        rows, types = [], []
        for _ in range(4 if kind == "multichoice_head" else 1):
            length = number(4, longest + 1)
            rows.append(torch.randint(vocab, (length,), generator=noise))
            types.append((torch.arange(length) >= number(1, length)).long())
        label: Any = number(0, {"multichoice_head": 4, "classification_head": CLASSES}.get(kind, 1))
        if kind == "qa_head":
            start = number(0, len(rows[0]))
            label = (start, number(start, len(rows[0])))
        elif kind == "lm":
            label, types = torch.randint(vocab, rows[0].shape, generator=noise), [rows[0] * 0]
        elif kind == "mlm":
            hidden = torch.rand(rows[0].shape, generator=noise) < 0.3
            hidden[-1] = True
            label = torch.randint(vocab, rows[0].shape, generator=noise)
            label = label.where(hidden, NO_LABEL)
            label[0] = number(0, 2)
        result.append(Sample(rows, types, label, index))
    return result


def settings(**changes: Any) -> TrainSettings:
    """Return settings without dropout."""
    values = {"lr": 2e-3, "global_batch": 6, "micro_batch": 2, "max_steps": 20, "warmup": 0.2}
    values |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return TrainSettings(**{**values, **changes})


class Slow(Listener):
    """Waits some seconds after each step."""

    def __init__(self, delay: float) -> None:
        self.delay = delay

    def on_step(self, progress: TrainingProgress) -> None:
        time.sleep(self.delay)


def run(
    tp: int,
    dp: int,
    kind: str,
    folder: Path,
    changes: dict[str, Any],
    *,
    count: int = 26,
    base: ModelConfig | None = None,
    restart: bool = False,
    replace: bool = False,
    delay: float = 0.0,
    scores: list[float] | None = None,
) -> tuple[TrainReport, dict[str, Tensor]]:
    """Train on this rank; return the report and the last weights.

    Args:
        tp: Tensor-parallel size.
        dp: Data-parallel size.
        kind: Objective.
        folder: Output.
        changes: Of the settings.
        count: Samples.
        base: The model.
        restart: Discard what is there.
        replace: Discard it where it is another run.
        delay: Seconds that rank 0 waits after each step.
        scores: What the evaluations return, one after the other.
    """
    checkpoint = model_for(kind, base)
    engine = Engine.load(checkpoint, tp=tp, dp=dp, dtype="float32")
    left = list(scores or [])

    def evaluate(progress: TrainingProgress) -> dict[str, Any]:
        # Of weights that every rank holds whole, so that a wrong model in the engine shows.
        table = parameters(engine.config)
        whole = [p for n, p in engine.model.named_parameters() if table[n].rule.dim is None]
        if kind == "multichoice_head":
            # The same for all choices, so its gradient is noise, which Adam scales up.
            whole = whole[:-1]
        total = sum(float(p.double().sum()) for p in whole)
        return {"score": left.pop(0), "weights": total, "nested": {"correct": 3}}

    report = train(
        engine,
        samples(kind, count, vocab=checkpoint.config.vocab_size),
        OBJECTIVES[kind](),
        settings(**changes),
        output_dir=folder,
        evaluate=evaluate if scores is not None else None,
        restart=restart,
        replace=replace,
        listener=Slow(delay),
    )
    return report, {name: p.detach().clone() for name, p in engine.model.named_parameters()}


def gradients(
    tp: int,
    dp: int,
    kind: str,
    changes: dict[str, Any],
    *,
    count: int = 7,
    base: ModelConfig | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and whole gradients of one step over `count` samples, unclipped."""
    checkpoint = model_for(kind, base)
    engine = Engine.load(checkpoint, tp=tp, dp=dp, dtype="float32")
    chosen = settings(**changes)
    data = samples(kind, count, vocab=checkpoint.config.vocab_size)
    stepper = Stepper(
        engine, data, OBJECTIVES[kind](), chosen, Schedule(1.0, 0.0, 1, 0.0), Counters()
    )
    sums = stepper._gradients(0, list(range(count)))
    loss, *_ = stepper._over_ranks(sums, False)
    return loss / count, whole_gradients(stepper)


def whole_gradients(stepper: Stepper) -> dict[str, Tensor]:
    """Return the gradients of the whole model, gathered over all ranks; 0 where there is none."""
    mesh = stepper.mesh
    table = parameters(stepper.engine.config)
    found = {}
    for name, parameter in stepper.replicas.worker.named_parameters():
        gradient: Any = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        whole: Any = _whole(gradient.clone(), table[name], mesh)
        whole = whole.full_tensor() if mesh.device_mesh is not None else whole
        whole = whole * mesh.dp  # the mean over dp so far
        found[name] = whole.reshape(table[name].shape)
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def llama(**changes: Any) -> ModelConfig:
    """Return a model with grouped queries, a gate, rotary positions and an untied table."""
    return dataclasses.replace(random_models.LLAMA, **changes)
