"""Files of a checkpoint that go or change after it was opened and before it is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.reliability import damage

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.torch_file import read_torch_file
from mlm_eval.checkpoints.open import open_checkpoint


@pytest.mark.parametrize("happens", ["gone", "cut", "replaced"])
@pytest.mark.parametrize("format", damage.FORMATS)
def test_what_goes_while_it_is_read_is_said(format: str, happens: str, tmp_path: Path) -> None:
    """Of every tensor either the value that it had comes back, or a sentence."""
    sound = damage.FORMATS[format](tmp_path / "sound", 0)
    kept = {name: lazy.read() for name, lazy in open_checkpoint(sound).tensors.items()}
    checkpoint = open_checkpoint(sound)
    if happens == "replaced":  # by a later checkpoint of the same model
        shutil.rmtree(tmp_path / "sound")
        damage.FORMATS[format](tmp_path / "sound", 1)
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


@pytest.mark.parametrize("happens", ["gone", "replaced"])
def test_a_file_that_is_mapped_stays_what_it_was(happens: str, tmp_path: Path) -> None:
    """Training removes an old checkpoint while it is read: its values and checksums are kept."""
    path = tmp_path / "two.pt"
    torch.save({"a": torch.ones(4), "b": torch.arange(6.0)}, path)
    values = read_torch_file(path).value
    assert values["a"].read().tolist() == [1.0] * 4
    path.unlink()
    if happens == "replaced":
        torch.save({"a": torch.zeros(4), "b": torch.zeros(6)}, path)
    assert values["b"].read().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
