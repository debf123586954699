"""SQuAD: windows and labels, the best spans, answers as written, thresholds, and files."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import random_models, tiny_bert
from support.runs import training_runs
from support.tiny_bert import CLS, SEP, ids

from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer
from mlm_eval.engine.engine import Engine
from mlm_eval.tasks.finetune import metrics
from mlm_eval.tasks.finetune.features import Outputs
from mlm_eval.tasks.finetune.settings import Recipe, load_recipe
from mlm_eval.tasks.finetune.spans import SpanFeatures, best_spans, shows_most, token_span, windows
from mlm_eval.tasks.finetune.squad import Squad
from mlm_eval.tasks.finetune.task import Answered, ExampleSet, check_names
from mlm_eval.training.data import Sample, collate
from mlm_eval.training.objectives import SpanExtraction

CONTEXT = "The Red Cat sat on the mat, a Dog in the caf\u00e9."


def recipe(**overrides: Any) -> Recipe:
    return load_recipe("squad-v2-megatron-336m", task="squad", overrides=overrides)


def question(name: str, text: str, *answers: str, **more: Any) -> dict[str, Any]:
    found = [{"text": answer, "answer_start": CONTEXT.index(answer)} for answer in answers]
    return {"id": name, "question": text, "answers": found, **more}


def write(path: Path, questions: list[dict[str, Any]], *, version: str | None = "v2.0") -> Path:
    content: dict[str, Any] = {
        "data": [{"title": "T", "paragraphs": [{"context": CONTEXT, "qas": questions}]}]
    }
    if version is not None:
        content["version"] = version
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    return tiny_bert.tokenizer(tmp_path / "vocabulary")


@pytest.fixture
def dev(tmp_path: Path) -> ExampleSet:
    path = write(
        tmp_path / "squad" / "dev-v2.0.json",
        [
            question("q1", " Who sat? ", "Red Cat", is_impossible=False),
            question("q2", "where is the dog", "caf\u00e9", is_impossible=False),
            question("q3", "who was in the mat", is_impossible=True),
        ],
    )
    (part,) = check_names(Squad().read(str(path.parent), ["dev"]))
    return part


def prepare(part: ExampleSet, words: Tokenizer, cache: Path, **overrides: Any) -> SpanFeatures:
    found = Squad().features(part, words, recipe(**overrides), cache=cache)
    assert isinstance(found, SpanFeatures)
    return found


# --- windows ---


@pytest.mark.parametrize(
    ("count", "room", "stride", "expected"),
    [
        (5, 8, 3, [(0, 5)]),
        (8, 8, 3, [(0, 8)]),
        (9, 8, 3, [(0, 8), (3, 9)]),
        (14, 8, 3, [(0, 8), (3, 11), (6, 14)]),
        (15, 8, 3, [(0, 8), (3, 11), (6, 14), (9, 15)]),
        (7, 3, 128, [(0, 3), (3, 6), (6, 7)]),  # no token is passed over
        (0, 8, 3, [(0, 0)]),
    ],
)
def test_windows(count, room, stride, expected):
    assert list(windows(count, room, stride)) == expected


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0, 3, (0, 0)),
        (4, 8, (1, 2)),
        (5, 6, (1, 1)),  # inside of a token: that token
        (2, 5, (0, 1)),
        (3, 4, None),  # the space between two tokens
        (8, 9, None),
    ],
)
def test_the_tokens_that_characters_touch(begin, end, expected):
    starts, stops = np.array([0, 4, 7]), np.array([3, 7, 8])  # "The caf e": two pieces of a word
    assert token_span(starts, stops, begin, end) == expected


CONTEXT_IDS = "the red cat sat on the mat , a dog in the c ##a ##f ##e ."


def test_the_rows_of_questions(dev, words, tmp_path):
    features = prepare(dev, words, tmp_path)
    tail = [SEP, *ids(CONTEXT_IDS), SEP]
    assert [sample.rows[0].tolist() for sample in features] == [
        [CLS, *ids("who sat ?"), *tail],
        [CLS, *ids("where is the dog"), *tail],
        [CLS, *ids("who was in the mat"), *tail],
    ]
    # [CLS] who sat ? [SEP] the red cat: 6 and 7; four pieces of "café"; no answer.
    assert [sample.label for sample in features] == [(6, 7), (18, 21), (0, 0)]
    assert features[0].tokentypes[0].tolist() == [0] * 5 + [1] * 18


def test_a_long_passage_has_several_windows(dev, words, tmp_path):
    """Rows of 14: after [CLS] and a question of 3 there is room for 8 of the 17 tokens."""
    features = prepare(dev, words, tmp_path, seq_length=14, doc_stride=5, max_query_length=3)
    assert features.question.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert features.start.tolist() == [0, 5, 10] * 3
    assert features.stop.tolist() == [8, 13, 17] * 3
    pieces = CONTEXT_IDS.split()
    assert features[1].rows[0].tolist() == [
        CLS,
        *ids("who sat ?"),
        SEP,
        *ids(" ".join(pieces[5:13])),
        SEP,
    ]
    assert (
        features[8].rows[0].tolist()
        == [
            CLS,
            *ids("who was in"),  # the question is cut too
            SEP,
            *ids(" ".join(pieces[10:17])),
            SEP,
        ]
    )
    # "Red Cat" is in the first window; of "café" the second holds one piece, the third all.
    assert [features[i].label for i in range(6)] == [(6, 7), (0, 0), (0, 0)] + [
        (0, 0),
        (0, 0),
        (5 + 2, 5 + 5),
    ]
    assert max(features.row_lengths) == 14
    assert features.cut_rows() == 0  # windows fit, nothing is lost


def test_every_row_is_padded_to_the_whole_length(dev, words, tmp_path):
    """So that the softmax over positions does not depend on what else is in a batch."""
    features = prepare(dev, words, tmp_path, seq_length=40, max_query_length=8)
    lengths = features.row_lengths[:2].tolist()
    assert max(lengths) < 40
    batch = collate([features[0], features[1]])
    assert batch.tokens.shape == batch.tokentypes.shape == (2, 40)
    assert batch.stated_width == 40
    assert batch.padding_mask.sum(dim=1).tolist() == lengths
    assert not batch.tokens[batch.padding_mask == 0].any()


def test_the_loss_is_that_of_googles_run_squad(tmp_path):
    """The softmax of an answer's ends runs over all positions, padding included.

    `compute_loss` in google-research/bert's run_squad.py: the mean of two cross entropies over
    `seq_length`. Against transformers' model on rows of that length, alone and together.
    """
    from transformers import AutoModelForQuestionAnswering

    config = dataclasses.replace(
        random_models.BERT, lm_head=False, binary_head=False, pooler=False, qa_head=True
    )
    checkpoint = random_models.checkpoint(config)
    convert(checkpoint, "hf", tmp_path / "hf")
    theirs = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "hf").eval()
    engine = Engine.load(checkpoint)
    width = 14
    samples = [
        dataclasses.replace(sample, width=width)
        for sample in training_runs.samples("qa_head", 5, longest=9)
    ]

    def losses(chosen: list[Sample]) -> torch.Tensor:
        with torch.no_grad():
            return SpanExtraction().loss_and_hits(engine.model, collate(chosen), None)[0]

    batch = collate(samples)
    with torch.no_grad():
        out = theirs(batch.tokens, batch.padding_mask, batch.tokentypes)
    assert out.start_logits.shape == (5, width)
    expected = sum(
        F.cross_entropy(logits, batch.labels[:, end], reduction="none")
        for end, logits in enumerate((out.start_logits, out.end_logits))
    )
    torch.testing.assert_close(losses(samples), expected / 2, rtol=1e-5, atol=0)
    for sample, loss in zip(samples, losses(samples), strict=True):
        torch.testing.assert_close(losses([sample])[0], loss, rtol=1e-5, atol=0)
    # The positions of padding have their share: without them the losses are smaller.
    without = losses([dataclasses.replace(sample, width=0) for sample in samples])
    assert (without < losses(samples) * (1 - 1e-3)).all()


def test_rows_without_room_for_a_passage_are_refused(dev, words, tmp_path):
    with pytest.raises(InputError, match="seq_length 67 has no room for a passage beside a ques"):
        prepare(dev, words, tmp_path, seq_length=67)
    assert len(prepare(dev, words, tmp_path, seq_length=68)) == 3


def test_questions_of_one_id_are_refused_where_their_answers_are_judged(tmp_path):
    twice = [question("q1", "who sat", "Red"), question("q1", "what sat", "Red")]
    path = write(tmp_path / "twice.json", twice)
    for role in ("dev", "test"):
        with pytest.raises(InputError, match="holds 2 questions with the id 'q1'; give each an id"):
            Squad().read_file(path, role)
    assert len(Squad().read_file(path, "train").examples) == 2


# --- spans ---


def test_each_token_belongs_to_the_window_that_shows_most_around_it():
    shown = shows_most(np.array([0, 4, 8]), np.array([8, 12, 14]))
    owners = np.full(14, -1)
    for window, (start, mask) in enumerate(zip((0, 4, 8), shown, strict=True)):
        places = np.flatnonzero(mask) + start
        assert (owners[places] == -1).all()  # one window each
        owners[places] = window
    # Token 5 has 2 behind it in window 0 and 1 before it in window 1; for 6 it is 1 and 2.
    assert owners.tolist() == [0] * 6 + [1] * 4 + [2] * 4


def brute(
    starts: np.ndarray, ends: np.ndarray, allowed: np.ndarray, *, max_length: int
) -> list[tuple[float, int, int]]:
    found = [
        (float(starts[i] + ends[j]), i, j)
        for i in range(len(starts))
        for j in range(i, min(i + max_length, len(starts)))
        if allowed[i]
    ]
    return sorted(found, key=lambda item: (-item[0], item[1], item[2]))


@pytest.mark.parametrize("max_length", [1, 4, 30])
def test_the_search_finds_what_trying_everything_finds(max_length):
    noise = np.random.default_rng(3)
    lengths = [1, 2, 3, 7, 40, 41, 100, 5, 0, 12]
    # Quarters, so that many sums are equal.
    starts = [np.round(noise.normal(size=n) * 4).astype(np.float32) / 4 for n in lengths]
    ends = [np.round(noise.normal(size=n) * 4).astype(np.float32) / 4 for n in lengths]
    allowed = [noise.random(n) < 0.7 for n in lengths]
    found = best_spans(starts, ends, allowed, n_best=6, max_length=max_length)
    for window in range(len(lengths)):
        expected = brute(starts[window], ends[window], allowed[window], max_length=max_length)
        kept = [
            (score, i, j)
            for score, i, j in zip(
                found.scores[window].tolist(),
                found.first[window].tolist(),
                found.last[window].tolist(),
                strict=True,
            )
            if score > -math.inf
        ]
        assert len(kept) == min(6, len(expected))
        assert [score for score, *_ in kept] == [score for score, *_ in expected[:6]]
        assert set(kept) <= set(expected)
        assert kept == sorted(kept, key=lambda item: (-item[0], item[1], item[2]))


# --- answers ---


def outputs(features: SpanFeatures, scores: dict[int, dict[int, tuple[float, float]]]) -> Outputs:
    """Return scores of (start, end) by window and place in its row; -9 elsewhere."""
    offsets = np.concatenate([[0], np.cumsum(features.row_lengths)])
    values = np.full((int(offsets[-1]), 2), -9, np.float32)
    for window, places in scores.items():
        for place, pair in places.items():
            values[offsets[window] + place] = pair
    return Outputs(values, offsets, 1)


def answered(part: ExampleSet, features: SpanFeatures, found: Outputs, **more: Any) -> Answered:
    records = Squad().records(part, features, found, recipe(**more))
    return Answered(part.name, part.role, part.labelled, part.version, records)


def test_answers_are_cut_out_as_they_are_written(dev, words, tmp_path):
    features = prepare(dev, words, tmp_path)
    found = outputs(
        features,
        {
            0: {0: (0, 0), 6: (5, -9), 7: (-9, 5), 8: (-9, 4)},  # "Red Cat", then "Red Cat sat"
            1: {0: (1, 1), 18: (3, -9), 21: (-9, 3)},  # "café"
            2: {0: (4, 4), 7: (2, 2)},  # "The"
        },
    )
    part = answered(dev, features, found, n_best=2)
    judgement = Squad().judge([part], null_threshold=0.0)
    first, second, third = judgement.predictions["dev"]
    assert (first["text"], second["text"], third["text"]) == ("Red Cat", "caf\u00e9", "")
    assert [entry["text"] for entry in first["n_best"]] == ["Red Cat", "Red Cat sat"]
    shares = [entry["probability"] for entry in first["n_best"]]
    assert shares == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])
    assert [r["null_odds"] for r in (first, second, third)] == [-10.0, -4.0, 4.0]
    assert judgement.metrics["exact"] == judgement.metrics["f1"] == 100.0
    dev_figures = judgement.metrics["dev"]
    assert (dev_figures["HasAns_total"], dev_figures["NoAns_total"]) == (2, 1)


def test_no_span_is_longer_than_allowed_or_outside_the_passage(dev, words, tmp_path):
    features = prepare(dev, words, tmp_path)
    length = int(features.row_lengths[0])
    found = outputs(
        features,
        {
            0: {
                1: (9, 9),  # the question
                length - 1: (9, 9),  # the last [SEP]
                10: (3, -9),  # starts behind all the ends
                5: (2, -9),
                9: (-9, 2),  # five tokens
                8: (-9, 1),  # four tokens
            }
        },
    )
    part = answered(dev, features, found, n_best=1, max_answer_length=4)
    assert part.records[0]["n_best"][0]["text"] == "The Red Cat sat"


def test_windows_of_a_question_compete(dev, words, tmp_path):
    features = prepare(dev, words, tmp_path, seq_length=14, doc_stride=5, max_query_length=3)
    # Token 7 of the passage, a comma: place 12 of window 0, place 7 of window 1, which shows more.
    found = outputs(
        features,
        {
            0: {0: (2, 2), 12: (9, 9)},
            1: {0: (1, 1), 7: (4, 4)},
            2: {0: (3, 3), 11: (3, 3)},
        },
    )
    part = answered(dev, features, found, n_best=3)
    best, second, _ = part.records[0]["n_best"]
    assert (best["text"], second["text"]) == (",", ".")
    assert part.records[0]["null_odds"] == 2 - 8  # the lowest of 4, 2 and 6


def record(name: str, answers: list[str] | None, odds: float, **shares: float) -> dict[str, Any]:
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    n_best = [{"text": text, "probability": share} for text, share in ranked]
    return {"id": name, "answers": answers, "n_best": n_best, "null_odds": odds}


RECORDS = [
    record("1", ["x"], -3.0, x=0.9, y=0.1),
    record("2", [], -2.0, x=1.0),
    record("3", ["z"], 1.0, z=0.6, y=0.4),
    record("4", [], 2.0, x=1.0),
]


def judge(records: list[dict[str, Any]], threshold: float | None, version: str = "2.0") -> Any:
    part = Answered("dev", "dev", True, version, records)
    return Squad().judge([part], null_threshold=threshold)


def test_the_threshold_is_found_on_the_dev_set_or_given():
    # Answers up to: none 50 %, -3: 75, -2: 50, 1: 75, 2: 50. The first best one is taken.
    found = judge(RECORDS, None).metrics
    assert (found["exact"], found["f1"], found["dev"]["null_threshold"]) == (75.0, 75.0, -3.0)
    assert found["dev"]["best_f1"] == 75.0
    fixed = judge(RECORDS, 0.0)
    assert (fixed.metrics["exact"], fixed.metrics["dev"]["null_threshold"]) == (50.0, 0.0)
    assert fixed.metrics["dev"]["best_f1"] == 75.0  # told all the same
    assert [r["text"] for r in fixed.predictions["dev"]] == ["x", "x", "", ""]


def test_test_sets_are_judged_at_the_dev_sets_threshold():
    test = Answered("test", "test", True, "2.0", [record("9", [], -2.5, w=1.0)])
    hidden = Answered("test-b", "test", False, "1.1", [record("8", None, -4.0, w=1.0)])
    dev = Answered("dev", "dev", True, "2.0", RECORDS)
    found = Squad().judge([test, hidden, dev])
    assert found.metrics["test"]["null_threshold"] == -3.0
    assert found.metrics["test"]["exact"] == 100.0
    assert "test-b" not in found.metrics
    assert [found.predictions[name][0]["text"] for name in ("test", "test-b")] == ["", "w"]


def test_no_threshold_is_fitted_to_a_test_set():
    test = Answered("test", "test", True, "2.0", RECORDS)
    found = Squad().judge([test]).metrics["test"]
    assert (found["null_threshold"], found["exact"], found["best_exact"]) == (0.0, 50.0, 75.0)


def test_version_1_always_has_an_answer():
    found = judge([RECORDS[0], RECORDS[2]], None, version="1.1")
    assert found.metrics["dev"] == {"exact": 100.0, "f1": 100.0, "total": 2}
    assert [r["text"] for r in found.predictions["dev"]] == ["x", "z"]


def test_several_dev_sets_are_pooled():
    parts = [
        Answered("dev-a", "dev", True, "2.0", RECORDS[:1]),
        Answered("dev-b", "dev", True, "2.0", RECORDS[1:]),
    ]
    found = Squad().judge(parts).metrics
    assert (found["dev"]["total"], found["dev-a"]["total"], found["dev-b"]["total"]) == (4, 1, 3)
    assert found["dev-a"]["null_threshold"] == found["dev"]["null_threshold"] == -3.0
    assert found["exact"] == found["dev"]["exact"]
    assert Squad().summary(found)["score"] == found["f1"]


def test_an_ensemble_averages_answers_and_odds():
    merged = Squad().merge(
        [
            record("1", ["x"], -3.0, x=0.6, y=0.4),
            record("1", ["x"], 1.0, y=0.9, z=0.1),
            record("1", ["x"], -1.0, x=1.0),
        ]
    )
    assert [entry["text"] for entry in merged["n_best"]] == ["x", "y", "z"]
    assert [entry["probability"] for entry in merged["n_best"]] == pytest.approx(
        [1.6 / 3, 1.3 / 3, 0.1 / 3]
    )
    assert merged["null_odds"] == -1.0
    assert (merged["id"], merged["answers"]) == ("1", ["x"])


# --- files ---


def test_versions_and_names(tmp_path):
    with_answer = question("a", "Who?", "Dog")
    cases = [
        ("dev-v1.1.json", [with_answer], "1.1", "1.1", "dev", True),
        ("dev-v2.0.json", [with_answer], "v2.0", "2.0", "dev", True),
        ("mine.json", [{**with_answer, "is_impossible": False}], None, "2.0", "dev-mine", True),
        ("mine.json", [with_answer], None, "1.1", "dev-mine", True),
        ("test.json", [question("a", "Who?")], "v2.0", "2.0", "dev-test", False),
    ]
    for number, (file, questions, written, version, name, labelled) in enumerate(cases):
        path = write(tmp_path / str(number) / file, questions, version=written)
        (part,) = check_names(Squad().read_part(str(path), "dev"))
        assert (part.version, part.name, part.labelled) == (version, name, labelled)


@pytest.mark.parametrize("start", [-1, 0, None])
def test_answers_that_do_not_count_are_not_checked(start, tmp_path):
    """Annotation tools write an empty answer where there is none, and numbers as ids."""
    entry = {"id": 0, "question": "Who?", "is_impossible": True}
    entry["answers"] = [{"text": "", "answer_start": start}]
    path = write(tmp_path / "dev.json", [entry])
    (part,) = Squad().read_part(str(path), "dev")
    (example,) = part.examples
    assert (example.id, example.answers) == ("0", ())


def test_plausible_answers_of_impossible_questions_do_not_count(tmp_path):
    path = write(tmp_path / "dev-v2.0.json", [question("a", "Who?", "Dog", is_impossible=True)])
    (part,) = Squad().read_part(str(path), "dev")
    assert part.examples[0].answers == ()


def test_a_folder_as_published(tmp_path):
    for role in ("train", "dev"):
        write(tmp_path / f"{role}-v1.1.json", [question("a", "Who?", "Dog")], version="1.1")
    found = check_names(Squad().read(str(tmp_path), ["train", "dev", "test"]))
    assert [(part.name, part.role) for part in found] == [("train", "train"), ("dev", "dev")]
    assert Squad().default_recipe(found) == "squad-v1-megatron-336m"
    write(tmp_path / "dev-v2.0.json", [question("a", "Who?", "Dog")])
    with pytest.raises(InputError, match=r"several files for dev \(dev-v1.1.json, dev-v2.0.json\)"):
        Squad().read(str(tmp_path), ["dev"])
    with pytest.raises(InputError, match=r"holds no test\*.json"):
        Squad().read(str(tmp_path), ["test"])
    with pytest.raises(InputError, match="dev-v1.1.json is a file; --data takes a folder"):
        Squad().read(str(tmp_path / "dev-v1.1.json"), ["dev"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {**question("a", "Who?", "Dog"), "answers": [{"text": "dog", "answer_start": 30}]},
            "question a: the answer 'dog' does not stand in the passage at character 30",
        ),
        (
            {**question("a", "Who?"), "answers": [{"text": "Dog", "answer_start": -1}]},
            "does not stand in the passage at character -1",
        ),
        (
            {**question("a", "Who?"), "answers": [{"text": " ", "answer_start": 3}]},
            "the answer ' ' does not stand",
        ),
        (
            {**question("a", "Who?"), "answers": [{"text": "Dog"}]},
            "question a: 'answer_start' is missing; expected a number",
        ),
        ({"id": [3], "question": "Who?", "answers": []}, "'id' is .3.; expected a string"),
        ({"id": "a", "answers": []}, "question a: 'question' is missing"),
        (question("a", "Who?", is_impossible="no"), "is_impossible is 'no'; expected true or"),
        ("text", "holds 'text'; expected a JSON object"),
    ],
)
def test_a_damaged_question_is_named(tmp_path, entry, message):
    path = write(tmp_path / "dev-v2.0.json", [question("good", "Who?", "Dog"), entry])
    with pytest.raises(InputError, match=message) as caught:
        Squad().read_part(str(path), "dev")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [\n{"paragraphs": }]}', r"dev.json, line 2 is not JSON .* column 16"),
        ("[]", "dev.json holds \\[\\]; expected a JSON object"),
        ('{"data": {}}', "'data' is {}; expected a list"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "paragraph 1: 'context' is missing"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "dev.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        Squad().read_part(str(path), "dev")


def test_a_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")

    def row(name: str, *answers: str) -> dict[str, Any]:
        starts = [CONTEXT.index(answer) for answer in answers]
        found = {"text": list(answers), "answer_start": starts}
        return {"id": name, "title": "T", "context": CONTEXT, "question": "Who?", "answers": found}

    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([row("a", "Dog"), row("b", "Red Cat")]),
            "validation": datasets.Dataset.from_list([row("c", "Dog", "a Dog"), row("d")]),
        }
    ).save_to_disk(tmp_path / "hub")
    train, dev = Squad().read(str(tmp_path / "hub"), ["train", "dev", "test"])
    assert (train.name, train.version, len(train.texts)) == ("train", "1.1", 1)
    assert (dev.name, dev.version, dev.labelled) == ("dev", "2.0", True)
    assert dev.examples[0].answers == (("Dog", 30), ("a Dog", 28))


# --- the published data ---


@pytest.mark.realdata
def test_real_files(shared_data):
    found = [
        check_names(Squad().read_part(str(shared_data / "squad" / file), "dev"))[0]
        for file in (
            "squad2.0_cs224n_dev-v2.0.json",
            "squad2.0_cs224n_test-v2.0.json",
            "xquad.en.json",
        )
    ]
    counts = [(p.version, p.labelled, len(p.examples)) for p in found]
    assert counts == [("2.0", True, 6078), ("2.0", False, 5915), ("1.1", True, 1190)]
    assert sum(not example.answers for example in found[0].examples) == 3168
    assert sum(not example.answers for example in found[2].examples) == 0


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("file", "overrides"),
    [
        ("squad2.0_cs224n_dev-v2.0.json", {}),
        ("xquad.en.json", {"seq_length": 160, "doc_stride": 60}),
    ],
)
def test_a_model_that_knows_the_labels_gives_the_true_answers(
    shared_data, tmp_path, file, overrides
):
    """Features, windows, search, cutting out and figures together: nothing is lost on the way."""
    words = load_tokenizer(vocab_file=shared_data / "bert" / "bert-base-uncased-vocab.txt")
    part = dataclasses.replace(
        Squad().read_part(str(shared_data / "squad" / file), "dev")[0], name="dev"
    )
    features = prepare(part, words, tmp_path, **overrides)
    assert len(features) >= len(part.examples)
    offsets = np.concatenate([[0], np.cumsum(features.row_lengths)])
    noise = np.random.default_rng(1)
    values = noise.normal(size=(int(offsets[-1]), 2)).astype(np.float32)
    for column in range(2):
        values[offsets[:-1] + features.labels[:, column], column] += 20
    found = answered(part, features, Outputs(values, offsets, 1), **overrides)
    judged = Squad().judge([found])
    # Not all: an answer may end inside of a token ("5" of "5th"), or be longer than 30 tokens.
    assert judged.metrics["exact"] > 98.5
    assert judged.metrics["f1"] > 99
    if part.version == "2.0":
        assert judged.metrics["dev"]["NoAns_exact"] == 100.0
    texts = part.texts
    for example, prediction in zip(part.examples, judged.predictions["dev"], strict=True):
        assert prediction["text"] in texts[example.second]


@pytest.mark.realdata
def test_figures_of_perturbed_answers_are_those_of_the_metric(shared_data):
    """The task's figures on real questions are the module's, whose rules test_metrics.py checks."""
    part = Squad().read_part(str(shared_data / "squad" / "xquad.en.json"), "dev")[0]
    chance = random.Random(4)
    records = []
    for example in part.examples:
        texts = [text for text, _ in example.answers]
        given = chance.choice([texts[0], texts[0].upper(), texts[0] + " more", "wrong"])
        records.append(record(example.id, texts, 0.0, **{given: 1.0}))
    found = judge(records, None, version="1.1").metrics
    expected = metrics.load("squad").compute(
        predictions=[{"id": r["id"], "prediction_text": r["n_best"][0]["text"]} for r in records],
        references=[
            {"id": r["id"], "answers": {"text": r["answers"], "answer_start": [0]}} for r in records
        ],
    )
    assert expected is not None
    assert (found["exact"], found["f1"]) == (expected["exact_match"], expected["f1"])
    assert 0 < found["exact"] < found["f1"] < 100
