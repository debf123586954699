"""Published zip archives (NVIDIA's NGC files): a checkpoint folder inside one zip file."""

from __future__ import annotations

import hashlib
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

from mlm_eval.checkpoints.archives.unpacking import (
    UNPACK_IT,
    check_member_name,
    only_folder,
    refuse_bomb,
    unpacked,
)
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safe_pickle import printable

_DAMAGE = (zipfile.BadZipFile, struct.error, ValueError, RuntimeError)
"""What zipfile raises of damage: RuntimeError of an encrypted entry and of unknown versions."""


def is_archive(path: Path) -> bool:
    """Whether `path` is a zip file of checkpoint files, and not itself a torch.save archive."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except _DAMAGE:
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
            check_member_name(path, member.filename)
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(
                    f"{path} holds {printable(member.filename)} in a compression that no archive "
                    f"of a checkpoint has; {UNPACK_IT}"
                )
        key = repr([(m.filename, m.file_size, m.CRC) for m in members]).encode()
        need = sum(member.file_size for member in members)
        refuse_bomb(path, need)

        def extract(folder: Path) -> None:
            _extract(archive, members, folder, path)

        return only_folder(
            unpacked(path, hashlib.sha256(key).hexdigest()[:24], need, extract), stop="mp_rank_"
        )


def _extract(
    archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], folder: Path, path: Path
) -> None:
    try:
        for member in members:
            target = folder / member.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 22)
    except (*_DAMAGE, zlib.error, EOFError) as error:
        raise InputError(f"{path} is damaged ({error}); download it again") from None
