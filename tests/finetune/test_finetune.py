"""Fine-tuning from data to record: recipes, options, runs of every task, seeds, resuming."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support import random_models, tiny_bert
from support.paths import PROJECT
from support.ranks import run_ranks

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from mlm_eval.checkpoints.tokenizers.copying import copy_tokenizer
from mlm_eval.engine.engine import Engine
from mlm_eval.reporting.results import Result
from mlm_eval.reporting.text import sets_to_show
from mlm_eval.tasks.finetune import figures as run_figures
from mlm_eval.tasks.finetune.data import read_sets
from mlm_eval.tasks.finetune.predictions import ensemble_result, read_predictions
from mlm_eval.tasks.finetune.run import finetune
from mlm_eval.tasks.finetune.settings import FIELDS, FinetuneOptions, load_recipe, recipe_names
from mlm_eval.tasks.finetune.task import make_task
from mlm_eval.tasks.paper import load_paper
from mlm_eval.training.settings import Listener, TrainingProgress

SAMPLES = PROJECT / "checkpoints" / "samples" / "race"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    return tiny_bert.tokenizer(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Checkpoint:
    """A random BERT in Megatron's format, tensor-parallel 2."""
    return tiny_bert.checkpoint(tmp_path_factory.mktemp("bert") / "bert", tp=2)


Rows = list[tuple[str, int, int]]


def options(output: Path, **given: Any) -> FinetuneOptions:
    """Return options for a run of a few steps on the samples."""
    small = {"data": str(SAMPLES), "epochs": 1, "global_batch": 8, "lr": 1e-3, "train_limit": 24}
    return of_command(output, **{**small, **given})


def of_command(output: Path, **given: Any) -> FinetuneOptions:
    """Return the options of a command: what a recipe has among them replaces the recipe's."""
    overrides = {name: given.pop(name) for name in FIELDS if name in given}
    return FinetuneOptions(output_dir=output, overrides=overrides, **given)


def changed(given: FinetuneOptions, **overrides: Any) -> FinetuneOptions:
    """Return the options with other fields of the recipe."""
    return dataclasses.replace(given, overrides={**given.overrides, **overrides})


class Heard(Listener):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []
        self.rows: Rows = []

    def log(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, *warnings: str) -> None:
        self.lines += [f"warning: {text}" for text in warnings]

    def on_step(self, progress: TrainingProgress) -> None:
        self.steps.append(progress.step)

    def on_evaluation(self, name: str, done: int, total: int) -> None:
        self.rows.append((name, done, total))


def run(task: str, checkpoint: Checkpoint, given: FinetuneOptions, words: Tokenizer) -> Result:
    return finetune(task, checkpoint, given, tokenizer=words, load=tiny_bert.load)


def counts(result: Result) -> dict[str, Any]:
    """Return what must not depend on where and how a checkpoint is evaluated."""
    figures = run_figures.without_lists(result.metrics)
    return {k: v for k, v in figures.items() if k not in ("median", "seeds")}


# --- recipes ---


def test_the_recipes_are_the_papers_table_6():
    rows = load_paper()["table6"]["rows"]
    tasks = {"squad1": "squad-v1", "squad2": "squad-v2"}
    expected = {}
    for row in rows:
        size = row["size"].removeprefix("bert-")
        expected[f"{tasks.get(row['task'], row['task'])}-megatron-{size}"] = row
    assert sorted(expected) == recipe_names()
    for name, row in expected.items():
        recipe = load_recipe(name, task=name.partition("-")[0])
        assert (recipe.global_batch, recipe.lr, recipe.epochs) == (
            row["global_batch"],
            row["lr"],
            row["epochs"],
        )
        assert (recipe.seq_length, recipe.weight_decay, recipe.clip_grad) == (512, 0.1, 1.0)
        assert recipe.lr_decay == "linear-v1"  # of the release nearest to the paper's runs


def test_any_field_of_a_recipe_can_be_replaced():
    plain = load_recipe("race-megatron-336m", task="race")
    assert (plain.warmup, plain.max_qa_length, plain.null_threshold) == (0.06, 128, None)
    changed = load_recipe(
        "race-megatron-336m", task="race", overrides={"lr": 1, "keep_last": True, "epochs": None}
    )
    assert changed == dataclasses.replace(plain, lr=1.0, keep_last=True)


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('task = "qqp"\nlr = 1e-4\nepochs = 2\nglobal_batch = 4\n')
    recipe = load_recipe(path, task="qqp")
    assert (recipe.lr, recipe.epochs, recipe.global_batch, recipe.warmup) == (1e-4, 2, 4, 0.06)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = [", "is not a TOML file that can be read"),
        ('task = "race"\n', "is a recipe for race, not for mnli"),
        ("lr = 1e-3\n", "is a recipe for None, not for mnli"),
        ('task = "mnli"\nlr = 1e-3\n', "does not set epochs, global_batch"),
        ('task = "mnli"\nlearning_rate = 1\n', "sets learning_rate, which no recipe has; the fie"),
        ('task = "mnli"\nlr = "high"\n', "sets lr to 'high'; expected float"),
        ('task = "mnli"\nepochs = 1.5\n', "sets epochs to 1.5; expected int"),
        ('task = "mnli"\nepochs = true\n', "sets epochs to True; expected int"),
        ('task = "mnli"\nkeep_last = 1\n', "sets keep_last to 1; expected bool"),
        ('task = "mnli"\nlr=1\nepochs=1\nglobal_batch=1\nn_best=0\n', "--n-best is 0; it must be"),
        (
            'task = "mnli"\nlr=1\nepochs=1\nglobal_batch=1\nseq_length=4\n',
            "--seq-length is 4; ",
        ),
    ],
)
def test_a_faulty_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(path, task="mnli")


def test_an_unknown_recipe_is_refused():
    with pytest.raises(InputError, match="no recipe race-large; those that ship are mnli-megatron"):
        load_recipe("race-large", task="race")


# --- options ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": ()}, "--seeds : give different, comma-separated numbers"),
        ({"seeds": (1, 1)}, "--seeds 1,1: give different, comma-separated numbers"),
        ({"seeds": (-1,)}, "--seeds -1: give different, comma-separated numbers from 0 on"),
        ({"train_limit": 0}, "--train-limit is 0; it must be at least 1"),
        ({"eval_dtype": "int8"}, "--eval-dtype 'int8' is unknown; use auto, float32"),
        # The trainer's own checks, before any data is read.
        ({"lr": -1.0}, "--lr is -1.0; it must be 0 or more"),
        ({"min_lr": -1.0}, "--min-lr is -1.0; it must be 0 or more"),
        ({"adam_beta1": 2.0}, r"--adam-beta1 is 2.0; it must lie in \[0, 1\)"),
        ({"lr_decay": "steps"}, "--lr-decay 'steps' is unknown; use linear, cosine, linear-v1"),
        ({"dp_mode": "zero"}, "--dp-mode 'zero' is unknown; use ddp, fsdp2"),
    ],
)
def test_impossible_options_are_refused(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        of_command(tmp_path, **given)


@pytest.mark.parametrize("given", [{"min_lr": 1e-6}, {"min_lr": 1e-6, "lr": 1e-5}, {"lr": 0.0}])
def test_options_that_need_the_recipe_are_no_fault(tmp_path, given):
    assert of_command(tmp_path, **given).overrides == given


def test_options_win_over_the_recipe(tmp_path):
    given = of_command(tmp_path, lr=3e-4, micro_batch=2, attention_dropout=0.0, save_minutes=1.0)
    recipe = load_recipe("race-megatron-1.3b", task="race", overrides=given.overrides)
    settings = given.train_settings(recipe, seed=7, dtype="bfloat16")
    assert (settings.lr, settings.micro_batch, settings.attention_dropout) == (3e-4, 2, 0.0)
    assert (settings.global_batch, settings.epochs, settings.weight_decay) == (16, 3, 0.1)
    assert (settings.seed, settings.dtype, settings.save_minutes) == (7, "bfloat16", 1.0)
    assert settings.max_steps is None


def test_sets_are_of_data_or_named_one_by_one(tmp_path):
    def names(**given: Any) -> list[str]:
        sets = read_sets(make_task("race"), FinetuneOptions(output_dir=tmp_path, **given))
        return [part.name for part in sets]

    data, middle = str(SAMPLES), str(SAMPLES / "dev" / "middle")
    train = ["train-middle", "train-high"]
    tests = ["test-middle", "test-high"]
    assert names(data=data) == [*train, "dev-middle", "dev-high", *tests]
    assert names(data=data, dev=[middle]) == [*train, *tests, "dev-middle"]
    assert names(train=[str(SAMPLES / "train")], dev=[middle]) == [*train, "dev-middle"]
    assert names(dev=[middle], eval_only=True) == ["dev-middle"]
    assert names(data=data, eval_only=True) == ["dev-middle", "dev-high", *tests]
    with pytest.raises(InputError, match="the data holds no labelled examples for train; give th"):
        names(dev=[middle])
    with pytest.raises(InputError, match="nothing to evaluate; give --data, --dev or --test"):
        names(eval_only=True)


def test_an_unknown_task_is_refused(tmp_path, bert, words):
    with pytest.raises(InputError, match="no task 'cola'.*known are race, mnli, qqp, squad"):
        run("cola", bert, options(tmp_path / "out"), words)


# --- a whole run ---


@pytest.fixture(scope="module")
def race_run(tmp_path_factory, bert, words) -> tuple[Path, Result, list[str], list[int], Rows]:
    """RACE on the samples for two epochs; where nothing can be cached."""
    output = tmp_path_factory.mktemp("race") / "out"
    heard = Heard()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
        result = finetune(
            "race",
            bert,
            options(output, epochs=2, dev_limit=10),
            tokenizer=words,
            load=tiny_bert.load,
            listener=heard,
        )
    return output, result, heard.lines, heard.steps, heard.rows


@pytest.mark.long
def test_the_model_of_a_run_has_megatrons_names_rows_and_tokenizer(race_run, words):
    """Those of v2.5, which goes on from it."""
    for name in ("checkpoint", "checkpoint-best"):
        written = open_checkpoint(race_run[0] / name)
        source, args = written.provenance, written.provenance.args
        assert (source.names, args["tokenizer_type"]) == ("legacy", "BertWordPieceLowerCase")
        rows = -(-(words.vocab_size + 2) // 128) * 128
        assert written.config.vocab_size == args["padded_vocab_size"] == rows
        assert args["make_vocab_size_divisible_by"] == 128


@pytest.mark.long
def test_the_record_of_a_run(race_run):
    output, result, lines, steps, _ = race_run
    record = json.loads((output / "result.json").read_text())
    assert record == json.loads(result.to_json())
    assert (record["task"], record["protocol"]) == ("race", "megatron-paper")
    metrics = record["metrics"]
    for name, total in {
        "dev-middle": 10,
        "dev-high": 10,
        "dev": 20,
        "test-middle": 12,
        "test-high": 12,
        "test": 24,
    }.items():
        entry = metrics[name]
        assert entry["total"] == total
        assert entry["accuracy"] == entry["correct"] / total
        assert metrics["median"][name]["accuracy"] == entry["accuracy"]
    assert metrics["dev"]["correct"] == sum(
        metrics[name]["correct"] for name in ("dev-middle", "dev-high")
    )
    settings = record["settings"]
    assert (settings["recipe"], settings["lr"], settings["seeds"]) == (
        "race-megatron-336m",
        1e-3,
        [1234],
    )
    assert (settings["dtype"], settings["eval_dtype"], settings["tp"]) == ("float32", "float32", 1)
    assert (settings["train_limit"], settings["dev_limit"], settings["eval_only"]) == (
        24,
        10,
        False,
    )
    assert record["counts"]["train_examples"] == 24
    assert record["counts"]["steps"] == 6
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(settings["evaluations"]["1234"]) == 2
    assert settings["data"]["sets"]["dev-high"]["of"] == 12
    assert record["timing"]["samples_per_second"] > 0
    assert any("limited: only the first 10 of 12" in text for text in result.warnings)
    assert any("rows are cut at 128" in text for text in result.warnings)
    assert sum(line.startswith("warning: ") for line in lines) == len(result.warnings)


@pytest.mark.long
def test_what_a_run_tells_on_the_way(race_run):
    _, result, lines, _, rows = race_run
    plan = "(race-megatron-336m, 2 epochs, batch 8, learning rate 0.001, rows of 128 tokens)"
    assert lines[0].startswith(f"work ahead: to train on 24 examples {plan}, to evaluate dev-mid")
    places = ["|seed 1234, epoch 1, step 3 of 6|", "|seed 1234, epoch 2, step 6 of 6|"]
    told = [line for line in lines if line.startswith(" > ")]
    for place, mine in zip(places, (told[:4], told[4:]), strict=True):
        assert re.fullmatch(
            re.escape(f" > {place} training: ")
            + r"loss \d\.\d{4}, accuracy \d+\.\d\d %, [\d,.]+ samples/s",
            mine[0],
        )
        for name, line in zip(("dev-middle", "dev-high", "dev"), mine[1:], strict=True):
            assert line.startswith(f" > {place} metrics for {name}: correct / total = ")
    last = result.metrics["dev"]
    assert f"dev: correct / total = {last['correct']} / {last['total']} = " in told[-1]
    # Ten questions with four rows each, twelve in a test set; each set to its end.
    ends = [(name, total) for name, done, total in rows if done == total]
    dev = [("dev-middle", 40), ("dev-high", 40)]
    assert ends == [*dev, *dev, ("test-middle", 48), ("test-high", 48)]


def test_what_a_run_leaves(race_run, words):
    output, *_ = race_run
    left = {path.name for path in output.iterdir()}
    assert left >= {
        "result.json",
        "run.json",
        "predictions",
        "checkpoint",
        "checkpoint-best",
        "metrics.jsonl",
        "training.png",
        "tensorboard",
    }
    assert sorted(path.name for path in (output / "predictions").iterdir()) == [
        f"{role}-{level}.jsonl" for role in ("dev", "test") for level in ("high", "middle")
    ]
    tuned = open_checkpoint(output / "checkpoint")
    assert tuned.config.multichoice_head
    found = find_tokenizer(output / "checkpoint")
    assert found is not None
    assert (found.sha256, found.lower_case) == (words.sha256, words.lower_case)
    saved = read_predictions(output / "predictions" / "dev-middle.jsonl")
    assert saved.header["seed"] == 1234
    assert [len(r["probabilities"]) for r in saved.records] == [4] * 10
    assert saved.records[0]["id"] == "middle13.txt-0"


def evaluation(output: Path, target: Path, tp: int, dp: int) -> dict[str, Any]:
    """Return the figures of an evaluation-only run, from within one of the ranks."""
    os.environ["XDG_CACHE_HOME"] = str(target.parent / "cache")  # a rank may be older than the test
    words = find_tokenizer(output / "checkpoint")
    assert words is not None
    result = finetune(
        "race",
        open_checkpoint(output / "checkpoint"),
        options(target, eval_only=True, dev_limit=10),
        tokenizer=words,
        load=lambda source, dtype: Engine.load(source, tp=tp, dp=dp, dtype=dtype),
    )
    return json.loads(result.to_json())


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (1, 2)])
def test_an_evaluation_gives_the_stored_figures_at_any_layout(race_run, tmp_path, tp, dp):
    output, result, *_ = race_run
    target = tmp_path / "evaluation"
    found = run_ranks(tp * dp, evaluation, output, target, tp, dp)
    records = [{**record, "timing": None} for record in found]
    assert all(record == records[0] for record in records)  # the same on every rank
    assert json.loads((target / "result.json").read_text())["metrics"] == found[0]["metrics"]
    assert (found[0]["settings"]["eval_only"], found[0]["settings"]["seeds"]) == (True, [])
    expected = counts(result)
    metrics = run_figures.without_lists(found[0]["metrics"])
    for name, entry in expected.items():
        # All but those whose two best choices are as good as equal.
        close = sum(
            len(values["close_calls"])
            for key, values in found[0]["metrics"].items()
            if key.startswith(name) and "close_calls" in values
        )
        assert abs(metrics[name]["correct"] - entry["correct"]) <= close
        assert metrics[name]["total"] == entry["total"]
    for name in ("dev-middle", "test-high"):
        ours, theirs = (
            read_predictions(folder / "predictions" / f"{name}.jsonl").records
            for folder in (target, output)
        )
        for one, other in zip(ours, theirs, strict=True):
            assert one["id"] == other["id"]
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_a_folder_with_a_run_is_refused(race_run, bert, words):
    output, *_ = race_run
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"holds a finished run \(result.json\); .* --overwrite"):
        run("race", bert, options(output), words)
    with pytest.raises(InputError, match="holds a finished run"):
        run("race", bert, options(output, restart=True), words)
    with pytest.raises(InputError, match=r"holds a training run .*; choose another --output-dir"):
        run("race", bert, options(output, eval_only=True, overwrite=True), words)
    with pytest.raises(InputError, match="holds a finished run"):
        run("race", bert, options(output, seeds=(1, 2)), words)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.long
def test_a_fine_tuning_keeps_checkpoints_on_its_way(bert, words, tmp_path):
    """In a root with its tokenizer, from which each can be evaluated."""
    small = {"dev_limit": 2, "test_limit": 2, "seq_length": 64}
    given = options(tmp_path / "out", max_steps=3, save_every=1, keep=2, **small)
    result = run("race", bert, given, words)
    root = tmp_path / "out" / "checkpoint-series"
    tracker = "latest_checkpointed_iteration.txt"
    names = ["iter_0000002", "iter_0000003", tracker, "tokenizer"]
    assert sorted(path.name for path in root.iterdir()) == names
    assert (root / tracker).read_text() == "3" and result.settings["save_every"] == 1
    last = open_checkpoint(root)
    assert find_tokenizer(root).sha256 == words.sha256
    alone = options(tmp_path / "again", eval_only=True, **small)
    assert counts(run("race", last, alone, words))["dev"] == counts(result)["dev"]


# --- seeds ---


SEEDS = (1, 2, 3)


class Stopped(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, bert, words) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("seeds") / "unbroken"
    return output, run("race", bert, options(output, seeds=SEEDS, lr=3e-3), words)


@pytest.mark.long
def test_seeds_are_reported_one_by_one_with_their_median(unbroken):
    output, result = unbroken
    of_seeds = result.metrics["seeds"]
    assert list(of_seeds) == ["1", "2", "3"]
    assert result.settings["seeds"] == [1, 2, 3]
    accuracies = {seed: entry["dev"]["accuracy"] for seed, entry in of_seeds.items()}
    median = result.metrics["median"]
    assert median["dev"]["accuracy"] == sorted(accuracies.values())[1]
    assert accuracies[str(median["seed"])] == median["dev"]["accuracy"]
    # The test figures, and the model, are those of the seed that the dev sets choose.
    chosen = of_seeds[str(median["seed"])]
    assert median["test"] == chosen["test"]
    assert run_figures.without_lists(result.metrics)["test"] == chosen["test"]
    folder = output / f"seed-{median['seed']}" / "checkpoint"
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert files
    for file in files:
        assert (output / "checkpoint" / file).read_bytes() == (folder / file).read_bytes()
    heads = [
        open_checkpoint(output / f"seed-{seed}" / "checkpoint").tensors["multichoice_head.weight"]
        for seed in SEEDS
    ]
    assert len({tuple(head.read().flatten().tolist()) for head in heads}) == 3


@pytest.mark.long
def test_the_ensemble_of_the_seeds(unbroken):
    output, _ = unbroken
    result = ensemble_result([output / f"seed-{seed}" / "predictions" for seed in SEEDS])
    assert result.settings["ensemble"] == 3
    assert (result.metrics["dev"]["total"], result.metrics["test-high"]["total"]) == (24, 12)


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_figures(unbroken, bert, words, tmp_path):
    """Killed in the second seed's run: the first is not run again, the third is run anew."""
    output = tmp_path / "broken"
    given = options(output, seeds=SEEDS, lr=3e-3)
    heard = Heard()

    class Stopping(Heard):
        def on_step(self, progress: TrainingProgress) -> None:
            super().on_step(progress)
            if len(self.steps) == 5:  # of 3 in each run
                raise Stopped

    with pytest.raises(Stopped):
        finetune(
            "race", bert, given, tokenizer=words, load=tiny_bert.load,
            listener=Stopping(),
        )  # fmt: skip
    assert not (output / "result.json").exists()
    result = finetune(
        "race",
        bert,
        given,
        tokenizer=words,
        load=tiny_bert.load,
        listener=heard,
    )
    assert result.metrics == unbroken[1].metrics
    assert [line for line in heard.lines if "done before" in line or "resumed" in line] == [
        f"seed 1: done before, {output / 'seed-1'}"
    ]
    # More seeds can be added to those that are done, with the same settings.
    more = dataclasses.replace(given, seeds=(*SEEDS, 4))
    with pytest.raises(InputError, match=r"seed-1 holds another run: lr 0.003, now 0.0001; "):
        run("race", bert, changed(more, lr=1e-4), words)
    assert list(run("race", bert, more, words).metrics["seeds"]) == ["1", "2", "3", "4"]


def hand_made(seed: int, dev: float, test: float) -> dict[str, Any]:
    entry = {"accuracy": dev, "correct": round(100 * dev), "total": 100, "close_calls": ["a"]}
    return {
        "seed": seed,
        "metrics": {
            "dev-middle": {**entry, "accuracy": 1 - dev},
            "dev": entry,
            "test": {"accuracy": test, "correct": round(10 * test), "total": 10},
        },
    }


def test_the_median_by_hand():
    runs = [hand_made(1, 0.7, 0.1), hand_made(2, 0.5, 0.9), hand_made(3, 0.6, 0.3)]
    chosen = run_figures.median_run(runs)
    assert chosen["seed"] == 3
    assert run_figures.medians(runs, chosen) == {
        "seed": 3,
        "dev-middle": {"accuracy": 0.4, "total": 100},
        "dev": {"accuracy": 0.6, "total": 100},
        "test": {"accuracy": 0.3, "correct": 3, "total": 10},
    }
    # Of an even number the lower one of the middle is chosen; the median is between them.
    runs.append(hand_made(4, 0.65, 0.2))
    chosen = run_figures.median_run(runs)
    assert chosen["seed"] == 3
    assert run_figures.medians(runs, chosen)["dev"]["accuracy"] == 0.625


def test_lines_in_the_manner_of_megatron():
    metrics = {
        "dev": {"accuracy": 0.25, "correct": 1, "total": 4, "f1": 0.125},
        "test": {"exact": 50.0, "f1": 62.5, "total": 8},
        "dev-middle": {"accuracy": 0.5, "correct": 1, "total": 2, "close_calls": []},
        "dev-high": {"accuracy": 0.0, "correct": 0, "total": 2, "close_calls": []},
        "exact": 50.0,
        "median": {"seed": 1},
    }
    assert run_figures.figure_lines(metrics, "seed 7") == [
        " > |seed 7| metrics for dev-middle: correct / total = 1 / 2 = 50.0000 %",
        " > |seed 7| metrics for dev-high: correct / total = 0 / 2 = 0.0000 %",
        " > |seed 7| metrics for dev: correct / total = 1 / 4 = 25.0000 %, F1 = 12.5000 %",
        " > |seed 7| metrics for test: exact = 50.0000 %, F1 = 62.5000 % of 8",
    ]


@pytest.mark.parametrize(
    ("totals", "shown"),
    [
        ({"dev": 4, "exact": None, "seeds": None}, ["dev"]),
        ({"dev": 4, "dev-odd": 4}, ["dev-odd"]),  # pooled of one: the same figures
        ({"dev": 8, "dev-odd": 4}, ["dev-odd", "dev"]),
        ({"dev": 8, "dev-a": 4, "dev-b": 4}, ["dev-a", "dev-b", "dev"]),
        ({"test-a": 3, "test": 3, "dev-a": 4, "dev": 4}, ["dev-a", "test-a"]),
        ({}, []),
    ],
)
def test_no_figure_is_shown_twice(totals, shown):
    assert sets_to_show({name: {"total": total} for name, total in totals.items()}) == shown


def test_a_set_beside_others_does_not_take_the_name_of_them_all(tmp_path):
    write_squad(tmp_path)
    shutil.copy(tmp_path / "dev-v2.0.json", tmp_path / "odd.json")
    given = {"data": None, "train": [str(tmp_path / "train-v2.0.json")]}
    official, odd = (str(tmp_path / name) for name in ("dev-v2.0.json", "odd.json"))
    for dev, names in (
        ([official], ["dev"]),
        ([odd], ["dev-odd"]),
        ([official, odd], ["dev-v2.0", "dev-odd"]),
    ):
        sets = read_sets(make_task("squad"), options(tmp_path / "out", **given, dev=dev))
        assert [part.name for part in sets] == ["train", *names]
    (tmp_path / "qqp").mkdir()
    write_qqp(tmp_path / "qqp")
    files = [str(tmp_path / "qqp" / name) for name in ("dev.tsv", "train.tsv")]
    given = {"data": None, "train": [files[1]], "dev": files}
    sets = read_sets(make_task("qqp"), options(tmp_path / "out", **given))
    assert [part.name for part in sets] == ["train", "dev-dev", "dev-train"]


# --- the other tasks ---


def write_mnli(folder: Path) -> None:
    header = (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
        "sentence2_parse sentence1 sentence2 label1 gold_label"
    ).split()
    for name in ("train", "dev_matched", "dev_mismatched", "test_matched"):
        rows = ["\t".join(header[:10] if name.startswith("test") else header)]
        for number in range(16):
            pair = ["the cat sat", ("the cat sat", "a dog was red", "the mat")[number % 3]]
            label = [] if name.startswith("test") else ["x", MNLI_LABELS[number % 3]]
            rows.append("\t".join([str(number), *"abcdefg", *pair, *label]))
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n")


MNLI_LABELS = ("entailment", "contradiction", "neutral")


def write_qqp(folder: Path) -> None:
    for name in ("train", "dev"):
        rows = ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"]
        for number in range(16):
            other = "who is the cat" if number % 2 else "where was a mat"
            rows.append(f"{number}\t0\t0\twho is the cat\t{other}\t{number % 2}")
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n")


def write_squad(folder: Path) -> None:
    context = "The cat sat on the mat. The dog was red. " * 4
    for role in ("train", "dev"):
        questions = []
        for number in range(12):
            word = ("cat", "dog", "mat")[number % 3]
            impossible = number % 4 == 3
            answer = {"text": word, "answer_start": context.index(word)}
            questions.append(
                {
                    "id": f"{role}{number}",
                    "question": f"where is the {word}",
                    "answers": [] if impossible else [answer],
                    "is_impossible": impossible,
                }
            )
        content = {"data": [{"paragraphs": [{"context": context, "qas": questions}]}]}
        (folder / f"{role}-v2.0.json").write_text(json.dumps({"version": "v2.0", **content}))


@pytest.mark.long
@pytest.mark.parametrize(
    ("task", "write", "given", "names"),
    [
        ("mnli", write_mnli, {}, {"dev-matched": 16, "dev-mismatched": 16, "dev": 32}),
        ("qqp", write_qqp, {}, {"dev": 16}),
        (
            "squad",
            write_squad,
            {"seq_length": 40, "doc_stride": 12, "max_query_length": 8},
            {"dev": 12},
        ),
    ],
)
def test_every_task_from_files_to_an_evaluation(
    bert, words, tmp_path, task: str, write: Callable[[Path], None], given: Any, names: Any
):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    small = {"data": str(tmp_path / "data"), "train_limit": None, **given}
    result = run(task, bert, options(tmp_path / "out", lr=3e-3, epochs=3, **small), words)
    for name, total in names.items():
        assert result.metrics[name]["total"] == total
        assert result.metrics["median"][name]["total"] == total
    if task == "qqp":
        assert set(result.metrics["dev"]) >= {"accuracy", "f1", "correct"}
    if task == "squad":
        assert result.settings["version"] == "2.0"
        assert result.settings["recipe"] == "squad-v2-megatron-336m"
        dev = result.metrics["dev"]
        assert (result.metrics["exact"], result.metrics["f1"]) == (dev["exact"], dev["f1"])
        assert result.metrics["median"]["f1"] == dev["f1"]
        assert result.counts["train_samples"] > result.counts["train_examples"] == 12
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        if "loss" in line
    ]
    assert sum(losses[-2:]) < sum(losses[:2])  # it learns
    tuned = open_checkpoint(tmp_path / "out" / "checkpoint")
    again = run(task, tuned, options(tmp_path / "again", eval_only=True, **small), words)
    assert counts(again) == counts(result)
    for file in (tmp_path / "out" / "predictions").glob("*.jsonl"):
        records = read_predictions(file).records
        assert records == read_predictions(tmp_path / "again" / "predictions" / file.name).records
    if task == "mnli":
        hidden = read_predictions(tmp_path / "out" / "predictions" / "test-matched.jsonl")
        assert {record["label"] for record in hidden.records} == {None}
        assert "test-matched" not in result.metrics
    other = "qqp" if task == "mnli" else "mnli"
    with pytest.raises(InputError, match=f"has no classification_head for {other}; --eval-only"):
        (tmp_path / "other").mkdir()
        (write_qqp if other == "qqp" else write_mnli)(tmp_path / "other")
        elsewhere = options(tmp_path / "no", eval_only=True, data=str(tmp_path / "other"))
        run(other, tuned, elsewhere, words)


# --- what is refused ---


def test_models_that_do_not_fit_are_refused(bert, words, tmp_path):
    gpt = random_models.checkpoint(random_models.GPT)
    with pytest.raises(InputError, match="is a GPT checkpoint; fine-tuning needs a BERT model"):
        run("race", gpt, options(tmp_path / "out"), words)
    with pytest.raises(InputError, match="--seq-length 200 is more than the model's 128 positions"):
        run("race", bert, options(tmp_path / "out", seq_length=200), words)
    small = random_models.checkpoint(random_models.config(random_models.BERT, vocab_size=20))
    with pytest.raises(InputError, match="entries but the model has 20 rows"):
        run("race", small, options(tmp_path / "out"), words)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def failing(output: Path) -> None:
    tiny = random_models.checkpoint(
        random_models.config(random_models.BERT, vocab_size=200, max_position_embeddings=64)
    )
    words = load_tokenizer(directory=output.parent / "vocabulary")
    finetune(
        "race",
        tiny,
        FinetuneOptions(output_dir=output, data=str(output.parent / "nothing")),
        tokenizer=words,
        load=tiny_bert.load,
    )


def test_wrong_data_end_every_rank(tmp_path):
    """Only rank 0 reads: the others must not wait for ever."""
    (tmp_path / "nothing").mkdir()
    tiny_bert.tokenizer(tmp_path / "vocabulary")
    with pytest.raises(InputError, match="holds no passages"):
        run_ranks(2, failing, tmp_path / "out")


def test_a_copied_tokenizer_is_found_again(tmp_path):
    """Whatever its file was called, with the `do_lower_case` that a file next to it stated."""
    source = tmp_path / "bert-large-uncased-vocab.txt"
    shutil.copy(tiny_bert.write_vocabulary(tmp_path / "v"), source)
    with source.open("a") as stream:
        stream.write("Upper\n")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    words = load_tokenizer(vocab_file=source)
    assert words.lower_case is True
    copy_tokenizer(words, tmp_path / "checkpoint" / "tokenizer")
    found = find_tokenizer(tmp_path / "checkpoint")
    assert found is not None
    assert (found.lower_case, found.sha256) == (True, words.sha256)


def alive_between_seeds(folder: Path, mode: str) -> list[int]:
    """Return how many parameters of earlier seeds live when the next seed's model is loaded."""
    words = tiny_bert.tokenizer(folder / f"words-{dist.get_rank()}")
    seen: list[weakref.ref[Any]] = []
    alive = []

    def load(checkpoint: Checkpoint, dtype: str) -> Engine:
        alive.append(sum(reference() is not None for reference in seen))
        engine = Engine.load(checkpoint, tp=1, dp=2, dtype=dtype)
        seen.extend(weakref.ref(parameter) for parameter in engine.model.parameters())
        return engine

    base = tiny_bert.checkpoint(folder / f"bert-{dist.get_rank()}", tp=1)
    given = options(folder / "out", seeds=(1, 2, 3), train_limit=8, dev_limit=4, dp_mode=mode)
    finetune("race", base, given, tokenizer=words, load=load)
    return alive


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_finished_seed_leaves_no_model_behind(mode: str, tmp_path: Path):
    """What FSDP2 makes of a model is full of cycles: it waited for the garbage collector."""
    for alive in run_ranks(2, alive_between_seeds, tmp_path, mode):
        assert alive == [0, 0, 0]
