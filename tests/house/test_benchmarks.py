"""The page that the benchmarks write, and what they say of a target."""

import importlib.util
import json
import sys
from types import ModuleType

import pytest
from support.paths import PROJECT


@pytest.fixture
def results(tmp_path, monkeypatch) -> ModuleType:
    """benchmarks/common/results.py, which writes to a folder of the test."""
    path = PROJECT / "benchmarks" / "common" / "results.py"
    spec = importlib.util.spec_from_file_location("benchmark_results", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


def test_a_target_is_met_by_the_median_of_the_pairs(results):
    # Ratios 1, 2, 3 and 4: the median is 2.5.
    times = [1.0, 2.0, 1.0, 1.0], [1.0, 4.0, 3.0, 4.0]
    for target, met in ((None, True), (2.5, True), (2.51, False)):
        assert results.Row("work", "peer", "s", *times, target).met is met


def test_a_day_holds_each_part_once_and_all_targets_in_one_table(results, capsys):
    def row(work, ours, target):
        return results.Row(work, "peer", "s", [ours], [6.0], target)

    assert results.publish("windows", [row("fast", 1.0, 2.0), row("told", 1.0, None)], {"n": 1})
    assert not results.publish("lambada", [row("slow", 6.0, 2.0)], {}, said="As planned.")
    assert not results.publish("lambada", [row("slow", 3.0, 2.5)], {}, said="As planned.")
    assert results.publish("lambada", [row("slow", 1.0, 2.5)], {}, more=True)
    written = sorted(results.RESULTS.iterdir())
    assert [path.suffix for path in written] == [".json", ".md"]
    day = json.loads(written[0].read_text())
    assert list(day) == ["lambada", "windows"]
    (slow,) = day["lambada"]["rows"]
    assert (slow["ours"], slow["theirs"]) == ([3.0, 1.0], [6.0, 6.0])  # the first is replaced
    page = written[1].read_text()
    targets, _, rest = page.partition("## How")
    assert "2 targets, 0 missed" in targets
    assert "| slow |" in targets and "4.00 (2.00 to 6.00) | 2.50 | yes |" in targets
    assert "| fast |" in targets and "| told |" not in targets and "| told |" in rest
    assert "| slow |" in capsys.readouterr().out
