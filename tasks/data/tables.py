"""Tables on the disk: parquet and JSON-lines files, one or a folder of them, as the Hub has them.

A folder holds a file a split, or several shards of it: `train-00000-of-00002.parquet`,
`validation_matched.jsonl`, also below `data/`. Nothing is merged but the shards of one split: a
folder of several configurations is refused with their names.
Source: https://huggingface.co/docs/datasets/repository_structure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.archives.unpacking import LARGEST_RATIO
from mlm_eval.checkpoints.errors import InputError, first_line
from mlm_eval.checkpoints.files.stand_in import HEAD_BYTES, refuse_stand_in
from mlm_eval.checkpoints.files.text_file import parse_json, read_text

_PARQUET = b"PAR1"
_FILE = re.compile(
    r"(?P<split>[^.].*?)(-(?P<part>\d{5})-of-(?P<parts>\d{5}))?\.(parquet|jsonl|ndjson)"
)
_SPLITS = {"valid": "validation", "val": "validation", "dev": "validation"}


@dataclass(frozen=True)
class DataTable:
    """Rows with named columns, as the `datasets` library gives them."""

    column_names: list[str]
    rows: list[dict[str, Any]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        return [row[column] for row in self.rows]


def is_table(path: Path) -> bool:
    """Whether a file holds rows with named columns: its content decides, not its name."""
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError:
        return False
    if head.startswith(_PARQUET):
        return True
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"{") and path.suffix in (".jsonl", ".ndjson")


def read_table(path: Path) -> DataTable:
    """Return the rows of a file.

    Raises:
        InputError: The file is cut off, damaged, or its lines are no JSON objects.
    """
    refuse_stand_in(path)
    with path.open("rb") as stream:
        parquet = stream.read(len(_PARQUET)) == _PARQUET
    if parquet:
        return parquet_table(path, str(path))
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            row = parse_json(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number} is not a JSON object; expected one a line")
            rows.append(row)
    names = list(rows[0]) if rows else []
    if fault := next((i for i, row in enumerate(rows, 1) if not set(names) <= set(row)), None):
        raise InputError(f"{path}: row {fault} lacks a column of the first row; get it again")
    return DataTable(names, rows)


def is_parquet(content: bytes) -> bool:
    """Whether a file that begins so is a parquet file."""
    return content.startswith(_PARQUET)


def parquet_table(source: Path | BytesIO, name: str) -> DataTable:
    """Return the rows of a parquet file.

    Args:
        source: Its path, or its content.
        name: For messages.

    Raises:
        InputError: It is cut off or damaged, or its texts are far more than its bytes.
    """
    import pyarrow.parquet

    size = source.stat().st_size if isinstance(source, Path) else len(source.getbuffer())
    try:
        file = pyarrow.parquet.ParquetFile(source)
        groups = (file.metadata.row_group(at) for at in range(file.num_row_groups))
        _check_unpacked(name, size, sum(group.total_byte_size for group in groups))
        cells = file.metadata.num_rows * file.metadata.num_columns
        if cells > 4 * size + (1 << 18):
            raise InputError(f"{name} holds {cells:,} cells in {size:,} bytes; get it again")
        kinds = (pyarrow.string(), pyarrow.large_string())
        texts = [field.name for field in file.schema_arrow if field.type in kinds]
        # Of texts that are repeated, one of each, until it is known what all of them take.
        table = pyarrow.parquet.ParquetFile(source, read_dictionary=texts).read()
        _check_unpacked(name, size, sum(map(_text_bytes, map(table.column, texts))))
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{name} is cut off or damaged ({first_line(error)[:120]}); get it again"
        ) from None
    return DataTable(list(table.column_names), table.to_pylist())


def _check_unpacked(name: str, size: int, need: int) -> None:
    if need > LARGEST_RATIO * size + (1 << 22):
        raise InputError(
            f"{name} unpacks to {need:,} bytes, more than {LARGEST_RATIO} times its size; get it "
            "again"
        )


def _text_bytes(column: Any) -> int:
    """Return the bytes of the texts in a column of a dictionary and of places in it."""
    import pyarrow.compute

    total = 0
    for chunk in column.chunks:
        lengths = pyarrow.compute.binary_length(chunk.dictionary).cast("int64")
        total += pyarrow.compute.sum(lengths.take(chunk.indices)).as_py() or 0
    return total


def split_of(path: Path) -> str:
    """Return the split that a file's name says: `validation_matched-00000-of-00001.parquet`."""
    match = _FILE.fullmatch(path.name)
    name = match["split"] if match else path.stem
    head, _, rest = name.partition("_")
    return "_".join(part for part in (_SPLITS.get(head, head), rest) if part)


def table_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split in a folder, shards in order; none where it holds no tables.

    Raises:
        InputError: The folder holds several configurations, or shards are missing.
    """
    for place in (folder, folder / "data"):
        found = [f for f in sorted(place.glob("*")) if _FILE.fullmatch(f.name) and f.is_file()]
        if found:
            return _by_split(found)
    inner = [f for f in sorted(folder.glob("*")) if f.is_dir() and not f.name.startswith(".")]
    configs = [f for f in inner if any(_FILE.fullmatch(file.name) for file in f.glob("*"))]
    if len(configs) == 1:
        return table_files(configs[0])
    if configs:
        names = ", ".join(config.name for config in configs)
        raise InputError(
            f"{folder} holds several sets ({names}), which may repeat each other; give one of "
            f"them, such as {configs[0]} or {folder}:{configs[0].name}"
        )
    return {}


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file), []).append(file)
    for split, parts in splits.items():
        wanted = {int(m["parts"] or 1) for f in parts if (m := _FILE.fullmatch(f.name))}
        if len(parts) != max(wanted) or len(wanted) > 1:
            names = ", ".join(part.name for part in parts[:3])
            raise InputError(
                f"{parts[0].parent} has {len(parts)} file(s) for the split {split} ({names}), "
                f"whose names say {max(wanted)}; copy all of one set, and no other"
            )
    return splits


def read_tables(folder: Path) -> dict[str, DataTable]:
    """Return the splits of a folder; none where it holds no tables.

    Raises:
        InputError: See `table_files` and `read_table`; or the shards of a split differ in columns.
    """
    return {split: _joined(files) for split, files in table_files(folder).items()}


def _joined(files: list[Path]) -> DataTable:
    tables = [read_table(file) for file in files]
    for file, table in zip(files, tables, strict=True):
        if table.column_names != tables[0].column_names:
            raise InputError(f"{file} has other columns than {files[0].name}; get them again")
    return DataTable(tables[0].column_names, [row for table in tables for row in table.rows])
