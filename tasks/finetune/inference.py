"""The head's outputs for a whole set: rows packed by length, dealt to the ranks, back in order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlm_eval.engine.batching import pack
from mlm_eval.model.bert import BERT
from mlm_eval.ranks.collectives import sum_over_dp
from mlm_eval.tasks.finetune.features import PairFeatures

if TYPE_CHECKING:
    from mlm_eval.engine.engine import Engine

QA_HEAD = "qa_head"


@dataclass(frozen=True)
class Outputs:
    """What a head says about a set.

    Attributes:
        values: `[rows, outputs]` float32, a sample's rows one after the other; of a span head
            `[tokens, 2]`, the tokens of all rows one after the other.
        offsets: Span head: where each row's tokens start, and the end, `[rows + 1]`; else None.
        rows: Rows of a sample.
    """

    values: NDArray[np.float32]
    offsets: NDArray[np.int64] | None
    rows: int

    def table(self) -> NDArray[np.float32]:
        """Return each sample's scores of its classes or choices, `[samples, classes]`."""
        assert self.offsets is None
        return self.values.reshape(-1, self.rows * self.values.shape[1])


def run(
    engine: Engine,
    features: PairFeatures,
    *,
    head: str,
    autocast: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Outputs:
    """Return the outputs of a task head for all rows, on every rank the same.

    No row is repeated or left out, whatever the layout. Collectives: those of the model over tp;
    one sum of the results over dp.

    Args:
        engine: Holds a BERT model with the head.
        features: The rows.
        head: `classification_head`, `multichoice_head` or `qa_head`.
        autocast: Compute matrix products in this dtype; None: in the engine's.
        on_progress: Told about (rows done, rows in all), on rank 0.
    """
    lengths = features.row_lengths()
    spans = head == QA_HEAD
    width = 2 if spans else max(engine.config.num_classes, 1)
    sizes = lengths if spans else np.ones(len(lengths), np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    values = torch.zeros(int(offsets[-1]), width)
    batches = pack(lengths.tolist(), engine.batch_tokens)
    mine = batches[engine.mesh.dp_rank :: engine.dp]
    done = 0
    for batch in mine:
        parts = _run_batch(engine, features, batch, head, autocast)
        for row, part in zip(batch, parts, strict=True):
            values[offsets[row] : offsets[row + 1]] = part[: sizes[row]]
        done += len(batch) * engine.dp  # the other copies of the model go at about the same pace
        if on_progress is not None and engine.is_main:
            on_progress(min(done, len(lengths)), len(lengths))
    # Every row was run by one copy of the model only; the sum puts them together exactly.
    values = sum_over_dp(values.to(engine.device), engine.mesh).cpu()
    return Outputs(values.numpy(), offsets if spans else None, features.rows)


def _run_batch(
    engine: Engine,
    features: PairFeatures,
    batch: list[int],
    head: str,
    autocast: torch.dtype | None,
) -> Tensor:
    """Return some rows' outputs on the CPU: `[rows, 1, outputs]`, spans `[rows, width, 2]`."""
    model: Any = engine.model
    assert isinstance(model, BERT)
    tokens, types, mask = (x.to(engine.device) for x in collate_rows(features, batch))
    casting = (
        contextlib.nullcontext()
        if autocast is None
        else torch.autocast(engine.device.type, dtype=autocast)
    )
    with torch.no_grad(), casting:
        states = model(tokens, mask, types)  # [B, T, h]
        if head == QA_HEAD:
            return model.qa_logits(states).float().cpu()
        return model.head_logits(states)[head].float().cpu().unsqueeze(1)


def collate_rows(features: PairFeatures, batch: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, types and padding mask of some rows, `[rows, width]` each."""
    rows = [features.row(number // features.rows, number % features.rows) for number in batch]
    width = max(len(tokens) for tokens, _ in rows)
    tokens, types, mask = (np.zeros((len(rows), width), np.int64) for _ in range(3))
    for line, (ids, num_first) in enumerate(rows):
        tokens[line, : len(ids)] = ids
        types[line, num_first : len(ids)] = 1
        mask[line, : len(ids)] = 1
    return torch.from_numpy(tokens), torch.from_numpy(types), torch.from_numpy(mask)
