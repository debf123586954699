"""Nothing that changes the function passes unread: the table of saved settings, entry by entry.

It is compared with the config classes of the installed megatron-core (read as text: an import takes
seconds) and with the arguments that docs/megatron.md names; and each mark is held against what the
reader does.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import random_models
from support.configs import MAMBA
from support.folders.synthetic import BERT, GPT, LLAMA, T5, args_of
from support.paths import PROJECT

from mlm_eval.checkpoints.config import ConfigBuilder, ModelConfig, RopeScaling
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safe_pickle import Stub
from mlm_eval.checkpoints.megatron.args import build_config
from mlm_eval.checkpoints.megatron.family_args import args_of_family
from mlm_eval.checkpoints.megatron.fields import ARG_FIELDS, NOT_FOR_T5, RunCode
from mlm_eval.checkpoints.megatron.layers.branches import args_of_branches
from mlm_eval.checkpoints.megatron.layout import choose_names
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import parameters

LAYERS = tuple(range(LLAMA.num_layers))
MOE = dataclasses.replace(
    LLAMA, num_experts=4, moe_layers=LAYERS, moe_ffn_hidden_size=24, moe_router_topk=2
)
MLA = dataclasses.replace(
    LLAMA,
    multi_latent_attention=True,
    kv_lora_rank=6,
    qk_head_dim=4,
    qk_pos_emb_head_dim=2,
    v_head_dim=4,
    num_query_groups=4,
)
HYBRID = dataclasses.replace(
    LLAMA,
    no_mixer_layers=(2,),
    no_mlp_layers=(0, 1, 3),
    mamba_layers=(0, 3),
    **MAMBA,
)
HETEROGENEOUS = dataclasses.replace(
    LLAMA,
    no_mixer_layers=(1,),
    linear_mlp_layers=(2,),
    ffn_hidden_size=24,
    layer_ffn_hidden_sizes=(24, 16, 0, 8),
)
FAMILY_ARGS: dict[ModelConfig, dict[str, Any]] = {
    MOE: {"num_experts": 4, "moe_router_topk": 2, "moe_layer_freq": 1},
    MLA: {"group_query_attention": False, "save_retain_interval": None},
    HYBRID: args_of_branches(HYBRID),
    HETEROGENEOUS: args_of_branches(HETEROGENEOUS),
}
YARN = {"rotary_scaling_factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.5}
MUP = {"use_mup": True, "mup_attn_scale_power": 0.5}
CLAMP = "activation_func_clamp_value"

CORE, LEGACY, LEGACY_TE = "core", "legacy", "legacy with TransformerEngine"


def build(
    config: ModelConfig, args: dict[str, Any], *, code: RunCode = "core", **overrides: Any
) -> ConfigBuilder:
    """Return what the reader makes of args beside the shapes of a model."""
    return build_config(
        {name: parameter.shape for name, parameter in parameters(config).items()},
        args,
        family=config.family,
        code=code,
        overrides=overrides,
        where="here",
        params_dtype="float32",
    )


def args_for(config: ModelConfig, **more: Any) -> dict[str, Any]:
    args = vars(args_of(config)) | FAMILY_ARGS.get(config, {}) | more
    return {name: value for name, value in args.items() if value is not ...}


# ---- megatron-core's own classes ---------------------------------------------------------------


def core_fields() -> dict[str, Any]:
    """Return the fields of megatron-core's two config classes, with their defaults.

    A default that is no literal is `...`. MLATransformerConfig gives its base class's fields new
    defaults: the base class's are returned.
    """
    spec = importlib.util.find_spec("megatron")  # a namespace: this folder may be a part of it
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    rooms = [room for place in places if (room := Path(place) / "core").is_dir()]
    if not rooms:
        pytest.skip("megatron-core is not installed")
    core = rooms[0]
    found: dict[str, Any] = {}
    for name, classes in (
        ("model_parallel_config.py", {"ModelParallelConfig"}),
        ("transformer/transformer_config.py", {"TransformerConfig", "MLATransformerConfig"}),
    ):
        file = core / name
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in classes:
                for line in node.body:
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                        found.setdefault(line.target.id, default_of(line.value))
    return found


def default_of(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):  # field(default=...)
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    try:
        return ... if value is None else ast.literal_eval(value)
    except ValueError:
        return ...


def test_every_field_of_megatron_core_is_in_the_table():
    """A new field of a new release fails here, instead of passing unread."""
    fields = core_fields()
    assert len(fields) > 200
    assert sorted(set(fields) - set(ARG_FIELDS)) == []


def test_megatron_cores_own_defaults_are_harmless():
    checked = 0
    for name, default in core_fields().items():
        entry = ARG_FIELDS[name]
        if entry.mark == "refused" and not entry.only_with:
            assert entry.is_harmless(default), (name, default)
            checked += 1
    assert checked > 3


def test_every_argument_of_the_documents_is_in_the_table():
    text = (PROJECT / "docs/megatron.md").read_text(encoding="utf-8")
    section = text.partition("\n## Arguments\n")[2].partition("\n## ")[0]
    rows = [row.split("|")[2] for row in section.splitlines() if row.startswith("| ")]
    names = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    assert len(names) > 40
    assert sorted(names - set(ARG_FIELDS)) == []


# ---- marks -------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (True, 7, 0.3, "a word", [1, 0, 2], Stub("of a class"))
REFUSED = {
    name: entry
    for name, entry in ARG_FIELDS.items()
    if entry.mark == "refused" and not entry.only_with
}
WITHOUT_EFFECT = [
    name
    for name, entry in ARG_FIELDS.items()
    if entry.mark in ("numerics", "training") or entry.only_with
]


def test_marks_are_consistent():
    for name, entry in ARG_FIELDS.items():
        assert entry.reason, name
        assert bool(entry.harmless) == (name in REFUSED), name
        if entry.only_with:
            assert entry.only_with in {*REFUSED, "position_embedding_type"}, name
        if entry.unreceived:
            assert entry.mark == "read" and entry.until, name


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_its_name(name: str):
    entry = REFUSED[name]
    odd = [value for value in ODD if not entry.is_harmless(value)]
    assert odd
    for value in odd:
        with pytest.raises(InputError, match=rf"^here was trained with .*args\.{name} = "):
            build(GPT, args_for(GPT, **{name: value}))
    for value in (*entry.harmless, list(entry.harmless), []):
        assert build(GPT, args_for(GPT, **{name: value})).config == GPT
    if entry.setting:
        with pytest.raises(InputError, match=f"--set {entry.setting}="):
            build(GPT, args_for(GPT, **{name: odd[0]}))
        usual = {"softmax_scale": GPT.kv_channels**-0.5}.get(entry.setting)
        usual = getattr(GPT, entry.setting) if usual is None else usual
        args = args_for(GPT, **{name: odd[0]})
        assert build(GPT, args, **{entry.setting: usual}).config == GPT


@pytest.mark.long
@pytest.mark.parametrize("config", [GPT, LLAMA, BERT], ids=["gpt", "llama", "bert"])
def test_what_is_marked_without_effect_changes_nothing(config: ModelConfig):
    for name in WITHOUT_EFFECT:
        for value in ODD:
            for code in (CORE, LEGACY):
                found = build(config, args_for(config, **{name: value}), code=code)
                assert (found.config, found.warnings) == (config, []), name


READ: dict[str, tuple[ModelConfig, RunCode, dict[str, Any]]] = {
    # Name -> a model, the code that ran it, and args that make another model of it or contradict.
    "num_layers": (GPT, CORE, {"num_layers": 3}),
    "encoder_num_layers": (GPT, CORE, {"num_layers": ..., "encoder_num_layers": 3}),
    "decoder_num_layers": (T5, CORE, {"decoder_num_layers": 2}),
    "relative_attention_num_buckets": (T5, CORE, {"relative_attention_num_buckets": 9}),
    "relative_attention_max_distance": (T5, CORE, {"relative_attention_max_distance": 99}),
    "hidden_size": (GPT, CORE, {"hidden_size": 8}),
    "kv_channels": (GPT, CORE, {"kv_channels": 8}),
    "num_query_groups": (LLAMA, CORE, {"num_query_groups": 4}),
    "group_query_attention": (LLAMA, CORE, {"group_query_attention": False}),
    "normalization": (GPT, CORE, {"normalization": "RMSNorm"}),
    "num_attention_heads": (GPT, CORE, {"num_attention_heads": 2}),
    "max_position_embeddings": (LLAMA, CORE, {"max_position_embeddings": 99}),
    "seq_length": (LLAMA, CORE, {"max_position_embeddings": ..., "seq_length": 99}),
    "position_embedding_type": (LLAMA, CORE, {"position_embedding_type": "none"}),
    "use_rotary_position_embeddings": (
        LLAMA,
        LEGACY,
        {"position_embedding_type": ..., "use_rotary_position_embeddings": False},
    ),
    "rotary_percent": (LLAMA, CORE, {"rotary_percent": 0.5}),
    "rotary_base": (LLAMA, CORE, {"rotary_base": 500}),
    "rotary_interleaved": (LLAMA, CORE, {"rotary_interleaved": True}),
    "rotary_seq_len_interpolation_factor": (
        LLAMA,
        LEGACY,
        {"rotary_seq_len_interpolation_factor": 4},
    ),
    "use_rope_scaling": (LLAMA, CORE, {"use_rope_scaling": True}),
    "softmax_scale": (LLAMA, CORE, {"softmax_scale": 0.4}),
    "layernorm_epsilon": (LLAMA, CORE, {"layernorm_epsilon": 1e-3}),
    "norm_epsilon": (LLAMA, CORE, {"norm_epsilon": 1e-3}),
    "layernorm_zero_centered_gamma": (GPT, CORE, {"layernorm_zero_centered_gamma": True}),
    "apply_layernorm_1p": (GPT, CORE, {"apply_layernorm_1p": True}),
    "apply_residual_connection_post_layernorm": (
        GPT,
        LEGACY,
        {"apply_residual_connection_post_layernorm": True},
    ),
    "untie_embeddings_and_output_weights": (
        GPT,
        CORE,
        {"untie_embeddings_and_output_weights": True},
    ),
    "swiglu": (LLAMA, CORE, {"swiglu": False}),
    "squared_relu": (GPT, CORE, {"squared_relu": True}),
    "activation_func": (GPT, CORE, {"activation_func": "squaredrelu"}),
    "gated_linear_unit": (GPT, CORE, {"gated_linear_unit": True}),
    "openai_gelu": (GPT, LEGACY, {"openai_gelu": True}),
    "onnx_safe": (GPT, LEGACY, {"onnx_safe": True, "bias_gelu_fusion": True}),
    "bias_gelu_fusion": (GPT, CORE, {"bias_gelu_fusion": True}),
    "bias_activation_fusion": (
        GPT,
        CORE,
        {"bias_gelu_fusion": ..., "bias_activation_fusion": True},
    ),
    "use_te_activation_func": (GPT, CORE, {"use_te_activation_func": True}),
    "use_transformer_engine_op_fuser": (GPT, CORE, {"use_transformer_engine_op_fuser": True}),
    "hidden_dropout": (GPT, CORE, {"hidden_dropout": 0.5}),
    "attention_dropout": (GPT, CORE, {"attention_dropout": 0.5}),
    "init_method_std": (GPT, CORE, {"init_method_std": 0.5}),
    "num_experts": (MOE, CORE, {"num_experts": 8}),
    "num_moe_experts": (MOE, CORE, {"num_experts": ..., "num_moe_experts": 8}),
    "moe_layer_freq": (MOE, CORE, {"moe_layer_freq": [0, 1, 1, 1]}),
    "moe_router_topk": (MOE, CORE, {"moe_router_topk": 3}),
    "moe_router_pre_softmax": (MOE, CORE, {"moe_router_pre_softmax": True}),
    "moe_router_score_function": (MOE, CORE, {"moe_router_score_function": "sigmoid"}),
    "moe_router_num_groups": (MOE, CORE, {"moe_router_num_groups": 2, "moe_router_group_topk": 1}),
    "moe_router_group_topk": (MOE, CORE, {"moe_router_num_groups": 4, "moe_router_group_topk": 2}),
    "moe_router_force_load_balancing": (MOE, CORE, {"moe_router_force_load_balancing": True}),
    "moe_router_topk_scaling_factor": (MOE, CORE, {"moe_router_topk_scaling_factor": 2.5}),
    "moe_router_load_balancing_type": (MOE, CORE, {"moe_router_load_balancing_type": "sinkhorn"}),
    "moe_apply_probs_on_input": (
        MOE,
        CORE,
        {"moe_router_topk": 1, "moe_apply_probs_on_input": True},
    ),
    "multi_latent_attention": (LLAMA, CORE, {"multi_latent_attention": True}),
    "kv_lora_rank": (MLA, CORE, {"kv_lora_rank": 8}),
    "qk_head_dim": (MLA, CORE, {"qk_head_dim": 8}),
    "qk_pos_emb_head_dim": (MLA, CORE, {"qk_pos_emb_head_dim": 8}),
    "v_head_dim": (MLA, CORE, {"v_head_dim": 8}),
    "rope_type": (MLA, CORE, {**YARN, "rope_type": "yarn"}),
    "rotary_scaling_factor": (MLA, CORE, YARN),
    "original_max_position_embeddings": (
        MLA,
        CORE,
        {**YARN, "original_max_position_embeddings": 128},
    ),
    "beta_fast": (MLA, CORE, {**YARN, "beta_fast": 16.0}),
    "beta_slow": (MLA, CORE, {**YARN, "beta_slow": 2.0}),
    "mscale": (MLA, CORE, {**YARN, "mscale": 0.9}),
    "mscale_all_dim": (MLA, CORE, {**YARN, "mscale_all_dim": 0.9}),
    "window_size": (GPT, CORE, {"window_size": [2, 0]}),
    "window_attn_skip_freq": (GPT, CORE, {"window_size": [2, 0], "window_attn_skip_freq": 2}),
    "softmax_type": (GPT, CORE, {"softmax_type": "off-by-one"}),
    "qk_l2_norm": (MOE, CORE, {"qk_l2_norm": True}),
    "attention_output_gate": (LLAMA, CORE, {"attention_output_gate": True}),
    "no_rope_freq": (LLAMA, CORE, {"no_rope_freq": 2}),
    "quick_geglu": (LLAMA, CORE, {"swiglu": False, "quick_geglu": True}),
    "attn_logit_softcapping": (LLAMA, CORE, {"attn_logit_softcapping": 50.0}),
    "final_logit_softcapping": (LLAMA, CORE, {"final_logit_softcapping": 30.0}),
    "query_pre_attn_scalar": (LLAMA, CORE, {"query_pre_attn_scalar": 224}),
    "embedding_multiplier": (LLAMA, CORE, {"embedding_multiplier": 12.0}),
    "logit_multiplier": (LLAMA, CORE, {"logit_multiplier": 0.5}),
    "use_mup": (LLAMA, CORE, {"use_mup": True}),
    "mup_embedding_mult": (LLAMA, CORE, MUP | {"mup_embedding_mult": 12.0}),
    "mup_output_mult": (LLAMA, CORE, MUP | {"mup_output_mult": 0.5}),
    "mup_base_hidden_size": (LLAMA, CORE, MUP | {"mup_base_hidden_size": 4}),
    "mup_base_head_dim": (LLAMA, CORE, MUP | {"mup_base_head_dim": 64}),
    "mup_attn_scale_power": (LLAMA, CORE, MUP | {"mup_attn_scale_power": 0.7}),
    "rotary_base_local": (LLAMA, CORE, {"window_size": [2, 0], "rotary_base_local": 500.0}),
    "no_l2_norm_layers": (MOE, CORE, {"qk_l2_norm": True, "no_l2_norm_layers": [1]}),
    "gated_gelu": (LLAMA, CORE, {"swiglu": False, "gated_gelu": "geglu_tanh"}),
    CLAMP: (LLAMA, CORE, {CLAMP: 1.5}),
    "glu_linear_offset": (LLAMA, CORE, {"glu_linear_offset": 1.0}),
    "is_hybrid_model": (GPT, CORE, {"is_hybrid_model": True}),
    "hybrid_override_pattern": (HYBRID, CORE, {"hybrid_override_pattern": "MM-M"}),
    "hybrid_layer_pattern": (HYBRID, CORE, {"hybrid_layer_pattern": "M*|-*"}),
    "mamba_num_heads": (HYBRID, CORE, {"mamba_num_heads": 8}),
    "mamba_head_dim": (HYBRID, CORE, {"mamba_head_dim": 4}),
    "mamba_num_groups": (HYBRID, CORE, {"mamba_num_groups": 1, "mamba_state_dim": 6}),
    "mamba_state_dim": (HYBRID, CORE, {"mamba_state_dim": 6}),
    "mamba_min_time_step": (HYBRID, CORE, {"mamba_min_time_step": 0.5}),
    "mamba_norm_epsilon": (HYBRID, CORE, {"mamba_norm_epsilon": 0.5}),
    "heterogeneous_layers_config_path": (
        LLAMA,
        CORE,
        args_of_branches(HETEROGENEOUS),
    ),
    "heterogeneous_layers_config_encoded_json": (
        HETEROGENEOUS,
        CORE,
        {"heterogeneous_layers_config_encoded_json": json.dumps({"block_configs": []})},
    ),
}
# What the shapes say whatever args say, what other files of the room read, and what counts only
# beside another.
ELSEWHERE = set(
    """ffn_hidden_size padded_vocab_size add_bias_linear disable_bias_linear add_qkv_bias
    qk_layernorm bert_binary_head add_position_embedding embed_layernorm
    make_vocab_size_divisible_by model_parallel_size tensor_model_parallel_size bias_swiglu_fusion
    pipeline_model_parallel_size
    expert_model_parallel_size rank rope_scaling_factor transformer_impl yaml_cfg spec
    moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate
    moe_router_enable_expert_bias expert_tensor_parallel_size q_lora_rank""".split()
)


def test_every_setting_that_is_read_has_an_example():
    read = {name for name, entry in ARG_FIELDS.items() if entry.mark == "read"}
    assert set(READ) | ELSEWHERE == read


@pytest.mark.parametrize("name", READ)
def test_what_is_marked_read_makes_another_model_or_is_refused(name: str):
    config, code, change = READ[name]
    onnx = {"bias_gelu_fusion": True} if name == "onnx_safe" else {}
    before = build(config, args_for(config, **onnx), code=code).config
    try:
        after = build(config, args_for(config, **change), code=code).config
    except InputError as refusal:
        assert "here" in str(refusal)
    else:
        assert after != before


# ---- what the model never received -------------------------------------------------------------

SWITCHED_ON: dict[str, tuple[Any, str, Any]] = {
    # Name in args -> its value, the setting, and the setting's value where it is applied.
    "rotary_base": (500, "rotary_base", 500.0),
    "rotary_seq_len_interpolation_factor": (4, "rotary_seq_len_interpolation_factor", 4),
    "use_rope_scaling": (True, "rope_scaling", RopeScaling()),
    "rope_scaling_factor": (32.0, "rope_scaling", RopeScaling(factor=32.0)),
    "apply_residual_connection_post_layernorm": (
        True,
        "apply_residual_connection_post_layernorm",
        True,
    ),
}
UNRECEIVED = [
    (name, code)
    for name, entry in ARG_FIELDS.items()
    for code in entry.unreceived
    if name in SWITCHED_ON and not (name == "rope_scaling_factor" and code != CORE)
]


@pytest.mark.parametrize("name", NOT_FOR_T5)
def test_t5_is_not_given_what_gpt_is(name: str):
    """pretrain_t5.py passes no rotary setting on but the share of channels and their pairs."""
    config = dataclasses.replace(
        T5,
        position_embedding_type="rope",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
    )
    value, setting, applied = SWITCHED_ON[name]
    found = build(config, args_for(config, **{name: value}))
    assert found.config == config
    assert [line.split(",")[0] for line in found.warnings] == [f"args.{name} is {value}"]
    assert "T5 models of Megatron's core code" in found.warnings[0]
    by_hand = {"rope_scaling_factor": 8.0} if name == "use_rope_scaling" else {name: applied}
    assert getattr(build(config, args_for(config), **by_hand).config, setting) == applied or (
        name == "use_rope_scaling"
    )


@pytest.mark.parametrize(("name", "code"), UNRECEIVED)
def test_what_the_model_never_received_is_not_applied_and_said(name: str, code: RunCode):
    value, setting, applied = SWITCHED_ON[name]
    args = {name: value} | ({"use_rope_scaling": True} if name == "rope_scaling_factor" else {})
    plain = {"use_rope_scaling": True} if name == "rope_scaling_factor" else {}
    before = build(LLAMA, args_for(LLAMA, **plain), code=code).config
    found = build(LLAMA, args_for(LLAMA, **args), code=code)
    assert found.config == before
    (warning,) = found.warnings
    assert re.search(rf"args\.{name} is {value}, but .* built without it .*--set \w+=", warning)
    # The way out that it names, and the mark of files that are written here.
    by_hand = {"use_rope_scaling": {"rope_scaling_factor": 8.0}}.get(name, {name: value})
    for more, overrides in (({}, by_hand), ({"passed_to_model": [name]}, {})):
        found = build(LLAMA, args_for(LLAMA, **args, **more), code=code, **overrides)
        assert getattr(found.config, setting) == applied
        assert not found.warnings


@pytest.mark.parametrize("to", ["megatron", "torch_dist"])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rope_scaling": RopeScaling(factor=32.0)}, "rope_scaling_factor"),
        ({"rotary_seq_len_interpolation_factor": 4.0}, "rotary_seq_len_interpolation_factor"),
        ({"softmax_scale": 0.4}, None),
        ({"rope_scaling": RopeScaling()}, None),
    ],
)
def test_a_conversion_keeps_what_megatron_does_not_pass_on_and_tells(
    to: str, change: dict[str, Any], name: str | None, tmp_path: Path
):
    config = dataclasses.replace(LLAMA, **change)
    source = random_models.checkpoint(config)
    done = convert(source, to, tmp_path / "out")
    assert open_checkpoint(done.path).config == dataclasses.replace(config, params_dtype="float32")
    assert len(done.warnings) == (name is not None)
    for warning in done.warnings:
        assert warning.startswith(f"args.{name} is ") and "build the model with it" in warning


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rotary_base": 500.0}, "rotary base but 10000"),
        ({"rotary_interleaved": True}, "interleaved rotary pairs"),
        ({"rope_scaling": RopeScaling()}, "scaling of rotary frequencies"),
        ({"softmax_scale": 0.4}, "attention scale of its own"),
    ],
)
def test_legacy_names_are_not_written_for_what_legacy_models_never_received(
    change: dict[str, Any], what: str
):
    both = dataclasses.replace(LLAMA, position_embedding_type="learned_absolute+rope")
    assert choose_names(both, None) == "legacy"
    with pytest.raises(InputError, match=f"no learned and rotary.*the code before it no {what}"):
        choose_names(dataclasses.replace(both, **change), None)
    assert choose_names(dataclasses.replace(LLAMA, **change), None) == "core"


@pytest.mark.parametrize(
    ("spec", "foreign"),
    [
        (None, False),
        (["local"], False),
        (["megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec"], False),
        (["our_layers.gated", "spec"], True),
        (Stub("a", "b"), True),
    ],
)
def test_layers_from_elsewhere_are_told_of(spec: Any, foreign: bool):
    found = build(GPT, args_for(GPT, spec=spec))
    assert found.config == GPT
    assert len(found.warnings) == foreign
    assert all("(args.spec), which is no part of Megatron" in one for one in found.warnings)


def test_maximal_update_scaling_is_as_cores_config_completes_it():
    """Core 0.19: logits by 1 / width ratio unless set, scores by 1 / channels unless scaled."""
    channels, base = LLAMA.kv_channels, LLAMA.hidden_size // 4
    args = {"use_mup": True, "mup_embedding_mult": 12.0, "mup_base_hidden_size": base}
    found = build(LLAMA, args_for(LLAMA, **args)).config
    assert (found.embedding_multiplier, found.logit_multiplier) == (12.0, 0.25)
    assert found.softmax_scale == 1 / channels
    more = {"mup_output_mult": 0.5, "mup_base_head_dim": channels, "mup_attn_scale_power": 1.0}
    assert build(LLAMA, args_for(LLAMA, **args, **more)).config == dataclasses.replace(
        LLAMA, embedding_multiplier=12.0, logit_multiplier=0.5
    )
    given = build(LLAMA, args_for(LLAMA, **args, softmax_scale=0.4)).config
    assert given.softmax_scale == 0.4
    with pytest.raises(InputError, match=r"args\.mup_embedding_mult = 'x', expected a number"):
        build(LLAMA, args_for(LLAMA, **args | {"mup_embedding_mult": "x"}))


@pytest.mark.parametrize(
    "change",
    [
        {"embedding_multiplier": 12.0, "logit_multiplier": 0.5},
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "branch_layernorm": True},
        {"window_size": 2, "window_layers": (0, 2), "rotary_base_local": 500.0},
        {"activation": "geglu_tanh", "softmax_scale": 0.4, "embedding_multiplier": 3.0},
        {"activation": "geglu"},
    ],
)
def test_args_of_the_newer_layers_are_read_back(change: dict[str, Any]):
    config = dataclasses.replace(LLAMA, **change)
    args = args_for(LLAMA, swiglu=config.activation == "swiglu") | args_of_family(config)
    assert build(config, args).config == config


@pytest.mark.parametrize("kernel", ["bias_swiglu_fusion", "bias_activation_fusion"])
def test_the_fused_swiglu_neither_clamps_nor_adds(kernel: str):
    """megatron-core's kernel takes no such argument; quick-GEGLU's does."""
    change = {CLAMP: 1.5, "glu_linear_offset": 1.0}
    found = build(LLAMA, args_for(LLAMA, **change, **{kernel: True}))
    assert (found.config.activation_func_clamp_value, found.config.glu_linear_offset) == (None, 0)
    assert sum(f"args.{kernel} ignores" in warning for warning in found.warnings) == 2
    plain = build(LLAMA, args_for(LLAMA, **change, **{kernel: False})).config
    assert (plain.activation_func_clamp_value, plain.glu_linear_offset) == (1.5, 1.0)
    quick = dataclasses.replace(LLAMA, activation="quick_geglu")
    args = args_for(quick, **change, swiglu=False, quick_geglu=True, **{kernel: True})
    assert build(quick, args).config.activation_func_clamp_value == 1.5


@pytest.mark.parametrize(
    "change",
    [
        {"query_pre_attn_scalar": -4.0},
        {"query_pre_attn_scalar": float("nan")},
        MUP | {"mup_base_head_dim": -4},
        MUP | {"mup_attn_scale_power": "x"},
        MUP | {"mup_attn_scale_power": 1e9},
        {"mamba_min_time_step": "x"},
        {"mamba_norm_epsilon": [1]},
    ],
    ids=str,
)
def test_numbers_that_are_none_are_said(change: dict[str, Any]):
    config = HYBRID if any("mamba" in name for name in change) else LLAMA
    with pytest.raises(InputError, match="args."):
        build(config, args_for(config, **change))


def test_layers_without_l2_norm_are_numbers():
    with pytest.raises(InputError, match=r"args.no_l2_norm_layers = \['a'\], expected numbers"):
        build(MOE, args_for(MOE, qk_l2_norm=True, no_l2_norm_layers=["a"]))


def test_noise_on_the_routers_input_is_said():
    found = build(MOE, args_for(MOE, moe_input_jitter_eps=0.01))
    assert any("args.moe_input_jitter_eps is 0.01, noise" in text for text in found.warnings)


def test_a_bert_with_windows_is_refused():
    """megatron-core gives it a causal window in the place of its padding mask."""
    with pytest.raises(InputError, match=r"args.window_size = \[2, 0\], but is no GPT model"):
        build(BERT, args_for(BERT, window_size=[2, 0]))
    assert build(BERT, args_for(BERT, window_size=[-1, 0])).config == BERT


def test_a_legacy_model_with_interleaved_pairs_is_refused():
    args = args_for(LLAMA, rotary_interleaved=True)
    for code in (LEGACY, LEGACY_TE):
        with pytest.raises(InputError, match="rotary_interleaved, which its layers heeded"):
            build(LLAMA, args, code=code)
        found = build(LLAMA, args, code=code, rotary_interleaved=True)
        assert found.config.rotary_interleaved


def test_cores_bert_has_learned_positions_whatever_its_args_say():
    found = build(BERT, args_for(BERT, position_embedding_type="rope", rotary_base=500))
    assert found.config == BERT
    assert found.sources["position_embedding_type"] == "shapes"


# ---- activations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "args", "expected", "source"),
    [
        (CORE, {"use_te_activation_func": True}, "gelu_tanh", "args.use_te_activation_func"),
        (
            CORE,
            {"use_transformer_engine_op_fuser": True},
            "gelu_tanh",
            "args.use_transformer_engine_op_fuser",
        ),
        # Local layers have neither of TransformerEngine's.
        (
            CORE,
            {"use_te_activation_func": True, "transformer_impl": "local"},
            "gelu",
            "args.bias_gelu_fusion",
        ),
        (CORE, {"use_te_activation_func": True, "squared_relu": True}, "squared_relu", None),
        (LEGACY_TE, {}, "gelu_tanh", "TransformerEngine's GELU"),
        (LEGACY_TE, {"onnx_safe": True}, "gelu_tanh", "TransformerEngine's GELU"),
        (LEGACY_TE, {"squared_relu": True}, "gelu_tanh", "TransformerEngine's GELU"),
        (CORE, {"activation_func": "squaredrelu"}, "squared_relu", "args.activation_func"),
        # Runs of --yaml-cfg: the exact form where there are biases, whatever the fusion says.
        (
            CORE,
            {"activation_func": "gelu", "bias_activation_fusion": True, "bias_gelu_fusion": ...},
            "gelu",
            "args.activation_func",
        ),
        (
            CORE,
            {"yaml_cfg": "run.yaml", "bias_activation_fusion": True, "bias_gelu_fusion": ...},
            "gelu",
            "args.yaml_cfg",
        ),
    ],
)
def test_activations_by_transformer_engine_and_yaml(
    code: RunCode, args: dict[str, Any], expected: str, source: str | None
):
    found = build(GPT, args_for(GPT, **args), code=code)
    assert found.config.activation == expected
    assert source in (None, found.sources["activation"])
    assert not found.warnings


@pytest.mark.parametrize("value", ["silu", "quick_gelu", 3, Stub("gelu")])
def test_an_activation_that_is_not_known_is_refused_with_its_set(value: Any):
    args = args_for(GPT, activation_func=value)
    with pytest.raises(InputError, match=r"args\.activation_func = .*--set activation="):
        build(GPT, args)
    assert build(GPT, args, activation="gelu_tanh").config.activation == "gelu_tanh"


def test_a_gate_beside_another_activation_is_refused_with_its_set():
    args = args_for(LLAMA, swiglu=False, gated_linear_unit=True)
    with pytest.raises(InputError, match=r"args\.gated_linear_unit.*--set activation=swiglu"):
        build(LLAMA, args)
    assert build(LLAMA, args, activation="swiglu").config == LLAMA


# ---- what stands nowhere -----------------------------------------------------------------------


@pytest.mark.parametrize("config", [GPT, BERT], ids=["gpt", "bert"])
def test_core_names_without_args_are_not_guessed_at(config: ModelConfig):
    """The guesses for NVIDIA's releases of 2019 are for legacy names."""
    with pytest.raises(
        InputError,
        match="here does not say what num_attention_heads, activation are: no args and no shape "
        r"tells; give --set num_attention_heads=N --set activation=gelu \(exact\), gelu_tanh",
    ):
        build(config, {})
    found = build(config, {}, num_attention_heads=4, activation="gelu")
    assert found.config == config
    assert build(config, {}, code=LEGACY, num_attention_heads=4, activation="gelu").config == config


def test_all_that_a_rotary_core_model_without_args_does_not_say_is_named_at_once():
    given: dict[str, Any] = {
        "num_attention_heads": 4,
        "activation": "swiglu",
        "position_embedding_type": "rope",
        "rotary_base": 10000.0,
        "max_position_embeddings": 8,
        "layernorm_epsilon": 1e-5,
    }
    with pytest.raises(InputError) as refusal:
        build(LLAMA, {})
    for name in given:
        assert f"--set {name}=" in str(refusal.value)
        with pytest.raises(InputError, match=f"what {name} is: no args and no shape tells; give"):
            build(LLAMA, {}, **{other: value for other, value in given.items() if other != name})
    found = build(LLAMA, {}, **given)
    assert found.config == LLAMA
    (warning,) = found.warnings
    assert "rotary_percent 1, rotary_interleaved False and no scaling" in warning


def test_core_args_that_lack_the_heads_or_the_positions_are_refused():
    with pytest.raises(InputError, match="what num_attention_heads is: its args lack it and no"):
        build(GPT, args_for(GPT, num_attention_heads=...))
    with pytest.raises(InputError, match="what position_embedding_type is: its args lack it"):
        build(LLAMA, args_for(LLAMA, position_embedding_type=...))
