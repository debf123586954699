"""Writing torch_dist: round trips, Megatron's layout, memory, and megatron-core reading it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import random_models
from support.fuzz.core_process import PLAIN
from support.paths import ORACLES, SUPPORT
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import STORED_DTYPES
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Index, LazyTensor, MappedFile, StoredTensor
from mlm_eval.checkpoints.megatron import write_dist as megatron_dist_writer
from mlm_eval.checkpoints.megatron.write_dist import write_torch_dist
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import parameters
from mlm_eval.engine.verify import outputs, probe

CONFIGS: dict[str, ModelConfig] = {
    "gpt": random_models.GPT,
    "gpt-tanh": dataclasses.replace(random_models.GPT, activation="gelu_tanh"),
    "gpt-qk-norm": dataclasses.replace(
        random_models.GPT, qk_layernorm=True, qk_layernorm_bias=True, num_query_groups=2
    ),
    "gpt-1p": dataclasses.replace(random_models.GPT, layernorm_zero_centered_gamma=True),
    "llama": random_models.LLAMA,
    "llama-mqa": dataclasses.replace(
        random_models.LLAMA, num_query_groups=1, layernorm_epsilon=1e-6, rotary_base=5e5
    ),
    "qwen": dataclasses.replace(random_models.LLAMA, add_qkv_bias=True, rotary_percent=0.5),
    "bert": random_models.BERT,
}


def metadata_of(folder: Path) -> Metadata:
    """Return `.metadata` as torch's own reader gets it."""
    return dcp.FileSystemReader(folder).read_metadata()


# --- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_what_is_written_reads_back_bit_by_bit(
    config: ModelConfig, tp: int, pp: int, tmp_path: Path
):
    source = random_models.checkpoint(config)
    assert write_torch_dist(source, tmp_path / "out", tp=tp, pp=pp) == tmp_path / "out"
    result = open_checkpoint(tmp_path / "out")
    assert result.config == config
    found = result.provenance
    assert found.format == "megatron-torch-dist"
    assert (found.tensor_parallel, found.pipeline_parallel) == (tp, pp)
    assert found.checkpoint_version == 3.0 and found.iteration == "release"
    assert not found.pickle_classes and not found.hostile and not found.warnings
    assert set(result.tensors) == set(source.tensors)
    for name, tensor in source.tensors.items():
        assert torch.equal(result.tensors[name].read(), tensor.read()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_converted_and_recorded(dtype: torch.dtype, tmp_path: Path):
    source = random_models.checkpoint(random_models.LLAMA)
    write_torch_dist(source, tmp_path / "out", dtype=dtype)
    result = open_checkpoint(tmp_path / "out")
    assert result.config.params_dtype == str(dtype).removeprefix("torch.")
    for name, tensor in source.tensors.items():
        assert torch.equal(result.tensors[name].read(), tensor.read().to(dtype)), name


def test_layers_of_different_dtypes_need_a_dtype(tmp_path: Path):
    weights = random_models.state_dict(random_models.GPT)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    weights[name] = weights[name].half()
    source = random_models.checkpoint(random_models.GPT, weights)
    with pytest.raises(InputError, match="choose one with --dtype"):
        write_torch_dist(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    write_torch_dist(source, tmp_path / "out", dtype=torch.float32)


def test_a_genuine_checkpoint_keeps_its_iteration_and_settings(tmp_path: Path):
    source = open_checkpoint(ORACLES / "mcore016_llama_tp2")
    write_torch_dist(source, tmp_path / "out", tp=source.provenance.tensor_parallel)
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "1"
    result = open_checkpoint(tmp_path / "out")
    assert result.config == source.config
    assert result.provenance.path == tmp_path / "out" / "iter_0000001"
    for name, tensor in source.tensors.items():
        assert torch.equal(result.tensors[name].read(), tensor.read()), name


def test_the_vocabulary_is_padded_by_megatrons_formula(tmp_path: Path):
    source = random_models.checkpoint(random_models.LLAMA)
    write_torch_dist(
        source, tmp_path / "out", tp=4, true_vocab_size=45, make_vocab_size_divisible_by=8
    )
    result = open_checkpoint(tmp_path / "out")
    assert result.config.vocab_size == 64
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        table = result.tensors[name].read()
        assert torch.equal(table[:45], source.tensors[name].read()[:45])


# --- Megatron's layout --------------------------------------------------------------------------


def test_keys_chunks_and_entries_are_megatrons(tmp_path: Path):
    """Beside the genuine file of the same model: the same keys, and one chunk per layer."""
    genuine = ORACLES / "mcore016_gpt2_tp2_dist"
    write_torch_dist(open_checkpoint(genuine), tmp_path / "out", tp=2)
    folder = tmp_path / "out" / "iter_0000001"
    ours, theirs = metadata_of(folder), metadata_of(genuine / "iter_0000001")
    tensors = {
        key: entry
        for key, entry in ours.state_dict_metadata.items()
        if not isinstance(entry, BytesStorageMetadata)
    }
    expected = {
        key: entry
        for key, entry in theirs.state_dict_metadata.items()
        if not isinstance(entry, BytesStorageMetadata)
    }
    assert set(tensors) == set(expected)
    for key, entry in tensors.items():
        assert entry.size == expected[key].size
        assert entry.properties == expected[key].properties
        layers = 4 if ".layers." in key else 1
        assert len(entry.chunks) == layers
        if layers > 1:
            assert [chunk.offsets[0] for chunk in entry.chunks] == list(range(4))
    wanted = {key for key in theirs.state_dict_metadata if "_extra_state/" in key}
    assert len(wanted) == 16 and wanted <= set(ours.state_dict_metadata)
    written = json.loads((folder / "metadata.json").read_text())
    assert written == json.loads((genuine / "iter_0000001" / "metadata.json").read_text())
    # Values stand where they can be mapped without a copy.
    assert all(info.offset % 64 == 0 for info in ours.storage_data.values())


@pytest.mark.filterwarnings("ignore:.*single process.*:UserWarning")
@pytest.mark.parametrize("name", ["gpt", "llama", "bert"])
def test_plain_torch_assembles_the_stacked_tensors(name: str, tmp_path: Path):
    source = random_models.checkpoint(CONFIGS[name])
    write_torch_dist(source, tmp_path / "out")
    folder = tmp_path / "out" / "release"
    state = {
        key: torch.full(entry.size, torch.nan)
        for key, entry in metadata_of(folder).state_dict_metadata.items()
        if not isinstance(entry, BytesStorageMetadata)
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    block = CONFIGS[name].block
    for key, pattern in {
        f"{block}.layers.self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
        f"{block}.layers.self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        f"{block}.layers.mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        f"{block}.layers.mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
    }.items():
        layers = [source.tensors[f"{block}.layers.{layer}.{pattern}"].read() for layer in range(2)]
        assert torch.equal(state[key], torch.stack(layers)), key
    table = source.tensors["embedding.word_embeddings.weight"].read()
    assert torch.equal(state["embedding.word_embeddings.weight"], table)


def test_common_pt_is_readable_with_argparse_alone(tmp_path: Path):
    from argparse import Namespace

    write_torch_dist(random_models.checkpoint(random_models.GPT), tmp_path / "out", tp=2, pp=2)
    path = tmp_path / "out" / "release" / "common.pt"
    with torch.serialization.safe_globals([Namespace]):
        common = torch.load(path, weights_only=True)
    assert common["checkpoint_version"] == 3.0
    args = common["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert args.ckpt_format == "torch_dist" and args.padded_vocab_size == 50


# --- one tensor at a time, all or nothing -------------------------------------------------------


class Watched(LazyTensor):
    """Makes its values when read, and demands that what was read before is gone by then."""

    alive: list[weakref.ref[Tensor]] = []

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.kind = shape, STORED_DTYPES["float32"]

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        assert index is None or index == slice(0, self.shape[0])
        assert not [ref for ref in self.alive if ref() is not None], "two tensors in memory"
        tensor = torch.ones(self.shape)
        self.alive.append(weakref.ref(tensor))
        return tensor


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path):
    config = random_models.LLAMA
    watched = {name: Watched(p.shape) for name, p in parameters(config).items()}
    source = random_models.checkpoint(config)
    source = dataclasses.replace(source, tensors=watched)
    Watched.alive.clear()
    write_torch_dist(source, tmp_path / "out")
    assert len(Watched.alive) == len(watched)  # each read once


def test_parts_of_mapped_files_are_saved_alone_and_without_a_copy(tmp_path: Path):
    """torch.save writes whole storages: a view of a large file would be saved as the whole file."""
    (tmp_path / "data").write_bytes(os.urandom(1 << 20))
    stored = StoredTensor(MappedFile(tmp_path / "data"), 4096, torch.int16, (8, 4), (4, 1))
    view = stored.read()
    own = megatron_dist_writer._own_storage(view)
    assert own.untyped_storage().nbytes() == own.nbytes == 64
    assert own.data_ptr() == view.data_ptr()
    assert torch.equal(own, view)
    columns = view.t()
    assert torch.equal(megatron_dist_writer._own_storage(columns), columns)


def test_progress_reaches_the_total(tmp_path: Path):
    source = random_models.checkpoint(random_models.GPT)
    calls: list[tuple[int, int]] = []
    write_torch_dist(source, tmp_path / "out", on_progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_a_failed_write_leaves_nothing_and_a_finished_one_is_not_overwritten(tmp_path: Path):
    source = random_models.checkpoint(random_models.GPT)

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_torch_dist(source, tmp_path / "out", on_progress=fail)
    assert not list(tmp_path.iterdir())
    write_torch_dist(source, tmp_path / "out")
    before = open_checkpoint(tmp_path / "out").provenance.digest
    with pytest.raises(InputError, match="already exists"):
        write_torch_dist(source, tmp_path / "out")
    other = random_models.checkpoint(random_models.GPT, seed=1)
    with pytest.raises(RuntimeError):
        write_torch_dist(other, tmp_path / "out", overwrite=True, on_progress=fail)
    assert open_checkpoint(tmp_path / "out").provenance.digest == before
    write_torch_dist(other, tmp_path / "out", overwrite=True)
    assert open_checkpoint(tmp_path / "out").provenance.digest != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        (
            {"apply_residual_connection_post_layernorm": True},
            {},
            "torch_dist holds megatron-core models only.*BERT's original order.*--to megatron",
        ),
        ({"num_classes": 3}, {}, "task heads"),
        ({"head_activation": "gelu_tanh"}, {}, "tanh GELU in BERT's"),
        ({}, {"tp": 3}, "tp=3"),
        ({}, {"pp": 3}, "pp=3"),
    ],
)
def test_what_megatron_core_cannot_hold_is_refused(
    changes: dict[str, Any], sizes: dict[str, int], message: str, tmp_path: Path
):
    config = dataclasses.replace(random_models.BERT, **changes)
    source = random_models.checkpoint(config)
    with pytest.raises(InputError, match=message):
        write_torch_dist(source, tmp_path / "out", **sizes)
    assert not list(tmp_path.iterdir())


def test_the_metadata_names_no_class_of_this_project(tmp_path: Path):
    write_torch_dist(random_models.checkpoint(random_models.GPT), tmp_path / "out")
    data = (tmp_path / "out" / "release" / ".metadata").read_bytes()
    assert b"mlm_eval" not in data and str(tmp_path).encode() not in data
    assert isinstance(pickle.loads(data), Metadata)


# --- megatron-core reads it ---------------------------------------------------------------------

IN_CORE = ("gpt", "gpt-tanh", "gpt-qk-norm", "llama", "llama-mqa", "qwen", "bert")
"""Without `gpt-1p`: core's norm without apex or TransformerEngine has no zero-centred gain."""

needs_megatron_core = pytest.mark.skipif(
    importlib.util.find_spec("megatron.core") is None
    if importlib.util.find_spec("megatron")
    else True,
    reason="megatron-core is not installed (it is in the dev extra, for Python < 3.14)",
)


def run_megatron_core(scratch: Path, triples: list[Path]) -> subprocess.CompletedProcess[str]:
    """Run megatron-core on (folder, inputs, output) triples in a process of its own."""
    return subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            SUPPORT / "fuzz" / "megatron_core_model.py",
            scratch,
            *triples,
        ],
        capture_output=True,
        text=True,
        env=os.environ | PLAIN,
    )


def last_folder(target: Path) -> Path:
    return next(path for path in target.iterdir() if re.match("iter_|release", path.name))


@needs_megatron_core
def test_megatron_core_itself_loads_it_and_computes_the_same_logits(tmp_path: Path):
    """Through `megatron.core.dist_checkpointing.load`, its model built from the saved args."""
    triples: list[Path] = []
    expected: dict[Path, tuple[Checkpoint, dict[str, Tensor]]] = {}
    for name in IN_CORE:
        source = random_models.checkpoint(CONFIGS[name])
        target = write_torch_dist(source, tmp_path / name, tp=2 if name != "llama-mqa" else 1)
        inputs = probe(source.config, source.config.vocab_size)
        torch.save(inputs, tmp_path / f"{name}.inputs")
        expected[tmp_path / f"{name}.outputs"] = source, inputs
        triples += [
            last_folder(target),
            tmp_path / f"{name}.inputs",
            tmp_path / f"{name}.outputs",
        ]
    done = run_megatron_core(tmp_path, triples)
    assert done.returncode == 0, done.stderr
    for path, (source, inputs) in expected.items():
        theirs = torch.load(path)
        ours = outputs(source, inputs)
        kept = inputs.get("padding_mask", torch.ones_like(inputs["tokens"])).bool()
        assert ours["logits"].std() > 0.5  # not a comparison of noughts
        torch.testing.assert_close(
            theirs["logits"][kept], ours["logits"][kept], rtol=0, atol=1e-4, msg=path.name
        )
        if source.config.binary_head:
            torch.testing.assert_close(
                theirs["binary_logits"], ours["binary_head"], rtol=0, atol=1e-4
            )


@needs_megatron_core
def test_megatron_core_refuses_the_same_folder_without_extra_states(tmp_path: Path):
    """What the entries beside the weights are for."""
    target = write_torch_dist(random_models.checkpoint(random_models.GPT), tmp_path / "out")
    folder = last_folder(target)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for key in [key for key in metadata.state_dict_metadata if "linear_qkv._extra_state" in key]:
        del metadata.state_dict_metadata[key]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save(probe(random_models.GPT, 50), tmp_path / "inputs")
    done = run_megatron_core(tmp_path, [folder, tmp_path / "inputs", tmp_path / "outputs"])
    assert done.returncode != 0
    assert "linear_qkv._extra_state/shard_0_2" in done.stderr
