"""Tokens beside a vocabulary: ids of random texts against transformers' own tokenizers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.folders.sentencepiece_models import train_pieces

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.tokenizer import tokenizer_files
from mlm_eval.checkpoints.tokenizer import Tokenizer, check_fits, find_tokenizer, load_tokenizer
from mlm_eval.harness.hub_encoding import HubEncoding

WORDS = [
    "hello",
    "World",
    "THE",
    "the",
    "cat's",
    "12",
    "naïve",
    "—",
    "x-y",
    "...",
    "NEWTOK",
    "brand",
]
TOKENS = ["<|user|>", "<tag>", "newtok", "Brand", "[ADD]", "w w", "<|x|>", "é!", "ADD", "<tag>2"]
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
BASE = 300
"""Entries of the vocabularies here, before anything is added."""


def write_vocabulary(kind: str, folder: Path) -> Path:
    """Write 300 entries of a kind: all bytes, or BERT's special pieces and letters."""
    from tokenizers import pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    if kind == "gpt2":
        merges = ["h e", "l l", "he ll", "hell o", "Ġ t", "t h", "th e", "e w", "n ew", "Ġ hello"]
        pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
        pieces += [merge.replace(" ", "") for merge in merges]
        pieces += [f"spare{n}" for n in range(BASE - len(pieces) - 1)] + ["<|endoftext|>"]
        vocab = {piece: index for index, piece in enumerate(pieces)}
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    else:
        letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "the", "new", "##tok"]
        pieces += letters + [f"##{letter}" for letter in letters] + ["—", "é"]
        pieces += [f"[unused{n}]" for n in range(BASE - len(pieces))]
        (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    assert len(pieces) == BASE
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def added_at_random(chance: random.Random) -> list[dict[str, Any]]:
    """Return up to four added tokens, each switch on with a probability of 0.3."""
    return [
        {"content": token, **{flag: chance.random() < 0.3 for flag in FLAGS}}
        for token in chance.sample(TOKENS, chance.randrange(1, 5))
    ]


def text_at_random(tokens: list[dict[str, Any]], chance: random.Random) -> str:
    """Return words and added tokens, with and without white space between them."""
    parts = []
    for _ in range(chance.randrange(1, 9)):
        parts.append(chance.choice(tokens)["content"] if chance.random() < 0.5 else "")
        parts.append(parts.pop() or chance.choice(WORDS))
        parts.append(chance.choice([" ", "", "  ", "\n", "\t "]))
    return "".join(parts)


def write_side_files(
    folder: Path, form: str, tokens: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    """Write the tokens in one of the three forms in which transformers has kept them."""
    contents = [token["content"] for token in tokens]
    if form == "added_tokens_decoder":
        decoder = {str(BASE + index): token for index, token in enumerate(tokens)}
        settings = {**settings, "added_tokens_decoder": decoder, "pad_token": "<newpad>"}
    else:
        special = [token["content"] for token in tokens if token["special"]]
        special = contents if form == "special_tokens_map" else special
        write_json(
            folder / "special_tokens_map.json",
            {"additional_special_tokens": special, "pad_token": "<newpad>"},
        )
    if form == "added_tokens":
        ids = {content: BASE + index for index, content in enumerate(contents)}
        write_json(folder / "added_tokens.json", ids)
    write_json(folder / "tokenizer_config.json", settings)


@pytest.mark.parametrize("form", ["added_tokens_decoder", "added_tokens", "special_tokens_map"])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_ids_are_those_of_transformers(kind, form, tmp_path):
    """12 tokenizers with random added tokens, 20 random texts each; sizes too."""
    from transformers import BertTokenizer, GPT2Tokenizer

    chance = random.Random(f"{kind} {form}")
    for trial in range(12):
        folder = write_vocabulary(kind, tmp_path / str(trial))
        tokens = added_at_random(chance)
        settings: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer"}
        if kind == "bert":
            settings = {
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": chance.random() < 0.6,
                "strip_accents": chance.choice([None, True, False]),
            }
        elif chance.random() < 0.3:
            settings["add_prefix_space"] = True
        write_side_files(folder, form, tokens, settings)
        ours = load_tokenizer(directory=folder)
        theirs = (BertTokenizer if kind == "bert" else GPT2Tokenizer).from_pretrained(folder)
        assert ours.vocab_size == len(theirs) == BASE + len(tokens) + 1
        for _ in range(20):
            text = text_at_random(tokens, chance)
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode(text) == expected, (text, tokens, settings)


@pytest.mark.parametrize("lower_case", [True, False])
def test_ids_are_those_of_transformers_slow_bert(lower_case, tmp_path):
    """The slow tokenizer reads such tokens from a trie; plain ones come out the same."""
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    folder = write_vocabulary("bert", tmp_path)
    tokens = [
        {"content": token, "normalized": False, "special": special}
        for token, special in (("<|user|>", True), ("<tag>", False), ("[unused23]", True))
    ]
    decoder = {str(BASE + index): token for index, token in enumerate(tokens[:2])}
    decoder["222"] = tokens[2]
    assert (folder / "vocab.txt").read_text().split("\n")[222] == "[unused23]"
    settings = {"do_lower_case": lower_case, "added_tokens_decoder": decoder}
    write_json(folder / "tokenizer_config.json", settings)
    ours = load_tokenizer(directory=folder)
    theirs = BertTokenizerLegacy.from_pretrained(folder)
    chance = random.Random(3)
    for _ in range(60):
        text = text_at_random(tokens, chance)
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    assert 222 in ours.encode("a[unused23]b")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """A sentencepiece model of 600 pieces."""
    return train_pieces(tmp_path_factory.mktemp("pieces"), 600)


def with_pieces(folder: Path, pieces: Path, tokens: list[dict[str, Any]], **more: Any) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    decoder = {str(600 + index): token for index, token in enumerate(tokens)}
    settings = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder, **more}
    write_json(folder / "tokenizer_config.json", settings)
    return folder


@pytest.mark.parametrize(
    ("legacy", "prefix"), [(True, None), (True, False), (False, None), (False, False)]
)
def test_sentencepiece_ids_are_those_of_transformers(pieces, legacy, prefix, tmp_path):
    """Against the slow class, which runs the library between added tokens as we do.

    Without `legacy` it never puts a space before a text, and we do so at the start alone unless
    `add_prefix_space` is false; texts begin with a special token there, after which none is put.
    """
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    class Slow(SentencePieceBackend):
        vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012

    chance = random.Random(5)
    for trial in range(10):
        tokens = [
            {
                "content": token,
                "normalized": False,
                "special": chance.random() < 0.5,
                "lstrip": chance.random() < 0.3,
                "rstrip": chance.random() < 0.3,
            }
            for token in chance.sample(["<|user|>", "<tag>", "[ADD]", "w w"], 3)
        ]
        tokens[0]["special"] = True
        more = {} if prefix is None else {"add_prefix_space": prefix}
        tokens = tokens if trial else []
        folder = with_pieces(
            tmp_path / f"{trial}", pieces, tokens, legacy=legacy, unk_token="<unk>", **more
        )
        ours, theirs = load_tokenizer(directory=folder), Slow.from_pretrained(folder)
        assert ours.vocab_size == 600 + len(tokens)
        if not tokens and prefix is None and not legacy:
            continue
        for _ in range(20):
            text = text_at_random(tokens or [{"content": "class"}], chance)
            if not legacy and prefix is None:
                text = tokens[0]["content"] + text
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode(text) == expected, (text, tokens)


def test_sentencepiece_gives_a_text_with_added_tokens_back(pieces, tmp_path):
    tokens = [{"content": "<|user|>", "special": True}, {"content": "<tag>"}]
    tokenizer = load_tokenizer(directory=with_pieces(tmp_path / "a", pieces, tokens))
    text = "class method<|user|>statement<tag><tag>"
    ids = tokenizer.encode(text)
    assert ids.count(600) == 1 and ids[-2:] == [601, 601]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.piece_id("<tag>"), tokenizer.piece_id("<other>")) == (601, None)


def test_a_token_that_is_read_two_ways_is_refused(pieces, tmp_path):
    tokens = [{"content": "<tag>", "single_word": True}]
    folder = with_pieces(tmp_path / "a", pieces, tokens)
    with pytest.raises(InputError, match="'<tag>' with single_word"):
        load_tokenizer(directory=folder)


def test_special_entries_of_the_vocabulary_itself_stay_text(tmp_path):
    """As in Megatron, also where files repeat them; those that a user added are read."""
    folder = write_vocabulary("gpt2", tmp_path / "gpt2")
    write_side_files(
        folder,
        "added_tokens_decoder",
        [{"content": "<|user|>", "special": True}],
        {"eos_token": "<|endoftext|>"},
    )
    tokenizer = load_tokenizer(directory=folder)
    assert tokenizer.encode("<|user|>") == [BASE]
    assert tokenizer.eot_id == BASE - 1 and tokenizer.eot_id not in tokenizer.encode(
        "<|endoftext|>"
    )
    hub = tokenizer.hub_backend()
    assert hub.encode("<|endoftext|><|user|>").ids == [BASE - 1, BASE]
    assert hub.decode([BASE - 1, BASE], skip_special_tokens=True) == ""


def test_a_tokenizer_json_reads_its_added_tokens_too(tmp_path):
    from transformers import AutoTokenizer

    folder = write_vocabulary("gpt2", tmp_path / "slow")
    tokens = [{"content": "<|user|>", "special": True}, {"content": "<tag>"}]
    write_side_files(folder, "added_tokens", [{**t, "special": True} for t in tokens], {})
    slow = load_tokenizer(directory=folder)
    fast = tmp_path / "fast"
    fast.mkdir()
    slow.hub_backend().save(str(fast / "tokenizer.json"))
    write_json(
        fast / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "extra_special_tokens": ["<later>"],
            "eos_token": "<|endoftext|>",
        },
    )
    ours, theirs = load_tokenizer(directory=fast), AutoTokenizer.from_pretrained(fast)
    assert ours.vocab_size == len(theirs) == BASE + 4
    assert ours.sha256 != slow.sha256
    text = "hello<|user|> the<tag><later>"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode("<|endoftext|>") != theirs("<|endoftext|>")["input_ids"] == [BASE - 1]


def test_a_vocabulary_of_far_ids_is_refused(tmp_path):
    """Not filled up: sixteen million ids would be made."""
    folder = write_vocabulary("gpt2", tmp_path)
    vocab = json.loads((folder / "vocab.json").read_text())
    write_json(folder / "vocab.json", {**vocab, "far": 2**24 - 2})
    write_json(folder / "added_tokens.json", {"<a>": 2**24 - 1})
    with pytest.raises(InputError, match="ids out; is it damaged"):
        load_tokenizer(directory=folder)


def test_two_tokens_of_one_normalized_form_are_refused(tmp_path):
    folder = write_vocabulary("bert", tmp_path)
    write_json(folder / "added_tokens.json", {"Brand": BASE, "brand": BASE + 1})
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True})
    with pytest.raises(InputError, match="'Brand' and 'brand', which are the same once"):
        load_tokenizer(directory=folder)
    write_json(folder / "tokenizer_config.json", {"do_lower_case": False})
    assert load_tokenizer(directory=folder).encode("brandBrand") == [BASE + 1, BASE]


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_ids_may_leave_gaps(kind, tmp_path):
    folder = write_vocabulary(kind, tmp_path)
    write_json(folder / "added_tokens.json", {"<b>": BASE + 5, "<a>": BASE + 2})
    tokenizer = load_tokenizer(directory=folder)
    assert tokenizer.vocab_size == BASE + 6
    assert tokenizer.encode("<b><a>") == [BASE + 5, BASE + 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", {"<a>": 7}, "give the id 7 to the added token '<a>', its vocabulary"),
        ("added_tokens.json", {"hello": 301}, "the token 'hello' the id 301, its vocabulary"),
        ("added_tokens.json", {"<a>": 300, "<b>": 300}, "adds the id '300' twice"),
        ("added_tokens.json", {"<a>": 4294967295}, "is it damaged"),
        ("added_tokens.json", {"<a>": -1}, "expected a text and an id of 0 or more"),
        ("added_tokens.json", {"<a>": True}, "expected a text and an id of 0 or more"),
        ("added_tokens.json", {"": 300}, "expected a text and an id of 0 or more"),
        ("added_tokens.json", [1], "holds a list, expected a JSON object"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder is no JSON"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"300": "a"}}, "adds 'a' as a token"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"300": {"content": "<a>", "glow": True}}},
            "gives the token '<a>' the setting glow = True, which is not known",
        ),
        ("special_tokens_map.json", {"pad_token": 3}, "names 3 as a special token"),
        ("special_tokens_map.json", {"additional_special_tokens": "<a>"}, "is no list of tokens"),
    ],
)
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_side_files_that_contradict_the_vocabulary_are_refused(
    kind, name, content, message, tmp_path
):
    folder = write_vocabulary(kind, tmp_path)
    write_json(folder / name, content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(directory=folder)


def test_a_special_token_without_a_row_is_no_reason_to_refuse(tmp_path):
    """Files may name one for padding that the model was never given."""
    folder = write_vocabulary("gpt2", tmp_path)
    write_json(folder / "special_tokens_map.json", {"pad_token": "<pad>"})
    tokenizer = load_tokenizer(directory=folder)
    assert (tokenizer.vocab_size, tokenizer.unnumbered) == (BASE + 1, 1)
    assert check_fits(tokenizer, BASE + 1) is None
    warning = check_fits(tokenizer, BASE)
    assert warning is not None and "1 special token(s) for which the model" in warning
    with pytest.raises(InputError, match="is not the tokenizer of this model"):
        check_fits(tokenizer, BASE - 1)


def test_bytes_without_a_symbol_may_stand_in_an_added_token(tmp_path):
    folder = write_vocabulary("gpt2", tmp_path)
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["nothing"] = vocab.pop("|")
    write_json(folder / "vocab.json", vocab)
    write_json(folder / "added_tokens.json", {"<|user|>": BASE})
    tokenizer = load_tokenizer(directory=folder)
    assert tokenizer.encode("hello<|user|>")[-1] == BASE
    with pytest.raises(InputError, match=r"no symbol for the byte\(s\) \[124\]"):
        tokenizer.encode("<|user|> a|b")


@pytest.mark.parametrize(
    ("kind", "other"),
    [("gpt2", "Qwen2Tokenizer"), ("gpt2", "CLIPTokenizer"), ("bert", "BertJapaneseTokenizer")],
)
def test_a_class_with_rules_of_its_own_is_refused(kind, other, tmp_path):
    folder = write_vocabulary(kind, tmp_path)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": other})
    with pytest.raises(InputError, match=f"{other}.*give the tokenizer.json of the model"):
        load_tokenizer(directory=folder)


def test_sentencepiece_classes_with_other_ids_are_refused(pieces, tmp_path):
    for number, other in enumerate(("XLMRobertaTokenizer", "T5Tokenizer", "AlbertTokenizer")):
        folder = with_pieces(tmp_path / str(number), pieces, [], tokenizer_class=other)
        with pytest.raises(InputError, match=f"{other}.*give the tokenizer.json of the model"):
            load_tokenizer(directory=folder)
    folder = with_pieces(tmp_path / "kwargs", pieces, [], sp_model_kwargs={"alpha": 0.1})
    with pytest.raises(InputError, match="sp_model_kwargs"):
        load_tokenizer(directory=folder)


def test_side_files_travel_with_the_vocabulary(tmp_path):
    """So that a copy beside a checkpoint is the same tokenizer."""
    folder = write_vocabulary("gpt2", tmp_path / "source")
    write_json(folder / "added_tokens.json", {"<|user|>": BASE})
    tokenizer = load_tokenizer(directory=folder)
    target = tmp_path / "checkpoint" / "tokenizer"
    target.mkdir(parents=True)
    for file in tokenizer.files:
        (target / file.name).write_bytes(file.read_bytes())
    found = find_tokenizer(tmp_path / "checkpoint")
    assert isinstance(found, Tokenizer)
    assert (found.sha256, found.vocab_size) == (tokenizer.sha256, BASE + 1)


def test_the_digest_of_a_plain_vocabulary_is_that_of_its_files(tmp_path):
    """A configuration that changes no id changes no digest; an added token does."""
    folder = write_vocabulary("bert", tmp_path)
    plain = load_tokenizer(directory=folder).sha256
    write_json(folder / "tokenizer_config.json", {"do_lower_case": False, "model_max_length": 5})
    assert load_tokenizer(directory=folder).sha256 == plain
    write_json(folder / "added_tokens.json", {"<|user|>": BASE})
    assert load_tokenizer(directory=folder).sha256 != plain


def test_the_end_of_text_may_be_an_added_token(pieces, tmp_path):
    token = {"content": "<|im_end|>", "special": True}
    folder = write_vocabulary("gpt2", tmp_path / "gpt2")
    write_side_files(folder, "added_tokens_decoder", [token], {"eos_token": "<|im_end|>"})
    assert load_tokenizer(directory=folder).eot_id == BASE
    sentences = with_pieces(tmp_path / "pieces", pieces, [token], eos_token="<|im_end|>")
    assert load_tokenizer(directory=sentences).eot_id == 600


@pytest.mark.parametrize("stated", [True, False])
def test_the_harness_adds_bos_where_the_files_say_so(stated, tmp_path):
    from transformers import AutoTokenizer

    folder = write_vocabulary("gpt2", tmp_path / "slow")
    settings = {"bos_token": "<|endoftext|>", "add_bos_token": stated}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **settings})
    tokenizer = load_tokenizer(directory=folder)
    ours = HubEncoding(tokenizer).encode("hello")
    assert ours == AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]
    assert (ours[0] == BASE - 1) is stated
    fast = tmp_path / "fast"
    fast.mkdir()
    tokenizer_files(tokenizer, family="gpt", max_length=64).write(fast)
    assert AutoTokenizer.from_pretrained(fast)("hello")["input_ids"] == ours


def test_the_harness_reads_added_tokens_of_a_sentencepiece_model(pieces, tmp_path):
    tokens = [{"content": "<|user|>", "special": True}, {"content": "<tag>"}]
    tokenizer = load_tokenizer(directory=with_pieces(tmp_path / "a", pieces, tokens))
    encoding = HubEncoding(tokenizer)
    ids = encoding.encode("class<|user|>method<tag>")
    assert 600 in ids and 601 in ids
    assert encoding.decode(ids) == "class method<tag>"
