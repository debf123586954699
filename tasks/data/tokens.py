"""Texts tokenized once and kept: the slow part of preparing features.

What is kept are arrays in a safetensors file, under a digest of all that decides them; every reader
maps the file, so that processes on one machine share its pages.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import atomic_file, cache_root
from mlm_eval.checkpoints.folders.unfinished import unfinished
from mlm_eval.checkpoints.tokenizer import Tokenizer

FORMAT = 3
"""Raised whenever the content of the kept files changes."""

LONGEST_TEXT = 1 << 20
"""Characters of one text; a tokenizer takes about 175 bytes of memory for each."""

BATCH = 1000
"""Texts that are encoded at once, in several threads."""

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Ragged:
    """Rows of numbers of any lengths, stored one after the other."""

    values: Integers
    """All rows together, `[sum of lengths]` int32."""
    offsets: Integers
    """Where each row starts, and the end, `[rows + 1]` int64."""

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Ragged:
        """Return the rows packed."""
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        return cls(
            np.concatenate([*arrays, np.empty(0, np.int32)]),
            np.cumsum([0, *map(len, arrays)], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Integers:
        if not 0 <= row < len(self):
            raise IndexError(row)  # also what ends an iteration
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Integers]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> Integers:
        """Length of each row, `[rows]`."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TextTokens:
    """The tokens of some texts."""

    tokens: Ragged
    """Ids of each text, nothing added."""
    starts: Ragged | None = None
    """Where each token starts in its text, in characters; with offsets only."""
    stops: Ragged | None = None
    """Where it ends, exclusive; with offsets only."""


@contextlib.contextmanager
def token_cache() -> Iterator[Path]:
    """Yield the folder for tokens; where it cannot be written, one that goes with the block."""
    try:
        folder = cache_root() / "tokens"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        temporary = Path(tempfile.mkdtemp(prefix="mlm-eval-tokens-"))
        with unfinished(temporary):
            yield temporary
    else:
        yield folder


def kept_arrays(
    path: Path,
    make: Callable[[], dict[str, Integers]],
    *,
    whole: Callable[[dict[str, Integers]], bool],
) -> dict[str, Integers]:
    """Return the arrays of a file, mapped; made and written first where it is missing or damaged.

    Args:
        path: The file.
        make: Returns the arrays by name.
        whole: Returns whether the arrays of a file are what `make` would return.

    Raises:
        InputError: The path is a link, a device, a pipe or a folder, which is neither read nor
            written.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"{path} is kept tokens by its name, but no file; remove it")
    from safetensors import SafetensorError
    from safetensors.numpy import save_file
    from safetensors.torch import load_file

    with contextlib.suppress(SafetensorError, OSError):
        found = {name: values.numpy() for name, values in load_file(path).items()}
        if whole(found):
            return found
    made = make()
    with atomic_file(path) as partial:
        save_file({name: np.ascontiguousarray(values) for name, values in made.items()}, partial)
    return made


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


def tokens_of(
    texts: Sequence[str], tokenizer: Tokenizer, *, cache: Path, offsets: bool = False
) -> TextTokens:
    """Return the tokens of all texts, from the cache where they are there.

    Args:
        texts: In any number; they are encoded in batches, in several threads.
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
    longest = max(map(len, texts), default=0)
    if longest > LONGEST_TEXT:
        raise InputError(
            f"an example has a text of {longest:,} characters, more than {LONGEST_TEXT:,}; is it "
            "cut at the right places? Leave it out, or cut it"
        )
    path = cache / f"{cache_key(texts, tokenizer, offsets=offsets)}.safetensors"
    columns = ("tokens", "starts", "stops")[: 3 if offsets else 1]

    def make() -> dict[str, Integers]:
        rows = list(_encoded(texts, tokenizer, offsets))
        packed = [Ragged.of(column) for column in zip(*rows, strict=True)]
        packed = packed or [Ragged.of([]) for _ in columns]
        values = {name: part.values for name, part in zip(columns, packed, strict=True)}
        return {**values, "offsets": packed[0].offsets}

    def whole(found: dict[str, Integers]) -> bool:
        if set(found) != {*columns, "offsets"}:
            return False
        offsets = found["offsets"]
        return (
            offsets.shape == (len(texts) + 1,)
            and offsets.dtype == np.int64
            and all(found[name].dtype == np.int32 for name in columns)
            and all(found[name].shape == (offsets[-1],) for name in columns)
            and offsets[0] == 0
            and bool((np.diff(offsets) >= 0).all())
        )

    kept = kept_arrays(path, make, whole=whole)
    return TextTokens(*(Ragged(kept[name], kept["offsets"]) for name in columns))


def _encoded(
    texts: Sequence[str], tokenizer: Tokenizer, offsets: bool
) -> Iterator[tuple[NDArray[np.int32], ...]]:
    """Yield each text's ids and, with `offsets`, where its tokens start and stop."""
    if tokenizer.kind == "sentencepiece":
        for text in texts:
            yield (np.asarray(tokenizer.encode(text), np.int32),)
        return
    from tqdm import tqdm

    bar = tqdm(range(0, len(texts), BATCH), desc="tokenizing", leave=False, disable=None)
    for first in bar:
        batch = list(texts[first : first + BATCH])
        for entry in tokenizer.encodings(batch):
            ids = np.asarray(entry.ids, np.int32)
            if not offsets:
                yield (ids,)
                continue
            places = np.asarray(entry.offsets, np.int32).reshape(-1, 2)
            yield ids, places[:, 0], places[:, 1]
