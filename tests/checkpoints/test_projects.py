"""Megatron's weights with the settings of Megatron-Bridge, NeMo 2 and verl beside them."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import random_models
from support.folders import dcp_folders
from support.folders.layouts import LAYOUTS, MODEL, bridge, fields, nemo_2, weights_of

from mlm_eval.checkpoints.config import ModelConfig, RopeScaling
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.projects.settings import read_yaml

GEMMA3 = "megatron.bridge.models.gemma.gemma3_provider.Gemma3ModelProvider1B"


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_door_of_every_layout_opens_the_model(layout: str, tmp_path: Path):
    make, expected = LAYOUTS[layout]
    doors = make(tmp_path / "run")
    weights = weights_of()
    for door in doors:
        found = open_checkpoint(tmp_path / "run" / door)
        assert dataclasses.replace(found.config, hidden_dropout=0.1) == MODEL, door
        assert found.provenance.format == expected, door
        assert not found.provenance.warnings, door
        assert all(torch.equal(found.tensors[name].read(), weights[name]) for name in weights), door
        if not expected.startswith("megatron-") or expected == "megatron-bridge":
            assert "args." not in "".join(found.provenance.config_sources.values())


def test_what_a_bridge_model_is_given_is_applied(tmp_path: Path):
    """Its providers pass on the scaling of rotary frequencies, which Megatron-LM's model is not."""
    bridge(tmp_path / "a", rope_scaling=True, rope_scaling_factor=32.0)
    assert open_checkpoint(tmp_path / "a").config.rope_scaling == RopeScaling(factor=32.0)
    nemo_2(tmp_path / "b", scale_factor=4)
    assert open_checkpoint(tmp_path / "b").config.rope_scaling == RopeScaling(factor=4.0)
    nemo_2(tmp_path / "c", scale_factor=8, old_context_len=4096)
    with pytest.raises(InputError, match="old_context_len = 4096, where Llama 3.1 has 8192"):
        open_checkpoint(tmp_path / "c")


GEMMA = dataclasses.replace(
    MODEL,
    activation="geglu_tanh",
    embedding_multiplier=MODEL.hidden_size**0.5,
    layernorm_zero_centered_gamma=True,
)
GEMMAS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "gemma_provider.CodeGemmaModelProvider2B": (GEMMA, {}),
    "gemma2_provider.Gemma2ModelProvider9B": (
        dataclasses.replace(
            GEMMA,
            branch_layernorm=True,
            window_size=5,
            window_layers=(1, 3),
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            softmax_scale=0.0625,
        ),
        {
            "window_size": [5, 0],
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
        },
    ),
    "gemma3_provider.Gemma3ModelProvider1B": (
        dataclasses.replace(
            GEMMA,
            branch_layernorm=True,
            qk_layernorm=True,
            window_size=7,
            window_layers=(0, 1, 3),
            rotary_base=1e6,
            rotary_base_local=10000.0,
            rotary_seq_len_interpolation_factor=8.0,
            softmax_scale=0.0625,
        ),
        {
            "window_size": 8,
            "interleaved_attn_pattern": [2, 1],
            "rotary_base": [10000, 1000000],
            "rope_scaling_factor": 8.0,
            "softmax_scale": 0.0625,
        },
    ),
    "model_config.Gemma3ModelConfig": (
        dataclasses.replace(
            GEMMA,
            branch_layernorm=True,
            window_size=7,
            window_layers=(0, 1, 2, 3),
            rotary_base=1e6,
            rotary_base_local=20000.0,
        ),
        {"window_size": [7, 0], "rotary_base": 1000000, "rotary_base_local": 20000},
    ),
}


@pytest.mark.parametrize("name", GEMMAS)
def test_gemmas_classes_compute_more_than_their_fields_say(name: str, tmp_path: Path):
    """The class is known by its name; the keys are TransformerEngine's, layers stacked."""
    model, more = GEMMAS[name]
    weights = random_models.state_dict(model, seed=3)
    stacked: dict[str, list[torch.Tensor]] = {}
    for key, tensor in weights.items():
        key = key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        key = key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        stacked.setdefault(re.sub(r"layers\.\d+", "layers", key), []).append(tensor)
    tensors = {
        key: torch.stack(parts) if ".layers." in key else parts[0] for key, parts in stacked.items()
    }
    step = dcp_folders.save(tmp_path / "iter_0000007", tensors, common={"iteration": 7})
    settings = {
        "_target_": f"megatron.bridge.models.gemma.{name}",
        "activation_func": {"_call_": False, "_target_": "megatron.core.activations.fast_gelu"},
        "layernorm_zero_centered_gamma": True,
        "qk_layernorm": model.qk_layernorm,
        **more,
    }
    (step / "run_config.yaml").write_text(yaml.safe_dump({"model": fields(model, **settings)}))
    found = open_checkpoint(tmp_path)
    assert found.config == model
    assert not found.provenance.warnings
    assert all(torch.equal(found.tensors[name].read(), weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"_target_": "megatron.bridge.models.gemma.Gemma4ModelProvider"}, "Gemma4ModelProvider"),
        ({"_target_": "megatron.bridge.models.Gemma3VLModelProvider"}, "is of Gemma3VLModelProv"),
        ({"_target_": GEMMA3, "seq_len_interpolation_factor": 2.0}, "seq_len_interpolation_factor"),
        ({"_target_": GEMMA3, "interleaved_attn_pattern": [5, "x"]}, "interleaved_attn_pattern"),
        ({"_target_": GEMMA3, "num_layers": None}, "num_layers None"),
        ({"_target_": GEMMA3, "hidden_size": "x"}, "hidden_size 'x'"),
        ({"output_logit_softcapping": 50.0}, "run_config.yaml: output_logit_softcapping = 50.0"),
        ({"activation_func": {"_target_": "some.other.function"}}, "some.other.function"),
        (
            {"layernorm_epsilon": None},
            "what layernorm_epsilon is: iter_0000007/run_config.y",
        ),
        ({"activation_func": None}, "what activation is: iter_0000007/run_config.yaml lacks it"),
    ],
)
def test_what_is_not_computed_or_not_said_is_refused(
    more: dict[str, Any], message: str, tmp_path: Path
):
    bridge(tmp_path, **more)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)


def test_settings_that_are_not_known_are_listed(tmp_path: Path):
    bridge(tmp_path, residual_multiplier=12.0, should_pad_vocab=True, hf_model_id="a/b")
    [warning] = open_checkpoint(tmp_path).provenance.warnings
    assert "run_config.yaml" in warning and "residual_multiplier" in warning
    assert "should_pad_vocab" not in warning and "hf_model_id" not in warning


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.system ['touch {canary}']\n",
        "model: !!python/object/new:os.system ['touch {canary}']\n",
        "model: !custom {{}}\n",
        "model: [1, 2\n",
        "- model\n",
        "model: 5\n",
        "{{" * 2000,
    ],
)
def test_nothing_in_a_settings_file_runs(text: str, tmp_path: Path):
    bridge(tmp_path / "run")
    canary = tmp_path / "canary"
    path = tmp_path / "run/iter_0000007/run_config.yaml"
    path.write_text(text.replace("{canary}", str(canary)).replace("{{", "{").replace("}}", "}"))
    with pytest.raises(InputError, match="run_config.yaml"):
        open_checkpoint(tmp_path / "run")
    assert not canary.exists()


def test_a_file_of_references_ends(tmp_path: Path):
    """Ten lists of ten references each are 10^10 values to whoever walks them."""
    bridge(tmp_path / "run")
    path = tmp_path / "run/iter_0000007/run_config.yaml"
    laughs = ["  a0: &a0 [1, 1]"]
    laughs += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)]
    text = path.read_text().replace("model:\n", "model:\n" + "\n".join(laughs) + "\n")
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(InputError, match="hold one another so often that they never end"):
        open_checkpoint(tmp_path / "run")
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    "text",
    [
        "a: {x: 1}\na: {x: 1}\n",
        "a: [1, 2]\na: [1, 2]\n",
        "1: a\n'1': b\n",
        "weights: [" + ", ".join(f"0.{n:016d}" for n in range(1100)) + "]\n",
        "paths:\n"
        + "".join(
            f"- /data/some/long/path/to/a/shard/of/a/corpus_{n:06d}\n" for n in range(14_000)
        ),
    ],
    ids=["mappings", "lists", "a number and its text", "long fractions", "700 KB"],
)
def test_honest_yaml_is_read(text: str, tmp_path: Path):
    """What is written twice alike is one; long numbers are values; lists of shards are long."""
    path = tmp_path / "run_config.yaml"
    path.write_text(text)
    assert read_yaml(path)


@pytest.mark.parametrize("other", ["{x: 2}", "[1]", "1"])
def test_two_values_of_one_name_are_refused(other: str, tmp_path: Path):
    path = tmp_path / "run_config.yaml"
    path.write_text(f"a: {{x: 1}}\na: {other}\n")
    with pytest.raises(InputError, match="'a' stands in one mapping with two values"):
        read_yaml(path)
