"""From text files to the samples of masked-LM and causal-LM training.

Masked LM: a document's sentences are packed into sequences; in each epoch a sequence is cut in two,
its halves are exchanged or not, and 15% of its tokens are masked, in runs of one to three words;
the random numbers follow from (seed, epoch, sample). Source: Megatron's bert_dataset.py and
dataset_utils.py (v2.5), its rules for segments and runs, and BERT's for what stands in a masked
token's place. Causal LM: the documents in a row, cut into windows.
"""

from __future__ import annotations

import dataclasses
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.text_file import json_value, read_text
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.training.data import NO_LABEL, Sample

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+|\n+")
BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")
LONGEST_RUN = 3
"""Words that are masked together, at most."""
RUN_ENDS = tuple(accumulate(1 / n for n in range(1, LONGEST_RUN + 1)))
"""1/n added up: a run has n words with a probability proportional to 1/n."""


def read_documents(paths: Sequence[Path], *, whole_files: bool) -> Iterator[str]:
    """Yield the documents of text files.

    A .jsonl file (also .json with one object a line) has a document in each line's `text`, as
    Megatron's tools/preprocess_data.py takes them. Any other file is text: blank lines separate
    documents, as in BERT's data, or the whole file is one.

    Args:
        paths: The files.
        whole_files: A text file is one document.

    Raises:
        InputError: A file is missing, empty, no UTF-8, or a line has no text.
    """
    for path in paths:
        text = read_text(path.expanduser())
        found = list(_documents(path, text, whole_files))
        if not found:
            raise InputError(f"{path} holds no text; give --data files with text")
        yield from found


def _documents(path: Path, text: str, whole_files: bool) -> Iterator[str]:
    if path.suffix in (".jsonl", ".json"):
        for number, line in enumerate(text.split("\n"), start=1):  # not at U+2028
            if not line.strip():
                continue
            try:
                document = json_value(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                document = None
            if not isinstance(document, str):
                raise InputError(
                    f'{path}, line {number}: expected a JSON object with a string "text"'
                )
            if document.strip():
                yield document
        return
    parts = [text] if whole_files else BLANK_LINES.split(text)
    yield from (part for part in parts if part.strip())


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of all documents, one after the other."""

    tokens: Tensor
    """`[n]` int32."""
    sentences: Tensor
    """Where each sentence begins, and n: ascending int64."""
    documents: Tensor
    """Where each document begins, and n."""


def tokenize_documents(
    documents: Iterable[str], tokenizer: Tokenizer, *, end: int | None, sentences: bool
) -> TokenizedText:
    """Return the tokens of documents.

    Args:
        documents: The texts.
        tokenizer: The vocabulary.
        end: An id to put after each document, or None.
        sentences: Cut documents into sentences and tokenize these; else a document is one.
    """
    tokens = array("i")
    starts, documents_at = [0], [0]
    for document in documents:
        pieces = SENTENCE_END.split(document) if sentences else [document]
        for piece in pieces:
            tokens.extend(tokenizer.encode(piece.strip() if sentences else piece))
            if len(tokens) > starts[-1]:
                starts.append(len(tokens))
        if end is not None:
            tokens.append(end)
            starts[-1] = len(tokens)
        if len(tokens) > documents_at[-1]:
            documents_at.append(len(tokens))
    row = torch.frombuffer(tokens, dtype=torch.int32) if tokens else torch.zeros(0).int()
    return TokenizedText(row, torch.tensor(starts), torch.tensor(documents_at))


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that masked-LM samples need."""

    cls: int
    sep: int
    mask: int
    continues: np.ndarray
    """Bool `[vocab]`: the piece continues the word before it (`##` in most vocabularies)."""
    words: np.ndarray
    """Ids that may replace a masked token: all but the bracketed ones."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SpecialTokens:
        """Return those of a BERT vocabulary.

        Raises:
            InputError: It has no `[CLS]`, `[SEP]` or `[MASK]`.
        """
        ids = {"[CLS]": tokenizer.cls_id, "[SEP]": tokenizer.sep_id, "[MASK]": tokenizer.mask_id}
        missing = [piece for piece, index in ids.items() if index is None]
        if missing or tokenizer.kind == "sentencepiece":
            raise InputError(
                f"{tokenizer.source} has no {missing[0] if missing else 'WordPiece vocabulary'}; "
                "masked-LM training needs a BERT vocabulary (vocab.txt)"
            )
        name = tokenizer.backend.id_to_token
        prefix = getattr(tokenizer.backend.model, "continuing_subword_prefix", None) or "##"
        pieces = [name(index) or "[gap]" for index in range(tokenizer.vocab_size)]
        ordinary = [len(p) < 2 or (p[0], p[-1]) != ("[", "]") for p in pieces]
        first, second, third = (index for index in ids.values() if index is not None)
        return cls(
            cls=first,
            sep=second,
            mask=third,
            continues=np.array([piece.startswith(prefix) for piece in pieces]),
            words=np.flatnonzero(ordinary),
        )


class MaskedText(Sequence[Sample]):
    """The samples of masked-LM training, drawn anew in each epoch.

    A sample is a run of sentences of one document, `[CLS] A [SEP] B [SEP]`, or `[CLS] A [SEP]`
    without pairs. Its label is the masked tokens and, at position 0, whether A and B were
    exchanged.
    """

    def __init__(
        self,
        text: TokenizedText,
        special: SpecialTokens,
        *,
        length: int,
        seed: int,
        pairs: bool,
        probability: float = 0.15,
        whole_words: bool = True,
    ) -> None:
        """Cut the text into samples.

        Args:
            text: Tokenized by sentences.
            special: Ids of the vocabulary.
            length: Most tokens of a sample, special ones included.
            seed: Of all that is drawn.
            pairs: Cut each sample into two segments.
            probability: Share of the tokens to mask, of all those of a sample.
            whole_words: Mask all pieces of a word or none.

        Raises:
            InputError: The text holds no sample.
        """
        self.tokens, self.special = text.tokens, special
        self.seed, self.pairs, self.probability = seed, pairs, probability
        self.whole_words = whole_words
        self.epoch = 0
        self.sentences = text.sentences.tolist()
        self.room = length - (3 if pairs else 2)
        documents = text.documents.tolist()
        self.runs = list(_runs(self.sentences, documents, self.room, 2 if pairs else 1))
        if not self.runs:
            raise InputError("the text is too short for a single training sample; give more text")

    def set_epoch(self, epoch: int) -> None:
        """Draw the samples of another epoch from now on."""
        self.epoch = epoch

    def length(self, index: int) -> int:
        """Return the number of tokens of a sample."""
        start, stop = self.runs[index]
        return stop - start + (3 if self.pairs else 2)

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self.runs):
            raise IndexError(index)
        chance = np.random.default_rng([self.seed, self.epoch, index])
        start, stop = self.runs[index]
        content = self.tokens[start:stop].numpy().astype(np.int64)
        first, exchanged = content, False
        second = content[:0]
        if self.pairs:
            cut = self._cut(start, stop, chance)
            first, second = content[:cut], content[cut:]
            exchanged = bool(chance.random() < 0.5)
            if exchanged:
                first, second = second, first
        special = self.special
        row = [[special.cls], first, [special.sep]]
        row += [second, [special.sep]] if self.pairs else []
        tokens = np.concatenate([np.asarray(part, dtype=np.int64) for part in row])
        tokentypes = (np.arange(len(tokens)) >= len(first) + 2).astype(np.int64)
        masked, labels = self._mask(tokens, chance)
        labels[0] = int(exchanged) if self.pairs else NO_LABEL
        types = torch.from_numpy(tokentypes if self.pairs else np.zeros_like(tokens))
        return Sample([torch.from_numpy(masked)], [types], torch.from_numpy(labels), index)

    def _cut(self, start: int, stop: int, chance: np.random.Generator) -> int:
        """Return where segment B begins: at a sentence, or in the middle of a single one."""
        low, high = bisect_right(self.sentences, start), bisect_left(self.sentences, stop)
        if low == high:
            return (stop - start) // 2
        return int(self.sentences[chance.integers(low, high)]) - start

    def _mask(
        self, tokens: np.ndarray, chance: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens with some masked, and the labels.

        Of the masked tokens 80% become [MASK], 10% any word, and 10% stay.
        """
        special = self.special
        places = np.flatnonzero((tokens != special.cls) & (tokens != special.sep))
        labels = np.full(len(tokens), NO_LABEL, dtype=np.int64)
        starts = np.ones(len(places), dtype=bool)
        if self.whole_words:
            # A piece continues a word only where the piece before it is its neighbour.
            starts[1:] = ~special.continues[tokens[places[1:]]] | (np.diff(places) > 1)
        bounds = [*np.flatnonzero(starts).tolist(), len(places)]
        # The share is one of all tokens, [CLS] and [SEP] among them, but no more than the share of
        # a full row without these.
        wanted = min(round(len(tokens) * self.probability), int(self.room * self.probability))
        chosen = _hidden_places(bounds, max(1, wanted), chance)
        if not chosen:  # every word is longer than the share: mask one piece
            chosen = [int(chance.integers(len(places)))]
        at = places[sorted(chosen)]
        labels[at] = tokens[at]
        kind = chance.random(len(at))
        replacement = special.words[chance.integers(len(special.words), size=len(at))]
        result = tokens.copy()
        result[at[kind < 0.9]] = replacement[kind < 0.9]
        result[at[kind < 0.8]] = special.mask
        return result, labels


def _hidden_places(bounds: list[int], wanted: int, chance: np.random.Generator) -> list[int]:
    """Return which pieces to mask, at most `wanted`, in runs of one to three words.

    Every word is the start of a run once, in random order. The run has n words with a probability
    proportional to 1/n, fewer where the text ends or no room is left, and is left out where one of
    its pieces is masked already. Source: `create_masked_lm_predictions` in Megatron's
    dataset_utils.py (v2.5).

    Args:
        bounds: Where each word begins among the pieces, and their number.
        wanted: How many pieces to mask.
        chance: Of all that is drawn.
    """
    count = len(bounds) - 1
    draws = chance.random(count)
    chosen: set[int] = set()
    for turn, first in enumerate(chance.permutation(count).tolist()):
        longest = min(LONGEST_RUN, count - first)
        words = 1 + bisect_right(RUN_ENDS, draws[turn] * RUN_ENDS[longest - 1], 0, longest - 1)
        room = wanted - len(chosen)
        while words and bounds[first + words] - bounds[first] > room:
            words -= 1
        run = range(bounds[first], bounds[first + words])
        if chosen.isdisjoint(run):
            chosen.update(run)
        if len(chosen) == wanted:
            break
    return list(chosen)


def _runs(
    sentences: list[int], documents: list[int], room: int, least: int
) -> Iterator[tuple[int, int]]:
    """Yield runs of whole sentences of one document, of at most `room` and at least `least` tokens.

    A sentence that is longer than that is cut.
    """
    for begin, end in zip(documents, documents[1:], strict=False):
        bounds = sentences[bisect_left(sentences, begin) : bisect_right(sentences, end)]
        start = last = begin
        for bound in bounds[1:]:
            if bound - start > room:
                if last - start >= least:
                    yield start, last
                start = last
                while bound - start > room:
                    yield start, start + room
                    start += room
            last = bound
        if last - start >= least:
            yield start, last


class SampleRange(Sequence[Sample]):
    """The samples from `start` to before `stop` of a data set, numbered anew."""

    def __init__(self, whole: MaskedText | TextWindows, start: int, stop: int) -> None:
        self.whole, self.start, self.stop = whole, start, stop
        self.tokens = whole.tokens

    def set_epoch(self, epoch: int) -> None:
        """Draw the samples of another epoch from now on."""
        if isinstance(self.whole, MaskedText):
            self.whole.set_epoch(epoch)

    def length(self, index: int) -> int:
        """Return the number of tokens of a sample."""
        return self.whole.length(self.start + index)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return dataclasses.replace(self.whole[self.start + index], index=index)


class TextWindows(Sequence[Sample]):
    """The samples of causal-LM training: windows side by side, each token predicted once."""

    def __init__(self, text: TokenizedText, *, length: int) -> None:
        """Cut the text into windows of `length` tokens, the last one shorter.

        Raises:
            InputError: The text holds no two tokens.
        """
        self.tokens, self.window = text.tokens, length
        if len(self.tokens) < 2:
            raise InputError("the text is too short to predict a single token; give more text")

    def length(self, index: int) -> int:
        """Return the number of tokens of a sample."""
        return min(self.window, len(self.tokens) - 1 - index * self.window)

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.window)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.window
        piece = self.tokens[start : start + self.window + 1].long()
        return Sample([piece[:-1]], [torch.zeros_like(piece[:-1])], piece[1:], index)
