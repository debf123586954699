"""Rows of RACE, MNLI, QQP and SQuAD against those of the code that the paper's tasks ran on.

`features.json` holds what Megatron-LM v2.5's tasks/race and tasks/glue made of real and tricky
texts, `squad.json` what Google's run_squad.py made of whole files.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer
from mlm_eval.tasks.finetune.features import PairFeatures
from mlm_eval.tasks.finetune.settings import load_recipe
from mlm_eval.tasks.finetune.spans import SpanFeatures
from mlm_eval.tasks.finetune.task import ExampleSet, make_task

pytestmark = pytest.mark.realdata

MNLI_COLUMNS = 12
ACCIDENTS = {
    # Megatron dies of a carriage return inside a line, which is a space here.
    "mnli-bare-cr-inside.tsv",
    # Rows without all columns: it takes what it hits, or dies.
    "qqp-no-label.tsv",
    "qqp-test-broken.tsv",
}
"""Files of which Megatron's answer is an accident: a refusal is as good."""


@pytest.fixture(scope="module")
def cases(oracles: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(
        (oracles / "finetune" / "features.json").read_text(encoding="utf-8")
    )
    return found


@pytest.fixture(scope="module")
def vocabularies(shared_data: Path) -> dict[str, Tokenizer]:
    return {
        name: load_tokenizer(vocab_file=shared_data / "bert" / f"bert-base-{name}-vocab.txt")
        for name in ("uncased", "cased")
    }


def features(
    task: str, path: Path, key: str, vocabularies: dict[str, Tokenizer]
) -> tuple[ExampleSet, PairFeatures]:
    """Return what a file becomes for a key such as `uncased-512`."""
    vocabulary, length = key.split("-")
    made = make_task(task)
    (part,) = made.read_part(str(path), "dev")
    recipe = load_recipe(f"{task}-megatron-336m", task=task, overrides={"seq_length": int(length)})
    cache = path.parent / "cache"
    cache.mkdir(exist_ok=True)
    return part, made.features(part, vocabularies[vocabulary], recipe, cache=cache)


def row(made: PairFeatures, index: int, choice: int = 0) -> tuple[list[int], int]:
    """Return the ids of a row, and how many of them are of type 0, which come first."""
    ids, types = made.row(index, choice)
    first = int((types == 0).sum())
    assert types.tolist() == [0] * first + [1] * (len(types) - first)
    return ids.tolist(), first


def test_real_questions_of_race(cases, vocabularies, shared_data, tmp_path):
    wanted = {case["file"] for case in cases["race_real"]}
    for archive in sorted((shared_data / "race").glob("*.tar.gz")):
        with tarfile.open(archive) as stream:
            for member in stream:
                if (name := member.name.removeprefix("./")) in wanted:
                    content = stream.extractfile(member)
                    assert content is not None
                    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                    (tmp_path / name).write_bytes(content.read())
    compared = 0
    for case in cases["race_real"]:
        for key, rows in case["expected"].items():
            part, made = features("race", tmp_path / case["file"], key, vocabularies)
            assert part.examples[case["question"]].label == case["label"]
            for choice, want in enumerate(rows):
                ids, first = row(made, case["question"], choice)
                digest = hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()
                assert (len(ids), first) == (want["length"], want["type0"]), (case["why"], key)
                assert digest == want["sha256"], (case["why"], key)
                compared += 1
    assert compared >= 4 * 20


def test_tricky_questions(cases, vocabularies, tmp_path):
    """Accents, marks, sigmas, private use, control characters, CJK, blanks."""
    path = tmp_path / "1.txt"
    differing = defaultdict(list)
    for case in cases["race_written"]:
        passage = {"article": case["article"], "questions": [case["question"]]}
        path.write_text(json.dumps({**passage, "options": [case["options"]], "answers": ["C"]}))
        for key, rows in case["expected"].items():
            _, made = features("race", path, key, vocabularies)
            for choice, want in enumerate(rows):
                if row(made, 0, choice) != (want["ids"], want["type0"]):
                    differing[case["why"]].append((key, choice))
    assert not differing


def test_rows_of_real_pairs(cases, vocabularies, shared_data, tmp_path):
    glue = shared_data / "glue"
    adversarial = json.loads((glue / "advglue_dev.json").read_text(encoding="utf-8"))
    path = tmp_path / "x.tsv"
    for case in cases["glue_rows"]:
        source, _, name = case["source"].partition(":")
        if name == "qqp":
            entry = adversarial["qqp"][case["row"]]
            header = "id\tqid1\tqid2\tq1\tq2\tis_duplicate"
            line = ["0", "1", "2", entry["question1"], entry["question2"], "1"]
        else:
            if name:
                entry = adversarial[name][case["row"]]
                pair = (entry["premise"], entry["hypothesis"])
            else:
                lines = (glue / source).read_text(encoding="utf-8").split("\n")
                pair = tuple(lines[case["row"]].split("\t")[1:])
            header = "\t".join(["c"] * MNLI_COLUMNS)
            line = ["0", *["x"] * 7, *pair, "neutral", "neutral"]
        path.write_text(f"{header}\n" + "\t".join(line) + "\n", encoding="utf-8", newline="")
        for key, want in case["expected"].items():
            _, made = features("qqp" if name == "qqp" else "mnli", path, key, vocabularies)
            assert row(made, 0) == (want["ids"], want["type0"]), (case["source"], case["row"], key)


def test_whole_files_of_pairs(cases, vocabularies, tmp_path):
    """Equal rows, or both refuse; where Megatron's answer is an accident, a refusal is as good."""
    refused = set()
    for case in cases["glue_files"]:
        path = tmp_path / case["name"]
        path.write_bytes(case["text"].encode())
        for key, want in case["expected"].items():
            try:
                part, made = features(case["task"], path, key, vocabularies)
            except InputError:
                refused.add(case["name"])
                assert "error" in want or case["name"] in ACCIDENTS, (case["name"], key)
                continue
            if "error" in want:
                assert case["name"] in ACCIDENTS, (case["name"], key)
                continue
            ours = [
                (int(example.id), int(made.labels[index]), *row(made, index))
                for index, example in enumerate(part.examples)
            ]
            theirs = [(x["uid"], x["label"], x["ids"], x["type0"]) for x in want]
            assert ours == theirs, (case["name"], key)
    assert refused == {"mnli-unknown-label.tsv", "qqp-no-label.tsv"}


def test_windows_of_squad_are_googles(oracles, vocabularies, shared_data, tmp_path):
    """Rows by a digest over ids and types, answers over their first and last places."""
    expected = json.loads((oracles / "finetune" / "squad.json").read_text(encoding="utf-8"))
    task = make_task("squad")
    for key, want in expected.items():
        file, length, stride = key.split()
        (part,) = task.read_part(str(shared_data / "squad" / file), "dev")
        recipe = load_recipe(
            "squad-v2-megatron-336m",
            task="squad",
            overrides={"seq_length": int(length), "doc_stride": int(stride)},
        )
        made = task.features(part, vocabularies["uncased"], recipe, cache=tmp_path)
        assert isinstance(made, SpanFeatures)
        rows, answers = hashlib.sha256(), hashlib.sha256()
        for index in range(len(made)):
            ids, types = made.row(index)
            name = part.examples[int(made.question[index])].id
            rows.update(name.encode() + b"\n" + ids.numpy().astype("<i4").tobytes())
            rows.update(types.numpy().astype("i1").tobytes())
            if name not in want["exceptions"]:
                first, last = made.labels[index]
                answers.update(f"{name} {first} {last}\n".encode())
        assert len(made) == want["windows"], key
        assert rows.hexdigest() == want["rows_sha256"], key
        assert answers.hexdigest() == want["labels_sha256_without_exceptions"], key
