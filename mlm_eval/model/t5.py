"""T5: an encoder that reads a text both ways, and a decoder that looks at it, left to right.

Both share the embeddings; the encoder's layers are BERT's and GPT's. Positions are learned, rotary
(in self-attention) or relative: then each stack has a table of one number for each head and each
bucket of distances, which all its layers add to the scores of self-attention.
Source: arXiv 1910.10683, section 2.1; megatron/core/models/T5 and
megatron/core/models/common/embeddings/relative_pos_embedding.py (core 0.16).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.model.attention import Context, CrossAttention, SelfAttention, rotary_tables
from mlm_eval.model.layers import MLP, norm, to_device
from mlm_eval.model.tensor_parallel import SINGLE, TensorParallel
from mlm_eval.model.transformer import Embedding, TransformerBlock, output_layer


def relative_buckets(
    queries: int, keys: int, *, both_ways: bool, buckets: int, furthest: int
) -> Tensor:
    """Return the bucket of each query's distance to each key, int64 `[queries, keys]`.

    Half of the buckets are for one distance each, the others for ranges that grow as the logarithm,
    up to `furthest`. An encoder's, which sees both ways, are halved first: the upper half is for
    keys behind the query. A decoder puts all keys behind the query into bucket 0.
    """
    distance = torch.arange(keys) - torch.arange(queries)[:, None]
    first = torch.zeros_like(distance)
    if both_ways:
        buckets //= 2
        first = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    # Float32 as Megatron and transformers compute it: a range's ends fall where theirs do.
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(furthest / exact)
    ranges = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + distance.where(distance < exact, ranges)


class RelativePositions(nn.Module):
    """The table of a stack's relative positions, of which each rank uses the columns of its heads.

    Every rank holds the whole table, as Megatron's files do.
    """

    def __init__(self, config: ModelConfig, *, both_ways: bool) -> None:
        super().__init__()
        self.both_ways = both_ways
        self.furthest = config.relative_attention_max_distance
        shape = (config.relative_attention_num_buckets, config.num_attention_heads)
        self.relative_attention_bias = nn.Embedding(*shape, _weight=torch.empty(shape))

    def forward(self, length: int, heads: list[int]) -> Tensor:
        """Return what is added to the scores, `[1, heads, length, length]`."""
        table = self.relative_attention_bias.weight
        buckets = relative_buckets(
            length, length, both_ways=self.both_ways, buckets=len(table), furthest=self.furthest
        )
        ours = table.index_select(1, to_device(torch.tensor(heads), table.device))
        return ours[to_device(buckets, table.device)].permute(2, 0, 1)[None]


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and MLP, each with a norm before it and a residual."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, number: int) -> None:
        super().__init__()
        self.input_layernorm = norm(config)
        self.self_attention = SelfAttention(config, tp, number)
        self.pre_cross_attn_layernorm = norm(config)
        self.cross_attention = CrossAttention(config, tp, number)
        self.pre_mlp_layernorm = norm(config)
        self.mlp = MLP(config, tp)

    def forward(self, x: Tensor, context: Context, encoded: Tensor, across: Context) -> Tensor:
        """Return the states `[batch, seq, hidden]`."""
        x = x + self.self_attention(self.input_layernorm(x), context, 0)
        x = x + self.cross_attention(self.pre_cross_attn_layernorm(x), encoded, across)
        return x + self.mlp(self.pre_mlp_layernorm(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """All of T5's decoder layers and their final norm."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(config, tp, number) for number in range(config.decoder_num_layers)
        )
        self.final_layernorm = norm(config)

    def forward(self, x: Tensor, context: Context, encoded: Tensor, across: Context) -> Tensor:
        """Return normed states `[batch, seq, hidden]`."""
        for layer in self.layers:
            x = layer(x, context, encoded, across)
        return self.final_layernorm(x)  # type: ignore[no-any-return]


class T5(nn.Module):
    """A T5 model, or one rank's shard of it."""

    def __init__(self, config: ModelConfig, tp: TensorParallel = SINGLE) -> None:
        super().__init__()
        self.config = config
        self.tp = tp
        self.embedding = Embedding(config, tp)
        if config.relative_positions:
            self.encoder_relative_pos_emb = RelativePositions(config, both_ways=True)
            self.decoder_relative_pos_emb = RelativePositions(config, both_ways=False)
        self.encoder = TransformerBlock(config, tp)
        self.decoder = Decoder(config, tp)
        self.output_layer = output_layer(config, self.embedding)

    def forward(self, encoder_tokens: Tensor, encoder_mask: Tensor, tokens: Tensor) -> Tensor:
        """Return the decoder's final states `[batch, seq, hidden]`.

        Args:
            encoder_tokens: `[batch, encoder seq]`.
            encoder_mask: 1 where a token may be seen, `[batch, encoder seq]`; padding is 0, and
                each row has a 1.
            tokens: The decoder's input `[batch, seq]`, padded on the right.
        """
        across = Context(causal=False, key_mask=encoder_mask.bool()[:, None, None, :])
        encoded = self.encode(encoder_tokens, across)
        return self.decode(tokens, encoded, across)

    def encode(self, tokens: Tensor, across: Context) -> Tensor:
        """Return the encoder's states `[batch, encoder seq, hidden]`."""
        cos, sin = rotary_tables(self.config, tokens.shape[1], tokens.device)
        bias = None
        if self.config.relative_positions:
            assert across.key_mask is not None
            bias = self.encoder_relative_pos_emb(tokens.shape[1], self._heads)
            bias = bias.masked_fill(~across.key_mask, -torch.inf)
        context = Context(causal=False, key_mask=across.key_mask, cos=cos, sin=sin, bias=bias)
        return self.encoder(self.embedding(tokens), context)  # type: ignore[no-any-return]

    def decode(self, tokens: Tensor, encoded: Tensor, across: Context) -> Tensor:
        """Return the decoder's states `[batch, seq, hidden]`, given the encoder's."""
        length = tokens.shape[1]
        cos, sin = rotary_tables(self.config, length, tokens.device)
        bias = None
        if self.config.relative_positions:
            later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
            bias = self.decoder_relative_pos_emb(length, self._heads).masked_fill(later, -torch.inf)
        context = Context(causal=True, cos=cos, sin=sin, bias=bias)
        return self.decoder(self.embedding(tokens), context, encoded, across)  # type: ignore[no-any-return]

    @property
    def _heads(self) -> list[int]:
        """This rank's heads, by their global numbers."""
        attention = self.encoder.layers[0].self_attention
        assert isinstance(attention, SelfAttention)
        return attention.heads

    def log_probs(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (float32, nats) and greedy flags; see `VocabHead.log_probs`."""
        return self.output_layer.log_probs(states, targets)
