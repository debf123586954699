"""Megatron's distributed formats: genuine checkpoints, every form of keys, hostile files."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import random_models
from support.folders import dcp_folders
from support.paths import ORACLES
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from mlm_eval.checkpoints.checkpoint import Checkpoint, full_digest
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files import distcp
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import parameters
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.score import Request

# Genuine torch_dist checkpoints, and the same model as Megatron wrote it in torch format.
SHIPPED = ("mcore016_gpt2_tp2_dist", "mcore016_gpt2_tp2_pp2")
PAIRS = [
    ("mcore012_gpt2_tp2_dist", "mcore016_gpt2_tp2"),
    ("mcore016_gpt2_tp2_dist", "mcore016_gpt2_tp2"),
    ("mcore019_gpt2_tp2_dist", "mcore016_gpt2_tp2"),
    ("mcore016_llama_tp2_dist", "mcore016_llama_tp2"),
]
OUTPUT_OF_TORCH = "ignore:.*single process.*:UserWarning"


# --- genuine checkpoints ------------------------------------------------------------------------


def assert_same_model(ours: Checkpoint, theirs: Checkpoint) -> None:
    """Every tensor of the two checkpoints has the same bits, and they have the same settings."""
    assert ours.config == theirs.config
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name].read(), tensor.read(), rtol=0, atol=0)


def log_probs_and_golden(checkpoint: Checkpoint, golden: Path) -> tuple[Tensor, Tensor]:
    """Return the engine's log-probabilities and minus Megatron's own loss, `[batch * seq]`."""
    expected = torch.load(golden, weights_only=True)
    inputs = torch.cat([expected["tokens"], expected["labels"][:, -1:]], dim=1)  # [B, T + 1]
    engine = Engine.load(checkpoint, dtype=torch.float32)
    scores = engine.score([Request(row, len(row) - 1) for row in inputs])
    return scores.logprobs, -expected["token_loss"].flatten()


def test_the_shipped_torch_dist_checkpoint_is_the_same_model_as_in_torch_format():
    dist, plain = (ORACLES / name for name in SHIPPED)
    checkpoint = open_checkpoint(dist)
    assert_same_model(checkpoint, open_checkpoint(plain))
    ours, golden = log_probs_and_golden(checkpoint, dist / "golden.pt")
    torch.testing.assert_close(ours, golden, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dist", "plain"), PAIRS)
def test_genuine_torch_dist_has_the_bits_of_genuine_torch_format(
    dist: str, plain: str, oracles: Path
):
    checkpoint = open_checkpoint(oracles / dist)
    assert_same_model(checkpoint, open_checkpoint(oracles / plain))
    found = checkpoint.provenance
    assert found.format == "megatron-torch-dist"
    assert (found.checkpoint_version, found.iteration) == (3.0, 1)
    assert (found.tensor_parallel, found.pipeline_parallel) == (2, 1)
    assert not found.hostile and not found.warnings
    assert any("MCoreSavePlan" in name for name in found.pickle_classes) == ("012" in dist)
    assert (oracles / dist / "iter_0000001" / ".metadata") in found.files


@pytest.mark.parametrize("dist", [dist for dist, _ in PAIRS])
def test_genuine_torch_dist_scores_as_megatron_did(dist: str, oracles: Path):
    ours, golden = log_probs_and_golden(
        open_checkpoint(oracles / dist), oracles / dist / "golden.pt"
    )
    torch.testing.assert_close(ours, golden, rtol=0, atol=1e-4)


# --- the same model under every form of keys ----------------------------------------------------

GPT = random_models.GPT
LLAMA = random_models.LLAMA
BERT = random_models.BERT
STACKED_CUTS = {
    "linear_qkv.weight": (1, 2),
    "linear_qkv.bias": (1, 2),
    "linear_proj.weight": (1, 1, 2),
    "linear_fc1.weight": (1, 4),
    "linear_fc1.bias": (1, 4),
    "linear_fc2.weight": (1, 1, 2),
}
"""Two ranks; gated fc1 is written as four pieces, gate and up of each rank."""


def megatron_args(config: ModelConfig, **changes: Any) -> Namespace:
    """Return the args that a run of this model would have saved."""
    values = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": config.position_embedding_type,
        "normalization": config.normalization,
        "layernorm_epsilon": config.layernorm_epsilon,
        "swiglu": config.activation == "swiglu",
        "bias_gelu_fusion": False,
        "untie_embeddings_and_output_weights": config.untie_embeddings_and_output_weights,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "params_dtype": torch.float32,
    }
    return Namespace(**(values | changes))


def per_layer_keys(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the keys of layers that are not stacked: norms under the linears."""
    norms = {
        ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
        ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
    }
    keyed = {}
    for name, tensor in weights.items():
        for norm, linear in norms.items():
            name = name.replace(norm, linear)
        keyed[name] = tensor
    return keyed


def stacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as torch_dist has them: no layer number, layers on a leading dim."""
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in per_layer_keys(weights).items():
        groups.setdefault(re.sub(r"layers\.\d+\.", "layers.", name), []).append(tensor)
    return {
        key: torch.stack(group) if ".layers." in key else group[0] for key, group in groups.items()
    }


def halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return per-layer keys with the gated fc1 in two: `singleton_local_shards`."""
    keyed = {}
    for name, tensor in per_layer_keys(weights).items():
        if name.endswith((".linear_fc1.weight", ".linear_fc1.bias")):
            keyed[f"{name}_w"], keyed[f"{name}_v"] = tensor.chunk(2)
        else:
            keyed[name] = tensor
    return keyed


def cuts_for(keys: Mapping[str, Tensor], num_layers: int) -> dict[str, tuple[int, ...]]:
    """Return the cuts that two tensor-parallel ranks make: one chunk per layer and rank."""
    cuts: dict[str, tuple[int, ...]] = {}
    for key in keys:
        cut = next((cut for end, cut in STACKED_CUTS.items() if key.endswith(end)), (1,))
        if ".layers." in key:
            cuts[key] = (num_layers, *cut[1:])
        elif "word_embeddings" in key or key.startswith("output_layer"):
            cuts[key] = (2,)
    return cuts


def save_stacked(
    folder: Path, config: ModelConfig = GPT, *, seed: int = 0, **options: Any
) -> tuple[Path, dict[str, Tensor]]:
    """Write a torch_dist folder as two ranks would; return it and the canonical weights."""
    weights = random_models.state_dict(config, seed=seed)
    keys = stacked(weights)
    options.setdefault(
        "common", {"args": megatron_args(config), "checkpoint_version": 3.0, "iteration": 7}
    )
    dcp_folders.save(folder, keys, cuts=cuts_for(keys, config.num_layers), **options)
    return folder, weights


def assert_holds(checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> None:
    assert set(checkpoint.tensors) == set(weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(checkpoint.tensors[name].read(), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("config", [GPT, LLAMA, BERT], ids=["gpt", "llama", "bert"])
def test_stacked_layers_of_two_ranks(config: ModelConfig, tmp_path: Path):
    objects = {
        "rng_state/shard_0.0_1.2": [{"random_rng_state": 1}],
        "rerun_state_machine_state/shard_0_2": [{}],
        f"{config.block}.layers.mlp.linear_fc1._extra_state/shard_0_2": [None],
    }
    folder, weights = save_stacked(tmp_path / "iter_0000007", config, objects=objects)
    checkpoint = open_checkpoint(folder)
    assert_holds(checkpoint, weights)
    assert checkpoint.config == config
    assert checkpoint.provenance.iteration == 7
    assert checkpoint.provenance.tensor_parallel == 2


def test_optimizer_states_are_left_out(tmp_path: Path):
    weights = random_models.state_dict(GPT)
    keys = stacked(weights)
    keys |= {f"optimizer.state.exp_avg.{key}": tensor for key, tensor in keys.items()}
    keys["chained_0.optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(32)
    common = {"args": megatron_args(GPT), "checkpoint_version": 3.0, "iteration": 7}
    assert_holds(open_checkpoint(dcp_folders.save(tmp_path / "c", keys, common=common)), weights)


@pytest.mark.parametrize("form", [per_layer_keys, halved])
def test_layers_with_keys_of_their_own(
    form: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], tmp_path: Path
):
    weights = random_models.state_dict(LLAMA)
    common = {"args": megatron_args(LLAMA), "checkpoint_version": 3.0, "iteration": 7}
    checkpoint = open_checkpoint(dcp_folders.save(tmp_path / "c", form(weights), common=common))
    assert_holds(checkpoint, weights)
    assert checkpoint.config == LLAMA
    assert "every layer has keys of its own" in checkpoint.provenance.notes[0]


def test_half_of_a_gated_mlp_is_named(tmp_path: Path):
    keys = halved(random_models.state_dict(LLAMA))
    del keys["decoder.layers.1.mlp.linear_fc1.weight_v"]
    common = {"args": megatron_args(LLAMA)}
    with pytest.raises(InputError, match="half of a gated MLP"):
        open_checkpoint(dcp_folders.save(tmp_path / "c", keys, common=common))


def test_args_in_the_common_state_entry_of_core_019(tmp_path: Path):
    state = [{"args": megatron_args(LLAMA), "checkpoint_version": 3.0, "iteration": 9}]
    objects = {"common_state/shard_0_1": state}
    folder, weights = save_stacked(tmp_path / "c", LLAMA, objects=objects, common=None)
    checkpoint = open_checkpoint(folder)
    assert_holds(checkpoint, weights)
    assert checkpoint.config == LLAMA
    assert checkpoint.provenance.iteration == 9
    assert not (folder / "common.pt").exists()


@pytest.mark.filterwarnings(OUTPUT_OF_TORCH)
@pytest.mark.parametrize("prefix", ["", "module."], ids=["torch_dcp", "fsdp_dtensor"])
def test_folders_of_torch_dcp_and_fsdp(prefix: str, tmp_path: Path):
    """What Megatron hands to plain `torch.distributed.checkpoint.save`, settings included."""
    weights = random_models.state_dict(LLAMA)
    keys = halved(weights) if prefix else weights
    state = {
        "model": {f"{prefix}{key}": tensor for key, tensor in keys.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "args": megatron_args(LLAMA, tensor_model_parallel_size=1),
        "checkpoint_version": 3.0,
        "iteration": 5,
    }
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    checkpoint = open_checkpoint(tmp_path / "c")
    assert_holds(checkpoint, weights)
    assert checkpoint.config == LLAMA
    assert checkpoint.provenance.iteration == 5
    assert not checkpoint.provenance.warnings
    expected = "megatron-fsdp-dtensor" if prefix else "megatron-torch-dcp"
    assert checkpoint.provenance.format == expected


@pytest.mark.filterwarnings(OUTPUT_OF_TORCH)
@pytest.mark.parametrize("said", ["torch_dcp", "fsdp_dtensor"])
def test_args_tell_torch_dcp_from_fsdp_dtensor(said: str, tmp_path: Path):
    """Wrappers leave `module.` in either's keys; what the run says of itself comes first."""
    weights = random_models.state_dict(LLAMA)
    state = {
        "model": {f"module.{key}": tensor for key, tensor in weights.items()},
        "args": megatron_args(LLAMA, tensor_model_parallel_size=1, ckpt_format=said),
    }
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    found = open_checkpoint(tmp_path / "c").provenance.format
    assert found == f"megatron-{said.replace('_', '-')}"


# --- reading late, and only what is asked for ---------------------------------------------------


@pytest.mark.parametrize("cuts", [(1,), (3, 2, 2), (1, 4), (6, 1, 2)])
def test_slices_of_tiles_are_slices_of_the_whole(cuts: tuple[int, ...], tmp_path: Path):
    whole = torch.arange(6 * 8 * 4).view(6, 8, 4)
    dcp_folders.save(tmp_path / "c", {"x": whole}, cuts={"x": cuts})
    folder = distcp.open_folder(tmp_path / "c")
    distcp.check_coverage(folder.tensors["x"], tmp_path)
    lazy = folder.tensor("x")
    assert lazy.shape == whole.shape and lazy.dtype == torch.int64
    assert torch.equal(lazy.read(), whole)
    for dim, size in enumerate(whole.shape):
        for start in range(size + 1):
            for stop in range(start, size + 1):
                expected = whole.narrow(dim, start, stop - start)
                assert torch.equal(lazy.read(dim, slice(start, stop)), expected)
        for order in ([0], [size - 1, 0], [2, 0, 3, 2], list(range(size))[::-1]):
            index = torch.tensor(order)
            assert torch.equal(lazy.read(dim, index), whole.index_select(dim, index))
    for layer, tensor in enumerate(folder.layers("x")):
        assert torch.equal(tensor.read(), whole[layer])
        assert torch.equal(tensor.read(1, slice(1, 3)), whole[layer][:, 1:3])


@pytest.mark.parametrize("tp_size", [2, 4])
def test_shards_of_ranks_are_shards_of_the_whole(tp_size: int, tmp_path: Path):
    folder, weights = save_stacked(tmp_path / "c", LLAMA)
    checkpoint = open_checkpoint(folder)
    for name, parameter in parameters(LLAMA).items():
        for rank in range(tp_size):
            expected = random_models.checkpoint(LLAMA, weights).tensors[name]
            expected = parameter.read_shard(expected, rank, tp_size)
            found = parameter.read_shard(checkpoint.tensors[name], rank, tp_size)
            assert torch.equal(found, expected), name


def test_only_the_chunks_of_a_slice_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = []
    real = distcp.read_torch_file

    def counting(path: Path, **window: Any) -> Any:
        opened.append((path.name, window["offset"]))
        return real(path, **window)

    monkeypatch.setattr(distcp, "read_torch_file", counting)
    folder, weights = save_stacked(tmp_path / "c")
    checkpoint = open_checkpoint(folder)
    assert opened == []
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    part = checkpoint.tensors[name].read(1, slice(0, 16))  # rank 0's chunk of layer 1 has 32
    assert torch.equal(part, weights[name][:, :16])
    assert len(opened) == 1
    checkpoint.tensors[name].read(1, slice(8, 24))
    assert len(opened) == 1
    checkpoint.tensors[name].read(1, slice(24, 40))
    assert len(opened) == 2


def test_the_digest_tells_weights_apart_but_not_copies(tmp_path: Path):
    first, _ = save_stacked(tmp_path / "first", seed=0)
    other, _ = save_stacked(tmp_path / "other", seed=1)
    copy = shutil.copytree(first, tmp_path / "copy")
    # Other weights under the same .metadata and common.pt, in files of the same sizes.
    mixed = shutil.copytree(first, tmp_path / "mixed")
    for file in other.glob("*.distcp"):
        assert file.stat().st_size == (mixed / file.name).stat().st_size
        shutil.copy(file, mixed)
    digests = [open_checkpoint(folder).provenance.digest for folder in (first, copy, mixed)]
    assert digests[0] == digests[1] != digests[2]
    full = [full_digest(open_checkpoint(folder)) for folder in (first, copy, mixed)]
    assert full[0] == full[1] != full[2]


# --- settings -----------------------------------------------------------------------------------


def test_without_args_shapes_and_overrides_serve(tmp_path: Path):
    config = dataclasses.replace(
        GPT, hidden_size=128, kv_channels=64, num_attention_heads=2, num_query_groups=2
    )
    folder, weights = save_stacked(tmp_path / "c", config, common=None)
    with pytest.raises(InputError, match="--set num_attention_heads=N --set activation=gelu"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, {"activation": "gelu", "num_attention_heads": 2})
    assert_holds(checkpoint, weights)
    assert checkpoint.config == config
    assert checkpoint.provenance.config_sources["num_attention_heads"] == "--set"
    assert checkpoint.provenance.config_sources["layernorm_epsilon"] == "assumed"


def test_without_args_rotary_positions_are_not_guessed(tmp_path: Path):
    folder, _ = save_stacked(tmp_path / "c", LLAMA, common=None)
    with pytest.raises(InputError, match="position_embedding_type=rope"):
        open_checkpoint(folder)
    given = {
        "position_embedding_type": "rope",
        "max_position_embeddings": 16,
        "num_attention_heads": 4,
        "activation": "swiglu",
        "rotary_base": 10000.0,
        "layernorm_epsilon": 1e-5,
    }
    assert open_checkpoint(folder, given).config == LLAMA


def test_a_checkpoint_version_of_the_torch_format_is_refused(tmp_path: Path):
    folder, _ = save_stacked(tmp_path / "c")
    with pytest.raises(InputError, match="checkpoint_version 0"):
        open_checkpoint(folder, {"checkpoint_version": 0.0})


# --- what cannot be read is named ---------------------------------------------------------------


def replace_key(folder: Path, old: str, new: str) -> None:
    """Rename an entry in `.metadata`."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)
    metadata.storage_data = {
        MetadataIndex(new if index.fqn == old else index.fqn, index.offset): info
        for index, info in metadata.storage_data.items()
    }
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def add_keys(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            replace_key(folder, "decoder.layers.mlp.linear_fc2.bias", name)

    return change


def leave_out(name: str) -> Callable[[Path], None]:
    """Make a weight an entry that no model has."""
    return lambda folder: replace_key(folder, name, "optimizer.state.exp_avg.weight")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def interrupted(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for each in (*changes, remove("metadata.json")):
            each(folder)

    return change


def make_zarr(folder: Path) -> None:
    for file in [folder / ".metadata", *folder.glob("*.distcp")]:
        file.unlink()
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')


def swap_files(folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder / "x")
    (folder / "__0_1.distcp").rename(folder / "__0_0.distcp")
    (folder / "x").rename(folder / "__0_1.distcp")


def point_outside(folder: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("__0_1.distcp"), r"__0_1\.distcp is missing; copy the file again"),
        (truncate("__0_0.distcp", 9000), r"__0_0\.distcp is cut off: it has 9000 of at least"),
        (remove(".metadata"), r"lacks the hidden file \.metadata"),
        (interrupted(remove(".metadata")), "is an unfinished save"),
        (interrupted(remove("__0_0.distcp")), r"unfinished save: .*__0_0\.distcp is missing"),
        (interrupted(truncate("__0_1.distcp", 500)), "unfinished save: .*is cut off"),
        (truncate(".metadata", 100), r"\.metadata is cut off or damaged"),
        (truncate("common.pt", 100), r"common\.pt is cut off or damaged"),
        (make_zarr, "is a zarr save without arrays in it"),
        (swap_files, "cut off|two checkpoints"),
        (point_outside, r"outside of the folder"),
        (add_keys("decoder.layers.mlp.router.weight"), "router.weight has shape .*, expected 2"),
        (leave_out("embedding.word_embeddings.weight"), "iter_0000007 holds no word embeddings"),
        (add_keys("encoder.layers.mlp.linear_fc2.bias"), "lacks the parameter encoder.layers.0"),
        (add_keys("decoder.layers.self_attention.linear_q_proj.bias"), "lacks|do not call for"),
        (add_keys("decoder.layers.mlp.linear_fc3.bias"), "that no GPT, BERT or T5 model"),
    ],
)
def test_faults_are_named(change: Callable[[Path], None], message: str, tmp_path: Path):
    folder, _ = save_stacked(tmp_path / "iter_0000007")
    change(folder)
    with pytest.raises(InputError, match=message):
        checkpoint = open_checkpoint(folder)
        for tensor in checkpoint.tensors.values():
            tensor.read()


def test_a_complete_save_without_metadata_json_is_read_with_a_warning(tmp_path: Path):
    folder, weights = save_stacked(tmp_path / "c", finished=False)
    checkpoint = open_checkpoint(folder)
    assert_holds(checkpoint, weights)
    assert "no metadata.json" in checkpoint.provenance.warnings[0]


def test_missing_chunks_are_counted(tmp_path: Path):
    folder, _ = save_stacked(tmp_path / "c", LLAMA, drop=1)  # half of output_layer.weight
    with pytest.raises(InputError, match=r"output_layer.weight hold 800 of its 1600 values"):
        open_checkpoint(folder)


def test_args_of_a_model_that_is_not_computed_are_refused(tmp_path: Path):
    common = {"args": megatron_args(GPT, num_experts=8)}
    folder, _ = save_stacked(tmp_path / "c", common=common)
    with pytest.raises(InputError, match="mixture of experts"):
        open_checkpoint(folder)


# --- files that were made to do harm ------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled by an unpickler that does what it is told."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sentinel}",)


def evil_metadata(folder: Path, sentinel: Path) -> Callable[[], Any]:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Evil(sentinel)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return lambda: dcp.FileSystemReader(folder).read_metadata()


def evil_common_pt(folder: Path, sentinel: Path) -> Callable[[], Any]:
    common = torch.load(folder / "common.pt", weights_only=False)
    torch.save(common | {"iteration": 1, "extra": Evil(sentinel)}, folder / "common.pt")
    return lambda: torch.load(folder / "common.pt", weights_only=False)


@pytest.mark.parametrize("arm", [evil_metadata, evil_common_pt])
def test_a_hostile_file_runs_nothing_and_is_refused(
    arm: Callable[[Path, Path], Callable[[], Any]], tmp_path: Path
):
    folder, weights = save_stacked(tmp_path / "c")
    sentinel = tmp_path / "sentinel"
    ordinary_reader = arm(folder, sentinel)
    with pytest.raises(InputError, match=r"asks for posix\.system .* nothing was run"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, allow_hostile=True)
    assert_holds(checkpoint, weights)
    assert checkpoint.provenance.hostile == ["posix.system"]
    assert not sentinel.exists()
    ordinary_reader()
    assert sentinel.exists(), "the file was not armed: the test shows nothing"


def entry_bytes(folder: Path, key: str) -> bytes:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    info = metadata.storage_data[MetadataIndex(key)]
    data = (folder / info.relative_path).read_bytes()
    return data[info.offset : info.offset + info.length]


@pytest.mark.parametrize(
    ("key", "refused"),
    [
        ("common_state/shard_0_1", True),
        ("decoder.layers.mlp.linear_fc1._extra_state/shard_0_2", False),
        ("rng_state/shard_0.0_1.1", False),
    ],
)
def test_a_hostile_byte_entry_runs_nothing(key: str, refused: bool, tmp_path: Path):
    """Torch's own `dcp.load` of a byte entry runs what is in it."""
    sentinel = tmp_path / "sentinel"
    state = {"args": megatron_args(GPT), "iteration": 7, "extra": Evil(sentinel)}
    objects = {"common_state/shard_0_1": [{"args": megatron_args(GPT)}], key: [state]}
    folder, weights = save_stacked(tmp_path / "c", objects=objects, common=None)
    checkpoint = open_checkpoint(folder, allow_hostile=True)
    assert_holds(checkpoint, weights)
    assert checkpoint.provenance.hostile == (["posix.system"] if refused else [])
    if refused:
        with pytest.raises(InputError, match=r"posix\.system"):
            open_checkpoint(folder)
    assert not sentinel.exists()
    torch.load(io.BytesIO(entry_bytes(folder, key)), weights_only=False)
    assert sentinel.exists(), "the entry was not armed: the test shows nothing"


def test_a_hostile_tensor_chunk_runs_nothing_and_is_refused(tmp_path: Path):
    sentinel = tmp_path / "sentinel"
    evil = nn.Parameter(torch.zeros(GPT.hidden_size))
    evil.extra = Evil(sentinel)  # type: ignore[attr-defined]
    folder, _ = save_stacked(tmp_path / "c", objects={"evil": evil})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = "decoder.final_layernorm.weight"
    index = MetadataIndex(name, [0])
    metadata.storage_data[index] = metadata.storage_data[MetadataIndex("evil")]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(InputError, match=r"asks for posix\.system where it holds decoder\.final"):
        checkpoint.tensors[name].read()
    assert not sentinel.exists()
    torch.load(io.BytesIO(entry_bytes(folder, "evil")), weights_only=False)
    assert sentinel.exists(), "the entry was not armed: the test shows nothing"


# --- without Megatron ---------------------------------------------------------------------------


@pytest.fixture
def megatron_classes(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for the module whose classes core 0.11 to 0.15 pickled into `.metadata`."""
    parts = "megatron.core.dist_checkpointing.strategies.torch".split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    for name, base in (("MCoreMetadata", Metadata), ("MCoreSavePlan", SavePlan)):
        setattr(module, name, type(name, (base,), {"__module__": module.__name__}))
    return module


def test_metadata_of_megatron_classes_needs_no_megatron(
    megatron_classes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, weights = save_stacked(tmp_path / "c")
    plain = pickle.loads((folder / ".metadata").read_bytes())
    kept = getattr(plain, "all_local_plans", [])  # torch 2.11 keeps none
    items = [plan.items for plan in kept] or [[]]
    plans = [megatron_classes.MCoreSavePlan(of_a_rank) for of_a_rank in items]
    metadata = megatron_classes.MCoreMetadata(
        plain.state_dict_metadata, storage_data=plain.storage_data
    )
    metadata.all_local_plans, metadata.mcore_data = plans, {}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError):
        pickle.loads((folder / ".metadata").read_bytes())
    checkpoint = open_checkpoint(folder)
    assert_holds(checkpoint, weights)
    module = "megatron.core.dist_checkpointing.strategies.torch"
    assert checkpoint.provenance.pickle_classes == [
        f"{module}.MCoreMetadata",
        f"{module}.MCoreSavePlan",
    ]


BLOCKED = """
import sys
sys.modules["megatron"] = None
from mlm_eval.checkpoints.open import open_checkpoint
for folder in sys.argv[1:]:
    checkpoint = open_checkpoint(folder)
    assert all(bool(lazy.read().isfinite().all()) for lazy in checkpoint.tensors.values())
    print(checkpoint.num_parameters)
unwanted = ("megatron", "torch.distributed.checkpoint")
loaded = {name for name in sys.modules if name.startswith(unwanted)}
assert loaded == {"megatron"}, loaded
"""


def test_a_process_in_which_megatron_cannot_be_imported_reads_them(tmp_path: Path):
    """Not even torch.distributed.checkpoint is imported; the real files name Megatron's classes."""
    folder, _ = save_stacked(tmp_path / "c")
    genuine = ORACLES / SHIPPED[0]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, folder, genuine],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == [
        open_checkpoint(path).num_parameters for path in (folder, genuine)
    ]
