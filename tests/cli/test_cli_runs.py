"""The command line on ranks, interrupted and resumed; Megatron's own figures, and the real data."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_models
from support.command_line import (
    CONFIG,
    TEXT,
    Ended,
    as_user,
    assert_one_sentence,
    on,
    read,
    started,
)
from support.paths import PROJECT
from support.ranks import TORCHRUN, run_ranks

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import load_tokenizer
from mlm_eval.engine import score
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.resume import PartialScores
from mlm_eval.ranks import launch
from mlm_eval.tasks.evaluation import evaluate
from mlm_eval.tasks.zero_shot import benchmarks

pytest_plugins = ["support.command_line_fixtures"]


def after_a_warning(ended: Ended) -> Ended:
    """Return how a command ended, without what it said of the data before it scored them."""
    warning, lines = "warning: ", ended.err.splitlines()
    assert any(line.startswith(warning) for line in lines), ended.err
    others = [line for line in lines if not line.startswith(warning)]
    return dataclasses.replace(ended, err="\n".join(others))


# --- Lack of memory -----------------------------------------------------------------------------


def out_of_memory(*given: Any, **options: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore lines")


def test_lack_of_memory_names_the_batch_that_did_not_fit(run, wiki, monkeypatch):
    monkeypatch.setattr(Engine, "score", out_of_memory)
    for given, now in (((), "4,096"), (("--batch-tokens", 64), "64")):
        ended = run(*wiki, *given)
        told = f"Tried to allocate 9 GiB); lower --batch-tokens (now {now}), or raise --tp (now 1)"
        assert_one_sentence(after_a_warning(ended), "the run does not fit the memory", told)


def test_lack_of_memory_in_training_names_what_would_help(monkeypatch):
    from mlm_eval.cli.run import ModelRun, Placement
    from mlm_eval.options import RunOptions
    from mlm_eval.training.settings import TrainSettings

    run = ModelRun.__new__(ModelRun)
    run.options = RunOptions(ckpt="none")
    place = Placement(2, 1, "cuda", torch.float32)
    settings = TrainSettings(lr=1e-4, global_batch=8, epochs=1, micro_batch=4, recompute=True)
    told = (
        r"\(now 4\) or --batch-tokens \(now 32,768\), or use --dp-mode fsdp2, or raise --tp \(now 2"
    )
    with pytest.raises(InputError, match=told):
        with run.advising_on_training_memory(place, settings):
            out_of_memory()
    with pytest.raises(KeyError):
        with run.advising_on_training_memory(place, settings):
            raise KeyError("another fault")


# --- Ranks, interruption, resume ----------------------------------------------------------------


def same_figures(record: dict[str, Any], expected: dict[str, Any]) -> bool:
    figures = {name: pytest.approx(x, rel=1e-6) for name, x in expected["metrics"].items()}
    return bool(record["counts"] == expected["counts"] and record["metrics"] == figures)


def test_an_interrupted_run_keeps_its_scores_and_goes_on(run, wiki, tmp_path, monkeypatch):
    output, batch = tmp_path / "out.json", ["--batch-tokens", 64, "--stride", 4]
    assert run(*wiki, *batch, "--output", output).code == 0
    expected = read(output)
    output.unlink()

    score_batch, calls = score.score_batch, itertools.count()

    def interrupted(*given: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return score_batch(*given)

    monkeypatch.setattr(score, "score_batch", interrupted)
    ended = run(*wiki, *batch, "--output", output)
    assert ended.code == 130 and ended.out == "" and "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("mlm-eval: interrupted")
    assert not output.exists() and (tmp_path / "out.json.partial").is_dir()

    # Two ranks go on where one has stopped; other settings may not.
    monkeypatch.setattr(score, "score_batch", score_batch)
    other = run(*wiki, "--stride", 5, "--output", output)
    said = ("out.json.partial holds scores", "stride 4, now 5", "--restart")
    assert_one_sentence(after_a_warning(other), *said)
    ended = as_user(*wiki, *batch, "--output", output, "--tp", 2)
    assert ended.code == 0, ended.err
    assert re.search(r"^resumes at \d+ %: 10 of \d+ are done", ended.err, re.MULTILINE)
    record = read(output)
    assert same_figures(record, expected) and record["settings"]["tp"] == 2
    assert not (tmp_path / "out.json.partial").exists()


def test_scores_that_something_else_decided_are_not_taken(run, wiki, folder, tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    write_megatron_torch(random_models.checkpoint(CONFIG, seed=1), tmp_path / "other", tp=2)
    words = random_models.byte_vocabulary(tmp_path / "words")
    (words / "merges.txt").write_text("#version: 0.3\n")
    (tmp_path / "text").write_text(TEXT.replace("word7", "word8"))
    wiki += ["--tokenizer", folder / "gpt" / "tokenizer", "--output", output]

    def stop(partial: PartialScores, *given: Any) -> None:
        add(partial, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        add = PartialScores.add
        patched.setattr(PartialScores, "add", stop)
        assert run(*wiki, "--batch-tokens", 64).code == 130
    for change, named in (
        (["--ckpt", tmp_path / "other"], "another checkpoint"),
        (["--data", tmp_path / "text"], "other data"),
        (["--tokenizer", words], "another tokenizer"),
        (["--stride", 16], "stride 32, now 16"),
        (["--seq-length", 31, "--stride", 31], "seq_length 32, now 31"),
        (["--dtype", "bfloat16"], "dtype float32, now bfloat16"),
        (["--vocab", "true"], "vocab padded, now true"),
        (["--set", "activation=squared_relu"], "activation gelu, now squared_relu"),
    ):
        line = on(change[1], wiki) if change[0] == "--ckpt" else [*wiki, *change]
        ended = run(*line)
        assert_one_sentence(after_a_warning(ended), "out.json.partial holds scores", named)
    # What decides no score may differ, and --resume changes nothing.
    ended = run(*wiki, "--resume", "--batch-tokens", 99, "--limit", 1, "--seed", 9)
    assert ended.code == 0 and "resumes at 100 %: 1 of 1 are done" in ended.err


def test_ctrl_c_ends_all_ranks_with_one_sentence(wiki, folder):
    (folder / "long.tokens").write_text("so many words " * 20_000)
    process = started(*wiki, "--data", folder / "long.tokens", "--stride", 1, "--tp", 2)
    try:
        assert process.stderr is not None
        lines: Iterator[str] = iter(process.stderr.readline, "")
        assert any(line.startswith("work ahead: ") for line in lines)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and out == ""
    assert err.splitlines()[-1].startswith("mlm-eval: interrupted") and "Traceback" not in err


def test_wrong_input_found_on_the_ranks_is_one_sentence(wiki, folder, tmp_path):
    """Damaged scores of an earlier run: rank 0 finds them, and all ranks end."""
    (tmp_path / "out.json.partial").mkdir()
    (tmp_path / "out.json.partial" / "1-0.safetensors").write_bytes(b"x")
    ended = as_user(*wiki, "--output", tmp_path / "out.json", "--dp", 2)
    warnings = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
    assert_one_sentence(
        dataclasses.replace(ended, err="\n".join(warnings)), "1-0.safetensors is damaged"
    )


def test_under_torchrun_the_running_ranks_are_used(wiki, tmp_path):
    torchrun = ("-m", "torch.distributed.run", *TORCHRUN, "-m", "mlm_eval")
    options = ["--tp", "2", "--limit", "3", "--output", tmp_path / "out.json"]
    ended = as_user(*wiki, *options, command=torchrun)
    assert ended.code == 0, ended.err
    assert ended.out.count("adjusted perplexity") == 1  # rank 0 alone prints
    assert read(tmp_path / "out.json")["settings"]["tp"] == 2


def test_the_parent_hands_on_the_exit_code_of_the_ranks(run, wiki, monkeypatch):
    seen: list[list[str]] = []

    def ranks(argv: list[str], *, ranks: int, device: str) -> launch.LaunchResult:
        seen.append([*argv, str(ranks), device])
        return launch.LaunchResult(2, "rank 1 found wrong.pt")

    monkeypatch.setattr("mlm_eval.cli.run.launch", ranks)
    ended = run(*wiki, "--tp", 2, "--dp", 3)
    assert_one_sentence(ended, "mlm-eval: rank 1 found wrong.pt")
    assert seen[0][-8:] == ["--tp", "2", "--dp", "3", "--device", "cpu", "6", "cpu"]


def test_a_fault_of_a_rank_is_told_below_its_traceback(run, wiki, monkeypatch):
    message = "rank 1 failed:\nTraceback (most recent call last):\n  ...\nKeyError: 'layers.0'\n"
    result = launch.LaunchResult(1, message)
    monkeypatch.setattr("mlm_eval.cli.run.launch", lambda *_, **__: result)
    ended = run(*wiki, "--tp", 2)
    assert ended.code == 1
    assert ended.err.splitlines() == [
        *message.splitlines()[1:],
        "mlm-eval: rank 1 failed; please report it with the lines above",
    ]


# --- Training -----------------------------------------------------------------------------------

SAMPLES = PROJECT / "checkpoints" / "samples" / "race"
SHORT = ("--global-batch", 8, "--max-steps", 4, "--attention-dropout", 0, "--device", "cpu")


@pytest.fixture
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(text: str) -> dict[str, str]:
    """Return the rows of a printed result by their names."""
    parts = (line.strip().partition("  ") for line in text.splitlines()[1:])
    return {name: value.strip() for name, _, value in parts}


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("tp", [1, 2])
def test_a_fine_tuning_says_everything_once(run, bert, tmp_path, tp):
    runner = run if tp == 1 else as_user
    limits = ("--train-limit", 24, "--dev-limit", 5, "--evaluate-every", 2, "--tp", tp)
    line = ("race", "--ckpt", bert, "--data", SAMPLES, "--output-dir", tmp_path / "out", *SHORT)
    ended = runner(*line, *limits)
    assert ended.code == 0, ended.err
    lines = ended.err.splitlines()
    warnings = [text for text in lines if text.startswith("warning: ")]
    for text, name in zip(warnings, ("train", "dev-middle", "dev-high"), strict=False):
        assert re.match(rf"warning: limited: only the first \d+ of \d+ examples of {name} ", text)
    assert len(warnings) == 4 and "rows are cut at 128" in warnings[3]
    # Evaluated twice: three sets, and the training before them.
    assert sum(text.startswith(" > |seed 1234, epoch 1, step 2 of 4| ") for text in lines) == 4
    assert sum(text.startswith(" > |seed 1234, epoch 2, step 4 of 4| ") for text in lines) == 4
    assert len(lines) == 1 + len(warnings) + 8

    assert ended.out.splitlines()[0] == (
        "RACE  *** LIMITED RUN: not the figures of the whole data ***"
    )
    shown, record = rows(ended.out), read(tmp_path / "out" / "result.json")
    sets = ["dev-middle", "dev-high", "dev", "test-middle", "test-high", "test"]
    assert list(shown)[:6] == sets
    for name in sets:
        entry = record["metrics"][name]
        share = f"{100 * entry['accuracy']:.2f} %"
        assert shown[name] == f"{share} ({entry['correct']} of {entry['total']})"
    plan = "race-megatron-336m, 4 steps, batch 8, learning rate 2e-05, rows of 128 tokens"
    assert shown["recipe"] == plan and f"({plan})" in lines[0]
    assert shown["run"] == f"float32, tp {tp} x dp 1"
    assert shown["written to"] == str(tmp_path / "out")
    best = record["metrics"]["seeds"]["1234"]["best"]
    expected = f"dev {100 * best['score']:.2f} % after step 2, epoch 1"
    assert shown.get("checkpoint-best") == (expected if best["step"] == 2 else None)


@pytest.mark.long
@pytest.mark.usefixtures("_own_cache")
def test_seeds_are_shown_one_by_one(run, bert, tmp_path):
    line = ("race", "--ckpt", bert, "--data", SAMPLES, "--output-dir", tmp_path / "out", *SHORT)
    ended = run(*line, "--seeds", "1,2,3", "--dev", SAMPLES / "dev" / "middle", "--max-steps", 1)
    assert ended.code == 0, ended.err
    shown, metrics = rows(ended.out), read(tmp_path / "out" / "result.json")["metrics"]
    median = metrics["median"]
    accuracy = f"{100 * median['dev-middle']['accuracy']:.2f} %"
    assert shown["dev-middle"] == f"{accuracy}   median of 3 seeds"
    assert "dev" not in shown  # the same figures
    test = median["test"]
    assert shown["test"].startswith(f"{100 * test['accuracy']:.2f} % ({test['correct']} of 24)")
    assert shown["test"].endswith(f"of seed {median['seed']}, chosen by the median on dev")
    for seed in (1, 2, 3):
        entry = metrics["seeds"][str(seed)]
        assert shown[f"seed {seed}"].startswith(f"dev {100 * entry['dev']['accuracy']:.2f} %")
        assert "; test " in shown[f"seed {seed}"]


def write_squad(path: Path) -> Path:
    context = "The cat sat on the mat. The dog was red."
    words = ("cat", "dog", "mat", "red") * 3
    questions = [
        {
            "id": str(number),
            "question": f"Who is {word}?",
            "answers": [{"text": word, "answer_start": context.index(word)}],
        }
        for number, word in enumerate(words)
    ]
    data = [{"paragraphs": [{"context": context, "qas": questions}]}]
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    return path


@pytest.mark.long
@pytest.mark.long
@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("name", ["dev-v1.1.json", "odd.json"])
def test_one_dev_file_of_squad_has_one_line(run, bert, tmp_path, name):
    train, dev = write_squad(tmp_path / "train-v1.1.json"), write_squad(tmp_path / name)
    line = ("squad", "--ckpt", bert, "--train", train, "--dev", dev, "--seq-length", 80)
    ended = run(*line, "--output-dir", tmp_path / "out", *SHORT, "--evaluate-every", 4)
    assert ended.code == 0, ended.err
    metrics = read(tmp_path / "out" / "result.json")["metrics"]
    figures = metrics["dev"]
    assert metrics.items() >= {"exact": figures["exact"], "f1": figures["f1"]}.items()
    kept, left_out = ("dev-odd", "dev") if name == "odd.json" else ("dev", "dev-v1.1")
    assert metrics[kept] == figures
    shown = rows(ended.out)
    assert ended.out.splitlines()[0] == "SQuAD 1.1"
    assert shown[kept] == f"exact {figures['exact']:.2f} %, F1 {figures['f1']:.2f} % of 12"
    assert not shown.keys() & {left_out, "exact", "f1", "median", "seeds"}
    assert [text for text in ended.err.splitlines() if " metrics for " in text] == [
        next(text for text in ended.err.splitlines() if f" metrics for {kept}: " in text)
    ]


@pytest.mark.long
@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("command", ["mlm", "lm"])
def test_a_language_model_from_text_to_its_figures(run, bert, folder, tmp_path, command):
    (tmp_path / "text").write_text("\n\n".join(["The cat sat. The dog was red."] * 60))
    model = {"mlm": bert, "lm": folder / "gpt"}[command]
    line = (command, "--ckpt", model, "--data", tmp_path / "text", "--output-dir", tmp_path / "o")
    ended = run(
        *line, *SHORT, "--evaluate-every", 2, "--seq-length", 16, "--output", tmp_path / "r"
    )
    assert ended.code == 0, ended.err
    record = read(tmp_path / "o" / "result.json")
    assert read(tmp_path / "r") == record
    metrics, shown = record["metrics"], rows(ended.out)
    plan = "4 steps, batch 8, learning rate 0.0001, rows of 16 tokens"
    assert ended.err.startswith("work ahead: to train on ") and f"({plan})" in ended.err
    places = [line[: line.index("| ", 4)] for line in ended.err.splitlines()[1:]]
    assert [place.split(", ")[1] for place in places] == ["step 2 of 4"] * 2 + ["step 4 of 4"] * 2
    assert f"metrics for dev: loss = {metrics['loss']:.4f}, " in ended.err.splitlines()[-1]
    assert shown["dev loss"].startswith(f"{metrics['loss']:.4f}   nats, over ")
    assert shown["perplexity"].startswith(f"{metrics['perplexity']:.4f}   per ")
    assert shown["accuracy"].startswith(f"{100 * metrics['accuracy']:.2f} %")
    assert shown["training"] == plan
    assert ("order" in shown) == (command == "mlm")
    again = run(*line, *SHORT)
    assert_one_sentence(again, "holds a finished run", "--overwrite")


# --- Megatron's own figures, and the real data --------------------------------------------------

# oracles/README.md, last section: printed by Megatron v2.5's tasks for v25_gpt2vocab_tp2_trained.
MEGATRON_WIKITEXT = (
    " validation results on WIKITEXT103 | avg loss: 7.6933E+00 | ppl: 2.1936E+03 | "
    "adjusted ppl: 3.9148E+03 | token ratio: 1.075293227393114 |"
)
MEGATRON_LAMBADA = (
    " validation results on LAMBADA | number correct: 5.4000E+01 | "
    "total examples: 1.2000E+02 | avg accuracy: 4.5000E-01"
)


def zero_shot(oracles: Path, shared_data: Path, task: str) -> list[object]:
    data = {"wikitext103": "wiki_small.test.tokens", "lambada": "lambada_small.jsonl"}[task]
    ckpt, words = oracles / "v25_gpt2vocab_tp2_trained", shared_data / "gpt2"
    return [task, "--ckpt", ckpt, "--tokenizer", words, "--data", oracles / "zeroshot" / data]


@pytest.mark.realdata
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 2)])
def test_the_command_line_prints_what_megatron_printed(run, oracles, shared_data, tp, dp):
    runner = run if tp * dp == 1 else as_user
    for task, printed in [("wikitext103", MEGATRON_WIKITEXT), ("lambada", MEGATRON_LAMBADA)]:
        ended = runner(*zero_shot(oracles, shared_data, task), "--tp", tp, "--dp", dp)
        assert ended.code == 0, ended.err
        assert printed in ended.out.splitlines()
        if task == "wikitext103":
            assert "(8,527 - 1) / (7,930 - 1)" in ended.out


def line_on_a_rank(oracles: Path, shared_data: Path, task: str, tp: int, dp: int) -> str:
    _, _, ckpt, _, words, _, data = zero_shot(oracles, shared_data, task)
    engine = Engine.load(open_checkpoint(str(ckpt)), tp=tp, dp=dp)
    tokenizer = load_tokenizer(directory=str(words))
    result = evaluate(task, engine, data=str(data), tokenizer=tokenizer)
    line = benchmarks()[task].megatron_line(result)
    assert line is not None
    return line


@pytest.mark.realdata
@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2)])
def test_every_rank_has_what_megatron_printed(oracles, shared_data, tp, dp):
    for task, printed in [("wikitext103", MEGATRON_WIKITEXT), ("lambada", MEGATRON_LAMBADA)]:
        lines = run_ranks(tp * dp, line_on_a_rank, oracles, shared_data, task, tp, dp)
        assert lines == [printed] * (tp * dp)


@pytest.fixture(scope="session")
def gpt2_vocabulary_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small random model with GPT-2's positions and padded vocabulary."""
    config = random_models.config(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=32,
        vocab_size=50304,
        max_position_embeddings=1024,
    )
    path = tmp_path_factory.mktemp("gpt2") / "ckpt"
    return write_megatron_torch(random_models.checkpoint(config), path)


@pytest.mark.realdata
def test_counts_of_the_real_wikitext_103(run, gpt2_vocabulary_model, shared_data, tmp_path):
    ended = run(
        *("wikitext103", "--ckpt", gpt2_vocabulary_model, "--tokenizer", shared_data / "gpt2"),
        *("--data", shared_data / "wikitext-103" / "wiki.test.tokens", "--limit", 4),
        *("--output", tmp_path / "out.json"),
    )
    assert ended.code == 0
    record = read(tmp_path / "out.json")
    counts = record["counts"]
    assert (counts["original_tokens"], counts["tokenized_tokens"]) == (245_566, 270_330)
    assert (counts["windows"], counts["total_windows"]) == (4, 8_417)
    assert f"{record['metrics']['token_ratio']:.10f}" == "1.1008449901"
    assert counts["scored_tokens"] == 1024 + 3 * 32
    assert record["settings"]["data"]["paper_file"] and record["settings"]["data"]["warnings"] == []
    assert "work ahead: 4 windows, 4,096 tokens" in ended.err


@pytest.mark.realdata
def test_all_examples_of_the_real_lambada(run, gpt2_vocabulary_model, shared_data, tmp_path):
    ended = run(
        *("lambada", "--ckpt", gpt2_vocabulary_model, "--tokenizer", shared_data / "gpt2"),
        *("--data", shared_data / "lambada" / "lambada_test.jsonl"),
        *("--output", tmp_path / "out.json"),
    )
    assert ended.code == 0 and "LIMITED" not in ended.out
    record = read(tmp_path / "out.json")
    tokens = 4_013 + 2 * 913 + 3 * 208 + 4 * 16 + 5 * 3
    assert record["counts"] == {"examples": 5_153, "target_tokens": tokens, "truncated": 0}
    assert record["settings"]["data"]["paper_file"] and record["settings"]["warnings"] == []
    assert 0 <= record["metrics"]["accuracy"] < 0.1
