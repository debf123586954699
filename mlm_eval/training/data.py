"""Which samples a training step takes, who takes them, and how they become one padded batch.

The order follows from the seed and the epoch alone. A global batch is sorted by length and dealt:

    global batch, longest first    0 1 2 3 4 5 6 7 8 9      dp 2, micro-batches of 2
    micro-batch 0                  [0 2]  of rank 0      [1 3]  of rank 1
    micro-batch 1                  [4 6]                 [5 7]
    micro-batch 2                  [8]                   [9]

so that ranks work on similar lengths at a time and each micro-batch is padded to its own longest
row only. No sample is repeated or left out; a rank that has none left runs a stand-in whose loss
counts for nothing, so that all ranks come to the same collectives.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.engine.batching import pad_rows
from mlm_eval.model.layers import to_device
from mlm_eval.training.settings import TrainSettings

NO_LABEL = -100
"""Marks a token without a label, as in torch's cross entropy."""

Label = int | tuple[int, int] | Tensor


@dataclass(frozen=True)
class Sample:
    """One training sample."""

    rows: list[Tensor]
    """Token ids of each row, `[n]` int64 without padding: one row, or one for each choice. All
    samples of a data set have the same number of rows."""
    tokentypes: list[Tensor]
    """Segment ids of each row, of the same shapes."""
    label: Label
    """A class or the number of the right choice; the positions (start, end) of an answer in the
    row; or a label for each token of the one row, `NO_LABEL` for none."""
    index: int
    """Number of the sample in its data set: the masks of dropout belong to it."""
    width: int = 0
    """Tokens that its rows are padded to, whatever else is in the batch; 0: as many as the batch's
    longest row has. The same for all samples of a data set."""

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(row.numel() for row in self.rows)


@dataclass(frozen=True)
class Batch:
    """The padded samples of one forward pass; a sample's rows stand one after the other."""

    tokens: Tensor
    """`[samples * rows, width]`, padded on the right with 0."""
    tokentypes: Tensor
    """Same shape, 0 on padding."""
    padding_mask: Tensor
    """Same shape, 1 on real tokens."""
    labels: Tensor
    """`[samples]`; `[samples, 2]` for answers; `[samples, width]` for labels of tokens."""
    host_labels: Tensor
    """The same in the host's memory: what depends on their values is decided there, without a wait
    for the device."""
    rows: int
    """Rows of a sample."""
    indices: Tensor
    """Numbers of the samples."""
    mean_weight: float = 1.0
    """Mean of `Objective.weight` over the samples of the whole global batch."""
    stated_width: int = 0
    """`Sample.width`, the tokens of every row with its padding where that is set."""

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.indices.numel()

    @property
    def row_numbers(self) -> Tensor:
        """One number for each row, unique in the data set: `[samples * rows]`."""
        numbers = torch.arange(self.rows, device=self.indices.device)
        return (self.indices.unsqueeze(1) * self.rows + numbers).flatten()


def collate(
    samples: Sequence[Sample],
    *,
    mean_weight: float = 1.0,
    device: torch.device | str = "cpu",
    multiple: int = 1,
) -> Batch:
    """Return the samples as one batch, padded to the longest row, rounded up to `multiple`.

    Samples with a width of their own are padded to that at least.
    """
    rows = [row for sample in samples for row in sample.rows]
    types = [row for sample in samples for row in sample.tokentypes]
    width = samples[0].width
    device = torch.device(device)
    sizes = {"multiple": multiple, "least": width}
    labels = _labels(samples, multiple)
    return Batch(
        to_device(pad_rows(rows, **sizes), device),
        to_device(pad_rows(types, **sizes), device),
        to_device(pad_rows(map(torch.ones_like, rows), **sizes), device),
        to_device(labels, device),
        labels,
        len(samples[0].rows),
        to_device(torch.tensor([sample.index for sample in samples]), device),
        mean_weight,
        width,
    )


def _labels(samples: Sequence[Sample], multiple: int) -> Tensor:
    labels = [sample.label for sample in samples]
    if isinstance(labels[0], Tensor):
        return pad_rows(map(torch.as_tensor, labels), value=NO_LABEL, multiple=multiple)
    return torch.tensor(labels, dtype=torch.int64)


def epoch_order(length: int, *, seed: int, epoch: int) -> list[int]:
    """Return the numbers below `length` in the order of one epoch, counted from 0."""
    # A seed of its own for each epoch: seed + epoch would give seed 1's second epoch to seed 2's
    # first.
    digest = hashlib.sha256(f"order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.randperm(length, generator=generator).tolist()


@dataclass(frozen=True)
class Plan:
    """How many steps a run has, and which samples each of them takes."""

    samples: int
    """Size of the data set."""
    global_batch: int
    """Samples of a step."""
    steps_per_epoch: int
    """Steps of one pass over the data."""
    total_steps: int
    """Steps of the run."""
    seed: int
    """Of the order."""

    @classmethod
    def make(cls, samples: int, settings: TrainSettings) -> Plan:
        """Return the plan of a run over a data set of `samples`.

        Raises:
            InputError: The data do not fill one step.
        """
        global_batch = settings.global_batch
        rounded = math.ceil if settings.keep_last else math.floor
        steps = rounded(samples / global_batch)
        if steps == 0:
            raise InputError(
                f"{samples} training samples do not fill one global batch of {global_batch}; lower "
                "--global-batch, give more data, or use --keep-last"
            )
        total = settings.max_steps or settings.epochs * steps
        return cls(samples, global_batch, steps, total, settings.seed)

    @property
    def epochs(self) -> int:
        """Passes over the data, an unfinished one included."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step; both count from 0."""
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Return whether a step is the last of its epoch, or of the run."""
        return (step + 1) % self.steps_per_epoch == 0 or step + 1 == self.total_steps

    def steps(self, start: int) -> Iterator[tuple[int, int, list[int]]]:
        """Yield (step, epoch, numbers of its samples) from step `start` to the end of the run."""
        order: list[int] = []
        for step in range(start, self.total_steps):
            epoch, within = divmod(step, self.steps_per_epoch)
            if not order or within == 0:
                order = epoch_order(self.samples, seed=self.seed, epoch=epoch)
            yield step, epoch, order[within * self.global_batch : (within + 1) * self.global_batch]


def deal(
    lengths: Sequence[int], *, dp_rank: int, dp_size: int, micro_batch: int
) -> list[list[int]]:
    """Return one rank's micro-batches: positions in the global batch, longest first.

    Every rank gets the same number of micro-batches; an empty one asks for a stand-in.

    Args:
        lengths: Of the samples of the global batch.
        dp_rank: Which copy of the model.
        dp_size: Copies of the model.
        micro_batch: Largest number of samples of one forward pass.
    """
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    mine = order[dp_rank::dp_size]
    count = math.ceil(math.ceil(len(order) / dp_size) / micro_batch)
    return [mine[i * micro_batch : (i + 1) * micro_batch] for i in range(count)]


def sample_length(data: Sequence[Sample], index: int) -> int:
    """Return the length of a sample, without making it where the data set can tell."""
    length = getattr(data, "length", None)
    return int(length(index)) if length is not None else data[index].length


def set_epoch(data: Any, epoch: int) -> None:
    """Tell a data set which epoch comes, if its samples depend on it."""
    if hasattr(data, "set_epoch"):
        data.set_epoch(epoch)


def fingerprint(data: Sequence[Sample]) -> str:
    """Return a digest of all samples of a data set.

    With it a resumed run notices that the data have changed. A data set whose samples are cut from
    one text (it has `tokens`) is known by the whole text and 64 of its samples.
    """
    set_epoch(data, 0)
    state = hashlib.sha256(f"{len(data)}".encode())
    text = getattr(data, "tokens", None)
    if text is not None:
        state.update(text.contiguous().numpy().data)
    step = 1 if text is None else max(1, len(data) // 64)
    for index in range(0, len(data), step):
        sample = data[index]
        label = sample.label.tolist() if isinstance(sample.label, Tensor) else sample.label
        rows = (*sample.rows, *sample.tokentypes)
        state.update(repr((sample.index, label, [len(row) for row in rows])).encode())
        for row in rows:
            state.update(row.contiguous().numpy().data)
    return state.hexdigest()


def check_data(data: Sequence[Sample], *, positions: int, vocab_size: int, tokentypes: int) -> None:
    """Refuse data that the model cannot run: found now, not in the middle of an epoch.

    Samples that a data set makes anew in each epoch (it has `set_epoch`) are not looked at.

    Raises:
        InputError: There are no samples, a row is empty or too long, or an id is outside its table.
    """
    if not len(data):
        raise InputError("the training data hold no sample; give a file with samples")
    if hasattr(data, "set_epoch"):
        return
    count = len(data[0].rows)
    for start in range(0, len(data), 512):  # many at a time: there may be hundreds of thousands
        part = [data[i] for i in range(start, min(start + 512, len(data)))]
        assert all(sample.index == start + i for i, sample in enumerate(part)), "numbered in order"
        assert all(len(sample.rows) == count for sample in part), "rows of a sample"
        rows = [row for sample in part for row in sample.rows]
        types = [row for sample in part for row in sample.tokentypes]
        assert [row.shape for row in rows] == [row.shape for row in types], "a segment id a token"
        limits = (("token id", rows, vocab_size), ("segment id", types, max(tokentypes, 1)))
        shortest, longest = min(map(len, rows)), max(map(len, rows))
        if shortest < 1 or longest > positions:
            raise InputError(
                f"the training samples have rows of {shortest} to {longest} tokens, the model "
                f"takes 1 to {positions}; cut them (--seq-length)"
            )
        for what, values, size in limits:
            low, high = (int(bound) for bound in torch.cat(values).aminmax())
            if low < 0 or high >= size:
                raise InputError(
                    f"the training samples hold the {what} {low if low < 0 else high}, the model "
                    f"has a table of {size}; the tokenizer does not belong to this checkpoint"
                )
