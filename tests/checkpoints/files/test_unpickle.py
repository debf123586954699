"""Reading what torch.save wrote: every value as torch reads it, and nothing that it asks for."""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import io
import pickle
import pickletools
import random
import signal
import struct
import subprocess
import sys
import types
import zipfile
from argparse import Namespace as RealNamespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.paths import ORACLES
from torch import Tensor, nn

from mlm_eval.checkpoints.dtypes import described
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files import safe_pickle
from mlm_eval.checkpoints.files import torch_file as unpickle
from mlm_eval.checkpoints.files.safe_pickle import (
    Namespace,
    SafeUnpickler,
    Stub,
    attributes_of,
    is_hostile,
    is_quiet,
    printable,
    state_of,
)
from mlm_eval.checkpoints.files.torch_file import read_pickle, read_torch_file
from mlm_eval.checkpoints.lazy import StoredTensor

FORMS = ("zip", "stream")
ORACLE = ORACLES / "v10_gpt_tp2/iter_0000001/mp_rank_00"


def save(value: Any, path: Path, form: str) -> Path:
    """Write a file with torch itself."""
    torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    return path


def wrap(code: bytes, path: Path, form: str = "zip", storages: tuple[bytes, ...] = ()) -> Path:
    """Write a file as torch.save would, around a pickle made by hand; storages by number."""
    if form == "pickle":
        path.write_bytes(code)
    elif form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", code)
            for key, data in enumerate(storages):
                archive.writestr(f"archive/data/{key}", data)
    else:
        head = [pickle.dumps(x, 2) for x in (unpickle.STREAM_MAGIC, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(head) + code + pickle.dumps([], 2))
    return path


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Fail what takes longer, also where it catches every exception but this one."""

    def late(*_: object) -> None:
        raise KeyboardInterrupt(f"not done after {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def values(tree: Any) -> Any:
    """Return nested containers with every stored tensor read."""
    if isinstance(tree, StoredTensor):
        return tree.read()
    if isinstance(tree, dict):
        return {key: values(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(values(item) for item in tree)
    if isinstance(tree, Namespace):
        return {key: values(item) for key, item in vars(tree).items()}
    return tree


def same(ours: Any, theirs: Any) -> None:
    """Compare what was read with what was saved, tensors bit by bit."""
    if isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        flat = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (ours, theirs)]
        assert torch.equal(*flat)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other)
    else:
        assert ours == theirs


# ---- what torch saves --------------------------------------------------------------------------

DTYPES = [
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
    torch.complex64,
    torch.complex128,
    torch.uint16,
    torch.uint32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("form", FORMS)
def test_every_dtype(form: str, tmp_path: Path):
    saved = {}
    for dtype in DTYPES:
        bits = torch.randint(0, 2, (7, 16), dtype=torch.uint8)
        if dtype != torch.bool:
            bits = torch.randint(0, 256, (7, 16), dtype=torch.uint8)
        saved[str(dtype)] = bits.view(dtype) if dtype != torch.bool else bits.bool()
    file = read_torch_file(save(saved, tmp_path / "x.pt", form))
    assert file.form == form
    same(values(file.value), saved)


def tensors_of_every_kind() -> dict[str, Tensor]:
    base = torch.arange(120, dtype=torch.float32)
    return {
        "whole": base,
        "shared": base[10:30],
        "transposed": base.view(4, 30).t(),
        "strided": base[3::7],
        "block": base.view(10, 12)[2:5, 1::4],
        "permuted": base.view(2, 3, 4, 5).permute(3, 0, 2, 1),
        "scalar": torch.tensor(3.5),
        "scalar of the base": base[77],
        "empty": torch.empty(0, 3),
        "empty in the middle": base.view(10, 12)[5:5],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 50),
        "parameter": nn.Parameter(torch.randn(3, 2)),
        "half": torch.randn(5).half(),
        "numbers": torch.arange(9).view(3, 3).t(),
    }


@pytest.mark.parametrize("form", FORMS)
def test_views_and_shared_storages(form: str, tmp_path: Path):
    saved = tensors_of_every_kind()
    file = read_torch_file(save(saved, tmp_path / "x.pt", form))
    same(values(file.value), saved)
    assert not file.globals_met
    assert file.value["whole"].offset == file.value["transposed"].offset


@pytest.mark.parametrize("form", FORMS)
def test_no_storage_is_touched_until_read(form: str, tmp_path: Path):
    file = read_torch_file(save({"a": torch.ones(4), "b": torch.ones(2)}, tmp_path / "x.pt", form))
    a, b = file.value["a"], file.value["b"]
    assert a.file is b.file
    assert a.file._storage is None
    assert a.read().sum() == 4
    assert a.file._storage is not None


@pytest.mark.parametrize("form", FORMS)
def test_containers_and_scalars(form: str, tmp_path: Path):
    """As a Megatron file has them: args, random states, nested dicts, tensors anywhere."""
    saved = {
        "args": RealNamespace(hidden_size=64, lr=1e-4, fp16=True, names=["a", "b"], none=None),
        "nested": collections.OrderedDict(a=[torch.ones(2), (torch.zeros(1), {"x": torch.eye(2)})]),
        "numbers": (1, -(2**40), 2**70, 1.5, float("inf"), True, None, "text", 3 + 4j),
        "keys": {1: "int", ("a", 2): "tuple", None: "none", 2.5: "float"},
        "dtype": torch.bfloat16,
        "size": torch.Size([3, 4]),
        "sets": [{1, 2}, frozenset({"a"})],
        "inside": RealNamespace(weight=torch.arange(3.0)),
    }
    file = read_torch_file(save(saved, tmp_path / "x.pt", form))
    args = file.value["args"]
    assert isinstance(args, Namespace)
    assert vars(args) == vars(saved["args"])
    assert "hidden_size" in repr(args)
    same(vars(file.value["inside"])["weight"].read(), torch.arange(3.0))
    for key in ("nested", "numbers", "keys", "sets"):
        same(values(file.value[key]), saved[key])
    assert file.value["dtype"] == described(torch.bfloat16)
    assert file.value["size"] == (3, 4)
    assert not file.classes
    assert not file.hostile


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_of_a_module_and_a_tied_weight(form: str, tmp_path: Path):
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3, bias=False))
    module[2].weight = nn.Parameter(module[0].weight.detach().t())
    saved = module.state_dict()  # an OrderedDict with an attribute of its own
    file = read_torch_file(save(saved, tmp_path / "x.pt", form))
    same(values(file.value), dict(saved))


class Colour(enum.Enum):
    RED = 1


class Settings:
    def __init__(self) -> None:
        self.width = 3


class Slotted:
    __slots__ = ("width",)

    def __init__(self) -> None:
        self.width = 3


class NamedDict(dict):
    pass


class NamedList(list):
    pass


@pytest.mark.parametrize("form", FORMS)
def test_other_classes_become_stubs_and_are_named(form: str, tmp_path: Path):
    saved = {
        "enum": Colour.RED,
        "object": Settings(),
        "slots": Slotted(),
        "dict": NamedDict(a=1),
        "list": NamedList([1]),
        "namespace": types.SimpleNamespace(width=3),
        "path": Path("/x/y"),
        "signal": signal.SIGTERM,
        "partial": functools.partial(nn.functional.gelu, approximate="tanh"),
        "numpy": np.random.RandomState(3).get_state(),
        "scalar": np.float32(2),
        "bytes": b"\x00\xff",
        "counter": collections.defaultdict(list, {"a": [1]}),
        "type": int,
        "stream": io.BytesIO(b"x"),
    }
    path = save(saved, tmp_path / "x.pt", form)
    file = read_torch_file(path)
    for key in set(saved) - {"numpy", "type", "bytes", "path"}:
        assert isinstance(file.value[key], Stub), key
    assert isinstance(file.value["numpy"][1], Stub)
    assert file.value["path"] == "/x/y"
    assert state_of(file.value["object"]) == {"width": 3}
    assert state_of(file.value["slots"]) == {"width": 3}
    assert attributes_of(file.value["namespace"]) == {"width": 3}
    assert "Colour" in repr(file.value["enum"])
    here = Colour.__module__
    shown = {f"{here}.{c.__name__}" for c in (Colour, Settings, Slotted, NamedDict, NamedList)}
    assert shown < set(file.classes)
    assert {"types.SimpleNamespace", "signal.Signals"} < set(file.classes)
    assert not [name for name in file.classes if name.startswith(("numpy", "_codecs", "builtins"))]
    assert not file.hostile


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("form", FORMS)
def test_a_whole_pickled_module_is_a_stub(form: str, tmp_path: Path):
    """Old torch kept a module's source beside its class."""
    file = read_torch_file(save({"model": nn.Linear(2, 2)}, tmp_path / "x.pt", form))
    assert isinstance(file.value["model"], Stub)
    weight = state_of(file.value["model"])["_parameters"]["weight"]
    assert weight.shape == (2, 2)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_every_protocol(protocol: int, tmp_path: Path):
    """Such as .metadata: what has no storages is read the same way."""
    saved = {
        "args": RealNamespace(a=1),
        "ordered": collections.OrderedDict([("x", 1), ("y", [2])]),
        "set": {1, 2},
        "frozen": frozenset({3}),
        "numbers": [1.5, 2**80, True],
        "own": Settings(),
        "long": "x" * 300,
        "many": list(range(2000)),
    }
    path = tmp_path / "x.pickle"
    path.write_bytes(pickle.dumps(saved, protocol))
    file = read_pickle(path)
    assert file.form == "pickle"
    assert vars(file.value["args"]) == {"a": 1}
    assert state_of(file.value["own"]) == {"width": 3}
    for key in ("ordered", "set", "frozen", "numbers", "long", "many"):
        assert file.value[key] == saved[key]
    assert file.classes == [f"{__name__}.Settings"]


def test_text_of_python_2_that_is_no_utf8(tmp_path: Path):
    file = read_pickle(wrap(b"\x80\x02U\x02\xff\xfe.", tmp_path / "x.pickle", "pickle"))
    assert file.value == "\\xff\\xfe"


def test_an_archive_inside_of_a_larger_file(tmp_path: Path):
    """As in .distcp files: offset and length name the archive, tensors point into the file."""
    saved = {"a": torch.randn(5), "b": torch.arange(7)}
    for form in FORMS:
        archive = save(saved, tmp_path / f"{form}.pt", form).read_bytes()
        large = tmp_path / f"{form}.distcp"
        large.write_bytes(b"x" * 13 + archive + b"y" * 1000)
        file = read_torch_file(large, offset=13, length=len(archive))
        same(values(file.value), saved)


def test_crcs_are_the_archives_own(tmp_path: Path):
    path = save({"a": torch.randn(5)}, tmp_path / "x.pt", "zip")
    with zipfile.ZipFile(path) as archive:
        assert read_torch_file(path).crcs == [record.CRC for record in archive.infolist()]
    assert read_torch_file(save({}, tmp_path / "y.pt", "stream")).crcs == []


# ---- pickles made to do harm -------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stack_named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


class Harm:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (self.command,)


class RunsWhenMade:
    def __new__(cls, command: str) -> RunsWhenMade:
        subprocess.run(command, shell=True, check=True)
        return super().__new__(cls)


class RunsWithState:
    def __setstate__(self, command: str) -> None:
        RunsWhenMade(command)


class RunsWithItems(dict):
    def __setitem__(self, command: str, _: object) -> None:
        RunsWhenMade(command)


Payload = Callable[[str], bytes]

# Each takes a shell command and returns a pickle of protocol 2 or later that ends in a dict.
ARMED: dict[str, Payload] = {
    "reduce": lambda c: named("os", "system") + text(c) + b"\x85R",
    "posix": lambda c: named("posix", "system") + text(c) + b"\x85R",
    "by pickle": lambda c: pickle.dumps({"x": Harm(c)}, 2)[2:-1],
    "by a late protocol": lambda c: pickle.dumps({"x": Harm(c)}, 5)[2:-1],
    "stack global": lambda c: stack_named("os", "system") + text(c) + b"\x85R",
    "eval": lambda c: (
        named("builtins", "eval") + text(f"__import__('os').system({c!r})") + b"\x85R"
    ),
    "exec": lambda c: named("builtins", "exec") + text(f"import os; os.system({c!r})") + b"\x85R",
    "python 2 names": lambda c: (
        named("__builtin__", "eval") + text(f"__import__('os').system({c!r})") + b"\x85R"
    ),
    "inst": lambda c: b"(" + text(c) + b"ios\nsystem\n",
    "obj": lambda c: b"(" + named("os", "system") + text(c) + b"o",
    "a class called": lambda c: (
        named("subprocess", "Popen") + b"(" + text("sh") + text("-c") + text(c) + b"l\x85R"
    ),
    "newobj": lambda c: named(__name__, "RunsWhenMade") + text(c) + b"\x85\x81",
    "newobj with keywords": lambda c: (
        named(__name__, "RunsWhenMade") + b")}" + text("command") + text(c) + b"s\x92"
    ),
    "setstate of a class": lambda c: named(__name__, "RunsWithState") + b")\x81" + text(c) + b"b",
    "items of a class": lambda c: named(__name__, "RunsWithItems") + b")\x81" + text(c) + b"Ns",
    "getattr": lambda c: (
        named("builtins", "getattr")
        + named("builtins", "__import__")
        + text("os")
        + b"\x85R"
        + text("system")
        + b"\x86R"
        + text(c)
        + b"\x85R"
    ),
    "partial": lambda c: (
        named("functools", "partial") + named("os", "system") + text(c) + b"\x86R)R"
    ),
    "partial with state": lambda c: (
        named("functools", "partial")
        + named("builtins", "print")
        + b"\x85R("
        + named("os", "system")
        + text(c)
        + b"\x85}Ntb)R"
    ),
    "map": lambda c: (
        named("builtins", "list")
        + named("builtins", "map")
        + named("os", "system")
        + text(c)
        + b"\x85\x86R\x85R"
    ),
    "setstate": lambda c: (
        named("types", "SimpleNamespace")
        + b")R}"
        + text("__setstate__")
        + named("os", "system")
        + b"sb"
        + text(c)
        + b"b"
    ),
    "by way of an allowed module": lambda c: (
        stack_named("argparse", "Namespace.__init__.__globals__.get")
        + text("_os")
        + b"\x85R0"
        + stack_named("argparse", "_os.system")
        + text(c)
        + b"\x85R"
    ),
    "appended by a bound method": lambda c: (
        named("types", "SimpleNamespace")
        + b")R}"
        + text("append")
        + named("os", "system")
        + b"sb"
        + text(c)
        + b"a"
    ),
    "torch rebuilds": lambda c: (
        named("torch._tensor", "_rebuild_from_type_v2")
        + b"("
        + named("os", "system")
        + named("torch", "Tensor")
        + text(c)
        + b"\x85NtR"
    ),
    "pickle in a pickle": lambda c: (
        named("pickle", "loads")
        + b"B"
        + struct.pack("<I", len(pickle.dumps(Harm(c))))
        + pickle.dumps(Harm(c))
        + b"\x85R"
    ),
    "torch in a pickle": lambda c: (
        named("torch.storage", "_load_from_bytes")
        + b"B"
        + struct.pack("<I", len(torch_bytes(Harm(c))))
        + torch_bytes(Harm(c))
        + b"\x85R"
    ),
}


def torch_bytes(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


# What these name is in no list: a class of anyone's, that does its harm while it is unpickled.
INCONSPICUOUS = {
    "newobj",
    "newobj with keywords",
    "setstate of a class",
    "items of a class",
    "torch in a pickle",
}


def payload(name: str, command: str) -> bytes:
    """Return a whole pickle: `{"model": {}, "x": what does harm}`."""
    start = b"\x80\x02" if name == "python 2 names" else b"\x80\x04"
    return start + b"}" + text("model") + b"}s" + text("x") + ARMED[name](command) + b"s."


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARMED)
def test_nothing_runs(name: str, tmp_path: Path):
    """The file does its harm where Python unpickles it, and none here, in any form of file."""
    sentinel = tmp_path / "sentinel"
    code = payload(name, f"touch {sentinel}")
    with contextlib.suppress(Exception):
        result = pickle.loads(code)
        if hasattr(result.get("x"), "wait"):
            result["x"].wait()
    assert sentinel.exists(), "this payload is a dud: it shows nothing"
    sentinel.unlink()

    for form in (*FORMS, "pickle"):
        path = wrap(code, tmp_path / f"x.{form}", form)
        read = read_pickle if form == "pickle" else read_torch_file
        try:
            file = read(path)
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert isinstance(file.value["x"], Stub | dict)
            assert file.classes
            assert bool(file.hostile) == (name not in INCONSPICUOUS)
        assert not sentinel.exists()


def test_what_is_hostile_is_named(tmp_path: Path):
    code = payload("reduce", "true") + b""
    for form in FORMS:
        assert read_torch_file(wrap(code, tmp_path / form, form)).hostile == ["os.system"]
    assert read_pickle(wrap(code, tmp_path / "p", "pickle")).hostile == ["os.system"]


@pytest.mark.parametrize(
    ("names", "hostile", "quiet"),
    [
        ("os.system posix.system os.path.join subprocess.Popen builtins.eval", True, False),
        ("builtins.__import__ __builtin__.execfile importlib.import_module", True, False),
        ("functools.reduce operator.methodcaller types.FunctionType", True, False),
        ("io.open _io.FileIO pathlib.Path.unlink pathlib.Path.write_text", True, False),
        ("signal.raise_signal shutil.rmtree pickle.loads", True, False),
        ("torch.load torch.hub.load torch.jit.load torch.serialization.load", True, False),
        ("torch.utils.cpp_extension.load numpy.load", True, False),
        ("numpy.testing._private.utils.runstring numpy.f2py.compile", True, False),
        ("numpy.dtype numpy.ndarray numpy.core.multiarray._reconstruct", False, True),
        ("numpy._core.multiarray._reconstruct _codecs.encode torch.Tensor", False, True),
        ("builtins.object builtins.bytearray builtins.set _io.BytesIO", False, True),
        ("torch.distributed.checkpoint.metadata.Metadata", False, True),
        # Ordinary, but a user should hear of them.
        ("builtins.getattr signal.Signals pathlib.PosixPath types.SimpleNamespace", False, None),
        ("megatron.core.enums.ModelType megatron.fp16.loss_scaler.LossScaler", False, False),
        ("torch.storage._load_from_bytes torch.nn.modules.linear.Linear", False, False),
        ("numpyish.thing ostrich.system collectionsx.y torchvision.x", False, False),
    ],
)
def test_which_names_are_hostile_and_which_quiet(names: str, hostile: bool, quiet: bool | None):
    for full in names.split():
        # However a dotted name is divided into module and name.
        parts = full.split(".")
        for cut in range(1, len(parts)):
            module, name = ".".join(parts[:cut]), ".".join(parts[cut:])
            assert is_hostile(module, name) == hostile, full
        module, _, name = full.rpartition(".")
        assert quiet is None or is_quiet(module, name) == quiet, full


def test_a_module_reached_by_way_of_another_is_hostile():
    assert is_hostile("argparse", "_os.system")
    assert is_hostile("collections", "_sys.modules.get")
    assert not is_hostile("megatron.core.signal", "Handler.Kind")


def test_a_file_cannot_change_our_classes(tmp_path: Path):
    """BUILD sets attributes, also of classes and functions, in Python's own unpickler."""
    slots = b"N}" + text("__repr__") + named("os", "system") + b"s\x86b"
    plain = b"}" + text("changed") + b"I1\nsb"
    targets = {
        "Namespace": named("argparse", "Namespace"),
        "rebuild": named("torch._utils", "_rebuild_tensor_v2"),
        "set": named("builtins", "set"),
        "ordered": named("collections", "OrderedDict"),
        "size": named("torch", "Size"),
        "storage": named("torch", "FloatStorage"),
        "dtype": named("torch", "float32"),
        "stub": named("a", "B"),
        "instance": named("argparse", "Namespace") + b")\x81",
        "dict": b"}",
    }
    objects: list[Any] = [Namespace, Stub, torch.float32, torch.Size, set]
    objects += [*safe_pickle._ALLOWED.values(), *unpickle._REBUILDERS.values()]

    def state() -> list[Any]:
        return [dict(getattr(x, "__dict__", {})) for x in objects] + [
            (getattr(x, "__defaults__", None), getattr(x, "__kwdefaults__", None)) for x in objects
        ]

    before = state()
    for name, target in targets.items():
        for change in (slots, plain, slots + plain):
            with contextlib.suppress(InputError):
                file = read_torch_file(wrap(b"\x80\x02" + target + change + b".", tmp_path / name))
                assert repr(file.value)
    assert state() == before
    repr(Namespace())
    tensor = {"a": torch.ones(3)}
    same(values(read_torch_file(save(tensor, tmp_path / "x.pt", "zip")).value), tensor)


def test_a_hostile_name_is_fit_to_be_shown(tmp_path: Path):
    name = "sys\x1b[31mtem" + "m" * 5000
    code = b"\x80\x04" + stack_named("os", name) + b"."
    [shown] = read_torch_file(wrap(code, tmp_path / "x.pt")).hostile
    assert shown.isprintable()
    assert shown.startswith("os.sys\\x1b[31mtem")
    assert len(shown) < 1000
    assert printable("plain.name") == "plain.name"
    assert "\n" not in printable("a\nb")


def test_stubs_accept_what_pickles_do_to_objects(tmp_path: Path):
    stub = named("a", "B") + b")R"
    for code in (
        stub + b"K\x01a",  # append
        stub + b"(K\x01K\x02e",  # extend
        stub + text("k") + b"K\x01s",  # set an item
        stub + b"(" + text("k") + b"K\x01u",  # set items
        stub + b"(K\x01\x90",  # add
        stub + b"Nb" + stub + b"\x86",  # state
        stub + b"K\x01\x85R",  # be called
        named("a", "B") + b"K\x01\x85\x81",  # be made, with arguments
        named("a", "B") + b"K\x01\x85}" + text("k") + b"K\x02s\x92",  # and with keywords
    ):
        file = read_torch_file(wrap(b"\x80\x04" + code + b".", tmp_path / "x.pt"))
        assert file.classes == ["a.B"]


@pytest.mark.parametrize(
    "code",
    [
        b"}]K\x01s",  # a list as a key
        b"]" + text("k") + b"K\x01s",  # an item of a list
        b"K\x01(" + text("k") + b"K\x01u",
        b"}(" + text("k") + b"u",  # a key without a value
        b"](K\x01\x90",  # added to a list
        b"K\x01K\x02R",  # a call of a number
        named("a", "B") + b"K\x02R",  # with a number for arguments
        named("builtins", "set") + b"K\x01\x85R",
        named("builtins", "complex") + text("1" * 9000) + b"\x85R",
        named("collections", "OrderedDict") + b"]K\x01a\x85R",
        named("argparse", "Namespace") + b"K\x01\x85R",
        named("torch._utils", "_rebuild_tensor_v2") + b")R",
        named("torch._utils", "_rebuild_tensor_v2") + b"(NK\x00))tR",
        b"K\x01Q",  # a storage that is a number
        text("x") + b"\x85Q",
        b"(" + text("storage") + named("a", "B") + text("0") + text("cpu") + b"K\x01tQ",
        b"\x82\x01",  # an extension code
        b"\x97",  # an out-of-band buffer
        b"h\x07",  # nothing kept under this number
        b"\xff",  # no opcode
        b"0",
        b"\x80\x7f",
        b"cos\n",
        b"",
    ],
)
def test_senseless_pickles_are_damage(code: bytes, tmp_path: Path):
    for form in (*FORMS, "pickle"):
        if b"_rebuild" in code and form == "pickle":
            continue  # without storages there are not tensors: a class like others
        path = wrap(b"\x80\x04" + code + b".", tmp_path / f"x.{form}", form)
        with pytest.raises(InputError, match="damaged.*copy the file again") as caught:
            (read_pickle if form == "pickle" else read_torch_file)(path)
        assert str(path) in str(caught.value)


# ---- files that would hang, or take the memory -------------------------------------------------

DEPTH = 300_000
ENDLESS = b")" + b"2\x86" * 60  # a tuple of itself, twice, sixty times over
SETS = b"(" * 60 + b"(\x91" + b"2\x86\x91" * 60  # sixty frozen sets, each of a pair of the last
BIG_LIST = b"](" + b"K\x01" * 100_000 + b"e\x94"  # kept as number 0

BOMBS: dict[str, bytes] = {
    "deep tuple as a key": b"})" + b"\x85" * DEPTH + b"K\x01s",
    "endless tuple as a key": b"}" + ENDLESS + b"K\x01s",
    "endless tuple among keys": b"}(" + ENDLESS + b"K\x01u",
    "endless tuple in a dict": b"(" + ENDLESS + b"K\x01d",
    "endless tuple in a set": b"\x8f(" + ENDLESS + b"\x90",
    "endless tuple in a frozen set": b"(" + ENDLESS + b"\x91",
    "endless tuple in a called set": named("builtins", "set") + b"]" + ENDLESS + b"a\x85R",
    "endless tuple in a called frozen set": (
        named("builtins", "frozenset") + b"]" + ENDLESS + b"a\x85R"
    ),
    "endless tuple in a called dict": (
        named("collections", "OrderedDict") + b"]" + ENDLESS + b"K\x01\x86a\x85R"
    ),
    "endless sets to compare": b"\x8f(" + SETS + SETS + b"\x90",
    "deep tuple": b")" + b"\x85" * DEPTH,
    "deep list": b"]" * DEPTH + b"a" * (DEPTH - 1),
    "deep stubs": named("a", "B") * (DEPTH // 10) + b")" + b"R\x85" * (DEPTH // 10),
    "endless tuple": ENDLESS,
    "endless list": b"]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(60)),
    "list in itself": b"]\x94h\x00a",
    "dict in itself": b"}\x94" + text("x") + b"h\x00s",
    "tuple in itself": b"]\x94h\x00\x85a",
    "huge memo index": b"Nr\xff\xff\xff\x7f",
    "huge bytes": b"\x8e" + struct.pack("<Q", 1 << 34),
    "huger bytes": b"\x8e" + struct.pack("<Q", 1 << 62),
    "huge text": b"\x8d" + struct.pack("<Q", 1 << 34),
    "huge bytearray": b"\x96" + struct.pack("<Q", 1 << 34),
    "huge frame": b"\x95" + struct.pack("<Q", 1 << 34),
    "huge number": b"\x8b\xff\xff\xff\x7f",
    "long decimal": b"L" + b"9" * 1_000_000 + b"L\n",
    "copies of a list": BIG_LIST + (named("torch", "Size") + b"h\x00\x85R") * 4000,
    "copies of arguments": (
        b"(" + b"K\x01" * 100_000 + b"t\x94" + (named("a", "B") + b"h\x00R") * 4000
    ),
    "copies of a state": (
        b"}("
        + b"".join(text(f"k{i}") + b"N" for i in range(50_000))
        + b"u\x94"
        + (named("argparse", "Namespace") + b")\x81h\x00b") * 4000
    ),
    "copies by way of a rebuild": (
        BIG_LIST
        + (
            named("torch._tensor", "_rebuild_from_type_v2")
            + b"("
            + named("torch._utils", "_rebuild_parameter")
            + b"Nh\x00\x85NtR"
        )
        * 4000
    ),
    "many classes": b"".join(named("a", f"c{i}") + b"0" for i in range(30_000)) + b"N",
    "many marks": b"(" * DEPTH + b"N",
}

READ_ALL = """
import resource, signal, sys, time
from pathlib import Path
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safe_pickle import attributes_of
from mlm_eval.checkpoints.files.torch_file import read_torch_file

resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # only so that a failure stays here
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    print(name, flush=True)
    signal.setitimer(signal.ITIMER_PROF, 20)  # of processor time
    try:
        value = read_torch_file(Path(name)).value
        repr(attributes_of({"x": value}))
    except InputError as error:
        assert name in str(error) and len(str(error)) < 2000, error
    value = None
    signal.setitimer(signal.ITIMER_PROF, 0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400_000, f"{grown} kB"
print("done")
"""


def test_bombs_do_no_harm(tmp_path: Path):
    """Neither a crash of the interpreter, nor a hang, nor hundreds of megabytes."""
    paths = []
    for at, (name, code) in enumerate(BOMBS.items()):
        path = tmp_path / f"{at} {name}.pt"
        paths.append(wrap(b"\x80\x04" + code + b".", path, FORMS[at % 2]))
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-1000:], done.returncode)
    assert done.stdout.endswith("done\n")


@pytest.mark.parametrize(
    ("size", "stride", "offset", "numel"),
    [
        ((10**12,), (0,), 0, 4),  # an expanded tensor of terabytes
        ((1 << 40, 1 << 40), (0, 0), 0, 4),
        ((5,), (1,), 0, 4),
        ((4,), (1,), 1, 4),
        ((2, 2), (2, 2), 0, 4),
        ((1,), (1,), 2**50, 4),
        ((1,), (1,), 2**70, 4),
        ((1,), (1,), -1, 4),
        ((4,), (-1,), 3, 4),
        ((-4,), (1,), 0, 4),
        ((4,), (1, 1), 0, 4),
        ((1,) * 65, (1,) * 65, 0, 4),
        ((4,), (1,), 0, 5),  # the storage is not as large as it says
        ((4,), (1,), 0, 2**58),
        ((4,), (1,), 0, -4),
        ((4,), (1,), 0, True),
        (("4",), (1,), 0, 4),
        ([4], (1,), 0, 4),
        ((2.0,), (1,), 0, 4),
    ],
)
def test_tensors_outside_of_their_storage(
    size: Any, stride: Any, offset: int, numel: int, tmp_path: Path
):
    def code(size: Any, stride: Any, offset: int, numel: int) -> bytes:
        storage = text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu")
        parts = [pickle.dumps(x, 2)[2:-1] for x in (numel, offset, size, stride)]
        parts = [part.replace(b"q\x00", b"").replace(b"q\x01", b"") for part in parts]
        rebuild = named("torch._utils", "_rebuild_tensor_v2")
        inside = b"(" + storage + parts[0] + b"tQ" + parts[1] + parts[2] + parts[3]
        return b"\x80\x02" + rebuild + b"(" + inside + b"\x89}tR."

    data = struct.pack("<4f", 1, 2, 3, 4)
    good = wrap(code((2, 2), (1, 2), 0, 4), tmp_path / "good.pt", storages=(data,))
    same(read_torch_file(good).value.read(), torch.tensor([[1.0, 3.0], [2.0, 4.0]]))
    bad = wrap(code(size, stride, offset, numel), tmp_path / "bad.pt", storages=(data,))
    with pytest.raises(InputError, match="damaged.*copy") as caught:
        read_torch_file(bad)
    assert str(bad) in str(caught.value)


# ---- damage ------------------------------------------------------------------------------------


def offsets(size: int) -> list[int]:
    """Return fifty places to cut a file of `size` bytes, the first and last ones among them."""
    spread = [size * i // 37 for i in range(1, 37)]
    return [0, 1, 3, 4, 10, 64, 100, *spread, *(size - n for n in (1, 2, 8, 21, 22, 100, 4096))]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_off_anywhere(form: str, tmp_path: Path):
    """A genuine rank file, as a copy that broke off left it."""
    source = ORACLE / "model_optim_rng.pt"
    if form == "stream":
        contents = torch.load(source, weights_only=False)
        source = save(contents, tmp_path / "whole.pt", form)
    data = source.read_bytes()
    assert read_torch_file(source).value["iteration"] == 1
    cut = tmp_path / "cut.pt"
    for size in offsets(len(data)):
        cut.write_bytes(data[:size])
        with pytest.raises(InputError) as caught:
            read_torch_file(cut)
        message = str(caught.value)
        assert str(cut) in message
        again = ("copy the file again", "download the file itself again", "expected a Megatron")
        assert any(part in message for part in again), message


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield copies with a few bits flipped, or bytes inserted, dropped or doubled."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(changed))
            kind = rng.randrange(5)
            if kind < 3:
                changed[at] ^= 1 << rng.randrange(8)
            elif kind == 3:
                changed[at:at] = bytes([rng.randrange(256)])
            else:
                del changed[at]
        yield bytes(changed)


def small_file(path: Path, form: str) -> Path:
    saved = {
        "model": {"weight": torch.randn(3, 4), "bias": torch.randn(3).half().t()},
        "args": RealNamespace(hidden_size=4, size=torch.Size([2]), none=None, dtype=torch.half),
        "state": [np.random.RandomState(1).get_state()[0], {1, 2}, (Colour.RED, 2.5, -7)],
    }
    return save(saved, path, form)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_flipped_bits_are_damage_or_another_value(form: str, tmp_path: Path):
    """A thousand damaged pickles: each is read, or refused by an InputError; nothing else."""
    source = small_file(tmp_path / "x.pt", form)
    damaged = tmp_path / "damaged.pt"
    if form == "zip":
        with zipfile.ZipFile(source) as archive:
            [name] = [n for n in archive.namelist() if n.endswith("data.pkl")]
            original = archive.read(name)
            storages = [archive.read(n) for n in archive.namelist() if "/data/" in n]
    else:
        original = source.read_bytes()
    outcomes = collections.Counter()
    for code in mutations(original, 1000, seed=11):
        if form == "zip":  # packed again, or its CRC would give the damage away
            wrap(code, damaged, storages=tuple(storages))
        else:
            damaged.write_bytes(code)
        with deadline(10):
            try:
                values(read_torch_file(damaged).value)
                outcomes["read"] += 1
            except InputError as error:
                assert str(damaged) in str(error)
                outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 50, outcomes


def test_flipped_bits_of_a_whole_archive(tmp_path: Path):
    """The zip file's own headers and directory too; its CRC guards the pickle."""
    data = small_file(tmp_path / "x.pt", "zip").read_bytes()
    damaged = tmp_path / "damaged.pt"
    refused = 0
    for code in mutations(data, 600, seed=12):
        damaged.write_bytes(code)
        with deadline(10), contextlib.suppress(InputError):
            refused += 1
            values(read_torch_file(damaged).value)
            refused -= 1
    assert refused > 100


# ---- other files -------------------------------------------------------------------------------


def zip_of(path: Path, *, compressed: str = "", **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            kind = zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED
            archive.writestr(name.replace("__", "/").replace("_pkl", ".pkl"), data, kind)
    return path


def test_files_of_other_kinds_are_refused_by_name(tmp_path: Path):
    path = tmp_path / "x.pt"
    code = pickle.dumps({"a": 1}, 2)
    expected = "expected a Megatron model file"

    def refused(pattern: str) -> None:
        with pytest.raises(InputError, match=pattern) as caught:
            read_torch_file(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("does not exist; give the path of a checkpoint")
    path.mkdir()
    refused("is a folder where a file was expected")
    path.rmdir()
    path.write_bytes(b"")
    refused("is empty; download the file itself again")
    path.write_bytes(b"some text")
    refused(f"was not written by torch.save; {expected}")
    path.write_bytes(code)
    refused(f"is a pickle but was not written by torch.save; {expected}")
    zip_of(path, readme=b"x")
    refused(f"no data.pkl .found readme.; {expected}")
    zip_of(path, a__data_pkl=code, a__constants_pkl=code)
    refused(f"is a TorchScript archive.*{expected}")
    zip_of(path, a__data_pkl=code, a__byteorder=b"big")
    refused("big-endian machine")
    zip_of(path, compressed="a__data_pkl", a__data_pkl=code)
    refused("packed again.*a/data.pkl is compressed.*use the original")
    zip_of(path, compressed="a__byteorder", a__data_pkl=code, a__byteorder=b"little" * 9)
    refused("packed again.*a/byteorder is compressed")
    zip_of(path, a__data_pkl=code)
    assert read_torch_file(path).value == {"a": 1}

    head = [pickle.dumps(x, 2) for x in (unpickle.STREAM_MAGIC, 1002, {"little_endian": True})]
    path.write_bytes(b"".join(head))
    refused("unknown form of torch.save")
    head = [pickle.dumps(x, 2) for x in (unpickle.STREAM_MAGIC, 1001, {"little_endian": False})]
    path.write_bytes(b"".join(head))
    refused("unknown form of torch.save")


def test_a_compressed_or_short_storage(tmp_path: Path):
    source = save({"a": torch.ones(64)}, tmp_path / "x.pt", "zip")
    with zipfile.ZipFile(source) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    again = tmp_path / "again.pt"

    def pack(change: Callable[[str, bytes], tuple[bytes, int]]) -> None:
        with zipfile.ZipFile(again, "w") as archive:
            for name, data in records.items():
                archive.writestr(name, *change(name, data))

    pack(lambda name, data: (data, zipfile.ZIP_STORED))
    same(values(read_torch_file(again).value), {"a": torch.ones(64)})
    pack(lambda name, data: (data, 8 if name.endswith("data/0") else 0))
    with pytest.raises(InputError, match="x/data/0 is compressed"):
        read_torch_file(again)
    pack(lambda name, data: (data[:-1] if name.endswith("data/0") else data, 0))
    with pytest.raises(InputError, match="storage 0 has 255 bytes, not 64 x 4"):
        read_torch_file(again)
    del records["x/data/0"]
    pack(lambda name, data: (data, 0))
    with pytest.raises(InputError, match="damaged.*data/0"):
        read_torch_file(again)


def test_a_file_that_shrinks_before_it_is_mapped(tmp_path: Path):
    path = save({"a": torch.ones(4096)}, tmp_path / "x.pt", "zip")
    tensor = read_torch_file(path).value["a"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{path} was replaced or changed since"):
        tensor.read()


def test_the_genuine_files_name_what_megatron_pickles():
    """The shipped ones: every class that is met is known, none is hostile."""
    met = set()
    for path in sorted(ORACLES.rglob("*_rng.pt")):
        file = read_torch_file(path)
        assert not file.hostile
        met.update(file.classes)
    assert "megatron.core.enums.ModelType" in met
    assert all(name.startswith(("megatron.", "signal.Signals")) for name in met), met


def test_the_machine_replaces_every_step_that_calls_or_changes():
    """A step of Python's unpickler that is new, or that calls, must be looked at here."""
    ours = {
        code
        for code, step in SafeUnpickler.dispatch.items()
        if getattr(step, "__module__", "") != "pickle"
    }
    replaced = {pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BUILD, pickle.DICT}
    replaced |= {pickle.SETITEM, pickle.SETITEMS, pickle.ADDITEMS, pickle.FROZENSET}
    # What is held elsewhere too, and what takes more memory than bytes of the pickle, is counted.
    counted = {pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.DUP, pickle.EMPTY_SET}
    assert ours == {code[0] for code in (*replaced, *counted, pickle.BYTEARRAY8)}
    known = {ord(opcode.code) for opcode in pickletools.opcodes}
    assert known == set(SafeUnpickler.dispatch)
