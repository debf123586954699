"""Experts and latent attention: read from and written to the classes that transformers has."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file, save_file
from support import random_models
from support.huggingface_models import gpt_model
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig, YarnScaling
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.read import read_folder
from mlm_eval.checkpoints.lazy import Index, InMemory
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import parameters
from mlm_eval.engine.plain_transformers import transformers_outputs
from mlm_eval.engine.verify import outputs, verify_conversion
from mlm_eval.engine.weights import compare_settings

FAMILIES = SHARED / "oracles" / "families"
TOLERANCE = 2e-4  # absolute, of logits, as the acceptance of the conversions has it
TRUE_ROWS = 1000
CLASSES = {
    "bridge_qwen2moe": "Qwen2Moe",
    "dsv2lite": "DeepseekV2",
    "dsv3": "DeepseekV3",
    "dsv3_bf16_tp2": "DeepseekV3",
    "dsv3_mtp_dist": "DeepseekV3",
    "dsv3_tp2": "DeepseekV3",
    "grouped_legacy_tp2": "Mixtral",
    "grouped_legacy_tp2_dist": "Mixtral",
    "mixtral": "Mixtral",
    "mixtral_dist": "Mixtral",
    "mixtral_ep2_mfsdp": "Mixtral",
    "mixtral_ep2_te": "Mixtral",
    "mixtral_tp2_ep2_etp1": "Mixtral",
    "qwen2moe_dist": "Qwen2Moe",
    "qwen2moe_tp2": "Qwen2Moe",
    "qwen3moe_pp2_ep2_dist": "Qwen3Moe",
    "v09_mixtral_ep2_zarr": "Mixtral",
    "v12_dsv2_yarn": "DeepseekV2",
    "v19_dsv3_dist": "DeepseekV3",
}
"""Genuine checkpoints of Megatron, and transformers' class of each."""


def load_theirs(folder: Path) -> Any:
    """Return the model that plain transformers loads, every weight from the folder.

    It may pass over heads of multi-token prediction, and nothing else.
    """
    import transformers

    [name] = json.loads((folder / "config.json").read_text())["architectures"]
    model, loading = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    ignored = loading.pop("unexpected_keys")
    config = model.config
    heads = range(config.num_hidden_layers, config.num_hidden_layers + 9)
    assert all(name.startswith(tuple(f"model.layers.{n}." for n in heads)) for name in ignored)
    assert not any(loading.values()), loading
    return model.eval()


@pytest.mark.long
@pytest.mark.parametrize("name", CLASSES)
def test_converted_oracles_give_megatrons_logits(name: str, tmp_path: Path) -> None:
    if not FAMILIES.is_dir():
        pytest.skip(f"{FAMILIES} is not here")
    source = open_checkpoint(FAMILIES / name)
    golden = torch.load(FAMILIES / name / "golden.pt", weights_only=True)
    report = convert(source, "hf", tmp_path / "out", vocab="true", true_vocab_size=TRUE_ROWS)
    assert not report.approximations
    model = load_theirs(tmp_path / "out")
    assert type(model).__name__ == f"{CLASSES[name]}ForCausalLM"
    with torch.inference_mode():
        theirs = model(golden["tokens"]).logits
    assert (theirs - golden["logits"][..., :TRUE_ROWS]).abs().max() < TOLERANCE
    # And back: the same bits, but for the rows of padding.
    back = open_checkpoint(tmp_path / "out")
    assert set(back.tensors) == set(source.tensors)
    for key, tensor in back.tensors.items():
        assert torch.equal(tensor.read(), source.tensors[key].read()[: tensor.shape[0]]), key


MOE = dataclasses.replace(
    random_models.LLAMA,
    num_layers=3,
    num_experts=4,
    moe_layers=(0, 1, 2),
    moe_ffn_hidden_size=12,
    moe_router_topk=2,
)
MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "num_query_groups": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 7,
    "kv_channels": 7,
    "qk_layernorm": True,
    "layernorm_epsilon": 1e-6,
}
SHARED_EXPERT = {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True}
V2 = dataclasses.replace(
    MOE,
    **MLA,
    moe_layers=(1, 2),
    moe_router_pre_softmax=True,
    moe_shared_expert_intermediate_size=24,
)
V3 = dataclasses.replace(
    V2,
    moe_router_pre_softmax=False,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_topk_scaling_factor=2.5,
)


def model(base: ModelConfig = MOE, **changes: Any) -> ModelConfig:
    return dataclasses.replace(base, **changes)


YARN = YarnScaling(4.0, 8, 4.0, 1.0, 1.0, 0.0)  # what Megatron takes where nothing is said
VARIANTS: dict[str, tuple[ModelConfig, str]] = {
    "mixtral": (MOE, "Mixtral"),
    "mixtral-yarn": (model(yarn=YarnScaling(4.0, 8)), "Mixtral"),
    "mixed": (model(moe_layers=(0, 2)), "Qwen2Moe"),
    "qwen2-moe": (model(add_qkv_bias=True, **SHARED_EXPERT), "Qwen2Moe"),
    "no-shared-expert": (model(add_qkv_bias=True, moe_router_pre_softmax=True), "Qwen2Moe"),
    "qwen3-moe": (model(qk_layernorm=True, kv_channels=12, moe_layers=(1, 2)), "Qwen3Moe"),
    "deepseek-v2": (V2, "DeepseekV2"),
    "deepseek-v2-yarn": (model(V2, yarn=YARN), "DeepseekV2"),
    "deepseek-v2-dense": (model(random_models.LLAMA, **MLA), "DeepseekV2"),
    "deepseek-v2-no-shared": (model(V2, moe_shared_expert_intermediate_size=0), "DeepseekV2"),
    "deepseek-v2-grouped": (
        model(V2, moe_router_num_groups=2, moe_router_group_topk=1, moe_router_group_experts=1),
        "DeepseekV2",
    ),
    "deepseek-v3": (V3, "DeepseekV3"),
    "deepseek-v3-no-bias": (model(V3, moe_router_enable_expert_bias=False), "DeepseekV3"),
    "deepseek-v3-grouped": (
        model(V3, moe_router_num_groups=2, moe_router_group_topk=1),
        "DeepseekV3",
    ),
    "deepseek-v3-single": (model(V3, moe_router_topk=1), "DeepseekV3"),
}
FILLED = ("mixed", "no-shared-expert", "deepseek-v2-no-shared", "deepseek-v3-no-bias")
"""Models that get zeros for what transformers' class has besides."""


def tokens(config: ModelConfig) -> dict[str, Tensor]:
    shape = (2, config.max_position_embeddings)
    noise = torch.Generator().manual_seed(5)
    return {"tokens": torch.randint(config.vocab_size, shape, generator=noise)}


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_a_written_mixture_computes_the_same_in_transformers(name: str, tmp_path: Path) -> None:
    config, model_class = VARIANTS[name]
    source = random_models.checkpoint(config)
    report = convert(source, "hf", tmp_path / "out", vocab="padded")
    assert type(load_theirs(tmp_path / "out")).__name__ == f"{model_class}ForCausalLM"
    inputs = tokens(config)
    ours = outputs(source, inputs)["logits"]
    assert ours.std() > 0.5
    theirs = transformers_outputs(tmp_path / "out", inputs)["logits"]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert any("are zeros" in note for note in report.notes) == (name in FILLED)
    back = read_folder(tmp_path / "out")
    assert set(source.tensors) <= set(back.tensors)
    for key, tensor in back.tensors.items():
        expected = source.tensors[key].read() if key in source.tensors else torch.zeros(())
        assert torch.equal(tensor.read(), expected.expand(tensor.shape)), key


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize("name", ["mixed", "deepseek-v2-yarn", "deepseek-v3-no-bias"])
def test_a_conversion_of_a_mixture_is_verified(name: str, tmp_path: Path) -> None:
    """Settings that only change their form, and zeros that are added, are no difference."""
    source = random_models.checkpoint(VARIANTS[name][0])
    if name.startswith("deepseek"):  # written with DeepSeek V3, left out elsewhere
        source = random_models.with_prediction_heads(source, 1)
    place = tmp_path / "out"
    asked: dict[str, Any] = {"vocab": "padded", "verify": True, "compare": verify_conversion}
    report = convert(source, "hf", place, dtype="bfloat16", **asked)
    assert report.comparison is not None and report.comparison.same


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (model(moe_shared_expert_intermediate_size=24), "Qwen2-MoE.* has a gate of it too"),
        (model(qk_layernorm=True, **SHARED_EXPERT), "Qwen3-MoE.* has no shared expert"),
        (model(qk_layernorm=True, add_qkv_bias=True), "Qwen3-MoE.* has no such biases"),
        (model(moe_router_score_function="sigmoid"), r"sigmoid scores have latent attention"),
        (model(moe_router_topk_scaling_factor=2.0), "factor of the experts' weights"),
        (
            model(moe_router_num_groups=2, moe_router_group_topk=1),
            "groups of experts have latent attention",
        ),
        (model(add_bias_linear=True), "no biases in linear layers"),
        (model(moe_router_bias=True), "routers have no biases"),
        (
            model(moe_router_topk=1, moe_apply_probs_on_input=True),
            "llama4_text has 'sigmoid' there",
        ),
        (model(activation="gelu"), "gated MLPs"),
        (model(normalization="LayerNorm"), "they have RMSNorm"),
        (model(position_embedding_type="learned_absolute"), "rotary positions"),
        (model(V2, qk_layernorm=False), "norm the latents"),
        (model(V2, moe_layers=(0, 2)), "plain layers first"),
        (model(V2, moe_shared_expert_intermediate_size=20), "so many times as wide"),
        (model(V2, moe_shared_expert_gate=True), "without a gate"),
        (model(V2, moe_router_pre_softmax=False), "softmax over the chosen experts"),
        (
            model(V2, moe_router_num_groups=2, moe_router_group_topk=1),
            "sum the best 1 of a group",
        ),
        (
            model(V3, moe_router_num_groups=2, moe_router_group_topk=1, moe_router_topk=1),
            "sum the best 2 of a group",
        ),
        (model(V2, softmax_scale=0.7), "softmax_scale 0.7"),
    ],
)
def test_a_mixture_that_no_class_has_is_refused_by_name(
    config: ModelConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        convert(random_models.checkpoint(config), "hf", tmp_path / "out", allow_approximate=True)
    assert "cannot be converted to Hugging Face" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_another_epsilon_of_latents_needs_consent(tmp_path: Path) -> None:
    """DeepSeek's classes have 1e-6 there, whatever config.json says, Megatron its only one."""
    source = random_models.checkpoint(model(V3, layernorm_epsilon=1e-2))
    with pytest.raises(InputError, match="latents have epsilon 0.01.*--allow-approximate"):
        convert(source, "hf", tmp_path / "out", vocab="padded")
    convert(source, "hf", tmp_path / "out", vocab="padded", allow_approximate=True)
    back = read_folder(tmp_path / "out")
    assert back.config.layernorm_epsilon == 1e-2
    assert back.config.latent_layernorm_epsilon == 1e-6
    inputs = tokens(source.config)
    theirs = transformers_outputs(tmp_path / "out", inputs)["logits"]
    torch.testing.assert_close(outputs(back, inputs)["logits"], theirs, rtol=0, atol=1e-4)
    assert (outputs(source, inputs)["logits"] - theirs).abs().max() > 1e-3
    # What is read with two epsilons is written with both.
    convert(back, "hf", tmp_path / "again", vocab="padded")


def test_the_bias_of_a_choice_stays_float32(tmp_path: Path) -> None:
    source = random_models.checkpoint(V3)
    convert(source, "hf", tmp_path / "out", vocab="padded", dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kept = {key for key, tensor in stored.items() if tensor.dtype == torch.float32}
    assert kept == {f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (1, 2)}
    name = "decoder.layers.2.mlp.router.expert_bias"
    back = read_folder(tmp_path / "out")
    assert torch.equal(back.tensors[name].read(), source.tensors[name].read())
    half = {key: tensor.bfloat16() for key, tensor in random_models.state_dict(V3).items()}
    convert(random_models.checkpoint(V3, half), "hf", tmp_path / "half", vocab="padded")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {key for key, tensor in stored.items() if tensor.dtype == torch.float32} == kept


@pytest.mark.long
@pytest.mark.parametrize("to", ["megatron", "torch_dist"])
@pytest.mark.parametrize("name", ["mixtral_tp2_ep2", "qwen2moe_tp2", "dsv2lite", "dsv3_bf16_tp2"])
def test_megatrons_mixtures_go_to_hugging_face_and_back(name: str, to: str, tmp_path: Path) -> None:
    """Megatron -> Hugging Face -> Megatron: the same weights and the same settings."""
    if not FAMILIES.is_dir():
        pytest.skip(f"{FAMILIES} is not here")
    source = open_checkpoint(FAMILIES / name)
    convert(source, "hf", tmp_path / "hf", vocab="padded")
    convert(open_checkpoint(tmp_path / "hf"), to, tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    assert same_tensors(back, source)
    assert compare_settings(source.config, back.config, ("a", "b")) == ([], [])


@pytest.mark.long
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen2-moe-mixed", "qwen3-moe", "deepseek-v2", "deepseek-v3-one-group"]
)
def test_mixtures_go_through_megatrons_files_bit_for_bit(
    kind: str, tp: int, tmp_path: Path
) -> None:
    gpt_model(kind).save_pretrained(tmp_path / "theirs")
    source = open_checkpoint(tmp_path / "theirs")
    convert(source, "megatron", tmp_path / "megatron", tp=tp, true_vocab_size=40)
    convert(open_checkpoint(tmp_path / "megatron"), "hf", tmp_path / "ours", true_vocab_size=40)
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("deepseek-v2-lite", "latent_layernorm_epsilon = 1e-06"),
        ("deepseek-v2-groups", "moe_router_group_experts = 1"),
    ],
)
def test_what_megatron_cannot_say_of_a_mixture_is_named(
    kind: str, setting: str, tmp_path: Path
) -> None:
    gpt_model(kind).save_pretrained(tmp_path / "theirs")
    with pytest.raises(InputError, match=f"has {setting}, which Megatron's args cannot say"):
        convert(open_checkpoint(tmp_path / "theirs"), "megatron", tmp_path / "out")


# --- what stands in files -----------------------------------------------------------------------


def same_tensors(one: Checkpoint, other: Checkpoint) -> bool:
    return set(one.tensors) == set(other.tensors) and all(
        torch.equal(one.tensors[name].read(), other.tensors[name].read()) for name in one.tensors
    )


@pytest.mark.parametrize("kind", ["mixtral", "qwen2-moe-mixed", "qwen3-moe", "deepseek-v3"])
def test_fused_experts_shards_and_bin_files_are_read_alike(kind: str, tmp_path: Path) -> None:
    """Files of the Hub have tensors for each expert, a state dict of transformers 5 two of all."""
    theirs = gpt_model(kind)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    one = open_checkpoint(tmp_path / "one")
    assert same_tensors(open_checkpoint(tmp_path / "shards"), one)
    fused = theirs.state_dict()
    assert any(key.endswith("experts.gate_up_proj") for key in fused)
    single = load_file(tmp_path / "one" / "model.safetensors")
    for name, state in (("fused", fused), ("by-expert", single)):
        place = tmp_path / name
        place.mkdir()
        shutil.copy(tmp_path / "one" / "config.json", place)
        names = sorted(state)
        parts = (names[::2], names[1::2])
        files = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
        for file, keys in zip(files, parts, strict=True):
            torch.save({key: state[key] for key in keys}, place / file)
        weight_map = {key: file for file, keys in zip(files, parts, strict=True) for key in keys}
        index = {"metadata": {}, "weight_map": weight_map}
        (place / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert same_tensors(open_checkpoint(place), one)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    gpt_model("qwen3-moe").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mlp.experts.5.up_proj.weight"
    save_file({key: value for key, value in state.items() if key != lost}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"lacks {lost}"):
        open_checkpoint(tmp_path)


def test_a_layer_too_many_is_no_head_of_multi_token_prediction(tmp_path: Path) -> None:
    gpt_model("deepseek-v3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="tensor"):
        open_checkpoint(tmp_path)


def test_no_groups_by_hand_is_one_sentence(tmp_path: Path) -> None:
    gpt_model("deepseek-v3").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="moe_router_"):
        open_checkpoint(tmp_path, {"moe_router_num_groups": 0})


# --- 8-bit weights ------------------------------------------------------------------------------

BLOCK = (8, 16)  # neither divides what it is made of here evenly
FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}


def quantised(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a matrix in 8-bit floats, its blocks' scales, and what the two stand for."""
    rows, columns = BLOCK
    values, plain = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale = weight[part].abs().max() / 448
            values[part] = (weight[part] / scale).to(torch.float8_e4m3fn)
            plain[part] = values[part].float() * scale
            scales[i, j] = scale
    return values, scales, plain


def write_quantised(kind: str, folder: Path, *, binary: bool = False) -> dict[str, Tensor]:
    """Write a model as DeepSeek publishes its own; return its weights dequantised."""
    gpt_model(kind).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    stored, plain = dict(state), dict(state)
    for name, weight in state.items():
        if weight.dim() == 2 and "layers." in name and ".mlp.gate." not in name:
            stored[name], stored[f"{name}_scale_inv"], plain[name] = quantised(weight)
    assert len(stored) > 1.5 * len(state)
    save_file(stored, folder / "model.safetensors")
    if binary:
        torch.save(stored, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"quantization_config": FP8}))
    return plain


@pytest.mark.parametrize(("kind", "binary"), [("deepseek-v3", False), ("qwen3-moe", True)])
def test_8_bit_weights_are_dequantised_while_they_are_read(
    kind: str, binary: bool, tmp_path: Path
) -> None:
    expected = write_quantised(kind, tmp_path / "packed", binary=binary)
    packed = open_checkpoint(tmp_path / "packed")
    assert any("8-bit floats" in note for note in packed.provenance.notes)
    shutil.copytree(tmp_path / "packed", tmp_path / "plain")
    (tmp_path / "plain" / "pytorch_model.bin").unlink(missing_ok=True)
    save_file(expected, tmp_path / "plain" / "model.safetensors")
    hf = json.loads((tmp_path / "packed" / "config.json").read_text())
    del hf["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(hf))
    plain = open_checkpoint(tmp_path / "plain")
    assert same_tensors(packed, plain)
    for name, parameter in parameters(packed.config).items():  # and so are all slices
        whole = plain.tensors[name].read()
        for dim, size in enumerate(parameter.shape):
            some = torch.tensor([size - 1, 0])
            for index in (slice(size // 3, size), some):
                rows = torch.arange(size)[index]
                found = packed.tensors[name].read(dim, index)
                assert torch.equal(found, whole.index_select(dim, rows)), (name, dim)
    report = convert(packed, "hf", tmp_path / "out", dtype="bfloat16")
    assert "quantization_config" not in json.loads((report.path / "config.json").read_text())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: value.bfloat16().tolist() for key, value in expected.items()} == {
        key: value.bfloat16().tolist() for key, value in written.items()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_block_size": None}, "weight_block_size .* is None"),
        ({"weight_block_size": [8, 0]}, r"weight_block_size .* is \[8, 0\]"),
        ({"weight_block_size": [4, 16]}, "files of two models may be mixed"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt .* is 'ue8m0'"),
        ({"activation_scheme": "static"}, "activation_scheme .* is 'static'"),
        ({"quant_method": "gptq"}, "quantized weights"),
    ],
)
def test_other_8_bit_weights_are_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_quantised("qwen3-moe", tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    hf["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)


def test_8_bit_weights_without_their_scales_are_refused(tmp_path: Path) -> None:
    write_quantised("qwen3-moe", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    scale = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    for lost, message in (
        (scale, "float8_e4m3fn, which mlm-eval does not read"),
        (scale.removesuffix("_scale_inv"), f"{scale} but not"),
    ):
        save_file({key: t for key, t in state.items() if key != lost}, tmp_path / "x")
        (tmp_path / "x").rename(tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=message):
            open_checkpoint(tmp_path)


class _Watched(InMemory):
    """A tensor that remembers the largest read."""

    largest = 0

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        """See `LazyTensor.read`."""
        values = super().read(dim, index)
        self.largest = max(self.largest, values.nbytes)
        return values


def test_experts_are_converted_one_at_a_time(tmp_path: Path) -> None:
    """However many there are, no more than one expert's matrix is read at a time."""
    config = model(num_experts=16)
    plain = random_models.checkpoint(config)
    watched = {name: _Watched(tensor.read()) for name, tensor in plain.tensors.items()}
    convert(dataclasses.replace(plain, tensors=dict(watched)), "hf", tmp_path / "out")
    experts = {name: tensor for name, tensor in watched.items() if ".experts." in name}
    assert len(experts) == 6
    for name, tensor in experts.items():
        assert 0 < tensor.largest <= tensor.nbytes // 16, name


# --- what config.json says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen2-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3-moe", {"mlp_only_layers": [0.5]}, "mlp_only_layers is"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, r"lacks model\.layers\.1\.mlp\.gate_proj"),
        ("deepseek-v2", {"num_experts_per_tok": None}, "num_experts_per_tok is None"),
        ("deepseek-v2", {"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek-v2", {"topk_method": "group_limited_greedy"}, "n_group is None"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek-v3", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("deepseek-v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek-v3", {"n_group": 8}, "n_group is 8 for 8 experts"),
        ("deepseek-v3", {"n_group": 3}, "config.json n_group.*a divisor of num_experts"),
        ("deepseek-v3", {"topk_group": 1}, "config.json num_experts_per_tok.*kept groups"),
        ("deepseek-v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2 for 4 heads"),
        ("deepseek-v3", {"head_dim": 8}, "head_dim is 8, but the other sizes say 4"),
        ("deepseek-v3", {"qk_head_dim": 8}, "qk_head_dim is 8, but the other sizes say 10"),
        ("deepseek-v3", {"attention_bias": True}, "biases of latents"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek-v3", {"n_routed_experts": 12}, r"mlp\.gate\.weight has shape \[8, 32\]"),
    ],
)
def test_a_mixture_that_is_not_computed_is_refused_by_its_key(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    gpt_model(kind).save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | changes))
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)
