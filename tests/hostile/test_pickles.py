"""Code in pickles: every way that an opcode can call or change, in every file that holds one."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from support.reliability.attacks import (
    Attack,
    Bases,
    Words,
    attacks,
    check,
    converting,
    copied,
    inspecting,
    model_file,
    saved,
)
from support.reliability.pickle_bytes import (
    BUILD,
    MARK,
    NONE,
    REDUCE,
    called,
    listed,
    mapped,
    named,
    named_on_stack,
    number,
    persistent,
    pickled,
    text,
    torch_stream,
    torch_zip,
    tupled,
    with_entry,
    with_pickle,
)
from support.reliability.warm_commands import Sandbox, WarmCommands

pytest_plugins = ["support.reliability.warm_fixtures"]

Gadget = Callable[[str], bytes]
"""Returns the opcodes that push one value, and that would run a shell command on the way."""


def _short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _code(command: str) -> str:
    return f"__import__('os').system({command!r})"


def _getattr_chain(command: str) -> bytes:
    os_module = called(named("builtins", "__import__"), text("os"))
    return called(called(named("builtins", "getattr"), os_module, text("system")), text(command))


GADGETS: dict[str, Gadget] = {
    "REDUCE of os.system": lambda c: called(named("os", "system"), text(c)),
    "REDUCE of posix.system": lambda c: called(named("posix", "system"), text(c)),
    "STACK_GLOBAL of os.system": lambda c: called(named_on_stack("os", "system"), text(c)),
    "STACK_GLOBAL of a dotted name": lambda c: called(
        named_on_stack("argparse", "_os.system"), text(c)
    ),
    "STACK_GLOBAL from the memo": lambda c: (
        _short("os") + b"\x94" + _short("system") + b"\x94h\x00h\x01\x93" + tupled(text(c)) + REDUCE
    ),
    "STACK_GLOBAL of numbers": lambda c: number(1) + number(2) + b"\x93",
    "GLOBAL of protocol 0": lambda c: b"cos\nsystem\n(S" + repr(c).encode() + b"\ntR",
    "GLOBAL with a name of two lines": lambda c: b"cos\r\nsystem\n" + tupled(text(c)) + REDUCE,
    "INST": lambda c: b"(S" + repr(c).encode() + b"\nios\nsystem\n",
    "OBJ": lambda c: MARK + named("os", "system") + text(c) + b"o",
    "NEWOBJ of Popen": lambda c: (
        named("subprocess", "Popen") + tupled(listed(*map(text, c.split()))) + b"\x81"
    ),
    "NEWOBJ_EX of Popen": lambda c: (
        named("subprocess", "Popen") + tupled(text(c)) + mapped({"shell": b"\x88"}) + b"\x92"
    ),
    "BUILD with __setstate__": lambda c: (
        called(named("builtins", "object"))
        + mapped({"__setstate__": named("os", "system")})
        + BUILD
        + text(c)
        + BUILD
    ),
    "BUILD of a class": lambda c: (
        named("argparse", "Namespace") + mapped({"__init__": named("os", "system")}) + BUILD
    ),
    "BUILD with slots": lambda c: (
        called(named("argparse", "Namespace"))
        + tupled(NONE, mapped({"__class__": named("os", "system")}))
        + BUILD
    ),
    "EXT1": lambda c: b"\x82\x01" + tupled(text(c)) + REDUCE,
    "EXT2": lambda c: b"\x83\x01\x00" + tupled(text(c)) + REDUCE,
    "EXT4": lambda c: b"\x84\xff\xff\xff\x7f" + tupled(text(c)) + REDUCE,
    "EXT4 below nothing": lambda c: b"\x84\x00\x00\x00\x80",
    "eval": lambda c: called(named("builtins", "eval"), text(_code(c))),
    "exec in Python 2's names": lambda c: called(named("__builtin__", "exec"), text(_code(c))),
    "getattr": _getattr_chain,
    "compile and run": lambda c: called(
        named("builtins", "exec"),
        called(named("builtins", "compile"), text(_code(c)), text("x"), text("exec")),
    ),
    "a partial": lambda c: called(
        called(named("functools", "partial"), named("os", "system"), text(c))
    ),
    "attrgetter": lambda c: called(
        called(named("operator", "attrgetter"), text("system")), named("os", "path")
    ),
    "map over a list": lambda c: called(
        named("builtins", "list"),
        called(named("builtins", "map"), named("os", "system"), listed(text(c))),
    ),
    "code of marshal": lambda c: called(
        named("types", "FunctionType"),
        called(named("marshal", "loads"), b"C\x04\x00\x00\x00"[:5].replace(b"\x04", b"\x00")[:2]),
    ),
    "torch.load of a file": lambda c: called(named("torch", "load"), text("/etc/passwd")),
    "a pickle in a pickle": lambda c: called(
        named("pickle", "loads"), b"C" + bytes([len(_inner(c))]) + _inner(c)
    ),
    "a module's import": lambda c: called(named("importlib", "import_module"), text("antigravity")),
    "a library": lambda c: called(named("ctypes", "CDLL"), text("./evil.so")),
    "a stub that is called": lambda c: called(called(named("evil", "Run"), text(c)), text(c)),
    "items for a module": lambda c: named("os", "environ") + text("PATH") + text("") + b"s",
    "a list's append": lambda c: called(named("evil", "List")) + text(c) + b"a",
    "a torch hook": lambda c: called(
        named("torch._tensor", "_rebuild_from_type_v2"),
        named("os", "system"),
        named("torch", "Tensor"),
        tupled(text(c)),
        NONE,
    ),
    "a parameter of a call": lambda c: called(
        named("torch._utils", "_rebuild_parameter"), called(named("os", "system"), text(c))
    ),
    "persistent id of a call": lambda c: persistent(called(named("os", "system"), text(c))),
    "persistent id of protocol 0": lambda c: b"Pcos\n",
    "a persistent id of a class": lambda c: persistent(
        text("module"), named("os", "system"), text(c), text(c)
    ),
    "a dict's key of a call": lambda c: (
        b"}" + called(named("os", "system"), text(c)) + number(1) + b"s"
    ),
    "an out-of-band buffer": lambda c: b"\x97\x98",
    "a class by its metaclass": lambda c: called(
        named("builtins", "type"), text("x"), tupled(), mapped({"a": named("os", "system")})
    ),
    "copyreg's constructor": lambda c: called(
        named("copyreg", "_reconstructor"), named("os", "system"), named("builtins", "object"), NONE
    ),
    "copyreg's table": lambda c: called(
        named("copyreg", "add_extension"), text("os"), text("system"), number(1)
    ),
    "numpy's loader": lambda c: called(named("numpy", "load"), text("/x.npy"), NONE, b"\x88"),
    "a named tuple's code": lambda c: called(
        named("collections", "namedtuple"), text("x"), text(_code(c))
    ),
    "a class of __main__": lambda c: called(named("__main__", "system"), text(c)),
    "a class of ours": lambda c: called(
        named("mlm_eval.checkpoints.files.output", "write_text"), text("canary"), text(c)
    ),
    "the unpickler itself": lambda c: called(
        named("mlm_eval.checkpoints.files.safe_pickle", "SafeUnpickler.find_class"), text("os")
    ),
}


def _inner(command: str) -> bytes:
    return pickled(called(named("os", "system"), text(command)))[:255]


def _rank_file(at: Path, bases: Bases, gadget: bytes) -> Path:
    root = copied(bases.gpt, at)
    data = with_entry(bases.data_pickle, "evil", gadget)
    with_pickle(model_file(bases.gpt), model_file(root), data)
    return root


def _metadata(at: Path, bases: Bases, gadget: bytes) -> Path:
    root = copied(bases.dist, at)
    data = (root / ".metadata").read_bytes()
    # An object with a state: the gadget stands on the stack below it, and is dropped.
    (root / ".metadata").write_bytes(data[:2] + gadget + b"0" + data[2:])
    return root


def _common(at: Path, bases: Bases, gadget: bytes) -> Path:
    root = copied(bases.dist, at)
    whole = saved(root / "again.pt", {"iteration": 1})
    import zipfile

    with zipfile.ZipFile(root / "common.pt") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        data = with_entry(archive.read(name), "evil", gadget)
    with_pickle(root / "common.pt", whole, data)
    whole.rename(root / "common.pt")
    return root


def _hub_bin(at: Path, bases: Bases, gadget: bytes) -> Path:
    root = copied(bases.hub, at)
    for file in root.glob("*.safetensors*"):
        file.unlink()
    torch_zip(root / "pytorch_model.bin", pickled(mapped({"transformer.wte.weight": gadget})))
    return root


def _alone(at: Path, bases: Bases, gadget: bytes) -> Path:
    return torch_zip(at / "model.pt", pickled(gadget, protocol=4))


def _stream(at: Path, bases: Bases, gadget: bytes) -> Path:
    at.mkdir()
    (at / "model.pt").write_bytes(torch_stream(pickled(mapped({"model": gadget}))))
    return at / "model.pt"


def _bare(at: Path, bases: Bases, gadget: bytes) -> Path:
    at.mkdir()
    (at / "model.pt").write_bytes(pickled(gadget, protocol=5))
    return at / "model.pt"


PLACES = {
    "rank file": _rank_file,
    ".metadata": _metadata,
    "common.pt": _common,
    "pytorch_model.bin": _hub_bin,
    "alone": _alone,
    "stream": _stream,
    "bare": _bare,
}


def _prepare(place: str, gadget: Gadget, at: int, sandbox: Sandbox, bases: Bases) -> Words:
    path = PLACES[place](sandbox.input / "c", bases, gadget(sandbox.command))
    return inspecting(path) if at % 2 else converting(path, sandbox)


ATTACKS = [
    Attack(f"{what} in {place}", partial(_prepare, place, gadget, at + n), refused=None)
    for n, place in enumerate(PLACES)
    for at, (what, gadget) in enumerate(GADGETS.items())
]

# Pickles that end in the middle of something, lie about lengths or nest.
DAMAGED: dict[str, bytes] = {
    "no STOP": b"\x80\x02}",
    "nothing": b"\x80\x02.",
    "a MARK alone": b"\x80\x02(.",
    "POP of nothing": b"\x80\x020.",
    "POP_MARK of nothing": b"\x80\x021.",
    "DUP of nothing": b"\x80\x022.",
    "a memo that is not there": b"\x80\x02h\x05.",
    "a memo of 4 GB": b"\x80\x02]r\xff\xff\xff\xff.",
    "a FRAME of an exabyte": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.",
    "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a text of an exabyte": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"abc.",
    "bytes of 2**63": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 63) + b"abc.",
    "a bytearray of an exabyte": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"abc.",
    "a negative length": b"\x80\x02T\xff\xff\xff\xffabc.",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "a long of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "an unknown opcode": b"\x80\x02\xff.",
    "protocol 200": b"\x80\xc8}.",
    "lists 100,000 deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples 100,000 deep": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "dicts 50,000 deep": b"\x80\x02" + b"}K\x01" * 50_000 + b"}" + b"s" * 50_000 + b".",
    "marks a million deep": b"\x80\x02" + b"(" * 1_000_000 + b"t.",
    "a tuple as a key, 50,000 deep": b"\x80\x02})" + b"\x85" * 50_000 + b"K\x01s.",
    "a list that holds itself": pickle.dumps((x := [], x.append(x))[0]),
    "a dict that holds itself as state": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "a wrong escape": b"S'\\xzz'\n.",
    "a text without quotes": b"Sabc\n.",
    "a float that is none": b"Fabc\n.",
    "a surrogate": b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.",
    "10,001 classes": b"\x80\x02" + b"".join(b"cm\nn%d\n0" % at for at in range(10_001)) + b"}.",
}


def _damaged(data: bytes, at: int, sandbox: Sandbox, bases: Bases) -> Words:
    if at % 3 == 0:
        path = torch_zip(sandbox.input / "m.pt", data)
    elif at % 3 == 1:
        path = sandbox.input / "m.pt"
        path.write_bytes(torch_stream(data))
    else:
        path = copied(bases.dist, sandbox.input / "c")
        (path / ".metadata").write_bytes(data)
    return inspecting(path)


ATTACKS += [
    Attack(what, partial(_damaged, data, at)) for at, (what, data) in enumerate(DAMAGED.items())
]


@attacks(ATTACKS, every=20)
def test_no_pickle_runs_or_hangs(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)
