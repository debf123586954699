"""`--overwrite` removes a checkpoint and nothing else; what killed conversions leave is cleared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import random_models
from support.paths import ORACLES, SAMPLES

from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import check_folder, output_folder
from mlm_eval.checkpoints.folders.checkpoint_files import (
    foreign_files,
    remove_checkpoint,
    weight_files,
)
from mlm_eval.checkpoints.folders.locks import Lock
from mlm_eval.checkpoints.open import open_checkpoint

FORMATS = ("hf", "megatron", "torch_dist")
SOURCE = random_models.config(vocab_size=256)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def written(folder: Path, to: str, *, seed: int = 0, **more: object) -> Path:
    """Write a small model with its tokenizer, in many small files."""
    words = folder.parent / "words"
    if not words.exists():
        random_models.byte_vocabulary(words)
    if to != "hf":
        more = {"tp": 2, **more}
    checkpoint = random_models.checkpoint(SOURCE, seed=seed)
    convert(checkpoint, to, folder, tokenizer=words, max_shard_size="20KB", **more)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("to", FORMATS)
def test_all_that_a_conversion_writes_is_a_checkpoints(tmp_path, to):
    target = written(tmp_path / "out", to)
    assert foreign_files(target) == [] and weight_files(target)
    first = contents(target)
    written(target, to, seed=1, overwrite=True)
    assert contents(target) != first and set(contents(target)) == set(first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "words"]
    assert remove_checkpoint(target) and not target.exists()


@pytest.mark.parametrize(
    "folder", [SAMPLES / "gpt", SAMPLES / "bert", *sorted(ORACLES.glob("*_*"))]
)
def test_what_megatron_saves_is_a_checkpoints(folder):
    """Genuine ones; beside them only what the tests keep there."""
    assert weight_files(folder)
    known = {"README.md", "LICENSE", "reference.pt", "provenance.json"}
    assert {name for name in foreign_files(folder) if not name.endswith((".pt", ".json"))} <= known


OTHERS = (
    "thesis.txt",
    "src/a.py",
    "iter_0000001/notes.md",
    "release/mp_rank_00/x.txt",
    "data.safetensors",
    "config.yaml",
    ".hidden",
    "tokenizer/mine.txt",
    "more/model.safetensors/x",
    "model.bin.old",
    "src/",
)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("to", FORMATS)
def test_a_folder_with_anything_else_is_not_replaced(tmp_path, to, name):
    target = written(tmp_path / "out", to)
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("/"):
        (target / name).mkdir()
    else:
        (target / name).write_text("years of work")
    before = contents(target)
    with pytest.raises(InputError, match="is no part of a checkpoint, so it is not replaced"):
        written(target, to, overwrite=True)
    assert contents(target) == before and (target / name).exists()
    assert not remove_checkpoint(target)
    assert name.endswith("/") or (target / name).read_text() == "years of work"


def test_a_page_of_a_model_goes_with_it_and_no_other_page_does(tmp_path):
    for to in ("hf", "megatron"):
        target = written(tmp_path / to, to)
        (target / "README.md").write_text("mine")
        assert foreign_files(target) == ([] if to == "hf" else ["README.md"])


def test_a_folder_that_is_called_like_a_checkpoint_is_none(tmp_path):
    for name in ("release", "iter_0000001", "mp_rank_00"):
        place = tmp_path / "mine" / name
        place.mkdir(parents=True)
        (place / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="mine holds no checkpoint"):
        written(tmp_path / "mine", "megatron", overwrite=True)
    assert len(contents(tmp_path / "mine")) == 3


def test_several_checkpoints_are_not_replaced_by_one(tmp_path):
    target = written(tmp_path / "out", "megatron")
    (target / "release").rename(target / "iter_0001000")
    written(tmp_path / "more", "megatron")
    (tmp_path / "more" / "release").rename(target / "iter_0002000")
    with pytest.raises(InputError, match=r"2 checkpoints \(iter_0001000 to iter_0002000\)"):
        check_folder(target, overwrite=True)


def test_a_link_inside_goes_and_what_it_leads_to_stays(tmp_path):
    target = written(tmp_path / "out", "megatron", tp=1)
    (target / "release").rename(tmp_path / "elsewhere")
    (target / "release").symlink_to(tmp_path / "elsewhere")
    (target / "mp_rank_00").mkdir()
    (target / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"")
    before = contents(tmp_path / "elsewhere")
    assert remove_checkpoint(target)
    assert contents(tmp_path / "elsewhere") == before and before


# --- What a killed process leaves ---------------------------------------------------------------


KILLED = """
import os, signal, sys
from pathlib import Path
from mlm_eval.checkpoints.files import output
target, where = Path(sys.argv[1]), sys.argv[2]
def die(*given):
    os.kill(os.getpid(), signal.SIGKILL)
replace, calls = os.replace, []
def replacing(source, destination):
    calls.append(destination)
    if where == "before the switch" or (where == "within it" and len(calls) == 2):
        die()
    replace(source, destination)
    if where == "after it" and len(calls) == 2:
        die()
os.replace = replacing
with output.output_folder(target, overwrite=True) as folder:
    (folder / "mp_rank_00").mkdir()
    (folder / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"new")
    if where == "while writing":
        die()
"""
"""Replaces a checkpoint and is killed somewhere."""


@pytest.mark.process
@pytest.mark.parametrize(
    ("where", "exists"),
    [
        ("while writing", True),
        ("before the switch", True),
        ("within it", True),
        ("after it", True),
        ("while writing", False),
        ("before the switch", False),  # of a new folder, the switch is one rename
    ],
)
def test_the_next_conversion_clears_what_a_killed_one_left(tmp_path, where, exists):
    target = tmp_path / "out.1 [a]"
    file = target / "mp_rank_00" / "model_optim_rng.pt"
    if exists:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"old")
    (tmp_path / ".out.1 [a].partial-notes").mkdir()  # not ours
    subprocess.run([sys.executable, "-c", KILLED, target, where], check=False)
    left = {path.name for path in tmp_path.iterdir()} - {target.name}
    assert len(left) == (3 if where == "within it" else 2)
    assert target.exists() == (exists and where != "within it")

    if exists:  # a checkpoint is never lost, and the old one only for the new one
        with pytest.raises(InputError, match="already exists"), output_folder(target):
            pass
        assert file.read_bytes() == (b"new" if where == "after it" else b"old")
    with output_folder(target, overwrite=True) as folder:
        (folder / "mp_rank_00").mkdir()
        (folder / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"third")
    assert file.read_bytes() == b"third"
    assert {path.name for path in tmp_path.iterdir()} == {".out.1 [a].partial-notes", target.name}


def test_a_conversion_that_still_runs_is_left_alone(tmp_path):
    with output_folder(tmp_path / "out") as first:
        (first / "a").write_text("a")
        with pytest.raises(InputError, match="out is being written by another process"):
            with output_folder(tmp_path / "out"):
                pass
        with output_folder(tmp_path / "out2"):  # a name that only begins alike
            pass
        assert (first / "a").exists()
    assert (tmp_path / "out" / "a").read_text() == "a"
    Lock(tmp_path / "out").release()


def test_a_result_that_came_meanwhile_stays(tmp_path):
    with pytest.raises(InputError, match="already exists"), output_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")
    assert contents(tmp_path) == {"out/theirs": b"theirs"}


def test_the_folder_is_opened_again(tmp_path):
    for to in FORMATS:
        assert open_checkpoint(written(tmp_path / to, to)).config.num_layers == SOURCE.num_layers
