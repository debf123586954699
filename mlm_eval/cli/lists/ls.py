"""ls: the names that options take."""

from __future__ import annotations

from dataclasses import dataclass

from mlm_eval.cli.command import command
from mlm_eval.cli.lists.names import LISTS, all_names
from mlm_eval.cli.printing import show_text
from mlm_eval.options import option


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """The options of `ls`."""

    kind: str | None = option(
        "tasks, recipes, sizes, samples or catalog; default: all.",
        None,
        positional=True,
        choices=LISTS,
    )


@command("ls", ListOptions, config=False)
def list_names(options: ListOptions) -> None:
    """Names for the command line: one a line where one kind is asked for.

    Example: mlm-eval ls recipes
    """
    if options.kind is not None:
        show_text("\n".join(all_names(options.kind)))
        return
    for kind in LISTS:
        show_text(f"{kind}: {', '.join(all_names(kind))}")
