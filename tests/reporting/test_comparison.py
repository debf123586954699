"""Reports of any records, and curves: names, iterations, order, what is drawn, refusals."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Run
from support.folders.result_records import VERSIONS, checkpoint, fine_tuned, write, zero_shot

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.reporting.curves import draw_curves
from mlm_eval.reporting.render import render
from mlm_eval.reporting.tables import TaskTable
from mlm_eval.tasks.comparison import build_comparisons
from mlm_eval.tasks.records import read_results

pytest_plugins = ["support.command_line_fixtures"]


def trained(task: str, **metrics: float) -> dict[str, Any]:
    """Return a record of a language model's training."""
    return {
        "task": task,
        "protocol": "causal-lm",
        "metrics": {"loss": 2.5, "perplexity": 12.18, "accuracy": 0.4, "best": None, **metrics},
        "counts": {"steps": 50, "samples_seen": 400},
        "settings": {"dtype": "float32", "tp": 2, "dp": 1, "seq_length": 128},
        "checkpoint": {**checkpoint("gpt2-355m", "start"), "path": "a new model"},
        "timing": {},
        "versions": VERSIONS,
    }


BENCH = {
    "task": "bench",
    "protocol": "weak-scaling",
    "settings": {"ckpt": None, "mode": "infer", "dtype": "float32"},
    "points": [
        {"tp": tp, "model": "gpt2-tiny", "parameters": 7_400_000, "tokens_per_second": 541.0 * tp}
        for tp in (1, 2)
    ],
}
HARNESS = {
    "results": {
        "piqa": {"alias": "piqa", "acc,none": 0.7, "acc_stderr,none": 0.01, "ppl,all": 9.5}
    },
    "higher_is_better": {"piqa": {"acc": True, "ppl": False}},
    "n-shot": {"piqa": 0},
    "config": {"mlm_eval": {"path": "runs/gpt-a/iter_0002000", "dtype": "float32"}, "limit": None},
}
SCORED = [
    {"tokens": [1, 2, 3], "logprobs": [None, -1.0, -2.0], "greedy": [None, True, False]},
    {
        "choices": [[1, 2], [3]],
        "logprobs": [[-3.0, -4.0], [-5.0]],
        "greedy": [[True, True], [True]],
    },
]
OTHERS = {
    "lm/result.json": trained("lm"),
    "bench.json": BENCH,
    "harness.json": HARNESS,
    "scores.jsonl": "".join(json.dumps(line) + "\n" for line in SCORED),
}


def at(
    iteration: int, value: float, *, run: str = "runs/gpt-a", batch: int = 8, **more: Any
) -> Any:
    """Return a record of an iteration of a run."""
    record = zero_shot(more.pop("task", "wikitext103"), value, **more)
    record["checkpoint"] |= {
        "path": f"{run}/iter_{iteration:07d}",
        "digest": f"{run} {iteration}",
        "iteration": iteration,
        "consumed_samples": batch * iteration,
        "consumed_tokens": 1024 * batch * iteration,
    }
    return record


def series(folder: Path, *records: Any, name: str = "f") -> Path:
    """Write records beside the list of their series; return the list."""
    entries = []
    for record in records:
        iteration = record["checkpoint"]["iteration"]
        path = write(folder, f"{name}.iter_{iteration:07d}.json", record)
        place = {"checkpoint": record["checkpoint"]["path"], "iteration": iteration}
        entries.append({**place, "record": path.name})
    return write(folder, f"{name}.json", {"task": "wikitext103", "series": entries})


def curves(*paths: Path, **options: Any) -> list[TaskTable]:
    records = [record for path in paths for record in read_results(path)]
    return build_comparisons(records, curve=True, **options)


def lines(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# --- any records ----------------------------------------------------------------------------------


def test_every_kind_of_record_is_compared(tmp_path, run: Run):
    (tmp_path / "lm").mkdir()
    paths = [write(tmp_path, name, content) for name, content in OTHERS.items()]
    done = run("report", *paths)
    assert done.code == 0, done.err
    rows = [line for line in done.out.splitlines() if line.startswith("|") and "---" not in line]
    assert re.fullmatch(
        r"\| lm \| float32, tp 2 x dp 1 \| 50 \| 400 \| 51,200 \| 355M \| 2\.5000 \| 12\.18 \| "
        r"40\.00 \| .*lm/result\.json \|",
        rows[1],
    )
    assert "gpt2-tiny | float32, tp 2 x dp 1, infer | 7.4M | 1,082 |" in rows[4]
    assert "piqa acc ↑ | piqa ppl (all) ↓ |" in rows[5]
    assert "| gpt-a | float32 | 2,000 | 0.7000 | 9.5000 |" in rows[6]
    assert "| scores | 3.0000 | 20.09 | 80.00 |" in rows[8]  # exp(3); of five tokens
    found = lines(run("report", *paths, "--format", "csv").out)
    assert [line["iteration"] for line in found if line["table"] == "lm"] == ["50"] * 3
    (line,) = (line for line in found if line["figure"] == "piqa acc")
    assert (line["model"], line["iteration"], float(line["value"])) == ("gpt-a", "2000", 0.7)
    for fmt in ("latex", "html"):
        assert "gpt2-tiny" in run("report", *paths, "--format", fmt).out


def test_the_papers_tables_come_first_and_name_iterations(tmp_path, run: Run):
    paths = [
        write(tmp_path, "lm.json", trained("lm")),
        *(write(tmp_path, f"{i}.json", at(i, 20.0 - i / 1000)) for i in (1000, 2000)),
    ]
    done = run("report", *paths)
    assert done.out.index("Table 3 of") < done.out.index("**Language models.")
    for iteration in ("1,000", "2,000"):
        assert f"| gpt-a, iteration {iteration} | measured |" in done.out
    found = lines(run("report", *paths, "--format", "csv").out)
    mine = {line["iteration"]: line for line in found if line["table"] == "3" and line["record"]}
    assert mine["2000"]["consumed_tokens"] == str(2000 * 8 * 1024)
    with_table = run("report", *paths, "--table", 3)
    assert (
        with_table.code == 2 and "lm.json is a record of lm, which is in no table" in with_table.err
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BENCH | {"points": None}, "it has no settings and points"),
        (BENCH | {"points": [7]}, "a point is no object"),
        (
            '{"logprobs": [-1.0]}\n{"prompt": "x"}\n',
            "line 2, is no line that `mlm-eval score` wrote",
        ),
        ('{"logprobs": [null]}\n', "holds no log-probability"),
        (
            '{"prompt": "x", "logprobs": [-1.0], "finish": "stop"}\n',
            "texts that `mlm-eval generate`",
        ),
        ({"task": "lambada", "series": []}, "lists no record yet"),
        ({"task": "lambada", "series": [{"iteration": 1}]}, "an entry names no record"),
        (
            {"task": "t", "series": [{"checkpoint": "a", "iteration": 1, "record": "none.json"}]},
            "none.json does not exist",
        ),
    ],
)
def test_what_holds_no_figures_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read_results(write(tmp_path, "r.json", content))


def spoiled(value: Any, bad: Any) -> list[Any]:
    """Return copies of a value with one of its entries, on any level, replaced."""
    if isinstance(value, list):
        return [[entry] for item in value for entry in spoiled(item, bad)]
    if not isinstance(value, dict):
        return []
    copies = [{**value, name: bad} for name in value]
    for name, entry in value.items():
        copies += [{**value, name: changed} for changed in spoiled(entry, bad)]
    return copies


@pytest.mark.long
@pytest.mark.parametrize("bad", [None, -7, "x", float("nan")], ids=str)
def test_a_record_with_any_entry_spoiled_is_compared_or_refused(tmp_path, bad):
    for record in (trained("lm"), BENCH, HARNESS, SCORED[0], at(1000, 20.0)):
        for content in spoiled(record, bad):
            path = write(tmp_path, "r.json", content)
            try:
                records = read_results(path)
                found = build_comparisons(records, include_limited=True)
            except InputError as error:
                assert "r.json" in str(error)
                continue
            assert render(found, "md")


# --- curves -----------------------------------------------------------------------------------


def test_a_curve_has_every_iteration_in_order_beside_the_papers_figure(tmp_path, run: Run):
    values = {3000: 24.0, 1000: 60.0, 2000: 30.0}
    path = series(tmp_path, *(at(i, value) for i, value in values.items()))
    (curve,) = curves(path)
    assert [row.place.iteration for row in curve.rows] == [1000, 2000, 3000]
    (panel,) = draw_curves([curve]).get_axes()[:1]
    points, level = panel.lines
    assert (list(points.get_xdata()), list(points.get_ydata())) == (
        [1000, 2000, 3000],
        [60, 30, 24],
    )
    assert set(level.get_ydata()) == {19.31} and level.get_label() == "paper, 355M: 19.31"
    labels = [axis.get_xlabel() for axis in draw_curves([curve]).get_axes()]
    assert labels == ["iteration", "samples trained on", "tokens trained on"]
    found = lines(run("report", "--curve", path, "--format", "csv").out)
    assert [(x["kind"], x["iteration"], x["consumed_samples"]) for x in found] == [
        *(("measured", str(i), str(8 * i)) for i in (1000, 2000, 3000)),
        ("paper", "", ""),
    ]


def test_runs_are_lines_and_axes_that_differ_are_panels(tmp_path):
    """Two runs whose folders have one name; another batch is another number of samples."""
    first = series(tmp_path, *(at(i, 90 - i, run="a/gpt") for i in (10, 20)), name="a")
    second = series(tmp_path, *(at(i, 80 - i, run="b/gpt", batch=16) for i in (10, 20)), name="b")
    (curve,) = curves(first, second)
    panels = draw_curves([curve]).get_axes()
    assert [panel.get_xlabel() for panel in panels] == [
        "iteration",
        "samples trained on",
        "tokens trained on",
    ]
    drawn = [(line.get_label(), list(line.get_xdata())) for line in panels[1].lines[:2]]
    assert drawn == [("a/gpt", [80, 160]), ("b/gpt", [160, 320])]


def test_the_nearest_size_is_named_where_the_paper_has_no_such_model(tmp_path):
    record = at(10, 900.0, task="lambada")
    record["checkpoint"] |= {"num_parameters": 1_000_000, "config": None}
    (curve,) = curves(series(tmp_path, record))
    (panel,) = draw_curves([curve]).get_axes()[:1]
    assert panel.lines[1].get_label() == "paper, 355M: 45.18 (nearest size)"
    assert panel.get_yscale() == "linear" and panel.get_ylabel() == "accuracy (%)"


def test_a_wide_range_of_perplexities_is_drawn_on_a_logarithmic_axis(tmp_path):
    scales = {}
    for top in (20.0, 2000.0):
        (curve,) = curves(series(tmp_path, at(10, top), at(20, 19.5)))
        scales[top] = draw_curves([curve]).get_axes()[0].get_yscale()
    assert scales == {20.0: "linear", 2000.0: "log"}


def test_a_picture_and_a_page_of_curves(tmp_path, run: Run):
    path = series(tmp_path, *(at(i, 60 - i / 100, task="lambada") for i in (1000, 2000)))
    picture, page = tmp_path / "curve.png", tmp_path / "curve.html"
    for output in (picture, picture, page):  # a page of an earlier report is replaced
        done = run("report", "--curve", path, "--output", output)
        assert done.code == 0, done.err
        assert done.out == f"curve of LAMBADA with 2 record(s): {output}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.count("<svg") == 1 and "paper, 355M: 45.18" in text and "<td>2,000</td>" in text
    assert not re.search(r"<(script|link|iframe|img)\b|@import", text)


def test_training_results_make_a_curve_too(tmp_path):
    record = fine_tuned("race", {"test": 80.0, "test-middle": 84.0, "test-high": 78.0})
    record["checkpoint"]["iteration"] = 500
    (curve,) = curves(write(tmp_path, "r.json", record))
    assert {level.key: level.value for level in curve.levels} == {
        "race": 83.0,
        "race_m": 86.9,
        "race_h": 81.5,
    }
    assert len(draw_curves([curve]).get_axes()) == 3


def test_what_makes_no_curve_is_refused(tmp_path, run: Run):
    path = series(tmp_path, at(1000, 20.0))
    for options, message in (
        (("--format", "png"), "give --curve and --output FILE.png"),
        (("--curve", "--format", "png"), "give --curve and --output FILE.png"),
        (("--curve", "--table", 3), "--curve and --table are two reports"),
    ):
        done = run("report", path, *options)
        assert done.code == 2 and message in done.err and done.out == ""
    with pytest.raises(InputError, match="says no iteration of its checkpoint"):
        curves(write(tmp_path, "release.json", zero_shot("lambada", 20.0)))
    limited = series(tmp_path, at(1000, 20.0, limit=3), name="limited")
    with pytest.raises(InputError, match="limited run"):
        curves(limited)
    (curve,) = curves(limited, include_limited=True)
    assert draw_curves([curve]).get_axes()[0].lines[0].get_label() == "gpt-a (limited)"
