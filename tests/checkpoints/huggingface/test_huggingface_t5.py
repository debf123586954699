"""T5 in Hugging Face folders, both ways: bit-equal there and back; plain transformers agrees."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file, save_file
from support import configs, random_models
from support.huggingface_models import randomize
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import InMemory
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.engine.plain_transformers import transformers_outputs
from mlm_eval.engine.verify import outputs, verify_conversion
from mlm_eval.model.t5 import relative_buckets

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 24,
    "d_ff": 40,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
KINDS: dict[str, dict[str, Any]] = {
    "original": {"d_kv": 16},
    "v1.1": {"d_kv": 16, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "heads of 8": {"d_kv": 8, "feed_forward_proj": "gated-silu"},
    "mt5": {"d_kv": 16},
}

# What transformers' T5 has: the others of `configs.T5` differ.
PLAIN = dataclasses.replace(
    configs.T5,
    kv_channels=16,
    normalization="RMSNorm",
    add_bias_linear=False,
    add_qkv_bias=False,
)


def saved(kind: str, folder: Path) -> Path:
    """Return a folder that transformers wrote, with an output table of its own for T5 v1.1."""
    import transformers

    name = "MT5" if kind == "mt5" else "T5"
    config = getattr(transformers, f"{name}Config")(**SIZES, **KINDS[kind])
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    randomize(model, seed=7)
    if kind in ("v1.1", "mt5"):
        noise = torch.Generator().manual_seed(8)
        model.lm_head.weight = torch.nn.Parameter(torch.randn(40, 24, generator=noise))
    model.save_pretrained(folder)
    return folder


def inputs(config: ModelConfig) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(3)
    encoder = torch.randint(config.vocab_size, (2, 30), generator=noise)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, 21:] = 0
    mask[0, 5] = 0
    tokens = torch.randint(config.vocab_size, (2, 26), generator=noise)
    return {"encoder_tokens": encoder, "encoder_mask": mask, "tokens": tokens}


def same_tensors(one: Checkpoint, other: Checkpoint) -> bool:
    return set(one.tensors) == set(other.tensors) and all(
        torch.equal(tensor.read(), other.tensors[name].read())
        for name, tensor in one.tensors.items()
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_wrote_is_computed_and_written_bit_for_bit(kind: str, tmp_path: Path):
    folder = saved(kind, tmp_path / "theirs")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.provenance.warnings == []
    assert checkpoint.config.softmax_scale == (1.0 if kind == "heads of 8" else None)
    probe = inputs(checkpoint.config)
    expected = transformers_outputs(folder, probe)["logits"]
    assert (outputs(checkpoint, probe)["logits"] - expected).abs().max() < 1e-4
    convert(checkpoint, "hf", tmp_path / "ours")
    files = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    assert torch.equal(transformers_outputs(tmp_path / "ours", probe)["logits"], expected)
    again = open_checkpoint(tmp_path / "ours")
    assert again.config == checkpoint.config and same_tensors(again, checkpoint)
    convert(checkpoint, "megatron", tmp_path / "megatron", tp=2)
    convert(open_checkpoint(tmp_path / "megatron"), "hf", tmp_path / "again")
    file = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(tensor, file[name]) for name, tensor in files[0].items())


def of_megatron(config: ModelConfig, *, bias: float = 0.0) -> Checkpoint:
    weights = random_models.state_dict(config)
    if "output_layer.bias" in weights:
        weights["output_layer.bias"] *= bias
    return random_models.checkpoint(config, weights)


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"untie_embeddings_and_output_weights": True, "activation": "geglu_tanh"},
        {"layernorm_zero_centered_gamma": True, "kv_channels": 8, "activation": "gelu_tanh"},
    ],
)
def test_megatrons_t5_becomes_one_of_transformers(changes: dict[str, Any], tmp_path: Path):
    checkpoint = of_megatron(dataclasses.replace(PLAIN, **changes))
    if changes.get("kv_channels") == 8:  # the queries are rounded: other weights, once in one form
        done = convert(checkpoint, "hf", tmp_path / "out", verify=True, compare=verify_conversion)
        assert done.comparison is not None and done.comparison.as_allowed
        assert "rounded to their dtype" in "".join(done.notes)
        return
    assert convert(checkpoint, "hf", tmp_path / "out").approximations == []
    probe = inputs(checkpoint.config)
    found = transformers_outputs(tmp_path / "out", probe)["logits"]
    assert (outputs(checkpoint, probe)["logits"] - found).abs().max() < 1e-4
    assert same_tensors(open_checkpoint(tmp_path / "out"), checkpoint)  # times 1/4 and 4


@pytest.mark.long
@pytest.mark.process
def test_an_output_bias_is_left_out_by_request_only(tmp_path: Path):
    checkpoint = of_megatron(PLAIN, bias=1.0)
    with pytest.raises(InputError, match="output layer has a bias.*--allow-approximate"):
        convert(checkpoint, "hf", tmp_path / "out")
    done = convert(
        checkpoint,
        "hf",
        tmp_path / "out",
        allow_approximate=True,
        verify=True,
        compare=verify_conversion,
    )
    assert done.comparison is not None and 0.01 < done.comparison.max_difference < 2
    assert "lm_head.bias" in done.approximations[0]
    assert same_tensors(open_checkpoint(tmp_path / "out"), checkpoint)


@pytest.mark.long
def test_the_genuine_checkpoint_has_megatrons_logits_in_transformers(tmp_path: Path):
    folder = SHARED / "oracles" / "families" / "t5_relative_tp2"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    checkpoint = open_checkpoint(folder)
    convert(checkpoint, "hf", tmp_path / "out", allow_approximate=True)
    golden = torch.load(folder / "golden.pt", weights_only=True)
    found = transformers_outputs(tmp_path / "out", golden)["logits"]
    # transformers has no such bias; the file keeps it.
    found = found + load_file(tmp_path / "out" / "model.safetensors")["lm_head.bias"]
    assert (found - golden["logits"]).abs().max() < 2e-4
    again = open_checkpoint(tmp_path / "out")
    assert again.config == checkpoint.config and same_tensors(again, checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "learned_absolute"}, "with learned_absolute positions"),
        ({"position_embedding_type": "rope"}, "with rope positions"),
        ({"normalization": "LayerNorm"}, "with LayerNorm"),
        ({"add_bias_linear": True, "add_qkv_bias": True}, "with biases"),
        ({"add_qkv_bias": True}, "with biases"),
        ({"activation": "geglu"}, "with geglu activations"),
        ({"softmax_scale": 0.4}, "with softmax_scale 0.4"),
        ({"logit_multiplier": 0.5}, "with factors of embeddings .1. and logits .0.5."),
        (
            {"logit_multiplier": 32**-0.5, "untie_embeddings_and_output_weights": True},
            "scaled logits and an output table of its own",
        ),
    ],
)
def test_what_transformers_lacks_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
):
    checkpoint = of_megatron(dataclasses.replace(PLAIN, **changes))
    with pytest.raises(InputError, match=f"a T5 .*{message}.* cannot be converted to Hugging Face"):
        convert(checkpoint, "hf", tmp_path / "out")


def edited(tmp_path: Path, tensors: dict[str, Tensor], **keys: Any) -> Path:
    """Return a folder of ours with further tensors and other keys."""
    folder = tmp_path / "out"
    convert(of_megatron(PLAIN), "hf", folder)
    found = load_file(folder / "model.safetensors")
    copies = {name: found["shared.weight"] + tensor for name, tensor in tensors.items()}
    save_file(found | copies, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_older_versions_stored_besides_is_passed_over(tmp_path: Path):
    names = [f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]
    names.append("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")
    found = open_checkpoint(edited(tmp_path, dict.fromkeys(names, torch.zeros(()))))
    assert same_tensors(found, of_megatron(PLAIN))


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        ({"encoder.embed_tokens.weight": 1.0}, {}, "two stacks have embeddings of their own"),
        ({}, {"dense_act_fn": "relu"}, "dense_act_fn is 'relu', but feed_forward_proj is 'gelu'"),
        ({}, {"is_gated_act": True}, "is_gated_act is True, but feed_forward_proj is 'gelu'"),
        ({}, {"feed_forward_proj": "gated-relu"}, "feed_forward_proj 'gated-relu' is not support"),
        ({}, {"model_type": "umt5"}, "a model of model_type 'umt5', which mlm-eval does not"),
        ({}, {"is_decoder": True}, "a decoder alone .is_decoder is True."),
        ({}, {"num_decoder_layers": 4}, "lacks decoder.block.3.layer.0.layer_norm.weight"),
    ],
)
def test_other_models_are_named(
    tensors: dict[str, float], keys: dict[str, Any], message: str, tmp_path: Path
):
    added = {name: torch.tensor(value) for name, value in tensors.items()}
    with pytest.raises(InputError, match=message):
        open_checkpoint(edited(tmp_path, added, **keys))


@pytest.mark.long
@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (10, 64), (64, 1000)])
def test_buckets_are_transformers(both_ways: bool, buckets: int, furthest: int):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(1200) - torch.arange(0, 1200, 100)[:, None]
    theirs = T5Attention._relative_position_bucket(distance, both_ways, buckets, furthest)
    ours = relative_buckets(1200, 1200, both_ways=both_ways, buckets=buckets, furthest=furthest)
    assert torch.equal(ours[::100], theirs)


def test_half_precision_comes_back_bit_for_bit(tmp_path: Path):
    """Queries are multiplied by a power of two, which changes no digit of any dtype."""
    weights = {name: t.bfloat16() for name, t in random_models.state_dict(PLAIN).items()}
    weights["output_layer.bias"].zero_()
    checkpoint = random_models.checkpoint(PLAIN, weights)
    checkpoint = dataclasses.replace(
        checkpoint,
        config=dataclasses.replace(PLAIN, params_dtype="bfloat16"),
        tensors={name: InMemory(tensor) for name, tensor in weights.items()},
    )
    convert(checkpoint, "hf", tmp_path / "out")
    assert same_tensors(open_checkpoint(tmp_path / "out"), checkpoint)
