"""Fine-tuning commands on a BERT of a few thousand weights and eight examples each."""

from __future__ import annotations

import json
from pathlib import Path

from support import tiny_bert

PASSAGE = {
    "article": "the cat sat on the mat",
    "questions": ["who sat?", "where was the cat?"],
    "options": [["the cat", "the dog", "a mat", "red"]] * 2,
    "answers": ["A", "C"],
}
QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
MNLI = "index\tsentence1\tsentence2\tgold_label"
LABELS = ("entailment", "neutral", "contradiction")

ALL = """--device cpu --max-steps 4 --evaluate-every 2 --epochs 4 --global-batch 4 --micro-batch 2
--seq-length 32 --save-minutes 0""".split()
OF_TASKS = {
    "race": ["--max-qa-length", "16"],
    "mnli": [],
    "qqp": [],
    "squad": ["--max-query-length", "8", "--doc-stride", "8"],
}
"""Commands with the options that they alone take."""


def write(folder: Path) -> Path:
    """Write a BERT and the data of every task; return the folder."""
    tiny_bert.checkpoint(folder / "bert", num_layers=1)
    tiny_bert.write_vocabulary(folder / "bert" / "tokenizer")
    for task in OF_TASKS:
        (folder / task).mkdir()
    for role in ("train", "dev"):
        level = folder / "race" / role / "high"
        level.mkdir(parents=True)
        for number in range(4):
            passage = PASSAGE | {"id": f"high{number}.txt"}
            (level / f"{number}.txt").write_text(json.dumps(passage))
        rows = [f"{n}\t2\t3\twho sat {n}?\twhere was the cat?\t{n % 2}" for n in range(8)]
        (folder / "qqp" / f"{role}.tsv").write_text("\n".join([QQP, *rows]) + "\n")
        questions = [
            {
                "id": f"q{n}",
                "question": f"who sat {n}?",
                "answers": [{"text": "cat", "answer_start": 4}],
            }
            for n in range(8)
        ]
        paragraph = {"context": PASSAGE["article"], "qas": questions}
        data = {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}
        (folder / "squad" / f"{role}-v1.1.json").write_text(json.dumps(data))
    rows = [f"{n}\tthe cat sat {n}\tthe dog is red\t{LABELS[n % 3]}" for n in range(8)]
    for name in ("train", "dev_matched", "dev_mismatched"):
        (folder / "mnli" / f"{name}.tsv").write_text("\n".join([MNLI, *rows]) + "\n")
    return folder


def line(folder: Path, task: str, output: Path, *more: object) -> list[object]:
    """Return a command that trains four steps, evaluates twice and saves at each step."""
    given = ["--ckpt", folder / "bert", "--data", folder / task, "--output-dir", output]
    return [task, *given, *ALL, *OF_TASKS[task], *more]
