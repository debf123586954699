"""What is not computed is refused by its name, wherever its layout says it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import dcp_folders, layouts
from support.folders.synthetic import write

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint

SETTINGS: dict[str, Any] = {
    "moe_latent_size": 64,
    "moe_expert_capacity_factor": 1.25,
    "moe_mlp_glu_interleave_size": 32,
    "moe_shared_expert_glu_interleave_size": 32,
    "moe_single_grouped_weight": True,
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 4,
    "linear_attention_type": "gated_delta_net",
    "mla_down_proj_fusion": True,
    "enable_hyper_connections": True,
}
"""Setting -> a value that asks for it."""

LATER_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a letter of a newer hybrid": ({"hybrid_override_pattern": "M*-G"}, "of the kind 'G'"),
    "a hybrid whose layers are not there": ({"is_hybrid_model": True}, "is a hybrid model"),
}
"""What only the tensors decide."""


def megatron(root: Path, **more: Any) -> list[str]:
    """Megatron-LM's own torch format."""
    args = layouts.megatron_args(**more)
    write(root, layouts.weights_of(), layouts.MODEL, args=args)
    return [""]


def nemo_1(root: Path, **more: Any) -> list[str]:
    return layouts.nemo_dist(root, **more)


MAKERS: dict[str, Callable[..., list[str]]] = {
    "Megatron-LM": megatron,
    "Megatron-Bridge": layouts.bridge,
    "NeMo 2": layouts.nemo_2,
    "NeMo 1": nemo_1,
    "verl": layouts.verl,
}
SAID = {
    "Megatron-LM": "args",
    "Megatron-Bridge": "run_config.yaml",
    "NeMo 2": "model.yaml",
    "NeMo 1": "model_config.yaml",
    "verl": "transformer_config.json",
}


@pytest.mark.long
@pytest.mark.parametrize("project", MAKERS)
def test_a_setting_is_refused_by_its_name_and_its_file(project: str, tmp_path: Path):
    for name, value in SETTINGS.items():
        MAKERS[project](tmp_path / name, **{name: value})
        message = rf"{SAID[project]}(\.|: ){name} = {value!r}\), which mlm-eval does not compute"
        with pytest.raises(InputError, match=message):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("project", ["Megatron-LM", "Megatron-Bridge", "NeMo 2"])
@pytest.mark.parametrize("kind", LATER_SETTINGS)
def test_a_setting_that_the_tensors_contradict_is_named(kind: str, project: str, tmp_path: Path):
    more, message = LATER_SETTINGS[kind]
    MAKERS[project](tmp_path, **more)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)


LAYER = "decoder.layers.1."
PARAMETERS = {
    "self_attention.linear_qkv.adapter.linear_in.weight": "unmerged adapters .LoRA.*merge them",
    "self_attention.linear_proj.adapter.linear_out.weight": "unmerged adapters .LoRA.*merge them",
    "mlp.linear_fc1.lora_A.default.weight": "unmerged adapters .LoRA.*merge them",
    "self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight": "unmerged adapters .LoRA",
    "mlp.fc1_latent_proj.weight": "experts that work in a latent width",
    "mlp.fc2_latent_proj.weight": "experts that work in a latent width",
    "self_attention.in_proj.weight": "linear attention .a gated delta net",
    "self_attention.conv1d.weight": "linear attention .a gated delta net",
    "self_attention.A_log": "linear attention .a gated delta net",
    "self_attention.dt_bias": "linear attention .a gated delta net",
    "self_attention.out_norm.weight": "linear attention .a gated delta net",
    "self_attention.linear_qkv_down_proj.weight": "fused down projections",
    "mixer.x_proj.weight": "Mamba layers of the first kind",
    "self_attention.indexer.linear_wq_b.weight": "sparse attention .DSA.",
    "self_attention.something_new.weight": "parameter that no GPT",
}
"""Parameter of a layer -> how it is refused."""


def in_torch(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    contents = {"args": layouts.megatron_args(), "checkpoint_version": 3.0, "model": tensors}
    (root / "mp_rank_00").mkdir(parents=True)
    torch.save(contents, root / "mp_rank_00/model_optim_rng.pt")


def in_torch_dist(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    dcp_folders.save(root, tensors, common={"args": layouts.megatron_args()})


def in_nemo_1(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    layouts.nemo_folder(root, **layouts.nemo_config())
    torch.save({f"model.{name}": t for name, t in tensors.items()}, root / "model_weights.ckpt")


@pytest.mark.long
@pytest.mark.parametrize("store", [in_torch, in_torch_dist, in_nemo_1])
def test_a_parameter_is_refused_by_its_name(
    store: Callable[[Path, dict[str, torch.Tensor]], None], tmp_path: Path
):
    for number, (name, message) in enumerate(PARAMETERS.items()):
        tensors = {**layouts.weights_of(), LAYER + name: torch.ones(2, 2)}
        store(tmp_path / str(number), tensors)
        with pytest.raises(InputError, match=message) as caught:
            open_checkpoint(tmp_path / str(number))
        assert name in str(caught.value)


def test_adapters_without_their_base_model_are_named(tmp_path: Path):
    verl = tmp_path / "verl/global_step_5/actor/adapter_checkpoint"
    verl.mkdir(parents=True)
    nemo = tmp_path / "nemo/weights"
    nemo.mkdir(parents=True)
    (nemo / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": "/base"}))
    for door in (tmp_path / "verl", tmp_path / "verl/global_step_5", verl.parent, nemo.parent):
        with pytest.raises(InputError, match="adapters .LoRA. without their base model.*merge"):
            open_checkpoint(door)
