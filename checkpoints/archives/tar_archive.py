"""Tar archives as folders: what is in one is read where it stands, nothing is unpacked.

A `MemberPath` leads into an archive (`/models/a.nemo/model_config.yaml`) and answers what the
readers ask of a path; weights are mapped at their offset. An archive that is compressed as a whole
is unpacked into the cache. Links, devices and names that lead out of the archive are refused.
Source: POSIX pax, "ustar Interchange Format".
"""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import io
import os
import posixpath
import shutil
import stat
import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

from mlm_eval.checkpoints.archives.unpacking import (
    TAR_DAMAGE,
    TAR_FAULTS,
    UNPACK_IT,
    check_member_name,
    most_unpacked,
    only_folder,
    refuse_bomb,
    unpacked,
)
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safe_pickle import printable
from mlm_eval.checkpoints.files.window import FileWindow

_LARGEST_FILE = 1 << 28
_MOST_MEMBERS = 1 << 20
_GZIP = b"\x1f\x8b"


def is_tar(path: Path) -> bool:
    """Whether a file is a tar archive, compressed with gzip or not."""
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
        if head.startswith(_GZIP):
            with gzip.open(path) as inner:
                head = inner.read(512)
    except TAR_FAULTS:
        return False
    return head[257:262] == b"ustar"


def tar_folder(path: Path) -> Path:
    """Return the folder that a tar archive is: a `MemberPath`, or what was unpacked of it.

    Raises:
        InputError: The archive is damaged, or holds what no checkpoint needs.
    """
    with path.open("rb") as stream:
        compressed = stream.read(2) == _GZIP
    if compressed:
        return only_folder(_unpack_gzip(path), stop="model_weights")
    _contents(path)
    return only_folder(MemberPath(path), stop="model_weights")


def archive_in(folder: Path) -> Path | None:
    """Return the one .nemo file of a folder that holds no other folder; None where there is none.

    Hidden ones, such as git's, do not count.

    A folder with a tracker file or a config.json is a checkpoint of its own.
    """
    held = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    archives = [entry for entry in held if entry.suffix == ".nemo"]
    others = ("latest_checkpointed_iteration.txt", "config.json")
    if len(archives) != 1 or any(entry.is_dir() or entry.name in others for entry in held):
        return None
    return archives[0]


def real_file(path: Path) -> Path:
    """Return a file that other libraries can open: a member's content is put into the cache.

    Raises:
        InputError: It is larger than any tokenizer, or cannot be written.
    """
    if not isinstance(path, MemberPath):
        return path
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise InputError(f"{path} has {size:,} bytes, more than any tokenizer; {UNPACK_IT}")
    content = path.read_bytes()

    def write(folder: Path) -> None:
        (folder / path.name).write_bytes(content)

    name = hashlib.sha256(path.name.encode() + b"\0" + content).hexdigest()[:24]
    return unpacked(path, name, size, write) / path.name


@dataclass
class _Contents:
    """What is in an archive, by name below its root; '' is the root."""

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size in bytes."""
    folders: dict[str, set[str]] = field(default_factory=lambda: {"": set()})

    def add(self, path: Path, member: tarfile.TarInfo) -> None:
        """Note a member; see `_check`."""
        name = posixpath.normpath(member.name)
        name = "" if name == "." else name
        if member.isdir():
            self._add_folder(name)
        else:
            above, _, last = name.rpartition("/")
            self._add_folder(above)
            self.folders[above].add(last)
            self.files[name] = (member.offset_data, member.size)
        both = self.files.keys() & {name, *map(str, PurePosixPath(name).parents)}
        if both and (member.isdir() or both != {name}):
            raise InputError(f"{path} holds {printable(name)} below a file; download it again")

    def _add_folder(self, name: str) -> None:
        while name not in self.folders:
            self.folders[name] = set()
            above, _, last = name.rpartition("/")
            if above in self.folders:
                self.folders[above].add(last)
                return
            self._add_folder(above)
            self.folders[above].add(last)


def _check(path: Path, member: tarfile.TarInfo) -> None:
    """Refuse what no checkpoint has: links, devices, files with holes, names that lead out.

    Raises:
        InputError: The member is one of these.
    """
    check_member_name(path, member.name)
    if not (member.isdir() or member.isreg()) or member.issparse():
        kind = "link" if member.issym() or member.islnk() else "device or other special file"
        if member.issparse():
            kind = "file with holes"
        raise InputError(
            f"{path} holds {printable(member.name)}, a {kind}, which is not read from an archive; "
            "unpack it with `tar xf`, and give --ckpt the folder"
        )


def _members(path: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for count, member in enumerate(archive):
        if count >= _MOST_MEMBERS:
            raise InputError(f"{path} holds more files than any checkpoint; {UNPACK_IT}")
        _check(path, member)
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all that it has seen
        yield member


def _contents(path: Path) -> _Contents:
    about = path.stat()
    return _read_contents(str(path), about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read_contents(name: str, size: int, _changed: int) -> _Contents:
    """Return what is in the archive of this name, size and time of change.

    Raises:
        InputError: It is damaged, cut off, or holds what no checkpoint needs.
    """
    path, found = Path(name), _Contents()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in _members(path, archive):
                if member.offset_data + member.size > size:
                    raise InputError(
                        f"{path} is cut off: {printable(member.name)} ends beyond the file's "
                        f"{size} bytes; download it again"
                    )
                found.add(path, member)
    except InputError:
        raise
    except TAR_DAMAGE as error:
        raise InputError(f"{path} is damaged ({error}); download it again") from None
    return found


class _Counted:
    """A stream that ends with an error once it has given more than a number of bytes."""

    def __init__(self, stream: gzip.GzipFile, path: Path) -> None:
        self._stream, self._given, self._path = stream, 0, path
        self._most = most_unpacked(path)

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._given += len(data)
        if self._given > self._most:
            refuse_bomb(self._path, self._given)
        return data


def _unpack_gzip(path: Path) -> Path:
    """Return a folder with the files of a compressed archive.

    Raises:
        InputError: It is damaged, holds what no checkpoint needs, or unpacks to far too much.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        marks = stream.read(1 << 16)
        stream.seek(max(size - (1 << 16), 0))
        marks += stream.read()
    name = hashlib.sha256(f"tar {size} ".encode() + marks).hexdigest()[:24]

    def extract(folder: Path) -> None:
        try:
            with gzip.open(path) as inner:
                stream: Any = _Counted(inner, path)
                with tarfile.open(fileobj=stream, mode="r|") as archive:
                    for member in _members(path, archive):
                        _write(archive, member, folder / member.name)
        except InputError:
            raise
        except TAR_DAMAGE as error:
            raise InputError(f"{path} is damaged ({error}); download it again") from None

    return unpacked(path, name, size, extract)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    assert source is not None
    with source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 22)


class MemberPath(PosixPath):
    """A path to something in a tar archive, or to the archive's root.

    It reads as other paths do. What the operating system alone can do raises as for a path that
    leads through a file.
    """

    def place(self) -> tuple[Path, int]:
        """Return the archive, and the offset in it at which the file's bytes begin."""
        archive, name = self._split()
        return archive, self._file(archive, name)[0]

    def _split(self) -> tuple[Path, str]:
        """Return the archive and the name in it."""
        given = str(self)
        archive = _archive_of(given)
        inner = posixpath.normpath(os.path.relpath(given, archive))
        if inner.startswith(".."):
            raise FileNotFoundError(f"{given} leads out of its archive")
        return Path(archive), "" if inner == "." else inner

    def _file(self, archive: Path, name: str) -> tuple[int, int]:
        contents = _contents(archive)
        if name not in contents.files:
            code = errno.EISDIR if name in contents.folders else errno.ENOENT
            raise OSError(code, os.strerror(code), str(self))
        return contents.files[name]

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return the archive's own, with the size and the kind of the member."""
        archive, name = self._split()
        about = list(archive.stat())
        if name in _contents(archive).folders:
            about[stat.ST_MODE], about[stat.ST_SIZE] = stat.S_IFDIR | 0o555, 0
        else:
            size = self._file(archive, name)[1]
            about[stat.ST_MODE], about[stat.ST_SIZE] = stat.S_IFREG | 0o444, size
        return os.stat_result(about)

    def lstat(self) -> os.stat_result:
        """See `stat`: there are no links."""
        return self.stat()

    def exists(self, **_: Any) -> bool:
        """Whether the archive holds it."""
        return self.is_file() or self.is_dir()

    def is_file(self, **_: Any) -> bool:
        """Whether it is a file in the archive."""
        try:
            archive, name = self._split()
        except FileNotFoundError:
            return False
        return name in _contents(archive).files

    def is_dir(self, **_: Any) -> bool:
        """Whether it is a folder in the archive."""
        try:
            archive, name = self._split()
        except FileNotFoundError:
            return False
        return name in _contents(archive).folders

    def is_symlink(self) -> bool:
        """Return False: an archive with links is refused."""
        return False

    def resolve(self, strict: bool = False) -> MemberPath:
        """Return the same place, by the archive's absolute path."""
        archive, name = self._split()
        return type(self)(archive.resolve(strict), name)

    def iterdir(self) -> Generator[MemberPath, None, None]:
        """Yield what is in a folder of the archive."""
        archive, name = self._split()
        folders = _contents(archive).folders
        if name not in folders:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self))
        for entry in sorted(folders[name]):
            yield self / entry

    def open(self, mode: str = "r", buffering: int = -1, *_: Any, **__: Any) -> Any:
        """Return a stream of the file's bytes; only for reading, in binary mode."""
        if mode != "rb":
            raise io.UnsupportedOperation(f"{self} is opened for reading bytes only")
        archive, name = self._split()
        offset, size = self._file(archive, name)
        return io.BufferedReader(FileWindow(archive.open("rb"), offset, size, owner=True))

    def read_bytes(self) -> bytes:
        """Return the file's content."""
        with self.open("rb") as stream:
            content = stream.read()
        assert isinstance(content, bytes)
        return content


@functools.lru_cache(maxsize=1 << 16)
def _archive_of(path: str) -> str:
    """Return the file that a path leads through.

    Raises:
        FileNotFoundError: It leads through none.
    """
    for candidate in (path, *map(str, PurePosixPath(path).parents)):
        if os.path.isfile(candidate):
            return candidate
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
