"""A checkpoint with more or fewer rows in its vocabulary.

Megatron pads the table of word embeddings, so it has more rows than the tokenizer has entries.
"""

from __future__ import annotations

import dataclasses

import torch

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.lazy import LazyTensor, Selected
from mlm_eval.checkpoints.parameters import parameters


def with_rows(checkpoint: Checkpoint, rows: int) -> Checkpoint:
    """Return the checkpoint with a vocabulary of `rows`: the first ones, or the last one repeated.

    Megatron's own converter repeats the last row too.
    """
    config = dataclasses.replace(checkpoint.config, vocab_size=rows)
    order = torch.arange(rows).clamp(max=checkpoint.config.vocab_size - 1)
    tensors: dict[str, LazyTensor] = dict(checkpoint.tensors)
    for name, parameter in parameters(config).items():
        if tensors[name].shape != parameter.shape:
            tensors[name] = Selected(tensors[name], order)
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)
