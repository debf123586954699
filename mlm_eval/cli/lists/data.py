"""data: the files that the tasks want, where they come from, and whether yours are those."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.command import command
from mlm_eval.cli.printing import show_text
from mlm_eval.cli.screen import phase
from mlm_eval.options import option

if TYPE_CHECKING:
    from mlm_eval.tasks.data.known import Checked, KnownFile


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
    """Bytes and sha256 are those of files that were read, or published by others, who are named.

    --data compares yours with those of its kind, and the sets in a folder of RACE or MNLI, or in a
    tar archive of RACE, with theirs. A form of the data that is not known cannot be told.

    Example: mlm-eval data wikitext103 --data wiki.test.tokens
    """
    from mlm_eval.tasks.data.known import files_of, known_tasks

    if options.data:
        if options.task is None:
            raise InputError(
                "--data needs the task that the file is for: mlm-eval data TASK --data F"
            )
        _check(options.task, options.data, as_json=options.as_json)
        return
    tasks = [options.task] if options.task else known_tasks()
    files = [file for task in tasks for file in files_of(task)]
    if options.as_json:
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
    if file.published is not None:
        lines.append(f"    (as {file.published} gives them; the file was not read here)")
    lines += [f"    {url}" for url in file.urls]
    if file.source is not None:
        lines.append(f"    (address: {file.source})")
    if file.hub is not None:
        lines.append(f"    on the Hub: --data {file.hub}")
    return "\n".join(lines)


def _check(task: str, paths: tuple[Path, ...], *, as_json: bool) -> None:
    """Print what files and folders are.

    Raises:
        InputError: One is not what the task wants.
    """
    found = [checked for path in paths for checked in _checked(path, task)]
    if as_json:
        show_text(json.dumps([vars(c) | {"path": str(c.path)} for c in found], indent=2))
    else:
        for checked in found:
            if checked.wanted is not False:
                show_text(f"{checked.path} {checked.verdict}")
    wrong = [f"{checked.path} {checked.verdict}" for checked in found if checked.wanted is False]
    if wrong:
        raise InputError("; ".join(wrong))


def _checked(path: Path, task: str) -> list[Checked]:
    """Return the verdicts about a file, or about what a folder holds.

    Raises:
        InputError: Nothing can be read there.
    """
    from mlm_eval.tasks.data.known import (
        check_file,
        check_folder_of,
        check_set,
        files_of,
        known_sets,
    )
    from mlm_eval.tasks.finetune.race import ARCHIVES
    from mlm_eval.tasks.finetune.task import ROLES, TASKS, make_task

    found = check_folder_of(path, task) if path.is_dir() else [check_file(path, task)]
    packed = path.is_dir() or (task == "race" and path.name.endswith(ARCHIVES))
    single = path.name.endswith((".tsv", ".txt"))
    if not found and task not in TASKS:
        names = ", ".join(file.name for file in files_of(task))
        raise InputError(f"{path} holds none of {names}, the known files of {task}; name a file")
    with_sets = known_sets(task) and (packed or single) and not any(c.wanted for c in found)
    if found and not with_sets:
        return found
    reader = make_task(task)
    with phase(f"reading {path}"):
        sets = reader.read_folder(path, ROLES) if packed else reader.read_path(path, "dev")
    return [check_set(path, task, s.name, len(s.examples), s.sha256) for s in sets]
