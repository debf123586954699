"""The config of a Megatron checkpoint, from its args, its shapes, or what has to be assumed."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any

import pytest
from support.folders.synthetic import BERT, GPT, LLAMA, args_of

from mlm_eval.checkpoints.config import (
    ConfigBuilder,
    ModelConfig,
    RopeScaling,
    check_overrides,
    parse_overrides,
)
from mlm_eval.checkpoints.dtypes import STORED_DTYPES
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safe_pickle import Namespace as PickledNamespace
from mlm_eval.checkpoints.files.safe_pickle import Stub
from mlm_eval.checkpoints.megatron.args import build_config, saved_args
from mlm_eval.checkpoints.parameters import parameters

Shapes = dict[str, tuple[int, ...]]


def shapes_of(config: ModelConfig) -> Shapes:
    return {name: parameter.shape for name, parameter in parameters(config).items()}


def build(
    config: ModelConfig | Shapes,
    args: dict[str, Any] | None = None,
    *,
    core: bool = False,
    family: str = "gpt",
    **overrides: Any,
) -> ConfigBuilder:
    """Build the config of a checkpoint with the shapes of `config` and exactly these args."""
    shapes = config if isinstance(config, dict) else shapes_of(config)
    family = family if isinstance(config, dict) else config.family
    return build_config(
        shapes,
        {} if args is None else args,
        family=family,
        code="core" if core else "legacy",
        overrides=overrides,
        where="here",
        params_dtype="float32",
    )


def args_for(config: ModelConfig, **more: Any) -> dict[str, Any]:
    """Return a run's args as a dict, with changes; a value of `...` takes one away."""
    args = vars(args_of(config)) | more
    return {name: value for name, value in args.items() if value is not ...}


@pytest.mark.parametrize("config", [GPT, LLAMA, BERT], ids=["gpt", "llama", "bert"])
@pytest.mark.parametrize("core", [False, True])
def test_args_and_shapes_give_the_model(config: ModelConfig, core: bool):
    found = build(config, args_for(config), core=core)
    assert found.config == config
    assert not found.warnings
    assert set(found.sources) <= {field.name for field in dataclasses.fields(ModelConfig)}
    assert found.sources["num_layers"] == "shapes"
    assert found.sources["num_attention_heads"] == "args.num_attention_heads"


# ---- GELU --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "legacy", "core"),
    [
        # docs/megatron.md, "GELU", line by line: what ran, by legacy code and by megatron-core.
        ({}, "gelu", "gelu"),
        ({"openai_gelu": False}, "gelu", "gelu"),
        ({"openai_gelu": True}, "gelu_tanh", "gelu"),
        ({"openai_gelu": True, "bias_gelu_fusion": False}, "gelu_tanh", "gelu"),
        ({"openai_gelu": True, "onnx_safe": True}, "gelu_tanh", "gelu"),
        ({"onnx_safe": True}, "gelu", "gelu"),
        ({"onnx_safe": True, "bias_gelu_fusion": True}, "gelu", "gelu_tanh"),
        ({"onnx_safe": None, "bias_gelu_fusion": True}, "gelu_tanh", "gelu_tanh"),
        ({"bias_gelu_fusion": True}, "gelu_tanh", "gelu_tanh"),
        ({"bias_gelu_fusion": False}, "gelu", "gelu"),
        ({"bias_activation_fusion": True}, "gelu_tanh", "gelu_tanh"),
        ({"squared_relu": True}, "squared_relu", "squared_relu"),
        ({"squared_relu": True, "bias_gelu_fusion": True}, "squared_relu", "squared_relu"),
        ({"squared_relu": True, "openai_gelu": True}, "gelu_tanh", "squared_relu"),
    ],
)
def test_the_activation_that_ran(args: dict, legacy: str, core: str):
    plain = args_for(GPT, bias_gelu_fusion=...)
    for is_core, expected in ((False, legacy), (True, core)):
        found = build(GPT, plain | args, core=is_core)
        assert found.config.activation == expected
        source = found.sources["activation"]
        assert source == "Megatron's default" or source.removeprefix("args.") in args


@pytest.mark.parametrize("other", ["squared_relu", "quick_geglu"])
def test_two_activations_at_once_are_refused(other: str):
    """Megatron-LM asserts it for megatron-core; its legacy layers took swiglu first."""
    args = args_for(GPT) | {"swiglu": True, other: True}
    with pytest.raises(InputError, match=f"args.swiglu = True and args.{other} = True, which"):
        build(GPT, args, core=True)
    model = dataclasses.replace(GPT, activation=other)
    assert build(model, args, core=True, activation=other).config.activation == other
    if other == "quick_geglu":
        return  # legacy layers do not have it
    gated = dataclasses.replace(GPT, activation="swiglu")
    assert build(gated, args, core=False).config.activation == "swiglu"


def test_the_fused_kernel_needs_a_bias():
    config = dataclasses.replace(GPT, add_bias_linear=False)
    args = args_for(config, bias_gelu_fusion=True)
    assert build(config, args).config.activation == "gelu"
    # Some converters negate the flag's name; the weights say it either way.
    assert build(config, args | {"disable_bias_linear": True}).config.add_bias_linear is False
    assert build(GPT, args | {"add_bias_linear": False}).config.add_bias_linear is True


@pytest.mark.parametrize(
    ("args", "core", "mlp", "head"),
    [
        ({"bias_gelu_fusion": True}, False, "gelu_tanh", "gelu"),
        ({"bias_gelu_fusion": False}, False, "gelu", "gelu"),
        ({"openai_gelu": True}, False, "gelu_tanh", "gelu_tanh"),
        ({"onnx_safe": True}, False, "gelu", "gelu"),
        ({"openai_gelu": True, "bias_gelu_fusion": True}, True, "gelu_tanh", "gelu"),
    ],
)
def test_berts_head_has_a_gelu_of_its_own(args: dict, core: bool, mlp: str, head: str):
    found = build(BERT, args_for(BERT) | args, core=core).config
    assert (found.activation, found.head_activation) == (mlp, head)


@pytest.mark.parametrize("core", [False, True])
def test_swiglu(core: bool):
    found = build(LLAMA, args_for(LLAMA, bias_gelu_fusion=True), core=core)
    assert found.config.activation == "swiglu"
    assert found.config.ffn_hidden_size == 24
    with pytest.raises(InputError, match="here: activation gelu does not fit.*48 and 24.*--set"):
        build(LLAMA, args_for(LLAMA, swiglu=False))
    with pytest.raises(InputError, match="here: activation swiglu does not fit an MLP.*24 and 24"):
        build(GPT, args_for(GPT, swiglu=True))


# ---- heads and groups --------------------------------------------------------------------------


def test_query_groups_count_only_with_their_flag():
    """The field is 1 for plain attention too, and does not mean multi-query attention."""
    for flag in (False, ...):
        args = args_for(GPT, group_query_attention=flag, num_query_groups=1)
        assert build(GPT, args).config.num_query_groups == 4
    assert build(LLAMA, args_for(LLAMA)).config.num_query_groups == 2
    multi_query = dataclasses.replace(LLAMA, num_query_groups=1)
    assert build(multi_query, args_for(multi_query)).config.num_query_groups == 1


def test_groups_that_the_weights_bear_out_need_no_flag():
    args = args_for(LLAMA, group_query_attention=..., num_query_groups=2)
    assert build(LLAMA, args).config.num_query_groups == 2


@pytest.mark.parametrize(
    "change",
    [
        {"group_query_attention": False, "num_query_groups": 1},
        {"group_query_attention": True, "num_query_groups": 4},
        {"group_query_attention": ..., "num_query_groups": 1},
    ],
)
def test_groups_that_contradict_the_weights(change: dict):
    with pytest.raises(InputError, match="here: the QKV weight has 2 query groups where its args"):
        build(LLAMA, args_for(LLAMA, **change))
    found = build(LLAMA, args_for(LLAMA, **change), num_query_groups=2)
    assert found.config.num_query_groups == 2
    assert found.sources["num_query_groups"] == "--set"


def test_heads_wider_than_the_model():
    """kv_channels x heads may differ from the hidden size."""
    config = dataclasses.replace(GPT, kv_channels=6)
    assert build(config, args_for(config)).config == config


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (3, "here: 3 attention heads do not divide the attention width 16.*--set num_attention_h"),
        (
            8,
            "here: 8 heads over an attention width of 16 have 2 channels each where.*kv_channels 4",
        ),
        (99, "here: 99 attention heads do not divide"),
    ],
)
def test_heads_that_contradict_the_weights(heads: int, message: str):
    args = args_for(GPT, num_attention_heads=heads)
    with pytest.raises(InputError, match=message):
        build(GPT, args)
    assert build(GPT, args, num_attention_heads=4).config == GPT
    for wrong in (0, -1, 3, 17):
        with pytest.raises(InputError, match=f"here: {wrong} attention heads do not divide"):
            build(GPT, args_for(GPT), num_attention_heads=wrong)


def test_heads_without_args_are_of_64_channels():
    """NVIDIA's 345M releases: 24 layers, hidden 1,024, vocabulary padded to 50,304."""
    config = dataclasses.replace(
        GPT,
        num_layers=24,
        hidden_size=1024,
        num_attention_heads=16,
        num_query_groups=16,
        kv_channels=64,
        ffn_hidden_size=4096,
        vocab_size=50304,
        max_position_embeddings=1024,
        activation="gelu_tanh",
    )
    found = build(config)
    assert found.config == config
    heads, activation = found.warnings
    assert heads.startswith("the file holds no args: 16 heads of 64 assumed; correct it with --set")
    assert "activation gelu_tanh assumed" in activation
    assert found.sources["activation"] == "assumed: the file holds no args"
    assert found.sources["layernorm_epsilon"] == "assumed"
    other = build(config, num_attention_heads=8, activation="gelu")
    assert other.config.kv_channels == 128
    assert not other.warnings

    bert = dataclasses.replace(
        config,
        family="bert",
        vocab_size=30592,
        max_position_embeddings=512,
        num_tokentypes=2,
        pooler=True,
        binary_head=True,
        activation="gelu",
    )
    assert build(bert).config == bert


def test_a_model_narrower_than_64_without_args():
    assert build(GPT).config.num_attention_heads == 1
    assert build(GPT, num_attention_heads=4).config.num_query_groups == 4


# ---- norms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected", "source"),
    [
        ({}, 1e-5, "Megatron's default"),
        ({"layernorm_epsilon": 1e-12}, 1e-12, "args.layernorm_epsilon"),  # until 2023-09
        ({"norm_epsilon": 1e-6}, 1e-6, "args.norm_epsilon"),  # then
        ({"norm_epsilon": None, "layernorm_epsilon": 1e-6}, 1e-6, "args.layernorm_epsilon"),
        ({"norm_epsilon": 1e-6, "layernorm_epsilon": 1e-5}, 1e-6, "args.norm_epsilon"),
    ],
)
def test_epsilon_under_either_name(args: dict, expected: float, source: str):
    found = build(GPT, args_for(GPT, **args))
    assert found.config.layernorm_epsilon == expected
    assert found.sources["layernorm_epsilon"] == source


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, False),
        ({"apply_layernorm_1p": True}, True),  # until core 0.16
        ({"layernorm_zero_centered_gamma": True}, True),  # since
        ({"apply_layernorm_1p": True, "layernorm_zero_centered_gamma": False}, True),
        ({"apply_layernorm_1p": False, "layernorm_zero_centered_gamma": True}, True),
        ({"apply_layernorm_1p": False, "layernorm_zero_centered_gamma": False}, False),
    ],
)
def test_a_gain_stored_as_its_distance_from_one(args: dict, expected: bool):
    found = build(GPT, args_for(GPT, **args))
    assert found.config.layernorm_zero_centered_gamma is expected
    name = "layernorm_zero_centered_gamma"
    assert (
        build(GPT, args_for(GPT, **args), **{name: False}).config.layernorm_zero_centered_gamma
        is False
    )


def test_kind_of_norm():
    assert build(GPT, args_for(GPT, normalization=...)).config.normalization == "LayerNorm"
    assert build(LLAMA, args_for(LLAMA, normalization=...)).config.normalization == "RMSNorm"
    with pytest.raises(InputError, match="here: args say RMSNorm, but the final norm has a bias"):
        build(GPT, args_for(GPT, normalization="RMSNorm"))
    with pytest.raises(
        InputError, match="here: args say LayerNorm, but the final norm has no bias"
    ):
        build(LLAMA, args_for(LLAMA, normalization="LayerNorm"))


def test_residual_after_the_norm_was_legacy_only():
    args = args_for(BERT, apply_residual_connection_post_layernorm=True)
    name = "apply_residual_connection_post_layernorm"
    assert getattr(build(BERT, args).config, name) is True
    core = build(BERT, args, core=True)
    assert getattr(core.config, name) is False
    assert core.sources[name] == f"Megatron's core code is not given args.{name}"
    assert getattr(build(BERT, args, core=True, **{name: True}).config, name) is True


# ---- positions ---------------------------------------------------------------------------------

LEARNED = dataclasses.replace(LLAMA, position_embedding_type="learned_absolute")


@pytest.mark.parametrize(
    ("config", "args", "expected"),
    [
        # Since 2023-07 one field.
        (GPT, {"position_embedding_type": "learned_absolute"}, "learned_absolute"),
        (LLAMA, {"position_embedding_type": "rope"}, "rope"),
        (LLAMA, {"position_embedding_type": "none"}, "none"),
        # Before, two flags, and a table that is there or not.
        (GPT, {}, "learned_absolute"),
        (GPT, {"add_position_embedding": True}, "learned_absolute"),
        (LLAMA, {"use_rotary_position_embeddings": True}, "rope"),
        (LLAMA, {"add_position_embedding": False, "use_rotary_position_embeddings": True}, "rope"),
        (LEARNED, {"use_rotary_position_embeddings": True}, "learned_absolute+rope"),
        (LEARNED, {"use_rotary_position_embeddings": False}, "learned_absolute"),
        (LLAMA, {"add_position_embedding": False}, "none"),
        # An enum of a fork, unpickled as a stub: by value, or by class and member.
        (GPT, {"position_embedding_type": Stub("learned_absolute")}, "learned_absolute"),
        (LLAMA, {"position_embedding_type": Stub(Stub, "rope")}, "rope"),
    ],
)
def test_positions(config: ModelConfig, args: dict, expected: str):
    plain = args_for(config, position_embedding_type=...)
    found = build(config, plain | args).config
    assert found.position_embedding_type == expected
    assert found.learned_positions == ("learned" in expected)
    assert found.rotary == ("rope" in expected)
    assert found.max_position_embeddings == 8


@pytest.mark.parametrize("kind", ["relative", "mrope", "yarn"])
def test_positions_that_are_not_computed(kind: str):
    with pytest.raises(InputError, match=f"here uses {kind} position embeddings, which"):
        build(LLAMA, args_for(LLAMA, position_embedding_type=kind))
    args = args_for(LLAMA, position_embedding_type=kind)
    assert build(LLAMA, args, position_embedding_type="rope").config.rotary


def test_alibi_is_of_forks_of_the_legacy_code():
    args = args_for(LLAMA, position_embedding_type="alibi")
    assert build(LLAMA, args).config.alibi
    with pytest.raises(InputError, match="here uses alibi position embeddings, which"):
        build(LLAMA, args, core=True)


@pytest.mark.parametrize("kind", ["sinusoidal", 3, Stub()])
def test_positions_of_an_unknown_kind(kind: Any):
    with pytest.raises(InputError, match="position_embedding_type .* is not supported; known are"):
        build(LLAMA, args_for(LLAMA, position_embedding_type=kind))


def test_number_of_positions():
    found = build(LLAMA, args_for(LLAMA, max_position_embeddings=..., seq_length=77))
    assert found.config.max_position_embeddings == 77
    with pytest.raises(InputError, match="here does not record how many positions.*--set max_pos"):
        build(LLAMA, args_for(LLAMA, max_position_embeddings=...))
    found = build(LLAMA, args_for(LLAMA, max_position_embeddings=...), max_position_embeddings=9)
    assert found.config.max_position_embeddings == 9
    # A table is a fact, whatever the args say.
    assert build(GPT, args_for(GPT, max_position_embeddings=99)).config.max_position_embeddings == 8


def test_rotary_settings():
    args = {
        "rotary_percent": 0.5,
        "rotary_base": 500000,
        "rotary_interleaved": True,
        "rotary_seq_len_interpolation_factor": 4,
        "use_rope_scaling": True,
    }
    found = build(LLAMA, args_for(LLAMA, **args), core=True).config
    assert found.rotary_percent == 0.5
    assert found.rotary_base == 500000.0
    assert isinstance(found.rotary_base, float)
    assert found.rotary_interleaved is True
    assert found.rope_scaling == RopeScaling()
    plain = build(LLAMA, args_for(LLAMA, rope_scaling_factor=32.0), core=True).config
    assert plain.rope_scaling is None
    assert plain.rotary_base == 10000.0
    legacy = build(LLAMA, args_for(LLAMA, rotary_seq_len_interpolation_factor=4)).config
    assert legacy.rotary_seq_len_interpolation_factor == 4


def test_rotary_settings_of_a_model_without_rotary_positions_are_left_out():
    """Any run's script may pass them; equal models have equal configs."""
    args = args_for(
        GPT, rotary_base=500, rotary_percent=0.5, rotary_interleaved=True, use_rope_scaling=True
    )
    for core in (False, True):
        found = build(GPT, args, core=core)
        assert found.config == GPT
        assert not found.warnings


# ---- tying, vocabulary, what is refused --------------------------------------------------------


def test_tying():
    name = "untie_embeddings_and_output_weights"
    assert build(LLAMA, args_for(LLAMA)).config.untie_embeddings_and_output_weights
    assert build(LLAMA, args_for(LLAMA, **{name: ...})).config.untie_embeddings_and_output_weights
    assert not build(GPT, args_for(GPT, **{name: ...})).config.untie_embeddings_and_output_weights


def test_the_vocabulary_is_what_is_stored():
    for more in ({"padded_vocab_size": 99}, {"vocab_size": 31}, {}):
        found = build(GPT, args_for(GPT, **more))
        assert found.config.vocab_size == 32
        assert found.sources["vocab_size"] == "shapes"


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("num_experts", 8, "a mixture of experts"),
        ("multi_latent_attention", True, ""),
        ("output_logit_softcapping", 30.0, "capped logits"),
        ("linear_attention_freq", 4, "linear attention"),
        ("num_experts", Stub("dict"), "a mixture of experts"),
    ],
)
def test_mathematics_that_is_not_computed_is_refused(name: str, value: Any, what: str):
    with pytest.raises(InputError, match=f"here was trained with {what}.*args.{name} = "):
        build(GPT, args_for(GPT, **{name: value}))
    build(GPT, args_for(GPT, **{name: None}))


@pytest.mark.parametrize("value", [None, 0, 1, [1], [1, 1]])
def test_one_expert_is_an_ordinary_mlp(value: Any):
    """[1] is Megatron-DeepSpeed's default: no parameter of its dense models is an expert's."""
    assert build(GPT, args_for(GPT, num_experts=value)).config == GPT


def test_a_scale_of_attention_scores():
    args = args_for(GPT, softmax_scale=0.4)
    assert build(GPT, args, core=True).config.softmax_scale == 0.4
    usual = args_for(GPT, softmax_scale=GPT.kv_channels**-0.5)
    assert build(GPT, usual, core=True).config == GPT
    with pytest.raises(InputError, match="args.softmax_scale = 0.4, which.*--set softmax_scale="):
        build(GPT, args)
    assert build(GPT, args, softmax_scale=0.4).config.softmax_scale == 0.4
    assert build(GPT, args, softmax_scale=0.5).config == GPT


def test_shapes_that_are_no_model():
    def without(*ends: str) -> Shapes:
        return {name: shape for name, shape in shapes_of(GPT).items() if not name.endswith(ends)}

    args = args_for(GPT)
    for shapes, message in (
        ({}, "here holds no transformer layers; it is not a whole"),
        (without("word_embeddings.weight"), "here holds no word embeddings"),
        (without("linear_qkv.weight"), "here holds layers without attention weights"),
        (without("linear_fc2.weight"), "here holds layers without an MLP"),
    ):
        with pytest.raises(InputError, match=message):
            build(shapes, args)
    three = {name: shape for name, shape in shapes_of(GPT).items() if ".layers.3." not in name}
    with pytest.raises(InputError, match="here holds 3 layers where its args say 4; if a pipeline"):
        build(three, args)
    gap = {name: shape for name, shape in shapes_of(GPT).items() if ".layers.1." not in name}
    with pytest.raises(InputError, match="here lacks layer 1 of 4"):
        build(gap, args)
    with pytest.raises(InputError, match="embeddings of width 16 where its args say hidden_size 8"):
        build(GPT, args_for(GPT, hidden_size=8))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embedding.word_embeddings.weight", (32,)),
        ("embedding.position_embeddings.weight", (8, 16, 1)),
        ("decoder.layers.0.self_attention.linear_qkv.weight", (48,)),
        ("decoder.layers.0.self_attention.linear_proj.weight", ()),
        ("decoder.layers.0.mlp.linear_fc1.weight", (24,)),
        ("decoder.layers.0.mlp.linear_fc1.bias", (24, 1)),
        ("decoder.final_layernorm.weight", (4, 4)),
    ],
)
def test_tensors_with_the_wrong_number_of_dims(name: str, shape: tuple[int, ...]):
    with pytest.raises(InputError, match=rf"here: {name} has shape \[.*\], expected . dim"):
        build(shapes_of(GPT) | {name: shape}, args_for(GPT))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embedding.word_embeddings.weight", (0, 16)),
        ("decoder.layers.0.self_attention.linear_proj.weight", (16, 0)),
        ("decoder.layers.0.self_attention.linear_qkv.weight", (0, 16)),
        ("decoder.layers.0.mlp.linear_fc2.weight", (16, 0)),
    ],
)
@pytest.mark.parametrize("with_args", [False, True])
def test_empty_tensors(name: str, shape: tuple[int, ...], with_args: bool):
    with pytest.raises(InputError):
        build(shapes_of(GPT) | {name: shape}, args_for(GPT) if with_args else {})


# ---- args as they come out of a file -----------------------------------------------------------


def pickled(**values: Any) -> PickledNamespace:
    namespace = PickledNamespace()
    vars(namespace).update(values)
    return namespace


def test_args_become_plain_values():
    endless: list = []
    endless += [endless, endless]
    stub = Stub(1)
    found = saved_args(
        pickled(
            hidden_size=16,
            lr=1e-4,
            dtype=STORED_DTYPES["float16"],
            names=["a", "b"],
            pair=(1, 2),
            enum=stub,
            none=None,
            nested={"a": 1},
            endless=endless,
            huge=2**100,
            long="x" * 20_000,
        ),
        "here",
    )
    assert found["hidden_size"] == 16
    assert found["lr"] == 1e-4
    assert found["dtype"] is STORED_DTYPES["float16"]
    assert found["names"] == ["a", "b"]
    assert found["pair"] == [1, 2]
    assert found["enum"] is stub
    assert found["none"] is None
    for name in ("nested", "endless", "huge", "long"):
        assert isinstance(found[name], Stub), name
        assert len(repr(found[name])) < 50
    for nothing in (None, 3, "text", Stub(), []):
        assert saved_args(nothing, "here") == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", "4"),
        ("num_layers", 4.0),
        ("num_attention_heads", True),
        ("num_attention_heads", [4]),
        ("hidden_size", -16),
        ("hidden_size", 2**40),
        ("tensor_model_parallel_size", {}),
        ("pipeline_model_parallel_size", "1"),
        ("norm_epsilon", "1e-5"),
        ("rotary_base", Stub(10000)),
        ("rank", "0"),
    ],
)
def test_sizes_that_are_no_numbers(name: str, value: Any):
    with pytest.raises(InputError, match=rf"here: args.{name} is .* where a number was expected"):
        saved_args(pickled(**{name: value}), "here")
    with pytest.raises(InputError, match=f"args.{name}"):
        build(GPT, args_for(GPT, **{name: value}))


# ---- --set -------------------------------------------------------------------------------------


def test_overrides_are_parsed_by_the_settings_type():
    assert parse_overrides(
        [
            "num_attention_heads=16",
            "layernorm_epsilon = 1e-6",
            "activation=gelu_tanh",
            "untie_embeddings_and_output_weights=TRUE",
            "layernorm_zero_centered_gamma=no",
            "checkpoint_version=2",
            "rotary_seq_len_interpolation_factor=4",
        ]
    ) == {
        "num_attention_heads": 16,
        "layernorm_epsilon": 1e-6,
        "activation": "gelu_tanh",
        "untie_embeddings_and_output_weights": True,
        "layernorm_zero_centered_gamma": False,
        "checkpoint_version": 2.0,
        "rotary_seq_len_interpolation_factor": 4.0,
    }
    assert parse_overrides([]) == {}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("num_attention_heads", "--set 'num_attention_heads' has no '='; write --set num_att"),
        ("heads=4", "--set heads is not a model setting; known are .*num_attention_heads"),
        ("rope_scaling=8", "--set rope_scaling is not a model setting"),
        ("num_attention_heads=many", "--set num_attention_heads=many: expected a whole number"),
        ("num_attention_heads=4.5", "expected a whole number"),
        ("layernorm_epsilon=small", "--set layernorm_epsilon=small: expected a number"),
        ("layernorm_epsilon=nan", "expected a number"),
        ("rotary_base=inf", "expected a number"),
        ("qk_layernorm=maybe", "--set qk_layernorm=maybe: expected true or false"),
        ("checkpoint_version=new", "--set checkpoint_version=new: expected a number"),
    ],
)
def test_overrides_that_are_wrong(pair: str, message: str):
    with pytest.raises(InputError, match=message):
        parse_overrides([pair])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"heads": 4}, "heads is not a model setting"),
        (
            {"num_attention_heads": "4"},
            "num_attention_heads is set to '4'; expected a whole number",
        ),
        ({"num_attention_heads": True}, "expected a whole number"),
        ({"qk_layernorm": 1}, "qk_layernorm is set to 1; expected true or false"),
        ({"layernorm_epsilon": "x"}, "expected a number"),
        ({"activation": None}, "expected a word"),
    ],
)
def test_overrides_from_python_are_checked_too(overrides: dict, message: str):
    with pytest.raises(InputError, match=message):
        check_overrides(overrides)
    check_overrides({"num_attention_heads": 4, "layernorm_epsilon": 1, "qk_layernorm": False})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0, but must be at least 1.*--set num_layers=N"),
        ({"ffn_hidden_size": -4}, "ffn_hidden_size is -4"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"num_query_groups": 3}, "num_query_groups 3 does not divide num_attention_heads 4"),
        ({"num_query_groups": 0}, "num_query_groups 0"),
        ({"activation": "tanh"}, "activation 'tanh' is not supported; known are gelu, gelu_tanh"),
        ({"normalization": "BatchNorm"}, "normalization 'BatchNorm' is not supported"),
        ({"family": "bart"}, "family 'bart' is not supported; known are gpt, bert, t5"),
        ({"family": "t5"}, "decoder_num_layers is 0, but must be at least 1"),
        ({"decoder_num_layers": 2}, "decoder_num_layers is 2, but must be 0 in a model of family"),
        ({"position_embedding_type": "relative"}, "relative, which family gpt does not have"),
        ({"head_activation": "relu"}, "head_activation 'relu' is not supported"),
        ({"layernorm_epsilon": float("nan")}, "layernorm_epsilon is nan, but must lie between"),
        ({"layernorm_epsilon": -1e-5}, "layernorm_epsilon is -1e-05"),
        ({"rotary_percent": 0.0}, "rotary_percent is 0.0, but must lie between"),
        ({"rotary_percent": 1.5}, "rotary_percent is 1.5"),
        ({"hidden_dropout": 2.0}, "hidden_dropout is 2.0"),
        (
            {"position_embedding_type": "rope", "rotary_percent": 0.25},
            "rotary_percent 0.25 of heads of 4 channels is an odd number",
        ),
    ],
)
def test_settings_that_no_model_has(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(GPT, **change)


def test_a_config_is_plain_values():
    values = dataclasses.replace(LLAMA, rope_scaling=RopeScaling()).to_dict()
    assert values["rope_scaling"]["factor"] == 8.0
    assert values["hidden_size"] == 16
    assert GPT.block == "decoder"
    assert BERT.block == "encoder"
    assert LLAMA.qkv_size == (4 + 2 * 2) * 4
    assert not Namespace(**values).qk_layernorm
