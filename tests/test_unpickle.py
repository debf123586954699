"""Reading what torch.save wrote: every value as torch reads it, and nothing that a file asks for."""

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
from torch import Tensor, nn

from mlm_eval.checkpoints import safe_pickle, unpickle
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import StoredTensor
from mlm_eval.checkpoints.safe_pickle import (
    Namespace,
    SafeUnpickler,
    Stub,
    attributes_of,
    is_hostile,
    is_quiet,
    printable,
    state_of,
)
from mlm_eval.checkpoints.unpickle import read_pickle, read_torch_file

FORMS = ("zip", "stream")
ORACLE = Path(__file__).with_name("oracles") / "v10_gpt_tp2/iter_0000001/mp_rank_00"


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
    for key in ("nested", "numbers", "keys", "dtype", "sets"):
        same(values(file.value[key]), saved[key])
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
    for key in set(saved) - {"numpy", "type", "bytes"}:
        assert isinstance(file.value[key], Stub), key
    assert isinstance(file.value["numpy"][1], Stub)
    assert state_of(file.value["object"]) == {"width": 3}
    assert state_of(file.value["slots"]) == {"width": 3}
    assert attributes_of(file.value["namespace"]) == {"width": 3}
    assert "Colour" in repr(file.value["enum"])
    here = Colour.__module__
    shown = {f"{here}.{c.__name__}" for c in (Colour, Settings, Slotted, NamedDict, NamedList)}
    assert shown < set(file.classes)
    assert {"types.SimpleNamespace", "pathlib.PosixPath", "signal.Signals"} < set(file.classes)
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
    """As in .distcp files: offset and length name the archive, tensors point into the large file."""
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
    "newobj": lambda c: (
        named("subprocess", "Popen") + b"(" + text("sh") + text("-c") + text(c) + b"l\x85R"
    ),
    "newobj with keywords": lambda c: (
        named("subprocess", "Popen") + text(c) + b"\x85}" + text("shell") + b"\x88s\x92"
    ),
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
    "a method of an allowed class": lambda c: (
        stack_named("collections", "OrderedDict.__init__.__globals__.get")
        + text("_sys")
        + b"\x85R0"
        + named("os", "system")
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
        named("torch._utils", "_rebuild_parameter_with_state")
        + named("os", "system")
        + text(c)
        + b"\x85R\x85R"
        if False
        else named("torch._tensor", "_rebuild_from_type_v2")
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


def payload(name: str, command: str) -> bytes:
    """Return a whole pickle: `{"model": {}, "x": what does harm}`."""
    return b"\x80\x04}" + text("model") + b"}s" + text("x") + ARMED[name](command) + b"s."


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
            assert name == "torch in a pickle" or file.hostile
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
        path = wrap(b"\x80\x04" + code + b".", tmp_path / f"x.{form}", form)
        with pytest.raises(InputError, match="damaged.*copy the file again") as caught:
            (read_pickle if form == "pickle" else read_torch_file)(path)
        assert str(path) in str(caught.value)


# ---- files that would hang, or take the memory -------------------------------------------------

DOUBLE = b"2\x86" * 60  # DUP TUPLE2: a tuple of itself, twice, sixty times over
DEEP = b"\x85" * 1_000_000


def bombs() -> dict[str, bytes]:
    """Return pickles of a few kilobytes that crash, hang or fill the memory of Python's own."""
    big = b"](" + b"K\x01" * 100_000 + b"e\x94"
    return {
        "deep tuple as a key": b"})" + DEEP + b"K\x01s",
        "endless tuple as a key": b"})" + DOUBLE + b"K\x01s",
        "endless tuple in a set": b"\x8f()" + DOUBLE + b"\x90",
        "endless tuple in a frozen set": b"()" + DOUBLE + b"\x91",
        "endless tuple in keys": b"(" + b")" + DOUBLE + b"K\x01d",
        "endless tuple in a called set": named("builtins", "set") + b"])" + DOUBLE + b"a\x85R",
        "endless tuple in a called dict": (
            named("collections", "OrderedDict") + b"])" + DOUBLE + b"K\x01\x86a\x85R"
        ),
        "two endless sets to compare": (
            b"\x8f("
            + b"(" + b"(" * 0 + b")\x91" + b"".join([])  # frozenset({()})
            + chain_of_sets()
            + chain_of_sets()
            + b"\x90"
        ),
        "deep list": b"]" + b"]" * 0 + b"".join([b"]"] * 500_000) + b"a" * 500_000,
        "deep tuple": b")" + DEEP,
        "endless list": b"]" + b"2a" * 0 + b")" + DOUBLE + b"a",
        "list in itself": b"]\x94h\x00a",
        "dict in itself": b"}\x94" + text("x") + b"h\x00s",
        "tuple in itself": b"]\x94h\x00\x85a",
        "huge memo index": b"Nr\xff\xff\xff\x7f",
        "huge bytes": b"\x8e" + struct.pack("<Q", 1 << 40),
        "huge text": b"\x8d" + struct.pack("<Q", 1 << 40),
        "huge bytearray": b"\x96" + struct.pack("<Q", 1 << 34),
        "huge frame": b"\x95" + struct.pack("<Q", 1 << 40),
        "huge number": b"\x8b\xff\xff\xff\x7f",
        "long decimal": b"L" + b"9" * 1_000_000 + b"L\n",
        "copies kept": big + b"".join([named("builtins", "set") + b"h\x00\x85R"] * 2000),
        "copies of arguments": big
        + b"0" + b"(" + b"h\x00" * 1 + b"K\x01" * 100_000 + b"t\x94"
        + b"".join([named("a", "B") + b"h\x01R"] * 2000),
        "copies of state": (
            b"}(" + b"".join(text(f"k{i}") + b"N" for i in range(50_000)) + b"u\x94"
            + b"".join([named("argparse", "Namespace") + b")\x81h\x00b"] * 4000)
        ),
        "many classes": b"".join(named("a", f"c{i}") + b"0" for i in range(30_000)) + b"N",
    }


def chain_of_sets() -> bytes:
    """Sixty frozen sets, each holding a pair of the one before: hashed at once, compared never."""
    return b"N" + b"".join([b"\x940"] * 0) + b"".join(
        b"2\x86" + struct.pack("<cI", b"r", 1000) + b"0(" + b"j" + struct.pack("<I", 1000) + b"\x91"
        for _ in range(60)
    )
