"""GPT: tokens in, states of the scored rows out, log-probabilities over a cut vocabulary."""

from __future__ import annotations

from torch import Tensor, nn

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.dropout import Dropout
from mlm_eval.tensor_parallel import (
    SINGLE,
    TensorParallel,
    vocab_parallel_cross_entropy,
    vocab_parallel_log_probs,
)
from mlm_eval.transformer import Context, Embedding, OutputLayer, TransformerBlock, rotary_tables


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
        self.output_layer = OutputLayer(config, tp)

    @property
    def output_table(self) -> Tensor:
        """This rank's rows of the output table, `[vocab / tp, hidden]`; when tied, the embeddings."""
        if self.output_layer.weight is not None:
            return self.output_layer.weight
        return self.embedding.word_embeddings.weight

    def forward(
        self, tokens: Tensor, query_from: int = 0, dropout: Dropout | None = None
    ) -> Tensor:
        """Return the final states `[batch, seq - query_from, hidden]` of the last positions.

        Sequences are padded on the right: no position sees a later one, so padding needs no mask.
        """
        cos = sin = None
        if self.config.rotary:
            cos, sin = rotary_tables(self.config, tokens.shape[1], tokens.device)
        context = Context(causal=True, cos=cos, sin=sin, dropout=dropout)
        return self.decoder(self.embedding(tokens), context, query_from)  # type: ignore[no-any-return]

    def log_probs(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (float32, nats) and greedy flags of `targets` given states."""
        return vocab_parallel_log_probs(
            rows,
            targets,
            weight=self.output_table,
            bias=self.output_layer.bias,
            first_row=self.output_layer.first_row,
            vocab_size=self.config.vocab_size,
            tp=self.tp,
        )

    def losses(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return differentiable losses (float32, nats) and greedy flags of `targets` given states."""
        return vocab_parallel_cross_entropy(
            rows,
            targets,
            weight=self.output_table,
            bias=self.output_layer.bias,
            first_row=self.output_layer.first_row,
            vocab_size=self.config.vocab_size,
            tp=self.tp,
        )
