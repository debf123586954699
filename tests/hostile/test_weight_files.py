"""Weights in other files: .metadata and .distcp, zarr, safetensors and their indexes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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
)
from support.reliability.pickle_bytes import (
    BUILD,
    NONE,
    called,
    listed,
    mapped,
    named,
    number,
    numbers,
    pickled,
    text,
    torch_zip,
    tupled,
)
from support.reliability.warm_commands import Sandbox, WarmCommands

pytest_plugins = ["support.reliability.warm_fixtures"]

# ---- .metadata ---------------------------------------------------------------------------------

_DCP = "torch.distributed.checkpoint.metadata"
KEY = "embedding.word_embeddings.weight"


def _object(module: str, name: str, state: bytes) -> bytes:
    return named(module, name) + b")\x81" + state + BUILD


def _chunk(offsets: bytes, sizes: bytes) -> bytes:
    return _object(_DCP, "ChunkStorageMetadata", mapped({"offsets": offsets, "sizes": sizes}))


def _tensor(
    chunks: bytes, size: bytes = numbers(8, 8), dtype: bytes = named("torch", "float32")
) -> bytes:
    properties = _object(_DCP, "TensorProperties", tupled(dtype, b"\x89", NONE, NONE, b"\x89"))
    state = mapped({"properties": properties, "size": size, "chunks": chunks})
    return _object(_DCP, "TensorStorageMetadata", state)


def _index(key: bytes = text(KEY), offset: bytes = numbers(0, 0)) -> bytes:
    return _object(_DCP, "MetadataIndex", mapped({"fqn": key, "offset": offset, "index": NONE}))


def _info(
    path: bytes = text("__0_0.distcp"),
    offset: bytes = number(0),
    length: bytes = number(100),
    transform: bytes = NONE,
) -> bytes:
    state = {"relative_path": path, "offset": offset, "length": length}
    return _object(
        "torch.distributed.checkpoint.filesystem",
        "_StorageInfo",
        mapped(state | {"transform_descriptors": transform}),
    )


def _pairs(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


WHOLE = listed(_chunk(numbers(0, 0), numbers(8, 8)))


def _metadata(tensors: bytes | None = None, storage: bytes | None = None, **more: bytes) -> bytes:
    state = {
        "state_dict_metadata": mapped({KEY: _tensor(WHOLE)}) if tensors is None else tensors,
        "storage_data": _pairs((_index(), _info())) if storage is None else storage,
        **more,
    }
    return pickled(_object(_DCP, "Metadata", mapped(state)))


def _of_chunks(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> bytes:
    """Return a .metadata of one tensor in these chunks."""
    chunks = listed(*(_chunk(numbers(*at), numbers(*size)) for at, size in boxes))
    storage = _pairs(*((_index(offset=numbers(*at)), _info()) for at, _ in boxes))
    return _metadata(mapped({KEY: _tensor(chunks)}), storage)


def _shared(depth: int, breadth: int = 10) -> bytes:
    """Return a list of lists in which every level refers to the one below many times."""
    value = listed(text("x"))
    for level in range(depth):
        value += b"q" + bytes([level]) + b"0]("
        value += b"".join(b"h" + bytes([level]) for _ in range(breadth)) + b"e"
    return value


METADATA: dict[str, bytes] = {
    "a path that goes up": _metadata(storage=_pairs((_index(), _info(text("../../x.distcp"))))),
    "an absolute path": _metadata(storage=_pairs((_index(), _info(text("/etc/passwd"))))),
    "a path with escapes": _metadata(storage=_pairs((_index(), _info(text("\x1b[2Jx"))))),
    "a path that is a number": _metadata(storage=_pairs((_index(), _info(number(7))))),
    "a path of 100,000 letters": _metadata(storage=_pairs((_index(), _info(text("a" * 100_000))))),
    "a path with a NUL": _metadata(storage=_pairs((_index(), _info(text("a\0b"))))),
    "a path of surrogates": _metadata(storage=_pairs((_index(), _info(text("\ud800"))))),
    "a path that is shared lists": _metadata(storage=_pairs((_index(), _info(_shared(9))))),
    "an offset of 2**63": _metadata(storage=_pairs((_index(), _info(offset=number(2**63))))),
    "a negative offset": _metadata(storage=_pairs((_index(), _info(offset=number(-1))))),
    "an offset of 5,000 digits": _metadata(
        storage=_pairs((_index(), _info(offset=number(10**5000))))
    ),
    "a length of 2**62": _metadata(storage=_pairs((_index(), _info(length=number(2**62))))),
    "a length of 0": _metadata(storage=_pairs((_index(), _info(length=number(0))))),
    "a length that is a text": _metadata(storage=_pairs((_index(), _info(length=text("9"))))),
    "a length that is shared lists": _metadata(
        storage=_pairs((_index(), _info(length=_shared(9))))
    ),
    "transforms": _metadata(storage=_pairs((_index(), _info(transform=listed(text("zstd")))))),
    "transforms that are shared lists": _metadata(
        storage=_pairs((_index(), _info(transform=_shared(9))))
    ),
    "a key that is shared lists": _metadata(storage=_pairs((_index(key=_shared(9)), _info()))),
    "a key with escapes": _metadata(mapped({"\x1b[2J\u202e": _tensor(WHOLE)})),
    "a key of a megabyte": _metadata(mapped({"k" * 1_000_000: _tensor(WHOLE)})),
    "a shape that is shared lists": _metadata(mapped({KEY: _tensor(WHOLE, size=_shared(9))})),
    "a dtype that is shared lists": _metadata(mapped({KEY: _tensor(WHOLE, dtype=_shared(9))})),
    "a dtype that is a function": _metadata(
        mapped({KEY: _tensor(WHOLE, dtype=named("os", "system"))})
    ),
    "a shape of 2**40": _metadata(mapped({KEY: _tensor(WHOLE, size=numbers(2**40, 2**40))})),
    "a shape of 5,000 digits": _metadata(
        mapped({KEY: _tensor(WHOLE, size=tupled(number(10**5000)))})
    ),
    "a negative shape": _metadata(mapped({KEY: _tensor(WHOLE, size=numbers(-8, -8))})),
    "a shape of 100,000 dims": _metadata(
        mapped({KEY: _tensor(WHOLE, size=numbers(*[1] * 100_000))})
    ),
    "2**34 layers without chunks": _metadata(
        mapped({"decoder.layers.mlp.linear_fc1.weight": _tensor(listed(), numbers(2**34, 8, 8))})
    ),
    "layers of no values": _metadata(
        mapped({"decoder.layers.mlp.linear_fc1.weight": _tensor(listed(), numbers(2**34, 0, 8))})
    ),
    "no chunks": _metadata(mapped({KEY: _tensor(listed())})),
    "chunks that are a text": _metadata(mapped({KEY: _tensor(text("abc"))})),
    "chunks that overlap and leave a gap": _of_chunks(((0, 0), (4, 8)), ((2, 0), (4, 8))),
    "chunks that overlap in a corner": _of_chunks(((0, 0), (5, 8)), ((4, 0), (3, 8))),
    "chunks at one place": _of_chunks(((0, 0), (8, 8)), ((0, 0), (8, 8))),
    "a chunk beyond the end": _of_chunks(((0, 0), (8, 8)), ((8, 0), (8, 8))),
    "a chunk of other dims": _of_chunks(((0,), (64,))),
    "a chunk without a size": _of_chunks(((0, 0), (8, 8)), ((0, 8), (8, 0))),
    "a chunk at 2**62": _of_chunks(((2**62, 0), (8, 8))),
    "an entry of no kind": _metadata(mapped({KEY: number(1)})),
    "an entry that is None": _metadata(mapped({KEY: NONE})),
    "an entry of a class that runs": _metadata(
        mapped({KEY: called(named("os", "system"), text("true"))})
    ),
    "no table of tensors": _metadata(NONE),
    "no table of places": _metadata(storage=NONE),
    "a table that is a list": _metadata(listed(text("x"))),
    "a table of numbers": _metadata(storage=_pairs((number(1), number(2)))),
    "places that are no objects": _metadata(storage=_pairs((_index(), text("x")))),
    "an index without a name": _metadata(
        storage=_pairs((_object(_DCP, "MetadataIndex", mapped({})), _info()))
    ),
    "no object at all": pickled(number(1)),
    "a dict": pickled(mapped({"state_dict_metadata": mapped({})})),
    "a state that is a text": pickled(_object(_DCP, "Metadata", text("x"))),
    "a state that is two": pickled(_object(_DCP, "Metadata", tupled(mapped({}), mapped({})))),
}


def _many_sharing(sandbox: Sandbox, bases: Bases) -> Words:
    """Two thousand keys that share one list of twenty thousand chunks."""
    chunk = _chunk(numbers(0, 0), numbers(8, 8))
    chunks = listed(chunk, b"q\x01", *(b"h\x01" for _ in range(20_000)))
    table = b"}(" + text("k0") + _tensor(chunks + b"q\x02")
    table += b"".join(text(f"k{at}") + _tensor(b"h\x02") for at in range(1, 2000)) + b"u"
    keys = ((_index(key=text(f"k{at}")), _info()) for at in range(2000))
    data = _metadata(table, _pairs(*keys))
    return _with_metadata(data, sandbox, bases)


def _with_metadata(data: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.dist, sandbox.input / "c")
    (root / ".metadata").write_bytes(data)
    return converting(root, sandbox) if len(data) % 2 else inspecting(root)


ATTACKS = [
    Attack(f".metadata: {what}", partial(_with_metadata, data)) for what, data in METADATA.items()
]
ATTACKS.append(Attack(".metadata: 2,000 keys share 20,000 chunks", _many_sharing))


# ---- what lies beside .metadata ----------------------------------------------------------------


def _beside(name: str, content: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.dist, sandbox.input / "c")
    for path in sorted(root.glob(name)):
        path.write_bytes(content)
    return converting(root, sandbox)


def _common(value: bytes) -> bytes:
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(value))
        archive.writestr("archive/byteorder", b"little")
    return buffer.getvalue()


def _args(**fields: bytes) -> bytes:
    space = named("argparse", "Namespace") + b")\x81" + mapped(fields) + BUILD
    return _common(mapped({"args": space, "checkpoint_version": number(3)}))


SETTINGS = {
    "num_layers": number(1),
    "hidden_size": number(64),
    "num_attention_heads": number(4),
    "padded_vocab_size": number(256),
    "max_position_embeddings": number(32),
}
BESIDE: dict[str, tuple[str, bytes]] = {
    "common.pt is a list": ("common.pt", _common(listed())),
    "common.pt is a number": ("common.pt", _common(number(1))),
    "common.pt is empty": ("common.pt", b""),
    "common.pt holds args that are a text": ("common.pt", _common(mapped({"args": text("x")}))),
    "common.pt holds shared lists": ("common.pt", _common(mapped({"args": _shared(9)}))),
    "common.pt holds a version of shared lists": (
        "common.pt",
        _common(mapped({"checkpoint_version": _shared(9)})),
    ),
    "common.pt holds an iteration that is a list": (
        "common.pt",
        _common(mapped({"iteration": listed(number(1))})),
    ),
    "metadata.json is deep": ("metadata.json", b"[" * 100_000),
    "metadata.json is a list": ("metadata.json", b"[]"),
    "metadata.json names escapes": ("metadata.json", b'{"sharded_backend": "\\u001b[2J"}'),
    "metadata.json names a list": ("metadata.json", b'{"sharded_backend": [1]}'),
    ".distcp files are empty": ("*.distcp", b""),
    ".distcp files are text": ("*.distcp", b"x" * 1_000_000),
    ".distcp files are pickles": (
        "*.distcp",
        pickled(called(named("os", "system"), text("true"))) * 50_000,
    ),
}
BESIDE |= {
    f"args: {name} is {what}": ("common.pt", _args(**SETTINGS | {name: value}))
    for name in ("num_layers", "hidden_size", "num_attention_heads", "kv_channels")
    for what, value in {
        "a text": text("\x1b[2J"),
        "10**5000": number(10**5000),
        "-1": number(-1),
        "shared lists": _shared(9),
        "2**40": number(2**40),
    }.items()
}
# What stands in metadata.json is read where .metadata is missing.
ATTACKS += [
    Attack(what, partial(_beside, name, content), refused=None if name == "metadata.json" else True)
    for what, (name, content) in BESIDE.items()
]

# ---- zarr --------------------------------------------------------------------------------------

ARRAY = {
    "zarr_format": 2,
    "shape": [256, 64],
    "chunks": [256, 64],
    "dtype": "<f4",
    "compressor": None,
    "filters": None,
    "order": "C",
    "fill_value": None,
}


def _zarr(changes: dict[str, Any] | bytes, sandbox: Sandbox, bases: Bases) -> Words:
    root = sandbox.input / "iter_0000001"
    folder = root / KEY
    folder.mkdir(parents=True)
    (root / "common.pt").write_bytes(_args(**SETTINGS))
    (root / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    about = changes if isinstance(changes, bytes) else json.dumps(ARRAY | changes).encode()
    (folder / ".zarray").write_bytes(about)
    (folder / "0.0").write_bytes(bytes(256 * 64 * 4))
    return converting(root, sandbox)


ZARR: dict[str, dict[str, Any] | bytes] = {
    "a shape of 2**60": {"shape": [2**60, 2**60]},
    "a shape of 400 digits": {"shape": [10**400]},
    "a negative shape": {"shape": [-1, 64]},
    "a shape that is a text": {"shape": "256"},
    "chunks of 0": {"chunks": [0, 64]},
    "2**40 chunks": {"shape": [2**39, 64], "chunks": [1, 1]},
    "more dims than shape": {"chunks": [1, 1, 1]},
    "a dtype of objects": {"dtype": "|O"},
    "a dtype that is a list": {"dtype": [["a", "<f4"]]},
    "a compressor": {"compressor": {"id": "pickle"}},
    "filters": {"filters": [{"id": "pickle"}]},
    "escapes in an order": {"order": "\x1b[2J"},
    "an order of a megabyte": {"order": "C" * 1_000_000},
    "a separator": {"dimension_separator": "/../../"},
    "a list": b"[]",
    "deep lists": b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
}
ATTACKS += [Attack(f"zarr: {what}", partial(_zarr, changes)) for what, changes in ZARR.items()]

# ---- safetensors -------------------------------------------------------------------------------


def _weights(root: Path) -> Path:
    return next(root.glob("*.safetensors"))


def _header(change: Callable[[dict[str, Any]], Any], sandbox: Sandbox, bases: Bases) -> Words:
    """Write the right file with another header; `change` may return bytes in its place."""
    root = copied(bases.hub, sandbox.input / "c")
    data = _weights(root).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    about = json.loads(data[8 : 8 + length])
    changed = change(about)
    text_of = changed if isinstance(changed, bytes) else json.dumps(about).encode()
    _weights(root).write_bytes(struct.pack("<Q", len(text_of)) + text_of + data[8 + length :])
    return converting(root, sandbox)


def _first(about: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(v for k, v in about.items() if k != "__metadata__")
    return entry


def _last(about: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = list(about.values())[-1]
    return entry


def _renamed(name: str) -> Callable[[dict[str, Any]], Any]:
    """Give the first tensor another name."""

    def change(about: dict[str, Any]) -> None:
        about[name] = about.pop(next(k for k in about if k != "__metadata__"))

    return change


def _many_texts() -> bytes:
    pairs = b",".join(b'"%d":"x"' % at for at in range(4_000_000))
    return b'{"__metadata__": {' + pairs + b"}}"


def _setting(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda about: _first(about).update({name: value})


def _twice(about: dict[str, Any]) -> bytes:
    """Repeat one tensor's entry with the bytes of another."""
    names = [name for name in about if name != "__metadata__"]
    same = [n for n in names[1:] if about[n]["shape"] == about[names[0]]["shape"]]
    second = about[same[0] if same else names[1]]
    body = json.dumps(about)[1:-1]
    return f"{{{body}, {json.dumps(names[0])}: {json.dumps(second)}}}".encode()


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a key twice": _twice,
    "bytes from -1": _setting("data_offsets", [-1, 10]),
    "bytes that go back": _setting("data_offsets", [10, 0]),
    "bytes to 2**63": _setting("data_offsets", [0, 2**63]),
    "bytes to 2**70": _setting("data_offsets", [0, 2**70]),
    "bytes that overlap": lambda a: _last(a).update(data_offsets=_first(a)["data_offsets"]),
    "bytes that are texts": _setting("data_offsets", ["0", "10"]),
    "a shape of 2**62": _setting("shape", [2**62, 4]),
    "a shape of 2**64": _setting("shape", [2**64]),
    "a negative shape": _setting("shape", [-1]),
    "a shape of other numbers": _setting("shape", [3, 3]),
    "a shape that is a text": _setting("shape", "256"),
    "a dtype of no kind": _setting("dtype", "\x1b[2J"),
    "a dtype of four bits": _setting("dtype", "F4"),
    "a dtype that is a list": _setting("dtype", ["F32"]),
    "no dtype": lambda a: _first(a).pop("dtype") and None,
    "a name with escapes": _renamed("\x1b[2J\u202e"),
    "a name of a megabyte": _renamed("n" * 1_000_000),
    "a name with a surrogate": lambda a: json.dumps(a).encode().replace(b"wte", b"\\ud800"),
    "metadata that is a list": lambda a: a.update({"__metadata__": [1]}),
    "metadata with numbers": lambda a: a.update({"__metadata__": {"format": 1}}),
    "no object": lambda a: b"[]",
    "nothing": lambda a: b"",
    "no JSON": lambda a: b"\x80\x02.",
    "deep lists": lambda a: b"[" * 1_000_000,
    "90 MB of lists": lambda a: b"[" + b"[]," * 30_000_000 + b"[]]",
    "60 MB of texts": lambda a: _many_texts(),
}


def _length(value: int, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.hub, sandbox.input / "c")
    data = _weights(root).read_bytes()
    _weights(root).write_bytes(struct.pack("<Q", value) + data[8:])
    return inspecting(root)


# Names that the library gives in another order, and metadata: nothing is wrong with these.
HEADERS_MAY_BE_READ = ("metadata with numbers",)

ATTACKS += each(
    "safetensors", HEADERS, lambda change: partial(_header, change), may_be_read=HEADERS_MAY_BE_READ
)
ATTACKS += [
    Attack(f"safetensors: a header of {value} bytes", partial(_length, value))
    for value in (0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1)
]

# ---- indexes -----------------------------------------------------------------------------------


def _index_file(content: Any, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.hub, sandbox.input / "c")
    weights = _weights(root)
    weights.rename(root / "model-00001-of-00001.safetensors")
    text_of = content if isinstance(content, bytes) else json.dumps(content).encode()
    (root / "model.safetensors.index.json").write_bytes(text_of)
    (sandbox.input / "outside.safetensors").write_bytes(
        (root / "model-00001-of-00001.safetensors").read_bytes()
    )
    return converting(root, sandbox)


def _map(**names: Any) -> dict[str, Any]:
    return {"weight_map": {"transformer.wte.weight": "model-00001-of-00001.safetensors"} | names}


SHARD = "model-00001-of-00001.safetensors"
INDEXES: dict[str, Any] = {
    "a shard outside": _map(x="../outside.safetensors"),
    "an absolute shard": _map(x="/etc/passwd"),
    "a shard that is a folder": _map(x="."),
    "a shard of no name": _map(x=""),
    "a shard with a NUL": _map(x="a\0b"),
    "a shard with escapes": _map(x="\x1b[2J"),
    "a shard with a surrogate": b'{"weight_map": {"x": "\\ud800"}}',
    "a shard of 5,000 letters": _map(x="a" * 5000),
    "a shard that is a number": _map(x=7),
    "a shard that is a list": _map(x=["model-00001-of-00001.safetensors"]),
    "a pipe by its name": _map(x="/dev/stdin"),
    "a table that is a list": {"weight_map": []},
    "a table that is a text": {"weight_map": "x"},
    "no table": {},
    "a list": [],
    "deep lists": b"[" * 100_000,
    "a name of escapes": _map(**{"\x1b[2J": "model-00001-of-00001.safetensors"}),
    "10,000 shards that are not there": _map(**{f"k{n}": f"s{n}" for n in range(10_000)}),
    "300,000 names": _map(**{f"k{n}": SHARD for n in range(300_000)}),
    "a pickle in the place of JSON": pickled(called(named("os", "system"), text("true"))),
}
ATTACKS += [Attack(f"index: {what}", partial(_index_file, it)) for what, it in INDEXES.items()]


def _bin(what: int, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.hub, sandbox.input / "c")
    _weights(root).unlink()
    values = (
        pickled(listed()),
        pickled(mapped({"transformer.wte.weight": number(3)})),
        pickled(mapped({"transformer.wte.weight": text("\x1b[2J")})),
        pickled(mapped({"\x1b[2J": number(3)})),
        pickled(mapped({"transformer.wte.weight": _shared(9)})),
    )
    torch_zip(root / "pytorch_model.bin", values[what])
    return converting(root, sandbox)


ATTACKS += [Attack(f"pytorch_model.bin of rubbish {n}", partial(_bin, n)) for n in range(5)]


@attacks(ATTACKS, every=12)
def test_no_table_is_believed(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)
