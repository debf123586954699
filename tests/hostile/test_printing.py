"""What is printed and written: no code reaches a terminal, no formula a table, no link a page."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from support.folders import result_records
from support.reliability.attacks import (
    Attack,
    Bases,
    Words,
    attacks,
    check,
    converting,
    copied,
    inspecting,
    model_file,
    saved,
)
from support.reliability.short_form import thinned
from support.reliability.warm_commands import Sandbox, WarmCommands, told

pytest_plugins = ["support.reliability.warm_fixtures"]

BAD: dict[str, str] = {
    "escape": "\x1b[2J\x1b]0;x\x07",
    "C1 control": "\x9b2J",
    "NUL": "a\x00b",
    "turned": "\u202etxt.exe\u2066",
    "line break": "a\nmlm-eval: all is well",
    "return": "\rmlm-eval: all is well",
    "paragraph": "a\u2028b\u2029c",
    "surrogate": "a\udcffb",
    "endless": "n" * 600_000,
    "bell and backspace": "\x07\x08\x7f",
}
FILE_NAMES = {what: text for what, text in BAD.items() if what not in ("NUL", "endless")}


# ---- names and values in checkpoints -------------------------------------------------------------


def _entry(text: str, place: str, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.gpt, sandbox.input / "c")
    contents = torch.load(model_file(root), weights_only=False)
    weights = contents["model"]
    if place == "a tensor more":
        weights[text] = torch.zeros(2)
    elif place == "an entry more":
        contents[text] = {"x": 1}
    elif place == "a setting's name":
        setattr(contents["args"], text, 3)
    else:
        contents["args"].normalization = text
    saved(model_file(root), contents)
    return inspecting(root) if place != "a tensor more" else converting(root, sandbox)


PLACES = ("a tensor more", "an entry more", "a setting's name", "a setting's value")
ATTACKS = [
    Attack(f"{place}: {what}", partial(_entry, text, place), refused=None)
    for place in PLACES
    for what, text in BAD.items()
    if what != "surrogate"
]


def _config(text: str, key: str, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.hub, sandbox.input / "c")
    about = json.loads((root / "config.json").read_text())
    about |= {text: 1} if key == "name" else {key: text}
    (root / "config.json").write_text(json.dumps(about))
    return inspecting(root)


ATTACKS += [
    Attack(f"config.json, {key}: {what}", partial(_config, text, key), refused=None)
    for key in ("name", "model_type", "activation_function", "_name_or_path")
    for what, text in BAD.items()
]


def _index(text: str, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.hub, sandbox.input / "c")
    (root / "model.safetensors").rename(root / "model-00001-of-00001.safetensors")
    table = {"weight_map": {text: "model-00001-of-00001.safetensors"}}
    (root / "model.safetensors.index.json").write_text(json.dumps(table))
    return inspecting(root)


ATTACKS += [Attack(f"index: {what}", partial(_index, text)) for what, text in BAD.items()]


# ---- names of files ------------------------------------------------------------------------------


def _folder(text: str, sandbox: Sandbox, bases: Bases, *, empty: bool = False) -> Words:
    root = sandbox.input / text
    if empty:
        root.mkdir()
        (root / text).write_text("x")
    else:
        copied(bases.gpt, root)
    return inspecting(root)


def _race_level(text: str, sandbox: Sandbox, bases: Bases) -> Words:
    passage = {
        "id": text, "article": "the cat", "questions": ["who?"], "options": [["a", "b", "c", "d"]],
        "answers": ["A"],
    }  # fmt: skip
    for split in ("train", "dev"):
        (sandbox.input / split / text).mkdir(parents=True)
        (sandbox.input / split / text / "1.txt").write_text(json.dumps(passage))
    return [
        *("race", "--ckpt", bases.bert, "--data", sandbox.input, "--output-dir", sandbox.output),
        *("--device", "cpu", "--max-steps", 1, "--seq-length", 32, "--max-qa-length", 16),
        *("--global-batch", 1),
    ]


def _overwriting(text: str, sandbox: Sandbox, bases: Bases) -> Words:
    copied(bases.gpt, sandbox.output)
    (sandbox.output / text).write_text("x")
    return converting(bases.gpt, sandbox, "megatron", "--overwrite")


ATTACKS += [
    Attack(f"{name}: {what}", partial(prepare, text), refused=None)
    for name, prepare in (
        ("a folder", _folder),
        ("a folder of nothing", partial(_folder, empty=True)),
        ("a level of RACE", _race_level),
        ("a file in the way", _overwriting),
    )
    for what, text in FILE_NAMES.items()
]

# ---- options -------------------------------------------------------------------------------------

OPTIONS = (
    ["inspect", "--ckpt", "GPT", "--set", "TEXT=1"],
    ["inspect", "--ckpt", "GPT", "--set", "normalization=TEXT"],
    ["convert", "--ckpt", "GPT", "--to", "TEXT", "--output", "OUT"],
    ["convert", "--ckpt", "GPT", "--to", "hf", "--output", "OUT", "--max-shard-size", "TEXT"],
    ["score", "--ckpt", "GPT", "--input", "TEXT", "--output", "OUT"],
    ["race", "--ckpt", "GPT", "--data", "TEXT", "--output-dir", "OUT", "--recipe", "TEXT"],
    ["report", "TEXT"],
    ["report", "TEXT", "--format", "TEXT"],
    ["catalog", "TEXT"],
    ["TEXT"],
    ["inspect", "--TEXT"],
    ["plan", "--ckpt", "TEXT", "--device-memory", "TEXT"],
)


def _words(words: list[str], text: str, sandbox: Sandbox, bases: Bases) -> Words:
    named = {"GPT": bases.gpt, "OUT": sandbox.output}
    return [named.get(word, word.replace("TEXT", text)) for word in words]


ATTACKS += [
    Attack(f"{' '.join(words)}: {what}", partial(_words, words, text))
    for words in OPTIONS
    for what, text in FILE_NAMES.items()
]


@attacks(ATTACKS, every=30)
def test_no_code_reaches_the_terminal(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)


# ---- reports -------------------------------------------------------------------------------------

NAMES: dict[str, str] = {
    **{what: text for what, text in BAD.items() if what != "endless"},
    "formula": "=cmd|' /C calc'!A0",
    "formula of a plus": "+1+cmd|' /C calc'!A0",
    "formula of an at": "@SUM(1+1)*cmd|' /C calc'!A0",
    "link": "[click](https://example.com)",
    "image": "![x](https://example.com/a.png)",
    "bare address": "https://example.com/x",
    "script": "<script>alert(1)</script>",
    "attribute": '"><img src=x onerror=alert(1)>',
    "TeX": "\\input{/etc/passwd}\\write18{touch canary}",
    "TeX mathematics": "$\\frac{1}{2}$ $x",
    "template": "{{ 7 * 7 }}{% raw %}[[ 7 * 7 ]]",
    "glyphs": "\U0001f600\u4e2d\u6587\U000e0041",
    "table": "a | b | c\n---|---",
}
FORMS = ("md", "latex", "csv", "html")


def _record(form: str, name: str, folder: Path) -> list[object]:
    record = result_records.zero_shot("wikitext103", 19.3)
    record["checkpoint"]["path"] = f"models/{name}"
    record["checkpoint"]["digest"] = name
    record["settings"]["data"]["path"] = name
    record["settings"]["data"]["warnings"] = [name]
    path = folder / "record.json"
    path.write_text(json.dumps(record))
    return ["report", path, "--format", form]


PAIRS = [f"{form}: {what}" for what in NAMES for form in FORMS]


@pytest.mark.parametrize("pair", thinned(PAIRS, every=11))
def test_reports_show_names_as_they_are(pair: str, warm: WarmCommands):
    form, _, what = pair.partition(": ")
    sandbox = warm.sandbox()
    words = [*_record(form, NAMES[what], sandbox.input), "--output", sandbox.output]
    done = warm.run(sandbox, words)
    assert done.faults(refused=False) == [], told(done)
    page = sandbox.output.read_bytes().decode("utf-8")
    hidden = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"
    assert not re.search(hidden, page)
    if form == "csv":
        assert not re.search(r'(^|,)"?[=+@]', page, re.MULTILINE)
    if form == "md":
        assert not re.search(r"(?<!\\)\]\(", page) and "https://example" not in page
    if form == "html":
        assert "<script" not in page and "onerror=alert(1)>" not in page.replace("&gt;", "")
    if form == "latex":
        assert "\\input" not in page and "\\write18" not in page
    if what == "template":
        page = re.sub(r"<svg.*?</svg>", "", page.replace(str(sandbox.root), ""), flags=re.DOTALL)
        assert "49" not in page
