"""Names for the command line by their kind; each is looked up when it is asked for."""

from __future__ import annotations

LISTS = ("tasks", "recipes", "sizes", "samples", "catalog")
"""Kinds of names."""


def all_names(kind: str) -> list[str]:
    """Return the names of a kind, in the order of the help."""
    from mlm_eval.checkpoints.catalog import SAMPLE_PREFIX, catalog_entries, sample_names

    if kind == "tasks":
        from mlm_eval.tasks.finetune.task import TASKS
        from mlm_eval.tasks.zero_shot import BENCHMARKS

        return [*BENCHMARKS, *TASKS, "mlm", "lm"]
    if kind == "recipes":
        from mlm_eval.tasks.finetune.settings import recipe_names

        return recipe_names()
    if kind == "sizes":
        from mlm_eval.model.sizes import SIZES

        return list(SIZES)
    if kind == "samples":
        return [SAMPLE_PREFIX + name for name in sample_names()]
    return list(catalog_entries())


def names_of(kind: str, command: str) -> list[str]:
    """Return those names of a kind that a command takes: recipes of its task, sizes of its family.

    Args:
        kind: See `LISTS`.
        command: Its name.
    """
    beginnings = {"mlm": "bert", "lm": "gpt"} if kind == "sizes" else {command: f"{command}-"}
    return [name for name in all_names(kind) if name.startswith(beginnings.get(command, ""))]
