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
from mlm_eval.model.layers import MLP, LinearBranch, norm
from mlm_eval.model.mamba import MambaMixer
from mlm_eval.model.tensor_parallel import TensorParallel, VocabHead, VocabParallelEmbedding


class TransformerLayer(nn.Module):
    """Attention and MLP with residuals, or what stands in their places.

    The residual is the norm's input, or its output in the original BERT order. A parallel residual
    gives both the same input: x + attention(norm(x)) + MLP(norm(x)). A branch may be missing, with
    its norm: the states then pass by.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, number: int) -> None:
        super().__init__()
        self.number = number
        self.parallel_residual = config.parallel_residual
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        own, kind = config.of_layer(number), config.mixer(number)
        if kind != "none":
            self.input_layernorm = norm(config)
        if kind == "mamba":
            self.mixer = MambaMixer(config, tp, number)
        elif kind == "linear":
            self.self_attention: nn.Module = LinearBranch(config, tp)
        elif kind == "attention":
            attention = LatentAttention if config.multi_latent_attention else SelfAttention
            self.self_attention = attention(own, tp, number)
        kind = config.feed_forward(number)
        if kind != "none":
            self.pre_mlp_layernorm = norm(config)
        if kind == "experts":
            self.mlp: nn.Module = MixtureOfExperts(config, tp)
        elif kind == "linear":
            self.mlp = LinearBranch(config, tp)
        elif kind == "plain MLP":
            self.mlp = MLP(own, tp)

    @property
    def first(self) -> nn.Module | None:
        """Attention, or what stands in its place; None: the layer has neither."""
        mixer = self._modules.get("mixer")
        return self._modules.get("self_attention") if mixer is None else mixer

    @property
    def second(self) -> nn.Module | None:
        """The MLP, or what stands in its place; None: the layer has neither."""
        return self._modules.get("mlp")

    def forward(self, x: Tensor, context: Context, query_from: int = 0) -> Tensor:
        """Return the states of the positions from `query_from` on."""
        rows, first, second = x[:, query_from:], self.first, self.second
        if first is not None:
            normed = self.input_layernorm(x)
            residual = normed[:, query_from:] if self.residual_after_norm else rows
            if isinstance(first, LinearBranch):
                branch = first(normed[:, query_from:])
            else:
                branch = first(normed, context, query_from)
            x = residual + self._drop(branch, 0, context)
        else:
            x = rows
        if second is None:
            return x
        normed = self.pre_mlp_layernorm(rows if self.parallel_residual else x)
        residual = normed if self.residual_after_norm else x
        return residual + self._drop(second(normed), 1, context)

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
            x = x * torch.full((), self.config.embedding_multiplier, dtype=x.dtype, device=x.device)
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
