"""Models before their training: a new head on a trained encoder, and new models of a named size."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.checkpoints.config import ModelConfig, apply_overrides
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Computed, LazyTensor
from mlm_eval.checkpoints.parameters import TASK_HEADS, Parameter, parameters

DIVISIBLE_BY = 128
"""A new model's vocabulary is padded to a multiple of this, whatever the layout of its training."""

# Layers, hidden size, heads: the paper's models (its Tables 1, 2 and 4), then small ones.
SIZES = {
    "gpt2-355m": (24, 1024, 16),
    "gpt2-1.2b": (40, 1536, 16),
    "gpt2-2.5b": (54, 1920, 20),
    "gpt2-4.2b": (64, 2304, 24),
    "gpt2-8.3b": (72, 3072, 24),
    "gpt2-small": (12, 768, 12),
    "gpt2-tiny": (4, 128, 4),
    "bert-336m": (24, 1024, 16),
    "bert-1.3b": (24, 2048, 32),
    "bert-3.9b": (48, 2560, 40),
    "bert-base": (12, 768, 12),
    "bert-mini": (4, 256, 4),
    "bert-tiny": (2, 128, 2),
}


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
            f"{checkpoint.provenance.path} is a GPT checkpoint; fine-tuning needs a BERT model, "
            "which reads both ways"
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
    provenance = Provenance(Path("a new model"), "memory", digest=f"initial weights, seed {seed}")
    return Checkpoint(config, tensors, provenance).check()


def initial_tensor(config: ModelConfig, parameter: Parameter, *, seed: int) -> LazyTensor:
    """Return a parameter's initial weights: a function of its name, shape and the seed."""
    draw = functools.partial(_draw, config, parameter, seed)
    return Computed(parameter.shape, torch.float32, draw)


def _draw(config: ModelConfig, parameter: Parameter, seed: int) -> Tensor:
    name, shape = parameter.name, parameter.shape
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.full(shape, 0.0 if config.layernorm_zero_centered_gamma else 1.0)
    digest = hashlib.sha256(f"weights {seed} {name}".encode()).digest()
    noise = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    std = config.init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * config.num_layers)
    return torch.randn(shape, generator=noise) * std


def initial_config(
    name: str | Path,
    *,
    family: str,
    vocab_entries: int,
    overrides: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Return the settings of a new model.

    BERT: 512 positions, exact GELU, pooler and sentence-order head. GPT: 1,024 positions and tanh
        GELU.

    Args:
        name: A size (`SIZES`), or a TOML file of `ModelConfig` fields of which `num_layers`,
            `hidden_size` and `num_attention_heads` must be there.
        family: `bert` or `gpt`.
        vocab_entries: Entries of the tokenizer; rows are added up to a multiple of 128.
        overrides: Settings that win (`--set`); `apply_residual_connection_post_layernorm` for
            BERT's original order.

    Raises:
        InputError: There is no such size, file or setting.
    """
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": -(-vocab_entries // DIVISIBLE_BY) * DIVISIBLE_BY,
        "max_position_embeddings": 1024 if family == "gpt" else 512,
        "activation": "gelu_tanh" if family == "gpt" else "gelu",
    }
    if family == "bert":
        values |= {"num_tokentypes": 2, "pooler": True, "binary_head": True}
    values |= _named(name) | dict(overrides or {})
    if values["family"] != family:
        raise InputError(
            f"--init {name} is a {values['family']} model, this command trains {family}"
        )
    if values["vocab_size"] < vocab_entries:
        raise InputError(
            f"--init {name} sets vocab_size {values['vocab_size']}, the tokenizer has "
            f"{vocab_entries} entries; leave vocab_size out"
        )
    try:
        hidden, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
        values.setdefault("num_query_groups", heads)
        values.setdefault("kv_channels", hidden // max(heads, 1))
        values.setdefault("ffn_hidden_size", 4 * hidden)
        config = ModelConfig(**{k: v for k, v in values.items() if k != "checkpoint_version"})
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--init {name} does not describe a model ({error}); it must set num_layers, "
            "hidden_size and num_attention_heads, and only settings that --set knows"
        ) from None
    return apply_overrides(config, overrides or {})


def _named(name: str | Path) -> dict[str, Any]:
    if str(name) in SIZES:
        layers, hidden, heads = SIZES[str(name)]
        family = "gpt" if str(name).startswith("gpt") else "bert"
        sizes = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
        return {"family": family, **sizes}
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(
            f"--init {name} is neither a size nor a TOML file; sizes are {', '.join(SIZES)}"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML file of model settings: {error}") from None
