"""The iterations below a checkpoint's root: which there are, which are finished, which are chosen.

An iteration is told by its folder's name: Megatron's and Megatron-Bridge's `iter_0001000` and
`release`, verl's `global_step_1000`, DeepSpeed's `global_step1000`, NeMo's `...step=1000...`,
transformers' `checkpoint-1000`. The tracker file names the latest one that is whole: what is newer
is being written, or was left by a run that died, and is never opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlm_eval.checkpoints.catalog import is_catalog_name, sample_folder
from mlm_eval.checkpoints.deepspeed.folder import LATEST
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.text_file import read_text
from mlm_eval.checkpoints.hub.download import hub_address
from mlm_eval.checkpoints.megatron.iteration import (
    RELEASE,
    TRACKER,
    TRAIN_STATE,
    find_iteration,
)

Iteration = int | str
"""A number, or `release`."""

_KINDS = (
    re.compile(r"iter_(\d{7,18})"),
    re.compile(r"global_step_?(\d{1,18})"),
    re.compile(r"checkpoint-(\d{1,18})"),
    re.compile(r"(?:.*[^A-Za-z])?step=(\d{1,18})(?!\d).*"),
)
_UNFINISHED = "-unfinished"
"""NeMo puts an empty file of this name beside what it is writing."""

_SHOWN = 12
"""Iterations that a message lists."""

_FORM = "all, latest, or numbers and ranges separated by commas: 1000,2000 or 1000:5000:500"


@dataclass(frozen=True)
class Choice:
    """What `--iterations` asks for."""

    text: str
    numbers: tuple[Iteration, ...] = ()
    """Those that must be there."""
    between: tuple[tuple[int, int], ...] = ()
    """First and last of ranges without a step: whatever lies in them."""

    @property
    def is_latest(self) -> bool:
        """Whether the newest is asked for."""
        return self.text == "latest"

    def takes(self, iteration: Iteration) -> bool:
        """Return whether an iteration is among those that are asked for, or may be the latest."""
        if self.text in ("all", "latest") or iteration in self.numbers:
            return True
        return any(
            isinstance(iteration, int) and first <= iteration <= last
            for first, last in self.between
        )


ALL = Choice("all")


def parse_iterations(text: str) -> Choice:
    """Return what `--iterations` asks for; the ends of a range are included.

    Raises:
        ValueError: It is of no known form.
    """
    text = text.strip()
    if text in ("all", "latest"):
        return Choice(text)
    numbers: list[Iteration] = []
    between: list[tuple[int, int]] = []
    for part in text.split(","):
        bounds = part.strip().split(":")
        if bounds == [RELEASE]:
            numbers.append(RELEASE)
            continue
        if not 1 <= len(bounds) <= 3 or not all(re.fullmatch(r"\d{1,18}", b) for b in bounds):
            raise ValueError(f"must be {_FORM}")
        first, *rest = map(int, bounds)
        if not rest:
            numbers.append(first)
            continue
        last = rest[0]
        if last < first or 0 in rest[1:]:
            raise ValueError("has a range that goes backwards or nowhere; give FIRST:LAST:STEP")
        if len(rest) == 1:
            between.append((first, last))
        else:
            if (last - first) // rest[1] > 1_000_000:
                raise ValueError("has a range of more than a million iterations")
            numbers += range(first, last + 1, rest[1])
    return Choice(text, tuple(dict.fromkeys(numbers)), tuple(between))


def told_iteration(folder: Path) -> Iteration | None:
    """Return the iteration that a folder's name tells; None: none."""
    if folder.name == RELEASE:
        return RELEASE
    for kind in _KINDS:
        if match := kind.fullmatch(folder.name):
            return int(match[1])
    return None


def root_folder(ckpt: str) -> Path:
    """Return the folder that a `--ckpt` names, whose iterations are asked for.

    Raises:
        InputError: It is none.
    """
    path = sample_folder(ckpt) or Path(ckpt).expanduser()
    if not path.is_dir() or is_catalog_name(ckpt):
        named = is_catalog_name(ckpt) or hub_address(ckpt) is not None
        what = "is one checkpoint" if named or path.exists() else "does not exist"
        raise InputError(
            f"{ckpt} {what}; --iterations and --watch want the folder that holds the iterations"
        )
    return path


@dataclass(frozen=True)
class RootIterations:
    """The iterations below a root."""

    root: Path
    folders: dict[Iteration, Path]
    """In order, `release` first."""
    tracked: Iteration | None
    """What the tracker file names; None without one."""

    def is_finished(self, iteration: Iteration, *, watched: bool = False) -> bool:
        """Return whether an iteration is whole, by the tracker; without one all are.

        While they are watched, none is whole before a tracker names one.
        """
        if self.tracked is None:
            return not watched
        if isinstance(self.tracked, int) and isinstance(iteration, int):
            return iteration <= self.tracked
        return iteration == self.tracked or iteration == RELEASE


def find_iterations(root: Path) -> RootIterations:
    """Return the iterations below a root, and which one its tracker names.

    Raises:
        InputError: The root cannot be read, or two folders tell one iteration.
    """
    folders: dict[Iteration, Path] = {}
    try:
        entries = sorted(root.iterdir())
        names = {entry.name for entry in entries}
        for entry in entries:
            iteration = told_iteration(entry)
            if iteration is None or not (entry.is_dir() or entry.suffix == ".nemo"):
                continue
            if entry.name + _UNFINISHED in names or entry.name.endswith(_UNFINISHED):
                continue
            other = folders.get(iteration)
            if other is not None and entry.name.endswith("-last"):  # NeMo's second copy
                continue
            if other is not None and not other.name.endswith("-last"):
                raise InputError(
                    f"{root} has two folders of iteration {iteration}, {other.name} and "
                    f"{entry.name}; give --ckpt one of them"
                )
            folders[iteration] = entry
    except OSError as error:
        raise InputError(f"{root} cannot be read ({error.strerror}); check --ckpt") from None
    order = sorted(folders, key=lambda i: (1, i) if isinstance(i, int) else (0, 0))
    return RootIterations(
        root, {iteration: folders[iteration] for iteration in order}, _tracked(root)
    )


def _tracked(root: Path) -> Iteration | None:
    """Return the iteration that a root's tracker names; None without a tracker that does."""
    try:
        if (root / TRACKER).is_file():
            text = read_text(root / TRACKER).strip()
            return RELEASE if text == RELEASE else int(text) if text.isdecimal() else None
        if (root / LATEST).is_file():
            return told_iteration(Path(read_text(root / LATEST).strip() or "-"))
        return told_iteration(find_iteration(root)) if (root / TRAIN_STATE).is_file() else None
    except (InputError, OSError, ValueError):
        return None  # replaced in this moment, or damaged


def chosen_iterations(
    found: RootIterations, choice: Choice, *, watched: bool = False
) -> list[Iteration]:
    """Return the finished iterations that are asked for, in order.

    Args:
        found: The iterations below a root.
        choice: What is asked for.
        watched: What is not there yet may come.

    Raises:
        InputError: One that is asked for is not there, or not finished; or there is none.
    """
    finished = [i for i in found.folders if found.is_finished(i, watched=watched)]
    if choice.is_latest:
        named = [i for i in finished if i == found.tracked]
        chosen = named or finished[-1:]
    else:
        chosen = [i for i in finished if choice.takes(i)]
    if watched:
        return chosen
    listed = f"it has {_listed(found.folders)}"
    missing = [i for i in choice.numbers if i not in found.folders]
    if not found.folders:
        one = " (it is one itself)" if told_iteration(found.root) is not None else ""
        raise InputError(
            f"{found.root} holds no folders of iterations{one}, such as iter_0001000; give --ckpt "
            "the folder that holds them, or leave out --iterations"
        )
    if missing:
        raise InputError(
            f"{found.root} has no iteration {_listed(missing)}; {listed}; correct --iterations"
        )
    for iteration in choice.numbers:
        if iteration not in finished:
            raise InputError(
                f"{found.folders[iteration]} is not finished: the tracker file of {found.root} "
                f"names {found.tracked}; wait for it, or give --ckpt that folder"
            )
    if not chosen:
        raise InputError(
            f"{found.root} has no finished iteration in --iterations {choice.text}; {listed}"
        )
    return chosen


def unfinished_iterations(found: RootIterations, choice: Choice) -> list[Iteration]:
    """Return those that would be taken if they were finished."""
    if choice.is_latest:
        return []
    return [i for i in found.folders if choice.takes(i) and not found.is_finished(i)]


def _listed(iterations: Iterable[Iteration]) -> str:
    shown = [str(iteration) for iteration in iterations]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
