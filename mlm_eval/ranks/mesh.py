"""How many ranks there are and who they are.

The tensor- and data-parallel sizes are chosen first (`layout.choose_layout`); the ranks that run
then make a `Mesh` of them (`groups.make_mesh`). rank = dp_rank * tp + tp_rank: the ranks that share
one copy of the model are neighbours, hence on one machine where tp divides its ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mlm_eval.model.tensor_parallel import Blocks, TensorParallel

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others in a collective: the slowest may still read its shard."""

PATIENCE = timedelta(days=30)
"""How long ranks wait for an object: rank 0 may tokenize gigabytes before it has one to send."""


def num_ranks() -> int:
    """Return how many ranks have joined this one's process group, itself included."""
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank() -> int:
    """Return this process's rank, 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Return whether this is rank 0, which prints and writes."""
    return this_rank() == 0


@dataclass(frozen=True)
class Mesh:
    """The layout of the running ranks: `dp` copies of the model, each on `tp` ranks."""

    tp: int = 1
    dp: int = 1
    rank: int = 0
    device_mesh: DeviceMesh | None = None
    """torch's view of it, with the dims ("dp", "tp"); None for one process."""
    dp_objects: dist.ProcessGroup | None = None
    """The ranks of `dp_group`, for what is no tensor on the device; None for one process."""
    shared: Blocks | None = None
    """Of the ranks of `tp_group`, on the CPU of one machine."""

    @property
    def tp_rank(self) -> int:
        """Place among the ranks that share one copy of the model."""
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        """Which copy of the model this rank works on."""
        return self.rank // self.tp

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this rank's copy of the model; None for one process."""
        return None if self.device_mesh is None else self.device_mesh.get_group("tp")

    @property
    def dp_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part of each copy; None for one process."""
        return None if self.device_mesh is None else self.device_mesh.get_group("dp")

    @property
    def dp_mesh(self) -> DeviceMesh:
        """The data-parallel dim of `device_mesh`, which must be there."""
        assert self.device_mesh is not None
        return self.device_mesh["dp"]

    @property
    def tp_first(self) -> DeviceMesh:
        """The same ranks and groups with the dims ("tp", "dp"): a shard of a shard is cut so.

        Makes no groups and sends nothing.
        """
        assert self.device_mesh is not None and self.tp_group and self.dp_group
        return DeviceMesh.from_group(
            [self.tp_group, self.dp_group],
            self.device_mesh.device_type,
            mesh=self.device_mesh.mesh.t(),
            mesh_dim_names=("tp", "dp"),
        )

    @property
    def tensor_parallel(self) -> TensorParallel:
        """What the parallel layers need to know."""
        return TensorParallel(self.tp_rank, self.tp, self.tp_group, self.shared)


class PerGroup(Generic[T]):
    """What the running ranks have made once, for groups take memory on the devices.

    Nothing is left of an earlier process group.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        """Make it with this function, where it is first asked for; by all ranks, if so it must."""
        self.make = make
        self.world: dist.ProcessGroup | None = None
        self.made: T | None = None

    def get(self) -> T:
        """Return what was made for the process group that there is."""
        if self.made is None or self.world is not dist.group.WORLD:
            self.made, self.world = None, dist.group.WORLD
            self.made = self.make()
        return self.made


def _new_object_group() -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)
    return group


_objects = PerGroup(_new_object_group)


def object_group() -> dist.ProcessGroup:
    """Return the group in which all ranks send objects; the first call is for all ranks together.

    It is gloo's, whatever the devices are: NCCL would copy pickles to the GPUs. Its ranks wait for
    `PATIENCE`, so one of them may do long work; one that ends is noticed at once.
    """
    return _objects.get()


def default_device() -> str:
    """Return where a model runs for whom no device is named: a GPU, unless the ranks use gloo."""
    if not torch.cuda.is_available():
        return "cpu"
    if dist.is_available() and dist.is_initialized() and "nccl" not in dist.get_backend():
        return "cpu"
    return f"cuda:{torch.cuda.current_device()}"
