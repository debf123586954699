"""The ranks that other tests run on: they answer in order, and no failure of one hangs the rest."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support import ranks

from mlm_eval.checkpoints.errors import InputError


@pytest.fixture(scope="module")
def pool() -> Iterator[ranks._Pool]:
    """Ranks of this module's own: those of the other tests stay up."""
    own = ranks._Pool()
    yield own
    own.close()


def add_up(x: torch.Tensor) -> tuple[int, torch.Tensor]:
    if not dist.is_initialized():
        return 0, x
    dist.all_reduce(x)
    return dist.get_rank(), x


def fail(text: str, where: int | None = None) -> None:
    if where in (None, dist.get_rank()):
        raise InputError(text)
    dist.all_reduce(torch.ones(1))


def die() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.all_reduce(torch.ones(1))


def wait(seconds: float) -> None:
    time.sleep(seconds)


def run(pool: ranks._Pool, size: int, function: object, *args: object, seconds: float = 60) -> list:
    return pool.run(size, ranks.pickle.dumps((function, args)), seconds)


def test_ranks(pool: ranks._Pool, monkeypatch: pytest.MonkeyPatch):
    """One story, because each start of new ranks takes seconds."""
    for size in (2, 1, 2):  # each rank knows a group of exactly the size asked for
        results = run(pool, size, add_up, torch.ones(2))
        assert [rank for rank, _ in results] == list(range(size))
        assert all(x.tolist() == [size, size] for _, x in results)
    started = [process.pid for process, _ in pool.workers]

    with pytest.raises(InputError, match="wrong everywhere") as caught:
        run(pool, 2, fail, "wrong everywhere")
    first = caught.value.__notes__[0]  # either rank may have been quicker
    assert "on rank 0" in first or "on rank 1" in first
    assert len(run(pool, 2, add_up, torch.ones(1))) == 2
    assert [process.pid for process, _ in pool.workers] == started, "all had answered"

    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.3)
    with pytest.raises(InputError, match="wrong on one") as caught:
        run(pool, 2, fail, "wrong on one", 1)
    assert "on rank 1" in caught.value.__notes__[0]
    assert not pool.workers, "the other one was waiting for it"

    with pytest.raises(RuntimeError, match="a rank has died"):
        run(pool, 2, die)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer of ranks"):
        run(pool, 1, wait, 1000, seconds=0.2)
    assert time.monotonic() - began < 30
    assert not pool.workers
