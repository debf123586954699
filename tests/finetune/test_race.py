"""RACE: how questions become rows, where passages are read, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import tiny_bert
from support.paths import PROJECT
from support.tiny_bert import CLS, SEP, ids

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.tasks.finetune.race import Race, parse_passages, passage_files, question_with_option
from mlm_eval.tasks.finetune.settings import load_recipe
from mlm_eval.tasks.finetune.task import ExampleSet, check_names

SAMPLES = PROJECT / "checkpoints" / "samples" / "race"
LEVELS = ("middle", "high")

PASSAGE = {
    "article": "The cat\nsat on  the mat . The dog was red .",
    "questions": ["Who sat on the mat?", "The _ was _ ."],
    "options": [["the cat", "the dog", "a dog", "a mat"], ["cat", "dog", "mat", "red"]],
    "answers": ["A", "B"],
    "id": "middle7.txt",
}


def changed(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**PASSAGE, **changes}.items() if value is not None}


def read(source: Path | str, *roles: str) -> list[ExampleSet]:
    return Race().read(str(source), roles or ("train", "dev", "test"))


def summary(sets: list[ExampleSet]) -> list[tuple[str, str, int, int]]:
    return [(part.name, part.role, len(part.texts), len(part.examples)) for part in sets]


# --- one question ---


@pytest.mark.parametrize(
    ("question", "option", "text"),
    [
        ("Who sat?", "the cat", "Who sat? the cat"),
        ("The _ sat.", "cat", "The cat sat."),
        ("_ and _", "a dog", "a dog and a dog"),
        ("The cat __ here", "sat", "The cat satsat here"),
        ("It was  _  .", "red\n", "It was red ."),
        ("It was  _  . ", "red\n", "It was red. "),
        ("Why ?  ", "no . yes", "Why ? no. yes"),
    ],
)
def test_the_option_fills_the_gap_or_follows_the_question(question, option, text):
    assert question_with_option(question, option) == text


def test_the_rows_of_a_question(tmp_path):
    folder = tmp_path / "RACE" / "dev" / "middle"
    folder.mkdir(parents=True)
    (folder / "7.txt").write_text(json.dumps(PASSAGE))
    words = tiny_bert.tokenizer(tmp_path / "vocabulary")
    (part,) = read(tmp_path)
    assert part.texts == ["The cat sat on the mat. The dog was red ."]
    recipe = load_recipe(
        "race-megatron-336m", task="race", overrides={"seq_length": 14, "max_qa_length": 5}
    )
    features = Race().features(part, words, recipe, cache=tmp_path)
    first, second = features
    # "Who sat on the mat? the cat" is cut after "mat": all four rows are the same.
    assert [row.tolist() for row in first.rows] == [
        [CLS, *ids("who sat on the mat"), SEP, *ids("the cat sat on the mat"), SEP]
    ] * 4
    assert [row.tolist() for row in second.rows] == [
        [CLS, *ids(f"the {word} was {word} ."), SEP, *ids("the cat sat on the mat"), SEP]
        for word in ("cat", "dog", "mat", "red")
    ]
    assert all(types.tolist() == [0] * 7 + [1] * 7 for types in first.tokentypes)
    assert (first.label, second.label) == (0, 1)
    assert [example.id for example in part.examples] == ["middle7.txt-0", "middle7.txt-1"]


# --- files ---


def test_the_samples_are_in_the_form_of_race():
    sets = read(SAMPLES)
    assert summary(sets) == [
        (f"{role}-{level}", role, passages, 3 * passages)
        for role, passages in (("train", 12), ("dev", 4), ("test", 4))
        for level in LEVELS
    ]
    files = list(SAMPLES.rglob("*.txt"))
    assert sum(file.stat().st_size for file in files) < 300_000
    labels = Counter(example.label for part in sets for example in part.examples)
    assert set(labels) == {0, 1, 2, 3}
    assert min(labels.values()) >= 20  # of 120: no letter is a good guess
    for file in files:
        (passage,) = parse_passages(file.read_text(encoding="utf-8"), str(file))
        assert passage.id == f"{file.parent.name}{file.name}"
        assert all(len(set(options)) == 4 for options in passage.options)
    gaps = sum("_" in q for f in files for q in json.loads(f.read_text())["questions"])
    assert gaps == 41


def archive(folder: Path, target: Path, *, root: str = "RACE", mode: str = "w:gz") -> Path:
    """Pack a folder of passages as RACE is published; the files in reverse order."""
    with tarfile.open(target, mode) as stream:
        for file in sorted(folder.rglob("*"), reverse=True):
            name = f"{root}/{file.relative_to(folder)}"
            stream.add(file, name, recursive=False)
    return target


def test_folders_archives_and_parts_give_the_same(tmp_path):
    expected = read(SAMPLES)
    packed = archive(SAMPLES, tmp_path / "RACE.tar.gz")
    halves = tmp_path / "halves"
    halves.mkdir()
    for role in ("train", "dev", "test"):
        archive(SAMPLES / role, halves / f"{role}.tar", root=f"./RACE/{role}", mode="w")
    inside = tmp_path / "inside" / "RACE"
    shutil.copytree(SAMPLES, inside)
    for source in (packed, halves, inside.parent, inside):
        found = read(source)
        assert summary(found) == summary(expected)
        for one, other in zip(found, expected, strict=True):
            assert (one.sha256, one.texts, one.examples) == (
                other.sha256,
                other.texts,
                other.examples,
            )
    assert not (tmp_path / "RACE").exists()  # nothing was unpacked


def test_one_role_of_an_archive(tmp_path):
    packed = archive(SAMPLES, tmp_path / "any.tgz")
    assert summary(read(packed, "dev")) == [
        ("dev-middle", "dev", 4, 12),
        ("dev-high", "dev", 4, 12),
    ]
    assert summary(Race().read_part(str(packed), "test")) == [
        ("test-middle", "test", 4, 12),
        ("test-high", "test", 4, 12),
    ]


@pytest.mark.parametrize(
    ("path", "role", "names"),
    [
        ("dev/middle", "dev", ["dev-middle"]),
        ("dev", "dev", ["dev-middle", "dev-high"]),
        ("train/high", "train", ["train-high"]),
        ("test/high", "dev", ["dev-test-high"]),
        ("dev/middle/13.txt", "dev", ["dev-middle"]),
    ],
)
def test_a_part_is_named_by_its_path(path, role, names):
    found = check_names(Race().read_part(str(SAMPLES / path), role))
    assert [(part.name, part.role) for part in found] == [(name, role) for name in names]


def test_a_part_elsewhere_is_named_by_its_folder_or_file(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(SAMPLES / "dev" / "middle" / "13.txt", folder / "a.txt")
    names = [
        check_names(Race().read_part(str(path), "dev"))[0].name
        for path in (folder, folder / "a.txt")
    ]
    assert names == ["dev-mine", "dev-a"]


def test_two_sets_of_one_name_are_refused(tmp_path):
    parts = [part for _ in range(2) for part in Race().read_part(str(SAMPLES / "dev"), "dev")]
    with pytest.raises(InputError, match="both make a set named dev-middle"):
        check_names(parts)


def test_files_are_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "dev" / "middle"
    folder.mkdir(parents=True)
    for number in (10, 9, 100):
        (folder / f"{number}.txt").write_text(json.dumps(changed(id=None)))
    (folder / "._9.txt").write_bytes(b"\x00\x05\x16\x07")  # what macOS puts beside a file
    (part,) = read(tmp_path)
    assert [example.id for example in part.examples[::2]] == ["9.txt-0", "10.txt-0", "100.txt-0"]


def test_several_passages_in_one_file(tmp_path):
    path = tmp_path / "all.txt"
    path.write_text("\n\n".join([json.dumps(changed(id=None))] * 2) + "\n")
    (part,) = Race().read_part(str(path), "dev")
    assert [example.id for example in part.examples] == [
        "all.txt-0",
        "all.txt-1",
        "all.txt#1-0",
        "all.txt#1-1",
    ]


# --- `datasets` ---


def hub_rows(role: str) -> list[dict[str, Any]]:
    """Return the samples as the Hub's ehovy/race has them: a row a question."""
    rows = []
    for level in LEVELS:
        for file in sorted((SAMPLES / role / level).iterdir()):
            entry = json.loads(file.read_text(encoding="utf-8"))
            for question, options, answer in zip(
                entry["questions"], entry["options"], entry["answers"], strict=True
            ):
                rows.append(
                    {
                        "example_id": entry["id"],
                        "article": entry["article"],
                        "answer": answer,
                        "question": question,
                        "options": options,
                    }
                )
    return rows


def test_a_datasets_folder_gives_the_same(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {"train": "train", "validation": "dev", "test": "test"}
    datasets.DatasetDict(
        {split: datasets.Dataset.from_list(hub_rows(role)) for split, role in splits.items()}
    ).save_to_disk(tmp_path / "hub")
    found = read(tmp_path / "hub")
    expected = read(SAMPLES)
    assert summary(found) == summary(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.sha256, one.examples) == (other.sha256, other.examples)
    (part, _) = Race().read_part(f"{tmp_path / 'hub'}::test", "dev")
    assert part.name == "test-middle"


def test_a_datasets_folder_with_other_columns_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"example_id": "middle1.txt", "article": "a", "question": "b", "options": ["c"] * 4}]
    datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)}).save_to_disk(
        tmp_path / "hub"
    )
    with pytest.raises(InputError, match="has no column 'answer'; it has example_id, article"):
        read(tmp_path / "hub", "dev")
    with pytest.raises(InputError, match="has no split train; it has validation"):
        read(tmp_path / "hub", "train")


# --- faults ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", r"line 2 holds \[1\]; expected a JSON object"),
        (json.dumps(changed(article=None)), "line 2: 'article' is missing; expected a string"),
        (json.dumps(changed(article=3)), "line 2: 'article' is 3; expected a string"),
        (json.dumps(changed(questions="no")), "line 2: 'questions' is 'no'; expected a list"),
        (json.dumps(changed(answers=["A"])), "line 2 has 2 questions, 2 lists of options and 1"),
        (json.dumps(changed(answers=["A", "E"])), "line 2: the answer 'E' is not one of A, B, C"),
        (json.dumps(changed(answers=["A", ""])), "line 2: the answer '' is not one of A"),
        (json.dumps(changed(answers=["A", "AB"])), "line 2: the answer 'AB' is not one of A"),
        (json.dumps(changed(options=[["a"] * 3, ["b"] * 4])), "line 2: the options .* not 4 str"),
        (
            json.dumps(changed(options=[["a"] * 4, ["b", "c", "d", 5]])),
            "the option 5 is not a string",
        ),
        (json.dumps(changed(questions=["a", None])), "the question None is not a string"),
        (json.dumps(changed(article="\ud800")), "line 2 holds half of a surrogate pair"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    path = tmp_path / "dev" / "middle" / "3.txt"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(PASSAGE) + "\n" + line)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "dev" / "middle" / "3.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"{}\n\xff\xfe")
    with pytest.raises(InputError, match=r"3.txt, line 2 is not UTF-8 text \(byte 0xff\)"):
        read(tmp_path)


def test_a_cut_archive_is_named(tmp_path):
    packed = archive(SAMPLES, tmp_path / "RACE.tar.gz")
    packed.write_bytes(packed.read_bytes()[:-3000])
    with pytest.raises(InputError, match="RACE.tar.gz is not an archive that can be read"):
        read(packed)
    packed.write_bytes(b"not an archive")
    with pytest.raises(InputError, match="RACE.tar.gz is not an archive"):
        read(packed)


def test_a_damaged_member_of_an_archive_is_named(tmp_path):
    path = tmp_path / "RACE.tar.gz"
    with tarfile.open(path, "w:gz") as stream:
        member = tarfile.TarInfo("RACE/dev/high/5.txt")
        member.size = 2
        stream.addfile(member, io.BytesIO(b"{}"))
    with pytest.raises(InputError, match="member RACE/dev/high/5.txt, line 1: 'article' is miss"):
        read(path)


def test_nothing_there_is_told(tmp_path):
    with pytest.raises(InputError, match="holds no passages for dev; expected RACE/"):
        read(tmp_path, "dev")
    with pytest.raises(InputError, match=r"holds no \*.txt file"):
        Race().read_part(str(tmp_path), "dev")
    for missing in (tmp_path / "RACE", tmp_path / "RACE.tar.gz"):
        with pytest.raises(InputError, match="does not exist; give a file, a folder or a `data"):
            read(missing)


# --- the published data ---


@pytest.mark.realdata
def test_the_published_dev_and_test_sets(shared_data):
    assert summary(read(shared_data / "race" / "RACE_dev_test.tar.gz")) == [
        ("dev-middle", "dev", 368, 1436),
        ("dev-high", "dev", 1021, 3451),
        ("test-middle", "test", 362, 1436),
        ("test-high", "test", 1045, 3498),
    ]


@pytest.mark.realdata
def test_the_published_training_set(shared_data):
    """The counts are those of docs/megatron.md, "RACE"; every gap is filled."""
    passages, questions, gaps = Counter[str](), Counter[str](), Counter[str]()
    for file in passage_files(shared_data / "race" / "RACE_train.tar.gz"):
        (passage,) = parse_passages(file.text, file.where)
        assert file.split == "train"
        passages[file.level] += 1
        questions[file.level] += len(passage.questions)
        for question, options in zip(passage.questions, passage.options, strict=True):
            if "_" in question:
                gaps[file.level] += 1
                assert ("_" in question_with_option(question, options[0])) == ("_" in options[0])
    assert passages == {"middle": 6_409, "high": 18_728}
    assert questions == {"middle": 25_421, "high": 62_445}
    assert gaps == {"middle": 14_178, "high": 31_897}


@pytest.mark.realdata
def test_published_questions_become_the_rows_of_the_rule(shared_data, tmp_path):
    """The first questions of dev-high, put together step by step.

    The rule is that of docs/megatron.md, "Text preparation" and "RACE".
    """
    from mlm_eval.checkpoints.tokenizer import load_tokenizer

    words = load_tokenizer(vocab_file=shared_data / "bert" / "bert-base-uncased-vocab.txt")
    (whole,) = [p for p in read(shared_data / "race", "dev") if p.name == "dev-high"]
    part = whole.limited(60)
    assert (len(part.examples), part.total) == (60, 3451)
    recipe = load_recipe("race-megatron-336m", task="race")
    features = Race().features(part, words, recipe, cache=tmp_path)
    cut = 0
    for example, sample in zip(part.examples, features, strict=True):
        article = words.encode(part.texts[example.second])
        for text, row, types in zip(example.firsts, sample.rows, sample.tokentypes, strict=True):
            tokens = [words.cls_id, *words.encode(text)[:128], words.sep_id]
            num_first = len(tokens)
            tokens += article
            cut += len(tokens) > 511
            tokens = [*tokens[:511], words.sep_id]
            assert row.tolist() == tokens
            assert types.tolist() == [0] * num_first + [1] * (len(tokens) - num_first)
    assert 0 < cut < 240
