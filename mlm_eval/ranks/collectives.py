"""What the ranks say to each other outside the model: sums, gathers, broadcasts and barriers.

No other file but `model/tensor_parallel.py` calls a collective of torch.distributed. In one process
each function returns what it is given. Sums work in place, on tensors on the device that the
process group was made for.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.ranks.faults import DISK_FAULTS, named_fault
from mlm_eval.ranks.mesh import Mesh, is_main, num_ranks, object_group

T = TypeVar("T")

AllReduceCounts = Counter[tuple[int, torch.dtype]]
"""How many all-reduces there were of each (number of values, dtype)."""


def barrier() -> None:
    """Wait until every rank has come to this call."""
    if num_ranks() > 1:
        dist.barrier()


def sum_over_dp(values: Tensor, mesh: Mesh) -> Tensor:
    """Sum a tensor over the copies of the model, in place; return it. One all-reduce over dp."""
    if mesh.dp > 1:
        dist.all_reduce(values, group=mesh.dp_group)
    return values


def sum_over_tp(values: Tensor, mesh: Mesh) -> Tensor:
    """Sum a tensor over the ranks of one copy, in place; return it. One all-reduce over tp."""
    if mesh.tp > 1:
        dist.all_reduce(values, group=mesh.tp_group)
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; return it. One all-reduce."""
    if num_ranks() > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(values: Tensor) -> Tensor:
    """Replace each value by the largest of all ranks, in place; return it. One all-reduce."""
    if num_ranks() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather_over_dp(value: T, mesh: Mesh) -> list[T]:
    """Return the values of all copies of the model, in order of dp_rank, on every rank.

    One gather of pickled objects over dp, on the CPU. Tensors must be there too.
    """
    gathered: list[Any] = [value] * mesh.dp
    if mesh.dp > 1:
        dist.all_gather_object(gathered, value, group=mesh.dp_objects)
    return gathered


def gather_over_ranks(value: T) -> list[T]:
    """Return the values of all ranks, in their order, on every rank.

    One gather of pickled objects, on the CPU.
    """
    gathered: list[Any] = [value] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(gathered, value, group=object_group())
    return gathered


def whole_over_dp(sharded: Tensor, mesh: Mesh) -> Tensor:
    """Return whole, on every rank, a DTensor whose rows FSDP2 has cut over dp. One all-gather.

    torch's own `full_tensor` finds groups by names, which it keeps beyond the groups' end.
    """
    part, total = local(sharded), sharded.shape[0]
    rows = -(-total // mesh.dp)  # as torch.chunk cuts; the last ranks may have fewer
    padded = part.new_zeros(rows, *part.shape[1:])
    padded[: len(part)] = part
    gathered = padded.new_empty(rows * mesh.dp, *part.shape[1:])
    dist.all_gather_into_tensor(gathered, padded, group=mesh.dp_group)
    return gathered[:total]


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor that may be a DTensor."""
    part: Any = tensor.detach()
    return part.to_local() if hasattr(part, "to_local") else part  # type: ignore[no-any-return]


def from_main(value: T) -> T:
    """Return rank 0's value on every rank, however long rank 0 takes to come here.

    One broadcast of a pickled object, on the CPU. The value is ignored on the other ranks.
    """
    box = [value]
    if num_ranks() > 1:
        dist.broadcast_object_list(box, src=0, group=object_group())
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """Return on every rank what `function` returns on rank 0, where alone it runs. One broadcast.

    The function may take hours (`from_main`), if it holds no collectives.

    Raises:
        InputError: On every rank, because all must leave: rank 0's own, or its disk is full or
            read-only.
    """
    outcome: tuple[Any, InputError | None] = None, None
    if is_main():
        try:
            outcome = function(), None
        except InputError as error:
            outcome = None, error
        except OSError as error:
            if error.errno not in (*DISK_FAULTS, errno.EACCES, errno.ENOENT, errno.ENOTDIR):
                raise
            fault = f"the output folder cannot be written ({error}); make room or choose another"
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                fault = f"a file or folder of the run is gone ({error}); leave them while it runs"
            outcome = None, InputError(fault)
    result, failure = from_main(outcome)
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def on_every(function: Callable[[], T]) -> T:
    """Return what `function` returns on this rank, once it has succeeded on all. One gather.

    The function holds no collectives.

    Raises:
        InputError: On every rank: that of the first rank which has one. A file that is gone or
            cannot be read, and lack of memory, are such.
    """
    results: list[T] = []
    fault: InputError | None = None
    try:
        results.append(function())
    except InputError as error:
        fault = error
    except OSError as error:
        where = f"{error.filename} " if error.filename else "a file "
        fault = named_fault(error) or InputError(
            f"{where}cannot be read ({error.strerror or error})"
        )
    except Exception as error:
        fault = named_fault(error)
        if fault is None:
            raise
    first = next((found for found in gather_over_ranks(fault) if found is not None), None)
    if first is not None:
        raise first
    return results[0]


class AllReduceCounter(TorchDispatchMode):
    """Counts the all-reduces of its `with` block, whoever calls them.

    `counts` tells how many there were of each (number of values, dtype). Sums that would go through
    shared memory are all-reduces here.
    """

    is_counting: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.counts: AllReduceCounts = Counter()

    def __enter__(self) -> Self:
        AllReduceCounter.is_counting = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        AllReduceCounter.is_counting = False
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.c10d.allreduce_.default:
            self.counts.update((tensor.numel(), tensor.dtype) for tensor in args[0])
        return func(*args, **(kwargs or {}))
