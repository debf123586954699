"""Which tests start processes: found by reading them.

A test gets the marker `process` when it uses `subprocess` or `multiprocessing`, itself or through
functions and fixtures of its file and of tests/support (ranks, the command line as a user runs it).
What starts processes deep inside the product cannot be read off: such a test carries the marker
itself.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from support.paths import SUPPORT

STARTERS = ("subprocess", "multiprocessing")
OURS = ("verify_conversion",)
"""What starts a process in the product when it is called."""


@functools.cache
def names_that_start(file: Path) -> frozenset[str]:
    """Return the functions, fixtures and variables of a file that start processes when used."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tainted: set[str] = set()
    plugins: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            tainted |= {
                (alias.asname or alias.name).partition(".")[0]
                for alias in node.names
                if alias.name.partition(".")[0] in STARTERS
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.name: alias.asname or alias.name for alias in node.names}
            if node.module.partition(".")[0] in STARTERS:
                tainted |= set(names.values())
            elif node.module.startswith("mlm_eval."):
                tainted |= {ours for name, ours in names.items() if name in OURS}
            elif node.module.partition(".")[0] == "support":
                if source := _file(node.module):
                    theirs = names_that_start(source)
                    tainted |= {ours for name, ours in names.items() if name in theirs}
                else:  # `ranks.run_ranks`: a module's attributes are looked up below
                    modules = filter(None, map(_file, names))
                    tainted = tainted.union(*map(names_that_start, modules))
        elif isinstance(node, ast.Constant) and str(node.value).startswith("support."):
            plugins.add(str(node.value))  # pytest_plugins = ["support.folders.minilm_fixtures"]
    for plugin in filter(None, map(_file, plugins)):
        tainted |= names_that_start(plugin)
    uses = {name: _names_in(node) for node in tree.body for name in _defined_by(node)}
    while found := {name for name, used in uses.items() if name not in tainted and used & tainted}:
        tainted |= found
    return frozenset(tainted)


def _file(module: str) -> Path | None:
    """Return the file of a module of tests/support, whatever its room; None where there is none."""
    return next(SUPPORT.rglob(f"{module.rpartition('.')[2]}.py"), None)


def _defined_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _names_in(node: ast.stmt) -> set[str]:
    """Return the names that a definition uses, those of its parameters (fixtures) included."""
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    found |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    return found | {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}


def mark(items: list[pytest.Item]) -> None:
    """Add the marker `process` to the tests that start processes."""
    for item in items:
        tainted = names_that_start(item.path)
        name = getattr(item, "originalname", item.name)
        if name in tainted or tainted & set(getattr(item, "fixturenames", ())):
            item.add_marker("process")
