"""Starts the processes in which megatron-core reads what we wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.paths import SUPPORT

PLAIN = {"TORCHDYNAMO_DISABLE": "1", "PYTORCH_JIT": "0", "OMP_NUM_THREADS": "1"}
"""megatron-core compiles its activations and residuals, which takes long, and under
ATEN_CPU_CAPABILITY=avx2 on a processor with AVX-512 torch's compiled code computes something else
(outputs off by 1 and more)."""


def run_core(script: str, scratch: Path, triples: list[Path]) -> None:
    """Run a script of this folder over (checkpoint, inputs, output) triples; it must end well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SUPPORT / "fuzz" / script, scratch, *triples],
        capture_output=True,
        text=True,
        env=os.environ | PLAIN,
    )
    assert done.returncode == 0, done.stderr[-3000:]
