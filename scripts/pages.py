"""Gather the pages of the documentation site, as `make docs` does before mkdocs.

The pages keep their places of the project, so that a link works there, on a forge and on the site.
A link to a file that is no page takes the file along; one to a folder becomes plain text. The pages
on Python name modules, whose docstrings mkdocstrings shows.

    python scripts/pages.py --notebooks build/notebooks --output build/pages
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlm_eval

PROJECT = Path(__file__).resolve().parents[1]
FRONT = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)((?:#[^)\s]*)?)\)")

MODULES = {
    "checkpoints": (
        "checkpoints.open", "checkpoints.convert", "checkpoints.checkpoint", "checkpoints.config",
        "checkpoints.lazy", "checkpoints.parameters", "checkpoints.vocabulary",
        "checkpoints.tokenizer", "checkpoints.comparison", "checkpoints.errors",
    ),
    "engine": (
        "engine.engine", "engine.score", "engine.generate", "engine.encode", "engine.verify",
        "ranks.world", "ranks.launch", "ranks.mesh",
    ),
    "training": (
        "training.settings", "training.data", "training.objectives", "training.loop",
        "training.optimization",
    ),
    "model": (
        "model.gpt", "model.bert", "model.t5", "model.transformer", "model.attention",
        "model.tensor_parallel", "model.experts", "model.mamba",
    ),
    "tasks": (
        "tasks", "tasks.zero_shot.benchmark", "tasks.zero_shot.wikitext103",
        "tasks.zero_shot.lambada", "tasks.zero_shot.score", "tasks.finetune.run",
        "tasks.finetune.task", "tasks.finetune.race", "tasks.finetune.glue",
        "tasks.finetune.squad", "tasks.language.pretraining", "reporting.results",
    ),
}  # fmt: skip
"""The modules on each page of api/, below the page of the public names."""
TITLES = {"checkpoints": "Checkpoints", "engine": "The engine and its ranks", "model": "The model"}


def public_names() -> Iterator[str]:
    """Yield a line for each public name of the package: a link, and what its docstring says."""
    for name in mlm_eval.__all__:
        value = getattr(mlm_eval, name)
        if not name.startswith("__"):
            first = str(value.__doc__).partition("\n")[0]
            yield f"- [`{name}`][{value.__module__}.{name}]: {first}"


def api_pages() -> Iterator[tuple[str, str]]:
    """Yield name and text of each page on Python."""
    yield "index.md", "\n".join(["# The public names of mlm_eval", "", *public_names(), ""])
    for page, modules in MODULES.items():
        shown = "\n\n".join(f"::: mlm_eval.{module}" for module in modules)
        yield f"{page}.md", f"# {TITLES.get(page, page.capitalize())}\n\n{shown}\n"


def gather(output: Path, notebooks: Path) -> None:
    """Write the pages.

    Args:
        output: Folder to make; one that is there is replaced.
        notebooks: Where the executed notebooks are.
    """
    shutil.rmtree(output, ignore_errors=True)
    sources = [PROJECT / name for name in FRONT] + sorted((PROJECT / "docs").glob("*.md"))
    waiting = [*sources]
    taken: set[Path] = set()
    while waiting:
        source = waiting.pop()
        if source in taken:
            continue
        taken.add(source)
        target = output / source.relative_to(PROJECT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".md":
            shutil.copyfile(source, target)
            continue

        def kept(match: re.Match[str], source: Path = source) -> str:
            linked = (source.parent / match[2]).resolve()
            if linked.is_dir():
                return match[1]
            waiting.append(linked)
            return match[0]

        target.write_text(LINK.sub(kept, source.read_text(encoding="utf-8")), encoding="utf-8")
    for name, text in api_pages():
        (output / "api").mkdir(exist_ok=True)
        (output / "api" / name).write_text(text, encoding="utf-8")
    shutil.copytree(notebooks, output / "notebooks", ignore=lambda *_: [".done"])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--notebooks", type=Path, required=True, help="the executed notebooks")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    gather(arguments.output, arguments.notebooks)


if __name__ == "__main__":
    main()
