"""Output that is there whole or not at all: written next to the target, renamed at the end.

Also the folder for what can be made again, `cache_root`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.folders.checkpoint_files import (
    foreign_files,
    remove_checkpoint,
    saved_steps,
    weight_files,
)
from mlm_eval.checkpoints.folders.locks import Lock
from mlm_eval.checkpoints.folders.unfinished import forget_unfinished, unfinished

STDOUT = Path("-")
"""How the options that name a file spell stdout."""


@contextmanager
def output_folder(
    target: Path,
    *,
    overwrite: bool = False,
    needs: int = 0,
    sources: Iterable[Path] = (),
    finish: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Yield an empty folder next to `target`, renamed to `target` when the block succeeds.

    A block that raises, and a signal that ends this process, leave the target as it was. A killed
    process leaves a hidden folder `.NAME.partial-*` next to it, never a target with half of the
    files; the next call for this target removes it, and gives back an earlier checkpoint that was
    on its way out.

    Args:
        target: The folder to create, with its parents.
        overwrite: Replace an existing checkpoint. A folder that holds anything else is never
            replaced.
        needs: Bytes about to be written.
        sources: Files that are being read: the target must hold none of them.
        finish: Called with the complete folder before it is renamed.

    Raises:
        InputError: The target exists, cannot be written, or there is no room; or another process
            is writing it.
    """
    target = target.expanduser().resolve()
    if any(file.resolve().is_relative_to(target) for file in sources):
        raise InputError(
            f"{target} holds the checkpoint that is being converted; choose another output folder"
        )
    try:
        clear_leftovers(target)
        check_folder(target, overwrite=overwrite)
        partial = _beside(target, "partial")
        partial.mkdir(parents=True)
        lock = Lock(partial)
    except OSError as error:
        raise InputError(
            f"{target} cannot be written ({error.strerror}); choose another output folder"
        ) from None
    try:
        with unfinished(partial):
            free = shutil.disk_usage(partial).free
            if free < needs:
                raise InputError(
                    f"{target} needs {needs / 1e9:.2f} GB where its disk has {free / 1e9:.2f} GB "
                    "free; make room or choose another output folder"
                )
            with _noticing_removal(partial, target):
                yield partial
                if finish is not None:
                    finish(partial)
            check_folder(target, overwrite=overwrite)  # it may have come meanwhile
            forget_unfinished(partial)  # whole: not to go after what it replaces
            _replace(partial, target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        raise InputError(
            f"{target} could not be written completely ({error.strerror}); nothing was left "
            "there, make room or choose another output folder"
        ) from None
    finally:
        lock.release()


@contextmanager
def _noticing_removal(partial: Path, target: Path) -> Iterator[None]:
    """Say what has happened where another process removes what is being written.

    Raises:
        InputError: The folder is gone.
    """
    try:
        yield
    except InputError:
        raise
    except Exception:
        if partial.is_dir():
            raise
    if not partial.is_dir():
        raise InputError(
            f"{target.parent} was removed or renamed while {target.name} was written there; give "
            "an output folder that stays"
        )


@contextmanager
def atomic_file(target: Path, *, sync: bool = False, option: str | None = None) -> Iterator[Path]:
    """Yield a path next to `target` to write to, renamed to `target` when the block succeeds.

    A block that raises, and a signal that ends this process, leave the target as it was. A killed
    process leaves a hidden file `.NAME.partial-*`, without the target's suffix. A symbolic link
    stays: what it leads to is replaced. A pipe, a device or a descriptor (`is_stream`) gets the
    contents at the end; `-` is stdout.

    Args:
        target: The file to create or replace; its folders are created.
        sync: Have the contents reach the disk before the rename.
        option: The command line's option that names the file.

    Raises:
        InputError: The file cannot be written; without `option` an OSError instead.
    """
    stream = is_stream(target)
    target = target if stream else Path(os.path.realpath(target))
    partial = _beside(Path(tempfile.gettempdir(), "stream") if stream else target, "partial")
    try:
        if not stream:
            target.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(partial):
            yield partial
            if target == STDOUT:
                sys.stdout.flush()
                sys.stdout.buffer.write(partial.read_bytes())
                sys.stdout.buffer.flush()
                return
            if stream:
                with partial.open("rb") as source, target.open("ab") as sink:
                    shutil.copyfileobj(source, sink)
                return
            if sync:
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())
            os.replace(partial, target)
    except OSError as error:
        if option is None:
            raise
        raise InputError(
            f"{target} cannot be written ({error.strerror}); name another file with {option}"
        ) from error


def check_writable(target: Path, option: str) -> None:
    """Refuse a place for a file before the work, not after it.

    Args:
        target: The file.
        option: The command line's option that names it.

    Raises:
        InputError: `write_text` could not write there.
    """
    if target == STDOUT:
        return
    stream = is_stream(target)
    place = Path(os.path.realpath(target)).parent
    while not place.exists():  # missing folders will be made
        place = place.parent
    reason = None
    if stream:
        reason = None if os.access(target, os.W_OK) else "no permission to write to it"
    elif target.is_dir():
        reason = "it is a folder"
    elif not place.is_dir():
        reason = f"{place} is not a folder"
    elif not os.access(place, os.W_OK):
        reason = f"no permission to write in {place}"
    if reason is not None:
        raise InputError(f"{target} cannot be written: {reason}; name another place with {option}")


def is_stream(target: Path) -> bool:
    """Return whether a path leads to a pipe, a device or an open descriptor such as /dev/stdout.

    `-` is stdout.

    Such a thing can only be written to: a rename would put a file in its place. A descriptor counts
    even where it is a regular file, which its owner goes on writing.
    """
    if target == STDOUT:
        return True
    place = Path(os.path.abspath(target))
    for _ in range(40):  # as many links as Linux follows
        if place.is_relative_to("/proc") or place.is_relative_to("/dev/fd"):
            return True
        if not place.is_symlink():
            break
        place = Path(os.path.abspath(place.parent / os.readlink(place)))
    return place.exists() and not place.is_file() and not place.is_dir()


def write_text(
    path: str | Path, content: str, *, sync: bool = False, option: str | None = "--output"
) -> Path:
    """Write a file in UTF-8 and return its path; see `atomic_file`.

    Raises:
        InputError: The file cannot be written; without `option` an OSError instead.
    """
    target = Path(path)
    with atomic_file(target, sync=sync, option=option) as partial:
        partial.write_text(content, encoding="utf-8")
    return target


def cache_root() -> Path:
    """Return the folder for what can be made again, `$XDG_CACHE_HOME/mlm-eval`.

    Without that variable it is `~/.cache/mlm-eval`.

    Raises:
        FileNotFoundError: This user has no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # unset or relative, which the XDG standard says to ignore
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            raise FileNotFoundError("there is no home folder") from None
    return base / "mlm-eval"


def check_folder(target: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder for a checkpoint that stands and may not be replaced.

    Args:
        target: The folder.
        overwrite: Replace a checkpoint: a folder with nothing else in it.

    Raises:
        InputError: It is there and not empty; or, with `overwrite`, more than one checkpoint.
    """
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise InputError(f"{target} already exists; choose another output folder")
    if not overwrite:
        raise InputError(
            f"{target} already exists; choose another output folder, or replace the checkpoint in "
            "it with --overwrite"
        )
    if not weight_files(target):
        names = sorted(entry.name for entry in target.iterdir())
        raise InputError(
            f"{target} holds no checkpoint (found {', '.join(names[:3])}), so it is not replaced; "
            "choose another output folder"
        )
    if foreign := foreign_files(target):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise InputError(
            f"{target} holds {foreign[0]}{more}, which is no part of a checkpoint, so it is not "
            "replaced; move that away, or choose another output folder"
        )
    if len(steps := saved_steps(target)) > 1:
        raise InputError(
            f"{target} holds {len(steps)} checkpoints ({steps[0]} to {steps[-1]}), and --overwrite "
            "replaces one; remove them yourself, or choose another output folder"
        )


def clear_leftovers(target: Path) -> None:
    """Remove what killed processes have left beside a target; put back what they had moved away.

    Raises:
        InputError: Another process writes the target now.
    """
    name = re.escape(target.name)
    number = "[0-9a-f]{12}"
    unfinished = re.compile(
        rf"\.{name}\.partial-{number}|\.\.{name}\.partial-{number}\.partial-{number}"
    )
    replaced = re.compile(rf"\.{name}\.old-{number}")
    beside = list(target.parent.iterdir()) if target.parent.is_dir() else []
    for path in beside:
        if path.is_dir() and not path.is_symlink() and unfinished.fullmatch(path.name):
            try:
                lock = Lock(path)
            except FileNotFoundError:
                continue
            except BlockingIOError:
                raise InputError(
                    f"{target} is being written by another process ({path.name}); wait for its "
                    "end, or choose another output folder"
                ) from None
            if lock.sure:
                shutil.rmtree(path, ignore_errors=True)
            lock.release()
    old = sorted((path for path in beside if replaced.fullmatch(path.name)), key=_changed)
    if old and not os.path.lexists(target):
        os.replace(old.pop(), target)
    for path in old:
        remove_checkpoint(path)


def set_aside(target: Path) -> Path:
    """Rename a folder to `NAME.kept-1`, or the next such name that is free; return its path."""
    number = 1
    while os.path.lexists(kept := target.with_name(f"{target.name}.kept-{number}")):
        number += 1
    os.replace(target, kept)
    return kept


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def _replace(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; what was there moves aside first and is removed last."""
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(partial, target)
        return
    old = _beside(target, "old")
    os.replace(target, old)
    os.replace(partial, target)
    remove_checkpoint(old)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}-{uuid.uuid4().hex[:12]}")


class ByteMeter:
    """Adds up the bytes written, and reports (written, in all) after each piece."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self.total, self.on_progress, self.done = total, on_progress, 0

    def add(self, count: int) -> None:
        """Report `count` more bytes."""
        self.done += count
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)
