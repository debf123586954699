"""Data made to do harm: texts, JSON lines, RACE's archives, GLUE's tables, SQuAD."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from functools import partial
from typing import Any

from support.reliability.attacks import Attack, Bases, Words, attacks, check
from support.reliability.warm_commands import Sandbox, WarmCommands

pytest_plugins = ["support.reliability.warm_fixtures"]

DEEP = "[" * 100_000
Content = str | bytes


def _written(name: str, content: Content, sandbox: Sandbox) -> object:
    path = sandbox.input / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    path.write_bytes(data)
    return path


def _lambada(content: Content, sandbox: Sandbox, bases: Bases) -> Words:
    data = _written("lambada.jsonl", content, sandbox)
    return ["lambada", "--ckpt", bases.gpt, "--data", data, "--device", "cpu", "--limit", 3]


def _wiki(content: Content, sandbox: Sandbox, bases: Bases) -> Words:
    data = _written("wiki.test.tokens", content, sandbox)
    words = ["wikitext103", "--ckpt", bases.gpt, "--data", data, "--device", "cpu"]
    return [*words, "--limit", 3]


def _score(content: Content, sandbox: Sandbox, bases: Bases, base: str = "gpt") -> Words:
    data = _written("lines.jsonl", content, sandbox)
    words = ["score", "--ckpt", getattr(bases, base), "--input", data, "--device", "cpu"]
    return [*words, "--output", sandbox.output]


def _generate(content: Content, sandbox: Sandbox, bases: Bases) -> Words:
    data = _written("prompts.jsonl", content, sandbox)
    words = ["generate", "--ckpt", bases.gpt, "--input", data, "--device", "cpu"]
    return [*words, "--max-new-tokens", 1]


LINES: dict[str, Content] = {
    "deep lists": '{"text": ' + DEEP,
    "deep objects": '{"text":' * 50_000,
    "no object": "[1]\n",
    "a number": "7\n",
    "a text that is a number": '{"text": 7}\n',
    "a text that is a list": '{"text": ["a"]}\n',
    "no text": '{"a": 1}\n',
    "5,000 digits": '{"text": ' + "9" * 5000 + "}\n",
    "a surrogate": '{"text": "\\ud800 b"}\n',
    "bytes that are no text": b'{"text": "\xff\xfe"}\n',
    "a key of escapes": '{"\x1b[2J": 1}\n',
    "a key of a megabyte": json.dumps({"k" * 1_000_000: 1}) + "\n",
    "an empty text": '{"text": ""}\n',
    "zeros": b"\0" * 1000,
    "nothing": "",
    "blank lines": "\n\n\n",
    "half a line": '{"text": "abc',
    "a pickle": b"\x80\x02cos\nsystem\n.",
    "gzip": gzip.compress(b'{"text": "a b"}\n'),
}
# Nothing is asked there, and nothing is answered.
EMPTY = ("an empty text", "nothing")
ATTACKS = [
    Attack(
        f"{name}: {what}",
        partial(prepare, content),
        refused=None if name == "score" and what == EMPTY[0] else True,
    )
    for name, prepare in (("lambada", _lambada), ("score", _score), ("generate", _generate))
    for what, content in LINES.items()
    if (name, what) != ("generate", "an empty text")
]
TOKENS: dict[str, Any] = {
    "texts": ["a"],
    "-1": [1, -1],
    "beyond the vocabulary": [1, 10**6],
    "2**70": [1, 2**70],
    "lists": [[1], [2]],
    "floats": [1.5, 2.5],
    "true": [True, True],
    "null": [None, None],
    "nothing": [],
    "a text": "123",
    "an object": {"a": 1},
}
ATTACKS += [
    Attack(
        f"score: tokens that are {what}",
        partial(_score, json.dumps({"tokens": it}) + "\n"),
        refused=None if what in EMPTY else True,
    )
    for what, it in TOKENS.items()
]
ATTACKS += [
    Attack(
        f"score: {name} that is {what}",
        partial(_score, json.dumps({"tokens": [5, 6], name: it}) + "\n", base="bert"),
    )
    for name in ("tokentypes", "padding_mask")
    for what, it in TOKENS.items()
    if not (name == "padding_mask" and what == "nothing")
]
WIKI: dict[str, Content] = {
    "100,000 open brackets": " = A = \n " + "( " * 100_000,
    "100,000 quotes": " = A = \n " + "' " * 100_000 + '" ' * 100_000,
    "100,000 equal signs": "= " * 100_000,
    "a word of a megabyte": " = A = \n " + "x" * 1_000_000,
    "200,000 @": " = A = \n 1" + " @,@ " * 200_000,
    "escapes": " = A = \n \x1b[2J\u202e " * 50,
    "NULs": " = A = \n \0\0\0 " * 50,
    "combining marks": " = A = \n a" + "\u0301" * 100_000,
}
ATTACKS += [
    Attack(f"wikitext103: {what}", partial(_wiki, content), refused=None)
    for what, content in WIKI.items()
]
BAD_WIKI: dict[str, Content] = {
    "nothing": "",
    "blank": " \n \n",
    "no text": b"\xff\xfe\xfd" * 100,
    "UTF-16": "abc def".encode("utf-16"),
    "a pickle": b"\x80\x02cos\nsystem\n.",
    "gzip": gzip.compress(b"abc" * 100),
    "a page": "<!DOCTYPE html><html>" + "x" * 100,
}
ATTACKS += [
    Attack(f"wikitext103: {what}", partial(_wiki, content)) for what, content in BAD_WIKI.items()
]


# ---- fine-tuning -------------------------------------------------------------------------------


def _tuning(task: str, sandbox: Sandbox, bases: Bases, *more: object) -> Words:
    return [
        *(task, "--ckpt", bases.bert, "--output-dir", sandbox.output, "--device", "cpu"),
        *("--data", sandbox.input, "--max-steps", 1, "--epochs", 1, "--global-batch", 1, *more),
        *("--seq-length", 32, "--train-limit", 2, "--dev-limit", 2),
    ]


PASSAGE = {
    "id": "high1.txt",
    "article": "the cat sat on the mat",
    "questions": ["who sat?", "where was the cat?"],
    "options": [["a", "b", "c", "d"], ["a", "b", "c", "d"]],
    "answers": ["A", "B"],
}


def _race_folder(content: Any, sandbox: Sandbox, bases: Bases, level: str = "high") -> Words:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    for split in ("train", "dev"):
        _written(f"{split}/{level}/1.txt", text, sandbox)
    return _tuning("race", sandbox, bases, "--max-qa-length", 16)


WRONG: dict[str, Any] = {
    "a number": 7,
    "null": None,
    "an object": {"a": 1},
    "a list of numbers": [1, 2],
    "a text": "\x1b[2J",
    "lists of numbers": [[1], [2]],
    "nothing": [],
}
PASSAGES: dict[str, Any] = {
    f"{name} is {what}": PASSAGE | {name: value}
    for name in ("article", "questions", "options", "answers")
    for what, value in WRONG.items()
    if (name, what) != ("article", "a text")
}
PASSAGES |= {
    "deep lists": DEEP,
    "a list": [],
    "answers of no letter": PASSAGE | {"answers": ["A", "\x1b[2J"]},
    "answers of E": PASSAGE | {"answers": ["A", "E"]},
    "no text": b"\xff\xfe",
    "an article of surrogates": PASSAGE | {"article": "\ud800"},
}
ATTACKS += [Attack(f"race: {what}", partial(_race_folder, it)) for what, it in PASSAGES.items()]
ATTACKS += [
    Attack(f"race: {what}", partial(_race_folder, it), refused=None)
    for what, it in {
        "an article of 5 MB": PASSAGE | {"article": "the cat " * 600_000},
        "an id of escapes": PASSAGE | {"id": "\x1b[2J\u202e"},
        "an id of a path": PASSAGE | {"id": "../../../canary"},
        "an article of escapes": PASSAGE | {"article": "\x1b[2J the cat"},
        "10,000 open brackets": PASSAGE | {"article": "((" * 10_000},
    }.items()
]
ATTACKS += [
    Attack(
        f"race: a level {level[:12]!a}", partial(_race_folder, PASSAGE, level=level), refused=None
    )
    for level in ("\x1b[2J", "a\nb", "n" * 200, "\u202e", "..x")
]


def _race_archive(
    build: Callable[[tarfile.TarFile], None], sandbox: Sandbox, bases: Bases, mode: str = "w:gz"
) -> Words:
    path = sandbox.input / "RACE.tar.gz"
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for split in ("train", "dev"):
            _member(archive, f"RACE/{split}/high/1.txt", json.dumps(PASSAGE).encode())
        build(archive)
    return _tuning("race", sandbox, bases, "--max-qa-length", 16)


def _member(archive: tarfile.TarFile, name: str, content: bytes = b"", **changes: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))


TRAIN = "RACE/train/high/2.txt"
ARCHIVES: dict[str, Callable[[tarfile.TarFile], None]] = {
    "a passage of 600 MB": lambda a: _member(a, TRAIN, b" " * 600_000_000),
    "a passage of 64 GB of holes": lambda a: _member(
        a, TRAIN, pax_headers={"GNU.sparse.major": "0", "GNU.sparse.minor": "1",
                               "GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 36)}
    ),
    "rubbish": lambda a: _member(a, TRAIN, b"\xff\xfe"),
    "deep lists": lambda a: _member(a, TRAIN, DEEP.encode()),
    "a name of escapes": lambda a: _member(a, "RACE/train/high/\x1b[2J.txt", b"x"),
}  # fmt: skip
ARCHIVES_MAY_BE_READ: dict[str, Callable[[tarfile.TarFile], None]] = {
    "a link": lambda a: _member(a, TRAIN, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": lambda a: _member(a, TRAIN, type=tarfile.LNKTYPE, linkname="RACE/dev/high/9"),
    "a device": lambda a: _member(a, TRAIN, type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "a name that goes up": lambda a: _member(a, "../../../canary", b"x"),
    "an absolute name": lambda a: _member(a, "/tmp/canary", b"x"),
    "600 MB beside the passages": lambda a: _member(a, "RACE/zeros", bytes(600_000_000)),
    "a name of surrogates": lambda a: _member(a, "RACE/\udcff/x.txt", b"x"),
}
ATTACKS += [
    Attack(f"race archive: {what}", partial(_race_archive, build))
    for what, build in ARCHIVES.items()
]
ATTACKS += [
    Attack(f"race archive: {what}", partial(_race_archive, build), refused=None)
    for what, build in ARCHIVES_MAY_BE_READ.items()
]


def _squad(content: Any, sandbox: Sandbox, bases: Bases) -> Words:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    for role in ("train", "dev"):
        _written(f"{role}-v1.1.json", text, sandbox)
    return _tuning("squad", sandbox, bases, "--max-query-length", 8, "--doc-stride", 8)


def _squad_of(**question: Any) -> dict[str, Any]:
    entry = {"id": "q1", "question": "who sat?", "answers": [{"text": "cat", "answer_start": 4}]}
    paragraph = {"context": question.pop("context", "the cat sat"), "qas": [entry | question]}
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}


SQUADS: dict[str, Any] = {
    "deep lists": DEEP,
    "a list": [],
    "data that is a text": {"data": "x"},
    "data of numbers": {"data": [1]},
    "paragraphs of numbers": {"data": [{"paragraphs": [1]}]},
    "no text": b"\xff\xfe",
    "a context that is a list": _squad_of(context=[1]),
    "a question that is a number": _squad_of(question=7),
    "an id that is a list": _squad_of(id=["x"]),
    "answers that are a text": _squad_of(answers="cat"),
    "answers of numbers": _squad_of(answers=[1]),
    "an answer at -5": _squad_of(answers=[{"text": "cat", "answer_start": -5}]),
    "an answer at 2**70": _squad_of(answers=[{"text": "cat", "answer_start": 2**70}]),
    "an answer at a text": _squad_of(answers=[{"text": "cat", "answer_start": "4"}]),
    "an answer that is a number": _squad_of(answers=[{"text": 7, "answer_start": 4}]),
    "a surrogate": _squad_of(context="the \ud800 sat"),
    "5,000 digits": '{"data": ' + "9" * 5000 + "}",
}
ATTACKS += [Attack(f"squad: {what}", partial(_squad, it)) for what, it in SQUADS.items()]
ATTACKS += [
    Attack(f"squad: {what}", partial(_squad, it), refused=None)
    for what, it in {
        "an id of escapes": _squad_of(id="\x1b[2J\u202e"),
        "an id of a path": _squad_of(id="../../canary"),
        "a context of 2 MB": _squad_of(context="the cat sat " * 170_000),
        "is_impossible that is a text": _squad_of(is_impossible="\x1b[2J"),
    }.items()
]


def _qqp(content: Content, sandbox: Sandbox, bases: Bases) -> Words:
    for role in ("train", "dev"):
        _written(f"{role}.tsv", content, sandbox)
    return _tuning("qqp", sandbox, bases)


HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
ROW = "1\t2\t3\twho sat?\twhere was the cat?\t1\n0\t2\t3\twho?\twhere?\t0\n"
GLUE: dict[str, Content] = {
    "nothing": "",
    "a header alone": HEADER,
    "no header": ROW,
    "escapes in a header": HEADER.replace("question1", "\x1b[2J") + ROW,
    "a label of escapes": HEADER + ROW.replace("\t1\n", "\t\x1b[2J\n"),
    "a label of 5,000 digits": HEADER + ROW.replace("\t1\n", "\t" + "9" * 5000 + "\n"),
    "no text": HEADER.encode() + b"\xff\xfe\n",
    "zeros": b"\0" * 1000,
    "a million columns": "a\t" * 1_000_000 + "\n" + ROW,
}
ATTACKS += [  # rows without a header are read by position, and that is said
    Attack(f"qqp: {what}", partial(_qqp, it), refused=None if what == "no header" else True)
    for what, it in GLUE.items()
]
ATTACKS += [
    Attack(f"qqp: {what}", partial(_qqp, it), refused=None)
    for what, it in {
        "a question of 5 MB": HEADER + ROW.replace("who sat?", "who sat " * 600_000),
        "a question of escapes": HEADER + ROW.replace("who sat?", "\x1b[2J"),
        "rows of other lengths": HEADER + ROW + "1\t2\n" * 50,
    }.items()
]


def _parquet(content: Content, suffix: str, sandbox: Sandbox, bases: Bases) -> Words:
    data = _written(f"data.{suffix}", content, sandbox)
    return ["lambada", "--ckpt", bases.gpt, "--data", data, "--device", "cpu", "--limit", 3]


ATTACKS += [
    Attack(f"a table, .{suffix}: {what}", partial(_parquet, content, suffix))
    for suffix in ("parquet", "csv", "arrow")
    for what, content in {
        "rubbish": b"\xff" * 100,
        "marks alone": b"PAR1" + b"\xff" * 64 + b"PAR1",
        "nothing": b"",
        "a length of 2**31": b"PAR1" + b"\0" * 20 + b"\xff\xff\xff\x7fPAR1",
    }.items()
]


@attacks(ATTACKS, every=30)
def test_no_data_hangs_or_falls(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)


def test_right_ones_are_read(warm: WarmCommands, bases: Bases):
    """What the attacks change is right before they do."""
    for prepare in (
        partial(_race_folder, PASSAGE),
        partial(_race_archive, lambda archive: None),
        partial(_squad, _squad_of()),
        partial(_qqp, HEADER + ROW),
        partial(_wiki, " = A = \n the cat sat on the mat \n" * 20),
    ):
        done = Attack("right", prepare, refused=False).run(warm, bases)
        assert done.faults(refused=False) == [], done.err
