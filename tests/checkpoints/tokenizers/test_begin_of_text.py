"""The begin-of-text token: which it is, who would add it, and what `--bos` makes of that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.bos_tokenizers import tokenizer_json
from support.folders.sentencepiece_models import train_pieces
from support.random_models import byte_vocabulary

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer
from mlm_eval.checkpoints.tokenizers.begin_of_text import adds_begin, begin_id, choose_begin


def gpt2(folder: Path, **settings: object) -> Tokenizer:
    byte_vocabulary(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocab, "<|endoftext|>": 256}))
    return load_tokenizer(directory=folder)


def pieces(folder: Path, **settings: object) -> Tokenizer:
    folder.mkdir()
    train_pieces(folder, 300)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory=folder)


@pytest.mark.long
def test_which_tokenizers_would_add_it(tmp_path: Path):
    ruled = tokenizer_json(tmp_path / "a", begins=True)
    named = tokenizer_json(tmp_path / "b", begins=False, bos_token="<bos>")
    told = tokenizer_json(tmp_path / "c", begins=False, bos_token="<bos>", add_bos_token=True)
    assert [begin_id(words) for words in (ruled, named, told)] == [256, 256, 256]
    assert [adds_begin(words) for words in (ruled, named, told)] == [True, False, True]
    plain = gpt2(tmp_path / "d")
    assert begin_id(plain) == plain.eot_id == 256 and not adds_begin(plain)
    assert adds_begin(gpt2(tmp_path / "e", add_bos_token=True, bos_token="<|endoftext|>"))
    bare = pieces(tmp_path / "f")
    assert begin_id(bare) == 1 and not adds_begin(bare)
    assert adds_begin(pieces(tmp_path / "g", tokenizer_class="LlamaTokenizer"))
    assert adds_begin(pieces(tmp_path / "h", tokenizer_class="GemmaTokenizerFast"))
    said = pieces(tmp_path / "i", tokenizer_class="LlamaTokenizer", add_bos_token=False)
    assert not adds_begin(said)


def test_what_the_option_makes_of_it(tmp_path: Path):
    adding = tokenizer_json(tmp_path / "a", begins=True)
    plain = gpt2(tmp_path / "b")
    assert choose_begin("yes", plain).ids == choose_begin("yes", adding).ids == (256,)
    assert choose_begin("no", adding).ids == () and choose_begin("no", adding).warning is None
    auto = choose_begin("auto", adding)
    assert auto.ids == () and "puts <bos> before a text" in str(auto.warning)
    assert auto.record() == {"bos": "auto", "bos_id": None}
    assert choose_begin("auto", plain).warning is None
    follows = choose_begin("auto", adding, as_tokenizer=True)
    assert follows.ids == (256,) and follows.warning is None
    assert choose_begin("auto", plain, as_tokenizer=True).ids == ()
    assert choose_begin("auto", None).ids == ()


def test_what_cannot_be_is_refused(tmp_path: Path):
    bytes_only = load_tokenizer(directory=byte_vocabulary(tmp_path / "a"))
    with pytest.raises(InputError, match="has no begin-of-text token"):
        choose_begin("yes", bytes_only)
    with pytest.raises(InputError, match="--bos maybe is unknown; choose auto, yes, no"):
        choose_begin("maybe", bytes_only)
    with pytest.raises(InputError, match="needs the tokenizer"):
        choose_begin("yes", None)
