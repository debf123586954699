"""Memory that the ranks of one machine share, for sums on the CPU.

gloo sends every value through sockets, also to a rank on the same machine. Here each rank copies
what is to be summed into a block of its own, which the others can read; when all have, each adds up
the blocks, in the order of the ranks, so that all find the same. They still wait for each other by
a message of gloo, which notices a rank that has ended.
Source: https://man7.org/linux/man-pages/man2/memfd_create.2.html
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_eval.ranks.collectives import AllReduceCounter, gather_over_ranks
from mlm_eval.ranks.layout import machine_name
from mlm_eval.ranks.mesh import this_rank

BLOCK_BYTES = 8 << 20
"""Bytes that are summed at a time. A rank has two such blocks: it fills one while another rank may
still read what it has put into the other."""

LEAST = 1 << 18
"""Bytes. Smaller tensors go by gloo: sending them takes no longer than the message does."""

_PROOF_BYTES = 16


class SharedMemory:
    """The blocks of the ranks that share a copy of the model, as one of them sees them.

    All of them fill their blocks and add them up in the same turns.
    """

    def __init__(self, rank: int, memories: Sequence[Tensor]) -> None:
        """Take the memory that the ranks have opened.

        Args:
            rank: This one's place among the ranks.
            memories: Of each rank, `[2 * BLOCK_BYTES]` bytes.
        """
        self.rank = rank
        self.blocks = [memory.view(2, BLOCK_BYTES) for memory in memories]
        self.turn = 0
        self.message = torch.zeros(1, device="cpu")
        """What ranks send when they have filled a block."""

    def takes(self, values: Tensor) -> bool:
        """Return whether a tensor is summed so, the same on all ranks."""
        return (
            values.device.type == "cpu"
            and values.nbytes >= LEAST
            and values.is_contiguous()
            and not torch.compiler.is_compiling()
            and not AllReduceCounter.is_counting
        )

    def pieces(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return a tensor in pieces, each of which fits a block."""
        pieces: tuple[Tensor, ...] = values.view(-1).split(BLOCK_BYTES // values.itemsize)
        return pieces

    def fill(self, piece: Tensor) -> None:
        """Copy this rank's values into its next block."""
        self.turn ^= 1
        self._block(self.rank, piece).copy_(piece)

    def add_up(self, piece: Tensor) -> None:
        """Replace a piece by the sum over the ranks, all of which have filled their blocks."""
        torch.add(self._block(0, piece), self._block(1, piece), out=piece)
        for rank in range(2, len(self.blocks)):
            piece.add_(self._block(rank, piece))

    def _block(self, rank: int, piece: Tensor) -> Tensor:
        return self.blocks[rank][self.turn, : piece.nbytes].view(piece.dtype)


def share_memory(tp: int) -> SharedMemory | None:
    """Return the memory of this rank and its neighbours, `tp` ranks in a row.

    Every running rank must call it. None on all of them where some stand on different machines, in
    containers that hide their processes from each other, or on a system that has no such memory.
    """
    first = this_rank() // tp * tp
    with contextlib.ExitStack() as files:
        offers = gather_over_ranks(_offer(files))
        memories = _open(offers[first : first + tp])
        # The others open this rank's by its number, which it closes when all have.
        agreed = gather_over_ranks(memories is not None)
    if memories is None or not all(agreed[first : first + tp]):
        return None
    return SharedMemory(this_rank() - first, memories)


@dataclass(frozen=True)
class _Offer:
    """Where the others find a rank's memory."""

    machine: str
    process: int
    number: int
    proof: bytes
    """What it begins with: the same numbers may mean something else to another container."""


def _offer(files: contextlib.ExitStack) -> _Offer | None:
    """Return new memory of this rank; None: there is none on this system."""
    try:
        number = os.memfd_create("mlm-eval")
        files.callback(os.close, number)
        os.truncate(number, 2 * BLOCK_BYTES)
        proof = secrets.token_bytes(_PROOF_BYTES)
        os.pwrite(number, proof, 0)
    except (AttributeError, OSError):
        return None
    return _Offer(machine_name(), os.getpid(), number, proof)


def _open(offers: Sequence[_Offer | None]) -> list[Tensor] | None:
    """Return the memories, `[2 * BLOCK_BYTES]` bytes each; None: one cannot be had."""
    memories = []
    for offer in offers:
        if offer is None or offer.machine != machine_name():
            return None
        try:
            with open(f"/proc/{offer.process}/fd/{offer.number}", "r+b", buffering=0) as file:
                memory = mmap.mmap(file.fileno(), 2 * BLOCK_BYTES)
        except (OSError, ValueError):  # no such process here, or something else
            return None
        if memory[:_PROOF_BYTES] != offer.proof:
            return None
        memories.append(torch.frombuffer(memory, dtype=torch.uint8))
    return memories
