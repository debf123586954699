"""What a user is told when a checkpoint cannot be opened: one sentence, and a way out."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders.synthetic import (
    BERT,
    GPT,
    LLAMA,
    Model,
    args_of,
    change,
    random_model,
    rank_file,
    write,
)
from support.paths import ORACLES

from mlm_eval.checkpoints.archives import unpacking
from mlm_eval.checkpoints.archives import zip_archive as archive
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint

SHIPPED = ORACLES
TRACKER = "latest_checkpointed_iteration.txt"


def refused(path: Path, *parts: str, **overrides: Any) -> str:
    """Check that opening `path` ends in one sentence with all `parts` (patterns, in order)."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path, overrides)
    message = str(caught.value)
    assert re.search(".*".join(parts), message), message
    assert message.isprintable(), message
    assert len(message) < 700, message
    assert "Error" not in message.replace("InputError", "")
    assert any(word in message for word in WAYS_OUT), message
    return message


WAYS_OUT = (
    "give ",
    "copy",
    "--set",
    "use ",
    "get ",
    "download",
    "remove",
    "merge ",
    "set XDG",
    "reads",
    "score it",
)


def gpt(root: Path, *, tp: int = 2, seed: int = 1, **options: Any) -> Path:
    """Write a small GPT checkpoint."""
    options = {"args": args_of(GPT), **options}
    return write(root, random_model(GPT, seed=seed), GPT, tp=tp, **options)


# ---- paths -------------------------------------------------------------------------------------


def test_a_path_that_is_not_there(tmp_path: Path):
    refused(tmp_path / "none", f"^{tmp_path}/none does not exist; give --ckpt the folder or file")


def test_something_that_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    refused(tmp_path / "pipe", f"^{tmp_path}/pipe is neither a file nor a folder; give --ckpt")


def test_folders_without_a_checkpoint(tmp_path: Path):
    known = "expected one of: Megatron.s mp_rank_XX folders; .metadata with .distcp files"
    with pytest.raises(InputError, match=f"{tmp_path} holds no checkpoint.*found nothing.*{known}"):
        open_checkpoint(tmp_path)
    for name in ("readme.txt", "weights.bin"):
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=f"found readme.txt, weights.bin.*{known}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"last", b"\xff\xfe\x00", b"1.5", b"5 6", b"iter_5"])
def test_a_tracker_file_that_names_nothing(content: bytes, tmp_path: Path):
    gpt(tmp_path)
    (tmp_path / TRACKER).write_bytes(content)
    other = "is empty|is UTF-16 text"
    message = f"{tmp_path}/{TRACKER} (holds neither an iteration number nor 'release'|{other}); .*"
    refused(tmp_path, f"{message}give --ckpt an iter_")


@pytest.mark.parametrize(
    ("content", "wanted"), [("7", "iter_0000007"), ("release", "release"), ("-1", "iter_-000001")]
)
def test_a_tracker_file_that_names_what_is_not_there(content: str, wanted: str, tmp_path: Path):
    gpt(tmp_path)
    (tmp_path / TRACKER).write_text(content)
    refused(tmp_path, f"{TRACKER} names {wanted}, which is not there .found iter_0000005.; give")
    shutil.rmtree(tmp_path / "iter_0000005")
    refused(tmp_path, "which is not there .found no iter_. folder.")


def test_several_iterations_without_a_tracker(tmp_path: Path):
    gpt(tmp_path, iteration=5)
    gpt(tmp_path, iteration=6)
    (tmp_path / TRACKER).unlink()
    refused(tmp_path, f"no {TRACKER} and several checkpoints .iter_0000005, iter_0000006.; give")


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Permissions do not bind root, so the refusal is acted."""
    root = gpt(tmp_path)
    denied = rank_file(root, 1)
    real = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self == denied:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=f"{denied} cannot be read: permission denied"):
        open_checkpoint(root)
    monkeypatch.undo()

    listed = Path.iterdir

    def hide(self: Path) -> Any:
        if self == root:
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", hide)
    refused(root, f"{root} cannot be read: permission denied; change its permissions, or copy")


# ---- incomplete and mixed ----------------------------------------------------------------------


def test_a_missing_rank(tmp_path: Path):
    root = gpt(tmp_path, tp=4)
    shutil.rmtree(rank_file(root, 2).parent)
    message = refused(root, "iter_0000005/mp_rank_02 has no model file", "copy the missing folder")
    assert "4 tensor-parallel x 1 pipeline ranks, and 3 of 4 files are here" in message
    gpt(tmp_path, tp=4)
    rank_file(root, 2).unlink()
    refused(root, "mp_rank_02 has no model file")
    for rank in range(4):
        rank_file(root, rank).unlink(missing_ok=True)
    refused(root, "iter_0000005 has 4 mp_rank_XX folder.s. but no model_optim_rng.pt in them; copy")


def test_a_missing_pipeline_stage(tmp_path: Path):
    root = gpt(tmp_path, stages=[[[0]], [[1]], [[2]], [[3]]])
    shutil.rmtree(rank_file(root, 1, 2).parent)
    refused(root, "mp_rank_01_002 has no model file", "2 tensor-parallel x 4 pipeline", "7 of 8")


def test_a_missing_stage_of_files_that_do_not_say_how_many(tmp_path: Path):
    root = gpt(tmp_path, tp=1, stages=[[[0]], [[1]], [[2]], [[3]]], args=None)
    shutil.rmtree(rank_file(root, 0, 3).parent)
    given = {"num_attention_heads": 4, "activation": "gelu", "layernorm_epsilon": 1e-5}
    refused(root, "lacks the parameter decoder.final_layernorm.weight", **given)


def test_a_folder_too_many(tmp_path: Path):
    root = gpt(tmp_path)
    shutil.copytree(rank_file(root, 1).parent, root / "iter_0000005" / "mp_rank_02")
    refused(root, "mp_rank_02 does not belong here", "2 tensor-parallel x 1", "remove the other")
    (root / "iter_0000005" / "mp_rank_02").rename(root / "iter_0000005" / "mp_rank_00_001")
    refused(root, "mp_rank_00_001 does not belong here")


def take_rank_from(other: Path, root: Path, rank: int = 1) -> None:
    shutil.copy(rank_file(other, rank), rank_file(root, rank))


MIXED = "mixes two checkpoints: "


def test_ranks_of_two_models(tmp_path: Path):
    """All of one shape: only the values of what every rank holds tell them apart."""
    root, other = gpt(tmp_path / "a"), gpt(tmp_path / "b", seed=2)
    take_rank_from(other, root)
    refused(root, MIXED, "differs by .* between tensor-parallel ranks 0 and 1", "copy all ranks")


def test_ranks_of_two_iterations(tmp_path: Path):
    root = gpt(tmp_path)
    change(rank_file(root, 1), lambda contents: contents.update(iteration=6))
    refused(root, f"{MIXED}iteration is 5 in mp_rank_00 and 6 in mp_rank_01; copy all ranks")


def test_ranks_of_two_genuine_checkpoints(tmp_path: Path):
    for first, second, message in (
        ("v10_gpt_tp2", "v115_gpt_tp2", f"{MIXED}checkpoint_version is None in .* and 1.0 in"),
        ("v10_gpt_tp2", "v25_gpt_tp2_fp16", f"{MIXED}checkpoint_version is None in .* and 3.0 in"),
        ("v25_gpt_tp2_fp16", "mcore016_llama_tp2", MIXED),
        ("v10_bert_tp2_postlnres", "v10_gpt_tp2", MIXED),
    ):
        root = tmp_path / f"{first}-{second}"
        shutil.copytree(SHIPPED / first, root)
        source = rank_file(SHIPPED / second, 1, iteration=1)
        shutil.copy(source, rank_file(root, 1, iteration=1))
        refused(root, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: vars(c["args"]).update(seed=2), "args.seed is None in .* and 2 in"),
        (lambda c: vars(c["args"]).update(num_layers=9), "args.num_layers is 4 in .* and 9 in"),
        (lambda c: vars(c["args"]).update(consumed_train_samples=3), "consumed_train_samples"),
        (
            lambda c: c["model"].pop("decoder.layers.0.mlp.linear_fc1.bias") is None,
            "layers.0.mlp.linear_fc1.bias is in one of",
        ),
        (
            lambda c: c["model"].update(
                {"embedding.tokentype_embeddings.weight": torch.ones(2, 16)}
            ),
            "tokentype_embeddings.weight is in",
        ),
        (
            lambda c: c.update(model={k: v.half() for k, v in c["model"].items()}),
            r"is \[.*\] torch.float32 in mp_rank_00 and \[.*\] torch.float16 in mp_rank_01",
        ),
        (
            lambda c: c["model"].update({"decoder.final_layernorm.weight": torch.ones(17)}),
            r"final_layernorm.weight is \[16\] .* and \[17\]",
        ),
    ],
)
def test_ranks_that_differ(edit: Callable[[dict], Any], message: str, tmp_path: Path):
    root = gpt(tmp_path)
    change(rank_file(root, 1), edit)
    refused(root, MIXED, message, "copy all ranks of one save")


def test_swapped_ranks(tmp_path: Path):
    root = gpt(tmp_path)
    folder = root / "iter_0000005"
    (folder / "mp_rank_00").rename(folder / "x")
    (folder / "mp_rank_01").rename(folder / "mp_rank_00")
    (folder / "x").rename(folder / "mp_rank_01")
    refused(root, "mp_rank_00/model_optim_rng.pt was saved by rank 1, which is not", "copy them")


def test_swapped_stages(tmp_path: Path):
    root = gpt(tmp_path, stages=[[[0]], [[1]], [[2]], [[3]]])
    for rank in range(2):
        one, two = rank_file(root, rank, 1), rank_file(root, rank, 2)
        one.rename(one.with_name("x"))
        two.rename(one)
        one.with_name("x").rename(two)
    refused(root, "mp_rank_00_002/.* was saved by rank 2, which is not .* stage 2", "swapped")


def test_swapped_stages_of_files_without_args(tmp_path: Path):
    root = gpt(tmp_path, tp=1, stages=[[[0, 1]], [[2, 3]]], args=None)
    one, two = rank_file(root, 0, 0), rank_file(root, 0, 1)
    one.rename(one.with_name("x"))
    two.rename(one)
    one.with_name("x").rename(two)
    with pytest.raises(InputError, match="mp_rank_00_000.*holds no word embeddings.*swapped"):
        open_checkpoint(root)


def test_stages_with_other_numbers_of_chunks(tmp_path: Path):
    root = gpt(tmp_path, stages=[[[0], [2]], [[1], [3]]])

    def merge(contents: dict) -> dict:
        return {**contents, "model": contents.pop("model0"), "model1": None}

    for rank in range(2):
        change(rank_file(root, rank, 1), merge)
    refused(root, "mp_rank_00_001/.* has 1 virtual pipeline chunk.s. where others have more")


def test_one_file_of_several(tmp_path: Path):
    root = gpt(tmp_path, stages=[[[0, 1]], [[2, 3]]])
    alone = tmp_path / "weights.pt"
    shutil.copy(rank_file(root, 1, 1), alone)
    refused(alone, f"{alone} is one of the 2 tensor-parallel x 2 pipeline files", "give --ckpt the")


@pytest.mark.parametrize("size", [0, 3, 1000, 20_000])
def test_a_rank_file_cut_off(size: int, tmp_path: Path):
    root = gpt(tmp_path)
    os.truncate(rank_file(root, 1), size)
    with pytest.raises(InputError, match=f"^{rank_file(root, 1)} (is|was) ") as caught:
        open_checkpoint(root)
    assert re.search(
        "copy the file again|download the file|expected a Megatron model file", str(caught.value)
    )


# ---- what is in the files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([1, 2], "holds a list, not the dictionary that Megatron saves; give --ckpt"),
        (torch.ones(2), "holds a StoredTensor, not the dictionary"),
        ({}, "has no 'model' entry with tensors in it .found nothing.; give"),
        ({"model": {}}, "has no 'model' entry with tensors in it .found model."),
        ({"model": None, "x": 1}, "has no 'model' entry with tensors in it .found model, x."),
        ({"state_dict": {"a": torch.ones(2)}}, "has no 'model' entry .* .found state_dict."),
        (
            {"model": {"a": {"b": torch.ones(2)}}},
            "has a parameter that no GPT, BERT or T5 .*: a.b; ",
        ),
        ({"model": {("a",): torch.ones(2)}}, "has a parameter of an unreadable name .none."),
        ({"model": {"a\x1b[2J": torch.ones(2)}}, r"has a .* unreadable name .a\\x1b\[2J."),
        ({"model": {"a" * 9000: torch.ones(2)}}, r"has a .* unreadable name .a{200}\.\.\."),
    ],
)
def test_files_that_hold_no_model(contents: Any, message: str, tmp_path: Path):
    path = tmp_path / "x.pt"
    torch.save(contents, path)
    with pytest.raises(InputError, match=f"{path} {message}") as caught:
        open_checkpoint(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("decoder.layers.0.mlp.fc1_latent_proj.weight", "a mixture of experts that work in a la"),
        ("decoder.layers.0.mixer.x_proj.weight", "Mamba layers of the first kind"),
        ("decoder.layers.0.self_attention.in_proj.weight", "linear attention .a gated delta net"),
        ("decoder.layers.0.self_attention.linear_qkv_down_proj.weight", "fused down projections"),
        ("decoder.layers.0.self_attention.linear_qkv.lora_a", "unmerged adapters"),
        ("vision_model.class_token", "a vision model"),
        ("biencoder.x.weight", "a retrieval model"),
    ],
)
def test_other_models_are_refused_by_name(key: str, what: str, tmp_path: Path):
    root = gpt(tmp_path, tp=1)
    change(rank_file(root), lambda contents: contents["model"].update({key: torch.ones(2, 2)}))
    refused(
        root,
        f"iter_0000005 holds .*{what}",
        "parameter|layers",
        "reads GPT and BERT models, and T5|merge them into the weights first",
    )


@pytest.mark.parametrize(
    "key",
    [
        "language_model.decoder.layers.0.inter_attention.query.weight",
        "language_model.encoder.layers.0.mlp.experts.0.dense_h_to_4h.weight",
    ],
)
def test_other_legacy_models_are_refused_by_name(key: str, tmp_path: Path):
    root = gpt(tmp_path, tp=1, era="v2.5")
    change(rank_file(root), lambda contents: contents["model"].update({key: torch.ones(2, 2)}))
    refused(root, "holds (a fork's mixture of experts|an encoder-decoder model)")


def test_expert_parallel_folders(tmp_path: Path):
    root = gpt(tmp_path, tp=1)
    folder = root / "iter_0000005"
    (folder / "mp_rank_00").rename(folder / "mp_rank_00_000_000")
    refused(root, "mp_rank_00 has no model file: the checkpoint was saved by 1 tensor-parallel x 1")
    (folder / "mp_rank_00_000_000").rename(folder / "mp_rank_00_000")
    change(
        folder / "mp_rank_00_000" / "model_optim_rng.pt",
        lambda contents: vars(contents["args"]).update(expert_model_parallel_size=2),
    )
    refused(root, "mp_rank_00_001 has no model file.* x 2 expert-parallel x 1 .*, and 1 of 2 files")


def test_an_unknown_parameter(tmp_path: Path):
    root = gpt(tmp_path, tp=1)
    key = "decoder.layers.0.self_attention.gate.weight"
    change(rank_file(root), lambda contents: contents["model"].update({key: torch.ones(2, 2)}))
    with pytest.raises(
        InputError, match=f"has a parameter that no GPT, .*: {key}.*so it stops here"
    ):
        open_checkpoint(root)


def test_parameters_missing_or_too_many(tmp_path: Path):
    root = gpt(tmp_path, tp=1)
    name = "decoder.layers.2.mlp.linear_fc2.bias"
    change(rank_file(root), lambda contents: contents["model"].pop(name) is None)
    with pytest.raises(InputError, match=rf"iter_0000005 lacks the parameter {name} \[16\]"):
        open_checkpoint(root)

    root = gpt(tmp_path, tp=1, args=args_of(GPT, position_embedding_type="rope"))
    refused(
        root, "has 1 parameter.s. that its settings do not call for, such as embedding.position"
    )

    root = gpt(tmp_path, tp=1)
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    change(rank_file(root), lambda contents: contents["model"].update({name: torch.ones(16, 23)}))
    with pytest.raises(InputError, match=rf"{name} has shape \[16, 23\], expected \[16, 24\]"):
        open_checkpoint(root)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_plain_numbers(dtype: torch.dtype, tmp_path: Path):
    root = gpt(tmp_path, tp=1)
    name = "decoder.layers.2.mlp.linear_fc2.weight"

    def convert(contents: dict) -> None:
        contents["model"][name] = contents["model"][name].to(dtype)

    change(rank_file(root), convert)
    refused(root, f"{name} is stored as {dtype}, which mlm-eval does not read; use")


def test_files_that_contradict_their_args(tmp_path: Path):
    for change_of_args, message in (
        ({"num_layers": 5}, "holds 4 layers where its args say 5"),
        ({"hidden_size": 32}, "embeddings of width 16 where its args say hidden_size 32"),
        ({"num_attention_heads": 3}, "3 attention heads do not divide the attention width 16"),
        ({"num_attention_heads": 8}, "8 heads .* have 2 channels each where its args say kv_chann"),
        ({"group_query_attention": True, "num_query_groups": 2}, "has 4 query groups where its ar"),
        ({"swiglu": True}, "activation swiglu does not fit an MLP whose two weights are 24 and 24"),
        ({"normalization": "RMSNorm"}, "args say RMSNorm, but the final norm has a bias"),
        ({"num_experts": 4}, "was trained with a mixture of experts .args.num_experts = 4."),
        ({"position_embedding_type": "alibi"}, "uses alibi position embeddings"),
        ({"position_embedding_type": "none"}, "do not call for, such as embedding.position"),
        ({"num_layers": "4"}, "args.num_layers is '4' where a number was expected"),
    ):
        root = gpt(tmp_path, args=args_of(GPT, **change_of_args))
        refused(root, "iter_0000005", message)


def test_settings_that_do_not_fit(tmp_path: Path):
    root = gpt(tmp_path)
    for overrides, message in (
        ({"num_attention_heads": 3}, "3 attention heads do not divide the attention width 16"),
        ({"num_attention_heads": 0}, "0 attention heads do not divide"),
        ({"num_attention_heads": 32}, "32 attention heads do not divide"),
        ({"num_query_groups": 2}, "QKV rows do not fit|has shape"),
        ({"num_layers": 3}, "parameter.s. that its settings do not call for"),
        ({"hidden_size": 8}, r"has shape \[32, 16\], expected \[32, 8\].*--set"),
        ({"vocab_size": 64}, r"has shape \[32, 16\], expected \[64, 16\]"),
        ({"family": "bert"}, "holds a GPT model by its parameters; give no --set family"),
        ({"activation": "swiglu"}, "activation swiglu does not fit"),
        ({"activation": "mish"}, "activation 'mish' is not supported; known are"),
        ({"checkpoint_version": 7.0}, "checkpoint_version 7.0 is unknown, known are 0, 1.0, 2.0"),
        ({"untie_embeddings_and_output_weights": True}, "lacks the parameter output_layer.weight"),
        ({"kv_channels": 0}, "."),
        ({"heads": 4}, "heads is not a model setting; known are"),
        (
            {"num_attention_heads": "4"},
            "num_attention_heads is set to '4'; expected a whole number",
        ),
    ):
        with pytest.raises(InputError, match=message) as caught:
            open_checkpoint(root, overrides)
        assert str(caught.value).isprintable()


def test_an_old_version_with_query_groups(tmp_path: Path):
    root = write(tmp_path, random_model(LLAMA), LLAMA, args=args_of(LLAMA), version=1.0, order=3.0)
    refused(root, "checkpoint_version 1.0 is older than grouped-query attention", "--set checkpoin")
    open_checkpoint(root, {"checkpoint_version": 3.0})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"iteration": "many"}, "iteration is not a number"),
        ({"iteration": -1}, "iteration is not a number"),
        ({"iteration": float("nan")}, "iteration is not a number"),
        ({"iteration": [[]]}, "iteration is not a number"),
        ({"checkpoint_version": "3.0"}, "checkpoint_version is not a number"),
        ({"checkpoint_version": True}, "checkpoint_version is not a number"),
        (
            {"checkpoint_version": 4.0},
            "checkpoint_version 4.0 is unknown.*--set checkpoint_version",
        ),
    ],
)
def test_entries_of_another_type(entries: dict, message: str, tmp_path: Path):
    root = gpt(tmp_path, tp=1)
    change(rank_file(root), lambda contents: contents.update(entries))
    refused(root, f"{rank_file(root)}: {message}")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_model_parallel_size": 0}, "its args say 0 tensor-parallel x 1 pipeline ranks"),
        ({"pipeline_model_parallel_size": 0}, "its args say 1 tensor-parallel x 0 pipeline"),
        ({"tensor_model_parallel_size": 2**31 - 1}, "mp_rank_01 has no model file"),
        ({"pipeline_model_parallel_size": 2**31 - 1}, "mp_rank_00_000 has no model file"),
        ({"tensor_model_parallel_size": 2**31}, "where a number was expected"),
    ],
)
def test_impossible_parallel_sizes(sizes: dict, message: str, tmp_path: Path):
    root = gpt(tmp_path, tp=1)
    change(rank_file(root), lambda contents: vars(contents["args"]).update(sizes))
    started = time.monotonic()
    refused(root, message)
    assert time.monotonic() - started < 5


@pytest.mark.long
def test_dictionaries_without_end(tmp_path: Path):
    """A pickle of a few hundred bytes: dicts in themselves, or doubled sixty times over."""
    path = tmp_path / "x.pt"
    model: dict = {}
    model["model"] = model
    torch.save({"model": model}, path)
    refused(path, f"{path} holds dictionaries nested without end")
    for _ in range(60):
        model = {"a": model, "b": model}
    torch.save({"model": model}, path)
    refused(path, "hold one another so often that they never end")
    wide = {str(i): torch.ones(1) for i in range(1000)}
    for _ in range(3):
        wide = {str(i): wide for i in range(1000)}
    torch.save({"model": wide}, path)
    refused(path, "hold one another so often that they never end")


def test_args_without_end(tmp_path: Path):
    """What the args hold is compared and shown: neither may take for ever."""
    endless: list = []
    for _ in range(60):
        endless = [endless, endless]
    root = gpt(tmp_path, args=args_of(GPT, num_experts=endless, seed=endless))
    started = time.process_time()
    refused(root, "hold one another so often that they never end")
    root = gpt(tmp_path, args=args_of(GPT, hidden_size=endless))
    refused(root, "hold one another so often that they never end")
    assert time.process_time() - started < 5
    refused(gpt(tmp_path, args=args_of(GPT, hidden_size=[[[1]]])), "args.hidden_size is Stub")


# ---- formats that are not read -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list, expected a JSON object; copy the file again"),
        ("\udcff", ", line 1 is not UTF-8"),
    ],
)
def test_metadata_that_is_no_json(text: str, what: str, tmp_path: Path):
    (tmp_path / "metadata.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(tmp_path, f"{tmp_path}/metadata.json ?{what}")


@pytest.mark.parametrize(
    "name",
    ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"],
)
def test_deepspeed_without_its_weights_is_refused_by_name(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    refused(tmp_path, "is a DeepSpeed checkpoint without the model's own files .found")


def test_an_unfinished_distributed_save(tmp_path: Path):
    shutil.copytree(SHIPPED / "mcore016_gpt2_tp2_dist", tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "iter_0000001"
    (folder / ".metadata").unlink()
    refused(tmp_path, "lacks the hidden file .metadata, although its save had ended", "copy that")
    (folder / "metadata.json").unlink()
    refused(tmp_path, "iter_0000001 is an unfinished save", "use the checkpoint of an earlier iter")


# ---- files made to do harm ---------------------------------------------------------------------


class Harm:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("form", [True, False], ids=["zip", "stream"])
def test_a_hostile_file_is_refused_and_can_be_inspected(form: bool, tmp_path: Path):
    model = random_model(GPT)
    root = write(tmp_path, model, GPT, tp=2, args=args_of(GPT))
    sentinel = tmp_path / "sentinel"
    contents = torch.load(rank_file(root, 1), weights_only=False)
    contents["hook"] = Harm(os.system, f"touch {sentinel}")
    torch.save(contents, rank_file(root, 1), _use_new_zipfile_serialization=form)
    message = refused(root, "iter_0000005 asks for posix.system", "nothing was run", "get it from")
    assert "do not trust this file" in message
    checkpoint = open_checkpoint(root, allow_hostile=True)
    assert checkpoint.provenance.hostile == ["posix.system"]
    for name, tensor in model.items():
        assert torch.equal(checkpoint.tensors[name].read(), tensor)
    assert not sentinel.exists()


def test_many_hostile_names_are_counted(tmp_path: Path):
    root = gpt(tmp_path, tp=1)
    functions = [os.system, os.remove, eval, exec, shutil.rmtree]
    calls = [Harm(function, "x") for function in functions]
    change(rank_file(root), lambda contents: contents.update(hooks=calls))
    message = refused(root, "asks for __builtin__.eval, __builtin__.exec, posix.remove and 2 more")
    assert "shutil" not in message


# ---- published archives ------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own, and temporary files that are its own too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(unpacking.tempfile, "tempdir", str(tmp_path))
    return tmp_path / "cache"


def published(
    path: Path, model: Model, *, prefix: str = "", names: Callable[[str], str] = str
) -> Path:
    """Write an archive as NVIDIA publishes them: compressed, `release`, with the tracker file."""
    root = write(path.parent / "source", model, BERT, era="v1", version=None)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.write(rank_file(root), names(f"{prefix}release/mp_rank_00/model_optim_rng.pt"))
        zipped.writestr(f"{prefix}{TRACKER}", "release")
    shutil.rmtree(root)
    return path


@pytest.mark.parametrize("prefix", ["", "megatron_bert_345m/", "a/b/"])
def test_an_archive_is_opened_and_unpacked_once(prefix: str, tmp_path: Path, cache: Path):
    model = random_model(BERT)
    path = published(tmp_path / "v0.1.zip", model, prefix=prefix)
    for _ in range(2):
        checkpoint = open_checkpoint(path, {"num_attention_heads": 4})
        for name, tensor in model.items():
            assert torch.equal(checkpoint.tensors[name].read(), tensor)
        assert checkpoint.provenance.iteration == "release"
        assert cache in checkpoint.provenance.path.parents
        [unpacked] = (cache / "mlm-eval" / "unpacked").iterdir()
        [file] = unpacked.rglob("*.pt")
        os.utime(file, (1, 1))
    assert file.stat().st_mtime == 1, "it was unpacked again"


@pytest.mark.parametrize(
    "name", ["../evil.pt", "release/../../evil.pt", "/evil.pt", "..\\evil.pt", "a/../../../b.pt"]
)
def test_names_that_leave_the_folder(name: str, tmp_path: Path, cache: Path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(name, b"x")
    before = sorted(tmp_path.rglob("*"))
    refused(path, f"{path} holds the unsafe name ", "so it is not unpacked; get the archive")
    assert [p for p in sorted(tmp_path.rglob("*")) if not p.is_dir()] == [
        p for p in before if not p.is_dir()
    ]
    assert not Path("/evil.pt").exists()


def test_archives_without_a_checkpoint(tmp_path: Path, cache: Path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("readme.txt", "x")
    refused(path, f"{path} is a zip archive without a checkpoint in it .found readme.txt.; give")
    with zipfile.ZipFile(path, "w") as zipped:
        pass
    refused(path, "found nothing")


def test_damaged_archives(tmp_path: Path, cache: Path):
    path = published(tmp_path / "x.zip", random_model(BERT))
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    refused(path, f"{path} is damaged", "download it again")
    path.write_bytes(whole[:middle])
    with pytest.raises(InputError, match=f"{path} is cut off or damaged"):
        open_checkpoint(path)
    at = whole.index(b"PK\x01\x02")
    path.write_bytes(whole[:at] + b"XX" + whole[at + 2 :])
    with pytest.raises(InputError, match=f"{path} is cut off or damaged"):
        open_checkpoint(path)
    flags = at + 8
    encrypted = bytearray(whole)
    encrypted[flags] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(InputError, match=f"{path} is (cut off or )?damaged"):
        open_checkpoint(path)
    assert not list((cache / "mlm-eval" / "unpacked").iterdir()), "nothing half-unpacked is left"


def test_an_archive_whose_names_clash(tmp_path: Path, cache: Path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("a", "x")
        zipped.writestr("a/b.pt", "x")
    refused(path, f"{path} cannot be unpacked into .*; unpack it yourself and give --ckpt")


def test_no_room_to_unpack(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    path = published(tmp_path / "x.zip", random_model(BERT))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(unpacking.shutil, "disk_usage", lambda _: usage)
    refused(
        path, f"{path} needs 0.0 GB to be unpacked, .* has 0.0 GB free; make room, set XDG_CACH"
    )


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    path = published(tmp_path / "x.zip", random_model(BERT))
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a file, so no folder below it
    checkpoint = open_checkpoint(path, {"num_attention_heads": 4})
    fallback = tmp_path / f"mlm-eval-{os.getuid()}"
    assert fallback in checkpoint.provenance.path.parents
    shutil.rmtree(fallback)
    fallback.write_text("x")
    refused(path, f"neither the cache folder nor {fallback} can be written", "set XDG_CACHE_HOME")


def test_a_folder_of_another_user_is_not_used(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """The fallback has a name that anyone can guess."""
    path = published(tmp_path / "x.zip", random_model(BERT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x.zip"))
    fallback = tmp_path / "mlm-eval-54321"
    fallback.mkdir()
    monkeypatch.setattr(unpacking.os, "getuid", lambda: 54321)
    refused(path, f"neither the cache folder nor {fallback} can be written")


def test_a_torch_file_is_no_archive_of_checkpoints(tmp_path: Path, cache: Path):
    torch.save({"model": {}}, tmp_path / "x.pt")
    assert not archive.is_archive(tmp_path / "x.pt")
    assert not archive.is_archive(tmp_path)
    assert not archive.is_archive(tmp_path / "none")
    with zipfile.ZipFile(tmp_path / "flat.pt", "w") as zipped:
        zipped.writestr("data.pkl", pickle.dumps({"model": {}}))
    assert not archive.is_archive(tmp_path / "flat.pt")
    assert not cache.exists()
