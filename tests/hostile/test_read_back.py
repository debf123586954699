"""What we have written and read again: records, predictions, journals, states of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.folders import result_records
from support.reliability.attacks import Attack, Bases, Words, attacks, check, copied
from support.reliability.warm_commands import Sandbox, WarmCommands

pytest_plugins = ["support.reliability.warm_fixtures"]

WRONG: dict[str, Any] = {
    "a text of escapes": "\x1b[2J\u202e",
    "a list": [1],
    "an object": {"a": {"b": 1}},
    "true": True,
    "null": None,
    "-1": -1,
    "10**400": 10**400,
}
"""Values that are right in few places."""

DEEP = "[" * 100_000


def _at(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return JSON values with another one at a path such as `settings.data`."""
    changed: dict[str, Any] = json.loads(json.dumps(values))
    *above, last = path.split(".")
    place = changed
    for name in above:
        place = place[name]
    place[last] = value
    return changed


# ---- records -----------------------------------------------------------------------------------

RECORD = result_records.zero_shot("wikitext103", 19.3)
TUNED = result_records.fine_tuned("race", {"test": 80.0, "test-middle": 81.0, "test-high": 79.0})
FIELDS = """task protocol metrics counts settings checkpoint settings.data settings.limit
settings.data.warnings settings.seq_length settings.stride settings.dtype checkpoint.path
checkpoint.digest checkpoint.config checkpoint.num_parameters checkpoint.config.num_layers
checkpoint.config.family metrics.adjusted_ppl""".split()
TUNED_FIELDS = """settings.seeds settings.version settings.recipe metrics.median
metrics.median.test metrics.median.test.accuracy metrics.median.test.total counts.train_examples
settings.data.sets""".split()


def _report(content: Any, sandbox: Sandbox, bases: Bases, form: str = "md") -> Words:
    path = sandbox.input / "r.json"
    path.write_text(
        content if isinstance(content, str) else json.dumps(content), errors="surrogatepass"
    )
    return ["report", path, "--format", form, "--output", sandbox.output]


# Where such a value is right, or is no more than shown.
ATTACKS = [
    Attack(f"record: {field} is {what}", partial(_report, _at(base, field, value)), refused=None)
    for base, fields in ((RECORD, FIELDS), (TUNED, TUNED_FIELDS))
    for field in fields
    for what, value in WRONG.items()
]
RECORDS: dict[str, str] = {
    "deep lists": DEEP,
    "deep objects": '{"a":' * 50_000,
    "deep in a field": json.dumps(RECORD)[:-1] + ', "x": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "5,000 digits": json.dumps(RECORD).replace("19.3", "9" * 5000),
    "NaN": json.dumps(RECORD).replace("19.3", "NaN"),
    "1e999": json.dumps(RECORD).replace("19.3", "1e999"),
    "an empty file": "",
    "a list": "[]",
    "a number": "7",
    "a text of 4 MB": json.dumps("x" * 4_000_000),
    "a key of 4 MB": json.dumps({"x" * 4_000_000: 1}),
    "no text": "\udcff\udcfe",
    "a surrogate in its task": json.dumps(RECORD).replace("wikitext103", "\\ud800"),
    "a task of 600,000 letters": json.dumps(_at(RECORD, "task", "t" * 600_000)),
    "a task of escapes": json.dumps(_at(RECORD, "task", "\x1b[2J")),
    "a byte order mark of UTF-16": "\ufffe",
}
ATTACKS += [Attack(f"record: {what}", partial(_report, it)) for what, it in RECORDS.items()]


# ---- predictions -------------------------------------------------------------------------------

HEADER: dict[str, Any] = {
    "predictions_of": "race",
    "set": "dev-middle",
    "role": "dev",
    "labelled": True,
    "version": "",
    "examples": 2,
    "seed": 1,
    "checkpoint": {"path": "bert", "digest": "d", "num_parameters": 7, "config": {}},
    "recipe": "r",
    "null_threshold": None,
    "threshold_is_fixed": False,
}
ROWS: list[Any] = [
    {"id": "q0", "label": 0, "probabilities": [0.7, 0.1, 0.1, 0.1]},
    {"id": "q1", "label": 1, "probabilities": [0.2, 0.4, 0.2, 0.2]},
]
SQUAD = HEADER | {"predictions_of": "squad", "set": "dev", "version": "2.0"}
ANSWERS: list[Any] = [
    {
        "id": f"q{n}",
        "text": "a",
        "answers": ["a"],
        "null_odds": -1.0,
        "n_best": [{"text": "a", "probability": 0.9}],
    }
    for n in range(2)
]


def _ensemble(
    header: Any, rows: list[Any], sandbox: Sandbox, bases: Bases, *, twice: bool = True
) -> Words:
    words: list[object] = ["ensemble", "--output-dir", sandbox.output]
    for number in (1, 2):
        path = sandbox.input / str(number) / "dev-middle.jsonl"
        path.parent.mkdir()
        changed = twice or number == 2
        lines = (header, *rows) if changed else (HEADER, *ROWS)
        texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text("\n".join(texts) + "\n", errors="surrogatepass")
        words += ["--predictions", path]
    return words


def _second(row: Any, sandbox: Sandbox, bases: Bases) -> Words:
    """A second member whose last row is another one."""
    return _ensemble(HEADER, [ROWS[0], row], sandbox, bases, twice=False)


HEADERS = {
    f"{name} is {what}": HEADER | {name: value} for name in HEADER for what, value in WRONG.items()
}
# null is "not known" there, and a text may be anything that can be shown.
ATTACKS += [
    Attack(f"predictions: {what}", partial(_ensemble, header, ROWS), refused=None)
    for what, header in HEADERS.items()
]
SETS = ("../../home/canary", "/tmp/canary", ".hidden", "", "a/b", "x\0y", "..", "n" * 5000, "a\nb")
ATTACKS += [
    Attack(f"predictions: the set {name[:20]!a}", partial(_ensemble, HEADER | {"set": name}, ROWS))
    for name in SETS
]
BAD_ROWS: dict[str, Any] = {
    "a list": [],
    "a number": 1,
    "no id": {"label": 1, "probabilities": [0.2, 0.4, 0.2, 0.2]},
    "no label": {"id": "q1", "probabilities": [0.2, 0.4, 0.2, 0.2]},
    "no probabilities": {"id": "q1", "label": 1},
    "three of four probabilities": ROWS[1] | {"probabilities": [0.5, 0.3, 0.2]},
    "probabilities that are texts": ROWS[1] | {"probabilities": ["0.5"] * 4},
    "probabilities that are lists": ROWS[1] | {"probabilities": [[0.5]] * 4},
    "probabilities of NaN": ROWS[1] | {"probabilities": [float("nan")] * 4},
    "probabilities of infinity": ROWS[1] | {"probabilities": [float("inf")] * 4},
    "probabilities of -1": ROWS[1] | {"probabilities": [-1.0, 1.0, 0.5, 0.5]},
    "probabilities of 2": ROWS[1] | {"probabilities": [2.0, 1.0, 0.5, 0.5]},
    "probabilities of 10**400": ROWS[1] | {"probabilities": [10**400] * 4},
    "no probability": ROWS[1] | {"probabilities": []},
    "probabilities that are a text": ROWS[1] | {"probabilities": "abcd"},
    "a label that is a list": ROWS[1] | {"label": [1]},
    "a label of 9": ROWS[1] | {"label": 9},
    "a label that is a text": ROWS[1] | {"label": "1"},
    "an id that is a list": ROWS[1] | {"id": ["q1"]},
    "deep lists": DEEP,
    "no JSON": "{",
    "a surrogate": '{"id": "\\ud800", "label": 1, "probabilities": [0.2, 0.4, 0.2, 0.2]}',
}
ATTACKS += [Attack(f"a row: {what}", partial(_second, row)) for what, row in BAD_ROWS.items()]
BAD_ANSWERS: dict[str, Any] = {
    "answers that are a text": {"answers": "a"},
    "answers that are numbers": {"answers": [1]},
    "odds of NaN": {"null_odds": float("nan")},
    "odds that are a text": {"null_odds": "x"},
    "an n_best of numbers": {"n_best": [1, 2]},
    "an n_best of NaN": {"n_best": [{"text": "a", "probability": float("nan")}]},
    "an n_best that is a text": {"n_best": "abc"},
    "an n_best of objects": {"n_best": [{"a": 1}]},
}
ATTACKS += [
    Attack(f"an answer: {what}", partial(_ensemble, SQUAD, [ANSWERS[0], ANSWERS[1] | change]))
    for what, change in BAD_ANSWERS.items()
]
ATTACKS += [
    Attack(
        f"squad: a threshold that is {what}",
        partial(_ensemble, SQUAD | {"role": "test", "null_threshold": value}, ANSWERS),
        refused=None if value is None else True,
    )
    for what, value in (WRONG | {"NaN": float("nan")}).items()
    if value != -1
]


# ---- journals of scores ------------------------------------------------------------------------

GOOD = {
    "indices": torch.arange(2),
    "counts": torch.tensor([2, 2]),
    "logprobs": torch.zeros(4),
    "greedy": torch.zeros(4, dtype=torch.bool),
}


def _journal(
    change: dict[str, torch.Tensor | None] | bytes,
    metadata: dict[str, str],
    sandbox: Sandbox,
    bases: Bases,
) -> Words:
    from safetensors.torch import save_file

    folder = sandbox.output / "scores.jsonl.partial"
    folder.mkdir(parents=True)
    path = folder / "00000000-0.safetensors"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        found = {k: v for k, v in (GOOD | change).items() if v is not None}
        save_file(found, path, metadata=metadata)
    return _scoring(sandbox, bases)


def _scoring(sandbox: Sandbox, bases: Bases) -> Words:
    lines = sandbox.input / "lines.jsonl"
    lines.write_text('{"tokens": [1, 2, 3]}\n{"text": "abc"}\n')
    output = sandbox.output / "scores.jsonl"
    words = ["--ckpt", bases.gpt, "--input", lines, "--output", output, "--device", "cpu"]
    return ["score", *words]


JOURNALS: dict[str, dict[str, torch.Tensor | None] | bytes] = {
    "counts of -1": {"counts": torch.tensor([-1, 5])},
    "counts that do not add up": {"counts": torch.tensor([2, 3])},
    "counts of 2**62": {"counts": torch.tensor([2**62, 2**62])},
    "counts of floats": {"counts": torch.tensor([2.0, 2.0])},
    "counts of two dims": {"counts": torch.tensor([[2, 2]])},
    "indices of -1": {"indices": torch.tensor([-1, 0])},
    "indices of 2**62": {"indices": torch.tensor([2**62, 0])},
    "indices twice": {"indices": torch.tensor([0, 0])},
    "one index": {"indices": torch.tensor([0])},
    "greedy numbers": {"greedy": torch.zeros(4)},
    "scores of NaN": {"logprobs": torch.full((4,), float("nan"))},
    "whole scores": {"logprobs": torch.zeros(4, dtype=torch.int64)},
    "no scores": {"logprobs": None},
    "a tensor more": {"x\x1b[2J": torch.zeros(1)},
    "heads of other rows": {"head.pooler": torch.zeros(7, 2)},
    "an empty file": b"",
    "a pickle": b"\x80\x02cos\nsystem\n.",
    "a header of 2**63": b"\xff" * 7 + b"\x7f{}",
}
ATTACKS += [
    Attack(f"journal: {what}", partial(_journal, change, {"key": "x", "parts": "{}"}))
    for what, change in JOURNALS.items()
]
ATTACKS += [
    Attack(f"journal: metadata of {what}", partial(_journal, {}, {"key": "x", "parts": text}))
    for what, text in {
        "deep lists": DEEP,
        "a list": "[]",
        "escapes": json.dumps({"digest": "\x1b[2J", "stride\x1b[2J": "\u202e"}),
        "a megabyte": json.dumps({"stride": "x" * 1_000_000}),
        "5,000 digits": '{"stride": ' + "9" * 5000 + "}",
        "deep objects": '{"a":' * 400 + "1" + "}" * 400,
        "no JSON": "{",
        "a surrogate": '{"a": "\\ud800"}',
    }.items()
]


def _place(
    make: Callable[[Path, Sandbox], None], name: str, sandbox: Sandbox, bases: Bases
) -> Words:
    sandbox.output.mkdir()
    make(sandbox.output / name, sandbox)
    return _scoring(sandbox, bases)


def _link_to_home(path: Path, sandbox: Sandbox) -> None:
    path.symlink_to(sandbox.root / "home")


ATTACKS += [
    Attack(
        "journal: a link to another folder",
        partial(_place, _link_to_home, "scores.jsonl.partial"),
        refused=None,
    ),
    Attack(
        "journal: a file",
        partial(_place, lambda p, s: p.write_text("x"), "scores.jsonl.partial"),
        refused=None,
    ),
    Attack(
        "journal: a link to a device",
        partial(_place, lambda p, s: p.symlink_to("/dev/zero"), "scores.jsonl.partial"),
        refused=None,
    ),
]


# ---- states of training ------------------------------------------------------------------------

PROGRESS: dict[str, Any] = {
    "counters": {"step": 3, "updates": 3, "samples": 0, "tokens": 0},
    "identity": {"settings": {}, "model": {}},
}


def _training(sandbox: Sandbox, bases: Bases) -> Words:
    text = sandbox.input / "text.txt"
    text.write_text("\n".join(f"the cat sat on the mat number {n}" for n in range(200)))
    return [
        *("lm", "--ckpt", bases.gpt, "--data", text, "--output-dir", sandbox.output),
        *("--device", "cpu", "--max-steps", 1, "--seq-length", 16, "--global-batch", 2),
    ]


def _state(files: dict[str, Any], sandbox: Sandbox, bases: Bases) -> Words:
    for name, content in files.items():
        path = sandbox.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, errors="surrogatepass")
        else:
            path.write_text(json.dumps(content))
    return _training(sandbox, bases)


STEP = "state/step-00000003/progress.json"
STATES: dict[str, dict[str, Any]] = {
    "progress is a list": {STEP: []},
    "progress is empty": {STEP: ""},
    "progress is deep": {STEP: DEEP},
    "progress is a text": {STEP: "abc"},
    "progress is no text": {STEP: "\udcff"},
    "progress without counters": {STEP: {"identity": PROGRESS["identity"]}},
    "progress without an identity": {STEP: {"counters": PROGRESS["counters"]}},
    "progress with a foreign counter": {STEP: _at(PROGRESS, "counters.evil", 1)},
    "progress with 5,000 digits": {STEP: '{"counters": {"step": ' + "9" * 5000 + "}}"},
    "an identity of escapes": {STEP: _at(PROGRESS, "identity.settings", {"lr": "\x1b[2J"})},
    "an identity of deep objects": {
        STEP: json.dumps(PROGRESS).replace(
            '"model": {}', '"model": ' + '{"a":' * 300 + "1" + "}" * 300
        )
    },
    "finished is empty": {"state/finished.json": ""},
    "finished is a list": {"state/finished.json": []},
    "finished lacks all": {"state/finished.json": {}},
    "started is rubbish": {"state/started.json": "\x00\x01"},
    "started is deep": {"state/started.json": DEEP},
    "a state without its tensors": {STEP: PROGRESS},
    "something else": {"state/thesis.txt": "a person's own"},
}
STATES |= {
    f"{name} is {what}": {STEP: _at(PROGRESS, name, value)}
    for name in ("counters", "counters.step", "counters.updates", "identity", "identity.model")
    for what, value in WRONG.items()
}
ATTACKS += [Attack(f"state: {what}", partial(_state, files)) for what, files in STATES.items()]


def _linked(name: str, target: str, sandbox: Sandbox, bases: Bases) -> Words:
    path = sandbox.output / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(sandbox.root / target if target == "home" else target)
    return _training(sandbox, bases)


ATTACKS += [
    Attack(f"state: {name} is a link to {target}", partial(_linked, name, target))
    for name in ("state", "state/unfinished", "state/step-00000003", "state/finished.json")
    for target in ("home", "/dev/zero", "nowhere")
]


def _choosing(sandbox: Sandbox, bases: Bases) -> Words:
    passage = {
        "article": "the cat sat on the mat",
        "questions": ["who sat?"],
        "options": [["a", "b", "c", "d"]],
        "answers": ["A"],
    }
    for split in ("train", "dev"):
        (sandbox.input / split / "high").mkdir(parents=True)
        (sandbox.input / split / "high" / "1.txt").write_text(json.dumps(passage))
    return [
        *("race", "--ckpt", bases.bert, "--data", sandbox.input, "--output-dir", sandbox.output),
        *("--device", "cpu", "--max-steps", 1, "--seq-length", 32, "--max-qa-length", 16),
        *("--global-batch", 1),
    ]


def _cached(content: bytes | str, sandbox: Sandbox, bases: Bases) -> Words:
    """Fill the cache of tokens with rubbish under every name that a first run uses."""
    first = bases.warm.run(copy := bases.warm.sandbox(), _choosing(copy, bases))
    assert first.code == 0, first.err
    kept = list((copy.root / "cache/mlm-eval/tokens").glob("*"))
    assert kept
    for path in kept:
        target = sandbox.root / "cache/mlm-eval/tokens" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            target.symlink_to(content)
        elif content == b"other types":
            from safetensors.torch import load_file, save_file

            save_file({k: v.double() for k, v in load_file(path).items()}, target)
        else:
            target.write_bytes(content)
    return _choosing(sandbox, bases)


ATTACKS += [
    Attack("token cache: rubbish", partial(_cached, b"rubbish"), refused=None),
    Attack("token cache: other types", partial(_cached, b"other types"), refused=None),
    Attack("token cache: empty", partial(_cached, b""), refused=None),
    Attack("token cache: a header of 2**60", partial(_cached, b"\0" * 7 + b"\x10{}"), refused=None),
    Attack("token cache: a link to a device", partial(_cached, "/dev/zero"), refused=None),
]


@attacks(ATTACKS, every=40)
def test_what_is_read_back_is_not_trusted(attack: Attack, warm: WarmCommands, bases: Bases):
    check(attack, warm, bases)


def test_right_ones_are_read(warm: WarmCommands, bases: Bases):
    """What the attacks change is right before they do."""
    for prepare in (
        partial(_report, RECORD),
        partial(_report, TUNED),
        partial(_ensemble, HEADER, ROWS),
        partial(_ensemble, SQUAD, ANSWERS),
        _scoring,
        _training,
        _choosing,
    ):
        done = Attack("right", prepare, refused=False).run(warm, bases)
        assert done.faults(refused=False) == [], done.err
    assert isinstance(copied, Callable)
