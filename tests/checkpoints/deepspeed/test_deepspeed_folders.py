"""Megatron-DeepSpeed's folders, the doors to any of DeepSpeed's, what is refused with a way out."""

from __future__ import annotations

import dataclasses
import enum
import os
import shutil
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import synthetic
from support.folders.deepspeed_folders import write_fork, write_neox
from support.folders.synthetic import args_of

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig, parse_overrides
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint

BLOOM = dataclasses.replace(
    synthetic.GPT,
    position_embedding_type="alibi",
    embedding_layernorm=True,
    activation="gelu_tanh",
)
LLAMA = dataclasses.replace(synthetic.LLAMA, rotary_base=50000.0)


class PositionEmbeddingType(enum.Enum):
    """BigScience's enum of kinds of positions."""

    rotary = 1
    absolute = 2
    alibi = 3


@pytest.fixture
def fork_enum(monkeypatch: pytest.MonkeyPatch) -> type[PositionEmbeddingType]:
    """Return the enum as the fork's module has it, so that pickles name that module."""
    module = types.ModuleType("megatron.enums")
    monkeypatch.setattr(PositionEmbeddingType, "__module__", "megatron.enums")
    monkeypatch.setattr(module, "PositionEmbeddingType", PositionEmbeddingType, raising=False)
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.enums", module)
    return PositionEmbeddingType


def bloom_args(**more: Any) -> Namespace:
    return args_of(BLOOM, embed_layernorm=True, tensor_model_parallel_size=2, rank=3, **more)


def llama_args(**more: Any) -> Namespace:
    """Return args in the words of the later fork."""
    args = args_of(LLAMA, num_key_value_heads=LLAMA.num_query_groups, rope_theta=50000.0, **more)
    args.normalization = "rmsnorm"
    for name in ("num_query_groups", "group_query_attention"):
        delattr(args, name)
    args.num_experts = [1]
    return args


def assert_same(found: Checkpoint, model: synthetic.Model) -> None:
    assert found.tensors.keys() == model.keys()
    for name, tensor in model.items():
        assert torch.equal(found.tensors[name].read(), tensor), name


@pytest.mark.parametrize("pipeline", [True, False], ids=["layers", "modules"])
@pytest.mark.parametrize(
    ("config", "args", "first_block"),
    [(BLOOM, bloom_args, 3), (LLAMA, llama_args, 2)],
    ids=["BLOOM", "Llama"],
)
def test_megatron_deepspeed_is_read_as_it_was_trained(
    config: ModelConfig,
    args: Callable[..., Namespace],
    first_block: int,
    pipeline: bool,
    tmp_path: Path,
):
    model = synthetic.random_model(config)
    saved = args()
    saved.tensor_model_parallel_size = 2
    root = write_fork(
        tmp_path, model, config, saved, tp=2, first_block=first_block, pipeline=pipeline
    )
    found = open_checkpoint(root)
    assert found.config == config
    assert found.provenance.warnings == []
    assert (found.provenance.format, found.provenance.iteration) == ("deepspeed", 7)
    assert_same(found, model)


def test_unknown_args_about_the_model_are_listed(tmp_path: Path) -> None:
    args = bloom_args()
    args.tensor_model_parallel_size = 1
    args.new_attention_window, args.mlp_gain, args.lr_shape = 7, None, "round"
    root = write_fork(tmp_path, synthetic.random_model(BLOOM), BLOOM, args, first_block=3)
    [warning] = open_checkpoint(root).provenance.warnings
    assert warning.endswith("which are not heeded: new_attention_window")


@pytest.mark.parametrize("member", list(PositionEmbeddingType), ids=str)
def test_the_forks_enum_is_read_without_its_module(
    member: PositionEmbeddingType, fork_enum: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kinds = {"rotary": "rope", "absolute": "learned_absolute", "alibi": "alibi"}
    config = dataclasses.replace(BLOOM, position_embedding_type=kinds[member.name])
    model = synthetic.random_model(config)
    args = args_of(config, embed_layernorm=True, position_embedding_type=member)
    root = write_fork(tmp_path, model, config, args)
    monkeypatch.delitem(sys.modules, "megatron.enums")
    found = open_checkpoint(root)
    assert found.config.position_embedding_type == kinds[member.name]
    assert "megatron.enums.PositionEmbeddingType" in found.provenance.pickle_classes
    assert_same(found, model)


# ---- doors -------------------------------------------------------------------------------------


@pytest.fixture
def neox(tmp_path: Path) -> Path:
    """Return a root of two ranks, with a tracker of Megatron's that names nothing."""
    config = dataclasses.replace(
        synthetic.GPT, position_embedding_type="rope", parallel_residual=True
    )
    root = write_neox(tmp_path / "run", synthetic.random_model(config), config, tp=2)
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    return root


DOORS = [
    "",
    "latest",
    "global_step7",
    "global_step7/mp_rank_00_model_states.pt",
    "global_step7/mp_rank_01_model_states.pt",
    "global_step7/layer_03-model_01-model_states.pt",
    "global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt",
]


@pytest.mark.parametrize("door", DOORS)
def test_every_door_leads_to_the_same_checkpoint(door: str, neox: Path):
    found = open_checkpoint(neox / door)
    assert found.provenance.path == neox / "global_step7"
    assert found.provenance.digest == open_checkpoint(neox).provenance.digest
    assert found.config.parallel_residual
    (neox / "latest_checkpointed_iteration.txt").unlink()
    assert open_checkpoint(neox / door).config == found.config


def test_steps_are_told_apart_by_the_file_latest(neox: Path):
    shutil.copytree(neox / "global_step7", neox / "global_step9")
    assert open_checkpoint(neox).provenance.path == neox / "global_step7"
    (neox / "latest").write_text("global_step9\n")
    assert open_checkpoint(neox).provenance.path == neox / "global_step9"
    (neox / "latest").write_text("global_step11")
    with pytest.raises(InputError, match="latest names global_step11, which is not there .found g"):
        open_checkpoint(neox)
    (neox / "latest").unlink()
    with pytest.raises(InputError, match="no file latest and several steps .global_step7, global_"):
        open_checkpoint(neox)
    (neox / "global_step9").rename(neox / "of our own")
    (neox / "latest").write_text("of our own")
    assert open_checkpoint(neox).provenance.path == neox / "of our own"
    (neox / "latest").unlink()
    shutil.rmtree(neox / "of our own")
    assert open_checkpoint(neox).provenance.path == neox / "global_step7"


# ---- what is missing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("layer_03-model_01-*", "lacks layer_03-model_01-model_states.pt; copy all files"),
        ("layer_03-*", "lacks layer_03-model_00-model_states.pt; copy all files"),
        ("layer_05-*", "num_layers 3 by its weights, where configs/run.yml says 4; copy all"),
        ("layer_00-*", "holds 0 files of its embedding, expected one for each rank"),
        ("layer_07-*", "holds 0 files of its norm, expected one for each rank"),
        ("layer_*", "is a DeepSpeed checkpoint without the model's own files .found zero_pp_rank"),
        ("[lm]*_states.pt", "without the model's own files .found zero_pp.*zero_to_fp32.py"),
    ],
)
def test_what_is_missing_is_named(lost: str, message: str, neox: Path):
    files = list((neox / "global_step7").glob(lost))
    assert files
    for file in files:
        file.unlink()
    with pytest.raises(InputError, match=message):
        open_checkpoint(neox)


def test_what_stands_beside_the_layers_of_a_module_is_no_part_of_it(tmp_path: Path):
    config = dataclasses.replace(synthetic.GPT, position_embedding_type="rope")
    root = write_neox(tmp_path, synthetic.random_model(config), config, pipeline=False)
    file = root / "global_step7/mp_rank_00_model_states.pt"
    state = torch.load(file)
    state["module"]["soft_embedding.weight"] = torch.ones(4, 16)
    torch.save(state, file)
    with pytest.raises(InputError, match="no model of gpt-neox .* has: soft_embedding.weight"):
        open_checkpoint(root)


def test_fewer_ranks_than_the_run_had(tmp_path: Path):
    root = write_fork(tmp_path, synthetic.random_model(BLOOM), BLOOM, bloom_args(), tp=1)
    with pytest.raises(
        InputError, match=r"files of 1 tensor-parallel rank\(s\) where the run had 2"
    ):
        open_checkpoint(root)
    (root / "global_step7/mp_rank_00_model_states.pt").unlink()
    with pytest.raises(
        InputError, match="lacks mp_rank_00_model_states.pt, which holds the run's s"
    ):
        open_checkpoint(root)


def _three(step: Path) -> None:
    """Stage 3 of ZeRO: a module of empty shells."""
    shells = {"language_model.embedding.word_embeddings.weight": torch.empty(0)}
    torch.save({"module": shells}, step / "zero_pp_rank_0_mp_rank_00_model_states.pt")


def _three_merged(step: Path) -> None:
    shells = {"language_model.embedding.word_embeddings.weight": torch.empty(0)}
    torch.save({"module": shells, "args": None}, step / "mp_rank_00_model_states.pt")


def _trainer(step: Path) -> None:
    module = {"model.embed_tokens.weight": torch.ones(4, 2)}
    torch.save({"module": module}, step / "mp_rank_00_model_states.pt")
    (step.parent / "zero_to_fp32.py").touch()


def _experts(step: Path) -> None:
    torch.save({}, step / "layer_3_expert_0_mp_rank_00_model_states.pt")


def _strange(step: Path) -> None:
    torch.save(
        {"mamba.in_proj.weight": torch.ones(4, 2)}, step / "layer_02-model_00-model_states.pt"
    )
    torch.save(
        {"word_embeddings.weight": torch.ones(4, 2)}, step / "layer_00-model_00-model_states.pt"
    )
    torch.save({"module": None, "args": {}}, step / "mp_rank_00_model_states.pt")


def _no_dict(step: Path) -> None:
    torch.save([1], step / "layer_02-model_00-model_states.pt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_three, "is a DeepSpeed checkpoint without the model's own files.*zero_to_fp32.py"),
        (_three_merged, "is a DeepSpeed checkpoint without the model's own files.*zero_to_fp32.py"),
        (_trainer, "a DeepSpeed checkpoint of another model than Megatron's .it holds model.embed"),
        (_experts, "holds DeepSpeed's mixture of experts .layer_3_expert_0"),
        (_strange, r"a layer that no GPT model of gpt-neox .* has .place 2: mamba.in_proj.weight"),
        (_no_dict, "holds a list, not the dictionary that DeepSpeed saves"),
    ],
)
def test_other_steps_are_refused_by_name(
    make: Callable[[Path], None], message: str, tmp_path: Path
):
    step = tmp_path / "global_step7"
    step.mkdir()
    make(step)
    for door in (tmp_path, step, next(step.iterdir())):
        with pytest.raises(InputError, match=message) as caught:
            open_checkpoint(door)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 700


class Harm:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize("name", ["layer_04-model_01", "mp_rank_00"])
def test_a_harmful_pickle_of_any_file_is_refused(name: str, neox: Path):
    file = neox / f"global_step7/{name}{'-' if name.startswith('layer') else '_'}model_states.pt"
    torch.save({**torch.load(file), "attention._extra_state": Harm()}, file)
    with pytest.raises(InputError, match="asks for .*system when it is unpickled"):
        open_checkpoint(neox)


def test_settings_by_hand_win(neox: Path):
    found = open_checkpoint(neox, parse_overrides(["activation=gelu_tanh", "rotary_base=500"]))
    assert found.config.activation == "gelu_tanh"
    assert found.provenance.config_sources["rotary_base"] == "--set"
