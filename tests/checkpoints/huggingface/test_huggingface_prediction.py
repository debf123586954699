"""Heads of multi-token prediction in Hugging Face folders: layers behind DeepSeek V3's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import random_models
from support.folders.family_models import FAMILY_MODELS
from support.huggingface_models import gpt_model
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface import plan
from mlm_eval.checkpoints.lazy import InMemory, LazyTensor
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import prediction_parameters
from mlm_eval.engine import verify
from mlm_eval.engine.verify import compare_checkpoints, outputs

HEADS = 2
MODEL = FAMILY_MODELS["deepseek"]
PLAIN = dataclasses.replace(
    MODEL,
    layernorm_epsilon=1e-6,
    moe_shared_expert_intermediate_size=2 * MODEL.moe_ffn_hidden_size,
)


def deepseek(**changes: Any) -> Checkpoint:
    """Return a model of DeepSeek V3's kind with two heads of noise."""
    model = random_models.checkpoint(dataclasses.replace(PLAIN, **changes))
    return random_models.with_prediction_heads(model, HEADS)


def assert_same(actual: Checkpoint, expected: Checkpoint) -> None:
    """The same tensors bit by bit, heads too."""
    for ours, theirs in (
        (actual.tensors, expected.tensors),
        (actual.prediction_heads, expected.prediction_heads),
    ):
        assert theirs and ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name].read(), tensor.read()), name


def load(folder: Path) -> tuple[Any, list[str]]:
    """Return what plain transformers makes of a folder, and the weights that it passes over."""
    import transformers

    model, loading = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    ignored = loading.pop("unexpected_keys")
    assert not any(loading.values()), loading
    return model.eval(), sorted(ignored)


# --- written, and back --------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["megatron", "torch_dist"])
def test_heads_go_to_hugging_face_and_back_bit_by_bit(to: str, tmp_path: Path) -> None:
    there: dict[str, Any] = {"tp": 2, "pp": 2, "ep": 2} if to == "megatron" else {}
    convert(deepseek(), to, tmp_path / "megatron", **there)
    source = open_checkpoint(tmp_path / "megatron")
    assert_same(source, deepseek())
    report = convert(source, "hf", tmp_path / "hf", vocab="padded")
    [note] = [note for note in report.notes if "multi-token" in note]
    assert note in (tmp_path / "hf" / "README.md").read_text()
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert hf["num_nextn_predict_layers"] == HEADS
    found = open_checkpoint(tmp_path / "hf")
    assert_same(found, source)
    convert(found, to, tmp_path / "back", **there)
    assert_same(open_checkpoint(tmp_path / "back"), source)


@pytest.mark.long
def test_transformers_computes_the_same_without_the_heads(tmp_path: Path) -> None:
    source = deepseek()
    convert(source, "hf", tmp_path, vocab="padded")
    model, ignored = load(tmp_path)
    layers = source.config.num_layers
    assert {name.split(".")[2] for name in ignored} == {str(layers + n) for n in range(HEADS)}
    inputs = {"tokens": torch.arange(24).view(2, 12) % source.config.vocab_size}
    with torch.inference_mode():
        theirs = model(inputs["tokens"]).logits
    torch.testing.assert_close(theirs, outputs(source, inputs)["logits"], rtol=0, atol=1e-4)


def test_transformers_finds_the_heads_where_it_looks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own class of such heads gets every weight; it looks at the number of DeepSeek's only."""
    modeling_layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(modeling_layers, "MtpModel"):
        pytest.skip("this version of transformers has no class of such heads")
    source = deepseek()
    convert(source, "hf", tmp_path, vocab="padded")
    model, _ = load(tmp_path)
    first = source.config.num_layers
    pattern = "|".join(rf"model\.layers\.{first + n}\." for n in range(HEADS))
    monkeypatch.setattr(model, "_keys_to_ignore_on_load_unexpected", [pattern])
    heads = modeling_layers.MtpModel.from_pretrained(model).state_dict()
    kept = source.prediction_heads
    for n in range(HEADS):
        for ours, theirs in (
            ("enorm", "enorm"),
            ("hnorm", "hnorm"),
            ("eh_proj", "eh_proj"),
            ("final_layernorm", "post_norm"),
            ("transformer_layer.self_attention.linear_proj", "mtp_block.self_attn.o_proj"),
            ("transformer_layer.mlp.router", "mtp_block.mlp.gate"),
        ):
            expected = kept[f"mtp.layers.{n}.{ours}.weight"].read()
            assert torch.equal(heads[f"layers.{n}.{theirs}.weight"], expected), ours


def test_what_the_class_has_besides_is_zeros_in_the_heads_too(tmp_path: Path) -> None:
    source = deepseek(moe_router_enable_expert_bias=False, moe_shared_expert_intermediate_size=0)
    convert(source, "hf", tmp_path, vocab="padded", dtype="bfloat16")
    back = open_checkpoint(tmp_path)
    assert set(back.prediction_heads) > set(source.prediction_heads)
    for name, tensor in back.prediction_heads.items():
        known = source.prediction_heads.get(name)
        expected = torch.zeros(tensor.shape) if known is None else known.read()
        kept = torch.float32 if name.endswith("router.expert_bias") else torch.bfloat16
        assert tensor.dtype == kept, name
        assert torch.equal(tensor.read(), expected.to(kept)), name


def test_gains_of_heads_change_their_form_with_the_models(tmp_path: Path) -> None:
    source = deepseek(layernorm_zero_centered_gamma=True)
    convert(source, "hf", tmp_path, vocab="padded")
    for name, tensor in open_checkpoint(tmp_path).prediction_heads.items():
        more = 1 if "norm" in name.split(".")[-2] else 0
        assert torch.equal(tensor.read(), source.prediction_heads[name].read() + more), name


def test_a_family_without_a_place_for_heads_leaves_them_out(tmp_path: Path) -> None:
    plain = random_models.checkpoint(FAMILY_MODELS["mixtral"])
    source = random_models.with_prediction_heads(plain, 1)
    report = convert(source, "hf", tmp_path, vocab="padded")
    [note] = [note for note in report.notes if "multi-token" in note]
    assert "left out" in note and note in (tmp_path / "README.md").read_text()
    found = open_checkpoint(tmp_path)
    assert not found.prediction_heads and not found.provenance.warnings


def test_a_genuine_head_goes_to_hugging_face_and_back(oracles: Path, tmp_path: Path) -> None:
    folder = oracles / "families" / "dsv3_mtp_dist"
    source = open_checkpoint(folder)
    golden = torch.load(folder / "golden.pt", weights_only=True)
    convert(source, "hf", tmp_path / "hf", vocab="padded")
    model, ignored = load(tmp_path / "hf")
    assert ignored
    with torch.inference_mode():
        theirs = model(golden["tokens"]).logits
    assert (theirs - golden["logits"]).abs().max() < 2e-4
    convert(open_checkpoint(tmp_path / "hf"), "megatron", tmp_path / "back", tp=2, pp=2)
    assert_same(open_checkpoint(tmp_path / "back"), source)


# --- compared -----------------------------------------------------------------------------------


def with_head(source: Checkpoint, name: str, tensor: LazyTensor) -> Checkpoint:
    return dataclasses.replace(source, prediction_heads=source.prediction_heads | {name: tensor})


def test_heads_are_compared_where_both_sides_have_some() -> None:
    source = deepseek()
    name = "mtp.layers.1.eh_proj.weight"
    values = source.prediction_heads[name].read().clone()
    values[3, 5] += 0.25
    found = compare_checkpoints(source, with_head(source, name, InMemory(values)))
    assert not found.same and found.differences()[0].startswith(f"{name} [3, 5] is ")
    less = random_models.with_prediction_heads(random_models.checkpoint(PLAIN), 1)
    found = compare_checkpoints(source, less)
    assert any("has mtp.layers.1." in what for what in found.differences()), found.differences()
    without = compare_checkpoints(source, dataclasses.replace(source, prediction_heads={}))
    assert without.same and "only --ckpt has heads" in without.notes[0]
    assert compare_checkpoints(source, source).verdict == "the same"


def test_a_writer_that_loses_heads_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(folder: Path, inputs: dict[str, Tensor], *, transformers: bool) -> dict[str, Tensor]:
        return outputs(open_checkpoint(folder), inputs)

    monkeypatch.setattr(verify, "_in_fresh_process", here)
    asked: dict[str, Any] = {"vocab": "padded", "verify": True, "compare": verify.verify_conversion}
    report = convert(deepseek(), "hf", tmp_path / "whole", dtype="bfloat16", **asked)
    assert report.comparison is not None and report.comparison.same
    monkeypatch.setattr(plan, "unpack_heads", lambda *_: ({}, set()))
    with pytest.raises(InputError, match="only the source has heads of multi-token prediction"):
        convert(deepseek(), "hf", tmp_path / "less", **asked)
    assert not (tmp_path / "less").exists()


# --- read ---------------------------------------------------------------------------------------


def with_prediction_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors with a layer for multi-token prediction behind its last one."""
    extra = {
        key.replace("layers.2.", "layers.3."): value * 2
        for key, value in state.items()
        if "layers.2." in key
    }
    noise = torch.Generator().manual_seed(3)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        extra[f"model.layers.3.{name}.weight"] = torch.randn(32, generator=noise)
    extra["model.layers.3.eh_proj.weight"] = torch.randn(32, 64, generator=noise)
    extra["model.layers.3.embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
    extra["model.layers.3.shared_head.head.weight"] = state["lm_head.weight"].clone()
    return state | extra


def test_layers_of_multi_token_prediction_take_no_part(tmp_path: Path) -> None:
    gpt_model("deepseek-v3-one-group").save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    plain = open_checkpoint(tmp_path / "in")
    assert not plain.provenance.warnings and not plain.prediction_heads
    expected = {name: tensor.read() for name, tensor in plain.tensors.items()}
    state = load_file(file)
    longer = with_prediction_head(state)
    save_file(longer, file)
    found = open_checkpoint(tmp_path / "in")
    [warning] = found.provenance.warnings
    assert "behind layer 2, heads of multi-token prediction" in warning
    assert "conversions keep them" in warning
    for name, values in expected.items():
        assert torch.equal(found.tensors[name].read(), values), name
    convert(found, "megatron", tmp_path / "megatron")
    kept = open_checkpoint(tmp_path / "megatron").prediction_heads
    assert set(kept) == set(prediction_parameters(found.config, 1))
    for name, key in (
        ("eh_proj.weight", "eh_proj.weight"),
        ("final_layernorm.weight", "shared_head.norm.weight"),
        ("transformer_layer.self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight"),
        ("transformer_layer.mlp.router.weight", "mlp.gate.weight"),
    ):
        stored = longer[f"model.layers.3.{key}"]
        assert torch.equal(kept[f"mtp.layers.0.{name}"].read(), stored), name
    first = kept["mtp.layers.0.transformer_layer.mlp.experts.linear_fc1.weight"].read()
    gate = longer["model.layers.3.mlp.experts.5.gate_proj.weight"]
    assert torch.equal(first[5].chunk(2)[0], gate)
    convert(found, "hf", tmp_path / "hf")
    again = load_file(tmp_path / "hf" / "model.safetensors")
    assert again.keys() == longer.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in longer.items())


def test_heads_follow_the_model_in_the_order_of_rotary_channels(tmp_path: Path) -> None:
    """Without `rope_interleave` a folder's channels are reordered, in heads as in layers."""
    gpt_model("deepseek-v3-halves").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(with_prediction_head(state), tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    assert found.prediction_heads
    for name, tensor in found.prediction_heads.items():
        module = name.removeprefix("mtp.layers.0.transformer_layer.")
        if ".self_attention." in name:  # twice those of the last layer
            last = found.tensors[f"decoder.layers.2.{module}"].read()
            assert torch.equal(tensor.read(), last * 2), name


def test_a_head_of_multi_token_prediction_that_is_not_whole_is_left_out(tmp_path: Path) -> None:
    gpt_model("deepseek-v3").save_pretrained(tmp_path)
    state = with_prediction_head(load_file(tmp_path / "model.safetensors"))
    del state["model.layers.3.enorm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    assert not found.prediction_heads
    assert "conversions leave them out" in found.provenance.warnings[0]
    hf = json.loads((tmp_path / "config.json").read_text())
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        hf.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(hf | {"num_nextn_predict_layers": 0}))
    with pytest.raises(InputError, match=r"model\.layers\.3\."):
        open_checkpoint(tmp_path)
