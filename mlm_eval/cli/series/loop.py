"""The loop over a series: choose, open, skip what is done, score, list; with `--watch` go on."""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.folders.kept_scores import discard_scores, kept_beside
from mlm_eval.cli.printing import complain
from mlm_eval.cli.run import ModelRun, Placement
from mlm_eval.cli.screen import Screen, say
from mlm_eval.cli.series.evaluation import Evaluation, Outcome, UnloadedModel
from mlm_eval.ranks.launch import shutdown
from mlm_eval.ranks.world import detect_world

if TYPE_CHECKING:
    from mlm_eval.checkpoints.checkpoint import Checkpoint
    from mlm_eval.engine.engine import Engine
    from mlm_eval.options import SeriesOptions
    from mlm_eval.series.listing import SeriesList
    from mlm_eval.series.members import Member

WATCH_SECONDS = 5.0
"""Between two looks for new iterations."""


@dataclass(frozen=True)
class SeriesRow:
    """A line of the table at the end."""

    label: str
    tokens: int | None
    """That the model was trained on, where that is known."""
    title: str
    figure: str
    note: str = ""


def run_series(options: SeriesOptions, evaluation: Evaluation[Any], *, cache: int = 0) -> None:
    """Evaluate the checkpoints that the options choose, one after the other, on the same ranks.

    One that cannot be read or used is named, and the others go on.

    Args:
        options: The command's.
        evaluation: What is done with each.
        cache: Bytes of keys and values that a rank needs, for the layout.

    Raises:
        InputError: The choice is wrong, an output is in the way, or, at the end, some failed.
    """
    _Series(options, evaluation, cache).run()


class _Series:
    def __init__(self, options: SeriesOptions, evaluation: Evaluation[Any], cache: int) -> None:
        from mlm_eval.checkpoints.config import parse_overrides
        from mlm_eval.checkpoints.files.output import is_stream
        from mlm_eval.series.iterations import ALL, parse_iterations
        from mlm_eval.series.members import Members

        self.options, self.evaluation, self.cache = options, evaluation, cache
        self.overrides = parse_overrides(options.overrides)
        if options.output is not None and is_stream(options.output):
            raise InputError(
                f"--output {options.output} is one stream, and a series writes a record for each "
                "checkpoint; name a file, beside which they may stand"
            )
        self.output = None if options.output is None else Path(os.path.realpath(options.output))
        Screen.lists = self.output
        choice = None
        if options.iterations is not None:
            try:
                choice = parse_iterations(options.iterations)
            except ValueError as error:
                raise InputError(f"--iterations {options.iterations!r} {error}") from None
        watched = options.watch is not None
        if watched and choice is None:
            choice = ALL
        self.members = Members(options.ckpt, choice, watched=watched)
        world = detect_world()
        self.is_main = world is None or world.is_main
        self.is_first_here = world is None or world.local_rank == 0
        self.seen: set[str] = set()
        self.opened: dict[str, Checkpoint] = {}
        """Those that chose the layout, until their turn comes."""
        self.records: dict[Path, str] = {}
        self.list: SeriesList | None = None
        self.engine: Engine | None = None
        self.pending: tuple[str, Future[Checkpoint]] | None = None
        self.rows: list[SeriesRow] = []
        self.failed: list[str] = []

    # ---- the course of it ----------------------------------------------------------------------

    def run(self) -> None:
        from mlm_eval.ranks.collectives import barrier, on_main
        from mlm_eval.ranks.groups import make_mesh

        members = self._wait() if self.members.watched else self.members.now()
        if not members:
            say("no finished iteration has appeared")
            return
        self.first, self.place = self._start(members)
        self.first.meet(self.place.device)
        make_mesh(self.place.tp, self.place.dp)
        for phrase in on_main(self.members.unfinished):
            say(f"note: {phrase}")
        with ThreadPoolExecutor(1) as self.pool:
            for members in self._rounds():
                for member, following in zip(members, [*members[1:], None], strict=True):
                    self._one(member, following)
        if self.rows:
            self.first.print_result(self._table())
            sys.stdout.flush()
        barrier()  # a rank that leaves with a code is the end of all
        if self.failed:
            raise InputError(
                f"{len(self.failed)} of {len(self.seen)} checkpoint(s) could not be evaluated: "
                f"{'; '.join(self.failed[:5])}"
                + (f" and {len(self.failed) - 5} more" if len(self.failed) > 5 else "")
                + " (why stands above)"
            )
        shutdown()

    def _start(self, members: list[Member]) -> tuple[ModelRun, Placement]:
        """Start the ranks, in a layout for the largest of the models; leave with their end."""
        opened: list[tuple[Checkpoint, Member]] = []
        faults = []
        for root in dict.fromkeys(member.root for member in members):
            for member in members:
                if member.root == root:
                    try:
                        self.opened[member.path] = member.opened(self.overrides)
                        opened.append((self.opened[member.path], member))
                        break
                    except (InputError, OSError) as error:
                        faults.append(error)
        if not opened:
            if len(members) == 1:
                raise faults[0]
            raise InputError(
                f"none of the {len(members)} checkpoints can be opened; the first: {faults[0]}"
            )
        checkpoint, member = max(opened, key=lambda pair: pair[0].num_parameters)
        run = ModelRun(self.options.one(member.path, None), checkpoint=checkpoint)
        return run, run.start(lambda: run.scoring_need(cache=self.cache))

    def _rounds(self) -> Iterator[list[Member]]:
        """Yield the checkpoints to do, once; while they are watched, whenever new ones come."""
        from mlm_eval.ranks.collectives import on_main

        while True:
            fresh = on_main(self._wait if self.members.watched else self.members.now)
            if not fresh:
                return
            yield fresh
            self.seen |= {member.path for member in fresh}
            if not self.members.watched:
                return

    def _wait(self) -> list[Member]:
        """Return the finished iterations that were not there before; none: the time is over."""
        assert self.options.watch is not None
        began, said = time.monotonic(), False
        while True:
            fresh = [member for member in self.members.now() if member.path not in self.seen]
            left = began + 60 * self.options.watch - time.monotonic()
            if fresh or left <= 0:
                return fresh
            if not said:
                end = (
                    "Ctrl-C ends" if math.isinf(left) else f"ends in {left / 60:.3g} min, or Ctrl-C"
                )
                say(f"waits for the next iteration that the tracker file names ({end})")
                said = True
            time.sleep(min(WATCH_SECONDS, left))

    def _one(self, member: Member, following: Member | None) -> None:
        """Evaluate a checkpoint, unless its record is there; name it where it cannot be."""
        from mlm_eval.ranks.collectives import on_every, on_main

        began = time.monotonic()
        try:
            checkpoint = on_every(lambda: self._opened(member))
            record = self._record(member, checkpoint)
            run = self.first.on(checkpoint, self.options.one(member.path, record))
            text = on_every(lambda: self.evaluation.prepare(run))
            model = on_every(lambda: self._model(run))
        except InputError as fault:
            self._fail(member, fault)
            return
        parts = {**self.evaluation.parts(model, text), "limit": self.evaluation.limit}
        on_main(lambda: self._begin_list(text))
        try:
            known = on_main(lambda: self._known(record, parts))
            if known is not None:
                self._done(member, checkpoint, record, known, f"done before, in {record}")
                return
            run.warn(checkpoint.provenance.warnings)
            if record is not None:
                Screen.expect(record)
            self.engine = self._engine(run, model)
        except InputError as fault:
            self.engine = None
            self._fail(member, fault)
            return
        self._prepare_next(following)
        with run.advising_on_memory_of(self.place):
            outcome = self.evaluation.evaluate(run, self.engine, text)
        self._done(member, checkpoint, record, outcome, f"{time.monotonic() - began:.1f} s")

    # ---- a checkpoint --------------------------------------------------------------------------

    def _opened(self, member: Member) -> Checkpoint:
        pending, self.pending = self.pending, None
        known = self.opened.pop(member.path, None)
        if pending is not None and pending[0] == member.path:
            return pending[1].result()
        return known if known is not None else member.opened(self.overrides)

    def _prepare_next(self, member: Member | None) -> None:
        """Open the next checkpoint in the background, and have its bytes read meanwhile."""
        from mlm_eval.series.prefetch import prefetch

        if member is None:
            return

        def prepare() -> Checkpoint:
            checkpoint = member.opened(self.overrides)
            if self.is_first_here:
                prefetch(checkpoint)
            return checkpoint

        self.pending = member.path, self.pool.submit(prepare)

    def _record(self, member: Member, checkpoint: Checkpoint) -> Path | None:
        """Return where a checkpoint's record is.

        Raises:
            InputError: Another checkpoint of this series has its record there.
        """
        from mlm_eval.series.names import record_path

        if self.output is None:
            return None
        record = record_path(self.output, member.name, checkpoint.provenance.iteration)
        owner = self.records.setdefault(record, member.path)
        if owner != member.path:
            raise InputError(
                f"{member.path} and {owner} are the same iteration of the same folder; give each "
                "checkpoint once"
            )
        return record

    def _model(self, run: ModelRun) -> UnloadedModel:
        """Return what a run's model is before it is loaded."""
        from mlm_eval.checkpoints.dtypes import evaluation_dtype
        from mlm_eval.checkpoints.parameters import check_tp
        from mlm_eval.checkpoints.tokenizer import entries_within
        from mlm_eval.checkpoints.vocabulary import with_rows

        checkpoint, vocab = run.checkpoint, self.options.vocab
        check_tp(checkpoint.config, self.place.tp)
        if vocab == "true":
            rows = entries_within(run.tokenizer(), checkpoint.config.vocab_size)
            checkpoint = with_rows(checkpoint, rows)
        dtype = evaluation_dtype(
            self.options.dtype, checkpoint.config.params_dtype, self.place.device
        )
        return UnloadedModel(checkpoint, dtype, vocab)

    def _engine(self, run: ModelRun, model: UnloadedModel) -> Engine:
        """Return the loaded model, in the memory of the one before it where that fits."""
        engine, self.engine = self.engine, None
        if engine is not None and engine.fits(model.config, model.dtype):
            engine = engine.refilled(run.checkpoint)
            run.warn(engine.load_warnings)
            return engine
        del engine
        gc.collect()  # before the next takes its memory
        return run.join(self.place)(run.checkpoint, model.dtype)

    # ---- records -------------------------------------------------------------------------------

    def _begin_list(self, text: Any) -> None:
        from mlm_eval.series.listing import SeriesList

        if self.list is None and self.output is not None:
            limit = self.evaluation.limit
            settings = {**self.evaluation.asked, "limit": limit, "data": self.evaluation.data(text)}
            self.list = SeriesList(
                self.output,
                self.evaluation.task,
                settings,
                overwrite=self.options.overwrite,
            )

    def _known(self, record: Path | None, parts: dict[str, Any]) -> Outcome | None:
        if record is None:
            return None
        entry = None if self.list is None else self.list.entry(record)
        return self.evaluation.known(record, parts, entry, overwrite=self.options.overwrite)

    def _done(
        self,
        member: Member,
        checkpoint: Checkpoint,
        record: Path | None,
        outcome: Outcome,
        note: str,
    ) -> None:
        """Print the line of a checkpoint, and list its record."""
        from mlm_eval.reporting.results import consumed

        if not self.is_main:
            return
        found = checkpoint.provenance
        limited = "" if self.evaluation.limit is None else "  *** LIMITED RUN ***"
        label = self._label(member, checkpoint)
        row = SeriesRow(
            label, consumed(found.args)["consumed_tokens"], outcome.title, outcome.figure
        )
        self.rows.append(row)
        self.first.print_result(f"{label}: {outcome.title} {outcome.figure}  ({note}){limited}")
        sys.stdout.flush()
        if record is not None and self.list is not None:
            entry = {"checkpoint": str(found.path), "iteration": found.iteration}
            name = {} if member.name is None else {"name": member.name}
            self.list.add(record, {**entry, **name, **outcome.entry})
            self._forget_scores(record)

    def _forget_scores(self, record: Path) -> None:
        """Remove what a run has kept of a record that is whole, and that was not removed yet."""
        folder = kept_beside(record)
        if self.evaluation.limit is None and folder.is_dir():
            discard_scores(folder)
            with suppress(OSError):
                folder.rmdir()

    def _fail(self, member: Member, fault: InputError) -> None:
        self.failed.append(member.label)
        if not self.is_main:
            return
        self.rows.append(SeriesRow(member.label, None, "", "", "failed"))
        complain(f"{member.label}: {fault}")
        if self.list is not None:
            self.list.fail(member.path, member.iteration, str(fault))

    def _label(self, member: Member, checkpoint: Checkpoint) -> str:
        from dataclasses import replace

        return replace(member, iteration=checkpoint.provenance.iteration).label

    def _table(self) -> str:
        """Return the table of all that was evaluated."""
        from mlm_eval.reporting.text import aligned

        titles = list(dict.fromkeys(row.title for row in self.rows if row.title))
        with_tokens = any(row.tokens is not None for row in self.rows)
        head = ["checkpoint", *(["trained on"] if with_tokens else []), *titles, ""]
        body = [
            [
                row.label,
                *([_tokens(row.tokens)] if with_tokens else []),
                *(row.figure if row.title == title else "" for title in titles),
                row.note,
            ]
            for row in self.rows
        ]
        limit = self.evaluation.limit
        title = f"{self.evaluation.task}, a series of {len(self.rows)}"
        if limit is not None:
            title += f"  *** LIMITED to the first {limit:,}: not the figures of the whole data ***"
        if self.output is not None and self.list is not None:
            title += f": {self.output}"
        return "\n".join(["", title, *aligned([head, *body], left=1)])


def _tokens(count: int | None) -> str:
    return "" if count is None else f"{count:,} tokens"
