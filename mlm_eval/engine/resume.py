"""Scores of an unfinished run, kept on disk so that `--resume` can continue where it stopped.

A chunk is a safetensors file with the scores of some requests. Chunks carry a key made of
everything that decides a score (checkpoint, data, protocol, dtype), so results of another model or
file are never mixed in. They do not depend on the layout: a run may be resumed at another tp x dp.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import atomic_file
from mlm_eval.ranks.collectives import on_main
from mlm_eval.ranks.mesh import this_rank

FLUSH_SECONDS = 20.0

Finished = dict[int, tuple[Tensor, Tensor]]
"""Request index -> (log-probabilities, greedy flags)."""

ScoreChunk = dict[str, Tensor]
"""`indices` and `counts` `[requests]`, `logprobs` and `greedy` `[sum of counts]`."""


def resume_key(**parts: Any) -> str:
    """Return a digest of what decides the scores."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class PartialScores:
    """Chunks of scores in a folder beside the output file."""

    def __init__(self, folder: Path, key: str, *, resume: bool) -> None:
        """Open the folder; every rank must call it.

        Args:
            folder: Where the chunks are; made on the first write.
            key: See `resume_key`.
            resume: Use the chunks that are there. Without, they are removed by rank 0.

        Raises:
            InputError: The chunks there are of another checkpoint, file or setting, or damaged, or
                cannot be removed.
        """
        self.folder, self.key = folder, key
        self._buffer: list[tuple[list[int], list[int], Tensor, Tensor]] = []
        self._last_flush = time.monotonic()
        # Rank 0 reads for all: the ranks must agree on what is left to do.
        self._finished = _taken_apart(on_main(self._read if resume else self._clear))

    def _read(self) -> list[ScoreChunk]:
        return [_read_chunk(path, self.key) for path in sorted(self.folder.glob("*.safetensors"))]

    def _clear(self) -> list[ScoreChunk]:
        try:
            if self.folder.is_dir():
                shutil.rmtree(self.folder)
        except OSError as error:
            raise InputError(
                f"{self.folder}, left by an interrupted run, cannot be removed ({error.strerror}); "
                "remove it, or give another --output"
            ) from None
        return []

    def finished(self) -> Finished:
        """Return the scores of earlier runs."""
        return self._finished

    def add(self, indices: list[int], counts: list[int], logprobs: Tensor, greedy: Tensor) -> None:
        """Keep one batch's scores, of `counts` tokens of each request; written in chunks."""
        self._buffer.append((indices, counts, logprobs, greedy))
        if time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has come since the last chunk; the file appears whole or not at all."""
        self._last_flush = time.monotonic()
        if not self._buffer:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        indices, counts, logprobs, greedy = zip(*self._buffer, strict=True)
        self._buffer = []
        # The time keeps the chunks of a resumed run apart from the earlier ones; in a container
        # every run may have the same process id.
        path = self.folder / f"{time.time_ns()}-{this_rank()}.safetensors"
        chunk: ScoreChunk = {
            "indices": torch.tensor([i for part in indices for i in part]),
            "counts": torch.tensor([n for part in counts for n in part]),
            "logprobs": torch.cat([part.cpu() for part in logprobs]),
            "greedy": torch.cat([part.cpu() for part in greedy]),
        }
        try:
            with atomic_file(path) as partial:
                save_file(chunk, partial, metadata={"key": self.key})
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the scores so far cannot be kept in {self.folder} ({error}); "
                "give --output a place with room"
            ) from None

    def remove(self) -> None:
        """Delete the chunks: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_chunk(path: Path, key: str) -> ScoreChunk:
    """Return the scores in one file.

    Raises:
        InputError: It is damaged, or of another run.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            its_key = (file.metadata() or {}).get("key")
            chunk = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is damaged ({error}); delete it, so that its part is scored again, or run "
            "without --resume"
        ) from None
    if its_key != key:
        raise InputError(
            f"{path.parent} holds scores of another checkpoint, data file or setting; "
            "run without --resume to start anew, or give another --output"
        )
    return chunk


def _taken_apart(chunks: list[ScoreChunk]) -> Finished:
    """Return each request's own part of the chunks."""
    finished: Finished = {}
    for chunk in chunks:
        counts = chunk["counts"].tolist()
        parts = zip(chunk["logprobs"].split(counts), chunk["greedy"].split(counts), strict=True)
        finished.update(zip(chunk["indices"].tolist(), parts, strict=True))
    return finished
