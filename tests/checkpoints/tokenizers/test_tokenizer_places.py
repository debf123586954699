"""The tokenizer that a layout of another project holds is found as one beside a checkpoint is."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.folders import layouts
from support.folders.sentencepiece_models import train_pieces
from support.random_models import byte_vocabulary

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from mlm_eval.checkpoints.tokenizers.copying import copy_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(directory=byte_vocabulary(tmp_path / "words"))


def put(words: Tokenizer, folder: Path) -> None:
    copy_tokenizer(words, folder)


PLACES = {
    "Megatron-Bridge": (layouts.bridge, "iter_0000007"),
    "Megatron-Bridge, its folder": (layouts.bridge, "iter_0000007/tokenizer"),
    "NeMo 2": (layouts.nemo_2, "context/nemo_tokenizer"),
    "NeMo 2, beside the settings": (layouts.nemo_2, "context"),
    "NeMo 2, zarr": (layouts.nemo_2_zarr, "context/nemo_tokenizer"),
    "verl": (layouts.verl, "global_step_20/actor/huggingface"),
}


@pytest.mark.parametrize("place", PLACES)
def test_it_is_found_at_every_door(place: str, words: Tokenizer, tmp_path: Path):
    make, where = PLACES[place]
    doors = make(tmp_path / "run")
    assert find_tokenizer(tmp_path / "run") is None
    put(words, tmp_path / "run" / where)
    for door in doors:
        found = find_tokenizer(tmp_path / "run" / door)
        assert found is not None and found.sha256 == words.sha256, door
    weights = open_checkpoint(tmp_path / "run").provenance.path
    assert find_tokenizer(weights) is not None


def test_of_several_iterations_the_latest_ones_counts(words: Tokenizer, tmp_path: Path):
    layouts.bridge(tmp_path)
    shutil.copytree(tmp_path / "iter_0000007", tmp_path / "iter_0000003")
    put(words, tmp_path / "iter_0000007")
    found = find_tokenizer(tmp_path)
    assert found is not None and "iter_0000007" in found.source
    assert find_tokenizer(tmp_path / "iter_0000003") is None


# ---- NeMo 1 --------------------------------------------------------------------------------------


def nemo(folder: Path, files: dict[str, Path], **said: Any) -> Path:
    """Make a NeMo folder whose tokenizer has hashed names."""
    settings: dict[str, Any] = {"library": "megatron", "type": "GPT2BPETokenizer", **said}
    folder.mkdir(parents=True)
    for name, file in files.items():
        shutil.copy(file, folder / f"0123abcd_{file.name}")
        settings[name] = f"nemo:0123abcd_{file.name}"
    layouts.nemo_ranks(folder, tokenizer=settings)
    return folder


@pytest.fixture(params=["folder", "tar", "gzip"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], Path]:
    def store(folder: Path) -> Path:
        if request.param == "folder":
            return folder
        mode = "w" if request.param == "tar" else "w:gz"
        return layouts.packed(folder, tmp_path / "model.nemo", mode)

    return store


def test_hashed_files_of_a_bpe(stored: Callable[[Path], Path], words: Tokenizer, tmp_path: Path):
    files = {"vocab_file": words.files[0], "merge_file": words.files[1]}
    door = stored(nemo(tmp_path / "made", files))
    found = find_tokenizer(door)
    assert found is not None and found.sha256 == words.sha256
    assert found.encode("a cat") == words.encode("a cat")
    assert "0123abcd_" in found.source
    again = find_tokenizer(open_checkpoint(door).provenance.path)
    assert again is not None and again.sha256 == words.sha256
    copy_tokenizer(found, tmp_path / "copy")
    assert load_tokenizer(directory=tmp_path / "copy").sha256 == words.sha256


def test_hashed_files_of_sentencepiece(stored: Callable[[Path], Path], tmp_path: Path):
    (tmp_path / "pieces").mkdir()
    model = train_pieces(tmp_path / "pieces", 300)
    door = stored(nemo(tmp_path / "made", {"model": model}, library="sentencepiece"))
    found = find_tokenizer(door)
    assert found is not None and found.kind == "sentencepiece"
    assert found.encode("the cat") == load_tokenizer(vocab_file=model).encode("the cat")


@pytest.mark.parametrize(
    "said",
    [
        {"library": "huggingface", "type": "gpt2"},
        {"library": "megatron", "vocab_file": "/raid/vocab.json", "merge_file": None},
        {"library": "sentencepiece", "model": "nemo:../../outside.model"},
        {"library": "sentencepiece", "model": 5},
        "gpt2",
        None,
    ],
)
def test_names_of_elsewhere_are_no_tokenizer(said: Any, tmp_path: Path):
    (tmp_path / "outside.model").write_text("x")
    layouts.nemo_ranks(tmp_path / "a/b", tokenizer=said)
    assert find_tokenizer(tmp_path / "a/b") is None


def test_tokens_that_nemo_adds_are_refused(tmp_path: Path):
    (tmp_path / "pieces").mkdir()
    model = train_pieces(tmp_path / "pieces", 300)
    said = {"library": "sentencepiece", "special_tokens": {"pad_token": "<extra_id_1>"}}
    folder = nemo(tmp_path / "made", {"model": model}, **said)
    with pytest.raises(InputError, match="adds the special tokens.*give the model's tokenizer"):
        find_tokenizer(folder)


def test_nothing_of_the_archive_but_the_tokenizer_is_unpacked(
    words: Tokenizer, tmp_path: Path, cache: Path
):
    files = {"vocab_file": words.files[0], "merge_file": words.files[1]}
    nemo(tmp_path / "made", files)
    find_tokenizer(layouts.packed(tmp_path / "made", tmp_path / "model.nemo"))
    held = sorted(path.name for path in cache.rglob("*") if path.is_file())
    assert held == ["0123abcd_merges.txt", "0123abcd_vocab.json"]


# ---- tiktoken ------------------------------------------------------------------------------------


def ranked(pieces: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))


LISTED = [{"rank": 0, "token_bytes": "IQ==", "token_str": "!"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("qwen.tiktoken", ranked([b"!", b'"', b"the"])),
        ("tokenizer.model", ranked([b"!", b'"', b"the"])),
        ("tekken.json", json.dumps({"vocab": LISTED}).encode()),
        ("o200k.vocab.json", json.dumps(LISTED).encode()),
    ],
)
def test_vocabularies_of_tiktoken_are_refused_by_name(name: str, content: bytes, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    message = f"{name} is a vocabulary of tiktoken.*give the tokenizer.json"
    for how in ({"directory": tmp_path}, {"vocab_file": tmp_path / name}):
        with pytest.raises(InputError, match=message):
            load_tokenizer(**how)


def test_tiktoken_of_nemo_is_refused_by_name(tmp_path: Path):
    (tmp_path / "v.json").write_text(json.dumps(LISTED))
    folder = nemo(tmp_path / "made", {"vocab_file": tmp_path / "v.json"}, library="tiktoken")
    with pytest.raises(InputError, match="has a tokenizer of tiktoken"):
        find_tokenizer(folder)


def test_a_folder_without_any_of_it_has_none(tmp_path: Path):
    layouts.nemo_ranks(tmp_path)
    path = tmp_path / "model_config.yaml"
    said = yaml.safe_load(path.read_text())
    del said["tokenizer"]
    path.write_text(yaml.safe_dump(said))
    assert find_tokenizer(tmp_path) is None
