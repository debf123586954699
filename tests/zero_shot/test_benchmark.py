"""A new benchmark is one file and one entry of a list: command, record, report and plan follow."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from support.command_line import Run, assert_one_sentence, read
from support.house import toy_benchmark
from support.house.toy_benchmark import LAST_BYTES

import mlm_eval
from mlm_eval.checkpoints.tokenizer import load_tokenizer
from mlm_eval.cli.app import MAKERS
from mlm_eval.cli.zero_shot import register
from mlm_eval.tasks import zero_shot

pytest_plugins = ["support.command_line_fixtures"]


@pytest.fixture
def toy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The toy benchmark in the list, and a command line that runs it."""
    monkeypatch.setitem(zero_shot.BENCHMARKS, "last-bytes", "Share of the lines that are greedy.")
    monkeypatch.setitem(sys.modules, f"{zero_shot.__name__}.last_bytes", toy_benchmark)
    monkeypatch.setitem(MAKERS, "last-bytes", None)  # and no longer after the test
    register(LAST_BYTES)
    (tmp_path / "lines.txt").write_text("the cat\nsaw a\ndog\n")
    return ["last-bytes", "--ckpt", folder / "gpt", "--data", tmp_path / "lines.txt"]


def test_its_command(run: Run, toy: list[object]) -> None:
    help = re.sub(r"[\s│]+", " ", run("last-bytes", "--help").out)
    assert "Share of the lines that are greedy." in help and "A line counts" in help
    assert "Example: mlm-eval last-bytes" in help
    assert "How many tokens of each line" in help and "--batch-tokens" in help
    assert "last-bytes" in run("--help").out
    ended = run(*toy)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("Last bytes\n  hits ") and "validation results" not in ended.out
    assert "work ahead: 3 lines, " in ended.err
    assert_one_sentence(run("last-bytes", "--ckpt", "gpt"), "--data")
    assert_one_sentence(run(*toy, "--scored", 0), "--scored")
    assert_one_sentence(run(*toy, "--limit", 0), "--limit")


def test_its_record_is_resumed_and_reported(run: Run, toy: list[object], tmp_path: Path) -> None:
    output = tmp_path / "toy.json"
    ended = run(*toy, "--output", output, "--limit", 2, "--seed", 7, "--resume")
    assert ended.code == 0 and "resumes" not in ended.err
    assert "LIMITED RUN" in ended.out and "only the first 2 of 3 lines" in ended.err
    assert run(*toy, "--output", output, "--scored", 2, "--overwrite").code == 0
    record = read(output)
    assert (record["task"], record["protocol"]) == ("last-bytes", "megatron-paper")
    assert record["counts"] == {"lines": 3} and set(record["metrics"]) == {"hits", "nll_sum"}
    assert record["settings"]["scored"] == 2 and record["settings"]["dtype"] == "float32"

    shown = run("report", output, "--format", "csv")
    assert shown.code == 0, shown.err
    assert f"{100 * record['metrics']['hits']:.1f}" in shown.out
    assert "scored 2, in the paper 1" in shown.out and "in the paper the one true file" in shown.out
    assert "Hits" in run("report", output).out


def test_it_is_planned_and_evaluated_from_python(run: Run, toy: list[object], folder: Path) -> None:
    plan = json.loads(run("plan", "--ckpt", folder / "gpt", "--json").out)
    assert "last-bytes" in json.dumps(plan)
    engine = mlm_eval.Engine.load(mlm_eval.open_checkpoint(folder / "gpt"))
    words = load_tokenizer(directory=folder / "gpt" / "tokenizer")
    data = Path(str(toy[-1]))
    result = mlm_eval.evaluate("last-bytes", engine, data=data, tokenizer=words, scored=2)
    assert result.settings["scored"] == 2 and result.counts == {"lines": 3}
