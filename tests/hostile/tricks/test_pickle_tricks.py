"""Tricks of the pickle machine: protocols, the memo, frames, states, ids, depth, odd keys."""

from __future__ import annotations

import struct
from functools import partial

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
)
from support.reliability.pickle_bytes import (
    BUILD,
    NONE,
    REDUCE,
    called,
    listed,
    mapped,
    named,
    number,
    numbers,
    persistent,
    pickled,
    real,
    storage,
    tensor,
    text,
    torch_stream,
    torch_zip,
    tupled,
    with_entry,
    with_pickle,
)
from support.reliability.warm_commands import Sandbox, WarmCommands

pytest_plugins = ["support.reliability.warm_fixtures"]

SYSTEM = named("os", "system")
TOUCH = text("touch canary")


def _frame(data: bytes, length: int | None = None) -> bytes:
    return b"\x95" + struct.pack("<Q", len(data) if length is None else length) + data


def _whole(data: bytes) -> bytes:
    return data if data.endswith(b".") else pickled(data, protocol=4)


PICKLES: dict[str, bytes] = {
    # protocols within one another
    "a second PROTO in the middle": b"\x80\x02\x80\x05" + called(SYSTEM, TOUCH) + b".",
    "PROTO 0": b"\x80\x00}.",
    "text after STOP": b"\x80\x02}.cos\nsystem\n(S'touch canary'\ntR.",
    "protocol 0 without a head": b"(dp0\nVmodel\np1\ncos\nsystem\n(Vtouch canary\ntRs.",
    "an INST of many arguments": b"(" + b"I1\n" * 50_000 + b"ios\nsystem\n.",
    "an OBJ without a class": b"(o.",
    "an OBJ of a number": b"(K\x01o.",
    # calls of what is none
    "REDUCE of a number": number(1) + tupled() + REDUCE,
    "REDUCE of a text": text("os") + tupled() + REDUCE,
    "REDUCE without arguments": SYSTEM + REDUCE,
    "REDUCE of a dict's arguments": SYSTEM + mapped({"command": TOUCH}) + REDUCE,
    "NEWOBJ of a text": text("os") + tupled() + b"\x81",
    "NEWOBJ of a function": named("collections", "OrderedDict") + number(1) + b"\x81",
    "NEWOBJ_EX with a list": SYSTEM + tupled() + listed() + b"\x92",
    "NEWOBJ_EX with numbers as names": SYSTEM + tupled() + b"}" + number(1) + TOUCH + b"s\x92",
    "NEWOBJ of a dtype": named("torch", "float32") + tupled() + b"\x81",
    "a dtype that is called": called(named("torch", "float32"), TOUCH),
    "a Size of a text": called(named("torch", "Size"), text("abc")),
    "a Size of 10 million": called(named("torch", "Size"), listed(*[number(1)] * 1_000_000)),
    "a Size of a Size": called(
        named("torch", "Size"), listed(called(named("torch", "Size"), listed(number(4))))
    ),
    # states
    "BUILD of a number": number(1) + mapped({"a": number(1)}) + BUILD,
    "BUILD of a dict": b"}" + mapped({"a": number(1)}) + BUILD,
    "BUILD with a list": called(named("argparse", "Namespace")) + listed(number(1)) + BUILD,
    "BUILD of three parts": (
        called(named("argparse", "Namespace")) + tupled(NONE, NONE, NONE) + BUILD
    ),
    "BUILD with keys that are numbers": (
        called(named("argparse", "Namespace")) + b"}" + number(1) + number(2) + b"s" + BUILD
    ),
    "BUILD of __dict__": (
        called(named("argparse", "Namespace")) + mapped({"__dict__": mapped({})}) + BUILD
    ),
    "BUILD of __class__": (
        called(named("argparse", "Namespace")) + mapped({"__class__": SYSTEM}) + BUILD
    ),
    "BUILD of its own state": (
        called(named("argparse", "Namespace")) + b"q\x00" + mapped({"a": b"h\x00"}) + BUILD
    ),
    "BUILD of an OrderedDict": (
        called(named("collections", "OrderedDict")) + mapped({"__class__": SYSTEM}) + BUILD
    ),
    "BUILD of a tensor": (
        tensor(storage(), number(0), numbers(4), numbers(1)) + mapped({"shape": NONE}) + BUILD
    ),
    "BUILD of a storage": storage() + mapped({"locate": SYSTEM}) + BUILD,
    "BUILD of a dtype": named("torch", "float32") + mapped({"itemsize": number(0)}) + BUILD,
    "100,000 BUILDs": (
        called(named("argparse", "Namespace")) + (mapped({"a": number(1)}) + BUILD) * 100_000
    ),
    # the memo
    "a memo by a negative number": b"\x80\x02]p-1\ng-1\n.",
    "a memo by a text": b"\x80\x02]pabc\ngabc\n.",
    "a memo by 400 digits": b"\x80\x02]p" + b"9" * 400 + b"\ng" + b"9" * 400 + b"\n.",
    "a memo that is overwritten": b"\x80\x02]q\x00K\x01q\x000h\x00a.",
    "PUT of nothing": b"\x80\x02q\x00.",
    "MEMOIZE of nothing": b"\x80\x04\x94.",
    "MEMOIZE of a mark": b"\x80\x04(\x94.",
    "5 million GETs": b"\x80\x02]q\x000](" + b"h\x00" * 5_000_000 + b"e.",
    # frames
    "a FRAME within a FRAME": b"\x80\x04" + _frame(_frame(b"}.")),
    "a FRAME that ends in a text": b"\x80\x04" + _frame(b"X\x10\x00", 3) + b"\x00\x00abc.",
    "a FRAME of 0 bytes": b"\x80\x04" + _frame(b"") * 1000 + b"}.",
    "a FRAME longer than the file": b"\x80\x04" + _frame(b"}.", 1 << 40),
    "a million FRAMEs": b"\x80\x04" + _frame(b"") * 300_000 + b"}.",
    # numbers and texts
    "a LONG4 of 100 MB that is not there": b"\x80\x02\x8b\x00\xe1\xf5\x05\x01\x02.",
    "a LONG4 of 2 MB": b"\x80\x02\x8b" + struct.pack("<i", 2_000_000) + b"\x7f" * 2_000_000 + b".",
    "a LONG4 of -1 bytes": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "a LONG1 of 255 bytes": b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    "a float of a megabyte": b"F" + b"1" * 1_000_000 + b"\n.",
    "an INT of spaces": b"I   \n.",
    "an INT of underscores": b"I1_0_0\n.",
    "an INT of other digits": "I\u0661\u0662\n.".encode(),
    "a UNICODE of escapes": b"V\\ud800\\udfff\\x00\n.",
    "a STRING of 10 MB": b"S'" + b"x" * 10_000_000 + b"'\n.",
    "a line that never ends": b"S'" + b"x" * 10_000_000,
    "a BYTEARRAY8 of 100 MB that is not there": b"\x80\x05\x96" + struct.pack("<Q", 10**8) + b"x.",
    "a READONLY_BUFFER of a list": b"\x80\x05]\x98.",
    # depth and keys
    "dicts as values, 300,000 deep": (
        b"\x80\x02" + b"}K\x01" * 300_000 + b"N" + b"s" * 300_000 + b"."
    ),
    "states 50,000 deep": (
        b"\x80\x02" + (named("a", "B") + b")\x81}X\x01\x00\x00\x00a") * 50_000
        + b"N" + b"sb" * 50_000 + b"."
    ),
    "calls 50,000 deep": b"\x80\x02" + named("a", "B") * 50_000 + b")R" + b"\x85R" * 49_999 + b".",
    "ids 50,000 deep": b"\x80\x02K\x01" + b"Q" * 50_000 + b".",
    "a key that is a dict": b"}" + b"}" + number(1) + b"s",
    "a key that is a list": b"}" + b"]" + number(1) + b"s",
    "a key that is an object": b"}" + called(named("a", "B")) + number(1) + b"s",
    "a key that is a tensor": (
        b"}" + tensor(storage(), number(0), numbers(4), numbers(1)) + number(1) + b"s"
    ),
    "a key of NaN, 100,000 times": b"}(" + (real(float("nan")) + number(1)) * 100_000 + b"u",
    "SETITEMS of an odd count": b"}(" + number(1) + b"u",
    "SETITEM of a text": text("a") + number(1) + number(2) + b"s",
    "APPENDS to a dict": b"}(" + number(1) + b"e",
    "ADDITEMS to a list": b"](" + number(1) + b"\x90",
    "a set that holds itself": b"\x8fq\x00(h\x00\x90",
    "a frozenset of lists": b"(]]\x91",
    "POP_MARK below a MARK": b"((1" + b"}",
    "20,000 MARKs and DUPs": b"}" + b"(2" * 20_000,
    "DUP a million times": b"]" + b"2" * 1_000_000,
}  # fmt: skip

ID_PARTS: dict[str, bytes] = {
    "that is a number": number(7) + b"Q",
    "that is a text": text("storage") + b"Q",
    "that is None": NONE + b"Q",
    "that is a tuple of nothing": tupled() + b"Q",
    "that is a list": listed(text("storage"), named("torch", "FloatStorage")) + b"Q",
    "of 100,000 parts": persistent(*[text("storage")] * 100_000),
    "of its own storage": persistent(text("storage"), storage(), text("0"), text("cpu"), number(4)),
    "whose kind is a dict": persistent(b"}", named("torch", "FloatStorage"), text("0"), NONE, NONE),
    "whose key is a list": storage(key=listed(text("0"))),
    "whose key is a tuple": storage(key=tupled(text("0"))),
    "whose key is a NUL": storage(key=text("\0")),
    "whose key is a megabyte": storage(key=text("k" * 1_000_000)),
    "whose key is a surrogate": storage(key=text("\ud800")),
    "whose key is escapes": storage(key=text("\x1b[2J\u202e")),
    "whose key is a class": storage(key=SYSTEM),
    "of 10**5000 elements": storage(number(10**5000)),
    "of NaN elements": storage(real(float("nan"))),
    "of true elements": storage(b"\x88"),
    "of a text of elements": storage(text("4")),
    "of a dtype": persistent(
        text("storage"), named("torch", "float32"), text("0"), text("cpu"), number(4)
    ),
    "of a kind of no torch": storage(kind="EvilStorage"),
    "of a kind with escapes": storage(kind="\x1b[2JStorage"),
    "of a quantized kind": storage(kind="QInt8Storage"),
    "of complex numbers": storage(kind="ComplexDoubleStorage"),
    "twice with other sizes": (
        storage(number(2)) + b"0" + tensor(storage(number(4)), number(0), numbers(4), numbers(1))
    ),
    "twice with other kinds": (
        storage(kind="ByteStorage") + b"0" + tensor(storage(), number(0), numbers(4), numbers(1))
    ),
    "300,000 times": listed(*[storage()] * 100_000),
}


def _in(data: bytes, at: int, sandbox: Sandbox, bases: Bases) -> Words:
    """Put a pickle in each kind of file in turn."""
    path, whole = sandbox.input / "m.pt", _whole(data)
    if at % 4 == 0:
        torch_zip(path, whole, {"0": bytes(16)})
    elif at % 4 == 1:
        path.write_bytes(torch_stream(whole, [text("0")]) + struct.pack("<q", 4) + bytes(16))
    elif at % 4 == 2:
        path = copied(bases.dist, sandbox.input / "c")
        (path / ".metadata").write_bytes(whole)
    else:
        path = copied(bases.hub, sandbox.input / "c")
        for file in path.glob("*.safetensors*"):
            file.unlink()
        torch_zip(path / "pytorch_model.bin", whole, {"0": bytes(16)})
    return inspecting(path) if at % 8 < 4 else converting(path, sandbox)


def _beside(value: bytes, key: str, sandbox: Sandbox, bases: Bases) -> Words:
    """Add an entry to a right rank file: what it holds is read, and may be shown."""
    root = copied(bases.gpt, sandbox.input / "c")
    data = with_entry(bases.data_pickle, key, value)
    with_pickle(model_file(bases.gpt), model_file(root), data)
    return converting(root, sandbox)


ATTACKS = [Attack(what, partial(_in, data, at)) for at, (what, data) in enumerate(PICKLES.items())]
ATTACKS += [
    Attack(f"an id {what}", partial(_in, mapped({"model": mapped({"w": data})}), at))
    for at, (what, data) in enumerate(ID_PARTS.items())
]
KEYS = ("args", "checkpoint_version", "iteration", "model", "optimizer")
VALUES: dict[str, bytes] = {
    "an object": called(named("evil", "Thing"), TOUCH),
    "a NaN": real(float("nan")),
    "an infinity": real(float("inf")),
    "a text of escapes": text("\x1b[2J\u202e"),
    "10**5000": number(10**5000),
    "-1": number(-1),
    "a set": b"\x8f(" + number(1) + b"\x90",
    "bytes": b"C\x03\xff\xfe\x00",
    "a list of itself": b"]q\x00h\x00a",
    "a dict of itself": b"}q\x00X\x01\x00\x00\x00ah\x00s",
    "a tensor": tensor(storage(), number(0), numbers(4), numbers(1)),
}
ATTACKS += [
    Attack(f"{key} is {what}", partial(_beside, value, key), refused=None)
    for key in KEYS
    for what, value in VALUES.items()
]


@attacks(ATTACKS, every=60)
def test_no_trick_of_the_machine_is_played(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)
