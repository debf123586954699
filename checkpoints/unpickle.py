"""Reads what `torch.save` wrote, without torch.load and without running anything that the file asks
for.

A `.pt` file is a pickle plus raw storages. Here the pickle is read by an unpickler that knows a
short
list of names: containers, torch's tensor rebuilders (replaced by ours, which only note offset,
dtype and
shape) and `argparse.Namespace` (replaced by an inert one). Every other class becomes an inert stub
that
takes any argument and does nothing; the names met are kept, so that `inspect` can show them.
Tensors come back as `StoredTensor`s: no byte of a storage is read here.

Both forms of torch.save are read: the zip archive (torch >= 1.6) and the older stream of pickles,
whose
storages stand at the end of the file, each behind its element count.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import MappedFile, StoredTensor

STREAM_MAGIC = 0x1950A86A20F9469CFC6C
"""First object in the stream form of torch.save (torch/serialization.py, MAGIC_NUMBER)."""

HOSTILE_MODULES = frozenset(
    "os posix nt subprocess sys shutil socket importlib runpy code codeop pty ctypes pickle "
    "_pickle "
    "marshal webbrowser asyncio multiprocessing threading _thread http urllib requests "
    "operator _operator functools types inspect pip setuptools site timeit cProfile profile pdb "
    "bdb "
    "doctest builtins __builtin__ commands popen2 platform tempfile glob".split()
)
"""Modules whose callables no Megatron checkpoint needs: a file that names one was made to do harm."""

HARMLESS_NAMES = frozenset(
    {
        # Plain values of these are pickled by ordinary Python; they are stubs here all the same.
        ("builtins", "getattr"),  # enum members, as Python 3.11 pickles them
        ("__builtin__", "getattr"),
        ("builtins", "object"),
        ("__builtin__", "object"),
        ("builtins", "bytearray"),
        ("__builtin__", "bytearray"),
        ("builtins", "range"),
        ("__builtin__", "xrange"),
        ("types", "SimpleNamespace"),
        ("functools", "partial"),  # activation functions in some args; never called
    }
)


class Namespace:
    """Stands in for `argparse.Namespace`: attributes, nothing else."""

    def __repr__(self) -> str:
        return f"Namespace({', '.join(sorted(vars(self)))})"


class Stub:
    """An object of a class that is not on the list: keeps what it was given, does nothing."""

    def __new__(cls, *args: Any, **_: Any) -> Stub:
        """Accept anything."""
        stub = super().__new__(cls)
        stub.__dict__["stub_args"] = args
        return stub

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__["stub_state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignore a list item."""

    def extend(self, values: Any) -> None:
        """Ignore list items."""

    def add(self, value: Any) -> None:
        """Ignore a set item."""

    def __repr__(self) -> str:
        args = self.__dict__.get("stub_args", ())
        return f"{type(self).__name__}({', '.join(map(str, args))})"


@dataclass
class _StorageType:
    dtype: torch.dtype


@dataclass
class _Storage:
    """A run of elements in the file; `offset` (bytes) is filled in late for the stream form."""

    dtype: torch.dtype
    numel: int
    file: MappedFile | None = None
    offset: int = 0


@dataclass
class _PendingTensor:
    """A tensor whose storage offset is not known until the whole stream has been read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def resolve(self) -> StoredTensor:
        storage = self.storage
        if storage.file is None:
            raise InputError("a tensor refers to a storage that the file does not hold")
        itemsize = self.dtype.itemsize
        tensor = StoredTensor(
            storage.file,
            storage.offset + self.offset * itemsize,
            self.dtype,
            self.shape,
            self.stride,
        )
        last = self.offset + sum(
            (n - 1) * s for n, s in zip(self.shape, self.stride, strict=True) if n
        )
        if (last + 1) * itemsize > storage.numel * storage.dtype.itemsize and 0 not in self.shape:
            raise InputError(
                f"{storage.file.path}: a tensor of shape {list(self.shape)} does not fit its "
                "storage "
                f"of {storage.numel} elements; the file is damaged, copy it again"
            )
        return tensor


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _PendingTensor:
    """Note a tensor (torch._utils._rebuild_tensor and _rebuild_tensor_v2)."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("tensor without a storage")
    return _PendingTensor(
        storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)), storage.dtype
    )


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> _PendingTensor:
    """Note a tensor of an untyped storage (torch._utils._rebuild_tensor_v3)."""
    pending = _rebuild_tensor(storage, offset, size, stride)
    dtype = rest[2] if len(rest) > 2 else None
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("tensor without a dtype")
    pending.dtype = dtype
    return pending


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    """Drop the wrapping of a Parameter."""
    return data


def _rebuild_from_type(function: Any, _type: Any, args: Any, _state: Any) -> Any:
    """Drop a tensor subclass, where its inside is one of our rebuilders."""
    if function not in (_rebuild_tensor, _rebuild_tensor_v3, _rebuild_parameter):
        return Stub(function, args)
    return function(*args)


def _reconstructor(cls: Any, _base: Any, _state: Any) -> Any:
    """Make an empty stub (copyreg._reconstructor, written by pickle protocols 0 and 1)."""
    return (
        cls.__new__(cls)
        if isinstance(cls, type) and issubclass(cls, Stub | Namespace)
        else Stub(cls)
    )


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}

_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "list"): list,
    ("builtins", "dict"): dict,
    ("builtins", "tuple"): tuple,
    ("builtins", "int"): int,
    ("builtins", "float"): float,
    ("builtins", "bool"): bool,
    ("builtins", "complex"): complex,
    ("builtins", "slice"): slice,
    ("__builtin__", "set"): set,
    ("__builtin__", "list"): list,
    ("__builtin__", "dict"): dict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("copy_reg", "_reconstructor"): _reconstructor,
    ("argparse", "Namespace"): Namespace,
}

# Known parts of Megatron checkpoints that carry no weights: stubs too, but not worth a word.
_QUIET_PREFIXES = ("numpy", "_codecs", "torch.", "io", "_io", "collections")


def lookup(module: str, name: str) -> Any | None:
    """Return what stands in for a pickled global, or None where it is not on the list."""
    if (module, name) in _ALLOWED:
        return _ALLOWED[module, name]
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return _StorageType(_STORAGES[name])
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    return None


class SafeUnpickler(pickle.Unpickler):
    """Unpickles containers, scalars and tensor descriptions; everything else becomes a `Stub`."""

    def __init__(self, stream: IO[bytes], globals_met: set[tuple[str, str]]) -> None:
        super().__init__(stream, encoding="utf-8")
        self.globals_met = globals_met

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a global: never the thing itself unless it is a plain container."""
        known = lookup(module, name)
        if known is not None:
            return known
        self.globals_met.add((module, name))
        return type(f"{module}.{name}", (Stub,), {"__module__": __name__})

    def persistent_load(self, pid: Any) -> Any:
        """Refuse: only the subclasses for torch's two forms know storages."""
        raise pickle.UnpicklingError(f"unexpected reference to a storage: {pid!r}")


@dataclass
class TorchFile:
    """One file (or one entry of a larger file) written by torch.save."""

    path: Path
    value: Any
    globals_met: set[tuple[str, str]] = field(default_factory=set)
    form: str = "zip"
    """`zip`, `stream` for the form before torch 1.6, or `pickle` for one without storages."""
    crcs: list[int] = field(default_factory=list)
    """The archive's own CRC-32 of every record, in order; empty for a stream."""

    @property
    def classes(self) -> list[str]:
        """Names of the pickled classes that became stubs, without numpy's and torch's own."""
        return sorted(
            f"{module}.{name}"
            for module, name in self.globals_met
            if not f"{module}.".startswith(_QUIET_PREFIXES) and module != "torch"
        )

    @property
    def hostile(self) -> list[str]:
        """Names that no checkpoint needs and that would run commands elsewhere."""
        return sorted(
            f"{module}.{name}"
            for module, name in self.globals_met
            if module.split(".")[0] in HOSTILE_MODULES and (module, name) not in HARMLESS_NAMES
        )


def state_of(stub: Any) -> dict[str, Any]:
    """Return the attributes that a stub was given when it was unpickled; none for anything else."""
    state = stub.__dict__.get("stub_state") if isinstance(stub, Stub) else None
    # An object with __slots__ gives two dicts, either of which may be None.
    parts = state if isinstance(state, tuple) else (state,)
    return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


def read_pickle(path: Path) -> TorchFile:
    """Return the contents of a plain pickle, such as torch.distributed.checkpoint's `.metadata`.

    Raises:
        InputError: The file is missing, cut off, or no pickle.
    """
    met: set[tuple[str, str]] = set()
    try:
        with path.open("rb") as stream:
            return TorchFile(path, SafeUnpickler(stream, met).load(), met, "pickle")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; copy the whole checkpoint folder") from None
    except PermissionError:
        raise InputError(f"{path} cannot be read: permission denied") from None
    except _DAMAGE as error:
        raise InputError(
            f"{path} is cut off or damaged ({_first_line(error)}); copy the file again"
        ) from None


def read_torch_file(
    path: Path, *, offset: int = 0, length: int | None = None, mapped: MappedFile | None = None
) -> TorchFile:
    """Return the contents of a file that torch.save wrote, with tensors as `StoredTensor`s.

    Args:
        path: The file.
        offset: First byte of the torch.save archive in it (entries of `.distcp` files,
            stored zip members).
        length: Its length; None for the rest of the file.
        mapped: The file's mapping, where several archives in one file share it.

    Raises:
        InputError: The file is missing, cut off, or not written by torch.save.
    """
    try:
        mapped = mapped or MappedFile(path)
        with path.open("rb") as stream:
            window = _Window(stream, offset, mapped.size - offset if length is None else length)
            head = window.read(4)
            window.seek(0)
            if head.startswith(b"PK\x03\x04"):
                return _read_zip(path, mapped, window, offset)
            if head[:1] == b"\x80":
                return _read_stream(path, mapped, window, offset)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a checkpoint") from None
    except PermissionError:
        raise InputError(f"{path} cannot be read: permission denied") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder where a file was expected") from None
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(
            f"{path} is cut off or damaged ({_first_line(error)}); copy the file again"
        ) from None
    what = "is empty" if mapped.size == 0 else "was not written by torch.save"
    raise InputError(f"{path} {what}; expected a Megatron model file such as model_optim_rng.pt")


# What a damaged or hostile pickle can raise while it is read: it builds only lists, numbers and
# stubs.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
    ImportError,
    struct.error,
    OSError,
)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


class _Window(io.RawIOBase):
    """A byte range of a file, as a file of its own."""

    def __init__(self, stream: IO[bytes], start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        self._stream.seek(self._start + self._at)
        data = self._stream.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _ZipUnpickler(SafeUnpickler):
    def __init__(self, stream: IO[bytes], met: set[tuple[str, str]], archive: _ZipArchive) -> None:
        super().__init__(stream, met)
        self.archive = archive

    def persistent_load(self, pid: Any) -> _Storage:
        """Describe a storage: `('storage', type, key, location, elements)`."""
        kind, storage_type, key, _location, numel = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError(f"unknown kind of storage {kind!r}")
        return self.archive.storage(str(key), storage_type.dtype, int(numel))


class _ZipArchive:
    """The storages of one torch.save zip archive, by key."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str, file: MappedFile, base: int) -> None:
        self.archive, self.prefix, self.file, self.base = archive, prefix, file, base
        self.storages: dict[str, _Storage] = {}

    def storage(self, key: str, dtype: torch.dtype, numel: int) -> _Storage:
        if key not in self.storages:
            record = self.archive.getinfo(f"{self.prefix}data/{key}")
            if record.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError("a storage is compressed, torch never does that")
            if record.file_size < numel * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} is shorter than it says")
            # Only the local header tells how long its name and padding are.
            window = self.archive.fp
            assert window is not None
            window.seek(record.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", window.read(4))
            start = record.header_offset + 30 + name_length + extra_length
            self.storages[key] = _Storage(dtype, numel, self.file, self.base + start)
        return self.storages[key]


def _read_zip(path: Path, file: MappedFile, window: _Window, base: int) -> TorchFile:
    met: set[tuple[str, str]] = set()
    with zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") or name == "data.pkl"]
        if not pickles:
            raise InputError(
                f"{path} is a zip file but not one of torch.save: it holds no data.pkl "
                f"(found {', '.join(names[:3]) or 'nothing'})"
            )
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
            raise InputError(f"{path} was written on a big-endian machine, which is not supported")
        storages = _ZipArchive(archive, prefix, file, base)
        stream = io.BytesIO(archive.read(pickles[0]))
        value = _ZipUnpickler(stream, met, storages).load()
        crcs = [record.CRC for record in archive.infolist()]
    return TorchFile(path, _resolve(value), met, "zip", crcs)


class _StreamUnpickler(SafeUnpickler):
    def __init__(
        self, stream: IO[bytes], met: set[tuple[str, str]], storages: dict[str, _Storage]
    ) -> None:
        super().__init__(stream, met)
        self.storages = storages

    def persistent_load(self, pid: Any) -> Any:
        """Describe a storage: `('storage', type, key, location, elements, view)`."""
        if pid[0] == "module":  # a module's class and source text, kept beside it by old torch
            return pid[1]
        kind, storage_type, key, _location, numel, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError(f"unknown kind of storage {kind!r}")
        if view and view[0] is not None:
            raise pickle.UnpicklingError("storage views of torch < 0.4 are not supported")
        return self.storages.setdefault(str(key), _Storage(storage_type.dtype, int(numel)))


def _read_stream(path: Path, file: MappedFile, window: _Window, base: int) -> TorchFile:
    met: set[tuple[str, str]] = set()
    storages: dict[str, _Storage] = {}
    stream = io.BufferedReader(window)
    if SafeUnpickler(stream, met).load() != STREAM_MAGIC:
        raise InputError(
            f"{path} is a pickle but was not written by torch.save; expected a Megatron model file"
        )
    protocol = SafeUnpickler(stream, met).load()
    system = SafeUnpickler(stream, met).load()
    if protocol != 1001 or not isinstance(system, dict) or not system.get("little_endian", True):
        raise InputError(f"{path} was written by an unknown form of torch.save ({protocol!r})")
    value = _StreamUnpickler(stream, met, storages).load()
    keys = SafeUnpickler(stream, met).load()
    at = stream.tell()
    for key in keys:
        storage = storages[str(key)]
        stream.seek(at)
        (numel,) = struct.unpack("<q", stream.read(8))
        if numel != storage.numel:
            raise pickle.UnpicklingError(f"storage {key} has {numel} elements, not {storage.numel}")
        storage.file, storage.offset = file, base + at + 8
        at += 8 + numel * storage.dtype.itemsize
    return TorchFile(path, _resolve(value), met, "stream")


def _resolve(value: Any) -> Any:
    """Replace pending tensors by stored ones in nested containers (attributes of stubs stay as they are)."""
    if isinstance(value, _PendingTensor):
        return value.resolve()
    if isinstance(value, dict):
        return {key: _resolve(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item) for item in value]
    if type(value) is tuple:
        return tuple(_resolve(item) for item in value)
    return value
