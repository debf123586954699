"""Tricks of tables and settings: JSON of any kind, safetensors, YAML, TOML, trackers, indexes."""

from __future__ import annotations

import json
import struct
from functools import partial
from pathlib import Path
from typing import Any

from support.reliability.attacks import (
    Attack,
    Bases,
    Words,
    attacks,
    check,
    converting,
    copied,
    inspecting,
    saved,
)
from support.reliability.warm_commands import Sandbox, WarmCommands

pytest_plugins = ["support.reliability.warm_fixtures"]

# ---- JSON, in every file that is JSON ----------------------------------------------------------

JSON: dict[str, bytes] = {
    "a byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "UTF-32": '{"a": 1}'.encode("utf-32"),
    "a comment": b'{"a": 1} // all is well',
    "single quotes": b"{'a': 1}",
    "a comma more": b'{"a": 1,}',
    "two values": b'{"a": 1}{"a": 2}',
    "a name twice": b'{"model_type": "gpt2", "model_type": "llama"}',
    "a name 100,000 times": b"{" + b'"a": 1,' * 100_000 + b'"a": 1}',
    "names of escapes": b'{"\\u001b[2J": "\\u202e"}',
    "a name of NUL": b'{"\\u0000": 1}',
    "a name of nothing": b'{"": {"": [""]}}',
    "half a surrogate pair": b'{"a": "\\ud83d"}',
    "a pair the wrong way": b'{"a": "\\ude00\\ud83d"}',
    "raw control characters": b'{"a": "\x01\x1b[2J"}',
    "Infinity": b'{"n_layer": Infinity}',
    "-Infinity": b'{"n_layer": -Infinity}',
    "1e400": b'{"n_layer": 1e400}',
    "a number of a million digits": b'{"n_layer": ' + b"1" * 1_000_000 + b"}",
    "a fraction of a million digits": b'{"n_layer": 0.' + b"1" * 1_000_000 + b"}",
    "an exponent of 400 digits": b'{"n_layer": 1e' + b"9" * 400 + b"}",
    "objects within lists, 2,000 deep": b'[{"a":' * 2000 + b"1" + b"}]" * 2000,
    "900 deep": b'{"a":' * 900 + b"1" + b"}" * 900,
    "10 million spaces": b'{"a": 1' + b" " * 10_000_000 + b"}",
    "10 million zeros": b'{"a": [' + b"0," * 10_000_000 + b"0]}",
    "3 million objects": b'{"a": [' + b"{}," * 3_000_000 + b"{}]}",
    "a text of 20 million escapes": b'{"a": "' + b"\\u0041" * 3_000_000 + b'"}',
    "a text without an end": b'{"a": "' + b"x" * 10_000_000,
    "null": b"null",
    "a text": b'"x"',
    "gzip": b"\x1f\x8b\x08\x00" + b"\xff" * 100,
    "an HTML page": b"<!DOCTYPE html><html><body>404</body></html>",
    "a pointer of LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}
PLACES: tuple[tuple[str, str], ...] = (
    ("hub", "config.json"),
    ("hub", "model.safetensors.index.json"),
    ("hub", "generation_config.json"),
    ("hub", "tokenizer.json"),
    ("hub", "tokenizer_config.json"),
    ("gpt", "tokenizer/vocab.json"),
    ("dist", "metadata.json"),
)


def _json(base: str, name: str, content: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(getattr(bases, base), sandbox.input / "c")
    (root / name).write_bytes(content)
    if "index" in name:  # it is read where the weights are in parts
        (root / "model.safetensors").rename(root / "model-00001-of-00001.safetensors")
    if "tokenizer" in name:
        lines = sandbox.input / "lines.jsonl"
        lines.write_text('{"text": "the cat"}\n')
        words = ["score", "--ckpt", root, "--input", lines, "--output", sandbox.output]
        return [*words, "--device", "cpu"]
    return converting(root, sandbox)


ATTACKS = [
    Attack(f"{name}: {what}", partial(_json, base, name, content), refused=None)
    for base, name in PLACES
    for what, content in JSON.items()
]

# ---- config.json, field by field ---------------------------------------------------------------

FIELDS = """n_layer n_embd n_head n_positions n_ctx vocab_size n_inner layer_norm_epsilon
model_type architectures activation_function tie_word_embeddings dtype torch_dtype
scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn bos_token_id
eos_token_id quantization_config rope_scaling num_key_value_heads auto_map
transformers_version add_cross_attention
initializer_range""".split()
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "a text": "7",
    "a text of nothing": "",
    "a float": 2.0,
    "1e30": 1e30,
    "-2**63": -(2**63),
    "an empty list": [],
    "an empty object": {},
    "a list of lists": [[[]]],
    "an object of objects": {"a": {"b": {"c": 1}}},
    "a text of 2 MB": "x" * 2_000_000,
    "a list of 100,000": [1] * 100_000,
    "bidi": "\u202egpt2",
}


def _config(changes: dict[str, Any], sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.hub, sandbox.input / "c")
    path = root / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return converting(root, sandbox)


ATTACKS += [
    Attack(f"config.json: {field} is {what}", partial(_config, {field: value}), refused=None)
    for field in FIELDS
    for what, value in VALUES.items()
]

# ---- safetensors -------------------------------------------------------------------------------


def _safetensors(header: bytes | None, change: str, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.hub, sandbox.input / "c")
    path = next(root.glob("*.safetensors"))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    about = json.loads(data[8 : 8 + length])
    names = [name for name in about if name != "__metadata__"]
    entry = about[names[0]]
    text, body = json.dumps(about), data[8 + length :]
    if change == "a key of another spelling":
        text = text.replace('"dtype"', '"dt\\u0079pe"')
    elif change == "shape twice":
        text = text.replace('"shape": ', '"shape": [1], "shape": ', 1)
    elif change == "offsets twice":
        text = text.replace('"data_offsets": ', '"data_offsets": [0, 4], "data_offsets": ', 1)
    elif change == "dtype twice":
        text = text.replace('"dtype": ', '"dtype": "F16", "dtype": ', 1)
    elif change == "metadata twice":
        text = '{"__metadata__": {"a": "b"}, "__metadata__": {"format": "pt"},' + text[1:]
    elif change == "a name by an escape twice":
        again = json.dumps({names[0].replace("w", "\\u0077"): entry}).replace("\\\\u", "\\u")
        text = text[:-1] + "," + again[1:]
    elif change == "a hole between tensors":
        entry["data_offsets"] = [entry["data_offsets"][0] + 4, entry["data_offsets"][1] + 4]
        text = json.dumps(about)
    elif change == "bytes after the last tensor":
        body += bytes(1000)
    elif change == "bytes missing at the end":
        body = body[:-1]
    elif change == "one more byte at the front":
        body = b"\0" + body
    elif change == "offsets of floats":
        entry["data_offsets"] = [float(part) for part in entry["data_offsets"]]
        text = json.dumps(about)
    elif change == "offsets of true":
        entry["data_offsets"] = [False, entry["data_offsets"][1]]
        text = json.dumps(about)
    elif change == "three offsets":
        entry["data_offsets"] += [7]
        text = json.dumps(about)
    elif change == "a shape of floats":
        entry["shape"] = [float(size) for size in entry["shape"]]
        text = json.dumps(about)
    elif change == "a shape of nothing":
        entry["shape"] = []
        text = json.dumps(about)
    elif change == "a shape of 1,000 dims":
        entry["shape"] = [1] * 1000 + entry["shape"]
        text = json.dumps(about)
    elif change == "a shape whose product wraps":
        entry["shape"] = [2**32, 2**32, *entry["shape"]]
        text = json.dumps(about)
    elif change == "a shape with 0 that is 2**63 long":
        entry |= {"shape": [0, 2**63], "data_offsets": [0, 0]}
        text = json.dumps(about)
    elif change == "bool for weights":
        entry["dtype"] = "BOOL"
        text = json.dumps(about)
    elif change == "a dtype in small letters":
        entry["dtype"] = entry["dtype"].lower()
        text = json.dumps(about)
    elif change == "a key more":
        entry["evil"] = {"a": [1]}
        text = json.dumps(about)
    elif change == "tensors swapped":
        same = [n for n in names[1:] if about[n]["shape"] == entry["shape"]]
        if same:
            about[names[0]], about[same[0]] = about[same[0]], entry
        text = json.dumps(about)
    elif change == "spaces before the header":
        text = "   " + text
    elif change == "50 MB of spaces after it":
        text += " " * 50_000_000
    elif change == "NULs after the header":
        text += "\0" * 8
    elif change == "a byte order mark":
        text = "\ufeff" + text
    elif change == "a tensor called __metadata__":
        about["__metadata__"] = entry
        text = json.dumps(about)
    elif change == "100,000 tensors of nothing":
        about |= {
            f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)
        }
        text = json.dumps(about)
    else:
        raise AssertionError(change)
    whole = text.encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(whole)) + whole + body)
    return converting(root, sandbox)


HEADERS = (
    "a key of another spelling", "shape twice", "offsets twice", "dtype twice", "metadata twice",
    "a name by an escape twice", "a hole between tensors", "bytes after the last tensor",
    "bytes missing at the end", "one more byte at the front", "offsets of floats",
    "offsets of true", "three offsets", "a shape of floats", "a shape of nothing",
    "a shape of 1,000 dims", "a shape whose product wraps", "a shape with 0 that is 2**63 long",
    "bool for weights", "a dtype in small letters", "a key more", "spaces before the header",
    "50 MB of spaces after it", "NULs after the header", "a byte order mark",
    "a tensor called __metadata__", "100,000 tensors of nothing", "tensors swapped",
)  # fmt: skip
# What these say is what was meant, or cannot be told from it.
READ = (
    "a key of another spelling", "tensors swapped", "spaces before the header",
    "50 MB of spaces after it", "100,000 tensors of nothing", "a key more",
    "bytes after the last tensor",
)  # fmt: skip
ATTACKS += [
    Attack(
        f"safetensors: {change}",
        partial(_safetensors, None, change),
        refused=None if change in READ else True,
    )
    for change in HEADERS
]

# ---- YAML --------------------------------------------------------------------------------------

BASE = """
  num_layers: 1
  hidden_size: 32
  num_attention_heads: 4
  ffn_hidden_size: 64
  max_position_embeddings: 32
  vocab_size: 256
"""


def _yaml(content: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.dist, sandbox.input / "c")
    saved(root / "common.pt", {"iteration": 1})
    (root / "run_config.yaml").write_bytes(content.replace(b"COMMAND", sandbox.command.encode()))
    return converting(root, sandbox)


def _set(name: str, value: str) -> bytes:
    lines = [line for line in BASE.splitlines() if not line.strip().startswith(name)]
    return ("model:\n" + "\n".join([*lines[1:], f"  {name}: {value}"]) + "\n").encode()


YAMLS: dict[str, bytes] = {
    "a merge of itself": b"model: &m\n  <<: *m\n",
    "a merge of a list": b"model:\n  <<: [1, 2]\n" + BASE.encode(),
    "a merge of a text": b"model:\n  <<: abc\n" + BASE.encode(),
    "merges that double": b"a0: &a0 {x: 1}\n"
    + b"".join(b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (n, n, n - 1, n - 1) for n in range(1, 40))
    + b"model: {<<: *a39}\n",
    "an unknown alias": b"model: *nobody\n",
    "an anchor twice": b"a: &a 1\nb: &a 2\nmodel:\n  num_layers: *a\n",
    "an anchor of a megabyte": b"model: &" + b"a" * 900_000 + b" 1\n",
    "a key twice": b"model:" + BASE.encode() + b"  num_layers: 2\n",
    "a set": b"model: !!set {a, b}\n",
    "an ordered map": b"model: !!omap [a: 1]\n",
    "pairs": b"model: !!pairs [a: 1]\n",
    "bytes": b"model: !!binary aGVsbG8=\n",
    "bytes of rubbish": b"model: !!binary '***'\n",
    "a time": b"model: 2001-12-14t21:59:43.10-05:00\n",
    "a time of no day": _set("num_layers", "2001-99-99"),
    "a float by its tag": _set("num_layers", "!!float '1'"),
    "a text by its tag": _set("num_layers", "!!str 1"),
    "a number by its tag": _set("num_layers", "!!int '1'"),
    "a number of rubbish": _set("num_layers", "!!int 'abc'"),
    "a truth of rubbish": _set("num_layers", "!!bool 'abc'"),
    "yes": _set("num_layers", "yes"),
    "on": _set("hidden_size", "on"),
    "octal": _set("num_layers", "0o1"),
    "old octal": _set("hidden_size", "0100"),
    "hexadecimal of 900,000 digits": _set("num_layers", "0x" + "f" * 900_000),
    "binary of 900,000 digits": _set("num_layers", "0b" + "1" * 900_000),
    "base 60 of 100,000 parts": _set("num_layers", "1" + ":59" * 100_000),
    "floats of base 60": _set("hidden_size", "1:59.5"),
    "a number with underscores": _set("hidden_size", "3_2"),
    "a tag of numpy": b"model: !!python/object/apply:numpy.core.multiarray.scalar [1]\n",
    "a tag of a class": b"model: !!python/object:os.system {}\n",
    "a tag by its whole name": b"model: !<tag:yaml.org,2002:python/object/apply:os.system> [x]\n",
    "a tag that is escaped": b"model: !<tag:yaml.org,2002:python%2Fname%3Aos.system> x\n",
    "a tag of a megabyte": b"model: !" + b"t" * 900_000 + b" 1\n",
    "a tag of escapes": b"model: !a%1b%5b2J x\n",
    "a directive of YAML 9": b"%YAML 9.9\n---\nmodel: {}\n",
    "a directive of rubbish": b"%" + b"x" * 100_000 + b"\n---\nmodel: {}\n",
    "50,000 documents": b"---\n" * 50_000 + b"model: {}\n",
    "a key that is a mapping": b"? {a: 1}\n: 2\nmodel: {}\n",
    "a key that is an alias of itself": b"? &a [*a]\n: 2\nmodel: {}\n",
    "a key of NaN": b".nan: 1\nmodel: {}\n",
    "a key of null": b"~: 1\nmodel: {}\n",
    "a block text of a megabyte": b"model: |\n  " + b"x" * 900_000 + b"\n",
    "a folded text of lines": b"model: >\n" + b"  x\n" * 200_000,
    "a quote without an end": b'model: "' + b"x" * 900_000,
    "flow lists of 400,000": b"model: [" + b"a," * 400_000 + b"]\n",
    "300,000 question marks": b"?" * 300_000,
    "300,000 colons": b": " * 300_000,
    "300,000 dashes": b"- " * 300_000,
    "100,000 brackets in turn": b"{[" * 100_000,
    "100,000 anchors": b"".join(b"- &a%d x\n" % n for n in range(80_000)),
    "UTF-16": ("model:" + BASE).encode("utf-16"),
    "a NUL": b"model: a\0b\n",
    "NEL for line breaks": "model:\u0085  num_layers: 1\u0085".encode(),
    "escapes in a key": b'"\\e[2J": 1\nmodel: {}\n',
    "a path to a file": _set("num_layers", "!include /etc/passwd"),
    "a variable": _set("num_layers", "${oc.env:HOME}"),
    "a variable of itself": _set("num_layers", "${model.num_layers}"),
}
ATTACKS += [
    Attack(f"run_config.yaml: {what}", partial(_yaml, content), refused=None)
    for what, content in YAMLS.items()
]

# ---- TOML --------------------------------------------------------------------------------------


def _toml(command: str, content: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    path = sandbox.input / "x.toml"
    path.write_bytes(content)
    if command == "--config":
        return ["convert", "--config", path, "--ckpt", bases.gpt, "--output", sandbox.output]
    (sandbox.input / "text.txt").write_text("the cat sat on the mat\n" * 50)
    return [
        *("lm", "--init", path, "--tokenizer", bases.gpt / "tokenizer", "--device", "cpu"),
        *("--data", sandbox.input / "text.txt", "--output-dir", sandbox.output),
        *("--max-steps", 1, "--seq-length", 8, "--global-batch", 1),
    ]


TOMLS: dict[str, bytes] = {
    "a byte order mark": b'\xef\xbb\xbfto = "hf"\n',
    "line ends of a Mac": b'to = "hf"\rtp = 1\r',
    "a table twice": b"[a]\nx = 1\n[a]\ny = 2\n",
    "a table and a value": b"a = 1\n[a]\n",
    "lists of tables, 50,000": b"[[a]]\n" * 50_000,
    "dotted keys, 100,000": b"".join(b"a.b%d = 1\n" % n for n in range(60_000)),
    "a text of 900,000 quotes": b'a = """' + b'""\\"' * 200_000 + b'"""\n',
    "an escape of no letter": b'a = "\\q"\n',
    "an escape of a surrogate": b'a = "\\ud800"\n',
    "an escape beyond Unicode": b'a = "\\UFFFFFFFF"\n',
    "a number of underscores": b"tp = 1__0\n",
    "hexadecimal of 800,000 digits": b"tp = 0x" + b"f" * 800_000 + b"\n",
    "octal": b"tp = 0o1\n",
    "a number before 0": b"tp = 007\n",
    "a float for a number": b'to = "hf"\ntp = 1.5\n',
    "true for a number": b'to = "hf"\ntp = true\n',
    "a text for a number": b'to = "hf"\ntp = "1; touch canary"\n',
    "a time for a number": b'to = "hf"\ntp = 07:32:00\n',
    "a list for a text": b'to = ["hf", "megatron"]\n',
    "nothing for a text": b'to = ""\n',
    "an unknown name": b"evil = 1\n",
    "a name of escapes": b'"\\u001b[2J\\u202e" = 1\n',
    "a name of nothing": b'"" = 1\n',
    "a name with a dash before": b'"--to" = "hf"\n',
    "a name of an option's short form": b'o = "x"\n',
    "ckpt of another place": b'to = "hf"\nckpt = "/etc/passwd"\n',
    "output of another place": b'to = "hf"\noutput = "/tmp/canary"\n',
    "inline tables, 2,000 deep": b"a = " + b"{a = " * 2000 + b"1" + b"}" * 2000,
    "lists within tables, 900 deep": b"a = " + b"[{a = " * 450 + b"1" + b"}]" * 450,
    "UTF-16": 'to = "hf"'.encode("utf-16"),
    "only spaces": b" " * 900_000,
    "JSON": b'{"to": "hf"}',
    "YAML": b"to: hf\n",
}
# Such a file says what was meant, or is overruled by the command line.
ATTACKS += [
    Attack(
        f"{command}: {what}",
        partial(_toml, command, content),
        refused=True if what.endswith("for a number") else None,
    )
    for command in ("--config", "--init")
    for what, content in TOMLS.items()
]

# ---- trackers and folders ----------------------------------------------------------------------

TRACKERS: dict[str, bytes] = {
    "0": b"0",
    "00000000000000000001": b"00000000000000000001",
    "+1": b"+1",
    "1e3": b"1e3",
    "0x1": b"0x1",
    "1_0": b"1_0",
    "other digits": "\u0661".encode(),
    "a superscript": "\u00b2".encode(),
    "1.0": b"1.0",
    "two lines": b"1\n2\n",
    "spaces": b"   ",
    "a slash": b"1/../release",
    "RELEASE": b"RELEASE",
    "release and more": b"release\n\x1b[2J",
    "a byte order mark": b"\xef\xbb\xbfrelease",
    "2**63": str(2**63).encode(),
    "a link's text": b"../../../home",
}


def _tracker(content: bytes, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.gpt, sandbox.input / "c")
    (root / "latest_checkpointed_iteration.txt").write_bytes(content)
    return inspecting(root)


ATTACKS += [
    Attack(f"tracker: {what}", partial(_tracker, content), refused=None)
    for what, content in TRACKERS.items()
]
FOLDERS = (
    "mp_rank_00_000", "mp_rank_-1", "mp_rank_99999999999999999999", "mp_rank_0x", "mp_rank_01",
    "mp_rank_00_000_000", "mp_rank_\u0660\u0660", "mp_rank_00 ", "MP_RANK_00", "mp_rank_00\n",
    "mp_rank_\x1b[2J", "mp_rank_10", "mp_rank_00_007", "mp_rank_00_000_001",
)  # fmt: skip


def _folder(name: str, renamed: bool, sandbox: Sandbox, bases: Bases) -> Words:
    """Add a rank's folder of another name, or have it in the place of the right one."""
    root = copied(bases.gpt, sandbox.input / "c")
    right: Path = root / "release" / "mp_rank_00"
    if renamed:
        right.rename(right.with_name(name))
    else:
        copied(right, right.with_name(name))
    return converting(root, sandbox)


ATTACKS += [
    Attack(
        f"a rank {'called' if renamed else 'more,'} {name!a}",
        partial(_folder, name, renamed),
        refused=None,
    )
    for name in FOLDERS
    for renamed in (False, True)
]


@attacks(ATTACKS, every=200)
def test_no_table_plays_tricks(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)
