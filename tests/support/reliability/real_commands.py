"""Runs hostile input through commands as a shell starts them, and tells what each did.

Nothing is imported before and nothing watches inside: what counts is the exit code, what is
printed, the files around, the processor time and the memory of the whole process.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from support.command_line import OF_A_LAUNCHER
from support.reliability.warm_commands import MEMORY, SECONDS, WALL, Done, Sandbox

IMPORTS_SECONDS = 20
"""Of processor time that the imports of a command may take on a slow machine."""

IMPORTS_MEMORY = 1 << 30
"""Bytes that they may hold: torch, transformers, pyarrow and matplotlib together."""


def run_command(sandbox: Sandbox, words: Sequence[object], **variables: str) -> Done:
    """Return how a command ended that was started as a process of its own.

    Args:
        sandbox: Where it runs.
        words: Its arguments.
        variables: Of its environment, more than those of a sandbox.
    """
    before = sandbox.snapshot()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_A_LAUNCHER)}
    environment |= {"HOME": str(sandbox.root / "home"), "TMPDIR": str(sandbox.root / "tmp")}
    environment |= {"XDG_CACHE_HOME": str(sandbox.root / "cache"), "MPLBACKEND": "agg"}
    environment |= {"HF_HOME": str(sandbox.root / "cache" / "huggingface")}
    environment |= {"MPLCONFIGDIR": str(sandbox.root / "cache" / "matplotlib")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    files = [sandbox.root / "log" / name for name in ("out", "err")]
    with files[0].open("wb") as out, files[1].open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mlm_eval", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=sandbox.root / "work",
            env=environment,
            start_new_session=True,
            preexec_fn=_bounded,
        )
        status, usage, most, blocked = _waited(process.pid)
    process.returncode = os.waitstatus_to_exitcode(status)
    after = sandbox.snapshot()
    texts = [path.read_bytes().decode("utf-8", "surrogateescape") for path in files]
    return Done(
        code=process.returncode,
        blocked=blocked,
        seconds=max(0.0, usage.ru_utime + usage.ru_stime - IMPORTS_SECONDS),
        grown=max(0, most - IMPORTS_MEMORY),
        out=texts[0],
        err=texts[1],
        events=(),
        changed=tuple(p for p in sorted(before | after) if before.get(p) != after.get(p)),
        sandbox=sandbox,
    )


def _bounded() -> None:
    seconds = SECONDS + IMPORTS_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    room = 4 * (IMPORTS_MEMORY + MEMORY)  # so that no test takes a machine down
    resource.setrlimit(resource.RLIMIT_DATA, (room, room))


def _waited(pid: int) -> tuple[int, resource.struct_rusage, int, bool]:
    """Wait for a process and end what it left.

    Returns:
        Its status, its usage, the most bytes it held (the usage counts the process that started
        it, too), and whether it hung.
    """
    end, most, blocked = time.monotonic() + WALL, 0, False
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            blocked = True
            os.kill(pid, signal.SIGKILL)
        most = max(most, _most_memory(pid))
        time.sleep(0.02)
    left = [p for p in Path("/proc").iterdir() if p.name.isdigit() and _session(p) == pid]
    for path in left:
        os.kill(int(path.name), signal.SIGKILL)
    assert not left, f"processes were left behind: {[path.name for path in left]}"
    return ended[1], ended[2], most, blocked


def _most_memory(pid: int) -> int:
    """Return the most bytes that a process has held since it began its command; 0: it has ended."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) << 10 if found else 0


def _session(path: Path) -> int:
    """Return the session of a process; 0 where it has ended."""
    try:
        fields = (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[3])
