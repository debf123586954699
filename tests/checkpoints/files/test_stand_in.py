"""What lies in the place of a file is named as such by every reader, and real files never are."""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import PROJECT

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.distcp import open_folder
from mlm_eval.checkpoints.files.safetensors_file import read_safetensors
from mlm_eval.checkpoints.files.stand_in import HEAD_BYTES, describe_stand_in, refuse_stand_in
from mlm_eval.checkpoints.files.text_file import parse_json, read_json_object, read_text
from mlm_eval.checkpoints.files.torch_file import read_pickle, read_torch_file
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import load_tokenizer
from mlm_eval.tasks.data.sources import DatasetName, read_data
from mlm_eval.tasks.finetune.task import make_task
from mlm_eval.tasks.language.data import read_documents
from mlm_eval.tasks.zero_shot.sequences import read_lines

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
STAND_INS = {
    "lfs": (POINTER, "is a Git LFS pointer, .*; run `git lfs pull`"),
    "lfs of 2014": (POINTER.replace(b"git-lfs.github.com", b"hawser.github.com"), "Git LFS"),
    "lfs, crlf and mark": (codecs.BOM_UTF8 + POINTER.replace(b"\n", b"\r\n"), "Git LFS pointer"),
    "annex": (b"/annex/objects/SHA256E-s12--ab.bin\n", "git-annex pointer, .*`git annex get`"),
    "xet": (b"# xet version 0\nfilesize = 12\nhash = 'ab'\n", "Xet pointer"),
    "page": (b"<!DOCTYPE html>\n<html lang=en><title>Sign in</title>", "is an HTML page, .* again"),
    "page in capitals": (b"\r\n  <HTML><HEAD>\r\n<TITLE>302 Found</TITLE>", "is an HTML page"),
    "xhtml": (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "-//W3C">', "is an HTML page"),
    "bucket": (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchKey</Code></Error>',
        r"XML answer of a storage service \(NoSuchKey\)",
    ),
    "bucket, bare": (b"<Error><Code>AccessDenied</Code></Error>", "AccessDenied"),
    "api": (b'{"error":"Repository not found"}', "server's answer .*Repository not found"),
    "api of GitHub": (
        b'{"message": "Not Found", "documentation_url": "https://docs", "status": "404"}',
        "is a server's answer",
    ),
    "raw": (b"404: Not Found", r"server's answer \(404: Not Found\)"),
    "gated": (
        b"Access to model meta-llama/L is restricted and you are not in the authorized list.",
        "is a server's answer",
    ),
    "empty": (b"", "is empty; download"),
    "hole": (bytes(5 * HEAD_BYTES), "zero bytes: its download or copy did not end"),
}


def _tokenizer_file(path: Path, content: bytes, name: str) -> None:
    path = path.with_name(name)
    path.write_bytes(content)
    load_tokenizer(vocab_file=path)


def _bpe(path: Path, content: bytes) -> None:
    (path.parent / "vocab.json").write_text('{"a": 0}')
    (path.parent / "merges.txt").write_bytes(content)
    load_tokenizer(directory=path.parent)


def _hub_folder(path: Path, content: bytes, name: str) -> None:
    config = '{"model_type": "gpt2", "vocab_size": 8}'
    (path.parent / "config.json").write_text(config)
    (path.parent / name).write_bytes(content)
    open_checkpoint(path.parent)


def _ranks(path: Path, content: bytes) -> None:
    folder = path.parent / "iter_0000001" / "mp_rank_00"
    folder.mkdir(parents=True)
    (folder / "model_optim_rng.pt").write_bytes(content)
    open_checkpoint(path.parent)


def _named(path: Path, content: bytes, name: str) -> Path:
    path = path.with_name(name)
    path.write_bytes(content)
    return path


READERS: dict[str, Callable[[Path, bytes], object]] = {
    "text": lambda path, content: read_text(_named(path, content, "a.txt")),
    "json": lambda path, content: read_json_object(_named(path, content, "a.json")),
    "torch": lambda path, content: read_torch_file(_named(path, content, "a.pt")),
    "pickle": lambda path, content: read_pickle(_named(path, content, ".metadata")),
    "safetensors": lambda path, content: read_safetensors(_named(path, content, "a.safetensors")),
    "checkpoint file": lambda path, content: open_checkpoint(_named(path, content, "model.pt")),
    "zip": lambda path, content: open_checkpoint(_named(path, content, "megatron.zip")),
    "ranks": _ranks,
    "hub safetensors": lambda p, content: _hub_folder(p, content, "model.safetensors"),
    "hub bin": lambda path, content: _hub_folder(path, content, "pytorch_model.bin"),
    "hub index": lambda p, content: _hub_folder(p, content, "model.safetensors.index.json"),
    "config": lambda path, content: _hub_folder(path, content, "config.json"),
    "vocab.txt": lambda path, content: _tokenizer_file(path, content, "vocab.txt"),
    "tokenizer.json": lambda path, content: _tokenizer_file(path, content, "tokenizer.json"),
    "merges": _bpe,
    "data": lambda path, content: read_data(
        _named(path, content, "wiki.test.tokens"), column="text", default=DatasetName("x", None)
    ),
    "documents": lambda path, content: list(
        read_documents([_named(path, content, "a.txt")], whole_files=True)
    ),
    "score": lambda path, content: read_lines(_named(path, content, "a.jsonl"), None),
    "mnli": lambda path, content: make_task("mnli").read_part(
        str(_named(path, content, "dev_matched.tsv")), "dev"
    ),
    "squad": lambda path, content: make_task("squad").read_part(
        str(_named(path, content, "dev-v1.1.json")), "dev"
    ),
    "race": lambda path, content: make_task("race").read_part(
        str(_named(path, content, "1.txt")), "dev"
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", STAND_INS)
def test_every_reader_names_what_it_was_given(kind: str, reader: str, tmp_path: Path):
    content, message = STAND_INS[kind]
    with pytest.raises(InputError, match=message) as caught:
        READERS[reader](tmp_path / "file", content)
    assert "\n" not in str(caught.value)


def test_a_part_of_a_distributed_checkpoint_that_is_a_pointer(tmp_path: Path):
    source = PROJECT / "tests/oracles/mcore016_gpt2_tp2_dist"
    folder = shutil.copytree(source, tmp_path / "copy")
    part = next(folder.rglob("__0_0.distcp"))
    part.write_bytes(POINTER)
    with pytest.raises(InputError, match=r"__0_0\.distcp is a Git LFS pointer"):
        open_checkpoint(folder)
    part.unlink()
    part.symlink_to("../blobs/absent")
    with pytest.raises(InputError, match="is a link to ../blobs/absent, which is not there"):
        open_checkpoint(folder)
    assert open_folder(next(source.rglob(".metadata")).parent).tensors


def test_a_link_whose_target_is_gone_is_named(tmp_path: Path):
    (tmp_path / "model.pt").symlink_to("../blobs/absent")
    for read in (open_checkpoint, read_torch_file, read_text):
        with pytest.raises(InputError, match="is a link to ../blobs/absent, which is not there"):
            read(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content",
    [
        b" = Robert = \n",
        b'{"text": "404: Not Found, said the page"}\n',
        b'{"error": "a label", "text": "of somebody\'s data"}',
        b'{"message": "a line"}\n{"message": "another line"}\n',
        b"Not found in the archives, the letter was lost.\n",
        b"version 3 of the text\n",
        b"<unk> <html-like> mark-up in WikiText\n",
        json.dumps({"vocab": {"<html>": 3}}).encode(),
        b"\0\0\0\0 but something follows",
        b"\x80\x02}q\x00.",
        b"PK\x03\x04",
    ],
)
def test_data_is_not_taken_for_something_else(content: bytes):
    assert describe_stand_in(content[:HEAD_BYTES], len(content)) is None


def test_files_that_ship_are_not_taken_for_something_else():
    files = [path for path in (PROJECT / "checkpoints/samples").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        refuse_stand_in(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a b\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("a b\n".encode("utf-32"), "is UTF-32 text; save it as UTF-8"),
        (b"\x1f\x8b\x08\x00abc", "is gzip-compressed; unpack it first"),
        (b"\x28\xb5\x2f\xfdabc", "is zstd-compressed; unpack it first"),
        (b"caf\xe9", "line 1 is not UTF-8 text"),
    ],
)
def test_another_encoding_is_named(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(path)


def test_marks_and_line_ends_make_no_difference(tmp_path: Path):
    path = tmp_path / "file.json"
    texts = set()
    for content in (b'{"a": 1,\n"b": 2}\n', b'\xef\xbb\xbf{"a": 1,\r\n"b": 2}\r\n'):
        path.write_bytes(content)
        texts.add(read_text(path))
        assert read_json_object(path) == {"a": 1, "b": 2}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"a": 1, "a": 2}', "'a' stands in one object twice, with different values"),
        ('[{"b": {"a": [1], "a": [2]}}]', "'a' stands in one object twice"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ('{"a":' * 150 + "1" + "}" * 150, "nested more than 100 deep"),
        ("[" * 100_000, "is not JSON"),
    ],
    ids=["twice", "twice within", "deep lists", "deep objects", "endless"],
)
def test_json_that_readers_take_differently_is_refused(text: str, what: str):
    with pytest.raises(InputError, match=what):
        parse_json(text, "x.json")


def test_json_that_says_one_thing_is_read():
    assert parse_json('{"a": 1, "a": 1, "b": "[[[["}', "x.json") == {"a": 1, "b": "[[[["}
    deep = "[" * 100 + "]" * 100
    assert parse_json(deep, "x.json") == json.loads(deep)
    text = json.dumps("[" * 500)
    assert parse_json(text, "x.json") == "[" * 500


def test_whole_numbers_are_no_larger_than_floats():
    """What reads them divides by them and formats them."""
    digits = "1" + "0" * 400
    for text in (f'{{"a": {digits}}}', f"[1, -{digits}]"):
        with pytest.raises(InputError, match="is not JSON .a whole number of 40[12] digits"):
            parse_json(text, "F.json")
    for text in (f'{{"a": "{digits}"}}', digits[:300], f"0.{digits}"):
        assert parse_json(text, "F.json") == json.loads(text)
