"""The paper's tensor parallelism (arXiv 1909.08053, section 3).

The only file of the model with collectives. A layer is cut so that two of its matrix products need
one all-reduce: the first matrix by columns (of the output), the second by rows (of the input). Two
functions connect the ranks: `f` is the identity forward and an all-reduce backward, `g` the
reverse. The vocabulary is cut by rows; log-probabilities and the argmax are computed without ever
gathering logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGIT_CHUNK_ELEMENTS = 1 << 24
"""Logits computed at a time (64 MB in float32), however many rows are scored."""


@dataclass(frozen=True)
class TensorParallel:
    """This process's place in its tensor-parallel group; size 1 needs no group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


SINGLE = TensorParallel()
"""One process holds the whole model."""


class _CopyToRegion(torch.autograd.Function):
    """The paper's f: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.tp.group)
        return grad, None


class _ReduceFromRegion(torch.autograd.Function):
    """The paper's g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        total = x.clone() if x.requires_grad else x
        dist.all_reduce(total, group=tp.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def copy_to_region(x: Tensor, tp: TensorParallel) -> Tensor:
    """Return `x`; its gradient is summed over the tensor-parallel ranks (the paper's f)."""
    if tp.size == 1 or not torch.is_grad_enabled():
        return x
    return _CopyToRegion.apply(x, tp)  # type: ignore[no-any-return]


def reduce_from_region(x: Tensor, tp: TensorParallel) -> Tensor:
    """Return the sum of `x` over the tensor-parallel ranks (the paper's g); one all-reduce."""
    if tp.size == 1:
        return x
    return _ReduceFromRegion.apply(x.contiguous(), tp)  # type: ignore[no-any-return]


class ColumnParallelLinear(nn.Module):
    """A linear layer of which this rank computes some outputs: `[..., in]` -> `[..., out / tp]`.

    No communication forward; the gradient of the input is summed over ranks.
    """

    def __init__(self, inputs: int, local_outputs: int, *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(local_outputs, inputs))
        self.bias = nn.Parameter(torch.empty(local_outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's outputs."""
        return F.linear(copy_to_region(x, self.tp), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A linear layer of which this rank holds some inputs: `[..., in / tp]` -> `[..., out]`.

    One all-reduce forward. The bias is replicated and added once, after the sum.
    """

    def __init__(self, local_inputs: int, outputs: int, *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(outputs, local_inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the whole output, the same on every rank."""
        if self.tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        total = reduce_from_region(F.linear(x, self.weight), self.tp)
        return total if self.bias is None else total + self.bias


class VocabParallelEmbedding(nn.Module):
    """An embedding table of which this rank holds the rows `[first_row, first_row + rows)`."""

    def __init__(self, rows: int, width: int, *, first_row: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.first_row = first_row
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return embeddings `[batch, seq, hidden]`; one all-reduce, of zeros but on one rank."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first_row
        mine = (local >= 0) & (local < self.weight.shape[0])
        if self.weight.shape[0] == 0:  # more ranks than rows: this rank only takes part in the sum
            x = self.weight.new_zeros(*tokens.shape, self.weight.shape[1])
        else:
            x = F.embedding(local.where(mine, 0), self.weight) * mine.unsqueeze(-1)
        return reduce_from_region(x, self.tp)


@torch.no_grad()
def vocab_parallel_log_probs(
    rows: Tensor,
    targets: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    first_row: int,
    vocab_size: int,
    tp: TensorParallel,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target and whether it is the argmax.

    Three small all-reduces per chunk of rows: the pair (maximum, target's logit), the sum of
    exponentials, and the lowest index among the maxima. Logits are never gathered.

    Args:
        rows: Hidden states of the scored positions, `[rows, hidden]`, the same on every rank.
        targets: Token ids, `[rows]`.
        weight: This rank's rows of the output table, `[vocab / tp, hidden]`.
        bias: This rank's part of the output bias, `[vocab / tp]`, or None.
        first_row: Token id of `weight`'s row 0.
        vocab_size: Rows of the whole table.
        tp: The tensor-parallel group.

    Returns:
        Log-probabilities in nats, float32 `[rows]`, normalised over all rows of the table; and
        bool `[rows]`, true where the target is the argmax (the lowest id on a tie, as torch.argmax
        has it).
    """
    # Of the whole table: ranks that hold different numbers of rows must still meet at every chunk.
    chunk = max(1, LOGIT_CHUNK_ELEMENTS // -(-vocab_size // tp.size))
    pieces = [
        _log_probs_chunk(rows[i : i + chunk], targets[i : i + chunk], weight, bias, first_row, tp)
        for i in range(0, rows.shape[0], chunk)
    ]
    if not pieces:
        empty = rows.new_empty(0, dtype=torch.float32)
        return empty, empty.bool()
    return torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])


def _log_probs_chunk(
    rows: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first_row: int,
    tp: TensorParallel,
) -> tuple[Tensor, Tensor]:
    logits = F.linear(rows, weight, bias).float()  # [N, V/p]
    local = targets - first_row
    mine = (local >= 0) & (local < weight.shape[0])
    peaks = logits.new_full((2, rows.shape[0]), -torch.inf)  # the maximum, and the target's logit
    if weight.shape[0]:
        peaks[0] = logits.amax(dim=-1)
        target_logits = logits.gather(1, local.where(mine, 0).unsqueeze(1)).squeeze(1)
        peaks[1] = target_logits.where(mine, -torch.inf)
    own_best = peaks[0].clone()
    if tp.size > 1:
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=tp.group)
    best, target = peaks
    greedy = _is_argmax(logits, targets, target == best, own_best == best, first_row, tp)
    sums = logits.sub_(best.unsqueeze(1)).exp_().sum(dim=-1)
    if tp.size > 1:
        dist.all_reduce(sums, group=tp.group)
    return target - best - sums.log(), greedy


def _is_argmax(
    logits: Tensor,
    targets: Tensor,
    tied: Tensor,
    has_best: Tensor,
    first_row: int,
    tp: TensorParallel,
) -> Tensor:
    """Return whether each target is the lowest id with the largest logit, bool `[rows]`.

    Args:
        logits: `[rows, vocab / tp]`.
        targets: Token ids, `[rows]`.
        tied: Where the target's logit is the largest, the same on every rank: only there is it
            asked whether a lower id has the same logit.
        has_best: Where this rank's rows of the table hold the largest logit.
        first_row: Token id of the first column.
        tp: The tensor-parallel group.
    """
    # On a GPU all rows are looked at: choosing some would make the host wait for the device.
    chosen = slice(None) if logits.is_cuda else tied.nonzero().squeeze(1)
    some = logits[chosen]
    lowest = targets.new_full((some.shape[0],), torch.iinfo(torch.int64).max)
    if logits.shape[1] and some.shape[0]:
        lowest = torch.where(has_best[chosen], some.argmax(dim=-1) + first_row, lowest)
    if tp.size > 1:
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=tp.group)
    greedy = torch.zeros_like(tied)
    greedy[chosen] = lowest == targets[chosen]
    return greedy & tied


@torch.no_grad()
def vocab_parallel_argmax(
    rows: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    first_row: int,
    tp: TensorParallel,
) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit, float32, and its token id, the lowest on a tie.

    Arguments as in `vocab_parallel_log_probs`. Two small all-reduces, after which every rank has
    the same ids. A NaN among the logits comes out as the largest.
    """
    logits = F.linear(rows, weight, bias).float()  # [N, V/p]
    none = torch.iinfo(torch.int64).max
    if weight.shape[0]:
        best, index = logits.max(dim=-1)
        index = index + first_row
    else:  # more ranks than rows of the table: this rank only takes part in the reductions
        best = logits.new_full((rows.shape[0],), -torch.inf)
        index = torch.full_like(best, none, dtype=torch.int64)
    if tp.size > 1:
        own = best.clone()
        dist.all_reduce(best, op=dist.ReduceOp.MAX, group=tp.group)
        index = index.where(own == best, none)
        dist.all_reduce(index, op=dist.ReduceOp.MIN, group=tp.group)
    return best, index


@torch.no_grad()
def vocab_parallel_logits(
    rows: Tensor, *, weight: Tensor, bias: Tensor | None, vocab_size: int, tp: TensorParallel
) -> Tensor:
    """Return all logits of some rows, float32 `[rows, vocab]`, the same on every rank.

    One all-gather. For sampling, which needs them at one position of each text; scores and greedy
    choices never gather logits. Arguments as in `vocab_parallel_log_probs`.
    """
    logits = F.linear(rows, weight, bias).float()  # [N, V/p]
    if tp.size == 1:
        return logits
    # Ranks hold ceil(V / p) rows but for the last ones: filled up, these end beyond the table.
    missing = -(-vocab_size // tp.size) - weight.shape[0]
    logits = F.pad(logits, (0, missing), value=-torch.inf)
    parts = [torch.empty_like(logits) for _ in range(tp.size)]
    dist.all_gather(parts, logits, group=tp.group)
    return torch.cat(parts, dim=1)[:, :vocab_size]


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy over a vocabulary cut by ranks; the gradient stays on the rank of its logits.

    Source: megatron/core/tensor_parallel/cross_entropy.py, without label smoothing.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first_row: int, tp: TensorParallel
    ) -> tuple[Tensor, Tensor]:
        local = targets - first_row
        mine = (local >= 0) & (local < logits.shape[1])
        local = local.where(mine, 0)
        if logits.shape[1]:
            top, top_index = logits.max(dim=-1)
        else:  # more ranks than rows: this rank only takes part in the sums
            top = logits.new_full(targets.shape, -torch.inf)
            top_index = torch.zeros_like(targets)
        best = top.clone()
        if tp.size > 1:
            dist.all_reduce(best, op=dist.ReduceOp.MAX, group=tp.group)
        shifted = logits - best.unsqueeze(1)
        target = shifted.new_zeros(targets.shape)
        if logits.shape[1]:
            target = shifted.gather(1, local.unsqueeze(1)).squeeze(1).where(mine, 0.0)
        exponentials = shifted.exp_()
        totals = torch.stack([exponentials.sum(dim=-1), target])
        winner = torch.where(top == best, top_index + first_row, torch.iinfo(torch.int64).max)
        if tp.size > 1:
            dist.all_reduce(totals, group=tp.group)
            dist.all_reduce(winner, op=dist.ReduceOp.MIN, group=tp.group)
        ctx.save_for_backward(exponentials.div_(totals[0].unsqueeze(1)), local, mine)
        greedy = winner == targets
        ctx.mark_non_differentiable(greedy)
        return totals[0].log() - totals[1], greedy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, local, mine = ctx.saved_tensors
        grad = softmax.clone()
        if softmax.shape[1]:
            grad.scatter_add_(1, local.unsqueeze(1), -mine.to(grad.dtype).unsqueeze(1))
        return grad.mul_(grads[0].unsqueeze(1)), None, None, None


def vocab_parallel_cross_entropy(
    rows: Tensor,
    targets: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    first_row: int,
    vocab_size: int,
    tp: TensorParallel,
) -> tuple[Tensor, Tensor]:
    """Return each row's loss, differentiable, and whether its target is the argmax; both `[rows]`.

    Arguments as in `vocab_parallel_log_probs`; the loss is float32, in nats. Three small
    all-reduces forward, one of the size of `rows` backward. Where all logits together would exceed
    `LOGIT_CHUNK_ELEMENTS`, they are computed in chunks, and again for the gradient.
    """
    rows = copy_to_region(rows, tp)
    chunk = max(1, LOGIT_CHUNK_ELEMENTS // -(-vocab_size // tp.size))
    if rows.shape[0] <= chunk:
        return _loss_chunk(rows, targets, weight, bias, first_row, tp)
    pieces = [
        checkpoint(
            _loss_chunk,
            rows[i : i + chunk],
            targets[i : i + chunk],
            weight,
            bias,
            first_row,
            tp,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for i in range(0, rows.shape[0], chunk)
    ]
    return torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])


def _loss_chunk(
    rows: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first_row: int,
    tp: TensorParallel,
) -> tuple[Tensor, Tensor]:
    logits = F.linear(rows, weight, bias).float()  # [N, V/p]
    return _CrossEntropy.apply(logits, targets, first_row, tp)  # type: ignore[no-any-return]
