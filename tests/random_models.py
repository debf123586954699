"""Random models for the tests: every weight is noise, biases and gains included.

A zero bias hides the classic fault of tensor parallelism, a bias added once per rank, and equal gains hide
a wrong order.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.lazy import InMemory
from mlm_eval.checkpoints.parameters import parameters

GPT = ModelConfig(
    family="gpt",
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=8,
    ffn_hidden_size=64,
    vocab_size=50,
    max_position_embeddings=16,
)
LLAMA = dataclasses.replace(
    GPT,
    num_query_groups=2,
    position_embedding_type="rope",
    normalization="RMSNorm",
    activation="swiglu",
    add_bias_linear=False,
    add_qkv_bias=False,
    untie_embeddings_and_output_weights=True,
)
BERT = dataclasses.replace(GPT, family="bert", num_tokentypes=2, pooler=True, binary_head=True)


def config(base: ModelConfig = GPT, **changes: Any) -> ModelConfig:
    """Return `base` with some settings changed; one group of queries a head unless said otherwise."""
    if "num_attention_heads" in changes:
        changes.setdefault("num_query_groups", changes["num_attention_heads"])
    return dataclasses.replace(base, **changes)


def state_dict(model: ModelConfig, *, seed: int = 0, std: float = 0.2) -> dict[str, Tensor]:
    """Return every parameter: N(0, std), gains of norms about 1 (or 0 where they are zero-centred)."""
    noise = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in parameters(model).items():
        weights[name] = torch.randn(parameter.shape, generator=noise) * std
        if "norm" in name and name.endswith("weight") and not model.layernorm_zero_centered_gamma:
            weights[name] += 1
    return weights


def checkpoint(
    model: ModelConfig,
    weights: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    path: Path | str = "memory",
) -> Checkpoint:
    """Return a checkpoint of canonical weights, random ones if none are given."""
    weights = state_dict(model, seed=seed) if weights is None else weights
    lazy = {name: InMemory(tensor) for name, tensor in weights.items()}
    return Checkpoint(model, lazy, Provenance(Path(path), "megatron-torch", digest="none")).check()


def byte_vocabulary(folder: Path) -> Path:
    """Write a GPT-2 vocabulary without merges, one id a byte: 256 entries for any text."""
    from tokenizers import pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder
