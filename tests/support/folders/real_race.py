"""Passages of the real RACE, taken out of its archives."""

from __future__ import annotations

import tarfile
from pathlib import Path

ARCHIVES = {"train": "RACE_train.tar.gz", "dev": "RACE_dev_test.tar.gz"}


def first_passages(shared_data: Path, split: str, target: Path, *, count: int) -> Path:
    """Return `target` with the first files of a split's middle level."""
    target.mkdir(parents=True)
    with tarfile.open(shared_data / "race" / ARCHIVES[split]) as archive:
        for member in archive:
            if f"/{split}/middle/" in member.name and member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                (target / Path(member.name).name).write_bytes(content.read())
                count -= 1
                if not count:
                    break
    return target
