"""data: the files that the tasks want, where they come from, and whether yours are those."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.command import command
from mlm_eval.cli.printing import show_text
from mlm_eval.options import option

if TYPE_CHECKING:
    from mlm_eval.tasks.data.known import KnownFile


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The options of `data`."""

    task: str | None = option(
        "Only those of wikitext103, lambada, race, mnli, qqp, squad or tokenizer; default: all.",
        None,
        positional=True,
        choices=("wikitext103", "lambada", "race", "mnli", "qqp", "squad", "tokenizer"),
    )
    data: tuple[Path, ...] = option(
        "A file, or a folder of them: is it what the task wants? Exit code 2 where it is not "
        "(repeatable).",
        (),
    )
    as_json: bool = option("Print one JSON record.", False, flag="--json")


@command("data", DataOptions, config=False)
def data_command(options: DataOptions) -> None:
    """Bytes and sha256 are those of files that were read; where none was, that is said.

    Example: mlm-eval data wikitext103 --data wiki.test.tokens
    """
    from mlm_eval.tasks.data.known import files_of, known_tasks

    if options.data:
        if options.task is None:
            raise InputError(
                "--data needs the task that the file is for: mlm-eval data TASK --data F"
            )
        _check(options.task, options.data)
        return
    tasks = [options.task] if options.task else known_tasks()
    files = [file for task in tasks for file in files_of(task)]
    if options.as_json:
        import json

        show_text(json.dumps([dataclasses.asdict(file) for file in files], indent=2))
        return
    for number, task in enumerate(tasks):
        show_text(("\n" if number else "") + "\n".join([task, *map(_described, files_of(task))]))


def _described(file: KnownFile) -> str:
    lines = [f"  {file.name}: {file.what}"]
    if file.bytes is None:
        lines.append("    bytes and sha256 are not known here: the file was not read")
    else:
        lines.append(f"    {file.bytes:,} bytes, sha256 {file.sha256}")
    lines += [f"    {url}" for url in file.urls]
    if file.source is not None:
        lines.append(f"    (address: {file.source})")
    if file.hub is not None:
        lines.append(f"    on the Hub: --data {file.hub}")
    return "\n".join(lines)


def _check(task: str, paths: tuple[Path, ...]) -> None:
    """Print what the files are.

    Raises:
        InputError: One is not what the task wants.
    """
    from mlm_eval.tasks.data.known import check_file, check_folder_of

    wrong = []
    for path in paths:
        found = check_folder_of(path, task) if path.is_dir() else [check_file(path, task)]
        for checked in found:
            if checked is None:
                show_text(
                    f"{path}: no file of {task} was read here, so there is nothing to compare with"
                )
            elif checked.differs:
                wrong.append(f"{checked.path} {checked.verdict}")
            else:
                show_text(f"{checked.path} {checked.verdict}")
    if wrong:
        raise InputError("; ".join(wrong))
