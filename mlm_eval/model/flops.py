"""Floating-point operations of the passes that are really run, counted from the model's sizes.

A multiply and an add count as two. Norms, activations and softmax are left out, as in the paper's
section 5.1 and in common practice. Only the rows that are computed count.
"""

from __future__ import annotations

from mlm_eval.checkpoints.config import ModelConfig


def forward_flops(config: ModelConfig, length: int, *, last_rows: int, head_rows: int) -> float:
    """Return the operations of one sequence's forward pass, over all tensor-parallel ranks.

    Args:
        config: The model.
        length: Input positions.
        last_rows: Positions for which the last layer computes attention, projection and MLP.
        head_rows: Positions for which logits are computed.
    """
    h, width = config.hidden_size, config.num_attention_heads * config.kv_channels
    mlp = (3 if config.gated else 2) * config.ffn_hidden_size * h
    per_row = 2 * (width * h + mlp)  # output projection and MLP
    qkv = 2 * config.qkv_size * h

    def layer(rows: int) -> float:
        # Scores and weighted values; a causal kernel may skip half, which is not counted as saved.
        attention = 4 * rows * length * width
        return length * qkv + rows * per_row + attention

    layers = (config.num_layers - 1) * layer(length) + layer(last_rows)
    return float(layers + head_rows * 2 * config.vocab_size * h)
