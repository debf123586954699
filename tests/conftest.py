"""Where the optional data is, the markers, and the account of what was skipped.

A clone alone passes the tests. More of them run where real data and the full set of genuine
checkpoints are: in `../shared` beside the project, or where $MLM_EVAL_DATA and
$MLM_EVAL_ORACLES say. What was left out, and why, closes the output of every run.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from support import processes

# Before anything imports them: a test that reaches for the Hub is to fail at once and everywhere,
# not to pass on the machines that have a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

PROJECT = Path(__file__).resolve().parents[1]
SHARED = PROJECT.parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers; let signals reach what the tests start.

    A shell without job control starts a background command with SIGINT ignored, nohup with SIGHUP,
    and processes inherit that.
    """
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for marker in (
        "realdata: needs ../shared/data (or $MLM_EVAL_DATA); skipped where it is absent",
        "slow: takes minutes; never part of the default run, choose it with -m slow",
        "long: takes seconds; left out by `make test-fast`",
        "reliability: part of the long form only; chosen by `make test-reliability`",
        "process: starts processes; given by tests/support/processes.py where it can be seen",
    ):
        config.addinivalue_line("markers", marker)
    for variable in ("MLM_EVAL_DATA", "MLM_EVAL_ORACLES"):
        if variable in os.environ and not Path(os.environ[variable]).is_dir():
            # Skipping here would hide a misspelt path behind a green run.
            raise pytest.UsageError(
                f"${variable} is {os.environ[variable]!r}, which is not a folder"
            )


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes."""
    processes.mark(items)


def optional_folder(variable: str, default: Path) -> Path:
    """Return the folder that `variable` names, or `default`; skip the test where it is absent."""
    folder = Path(os.environ.get(variable, default)).resolve()
    if not folder.is_dir():
        where = f"../shared/{default.name}"
        pytest.skip(f"no {where} beside the project and ${variable} is not set")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a `realdata` test where there is no real data, whatever fixtures it asks for."""
    if item.get_closest_marker("realdata"):
        optional_folder("MLM_EVAL_DATA", SHARED / "data")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: wikitext-103/, lambada/, gpt2/, models/, ..."""
    return optional_folder("MLM_EVAL_DATA", SHARED / "data")


@pytest.fixture(scope="session")
def oracles() -> Path:
    """The full set of genuine Megatron checkpoints with the outputs of Megatron's own forward."""
    return optional_folder("MLM_EVAL_ORACLES", SHARED / "oracles")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was not run, grouped by reason."""
    by_reason: dict[str, Counter[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        # A skip's longrepr is (file, line, reason); that of an xfail is something else.
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        files = by_reason.setdefault(reason.removeprefix("Skipped: "), Counter())
        files[report.nodeid.partition("::")[0]] += 1
    deselected: Counter[str] = Counter(
        item.nodeid.partition("::")[0] for item in terminalreporter.stats.get("deselected", [])
    )
    if deselected:
        options = terminalreporter.config.option
        chosen = " ".join(f"{flag} {text!r}" for flag, text in _selection(options) if text)
        by_reason[f"not chosen by {chosen or 'the command line'}"] = deselected

    terminalreporter.section("skipped, and why")
    if not by_reason:
        terminalreporter.line("nothing was skipped")
    for reason, files in sorted(by_reason.items(), key=lambda group: -group[1].total()):
        terminalreporter.line(f"{files.total():5}  {reason}")
        for file, count in sorted(files.items()):
            terminalreporter.line(f"         {count:4}  {file}")


def _selection(options: object) -> list[tuple[str, str]]:
    """Return the two options by which tests are chosen, with their values."""
    return [("-m", getattr(options, "markexpr", "")), ("-k", getattr(options, "keyword", ""))]
