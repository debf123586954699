"""Report: the paper's figures, what is compared with what, refusals, and the four formats."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.folders.result_records import RECIPES, fine_tuned, write, zero_shot
from support.paths import GOLDEN, PROJECT, SAMPLES

from mlm_eval import cli
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.model.sizes import SIZES, paper_parameters
from mlm_eval.reporting import plots
from mlm_eval.reporting.render import render
from mlm_eval.reporting.tables import MEASURED, Table, short_count
from mlm_eval.tasks.paper import build_tables, load_paper
from mlm_eval.tasks.records import ResultRecord, read_record


def table_of(folder: Path, *records: Any, **options: Any) -> Table:
    """Return the one table of some records."""
    paths = [write(folder, f"{i}.json", record) for i, record in enumerate(records)]
    (table,) = build_tables([read_record(path) for path in paths], **options)
    return table


def measured(table: Table) -> list[Any]:
    """Return the measured rows."""
    return [row for row in table.rows if row.kind == MEASURED]


# --- the paper's figures ---


@pytest.mark.parametrize(
    ("table", "model", "figures"),
    [
        (3, "355M", {"wikitext103": 19.31, "lambada": 45.18}),
        (3, "8.3B", {"wikitext103": 10.81, "lambada": 66.51}),
        (3, "Previous state of the art", {"wikitext103": 15.79, "lambada": 63.24}),
        (5, "Megatron-336M", {"mnli_m": 89.7, "mnli_mm": 90.0, "qqp": 92.3, "race_h": 81.5}),
        (5, "Megatron-3.9B", {"squad1_f1": 95.5, "squad1_em": 90.0, "squad2_em": 88.5}),
        (5, "Megatron-3.9B ensemble", {"squad2_f1": 91.7, "race": 90.9, "race_m": 93.1}),
    ],
)
def test_the_published_figures_are_there(table: int, model: str, figures: dict[str, float]):
    (row,) = (r for r in load_paper()[f"table{table}"]["rows"] if r["model"] == model)
    assert {name: row[name] for name in figures} == figures


@pytest.mark.parametrize("number", [*range(1, 9)])
def test_every_table_of_the_paper_is_there_with_its_rows_numbered(number: int):
    rows = load_paper()[f"table{number}"]["rows"]
    assert [row["row"] for row in rows] == list(range(1, len(rows) + 1))


def test_the_shapes_are_those_that_names_stand_for():
    for number in (1, 2, 4):
        for row in load_paper()[f"table{number}"]["rows"]:
            layers, hidden, heads = SIZES[row["size"]]
            assert (row["num_layers"], row["hidden_size"]) == (layers, hidden)
            # Table 1 has the 8.3B model with 32 heads, Table 2 with 24.
            assert row["num_attention_heads"] == (32 if (number, layers) == (1, 72) else heads)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_parameters_round_to_the_papers(number: int):
    for row in load_paper()[f"table{number}"]["rows"]:
        assert short_count(paper_parameters(row["size"])) == row["model"]


def test_the_recipes_that_ship_are_table_6():
    import tomllib

    folder = PROJECT / "tasks" / "finetune" / "recipes"
    names = {"squad1": "squad-v1", "squad2": "squad-v2"}
    for row in load_paper()["table6"]["rows"]:
        size = row["size"].removeprefix("bert-")
        file = folder / f"{names.get(row['task'], row['task'])}-megatron-{size}.toml"
        recipe = tomllib.loads(file.read_text())
        assert [recipe[name] for name in ("global_batch", "lr", "epochs")] == [
            row[name] for name in ("global_batch", "lr", "epochs")
        ], file.name


# --- what is compared ---


def test_two_records_of_one_checkpoint_are_one_row_beside_the_row_of_their_size(tmp_path: Path):
    table = table_of(tmp_path, zero_shot("wikitext103", 19.37), zero_shot("lambada", 46.26))
    assert [row.model for row in table.rows[:2]] == ["355M", "mine"]
    (row,) = measured(table)
    assert row.compared_with == "355M" and row.as_in_paper
    gaps = {name: cell.difference for name, cell in row.cells.items()}
    assert gaps == pytest.approx({"wikitext103": 0.06, "lambada": 1.08})


def test_records_of_two_checkpoints_are_two_rows(tmp_path: Path):
    other = zero_shot("lambada", 61.0, size="gpt2-2.5b", name="other")
    table = table_of(tmp_path, zero_shot("wikitext103", 19.37), other)
    assert [(row.model, row.compared_with) for row in measured(table)] == [
        ("mine", "355M"),
        ("other", "2.5B"),
    ]


def test_two_records_of_one_benchmark_are_two_rows_with_names_of_their_own(tmp_path: Path):
    records = [zero_shot("wikitext103", value, stride=s) for value, s in ((19.4, 32), (20.0, 512))]
    table = table_of(tmp_path, *records, zero_shot("lambada", 46.0))
    rows = measured(table)
    assert [row.model for row in rows] == ["mine #1", "mine #2"]
    assert [sorted(row.cells) for row in rows] == [["lambada", "wikitext103"], ["wikitext103"]]


def test_the_same_digest_read_with_other_settings_is_another_model(tmp_path: Path):
    other = zero_shot("lambada", 30.0)
    other["checkpoint"]["config"]["num_attention_heads"] = 8
    rows = measured(table_of(tmp_path, zero_shot("wikitext103", 19.4), other))
    assert len(rows) == 2
    assert rows[1].notes == ("num_attention_heads 8, in the paper 16",)
    assert not rows[1].as_in_paper


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (zero_shot("wikitext103", 20.0, stride=512), "stride 512, in the paper 32"),
        (zero_shot("wikitext103", 20.0, seq_length=512), "seq_length 512, in the paper 1024"),
        (zero_shot("wikitext103", 20.0, vocab="true"), "vocab true, in the paper padded"),
        (zero_shot("lambada", 60.0, target="last-token"), "target last-token, in the paper word"),
        (
            zero_shot("lambada", 60.0, data={"paper_file": False, "warnings": ["it is shorter"]}),
            "it is shorter",
        ),
        (
            zero_shot("lambada", 60.0, data={"path": "mine.jsonl"}),
            "data mine.jsonl, in the paper OpenAI's lambada_test.jsonl",
        ),
    ],
)
def test_what_differs_from_the_paper_is_said_at_the_figure(
    tmp_path: Path, record: dict[str, Any], reason: str
):
    (row,) = measured(table_of(tmp_path, record))
    (cell,) = row.cells.values()
    assert cell.notes == (reason,)
    assert not row.as_in_paper
    assert reason.partition("'")[0] in render([table_of(tmp_path, record)], "md")


def test_another_protocol_is_named(tmp_path: Path):
    record = zero_shot("lambada", 60.0)
    record["protocol"] = "megatron-last-token"
    (row,) = measured(table_of(tmp_path, record))
    assert "protocol megatron-last-token, in the paper megatron-paper" in row.cells["lambada"].notes


def test_a_size_that_the_paper_does_not_have_is_compared_with_nothing(tmp_path: Path):
    record = zero_shot("wikitext103", 30.0)
    record["checkpoint"] |= {"num_parameters": 124_000_000, "config": None}
    table = table_of(tmp_path, record)
    row = table.rows[-1]
    assert row.kind == MEASURED and row.compared_with is None
    assert row.cells["wikitext103"].difference is None
    assert row.notes == ("124,000,000 parameters; the paper's models have 355M, 2.5B, 8.3B",)


def test_a_perplexity_without_a_number_is_shown_as_none(tmp_path: Path):
    record = zero_shot("wikitext103", 0.0)
    record["metrics"] = {"adjusted_ppl": None, "adjusted_ppl_note": "infinity"}
    table = table_of(tmp_path, record)
    (row,) = measured(table)
    assert row.cells["wikitext103"].value is None and not row.as_in_paper
    assert "| none (a) |" in render([table], "md")


# --- fine-tuning ---

FIGURES = {
    "mnli": {"dev-matched": 89.9, "dev-mismatched": 90.1},
    "qqp": {"dev": 92.0},
    "squad-1.1": {"f1": 94.0, "exact": 87.9},
    "squad-2.0": {"f1": 88.5, "exact": 85.0},
    "race": {"dev": 84.0, "test": 82.5, "test-middle": 86.0, "test-high": 81.0},
}


def all_fine_tuned(**options: Any) -> list[dict[str, Any]]:
    """Return a record of each fine-tuning benchmark."""
    return [fine_tuned(task, figures, **options) for task, figures in FIGURES.items()]


def test_five_records_of_one_checkpoint_fill_a_row_of_table_5(tmp_path: Path):
    table = table_of(tmp_path, *all_fine_tuned())
    assert table.number == 5
    (row,) = measured(table)
    assert row.compared_with == "Megatron-336M"
    assert row.as_in_paper, [cell.notes for cell in row.cells.values()]
    assert {name: cell.value for name, cell in row.cells.items()} == pytest.approx(
        {
            "mnli_m": 89.9,
            "mnli_mm": 90.1,
            "qqp": 92.0,
            "squad1_f1": 94.0,
            "squad1_em": 87.9,
            "squad2_f1": 88.5,
            "squad2_em": 85.0,
            "race": 82.5,
            "race_m": 86.0,
            "race_h": 81.0,
        }
    )
    assert row.cells["race"].difference == pytest.approx(82.5 - 83.0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"seeds": [1]}, "1 seed, in the paper the median of 5"),
        ({"lr": 3e-5}, "lr 3e-05, in the paper 2e-05"),
        ({"global_batch": 16}, "global_batch 16, in the paper 32"),
        ({"epochs": 1}, "epochs 1, in the paper 3"),
        ({"max_steps": 7}, "stopped after 7 steps (--max-steps)"),
        (
            {"eval_only": True, "seeds": []},
            "evaluation only: how the model was fine-tuned is not recorded",
        ),
        (
            {"total": 100},
            "examples in the sets (in the paper): test-middle 100 (1,436), test 100 (4,934)",
        ),
    ],
)
def test_another_fine_tuning_is_said(tmp_path: Path, settings: dict[str, Any], reason: str):
    figures = {name: FIGURES["race"][name] for name in ("test", "test-middle")}
    (row,) = measured(table_of(tmp_path, fine_tuned("race", figures, **settings)))
    assert reason in row.cells["race"].notes


def test_race_trained_on_middle_alone_is_said(tmp_path: Path):
    record = fine_tuned("race", FIGURES["race"])
    record["counts"]["train_examples"] = 25421
    (row,) = measured(table_of(tmp_path, record))
    assert row.cells["race"].notes == ("trained on 25,421 examples, in the paper 87,866",)


def test_race_on_its_dev_set_is_marked(tmp_path: Path):
    (row,) = measured(table_of(tmp_path, fine_tuned("race", {"dev": 84.0, "dev-middle": 88.0})))
    assert sorted(row.cells) == ["race", "race_m"]
    assert row.cells["race"].value == pytest.approx(84.0)
    assert "development set" in row.cells["race"].notes[0]


def test_a_single_seeds_record_has_no_median_and_is_read_all_the_same(tmp_path: Path):
    record = fine_tuned("qqp", {"dev": 92.0}, seeds=[1])
    record["metrics"] = record["metrics"]["median"]
    (row,) = measured(table_of(tmp_path, record))
    assert row.cells["qqp"].value == pytest.approx(92.0)


def test_an_ensemble_is_compared_with_the_papers_ensemble(tmp_path: Path):
    records = [
        fine_tuned("race", FIGURES["race"], size="bert-3.9b", ensemble=5),
        fine_tuned("squad-2.0", FIGURES["squad-2.0"], size="bert-3.9b"),
    ]
    rows = measured(table_of(tmp_path, *records))
    assert [(row.model, row.compared_with) for row in rows] == [
        ("mine", "Megatron-3.9B"),
        ("mine, ensemble of 5", "Megatron-3.9B ensemble"),
    ]
    (small,) = measured(table_of(tmp_path, fine_tuned("race", FIGURES["race"], ensemble=5)))
    assert small.compared_with is None and "ensemble" in small.notes[0]


# --- refusals ---


def test_both_tables_come_from_both_kinds(tmp_path: Path):
    paths = [
        write(tmp_path, "race.json", fine_tuned("race", FIGURES["race"])),
        write(tmp_path, "wiki.json", zero_shot("wikitext103", 19.4)),
    ]
    tables = build_tables([read_record(path) for path in paths])
    assert [table.number for table in tables] == [3, 5]
    with pytest.raises(InputError, match=r"race\.json is a record of race.*Table 5, not 3"):
        build_tables([read_record(path) for path in paths], number=3)


@pytest.mark.long
@pytest.mark.parametrize("option", ["limit", "train_limit", "dev_limit"])
def test_limited_runs_are_refused_or_marked(tmp_path: Path, option: str):
    record = zero_shot("lambada", 46.0, **{option: 10})
    flag = f"--{option.replace('_', '-')} 10"
    with pytest.raises(InputError, match=f"limited run \\({flag}\\).*--include-limited"):
        table_of(tmp_path, record)
    table = table_of(tmp_path, record, include_limited=True)
    (row,) = measured(table)
    assert row.limited and not row.as_in_paper
    for fmt in ("md", "latex", "html"):
        text = render([table], fmt)
        assert "LIMITED RUN" in text
        assert flag.replace("--", "-{}-" if fmt == "latex" else "--").replace("_", "") in text
    assert ",True," in render([table], "csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a result record"),
        ("[1, 2]", "it holds [1, 2], expected an object"),
        ('{"a": 1}', "it has no 'task'"),
        ('{"task": "lambada", "protocol": "p"}', "it has no 'metrics'"),
        (zero_shot("lambada", 1.0) | {"metrics": {}}, "'accuracy' of lambada; expected a number"),
        (zero_shot("lambada", 1.0) | {"metrics": {"accuracy": "x"}}, "'x' for 'accuracy'"),
        (zero_shot("lambada", 1.0) | {"checkpoint": {}}, "it has no 'checkpoint.num_parameters'"),
        (fine_tuned("race", {}), "hold none of test, test-middle, test-high"),
        (fine_tuned("squad-1.1", {}, version=""), "which version of SQuAD"),
    ],
)
def test_files_that_are_no_records_are_refused(tmp_path: Path, content: Any, message: str):
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        read_record(write(tmp_path, "r.json", content))
    assert "r.json" in str(refused.value)


def test_missing_files_folders_and_unknown_tables_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        read_record(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"is a folder; give the result\.json"):
        read_record(tmp_path)
    record = read_record(write(tmp_path, "r.json", zero_shot("lambada", 1.0)))
    with pytest.raises(InputError, match="choose 3 or 5"):
        build_tables([record], number=4)


# --- formats ---


def golden_tables() -> list[Table]:
    """Return tables with every kind of row: the sample's own records, as in the paper, and not."""
    records = GOLDEN / "records"
    folder = Path("records")  # the paths that the files show
    made = {
        "wikitext103.json": zero_shot("wikitext103", 19.37, name="megatron_lm_345m"),
        "lambada.json": zero_shot("lambada", 46.26, name="megatron_lm_345m"),
        "stride.json": zero_shot(
            "wikitext103", 13.9, size="gpt2-2.5b", name="a|b_2.5b", stride=512
        ),
        "limited.json": zero_shot("lambada", 62.5, size="gpt2-2.5b", name="a|b_2.5b", limit=100),
    }
    made |= {f"{task}.json": fine_tuned(task, FIGURES[task]) for task in RECIPES}
    made["ensemble.json"] = fine_tuned("race", FIGURES["race"], size="bert-3.9b", ensemble=5)
    made["one-seed.json"] = fine_tuned("race", FIGURES["race"], name="quick", seeds=[1], epochs=1)
    found = [read_record(path) for path in sorted(records.glob("*.json"))]
    shown = [ResultRecord(str(folder / Path(r.path).name), r.benchmark, r.values) for r in found]
    for name, values in made.items():
        task = values["task"] + values["settings"].get("version", "")[:1]
        shown.append(ResultRecord(str(folder / name), task, values))
    return build_tables(shown, include_limited=True)


def without_plots(page: str) -> str:
    """Return a page without its plots, whose bytes belong to a version of matplotlib."""
    return re.sub(r"<svg.*?</svg>", "<svg/>", page, flags=re.DOTALL)


@pytest.mark.long
@pytest.mark.parametrize("fmt", ["md", "latex", "csv", "html"])
def test_golden_files(fmt: str):
    """To accept a change: MLM_EVAL_WRITE_GOLDEN=1 pytest test_report.py; then read the diff."""
    text = render(golden_tables(), fmt)
    text = without_plots(text) if fmt == "html" else text
    golden = GOLDEN / f"report.{'tex' if fmt == 'latex' else fmt}"
    if os.environ.get("MLM_EVAL_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


class _Page(HTMLParser):
    """Collects a page's tables, what it refers to, and whether its tags are balanced."""

    VOID = {"meta", "link", "br", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.references: list[str] = []
        self.cell: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""
        self.references += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "style")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell or "")
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell += data


@pytest.mark.long
def test_the_page_stands_alone_and_holds_the_tables_and_plots():
    tables = golden_tables()
    text = render(tables, "html")
    page = _Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert len(page.tables) == len(tables) == 2
    for table, cells in zip(tables, page.tables, strict=True):
        gaps = sum(row.compared_with is not None for row in table.rows)
        assert len(cells) == 1 + len(table.rows) + gaps
        assert {len(row) for row in cells} == {len(table.columns) + 4}
    assert ["355M", "paper", "355M", "19.31", "45.18", ""] in page.tables[0]
    assert ["", "difference from 355M", "", "+0.06", "+1.08", ""] in page.tables[0]
    # Nothing is fetched: references stay in the page, the style imports nothing, no scripts.
    outside = [ref for ref in page.references if re.search(r"https?:|//|@import", ref)]
    assert outside == []
    assert not re.search(r"<(script|link|iframe|img)\b|@import|url\(\s*['\"]?(?!#)", text)
    plots = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(plots) == 2
    for plot in plots:
        labels = " ".join(ElementTree.fromstring(plot).itertext())
        assert "paper" in labels


def test_every_figure_is_marked_in_the_plot():
    """The plot of Table 3 has a mark for each measured figure: hollow where not as in the paper."""
    from matplotlib.figure import Figure

    table = golden_tables()[0]
    figure = Figure()
    plots.draw_against_size(figure, table)
    rows = measured(table)
    for panel, column in zip(figure.axes, table.columns, strict=True):
        marks = {line.get_label(): line for line in panel.lines}
        assert list(marks["paper"].get_ydata()) == [
            row.cells[column.key].value
            for row in table.rows
            if row.kind != MEASURED and row.parameters
        ]
        for row in rows:
            line = marks[plots.legend_label(row)]
            cell = row.cells.get(column.key)
            assert list(line.get_ydata()) == ([] if cell is None else [cell.value])
            assert line.get_fillstyle() == ("full" if row.as_in_paper else "none")


def test_csv_holds_every_figure_unrounded():
    tables = golden_tables()
    lines = list(csv.DictReader(io.StringIO(render(tables, "csv"))))
    assert len(lines) == sum(len(row.cells) for table in tables for row in table.rows)
    (line,) = (x for x in lines if x["record"] == "records/sample-wikitext103.json")
    record = json.loads((GOLDEN / "records" / "sample-wikitext103.json").read_text())
    assert math.isclose(float(line["value"]), record["metrics"]["adjusted_ppl"], rel_tol=1e-15)
    assert line["as_in_paper"] == "False" and "parameters" in line["why_not"]


def test_latex_is_balanced():
    text = render(golden_tables(), "latex")
    assert len(re.findall(r"(?<!\\)\{", text)) == len(re.findall(r"(?<!\\)\}", text))
    opened = re.findall(r"\\begin\{(\w+)\}", text)
    assert sorted(opened) == sorted(re.findall(r"\\end\{(\w+)\}", text))
    for body in re.findall(r"\\midrule\n(.*?)\\bottomrule", text, flags=re.DOTALL):
        columns = {len(re.findall(r"(?<!\\)&", line)) for line in body.strip().splitlines()}
        assert len(columns) == 1
    assert "a|b\\_2.5b" in text


def test_markdown_rows_have_the_same_number_of_cells():
    text = render(golden_tables(), "md")
    assert "a\\|b_2.5b" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in rows}
    assert widths == {7, 15}


# --- the command ---


def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, str, str]:
    """Run a command line in this process; return its exit code, stdout and stderr."""
    monkeypatch.setattr("sys.argv", ["mlm-eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


@pytest.mark.long
def test_the_command_reports_fresh_records_of_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    samples = SAMPLES
    data = {
        "wikitext103": ["--data", samples / "text" / "wiki.sample.tokens", "--stride", "256"],
        "lambada": ["--data", samples / "text" / "lambada.sample.jsonl"],
    }
    records = [tmp_path / f"{task}.json" for task in data]
    shared = ("--ckpt", samples / "gpt", "--device", "cpu")
    for (task, options), record in zip(data.items(), records, strict=True):
        code, _, err = run_cli(monkeypatch, capsys, task, *shared, *options, "--output", record)
        assert code == 0, err
    page = tmp_path / "page.html"
    code, out, err = run_cli(
        monkeypatch, capsys, "report", *records, "--format", "html", "--output", page
    )
    assert (code, err) == (0, "") and str(page) in out
    accuracy = json.loads(records[1].read_text())["metrics"]["accuracy"]
    assert f"<td>{100 * accuracy:.2f}<sup>" in page.read_text()
    code, out, _ = run_cli(monkeypatch, capsys, "report", *records)
    assert f"| {100 * accuracy:.2f} (" in out


def test_the_command_refuses_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    bad = write(tmp_path, "bad.json", "{")
    code, out, err = run_cli(monkeypatch, capsys, "report", bad)
    assert (code, out) == (2, "")
    assert err.startswith("mlm-eval: ") and len(err.splitlines()) == 1
    code, _, err = run_cli(monkeypatch, capsys, "report", bad, "--format", "pdf")
    assert code == 2 and "md, latex, csv, html" in err


def _spoiled(value: Any, bad: Any) -> list[Any]:
    """Return copies of a record with one of its entries, on any level, replaced."""
    if not isinstance(value, dict):
        return []
    copies = [{**value, name: bad} for name in value]
    for name, entry in value.items():
        copies += [{**value, name: spoiled} for spoiled in _spoiled(entry, bad)]
    return copies


@pytest.mark.long
@pytest.mark.parametrize("bad", [None, 7, "x", [1], {"a": 1}, True], ids=str)
@pytest.mark.parametrize("kind", ["wikitext103", "lambada", "race", "squad-2.0"])
def test_a_record_with_any_entry_spoiled_is_reported_or_refused(
    kind: str, bad: Any, tmp_path: Path
):
    record = fine_tuned(kind, FIGURES[kind]) if kind in FIGURES else zero_shot(kind, 20.0)
    for spoiled in _spoiled(record, bad):
        try:
            table = table_of(tmp_path, spoiled, include_limited=True)
        except InputError as error:
            assert "0.json" in str(error)
        else:
            for fmt in ("md", "latex", "csv"):
                assert render([table], fmt)
