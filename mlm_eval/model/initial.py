"""Weights before training: a new head on a trained encoder, and all of a new model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Computed, LazyTensor
from mlm_eval.checkpoints.parameters import TASK_HEADS, Parameter, parameters


def with_head(
    checkpoint: Checkpoint, head: str, *, num_classes: int = 0, seed: int = 1234
) -> Checkpoint:
    """Return a BERT checkpoint with one task head, ready for fine-tuning; no weight is read yet.

    The heads of pre-training go, and other task heads. A head of the right size that is there
    stays; otherwise it is drawn from the seed, N(0, 0.02) with bias 0, the same on every rank and
    layout. So is a missing pooler, with a warning (Megatron refuses such a checkpoint). Question
    answering reads the states themselves and takes no pooler along.
    Source: docs/megatron.md, "Legacy BERT", "Training loop".

    Args:
        checkpoint: A BERT model.
        head: One of `TASK_HEADS`.
        num_classes: Outputs of a `classification_head`.
        seed: Of what is drawn.

    Raises:
        InputError: The checkpoint holds no BERT.
    """
    assert head in TASK_HEADS and (num_classes > 0) == (head == "classification_head"), head
    old = checkpoint.config
    if old.family != "bert":
        raise InputError(
            f"{checkpoint.provenance.path} is a {old.family.upper()} checkpoint; fine-tuning needs "
            "a BERT model, which reads both ways"
        )
    config = dataclasses.replace(
        old,
        lm_head=False,
        binary_head=False,
        num_classes=num_classes,
        multichoice_head=head == "multichoice_head",
        qa_head=head == "qa_head",
        pooler=head != "qa_head",
    )
    tensors: dict[str, LazyTensor] = {}
    warnings = list(checkpoint.provenance.warnings)
    for name, parameter in parameters(config).items():
        found = checkpoint.tensors.get(name)
        if found is not None and found.shape == parameter.shape:
            tensors[name] = found
            continue
        module = name.partition(".")[0]
        assert module in (head, "pooler"), name
        tensors[name] = initial_tensor(config, parameter, seed=seed)
        if name == "pooler.dense.weight":
            warnings.append("the checkpoint has no pooler: a new one is drawn, to be trained")
        elif found is not None and name.endswith("weight"):
            warnings.append(
                f"the checkpoint's {head} has {found.shape[0]} outputs, this task needs "
                f"{parameter.shape[0]}: a new one is drawn"
            )
    provenance = dataclasses.replace(checkpoint.provenance, warnings=warnings)
    return Checkpoint(config, tensors, provenance).check()


def new_checkpoint(config: ModelConfig, *, seed: int) -> Checkpoint:
    """Return a model with Megatron's initial weights; each tensor is drawn when it is read.

    N(0, 0.02), what is added to the residual scaled by 1 / sqrt(2 layers), biases 0, gains 1.
    Source: docs/megatron.md, "Initialization and precision".
    """
    table = parameters(config)
    tensors = {name: initial_tensor(config, table[name], seed=seed) for name in table}
    provenance = Provenance(
        Path("a new model"),
        "memory",
        # Only Megatron's own code before megatron-core has BERT's fine-tuning.
        names="legacy" if config.family == "bert" else None,
        digest=f"initial weights, seed {seed}",
    )
    return Checkpoint(config, tensors, provenance).check()


def initial_tensor(config: ModelConfig, parameter: Parameter, *, seed: int) -> LazyTensor:
    """Return a parameter's initial weights: a function of its name, shape and the seed."""
    draw = functools.partial(_draw, config, parameter, seed)
    return Computed(parameter.shape, torch.float32, draw)


def _draw(config: ModelConfig, parameter: Parameter, seed: int) -> Tensor:
    name, shape = parameter.name, parameter.shape
    if name.endswith((".bias", "softmax_offset", "expert_bias")):
        return torch.zeros(shape)
    if ".mixer.norm." in name or name.endswith(".mixer.D"):
        return torch.ones(shape)
    if "norm" in name:
        return torch.full(shape, 0.0 if config.layernorm_zero_centered_gamma else 1.0)
    digest = hashlib.sha256(f"weights {seed} {name}".encode()).digest()
    noise = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    if name.endswith(".A_log"):
        return torch.empty(shape).uniform_(1, 16, generator=noise).log()
    if name.endswith(".dt_bias"):  # time steps from 0.001 to 0.1
        steps = torch.empty(shape).uniform_(math.log(1e-3), math.log(0.1), generator=noise).exp()
        return steps + torch.log(-torch.expm1(-steps))
    if name.endswith(".conv1d.weight"):
        bound = 1 / math.sqrt(config.mamba_conv_width)
        return torch.empty(shape).uniform_(-bound, bound, generator=noise)
    std = config.init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight", "out_proj.weight")):
        std /= math.sqrt(2 * config.num_layers)
    return torch.randn(shape, generator=noise) * std
