"""Tricks of words: data files, tokenizers, records and reports, addresses, options, variables."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from support.folders import result_records
from support.reliability.attacks import Attack, Bases, Words, attacks, check, copied
from support.reliability.warm_commands import Sandbox, WarmCommands, told

pytest_plugins = ["support.reliability.warm_fixtures"]


def _put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    return path


# ---- lines of JSON -----------------------------------------------------------------------------


def _line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


LINES: dict[str, bytes] = {
    "a byte order mark": b'\xef\xbb\xbf{"text": "the cat"}\n',
    "UTF-16": '{"text": "the cat"}\n'.encode("utf-16"),
    "line ends of a Mac": b'{"text": "the cat"}\r{"text": "a dog"}\r',
    "NEL between lines": '{"text": "the cat"}\u0085{"text": "a dog"}\n'.encode(),
    "a paragraph mark in a text": '{"text": "the \u2028 cat"}\n'.encode(),
    "a text and a name twice": b'{"text": "the cat", "text": "a dog"}\n',
    "tokens and a text": _line(text="the cat", tokens=[1, 2]),
    "tokens twice": b'{"tokens": [1, 2], "tokens": [3, 4]}\n',
    "a list of texts": _line(text=["the", "cat"]),
    "a truth": _line(text=True),
    "null": _line(text=None),
    "a name of another spelling": _line(Text="the cat"),
    "tokens of 1e300": b'{"tokens": [1e300, 2]}\n',
    "tokens of 2.0": b'{"tokens": [2.0, 3.0]}\n',
    "tokens of -0": b'{"tokens": [-0, 2]}\n',
    "tokens of 2**63": b'{"tokens": [9223372036854775808, 2]}\n',
    "tokens of NaN": b'{"tokens": [NaN, 2]}\n',
    "a million tokens": _line(tokens=[1] * 1_000_000),
    "one token": _line(tokens=[1]),
    "a text of NULs": _line(text="\0" * 50),
    "a text of escapes": _line(text="\x1b[2J\u202e \x07"),
    "a text of other planes": _line(text="\U0010ffff \U000e0041 \ufffe"),
    "a text of joined marks": _line(text="a" + "\u0301" * 20_000),
    "200,000 lines of one brace": b"{\n" * 200_000,
    "a right line, and rubbish": _line(text="the cat") + b"rubbish\n",
    "a right line, and half of one": _line(text="the cat") + b'{"text": "the',
    "a right line, and NULs": _line(text="the cat") + b"\0" * 100,
    "300,000 lines of one text": _line(text="a b") * 30_000,
}


def _lambada(content: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    data = _put(sandbox.input / "lambada.jsonl", content)
    words = ["lambada", "--ckpt", bases.gpt, "--data", data, "--device", "cpu"]
    return [*words, "--limit", 3, "--output", sandbox.output]


def _score(content: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    data = _put(sandbox.input / "lines.jsonl", content)
    words = ["score", "--ckpt", bases.gpt, "--input", data, "--device", "cpu", "--limit", 3]
    return [*words, "--output", sandbox.output]


def _generate(content: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    data = _put(sandbox.input / "prompts.jsonl", content.replace(b'"text"', b'"prompt"'))
    words = ["generate", "--ckpt", bases.gpt, "--input", data, "--device", "cpu", "--limit", 3]
    return [*words, "--max-new-tokens", 2, "--output", sandbox.output]


ATTACKS = [
    Attack(f"{name}: {what}", partial(prepare, content), refused=None)
    for name, prepare in (("lambada", _lambada), ("score", _score), ("generate", _generate))
    for what, content in LINES.items()
]

# ---- tables of fine-tuning ---------------------------------------------------------------------

QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
ROWS = "1\t2\t3\twho sat?\twhere was the cat?\t1\n0\t2\t3\twho?\twhere?\t0\n"
MNLI = "index\tsentence1\tsentence2\tgold_label\n"
PAIRS = "0\tthe cat sat\tthe dog\tneutral\n1\tthe cat\tthe mat\tentailment\n"


def _tuning(task: str, sandbox: Sandbox, bases: Bases, *more: object) -> Words:
    return [
        *(task, "--ckpt", bases.bert, "--output-dir", sandbox.output, "--device", "cpu"),
        *("--data", sandbox.input, "--max-steps", 1, "--epochs", 1, "--global-batch", 1),
        *("--seq-length", 32, "--train-limit", 2, "--dev-limit", 2, *more),
    ]


def _qqp(content: bytes | str, sandbox: Sandbox, bases: Bases) -> Words:
    for role in ("train", "dev"):
        _put(sandbox.input / f"{role}.tsv", content)
    return _tuning("qqp", sandbox, bases)


def _mnli(content: bytes | str, sandbox: Sandbox, bases: Bases) -> Words:
    for role in ("train", "dev_matched", "dev_mismatched"):
        _put(sandbox.input / f"{role}.tsv", content)
    return _tuning("mnli", sandbox, bases)


TSV: dict[str, Callable[[str, str], bytes | str]] = {
    "a byte order mark": lambda head, rows: "\ufeff" + head + rows,
    "UTF-16": lambda head, rows: (head + rows).encode("utf-16"),
    "line ends of Windows": lambda head, rows: (head + rows).replace("\n", "\r\n"),
    "line ends of a Mac": lambda head, rows: (head + rows).replace("\n", "\r"),
    "NELs in a text": lambda head, rows: head + rows.replace("who", "w\u0085o").replace(
        "cat", "c\u2028t"
    ),
    "vertical tabs in a text": lambda head, rows: head + rows.replace(" ", "\x0b\x0c\x1c\x1d\x1e"),
    "NULs in a text": lambda head, rows: head + rows.replace(" ", "\0"),
    "the header twice": lambda head, rows: head + head + rows,
    "a header in large letters": lambda head, rows: head.upper() + rows,
    "a header of one name": lambda head, rows: "\t".join(["id"] * 6) + "\n" + rows,
    "names of columns twice": lambda head, rows: head.replace("\n", "\t" + head) + rows,
    "labels of other digits": lambda head, rows: head + rows.replace("\t1\n", "\t\u0661\n"),
    "labels of 1.0": lambda head, rows: head + rows.replace("\t1\n", "\t1.0\n"),
    "labels of 2": lambda head, rows: head + rows.replace("\t1\n", "\t2\n"),
    "labels in large letters": lambda head, rows: head + rows.replace("neutral", "NEUTRAL"),
    "labels of spaces": lambda head, rows: head + rows.replace("\t1\n", "\t \n"),
    "labels of a formula": lambda head, rows: head + rows.replace("neutral", "=1+1"),
    "no line end at the end": lambda head, rows: head + rows[:-1],
    "quotes that open": lambda head, rows: head + rows.replace("who", '"who').replace("the", '"'),
    "a row of tabs": lambda head, rows: head + rows + "\t" * 100_000 + "\n",
    "100,000 empty rows": lambda head, rows: head + rows + "\n" * 100_000,
    "commas": lambda head, rows: (head + rows).replace("\t", ","),
    "gzip": lambda head, rows: gzip.compress((head + rows).encode()),
    "an HTML page": lambda head, rows: "<!DOCTYPE html>\n<html>404</html>\n",
    "an id of escapes": lambda head, rows: head + rows.replace("1\t2", "\x1b[2J\t2"),
    "an id of a formula": lambda head, rows: head + "=cmd|' /C calc'!A0" + rows[1:],
    "a text of 200,000 marks": lambda head, rows: (
        head + rows.replace("who", "a" + "\u0301" * 200_000)
    ),
    "a text of one word of 300,000 letters": lambda head, rows: (
        head + rows.replace("who", "x" * 300_000).replace("cat", "y" * 300_000)
    ),
    "a text of 300,000 brackets": lambda head, rows: (
        head + rows.replace("who", "(" * 300_000).replace("cat", "(" * 300_000)
    ),
    "a surrogate": lambda head, rows: head + rows.replace("who", "\ud800"),
}  # fmt: skip
ATTACKS += [
    Attack(f"qqp: {what}", partial(_qqp, make(QQP, ROWS)), refused=None)
    for what, make in TSV.items()
]
ATTACKS += [
    Attack(f"mnli: {what}", partial(_mnli, make(MNLI, PAIRS)), refused=None)
    for what, make in TSV.items()
]


def _squad(content: Any, sandbox: Sandbox, bases: Bases) -> Words:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    for role in ("train", "dev"):
        _put(sandbox.input / f"{role}-v2.0.json", text)
    return _tuning("squad", sandbox, bases, "--max-query-length", 8, "--doc-stride", 8)


def _asked(context: Any = "the cat sat", **question: Any) -> dict[str, Any]:
    entry = {
        "id": "q1",
        "question": "who sat?",
        "answers": [{"text": "cat", "answer_start": 4}],
        "is_impossible": False,
    }
    paragraph = {"context": context, "qas": [entry | question]}
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": [paragraph]}]}


def _many(**changes: Any) -> dict[str, Any]:
    data = _asked(**changes)
    questions = data["data"][0]["paragraphs"][0]["qas"]
    questions += [dict(questions[0]) for _ in range(3)]
    return data


SQUADS: dict[str, Any] = {
    "ids twice": _many(),
    "a version that is a list": _asked() | {"version": [1]},
    "a version of escapes": _asked() | {"version": "\x1b[2J"},
    "a version of 3.0": _asked() | {"version": "3.0"},
    "is_impossible of 1": _asked(is_impossible=1),
    "is_impossible that is null": _asked(is_impossible=None),
    "is_impossible with an answer": _asked(is_impossible=True),
    "no answers": _asked(answers=[]),
    "no answers, and none is impossible": _asked(answers=[], is_impossible=False),
    "an answer of nothing": _asked(answers=[{"text": "", "answer_start": 0}]),
    "an answer of spaces": _asked(answers=[{"text": " ", "answer_start": 3}]),
    "an answer elsewhere": _asked(answers=[{"text": "dog", "answer_start": 4}]),
    "an answer beyond the end": _asked(answers=[{"text": "cat", "answer_start": 400}]),
    "an answer at true": _asked(answers=[{"text": "cat", "answer_start": True}]),
    "an answer at 4.0": _asked(answers=[{"text": "cat", "answer_start": 4.0}]),
    "an answer at NaN": _asked(answers=[{"text": "cat", "answer_start": float("nan")}]),
    "an answer without a place": _asked(answers=[{"text": "cat"}]),
    "30,000 answers": _asked(answers=[{"text": "cat", "answer_start": 4}] * 30_000),
    "a question of nothing": _asked(question=""),
    "a question of marks": _asked(question="\u0301" * 5000),
    "a question of 300,000 letters": _asked(question="x" * 300_000),
    "a context of nothing": _asked(context=""),
    "a context of spaces": _asked(context=" " * 5000),
    "a context of joined marks": _asked(context="the cat" + "\u0301" * 100_000),
    "a context of a word of a megabyte": _asked(context="the cat " + "x" * 1_000_000),
    "a context of NULs": _asked(context="the cat" + "\0" * 5000),
    "a context of brackets": _asked(context="the cat " + "(" * 100_000),
    "an id that is a number": _asked(id=7),
    "an id of nothing": _asked(id=""),
    "an id of a megabyte": _asked(id="q" * 1_000_000),
    "a title that is a list": {"version": "v2.0", "data": [{"title": [1], "paragraphs": []}]},
    "no paragraphs": {"version": "v2.0", "data": [{"title": "t", "paragraphs": []}]},
    "no questions": {"version": "v2.0", "data": [{"paragraphs": [{"context": "a", "qas": []}]}]},
    "data twice": b'{"version": "v2.0", "data": [], "data": [1]}',
}
ATTACKS += [
    Attack(f"squad: {what}", partial(_squad, it), refused=None) for what, it in SQUADS.items()
]

PASSAGE: dict[str, Any] = {
    "id": "high1.txt",
    "article": "the cat sat on the mat",
    "questions": ["who sat?"],
    "options": [["a", "b", "c", "d"]],
    "answers": ["A"],
}


def _race(content: Any, sandbox: Sandbox, bases: Bases) -> Words:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    for split in ("train", "dev"):
        _put(sandbox.input / split / "high" / "1.txt", text)
    return _tuning("race", sandbox, bases, "--max-qa-length", 16)


RACES: dict[str, Any] = {
    "three options": PASSAGE | {"options": [["a", "b", "c"]]},
    "five options": PASSAGE | {"options": [["a", "b", "c", "d", "e"]]},
    "options of nothing": PASSAGE | {"options": [["", "", "", ""]]},
    "options that are equal": PASSAGE | {"options": [["a"] * 4]},
    "an option of 300,000 letters": PASSAGE | {"options": [["x" * 300_000, "b", "c", "d"]]},
    "more answers than questions": PASSAGE | {"answers": ["A", "B"]},
    "fewer answers": PASSAGE | {"answers": []},
    "an answer in small letters": PASSAGE | {"answers": ["a"]},
    "an answer of other letters": PASSAGE | {"answers": ["\u0410"]},
    "an answer of two letters": PASSAGE | {"answers": ["AB"]},
    "an answer of nothing": PASSAGE | {"answers": [""]},
    "answers that are a text": PASSAGE | {"answers": "A"},
    "an article of nothing": PASSAGE | {"article": ""},
    "an article of marks": PASSAGE | {"article": "\u0301" * 100_000},
    "an article of NULs": PASSAGE | {"article": "the\0cat"},
    "a question of a blank twice": PASSAGE | {"questions": ["_ and _ and _"]},
    "a question of 100,000 blanks": PASSAGE | {"questions": ["_ " * 100_000]},
    "a question of nothing": PASSAGE | {"questions": [""]},
    "an id that is a list": PASSAGE | {"id": ["x"]},
    "two passages in a file": json.dumps(PASSAGE) + "\n" + json.dumps(PASSAGE),
    "UTF-16": json.dumps(PASSAGE).encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(PASSAGE).encode(),
}
ATTACKS += [Attack(f"race: {what}", partial(_race, it), refused=None) for what, it in RACES.items()]

# ---- tables of other kinds ---------------------------------------------------------------------


def _parquet(columns: dict[str, Any], **options: Any) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, **options)
    return buffer.getvalue()


def _tables() -> dict[str, tuple[str, bytes]]:
    import pyarrow

    right = _parquet({"text": ["the cat", "a dog"]})
    return {
        "a column that is a number": ("parquet", _parquet({"text": [1, 2]})),
        "a column of lists": ("parquet", _parquet({"text": [["a"], ["b"]]})),
        "a column of nulls": ("parquet", _parquet({"text": pyarrow.array([None, None])})),
        "a column with a null": ("parquet", _parquet({"text": ["the cat", None]})),
        "a column of bytes": ("parquet", _parquet({"text": [b"\xff", b"\xfe"]})),
        "a column of escapes": ("parquet", _parquet({"\x1b[2J": ["a"]})),
        "a bomb": ("parquet", _parquet({"text": ["x" * 50_000_000] * 4}, compression="zstd")),
        "a million rows": ("parquet", _parquet({"text": ["a b"] * 300_000})),
        "no rows": ("parquet", _parquet({"text": pyarrow.array([], pyarrow.string())})),
        "a cut": ("parquet", right[:-20]),
        "a flipped footer": ("parquet", right[:-30] + b"\xff" * 10 + right[-20:]),
        "the middle gone": ("parquet", right[:10] + right[60:]),
        "5,000 columns": ("parquet", _parquet({f"c{n}": [1] for n in range(5000)})),
        "csv: a quote without an end": ("csv", b'text\n"the cat'),
        "csv: a NUL": ("csv", b"text\nthe \0 cat\n"),
        "csv: a header alone": ("csv", b"text\n"),
        "csv: a name twice": ("csv", b"text,text\nthe cat,a dog\n"),
        "csv: rows of other lengths": ("csv", b"text,b\nthe cat\na,b,c,d\n"),
        "csv: a field of 10 MB": ("csv", b"text\n" + b"x" * 10_000_000 + b"\n"),
        "csv: 100,000 columns": ("csv", b"a," * 100_000 + b"text\n" + b"1," * 100_000 + b"x\n"),
        "csv: a formula": ("csv", b"text\n=cmd|' /C calc'!A0 cat\n"),
        "csv: UTF-16": ("csv", "text\nthe cat\n".encode("utf-16")),
        "tsv: rubbish": ("tsv", b"\xff" * 1000),
        "json: a list of rows": ("json", b'[{"text": "the cat"}]'),
        "json: a list of numbers": ("json", b"[1, 2]"),
        "json: deep": ("json", b"[" * 100_000),
        "gz: a bomb": ("jsonl.gz", gzip.compress(b'{"text": "' + b"x" * 300_000_000)),
        "gz: cut": ("jsonl.gz", gzip.compress(_line(text="the cat") * 100)[:-12]),
        "zst: rubbish": ("jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 100),
        "txt: a pickle": ("txt", b"\x80\x02cos\nsystem\n."),
        "pkl": ("pkl", b"\x80\x02cos\nsystem\n(X\x0c\x00\x00\x00touch canarytR."),
        "npy of objects": ("npy", b"\x93NUMPY\x01\x00\x46\x00{'descr': '|O', 'shape': (1,)}"),
    }


def _table(name: str, task: str, sandbox: Sandbox, bases: Bases) -> Words:
    suffix, content = _tables()[name]
    data = _put(sandbox.input / f"data.{suffix}", content)
    words = [task, "--ckpt", bases.gpt, "--data", data, "--device", "cpu", "--limit", 3]
    return [*words, "--output", sandbox.output]


TABLES = (
    "a column that is a number", "a column of lists", "a column of nulls", "a column with a null",
    "a column of bytes", "a column of escapes", "a bomb", "a million rows", "no rows", "a cut",
    "a flipped footer", "the middle gone", "5,000 columns", "csv: a quote without an end",
    "csv: a NUL", "csv: a header alone", "csv: a name twice", "csv: rows of other lengths",
    "csv: a field of 10 MB", "csv: 100,000 columns", "csv: a formula", "csv: UTF-16",
    "tsv: rubbish", "json: a list of rows", "json: a list of numbers", "json: deep", "gz: a bomb",
    "gz: cut", "zst: rubbish", "txt: a pickle", "pkl", "npy of objects",
)  # fmt: skip
ATTACKS += [
    Attack(f"{task}, a table: {name}", partial(_table, name, task), refused=None)
    for name in TABLES
    for task in ("lambada", "wikitext103")
]

# ---- addresses, options, prompts ---------------------------------------------------------------

ADDRESSES: dict[str, str] = {
    "no name": "hf://",
    "one name": "hf://gpt2",
    "three names": "hf://a/b/c",
    "names that go up": "hf://../../x",
    "a revision that goes up": "hf://a/b@../../x",
    "a revision of nothing": "hf://a/b@",
    "two revisions": "hf://a/b@c@d",
    "escapes": "hf://a/\x1b[2J\u202e",
    "a line break": "hf://a/b\nmlm-eval: all is well",
    "5,000 letters": "hf://a/" + "b" * 5000,
    "a password": "hf://user:secret@host/x",
    "spaces": "hf://a b/c d",
    "a question": "hf://a/b?x=1#y",
    "dots": "hf://./.",
    "a backslash": "hf://a\\b",
    "another protocol": "http://127.0.0.1:1/x",
    "a file by its address": "file:///etc/passwd",
    "s3": "s3://bucket/key",
    "a catalog entry that goes up": "catalog:../../x",
    "a catalog entry of nothing": "catalog:",
    "a sample of nothing": "sample:",
    "a sample that is absolute": "sample:/etc",
    "a sample of escapes": "sample:\x1b[2J",
    "a NUL": "a\udc00b",
    "a tilde": "~",
    "the root": "/",
    "a device": "/dev/null",
    "standard input": "-",
    "a process' folder": "/proc/self",
    "a process' links": "/proc/self/fd",
    "a glob": "/tmp/*",
    "a trailing slash": "/etc/passwd/",
}


def _address(name: str, command: str, sandbox: Sandbox, bases: Bases) -> Words:
    if command == "convert":
        return ["convert", "--ckpt", name, "--to", "hf", "--output", sandbox.output]
    if command == "verify":
        return ["verify", "--ckpt", bases.gpt, "--against", name]
    if command == "tokenizer":
        lines = _put(sandbox.input / "l.jsonl", _line(text="the cat"))
        words = ["score", "--ckpt", bases.gpt, "--tokenizer", name, "--input", lines]
        return [*words, "--output", sandbox.output, "--device", "cpu"]
    return ["inspect", "--ckpt", name]


OFFLINE = {what: name for what, name in ADDRESSES.items() if not name.startswith("hf://a/")}
ATTACKS += [
    Attack(f"{command}: an address of {what}", partial(_address, name, command), refused=None)
    for command in ("inspect", "convert", "verify", "tokenizer")
    for what, name in OFFLINE.items()
]

TEXTS: dict[str, str] = {
    "nothing": "",
    "spaces": "   ",
    "escapes": "\x1b[2J\u202e\x07",
    "a surrogate": "\udcff",
    "100,000 letters": "x" * 100_000,
    "joined marks": "a" + "\u0301" * 5000,
    "other planes": "\U0010ffff\ufffe",
    "a line break": "a\nmlm-eval: all is well",
    "an option": "--help",
    "a template": "{{ 7 * 7 }} %s {0} ${HOME}",
    "a special token": "<|endoftext|>" * 20,
}
OPTIONS: dict[str, list[str]] = {
    "--prompt": ["--prompt", "TEXT", "--max-new-tokens", "1"],
    "--stop": ["--prompt", "the", "--stop", "TEXT", "--max-new-tokens", "2"],
}
NUMBERS: tuple[list[str], ...] = (
    ["--max-new-tokens", "9" * 30], ["--max-new-tokens", "0"], ["--max-new-tokens", "1e3"],
    ["--temperature", "nan"], ["--temperature", "inf"], ["--temperature", "1e-320"],
    ["--temperature", "1e308"], ["--temperature", "-0.0"], ["--top-k", "9" * 30],
    ["--top-k", "0"], ["--top-p", "nan"], ["--top-p", "0"], ["--top-p", "1e-320"],
    ["--seed", "9" * 30], ["--seed", "-1"], ["--seed", "9" * 5000], ["--batch-tokens", "9" * 30],
    ["--limit", "9" * 30], ["--batch-tokens", "\u0661"], ["--vocab", "\x1b[2J"],
    ["--bos", "yes\nno"], ["--dtype", ""], ["--device", "cuda:99"], ["--device", "\udcff"],
    ["--tp", "3"], ["--tp", "nan"], ["--tp", "auto\n"], ["--dp", "9" * 5000], ["--dp", "-1"],
)  # fmt: skip


def _options(words: list[str], text: str, sandbox: Sandbox, bases: Bases) -> Words:
    given = [word.replace("TEXT", text) for word in words]
    return ["generate", "--ckpt", bases.gpt, "--device", "cpu", *given]


ATTACKS += [
    Attack(f"{option} of {what}", partial(_options, words, text), refused=None)
    for option, words in OPTIONS.items()
    for what, text in TEXTS.items()
]
ATTACKS += [
    Attack(
        f"generate {' '.join(words)[:40]!a}",
        partial(_options, ["--prompt", "the", "--max-new-tokens", "1", *words], ""),
        refused=None,
    )
    for words in NUMBERS
]

# ---- records, and the reports of them ----------------------------------------------------------

RECORD = result_records.zero_shot("wikitext103", 19.3)
EXTREMES: dict[str, Any] = {
    "1e308": 1e308,
    "-1e308": -1e308,
    "1e-320": 1e-320,
    "0": 0,
    "2**63": 2**63,
    "2**63 as a float": 2.0**63,
    "true": True,
    "a text of digits": "19.3",
    "an empty object": {},
    "an empty list": [],
}
NUMBER_FIELDS = """metrics.adjusted_ppl metrics.ppl metrics.avg_loss counts.num_original_tokens
counts.num_tokenized_tokens settings.seq_length settings.stride settings.limit settings.tp
checkpoint.num_parameters checkpoint.config.num_layers checkpoint.config.hidden_size
checkpoint.iteration timing.seconds timing.total_seconds run.started run.command
versions.torch""".split()


def _changed(path: str, value: Any) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(json.dumps(RECORD))
    *above, last = path.split(".")
    place = record
    for name in above:
        place = place.setdefault(name, {})
    place[last] = value
    return record


def _report(record: Any, form: str, more: list[str], sandbox: Sandbox, bases: Bases) -> Words:
    path = _put(sandbox.input / "r.json", json.dumps(record))
    return ["report", path, "--format", form, "--output", sandbox.output, *more]


FORMS = ("md", "latex", "csv", "html")
ATTACKS += [
    Attack(
        f"a record: {field} is {what}",
        partial(_report, _changed(field, value), FORMS[(nth + at) % 4], []),
        refused=None,
    )
    for nth, field in enumerate(NUMBER_FIELDS)
    for at, (what, value) in enumerate(EXTREMES.items())
]


def _curve(value: Any, sandbox: Sandbox, bases: Bases) -> Words:
    words: list[object] = ["report", "--curve", "--format", "html", "--output", sandbox.output]
    for at in range(3):
        record = _changed("checkpoint.iteration", 1000 * at if at < 2 else value)
        words.append(_put(sandbox.input / f"{at}.json", json.dumps(record)))
    return words


CURVES = EXTREMES | {"-1": -1, "null": None, "2**70": 2**70, "escapes": "\x1b[2J", "a list": [1]}
ATTACKS += [
    Attack(f"a curve to an iteration that is {what}", partial(_curve, value), refused=None)
    for what, value in CURVES.items()
]

# ---- states of training ------------------------------------------------------------------------


def _resumed(change: Callable[[Path], None], sandbox: Sandbox, bases: Bases) -> Words:
    """Go on from a state that was right before it was changed."""
    text = _put(sandbox.input / "text.txt", "the cat sat on the mat and was red\n" * 60)
    line = [
        *("lm", "--ckpt", bases.gpt, "--data", text, "--output-dir", sandbox.output),
        *("--device", "cpu", "--seq-length", 16, "--global-batch", 2, "--save-minutes", 0),
        *("--max-steps", 2),
    ]
    kept = bases.folder / "state"
    if not kept.exists():
        # The steps are those of another run, so that it is not finished: 3 of 2 are not asked for.
        done = bases.warm.run(sandbox, line)
        assert done.code == 0, told(done)
        os.rename(sandbox.output, kept)
    copied(kept, sandbox.output)
    change(sandbox.output)
    return line


def _json_change(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        (path,) = list(out.glob(name)) or [out / name]
        value = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(change(value)), errors="surrogatepass")

    return edit


def _metrics(content: bytes) -> Callable[[Path], None]:
    return lambda out: (out / "metrics.jsonl").write_bytes(content) and None


STATES: dict[str, Callable[[Path], None]] = {
    "finished names escapes": _json_change("state/finished.json", lambda v: v | {"\x1b[2J": 1}),
    "finished holds an identity of a list": _json_change(
        "state/finished.json", lambda v: v | {"identity": [1]}
    ),
    "finished holds counters of NaN": _json_change(
        "state/finished.json", lambda v: v | {"counters": {"step": float("nan")}}
    ),
    "a result that is a list": _json_change("result.json", lambda v: [v]),
    "a run.json of rubbish": lambda out: (out / "run.json").write_bytes(b"\xff\xfe") and None,
    "a run.json of deep lists": lambda out: (out / "run.json").write_bytes(b"[" * 99_999) and None,
    "metrics of NULs": _metrics(b"\0" * 1000),
    "metrics of 50 MB": _metrics(b'{"step": 1}\n' * 4_000_000),
    "metrics of a line of 50 MB": _metrics(b"x" * 50_000_000),
    "metrics of lists": _metrics(b"[1]\n" * 100),
    "metrics of steps below 0": _metrics(b'{"step": -1, "loss": 1.0}\n'),
    "metrics of NaN": _metrics(b'{"step": 1, "loss": NaN}\n'),
    "metrics that are a folder": lambda out: (
        (out / "metrics.jsonl").unlink(),
        (out / "metrics.jsonl").mkdir(),
    )[1],
    "metrics that are a link to a device": lambda out: (
        (out / "metrics.jsonl").unlink(),
        (out / "metrics.jsonl").symlink_to("/dev/zero"),
    )[1],
    "a lock that is a folder": lambda out: (out / "state" / ".lock").mkdir(exist_ok=True),
    "a tensorboard folder that is a file": lambda out: (
        (out / "tensorboard").write_text("x") and None
        if not (out / "tensorboard").exists() else None
    ),
    "a checkpoint of another model": lambda out: (
        (out / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("9") and None
    ),
    "predictions that are a file": lambda out: (out / "predictions").write_text("x") and None,
}  # fmt: skip
ATTACKS += [
    Attack(f"{'again' if overwrite else 'resumed'}: {what}", prepare, refused=None)
    for what, change in STATES.items()
    for overwrite in (False, True)
    for prepare in (
        (lambda s, b, c=change: [*_resumed(c, s, b), "--overwrite"])
        if overwrite
        else partial(_resumed, change),
    )
]


@attacks(ATTACKS, every=150)
def test_no_word_is_believed(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)
