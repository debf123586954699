"""Windows, Gemma, gpt-oss: over ranks, from Megatron's own files, and from packed weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file, save_file
from support.huggingface_models import (
    GEMMA,
    GPT_OSS,
    LLAMA4,
    gpt_model,
    our_log_probs,
    randomize,
    their_log_probs,
    theirs,
    tokens,
)
from support.ranks import run_ranks
from torch import Tensor

from mlm_eval.checkpoints.config import parse_overrides
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.read import read_folder
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import parameters
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.plain_transformers import transformers_outputs
from mlm_eval.engine.score import Request

# ---- over ranks --------------------------------------------------------------------------------

CUT = ("mistral-window", "qwen2-window", "gemma2", "gemma3-scaled", "gpt-oss", "llama4")
CUT += ("mixtral", "qwen2-moe-mixed", "deepseek-v2-groups", "deepseek-v3")


def scores(folder: Path, tp: int) -> dict[str, Tensor]:
    """Return the log-probabilities of each model's tokens."""
    found = {}
    for kind in CUT:
        engine = Engine.load(open_checkpoint(folder / kind), tp=tp, dtype="float32")
        rows = [Request(row, row.numel() - 1) for row in tokens()]
        found[kind] = engine.score(rows).logprobs.view(len(rows), -1)
    return found


@pytest.mark.process
def test_two_ranks_agree_with_transformers(tmp_path: Path) -> None:
    expected = {}
    for kind in CUT:
        model = gpt_model(kind)
        model.save_pretrained(tmp_path / kind)
        expected[kind] = their_log_probs(model, tokens())
    for found in run_ranks(2, scores, tmp_path, 2):
        for kind, values in expected.items():
            torch.testing.assert_close(found[kind], values, rtol=0, atol=2e-4, msg=kind)


# ---- from Megatron's own files -----------------------------------------------------------------

CONVERTED = {
    "swa_alt_dist": ([], "Qwen2ForCausalLM"),
    "gptoss_yarn": ([], "GptOssForCausalLM"),
    "geglu": (["activation=geglu_tanh"], "LlamaForCausalLM"),
}
UNLIKE = {
    "sink_alt_tp2": "softmax_type 'learnable'",
    "quickgeglu_clamp": "activation_func_clamp_value 1.0",
    "softmax_scale": "softmax_scale 0.4",
    "gate": "gates of the attention's output",
    "nope_list_dist": "no_rope_layers",
    "llama4": "no_l2_norm_layers",
    "moe_bias_gelu": "mixture of experts",
}


@pytest.fixture
def families() -> Path:
    """Return the folder of the genuine checkpoints; skip where it is not."""
    folder = SHARED / "oracles" / "families"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder


@pytest.mark.parametrize("name", CONVERTED)
def test_transformers_computes_what_megatron_did(name: str, families: Path, tmp_path: Path) -> None:
    settings, model_class = CONVERTED[name]
    checkpoint = open_checkpoint(families / name, parse_overrides(settings))
    convert(checkpoint, "hf", tmp_path / "out", vocab="padded")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [model_class]
    golden = torch.load(families / name / "golden.pt", weights_only=True)
    found = transformers_outputs(tmp_path / "out", {"tokens": golden["tokens"]})["logits"]
    assert golden["logits"].std() > 0.5
    torch.testing.assert_close(found, golden["logits"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", UNLIKE)
def test_what_no_class_computes_is_refused_by_its_name(
    name: str, families: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=UNLIKE[name]):
        convert(open_checkpoint(families / name), "hf", tmp_path / "out", vocab="padded")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("gemma2", ("capped attention scores", "norms of branches", "scaled embeddings")),
        ("gemma3", ("a rotary base of windowed layers", "norms of branches")),
        ("llama4", ("L2 norms of queries and keys in some layers only",)),
        ("mistral-window", ()),
    ],
)
def test_what_megatron_has_no_option_for_is_told(
    kind: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    gpt_model(kind).save_pretrained(tmp_path / "hf")
    source = open_checkpoint(tmp_path / "hf")
    report = convert(source, "torch_dist", tmp_path / "out")
    said = [one for one in report.warnings if "Megatron-LM has no option" in one]
    assert all(any(part in one for one in said) for part in parts)
    assert bool(said) == bool(parts)
    assert open_checkpoint(report.path).config == source.config


# ---- models of text and images -----------------------------------------------------------------

PICTURES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def model_of_images(kind: str) -> Any:
    """Return a small random model of text and images."""
    import transformers

    text = {**(GEMMA if kind == "Gemma3" else LLAMA4)}
    pictures = {**PICTURES}
    if kind == "Llama4":
        pictures |= {"vision_output_dim": 16, "projector_input_dim": 16}
        pictures |= {"projector_output_dim": 16, "pixel_shuffle_ratio": 0.5}
    more = {"mm_tokens_per_image": 4} if kind == "Gemma3" else {}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=pictures, **more
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("kind", ["Gemma3", "Llama4"])
@pytest.mark.parametrize("names", ["as saved", "of its modules"])
def test_the_language_model_of_a_model_of_images_is_read(
    kind: str, names: str, tmp_path: Path
) -> None:
    model = model_of_images(kind)
    model.save_pretrained(tmp_path)
    if names == "of its modules":
        state = {key: value.clone() for key, value in model.state_dict().items()}
        if kind == "Gemma3":  # tied
            del state["lm_head.weight"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    [warning] = [one for one in checkpoint.provenance.warnings if "images" in one]
    assert "its language model is read" in warning
    expected = their_log_probs(model, tokens())
    torch.testing.assert_close(our_log_probs(checkpoint, tokens()), expected, rtol=0, atol=2e-4)
    report = convert(checkpoint, "hf", tmp_path / "text")
    written = json.loads((tmp_path / "text/config.json").read_text())
    assert written["architectures"] == [f"{kind}ForCausalLM"]
    found = transformers_outputs(report.path, {"tokens": tokens()})["logits"]
    with torch.inference_mode():
        torch.testing.assert_close(found, model(tokens()).logits, rtol=0, atol=2e-4)


def test_two_language_models_of_one_model_of_images_are_refused(tmp_path: Path) -> None:
    model = model_of_images("Gemma3")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    [name] = [key for key in state if key.endswith("language_model.model.norm.weight")] or [
        key for key in state if key.endswith("language_model.norm.weight")
    ]
    twice = "model.norm.weight"
    save_file(state | {twice: state[name] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="model.norm.weight under two names"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "model of text and images, but its text_config is None"),
        ({"text_config": {"model_type": "llama"}}, "model_type 'llama', expected 'gemma3_text'"),
    ],
)
def test_a_model_of_images_without_a_language_model_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"} | changes))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        read_folder(tmp_path)


# ---- packed weights ----------------------------------------------------------------------------

PACKED = GPT_OSS | {"hidden_size": 64, "intermediate_size": 32}


def packed_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write a gpt-oss with MXFP4 experts as published; return its tensors, packed and not.

    What is not packed was unpacked by transformers' own function.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = theirs("GptOssForCausalLM", PACKED)
    noise = torch.Generator().manual_seed(7)
    packed, plain = {}, {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = plain[name] = tensor.clone()
            continue
        experts, width, rows = tensor.shape
        shape = (experts, rows, width // 32, 16)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)
        scales = torch.randint(121, 127, shape[:3], dtype=torch.uint8, generator=noise)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    model.save_pretrained(folder)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["x"]}
    (folder / "config.json").write_text(json.dumps(config))
    return packed, plain


def test_packed_experts_are_what_transformers_unpacks(tmp_path: Path) -> None:
    _, plain = packed_folder(tmp_path / "packed")
    checkpoint = open_checkpoint(tmp_path / "packed")
    said = "the experts' 4 weights stored as MXFP4 become bfloat16 as they are read"
    assert said in checkpoint.provenance.notes
    model = theirs("GptOssForCausalLM", PACKED)
    model.load_state_dict({name: value.float() for name, value in plain.items()})
    expected = their_log_probs(model, tokens())
    torch.testing.assert_close(our_log_probs(checkpoint, tokens()), expected, rtol=0, atol=2e-4)
    # Converting writes plain weights, the same to the last bit.
    convert(checkpoint, "hf", tmp_path / "plain")
    written = load_file(tmp_path / "plain/model.safetensors")
    assert set(written) == set(plain)
    assert all(torch.equal(written[name], plain[name]) for name in plain)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_reads_its_part_of_packed_experts(tp: int, tmp_path: Path) -> None:
    packed_folder(tmp_path)
    checkpoint = read_folder(tmp_path)
    for name, parameter in parameters(checkpoint.config).items():
        whole = checkpoint.tensors[name].read()
        for rank in range(tp):
            index = parameter.index(rank, tp)
            part = checkpoint.tensors[name].read(parameter.dim, index)
            chosen = torch.arange(whole.shape[parameter.dim])
            chosen = chosen if index is None else chosen[index]
            assert torch.equal(part, whole.index_select(parameter.dim, chosen)), name


def test_packed_experts_of_another_kind_are_refused(tmp_path: Path) -> None:
    packed, _ = packed_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for settings, message in (
        ({"quant_method": "gptq"}, "quant_method 'gptq'), which mlm-eval does not compute"),
        ("mxfp4x", "quant_method 'mxfp4x'"),
        ({}, "quant_method None"),
    ):
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"quantization_config": settings})
        )
        with pytest.raises(InputError) as caught:
            read_folder(tmp_path)
        assert message in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = "model.layers.1.mlp.experts.down_proj_scales"
    for change, message in (
        ({name: packed[name][:, :3].clone()}, "has no scales that fit"),
        ({name: packed[name].int()}, "are not uint8"),
    ):
        save_file(packed | change, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=message):
            read_folder(tmp_path)
    save_file({k: v for k, v in packed.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="down_proj_scales missing"):
        read_folder(tmp_path)
