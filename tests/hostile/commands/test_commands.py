"""Hostile input to commands as a shell starts them, a share of every file of these suites.

The others run in forks of one process. Here nothing is imported before, no hook watches, and the
whole process is measured. Variables of the environment are attacked here too.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from support.reliability.attacks import Attack, Bases
from support.reliability.real_commands import run_command
from support.reliability.short_form import thinned
from support.reliability.warm_commands import WarmCommands, told

pytest_plugins = ["support.reliability.warm_fixtures"]

HERE = Path(__file__).parent
SUITES = sorted(
    path
    for folder in (HERE.parent, HERE.parent / "tricks")
    for path in folder.glob("test_*.py")
    if "\nATTACKS" in path.read_text(encoding="utf-8")
)
OF_EACH = 6
"""Attacks of each file, from its beginning to its end."""


def _attacks(path: Path) -> list[Attack]:
    """Return the attacks of a test file."""
    about = importlib.util.spec_from_file_location(f"suite_{path.stem}", path)
    assert about is not None and about.loader is not None
    module = importlib.util.module_from_spec(about)
    about.loader.exec_module(module)
    found: list[Attack] = module.ATTACKS
    return found


CASES = [f"{path.stem} {nth}" for path in SUITES for nth in range(OF_EACH)]


@pytest.mark.process
@pytest.mark.parametrize("case", thinned(CASES, every=30))
def test_a_command_holds_the_whole_contract(case: str, warm: WarmCommands, bases: Bases):
    name, _, nth = case.partition(" ")
    (path,) = (path for path in SUITES if path.stem == name)
    attacks = _attacks(path)
    attack = attacks[int(nth) * len(attacks) // OF_EACH + 7 * int(nth) % 5]
    sandbox = warm.sandbox()
    words = attack.prepare(sandbox, bases)
    done = run_command(sandbox, words)
    faults = attack.faults(done)
    assert not faults, f"{attack.name}: {faults}\n{told(done)}"


# ---- variables of the environment ----------------------------------------------------------------

ODD = {
    "nothing": "",
    "escapes": "\x1b[2J\u202e",
    "digits": "9" * 5000,
    "-1": "-1",
    "a device": "/dev/null",
    "no folder": "/proc/nowhere",
    "100,000 letters": "x" * 100_000,
    "a surrogate": "\udcff",
}
VARIABLES = """RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_PROCID
SLURM_NTASKS SLURM_STEP_NODELIST SLURM_JOB_NODELIST SLURM_STEP_TASKS_PER_NODE SLURM_LOCALID
MLM_EVAL_LAUNCHED MLM_EVAL_RANKS XDG_CACHE_HOME HF_HOME HF_ENDPOINT TMPDIR HOME COLUMNS LINES TERM
NO_COLOR SLURM_CPUS_PER_TASK LANG LC_ALL OMP_NUM_THREADS TOKENIZERS_PARALLELISM""".split()
OF_VARIABLES = [f"{name}: {what}" for name in VARIABLES for what in ODD]


@pytest.mark.process
@pytest.mark.reliability
@pytest.mark.parametrize("case", OF_VARIABLES[::5])
def test_no_variable_makes_a_traceback(case: str, warm: WarmCommands, bases: Bases):
    name, _, what = case.partition(": ")
    sandbox = warm.sandbox()
    lines = sandbox.input / "lines.jsonl"
    lines.write_text(json.dumps({"tokens": [1, 2, 3]}) + "\n")
    words: list[object] = ["score", "--ckpt", bases.gpt, "--input", lines, "--device", "cpu"]
    done = run_command(sandbox, [*words, "--output", sandbox.output], **{name: ODD[what]})
    changed = [path for path in done.changed if "/home/" in path or "/work/" in path]
    faults = [fault for fault in done.faults() if not fault.startswith("changed")]
    assert faults == [] and (changed == [] or name in ("HOME", "XDG_CACHE_HOME")), told(done)
