"""The ranks of a run: started here, or found under torchrun or Slurm.

    mlm-eval CMD --tp 2                 torchrun ... mlm-eval CMD --tp 2
      parent: launch()                    srun ... mlm-eval CMD --tp 2
        rank 0: mlm-eval CMD --tp 2         rank 0, rank 1, ... on any number of nodes
        rank 1: mlm-eval CMD --tp 2

A rank finds out where it is (`detect_world`), prepares itself before torch is imported
(`prepare_worker`), joins the others (`init_process_group`) and leaves (`shutdown`). What goes wrong
in a rank goes through `reporting_errors` to the parent, which hands the first cause, once, to its
caller. torch is imported inside functions: a command that needs no second rank, and `--help`, do
not wait for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.ranks.causes import CauseWatch
from mlm_eval.ranks.faults import lost_peers, named_fault, speaks_of_lost_peers
from mlm_eval.ranks.signals import (
    PARENT,
    STOPPED,
    die_with_parent,
    end_by_signals,
    stopped_by,
)
from mlm_eval.ranks.world import LAUNCHED, RANKS, SOURCE, World, small_number

if TYPE_CHECKING:
    from torch.distributed import Store

    from mlm_eval.ranks.layout import RankDevice

LISTENER = "MLM_EVAL_LISTENER"  # of rank 0: the socket on which the others will call
ERROR_DIR = "MLM_EVAL_ERROR_DIR"  # where such a rank leaves the reason of its failure

POLL_SECONDS = 0.05
STOP_SECONDS = 3  # from SIGTERM to SIGKILL for the ranks that are left when one has failed
RENDEZVOUS_TIMEOUT = timedelta(minutes=15)  # all ranks must have started
RENDEZVOUS_SECONDS = "MLM_EVAL_RENDEZVOUS_SECONDS"  # another such time

RANKS_PER_CORE = 8
FEW_RANKS = 16  # on any machine

DONE_CODES = (0, 3)  # 3 is an answer (`verify` found a difference), not a failure
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
STOP_CODES = tuple(STOPPED + number for number in STOP_SIGNALS)


@dataclass(frozen=True)
class LaunchResult:
    """How the ranks ended: the exit code of the command, and what to tell the user, if anything."""

    exit_code: int
    message: str | None = None


# ---- a rank ------------------------------------------------------------------------------------


def prepare_worker() -> None:
    """Make this process a rank that ends with its job; call it before torch is imported."""
    end_by_signals()
    faulthandler.disable()  # the parent says which rank died of what; stacks of all would bury it
    if os.environ.get(LAUNCHED) == "1":
        die_with_parent(int(os.environ[PARENT]))
    # torch reads this once, while it is imported.
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads_per_rank(local_size)))


def _threads_per_rank(local_size: int) -> int:
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if os.environ.get(SOURCE) == "slurm" and (threads := small_number(per_task)):
        return threads
    return max(1, len(os.sched_getaffinity(0)) // local_size)  # honours taskset and cpusets


@contextlib.contextmanager
def reporting_errors(world: World | None) -> Iterator[None]:
    """Hand an exception of the body to the parent and end this rank at once.

    Exit code 2 for an InputError, 1 for anything else (with its traceback). Where no parent of ours
    is listening (one process, torchrun, Slurm) the exception goes on to the caller, who prints it.
    A rank must not leave its process group before it has reported: the others would see a lost
    connection first, and theirs would be taken for the cause.
    """
    try:
        yield
    except Exception as caught:
        error = named_fault(caught) or caught
        wrong_input = isinstance(error, InputError)
        kind, text = ("input", str(error)) if wrong_input else ("fault", traceback.format_exc())
        if world is None or not report_error(world.rank, kind, text):
            if _watch is not None and lost_peers(caught, 0) is None:
                first = str(error).strip().splitlines() or [type(error).__name__]
                _watch.leave(first[0] if wrong_input else f"{type(error).__name__}: {first[0]}")
            if error is caught:
                raise
            raise error from caught
        with contextlib.suppress(OSError):  # a closed pipe
            sys.stdout.flush()
            sys.stderr.flush()
        # Not sys.exit: torch's exit handlers may wait for ranks that wait for this one.
        os._exit(2 if wrong_input else 1)


def report_error(rank: int, kind: str, message: str) -> bool:
    """Leave why this rank fails where the parent looks; False where no parent of ours is looking.

    Args:
        rank: This rank.
        kind: "input" (the user can mend it) or "fault" (ours).
        message: One sentence, or a traceback.
    """
    assert kind in ("input", "fault"), kind
    folder = os.environ.get(ERROR_DIR)
    if not folder:
        return False
    # One clock for all processes of a machine: the parent can tell cause from consequence.
    report = {"time": time.monotonic_ns(), "rank": rank, "kind": kind, "message": message}
    unfinished = Path(folder, f"rank{rank}.part")
    try:
        unfinished.write_text(json.dumps(report), encoding="utf-8")
        unfinished.rename(Path(folder, f"rank{rank}.json"))
    except OSError:  # the disk is full, or the parent is gone
        return False
    return True


# ---- the process group -------------------------------------------------------------------------


_watch: CauseWatch | None = None
"""Of a rank that torchrun or Slurm has started, from when it has met the others."""


def cause_of_others(seconds: float = 5.0) -> str | None:
    """Return what another rank has said of its failure, waiting for it; None without a word."""
    return None if _watch is None else _watch.found(seconds)


def init_process_group(
    world: World, *, device: str, tell: Callable[[str], None] | None = None
) -> list[RankDevice]:
    """Join the other ranks, with gloo (`device` "cpu") or NCCL ("cuda"); return all ranks' GPUs.

    Selects this rank's GPU. A rank that does not turn up is an error after a quarter of an hour
    (MLM_EVAL_RENDEZVOUS_SECONDS: another time); in a collective the others wait for a slow rank for
    half an hour. With `tell`, which takes a sentence for the user, a rank without a parent of ours
    ends when another one has failed.
    """
    global _watch
    import torch
    import torch.distributed as dist

    from mlm_eval.ranks.mesh import COLLECTIVE_TIMEOUT

    if world.on_one_machine and "lo" in (name for _, name in socket.if_nameindex()):
        # By default gloo binds to what the host's name resolves to: in containers often nothing.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = _meet_launched(world) if os.environ.get(LAUNCHED) == "1" else _meet(world)
    if tell is not None and world.source != "self":
        _watch = CauseWatch(store, world, tell)
    devices: list[RankDevice] = []
    device_id = None
    if device == "cuda":
        from mlm_eval.ranks.layout import agree_on_gpus

        devices = agree_on_gpus(store, world)
        device_id = torch.device("cuda", devices[world.rank].index)
    dist.init_process_group(
        backend="nccl" if device == "cuda" else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device_id,
    )
    return devices


def _meet_launched(world: World) -> Store:
    """Return the store of ranks that `launch` has started; a fault here is another rank's end."""
    from torch.distributed import TCPStore

    listener = os.environ.pop(LISTENER, None)
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world.size,
        is_master=listener is not None,
        timeout=_rendezvous_timeout(),
        master_listen_fd=None if listener is None else int(listener),
    )


def _meet(world: World) -> Store:
    """Return the store that torchrun's agent or rank 0 serves.

    Raises:
        InputError: The others did not come.
    """
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.rendezvous import rendezvous

    patience = _rendezvous_timeout()
    try:
        # init_process_group would take its one timeout for this wait and for collectives.
        meeting = rendezvous("env://", world.rank, world.size, timeout=patience)
        store: Store = next(meeting)[0]
    except (DistStoreError, DistNetworkError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        seconds = patience.total_seconds()
        raise InputError(
            f"rank {world.rank} of {world.size} did not meet the others at {where} within "
            f"{seconds:.0f} s; start all {world.size} ranks, with a MASTER_ADDR and MASTER_PORT "
            f"that each of them can reach; if a rank of another job started this command, set "
            f"{RANKS}=self"
        ) from error
    return store


def _rendezvous_timeout() -> timedelta:
    text = os.environ.get(RENDEZVOUS_SECONDS, "")
    if not text:
        return RENDEZVOUS_TIMEOUT
    seconds = small_number(text) or 0
    if not 0 < seconds < 1 << 31:
        raise InputError(
            f"the environment has {RENDEZVOUS_SECONDS}={shown(text)}, expected seconds"
        )
    return timedelta(seconds=seconds)


def shutdown() -> None:
    """Leave the process group, after all ranks have come to this call; without a group, nothing.

    Only for a rank that has succeeded: a failing one would wait here for ranks that wait for it.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        from mlm_eval.ranks.collectives import barrier

        if _watch is not None:
            _watch.stop()
        barrier()  # a rank that closes its connections early breaks another's last collective
        dist.destroy_process_group()


# ---- the parent --------------------------------------------------------------------------------


def launch(
    argv: Sequence[str],
    *,
    ranks: int,
    device: str,
    threads: int | None = None,
    command: Sequence[str] | None = None,
) -> LaunchResult:
    """Run this command line again as `ranks` processes on this machine and wait for them.

    The ranks write straight to the terminal; nothing is printed here. When one fails, the others
    are stopped within seconds, whatever they are doing. For the main thread only (signals).

    Args:
        argv: The arguments of the command line.
        ranks: Processes to start.
        device: "cpu" or "cuda" (one GPU for each).
        threads: Of each rank on the CPU, where OMP_NUM_THREADS is not set; None: an equal share of
            the cores.
        command: What to run with `argv`; `python -m mlm_eval` by default.

    Returns:
        Exit code 0 or 3 as the ranks say, 2 for wrong input, 130 for Ctrl-C (128 + n for signal n),
        else 1; with the earliest cause as the message.
    """
    assert ranks > 0 and device in ("cpu", "cuda"), (ranks, device)
    # -P: a stray module in the current folder must not shadow one of ours or of the libraries.
    command = [*(command or (sys.executable, "-P", "-m", "mlm_eval")), *argv]
    try:
        if device == "cuda":
            _check_gpus(ranks)
        else:
            _check_cores(ranks)
        with (
            tempfile.TemporaryDirectory(prefix="mlm-eval-") as error_dir,
            _noting_signals() as noted,
        ):
            workers = _start(command, ranks, threads, error_dir=error_dir)
            codes, stopped = _wait(workers, until=noted)
            if noted and any(code < 0 for code in codes.values()):
                message = None if noted[0] == signal.SIGINT else f"stopped by {noted[0].name}"
                return LaunchResult(STOPPED + noted[0], message)
            return _outcome(Path(error_dir), codes, stopped=stopped)
    except KeyboardInterrupt:  # before any rank was started
        return LaunchResult(STOPPED + stopped_by())


def _check_gpus(ranks: int) -> None:
    import torch

    if ranks > torch.cuda.device_count():
        raise InputError(
            f"--tp x --dp is {ranks} ranks, one GPU each, but {torch.cuda.device_count()} GPU(s) "
            "are visible; lower --tp or --dp, or use --device cpu"
        )


def _check_cores(ranks: int) -> None:
    cores = len(os.sched_getaffinity(0))
    most = max(FEW_RANKS, RANKS_PER_CORE * cores)
    if ranks > most:
        raise InputError(
            f"--tp x --dp is {ranks} ranks on the CPU, too many for {cores} core(s), which take "
            f"{most} at the most; lower --tp or --dp, or start the ranks on several machines with "
            "torchrun"
        )


Workers = dict[int, "subprocess.Popen[bytes]"]
"""The processes, by rank."""


def _start(command: Sequence[str], ranks: int, threads: int | None, *, error_dir: str) -> Workers:
    """Start the ranks, each in its own session and process group.

    torch's launchers would do this too, and import torch first, for as long as a rank does; rank 0
    serves the store of the ranks for the same reason.
    """
    # Port 0: the system picks a free one, and it is taken from that moment on. Who calls before
    # rank 0 serves is kept waiting.
    with socket.create_server(("127.0.0.1", 0), backlog=ranks) as listener:
        shared = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            LAUNCHED: "1",
            PARENT: str(os.getpid()),
            ERROR_DIR: error_dir,
            "OMP_NUM_THREADS": os.environ.get(
                "OMP_NUM_THREADS", str(threads or _threads_per_rank(ranks))
            ),
            # C++ warnings about a lost connection come from every rank but the cause.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        }
        workers: Workers = {}
        try:
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                files = []
                if rank == 0:
                    files = [listener.fileno()]
                    own[LISTENER] = str(listener.fileno())
                workers[rank] = subprocess.Popen(
                    command, env=shared | own, pass_fds=files, start_new_session=True
                )
        except OSError:  # no more processes or memory
            _stop(workers, seconds=0)
            raise
    return workers


def _wait(workers: Workers, *, until: Sequence[signal.Signals]) -> tuple[dict[int, int], set[int]]:
    """Return the exit code of each rank, and the ranks that had to be stopped.

    Ranks are stopped when one fails, and when a signal turns up in `until`.
    """
    while True:
        codes = {rank: worker.poll() for rank, worker in workers.items()}
        running = {rank for rank, code in codes.items() if code is None}
        if not running or until or any(codes[r] not in DONE_CODES for r in codes.keys() - running):
            break
        time.sleep(POLL_SECONDS)
    begin = time.monotonic()
    ends = _stop(workers, seconds=STOP_SECONDS)
    if time.monotonic() - begin < STOP_SECONDS:  # too early for SIGKILL: who died of it was dying
        running = {rank for rank in running if ends[rank] == -signal.SIGTERM}
    return ends, running


def _stop(workers: Workers, *, seconds: float) -> dict[int, int]:
    """End the ranks that are running, with what they have started; return all exit codes."""
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, STOP_SECONDS)):
        deadline = time.monotonic() + patience
        running = [worker for worker in workers.values() if worker.poll() is None]
        for worker in running:
            os.killpg(worker.pid, number)
        for worker in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.0, deadline - time.monotonic()))
    # One that even SIGKILL does not end at once hangs in the kernel, and ends when that lets go.
    codes = {rank: worker.poll() for rank, worker in workers.items()}
    return {rank: -signal.SIGKILL if code is None else code for rank, code in codes.items()}


def _outcome(error_dir: Path, codes: dict[int, int], *, stopped: set[int]) -> LaunchResult:
    """Return what the ranks' reports and exit codes say, the cause before its consequences."""
    reports = [json.loads(p.read_text(encoding="utf-8")) for p in error_dir.glob("rank*.json")]
    reports.sort(key=lambda report: report["time"])
    for report in reports:
        if report["kind"] == "input":
            return LaunchResult(2, report["message"])
    stop = "; the other ranks were stopped" if len(codes) > 1 else ""
    faults = [f"rank {r['rank']} failed:\n{r['message']}" for r in reports]
    for rank in sorted(codes.keys() - stopped):
        code = codes[rank]
        if code < 0:
            hint = " (often: out of memory)" if -code == signal.SIGKILL else ""
            told = f"rank {rank} was killed by {signal.Signals(-code).name}{hint}{stop}"
            # After a kill from outside the others only report that they lost this rank; after a
            # crash the first of their reports may be the cause.
            own = [fault for fault in faults if not speaks_of_lost_peers(fault)]
            also = own[:1] if -code != signal.SIGKILL else []
            return LaunchResult(1, "\n".join([told, *also]))
    if faults:
        return LaunchResult(1, faults[0])
    for rank in sorted(codes.keys() - stopped):
        code = codes[rank]
        if code == 2:
            return LaunchResult(2)  # it has printed what is wrong with the options
        if code not in DONE_CODES:
            return LaunchResult(1, f"rank {rank} ended with exit code {code}{stop}")
    return LaunchResult(max(codes.values()))


@contextlib.contextmanager
def _noting_signals() -> Iterator[list[signal.Signals]]:
    """Note the signals that ask the job to stop, in place of acting on them, for the body only.

    An exception from a handler could hit between the start of a rank and the note of its number.
    Signals that are ignored stay so: `nohup mlm-eval ...` must survive its terminal.
    """
    noted: list[signal.Signals] = []
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, _: noted.append(signal.Signals(number)))
    try:
        yield noted
    finally:
        for number, old in before.items():
            signal.signal(number, old)
