"""What is written loads in plain transformers and computes the same; the rest is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support import random_models
from support.huggingface_models import BERT, BERT_MODELS, GPT_MODELS, gpt_model, theirs
from support.rounding import assert_same_but_for_rounding
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig, RopeScaling, YarnScaling
from mlm_eval.checkpoints.convert import Conversion, convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safetensors_file import PIECE_BYTES, write_safetensors
from mlm_eval.checkpoints.huggingface.read import read_folder
from mlm_eval.checkpoints.lazy import InMemory
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import find_tokenizer, load_tokenizer
from mlm_eval.engine.engine import Engine

LAYER_NORM_ROPE: dict[str, Any] = {"position_embedding_type": "rope", "rotary_percent": 0.5}
BLOOM: dict[str, Any] = {
    "position_embedding_type": "alibi",
    "embedding_layernorm": True,
    "activation": "gelu_tanh",
    "ffn_hidden_size": 4 * random_models.GPT.hidden_size,
}


def hf_config(report: Conversion) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((report.path / "config.json").read_text())
    return config


def load_theirs(report: Conversion) -> Any:
    """Return the model that plain transformers loads; every weight must come from the folder."""
    import transformers

    [class_name] = hf_config(report)["architectures"]
    model_class = getattr(transformers, class_name)
    model, loading = model_class.from_pretrained(
        report.path, output_loading_info=True, dtype=torch.float32
    )
    assert not any(loading.values()), loading
    return model.eval()


def our_logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    model: Any = Engine.load(checkpoint, dtype="float32").model
    with torch.inference_mode():
        states = model(ids)
        return model.output_layer.logits(states.flatten(0, 1)).view(*states.shape[:-1], -1)


def bit_equal(one: Checkpoint, other: Checkpoint) -> bool:
    return set(one.tensors) == set(other.tensors) and all(
        one.tensors[name].dtype == other.tensors[name].dtype
        and torch.equal(one.tensors[name].read(), other.tensors[name].read())
        for name in one.tensors
    )


def variant(base: ModelConfig, **changes: Any) -> ModelConfig:
    return dataclasses.replace(base, **changes)


GPT, LLAMA = random_models.GPT, random_models.LLAMA
WINDOW: dict[str, Any] = {"window_size": 5, "window_layers": (0,)}
ON_INPUT: dict[str, Any] = {
    "num_experts": 4,
    "moe_layers": (0, 1),
    "moe_router_topk": 1,
    "moe_router_score_function": "sigmoid",
    "moe_ffn_hidden_size": 24,
    "moe_apply_probs_on_input": True,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "moe_layers": (0, 1),
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "softmax_type": "learnable",
}
GEMMA = variant(
    LLAMA,
    activation="geglu_tanh",
    embedding_multiplier=LLAMA.hidden_size**0.5,
    layernorm_zero_centered_gamma=True,
)
VARIANTS: dict[str, tuple[ModelConfig, str]] = {
    "gpt2": (variant(GPT, activation="gelu_tanh"), "GPT2LMHeadModel"),
    "gpt2-untied": (variant(GPT, untie_embeddings_and_output_weights=True), "GPT2LMHeadModel"),
    "gpt2-squared-relu": (variant(GPT, activation="squared_relu"), "GPT2LMHeadModel"),
    "gpt2-no-bias": (variant(GPT, add_bias_linear=False, add_qkv_bias=False), "GPT2LMHeadModel"),
    "gpt2-no-positions": (variant(GPT, position_embedding_type="none"), "GPT2LMHeadModel"),
    "gpt2-unused-rotary": (
        variant(GPT, rotary_base=500, rotary_percent=0.5, rotary_interleaved=True),
        "GPT2LMHeadModel",
    ),
    "gpt2-1p": (variant(GPT, layernorm_zero_centered_gamma=True), "GPT2LMHeadModel"),
    "llama": (LLAMA, "LlamaForCausalLM"),
    "llama-tied": (variant(LLAMA, untie_embeddings_and_output_weights=False), "LlamaForCausalLM"),
    "llama-biases": (variant(LLAMA, add_bias_linear=True, add_qkv_bias=True), "LlamaForCausalLM"),
    "llama-1p": (variant(LLAMA, layernorm_zero_centered_gamma=True), "LlamaForCausalLM"),
    "llama-interleaved": (variant(LLAMA, rotary_interleaved=True), "LlamaForCausalLM"),
    "llama-wide-heads": (variant(LLAMA, kv_channels=12), "LlamaForCausalLM"),
    "llama-linear": (variant(LLAMA, rotary_seq_len_interpolation_factor=2), "LlamaForCausalLM"),
    "llama3": (
        variant(LLAMA, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 8), rotary_base=500),
        "LlamaForCausalLM",
    ),
    "llama-yarn": (
        variant(LLAMA, yarn=YarnScaling(4.0, 8, 4.0, 0.5, round_range=False), rotary_base=500),
        "LlamaForCausalLM",
    ),
    "llama-yarn-of-megatron": (
        variant(LLAMA, yarn=YarnScaling(4.0, 8, 4.0, 0.5, 0.7, 0.0), rotary_base=500),
        "LlamaForCausalLM",
    ),
    "mistral": (
        variant(LLAMA, window_size=5, window_layers=(0, 1)),
        "MistralForCausalLM",
    ),
    "qwen2-window": (
        variant(LLAMA, add_qkv_bias=True, window_size=5, window_layers=(1,)),
        "Qwen2ForCausalLM",
    ),
    "qwen2-window-of-megatron": (
        variant(LLAMA, window_size=5, window_layers=(0,)),
        "Qwen2ForCausalLM",
    ),
    "qwen3-window": (
        variant(LLAMA, qk_layernorm=True, window_size=5, window_layers=(0,)),
        "Qwen3ForCausalLM",
    ),
    "starcoder2-window": (
        variant(GPT, window_size=5, window_layers=(0, 1), position_embedding_type="rope"),
        "Starcoder2ForCausalLM",
    ),
    "geglu": (variant(LLAMA, activation="geglu_tanh"), "LlamaForCausalLM"),
    "quick-geglu": (variant(LLAMA, activation="quick_geglu"), "LlamaForCausalLM"),
    "gemma": (variant(GEMMA), "GemmaForCausalLM"),
    "gemma-plain-gains": (
        variant(GEMMA, layernorm_zero_centered_gamma=False, rotary_interleaved=True),
        "GemmaForCausalLM",
    ),
    "gemma2": (
        variant(
            GEMMA,
            branch_layernorm=True,
            window_size=5,
            window_layers=(1,),
            attn_logit_softcapping=3.0,
            final_logit_softcapping=30.0,
            softmax_scale=9**-0.5,
        ),
        "Gemma2ForCausalLM",
    ),
    "gemma2-no-windows": (variant(GEMMA, branch_layernorm=True), "Gemma2ForCausalLM"),
    "gemma3": (
        variant(
            GEMMA,
            branch_layernorm=True,
            qk_layernorm=True,
            window_size=5,
            window_layers=(1,),
            rotary_base=900.0,
            rotary_base_local=50.0,
            rotary_seq_len_interpolation_factor=8.0,
            final_logit_softcapping=3.0,
        ),
        "Gemma3ForCausalLM",
    ),
    "gpt-oss": (
        variant(
            LLAMA,
            add_bias_linear=True,
            add_qkv_bias=True,
            num_experts=4,
            moe_layers=(0, 1),
            moe_router_topk=2,
            moe_ffn_hidden_size=LLAMA.ffn_hidden_size,
            moe_router_bias=True,
            softmax_type="learnable",
            activation="quick_geglu",
            activation_func_clamp_value=0.7,
            glu_linear_offset=1.0,
            yarn=YarnScaling(4.0, 8, round_range=False),
            **WINDOW,
        ),
        "GptOssForCausalLM",
    ),
    "llama4": (
        variant(
            LLAMA,
            num_experts=4,
            moe_layers=(1,),
            moe_router_topk=1,
            moe_router_score_function="sigmoid",
            moe_apply_probs_on_input=True,
            moe_ffn_hidden_size=24,
            moe_shared_expert_intermediate_size=24,
            qk_l2_norm=True,
            no_rope_layers=(0,),
            no_l2_norm_layers=(0,),
            rope_scaling=RopeScaling(4.0, 1.0, 4.0, 8),
        ),
        "Llama4ForCausalLM",
    ),
    "qwen2": (variant(LLAMA, add_qkv_bias=True), "Qwen2ForCausalLM"),
    "qwen3": (variant(LLAMA, qk_layernorm=True), "Qwen3ForCausalLM"),
    "qwen3-1p-interleaved": (
        variant(
            LLAMA, qk_layernorm=True, rotary_interleaved=True, layernorm_zero_centered_gamma=True
        ),
        "Qwen3ForCausalLM",
    ),
    "stablelm": (
        variant(LLAMA, normalization="LayerNorm", **LAYER_NORM_ROPE),
        "StableLmForCausalLM",
    ),
    "stablelm-qkv-bias-1p": (
        variant(
            LLAMA, normalization="LayerNorm", add_qkv_bias=True, layernorm_zero_centered_gamma=True
        ),
        "StableLmForCausalLM",
    ),
    "neox-parallel": (
        variant(GPT, parallel_residual=True, **LAYER_NORM_ROPE),
        "GPTNeoXForCausalLM",
    ),
    "neox-parallel-interleaved-1p": (
        variant(
            GPT,
            parallel_residual=True,
            rotary_interleaved=True,
            layernorm_zero_centered_gamma=True,
            add_bias_linear=False,
            untie_embeddings_and_output_weights=True,
            **LAYER_NORM_ROPE,
        ),
        "GPTNeoXForCausalLM",
    ),
    "bloom": (variant(GPT, **BLOOM), "BloomForCausalLM"),
    "bloom-1p": (
        variant(
            GPT,
            layernorm_zero_centered_gamma=True,
            add_bias_linear=False,
            add_qkv_bias=False,
            untie_embeddings_and_output_weights=True,
            **BLOOM,
        ),
        "BloomForCausalLM",
    ),
    "bloom-post-layernorm": (
        variant(GPT, apply_residual_connection_post_layernorm=True, **BLOOM),
        "BloomForCausalLM",
    ),
    "neox": (variant(GPT, activation="gelu_tanh", **LAYER_NORM_ROPE), "GPTNeoXForCausalLM"),
    "neox-no-bias-interleaved": (
        variant(
            GPT,
            add_bias_linear=False,
            add_qkv_bias=False,
            rotary_interleaved=True,
            **LAYER_NORM_ROPE,
        ),
        "GPTNeoXForCausalLM",
    ),
    "starcoder2": (
        variant(GPT, num_query_groups=2, position_embedding_type="rope"),
        "Starcoder2ForCausalLM",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_written_model_computes_the_same_in_transformers(name: str, tmp_path: Path) -> None:
    config, model_class = VARIANTS[name]
    checkpoint = random_models.checkpoint(config)
    report = convert(checkpoint, "hf", tmp_path / "out", vocab="padded")
    assert hf_config(report)["architectures"] == [model_class]
    assert not report.approximations
    ids = torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(5))
    ours, expected = our_logits(checkpoint, ids), load_theirs(report)(ids).logits
    assert ours.std() > 0.5
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    # A fold changes the form, and only a fold does.
    back = read_folder(tmp_path / "out")
    assert bit_equal(back, checkpoint) == (not report.notes)
    torch.testing.assert_close(our_logits(back, ids), ours, rtol=0, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", [*GPT_MODELS, *BERT_MODELS])
def test_transformers_own_files_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    """Hugging Face -> canonical -> Hugging Face: the same names and the same bits."""
    if name in GPT_MODELS:
        model = gpt_model(name)
    else:
        model = theirs(name, BERT | ({"num_labels": 3} if "Sequence" in name else {}))
    model.save_pretrained(tmp_path / "theirs")
    report = convert(open_checkpoint(tmp_path / "theirs"), "hf", tmp_path / "ours")
    their_config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert name == "mistral" or hf_config(report)["architectures"] == their_config["architectures"]
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    if name in (
        "llama-attention-bias",
        "neox-half",
        "gpt-oss-plain",
    ):  # read as models with all biases, some zero
        zeros = set(after) - set(before)
        assert zeros and not any(after.pop(key).any() for key in zeros)
    assert set(after) == set(before)
    halves = name == "deepseek-v3-halves"  # whose rotary channels become pairs side by side
    equal = {key for key in before if torch.equal(after[key], before[key])}
    changed = {key.split(".")[-2] for key in set(before) - equal}
    assert changed == {"q_b_proj", "kv_a_proj_with_mqa"} if halves else changed == set()
    load_theirs(report)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2-untied",
        "llama-gqa",
        "qwen2",
        "neox",
        "BertModel",
        "mistral-window",
        "gemma2",
        "gemma3-scaled",
        "gpt-oss",
        "llama4",
    ],
)
def test_through_two_megatron_ranks_and_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = gpt_model(name) if name in GPT_MODELS else theirs(name, BERT)
    model.save_pretrained(tmp_path / "theirs")
    source = open_checkpoint(tmp_path / "theirs")
    rows = source.config.vocab_size
    write_megatron_torch(source, tmp_path / "megatron", tp=2, true_vocab_size=rows)
    padded = open_checkpoint(tmp_path / "megatron")
    assert padded.provenance.tensor_parallel == 2 and padded.config.vocab_size > rows
    report = convert(padded, "hf", tmp_path / "ours", true_vocab_size=rows)
    assert f"{rows} remain" in report.notes[0]
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


ORACLES = [
    "v10_gpt_tp2",
    "v115_gpt_tp2",
    "v20_gpt_tp1_pp2",
    "v25_gpt_tp2_fp16",
    "v25_gpt_tp4_h8",
    "mcore016_gpt2_tp2_fusedgelu",
    "mcore016_llama_tp2",
    "v10_bert_tp2",
    "v10_bert_tp2_postlnres",
    "v25_bert_tp2",
    "v25_bertmc_tp2",
    "mcore016_bert_tp2",
]


def difference_from_golden(report: Conversion, golden: dict[str, Tensor]) -> float:
    """Return the largest difference of transformers' logits from Megatron's own, on real tokens."""
    model = load_theirs(report)
    ids = golden["tokens"]
    with torch.inference_mode():
        if "logits" in golden:
            return (model(ids).logits - golden["logits"]).abs().max().item()
        given = {
            "input_ids": ids,
            "attention_mask": golden["attention_mask"],
            "token_type_ids": golden["tokentype_ids"],
        }
        if "head_logits" in golden:  # two rows are the choices of one question
            output = model(**{key: value[None] for key, value in given.items()})
            return (output.logits - golden["head_logits"]).abs().max().item()
        output = model(**given)
        real = golden["attention_mask"].bool()
        language = (output.prediction_logits - golden["lm_logits"])[real].abs().max().item()
        sentence = (output.seq_relationship_logits - golden["nsp_logits"]).abs().max().item()
        return float(max(language, sentence))


@pytest.mark.parametrize("name", ORACLES)
def test_converted_oracles_give_megatrons_logits(name: str, oracles: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(oracles / name)
    golden = torch.load(oracles / name / "golden.pt", weights_only=True)
    report = convert(checkpoint, "hf", tmp_path / "out", vocab="padded")
    assert all(note.startswith("weights only") for note in report.notes)  # no change of form
    assert not report.approximations and not report.warnings
    assert difference_from_golden(report, golden) < 2e-4
    back = read_folder(tmp_path / "out")
    assert bit_equal(back, checkpoint)
    same = dataclasses.replace(
        back.config, hidden_dropout=checkpoint.config.hidden_dropout, head_activation="gelu"
    )
    assert same == dataclasses.replace(checkpoint.config, head_activation="gelu")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert checkpoint.provenance.digest in readme
    assert f"(from {checkpoint.provenance.config_sources['activation']})" in readme


def test_two_activations_in_a_bert_need_consent(oracles: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(oracles / "v25_bert_tp2_fusedgelu")
    golden = torch.load(oracles / "v25_bert_tp2_fusedgelu" / "golden.pt", weights_only=True)
    with pytest.raises(InputError, match="one activation .* --allow-approximate"):
        convert(checkpoint, "hf", tmp_path / "out", vocab="padded")
    assert not (tmp_path / "out").exists()
    report = convert(checkpoint, "hf", tmp_path / "out", vocab="padded", allow_approximate=True)
    assert 2e-4 < difference_from_golden(report, golden) < 3e-3
    assert "Approximations" in (tmp_path / "out" / "README.md").read_text()
    assert bit_equal(read_folder(tmp_path / "out"), checkpoint)


MODEL_BERT = random_models.BERT


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            variant(GPT, apply_residual_connection_post_layernorm=True),
            "no causal model .* this order",
        ),
        (variant(GPT, position_embedding_type="learned_absolute+rope"), "learned and rotary"),
        (variant(GPT, normalization="RMSNorm"), "learned positions and RMSNorm"),
        (variant(GPT, activation="swiglu"), "learned positions and swiglu"),
        (variant(GPT, num_query_groups=2), "grouped-query attention here cannot"),
        (variant(GPT, kv_channels=4), "4 heads of 4 and hidden size 32"),
        (variant(LLAMA, activation="gelu"), "RMSNorm and gelu"),
        (variant(LLAMA, rotary_percent=0.5), "rotates 50% of the channels"),
        (
            variant(LLAMA, qk_layernorm=True, add_bias_linear=True, add_qkv_bias=True),
            "QK norms and biases",
        ),
        (
            variant(LLAMA, normalization="LayerNorm", add_bias_linear=True, add_qkv_bias=True),
            "LayerNorm, swiglu and biases",
        ),
        (
            variant(LLAMA, rope_scaling=RopeScaling(), rotary_seq_len_interpolation_factor=2.0),
            "rotary_seq_len_interpolation_factor 2.0",
        ),
        (variant(LLAMA, rope_scaling=RopeScaling(), yarn=YarnScaling(4.0, 8)), "yarn YarnScal"),
        (variant(LLAMA, add_bias_linear=True, add_qkv_bias=True, **WINDOW), "window_size 5"),
        (
            variant(LLAMA, yarn=YarnScaling(4.0, 8), **WINDOW, rotary_base_local=9.0),
            "rotary_base_l",
        ),
        (variant(GPT, **WINDOW), "window_size 5"),
        (variant(LLAMA, attn_logit_softcapping=9.0), "attn_logit_softcapping 9.0"),
        (variant(LLAMA, logit_multiplier=2.0), "logit_multiplier 2.0"),
        (variant(GEMMA, embedding_multiplier=7.0), "embedding_multiplier 7.0"),
        (variant(GEMMA, final_logit_softcapping=7.0), "final_logit_softcapping 7.0"),
        (variant(GEMMA, branch_layernorm=True, softmax_scale=0.4), "softmax_scale 0.4"),
        (variant(GEMMA, add_bias_linear=True, add_qkv_bias=True), "linear_fc1.bias .* gemma has"),
        (
            variant(GEMMA, add_bias_linear=True, add_qkv_bias=True, branch_layernorm=True),
            "norms of its branches and biases",
        ),
        (variant(GEMMA, qk_layernorm=True), "scaled embeddings, QK norms and no norms of"),
        (variant(LLAMA, no_rope_layers=(0,)), r"no_rope_layers \(0,\)"),
        (variant(LLAMA, qk_l2_norm=True), "qk_l2_norm True"),
        (variant(LLAMA, **ON_INPUT), "moe_shared_expert_intermediate_size 0"),
        (variant(GPT, **ON_INPUT), "weighs its experts' inputs, with LayerNorm"),
        (variant(LLAMA, **EXPERTS), "experts, sinks and experts or routers without biases"),
        (variant(GPT, **EXPERTS), "experts, sinks and LayerNorm"),
        (variant(LLAMA, softmax_type="learnable"), "softmax_type 'learnable'"),
        (variant(LLAMA, activation_func_clamp_value=7.0), "activation_func_clamp_value 7.0"),
        (variant(MODEL_BERT, normalization="RMSNorm"), "BERT model with RMSNorm"),
        (variant(MODEL_BERT, activation="squared_relu"), "squared ReLU and the LM head the exact"),
        (variant(MODEL_BERT, num_classes=3), "ForSequenceClassification and ForPreTraining"),
        (variant(MODEL_BERT, pooler=False), "no pooler"),
    ],
)
def test_what_transformers_lacks_is_refused_by_name(
    config: ModelConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        convert(random_models.checkpoint(config), "hf", tmp_path / "out", allow_approximate=True)
    assert "--to megatron" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_bert_head_that_needs_no_pooler_leaves_it_out(tmp_path: Path) -> None:
    config = variant(MODEL_BERT, binary_head=False)
    report = convert(random_models.checkpoint(config), "hf", tmp_path / "out", vocab="padded")
    assert hf_config(report)["architectures"] == ["MegatronBertForMaskedLM"]
    assert "pooler" in report.notes[0]
    load_theirs(report)


def test_gains_of_half_precision_are_rounded_once(tmp_path: Path) -> None:
    config = variant(GPT, layernorm_zero_centered_gamma=True)
    weights = {key: value.half() for key, value in random_models.state_dict(config).items()}
    checkpoint = random_models.checkpoint(config, weights)
    kept = convert(checkpoint, "hf", tmp_path / "kept", vocab="padded")
    assert "rounded by up to" in kept.notes[0]
    wide = convert(checkpoint, "hf", tmp_path / "wide", vocab="padded", dtype="float32")
    assert "rounded" not in wide.notes[0]
    stored = load_file(tmp_path / "wide" / "model.safetensors")["transformer.h.1.ln_2.weight"]
    assert torch.equal(stored, weights["decoder.layers.1.pre_mlp_layernorm.weight"].float() + 1)


def test_dtypes_shards_and_index(tmp_path: Path) -> None:
    checkpoint = random_models.checkpoint(GPT)
    seen: list[tuple[int, int]] = []
    report = convert(
        checkpoint,
        "hf",
        tmp_path / "out",
        dtype="bfloat16",
        max_shard_size="10KB",
        vocab="padded",
        on_progress=lambda done, total: seen.append((done, total)),
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == len(set(index["weight_map"].values())) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    num_bytes = 2 * checkpoint.num_parameters
    assert seen[-1] == (num_bytes, num_bytes)
    expected = {"total_parameters": checkpoint.num_parameters, "total_size": num_bytes}
    assert index["metadata"] == expected
    for shard in shards:
        assert shard.stat().st_size < 10_000 + 2_000 or len(load_file(shard)) == 1
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    back = read_folder(tmp_path / "out")
    assert back.config.params_dtype == "bfloat16"
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(back.tensors[name].read(), tensor.read().bfloat16())
    assert load_theirs(report).dtype == torch.float32


def test_large_tensors_are_written_in_pieces(tmp_path: Path) -> None:
    """A tensor beyond the piece size, whose rows the pieces do not divide evenly."""
    rows = PIECE_BYTES // 4 // 1024 + 1003
    table = torch.arange(rows * 1024, dtype=torch.float32).view(rows, 1024)
    size = write_safetensors(tmp_path / "x.safetensors", {"a": InMemory(table)})
    assert size == (tmp_path / "x.safetensors").stat().st_size
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], table)


def test_values_too_large_for_the_dtype_stop_the_conversion(tmp_path: Path) -> None:
    weights = random_models.state_dict(GPT)
    weights["decoder.layers.1.mlp.linear_fc1.weight"][3, 4] = 1e6
    with pytest.raises(InputError, match="h.1.mlp.c_fc.weight has .* beyond .* float16"):
        convert(random_models.checkpoint(GPT, weights), "hf", tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_an_existing_target_stays(tmp_path: Path) -> None:
    checkpoint = random_models.checkpoint(GPT)
    convert(checkpoint, "hf", tmp_path / "out", vocab="padded")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    other = random_models.checkpoint(GPT, seed=1)
    with pytest.raises(InputError, match="already exists"):
        convert(other, "hf", tmp_path / "out", vocab="padded")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    convert(other, "hf", tmp_path / "out", vocab="padded", overwrite=True)
    assert bit_equal(read_folder(tmp_path / "out"), other)
    with pytest.raises(InputError, match="is being converted"):
        convert(read_folder(tmp_path / "out"), "hf", tmp_path / "out", overwrite=True)
    assert bit_equal(read_folder(tmp_path / "out"), other)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_killed_conversion_leaves_no_target(tmp_path: Path) -> None:
    """The process dies by SIGKILL when half of the bytes are written."""
    convert(random_models.checkpoint(GPT), "hf", tmp_path / "in", vocab="padded")
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mlm_eval.checkpoints.huggingface.read import read_folder\n"
        "from mlm_eval.checkpoints.convert import convert\n"
        "kill = lambda done, total: done * 2 > total and os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(read_folder(Path(sys.argv[1])), 'hf', sys.argv[2], on_progress=kill)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()


# Tokenizers -------------------------------------------------------------------------------------

TEXT = "The cat sat on the mat. Café, naïve: 3,000 cats!\n\n  Two  spaces"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE in GPT-2's form: all bytes, a few merges, the end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("bpe")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    backend.model.save(str(folder))
    return folder


def bert_vocabulary(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    letters = [chr(code) for code in range(33, 127)] + ["é", "ï"]
    words = ["The", "the", "cat", "sat", "on", "mat", "##s", "Two", "two"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters]
    pieces += [f"##{letter}" for letter in letters]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n", encoding="utf-8")
    return folder


def test_gpt2_tokenizer_files_load_in_transformers(byte_level: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(directory=byte_level)
    config = variant(GPT, vocab_size=ours.vocab_size + 30)
    checkpoint = random_models.checkpoint(config)
    report = convert(checkpoint, "hf", tmp_path / "out", tokenizer=ours)
    assert hf_config(report)["vocab_size"] == ours.vocab_size
    assert f"30 rows that pad the vocabulary are left out: {ours.vocab_size} remain" in report.notes
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == ours.vocab_size
    assert tokenizer(TEXT)["input_ids"] == ours.encode(TEXT)
    assert tokenizer.decode(ours.encode(TEXT)) == TEXT
    # Token types would be embedded by GPT-2 without a word.
    assert set(tokenizer(TEXT)) == {"input_ids", "attention_mask"}
    assert tokenizer.eos_token_id == ours.eot_id
    model = load_theirs(report)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == ours.eot_id
    assert model.config.pad_token_id is None
    table = checkpoint.tensors["embedding.word_embeddings.weight"].read(
        0, slice(0, ours.vocab_size)
    )
    assert torch.equal(model.transformer.wte.weight, table)
    again = find_tokenizer(tmp_path / "out")
    assert again is not None and again.encode(TEXT) == ours.encode(TEXT)
    # The folder is a source of a tokenizer itself.
    second = convert(checkpoint, "hf", tmp_path / "second", tokenizer=again)
    assert hf_config(second)["vocab_size"] == ours.vocab_size
    assert AutoTokenizer.from_pretrained(tmp_path / "second")(TEXT)["input_ids"] == ours.encode(
        TEXT
    )
    model = load_theirs(second)
    assert model.config.bos_token_id == ours.eot_id


def test_a_llama_with_a_gpt2_tokenizer(byte_level: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(directory=byte_level)
    checkpoint = random_models.checkpoint(variant(LLAMA, vocab_size=ours.vocab_size))
    report = convert(checkpoint, "hf", tmp_path / "out", tokenizer=ours)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT)["input_ids"] == ours.encode(TEXT)
    load_theirs(report)(**tokenizer("The cat", return_tensors="pt"))


@pytest.mark.parametrize("capitals", [False, True])
@pytest.mark.parametrize("stated", [None, False, True])
@pytest.mark.parametrize(
    "name", ["x/vocab.txt", "x/bert-lower-vocab.txt", "uncased/vocab.txt", "x/bert-cased-vocab.txt"]
)
def test_a_converted_bert_vocabulary_gives_the_ids_that_are_scored(
    name: str, stated: bool | None, capitals: bool, tmp_path: Path
) -> None:
    """Whether text is lower-cased is stated, or the pieces decide; names of files say nothing."""
    from transformers import AutoTokenizer

    vocabulary = tmp_path / name
    pieces = (bert_vocabulary(vocabulary.parent) / "vocab.txt").read_text(encoding="utf-8")
    (vocabulary.parent / "vocab.txt").unlink()
    lower = dict.fromkeys(piece for piece in pieces.splitlines() if piece.islower() or "[" in piece)
    vocabulary.write_text(pieces if capitals else "\n".join(lower) + "\n", encoding="utf-8")
    if stated is not None:
        config = json.dumps({"do_lower_case": stated})
        (vocabulary.parent / "tokenizer_config.json").write_text(config)
    expected = stated if stated is not None else not capitals
    scored = load_tokenizer(directory=vocabulary.parent)
    assert scored.lower_case is expected
    checkpoint = random_models.checkpoint(variant(MODEL_BERT, vocab_size=scored.vocab_size + 6))
    for place, source in (("by object", scored), ("by file", vocabulary)):
        convert(checkpoint, "hf", tmp_path / place, tokenizer=source)
        written = AutoTokenizer.from_pretrained(tmp_path / place)
        ids = written(TEXT, add_special_tokens=False)["input_ids"]
        assert ids == scored.encode(TEXT)
        assert (ids == written(TEXT.lower(), add_special_tokens=False)["input_ids"]) is expected


@pytest.mark.parametrize("lower_case", [True, False])
def test_bert_tokenizer_files_load_in_transformers(lower_case: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocabulary = bert_vocabulary(tmp_path / "x") / "vocab.txt"
    config = json.dumps({"do_lower_case": lower_case})
    vocabulary.with_name("tokenizer_config.json").write_text(config)
    ours = load_tokenizer(vocab_file=vocabulary)
    assert ours.lower_case == lower_case
    checkpoint = random_models.checkpoint(variant(MODEL_BERT, vocab_size=ours.vocab_size + 6))
    report = convert(checkpoint, "hf", tmp_path / "out", tokenizer=ours)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ours.encode(TEXT)
    pair = tokenizer("the cat", "sat on")
    pieces = ["[CLS]", "the", "cat", "[SEP]", "sat", "on", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == pieces
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.mask_token_id == ours.mask_id
    model = load_theirs(report)
    assert model.config.vocab_size == ours.vocab_size
    assert model.config.pad_token_id == ours.piece_id("[PAD]")
    output = model(**tokenizer("the cat", "sat on", return_tensors="pt"))
    assert output.prediction_logits.shape == (1, 7, ours.vocab_size)


def test_the_size_of_the_vocabulary(byte_level: Path, tmp_path: Path) -> None:
    checkpoint = random_models.checkpoint(GPT)  # 50 rows
    kept = convert(checkpoint, "hf", tmp_path / "kept")
    assert hf_config(kept)["vocab_size"] == 50 and "no tokenizer says" in kept.warnings[0]
    cut = convert(checkpoint, "hf", tmp_path / "cut", true_vocab_size=47)
    assert hf_config(cut)["vocab_size"] == 47 and not cut.warnings
    table = load_file(tmp_path / "cut" / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(table, checkpoint.tensors["embedding.word_embeddings.weight"].read()[:47])
    for size in ({"true_vocab_size": 51}, {"tokenizer": load_tokenizer(directory=byte_level)}):
        with pytest.raises(InputError, match="not the tokenizer of this model"):
            convert(checkpoint, "hf", tmp_path / "no", **size)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds no tokenizer"):
        convert(checkpoint, "hf", tmp_path / "no", tokenizer=tmp_path / "cut")


@pytest.mark.realdata
def test_the_real_gpt2_vocabulary(shared_data: Path, oracles: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(oracles / "v25_gpt2vocab_tp2_trained")
    ours = load_tokenizer(directory=shared_data / "gpt2")
    report = convert(checkpoint, "hf", tmp_path / "out", tokenizer=ours)
    assert hf_config(report)["vocab_size"] == 50257
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == 50256
    golden = torch.load(oracles / "v25_gpt2vocab_tp2_trained" / "golden.pt", weights_only=True)
    with torch.inference_mode():
        logits = load_theirs(report)(golden["tokens"]).logits[:, golden["logits_positions"]]
    expected = golden["logits"][..., :50257]
    assert_same_but_for_rounding(logits, expected, ulp=256)
