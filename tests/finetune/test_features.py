"""Rows of BERT: cleaning, `[CLS] A [SEP] B [SEP]`, the cut, and tokens that are kept on disk."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_bert
from support.tiny_bert import CLS, SEP, ids

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import cache_root
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer
from mlm_eval.tasks.data import tokens
from mlm_eval.tasks.data.tokens import Ragged
from mlm_eval.tasks.finetune.features import PairFeatures, clean_text, special_ids
from mlm_eval.training.data import check_data, collate


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    return tiny_bert.tokenizer(tmp_path / "vocabulary")


# --- texts ---


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("plain", "plain"),
        ("two\nlines", "two lines"),
        ("  a \t b\u00a0\u3000c\r\n", " a b c "),  # ends are kept, as in Megatron
        ("one . two", "one. two"),
        ("one .two", "one .two"),
        ("a . b . c . d . e", "a. b. c. d. e"),
        (" . . . . ", ". ... "),  # each round misses every second one
        ("", ""),
    ],
)
def test_clean_text(text, cleaned):
    assert clean_text(text) == cleaned


# --- rows ---


def pair(a: list[int], b: list[int], words: Tokenizer, **options: Any) -> PairFeatures:
    return PairFeatures.of_whole_texts(
        Ragged.of([a]), Ragged.of([b]), second=[0], labels=[0], tokenizer=words, **options
    )


A, B = [51, 52, 53], [61, 62, 63, 64]


@pytest.mark.parametrize(
    ("a", "b", "longest", "tokens", "num_first"),
    [
        # Room to spare, and exactly enough: nothing is lost.
        (A, B, 20, [CLS, 51, 52, 53, SEP, 61, 62, 63, 64, SEP], 5),
        (A, B, 10, [CLS, 51, 52, 53, SEP, 61, 62, 63, 64, SEP], 5),
        # B loses its end, one token, and all of it; the last [SEP] stays, of type 1.
        (A, B, 9, [CLS, 51, 52, 53, SEP, 61, 62, 63, SEP], 5),
        (A, B, 6, [CLS, 51, 52, 53, SEP, SEP], 5),
        # Then the first [SEP] goes, and A's end: the last token is still of type 1.
        (A, B, 5, [CLS, 51, 52, 53, SEP], 4),
        (A, B, 4, [CLS, 51, 52, SEP], 3),
        (A, [], 20, [CLS, 51, 52, 53, SEP, SEP], 5),
        ([], B, 20, [CLS, SEP, 61, 62, 63, 64, SEP], 2),
        ([], [], 20, [CLS, SEP, SEP], 2),
    ],
)
def test_a_row_is_the_pair_cut_at_its_end(words, a, b, longest, tokens, num_first):
    features = pair(a, b, words, max_length=longest)
    types = [0] * num_first + [1] * (len(tokens) - num_first)
    assert [column.tolist() for column in features.row(0)] == [tokens, types]
    sample = features[0]
    assert sample.rows[0].tolist() == tokens
    assert sample.tokentypes[0].tolist() == types
    assert sample.rows[0].dtype == sample.tokentypes[0].dtype == torch.int64
    assert features.length(0) == features.row_lengths[0] == len(tokens)


def as_megatron(a: list[int], b: list[int], longest: int) -> tuple[list[int], list[int]]:
    """Return a row made step by step as in docs/megatron.md, "Text preparation"."""
    tokens = [CLS, *a, SEP, *b]
    types = [0] * (len(a) + 2) + [1] * len(b)
    if len(tokens) >= longest:
        tokens, types = tokens[: longest - 1], types[: longest - 1]
    return [*tokens, SEP], [*types, 1]


def test_rows_follow_the_rule_at_all_lengths(words):
    chance = random.Random(5)
    for _ in range(300):
        a = [chance.randrange(10, 99) for _ in range(chance.randrange(12))]
        b = [chance.randrange(10, 99) for _ in range(chance.randrange(30))]
        longest = chance.randrange(4, 40)
        sample = pair(a, b, words, max_length=longest)[0]
        assert (sample.rows[0].tolist(), sample.tokentypes[0].tolist()) == as_megatron(
            a, b, longest
        )


@pytest.fixture
def choices(words) -> PairFeatures:
    """Two samples of two rows each, on one text; A's are cut at 2 tokens."""
    return PairFeatures.of_whole_texts(
        Ragged.of([[51], [52, 53], [54, 55, 56], []]),
        Ragged.of([[61, 62, 63], [71]]),
        second=[1, 0],
        labels=[1, 0],
        tokenizer=words,
        max_length=7,
        max_first=2,
    )


def test_a_sample_has_a_row_for_each_choice(choices):
    assert len(choices) == 2
    first, second = choices
    assert [row.tolist() for row in first.rows] == [
        [CLS, 51, SEP, 71, SEP],
        [CLS, 52, 53, SEP, 71, SEP],
    ]
    assert [row.tolist() for row in second.rows] == [
        [CLS, 54, 55, SEP, 61, 62, SEP],
        [CLS, SEP, 61, 62, 63, SEP],
    ]
    assert [(sample.label, sample.index) for sample in choices] == [(1, 0), (0, 1)]
    assert choices.row_lengths.tolist() == [5, 6, 7, 6]
    assert [choices.length(i) for i in range(2)] == [6, 7]
    assert choices.cut_rows() == 1  # 54 55 [SEP] 61 62 63 has lost its 63
    with pytest.raises(IndexError):
        choices[2]


def test_the_trainer_takes_the_samples(choices):
    check_data(choices, positions=7, vocab_size=100, tokentypes=2)
    batch = collate([choices[0], choices[1]])
    assert batch.tokens.shape == (4, 7)
    assert batch.padding_mask.sum(dim=1).tolist() == [5, 6, 7, 6]
    assert batch.labels.tolist() == [1, 0]
    with pytest.raises(InputError, match="rows of 5 to 7 tokens"):
        check_data(choices, positions=6, vocab_size=100, tokentypes=2)


def test_a_vocabulary_without_cls_is_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[UNK]\na\n")
    with pytest.raises(InputError, match=r"vocab.txt has no \[CLS\] and \[SEP\]"):
        special_ids(load_tokenizer(vocab_file=path))


# --- tokens on disk ---


class Counting:
    """A tokenizer's backend that counts the texts it is given."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.texts = backend, 0

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self.texts += len(texts)
        return self.backend.encode_batch(texts, **options)


TEXTS = ["The cat sat", "", "caf\u00e9, Red!", "the cat SAT"]


def test_tokens_and_their_places_in_the_text(words, tmp_path):
    found = tokens.tokens_of(TEXTS, words, cache=tmp_path, offsets=True)
    assert [row.tolist() for row in found.tokens] == [
        ids("the cat sat"),
        [],
        ids("c ##a ##f ##e , red !"),
        ids("the cat sat"),
    ]
    assert found.starts is not None and found.stops is not None
    assert found.starts[2].tolist() == [0, 1, 2, 3, 4, 6, 9]
    assert found.stops[2].tolist() == [1, 2, 3, 4, 5, 9, 10]


def test_texts_are_cut_once(words, tmp_path):
    counting = Counting(words.backend)
    words = dataclasses.replace(words, backend=counting)
    first = tokens.tokens_of(TEXTS, words, cache=tmp_path)
    again = tokens.tokens_of(TEXTS, words, cache=tmp_path)
    assert counting.texts == len(TEXTS)
    assert np.array_equal(first.tokens.values, again.tokens.values)
    assert np.array_equal(first.tokens.offsets, again.tokens.offsets)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_file_is_made_again(words, tmp_path):
    tokens.tokens_of(TEXTS, words, cache=tmp_path)
    expected = Ragged.of([words.encode(text) for text in TEXTS])
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2]):
        file.unlink()  # what was read before is mapped
        file.write_bytes(content)
        found = tokens.tokens_of(TEXTS, words, cache=tmp_path).tokens
        assert np.array_equal(found.values, expected.values)
        assert np.array_equal(found.offsets, expected.offsets)


def test_the_key_is_of_all_that_decides_the_tokens(words):
    def key(texts: list[str] = TEXTS, tokenizer: Tokenizer = words, offsets: bool = False) -> str:
        return tokens.cache_key(texts, tokenizer, offsets=offsets)

    keys = [
        key(),
        key(["The cat", "sat", *TEXTS[1:]]),
        key(["The cat sa", "t", *TEXTS[1:]]),
        key(TEXTS[:-1]),
        key(tokenizer=dataclasses.replace(words, sha256="0" * 64)),
        key(tokenizer=dataclasses.replace(words, lower_case=False)),
        key(tokenizer=dataclasses.replace(words, kind="tokenizer.json")),
        key(offsets=True),
    ]
    assert len(set(keys)) == len(keys)
    words.encode("the cat")  # use changes a tokenizer inside, which must not count
    assert key() == keys[0]
    assert key(tokenizer=dataclasses.replace(words, source="elsewhere")) == keys[0]


def test_no_texts_at_all(words, tmp_path):
    for _ in range(2):
        assert len(tokens.tokens_of([], words, cache=tmp_path).tokens) == 0


def test_more_texts_than_one_batch(words, tmp_path):
    texts = [f"cat {number}" for number in range(2500)]
    found = tokens.tokens_of(texts, words, cache=tmp_path).tokens
    assert [row.tolist() for row in found] == [words.encode(text) for text in texts]


def test_the_cache_is_where_the_system_wants_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with tokens.token_cache() as folder:
        assert folder == tmp_path / "mlm-eval" / "tokens"
        assert folder.is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "mlm-eval"


def test_without_a_place_to_write_the_cache_is_temporary(words, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    with tokens.token_cache() as folder:
        assert tokens.tokens_of(TEXTS, words, cache=folder).tokens[0].tolist() == ids("the cat sat")
    assert not folder.exists()
