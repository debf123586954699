"""The files that the tasks want (files.toml), and whether a given file is one of them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.text_file import read_bytes
from mlm_eval.tasks.data.text import sha256

TABLE = Path(__file__).with_name("files.toml")


@dataclass(frozen=True)
class KnownFile:
    """A published file."""

    task: str
    """`wikitext103`, ..., or `tokenizer` for what several tasks want."""
    name: str
    what: str
    hub: str | None = None
    """The same data as a `datasets` name."""
    urls: tuple[str, ...] = ()
    source: str | None = None
    """Where the address is given."""
    bytes: int | None = None
    """None: nobody here has read the file."""
    sha256: str | None = None
    other: bool = False
    """Whether it is not the task's own file, but often taken for it."""


@cache
def known_files() -> tuple[KnownFile, ...]:
    """Return all files of the table."""
    entries: list[dict[str, Any]] = tomllib.loads(TABLE.read_text(encoding="utf-8"))["file"]
    return tuple(KnownFile(**{**e, "urls": tuple(e.get("urls", ()))}) for e in entries)


def known_tasks() -> list[str]:
    """Return what the table knows files of, in its order."""
    return list(dict.fromkeys(file.task for file in known_files()))


def files_of(task: str) -> list[KnownFile]:
    """Return the files that a task wants."""
    return [file for file in known_files() if file.task == task and not file.other]


@dataclass(frozen=True)
class Checked:
    """What became of the comparison of a file with those of a task."""

    path: Path
    known: KnownFile | None
    """The file that it is."""
    verdict: str
    """One sentence."""

    @property
    def differs(self) -> bool:
        """Whether it is not what the task wants, as far as can be told."""
        return self.known is None or self.known.other


def check_file(path: Path, task: str) -> Checked | None:
    """Return whether a file is one that a task wants; None where nothing is known of the task's.

    Raises:
        InputError: It cannot be read, or is not the file but a pointer or page in its place.
    """
    seen = [file for file in known_files() if file.task == task and file.sha256 is not None]
    if not seen:
        return None
    content = read_bytes(path)
    digest = sha256([content])
    for file in seen:
        if file.sha256 == digest:
            wanted = next((f for f in seen if not f.other), file)
            end = f", not the file that {task} wants ({wanted.what})" if file.other else ""
            return Checked(path, file, f"is {file.name}, {file.what}{end}")
    found = f"{len(content):,} bytes, sha256 {digest[:12]}..."
    plain = sha256([content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")])
    for file in seen:
        if file.sha256 == plain:
            return Checked(
                path,
                file,
                f"is {file.name}, {file.what}, with other line ends or a byte order mark, "
                f"which are taken off where it is read ({found})",
            )
    wanted = _nearest(path, seen)
    assert wanted.bytes is not None and wanted.sha256 is not None
    return Checked(
        path,
        None,
        f"is no file that is known here ({found}); {wanted.name}, {wanted.what}, has "
        f"{wanted.bytes:,} bytes and sha256 {wanted.sha256[:12]}...",
    )


def _nearest(path: Path, seen: Iterable[KnownFile]) -> KnownFile:
    """Return the file that a name or a size is meant to be."""
    size = path.stat().st_size
    return min(
        (file for file in seen if not file.other),
        key=lambda file: (file.name != path.name, abs((file.bytes or 0) - size)),
    )


def local_hint(dataset: str) -> str:
    """Return how to get the data of a `datasets` name without a network.

    Args:
        dataset: Its path, without a configuration.
    """
    tasks = [f.task for f in known_files() if f.hub and f.hub.partition(":")[0] == dataset]
    if not tasks:
        return "give a local file with --data (`mlm-eval data` lists those of the tasks)"
    names = ", ".join(file.name for file in files_of(tasks[0]))
    return (
        f"give a local file with --data ({names}; `mlm-eval data {tasks[0]}` says where to get it)"
    )


def check_folder_of(path: Path, task: str) -> list[Checked]:
    """Return the known files of a task in a folder, each with its verdict.

    Raises:
        InputError: It holds none of them.
    """
    found = [path / file.name for file in files_of(task) if (path / file.name).is_file()]
    if not found:
        names = ", ".join(file.name for file in files_of(task))
        raise InputError(f"{path} holds none of {names}; name a file")
    return [checked for file in found if (checked := check_file(file, task)) is not None]
