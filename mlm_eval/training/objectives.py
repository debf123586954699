"""What a model is trained for: from a batch to the loss of each sample and the correct predictions.

A step's gradient is that of the mean loss over the samples of the global batch. Where samples count
unequally (language models: by predicted tokens) their losses are sums over tokens, divided by the
mean number of tokens of a sample in the global batch, so that no result depends on how a batch was
split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.model.bert import BERT
from mlm_eval.model.dropout import Dropout
from mlm_eval.model.gpt import GPT
from mlm_eval.model.layers import to_device
from mlm_eval.training.data import NO_LABEL, Batch, Sample


class Objective(ABC):
    """A loss, and what counts as correct."""

    head: str
    """The head that it trains: `multichoice_head`, `classification_head`, `qa_head`, `mlm` or
    `lm`."""

    def weight(self, sample: Sample) -> float:
        """Return how much a sample counts in the mean loss: here 1."""
        return 1.0

    def unused(self, config: ModelConfig) -> tuple[str, ...]:
        """Return how the names of the parameters begin that the loss does not reach."""
        return ()

    @abstractmethod
    def loss_and_hits(
        self, model: Any, batch: Batch, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor, int]:
        """Return each sample's loss, each sample's correct predictions, and how many were made.

        Args:
            model: The `BERT` or `GPT` under training.
            batch: The samples.
            dropout: The masks of this forward pass; None: drop nothing.

        Returns:
            Losses `[samples]` float32, differentiable; hits `[samples]`; predictions in the batch.
        """


def _states(model: BERT, batch: Batch, dropout: Dropout | None) -> Tensor:
    return model(batch.tokens, batch.padding_mask, batch.tokentypes, dropout)  # type: ignore[no-any-return]


class Classification(Objective):
    """Cross entropy over the classes of a sentence or of a pair of them.

    Source: docs/megatron.md, "BERT heads", "Training loop".
    """

    head = "classification_head"

    def loss_and_hits(
        self, model: BERT, batch: Batch, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor, int]:
        """See `Objective.loss_and_hits`."""
        logits = model.head_logits(_states(model, batch, dropout), dropout)[self.head]
        logits = logits.view(batch.samples, -1)  # the outputs of all rows of a sample
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        return losses, logits.argmax(dim=-1) == batch.labels, batch.samples


class MultipleChoice(Classification):
    """Cross entropy over the choices of a question, one score for each row.

    Source: docs/megatron.md, "RACE".
    """

    head = "multichoice_head"


class SpanExtraction(Objective):
    """Mean of the cross entropies of an answer's start and end over the positions of its row.

    Those of padding count, up to the width that the samples state, as in Google's run_squad.py
    (`compute_loss`); without a stated width there are none, and a row's loss would depend on what
    else is in its batch. A prediction is correct where the most likely start and the most likely
    end both are.
    """

    head = "qa_head"

    def loss_and_hits(
        self, model: BERT, batch: Batch, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor, int]:
        """See `Objective.loss_and_hits`."""
        logits = model.qa_logits(_states(model, batch, dropout))  # [B, T, 2]
        if width := batch.stated_width:
            logits = logits[:, :width]
        else:
            logits = logits.masked_fill(batch.padding_mask.unsqueeze(-1) == 0, float("-inf"))
        # Positions are the classes: cross_entropy wants them in dim 1.
        losses = F.cross_entropy(logits, batch.labels, reduction="none").mean(dim=1)
        hits = (logits.argmax(dim=1) == batch.labels).all(dim=1)
        return losses, hits, batch.samples


class MaskedLM(Objective):
    """BERT's pre-training: hidden tokens and, where the model has the head, the segments' order.

    A sample's labels are the hidden tokens, but for position 0: [CLS] is never hidden, and its
    label is 1 where the two segments were exchanged, else 0. The loss is the mean over the hidden
    tokens of the global batch plus the mean over its samples, as in Megatron's pretrain_bert.py
    (which takes the first of them within each micro-batch).
    """

    head = "mlm"

    def weight(self, sample: Sample) -> float:
        """Return the number of hidden tokens."""
        assert isinstance(sample.label, Tensor)
        return float((sample.label[1:] != NO_LABEL).sum())

    def unused(self, config: ModelConfig) -> tuple[str, ...]:
        """Return the pooler where no binary head reads it."""
        return () if config.binary_head else ("pooler.",)

    def loss_and_hits(
        self, model: BERT, batch: Batch, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor, int]:
        """See `Objective.loss_and_hits`; hits are hidden tokens that were found."""
        losses, hits, count, order = self.parts(model, batch, dropout)
        if order is not None:
            losses = losses + F.cross_entropy(order, batch.labels[:, 0], reduction="none")
        return losses, hits, count

    def parts(
        self, model: BERT, batch: Batch, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor, int, Tensor | None]:
        """Return losses, hits, count of hidden tokens, and logits `[samples, 2]` of the order."""
        states = _states(model, batch, dropout)
        hidden = batch.host_labels != NO_LABEL
        hidden[:, 0] = False
        order = model.head_logits(states)["binary_head"] if model.config.binary_head else None
        return (*_token_losses(model, states, hidden, batch), order)


class CausalLM(Objective):
    """Each token given those before it."""

    head = "lm"

    def weight(self, sample: Sample) -> float:
        """Return the number of predicted tokens."""
        assert isinstance(sample.label, Tensor)
        return float((sample.label != NO_LABEL).sum())

    def loss_and_hits(
        self, model: GPT, batch: Batch, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor, int]:
        """See `Objective.loss_and_hits`."""
        labelled = batch.host_labels != NO_LABEL
        return _token_losses(model, model(batch.tokens, 0, dropout), labelled, batch)


def _token_losses(
    model: BERT | GPT, states: Tensor, wanted: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, int]:
    """Return the samples' sums over the wanted tokens; losses divided by their mean number.

    Args:
        model: The model.
        states: Of all tokens, `[samples, width, hidden]`.
        wanted: The tokens that are predicted, `[samples, width]`, in the host's memory: chosen by a
            mask on a GPU, the host would wait for the device to count them.
        batch: The samples.
    """
    places = to_device(wanted.flatten().nonzero().squeeze(1), states.device)
    targets = batch.labels.flatten().index_select(0, places)
    losses, greedy = model.losses(states.flatten(0, 1).index_select(0, places), targets)
    # Back to [samples, width] and summed by rows: an index_add would sum in any order on a GPU.
    zeros = losses.new_zeros(wanted.numel())
    sums = zeros.index_copy(0, places, losses).view(wanted.shape).sum(dim=1) / batch.mean_weight
    hits = zeros.index_copy(0, places, greedy.float()).view(wanted.shape).sum(dim=1)
    return sums, hits, losses.numel()
