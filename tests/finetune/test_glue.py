"""MNLI and QQP: columns, labels, bare quotes, names of sets, and what is refused."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support import tiny_bert
from support.tiny_bert import CLS, SEP, ids

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.tasks.finetune.glue import Glue, Mnli, Qqp, set_name
from mlm_eval.tasks.finetune.settings import load_recipe
from mlm_eval.tasks.finetune.task import Example, ExampleSet, check_names, make_task

MNLI_TRAIN = [
    "index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
    "sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label",
]  # fmt: skip
MNLI_DEV = [*MNLI_TRAIN[:11], "label2", "label3", "label4", "label5", "gold_label"]
QQP_DEV = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]


def write(path: Path, rows: list[list[str]], *, end: str = "\n") -> Path:
    """Write a file of GLUE: tabs and line ends, nothing quoted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(row) + end for row in rows).encode())
    return path


def mnli_row(index: int, first: str, second: str, label: str, *, columns: int = 12) -> list[str]:
    filling = [label] * (columns - 11) if columns > 10 else []
    last = [label] if columns > 10 else []
    return [str(index), *"abcdefg", first, second, *filling, *last]


def read(task: type[Glue], source: Path, *roles: str) -> list[ExampleSet]:
    return task().read(str(source), roles or ("train", "dev", "test"))


def content(part: ExampleSet) -> list[tuple[str, str, str, int | None]]:
    return [(e.id, e.firsts[0], part.texts[e.second], e.label) for e in part.examples]


# --- MNLI ---


def test_mnli_columns_and_labels(tmp_path):
    write(
        tmp_path / "MNLI" / "train.tsv",
        [
            MNLI_TRAIN,
            mnli_row(5, 'He said "no', "It's  over . Now", "contradiction"),
            mnli_row(6, '"quoted" text', 'a "', "entailment"),
            mnli_row(7, " a ", "b", "neutral"),
        ],
    )
    (part,) = read(Mnli, tmp_path)
    assert (part.name, part.role, part.labelled) == ("train", "train", True)
    assert content(part) == [
        ("5", 'He said "no', "It's over. Now", 0),
        ("6", '"quoted" text', 'a "', 1),
        ("7", "a", "b", 2),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_mnli_as_published(tmp_path, end):
    """Twelve columns, sixteen, and ten, which are a test set's: no labels."""
    row = {name: mnli_row(0, "a", "b", "neutral", columns=n) for name, n in (("d", 16), ("t", 10))}
    for name in ("matched", "mismatched"):
        write(tmp_path / f"dev_{name}.tsv", [MNLI_DEV, row["d"]], end=end)
        write(tmp_path / f"test_{name}.tsv", [MNLI_TRAIN[:10], row["t"]], end=end)
    write(tmp_path / "train.tsv", [MNLI_TRAIN, mnli_row(1, "a", "b", "neutral")], end=end)
    found = read(Mnli, tmp_path)
    assert [(part.name, part.labelled) for part in found] == [
        ("train", True),
        ("dev-matched", True),
        ("dev-mismatched", True),
        ("test-matched", False),
        ("test-mismatched", False),
    ]
    assert [content(part)[0][1:] for part in found] == [("a", "b", 2)] * 3 + [("a", "b", None)] * 2


def test_mnli_fields_are_what_csv_calls_unquoted(tmp_path):
    rows = [MNLI_TRAIN, mnli_row(1, 'x "y', '" z', "neutral"), mnli_row(2, '"', "'", "neutral")]
    path = write(tmp_path / "train.tsv", rows)
    with path.open(newline="") as stream:
        expected = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    (part,) = read(Mnli, tmp_path)
    assert [c[:3] for c in content(part)] == [(row[0], row[8], row[9]) for row in expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (mnli_row(1, "a", "b", ""), "line 3 has the label ''"),
        (mnli_row(1, " ", "b", "neutral"), "line 3 has an empty sentence1 or sentence2"),
        (mnli_row(1, "a", "", "neutral"), "line 3 has an empty sentence"),
        (mnli_row(1, "a", "b", "neutral")[:-1], "line 3 has 11 columns, its header 12"),
        ([""], "line 3 has 1 columns"),
    ],
)
def test_a_damaged_row_of_mnli_is_named(tmp_path, row, message):
    good = mnli_row(0, "a", "b", "neutral")
    path = write(tmp_path / "train.tsv", [MNLI_TRAIN, good, row, good])
    with pytest.raises(InputError, match=message) as caught:
        read(Mnli, tmp_path)
    assert str(path) in str(caught.value)


def test_a_header_that_names_nothing_is_read_by_position(tmp_path):
    """As Megatron reads every file; said aloud. One known name is enough to go by names."""
    header = ["c"] * 12
    write(tmp_path / "train.tsv", [header, mnli_row(7, "a", "b", "entailment")])
    (part,) = read(Mnli, tmp_path)
    assert content(part) == [("7", "a", "b", 1)]
    assert "columns 9 and 10 of 12 are taken" in part.warnings[0]
    header[0] = "premise"
    write(tmp_path / "train.tsv", [header, mnli_row(7, "a", "b", "entailment")])
    with pytest.raises(InputError, match="no column sentence1 or premise beside"):
        read(Mnli, tmp_path)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_file_without_a_row_to_use_is_refused(tmp_path, rows):
    write(tmp_path / "train.tsv", [MNLI_TRAIN, *[mnli_row(0, "a", "b", "-")] * rows])
    with pytest.raises(InputError, match="holds no row to use: .* without a gold label"):
        read(Mnli, tmp_path)


def test_more_votes_than_the_header_names_are_no_fault(tmp_path):
    """As in Megatron the last column is the label; a sentence with a tab in it is a fault."""
    votes = [*mnli_row(0, "a", "b", "neutral"), "-", "entailment"]
    write(tmp_path / "train.tsv", [MNLI_TRAIN, votes])
    (part,) = read(Mnli, tmp_path)
    assert content(part) == [("0", "a", "b", 1)]
    row = mnli_row(0, "a", "b", "neutral")
    write(tmp_path / "train.tsv", [MNLI_TRAIN, [*row[:9], "cut in", "two", *row[10:]]])
    with pytest.raises(InputError, match="line 2 has 13 columns, its header 12"):
        read(Mnli, tmp_path)


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            Mnli,
            [["a", "b"], ["c", "d"]],
            "no column sentence1 or premise beside .*; expected a",
        ),
        (Mnli, [MNLI_TRAIN], "holds no rows; expected a header and rows of MNLI"),
        (Mnli, [], "holds no rows|is empty"),
        (Qqp, [["a", "b"], ["c", "d"]], "no column question1 beside question2 in its header"),
        (
            Qqp,
            [QQP_DEV, ["1", "2", "3", "a", "b", "2"]],
            "line 2 has the label '2'; expected one of .* or 0 to 1",
        ),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path, task, rows, message):
    write(tmp_path / "train.tsv", rows)
    with pytest.raises(InputError, match=message):
        read(task, tmp_path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "train.tsv").write_bytes("\t".join(MNLI_TRAIN).encode() + b"\n\xff")
    with pytest.raises(InputError, match="train.tsv, line 2 is not UTF-8"):
        read(Mnli, tmp_path)


# --- QQP ---


def test_qqp_columns_labels_and_rows_that_are_left_out(tmp_path):
    path = write(
        tmp_path / "QQP" / "dev.tsv",
        [
            QQP_DEV,
            ["133", "1", "2", 'Who is "he', "Who is he?", "1"],
            ["134", "3", "4", "only five columns", "0"],
            ["135", "3", "4", "", "no first question", "0"],
            ["136", "3", "4", "no second question", "  ", "0"],
            ["137", "5", "6", "a", "b", "0"],
        ],
    )
    (part,) = read(Qqp, tmp_path, "dev")
    assert content(part) == [("133", 'Who is "he', "Who is he?", 1), ("137", "a", "b", 0)]
    assert part.warnings == [
        f"{path}: 3 row(s) without 6 columns or with an empty side are left out, as Megatron does "
        f"(line 3, 4, 5)"
    ]


def test_qqp_test_files_have_three_columns(tmp_path):
    write(tmp_path / "test.tsv", [["id", "question1", "question2"], ["0", "a", "b"]])
    (part,) = read(Qqp, tmp_path, "test")
    assert content(part) == [("0", "a", "b", None)]
    assert not part.labelled


# --- both ---


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("dev_matched.tsv", "dev-matched"),
        ("test_mismatched.tsv", "test-mismatched"),
        ("train.tsv", "train"),
        ("dev.tsv", "dev"),  # Megatron's own stripping leaves "de"
    ],
)
def test_names_of_sets(file, name):
    assert set_name(file) == name


def test_a_part_has_the_name_of_its_file_and_role(tmp_path):
    row = mnli_row(1, "a", "b", "neutral")
    path = write(tmp_path / "hard_cases.tsv", [MNLI_TRAIN, row])
    (part,) = check_names(Mnli().read_part(str(path), "dev"))
    assert (part.name, part.role) == ("dev-hard-cases", "dev")


def test_the_row_of_a_pair(tmp_path):
    words = tiny_bert.tokenizer(tmp_path)
    part = ExampleSet(
        "dev", "dev", "", "", ["a dog", "the mat"], [Example("7", ("The cat sat",), 1, 2)]
    )
    recipe = load_recipe("mnli-megatron-336m", task="mnli")
    (sample,) = Mnli().features(part, words, recipe, cache=tmp_path)
    assert sample.rows[0].tolist() == [CLS, *ids("the cat sat"), SEP, *ids("the mat"), SEP]
    assert sample.tokentypes[0].tolist() == [0] * 5 + [1] * 3
    assert (sample.label, sample.index, len(sample.rows)) == (2, 0, 1)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds none of train.tsv, dev_matched.tsv, .*GLUE's MNLI"):
        read(Mnli, tmp_path)
    with pytest.raises(InputError, match="train.tsv is a file; --data takes GLUE's folder QQP"):
        read(Qqp, write(tmp_path / "train.tsv", [QQP_DEV]))
    with pytest.raises(InputError, match="gone does not exist"):
        read(Qqp, tmp_path / "gone")


def save_hub(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    rows = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(rows).save_to_disk(folder)
    return folder


def test_mnli_of_the_hub(tmp_path):
    """The Hub counts entailment 0, neutral 1, contradiction 2, and a test set's labels -1."""

    def row(label: int) -> dict[str, Any]:
        return {"premise": "a", "hypothesis": "b", "label": label, "idx": label + 10}

    folder = save_hub(
        tmp_path / "hub",
        train=[row(0), row(1), row(2)],
        validation_matched=[row(1)],
        validation_mismatched=[row(2)],
        test_matched=[row(-1)],
    )
    found = read(Mnli, folder)
    names = [(part.name, part.labelled) for part in found]
    assert names == [
        ("train", True),
        ("dev-matched", True),
        ("dev-mismatched", True),
        ("test-matched", False),
    ]
    assert [Mnli.classes[label] for *_, label in content(found[0])] == [
        "entailment",
        "neutral",
        "contradiction",
    ]
    assert content(found[3]) == [("9", "a", "b", None)]
    (part,) = Mnli().read_part(f"{folder}::validation_mismatched", "dev")
    assert part.name == "dev-mismatched"
    with pytest.raises(InputError, match="has no split nothing; it has train, validation_matched"):
        Mnli().read_part(f"{folder}::nothing", "dev")


def test_qqp_of_the_hub(tmp_path):
    row = {"question1": "a", "question2": "b", "label": 1, "idx": 3}
    folder = save_hub(tmp_path / "hub", train=[row], validation=[{**row, "label": 0}])
    found = read(Qqp, folder)
    assert [(part.name, content(part)) for part in found] == [
        ("train", [("3", "a", "b", 1)]),
        ("dev", [("3", "a", "b", 0)]),
    ]
    mixed = save_hub(tmp_path / "mixed", validation=[row, {**row, "label": -1}])
    with pytest.raises(InputError, match="has labels in some rows only"):
        read(Qqp, mixed, "dev")
    other = save_hub(tmp_path / "other", validation=[{**row, "label": 7}])
    with pytest.raises(InputError, match="row 1: the label 7 is not known for QQP"):
        read(Qqp, other, "dev")


@pytest.mark.parametrize(
    ("task", "source", "path", "config"),
    [
        ("mnli", "nyu-mll/glue", "nyu-mll/glue", "mnli"),
        ("qqp", "glue", "nyu-mll/glue", "qqp"),
        ("mnli", "SetFit/mnli:default", "SetFit/mnli", "default"),
        ("race", "ehovy/race", "ehovy/race", "all"),
        ("race", "race:high", "ehovy/race", "high"),
        ("squad", "rajpurkar/squad", "rajpurkar/squad", None),
        ("squad", "squad_v2", "rajpurkar/squad_v2", None),
    ],
)
def test_names_of_the_hub_are_asked_for_by_their_config(
    tmp_path, monkeypatch, task, source, path, config
):
    asked = []

    def load(name: Any) -> Any:
        asked.append((name.path, name.config, name.split))
        raise InputError("asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlm_eval.tasks.data.sources.load_dataset", load)
    with pytest.raises(InputError, match="asked"):
        make_task(task).read(source, ["dev"])
    assert asked == [(path, config, None)]


# --- real texts ---


def mnli_of_textfooler(source: Path, target: Path) -> Path:
    """Rewrite pairs (label, premise, hypothesis) to GLUE's dev columns."""
    rows = [MNLI_DEV]
    for index, line in enumerate(source.read_text(encoding="utf-8").splitlines()):
        label, first, second = line.split("\t")
        rows.append(mnli_row(index, first, second, label, columns=16))
    return write(target, rows)


@pytest.mark.realdata
def test_real_pairs_of_mnli(shared_data, tmp_path):
    for name in ("matched", "mismatched"):
        source = shared_data / "glue" / f"textfooler_mnli_{name}.tsv"
        mnli_of_textfooler(source, tmp_path / f"dev_{name}.tsv")
    found = read(Mnli, tmp_path, "dev")
    assert [(part.name, len(part.examples)) for part in found] == [
        ("dev-matched", 1000),
        ("dev-mismatched", 1000),
    ]
    lines = (shared_data / "glue" / "textfooler_mnli_matched.tsv").read_text().splitlines()
    labels = Counter(line.split("\t")[0] for line in lines)
    assert labels == Counter(Mnli.classes[label] for *_, label in content(found[0]))
    assert found[0].examples[0].firsts[0].startswith("In Temple Bar , the bookshop")


@pytest.mark.realdata
def test_real_pairs_of_qqp(shared_data, tmp_path):
    entries = json.loads((shared_data / "glue" / "advglue_dev.json").read_text())["qqp"]
    rows = [
        [str(e["idx"]), "0", "0", e["question1"], e["question2"], str(e["label"])] for e in entries
    ]
    write(tmp_path / "QQP" / "dev.tsv", [QQP_DEV, *rows])
    (part,) = read(Qqp, tmp_path, "dev")
    assert len(part.examples) == 78
    assert part.warnings == []
    assert [label for *_, label in content(part)] == [entry["label"] for entry in entries]


# --- files whose columns stand elsewhere ---

SNLI_OF_GLUE = [
    "index", "captionID", "pairID", "sentence1_binary_parse", "sentence2_binary_parse",
    "sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label",
]  # fmt: skip
MULTINLI = [
    "gold_label", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse",
    "sentence2_parse", "sentence1", "sentence2", "promptID", "pairID", "genre", "label1",
    "label2", "label3", "label4", "label5",
]  # fmt: skip


@pytest.mark.parametrize(
    ("header", "file"),
    [
        (SNLI_OF_GLUE, "dev.tsv"),
        (MULTINLI, "multinli_1.0_dev_matched.txt"),
        (["label", "premise", "hypothesis"], "dev.tsv"),
        (MNLI_DEV, "dev_matched.tsv"),
    ],
)
def test_columns_are_found_by_their_names(header, file, tmp_path):
    """Texts that are all different show which columns were taken, whatever their order."""
    label = "gold_label" if "gold_label" in header else "label"
    rows = [[f"{name} of {number}" for name in header] for number in range(4)]
    labels = ("neutral", "contradiction", "entailment", "-")
    for row, text in zip(rows, labels, strict=True):
        row[header.index(label)] = text
    if label == "label":
        rows.pop()
    path = write(tmp_path / file, [header, *rows], end="\r\n")
    (part,) = Mnli().read_part(str(path), "dev")
    names = ("sentence1", "sentence2") if "sentence1" in header else ("premise", "hypothesis")
    found = [(first, second, label) for _, first, second, label in content(part)]
    assert found == [
        tuple(f"{name} of {row}" for name in names) + (Mnli.classes.index(labels[row]),)
        for row in range(3)
    ]
    assert len(part.warnings) == (label == "gold_label")
    assert all("1 row(s) without a gold label (-) are left out" in text for text in part.warnings)


def test_numbers_as_labels_count_as_the_hub_does(tmp_path):
    header = ["premise", "hypothesis", "label"]
    rows = [["a", "b", str(number)] for number in range(3)]
    (part,) = Mnli().read_part(str(write(tmp_path / "dev.tsv", [header, *rows])), "dev")
    names = [Mnli.classes[label] for *_, label in content(part)]
    assert names == ["entailment", "neutral", "contradiction"]
    header[2] = "gold_label"
    with pytest.raises(InputError, match="label '0'; expected one of .*column gold_label"):
        Mnli().read_part(str(write(tmp_path / "dev.tsv", [header, *rows])), "dev")


# --- tables with other columns than GLUE's on the Hub ---


def json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("file", ["snli_1.0_dev.jsonl", "multinli_1.0_dev_matched.jsonl"])
def test_json_lines_of_snli_and_multinli_are_their_text_files(file, tmp_path):
    """As published, with lists of the annotators' labels and parses beside what counts."""
    rows: list[dict[str, Any]] = [
        {
            "annotator_labels": [label, "neutral"],
            "captionID": f"{number}.jpg#0",
            "gold_label": label,
            "pairID": f"{number}.jpg#0r1n",
            "sentence1": f' A "person" on\ta horse {number}. ',
            "sentence1_parse": "(ROOT (S))",
            "sentence2": f"Someone rides {number}\u2028",
        }
        for number, label in enumerate(("neutral", "entailment", "-", "contradiction"))
    ]
    (found,) = Mnli().read_part(str(json_lines(tmp_path / file, rows)), "dev")
    header = [name for name in rows[0] if name != "annotator_labels"]
    cells = [[row[name].replace("\t", " ") for name in header] for row in rows]
    text = write(tmp_path / file.replace(".jsonl", ".txt"), [header, *cells])
    (expected,) = Mnli().read_part(str(text), "dev")
    assert content(found) == content(expected) and len(content(found)) == 3
    assert (found.name, found.labelled) == (expected.name, True)
    left_out = "1 row(s) without a gold label (-) are left out, as is the custom (line 3)"
    assert found.warnings == [f"{tmp_path / file}: {left_out}"]


def test_numbers_of_a_table_count_as_the_hub_does(tmp_path):
    """SNLI of the Hub: -1 where the annotators did not agree, or in all rows of a hidden set."""
    rows = [{"premise": f"p {n}", "hypothesis": f"h {n}", "label": n} for n in (0, -1, 1, 2)]
    path = tmp_path / "validation-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (part,) = Mnli().read_part(str(path), "dev")
    assert part.name == "dev" and len(part.warnings) == 1
    assert [(id, first, Mnli.classes[label or 0]) for id, first, _, label in content(part)] == [
        ("0", "p 0", "entailment"),
        ("2", "p 1", "neutral"),
        ("3", "p 2", "contradiction"),
    ]
    hidden = [{**row, "label": -1} for row in rows]
    (part,) = Mnli().read_part(str(json_lines(tmp_path / "test.jsonl", hidden)), "test")
    assert not part.labelled and len(content(part)) == 4 and part.warnings == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentence1": ["a"]}, r"row 2: sentence1 is \['a'\]; expected a text or a number"),
        ({"sentence2": " "}, "line 2 has an empty sentence1 or sentence2"),
        ({"gold_label": "perhaps"}, "line 2 has the label 'perhaps'"),
        ({"gold_label": None}, "row 2: gold_label is None"),
    ],
)
def test_a_damaged_row_of_a_table_is_named(change, message, tmp_path):
    row = {"gold_label": "neutral", "sentence1": "a", "sentence2": "b"}
    path = json_lines(tmp_path / "dev.jsonl", [row, row | change])
    with pytest.raises(InputError, match=message):
        Mnli().read_part(str(path), "dev")
