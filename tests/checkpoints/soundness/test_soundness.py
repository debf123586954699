"""Whether weights are what was saved: checksums, odd values, copies of files, replicas."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_models
from support.command_line import assert_one_sentence
from support.folders.synthetic import GPT, args_of, change, random_model, rank_file, write
from support.ranks import run_ranks

import mlm_eval
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.torch_file import read_torch_file
from mlm_eval.checkpoints.lazy import Checksum, InMemory, MappedFile, StoredTensor
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import parameters
from mlm_eval.checkpoints.soundness.check import check_everything
from mlm_eval.checkpoints.soundness.odd_values import OddValues

pytest_plugins = ["support.command_line_fixtures"]

WEIGHT = "decoder.layers.1.mlp.linear_fc1.weight"


# ---- checksums -----------------------------------------------------------------------------------


def flip_in(file: Path, values: torch.Tensor) -> None:
    """Flip the lowest bit of a tensor's value in the middle, where it stands in a file."""
    raw = values.contiguous().numpy().tobytes()
    data = bytearray(file.read_bytes())
    at = data.find(raw)
    assert at >= 0
    data[at + len(raw) // 2 & ~3] ^= 1
    file.write_bytes(data)


def test_every_reader_compares_the_checksum_of_what_it_reads(run, folder, tmp_path):
    gpt = tmp_path / "gpt"
    shutil.copytree(folder / "gpt", gpt)
    source = open_checkpoint(gpt)
    file = sorted(gpt.rglob("model_optim_rng.pt"))[1]
    half = source.tensors[WEIGHT].read().chunk(2)[1]
    flip_in(file, half)
    checkpoint = open_checkpoint(gpt)  # no matrix is read
    with pytest.raises(InputError, match="damaged: the bytes of .* have another checksum"):
        checkpoint.tensors[WEIGHT].read()
    commands: list[list[object]] = [
        ["score", "--input", folder / "lines.jsonl", "--output", tmp_path / "o.jsonl"],
        ["convert", "--to", "torch_dist", "--output", tmp_path / "out"],
        ["verify", "--against", folder / "gpt"],
        ["wikitext103", "--data", folder / "wiki.tokens"],
    ]
    for command, *arguments in commands:
        ended = run(command, "--ckpt", gpt, *arguments)
        assert ended.code == 2 and f"{file} is damaged" in ended.err, (command, ended)
        assert "Traceback" not in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt"]
    ended = run("inspect", "--ckpt", gpt, "--check", "--json")
    assert ended.code == 2 and "is not sound" in ended.err
    found = json.loads(ended.out)["check"]
    assert found["tensors"] == len(parameters(checkpoint.config))
    assert [text for text in found["findings"] if text.startswith(WEIGHT)] == found["findings"]
    ended = run("inspect", "--ckpt", folder / "gpt", "--check")
    assert ended.code == 0 and "nothing is wrong with them" in ended.out


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_of_the_ranks_that_read_a_slice_one_compares(tmp_path, monkeypatch, tp):
    """Whatever the layouts of the file and of the run, every record is compared by some rank.

    What two files hold alike was compared with one another on opening: one checksum is for both.
    """
    root = write(tmp_path, random_model(GPT), GPT, tp=2, args=args_of(GPT))
    compared: list[str] = []
    compare = Checksum.compare

    def noting(self: Checksum) -> None:
        if not self.compared:
            compared.append(f"{self.file.path.parent.name}/{self.record}")
        compare(self)

    monkeypatch.setattr(Checksum, "compare", noting)
    for rank in range(tp):
        checkpoint = open_checkpoint(root)
        vectors = len(compared)
        for name, parameter in parameters(checkpoint.config).items():
            parameter.read_shard(checkpoint.tensors[name], rank, tp)
        if tp == 2 and rank == 0:
            inside = [name for name in compared[vectors:] if "mp_rank_01" in name]
            assert not inside  # its own file only
    files = [f"mp_rank_{rank:02d}" for rank in range(2)]
    storages = len(torch.load(rank_file(root), weights_only=False)["model"])
    table = parameters(checkpoint.config).values()
    alike = sum(parameter.rule.dim is None for parameter in table)
    for file, count in zip(files, (storages, storages - alike), strict=True):
        records = {name for name in compared if name.startswith(file)}
        # Of what both hold whole, the first rank's is read.
        assert len(records) == count, (file, sorted(records))


def test_an_archive_without_checksums_is_read(tmp_path):
    plain = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        write(tmp_path, random_model(GPT), GPT, args=args_of(GPT))
    finally:
        torch.serialization.set_crc32_options(plain)
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.tensors[WEIGHT].read(), random_model(GPT)[WEIGHT])
    assert check_everything(checkpoint).findings == ()


def test_a_checksum_beyond_the_file_is_none(tmp_path):
    (tmp_path / "data").write_bytes(bytes(64))
    file = MappedFile(tmp_path / "data")
    short = Checksum(file, 32, 64, 0, "data/0")
    tensor = StoredTensor(file, 32, torch.float32, (4,), (1,), short)
    with pytest.raises(InputError, match="another checksum"):
        tensor.read()


# ---- odd values ----------------------------------------------------------------------------------

ODD = {"NaN": torch.nan, "infinite values": -torch.inf, "values of 3e+20": 3e20}


@pytest.mark.parametrize(("what", "value"), ODD.items())
def test_odd_values_are_named_by_every_command(run, folder, tmp_path, what, value):
    gpt = tmp_path / "gpt"
    shutil.copytree(folder / "gpt", gpt)

    def spoil(contents: dict[str, Any]) -> None:
        flat = contents["model"]
        name = next(name for name in flat if "layers.1" in name and "fc1.weight" in name)
        flat[name][3, 5] = value

    change(sorted(gpt.rglob("model_optim_rng.pt"))[1], spoil)
    said = f"{WEIGHT} holds {what}: the file is damaged, or training had failed"
    record = tmp_path / "r.json"
    ended = run(
        *("wikitext103", "--ckpt", gpt, "--data", folder / "wiki.tokens", "--output", record),
    )
    assert ended.code == 0 and ended.err.count(said) == 1, ended.err
    assert any(said in text for text in json.loads(record.read_text())["checkpoint"]["warnings"])
    for to in ("hf", "megatron", "torch_dist"):
        ended = run("convert", "--ckpt", gpt, "--to", to, "--output", tmp_path / to)
        assert ended.code == 0 and said in ended.err, (to, ended.err)
    assert said in run("verify", "--ckpt", gpt, "--against", folder / "gpt").out
    ended = run("inspect", "--ckpt", gpt, "--check")
    assert ended.code == 2 and f"{WEIGHT} holds {what}" in ended.err
    assert "holds" not in run("inspect", "--ckpt", gpt).out


def load_with_nan() -> tuple[str, ...]:
    """Load a model with a NaN in the last rank's slice, and return what this rank was told."""
    weights = random_models.state_dict(random_models.GPT)
    weights[WEIGHT][-1, 0] = torch.nan
    engine = mlm_eval.Engine.load(random_models.checkpoint(random_models.GPT, weights), tp=2)
    return engine.load_warnings


def test_all_ranks_hear_of_one_rank_s_values():
    for warnings in run_ranks(2, load_with_nan):
        assert [text.partition(" holds ")[0] for text in warnings] == [WEIGHT]


def test_values_that_a_narrower_dtype_does_not_hold_are_named():
    odd = OddValues()
    odd.look("a", torch.tensor([70000.0, 0.0]), torch.float16)
    odd.look("b", torch.tensor([65000.0, 0.0]), torch.float16)
    odd.look("c", torch.tensor([], dtype=torch.float32))
    odd.look("d", torch.tensor([1, 2]))
    assert odd.phrases() == ["a holds values that are infinite in float16"]
    for n in range(9):
        odd.look(f"t{n}", torch.tensor([torch.nan]))
    (text,) = odd.warnings()
    assert "and 6 more tensors" in text


def test_a_record_without_a_checksum_beside_others_is_read(tmp_path):
    """As `torch.serialization.skip_data` leaves them, whose data is filled in later."""
    file = tmp_path / "s.pt"
    values = torch.arange(64.0)
    with torch.serialization.skip_data():
        torch.save({"model": {"w": values}}, file)
    with zipfile.ZipFile(file) as archive:
        assert any(record.CRC for record in archive.infolist())
        record = next(r for r in archive.infolist() if "/data/" in r.filename)
    raw = bytearray(file.read_bytes())
    name, extra = struct.unpack_from("<HH", raw, record.header_offset + 26)
    at = record.header_offset + 30 + name + extra
    raw[at : at + 256] = values.numpy().tobytes()
    file.write_bytes(raw)
    assert torch.equal(read_torch_file(file).value["model"]["w"].read(), values)


# ---- replicas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["position_embeddings", "final_layernorm.weight", "fc2.bias"])
@pytest.mark.parametrize(("by", "refused"), [(1e-3, False), (3.0, True)])
def test_replicas_are_compared(tmp_path, run, name, by, refused):
    root = write(tmp_path, random_model(GPT), GPT, tp=2, args=args_of(GPT))

    def shift(contents: dict[str, Any]) -> None:
        flat = contents["model"]
        key = next(key for key in flat if name in key)
        flat[key].flatten()[1] += by

    change(rank_file(root, 1), shift)
    ended = run("inspect", "--ckpt", root)
    if refused:
        assert_one_sentence(ended, "mixes two checkpoints", "tensor-parallel ranks 0 and 1")
        return
    assert ended.code == 0 and "1 replicated tensor(s) differ" in ended.out
    ended = run("inspect", "--ckpt", root, "--check")
    assert ended.code == 2 and "is not sound: 1 replicated tensor(s) differ" in ended.err


def test_large_replicas_are_compared_where_everything_is_read(tmp_path, monkeypatch, run):
    from mlm_eval.checkpoints.soundness import replicas

    monkeypatch.setattr(replicas, "OPENING_BYTES", 0)
    root = write(tmp_path, random_model(GPT), GPT, tp=2, args=args_of(GPT))

    def shift(contents: dict[str, Any]) -> None:
        contents["model"]["embedding.position_embeddings.weight"][1] += 3

    change(rank_file(root, 1), shift)
    assert run("inspect", "--ckpt", root).code == 0
    for command in (
        ["inspect", "--check"],
        ["convert", "--to", "torch_dist", "--output", tmp_path / "out"],
        ["verify", "--against", root],
    ):
        ended = run(command[0], "--ckpt", root, *command[1:])
        assert ended.code == 2 and "position_embeddings.weight differs by 3" in ended.err
    assert not (tmp_path / "out").exists()


def test_the_check_reads_tensors_of_every_shape():
    checkpoint = random_models.checkpoint(GPT)
    odd = dataclasses.replace(checkpoint, prediction_heads={"x": InMemory(torch.tensor(torch.nan))})
    assert check_everything(checkpoint).findings == ()
    assert check_everything(odd).findings == ("x holds NaN",)
