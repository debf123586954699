"""Every model of megatron-core's is computed or refused by its own name, whatever file holds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from support import configs
from support.folders.synthetic import ERAS, era_name

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.megatron.names import REFUSED, refuse_unsupported
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import parameters

EXAMPLES: dict[str, tuple[str, ...]] = {
    # What is refused -> parameters that only such a model has.
    "a fork's mixture of experts": (
        "language_model.encoder.layers.0.mlp.experts.0.dense_h_to_4h.weight",
    ),
    "a mixture of experts that work in a latent width": (
        "decoder.layers.0.mlp.fc1_latent_proj.weight",
        "decoder.layers.3.mlp.fc2_latent_proj.weight",
    ),
    "an encoder-decoder model (T5) of Megatron's legacy code": (
        "language_model.decoder.layers.0.inter_attention.query.weight",
    ),
    "Mamba layers of the first kind": (
        "decoder.layers.0.mixer.x_proj.weight",
        "decoder.layers.0.mixer.dt_proj.bias",
        "decoder.layers.0.mixer.in_proj.bias",
    ),
    "linear attention (a gated delta net)": (
        "decoder.layers.0.self_attention.in_proj.weight",
        "decoder.layers.0.self_attention.conv1d.weight",
        "decoder.layers.0.self_attention.A_log",
        "decoder.layers.0.self_attention.dt_bias",
        "decoder.layers.0.self_attention.out_norm.weight",
        "decoder.layers.0.self_attention.out_proj.weight",
    ),
    "sparse attention (DSA)": (
        "decoder.layers.0.self_attention.core_attention.indexer.linear_wq_b.weight",
        "decoder.layers.0.self_attention.core_attention.indexer.k_norm.bias",
    ),
    "hyper-connections": ("decoder.layers.0.self_attention_hyper_connection.alpha_pre",),
    "a model of several modalities (MIMO)": (
        "modality_submodules.images.encoders.clip.conv1.weight",
        "modality_submodules.audio.input_projections.0.linear_fc1.weight",
    ),
    "a model that reads retrieved texts (RETRO)": (
        "decoder.layers.5.cross_attention.encoder.layers.0.mlp.linear_fc1.weight",
    ),
    "latent attention with fused down projections": (
        "decoder.layers.0.self_attention.linear_qkv_down_proj.weight",
    ),
    "a retrieval model (ICT, REALM)": (
        "query_model.language_model.encoder.layers.0.mlp.dense_4h_to_h.weight",
        "biencoder.x.weight",
        "retriever.encoder.layers.0.x.weight",
    ),
    "a vision model": (
        "vision_model.decoder.layers.0.mlp.linear_fc1.weight",
        "vision_projection.encoder.linear_fc1.weight",
        "class_token",
        "conv1.weight",
        "ln_pre.weight",
        "embedder.weight",
        "mask_token",
        "backbone.cls_token",
    ),
    "unmerged adapters (LoRA)": (
        "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",
        "decoder.layers.0.self_attention.linear_qkv.lora_a",
    ),
}

READ = {"gpt", "bert", "T5", "mamba"}
PARTS = {"common", "backends"}
OTHERS = {
    # Folders of megatron/core/models -> what their parameters are refused as.
    "vision": "a vision model",
    "multimodal": "a vision model",
    "huggingface": "a vision model",
    "mimo": "a model of several modalities (MIMO)",
}
ATTENTION_VARIANTS = {
    "dsa": "sparse attention (DSA)",
}


def core() -> Path:
    """Return the folder of the installed megatron-core; skip where there is none."""
    spec = importlib.util.find_spec("megatron")  # a namespace: this folder may be a part of it
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    rooms = [room for place in places if (room := Path(place) / "core").is_dir()]
    if not rooms:
        pytest.skip("megatron-core is not installed")
    return rooms[0]


def test_every_kind_has_examples_that_no_other_kind_takes():
    assert {what for _, what in REFUSED} == set(EXAMPLES)
    for pattern, what in REFUSED:
        assert any(pattern.search(key) for key in EXAMPLES[what]), what


@pytest.mark.parametrize("what", EXAMPLES)
def test_other_models_are_refused_by_their_own_name(what: str):
    for key in EXAMPLES[what]:
        with pytest.raises(InputError) as caught:
            refuse_unsupported(["decoder.layers.0.mlp.linear_fc2.weight", key], "here")
        if what != "a vision model" and "conv1" in key:
            continue  # a vision tower within another model: the first of its names counts
        assert f"here holds {what} (parameter {key})" in str(caught.value)


def test_no_name_of_a_model_that_is_read_is_refused():
    for config in (configs.GPT, configs.LLAMA, configs.BERT, configs.T5):
        names = list(parameters(config))
        refuse_unsupported(names, "here")
        if config.family != "t5":
            for era in ERAS:
                refuse_unsupported([era_name(name, era) for name in names], "here")


@pytest.mark.parametrize("what", ["sparse attention (DSA)", "a vision model"])
def test_files_are_refused_by_name_too(what: str, tmp_path: Path):
    torch.save({"model": {EXAMPLES[what][0]: torch.ones(2, 2)}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=what.split(" (")[0]):
        open_checkpoint(tmp_path / "x.pt")


def test_every_model_of_megatron_core_is_known():
    folders = {path.name for path in (core() / "models").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} - READ - PARTS - set(OTHERS) == set()
    assert set(OTHERS.values()) <= set(EXAMPLES)


def test_every_variant_of_attention_is_known():
    room = core() / "transformer" / "experimental_attention_variant"
    if not room.is_dir():
        pytest.skip("this megatron-core has none")
    variants = {path.stem for path in room.glob("*.py")} - {"__init__"}
    assert variants - set(ATTENTION_VARIANTS) == set()
    assert set(ATTENTION_VARIANTS.values()) <= set(EXAMPLES)
