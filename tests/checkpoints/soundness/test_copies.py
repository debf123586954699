"""Files that are copies of others, and models whose parts are meant to be the same."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_models
from support.folders import dcp_folders, layouts
from support.folders.synthetic import GPT, args_of, change, random_model, rank_file, write
from support.folders.zarr_folders import write_array

from mlm_eval.checkpoints.checkpoint import Checkpoint, with_each
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.distcp import DistributedFolder, open_folder
from mlm_eval.checkpoints.files.zarr_arrays import open_arrays
from mlm_eval.checkpoints.lazy import InMemory, LazyTensor
from mlm_eval.checkpoints.megatron import read_dist
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.soundness.check import check_everything
from mlm_eval.checkpoints.soundness.copies import copied_experts, copied_on_purpose, is_plain

pytest_plugins = ["support.command_line_fixtures"]

WEIGHT = "decoder.layers.1.mlp.linear_fc1.weight"


def four_stages(root: Path, tp: int = 2, **how: Any) -> Path:
    """Write a checkpoint of four stages."""
    stages = [[[n]] for n in range(4)]
    return write(root, random_model(GPT), GPT, tp=tp, args=args_of(GPT), stages=stages, **how)


@pytest.mark.parametrize("era", ["core", "v2.5"])
def test_a_rank_s_file_in_the_place_of_another_s_is_refused(tmp_path, era):
    root = write(tmp_path, random_model(GPT), GPT, tp=4, era=era, args=args_of(GPT))
    shutil.copyfile(rank_file(root, 1), rank_file(root, 3))
    with pytest.raises(InputError, match="ranks 1 and 3 hold the same slices.*bit by bit"):
        open_checkpoint(root)


def copy_stage(root: Path, rank: int) -> None:
    """Put the weights of a rank in stage 2 in the place of those in stage 1."""
    theirs = torch.load(rank_file(root, rank, 2), weights_only=False)["model"]
    change(rank_file(root, rank, 1), lambda contents: contents.update(model=theirs))


def test_stages_that_are_the_same_on_all_ranks_are_warned_of(run, tmp_path):
    """Copied files, or a model that was made deeper with copies of its layers: nothing tells."""
    root = four_stages(tmp_path)
    for rank in range(2):
        copy_stage(root, rank)
    checkpoint = open_checkpoint(root)
    (warning,) = checkpoint.provenance.warnings
    assert warning.startswith(
        "pipeline stages 1 and 2 hold the same layers, bit by bit: a file was"
    )
    assert "made larger by copies" in warning
    assert list(check_everything(checkpoint).findings) == checkpoint.provenance.same_parts
    ended = run("inspect", "--ckpt", root, "--check")
    assert ended.code == 2 and "stages 1 and 2 hold the same layers" in ended.out + ended.err


@pytest.mark.parametrize("rank", range(2))
def test_a_rank_s_file_of_another_stage_is_refused(tmp_path, rank):
    """No model is made deeper in a part of each matrix."""
    root = four_stages(tmp_path)
    copy_stage(root, rank)
    with pytest.raises(InputError, match="stages 1 and 2 hold the same layers.*copy of the other"):
        open_checkpoint(root)


def test_norms_of_a_fresh_model_are_no_copies(tmp_path):
    """Their gains are drawn as ones in each layer, and biases as zeros."""
    model = {
        name: torch.full_like(tensor, float(name.endswith("weight")))
        if tensor.ndim == 1
        else tensor
        for name, tensor in random_model(GPT).items()
    }
    stages = [[[n]] for n in range(4)]
    root = write(tmp_path, model, GPT, tp=2, args=args_of(GPT), stages=stages)
    assert open_checkpoint(root).provenance.warnings == []


def test_what_is_drawn_as_a_constant_is_equal_everywhere(tmp_path):
    model = {name: torch.ones_like(tensor) for name, tensor in random_model(GPT).items()}
    root = write(tmp_path, model, GPT, tp=2, args=args_of(GPT))
    assert open_checkpoint(root).num_parameters


def test_ranks_that_hold_padding_alone_are_no_copies(tmp_path):
    """Megatron's converter pads a vocabulary with copies of its last row."""
    model = random_model(GPT)
    for name, tensor in model.items():
        if name.endswith("word_embeddings.weight"):
            tensor[10:] = tensor[9]
    root = write(tmp_path, model, GPT, tp=4, args=args_of(GPT))
    assert open_checkpoint(root).num_parameters


def test_a_tensor_is_plain_where_all_of_its_values_are_the_same():
    half = torch.zeros(5 << 20)  # read in two runs
    assert is_plain(InMemory(half)) and is_plain(InMemory(torch.tensor(3.0)))
    assert not is_plain(InMemory(torch.cat([half[: 4 << 20], half[4 << 20 :] + 1])))


def test_experts_that_begin_as_copies_are_no_copied_files(tmp_path):
    """A mixture made of a dense model ("upcycled") has its MLP as each expert."""
    parts = {
        f"decoder.layers.0.mlp.experts.local_experts.{n}.linear_fc1.weight": InMemory(
            torch.arange(12.0).reshape(4, 3)
        )
        for n in range(2)
    }
    assert copied_experts({0: parts, 1: dict(parts)}) is None
    own = {
        name: InMemory(torch.randn(4, 3, generator=torch.Generator().manual_seed(n)))
        for n, name in enumerate(parts)
    }
    assert "ranks 0 and 1 hold the same" in (copied_experts({0: own, 1: dict(own)}) or "")


def test_one_rank_alone_has_no_copies_on_purpose():
    assert copied_on_purpose([None, None], "x") == []
    assert copied_on_purpose(["stages 1 and 2"] * 2, "x") == ["stages 1 and 2"]
    for found in (["stages 1 and 2", None], ["stages 1 and 2", "stages 2 and 3"]):
        with pytest.raises(InputError, match="x: stages 1 and 2, bit by bit"):
            copied_on_purpose(found, "x")


def test_a_layer_s_file_in_the_place_of_another_s_is_said(tmp_path):
    from support.folders.deepspeed_folders import write_neox

    root = write_neox(tmp_path / "neox", random_model(GPT), GPT, tp=2)
    step = root / "global_step7"
    saved = {path: path.read_bytes() for path in step.glob("layer_*.pt")}
    for rank in range(2):
        name = "layer_{:02d}-model_{:02d}-model_states.pt"
        shutil.copyfile(step / name.format(3, rank), step / name.format(4, rank))
    (warning,) = open_checkpoint(root).provenance.warnings
    assert warning.startswith("layers 1 and 2 are the same, bit by bit: a file was copied over")
    shutil.copyfile(step / name.format(5, 1), step / name.format(4, 1))
    with pytest.raises(InputError, match="are the same.*one file is a copy of the other"):
        open_checkpoint(root)
    for path, data in saved.items():
        path.write_bytes(data)
    shutil.copyfile(step / name.format(3, 0), step / name.format(3, 1))
    with pytest.raises(InputError, match="0 and 1 hold the same slices in decoder.layers.1"):
        open_checkpoint(root)


def test_a_distcp_file_in_the_place_of_another_is_refused(tmp_path):
    tensors = random_model(GPT)
    cuts = {name: (2,) for name, tensor in tensors.items() if tensor.ndim > 1}
    common = {"args": args_of(GPT), "checkpoint_version": 3.0}
    step = dcp_folders.save(tmp_path / "iter_0000005", tensors, cuts=cuts, common=common)
    assert open_checkpoint(step)
    one, other = sorted(step.glob("*.distcp"))
    shutil.copyfile(one, other)
    with pytest.raises(InputError):
        open_checkpoint(step).tensors[WEIGHT].read()


def test_a_chunk_of_zarr_in_the_place_of_another_is_refused(tmp_path):
    layouts.zarr(tmp_path)
    array = tmp_path / "iter_0000007" / WEIGHT
    shutil.copyfile(array / "0.0", array / "1.0")
    with pytest.raises(InputError, match=f"two chunks of {WEIGHT} are the same"):
        open_checkpoint(tmp_path)


def two_stages(root: Path, values: list[dict[str, torch.Tensor]]) -> DistributedFolder:
    """Return what two stages of two ranks have written: layers 0 and 1."""
    found = []
    for stage, tensors in enumerate(values):
        named = {f"decoder.layers.{stage}.{name}": tensor for name, tensor in tensors.items()}
        cuts = dict.fromkeys(named, (2,))
        files = open_folder(dcp_folders.save(root / str(stage), named, cuts=cuts))
        for key, entry in files.tensors.items():
            moved = []
            for chunk in entry.chunks:
                name = chunk.record.file.replace("__0_", f"__{stage}_")
                record = dataclasses.replace(chunk.record, file=name)
                moved.append(dataclasses.replace(chunk, record=record))
            files.tensors[key] = dataclasses.replace(entry, chunks=tuple(moved))
        found.append(files)
    for file in (root / "1").glob("*.distcp"):
        file.rename(root / "0" / file.name.replace("__0_", "__1_"))
    found[0].tensors.update(found[1].tensors)
    return found[0]


def same_files(files: DistributedFolder) -> list[str]:
    """Return which files are the same, as reading the folder finds them."""
    keys = list(files.tensors)
    return read_dist._same_files(files, keys, files.tails(files.records(keys)))


def test_distcp_files_of_equal_stages_are_warned_of_and_of_one_rank_refused(tmp_path):
    noise = torch.Generator().manual_seed(0)
    first, other = (
        {name: torch.randn(8, 6, generator=noise) for name in ("fc1.weight", "fc2.weight")}
        for _ in range(2)
    )
    assert same_files(two_stages(tmp_path / "other", [first, other])) == []
    (said,) = same_files(two_stages(tmp_path / "same", [first, first]))
    assert said == "__0_0.distcp and __1_0.distcp hold the same values"
    half = {name: torch.cat([first[name][:4], other[name][4:]]) for name in first}
    with pytest.raises(InputError, match="__0_. and __1_..distcp hold the same|__0_0.distcp and"):
        same_files(two_stages(tmp_path / "half", [first, half]))


def test_layers_of_one_array_may_be_the_same_and_slices_may_not(tmp_path):
    noise = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 8, 6, generator=noise)

    def same(name: str, *layers: torch.Tensor) -> list[str]:
        write_array(tmp_path / name / "w", torch.stack(layers), (1, 4, 6))
        arrays = open_arrays(tmp_path / name)
        assert len(list(arrays.layers("w"))) == len(layers)
        return arrays.same_layers()

    assert same("none", one, other) == []
    assert same("all", one, one, other) == ["two chunks of w are the same"]
    for name, layers in {
        "one slice": (one, torch.cat([one[:4], other[4:]])),
        "in a layer": (torch.cat([one[:4], one[:4]]), other),
    }.items():
        with pytest.raises(InputError, match="two chunks of w are the same, bit by bit: one file"):
            same(name, *layers)


MOE = dataclasses.replace(
    random_models.LLAMA,
    num_experts=4,
    moe_layers=(0, 1),
    moe_router_topk=2,
    moe_ffn_hidden_size=32,
)


def upcycled(model: Checkpoint) -> Checkpoint:
    """Return a model whose experts are all the first one."""

    def first(name: str, tensor: LazyTensor) -> LazyTensor:
        if ".experts." not in name:
            return tensor
        return InMemory(tensor.read()[:1].expand(tensor.shape).contiguous())

    return with_each(model, first)


LAYOUTS = [(1, 4, 1), (2, 4, 1), (2, 4, 2), (2, 2, 1), (2, 2, 2), (4, 4, 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_of_a_fresh_mixture_may_be_the_same_however_they_lie(tmp_path, layout):
    tp, ep, etp = layout
    model = random_models.checkpoint(MOE)
    write_megatron_torch(model, tmp_path / "trained", tp=tp, ep=ep, etp=etp)
    assert open_checkpoint(tmp_path / "trained").provenance.same_parts == []
    write_megatron_torch(upcycled(model), tmp_path / "fresh", tp=tp, ep=ep, etp=etp)
    found = open_checkpoint(tmp_path / "fresh").provenance
    compared = ep == 4 and (etp == 2 or tp < ep)
    assert found.same_parts == ["expert-parallel ranks hold the same experts"] * compared
    assert any("was copied over another one" in text for text in found.warnings) is compared
