"""GPT-NeoX and BLOOM, whose models were trained with DeepSpeed.

Their QKV rows are `[heads, 3, head]`: group order as it is.
Source: the modeling and configuration files of transformers 5.23.
"""

from __future__ import annotations

from mlm_eval.checkpoints.huggingface.families.dense import LAYER_NORM_ROPE
from mlm_eval.checkpoints.huggingface.families.family import ATTENTION, DECODER_LAYER, Family, Row
from mlm_eval.checkpoints.huggingface.fields import (
    CAUSAL_FIELDS,
    GELU,
    VOCAB_SIZE,
    Use,
    bias_field,
    other_fields,
    read_field,
    setting_field,
    tied_field,
)

GPT_NEOX = Family(
    model_type="gpt_neox",
    model_class="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    constants=LAYER_NORM_ROPE,
    fields=(
        VOCAB_SIZE,
        setting_field("hidden_size", "hidden_size", 6144),
        setting_field("num_layers", "num_hidden_layers", 44),
        setting_field("num_attention_heads", "num_attention_heads", 64),
        setting_field("ffn_hidden_size", "intermediate_size", 24576),
        setting_field("activation", "hidden_act", "gelu", codes=GELU),
        setting_field("max_position_embeddings", "max_position_embeddings", 2048),
        setting_field("layernorm_epsilon", "layer_norm_eps", 1e-5),
        setting_field("hidden_dropout", "hidden_dropout", 0.0),
        setting_field("attention_dropout", "attention_dropout", 0.0),
        setting_field("init_method_std", "initializer_range", 0.02),
        tied_field(False),
        bias_field("attention_bias", True),
        setting_field("parallel_residual", "use_parallel_residual", True),
        read_field("rotary_emb_base", "the rotary base, where the rotary settings have none"),
        read_field("rotary_pct", "the share of rotated channels, alike"),
        read_field("rope_theta", "transformers 4's copy of rotary_emb_base; must agree"),
        read_field("partial_rotary_factor", "transformers 4's copy of rotary_pct; must agree"),
    ),
    partial_rotary=0.25,
    rotary_keys=("rotary_emb_base", "rotary_pct"),
    rows=(
        Row("embedding.word_embeddings", ("gpt_neox.embed_in",), False),
        Row(f"{DECODER_LAYER}.input_layernorm", ("gpt_neox.layers.{i}.input_layernorm",)),
        Row(
            f"{ATTENTION}.linear_qkv",
            ("gpt_neox.layers.{i}.attention.query_key_value",),
            "attention_bias",
        ),
        Row(f"{ATTENTION}.linear_proj", ("gpt_neox.layers.{i}.attention.dense",), "attention_bias"),
        Row(
            f"{DECODER_LAYER}.pre_mlp_layernorm", ("gpt_neox.layers.{i}.post_attention_layernorm",)
        ),
        Row(f"{DECODER_LAYER}.mlp.linear_fc1", ("gpt_neox.layers.{i}.mlp.dense_h_to_4h",)),
        Row(f"{DECODER_LAYER}.mlp.linear_fc2", ("gpt_neox.layers.{i}.mlp.dense_4h_to_h",)),
        Row("decoder.final_layernorm", ("gpt_neox.final_layer_norm",)),
        Row("output_layer", ("embed_out",), False, optional=True),
    ),
)
BLOOM = Family(
    model_type="bloom",
    model_class="BloomForCausalLM",
    prefix="transformer.",
    shared=CAUSAL_FIELDS,
    constants={
        "normalization": "LayerNorm",
        "position_embedding_type": "alibi",
        "embedding_layernorm": True,
        "activation": "gelu_tanh",
    },
    fields=(
        VOCAB_SIZE,
        setting_field("hidden_size", "hidden_size", 64, alias="n_embed"),
        setting_field("num_layers", "n_layer", 2, alias="num_hidden_layers"),
        setting_field("num_attention_heads", "n_head", 8, alias="num_attention_heads"),
        setting_field("ffn_hidden_size", "n_inner", None, nullable=True),
        setting_field("max_position_embeddings", "seq_length", 2048),
        setting_field("layernorm_epsilon", "layer_norm_epsilon", 1e-5),
        setting_field(
            "apply_residual_connection_post_layernorm",
            "apply_residual_connection_post_layernorm",
            False,
        ),
        setting_field("hidden_dropout", "hidden_dropout", 0.0),
        setting_field("attention_dropout", "attention_dropout", 0.0),
        setting_field("init_method_std", "initializer_range", 0.02),
        tied_field(True),
        *other_fields(
            Use.NUMERICS,
            "the order of sums, or kernels of the code that trained the model",
            "pretraining_tp",
            "slow_but_exact",
            "attention_softmax_in_fp32",
            "masked_softmax_fusion",
            "bias_dropout_fusion",
            "skip_bias_add",
            "skip_bias_add_qkv",
        ),
        *other_fields(
            Use.METADATA,
            "of the code that trained the model: a shift of all positions changes nothing in ALiBi",
            "offset_alibi",
        ),
    ),
    rows=(
        Row("embedding.word_embeddings", ("transformer.word_embeddings",), False),
        Row("embedding.word_embeddings_layernorm", ("transformer.word_embeddings_layernorm",)),
        Row(f"{DECODER_LAYER}.input_layernorm", ("transformer.h.{i}.input_layernorm",)),
        Row(f"{ATTENTION}.linear_qkv", ("transformer.h.{i}.self_attention.query_key_value",)),
        Row(f"{ATTENTION}.linear_proj", ("transformer.h.{i}.self_attention.dense",)),
        Row(f"{DECODER_LAYER}.pre_mlp_layernorm", ("transformer.h.{i}.post_attention_layernorm",)),
        Row(f"{DECODER_LAYER}.mlp.linear_fc1", ("transformer.h.{i}.mlp.dense_h_to_4h",)),
        Row(f"{DECODER_LAYER}.mlp.linear_fc2", ("transformer.h.{i}.mlp.dense_4h_to_h",)),
        Row("decoder.final_layernorm", ("transformer.ln_f",)),
        Row("output_layer", ("lm_head",), False, optional=True),
    ),
)
