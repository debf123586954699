"""The command line. Each command parses its options, runs on the ranks it needs, and prints.

    app.py           the typer application, `--config`
    command.py       a dataclass becomes a command: its fields are the options
    outputs.py       what a command writes, checked before it works
    run.py           checkpoint, ranks and engine for a command
    checkpoints.py   inspect, convert, verify        zero_shot.py   wikitext103, lambada
    training.py      race, mnli, qqp, squad, mlm, lm, ensemble
    report.py        report, plan, catalog           harness.py     harness
    bench.py         bench                           sequences/     score, generate
    lists/           ls, data                        screen.py      what people see meanwhile
    series/          several checkpoints in one command
    printing.py      the one place that prints

Only the modules of this room print. They may import everything, and do so inside functions where
that is heavy, so that `--help` and `inspect` stay quick. Nothing imports from here.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.app import app
from mlm_eval.cli.printing import complain, remark
from mlm_eval.cli.screen import how_to_continue
from mlm_eval.ranks.faults import check_surroundings, lost_peers, named_fault
from mlm_eval.ranks.signals import (
    STOPPED,
    interrupted_by_signals,
    say_bus_errors,
    stopped_by,
)
from mlm_eval.ranks.streams import close_streams, open_streams
from mlm_eval.ranks.world import detect_world

__all__ = ["app", "entry", "main"]

INTERRUPTED = STOPPED + signal.SIGINT
"""Exit code after Ctrl-C."""


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(_main())


def entry() -> None:
    """Run the command line as a process of its own, which ends with it."""
    open_streams()
    say_bus_errors()
    try:
        code = _main()
    except SystemExit as leaving:  # of typer, and of the parent of ranks
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    lost = close_streams()
    if lost is not None and code == 0:
        complain(f"what was printed is not complete: {named_fault(lost) or lost}")
        close_streams()
        code = 2
    # What is registered for the end still runs. The interpreter's own teardown of torch takes half
    # a second and frees nothing that the end of the process does not.
    atexit._run_exitfuncs()
    os._exit(code)


def _main() -> int:
    world = None
    try:
        check_surroundings()
        world = detect_world()
        if world is None:
            with interrupted_by_signals():
                code = app(standalone_mode=False)
        else:
            from mlm_eval.ranks.launch import prepare_worker, reporting_errors

            prepare_worker()
            with reporting_errors(world):
                code = app(standalone_mode=False)
        if code == INTERRUPTED:  # what newer typer makes of a KeyboardInterrupt
            return _interrupted()
        return code if isinstance(code, int) else 0
    except InputError as error:
        # Under torchrun every rank finds the same fault before they meet: one sentence is enough.
        if world is None or world.is_main or _have_met():
            complain(error)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # the reader of a pipe has left, as `head` does
        sys.stderr.close()
        return 1
    except Exception as error:
        # typer keeps its own copy of click: its errors are known by what they can do.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            message = error.format_message()
            if message:  # none where the help is shown, for want of a command
                complain(f"{message} ({_advice(error)})")
            return 2
        if type(error).__name__ == "Abort":  # and what older typer does
            return _interrupted()
        named = named_fault(error)
        if named is not None:
            complain(named)
            return 2
        lost = None if world is None else lost_peers(error, world.rank)
        if lost is not None:
            from mlm_eval.ranks.launch import cause_of_others

            cause = cause_of_others()
            complain(lost if cause is None else f"{lost}; {cause}")
            return 1
        remark(traceback.format_exc().rstrip())
        complain("this is a fault of mlm-eval; please report it with the lines above")
        return 1


def _advice(error: Exception) -> str:
    """Return where help is for an error of the command line."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    name = getattr(error, "option_name", None)
    if getattr(command, "name", None) == "harness" and name is not None:
        return (
            f"options of lm-evaluation-harness come after `--`: mlm-eval harness ... -- {name} ..."
        )
    return "see --help"


def _interrupted() -> int:
    number = stopped_by()
    what = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    complain(f"{what}; {how_to_continue()}")
    return STOPPED + number


def _have_met() -> bool:
    """Whether this rank has joined the others: what it finds then may be its own alone."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())
