"""T5 in Megatron's formats: written as Megatron writes it, and the same bits at every size."""

from __future__ import annotations

import dataclasses
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED
from support import configs, random_models
from support.folders.zarr_folders import write_array
from support.fuzz.core_process import run_core

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig, RopeScaling
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.distcp import open_folder
from mlm_eval.checkpoints.files.torch_file import read_torch_file
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.engine.verify import outputs

LEARNED = dataclasses.replace(
    configs.T5,
    position_embedding_type="learned_absolute",
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    decoder_num_layers=1,
)
ROTARY = dataclasses.replace(LEARNED, position_embedding_type="rope")
KINDS: dict[str, ModelConfig] = {
    "relative": configs.T5,
    "learned": LEARNED,
    "rotary": ROTARY,
    "a base of its own": dataclasses.replace(
        ROTARY, rotary_base=500.0, rope_scaling=RopeScaling(factor=4.0)
    ),
    "as transformers' original": dataclasses.replace(
        configs.T5,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        add_bias_linear=False,
        add_qkv_bias=False,
        activation="relu",
        softmax_scale=1.0,
        logit_multiplier=32**-0.5,
    ),
    "as v1.1": dataclasses.replace(
        configs.T5,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=False,
        activation="swiglu",
        untie_embeddings_and_output_weights=True,
    ),
}


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.config == other.config
    assert set(one.tensors) == set(other.tensors)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.read(), other.tensors[name].read()), name


@pytest.mark.parametrize("kind", KINDS)
def test_all_sizes_and_both_formats_hold_the_same_bits(kind: str, tmp_path: Path):
    # 64 rows: what every size divides, so that none is added.
    first = random_models.checkpoint(dataclasses.replace(KINDS[kind], vocab_size=64))
    source = first
    for number, (to, tp) in enumerate(
        [("megatron", 4), ("megatron", 1), ("torch_dist", 2), ("megatron", 2)]
    ):
        folder = tmp_path / str(number)
        convert(source, to, folder, tp=tp)
        source = open_checkpoint(folder)
        assert (source.provenance.tensor_parallel, source.provenance.names) == (tp, "core")
        assert_same(source, first)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("relative", ["TransformerEngine's layers only"]),
        ("learned", []),
        ("a base of its own", ["rope_scaling_factor is 4", "rotary_base is 500"]),
        ("as transformers' original", ["args.softmax_scale is 1", "the ReLU", "scaled .* logits"]),
    ],
)
def test_what_megatron_does_not_pass_on_is_said(kind: str, words: list[str], tmp_path: Path):
    done = convert(random_models.checkpoint(KINDS[kind]), "megatron", tmp_path / "out")
    told = " ".join(done.warnings)
    assert all(re.search(word, told) for word in words), told
    assert bool(told) == bool(words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pp": 2}, "cannot write a T5 in pp=2 pipeline stages"),
        ({"names": "legacy"}, "v2.5 has no .*, so its names cannot hold this model"),
        ({"tp": 3}, "cannot split this model over tp=3"),
    ],
)
def test_what_megatron_has_not_is_refused(options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        convert(random_models.checkpoint(LEARNED), "megatron", tmp_path / "out", **options)


@pytest.mark.parametrize("name", ["t5_tp2", "t5_relative_tp2", "t5_dist"])
def test_files_are_those_that_megatron_wrote(name: str, tmp_path: Path):
    """The same keys, shapes and bits, the second names of modules and empty states included."""
    genuine = SHARED / "oracles" / "families" / name
    if not genuine.is_dir():
        pytest.skip(f"{genuine} is not here")
    source = open_checkpoint(genuine)
    step = "iter_0000001"
    if name == "t5_dist":
        convert(source, "torch_dist", tmp_path / "out")
        theirs, ours = open_folder(genuine / step), open_folder(tmp_path / "out" / step)
        assert set(theirs.tensors) == set(ours.tensors)
        # Ours has those of TransformerEngine's layers too.
        assert set(theirs.objects) <= set(ours.objects)
        for key in theirs.tensors:
            assert torch.equal(theirs.tensor(key).read(), ours.tensor(key).read()), key
        return
    convert(source, "megatron", tmp_path / "out", tp=1)
    convert(open_checkpoint(tmp_path / "out"), "megatron", tmp_path / "two", tp=2)
    for rank in ("mp_rank_00", "mp_rank_01"):
        file = f"{step}/{rank}/model_optim_rng.pt"
        theirs, ours = (
            read_torch_file(folder / file).value["model"] for folder in (genuine, tmp_path / "two")
        )
        assert set(theirs) == set(ours)
        for key, tensor in theirs.items():
            if tensor is None:
                assert ours[key] is None
            else:
                assert torch.equal(tensor.read(), ours[key].read()), key


def test_pipeline_stages_are_refused_by_name(tmp_path: Path):
    convert(random_models.checkpoint(LEARNED), "megatron", tmp_path / "out")
    [file] = tmp_path.glob("out/*/mp_rank_00/model_optim_rng.pt")
    contents = torch.load(file, weights_only=False)
    contents["args"].pipeline_model_parallel_size = 2
    for stage in range(2):
        folder = file.parent.with_name(f"mp_rank_00_{stage:03d}")
        folder.mkdir()
        contents["args"].rank = stage
        torch.save(contents, folder / file.name)
    file.unlink()
    file.parent.rmdir()
    with pytest.raises(InputError, match="a T5 model in pipeline stages"):
        open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_num_layers": 5}, "holds 1 decoder layers where its args say 5"),
        ({"encoder_num_layers": 7}, "holds 2 layers where its args say 7"),
    ],
)
def test_stacks_that_args_contradict_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
):
    convert(random_models.checkpoint(LEARNED), "megatron", tmp_path / "out")
    [file] = tmp_path.glob("out/*/mp_rank_00/model_optim_rng.pt")
    contents = torch.load(file, weights_only=False)
    vars(contents["args"]).update(change)
    torch.save(contents, file)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "out")


@pytest.mark.process
@pytest.mark.long
@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatron_core_loads_them_and_computes_the_same_logits(tmp_path: Path) -> None:
    """Its model is built from nothing but the args that we wrote."""
    noise = torch.Generator().manual_seed(5)
    inputs = {
        "encoder_tokens": torch.randint(64, (2, 8), generator=noise),
        "encoder_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
        "tokens": torch.randint(64, (2, 6), generator=noise),
    }
    torch.save(inputs, tmp_path / "inputs")
    triples: list[Path] = []
    for kind in ("learned", "rotary", "relative"):
        source = random_models.checkpoint(dataclasses.replace(KINDS[kind], vocab_size=64))
        for to, place in (("megatron", "mp_rank_00/model_optim_rng.pt"), ("torch_dist", "")):
            folder = tmp_path / f"{kind}-{to}"
            convert(source, to, folder)
            triples += [folder / "release" / place, tmp_path / "inputs", folder / "output"]
    run_core("megatron_core_t5.py", tmp_path, triples)
    for output in triples[2::3]:
        kind = output.parent.name.partition("-")[0]
        theirs = torch.load(output)
        if kind == "relative":  # its local layers have no place for them; the weights fit
            assert theirs == {}
            continue
        source = random_models.checkpoint(dataclasses.replace(KINDS[kind], vocab_size=64))
        ours = outputs(source, inputs)["logits"]
        assert ours.std() > 0.5
        atol = 1e-4 * ours.std().item()
        torch.testing.assert_close(theirs["logits"], ours, rtol=0, atol=atol, msg=str(output))


def as_zarr(folder: Path, target: Path) -> Path:
    """Write what a torch_dist folder holds as arrays, cut in two along their first dim."""
    stored = open_folder(folder)
    for key in stored.tensors:
        values = stored.tensor(key).read()
        write_array(target / key, values, (-(-values.shape[0] // 2), *values.shape[1:]))
    (target / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    shutil.copy(folder / "common.pt", target)
    return target


def test_zarr_holds_the_same_model(tmp_path: Path) -> None:
    """The layout that torch_dist took over: the same keys, an array a folder."""
    for kind in ("relative", "learned"):
        source = random_models.checkpoint(dataclasses.replace(KINDS[kind], vocab_size=64))
        convert(source, "torch_dist", tmp_path / kind)
        found = open_checkpoint(as_zarr(tmp_path / kind / "release", tmp_path / f"{kind}-zarr"))
        assert found.provenance.format == "megatron-zarr"
        assert_same(found, source)
