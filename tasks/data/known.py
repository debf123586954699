"""The files and sets that the tasks want (files.toml), and whether given ones are among them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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
    """None: unknown."""
    sha256: str | None = None
    other: bool = False
    """Whether it is not the task's own file, but often taken for it."""
    published: str | None = None
    """Who gives bytes and sha256, where nobody here has read the file."""


@dataclass(frozen=True)
class KnownSet:
    """A set of a task's examples, whatever files it comes in."""

    task: str
    name: str
    """As the task's records name it."""
    examples: int
    sha256: str | None = None
    """Of its text, as the task's records state it; None: nobody here has read it."""
    published: str | None = None
    """Who gives the number of examples, where nobody here has counted them."""


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


@cache
def known_files() -> tuple[KnownFile, ...]:
    """Return all files of the table."""
    return tuple(KnownFile(**{**e, "urls": tuple(e.get("urls", ()))}) for e in _table()["file"])


@cache
def known_sets(task: str) -> dict[str, KnownSet]:
    """Return the sets of a task by name."""
    sets = (KnownSet(**entry) for entry in _table()["set"] if entry["task"] == task)
    return {known.name: known for known in sets}


def known_tasks() -> list[str]:
    """Return what the table knows files of, in its order."""
    return list(dict.fromkeys(file.task for file in known_files()))


def files_of(task: str) -> list[KnownFile]:
    """Return the files that a task wants."""
    return [file for file in known_files() if file.task == task and not file.other]


@dataclass(frozen=True)
class Checked:
    """What became of the comparison of a file or a set with those of a task."""

    path: Path
    name: str | None
    """The file or set that it is; None: none that is known."""
    wanted: bool | None
    """Whether it is what the task wants; None: there is nothing to compare it with."""
    verdict: str
    """One sentence without its subject."""


def check_file(path: Path, task: str) -> Checked:
    """Return whether a file is one that a task wants; only one of its kind can be the wrong one.

    Raises:
        InputError: It cannot be read, or is not the file but a pointer or page in its place.
    """
    seen = [file for file in known_files() if file.task == task and file.sha256 is not None]
    content = read_bytes(path)
    digest = sha256([content])
    found = f"{len(content):,} bytes, sha256 {digest[:12]}..."
    if not seen:
        return Checked(path, None, None, f"cannot be told: no file of {task} is known ({found})")
    for file in seen:
        if file.sha256 == digest:
            wants = "; ".join(f.what for f in files_of(task))
            end = f", not what {task} wants ({wants})" if file.other else ""
            return Checked(path, file.name, not file.other, f"is {file.name}, {file.what}{end}")
    plain = sha256([content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")])
    for file in seen:
        if file.sha256 == plain:
            verdict = (
                f"is {file.name}, {file.what}, with other line ends or a byte order mark, "
                f"which are taken off where it is read ({found})"
            )
            return Checked(path, file.name, not file.other, verdict)
    kind = path.suffix.lower()
    alike = [file for file in seen if not file.other and kind in ("", Path(file.name).suffix)]
    if not alike:
        verdict = f"cannot be told: no {kind} file of {task} is known ({found})"
        return Checked(path, None, None, verdict)
    wanted = _nearest(path, alike)
    assert wanted.bytes is not None and wanted.sha256 is not None
    verdict = (
        f"is no file that is known here ({found}); {wanted.name} ({wanted.what}) has "
        f"{wanted.bytes:,} bytes and sha256 {wanted.sha256[:12]}..."
    )
    return Checked(path, None, False, verdict)


def check_set(path: Path, task: str, name: str, examples: int, digest: str) -> Checked:
    """Return whether a set of examples is one that a task wants.

    Args:
        path: Where it was read.
        task: The task.
        name: Of the set.
        examples: How many it has.
        digest: sha256 of its text.
    """
    known = known_sets(task).get(name)
    found = f"{name}: {examples:,} examples"
    if known is None:
        names = ", ".join(known_sets(task)) or "none"
        verdict = f"holds {found}, with nothing to compare them with (sets of {task}: {names})"
        return Checked(path, None, None, verdict)
    if examples != known.examples:
        verdict = f"holds {found}, where {task.upper()} has {known.examples:,}"
        return Checked(path, None, False, verdict)
    if known.sha256 is None:
        verdict = f"holds {found}, as many as {known.published} gives; their text was not read here"
        return Checked(path, name, True, verdict)
    if digest != known.sha256:
        verdict = (
            f"holds {found}, as many as {task.upper()} has, but another text "
            f"(sha256 {digest[:12]}...)"
        )
        return Checked(path, None, False, verdict)
    return Checked(path, name, True, f"holds {found}, those of {task.upper()}")


def _nearest(path: Path, alike: Iterable[KnownFile]) -> KnownFile:
    """Return the file that a name or a size is meant to be."""
    size = path.stat().st_size
    return min(
        alike,
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
    """Return the known files of a task in a folder, each with its verdict; none: it has none."""
    names = dict.fromkeys(file.name for file in files_of(task))
    return [check_file(path / name, task) for name in names if (path / name).is_file()]
