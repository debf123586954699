"""Where this process stands among the ranks of a run, whoever started them."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass

from mlm_eval.checkpoints.errors import InputError, shown

LAUNCHED = "MLM_EVAL_LAUNCHED"  # "1" in a rank that `launch` started
SOURCE = "MLM_EVAL_WORLD_SOURCE"  # set beside the variables that `detect_world` takes from Slurm
RANKS = "MLM_EVAL_RANKS"  # "self": this command starts its own ranks, whoever started it

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

OTHER_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun of Open MPI",
    "PMI_SIZE": "mpiexec (PMI)",
    "PMIX_SIZE": "prterun (PMIx)",
    "MV2_COMM_WORLD_SIZE": "mpirun_rsh of MVAPICH2",
    "MVP_COMM_WORLD_SIZE": "mpirun_rsh of MVAPICH",
}
"""Variables with the number of processes that MPI's launchers have started."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run."""

    rank: int
    size: int
    local_rank: int  # among the ranks on this machine
    local_size: int
    source: str  # "self", "torchrun" or "slurm": who started the ranks

    @property
    def is_main(self) -> bool:
        """True on rank 0, the one that prints and writes."""
        return self.rank == 0

    @property
    def on_one_machine(self) -> bool:
        """True where every rank runs on this machine."""
        return self.local_size == self.size


def detect_world() -> World | None:
    """Return this process's place among ranks that are already running, None where there are none.

    torchrun (and `launch`) set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Under
    `srun` the same variables are derived from Slurm's and set in `os.environ`, for torch and for
    libraries that look there. Kubernetes (PyTorchJob) sets all but LOCAL_RANK, for one process in
    each pod. With MLM_EVAL_RANKS=self all of them are ignored. Imports nothing heavy.

    Raises:
        InputError: The variables contradict each other, or only MPI's launcher set any.
    """
    launched = os.environ.get(LAUNCHED) == "1"
    if not launched and _own_ranks():
        return None
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    # Slurm comes second: `srun torchrun ...` has the variables of both.
    if not all(os.environ.get(name) for name in names) and not _adopt_slurm():
        _refuse_other_launchers()
        return None
    rank, size = _integer("RANK"), _integer("WORLD_SIZE")
    local_rank = _integer("LOCAL_RANK", 0)
    # Variables set by hand may lack this one: without a local master, assume only what is certain.
    local_master = os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1")
    alone = not os.environ.get("LOCAL_RANK")
    default = 1 if alone else size if local_master else local_rank + 1
    local_size = _integer("LOCAL_WORLD_SIZE", default)
    if rank >= size or local_rank >= local_size or local_size > size:
        raise InputError(
            f"the environment describes no rank: RANK={rank} of WORLD_SIZE={size}, "
            f"LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_size}; "
            "start the ranks with torchrun or srun, or unset these variables"
        )
    port = os.environ["MASTER_PORT"]
    if not 1 <= (small_number(port) or 0) <= 65535:
        raise InputError(
            f"the environment has MASTER_PORT={shown(port)}, expected a number from 1 to 65535; "
            "start the ranks with torchrun or srun, or set another port"
        )
    source = "self" if launched else os.environ.get(SOURCE, "torchrun")
    return World(rank, size, local_rank, local_size, source)


def _own_ranks() -> bool:
    """Return whether MLM_EVAL_RANKS tells us to ignore a launcher; then forget its variables."""
    asked = os.environ.get(RANKS, "")
    if asked not in ("", "auto", "self"):
        raise InputError(
            f"the environment has {RANKS}={shown(asked)}; use self (start ranks of our own, "
            "whoever started this command) or auto"
        )
    if asked != "self":
        return False
    for name in (*LAUNCHER_VARIABLES, "MASTER_ADDR", "MASTER_PORT", SOURCE):
        os.environ.pop(name, None)
    return True


def _refuse_other_launchers() -> None:
    """Refuse to run the whole job in each of many processes that know nothing of each other."""
    for name, launcher in OTHER_LAUNCHERS.items():
        size = os.environ.get(name, "")
        if (small_number(size) or 0) > 1:
            raise InputError(
                f"{launcher} has started {size} processes ({name}={size}), each of which would run "
                "the whole job and write the same files; set RANK, WORLD_SIZE, LOCAL_RANK, "
                "MASTER_ADDR and MASTER_PORT for each, use torchrun or srun, or start one process "
                f"with {RANKS}=self"
            )
    size = os.environ.get("WORLD_SIZE", "")
    if (small_number(size) or 0) > 1 and os.environ.get("RANK"):
        missing = [n for n in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
        raise InputError(
            f"the environment has WORLD_SIZE={size} and RANK, but no {' and no '.join(missing)}; "
            f"set them too, use torchrun or srun, or set {RANKS}=self to start ranks of our own"
        )


def _adopt_slurm() -> bool:
    """Set torchrun's variables from those of a Slurm step; False outside a step of several tasks.

    Only `srun` sets SLURM_STEP_NUM_TASKS to the number of processes it has started. A batch script
    has SLURM_PROCID=0 and SLURM_NTASKS=N as well, but is one process, as is an salloc shell.
    """
    size = _integer("SLURM_STEP_NUM_TASKS", 1)
    if size == 1 or not os.environ.get("SLURM_PROCID"):
        return False
    hosts = expand_nodelist(
        os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or ""
    )
    local_rank = _integer("SLURM_LOCALID")
    local_size = size
    if len(hosts) > 1:
        tasks = _tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        node = _integer("SLURM_NODEID", 0)
        local_size = tasks[node] if node < len(tasks) else local_rank + 1
    # Every rank must compute the same port. It stays below the ephemeral ports (from 32768), and
    # jobs with neighbouring numbers, or steps of one job, on one node keep out of each other's way.
    port = 20000 + (_integer("SLURM_JOB_ID") * 127 + _integer("SLURM_STEP_ID", 0)) % 12000
    # On one node the host's name is not needed, and in a container it often resolves to nothing.
    os.environ.setdefault("MASTER_ADDR", hosts[0] if len(hosts) > 1 else "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.update(
        RANK=str(_integer("SLURM_PROCID")),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(local_size),
    )
    os.environ[SOURCE] = "slurm"  # a second look must not take these variables for torchrun's
    return True


def expand_nodelist(nodelist: str) -> list[str]:
    """Return the hosts of a Slurm node list, in order: `n[08-10,2],m` gives n08 n09 n10 n2 m."""
    items = re.findall(r"(?:[^,\[\]\s]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+", nodelist)
    hosts: list[str] = []
    whole = ",".join(items) == nodelist
    for item in items:
        # "rack[1-2]n[1,3]" splits to "rack", "1-2", "n", "1,3", "": odd places are number lists.
        pieces = re.split(r"\[(.*?)\]", item)
        choices = [_numbers(p) if i % 2 else [p] for i, p in enumerate(pieces)]
        hosts += map("".join, itertools.islice(itertools.product(*choices), _MOST_NODES))
        whole = whole and all(choices)
        if not whole or len(hosts) >= _MOST_NODES:
            break
    if not hosts or not whole or len(hosts) >= _MOST_NODES:
        raise InputError(
            f"Slurm's node list is {shown(nodelist)}, expected hosts such as "
            "'node[01-04,07],login1'; set MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE and "
            "LOCAL_RANK for each process instead"
        )
    return hosts


def _numbers(ranges: str) -> list[str]:
    """Return the numbers of `08-10,2` as strings, keeping leading zeros."""
    numbers: list[str] = []
    for piece in ranges.split(","):
        first, _, last = piece.partition("-")
        begin, end = small_number(first), small_number(last or first)
        if begin is None or end is None or not 0 <= end - begin < _MOST_NODES - len(numbers):
            return []  # no list of hosts
        numbers += [f"{n:0{len(first)}d}" for n in range(begin, end + 1)]
    return numbers


def _tasks_per_node(counts: str) -> list[int]:
    """Return the task count of each node from Slurm's `2(x3),1`."""
    tasks: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        times = min(small_number(repeat or "1") or 0, _MOST_NODES - len(tasks))
        tasks += [small_number(count) or 0] * times
    return tasks


def _integer(name: str, default: int | None = None) -> int:
    """Return the number in a variable that a launcher sets; `default` where it is not set."""
    value = os.environ.get(name, "")
    if not value and default is not None:
        return default
    number = small_number(value)
    if number is None:
        raise InputError(
            f"the environment has {name}={shown(value)}, expected a number; "
            "start the ranks with torchrun or srun, or unset the variables of that launcher"
        )
    return number


def small_number(value: str) -> int | None:
    """Return the number that a variable holds, of at most 18 digits; None: it holds no such."""
    return int(value) if value.isdecimal() and len(value) < 19 else None


_MOST_NODES = 1 << 17
"""Of a job; the largest machines have a tenth of that."""
