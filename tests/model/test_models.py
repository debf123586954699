"""Whole models against transformers: GPT-2, Llama and its kin, GPT-NeoX, Persimmon, BERT.

Each pair is a transformers model with noise for weights, and our model with the same weights under
our names. Most of these architectures came out of Megatron, so that every variant has an oracle.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import random_models
from support.random_models import all_log_probs, bert_inputs, on_one_rank
from torch import Tensor, nn

from mlm_eval.checkpoints.config import ModelConfig, RopeScaling

HEADS, GROUPS, CHANNELS, POSITIONS, VOCAB = 4, 2, 8, 16, 50


def noisy(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a model with noise, also the biases and gains that it starts with at 0 and 1."""
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.2)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.add_(1)
    return model.eval().requires_grad_(False)


LLAMA_NAMES = {
    r"model\.embed_tokens": "embedding.word_embeddings",
    r"model\.layers\.(\d+)\.input_layernorm": r"decoder.layers.\1.input_layernorm",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"decoder.layers.\1.pre_mlp_layernorm",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": r"decoder.layers.\1.self_attention.linear_proj",
    r"model\.layers\.(\d+)\.self_attn\.(q|k)_norm": (
        r"decoder.layers.\1.self_attention.\2_layernorm"
    ),
    r"model\.layers\.(\d+)\.mlp\.(gate|up)_proj": r"decoder.layers.\1.mlp.\2",
    r"model\.layers\.(\d+)\.mlp\.down_proj": r"decoder.layers.\1.mlp.linear_fc2",
    r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj": r"decoder.layers.\1.self_attention.\2",
    r"model\.norm": "decoder.final_layernorm",
    r"lm_head": "output_layer",
}
FUSED_NAMES = {  # GPT-NeoX and Persimmon: Megatron's own names and query-key-value order
    r"(?:gpt_neox|model)\.embed_(?:in|tokens)": "embedding.word_embeddings",
    r".*layers\.(\d+)\.input_layernorm": r"decoder.layers.\1.input_layernorm",
    r".*layers\.(\d+)\.post_attention_layernorm": r"decoder.layers.\1.pre_mlp_layernorm",
    r".*layers\.(\d+)\..*query_key_value": r"decoder.layers.\1.self_attention.linear_qkv",
    r".*layers\.(\d+)\..*(q|k)_layernorm": r"decoder.layers.\1.self_attention.\2_layernorm",
    r".*layers\.(\d+)\.(?:attention|self_attn)\.dense": (
        r"decoder.layers.\1.self_attention.linear_proj"
    ),
    r".*layers\.(\d+)\.mlp\.dense_h_to_4h": r"decoder.layers.\1.mlp.linear_fc1",
    r".*layers\.(\d+)\.mlp\.dense_4h_to_h": r"decoder.layers.\1.mlp.linear_fc2",
    r"(?:gpt_neox\.final_layer_norm|model\.final_layernorm)": "decoder.final_layernorm",
    r"lm_head": "output_layer",
}
GPT2_NAMES = {
    r"transformer\.wte": "embedding.word_embeddings",
    r"transformer\.wpe": "embedding.position_embeddings",
    r"transformer\.h\.(\d+)\.ln_1": r"decoder.layers.\1.input_layernorm",
    r"transformer\.h\.(\d+)\.ln_2": r"decoder.layers.\1.pre_mlp_layernorm",
    r"transformer\.h\.(\d+)\.attn\.c_attn": r"decoder.layers.\1.self_attention.qkv",
    r"transformer\.h\.(\d+)\.attn\.c_proj": r"decoder.layers.\1.self_attention.linear_proj",
    r"transformer\.h\.(\d+)\.mlp\.c_fc": r"decoder.layers.\1.mlp.linear_fc1",
    r"transformer\.h\.(\d+)\.mlp\.c_proj": r"decoder.layers.\1.mlp.linear_fc2",
    r"transformer\.ln_f": "decoder.final_layernorm",
}
BERT_NAMES = {
    r"bert\.embeddings\.(word|position)_embeddings": r"embedding.\1_embeddings",
    r"bert\.embeddings\.token_type_embeddings": "embedding.tokentype_embeddings",
    r"bert\.encoder\.layer\.(\d+)\.attention\.ln": r"encoder.layers.\1.input_layernorm",
    r"bert\.encoder\.layer\.(\d+)\.ln": r"encoder.layers.\1.pre_mlp_layernorm",
    r"bert\.encoder\.layer\.(\d+)\.attention\.self\.(q|k|v)\w*": (
        r"encoder.layers.\1.self_attention.\2"
    ),
    r"bert\.encoder\.layer\.(\d+)\.attention\.output\.dense": (
        r"encoder.layers.\1.self_attention.linear_proj"
    ),
    r"bert\.encoder\.layer\.(\d+)\.intermediate\.dense": r"encoder.layers.\1.mlp.linear_fc1",
    r"bert\.encoder\.layer\.(\d+)\.output\.dense": r"encoder.layers.\1.mlp.linear_fc2",
    r"bert\.encoder\.ln": "encoder.final_layernorm",
    r"bert\.pooler\.dense": "pooler.dense",
    r"cls\.predictions\.transform\.dense": "lm_head.dense",
    r"cls\.predictions\.transform\.LayerNorm": "lm_head.layer_norm",
    r"cls\.predictions": "output_layer",
    r"cls\.seq_relationship": "binary_head",
}


def renamed(theirs: nn.Module, names: dict[str, str], config: ModelConfig) -> dict[str, Tensor]:
    """Return a model's weights under our names, its queries, keys and values in one tensor."""
    weights: dict[str, Tensor] = {}
    for name, tensor in theirs.named_parameters():
        stem, _, leaf = name.rpartition(".")
        matches = [re.sub(p, new, stem) for p, new in names.items() if re.fullmatch(p, stem)]
        assert len(matches) == 1, (name, matches)
        weights[f"{matches[0]}.{leaf}"] = tensor.data
    for name in list(weights):
        stem, _, leaf = name.rpartition(".")
        if stem.endswith(".self_attention.q"):
            parts = [weights.pop(f"{stem[:-1]}{letter}.{leaf}") for letter in "qkv"]
            weights[f"{stem[:-1]}linear_qkv.{leaf}"] = grouped(parts, config)
        elif stem.endswith(".self_attention.qkv"):  # GPT-2: three blocks of columns
            parts = list(weights.pop(name).chunk(3, dim=-1))
            parts = [part.t() if part.dim() == 2 else part for part in parts]
            weights[f"{stem[:-3]}linear_qkv.{leaf}"] = grouped(parts, config)
        elif stem.endswith(".mlp.gate"):
            up = weights.pop(f"{stem[:-4]}up.{leaf}")
            weights[f"{stem[:-4]}linear_fc1.{leaf}"] = torch.cat([weights.pop(name), up])
        elif GPT2_NAMES is names and re.search(r"linear_(proj|fc1|fc2)\.weight", name):
            weights[name] = weights[name].t()
    return weights


def grouped(parts: list[Tensor], config: ModelConfig) -> Tensor:
    """Return each group's heads in turn: its queries, its key, its value."""
    groups, width = config.num_query_groups, config.kv_channels
    split = [part.reshape(groups, -1, width, *part.shape[1:]) for part in parts]
    return torch.cat(split, dim=1).flatten(0, 2)


def gpt(**changes: Any) -> ModelConfig:
    return random_models.config(random_models.GPT, **changes)


def llama(**changes: Any) -> ModelConfig:
    return random_models.config(random_models.LLAMA, **{"layernorm_epsilon": 1e-6, **changes})


def gpt2_pair() -> tuple[nn.Module, ModelConfig, dict[str, str]]:
    from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=4, n_inner=64, vocab_size=VOCAB, n_positions=POSITIONS
    )
    return GPT2LMHeadModel(config), gpt(activation="gelu_tanh"), GPT2_NAMES


SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
}
GROUPED = SIZES | {"num_key_value_heads": GROUPS, "head_dim": CHANNELS}


def llama_pair(
    rope: dict[str, Any] | None = None, *, head_dim: int = CHANNELS, **changes: Any
) -> tuple[nn.Module, ModelConfig, dict[str, str]]:
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0} | (rope or {})
    tied = not changes.get("untie_embeddings_and_output_weights", True)
    config = LlamaConfig(
        **GROUPED | {"head_dim": head_dim}, rope_parameters=rope, tie_word_embeddings=tied
    )
    return LlamaForCausalLM(config), llama(kv_channels=head_dim, **changes), LLAMA_NAMES


def qwen2_pair() -> tuple[nn.Module, ModelConfig, dict[str, str]]:
    from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**GROUPED)), llama(add_qkv_bias=True), LLAMA_NAMES


def qwen3_pair() -> tuple[nn.Module, ModelConfig, dict[str, str]]:
    from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**GROUPED)), llama(qk_layernorm=True), LLAMA_NAMES


def granite_pair() -> tuple[nn.Module, ModelConfig, dict[str, str]]:
    from transformers.models.granite import GraniteConfig, GraniteForCausalLM

    theirs = GraniteConfig(**GROUPED, attention_multiplier=0.4)
    return GraniteForCausalLM(theirs), llama(softmax_scale=0.4), LLAMA_NAMES


def nemotron_pair() -> tuple[nn.Module, ModelConfig, dict[str, str]]:
    from transformers.models.nemotron import NemotronConfig, NemotronForCausalLM

    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    config = llama(
        normalization="LayerNorm",
        layernorm_epsilon=1e-5,
        layernorm_zero_centered_gamma=True,
        activation="squared_relu",
        rotary_percent=0.5,
        rotary_base=500.0,
    )
    names = LLAMA_NAMES | {
        r"model\.layers\.(\d+)\.mlp\.up_proj": r"decoder.layers.\1.mlp.linear_fc1"
    }
    del names[r"model\.layers\.(\d+)\.mlp\.(gate|up)_proj"]
    return NemotronForCausalLM(NemotronConfig(**GROUPED, rope_parameters=rope)), config, names


def neox_pair() -> tuple[nn.Module, ModelConfig, dict[str, str]]:
    from transformers.models.gpt_neox import GPTNeoXConfig, GPTNeoXForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    theirs = GPTNeoXConfig(
        **SIZES, hidden_act="gelu", rope_parameters=rope, use_parallel_residual=False
    )
    config = gpt(
        position_embedding_type="rope",
        rotary_percent=0.25,
        untie_embeddings_and_output_weights=True,
    )
    return GPTNeoXForCausalLM(theirs), config, FUSED_NAMES


def persimmon_pair() -> tuple[nn.Module, ModelConfig, dict[str, str]]:
    from transformers.models.persimmon import PersimmonConfig, PersimmonForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = gpt(
        position_embedding_type="rope",
        rotary_percent=0.5,
        activation="squared_relu",
        qk_layernorm=True,
        qk_layernorm_bias=True,
        untie_embeddings_and_output_weights=True,
    )
    theirs = PersimmonConfig(**SIZES, rope_parameters=rope, qk_layernorm=True)
    return PersimmonForCausalLM(theirs), config, FUSED_NAMES


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED = RopeScaling(**LLAMA3, original_max_position=32)
PAIRS: dict[str, Callable[[], tuple[nn.Module, ModelConfig, dict[str, str]]]] = {
    "gpt2": gpt2_pair,
    "llama, grouped queries": llama_pair,
    "llama, tied": lambda: llama_pair(untie_embeddings_and_output_weights=False),
    "llama, heads wider than hidden / n": lambda: llama_pair(head_dim=12),
    "llama 3.1": lambda: llama_pair(
        {"rope_type": "llama3", "original_max_position_embeddings": 32, **LLAMA3},
        rope_scaling=SCALED,
    ),
    "llama, interpolated": lambda: llama_pair(
        {"rope_type": "linear", "factor": 4.0}, rotary_seq_len_interpolation_factor=4.0
    ),
    "qwen2, biases of qkv only": qwen2_pair,
    "qwen3, rms norm of queries and keys": qwen3_pair,
    "granite, an attention scale of its own": granite_pair,
    "nemotron, centred gains, squared relu": nemotron_pair,
    "gpt-neox, partial rotary": neox_pair,
    "persimmon, layer norm of queries and keys": persimmon_pair,
}


@pytest.mark.parametrize("pair", PAIRS)
def test_gpt_models_agree_with_transformers(pair):
    theirs, config, names = PAIRS[pair]()
    noisy(theirs)
    model = on_one_rank(config, renamed(theirs, names, config))
    tokens = torch.randint(VOCAB, (3, POSITIONS), generator=torch.Generator().manual_seed(1))

    expected = theirs(tokens).logits.log_softmax(-1)  # [B, T, V]
    actual = all_log_probs(model, model(tokens))

    assert expected.std() > 0.5, "the weights are too tame to tell anything"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_bert_agrees_with_transformers_megatron_bert():
    from transformers.models.megatron_bert import MegatronBertConfig, MegatronBertForPreTraining

    theirs = noisy(
        MegatronBertForPreTraining(MegatronBertConfig(**SIZES, layer_norm_eps=1e-5)), seed=2
    )
    config = random_models.BERT
    model = on_one_rank(config, renamed(theirs, BERT_NAMES, config))
    tokens, mask, types = bert_inputs()

    expected = theirs(tokens, attention_mask=mask, token_type_ids=types)
    states = model(tokens, mask, types)
    actual = all_log_probs(model, states)

    real = mask.bool()
    wanted = expected.prediction_logits.log_softmax(-1)[real]
    assert wanted.std() > 0.5
    torch.testing.assert_close(actual[real], wanted, rtol=0, atol=1e-4)
    heads = model.head_logits(states)
    torch.testing.assert_close(
        heads["binary_head"], expected.seq_relationship_logits, rtol=0, atol=1e-5
    )
    # The types matter, so that passing them on is shown by the above.
    assert (model(tokens, mask) - states)[real].abs().max() > 0.1


def test_residuals_after_the_norm_are_the_original_bert():
    """Norms shifted by one place turn Google's post-norm BERT into Megatron's flag.

    What the flag does: docs/megatron.md, "Block order".
    """
    from transformers.models.bert import BertConfig, BertModel

    theirs = noisy(BertModel(BertConfig(**SIZES, layer_norm_eps=1e-5)), seed=3)
    config = random_models.config(
        random_models.BERT,
        apply_residual_connection_post_layernorm=True,
        lm_head=False,
        binary_head=False,
    )
    shifted = {
        r"bert\.encoder\.layer\.(\d+)\.attention\.output\.LayerNorm": (
            r"encoder.layers.\1.pre_mlp_layernorm"
        ),
        r"bert\.embeddings\.LayerNorm": "encoder.layers.0.input_layernorm",
        r"bert\.encoder\.layer\.0\.output\.LayerNorm": "encoder.layers.1.input_layernorm",
        r"bert\.encoder\.layer\.1\.output\.LayerNorm": "encoder.final_layernorm",
    }
    wrapper = nn.ModuleDict({"bert": theirs})
    weights = renamed(wrapper, BERT_NAMES | shifted, config)
    tokens, mask, types = bert_inputs()

    expected = theirs(tokens, attention_mask=mask, token_type_ids=types)
    model = on_one_rank(config, weights)
    states = model(tokens, mask, types)

    real = mask.bool()
    torch.testing.assert_close(states[real], expected.last_hidden_state[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.pooler(states), expected.pooler_output, rtol=0, atol=1e-5)
    usual = dataclasses.replace(config, apply_residual_connection_post_layernorm=False)
    assert (on_one_rank(usual, weights)(tokens, mask, types) - states)[real].abs().max() > 0.1
