"""Places: links out of a folder, pipes and devices for files, and what --overwrite may remove."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from support.reliability.attacks import (
    Attack,
    Bases,
    Words,
    attacks,
    converting,
    copied,
    inspecting,
    model_file,
)
from support.reliability.warm_commands import Sandbox, WarmCommands, told

pytest_plugins = ["support.reliability.warm_fixtures"]

# ---- what is no file in the place of one --------------------------------------------------------

Put = Callable[[Path, Sandbox], None]


def _pipe(path: Path, sandbox: Sandbox) -> None:
    os.mkfifo(path)


def _sparse(path: Path, sandbox: Sandbox) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


def _socket(path: Path, sandbox: Sandbox) -> None:
    import socket

    here = os.getcwd()
    os.chdir(path.parent)  # its name may be 108 bytes long
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(path.name)
    os.chdir(here)


def _ring(path: Path, sandbox: Sandbox) -> None:
    path.symlink_to(path.name)


PUTS: dict[str, Put] = {
    "a pipe": _pipe,
    "a link to /dev/zero": lambda path, s: path.symlink_to("/dev/zero"),
    "a link to /dev/stdin": lambda path, s: path.symlink_to("/dev/stdin"),
    "a terabyte of holes": _sparse,
    "a link to /proc/kcore": lambda path, s: path.symlink_to("/proc/kcore"),
    "a link to /proc/self/mem": lambda path, s: path.symlink_to("/proc/self/mem"),
    "a socket": _socket,
    "a folder": lambda path, s: path.mkdir(),
    "a link to itself": _ring,
    "a link to nothing": lambda path, s: path.symlink_to("nothing"),
}


def _in_place(base: str, name: str, put: Put, sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(getattr(bases, base), sandbox.input / "c")
    (path,) = list(root.glob(name)) or [root / name]
    if path.exists():
        path.unlink()
    put(path, sandbox)
    if "tokenizer/" in name:
        lines = sandbox.input / "lines.jsonl"
        lines.write_text('{"text": "the cat"}\n')
        words = ["score", "--ckpt", root, "--input", lines, "--output", sandbox.output]
        return [*words, "--device", "cpu"]
    return converting(root, sandbox)


FILES = (
    ("gpt", "latest_checkpointed_iteration.txt"),
    ("gpt", "release/mp_rank_00/model_optim_rng.pt"),
    ("gpt", "tokenizer/vocab.json"),
    ("gpt", "tokenizer/merges.txt"),
    ("gpt", "tokenizer/tokenizer_config.json"),
    ("bert", "tokenizer/vocab.txt"),
    ("dist", ".metadata"),
    ("dist", "common.pt"),
    ("dist", "metadata.json"),
    ("dist", "__0_0.distcp"),
    ("hub", "config.json"),
    ("hub", "generation_config.json"),
    ("hub", "model.safetensors"),
    ("hub", "model.safetensors.index.json"),
    ("hub", "tokenizer_config.json"),
)
# Such files may be missing, or are read where another one is not there.
MAY_BE_ABSENT = (
    "latest_checkpointed_iteration.txt", "tokenizer_config.json", "metadata.json",
    "generation_config.json", "vocab.json", "merges.txt", "index.json",
)  # fmt: skip
ATTACKS = [
    Attack(
        f"{base} {name}: {what}",
        partial(_in_place, base, name, put),
        refused=None if name.endswith(MAY_BE_ABSENT) else True,
    )
    for base, name in FILES
    for what, put in PUTS.items()
]


# ---- inputs and outputs of commands -------------------------------------------------------------


def _given(words: list[str], put: Put, sandbox: Sandbox, bases: Bases) -> Words:
    path = sandbox.input / "given.json"
    put(path, sandbox)
    named = {"PATH": path, "GPT": bases.gpt, "BERT": bases.bert, "OUT": sandbox.output}
    return [named.get(word, word) for word in words]


COMMANDS: dict[str, list[str]] = {
    "--ckpt": ["inspect", "--ckpt", "PATH"],
    "a record": ["report", "PATH"],
    "--predictions": ["ensemble", "--predictions", "PATH"],
    "--config": ["inspect", "--ckpt", "GPT", "--config", "PATH"],
    "--recipe": [
        "race",
        "--ckpt",
        "BERT",
        "--data",
        ".",
        "--output-dir",
        "OUT",
        "--recipe",
        "PATH",
    ],
    "--init": ["lm", "--init", "PATH", "--data", ".", "--output-dir", "OUT"],
    "wikitext103 --data": ["wikitext103", "--ckpt", "GPT", "--data", "PATH", "--device", "cpu"],
    "lambada --data": ["lambada", "--ckpt", "GPT", "--data", "PATH", "--device", "cpu"],
    "race --data": ["race", "--ckpt", "BERT", "--data", "PATH", "--output-dir", "OUT"],
    "squad --train": [
        "squad",
        "--ckpt",
        "BERT",
        "--train",
        "PATH",
        "--dev",
        "PATH",
        "--output-dir",
        "OUT",
    ],
    "--vocab-file": [
        "convert",
        "--ckpt",
        "GPT",
        "--to",
        "hf",
        "--output",
        "OUT",
        "--vocab-file",
        "PATH",
    ],
}
GIVEN = {what: put for what, put in PUTS.items() if what != "a folder"}
ATTACKS += [
    Attack(f"{command}: {what}", partial(_given, words, put))
    for command, words in COMMANDS.items()
    for what, put in GIVEN.items()
]


# ---- links --------------------------------------------------------------------------------------


def _linked_tokenizer(name: str, sandbox: Sandbox, bases: Bases) -> Words:
    """A side file of the tokenizer that leads to a person's own file."""
    root = copied(bases.gpt, sandbox.input / "c")
    secret = sandbox.root / "home" / "secret.json"
    secret.write_text('{"password": "canary"}')
    path = root / "tokenizer" / name
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    return converting(root, sandbox, "hf")


SIDE_FILES = (
    "special_tokens_map.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
LINKED = [
    Attack(f"a link out of the folder: {name}", partial(_linked_tokenizer, name), refused=None)
    for name in SIDE_FILES
]


# ---- --overwrite --------------------------------------------------------------------------------


def _foreign(names: list[str], sandbox: Sandbox, bases: Bases, *, checkpoint: bool = True) -> Words:
    if checkpoint:
        copied(bases.gpt, sandbox.output)
    for name in names:
        path = sandbox.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a person's own")
    return [*converting(bases.gpt, sandbox), "--overwrite"]


KEPT: dict[str, tuple[list[str], bool]] = {
    "notes beside a checkpoint": (["notes.txt"], True),
    "sources beside a checkpoint": (["src/main.py"], True),
    "a file in a rank's folder": (["release/mp_rank_00/mine.txt"], True),
    "a hidden file": ([".git/config"], True),
    "a folder called release": (["release/thesis.txt", "src/main.py"], False),
    "a folder called iter_0000001": (["iter_0000001/thesis.txt"], False),
    "a file called model.bin": (["model.bin"], False),
    "a tracker alone": (["latest_checkpointed_iteration.txt", "thesis.txt"], False),
    "a config.json alone": (["config.json", "thesis.txt"], False),
    "a name like a weight file": (["model.safetensors.txt"], True),
    "a name with a line break": (["model.safetensors\n"], True),
    "a name of escapes": (["\x1b[2J"], True),
}
OVERWRITES = [
    Attack(f"--overwrite: {what}", partial(_foreign, names, checkpoint=checkpoint))
    for what, (names, checkpoint) in KEPT.items()
]


def _link_target(sandbox: Sandbox, bases: Bases) -> Words:
    copied(bases.gpt, sandbox.root / "home" / "mine")
    sandbox.output.symlink_to(sandbox.root / "home" / "mine")
    return converting(bases.gpt, sandbox)


def _link_inside(sandbox: Sandbox, bases: Bases) -> Words:
    """A checkpoint in the way whose rank folder is a link to a person's folder."""
    copied(bases.gpt, sandbox.output)
    model_file(sandbox.output).unlink()
    (sandbox.output / "release/mp_rank_00").rmdir()
    (sandbox.output / "release/mp_rank_00").symlink_to(sandbox.root / "home")
    return [*converting(bases.gpt, sandbox), "--overwrite"]


def _rank_link(sandbox: Sandbox, bases: Bases) -> Words:
    root = copied(bases.gpt, sandbox.input / "c")
    model_file(root).unlink()
    model_file_of = root / "release/mp_rank_00/model_optim_rng.pt"
    model_file_of.symlink_to("/etc/passwd")
    return inspecting(root)


OVERWRITES += [
    Attack("the target is a link to a checkpoint", _link_target),
    Attack("--overwrite: a link to a person's folder inside", _link_inside, refused=None),
    Attack("a rank's file is a link to another file", _rank_link),
]


# ---- names that become files --------------------------------------------------------------------

SETS = ("/tmp/x", "../../x", "..", ".", "", "a/b", "a\\b", "\0", "a\nb", "\x1b[2J", ".x", "n" * 300)


def _named_set(name: str, sandbox: Sandbox, bases: Bases) -> Words:
    header = {
        "predictions_of": "race",
        "set": name,
        "role": "dev",
        "labelled": True,
        "version": "",
        "examples": 1,
        "seed": 1,
        "recipe": "r",
        "null_threshold": None,
        "threshold_is_fixed": False,
        "checkpoint": {"path": "b", "num_parameters": 1},
    }
    row = {"id": "q", "label": 0, "probabilities": [0.4, 0.3, 0.2, 0.1]}
    words: list[object] = ["ensemble", "--output-dir", sandbox.output]
    for number in (1, 2):
        path = sandbox.input / f"{number}.jsonl"
        path.write_text(f"{json.dumps(header)}\n{json.dumps(row)}\n")
        words += ["--predictions", path]
    return words


ATTACKS += [Attack(f"a set called {name[:12]!a}", partial(_named_set, name)) for name in SETS]
ATTACKS += LINKED + OVERWRITES


@attacks(ATTACKS, every=20)
def test_nothing_is_read_or_written_elsewhere(attack: Attack, warm: WarmCommands, bases: Bases):
    done = attack.run(warm, bases)
    assert attack.faults(done) == [], told(done)
    if attack in OVERWRITES:
        for path in done.sandbox.root.rglob("*"):
            if path.is_file() and path.name in ("thesis.txt", "notes.txt", "main.py", "mine.txt"):
                assert path.read_text() == "a person's own"
    if attack in LINKED and done.sandbox.output.exists():
        for path in done.sandbox.output.rglob("*"):
            assert not path.is_file() or b"canary" not in path.read_bytes(), path
