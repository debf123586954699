"""The one place that prints.

Names and values come from files that anybody may have made. What would command a terminal, or turn
text round in it, is written as an escape, and a message is one line.
"""

from __future__ import annotations

import sys

from mlm_eval.checkpoints.errors import one_line, visible


def show_text(text: object = "", *, end: str = "\n", flush: bool = False) -> None:
    """Print a result for people on stdout."""
    print(visible(str(text)), end=end, flush=flush)


def remark(text: object) -> None:
    """Print on stderr, for people who watch; each line is cut where it is endless."""
    lines = str(text).split("\n")
    print("\n".join(map(one_line, lines)), file=sys.stderr, flush=True)


def complain(message: object) -> None:
    """Print an error as one line on stderr, after the program's name."""
    print(f"mlm-eval: {one_line(message)}", file=sys.stderr, flush=True)
