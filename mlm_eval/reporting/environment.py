"""Where, when and by what command a record was made."""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_STARTED = time.monotonic()

CPU_INFO = Path("/proc/cpuinfo")


def run_record() -> dict[str, Any]:
    """Return when and where this process runs, by what command, and for how long.

    `devices` are the GPUs that this machine shows, where a command has used one, else the
    processor; `seconds` are those since the package was loaded; `commit` is that of the clone that
    the package stands in, None outside of one.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "system": platform.platform(),
        "devices": _gpus() or [_processor()],
        "command": _command(),
        "seconds": round(time.monotonic() - _STARTED, 3),
        "commit": _commit(),
    }


def gpu_versions() -> dict[str, str]:
    """Return the versions of CUDA and NCCL that torch was built with; none where it has no GPU."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    found = {"cuda": str(torch.version.cuda)}
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _gpus() -> list[str]:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


@functools.cache
def _processor() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _command() -> list[str]:
    """Return the command line, the program by its name."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    return ["mlm-eval" if program == "__main__.py" else program, *sys.argv[1:]]


@functools.cache
def _commit() -> str | None:
    package = Path(__file__).resolve().parents[2]
    if not (package / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(package), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
