"""Tensors that lie about where they stand, and archives that lie about what they hold."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
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
    inspecting,
    model_file,
)
from support.reliability.pickle_bytes import (
    NONE,
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
)
from support.reliability.warm_commands import Sandbox, WarmCommands

pytest_plugins = ["support.reliability.warm_fixtures"]

# ---- tensors -----------------------------------------------------------------------------------

HELD = storage()
DTYPE = named("torch", "float32")
NO_HOOKS = called(named("collections", "OrderedDict"))


def _subclass(function: bytes, *arguments: bytes) -> bytes:
    rebuild = named("torch._tensor", "_rebuild_from_type_v2")
    return called(rebuild, function, named("torch", "Tensor"), tupled(*arguments), NONE)


def _nested(depth: int) -> bytes:
    value = tensor(HELD, number(0), numbers(4), numbers(1))
    for _ in range(depth):
        value = _subclass(named("torch._utils", "_rebuild_parameter"), value, b"\x88", NO_HOOKS)
    return value


def _untyped(dtype: bytes, size: bytes = numbers(4)) -> bytes:
    return called(
        named("torch._utils", "_rebuild_tensor_v3"),
        storage(kind="UntypedStorage", elements=number(16)),
        *(number(0), size, numbers(1), b"\x89", NO_HOOKS, dtype),
    )


TENSORS: dict[str, bytes] = {
    "a negative stride": tensor(HELD, number(3), numbers(4), numbers(-1)),
    "a negative offset": tensor(HELD, number(-4), numbers(4), numbers(1)),
    "a negative size": tensor(HELD, number(0), numbers(-4), numbers(1)),
    "an offset beyond": tensor(HELD, number(4), numbers(4), numbers(1)),
    "an offset of 2**62": tensor(HELD, number(2**62), numbers(4), numbers(1)),
    "a size of 2**40": tensor(HELD, number(0), numbers(2**40), numbers(1)),
    "a size of 2**40 with stride 0": tensor(HELD, number(0), numbers(2**40), numbers(0)),
    "sizes whose product wraps": tensor(HELD, number(0), numbers(2**32, 2**32), numbers(0, 0)),
    "a stride that wraps": tensor(HELD, number(0), numbers(3, 3), numbers(2**61, 2**61)),
    "a size of a thousand digits": tensor(HELD, number(0), tupled(number(10**1000)), numbers(1)),
    "65 dims": tensor(HELD, number(0), numbers(*[1] * 65), numbers(*[1] * 65)),
    "100,000 dims": tensor(HELD, number(0), numbers(*[1] * 100_000), numbers(*[1] * 100_000)),
    "more sizes than strides": tensor(HELD, number(0), numbers(2, 2), numbers(1)),
    "a size that is a text": tensor(HELD, number(0), tupled(text("4")), numbers(1)),
    "a size that is a float": tensor(HELD, number(0), tupled(real(4.0)), numbers(1)),
    "a size that is true": tensor(HELD, number(0), tupled(b"\x88"), numbers(1)),
    "a size that is a list": tensor(HELD, number(0), listed(number(4)), numbers(1)),
    "no offset": tensor(HELD, NONE, numbers(4), numbers(1)),
    "an offset that is a tensor": tensor(
        HELD, tensor(HELD, number(0), numbers(1), numbers(1)), numbers(4), numbers(1)
    ),
    "a storage that is a text": tensor(text("0"), number(0), numbers(4), numbers(1)),
    "a storage that is a tensor": tensor(
        tensor(HELD, number(0), numbers(4), numbers(1)), number(0), numbers(4), numbers(1)
    ),
    "a storage that is missing": tensor(storage(key=text("9")), number(0), numbers(4), numbers(1)),
    "a storage by a path": tensor(
        storage(key=text("../../../../etc/passwd")), number(0), numbers(4), numbers(1)
    ),
    "a storage by a number": tensor(storage(key=real(0.0)), number(0), numbers(4), numbers(1)),
    "a storage of 2**61 elements": tensor(
        storage(number(2**61)), number(0), numbers(4), numbers(1)
    ),
    "a storage of -1 elements": tensor(storage(number(-1)), number(0), numbers(4), numbers(1)),
    "a storage larger than its bytes": tensor(
        storage(number(5)), number(0), numbers(5), numbers(1)
    ),
    "a storage of doubles in the bytes of floats": tensor(
        storage(kind="DoubleStorage"), number(0), numbers(4), numbers(1)
    ),
    "a storage of no kind": tensor(
        persistent(text("storage"), NONE, text("0"), text("cpu"), number(4)),
        *(number(0), numbers(4), numbers(1)),
    ),
    "a storage of a class that runs": tensor(
        persistent(text("storage"), named("os", "system"), text("0"), text("cpu"), number(4)),
        *(number(0), numbers(4), numbers(1)),
    ),
    "a storage of three parts": tensor(
        persistent(text("storage"), text("0"), number(4)), number(0), numbers(4), numbers(1)
    ),
    "a view of a storage": tensor(
        persistent(
            *(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), number(4)),
            tupled(text("1"), number(2**50), number(2**50)),
        ),
        *(number(0), numbers(4), numbers(1)),
    ),
    "a dtype that is a text": _untyped(text("float32")),
    "a dtype that is a function": _untyped(named("os", "system")),
    "a dtype of more bytes": _untyped(named("torch", "complex128")),
    "a subclass within itself": _subclass(
        named("torch._tensor", "_rebuild_from_type_v2"), NONE, NONE, tupled(), NONE
    ),
    "a subclass of 1,000 arguments": _subclass(
        named("torch._utils", "_rebuild_tensor_v2"), *[NONE] * 1000
    ),
    "a rebuild without arguments": called(named("torch._utils", "_rebuild_tensor_v2")),
    "a rebuild with a list": named("torch._utils", "_rebuild_tensor_v2") + listed(HELD) + b"R",
    "a parameter without data": called(named("torch._utils", "_rebuild_parameter")),
    "a sparse tensor": called(
        named("torch._utils", "_rebuild_sparse_tensor"),
        named("torch", "sparse_coo"),
        tupled(numbers(-1), numbers(2**60), numbers(4)),
    ),
    "a quantized tensor": called(
        named("torch._utils", "_rebuild_qtensor"),
        *(HELD, number(0), numbers(2**50), numbers(1), tupled(), b"\x89", NO_HOOKS),
    ),
    "a meta tensor of 2**60": called(
        named("torch._utils", "_rebuild_meta_tensor_no_storage"),
        *(DTYPE, numbers(2**60), numbers(1), b"\x89"),
    ),
    "a tensor of numpy's bytes": called(
        named("torch._utils", "_rebuild_device_tensor_from_numpy"), text("x"), DTYPE, text("cpu")
    ),
    "parameters nested 5,000 deep": _nested(5000),
}

WORDS_OF_ALL = "embedding.word_embeddings.weight"


def _tensor_file(value: bytes, form: int, sandbox: Sandbox, bases: Bases) -> Words:
    data = pickled(mapped({"model": mapped({WORDS_OF_ALL: value})}))
    path = sandbox.input / "model.pt"
    if form == 0:
        torch_zip(path, data, {"0": bytes(16)})
    else:
        path.write_bytes(torch_stream(data, [text("0")]) + struct.pack("<q", 4) + bytes(16))
    return inspecting(path) if len(value) % 2 else converting(path, sandbox)


ATTACKS = [
    Attack(f"{what}, {form}", partial(_tensor_file, value, at))
    for what, value in TENSORS.items()
    for at, form in enumerate(("zip", "stream"))
]


# ---- archives of torch.save --------------------------------------------------------------------


def _members(bases: Bases) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(model_file(bases.gpt)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def _rewritten(
    edit: Callable[[bytearray], None], sandbox: Sandbox, bases: Bases, *, convert: bool = True
) -> Words:
    root = copied(bases.gpt, sandbox.input / "c")
    data = bytearray(model_file(root).read_bytes())
    edit(data)
    model_file(root).write_bytes(data)
    return converting(root, sandbox) if convert else inspecting(root)


def _central(data: bytearray, number_of: int = 0) -> int:
    """Return where an entry of the table of contents begins."""
    at = -1
    for _ in range(number_of + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    return at


def _set(at: int, form: str, value: int, every: bool = False) -> Callable[[bytearray], None]:
    """Return an edit of a field of the table of contents, of the first entry or of each."""

    def edit(data: bytearray) -> None:
        place = _central(data)
        while place >= 0:
            struct.pack_into(form, data, place + at, value)
            place = data.find(b"PK\x01\x02", place + 1) if every else -1

    return edit


def _set_end(at: int, form: str, value: int) -> Callable[[bytearray], None]:
    def edit(data: bytearray) -> None:
        struct.pack_into(form, data, data.rindex(b"PK\x05\x06") + at, value)

    return edit


def _again(
    change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]],
    sandbox: Sandbox,
    bases: Bases,
    *,
    method: int = zipfile.ZIP_STORED,
) -> Words:
    root = copied(bases.gpt, sandbox.input / "c")
    with zipfile.ZipFile(model_file(root), "w", method) as archive:
        for name, content in change(_members(bases)):
            archive.writestr(name, content)
    return converting(root, sandbox)


Members = list[tuple[str, bytes]]


def _renamed(old: str, new: str) -> Callable[[Members], Members]:
    return lambda members: [(name.replace(old, new), data) for name, data in members]


def _set_all_but_first(at: int, form: str, value: int) -> Callable[[bytearray], None]:
    def edit(data: bytearray) -> None:
        kept = data[_central(data) + at : _central(data) + at + struct.calcsize(form)]
        _set(at, form, value, every=True)(data)
        data[_central(data) + at : _central(data) + at + len(kept)] = kept

    return edit


ZIP_EDITS: dict[str, Callable[[bytearray], None]] = {
    "every record but the pickle is encrypted": _set_all_but_first(8, "<H", 1),
    "every record but the pickle is deflated": _set_all_but_first(10, "<H", 8),
    "the pickle is encrypted": _set(8, "<H", 1),
    "every record is encrypted": _set(8, "<H", 1, every=True),
    "a record of unknown compression": _set(10, "<H", 99),
    "every record is deflated by its name": _set(10, "<H", 8, every=True),
    "the pickle has another CRC": _set(16, "<I", 0xDEADBEEF),
    "a record of 4 GB": _set(24, "<I", 0xFFFFFFF0),
    "every record of 4 GB": _set(24, "<I", 0xFFFFFFF0, every=True),
    "records of 0 bytes": _set(24, "<I", 0, every=True),
    "a record at 4 GB": _set(42, "<I", 0xFFFFFFF0),
    "all records at one place": _set(42, "<I", 0, every=True),
    "a name of 65,535 bytes": _set(28, "<H", 0xFFFF),
    "an extra field of 65,535 bytes": _set(30, "<H", 0xFFFF),
    "a comment of 65,535 bytes": _set(32, "<H", 0xFFFF),
    "another disk": _set(34, "<H", 7),
    "a table of 65,535 entries": _set_end(10, "<H", 0xFFFF),
    "a table of 4 GB": _set_end(12, "<I", 0xFFFFFFFF),
    "a table at 4 GB": _set_end(16, "<I", 0xFFFFFFFF),
    "a table before the file": _set_end(16, "<I", 1),
    "no entries": _set_end(10, "<H", 0),
}
# zipfile does not look at the disk's number nor at the number of entries: it reads the table.
READ_ALL_THE_SAME = ("another disk", "a table of 65,535 entries", "no entries")
ZIP_AGAIN: dict[str, Callable[[Members], Members]] = {
    "two pickles": lambda ms: [*ms, ms[0]],
    "a second pickle of another name": lambda ms: [
        *ms,
        ("b/data.pkl", pickled(called(named("os", "system"), text("true")))),
    ],
    "no pickle": _renamed("data.pkl", "data.txt"),
    "absolute names": lambda ms: [(f"/{name}", data) for name, data in ms],
    "names that go up": lambda ms: [(f"../../{name}", data) for name, data in ms],
    "no storages": lambda ms: [(n, d) for n, d in ms if "/data/" not in n],
    "storages cut short": lambda ms: [(n, d[:8] if "/data/" in n else d) for n, d in ms],
    "a big-endian machine": lambda ms: [
        (n, b"big" if n.endswith("byteorder") else d) for n, d in ms
    ],
    "a byteorder of 10 MB": lambda ms: [
        (n, b"l" * 10_000_000 if n.endswith("byteorder") else d) for n, d in ms
    ],
    "a compiled program": lambda ms: [*ms, (ms[0][0].replace("data.pkl", "constants.pkl"), b"")],
    "names with escapes": lambda ms: [(n.replace("data.pkl", "\x1b[2Jdata"), d) for n, d in ms],
    "100,000 empty records": lambda ms: [*ms, *((f"x/{at}", b"") for at in range(100_000))],
}
MAY_BE_READ = (
    "two pickles", "a second pickle of another name", "absolute names", "names that go up",
    "100,000 empty records",
)  # fmt: skip

ATTACKS += each(
    "zip", ZIP_EDITS, lambda edit: partial(_rewritten, edit), may_be_read=READ_ALL_THE_SAME
)
ATTACKS += each("zip", ZIP_AGAIN, lambda change: partial(_again, change), may_be_read=MAY_BE_READ)
ATTACKS.append(Attack("zip: deflated", partial(_again, lambda ms: ms, method=zipfile.ZIP_DEFLATED)))


# ---- published archives ------------------------------------------------------------------------


def _published(entries: list[tuple[str, bytes, int]], sandbox: Sandbox, bases: Bases) -> Words:
    path = sandbox.input / "published.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        rank = model_file(bases.gpt).read_bytes()
        archive.writestr("release/mp_rank_00/model_optim_rng.pt", rank)
        archive.writestr("latest_checkpointed_iteration.txt", b"release")
        for name, content, mode in entries:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return converting(path, sandbox)


LINK = 0o120777
PUBLISHED: dict[str, list[tuple[str, bytes, int]]] = {
    "a name that goes up": [("../canary", b"x", 0o644)],
    "a name that goes up within": [("release/../../../canary", b"x", 0o644)],
    "an absolute name": [("/tmp/canary", b"x", 0o644)],
    "a name with backslashes": [("..\\..\\canary", b"x", 0o644)],
    "a name of a drive": [("C:\\canary", b"x", 0o644)],
    "65 nested folders": [("a/" * 65 + "x", b"x", 0o644)],
    "2,000 nested folders": [("a/" * 2000 + "x", b"x", 0o644)],
    "a name of 300 letters": [("a" * 300, b"x", 0o644)],
    "a file below a file": [("latest_checkpointed_iteration.txt/x", b"x", 0o644)],
    "a file in the place of a folder": [("release", b"x", 0o644)],
    "an empty name": [("./.", b"x", 0o644)],
    "a thousand times its size": [("zeros.bin", bytes(1 << 28), 0o644)],
}
PUBLISHED_MAY_BE_READ: dict[str, list[tuple[str, bytes, int]]] = {
    "a name of escapes": [("\x1b[2J/x", b"x", 0o644)],
    "a link out of the folder": [("release/link", b"/etc/passwd", LINK)],
    "a link to a folder, and a file below": [("l", b"/tmp", LINK), ("m/x", b"x", 0o644)],
    "a device by its mode": [("null", b"", 0o020666)],
    "a name twice": [("notes.txt", b"a", 0o644), ("notes.txt", b"b", 0o644)],
    "a set-uid file": [("tool", b"#!/bin/sh", 0o104755)],
}


def _bomb(sandbox: Sandbox, bases: Bases) -> Words:
    """Twelve records whose entries in the table all lead to the same bytes."""
    path = sandbox.input / "published.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        rank = model_file(bases.gpt).read_bytes()
        archive.writestr("release/mp_rank_00/model_optim_rng.pt", rank)
        archive.writestr("a.bin", bytes(1 << 27))
        (info,) = (part for part in archive.filelist if part.filename == "a.bin")
        for number_of in range(40):
            other = zipfile.ZipInfo(f"b{number_of}.bin")
            for name in ("compress_type", "CRC", "compress_size", "file_size", "header_offset"):
                setattr(other, name, getattr(info, name))
            archive.filelist.append(other)
    return converting(path, sandbox)


ATTACKS += [
    Attack(f"published: {what}", partial(_published, entries))
    for what, entries in PUBLISHED.items()
]
ATTACKS += [
    Attack(f"published: {what}", partial(_published, entries), refused=None)
    for what, entries in PUBLISHED_MAY_BE_READ.items()
]
ATTACKS.append(Attack("published: records that overlap", _bomb))


# ---- tar archives ------------------------------------------------------------------------------

CONFIG = b"num_layers: 1\nhidden_size: 64\nnum_attention_heads: 4\n"


def _nemo(
    change: Callable[[tarfile.TarFile], None],
    sandbox: Sandbox,
    bases: Bases,
    *,
    mode: str = "w",
) -> Words:
    path = sandbox.input / "model.nemo"
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        _add(archive, "model_config.yaml", CONFIG)
        change(archive)
        buffer = io.BytesIO()
        torch.save({"state_dict": {}}, buffer)
        _add(archive, "model_weights.ckpt", buffer.getvalue())
    return converting(path, sandbox)


def _add(archive: tarfile.TarFile, name: str, content: bytes = b"x", **changes: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))


TARS: dict[str, Callable[[tarfile.TarFile], None]] = {
    "a name that goes up": lambda a: _add(a, "../../canary"),
    "an absolute name": lambda a: _add(a, "/tmp/canary"),
    "a symbolic link": lambda a: _add(a, "l", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": lambda a: _add(a, "l", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a link in the place of the settings": lambda a: _add(
        a, "model_config.yaml", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"
    ),
    "a device": lambda a: _add(a, "d", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "a pipe": lambda a: _add(a, "p", b"", type=tarfile.FIFOTYPE),
    "a sparse file of 64 GB": lambda a: _add(
        a,
        "s",
        b"",
        type=tarfile.REGTYPE,
        pax_headers={
            "GNU.sparse.major": "0",
            "GNU.sparse.minor": "1",
            "GNU.sparse.map": "0,0",
            "GNU.sparse.size": str(1 << 36),
        },
    ),
    "a file below a file": lambda a: _add(a, "model_config.yaml/x"),
    "2,000 nested folders": lambda a: _add(a, "a/" * 2000 + "x"),
    "settings twice": lambda a: _add(a, "model_config.yaml", b"num_layers: -1\n"),
    "a name of escapes": lambda a: _add(a, "\x1b[2J", b"", type=tarfile.SYMTYPE, linkname="x"),
    "a name with a NUL": lambda a: _add(
        a, "x", b"", pax_headers={"path": "a\0b"}, type=tarfile.SYMTYPE
    ),
    "a name of surrogates": lambda a: _add(a, "\udcff\udcfe", b"", type=tarfile.FIFOTYPE),
    "a pax header of a wrong size": lambda a: _add(a, "x", b"", pax_headers={"size": "x"}),
    "a pax size of 2**60": lambda a: _add(a, "x", b"", pax_headers={"size": str(2**60)}),
    "a negative size": lambda a: _add(a, "x", b"", pax_headers={"size": "-1000"}),
}


def _tar_bytes(data: Callable[[bytes], bytes], sandbox: Sandbox, bases: Bases) -> Words:
    words = _nemo(lambda a: None, sandbox, bases)
    path = sandbox.input / "model.nemo"
    path.write_bytes(data(path.read_bytes()))
    return words


ATTACKS += [
    Attack(f"tar{suffix}: {what}", partial(_nemo, change, mode=mode))
    for what, change in TARS.items()
    for suffix, mode in (("", "w"), (".gz", "w:gz"))
]
ATTACKS += [
    Attack(f"tar: {what}", partial(_tar_bytes, edit))
    for what, edit in {
        "cut in the middle": lambda data: data[: len(data) // 2],
        "a header of rubbish": lambda data: data[:512] + b"\xff" * 512 + data[1024:],
        "gzip of a bomb": lambda data: _gzip(data + bytes(1 << 29)),
        "gzip cut short": lambda data: _gzip(data)[:-20],
        "gzip of a wrong checksum": lambda data: _gzip(data)[:-8] + b"\0" * 8,
    }.items()
]


def _gzip(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data, 9)


@attacks(ATTACKS, every=12)
def test_no_lie_is_believed(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)


def test_places_of_the_tests_are_right(bases: Bases):
    """The edits meet the fields that they mean: the base is read as it is."""
    data = bytearray(model_file(bases.gpt).read_bytes())
    start = _central(data)
    (length,) = struct.unpack_from("<H", data, start + 28)
    assert data[start + 46 : start + 46 + length].endswith(b"data.pkl")
    assert os.path.getsize(model_file(bases.gpt)) == len(data) and isinstance(bases.gpt, Path)
