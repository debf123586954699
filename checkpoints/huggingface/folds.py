"""Two forms of one function: gains stored minus 1, and rotary pairs next to each other.

Megatron has both forms of each, transformers one. A conversion folds the one into the other, and a
comparison does so where two checkpoints differ in nothing but the form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlm_eval.checkpoints.checkpoint import Checkpoint, with_each
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.lazy import LazyTensor, Mapped, RowOrder, Selected

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def is_gain(name: str) -> bool:
    """Whether a parameter is a norm's gain, which `layernorm_zero_centered_gamma` is about."""
    return name.endswith(
        ("layernorm.weight", "layer_norm.weight", ".enorm.weight", ".hnorm.weight")
    )


def with_plain_gains(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Checkpoint:
    """Return the checkpoint with plain gains, not zero-centred ones (Megatron's layernorm_1p).

    The sum is made in float32 and rounded to `dtype`; None: to the dtype of the stored gain.
    """
    if not checkpoint.config.layernorm_zero_centered_gamma:
        return checkpoint

    def plain(name: str, stored: LazyTensor) -> LazyTensor:
        return _add_one(stored, dtype or stored.dtype) if is_gain(name) else stored

    return with_each(checkpoint, plain, layernorm_zero_centered_gamma=False)


def with_centred_gains(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Checkpoint:
    """Return the checkpoint with zero-centred gains, not plain ones; see `with_plain_gains`."""
    if checkpoint.config.layernorm_zero_centered_gamma:
        return checkpoint

    def centred(name: str, stored: LazyTensor) -> LazyTensor:
        return _less_one(stored, dtype or stored.dtype) if is_gain(name) else stored

    return with_each(checkpoint, centred, layernorm_zero_centered_gamma=True)


def _less_one(gain: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return Mapped(gain, lambda values: (values.float() - 1).to(dtype), dtype)


def _add_one(gain: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return Mapped(gain, lambda values: (values.float() + 1).to(dtype), dtype)


def with_halved_rotary(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with rotary pairs (i, i + d/2) in place of (2i, 2i + 1).

    Both rotate the same pairs once the channels of queries and keys stand in another order, the
    same in both, which leaves their products as they are.
    """
    c = checkpoint.config
    if not (c.rotary and c.rotary_interleaved) or c.multi_latent_attention:
        return checkpoint
    return _with_channels(checkpoint, _halves(c))


def with_paired_rotary(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with rotary pairs (2i, 2i + 1): the inverse of `with_halved_rotary`."""
    c = checkpoint.config
    if not c.rotary or c.rotary_interleaved:
        return checkpoint
    return _with_channels(checkpoint, _halves(c).argsort())


def _halves(c: ModelConfig) -> Tensor:
    """Return the channels of a head: first ones of all pairs, second ones, those not rotated."""
    import torch

    rotated = int(c.kv_channels * c.rotary_percent)
    return torch.cat(
        [
            torch.arange(0, rotated, 2),
            torch.arange(1, rotated, 2),
            torch.arange(rotated, c.kv_channels),
        ]
    )


def _with_channels(checkpoint: Checkpoint, channels: Tensor) -> Checkpoint:
    """Return the checkpoint with the channels of queries and keys in another order."""
    import torch

    c = checkpoint.config
    rows = torch.arange(c.qkv_size).view(c.num_query_groups, -1, c.kv_channels)  # [G, q|k|v, hn]
    rows = torch.cat([rows[:, :-1, channels], rows[:, -1:]], dim=1).reshape(-1)

    def reordered(name: str, tensor: LazyTensor) -> LazyTensor:
        if ".linear_qkv." in name:
            return Selected(tensor, rows)
        of_heads = ".q_layernorm." in name or ".k_layernorm." in name
        return Selected(tensor, channels) if of_heads else tensor

    return with_each(checkpoint, reordered, rotary_interleaved=not c.rotary_interleaved)


def with_paired_latents(checkpoint: Checkpoint) -> Checkpoint:
    """Return latent attention's weights for rotary pairs (2i, 2i + 1) in place of (i, i + d/2).

    Only those of DeepSeek V3 with `rope_interleave` off have the latter.
    """
    c = checkpoint.config
    heads, turned, latent = c.num_attention_heads, c.qk_pos_emb_head_dim, c.kv_lora_rank
    queries = RowOrder(heads * (c.qk_head_dim + turned), _paired, heads, c.qk_head_dim, turned)
    keys = RowOrder(latent + turned, _paired, 1, latent, turned)
    orders = {"linear_q_proj": queries, "linear_q_up_proj": queries, "linear_kv_down_proj": keys}

    def paired(name: str, tensor: LazyTensor) -> LazyTensor:
        module = name.split(".")[-2]
        return Selected(tensor, orders[module]) if module in orders else tensor

    return with_each(checkpoint, paired)


def _paired(heads: int, plain: int, turned: int) -> Tensor:
    """Return the channels of heads: the `plain` ones of each, and its `turned` ones in pairs."""
    import torch

    pairs = torch.arange(turned).view(2, -1).t().reshape(-1)  # 0, d/2, 1, d/2 + 1, ...
    head = torch.cat([torch.arange(plain), plain + pairs])
    return (torch.arange(heads)[:, None] * (plain + turned) + head).reshape(-1)
