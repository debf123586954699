"""Megatron's torch format of every era: names, orders, splits and stages merge to one model."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import types
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders.synthetic import (
    BERT,
    ERAS,
    GPT,
    LLAMA,
    Model,
    args_of,
    change,
    era_name,
    qkv_rows,
    random_model,
    rank_file,
    write,
)
from support.paths import ORACLES
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint, full_digest
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import MappedFile
from mlm_eval.checkpoints.megatron import names
from mlm_eval.checkpoints.megatron.read_torch import qkv_order
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.engine.engine import Engine

SHIPPED = ORACLES


def holds(checkpoint: Checkpoint, model: Model) -> None:
    """Compare a checkpoint's tensors with whole ones, bit by bit."""
    assert set(checkpoint.tensors) == set(model)
    for name, tensor in model.items():
        assert torch.equal(checkpoint.tensors[name].read(), tensor), name


# ---- the order of QKV rows ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        # Rows of head 0: q0 q1 k0 k1 v0 v1; then those of head 1.
        (0.0, [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]),
        (1.0, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]),
        (2.0, list(range(12))),
        (3.0, list(range(12))),
    ],
)
def test_order_of_two_heads_of_two_channels(version: float, expected: list[int]):
    assert qkv_order(version, 2, 2).tolist() == expected


@pytest.mark.parametrize(("heads", "channels"), [(1, 1), (3, 2), (4, 64)])
def test_order_against_the_formulas(heads: int, channels: int):
    """Row of (selector c, head a, channel d), by docs/megatron.md, "QKV row order"."""
    for version in (0.0, 1.0, 2.0):
        order = iter(qkv_order(version, heads, channels).tolist())
        for a, c, d in itertools.product(range(heads), range(3), range(channels)):
            assert (
                next(order)
                == {
                    0.0: c * heads * channels + a * channels + d,
                    1.0: (a * channels + d) * 3 + c,
                    2.0: (a * 3 + c) * channels + d,
                }[version]
            )


@pytest.mark.parametrize("version", [0.0, 1.0])
def test_order_against_a_reshape(version: float):
    rows = torch.randn(3 * 4 * 5, 2)
    stored = qkv_rows(rows, version, 4)
    assert not torch.equal(stored, rows)
    assert torch.equal(stored[qkv_order(version, 4, 5)], rows)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("version", [None, 0, 1, 1.0, 2.0, 3.0])
def test_every_version_merges_to_group_order(version: float | None, tp: int, tmp_path: Path):
    """Also version 0 with tensor parallelism, whose ranks cannot simply be joined."""
    model = random_model(GPT)
    root = write(tmp_path, model, GPT, tp=tp, era="v1", version=version, args=args_of(GPT))
    checkpoint = open_checkpoint(root)
    holds(checkpoint, model)
    assert checkpoint.provenance.checkpoint_version == (version or 0.0)
    said = any("version 0" in text for text in checkpoint.provenance.warnings)
    assert said == (not version)


def test_the_weeks_without_a_version(tmp_path: Path):
    """September 2020: no version, but the later order; only the user can know."""
    model = random_model(GPT)
    options: dict[str, Any] = {"tp": 2, "era": "v1", "version": None, "args": args_of(GPT)}
    root = write(tmp_path, model, GPT, order=2.0, **options)
    [warning] = open_checkpoint(root).provenance.warnings
    assert "2020-09-11 and 2020-09-29" in warning
    assert "--set checkpoint_version=2.0" in warning
    with pytest.raises(AssertionError, match="linear_qkv"):
        holds(open_checkpoint(root), model)
    fixed = open_checkpoint(root, {"checkpoint_version": 2.0})
    holds(fixed, model)
    assert fixed.provenance.checkpoint_version == 2.0
    assert not fixed.provenance.warnings


def test_core_names_without_a_version_have_the_last_order(tmp_path: Path):
    model = random_model(GPT)
    root = write(tmp_path, model, GPT, tp=2, version=None, order=3.0, args=args_of(GPT))
    holds(open_checkpoint(root), model)
    assert not open_checkpoint(root).provenance.warnings


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("era", ERAS)
def test_names_of_every_era(era: str, tp: int, tmp_path: Path):
    model = random_model(GPT)
    root = write(tmp_path, model, GPT, tp=tp, era=era, args=args_of(GPT))
    checkpoint = open_checkpoint(root)
    holds(checkpoint, model)
    gelu = "gelu_tanh" if era == "legacy TE" else "gelu"  # TransformerEngine's is the tanh form
    assert checkpoint.config == dataclasses.replace(GPT, activation=gelu)
    assert checkpoint.provenance.tensor_parallel == tp


@pytest.mark.parametrize("era", ["v1", "v2.5", "core", "core TE"])
def test_names_of_bert(era: str, tmp_path: Path):
    model = random_model(BERT)
    root = write(tmp_path, model, BERT, tp=2, era=era, args=args_of(BERT))
    checkpoint = open_checkpoint(root)
    assert checkpoint.config == BERT
    holds(checkpoint, model)


@pytest.mark.parametrize("lm_head", [True, False])
def test_bert_with_an_output_table_of_its_own(lm_head: bool, tmp_path: Path):
    """megatron-core has the choice; a fine-tuned file keeps the flag, but has no such table."""
    config = dataclasses.replace(BERT, untie_embeddings_and_output_weights=True, lm_head=lm_head)
    model = random_model(config)
    assert ("output_layer.weight" in model) == lm_head
    root = write(tmp_path, model, config, tp=2, args=args_of(config))
    checkpoint = open_checkpoint(root)
    assert checkpoint.config == config
    holds(checkpoint, model)
    loaded = dict(Engine.load(checkpoint).model.named_parameters())
    assert set(loaded) == set(model)
    if lm_head:
        assert torch.equal(loaded["output_layer.weight"], model["output_layer.weight"])


@pytest.mark.parametrize(
    "heads", [{"num_classes": 3}, {"multichoice_head": True}, {"qa_head": True}]
)
def test_fine_tuned_bert(heads: dict, tmp_path: Path):
    config = dataclasses.replace(BERT, lm_head=False, binary_head=False, **heads)
    model = random_model(config)
    root = write(tmp_path, model, config, tp=2, era="v2.5", args=args_of(config))
    checkpoint = open_checkpoint(root)
    assert checkpoint.config == config
    holds(checkpoint, model)


def test_the_names_themselves():
    """A few spelt out, so that a slip in this file's own table shows."""
    for era, old in {
        "2019": "transformer.layers.3.attention.query_key_value.weight",
        "v1": "language_model.transformer.layers.3.attention.query_key_value.weight",
        "v2.5": "language_model.encoder.layers.3.self_attention.query_key_value.weight",
        "2023-09": "language_model.encoder.layers.3.self_attention.query_key_value.weight",
        "legacy TE": "language_model.encoder.layers.3.self_attention.layernorm_qkv.weight",
        "core": "decoder.layers.3.self_attention.linear_qkv.weight",
        "core TE": "decoder.layers.3.self_attention.linear_qkv.weight",
    }.items():
        new = "decoder.layers.3.self_attention.linear_qkv.weight"
        assert era_name(new, era) == old
        assert names.canonical_name(old, "decoder", 0, "x") == new
        assert names.canonical_name(old, "decoder", 4, "x") == new.replace("3", "7")
    for old, new in {
        "language_model.transformer.final_layernorm.bias": "decoder.final_layernorm.bias",
        "language_model.encoder.final_norm.weight": "decoder.final_layernorm.weight",
        "module.language_model.embedding.word_embeddings.weight": (
            "embedding.word_embeddings.weight"
        ),
        "word_embeddings.weight": "embedding.word_embeddings.weight",
        "model.module.decoder.layers.0.mlp.linear_fc1.layer_norm_bias": (
            "decoder.layers.0.pre_mlp_layernorm.bias"
        ),
        "language_model.encoder.layers.0.layernorm_mlp.fc2_bias": (
            "decoder.layers.0.mlp.linear_fc2.bias"
        ),
        "decoder.layers.0.post_self_attn_layernorm.weight": (
            "decoder.layers.0.pre_mlp_layernorm.weight"
        ),
        "lm_head.bias": "output_layer.bias",
        "lm_head.layernorm.weight": "lm_head.layer_norm.weight",
        "language_model.pooler.dense.weight": "pooler.dense.weight",
    }.items():
        assert names.canonical_name(old, "decoder", 0, "x") == new


@pytest.mark.parametrize("state", [None, b"bytes", torch.zeros(3)], ids=["none", "bytes", "tensor"])
@pytest.mark.parametrize("era", ["legacy TE", "core TE", "core"])
def test_extra_state_and_rotary_tables_are_ignored(era: str, state: Any, tmp_path: Path):
    model = random_model(LLAMA)
    root = write(tmp_path, model, LLAMA, tp=2, era=era, args=args_of(LLAMA))

    def add(contents: dict) -> None:
        branch = contents["model"]
        if era == "legacy TE":
            branch = branch["language_model"]["encoder"]
            prefix = ""
        else:
            prefix = "decoder."
        for layer in range(LLAMA.num_layers):
            for part in ("self_attention.linear_qkv", "mlp.linear_fc1", "layernorm_mlp"):
                branch[f"{prefix}layers.{layer}.{part}._extra_state"] = state
            branch[f"{prefix}layers.{layer}.self_attention.core_attention._extra_state"] = state
        branch[f"{prefix}rotary_pos_emb.inv_freq"] = torch.ones(2)

    for rank in range(2):
        change(rank_file(root, rank), add)
    holds(open_checkpoint(root), model)


@pytest.mark.parametrize("era", ["2023-09", "core"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gated_mlp_merges_gates_with_gates(era: str, tp: int, tmp_path: Path):
    """Each rank holds `[gate; up]` of its own: joined as they stand the rows would be wrong."""
    config = dataclasses.replace(LLAMA, num_query_groups=4, add_bias_linear=True, add_qkv_bias=True)
    model = random_model(config)
    root = write(tmp_path, model, config, tp=tp, era=era, args=args_of(config))
    checkpoint = open_checkpoint(root)
    assert checkpoint.config == config
    holds(checkpoint, model)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    pieces = []
    for rank in range(tp):
        contents = torch.load(rank_file(root, rank), weights_only=False)["model"]
        if era == "core":
            pieces.append(contents[name])
        else:
            encoder = contents["language_model"]["encoder"]
            pieces.append(encoder["layers.1.mlp.dense_h_to_4h.weight"])
    assert torch.equal(torch.cat(pieces), model[name]) == (tp == 1)
    # Slices of the merged view, as a rank at another size reads them.
    merged = checkpoint.tensors[name]
    index = torch.tensor([0, 1, 24, 25, 47])
    assert torch.equal(merged.read(0, index), model[name][index])
    assert torch.equal(merged.read(1, slice(3, 9)), model[name][:, 3:9])


@pytest.mark.parametrize(
    "change_of_config",
    [
        {},
        {"num_query_groups": 4},
        {"qk_layernorm": True, "qk_layernorm_bias": False},
        {"normalization": "LayerNorm"},
        {"add_qkv_bias": True},
        {"untie_embeddings_and_output_weights": False},
        {"position_embedding_type": "learned_absolute"},
        {"activation": "squared_relu"},
    ],
)
def test_variants_of_llama(change_of_config: dict, tmp_path: Path):
    config = dataclasses.replace(LLAMA, **change_of_config)
    model = random_model(config)
    args = args_of(config, squared_relu=config.activation == "squared_relu")
    checkpoint = open_checkpoint(write(tmp_path, model, config, tp=2, args=args))
    assert checkpoint.config == config
    holds(checkpoint, model)


def test_a_query_group_may_be_cut(tmp_path: Path):
    """Newer megatron-core: fewer groups than ranks, the rows cut evenly all the same."""
    model = random_model(LLAMA)
    holds(open_checkpoint(write(tmp_path, model, LLAMA, tp=4, args=args_of(LLAMA))), model)


# ---- pipeline stages ---------------------------------------------------------------------------


def marked(config: ModelConfig) -> Model:
    """Return weights of which each layer's norm says which layer it is."""
    model = random_model(config)
    for layer in range(config.num_layers):
        model[f"decoder.layers.{layer}.input_layernorm.weight"].fill_(layer)
    return model


@pytest.mark.parametrize(
    ("layers", "stages"),
    [
        (4, [[[0, 1]], [[2, 3]]]),
        (4, [[[0]], [[1]], [[2]], [[3]]]),
        (8, [[[0, 1, 2]], [[3, 4, 5, 6, 7]]]),  # uneven
        (4, [[[]], [[0, 1, 2, 3]]]),  # the embedding in a stage of its own
        (4, [[[]], [[0, 1]], [[2, 3]], [[]]]),
        # Virtual stages: chunk i of stage r holds the layers from i * L / v + r * L / (p v).
        (8, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
        (8, [[[0], [4]], [[1], [5]], [[2], [6]], [[3], [7]]]),
        (8, [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]),
    ],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_layers_get_their_global_number(layers: int, stages: list, tp: int, tmp_path: Path):
    config = dataclasses.replace(GPT, num_layers=layers)
    model = marked(config)
    root = write(tmp_path, model, config, tp=tp, stages=stages, args=args_of(config))
    checkpoint = open_checkpoint(root)
    holds(checkpoint, model)
    for layer in range(layers):
        weight = checkpoint.tensors[f"decoder.layers.{layer}.input_layernorm.weight"]
        assert weight.read()[0] == layer
    assert checkpoint.provenance.pipeline_parallel == len(stages)
    virtual = len(stages[0]) > 1
    assert any("virtual pipeline" in note for note in checkpoint.provenance.notes) == virtual


def test_more_than_ten_chunks_are_taken_in_order(tmp_path: Path):
    config = dataclasses.replace(GPT, num_layers=12)
    model = marked(config)
    stages = [[[layer] for layer in range(12)]]
    root = write(tmp_path, model, config, stages=stages, args=args_of(config))
    holds(open_checkpoint(root), model)


HEAD_COPIES = {
    "v2.5": lambda contents, copy: contents["model"].update(
        {"word_embeddings_for_head": {"weight": copy}}
    ),
    "core": lambda contents, copy: contents["model"].update({"output_layer.weight": copy}),
}


@pytest.mark.parametrize("era", HEAD_COPIES)
def test_the_last_stages_copy_of_a_tied_embedding(era: str, tmp_path: Path):
    model = random_model(GPT)
    stages = [[[0, 1]], [[2, 3]]]
    root = write(tmp_path, model, GPT, tp=2, era=era, stages=stages, args=args_of(GPT))
    table = model["embedding.word_embeddings.weight"].chunk(2)

    def copies(shift: float) -> None:
        for rank in range(2):
            change(
                rank_file(root, rank, 1),
                lambda contents, rank=rank: HEAD_COPIES[era](contents, table[rank] + shift),
            )

    copies(0.0)
    checkpoint = open_checkpoint(root)
    holds(checkpoint, model)
    assert not checkpoint.provenance.warnings

    copies(1e-3)
    checkpoint = open_checkpoint(root)
    holds(checkpoint, model)
    [warning] = checkpoint.provenance.warnings
    assert "copy of the tied embedding differs" in warning
    assert "0.001" in warning

    copies(5.0)
    with pytest.raises(InputError, match="is not the copy of the word embeddings.*copy all ranks"):
        open_checkpoint(root)
    copies(0.0)
    for row in (0, len(table[0]) - 1):  # one wrong row is enough
        wrong = table[0].clone()
        wrong[row] += 5.0
        change(
            rank_file(root, 0, 1), lambda contents, wrong=wrong: HEAD_COPIES[era](contents, wrong)
        )
        with pytest.raises(InputError, match="is not the copy of the word embeddings"):
            open_checkpoint(root)
    copies(5.0)
    if era == "core":  # its name is that of a table of its own
        untied = open_checkpoint(root, {"untie_embeddings_and_output_weights": True})
        own = model["embedding.word_embeddings.weight"] + 5.0
        assert torch.equal(untied.tensors["output_layer.weight"].read(), own)


# ---- files without args ------------------------------------------------------------------------


def test_nvidias_release_of_2019(tmp_path: Path):
    """No args, no version, flat names: heads of 64 and tanh GELU are assumed, and it is said."""
    config = dataclasses.replace(
        GPT,
        hidden_size=128,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=64,
        ffn_hidden_size=512,
        activation="gelu_tanh",
    )
    model = random_model(config)
    root = write(tmp_path, model, config, era="2019", version=None, total_iters=7)
    (root / "iter_0000005").rename(root / "release")
    (root / "latest_checkpointed_iteration.txt").write_text("release\n")
    checkpoint = open_checkpoint(root)
    holds(checkpoint, model)
    assert checkpoint.config == config
    assert checkpoint.provenance.iteration == "release"
    assert checkpoint.provenance.checkpoint_version == 0.0
    said = " ".join(checkpoint.provenance.warnings)
    assert "2 heads of 64 assumed" in said
    assert "activation gelu_tanh assumed" in said
    sources = checkpoint.provenance.config_sources
    assert sources["num_attention_heads"] == "assumed: heads of 64"
    assert sources["hidden_size"] == "shapes"

    other = open_checkpoint(root, {"num_attention_heads": 4, "activation": "gelu"})
    assert other.config.kv_channels == 32
    assert other.config.num_query_groups == 4
    assert other.provenance.config_sources["num_attention_heads"] == "--set"
    [warning] = other.provenance.warnings
    assert "version 0" in warning
    rows = model["decoder.layers.0.self_attention.linear_qkv.weight"]
    stored = qkv_rows(rows, 0.0, 2)
    found = other.tensors["decoder.layers.0.self_attention.linear_qkv.weight"].read()
    assert torch.equal(found, stored[qkv_order(0.0, 4, 32)])


def test_a_single_file(tmp_path: Path):
    model = random_model(GPT)
    root = write(tmp_path, model, GPT, era="v1", args=args_of(GPT))
    alone = tmp_path / "mine.pt"
    shutil.copy(rank_file(root), alone)
    checkpoint = open_checkpoint(alone)
    holds(checkpoint, model)
    assert checkpoint.provenance.path == alone
    assert checkpoint.provenance.iteration == 5


@pytest.mark.parametrize("args_type", [Namespace, types.SimpleNamespace, dict])
def test_args_of_any_kind(args_type: type, tmp_path: Path):
    """Some tools store args as another object, or as a dict."""
    args = vars(args_of(GPT, bias_gelu_fusion=True, tensor_model_parallel_size=1))
    root = write(tmp_path, random_model(GPT), GPT)
    change(rank_file(root), lambda contents: contents.update(args=args_type(**args)))
    checkpoint = open_checkpoint(root)
    assert checkpoint.config.activation == "gelu_tanh"
    assert checkpoint.provenance.args["hidden_size"] == 16


# ---- what --ckpt may name ----------------------------------------------------------------------


def test_every_path_to_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = random_model(GPT)
    root = write(tmp_path / "root", model, GPT, tp=2, args=args_of(GPT))
    folder = root / "iter_0000005"
    digests = set()
    for path in (root, folder, folder / "mp_rank_00", rank_file(root, 1), str(root)):
        checkpoint = open_checkpoint(path)
        holds(checkpoint, model)
        assert checkpoint.provenance.path == folder
        digests.add(checkpoint.provenance.digest)
    assert len(digests) == 1
    monkeypatch.chdir(folder / "mp_rank_01")
    for path in (".", "model_optim_rng.pt", "..", "../mp_rank_00"):
        assert open_checkpoint(path).provenance.digest in digests
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/root").provenance.digest in digests


def test_the_tracker_chooses_the_iteration(tmp_path: Path):
    old, new = random_model(GPT, seed=1), random_model(GPT, seed=2)
    write(tmp_path, old, GPT, iteration=5, args=args_of(GPT))
    write(tmp_path, new, GPT, iteration=12345678, args=args_of(GPT))
    holds(open_checkpoint(tmp_path), new)
    assert open_checkpoint(tmp_path).provenance.iteration == 12345678
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(" 5 \n")
    holds(open_checkpoint(tmp_path), old)
    shutil.rmtree(tmp_path / "iter_12345678")
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    holds(open_checkpoint(tmp_path), old)  # the only one there


def test_the_distributed_optimizer_of_2022(tmp_path: Path):
    """The model is in model_rng.pt; mp_rank_TT_DDD holds a part of the optimizer, no stage."""
    model = random_model(GPT)
    root = write(tmp_path, model, GPT, tp=2, era="v2.5", args=args_of(GPT))
    for rank in range(2):
        rank_file(root, rank).rename(rank_file(root, rank).with_name("model_rng.pt"))
        for data_rank in range(2):
            folder = root / "iter_0000005" / f"mp_rank_{rank:02d}_{data_rank:03d}"
            folder.mkdir()
            torch.save({}, folder / "optim.pt")
    holds(open_checkpoint(root), model)


def test_old_keys_of_the_top_level(tmp_path: Path):
    model = random_model(GPT)
    root = write(tmp_path, model, GPT, era="2019", version=None)

    def edit(contents: dict) -> dict:
        return {"sd": contents["model"], "total_iters": 9}

    change(rank_file(root), edit)
    checkpoint = open_checkpoint(root, {"num_attention_heads": 4})
    holds(checkpoint, model)
    assert checkpoint.provenance.iteration == 9


# ---- what is told ------------------------------------------------------------------------------


def test_the_digest_follows_the_weights(tmp_path: Path):
    model = random_model(GPT)
    first = open_checkpoint(write(tmp_path / "a", model, GPT, tp=2, args=args_of(GPT)))
    same = open_checkpoint(write(tmp_path / "b", model, GPT, tp=2, args=args_of(GPT)))
    model["decoder.layers.2.mlp.linear_fc2.bias"][3] += 1e-6
    other = open_checkpoint(write(tmp_path / "c", model, GPT, tp=2, args=args_of(GPT)))
    assert first.provenance.digest == same.provenance.digest
    assert first.provenance.digest != other.provenance.digest
    assert full_digest(first) == full_digest(same)
    assert full_digest(first) != full_digest(other)
    assert first.provenance.files == [rank_file(tmp_path / "a", rank) for rank in range(2)]


def shifted(model: Model, name: str) -> Model:
    return model | {name: model[name] + 1e-3}


def test_drift_between_ranks_is_told(tmp_path: Path):
    model = random_model(GPT)
    root = write(tmp_path, model, GPT, tp=2, args=args_of(GPT))
    name = "decoder.layers.1.input_layernorm.weight"
    change(
        rank_file(root, 1),
        lambda contents: {**contents, "model": shifted(contents["model"], name)},
    )
    checkpoint = open_checkpoint(root)
    [warning] = checkpoint.provenance.warnings
    assert warning.startswith("1 replicated tensor(s) differ between tensor-parallel ranks by up")
    assert "0.001" in warning
    holds(checkpoint, model)  # rank 0's


def test_provenance_of_a_genuine_file():
    provenance = open_checkpoint(SHIPPED / "mcore016_gpt2_tp2_pp2").provenance
    assert provenance.format == "megatron-torch"
    assert (provenance.tensor_parallel, provenance.pipeline_parallel) == (2, 2)
    assert provenance.checkpoint_version == 3.0
    assert provenance.iteration == 1
    assert len(provenance.files) == 4
    assert "megatron.core.enums.ModelType" in provenance.pickle_classes
    assert not provenance.hostile
    assert provenance.config_sources["num_layers"] == "shapes"
    assert provenance.config_sources["num_attention_heads"] == "args.num_attention_heads"


def test_opening_reads_no_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of each file the norms and positions are compared between ranks, and a row of a matrix."""
    model = random_model(GPT)
    root = write(tmp_path, model, GPT, tp=2, args=args_of(GPT))
    shapes: list[tuple[int, ...]] = []
    read = MappedFile.tensor

    def noted(file: MappedFile, offset: int, dtype: Any, shape: Any, stride: Any) -> Tensor:
        shapes.append(tuple(shape))
        return read(file, offset, dtype, shape, stride)

    lengths: list[int] = []
    blocks = MappedFile.blocks

    def counted(file: MappedFile, offset: int, length: int) -> Iterator[bytes]:
        lengths.append(length)
        return blocks(file, offset, length)

    monkeypatch.setattr(MappedFile, "tensor", noted)
    monkeypatch.setattr(MappedFile, "blocks", counted)
    checkpoint = open_checkpoint(root)
    assert not shapes  # as values: their bytes tell
    positions = model["embedding.position_embeddings.weight"].nbytes
    largest = max(tensor.shape[-1] * tensor.itemsize for tensor in model.values())
    assert lengths and all(length <= largest or length == positions for length in lengths)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    part = checkpoint.tensors[name].read(0, slice(2, 5))
    assert torch.equal(part, model[name][2:5])
    assert shapes == [(3, 16)]
