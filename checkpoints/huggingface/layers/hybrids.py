"""Which layer of a hybrid is of which kind: config.json's list and pattern, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.families.family import Family
from mlm_eval.checkpoints.huggingface.reader import DEFAULT, HubConfigReader

_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_OLDER = {"mamba": "linear_attention", "attention": "full_attention"}
_WITHOUT_LIST = ["linear_attention", "moe", "full_attention", "mlp"]
"""What transformers takes where the file says nothing."""

_OF_EXPERTS = {
    "num_experts": 0,
    "moe_router_topk": 0,
    "moe_ffn_hidden_size": 0,
    "moe_shared_expert_intermediate_size": 0,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
}
_OF_MAMBA = {
    "mamba_num_heads": 0,
    "mamba_head_dim": 0,
    "mamba_num_groups": 0,
    "mamba_state_dim": 0,
    "mamba_conv_width": 0,
    "mamba_min_time_step": 0.0,
}
"""Settings of parts that a model may lack, with their values where it does."""

_SIZES_OF_EXPERTS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "n_group",
    "topk_group",
)
_SIZES_OF_MAMBA = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel")


_OLDER_NAMES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}


def with_current_names(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json under today's names.

    Where a file has both, the older name wins, as in transformers. NVIDIA's own code called
    head_dim attention_head_dim, which transformers does not know.
    """
    renamed = {key: value for key, value in hf.items() if key not in _OLDER_NAMES}
    renamed |= {new: hf[old] for old, new in _OLDER_NAMES.items() if old in hf}
    own = renamed.pop("attention_head_dim", None)
    if own is not None:
        renamed.setdefault("head_dim", own)
    return renamed


def read_hybrid(r: HubConfigReader, family: Family) -> bool:
    """Take each layer's kind; return whether there are experts, whose settings are still to come.

    Raises:
        InputError: A layer is of no kind that transformers has.
    """
    if not family.hybrid:
        return True
    window, positions = r.look("sliding_window", "int")[0], r.values["max_position_embeddings"]
    if window is not None and window < positions:
        raise InputError(
            f"{r.where} describes a model with a sliding window (sliding_window is {window}), "
            f"which mlm-eval does not compute for {family.model_type} models"
        )
    kinds, source = _kinds(r)
    r.set("num_layers", len(kinds), source)
    for name, those in (
        ("mamba_layers", ("linear_attention",)),
        ("no_mixer_layers", ("mlp", "moe")),
        ("no_mlp_layers", ("linear_attention", "full_attention")),
        ("moe_layers", ("moe",)),
    ):
        r.set(name, tuple(n for n, kind in enumerate(kinds) if kind in those), source)
    mamba, experts = "linear_attention" in kinds, "moe" in kinds
    for there, settings in ((mamba, _OF_MAMBA), (experts, _OF_EXPERTS)):
        for name, value in settings.items():
            if not there:
                r.set(name, value, "no layer has it")
    epsilon = r.values["layernorm_epsilon"]
    if mamba and epsilon != 1e-5:
        r.set("mamba_norm_epsilon", epsilon, "config.json layer_norm_epsilon")
    return experts


def _kinds(r: HubConfigReader) -> tuple[list[str], str]:
    for key in ("layer_types", "layers_block_type"):
        stated = r.hf.get(key)
        if stated is not None:
            found = stated if isinstance(stated, list) else [None]
            kinds = [_OLDER.get(kind, kind) if isinstance(kind, str) else "" for kind in found]
            break
    else:
        key, stated = "hybrid_override_pattern", r.hf.get("hybrid_override_pattern")
        if stated is None:
            return _WITHOUT_LIST, DEFAULT
        kinds = [_LETTERS.get(letter, "") for letter in str(stated)]
    if not kinds or not set(kinds) <= set(_LETTERS.values()):
        raise InputError(
            f"{r.where}: {key} is {stated!r}, expected for each layer one of "
            f"{', '.join(_LETTERS.values())} ({', '.join(_LETTERS)} in a pattern)"
        )
    return kinds, f"config.json {key}"


def sparse_layers_of_hybrid(r: HubConfigReader) -> tuple[tuple[int, ...], str]:
    """Return the layers that have experts, and where that is said."""
    return r.values["moe_layers"], r.sources["moe_layers"]


def write_hybrid(c: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the keys that say each layer's kind, and what transformers wants besides."""
    if not family.hybrid:
        return {}
    kinds = [_kind(c, layer) for layer in range(c.num_layers)]
    letters = {kind: letter for letter, kind in _LETTERS.items()}
    hf: dict[str, Any] = {
        "layers_block_type": kinds,
        "hybrid_override_pattern": "".join(letters[kind] for kind in kinds),
        "num_hidden_layers": c.num_layers,
        "sliding_window": None,
    }
    # Sizes of parts that no layer has must be numbers all the same.
    if not c.num_experts:
        hf |= dict.fromkeys(_SIZES_OF_EXPERTS, 1)
    if not c.mamba_layers:
        hf |= dict.fromkeys(_SIZES_OF_MAMBA, 1)
    return hf


def _kind(c: ModelConfig, layer: int) -> str:
    kind = {"experts": "moe", "plain MLP": "mlp"}.get(c.feed_forward(layer))
    return kind or {"mamba": "linear_attention"}.get(c.mixer(layer), "full_attention")


def why_no_hybrid(c: ModelConfig) -> str:
    """Return what NemotronH lacks of a model with Mamba layers, or layers of one branch."""
    pairs = {(c.mixer(layer), c.feed_forward(layer)) for layer in range(c.num_layers)}
    known = {
        ("mamba", "none"),
        ("attention", "none"),
        ("none", "plain MLP"),
        ("none", "experts"),
    }
    faults = {
        "each of its layers has one branch": not pairs <= known,
        "its layers are equally wide": bool(c.layer_query_groups or c.layer_ffn_hidden_sizes),
        "it has RMSNorm": c.normalization != "RMSNorm",
        "it has no positions": c.position_embedding_type != "none",
        "it has no biases": c.add_bias_linear or c.add_qkv_bias or c.moe_router_bias,
        "it has no norms of queries and keys": c.qk_layernorm,
        "its experts' scores are sigmoids, with a bias": bool(c.num_experts)
        and (
            c.moe_router_score_function != "sigmoid"
            or not c.moe_router_enable_expert_bias
            or not c.moe_shared_expert_intermediate_size
            or c.moe_shared_expert_gate
        ),
    }
    return next((what for what, lacks in faults.items() if lacks), "")
