"""The checkpoints that a training run keeps on its way, under one root like Megatron's own.

    OUTPUT/checkpoint-series/iter_0000100/...     one for each `--save-every`, and the last step
    OUTPUT/checkpoint-series/tokenizer/
    OUTPUT/checkpoint-series/latest_checkpointed_iteration.txt
    OUTPUT/state/series.json                      which iterations are this run's own

A folder is written under a hidden name and renamed when it is whole; the tracker names it after
that. Only what series.json names is ever removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mlm_eval.checkpoints.files.output import clear_leftovers, write_text
from mlm_eval.checkpoints.files.text_file import read_json_object
from mlm_eval.checkpoints.folders.checkpoint_files import foreign_files, remove_checkpoint
from mlm_eval.checkpoints.megatron.iteration import TRACKER, iteration_folder, write_tracker

SERIES = "checkpoint-series"
_WRITTEN, _REMOVED = ".writing", ".removed"


class CheckpointSeries:
    """The kept checkpoints of one run; rank 0."""

    def __init__(self, root: Path, notes: Path) -> None:
        """Remember the places; nothing is read or made.

        Args:
            root: The folder with the iterations.
            notes: The file with the numbers of this run's own ones.
        """
        self.root, self.notes = root, notes

    def own(self) -> list[int]:
        """Return the iterations that this run has written, or has begun to, in their order."""
        try:
            found = read_json_object(self.notes)["iterations"]
            return sorted(int(iteration) for iteration in found)
        except (ValueError, TypeError, KeyError, ArithmeticError):
            return []  # none, or damaged: then they are nobody's, and stay

    def held(self) -> list[int]:
        """Return those of them that are there: each is whole."""
        return [iteration for iteration in self.own() if self._folder(iteration).is_dir()]

    def add(self, iteration: int, write: Callable[[Path], None], *, keep: int | None) -> str | None:
        """Keep a checkpoint, and have the tracker name the latest; return a warning, if any.

        One that a killed run has written before stays as it is.

        Args:
            iteration: Its number.
            write: Called with a root to make, which gets `iter_*` and, if any, `tokenizer`.
            keep: Remove all of this run's own but so many of the latest; None: none.

        Raises:
            InputError: It cannot be written.
        """
        own, folder = self.own(), self._folder(iteration)
        if iteration not in own and os.path.lexists(folder):
            return f"{folder} is of another run, so this run's step {iteration:,} is not kept"
        if keep is None or sum(later > iteration for later in self.held()) < keep:
            self._note([*own, iteration])
            if not folder.is_dir():
                self._write(folder, write)
        held = self.held()
        tracker = self.root / TRACKER
        if not tracker.is_file() or tracker.read_text() != str(held[-1]):
            write_tracker(self.root, held[-1])
        for old in held[: -keep if keep else 0]:
            self._remove(old)
        return None

    def _write(self, folder: Path, write: Callable[[Path], None]) -> None:
        self.tidy()
        self.root.mkdir(parents=True, exist_ok=True)
        whole = self.root / _WRITTEN
        write(whole)
        if (whole / "tokenizer").is_dir() and not os.path.lexists(self.root / "tokenizer"):
            os.rename(whole / "tokenizer", self.root / "tokenizer")
        os.rename(whole / folder.name, folder)
        shutil.rmtree(whole)

    def _remove(self, iteration: int) -> None:
        """Remove an iteration at once, unless somebody has put something of their own into it."""
        folder, away = self._folder(iteration), self.root / _REMOVED
        if foreign_files(folder):
            return
        shutil.rmtree(away, ignore_errors=True)
        os.rename(folder, away)
        shutil.rmtree(away)

    def tidy(self) -> None:
        """Remove what a killed run has left unfinished.

        Raises:
            InputError: Another process writes there now.
        """
        if not self.root.is_dir():
            return
        clear_leftovers(self.root / _WRITTEN)
        for path in (self.root / _WRITTEN, self.root / _REMOVED):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.root.glob(f".{TRACKER}.partial-*"):
            path.unlink()

    def discard(self) -> None:
        """Remove this run's own checkpoints, and the root where nothing else is in it."""
        self.tidy()
        own = self.own()
        for iteration in own:
            if self._folder(iteration).is_dir():
                remove_checkpoint(self._folder(iteration))
        if own and self.root.is_dir():
            (self.root / TRACKER).unlink(missing_ok=True)
            if not any(self.root.glob("iter_*")):
                remove_checkpoint(self.root)
        self.notes.unlink(missing_ok=True)

    def _folder(self, iteration: int) -> Path:
        return self.root / iteration_folder(iteration)

    def _note(self, iterations: list[int]) -> None:
        text = json.dumps({"iterations": sorted(set(iterations))})
        write_text(self.notes, text, sync=True, option=None)
