"""The transformer layer of Megatron-LM, read top to bottom; GPT and BERT share it.

Module names are the canonical parameter names, so a model's `named_parameters` are the table's
keys. No layer here knows a rank: the parallel linears do.
Source: docs/megatron.md, "Model mathematics" and the sections that follow it; Megatron-LM,
megatron/model/transformer.py (v2.5) and megatron/core/transformer (core 0.16).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.parameters import local_groups, vocab_range
from mlm_eval.model.dropout import EMBEDDING, Dropout
from mlm_eval.model.kv_cache import KeyValueCache
from mlm_eval.model.tensor_parallel import (
    SINGLE,
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    VocabHead,
    VocabParallelEmbedding,
    copy_to_region,
)


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share.

    Attributes:
        causal: Each position sees itself and the ones before.
        key_mask: `[batch, 1, 1, seq]`, true where a key may be seen; None when all may.
        cos: Rotary cosines `[seq, rotated channels]`, where texts stand at different positions
            `[batch, 1, seq, rotated channels]`, or None.
        sin: Rotary sines, or None.
        dropout: The masks of a training step; None for evaluation.
        cache: Keys and values of texts that are being generated; None where texts are whole.
    """

    causal: bool
    key_mask: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    dropout: Dropout | None = None
    cache: KeyValueCache | None = None


class Norm(nn.Module):
    """LayerNorm or RMSNorm, computed in float32 and rounded once; a centred gain holds (gain - 1).

    One that works inside a parallel region, on a rank's own heads, takes the region's `tp`: its
    weights, the same on all ranks, then get the sum of the ranks' gradients.
    """

    def __init__(
        self, config: ModelConfig, width: int, *, bias: bool, tp: TensorParallel = SINGLE
    ) -> None:
        super().__init__()
        self.tp = tp
        self.rms = config.normalization == "RMSNorm"
        self.epsilon = config.layernorm_epsilon
        self.centred = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` normalised over its last dim, in the wider dtype of `x` and the weights."""
        gain = copy_to_region(self.weight, self.tp)
        bias = None if self.bias is None else copy_to_region(self.bias, self.tp)
        if not self.rms and not self.centred and x.dtype == gain.dtype:
            return F.layer_norm(x, gain.shape, gain, bias, self.epsilon)
        dtype = torch.promote_types(x.dtype, gain.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        x, gain = x.to(wide), gain.to(wide)
        gain = gain + 1 if self.centred else gain
        if self.rms:
            x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon) * gain
        else:
            bias = None if bias is None else bias.to(wide)
            x = F.layer_norm(x, gain.shape, gain, bias, self.epsilon)
        return x.to(dtype)


def norm(config: ModelConfig) -> Norm:
    """Return a norm over the hidden dim."""
    return Norm(config, config.hidden_size, bias=config.normalization == "LayerNorm")


def activate(x: Tensor, kind: str) -> Tensor:
    """Apply an activation; `swiglu` takes `[gate; up]` in the last dim and halves it."""
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "squared_relu":
        return F.relu(x).square()
    assert kind == "swiglu", kind
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary_tables(
    config: ModelConfig, length: int, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return cosines and sines `[length, rotated channels]`, float32; None where not rotary.

    Channel pairs are (i, i + d/2), or (2i, 2i + 1) with `rotary_interleaved`.
    Source: docs/megatron.md, "Norms and rotary positions".
    """
    if not config.rotary:
        return None, None
    rotated = int(config.kv_channels * config.rotary_percent)
    steps = torch.arange(0, rotated, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / (config.rotary_base ** (steps / rotated))
    if config.rope_scaling is not None:
        frequencies = _stretch(frequencies, config)
    positions = torch.arange(length, dtype=torch.float32, device=device)
    if config.rotary_seq_len_interpolation_factor is not None:
        positions = positions / config.rotary_seq_len_interpolation_factor
    angles = torch.outer(positions, frequencies)
    if config.rotary_interleaved:
        angles = angles.repeat_interleave(2, dim=-1)
    else:
        angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _stretch(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Llama-3.1's frequency scaling (megatron/core rotary_pos_embedding.apply_scaling)."""
    scaling = config.rope_scaling
    assert scaling is not None
    wavelengths = 2 * math.pi / frequencies
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(wavelengths > low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < high, frequencies, stretched)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the first channels of `x` `[batch, heads, seq, channels]` by position."""
    rotated = cos.shape[-1]
    part, rest = x[..., :rotated], x[..., rotated:]
    if interleaved:
        other = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = part.chunk(2, dim=-1)
        other = torch.cat([-second, first], dim=-1)
    turned = (part * cos + other * sin).to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)


class SelfAttention(nn.Module):
    """Attention over this rank's query groups."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, number: int) -> None:
        super().__init__()
        groups = local_groups(config.num_attention_heads, config.num_query_groups, tp.rank, tp.size)
        self.number = number  # of the layer
        self.heads = [head for heads, _ in groups for head in heads]
        self.groups = len(groups)
        self.queries = len(groups[0][0])  # per group
        self.channels = config.kv_channels
        self.interleaved = config.rotary_interleaved
        rows = self.groups * (self.queries + 2) * self.channels
        width = self.groups * self.queries * self.channels
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size, rows, bias=config.add_qkv_bias, tp=tp
        )
        if config.qk_layernorm:
            bias = config.qk_layernorm_bias
            self.q_layernorm = Norm(config, config.kv_channels, bias=bias, tp=tp)
            self.k_layernorm = Norm(config, config.kv_channels, bias=bias, tp=tp)
        self.qk_layernorm = config.qk_layernorm
        self.softmax_scale = config.softmax_scale or self.channels**-0.5
        self.linear_proj = RowParallelLinear(
            width, config.hidden_size, bias=config.add_bias_linear, tp=tp
        )

    def forward(self, x: Tensor, context: Context, query_from: int) -> Tensor:
        """Return the attention output `[batch, seq - query_from, hidden]` of the last positions."""
        batch, length, _ = x.shape
        qkv = self.linear_qkv(x).view(batch, length, self.groups, self.queries + 2, self.channels)
        query, key, value = qkv.split([self.queries, 1, 1], dim=3)  # [B, T, G, q|1|1, d]
        query = query[:, query_from:].flatten(2, 3).transpose(1, 2)  # [B, G*q, T - from, d]
        key = key.squeeze(3).transpose(1, 2)  # [B, G, T, d]
        value = value.squeeze(3).transpose(1, 2)  # [B, G, T, d]
        if self.qk_layernorm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if context.cos is not None and context.sin is not None:
            cos, sin = context.cos, context.sin
            key = rotate(key, cos, sin, interleaved=self.interleaved)
            cos, sin = cos[..., query_from:, :], sin[..., query_from:, :]
            query = rotate(query, cos, sin, interleaved=self.interleaved)
        if context.cache is not None:
            key, value = context.cache.store(self.number, key, value)
        if self.queries > 1:
            key = key.repeat_interleave(self.queries, dim=1)
            value = value.repeat_interleave(self.queries, dim=1)
        mask, causal = context.key_mask, context.causal
        if causal and query_from:
            # Queries are the last rows only: position query_from + i sees keys up to itself.
            mask = torch.ones(length - query_from, length, dtype=torch.bool, device=x.device)
            mask, causal = mask.tril(query_from), False
        dropout = context.dropout
        assert dropout is None or query_from == 0, "masks count positions from 0"
        if dropout is not None and dropout.attention > 0.0:
            out = self._with_dropout(query, key, value, context, dropout)
        else:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, scale=self.softmax_scale
            )
        return self.linear_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _with_dropout(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, dropout: Dropout
    ) -> Tensor:
        """Attention step by step: SDPA would draw masks of its own, another set on every layout."""
        # The query is scaled, not the scores: those of float16 could be beyond its range.
        scores = (query * self.softmax_scale) @ key.transpose(-1, -2)  # [B, H, T, T]
        if context.key_mask is not None:
            scores = scores.masked_fill(~context.key_mask, -torch.inf)
        if context.causal:
            length = scores.shape[-1]
            future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        return dropout.attention_weights(weights, self.number, self.heads) @ value


class MLP(nn.Module):
    """The two-layer MLP, cut by columns then by rows."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.activation = config.activation
        local = config.ffn_hidden_size // tp.size
        bias = config.add_bias_linear
        rows = 2 * local if config.gated else local
        self.linear_fc1 = ColumnParallelLinear(config.hidden_size, rows, bias=bias, tp=tp)
        self.linear_fc2 = RowParallelLinear(local, config.hidden_size, bias=bias, tp=tp)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[batch, seq, hidden]`."""
        return self.linear_fc2(activate(self.linear_fc1(x), self.activation))  # type: ignore[no-any-return]


class TransformerLayer(nn.Module):
    """Attention and MLP with residuals.

    The residual is the norm's input, or its output in the original BERT order.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, number: int) -> None:
        super().__init__()
        self.number = number
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.input_layernorm = norm(config)
        self.self_attention = SelfAttention(config, tp, number)
        self.pre_mlp_layernorm = norm(config)
        self.mlp = MLP(config, tp)

    def forward(self, x: Tensor, context: Context, query_from: int = 0) -> Tensor:
        """Return the states of the positions from `query_from` on."""
        normed = self.input_layernorm(x)
        residual = normed if self.residual_after_norm else x
        branch = self.self_attention(normed, context, query_from)
        x = residual[:, query_from:] + self._drop(branch, 0, context)
        normed = self.pre_mlp_layernorm(x)
        residual = normed if self.residual_after_norm else x
        return residual + self._drop(self.mlp(normed), 1, context)

    def _drop(self, x: Tensor, branch: int, context: Context) -> Tensor:
        if context.dropout is None:
            return x
        return context.dropout.residual(x, self.number, branch)


class TransformerBlock(nn.Module):
    """All layers and the final norm."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(config, tp, number) for number in range(config.num_layers)
        )
        self.final_layernorm = norm(config)
        self.recompute = False
        """Keep only the layers' inputs for the backward pass and run each layer again in it."""

    def forward(self, x: Tensor, context: Context, query_from: int = 0) -> Tensor:
        """Return normed states `[batch, seq - query_from, hidden]`.

        The last layer computes queries, projection and MLP only for the rows that are needed.
        """
        if context.dropout is not None:
            x = context.dropout.residual(x, EMBEDDING, 0)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            first = query_from if index == last else 0
            if self.recompute and torch.is_grad_enabled():
                # The masks are functions of numbers: no generator has to be put back.
                x = checkpoint(
                    layer, x, context, first, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = layer(x, context, first)
        return self.final_layernorm(x)  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """Word, position and token-type embeddings; no norm on them.

    Source: docs/megatron.md, "Embeddings".
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        start, stop = vocab_range(config.vocab_size, tp.rank, tp.size)
        width = config.hidden_size
        self.word_embeddings = VocabParallelEmbedding(stop - start, width, first_row=start, tp=tp)
        if config.learned_positions:
            rows = config.max_position_embeddings
            self.position_embeddings = nn.Embedding(rows, width, _weight=torch.empty(rows, width))
        if config.num_tokentypes:
            rows = config.num_tokentypes
            self.tokentype_embeddings = nn.Embedding(rows, width, _weight=torch.empty(rows, width))
        self.config = config

    def forward(
        self, tokens: Tensor, tokentypes: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return `[batch, seq, hidden]` for `tokens` `[batch, seq]`.

        `positions` `[batch, seq]` are 0, 1, ... unless given.
        """
        x = self.word_embeddings(tokens)
        if self.config.learned_positions:
            table = self.position_embeddings.weight
            x = x + (table[: tokens.shape[1]] if positions is None else table[positions])
        if self.config.num_tokentypes:
            types = torch.zeros_like(tokens) if tokentypes is None else tokentypes
            x = x + self.tokentype_embeddings(types)
        return x  # type: ignore[no-any-return]


def output_layer(config: ModelConfig, embedding: Embedding) -> VocabHead:
    """Return the output table, tied or not, with BERT's output bias."""
    return VocabHead(
        config.vocab_size,
        embedding.word_embeddings,
        tied=not (config.untie_embeddings_and_output_weights and config.lm_head),
        biased=config.family == "bert" and config.lm_head,
    )
