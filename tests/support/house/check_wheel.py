"""Check a built wheel against the source tree: nothing missing, nothing stale, one top level.

usage: python tests/support/house/check_wheel.py WHEEL

`make wheel` runs this on the wheel that it built; test_packaging.py makes the same check.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

# Folder of the project -> folder in the wheel.
MAPPING = {
    "mlm_eval": "mlm_eval",
    "checkpoints": "mlm_eval/checkpoints",
    "tasks": "mlm_eval/tasks",
}


def source_files(project: Path) -> set[str]:
    """Return what the wheel has to hold besides its metadata: every file of the three folders."""
    return {
        f"{target}/{file.relative_to(project / folder).as_posix()}"
        for folder, target in MAPPING.items()
        for file in (project / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def wheel_faults(wheel: Path, project: Path) -> list[str]:
    """Return what is wrong with `wheel` as a build of `project`, one sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    metadata = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    packed, expected = names - metadata, source_files(project)
    faults = []
    # A bare `tasks` would collide with the one of a Megatron-LM clone on PYTHONPATH.
    if strangers := {name.partition("/")[0] for name in packed} - {"mlm_eval"}:
        faults.append(f"top level holds {sorted(strangers)} beside mlm_eval")
    if missing := expected - packed:
        faults.append(f"not in the wheel: {sorted(missing)}")
    if stale := packed - expected:
        faults.append(f"in the wheel, but not in the source: {sorted(stale)}")
    if not any(name.endswith("/licenses/LICENSE") for name in metadata):
        faults.append("the licence is not in the metadata")
    return faults


def main() -> None:
    """Check the wheel named on the command line; exit with 1 and the faults if it has any."""
    wheel = Path(sys.argv[1])
    if faults := wheel_faults(wheel, Path(__file__).resolve().parents[3]):
        sys.exit("\n".join(f"{wheel.name}: {fault}" for fault in faults))
    print(f"{wheel.name}: mlm_eval alone, every file of the source, {wheel.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
