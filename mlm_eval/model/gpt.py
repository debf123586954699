"""GPT: tokens in, states of the scored rows out, log-probabilities over a cut vocabulary."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.model.attention import (
    Context,
    KeyValueCache,
    LatentAttention,
    SelfAttention,
    alibi_bias,
    local_rotary_tables,
    rotary_tables,
)
from mlm_eval.model.dropout import Dropout
from mlm_eval.model.layers import to_device
from mlm_eval.model.mamba import MambaMixer
from mlm_eval.model.tensor_parallel import SINGLE, TensorParallel
from mlm_eval.model.transformer import Embedding, TransformerBlock, output_layer


class GPT(nn.Module):
    """A GPT model, or one rank's shard of it.

    Source: megatron/model/gpt_model.py, megatron/core/models/gpt.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel = SINGLE) -> None:
        super().__init__()
        self.config = config
        self.tp = tp
        self.embedding = Embedding(config, tp)
        self.decoder = TransformerBlock(config, tp)
        self.output_layer = output_layer(config, self.embedding)

    def forward(
        self, tokens: Tensor, query_from: int = 0, dropout: Dropout | None = None
    ) -> Tensor:
        """Return the final states `[batch, seq - query_from, hidden]` of the last positions.

        Sequences are padded on the right: no position sees a later one, so padding needs no mask.
        """
        context = self._context(tokens, dropout=dropout)
        return self.decoder(self.embedding(tokens), context, query_from)  # type: ignore[no-any-return]

    def _context(
        self, tokens: Tensor, *, dropout: Dropout | None = None, cache: KeyValueCache | None = None
    ) -> Context:
        """Return what the layers share where texts start at position 0."""
        cos, sin = rotary_tables(self.config, tokens.shape[1], tokens.device)
        local = local_rotary_tables(self.config, tokens.shape[1], tokens.device)
        alibi = self._alibi(torch.arange(tokens.shape[1], device=tokens.device)[None])
        return Context(
            causal=True, cos=cos, sin=sin, local=local, dropout=dropout, cache=cache, bias=alibi
        )

    def at_positions(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the final states of tokens that stand at other positions `[seq]` than 0, 1, ..."""
        context = self._context(tokens)
        count = int(positions.max()) + 1
        cos, sin = rotary_tables(self.config, count, tokens.device)
        if cos is not None and sin is not None:
            local = local_rotary_tables(self.config, count, tokens.device)
            if local is not None:
                local = local[0][positions], local[1][positions]
            context = dataclasses.replace(
                context, cos=cos[positions], sin=sin[positions], local=local
            )
        embedded = self.embedding(tokens, positions=positions.expand_as(tokens))
        return self.decoder(embedded, context)  # type: ignore[no-any-return]

    def _alibi(self, queries: Tensor, keys: int | None = None) -> Tensor | None:
        """Return what is added to the scores of queries at positions `[batch, queries]`."""
        if not self.config.alibi:
            return None
        bias = alibi_bias(self.config, self._attention.heads, queries, keys or queries.shape[1])
        return bias.to(self.embedding.word_embeddings.weight.dtype)

    @property
    def cache_widths(self) -> dict[int, tuple[int, int, int]]:
        """Heads that generation keeps of a layer on this rank, and channels of keys and values."""
        mixers = dict(enumerate(layer.first for layer in self.decoder.layers))
        return {
            number: mixer.cache_width
            for number, mixer in mixers.items()
            if isinstance(mixer, SelfAttention | LatentAttention)
        }

    @property
    def state_size(self) -> int:
        """Numbers that generation keeps of a text on this rank, however long the text is."""
        mixers = (layer.first for layer in self.decoder.layers)
        return sum(mixer.state_size for mixer in mixers if isinstance(mixer, MambaMixer))

    @property
    def _attention(self) -> SelfAttention | LatentAttention:
        """The first layer's: what is asked of it is the same in all of them."""
        attention = self.decoder.layers[0].self_attention
        assert isinstance(attention, SelfAttention | LatentAttention)
        return attention

    def start(
        self, tokens: Tensor, lengths: list[int], columns: int
    ) -> tuple[Tensor, KeyValueCache]:
        """Return the state of each prompt's last token, `[batch, hidden]`, and the cache so far.

        Args:
            tokens: Prompts, padded on the right, `[batch, seq]`.
            lengths: Of the prompts.
            columns: Positions that the longest text may take, prompt included.
        """
        cache = KeyValueCache(
            lengths,
            columns,
            widths=self.cache_widths,
            like=self.embedding.word_embeddings.weight,
        )
        context = self._context(tokens, cache=cache)
        first = min(lengths) - 1
        states = self.decoder(self.embedding(tokens), context, first)
        last = to_device(torch.tensor(lengths), tokens.device) - 1 - first
        return states[torch.arange(len(lengths), device=tokens.device), last], cache

    def step(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the states `[batch, hidden]` of the texts' next tokens `[batch]`."""
        positions, seen = cache.advance()
        cos, sin = rotary_tables(self.config, seen.shape[-1], tokens.device)
        if cos is not None and sin is not None:
            cos, sin = cos[positions, None, None], sin[positions, None, None]  # [B, 1, 1, d]
        local = local_rotary_tables(self.config, seen.shape[-1], tokens.device)
        if local is not None:
            local = local[0][positions, None, None], local[1][positions, None, None]
        context = Context(
            causal=False,
            key_mask=seen,
            cos=cos,
            sin=sin,
            local=local,
            cache=cache,
            positions=positions,
            bias=self._alibi(positions[:, None], seen.shape[-1]),
        )
        x = self.embedding(tokens[:, None], positions=positions[:, None])
        return self.decoder(x, context)[:, 0]  # type: ignore[no-any-return]

    def log_probs(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (float32, nats) and greedy flags; see `VocabHead.log_probs`."""
        return self.output_layer.log_probs(states, targets)

    def losses(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return differentiable losses (float32, nats) and greedy flags; see `VocabHead.losses`."""
        return self.output_layer.losses(states, targets)
