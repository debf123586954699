"""Files that are there whole or not at all, and the cache's place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import atomic_file, cache_root, write_text


def test_a_file_appears_whole_with_its_folders(tmp_path: Path):
    target = tmp_path / "a" / "b" / "file.json"
    with atomic_file(target, sync=True) as partial:
        partial.write_text("half")
        assert not target.exists()
        assert partial.parent == target.parent and partial.suffix != target.suffix
    assert target.read_text() == "half"
    assert write_text(target, "ä") == target
    assert target.read_bytes() == "ä".encode()
    assert os.listdir(target.parent) == ["file.json"]


def test_a_block_that_fails_changes_nothing(tmp_path: Path):
    target = write_text(tmp_path / "file.json", "old")
    with pytest.raises(ZeroDivisionError), atomic_file(target) as partial:
        partial.write_text("new")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    target = tmp_path / "file" / "below"
    with pytest.raises(InputError, match=r"below cannot be written \(.*\); name .* with --output"):
        write_text(target, "x")
    with pytest.raises(InputError, match="name another file with --plot"):
        with atomic_file(target, option="--plot"):
            pass
    with pytest.raises(OSError):
        write_text(target, "x", option=None)


def test_one_cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_root() == tmp_path / ".cache" / "mlm-eval"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_root() == tmp_path / "x" / "mlm-eval"
