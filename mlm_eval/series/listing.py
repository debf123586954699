"""The list of a series' records, kept up to date while it runs; see `reporting/series_list.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import write_text
from mlm_eval.engine.resume import as_json, run_difference
from mlm_eval.reporting.environment import run_record
from mlm_eval.reporting.results import versions, write_json
from mlm_eval.reporting.series_list import ENTRIES, read_series
from mlm_eval.series.iterations import Iteration


class SeriesList:
    """The list in its file; rank 0."""

    def __init__(
        self, path: Path, task: str, settings: Mapping[str, Any], *, overwrite: bool
    ) -> None:
        """Take over the entries of an earlier list of the same settings.

        Args:
            path: The file.
            task: The command.
            settings: What all records have in common, as JSON values.
            overwrite: Forget an earlier list of other settings.

        Raises:
            InputError: There is an earlier list, of other settings.
        """
        self.path, self.task = path, task
        self.settings = as_json(settings)
        self.entries: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        earlier = read_series(path)
        if earlier is None:
            return
        before = {"task": earlier["task"], "settings": _deciding(earlier.get("settings"))}
        now = {"task": task, "settings": _deciding(self.settings)}
        if before == now:
            self.entries = [e for e in earlier[ENTRIES] if (path.parent / e["record"]).exists()]
        elif not overwrite:
            raise InputError(
                f"{path} lists a series of other settings: {run_difference(before, now)}; replace "
                "it with --overwrite, or name another --output"
            )

    def entry(self, record: Path) -> dict[str, Any] | None:
        """Return the entry of a record."""
        return next((e for e in self.entries if e["record"] == record.name), None)

    def add(self, record: Path, entry: Mapping[str, Any]) -> None:
        """Put a record into the list, and write it."""
        self.entries = [e for e in self.entries if e["record"] != record.name]
        self.entries.append({**entry, "record": record.name})
        self.failed = [e for e in self.failed if e["checkpoint"] != entry["checkpoint"]]
        self._write()

    def fail(self, checkpoint: str, iteration: Iteration | None, error: str) -> None:
        """Note a checkpoint that could not be evaluated; a list of such alone is not written."""
        self.failed.append({"checkpoint": checkpoint, "iteration": iteration, "error": error})
        if self.entries:
            self._write()

    def _write(self) -> None:
        names = list(dict.fromkeys(entry.get("name") for entry in self.entries))

        def place(entry: Mapping[str, Any]) -> tuple[int, int, int]:
            iteration = entry["iteration"]
            number = iteration if isinstance(iteration, int) else -1
            return names.index(entry.get("name")), iteration is None, number

        self.entries.sort(key=place)
        record = {
            "task": self.task,
            "settings": self.settings,
            "versions": versions(),
            "run": run_record(),
            ENTRIES: self.entries,
            "failed": self.failed,
        }
        if self.path.suffix == ".jsonl":  # a line, like what its readers expect
            write_text(self.path, json.dumps(record, ensure_ascii=False) + "\n")
        else:
            write_json(self.path, record)


def _deciding(settings: object) -> dict[str, Any]:
    """Return settings without the place of the data."""
    known = dict(settings) if isinstance(settings, Mapping) else {}
    if isinstance(known.get("data"), dict):
        known["data"] = known["data"].get("sha256")
    return known
