"""Texts cut into tokens once and kept: the slow part of preparing features.

Kept under a key of our own (texts, tokenizer, format). The key that the `datasets` library makes
of a function covers the tokenizer's inner state, which changes with its first use.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import atomic_file, cache_root
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.tasks.finetune.features import Ragged

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 1
"""Raised whenever the content of the kept files changes."""

COLUMNS = ("tokens", "starts", "stops")


@dataclass(frozen=True)
class Tokenized:
    """The tokens of some texts.

    Attributes:
        tokens: Ids of each text, nothing added.
        starts: Where each token starts in its text, in characters; with offsets only.
        stops: Where it ends, exclusive; with offsets only.
    """

    tokens: Ragged
    starts: Ragged | None = None
    stops: Ragged | None = None


@contextlib.contextmanager
def cache_folder() -> Iterator[Path]:
    """Give the folder for tokens; where it cannot be written, one that goes with the block."""
    try:
        folder = cache_root() / "tokens"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        with tempfile.TemporaryDirectory(prefix="mlm-eval-tokens-") as temporary:
            yield Path(temporary)
    else:
        yield folder


def cache_key(texts: Sequence[str], tokenizer: Tokenizer, *, offsets: bool) -> str:
    """Return a digest of all that decides the tokens."""
    state = hashlib.sha256()
    version = metadata.version("tokenizers")
    for part in (FORMAT, version, tokenizer.kind, tokenizer.sha256, tokenizer.lower_case, offsets):
        state.update(f"{part}\0".encode())
    for text in texts:
        data = text.encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def tokenize(
    texts: Sequence[str], tokenizer: Tokenizer, *, cache: Path, offsets: bool = False
) -> Tokenized:
    """Return the tokens of all texts, from the cache where they are there.

    Args:
        texts: In any number; they are cut in batches, in several threads.
        tokenizer: A fast one; see below.
        cache: Folder of the kept files, which must exist.
        offsets: Say where each token stands in its text, too.

    Raises:
        InputError: Offsets are asked of a sentencepiece model.
    """
    if offsets and tokenizer.kind == "sentencepiece":
        raise InputError(
            f"{tokenizer.source} does not say where a token stands in the text, so no answer can "
            f"be cut out; give a vocab.txt or a tokenizer.json"
        )
    path = cache / f"{cache_key(texts, tokenizer, offsets=offsets)}.arrow"
    if path.is_file():
        kept = _read(path, len(texts), offsets)
        if kept is not None:
            return kept
    _write(path, texts, tokenizer, offsets)
    made = _read(path, len(texts), offsets)
    assert made is not None, path
    return made


def _write(path: Path, texts: Sequence[str], tokenizer: Tokenizer, offsets: bool) -> None:
    """Cut the texts and write the file: the whole of it, or nothing."""
    import datasets

    integers = datasets.List(datasets.Value("int32"))
    columns = COLUMNS if offsets else COLUMNS[:1]

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        if tokenizer.kind == "sentencepiece":
            return {"tokens": [tokenizer.encode(text) for text in batch["text"]]}
        found = tokenizer.backend.encode_batch(batch["text"], add_special_tokens=False)
        result = {"tokens": [encoding.ids for encoding in found]}
        if offsets:
            for place, name in enumerate(COLUMNS[1:]):
                result[name] = [[pair[place] for pair in entry.offsets] for entry in found]
        return result

    # Types are stated: they cannot be told from no texts at all.
    source = datasets.Dataset.from_dict(
        {"text": list(texts)}, features=datasets.Features({"text": datasets.Value("string")})
    )
    with atomic_file(path) as partial, quiet_datasets():
        source.map(
            cut,
            batched=True,
            remove_columns=["text"],
            features=datasets.Features({name: integers for name in columns}),
            cache_file_name=str(partial),
            load_from_cache_file=False,
            new_fingerprint=path.stem,
            desc="cutting texts into tokens",
        )
        if not partial.is_file():  # nothing to map over, nothing written
            assert not texts
            _write_empty(partial, columns)


def _write_empty(path: Path, columns: Sequence[str]) -> None:
    import pyarrow as pa

    schema = pa.schema([(name, pa.list_(pa.int32())) for name in columns])
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_stream(stream, schema):
        pass


def _read(path: Path, rows: int, offsets: bool) -> Tokenized | None:
    """Return what a file holds; None where it is damaged."""
    import datasets
    import pyarrow as pa

    try:
        table = datasets.Dataset.from_file(str(path))
    except (pa.ArrowInvalid, OSError):
        return None
    columns = COLUMNS if offsets else COLUMNS[:1]
    if len(table) != rows or not set(columns) <= set(table.column_names):
        return None
    return Tokenized(*(_column(table, name) for name in columns))


def _column(table: Dataset, name: str) -> Ragged:
    """Return a column of lists; a copy, so that the file may go."""
    chunks: list[Any] = table.data.column(name).chunks
    values = [chunk.flatten().to_numpy() for chunk in chunks]
    lengths = [chunk.value_lengths().to_numpy() for chunk in chunks]
    counts = np.concatenate([*lengths, np.empty(0, np.int64)]).astype(np.int64)
    return Ragged(
        np.concatenate([*values, np.empty(0, np.int32)]).astype(np.int32),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
    )


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep the progress bars of `datasets` off what is no terminal."""
    import datasets

    quiet = not (sys.stderr.isatty() or datasets.are_progress_bars_disabled())
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            datasets.enable_progress_bars()
