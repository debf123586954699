"""SQuAD 1.1 and 2.0: the answer to a question is a span of a passage, or, in 2.0, may be absent.

Megatron-LM never had this task. It is prepared as BERT's authors did it: a row is

    [CLS] question [SEP] window of the passage [SEP]

with windows that start `doc_stride` tokens apart; an answer that is not in a window makes the span
(0, 0), the place of [CLS], and so does no answer at all. The answer that is given is cut out of the
passage as it was written, at the places of its first and last token.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlm_eval.checkpoints.errors import InputError, shown, visible_json
from mlm_eval.checkpoints.files.text_file import misfit, parse_json, read_text
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.tasks.data.sources import DatasetName
from mlm_eval.tasks.data.text import check_text, digest, json_field, sha256
from mlm_eval.tasks.data.tokens import tokens_of
from mlm_eval.tasks.finetune.features import SPECIAL_TOKENS, Outputs, PairFeatures
from mlm_eval.tasks.finetune.settings import Recipe
from mlm_eval.tasks.finetune.spans import SpanExample, SpanFeatures, best_answers, window_features
from mlm_eval.tasks.finetune.task import (
    Answered,
    ExampleSet,
    Judgement,
    Task,
    digits,
    softmax,
)
from mlm_eval.training.objectives import SpanExtraction


class Squad(Task):
    """SQuAD; see the module."""

    name = "squad"
    head = "qa_head"
    objective = SpanExtraction
    hub = DatasetName("rajpurkar/squad", None, None)
    hub_columns = ("id", "context", "question", "answers")

    def default_recipe(self, sets: Sequence[ExampleSet]) -> str:
        """See `Task.default_recipe`."""
        return f"squad-v{2 if can_be_absent(sets) else 1}-megatron-336m"

    def read_folder(self, path: Path, roles: Sequence[str]) -> list[ExampleSet]:
        """See `Task.read`: a folder with train-*.json and dev-*.json."""
        if not path.is_dir():
            raise InputError(
                f"{path} is a file; --data takes a folder with train-*.json and dev-*.json, and "
                f"--train, --dev and --test take files"
            )
        found = []
        for role in roles:
            files = sorted(path.glob(f"{role}*.json"))
            if len(files) > 1:
                names = ", ".join(file.name for file in files)
                raise InputError(
                    f"{path} holds several files for {role} ({names}); choose one with --{role}"
                )
            found += [self.read_file(file, role) for file in files]
        if not found:
            expected = " or ".join(f"{role}*.json" for role in roles)
            raise InputError(f"{path} holds no {expected}; expected SQuAD's files")
        return found

    def read_file(self, path: Path, role: str) -> ExampleSet:
        """See `Task.read_file`: a .json file of SQuAD 1.1 or 2.0."""
        text = read_text(path)
        content = parse_json(text, str(path))
        texts: list[str] = []
        examples: list[SpanExample] = []
        is_2 = False
        for number, article in enumerate(json_field(content, "data", list, str(path)), start=1):
            place = f"{path}, article {number}"
            paragraphs = json_field(article, "paragraphs", list, place)
            for part, paragraph in enumerate(paragraphs, start=1):
                where = f"{place}, paragraph {part}"
                context = json_field(paragraph, "context", str, where)
                for entry in json_field(paragraph, "qas", list, where):
                    examples.append(_question(entry, context, len(texts), where))
                    is_2 = is_2 or "is_impossible" in entry
                texts.append(context)
        _check_ids(examples, role, str(path))
        is_2 = is_2 or str(content.get("version")).startswith("v2")
        # The published names say nothing beyond the role.
        name = "" if re.fullmatch(r"(train|dev|test)-v[12]\.[01]", path.stem) else path.stem
        return ExampleSet(
            name=name,
            role=role,
            path=str(path),
            sha256=sha256([text]),
            texts=texts,
            examples=examples,
            # Without a single answer they were taken out: a test set.
            labelled=any(example.answers for example in examples),
            version="2.0" if is_2 else "1.1",
        )

    def read_hub(self, source: str, role: str) -> Iterator[ExampleSet]:
        """See `Task.read_hub`: 2.0 too, by the Hub's old name."""
        name = source.partition(":")[0]
        if name == "squad_v2" and not Path(name).is_dir():
            source = f"rajpurkar/{source}"
        return super().read_hub(source, role)

    def hub_sets(self, rows: Any, name: str, *, role: str, where: str) -> Iterator[ExampleSet]:
        """See `Task.hub_sets`: a row a question."""
        places: dict[str, int] = {}
        examples, records = [], []
        for number, row in enumerate(rows, start=1):
            place = f"{where}, row {number}"
            context = json_field(row, "context", str, place)
            starts = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            answers = [{"text": text, "answer_start": start} for text, start in starts]
            entry = {"id": row["id"], "question": row["question"], "answers": answers}
            second = places.setdefault(context, len(places))
            examples.append(_question(entry, context, second, place))
            records.append((row["id"], row["question"], context, answers))
        _check_ids(examples, role, where)
        answered = {bool(example.answers) for example in examples}
        yield ExampleSet(
            name=name,
            role=role,
            path=where,
            sha256=digest(records),
            texts=list(places),
            examples=examples,
            labelled=True in answered,
            version="2.0" if len(answered) > 1 else "1.1",
        )

    def features(
        self, examples: ExampleSet, tokenizer: Tokenizer, recipe: Recipe, *, cache: Path
    ) -> PairFeatures:
        """See `Task.features`.

        Raises:
            InputError: The rows are too short for a question and a window.
        """
        if recipe.seq_length <= recipe.max_query_length + SPECIAL_TOKENS:
            raise InputError(
                f"seq_length {recipe.seq_length} has no room for a passage beside a question of "
                f"{recipe.max_query_length} tokens; raise it, or lower max_query_length"
            )
        questions = [example.firsts[0] for example in examples.examples]
        return window_features(
            examples.examples,
            tokens_of(questions, tokenizer, cache=cache).tokens,
            tokens_of(examples.texts, tokenizer, cache=cache, offsets=True),
            tokenizer=tokenizer,
            recipe=recipe,
        )

    def records(
        self, examples: ExampleSet, features: PairFeatures, outputs: Outputs, recipe: Recipe
    ) -> list[dict[str, Any]]:
        """See `Task.records`.

        `answers` are the true ones. `n_best` are the model's, best first, with probabilities among
        themselves. `null_odds` is how far the score of "no answer" is ahead of the best one's.
        """
        assert isinstance(features, SpanFeatures)
        found = best_answers(
            features,
            outputs,
            examples.texts,
            n_best=recipe.n_best,
            max_length=recipe.max_answer_length,
        )
        return [
            {
                "id": example.id,
                "answers": [text for text, _ in example.answers] if examples.labelled else None,
                "n_best": with_probabilities(answers),
                # A passage without tokens holds no answer; JSON knows no infinity.
                "null_odds": null - answers[0][1] if answers else 1e9,
            }
            for example, (answers, null) in zip(examples.examples, found, strict=True)
        ]

    def merge(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See `Task.merge`: means of probabilities, 0 where not listed, and of null odds."""
        shares: dict[str, float] = {}
        for record in records:
            for entry in record["n_best"]:
                shares[entry["text"]] = shares.get(entry["text"], 0.0) + entry["probability"]
        ranked = sorted(shares.items(), key=lambda item: -item[1])
        mean = sum(record["null_odds"] for record in records) / len(records)
        return {
            **{name: records[0][name] for name in ("id", "answers")},
            "n_best": [{"text": text, "probability": s / len(records)} for text, s in ranked],
            "null_odds": mean,
        }

    def record_fault(self, record: Any) -> str | None:
        """See `Task.record_fault`."""
        schema = {"id": "text", "answers": "texts?", "null_odds": "number", "n_best": "list"}
        if fault := misfit(record, schema):
            return fault
        if "answers" not in record:
            return "it has no 'answers'"
        for entry in record["n_best"]:
            if fault := misfit(entry, {"text": "text", "probability": "number"}):
                return f"in its n_best, {fault}"
        return None

    def judge(self, sets: Sequence[Answered], *, null_threshold: float | None = None) -> Judgement:
        """See `Task.judge`.

        Without a threshold of "no answer" the one with the best F1 on the dev sets together is
        taken. Test sets are judged at the same; without a dev set, at 0.
        """
        judgement = Judgement()
        absent = can_be_absent(sets)
        for role in ("dev", "test"):
            parts = [part for part in sets if part.role == role]
            if role == "test" and null_threshold is None:
                null_threshold = 0.0  # a threshold must not be fitted to a test set
            pool = [record for part in parts if part.labelled for record in part.records]
            if pool:
                judgement.metrics[role] = figures(pool, null_threshold, absent=absent)
                null_threshold = judgement.metrics[role].get("null_threshold")
            for part in parts:
                if part.labelled and part.name != role:
                    found = figures(part.records, null_threshold, absent=absent)
                    judgement.metrics[part.name] = found
                limit = (null_threshold or 0.0) if absent else math.inf
                judgement.predictions[part.name] = [decide(r, limit) for r in part.records]
        if "dev" in judgement.metrics:
            dev = judgement.metrics["dev"]
            judgement.metrics.update({name: dev[name] for name in ("exact", "f1")})
        return judgement

    def submission(self, predictions: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """See `Task.submission`: what the official scripts read, answers and odds of no answer."""
        answers = {record["id"]: record["text"] for record in predictions}
        odds = {record["id"]: record["null_odds"] for record in predictions}
        return {
            ".json": visible_json(json.dumps(answers, ensure_ascii=False, indent=1)) + "\n",
            ".null_odds.json": json.dumps(odds, indent=1) + "\n",
        }

    def summary(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """See `Task.summary`; the score is F1."""
        return {"score": metrics["f1"], "exact": metrics["exact"], "f1": metrics["f1"]}


def can_be_absent(sets: Sequence[ExampleSet | Answered]) -> bool:
    """Return whether a question of these sets may have no answer: SQuAD 2.0."""
    return any(part.version == "2.0" for part in sets)


# ---- reading -----------------------------------------------------------------------------------


def _question(entry: Any, context: str, second: int, where: str) -> SpanExample:
    """Return a question that has its answers where it says."""
    identity = entry.get("id") if isinstance(entry, Mapping) else None
    if type(identity) is int:  # of annotation tools; a name all the same
        identity = str(identity)
    else:
        identity = json_field(entry, "id", str, where)
    where = f"{where}, question {identity}"
    question = json_field(entry, "question", str, where).strip()
    impossible = entry.get("is_impossible")
    if impossible not in (None, True, False):
        raise InputError(f"{where}: is_impossible is {impossible!r}; expected true or false")
    answers = []
    # Some copies of the data keep plausible answers, or empty ones, of a question without any.
    given = not impossible and "answers" in entry
    for answer in json_field(entry, "answers", list, where) if given else []:
        text = check_text(json_field(answer, "text", str, where), where)
        start = json_field(answer, "answer_start", int, where)
        if not text.strip() or context[max(start, 0) : start + len(text)] != text:
            raise InputError(
                f"{where}: the answer {shown(text)} does not stand in the passage at character "
                f"{start}; expected answers as they are written there"
            )
        answers.append((text, start))
    return SpanExample(id=identity, firsts=(question,), second=second, answers=tuple(answers))


def _check_ids(examples: Sequence[SpanExample], role: str, where: str) -> None:
    """Refuse questions that share an id, except in training: predictions are kept by it.

    Raises:
        InputError: Two have the same id.
    """
    if role == "train" or not examples:
        return
    ((identity, count),) = Counter(example.id for example in examples).most_common(1)
    if count > 1:
        raise InputError(
            f"{where} holds {count} questions with the id {shown(identity)}; give each an id of "
            "its own, as answers are told apart by it"
        )


# ---- answers and figures -----------------------------------------------------------------------


def with_probabilities(answers: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Return answers, best first, with the probability of each among them."""
    if not answers:
        return []
    texts, scores = zip(*answers, strict=True)
    (shares,) = digits(softmax(np.array([scores])))
    return [{"text": t, "probability": share} for t, share in zip(texts, shares, strict=True)]


def decide(record: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """Return a record with the `text` that is given as the answer; empty where there is none."""
    absent = record["null_odds"] > threshold or not record["n_best"]
    return {
        "id": record["id"],
        "text": "" if absent else record["n_best"][0]["text"],
        **{name: record[name] for name in ("answers", "null_odds", "n_best")},
    }


def figures(
    records: Sequence[Mapping[str, Any]], threshold: float | None, *, absent: bool
) -> dict[str, Any]:
    """Return the official figures of answers, by our `evaluate` modules.

    Args:
        records: Of `Squad.records`, labelled.
        threshold: Of "no answer"; None: the one with the best F1 on these.
        absent: Judge by SQuAD 2.0's rules.
    """
    from mlm_eval.tasks.finetune import metrics

    predictions: list[dict[str, Any]] = [
        {"id": str(place), "prediction_text": r["n_best"][0]["text"] if r["n_best"] else ""}
        for place, r in enumerate(records)
    ]
    truths = [list(record["answers"]) for record in records]
    references = [
        {"id": str(place), "answers": {"text": texts, "answer_start": [0] * len(texts)}}
        for place, texts in enumerate(truths)
    ]
    if not absent:
        found = metrics.compute("squad", predictions, references)
        return {"exact": found["exact_match"], "f1": found["f1"], "total": found["total"]}
    for prediction, record in zip(predictions, records, strict=True):
        prediction["no_answer_probability"] = record["null_odds"]
    judge = partial(metrics.compute, "squad_v2", predictions, references)
    if threshold is None:
        threshold = judge()["best_f1_thresh"]
    found = judge(no_answer_threshold=threshold)
    return {**found, "null_threshold": threshold}
