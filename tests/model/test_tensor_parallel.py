"""The parallel layers on real ranks against one torch computation of the unsplit layer."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import random_models
from support.ranks import run_ranks
from support.rounding import assert_same_but_for_rounding
from torch import Tensor, nn

from mlm_eval.checkpoints.parameters import vocab_range
from mlm_eval.model import tensor_parallel
from mlm_eval.model.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
    copy_to_region,
    reduce_from_region,
)

SIZES = [1, 2, 4]


def here() -> TensorParallel:
    """Return this rank's place among all running ranks."""
    if not dist.is_initialized():
        return TensorParallel()
    return TensorParallel(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def part(tensor: Tensor, dim: int, tp: TensorParallel) -> Tensor:
    return tensor.chunk(tp.size, dim)[tp.rank].contiguous()


def fill(module: nn.Module, **values: Tensor) -> None:
    """Set a module's parameters, shapes checked."""
    for name, value in values.items():
        parameter = module.get_parameter(name)
        assert parameter.shape == value.shape, name
        parameter.data.copy_(value)


# --- An MLP: f, columns, rows, g ----------------------------------------------------------------

WIDTH, INNER = 6, 8


def mlp_weights() -> list[Tensor]:
    """Return both weights and biases, all N(0, 1)."""
    shapes = [(INNER, WIDTH), (INNER,), (WIDTH, INNER), (WIDTH,)]
    return [noise(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def mlp_on_a_rank(x: Tensor) -> dict[str, Tensor]:
    """Run this rank's part of the MLP forward and backward."""
    tp = here()
    w1, b1, w2, b2 = mlp_weights()
    columns = ColumnParallelLinear(WIDTH, INNER // tp.size, bias=True, tp=tp)
    rows = RowParallelLinear(INNER // tp.size, WIDTH, bias=True, tp=tp)
    fill(columns, weight=part(w1, 0, tp), bias=part(b1, 0, tp))
    fill(rows, weight=part(w2, 1, tp), bias=b2)
    x = x.clone().requires_grad_()
    y = rows(torch.tanh(columns(x)))
    (y * torch.arange(1.0, WIDTH + 1)).sum().backward()
    with torch.no_grad():
        without_grad = rows(torch.tanh(columns(x)))
    assert columns.bias is not None and rows.bias is not None
    return {
        "y": y.detach(),
        "without grad": without_grad,
        "x": x.grad,
        "w1": columns.weight.grad,
        "b1": columns.bias.grad,
        "w2": rows.weight.grad,
        "b2": rows.bias.grad,
    }  # type: ignore[dict-item]


@pytest.mark.parametrize("size", SIZES)
def test_a_split_mlp_is_the_whole_one_forward_and_backward(size):
    x = noise(2, 3, WIDTH, seed=9)
    weights = [w.requires_grad_() for w in mlp_weights()]
    whole = x.clone().requires_grad_()
    y = F.linear(torch.tanh(F.linear(whole, *weights[:2])), *weights[2:])
    (y * torch.arange(1.0, WIDTH + 1)).sum().backward()
    per_rank = run_ranks(size, mlp_on_a_rank, x)

    for actual in per_rank:
        # On every rank the whole output; the bias of the second layer in it once.
        torch.testing.assert_close(actual["y"], y.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(actual["without grad"], y.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(actual["x"], whole.grad, rtol=0, atol=1e-4)
        torch.testing.assert_close(actual["b2"], weights[3].grad, rtol=0, atol=1e-5)
    for name, weight, dim in [("w1", weights[0], 0), ("b1", weights[1], 0), ("w2", weights[2], 1)]:
        merged = torch.cat([actual[name] for actual in per_rank], dim)
        torch.testing.assert_close(merged, weight.grad, rtol=0, atol=1e-4)


def f_and_g_on_a_rank() -> dict[str, Tensor]:
    tp = here()
    x = torch.full((3,), 10.0**tp.rank, requires_grad=True)
    copied = copy_to_region(x, tp)
    copied.backward(torch.full((3,), 2.0**tp.rank))
    after_f = x.grad
    y = torch.full((3,), 10.0**tp.rank, requires_grad=True)
    total = reduce_from_region(y * 1, tp)
    total.backward(torch.full((3,), 2.0**tp.rank))
    return {
        "f": copied.detach(),
        "gradient of f": after_f,
        "g": total.detach(),
        "gradient of g": y.grad,
        "y": y.detach(),
    }  # type: ignore[dict-item]


@pytest.mark.parametrize("size", SIZES)
def test_f_and_g_are_each_others_mirror(size):
    for rank, actual in enumerate(run_ranks(size, f_and_g_on_a_rank)):
        expected = {
            "f": 10**rank,
            "gradient of f": sum(2**r for r in range(size)),
            "g": sum(10**r for r in range(size)),
            "gradient of g": 2**rank,
            "y": 10**rank,
        }
        for name, value in expected.items():
            assert actual[name].tolist() == [value] * 3, (rank, name)


def reduce_a_view_on_a_rank() -> Tensor:
    tp = here()
    x = torch.arange(6.0).view(2, 3).t()  # not contiguous
    with torch.no_grad():
        return reduce_from_region(x, tp)


def test_reducing_a_view_keeps_its_order():
    for actual in run_ranks(2, reduce_a_view_on_a_rank):
        assert torch.equal(actual, 2 * torch.arange(6.0).view(2, 3).t())


# --- The vocabulary -----------------------------------------------------------------------------

# (vocabulary, ranks): even, uneven, and ranks that hold no row at all.
VOCABULARIES = [(12, 1), (12, 2), (12, 4), (10, 4), (3, 2), (3, 4), (5, 4), (1, 4)]


def embed_on_a_rank(vocab: int, tokens: Tensor) -> tuple[int, Tensor, Tensor | None]:
    tp = here()
    start, stop = vocab_range(vocab, tp.rank, tp.size)
    embedding = VocabParallelEmbedding(stop - start, WIDTH, first_row=start, tp=tp)
    fill(embedding, weight=noise(vocab, WIDTH, seed=1)[start:stop])
    out = embedding(tokens)
    if out.requires_grad:
        (out * torch.arange(1.0, WIDTH + 1)).sum().backward()
    return stop - start, out.detach(), embedding.weight.grad


@pytest.mark.parametrize(("vocab", "size"), VOCABULARIES)
def test_a_split_embedding_is_the_whole_one(vocab, size):
    tokens = torch.arange(2 * 14).view(2, 14) % vocab
    table = noise(vocab, WIDTH, seed=1).requires_grad_()
    expected = F.embedding(tokens, table)
    (expected * torch.arange(1.0, WIDTH + 1)).sum().backward()

    per_rank = run_ranks(size, embed_on_a_rank, vocab, tokens)

    assert sum(rows for rows, _, _ in per_rank) == vocab
    gradients = []
    for rows, out, gradient in per_rank:
        assert torch.equal(out, expected.detach())  # a sum of one row and zeros is exact
        gradients.append(torch.zeros(rows, WIDTH) if gradient is None else gradient)
    torch.testing.assert_close(torch.cat(gradients), table.grad, rtol=0, atol=1e-5)


def log_probs_on_a_rank(
    rows: Tensor, targets: Tensor, table: Tensor, bias: Tensor | None, chunk: int | None
) -> tuple[Tensor, Tensor]:
    before = tensor_parallel.LOGIT_CHUNK_ELEMENTS
    tensor_parallel.LOGIT_CHUNK_ELEMENTS = chunk or before
    try:
        return random_models.vocab_head(table, bias).log_probs(rows, targets)
    finally:
        tensor_parallel.LOGIT_CHUNK_ELEMENTS = before


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("vocab", "size"), VOCABULARIES)
def test_split_log_probs_are_those_of_the_whole_table(vocab, size, biased):
    rows, table = noise(3 * vocab, WIDTH, seed=2), noise(vocab, WIDTH, seed=3)
    bias = noise(vocab, seed=4) if biased else None
    targets = torch.arange(vocab).repeat(3)
    whole = F.linear(rows, table, bias).log_softmax(-1)

    for logprobs, greedy in run_ranks(size, log_probs_on_a_rank, rows, targets, table, bias, None):
        assert logprobs.dtype == torch.float32 and greedy.dtype == torch.bool
        expected = whole.gather(1, targets.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
        assert torch.equal(greedy, whole.argmax(-1) == targets)


@pytest.mark.parametrize(("vocab", "size"), [(12, 1), (12, 2), (12, 4), (10, 4), (3, 4)])
def test_of_equal_logits_the_lowest_id_wins(vocab, size):
    """Every id is the target of rows whose maxima stand at every pair of places."""
    table = torch.eye(vocab)  # a row of hidden states is its own logits
    pairs = [(a, b) for a in range(vocab) for b in range(a, vocab)]
    rows = torch.stack([F.one_hot(torch.tensor(pair), vocab).amax(0).float() for pair in pairs])
    rows = rows.repeat_interleave(vocab, dim=0)
    targets = torch.arange(vocab).repeat(len(pairs))
    expected = rows.argmax(-1) == targets
    assert expected.sum() == len(pairs)
    for _, greedy in run_ranks(size, log_probs_on_a_rank, rows, targets, table, None, None):
        assert torch.equal(greedy, expected)


@pytest.mark.parametrize(("vocab", "size"), [(10, 1), (10, 4), (3, 4), (5, 2)])
@pytest.mark.parametrize("chunk", [1, 7, 12])
def test_logits_in_chunks_are_the_same(vocab, size, chunk):
    """The ranks hold 3, 3, 3 and 1 rows of 10, and must cut the scored rows at the same places."""
    rows, table = noise(23, WIDTH, seed=5), noise(vocab, WIDTH, seed=6)
    targets = torch.arange(23) % vocab
    [(expected, best), *_] = run_ranks(size, log_probs_on_a_rank, rows, targets, table, None, None)
    for logprobs, greedy in run_ranks(size, log_probs_on_a_rank, rows, targets, table, None, chunk):
        assert_same_but_for_rounding(logprobs, expected)
        assert torch.equal(greedy, best)


def test_a_chunk_bounds_the_logits(monkeypatch):
    computed = []
    linear = F.linear

    def watched(*arguments: Tensor) -> Tensor:
        computed.append(linear(*arguments))
        return computed[-1]

    monkeypatch.setattr(tensor_parallel.F, "linear", watched)
    monkeypatch.setattr(tensor_parallel, "LOGIT_CHUNK_ELEMENTS", 40)
    rows, table = noise(11, WIDTH, seed=5), noise(10, WIDTH, seed=6)
    log_probs_on_a_rank(rows, torch.zeros(11, dtype=torch.int64), table, None, None)
    assert [tuple(logits.shape) for logits in computed] == [(4, 10), (4, 10), (3, 10)]


def test_no_rows_have_no_log_probs():
    table = noise(10, WIDTH, seed=6)
    nothing = torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.int64)
    for logprobs, greedy in run_ranks(2, log_probs_on_a_rank, *nothing, table, None, None):
        assert logprobs.shape == greedy.shape == (0,)
        assert logprobs.dtype == torch.float32 and greedy.dtype == torch.bool


@pytest.mark.parametrize("size", [1, 2])
def test_huge_logits_neither_overflow_nor_vanish(size):
    table = torch.tensor([[1e4], [-1e4], [9.999e3], [0.0]])
    rows = torch.ones(4, 1)
    targets = torch.arange(4)
    for logprobs, greedy in run_ranks(size, log_probs_on_a_rank, rows, targets, table, None, None):
        expected = (table.double().t() - torch.logsumexp(table.double(), 0)).flatten()
        torch.testing.assert_close(logprobs, expected.float(), rtol=1e-6, atol=1e-6)
        assert greedy.tolist() == [True, False, False, False]


@pytest.mark.parametrize("size", [1, 2])
def test_a_broken_row_is_nan_and_never_greedy(size):
    """A NaN on one rank must reach all of them: a number would be an invention."""
    table = torch.eye(4)
    rows = torch.tensor([[1.0, 2.0, 3.0, float("nan")], [1.0, 2.0, 3.0, 4.0]])
    table[3, 3] = 1.0
    for logprobs, greedy in run_ranks(
        size, log_probs_on_a_rank, rows, torch.tensor([2, 3]), table, None, None
    ):
        assert logprobs[0].isnan() and not logprobs[1].isnan()
        assert greedy.tolist() == [False, True]


def test_half_precision_scores_are_summed_in_float32():
    """65,536 equal logits: their exponentials sum up to more than float16 can hold."""
    rows, table = torch.ones(1, 2).half(), torch.zeros(1 << 16, 2).half()
    logprobs, _ = log_probs_on_a_rank(rows, torch.tensor([5]), table, None, None)
    torch.testing.assert_close(logprobs, -torch.tensor([65536.0]).log(), rtol=1e-6, atol=0)


def cross_entropy_on_a_rank(
    rows: Tensor, targets: Tensor, table: Tensor, bias: Tensor, chunk: int | None
) -> list[Tensor]:
    rows = rows.clone().requires_grad_()
    head = random_models.vocab_head(table, bias)
    before = tensor_parallel.LOGIT_CHUNK_ELEMENTS
    tensor_parallel.LOGIT_CHUNK_ELEMENTS = chunk or before
    try:
        losses, greedy = head.losses(rows, targets)
        (losses * torch.arange(1.0, len(rows) + 1)).sum().backward()
    finally:
        tensor_parallel.LOGIT_CHUNK_ELEMENTS = before
    assert head.bias is not None and head.bias.grad is not None
    assert rows.grad is not None and head.table.grad is not None
    return [losses.detach(), greedy, rows.grad, head.table.grad, head.bias.grad]


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize(("vocab", "size"), VOCABULARIES)
def test_split_cross_entropy_is_torchs_forward_and_backward(vocab, size, chunk):
    rows, table, bias = noise(23, WIDTH, seed=2), noise(vocab, WIDTH, seed=3), noise(vocab, seed=4)
    targets = torch.arange(23) % vocab
    whole = [tensor.clone().requires_grad_() for tensor in (rows, table, bias)]
    logits = F.linear(*whole)
    expected = F.cross_entropy(logits, targets, reduction="none")
    (expected * torch.arange(1.0, 24)).sum().backward()

    per_rank = run_ranks(size, cross_entropy_on_a_rank, rows, targets, table, bias, chunk)

    for losses, greedy, gradient, _, _ in per_rank:
        torch.testing.assert_close(losses, expected.detach(), rtol=0, atol=1e-5)
        assert torch.equal(greedy, logits.argmax(-1) == targets)
        torch.testing.assert_close(gradient, whole[0].grad, rtol=0, atol=1e-3)
    for place, tensor in [(3, whole[1]), (4, whole[2])]:
        merged = torch.cat([answer[place] for answer in per_rank])
        torch.testing.assert_close(merged, tensor.grad, rtol=0, atol=1e-3)
