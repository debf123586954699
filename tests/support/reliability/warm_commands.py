"""Runs commands in forks of a warm process, each in a sandbox, and tells what they did.

`Sandbox` has folders for the input, the output, a home and a working folder with a file that must
stay. `Done` says how a command ended, and `Done.faults` what was wrong with that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.command_line import OF_A_LAUNCHER

SECONDS = 20
"""Of processor time that any input may take."""

WALL = 180
"""Seconds after which a command counts as blocked, on a machine that does other things too."""

MEMORY = 512 << 20
"""Bytes that a command may add to what the imports hold."""

_ROOM = 3 << 30
"""Bytes after which it is refused more, so that a test takes no machine down."""

LONGEST_SENTENCE = 4200
"""Characters of an error message; the list of all settings is the longest that we write."""

_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_WRITING = "os.", "shutil.", "open"


@dataclass
class Sandbox:
    """A folder for one command: what it reads, where it may write, and what must stay."""

    root: Path
    """Holds the others."""
    input: Path = field(init=False)
    """For the hostile files."""
    output: Path = field(init=False)
    """May be written, and nothing else may. It is not there yet."""

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self.input, self.output = self.root / "in", self.root / "out"
        for name in ("in", "home", "work", "cache", "tmp", "log"):
            (self.root / name).mkdir(parents=True)
        for name in ("home/precious.txt", "work/precious.txt"):
            (self.root / name).write_text("a person's own")

    @property
    def canary(self) -> Path:
        """The file that code in an input makes if it runs."""
        return self.root / "home" / "canary"

    @property
    def command(self) -> str:
        """A shell command that makes the canary."""
        return f"touch {self.canary}"

    def may_write(self, path: str) -> bool:
        """Return whether a command may write, make or remove something at a path."""
        inside = Path(os.path.realpath(path))
        if not inside.is_relative_to(self.root):
            return str(inside).startswith(("/dev/", "/proc/"))
        below = inside.relative_to(self.root).parts[:1]
        # Beside the output stand what will be renamed to it, and what is kept of a run.
        return any(re.fullmatch(r"cache|tmp|log|\.{0,2}out(\..*)?", part) for part in below)

    def snapshot(self) -> dict[str, str]:
        """Return what stands where nothing may be written: paths with types and contents."""
        found = {}
        for place, folders, files in os.walk(self.root):
            for name in [*folders, *files]:
                path = Path(place, name)
                if path.is_symlink():
                    found[str(path)] = f"link to {os.readlink(path)}"
                elif path.is_file() and path.stat().st_size < 1 << 22:
                    found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
                elif path.is_file():
                    found[str(path)] = f"{path.stat().st_size} bytes of {path.stat().st_mtime_ns}"
                else:
                    found[str(path)] = f"mode {path.stat().st_mode:o}"
        return {path: what for path, what in found.items() if not self.may_write(path)}


@dataclass(frozen=True)
class Done:
    """How a command ended in a sandbox."""

    code: int
    """Its exit code, or minus the number of the signal that ended it."""
    blocked: bool
    """It did not end within `WALL`."""
    seconds: float
    """Of processor time."""
    grown: int
    """Bytes of memory that it added to the warm process's, at the most."""
    out: str
    err: str
    events: tuple[tuple[str, str], ...]
    """What the audit hook saw: names of events with a path or arguments."""
    changed: tuple[str, ...]
    """Paths outside of what may be written that came, went or changed."""
    sandbox: Sandbox

    @property
    def sentence(self) -> str:
        """The error message, without the program's name."""
        lines = [line for line in self.err.split("\n") if line.startswith("mlm-eval: ")]
        return lines[-1].removeprefix("mlm-eval: ") if lines else ""

    def faults(self, *, refused: bool | None = None, memory: int = MEMORY) -> list[str]:
        """Return what was wrong with it, in words.

        Args:
            refused: Whether it had to end with exit code 2; None: a right result does, too.
            memory: Bytes that it may have added.
        """
        found = []
        if self.blocked:
            found.append(f"it did not end in {WALL} s")
        elif self.seconds >= SECONDS - 1:
            found.append(f"it took {self.seconds:.0f} s")
        if self.grown > memory:
            found.append(f"it took {self.grown >> 20} MB")
        codes = {True: (2,), False: (0,), None: (0, 2)}[refused]
        if self.code not in codes:
            found.append(f"exit code {self.code}, not {' or '.join(map(str, codes))}")
        for what in ("Traceback", "this is a fault of mlm-eval", "PanicException", "panicked"):
            if what in self.err:
                found.append(f"{what}: {self.err.strip().splitlines()[-2:][0][:300]}")
        if self.code == 2:
            found += self._of_the_message()
        found += [f"{name} printed {c!r}" for name, c in self._unprintable()]
        found += [f"{event} {what}" for event, what in self.events if self._forbidden(event, what)]
        found += [f"changed: {path}" for path in self.changed]
        return found

    def _of_the_message(self) -> Iterator[str]:
        lines = [line for line in self.err.split("\n") if line]
        others = re.compile(
            r"(warning|note|work ahead): .*|.* (\.\.\.|so far)"
        )  # on a slow machine
        told = [line for line in lines if not others.fullmatch(line)]
        if len(told) != 1 or not told[0].startswith("mlm-eval: "):
            yield f"not one sentence: {self.err[:600]!r}"
        if any(len(line) > LONGEST_SENTENCE for line in lines):
            yield f"a line of {max(map(len, lines))} characters"

    def _unprintable(self) -> Iterator[tuple[str, str]]:
        for name, text in (("stdout", self.out), ("stderr", self.err)):
            for letter in sorted(set(text) - set("\n\t")):
                if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _BIDI:
                    yield name, letter

    def _forbidden(self, event: str, what: str) -> bool:
        if event == "exec":
            return what.startswith(str(self.sandbox.root)) or not what.startswith(("/", "<"))
        if event == "ctypes.dlopen":
            return what.startswith(str(self.sandbox.root))
        if event == "subprocess.Popen" and what.startswith(("('uname'", "('git', ['git', '-C'")):
            return False  # what a record says of the machine and of this clone
        if event == "os.mkdir" and what == str(self.sandbox.root):
            return False  # asked for in case it is not there
        return not (event.startswith(_WRITING) and self.sandbox.may_write(what))


class WarmCommands:
    """A process that has imported everything and runs each command in a fork of itself."""

    def __init__(self, root: Path) -> None:
        self.root, self.runs = root, 0
        environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_A_LAUNCHER)}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._answer() == "ready"

    def sandbox(self) -> Sandbox:
        """Return a new sandbox."""
        self.runs += 1
        return Sandbox(self.root / f"{self.runs:04}")

    def run(self, sandbox: Sandbox, arguments: Sequence[object]) -> Done:
        """Return how a command ended."""
        log, before = sandbox.root / "log", sandbox.snapshot()
        files = {name: str(log / name) for name in ("out", "err", "log")}
        home = str(sandbox.root / "home")
        job = files | {
            "arguments": [str(word) for word in arguments],
            "cwd": str(sandbox.root / "work"),
            "environment": {
                "HOME": home,
                "XDG_CACHE_HOME": str(sandbox.root / "cache"),
                "HF_HOME": str(sandbox.root / "cache" / "huggingface"),
                "TMPDIR": str(sandbox.root / "tmp"),
            },
            "seconds": SECONDS,
            "wall": WALL,
            "room": _ROOM,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        ended = json.loads(self._answer())
        after = sandbox.snapshot()
        changed = [p for p in sorted(before | after) if before.get(p) != after.get(p)]
        lines = Path(files["log"]).read_text().splitlines() if Path(files["log"]).exists() else []
        events = dict.fromkeys((event, what) for event, what in map(json.loads, lines))
        return Done(
            **ended,
            out=_text(files["out"]),
            err=_text(files["err"]),
            events=tuple(events),
            changed=tuple(changed),
            sandbox=sandbox,
        )

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        assert answer, "the warm process has ended"
        return answer.strip()


def _text(path: str) -> str:
    return Path(path).read_bytes().decode("utf-8", "surrogateescape") if Path(path).exists() else ""


def told(done: Done) -> dict[str, Any]:
    """Return what a failing test shows of a command."""
    return {"code": done.code, "out": done.out[-1500:], "err": done.err[-3000:]}
