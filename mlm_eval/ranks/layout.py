"""Which layout a run gets, and which GPU each rank: from what it needs and what is free.

The process that starts ranks and waits for them opens no device: its context would take memory on
each GPU for the whole run, and where a GPU admits one process only, no rank could start. A child
process looks and ends.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.parameters import allowed_tp, check_tp

if TYPE_CHECKING:
    from torch.distributed import Store

    from mlm_eval.model.costs.memory import Memory
    from mlm_eval.ranks.world import World

Need = Callable[[int, int], "Memory"]
"""Returns what the fullest rank needs, given the sizes tp and dp."""

LOOK = (
    "import json, torch\n"
    "count = torch.cuda.device_count()\n"
    "print(json.dumps([torch.cuda.mem_get_info(index)[0] for index in range(count)]))\n"
)
"""What the child process runs."""


# ---- the layout ------------------------------------------------------------------------------


def pick_device(device: str) -> str:
    """Return `cpu` or `cuda` for `--device`; torch is imported only if it could see a GPU.

    Raises:
        InputError: CUDA is asked for and not there, or the name is unknown.
    """
    if device == "cpu":
        return "cpu"
    if device not in ("auto", "cuda"):
        raise InputError(f"--device {device!r} is unknown; use auto, cpu or cuda")
    only_cpu = importlib.metadata.version("torch").endswith("+cpu")
    if "torch" in sys.modules or not only_cpu:
        import torch

        if torch.cuda.is_available():
            return "cuda"
    if device == "cuda":
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
    return "cpu"


def fill_ranks(running: int, *, tp: int | None, dp: int | None) -> tuple[int, int]:
    """Return (tp, dp) whose product is the number of running ranks.

    Args:
        running: Ranks.
        tp: Tensor-parallel size; None: what `dp` leaves, or 1.
        dp: Data-parallel size; None: what `tp` leaves.

    Raises:
        InputError: The product is another.
    """
    if tp is None:
        tp = max(running // dp, 1) if dp else 1
    if dp is None:
        dp = max(running // max(tp, 1), 1)
    if tp < 1 or tp * dp != running:
        raise InputError(
            f"tp {tp} x dp {dp} needs {tp * dp} ranks, {running} are running; give sizes whose "
            f"product is {running}, or start that many processes with mlm-eval, torchrun or srun"
        )
    return tp, dp


def choose_layout(
    config: ModelConfig,
    *,
    tp: int | None,
    dp: int | None,
    device: str,
    need: Need,
    running: int | None = None,
    free: Callable[[], Sequence[int]] | None = None,
    machines: Sequence[str] = (),
    trains: bool = False,
) -> tuple[int, int]:
    """Return (tp, dp).

    On the CPU auto means 1 and 1, or whatever fills the running ranks. On CUDA it is the smallest
    tp at which a rank fits the free memory of each device that is used, and the other devices as
    dp. Of ranks that run already, copies of the model that stay on one machine come first.

    Args:
        config: The model.
        tp: Asked tensor-parallel size, None for auto.
        dp: Asked data-parallel size, None for auto.
        device: `cpu` or `cuda`.
        need: What a rank needs.
        running: Ranks that torchrun or Slurm has started; None when this command starts its own.
        free: Returns the free bytes of each visible GPU, or of each running rank's own.
        machines: Where each running rank is.
        trains: The sizes must divide the query groups too.

    Raises:
        InputError: The sizes do not divide the model, or no size fits.
    """
    if tp is not None:
        check_tp(config, tp)
    if running is not None and (tp or dp or device == "cpu"):
        return fill_ranks(running, tp=tp, dp=dp)
    if device == "cpu":
        return tp or 1, dp or 1
    if tp is not None:
        import torch

        return tp, dp or max(torch.cuda.device_count() // tp, 1)
    free_bytes = (free or free_on_gpus)()
    count = running or len(free_bytes)
    sizes = [n for n in allowed_tp(config) if not trains or config.num_query_groups % n == 0]
    if running is not None:
        layouts = [(n, running // n) for n in sizes if running % n == 0]
        layouts.sort(key=lambda layout: crosses_machines(machines, layout[0]))
    else:
        layouts = [(n, dp or count // n) for n in sizes if n * (dp or 1) <= count]
    return _smallest_fitting(layouts or [(1, dp or 1)], need, free_bytes, trains=trains)


def _smallest_fitting(
    layouts: Sequence[tuple[int, int]], need: Need, free: Sequence[int], *, trains: bool
) -> tuple[int, int]:
    from mlm_eval.model.costs.memory import OUTSIDE

    needs = [need(*layout) for layout in layouts]
    for (tp, dp), memory in zip(layouts, needs, strict=True):
        if tp * dp <= len(free) and memory.total + OUTSIDE <= min(free[: tp * dp]):
            return tp, dp
    best = min(range(len(layouts)), key=lambda index: needs[index].total)
    (tp, dp), memory = layouts[best], needs[best]
    less = "lower --batch-tokens, or use --dtype bfloat16, more devices or --device cpu"
    if trains:
        less = "lower --micro-batch, or use --recompute, --dp-mode fsdp2 or more devices"
    raise InputError(
        f"the run does not fit: at tp {tp} x dp {dp} each rank needs "
        f"{(memory.total + OUTSIDE) / 1e9:.1f} GB, {memory.weights / 1e9:.1f} GB of them weights, "
        f"and {fullest(free[: tp * dp])}; {less}"
    )


def fullest(free: Sequence[int]) -> str:
    """Return which of some GPUs has least memory free, as the end of a sentence."""
    if not free:
        return "there is no GPU"
    index = min(range(len(free)), key=free.__getitem__)
    return f"GPU {index} of {len(free)} has least free, {free[index] / 1e9:.1f} GB"


def crosses_machines(machines: Sequence[str], tp: int) -> bool:
    """Return whether the ranks of one copy of the model stand on several machines.

    Args:
        machines: Of each rank.
        tp: Tensor-parallel size; neighbours share a copy.
    """
    return any(len(set(machines[i : i + tp])) > 1 for i in range(0, len(machines), tp))


@functools.cache
def free_on_gpus() -> tuple[int, ...]:
    """Return the free bytes of each visible GPU, as a child process sees them, once.

    Raises:
        InputError: They cannot be had.
    """
    command = [sys.executable, "-P", "-c", LOOK]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(
            f"the free memory of the GPUs cannot be read ({cause}); give --tp and --dp, or use "
            "--device cpu"
        )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


# ---- running ranks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class RankDevice:
    """A running rank's GPU, as all ranks know it."""

    machine: str
    index: int
    """Among those that the rank can see."""
    uuid: str
    free: int
    """Bytes, before the run takes any."""


def share(store: Store, world: World, name: str, fact: Any) -> list[Any]:
    """Return what each rank says under a name, in rank order; a JSON value each."""
    store.set(f"mlm-eval/{name}/{world.rank}", json.dumps(fact))
    return [json.loads(store.get(f"mlm-eval/{name}/{rank}")) for rank in range(world.size)]


def agree_on_gpus(store: Store, world: World) -> list[RankDevice]:
    """Choose this rank's GPU, select it, and return the GPUs of all ranks.

    Raises:
        InputError: A machine has more ranks than GPUs, or two ranks would share one.
    """
    import torch

    visible = [gpu_uuid(index) for index in range(torch.cuda.device_count())]
    views = share(store, world, "visible", {"machine": machine_name(), "gpus": visible})
    index = gpu_index(views, world.rank)
    torch.cuda.set_device(index)
    own = RankDevice(machine_name(), index, visible[index], torch.cuda.mem_get_info(index)[0])
    devices = [RankDevice(**fact) for fact in share(store, world, "device", asdict(own))]
    check_distinct(devices)
    return devices


def gpu_index(views: Sequence[Mapping[str, Any]], rank: int) -> int:
    """Return the index of a rank's GPU among those that it sees.

    Launchers show a rank all GPUs of its machine, its own only, or a few that are near to it: a
    rank takes that of its place among those of its machine that see the same.

    Args:
        views: For each rank its `machine` and the UUIDs `gpus` that it sees.
        rank: Which.

    Raises:
        InputError: More ranks see the same GPUs than there are, or it sees none.
    """
    mine = views[rank]
    same = [number for number, view in enumerate(views) if view == mine]
    count = len(mine["gpus"])
    if len(same) > count:
        raise InputError(
            f"{len(same)} ranks on one machine (rank {same[0]} is the first) see {count} GPU(s) "
            "between them; start one rank for each GPU (srun --gpus-per-task=1, torchrun "
            "--nproc-per-node=GPUS), or use --device cpu"
        )
    return same.index(rank)


def check_distinct(devices: Sequence[RankDevice]) -> None:
    """Refuse ranks that share a GPU, which NCCL would call a duplicate.

    Raises:
        InputError: Two do.
    """
    owner: dict[tuple[str, str], int] = {}
    for rank, device in enumerate(devices):
        first = owner.setdefault((device.machine, device.uuid), rank)
        if first != rank:
            raise InputError(
                f"ranks {first} and {rank} have the same GPU ({device.uuid}); give each "
                "rank its own, or start fewer"
            )


def gpu_uuid(index: int) -> str:
    """Return the UUID of a visible GPU."""
    import torch

    return str(torch.cuda.get_device_properties(index).uuid)


def machine_name() -> str:
    """Return a name of this machine that its containers share and no other machine has."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # anew at each start of the machine
    return boot.read_text(encoding="ascii").strip() if boot.is_file() else socket.gethostname()
