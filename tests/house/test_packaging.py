"""What is declared and what ships: dependencies, the wheel, the sdist, a clone without links."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.house import check_wheel
from support.paths import PROJECT


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
        if requirement.name == "mlm-eval":  # an extra that is made of others
            continue
        version = tested[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def copy_of_the_project(folder: Path) -> Path:
    """Copy what a clone holds of the package, its symbolic links as they are."""
    for name in ("checkpoints", "mlm_eval", "tasks"):
        shutil.copytree(
            PROJECT / name,
            folder / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "LICENSE", "README.md", "Makefile", "constraints.txt"):
        shutil.copy(PROJECT / name, folder)
    return folder


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command and return how it ended."""
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, **options
    )


def test_the_sdist_holds_files_and_the_wheel_built_from_it_the_package_alone(tmp_path: Path):
    """Build without isolation: setuptools is in the environment, nothing has to be fetched.

    `make wheel`, which CI runs, builds in isolation as a user does, straight from the clone, and
    makes the same check. The build works on a copy, because setuptools leaves build/ and egg-info
    in the folder it builds.
    """
    source = copy_of_the_project(tmp_path / "source")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, source)
    done = run(*command, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    missing = check_wheel.source_files(PROJECT) - set(packed)
    assert not missing
    assert not [name for name, member in packed.items() if member.issym() or member.islnk()]
    (wheel,) = tmp_path.glob("*.whl")
    assert check_wheel.wheel_faults(wheel, PROJECT) == []


def test_a_clone_without_symbolic_links_says_how_to_get_them(tmp_path: Path):
    """The sentence stands in make's output and in Python's, and what it says to do helps."""
    quiet = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org")
    origin, clone = copy_of_the_project(tmp_path / "origin"), tmp_path / "clone"
    for command in (
        (*git, "init", "--quiet", origin),
        (*git, "-C", origin, "add", "mlm_eval", "checkpoints/errors.py", "tasks/__init__.py"),
        (*git, "-C", origin, "add", "Makefile", "pyproject.toml", "constraints.txt"),
        (*git, "-C", origin, "commit", "--quiet", "--message", "all"),
        (*git, "clone", "--quiet", "--config", "core.symlinks=false", origin, clone),
    ):
        assert run(*command, env=quiet).returncode == 0, command
    assert (clone / "mlm_eval" / "checkpoints").read_text() == "../checkpoints"

    import_error = "from mlm_eval import InputError"
    imported = run(sys.executable, "-c", import_error, cwd=clone, env={**quiet, "PYTHONPATH": ""})
    made = run("make", "demo", "VENV=none", cwd=clone, env=quiet)
    assert imported.returncode == 1 and made.returncode != 0
    for said in (imported.stderr, made.stderr):
        assert "git wrote the symbolic links of this clone as text files" in said
        assert "Traceback" not in said and "ImportError" not in said
        advice = re.search(r"git config core.symlinks true && git checkout -- [\w/ ]+", said)
        assert advice is not None
    assert not (clone / "none").exists()

    assert run("sh", "-c", advice.group(), cwd=clone, env=quiet).returncode == 0
    imported = run(sys.executable, "-c", import_error, cwd=clone, env={**quiet, "PYTHONPATH": ""})
    assert imported.returncode == 0, imported.stderr
    assert run("make", "links", cwd=clone, env=quiet).returncode == 0


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
