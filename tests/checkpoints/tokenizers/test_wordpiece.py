"""WordPiece: Megatron's rules character by character, and every switch that files may set."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer
from mlm_eval.checkpoints.tokenizers.wordpiece import WordPieceRules, wordpiece_backend

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CJK = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


def is_punctuation(char: str) -> bool:
    return char in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" or unicodedata.category(char)[0] == "P"


def megatron_words(text: str, *, lower_case: bool) -> list[str]:
    """Return the words of a text, step by step as in Megatron's bert_tokenization.py (v2.5)."""
    spaced = ""
    for char in text:
        category = unicodedata.category(char)
        if char in "\t\n\r" or category == "Zs":
            spaced += " "
        elif char != "\ufffd" and category not in ("Cc", "Cf"):
            cjk = any(first <= ord(char) <= last for first, last in CJK)
            spaced += f" {char} " if cjk else char
    words = []
    for word in spaced.split():
        if lower_case:
            word = unicodedata.normalize("NFD", word.lower())
            word = "".join(char for char in word if unicodedata.category(char) != "Mn")
        words += "".join(f" {c} " if is_punctuation(c) else c for c in word).split()
    return words


def our_words(backend: Any, text: str) -> list[str]:
    normalized = backend.normalizer.normalize_str(text)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]


def backend_of(lower_case: bool) -> Any:
    return wordpiece_backend({"[UNK]": 0}, WordPieceRules(lower_case, lower_case))


def assigned() -> list[str]:
    """Return every character that this Python's Unicode knows, private use too."""
    codes = (code for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    return [char for char in map(chr, codes) if unicodedata.category(char) != "Cn"]


@pytest.mark.long
@pytest.mark.parametrize("lower_case", [True, False])
def test_every_character_is_what_it_is_to_megatron(lower_case):
    """Inside a word, all 280,000 of them; ten a text, since each stands between spaces."""
    backend = backend_of(lower_case)
    chars = assigned()
    differing = []
    for start in range(0, len(chars), 10):
        text = " ".join(f"a{char}b" for char in chars[start : start + 10])
        if megatron_words(text, lower_case=lower_case) != our_words(backend, text):
            differing += [
                char
                for char in chars[start : start + 10]
                if megatron_words(f"a{char}b", lower_case=lower_case)
                != our_words(backend, f"a{char}b")
            ]
    # Two tables of Unicode may be of different years: what changed between them is no difference
    # of rules. Nobody's text holds these few.
    old = {char for char in differing if unicodedata.ucd_3_2_0.category(char) != "Cn"}
    assert not old
    assert len(differing) <= 40, [f"{ord(char):x}" for char in differing]


TEXTS = [
    "ΟΔΥΣΣΕΥΣ ΣΑΣ. ΑΣ.Β Σ ΑΣ' 'Σ ΑΣα ΣΣΣ ΑΣ\u0301 Σ\u0301 ΑΣ\u2019Β Α.Σ Α\u00adΣ",
    "private \ue000use x\uf8ffy \U0010fffd \U000f0000z",
    "\U0002b820\U0002b91f x\U0002ceafy 中文abc",
    "İstanbul DŽ ǅ ﬁ ß ẞ K Å",
    "e\u0301 caf\u00e9 a\u0489b \u0e01\u0e31",
    "zero\u200bwidth\ufeffjoin\u00ad \x00\x7f\x85 \u2028 \u3000 \ufffd",
    "¿que? «x» “y” — $5 a^b ~ `c`",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("lower_case", [True, False])
def test_texts_are_cut_as_megatron_cuts_them(text, lower_case):
    assert our_words(backend_of(lower_case), text) == megatron_words(text, lower_case=lower_case)


@pytest.mark.parametrize("lower_case", [True, False])
def test_random_texts_are_cut_as_megatron_cuts_them(lower_case):
    chance = random.Random(4)
    old = [c for c in assigned() if unicodedata.ucd_3_2_0.category(c) != "Cn"]
    pool = [*"aB .,'-\u0301\u00adΣσςÉ中 \n", *chance.sample(old, 3000)]
    backend = backend_of(lower_case)
    for _ in range(400):
        text = "".join(
            chance.choice(pool if chance.random() < 0.4 else "aBΣ .'\u0301") for _ in range(20)
        )
        assert our_words(backend, text) == megatron_words(text, lower_case=lower_case), text


def write(folder: Path, pieces: Sequence[str], settings: dict[str, Any] | None = None) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *pieces]) + "\n", encoding="utf-8")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory=folder)


def test_words_with_private_use_characters_are_unknown(tmp_path):
    tokenizer = write(tmp_path / "a", ["hello", "x", "##y"])
    assert tokenizer.encode("hello x\ue000y hello") == [5, 1, 5]
    known = write(tmp_path / "b", ["hello", "x", "##\ue000"])
    assert known.encode("x\ue000 hello") == [6, 7, 5]


def test_every_place_is_that_of_the_written_text(tmp_path):
    """Answers are cut out of a passage by these places."""
    tokenizer = write(tmp_path, ["ας", "中", "cafe", "."], {"do_lower_case": True})
    text = "ΑΣ\u200b 中Café."
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    assert [text[start:stop] for start, stop in encoding.offsets] == ["ΑΣ", "中", "Café", "."]
    assert encoding.ids == [5, 6, 7, 8]


PIECES = [
    *("hello", "Hello", "hell", "##o", "@@o", "cafe", "caf\u00e9", "don", "'", "t", "don't", "n"),
    *("\u4e2d", "\u6587", "\u4e2d\u6587", "##\u6587", "Keep-Me", "keep", "-", "me", "<unk>", "e"),
]
WORDS = ["Hello", "hello", "CAF\u00c9", "caf\u00e9", "don't", "\u4e2d\u6587", "Keep-Me", "Keep-Me,"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"tokenize_chinese_chars": False},
        {"do_lower_case": False, "tokenize_chinese_chars": False},
        {"never_split": ["Keep-Me"]},
        {"never_split": ["Keep-Me", "don't", "not-there"], "do_lower_case": False},
        {"never_split": ["caf\u00e9"], "do_lower_case": True},
        {"do_basic_tokenize": False, "do_lower_case": True},
        {"unk_token": "<unk>"},
    ],
)
def test_every_switch_is_read_as_transformers_slow_tokenizer_reads_it(settings, tmp_path):
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    settings = {"do_lower_case": True, **settings}
    ours = write(tmp_path, PIECES, settings)
    theirs = BertTokenizerLegacy.from_pretrained(tmp_path)
    chance = random.Random(1)
    texts = [" ".join(chance.choices(WORDS, k=5)) for _ in range(30)]
    texts += ["".join(chance.choices([*WORDS, " ", "\u4e2d"], k=5)) for _ in range(30)]
    for text in texts:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    for word in settings.get("never_split", []):
        expected = word if word in PIECES else "[UNK]"
        assert ours.decode(ours.encode(word)) == expected


def test_the_prefix_of_pieces_and_the_longest_word_are_read(tmp_path):
    settings = {"wordpieces_prefix": "@@", "do_lower_case": True, "max_input_chars_per_word": 4}
    tokenizer = write(tmp_path, PIECES, settings)
    assert tokenizer.encode("hell hello") == [7, 1]
    settings["max_input_chars_per_word"] = 5
    pieces = [piece for piece in PIECES if piece not in ("hello", "Hello")]
    tokenizer = write(tmp_path / "b", pieces, settings)
    assert [pieces[index - 5] for index in tokenizer.encode("hello")] == ["hell", "@@o"]
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def test_control_characters_stay_on_request(tmp_path):
    plain = write(tmp_path / "a", ["a\x01b", "ab"], {"do_lower_case": True})
    kept = write(tmp_path / "b", ["a\x01b", "ab"], {"do_lower_case": True, "clean_text": False})
    assert (plain.encode("a\x01b"), kept.encode("a\x01b")) == ([6], [5])


def test_special_pieces_have_the_names_that_the_files_give_them(tmp_path):
    settings = {
        "do_lower_case": True,
        "cls_token": "<s>",
        "sep_token": {"content": "</s>", "lstrip": False},
        "mask_token": "<mask>",
    }
    tokenizer = write(tmp_path, ["<s>", "</s>", "<mask>", "a"], settings)
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (5, 6, 7)
    assert tokenizer.hub_backend().encode("a").ids == [5, 8, 6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_lower_case": "yes"}, "do_lower_case is 'yes'; expected true or false"),
        ({"strip_accents": 1}, "strip_accents is 1; expected true or false"),
        ({"tokenize_chinese_chars": []}, "tokenize_chinese_chars is"),
        ({"never_split": "word"}, "never_split is 'word'; expected a list of words"),
        ({"wordpieces_prefix": 3}, "wordpieces_prefix is 3; expected a text"),
        ({"max_input_chars_per_word": 0}, "max_input_chars_per_word is 0"),
        ({"word_tokenizer_type": "mecab"}, "sets word_tokenizer_type to 'mecab', which is no"),
        ({"split_by_camel_case": True}, "sets split_by_camel_case to True, which is no setting"),
        ({"unk_token": "<?>"}, r"it has no <\?> among its"),
    ],
)
def test_settings_that_are_not_known_are_refused_by_name(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        write(tmp_path, PIECES, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"tokenize_chinese_chars": False, "do_lower_case": True},
    ],
)
def test_the_switches_beside_a_tokenizer_json_win_as_in_transformers(settings, tmp_path):
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *PIECES]) + "\n", encoding="utf-8")
    BertTokenizer.from_pretrained(tmp_path, do_lower_case=True).save_pretrained(tmp_path / "fast")
    config = tmp_path / "fast" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    ours = load_tokenizer(directory=tmp_path / "fast")
    theirs = BertTokenizer.from_pretrained(tmp_path / "fast")
    for text in ("Hello CAF\u00c9 caf\u00e9", "\u4e2d\u6587 \u4e2d\u6587x"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("lower_case", [True, False])
def test_a_written_tokenizer_json_is_known_for_what_it_is(lower_case, tmp_path):
    """So that Megatron's name for it can be written, and its entries counted."""
    from mlm_eval.checkpoints.tokenizers.tokenizer_type import added_entries, tokenizer_type

    settings = {"do_lower_case": lower_case}
    slow = write(tmp_path / "slow", PIECES, settings)
    fast = tmp_path / "fast"
    fast.mkdir()
    slow.hub_backend().save(str(fast / "tokenizer.json"))
    found = load_tokenizer(directory=fast)
    assert (found.kind, found.vocab_size) == ("tokenizer.json", slow.vocab_size)
    assert tokenizer_type(found) == tokenizer_type(slow)
    assert tokenizer_type(found).endswith("LowerCase") is lower_case
    assert added_entries(found, {}) == added_entries(slow, {}) == 2
    odd = write(tmp_path / "odd", PIECES, {**settings, "tokenize_chinese_chars": False})
    other = tmp_path / "other"
    other.mkdir()
    odd.hub_backend().save(str(other / "tokenizer.json"))
    assert tokenizer_type(load_tokenizer(directory=other)) == "HuggingFaceTokenizer"
