"""The command line: exit codes, one sentence for what is wrong, help, records."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import typer
from support.command_line import TEXT, Run, assert_one_sentence, on, read
from support.paths import ORACLES

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import load_tokenizer
from mlm_eval.cli.app import commands, full_command, load_config
from mlm_eval.cli.training import TrainingBars
from mlm_eval.tasks.finetune.settings import FinetuneOptions, Recipe
from mlm_eval.tasks.language.settings import MaskedTextSettings, TextSettings
from mlm_eval.training.settings import TrainingProgress, TrainSettings

pytest_plugins = ["support.command_line_fixtures"]

BERT_ORACLE = ORACLES / "v25_bert_tp2_fusedgelu"


# --- Help ---------------------------------------------------------------------------------------


def test_help_costs_no_torch():
    code = "import sys, mlm_eval.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


@pytest.mark.long
@pytest.mark.parametrize("command", sorted(commands()))
def test_every_help_has_an_example(run, command):
    ended = run(command, "--help")
    assert ended.code == 0 and ended.err == ""
    shown = re.sub(r"\s+", " ", ended.out)
    assert f"Example: mlm-eval {command}" in shown


def test_the_commands_of_the_contract_are_there(run):
    assert {"inspect", "wikitext103", "lambada", "score", "convert", "verify"} <= set(commands())
    ended = run("--help")
    assert ended.code == 0 and all(command in ended.out for command in commands())


def test_no_command_at_all_shows_the_help(run):
    ended = run()
    assert ended.code == 2 and "wikitext103" in ended.out and ended.err == ""


def test_a_command_that_is_not_there_is_guessed(run):
    assert_one_sentence(run("wikitxt103"), "no command 'wikitxt103'; did you mean wikitext103?")
    assert_one_sentence(run("xyz", "--ckpt", "c"), "no command 'xyz'; `mlm-eval --help` lists them")


def test_the_version(run):
    assert re.fullmatch(r"mlm-eval \d+\.\d+\.\d+\n", run("--version").out)


# --- What is wrong: exit code 2 and one sentence ------------------------------------------------


WRONG: dict[str, tuple[list[str], list[str]]] = {
    # name: (more options of wikitext103, what the sentence says)
    "no such checkpoint": (["--ckpt", "/no/such"], ["/no/such", "does not exist"]),
    "no checkpoint": (["--ckpt", "{folder}"], ["{folder} holds no checkpoint"]),
    "unknown option": (["--strid", "32"], ["No such option", "--strid", "see --help"]),
    "no number": (["--stride", "many"], ["--stride", "integer"]),
    "stride 0": (["--stride", "0"], ["--stride", "1"]),
    "stride beyond the window": (["--stride", "33"], ["--stride 33", "32 tokens"]),
    "window beyond the positions": (["--seq-length", "33"], ["--seq-length 33", "32 positions"]),
    "limit 0": (["--limit", "0"], ["--limit", "1"]),
    "tp of zero": (["--tp", "0"], ["--tp '0'", "positive number or auto"]),
    "tp in words": (["--tp", "two"], ["--tp 'two'", "positive number or auto"]),
    "tp that does not divide": (["--tp", "3"], ["tp=3", "4 attention heads", "1, 2, 4"]),
    "dp below zero": (["--dp", "-1"], ["--dp '-1'", "positive number or auto"]),
    "dtype": (["--dtype", "float64"], ["--dtype 'float64'", "bfloat16"]),
    "vocab": (["--vocab", "all"], ["--vocab 'all'", "padded or true"]),
    "device": (["--device", "tpu"], ["--device 'tpu'", "auto, cpu or cuda"]),
    "no such tokenizer": (["--tokenizer", "/no/such"], ["/no/such does not exist"]),
    "no tokenizer there": (["--tokenizer", "{folder}"], ["{folder} holds no tokenizer"]),
    "a larger vocabulary": (
        ["--vocab-file", "{folder}/large.txt"],
        ["large.txt has 300 entries", "256 rows", "--tokenizer"],
    ),
    "merges without a vocabulary": (["--merge-file", "{folder}/m.txt"], ["--merge-file"]),
    "no such data": (["--data", "{folder}/none.txt"], ["none.txt does not exist", "--data"]),
    "data in another encoding": (
        ["--data", "{folder}/latin.txt"],
        ["latin.txt, line 1 is not UTF-8"],
    ),
    "empty data": (["--data", "{folder}/empty.txt"], ["empty.txt is empty"]),
    "output below a file": (
        ["--output", "{folder}/wiki.tokens/out.json"],
        ["out.json cannot be written", "--output"],
    ),
    "output is a folder": (["--output", "{folder}/gpt"], ["gpt cannot be written", "a folder"]),
    "setting without a value": (["--set", "activation"], ["--set 'activation'", "="]),
    "unknown setting": (["--set", "heads=4"], ["--set heads", "num_attention_heads"]),
    "setting out of its values": (["--set", "activation=tanh"], ["tanh", "gelu_tanh"]),
    "no such config": (["--config", "{folder}/none.toml"], ["none.toml does not exist"]),
    "config is a folder": (["--config", "{folder}"], ["is a folder"]),
    "config is not TOML": (["--config", "{folder}/wiki.tokens"], ["wiki.tokens is not a TOML"]),
    "unknown key in config": (["--config", "{folder}/key.toml"], ["key.toml", "'strid'"]),
    "wrong value in config": (["--config", "{folder}/value.toml"], ["--stride", "integer"]),
    "half in config": (["--config", "{folder}/half.toml"], ["stride to 1.7", "whole number"]),
    "truth in config": (["--config", "{folder}/truth.toml"], ["stride to True", "a number or"]),
    "number for a flag in config": (["--config", "{folder}/flag.toml"], ["true or false"]),
    "table in config": (["--config", "{folder}/table.toml"], ["table.toml", "model"]),
}


@pytest.fixture(scope="session")
def wrong_files(folder: Path) -> Path:
    pieces = ["[UNK]", *(f"w{n}" for n in range(299))]
    (folder / "large.txt").write_text("\n".join(pieces))
    (folder / "latin.txt").write_bytes(b"caf\xe9 in the town")
    (folder / "empty.txt").write_text("")
    (folder / "key.toml").write_text("strid = 8\n")
    (folder / "value.toml").write_text('stride = "many"\n')
    (folder / "half.toml").write_text("stride = 1.7\n")
    (folder / "truth.toml").write_text("stride = true\n")
    (folder / "flag.toml").write_text("overwrite = 1\n")
    (folder / "table.toml").write_text("[model]\nstride = 8\n")
    return folder


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_sentence(run, wiki, wrong_files, what):
    options, parts = WRONG[what]
    before = sorted(wrong_files.rglob("*"))
    given = [option.format(folder=wrong_files) for option in options]
    line = on(given[1], wiki) if given[0] == "--ckpt" else [*wiki, *given]
    assert_one_sentence(run(*line), *(part.format(folder=wrong_files) for part in parts))
    assert sorted(wrong_files.rglob("*")) == before  # nothing half-written


def test_a_missing_option_is_named(run):
    assert_one_sentence(run("wikitext103"), "--ckpt")


def test_an_unknown_command_is_named(run):
    assert_one_sentence(run("wikitext"), "wikitext")


def test_a_checkpoint_without_a_tokenizer_beside_it(run, wiki, folder, tmp_path):
    (tmp_path / "gpt").mkdir()
    for entry in (folder / "gpt").iterdir():
        if entry.name != "tokenizer":
            (tmp_path / "gpt" / entry.name).symlink_to(entry)
    ended = run(*on(tmp_path / "gpt", wiki))
    assert_one_sentence(ended, "no tokenizer was found beside", "--tokenizer DIR", "--merge-file")


@pytest.mark.parametrize("task", ["wikitext103", "lambada"])
def test_a_bert_is_no_left_to_right_model(run, folder, task):
    ended = run(task, "--ckpt", BERT_ORACLE, "--data", folder / "wiki.tokens")
    assert_one_sentence(ended, "is a BERT checkpoint", f"{task} needs a GPT model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "the cat"}\n{"text": "one"}\n', "line 2: 'one' has no context"),
        ('{"text": "the cat"}\n{"txt": "one"}\n', "line 2: 'text' is missing"),
        ("the cat sat\n", "line 1 is not JSON"),
    ],
)
def test_passages_that_are_none_are_named(run, cloze, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    ended = run(*cloze, "--data", tmp_path / "bad.jsonl")
    assert_one_sentence(ended, f"{tmp_path}/bad.jsonl, {message}")


def test_an_unknown_target_is_named(run, cloze):
    assert_one_sentence(run(*cloze, "--target", "first"), "--target 'first'", "word or last-token")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"tokens": [1]}\n{"tokens": "1"}\n', "line 2: tokens must be a list of integers"),
        ('{"tokens": [1]}\n\n{"tokens": [1, 256]}\n', "line 3 holds token id 256"),
        ("\n", "holds no lines"),
        (None, "bad.jsonl does not exist; give"),
    ],
)
def test_lines_that_cannot_be_scored_are_named(run, folder, tmp_path, content, message):
    if content is not None:
        (tmp_path / "bad.jsonl").write_text(content)
    output = tmp_path / "out.jsonl"
    arguments = ["--ckpt", folder / "gpt", "--input", tmp_path / "bad.jsonl", "--output", output]
    assert_one_sentence(run("score", *arguments), f"{tmp_path}/bad.jsonl", message)
    assert not output.exists()


def test_a_fault_of_ours_is_shown_whole(run, wiki, monkeypatch):
    monkeypatch.setattr("mlm_eval.engine.score.score_batch", lambda *_: 1 / 0)
    ended = run(*wiki)
    assert ended.code == 1 and ended.out == ""
    assert "Traceback" in ended.err and "ZeroDivisionError" in ended.err
    assert ended.err.splitlines()[-1].startswith("mlm-eval: this is a fault of mlm-eval")


# --- What the commands that train take ----------------------------------------------------------

FINETUNING, PRETRAINING = ("race", "mnli", "qqp", "squad"), ("mlm", "lm")
HERE = {  # options that are for some of the commands only
    "max_qa_length": {"race"},
    "doc_stride": {"squad"},
    "max_query_length": {"squad"},
    "max_answer_length": {"squad"},
    "n_best": {"squad"},
    "null_threshold": {"squad"},
    "mask_probability": {"mlm"},
    "whole_words": {"mlm"},
}
EXAMPLES = {  # where the type alone does not say what can be written
    "data": "folder",
    "recipe": "mine",
    "output_dir": Path("somewhere"),
    "dtype": "bfloat16",
    "eval_dtype": "float16",
    "dp_mode": "fsdp2",
    "lr_decay": "cosine",
    "min_lr": 1e-9,
    "whole_words": False,
}


def taken(command: str) -> dict[str, Any]:
    """Return the options of a command by the names of their parameters."""
    return {parameter.name: parameter for parameter in full_command(command).params}


def fields(*kinds: type[Any]) -> dict[str, Any]:
    """Return the fields of dataclasses with their types."""
    found = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        found |= {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return found


def finetuning_fields() -> dict[str, Any]:
    """Return what a fine-tuning can be told: its own options, and the recipe's."""
    found = fields(FinetuneOptions, Recipe)
    return {name: hint for name, hint in found.items() if name not in ("overrides", "task")}


TEXTS: dict[str, type[TextSettings]] = {"mlm": MaskedTextSettings, "lm": TextSettings}


def example(name: str, hint: Any, number: int) -> tuple[list[str], Any]:
    """Return what to write for a field so that it is not its default, and what must arrive."""
    option, kinds = "--" + name.replace("_", "-"), get_args(hint) or (hint,)
    if name == "seeds":
        return [option, "3,1"], (3, 1)
    if name == "log":
        return [option, "tensorboard:a", option, "tensorboard:b"], (
            "tensorboard:a",
            "tensorboard:b",
        )
    if get_origin(hint) is Sequence:
        words = [f"{name}.a", f"{name}.b"]
        return [option, words[0], option, words[1]], tuple(map(kinds[0], words))
    if bool in kinds:
        value = EXAMPLES.get(name, True)
        return [option if value else option.replace("--", "--no-")], value
    if name not in EXAMPLES and int in kinds:
        return [option, str(100 + number)], 100 + number
    if name not in EXAMPLES and float in kinds:
        return [option, str(number / 1024)], number / 1024
    return [option, str(EXAMPLES[name])], EXAMPLES[name]


@pytest.mark.long
@pytest.mark.parametrize("command", FINETUNING)
def test_every_field_of_a_fine_tuning_is_an_option(command):
    for name in finetuning_fields():
        assert (name in taken(command)) == (command in HERE.get(name, {command})), name


@pytest.mark.parametrize("command", PRETRAINING)
def test_every_field_of_a_pre_training_is_an_option(command):
    for name in fields(TrainSettings, MaskedTextSettings):
        assert (name in taken(command)) == (command in HERE.get(name, {command})), name


def told(monkeypatch: pytest.MonkeyPatch, where: str, run: Run, *arguments: object) -> Any:
    """Run a command line, and return what it hands to the function that does the work."""
    seen: list[Any] = []

    def stop(*given: Any, **named: Any) -> None:
        seen.append((given, named))
        raise InputError("seen")

    monkeypatch.setattr(where, stop)
    assert_one_sentence(run(*arguments), "seen")
    return seen[0]


@pytest.mark.parametrize("command", FINETUNING)
def test_what_a_fine_tuning_is_told_arrives(run, bert, monkeypatch, command):
    line, expected = [], {}
    for number, (name, hint) in enumerate(finetuning_fields().items(), start=1):
        if command in HERE.get(name, {command}):
            words, expected[name] = example(name, hint, number)
            line += words
    where = "mlm_eval.tasks.finetune.run.finetune"
    given, _ = told(monkeypatch, where, run, command, "--ckpt", bert, *line)
    assert given[0] == command
    assert {**vars(given[2]), **given[2].overrides}.items() >= expected.items()
    # Each of them differs from what is taken where nothing is said: that is the recipe's.
    given, _ = told(monkeypatch, where, run, command, "--ckpt", bert, "--output-dir", "out")
    assert given[2] == FinetuneOptions(output_dir=Path("out")) and not given[2].overrides
    plain = vars(given[2])
    assert all(plain.get(name) != value for name, value in expected.items())


@pytest.mark.parametrize("command", PRETRAINING)
def test_what_a_pre_training_is_told_arrives(run, bert, folder, monkeypatch, command):
    model = {"mlm": bert, "lm": folder / "gpt"}[command]
    line, expected = [], {}
    for number, (name, hint) in enumerate(fields(TrainSettings, TEXTS[command]).items(), start=1):
        if command in HERE.get(name, {command}):
            words, expected[name] = example(name, hint, number)
            line += words
    start = (command, "--ckpt", model, "--output-dir", "o")
    where = "mlm_eval.tasks.language.pretraining.pretrain"
    given, named = told(monkeypatch, where, run, *start, *line, "--resume", "--restart")
    assert (
        named["restart"] is True
        and named["overwrite"] is False
        and named["output_dir"] == Path("o")
    )
    text, settings = given[2:]
    assert text.kind == command
    assert {**vars(text), **vars(settings)}.items() >= expected.items()
    given, named = told(monkeypatch, where, run, *start, "--data", "text.txt")
    assert given[2] == TEXTS[command](data=(Path("text.txt"),)) and named["restart"] is False
    assert given[3] == TrainSettings(lr=1e-4)
    plain = {**vars(given[2]), **vars(given[3])}
    assert all(plain[name] != value for name, value in expected.items())


def test_the_help_of_a_training_tells_the_defaults(run):
    def shown(command: str) -> str:
        return re.sub(r"[\s│]+", " ", run(command, "--help").out)

    fine, text = shown("squad"), shown("mlm")
    for group in ("Options", "Optimizer", "Data", "Task", "Run"):
        assert f"─ {group} ─" in fine and f"─ {group} ─" in text
    assert fine.index("--lr ") < fine.index("─ Optimizer ─") < fine.index("--adam-beta1")
    assert "Highest learning rate. [default: (3e-05, the recipe's)]" in fine
    assert "over all ranks. [default: (64 or 48, the recipe's)]" in fine  # SQuAD 1.1, 2.0
    assert "Highest learning rate. [default: 0.0001]" in text
    assert "─ Task ─" not in shown("qqp")


WRONG_TRAINING: dict[str, tuple[str, list[str], list[str]]] = {
    # name: (command, its options, what the sentence says)
    "rate": ("race", ["--lr", "-1"], ["--lr is -1.0", "0 or more"]),
    "decay": ("qqp", ["--lr-decay", "foo"], ["--lr-decay 'foo'", "linear, cosine"]),
    "beta": ("mnli", ["--adam-beta1", "2"], ["--adam-beta1 is 2.0", "[0, 1)"]),
    "dtype of evaluations": ("race", ["--eval-dtype", "foo"], ["--eval-dtype 'foo'", "bfloat16"]),
    "stride": ("squad", ["--doc-stride", "0"], ["--doc-stride"]),
    "of another task": ("race", ["--doc-stride", "64"], ["No such option", "--doc-stride"]),
    "seeds": ("race", ["--seeds", "1,x"], ["--seeds '1,x'", "comma-separated"]),
    "rate of mlm": ("mlm", ["--lr", "-1"], ["--lr is -1.0", "0 or more"]),
    "clipping": ("lm", ["--clip-grad", "-1"], ["--clip-grad is -1.0", "0 or more"]),
    "masks": ("mlm", ["--mask-probability", "2"], ["--mask-probability is 2.0"]),
    "masks of a GPT": ("lm", ["--mask-probability", "0.1"], ["No such option"]),
    "share": ("lm", ["--dev-share", "1"], ["--dev-share is 1.0"]),
    "dtype": ("lm", ["--dtype", "foo"], ["--dtype 'foo'", "bfloat16"]),
}


@pytest.mark.parametrize("what", WRONG_TRAINING)
@pytest.mark.parametrize("tp", [1, 2])
def test_wrong_options_of_a_training_are_one_sentence(run, bert, tmp_path, what, tp):
    """With `--tp 2` found before any rank is started."""
    command, options, parts = WRONG_TRAINING[what]
    start = ["--ckpt", bert, "--output-dir", tmp_path / "out", "--data", tmp_path / "none"]
    assert_one_sentence(run(command, *start, *options, "--tp", tp), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [[], ["--ckpt", "a", "--init", "bert-tiny"]])
def test_a_model_comes_from_a_checkpoint_or_is_new(run, tmp_path, given):
    ended = run("mlm", "--data", "text", "--output-dir", tmp_path / "out", *given)
    assert_one_sentence(ended, "either --ckpt", "or --init")


# --- What a training shows meanwhile ------------------------------------------------------------


class Terminal(io.StringIO):
    """A stderr that people look at."""

    def isatty(self) -> bool:
        return True


class OneRank:
    """What `TrainingBars` needs of a run."""

    is_main = True

    def log(self, text: str) -> None:
        print(text, file=sys.stderr)


def progress(step: int) -> TrainingProgress:
    return TrainingProgress(step, 3, 1, 1, 1.5, 0.25, 1e-4, 40.0, 65.0)


def test_lines_stand_above_the_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with closing(TrainingBars(OneRank())) as bars:  # type: ignore[arg-type]
        bars.log("seed 1")
        for step in (1, 2, 3):
            bars.on_step(progress(step))
            bars.log(f"after step {step}")
        for done in (1, 2):
            bars.on_evaluation("dev-high", done, 2)
        bars.log("metrics of seed 1")
        bars.on_step(progress(1))  # the next seed's
        bars.on_evaluation("dev-high", 1, 2)
    shown = [piece.strip() for piece in re.split(r"[\r\n]|\x1b\[A", terminal.getvalue())]
    said = ["seed 1", *(f"after step {step}" for step in (1, 2, 3)), "metrics of seed 1"]
    assert [piece for piece in shown if piece in said] == said  # lines of their own
    assert any(re.fullmatch(r"evaluating dev-high: +\d+%.* \d/2 .*", piece) for piece in shown)
    bars_of_steps = [piece for piece in shown if piece.startswith("training: ")]
    assert "01:05 left, loss 1.5000, accuracy 25.0 %, 40.0 samples/s" in bars_of_steps[-1]
    assert " 1/3 " in bars_of_steps[-1]  # of a bar of its own
    ended = next(piece for piece in reversed(bars_of_steps) if " 3/3 " in piece)
    assert ended.startswith("training: 100%")


def test_there_are_no_bars_off_a_terminal(capsys):
    with closing(TrainingBars(OneRank())) as bars:  # type: ignore[arg-type]
        bars.log("seed 1")
        bars.on_step(progress(1))
        bars.on_evaluation("dev-high", 1, 2)
    assert capsys.readouterr().err == "seed 1\n"


# --- Results ------------------------------------------------------------------------------------

PARTS = ("task", "protocol", "metrics", "counts", "settings", "checkpoint", "timing")
RECORD = {*PARTS, "versions", "run"}
SETTINGS = {"vocab", "dtype", "tp", "dp", "limit", "data", "seed", "tokenizer", "batch_tokens"}
TIMING = {"load_seconds", "eval_seconds", "tokens_per_second", "model_tflops"}


def assert_common(record: dict[str, Any], task: str) -> None:
    assert set(record) == RECORD and record["task"] == task
    assert record["protocol"] == "megatron-paper"
    assert SETTINGS <= set(record["settings"])
    assert {"path", "sha256"} <= set(record["settings"]["data"])
    assert {"path", "digest", "format", "num_parameters"} <= set(record["checkpoint"])
    assert set(record["timing"]) == TIMING
    assert {"mlm_eval", "torch"} <= set(record["versions"])


def test_the_wikitext_record(run, wiki, folder, tmp_path):
    ended = run(*wiki, "--stride", 8, "--output", tmp_path / "new" / "w.json", "--seed", 5)
    record = read(tmp_path / "new" / "w.json")
    assert ended.code == 0
    assert_common(record, "wikitext103")
    metrics = {"adjusted_ppl", "ppl", "avg_loss", "nll_sum", "token_ratio", "clamped_at_20"}
    assert set(record["metrics"]) == metrics
    counts = {"original_tokens", "tokenized_tokens", "scored_tokens", "windows", "total_windows"}
    assert set(record["counts"]) == counts
    settings = record["settings"]
    assert (settings["seq_length"], settings["stride"], settings["seed"]) == (32, 8, 5)
    assert (settings["vocab"], settings["dtype"], settings["limit"]) == ("padded", "float32", None)
    assert (settings["tp"], settings["dp"]) == (1, 1)
    assert record["counts"]["original_tokens"] == len(TEXT.strip().split(" "))
    assert record["counts"]["scored_tokens"] == record["counts"]["tokenized_tokens"] - 1
    assert record["checkpoint"]["path"].startswith(str(folder / "gpt"))
    assert f"{record['metrics']['adjusted_ppl']:.4f}" in ended.out
    assert "validation results on WIKITEXT103 | avg loss: " in ended.out
    assert "work ahead: " in ended.err and "tokens through the model" in ended.err
    assert "is another text" in ended.err and "is another text" not in ended.out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["w.json"]


def test_the_lambada_record(run, cloze, tmp_path):
    ended = run(*cloze, "--output", tmp_path / "l.json")
    record = read(tmp_path / "l.json")
    assert ended.code == 0
    assert_common(record, "lambada")
    metrics = {"accuracy", "accuracy_stderr", "num_correct", "target_ppl", "nll_sum"}
    assert set(record["metrics"]) == metrics
    assert record["counts"] == {"examples": 4, "target_tokens": 4 + 6 + 3 + 4, "truncated": 0}
    assert record["settings"]["target"] == "word"
    assert "validation results on LAMBADA | number correct: " in ended.out
    last = run(*cloze, "--output", tmp_path / "last.json", "--target", "last-token")
    record = read(tmp_path / "last.json")
    assert last.code == 0 and record["counts"]["target_tokens"] == 4
    assert record["protocol"] == "megatron-last-token"


def test_a_limited_run_says_so_loudly(run, wiki, cloze, folder, tmp_path):
    for arguments in (wiki, cloze):
        output = tmp_path / f"{arguments[0]}.json"
        ended = run(*arguments, "--limit", 2, "--output", output)
        record = read(output)
        assert record["settings"]["limit"] == 2
        assert any(w.startswith("limit 2: only") for w in record["settings"]["warnings"])
        assert "LIMITED RUN" in ended.out.splitlines()[0]
        assert "warning: limit 2: only" in ended.err
        assert record["counts"].get("windows", record["counts"].get("examples")) == 2
    ended = run(
        *("score", "--ckpt", folder / "gpt", "--input", folder / "lines.jsonl"),
        *("--output", tmp_path / "out.jsonl", "--limit", 1),
    )
    assert "LIMITED to the first 1" in ended.out
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_full_digest_and_true_vocabulary_are_recorded(run, wiki, tmp_path):
    output = tmp_path / "out.json"
    ended = run(*wiki, "--limit", 1, "--full-digest", "--vocab", "true", "--output", output)
    record = read(output)
    assert ended.code == 0 and record["checkpoint"]["full_digest"].startswith("sha256:")
    assert record["settings"]["vocab"] == "true" and record["settings"]["vocab_size"] == 256


def test_options_from_a_file(run, wiki, tmp_path):
    lines = ["stride = 8", "batch-tokens = 64", "seq_length = 16", 'set = ["hidden_dropout=0.2"]']
    lines += ["limit = 3", "resume = false", f'output = "{tmp_path}/out.json"', "tp = 1"]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    ended = run(*wiki, "--config", tmp_path / "run.toml", "--limit", 2)
    settings = read(tmp_path / "out.json")["settings"]
    assert ended.code == 0
    assert (settings["stride"], settings["seq_length"], settings["batch_tokens"]) == (8, 16, 64)
    assert settings["limit"] == 2  # the line wins
    assert read(tmp_path / "out.json")["checkpoint"]["config"]["hidden_dropout"] == 0.2


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("watch = true", {"watch": "forever"}),
        ("watch = false", {}),
        ("watch = 3", {"watch": 3}),
        ("vocab = true", {"vocab": "true"}),
        ('vocab = "true"', {"vocab": "true"}),
        ("batch-tokens = 1e3\nlimit = 2.0", {"batch_tokens": 1000, "limit": 2}),
        ("log = 3", {"log": [3]}),
        ("overwrite = false", {"overwrite": False}),
    ],
)
def test_a_file_takes_what_the_line_takes(text, taken, tmp_path):
    (tmp_path / "run.toml").write_text(text)
    context = typer.Context(full_command("lambada"))
    load_config(context, tmp_path / "run.toml")
    assert context.default_map == taken
    assert all(type(context.default_map[name]) is type(taken[name]) for name in taken)


@pytest.mark.parametrize("text", ["vocab = false", "tp = true", "output = true", "stride = 1.5"])
def test_a_file_takes_no_other_truth(text, tmp_path):
    (tmp_path / "run.toml").write_text(text)
    command = "score" if text.startswith("stride") else "lambada"
    with pytest.raises(InputError, match=r"run\.toml sets \w+ to .*; expected a "):
        load_config(typer.Context(full_command(command)), tmp_path / "run.toml")


def test_a_file_may_say_that_a_series_is_watched(run, wiki, tmp_path):
    (tmp_path / "run.toml").write_text("watch = true\n")
    ended = run(*wiki, "--config", tmp_path / "run.toml", "--output", "-")
    assert_one_sentence(ended, "--output - is one stream, and a series")


def test_inspect_shows_the_contracts_fields(run, folder):
    ended = run("inspect", "--ckpt", folder / "gpt", "--json")
    record = json.loads(ended.out)
    assert ended.code == 0 and ended.err == ""
    assert record["format"] == "megatron-torch" and record["checkpoint_version"] == 3.0
    assert (record["tensor_parallel"], record["pipeline_parallel"]) == (2, 1)
    assert record["config"]["num_attention_heads"] == 4
    assert record["num_parameters"] == open_checkpoint(folder / "gpt").num_parameters
    assert {"iteration", "digest", "pickle_classes", "warnings"} <= set(record)
    assert record["config_sources"]["num_attention_heads"].startswith("args.")
    table = run("inspect", "--ckpt", folder / "gpt").out
    assert "megatron-torch" in table and "args.num_attention_heads" in table
    assert f"{record['num_parameters']:,}" in table and record["digest"] in table
    full = json.loads(run("inspect", "--ckpt", folder / "gpt", "--json", "--full-digest").out)
    assert full["digest"].startswith("sha256:") and full["digest"] != record["digest"]


def test_score_writes_a_record_a_line(run, folder, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = ["score", "--ckpt", folder / "gpt", "--input", folder / "lines.jsonl"]
    ended = run(*arguments, "--output", output)
    first, second = (json.loads(line) for line in output.read_text().splitlines())
    assert ended.code == 0 and "2 line(s) scored" in ended.out
    assert first["tokens"] == [1, 2, 3] and first["logprobs"][0] is None
    words = load_tokenizer(directory=folder / "gpt" / "tokenizer")
    assert second["tokens"] == words.encode("abc") and len(second["greedy"]) == 3
    output = tmp_path / "bert.jsonl"
    assert run(*on(BERT_ORACLE, arguments), "--output", output, "--limit", 1).code == 0
    record = json.loads(output.read_text())
    assert None not in record["logprobs"] and len(record["binary_logits"]) == 2
