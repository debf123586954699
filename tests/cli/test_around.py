"""What stands around a run: names, help, the samples by name, lines of progress in a log."""

from __future__ import annotations

import json
import logging
import threading
import warnings
from typing import Any

import pytest
from support.command_line import assert_one_sentence
from support.paths import SAMPLES

import mlm_eval
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli import screen
from mlm_eval.cli.app import commands, full_command
from mlm_eval.cli.screen import heartbeat, progress
from mlm_eval.cli.training import matching
from mlm_eval.engine import verify
from mlm_eval.reporting.text import inspect_text

pytest_plugins = ["support.command_line_fixtures"]


def test_every_list_has_what_the_commands_take(run):
    text = run("ls").out
    for kind in ("tasks", "recipes", "sizes", "samples", "catalog"):
        names = run("ls", kind).out.split()
        assert names and f"{kind}: {', '.join(names)}" in text
    assert set(run("ls", "tasks").out.split()) <= set(commands())
    for size in run("ls", "sizes").out.split()[-2:]:
        assert run("plan", "--model", size, "--device-memory", "80GB").code == 0
    assert_one_sentence(run("ls", "recipe"), "ls 'recipe' is unknown; use tasks, recipes")


def test_samples_are_opened_by_name(run):
    for name in run("ls", "samples").out.split():
        assert run("inspect", "--ckpt", name).code == 0
    data = SAMPLES / "text" / "lambada.sample.jsonl"
    arguments = ("--data", data, "--limit", 1, "--device", "cpu", "--tp", 1)
    assert run("lambada", "--ckpt", "sample:gpt", *arguments).code == 0
    line = ("generate", "--ckpt", SAMPLES / "moe", "--tokenizer", "sample:moe", "--device", "cpu")
    ended = run(*line, "--prompt", "An", "--max-new-tokens", 2)
    assert ended.code == 0 and ended.out.startswith("An")
    wrong = run(*line[:4], "sample:none", "--prompt", "An")
    assert_one_sentence(wrong, "no sample 'none'; the package holds sample:bert, sample:gpt")
    assert_one_sentence(
        run("inspect", "--ckpt", "sample:none"), "no sample 'none'", "sample:bert, sample:gpt"
    )


@pytest.mark.parametrize("command", [(), *((name,) for name in commands())], ids=str)
def test_h_is_help(run, command):
    short = run(*command, "-h")
    assert short.code == 0 and short.out == run(*command, "--help").out and "Usage" in short.out


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    tell = heartbeat("scoring")
    tell(200, 1000)  # kept from an earlier run
    for seconds in range(10, 90, 10):
        now[0] = 100.0 + seconds
        tell(200 + 5 * seconds, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 35 %, 0:02:10 left",
        "scoring: 50 %, 0:01:40 left",
    ]


def test_progress_is_a_bar_on_terminals_only(monkeypatch, capsys):
    with progress(False) as callback:
        assert callback is None
    with progress(True) as callback:
        callback(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress(True) as callback:
        callback(1, 2)
    assert "50%" in capsys.readouterr().err


# --- What is said meanwhile ---------------------------------------------------------------------


def test_a_phase_is_named_where_it_takes_time(capsys, monkeypatch):
    monkeypatch.setattr(screen, "PATIENCE_SECONDS", 600)
    with screen.phase("reading"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(screen, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(screen, "HEARTBEAT_SECONDS", 1e-3)
    said = threading.Event()
    monkeypatch.setattr(screen, "say", lambda text: (told.append(text), said.set()))
    told: list[str] = []
    for wanted in ("reading ...", "reading: 0:00:00 so far"):
        with screen.phase("reading"):
            while wanted not in told:
                assert said.wait(60)
                said.clear()
    assert told[0] == "reading ..."


def test_a_bar_ends_with_its_work_and_names_it(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress(True, what="writing") as callback:
        callback(2, 2)
        drawn = capsys.readouterr().err
        assert drawn.rstrip(" ").endswith("\n") and "writing: 100%" in drawn  # no bar stays open
        callback(2, 2)
        assert "100%" not in capsys.readouterr().err


@pytest.fixture
def lambada(folder):
    data = folder / "passages.jsonl"
    return ["lambada", "--ckpt", folder / "gpt", "--data", data, "--device", "cpu", "--limit", 2]


def test_quiet_is_results_and_errors_verbose_is_more(run, lambada, folder, tmp_path):
    normal, quiet, verbose = (run(*lambada, *more) for more in ((), ("-q",), ("--verbose",)))
    assert "work ahead" in normal.err and "warning: " in normal.err
    assert quiet.code == 0 and quiet.err == "" and "LAMBADA accuracy" in quiet.out
    told = verbose.err.splitlines()
    assert set(normal.err.splitlines()) < set(told)
    assert len(verbose.out.splitlines()) == len(normal.out.splitlines())
    assert "option --limit 2 (command line)" in told
    assert any(line.startswith("setting num_layers 2 (") for line in told)
    for what in (
        "opening ",
        "reading and tokenizing the text: ",
        "reading the weights: ",
        "scoring",
    ):
        assert any(line.startswith(what) and line.endswith(" s") for line in told), what
    (tmp_path / "o.toml").write_text("limit = 1\n")
    given = run(*lambada[:-2], "--config", tmp_path / "o.toml", "-v")
    assert f"option --limit 1 ({tmp_path}/o.toml)" in given.err
    assert_one_sentence(run(*lambada, "-q", "-v"), "-q and -v contradict each other")
    assert_one_sentence(
        run(*lambada[:3], "--data", "none.jsonl", "-q"), "none.jsonl does not exist"
    )


def test_quiet_hides_warnings_of_libraries_and_verbose_shows_hidden_ones(recwarn):
    for quiet, verbose, shown in ((True, False, 0), (False, True, 1)):
        with warnings.catch_warnings(record=True) as caught:
            screen.choose_verbosity(quiet=quiet, verbose=verbose)
            warnings.warn("of a library", DeprecationWarning, stacklevel=1)
            assert logging.getLogger("a.library").isEnabledFor(logging.WARNING) is not quiet
        assert len(caught) == shown
    screen.choose_verbosity(quiet=False, verbose=False)
    assert logging.getLogger("a.library").isEnabledFor(logging.WARNING)


def test_a_conversion_names_its_phases(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_in_fresh_process", in_this_process)
    line = ["convert", "--ckpt", folder / "gpt", "--to", "megatron", "--tp", 1, "--verify", "-v"]
    ended = run(*line, "--output", tmp_path / "out")
    assert ended.code == 0, ended
    told = [line.partition(":")[0] for line in ended.err.splitlines()]
    phases = ["writing", "verifying", "comparing weights", "running both models"]
    assert [line for line in told if line in phases] == phases
    ended = run("verify", "--ckpt", folder / "gpt", "--against", tmp_path / "out", "-v")
    assert ended.code == 0 and "comparing weights: " in ended.err


def in_this_process(result, inputs, *, transformers):
    assert not transformers
    return verify.outputs(mlm_eval.open_checkpoint(result), inputs)


# --- Words and names ----------------------------------------------------------------------------


def with_choices() -> list[Any]:
    """Return every option that takes one of a few words, of every command."""
    return [
        pytest.param(name, parameter, id=f"{name} {parameter.opts[0]}")
        for name in commands()
        for parameter in full_command(name).params
        if "|" in (parameter.metavar or "")
    ]


WORDS = {
    "--bos", "--device", "--dtype", "--eval-dtype", "--vocab", "--to", "--names", "--format",
    "--task", "--dp-mode", "--lr-decay", "--study", "--mode", "--target", "--input-format",
}  # fmt: skip


def test_words_are_choices_everywhere():
    found: dict[str, set[bool]] = {}
    for name in commands():
        for parameter in full_command(name).params:
            typed = "|" in (parameter.metavar or "")
            found.setdefault(parameter.opts[0], set()).add(typed)
    assert WORDS <= {option for option, typed in found.items() if typed == {True}}


@pytest.mark.parametrize(("command", "option"), with_choices())
def test_a_choice_is_shown_completed_and_checked(run, command, option):
    words = option.metavar.strip("[]").split("|")
    assert option.shell_complete(None, "")  # what completions offer
    assert [item.value for item in option.shell_complete(None, "")] == words
    positional = not option.opts[0].startswith("-")
    given = ["nonsense"] if positional else [option.opts[0], "nonsense"]
    required = {"--ckpt": "sample:gpt", "--to": "hf", "--output": "o", "--input": "i"}
    required |= {"--against": "x", "--data": "d", "--output-dir": "o"}
    for parameter in full_command(command).params:
        flag = parameter.opts[0]
        if parameter.required and flag != option.opts[0]:
            given += [flag, required[flag]] if flag.startswith("-") else ["--", "r.json"]
    ended = run(command, *given)
    what = command if positional else option.opts[0]
    known = f"{', '.join(words[:-1])} or {words[-1]}"
    assert_one_sentence(ended, f"{what} 'nonsense' is unknown; use {known}")


def test_formats_have_other_spellings(run, folder, tmp_path):
    for spelling in ("HF", "huggingface", "Hugging-Face"):
        line = ["convert", "--ckpt", folder / "gpt", "--to", spelling]
        ended = run(*line, "--output", tmp_path / spelling)
        assert ended.code == 0 and "(hf)" in ended.out, ended


@pytest.mark.parametrize(
    ("command", "option", "some", "none"),
    [
        ("race", "--recipe", "race-megatron-336m", "mnli-megatron-336m"),
        ("squad", "--recipe", "squad-v2-megatron-1.3b", "race-megatron-336m"),
        ("mlm", "--init", "bert-tiny", "gpt2-tiny"),
        ("lm", "--init", "gpt2-8.3b", "bert-tiny"),
        ("plan", "--model", "bert-3.9b", "nothing"),
        ("bench", "--model", "gpt2-8.3b", "nothing"),
    ],
)
def test_names_stand_in_the_help_and_are_completed(command, option, some, none):
    [parameter] = [p for p in full_command(command).params if p.opts[0] == option]
    offered = [item.value for item in parameter.shell_complete(None, "")]
    assert some in offered and none not in offered
    assert f"Names: {', '.join(offered)}." in parameter.help


# --- Small frictions ----------------------------------------------------------------------------


def test_options_of_the_harness_without_dashes_are_led_home(run):
    ended = run("harness", "--ckpt", "sample:gpt", "--tasks", "lambada_openai")
    assert_one_sentence(ended, "No such option: --tasks", "come after `--`", "-- --tasks ...")
    assert_one_sentence(run("lambada", "--ckpt", "sample:gpt", "--tasks", "x"), "(see --help)")


def test_inspect_takes_its_checkpoint_without_an_option(run):
    given = run("inspect", "sample:gpt")
    assert given.code == 0 and given.out == run("inspect", "--ckpt", "sample:gpt").out
    assert_one_sentence(run("inspect"), "give one checkpoint: mlm-eval inspect PATH")
    assert_one_sentence(run("inspect", "a", "--ckpt", "b"), "give one checkpoint")


def test_warnings_of_inspect_come_first(run):
    record = json.loads(run("inspect", "sample:gpt", "--json").out)
    shown = inspect_text({**record, "warnings": ["beware"], "notes": ["a note"]})
    assert shown.startswith("warnings\n  beware\n\ncheckpoint\n") and shown.endswith("  a note")
    assert inspect_text({**record, "warnings": []}).startswith("checkpoint\n")


def test_an_ensemble_takes_patterns_and_several_paths(tmp_path):
    for seed in (1, 2):
        (tmp_path / f"seed-{seed}" / "predictions").mkdir(parents=True)
    (tmp_path / "a[1]").mkdir()
    wanted = [tmp_path / f"seed-{seed}" / "predictions" for seed in (1, 2)]
    pattern = tmp_path / "seed-*" / "predictions"
    assert matching([pattern]) == wanted
    assert matching([*wanted, tmp_path / "none"]) == [*wanted, tmp_path / "none"]
    assert matching([tmp_path / "a[1]"]) == [tmp_path / "a[1]"]
    with pytest.raises(InputError, match=r"nothing matches .*/no-\*"):
        matching([tmp_path / "no-*"])
    names = [parameter.opts[0] for parameter in full_command("ensemble").params]
    assert {"--predictions", "more"} <= set(names)


def test_a_refused_task_leaves_no_folder(run, bert, tmp_path):
    line = ["race", "--ckpt", bert, "--data", SAMPLES / "race", "--output-dir", tmp_path / "out"]
    for wrong in (["--recipe", "none"], ["--eval-only"]):
        ended = run(*line, *wrong)
        assert ended.code == 2 and not (tmp_path / "out").exists(), ended
