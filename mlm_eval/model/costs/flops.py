"""Floating-point operations of the passes that are really run, counted from the model's sizes.

A multiply and an add count as two. Norms, activations and softmax are left out, as in the paper's
section 5.1 and in common practice. Only the rows that are computed count.
"""

from __future__ import annotations

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.model.mamba import SCAN_CHUNK


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
    own, mixer = c.of_layer(layer), c.mixer(layer)
    if mixer == "attention":
        mixed = _attention_flops(own, length, rows)
    elif mixer == "mamba":
        mixed = _mamba_flops(c, length, rows)
    else:
        mixed = 2 * rows * c.hidden_size**2 if mixer == "linear" else 0
    return mixed + 2 * rows * mlp_weights(own, layer)


def _attention_flops(c: ModelConfig, length: int, rows: int) -> int:
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
    return 2 * (projections + attention + rows * c.attention_width * h)


def _mamba_flops(c: ModelConfig, length: int, rows: int) -> int:
    packed, d = [size for size, _ in c.mamba_parts], c.mamba_width
    convolved = sum(packed[1:4]) * c.mamba_conv_width
    # Within a chunk each position meets all of it, once a group and once a channel; the states are
    # written and read once a channel.
    chunk = min(SCAN_CHUNK, length)
    scanned = chunk * (c.mamba_num_groups * c.mamba_state_dim + d) + 2 * d * c.mamba_state_dim
    per_position = sum(packed) * c.hidden_size + convolved + scanned
    return 2 * (length * per_position + rows * d * c.hidden_size)


def mlp_weights(c: ModelConfig, layer: int) -> int:
    """Return how many weights of a layer's MLP a token meets: of experts, those it is sent to."""
    matrices, kind = 3 if c.gated else 2, c.feed_forward(layer)
    if kind != "experts":
        rows = {"plain MLP": matrices * c.ffn_hidden_size, "linear": c.hidden_size, "none": 0}
        return rows[kind] * c.hidden_size
    width = c.moe_router_topk * c.moe_ffn_hidden_size + c.moe_shared_expert_intermediate_size
    return (matrices * width + c.num_experts + c.moe_shared_expert_gate) * c.hidden_size
