"""The ranks of a run: real processes on this machine, over gloo."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.paths import TESTS
from support.ranks import TORCHRUN

from mlm_eval import cli
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.ranks import launch
from mlm_eval.ranks.causes import CauseWatch
from mlm_eval.ranks.faults import DISK_FAULTS, check_surroundings, lost_peers, named_fault
from mlm_eval.ranks.groups import make_mesh
from mlm_eval.ranks.layout import fill_ranks
from mlm_eval.ranks.mesh import Mesh
from mlm_eval.ranks.world import OTHER_LAUNCHERS, SOURCE, World, detect_world, expand_nodelist

TARGETS = TESTS / "support" / "runs" / "launch_targets.py"
SECONDS = 15  # within which a job must end once something went wrong


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the variables of a launcher that runs the tests, and undo those that they set."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MLM_EVAL_", "TORCHELASTIC_", "GLOO_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    for name in ("MASTER_ADDR", "MASTER_PORT", SOURCE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `launch_targets.py` with arguments and more variables; killed when the test ends."""
    processes = []

    def run(
        *arguments: object, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(TARGETS), *map(str, arguments)],
            env={**os.environ, "PYTHONWARNINGS": "default", "TMPDIR": str(tmp_path), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()  # and not communicate: a rank that has survived holds the pipes open
        assert process.stdout and process.stderr
        process.stdout.close()
        process.stderr.close()
    for rank in tmp_path.glob("rank*.json"):
        pid = json.loads(rank.read_text())["pid"]
        if _runs(pid) and TARGETS.name in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code and what was printed, on both streams."""
    out, err = process.communicate(timeout=90)
    return process.returncode, out + err


def facts(folder: Path, ranks: int) -> list[dict]:
    """Return what each rank has left in `folder`, once all of them have."""
    files = [folder / f"rank{rank}.json" for rank in range(ranks)]
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.02)
    return [json.loads(file.read_text()) for file in files]


def survivors(pids: list[int]) -> list[int]:
    """Return the processes that still run after a moment's grace."""
    deadline = time.monotonic() + 5
    while pids and time.monotonic() < deadline:
        pids = [pid for pid in pids if _runs(pid)]
        time.sleep(0.02)
    return pids


def _runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # nobody may have collected it yet


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# ---- own ranks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "dp", "sums"),
    [
        (2, 1, {"tp": [11, 11], "dp": [1, 10]}),
        # Neighbours share a tensor-parallel group; rank = dp_rank * tp + tp_rank.
        (2, 2, {"tp": [11, 11, 1100, 1100], "dp": [101, 1010, 101, 1010]}),
    ],
)
def test_own_ranks_reduce_over_the_mesh(
    tp: int, dp: int, sums: dict, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = tp * dp
    if dp == 1:
        monkeypatch.delenv("OMP_NUM_THREADS")
        threads = max(1, len(os.sched_getaffinity(0)) // size)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own choice stays
        threads = 3
    code, printed = ended(start("--ranks", size, "all_reduce", tmp_path, tp, dp))
    # Not a word from torch: neither banners nor warnings.
    assert (code, printed) == (0, "")
    ranks = facts(tmp_path, size)
    assert [r["sums"]["all"] for r in ranks] == [int("1" * size)] * size
    assert {axis: [r["sums"][axis] for r in ranks] for axis in ("tp", "dp")} == sums
    assert {r["source"] for r in ranks} == {"self"}
    assert {r["omp"] for r in ranks} == {str(threads)}
    assert len({r["pid"] for r in ranks}) == size
    assert not list(tmp_path.glob("mlm-eval-*"))  # the folder of the reports is gone


@pytest.mark.parametrize("where", ["before", "inside", "everywhere"])
def test_wrong_input_in_a_rank_ends_the_job_with_one_sentence(
    where: str, start: Start, tmp_path: Path
) -> None:
    job = start("--ranks", 2, "wrong_input", tmp_path, where)
    if where == "inside":
        facts(tmp_path, 2)
    begin = time.monotonic()
    code, printed = ended(job)
    # The others would wait for half an hour; before the ranks have met, starting them counts too.
    assert time.monotonic() - begin < (SECONDS if where == "inside" else 3 * SECONDS)
    expected = "wrong.pt holds no model" if where == "everywhere" else "rank 1 found wrong.pt"
    assert (code, printed) == (2, expected + "\n")


def test_sizes_that_are_not_the_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    set_all(monkeypatch, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    launch.init_process_group(World(0, 1, 0, 1, "torchrun"), device="cpu")
    try:
        with pytest.raises(InputError, match="tp 3 x dp 2 needs 6 ranks, 1 are running"):
            make_mesh(3, 2)
        assert make_mesh(1, 1) == Mesh()
    finally:
        launch.shutdown()
    launch.shutdown()  # nothing to leave any more
    assert fill_ranks(6, tp=3, dp=2) == (3, 2)


def test_fault_in_a_rank_shows_its_traceback_and_no_other(start: Start, tmp_path: Path) -> None:
    code, printed = ended(start("--ranks", 2, "fault", tmp_path))
    assert code == 1
    assert printed.startswith("rank 1 failed:\nTraceback")
    assert "KeyError: 'decoder.layers.0'" in printed
    assert printed.count("Traceback") == 1  # rank 0 lost its connection: a consequence


@pytest.mark.parametrize("victim", [0, 1])  # 0 is inside a collective, 1 in a C call
def test_a_killed_rank_takes_the_others_down(victim: int, start: Start, tmp_path: Path) -> None:
    job = start("--ranks", 2, "wait_for_test", tmp_path)
    pids = [r["pid"] for r in facts(tmp_path, 2)]
    time.sleep(0.3)  # let rank 0 enter its collective
    os.kill(pids[victim], signal.SIGKILL)
    begin = time.monotonic()
    code, printed = ended(job)
    assert time.monotonic() - begin < SECONDS
    assert code == 1
    assert printed == (
        f"rank {victim} was killed by SIGKILL (often: out of memory); "
        "the other ranks were stopped\n"
    )
    assert survivors(pids) == []


@pytest.mark.parametrize("when", ["at once", "called"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_before_the_ranks_meet_is_the_cause(
    victim: int, when: str, start: Start, tmp_path: Path
) -> None:
    """Rank 0 serves the others: without it they cannot meet, which is a consequence."""
    code, printed = ended(start("--ranks", 2, "gone_before_the_meeting", tmp_path, victim, when))
    told = f"rank {victim} was killed by SIGKILL (often: out of memory); the other ranks were"
    assert (code, printed) == (1, f"{told} stopped\n")


def test_ranks_do_not_outlive_a_killed_parent(start: Start, tmp_path: Path) -> None:
    job = start("--ranks", 2, "wait_for_test", tmp_path)
    pids = [r["pid"] for r in facts(tmp_path, 2)]
    assert [pid for pid in pids if _runs(pid)] == pids
    job.kill()
    assert survivors(pids) == []


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, ""), (signal.SIGTERM, 143, "stopped by SIGTERM\n")],
)
def test_a_signal_to_the_parent_stops_the_ranks(
    number: signal.Signals, code: int, message: str, start: Start, tmp_path: Path
) -> None:
    job = start("--ranks", 2, "wait_for_test", tmp_path)
    pids = [r["pid"] for r in facts(tmp_path, 2)]
    begin = time.monotonic()
    job.send_signal(number)
    assert ended(job) == (code, message)
    assert time.monotonic() - begin < SECONDS
    assert survivors(pids) == []


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, ""), (signal.SIGTERM, 143, "stopped by SIGTERM\n")],
)
def test_ranks_that_are_stopped_leave_nothing_unfinished(
    number: signal.Signals, code: int, message: str, start: Start, tmp_path: Path
) -> None:
    """Not even from inside a collective, or another call that never returns."""
    job = start("--ranks", 2, "writing", tmp_path)
    facts(tmp_path, 2)
    places = [tmp_path / "results" / str(rank) for rank in range(2)]
    assert [len(list(place.iterdir())) for place in places] == [2, 2]
    job.send_signal(number)
    assert ended(job) == (code, message)
    assert [list(place.iterdir()) for place in places] == [[], []]


def test_ctrl_c_while_the_ranks_are_starting_says_nothing(start: Start, tmp_path: Path) -> None:
    job = start("--ranks", 2, "wait_for_test", tmp_path)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    while len(children.read_text().split()) < 2:
        time.sleep(0.01)
    pids = [int(pid) for pid in children.read_text().split()]
    job.send_signal(signal.SIGINT)  # Python's own handler would print a traceback in each rank
    assert ended(job) == (130, "")
    assert survivors(pids) == []


def test_hang_up_is_ignored_under_nohup(start: Start, tmp_path: Path) -> None:
    job = start(
        *("--ranks", 2, "wait_for_test", tmp_path),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    pids = [r["pid"] for r in facts(tmp_path, 2)]
    job.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert job.poll() is None and all(_runs(pid) for pid in pids)
    job.send_signal(signal.SIGINT)
    assert ended(job) == (130, "")


def test_a_rank_that_does_not_stop_is_killed(start: Start, tmp_path: Path) -> None:
    job = start("--ranks", 2, "deaf", tmp_path)
    facts(tmp_path, 1)
    begin = time.monotonic()
    code, printed = ended(job)
    assert time.monotonic() - begin < SECONDS
    assert (code, printed) == (1, "rank 1 ended with exit code 5; the other ranks were stopped\n")
    assert survivors([r["pid"] for r in facts(tmp_path, 1)]) == []


def test_a_verdict_is_no_failure(start: Start, tmp_path: Path) -> None:
    assert ended(start("--ranks", 2, "verdict", tmp_path)) == (3, "")
    assert len(facts(tmp_path, 1)) == 1  # rank 0 was not cut off by rank 1's exit code


def test_more_ranks_than_gpus_are_refused_before_any_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="4 ranks, one GPU each, but 2 GPU"):
        launch.launch([], ranks=4, device="cuda", command=["/nothing/runs/this"])


@pytest.mark.parametrize(
    ("reports", "codes", "expected"),
    [
        # (rank, kind) in the order of time; the exit codes; which message is told with which code
        ([(1, "input"), (0, "input")], {0: 2, 1: 2}, (2, "input of 1")),
        ([(0, "fault"), (1, "input")], {0: 1, 1: 2}, (2, "input of 1")),
        ([(1, "fault"), (0, "fault")], {0: 1, 1: 1}, (1, "rank 1 failed:\nfault of 1")),
        (
            [(0, "fault")],  # rank 0 has only noticed that rank 1 is gone
            {0: 1, 1: -9},
            (
                1,
                "rank 1 was killed by SIGKILL (often: out of memory); the other ranks were stopped",
            ),
        ),
        (
            [(0, "fault")],
            {0: 1, 1: -11},
            (
                1,
                "rank 1 was killed by SIGSEGV; the other ranks were stopped\n"
                "rank 0 failed:\nfault of 0",
            ),
        ),
        ([], {0: 2, 1: 0}, (2, None)),
        ([], {0: 0, 1: 0}, (0, None)),
        # One rank alone: there are no others to stop.
        ([], {0: -9}, (1, "rank 0 was killed by SIGKILL (often: out of memory)")),
        ([], {0: -11}, (1, "rank 0 was killed by SIGSEGV")),
        ([], {0: 5}, (1, "rank 0 ended with exit code 5")),
    ],
)
def test_the_cause_is_told_before_its_consequences(
    reports: list, codes: dict, expected: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not launch.report_error(0, "fault", "nobody listens")
    monkeypatch.setenv(launch.ERROR_DIR, str(tmp_path))
    for rank, kind in reports:
        assert launch.report_error(rank, kind, f"{kind} of {rank}")
    result = launch._outcome(tmp_path, codes, stopped=set())
    assert (result.exit_code, result.message) == expected


def test_the_module_needs_no_torch_until_ranks_start() -> None:
    code = (
        "import sys, mlm_eval.ranks.launch, mlm_eval.ranks.world as world; world.detect_world(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- ranks of torchrun and Slurm ---------------------------------------------------------------


def test_torchrun(start: Start, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN]
    subprocess.run([*torchrun, str(TARGETS), "all_reduce", str(tmp_path), "2", "1"], check=True)
    ranks = facts(tmp_path, 2)
    assert [r["sums"]["tp"] for r in ranks] == [11, 11]
    assert [(r["source"], r["local_rank"], r["local_size"]) for r in ranks] == [
        ("torchrun", 0, 2),
        ("torchrun", 1, 2),
    ]


def slurm_step(rank: int, size: int, *, nodes: str, per_node: str, node: int = 0) -> dict[str, str]:
    """Return the variables that srun gives to one task (those that matter here)."""
    local_rank = rank - node * int(per_node[0])
    return {
        **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NODEID": str(node)},
        **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank)},
        **{"SLURM_NTASKS": str(size), "SLURM_STEP_NUM_TASKS": str(size)},
        **{"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": per_node},
    }


def test_srun_on_one_node(start: Start, tmp_path: Path) -> None:
    # The node's name resolves to nothing here, as in many containers.
    jobs = [
        start(
            *("all_reduce", tmp_path, 1, 2),
            env=slurm_step(rank, 2, nodes="no-such-host", per_node="2"),
        )
        for rank in range(2)
    ]
    assert [ended(job) for job in jobs] == [(0, ""), (0, "")]
    ranks = facts(tmp_path, 2)
    assert [r["sums"]["dp"] for r in ranks] == [11, 11]
    assert [(r["source"], r["local_rank"], r["local_size"]) for r in ranks] == [
        ("slurm", 0, 2),
        ("slurm", 1, 2),
    ]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_under_srun_ends_the_ranks_that_wait(
    failing: int, start: Start, tmp_path: Path
) -> None:
    """A step of srun goes on when one task fails: the others would wait half an hour."""
    begin = time.monotonic()
    jobs = [
        start("watched", tmp_path, failing, env=slurm_step(rank, 2, nodes="no", per_node="2"))
        for rank in range(2)
    ]
    results = [ended(job) for job in jobs]
    assert time.monotonic() - begin < 5 * SECONDS
    code, printed = results[1 - failing]
    assert code == 1
    if failing == 1:
        assert "rank 0 stops: rank 1 failed: wrong.pt holds no model" in printed
    else:  # the store has gone with it
        assert "rank 1 stops: rank 0" in printed
    assert "wrong.pt holds no model" in results[failing][1]


def test_a_rank_that_has_lost_the_others_names_the_cause() -> None:
    store = dist.HashStore()
    told: list[str] = []
    watches = [CauseWatch(store, World(n, 3, n, 3, "slurm"), told.append) for n in range(3)]
    for watch in watches:
        watch.stop()
    assert watches[0].found() is None
    watches[1].leave("the disk is full")
    watches[2].leave("a consequence")
    assert watches[0].found(1.0) == watches[2].found() == "rank 1 failed: the disk is full"
    assert watches[1].found() is None and told == []


def test_srun_on_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = set()
    places = []
    for rank, node in [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]:
        step = slurm_step(rank, 5, nodes="gpu[08-09],big1", per_node="2(x2),1", node=node)
        with monkeypatch.context() as patch:
            set_all(patch, step)
            patch.delenv("RANK")  # restored, with what detect_world sets beside it, by the context
            for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                patch.delenv(name)
            for name in ("MASTER_ADDR", "MASTER_PORT", SOURCE):
                patch.setenv(name, "")
                patch.delenv(name)
            world = detect_world()
            assert world is not None and world == detect_world()  # a second look agrees
            assert os.environ["RANK"] == str(rank) and not world.on_one_machine
            meeting.add((os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]))
            places.append((world.rank, world.size, world.local_rank, world.local_size))
    assert places == [(0, 5, 0, 2), (1, 5, 1, 2), (2, 5, 0, 2), (3, 5, 1, 2), (4, 5, 0, 1)]
    assert len(meeting) == 1
    host, port = meeting.pop()
    assert host == "gpu08" and 20000 <= int(port) < 32000


def test_srun_keeps_a_master_that_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, slurm_step(1, 2, nodes="n[1-2]", per_node="1(x2)", node=1))
    set_all(monkeypatch, {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4711"})
    world = detect_world()
    assert world == World(rank=1, size=2, local_rank=0, local_size=1, source="slurm")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "4711")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # a batch script: one process, though the job has four tasks
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "9"},
        # an salloc shell on the login node
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n[1-2]"},
        # an salloc shell that runs as an interactive step on the first node
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
        # a rank of another job, told to ignore that
        {
            **{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a"},
            **{"MASTER_PORT": "1", "MLM_EVAL_RANKS": "self"},
        },
        {"OMPI_COMM_WORLD_SIZE": "8", "MLM_EVAL_RANKS": "self"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_one_process_is_no_world(variables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, variables)
    assert detect_world() is None


@pytest.mark.parametrize("address", ["10.0.0.7", "localhost"])
def test_a_pod_is_the_only_rank_of_its_machine(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address})
    set_all(monkeypatch, {"MASTER_PORT": "23456"})
    assert detect_world() == World(1, 2, 0, 1, "torchrun")


@pytest.mark.parametrize("name", list(OTHER_LAUNCHERS))
def test_processes_of_mpi_that_know_nothing_of_each_other_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "8")
    with pytest.raises(InputError, match=rf"{name}=8.*set RANK, WORLD_SIZE"):
        detect_world()


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1"})
    with pytest.raises(InputError, match="but no MASTER_PORT"):
        detect_world()


def test_torchrun_inside_srun_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, slurm_step(1, 2, nodes="n[1-2]", per_node="1(x2)", node=1))
    set_all(monkeypatch, {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    set_all(monkeypatch, {"LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"})
    assert detect_world() == World(5, 8, 1, 4, "torchrun")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "first"}, "RANK='first', expected a number"),
        ({"RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 of LOCAL_WORLD_SIZE=1"),
    ],
)
def test_a_wrong_environment_is_named(
    variables: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    set_all(monkeypatch, {**good, "MASTER_ADDR": "n1", "MASTER_PORT": "29500", **variables})
    with pytest.raises(InputError, match=message):
        detect_world()


@pytest.mark.parametrize("rank", [0, 1])  # rank 0 serves the meeting place, rank 1 looks for it
def test_ranks_that_do_not_come_are_named(rank: int, start: Start, tmp_path: Path) -> None:
    step = slurm_step(rank, 2, nodes="n1", per_node="2")
    code, printed = ended(start("alone", tmp_path, env=step))
    assert code == 1  # no parent of ours: the command line prints it, this script does not
    assert f"InputError: rank {rank} of 2 did not meet the others at 127.0.0.1:" in printed


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("login1", ["login1"]),
        ("a,b", ["a", "b"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,2],m", ["n08", "n09", "n10", "n2", "m"]),
        ("gpu-[099-101]-ib", ["gpu-099-ib", "gpu-100-ib", "gpu-101-ib"]),
        ("rack[1-2]n[1,3]", ["rack1n1", "rack1n3", "rack2n1", "rack2n3"]),
        ("a.b.org,c[7]", ["a.b.org", "c7"]),
    ],
)
def test_node_lists_expand(nodelist: str, hosts: list[str]) -> None:
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize(
    "nodelist",
    [
        *("", "n[1-", "n[a-b]", "n1,,n2", "n1 n2", "n[1-2-3]", "n[2-1]"),
        *("n[1-999999999999]", f"n[1-{'9' * 5000}]", "n" + "[1-9]" * 30, "n[1-99999]," * 3 + "m"),
        *("n[1-999999],m", "m,n[1-999999]", "m,n[2-1,3],k", "m,r[1-2]n[3-999999]"),
    ],
)
def test_a_broken_node_list_is_refused(nodelist: str) -> None:
    with pytest.raises(InputError, match="node list is"):
        expand_nodelist(nodelist)


@pytest.mark.parametrize(
    "value", ["9" * 5000, "x" * 100_000, "-1", "\x1b[2J"], ids=["digits", "long", "-1", "escapes"]
)
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_a_variable_that_is_no_number_is_shown_cut(name, value, monkeypatch):
    set_all(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "n"})
    set_all(monkeypatch, {"MASTER_PORT": "29500", name: value})
    with pytest.raises(InputError, match=f"{name}=.*expected a number") as caught:
        detect_world()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "value",
    ["9" * 5000, "9" * 11, "0", "-1", "x", "80"],
    ids=["digits", "wide", "0", "-1", "x", "80"],
)
def test_a_size_that_no_terminal_has_is_forgotten(value, monkeypatch):
    set_all(monkeypatch, {"COLUMNS": value, "LINES": value})
    check_surroundings()
    assert os.environ.get("COLUMNS") == os.environ.get("LINES") == ("80" if value == "80" else None)


@pytest.mark.parametrize("name", [*OTHER_LAUNCHERS, "SLURM_CPUS_PER_TASK", "WORLD_SIZE"])
def test_a_number_of_endless_digits_is_none(name, monkeypatch):
    set_all(monkeypatch, {name: "9" * 5000})
    assert detect_world() is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "does not fit .*--batch-tokens"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "raise --tp"),
        (MemoryError(), "--micro-batch"),
        *((OSError(n, os.strerror(n), "/a/b"), f"/a/b.*{text}") for n, text in DISK_FAULTS.items()),
        (FileExistsError(17, "File exists", "/a/b"), "/a/b cannot be used"),
        (OSError(2, "No such file", "/a/b"), None),
        (ValueError("shapes"), None),
    ],
)
def test_faults_of_the_surroundings_have_names(error: Exception, message: str | None) -> None:
    found = named_fault(error)
    assert (found is None) == (message is None)
    with launch_error(error) as caught:
        pass
    assert message is None or re.search(message, str(caught[0]))


@contextlib.contextmanager
def launch_error(error: Exception) -> Iterator[list[Exception]]:
    """Yield what `reporting_errors` lets through of an exception, without a parent."""
    found: list[Exception] = []
    try:
        with launch.reporting_errors(None):
            raise error
    except Exception as caught:
        found.append(caught)
    yield found


def test_a_rank_that_lost_the_others_points_at_them() -> None:
    gone = RuntimeError("[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    assert str(lost_peers(gone, 3)).startswith("rank 3 lost the others; the cause stands in their")
    assert lost_peers(RuntimeError("shapes differ"), 3) is None


def test_a_single_process_out_of_memory_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "does not fit the memory" in printed


@pytest.mark.process
def test_a_signal_that_a_library_handles_does_not_end_a_rank():
    """Graders of some harness tasks stop long calls by an alarm of their own."""
    code = """
import signal, time
from mlm_eval.ranks.signals import end_by_signals
end_by_signals()
def late(number, frame): raise TimeoutError
signal.signal(signal.SIGALRM, late)
for _ in range(2):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try: time.sleep(30)
    except TimeoutError: print("caught", flush=True)
signal.raise_signal(signal.SIGTERM)
time.sleep(30)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["caught"] * 2
    assert done.returncode == -signal.SIGTERM
