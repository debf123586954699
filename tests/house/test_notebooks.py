"""The notebooks as committed; that they run is checked by `make notebooks`.

They are read as JSON: nbformat is no dependency of the tests.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.paths import PROJECT

FOLDER = PROJECT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEYS = {
    "markdown": {"cell_type", "id", "metadata", "source"},
    "code": {"cell_type", "id", "metadata", "source", "execution_count", "outputs"},
}


def faults(notebook: dict[str, Any]) -> list[str]:
    """Return what a committed notebook must not have, and what nbformat 4.5 asks for."""
    found = []
    if (notebook.get("nbformat"), notebook.get("nbformat_minor")) != (4, 5):
        found.append("not nbformat 4.5")
    if notebook.get("metadata") != KERNEL:
        found.append("metadata beside the plain python3 kernel")
    cells = notebook.get("cells", [])
    ids = [cell.get("id", "") for cell in cells]
    if len(set(ids)) < len(ids) or not all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids):
        found.append("an id that is missing, malformed or there twice")
    for cell in cells:
        if set(cell) != KEYS.get(cell.get("cell_type"), set()):
            found.append(f"{cell.get('id')}: keys {sorted(cell)}")
        if cell.get("outputs") or cell.get("execution_count") is not None:
            found.append(f"{cell.get('id')}: outputs or a count of a run")
        if cell.get("metadata"):
            found.append(f"{cell.get('id')}: metadata")
        if not all(isinstance(line, str) for line in cell.get("source", [None])):
            found.append(f"{cell.get('id')}: source is no list of lines")
    return found


def load(path: Path) -> dict[str, Any]:
    """Return a notebook."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def test_all_notebooks_are_there() -> None:
    names = {path.stem for path in NOTEBOOKS}
    assert names >= {"zero_shot", "race", "convert_and_verify", "layer_norm_placement"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_and_the_form_is_valid(path: Path) -> None:
    assert faults(load(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_title_comes_first_then_the_settings_then_code_that_parses(path: Path) -> None:
    title, settings, *others = load(path)["cells"]
    assert title["cell_type"] == "markdown" and title["source"][0].startswith("# ")
    assert settings["id"] == "settings" and settings["cell_type"] == "code"
    for cell in (settings, *others):
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}]}, "outputs"),
        ({"execution_count": 3}, "count of a run"),
        ({"metadata": {"scrolled": True}}, "metadata"),
        ({"attachments": {}}, "keys"),
        ({"id": "no id"}, "malformed"),
    ],
)
def test_the_check_sees_what_a_run_leaves(change: dict[str, Any], fault: str) -> None:
    notebook = load(NOTEBOOKS[0])
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code.update(change)
    assert fault in " ".join(faults(notebook))
