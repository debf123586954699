"""The data of a fine-tuning: read and turned into features on rank 0, shared with all ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.reporting.text import training_plan
from mlm_eval.tasks.data.text import sha256
from mlm_eval.tasks.data.tokens import token_cache
from mlm_eval.tasks.finetune.features import PairFeatures
from mlm_eval.tasks.finetune.settings import FinetuneOptions, Recipe, load_recipe
from mlm_eval.tasks.finetune.task import ROLES, ExampleSet, Task, check_names, merge


@dataclass(frozen=True)
class Prepared:
    """What rank 0 makes of the data."""

    recipe_name: str
    """Name or path of the recipe."""
    recipe: Recipe
    """With the options that override it."""
    train: PairFeatures | None
    """Training samples; None where nothing is trained."""
    evaluated: dict[str, dict[str, PairFeatures]]
    """The sets to evaluate, by role and name."""
    version: str
    """Of their data; see `ExampleSet`."""
    counts: dict[str, int]
    """How much there is of everything, for the record."""
    data: dict[str, Any]
    """What was read, for the record."""
    warnings: list[str]
    """What a reader of the figures must know."""


def prepare_sets(
    task: Task,
    options: FinetuneOptions,
    *,
    tokenizer: Tokenizer,
    positions: int,
    log: Callable[[str], None],
) -> tuple[Prepared, dict[str, ExampleSet]]:
    """Return what all ranks need of the data, and the sets to evaluate with their texts.

    Args:
        task: Reads the data.
        options: Name them.
        tokenizer: The model's own.
        positions: Of the model.
        log: Called with a line about the work ahead.

    Raises:
        InputError: The data or the recipe cannot be used.
    """
    sets = read_sets(task, options)
    name = options.recipe or task.default_recipe(sets)
    recipe, warnings = _fit(
        load_recipe(name, task=task.name, overrides=options.overrides),
        positions,
        stated="seq_length" in options.overrides,
    )
    training = [part for part in sets if part.role == "train"]
    whole = merge(training, "train").limited(options.train_limit) if training else None
    limits = {"dev": options.dev_limit, "test": options.test_limit}
    evaluated = [part.limited(limits[part.role]) for part in sets if part.role in limits]
    settings = {**dataclasses.asdict(recipe), "max_steps": options.max_steps}
    log(_announcement(whole, evaluated, f"{name}, {training_plan(settings)}"))
    with token_cache() as cache:
        train = None
        if whole is not None:
            train = task.features(whole, tokenizer, recipe, cache=cache)
        features: dict[str, dict[str, PairFeatures]] = {role: {} for role in limits}
        for part in evaluated:
            features[part.role][part.name] = task.features(part, tokenizer, recipe, cache=cache)
    counts = {name: len(rows) for of_role in features.values() for name, rows in of_role.items()}
    if whole is not None and train is not None:
        counts |= {"train_examples": len(whole.examples), "train_samples": len(train)}
        counts["train_rows_cut"] = train.cut_rows()
    prepared = Prepared(
        recipe_name=name,
        recipe=recipe,
        train=train,
        evaluated=features,
        version=next((part.version for part in evaluated if part.version), ""),
        counts=counts,
        data=_record(options, sets, whole, evaluated),
        warnings=[*warnings, *(text for part in sets for text in part.warnings)],
    )
    return prepared, {part.name: part for part in evaluated}


def read_sets(task: Task, options: FinetuneOptions) -> Sequence[ExampleSet]:
    """Return all sets that the options name.

    Raises:
        InputError: There is nothing to train on or to evaluate, or the data cannot be used.
    """
    roles = [role for role in ROLES if role != "train" or not options.eval_only]
    named = {role: list(getattr(options, role)) for role in roles}
    rest = [role for role in roles if not named[role]]
    sets: list[ExampleSet] = []
    if options.data is not None and rest:
        sets += task.read(options.data, rest)
    for role, sources in named.items():
        for source in sources:
            sets += task.read_part(source, role)
    checked = check_names(sets)
    if options.eval_only:
        if not checked:
            raise InputError("there is nothing to evaluate; give --data, --dev or --test")
        return checked
    found = {part.role for part in checked if part.labelled}
    for role in ("train", "dev"):
        if role not in found:
            raise InputError(
                f"{options.data or 'the data'} holds no labelled examples for {role}; give them "
                f"with --data or --{role}"
            )
    return checked


def _fit(recipe: Recipe, positions: int, *, stated: bool) -> tuple[Recipe, list[str]]:
    """Return the recipe with rows that the model has positions for, and a warning if it is cut."""
    if recipe.seq_length <= positions:
        return recipe, []
    if stated:
        raise InputError(
            f"--seq-length {recipe.seq_length} is more than the model's {positions} positions; "
            f"choose at most that"
        )
    warning = (
        f"the model has {positions} positions, the recipe's rows {recipe.seq_length} tokens: rows "
        f"are cut at {positions}"
    )
    return dataclasses.replace(recipe, seq_length=positions), [warning]


def _announcement(whole: ExampleSet | None, evaluated: Sequence[ExampleSet], plan: str) -> str:
    sets = ", ".join(f"{part.name} {len(part.examples):,}" for part in evaluated)
    if whole is None:
        return f"work ahead: to evaluate {sets}"
    return f"work ahead: to train on {len(whole.examples):,} examples ({plan}), to evaluate {sets}"


def _record(
    options: FinetuneOptions,
    sets: Sequence[ExampleSet],
    whole: ExampleSet | None,
    evaluated: Sequence[ExampleSet],
) -> dict[str, Any]:
    """Return what the record says about the data; what limits left out stands in warnings."""
    entries = {part.name: part.record() for part in (*sets, *evaluated)}
    every = [part for part in (whole, *evaluated) if part is not None]
    warnings = [
        f"limited: only the first {len(part.examples):,} of {part.total:,} examples of {part.name} "
        f"are used; the figures are not those of the whole data"
        for part in every
        if len(part.examples) < part.total
    ]
    paths = sorted({entry["path"] for entry in entries.values()})
    return {
        "path": options.data or ", ".join(paths),
        "sha256": sha256(f"{name} {entry['sha256']}\n" for name, entry in sorted(entries.items())),
        "sets": entries,
        "warnings": warnings,
    }
