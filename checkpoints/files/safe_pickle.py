"""Unpickles without running anything that the pickle asks for.

The machine is Python's own (`pickle._Unpickler`), with every step replaced that would call, look up
or change something real. A pickle can make containers, numbers, text and torch dtypes; each class
that it names becomes an inert stub, and the names are kept, so that `inspect` can show them.

A damaged or hostile pickle must not hang either, or take the memory: a nested tuple is not hashed
(the hash recurses in C without a limit, and takes exponential time where parts are shared), keys
that can be made to have one hash are counted, and so are sets, which are large where the pickle is
small, and what is copied out of the pickle. No length in it is believed before the bytes are there,
and what lists that hold one another would be, written out, is measured before anybody walks them.
"""

from __future__ import annotations

import functools
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import IO, Any, ClassVar

from mlm_eval.checkpoints.dtypes import STORED_DTYPES, Dtype

HOSTILE_MODULES = frozenset(
    """os posix nt subprocess sys shutil socket importlib imp runpy code codeop pty ctypes _ctypes
    cffi pickle _pickle dill cloudpickle joblib marshal shelve webbrowser asyncio multiprocessing
    concurrent threading _thread signal http urllib ftplib smtplib telnetlib imaplib nntplib xmlrpc
    requests zipimport pkgutil pydoc linecache trace tarfile zipfile operator _operator functools
    types inspect pip setuptools distutils ensurepip venv site timeit cProfile profile pdb bdb
    doctest builtins __builtin__ commands popen2 platform tempfile glob pathlib io _io""".split()
)
"""Modules whose callables no checkpoint needs: a file that names one was made to do harm."""

HOSTILE_NAMES = frozenset(
    """torch.load torch.serialization.load torch.jit.load torch.ops.load_library torch.hub
    torch.package.PackageImporter torch.utils.cpp_extension torch.utils.bottleneck numpy.load
    numpy.fromfile numpy.memmap numpy.testing numpy.f2py numpy.distutils pandas.read_pickle
    logging.config logging.FileHandler uuid._get_command_stdout""".split()
)
"""Such names in modules that are harmless otherwise; what stands below one is hostile too."""

HARMLESS_NAMES = frozenset(
    f"{module}.{name}"
    for module, names in {
        # Enum members as Python 3.11 pickles them, and plain types met as values.
        "builtins": "getattr type object bytearray bytes str int float bool complex list dict "
        "tuple set frozenset slice range Ellipsis",
        "__builtin__": "getattr type object bytearray xrange str unicode int long float bool "
        "complex list dict tuple set frozenset slice",
        "types": "SimpleNamespace",
        "functools": "partial",  # activation functions in some args; never called
        "signal": "Signals Handlers",
        "pathlib": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
        "io": "BytesIO StringIO",
        "_io": "BytesIO StringIO",
    }.items()
    for name in names.split()
)
"""Exceptions to `HOSTILE_MODULES`; they are stubs here all the same, but for paths."""

PATHS: dict[str, type[PurePath]] = {
    "Path": PurePosixPath,
    "PosixPath": PurePosixPath,
    "PurePath": PurePosixPath,
    "PurePosixPath": PurePosixPath,
    "WindowsPath": PureWindowsPath,
    "PureWindowsPath": PureWindowsPath,
}
"""Classes of `pathlib`: paths become text. Python 3.13 has them in `pathlib._local`."""

QUIET_NAMES = frozenset(
    """_codecs.encode collections.defaultdict io.BytesIO _io.BytesIO numpy.dtype numpy.ndarray
    numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
    numpy.core.multiarray.scalar numpy._core.multiarray.scalar torch.Tensor torch.device
    torch.nn.parameter.Parameter torch.serialization._get_layout""".split()
) | {name for name in HARMLESS_NAMES if name.partition(".")[0] in ("builtins", "__builtin__")}
"""Parts of ordinary checkpoints that carry no weights: stubs too, but not worth a word."""

MAX_GLOBALS = 10_000
"""Distinct classes in one pickle; a checkpoint names a few dozen."""

MAX_COPIED = 1 << 21
"""Elements that calls copy out of the pickle's larger containers, in all."""

MAX_KEY = 1_000
"""Elements of a tuple used as a key, nested ones included."""

MAX_ODD_KEYS = 1_000
"""Keys of kinds whose hashes can be chosen: thousands of one hash take minutes to tell apart."""

MAX_SETS = 100_000
"""Sets of one pickle; each takes 200 bytes of memory and 1 of the pickle."""

MAX_LARGE = 1 << 27
"""Bytes of the texts and byte strings of more than a megabyte, in all."""

MAX_WRITTEN_OUT = 50
"""How many times its number of objects, and a million, what a pickle holds may be written out."""


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

    def __call__(self, *args: Any) -> Stub:
        """Return another stub: some classes are rebuilt by one of their methods."""
        return Stub(*args)

    def append(self, value: Any) -> None:
        """Ignore a list item."""

    def extend(self, values: Any) -> None:
        """Ignore list items."""

    def __repr__(self) -> str:
        # Scalars only: what else a stub was given may be endless when printed.
        plain = [arg for arg in self.__dict__["stub_args"] if is_scalar(arg)]
        return f"{type(self).__name__}({', '.join(map(repr, plain))})"


def state_of(stub: Any) -> dict[str, Any]:
    """Return the attributes that a stub was given when it was unpickled; none for anything else."""
    state = stub.__dict__.get("stub_state") if isinstance(stub, Stub) else None
    # An object with __slots__ gives two dicts, either of which may be None.
    parts = state if isinstance(state, tuple) else (state,)
    return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of a pickled object, or a dict's items, as values safe to show.

    Anything but a scalar, a list of scalars or a stub becomes a stub: a value from a file is
    compared and printed, and a container can be made that takes for ever to compare or to print.
    """
    found = vars(value) if isinstance(value, Namespace) else state_of(value)
    if isinstance(value, dict):
        found = value
    return {name: _plain(item) for name, item in found.items() if isinstance(name, str)}


def _plain(value: Any) -> Any:
    if is_scalar(value) or isinstance(value, Stub):
        return value
    if isinstance(value, list | tuple) and len(value) <= 1000 and all(map(is_scalar, value)):
        return list(value)
    return Stub(type(value).__name__)


def is_scalar(value: Any) -> bool:
    """Whether a value is a plain one, of a size that can be shown."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**64
    if isinstance(value, str):
        return len(value) <= 10_000
    return value is None or isinstance(value, float | Dtype)


def printable(text: str) -> str:
    """Return a name from a file fit to be shown: no line breaks or terminal codes, not endless."""
    shown = text[:200] if text.isprintable() else ascii(text[:200])[1:-1]
    return shown if len(text) <= 200 else f"{shown}..."


def is_hostile(module: str, name: str) -> bool:
    """Whether a pickled name would run commands, open files or load code, were it called."""
    # Python moves its classes to private modules and back, from one version to the next.
    public = ".".join(
        part for i, part in enumerate(module.split(".")) if not (i and part[:1] == "_")
    )
    path = f"{public}.{name}"
    if module.partition(".")[0] in HOSTILE_MODULES:
        return path not in HARMLESS_NAMES
    if any(part.lstrip("_") in HOSTILE_MODULES for part in name.split(".")[:-1]):
        return True  # a module by way of another that imports it, such as argparse's _os
    parts = path.split(".")
    return any(".".join(parts[:end]) in HOSTILE_NAMES for end in range(2, len(parts) + 1))


def is_quiet(module: str, name: str) -> bool:
    """Whether a name is an ordinary part of checkpoints."""
    return f"{module}.{name}" in QUIET_NAMES or module.startswith("torch.distributed.checkpoint.")


def _parts(key: Any) -> Iterator[Any]:
    """Yield what a dict's key or a set's item consists of, nested tuples included.

    Raises:
        pickle.UnpicklingError: Hashing or comparing it may not end.
    """
    left = [key]
    seen = 0
    while left:
        part = left.pop()
        if isinstance(part, tuple | frozenset):
            seen += len(part)
            if seen > MAX_KEY:
                raise pickle.UnpicklingError("a key has too many parts")
            left.extend(part)
        yield part


def _has_chosen_hash(part: Any) -> bool:
    """Return whether a part of a key lets the file's author choose the key's hash."""
    if isinstance(part, int):
        return not 0 <= part < 2**40
    return isinstance(part, float | complex | frozenset)


def _tuple(items: Any = ()) -> tuple[Any, ...]:
    if not isinstance(items, list | tuple):
        raise pickle.UnpicklingError(f"items from a {type(items).__name__}")
    return tuple(items)


def _path_text(name: str) -> Callable[..., str]:
    """Return what makes the text of a path from its parts, for one of `PATHS`."""

    def join(*parts: Any) -> str:
        if not all(isinstance(part, str) for part in parts):
            raise pickle.UnpicklingError("a path of something else than text")
        return str(PATHS[name](*parts))

    return join


def _complex(real: Any = 0.0, imag: Any = 0.0) -> complex:
    if not isinstance(real, float) or not isinstance(imag, float):
        raise pickle.UnpicklingError("a complex number of something else than two numbers")
    return complex(real, imag)


def _reconstructor(cls: Any, _base: Any = None, _state: Any = None) -> Any:
    """Make an empty stub (copyreg._reconstructor, written by pickle protocols 0 and 1)."""
    return cls() if isinstance(cls, type) and issubclass(cls, Stub | Namespace) else Stub()


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "complex"): _complex,
    ("__builtin__", "complex"): _complex,
    ("torch", "Size"): _tuple,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("copy_reg", "_reconstructor"): _reconstructor,
    ("argparse", "Namespace"): Namespace,
    **{("pathlib", name): _path_text(name) for name in PATHS},
    **{("pathlib._local", name): _path_text(name) for name in PATHS},
}


class _Measured:
    """A stream that gives no part of a pickle that is larger than a checkpoint's."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.readline, self._left = stream, stream.readline, MAX_LARGE

    def read(self, size: int) -> bytes:
        """Return bytes, as `IO.read`."""
        if size > 1 << 20:
            self._left -= size
            if self._left < 0:
                raise pickle.UnpicklingError("it announces more bytes than a checkpoint's pickle")
        return self._stream.read(size)


_CONTAINERS = (dict, list, tuple, set, frozenset, Stub, Namespace)


def _held(value: Any) -> Iterator[Any]:
    """Yield what a container of a pickle holds."""
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, Stub | Namespace):
        yield from vars(value).values()


def check_written_out(value: Any) -> None:
    """Refuse lists that hold one another so often that walking them does not end.

    Raises:
        pickle.UnpicklingError: They do.
    """
    sizes: dict[int, int] = {}
    """Objects of each container, written out, by its id; 0 while it is being measured."""
    left = [value] if isinstance(value, _CONTAINERS) else []
    while left:
        part = left[-1]
        if sizes.get(id(part)):
            left.pop()
            continue
        inner = [held for held in _held(part) if isinstance(held, _CONTAINERS)]
        if id(part) not in sizes:
            sizes[id(part)] = 0
            left.extend(held for held in inner if id(held) not in sizes)
            continue
        left.pop()
        count = sum(1 for _ in _held(part)) - len(inner)
        sizes[id(part)] = min(1 + count + sum(sizes[id(held)] for held in inner), 1 << 62)
    if sizes.get(id(value), 0) > MAX_WRITTEN_OUT * len(sizes) + 1_000_000:
        raise pickle.UnpicklingError("its lists hold one another so often that they never end")


class SafeUnpickler(pickle._Unpickler):
    """Unpickles containers and scalars; every other object becomes a `Stub`."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    # Attributes of Python's own machine, which its type stubs leave out.
    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: IO[bytes], globals_met: set[tuple[str, str]]) -> None:
        super().__init__(_Measured(stream), encoding="utf-8", errors="backslashreplace")
        self.globals_met = globals_met
        self._stubs: dict[tuple[str, str], type[Stub]] = {}
        self._copied = self._odd_keys = self._sets = 0
        self._shares = False
        self._containers: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): self._dict,
            ("builtins", "set"): self._set,
            ("__builtin__", "set"): self._set,
            ("builtins", "frozenset"): self._frozenset,
            ("__builtin__", "frozenset"): self._frozenset,
        }

    def load(self) -> Any:
        """Return the value of the pickle.

        Raises:
            pickle.UnpicklingError: It is damaged, or was made to do harm.
        """
        value = super().load()
        if self._shares:  # else it is a tree, as large as the pickle
            check_written_out(value)
        return value

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a global, never the thing itself."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if (module, name) in self._containers:
            return self._containers[module, name]
        if module == "torch" and name in STORED_DTYPES:
            return STORED_DTYPES[name]
        if (module, name) not in self._stubs:
            if len(self.globals_met) >= MAX_GLOBALS:
                raise pickle.UnpicklingError(f"it names more than {MAX_GLOBALS} classes")
            self.globals_met.add((module, name))
            stub = type(printable(f"{module}.{name}"), (Stub,), {"__module__": __name__})
            self._stubs[module, name] = stub
        return self._stubs[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Refuse: only the forms of torch.save keep storages outside of the pickle."""
        raise pickle.UnpicklingError("it refers to a storage, and there is none")

    def _key(self, key: Any) -> Any:
        """Return a dict's key or a set's item, unless hashing or comparing it may not end."""
        if isinstance(key, str) or (isinstance(key, int) and 0 <= key < 2**40):
            return key
        if any([_has_chosen_hash(part) for part in _parts(key)]):
            self._odd_keys += 1
            if self._odd_keys > MAX_ODD_KEYS:
                raise pickle.UnpicklingError("it has keys that no checkpoint has, too many of them")
        return key

    def _dict(self, items: Any = ()) -> dict[Any, Any]:
        """Return a dict (collections.OrderedDict: Python 2 pickles its items as pairs)."""
        return {self._key(key): value for key, value in map(_tuple, _tuple(items))}

    def _set(self, items: Any = ()) -> set[Any]:
        self._count_set()
        return {self._key(item) for item in _tuple(items)}

    def _frozenset(self, items: Any = ()) -> frozenset[Any]:
        self._count_set()
        return frozenset([self._key(item) for item in _tuple(items)])

    def _load_again(self, step: Callable[[SafeUnpickler], None]) -> None:
        """Put something on the stack that is held elsewhere too."""
        step(self)
        self._shares = self._shares or isinstance(self.stack[-1], _CONTAINERS)

    def _count_set(self) -> None:
        self._sets += 1
        if self._sets > MAX_SETS:
            raise pickle.UnpicklingError(f"it holds more than {MAX_SETS} sets")

    def _load_empty_set(self) -> None:
        self.stack.append(self._set())

    def _charge(self, *containers: Any) -> None:
        """Count what is about to be copied: a container is cheap to hand over again and again."""
        for part in containers:
            if isinstance(part, list | tuple | dict) and len(part) > 64:
                self._copied += len(part)
        if self._copied > MAX_COPIED:
            raise pickle.UnpicklingError("it copies its contents too often")

    def _call(self, function: Any, args: Any) -> Any:
        """Call what `find_class` has returned: ours, whatever the pickle calls it."""
        if not isinstance(args, tuple):
            raise pickle.UnpicklingError("a call without a tuple of arguments")
        self._charge(args, *args)
        return function(*args)

    def _load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack.append(self._call(self.stack.pop(), args))

    def _load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments: a stub has no use for them
        self._load_reduce()

    def _instantiate(self, klass: Any, args: Any) -> None:
        """Make the object of the opcodes INST and OBJ."""
        self.stack.append(self._call(klass, tuple(args)))

    def _load_build(self) -> None:
        """Give an object its state. Containers, tensors and our own functions take none."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Stub):
            target.__dict__["stub_state"] = state
        elif isinstance(target, Namespace) and isinstance(state, dict):
            self._charge(state)
            target.__dict__.update((key, item) for key, item in state.items() if type(key) is str)

    def _put(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, dict):
            for at in range(0, len(items), 2):
                target[self._key(items[at])] = items[at + 1]
        elif not isinstance(target, Stub):
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._put(self.stack[-1], items)

    def _load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._put(self.stack[-1], [key, value])

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        self._put(self.stack[-1], items)

    def _load_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if isinstance(target, set):
            target.update([self._key(item) for item in items])
        elif not isinstance(target, Stub):
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")

    def _load_frozenset(self) -> None:
        items = self.pop_mark()  # first: it replaces the stack
        self.stack.append(self._frozenset(items))

    def _load_bytearray(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.stack.append(bytearray(self.read(length)))


for _opcode, _step in {
    pickle.REDUCE: SafeUnpickler._load_reduce,
    pickle.NEWOBJ: SafeUnpickler._load_reduce,
    pickle.NEWOBJ_EX: SafeUnpickler._load_newobj_ex,
    pickle.BUILD: SafeUnpickler._load_build,
    pickle.DICT: SafeUnpickler._load_dict,
    pickle.SETITEM: SafeUnpickler._load_setitem,
    pickle.SETITEMS: SafeUnpickler._load_setitems,
    pickle.ADDITEMS: SafeUnpickler._load_additems,
    pickle.EMPTY_SET: SafeUnpickler._load_empty_set,
    pickle.FROZENSET: SafeUnpickler._load_frozenset,
    pickle.BYTEARRAY8: SafeUnpickler._load_bytearray,
}.items():
    SafeUnpickler.dispatch[_opcode[0]] = _step
for _opcode in (pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.DUP):
    SafeUnpickler.dispatch[_opcode[0]] = functools.partial(
        lambda step, machine: machine._load_again(step), pickle._Unpickler.dispatch[_opcode[0]]
    )
