"""Tricks of results that are read back: lists of series, bench, lm-evaluation-harness, scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from support.folders import result_records
from support.reliability.attacks import Attack, Bases, Words, attacks, check, copied
from support.reliability.warm_commands import Sandbox, WarmCommands

pytest_plugins = ["support.reliability.warm_fixtures"]

WILD: dict[str, Any] = {
    "null": None,
    "true": True,
    "a number": 7,
    "-1": -1,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "1e308": 1e308,
    "10**400": 10**400,
    "a text of escapes": "\x1b[2J\u202e",
    "a text of a megabyte": "x" * 1_000_000,
    "a list": [1],
    "a list of lists": [[[1]]],
    "an object": {"a": {"b": 1}},
}
FORMS = ("md", "latex", "csv", "html")


def _with(values: Any, path: str, value: Any) -> Any:
    """Return JSON values with another one at a path such as `points.0.tp`."""
    changed = json.loads(json.dumps(values))
    *above, last = path.split(".")
    place = changed
    for name in above:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[int(last) if isinstance(place, list) else last] = value
    return changed


def _report(value: Any, at: int, curve: bool, sandbox: Sandbox, bases: Bases) -> Words:
    path = sandbox.input / "r.json"
    text = value if isinstance(value, str) else json.dumps(value)
    path.write_text(text, errors="surrogatepass")
    words = ["report", path, "--format", FORMS[at % 4], "--output", sandbox.output]
    return [*words, "--curve"] if curve else words


# ---- bench, the harness, lines of scores -------------------------------------------------------

BENCH: dict[str, Any] = {
    "task": "bench",
    "settings": {"mode": "infer", "dtype": "float32", "ckpt": None, "batch": 8, "seq_length": 128},
    "points": [
        {"model": "a", "tp": tp, "parameters": 1000, "tokens_per_second": 10.0 * tp, "seconds": 1.5}
        for tp in (1, 2)
    ],
}
BENCH_FIELDS = """settings settings.mode settings.dtype settings.ckpt settings.batch points points.0
points.0.model points.0.tp points.0.parameters points.0.tokens_per_second
points.1.seconds""".split()
HARNESS: dict[str, Any] = {
    "results": {"lambada": {"acc,none": 0.5, "acc_stderr,none": 0.01, "perplexity,none": 9.5}},
    "n-shot": {"lambada": 0},
    "higher_is_better": {"lambada": {"acc": True, "perplexity": False}},
    "config": {
        "model": "hf",
        "model_num_parameters": 1000,
        "limit": None,
        "mlm_eval": {"path": "a", "digest": "d", "iteration": 7, "consumed_samples": 70},
    },
    "model_name": "a",
}
HARNESS_FIELDS = """results results.lambada results.lambada.acc,none n-shot n-shot.lambada
higher_is_better higher_is_better.lambada higher_is_better.lambada.acc config config.model
config.model_num_parameters config.limit config.mlm_eval config.mlm_eval.path
config.mlm_eval.digest config.mlm_eval.iteration config.mlm_eval.consumed_samples
model_name""".split()
SCORES: list[Any] = [
    {"tokens": [1, 2], "logprobs": [-1.0, -2.0], "greedy": [True, False], "sum": -3.0}
] * 2
ATTACKS = [
    Attack(
        f"{name}: {field} is {what}{' in a curve' if curve else ''}",
        partial(_report, _with(base, field, value), nth + at, curve),
        refused=None,
    )
    for name, base, fields in (
        ("bench", BENCH, BENCH_FIELDS),
        ("harness", HARNESS, HARNESS_FIELDS),
    )
    for nth, field in enumerate(fields)
    for at, (what, value) in enumerate(WILD.items())
    for curve in (False, True)
    if (nth + at) % 3 != 0 or not curve
]
TASKS: dict[str, Any] = {
    "a task's name of escapes": {"\x1b[2J\u202e": {"acc,none": 0.5}},
    "a task's name of a formula": {"=cmd|' /C calc'!A0": {"acc,none": 0.5}},
    "a task's name of a script": {"<script>alert(1)</script>": {"acc,none": 0.5}},
    "a task's name of TeX": {"\\input{/etc/passwd}$x": {"acc,none": 0.5}},
    "a task's name of a table": {"a | b\n---|---": {"acc,none": 0.5}},
    "a task's name of a megabyte": {"t" * 1_000_000: {"acc,none": 0.5}},
    "a metric of escapes": {"lambada": {"\x1b[2J,\x1b[2J": 0.5}},
    "a metric of commas": {"lambada": {",,,,": 0.5}},
    "no tasks": {},
    "20,000 tasks": {f"t{n}": {"acc,none": 0.5} for n in range(20_000)},
    "5,000 metrics": {"lambada": {f"m{n},none": 0.5 for n in range(5000)}},
}
ATTACKS += [
    Attack(
        f"harness: {what}",
        partial(_report, HARNESS | {"results": tasks}, at, bool(at % 2)),
        refused=None,
    )
    for at, (what, tasks) in enumerate(TASKS.items())
]
LINES: dict[str, Any] = {
    "scores that are texts": [{"logprobs": ["-1"]}],
    "scores of NaN": [{"logprobs": [float("nan")]}],
    "scores of 10**400": [{"logprobs": [10**400]}],
    "scores of 1e308": [{"logprobs": [-1e308, -1e308]}],
    "scores above 0": [{"logprobs": [1000.0]}],
    "scores of lists": [{"logprobs": [[[1.0]]]}],
    "choices that are none": [{"logprobs": [1.0], "choices": 7}],
    "greedy, 900 deep": ['{"logprobs": [-1.0], "greedy": ' + "[" * 900 + "]" * 900 + "}"],
    "greedy that is a text": [{"logprobs": [-1.0], "greedy": "yes"}],
    "a second line of rubbish": [{"logprobs": [-1.0]}, "rubbish"],
    "a second line of a list": [{"logprobs": [-1.0]}, [1]],
    "no scores": [{"logprobs": []}],
}


def _lines(lines: list[Any], at: int, sandbox: Sandbox, bases: Bases) -> Words:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    return _report("\n".join(texts) + "\n", at, bool(at % 2), sandbox, bases)


ATTACKS += [
    Attack(f"scores: {what}", partial(_lines, lines, at), refused=None)
    for at, (what, lines) in enumerate(LINES.items())
]

# ---- lists of series ---------------------------------------------------------------------------

RECORD = result_records.zero_shot("wikitext103", 19.3)


def _series(entries: Any, more: dict[str, Any], sandbox: Sandbox, bases: Bases) -> Words:
    path = sandbox.input / "F.json"
    (sandbox.input / "F.a.json").write_text(json.dumps(RECORD))
    secret = sandbox.root / "home" / "secret.json"
    secret.write_text(json.dumps(RECORD | {"task": "canary"}))
    listed = json.loads(json.dumps(entries).replace("SECRET", str(secret)))
    path.write_text(json.dumps(RECORD | {"series": listed} | more))
    return ["report", path, "--format", "csv", "--output", sandbox.output]


def _entry(record: Any = "F.a.json", **more: Any) -> dict[str, Any]:
    return {"checkpoint": "iter_0000001", "iteration": 1, "record": record} | more


SERIES: dict[str, Any] = {
    "a record elsewhere": [_entry("SECRET")],
    "a record that goes up": [_entry("../../home/secret.json")],
    "a record of a device": [_entry("/dev/zero")],
    "a record of standard input": [_entry("/dev/stdin")],
    "itself": [_entry("F.json")],
    "a folder": [_entry(".")],
    "nothing": [_entry("")],
    "a NUL": [_entry("a\0b")],
    "escapes": [_entry("\x1b[2J\u202e")],
    "5,000 letters": [_entry("a" * 5000)],
    "a surrogate": [_entry("\ud800")],
    "a record that is not there": [_entry("F.b.json")],
    "one record 3,000 times": [_entry()] * 3000,
    "a number": [_entry(7)],
    "an iteration that is a text": [_entry(iteration="\x1b[2J")],
    "an iteration of 10**400": [_entry(iteration=10**400)],
    "a checkpoint of escapes": [_entry(checkpoint="\x1b[2J\u202e")],
    "no entries": [],
    "entries of numbers": [1, 2],
    "an object": {"a": 1},
}
ATTACKS += [
    Attack(
        f"a series of {what}",
        partial(_series, entries, {}),
        refused=True if "elsewhere" in what or "goes up" in what else None,
    )
    for what, entries in SERIES.items()
]


def _again(content: Any, sandbox: Sandbox, bases: Bases) -> Words:
    """Evaluate a series whose list stands there already, changed by somebody."""
    data = sandbox.input / "wiki.test.tokens"
    data.write_text(" = A = \n the cat sat on the mat \n" * 20)
    root = copied(bases.gpt, sandbox.input / "runs")
    (root / "release").rename(root / "iter_0000001")
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    sandbox.output.mkdir()
    text = content if isinstance(content, str) else json.dumps(content)
    (sandbox.output / "F.json").write_text(text, errors="surrogatepass")
    return [
        *("wikitext103", "--ckpt", root, "--iterations", "all", "--data", data, "--device", "cpu"),
        *("--output", sandbox.output / "F.json", "--limit", 1),
    ]


LISTS: dict[str, Any] = {
    "rubbish": "rubbish",
    "nothing": "",
    "deep": "[" * 100_000,
    "a list": [],
    "another record": RECORD,
    "no entries": RECORD | {"series": []},
    "entries of numbers": RECORD | {"series": [1]},
    "an entry that goes up": RECORD | {"series": [_entry("../../home/precious.txt")]},
    "an entry of escapes": RECORD | {"series": [_entry("\x1b[2J")]},
    "an entry of a NUL": RECORD | {"series": [_entry("a\0b")]},
    "failed that is a text": RECORD | {"series": [], "failed": "\x1b[2J"},
    "settings that are a list": RECORD | {"series": [], "settings": [1]},
    "a run that is null": RECORD | {"series": [], "run": None},
}
ATTACKS += [
    Attack(f"a series' list of {what}", partial(_again, content), refused=None)
    for what, content in LISTS.items()
]

# ---- what stands where a result is to be written -----------------------------------------------

Put = Callable[[Path, Sandbox], None]


def _device(path: Path, sandbox: Sandbox) -> None:
    path.symlink_to("/dev/zero")


def _precious(path: Path, sandbox: Sandbox) -> None:
    path.symlink_to(sandbox.root / "home" / "precious.txt")


PUTS: dict[str, Put] = {
    "a link to a device": _device,
    "a link to a person's file": _precious,
    "a link to a person's folder": lambda path, s: path.symlink_to(s.root / "home"),
    "a link to nothing": lambda path, s: path.symlink_to("out.nothing"),
    "a link to itself": lambda path, s: path.symlink_to(path.name),
    "a folder": lambda path, s: path.mkdir(),
    "a person's text": lambda path, s: path.write_text("a person's own") and None,
    "a person's JSON": lambda path, s: path.write_text('{"mine": 1}') and None,
    "deep JSON": lambda path, s: path.write_text('{"a":' * 100_000) and None,
    "a record of lists": lambda path, s: (
        path.write_text(json.dumps({"task": [1], "settings": [2], "versions": [3]})) and None
    ),
    "a record whose limit is a text": lambda path, s: (
        path.write_text(
            json.dumps({"task": "wikitext103", "settings": {"limit": "x"}, "versions": {}})
        )
        and None
    ),
}


def _onto(command: str, put: Put, overwrite: bool, sandbox: Sandbox, bases: Bases) -> Words:
    put(sandbox.output, sandbox)
    more = ["--output", sandbox.output, *["--overwrite"] * overwrite]
    if command == "report":
        record = sandbox.input / "r.json"
        record.write_text(json.dumps(RECORD))
        return ["report", record, "--format", "csv", *more]
    data = sandbox.input / "data.jsonl"
    data.write_text('{"text": "the cat sat on the mat"}\n')
    if command == "score":
        return ["score", "--ckpt", bases.gpt, "--input", data, "--device", "cpu", *more]
    return ["lambada", "--ckpt", bases.gpt, "--data", data, "--device", "cpu", *more]


ATTACKS += [
    Attack(
        f"{command} onto {what}{', --overwrite' if overwrite else ''}",
        partial(_onto, command, put, overwrite),
        refused=None,
    )
    for command in ("report", "score", "lambada")
    for what, put in PUTS.items()
    for overwrite in (False, True)
]


@attacks(ATTACKS, every=150)
def test_no_result_is_believed(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)


def test_right_ones_are_read(warm: WarmCommands, bases: Bases):
    """What the attacks change is right before they do."""
    for prepare in (
        partial(_report, BENCH, 0, False),
        partial(_report, HARNESS, 1, False),
        partial(_lines, SCORES, 2),
        partial(_series, [_entry()], {}),
    ):
        done = Attack("right", prepare, refused=False).run(warm, bases)
        assert done.faults(refused=False) == [], done.err
