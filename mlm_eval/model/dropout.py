"""Dropout whose masks follow from numbers alone: seed, step, sample, place in the model, unit.

No generator has a state here. A mask is a hash of what it belongs to, so that another layout of
ranks, other padding, other micro-batches or a replay by activation checkpointing give the same
mask. Residual masks are the same on all tensor-parallel ranks; masks of attention weights go by the
head's global number, hence differ between ranks (the paper's appendix B.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_eval.model.layers import to_device

# Odd constants of 32-bit integer hashing (golden ratio; Wellons' lowbias32), as signed int32.
_GOLDEN = 0x9E3779B9 - (1 << 32)
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)

EMBEDDING, HEAD = -1, -2
"""Places outside of the layers, beside the layer numbers from 0."""


def _mix(x: Tensor) -> Tensor:
    """Mix int32 values well (lowbias32), in place; int32 products wrap around."""
    # A shift of a negative number brings in ones: the masks take them away again.
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _FIRST
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _SECOND
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _combine(key: Tensor, value: Tensor | int) -> Tensor:
    """Return a key that depends on `key` and `value`."""
    offset = _wrap(value * _GOLDEN + 1) if isinstance(value, int) else value * _GOLDEN + 1
    return _mix(key * 31 + offset)


def _wrap(value: int) -> int:
    """Return the int32 number that equals `value` modulo 2**32."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def sample_keys(seed: int, step: int, samples: Tensor) -> Tensor:
    """Return one int32 key for each sample of a step.

    Args:
        seed: The run's seed.
        step: The optimizer step, counted over all epochs.
        samples: Numbers of the samples in the data, `[batch]`; rows of one sample (choices) need
            numbers of their own.
    """
    key = _combine(torch.full_like(samples, _wrap(seed), dtype=torch.int32), step)
    low = (samples << 32 >> 32).to(torch.int32)  # what int32 holds of it, on every device
    return _combine(_combine(key, low), (samples >> 32).to(torch.int32))


@dataclass(frozen=True)
class Dropout:
    """The masks of one forward pass in training, over whole sequences: positions count from 0."""

    keys: Tensor
    """What `sample_keys` returned, `[batch]`."""
    hidden: float
    """Probability of dropping a unit of an embedding, a residual branch or a pooled state."""
    attention: float
    """Probability of dropping an attention weight."""

    def residual(self, x: Tensor, layer: int, branch: int) -> Tensor:
        """Return `x` `[batch, seq, hidden]` with units dropped and the rest scaled up.

        Args:
            x: A branch's output.
            layer: Number of the layer, or `EMBEDDING`.
            branch: 0 for attention, 1 for the MLP.
        """
        if self.hidden == 0.0:
            return x
        place = _combine(_combine(self.keys, layer), branch)
        positions = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        rows = _combine(place[:, None], positions[None, :])  # [B, T]
        return _drop(x, rows, self.hidden)

    def pooled(self, x: Tensor) -> Tensor:
        """Return a pooled state `[batch, hidden]` with units dropped: the input of a task head."""
        if self.hidden == 0.0:
            return x
        return _drop(x, _combine(self.keys, HEAD), self.hidden)

    def attention_weights(self, weights: Tensor, layer: int, heads: Sequence[int]) -> Tensor:
        """Return attention weights `[batch, heads, queries, keys]` with entries dropped.

        Args:
            weights: After the softmax.
            layer: Number of the layer.
            heads: Global numbers of this rank's query heads.
        """
        if self.attention == 0.0:
            return weights
        place = _combine(_combine(self.keys, layer), 2)
        numbers = to_device(torch.tensor(list(heads), dtype=torch.int32), weights.device)
        positions = torch.arange(weights.shape[2], dtype=torch.int32, device=weights.device)
        rows = _combine(_combine(place[:, None], numbers)[:, :, None], positions)  # [B, H, T]
        return _drop(weights, rows, self.attention)


def _drop(x: Tensor, rows: Tensor, probability: float) -> Tensor:
    """Drop entries of `x` `[*rows, units]` by the hash of their row's key and their unit."""
    units = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    noise = _mix(rows.unsqueeze(-1) + units * _GOLDEN)
    threshold = int(probability * (1 << 32)) - (1 << 31)
    return x.masked_fill(noise < threshold, 0.0) * (1.0 / (1.0 - probability))
