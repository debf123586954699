"""GPT-2, and the dense families that take after Llama.

Source: the modeling and configuration files of transformers 5.23.
"""

from __future__ import annotations

from mlm_eval.checkpoints.config import PARALLEL_RESIDUAL
from mlm_eval.checkpoints.huggingface.families.family import ATTENTION, DECODER_LAYER, Family, Row
from mlm_eval.checkpoints.huggingface.families.llama import (
    HEAD_DIM,
    RMS_EPSILON,
    RMS_ROPE,
    WINDOW_SWITCHES,
    llama_fields,
    llama_rows,
    window_field,
)
from mlm_eval.checkpoints.huggingface.fields import (
    CAUSAL_FIELDS,
    GELU,
    VOCAB_SIZE,
    Use,
    bias_field,
    other_fields,
    refused_field,
    setting_field,
    tied_field,
)
from mlm_eval.checkpoints.huggingface.layout import CONV1D, CONV1D_QKV

GPT2 = Family(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    prefix="transformer.",
    shared=CAUSAL_FIELDS,
    constants={"add_bias_linear": True, "add_qkv_bias": True},
    fields=(
        VOCAB_SIZE,
        setting_field("hidden_size", "n_embd", 768, alias="hidden_size"),
        setting_field("num_layers", "n_layer", 12, alias="num_hidden_layers"),
        setting_field("num_attention_heads", "n_head", 12, alias="num_attention_heads"),
        setting_field("ffn_hidden_size", "n_inner", None, nullable=True),
        setting_field("activation", "activation_function", "gelu_new", codes=GELU),
        setting_field(
            "max_position_embeddings", "n_positions", 1024, alias="max_position_embeddings"
        ),
        setting_field("layernorm_epsilon", "layer_norm_epsilon", 1e-5),
        setting_field("hidden_dropout", "resid_pdrop", 0.1),
        setting_field("attention_dropout", "attn_pdrop", 0.1),
        setting_field("init_method_std", "initializer_range", 0.02),
        tied_field(True),
        refused_field("scale_attn_weights", "unscaled attention scores", True, default=True),
        refused_field(
            "scale_attn_by_inverse_layer_idx", "scores scaled by layer", False, default=False
        ),
        refused_field("add_cross_attention", "cross-attention", False, default=False),
        *other_fields(Use.NUMERICS, "the order of two products", "reorder_and_upcast_attn"),
        *other_fields(
            Use.TRAINING,
            "dropout",
            "embd_pdrop",
            "hidden_dropout",
            "summary_first_dropout",
            "summary_last_dropout",
        ),
        *other_fields(
            Use.METADATA,
            "of GPT2DoubleHeadsModel's second head, whose tensors are refused",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
        ),
        *other_fields(
            Use.METADATA,
            "of 2019; positions and tokens are told elsewhere",
            "n_ctx",
            "n_special",
            "predict_special_tokens",
        ),
    ),
    rows=(
        Row("embedding.word_embeddings", ("transformer.wte",), False),
        Row("embedding.position_embeddings", ("transformer.wpe",), False),
        Row(f"{DECODER_LAYER}.input_layernorm", ("transformer.h.{i}.ln_1",)),
        Row(f"{ATTENTION}.linear_qkv", ("transformer.h.{i}.attn.c_attn",), layout=CONV1D_QKV),
        Row(f"{ATTENTION}.linear_proj", ("transformer.h.{i}.attn.c_proj",), layout=CONV1D),
        Row(f"{DECODER_LAYER}.pre_mlp_layernorm", ("transformer.h.{i}.ln_2",)),
        Row(f"{DECODER_LAYER}.mlp.linear_fc1", ("transformer.h.{i}.mlp.c_fc",), layout=CONV1D),
        Row(f"{DECODER_LAYER}.mlp.linear_fc2", ("transformer.h.{i}.mlp.c_proj",), layout=CONV1D),
        Row("decoder.final_layernorm", ("transformer.ln_f",)),
        Row("output_layer", ("lm_head",), False, optional=True),
    ),
)


LLAMA = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    constants=RMS_ROPE,
    fields=(
        *llama_fields(4096, 32, 32, None, 11008, 2048),
        HEAD_DIM,
        RMS_EPSILON,
        bias_field("attention_bias", False),
        bias_field("mlp_bias", False),
        *other_fields(Use.NUMERICS, "the order of sums, in transformers 4", "pretraining_tp"),
        refused_field("rope_interleaved", "rotary channels in pairs", False, None),
        *other_fields(
            Use.METADATA,
            "of conversions; no code reads it",
            "max_sequence_length",
            "is_llama_config",
        ),
    ),
    rows=llama_rows("attention_bias", "attention_bias", "mlp_bias"),
)
MISTRAL = Family(
    model_type="mistral",
    model_class="MistralForCausalLM",
    constants=RMS_ROPE,
    fields=(
        *llama_fields(4096, 32, 32, 8, 14336, 131072),
        HEAD_DIM,
        RMS_EPSILON,
        window_field(4096),
    ),
    rows=llama_rows(False),
    windows="all",
)
QWEN2 = Family(
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    constants=RMS_ROPE,
    fields=(
        *llama_fields(4096, 32, 32, 32, 22016, 32768),
        HEAD_DIM,
        RMS_EPSILON,
        *WINDOW_SWITCHES,
        refused_field("use_mrope", "rotary positions in three parts", False, None),
    ),
    rows=llama_rows(True),
    windows="after",
)
QWEN3 = Family(
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    constants={**RMS_ROPE, "qk_layernorm": True},
    fields=(
        *llama_fields(4096, 32, 32, 32, 22016, 32768),
        setting_field("kv_channels", "head_dim", 128),
        RMS_EPSILON,
        bias_field("attention_bias", False),
        *WINDOW_SWITCHES,
    ),
    rows=llama_rows("attention_bias", "attention_bias", qk_norm=True),
    windows="after",
)
LAYER_NORM_ROPE = {"normalization": "LayerNorm", "position_embedding_type": "rope"}
STABLELM = Family(
    model_type="stablelm",
    model_class="StableLmForCausalLM",
    constants=LAYER_NORM_ROPE,
    fields=(
        *llama_fields(2560, 32, 32, 32, 6912, 4096),
        setting_field("layernorm_epsilon", "layer_norm_eps", 1e-5),
        setting_field("hidden_dropout", "hidden_dropout", 0.0),
        bias_field("use_qkv_bias", False),
        refused_field("use_parallel_residual", PARALLEL_RESIDUAL, False, default=False),
        refused_field("qk_layernorm", "a norm of its own for each head", False, default=False),
    ),
    rows=llama_rows("use_qkv_bias", norm_bias=True),
    partial_rotary=0.25,
)
STARCODER2 = Family(
    model_type="starcoder2",
    model_class="Starcoder2ForCausalLM",
    constants=LAYER_NORM_ROPE,
    fields=(
        *llama_fields(
            3072,
            30,
            24,
            2,
            12288,
            4096,
            std=0.018042,
            tied=True,
            activation="gelu_pytorch_tanh",
            codes=GELU,
        ),
        HEAD_DIM,
        setting_field("layernorm_epsilon", "norm_epsilon", 1e-5),
        setting_field("hidden_dropout", "residual_dropout", 0.0),
        bias_field("use_bias", True),
        window_field(None),
        refused_field("mlp_type", "another kind of MLP", "default", None),
        refused_field("norm_type", "another kind of norm", "layer_norm", None),
        refused_field("scale_attn_weights", "unscaled attention scores", True, None),
        *other_fields(Use.TRAINING, "dropout", "embedding_dropout"),
        *other_fields(
            Use.NUMERICS,
            "the softmax's dtype, in the code that trained the model",
            "attention_softmax_in_fp32",
            "scale_attention_softmax_in_fp32",
        ),
        *other_fields(
            Use.METADATA,
            "that code's names of hidden_act and norm_epsilon, which decide",
            "activation_function",
            "layer_norm_epsilon",
        ),
    ),
    rows=llama_rows(
        "use_bias", "use_bias", "use_bias", norm_bias=True, fc1=("c_fc",), fc2="c_proj"
    ),
    windows="all",
)
