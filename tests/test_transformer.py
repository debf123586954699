"""The math of the models against other people's code: transformers' models, layers and rotary tables."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import random_models
import torch
from torch import Tensor, nn

from mlm_eval.bert import BERT
from mlm_eval.checkpoints.config import ModelConfig, RopeScaling
from mlm_eval.engine import load_model
from mlm_eval.gpt import GPT
from mlm_eval.tensor_parallel import SINGLE
from mlm_eval.transformer import Norm, activate, rotary_tables, rotate

HEADS, GROUPS, CHANNELS, POSITIONS, VOCAB = 4, 2, 8, 16, 50


def ours(config: ModelConfig, weights: dict[str, Tensor]) -> Any:
    """Return our model on one rank, all of its weights given, none left over."""
    model = load_model(
        random_models.checkpoint(config, weights),
        SINGLE,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    return model.eval().requires_grad_(False)


def all_log_probs(model: GPT | BERT, states: Tensor) -> Tensor:
    """Return `[batch, seq, vocab]`, every entry asked for as a target of its own."""
    vocab = model.config.vocab_size
    rows = states.flatten(0, -2).repeat_interleave(vocab, dim=0)
    targets = torch.arange(vocab).repeat(len(rows) // vocab)
    return model.log_probs(rows, targets)[0].view(*states.shape[:-1], vocab)


# --- Whole models: a transformers model with noise for weights, and its weights by our names ----


def noisy(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a model with noise: biases and gains too, which its own initialisation leaves at 0 and 1."""
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
    """Return queries, keys and values as each group's heads in turn: its queries, its key, its value."""
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
    "nemotron, centred gains, squared relu": nemotron_pair,
    "gpt-neox, partial rotary": neox_pair,
    "persimmon, layer norm of queries and keys": persimmon_pair,
}


@pytest.mark.parametrize("pair", PAIRS)
def test_gpt_models_agree_with_transformers(pair):
    theirs, config, names = PAIRS[pair]()
    noisy(theirs)
    model = ours(config, renamed(theirs, names, config))
    tokens = torch.randint(VOCAB, (3, POSITIONS), generator=torch.Generator().manual_seed(1))

    expected = theirs(tokens).logits.log_softmax(-1)  # [B, T, V]
    actual = all_log_probs(model, model(tokens))

    assert expected.std() > 0.5, "the weights are too tame to tell anything"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def bert_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, padding mask and token types; the second line is padded after 9 tokens."""
    noise = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (2, POSITIONS), generator=noise)
    types = torch.randint(2, (2, POSITIONS), generator=noise)
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    return tokens, mask, types


def test_bert_agrees_with_transformers_megatron_bert():
    from transformers.models.megatron_bert import MegatronBertConfig, MegatronBertForPreTraining

    theirs = noisy(
        MegatronBertForPreTraining(MegatronBertConfig(**SIZES, layer_norm_eps=1e-5)), seed=2
    )
    config = random_models.BERT
    model = ours(config, renamed(theirs, BERT_NAMES, config))
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
    """Norms shifted by one place turn Google's post-norm BERT into Megatron's flag (facts E.1)."""
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
    model = ours(config, weights)
    states = model(tokens, mask, types)

    real = mask.bool()
    torch.testing.assert_close(states[real], expected.last_hidden_state[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.pooler(states), expected.pooler_output, rtol=0, atol=1e-5)
    usual = dataclasses.replace(config, apply_residual_connection_post_layernorm=False)
    assert (ours(usual, weights)(tokens, mask, types) - states)[real].abs().max() > 0.1


# --- The parts ----------------------------------------------------------------------------------


VARIANTS = {
    "gpt": gpt(),
    "gpt, residual after the norm": gpt(apply_residual_connection_post_layernorm=True),
    "llama": llama(),
    "llama, partial and interleaved": llama(rotary_percent=0.5, rotary_interleaved=True),
    "llama, norms of queries and keys": llama(qk_layernorm=True),
    "positions of both kinds": gpt(position_embedding_type="learned_absolute+rope"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("query_from", [1, 7, POSITIONS - 1])
def test_the_last_layer_can_compute_the_last_rows_only(variant, query_from):
    config = VARIANTS[variant]
    model = ours(config, random_models.state_dict(config))
    tokens = torch.randint(VOCAB, (3, POSITIONS), generator=torch.Generator().manual_seed(4))
    whole = model(tokens)
    assert whole.shape == (3, POSITIONS, config.hidden_size)
    trimmed = model(tokens, query_from)
    torch.testing.assert_close(trimmed, whole[:, query_from:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_position_sees_a_later_one(variant):
    config = VARIANTS[variant]
    model = ours(config, random_models.state_dict(config))
    tokens = torch.randint(VOCAB, (1, POSITIONS), generator=torch.Generator().manual_seed(5))
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-6)
    assert (before[:, 10:] - after[:, 10:]).abs().amax(dim=(0, 2)).min() > 1e-2
    # A shorter input is the same as one padded on the right.
    torch.testing.assert_close(model(tokens[:, :10]), before[:, :10], rtol=0, atol=1e-5)


def test_rotary_tables_are_those_of_transformers():
    from transformers.models.llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    length = 64
    base = {**GROUPED, "head_dim": 16, "max_position_embeddings": length}
    for theirs, changes in [
        ({"rope_type": "default"}, {}),
        ({"rope_type": "linear", "factor": 2.5}, {"rotary_seq_len_interpolation_factor": 2.5}),
        (
            {"rope_type": "llama3", "original_max_position_embeddings": 32, **LLAMA3},
            {"rope_scaling": SCALED},
        ),
    ]:
        rope = {"rope_theta": 20000.0, **theirs}
        embedding = LlamaRotaryEmbedding(LlamaConfig(**base, rope_parameters=rope))
        expected = embedding(torch.zeros(1), torch.arange(length).unsqueeze(0))
        actual = rotary_tables(
            llama(kv_channels=16, rotary_base=20000.0, **changes), length, torch.device("cpu")
        )
        for table, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(table, wanted[0], rtol=0, atol=2e-6)


def test_llama3_scaling_reaches_all_three_of_its_ranges():
    """The pair above has frequencies that are kept, blended and divided, so that each is shown."""
    plain = llama(kv_channels=16, rotary_base=20000.0)
    scaled = dataclasses.replace(plain, rope_scaling=SCALED)
    exponents = torch.arange(0, 16, 2) / 16
    wavelengths = 2 * math.pi * 20000.0**exponents
    low, high = 32 / 1.0, 32 / 4.0
    ranges = [(wavelengths < high).sum(), (wavelengths > low).sum()]
    assert ranges[0] >= 1 and ranges[1] >= 1 and sum(ranges) < len(wavelengths)
    angle = [torch.acos(rotary_tables(c, 2, torch.device("cpu"))[0][1]) for c in (plain, scaled)]
    ratio = (angle[0] / angle[1])[: len(wavelengths)]
    kept, divided = wavelengths < high, wavelengths > low
    torch.testing.assert_close(ratio[kept], torch.ones(int(kept.sum())), rtol=1e-3, atol=0)
    torch.testing.assert_close(ratio[divided][:1], torch.full((1,), 8.0), rtol=1e-2, atol=0)
    assert 1 < ratio[~kept & ~divided].min() and ratio[~kept & ~divided].max() < 8


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [1.0, 0.5, 0.25])
def test_rotation_turns_each_pair_by_its_angle(interleaved, percent):
    """Each pair of channels is a complex number times e^(i position / base^(2j/d)) (facts D.5)."""
    config = llama(kv_channels=16, rotary_percent=percent, rotary_interleaved=interleaved)
    x = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(6))  # [B, heads, T, d]
    cos, sin = rotary_tables(config, 12, torch.device("cpu"))
    actual = rotate(x, cos, sin, interleaved=interleaved)

    rotated = int(16 * percent)
    order = torch.arange(rotated)
    if not interleaved:  # pairs (i, i + d/2)
        order = order.view(2, -1).t().flatten()
    pairs = torch.view_as_complex(x[..., order].double().unflatten(-1, (-1, 2)).contiguous())
    speed = 10000.0 ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    angles = torch.arange(12, dtype=torch.float64).unsqueeze(1) * speed
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    expected = x.clone()
    expected[..., order] = turned.float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_interleaved_rotation_is_gpt_js():
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    config = llama(kv_channels=8, rotary_interleaved=True)
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(7))
    cos, sin = rotary_tables(config, 5, torch.device("cpu"))
    half = [table[:, ::2].unsqueeze(0).expand(2, -1, -1) for table in (sin, cos)]
    expected = apply_rotary_pos_emb(x.transpose(1, 2), *half).transpose(1, 2)
    actual = rotate(x, cos, sin, interleaved=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norms_are_torchs(kind, centred):
    config = gpt(normalization=kind, layernorm_zero_centered_gamma=centred, layernorm_epsilon=1e-3)
    noise = torch.Generator().manual_seed(8)
    norm = Norm(config, 32, bias=kind == "LayerNorm")
    gain, bias, x = (torch.randn(32, generator=noise) for _ in range(3))
    with torch.no_grad():
        norm.weight.copy_(gain)
        if norm.bias is not None:
            norm.bias.copy_(bias)
    x = x.expand(4, 32) * torch.tensor([1e-3, 0.1, 1.0, 100.0]).unsqueeze(1)  # epsilon counts
    stored = gain + 1 if centred else gain
    if kind == "LayerNorm":
        expected = nn.functional.layer_norm(x, (32,), stored, bias, 1e-3)
    else:
        expected = nn.functional.rms_norm(x, (32,), stored, 1e-3)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)


def test_rms_statistics_are_float32_whatever_the_states_are():
    norm = Norm(llama(), 32, bias=False).to(torch.float16)
    nn.init.ones_(norm.weight)
    x = torch.full((1, 32), 300.0, dtype=torch.float16)  # its square is beyond float16
    torch.testing.assert_close(norm(x), torch.ones(1, 32, dtype=torch.float16), rtol=0, atol=1e-3)


def test_activations_are_their_formulas():
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    erf = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    tanh = x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    assert (erf - tanh).abs().max() > 1e-4  # they can be told apart
    for kind, expected in [("gelu", erf), ("gelu_tanh", tanh), ("squared_relu", x.clamp(0) ** 2)]:
        torch.testing.assert_close(activate(x, kind), expected, rtol=0, atol=1e-12)
    gate, up = x, x.flip(0) + 1
    expected = gate / (1 + torch.exp(-gate)) * up
    actual = activate(torch.cat([gate, up]), "swiglu")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_megatrons_head_keeps_its_gelu_when_the_mlp_has_the_other():
    """BERT's LM head is erf even where the MLP is fused tanh (facts E.5)."""
    weights = random_models.state_dict(random_models.BERT)
    tokens, mask, types = bert_inputs()
    by_head = {}
    for head in ("gelu", "gelu_tanh"):
        config = random_models.config(
            random_models.BERT, activation="gelu_tanh", head_activation=head
        )
        model = ours(config, weights)
        states = model(tokens, mask, types)
        by_head[head] = all_log_probs(model, states)
    difference = (by_head["gelu"] - by_head["gelu_tanh"]).abs().max()
    assert 1e-4 < difference < 1e-1


def test_heads_of_fine_tuned_models_read_the_pooled_state():
    config = random_models.config(
        random_models.BERT, lm_head=False, binary_head=False, num_classes=3, multichoice_head=True
    )
    weights = random_models.state_dict(config)
    model = ours(config, weights)
    tokens, mask, types = bert_inputs()
    states = model(tokens, mask, types)
    pooled = torch.tanh(
        states[:, 0] @ weights["pooler.dense.weight"].t() + weights["pooler.dense.bias"]
    )
    heads = model.head_logits(states)
    assert set(heads) == {"classification_head", "multichoice_head"}
    for name, logits in heads.items():
        expected = pooled @ weights[f"{name}.weight"].t() + weights[f"{name}.bias"]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
