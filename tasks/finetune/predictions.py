"""Saved predictions of fine-tuned models, and ensembles of them.

A file of predictions is JSON lines, one set a file. The first line says what the rest are:

    {"predictions_of": "race", "set": "dev-middle", "role": "dev", "seed": 1, ...}
    {"id": "middle13.txt-0", "label": 2, "probabilities": [0.1, 0.2, 0.6, 0.1]}

or, for SQuAD,

    {"id": "...", "text": "France", "answers": ["France"], "null_odds": -3.2, "n_best": [...]}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError, shown, visible_json
from mlm_eval.checkpoints.files.output import write_text
from mlm_eval.checkpoints.files.text_file import misfit, parse_json, read_text
from mlm_eval.checkpoints.folders.file_names import safe_name
from mlm_eval.reporting.results import Result, versions
from mlm_eval.tasks.data.text import sha256
from mlm_eval.tasks.finetune.task import ROLES, Answered, Judgement, Task, make_task

MARK = "predictions_of"
SUFFIX = ".jsonl"
SUBMISSIONS = (".tsv", ".json", ".null_odds.json")
"""Suffixes of the benchmarks' own forms; see `Task.submission`."""


@dataclass(frozen=True)
class Predictions:
    """One file of predictions."""

    path: Path
    """Of the file."""
    header: Mapping[str, Any]
    """What it says about itself; see `write_predictions`."""
    records: Sequence[Mapping[str, Any]]
    """One for each example, in the order of the set."""

    @property
    def set_name(self) -> str:
        """Name of the set, such as dev-middle."""
        return str(self.header["set"])


def write_predictions(
    path: Path,
    answered: Answered,
    records: Sequence[Mapping[str, Any]],
    *,
    task: Task,
    **header: Any,
) -> Path:
    """Write a file of predictions, and the benchmark's own forms beside it; return its path.

    Args:
        path: Of the file.
        answered: What the set is.
        records: The decided predictions.
        task: Of which they are.
        header: `seed`, `checkpoint` (its record), `recipe`, `null_threshold`, ...

    Raises:
        InputError: The name of the set cannot name a file, or the files cannot be written.
    """
    safe_name(answered.name, "the set")
    for suffix, text in task.submission(records).items():
        write_text(path.with_name(path.name.removesuffix(SUFFIX) + suffix), text)
    first = {
        MARK: task.name,
        "set": answered.name,
        "role": answered.role,
        "labelled": answered.labelled,
        "version": answered.version,
        "examples": len(records),
        **header,
    }
    lines = (
        visible_json(json.dumps(entry, ensure_ascii=False)) + "\n" for entry in (first, *records)
    )
    return write_text(path, "".join(lines))


def read_predictions(path: Path) -> Predictions:
    """Return a file of predictions.

    Raises:
        InputError: It is none, or not whole.
    """
    lines = [line for line in read_text(path).split("\n") if line]
    entries = [parse_json(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1)]
    header, *records = entries or [{}]
    if not isinstance(header, dict) or not {MARK, "set", "role"} <= set(header):
        raise InputError(
            f"{path} holds no predictions of mlm-eval; expected a file that `mlm-eval race`, "
            f"`mnli`, `qqp` or `squad` wrote to its folder predictions"
        )
    if fault := misfit(header, _HEADER):
        raise InputError(f"{path}, line 1 is damaged: {fault}; make the predictions again")
    safe_name(header["set"], f"{path}, line 1: the set")
    if header["role"] not in ROLES:
        raise InputError(
            f"{path}, line 1: the role is {shown(header['role'])}; expected one of "
            f"{', '.join(ROLES)}"
        )
    task = make_task(header[MARK])
    if header["examples"] != len(records):
        raise InputError(
            f"{path} holds {len(records)} predictions, its first line says {header['examples']}; "
            f"it is not whole"
        )
    for number, record in enumerate(records, start=2):
        if fault := task.record_fault(record):
            raise InputError(
                f"{path}, line {number} is no prediction: {fault}; make the predictions again"
            )
    return Predictions(path, header, records)


_HEADER = {
    MARK: "text",
    "set": "text",
    "role": "text",
    "labelled": "flag",
    "version": "text",
    "examples": "count",
    "seed": "count?",
    "checkpoint": "object",
    "checkpoint.path": "text?",
    "checkpoint.digest": "text?",
    "checkpoint.num_parameters": "count",
    "checkpoint.config": "object?",
    "recipe": "text?",
    "null_threshold": "number?",
    "threshold_is_fixed": "flag?",
    "train_limit": "count?",
    "dev_limit": "count?",
    "test_limit": "count?",
}
"""The fields of a file's first line."""


def prediction_files(folder: Path) -> list[Path]:
    """Return the files of predictions in a folder, and the benchmarks' own forms beside them."""
    found = []
    for path in sorted(folder.glob("*" + SUFFIX)):
        with suppress(InputError):  # of something else
            read_predictions(path)
            stem = path.name.removesuffix(SUFFIX)
            beside = [path.with_name(stem + suffix) for suffix in SUBMISSIONS]
            found += [path, *(form for form in beside if form.is_file())]
    return found


def ensemble_result(
    paths: Sequence[str | Path], *, output: str | Path | None = None, overwrite: bool = False
) -> Result:
    """Return the result of several models together: the paper's ensemble.

    The models' probabilities are averaged for each example of a set; sets of one role are pooled as
    for a single model.

    Args:
        paths: Files of predictions, or folders of them; as many models for each set.
        output: Folder for the ensemble's own predictions.
        overwrite: Replace predictions that are there.

    Raises:
        InputError: The files are not of the same task and examples, or a set has one model only.
    """
    files = [read_predictions(path) for path in _files(paths)]
    groups: dict[str, list[Predictions]] = {}
    for file in files:
        groups.setdefault(file.set_name, []).append(file)
    first = files[0].header
    for group in groups.values():
        _check_group(group, task=first[MARK], models=len(groups[files[0].set_name]))
    task = make_task(first[MARK])
    answered = [_merged(task, group) for group in groups.values()]
    judgement = task.judge(answered, null_threshold=_threshold(files))
    if output is not None:
        _check_free(Path(output), [part.name for part in answered], files, overwrite=overwrite)
        for part in answered:
            write_predictions(
                Path(output) / (part.name + SUFFIX),
                part,
                judgement.predictions[part.name],
                task=task,
                ensemble=[str(file.path) for file in groups[part.name]],
                checkpoint=first["checkpoint"],
                null_threshold=judgement.null_threshold(part.role),
                threshold_is_fixed=False,
            )
    return _result(files, groups, judgement)


def _check_free(
    folder: Path, names: Sequence[str], sources: Sequence[Predictions], *, overwrite: bool
) -> None:
    """Refuse to replace files, but for predictions with `overwrite`, and never those given."""
    given = {os.path.realpath(file.path) for file in sources}
    replaceable = prediction_files(folder) if overwrite else []
    for path in (folder / (name + suffix) for name in names for suffix in (SUFFIX, *SUBMISSIONS)):
        if os.path.realpath(path) in given:
            raise InputError(f"{path} is one of the ensemble's members; choose another folder")
        if os.path.lexists(path) and path not in replaceable:
            how = "" if overwrite else "replace predictions with --overwrite, or "
            raise InputError(f"{path} exists already; {how}choose another --output-dir")


def _files(paths: Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.glob("*" + SUFFIX)) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path} holds no predictions (*{SUFFIX}); give the files")
        found += inside
    if len({os.path.realpath(path) for path in found}) < len(found):
        raise InputError("one file of predictions is given twice; a model has one voice")
    if not found:
        raise InputError("an ensemble needs files of predictions; give them with --predictions")
    return found


def _check_group(group: Sequence[Predictions], *, task: str, models: int) -> None:
    """Refuse files that do not answer the same questions."""
    first = group[0]
    for file in group:
        if file.header[MARK] != task:
            raise InputError(
                f"{file.path} holds predictions of {file.header[MARK]}, another file those of "
                f"{task}; give files of one task"
            )
        truth = "answers" if task == "squad" else "label"
        ours, theirs = (
            [(record["id"], record[truth]) for record in part.records] for part in (file, first)
        )
        if ours != theirs:
            raise InputError(
                f"{file.path} and {first.path} are not about the same examples of "
                f"{file.set_name}; give predictions for the same data"
            )
        shapes = ([len(r.get("probabilities", ())) for r in part.records] for part in (file, first))
        if len(set(map(tuple, shapes))) > 1:
            raise InputError(
                f"{file.path} and {first.path} have probabilities of other numbers of answers; "
                "give predictions for the same data"
            )
    if models < 2:
        raise InputError(f"there is one model for {first.set_name}; an ensemble needs two or more")
    if len(group) != models:
        raise InputError(
            f"{first.set_name} has predictions of {len(group)} model(s), another set those of "
            f"{models}; give as many for each set"
        )


def _merged(task: Task, group: Sequence[Predictions]) -> Answered:
    header = group[0].header
    return Answered(
        name=group[0].set_name,
        role=header["role"],
        labelled=header["labelled"],
        version=header["version"],
        records=[task.merge(same) for same in zip(*(file.records for file in group), strict=True)],
    )


def _threshold(files: Sequence[Predictions]) -> float | None:
    """Return the threshold of "no answer" for all sets; None: it is to be found on the dev sets.

    Without dev sets it is the mean of the models'.
    """
    values = [file.header.get("null_threshold") for file in files]
    known = [value for value in values if value is not None]
    fixed = any(file.header.get("threshold_is_fixed") for file in files)
    if not known or (not fixed and any(file.header["role"] == "dev" for file in files)):
        return None
    return float(sum(known) / len(known))


def _result(
    files: Sequence[Predictions],
    groups: Mapping[str, Sequence[Predictions]],
    judgement: Judgement,
) -> Result:
    header = files[0].header
    models = len(next(iter(groups.values())))
    contents = sha256(json.dumps([file.header, file.records]) for file in files)
    limits = {f"{role}_limit": _first(files, f"{role}_limit") for role in ("train", "dev", "test")}
    return Result(
        task=header[MARK],
        protocol="megatron-paper",
        metrics=dict(judgement.metrics),
        counts={name: len(group[0].records) for name, group in groups.items()},
        settings={
            "ensemble": models,
            "version": header["version"],
            "recipe": header.get("recipe"),
            **limits,
            "data": {"path": [str(file.path) for file in files], "sha256": contents},
            "models": [
                {"path": str(f.path), "set": f.set_name, "seed": f.header.get("seed")}
                for f in files
            ],
            "warnings": [],
        },
        checkpoint=dict(header["checkpoint"]),
        timing={},
        versions=versions(),
    )


def _first(files: Sequence[Predictions], name: str) -> Any:
    return next((f.header[name] for f in files if f.header.get(name) is not None), None)
