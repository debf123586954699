"""Checkpoints of the paper's sizes with random weights, written one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.lazy import Computed, LazyTensor
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.parameters import Parameter, parameters

_NOISE = 99_991
"""Numbers that are drawn for a tensor."""

SIZES = {"124m": (12, 768, 12), "345m": (24, 1024, 16), "1.3b": (24, 2048, 16)}
"""Layers, hidden size, attention heads."""


def gpt2(size: str, *, vocab_size: int, dtype: torch.dtype = torch.float16) -> Checkpoint:
    """Return a GPT-2 of one of the `SIZES` whose tensors are made when they are read."""
    layers, hidden, heads = SIZES[size]
    config = ModelConfig(
        family="gpt",
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // heads,
        ffn_hidden_size=4 * hidden,
        vocab_size=vocab_size,
        max_position_embeddings=1024,
        activation="gelu_tanh",
        params_dtype=str(dtype).removeprefix("torch."),
    )
    return as_checkpoint(config, dtype)


def as_checkpoint(config: ModelConfig, dtype: torch.dtype) -> Checkpoint:
    """Return a model with random weights, each tensor made when it is read."""
    tensors: dict[str, LazyTensor] = {
        name: _random(parameter, dtype) for name, parameter in parameters(config).items()
    }
    return Checkpoint(config, tensors, Provenance(Path("synthetic"), "memory")).check()


def _random(parameter: Parameter, dtype: torch.dtype) -> LazyTensor:
    seed = sum(parameter.name.encode())

    def make() -> torch.Tensor:
        # A run of noise, again and again: drawing billions of numbers takes minutes.
        noise = torch.empty(min(count, _NOISE))
        noise.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
        values = noise.to(dtype).repeat(-(-count // _NOISE))
        return values[:count].view(parameter.shape)

    count = parameter.numel()

    return Computed(parameter.shape, dtype, make)


def write_gpt2(size: str, folder: Path, *, tp: int, vocab_size: int) -> Path:
    """Write a synthetic fp16 checkpoint in Megatron's torch format, tensor-parallel `tp`."""
    return write_megatron_torch(gpt2(size, vocab_size=vocab_size), folder, tp=tp)
