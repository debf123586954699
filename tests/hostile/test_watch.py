"""The watch over hostile input sees what a command must not do."""

from __future__ import annotations

import ast
import dataclasses

from support.paths import PROJECT, SAMPLES
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


def test_the_watch_sees_each_thing_that_no_command_may_do(warm: WarmCommands):
    sandbox = warm.sandbox()
    right = warm.run(sandbox, ["inspect", "--ckpt", SAMPLES / "gpt"])
    home, out = str(sandbox.root / "home/x"), str(sandbox.output / "x")
    for changes, fault in (
        ({"code": 1}, "exit code 1"),
        ({"code": -11}, "exit code -11"),
        ({"code": 2, "err": "mlm-eval: a\nmlm-eval: b\n"}, "not one sentence"),
        ({"code": 2, "err": ""}, "not one sentence"),
        ({"code": 2, "err": "mlm-eval: " + "n" * 10_000}, "a line of"),
        ({"err": "Traceback (most recent call last):\n  x\nValueError: y\n"}, "Traceback"),
        ({"out": "a\x1b[2Jb"}, "stdout printed '\\x1b'"),
        ({"err": "a\u202eb"}, "stderr printed"),
        ({"err": "a\rb"}, "stderr printed"),
        ({"blocked": True}, "did not end"),
        ({"seconds": 19.9}, "it took 20 s"),
        ({"grown": 1 << 30}, "it took 1024 MB"),
        ({"events": (("os.system", "touch x"),)}, "os.system"),
        ({"events": (("subprocess.Popen", "('sh',)"),)}, "subprocess.Popen"),
        ({"events": (("socket.connect", "x"),)}, "socket.connect"),
        ({"events": (("open", home),)}, "open"),
        ({"events": (("os.remove", home),)}, "os.remove"),
        ({"events": (("exec", str(sandbox.input / "evil.py")),)}, "exec"),
        ({"changed": (home,)}, "changed"),
    ):
        found = dataclasses.replace(right, **changes).faults()
        assert found and fault in found[0], (changes, found)
    allowed = (("open", out), ("os.mkdir", str(sandbox.root / ".out.partial-0123")))
    assert dataclasses.replace(right, events=allowed).faults() == []


def test_a_command_that_writes_elsewhere_is_seen(warm: WarmCommands):
    """The audit hook and the snapshot, each on a real command."""
    sandbox = warm.sandbox()
    target = sandbox.root / "home" / "result"
    words = ["convert", "--ckpt", SAMPLES / "gpt", "--to", "megatron", "--output", target]
    done = warm.run(sandbox, words)
    assert done.code == 0
    faults = done.faults()
    assert any(fault.startswith("os.mkdir") and "home" in fault for fault in faults)
    assert any(fault.startswith("changed: ") for fault in faults)


def test_one_file_prints():
    """All that the command line shows goes through it, so that nothing reaches a terminal raw."""
    for path in (PROJECT / "mlm_eval" / "cli").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        prints = [name for name in names if isinstance(name, ast.Name) and name.id == "print"]
        assert not prints or path.name == "printing.py", path
