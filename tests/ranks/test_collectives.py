"""Groups are made once, with the timeouts that they should have; objects go over the CPU."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout, _world
from torch.distributed.fsdp import fully_shard

from mlm_eval.ranks.collectives import from_main, gather_over_dp, on_main
from mlm_eval.ranks.groups import make_mesh
from mlm_eval.ranks.mesh import COLLECTIVE_TIMEOUT, PATIENCE, Mesh, object_group


def timeout_of(group: dist.ProcessGroup | None) -> timedelta:
    assert group is not None
    return group._get_backend(torch.device("cpu")).options._timeout  # type: ignore[attr-defined]


def timeouts(tp: int, dp: int) -> dict[str, timedelta]:
    mesh = make_mesh(tp, dp)
    return {
        "tp": timeout_of(mesh.tp_group),
        "dp": timeout_of(mesh.dp_group),
        "dp objects": timeout_of(mesh.dp_objects),
        "objects": timeout_of(object_group()),
    }


@pytest.mark.process
@pytest.mark.parametrize(("tp", "dp"), [(2, 2), (4, 1), (1, 4)])
def test_all_groups_wait_as_long_as_they_should(tp: int, dp: int):
    """NCCL's own default, 10 minutes, would hit a rank whose peer still reads its shard."""
    expected = {"tp": COLLECTIVE_TIMEOUT, "dp": COLLECTIVE_TIMEOUT}
    expected |= {"dp objects": PATIENCE, "objects": PATIENCE}
    assert run_ranks(4, timeouts, tp, dp) == [expected] * 4


def meshes_in_turn() -> tuple[list[int], bool, list[float]]:
    """Ask for two layouts again and again, and shard a layer over the second one."""
    counts, meshes = [], []
    for _ in range(3):
        meshes.append((make_mesh(2, 2), make_mesh(1, 4)))
        object_group()
        counts.append(len(_world.pg_map))
    same = all(first is a and second is b for first, second in meshes for a, b in meshes)
    layer = nn.Linear(4, 4, bias=False)
    nn.init.ones_(layer.weight)
    fully_shard(layer, mesh=meshes[-1][1].dp_mesh)
    layer(torch.full((1, 4), float(dist.get_rank()))).sum().backward()
    gradient: Any = layer.weight.grad
    return counts, same, gradient.full_tensor()[0].tolist()


@pytest.mark.process
def test_a_mesh_is_made_once_and_a_second_one_works_beside_it():
    """Each new group is a communicator with memory on the device; a run with seeds asks often."""
    for counts, same, gradient in run_ranks(4, meshes_in_turn):
        assert same and counts[0] == counts[1] == counts[2]
        assert gradient == [1.5] * 4  # the mean of the ranks' inputs


def busy_main(tp: int, dp: int) -> tuple[str, list[int]]:
    """Return what rank 0 computes while the others wait for longer than a collective may last."""
    mesh = make_mesh(tp, dp)
    groups: list[Any] = [dist.group.WORLD, mesh.tp_group, mesh.dp_group]
    before = [timeout_of(group) for group in groups]
    for group in groups:
        _set_pg_timeout(timedelta(seconds=1), group)
    try:
        found = on_main(lambda: time.sleep(3) or "tokens")
        if dist.get_rank() == 0:
            time.sleep(3)
        return from_main(found), gather_over_dp(mesh.dp_rank, mesh)
    finally:
        for group, timeout in zip(groups, before, strict=True):
            _set_pg_timeout(timeout, group)


@pytest.mark.process
@pytest.mark.long
def test_ranks_wait_for_long_work_of_one_of_them():
    """Half an hour of tokenizing, or of writing files, ended a run on several ranks."""
    assert run_ranks(2, busy_main, 1, 2) == [("tokens", [0, 1])] * 2


def test_one_process_needs_no_group():
    assert from_main(3) == 3 and on_main(lambda: 4) == 4
    assert gather_over_dp(5, Mesh()) == [5]
