"""RACE: reading comprehension with four choices, as Megatron-LM's tasks/race prepared it.

A question gives four rows, one for each of its options; the option with the highest score is the
answer. Each row is

    [CLS] question with the option [SEP] article [SEP]

where the option takes the place of every `_` of the question, or follows it after a space. The
question with its option is cut at 128 tokens, the article at what is left.
Source: docs/megatron.md, "Text preparation", "RACE".
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mlm_eval.checkpoints.archives.unpacking import TAR_FAULTS, most_unpacked
from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.safe_pickle import printable
from mlm_eval.checkpoints.files.text_file import decode, parse_json, read_text
from mlm_eval.tasks.data.sources import DatasetName
from mlm_eval.tasks.data.text import check_text, digest, json_field
from mlm_eval.tasks.finetune.features import clean_text
from mlm_eval.tasks.finetune.settings import Recipe
from mlm_eval.tasks.finetune.task import ROLES, ChoiceTask, Example, ExampleSet
from mlm_eval.training.objectives import MultipleChoice

LETTERS = "ABCD"
NUM_CHOICES = len(LETTERS)
LARGEST_PASSAGES = 1 << 26
"""Bytes of a file of passages; one that was published holds a passage."""

ARCHIVES = (".tar.gz", ".tgz", ".tar")


@dataclass(frozen=True)
class Passage:
    """An article with its questions, as one line of a file of RACE has them."""

    id: str
    """Such as `high1432.txt`."""
    article: str
    """The text."""
    questions: tuple[str, ...]
    """One or more."""
    options: tuple[tuple[str, ...], ...]
    """Four for each question."""
    answers: tuple[int, ...]
    """Number of the right option of each question, from 0."""


class Race(ChoiceTask):
    """RACE; see the module."""

    name = "race"
    head = "multichoice_head"
    objective = MultipleChoice
    hub = DatasetName("ehovy/race", "all", None)
    hub_columns = ("example_id", "article", "question", "options", "answer")

    def max_first(self, recipe: Recipe) -> int | None:
        """Return the most tokens of a question with its answer."""
        return recipe.max_qa_length

    def read_folder(self, path: Path, roles: Sequence[str]) -> list[ExampleSet]:
        """See `Task.read`: RACE/{train,dev,test}/{middle,high}, in folders or in archives."""
        files = (file for file in passage_files(path) if file.split in roles)
        sets = make_sets(((file.split, file) for file in files), str(path))
        if not sets:
            raise InputError(
                f"{path} holds no passages for {' or '.join(roles)}; expected "
                f"RACE/{{train,dev,test}}/{{middle,high}}/*.txt in it"
            )
        return sets

    def read_path(self, path: Path, role: str) -> list[ExampleSet]:
        """See `Task.read_part`: a .txt file, a folder of them or of such folders, or an archive."""
        if _archives(path):
            return self.read_folder(path, [role])
        sets = make_sets(((role, file) for file in passage_files(path)), str(path))
        if not sets:
            raise InputError(f"{path} holds no *.txt file; expected passages of RACE")
        return sets

    def hub_sets(self, rows: Any, name: str, *, role: str, where: str) -> Iterator[ExampleSet]:
        """See `Task.hub_sets`: a row a question, put back to passages and to levels."""
        asked: dict[tuple[str, str], list[tuple[str, tuple[str, ...], int]]] = {}
        for number, row in enumerate(rows, start=1):
            place = f"{where}, row {number}"
            check_question(row["question"], row["options"], row["answer"], place)
            passage_id = json_field(row, "example_id", str, place)
            article = json_field(row, "article", str, place)
            question = (row["question"], tuple(row["options"]), LETTERS.index(row["answer"]))
            asked.setdefault((passage_id, article), []).append(question)
        by_level: dict[str, list[Passage]] = {}
        for passage_id, article in sorted(asked, key=lambda key: _natural(key[0])):
            columns = zip(*asked[passage_id, article], strict=True)
            level = re.match("middle|high", passage_id)
            passages = by_level.setdefault(level[0] if level else "", [])
            passages.append(Passage(passage_id, article, *columns))
        for key in sorted(by_level, key=_level_order):
            full = "-".join(part for part in (name, key) if part)
            yield make_set(by_level[key], full, role=role, path=where)


def question_with_option(question: str, option: str) -> str:
    """Return the text that stands before the article."""
    filled = question.replace("_", option) if "_" in question else f"{question} {option}"
    return clean_text(filled)


def parse_passages(text: str, where: str) -> list[Passage]:
    r"""Return the passages of a file: one JSON object on each line that is not blank.

    Lines end at "\n" alone: JSON strings may hold U+2028 and others that `splitlines` cuts at.

    Raises:
        InputError: A line is not a passage of RACE.
    """
    passages: list[Passage] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{where}, line {number}"
            passages.append(_passage(parse_json(line, place), place, len(passages)))
    return passages


def _passage(entry: Any, where: str, number: int) -> Passage:
    article = json_field(entry, "article", str, where)
    questions = json_field(entry, "questions", list, where)
    options = json_field(entry, "options", list, where)
    answers = json_field(entry, "answers", list, where)
    if not len(questions) == len(options) == len(answers):
        raise InputError(
            f"{where} has {len(questions)} questions, {len(options)} lists of options and "
            f"{len(answers)} answers; expected as many of each"
        )
    for question, choices, answer in zip(questions, options, answers, strict=True):
        check_question(question, choices, answer, where)
    stated = entry.get("id")
    fallback = PurePosixPath(where.rpartition(", line ")[0]).name + (f"#{number}" if number else "")
    return Passage(
        id=stated if isinstance(stated, str) and stated else fallback,
        article=article,
        questions=tuple(questions),
        options=tuple(tuple(choices) for choices in options),
        answers=tuple(LETTERS.index(answer) for answer in answers),
    )


def check_question(question: Any, options: Any, answer: Any, where: str) -> None:
    """Refuse a question that has not the form of RACE's.

    Raises:
        InputError: It has not.
    """
    if not isinstance(options, list) or len(options) != NUM_CHOICES:
        raise InputError(f"{where}: the options {shown(options)} are not {NUM_CHOICES} strings")
    for what, text in [("question", question), *(("option", option) for option in options)]:
        if not isinstance(text, str):
            raise InputError(f"{where}: the {what} {shown(text)} is not a string")
        check_text(text, where)
    if not isinstance(answer, str) or len(answer) != 1 or answer not in LETTERS:
        raise InputError(f"{where}: the answer {shown(answer)} is not one of {', '.join(LETTERS)}")


def make_sets(files: Iterable[tuple[str, PassageFile]], path: str) -> list[ExampleSet]:
    """Return files as named sets, in the order of roles and levels, files by their numbers.

    Args:
        files: Each with its role.
        path: Where they were read, for people.
    """
    found: dict[tuple[str, str, str], list[tuple[Any, list[Passage]]]] = {}
    for role, file in files:
        passages = parse_passages(file.text, file.where)
        key = (role, file.split or role, file.level)
        found.setdefault(key, []).append((_natural(file.name), passages))
    sets = []
    for role, split, level in sorted(found, key=_set_order):
        parts = sorted(found[role, split, level], key=lambda part: part[0])
        name = "-".join(part for part in (split, level) if part)
        sets.append(make_set([p for _, part in parts for p in part], name, role=role, path=path))
    return sets


def make_set(passages: Sequence[Passage], name: str, *, role: str, path: str) -> ExampleSet:
    """Return passages as a set of examples, one for each question."""
    examples = [
        Example(
            id=f"{passage.id}-{number}",
            firsts=tuple(question_with_option(question, option) for option in options),
            second=place,
            label=answer,
        )
        for place, passage in enumerate(passages)
        for number, (question, options, answer) in enumerate(
            zip(passage.questions, passage.options, passage.answers, strict=True)
        )
    ]
    return ExampleSet(
        name=name,
        role=role,
        path=path,
        sha256=digest([p.article, p.questions, p.options, p.answers] for p in passages),
        texts=[clean_text(passage.article) for passage in passages],
        examples=examples,
    )


# ---- where files are ---------------------------------------------------------------------------


@dataclass(frozen=True)
class PassageFile:
    """A file of passages."""

    split: str
    """`train`, `dev` or `test`, as the path says; empty where it does not."""
    level: str
    """The folders below, with dashes; where there is no split, the folder's or file's name."""
    name: str
    """Of the file."""
    where: str
    """The file, for messages."""
    text: str
    """Its content."""


def passage_files(path: Path) -> Iterator[PassageFile]:
    """Yield the passage files of a file, a folder or archives; hidden ones are left out.

    Raises:
        InputError: One of them cannot be read.
    """
    if archives := _archives(path):
        for archive in archives:
            yield from _in_archive(archive)
        return
    for file in [path] if path.is_file() else sorted(path.rglob("*.txt")):
        inner = file.relative_to(path).parts
        if not any(part.startswith(".") for part in inner):
            split, level = _place(file.absolute().parent.parts)
            if not split:
                level = path.stem if not inner else "-".join(inner[:-1]) or path.absolute().name
            content = read_text(file, most=LARGEST_PASSAGES)
            yield PassageFile(split, level, file.name, str(file), content)


def _archives(path: Path) -> list[Path]:
    """Return the archives that `path` is, or holds where it holds no folder of passages."""
    if path.is_dir():
        if any((path / name).is_dir() for name in (*ROLES, "RACE")):
            return []
        return sorted(file for file in path.iterdir() if file.name.endswith(ARCHIVES))
    return [path] if path.name.endswith(ARCHIVES) else []


def _in_archive(archive: Path) -> Iterator[PassageFile]:
    """Yield the passage files of an archive, without unpacking it."""
    try:
        with tarfile.open(archive, "r|*") as stream:
            for member in stream:
                parts = PurePosixPath(member.name).parts
                split, level = _place(parts[:-1])
                hidden = any(part.startswith(".") and part != "." for part in parts)
                if member.offset + member.size > most_unpacked(archive):
                    raise InputError(
                        f"{archive} unpacks to far more than its size, which passages do not; get "
                        "it again"
                    )
                if hidden or not (member.isfile() and split and parts[-1].endswith(".txt")):
                    continue
                if member.size > LARGEST_PASSAGES:
                    raise InputError(
                        f"{archive} holds {printable(member.name)} of {member.size:,} bytes, far "
                        "more than a passage; get it again"
                    )
                content = stream.extractfile(member)
                assert content is not None
                where = f"{archive}, member {printable(member.name)}"
                yield PassageFile(split, level, parts[-1], where, decode(content.read(), where))
    except InputError:
        raise
    except TAR_FAULTS as error:
        raise InputError(
            f"{archive} is not an archive that can be read to its end ({error}); get it again"
        ) from error


def _place(folders: Sequence[str]) -> tuple[str, str]:
    """Return split and level of a path: (.., RACE, dev, middle) -> dev, middle."""
    places = [place for place, part in enumerate(folders) if part in ROLES]
    if not places:
        return "", ""
    return folders[places[-1]], "-".join(folders[places[-1] + 1 :])


def _set_order(key: tuple[str, str, str]) -> tuple[Any, ...]:
    role, split, level = key
    return (ROLES.index(role), split, _level_order(level))


def _level_order(level: str) -> tuple[int, str]:
    known = ("middle", "high")
    return (known.index(level) if level in known else len(known), level)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts 9.txt before 10.txt, however many digits a name has."""
    parts = re.split(r"([0-9]+)", name)
    numbers = (part.lstrip("0") if at % 2 else None for at, part in enumerate(parts))
    return [
        (-1, part) if number is None else (len(number), number)
        for part, number in zip(parts, numbers, strict=True)
    ]
