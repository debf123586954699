"""What a zero-shot benchmark is: one object that the command, the record and the report ask.

A benchmark turns its data into requests (`prepare`) and their scores into figures (`metrics`).
From options to record, the rest is the same for all of them and stands here. A benchmark's file
imports torch inside functions only: the command line reads its options for `--help`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.options import option
from mlm_eval.reporting.results import (
    Result,
    checkpoint_record,
    engine_settings,
    loss_warnings,
    timing_record,
    versions,
)

if TYPE_CHECKING:
    from mlm_eval.checkpoints.checkpoint import Checkpoint
    from mlm_eval.checkpoints.config import ModelConfig
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.batching import OnProgress
    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.resume import Identified, PartialScores
    from mlm_eval.engine.score import Request, Scores
    from mlm_eval.planning.plan import Workload
    from mlm_eval.reporting.tables import Column


@dataclass(frozen=True, kw_only=True)
class DataOption:
    """The options of a benchmark that has none but its data."""

    data: str | None = option(
        "A file, or a `datasets` name; default: the benchmark's test set on the Hub.",
        None,
        reads=True,
    )


Own = TypeVar("Own", bound=DataOption)
"""The dataclass of a benchmark's own options."""


@dataclass(frozen=True)
class Work:
    """What will be scored, known before a model is loaded."""

    requests: list[Request]
    counts: dict[str, int]
    """The record's `counts`."""
    settings: dict[str, Any]
    """The record's `settings`: what decides the scores, the data, `limit` and `warnings`."""
    sources: Sequence[Mapping[str, Any]] = ()
    """Of each request what `--save-examples` tells of its data; empty where there is nothing."""


@dataclass(frozen=True)
class PaperFigure:
    """The figure of the paper's Table 3 that a benchmark measures, and how it was measured."""

    column: Column
    """Its key is the benchmark's name."""
    metric: str
    """Name in a record's metrics."""
    file: str
    """The data."""
    settings: Mapping[str, Any]
    protocol: str = "megatron-paper"
    percent: bool = False
    """The paper prints the metric times 100."""


class ZeroShot(ABC, Generic[Own]):
    """A benchmark without training: every request is scored once, by one forward pass.

    The docstring of a subclass is the help of its command.
    """

    name: str
    """Name of the command, and the record's `task`."""
    title: str
    unit: str
    """What a request is: windows, passages."""
    options: type[Own]
    """Its own options, on top of those that all benchmarks share."""
    paper: PaperFigure | None = None

    @abstractmethod
    def prepare(
        self, options: Own, *, tokenizer: Tokenizer, positions: int, limit: int | None = None
    ) -> Work:
        """Return the requests of the data, in its order.

        Args:
            options: The benchmark's own.
            tokenizer: The model's own.
            positions: The model's `max_position_embeddings`.
            limit: Keep the first requests only.

        Raises:
            InputError: The data cannot be used, or an option is out of its range.
        """

    @abstractmethod
    def metrics(self, scores: Scores, nll_sum: float, work: Work) -> dict[str, Any]:
        """Return the record's metrics.

        Args:
            scores: Of `work.requests`.
            nll_sum: Nats, summed over all scored tokens.
            work: What was scored.
        """

    @abstractmethod
    def rows(self, result: Result) -> list[tuple[str, str]]:
        """Return the figures and the protocol as names and texts, for people."""

    def protocol(self, settings: Mapping[str, Any]) -> str:
        """Return the record's protocol; with a begin-of-text token it is none of the paper's."""
        return "megatron-paper" if settings.get("bos_id") is None else "megatron-paper, BOS"

    def megatron_line(self, result: Result) -> str | None:
        """Return the line that Megatron printed for these figures, if it had the benchmark."""
        return None

    def workload(self, positions: int) -> Workload | None:
        """Return what the paper's data cost a model with so many positions, for `plan`."""
        return None

    def work_for(
        self, config: ModelConfig, options: Own, *, tokenizer: Tokenizer, limit: int | None
    ) -> Work:
        """Return the requests for a model; see `prepare`.

        Raises:
            InputError: As `prepare`, or the tokenizer is not the model's.
        """
        from mlm_eval.checkpoints.tokenizer import check_fits
        from mlm_eval.checkpoints.tokenizers.begin_of_text import choose_begin

        if limit is not None and limit < 1:
            raise InputError(f"--limit {limit}: choose 1 or more {self.unit}")
        misfit = check_fits(tokenizer, config.vocab_size, config.family)
        positions = config.max_position_embeddings
        work = self.prepare(options, tokenizer=tokenizer, positions=positions, limit=limit)
        work.settings["warnings"] += [misfit] if misfit is not None else []
        asked: str | None = getattr(options, "bos", None)
        if asked is not None:  # a benchmark of texts; see `BosOption`
            begin = choose_begin(asked, tokenizer)
            work.settings.update(begin.record())
            work.settings["warnings"] += [begin.warning] if begin.warning is not None else []
        return work

    def evaluate(
        self,
        engine: Engine,
        data: str | Path | None = None,
        *,
        tokenizer: Tokenizer,
        limit: int | None = None,
        on_progress: OnProgress | None = None,
        partial: PartialScores | None = None,
        **options: Any,
    ) -> Result:
        """Return the benchmark's result for a GPT model.

        Args:
            engine: The loaded model.
            data: A file, a folder saved by `datasets`, a `datasets` name, or None for the
                benchmark's own set on the Hub.
            tokenizer: The model's own.
            limit: Score the first requests only.
            on_progress: Called with tokens done and tokens in all.
            partial: Scores kept from an interrupted run.
            options: Fields of the benchmark's `options`.

        Raises:
            InputError: The data cannot be used, a setting is out of its range, or the tokenizer is
                not the model's.
        """
        chosen = self.options(data=None if data is None else str(data), **options)
        config = engine.checkpoint.config
        work = self.work_for(config, chosen, tokenizer=tokenizer, limit=limit)
        return self.score(
            engine, work, tokenizer=tokenizer, on_progress=on_progress, partial=partial
        )

    def score(
        self,
        engine: Engine,
        work: Work,
        *,
        tokenizer: Tokenizer,
        on_progress: OnProgress | None = None,
        partial: PartialScores | None = None,
        on_scores: Callable[[Scores], None] | None = None,
    ) -> Result:
        """Return the result of prepared work; every rank takes part and gets the same one.

        Args:
            engine: With the model.
            work: What is scored.
            tokenizer: The model's own.
            on_progress: Called with tokens done and tokens in all.
            partial: Scores kept from an interrupted run.
            on_scores: Called with the scores, on every rank; see `examples`.
        """
        scores = engine.score(work.requests, on_progress=on_progress, partial=partial)
        if on_scores is not None:
            on_scores(scores)
        nll_sum = math.fsum(scores.nll_sums().tolist())
        return Result(
            task=self.name,
            protocol=self.protocol(work.settings),
            metrics=self.metrics(scores, nll_sum, work),
            counts=work.counts,
            settings={
                **engine_settings(engine, tokenizer),
                **work.settings,
                "warnings": [*self.warnings(engine.checkpoint, work), *loss_warnings(nll_sum)],
            },
            checkpoint=checkpoint_record(engine.checkpoint),
            timing=timing_record(engine, work.requests, scores.seconds, partial),
            versions=versions(),
        )

    def warnings(self, checkpoint: Checkpoint, work: Work) -> list[str]:
        """Return what is known to be odd before anything is scored."""
        longest = max((request.length for request in work.requests), default=0)
        return [*work.settings["warnings"], *checkpoint.length_warnings(longest)]

    def examples(
        self, engine: Engine, work: Work, scores: Scores, tokenizer: Tokenizer
    ) -> list[dict[str, Any]]:
        """Return what `--save-examples` writes of each request, in their order; all ranks call it.

        `text` is what was scored, of `tokens` tokens with the summed log-probability `logprob`
        (nats; None where it is no number).
        """
        return [
            {
                **(work.sources[i] if work.sources else {"example": i}),
                "text": tokenizer.decode(request.tokens[-request.num_scored :].tolist()),
                "tokens": request.num_scored,
                "logprob": logprob if math.isfinite(logprob) else None,
            }
            for i, (request, logprob) in enumerate(
                zip(work.requests, (-scores.nll_sums()).tolist(), strict=True)
            )
        ]

    def resume_parts(self, model: Identified, work: Work, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return all that decides the scores; `limit` and the layout do not."""
        from mlm_eval.engine.resume import deciding_parts

        beside = ("warnings", "limit", "data")
        return deciding_parts(
            model,
            self.name,
            data=work.settings["data"]["sha256"],
            tokenizer=tokenizer,
            settings={k: v for k, v in work.settings.items() if k not in beside},
        )

    def figure(self, metrics: Mapping[str, Any], counts: Mapping[str, Any]) -> tuple[str, str]:
        """Return the name and the text of a record's main figure, for a table of many.

        Args:
            metrics: The record's.
            counts: The record's.
        """
        if self.paper is None:
            name, value = next(iter(metrics.items()))
            return name, f"{value:.6g}" if isinstance(value, float) else str(value)
        column, value = self.paper.column, metrics.get(self.paper.metric)
        if value is None:
            return column.title, "not finite"
        text = f"{value * (100 if self.paper.percent else 1):.{max(column.decimals, 4)}f}"
        return column.title, f"{text} %" if self.paper.percent else text

    def limit_warnings(self, limit: int | None, kept: int, total: int) -> list[str]:
        """Return a sentence if `limit` left out some of the data, else nothing."""
        if kept == total:
            return []
        return [
            f"limit {limit}: only the first {kept} of {total} {self.unit} are scored; the figures "
            "are not those of the whole data"
        ]
