"""The names of a series' records: one for each checkpoint, unique, and safe as a file's name."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlm_eval.checkpoints.megatron.iteration import iteration_folder
from mlm_eval.series.iterations import Iteration

_LONGEST = 100
"""Characters of a name, before its number."""


def record_path(output: Path, name: str | None, iteration: Iteration | None) -> Path:
    """Return where a checkpoint's record is, beside the list of the series.

    Args:
        output: The list: `F.json`, links resolved.
        name: Of the checkpoint's root, where there are several `--ckpt`.
        iteration: The checkpoint's; None: it has none.
    """
    parts = [output.stem, *([] if name is None else [name])]
    if iteration is not None:
        parts.append(iteration_folder(iteration if isinstance(iteration, int) else None))
    return output.with_name(".".join(parts) + output.suffix)


def unique_names(roots: Sequence[str]) -> list[str]:
    """Return a name for each root: its folder's, with parents where two would be equal.

    The same root has the same name. Where parents do not tell roots apart, a number does.
    """
    distinct = list(dict.fromkeys(os.path.realpath(root) for root in roots))
    given = {os.path.realpath(root): root for root in reversed(roots)}
    levels = dict.fromkeys(distinct, 1)
    while True:
        names = {place: _name(given[place], levels[place]) for place in distinct}
        counts = Counter(name.casefold() for name in names.values())
        longer = [
            place
            for place in distinct
            if counts[names[place].casefold()] > 1 and levels[place] < len(_parts(given[place]))
        ]
        if not longer:
            break
        for place in longer:
            levels[place] += 1
    taken: set[str] = set()
    for place, name in names.items():
        number = 1
        while names[place].casefold() in taken:
            number += 1
            names[place] = f"{name}-{number}"
        taken.add(names[place].casefold())
    return [names[os.path.realpath(root)] for root in roots]


def _parts(root: str) -> list[str]:
    """Return the names of the folders that lead to a root."""
    if ":" in root and not os.path.lexists(root):  # sample:gpt
        return [root]
    return [part for part in Path(os.path.abspath(root)).parts if part.strip(os.sep)]


def _name(root: str, levels: int) -> str:
    text = re.sub(r"[^A-Za-z0-9._+=-]+", "-", "-".join(_parts(root)[-levels:])).lstrip(".-")
    return text[-_LONGEST:] or "checkpoint"
