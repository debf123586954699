"""Where archives are unpacked that cannot be read where they are: once, whole or not at all."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import cache_root
from mlm_eval.checkpoints.files.safe_pickle import printable
from mlm_eval.checkpoints.folders.unfinished import unfinished

TAR_DAMAGE: tuple[type[Exception], ...] = (
    *(tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile),
    *(EOFError, ValueError, OverflowError),
    RecursionError,  # headers of long names before one another
)
"""What reading a damaged tar archive raises, compressed in any way."""

TAR_FAULTS: tuple[type[Exception], ...] = (OSError, *TAR_DAMAGE)
"""The same, and what a file that cannot be read raises."""

UNPACK_IT = "unpack it yourself and give --ckpt the folder"


def unpacked(path: Path, name: str, need: int, extract: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache with what is in an archive, which is made if need be.

    Args:
        path: The archive, for messages.
        name: Follows from what is in the archive, so that a second call finds it.
        need: Bytes that it takes.
        extract: Writes everything into the folder that it is given.

    Raises:
        InputError: There is no room for it, or nowhere to write.
    """
    folder = _cache() / "unpacked" / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < need:
            raise InputError(
                f"{path} needs {need / 1e9:.1f} GB to be unpacked, {folder.parent} has "
                f"{free / 1e9:.1f} GB free; make room, set XDG_CACHE_HOME to another folder, or "
                f"{UNPACK_IT}"
            )
        # Ranks may unpack at the same time: each into its own folder, the first rename wins.
        partial = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"{path} cannot be unpacked into {folder.parent} ({error.strerror}); {UNPACK_IT}"
        ) from None
    try:
        with unfinished(partial):
            extract(partial)
            os.replace(partial, folder)
    except OSError as error:
        if not folder.is_dir():
            raise InputError(
                f"{path} cannot be unpacked into {folder.parent} ({error.strerror}); {UNPACK_IT}"
            ) from None
    return folder


LARGEST_RATIO = 20
"""A compressed archive may unpack to so many times its size, and 64 MB: weights shrink little."""


def most_unpacked(path: Path) -> int:
    """Return the bytes that an archive may unpack to."""
    return LARGEST_RATIO * path.stat().st_size + (1 << 26)


def refuse_bomb(path: Path, need: int) -> None:
    """Refuse an archive that unpacks to far more than weights do.

    Args:
        path: The archive.
        need: Bytes that it unpacks to, or has unpacked to so far.

    Raises:
        InputError: That is too much.
    """
    if need > most_unpacked(path):
        raise InputError(
            f"{path} unpacks to more than {LARGEST_RATIO} times its size, which weights do not; if "
            f"you trust it, {UNPACK_IT}"
        )


MOST_FOLDERS = 64
"""Folders that a name in an archive may lead through."""


def check_member_name(path: Path, name: str) -> None:
    """Refuse the name of a file in an archive that leads out of the folder it is unpacked into.

    Raises:
        InputError: It is absolute, goes up, is nested without end, or is no name of a file.
    """
    parts = PurePosixPath(name)
    unsafe = parts.is_absolute() or ".." in parts.parts or "\\" in name
    if unsafe or len(parts.parts) > MOST_FOLDERS:
        raise InputError(
            f"{path} holds the unsafe name {printable(name)}, so it is not "
            "unpacked; get the archive from its source again"
        )


def only_folder(folder: Path, *, stop: str) -> Path:
    """Return the folder below which all of it stands, where that is in single sub-folders.

    Args:
        folder: What is in an archive.
        stop: How the name of a folder begins that is a part of a checkpoint.
    """
    while True:
        entries = list(folder.iterdir())
        if len(entries) != 1 or not entries[0].is_dir() or entries[0].name.startswith(stop):
            return folder
        folder = entries[0]


def _cache() -> Path:
    """Return a folder for unpacked archives: the user's cache, else one among temporary files.

    Raises:
        InputError: Neither can be written.
    """
    try:
        cache = cache_root()
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache
    except OSError:
        pass  # a home that is read-only, or none
    fallback = Path(tempfile.gettempdir()) / f"mlm-eval-{os.getuid()}"
    try:
        fallback.mkdir(mode=0o700, exist_ok=True)
        if fallback.stat().st_uid == os.getuid():  # else another user's files would be read
            return fallback
    except OSError:
        pass
    raise InputError(
        f"neither the cache folder nor {fallback} can be written, and an archive is unpacked "
        "there; set XDG_CACHE_HOME to a folder with room, or unpack the archive yourself"
    )
