"""The checkpoints of a series: chosen by `--ckpt` and `--iterations`, in order, and opened."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.catalog import is_catalog_name, resolve, sample_folder
from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.stand_in import describe_missing
from mlm_eval.checkpoints.hub.download import hub_address
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.series.iterations import (
    Choice,
    Iteration,
    chosen_iterations,
    find_iterations,
    root_folder,
    told_iteration,
    unfinished_iterations,
)
from mlm_eval.series.names import unique_names

_ABOVE = 4
"""Folders above the weights whose name may tell the iteration."""


@dataclass(frozen=True)
class Member:
    """One checkpoint of a series."""

    path: str
    """What is opened."""
    root: str
    """The `--ckpt` that it belongs to."""
    iteration: Iteration | None
    """None: it is known once the checkpoint is open, if at all."""
    name: str | None
    """Of its root in the names of records; None where there is one `--ckpt`."""

    @property
    def label(self) -> str:
        """What messages call it."""
        called = [] if self.name is None else [self.name]
        if isinstance(self.iteration, int):
            called.append(f"iteration {self.iteration:,}")
        elif self.iteration is not None:
            called.append(self.iteration)
        return ", ".join(called) or self.path

    def opened(self, overrides: Mapping[str, Any]) -> Checkpoint:
        """Return the checkpoint, with its iteration: first what the folder's name tells.

        Raises:
            InputError: As `open_checkpoint`.
        """
        checkpoint = open_checkpoint(self.path, overrides)
        found = checkpoint.provenance
        above = map(told_iteration, itertools.islice(found.path.parents, _ABOVE))
        told = (self.iteration, told_iteration(found.path), found.iteration, *above)
        iteration = next((i for i in told if i is not None), None)
        return dataclasses.replace(
            checkpoint, provenance=dataclasses.replace(found, iteration=iteration)
        )


class Members:
    """What `--ckpt`, `--iterations` and `--watch` choose."""

    def __init__(self, ckpts: Sequence[str], choice: Choice | None, *, watched: bool) -> None:
        """Choose names for the roots.

        Args:
            ckpts: The `--ckpt`, one or several.
            choice: Of iterations below each; None: each is one checkpoint.
            watched: Iterations that are not there yet may come.

        Raises:
            InputError: Two are the same, or one is no folder of iterations.
        """
        self.ckpts, self.choice, self.watched = list(ckpts), choice, watched
        places = [os.path.realpath(os.path.expanduser(ckpt)) for ckpt in ckpts]
        for ckpt, place in zip(ckpts, places, strict=True):
            if places.count(place) > 1:
                raise InputError(f"--ckpt {ckpt} is given twice; give each checkpoint once")
        self.names: list[str | None] = [None] * len(self.ckpts)
        if len(self.ckpts) > 1:
            self.names = list(unique_names([_naming_root(ckpt) for ckpt in ckpts]))

    def now(self) -> list[Member]:
        """Return the checkpoints that there are at this moment.

        Raises:
            InputError: One that is asked for is not there.
        """
        members = []
        for ckpt, name in zip(self.ckpts, self.names, strict=True):
            if self.choice is None:
                _check_there(ckpt)
                members.append(Member(ckpt, ckpt, None, name))
                continue
            found = find_iterations(root_folder(ckpt))
            for iteration in chosen_iterations(found, self.choice, watched=self.watched):
                members.append(Member(str(found.folders[iteration]), ckpt, iteration, name))
        return members

    def unfinished(self) -> list[str]:
        """Return, a phrase each, what is left out because no tracker says that it is whole."""
        if self.choice is None:
            return []
        phrases = []
        for ckpt in self.ckpts:
            found = find_iterations(root_folder(ckpt))
            for iteration in unfinished_iterations(found, self.choice):
                phrases.append(
                    f"{found.folders[iteration]} is left out: the tracker file names "
                    f"{found.tracked}, so that it is not finished"
                )
        return phrases


def _check_there(ckpt: str) -> None:
    """Refuse a checkpoint that is not there, before hours are spent on the others.

    Raises:
        InputError: It is not.
    """
    path = resolve(ckpt)[1] if is_catalog_name(ckpt) else sample_folder(ckpt)
    path = path or Path(ckpt).expanduser()
    if hub_address(ckpt) is None and not path.exists():
        raise InputError(
            f"{describe_missing(path)}; give --ckpt the folder or file of a checkpoint"
        )


def _naming_root(ckpt: str) -> str:
    """Return the path that a checkpoint's name is made of: without the folder of its iteration."""
    path = Path(ckpt)
    while told_iteration(path) is not None or path.name.startswith("mp_rank_"):
        path = Path(os.path.abspath(path)).parent
    return str(path)
