"""The table of parameters: names, shapes, and how tensor parallelism cuts each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.paths import ORACLES
from support.properties import thorough
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import InMemory, take
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import (
    Parameter,
    allowed_tp,
    check_tp,
    local_groups,
    num_parameters,
    parameters,
    vocab_range,
)

GPT = ModelConfig(
    family="gpt",
    num_layers=1,
    hidden_size=8,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=2,
    ffn_hidden_size=32,
    vocab_size=10,
    max_position_embeddings=6,
)
LLAMA = dataclasses.replace(
    GPT,
    num_query_groups=2,
    ffn_hidden_size=12,
    position_embedding_type="rope",
    normalization="RMSNorm",
    activation="swiglu",
    add_bias_linear=False,
    add_qkv_bias=False,
    qk_layernorm=True,
    untie_embeddings_and_output_weights=True,
)
BERT = dataclasses.replace(
    GPT, family="bert", num_tokentypes=2, pooler=True, binary_head=True, num_layers=1
)


def shapes(config: ModelConfig) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in parameters(config).items()}


def test_gpt_table():
    layer = "decoder.layers.0."
    assert shapes(GPT) == {
        "embedding.word_embeddings.weight": [10, 8],
        "embedding.position_embeddings.weight": [6, 8],
        f"{layer}input_layernorm.weight": [8],
        f"{layer}input_layernorm.bias": [8],
        f"{layer}self_attention.linear_qkv.weight": [24, 8],
        f"{layer}self_attention.linear_qkv.bias": [24],
        f"{layer}self_attention.linear_proj.weight": [8, 8],
        f"{layer}self_attention.linear_proj.bias": [8],
        f"{layer}pre_mlp_layernorm.weight": [8],
        f"{layer}pre_mlp_layernorm.bias": [8],
        f"{layer}mlp.linear_fc1.weight": [32, 8],
        f"{layer}mlp.linear_fc1.bias": [32],
        f"{layer}mlp.linear_fc2.weight": [8, 32],
        f"{layer}mlp.linear_fc2.bias": [8],
        "decoder.final_layernorm.weight": [8],
        "decoder.final_layernorm.bias": [8],
    }


def test_llama_table():
    layer = "decoder.layers.0."
    assert shapes(LLAMA) == {
        "embedding.word_embeddings.weight": [10, 8],
        f"{layer}input_layernorm.weight": [8],
        f"{layer}self_attention.linear_qkv.weight": [16, 8],
        f"{layer}self_attention.q_layernorm.weight": [2],
        f"{layer}self_attention.k_layernorm.weight": [2],
        f"{layer}self_attention.linear_proj.weight": [8, 8],
        f"{layer}pre_mlp_layernorm.weight": [8],
        f"{layer}mlp.linear_fc1.weight": [24, 8],
        f"{layer}mlp.linear_fc2.weight": [8, 12],
        "decoder.final_layernorm.weight": [8],
        "output_layer.weight": [10, 8],
    }


def test_bert_heads():
    found = shapes(BERT)
    assert found["embedding.tokentype_embeddings.weight"] == [2, 8]
    assert found["encoder.layers.0.self_attention.linear_qkv.weight"] == [24, 8]
    heads = {name: shape for name, shape in found.items() if not name.startswith(("e", "d"))}
    assert heads == {
        "lm_head.dense.weight": [8, 8],
        "lm_head.dense.bias": [8],
        "lm_head.layer_norm.weight": [8],
        "lm_head.layer_norm.bias": [8],
        "output_layer.bias": [10],
        "pooler.dense.weight": [8, 8],
        "pooler.dense.bias": [8],
        "binary_head.weight": [2, 8],
        "binary_head.bias": [2],
    }
    tuned = dataclasses.replace(
        BERT, lm_head=False, binary_head=False, num_classes=3, multichoice_head=True, qa_head=True
    )
    assert {name: shape for name, shape in shapes(tuned).items() if "head" in name} == {
        "classification_head.weight": [3, 8],
        "classification_head.bias": [3],
        "multichoice_head.weight": [1, 8],
        "multichoice_head.bias": [1],
        "qa_head.weight": [2, 8],
        "qa_head.bias": [2],
    }


def test_norms_of_queries_and_keys_may_have_a_bias():
    names = shapes(dataclasses.replace(LLAMA, qk_layernorm_bias=True))
    assert names["decoder.layers.0.self_attention.k_layernorm.bias"] == [2]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # OpenAI's GPT-2 models, as everyone counts them.
        ({}, 124_439_808),
        ({"num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 4096}, 354_823_168),
        # The paper's 8.3 billion: 72 layers of 3,072, vocabulary padded to 51,200.
        (
            {
                "num_layers": 72,
                "hidden_size": 3072,
                "ffn_hidden_size": 4 * 3072,
                "vocab_size": 51_200,
            },
            72 * (12 * 3072**2 + 13 * 3072) + 2 * 3072 + (51_200 + 1024) * 3072,
        ),
    ],
)
def test_number_of_parameters(change: dict, expected: int):
    sizes = {
        "num_layers": 12,
        "hidden_size": 768,
        "ffn_hidden_size": 3072,
        "vocab_size": 50_257,
        "max_position_embeddings": 1024,
        **change,
    }
    heads = sizes["hidden_size"] // 64
    config = ModelConfig(
        family="gpt", num_attention_heads=heads, num_query_groups=heads, kv_channels=64, **sizes
    )
    assert num_parameters(config) == expected


@pytest.mark.parametrize("name", sorted(folder.name for folder in ORACLES.glob("*/")))
def test_the_table_is_what_genuine_checkpoints_hold(name: str):
    checkpoint = open_checkpoint(ORACLES / name)
    table = parameters(checkpoint.config)
    assert {key: tensor.shape for key, tensor in checkpoint.tensors.items()} == {
        key: parameter.shape for key, parameter in table.items()
    }
    assert checkpoint.num_parameters == sum(t.numel for t in checkpoint.tensors.values())


# ---- cutting -----------------------------------------------------------------------------------


def with_heads(heads: int, groups: int, **changes: Any) -> ModelConfig:
    sizes = {"kv_channels": 2, "hidden_size": heads * 2, "ffn_hidden_size": heads * 3}
    sizes["vocab_size"] = 37
    heads_and_groups = {"num_attention_heads": heads, "num_query_groups": groups}
    return dataclasses.replace(LLAMA, **(sizes | heads_and_groups | changes))


@st.composite
def cut_models(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A model with heads, groups and widths of any sizes that fit, and a tp that it allows."""
    heads = draw(st.integers(1, 12))
    groups = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    base = draw(st.sampled_from([GPT, LLAMA, BERT]))
    config = dataclasses.replace(
        with_heads(heads, groups, vocab_size=draw(st.integers(1, 40))),
        ffn_hidden_size=heads * draw(st.integers(1, 3)),
        kv_channels=draw(st.sampled_from([2, 4])),
        **{name: getattr(base, name) for name in ("family", "activation", "add_bias_linear")},
        **{name: getattr(base, name) for name in ("num_tokentypes", "pooler", "binary_head")},
        add_qkv_bias=draw(st.booleans()),
    )
    return config, draw(st.sampled_from(allowed_tp(config)))


def of_any_model(test: Callable[[tuple[ModelConfig, int]], None]) -> Callable[[], None]:
    """Run a test of a model and its tp on many of them, and always on those with a pitfall."""
    for model in (
        (dataclasses.replace(GPT, vocab_size=37), 4),  # a head a rank
        (with_heads(8, 2), 8),  # four ranks share a key
        (with_heads(8, 1), 8),  # all do
        (with_heads(12, 4), 6),  # two heads of groups of three: a rank has parts of two groups
        (with_heads(9, 3), 9),
        (with_heads(4, 4, vocab_size=5), 4),  # the last rank has no row
    ):
        test = example(model)(test)
    return thorough(80)(given(cut_models())(test))  # type: ignore[no-any-return]


def whole(parameter: Parameter) -> Tensor:
    """Return a tensor in which every element is another number."""
    count = torch.Size(parameter.shape).numel()
    return torch.arange(count, dtype=torch.float64).view(parameter.shape)


def shards(parameter: Parameter, tp_size: int) -> list[Tensor]:
    return [
        parameter.read_shard(InMemory(whole(parameter)), rank, tp_size) for rank in range(tp_size)
    ]


@pytest.mark.long
@of_any_model
def test_shards_are_the_papers(model: tuple[ModelConfig, int]):
    """Every rule against torch's own chunk, for all parameters of a model."""
    config, tp_size = model
    for key, parameter in parameters(config).items():
        full, pieces = whole(parameter), shards(parameter, tp_size)
        module = key.rpartition(".")[0].rpartition(".")[2]
        if key.endswith(("word_embeddings.weight", "output_layer.weight", "output_layer.bias")):
            rows = -(-full.shape[0] // tp_size)
            expected = [full[rank * rows : (rank + 1) * rows] for rank in range(tp_size)]
        elif module == "linear_qkv":
            if config.num_query_groups % tp_size:
                continue  # see below: key and value heads are copied
            expected = list(full.chunk(tp_size))
        elif module == "linear_fc1" and config.gated:
            gate, up = full.chunk(2)
            pairs = zip(gate.chunk(tp_size), up.chunk(tp_size), strict=True)
            expected = [torch.cat(pair) for pair in pairs]
        elif module == "linear_fc1":
            expected = list(full.chunk(tp_size))
        elif module in ("linear_proj", "linear_fc2") and key.endswith("weight"):
            expected = list(full.chunk(tp_size, dim=1))
        else:
            expected = [full] * tp_size
        assert len(pieces) == tp_size
        for piece, other in zip(pieces, expected, strict=True):
            assert torch.equal(piece, other), key


@of_any_model
def test_each_query_meets_its_own_key_and_value(model: tuple[ModelConfig, int]):
    """Whatever is copied: a rank's rows, read as its groups, give each head its group's key."""
    config, tp_size = model
    heads, groups, channels = (
        config.num_attention_heads,
        config.num_query_groups,
        config.kv_channels,
    )
    per_group = heads // groups
    parameter = parameters(config)[f"{config.block}.layers.0.self_attention.linear_qkv.weight"]
    full = whole(parameter).view(groups, per_group + 2, channels, config.hidden_size)
    seen = []
    for rank, piece in enumerate(shards(parameter, tp_size)):
        local = local_groups(heads, groups, rank, tp_size)
        queries = len(local[0][0])
        assert all(len(chosen) == queries for chosen, _ in local), "groups of different sizes"
        ours = piece.view(len(local), queries + 2, channels, config.hidden_size)
        for at, (chosen, group) in enumerate(local):
            for slot, head in enumerate(chosen):
                assert torch.equal(ours[at, slot], full[head // per_group, head % per_group])
                assert group == head // per_group
            assert torch.equal(ours[at, -2], full[group, -2])
            assert torch.equal(ours[at, -1], full[group, -1])
            seen += chosen
    assert seen == list(range(heads)), "every head once, in the order of linear_proj's columns"


@of_any_model
def test_shards_merge_to_the_whole(model: tuple[ModelConfig, int]):
    config, tp_size = model
    for key, parameter in parameters(config).items():
        full, dim = whole(parameter), parameter.rule.dim
        merged = torch.full_like(full, torch.nan)
        for rank, piece in enumerate(shards(parameter, tp_size)):
            index = parameter.index(rank, tp_size)
            places = take(torch.arange(full.shape[dim or 0]), 0, index)
            merged.index_copy_(dim or 0, places, piece)
        assert torch.equal(merged, full), key


@of_any_model
def test_the_parts_of_files_merge_to_the_whole(model: tuple[ModelConfig, int]):
    """Equal parts, as in Megatron's files; what does not divide (ours is not padded) is named."""
    config, tp_size = model
    for key, parameter in parameters(config).items():
        full = whole(parameter)
        if parameter.rule.dim is not None and (
            full.shape[parameter.dim] // parameter.rule.blocks % tp_size
        ):
            with pytest.raises(InputError, match=f"cannot split {key} over tp={tp_size}"):
                parameter.part(0, tp_size)
            continue
        parts = [take(full, parameter.dim, parameter.part(r, tp_size)) for r in range(tp_size)]
        assert len({part.shape for part in parts}) == 1, key
        merged = parameter.rule.merge([InMemory(part) for part in parts])
        assert torch.equal(merged.read(), full), key


@pytest.mark.parametrize(
    ("heads", "groups", "tp_size", "expected"),
    [
        (4, 4, 2, [[([0], 0), ([1], 1)], [([2], 2), ([3], 3)]]),
        (4, 2, 2, [[([0, 1], 0)], [([2, 3], 1)]]),
        (4, 2, 4, [[([0], 0)], [([1], 0)], [([2], 1)], [([3], 1)]]),
        (4, 1, 2, [[([0, 1], 0)], [([2, 3], 0)]]),
        # Three queries to a group, two heads to a rank: the second rank has parts of two groups.
        (6, 2, 3, [[([0], 0), ([1], 0)], [([2], 0), ([3], 1)], [([4], 1), ([5], 1)]]),
    ],
)
def test_local_groups(heads: int, groups: int, tp_size: int, expected: list):
    assert [local_groups(heads, groups, rank, tp_size) for rank in range(tp_size)] == expected


@pytest.mark.parametrize(
    ("size", "tp_size", "expected"),
    [
        (8, 2, [(0, 4), (4, 8)]),
        (10, 4, [(0, 3), (3, 6), (6, 9), (9, 10)]),
        (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)]),  # the last rank has none
        (1, 3, [(0, 1), (1, 1), (1, 1)]),
        (50257, 2, [(0, 25129), (25129, 50257)]),
        (7, 1, [(0, 7)]),
    ],
)
def test_vocabulary_rows(size: int, tp_size: int, expected: list):
    assert [vocab_range(size, rank, tp_size) for rank in range(tp_size)] == expected


@pytest.mark.parametrize(
    ("heads", "ffn", "expected"),
    [
        (16, 4096, [1, 2, 4, 8, 16]),
        (12, 3072, [1, 2, 3, 4, 6, 12]),
        (20, 7680, [1, 2, 4, 5, 10, 20]),
        (6, 32, [1, 2]),  # 3 divides the heads, but not the MLP
        (7, 28, [1, 7]),
        (1, 4, [1]),
    ],
)
def test_sizes_that_a_model_allows(heads: int, ffn: int, expected: list[int]):
    config = dataclasses.replace(
        GPT, num_attention_heads=heads, num_query_groups=heads, ffn_hidden_size=ffn
    )
    assert allowed_tp(config) == expected
    assert allowed_tp(config, limit=2) == [size for size in expected if size <= 2]
    for size in expected:
        check_tp(config, size)


@pytest.mark.parametrize("tp_size", [0, -1, 3, 5, 32])
def test_a_size_that_does_not_divide_is_refused(tp_size: int):
    config = dataclasses.replace(GPT, num_attention_heads=16, num_query_groups=16)
    with pytest.raises(InputError) as caught:
        check_tp(config, tp_size)
    assert str(caught.value) == (
        f"cannot split this model over tp={tp_size}: it has 16 attention heads and an MLP of width "
        "32, and tp must divide both; it allows tp in 1, 2, 4, 8, 16"
    )


def test_a_parameter_that_cannot_be_cut_is_named():
    config = dataclasses.replace(LLAMA, ffn_hidden_size=6)
    fc1 = parameters(config)["decoder.layers.0.mlp.linear_fc1.weight"]
    with pytest.raises(
        InputError,
        match="cannot split decoder.layers.0.mlp.linear_fc1.weight over "
        "tp=4: dim 0 is 12 = 2 block.s. of 6, not divisible by 4.*tp in 1, 2",
    ):
        fc1.index(0, 4)
