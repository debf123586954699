"""What the ranks of test_launch.py run: `python launch_targets.py [--ranks N] TARGET ARGUMENTS`.

With `--ranks` the process is the parent of N ranks, as the command line is; without it is a rank.
"""

import ctypes
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import atomic_file, output_folder
from mlm_eval.ranks import launch
from mlm_eval.ranks.world import World, detect_world


def hang() -> None:
    """Wait in a C call, and again where a handled signal has ended it."""
    while True:
        ctypes.CDLL(None).pause()


def all_reduce(folder: Path, world: World, *sizes: str) -> None:
    """Sum 10**rank over all ranks and over each group of a dp x tp mesh."""
    tp, dp = (int(size) for size in sizes)
    launch.init_process_group(world, device="cpu")
    import torch
    import torch.distributed as dist

    from mlm_eval.ranks.groups import make_mesh

    mesh = make_mesh(tp, dp)
    sums = {}
    for name, group in [("all", None), ("tp", mesh.tp_group), ("dp", mesh.dp_group)]:
        value = torch.tensor(10**world.rank)
        dist.all_reduce(value, group=group)
        sums[name] = int(value)
    launch.shutdown()
    leave(folder, world, sums=sums, omp=os.environ["OMP_NUM_THREADS"])


def wrong_input(folder: Path, world: World, where: str) -> None:
    """Fail in rank 1 before the ranks meet, or while the others wait for it in a collective."""
    if where == "everywhere":
        raise InputError("wrong.pt holds no model")
    if where == "before":
        if world.rank == 1:
            raise InputError("rank 1 found wrong.pt")
        launch.init_process_group(world, device="cpu")
    join_and_wait(folder, world, absent=1)
    time.sleep(0.5)  # the others are well inside the collective
    raise InputError("rank 1 found wrong.pt")


def gone_before_the_meeting(folder: Path, world: World, victim: str, when: str) -> None:
    """Be killed in one rank before the others have met it, or as soon as the other calls it."""
    if world.rank == int(victim):
        while when == "called" and not (folder / f"rank{1 - world.rank}.json").exists():
            time.sleep(0.01)
        time.sleep(2 if when == "called" else 0)  # the other imports torch first
        os.kill(os.getpid(), signal.SIGKILL)
    leave(folder, world)
    launch.init_process_group(world, device="cpu")


def fault(folder: Path, world: World) -> None:
    """Fail with an exception that is not the user's in rank 1."""
    join_and_wait(folder, world, absent=1)
    raise KeyError("decoder.layers.0")


def wait_for_test(folder: Path, world: World) -> None:
    """Hang: rank 1 in a C call, the others in a collective that it never joins."""
    join_and_wait(folder, world, absent=1)
    hang()


def writing(folder: Path, world: World) -> None:
    """Hang as `wait_for_test` while a file and a folder are being written; rank 1 has a child."""
    place = folder / "results" / str(world.rank)
    with atomic_file(place / "file") as file, output_folder(place / "folder") as parts:
        file.write_text("half of it")
        (parts / "part").write_text("half of it")
        if world.rank == 1:
            ready, told = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(told, b"1")
                hang()
            os.read(ready, 1)
            os.kill(child, signal.SIGTERM)
            assert os.waitpid(child, 0)[1] == signal.SIGTERM
        wait_for_test(folder, world)


def watched(folder: Path, world: World, failing: str) -> None:
    """Fail in one rank while the other is in a call that never ends, as NCCL's would."""
    from mlm_eval.ranks import causes

    causes.LOOK_SECONDS, causes.GRACE_SECONDS = 0.1, 0.2
    launch.init_process_group(
        world, device="cpu", tell=lambda text: print(text, file=sys.stderr, flush=True)
    )
    leave(folder, world)
    if world.rank != int(failing):
        hang()
    time.sleep(0.5)
    raise InputError("wrong.pt holds no model")


def deaf(folder: Path, world: World) -> None:
    """Hang in rank 0 with SIGTERM blocked; end rank 1 with exit code 5."""
    if world.rank == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        leave(folder, world)
        hang()
    while not (folder / "rank0.json").exists():
        time.sleep(0.01)
    os._exit(5)


def verdict(folder: Path, world: World) -> None:
    """Answer 3 in rank 1 at once, and let rank 0 finish its work after that."""
    if world.rank == 0:
        time.sleep(1)
        leave(folder, world)
    sys.exit(3)


def alone(folder: Path, world: World) -> None:
    """Wait for ranks that never come."""
    launch.RENDEZVOUS_TIMEOUT = timedelta(seconds=1)
    launch.init_process_group(world, device="cpu")


def join_and_wait(folder: Path, world: World, absent: int) -> None:
    """Join the group, say so, and enter a collective that rank `absent` does not enter."""
    launch.init_process_group(world, device="cpu")
    import torch
    import torch.distributed as dist

    leave(folder, world)
    if world.rank != absent:
        dist.all_reduce(torch.ones(1))


def leave(folder: Path, world: World, **facts: object) -> None:
    """Write this rank's facts for the test, all at once."""
    facts |= {"pid": os.getpid(), "rank": world.rank, "size": world.size, "source": world.source}
    facts |= {"local_rank": world.local_rank, "local_size": world.local_size}
    unfinished = folder / f"rank{world.rank}.part"
    unfinished.write_text(json.dumps(facts))
    unfinished.rename(folder / f"rank{world.rank}.json")


def main() -> int:
    if sys.argv[1] == "--ranks":
        ranks, argv = int(sys.argv[2]), sys.argv[3:]
        command = [sys.executable, "-P", __file__]
        result = launch.launch(argv, ranks=ranks, device="cpu", command=command)
        if result.message is not None:
            print(result.message, file=sys.stderr)
        return result.exit_code
    world = detect_world()
    assert world is not None
    launch.prepare_worker()
    target, folder, *arguments = sys.argv[1:]
    with launch.reporting_errors(world):
        globals()[target](Path(folder), world, *arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
