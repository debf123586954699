"""Which checkpoint a path leads to: the weights that are there decide, at every door."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.folders.synthetic import GPT, args_of, random_model, rank_file, write
from support.huggingface_models import gpt_model
from support.paths import ORACLES

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.options import KEY, CheckpointOption

TRACKER = "latest_checkpointed_iteration.txt"
DIST = ORACLES / "mcore016_gpt2_tp2_dist"


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A root with two tensor-parallel ranks."""
    return write(tmp_path / "root", random_model(GPT), GPT, tp=2, args=args_of(GPT))


def format_of(path: Path, **overrides: object) -> str:
    return open_checkpoint(path, overrides).provenance.format


def copied(name: str, target: Path) -> Path:
    source = next((ORACLES / name).rglob(".metadata")).parent
    return Path(shutil.copytree(source, target))


def without_args(folder: Path) -> Path:
    torch.save({"checkpoint_version": 3.0, "iteration": 1}, folder / "common.pt")
    return folder


# ---- several forms in one folder ---------------------------------------------------------------


def test_a_config_beside_ranks_does_not_make_a_hub_folder(ranks: Path):
    expected = open_checkpoint(ranks).provenance.digest
    (ranks / "config.json").write_text('{"model_type": "gpt2"}')
    (ranks / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.x"}}')
    assert open_checkpoint(ranks).provenance.digest == expected
    step = rank_file(ranks).parent.parent
    (step / "config.json").write_text("no JSON at all")
    assert open_checkpoint(step).provenance.digest == expected


@pytest.mark.parametrize("place", [".", "iter_0000005"])
def test_two_checkpoints_in_one_folder_are_refused_with_both_doors(
    place: str, ranks: Path, tmp_path: Path
):
    gpt_model("gpt2").save_pretrained(tmp_path / "hub")
    target = ranks / place
    shutil.copytree(tmp_path / "hub", target, dirs_exist_ok=True)
    with pytest.raises(InputError, match="holds two checkpoints") as caught:
        open_checkpoint(target)
    assert f"give --ckpt {target / 'config.json'} for the first" in str(caught.value)
    assert format_of(target / "config.json") == "huggingface"
    second = rank_file(ranks).parent
    assert f", or {second} for the second" in str(caught.value)
    for door in (second, rank_file(ranks), ranks / TRACKER):
        assert format_of(door) == "megatron-torch"


def test_a_hub_folder_with_a_tracker_of_nothing_is_one(tmp_path: Path):
    gpt_model("gpt2").save_pretrained(tmp_path)
    (tmp_path / TRACKER).write_text("100")
    assert format_of(tmp_path) == "huggingface"


# ---- doors -------------------------------------------------------------------------------------


def test_every_file_of_a_hub_folder_opens_it(tmp_path: Path):
    gpt_model("gpt2").save_pretrained(tmp_path / "one")
    gpt_model("gpt2").save_pretrained(tmp_path / "many", max_shard_size="40KB")
    doors = [*(tmp_path / "one").glob("*model*"), *(tmp_path / "many").glob("*model*")]
    assert len(doors) > 4
    for door in (*doors, tmp_path / "one/config.json"):
        assert format_of(door) == "huggingface", door
    shutil.copy(tmp_path / "one/model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(InputError, match="is one file of a Hugging Face model; give --ckpt"):
        open_checkpoint(tmp_path / "alone.safetensors")
    shutil.copy(tmp_path / "one/model.safetensors", tmp_path / "one/other.safetensors")
    with pytest.raises(InputError, match="is one file of a Hugging Face model; give --ckpt"):
        open_checkpoint(tmp_path / "one/other.safetensors")


def test_the_hubs_cache_is_followed(tmp_path: Path):
    gpt_model("gpt2").save_pretrained(tmp_path / "models--x--y/snapshots/abc")
    (tmp_path / "models--x--y/refs").mkdir(parents=True, exist_ok=True)
    (tmp_path / "models--x--y/refs/main").write_text("abc")
    assert format_of(tmp_path / "models--x--y") == "huggingface"


def test_every_file_of_a_distributed_checkpoint_opens_it(tmp_path: Path):
    folder = copied(DIST.name, tmp_path / "iter_0000001")
    (tmp_path / TRACKER).write_text("1")
    for door in (tmp_path / TRACKER, *folder.iterdir()):
        assert format_of(door) == "megatron-torch-dist", door


def test_files_beside_a_model_file_open_it(ranks: Path):
    torch.save({}, rank_file(ranks).with_name("distrib_optim.pt"))
    assert format_of(rank_file(ranks).with_name("distrib_optim.pt")) == "megatron-torch"
    assert format_of(ranks / TRACKER) == "megatron-torch"


def _every_door(root: Path, name: str = "iter_0000005") -> list[Path]:
    steps = root / name
    parts = [steps / f"mp_rank_{rank:02d}" for rank in range(2)]
    return [root, steps, *parts, *(part / "model_optim_rng.pt" for part in parts)]


def _folders_on_nodes(root: Path, target: Path) -> None:
    """Each rank's folder lies on a node of its own."""
    for rank in range(2):
        node = target.parent / f"node{rank}" / "iter_0000005" / f"mp_rank_{rank:02d}"
        shutil.copytree(rank_file(root, rank).parent, node)
        (target / "iter_0000005").mkdir(parents=True, exist_ok=True)
        (target / "iter_0000005" / f"mp_rank_{rank:02d}").symlink_to(node)


def _renamed_folders(root: Path, target: Path) -> None:
    """What the links lead to has another name."""
    for rank in range(2):
        node = target.parent / f"part-{rank}"
        shutil.copytree(rank_file(root, rank).parent, node)
        (target / "iter_0000005").mkdir(parents=True, exist_ok=True)
        (target / "iter_0000005" / f"mp_rank_{rank:02d}").symlink_to(node)


def _blobs(root: Path, target: Path) -> None:
    """Each file is a link into a store, as in the Hub's cache and in git-annex."""
    for rank in range(2):
        blob = target.parent / "blobs" / f"{rank}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(rank_file(root, rank), blob)
        part = target / "iter_0000005" / f"mp_rank_{rank:02d}"
        part.mkdir(parents=True, exist_ok=True)
        (part / "model_optim_rng.pt").symlink_to(os.path.relpath(blob, part))


def _linked_step(root: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    (target / "iter_0000005").symlink_to(root / "iter_0000005")


def _linked_root(root: Path, target: Path) -> None:
    target.symlink_to(root)


@pytest.mark.parametrize(
    "links", [_folders_on_nodes, _renamed_folders, _blobs, _linked_step, _linked_root]
)
def test_links_make_no_difference_at_any_door(
    links: Callable[[Path, Path], None], ranks: Path, tmp_path: Path
):
    expected = open_checkpoint(ranks).provenance.digest
    links(ranks, tmp_path / "linked")
    for door in _every_door(tmp_path / "linked"):
        assert open_checkpoint(door).provenance.digest == expected, door


def test_a_link_to_one_rank_opens_the_others_beside_it(ranks: Path, tmp_path: Path):
    expected = open_checkpoint(ranks).provenance.digest
    (tmp_path / "elsewhere").mkdir(parents=True, exist_ok=True)
    for name in ("mp_rank_01", "my-checkpoint"):
        link = tmp_path / "elsewhere" / name
        link.symlink_to(rank_file(ranks, 1).parent)
        assert open_checkpoint(link).provenance.digest == expected
        assert open_checkpoint(link / "model_optim_rng.pt").provenance.digest == expected


def test_the_folder_that_one_stands_in(ranks: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(rank_file(ranks, 1).parent)
    for door in (".", "model_optim_rng.pt", "..", "../..", "../mp_rank_00"):
        assert open_checkpoint(door).provenance.tensor_parallel == 2, door


# ---- layouts of other projects -----------------------------------------------------------------


def _files(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"\x80\x02}q\x00." if "." in name else b"global_step10")

    return make


def _verl(folder: Path) -> None:
    without_args(copied(DIST.name, folder / "global_step_10/actor/dist_ckpt"))
    (folder / "global_step_10/actor/transformer_config.json").write_text("{}")
    (folder / TRACKER).write_text("10")


def _nemo_2(folder: Path) -> None:
    without_args(copied(DIST.name, folder / "weights"))
    (folder / "context").mkdir(parents=True, exist_ok=True)
    (folder / "context/model.yaml").write_text("config: {}")


def _bridge(folder: Path) -> None:
    without_args(copied(DIST.name, folder / "iter_0000001"))
    (folder / "iter_0000001/run_config.yaml").write_text("model: {}")
    (folder / TRACKER).write_text("1")


def _nemo_archive(folder: Path) -> None:
    (folder / "model_config.yaml").write_text("{}")
    with tarfile.open(folder / "model.nemo", "w") as archive:
        archive.add(folder / "model_config.yaml", "./model_config.yaml")
    (folder / "model_config.yaml").unlink()
    shutil.copy(folder / "model.nemo", folder / "renamed")


def _nemo_dict(folder: Path) -> None:
    torch.save({"model.language_model.embedding.x": torch.ones(2)}, folder / "any.ckpt")


def _dicts(folder: Path) -> None:
    ones = torch.ones(2)
    deepspeed = {"module": {"a": ones}, "ds_config": {}, "dp_world_size": 1}
    torch.save(deepspeed, folder / "renamed-deepspeed.pt")


def _nanogpt(folder: Path) -> None:
    saved = {"model": {}, "model_args": {"n_layer": 2}, "iter_num": 1}
    torch.save(saved, folder / "ckpt.pt")


def _trainer(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    _files("global_step10/zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32.py")(folder)


RELATIVES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "DeepSpeed, ZeRO's parts": (
        _files("latest", "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        (
            *(".", "global_step10"),
            "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        ),
        "is a DeepSpeed checkpoint without the model's own files",
    ),
    "DeepSpeed, universal": (
        _files("global_step10_universal/zero/a.weight/fp32.pt"),
        (".", "global_step10_universal"),
        "is a DeepSpeed checkpoint",
    ),
    "DeepSpeed, renamed": (_dicts, ("renamed-deepspeed.pt",), "is a DeepSpeed checkpoint"),
    "DeepSpeed of a Trainer": (
        _trainer, (".", "global_step10"), "is a DeepSpeed checkpoint.*zero_to_fp32.py",
    ),
    "verl": (
        _verl,
        (
            ".", "global_step_10", "global_step_10/actor", "global_step_10/actor/dist_ckpt",
            "global_step_10/actor/dist_ckpt/__0_0.distcp",
        ),
        "actor/transformer_config.json lacks it.*give --set num_attention_heads",
    ),
    "verl with FSDP": (
        _files("global_step_5/actor/model_world_size_2_rank_0.pt"),
        (
            ".", "global_step_5", "global_step_5/actor",
            "global_step_5/actor/model_world_size_2_rank_0.pt",
        ),
        "checkpoint of verl.*verl.model_merger merge --backend fsdp",
    ),
    "NeMo 2": (
        _nemo_2, (".", "weights", "weights/.metadata"), "context/model.yaml lacks it.*give --set",
    ),
    "Megatron-Bridge": (
        _bridge, (".", "iter_0000001", "iter_0000001/common.pt"),
        "iter_0000001/run_config.yaml lacks it.*give --set",
    ),
    "NeMo archive without weights": (
        _nemo_archive, ("model.nemo", "renamed"), "is a tar archive, and not of a NeMo model",
    ),
    "NeMo without settings": (
        _files("mp_rank_00/model_weights.ckpt"),
        (".", "mp_rank_00", "mp_rank_00/model_weights.ckpt"),
        "is a NeMo checkpoint without model_config.yaml",
    ),
    "NeMo without settings, stages": (
        _files("tp_rank_00_pp_rank_000/model_weights.ckpt"),
        (".", "tp_rank_00_pp_rank_000"), "is a NeMo checkpoint without model_config.yaml",
    ),
    "NeMo state dict": (
        _nemo_dict, ("any.ckpt",), "is a NeMo checkpoint without model_config.yaml",
    ),
    "FSDP of a Trainer": (
        _files("config.json", "pytorch_model_fsdp_0/.metadata"),
        (".",), "accelerate merge-weights",
    ),
    "adapters": (
        _files("adapter_config.json", "adapter_model.safetensors"),
        (".", "adapter_model.safetensors"), "adapters .LoRA. without their base model",
    ),
    "GGUF": (_files("model.Q4_K_M.gguf"), (".", "model.Q4_K_M.gguf"), "a GGUF model of llama.cpp"),
    "TensorFlow 1": (
        _files("bert_model.ckpt.index", "bert_model.ckpt.meta"),
        (".", "bert_model.ckpt.index"), "a checkpoint of TensorFlow 1",
    ),
    "TensorFlow 2": (
        _files("config.json", "tf_model.h5"), (".", "tf_model.h5"), "weights of TensorFlow",
    ),
    "nanoGPT": (_nanogpt, ("ckpt.pt",), "is a checkpoint of nanoGPT"),
}  # fmt: skip


@pytest.mark.parametrize("project", RELATIVES)
def test_other_projects_layouts_are_named_at_every_door(project: str, tmp_path: Path):
    make, doors, message = RELATIVES[project]
    make(tmp_path)
    for door in doors:
        with pytest.raises(InputError, match=message) as caught:
            open_checkpoint(tmp_path / door)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 700, door


def test_what_stands_beside_is_named_but_settings_by_hand_are_enough(tmp_path: Path):
    _bridge(tmp_path)
    expected: Checkpoint = open_checkpoint(DIST)
    with pytest.raises(InputError, match="--set activation=gelu"):
        open_checkpoint(tmp_path, {"num_attention_heads": 4})
    heads = expected.config.num_attention_heads
    given = {"num_attention_heads": heads, "activation": expected.config.activation}
    found = open_checkpoint(tmp_path, given)
    assert found.config.num_attention_heads == heads
    assert set(found.tensors) == set(expected.tensors)


def test_a_readable_checkpoint_is_read_whatever_lies_beside(ranks: Path):
    """Megatron-DeepSpeed's converter, a copied tokenizer and an export share the root."""
    (ranks / "latest").write_text("global_step10")
    _files("global_step10/mp_rank_00_model_states.pt", "zero_to_fp32.py", "model.onnx")(ranks)
    (ranks / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert format_of(ranks) == "megatron-torch"


def test_a_rank_folder_of_other_files_says_what_is_there(tmp_path: Path):
    _files("iter_0000005/mp_rank_00/weights.bin")(tmp_path)
    with pytest.raises(InputError, match=r"no model_optim_rng.pt in them \(found weights.bin\)"):
        open_checkpoint(tmp_path)


# ---- what is read, in words --------------------------------------------------------------------

LAYOUTS_READ = ("Bridge", "NeMo", "verl", "zarr", "torch_dcp", "fsdp_dtensor", "DeepSpeed", ".nemo")


def test_a_folder_without_a_checkpoint_names_all_that_is_read(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="holds no checkpoint that mlm-eval knows") as caught:
        open_checkpoint(tmp_path)
    assert [name for name in LAYOUTS_READ if name not in str(caught.value)] == []


def test_the_help_of_ckpt_names_all_that_is_read():
    entry = CheckpointOption.__dataclass_fields__["ckpt"].metadata[KEY]
    assert [name for name in LAYOUTS_READ if name not in entry.help] == []
