"""What a record says of the run that made it."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

from mlm_eval.reporting import environment
from mlm_eval.reporting.environment import gpu_versions, run_record


def test_a_record_says_when_where_and_by_what_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/lib/mlm_eval/__main__.py", "lambada", "--tp", "2"])
    found = run_record()
    age = datetime.now(UTC) - datetime.fromisoformat(found["date"])
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert found["command"] == ["mlm-eval", "lambada", "--tp", "2"]
    assert found["host"] and found["system"] and found["devices"] != [""]
    assert found["seconds"] >= 0
    assert found["commit"] is None or re.fullmatch("[0-9a-f]{40}", found["commit"])
    monkeypatch.setattr(sys, "argv", ["/home/me/study.py", "--seed", "1"])
    assert run_record()["command"] == ["study.py", "--seed", "1"]


def test_gpus_are_named_with_their_libraries(monkeypatch):
    """A machine with two GPUs, as torch shows it once a command has used one."""
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 2,
        get_device_name=lambda index: f"GPU {index}",
        nccl=SimpleNamespace(version=lambda: (2, 27, 3)),
    )
    distributed = SimpleNamespace(is_available=lambda: True, is_nccl_available=lambda: True)
    version = SimpleNamespace(cuda="13.0")
    fake = SimpleNamespace(cuda=cuda, distributed=distributed, version=version)
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert run_record()["devices"] == ["GPU 0", "GPU 1"]
    assert gpu_versions() == {"cuda": "13.0", "nccl": "2.27.3"}
    cuda.is_initialized = lambda: False
    assert gpu_versions() == {}
    assert run_record()["devices"] == [environment._processor()]
