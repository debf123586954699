"""The comparison of weights and settings: that no element and no setting is out of its reach."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import BERT, GPT, LLAMA
from support.random_models import checkpoint, state_dict
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.comparison import Comparison
from mlm_eval.checkpoints.config import ModelConfig, RopeScaling
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.folds import is_gain, with_halved_rotary
from mlm_eval.checkpoints.lazy import Selected
from mlm_eval.checkpoints.megatron.write_dist import write_torch_dist
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import parameters
from mlm_eval.engine import weights as weights_module
from mlm_eval.engine.verify import compare_checkpoints
from mlm_eval.engine.weights import BY_WEIGHTS, HARMLESS, compare_settings

ALL_HEADS = dataclasses.replace(BERT, num_classes=3, multichoice_head=True, qa_head=True)
QWEN = dataclasses.replace(LLAMA, qk_layernorm=True, add_qkv_bias=True)
KINDS = {"gpt": GPT, "llama": LLAMA, "qwen": QWEN, "bert": ALL_HEADS}


def changed(state: dict[str, Tensor], name: str, index: tuple[int, ...], by: float = 1e-3) -> Any:
    """Return the weights with one element moved."""
    tensor = state[name].clone()
    tensor[index] += by
    return {**state, name: tensor}


def is_found(found: Comparison, name: str, index: tuple[int, ...]) -> None:
    """Check that a comparison says that this element, and nothing else, differs."""
    assert not found.same and found.weights is not None and found.weights.first is not None
    assert found.weights.differing == (name,)
    assert (found.weights.first.tensor, found.weights.first.index) == (name, index)
    phrase = found.differences()[0]
    assert f"{name} {list(index)} is" in phrase and f"1 of {found.weights.tensors}" in phrase
    if ".layers." in name:
        assert phrase.startswith(f"layer {name.split('.')[2]}: ")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_one_element_of_any_tensor_is_named(kind: str, monkeypatch: pytest.MonkeyPatch):
    """The first, the last and one in between, of every parameter of every kind of model."""
    monkeypatch.setattr(weights_module, "BLOCK", 256)  # many blocks in these small tensors
    model = KINDS[kind]
    state = state_dict(model)
    ours = checkpoint(model, state)
    draws = torch.Generator().manual_seed(7)
    for name, parameter in parameters(model).items():
        last = tuple(size - 1 for size in parameter.shape)
        inside = tuple(int(torch.randint(n, (), generator=draws)) for n in parameter.shape)
        for index in {tuple(0 for _ in last), inside, last}:
            found = compare_checkpoints(ours, checkpoint(model, changed(state, name, index)))
            is_found(found, name, index)


@pytest.mark.parametrize("writer", [write_megatron_torch, write_torch_dist])
@pytest.mark.parametrize("tp", [1, 2])
def test_one_element_of_a_file_is_named(writer: Any, tp: int, tmp_path: Path):
    """Far rows of the vocabulary, the last position, the last layer, at any parallel sizes."""
    state = state_dict(GPT)
    writer(checkpoint(GPT, state), tmp_path / "a", tp=tp, pp=2)
    ours = open_checkpoint(tmp_path / "a")
    assert compare_checkpoints(checkpoint(GPT, state), ours).same
    for name, index in (
        ("embedding.word_embeddings.weight", (49, 31)),
        ("embedding.position_embeddings.weight", (15, 0)),
        ("decoder.layers.1.self_attention.linear_qkv.bias", (95,)),
        ("decoder.layers.1.mlp.linear_fc2.weight", (31, 63)),
        ("decoder.final_layernorm.bias", (31,)),
    ):
        place = tmp_path / name
        writer(checkpoint(GPT, changed(state, name, index)), place, tp=3 - tp, pp=1)
        is_found(compare_checkpoints(ours, open_checkpoint(place)), name, index)


@pytest.mark.parametrize("by", [1e-3, 9.0])
def test_the_last_stages_copy_of_a_tied_table_counts(tmp_path: Path, by: float):
    """Megatron computes logits with it; one that is no copy is refused when it is opened."""
    for name in "ab":
        write_megatron_torch(checkpoint(GPT), tmp_path / name, tp=2, pp=2)
    file = tmp_path / "b" / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    contents = torch.load(file, weights_only=False)
    contents["model"]["output_layer.weight"][-1, -1] += by
    torch.save(contents, file)
    ours = open_checkpoint(tmp_path / "a")
    if by > 1:
        with pytest.raises(InputError, match=r"output_layer\.weight is not the copy"):
            open_checkpoint(tmp_path / "b")
        return
    theirs = open_checkpoint(tmp_path / "b")
    found = compare_checkpoints(ours, theirs)
    assert not found.same
    assert "last pipeline stage's copy of the tied embedding differs" in found.differences()[0]
    assert compare_checkpoints(theirs, theirs).same


LATENTS: dict[str, Any] = {
    "multi_latent_attention": True,
    "kv_lora_rank": 6,
    "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 2,
    "v_head_dim": 4,
}
CHANGES: dict[str, Any] = {
    "family": "bert",
    "position_embedding_type": "rope",
    "normalization": "LayerNorm",
    "activation": "gelu_tanh",
    "head_activation": "gelu_tanh",
    "rope_scaling": RopeScaling(),
    "rotary_percent": 0.5,
    "moe_layers": (1,),
    "no_mlp_layers": (1,),
    "linear_mlp_layers": (1,),
}
"""Values that the model of the test below does not have, where they do not follow from the type."""


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ModelConfig)])
def test_every_setting_counts_that_is_not_listed(name: str):
    """A new field counts without a word; one that does not has to be listed."""
    base = ALL_HEADS if name == "head_activation" else dataclasses.replace(LLAMA, num_layers=4)
    parts: dict[str, dict[str, Any]] = {  # without which the setting is about nothing
        "moe_shared_expert_gate": {"moe_shared_expert_intermediate_size": 8},
        "latent_layernorm_epsilon": LATENTS,
    }
    base = dataclasses.replace(base, **parts.get(name, {}))
    value = getattr(base, name)
    other = not value if isinstance(value, bool) else CHANGES.get(name)
    if other is None:
        other = 2.0 if value is None else value * 2 or 1
    theirs = dataclasses.replace(base)
    object.__setattr__(theirs, name, other)  # a value alone may be impossible
    found = [phrase.split(" is ")[0] for phrase in compare_settings(base, theirs, ("a", "b"))[0]]
    assert found == ([] if name in (*HARMLESS, *BY_WEIGHTS) else [name])
    assert compare_settings(base, base, ("a", "b")) == ([], [])


def test_settings_of_a_part_that_is_not_there_do_not_count():
    other = dataclasses.replace(GPT, rotary_base=9.0, head_activation="gelu_tanh")
    assert compare_settings(GPT, other, ("a", "b")) == ([], [])
    rounded = dataclasses.replace(GPT, layernorm_epsilon=float(torch.tensor(1e-5)))
    assert rounded.layernorm_epsilon != GPT.layernorm_epsilon
    assert compare_settings(GPT, rounded, ("a", "b")) == ([], [])
    stated = dataclasses.replace(LLAMA, rotary_seq_len_interpolation_factor=1.0)
    assert compare_settings(LLAMA, stated, ("a", "b")) == ([], [])


def zero_centred(plain: Checkpoint, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Return the same function with gains stored minus 1."""
    state = {
        name: tensor.read().to(dtype) - (1 if is_gain(name) else 0)
        for name, tensor in plain.tensors.items()
    }
    return checkpoint(dataclasses.replace(plain.config, layernorm_zero_centered_gamma=True), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gains_stored_minus_one_are_the_same_function(dtype: torch.dtype):
    centred = zero_centred(checkpoint(LLAMA), dtype)
    state = {
        name: (tensor.read().float() + (1 if is_gain(name) else 0)).to(dtype)
        for name, tensor in centred.tensors.items()
    }
    for ours, theirs in ((centred, checkpoint(LLAMA, state)), (checkpoint(LLAMA, state), centred)):
        found = compare_checkpoints(ours, theirs)
        assert found.same and found.measured and found.weights is not None
        assert found.weights.forms and not found.weights.rounded_to
    name = "decoder.layers.1.pre_mlp_layernorm.weight"
    is_found(
        compare_checkpoints(centred, checkpoint(LLAMA, changed(state, name, (5,), 0.1))), name, (5,)
    )
    assert compare_checkpoints(centred, centred).verdict == "the same"


@pytest.mark.parametrize("model", [LLAMA, QWEN, dataclasses.replace(LLAMA, rotary_percent=0.5)])
def test_rotary_pairs_in_another_order_are_the_same_function(model: ModelConfig):
    pairs = dataclasses.replace(model, rotary_interleaved=True)
    ours = checkpoint(pairs)
    halves = with_halved_rotary(ours)
    found = compare_checkpoints(ours, halves)
    assert found.same and found.measured and found.weights is not None and found.weights.forms
    wrong = dataclasses.replace(ours, config=model)  # the order of the one, named as the other
    assert not compare_checkpoints(halves, wrong).same
    rows = Selected(
        ours.tensors["decoder.layers.0.mlp.linear_fc1.weight"], torch.arange(128).flip(0)
    )
    tensors = {**halves.tensors, "decoder.layers.0.mlp.linear_fc1.weight": rows}
    found = compare_checkpoints(ours, dataclasses.replace(halves, tensors=tensors))
    assert "decoder.layers.0.mlp.linear_fc1.weight" in found.differences()[0]


def test_absent_parameters_count_as_zeros_and_a_tied_table_as_the_embeddings():
    without = dataclasses.replace(
        GPT, add_bias_linear=False, add_qkv_bias=False, position_embedding_type="none"
    )
    state = state_dict(without)
    zeros = {n: torch.zeros(p.shape) for n, p in parameters(GPT).items() if n not in state}
    head = {"output_layer.weight": state["embedding.word_embeddings.weight"].clone()}
    untied = dataclasses.replace(GPT, untie_embeddings_and_output_weights=True)
    full = {**state, **zeros, **head}
    ours, theirs = checkpoint(without, state), checkpoint(untied, full)
    assert compare_checkpoints(ours, theirs).same and compare_checkpoints(theirs, ours).same
    for name in (*zeros, *head):
        index = tuple(size - 1 for size in full[name].shape)
        is_found(
            compare_checkpoints(ours, checkpoint(untied, changed(full, name, index))), name, index
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_rounding_is_said_and_what_it_does_not_explain_is_found(dtype: torch.dtype, kind: str):
    model = KINDS[kind]
    state = state_dict(model)
    narrow = {name: values.to(dtype) for name, values in state.items()}
    wide = {name: values.float() for name, values in narrow.items()}
    name = str(dtype).removeprefix("torch.")
    ours, theirs = checkpoint(model, state), checkpoint(model, narrow)
    for found in (compare_checkpoints(ours, theirs), compare_checkpoints(theirs, ours)):
        assert found.verdict == f"the same, after rounding to {name}"
        assert found.same and found.max_difference > 1e-4  # measured on the weights as stored
    # Numbers that are equal need no rounding; in one dtype it excuses nothing.
    assert compare_checkpoints(theirs, checkpoint(model, wide)).verdict == "the same"
    assert not compare_checkpoints(ours, checkpoint(model, wide)).same
    at = f"{model.block}.layers.1.mlp.linear_fc1.weight"
    is_found(
        compare_checkpoints(ours, checkpoint(model, changed(narrow, at, (9, 3), 0.1))), at, (9, 3)
    )


def test_what_rounding_makes_infinite_and_what_is_not_a_number_differ():
    name = "decoder.layers.0.mlp.linear_fc1.bias"
    state = changed(state_dict(GPT), name, (3,), 1e6)
    narrow = {key: values.half() for key, values in state.items()}
    assert narrow[name][3].isinf()
    is_found(compare_checkpoints(checkpoint(GPT, state), checkpoint(GPT, narrow)), name, (3,))
    broken = changed(state, name, (3,), float("nan"))
    is_found(compare_checkpoints(checkpoint(GPT, broken), checkpoint(GPT, broken)), name, (3,))


def with_vocabulary(state: dict[str, Tensor], rows: int, **noise: Any) -> dict[str, Tensor]:
    """Return the weights with rows of noise behind those of the vocabulary."""
    draws = torch.Generator().manual_seed(noise.get("seed", 5))
    changes = {}
    for name, parameter in parameters(noise["model"]).items():
        if parameter.rule.unit == "vocab":
            more = torch.randn(rows - len(state[name]), *parameter.shape[1:], generator=draws)
            changes[name] = torch.cat([state[name], more])
    return {**state, **changes}


@pytest.mark.parametrize("model", [GPT, LLAMA, BERT], ids=["gpt", "llama", "bert"])
def test_rows_of_padding_have_a_verdict_of_their_own(model: ModelConfig):
    state = state_dict(model)

    def padded(rows: int, seed: int = 5) -> Checkpoint:
        wider = dataclasses.replace(model, vocab_size=rows)
        return checkpoint(wider, with_vocabulary(state, rows, model=model, seed=seed))

    ours = padded(64)
    for theirs in (padded(64, seed=6), padded(80), checkpoint(model, state)):
        found = compare_checkpoints(ours, theirs, entries=50)
        assert found.same and found.verdict == "the same over the first 50 rows of the vocabulary"
        assert found.padding is not None and not found.padding.same and found.max_difference == 0
        strict = compare_checkpoints(ours, theirs, entries=50, vocab="padded")
        assert not strict.same and "rows 50 to" in strict.differences()[-1]
        # Without a tokenizer nobody can tell that these rows are padding.
        unknown = compare_checkpoints(ours, theirs)
        assert not unknown.same and "--tokenizer" in unknown.notes[-1]
    assert compare_checkpoints(ours, padded(64), entries=50, vocab="padded").same
    name = "embedding.word_embeddings.weight"
    wider = dataclasses.replace(model, vocab_size=64)
    moved = with_vocabulary(changed(state, name, (49, 31)), 64, model=model)
    is_found(compare_checkpoints(ours, checkpoint(wider, moved), entries=50), name, (49, 31))


@pytest.mark.parametrize("model", [GPT, LLAMA, BERT], ids=["gpt", "llama", "bert"])
def test_rows_that_writers_add_are_padding_without_a_tokenizer(model: ModelConfig):
    """Copies of one row and zeros; a single other value among them may be trained."""
    state = state_dict(model)
    ours, wider = checkpoint(model, state), dataclasses.replace(model, vocab_size=64)
    tables = [name for name, row in parameters(model).items() if row.rule.unit == "vocab"]
    for factor in (0.0, 1.0):
        more = {n: state[n][-1:].expand(14, *state[n].shape[1:]) * factor for n in tables}
        full = {**state, **{n: torch.cat([state[n], more[n]]) for n in tables}}
        for sides in ((ours, checkpoint(wider, full)), (checkpoint(wider, full), ours)):
            found = compare_checkpoints(*sides)
            assert found.verdict == "the same over the first 50 rows of the vocabulary"
            assert not compare_checkpoints(*sides, vocab="padded").same
        for name in tables:
            index = (63, 5) if full[name].dim() == 2 else (63,)
            trained = checkpoint(wider, changed(full, name, index))
            assert not compare_checkpoints(ours, trained).same


def test_a_lost_entry_of_the_tokenizer_is_a_difference():
    fewer = dataclasses.replace(GPT, vocab_size=47)
    state = state_dict(GPT)
    table = "embedding.word_embeddings.weight"
    lost = checkpoint(fewer, {**state, table: state[table][:47]})
    found = compare_checkpoints(checkpoint(GPT, state), lost, entries=50)
    assert not found.same and f"{table} is [50, 32]" in found.differences()[0]
    assert compare_checkpoints(checkpoint(GPT, state), lost, entries=47).same


@pytest.mark.parametrize("part", ["pooler", "binary_head", "num_classes", "qa_head", "lm_head"])
def test_an_output_that_one_side_lacks_is_a_difference(part: str):
    heads = {"binary_head": False} if part == "pooler" else {}
    model = dataclasses.replace(BERT, num_classes=3, qa_head=True, **heads)
    less = dataclasses.replace(model, **{part: 0 if part == "num_classes" else False})
    state = state_dict(model)
    ours, theirs = (
        checkpoint(model, state),
        checkpoint(less, {n: state[n] for n in parameters(less)}),
    )
    for found in (compare_checkpoints(ours, theirs), compare_checkpoints(theirs, ours)):
        assert not found.same and found.weights is not None and found.weights.first is None
        assert any(phrase.startswith("only --") for phrase in found.differences())


def test_positions_beyond_the_shorter_limit_are_spoken_of():
    """Rotary models have no table: a limit is no part of the function, a learned table is."""
    shorter = dataclasses.replace(LLAMA, max_position_embeddings=8)
    found = compare_checkpoints(checkpoint(LLAMA), checkpoint(shorter))
    assert found.same and "16 positions" in found.notes[0]
    state = state_dict(GPT)
    table = "embedding.position_embeddings.weight"
    cut = dataclasses.replace(GPT, max_position_embeddings=8)
    found = compare_checkpoints(
        checkpoint(GPT, state), checkpoint(cut, {**state, table: state[table][:8]})
    )
    assert not found.same and table in found.differences()[0]


def any_model(chance: random.Random) -> ModelConfig:
    """Return a model of any kind that the table of parameters knows."""
    bert = chance.random() < 0.3
    base = chance.choice([BERT, ALL_HEADS]) if bert else GPT
    options: dict[str, Any] = {
        "vocab_size": chance.choice([48, 50]),
        "layernorm_zero_centered_gamma": chance.random() < 0.4,
        "num_tokentypes": chance.choice([0, 2]) if bert else 0,
        "apply_residual_connection_post_layernorm": bert and chance.random() < 0.5,
    }
    if bert:
        if base is ALL_HEADS:  # one task head, as a fine-tuned model has it
            absent = {"lm_head": False, "binary_head": False, "qa_head": False}
            task = {"num_classes": 0, "multichoice_head": False} | absent
            options |= task | chance.choice([{"num_classes": 3}, {"qa_head": True}, {}])
        return dataclasses.replace(base, **options)
    return dataclasses.replace(
        base,
        **options,
        num_query_groups=chance.choice([1, 2, 4]),
        position_embedding_type=chance.choice(["learned_absolute", "rope", "rope", "none"]),
        rotary_percent=chance.choice([1.0, 0.5]),
        rotary_interleaved=chance.random() < 0.5,
        rope_scaling=chance.choice([None, RopeScaling(4.0)]),
        normalization=chance.choice(["LayerNorm", "RMSNorm"]),
        activation=chance.choice(["gelu", "gelu_tanh", "swiglu"]),
        add_bias_linear=chance.random() < 0.5,
        add_qkv_bias=chance.random() < 0.7,
        untie_embeddings_and_output_weights=chance.random() < 0.5,
        qk_layernorm=chance.random() < 0.3,
    )


@pytest.mark.long
@pytest.mark.parametrize(("to", "least"), [("hf", 10), ("megatron", 25), ("torch_dist", 25)])
def test_an_honest_conversion_is_never_called_different(to: str, least: int, tmp_path: Path):
    """Forms, zeros, rounding, padding and parallel sizes of any kind; then one element is moved."""
    converted = 0
    for seed in range(60):
        chance = random.Random(seed)
        model, stored = any_model(chance), chance.choice([torch.float32, torch.float16])
        state = {name: tensor.to(stored) for name, tensor in state_dict(model, seed=seed).items()}
        sizes: dict[str, Any] = {"true_vocab_size": 45} if chance.random() < 0.4 else {}
        entries = 45 if sizes else model.vocab_size
        if to != "hf":
            sizes |= {"tp": chance.choice([1, 2, 4]), "pp": chance.choice([1, 2])}
        dtype = chance.choice([None, "float32", "float16", "bfloat16"])
        source = checkpoint(model, state)
        try:
            done = convert(source, to, tmp_path / f"{to}{seed}", dtype=dtype, **sizes)
        except InputError:
            continue  # transformers or Megatron has no such model
        converted += 1
        result = open_checkpoint(done.path)
        found = compare_checkpoints(source, result, entries=entries)
        lost = [f"only --ckpt has {name}" for name in state if name.startswith("pooler.")]
        assert set(found.differences()) <= set(lost if to == "hf" else ()), (seed, model)
        name = chance.choice([name for name in state if not name.startswith("pooler.")])
        index = tuple(chance.randrange(min(size, 45)) for size in state[name].shape)
        moved = checkpoint(model, changed(state, name, index, by=0.25))
        again = compare_checkpoints(moved, result, entries=entries)
        assert again.weights is not None and again.weights.differing, (seed, name, index)
    assert converted >= least


@pytest.mark.long
def test_models_of_other_sizes_and_kinds_get_a_verdict():
    """Every pair of a family can be asked about; what differs is said, whatever it is."""
    chance = random.Random(3)
    other_sizes: list[dict[str, Any]] = [
        {"num_layers": 3},
        {"hidden_size": 48, "kv_channels": 12},
        {"vocab_size": 37},
        {"max_position_embeddings": 5},
        {},
    ]
    for _ in range(60):
        one = any_model(chance)
        other = dataclasses.replace(
            next(m for m in iter(lambda: any_model(chance), None) if m.family == one.family),
            **chance.choice(other_sizes),
        )
        entries = chance.choice([None, 30])
        found = compare_checkpoints(checkpoint(one), checkpoint(other, seed=1), entries=entries)
        assert not found.same and found.differences()
        assert found.to_dict()["verdict"].startswith("DIFFERENT")
