"""The catalog: public checkpoints, how to get them, what they do not record, what to expect.

One TOML file each in `catalog/`. `--ckpt catalog:NAME` looks for the files under a local folder;
nothing is ever downloaded here.
"""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError

PREFIX = "catalog:"
SAMPLE_PREFIX = "sample:"
FOLDER_VARIABLE = "MLM_EVAL_CATALOG"


@dataclass(frozen=True)
class Expectation:
    """A number that somebody reported for a checkpoint."""

    task: str
    """The benchmark."""
    metric: str
    """As a result record names it."""
    value: float
    """The number, in `unit`."""
    unit: str
    """`%` or `perplexity`."""
    who: str
    """Who reported it."""
    where: str
    """The address."""
    note: str = ""
    """What a reader must know; may be empty."""


@dataclass(frozen=True)
class CatalogEntry:
    """One public checkpoint."""

    name: str
    """Its name, for `catalog:NAME`."""
    title: str
    family: str
    """`gpt` or `bert`."""
    publisher: str
    """Who published it, and under which name."""
    holds: str
    """What the files contain."""
    tokenizer: str
    """Which vocabulary it needs."""
    get: Sequence[str]
    """Commands that fetch it."""
    files: Sequence[str]
    """Names under which it may lie in the local folder."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What its files do not record."""
    expect: Sequence[Expectation] = ()
    """Reported numbers."""


@functools.cache
def catalog_entries() -> dict[str, CatalogEntry]:
    """Return the catalog, by name."""
    folder = resources.files(__package__).joinpath("catalog")
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(".toml"))
    found = {}
    for file in files:
        values = tomllib.loads(folder.joinpath(file).read_text(encoding="utf-8"))
        name = file.removesuffix(".toml")
        expect = [Expectation(**item) for item in values.pop("expect", [])]
        found[name] = CatalogEntry(name=name, expect=expect, **values)
    return found


def sample_folder(path: str | Path) -> Path | None:
    """Return the folder of the sample that `sample:NAME` stands for; None for any other path.

    Raises:
        InputError: There is no such sample.
    """
    if not str(path).startswith(SAMPLE_PREFIX):
        return None
    name = str(path).removeprefix(SAMPLE_PREFIX)
    if name not in sample_names():
        known = ", ".join(SAMPLE_PREFIX + sample for sample in sample_names())
        raise InputError(f"there is no sample {name!r}; the package holds {known}")
    return _samples() / name


def sample_names() -> list[str]:
    """Return the checkpoints that ship with the package, for `sample:NAME`."""
    return sorted(made.parent.name for made in _samples().glob("*/training.json"))


def _samples() -> Path:
    return Path(str(resources.files(__package__).joinpath("samples")))


def is_catalog_name(path: str | Path) -> bool:
    """Return whether a `--ckpt` names an entry of the catalog."""
    return str(path).startswith(PREFIX)


def find_entry(path: str | Path) -> CatalogEntry:
    """Return the entry that `catalog:NAME`, or NAME, stands for.

    Raises:
        InputError: There is none.
    """
    name = str(path).removeprefix(PREFIX)
    if name not in catalog_entries():
        raise InputError(
            f"the catalog has no checkpoint {name!r}; it has {', '.join(catalog_entries())} "
            "(`mlm-eval catalog` describes them)"
        )
    return catalog_entries()[name]


def local_folder() -> Path:
    """Return where the files of the catalog's checkpoints are looked for.

    Raises:
        InputError: $MLM_EVAL_CATALOG is set, but not to a folder.
    """
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise InputError(
                f"${FOLDER_VARIABLE} is {given}, which is not a folder; set it to the one "
                "that holds the checkpoints"
            )
        return folder
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "mlm_eval" / "catalog"


def locate(entry: CatalogEntry) -> Path | None:
    """Return the local file or folder of an entry, or None."""
    folder = local_folder()
    for name in (entry.name, f"{entry.name}.zip", *entry.files):
        if (folder / name).exists():
            return folder / name
    return None


def resolve(path: str | Path) -> tuple[CatalogEntry, Path]:
    """Return the entry that `catalog:NAME` stands for, and where its files are.

    Raises:
        InputError: There is no such entry, or its files are not there.
    """
    entry = find_entry(path)
    found = locate(entry)
    if found is None:
        raise InputError(
            f"{PREFIX}{entry.name} is not in {local_folder()} (looked for {entry.name} and "
            f"{', '.join(entry.files)}); get it with `{entry.get[0]}` in that folder, or set "
            f"${FOLDER_VARIABLE} to the folder that holds it"
        )
    return entry, found
