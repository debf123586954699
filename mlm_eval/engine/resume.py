"""Scores of an unfinished run, kept on disk so that the next one continues where it stopped.

A chunk is a safetensors file with the scores of some requests. It says of what they are scores: all
that decides them (checkpoint, data, protocol, dtype), so results of another model or file are never
mixed in, and what differs can be named. They do not depend on the layout: a run may be
resumed at another tp x dp.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mlm_eval.checkpoints.dtypes import dtype_name
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import atomic_file
from mlm_eval.checkpoints.files.text_file import json_value
from mlm_eval.checkpoints.folders.kept_scores import (
    EXPECTED,
    discard_scores,
    expect_output,
    kept_chunks,
)
from mlm_eval.checkpoints.folders.locks import Lock, lock_folder, unlock_folder
from mlm_eval.ranks.collectives import on_main
from mlm_eval.ranks.mesh import this_rank

if TYPE_CHECKING:
    from mlm_eval.checkpoints.checkpoint import Checkpoint
    from mlm_eval.checkpoints.config import ModelConfig
    from mlm_eval.checkpoints.tokenizer import Tokenizer

FLUSH_SECONDS = 20.0


class KeptScores(NamedTuple):
    """The scores of one request."""

    logprobs: Tensor
    """`[tokens]` float32, nats; of a BERT without a masked-LM head none."""
    greedy: Tensor
    """Same shape, bool."""
    heads: dict[str, Tensor]
    """Logits of a BERT's sentence-level heads, `[outputs]` float32 each."""


Finished = dict[int, KeptScores]
"""By the number of the request."""

ScoreChunk = dict[str, Tensor]
"""`indices` and `counts` `[requests]`, `logprobs` and `greedy` `[sum of counts]`; of a BERT also
`head.NAME` `[requests, outputs]`."""

_DTYPES = {
    "indices": (torch.int64,),
    "counts": (torch.int64,),
    "logprobs": (torch.float32, torch.float64),
    "greedy": (torch.bool,),
}
"""The tensors of each chunk, and the dtypes that they may have."""

_HEAD = "head."
"""How the names of a chunk's other tensors begin, those of heads."""

_IDENTITIES = {
    "digest": "another checkpoint",
    "data": "other data",
    "text": "other text",
    "tokenizer": "another tokenizer",
}
"""How to name what differs where its value says nothing to people."""


class Identified(Protocol):
    """What decides the scores of a model, whether it is loaded or not."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The model that was saved."""

    @property
    def config(self) -> ModelConfig:
        """Its settings, with the rows of vocabulary that the softmax runs over."""

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in."""

    @property
    def vocab(self) -> str:
        """`padded` or `true`."""


def deciding_parts(
    model: Identified,
    task: str,
    *,
    data: str | None,
    tokenizer: Tokenizer | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all that decides a task's scores, beside the layout and how many there are.

    Args:
        model: Whose scores they are.
        task: Name of the command.
        data: A digest of what is scored; None: the task names it itself.
        tokenizer: None: nothing was tokenized.
        settings: The task's own.
    """
    return {
        "task": task,
        "digest": model.checkpoint.provenance.digest,
        "config": model.config.to_dict(),
        "data": data,
        "tokenizer": None if tokenizer is None else tokenizer.sha256,
        "dtype": dtype_name(model.dtype),
        "vocab": model.vocab,
        "settings": dict(settings),
    }


def as_json(value: Any) -> Any:
    """Return what is left of a value after a round through JSON; what has no form there as text."""
    return json.loads(json.dumps(value, default=str))


def resume_key(parts: Mapping[str, Any]) -> str:
    """Return a digest of what decides the scores."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def run_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words how an earlier run differs from this one: `stride 32, now 5`.

    Args:
        before: What decided its result: JSON values, nested as they like.
        now: The same of this run.
    """
    old, new = _flat(before), _flat(now)
    named = [_named(name, old, new) for name in {**new, **old} if old.get(name) != new.get(name)]
    named = list(dict.fromkeys(named))
    return "; ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


class PartialScores:
    """Chunks of scores in a folder beside the output file."""

    def __init__(
        self,
        folder: Path,
        parts: Mapping[str, Any],
        *,
        restart: bool = False,
        replace: bool = False,
    ) -> None:
        """Open the folder; every rank must call it.

        Args:
            folder: Where the chunks are.
            parts: All that decides the scores, as JSON values.
            restart: Remove the chunks that are there.
            replace: Remove them where they are scores of something else.

        Raises:
            InputError: The chunks there are of another checkpoint, file or setting, or damaged, or
                cannot be removed; or another run writes them now.
        """
        self.folder = folder
        self.parts = as_json(parts)
        self.key = resume_key(self.parts)
        self._lock: Lock | None = None
        self._buffer: list[ScoreChunk] = []
        self._last_flush = time.monotonic()
        # Rank 0 reads for all: the ranks must agree on what is left to do.
        try:
            self._finished = _taken_apart(on_main(lambda: self._open(restart, replace)))
        except BaseException:
            self.close()
            raise

    def _open(self, restart: bool, replace: bool) -> list[ScoreChunk]:
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise InputError(
                f"{self.folder}, where what is finished is kept meanwhile, is a link or no folder; "
                "move it away, or give another --output"
            )
        with suppress(OSError):  # a place that cannot be written is named when it is needed
            self._lock = lock_folder(self.folder, what=str(self.folder))
        if restart:
            discard_scores(self.folder)
        chunks = []
        for path in kept_chunks(self.folder):
            chunk, key, parts = _read_chunk(path)
            if key == self.key:
                chunks.append(chunk)
                continue
            if replace:
                discard_scores(self.folder)
                return []
            what = run_difference(parts, self.parts) if parts else "of an older mlm-eval"
            ended = (self.folder / EXPECTED).exists()
            run = "a run that was ended as it wrote its output" if ended else "an interrupted run"
            raise InputError(
                f"{self.folder} holds scores of {run}, which was another one: {what}; "
                "repeat its command to resume it, discard it with --restart, or give another "
                "--output"
            )
        with suppress(OSError):  # its output is not there any more: the run goes on
            (self.folder / EXPECTED).unlink()
        return chunks

    def finished(self) -> Finished:
        """Return the scores of earlier runs."""
        return self._finished

    def add(
        self,
        indices: list[int],
        counts: list[int],
        logprobs: Tensor,
        greedy: Tensor,
        heads: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep one batch's scores, of `counts` tokens of each request; written in chunks.

        The tensors may be on a GPU: they are copied when they are written.

        Args:
            indices: The requests.
            counts: Scored tokens of each.
            logprobs: `[sum of counts]`, nats.
            greedy: Same shape.
            heads: Logits by head, `[requests, outputs]` each.
        """
        self._buffer.append(
            {
                "indices": torch.tensor(indices, dtype=torch.int64),
                "counts": torch.tensor(counts, dtype=torch.int64),
                "logprobs": logprobs,
                "greedy": greedy,
                **{_HEAD + name: logits for name, logits in (heads or {}).items()},
            }
        )
        if time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has come since the last chunk; the file appears whole or not at all."""
        self._last_flush = time.monotonic()
        if not self._buffer:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        parts, self._buffer = self._buffer, []
        # The time keeps the chunks of a resumed run apart from the earlier ones; in a container
        # every run may have the same process id.
        path = self.folder / f"{time.time_ns()}-{this_rank()}.safetensors"
        chunk: ScoreChunk = {
            name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]
        }
        said = {"key": self.key, "parts": json.dumps(self.parts)}
        try:
            with atomic_file(path) as partial:
                save_file(chunk, partial, metadata=said)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):  # empty where not even the lock could be written
                self.folder.rmdir()
            raise InputError(
                f"the scores so far cannot be kept in {self.folder} ({error}); "
                "give --output a place with room"
            ) from None

    def check_counts(self, counts: Sequence[int]) -> None:
        """Refuse scores that are not as many as these requests have.

        Raises:
            InputError: They are not.
        """
        for index, kept in self._finished.items():
            if index < len(counts) and len(kept.logprobs) != counts[index]:
                raise InputError(
                    f"{self.folder} holds {len(kept.logprobs)} score(s) of sequence {index}, which "
                    f"has {counts[index]}; it is damaged, discard it with --restart"
                )

    def expect(self, content: str, count: int) -> None:
        """Note the output of `count` requests, which is written next. Rank 0."""
        if self._is_all(count):
            expect_output(self.folder, content)

    def remove(self, count: int) -> None:
        """Delete the chunks: a run of `count` requests is complete. Rank 0.

        Scores of further requests, of an interrupted run without that run's --limit, stay.
        """
        if self._is_all(count):
            discard_scores(self.folder)

    def _is_all(self, count: int) -> bool:
        return all(index < count for index in self._finished)

    def close(self) -> None:
        """Let other runs write here."""
        if self._lock is not None:
            unlock_folder(self._lock)
            self._lock = None


def _read_chunk(path: Path) -> tuple[ScoreChunk, str | None, dict[str, Any]]:
    """Return the scores in one file, its key, and of what they are scores, where it says so.

    Raises:
        InputError: It is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            chunk = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parts = json_value(said.get("parts", "{}"))
        if not isinstance(parts, dict):
            raise ValueError("it does not say of what")
        _check_chunk(chunk)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({error}); delete it, so that its part is scored again, or discard "
            "all of them with --restart"
        ) from None
    return chunk, said.get("key"), parts


def _check_chunk(chunk: ScoreChunk) -> None:
    """Refuse a chunk whose tensors do not belong together.

    Raises:
        ValueError: They do not.
    """
    heads = {name for name in chunk if name.startswith(_HEAD)}
    if set(chunk) - heads != set(_DTYPES):
        raise ValueError(f"it holds {', '.join(sorted(chunk)) or 'nothing'}")
    indices, counts = chunk["indices"], chunk["counts"]
    for name, value in chunk.items():
        dims, kinds = (2, _DTYPES["logprobs"]) if name in heads else (1, _DTYPES[name])
        if value.dim() != dims or value.dtype not in kinds:
            raise ValueError(f"its {name} are {value.dtype} {list(value.shape)}")
    if len(indices) != len(counts) or (counts < 0).any() or (indices < 0).any():
        raise ValueError("its indices and counts do not add up")
    if not len(chunk["logprobs"]) == len(chunk["greedy"]) == int(counts.sum()):
        raise ValueError("its scores and counts do not add up")
    if any(len(chunk[name]) != len(indices) for name in heads):
        raise ValueError("its heads and indices do not add up")


def _taken_apart(chunks: list[ScoreChunk]) -> Finished:
    """Return each request's own part of the chunks."""
    finished: Finished = {}
    for chunk in chunks:
        counts = chunk["counts"].tolist()
        parts = zip(chunk["logprobs"].split(counts), chunk["greedy"].split(counts), strict=True)
        heads = {k.removeprefix(_HEAD): v for k, v in chunk.items() if k.startswith(_HEAD)}
        for row, (index, scores) in enumerate(zip(chunk["indices"].tolist(), parts, strict=True)):
            own = {name: logits[row] for name, logits in heads.items()}
            finished[index] = KeptScores(*scores, own)
    return finished


def _flat(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Return the values of nested mappings under their names, which lead to them with dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{place}{name}.")
        else:
            flat[f"{place}{name}"] = value
    return flat


def _named(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    short = name.removeprefix("settings.").removeprefix("recipe.")
    if short in _IDENTITIES:
        return _IDENTITIES[short]
    before, now = (str(values.get(name))[:60] for values in (old, new))
    return f"{short} {before}, now {now}"
