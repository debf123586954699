"""Log-probabilities of the last tokens of sequences, from a GPT or T5 model."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.engine.batching import OnProgress, map_batches, pack, pad_rows
from mlm_eval.engine.products import float32_products
from mlm_eval.engine.resume import PartialScores
from mlm_eval.model.gpt import GPT
from mlm_eval.model.layers import to_device
from mlm_eval.model.t5 import T5
from mlm_eval.ranks.mesh import Mesh


@dataclass(frozen=True)
class Request:
    """A sequence of which the last tokens are scored."""

    tokens: Tensor
    """Token ids `[n]`, int64 on the CPU, n up to positions + 1: the last token is only predicted.
    May be a view of a longer tensor."""

    num_scored: int
    """This many tokens at the end are scored, each given all the tokens before it; 1 to n - 1."""

    @property
    def length(self) -> int:
        """Input positions of the forward pass: all tokens but the last."""
        return self.tokens.numel() - 1

    @property
    def width(self) -> int:
        """Positions that it takes in a batch."""
        return self.length


@dataclass(frozen=True)
class PairRequest(Request):
    """A sequence that a decoder is given, of which all tokens but the first are scored."""

    encoder_tokens: Tensor
    """What its encoder is given, ids `[m]`, int64 on the CPU."""

    encoder_mask: Tensor
    """1 where a token may be seen, `[m]`; one at least."""

    @property
    def width(self) -> int:
        """Positions that it takes in a batch: the longer side counts for both."""
        return 2 * max(self.length, self.encoder_tokens.numel())


@dataclass(frozen=True)
class Scores:
    """Log-probabilities in request order."""

    logprobs: Tensor
    """`[sum of num_scored]` float32, nats."""

    greedy: Tensor
    """Same shape, bool: the token is the argmax, the lowest index on a tie."""

    offsets: Tensor
    """`[requests + 1]` int64: request i owns `logprobs[offsets[i]:offsets[i + 1]]`."""

    seconds: float
    """Wall time of the scoring."""

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
    """Return whether two requests of a GPT differ at most in the token that is only predicted."""
    if isinstance(one, PairRequest) or isinstance(other, PairRequest):
        return False
    return one.length == other.length and torch.equal(one.tokens[:-1], other.tokens[:-1])


def riders(requests: Sequence[Request]) -> set[int]:
    """Return the indices of requests that have the same input as the one before."""
    return {i for i in range(1, len(requests)) if same_input(requests[i], requests[i - 1])}


@dataclass(frozen=True)
class ScoringBatch:
    """Padded inputs of one forward pass."""

    tokens: Tensor
    """`[lines, width]`, padded on the right with 0; neighbours with the same input share a line."""

    query_from: int
    """First position whose state is needed by any request."""

    rows: Tensor
    """Indices of the scored states in the flattened `[lines * (width - query_from)]` states."""

    targets: Tensor
    """Token ids that the scored states predict, `[rows]`."""

    indices: list[int]
    """The requests in the batch, in the order of `rows`."""

    @classmethod
    def of(cls, requests: Sequence[Request], indices: list[int]) -> ScoringBatch:
        """Return the padded batch of some requests."""
        chosen = [requests[i] for i in indices]
        shared = riders(chosen)
        tokens = pad_rows(r.tokens[:-1] for place, r in enumerate(chosen) if place not in shared)
        query_from = min(request.length - request.num_scored for request in chosen)
        width = tokens.shape[1] - query_from
        rows, line = [], -1
        for place, request in enumerate(chosen):
            line += place not in shared
            first = line * width + request.length - request.num_scored - query_from
            rows.append(torch.arange(first, first + request.num_scored))
        targets = [request.tokens[-request.num_scored :] for request in chosen]
        return cls(tokens, query_from, torch.cat(rows), torch.cat(targets), indices)


@torch.inference_mode()
@float32_products()
def score(
    model: GPT | T5,
    requests: Sequence[Request],
    *,
    mesh: Mesh,
    device: torch.device,
    batch_tokens: int,
    on_progress: OnProgress | None = None,
    partial: PartialScores | None = None,
) -> Scores:
    """Return the log-probabilities of the scored tokens, on every rank the same.

    Collectives: those of the model over tp; one gather of the scores over dp.

    Args:
        model: This rank's shard.
        requests: What to score; each at most positions + 1 tokens; `PairRequest`s of a T5.
        mesh: The layout.
        device: Where the model is.
        batch_tokens: Padded tokens of a forward pass.
        on_progress: Called with (tokens done, tokens in all), on rank 0.
        partial: Results of an interrupted run, and where to keep those of this one.

    Raises:
        InputError: A request is too long, a token id is outside the vocabulary, or `partial` holds
            other numbers of scores.
    """
    started = time.perf_counter()
    check_requests(requests, model.config)
    counts = [request.num_scored for request in requests]
    lengths = [request.length for request in requests]
    # An interrupted run with a higher --limit may have done more than is asked for now.
    done = {} if partial is None else partial.finished()
    found = {i: (kept.logprobs, kept.greedy) for i, kept in done.items() if i < len(requests)}
    if partial is not None:
        partial.check_counts(counts)

    def run(indices: list[int]) -> tuple[Tensor, Tensor]:
        if isinstance(model, T5):
            pairs = [request for i in indices if isinstance(request := requests[i], PairRequest)]
            logprobs, greedy = score_pairs(model, pairs, device)
        else:
            logprobs, greedy = score_batch(model, ScoringBatch.of(requests, indices), device)
        if partial is not None and mesh.tp_rank == 0:
            partial.add(indices, [counts[i] for i in indices], logprobs, greedy)
        return logprobs, greedy

    results = map_batches(
        run,
        _pending_batches(requests, found, batch_tokens),
        mesh,
        work=lengths,
        already_done=sum(lengths[i] for i in found),
        on_progress=on_progress,
        before_join=None if partial is None else partial.flush,
    )
    for indices, (logprobs, greedy) in results:
        sizes = [counts[i] for i in indices]
        parts = zip(logprobs.split(sizes), greedy.split(sizes), strict=True)
        found.update(zip(indices, parts, strict=True))
    ordered = [found[index] for index in range(len(requests))]
    return Scores(
        torch.cat([torch.zeros(0), *(logprobs for logprobs, _ in ordered)]),
        torch.cat([torch.zeros(0, dtype=torch.bool), *(greedy for _, greedy in ordered)]),
        torch.tensor([0, *counts]).cumsum(0),
        time.perf_counter() - started,
    )


def _pending_batches(
    requests: Sequence[Request], done: Collection[int], batch_tokens: int
) -> list[list[int]]:
    """Return batches of the requests that are not done."""
    indices = [index for index in range(len(requests)) if index not in done]
    pending = [requests[index] for index in indices]
    packed = pack([request.width for request in pending], batch_tokens, riders(pending))
    return [[indices[i] for i in batch] for batch in packed]


def score_batch(model: GPT, batch: ScoringBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (float32, nats) and greedy flags of the targets, `[rows]` each."""
    tokens, rows, targets = (
        to_device(x, device) for x in (batch.tokens, batch.rows, batch.targets)
    )
    states = model(tokens, batch.query_from)  # [B, T - from, h]
    scored = states.flatten(0, 1).index_select(0, rows)  # [N, h]
    return model.log_probs(scored, targets)


def score_pairs(
    model: T5, requests: Sequence[PairRequest], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (float32, nats) and greedy flags of all tokens but each first."""
    tokens = pad_rows(request.tokens[:-1] for request in requests)  # [B, T]
    encoder_tokens = pad_rows(request.encoder_tokens for request in requests)  # [B, S]
    encoder_mask = pad_rows(request.encoder_mask for request in requests)
    inputs = (to_device(x, device) for x in (encoder_tokens, encoder_mask, tokens))
    states = model(*inputs)  # [B, T, h]
    line = tokens.shape[1]
    rows = torch.cat([torch.arange(i * line, i * line + r.length) for i, r in enumerate(requests)])
    targets = torch.cat([request.tokens[1:] for request in requests])
    scored = states.flatten(0, 1).index_select(0, to_device(rows, device))  # [N, h]
    return model.log_probs(scored, to_device(targets, device))


def check_requests(requests: Sequence[Request], config: ModelConfig) -> None:
    """Refuse requests that the model cannot run.

    Raises:
        InputError: A sequence is empty, too long, or holds an id outside the vocabulary.
    """
    for index, request in enumerate(requests):
        if not 1 <= request.num_scored <= request.length:
            raise InputError(
                f"sequence {index} has {request.tokens.numel()} token(s) of which "
                f"{request.num_scored} are to be scored; at least one token must stand before the "
                "scored ones"
            )
        if request.length > config.max_position_embeddings:
            raise InputError(
                f"sequence {index} has {request.tokens.numel()} tokens, the model takes at most "
                f"{config.max_position_embeddings + 1}; cut it, or score it by windows"
            )
        if (config.family == "t5") != isinstance(request, PairRequest):
            raise InputError(
                f"sequence {index} {'lacks' if config.family == 't5' else 'has'} an encoder's "
                f"input, but this is a {config.family.upper()} checkpoint"
            )
        if isinstance(request, PairRequest):
            fault = find_encoder_fault(request.encoder_tokens, request.encoder_mask, config)
            if fault is not None:
                raise InputError(f"sequence {index}: {fault}")
        low, high = map(int, request.tokens.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise InputError(
                f"token id {low if low < 0 else high} is outside the model's vocabulary of "
                f"{config.vocab_size} rows; the tokenizer does not belong to this checkpoint"
            )


def find_encoder_fault(tokens: Tensor, mask: Tensor, config: ModelConfig) -> str | None:
    """Return in words why a T5's encoder cannot take an input; None: it can."""
    count, positions = tokens.numel(), config.max_position_embeddings
    if not count:
        return "encoder_tokens holds no token; give at least one"
    if count > positions:
        return f"encoder_tokens has {count} tokens, the model takes at most {positions}; cut it"
    low, high = map(int, tokens.aminmax())
    if low < 0 or high >= config.vocab_size:
        return (
            f"encoder_tokens holds id {low if low < 0 else high}, outside the model's vocabulary "
            f"of {config.vocab_size} rows; the tokenizer does not belong to this checkpoint"
        )
    if mask.numel() != count:
        return "encoder_mask and encoder_tokens differ in length; give one number each"
    if not ((mask == 0) | (mask == 1)).all():
        return "encoder_mask holds a number that is neither 1 (keep) nor 0"
    if not mask.any():
        return "encoder_mask keeps no token; leave it out, or put 1 where one may be seen"
    return None
