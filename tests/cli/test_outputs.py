"""What commands write: never over an input, nor over a result unless that is said."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Run, as_user, assert_one_sentence, read
from support.paths import GOLDEN

from mlm_eval.cli import command
from mlm_eval.cli.app import commands, full_command
from mlm_eval.options import FILE, FOLDER, PAGE, Option

pytest_plugins = ["support.command_line_fixtures"]

RECORDS = GOLDEN / "records"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def quick(folder: Path, tmp_path: Path) -> dict[str, list[object]]:
    """A quick command of each kind that writes a file, without its --output."""
    (tmp_path / "lines.jsonl").write_bytes((folder / "lines.jsonl").read_bytes())
    (tmp_path / "wiki.tokens").write_bytes((folder / "wiki.tokens").read_bytes())
    (tmp_path / "record.json").write_bytes((RECORDS / "sample-wikitext103.json").read_bytes())
    gpt, place = folder / "gpt", tmp_path
    return {
        "score": ["score", "--ckpt", gpt, "--input", place / "lines.jsonl"],
        "report": ["report", place / "record.json"],
        "wikitext103": ["wikitext103", "--ckpt", gpt, "--data", place / "wiki.tokens"],
    }


INPUTS = {"score": "lines.jsonl", "report": "record.json", "wikitext103": "wiki.tokens"}


def declarations(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Option]]:
    """Return the options that each command declares."""
    found: dict[str, dict[str, Option]] = {}
    original = command.option_parameters

    def noting(kind: type[Any], name: str, **more: Any) -> Any:
        found.setdefault(name, dict(command.declared(kind, name)))  # the first is the whole
        return original(kind, name, **more)

    monkeypatch.setattr(command, "option_parameters", noting)
    for name in commands():
        full_command(name)
    return found


def test_every_output_is_declared(monkeypatch):
    """An option that is new says what it writes, or is checked by nobody."""
    found = {
        (name, field): option.writes
        for name, options in declarations(monkeypatch).items()
        for field, option in options.items()
        if field in ("output", "output_dir", "plot") or option.writes
    }
    assert found.pop(("report", "output")) == PAGE and found.pop(("convert", "output")) == FOLDER
    assert found and all(
        writes == (FOLDER if field == "output_dir" else FILE)
        for (_, field), writes in found.items()
    )
    declared = declarations(monkeypatch).items()
    with_overwrite = {name for name, options in declared if "overwrite" in options}
    assert with_overwrite == {name for name, _ in found} | {"report", "convert"}


# --- An output that is an input -----------------------------------------------------------------


def spellings(path: Path) -> dict[str, Path]:
    """Return other names of a file."""
    link, hard = path.with_name("link"), path.with_name("hard")
    link.symlink_to(path)
    hard.hardlink_to(path)
    (path.parent / "below").mkdir()
    return {
        "itself": path,
        "relative": Path(os.path.relpath(path)),
        "link": link,
        "hard link": hard,
        "dots": path.parent / "below" / ".." / path.name,
    }


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_is_never_replaced(run: Run, quick, tmp_path, name):
    path = tmp_path / INPUTS[name]
    before = path.read_bytes()
    for spelled in spellings(path).values():
        for more in ([], ["--overwrite"]):
            ended = run(*quick[name], "--output", spelled, *more)
            assert_one_sentence(ended, "--output", "name another place")
            assert path.read_bytes() == before


def test_files_of_the_checkpoint_and_the_config_are_inputs(run: Run, quick, folder, tmp_path):
    (tmp_path / "options.toml").write_text("limit = 1\n")
    words = folder / "gpt" / "tokenizer"
    before = contents(folder)
    for more in (
        ["--config", tmp_path / "options.toml", "--output", tmp_path / "options.toml"],
        ["--tokenizer", words, "--output", words / "vocab.json"],
        ["--output", folder / "gpt" / "latest_checkpointed_iteration.txt"],
    ):
        assert_one_sentence(run(*quick["wikitext103"], *more, "--overwrite"), "name another place")
    assert contents(folder) == before


def test_two_outputs_are_two_places(run: Run, tmp_path):
    bench = ["bench", "--model", "gpt2-355m", "--tp", 1]
    ended = run(*bench, "--output", tmp_path / "a", "--plot", tmp_path / "b" / ".." / "a")
    assert_one_sentence(ended, "--plot and --output both name")


def test_a_training_folder_is_not_its_own_input(run: Run, bert, tmp_path):
    (tmp_path / "text").write_text("a b\n")
    mlm = ["mlm", "--data", tmp_path / "text", "--ckpt"]
    assert_one_sentence(run(*mlm, bert, "--output-dir", bert), "is what --ckpt names")
    place = tmp_path / "out"
    (place / "checkpoint").mkdir(parents=True)
    for more in ("--overwrite", "--restart"):
        ended = run(*mlm, place / "checkpoint", "--output-dir", place, more)
        assert_one_sentence(ended, "which is to be replaced, holds what --ckpt names")
    ended = run(*mlm, bert, "--output-dir", tmp_path / "text")
    assert_one_sentence(ended, "is what --data names")


# --- A result that is there already -------------------------------------------------------------


@pytest.mark.parametrize("name", ["score", "wikitext103"])
def test_a_result_is_replaced_only_when_that_is_said(run: Run, quick, tmp_path, name):
    output = tmp_path / "out"
    assert run(*quick[name], "--output", output).code == 0
    before = output.read_bytes()
    ended = run(*quick[name], "--output", output)
    assert_one_sentence(ended, "out exists already; replace it with --overwrite")
    # The whole result never gives way to a limited one.
    for more in ([], ["--overwrite"]):
        ended = run(*quick[name], "--output", output, "--limit", 1, *more)
        assert_one_sentence(ended, "which a limited run never replaces")
    assert output.read_bytes() == before
    assert run(*quick[name], "--output", output, "--overwrite").code == 0

    limited = tmp_path / "limited"
    assert run(*quick[name], "--output", limited, "--limit", 1).code == 0
    assert run(*quick[name], "--output", limited, "--limit", 1, "--overwrite").code == 0
    assert run(*quick[name], "--output", limited, "--overwrite").code == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_link_to_a_result_is_one(run: Run, quick, tmp_path):
    output, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(output)
    assert run(*quick["wikitext103"], "--output", link).code == 0
    assert_one_sentence(run(*quick["wikitext103"], "--output", link), "exists already")
    assert link.is_symlink() and output.is_file()


@pytest.mark.parametrize(
    "content", ["years of work", '{"a": 1}', '{"tokens": [1, 2]}\n', "[" * 9999]
)
@pytest.mark.parametrize("name", INPUTS)
def test_what_is_no_result_is_never_replaced(run: Run, quick, tmp_path, name, content):
    output = tmp_path / "thesis.txt"
    output.write_text(content)
    assert_one_sentence(run(*quick[name], "--output", output), "thesis.txt exists already; name")
    ended = run(*quick[name], "--output", output, "--overwrite")
    assert_one_sentence(ended, "thesis.txt is not a result of mlm-eval")
    assert output.read_text() == content
    output.write_text("")  # as mktemp leaves it
    assert run(*quick[name], "--output", output).code == 0


@pytest.mark.parametrize("form", ["md", "latex", "csv", "html"])
def test_a_page_replaces_the_page_before_it(run: Run, quick, tmp_path, form):
    page = tmp_path / "page"
    for _ in range(2):
        assert run(*quick["report"], "--format", form, "--output", page).code == 0
    other = tmp_path / "other.json"
    other.write_bytes((RECORDS / "sample-lambada.json").read_bytes())
    ended = run(*quick["report"], "--format", form, "--output", other)
    assert_one_sentence(ended, "other.json exists already")


def test_a_record_of_verify_is_a_result(run: Run, folder, tmp_path):
    verify = ["verify", "--ckpt", folder / "gpt", "--against", folder / "gpt"]
    output = tmp_path / "same.json"
    assert run(*verify, "--output", output).code == 0
    assert_one_sentence(run(*verify, "--output", output), "exists already")
    assert run(*verify, "--output", output, "--overwrite").code == 0
    assert read(output)["same"] is True


# --- Stdout -------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("name", INPUTS)
def test_a_dash_is_stdout(quick, tmp_path, name):
    """The record alone is there, and what is for people is on stderr."""
    expected = tmp_path / "expected"
    assert as_user(*quick[name], "--output", expected).code == 0
    ended = as_user(*quick[name], "--output", "-", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert not (tmp_path / "-").exists() and not list(tmp_path.glob("-*"))
    said = {"score": "2 line(s) scored", "report": "with 1 record(s)", "wikitext103": "perplexity"}
    assert said[name] in ended.err
    if name != "wikitext103":
        assert ended.out == expected.read_text()
        return
    found, record = json.loads(ended.out), read(expected)
    assert found["metrics"] == record["metrics"]
    assert re.search(r"adjusted", ended.out)


# --- Ensembles ----------------------------------------------------------------------------------


def test_predictions_are_replaced_only_when_that_is_said(run: Run, tmp_path):
    header = {"predictions_of": "race", "set": "dev-middle", "role": "dev", "labelled": True}
    header |= {"version": "", "examples": 1, "seed": 1, "recipe": "r"}
    header |= {"checkpoint": {"path": "b", "digest": "d", "config": {}, "num_parameters": 1}}
    row = {"id": "a", "label": 0, "probabilities": [0.5, 0.5]}
    members: list[object] = []
    for number in range(2):
        path = tmp_path / f"{number}" / "dev-middle.jsonl"
        path.parent.mkdir()
        path.write_text(f"{json.dumps(header)}\n{json.dumps(row)}\n")
        members += ["--predictions", path.parent]
    output = tmp_path / "both"
    line = ["ensemble", *members, "--output-dir", output]
    assert run(*line).code == 0
    assert_one_sentence(
        run(*line), "dev-middle.jsonl exists already; replace predictions with --ov"
    )
    assert run(*line, "--overwrite").code == 0
    (output / "dev-middle.jsonl").write_text("years of work")
    assert_one_sentence(run(*line, "--overwrite"), "dev-middle.jsonl exists already")
    before = contents(tmp_path)
    for folder in ("0", "1"):
        ended = run("ensemble", *members, "--output-dir", tmp_path / folder, "--overwrite")
        assert_one_sentence(ended, "--predictions")
    assert contents(tmp_path) == before
