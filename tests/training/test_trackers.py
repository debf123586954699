"""`--log`: what the trackers are told, by stand-ins for their packages; TensorBoard's is real."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.command_line import Run, assert_one_sentence
from support.paths import SAMPLES

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.training.log import TrainingLog
from mlm_eval.training.trackers import RUNS_FILE, Trackers, check_trackers

pytest_plugins = ["support.command_line_fixtures"]

STEP = {"step": 1, "epoch": 1, "loss": 2.5, "lr": 0.1}
EVALUATION = {"step": 1, "epoch": 1, "evaluation": {"loss": 2.0, "set": "dev", "best": True}}


class Project(ModuleType):
    """A stand-in for wandb and trackio: `init` returns a run that notes its calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.calls: list[Any] = []
        self.fails = False

    def init(self, **given: Any) -> Any:
        self.calls.append(("init", given))
        return SimpleNamespace(log=self.log, finish=lambda: self.calls.append("finish"))

    def log(self, figures: dict[str, float], *, step: int) -> None:
        print("chatter of a library")
        if self.fails:
            raise ConnectionError("the service is gone\nand more")
        self.calls.append((step, figures))


class Mlflow(ModuleType):
    """A stand-in for mlflow and mlflow.tracking."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
        self.tracking = self
        self.calls: list[Any] = []
        self.experiments: dict[str, Any] = {}

    def MlflowClient(self) -> Any:
        note = self.calls.append

        def create(name: str) -> str:
            self.experiments[name] = SimpleNamespace(experiment_id="7")
            return "7"

        return SimpleNamespace(
            get_experiment_by_name=self.experiments.get,
            create_experiment=create,
            create_run=lambda place, run_name: SimpleNamespace(
                info=SimpleNamespace(run_id=f"{place}-{run_name}")
            ),
            log_param=lambda run, key, value: note((run, key, value)),
            log_metric=lambda run, name, value, step: note((run, step, name, value)),
            set_terminated=lambda run: note((run, "ended")),
        )


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All three, as if they were installed."""
    made: dict[str, Any] = {name: Project(name) for name in ("wandb", "trackio")}
    made["mlflow"] = Mlflow()
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", made["mlflow"])
    return made


def log_of(folder: Path, *destinations: str, start: int = 0) -> tuple[TrainingLog, list[str]]:
    warnings: list[str] = []
    log = TrainingLog(
        folder, start=start, warn=warnings.append, destinations=destinations, config={"lr": 0.1}
    )
    return log, warnings


def test_every_tracker_gets_the_figures_of_steps_and_evaluations(
    packages: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = tmp_path / "board"
    log, warnings = log_of(
        tmp_path / "out", "wandb:p", "trackio:p", "mlflow:p", f"tensorboard:{board}"
    )
    log.step(STEP)
    log.evaluation(EVALUATION)
    log.close()
    assert not warnings and capsys.readouterr().out == ""
    told = [(1, {"train/loss": 2.5, "train/lr": 0.1}), (1, {"dev/loss": 2.0})]
    for name in ("wandb", "trackio"):
        (_, given), *rest = packages[name].calls
        assert given["project"] == "p" and given["config"] == {"lr": 0.1}
        assert given["name"].startswith("out") and rest == [*told, "finish"]
    assert packages["mlflow"].calls == [
        ("7-out", "lr", "0.1"),
        *(("7-out", 1, n, v) for _, figures in told for n, v in figures.items()),
        ("7-out", "ended"),
    ]
    for folder in (board, tmp_path / "out" / "tensorboard"):
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1


def test_a_resumed_run_goes_on_in_the_same_runs(packages: dict[str, Any], tmp_path: Path) -> None:
    for start in (0, 5):
        log, _ = log_of(tmp_path, "wandb:p", "trackio:p", "mlflow:p", start=start)
        log.close()
    for name, key in (("wandb", "id"), ("trackio", "name")):
        first, second = (call[1] for call in packages[name].calls if call[0] == "init")
        assert first[key] == second[key] and second["resume"] == "allow"
    assert [call for call in packages["mlflow"].calls if call[1] == "lr"] == [
        (f"7-{tmp_path.name}", "lr", "0.1")
    ]
    log, _ = log_of(tmp_path, "wandb:p", start=0)  # begun anew: another run
    log.close()
    runs = [call[1]["id"] for call in packages["wandb"].calls if call[0] == "init"]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("content", ["", "[1]", '{"wandb:p": 3}', "{" * 10**5])
def test_a_damaged_list_of_runs_ends_nothing(
    packages: dict[str, Any], content: str, tmp_path: Path
) -> None:
    (tmp_path / RUNS_FILE).write_text(content)
    log, warnings = log_of(tmp_path, "wandb:p", start=5)
    log.close()
    assert not warnings


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(
    packages: dict[str, Any], tmp_path: Path
) -> None:
    packages["wandb"].fails = True
    log, warnings = log_of(tmp_path, "wandb:p", "trackio:p")
    for _ in range(2):
        log.step(STEP)
    log.close()
    assert warnings == ["--log wandb:p failed (the service is gone); the run goes on without it"]
    assert len(packages["trackio"].calls) == 4


def test_evaluations_leave_nothing_to_go_on_from(packages: dict[str, Any], tmp_path: Path) -> None:
    trackers = Trackers(["wandb:p"], name="x", config={}, folder=tmp_path, warn=pytest.fail)
    trackers.log({"lambada/accuracy": 0.5}, 1000)
    trackers.close()
    assert packages["wandb"].calls[1] == (1000, {"lambada/accuracy": 0.5})
    assert not (tmp_path / RUNS_FILE).exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clearml:p", "--log clearml:p is no tracker; write one of tensorboard:"),
        ("", "--log  is no tracker"),
        ("wandb:", "names no project; write --log wandb:NAME"),
        ("mlflow", "names no project"),
    ],
)
def test_what_is_no_tracker_is_refused(packages: dict[str, Any], text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_trackers([text])


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_missing_package_is_named_before_any_work(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlm_eval.checkpoints.errors.find_spec", lambda _: None)
    with pytest.raises(InputError, match=f"--log {name}:p needs {name}, which is not installed"):
        check_trackers([f"{name}:p"])


@pytest.mark.long
def test_a_series_is_one_run_for_each_training_run(
    packages: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlm_eval.cli import main

    text = SAMPLES / "text" / "lambada.sample.jsonl"
    series = ["--ckpt", "sample:gpt", "--ckpt", "sample:moe", "--data", str(text), "--limit", "2"]
    argv = [
        "mlm-eval",
        "lambada",
        *series,
        "--log",
        "wandb:p",
        "--output",
        str(tmp_path / "l.json"),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    calls = packages["wandb"].calls
    assert [call[1]["name"] for call in calls if call[0] == "init"] == [
        "gpt lambada",
        "moe lambada",
    ]
    logged = {call[0]: set(call[1]) for call in calls if isinstance(call[0], int)}
    assert set(logged) == {3000, 1200}
    assert all("lambada/accuracy" in figures for figures in logged.values())
    assert calls.count("finish") == 2


def test_tensorboard_without_a_folder_stands_beside_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """Nothing is written where the command was typed."""
    here, results = tmp_path / "here", tmp_path / "results"
    here.mkdir()
    results.mkdir()
    monkeypatch.chdir(here)
    text = SAMPLES / "text" / "lambada.sample.jsonl"
    line = ["lambada", "--ckpt", SAMPLES / "gpt", "--data", text, "--limit", 2]
    line += ["--log", "tensorboard", "--device", "cpu"]
    for more in ([], ["--output", "-"], ["--log", f"tensorboard:{tmp_path / 'board'}"]):
        assert_one_sentence(run(*line, *more), "write --log tensorboard:FOLDER, or give --output")
    assert run(*line, "--output", results / "l.json").code == 0
    assert list((results / "tensorboard" / "gpt lambada").glob("events.*"))
    line[line.index("tensorboard")] = f"tensorboard:{tmp_path / 'board'}"
    assert run(*line).code == 0 and list((tmp_path / "board" / "gpt lambada").glob("events.*"))
    assert not list(here.iterdir())
