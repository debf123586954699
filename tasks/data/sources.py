"""What `--data` and its like name: a local file, or a set of the `datasets` library."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError, first_line, require
from mlm_eval.checkpoints.files.text_file import decode, read_bytes
from mlm_eval.tasks.data.known import local_hint
from mlm_eval.tasks.data.tables import is_table, read_table, read_tables, table_files

HUB_SPLITS = {"train": {"train": "train"}, "dev": {"validation": "dev"}, "test": {"test": "test"}}
"""The usual splits of each role, by the name that their sets get."""

DATASET_FILES = ("dataset_dict.json", "state.json")
"""What marks a folder that `datasets` saved."""

FILE_SUFFIXES = {".txt", ".tokens", ".raw", ".json", ".jsonl", ".parquet", ".csv", ".tsv", ".zip"}


@dataclass(frozen=True)
class DatasetName:
    """A `datasets` set, written `path:config:split`; the config may be absent, None: all splits."""

    path: str
    config: str | None
    split: str | None = "test"

    def __str__(self) -> str:
        return ":".join(part for part in (self.path, self.config, self.split) if part)


@dataclass(frozen=True)
class RawData:
    """Exactly one of `content` (a file's bytes) and `rows` (a column's strings) is there."""

    path: str
    content: bytes | None = None
    rows: list[str] | None = None

    def text(self) -> str:
        """Return the file's bytes as text, its line ends as they are.

        Raises:
            InputError: The bytes are not UTF-8.
        """
        assert self.content is not None
        return decode(self.content, self.path)


def read_data(
    data: str | Path | None, *, column: str, default: DatasetName, tables: bool = False
) -> RawData:
    """Return what `data` names.

    Args:
        data: A local file; a folder that `datasets` wrote or can read; a name on the Hub such as
            `wikitext:wikitext-103-v1:test`; None for the default.
        column: The column that holds the text.
        default: What None means; also gives the config to a name that says none.
        tables: JSON lines are rows too, not the file's own bytes.

    Raises:
        InputError: There is no such data, it is empty, or it has no such column.
    """
    if data is None:
        return _read_dataset(default, column)
    path = Path(data).expanduser()
    if path.is_file() and is_table(path) and (tables or path.suffix != ".jsonl"):
        return _text_rows(read_table(path), column, str(path))
    if path.is_file():
        content = read_bytes(path)
        if not content.strip():
            raise InputError(f"{path} is empty; expected the text to evaluate on")
        return RawData(str(path), content=content)
    if path.is_dir():
        return _read_dataset(DatasetName(str(path), None), column)
    if path.suffix in FILE_SUFFIXES or str(data).startswith(("/", "./", "../", "~")):
        folder = str(data).partition(":")[0]
        if not Path(folder).expanduser().is_dir():
            raise InputError(
                f"{data} does not exist; --data takes a local file or the name of a `datasets` set"
            )
    return _read_dataset(parse_dataset_name(str(data), default), column)


def parse_dataset_name(text: str, default: DatasetName) -> DatasetName:
    """Return `path[:config[:split]]` taken apart; `wikitext` alone means the default's own set.

    Raises:
        InputError: There are more parts, or the first one is empty.
    """
    path, *rest = text.split(":", 2)
    if not path or any(not part for part in rest[1:]):
        raise InputError(f"--data {text}: expected a file or a dataset as NAME, NAME:CONFIG:SPLIT")
    config = rest[0] if rest and rest[0] else None
    split = rest[1] if len(rest) > 1 else default.split
    # `wikitext` is the Hub's old name of the set, unless a folder here is called so.
    if path in (default.path, default.path.partition("/")[2]) and not Path(path).is_dir():
        return DatasetName(default.path, config or default.config, split)
    return DatasetName(str(Path(path).expanduser()), config, split)


def _read_dataset(name: DatasetName, column: str) -> RawData:
    loaded = load_dataset(name)
    if isinstance(loaded, dict):  # a DatasetDict: the folder held several splits
        if name.split not in loaded:
            raise InputError(
                f"{name} has no split {name.split}; it has {', '.join(loaded)}; "
                f"write --data {name.path}::SPLIT"
            )
        loaded = loaded[name.split]
    return _text_rows(loaded, column, str(name))


def _text_rows(loaded: Any, column: str, name: str) -> RawData:
    if column not in loaded.column_names:
        raise InputError(
            f"{name} has no column {column!r}; it has {', '.join(loaded.column_names)}; "
            f"this task reads its text from that column"
        )
    rows = list(loaded[column])
    if not any(isinstance(row, str) and row.strip() for row in rows):
        raise InputError(f"{name} holds no text in its column {column!r} ({len(rows)} rows)")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, str):
            raise InputError(f"{name}: row {number} of {column!r} is {row!r}; expected a string")
    return RawData(name, rows=rows)


def load_dataset(name: DatasetName) -> Any:
    """Return a set, or a dict of them by split: a folder's tables, or what `datasets` makes.

    Raises:
        InputError: It makes nothing of it, or is not installed.
    """
    folder = Path(name.path)
    saved = any((folder / file).is_file() for file in DATASET_FILES)
    if folder.is_dir() and not saved:
        inner = folder / name.config if name.config else folder
        if inner.is_dir() and (found := read_tables(inner)):
            return found
    require("datasets", str(name), "give a local file with --data")
    import datasets

    quiet = not (sys.stderr.isatty() or datasets.are_progress_bars_disabled())
    if quiet:
        datasets.disable_progress_bars()
    unreachable = None
    try:
        if saved:
            return datasets.load_from_disk(name.path)
        if not folder.is_dir():
            unreachable = _unreachable(name.path)
        with _offline(unreachable is not None):
            return datasets.load_dataset(name.path, name.config, split=name.split)
    # Every layer below raises its own kinds (of datasets, huggingface_hub, httpx, pyarrow), and
    # what the user can do is always the same.
    except Exception as error:
        if unreachable is not None and isinstance(error, (ConnectionError, FileNotFoundError)):
            raise InputError(
                f"{name} is not in the local cache, and the Hugging Face hub cannot be reached "
                f"({unreachable}); {local_hint(name.path)}"
            ) from None
        reason = str(error).strip().splitlines()
        raise InputError(
            f"{name} cannot be loaded by `datasets` ({type(error).__name__}: "
            f"{' '.join(reason)[:300] or 'no reason given'}); --data takes a local file too, "
            f"which needs no network connection"
        ) from error
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _unreachable(path: str) -> str | None:
    """Return why the Hub cannot be asked for a set, after one try; None where it answers.

    `datasets` itself tries six times, with waits of 23 s in all.
    """
    from huggingface_hub import HfApi, constants, errors

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().dataset_info(path, timeout=10.0)
    except (errors.HfHubHTTPError, errors.HFValidationError):
        return None  # an answer, which `datasets` gets too
    except Exception as error:  # of the network, or of the library that speaks to it
        return first_line(error)[:120]
    return None


@contextmanager
def _offline(asked: bool) -> Iterator[None]:
    """Keep `datasets` to its cache, where that is asked for."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if asked:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def is_dataset(source: str) -> bool:
    """Return whether `source` is for the `datasets` library: one of its folders, or no path at all.

    Args:
        source: A value of `--data` and such.

    Raises:
        InputError: It looks like a path, but nothing is there.
    """
    path = Path(source.partition(":")[0]).expanduser()
    if path.is_dir():
        if ":" in source or any((path / name).is_file() for name in DATASET_FILES):
            return True
        return bool([*path.glob("*.parquet"), *path.glob("*/*.parquet")]) or bool(table_files(path))
    if path.exists() or Path(source).expanduser().exists():
        return False
    looks_like_path = source.startswith(("/", "./", "../", "~")) or path.suffix in (
        ".gz", ".tgz", ".tar", ".txt", ".tsv", ".json",
    )  # fmt: skip
    if looks_like_path:
        raise InputError(f"{source} does not exist; give a file, a folder or a `datasets` name")
    return True


def dataset_splits(
    source: str,
    *,
    default: DatasetName,
    splits: Mapping[str, str],
    columns: Iterable[str],
    role: str,
) -> Iterator[tuple[str, str, Any]]:
    """Yield (split, name for people, rows) of a `datasets` name for one role.

    Args:
        source: `NAME[:CONFIG[:SPLIT]]`, or a folder that `datasets` saved.
        default: Gives the configuration where the name says none.
        splits: Of the role, by the name that their sets get.
        columns: What a split must have.
        role: `train`, `dev` or `test`.

    Raises:
        InputError: There is no such set, split or column.
    """
    name = parse_dataset_name(source, default)
    config = name.config or (None if Path(name.path).is_dir() else default.config)
    wanted = splits
    if name.split:  # by Megatron's name: validation_matched -> dev-matched
        wanted = {name.split: name.split.replace("validation", "dev").replace("_", "-")}
    loaded = load_dataset(DatasetName(name.path, config, None))
    if not isinstance(loaded, dict):  # a folder that holds one split
        loaded = {next(iter(wanted)): loaded}
    found = [split for split in wanted if split in loaded]
    if not found and (name.split or role != "test"):
        raise InputError(
            f"{source} has no split {' or '.join(wanted)}; it has {', '.join(loaded)}; write "
            f"{name.path}:{config or ''}:SPLIT to choose one"
        )
    for split in found:
        rows, where = loaded[split], str(DatasetName(name.path, config, split))
        for column in columns:
            if column not in rows.column_names:
                raise InputError(
                    f"{where} has no column {column!r}; it has {', '.join(rows.column_names)}"
                )
        yield wanted[split], where, rows
