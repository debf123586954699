"""BERT: masked-LM log-probabilities, next-sentence and task heads.

Source: megatron/model/bert_model.py (v2.5).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.model.attention import Context, rotary_tables
from mlm_eval.model.dropout import Dropout
from mlm_eval.model.layers import activate, norm
from mlm_eval.model.tensor_parallel import SINGLE, TensorParallel, without_autocast
from mlm_eval.model.transformer import Embedding, TransformerBlock, output_layer


class LMHead(nn.Module):
    """Dense, GELU and norm before the tied table; the GELU is always erf.

    Source: docs/megatron.md, "BERT heads", "GELU".
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = _linear(config.hidden_size, config.hidden_size)
        self.layer_norm = norm(config)
        self.activation = config.head_activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed states `[rows, hidden]`, float32."""
        return self.layer_norm(activate(in_float32(self.dense, x), self.activation))  # type: ignore[no-any-return]


class Pooler(nn.Module):
    """tanh of a dense layer over position 0."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = _linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[batch, hidden]` float32 for states `[batch, seq, hidden]`."""
        return torch.tanh(in_float32(self.dense, x[:, 0]))


class BERT(nn.Module):
    """A BERT model, or one rank's shard of it, with whichever heads the checkpoint has."""

    def __init__(self, config: ModelConfig, tp: TensorParallel = SINGLE) -> None:
        super().__init__()
        self.config = config
        self.tp = tp
        self.embedding = Embedding(config, tp)
        self.encoder = TransformerBlock(config, tp)
        self.output_layer = output_layer(config, self.embedding)
        if config.lm_head:
            self.lm_head = LMHead(config)
        if config.pooler:
            self.pooler = Pooler(config)
        if config.binary_head:
            self.binary_head = _linear(config.hidden_size, 2)
        if config.num_classes:
            self.classification_head = _linear(config.hidden_size, config.num_classes)
        if config.multichoice_head:
            self.multichoice_head = _linear(config.hidden_size, 1)
        if config.qa_head:
            self.qa_head = _linear(config.hidden_size, 2)

    def forward(
        self,
        tokens: Tensor,
        padding_mask: Tensor,
        tokentypes: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Return the final states `[batch, seq, hidden]`.

        Args:
            tokens: Token ids `[batch, seq]`.
            padding_mask: 1 on real tokens, 0 on padding, `[batch, seq]`. States of padding
                positions mean nothing.
            tokentypes: Segment ids `[batch, seq]`; None for all zero.
            dropout: The masks of a training step; None for evaluation.
        """
        cos, sin = rotary_tables(self.config, tokens.shape[1], tokens.device)
        key_mask = padding_mask.bool()[:, None, None, :]
        context = Context(causal=False, key_mask=key_mask, cos=cos, sin=sin, dropout=dropout)
        return self.encoder(self.embedding(tokens, tokentypes), context)  # type: ignore[no-any-return]

    def log_probs(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return masked-LM log-probabilities (float32, nats) and greedy flags of `targets`."""
        return self.output_layer.log_probs(self.lm_head(states), targets)

    def losses(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return differentiable masked-LM losses (float32, nats) and greedy flags of `targets`."""
        return self.output_layer.losses(self.lm_head(states), targets)

    def head_logits(self, x: Tensor, dropout: Dropout | None = None) -> dict[str, Tensor]:
        """Return the logits of each sentence-level head there is, `[batch, outputs]` float32."""
        pooled = self.pooler(x) if self.config.pooler else x[:, 0]
        heads = {}
        # Task heads see dropped states in training; the binary head of pre-training does not.
        dropped = pooled if dropout is None else dropout.pooled(pooled)
        for name in ("binary_head", "classification_head", "multichoice_head"):
            if hasattr(self, name):
                head_input = pooled if name == "binary_head" else dropped
                heads[name] = in_float32(getattr(self, name), head_input)
        return heads

    def qa_logits(self, x: Tensor) -> Tensor:
        """Return how well each position starts and ends the answer, `[batch, seq, 2]`, float32."""
        return in_float32(self.qa_head, x)


def in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return a head's outputs, computed in float32 whatever autocast and the weights' dtype say.

    Rounded to bfloat16, one answer in a hundred would tie with another, and the first would win.
    """
    with without_autocast(x):
        bias = None if layer.bias is None else layer.bias.float()
        return F.linear(x.float(), layer.weight.float(), bias)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a replicated linear layer whose weights are filled by the loader (no random draw)."""
    layer = torch.nn.utils.skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    return layer
