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
    layers = sum(
        _layer_flops(config, layer, length, last_rows if layer == config.num_layers - 1 else length)
        for layer in range(config.num_layers)
    )
    return float(layers + head_rows * 2 * config.vocab_size * config.hidden_size)


def _layer_flops(c: ModelConfig, layer: int, length: int, rows: int) -> int:
    """Return the operations of a layer of which `rows` positions are needed."""
    h, n = c.hidden_size, c.num_attention_heads
    if c.multi_latent_attention:
        keys, values = c.qk_head_dim + c.qk_pos_emb_head_dim, c.v_head_dim
        narrow = c.q_lora_rank
        queries = narrow * (h + n * keys) if narrow else h * n * keys
        latent = (c.kv_lora_rank + c.qk_pos_emb_head_dim) * h
        projections = rows * queries + length * (
            latent + c.kv_lora_rank * n * (c.qk_head_dim + values)
        )
    else:
        keys = values = c.kv_channels
        projections = length * c.qkv_size * h
    # Scores and weighted values; a causal kernel may skip half, which is not counted as saved.
    attention = rows * length * n * (keys + values)
    per_row = c.attention_width * h + mlp_weights(c, layer)
    return 2 * (projections + attention + rows * per_row)


def mlp_weights(c: ModelConfig, layer: int) -> int:
    """Return how many weights of a layer's MLP a token meets: of experts, those it is sent to."""
    matrices = 3 if c.gated else 2
    if layer not in c.moe_layers:
        return matrices * c.ffn_hidden_size * c.hidden_size
    width = c.moe_router_topk * c.moe_ffn_hidden_size + c.moe_shared_expert_intermediate_size
    return (matrices * width + c.num_experts + c.moe_shared_expert_gate) * c.hidden_size
