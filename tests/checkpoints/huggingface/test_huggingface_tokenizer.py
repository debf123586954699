"""The tokenizer of a converted model: added tokens stay, rows too, and none means none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import random_models
from support.folders.sentencepiece_models import train_pieces

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.convert import Conversion, convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.families import FAMILIES
from mlm_eval.checkpoints.huggingface.tokenizer import no_tokenizer_files
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import find_tokenizer, load_tokenizer

ADDED = {"<|user|>": 60, "<tag>": 61, "<|pad|>": 62}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def gpt2_folder(folder: Path) -> Path:
    """Write 60 entries in GPT-2's form and three that were added later, one of them ordinary."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [
        *letters,
        *(letter.upper() for letter in letters),
        "Ġ",
        "th",
        "the",
        ".",
        ",",
        "!",
        "?",
    ]
    pieces += ["<|endoftext|>"]
    write_json(folder / "vocab.json", {piece: index for index, piece in enumerate(pieces)})
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    write_json(folder / "added_tokens.json", ADDED)
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    special["extra_special_tokens"] = ["<|user|>"]  # type: ignore[assignment]
    write_json(folder / "special_tokens_map.json", special)
    assert len(pieces) == 60
    return folder


def bert_folder(folder: Path) -> Path:
    """Write 60 pieces and three that were added later."""
    folder.mkdir(parents=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "##b"]
    pieces += [f"[unused{n}]" for n in range(60 - len(pieces))]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    special = {"content": "<|user|>", "special": True}
    others = {"61": {"content": "<tag>"}, "62": {"content": "<|pad|>", "special": True}}
    settings = {"do_lower_case": True, "added_tokens_decoder": {"60": special, **others}}
    write_json(folder / "tokenizer_config.json", {**settings, "pad_token": "<|pad|>"})
    return folder


MAKERS = {"gpt": gpt2_folder, "bert": bert_folder}


def model(family: str, rows: int) -> Checkpoint:
    base = random_models.GPT if family == "gpt" else random_models.BERT
    return random_models.checkpoint(ModelConfig(**{**vars(base), "vocab_size": rows}))


def rows_of(done: Conversion) -> int:
    tensors = load_file(done.path / "model.safetensors")
    (name,) = (n for n in tensors if n.endswith(("wte.weight", "word_embeddings.weight")))
    size: int = json.loads((done.path / "config.json").read_text())["vocab_size"]
    assert len(tensors[name]) == size
    return size


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_a_round_trip_keeps_added_tokens_and_their_rows(family, tmp_path):
    """Megatron -> HF -> HF -> Megatron -> HF: transformers reads the same ids each time."""
    from transformers import AutoTokenizer

    source = load_tokenizer(directory=MAKERS[family](tmp_path / "words"))
    assert source.vocab_size == 63
    first = convert(model(family, 64), "hf", tmp_path / "first", tokenizer=source)
    assert rows_of(first) == 63 and any("1 rows that pad" in note for note in first.notes)
    again = open_checkpoint(first.path)
    found = find_tokenizer(first.path)
    second = convert(again, "hf", tmp_path / "second", dtype="bfloat16", tokenizer=found)
    assert rows_of(second) == 63
    megatron = tmp_path / "megatron"
    convert(again, "megatron", megatron, tp=1, tokenizer=found)
    there = find_tokenizer(megatron)
    third = convert(open_checkpoint(megatron), "hf", tmp_path / "third", tokenizer=there)
    assert rows_of(third) == 63
    text = "the<|user|> a<tag> the <|pad|>"
    expected = source.encode(text)
    assert {60, 61, 62} < set(expected)
    for folder in (first.path, second.path, third.path):
        theirs = AutoTokenizer.from_pretrained(folder)
        assert len(theirs) == 63 and theirs.pad_token == "<|pad|>"
        assert theirs(text, add_special_tokens=False)["input_ids"] == expected
        ours = find_tokenizer(folder)
        assert ours is not None and ours.encode(text) == expected
        special = [60, 62]
        assert theirs.decode(special, skip_special_tokens=True) == ""
        assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 62


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_rows_of_a_hugging_face_model_are_kept(family, tmp_path):
    """Its table is as long as its config says: a shorter tokenizer is no reason to cut it."""
    words = load_tokenizer(directory=MAKERS[family](tmp_path / "words"))
    padded = convert(model(family, 70), "hf", tmp_path / "padded", vocab="padded", tokenizer=words)
    checkpoint = open_checkpoint(padded.path)
    kept = convert(checkpoint, "hf", tmp_path / "kept", tokenizer=words)
    assert rows_of(kept) == 70 and not kept.notes
    assert rows_of(convert(checkpoint, "hf", tmp_path / "none")) == 70
    cut = convert(checkpoint, "hf", tmp_path / "cut", tokenizer=words, vocab="true")
    assert rows_of(cut) == 63 and "7 rows that pad the vocabulary" in cut.notes[0]
    assert rows_of(convert(checkpoint, "hf", tmp_path / "stated", true_vocab_size=65)) == 65


def test_legacy_names_cut_no_row_of_a_hugging_face_model(tmp_path):
    """Megatron v2.5 wants its tokenizer's rows; a longer table of Hugging Face's is not padding."""
    words = load_tokenizer(directory=gpt2_folder(tmp_path / "words"))
    for rows, written in ((70, 128), (300, 384)):
        source = convert(model("gpt", rows), "hf", tmp_path / f"hf{rows}", vocab="padded")
        checkpoint = open_checkpoint(source.path)
        target = tmp_path / f"legacy{rows}"
        convert(checkpoint, "megatron", target, names="legacy", tokenizer=words)
        result = open_checkpoint(target)
        assert result.config.vocab_size == written
        name = "embedding.word_embeddings.weight"
        stored = result.tensors[name].read()[:rows]
        assert torch.equal(stored, checkpoint.tensors[name].read())


def test_rows_that_no_padding_explains_are_kept(tmp_path):
    """A tokenizer of 63 entries for 1,000 or 9,000 rows may not be this model's."""
    words = load_tokenizer(directory=gpt2_folder(tmp_path / "words"))
    for rows in (9000, 1000):
        done = convert(model("gpt", rows), "hf", tmp_path / str(rows), tokenizer=words)
        assert rows_of(done) == rows
        assert any("more than any padding of Megatron adds" in line for line in done.warnings)
        assert any("--vocab true leaves the others out" in line for line in done.warnings)


def test_a_special_token_that_was_never_given_a_row(tmp_path):
    folder = gpt2_folder(tmp_path / "words")
    settings = {"eos_token": "<|endoftext|>", "mask_token": "<mask>"}
    write_json(folder / "special_tokens_map.json", settings)
    words = load_tokenizer(directory=folder)
    done = convert(model("gpt", 63), "hf", tmp_path / "out", tokenizer=words)
    assert rows_of(done) == 63 and "1 special token(s) for which the model" in done.warnings[0]
    with pytest.raises(InputError, match="not the tokenizer of this model"):
        convert(model("gpt", 62), "hf", tmp_path / "no", tokenizer=words)


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    from transformers import AutoTokenizer

    done = convert(model("gpt", 64), "hf", tmp_path / "out")
    assert done.missing and "the folder holds none" in done.missing[0]
    assert "the folder holds none" in (done.path / "README.md").read_text()
    assert find_tokenizer(done.path) is None
    with pytest.raises(Exception, match="Couldn't instantiate the backend tokenizer"):
        AutoTokenizer.from_pretrained(done.path)
    words = load_tokenizer(directory=gpt2_folder(tmp_path / "words"))
    assert not convert(model("gpt", 64), "hf", tmp_path / "with", tokenizer=words).missing


@pytest.mark.parametrize("model_type", sorted(family.model_type for family in FAMILIES.values()))
def test_transformers_makes_no_empty_tokenizer_of_any_family(model_type, tmp_path):
    """From config.json alone it makes one of a few entries, for which every text is empty."""
    from transformers import AutoTokenizer

    write_json(tmp_path / "config.json", {"model_type": model_type})
    no_tokenizer_files(model_type).write(tmp_path)
    with pytest.raises(Exception, match="instantiate the backend|no tokenizer|added_tokens"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_sentencepiece_model_takes_its_side_files_along(tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    train_pieces(folder, 300)
    write_json(folder / "added_tokens.json", {"<|user|>": 300, "<tag>": 301})
    special = {"extra_special_tokens": ["<|user|>"], "pad_token": "<tag>"}
    write_json(folder / "special_tokens_map.json", special)
    words = load_tokenizer(directory=folder)
    assert words.vocab_size == 302
    done = convert(model("gpt", 310), "hf", tmp_path / "out", tokenizer=words)
    assert rows_of(done) == 302
    back = find_tokenizer(done.path)
    assert back is not None and back.sha256 == words.sha256
    assert json.loads((done.path / "config.json").read_text())["pad_token_id"] == 301
    chance = random.Random(0)
    for _ in range(10):
        text = "".join(chance.choices(["class ", "<|user|>", "<tag>", "method"], k=6))
        assert back.encode(text) == words.encode(text)


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_no_file_is_copied_through_a_link_that_leaves_the_folder(to, tmp_path):
    """A link in somebody's checkpoint may name any file here; a Hub cache consists of links."""
    secret = tmp_path / "elsewhere" / "secret.json"
    secret.parent.mkdir()
    write_json(secret, {"additional_special_tokens": ["<|user|>"], "password": "1234"})
    folder = gpt2_folder(tmp_path / "words")
    (folder / "special_tokens_map.json").unlink()
    (folder / "special_tokens_map.json").symlink_to(secret)
    words = load_tokenizer(directory=folder)
    with pytest.raises(InputError, match="is a link to .*secret.json, outside its folder"):
        convert(model("gpt", 64), to, tmp_path / "out", tokenizer=words)
    assert not (tmp_path / "out").exists()
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs = tmp_path / "models--x--y" / "blobs"
    for place in (snapshot, blobs):
        place.mkdir(parents=True)
    for number, file in enumerate(gpt2_folder(tmp_path / "more").iterdir()):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    cached = load_tokenizer(directory=snapshot)
    done = convert(model("gpt", 64), to, tmp_path / "from-cache", tokenizer=cached)
    found = find_tokenizer(done.path)
    assert found is not None and found.encode("the<|user|>") == cached.encode("the<|user|>")


def test_words_that_are_never_split_are_named_where_they_cannot_be_written(tmp_path):
    from transformers import AutoTokenizer

    folder = bert_folder(tmp_path / "words")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**settings, "never_split": ["a-b", "[unused3]"]})
    words = load_tokenizer(directory=folder)
    done = convert(model("bert", 64), "hf", tmp_path / "out", tokenizer=words)
    assert any("never_split (a-b, [unused3])" in warning for warning in done.warnings)
    assert 11 in words.encode("the [unused3] a")
    theirs = AutoTokenizer.from_pretrained(done.path)
    expected = [5, 1, 1, 1, 6]  # three pieces, as any other word
    assert theirs("the [unused3] a", add_special_tokens=False)["input_ids"] == expected
