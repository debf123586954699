"""Sums through memory that ranks share: the same on every rank, whoever comes first."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import Tensor

from mlm_eval.model.tensor_parallel import TensorParallel, reduce_over_ranks
from mlm_eval.ranks import shared_memory
from mlm_eval.ranks.collectives import AllReduceCounter
from mlm_eval.ranks.groups import make_mesh
from mlm_eval.ranks.mesh import this_rank
from mlm_eval.ranks.shared_memory import BLOCK_BYTES, LEAST, share_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]


def drawn(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return numbers of very different sizes, so that the order of a sum shows."""
    noise = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=noise) * 10 ** torch.randint(
        0, 5, (size,), generator=noise
    )
    return values.to(dtype)


def sums_of_many_sizes(ranks: int, block: int, seed: int) -> list[str]:
    """Sum tensors of many sizes and dtypes, each rank in its own time; return what was wrong."""
    before, shared_memory.BLOCK_BYTES = shared_memory.BLOCK_BYTES, block
    try:
        shared = share_memory(ranks)
        assert shared is not None
        tp = TensorParallel(this_rank(), ranks, dist.group.WORLD, shared)
        choose, pause = random.Random(seed), random.Random(this_rank())
        wrong = []
        for number in range(60):
            dtype = choose.choice(DTYPES)
            room = block // dtype.itemsize
            sizes = [1, 2, room - 1, room, room + 1, 2 * room, choose.randrange(1, 5 * room)]
            size = choose.choice(sizes)
            parts = [drawn(size, dtype, seed=number * ranks + rank) for rank in range(ranks)]
            expected = parts[0].clone()
            for part in parts[1:]:
                expected += part
            time.sleep(pause.choice([0, 0, 0.002]))
            total = reduce_over_ranks(parts[this_rank()].view(1, size), tp)
            if not torch.equal(total.view(-1), expected):
                wrong.append(f"{number}: {size} of {dtype}")
        return wrong
    finally:
        shared_memory.BLOCK_BYTES = before


@pytest.mark.parametrize("block", [16, 1 << 10])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_sum_is_that_of_the_ranks_in_order_on_all_of_them(ranks: int, block: int):
    assert run_ranks(ranks, sums_of_many_sizes, ranks, block, 1) == [[]] * ranks


def what_is_taken(least: int) -> list[bool]:
    before, shared_memory.LEAST = shared_memory.LEAST, least
    try:
        shared = make_mesh(2, 1).shared
        assert shared is not None
        values = torch.zeros(2, least // 4)
        taken = [values, values[0], values[0, 1:], values.t(), values.to("meta")]
        answers = [shared.takes(part) for part in taken]
        with AllReduceCounter():
            answers.append(shared.takes(values))
        return [*answers, shared.takes(values)]
    finally:
        shared_memory.LEAST = before


def test_what_is_taken_does_not_depend_on_the_rank():
    """Small tensors are a message; what is counted is an all-reduce, as on any other machine."""
    expected = [True, True, False, False, False, False, True]
    assert run_ranks(2, what_is_taken, LEAST) == [expected] * 2


def groups_of_two() -> list[float]:
    mesh = make_mesh(2, 2)
    assert mesh.shared is not None and len(mesh.shared.blocks) == 2
    values = torch.full((3000,), 10.0**mesh.rank)
    return reduce_over_ranks(values, mesh.tensor_parallel).unique().tolist()


def test_each_copy_of_the_model_has_memory_of_its_own():
    assert run_ranks(4, groups_of_two) == [[11.0], [11.0], [1100.0], [1100.0]]


def memories_open() -> int:
    """Return how many such files this process has open, those of its mappings included."""
    numbers = Path("/proc/self/fd").iterdir()
    return sum("memfd:mlm-eval" in os.readlink(n) for n in numbers if n.is_symlink())


def opened_by_sharing(what: str | None, where: int) -> int | None:
    """Share memory where a rank offers something else; return what stays open, None: all share."""
    offer = shared_memory._offer

    def other(files):
        given = offer(files)
        assert given is not None
        if what in ("no process", "no number"):
            changes = {"process": 1 << 30} if what == "no process" else {"number": 1 << 20}
        else:
            changes = {"machine": "another"} if what == "a machine" else {"proof": b"?" * 16}
        return None if what == "nothing" else dataclasses.replace(given, **changes)

    make_mesh(2, 1)  # lets go of what an earlier group had
    before = memories_open()
    if what is not None and this_rank() == where:
        shared_memory._offer = other
    try:
        shared = share_memory(2)
    finally:
        shared_memory._offer = offer
    left = memories_open() - before
    if shared is None:
        return left
    assert left == 2, "one for each mapping"
    del shared
    assert memories_open() == before
    return None


@pytest.mark.parametrize("what", ["nothing", "a machine", "no process", "no number", "no proof"])
@pytest.mark.parametrize("where", [0, 1])
def test_where_one_rank_cannot_share_none_does(what: str, where: int):
    assert run_ranks(2, opened_by_sharing, what, where) == [0, 0]


def test_the_memory_lives_as_long_as_it_is_used():
    assert run_ranks(2, opened_by_sharing, None, 0) == [None, None]


def lost_in_a_sum() -> None:
    mesh = make_mesh(2, 1)
    values = torch.ones(5000)
    reduce_over_ranks(values, mesh.tensor_parallel)
    if mesh.rank == 1:
        os._exit(3)
    reduce_over_ranks(values, mesh.tensor_parallel)


def test_a_rank_that_ends_is_noticed():
    with pytest.raises(RuntimeError, match="a rank has died"):
        run_ranks(2, lost_in_a_sum, seconds=60)


def test_the_constants_of_a_run():
    """A block holds whole values of every dtype; what is summed so is worth the wait."""
    assert BLOCK_BYTES % 8 == 0 and LEAST < BLOCK_BYTES
