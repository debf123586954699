"""What scripts rely on: every option of every command, and the keys of every record.

`tests/golden/commands.json` holds them; options and keys may be added to it, none may go or change.
After an addition write it anew: PYTHONPATH=tests python tests/cli/test_contract.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.command_line import Ended, Run, read
from support.paths import GOLDEN, PROJECT, SAMPLES

from mlm_eval.cli.app import commands, full_command

pytest_plugins = ["support.command_line_fixtures"]

CONTRACT = GOLDEN / "commands.json"
EXPECTED = json.loads(CONTRACT.read_text())


# --- Options ------------------------------------------------------------------------------------


CLICK = {"text": "str", "integer": "int", "float": "float", "boolean": "bool", "path": "Path"}
"""Names of its types."""


def described(parameter: Any) -> dict[str, Any]:
    """Return what a command line can tell of one option."""
    default = parameter.default
    if hasattr(parameter, "type_descriptor"):
        kind = getattr(parameter.type_descriptor.annotation, "__args__", None) or [
            parameter.type_descriptor.annotation
        ]
        name, least = kind[0].__name__, parameter.min
    else:  # typer before 0.27 takes its types from click
        name, least = CLICK[parameter.type.name.split()[0]], getattr(parameter.type, "min", None)
    shown = getattr(parameter, "show_default", None)
    entry = {
        "flags": [*parameter.opts, *parameter.secondary_opts],
        "type": name,
        "least": least,
        "default": default if isinstance(default, bool | int | float | None) else str(default),
        "shown": shown if isinstance(shown, str) else None,
        "required": parameter.required,
        "repeatable": parameter.multiple or parameter.nargs == -1,
        "switch": getattr(parameter, "is_flag", False),
        "group": getattr(parameter, "rich_help_panel", None),
        "hidden": getattr(parameter, "hidden", False),
    }
    return {key: value for key, value in entry.items() if value is not None and value is not False}


def options() -> dict[str, Any]:
    """Return the options of each command, in the order of its help."""
    return {
        name: {"group": listed.panel}
        | {"options": {p.opts[0]: described(p) for p in full_command(name).params}}
        for name, listed in commands().items()
    }


def shown_order(listed: dict[str, Any]) -> list[tuple[str | None, list[str]]]:
    """Return the groups of a help, and the options of each, in their order."""
    groups: dict[str | None, list[str]] = {}
    for name, entry in listed.items():
        groups.setdefault(entry.get("group"), []).append(name)
    return list(groups.items())


@pytest.mark.parametrize("command", EXPECTED["options"])
def test_every_option_is_as_it_was(command):
    known, found = EXPECTED["options"][command], options()[command]
    assert found["group"] == known["group"]
    kept = {name: entry for name, entry in found["options"].items() if name in known["options"]}
    assert kept == known["options"]
    assert shown_order(kept) == shown_order(known["options"])


def test_commands_come_in_the_same_order():
    known = list(EXPECTED["options"])
    assert [name for name in options() if name in known] == known


# --- Records ------------------------------------------------------------------------------------


def keys(value: Any, place: str = "") -> set[str]:
    """Return the paths of all keys of a JSON value; a list is one key, a file's path is none."""
    if isinstance(value, dict):
        return {f"{place}{name}" for name in value if "/" not in name}.union(
            *(keys(entry, f"{place}{name}.") for name, entry in value.items())
        )
    if isinstance(value, list):
        return set().union(*(keys(entry, f"{place}[].") for entry in value))
    return set()


def of_lines(path: Path) -> set[str]:
    """Return the key paths of a file of JSON lines."""
    return set().union(*(keys(json.loads(line)) for line in path.read_text().splitlines()))


def zero_shot(run: Run, folder: Path) -> dict[str, set[str]]:
    """Return the keys of what the commands that train nothing write."""
    text, gpt, bert = SAMPLES / "text", SAMPLES / "gpt", SAMPLES / "bert"
    found: dict[str, set[str]] = {}
    for name, *more in (
        ("wikitext103", "--data", text / "wiki.sample.tokens", "--full-digest"),
        ("lambada", "--data", text / "lambada.sample.jsonl"),
    ):
        output = folder / f"{name}.json"
        assert run(name, "--ckpt", gpt, *more, "--limit", 1, "--output", output).code == 0
        found[name] = keys(read(output))
    (folder / "in.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    for model in (gpt, bert):
        output = folder / f"{model.name}.jsonl"
        files = ["--input", folder / "in.jsonl", "--output", output]
        assert run("score", "--ckpt", model, *files).code == 0
        found[f"score {model.name}"] = of_lines(output)
    output = folder / "generate.jsonl"
    short = ["--prompt", "A", "--max-new-tokens", 2, "--output", output]
    assert run("generate", "--ckpt", gpt, *short).code == 0
    found["generate"] = of_lines(output)
    output = folder / "verify.json"
    assert run("verify", "--ckpt", gpt, "--against", gpt, "--output", output).code == 0
    found["verify"] = keys(read(output))
    output = folder / "bench.json"
    small = ["--ckpt", gpt, "--tp", 1, "--batch", 1, "--steps", 1, "--warmup-steps", 1]
    ended = run("bench", *small, "--seq-length", 8, "--device", "cpu", "--output", output)
    assert ended.code == 0
    found["bench"] = keys(read(output))
    for name, *arguments in (
        ("inspect", "--ckpt", gpt),
        ("plan", "--model", "gpt2-355m", "--device-memory", "80GB", "--throughput", "1TFLOPS"),
        ("catalog",),
    ):
        ended = run(name, *arguments, "--json")
        assert ended.code == 0
        found[name] = keys(json.loads(ended.out))
    return found


def training(run: Run, folder: Path) -> dict[str, set[str]]:
    """Return the keys of what the commands that train write."""
    text, found = SAMPLES / "text" / "wiki.sample.tokens", {}
    few = ["--train-limit", 8, "--dev-limit", 4, "--test-limit", 4, "--seeds", "1,2"]
    for name, model, data, *more in (
        ("race", "bert", SAMPLES / "race", *few),
        ("mlm", "bert", text),
        ("lm", "gpt", text),
    ):
        output = folder / name
        short = ["--max-steps", 2, "--seq-length", 32, "--global-batch", 2, "--output-dir", output]
        ended = run(name, "--ckpt", SAMPLES / model, "--data", data, *short, *more)
        assert ended.code == 0, ended.err
        for path in sorted(output.rglob("*.json*")):
            inside = path.relative_to(output)
            if {"state", "tokenizer", "seed-2"}.isdisjoint(inside.parts):
                lines = path.suffix == ".jsonl"
                found[f"{name} {inside}"] = of_lines(path) if lines else keys(read(path))
        reported = run("report", "--include-limited", output / "result.json")
        assert reported.code == 0, reported.err
    output = folder / "ensemble.json"
    predictions = sorted((folder / "race").rglob("predictions"))
    given = [part for path in predictions for part in ("--predictions", path)]
    assert len(predictions) > 1 and run("ensemble", *given, "--output", output).code == 0
    found["ensemble"] = keys(read(output))
    return found


@pytest.mark.long
@pytest.mark.parametrize("kind", [zero_shot, training])
def test_no_key_of_a_record_is_missing(run: Run, tmp_path: Path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = kind(run, tmp_path)
    for path in tmp_path.rglob("*.json"):
        record = read(path)
        if isinstance(record, dict) and ("task" in record or "same" in record):
            assert faults(record) == [], path
    known = EXPECTED["keys"][kind.__name__]
    assert {name: sorted(set(entry) - found.get(name, set())) for name, entry in known.items()} == {
        name: [] for name in known
    }


SCHEMA = jsonschema.Draft202012Validator(
    json.loads((PROJECT / "mlm_eval" / "reporting" / "record.schema.json").read_text())
)


def faults(record: Any) -> list[str]:
    """Return where a record is not as the published schema says."""
    found = SCHEMA.iter_errors(record)
    return [error.message for each in found for error in [*(each.context or []), each]]


def test_the_schema_is_one_and_refuses_what_is_no_record():
    """Each of the made-up records is as it says; without any of the fields it is not."""
    SCHEMA.check_schema(SCHEMA.schema)
    records = [json.loads(path.read_text()) for path in (GOLDEN / "records").glob("*.json")]
    run = {"date": "", "host": "", "devices": [], "command": [], "seconds": 1, "commit": None}
    assert records
    for record in records:
        whole = {"run": run, **record}
        assert faults(whole) == []
        for name in whole:
            assert faults({k: v for k, v in whole.items() if k != name}) != [], name
        for name in ("adjusted_ppl", "accuracy"):
            if name in record["metrics"]:
                spoiled = {**whole, "metrics": {**record["metrics"], name: [1]}}
                assert faults(spoiled) != [], name


def write(run: Run, folder: Path) -> None:
    """Write `tests/golden/commands.json` anew."""
    records = {
        kind.__name__: {name: sorted(entry) for name, entry in kind(run, folder).items()}
        for kind in (zero_shot, training)
    }
    text = json.dumps({"options": options(), "keys": records}, indent=1)
    # One line for each command, one for each record.
    text = re.sub(r"\n {4,}", " ", text).replace("\n   }", " }")
    CONTRACT.write_text(re.sub(r"\n {3}(?=[\]\"])", " ", text) + "\n")


if __name__ == "__main__":
    import tempfile

    from support.command_line import as_user

    def run_command(*arguments: object) -> Ended:
        """Run a command line as a user does."""
        return as_user(*arguments)

    with tempfile.TemporaryDirectory() as place:
        write(run_command, Path(place))
