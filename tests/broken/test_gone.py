"""Files of a checkpoint that go, or become shorter, after it was opened and before it is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.reliability import damage

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint


@pytest.mark.parametrize("happens", ["gone", "cut"])
@pytest.mark.parametrize("format", damage.FORMATS)
def test_what_goes_while_it_is_read_is_said(format: str, happens: str, tmp_path: Path) -> None:
    """Of every tensor either the value that it had comes back, or a sentence."""
    sound = damage.FORMATS[format](tmp_path / "sound", 0)
    kept = {name: lazy.read() for name, lazy in open_checkpoint(sound).tensors.items()}
    checkpoint = open_checkpoint(sound)
    for file in [path for path in (tmp_path / "sound").rglob("*") if path.is_file()]:
        if happens == "cut":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if happens == "gone":
        shutil.rmtree(tmp_path / "sound")
    said = 0
    for name, lazy in checkpoint.tensors.items():
        try:
            assert lazy.read().equal(kept[name])
        except InputError as error:
            assert str(sound) in str(error)
            said += 1
    assert said or format == "zip"  # which is unpacked when it is opened
