"""Makes the mesh of the running ranks: its process groups, and the memory that they share."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mlm_eval.ranks.layout import fill_ranks
from mlm_eval.ranks.mesh import (
    COLLECTIVE_TIMEOUT,
    PATIENCE,
    Mesh,
    PerGroup,
    num_ranks,
    this_rank,
)
from mlm_eval.ranks.shared_memory import share_memory

try:
    from torch.distributed import set_timeout  # type: ignore[attr-defined]  # since torch 2.14
except ImportError:
    from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

_meshes: PerGroup[dict[tuple[int, int], Mesh]] = PerGroup(dict)


def make_mesh(tp: int | None, dp: int | None) -> Mesh:
    """Return the mesh of the running ranks; every rank must call it, for groups are made once.

    Args:
        tp: Tensor-parallel size; None: all ranks that `dp` leaves.
        dp: Data-parallel size; None: all ranks that `tp` leaves.

    Raises:
        InputError: tp x dp is not the number of running ranks.
    """
    running = num_ranks()
    tp, dp = fill_ranks(running, tp=running if tp is None and dp is None else tp, dp=dp)
    if running == 1:
        return Mesh()
    meshes = _meshes.get()
    if (tp, dp) not in meshes:
        meshes[tp, dp] = _new_mesh(tp, dp)
    return meshes[tp, dp]


def _new_mesh(tp: int, dp: int) -> Mesh:
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    device_mesh = init_device_mesh(kind, (dp, tp), mesh_dim_names=("dp", "tp"))
    for group in device_mesh.get_all_groups():  # they come with their backend's own: NCCL's 10 min
        set_timeout(COLLECTIVE_TIMEOUT, group)
    mine = None
    for first in range(tp):  # every rank makes all groups
        group = dist.new_group(range(first, tp * dp, tp), backend="gloo", timeout=PATIENCE)
        mine = group if first == this_rank() % tp else mine
    shared = share_memory(tp) if kind == "cpu" and tp > 1 else None
    return Mesh(tp, dp, this_rank(), device_mesh, mine, shared)
