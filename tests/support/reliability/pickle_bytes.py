"""Pickles put together opcode by opcode, and the files of torch.save that hold them.

Each function returns the bytes that push one value; `pickled` makes them a whole pickle.
Source: the opcodes at the top of Python's Lib/pickle.py and Lib/pickletools.py.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP, MARK, EMPTY_DICT, NONE, REDUCE, BUILD = b".", b"(", b"}", b"N", b"R", b"b"


def pickled(value: bytes, *, protocol: int = 2) -> bytes:
    """Return a pickle of one value."""
    head = b"" if protocol < 2 else b"\x80" + bytes([protocol])
    return head + value + STOP


def text(value: str) -> bytes:
    """Push a text."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """Push a number of any size."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8b" + struct.pack("<i", size) + value.to_bytes(size, "little", signed=True)


def real(value: float) -> bytes:
    """Push a float."""
    return b"G" + struct.pack(">d", value)


def tupled(*parts: bytes) -> bytes:
    """Push a tuple."""
    return MARK + b"".join(parts) + b"t"


def listed(*parts: bytes) -> bytes:
    """Push a list."""
    return b"](" + b"".join(parts) + b"e"


def mapped(pairs: Mapping[str, bytes]) -> bytes:
    """Push a dict with names as its keys."""
    return b"}(" + b"".join(text(key) + value for key, value in pairs.items()) + b"u"


def named(module: str, name: str) -> bytes:
    """Push what a module calls by a name (GLOBAL)."""
    return b"c" + f"{module}\n{name}\n".encode()


def named_on_stack(module: str, name: str) -> bytes:
    """Push the same by STACK_GLOBAL."""
    return text(module) + text(name) + b"\x93"


def called(function: bytes, *arguments: bytes) -> bytes:
    """Push what a function returns (REDUCE)."""
    return function + tupled(*arguments) + REDUCE


def persistent(*parts: bytes) -> bytes:
    """Push what a persistent id stands for (BINPERSID)."""
    return tupled(*parts) + b"Q"


def storage(
    elements: bytes = number(4), kind: str = "FloatStorage", key: bytes = text("0")
) -> bytes:
    """Push a storage as torch.save names it."""
    return persistent(text("storage"), named("torch", kind), key, text("cpu"), elements)


def numbers(*values: int) -> bytes:
    """Push a tuple of numbers."""
    return tupled(*map(number, values))


def tensor(
    held: bytes, offset: bytes, size: bytes, stride: bytes, rebuild: str = "_rebuild_tensor_v2"
) -> bytes:
    """Push a tensor of a storage."""
    hooks = called(named("collections", "OrderedDict"))
    return called(named("torch._utils", rebuild), held, offset, size, stride, b"\x89", hooks)


def with_entry(data: bytes, key: str, value: bytes) -> bytes:
    """Return a pickle of a dict with one more entry."""
    assert data.endswith(STOP)
    return data[:-1] + text(key) + value + b"s" + STOP


def torch_zip(
    path: Path, data: bytes, storages: Mapping[str, bytes] | None = None, **more: bytes
) -> Path:
    """Write a file as torch.save lays it out, around any pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", b"3\n")
        for name, content in more.items():
            archive.writestr(f"archive/{name}", content)
    return path


def with_pickle(source: Path, target: Path, data: bytes) -> Path:
    """Write a copy of a file of torch.save with another pickle in it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for member in old.infolist():
            content = data if member.filename.endswith("/data.pkl") else old.read(member)
            new.writestr(member.filename, content)
    return target


def torch_stream(data: bytes, keys: Sequence[bytes] = ()) -> bytes:
    """Return a file of the form before torch 1.6, around any pickle."""
    magic = pickled(number(0x1950A86A20F9469CFC6C))
    system = pickled(mapped({"little_endian": b"\x88"}))
    return magic + pickled(number(1001)) + system + data + pickled(listed(*keys))
