"""Run the tests that compare numbers as other processors would: `make test-portable` (hours).

usage: python tests/support/house/portable.py [--only WORD] [ARGUMENT of pytest, such as -n 2 ...]

Each run takes a set of instructions that the three libraries which multiply are held to, and a
number of threads; last, the rounding of kernels that no such variable chooses is imitated
(support/house/other_kernels.py). Without paths among the arguments all tests that compare numbers
run; --only takes the runs whose name has the word in it. The code is the number of runs that
failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
NUMBERS = [
    *("tests/model", "tests/engine", "tests/ranks", "tests/training", "tests/harness"),
    *("tests/zero_shot", "tests/language", "tests/finetune", "tests/checkpoints", "tests/cli"),
    *("tests/house/test_sample.py", "tests/house/test_sample_bert.py"),
]
INSTRUCTIONS: dict[str, dict[str, str]] = {
    "as it is": {},
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "lowest": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}
THREADS = (1, 2, 4)
COUNTED = "tests/engine/test_engine.py::test_flops_are_those_that_torch_counts"
"""Counts the products, and the imitation makes each of them twice."""


def runs() -> dict[str, tuple[dict[str, str], list[str]]]:
    """Return variables and arguments of each run by its name."""
    found: dict[str, tuple[dict[str, str], list[str]]] = {}
    for name, variables in INSTRUCTIONS.items():
        for count in THREADS:
            threads = {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
            found[f"{name}, threads {count}"] = (variables | threads, [])
    for noise in ("1", "2"):
        plugin = ["-p", "support.house.other_kernels", "--deselect", COUNTED]
        found[f"other kernels, noise {noise}"] = ({"MLM_EVAL_OTHER_KERNELS": noise}, plugin)
    # What starts ranks must not depend on which of them is quicker.
    for time_of_ten in range(1, 11):
        found[f"ranks, time {time_of_ten}"] = ({}, ["tests/ranks", "tests/training"])
    return found


def main() -> int:
    """Run them all, print a table, and return how many failed."""
    arguments = sys.argv[1:]
    word = ""
    if "--only" in arguments:
        at = arguments.index("--only")
        word = arguments[at + 1]
        del arguments[at : at + 2]
    failed = 0
    for name, (variables, more) in runs().items():
        if word not in name:
            continue
        paths = [] if any(Path(text.split("::")[0]).exists() for text in arguments) else NUMBERS
        if any(Path(text).exists() for text in more):
            paths = []
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--tb=short", *more, *paths, *arguments],
            cwd=PROJECT,
            env={**os.environ, **variables},
        )
        failed += done.returncode != 0
        verdict = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(f"== {name}: {verdict}, {time.monotonic() - begin:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
