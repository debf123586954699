"""Random models for the tests: every weight is noise, biases and gains included.

A zero bias hides the classic fault of tensor parallelism, a bias added once per rank, and equal
gains hide a wrong order.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.lazy import InMemory
from mlm_eval.checkpoints.parameters import parameters, prediction_parameters, vocab_range
from mlm_eval.engine.engine import load_model
from mlm_eval.model.tensor_parallel import (
    SINGLE,
    TensorParallel,
    VocabHead,
    VocabParallelEmbedding,
)
from mlm_eval.ranks.mesh import num_ranks, this_rank
from support import configs

GPT, LLAMA, BERT, config = configs.GPT, configs.LLAMA, configs.BERT, configs.config


def state_dict(model: ModelConfig, *, seed: int = 0, std: float = 0.2) -> dict[str, Tensor]:
    """Return every parameter: N(0, std), gains of norms about 1 (0 where they are centred)."""
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


def with_prediction_heads(source: Checkpoint, heads: int, *, seed: int = 7) -> Checkpoint:
    """Return a checkpoint with heads of multi-token prediction, of noise."""
    noise = torch.Generator().manual_seed(seed)
    found = {
        name: InMemory(torch.randn(parameter.shape, generator=noise))
        for name, parameter in prediction_parameters(source.config, heads).items()
    }
    return dataclasses.replace(source, prediction_heads=found)


def on_one_rank(model: ModelConfig, weights: Mapping[str, Tensor] | None = None) -> Any:
    """Return the whole model, for float32 on the CPU; its weights are random unless given."""
    loaded = load_model(
        checkpoint(model, weights), SINGLE, device=torch.device("cpu"), dtype=torch.float32
    )
    return loaded.eval().requires_grad_(False)


def all_log_probs(model: Any, states: Tensor) -> Tensor:
    """Return `[batch, seq, vocab]`, every entry asked for as a target of its own."""
    vocab = model.config.vocab_size
    rows = states.flatten(0, -2).repeat_interleave(vocab, dim=0)
    targets = torch.arange(vocab).repeat(len(rows) // vocab)
    return model.log_probs(rows, targets)[0].view(*states.shape[:-1], vocab)  # type: ignore[no-any-return]


def bert_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, padding mask and token types; the second line is padded after 9 tokens."""
    noise = torch.Generator().manual_seed(1)
    shape = (2, BERT.max_position_embeddings)
    tokens = torch.randint(BERT.vocab_size, shape, generator=noise)
    types = torch.randint(2, shape, generator=noise)
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    return tokens, mask, types


def byte_vocabulary(folder: Path) -> Path:
    """Write a GPT-2 vocabulary without merges, one id a byte: 256 entries for any text."""
    from tokenizers import pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def checkpoint_from_state_dict(
    config: ModelConfig, state: Mapping[str, Tensor], *, args: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Return a Checkpoint of tensors in memory, for a writer.

    Args:
        config: The model; its `params_dtype` is taken from the word embeddings.
        state: Whole tensors under canonical names (`parameters` lists them).
        args: Megatron args of the run that the model comes from, to be carried over where harmless.

    Raises:
        InputError: The tensors are not those that `config` calls for.
    """
    tensors = {name: InMemory(tensor.detach()) for name, tensor in state.items()}
    if words := tensors.get("embedding.word_embeddings.weight"):
        dtype = str(words.dtype).removeprefix("torch.")
        config = dataclasses.replace(config, params_dtype=dtype)
    provenance = Provenance(Path("the state dict"), "memory", args=dict(args or {}))
    return Checkpoint(config, tensors, provenance).check()


def vocab_head(table: Tensor, bias: Tensor | None = None) -> VocabHead:
    """Return this rank's part of an output table that is cut over all running ranks."""
    group = dist.group.WORLD if num_ranks() > 1 else None
    tp = TensorParallel(this_rank(), num_ranks(), group)
    start, stop = vocab_range(len(table), tp.rank, tp.size)
    embedding = VocabParallelEmbedding(stop - start, table.shape[1], first_row=start, tp=tp)
    embedding.weight = nn.Parameter(table[start:stop].clone())
    head = VocabHead(len(table), embedding, tied=True, biased=bias is not None)
    if bias is not None:
        head.bias = nn.Parameter(bias[start:stop].clone())
    return head
