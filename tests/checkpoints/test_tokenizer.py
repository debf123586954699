"""Tokenizer: every accepted form, its rules against other people's code, and wrong files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.folders.sentencepiece_models import train_pieces

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer, check_fits, find_tokenizer, load_tokenizer

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello"]
ODD_TEXTS = [
    "",
    " ",
    "hello hello",
    "  two  spaces \n\n\t and a tab's end \r\n",
    "caf\u00e9 na\u00efve \u2014 \u65e5\u672c\u8a9e \U0001f600 \u00a0x\u00ad",
    "I'll we've DON'T 1234567 3.14 @-@ <unk> ==",
    "<|endoftext|> [MASK] </s>",
]


def byte_symbols() -> list[str]:
    """Return the 256 symbols in the order of GPT-2's file, from the library rather than from us."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_gpt2(folder: Path, *, names: tuple[str, str] = ("vocab.json", "merges.txt")) -> Path:
    """Write a GPT-2 vocabulary of 256 bytes, 5 merges and the end of text; ids in that order."""
    pieces = [*byte_symbols(), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    (folder / names[0]).write_text(json.dumps(vocab))
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return folder


def write_bert(path: Path, *, pieces: tuple[str, ...] = ("hello", "##s", "new", "cafe")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "mask"]
    path.write_text("\n".join([*specials, *pieces]) + "\n")
    return path


def test_byte_level_bpe_merges_in_order_and_adds_nothing(tmp_path):
    tokenizer = load_tokenizer(directory=write_gpt2(tmp_path))
    first_merge = 256
    ids = tokenizer.encode("hello hello he")
    space = byte_symbols().index("Ġ")
    assert ids == [first_merge + 3, first_merge + 4, space, first_merge]
    assert tokenizer.kind == "gpt2-bpe"
    assert tokenizer.vocab_size == 262
    assert tokenizer.eot_id == 261
    assert tokenizer.lower_case is None


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_byte_level_bpe_gives_every_text_back(tmp_path, text):
    tokenizer = load_tokenizer(directory=write_gpt2(tmp_path))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_of_text_written_in_a_text_is_text(tmp_path):
    tokenizer = load_tokenizer(directory=write_gpt2(tmp_path))
    ids = tokenizer.encode("<|endoftext|>")
    assert tokenizer.eot_id not in ids
    assert len(ids) == len("<|endoftext|>")  # no merge of ours touches it


@pytest.mark.parametrize(
    "names",
    [
        ("vocab.json", "merges.txt"),
        ("encoder.json", "vocab.bpe"),
        ("gpt2-vocab.json", "gpt2-merges.txt"),
    ],
)
def test_gpt2_files_under_their_three_names(tmp_path, names):
    expected = load_tokenizer(directory=write_gpt2(tmp_path / "a"))
    folder = write_gpt2(tmp_path / "b", names=names)
    by_folder = load_tokenizer(directory=folder)
    by_vocab = load_tokenizer(vocab_file=folder / names[0])
    by_both = load_tokenizer(vocab_file=folder / names[0], merge_file=folder / names[1])
    for tokenizer in (by_folder, by_vocab, by_both):
        assert tokenizer.encode("hello world") == expected.encode("hello world")
        assert tokenizer.sha256 == expected.sha256


def test_digest_is_of_the_content_not_of_the_place(tmp_path):
    first = load_tokenizer(directory=write_gpt2(tmp_path / "a"))
    write_gpt2(tmp_path / "b")
    (tmp_path / "b" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES[:-1]) + "\n")
    assert load_tokenizer(directory=tmp_path / "b").sha256 != first.sha256
    assert first.record() == {
        "kind": "gpt2-bpe",
        "path": str(tmp_path / "a"),
        "vocab_size": 262,
        "sha256": first.sha256,
        "lower_case": None,
    }


@pytest.mark.parametrize(
    ("symbol", "text"),
    [("Ġ", "a b"), ("Ċ", "a\nb"), ("!", "a!"), ("ł", "a\u00a0b"), ("Ń", "\u00ad")],
)
def test_a_byte_without_symbol_is_refused_not_dropped(tmp_path, symbol, text):
    folder = write_gpt2(tmp_path)
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["unused"] = vocab.pop(symbol)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    tokenizer = load_tokenizer(directory=folder)
    assert tokenizer.encode("ab") == [vocab["a"], vocab["b"]]
    with pytest.raises(InputError, match="no symbol for the byte"):
        tokenizer.encode(text)


def write_tokenizer_json(folder: Path, *, skip_ids: int = 0) -> Path:
    """Write a tokenizer.json that adds tokens, truncates and pads, as files of the Hub may."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    source = load_tokenizer(directory=write_gpt2(folder / "source"))
    backend: Backend = source.backend
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 261)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=9, pad_id=261, pad_token="<|endoftext|>")
    content = json.loads(backend.to_str())
    content["model"]["vocab"]["far"] = 262 + skip_ids
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_tokenizer_json_adds_cuts_pads_and_parses_nothing(tmp_path):
    folder = write_tokenizer_json(tmp_path)
    plain = load_tokenizer(directory=tmp_path / "source")
    for form in ({"directory": folder}, {"vocab_file": folder / "tokenizer.json"}):
        tokenizer = load_tokenizer(**form)
        assert tokenizer.kind == "tokenizer.json"
        for text in ODD_TEXTS:
            assert tokenizer.encode(text) == plain.encode(text)
        assert tokenizer.eot_id == 261


def test_size_counts_the_rows_that_ids_can_name(tmp_path):
    for skip_ids, rows in ((0, 263), (7, 270)):
        folder = write_tokenizer_json(tmp_path / str(rows), skip_ids=skip_ids)
        assert load_tokenizer(directory=folder).vocab_size == rows


@pytest.mark.parametrize("stated", ["hello", {"content": "hello", "lstrip": False}])
def test_end_of_text_is_the_one_that_the_config_names(tmp_path, stated):
    folder = write_tokenizer_json(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": stated}))
    tokenizer = load_tokenizer(directory=folder)
    assert tokenizer.eot_id == tokenizer.piece_id("hello") == 259


def test_wordpiece_cuts_words_and_knows_its_special_pieces(tmp_path):
    tokenizer = load_tokenizer(vocab_file=write_bert(tmp_path / "vocab.txt"))
    assert tokenizer.encode("Hellos NEW caf\u00e9 zzz") == [8, 9, 10, 11, 1]
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (2, 3, 4)
    assert tokenizer.encode("[MASK]") == [5, 7, 6]  # written in a text it is three pieces
    assert tokenizer.kind == "bert-wordpiece"
    assert tokenizer.eot_id is None
    assert tokenizer.vocab_size == 12


def test_a_gpt_vocabulary_has_no_bert_pieces(tmp_path):
    tokenizer = load_tokenizer(directory=write_gpt2(tmp_path))
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (None,) * 3


def test_words_up_to_200_letters_are_cut(tmp_path):
    """As in Megatron's own code; the library's and transformers' limit is 100."""
    pieces = ("a", "##a")
    tokenizer = load_tokenizer(vocab_file=write_bert(tmp_path / "vocab.txt", pieces=pieces))
    assert tokenizer.encode("a" * 200) == [8] + [9] * 199
    assert tokenizer.encode("a" * 201) == [1]


def test_blank_lines_at_the_end_of_a_vocabulary_are_no_pieces(tmp_path):
    path = write_bert(tmp_path / "vocab.txt")
    path.write_text(path.read_text() + "\n\n")
    assert load_tokenizer(vocab_file=path).vocab_size == 12


@pytest.mark.parametrize(
    ("name", "pieces", "config", "lower_case"),
    [
        ("vocab.txt", ("hello",), None, True),  # nothing but lower-case pieces
        ("vocab.txt", ("hello", "Hello"), None, False),
        ("bert-uncased-vocab.txt", ("hello", "Hello"), None, False),
        ("bert-lower-vocab.txt", ("Hello",), None, False),
        ("bert-cased-vocab.txt", ("hello",), None, True),
        ("bert-uncased-vocab.txt", ("hello",), {"do_lower_case": False}, False),
        ("vocab.txt", ("Hello",), {"do_lower_case": True}, True),
        ("vocab.txt", ("Hello",), {"unrelated": 1}, False),
    ],
)
def test_lower_case_is_stated_or_the_pieces_decide(tmp_path, name, pieces, config, lower_case):
    path = write_bert(tmp_path / name, pieces=pieces)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(vocab_file=path)
    assert tokenizer.lower_case is lower_case
    hello = tokenizer.encode("hello")
    assert (tokenizer.encode("HELLO") == hello) is (lower_case or hello == [1])


def test_the_name_of_the_folder_says_nothing(tmp_path):
    path = write_bert(tmp_path / "bert_uncased" / "vocab.txt", pieces=("Hello",))
    assert load_tokenizer(directory=path.parent).lower_case is False


def test_without_sentencepiece_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x00")
    with pytest.raises(InputError, match="pip install sentencepiece"):
        load_tokenizer(directory=tmp_path)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_model_gives_the_ids_of_its_own_library(tmp_path, model_type):
    model_file = train_pieces(tmp_path, 600, model_type)
    from sentencepiece import SentencePieceProcessor

    tokenizer = load_tokenizer(directory=tmp_path)
    theirs = SentencePieceProcessor(model_file=str(model_file))
    for text in ODD_TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.vocab_size == 600
    assert tokenizer.eot_id == theirs.eos_id() == 2
    assert tokenizer.decode(tokenizer.encode("class method")) == "class method"
    assert (tokenizer.piece_id("<unk>"), tokenizer.cls_id) == (0, None)


@pytest.mark.parametrize(
    ("place", "asked"),
    [
        (".", "."),
        ("tokenizer", "."),
        (".", "iter_0000010"),
        ("tokenizer", "iter_0000010/mp_rank_00"),
        ("iter_0000010", "iter_0000010/mp_rank_00/model_optim_rng.pt"),
        ("tokenizer", "release"),
        (".", "model.pt"),
    ],
)
def test_the_tokenizer_of_a_checkpoint_is_found_from_any_of_its_parts(tmp_path, place, asked):
    root = tmp_path / "checkpoint"
    for part in ("iter_0000010/mp_rank_00", "release"):
        (root / part).mkdir(parents=True)
    (root / "iter_0000010/mp_rank_00/model_optim_rng.pt").touch()
    (root / "model.pt").touch()
    write_gpt2(root / place)
    found = find_tokenizer(root / asked)
    assert found is not None
    assert found.source == str(root / place)


def test_no_tokenizer_is_taken_from_outside_the_checkpoint(tmp_path):
    write_gpt2(tmp_path)
    for part in ("checkpoint/iter_0000010", "checkpoint/other"):
        (tmp_path / part).mkdir(parents=True)
        assert find_tokenizer(tmp_path / part) is None


def sized(vocab_size: int) -> Tokenizer:
    return Tokenizer("gpt2-bpe", "my-vocab.json", vocab_size, "", None, backend=None)


@pytest.mark.parametrize(
    ("entries", "rows"),
    [(50257, 50257), (50257, 50304), (50257, 51200), (30522, 30720), (1024, 8192)],
)
def test_rows_that_padding_explains_pass(entries, rows):
    assert check_fits(sized(entries), rows) is None


@pytest.mark.parametrize("content", ["5", "null", "[1]", '"model"', "true"])
def test_a_vocabulary_that_is_no_object_is_refused(content, tmp_path):
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(InputError, match="vocab.json holds a .*, expected a JSON object"):
        load_tokenizer(vocab_file=tmp_path / "vocab.json")


def test_a_vocabulary_larger_than_the_model_is_refused():
    with pytest.raises(InputError, match="my-vocab.json has 50257 entries but the model has 50256"):
        check_fits(sized(50257), 50256)


def test_rows_beyond_any_padding_are_doubted():
    assert check_fits(sized(10_000), 18_191) is None
    warning = check_fits(sized(10_000), 18_192)
    assert warning is not None and "10000 entries and the model 18192 rows" in warning
    assert check_fits(sized(256), 1024) is None  # tp 8
    assert check_fits(sized(256), 1000) is not None  # most rows uncovered, and no padded size
    assert check_fits(sized(4), 1024) is not None  # nobody pads so much


def write_bad(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer; expected tokenizer.json"),
        ({"vocab.json": b"{}"}, "holds no tokenizer"),  # a vocabulary without merges
        ({"tokenizer.json": b"{}"}, "is not a readable tokenizer.json"),
        ({"vocab.json": b"{", "merges.txt": b""}, "vocab.json is not JSON"),
        ({"vocab.json": b"[]", "merges.txt": b""}, "holds a list, expected a JSON object"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"x y\n"}, "do not make a byte-level BPE"),
        ({"vocab.txt": b"[PAD]\nhello\n"}, r"no \[UNK\] among its 2 lines"),
        ({"vocab.txt": b"[UNK]\ncaf\xe9\n"}, "vocab.txt, line 2 is not UTF-8"),
        ({"bert-a-vocab.txt": b"", "bert-b-vocab.txt": b""}, "several vocabularies"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_reason(tmp_path, files, message):
    write_bad(tmp_path, files)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(directory=tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("model", ["WordPiece", "WordLevel", "Unigram"])
def test_a_vocabulary_without_an_entry_for_the_unknown_is_named(tmp_path, model):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    made = {
        "WordPiece": lambda: models.WordPiece({"a": 0}, unk_token="[UNK]"),
        "WordLevel": lambda: models.WordLevel({"a": 0}, unk_token="[UNK]"),
        "Unigram": lambda: models.Unigram([("a", 0.0)], unk_id=None),
    }[model]()
    Backend(made).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="unknown"):
        load_tokenizer(directory=tmp_path).encode("b")


def test_options_that_contradict_each_other(tmp_path):
    folder = write_gpt2(tmp_path)
    (folder / "odd.bin").touch()
    (folder / "other.json").write_text("{}")
    for wrong in (
        {},
        {"directory": folder, "vocab_file": folder / "vocab.json"},
        {"directory": folder, "merge_file": folder / "merges.txt"},
        {"merge_file": folder / "merges.txt"},
        {"directory": folder / "absent"},
        {"vocab_file": folder / "absent.json"},
        {"vocab_file": folder / "vocab.json", "merge_file": folder / "absent.txt"},
        {"vocab_file": folder / "odd.bin"},
        {"vocab_file": folder / "other.json"},
    ):
        with pytest.raises(InputError):
            load_tokenizer(**wrong)


def test_no_slow_library_is_imported(tmp_path):
    write_gpt2(tmp_path)
    code = (
        "import sys; from mlm_eval.checkpoints.tokenizer import load_tokenizer; "
        f"load_tokenizer(directory={str(tmp_path)!r}).encode('hello'); "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.realdata
def test_gpt2_vocabulary_agrees_with_transformers(shared_data):
    from transformers import GPT2TokenizerFast

    ours = load_tokenizer(directory=shared_data / "gpt2")
    theirs = GPT2TokenizerFast.from_pretrained(shared_data / "gpt2")
    assert len(theirs) == ours.vocab_size == 50257
    assert ours.eot_id == 50256
    assert ours.encode("Hello world") == [15496, 995]
    text = (shared_data / "wikitext-103" / "wiki.valid.tokens").read_text(encoding="utf-8")
    for sample in (
        text[:200_000],
        *ODD_TEXTS[:-1],
    ):  # transformers parses <|endoftext|>, Megatron does not
        assert ours.encode(sample) == theirs.encode(sample)
    assert ours.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "size"), [("uncased", 30522), ("cased", 28996)])
def test_bert_vocabularies_agree_with_transformers(shared_data, tmp_path, name, size):
    from transformers import BertTokenizer

    path = tmp_path / "vocab.txt"  # a name that does not tell the case
    path.write_bytes((shared_data / "bert" / f"bert-base-{name}-vocab.txt").read_bytes())
    ours = load_tokenizer(vocab_file=path)
    theirs = BertTokenizer(vocab=str(path), do_lower_case=name == "uncased")
    assert ours.lower_case is (name == "uncased")
    assert ours.vocab_size == size
    assert (ours.cls_id, ours.sep_id, ours.mask_id) == (
        theirs.cls_token_id,
        theirs.sep_token_id,
        theirs.mask_token_id,
    )
    text = (shared_data / "wikitext-103" / "wiki.valid.tokens").read_text(encoding="utf-8")
    for sample in (text[:60_000], *ODD_TEXTS[:-1]):
        assert ours.encode(sample) == theirs.encode(sample, add_special_tokens=False)


def test_the_vocabularies_of_the_genuine_checkpoints_load(oracles):
    gpt = load_tokenizer(directory=oracles / "tokenizer")
    assert (gpt.kind, gpt.vocab_size) == ("gpt2-bpe", 1000)
    assert gpt.eot_id is not None
    assert gpt.decode(gpt.encode(ODD_TEXTS[4])) == ODD_TEXTS[4]
    bert = load_tokenizer(vocab_file=oracles / "tokenizer" / "bert_vocab.txt")
    assert (bert.kind, bert.vocab_size, bert.lower_case) == ("bert-wordpiece", 1000, True)
    assert None not in (bert.cls_id, bert.sep_id, bert.mask_id)
