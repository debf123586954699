"""Every task from its real files to an evaluation: the BERT sample trains a few steps on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.folders.real_race import first_passages
from support.paths import PROJECT
from test_glue import MNLI_DEV, MNLI_TRAIN, QQP_DEV, mnli_of_textfooler, mnli_row, write

from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import find_tokenizer
from mlm_eval.engine.engine import Engine
from mlm_eval.reporting.results import Result
from mlm_eval.tasks.finetune.run import finetune
from mlm_eval.tasks.finetune.settings import FinetuneOptions

pytestmark = pytest.mark.realdata

BERT = PROJECT / "checkpoints" / "samples" / "bert"
TRAINED, EVALUATED = 24, 40
"""Examples."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


SHORT = {"seq_length": 128}


def run(task: str, output: Path, **given: Any) -> Result:
    """Train a few steps, evaluate."""
    words = find_tokenizer(BERT)
    assert words is not None
    given = {"train_limit": TRAINED, "dev_limit": EVALUATED, **given}
    options = FinetuneOptions(
        output_dir=output,
        overrides={**SHORT, "epochs": 1, "global_batch": 8, "lr": 1e-3, "attention_dropout": 0.0},
        **given,
    )
    return finetune(
        task,
        open_checkpoint(BERT),
        options,
        tokenizer=words,
        load=lambda checkpoint, dtype: Engine.load(checkpoint, dtype=dtype),
    )


def check(task: str, output: Path, result: Result) -> None:
    """The run did what was asked, and an evaluation of what it wrote gives the same figures."""
    record = json.loads((output / "run.json").read_text())
    assert record["steps"] >= TRAINED // 8  # a question of SQuAD makes several samples
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == record["steps"] and all(0.0 < loss < 20.0 for loss in losses)
    again = finetune(
        task,
        open_checkpoint(output / "checkpoint"),
        FinetuneOptions(
            output_dir=output.with_name("again"),
            dev=[
                entry["path"]
                for entry in result.settings["data"]["sets"].values()
                if entry["role"] == "dev"
            ],
            eval_only=True,
            dev_limit=EVALUATED,
            overrides=SHORT,
        ),
        tokenizer=find_tokenizer(output / "checkpoint"),  # type: ignore[arg-type]
        load=lambda checkpoint, dtype: Engine.load(checkpoint, dtype=dtype),
    )
    assert again.metrics["dev"] == result.metrics["dev"]


def test_race(shared_data, tmp_path):
    folders = {
        split: (str(first_passages(shared_data, split, tmp_path / split / "middle", count=20)),)
        for split in ("train", "dev")
    }
    result = run("race", tmp_path / "out", **folders)
    assert result.metrics["dev-middle"]["total"] == EVALUATED
    check("race", tmp_path / "out", result)


def test_mnli(shared_data, tmp_path):
    data = tmp_path / "MNLI"
    for name in ("matched", "mismatched"):
        source = shared_data / "glue" / f"textfooler_mnli_{name}.tsv"
        mnli_of_textfooler(source, data / f"dev_{name}.tsv")
    lines = source.read_text(encoding="utf-8").splitlines()
    rows = [
        mnli_row(number, first, second, label)
        for number, (label, first, second) in enumerate(line.split("\t") for line in lines)
    ]
    write(data / "train.tsv", [MNLI_TRAIN, *rows])
    assert len(MNLI_DEV) == 16
    result = run("mnli", tmp_path / "out", data=str(data))
    assert [result.metrics[f"dev-{name}"]["total"] for name in ("matched", "mismatched")] == [
        EVALUATED,
        EVALUATED,
    ]
    check("mnli", tmp_path / "out", result)


def test_qqp(shared_data, tmp_path):
    entries = json.loads((shared_data / "glue" / "advglue_dev.json").read_text())["qqp"]
    rows = [
        [str(e["idx"]), "0", "0", e["question1"], e["question2"], str(e["label"])] for e in entries
    ]
    for name in ("train", "dev"):
        write(tmp_path / "QQP" / f"{name}.tsv", [QQP_DEV, *rows])
    result = run("qqp", tmp_path / "out", data=str(tmp_path / "QQP"))
    assert {"accuracy", "f1"} <= set(result.metrics["dev"])
    check("qqp", tmp_path / "out", result)


@pytest.mark.parametrize("file", ["xquad.en.json", "squad2.0_cs224n_dev-v2.0.json"])
def test_squad(shared_data, tmp_path, file):
    source = str(shared_data / "squad" / file)
    result = run("squad", tmp_path / "out", train=(source,), dev=(source,))
    assert result.metrics["dev"]["total"] == EVALUATED
    assert 0.0 <= result.metrics["exact"] <= result.metrics["f1"] <= 100.0
    check("squad", tmp_path / "out", result)
