"""zarr arrays, written here by the format's text: chunks, edges, bfloat16, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders.synthetic import GPT, LLAMA, args_of, random_model
from support.folders.zarr_folders import DTYPES, write_array
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.zarr_arrays import open_arrays
from mlm_eval.checkpoints.open import open_checkpoint


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [(7, 5), (3, 5), (7, 2), (2, 3), (9, 9)])
def test_chunks_make_up_the_array(dtype: torch.dtype, chunk: tuple[int, int], tmp_path: Path):
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    write_array(tmp_path / "weight", values, chunk)
    tensor = open_arrays(tmp_path).tensor("weight")
    assert torch.equal(tensor.read(), values)
    assert torch.equal(tensor.read(0, slice(2, 6)), values[2:6])
    assert torch.equal(tensor.read(1, slice(1, 4)), values[:, 1:4])
    scattered = torch.tensor([6, 0, 3])
    assert torch.equal(tensor.read(0, scattered), values[scattered])


@pytest.mark.parametrize("rows", [1, 2])
def test_layers_are_the_entries_of_the_first_dim(rows: int, tmp_path: Path):
    values = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2))
    write_array(tmp_path / "weight", values, (rows, 2, 5))
    for layer, tensor in enumerate(open_arrays(tmp_path).layers("weight")):
        assert torch.equal(tensor.read(), values[layer])
        assert torch.equal(tensor.read(1, slice(1, 3)), values[layer, :, 1:3])


def save(root: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Write a model as Megatron did: layers stacked, norms under the linear that follows."""
    model = random_model(config)
    folder = root / "iter_0000003"
    folder.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("3")
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    common = {"args": args_of(config), "iteration": 3, "checkpoint_version": 3.0}
    torch.save(common, folder / "common.pt")
    stacked: dict[str, list[Tensor]] = {}
    for name, tensor in model.items():
        if ".layers." not in name:
            write_array(folder / name, tensor, [max(size // 2, 1) for size in tensor.shape])
            continue
        head, _, rest = name.partition(".layers.")
        part = rest.partition(".")[2]
        part = part.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        part = part.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        stacked.setdefault(f"{head}.layers.{part}", []).append(tensor)
    for key, layers in stacked.items():
        values = torch.stack(layers)
        write_array(folder / key, values, (1, *(max(size // 2, 1) for size in values.shape[1:])))
    (folder / "decoder.layers.mlp.linear_fc1._extra_state").mkdir()
    (folder / "optimizer.state.exp_avg.x").mkdir()
    (folder / "optimizer.state.exp_avg.x" / ".zarray").write_text(
        (folder / "output_layer.weight" / ".zarray").read_text()
        if config.untie_embeddings_and_output_weights
        else (folder / "embedding.word_embeddings.weight" / ".zarray").read_text()
    )
    return model


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_a_checkpoint_opens_at_any_door(config: ModelConfig, tmp_path: Path):
    model = save(tmp_path / "run", config)
    doors = ("", "iter_0000003", "iter_0000003/common.pt", "iter_0000003/metadata.json")
    array = "iter_0000003/embedding.word_embeddings.weight"
    for door in (*doors, f"{array}/.zarray", f"{array}/0.0"):
        checkpoint = open_checkpoint(tmp_path / "run" / door)
        assert checkpoint.provenance.format == "megatron-zarr"
        assert checkpoint.tensors.keys() == model.keys()
        for name, tensor in checkpoint.tensors.items():
            assert torch.equal(tensor.read(), model[name]), name
    assert checkpoint.provenance.iteration == 3
    assert checkpoint.provenance.training_state
    digest = checkpoint.provenance.digest
    assert open_checkpoint(tmp_path / "run").provenance.digest == digest


def test_a_missing_or_short_chunk_is_an_unfinished_save(tmp_path: Path):
    save(tmp_path, GPT)
    chunk = tmp_path / "iter_0000003/decoder.layers.mlp.linear_fc2.weight/2.1.0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-4])
    with pytest.raises(InputError, match=r"2\.1\.0 has 380 of 384 bytes|bytes: the save did not"):
        open_checkpoint(tmp_path)
    chunk.unlink()
    with pytest.raises(InputError, match=r"2\.1\.0 is missing: the save did not finish"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "key", ["embedding.word_embeddings.weight", "decoder.layers.mlp.linear_fc2.weight"]
)
def test_a_weight_without_values_is_refused(key: str, tmp_path: Path):
    save(tmp_path, GPT)
    about = tmp_path / "iter_0000003" / key / ".zarray"
    described = json.loads(about.read_text())
    described["shape"][0] = 0
    about.write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"\.zarray gives the shape \[0, .*holds no value"):
        open_checkpoint(tmp_path)


def test_a_model_without_word_embeddings_is_refused(tmp_path: Path):
    save(tmp_path, GPT)
    shutil.rmtree(tmp_path / "iter_0000003/embedding.word_embeddings.weight")
    with pytest.raises(InputError, match="iter_0000003 holds no word embeddings"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"compressor": {"id": "blosc"}}, "compressor is {'id': 'blosc'}, where Megatron writes"),
        ({"filters": [{"id": "delta"}]}, "filters is"),
        ({"order": "F"}, "order is 'F'"),
        ({"zarr_format": 3}, "zarr_format is 3"),
        ({"dimension_separator": "/"}, "chunks are not named 0.0"),
        ({"dtype": "<i2"}, "dtype '<i2' is not one that Megatron writes"),
        ({"shape": [4, -1]}, "for a list of sizes"),
        ({"shape": "4"}, "for a list of sizes"),
        ({"chunks": [2]}, "do not fit the shape"),
        ({"chunks": [0, 1]}, "do not fit the shape"),
        ({"shape": [2**39, 2**39], "chunks": [1, 1]}, "do not fit the shape"),
    ],
)
def test_other_arrays_are_refused(about: dict[str, Any], message: str, tmp_path: Path):
    write_array(tmp_path / "weight", torch.ones(4, 2), (4, 2), **about)
    with pytest.raises(InputError, match=message):
        open_arrays(tmp_path)
