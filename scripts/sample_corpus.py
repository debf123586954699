r"""Build the texts behind the sample checkpoint from what every Python installation carries.

The texts are the documentation topics that `help()` shows (`pydoc_data.topics`) and the docstrings
and comments of the standard library's source files. Some topics are held out as a whole: they
become a text in the form of WikiText-103 and cloze passages in the form of LAMBADA. All the rest is
for training, except paragraphs that share eight words in a row with held-out text (topics quote
each other).

Both sources change with Python's version. The held-out files are therefore stored in the repository
(with `corpus.json`, which says what they were made from), and the training text is rebuilt from the
running interpreter, without whatever the stored files hold.

    python scripts/sample_corpus.py --output build/sample
    python scripts/sample_corpus.py --output checkpoints/samples/text --held-out-only
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_TEXT = Path(__file__).resolve().parents[1] / "checkpoints" / "samples" / "text"

# Long enough to be read as articles, and quoted by few other topics.
WIKITEXT_TOPICS = ("execmodel", "import", "debugger", "objects", "formatstrings", "try", "raise")
CLOZE_TOPICS = (
    *("assignment", "attribute-access", "calls", "class", "comparisons", "function", "slicings"),
    *("subscriptions", "typesmapping", "with"),
)
HELD_OUT_PARTS = ("naming", "exceptions", "dynamic-features")  # sections of "execmodel"
# Tests, demos, vendored wheels, and `topics` itself: no prose of the standard library's own.
SKIPPED_FOLDERS = {"test", "tests", "turtledemo", "idlelib", "lib2to3", "__phello__", "_bundled"}
SKIPPED_FOLDERS |= {"site-packages", "dist-packages", "pydoc_data"}

OVERLAP_WORDS = 8  # the paper, too, counts the overlap of test and training text in eight words
RARE = 3  # WikiText-103 writes <unk> for words that it has fewer times than this
CLOZE_WORDS = (35, 110)  # shortest and longest passage
CLOZE_PER_WORD = 4  # passages that may end in the same word

FUNCTION_WORDS = set(
    "the a an of to is are in for that this then be if or and with by it as".split()
)
ASCII = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "—": " - ", "–": "-", "−": "-", "×": "x"}
)


@dataclass(frozen=True)
class Block:
    """One line of an article: a paragraph (`level` 0) or a heading (1 for the title, 2, 3 ...)."""

    text: str
    level: int = 0


@dataclass(frozen=True)
class Article:
    """One documentation topic, or the docstrings and comments of one module."""

    name: str
    blocks: tuple[Block, ...]

    @property
    def paragraphs(self) -> list[str]:
        """The paragraphs, without the headings."""
        return [block.text for block in self.blocks if block.level == 0]


def is_prose(text: str) -> bool:
    """True for sentences; False for code, grammar, signatures, tables, notices and addresses."""
    pieces = text.split()
    if len(pieces) < 6 or text[-1] not in ".:?!" or not re.match('"?[A-Za-z]', text):
        return False
    if re.search(r">>>|::=|@|https?:|copyright|licen[cs]e|\$ |[^ -~]", text, flags=re.IGNORECASE):
        return False
    word = re.compile(r"[\"'(\[]*[A-Za-z][A-Za-z'-]*[)\"'\],.:;?!]*")
    words = sum(bool(word.fullmatch(piece)) for piece in pieces)
    function_words = sum(piece.lower() in FUNCTION_WORDS for piece in pieces)
    return words >= 0.75 * len(pieces) and function_words >= len(pieces) / 10


def clean(text: str) -> str:
    """One line of text without reStructuredText marks, footnote numbers and line breaks."""
    text = re.sub(r"(?<=[a-z]-)\n\s*(?=[a-z])", "", text)  # a line broken at a hyphen
    text = text.translate(ASCII)
    emphasis = r"(?<![\w\"'*])\*{1,2}(?=\w)([^*\"']+?)(?<=\w)\*{1,2}(?![\w\"'*])"
    text = re.sub(emphasis, r"\1", text)
    text = re.sub(r":\w+:`", "`", text)  # :class:`name`
    text = re.sub(r"`+([^`']+)(`+|')", r"\1", text)  # ``code``, `name'
    text = re.sub(r" \[\d+\]", "", text)
    return " ".join(text.split())


def split_bullets(lines: Sequence[str]) -> list[str]:
    """The items of a list written without blank lines; a plain paragraph as it is."""
    bullet = re.compile(r"\s*(?:[*+o-]|\d+[.)])\s+(?=\S)")
    if len(lines) > 1 and not bullet.match(lines[0]) and len(lines[0].split()) < 5:
        first, second = (len(line) - len(line.lstrip()) for line in lines[:2])
        if first < second:  # a term above its definition
            lines = lines[1:]
    items = [""]
    for line in lines:
        match = bullet.match(line)
        if match and items[-1]:
            items.append("")
        items[-1] += (line[match.end() :] if match else line) + "\n"
    return items


def read_blocks(text: str) -> list[Block]:
    """The prose paragraphs and the underlined headings of one documentation text."""
    found: list[Block] = []
    underlines: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        mark = lines[1].strip()[:1] if len(lines) == 2 else ""
        if mark and mark in "*=-~^" and set(lines[1].strip()) == {mark}:
            if mark not in underlines:
                underlines.append(mark)
            found.append(Block(clean(lines[0]), underlines.index(mark) + 1))
            continue
        items = [clean(item) for item in split_bullets(lines)]
        found += [Block(item) for item in items if item and is_prose(item)]
    return found


def topic_articles() -> dict[str, Article]:
    """The documentation topics of the running interpreter, in the order of their names."""
    articles = {}
    for name in sorted(topics):
        blocks = read_blocks(topics[name])
        title = blocks.pop(0) if blocks and blocks[0].level == 1 else Block(name, 1)
        sections = [Block(b.text, max(2, b.level)) if b.level else b for b in blocks]
        articles[name] = Article(name, (title, *sections))
    return articles


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each run of lines that hold a comment alone."""
    run: list[str] = []
    for number, line in enumerate([*source.split("\n"), ""], start=1):
        match = re.match(r"\s*#+(?: (.*)|$)", line)
        if match:
            run.append(match[1] or "")
        elif run:
            yield number - len(run), "\n".join(run)
            run = []


def module_articles() -> Iterator[Article]:
    """The docstrings and comments of each module of the standard library; nothing is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts):
            continue
        source = path.read_bytes().decode("utf-8", errors="replace")
        texts = [(line, text, "") for line, text in comments(source)]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                heading = node.name if isinstance(node, ast.ClassDef) else ""
                texts.append((getattr(node, "lineno", 0), ast.get_docstring(node) or "", heading))
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        blocks = [Block(name, 1)]
        for _, text, heading in sorted(texts):
            blocks += [Block(heading, 2)] if heading else []
            blocks += [block for block in read_blocks(text) if block.level == 0]
        yield Article(name, tuple(blocks))


def word_runs(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """Every run of `OVERLAP_WORDS` words in the texts, but for runs over an `<unk>`."""
    runs = set()
    for text in texts:
        words = re.findall(r"<unk>|[a-z0-9]+", text.lower())
        runs |= {tuple(words[i : i + OVERLAP_WORDS]) for i in range(len(words) - OVERLAP_WORDS + 1)}
    return {run for run in runs if "<unk>" not in run}


def stored_paragraphs(path: Path) -> list[str]:
    """The paragraphs of a stored held-out file, with the hyphens and numbers put together again."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        passages = [json.loads(line)["text"] for line in text.splitlines()]
        return [paragraph for passage in passages for paragraph in passage.split("\n")]
    return re.sub(r" @(.)@ ", r"\1", text).split("\n")


def held_out_paragraphs() -> list[str]:
    """All that training must not see: the topics as this Python has them, and the stored files."""
    articles = topic_articles()
    names = (*WIKITEXT_TOPICS, *CLOZE_TOPICS, *HELD_OUT_PARTS)
    found = [articles[name].paragraphs for name in names if name in articles]
    stored = [stored_paragraphs(path) for path in sorted(HELD_OUT_TEXT.glob("*.sample.*"))]
    return list(chain(*found, *stored))


def training_articles() -> list[Article]:
    """Every other topic and every module, no paragraph twice and none that was held out."""
    forbidden = word_runs(held_out_paragraphs())
    names = {*WIKITEXT_TOPICS, *CLOZE_TOPICS, *HELD_OUT_PARTS}
    others = [article for name, article in topic_articles().items() if name not in names]
    articles, seen = [], set()
    for article in chain(others, module_articles()):
        blocks: list[Block] = []
        for block in article.blocks:
            if block.level == 0:
                if block.text in seen or word_runs([block.text]) & forbidden:
                    continue
                seen.add(block.text)
            while block.level and blocks and blocks[-1].level >= block.level:
                blocks.pop()  # the heading of a section that has lost its paragraphs
            blocks.append(block)
        while blocks and blocks[-1].level:
            blocks.pop()
        if blocks:
            articles.append(Article(article.name, tuple(blocks)))
    return articles


def natural_text(article: Article) -> str:
    r"""The article as plain text, laid out as WikiText is once its words are joined again.

    A heading is "\n= Title =\n\n" or "\n== Section ==\n\n", a paragraph is one line.
    """
    lines = []
    for block in article.blocks:
        bar = "=" * block.level
        lines.append(f"\n{bar} {block.text} {bar}\n\n" if block.level else f"{block.text}\n")
    return "".join(lines)


def split_words(text: str) -> list[str]:
    """The words of a line as WikiText-103 writes them.

    Punctuation stands by itself; a hyphen inside a word becomes `@-@`, a comma or a point between
    digits `@,@` or `@.@`; an apostrophe opens a word (`object 's`). A point inside a name
    (`sys.path`) stays where it is.
    """
    text = re.sub(r"(?<=\d)([,.])(?=\d)", r" @\1@ ", text)
    text = re.sub(r"(?<=[^\W_])-(?=[^\W_])", " @-@ ", text)
    text = re.sub(r"(\.\.\.|[][;:!?(){}\"]|(?<!@),(?!@))", r" \1 ", text)
    text = re.sub(r"(?<=[^\s.])(?<!e\.g)(?<!i\.e)\.(?=\s|$)", " .", text)
    text = re.sub(r"(?<=\w)'(?=\s|$)|(?<!\S)'(?=\S)", " ' ", text)  # 'quoted'
    text = re.sub(r"(?<=\w)'(?=\w)", " '", text)  # object's
    return text.split()


def count_words(articles: Iterable[Article]) -> Counter[str]:
    """How often the articles have each word."""
    return Counter(chain.from_iterable(split_words(b.text) for a in articles for b in a.blocks))


def wikitext(articles: Sequence[Article], counts: Counter[str]) -> str:
    """The articles in WikiText-103's form; words counted fewer than `RARE` times become `<unk>`."""

    def line(block: Block) -> str:
        bar = ["="] * block.level
        words = split_words(block.text)
        known = [w if counts[w] >= RARE or not w[0].isalnum() else "<unk>" for w in words]
        return f" {' '.join([*bar, *known, *bar])} \n"

    lines = [" \n"]
    for article in articles:
        for block in article.blocks:
            if block.level > 1:
                lines.append(" \n")
            lines.append(line(block))
            if block.level:
                lines.append(" \n")
        lines.append(" \n")
    return "".join(lines)


def cloze_passages(articles: Sequence[Article]) -> list[str]:
    """Passages in LAMBADA's form: some sentences, then one that lacks only its point.

    The rule looks at the text alone, never at a model. The last word is a plain one of four letters
    or more; it stands at least twice in the passage before, once at least in an earlier sentence.
    Passages do not overlap.
    """
    shortest, longest = CLOZE_WORDS
    passages: list[str] = []
    endings: Counter[str] = Counter()
    for article in articles:
        context = ""
        for block in article.blocks:
            if block.level or block.text.endswith(":"):
                context = ""  # another section; or what the line announces was not prose
                continue
            space = "\n" if context else ""
            for sentence in re.split(r"(?<=[a-z)\"][.!?])\s+(?=[A-Z\"])", block.text):
                while len(f"{context} {sentence}".split()) > longest and context:
                    context = re.sub(r"\A.*?(?:[.!?]\s+(?=[A-Z\"])|\Z)", "", context, flags=re.S)
                passage = f"{context}{space}{sentence}" if context else sentence
                space = " "
                word = passage.removesuffix(".").rsplit(maxsplit=1)[-1]
                if (
                    sentence.endswith(".")
                    and re.fullmatch("[a-z]{4,}", word)
                    and word not in FUNCTION_WORDS
                    and len(passage.split()) >= shortest
                    and re.search(rf"\b{word}\b", context)
                    and len(re.findall(rf"\b{word}\b", passage)) >= 3
                    and endings[word] < CLOZE_PER_WORD
                ):
                    passages.append(passage.removesuffix("."))
                    endings[word] += 1
                    passage = ""
                context = passage
    return passages


def build_texts() -> dict[str, str]:
    """The three texts, by file name, and `corpus.json`: what they came from, and their hashes."""
    training, by_name = training_articles(), topic_articles()
    held_out = [by_name[name] for name in WIKITEXT_TOPICS if name in by_name]
    cloze = cloze_passages(
        [*held_out, *(by_name[name] for name in CLOZE_TOPICS if name in by_name)]
    )
    texts = {
        "wiki.sample.tokens": wikitext(held_out, count_words(chain(training, held_out))),
        "lambada.sample.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in cloze),
        "train.txt": "".join(map(natural_text, training)),
    }
    all_topics = "".join(f"{name}\0{topics[name]}\0" for name in sorted(topics))
    record = {
        "python": platform.python_version(),
        "topics_sha256": sha256(all_topics),
        "wikitext_topics": [article.name for article in held_out],
        "cloze_topics": [name for name in CLOZE_TOPICS if name in by_name],
        "training_articles": len(training),
        "files": {
            name: {"bytes": len(t.encode()), "sha256": sha256(t)} for name, t in texts.items()
        },
    }
    return texts | {"corpus.json": json.dumps(record, indent=1) + "\n"}


def sha256(text: str) -> str:
    """The SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Write the files to a folder."""
    parser = argparse.ArgumentParser(description="Build the sample's texts from this Python.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--held-out-only", action="store_true", help="leave out the training text")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, text in build_texts().items():
        if name != "train.txt" or not arguments.held_out_only:
            (arguments.output / name).write_text(text, encoding="utf-8", newline="\n")
            print(f"{name}: {len(text.encode())} bytes, sha256 {sha256(text)}")


if __name__ == "__main__":
    main()
