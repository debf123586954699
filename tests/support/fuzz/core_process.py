"""Starts the processes in which megatron-core reads what we wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.paths import SUPPORT


def run_core(script: str, scratch: Path, triples: list[Path]) -> None:
    """Run a script of this folder over (checkpoint, inputs, output) triples; it must end well."""
    quick = {"TORCHDYNAMO_DISABLE": "1", "PYTORCH_JIT": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SUPPORT / "fuzz" / script, scratch, *triples],
        capture_output=True,
        text=True,
        env=os.environ | quick,
    )
    assert done.returncode == 0, done.stderr[-3000:]
