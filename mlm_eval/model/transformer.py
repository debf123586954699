"""The transformer layer of Megatron-LM, read top to bottom; GPT and BERT share it.

Module names are the canonical parameter names, so a model's `named_parameters` are the table's
keys. No layer here knows a rank: the parallel linears do.
Source: docs/megatron.md, "Model mathematics" and the sections that follow it; Megatron-LM,
megatron/model/transformer.py (v2.5) and megatron/core/transformer (core 0.16).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.parameters import vocab_range
from mlm_eval.model.attention import Context, LatentAttention, SelfAttention
from mlm_eval.model.dropout import EMBEDDING
from mlm_eval.model.experts import MixtureOfExperts
from mlm_eval.model.layers import MLP, norm
from mlm_eval.model.tensor_parallel import TensorParallel, VocabHead, VocabParallelEmbedding


class TransformerLayer(nn.Module):
    """Attention and MLP with residuals.

    The residual is the norm's input, or its output in the original BERT order. A parallel residual
    gives both the same input: x + attention(norm(x)) + MLP(norm(x)).
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, number: int) -> None:
        super().__init__()
        self.number = number
        self.parallel_residual = config.parallel_residual
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.input_layernorm = norm(config)
        attention = LatentAttention if config.multi_latent_attention else SelfAttention
        self.self_attention = attention(config, tp, number)
        self.pre_mlp_layernorm = norm(config)
        experts = number in config.moe_layers
        self.mlp = MixtureOfExperts(config, tp) if experts else MLP(config, tp)

    def forward(self, x: Tensor, context: Context, query_from: int = 0) -> Tensor:
        """Return the states of the positions from `query_from` on."""
        normed = self.input_layernorm(x)
        residual = normed if self.residual_after_norm else x
        branch = self.self_attention(normed, context, query_from)
        if self.parallel_residual:
            x = x[:, query_from:]
            branch = self._drop(branch, 0, context)
            return x + branch + self._drop(self.mlp(self.pre_mlp_layernorm(x)), 1, context)
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
    """Word, position and token-type embeddings; a norm, where there is one, on the first.

    Source: docs/megatron.md, "Embeddings".
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        start, stop = vocab_range(config.vocab_size, tp.rank, tp.size)
        width = config.hidden_size
        self.word_embeddings = VocabParallelEmbedding(stop - start, width, first_row=start, tp=tp)
        if config.embedding_layernorm:
            self.word_embeddings_layernorm = norm(config)
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
        if self.config.embedding_layernorm:
            x = self.word_embeddings_layernorm(x)
        if self.config.learned_positions:
            table = self.position_embeddings.weight
            x = x + (table[: tokens.shape[1]] if positions is None else table[positions])
        if self.config.num_tokentypes:
            types = torch.zeros_like(tokens) if tokentypes is None else tokentypes
            x = x + self.tokentype_embeddings(types)
        if self.config.embedding_multiplier != 1.0:
            # Rounded to the dtype of what it multiplies, as Gemma was trained.
            x = x * torch.tensor(self.config.embedding_multiplier, dtype=x.dtype, device=x.device)
        return x  # type: ignore[no-any-return]


def output_layer(config: ModelConfig, embedding: Embedding) -> VocabHead:
    """Return the output table, tied or not, with the bias of BERT's and of a tied T5's."""
    biased = config.family == "bert" and config.lm_head
    if config.family == "t5":
        biased = not config.untie_embeddings_and_output_weights
    return VocabHead(
        config.vocab_size,
        embedding.word_embeddings,
        tied=not (config.untie_embeddings_and_output_weights and config.lm_head),
        biased=biased,
        multiplier=config.logit_multiplier,
        cap=config.final_logit_softcapping,
    )
