"""Small random models of transformers, and what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.score import Request

VOCAB, POSITIONS = 40, 24
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
LLAMA = SMALL | {"intermediate_size": 48, "max_position_embeddings": POSITIONS}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": POSITIONS}
GPT2 |= {"bos_token_id": None, "eos_token_id": None}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "seq_length": POSITIONS}
BERT = SMALL | {"intermediate_size": 64, "max_position_embeddings": POSITIONS}
PARTIAL = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4.0,
    "mscale_all_dim": 0.5,
}
MOE = LLAMA | {"num_key_value_heads": 2, "num_experts_per_tok": 2}
MIXTRAL = MOE | {"num_local_experts": 4}
QWEN_MOE = MOE | {"num_experts": 6, "moe_intermediate_size": 20, "num_hidden_layers": 3}
DEEPSEEK = LLAMA | {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 10,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
    "hidden_size": LLAMA["hidden_size"],
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 40,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 5,
    "time_step_min": 0.4,  # random models' steps are long
}
GROUPED = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
LATENT_YARN = {"rope_parameters": YARN | {"mscale": 0.707}}

WINDOW = {"use_sliding_window": True, "sliding_window": 6}
GEMMA = LLAMA | {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 6}

GPT_OSS = LLAMA | {
    "intermediate_size": 24,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "swiglu_limit": 0.5,
}

LLAMA4 = LLAMA | {
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_hidden_layers": 3,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 3,
}

GPT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 24}),
    "gpt2-erf": ("GPT2", GPT2 | {"activation_function": "gelu"}),
    "gpt2-fast": ("GPT2", GPT2 | {"activation_function": "gelu_fast"}),
    "gpt2-relu2": ("GPT2", GPT2 | {"activation_function": "relu2"}),
    "llama": ("Llama", LLAMA),
    "llama-gqa": ("Llama", LLAMA | {"num_key_value_heads": 2, "head_dim": 12}),
    "llama-biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-bias": ("Llama", LLAMA | {"attention_bias": True, "num_key_value_heads": 1}),
    "llama-tied": ("Llama", LLAMA | {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama3": ("Llama", LLAMA | {"rope_parameters": LLAMA3, "max_position_embeddings": 64}),
    "llama-linear": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 99.0}},
    ),
    "qwen2-yarn": (
        "Qwen2",
        LLAMA
        | {
            "num_key_value_heads": 2,
            "rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False},
        },
    ),
    "llama-yarn": ("Llama", LLAMA | {"rope_parameters": YARN | {"mscale": 0.7}}),
    "mistral": ("Mistral", LLAMA | {"num_key_value_heads": 2}),
    "mistral-window": ("Mistral", LLAMA | {"num_key_value_heads": 2, "sliding_window": 6}),
    "qwen2-window": (
        "Qwen2",
        LLAMA | WINDOW | {"num_key_value_heads": 2, "max_window_layers": 1},
    ),
    "qwen3-window": (
        "Qwen3",
        LLAMA
        | WINDOW
        | {"num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama-geglu": ("Llama", LLAMA | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-erf-geglu": ("Llama", LLAMA | {"hidden_act": "gelu"}),
    "llama-quick-geglu": ("Llama", LLAMA | {"hidden_act": "quick_gelu"}),
    "gemma": (
        "Gemma",
        LLAMA | {"num_key_value_heads": 1, "head_dim": 12, "hidden_act": "gelu"},
    ),
    "gemma-biases": ("Gemma", LLAMA | {"num_key_value_heads": 4, "attention_bias": True}),
    "gemma2": ("Gemma2", GEMMA | {"query_pre_attn_scalar": 9, "attn_logit_softcapping": 3.0}),
    "gemma2-uncapped": (
        "Gemma2",
        GEMMA
        | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": ("Gemma3", GEMMA | {"num_hidden_layers": 3, "sliding_window_pattern": 3}),
    "gemma3-scaled": (
        "Gemma3",
        GEMMA
        | {
            "final_logit_softcapping": 2.0,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_theta": 900.0,
            "rope_local_base_freq": 50.0,
        },
    ),
    "gpt-oss": ("GptOss", GPT_OSS),
    "gpt-oss-plain": (
        "GptOss",
        GPT_OSS
        | {
            "layer_types": ["full_attention"] * 2,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "tie_word_embeddings": True,
        },
    ),
    "llama4": ("Llama4", LLAMA4),
    "llama4-lists": (
        "Llama4",
        LLAMA4
        | {
            "moe_layers": [1],
            "no_rope_layers": [1, 0, 1],
            "rope_parameters": LLAMA3,
            "attention_chunk_size": 30,
            "floor_scale": 30,
        },
    ),
    "llama4-unnormed": (
        "Llama4",
        LLAMA4 | {"use_qk_norm": False, "num_local_experts": 1, "attention_bias": True},
    ),
    "qwen2": ("Qwen2", LLAMA | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", LLAMA | {"num_key_value_heads": 2, "head_dim": 16}),
    "stablelm": ("StableLm", LLAMA | {"num_key_value_heads": 2, "use_qkv_bias": True}),
    "stablelm-half": ("StableLm", LLAMA | {"num_key_value_heads": 4} | PARTIAL),
    "starcoder2": ("Starcoder2", LLAMA | {"num_key_value_heads": 2}),
    "neox-parallel": ("GPTNeoX", LLAMA | {"layer_norm_eps": 1e-3} | PARTIAL),
    "bloom": ("Bloom", BLOOM),
    "bloom-untied": (
        "Bloom",
        BLOOM
        | {"n_head": 6, "hidden_size": 48, "tie_word_embeddings": False}
        | {"apply_residual_connection_post_layernorm": True, "layer_norm_epsilon": 1e-3},
    ),
    "neox": ("GPTNeoX", LLAMA | {"use_parallel_residual": False}),
    "neox-half": (
        "GPTNeoX",
        LLAMA
        | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"}
        | PARTIAL,
    ),
    "mixtral": ("Mixtral", MIXTRAL | {"head_dim": 12}),
    "mixtral-one": ("Mixtral", MIXTRAL | {"num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "qwen2-moe": ("Qwen2Moe", QWEN_MOE | {"shared_expert_intermediate_size": 28}),
    "qwen2-moe-mixed": (
        "Qwen2Moe",
        QWEN_MOE | {"decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False},
    ),
    "mixtral-window": ("Mixtral", MIXTRAL | {"sliding_window": 6}),
    "qwen2-moe-window": (
        "Qwen2Moe",
        QWEN_MOE | WINDOW | {"max_window_layers": 3, "shared_expert_intermediate_size": 28},
    ),
    "qwen3-moe-window": ("Qwen3Moe", QWEN_MOE | WINDOW | {"hidden_act": "gelu"}),
    "qwen3-moe": ("Qwen3Moe", QWEN_MOE | {"norm_topk_prob": True, "head_dim": 12}),
    "qwen3-moe-mixed": ("Qwen3Moe", QWEN_MOE | {"mlp_only_layers": [0, 2]}),
    "nemotron-h": ("NemotronH", NEMOTRON_H | {"layer_norm_epsilon": 1e-3}),
    "nemotron-h-pattern": (
        "NemotronH",
        {key: value for key, value in NEMOTRON_H.items() if key != "layers_block_type"}
        | {"hybrid_override_pattern": "M-M*", "tie_word_embeddings": True, "conv_kernel": 3},
    ),
    "nemotron-h-experts": (
        "NemotronH",
        NEMOTRON_H
        | {
            "layers_block_type": ["moe", "linear_attention", "full_attention", "moe"],
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "moe_shared_expert_intermediate_size": 20,
            "routed_scaling_factor": 1.7,
        },
    ),
    "deepseek-v2": ("DeepseekV2", DEEPSEEK | {"routed_scaling_factor": 1.7} | LATENT_YARN),
    "deepseek-v2-lite": ("DeepseekV2", DEEPSEEK | {"q_lora_rank": None, "rms_norm_eps": 1e-3}),
    "deepseek-v2-groups": (
        "DeepseekV2",
        DEEPSEEK | GROUPED | {"topk_method": "group_limited_greedy"},
    ),
    "deepseek-v2-dense": ("DeepseekV2", DEEPSEEK | {"first_k_dense_replace": 3}),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK | GROUPED | LATENT_YARN),
    "deepseek-v3-one-group": (
        "DeepseekV3",
        DEEPSEEK | {"n_group": 1, "topk_group": 1, "rope_parameters": YARN, "q_lora_rank": None},
    ),
    "deepseek-v3-three": ("DeepseekV3", DEEPSEEK | GROUPED | {"num_experts_per_tok": 3}),
    "deepseek-v3-halves": ("DeepseekV3", DEEPSEEK | GROUPED | {"rope_interleave": False}),
    "deepseek-v3-single": (
        "DeepseekV3",
        DEEPSEEK | GROUPED | {"num_experts_per_tok": 1, "norm_topk_prob": False},
    ),
}
BERT_MODELS = [
    f"{family}{head}"
    for family in ("Bert", "MegatronBert")
    for head in (
        "ForPreTraining",
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForMultipleChoice",
        "ForNextSentencePrediction",
        "ForQuestionAnswering",
        "Model",
    )
]


def randomize(model: torch.nn.Module, *, seed: int = 1) -> None:
    """Fill every parameter with noise: zero biases and unit gains would hide a wrong order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if name.lower().endswith(
                (
                    "norm.weight",
                    "ln_1.weight",
                    "ln_2.weight",
                    "ln_f.weight",
                    "ln.weight",
                    "norm_f.weight",
                )
            ):
                parameter += 1
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2, generator=generator)


def theirs(name: str, settings: dict[str, Any]) -> Any:
    """Return a small random transformers model."""
    import transformers

    architecture = next(
        base
        for base in (
            "MegatronBert",
            "Bert",
            name.removesuffix("ForCausalLM").removesuffix("LMHeadModel"),
        )
        if name.startswith(base)
    )
    kind = {"Gemma3": "Gemma3Text", "Llama4": "Llama4Text"}.get(architecture, architecture)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, name)(config).eval()
    randomize(model)
    return model


def gpt_model(kind: str) -> Any:
    name, settings = GPT_MODELS[kind]
    return theirs(f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM", settings)


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(VOCAB, (rows, POSITIONS), generator=torch.Generator().manual_seed(2))


def our_log_probs(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Return the log-probabilities of all tokens but the first, `[rows, positions - 1]`."""
    engine = Engine.load(checkpoint, dtype="float32")
    scores = engine.score([Request(row, row.numel() - 1) for row in ids])
    return scores.logprobs.view(len(ids), -1)


def their_log_probs(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        everything = model(ids).logits[:, :-1].log_softmax(-1)
    return everything.gather(-1, ids[:, 1:, None]).squeeze(-1)
