"""Tricks of archives: zip directories that disagree, zip64, tar headers of any kind, gzip."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from support.reliability.attacks import (
    Attack,
    Bases,
    Words,
    attacks,
    check,
    converting,
    copied,
    each,
    model_file,
)
from support.reliability.warm_commands import Sandbox, WarmCommands

pytest_plugins = ["support.reliability.warm_fixtures"]

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
END64, AT64 = b"PK\x06\x06", b"PK\x06\x07"
Edit = Callable[[bytearray], None]


def _edited(edit: Edit, published: bool, sandbox: Sandbox, bases: Bases) -> Words:
    """Edit the archive of a rank file, or a published archive around one."""
    root = copied(bases.gpt, sandbox.input / "c")
    if published:
        path = sandbox.input / "published.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(model_file(root), "release/mp_rank_00/model_optim_rng.pt")
            archive.writestr("latest_checkpointed_iteration.txt", "release")
    else:
        path = model_file(root)
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)
    return converting(path if published else root, sandbox)


def _all(data: bytearray, mark: bytes) -> list[int]:
    found, at = [], data.find(mark)
    while at >= 0:
        found.append(at)
        at = data.find(mark, at + 1)
    return found


def _put(mark: bytes, at: int, form: str, value: int, *, which: int | None = None) -> Edit:
    """Return an edit of a field after a mark: of each such mark, or of one."""

    def edit(data: bytearray) -> None:
        places = _all(data, mark)
        for place in places if which is None else [places[which]]:
            struct.pack_into(form, data, place + at, value)

    return edit


def _insert(mark: bytes, extra: bytes) -> Edit:
    """Return an edit that puts bytes before the first mark."""

    def edit(data: bytearray) -> None:
        at = data.index(mark)
        data[at:at] = extra

    return edit


def _name(mark: bytes, head: int, old: bytes, new: bytes) -> Edit:
    """Return an edit of names in the local headers or in the directory alone."""
    assert len(old) == len(new)

    def edit(data: bytearray) -> None:
        for place in _all(data, mark):
            (size,) = struct.unpack_from("<H", data, place + (26 if mark == LOCAL else 28))
            name = bytes(data[place + head : place + head + size])
            data[place + head : place + head + size] = name.replace(old, new)

    return edit


def _comment(size: int) -> Edit:
    def edit(data: bytearray) -> None:
        struct.pack_into("<H", data, data.rindex(END) + 20, size)
        data += b"x" * size

    return edit


def _many_ends(data: bytearray) -> None:
    data += data[data.rindex(END) :] * 3000


def _fake_end(data: bytearray) -> None:
    """A second end in the comment that names an empty directory."""
    end = struct.pack("<4s4H2LH", END, 0, 0, 0, 0, 0, 0, 0)
    struct.pack_into("<H", data, data.rindex(END) + 20, len(end))
    data += end


def _zip64(count: int, size: int, offset: int) -> Edit:
    def edit(data: bytearray) -> None:
        at = data.rindex(END)
        record = struct.pack("<4sQ2H2L4Q", END64, 44, 45, 45, 0, 0, count, count, size, offset)
        locator = struct.pack("<4sLQL", AT64, 0, at, 1)
        tail = bytearray(data[at:])
        struct.pack_into("<2H2L", tail, 8, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        data[at:] = record + locator + tail

    return edit


def _extra64(size: int) -> Edit:
    """Give the first entry a zip64 field of another size."""

    def edit(data: bytearray) -> None:
        at = data.index(CENTRAL)
        struct.pack_into("<L", data, at + 24, 0xFFFFFFFF)
        name, extra = struct.unpack_from("<2H", data, at + 28)
        field = struct.pack("<2HQ", 1, 8, size)
        data[at + 46 + name + extra : at + 46 + name + extra] = field
        struct.pack_into("<H", data, at + 30, extra + len(field))
        end = data.rindex(END)
        (length,) = struct.unpack_from("<L", data, end + 12)
        struct.pack_into("<L", data, end + 12, length + len(field))

    return edit


EDITS: dict[str, Edit] = {
    "other names in the local headers": _name(LOCAL, 30, b"data", b"evil"),
    "other names in the directory": _name(CENTRAL, 46, b"data", b"evil"),
    "a NUL in the directory's names": _name(CENTRAL, 46, b"data", b"d\0ta"),
    "escapes in the directory's names": _name(CENTRAL, 46, b"data", b"\x1b[2J"),
    "names marked as UTF-8 that are none": lambda d: (
        _name(CENTRAL, 46, b"data", b"\xff\xfe\xfd\xfc")(d),
        _put(CENTRAL, 8, "<H", 0x800)(d),
    )[0],
    "local headers of other sizes": _put(LOCAL, 22, "<L", 7),
    "local headers of other checksums": _put(LOCAL, 14, "<L", 7),
    "local names of 60,000 bytes": _put(LOCAL, 26, "<H", 60_000),
    "local extra fields of 60,000 bytes": _put(LOCAL, 28, "<H", 60_000),
    "local headers that say encrypted": _put(LOCAL, 6, "<H", 1),
    "local headers that say deflated": _put(LOCAL, 8, "<H", 8),
    "local headers without their mark": _put(LOCAL, 0, "<L", 0),
    "strong encryption": _put(CENTRAL, 8, "<H", 0x41),
    "patched data": _put(CENTRAL, 8, "<H", 0x20),
    "descriptors after the data": _put(CENTRAL, 8, "<H", 8),
    "a version that is needed of 255": _put(CENTRAL, 6, "<H", 255),
    "compressed sizes of 0": _put(CENTRAL, 20, "<L", 0),
    "compressed sizes of 4 GB": _put(CENTRAL, 20, "<L", 0xFFFFFFF0),
    "compressed by bzip2": _put(CENTRAL, 10, "<H", 12),
    "compressed by LZMA": _put(CENTRAL, 10, "<H", 14),
    "entries that are links": _put(CENTRAL, 38, "<L", 0o120777 << 16),
    "entries that are folders": _put(CENTRAL, 38, "<L", 0x10),
    "entries of month 15": _put(CENTRAL, 12, "<L", 0xFFFFFFFF),
    "the second entry at the first": _put(CENTRAL, 42, "<L", 0, which=1),
    "the last entry in the directory": lambda d: _put(
        CENTRAL, 42, "<L", d.index(CENTRAL), which=-1
    )(d),
    "an entry in the middle of another": _put(CENTRAL, 42, "<L", 33, which=-1),
    "a comment that is cut": _put(END, 20, "<H", 500),
    "a comment of 65,000 bytes": _comment(65_000),
    "3,000 ends": _many_ends,
    "another end in the comment": _fake_end,
    "bytes before the archive": _insert(LOCAL, b"x" * 100),
    "a program before the archive": _insert(LOCAL, b"#!/bin/sh\ntouch canary\n"),
    "bytes before the directory": _insert(CENTRAL, b"x" * 100),
    "the end alone": lambda d: d.__delitem__(slice(0, d.rindex(END))),
    "the end cut": lambda d: d.__delitem__(slice(-10, None)),
    "zip64: a directory at 2**60": _zip64(5, 500, 1 << 60),
    "zip64: a directory of 2**60": _zip64(5, 1 << 60, 0),
    "zip64: 2**60 entries": _zip64(1 << 60, 500, 100),
    "zip64: an entry of 2**60": _extra64(1 << 60),
    "zip64: an entry of 3": _extra64(3),
    "zip64: a field without its mark": _put(CENTRAL, 24, "<L", 0xFFFFFFFF, which=0),
}
# Tools read these as they were meant; what they say is not what is read.
MAY_BE_READ = tuple(EDITS)


def _again(change: Callable[[zipfile.ZipFile], None], sandbox: Sandbox, bases: Bases) -> Words:
    path = sandbox.input / "published.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(model_file(bases.gpt), "release/mp_rank_00/model_optim_rng.pt")
        archive.writestr("latest_checkpointed_iteration.txt", "release")
        change(archive)
    return converting(path, sandbox)


def _entry(archive: zipfile.ZipFile, name: str, content: bytes = b"x", mode: int = 0o644) -> None:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, content)


def _nested(depth: int) -> bytes:
    data = bytes(1 << 24)
    for _ in range(depth):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.zip", data)
        data = buffer.getvalue()
    return data


LINK = 0o120777
PUBLISHED: dict[str, Callable[[zipfile.ZipFile], None]] = {
    "a link in the place of the tracker": lambda a: _entry(
        a, "latest_checkpointed_iteration.txt", b"/etc/passwd", LINK
    ),
    "a link that goes up": lambda a: _entry(a, "release/x", b"../../../../home/precious.txt", LINK),
    "a link whose target is a megabyte": lambda a: _entry(a, "release/x", b"a/" * 500_000, LINK),
    "a link, and a file by its name": lambda a: (
        _entry(a, "release/x", b"/tmp", LINK),
        _entry(a, "release/x/canary", b"x"),
    )[0],
    "a folder and a file of one name": lambda a: (_entry(a, "y/", b""), _entry(a, "y", b"x"))[0],
    "names that differ in case": lambda a: (
        _entry(a, "Release/mp_rank_00/model_optim_rng.pt"),
        _entry(a, "RELEASE/x"),
    )[0],
    "names that look alike": lambda a: _entry(a, "rele\u0430se/mp_rank_00/model_optim_rng.pt"),
    "a name of dots": lambda a: _entry(a, ".../..x/..", b"x"),
    "a name of spaces": lambda a: _entry(a, " / / ", b"x"),
    "a name that ends in a dot": lambda a: _entry(a, "release./x", b"x"),
    "a device's name": lambda a: _entry(a, "NUL", b"x"),
    "a name with a colon": lambda a: _entry(a, "release:stream", b"x"),
    "a network name": lambda a: _entry(a, "//server/share/x", b"x"),
    "a name of line breaks": lambda a: _entry(a, "a\nmlm-eval: all is well\n", b"x"),
    "a name turned round": lambda a: _entry(a, "\u202e\u2066x", b"x"),
    "a name of 60,000 letters": lambda a: _entry(a, "n" * 60_000, b"x"),
    "a folder of 60,000 letters": lambda a: _entry(a, "n" * 30_000 + "/x", b"x"),
    "archives within archives": lambda a: _entry(a, "a.zip", _nested(6)),
    "50,000 entries": lambda a: [_entry(a, f"d/{n}", b"") for n in range(50_000)][0],
    "20,000 folders": lambda a: [_entry(a, f"d{n}/x", b"") for n in range(20_000)][0],
    "two rank files": lambda a: _entry(a, "iter_0000007/mp_rank_00/model_optim_rng.pt"),
    "a second checkpoint": lambda a: _entry(a, "other/release/mp_rank_00/model_optim_rng.pt"),
    "200 MB of zeros in a rank file": lambda a: _entry(
        a, "release/mp_rank_01/model_optim_rng.pt", bytes(200_000_000)
    ),
}
ATTACKS = [
    Attack(f"rank file: {what}", partial(_edited, edit, False), refused=None)
    for what, edit in EDITS.items()
]
ATTACKS += [
    Attack(f"published: {what}", partial(_edited, edit, True), refused=None)
    for what, edit in EDITS.items()
]
ATTACKS += [
    Attack(f"published: {what}", partial(_again, change), refused=None)
    for what, change in PUBLISHED.items()
]

# ---- tar ---------------------------------------------------------------------------------------

CONFIG = b"num_layers: 1\nhidden_size: 64\nnum_attention_heads: 4\n"


def _weights() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {}}, buffer)
    return buffer.getvalue()


def _block(
    name: bytes = b"x",
    size: bytes = b"00000000001",
    kind: bytes = b"0",
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    checksum: int | None = None,
) -> bytes:
    """Return a header of a tar archive, field by field."""
    head = name.ljust(100, b"\0")[:100] + b"0000644\0" + b"0000000\0" * 2
    head += size.ljust(12, b"\0")[:12] + b"00000000000\0" + b" " * 8 + kind
    head += link.ljust(100, b"\0")[:100] + magic + bytes(64) + b"0000000\0" * 2
    head = (head + prefix).ljust(512, b"\0")[:512]
    total = sum(head) if checksum is None else checksum
    return head[:148] + b"%06o\0 " % total + head[156:]


def _record(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 512) * 512, b"\0")


def _pax(pairs: bytes, kind: bytes = b"x") -> bytes:
    return _block(b"pax", b"%011o" % len(pairs), kind) + _record(pairs)


def _pair(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    size = len(body) + len(str(len(body) + 2))
    size = len(body) + len(str(size))
    return str(size).encode() + body


def _long(kind: bytes, name: bytes) -> bytes:
    return _block(b"././@LongLink", b"%011o" % len(name), kind) + _record(name)


FILE = _block() + _record(b"x")
SPARSE = "GNU.sparse."
TARS: dict[str, bytes] = {
    "a size in base 256": _block(size=b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7),
    "a size below 0 in base 256": _block(size=b"\xff" * 12),
    "a size of letters": _block(size=b"abcdefghijk"),
    "a size of spaces": _block(size=b" " * 11) + _record(b""),
    "a size of 8 GB": _block(size=b"77777777777"),
    "a checksum of 0": _block(checksum=0) + _record(b"x"),
    "a kind of no kind": _block(kind=b"Z") + _record(b"x"),
    "a kind of a volume": _block(kind=b"V"),
    "a kind of a multi-volume": _block(kind=b"M") + _record(b"x"),
    "a kind of a folder with bytes": _block(b"d/", kind=b"5") + _record(b"x"),
    "a long name of 10 MB": _long(b"L", b"n" * 10_000_000) + FILE,
    "a long name without its file": _long(b"L", b"n" * 200),
    "a long name that goes up": _long(b"L", b"../" * 100 + b"canary\0") + FILE,
    "a long name of nothing": _long(b"L", b"") + FILE,
    "a long link of 10 MB": _long(b"K", b"n" * 10_000_000) + _block(kind=b"2"),
    "a long name of a long name": _long(b"L", b"a" * 200) * 2000 + FILE,
    "a prefix that goes up": _block(b"canary", prefix=b"../../..") + _record(b"x"),
    "a prefix that is absolute": _block(b"canary", prefix=b"/tmp") + _record(b"x"),
    "a pax header of 20 MB": _pax(_pair("comment", "x" * 20_000_000)) + FILE,
    "a pax header of 200,000 keys": _pax(
        b"".join(_pair(f"k{n}", "v") for n in range(200_000))
    ) + FILE,
    "a pax header of a wrong length": _pax(b"99 path=x\n") + FILE,
    "a pax header of length 0": _pax(b"0 path=x\n") + FILE,
    "a pax header of a length of 400 digits": _pax(b"9" * 400 + b" path=x\n") + FILE,
    "a pax header of no length": _pax(b"path=x\n") + FILE,
    "a pax header that ends in a number": _pax(b"12345") + FILE,
    "a pax header of no text": _pax(b"13 path=\xff\xfe\xfd\xfc\n") + FILE,
    "a pax path that goes up": _pax(_pair("path", "../../../canary")) + FILE,
    "a pax path that is absolute": _pax(_pair("path", "/tmp/canary")) + FILE,
    "a pax path of 200,000 letters": _pax(_pair("path", "n" * 200_000)) + FILE,
    "a pax path of escapes": _pax(_pair("path", "\x1b[2J\u202e")) + FILE,
    "a pax path of the settings": _pax(_pair("path", "model_config.yaml")) + FILE,
    "a pax link out": _pax(_pair("linkpath", "/etc/passwd")) + _block(kind=b"2"),
    "a pax size of 400 digits": _pax(_pair("size", "9" * 400)) + FILE,
    "a pax size of NaN": _pax(_pair("size", "nan")) + FILE,
    "a pax size of 1e300": _pax(_pair("size", "1e300")) + FILE,
    "a pax time of infinity": _pax(_pair("mtime", "inf")) + FILE,
    "a pax owner of 400 digits": _pax(_pair("uid", "9" * 400)) + FILE,
    "a pax character set": _pax(_pair("hdrcharset", "evil")) + FILE,
    "global pax headers of all files": _pax(_pair("path", "../canary"), b"g") + FILE,
    "a global size": _pax(_pair("size", str(2**60)), b"g") + FILE,
    "a sparse map of letters": _pax(_pair(SPARSE + "map", "a,b")) + FILE,
    "a sparse map of an odd count": _pax(_pair(SPARSE + "map", "0,1,2")) + FILE,
    "a sparse map below 0": _pax(_pair(SPARSE + "map", "-5,10")) + FILE,
    "a sparse map of a million": _pax(_pair(SPARSE + "map", "0,1," * 1_000_000 + "0,1")) + FILE,
    "a sparse file of version 1.0": _pax(
        _pair(SPARSE + "major", "1") + _pair(SPARSE + "minor", "0")
        + _pair(SPARSE + "realsize", str(1 << 50))
    ) + _block() + _record(b"999999999\n"),
    "a sparse file whose map never ends": _pax(
        _pair(SPARSE + "major", "1") + _pair(SPARSE + "minor", "0")
    ) + _block(size=b"00000001000") + b"9" * 512,
    "an old sparse header": _block(kind=b"S") + _record(b"x"),
    "an old sparse header that goes on": (
        _block(kind=b"S")[:482] + b"\x01" + bytes(29) + _record(b"x")
    ),
    "a link to itself": _block(b"l", b"00000000000", b"2", b"l"),
    "links in a ring": (
        _block(b"a", b"00000000000", b"2", b"b") + _block(b"b", b"00000000000", b"2", b"a")
    ),
    "a hard link to the settings": _block(b"m", b"00000000000", b"1", b"model_config.yaml"),
    "hard links, 20,000 of them": (
        b"".join(_block(b"h%d" % n, b"00000000000", b"1", b"h%d" % (n - 1)) for n in range(20_000))
    ),
    "20,000 empty files": b"".join(_block(b"f%d" % n, b"00000000000") for n in range(20_000)),
    "one name 20,000 times": _block(b"same", b"00000000000") * 20_000,
    "zeros between files": bytes(512) + FILE,
    "rubbish after the end": bytes(1024) + b"\xff" * 5000,
    "a name without an end": _block(b"n" * 100) + _record(b"x"),
    "a name of nothing": _block(b"") + _record(b"x"),
    "a name of a slash": _block(b"/") + _record(b"x"),
    "an old magic": _block(magic=b"\0" * 8) + _record(b"x"),
}  # fmt: skip


def _tar(blocks: bytes, form: str, sandbox: Sandbox, bases: Bases) -> Words:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (("model_config.yaml", CONFIG), ("model_weights.ckpt", _weights())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    right = buffer.getvalue()
    data = blocks + right if form == "before" else right.rstrip(b"\0") + b""
    if form != "before":
        data = _record(right[: buffer.getvalue().rindex(b"PK\x05\x06") + 600])
        data = data[: len(data) // 512 * 512] + blocks + bytes(1024)
    path = sandbox.input / "model.nemo"
    path.write_bytes(gzip.compress(data) if form == "gz" else data)
    return converting(path, sandbox)


ATTACKS += [
    Attack(f"tar, {form}: {what}", partial(_tar, blocks, form))
    for at, (what, blocks) in enumerate(TARS.items())
    for form in ("before", "after", "gz")
    if form == "before" or ("gz" if at % 2 else "after") == form
]
STREAMS: dict[str, bytes] = {
    "gzip within gzip": gzip.compress(gzip.compress(bytes(1 << 26))),
    "1,000 members of gzip": gzip.compress(b"") * 1000,
    "gzip with a name of 10 MB": (
        b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"n" * 10_000_000 + b"\0" + zlib.compress(b"")[2:-4]
    ),
    "gzip without an end to its name": b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"n" * 1_000_000,
    "gzip of a method of none": b"\x1f\x8b\x07\0\0\0\0\0\0\xff" + bytes(100),
    "gzip and rubbish": gzip.compress(bytes(1024)) + b"\xff" * 100,
    "bzip2": b"BZh9" + b"1AY&SY" + b"\xff" * 100,
    "xz": b"\xfd7zXZ\0\0\x04" + b"\xff" * 100,
    "zeros": bytes(1 << 20),
}


def _stream(data: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    path: Path = sandbox.input / "model.nemo"
    path.write_bytes(data)
    return converting(path, sandbox)


ATTACKS += each("a .nemo file", STREAMS, lambda data: partial(_stream, data))

# ---- RACE's archives ---------------------------------------------------------------------------

PASSAGE = {
    "article": "the cat sat on the mat",
    "questions": ["who sat?"],
    "options": [["a", "b", "c", "d"]],
    "answers": ["A"],
}


def _race(change: Callable[[bytes], bytes], sandbox: Sandbox, bases: Bases) -> Words:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for split in ("train", "dev"):
            content = json.dumps(PASSAGE).encode()
            info = tarfile.TarInfo(f"RACE/{split}/high/1.txt")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    path = sandbox.input / "RACE.tar.gz"
    path.write_bytes(change(buffer.getvalue()))
    return [
        *("race", "--ckpt", bases.bert, "--data", path, "--output-dir", sandbox.output),
        *("--device", "cpu", "--max-steps", 1, "--seq-length", 32, "--max-qa-length", 16),
        *("--global-batch", 1),
    ]


def _flipped(data: bytes) -> bytes:
    return data[:60] + b"\xff" * 8 + data[68:]


RACES: dict[str, Callable[[bytes], bytes]] = {
    "xz, cut": lambda data: lzma.compress(data)[:-30],
    "xz, flipped": lambda data: _flipped(lzma.compress(data)),
    "bzip2, cut": lambda data: bz2.compress(data)[:-20],
    "bzip2, flipped": lambda data: _flipped(bz2.compress(data)),
    "gzip, flipped": lambda data: _flipped(gzip.compress(data)),
    "8 GB of zeros beside": lambda data: gzip.compress(
        _block(b"RACE/zeros", b"%011o" % (1 << 33 - 1)) + bytes(1 << 20) + data, 1
    ),
    "a folder's name of 5,000 digits": lambda data: (
        _pax(_pair("path", "RACE/train/high/" + "9" * 5000 + ".txt"))
        + _block(size=b"%011o" % len(json.dumps(PASSAGE)))
        + _record(json.dumps(PASSAGE).encode())
        + data
    ),
    "names with superscripts": lambda data: b"".join(
        (
            *(
                _pax(_pair("path", f"RACE/train/high/{name}.txt"))
                + _block(size=b"%011o" % len(json.dumps(PASSAGE)))
                + _record(json.dumps(PASSAGE).encode())
                for name in ("1\u00b23", "9\u00b9\u00b9", "\u0661", "3")
            ),
            data,
        )
    ),
}
ATTACKS += [
    Attack(f"RACE: {what}", partial(_race, change), refused=None) for what, change in RACES.items()
]
ATTACKS += [
    Attack(f"RACE: {what}", partial(_race, lambda data, b=blocks: b + data), refused=None)
    for what, blocks in TARS.items()
]


@attacks(ATTACKS, every=60)
def test_no_archive_is_believed(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)
