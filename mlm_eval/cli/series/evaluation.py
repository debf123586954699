"""What a command does with each checkpoint of a series, and how the loop asks for it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.outputs import check_existing
from mlm_eval.options import FILE

if TYPE_CHECKING:
    import torch

    from mlm_eval.checkpoints.checkpoint import Checkpoint
    from mlm_eval.checkpoints.config import ModelConfig
    from mlm_eval.cli.run import ModelRun
    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.resume import Identified

Text = TypeVar("Text")
"""What a command has prepared for a model: its text, read and tokenized."""


@dataclass(frozen=True)
class UnloadedModel:
    """What decides a model's scores, before it is loaded."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    vocab: str

    @property
    def config(self) -> ModelConfig:
        """The model's settings."""
        return self.checkpoint.config


@dataclass(frozen=True)
class Outcome:
    """What one checkpoint's evaluation found."""

    title: str
    """What the figure is."""
    figure: str
    entry: dict[str, Any] = field(default_factory=dict)
    """What else the list says about the record."""


class Evaluation(ABC, Generic[Text]):
    """A command, as the loop over a series sees it."""

    task: str
    """Name of the command."""
    asked: Mapping[str, Any]
    """What the options ask of every checkpoint alike, for the list."""
    limit: float | None = None
    """Of the data."""

    @abstractmethod
    def prepare(self, run: ModelRun) -> Text:
        """Return the text for a run's checkpoint, made once for all that read it alike.

        No collectives.

        Raises:
            InputError: The command is not for this model, or the text does not fit it.
        """

    @abstractmethod
    def data(self, text: Text) -> dict[str, Any]:
        """Return what the list says about the data: at least `sha256`."""

    @abstractmethod
    def parts(self, model: Identified, text: Text) -> dict[str, Any]:
        """Return all that decides the record; see `record_difference`."""

    @abstractmethod
    def evaluate(self, run: ModelRun, engine: Engine, text: Text) -> Outcome:
        """Return what this checkpoint's scores say, once its record is written. On every rank.

        Raises:
            InputError: On every rank alike.
        """

    def figure(self, record: Mapping[str, Any]) -> tuple[str, str]:
        """Return the name and the text of a record's main figure, for `known` as it stands here."""
        raise NotImplementedError

    def known(
        self,
        path: Path,
        parts: Mapping[str, Any],
        entry: Mapping[str, Any] | None,
        *,
        overwrite: bool,
    ) -> Outcome | None:
        """Return what a record that is there says; None: the checkpoint is to be evaluated. Rank 0.

        Args:
            path: Of the record.
            parts: What decides it.
            entry: What the list says about it.
            overwrite: Evaluate it again.

        Raises:
            InputError: The file is another one, which may not be replaced.
        """
        from mlm_eval.reporting.existing import is_result, json_record
        from mlm_eval.series.done import record_difference

        if path.is_file() and path.stat().st_size and not overwrite and is_result(path):
            record = json_record(path) or {}
            difference = record_difference(record, parts)
            if difference == "":
                try:
                    return Outcome(*self.figure(record))
                except (KeyError, TypeError, ValueError, AttributeError):
                    difference = None  # its figures are damaged
            self.refuse_other(path, difference)
        self.check_place(path, overwrite=overwrite)
        return None

    def refuse_other(self, path: Path, difference: str | None) -> None:
        """Refuse to replace a record of another run.

        Raises:
            InputError: Always.
        """
        what = "" if difference is None else f" of another run: {difference}"
        raise InputError(
            f"{path} holds a result{what}; replace it with --overwrite, or name another --output"
        )

    def check_place(self, path: Path, *, overwrite: bool, flag: str = "--output") -> None:
        """Refuse a record's place where a file stands that may not be replaced.

        Args:
            path: The place.
            overwrite: Whether results may be replaced.
            flag: The option that names it.

        Raises:
            InputError: One does.
        """
        limits = {} if self.limit is None else {"limit": math.ceil(self.limit)}
        check_existing(flag, path, FILE, limits, overwrite=overwrite)
