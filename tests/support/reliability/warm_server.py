"""Runs command lines, each in a fork of one warm process; started by warm_commands.py.

A line of stdin is a job in JSON, the line of stdout that follows tells how it ended. A job runs
through the command line's own entry, with limits on its processor time and memory. An audit hook
writes down what it starts, connects to, loads and writes.
Source: https://docs.python.org/3/library/audit_events.html.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HEAVY = """torch transformers tokenizers safetensors.torch numpy pandas pyarrow datasets evaluate
yaml matplotlib.pyplot jinja2 huggingface_hub tensorboard.compat.proto sentencepiece
torch.utils.tensorboard""".split()
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "pty.spawn")
CONNECTS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request")
WRITES = """os.remove os.rename os.mkdir os.rmdir os.link os.symlink os.chmod os.chown os.truncate
shutil.rmtree shutil.move""".split()

_log: int | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _log is None:
        return
    noted: list[str] = []
    if event in STARTS or event in CONNECTS:
        noted = [str(arguments)[:300]]
    elif event in WRITES:
        names = [part for part in arguments if isinstance(part, str | bytes | Path)]
        noted = [os.path.join(_folder(arguments[-1]), os.fsdecode(name)) for name in names]
    elif event == "open":
        path, _, flags = arguments
        writing = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writing and isinstance(path, str | bytes | Path):
            noted = [os.path.join(os.getcwd(), os.fsdecode(path))]
    elif event == "exec":
        noted = [getattr(arguments[0], "co_filename", "?")]
    elif event == "ctypes.dlopen":
        noted = [str(arguments[0])]
    for what in noted:
        os.write(_log, (json.dumps([event, what]) + "\n").encode())


def _folder(descriptor: Any) -> str:
    """Return the folder that a relative name is below: an event's last argument may be its fd."""
    if isinstance(descriptor, int) and descriptor > 2:
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            pass  # it is a mode, such as that of a new folder
    return os.getcwd()


def _run(job: dict[str, Any]) -> None:
    """Run a command in this process, which ends with it."""
    global _log
    os.setsid()
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    tempfile.tempdir = None  # found before
    for number, name in ((0, "/dev/null"), (1, job["out"]), (2, job["err"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC * (number > 0), 0o600)
        os.dup2(file, number)
        os.close(file)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    seconds, room = job["seconds"], job["room"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    held = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_DATA, (held + room, held + room))
    sys.argv = ["mlm-eval", *job["arguments"]]
    from mlm_eval import cli

    _log = log
    cli.entry()


def _anonymous(process: int) -> int:
    """Return the bytes of a process that are in memory and in no file; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line[:8] in ("RssAnon:", "RssShmem"))


def _ended(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a fork and return how it ended."""
    before, most, started = _anonymous(os.getpid()), 0, time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            _run(job)
        finally:
            os._exit(70)
    blocked = False
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        most = max(most, _anonymous(child))
        if time.monotonic() - started > job["wall"]:
            blocked = True
            os.kill(child, signal.SIGKILL)
            ended = os.wait4(child, 0)
            break
        time.sleep(0.002)
    _, status, usage = ended
    return {
        "code": os.waitstatus_to_exitcode(status),
        "blocked": blocked,
        "seconds": usage.ru_utime + usage.ru_stime,
        "grown": max(0, most - before),
    }


def _warm() -> None:
    """Import everything that a command may import."""
    import mlm_eval

    for module in pkgutil.walk_packages(mlm_eval.__path__, "mlm_eval."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in HEAVY:
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # what is optional


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _warm()
    sys.addaudithook(_audit)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_ended(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
