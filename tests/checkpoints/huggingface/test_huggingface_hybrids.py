"""Nemotron-H: Megatron's own model as transformers computes it, older files, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import random_models
from support.huggingface_models import gpt_model, our_log_probs, their_log_probs, tokens
from support.paths import ORACLES
from support.random_models import LLAMA

from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.read import read_folder
from mlm_eval.checkpoints.open import open_checkpoint

HYBRID = dataclasses.replace(
    LLAMA,
    num_layers=4,
    position_embedding_type="none",
    activation="squared_relu",
    no_mixer_layers=(1,),
    no_mlp_layers=(0, 2, 3),
    mamba_layers=(0, 3),
    mamba_num_heads=4,
    mamba_head_dim=6,
    mamba_num_groups=2,
    mamba_state_dim=5,
    mamba_conv_width=4,
    params_dtype="float32",
)


def same_tensors(one: Any, other: Any) -> bool:
    return set(one.tensors) == set(other.tensors) and all(
        torch.equal(tensor.read(), other.tensors[name].read())
        for name, tensor in one.tensors.items()
    )


def test_megatrons_hybrid_is_transformers_and_comes_back(tmp_path: Path) -> None:
    import transformers

    source = open_checkpoint(ORACLES / "nemotronh_tp2")
    done = convert(source, "hf", tmp_path / "hf", vocab="padded")
    assert not done.warnings[:-1]  # but for the vocabulary's padding
    golden = torch.load(ORACLES / "nemotronh_tp2" / "golden.pt", weights_only=True)
    model = transformers.NemotronHForCausalLM.from_pretrained(done.path, dtype=torch.float32)
    with torch.inference_mode():
        found = model(golden["tokens"]).logits[:, golden["logits_positions"]]
    expected = golden["logits"]
    gap = (found.log_softmax(-1) - expected.log_softmax(-1)).abs().max()
    assert gap < 2e-4
    back = read_folder(done.path)
    assert back.config == source.config
    assert same_tensors(back, source)


CONFIGS = {
    "plain": HYBRID,
    "no Mamba": dataclasses.replace(
        HYBRID, mamba_layers=(), mamba_num_heads=0, mamba_head_dim=0, mamba_num_groups=0,
        mamba_state_dim=0, mamba_conv_width=0,
    ),
    "Mamba alone": dataclasses.replace(
        HYBRID, no_mixer_layers=(), no_mlp_layers=(0, 1, 2, 3), mamba_layers=(0, 1, 2, 3)
    ),
    "experts": dataclasses.replace(
        HYBRID, moe_layers=(1,), num_experts=6, moe_router_topk=3, moe_ffn_hidden_size=12,
        moe_shared_expert_intermediate_size=20, moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True, ffn_hidden_size=12,
    ),
    "steps and norms": dataclasses.replace(
        HYBRID, mamba_min_time_step=0.5, layernorm_epsilon=1e-2, mamba_norm_epsilon=1e-2
    ),
    "gains minus 1": dataclasses.replace(HYBRID, layernorm_zero_centered_gamma=True),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_the_same_model_in_transformers(name: str, tmp_path: Path) -> None:
    from mlm_eval.engine.plain_transformers import transformers_outputs
    from mlm_eval.engine.verify import outputs

    source = random_models.checkpoint(CONFIGS[name])
    done = convert(source, "hf", tmp_path / "hf", vocab="padded")
    probe = {"tokens": torch.arange(2 * 12).view(2, 12)}
    ours, theirs = outputs(source, probe), transformers_outputs(done.path, probe)
    scale = ours["logits"].abs().max().item()
    torch.testing.assert_close(theirs["logits"], ours["logits"], rtol=0, atol=2e-5 * scale)
    back = read_folder(done.path)
    torch.testing.assert_close(outputs(back, probe)["logits"], ours["logits"], rtol=0, atol=1e-5)
    if not source.config.layernorm_zero_centered_gamma:
        assert same_tensors(back, source)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"mamba_norm_epsilon": 1e-3}, "mamba_norm_epsilon 0.001"),
        ({"softmax_scale": 0.3}, "softmax_scale 0.3"),
        ({"position_embedding_type": "rope"}, "it has no positions"),
        ({"no_mlp_layers": (0, 2)}, "each of its layers has one branch"),
        ({"add_qkv_bias": True}, "it has no biases"),
        ({"activation": "swiglu"}, "nemotron_h has none such"),
        ({"qk_layernorm": True}, "it has no norms of queries and keys"),
        (
            {"moe_layers": (1,), "num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 8},
            "its experts' scores are sigmoids",
        ),
    ],
)
def test_other_hybrids_are_refused_by_what_they_have(
    change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    source = random_models.checkpoint(dataclasses.replace(HYBRID, **change))
    with pytest.raises(InputError, match="cannot be converted to Hugging Face") as refused:
        convert(source, "hf", tmp_path / "hf", vocab="padded")
    assert why in str(refused.value)


def test_heterogeneous_layers_have_no_class(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="each of its layers has one branch"):
        convert(open_checkpoint(ORACLES / "nas_tp2"), "hf", tmp_path / "hf", vocab="padded")


def test_files_of_other_ages_are_the_same_model(tmp_path: Path) -> None:
    """Modules' own names, older keys, a pattern, and heads of multi-token prediction beside."""
    model = gpt_model("nemotron-h")
    model.save_pretrained(tmp_path)
    expected = their_log_probs(model, tokens())
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    hf = json.loads(path.read_text())
    older = {
        "n_groups": "mamba_n_groups",
        "conv_kernel": "mamba_d_conv",
        "time_step_min": "mamba_dt_min",
        "head_dim": "attention_head_dim",
    }
    hf = {older.get(key, key): value for key, value in hf.items()}
    for key in ("layers_block_type", "layer_types"):
        hf.pop(key, None)
    hf |= {"hybrid_override_pattern": "M-*M", "num_hidden_layers": 4}
    path.write_text(json.dumps(hf))
    tensors = load_file(weights)
    renamed = {key.replace("backbone.", "model."): value for key, value in tensors.items()}
    save_file(renamed | {"mtp.layers.0.eh_proj.weight": torch.ones(2, 2)}, weights)
    checkpoint = read_folder(tmp_path)
    [told] = checkpoint.provenance.warnings
    assert "multi-token prediction take no part" in told
    ours = our_log_probs(checkpoint, tokens())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers_block_type": ["mlp", "window"]}, "layers_block_type is .* expected for each la"),
        ({"layers_block_type": None, "hybrid_override_pattern": "M?"}, "hybrid_override_pattern i"),
        ({"moe_latent_size": 4}, "experts that work in a latent width"),
        ({"use_bias": True}, "biases in Mamba's linear layers"),
        ({"sliding_window": 3}, "a sliding window"),
        ({"mamba_hidden_act": "gelu"}, "another activation than silu"),
        ({"n_groups": 4}, "mamba_num_groups 4 does not divide mamba_num_heads 6"),
    ],
)
def test_config_files_of_other_models_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    gpt_model("nemotron-h").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    hf = json.loads(path.read_text())
    hf.pop("hybrid_override_pattern", None)
    path.write_text(json.dumps(hf | change))
    with pytest.raises(InputError, match=message):
        read_folder(tmp_path)
