"""Series as commands: one record each, what is done is skipped, what fails is named, watching."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import random_models
from support.command_line import CONFIG, Ended, Run, as_user, assert_one_sentence, read
from support.paths import SAMPLES

from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.cli.app import commands, full_command
from mlm_eval.cli.series import loop
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.resume import PartialScores
from mlm_eval.series.listing import SeriesList
from mlm_eval.tasks.zero_shot.benchmark import ZeroShot

pytest_plugins = ["support.command_line_fixtures"]

ITERATIONS = (10, 20, 30)
TRACKER = "latest_checkpointed_iteration.txt"


def add(root: Path, iteration: int, *, track: bool = True) -> None:
    """Add an iteration with weights of its own to a root."""
    made = root.with_name(f"{root.name}-{iteration}")
    write_megatron_torch(random_models.checkpoint(CONFIG, seed=iteration), made, tp=2)
    (made / "release").rename(root / f"iter_{iteration:07d}")
    shutil.rmtree(made)
    if track:
        (root / TRACKER).write_text(str(iteration))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("series") / "run"
    root.mkdir()
    random_models.byte_vocabulary(root / "tokenizer")
    for iteration in ITERATIONS:
        add(root, iteration)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A root of three iterations, of which a test may change what it likes."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def line(root: Path, folder: Path, tmp_path: Path) -> list[object]:
    line: list[object] = ["wikitext103", "--ckpt", root, "--iterations", "all"]
    return [*line, "--data", folder / "wiki.tokens", "--output", tmp_path / "F.json"]


def records(folder: Path, pattern: str = "F.*") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


NAMES = [f"F.iter_{n:07d}.json" for n in ITERATIONS]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The iterations whose weights are read, in order."""
    found: list[int] = []
    load, refilled = Engine.load.__func__, Engine.refilled  # type: ignore[attr-defined]

    def loading(kind: Any, checkpoint: Any, **more: Any) -> Engine:
        found.append(checkpoint.provenance.iteration)
        return load(kind, checkpoint, **more)  # type: ignore[no-any-return]

    def refilling(engine: Engine, checkpoint: Any) -> Engine:
        found.append(checkpoint.provenance.iteration)
        return refilled(engine, checkpoint)

    monkeypatch.setattr(Engine, "load", classmethod(loading))
    monkeypatch.setattr(Engine, "refilled", refilling)
    return found


# --- Records ------------------------------------------------------------------------------------


def test_each_checkpoint_has_the_record_that_it_has_alone(run: Run, line, root, tmp_path):
    ended = run(*line)
    assert ended.code == 0, ended.err
    assert records(tmp_path) == [*NAMES, "F.json"]
    listed = read(tmp_path / "F.json")
    assert [entry["iteration"] for entry in listed["series"]] == list(ITERATIONS)
    assert listed["task"] == "wikitext103" and listed["failed"] == []
    for entry in listed["series"]:
        record = read(tmp_path / entry["record"])
        assert record["checkpoint"]["iteration"] == entry["iteration"]
        alone = tmp_path / "alone.json"
        data = line[line.index("--data") :][:2]
        single = ["wikitext103", "--ckpt", entry["checkpoint"], *data, "--output", alone]
        assert run(*single, "--overwrite").code == 0
        assert read(alone)["metrics"] == record["metrics"]  # bit by bit, in the same memory
        assert read(alone)["checkpoint"]["digest"] == record["checkpoint"]["digest"]
    lines = ended.out.splitlines()
    assert [text.partition(":")[0] for text in lines[:3]] == [f"iteration {n}" for n in ITERATIONS]
    assert lines[4].startswith("wikitext103, a series of 3") and len(lines) == 9


@pytest.mark.long
def test_what_is_done_is_skipped_and_one_more_is_run(run: Run, line, root, tmp_path, loads):
    assert run(*line).code == 0
    assert loads == list(ITERATIONS)
    before = {name: (tmp_path / name).read_bytes() for name in NAMES}
    add(root, 40)
    ended = run(*line, "--batch-tokens", 77)  # decides no score
    assert ended.code == 0 and loads == [*ITERATIONS, 40]
    assert ended.out.count("done before, in") == 3
    assert {name: (tmp_path / name).read_bytes() for name in NAMES} == before
    assert [e["iteration"] for e in read(tmp_path / "F.json")["series"]] == [*ITERATIONS, 40]
    # A list that was lost is made again, of a part too; other entries stay.
    (tmp_path / "F.json").unlink()
    part = [*line[:4], "20:30:10", *line[5:]]
    assert run(*part).code == 0
    assert [e["iteration"] for e in read(tmp_path / "F.json")["series"]] == [20, 30]
    assert run(*line[:4], "latest", *line[5:]).code == 0
    assert [e["iteration"] for e in read(tmp_path / "F.json")["series"]] == [20, 30, 40]
    assert loads == [*ITERATIONS, 40]


@pytest.mark.long
def test_records_of_another_run_are_not_taken(run: Run, line, root, tmp_path, loads):
    assert run(*line).code == 0
    ended = run(*line, "--stride", 8)
    assert_one_sentence(ended, "F.json lists a series of other settings: stride 32, now 8")
    ended = run(*line, "--limit", 2, "--overwrite")
    assert_one_sentence(ended, "F.json holds a result of all the data")
    (tmp_path / "F.json").unlink()
    ended = run(*line, "--stride", 8)
    assert ended.code == 2 and ended.err.count("another run: stride 32, now 8; replace it") == 3
    assert len(loads) == 3
    # Other weights of the same name.
    shutil.rmtree(root / "iter_0000020")
    add(root, 21, track=False)
    (root / "iter_0000021").rename(root / "iter_0000020")
    ended = run(*line)
    assert ended.code == 2 and "iteration 20: " in ended.err and "another checkpoint" in ended.err
    assert ended.out.count("done before") == 2
    assert run(*line, "--overwrite").code == 0
    assert loads[3:] == list(ITERATIONS)


@pytest.mark.long
def test_a_limited_series_says_so_everywhere(run: Run, line, tmp_path):
    ended = run(*line, "--limit", 2)
    assert ended.code == 0
    assert ended.out.count("LIMITED") == 4
    assert read(tmp_path / "F.json")["settings"]["limit"] == 2
    assert all(read(tmp_path / name)["settings"]["limit"] == 2 for name in NAMES)
    assert run(*line, "--overwrite").code == 0
    assert read(tmp_path / "F.json")["settings"]["limit"] is None


@pytest.mark.long
def test_the_text_is_read_once_and_anew_for_another_length(
    run: Run, line, root, tmp_path, monkeypatch
):
    calls: list[int] = []
    work_for = ZeroShot.work_for

    def counting(self: Any, config: Any, *given: Any, **more: Any) -> Any:
        calls.append(config.max_position_embeddings)
        return work_for(self, config, *given, **more)

    monkeypatch.setattr(ZeroShot, "work_for", counting)
    shorter = random_models.config(vocab_size=256, max_position_embeddings=16)
    write_megatron_torch(random_models.checkpoint(shorter), tmp_path / "short", tp=1)
    random_models.byte_vocabulary(tmp_path / "short" / "tokenizer")
    line = [*line[:5], "--stride", 8, *line[5:]]
    several = ["wikitext103", "--ckpt", tmp_path / "short", *line[1:3], *line[5:]]
    assert run(*line).code == 0 and calls == [32]
    ended = run(*several[:-1], tmp_path / "G.json")
    assert ended.code == 0, ended.err
    assert calls == [32, 16, 32]
    assert records(tmp_path, "G*") == ["G.json", "G.run.iter_0000030.json", "G.short.release.json"]


# --- Examples, and what stands once -------------------------------------------------------------


@pytest.mark.long
def test_each_checkpoint_has_its_examples(run: Run, line, tmp_path, loads):
    line = [*line, "--save-examples", tmp_path / "E.jsonl"]
    assert_one_sentence(run(*line[:-4], *line[-2:]), "--save-examples", "give --output F.json")
    assert_one_sentence(run(*line[:-1], "-"), "a file for the examples")
    ended = run(*line)
    assert ended.code == 0, ended.err
    assert ended.err.count("work ahead: ") == 1  # it is the same for all
    names = [f"E.iter_{n:07d}.jsonl" for n in ITERATIONS]
    assert records(tmp_path, "E*") == names
    before = {name: (tmp_path / name).read_bytes() for name in names}
    for name, record in zip(names, map(read, map(tmp_path.joinpath, NAMES)), strict=True):
        found = [json.loads(text) for text in (tmp_path / name).read_text().splitlines()]
        assert len(found) == record["counts"]["windows"]
        total = -sum(example["logprob"] for example in found)
        assert total == pytest.approx(record["metrics"]["nll_sum"], rel=1e-9)
    assert len({*before.values()}) == 3
    alone = ["wikitext103", "--ckpt", line[2] / "iter_0000020", *line[5:7], "--save-examples"]
    assert run(*alone, tmp_path / "alone.jsonl").code == 0
    assert (tmp_path / "alone.jsonl").read_bytes() == before[names[1]]
    # What is done is skipped, but for a record whose examples are not there.
    assert run(*line).out.count("done before") == 3 and len(loads) == 4
    (tmp_path / names[2]).unlink()
    ended = run(*line)
    assert ended.code == 0 and ended.out.count("done before") == 2 and loads[-1] == 30
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    (tmp_path / NAMES[0]).unlink()  # examples of another run, or of a list that was lost
    ended = run(*line)
    assert ended.code == 2 and f"{names[0]} exists already; replace it with --ov" in ended.err
    (tmp_path / f"{NAMES[0]}.partial").mkdir()  # of this one, which was killed after them
    (tmp_path / names[0]).write_text("years of work")
    for more in ([], ["--overwrite"]):
        ended = run(*line, *more)
        assert ended.code == 2 and f"{names[0]} " in ended.err
        assert (tmp_path / names[0]).read_text() == "years of work"
    (tmp_path / names[0]).write_bytes(before[names[0]])
    assert run(*line).code == 0 and records(tmp_path, "E*") == names


@pytest.mark.long
def test_examples_have_names_of_their_own_whatever_the_record_is_called(run: Run, line, tmp_path):
    for output, saved in (("F", "E"), ("F.1", "E.jsonl"), ("F.json", "E")):
        place = tmp_path / output.replace(".", "-")
        place.mkdir()
        ended = run(*line[:-1], place / output, "--save-examples", place / saved)
        assert ended.code == 0, ended.err
        found = [place / f"E.iter_{n:07d}{Path(saved).suffix}" for n in ITERATIONS]
        assert sorted(place.glob("E*")) == found
        assert len({path.read_bytes() for path in found}) == 3


def test_no_hit_at_all_has_its_bound(run: Run, line, folder, tmp_path):
    line = ["lambada", *line[1:4], "10", "--data", folder / "passages.jsonl"]
    line += ["--output", tmp_path / "F"]
    ended = run(*line)
    bound = "0.00 % (0 of 4; at most 49.0 % with 95 % confidence)"
    assert ended.code == 0 and ended.out.count(bound) == 2  # as it is found, and in the table
    assert run(*line).out.count(bound) == 2  # of records that are there
    record = tmp_path / "F.iter_0000010"
    record.write_text(json.dumps(read(record) | {"metrics": {}}))
    ended = run(*line)
    assert ended.code == 2 and f"{record} holds a result; replace it" in ended.err


# --- Interrupted --------------------------------------------------------------------------------


@pytest.mark.long
def test_an_interrupted_one_is_resumed(run: Run, line, tmp_path, monkeypatch, loads):
    add_scores, calls = PartialScores.add, []

    def stop(partial: PartialScores, *given: Any) -> None:
        add_scores(partial, *given)
        calls.append(partial.folder.name)
        if len(set(calls)) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PartialScores, "add", stop)
        assert run(*line, "--batch-tokens", 64).code == 130
    assert records(tmp_path) == [NAMES[0], f"{NAMES[1]}.partial", "F.json"]
    ended = run(*line)
    assert ended.code == 0, ended.err
    assert ended.out.count("done before") == 1 and ended.err.count("resumes at") == 1
    assert loads == [10, 20, 20, 30] and records(tmp_path) == [*NAMES, "F.json"]


# --- What cannot be read ------------------------------------------------------------------------


def damage(root: Path, how: str) -> None:
    file = root / "iter_0000020" / "mp_rank_01" / "model_optim_rng.pt"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-999])
    elif how == "gone":
        file.unlink()
    else:
        file.write_text("no checkpoint")


@pytest.mark.long
@pytest.mark.parametrize("how", ["cut", "gone", "text"])
def test_one_that_cannot_be_read_is_named_and_the_others_go_on(run: Run, line, root, tmp_path, how):
    damage(root, how)
    ended = run(*line)
    assert ended.code == 2 and "Traceback" not in ended.err
    said = [text for text in ended.err.splitlines() if text.startswith("mlm-eval: ")]
    assert len(said) == 2 and said[0].startswith("mlm-eval: iteration 20: ")
    assert said[1].startswith("mlm-eval: 1 of 3 checkpoint(s) could not be evaluated: iteration 20")
    assert records(tmp_path) == [NAMES[0], NAMES[2], "F.json"]
    (failed,) = read(tmp_path / "F.json")["failed"]
    assert failed["iteration"] == 20 and failed["error"] in said[0]
    shutil.rmtree(root / "iter_0000020")
    add(root, 20, track=False)
    assert run(*line).code == 0
    assert read(tmp_path / "F.json")["failed"] == []


def test_none_that_can_be_read(run: Run, line, root):
    for path in root.glob("iter_*/mp_rank_00/*.pt"):
        path.write_text("no checkpoint")
    assert_one_sentence(run(*line), "none of the 3 checkpoints can be opened; the first: ")


@pytest.mark.long
def test_a_file_in_the_way_stays(run: Run, line, tmp_path):
    (tmp_path / NAMES[1]).write_text("years of work")
    for more in ([], ["--overwrite"]):
        ended = run(*line, *more)
        assert ended.code == 2 and "iteration 20: " in ended.err
        assert (tmp_path / NAMES[1]).read_text() == "years of work"


def test_a_stream_is_no_place_for_records(run: Run, line):
    assert_one_sentence(run(*line[:-1], "-"), "--output - is one stream")


# --- Several roots, and where there is no series ------------------------------------------------


@pytest.mark.long
def test_several_roots_have_names(run: Run, line, root, tmp_path):
    other = Path(shutil.copytree(root, tmp_path / "b" / "run"))
    ended = run(*line[:3], "--ckpt", other, *line[3:])
    assert ended.code == 0, ended.err
    parent = tmp_path.name
    found = [entry["record"] for entry in read(tmp_path / "F.json")["series"]]
    assert found == [f"F.{name}.iter_{n:07d}.json" for name in (f"{parent}-run", "b-run")
                     for n in ITERATIONS]  # fmt: skip
    assert records(tmp_path) == sorted([*found, "F.json"])
    assert f"{parent}-run, iteration 10: " in ended.out
    assert_one_sentence(run(*line[:3], "--ckpt", f"{root}/", *line[3:]), "is given twice")
    missing = run(*line[:3], "--ckpt", tmp_path / "no", *line[5:])
    assert_one_sentence(missing, "/no does not exist")


def test_a_repeated_ckpt_is_refused_where_it_makes_no_series(run: Run):
    for name in commands():
        options = {flag: p for p in full_command(name).params for flag in p.opts}
        if "--ckpt" not in options:
            continue
        takes_more = "--iterations" in options
        assert options["--ckpt"].multiple == takes_more, name
        if not takes_more:
            ended = run(name, "--ckpt", "a", "--ckpt=b")
            assert_one_sentence(ended, f"--ckpt is given 2 times, and {name} takes one")
    ended = run("verify", "--ckpt", "a", "--against", "b", "--against", "c")
    assert_one_sentence(ended, "--against is given 2 times")


@pytest.mark.long
def test_a_file_of_options_may_name_one_or_several(run: Run, line, root, tmp_path):
    config = tmp_path / "options.toml"
    rest = [*line[5:], "--config", config]
    config.write_text(f'ckpt = "{root}"\niterations = "latest"\n')
    assert run("wikitext103", *rest).code == 0
    assert records(tmp_path) == [NAMES[2], "F.json"]
    places = [str(root / f"iter_{n:07d}") for n in (10, 20)]
    config.write_text(f"ckpt = {json.dumps(places)}\n")
    assert run("wikitext103", *rest).code == 0
    assert "F.run.iter_0000010.json" in records(tmp_path)


# --- Watching -----------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Callable[[], object]]], list[float]]:
    """Have a series wait on a clock of its own, with something to happen at each look."""

    def watch(events: list[Callable[[], object]]) -> list[float]:
        now, looks = [0.0], []

        def sleep(seconds: float) -> None:
            looks.append(seconds)
            now[0] += seconds
            if events:
                events.pop(0)()

        monkeypatch.setattr(loop.time, "sleep", sleep)
        monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
        return looks

    return watch


def nothing() -> None:
    """Nothing happens."""


def test_watching_goes_on_as_the_tracker_moves(run: Run, line, root, tmp_path, clock, loads):
    (root / TRACKER).write_text("10")
    half = root / "iter_0000040"

    def half_written() -> None:
        (half / "mp_rank_00").mkdir(parents=True)
        (half / "mp_rank_00" / "model_optim_rng.pt").write_text("half of")

    def whole() -> None:
        shutil.rmtree(half)
        add(root, 40)

    events = [nothing, lambda: (root / TRACKER).write_text("30"), half_written, nothing, whole]
    looks = clock(events)
    ended = run(*line, "--watch", 0.5)
    assert ended.code == 0, ended.err
    assert loads == [10, 20, 30, 40] and not events
    assert "could not" not in ended.err and ended.err.count("waits for the next") == 3
    assert sum(looks[-6:]) == 30  # half a minute without news
    assert [e["iteration"] for e in read(tmp_path / "F.json")["series"]] == [10, 20, 30, 40]


def test_watching_takes_what_is_asked_for_only(run: Run, line, root, clock, loads):
    clock([lambda: add(root, 40), lambda: add(root, 50), lambda: add(root, 60)])
    ended = run(*line[:4], "30,50:60:10", *line[5:], "--watch", 1)
    assert ended.code == 0 and loads == [30, 50, 60], ended.err


def test_watching_before_there_is_anything(run: Run, line, root, tmp_path, clock, loads):
    empty = tmp_path / "new"
    empty.mkdir()
    (empty / "tokenizer").symlink_to(root / "tokenizer")
    waiting = [*line[:2], empty, *line[5:], "--watch"]
    clock([])
    ended = run(*waiting, 2)
    assert ended.code == 0 and "no finished iteration has appeared" in ended.err
    clock([nothing, lambda: add(empty, 10, track=False), nothing, lambda: add(empty, 20)])
    ended = run(*waiting, 2)
    assert ended.code == 0 and loads == [10, 20], ended.err


def test_watching_alone_ends_with_ctrl_c(run: Run, line, root, clock, loads):
    def stop() -> None:
        raise KeyboardInterrupt

    clock([nothing, stop])
    ended = run(*line, "--watch")
    assert ended.code == 130 and loads == list(ITERATIONS) and "Ctrl-C ends" in ended.err
    assert "F.json lists what is done; to continue, type: mlm-eval wiki" in ended.err
    assert "no result" not in ended.err
    assert_one_sentence(run(*line, "--watch=soon"), "--watch 'soon' must be a number of minutes")
    assert_one_sentence(run(*line, "--watch=-3"), "--watch '-3' must be")


# --- score and harness --------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("stop_at", ["listed", "written"])
def test_score_writes_lines_for_each(run: Run, root, folder, tmp_path, monkeypatch, loads, stop_at):
    output = tmp_path / "F.jsonl"
    line = ["score", "--ckpt", root, "--iterations", "10:20:10", "--output", output]
    line += ["--input", folder / "lines.jsonl"]
    names = ["F.iter_0000010.jsonl", "F.iter_0000020.jsonl", "F.jsonl"]

    def stop(*given: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # after a record, before or after it is listed
        if stop_at == "listed":
            patched.setattr(loop, "discard_scores", stop)
        else:
            patched.setattr(SeriesList, "add", stop)
        assert run(*line).code == 130
    assert (tmp_path / names[0]).exists()
    ended = run(*line)
    assert ended.code == 0, ended.err
    assert records(tmp_path) == names
    assert "mean log-probability -" in ended.out
    listed = json.loads(output.read_text())  # one line
    assert [entry["lines"] for entry in listed["series"]] == [2, 2]
    alone = tmp_path / "alone.jsonl"
    single = ["score", "--ckpt", root / "iter_0000020", *line[7:], "--output", alone]
    assert run(*single).code == 0
    assert alone.read_text() == (tmp_path / names[1]).read_text()
    before = len(loads)
    assert run(*line).out.count("done before") == 2 and len(loads) == before
    (tmp_path / names[0]).write_text((tmp_path / names[1]).read_text())
    ended = run(*line)
    assert ended.code == 2 and "F.iter_0000010.jsonl exists already" in ended.err
    ended = run(*line, "--stride", 3)
    assert_one_sentence(ended, "F.jsonl lists a series of other settings: stride None, now 3")


HARNESS_TASK = """task: tiny_cloze
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.long
def test_the_harness_has_a_record_for_each(run: Run, root, folder, tmp_path, loads):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra lm-eval)")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = HARNESS_TASK.format(data=folder / "passages.jsonl", cache=tmp_path / "cache")
    (tasks / "tiny.yaml").write_text(task)
    line = ["harness", "--ckpt", root, "--iterations", "10,30", "--output", tmp_path / "F.json"]
    arguments = ["--", "--tasks", "tiny_cloze", "--include_path", tasks]
    ended = run(*line, *arguments)
    assert ended.code == 0, ended.err
    assert records(tmp_path) == [NAMES[0], NAMES[2], "F.json"]
    record = read(tmp_path / NAMES[2])
    assert record["task"] == "harness" and record["checkpoint"]["iteration"] == 30
    assert 0 <= record["metrics"]["tiny_cloze"]["acc"] <= 1
    assert record["counts"] == {"tiny_cloze": 4} and record["settings"]["limit"] is None
    assert loads == [10, 30] and run(*line, *arguments).out.count("done before") == 2
    assert loads == [10, 30]
    ended = run(*line, *arguments, "--limit", 2)
    assert ended.code == 2 and "lists a series of other settings" in ended.err


# --- Ranks --------------------------------------------------------------------------------------


COUNTING = (
    "import os, sys; from mlm_eval.ranks import launch; start = launch._start\n"
    "def counting(*given, **more):\n"
    "    print('RANKS STARTED', file=sys.stderr, flush=True)\n"
    "    return start(*given, **more)\n"
    "launch._start = counting\n"
    "from mlm_eval.cli import entry; entry()"
)


@pytest.mark.process
def test_two_ranks_start_once_for_the_series(run: Run, line, root, tmp_path):
    assert run(*line[:-1], tmp_path / "one.json").code == 0
    damage(root, "cut")  # of the second rank's file, which it alone reads
    ended: Ended = as_user(*line, "--tp", 2, command=("-P", "-c", COUNTING))
    assert ended.code == 2, ended.err
    assert ended.err.count("RANKS STARTED") == 1 and "Traceback" not in ended.err
    assert "could not be evaluated: iteration 20" in ended.err
    for iteration in (10, 30):
        name = f"iter_{iteration:07d}.json"
        record, alone = read(tmp_path / f"F.{name}"), read(tmp_path / f"one.{name}")
        assert record["settings"]["tp"] == 2
        assert record["metrics"]["ppl"] == pytest.approx(alone["metrics"]["ppl"], rel=1e-5)


def test_the_sample_is_a_root(run: Run, tmp_path):
    data = SAMPLES / "text" / "lambada.sample.jsonl"
    line = ["lambada", "--ckpt", "sample:gpt", "--data", data, "--limit", 2, "--iterations"]
    ended = run(*line, "latest", "--output", tmp_path / "F.json")
    assert ended.code == 0 and "6,144,000 tokens" in ended.out
    assert_one_sentence(run(*line, "2000"), "has no iteration 2000; it has 3000")
