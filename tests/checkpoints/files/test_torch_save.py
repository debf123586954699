"""Files in torch.save's form, written tensor by tensor."""

from __future__ import annotations

import argparse
import io
import pickletools
import weakref
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlm_eval.checkpoints.files import torch_save
from mlm_eval.checkpoints.files.torch_file import read_torch_file
from mlm_eval.checkpoints.files.torch_save import write_torch_file
from mlm_eval.checkpoints.lazy import Computed, InMemory, StoredTensor, Transposed

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def tensors() -> dict[str, Tensor]:
    """Every dtype, and shapes that need care."""
    noise = torch.Generator().manual_seed(3)
    found = {str(d): (torch.randn(5, 7, generator=noise) * 9).to(d) for d in DTYPES}
    return found | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor([7], dtype=torch.int64),
        "not contiguous": torch.arange(12.0).view(3, 4).t(),
        "part": torch.arange(100.0)[10:20],
        "gradient": torch.nn.Parameter(torch.ones(3)),
    }


def value() -> dict[str, Any]:
    """A dict such as Megatron saves."""
    args = argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16, vocab_file=None)
    return {"args": args, "checkpoint_version": 3.0, "model": {"nested": {"deep": tensors()}}}


def same(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with `value()` in it, its tensors lazy."""
    contents = value()
    deep = contents["model"]["nested"]["deep"]
    for name, tensor in list(deep.items()):
        deep[name] = InMemory(tensor)
    deep["lazily transposed"] = Transposed(InMemory(torch.arange(6.0).view(2, 3)))
    path = tmp_path / "model_optim_rng.pt"
    write_torch_file(contents, path)
    return path


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
def test_torch_loads_the_file(path: Path, mmap: bool, weights_only: bool) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(path, mmap=mmap, weights_only=weights_only)
    assert vars(loaded["args"]) == vars(value()["args"])
    assert type(loaded["args"]) is argparse.Namespace
    assert loaded["checkpoint_version"] == 3.0
    deep = loaded["model"]["nested"]["deep"]
    assert same(deep.pop("lazily transposed"), torch.arange(6.0).view(2, 3).t())
    assert deep.keys() == tensors().keys()
    for name, expected in tensors().items():
        assert same(deep[name], expected), name
        assert deep[name].is_contiguous() and not deep[name].requires_grad


def test_the_own_reader_reads_the_file(path: Path) -> None:
    file = read_torch_file(path)
    assert file.form == "zip" and file.classes == [] and file.hostile == []
    for name, expected in tensors().items():
        assert same(file.value["model"]["nested"]["deep"][name].read(), expected), name


@pytest.mark.parametrize("zip64_from", [1 << 30, 0])
def test_storages_are_aligned_and_their_checksums_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zip64_from: int
) -> None:
    """Also with the 64-bit headers of records beyond 4 GB, which move what follows."""
    monkeypatch.setattr(torch_save, "_ZIP64_FROM", zip64_from)
    path = tmp_path / "file.pt"
    # Names and sizes of many lengths, so that the padding takes every value.
    contents = {f"t{i}": torch.arange(i, dtype=torch.uint8) for i in range(1, 200)}
    write_torch_file(contents, path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    loaded = torch.load(path, mmap=True)
    for name, stored in read_torch_file(path).value.items():
        assert isinstance(stored, StoredTensor)
        assert stored.offset % 64 == 0
        assert same(stored.read(), contents[name]) and same(loaded[name], contents[name])


def test_the_pickle_and_the_records_are_those_of_torch(tmp_path: Path) -> None:
    contents = {"a": torch.ones(3), "b": {"c": torch.zeros(2, 2, dtype=torch.bfloat16)}, "d": 1}
    ours, theirs = tmp_path / "ours" / "file.pt", tmp_path / "theirs" / "file.pt"
    for path in (ours, theirs):
        path.parent.mkdir()
    write_torch_file(contents, ours)
    torch.save(contents, theirs)
    with zipfile.ZipFile(ours) as a, zipfile.ZipFile(theirs) as b:
        extra = {name for name in b.namelist() if "/." in name}  # torch's own bookkeeping
        assert set(a.namelist()) == set(b.namelist()) - extra
        for name in a.namelist():
            if not name.endswith("data.pkl"):
                assert a.read(name) == b.read(name), name
        assert opcodes(a.read("file/data.pkl")) == opcodes(b.read("file/data.pkl"))


def opcodes(data: bytes) -> list[tuple[str, Any]]:
    """What a pickle does, without the numbers of its memo."""
    steps = pickletools.genops(io.BytesIO(data))
    return [(op.name, arg) for op, arg, _ in steps if "PUT" not in op.name and "GET" not in op.name]


def test_the_same_tensor_twice_is_stored_once(tmp_path: Path) -> None:
    lazy = InMemory(torch.arange(4.0))
    write_torch_file({"a": lazy, "b": [lazy]}, tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt")
    assert loaded["a"].data_ptr() == loaded["b"][0].data_ptr()
    with zipfile.ZipFile(tmp_path / "file.pt") as archive:
        assert [name for name in archive.namelist() if "/data/" in name] == ["file/data/0"]


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def make() -> Tensor:
        nonlocal most
        tensor = torch.ones(1000)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    contents = {str(i): Computed((1000,), torch.float32, make) for i in range(20)}
    pieces: list[int] = []
    write_torch_file(contents, tmp_path / "file.pt", on_bytes=pieces.append)
    assert most == 1
    assert pieces == [4000] * 20


def test_equal_contents_are_equal_bytes(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / path.name
    again.parent.mkdir()
    contents = value()
    contents["model"]["nested"]["deep"]["lazily transposed"] = torch.arange(6.0).view(2, 3).t()
    write_torch_file(contents, again)
    assert again.read_bytes() == path.read_bytes()


def test_a_failed_write_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()

    def fail() -> Tensor:
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_torch_file({"a": torch.ones(3), "b": Computed((3,), torch.float32, fail)}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
