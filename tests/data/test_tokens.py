"""Tokens that are kept: made anew where they are damaged, and never through a link."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.tasks.data.tokens import kept_arrays


def kept(path: Path, value: int) -> int:
    found = kept_arrays(path, lambda: {"x": np.array([value])}, whole=lambda found: "x" in found)
    return int(found["x"][0])


def test_what_is_kept_is_read_and_what_is_damaged_is_made_again(tmp_path):
    path = tmp_path / "made" / "tokens.safetensors"
    assert [kept(path, 1), kept(path, 2)] == [1, 1]
    path.write_bytes(path.read_bytes()[:-3])
    assert [kept(path, 3), kept(path, 4)] == [3, 3]


@pytest.mark.parametrize("kind", ["link", "dangling link", "device", "pipe", "folder"])
def test_nothing_is_read_or_written_through_what_is_no_file(tmp_path, kind):
    path, mine = tmp_path / "tokens.safetensors", tmp_path / "thesis.txt"
    mine.write_text("years of work")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        targets = {"link": mine, "dangling link": tmp_path / "gone", "device": Path("/dev/zero")}
        path.symlink_to(targets[kind])
    with pytest.raises(
        InputError, match=r"tokens\.safetensors is kept tokens .* no file; remove it"
    ):
        kept(path, 1)
    assert mine.read_text() == "years of work" and not (tmp_path / "gone").exists()
