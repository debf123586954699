"""The command line on ranks, interrupted and resumed; Megatron's own figures, and the real data."""

from __future__ import annotations

import dataclasses
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import random_models
from command_line import CONFIG, TEXT, as_user, assert_one_sentence, read, started
from ranks import run_ranks

from mlm_eval import launch
from mlm_eval.checkpoints.checkpoint import open_checkpoint
from mlm_eval.checkpoints.megatron_writer import write_megatron_torch
from mlm_eval.engine import Engine
from mlm_eval.resume import PartialScores
from mlm_eval.tasks import evaluate
from mlm_eval.tokenizer import load_tokenizer

pytest_plugins = ["command_line_fixtures"]


# --- Ranks, interruption, resume ----------------------------------------------------------------


def same_figures(record: dict[str, Any], expected: dict[str, Any]) -> bool:
    figures = {name: pytest.approx(x, rel=1e-6) for name, x in expected["metrics"].items()}
    return bool(record["counts"] == expected["counts"] and record["metrics"] == figures)


def test_an_interrupted_run_keeps_its_scores_and_goes_on(run, wiki, tmp_path, monkeypatch):
    output, batch = tmp_path / "out.json", ["--batch-tokens", 64, "--stride", 4]
    assert run(*wiki, *batch, "--output", output).code == 0
    expected = read(output)
    output.unlink()

    score_batch, calls = Engine._score_batch, itertools.count()

    def interrupted(engine: Engine, given: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return score_batch(engine, given)

    monkeypatch.setattr(Engine, "_score_batch", interrupted)
    ended = run(*wiki, *batch, "--output", output)
    assert ended.code == 130 and ended.out == "" and "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("mlm-eval: interrupted")
    assert not output.exists() and (tmp_path / "out.json.partial").is_dir()

    # Two ranks go on where one has stopped; other settings may not.
    monkeypatch.setattr(Engine, "_score_batch", score_batch)
    other = run(*wiki, "--stride", 5, "--output", output, "--resume")
    assert_one_sentence(other, "out.json.partial holds scores of another checkpoint")
    ended = as_user(*wiki, *batch, "--output", output, "--resume", "--tp", 2)
    assert ended.code == 0, ended.err
    assert "resuming: 10 of" in ended.err
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
    for change in (
        ["--ckpt", tmp_path / "other"],
        ["--data", tmp_path / "text"],
        ["--tokenizer", words],
        ["--stride", 16],
        ["--seq-length", 31, "--stride", 31],
        ["--dtype", "bfloat16"],
        ["--vocab", "true"],
        ["--set", "activation=squared_relu"],
    ):
        ended = run(*wiki, *change, "--resume")
        assert_one_sentence(ended, "out.json.partial holds scores of another checkpoint")
    # What decides no score may differ.
    ended = run(*wiki, "--resume", "--batch-tokens", 99, "--limit", 1, "--seed", 9)
    assert ended.code == 0 and "resuming: 1 of 1 are done" in ended.err


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
    ended = as_user(*wiki, "--output", tmp_path / "out.json", "--resume", "--dp", 2)
    warnings = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
    assert_one_sentence(
        dataclasses.replace(ended, err="\n".join(warnings)), "1-0.safetensors is damaged"
    )


def test_under_torchrun_the_running_ranks_are_used(wiki, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mlm_eval")
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
    from importlib import import_module

    _, _, ckpt, _, words, _, data = zero_shot(oracles, shared_data, task)
    engine = Engine.load(open_checkpoint(str(ckpt)), tp=tp, dp=dp)
    tokenizer = load_tokenizer(directory=str(words))
    result = evaluate(task, engine, data=str(data), tokenizer=tokenizer)
    line: str = import_module(f"mlm_eval.tasks.{task}").megatron_line(result)
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
