"""Attention over this rank's heads: masks, rotary positions, grouped queries, latents.

No layer here knows a rank but by the parallel linears, and by the heads that it was given.
Source: docs/megatron.md, "Attention", "Norms and rotary positions"; megatron/core/transformer
(core 0.16), attention.py and multi_latent_attention.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_eval.checkpoints.config import ModelConfig, YarnScaling
from mlm_eval.checkpoints.parameters import local_groups
from mlm_eval.model.dropout import Dropout
from mlm_eval.model.layers import Norm, norm, to_device
from mlm_eval.model.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    copy_to_region,
    onednn_takes,
    without_autocast,
)

SCORE_CHUNK_ELEMENTS = 1 << 24
"""Scores computed at a time where they are capped (64 MB in float32)."""


TEXT_SCORE_ELEMENTS = 1 << 20
"""Scores computed at a time in training on the CPU (4 MB in float32, which stay in its cache)."""


class KeyValueCache:
    """What layers keep of a batch of texts that grow by one token at a time.

    Attention keeps keys and values of every position, Mamba its last inputs and one state.

    Texts are aligned on the left: position t is column t in every text, whatever its length. The
    columns behind a shorter prompt hold what its padding gave; the text's own tokens overwrite
    them, and until then the mask hides them.
    """

    lengths: list[int]
    """Tokens of each text that are in the cache."""

    def __init__(
        self,
        lengths: Sequence[int],
        columns: int,
        *,
        widths: Mapping[int, tuple[int, int, int]],
        like: Tensor,
    ) -> None:
        """Make room.

        Args:
            lengths: Of the prompts.
            columns: Positions that the longest text may take.
            widths: Of each layer with attention the heads that are kept on this rank, and the
                channels of their keys and values.
            like: Has the device and dtype of the keys and values.
        """
        self.lengths = list(lengths)
        self._positions: Tensor | None = None  # of the tokens that come in, one for each text
        self._device = like.device
        # Zeros, because what is masked is still multiplied, by 0: it must not be NaN.
        self._kept: dict[int, tuple[Tensor, Tensor]] = {
            layer: (
                like.new_zeros(len(self.lengths), heads, columns, keys),  # [B, G, T, d]
                like.new_zeros(len(self.lengths), heads, columns, values),
            )
            for layer, (heads, keys, values) in widths.items()
        }

    def advance(self) -> tuple[Tensor, Tensor]:
        """Make the next token of each text the one that comes in.

        Returns:
            Its position `[batch]`, and which columns it may see, bool `[batch, 1, 1, longest]`.
        """
        device = self._device
        self._positions = to_device(torch.tensor(self.lengths), device)
        self.lengths = [length + 1 for length in self.lengths]
        columns = torch.arange(max(self.lengths), device=device)
        return self._positions, (columns <= self._positions[:, None])[:, None, None]

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values `[batch, groups, new, channels]`.

        Returns:
            Those that the new queries look at: prompts at themselves, later tokens at all columns
            up to the longest text's last.
        """
        keys, values = self._kept[layer]
        if self._positions is None:
            keys[:, :, : key.shape[2]], values[:, :, : key.shape[2]] = key, value
            return key, value
        texts = torch.arange(key.shape[0], device=key.device)
        keys[texts, :, self._positions] = key.squeeze(2)
        values[texts, :, self._positions] = value.squeeze(2)
        longest = max(self.lengths)
        return keys[:, :, :longest], values[:, :, :longest]

    def keep(self, texts: Sequence[int]) -> None:
        """Drop all texts but some, given by their places in the batch."""
        self.lengths = [self.lengths[text] for text in texts]
        index = to_device(torch.tensor(texts), self._device)
        for layer, (keys, values) in self._kept.items():  # the copies of one need little room
            self._kept[layer] = keys[index], values[index]

    def recurrent(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return what a layer without attention has kept with `store_recurrent`."""
        return self._kept[layer]

    def store_recurrent(self, layer: int, inputs: Tensor, state: Tensor) -> None:
        """Keep a layer's last inputs and its state, of each text `[batch, ...]`."""
        self._kept[layer] = inputs, state


@dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share."""

    causal: bool
    """Each position sees itself and the ones before."""
    key_mask: Tensor | None = None
    """`[batch, 1, 1, seq]`, true where a key may be seen; None when all may."""
    cos: Tensor | None = None
    """Rotary cosines `[seq, rotated channels]`, where texts stand at different positions `[batch,
    1, seq, rotated channels]`, or None."""
    sin: Tensor | None = None
    """Rotary sines, or None."""
    local: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of the layers with a window, where theirs are others."""
    dropout: Dropout | None = None
    """The masks of a training step; None for evaluation."""
    cache: KeyValueCache | None = None
    """Keys and values of texts that are being generated; None where texts are whole."""
    positions: Tensor | None = None
    """Position of each text's one query `[batch]`, where keys come from the cache."""
    bias: Tensor | None = None
    """What is added to the scores of this rank's heads, with minus infinity where a key may not be
    seen `[batch or 1, heads, queries, keys]`, or None."""

    def mask(self, keys: int, query_from: int, window: int, like: Tensor) -> Tensor | None:
        """Return which keys each query sees, true where it does; None: as `causal` says alone.

        Args:
            keys: Number of keys.
            query_from: Position of the first query among them.
            window: Keys before its own position that a query sees; 0: all.
            like: Has the device.
        """
        window = window if window < keys - 1 else 0
        if self.causal:
            if not query_from and not window:
                return None
            seen = torch.ones(keys - query_from, keys, dtype=torch.bool, device=like.device)
            seen = seen.tril(query_from)
            return seen.triu(query_from - window) if window else seen
        if window and self.positions is not None:
            near = torch.arange(keys, device=like.device) >= self.positions[:, None] - window
            near = near[:, None, None]
            return near if self.key_mask is None else near & self.key_mask
        return self.key_mask


def rotary_tables(
    config: ModelConfig, length: int, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return cosines and sines `[length, rotated channels]`, float32; None where not rotary.

    Channel pairs are (i, i + d/2), or (2i, 2i + 1) with `rotary_interleaved` and in latent
    attention.
    Source: docs/megatron.md, "Norms and rotary positions".
    """
    if not config.rotary:
        return None, None
    rotated = config.rotated_channels
    steps = torch.arange(0, rotated, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / (config.rotary_base ** (steps / rotated))
    if config.rope_scaling is not None:
        frequencies = _stretch(frequencies, config)
    if config.yarn is not None:
        frequencies = _yarn(frequencies, config.yarn, config.rotary_base)
    positions = torch.arange(length, dtype=torch.float32, device=device)
    if config.rotary_seq_len_interpolation_factor is not None:
        positions = positions / config.rotary_seq_len_interpolation_factor
    angles = torch.outer(positions, frequencies)
    if config.rotary_interleaved or config.multi_latent_attention:
        angles = angles.repeat_interleave(2, dim=-1)
    else:
        angles = torch.cat([angles, angles], dim=-1)
    factor = 1.0 if config.yarn is None else config.yarn.attention_factor
    return angles.cos() * factor, angles.sin() * factor


def local_rotary_tables(
    config: ModelConfig, length: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Return cosines and sines of the layers with a window; None where they are as elsewhere."""
    if config.rotary_base_local is None:
        return None
    plain = dataclasses.replace(
        config,
        rotary_base=config.rotary_base_local,
        rotary_base_local=None,
        rotary_seq_len_interpolation_factor=None,
        rope_scaling=None,
        yarn=None,
    )
    cos, sin = rotary_tables(plain, length, device)
    assert cos is not None and sin is not None
    return cos, sin


def alibi_slopes(heads: int) -> list[float]:
    """Return the slope of each head: 2^(-8 i / heads), i = 1, 2, ..., for a power of two.

    Else those of the next lower power, and for the rest every second one of twice that power.
    Source: arXiv 2108.12409 and its authors' code.
    """
    power = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]


def alibi_bias(config: ModelConfig, heads: Sequence[int], queries: Tensor, keys: int) -> Tensor:
    """Return what ALiBi adds to the scores: minus slope x distance, and -inf for later keys.

    The paper adds slope x position of the key: the same but for a number for each query, which the
    softmax does not see. Distances are exact for the near keys also in half precision.

    Args:
        config: The model.
        heads: This rank's, by their global numbers.
        queries: Positions `[batch, queries]`.
        keys: Number of keys.

    Returns:
        `[batch, heads, queries, keys]`, float32.
    """
    slopes = alibi_slopes(config.num_attention_heads)
    ours = to_device(torch.tensor([slopes[head] for head in heads]), queries.device)
    distance = queries[:, None, :, None] - torch.arange(keys, device=queries.device)
    bias = distance * -ours[:, None, None]
    return bias.masked_fill_(distance < 0, -torch.inf)


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


def _yarn(frequencies: Tensor, yarn: YarnScaling, base: float) -> Tensor:
    """YaRN's frequencies (megatron/core yarn_rotary_pos_embedding).

    Channels that turn often within the original length keep theirs, those that turn hardly once
    are slowed down by the factor, and those between are blended.
    """
    channels = 2 * len(frequencies)

    def place(turns: float) -> float:
        ratio = yarn.original_max_position / (turns * 2 * math.pi)
        return channels * math.log(ratio) / (2 * math.log(base))

    low, high = place(yarn.beta_fast), place(yarn.beta_slow)
    if yarn.round_range:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    steps = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    slowed = ((steps - low) / (high - low or 1e-3)).clamp(0, 1)
    return frequencies / yarn.factor * slowed + frequencies * (1 - slowed)


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


class _Attention(nn.Module):
    """What both kinds of attention share: scores to outputs, and the projection."""

    def __init__(
        self, config: ModelConfig, tp: TensorParallel, number: int, heads: list[int]
    ) -> None:
        super().__init__()
        self.tp = tp
        self.number = number  # of the layer
        self.heads = heads  # this rank's, by their global numbers
        self.window = config.window_size if number in config.window_layers else 0
        self.rotary = number not in config.no_rope_layers
        self.cap = config.attn_logit_softcapping
        self.core_attention = _Sinks(config, len(heads))
        self.linear_proj = RowParallelLinear(
            len(heads) * (config.attention_width // config.num_attention_heads),
            config.hidden_size,
            bias=config.add_bias_linear,
            tp=tp,
        )
        if config.branch_layernorm:
            self.linear_proj.post_layernorm = norm(config)
        channels = config.kv_channels
        if config.multi_latent_attention:
            channels = config.qk_head_dim + config.qk_pos_emb_head_dim
        self.softmax_scale = config.softmax_scale or channels**-0.5

    def rotated(self, x: Tensor, context: Context, query_from: int, *, pairs: bool) -> Tensor:
        """Return queries or keys `[batch, heads, seq, channels]` rotated by position."""
        cos, sin = context.cos, context.sin
        if self.window and context.local is not None:
            cos, sin = context.local
        if cos is None or sin is None or not self.rotary:
            return x
        return rotate(x, cos[..., query_from:, :], sin[..., query_from:, :], interleaved=pairs)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: Context, query_from: int
    ) -> Tensor:
        """Return `[batch, heads, queries, value channels]`."""
        mask = context.mask(key.shape[2], query_from, self.window, query)
        if context.bias is not None:  # it says too which keys are seen
            mask = context.bias[:, :, query_from:].to(query.dtype)
        causal = context.causal and mask is None
        dropout = context.dropout
        assert dropout is None or query_from == 0, "masks count positions from 0"
        if dropout is not None and dropout.attention > 0.0:
            return self._by_steps(query, key, value, mask, causal, dropout)
        if self.cap is not None:
            if mask is None and causal:
                shape = (query.shape[2], key.shape[2])
                mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
            return self._some_queries_at_a_time(query, key, value, mask)
        sinks = self.core_attention()
        if sinks is not None:
            # One more key that every query sees: its logit is the sink's, its value 0.
            key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
            mask = _with_sinks(mask, causal, sinks, query, key)
            causal = False
        plain = mask is None or mask.dtype == torch.bool  # none that gets a gradient
        if plain and query.requires_grad and _plain_on_the_cpu(query):
            return _PlainAttention.apply(query, key, value, mask, causal, self.softmax_scale)  # type: ignore[no-any-return]
        dtype = query.dtype
        if _faster_in_float32(query):
            query, key, value = query.float(), key.float(), value.float()
            mask = mask.float() if mask is not None and mask.dtype != torch.bool else mask
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=self.softmax_scale
        )
        return out.to(dtype)

    def _some_queries_at_a_time(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention step by step, with scores of a bounded number of elements at a time."""
        batch, heads, queries, _ = query.shape
        rows = max(1, SCORE_CHUNK_ELEMENTS // (batch * heads * key.shape[2]))
        pieces = []
        for start in range(0, queries, rows):
            part = slice(start, start + rows)
            seen = mask if mask is None or mask.shape[-2] == 1 else mask[..., part, :]
            pieces.append(self._by_steps(query[:, :, part], key, value, seen, False, None))
        return torch.cat(pieces, dim=2)

    def _by_steps(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        dropout: Dropout | None,
    ) -> Tensor:
        """Attention step by step, for caps and dropout.

        SDPA has no cap, and would draw masks of its own, another set on every layout.
        """
        # The query is scaled, not the scores: those of float16 could be beyond its range.
        scores = (query * self.softmax_scale) @ key.transpose(-1, -2)  # [B, H, T, T]
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        if mask is not None and mask.dtype != torch.bool:  # it is added
            scores = scores + mask
        elif mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        if causal:
            length = scores.shape[-1]
            future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        sinks = self.core_attention()
        if sinks is not None:
            column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        weights = weights[..., : key.shape[2]]
        if dropout is not None:
            weights = dropout.attention_weights(weights, self.number, self.heads)
        return weights @ value


class _PlainAttention(torch.autograd.Function):
    """Attention whose softmax is torch's, forward and backward, as in Megatron's training.

    It keeps no scores, as SDPA keeps none, and computes in float32, some texts at a time. SDPA
    takes a softmax's gradient by other sums; keys have a bias whose gradient is 0 but for rounding,
    of which Adam makes steps of the full size: after thirty of them its losses on a CPU are twice
    as far from Megatron's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal, ctx.scale = causal, scale
        batch, heads, queries, _ = query.shape
        # Laid out as the projection takes it.
        out = value.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
        with without_autocast(query):
            for part in _some_texts(query, key):
                q, k, v = (x[part].float() for x in (query, key, value))
                scores = _masked_scores(q, k, _of_texts(mask, part), causal, scale)
                out[part] = scores.softmax(dim=-1) @ v
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        to_query, to_key, to_value = (torch.empty_like(x) for x in (query, key, value))
        with without_autocast(query):
            for part in _some_texts(query, key):
                q, k, v, grad = (x[part].float() for x in (query, key, value, grads[0]))
                scores = _masked_scores(q, k, _of_texts(mask, part), ctx.causal, ctx.scale)
                weights = scores.softmax(dim=-1)
                to_value[part] = weights.transpose(-1, -2) @ grad
                to_weights = grad @ v.transpose(-1, -2)
                to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
                to_scores *= ctx.scale
                to_key[part] = to_scores.transpose(-1, -2) @ q
                to_query[part] = to_scores @ k
        return to_query, to_key, to_value, None, None, None


def _some_texts(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Yield the texts of a batch, as many at a time as have `TEXT_SCORE_ELEMENTS` scores."""
    batch, heads, queries, _ = query.shape
    step = max(1, TEXT_SCORE_ELEMENTS // (heads * queries * key.shape[2]))
    for start in range(0, batch, step):
        yield slice(start, start + step)


def _of_texts(mask: Tensor | None, texts: slice) -> Tensor | None:
    """Return some texts' part of a mask, which may be the same for all."""
    return mask if mask is None or mask.dim() < 4 or len(mask) == 1 else mask[texts]


def _plain_on_the_cpu(x: Tensor) -> bool:
    """Return whether a CPU trains by `_PlainAttention`: in half precision where it has no AMX.

    There SDPA's backward pass multiplies bfloat16 at a fiftieth of the rate of float32.
    """
    halved = x.dtype in (torch.bfloat16, torch.float16) and not torch.cpu._is_amx_tile_supported()
    return x.device.type == "cpu" and (x.dtype == torch.float32 or halved)


def _faster_in_float32(x: Tensor) -> bool:
    """Return whether attention of bfloat16 is computed in float32: on CPUs without AMX.

    There SDPA multiplies bfloat16 slowly, and float32 goes through oneDNN (engine/products.py).
    """
    products: Any = torch.backends.mkldnn
    halved = x.dtype == torch.bfloat16 and products.matmul.fp32_precision == "bf16"
    return halved and onednn_takes(x, x)


def _masked_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Return `[batch, heads, queries, keys]`, minus infinity where a key may not be seen."""
    scores = (query @ key.transpose(-1, -2)).mul_(scale)
    if mask is not None:
        # Added, which is faster than to fill them in.
        scores += torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
    if causal:
        scores += torch.full_like(scores[0, 0], -torch.inf).triu_(1)
    return scores


class _Sinks(nn.Module):
    """One more logit for each head in the softmax: none, 0, or learned."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kind = config.softmax_type
        learned = config.softmax_type == "learnable"
        self.softmax_offset = nn.Parameter(torch.empty(heads)) if learned else None

    def forward(self) -> Tensor | None:
        """Return the logits `[heads]`; None: there are none."""
        if self.kind == "off-by-one":
            return torch.zeros(self.heads)
        return self.softmax_offset


def _with_sinks(
    mask: Tensor | None, causal: bool, sinks: Tensor, query: Tensor, key: Tensor
) -> Tensor:
    """Return the mask as what is added to the scores, with the sinks' logits as a last column."""
    queries, keys = query.shape[2], key.shape[2] - 1
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    if mask is None:
        mask = torch.ones(1, keys, dtype=torch.bool, device=query.device)
    added = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    added = added.masked_fill(~mask, -torch.inf)
    while added.dim() < 4:
        added = added[None]
    added = added.expand(added.shape[0], sinks.shape[0], queries, keys)
    column = sinks.to(added)[None, :, None, None].expand(*added.shape[:-1], 1)
    return torch.cat([added, column], dim=-1)


class SelfAttention(_Attention):
    """Attention over this rank's query groups."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, number: int) -> None:
        groups = local_groups(config.num_attention_heads, config.num_query_groups, tp.rank, tp.size)
        super().__init__(config, tp, number, [head for heads, _ in groups for head in heads])
        self.groups = len(groups)
        self.queries = len(groups[0][0])  # per group
        self.channels = config.kv_channels
        self.interleaved = config.rotary_interleaved
        self.output_gate = config.attention_output_gate
        own = self.queries * (2 if self.output_gate else 1)
        rows = self.groups * (own + 2) * self.channels
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size, rows, bias=config.add_qkv_bias, tp=tp
        )
        if config.qk_layernorm:
            bias = config.qk_layernorm_bias
            self.q_layernorm = Norm(config, config.kv_channels, bias=bias, tp=tp)
            self.k_layernorm = Norm(config, config.kv_channels, bias=bias, tp=tp)
        self.qk_layernorm = config.qk_layernorm
        normed = config.qk_l2_norm and number not in config.no_l2_norm_layers
        self.l2_epsilon = config.layernorm_epsilon if normed else None

    @property
    def cache_width(self) -> tuple[int, int, int]:
        """Heads of keys and values that generation keeps, and the channels of either."""
        return self.groups, self.channels, self.channels

    def forward(self, x: Tensor, context: Context, query_from: int) -> Tensor:
        """Return the attention output `[batch, seq - query_from, hidden]` of the last positions."""
        batch, length, _ = x.shape
        qkv = self.linear_qkv(x).view(batch, length, self.groups, -1, self.channels)
        gates = self.queries if self.output_gate else 0
        query, gate, key, value = qkv.split([self.queries, gates, 1, 1], dim=3)  # [B, T, G, ., d]
        query = query[:, query_from:].flatten(2, 3).transpose(1, 2)  # [B, G*q, T - from, d]
        key = key.squeeze(3).transpose(1, 2)  # [B, G, T, d]
        value = value.squeeze(3).transpose(1, 2)  # [B, G, T, d]
        if self.qk_layernorm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self.l2_epsilon is not None:
            query, key = _unit(query, self.l2_epsilon), _unit(key, self.l2_epsilon)
        key = self.rotated(key, context, 0, pairs=self.interleaved)
        query = self.rotated(query, context, query_from, pairs=self.interleaved)
        if context.cache is not None:
            key, value = context.cache.store(self.number, key, value)
        if self.queries > 1:
            key = key.repeat_interleave(self.queries, dim=1)
            value = value.repeat_interleave(self.queries, dim=1)
        out = self.attend(query, key, value, context, query_from)
        out = out.transpose(1, 2).flatten(2)  # [B, T - from, G*q*d]
        if gates:
            out = out * gate[:, query_from:].flatten(2).sigmoid()
        return self.linear_proj(out)  # type: ignore[no-any-return]


class CrossAttention(_Attention):
    """Queries of a decoder, keys and values of an encoder's states, over this rank's heads.

    Source: megatron/core/transformer/attention.py (core 0.16), CrossAttention.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, number: int) -> None:
        n, size = config.num_attention_heads, tp.size
        heads = list(range(tp.rank * n // size, (tp.rank + 1) * n // size))
        super().__init__(config, tp, number, heads)
        h, bias, width = config.hidden_size, config.add_qkv_bias, len(heads) * config.kv_channels
        self.linear_q = ColumnParallelLinear(h, width, bias=bias, tp=tp)
        self.linear_kv = ColumnParallelLinear(h, 2 * width, bias=bias, tp=tp)

    def forward(self, x: Tensor, encoded: Tensor, context: Context) -> Tensor:
        """Return the attention output `[batch, seq, hidden]`.

        Args:
            x: The decoder's states `[batch, seq, hidden]`.
            encoded: The encoder's `[batch, encoder seq, hidden]`.
            context: Which of the encoder's positions may be seen.
        """
        query = self.linear_q(x).unflatten(-1, (len(self.heads), -1)).transpose(1, 2)
        pairs = self.linear_kv(encoded).unflatten(-1, (len(self.heads), -1)).transpose(1, 2)
        key, value = pairs.chunk(2, dim=-1)  # [B, H, S, d]
        out = self.attend(query, key, value, context, 0)
        return self.linear_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _unit(x: Tensor, epsilon: float) -> Tensor:
    """Return `x` divided by the root of its mean square over the last dim, computed in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)).to(x.dtype)


class LatentAttention(_Attention):
    """Multi-latent attention: keys and values of all heads come from one narrow latent.

    The latent is computed on every rank, the heads are cut. Rotated are some channels of each query
    and one key that all heads share. Generation keeps the latent and that key alone, and takes the
    matrix from latent to keys over to the query's side, that to values behind the sum.
    Source: arXiv 2405.04434, section 2.1; docs/megatron.md, "Multi-latent attention".
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, number: int) -> None:
        n, size = config.num_attention_heads, tp.size
        heads = list(range(tp.rank * n // size, (tp.rank + 1) * n // size))
        super().__init__(config, tp, number, heads)
        self.plain, self.turned = config.qk_head_dim, config.qk_pos_emb_head_dim
        self.value, self.latent = config.v_head_dim, config.kv_lora_rank
        h, queries = config.hidden_size, len(heads) * (self.plain + self.turned)
        bias = config.normalization == "LayerNorm"
        epsilon = config.latent_layernorm_epsilon
        self.narrow_queries = bool(config.q_lora_rank)
        self.normed = config.qk_layernorm
        if self.narrow_queries:
            self.linear_q_down_proj = _Replicated(h, config.q_lora_rank)
            if self.normed:
                self.q_layernorm = Norm(config, config.q_lora_rank, bias=bias, epsilon=epsilon)
            self.linear_q_up_proj = ColumnParallelLinear(
                config.q_lora_rank, queries, bias=False, tp=tp
            )
        else:
            self.linear_q_proj = ColumnParallelLinear(h, queries, bias=False, tp=tp)
        self.linear_kv_down_proj = _Replicated(h, self.latent + self.turned)
        if self.normed:
            self.kv_layernorm = Norm(config, self.latent, bias=bias, epsilon=epsilon)
        rows = len(heads) * (self.plain + self.value)
        self.linear_kv_up_proj = ColumnParallelLinear(self.latent, rows, bias=False, tp=tp)

    @property
    def cache_width(self) -> tuple[int, int, int]:
        """Heads that generation keeps, and their channels: latent with rotated key, and latent."""
        return 1, self.latent + self.turned, 0

    def forward(self, x: Tensor, context: Context, query_from: int) -> Tensor:
        """Return the attention output `[batch, seq - query_from, hidden]` of the last positions."""
        plain, turned = self._queries(x[:, query_from:]).split([self.plain, self.turned], dim=-1)
        turned = self.rotated(turned, context, query_from, pairs=True)  # [B, H, T - from, dr]
        latent, shared = self.linear_kv_down_proj(x).split([self.latent, self.turned], dim=-1)
        latent = self.kv_layernorm(latent) if self.normed else latent  # [B, T, r]
        shared = self.rotated(shared[:, None], context, 0, pairs=True)  # [B, 1, T, dr]
        shared = copy_to_region(shared, self.tp)
        if context.cache is not None:
            kept = torch.cat([latent[:, None], shared], dim=-1)
            kept, _ = context.cache.store(self.number, kept, kept[..., :0])
            if context.positions is not None:
                return self._step(plain, turned, kept, context)
        keys_and_values = self.linear_kv_up_proj(latent).unflatten(-1, (len(self.heads), -1))
        key, value = keys_and_values.transpose(1, 2).split([self.plain, self.value], dim=-1)
        key = torch.cat([key, shared.expand(-1, len(self.heads), -1, -1)], dim=-1)
        query = torch.cat([plain, turned], dim=-1)
        out = self.attend(query, key, value, context, query_from)
        return self.linear_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _queries(self, x: Tensor) -> Tensor:
        """Return this rank's queries `[batch, heads, seq, dn + dr]`."""
        if self.narrow_queries:
            narrow = self.linear_q_down_proj(x)
            query = self.linear_q_up_proj(self.q_layernorm(narrow) if self.normed else narrow)
        else:
            query = self.linear_q_proj(x)
        return query.unflatten(-1, (len(self.heads), -1)).transpose(1, 2)  # type: ignore[no-any-return]

    def _step(self, plain: Tensor, turned: Tensor, kept: Tensor, context: Context) -> Tensor:
        """Return the output of one query for each text, over the latents of all its tokens."""
        matrix = self.linear_kv_up_proj.weight.unflatten(0, (len(self.heads), -1))
        to_key, to_value = matrix.split([self.plain, self.value], dim=1)  # [H, dn|dv, r]
        query = torch.cat([plain @ to_key, turned], dim=-1)  # [B, H, 1, r + dr]
        key = kept.expand(-1, len(self.heads), -1, -1)
        out = self.attend(query, key, key[..., : self.latent], context, 0)
        out = out @ to_value.transpose(1, 2)  # [B, H, 1, dv]
        return self.linear_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Replicated(nn.Module):
    """A linear layer that every rank computes whole."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return all outputs."""
        return F.linear(x, self.weight)
