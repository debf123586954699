"""The small models of the tests: one of each kind that the parameter table knows."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlm_eval.checkpoints.config import ModelConfig

GPT = ModelConfig(
    family="gpt",
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=8,
    ffn_hidden_size=64,
    vocab_size=50,
    max_position_embeddings=16,
)
LLAMA = dataclasses.replace(
    GPT,
    num_query_groups=2,
    position_embedding_type="rope",
    normalization="RMSNorm",
    activation="swiglu",
    add_bias_linear=False,
    add_qkv_bias=False,
    untie_embeddings_and_output_weights=True,
)
BERT = dataclasses.replace(GPT, family="bert", num_tokentypes=2, pooler=True, binary_head=True)

MAMBA: dict[str, Any] = {
    "position_embedding_type": "none",
    "mamba_num_heads": 4,
    "mamba_head_dim": 2,
    "mamba_num_groups": 2,
    "mamba_state_dim": 3,
    "mamba_conv_width": 4,
}
"""Of hybrids, whose settings add which layers are of which kind."""

T5 = dataclasses.replace(
    GPT,
    family="t5",
    decoder_num_layers=3,
    position_embedding_type="relative",
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)


def config(base: ModelConfig = GPT, **changes: Any) -> ModelConfig:
    """Return `base` with some settings changed; changed heads have a group of queries each."""
    if "num_attention_heads" in changes:
        changes.setdefault("num_query_groups", changes["num_attention_heads"])
    return dataclasses.replace(base, **changes)
