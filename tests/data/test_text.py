"""What --data may name: files, folders and sets, and one sentence for each that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.tasks.data.sources import DatasetName, RawData, parse_dataset_name, read_data

HUB = DatasetName("Salesforce/wikitext", "wikitext-103-v1")


def read(data: str | Path | None) -> RawData:
    return read_data(data, column="text", default=HUB)


def test_a_file_comes_back_byte_for_byte_and_as_lines(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes("a \r\n\u2028 caf\u00e9\n".encode())
    raw = read(str(path))
    assert (raw.path, raw.rows) == (str(path), None)
    assert raw.content == path.read_bytes()
    assert raw.text() == "a \n\u2028 caf\u00e9\n"


@pytest.mark.parametrize("content", [b"", b" \n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="file.txt is empty"):
        read(path)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("caf\u00e9 au lait".encode("latin-1"), "line 1 is not UTF-8 text .byte 0xe9"),
        ("a b".encode("utf-16-le") + b"\xff", "line 1 is not UTF-8 text .byte 0xff"),
    ],
)
def test_another_encoding_is_named_with_its_first_byte(tmp_path, content, where):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"file.txt, {where}"):
        read(path).text()


@pytest.mark.parametrize(
    "name", ["absent.tokens", "/absent/wiki", "./absent", "some/folder/file.jsonl"]
)
def test_a_missing_file_is_not_looked_for_on_the_hub(name, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(InputError, match=f"{name} does not exist"):
        read(name)


def save_splits(folder: Path) -> Path:
    import datasets

    splits = {"validation": ["other words"], "test": ["first", "second"]}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": rows}) for name, rows in splits.items()}
    ).save_to_disk(folder)
    return folder


def test_a_saved_set_and_its_splits(tmp_path):
    import datasets

    folder = save_splits(tmp_path / "splits")
    datasets.Dataset.from_dict({"text": ["alone"]}).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one").rows == ["alone"]
    assert read(str(folder)).rows == ["first", "second"]
    chosen = read(f"{folder}::validation")
    assert chosen.rows == ["other words"]
    assert chosen.path == f"{folder}:validation"
    with pytest.raises(InputError, match="no split dev; it has validation, test"):
        read(f"{folder}::dev")


def test_a_folder_that_datasets_can_read(tmp_path, monkeypatch, capfd):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    assert read(folder).rows == ["first", "second"]
    assert capfd.readouterr().err == ""  # progress bars are for terminals
    assert not datasets.are_progress_bars_disabled()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="nothing:test cannot be loaded by `datasets`"):
        read(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"page": ["a b"]}, "no column 'text'; it has page"),
        ({"text": ["", " "]}, "holds no text in its column 'text'"),
        ({"text": ["a b\n", None]}, "row 2 of 'text' is None"),
    ],
)
def test_unusable_sets_are_named_with_the_reason(tmp_path, columns, message):
    import datasets

    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "set")
    assert str(tmp_path / "set") in str(caught.value)


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        (None, ("Salesforce/wikitext", "wikitext-103-v1", "test")),
        ("wikitext", ("Salesforce/wikitext", "wikitext-103-v1", "test")),
        ("Salesforce/wikitext", ("Salesforce/wikitext", "wikitext-103-v1", "test")),
        ("wikitext:wikitext-103-v1:test", ("Salesforce/wikitext", "wikitext-103-v1", "test")),
        (
            "wikitext:wikitext-2-v1:validation",
            ("Salesforce/wikitext", "wikitext-2-v1", "validation"),
        ),
        ("me/mine", ("me/mine", None, "test")),
        ("me/mine::dev", ("me/mine", None, "dev")),
    ],
)
def test_dataset_names_and_a_hub_out_of_reach(monkeypatch, data, asked):
    import datasets

    calls = []

    def offline(path: str, config: str | None, *, split: str) -> None:
        calls.append((path, config, split))
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        InputError, match="cannot be reached .*give a local file with --data"
    ) as caught:
        read(data)
    assert calls == [asked]
    assert "\n" not in str(caught.value)


def test_the_hub_itself_offline_is_one_sentence():
    """The environment of the tests forbids the network: this is what a user without one sees."""
    with pytest.raises(
        InputError, match="wikitext-103-v1:test is not in the local cache, .*HF_HUB_OFFLINE is set"
    ):
        read(None)


def test_a_folder_here_wins_over_the_hubs_old_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_dataset_name("wikitext:a", HUB) == DatasetName("Salesforce/wikitext", "a", "test")
    (tmp_path / "wikitext").mkdir()
    assert parse_dataset_name("wikitext:a", HUB) == DatasetName("wikitext", "a", "test")


@pytest.mark.parametrize("name", [":a:test", "set:config:"])
def test_names_with_empty_parts(name):
    with pytest.raises(InputError, match="expected a file or a dataset as NAME"):
        read(name)
