"""The paper's tensor parallelism (arXiv 1909.08053, section 3).

The only file of the model with collectives. A layer is cut so that two of its matrix products need
one all-reduce: the first matrix by columns (of the output), the second by rows (of the input). Two
functions connect the ranks: `f` is the identity forward and an all-reduce backward, `g` the
reverse. The vocabulary is cut by rows; log-probabilities and the argmax are computed without ever
gathering logits.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGIT_CHUNK_ELEMENTS = 1 << 24
"""Logits computed at a time (64 MB in float32), however many rows are scored."""

PRODUCT_BLOCK_ELEMENTS = 1 << 20
"""Values of a half-precision table that are widened at a time on the CPU (4 MB)."""

NO_TOKEN = torch.iinfo(torch.int64).max
"""Above every token id."""


class Blocks(Protocol):
    """Memory of the ranks of a group that each of them can read."""

    message: Tensor
    """What ranks send each other when they have filled a block."""

    def takes(self, values: Tensor) -> bool:
        """Return whether a tensor is summed by way of it, the same on all ranks."""

    def pieces(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return a tensor in pieces, each of which fits a block."""

    def fill(self, piece: Tensor) -> None:
        """Copy this rank's values into its block."""

    def add_up(self, piece: Tensor) -> None:
        """Replace a piece by the sum of all blocks."""


@dataclass(frozen=True)
class TensorParallel:
    """This process's place in its tensor-parallel group; size 1 needs no group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    shared: Blocks | None = None
    """On one machine's CPU: memory for sums."""


SINGLE = TensorParallel()
"""One process holds the whole model."""


def reduce_over_ranks(values: Tensor, tp: TensorParallel, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a tensor over the tensor-parallel ranks, in place; return it. One all-reduce."""
    if tp.size == 1:
        return values
    if tp.shared is None or op != dist.ReduceOp.SUM or not tp.shared.takes(values):
        dist.all_reduce(values, op=op, group=tp.group)
        return values
    for piece in tp.shared.pieces(values):
        tp.shared.fill(piece)
        dist.all_reduce(tp.shared.message, group=tp.group)  # all have
        tp.shared.add_up(piece)
    return values


class _CopyToRegion(torch.autograd.Function):
    """The paper's f: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_over_ranks(grads[0].contiguous(), ctx.tp), None


class _ReduceFromRegion(torch.autograd.Function):
    """The paper's g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        return reduce_over_ranks(x.clone() if x.requires_grad else x, tp)

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


class Activating(Protocol):
    """An activation."""

    post_op: tuple[str, str] | None
    """oneDNN's name and algorithm of it; None: oneDNN has none."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the activation's values."""


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activating | None = None
) -> Tensor:
    """Return a linear layer's outputs, through an activation where there is one.

    On the CPU in inference mode oneDNN adds the bias and takes the activation while the outputs
    are in the cache.
    """
    post_op = ("none", "") if activation is None else activation.post_op
    if post_op is not None and onednn_takes(x, weight):
        kind, algorithm = post_op
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, kind, [], algorithm)  # type: ignore[no-any-return]
    out = F.linear(x, weight, bias)
    return out if activation is None else activation(out)


def onednn_takes(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN computes a product with what follows it: on the CPU, for inference."""
    return (
        torch.is_inference_mode_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and (x.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class ColumnParallelLinear(nn.Module):
    """A linear layer of which this rank computes some outputs: `[..., in]` -> `[..., out / tp]`.

    No communication forward; the gradient of the input is summed over ranks.
    """

    def __init__(self, inputs: int, local_outputs: int, *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(local_outputs, inputs))
        self.bias = nn.Parameter(torch.empty(local_outputs)) if bias else None

    def forward(self, x: Tensor, activation: Activating | None = None) -> Tensor:
        """Return this rank's outputs, through an activation where one is given."""
        return linear(copy_to_region(x, self.tp), self.weight, self.bias, activation)


class RowParallelLinear(nn.Module):
    """A linear layer of which this rank holds some inputs: `[..., in / tp]` -> `[..., out]`.

    One all-reduce forward. The bias is replicated and added once: after the sum, but in inference
    without a norm of the sum, to the first rank's part.
    """

    post_layernorm: nn.Module | None
    """A norm of the sum, before the bias; replicated. None: there is none."""

    def __init__(self, local_inputs: int, outputs: int, *, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.post_layernorm = None
        self.weight = nn.Parameter(torch.empty(outputs, local_inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the whole output, the same on every rank."""
        if self.tp.size == 1 and self.post_layernorm is None:
            return linear(x, self.weight, self.bias)
        # As a part of one rank's product the bias costs nothing; its gradient is on every rank.
        in_product = torch.is_inference_mode_enabled() and self.post_layernorm is None
        bias = self.bias if in_product and self.tp.rank == 0 else None
        total = reduce_from_region(linear(x, self.weight, bias), self.tp)
        if self.post_layernorm is not None:
            total = self.post_layernorm(total)
        return total if in_product or self.bias is None else total + self.bias


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
        local, mine = _local_ids(tokens, self.first_row, self.weight.shape[0])
        if self.weight.shape[0] == 0:  # more ranks than rows: this rank only takes part in the sum
            x = self.weight.new_zeros(*tokens.shape, self.weight.shape[1])
        else:
            x = F.embedding(local, self.weight) * mine.unsqueeze(-1)
        return reduce_from_region(x, self.tp)


class _Float32Product(torch.autograd.Function):
    """`x @ weight.T` of two matrices of half precision, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.device.type != "cpu":
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        # No such product on the CPU: some rows at a time, so that no whole wide copy lives.
        out = x.new_empty(len(x), len(weight), dtype=torch.float32)
        rows = max(1, PRODUCT_BLOCK_ELEMENTS // weight.shape[1])
        wide = x.float()
        for piece, part in zip(out.split(rows, dim=1), weight.split(rows), strict=True):
            torch.mm(wide, part.float().t(), out=piece)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        return grad @ weight, grad.t() @ x


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which products with `x` are computed in the dtype that they are given."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def float32_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a linear layer's outputs `[rows, outputs]`, never rounded to less than float32.

    Args:
        x: `[rows, in]`, of the weight's dtype.
        weight: `[outputs, in]`.
        bias: `[outputs]`, or None.
    """
    with without_autocast(x):
        if x.dtype.itemsize > 2:
            return F.linear(x, weight, bias).float()
        product = _Float32Product.apply(x, weight)
        return product if bias is None else product.add_(bias)  # type: ignore[no-any-return]


class VocabHead(nn.Module):
    """The output table over a vocabulary that is cut by rows, and the four things asked of it.

    Holds a table of its own where it is not tied to the embeddings, and BERT's output bias. Logits
    are float32: half precision's would lie up to a quarter apart where GPT-2's are (around -100).
    """

    def __init__(
        self,
        vocab_size: int,
        embedding: VocabParallelEmbedding,
        *,
        tied: bool,
        biased: bool,
        multiplier: float = 1.0,
        cap: float | None = None,
    ) -> None:
        """Cut the table as the embeddings are.

        Args:
            vocab_size: Rows of the whole table.
            embedding: The word embeddings.
            tied: Their rows are the output table.
            biased: There is a bias for each token.
            multiplier: Of the logits.
            cap: The logits then become cap tanh(logit / cap); None: they stay as they are.
        """
        super().__init__()
        self.multiplier, self.cap = multiplier, cap
        self.vocab_size = vocab_size
        self.tp, self.first_row = embedding.tp, embedding.first_row
        rows, width = embedding.weight.shape
        self.weight = None if tied else nn.Parameter(torch.empty(rows, width))
        self.bias = nn.Parameter(torch.empty(rows)) if biased else None
        self._embedding = (embedding,)  # in a tuple: its parameter is not one of this module's

    @property
    def table(self) -> Tensor:
        """This rank's rows of the output table, `[vocab / tp, hidden]`."""
        return self._embedding[0].weight if self.weight is None else self.weight

    @property
    def _most_rows(self) -> int:
        """Rows of the table on the first rank; the last ranks may hold fewer."""
        return -(-self.vocab_size // self.tp.size)

    @property
    def _chunk(self) -> int:
        """States whose logits are computed at a time, the same on ranks that hold fewer rows."""
        return max(1, LOGIT_CHUNK_ELEMENTS // self._most_rows)

    def _operands(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return states and table in the dtype of their product: autocast's, or the table's."""
        kind = states.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else self.table.dtype
        return states.to(dtype), self.table.to(dtype)

    def _own_logits(self, states: Tensor, table: Tensor) -> Tensor:
        logits = float32_product(states, table, self.bias)  # [N, V/p]
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @torch.no_grad()
    def log_probs(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each target and whether it is the argmax.

        Three small all-reduces per chunk of states: the pair (maximum, target's logit), the sum of
        exponentials, and the lowest index among the maxima. Logits are never gathered.

        Args:
            states: Hidden states of the scored positions, `[rows, hidden]`, the same on every rank.
            targets: Token ids, `[rows]`.

        Returns:
            Log-probabilities in nats, float32 `[rows]`, normalised over all rows of the table; and
            bool `[rows]`, true where the target is the argmax (the lowest id on a tie, as
            torch.argmax has it).
        """
        if not len(states):
            empty = states.new_empty(0, dtype=torch.float32)
            return empty, empty.bool()
        states, table = self._operands(states)
        chunks = zip(states.split(self._chunk), targets.split(self._chunk), strict=True)
        pieces = [self._log_probs_chunk(*chunk, table) for chunk in chunks]
        logprobs, greedy = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(greedy)

    def _log_probs_chunk(
        self, states: Tensor, targets: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = self._own_logits(states, table)
        local, mine = _local_ids(targets, self.first_row, logits.shape[1])
        peaks = logits.new_full((2, len(states)), -torch.inf)  # the maximum, and target's logit
        if logits.shape[1]:
            peaks[0] = logits.amax(dim=-1)
            peaks[1] = logits.gather(1, local.unsqueeze(1)).squeeze(1).where(mine, -torch.inf)
        own_best = peaks[0].clone()
        best, target = reduce_over_ranks(peaks, self.tp, dist.ReduceOp.MAX)
        # Where the target's logit is not the largest nothing more is asked. On a GPU all rows are
        # looked at: choosing some would make the host wait for the device.
        is_best = target == best
        on_host = logits.device.type == "cpu"
        asked = is_best.nonzero().squeeze(1) if on_host else slice(None)
        _, index = _own_argmax(logits[asked], self.first_row)
        lowest = _lowest_argmax(index, own_best[asked], best[asked], self.tp)
        greedy = is_best.clone()
        greedy[asked] &= lowest == targets[asked]
        sums = logits.sub_(best.unsqueeze(1)).exp_().sum(dim=-1)
        return target - best - reduce_over_ranks(sums, self.tp).log(), greedy

    @torch.no_grad()
    def argmax(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return each state's likeliest token, the lowest id on a tie, and its log-probability.

        Three small all-reduces, after which every rank has the same ids, int64 `[rows]`. The
        log-probabilities, in nats, float32 `[rows]`, are NaN where a logit is not finite.
        """
        logits = self._own_logits(*self._operands(states))
        own_best, index = _own_argmax(logits, self.first_row)
        best = reduce_over_ranks(own_best.clone(), self.tp, dist.ReduceOp.MAX)
        ids = _lowest_argmax(index, own_best, best, self.tp)
        sums = logits.sub_(best.unsqueeze(1)).exp_().sum(dim=-1)
        return ids, -reduce_over_ranks(sums, self.tp).log()

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Return all logits of some states, float32 `[rows, vocab]`, the same on every rank.

        One all-gather. For sampling, which needs them at one position of each text; scores and
        greedy choices never gather logits.
        """
        logits = self._own_logits(*self._operands(states))
        if self.tp.size == 1:
            return logits
        logits = F.pad(logits, (0, self._most_rows - logits.shape[1]), value=-torch.inf)
        parts = [torch.empty_like(logits) for _ in range(self.tp.size)]
        dist.all_gather(parts, logits, group=self.tp.group)
        return torch.cat(parts, dim=1)[:, : self.vocab_size]  # ranks with fewer rows are the last

    def losses(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return each target's loss, differentiable, and whether it is the argmax; both `[rows]`.

        The loss is float32, in nats. Three small all-reduces forward, one of the size of `states`
        backward. Where all logits together would exceed `LOGIT_CHUNK_ELEMENTS`, they are computed
        in chunks, and again for the gradient.
        """
        states, table = self._operands(copy_to_region(states, self.tp))
        if len(states) <= self._chunk:
            return self._losses_chunk(states, targets, table)
        chunks = zip(states.split(self._chunk), targets.split(self._chunk), strict=True)
        pieces = [
            checkpoint(
                self._losses_chunk, *chunk, table, use_reentrant=False, preserve_rng_state=False
            )
            for chunk in chunks
        ]
        losses, greedy = zip(*pieces, strict=True)
        return torch.cat(losses), torch.cat(greedy)

    def _losses_chunk(
        self, states: Tensor, targets: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = self._own_logits(states, table)
        return _CrossEntropy.apply(logits, targets, self.first_row, self.tp)  # type: ignore[no-any-return]


def _local_ids(targets: Tensor, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return each target's row on this rank (0 where it has none), and whether it has one."""
    local = targets - first_row
    mine = (local >= 0) & (local < rows)
    return local.where(mine, 0), mine


def _own_argmax(logits: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """Return the largest of this rank's logits `[rows, vocab / tp]`, and the lowest id that has it.

    Where there are more ranks than rows of the table, one without rows only takes part in the
    reductions.
    """
    if logits.shape[1]:
        best, index = logits.max(dim=-1)
        return best, index + first_row
    best = logits.new_full(logits.shape[:1], -torch.inf)
    return best, torch.full_like(best, NO_TOKEN, dtype=torch.int64)


def _lowest_argmax(index: Tensor, own_best: Tensor, best: Tensor, tp: TensorParallel) -> Tensor:
    """Return the lowest id with the largest logit of all ranks, given each rank's own."""
    if tp.size == 1:
        return index
    return reduce_over_ranks(index.where(own_best == best, NO_TOKEN), tp, dist.ReduceOp.MIN)


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy over a vocabulary cut by ranks; the gradient stays on the rank of its logits.

    Source: megatron/core/tensor_parallel/cross_entropy.py, without label smoothing.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first_row: int, tp: TensorParallel
    ) -> tuple[Tensor, Tensor]:
        local, mine = _local_ids(targets, first_row, logits.shape[1])
        own_best, index = _own_argmax(logits, first_row)
        best = reduce_over_ranks(own_best.clone(), tp, dist.ReduceOp.MAX)
        shifted = logits - best.unsqueeze(1)
        target = shifted.new_zeros(targets.shape)
        if logits.shape[1]:
            target = shifted.gather(1, local.unsqueeze(1)).squeeze(1).where(mine, 0.0)
        exponentials = shifted.exp_()
        totals = reduce_over_ranks(torch.stack([exponentials.sum(dim=-1), target]), tp)
        greedy = _lowest_argmax(index, own_best, best, tp) == targets
        ctx.save_for_backward(exponentials.div_(totals[0].unsqueeze(1)), local, mine)
        ctx.mark_non_differentiable(greedy)
        return totals[0].log() - totals[1], greedy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, local, mine = ctx.saved_tensors
        grad = softmax.clone()
        if softmax.shape[1]:
            grad.scatter_add_(1, local.unsqueeze(1), -mine.to(grad.dtype).unsqueeze(1))
        return grad.mul_(grads[0].unsqueeze(1)), None, None, None
