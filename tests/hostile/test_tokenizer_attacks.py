"""Tokenizers made to do harm: tokenizer.json, vocabularies, merges, sentencepiece, side files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from support import tiny_bert
from support.reliability.attacks import Attack, Bases, Words, attacks, check, each
from support.reliability.warm_commands import Sandbox, WarmCommands

pytest_plugins = ["support.reliability.warm_fixtures"]

DEEP = "[" * 100_000
TEXT = "the cat sat on the mat " * 200


def _using(folder: Path, sandbox: Sandbox, bases: Bases, base: str = "gpt") -> Words:
    data = sandbox.input / "lines.jsonl"
    data.write_text(json.dumps({"text": TEXT[:60]}) + "\n")
    return [
        *("score", "--ckpt", getattr(bases, base), "--tokenizer", folder, "--input", data),
        *("--output", sandbox.output, "--device", "cpu"),
    ]


def _files(files: dict[str, Any], sandbox: Sandbox, bases: Bases, base: str = "gpt") -> Words:
    """Write files: bytes and texts as they are, other values as JSON."""
    folder = sandbox.input / "tokenizer"
    folder.mkdir()
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, errors="surrogatepass")
    return _using(folder, sandbox, bases, base)


# ---- tokenizer.json ----------------------------------------------------------------------------

WORDS = {word: number for number, word in enumerate([*"abcdefghijklmnopqrstuvwxyz ", "<unk>"])}
FAST: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": WORDS,
        "merges": [],
    },
}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _fast(**changes: Any) -> dict[str, Any]:
    return FAST | changes


def _model(**changes: Any) -> dict[str, Any]:
    return FAST | {"model": FAST["model"] | changes}


GROWING = {
    "type": "Sequence",
    "normalizers": [_replace({"String": "a"}, "a" * 100) for _ in range(6)],
}
SLOW = {"Regex": "(a*)*(a*)*(a|b|ab)*c$"}
FASTS: dict[str, Any] = {
    "a normalizer that multiplies": _fast(normalizer=GROWING),
    "a normalizer that adds a megabyte": _fast(
        normalizer={"type": "Prepend", "prepend": "x" * 1_000_000}
    ),
    "a charsmap that is damaged": _fast(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}
    ),
    "a charsmap that is a lie": _fast(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    ),
    "a charsmap of noise": _fast(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "QAAAAP////8" + "/v8A" * 40}
    ),
    "an expression that backtracks": _fast(
        pre_tokenizer={"type": "Split", "pattern": SLOW, "behavior": "Isolated", "invert": False}
    ),
    "an expression that backtracks in a normalizer": _fast(normalizer=_replace(SLOW, "x")),
    "an expression that is none": _fast(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "((("},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
    "ids of 2**32 - 1": _model(vocab=WORDS | {"zz": 2**32 - 1}),
    "ids of 2**40": _model(vocab=WORDS | {"zz": 2**40}),
    "ids of -1": _model(vocab=WORDS | {"zz": -1}),
    "ids that are texts": _model(vocab=dict.fromkeys(WORDS, "1")),
    "ids twice": _model(vocab=dict.fromkeys(WORDS, 1)),
    "a vocabulary that is a list": _model(vocab=[["a", -1.0]]),
    "no vocabulary": _model(vocab={}),
    "no unknown piece": _model(vocab={"a": 0}),
    "merges of nothing": _model(merges=[["zz", "yy"]]),
    "merges that are numbers": _model(merges=[[1, 2]]),
    "merges of one part": _model(merges=["ab"]),
    "dropout": _model(dropout=0.9),
    "dropout of 2": _model(dropout=2.0),
    "a model of no kind": _model(type="Evil"),
    "a model that is a text": _fast(model="\x1b[2J"),
    "a Unigram of NaN": _fast(
        model={"type": "Unigram", "unk_id": 0, "vocab": [["a", -1e400], ["b", 0]]}
    ),
    "a Unigram without its unknown piece": _fast(
        model={"type": "Unigram", "unk_id": 99, "vocab": [["a", -1.0]]}
    ),
    "an added token of 2**32 - 1": _fast(
        added_tokens=[
            {
                "id": 2**32 - 1,
                "content": "<x>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ]
    ),
    "an added token of nothing": _fast(added_tokens=[{"id": 5, "content": ""}]),
    "truncation to 0": _fast(
        truncation={
            "max_length": 0,
            "strategy": "LongestFirst",
            "stride": 9,
            "direction": "Right",
        }
    ),
    "a template of escapes": _fast(post_processor={"type": "\x1b[2J"}),
    "padding to 2**40": _fast(
        padding={
            "strategy": {"Fixed": 2**40},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<unk>",
        }
    ),
    "deep lists": DEEP,
    "deep objects": '{"model":' * 50_000,
    "a list": [],
    "a number": 3,
    "nothing": "",
    "no text": "\udcff\udcfe",
    "40 MB of lists": '{"model": [' + "[]," * 13_000_000 + "[]]}",
    "a pickle": b"\x80\x02cos\nsystem\n.",
}  # fmt: skip
# These are tokenizers of another text, or say nothing about ours.
FAST_MAY_BE_READ = (
    "a normalizer that adds a megabyte", "ids twice", "dropout", "truncation to 0",
    "a Unigram of NaN", "an added token of nothing", "no unknown piece", "padding to 2**40",
    "an expression that backtracks", "an expression that backtracks in a normalizer",
)  # fmt: skip
ATTACKS = each(
    "tokenizer.json",
    FASTS,
    lambda content: partial(_files, {"tokenizer.json": content}),
    may_be_read=FAST_MAY_BE_READ,
)


# ---- vocab.json and merges.txt -----------------------------------------------------------------


def _bytes_vocabulary(bases: Bases) -> dict[str, int]:
    content: dict[str, int] = json.loads((bases.gpt / "tokenizer/vocab.json").read_text())
    return content


def _gpt2(
    changes: dict[str, Any] | str, merges: str | bytes, sandbox: Sandbox, bases: Bases
) -> Words:
    vocab = changes if isinstance(changes, str) else _bytes_vocabulary(bases) | changes
    return _files({"vocab.json": vocab, "merges.txt": merges}, sandbox, bases)


GPT2: dict[str, tuple[dict[str, Any] | str, str | bytes]] = {
    "deep lists": (DEEP, ""),
    "a list": ("[]", ""),
    "a text": ('"x"', ""),
    "ids that are texts": ({"zz": "7"}, ""),
    "ids that are lists": ({"zz": [7]}, ""),
    "ids that are floats": ({"zz": 7.5}, ""),
    "ids of -1": ({"zz": -1}, ""),
    "ids of 2**32 - 1": ({"zz": 2**32 - 1}, ""),
    "ids of 2**40": ({"zz": 2**40}, ""),
    "ids of 5,000 digits": ('{"a": ' + "9" * 5000 + "}", ""),
    "a piece of a surrogate": ('{"\\ud800": 0}', ""),
    "no entries": ("{}", ""),
    "merges of unknown pieces": ({}, "#version: 0.2\nqq zz\n"),
    "merges of escapes": ({}, "#version: 0.2\n\x1b[2J \u202e\n"),
    "merges of one part": ({}, "#version: 0.2\nab\n"),
    "merges that are no text": ({}, b"\xff\xfe\x00"),
    "merges that are zeros": ({}, b"\0" * 1000),
    "merges of a line of 10 MB": ({}, "x" * 10_000_000),
    "an empty line in the merges": ({}, "#version: 0.2\n\n\n\n"),
}
# Megatron's own reader passes over empty lines.
GPT2_MAY_BE_READ = ("an empty line in the merges",)
ATTACKS += each(
    "vocab.json", GPT2, lambda case: partial(_gpt2, *case), may_be_read=GPT2_MAY_BE_READ
)


# ---- BERT's vocabulary -------------------------------------------------------------------------

PIECES = "\n".join(tiny_bert.PIECES) + "\n"


def _bert(content: str | bytes, sandbox: Sandbox, bases: Bases, **side: Any) -> Words:
    files = {"vocab.txt": content} | {f"{name}.json": value for name, value in side.items()}
    return _files(files, sandbox, bases, "bert")


BERT: dict[str, str | bytes] = {
    "no pieces": "\n\n\n",
    "no unknown piece": PIECES.replace("[UNK]\n", "unk\n"),
    "no text": b"\xff\xfe\xfd",
    "zeros": b"\0" * 1000,
    "a line of 10 MB": PIECES + "x" * 10_000_000,
    "ten million lines": PIECES + "x\n" * 10_000_000,
    "a piece of escapes": PIECES + "\x1b[2J\u202e\n" * 2000,
    "a byte order mark of UTF-16": "\ufeffx".encode("utf-16"),
    "one line": "[UNK]",
}
BERT_MAY_BE_READ = ("a line of 10 MB", "one line", "ten million lines", "a piece of escapes")
ATTACKS += each(
    "vocab.txt", BERT, lambda content: partial(_bert, content), may_be_read=BERT_MAY_BE_READ
)
SIDES: dict[str, Any] = {
    "deep": DEEP,
    "a list": [],
    "a text of escapes": {"tokenizer_class": "\x1b[2J"},
    "a class that is a list": {"tokenizer_class": ["x"]},
    "a class of a megabyte": {"tokenizer_class": "x" * 1_000_000},
    "do_lower_case that is a list": {"do_lower_case": [1]},
    "never_split of numbers": {"never_split": [1, 2]},
    "never_split of escapes": {"never_split": "\x1b[2J"},
    "unk_token that is a number": {"unk_token": 7},
    "unk_token of escapes": {"unk_token": "\x1b[2J"},
    "max_input_chars_per_word of -1": {"max_input_chars_per_word": -1},
    "max_input_chars_per_word of 5,000 digits": '{"max_input_chars_per_word": ' + "9" * 5000 + "}",
    "added tokens of 2**40": {
        "added_tokens_decoder": {str(2**40): {"content": "<x>", "special": True}}
    },
    "added tokens of no number": {"added_tokens_decoder": {"\x1b[2J": {"content": "<x>"}}},
    "added tokens that are lists": {"added_tokens_decoder": {"7": [1]}},
    "added tokens that are a list": {"added_tokens_decoder": [1]},
    "added tokens of a content that is a number": {"added_tokens_decoder": {"7": {"content": 1}}},
    "5,000 digits": '{"model_max_length": ' + "9" * 5000 + "}",
    "a surrogate": '{"unk_token": "\\ud800"}',
}
SIDES_MAY_BE_READ = ("max_input_chars_per_word of 5,000 digits", "5,000 digits")
ATTACKS += each(
    "tokenizer_config.json",
    SIDES,
    lambda content: partial(_bert, PIECES, tokenizer_config=content),
    may_be_read=SIDES_MAY_BE_READ,
)
ATTACKS += [
    Attack(f"{name}.json: {what}", partial(_bert, PIECES, **{name: content}), refused=None)
    for name in ("special_tokens_map", "added_tokens")
    for what, content in {
        "deep": DEEP,
        "a list": [],
        "numbers": {"a": 7, "b": 8.5},
        "lists": {"a": [1], "unk_token": [2]},
        "escapes": {"\x1b[2J": "\u202e"},
        "2**40": {"<x>": 2**40},
        "a template that runs": {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
    }.items()
]


# ---- sentencepiece -----------------------------------------------------------------------------

SENTENCEPIECE: dict[str, bytes] = {
    "nothing": b"",
    "zeros": b"\0" * 100,
    "ones": b"\xff" * 100,
    "text": b"the cat sat",
    "a pickle": b"\x80\x02cos\nsystem\n.",
    "a length of 2**31": b"\x0a\xff\xff\xff\xff\x07abc",
    "a piece without a score": b"\x0a\x03\x0a\x01a",
    "a damaged charsmap": b"\x0a\x08\x0a\x01a\x15\0\0\0\0" + b"\x1a\x06\x12\x04\xff\xff\xff\xff",
    "nested groups": b"\x0b" * 100_000,
}
ATTACKS += [
    Attack(f"tokenizer.model: {what}", partial(_files, {"tokenizer.model": content}))
    for what, content in SENTENCEPIECE.items()
]


@attacks(ATTACKS, every=16)
def test_no_tokenizer_hangs_or_falls(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)


def test_right_ones_are_read(warm: WarmCommands, bases: Bases):
    """What the attacks change is right before they do."""
    for prepare in (
        partial(_files, {"tokenizer.json": FAST}),
        partial(_gpt2, {}, "#version: 0.2\n"),
        partial(_bert, PIECES),
    ):
        done = Attack("right", prepare, refused=False).run(warm, bases)
        assert done.faults(refused=False) == [], done.err
