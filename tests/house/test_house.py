"""The rules that hold the project together: direction of imports, light start, what ships."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import check_wheel
from support.paths import PROJECT, SAMPLES

import mlm_eval

FOLDERS = {"checkpoints": "mlm_eval.checkpoints", "mlm_eval": "mlm_eval", "tasks": "mlm_eval.tasks"}


def module_files() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    files = {}
    for folder, package in FOLDERS.items():
        for file in sorted((PROJECT / folder).rglob("*.py")):
            parts = file.relative_to(PROJECT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            files[name] = file
    return files


MODULES = module_files()


def layer(module: str) -> str:
    """Return the layer of a module of the package: one of the four, or `api` for `mlm_eval`."""
    if module.startswith(("mlm_eval.checkpoints.", "mlm_eval.tasks.")):
        return module.split(".")[1]
    return {
        "mlm_eval": "api",
        "mlm_eval.__main__": "cli",
        "mlm_eval.checkpoints": "checkpoints",
        "mlm_eval.cli": "cli",
        "mlm_eval.tasks": "tasks",
    }.get(module, "cli" if module.startswith("mlm_eval.cli.") else "engine")


# What each layer may import of the package. `mlm_eval` itself (its version, its lazy names) is
# judged by the name taken from it.
ALLOWED = {
    "checkpoints": {"checkpoints"},
    "engine": {"checkpoints", "engine"},
    "tasks": {"checkpoints", "engine", "tasks"},
    "cli": {"checkpoints", "engine", "tasks", "cli", "api"},
    "api": {"checkpoints", "engine", "tasks"},
}


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of everything that a module's source imports, anywhere in it.

    `from a import b` yields `a.b`: whether b is a module or a name does not matter to the rules.
    Imports for type checking only count too, and so does `import_module("literal")`.
    """
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
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


def imports_of(module: str) -> list[tuple[int, str]]:
    """Return the imports of a module of this project."""
    file = MODULES[module]
    return list(
        imports(file.read_text(encoding="utf-8"), module, is_package=file.name == "__init__.py")
    )


def direction_fault(module: str, imported: str) -> str | None:
    """Return what is wrong when `module` imports `imported`, or None."""
    top = imported.partition(".")[0]
    if top in ("tasks", "checkpoints", "tests"):
        return f"{top} is no package of its own: import mlm_eval.{top}"
    if top == "megatron":
        return "the package works without Megatron"
    if top != "mlm_eval" or imported == "mlm_eval.__version__":
        return None
    # `from mlm_eval import Engine` names no module: the lazy name stands for the module behind it.
    target = mlm_eval._HOME.get(imported.removeprefix("mlm_eval."), imported)
    if layer(target) not in ALLOWED[layer(module)]:
        return f"{layer(module)} must not import {layer(target)}"
    return None


def process_group_uses(source: str, module: str) -> list[tuple[int, str]]:
    """Return what a source takes from torch.distributed, but for torch.distributed.checkpoint."""
    found = [
        (line, name)
        for line, name in imports(source, module)
        if name.startswith("torch.distributed")
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith("torch.distributed."):
                found.append((node.lineno, name))
    allowed = re.compile(r"torch\.distributed\.checkpoint(\.|$)")
    return [(line, name) for line, name in found if not allowed.match(name)]


COLLECTIVE = re.compile(
    r"(all_|a?reduce|broadcast|gather|scatter|(monitored_)?barrier|i?send|i?recv|batch_isend|new_group)"
)


def collectives_named(source: str, module: str) -> list[tuple[int, str]]:
    """Return the collectives of torch.distributed that a source names, however it imports them."""
    names = [(line, name) for line, name in imports(source, module)]
    tree = ast.parse(source)
    aliases = {"torch.distributed"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            aliases |= {
                alias.asname or alias.name
                for alias in node.names
                if origin + alias.name == "torch.distributed"
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
            names.append((node.lineno, f"torch.distributed.{node.attr}"))
    called = ((line, name, name.removeprefix("torch.distributed.")) for line, name in names)
    return [(line, name) for line, name, end in called if end != name and COLLECTIVE.match(end)]


# --- the rules on made-up sources: each has to be able to fail ---


@pytest.mark.parametrize(
    ("module", "source", "faulty"),
    [
        ("mlm_eval.checkpoints.lazy", "from mlm_eval.engine.engine import Engine", True),
        ("mlm_eval.checkpoints.lazy", "from mlm_eval import Engine", True),
        ("mlm_eval.checkpoints.lazy", "from mlm_eval import gpt", True),
        ("mlm_eval.checkpoints.lazy", "from .. import gpt", True),
        ("mlm_eval.checkpoints.lazy", "def f():\n    import mlm_eval.ranks.launch", True),
        ("mlm_eval.checkpoints.lazy", "from mlm_eval import __version__", False),
        ("mlm_eval.checkpoints.lazy", "from .errors import InputError", False),
        ("mlm_eval.checkpoints.lazy", "from mlm_eval import InputError", False),
        ("mlm_eval.checkpoints.lazy", "import megatron.core", True),
        ("mlm_eval.engine.engine", "from mlm_eval.tasks import lambada", True),
        ("mlm_eval.engine.engine", "import_module('mlm_eval.tasks.zero_shot.lambada')", True),
        ("mlm_eval.engine.engine", "import mlm_eval.cli", True),
        ("mlm_eval.engine.engine", "import tasks.lambada", True),
        ("mlm_eval.engine.engine", "from mlm_eval.checkpoints.config import ModelConfig", False),
        ("mlm_eval.tasks.zero_shot.lambada", "from mlm_eval.cli import app", True),
        ("mlm_eval.tasks.zero_shot.lambada", "from mlm_eval.engine.engine import Engine", False),
        ("mlm_eval.cli", "from mlm_eval.tasks import lambada", False),
    ],
)
def test_the_direction_rule_tells_right_from_wrong(module: str, source: str, faulty: bool):
    faults = [direction_fault(module, name) for _, name in imports(source, module)]
    assert len(faults) == 1
    assert bool(faults[0]) == faulty


@pytest.mark.parametrize(
    ("source", "faulty"),
    [
        ("import torch.distributed as dist", True),
        ("from torch import distributed", True),
        ("from torch.distributed import all_reduce", True),
        ("import torch\ntorch.distributed.get_rank()", True),
        ("import torch.distributed.checkpoint as dcp", False),
        ("from torch.distributed.checkpoint.metadata import Metadata", False),
        ("from torch.distributed import checkpoint", False),
    ],
)
def test_the_process_group_rule_tells_right_from_wrong(source: str, faulty: bool):
    assert bool(process_group_uses(source, "mlm_eval.checkpoints.lazy")) == faulty


@pytest.mark.parametrize(
    ("source", "faulty"),
    [
        ("import torch.distributed as dist\ndist.all_reduce(x)", True),
        ("import torch.distributed as dist\nkeep = dist.all_gather_object", True),
        ("import torch\ntorch.distributed.barrier()", True),
        ("def f():\n    from torch import distributed as d\n    d.broadcast(x, 0)", True),
        ("from torch.distributed import all_reduce as sum_up", True),
        ("import torch.distributed as dist\ndist.get_rank()", False),
        ("from torch.distributed.fsdp import fully_shard", False),
        ("from mlm_eval.ranks.collectives import barrier\nbarrier()", False),
    ],
)
def test_the_collectives_rule_tells_right_from_wrong(source: str, faulty: bool):
    assert bool(collectives_named(source, "mlm_eval.training.step")) == faulty


# --- the rules on the project ---


def test_the_walk_sees_the_whole_package():
    assert {layer(module) for module in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str):
    faults = [
        f"line {line}: {name}: {fault}"
        for line, name in imports_of(module)
        if (fault := direction_fault(module, name))
    ]
    assert not faults


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) == "checkpoints"])
def test_the_loader_needs_no_process_group(module: str):
    assert not process_group_uses(MODULES[module].read_text(encoding="utf-8"), module)


@pytest.mark.parametrize(
    "module",
    [
        name
        for name in MODULES
        if name in ("mlm_eval.model.transformer", "mlm_eval.model.gpt", "mlm_eval.model.bert")
    ],
)
def test_the_model_talks_to_other_ranks_through_tensor_parallel_only(module: str):
    assert not process_group_uses(MODULES[module].read_text(encoding="utf-8"), module)


def test_collectives_are_called_in_two_files_only():
    """One for what the model's layers say to each other, one for everything else."""
    found = {
        module
        for module, file in MODULES.items()
        if collectives_named(file.read_text(encoding="utf-8"), module)
    }
    assert found == {"mlm_eval.model.tensor_parallel", "mlm_eval.ranks.collectives"}


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) != "cli"])
def test_only_the_command_line_prints(module: str):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    lines = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not lines


# --- what a start costs ---


def modules_after(statements: str) -> tuple[str, set[str]]:
    """Run statements in a fresh interpreter; return what it printed and which modules it loaded."""
    script = (
        "import json, sys\n"
        f"try:\n    exec({statements!r})\n"
        "except SystemExit as end:\n    assert not end.code, f'exit code {end.code}'\n"
        "print('\\nLOADED', json.dumps(sorted(name for name in sys.modules if '.' not in name)))\n"
    )
    # Elsewhere, so that the installed package is found and not the working folder.
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(sys.executable).parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    output, _, loaded = done.stdout.rpartition("\nLOADED ")
    return output, set(json.loads(loaded))


def command(*arguments: str) -> str:
    """Return the statements that run the command line, without ending the process with it."""
    return (
        f"import sys; sys.argv = {['mlm-eval', *arguments]!r}; "
        "from mlm_eval.cli import main; main()"
    )


def test_importing_the_package_does_not_import_torch():
    _, loaded = modules_after("import mlm_eval, mlm_eval.tasks, mlm_eval.checkpoints")
    assert "mlm_eval" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "datasets", "typer"}


# Each of these costs seconds that only the commands which use it may spend.
HEAVY = {"transformers", "datasets", "evaluate", "lm_eval", "matplotlib", "tensorboard"}


def test_help_is_quick_and_names_the_commands():
    output, loaded = modules_after(command("--help"))
    assert not loaded & HEAVY
    for name in ("inspect", "wikitext103", "lambada", "score"):
        assert name in output


def test_inspect_reads_the_sample_without_heavy_imports():
    sample = PROJECT / "checkpoints" / "samples" / "gpt"
    output, loaded = modules_after(command("inspect", "--ckpt", str(sample), "--json"))
    assert json.loads(output)["format"] == "megatron-torch"
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", mlm_eval.__all__)
def test_every_public_name_is_found(name: str):
    assert getattr(mlm_eval, name)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = mlm_eval.Motor


def test_the_python_api_evaluates_the_sample():
    """The four lines of a user: open, load, evaluate, read; the tokenizer is the checkpoint's."""
    samples = SAMPLES
    checkpoint = mlm_eval.open_checkpoint(samples / "gpt")
    engine = mlm_eval.Engine.load(checkpoint, tp=1)
    data = samples / "text" / "lambada.sample.jsonl"
    result = mlm_eval.evaluate("lambada", engine, data=data, limit=3)
    assert result.task == "lambada"
    assert result.counts["examples"] == 3
    assert result.metrics["num_correct"] in range(4)


def test_an_unknown_benchmark_is_refused_by_name():
    with pytest.raises(mlm_eval.InputError, match="no benchmark 'glue'.*lambada, wikitext103"):
        mlm_eval.evaluate("glue", engine=None)


# --- what is declared and what ships ---


def test_every_dependency_has_one_tested_version():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        declared += extra
    tested: dict[str, str] = {}
    for line in (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert canonicalize_name(name) not in tested, f"{name} stands there twice"
            tested[canonicalize_name(name)] = version
    for requirement in map(Requirement, declared):
        version = tested[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def test_the_built_wheel_holds_the_package_alone(tmp_path: Path):
    """Build here without isolation: setuptools is in the environment, nothing has to be fetched.

    `make wheel`, which CI runs, builds in isolation as a user does, and makes the same check. The
    build works on a copy, because setuptools leaves build/ and egg-info in the folder it builds.
    """
    source = tmp_path / "source"
    for folder in FOLDERS:
        shutil.copytree(
            PROJECT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(PROJECT / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert check_wheel.wheel_faults(wheel, PROJECT) == []


def test_the_wheel_check_sees_strangers_and_gaps(tmp_path: Path):
    wheel = tmp_path / "mlm_eval-0-py3-none-any.whl"
    packed = check_wheel.source_files(PROJECT) - {"mlm_eval/py.typed"}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [*packed, "tasks/finetune/race.py", "mlm_eval/deleted.py"]:
            archive.writestr(name, "")
    top_level, missing, stale, licence = check_wheel.wheel_faults(wheel, PROJECT)
    assert "['tasks']" in top_level
    assert "['mlm_eval/py.typed']" in missing
    assert "mlm_eval/deleted.py" in stale
    assert "licence" in licence
