"""Reads what `torch.save` wrote, without torch.load and without running anything the file asks for.

A `.pt` file is a pickle plus raw storages. The pickle is read by the `SafeUnpickler`, to which this
file adds torch's tensor rebuilders: ours only note where a tensor stands, of which dtype and shape.
Tensors come back as `StoredTensor`s: no byte of a storage is read here.

Both forms of torch.save are read: the zip archive (torch >= 1.6) and the older stream of pickles,
whose storages stand at the end of the file, each behind its element count.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mlm_eval.checkpoints.dtypes import STORED_DTYPES, Dtype
from mlm_eval.checkpoints.errors import InputError, first_line, shown
from mlm_eval.checkpoints.files.safe_pickle import (
    SafeUnpickler,
    Stub,
    is_hostile,
    is_quiet,
    printable,
)
from mlm_eval.checkpoints.files.stand_in import (
    describe_compression,
    describe_missing,
    refuse_special,
    refuse_stand_in,
)
from mlm_eval.checkpoints.files.window import FileWindow
from mlm_eval.checkpoints.lazy import MOST_DIMS, Checksum, MappedFile, StoredTensor

STREAM_MAGIC = 0x1950A86A20F9469CFC6C
"""First object in the stream form of torch.save (torch/serialization.py, MAGIC_NUMBER)."""


@dataclass(frozen=True, eq=False)
class _StorageType:
    dtype: Dtype


@dataclass(frozen=True, eq=False)
class _Storage:
    """A run of elements in the file, from byte `offset`."""

    dtype: Dtype
    numel: int
    file: MappedFile
    offset: int
    checksum: Checksum | None = None


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *_: Any
) -> StoredTensor | Stub:
    """Note a tensor (torch._utils._rebuild_tensor and _rebuild_tensor_v2)."""
    if isinstance(storage, Stub):  # of a type that this torch does not have, or that is quantized
        return storage
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _tensor(storage, offset, size, stride, storage.dtype)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> StoredTensor | Stub:
    """Note a tensor of an untyped storage (torch._utils._rebuild_tensor_v3)."""
    dtype = rest[2] if len(rest) > 2 else None
    if isinstance(dtype, type) and issubclass(dtype, Stub):  # of a newer torch
        return dtype()
    if not isinstance(storage, _Storage) or not isinstance(dtype, Dtype):
        raise pickle.UnpicklingError("a tensor without a storage or a dtype")
    return _tensor(storage, offset, size, stride, dtype)


def _tensor(storage: _Storage, offset: Any, size: Any, stride: Any, dtype: Dtype) -> StoredTensor:
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor without a shape")
    numbers = (offset, *size[: MOST_DIMS + 1], *stride[: MOST_DIMS + 1])
    if len(size) > MOST_DIMS or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise pickle.UnpicklingError("a tensor of an impossible shape")
    available = storage.numel * storage.dtype.itemsize
    last = offset + sum((entries - 1) * step for entries, step in zip(size, stride, strict=True))
    numel = math.prod(size)
    # An expanded tensor has more elements than its storage; one of gigabytes is made to do harm.
    if numel and (last + 1) * dtype.itemsize > available or numel > max(available, 1 << 20):
        raise InputError(
            f"{storage.file.path}: a tensor of shape {shown(size)} does not fit its storage of "
            f"{storage.numel} elements; the file is damaged, copy it again"
        )
    start = storage.offset + offset * dtype.itemsize
    return StoredTensor(storage.file, start, dtype, size, stride, storage.checksum)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    """Drop the wrapping of a Parameter."""
    return data


def _rebuild_from_type(function: Any, _type: Any, args: Any, state: Any) -> Any:
    """Drop a tensor subclass, where its inside is one of our rebuilders; else keep it as a stub."""
    known = (_rebuild_tensor, _rebuild_tensor_v3, _rebuild_parameter)
    if not any(function is rebuild for rebuild in known):
        stub = Stub(function, args, _type)
        stub.__dict__["stub_state"] = state
        return stub
    if not isinstance(args, tuple) or len(args) > 16:
        raise pickle.UnpicklingError("a tensor rebuilt from too much")
    return function(*args)


_REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}

UNTYPED = "UntypedStorage"
STORAGE_DTYPES = {
    "DoubleStorage": STORED_DTYPES["float64"],
    "FloatStorage": STORED_DTYPES["float32"],
    "HalfStorage": STORED_DTYPES["float16"],
    "BFloat16Storage": STORED_DTYPES["bfloat16"],
    "LongStorage": STORED_DTYPES["int64"],
    "IntStorage": STORED_DTYPES["int32"],
    "ShortStorage": STORED_DTYPES["int16"],
    "CharStorage": STORED_DTYPES["int8"],
    "ByteStorage": STORED_DTYPES["uint8"],
    "BoolStorage": STORED_DTYPES["bool"],
    "ComplexFloatStorage": STORED_DTYPES["complex64"],
    "ComplexDoubleStorage": STORED_DTYPES["complex128"],
    UNTYPED: STORED_DTYPES["uint8"],
}
"""torch's storage classes in pickles -> the dtype of their elements."""


class _TorchUnpickler(SafeUnpickler):
    """Unpickles tensors too; `storage` says where one stands, by key, dtype and element count."""

    def __init__(
        self,
        stream: IO[bytes],
        met: set[tuple[str, str]],
        storage: Callable[[str, Dtype, int], _Storage],
    ) -> None:
        super().__init__(stream, met)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """See `SafeUnpickler.find_class`; torch's rebuilders are replaced by ours."""
        if (module, name) in _REBUILDERS:
            return _REBUILDERS[module, name]
        if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
            return _StorageType(STORAGE_DTYPES[name])
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Describe a storage: `('storage', type, key, location, elements[, view])`."""
        if not isinstance(pid, tuple) or len(pid) not in (4, 5, 6):
            raise pickle.UnpicklingError("a reference to something else than a storage")
        if pid[0] == "module" and len(pid) == 4:
            return pid[1]  # a module's class, with its source text: old torch kept it beside it
        kind, storage_type, key, _location, numel, *view = pid
        if isinstance(storage_type, type) and issubclass(storage_type, Stub):
            if kind == "storage" and storage_type.__name__.endswith("Storage"):
                return storage_type()
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        if not isinstance(key, str | int) or type(numel) is not int or not 0 <= numel < 2**60:
            raise pickle.UnpicklingError("a storage of an impossible size")
        if view and view[0] is not None:
            raise pickle.UnpicklingError("storage views of torch < 0.4 are not supported")
        return self.storage(str(key), storage_type.dtype, numel)


@dataclass
class TorchFile:
    """One file (or one entry of a larger file) written by torch.save."""

    path: Path
    value: Any
    globals_met: set[tuple[str, str]] = field(default_factory=set)
    form: str = "zip"
    """`zip`, `stream` for the form before torch 1.6, or `pickle` for one without storages."""
    crcs: list[int] = field(default_factory=list)
    """The archive's own CRC-32 of every record, in order; empty where it has none."""

    @property
    def classes(self) -> list[str]:
        """Names of the pickled classes that became stubs, but for the ordinary ones."""
        return sorted(printable(f"{m}.{n}") for m, n in self.globals_met if not is_quiet(m, n))

    @property
    def hostile(self) -> list[str]:
        """Names that no checkpoint needs and that would do harm elsewhere."""
        return sorted(printable(f"{m}.{n}") for m, n in self.globals_met if is_hostile(m, n))


def read_pickle(path: Path) -> TorchFile:
    """Return the contents of a plain pickle, such as torch.distributed.checkpoint's `.metadata`.

    Raises:
        InputError: The file is missing, cut off, or no pickle.
    """
    met: set[tuple[str, str]] = set()
    refuse_special(path)
    with _explained(path, "copy the whole checkpoint folder"), path.open("rb") as stream:
        return TorchFile(path, SafeUnpickler(stream, met).load(), met, "pickle")


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
    refuse_special(path)
    with _explained(path, "give the path of a checkpoint"):
        mapped = mapped or MappedFile(path)
        with path.open("rb") as stream:
            window = FileWindow(stream, offset, mapped.size - offset if length is None else length)
            head = window.read(4)
            window.seek(0)
            if head.startswith(b"PK\x03\x04"):
                return _read_zip(path, mapped, window, offset)
            if head[:1] == b"\x80":
                return _read_stream(path, mapped, window, offset)
    refuse_stand_in(path)
    if what := describe_compression(head):
        raise InputError(f"{path} {what}")
    raise InputError(
        f"{path} was not written by torch.save; expected a Megatron model file such as "
        "model_optim_rng.pt"
    )


# What reading a damaged or hostile file can raise: the pickle module and zipfile check little.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,  # of zipfile: an encrypted record, an unknown compression; and RecursionError
    ImportError,
    OSError,
)


@contextmanager
def _explained(path: Path, way_out: str) -> Iterator[None]:
    """Raise what reading a file can raise as an `InputError`.

    Args:
        path: The file.
        way_out: What to do where it does not exist.

    Raises:
        InputError: Instead of the error raised in the block.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{describe_missing(path)}; {way_out}") from None
    except PermissionError:
        raise InputError(f"{path} cannot be read: permission denied") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder where a file was expected") from None
    except _DAMAGE as error:
        refuse_stand_in(path)
        said = printable(first_line(error)[:120])
        raise InputError(f"{path} is cut off or damaged ({said}); copy the file again") from None


class _ZipStorages:
    """The storages of one torch.save zip archive, by key."""

    def __init__(
        self, archive: zipfile.ZipFile, prefix: str, file: MappedFile, base: int, *, sums: bool
    ) -> None:
        self.archive, self.prefix, self.file, self.base = archive, prefix, file, base
        self.sums = sums
        self.starts: dict[str, int] = {}
        self.checksums: dict[str, Checksum] = {}

    def __call__(self, key: str, dtype: Dtype, numel: int) -> _Storage:
        record = self.archive.getinfo(f"{self.prefix}data/{key}")
        _refuse_odd_record(self.file.path, record)
        if record.file_size < numel * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"storage {key} has {record.file_size} bytes, not {numel} x {dtype.itemsize}"
            )
        if key not in self.starts:
            # Only the local header tells how long its name and padding are.
            window = self.archive.fp
            assert window is not None
            window.seek(record.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", window.read(4))
            self.starts[key] = record.header_offset + 30 + name_length + extra_length
            if self.sums and record.CRC:  # 0: torch.serialization.skip_data() wrote none
                start = self.base + self.starts[key]
                self.checksums[key] = Checksum(
                    self.file, start, record.file_size, record.CRC, printable(record.filename)
                )
        start = self.base + self.starts[key]
        if start + record.file_size > self.file.size:
            raise EOFError(f"storage {key} ends beyond the file")
        return _Storage(dtype, numel, self.file, start, self.checksums.get(key))


def _refuse_odd_record(path: Path, record: zipfile.ZipInfo) -> None:
    """Refuse a record that torch.save does not write, whose bytes are not its values.

    Raises:
        InputError: It is compressed or encrypted, or has two sizes.
    """
    name = printable(record.filename)
    if record.compress_type != zipfile.ZIP_STORED:
        raise InputError(
            f"{path} was packed again after torch.save wrote it: {name} is compressed, which "
            "torch.save never does; use the original file"
        )
    if record.flag_bits & _ENCRYPTED:
        raise InputError(f"{path} holds {name} encrypted; use the file that torch.save wrote")
    if record.compress_size != record.file_size:
        raise InputError(
            f"{path} is damaged: {name} has two sizes, "
            f"{record.compress_size} and {record.file_size} bytes; "
            "copy the file again"
        )


_ENCRYPTED = 0x41
"""Bits of a record's flags: encrypted, in the old way or the strong one."""


def _read_zip(path: Path, file: MappedFile, window: FileWindow, base: int) -> TorchFile:
    met: set[tuple[str, str]] = set()
    with zipfile.ZipFile(window) as archive:
        names = set(archive.namelist())
        pickles = [name for name in archive.namelist() if f"/{name}".endswith("/data.pkl")]
        if not pickles:
            found = printable(", ".join(archive.namelist()[:3])) or "nothing"
            raise InputError(
                f"{path} is a zip file but not one of torch.save: it holds no data.pkl "
                f"(found {found}); expected a Megatron model file such as model_optim_rng.pt"
            )
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in names:
            raise InputError(
                f"{path} is a TorchScript archive, a compiled program; expected a Megatron model "
                "file such as model_optim_rng.pt"
            )
        crcs = [record.CRC for record in archive.infolist()]
        if not any(crcs):  # torch.serialization.set_crc32_options(False) leaves them out
            crcs = []
        for name in (pickles[0], f"{prefix}byteorder"):
            if name in names:
                _refuse_odd_record(path, archive.getinfo(name))
                if not crcs:
                    del archive.getinfo(name).CRC  # what zipfile then does not compare
        if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
            raise InputError(
                f"{path} was written on a big-endian machine, which is not supported; load it and "
                "save it again on a little-endian one"
            )
        stream = io.BytesIO(archive.read(pickles[0]))
        storages = _ZipStorages(archive, prefix, file, base, sums=bool(crcs))
        value = _TorchUnpickler(stream, met, storages).load()
    return TorchFile(path, value, met, "zip", crcs)


class _StreamStorages:
    """The storages of the stream form; their order stands behind the pickle that refers to them."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.sizes: dict[str, tuple[Dtype, int]] = {}
        self.starts: dict[str, int] | None = None

    def __call__(self, key: str, dtype: Dtype, numel: int) -> _Storage:
        if self.sizes.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise pickle.UnpicklingError(f"storage {key} is described in two ways")
        if self.starts is not None and key not in self.starts:
            raise pickle.UnpicklingError(f"storage {key} is not there")
        return _Storage(dtype, numel, self.file, 0 if self.starts is None else self.starts[key])

    def locate(self, keys: Any, window: FileWindow, at: int, base: int) -> dict[str, int]:
        """Return where each storage starts, given the keys in the order in which they stand."""
        if not isinstance(keys, list):
            raise pickle.UnpicklingError("no list of storages")
        starts = {}
        for key in keys:
            if key not in self.sizes:
                raise pickle.UnpicklingError("a storage that no tensor has")
            dtype, numel = self.sizes[key]
            window.seek(at)
            (found,) = struct.unpack("<q", window.read(8))
            if found != numel:
                raise pickle.UnpicklingError(f"storage {key} has {found} elements, not {numel}")
            starts[key] = base + at + 8
            at += 8 + numel * dtype.itemsize
        if at > window.seek(0, io.SEEK_END):
            raise EOFError("its last storage is cut off")
        return starts


def _read_stream(path: Path, file: MappedFile, window: FileWindow, base: int) -> TorchFile:
    met: set[tuple[str, str]] = set()
    stream = io.BufferedReader(window)
    if SafeUnpickler(stream, met).load() != STREAM_MAGIC:
        raise InputError(
            f"{path} is a pickle but was not written by torch.save; expected a Megatron model file "
            "such as model_optim_rng.pt"
        )
    protocol = SafeUnpickler(stream, met).load()
    system = SafeUnpickler(stream, met).load()
    if protocol != 1001 or not isinstance(system, dict) or not system.get("little_endian", True):
        raise InputError(
            f"{path} was written by an unknown form of torch.save; load it and save it again with "
            "a recent torch"
        )
    # Twice: first to learn the storages' sizes, from which their places follow.
    start = stream.tell()
    storages = _StreamStorages(file)
    _TorchUnpickler(stream, met, storages).load()
    keys = SafeUnpickler(stream, met).load()
    end = stream.tell()
    stream.detach()
    storages.starts = storages.locate(keys, window, end, base)
    window.seek(start)
    value = _TorchUnpickler(io.BufferedReader(window), met, storages).load()
    return TorchFile(path, value, met, "stream")
