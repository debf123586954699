"""The tables of config.json's keys hold all that transformers' classes and code know."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import inspect
from typing import Any

import pytest

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.config import read_config, write_config
from mlm_eval.checkpoints.huggingface.families import FAMILIES
from mlm_eval.checkpoints.huggingface.families.family import Family
from mlm_eval.checkpoints.huggingface.fields import Field, Use
from mlm_eval.checkpoints.huggingface.reader import Found, HubConfigReader

FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
MODEL_CODE = ("transformers.utils.output_capturing",)
"""Generic code that reads the config of every model."""
CAUSAL_CODE = ("transformers.masking_utils", "transformers.cache_utils")
ROTARY_CODE = ("transformers.modeling_rope_utils",)


def config_class(family: Family) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[family.model_type]


def small(family: Family, **changes: Any) -> dict[str, Any]:
    """A config.json of two layers, with the keys that the family's table has."""
    sizes = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 48,
        "max_position_embeddings": 24,
        "num_experts": 8,
        "moe_router_topk": 4,
        "moe_ffn_hidden_size": 16,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_head_dim": 6,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 8,
    }
    if family.latent:
        sizes["num_query_groups"] = 4
    if family.windows == "chunks":
        sizes["moe_router_topk"] = 1
    hf = {row.key: sizes[row.setting] for row in family.fields if row.setting in sizes}
    if "use_parallel_residual" in family.table:
        hf["use_parallel_residual"] = False
    if "n_group" in family.table:
        hf |= {"n_group": 4, "topk_group": 2}
    if "first_k_dense_replace" in family.table:
        hf["first_k_dense_replace"] = 1
    return {"model_type": family.model_type, **hf, **changes}


def read(family: Family, hf: dict[str, Any], **overrides: Any) -> HubConfigReader:
    heads: dict[str, Any] = {"lm_head": True, "num_tokentypes": 2} if family.kind == "bert" else {}
    return read_config(
        hf,
        family,
        found=Found(40, "float32", heads=heads),
        overrides=overrides,
        where="config.json",
    )


def names_read(source: str) -> set[str]:
    """The attributes that code reads off something named config, also by getattr and hasattr."""

    def is_config(node: ast.expr) -> bool:
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        return name == "config" or name.endswith("_config")

    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            names.add(node.attr)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") in ("getattr", "hasattr")
            and is_config(node.args[0])
            and isinstance(node.args[1], ast.Constant)
        ):
            names.add(str(node.args[1].value))
    return names


@FAMILY
def test_every_field_of_the_config_class_stands_in_the_table(family: Family) -> None:
    theirs = {row.name for row in dataclasses.fields(config_class(family))}
    assert len(theirs) > 20
    assert sorted(theirs - set(family.table)) == []


@FAMILY
def test_other_names_of_fields_are_read_too(family: Family) -> None:
    aliases = {alias: row.key for row in family.fields for alias in row.aliases}
    in_code = {"bloom": {"n_embed": "hidden_size"}}.get(family.model_type, {})
    assert aliases == config_class(family).attribute_map | in_code


@pytest.mark.long
@FAMILY
def test_every_name_that_modeling_code_reads_stands_in_the_table(family: Family) -> None:
    theirs = config_class(family)
    module = theirs.__module__.replace("configuration_", "modeling_")
    generic = [*MODEL_CODE]
    if family.kind == "gpt":
        generic += CAUSAL_CODE
    if "rope_parameters" in family.table:
        generic += ROTARY_CODE
    from transformers.utils.generic import merge_with_config_defaults

    names = names_read(inspect.getsource(merge_with_config_defaults))
    for name in (module, *generic):
        names |= names_read(inspect.getsource(importlib.import_module(name)))
    assert {"hidden_size", "vocab_size", "hidden_dropout"} & names
    own = {name for name in names if not hasattr(theirs, name)}  # not its methods and constants
    fields = {row.name for row in dataclasses.fields(theirs)}
    assert sorted((own | (names & fields)) - set(family.table)) == []


@FAMILY
def test_generation_settings_stand_in_the_table(family: Family) -> None:
    from transformers import GenerationConfig

    assert sorted(set(GenerationConfig._get_default_generation_params()) - set(family.table)) == []


@FAMILY
def test_absent_keys_have_the_defaults_of_the_config_class(family: Family) -> None:
    defaults = {
        row.name: row.default
        for row in dataclasses.fields(config_class(family))
        if row.default is not dataclasses.MISSING
    }
    decisive = [
        row
        for row in family.table.values()
        if row.use in (Use.READ, Use.REFUSED) and row.key in defaults and row.key != "vocab_size"
    ]
    assert len(decisive) > 10
    assert {row.key: row.default for row in decisive} == {
        row.key: defaults[row.key] for row in decisive
    }


REFUSED = [
    (family, row)
    for family in FAMILIES.values()
    for row in family.table.values()
    if row.use is Use.REFUSED
]


@pytest.mark.parametrize(
    ("family", "row"), REFUSED, ids=[f"{family.model_type}-{row.key}" for family, row in REFUSED]
)
def test_what_changes_the_function_is_refused_by_its_name(family: Family, row: Field) -> None:
    for value in row.harmless:
        read(family, small(family, **{row.key: value}))
    other: Any = not row.harmless[0] if isinstance(row.harmless[0], bool) else {"0": [1]}
    with pytest.raises(InputError, match=rf"\({row.key} is .*, which mlm-eval does not compute"):
        read(family, small(family, **{row.key: other}))


@FAMILY
def test_each_key_says_why(family: Family) -> None:
    assert all(row.reason for row in family.table.values())
    assert all(row.harmless for row in family.table.values() if row.use is Use.REFUSED)
    settings = [row.setting for row in family.fields if row.setting]
    assert len(set(settings)) == len(settings)


def no_window(family: Family) -> dict[str, Any]:
    """Return a window of all positions, which is none; Llama 4 refuses the key."""
    return {} if family.windows == "chunks" else {"sliding_window": 24}


HONEST = {
    "_name_or_path": "./model",
    "architectures": None,
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": None,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "pruned_heads": {},
    "quantization_config": None,
    "output_past": True,
    "gradient_checkpointing": False,
    "max_length": 20,
}
"""What honest files carry besides the model's settings."""


@FAMILY
def test_an_honest_file_is_read_without_a_word(family: Family) -> None:
    hf = small(family, **HONEST)
    hf["architectures"] = [family.model_class + ("ForMaskedLM" if family.kind == "bert" else "")]
    assert read(family, hf).warnings == []


@FAMILY
def test_a_key_of_no_table_is_listed(family: Family) -> None:
    hf = small(family, residual_multiplier=50.0, curated_by="us", **no_window(family))
    [warning] = read(family, hf).warnings[-1:]
    assert "curated_by, residual_multiplier" in warning and family.model_type in warning
    assert "use_cache" not in warning


@FAMILY
def test_code_of_the_models_own_is_named(family: Family) -> None:
    hf = small(family, auto_map={"AutoModel": "modeling.Other"}, architectures=["OtherForCausalLM"])
    warnings = "; ".join(read(family, hf).warnings)
    assert "auto_map" in warning_about(warnings, "auto_map")
    assert "the class OtherForCausalLM" in warnings


def warning_about(warnings: str, what: str) -> str:
    return next(part for part in warnings.split("; ") if what in part)


def test_names_of_transformers_own_attributes_win(tmp_path: Any) -> None:
    """GPT-2's n_head is num_attention_heads elsewhere; where a file has both, the latter wins."""
    family = FAMILIES["gpt2"]
    config = read(family, small(family, num_attention_heads=2, max_position_embeddings=16)).config
    theirs = config_class(family)(**small(family, num_attention_heads=2))
    assert config.num_attention_heads == theirs.num_attention_heads == 2
    assert config.max_position_embeddings == 16 and config.kv_channels == 16


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("changes", "overrides", "expected"),
    [
        ({ORIGINAL: 8, "rope_scaling": LLAMA3 | {ORIGINAL: 16}}, {}, 8),
        ({ORIGINAL: 8, "rope_parameters": LLAMA3}, {}, 8),
        ({"rope_scaling": LLAMA3 | {ORIGINAL: 16}}, {}, 16),
        ({"rope_scaling": LLAMA3}, {}, 24),
        ({"rope_scaling": LLAMA3}, {"max_position_embeddings": 6}, 24),
        ({"rope_scaling": LLAMA3, "sliding_window": 6}, {}, 24),
    ],
)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "starcoder2", "gpt_neox"])
def test_the_original_length_is_the_files(
    name: str, changes: dict[str, Any], overrides: dict[str, Any], expected: int
) -> None:
    """Neither a window nor a limit of the length makes another function of Llama-3's scaling."""
    family = FAMILIES[name]
    hf = small(family, **{"sliding_window": None} | changes)
    scaling = read(family, hf, **overrides).config.rope_scaling
    theirs = config_class(family)(**copy.deepcopy(hf))  # it writes into what it gets
    theirs.standardize_rope_params()  # as the rotary embedding does when the model is made
    assert scaling is not None
    assert scaling.original_max_position == theirs.rope_parameters[ORIGINAL] == expected


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "type linear but has no factor"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "has no low_freq_factor",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 1, "attention_factor": 2}},
            "attention_factor is 2.0 with a factor of 1",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2, ORIGINAL: 0}},
            "original_max_position_embeddings is 0",
        ),
        (
            "llama",
            {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2}},
            "rotary_base is 1.0, but YaRN",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": -1}},
            "yarn beta_slow is -1",
        ),
        ("llama", {"hidden_act": None}, "hidden_act is None, expected a value of type str"),
        ("llama", {"attention_bias": None}, "attention_bias is None"),
        ("stablelm", {"head_dim": 4}, "head_dim is 4, but hidden size / heads is 8"),
        ("gpt_neox", {"head_dim": 16}, "head_dim is 16"),
        ("gpt_neox", {"rope_theta": 500, "rotary_emb_base": 99}, "rotary_emb_base is 99.0"),
        ("gpt_neox", {"partial_rotary_factor": 1.0}, "rotary_pct is 0.25"),
        ("llama", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types is"),
        ("llama", {"layer_types": ["full_attention"]}, "layer_types is"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types is"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("mistral", {"sliding_window": 1}, "sliding_window is 1, expected at least 2 positions"),
        ("llama", {"sliding_window": 0}, "sliding_window is 0"),
        ("gemma2", {"sliding_window": None}, "layer_types is .*but sliding_window is null"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0"),
        ("llama4_text", {"num_experts_per_tok": 2}, "num_experts_per_tok is 2"),
        ("llama4_text", {"no_rope_layers": [1]}, "no_rope_layers is .1., expected 0 or 1"),
        ("llama4_text", {"moe_layers": "all"}, "moe_layers is 'all'"),
        ("llama4_text", {"interleave_moe_layer_step": 0}, "interleave_moe_layer_step is 0"),
        ("llama4_text", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ("llama4_text", {"attention_chunk_size": 0}, "attention_chunk_size is 0"),
        ("llama4_text", {"layer_types": ["sliding_attention"] * 2}, "layer_types is"),
        ("llama4_text", {"attn_temperature_tuning": "x"}, "attn_temperature_tuning is 'x'"),
        (
            "llama4_text",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "YaRN .in rope_parameters. before an L2 norm",
        ),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "full_attention"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "full_attention is 3"),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "older key type"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "of sliding_attention .in rope_parameters. are scaled .factor",
        ),
        ("gpt2", {"sliding_window": 6}, "sliding_window is 6.*not compute for gpt2"),
        ("mistral", {"sliding_window": "all"}, "sliding_window is 'all'"),
    ],
)
def test_contradictions_are_refused_by_name(
    name: str, changes: dict[str, Any], message: str
) -> None:
    family = FAMILIES[name]
    with pytest.raises(InputError, match=message):
        read(family, small(family, **changes))


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"num_layers": 2}, (2, 2)),
        ({"num_layers": 2, "num_decoder_layers": 3}, (2, 3)),
        ({"num_hidden_layers": 2}, (2, 6)),
        ({"num_hidden_layers": 2, "num_decoder_layers": None}, (2, 6)),
        ({"num_hidden_layers": 2, "num_layers": 4}, (2, 4)),
        ({"num_hidden_layers": 2, "num_decoder_layers": 3}, (2, 3)),
    ],
)
def test_stacks_of_t5_have_the_layers_that_transformers_gives_them(
    keys: dict[str, int], layers: tuple[int, int]
) -> None:
    from transformers import T5Config

    theirs = T5Config(**keys)
    assert (theirs.num_layers, theirs.num_decoder_layers) == layers
    ours = read(FAMILIES["t5"], {"model_type": "t5", **keys}).values
    assert (ours["num_layers"], ours["decoder_num_layers"]) == layers


@pytest.mark.parametrize(
    ("name", "changes", "layers"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, (1,)),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}, ()),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None}, ()),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 0}, ()),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 6,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            (1,),
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 6,
                "max_window_layers": 0,
                "layer_types": ["full_attention"] * 2,
            },
            (),
        ),
        ("mistral", {}, ()),
        ("mistral", {"sliding_window": 24}, ()),
        ("mistral", {"sliding_window": 23}, (0, 1)),
        ("mistral", {"sliding_window": 6, "layer_types": ["full_attention"] * 2}, (0, 1)),
        ("gemma2", {"sliding_window": 6}, (0,)),
        ("gemma3_text", {"sliding_window": 6}, (0, 1)),
        ("gemma3_text", {"sliding_window": 6, "sliding_window_pattern": 2}, (0,)),
    ],
)
def test_which_layers_have_a_window(
    name: str, changes: dict[str, Any], layers: tuple[int, ...]
) -> None:
    """Their number counts the query itself; a window of all positions is none."""
    family = FAMILIES[name]
    built = read(family, small(family, **changes))
    assert built.config.window_layers == layers
    assert built.config.window_size == (changes["sliding_window"] - 1 if layers else 0)
    assert built.config.max_position_embeddings == 24 and not built.warnings


def test_positions_end_where_a_window_begins_that_no_layer_computes() -> None:
    """Llama has no windows in transformers, but its cache heeds the key."""
    built = read(FAMILIES["llama"], small(FAMILIES["llama"], sliding_window=6))
    assert built.config.max_position_embeddings == 6 and not built.config.window_layers
    assert any("window of 6" in warning for warning in built.warnings)


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({}, 24),
        ({"attention_chunk_size": 10}, 10),
        ({"attention_chunk_size": 10, "no_rope_layers": [0, 0]}, 24),
        ({"floor_scale": 10}, 24),
        ({"floor_scale": 10, "no_rope_layers": [1, 0]}, 9),
        ({"floor_scale": 10, "no_rope_layers": [1, 0], "attn_temperature_tuning": False}, 24),
        ({"floor_scale": 10, "no_rope_layers": [1, 0], "attn_scale": 0.0}, 24),
    ],
)
def test_positions_of_llama_4_end_where_chunks_or_temperatures_begin(
    changes: dict[str, Any], positions: int
) -> None:
    built = read(FAMILIES["llama4_text"], small(FAMILIES["llama4_text"], **changes))
    assert built.config.max_position_embeddings == positions
    assert len(built.warnings) == (positions < 24)
    if positions < 24:
        with pytest.raises(InputError, match=f"max_position_embeddings={positions} or less"):
            hf = small(FAMILIES["llama4_text"], **changes)
            read(FAMILIES["llama4_text"], hf, max_position_embeddings=24)


def test_gemma_3_has_two_rotary_bases() -> None:
    """As its config class completes them, from files of transformers 4 and 5."""
    family = FAMILIES["gemma3_text"]
    linear = {"rope_type": "linear", "factor": 8.0}
    new = {
        "full_attention": linear | {"rope_theta": 900.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    old = {"rope_scaling": linear, "rope_theta": 900.0, "rope_local_base_freq": 50.0}
    for changes, expected in (
        ({}, (1e6, 1e4, None)),
        (old, (900.0, 50.0, 8.0)),
        ({"rope_parameters": new}, (900.0, 50.0, 8.0)),
        ({"rope_scaling": linear}, (1e6, 1e4, 8.0)),
        ({"layer_types": ["full_attention"] * 2}, (1e6, None, None)),
    ):
        config = read(family, small(family, **changes)).config
        factor = config.rotary_seq_len_interpolation_factor
        assert (config.rotary_base, config.rotary_base_local, factor) == expected, changes


LATER_KEYS = {
    "t5": {"n_positions": 512, "output_past": True, "num_decoder_layers": 2, "prefix": ""},
    "mt5": {"tokenizer_class": "T5Tokenizer", "tie_word_embeddings": False, "d_kv": 64},
    "gpt2": {"n_ctx": 1024, "n_special": 0, "predict_special_tokens": True, "_num_labels": 1},
    "llama": {"pretraining_tp": 1, "max_sequence_length": 2048, "rope_scaling": None},
    "mistral": {"sliding_window": None, "head_dim": 8, "rope_theta": 1000000.0},
    "qwen2": {"use_sliding_window": False, "sliding_window": 131072, "use_mrope": False},
    "qwen3": {"max_window_layers": 28, "sliding_window": None, "rope_scaling": None},
    "stablelm": {"partial_rotary_factor": 0.25, "qk_layernorm": False, "rope_theta": 10000},
    "starcoder2": {
        "mlp_type": "default",
        "norm_type": "layer_norm",
        "scale_attn_weights": True,
        "attention_softmax_in_fp32": True,
        "layer_norm_epsilon": 1e-05,
        "activation_function": "gelu",
    },
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25, "rope_theta": 10000},
    "bloom": {
        **{"n_embed": 32, "n_inner": None, "offset_alibi": 100, "pretraining_tp": 4},
        **{"bias_dropout_fusion": True, "masked_softmax_fusion": True, "skip_bias_add": True},
        **{"attention_softmax_in_fp32": True, "skip_bias_add_qkv": False, "unk_token_id": 0},
    },
    "gemma": {"hidden_activation": None, "rope_scaling": None, "rope_theta": 10000.0},
    "gemma2": {
        "hidden_act": "gelu_pytorch_tanh",
        "cache_implementation": "hybrid",
        "attn_logit_softcapping": 50.0,
        "rope_theta": 10000.0,
    },
    "gemma3_text": {
        "cache_implementation": "hybrid",
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window_pattern": 6,
    },
    "gpt_oss": {
        "experts_per_token": 4,
        "initial_context_length": 4096,
        "quantization_config": {"quant_method": "mxfp4"},
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "router_aux_loss_coef": 0.9,
    },
    "mixtral": {"output_router_logits": False, "router_aux_loss_coef": 0.02, "rope_theta": 1e6},
    "qwen2_moe": {
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "qkv_bias": True,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    },
    "qwen3_moe": {
        "head_dim": 8,
        "norm_topk_prob": True,
        "max_window_layers": 48,
        "sliding_window": None,
        "rope_scaling": None,
    },
    "deepseek_v2": {
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "pretraining_tp": 1,
        "scoring_func": "softmax",
        "seq_aux": True,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": {
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "qk_head_dim": 10,
        "head_dim": 4,
        "rope_interleave": True,
    },
    "llama4_text": {
        "attn_temperature_tuning": True,
        "cache_implementation": "static",
        "floor_scale": 8192,
        "for_llm_compression": False,
        "interleave_moe_layer_step": 1,
        "moe_layers": None,
        "no_rope_layers": [],
        "router_jitter_noise": 0.0,
    },
    "nemotron_h": {
        "attention_bias": False,
        "attention_head_dim": 8,
        "chunk_size": 128,
        "expand": 2,
        "hybrid_override_pattern": "M-*",
        "layers_block_type": None,
        "mamba_hidden_act": "silu",
        "num_hidden_layers": 3,
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "time_step_limit": [0.0, None],
        "use_mamba_kernels": True,
    },
    "megatron-bert": {"position_embedding_type": "absolute"},
    "bert": {"directionality": "bidi", "pooler_type": "first_token_transform"},
}
"""Keys of each family's best known files on the Hub, besides the settings."""


@FAMILY
def test_the_best_known_files_are_read_without_a_word(family: Family) -> None:
    assert read(family, small(family, **LATER_KEYS[family.model_type])).warnings == []


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"rope_scaling": {"type": "default", "factor": 2.0}}, "factor is not read"),
        ({"rope_scaling": {"type": "linear", "factor": 2, ORIGINAL: 8}}, f"{ORIGINAL} is not read"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
            },
            "they differ in rope_theta",
        ),
    ],
)
def test_rotary_settings_that_lose_are_named(changes: dict[str, Any], warning: str) -> None:
    family = FAMILIES["llama"]
    [found] = read(family, small(family, **changes)).warnings
    assert warning in found


NONSENSE = [
    ("x", -1, {"a": {}}),
    pytest.param((1.5, True, [], [{}], {"rope_type": ["linear"]}), marks=pytest.mark.long),
]


@pytest.mark.parametrize("values", NONSENSE, ids=["usual", "more"])
@FAMILY
def test_nonsense_is_one_sentence(family: Family, values: tuple[Any, ...]) -> None:
    """A value of another type ends in an InputError, or changes nothing."""
    for key in family.table:
        for value in values:
            hf = small(family, **{key: value})
            try:
                read(family, hf)
            except InputError as error:
                assert key in str(error) or key in ROTARY_NAMES, (key, value, str(error))


ROTARY_NAMES = {"rope_parameters", "rope_scaling"}
"""Their parts are named, not they."""


@FAMILY
def test_what_is_written_states_every_key_that_decides(family: Family) -> None:
    built = read(family, small(family, **no_window(family)))
    name = family.model_class + ("ForMaskedLM" if family.kind == "bert" else "")
    hf = write_config(built.config, family, name, switches=built.switches)
    fields = {row.name for row in dataclasses.fields(config_class(family))}
    decisive = {
        row.key
        for row in family.table.values()
        if row.use is Use.READ or (row.use is Use.REFUSED and row.default is not None)
    }
    unsaid = (decisive & fields) - set(hf)
    # layer_types follows from use_sliding_window; an encoder and a decoder are no such class.
    assert unsaid <= {"layer_types", "is_encoder_decoder"}
    again = read(family, hf)
    assert again.warnings == []
    assert again.config == built.config
