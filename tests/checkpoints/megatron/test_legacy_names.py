"""Which parameter names a result has, and whether Megatron v2.5 loads it under the legacy ones.

That version cannot be had here. It builds its model from the run's own arguments, refuses a file
whose args differ from these in a few fields, and loads the state dict key by key; so files are
compared with those that it saved itself.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_bert
from support.paths import ORACLES
from support.random_models import (
    BERT,
    GPT,
    LLAMA,
    byte_vocabulary,
    checkpoint_from_state_dict,
    config,
    state_dict,
)
from test_megatron_writer import CONFIGS, contents, flat, rank_files

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.torch_file import read_torch_file
from mlm_eval.checkpoints.megatron.layout import layout_with_same_rows, save_layout
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer
from mlm_eval.checkpoints.tokenizers.tokenizer_type import added_entries, tokenizer_type
from mlm_eval.model.initial import new_checkpoint, with_head

COMPARED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "make_vocab_size_divisible_by",
    "padded_vocab_size",
    "tokenizer_type",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)
"""What v2.5 compares when it loads (docs/megatron.md, "Arguments")."""

ENTRIES = {"v25_gpt_tp4_h8": 1000, "v25_bert_tp2": 1002, "v25_bertmc_tp2": 1002}
"""Of the tokenizers of genuine checkpoints, as v2.5 counted them."""

PLAIN = config(GPT, activation="gelu_tanh")
WIDE = dataclasses.replace(BERT, vocab_size=256)


def memory(model: ModelConfig, names: str | None = None, **args: Any) -> Checkpoint:
    made = checkpoint_from_state_dict(model, state_dict(model), args=args)
    return dataclasses.replace(made, provenance=dataclasses.replace(made.provenance, names=names))


def saved_names(folder: Path) -> str:
    """The names that the files of a written checkpoint have."""
    model = contents(next(iter(rank_files(folder).values())))["model"]
    return "legacy" if "language_model" in model else "core"


def saved_args(folder: Path) -> dict[str, Any]:
    return vars(contents(next(iter(rank_files(folder).values())))["args"])


def padded(entries: int, divisor: int, tp: int) -> int:
    """Megatron's formula."""
    size = entries
    while size % (divisor * tp):
        size += 1
    return size


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    """A WordPiece vocabulary without [BOS] and [EOS]."""
    return tiny_bert.tokenizer(tmp_path / "words")


# --- whose names ---


@pytest.mark.parametrize(
    ("model", "source", "asked", "written"),
    [
        (PLAIN, None, None, "core"),  # of a Hugging Face folder, for one
        (PLAIN, "core", None, "core"),
        (PLAIN, "legacy", None, "legacy"),
        (PLAIN, "legacy", "core", "core"),
        (PLAIN, "core", "legacy", "legacy"),
        (PLAIN, None, "legacy", "legacy"),
        (BERT, "legacy", None, "legacy"),
        (BERT, "core", None, "core"),
        (LLAMA, "legacy", None, "core"),  # legacy code of 2023: v2.5 has no such model
        (CONFIGS["classification"], "core", None, "legacy"),  # nor has megatron-core
        (CONFIGS["questions"], "core", None, "legacy"),  # no Megatron has
        (CONFIGS["two kinds of positions"], "legacy", None, "legacy"),
    ],
)
def test_names_are_those_of_the_source_unless_others_are_asked_for(
    model: ModelConfig, source: str | None, asked: str | None, written: str, tmp_path: Path
) -> None:
    checkpoint = memory(model, source)
    done = convert(checkpoint, "megatron", tmp_path / "out", names=asked)
    assert saved_names(done.path) == open_checkpoint(done.path).provenance.names == written
    if model is LLAMA:
        assert done.notes == [
            "megatron-core's names: Megatron v2.5, whose the source's are, has no rotary positions"
        ]
    if model is CONFIGS["questions"]:
        assert done.warnings == [
            "no release of Megatron-LM has this model: megatron-core has no task heads "
            "(classification, multiple choice, question answering), and v2.5, whose names the "
            "files have, no head for question answering"
        ]


@pytest.mark.parametrize("source", ["mcore016_gpt2_tp2_dist", "mcore016_llama_tp2", "v10_gpt_tp2"])
def test_readers_say_whose_names_they_found(source: str) -> None:
    names = open_checkpoint(ORACLES / source).provenance.names
    assert names == ("legacy" if source.startswith("v") else "core")


@pytest.mark.parametrize("to", ["megatron", "torch_dist"])
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"parallel_residual": True}, "attention and MLP side by side"),
        ({"position_embedding_type": "alibi"}, "ALiBi positions"),
        ({"embedding_layernorm": True}, "norm of the embeddings"),
    ],
)
def test_what_no_megatron_has_is_refused_by_name(
    changes: dict[str, Any], what: str, to: str, tmp_path: Path
) -> None:
    source = new_checkpoint(config(GPT, **changes), seed=1)
    with pytest.raises(InputError, match=f"no model with {what}.*convert it --to hf"):
        convert(source, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Every model that v2.5 cannot build, by the setting that it lacks.
LACKING: dict[str, tuple[ModelConfig, str]] = {
    "rotary": (config(GPT, position_embedding_type="rope"), "rotary positions"),
    "both positions": (CONFIGS["two kinds of positions"], "rotary positions"),
    "no positions": (config(GPT, position_embedding_type="none"), "without learned positions"),
    "RMSNorm": (config(GPT, normalization="RMSNorm"), "RMSNorm"),
    "SwiGLU": (config(GPT, activation="swiglu"), "SwiGLU"),
    "squared ReLU": (CONFIGS["gpt squared relu"], "activation squared_relu"),
    "GQA": (config(GPT, num_query_groups=2), "grouped-query attention"),
    "layernorm-1p": (CONFIGS["layernorm 1p"], "apply_layernorm_1p"),
    "no biases": (CONFIGS["gpt tanh without biases"], "linear layers without biases"),
    "QKV bias only": (config(GPT, add_bias_linear=False), "linear layers without biases"),
    "untied": (config(GPT, untie_embeddings_and_output_weights=True), "output table of its own"),
    "QK norm": (CONFIGS["qk layernorm"], "norm of queries and keys"),
    "questions": (CONFIGS["questions"], "head for question answering"),
    "bare": (CONFIGS["bert bare"], "BERT without a pooler"),
    "one token type": (config(BERT, num_tokentypes=1), "without two token types"),
    "half BERT": (
        config(BERT, binary_head=False, pooler=False, num_tokentypes=2),
        "token types without a binary head",
    ),
    "no LM head": (config(BERT, lm_head=False), "binary head without a language-model head"),
    "two GELUs": (config(BERT, head_activation="gelu_tanh"), "gelu in the MLP and gelu_tanh"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_v25_lacks_is_refused_under_its_names(name: str, tmp_path: Path) -> None:
    model, lacking = LACKING[name]
    way_out = "(write core names|leave out --names|keep the format it has)"
    with pytest.raises(InputError, match=f"^Megatron v2.5 has no .*{lacking}.*; {way_out}$"):
        convert(memory(model), "megatron", tmp_path / "out", names="legacy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "model",
    [
        PLAIN,
        config(GPT, kv_channels=12, ffn_hidden_size=20, layernorm_epsilon=1e-6),
        BERT,
        config(BERT, activation="gelu_tanh"),
        CONFIGS["bert tanh twice"],
        CONFIGS["bert original order"],
        CONFIGS["classification"],
        CONFIGS["multiple choice"],
        config(BERT, binary_head=False, pooler=False, num_tokentypes=0),
    ],
)
def test_what_v25_has_is_written_under_its_names(model: ModelConfig, tmp_path: Path) -> None:
    done = convert(memory(model), "megatron", tmp_path / "out", names="legacy", tp=2)
    written = open_checkpoint(done.path)
    assert saved_names(done.path) == "legacy"
    assert dataclasses.replace(written.config, vocab_size=model.vocab_size) == model


@pytest.mark.parametrize(
    ("to", "names", "message"),
    [
        ("hf", "core", "--names core is for --to megatron; a Hugging Face folder has its own"),
        ("torch_dist", "legacy", "--names legacy is for --to megatron; torch_dist has core names"),
        ("megatron", "old", "--names 'old' is unknown; use core, legacy"),
    ],
)
def test_names_that_a_format_does_not_have_are_refused(
    to: str, names: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        convert(memory(PLAIN), to, tmp_path / "out", names=names)
    assert list(tmp_path.iterdir()) == []


# --- what v2.5 compares ---


@pytest.mark.parametrize("name", ENTRIES)
def test_what_v25_compares_is_as_it_wrote_it(name: str, oracles: Path, tmp_path: Path) -> None:
    """At the same size nothing differs; at others what follows from the size, by its formula."""
    genuine = oracles / name
    source = open_checkpoint(genuine)
    files = oracles / "tokenizer"
    words = (
        load_tokenizer(vocab_file=files / "vocab.json", merge_file=files / "merges.txt")
        if "gpt" in name
        else load_tokenizer(vocab_file=files / "bert_vocab.txt")
    )
    assert words.vocab_size + added_entries(words, source.provenance.args) == ENTRIES[name]
    theirs = vars(read_torch_file(rank_files(genuine)["mp_rank_00"]).value["args"])
    for tp, pp in ((source.provenance.tensor_parallel, 1), (1, 1), (2, 2), (4, 2)):
        out = tmp_path / f"{tp}x{pp}"
        done = convert(source, "megatron", out, tp=tp, pp=pp, tokenizer=words)
        assert done.warnings == []
        without = convert(source, "megatron", tmp_path / "x", tp=tp, pp=pp, overwrite=True)
        doubtful = tp < source.provenance.tensor_parallel  # fewer rows might do
        assert len(without.warnings) == doubtful
        for file in rank_files(out).values():
            ours = contents(file)
            expected = {field: theirs[field] for field in COMPARED}
            expected["padded_vocab_size"] = padded(ENTRIES[name], 64, tp)
            expected |= {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
            assert {field: vars(ours["args"])[field] for field in COMPARED} == expected
            assert ours["checkpoint_version"] == 3.0
            model = flat(ours["model"])
            embedding = "language_model/embedding/word_embeddings/weight"
            if embedding in model:
                assert model[embedding].shape == (expected["padded_vocab_size"] // tp, 64)
    same = rank_files(tmp_path / f"{source.provenance.tensor_parallel}x1")
    assert same.keys() == rank_files(genuine).keys()
    for rank_name, file in same.items():
        mine = flat(contents(file)["model"])
        wanted = flat(read_torch_file(rank_files(genuine)[rank_name]).value["model"])
        assert mine.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(mine[key], tensor.read()), key


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_rows_are_those_that_v25_gives_its_tokenizers_entries(
    tp: int, words: Tokenizer, tmp_path: Path
) -> None:
    """Its WordPiece adds [BOS] and [EOS]; rows beyond the source's repeat the last one."""
    entries = words.vocab_size
    model = dataclasses.replace(BERT, vocab_size=entries)
    source = memory(model)  # as a Hugging Face folder has it: no padding, no args
    done = convert(source, "megatron", tmp_path / "out", names="legacy", tp=tp, tokenizer=words)
    assert done.warnings == []
    args = saved_args(done.path)
    assert args["tokenizer_type"] == "BertWordPieceLowerCase"
    assert args["make_vocab_size_divisible_by"] == 128
    assert args["padded_vocab_size"] == padded(entries + 2, 128, tp)
    table = open_checkpoint(done.path).tensors["embedding.word_embeddings.weight"].read()
    stored = source.tensors["embedding.word_embeddings.weight"].read()
    assert torch.equal(table[:entries], stored)
    assert torch.equal(table[entries:], stored[-1:].expand(len(table) - entries, -1))


@pytest.mark.parametrize(
    ("source", "saved", "divisor"),
    [("legacy", 64, 64), ("legacy", 1, 1), ("core", 64, 64), ("core", 1, 128), (None, None, 128)],
)
def test_the_sources_divisor_stays_unless_it_only_kept_its_rows(
    source: str | None, saved: int | None, divisor: int, tmp_path: Path
) -> None:
    """Converters to megatron-core write 1 for a vocabulary that they do not pad."""
    checkpoint = memory(
        dataclasses.replace(PLAIN, vocab_size=192), source, make_vocab_size_divisible_by=saved
    )
    done = convert(checkpoint, "megatron", tmp_path / "out", names="legacy", tp=2)
    assert saved_args(done.path)["make_vocab_size_divisible_by"] == divisor
    assert saved_args(done.path)["padded_vocab_size"] == padded(192, divisor, 2)


def test_the_two_entries_that_v25_adds_may_need_rows_of_their_own(tmp_path: Path) -> None:
    """126 entries fit 128 rows with them, 127 do not."""
    for extra, rows in ((126, 128), (127, 256)):
        file = tmp_path / f"{extra}" / "vocab.txt"
        file.parent.mkdir()
        pieces = [*tiny_bert.PIECES, *(f"word{i}" for i in range(extra))][:extra]
        file.write_text("\n".join(pieces) + "\n")
        words = load_tokenizer(vocab_file=file)
        model = dataclasses.replace(BERT, vocab_size=extra)
        folder = tmp_path / f"out{extra}"
        for to, names in (("megatron", "legacy"), ("megatron", "core"), ("torch_dist", None)):
            convert(
                memory(model),
                to,
                folder,
                names=names,
                vocab="true",
                tokenizer=words,
                overwrite=True,
            )
            assert open_checkpoint(folder).config.vocab_size == rows


def test_what_may_keep_v25_from_loading_is_said(words: Tokenizer, tmp_path: Path) -> None:
    source = memory(
        dataclasses.replace(PLAIN, vocab_size=1024),
        "legacy",
        make_vocab_size_divisible_by=64,
        tensor_model_parallel_size=4,
        tokenizer_type="GPT2BPETokenizer",
    )
    # 769 to 1,024 entries: whatever they are, 4 ranks give 1,024 rows; one rank may want fewer.
    assert convert(source, "megatron", tmp_path / "4", tp=4).warnings == []
    (doubt,) = convert(source, "megatron", tmp_path / "1", tp=1).warnings
    assert doubt.startswith("all 1,024 rows") and "give --tokenizer" in doubt and "64 x 1" in doubt
    assert saved_args(tmp_path / "1")["padded_vocab_size"] == 1024
    bytes_of = byte_vocabulary(tmp_path / "bytes")
    done = convert(source, "megatron", tmp_path / "true", tp=1, tokenizer=bytes_of)
    assert done.warnings == [] and open_checkpoint(done.path).config.vocab_size == 256
    kept = convert(source, "megatron", tmp_path / "kept", tp=1, tokenizer=bytes_of, vocab="padded")
    assert len(kept.warnings) == 1 and open_checkpoint(kept.path).config.vocab_size == 1024

    unnamed = memory(dataclasses.replace(PLAIN, vocab_size=128))
    (doubt,) = convert(unnamed, "megatron", tmp_path / "x", names="legacy").warnings
    assert "names no tokenizer" in doubt and "--tokenizer" in doubt
    other = memory(unnamed.config, tokenizer_type="HuggingFaceTokenizer")
    (doubt,) = convert(other, "megatron", tmp_path / "y", names="legacy").warnings
    assert "HuggingFaceTokenizer" in doubt and "BertWordPieceCase" in doubt


# --- the tokenizer's type ---


def tokenizer_json(folder: Path, backend: Any) -> Tokenizer:
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(directory=folder)


def test_the_tokenizers_type_is_megatrons_name_for_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers

    lower = tiny_bert.tokenizer(tmp_path / "lower")
    cased_file = tmp_path / "cased" / "vocab.txt"
    cased_file.parent.mkdir()
    cased_file.write_text("\n".join([*tiny_bert.PIECES, "The", "Cat", "[BOS]"]) + "\n")
    cased = load_tokenizer(vocab_file=cased_file)
    found = {lower: ("BertWordPieceLowerCase", 2), cased: ("BertWordPieceCase", 1)}
    found[load_tokenizer(directory=byte_vocabulary(tmp_path / "b"))] = ("GPT2BPETokenizer", 0)

    pieces = {piece: i for i, piece in enumerate(tiny_bert.PIECES)}
    for lowercase, kind in ((True, "BertWordPieceLowerCase"), (False, "BertWordPieceCase")):
        backend = Backend(models.WordPiece(pieces, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        found[tokenizer_json(tmp_path / kind, backend)] = (kind, 2)
    symbols = {s: i for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(symbols, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found[tokenizer_json(tmp_path / "gpt2", backend)] = ("GPT2BPETokenizer", 0)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    found[tokenizer_json(tmp_path / "newer", backend)] = ("HuggingFaceTokenizer", 0)
    assert added_entries(lower, {"vocab_extra_ids": 3}) == 5
    assert {t: (tokenizer_type(t), added_entries(t, {})) for t in found} == found


@pytest.mark.parametrize("to", ["megatron", "torch_dist"])
def test_a_source_without_args_gets_the_type_of_its_tokenizer(
    to: str, words: Tokenizer, tmp_path: Path
) -> None:
    """One that has args keeps what they say."""
    for args, expected in (
        ({}, "BertWordPieceLowerCase"),
        ({"tokenizer_type": None}, "BertWordPieceLowerCase"),
        ({"tokenizer_type": "BertWordPieceCase"}, "BertWordPieceCase"),
    ):
        target = tmp_path / "out"
        convert(memory(WIDE, **args), to, target, tokenizer=words, overwrite=True)
        assert open_checkpoint(target).provenance.args["tokenizer_type"] == expected


# --- training ---


@pytest.mark.parametrize(
    ("rows", "args", "tp", "entries", "written"),
    [
        # A new BERT of 1,000 pieces: 1,024 rows at one rank and at two, not at sixteen.
        (1024, {}, 1, 1000, (1, 1024, 128)),
        (1024, {}, 2, 1000, (2, 1024, 128)),
        (30592, {}, 2, 30522, (1, 30592, 128)),
        # On from ranks whose padding is more than one rank's.
        (30720, {"tensor_model_parallel_size": 4}, 1, 30522, (4, 30720, 128)),
        (30720, {"tensor_model_parallel_size": 4}, 2, 30522, (2, 30720, 128)),
        (1024, {"make_vocab_size_divisible_by": 64}, 4, 1000, (4, 1024, 64)),
        # Nothing that Megatron pads to: the rows stay all the same.
        (1010, {}, 2, 1000, (2, 1010, 1)),
        (1011, {}, 2, 1000, (1, 1011, 1)),
        (1024, {}, 2, None, (2, 1024, 128)),
    ],
)
def test_training_leaves_the_rows_of_a_language_model_alone(
    rows: int,
    args: dict[str, int],
    tp: int,
    entries: int | None,
    written: tuple[int, int, int],
    tmp_path: Path,
) -> None:
    source = memory(dataclasses.replace(BERT, vocab_size=rows), "legacy", **args)
    provenance = dataclasses.replace(
        source.provenance, tensor_parallel=args.get("tensor_model_parallel_size", 1)
    )
    source = dataclasses.replace(source, provenance=provenance)
    added = 0 if entries is None else 2
    layout = layout_with_same_rows(source, tp, true_size=entries, added=added)

    found = save_layout(source, None, **layout)
    assert (found.tp, found.vocab_size, found.divisible_by) == written


def test_a_model_without_a_softmax_gets_the_rows_of_v25(words: Tokenizer, tmp_path: Path) -> None:

    entries = words.vocab_size
    source = memory(dataclasses.replace(CONFIGS["classification"], vocab_size=entries))
    for tp in (1, 2, 4):
        layout = layout_with_same_rows(source, tp, true_size=entries, added=2)
        found = save_layout(source, None, **layout)
        assert (found.names, found.tp) == ("legacy", tp)
        assert found.vocab_size == padded(entries + 2, 128, tp)


def test_a_new_bert_is_megatrons_of_its_time() -> None:
    assert new_checkpoint(BERT, seed=1).provenance.names == "legacy"
    assert new_checkpoint(GPT, seed=1).provenance.names is None
    assert with_head(memory(BERT, "core"), "qa_head").provenance.names == "core"
