"""The rules of the house as functions of source text: what test_house.py applies to the project.

Each takes sources by module name and returns the faults, one sentence each, so that a made-up
source can show that a rule is able to fail.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from packaging.utils import canonicalize_name

import mlm_eval

FOLDERS = {"checkpoints": "mlm_eval.checkpoints", "mlm_eval": "mlm_eval", "tasks": "mlm_eval.tasks"}
DOORS = ("__init__", "__main__")

# From the bottom up. A module imports from its own room and from rooms on lower floors; rooms that
# share a floor do not know each other. A module belongs to the room with the longest name that
# fits.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("mlm_eval.options",),
    ("mlm_eval.checkpoints",),
    ("mlm_eval.checkpoints.megatron", "mlm_eval.checkpoints.huggingface"),
    ("mlm_eval.checkpoints.deepspeed",),
    ("mlm_eval.checkpoints.open", "mlm_eval.checkpoints.convert"),
    ("mlm_eval.model",),
    ("mlm_eval.ranks",),
    ("mlm_eval.engine",),
    ("mlm_eval.training",),
    ("mlm_eval.reporting",),
    ("mlm_eval.planning", "mlm_eval.harness", "mlm_eval.series"),
    ("mlm_eval.tasks.data",),
    ("mlm_eval.tasks.zero_shot", "mlm_eval.tasks.finetune", "mlm_eval.tasks.language"),
    ("mlm_eval.tasks",),
    ("mlm_eval.cli",),
    ("mlm_eval.__main__",),
)
# The package itself stands on top: it looks its names up when they are used.
API = "mlm_eval"
COLLECTIVES = {
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all"),
    *("barrier", "monitored_barrier", "broadcast", "broadcast_object_list", "gather"),
    *("gather_object", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter"),
    *("scatter_object_list", "send", "recv", "isend", "irecv", "all_reduce_coalesced"),
}
parsed = functools.cache(ast.parse)
"""One tree for all rules that look at a source."""
TALKERS = ("mlm_eval.model.tensor_parallel", "mlm_eval.ranks.collectives")


def sources(project: Path) -> dict[str, str]:
    """Return the source of every module of the product by its dotted name.

    The name of a door is that of its package with `.__init__` behind it.
    """
    found = {}
    for folder, package in FOLDERS.items():
        for file in sorted((project / folder).rglob("*.py")):
            parts = file.relative_to(project / folder).with_suffix("").parts
            found[".".join((package, *parts))] = file.read_text(encoding="utf-8")
    return found


# --- Who imports whom ---------------------------------------------------------------------------


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of everything that a module's source imports, anywhere in it.

    `from a import b` yields `a.b`: whether b is a module or a name is for the rule to find out.
    Imports for type checking only count too, and so does `import_module("literal")`.
    """
    package = module.rpartition(".")[0]
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def home(imported: str) -> str:
    """Return what stands behind a lazy name of the package: `mlm_eval.Engine` is the engine's."""
    if not imported.startswith("mlm_eval."):
        return imported  # `import evaluate` is another library's
    return mlm_eval._HOME.get(imported.removeprefix("mlm_eval."), imported)


def floor(module: str) -> tuple[int, str]:
    """Return the floor and the room of a module."""
    rooms = [
        (number, room)
        for number, names in enumerate(FLOORS)
        for room in names
        if f"{module}.".startswith(f"{room}.")
    ]
    return max(rooms, key=lambda room: len(room[1]), default=(len(FLOORS), API))


def direction_fault(module: str, imported: str) -> str | None:
    """Return what is wrong when `module` imports `imported`, or None."""
    top = imported.partition(".")[0]
    if top in ("tasks", "checkpoints", "tests"):
        return f"{top} is no package of its own: import mlm_eval.{top}"
    if top == "megatron":
        return "the package works without Megatron"
    if top != "mlm_eval" or imported == "mlm_eval.__version__":
        return None
    (own, room), (other, target) = floor(module), floor(home(imported))
    if room.startswith("mlm_eval.checkpoints") and not target.startswith("mlm_eval.checkpoints"):
        return f"{room} imports from checkpoints only, not from {target}"
    if room == target or other < own:
        return None
    return f"{room} must not import {target}"


def direction_faults(modules: Mapping[str, str]) -> list[str]:
    """Return the imports that go up, or to a neighbour."""
    return [
        f"{module}, line {line}: {imported}: {fault}"
        for module, source in modules.items()
        for line, imported in imports(source, module)
        if (fault := direction_fault(module.removesuffix(".__init__"), imported))
    ]


def module_of(name: str, modules: Iterable[str]) -> str | None:
    """Return the module that a dotted name is, or stands in; None where it is not ours."""
    known = {module.removesuffix(".__init__") for module in modules}
    name = home(name)
    while name and name not in known:
        name = name.rpartition(".")[0]
    return None if name in ("", API) else name


def circles(modules: Mapping[str, str]) -> list[list[str]]:
    """Return the groups of modules that import each other, deferred imports included."""
    graph: dict[str, set[str]] = {}
    for module, source in modules.items():
        targets = {module_of(name, modules) for _, name in imports(source, module)}
        graph[module.removesuffix(".__init__")] = {name for name in targets if name}
    reached = {module: _reachable(module, graph) for module in graph}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached.get(other, ())))
        for module in graph
        if module in reached[module]
    }
    return sorted(map(list, groups))


def _reachable(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += graph.get(module, ())
    return found


# --- Rooms and names ----------------------------------------------------------------------------


def room_faults(modules: Mapping[str, str], most: int = 12) -> list[str]:
    """Return the folders with more than `most` files besides the door, or no docstring there."""
    faults = []
    rooms: dict[str, list[str]] = {}
    for module in modules:
        room, _, file = module.rpartition(".")
        rooms.setdefault(room, []).append(file)
    for room, files in rooms.items():
        if (count := len(set(files) - set(DOORS))) > most:
            faults.append(f"{room} holds {count} files; a room holds {most}")
        door = modules.get(f"{room}.__init__")
        if door is None or not ast.get_docstring(parsed(door)):
            faults.append(f"{room} has no docstring at its door")
    return faults


def unnamed_at_the_door(modules: Mapping[str, str]) -> list[str]:
    """Return the files and rooms inside a room that the docstring at its door does not name."""
    faults = []
    for module in modules:
        room, _, file = module.rpartition(".")
        named = f"{file}.py"
        if file == "__init__":
            room, _, file = room.rpartition(".")
            named = f"{file}/"
        door = modules.get(f"{room}.__init__")
        if door is None or file in DOORS:
            continue
        if not re.search(rf"(?<![\w/]){re.escape(named)}", ast.get_docstring(parsed(door)) or ""):
            faults.append(f"{room} does not name {named}")
    return faults


def public_names(source: str) -> set[str]:
    """Return the public classes, functions and constants at the top level of a source."""
    found = set()
    for node in parsed(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_")}


def shared_names(modules: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the public names that stand in more than one file, and where."""
    where: dict[str, list[str]] = {}
    for module, source in modules.items():
        for name in sorted(public_names(source)):
            where.setdefault(name, []).append(module)
    return {name: places for name, places in where.items() if len(places) > 1}


def is_private(name: str) -> bool:
    """Whether a name is one file's own."""
    return name.startswith("_") and not name.endswith("__")


def private_faults(modules: Mapping[str, str]) -> list[str]:
    """Return the private names that a file takes from another: imported, or `other._name`.

    Of an object's attributes those count that no line of the file defines.
    """
    defined_by = {module: _defined(source) for module, source in modules.items()}
    ours = {name for names in defined_by.values() for name in names if is_private(name)}
    faults = []
    for module, source in modules.items():
        for line, imported in imports(source, module):
            if imported.startswith("mlm_eval.") and is_private(imported.rpartition(".")[2]):
                faults.append(f"{module}, line {line}: imports {imported}")
        for node in ast.walk(parsed(source)):
            if (
                isinstance(node, ast.Attribute)
                and is_private(node.attr)
                and node.attr in ours - defined_by[module]
            ):
                faults.append(f"{module}, line {node.lineno}: {ast.unparse(node)}")
    return faults


def _defined(source: str) -> set[str]:
    """Return the names that a file gives: of functions, classes, variables, attributes of self."""
    found = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


# --- Who talks, to ranks and to people ----------------------------------------------------------


def process_group_uses(source: str, module: str) -> list[tuple[int, str]]:
    """Return what a source takes from torch.distributed, but for torch.distributed.checkpoint."""
    found = [
        (line, name)
        for line, name in imports(source, module)
        if name.startswith("torch.distributed")
    ]
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith("torch.distributed."):
                found.append((node.lineno, name))
    allowed = re.compile(r"torch\.distributed\.checkpoint(\.|$)")
    return [(line, name) for line, name in found if not allowed.match(name)]


def process_group_faults(modules: Mapping[str, str]) -> list[str]:
    """Return the uses of a process group in the loader, and in the model's other files."""
    return [
        f"{module}, line {line}: {name}"
        for module, source in modules.items()
        if module.startswith(("mlm_eval.checkpoints.", "mlm_eval.model.")) and module not in TALKERS
        for line, name in process_group_uses(source, module)
    ]


def collective_faults(modules: Mapping[str, str]) -> list[str]:
    """Return the collectives that are used in other files than the two which talk."""
    faults = []
    for module, source in modules.items():
        if module in TALKERS:
            continue
        aliases = {"torch.distributed"}
        for node in ast.walk(parsed(source)):
            if isinstance(node, ast.Import):
                aliases |= {
                    name.asname for name in node.names if name.name == "torch.distributed"
                } - {None}
            elif isinstance(node, ast.ImportFrom) and node.module == "torch":
                aliases |= {n.asname or n.name for n in node.names if n.name == "distributed"}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "torch.distributed"
            ):
                faults += [
                    f"{module}, line {node.lineno}: {name.name}"
                    for name in node.names
                    if name.name in COLLECTIVES
                ]
        faults += [
            f"{module}, line {node.lineno}: {ast.unparse(node)}"
            for node in ast.walk(parsed(source))
            if isinstance(node, ast.Attribute)
            and node.attr in COLLECTIVES
            and ast.unparse(node.value) in aliases
        ]
    return faults


def print_faults(modules: Mapping[str, str]) -> list[str]:
    """Return the calls of `print` outside the command line."""
    return [
        f"{module}, line {node.lineno}"
        for module, source in modules.items()
        if floor(module)[1] not in ("mlm_eval.cli", "mlm_eval.__main__")
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


# --- What comes from elsewhere ------------------------------------------------------------------


DISTRIBUTIONS = {"yaml": "pyyaml"}
"""Packages whose distribution has another name."""


def dependency_faults(
    modules: Mapping[str, str], needed: set[str], optional: set[str]
) -> list[str]:
    """Return the packages that are declared and not imported, and the other way round.

    Args:
        modules: The sources.
        needed: Distributions that an installation brings.
        optional: Those that a command names where they are missing.
    """
    used: dict[str, str] = {}
    for module, source in modules.items():
        for line, name in imports(source, module):
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in ("mlm_eval", ""):
                top = DISTRIBUTIONS.get(top, top)
                used.setdefault(canonicalize_name(top), f"{module}, line {line}")
    faults = [f"{name} is declared and never imported" for name in sorted(needed - set(used))]
    for name, where in sorted(used.items()):
        if name not in needed | optional:
            faults.append(f"{where}: {name} is imported and not declared")
    return faults
