"""The machine's memory: what is free, and what a process keeps of what it frees."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_eval.checkpoints.memory import host
from mlm_eval.checkpoints.memory.host import free_memory, keep_freed_memory

FAULTS = """
import resource, sys, torch
from mlm_eval.checkpoints.memory.host import keep_freed_memory
assert sys.argv[1] != "kept" or keep_freed_memory()
for again in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(31 << 20, dtype=torch.uint8) for _ in range(4)]
        del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_what_is_free_is_no_more_than_what_there_is():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_memory() < total


def test_nothing_is_said_to_be_free_where_nothing_is_told(monkeypatch):
    def read_text(self, encoding):
        raise FileNotFoundError(self)

    monkeypatch.setattr(host.Path, "read_text", read_text)
    assert free_memory() is None


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_blocks_are_used_again():
    """The kernel clears a page, and counts a fault, for each that it is asked for again."""

    def faults(how: str) -> int:
        words = [sys.executable, "-c", FAULTS, how]
        # All blocks of a megabyte and more are given back, unless something else is asked for.
        variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        done = subprocess.run(words, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    given_back, kept = faults("given back"), faults("kept")
    assert given_back > 1000 and kept < given_back / 10  # pages; 2.5 GB were asked for
