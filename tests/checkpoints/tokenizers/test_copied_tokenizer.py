"""A tokenizer that is copied with a model: found again, replaceable, and nobody's secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import random_models

from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.folders.checkpoint_files import foreign_files
from mlm_eval.checkpoints.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from mlm_eval.checkpoints.tokenizers.copying import copy_tokenizer

TARGETS = ("hf", "megatron", "torch_dist")
BESIDE = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")


def words(folder: Path, names: tuple[str, ...] = ("vocab.json", "merges.txt")) -> Tokenizer:
    random_models.byte_vocabulary(folder)
    for name, new in zip(("vocab.json", "merges.txt"), names, strict=True):
        (folder / name).rename(folder / new)
    return load_tokenizer(vocab_file=folder / names[0], merge_file=folder / names[1])


@pytest.mark.parametrize("to", TARGETS)
def test_files_of_any_name_are_found_again_and_can_be_replaced(tmp_path, to):
    tokenizer = words(tmp_path / "words", ("my-entries.json", "pairs.of.mine.txt"))
    model = random_models.checkpoint(random_models.config(vocab_size=256))
    for _ in range(2):
        convert(model, to, tmp_path / "out", tokenizer=tokenizer, overwrite=True)
    assert foreign_files(tmp_path / "out") == []
    found = find_tokenizer(str(tmp_path / "out"))
    assert found is not None and found.vocab_size == tokenizer.vocab_size
    assert found.encode("the cat") == tokenizer.encode("the cat")


@pytest.mark.parametrize("kind", ["gpt2-bpe", "tokenizer.json"])
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", BESIDE)
def test_a_link_beside_a_vocabulary_gives_nothing_away(tmp_path, to, name, kind):
    """A folder from elsewhere may hold a link to a file of one's own."""
    secret, folder = tmp_path / "home" / "credentials.json", tmp_path / "words"
    secret.parent.mkdir()
    secret.write_text(json.dumps({"unk_token": "password-of-mine"}))
    random_models.byte_vocabulary(folder)
    if kind == "tokenizer.json":
        load_tokenizer(directory=folder).hub_backend().save(str(folder / "tokenizer.json"))
    (folder / name).symlink_to(secret)
    model = random_models.checkpoint(random_models.config(vocab_size=256))
    try:
        convert(model, to, tmp_path / "out", tokenizer=folder)
    except InputError as error:
        assert "link" in str(error) or name == "added_tokens.json"
    written = (tmp_path / "out").rglob("*")
    assert not any(b"password" in path.read_bytes() for path in written if path.is_file())


def test_the_links_of_the_hubs_cache_are_its_files(tmp_path):
    model = tmp_path / "models--me--gpt"
    random_models.byte_vocabulary(tmp_path / "words")
    (tmp_path / "words" / "tokenizer_config.json").write_text('{"unk_token": "a"}')
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted((tmp_path / "words").iterdir())):
        path.rename(model / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    copy_tokenizer(load_tokenizer(directory=snapshot), tmp_path / "out")
    names = ["merges.txt", "tokenizer_config.json", "vocab.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    # A link that leaves the model's own files is none of them.
    (snapshot / "tokenizer_config.json").unlink()
    (tmp_path / "mine.json").write_text("{}")
    (snapshot / "tokenizer_config.json").symlink_to(tmp_path / "mine.json")
    with pytest.raises(InputError, match="tokenizer_config.json is a link to .*mine.json"):
        copy_tokenizer(load_tokenizer(directory=snapshot), tmp_path / "again")
