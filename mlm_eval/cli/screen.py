"""What people see while a command works: lines, bars, the names of phases; `-q` and `-v`.

All of it goes to stderr, from rank 0. Results and errors are printed by others, whatever is asked.
"""

from __future__ import annotations

import logging
import shlex
import stat
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError, one_line
from mlm_eval.checkpoints.folders.kept_scores import forget_finished, kept_beside
from mlm_eval.cli.printing import remark
from mlm_eval.ranks.world import detect_world

if TYPE_CHECKING:
    from mlm_eval.engine.batching import OnProgress

HEARTBEAT_SECONDS = 30.0
"""Between two lines of progress, where there is no terminal to draw a bar on."""

PATIENCE_SECONDS = 2.0
"""A phase that takes longer is named."""


class Screen:
    """What the running command shows, and what it says when it is interrupted."""

    quiet = False
    verbose = False
    keeps: Path | None = None
    """Folder that keeps what an interrupted run has done, where the command has one."""
    output: Path | None = None
    """File that ends the run, where that is a file."""
    before: tuple[int, int] | None = None
    """Which file stood there, where one did."""
    lists: Path | None = None
    """File that lists what a series has done."""

    @classmethod
    def expect(cls, output: Path) -> None:
        """Note what the command is going to write, for `how_to_continue`."""
        cls.keeps, cls.output, cls.before = kept_beside(output), output, _which(output)


def choose_verbosity(*, quiet: bool, verbose: bool) -> None:
    """Show less or more from now on.

    Args:
        quiet: Nothing but results and errors.
        verbose: Also where settings come from, what each phase took, and warnings of libraries that
            Python hides.

    Raises:
        InputError: Both are asked for.
    """
    if quiet and verbose:
        raise InputError("-q and -v contradict each other; give one of them")
    Screen.quiet, Screen.verbose = quiet, verbose
    Screen.keeps = Screen.output = Screen.before = Screen.lists = None
    logging.disable(logging.WARNING if quiet else logging.NOTSET)
    if quiet:
        warnings.simplefilter("ignore")
    elif verbose:
        warnings.simplefilter("default")


def say(text: str) -> None:
    """Print a line for people who watch, unless the command is to be quiet."""
    if not Screen.quiet and _is_main():
        remark(text)


def say_warning(text: str) -> None:
    """Print a warning, unless the command is to be quiet."""
    say(f"warning: {one_line(text)}")


def detail(text: str) -> None:
    """Print what only `-v` shows."""
    if Screen.verbose:
        say(text)


def how_to_continue() -> str:
    """Return what an interrupted command says of what it has done."""
    command = shlex.join(["mlm-eval", *sys.argv[1:]])
    if Screen.lists is not None and Screen.lists.is_file():
        return f"{Screen.lists} lists what is done; to continue, type: {command}"
    if Screen.output is not None and _which(Screen.output) not in (None, Screen.before):
        with suppress(InputError):
            forget_finished(Screen.output)
        return f"the result was written: {Screen.output}"
    kept = Screen.keeps
    if kept is None or not kept.is_dir() or not any(kept.iterdir()):
        return "no result was written, and nothing was kept"
    return f"no result was written; to continue from what {kept} keeps, type: {command}"


def _which(path: Path) -> tuple[int, int] | None:
    """Return what tells one file from another that replaces it; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _is_main() -> bool:
    world = detect_world()
    return world is None or world.is_main


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Name what the block does, where it takes longer than a moment; with `-v` how long it took.

    Args:
        what: Such as `reading the text`.
    """
    started, ended = time.monotonic(), threading.Event()
    watching = threading.Thread(target=_watch, args=(what, ended), daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
    detail(f"{what}: {time.monotonic() - started:.1f} s")


def _watch(what: str, ended: threading.Event) -> None:
    """Say what is being done until it has ended."""
    started = time.monotonic()
    wait = PATIENCE_SECONDS
    while not ended.wait(wait):
        passed = timedelta(seconds=round(time.monotonic() - started))
        say(f"{what} ..." if wait == PATIENCE_SECONDS else f"{what}: {passed} so far")
        wait = HEARTBEAT_SECONDS


@contextmanager
def progress(show: bool, unit: str = "tok", what: str = "scoring") -> Iterator[OnProgress | None]:
    """Yield a callback that shows how far the work is, and the time left.

    On a terminal it draws a bar, which is closed when all is done; elsewhere it writes a line now
    and then, so that a log says that the run is alive.

    Args:
        show: Whether to show anything.
        unit: What is counted.
        what: What is being done.
    """
    if not show or Screen.quiet:
        yield None
        return
    started, ended = time.monotonic(), False

    def end() -> None:
        nonlocal ended
        if not ended:
            ended = True
            detail(f"{what}: {time.monotonic() - started:.1f} s")

    with _bar_or_lines(unit, what) as update:

        def told(done: int, total: int) -> None:
            update(done, total)
            if done >= total:  # what follows is another phase
                end()

        yield told
    end()


@contextmanager
def _bar_or_lines(unit: str, what: str) -> Iterator[OnProgress]:
    if not sys.stderr.isatty():
        yield heartbeat(what)
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, unit_scale=True, dynamic_ncols=True, file=sys.stderr) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done >= total:
                bar.close()

        yield update


def heartbeat(what: str) -> OnProgress:
    """Return a callback that writes a line to stderr every `HEARTBEAT_SECONDS`."""
    started = last = time.monotonic()
    first: int | None = None

    def update(done: int, total: int) -> None:
        nonlocal last, first
        now = time.monotonic()
        if first is None:
            first = done  # what an earlier run has done took none of this one's time
        if now - last < HEARTBEAT_SECONDS or not total:
            return
        last = now
        left = ""
        if done > first:
            seconds = (now - started) / (done - first) * (total - done)
            left = f", {timedelta(seconds=round(seconds))} left"
        say(f"{what}: {100 * done / total:.0f} %{left}")

    return update
