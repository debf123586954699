"""Published zip archives (NVIDIA's NGC files): a checkpoint folder inside one zip file."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import cache_root
from mlm_eval.checkpoints.files.safe_pickle import printable
from mlm_eval.checkpoints.folders.unfinished import unfinished


def is_archive(path: Path) -> bool:
    """Whether `path` is a zip file of checkpoint files, and not itself a torch.save archive."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False  # what reads a torch.save archive says what is wrong with it
    return not any(f"/{name}".endswith("/data.pkl") for name in names)


def unpack(path: Path) -> Path:
    """Return a folder with the archive's files, unpacked once into the cache.

    The weights inside are compressed, so they cannot be mapped where they are. The folder's name
    follows from the archive's own sizes and CRCs; a second call finds it. Nothing outside of it is
    written: names that would leave the folder are refused.

    Raises:
        InputError: The archive is damaged, holds no checkpoint, or there is no room for it.
    """
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if not any(member.filename.endswith((".pt", ".safetensors")) for member in members):
            found = printable(", ".join(member.filename for member in members[:3])) or "nothing"
            raise InputError(
                f"{path} is a zip archive without a checkpoint in it (found {found}); give --ckpt "
                "the archive or folder of a checkpoint"
            )
        for member in members:
            name = PurePosixPath(member.filename)
            if name.is_absolute() or ".." in name.parts or "\\" in member.filename:
                raise InputError(
                    f"{path} holds the unsafe name {printable(member.filename)}, so it is not "
                    "unpacked; get the archive from its source again"
                )
        key = repr([(m.filename, m.file_size, m.CRC) for m in members]).encode()
        folder = _cache() / "unpacked" / hashlib.sha256(key).hexdigest()[:24]
        if not folder.is_dir():
            _extract(archive, members, folder, path)
    return _checkpoint_folder(folder)


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
        f"neither the cache folder nor {fallback} can be written, and a zip archive is unpacked "
        "there; set XDG_CACHE_HOME to a folder with room, or unpack the archive yourself"
    )


def _extract(
    archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], folder: Path, path: Path
) -> None:
    need = sum(member.file_size for member in members)
    advice = "unpack it yourself and give --ckpt the folder"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < need:
            raise InputError(
                f"{path} needs {need / 1e9:.1f} GB to be unpacked, {folder.parent} has "
                f"{free / 1e9:.1f} GB free; make room, set XDG_CACHE_HOME to another folder, or "
                f"{advice}"
            )
        # Ranks may unpack at the same time: each into its own folder, the first rename wins.
        partial = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"{path} cannot be unpacked into {folder.parent} ({error.strerror}); {advice}"
        ) from None
    try:
        with unfinished(partial):
            for member in members:
                target = partial / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 22)
            os.replace(partial, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path} is damaged ({error}); download it again") from None
    except OSError as error:
        if not folder.is_dir():
            raise InputError(
                f"{path} cannot be unpacked into {folder.parent} ({error.strerror}); {advice}"
            ) from None


def _checkpoint_folder(folder: Path) -> Path:
    """Step into single sub-folders until something other than one folder is there."""
    while True:
        entries = list(folder.iterdir())
        if len(entries) != 1 or not entries[0].is_dir() or entries[0].name.startswith("mp_rank_"):
            return folder
        folder = entries[0]
