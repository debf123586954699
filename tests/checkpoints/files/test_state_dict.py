"""Wrappers in names, tensor classes and empty shells: read, or named for what they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders.synthetic import GPT, args_of, change, random_model, rank_file, write
from support.huggingface_models import gpt_model

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safe_pickle import is_hostile
from mlm_eval.checkpoints.files.state_dict import WRAPPERS, common_prefix, unwrapped
from mlm_eval.checkpoints.files.torch_file import read_torch_file
from mlm_eval.checkpoints.open import open_checkpoint

WEIGHT = "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    model = random_model(GPT)
    return write(tmp_path / "root", model, GPT, era="core", version=3.0, args=args_of(GPT))


def wrapped(key: str, rng: random.Random) -> str:
    """Put wrappers between the parts of a name, as nested wrapping does."""
    parts: list[str] = []
    for part in key.split("."):
        parts += rng.sample(sorted(WRAPPERS), rng.choice((0, 0, 0, 1)))
        parts.append(part)
    return ".".join(parts)


@pytest.mark.parametrize("seed", range(4))
def test_wrappers_are_taken_off_wherever_they_stand(seed: int, root: Path):
    expected = {name: t.read().clone() for name, t in open_checkpoint(root).tensors.items()}
    rng = random.Random(seed)

    def wrap(saved: dict[str, Any]) -> None:
        saved["model"] = {wrapped(key, rng): value for key, value in saved["model"].items()}

    change(rank_file(root), wrap)
    found = open_checkpoint(root)
    assert set(found.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found.tensors[name].read(), tensor), name


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "module._orig_mod.", "a.b.policy."])
@pytest.mark.parametrize("base", [False, True])
def test_what_a_trainer_puts_before_the_names_of_a_hub_model(
    base: bool, prefix: str, tmp_path: Path
):
    model = gpt_model("gpt2")
    model.save_pretrained(tmp_path)
    expected = {name: t.read() for name, t in open_checkpoint(tmp_path).tensors.items()}
    state = (model.transformer if base else model).state_dict()
    (tmp_path / "model.safetensors").unlink()
    state = {prefix + key: value for key, value in state.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = open_checkpoint(tmp_path)
    for name, tensor in expected.items():
        assert torch.equal(found.tensors[name].read(), tensor), name


def test_a_prefix_of_some_names_is_no_prefix():
    assert common_prefix(["a.x.y", "a.z"], "x.y") == "a."
    assert common_prefix(["a.x.y", "b.z"], "x.y") == ""
    assert common_prefix(["ax.y"], "x.y") == ""
    assert unwrapped("decoder.modules.0") == "decoder.modules.0"


def test_one_tensor_under_two_names(root: Path):
    """A module that holds a model and its compiled form has the same storage twice."""

    def twice(saved: dict[str, Any], copy: Callable[[Any], Any]) -> None:
        saved["model"]["module._orig_mod." + WEIGHT] = copy(saved["model"][WEIGHT])

    change(rank_file(root), lambda saved: twice(saved, lambda tensor: tensor))
    open_checkpoint(root)
    change(rank_file(root), lambda saved: twice(saved, lambda tensor: tensor + 1))
    with pytest.raises(InputError, match="under two names, one of them .*give a file of one"):
        open_checkpoint(root)


def test_two_tensors_under_one_name_of_a_hub_model(tmp_path: Path):
    model = gpt_model("gpt2")
    model.save_pretrained(tmp_path)
    state = {**model.state_dict(), "module.transformer.wte.weight": torch.ones(3)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="under two names, transformer.wte.weight and module"):
        open_checkpoint(tmp_path)


# ---- tensors of other kinds --------------------------------------------------------------------


class Int4Weight(torch.Tensor):
    """A subclass with an inside of its own, as quantization libraries have."""

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> Int4Weight:
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape)

    def __init__(self, inside: torch.Tensor) -> None:
        self.packed = inside

    __torch_dispatch__ = None  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (Int4Weight, (self.packed,))


class FancyTensor:
    """An object of a library that is not installed where the file is read."""

    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside


def dtensor(tensor: torch.Tensor, whole: tuple[int, ...]) -> Any:
    """What torch.save makes of a DTensor, without a process group."""

    class Pickled:
        def __reduce__(self) -> Any:
            details = (DTensor, torch.float32, whole, tensor.stride(), 0, None, None, False)
            rebuild = torch._utils._rebuild_wrapper_subclass
            state = {"_local_tensor": tensor, "_spec": None}
            return (torch._tensor._rebuild_from_type_v2, (rebuild, DTensor, details, state))

    return Pickled()


class DTensor:
    """Stands in for torch.distributed.tensor.DTensor: the pickle holds its name only."""


DTensor.__module__ = "torch.distributed.tensor"
OTHER_KINDS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "class": (FancyTensor, "an object of .*FancyTensor, which mlm-eval does not read; load"),
    "subclass": (Int4Weight, "an object of .*Int4Weight"),
    "sparse": (lambda tensor: tensor.to_sparse(), "a sparse tensor"),
    "meta": (lambda tensor: tensor.to("meta"), "a tensor without values .device `meta`."),
    "shell": (lambda tensor: tensor[:0], "an empty shell of shape .0, 16.: the values are"),
    "fp8": (lambda tensor: tensor.to(torch.float8_e4m3fn), "stored as torch.float8_e4m3fn, .*use"),
    "uint16": (lambda tensor: tensor.view(torch.uint16), "stored as torch.uint16"),
    "int8": (lambda tensor: tensor.to(torch.int8), "stored as torch.int8"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "stored as torch.complex64"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_other_kinds_of_tensors_are_named(kind: str, root: Path, tmp_path: Path):
    make, message = OTHER_KINDS[kind]

    def replace(saved: dict[str, Any]) -> None:
        saved["model"][WEIGHT] = make(saved["model"][WEIGHT])

    change(rank_file(root), replace)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(root)
    assert "layers.0.mlp.linear_fc1.weight" in str(caught.value)
    assert "damaged" not in str(caught.value)

    model = gpt_model("gpt2")
    model.save_pretrained(tmp_path / "hub")
    (tmp_path / "hub/model.safetensors").unlink()
    key = "transformer.h.0.mlp.c_fc.weight"
    state = model.state_dict()
    torch.save({**state, key: make(state[key])}, tmp_path / "hub/pytorch_model.bin")
    shown = message.replace(".0, 16.", ".0, .*.")
    with pytest.raises(InputError, match=shown) as caught:
        open_checkpoint(tmp_path / "hub")
    assert key in str(caught.value)


def test_quantized_storages_and_dtypes_of_a_newer_torch_are_not_damage(root: Path):
    class Pickled:
        def __init__(self, dtype: str) -> None:
            self.dtype = dtype

        def __reduce__(self) -> Any:
            return (Newer, (self.dtype,))

    class Newer:
        def __init__(self, dtype: str) -> None:
            pass

    Newer.__module__, Newer.__qualname__ = "torch", "float1_of_2031"
    torch.float1_of_2031 = Newer  # type: ignore[attr-defined]
    try:
        saved = {"model": {WEIGHT: Pickled("x")}}
        torch.save(saved, rank_file(root))
    finally:
        del torch.float1_of_2031  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"an object of torch\.float1_of_2031"):
        open_checkpoint(root)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_a_quantized_tensor_of_torch(root: Path):
    def replace(saved: dict[str, Any]) -> None:
        tensor = torch.quantize_per_tensor(saved["model"][WEIGHT], 0.1, 0, torch.qint8)
        saved["model"][WEIGHT] = tensor

    change(rank_file(root), replace)
    with pytest.raises(InputError, match="as a quantized tensor of torch"):
        open_checkpoint(root)


def test_a_whole_dtensor_is_its_values_and_a_part_is_named(root: Path):
    expected = open_checkpoint(root).tensors[WEIGHT].read().clone()

    def replace(saved: dict[str, Any], factor: int) -> None:
        tensor = expected.clone()
        whole = (factor * tensor.shape[0], *tensor.shape[1:])
        saved["model"][WEIGHT] = dtensor(tensor, whole)

    saved = torch.load(rank_file(root), weights_only=False)
    for factor in (1, 2):
        replace(saved, factor)
        _save_by_name(saved, rank_file(root))
        if factor == 1:
            assert torch.equal(open_checkpoint(root).tensors[WEIGHT].read(), expected)
        else:
            with pytest.raises(InputError, match="a DTensor, of which the file holds one rank's"):
                open_checkpoint(root)


def _save_by_name(saved: Any, path: Path) -> None:
    """Save with our stand-in found under DTensor's name."""
    import torch.distributed.tensor as place

    real, place.DTensor = place.DTensor, DTensor  # type: ignore[misc, assignment]
    try:
        torch.save(saved, path)
    finally:
        place.DTensor = real  # type: ignore[misc]


# ---- paths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "PurePosixPath", "Path"])
def test_paths_are_text_whatever_python_pickled_them(module: str, name: str, tmp_path: Path):
    code = f"(dVsave\nc{module}\n{name}\n(V/\nVdata\nVrun 1\ntRs.".encode()
    path = tmp_path / "x.pt"
    torch.save({}, path)
    _replace_pickle(path, code)
    file = read_torch_file(path)
    assert file.value == {"save": "/data/run 1"}
    assert not file.hostile and not file.classes


def test_a_method_of_a_path_is_hostile_in_any_module():
    for module in ("pathlib", "pathlib._local"):
        for name in ("Path.write_text", "PosixPath.unlink", "os.system"):
            assert is_hostile(module, name)
    assert is_hostile("os", "_exit") and is_hostile("subprocess._x", "Popen")


def _replace_pickle(path: Path, code: bytes) -> None:
    import zipfile

    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, code if name.endswith("data.pkl") else content)
