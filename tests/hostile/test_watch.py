"""The watch over hostile input sees what a command must not do."""

from __future__ import annotations

from support.paths import SAMPLES
from support.reliability.warm_commands import WarmCommands, told

pytest_plugins = ["support.reliability.warm_fixtures"]


def test_a_right_command_has_no_fault(warm: WarmCommands):
    sandbox = warm.sandbox()
    done = warm.run(sandbox, ["inspect", "--ckpt", SAMPLES / "gpt"])
    assert done.faults(refused=False) == [], told(done)
    assert done.faults(refused=True) == ["exit code 0, not 2"]
    missing = warm.run(warm.sandbox(), ["inspect", "--ckpt", sandbox.input / "none"])
    assert missing.faults(refused=True) == [], told(missing)
    assert missing.sentence.startswith(str(sandbox.input))
