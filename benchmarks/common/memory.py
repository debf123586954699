"""Wall time and peak anonymous memory of a command, as the kernel accounts for them.

Anonymous memory (RssAnon) is what a process really occupies: pages of mapped files may be dropped
at any moment and do not count.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Usage:
    """One run of a command."""

    seconds: float
    peak_bytes: int


def measure(command: Sequence[str]) -> Usage:
    """Run a command and return its usage; its own output is shown only when it fails."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - started
        output = process.stdout.read() if process.stdout else b""
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output.decode(errors='replace')}")
    return Usage(seconds, peak)


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory of a process now; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
