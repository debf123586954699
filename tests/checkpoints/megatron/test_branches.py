"""Hybrids and heterogeneous layers in Megatron's files: names, parts, and what args say of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED
from support import random_models
from support.configs import MAMBA
from support.folders.synthetic import LLAMA, args_of
from support.paths import ORACLES

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ConfigBuilder, ModelConfig
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.distcp import open_folder
from mlm_eval.checkpoints.files.torch_file import read_torch_file
from mlm_eval.checkpoints.lazy import InMemory
from mlm_eval.checkpoints.megatron.args import build_config
from mlm_eval.checkpoints.megatron.layers.branches import args_of_branches
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import allowed_tp, check_tp, parameters

HYBRID = dataclasses.replace(
    LLAMA,
    num_layers=5,
    no_mixer_layers=(1, 4),
    no_mlp_layers=(0, 2, 3),
    mamba_layers=(0, 3),
    **MAMBA,
)
HETEROGENEOUS = dataclasses.replace(
    LLAMA,
    num_layers=5,
    num_query_groups=4,
    layer_query_groups=(2, 0, 4, 0, 0),
    ffn_hidden_size=24,
    layer_ffn_hidden_sizes=(24, 8, 0, 0, 0),
    no_mixer_layers=(1, 4),
    no_mlp_layers=(2, 4),
    linear_mixer_layers=(3,),
    linear_mlp_layers=(3,),
)


def build(config: ModelConfig, **more: Any) -> ConfigBuilder:
    args = vars(args_of(config)) | args_of_branches(config) | more
    return build_config(
        {name: parameter.shape for name, parameter in parameters(config).items()},
        {name: value for name, value in args.items() if value is not ...},
        family="gpt",
        code="core",
        overrides={},
        where="here",
        params_dtype="float32",
    )


@pytest.mark.parametrize(
    "config",
    [
        HYBRID,
        HETEROGENEOUS,
        dataclasses.replace(HYBRID, no_mixer_layers=(), no_mlp_layers=(0, 1, 2, 3, 4)),
        dataclasses.replace(
            HYBRID,
            no_mixer_layers=(),
            no_mlp_layers=(0, 1, 2, 3, 4),
            mamba_layers=(0, 1, 2, 3, 4),
            num_query_groups=4,
            kv_channels=4,
        ),
        dataclasses.replace(
            HYBRID,
            num_experts=4,
            moe_layers=(4,),
            moe_router_topk=2,
            moe_ffn_hidden_size=6,
        ),
    ],
    ids=["hybrid", "heterogeneous", "no MLP", "Mamba alone", "experts"],
)
def test_args_and_shapes_give_the_config_again(config: ModelConfig):
    more = {}
    if config.num_experts:
        more = {"num_experts": 4, "moe_router_topk": 2, "moe_layer_freq": 1}
    assert build(config, **more).config == config


def test_a_hybrid_without_a_pattern_is_told_by_its_parameters():
    found = build(HYBRID, hybrid_override_pattern=...)
    assert found.config == HYBRID
    newer = build(HYBRID, hybrid_override_pattern=..., hybrid_layer_pattern="M-|*M|-/MM")
    assert newer.config == HYBRID


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (HYBRID, {"hybrid_override_pattern": "M-*"}, "holds 5 layers where its args describe 3"),
        (HYBRID, {"hybrid_override_pattern": "M-MM-"}, "attention of 2 in layer 2 .* describe mam"),
        (HYBRID, {"hybrid_override_pattern": "M-GM-"}, "layers of the kind 'G'"),
        (HYBRID, {"mamba_state_dim": 4}, "does not fit 8 channels of heads"),
        (HYBRID, {"mamba_num_heads": 2}, "mamba_num_heads 4 where its args say 2"),
        (LLAMA, {"is_hybrid_model": True}, "one branch each, but layer 0 has attention of 2 and p"),
        (LLAMA, {"hybrid_override_pattern": "****"}, "has attention of 2 and plain MLP of 24 in l"),
        (HETEROGENEOUS, {"heterogeneous_layers_config_encoded_json": "{}"}, "is not JSON with a l"),
        (HETEROGENEOUS, {"heterogeneous_layers_config_encoded_json": "[" * 9999}, "is not JSON"),
        (
            HETEROGENEOUS,
            args_of_branches(
                dataclasses.replace(HETEROGENEOUS, layer_query_groups=(1, 0, 4, 0, 0))
            ),
            "attention of 2 and plain MLP of 24 in layer 0 .* attention of 1 and plain MLP of 24",
        ),
    ],
)
def test_args_that_contradict_the_layers_are_refused(
    config: ModelConfig, change: dict[str, Any], message: str
):
    with pytest.raises(InputError, match=f"^here.*{message}"):
        build(config, **change)


def test_the_widths_of_nvidias_json_are_rounded_up():
    """ffn_mult counts 2/3 of the hidden size, to multiples of 256. Only a path makes it act."""
    wide = dataclasses.replace(LLAMA, num_layers=1, ffn_hidden_size=256)
    ffn = {"no_op": False, "replace_with_linear": False, "ffn_mult": 1.5}
    attention = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 2}
    text = json.dumps({"block_configs": [{"attention": attention, "ffn": ffn}]})
    path = {"heterogeneous_layers_config_path": "/elsewhere/config.json"}
    content = {"heterogeneous_layers_config_encoded_json": text}
    assert build(wide, **path, **content).config == wide
    with pytest.raises(InputError, match="plain MLP of 24 in layer 0 .* plain MLP of 256"):
        build(dataclasses.replace(wide, ffn_hidden_size=24), **path, **content)
    narrow = dataclasses.replace(wide, ffn_hidden_size=24)
    assert build(narrow, **content).config == narrow


def test_packed_rows_are_joined_part_by_part():
    """A rank's rows are [z; x; B; C; dt] of its own heads: end to end, the ranks' are no model."""
    whole = parameters(HYBRID)["decoder.layers.0.mixer.in_proj.weight"]
    values = torch.randn(whole.shape)
    z, x, B, C, dt = values.split([8, 8, 6, 6, 4])
    ranks = [torch.cat([part.chunk(2)[rank] for part in (z, x, B, C, dt)]) for rank in range(2)]
    assert torch.equal(whole.rule.merge([InMemory(part) for part in ranks]).read(), values)
    assert not torch.equal(torch.cat(ranks), values)
    for rank in range(2):
        assert torch.equal(values[whole.index(rank, 2)], ranks[rank])
        assert torch.equal(values[whole.part(rank, 2)], ranks[rank])
    # Four ranks share two groups: each computes with a copy of one, and no file holds that.
    quarter = values[whole.index(1, 4)]
    assert torch.equal(quarter[4:7], B[:3]) and torch.equal(quarter[-1:], dt[1:2])
    with pytest.raises(InputError, match="2 heads or groups, which 4 does not divide"):
        whole.part(0, 4)


def test_sizes_that_divide_a_hybrid():
    assert allowed_tp(HYBRID) == [1, 2, 4]
    uneven = dataclasses.replace(HYBRID, mamba_num_heads=12, mamba_num_groups=3)
    assert allowed_tp(uneven) == [1]
    with pytest.raises(InputError, match="4 attention heads and 12 Mamba heads and an MLP of wid"):
        check_tp(uneven, 5)
    assert allowed_tp(HETEROGENEOUS) == [1, 2, 4]
    with pytest.raises(InputError, match="MLP of width 8 and an MLP of width 24 and a matrix in"):
        check_tp(HETEROGENEOUS, 3)


def test_a_layer_that_holds_nothing_is_counted():
    """The last layer has neither branch: no key tells of it, the JSON does."""
    assert build(HETEROGENEOUS).config.num_layers == 5
    with pytest.raises(InputError, match="4 layers where its args say 5"):
        build(HETEROGENEOUS, heterogeneous_layers_config_path="")


@pytest.mark.parametrize("name", ["nas_tp2", "nemotronh_tp2"])
def test_genuine_files_say_what_their_layers_are(name: str):
    config = open_checkpoint(ORACLES / name).config
    kinds = [(config.mixer(n), config.feed_forward(n)) for n in range(config.num_layers)]
    plain, no_mlp = ("attention", "plain MLP"), "none"
    if name == "nas_tp2":
        assert kinds == [plain, ("none", "plain MLP"), ("attention", no_mlp), ("linear", "linear")]
    else:
        letters = {"mamba": "M", "attention": "*", "none": "-"}
        assert "".join(letters[mixer] for mixer, _ in kinds) == "M-M*-M"


def test_impossible_layers_are_refused():
    for change, message in (
        ({"mamba_layers": (0, 1)}, "layer 1 is in several of no_mixer_layers"),
        ({"mamba_num_groups": 3}, "does not divide mamba_num_heads"),
        ({"mamba_state_dim": 0}, "mamba_state_dim is 0"),
        ({"layer_ffn_hidden_sizes": (0, 24, 0, 0, 24, 1)}, "must hold a number for each of 5"),
        ({"layer_ffn_hidden_sizes": (0, 23, 0, 0, 9)}, "ffn_hidden_size as the largest"),
        ({"family": "bert"}, "go with GPT models only"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(HYBRID, **change)


def test_names_of_other_specs(tmp_path: Path):
    """Some specs keep Mamba's norm beside the mixer, and the final norm under its usual name."""
    checkpoint = random_models.checkpoint(HYBRID)
    renamed = {"mixer.in_proj.layer_norm_weight": "norm.weight", "final_norm": "final_layernorm"}
    model = {}
    for name, tensor in checkpoint.tensors.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        model[name.replace("layers.0.input_layernorm", "layers.0.norm")] = tensor.read()
    args = args_of(HYBRID, **args_of_branches(HYBRID))
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"args": args, "checkpoint_version": 3.0, "model": model}, path)
    found = open_checkpoint(path)
    assert found.config == dataclasses.replace(HYBRID, params_dtype="float32")
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(found.tensors[name].read(), tensor.read())


# ---- writing -----------------------------------------------------------------------------------

EXPERTS = dataclasses.replace(
    HYBRID,
    num_experts=4,
    moe_layers=(4,),
    moe_router_topk=2,
    moe_ffn_hidden_size=6,
    mamba_min_time_step=0.25,
    mamba_norm_epsilon=1e-3,
)


def same_tensors(one: Checkpoint, other: Checkpoint) -> bool:
    return set(one.tensors) == set(other.tensors) and all(
        torch.equal(tensor.read(), other.tensors[name].read())
        for name, tensor in one.tensors.items()
    )


@pytest.mark.parametrize("config", [HYBRID, HETEROGENEOUS, EXPERTS], ids=["M", "NAS", "E"])
@pytest.mark.parametrize(
    ("to", "sizes"),
    [
        ("megatron", {}),
        ("megatron", {"tp": 2}),
        ("megatron", {"tp": 2, "pp": 5}),
        ("torch_dist", {"tp": 2}),
    ],
)
def test_what_is_written_is_read_again(
    config: ModelConfig, to: str, sizes: dict[str, int], tmp_path: Path
):
    if config is HETEROGENEOUS and "pp" in sizes:
        with pytest.raises(InputError, match="layer 4, the last of its stage, has neither"):
            convert(random_models.checkpoint(config), to, tmp_path / "out", **sizes)
        return
    source = random_models.checkpoint(config)
    done = convert(source, to, tmp_path / "out", **sizes)
    found = open_checkpoint(done.path)
    assert found.config == dataclasses.replace(config, params_dtype="float32")
    assert same_tensors(found, source)
    told = [warning for warning in done.warnings if "Mamba" in warning]
    assert len(told) == (2 if config is EXPERTS else 0)


@pytest.mark.parametrize("name", ["nas_tp2", "nemotronh_tp2"])
def test_genuine_files_are_written_as_megatron_wrote_them(name: str, tmp_path: Path):
    """Every key of each rank's file, its extra states included, and every tensor."""
    done = convert(open_checkpoint(ORACLES / name), "megatron", tmp_path / "out", tp=2)
    for rank in range(2):
        file = f"iter_0000001/mp_rank_0{rank}/model_optim_rng.pt"
        ours, theirs = (
            read_torch_file(folder / file).value["model"] for folder in (done.path, ORACLES / name)
        )
        assert set(ours) == set(theirs)
        for key, tensor in theirs.items():
            if not key.endswith("_extra_state"):
                assert torch.equal(ours[key].read(), tensor.read()), key


def test_the_keys_of_torch_dist_are_megatrons(tmp_path: Path):
    genuine = SHARED / "oracles" / "families" / "nemotronh_dist" / "iter_0000001"
    if not genuine.is_dir():
        pytest.skip(f"{genuine} is not here")
    source = open_checkpoint(genuine.parent)
    done = convert(source, "torch_dist", tmp_path / "out")
    ours, theirs = open_folder(next(done.path.glob("iter_*"))), open_folder(genuine)
    assert {k: t.shape for k, t in ours.tensors.items()} == {
        k: t.shape for k, t in theirs.tensors.items()
    }
    assert set(theirs.objects) - set(ours.objects) <= {"output_layer._extra_state/shard_0_1"}
    assert same_tensors(open_checkpoint(done.path), source)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (HYBRID, {"no_mlp_layers": (0, 2)}, "no Mamba-2 in layers that have an MLP too"),
        (HYBRID, {"mamba_conv_width": 3}, "no convolution but of 4 positions"),
    ],
)
def test_what_megatron_core_lacks_is_not_written(
    config: ModelConfig, change: dict[str, Any], message: str, tmp_path: Path
):
    source = random_models.checkpoint(dataclasses.replace(config, **change))
    for to in ("megatron", "torch_dist"):
        with pytest.raises(InputError, match=message):
            convert(source, to, tmp_path / "out")


def test_ranks_that_would_share_a_group_are_not_written(tmp_path: Path):
    with pytest.raises(InputError, match="Megatron wants tp to divide Mamba's 2 groups"):
        convert(random_models.checkpoint(HYBRID), "megatron", tmp_path / "out", tp=4)
