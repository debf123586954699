"""Which files the tasks want, whether a file is one of them, and what is said without a network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from support.command_line import Ended, Run, assert_one_sentence
from support.paths import SAMPLES

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.tasks.data import known
from mlm_eval.tasks.data.known import (
    KnownFile,
    KnownSet,
    known_files,
    known_sets,
    known_tasks,
    local_hint,
)
from mlm_eval.tasks.data.sources import DatasetName, load_dataset
from mlm_eval.tasks.finetune.task import ROLES, TASKS, make_task
from mlm_eval.tasks.zero_shot import BENCHMARKS, lambada, wikitext103

pytest_plugins = ["support.command_line_fixtures"]


def test_every_task_on_published_data_has_its_files():
    assert known_tasks() == [*BENCHMARKS, *TASKS, "tokenizer"]
    for file in known_files():
        assert (file.bytes is None) == (file.sha256 is None)
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.other or (file.urls and file.source), file.name
        assert file.sha256 is not None or file.published is None
    digests = {f.name: f.sha256 for f in known_files() if not f.other}
    assert digests["wiki.test.tokens"] == wikitext103.PAPER_TEXT_DIGEST
    assert digests["lambada_test.jsonl"] == lambada.PAPER_DIGEST
    hubs = {file.task: file.hub for file in reversed(known_files()) if file.hub}
    for name in TASKS:
        assert hubs[name].partition(":")[0] == make_task(name).hub.path
    assert hubs["wikitext103"] == str(wikitext103.HUB_TEST_SET)


@pytest.mark.realdata
def test_the_files_that_were_read_are_those_of_the_table(shared_data: Path):
    found = 0
    for path in (
        p
        for f in ("wikitext-103", "wikitext-2", "lambada", "gpt2", "bert", "squad")
        for p in (shared_data / f).iterdir()
    ):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for file in known_files():
            if file.sha256 == digest:
                assert (file.name, file.bytes) == (path.name, path.stat().st_size)
                found += 1
    read = [f for f in known_files() if f.sha256 is not None and f.published is None]
    assert found == len(read)


@pytest.mark.realdata
def test_the_sets_that_were_read_are_those_of_the_table(shared_data: Path, run: Run):
    ended = run("data", "race", "--data", shared_data / "race" / "RACE_dev_test.tar.gz")
    assert ended.code == 0 and ended.out.count("those of RACE") == 4


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A table of small files of one task; returns their content."""
    content = {"right.txt": b"one\ntwo\n", "other.txt": b"one\n"}

    def entry(name: str, other: bool) -> KnownFile:
        digest = hashlib.sha256(content[name]).hexdigest()
        size = len(content[name])
        return KnownFile(
            "lambada", name, f"the {name[:5]} set", "a/b:c", ("u",), "s", size, digest, other
        )

    files = (entry("right.txt", False), entry("other.txt", True))
    unread = KnownFile("race", "R.tar.gz", "R", "x/race:all", ("u",), "s")
    monkeypatch.setattr(known, "known_files", lambda: (*files, unread))
    return content


def test_a_file_is_told_from_others(table, tmp_path, run: Run):
    place = tmp_path / "mine"
    line = ["data", "lambada", "--data", place]
    place.write_bytes(table["right.txt"])
    ended = run(*line)
    assert ended.code == 0 and ended.out == f"{place} is right.txt, the right set\n"
    place.write_bytes(b"\xef\xbb\xbf" + table["right.txt"].replace(b"\n", b"\r\n"))
    ended = run(*line)
    assert ended.code == 0 and "with other line ends or a byte order mark" in ended.out
    place.write_bytes(table["other.txt"])
    assert_one_sentence(
        run(*line), "is other.txt, the other set, not what lambada wants (the right set)"
    )
    place.write_bytes(b"neither")
    said = (
        "is no file that is known here (7 bytes, sha256 ",
        "right.txt (the right set) has 8 bytes",
    )
    assert_one_sentence(run(*line), *said)
    place.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n")
    assert_one_sentence(run(*line), "Git LFS")
    assert_one_sentence(run(*line[:-1], tmp_path / "none"), "none does not exist")


def test_folders_and_what_was_never_read(table, tmp_path, run: Run):
    (tmp_path / "right.txt").write_bytes(table["right.txt"])
    ended = run("data", "lambada", "--data", tmp_path)
    assert ended.code == 0 and "is right.txt, the right set" in ended.out
    (tmp_path / "right.txt").unlink()
    assert_one_sentence(run("data", "lambada", "--data", tmp_path), "holds none of right.txt")
    (tmp_path / "R.zip").write_bytes(b"x")
    ended = run("data", "race", "--data", tmp_path / "R.zip")
    assert ended.code == 0 and "cannot be told: no file of race is known (1 bytes" in ended.out
    [told] = json.loads(run("data", "race", "--json", "--data", tmp_path / "R.zip").out)
    assert told["wanted"] is None and told["path"] == str(tmp_path / "R.zip")
    assert_one_sentence(run("data", "--data", tmp_path), "--data needs the task")


def silent(ended: Ended) -> Ended:
    """Return the end of a command without what it printed before."""
    return dataclasses.replace(ended, out="")


def test_a_record_says_what_files_are(table, tmp_path, run: Run):
    places = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for place, content in zip(places, (*table.values(), b"none"), strict=True):
        place.write_bytes(content)
    given = [word for place in places for word in ("--data", place)]
    ended = run("data", "lambada", "--json", *given)
    assert_one_sentence(silent(ended), f"{places[1]} is other.txt", f"{places[2]} is no file")
    told = json.loads(ended.out)
    assert [entry["path"] for entry in told] == [str(place) for place in places]
    assert [entry["name"] for entry in told] == ["right.txt", "other.txt", None]
    assert [entry["wanted"] for entry in told] == [True, False, False]
    ended = run("data", "lambada", "--json", "--data", places[0])
    assert ended.code == 0 and json.loads(ended.out) == told[:1]


def test_sets_are_told_whatever_they_come_in(monkeypatch, tmp_path, run: Run):
    read = {s.name: s for s in make_task("race").read_folder(SAMPLES / "race", ("dev", "test"))}
    sets = {n: KnownSet("race", n, len(s.examples), s.sha256) for n, s in read.items()}
    sets["dev-high"] = dataclasses.replace(sets["dev-high"], sha256=None, published="X")
    del sets["test-middle"]
    monkeypatch.setattr(known, "known_sets", lambda task: sets if task == "race" else {})
    for split in ("dev", "test"):
        shutil.copytree(SAMPLES / "race" / split, tmp_path / "RACE" / split)
    archive = shutil.make_archive(str(tmp_path / "mine"), "gztar", tmp_path, "RACE")
    for place in (tmp_path / "RACE", archive):
        ended = run("data", "race", "--data", place)
        assert ended.code == 0
        assert ended.out.splitlines() == [
            f"{place} holds dev-middle: 12 examples, those of RACE",
            f"{place} holds dev-high: 12 examples, as many as X gives; their text was not read "
            "here",
            f"{place} holds test-middle: 12 examples, with nothing to compare them with (sets of "
            "race: dev-middle, dev-high, test-high)",
            f"{place} holds test-high: 12 examples, those of RACE",
        ]
    sets["dev-middle"] = dataclasses.replace(sets["dev-middle"], sha256="0" * 64)
    sets["test-high"] = dataclasses.replace(sets["test-high"], examples=13)
    ended = run("data", "race", "--data", archive)
    assert_one_sentence(
        silent(ended),
        "12 examples, as many as RACE has, but another text",
        "12 examples, where RACE has 13",
    )
    assert_one_sentence(run("data", "qqp", "--data", tmp_path), "holds none of train.tsv, dev.tsv")


QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta b\ta c\t1\n"


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("qqp", "dev.tsv"),
        ("qqp", "dev.parquet"),
        ("mnli", "dev.parquet"),
        ("mnli", "dev.jsonl"),
        ("mnli", "MNLI.tar"),
        ("mnli", "MNLI.tar.gz"),
        ("squad", "dev.parquet"),
        ("squad", "dev.JSONL"),
        ("race", "dev.parquet"),
        ("wikitext103", "test.parquet"),
        ("wikitext103", "wiki.raw"),
        ("lambada", "test.txt"),
        ("tokenizer", "tokenizer.model"),
    ],
)
def test_a_form_that_is_not_known_cannot_be_told(run: Run, tmp_path: Path, task: str, name: str):
    (tmp_path / name).write_text(QQP)
    ended = run("data", task, "--data", tmp_path / name)
    assert ended.code == 0, ended.err
    suffix = Path(name).suffix.lower()
    assert f"{name} cannot be told: no {suffix} file of {task} is known (62 bytes, " in ended.out


def test_a_folder_of_a_task_without_known_sets_cannot_be_told(run: Run, tmp_path: Path):
    (tmp_path / "QQP").mkdir()
    (tmp_path / "QQP" / "dev.tsv").write_text(QQP)
    for folder in (tmp_path, tmp_path / "QQP"):
        ended = run("data", "qqp", "--data", folder)
        assert ended.code == 0, ended.err
        assert "holds dev: 1 examples, with nothing to compare them with" in ended.out


@pytest.mark.parametrize(
    ("task", "name"),
    [("qqp", "mine.zip"), ("mnli", "MNLI.ZIP"), ("squad", "dev.json"), ("lambada", "test.jsonl")],
)
def test_a_file_of_a_known_kind_can_be_wrong(run: Run, tmp_path: Path, task: str, name: str):
    (tmp_path / name).write_text(QQP)
    assert_one_sentence(run("data", task, "--data", tmp_path / name), "is no file that is known")


def test_sets_of_the_table_are_those_that_tasks_make():
    names = {task: set(known_sets(task)) for task in TASKS}
    levels = {f"{split}-{level}" for split in ROLES for level in ("middle", "high")}
    assert names == {
        "race": levels, "mnli": {"train", "dev-matched", "dev-mismatched"}, "qqp": set(),
        "squad": set(),
    }  # fmt: skip
    for task in TASKS:
        assert all(
            (s.sha256 is None) == (s.published is not None) for s in known_sets(task).values()
        )


def test_the_list_says_what_is_known(run: Run):
    text = run("data").out
    for file in known_files():
        assert file.other or (file.name in text and all(url in text for url in file.urls))
        assert file.other or file.sha256 is None or file.sha256 in text
        assert file.published is None or f"as {file.published} gives them; the file was not" in text
    assert "bytes and sha256 are not known here" in run("data", "tokenizer").out
    assert "wiki" not in run("data", "squad").out
    listed = json.loads(run("data", "lambada", "--json").out)
    [wanted] = [f for f in known_files() if f.task == "lambada"]
    assert listed == json.loads(json.dumps([dataclasses.asdict(wanted)]))


# --- without a network ---


@pytest.fixture
def unplugged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """No network and an empty cache; returns what was asked of the Hub."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    asked: list[str] = []

    def fail(self: object, path: str, **settings: object) -> None:
        asked.append(path)
        raise ConnectionError("Name or service not known\nmore")

    def refuse(self: object, address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return asked


def test_the_hub_is_asked_once(unplugged: list[str], monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    with pytest.raises(InputError) as caught:
        load_dataset(wikitext103.HUB_TEST_SET)
    assert str(caught.value) == (
        "Salesforce/wikitext:wikitext-103-v1:test is not in the local cache, and the Hugging Face "
        "hub cannot be reached (Name or service not known); give a local file with --data "
        "(wiki.test.tokens; `mlm-eval data wikitext103` says where to get it)"
    )
    assert unplugged == ["Salesforce/wikitext"] and not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"\(HF_HUB_OFFLINE is set\); give a local .*--data"):
        load_dataset(DatasetName("some/set", None))
    assert len(unplugged) == 1


def test_the_commands_name_the_file_to_give(
    unplugged: list[str], run: Run, folder: Path, bert: Path
):
    ended = run("lambada", "--ckpt", folder / "gpt")
    assert_one_sentence(ended, "cannot be reached", "lambada_test.jsonl; `mlm-eval data lambada`")
    out = folder / "race"
    ended = run("race", "--ckpt", bert, "--data", "ehovy/race", "--output-dir", out)
    assert_one_sentence(ended, "cannot be reached", "RACE.tar.gz; `mlm-eval data race`")
    assert not out.exists()
    assert "`mlm-eval data`" in local_hint("any/set")


def test_an_answer_of_the_hub_is_for_datasets_to_tell(unplugged, monkeypatch: pytest.MonkeyPatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="cannot be loaded by `datasets` .ZeroDivisionError"):
        load_dataset(DatasetName("some/set", None))
