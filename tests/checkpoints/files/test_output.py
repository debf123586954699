"""Files that are there whole or not at all, and the cache's place."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import (
    atomic_file,
    cache_root,
    check_writable,
    is_stream,
    write_text,
)


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


@pytest.mark.parametrize("exists", [True, False], ids=["to a file", "to nothing"])
@pytest.mark.parametrize("links", [1, 3])
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path, links: int, exists: bool):
    end = tmp_path / "elsewhere" / "record.json"
    end.parent.mkdir()
    if exists:
        end.write_text("old")
    target = end
    for number in range(links):
        link = tmp_path / f"link{number}"
        link.symlink_to(os.path.relpath(target, tmp_path) if number % 2 else target)
        target = link
    check_writable(target, "--output")
    assert write_text(target, "new") == target
    assert target.is_symlink() and end.read_text() == "new" and not end.is_symlink()
    assert sorted(path.name for path in end.parent.iterdir()) == ["record.json"]


def test_a_pipe_gets_the_contents(tmp_path: Path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to(pipe)
    for target in (pipe, link):
        check_writable(target, "--output")
        reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
        reader.start()
        write_text(target, "record")
        reader.join(10)
        assert found.pop() == "record" and stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


def test_an_open_descriptor_gets_the_contents(tmp_path: Path):
    """As in `--output /dev/stdout > file`: the file is not replaced behind its owner's back."""
    file = tmp_path / "file"
    with file.open("w") as stream:
        stream.write("before\n")
        stream.flush()
        link = tmp_path / "link"
        link.symlink_to(f"/dev/fd/{stream.fileno()}")
        for target in (Path(f"/dev/fd/{stream.fileno()}"), link):
            inode = file.stat().st_ino
            check_writable(target, "--output")
            write_text(target, "record\n")
            assert file.stat().st_ino == inode and link.is_symlink()
    assert file.read_text() == "before\nrecord\nrecord\n"
    read, write = os.pipe()
    write_text(f"/dev/fd/{write}", "record")
    assert os.read(read, 100) == b"record"
    os.close(read)
    os.close(write)


def test_a_device_stays():
    device = Path("/dev/null")
    assert is_stream(device) and not is_stream(Path(__file__))  # before anything is written
    check_writable(device, "--output")
    write_text(device, "record")
    assert stat.S_ISCHR(device.stat().st_mode)
