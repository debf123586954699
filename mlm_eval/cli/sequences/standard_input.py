"""`--input -`: standard input, which one process reads and all ranks get."""

from __future__ import annotations

import sys
from pathlib import Path

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.screen import say

STDIN = Path("-")
"""How the options that name an input spell standard input."""

STDIN_NAME = "stdin"
"""What messages call it."""


def standard_input() -> bytes:
    """Return all of standard input on every rank, once the ranks have met.

    Raises:
        InputError: It is closed.
    """
    from mlm_eval.ranks.collectives import on_main

    def read() -> bytes:
        if sys.stdin is None or sys.stdin.closed:
            raise InputError("--input - reads standard input, which is closed; name a file")
        if sys.stdin.isatty():
            say("reading sequences from the terminal; Ctrl-D ends")
        return sys.stdin.buffer.read()

    return on_main(read)
