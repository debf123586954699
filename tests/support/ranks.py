"""Runs functions on real ranks: processes over gloo, started once and kept for all tests.

Starting a process that imports torch takes seconds, a function on ranks that run already takes
milliseconds. No call waits for ever: a rank that dies, or that does not answer, ends the others,
and the next call starts new ones.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

COLLECTIVE_SECONDS = 240  # a busy machine may need a minute to import what one rank needs
GRACE_SECONDS = 5  # for the other ranks to answer too, once one of them has failed

TORCHRUN = ("--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
"""Arguments of torchrun: two ranks, and a port that no other torchrun of these tests has."""


def run_ranks(
    size: int, function: Callable[..., Any], *args: object, seconds: float = 480
) -> list[Any]:
    """Return what `function(*args)` returns on each of `size` ranks, in rank order.

    The ranks form the default process group, of exactly that size; one rank alone has none.
    `function` and `args` are pickled: a function of a module, not a closure.

    Raises:
        Exception: Whatever a rank raised first, with its traceback in a note.
        TimeoutError: A rank has not answered within `seconds`.
        RuntimeError: A rank has died.
    """
    return _POOL.run(size, pickle.dumps((function, args)), seconds)


class _Pool:
    """The running ranks."""

    def __init__(self) -> None:
        self.workers: list[tuple[BaseProcess, Connection]] = []
        self.group = 0  # number of the process group that the ranks are in
        self.members = 0
        self.stores: Path | None = None
        self.owner = os.getpid()

    def run(self, size: int, task: bytes, seconds: float) -> list[Any]:
        self._grow(size)
        if size != self.members:
            self.group, self.members = self.group + 1, size
        assert self.stores is not None
        order = pickle.dumps((self.group, size, str(self.stores / str(self.group)), task))
        deadline = time.monotonic() + seconds
        ranks = {connection: rank for rank, (_, connection) in enumerate(self.workers[:size])}
        answers: dict[int, Any] = {}
        failure: BaseException | None = None
        try:
            for connection in ranks:
                connection.send_bytes(order)
            while len(answers) < size:
                waiting = [c for c, rank in ranks.items() if rank not in answers]
                ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0))
                if not ready:
                    late = sorted(ranks[c] for c in waiting)
                    raise failure or TimeoutError(f"no answer of ranks {late} in {seconds} s")
                for connection in ready:
                    assert isinstance(connection, Connection)
                    done, value = pickle.loads(connection.recv_bytes())
                    answers[ranks[connection]] = value
                    if not done and failure is None:
                        failure = value
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        except BaseException as error:
            self.close()
            if isinstance(error, EOFError | OSError) and not isinstance(error, TimeoutError):
                # What another one has raised came of it: its connection broke.
                raise RuntimeError("a rank has died") from failure or error
            raise
        if failure is not None:
            self.members = 0  # all are idle again, but not at the same collective
            raise failure
        return [answers[rank] for rank in range(size)]

    def _grow(self, size: int) -> None:
        if self.stores is None:
            self.stores = Path(tempfile.mkdtemp(prefix="ranks-"))
        context = multiprocessing.get_context("spawn")
        for rank in range(len(self.workers), size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()  # so that its death ends our reading
            self.workers.append((process, ours))

    def close(self) -> None:
        """End all ranks; not from a fork, which ends as a process of its own."""
        if os.getpid() != self.owner:
            return
        for process, connection in self.workers:
            connection.close()
            process.kill()
        for process, _ in self.workers:
            process.join()
        self.workers, self.members = [], 0
        if self.stores is not None:
            shutil.rmtree(self.stores, ignore_errors=True)
            self.stores = None


_POOL = _Pool()
atexit.register(_POOL.close)


def _serve(rank: int, connection: Connection) -> None:
    """Run what comes through the pipe until it is closed."""
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    torch.set_num_threads(1)
    from support.house import other_kernels

    other_kernels.install_as_asked()
    # What tests sum is small: it goes through the memory that ranks share all the same, in pieces.
    from mlm_eval.ranks import shared_memory

    shared_memory.LEAST, shared_memory.BLOCK_BYTES = 1, 1 << 12
    group = None
    while True:
        try:
            wanted, size, store, task = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            if wanted != group:
                _join(rank, size, store)
                group = wanted
            function, args = pickle.loads(task)
            answer = pickle.dumps((True, function(*args)))
        except BaseException as error:
            answer = _failure(error, rank)
        connection.send_bytes(answer)


def _join(rank: int, size: int, store: str) -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    if size > 1:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )


def _failure(error: BaseException, rank: int) -> bytes:
    text = f"on rank {rank}:\n{traceback.format_exc()}"
    try:
        error.add_note(text)
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
    except Exception:  # not every exception survives pickling
        return pickle.dumps((False, RuntimeError(text)))
    return answer
