"""Scoring requests, and how they are packed: by length, under a budget of tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """A sequence of which the last tokens are scored.

    Attributes:
        tokens: Token ids `[n]`, int64 on the CPU, n up to positions + 1: the last token is only
            predicted. May be a view of a longer tensor.
        num_scored: The last `num_scored` tokens are scored, each given all the tokens before it;
            1 <= num_scored < n.
    """

    tokens: Tensor
    num_scored: int

    @property
    def length(self) -> int:
        """Input positions of the forward pass: all tokens but the last."""
        return self.tokens.numel() - 1


@dataclass(frozen=True)
class Scores:
    """Log-probabilities in request order.

    Attributes:
        logprobs: `[sum of num_scored]` float32, nats.
        greedy: Same shape, bool: the token is the argmax, the lowest index on a tie.
        offsets: `[requests + 1]` int64: request i owns `logprobs[offsets[i]:offsets[i + 1]]`.
        seconds: Wall time of the scoring.
    """

    logprobs: Tensor
    greedy: Tensor
    offsets: Tensor
    seconds: float

    def nll_sums(self) -> Tensor:
        """Return the negative sum of each request's log-probabilities, float64 `[requests]`."""
        counts = self.offsets.diff()
        owner = torch.repeat_interleave(torch.arange(counts.numel()), counts)
        # Each request by itself: differences of one running sum would lose digits, and a NaN in one
        # request would reach all that follow.
        sums = torch.zeros(counts.numel(), dtype=torch.float64)
        return sums.index_add_(0, owner, -self.logprobs.double())

    def all_greedy(self) -> Tensor:
        """Return, per request, whether every scored token is the argmax: bool `[requests]`."""
        misses = torch.cat([torch.zeros(1, dtype=torch.int64), (~self.greedy).long().cumsum(0)])
        return misses[self.offsets[1:]] == misses[self.offsets[:-1]]


def same_input(one: Request, other: Request) -> bool:
    """Return whether two requests differ at most in the token that is only predicted."""
    return one.length == other.length and torch.equal(one.tokens[:-1], other.tokens[:-1])


def riders(requests: Sequence[Request]) -> set[int]:
    """Return the indices of requests that have the same input as the one before."""
    return {i for i in range(1, len(requests)) if same_input(requests[i], requests[i - 1])}


def pack(lengths: Sequence[int], budget: int, riders: Collection[int] = ()) -> list[list[int]]:
    """Return batches of request indices, longest first, each of at most `budget` padded tokens.

    A request longer than the budget is a batch of its own. Requests of one length stay in order;
    those among `riders` share the line of the one before and cost nothing.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    current: list[int] = []
    lines = 0
    for index in order:
        # Sorted by length: the first of a batch decides its width.
        width = lengths[current[0]] if current else lengths[index]
        if current and index not in riders and width * (lines + 1) > budget:
            batches.append(current)
            current, lines = [], 0
        current.append(index)
        lines += index not in riders
    if current:
        batches.append(current)
    return batches


@dataclass(frozen=True)
class Batch:
    """Padded inputs of one forward pass.

    Attributes:
        tokens: `[lines, width]`, padded on the right with 0; neighbours with the same input share
            a line.
        query_from: First position whose state is needed by any request.
        rows: Indices of the scored states in the flattened `[lines * (width - query_from)]` states.
        targets: Token ids that the scored states predict, `[rows]`.
        indices: The requests in the batch, in the order of `rows`.
    """

    tokens: Tensor
    query_from: int
    rows: Tensor
    targets: Tensor
    indices: list[int]


def collate(requests: Sequence[Request], indices: list[int]) -> Batch:
    """Return the padded batch of some requests."""
    chosen = [requests[i] for i in indices]
    width = max(request.length for request in chosen)
    query_from = min(request.length - request.num_scored for request in chosen)
    shared = riders(chosen)
    tokens = torch.zeros(len(chosen) - len(shared), width, dtype=torch.int64)
    rows, targets = [], []
    line = -1
    for place, request in enumerate(chosen):
        if place not in shared:
            line += 1
            tokens[line, : request.length] = request.tokens[:-1]
        first = request.length - request.num_scored - query_from + line * (width - query_from)
        rows.append(torch.arange(first, first + request.num_scored))
        targets.append(request.tokens[-request.num_scored :])
    return Batch(tokens, query_from, torch.cat(rows), torch.cat(targets), indices)
