"""The iterations below a root: which are chosen, which are finished, what a record is called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.series.iterations import (
    Choice,
    chosen_iterations,
    find_iterations,
    parse_iterations,
    told_iteration,
)
from mlm_eval.series.members import Members
from mlm_eval.series.names import record_path, unique_names

NUMBERS = [1000, 1500, 2000, 5000]


def root(folder: Path, *names: str, tracker: str | None = None) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
    if tracker is not None:
        (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
    return folder


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    return root(tmp_path / "run", *(f"iter_{n:07d}" for n in NUMBERS), "tokenizer", tracker="5000")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", NUMBERS),
        ("latest", [5000]),
        ("1500", [1500]),
        ("5000,1000", [1000, 5000]),
        ("1000:2000:500", [1000, 1500, 2000]),  # both ends
        ("1000:1999:500", [1000, 1500]),
        ("1000:1000:7", [1000]),
        ("1500:4999", [1500, 2000]),  # whatever there is
        ("1000:2000:1000, 5000", [1000, 2000, 5000]),
        ("1000:1500:500,1500:2000:500", [1000, 1500, 2000]),
    ],
)
def test_what_is_chosen(megatron: Path, text: str, chosen: list[int]):
    assert chosen_iterations(find_iterations(megatron), parse_iterations(text)) == chosen


@pytest.mark.parametrize(
    "text", ["", "newest", "1000:", ":", "1:2:3:4", "-5", "1e3", "2000:1000", "1:9:0", "1,,2", "²"]
)
def test_what_is_no_choice(text: str):
    with pytest.raises(ValueError, match="must be all, latest, or numbers|backwards or nowhere"):
        parse_iterations(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1000:3000:500", "has no iteration 2500, 3000; it has 1000, 1500, 2000, 5000"),
        ("7", "has no iteration 7; it has 1000, 1500, 2000, 5000"),
        ("release", "has no iteration release; it has"),
        ("2001:4999", "has no finished iteration in --iterations 2001:4999; it has 1000"),
    ],
)
def test_what_is_missing_is_an_error_that_lists_what_there_is(megatron: Path, text: str, said: str):
    with pytest.raises(InputError, match=re.escape(said)):
        chosen_iterations(find_iterations(megatron), parse_iterations(text))


def test_a_root_without_iterations(tmp_path: Path, megatron: Path):
    for folder, said in (
        (root(tmp_path / "none", "tokenizer"), "holds no folders of iterations, such as"),
        (megatron / "iter_0001000", "holds no folders of iterations (it is one itself)"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            chosen_iterations(find_iterations(folder), Choice("all"))
    for path, said in (
        (tmp_path / "no", "does not exist"),
        ("catalog:x", "is one checkpoint"),
        ("hf://a/b", "is one checkpoint"),
    ):
        with pytest.raises(InputError, match=said):
            Members([str(path)], Choice("all"), watched=False).now()


def test_newer_than_the_tracker_is_not_finished(megatron: Path):
    tracker = megatron / "latest_checkpointed_iteration.txt"
    tracker.write_text("1500\n")
    found = find_iterations(megatron)
    assert chosen_iterations(found, Choice("all")) == [1000, 1500]
    assert chosen_iterations(found, Choice("latest")) == [1500]
    with pytest.raises(InputError, match=r"iter_0005000 is not finished: the tracker file .* 1500"):
        chosen_iterations(found, parse_iterations("1000,5000"))
    left = Members([str(megatron)], Choice("all"), watched=False).unfinished()
    assert [phrase.partition(" is")[0][-7:] for phrase in left] == ["0002000", "0005000"]
    tracker.unlink()
    found = find_iterations(megatron)
    assert chosen_iterations(found, Choice("all")) == NUMBERS  # a copy of some iterations
    assert (
        chosen_iterations(found, Choice("all"), watched=True) == []
    )  # nothing says that one is whole


def test_release_comes_first_and_is_finished(tmp_path: Path):
    folder = root(tmp_path / "run", "iter_0000010", "release", tracker="10")
    found = find_iterations(folder)
    assert chosen_iterations(found, Choice("all")) == ["release", 10]
    assert chosen_iterations(found, parse_iterations("release")) == ["release"]
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    assert chosen_iterations(find_iterations(folder), Choice("all")) == ["release"]
    assert chosen_iterations(find_iterations(folder), Choice("latest")) == ["release"]


@pytest.mark.parametrize(
    ("names", "latest", "iterations"),
    [
        (["global_step_20", "global_step_100"], None, [20, 100]),  # verl
        (["global_step20", "global_step100"], "global_step20", [20]),  # DeepSpeed
        (["checkpoint-500", "checkpoint-1000"], None, [500, 1000]),
        (
            ["m--val_loss=1.25-step=99-consumed_samples=800.0", "m--step=199-last", "results"],
            None,
            [99, 199],
        ),
        (["epoch=0-step=9", "epoch=0-step=9-last"], None, [9]),
        (["iter_0000001", "iter_00000010", "iter_12", "xiter_0000002"], None, [1, 10]),
    ],
)
def test_other_layouts(tmp_path: Path, names, latest, iterations):
    folder = root(tmp_path / "run", *names)
    if latest is not None:
        (folder / "latest").write_text(latest)
    assert chosen_iterations(find_iterations(folder), Choice("all")) == iterations


def test_what_nemo_is_writing_is_left_out(tmp_path: Path):
    folder = root(tmp_path / "run", "a-step=1", "a-step=2")
    (folder / "a-step=2-unfinished").touch()
    assert list(find_iterations(folder).folders) == [1]


def test_two_folders_of_one_iteration(tmp_path: Path):
    with pytest.raises(InputError, match="two folders of iteration 5, a-step=5 and b-step=5"):
        find_iterations(root(tmp_path / "run", "a-step=5", "b-step=5"))


def test_steps_in_words_are_none():
    for name in ("timestep=5", "step", "step=", "footstep=3", "tokenizer", "iter_x"):
        assert told_iteration(Path(name)) is None, name


# --- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roots", "names"),
    [
        (["/runs/a", "/runs/b"], ["a", "b"]),
        (["/x/a/ckpt", "/x/b/ckpt", "/x/c"], ["a-ckpt", "b-ckpt", "c"]),
        (["/x/a/ckpt", "/y/a/ckpt"], ["x-a-ckpt", "y-a-ckpt"]),
        (["/a b", "/a-b", "/a?b"], ["a-b", "a-b-2", "a-b-3"]),
        (["/RUN", "/run"], ["RUN", "run-2"]),  # one file where cases are not told apart
        (["/x/run", "/x/run-2", "/X/run"], ["x-run", "run-2", "X-run-2"]),
        (["sample:gpt", "/m/gpt"], ["sample-gpt", "gpt"]),
        (["/é", "/.hidden"], ["checkpoint", "hidden"]),
        (["/run", "/run"], ["run", "run"]),
    ],
)
def test_names_are_unique_and_safe(roots: list[str], names: list[str]):
    assert unique_names(roots) == names


def test_names_of_a_hundred_roots(tmp_path: Path):
    roots = [str(tmp_path / f"{n % 7}" / f"{n % 5}?" / ("x" * 200)) for n in range(35)]
    names = unique_names(roots)
    assert len({name.casefold() for name in names}) == 35
    assert all(re.fullmatch(r"[\w.+=-]{1,110}", name) for name in names)


@pytest.mark.parametrize(
    ("output", "name", "iteration", "record"),
    [
        ("F.json", None, 1000, "F.iter_0001000.json"),
        ("F.json", "run", 1000, "F.run.iter_0001000.json"),
        ("F.json", None, "release", "F.release.json"),
        ("F.json", "hf", None, "F.hf.json"),
        ("a.b.jsonl", None, 12345678, "a.b.iter_12345678.jsonl"),
        ("F", None, 1, "F.iter_0000001"),
    ],
)
def test_what_a_record_is_called(output, name, iteration, record):
    assert record_path(Path("x", output), name, iteration) == Path("x", record)
