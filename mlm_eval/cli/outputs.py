"""What a command writes, checked before it works, by what its options declare."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import check_writable, is_stream
from mlm_eval.checkpoints.folders.kept_scores import forget_finished
from mlm_eval.options import FOLDER, PAGE, Option, asks_for_series, flag_of
from mlm_eval.reporting.existing import LIMITS, holds_more, is_page, is_result
from mlm_eval.reporting.series_list import read_series


def check_outputs(options: Mapping[str, Option], values: Mapping[str, Any]) -> None:
    """Refuse outputs that cannot be written, that are inputs, or that would replace a result.

    A result is replaced with `--overwrite` only, and one of all the data not even then by one of
    less; a page of `report` is replaced by the next. What is not a result of ours never is.

    Args:
        options: The command's, by the names of their fields.
        values: What is given for them.

    Raises:
        InputError: An output is refused.
    """
    outputs = [
        (flag_of(name, option), Path(values[name]), option.writes)
        for name, option in options.items()
        if option.writes and values.get(name) is not None
    ]
    inputs = list(_inputs(options, values))
    anew = bool(values.get("overwrite") or values.get("restart"))
    limits = {name: values[name] for name in LIMITS if values.get(name) is not None}
    places: dict[str, str] = {}
    for flag, path, writes in outputs:
        if writes != FOLDER and is_stream(path):
            check_writable(path, flag)
            continue
        place = os.path.realpath(path.expanduser() if writes == FOLDER else path)
        if place in places:
            raise InputError(f"{flag} and {places[place]} both name {path}; name two places")
        places[place] = flag
        if writes != FOLDER:
            check_writable(path, flag)
        for other, given in inputs:
            _check_input(flag, Path(place), other, given, replaced=writes == FOLDER and anew)
        if writes == FOLDER:
            _check_folder(flag, path.expanduser(), limits)
        else:
            check_existing(
                flag,
                path,
                writes,
                limits,
                overwrite=bool(values.get("overwrite")),
                series=asks_for_series(values),
            )


def _inputs(options: Mapping[str, Option], values: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Yield the flag and the path of every file and folder that is given and exists."""
    for name, value in values.items():
        option = options.get(name)
        if option is not None and option.writes:
            continue
        flag = flag_of(name, option)
        for entry in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(entry, Path) or (option and option.reads and isinstance(entry, str)):
                with suppress(OSError, ValueError, RuntimeError):  # a name that is no path
                    path = Path(entry).expanduser()
                    if path.exists():
                        yield flag, path


def _check_input(flag: str, place: Path, other: str, given: Path, *, replaced: bool) -> None:
    """Refuse an output that is an input, or a folder to be replaced that holds one."""
    source = Path(os.path.realpath(given))
    if source == place or (place.exists() and source.exists() and place.samefile(source)):
        raise InputError(
            f"{flag} {place} is what {other} names, which it would replace; name another place"
        )
    if replaced and source.is_relative_to(place):
        raise InputError(
            f"{flag} {place}, which is to be replaced, holds what {other} names ({given}); name "
            "another place"
        )
    if source.is_dir() and place.is_file() and place.is_relative_to(source):
        raise InputError(
            f"{flag} {place} is one of the files in {other} {given}, which it would replace; name "
            "another place"
        )


def check_existing(
    flag: str,
    path: Path,
    writes: str,
    limits: Mapping[str, int],
    *,
    overwrite: bool,
    series: bool = False,
) -> None:
    """Refuse to replace a file, unless it is empty, or a result that may be replaced.

    Args:
        flag: The option that names it.
        path: The file.
        writes: `FILE` or `PAGE`.
        limits: Those of `LIMITS` that are given.
        overwrite: Whether `--overwrite` is.
        series: Whether the list of an earlier series is continued.

    Raises:
        InputError: It may not be replaced.
    """
    if not path.exists() or path.stat().st_size == 0 or (writes == PAGE and is_page(path)):
        return
    forget_finished(path)
    ours = is_result(path)
    if limits and ours and (more := holds_more(path, limits)):
        raise InputError(
            f"{path} holds {more}, which a limited run never replaces; name another file with "
            f"{flag}"
        )
    if series and read_series(path) is not None:
        return
    if not overwrite:
        raise InputError(
            f"{path} exists already; "
            + ("replace it with --overwrite, or name" if ours else "name")
            + f" another file with {flag}"
        )
    if not ours:
        raise InputError(
            f"{path} is not a result of mlm-eval, so --overwrite does not replace it; remove it, "
            f"or name another file with {flag}"
        )


def _check_folder(flag: str, path: Path, limits: Mapping[str, int]) -> None:
    """Refuse a folder that is none, cannot be written, or holds the result of more data."""
    if os.path.lexists(path) and not path.is_dir():
        raise InputError(f"{flag} {path} is not a folder; name another one")
    check_writable(path / "file", flag)
    record = path / "result.json"
    if limits and record.is_file() and (more := holds_more(record, limits)):
        raise InputError(
            f"{path} holds {more}, which a limited run never replaces; choose another {flag}"
        )
