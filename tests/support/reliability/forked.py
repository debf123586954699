"""Runs a command line in a fork of the test's process, in surroundings that a function makes.

A fork is a process of its own, with its own signals, descriptors and folder, and imports nothing
anew. What needs ranks is run by `command_line.started`.
"""

from __future__ import annotations

import multiprocessing.process
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from support.command_line import OF_A_LAUNCHER, Ended

SECONDS = 120
"""After which a command counts as blocked, on a machine that does other things too."""


def forked(
    folder: Path, *arguments: object, around: Callable[[], None] = lambda: None, ends: bool = True
) -> Ended:
    """Return how a command line ended; minus a signal's number where that ended it.

    Args:
        folder: For what it prints.
        arguments: Of the command line.
        around: Called in the process before the command.
        ends: Whether it has to end within `SECONDS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out, err = folder / "stdout", folder / "stderr"
    child = os.fork()
    if child == 0:
        try:
            _become(out, err, arguments, around)
        except BaseException as error:
            os.write(2, f"in the fork: {error!r}\n".encode())
        finally:
            os._exit(70)
    began = time.monotonic()
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - began > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert not ends, f"blocked: {arguments}\n{err.read_text()}"
            return Ended(99, "", "blocked")
        time.sleep(0.005)
    texts = (path.read_bytes().decode("utf-8", "replace") for path in (out, err))
    return Ended(os.waitstatus_to_exitcode(ended[1]), *texts)


def _become(
    out: Path, err: Path, arguments: tuple[object, ...], around: Callable[[], None]
) -> None:
    for name in [name for name in os.environ if name.startswith(OF_A_LAUNCHER)]:
        del os.environ[name]
    for number, file in ((0, "/dev/null"), (1, out), (2, err)):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC * bool(number), 0o600)
        os.dup2(opened, number)
        os.close(opened)
    streams = ((1, "stdout", "strict"), (2, "stderr", "backslashreplace"))
    for number, name, errors in streams:
        stream = open(number, "w", encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
        ignored = number in (signal.SIGPIPE, signal.SIGXFSZ)  # as Python itself has them
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    multiprocessing.process._children.clear()  # type: ignore[attr-defined]  # ended at our exit
    sys.argv = ["mlm-eval", *map(str, arguments)]
    around()
    from mlm_eval.cli import entry

    entry()


def kill_at(step: int, number: signal.Signals, *, steps: tuple[str, ...]) -> Callable[[], None]:
    """Return what has a command kill itself at its n-th step: an event of Python's auditing.

    Source: https://docs.python.org/3/library/audit_events.html.

    Args:
        step: The first is 0.
        number: The signal.
        steps: Parts of paths that count as steps, where they are opened, made, renamed or removed.
    """

    def install() -> None:
        left = [step]

        def audit(event: str, arguments: tuple[object, ...]) -> None:
            if event not in ("open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree"):
                return
            if not any(part in str(arguments[0]) for part in steps):
                return
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), number)

        sys.addaudithook(audit)

    return install


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> bool:
    """Wait until something is so; return whether it has become so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False
