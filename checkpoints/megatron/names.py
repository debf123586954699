"""Parameter names of every Megatron era, mapped to the canonical ones: core's, separate norms.

One table serves all: 2019's flat GPT-2 names, v1.x (`transformer`, `attention`), v2.x to 23.06
(`encoder`, `self_attention`), `input_norm` (2023-09 on), the legacy TransformerEngine layer, and
megatron-core's local and TransformerEngine specs.
Source: docs/megatron.md, "Legacy GPT", "Legacy BERT", "megatron-core names".
"""

from __future__ import annotations

import re
from collections.abc import Collection

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.state_dict import unwrapped
from mlm_eval.checkpoints.megatron.fields import RunCode
from mlm_eval.checkpoints.parameters import (
    MAMBA_VECTORS,
    PREDICTION_NAME,
    RELATIVE_BIASES,
    TASK_HEADS,
    WORD_EMBEDDINGS,
)

# Old name of a layer's part (a prefix of the key below `layers.N.`) -> canonical name.
LAYER_ALIASES: dict[str, str] = {
    # legacy, all eras
    "input_norm.": "input_layernorm.",
    "attention.query_key_value.": "self_attention.linear_qkv.",
    "self_attention.query_key_value.": "self_attention.linear_qkv.",
    "attention.dense.": "self_attention.linear_proj.",
    "self_attention.dense.": "self_attention.linear_proj.",
    "post_attention_layernorm.": "pre_mlp_layernorm.",
    "post_attention_norm.": "pre_mlp_layernorm.",
    "mlp.dense_h_to_4h.": "mlp.linear_fc1.",
    "mlp.dense_4h_to_h.": "mlp.linear_fc2.",
    # legacy with transformer_impl=transformer_engine
    "self_attention.layernorm_qkv.layer_norm_": "input_layernorm.",
    "self_attention.layernorm_qkv.": "self_attention.linear_qkv.",
    "self_attention.proj.": "self_attention.linear_proj.",
    "layernorm_mlp.layer_norm_": "pre_mlp_layernorm.",
    "layernorm_mlp.fc1_": "mlp.linear_fc1.",
    "layernorm_mlp.fc2_": "mlp.linear_fc2.",
    # megatron-core; the TransformerEngine spec keeps each norm inside the linear that follows it
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.q_layernorm.": "self_attention.q_layernorm.",
    "self_attention.k_layernorm.": "self_attention.k_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    "self_attention.linear_q_proj.": "self_attention.linear_q_proj.",
    "self_attention.linear_q_down_proj.": "self_attention.linear_q_down_proj.",
    "self_attention.linear_q_up_proj.": "self_attention.linear_q_up_proj.",
    "self_attention.linear_kv_down_proj.": "self_attention.linear_kv_down_proj.",
    "self_attention.linear_kv_up_proj.": "self_attention.linear_kv_up_proj.",
    "mlp.router.": "mlp.router.",
    "mlp.shared_experts.linear_fc1.": "mlp.shared_experts.linear_fc1.",
    "mlp.shared_experts.linear_fc2.": "mlp.shared_experts.linear_fc2.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    # one matrix in the place of attention or MLP, with the norm before it
    "self_attention.layer_norm_": "input_layernorm.",
    "self_attention.": "self_attention.",
    "mlp.layer_norm_": "pre_mlp_layernorm.",
    "mlp.": "mlp.",
    # Mamba-2
    "mixer.in_proj.layer_norm_": "input_layernorm.",
    "norm.": "input_layernorm.",
    "mixer.in_proj.": "mixer.in_proj.",
    "mixer.conv1d.": "mixer.conv1d.",
    "mixer.norm.": "mixer.norm.",
    "mixer.out_proj.": "mixer.out_proj.",
    "pre_cross_attn_layernorm.": "pre_cross_attn_layernorm.",
    "cross_attention.linear_q.": "cross_attention.linear_q.",
    "cross_attention.linear_kv.": "cross_attention.linear_kv.",
    "cross_attention.linear_proj.": "cross_attention.linear_proj.",
    "post_self_attn_layernorm.": "pre_mlp_layernorm.",  # spring 2023
    # Megatron-Bridge's Gemma: norms of the branches' outputs
    "self_attention.linear_proj.post_layernorm.": "self_attention.linear_proj.post_layernorm.",
    "mlp.linear_fc2.post_layernorm.": "mlp.linear_fc2.post_layernorm.",
}
# Canonical names stand for themselves.
LAYER_ALIASES.update({part: part for part in LAYER_ALIASES.values()})

# Whole names below `layers.N.` that do not end with weight or bias.
LAYER_NAMES = frozenset(
    (
        "mlp.router.expert_bias",
        "mlp.shared_experts.gate_weight",
        "self_attention.core_attention.softmax_offset",
        *(f"mixer.{name}" for name in MAMBA_VECTORS),
    )
)

# An expert's matrix: numbered (local_experts.3., or TransformerEngine's weight3), or all in one.
EXPERT = re.compile(
    r"mlp\.experts\.(experts\.)?(local_experts\.)?((?P<number>\d+)\.)?"
    r"(?P<linear>linear_fc[12])\.(?P<leaf>weight|bias)(?P<glued>\d+)?"
)

# Whole keys outside the layers, after `language_model.` has been taken off.
TOP_ALIASES: dict[str, str] = {
    "word_embeddings.weight": WORD_EMBEDDINGS,
    "word_embeddings.norm.weight": "embedding.word_embeddings_layernorm.weight",
    "word_embeddings.norm.bias": "embedding.word_embeddings_layernorm.bias",
    "embedding.word_embeddings.norm.weight": "embedding.word_embeddings_layernorm.weight",
    "embedding.word_embeddings.norm.bias": "embedding.word_embeddings_layernorm.bias",
    "position_embeddings.weight": "embedding.position_embeddings.weight",
    "tokentype_embeddings.weight": "embedding.tokentype_embeddings.weight",
    "lm_head.layernorm.weight": "lm_head.layer_norm.weight",
    "lm_head.layernorm.bias": "lm_head.layer_norm.bias",
    "lm_head.norm.weight": "lm_head.layer_norm.weight",
    "lm_head.norm.bias": "lm_head.layer_norm.bias",
    "lm_head.bias": "output_layer.bias",
    "lm_head.output_layer.bias": "output_layer.bias",
    "lm_head.output_layer.weight": "output_layer.weight",
}
SECOND_NAMES = {
    "position_embeddings.weight": "embedding.position_embeddings.weight",
    "output_layer.bias": "lm_head.output_layer.bias",
    "output_layer.weight": "lm_head.output_layer.weight",
}
"""megatron-core's T5 has two modules under two names each: the second -> the first."""

TOP_NAMES = frozenset(RELATIVE_BIASES) | frozenset(
    """embedding.word_embeddings.weight embedding.word_embeddings_layernorm.weight
    embedding.word_embeddings_layernorm.bias embedding.position_embeddings.weight
    embedding.tokentype_embeddings.weight output_layer.weight output_layer.bias lm_head.dense.weight
    lm_head.dense.bias lm_head.layer_norm.weight lm_head.layer_norm.bias pooler.dense.weight
    pooler.dense.bias binary_head.weight binary_head.bias classification_head.weight
    classification_head.bias multichoice_head.weight multichoice_head.bias qa_head.weight
    qa_head.bias""".split()
)
BERT_ONLY = ("embedding.tokentype", "lm_head.", "pooler.", "binary_head.", "output_layer.bias")

LAYER = re.compile(r"(?P<block>transformer|encoder|decoder)\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")
FINAL_NORM = re.compile(
    r"(?P<block>transformer|encoder|decoder)\.(final_layernorm|final_norm)\.(?P<leaf>weight|bias)"
)
HEAD_COPY = "word_embeddings_for_head.weight"
"""The tied embedding's copy in the last pipeline stage of a legacy checkpoint."""

ADAPTERS = "unmerged adapters (LoRA)"

REFUSED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"\.experts\.\d+\.dense_", "a fork's mixture of experts"),
        (r"\.fc[12]_latent_proj\.", "a mixture of experts that work in a latent width"),
        (r"inter_attention\.", "an encoder-decoder model (T5) of Megatron's legacy code"),
        (r"\.mixer\.(x_proj|dt_proj|in_proj\.bias)", "Mamba layers of the first kind"),
        (
            r"\.self_attention\.(in_proj|conv1d|out_proj|out_norm|A_log|dt_bias)(\.|$)",
            "linear attention (a gated delta net)",
        ),
        (r"\.indexer\.", "sparse attention (DSA)"),
        (r"hyper_connection", "hyper-connections"),
        (r"(^|\.)modality_submodules\.", "a model of several modalities (MIMO)"),
        (r"\.cross_attention\.encoder\.", "a model that reads retrieved texts (RETRO)"),
        (r"linear_qkv_down_proj", "latent attention with fused down projections"),
        (
            r"(^|\.)(query_model|context_model|retriever|biencoder)\.",
            "a retrieval model (ICT, REALM)",
        ),
        (
            r"(^|\.)(vision_model|backbone|cls_token|conv1|linear_encoder|vision_projection"
            r"|class_token|mask_token|embedder|ln_pre|ln_post)(\.|$)",
            "a vision model",
        ),
        (r"(lora_|\.adapter)", ADAPTERS),
    )
)


def refuse_unsupported(keys: list[str], where: str) -> None:
    """Refuse, by name, models that are neither GPT nor BERT nor megatron-core's T5.

    Raises:
        InputError: A key belongs to a kind of model that is not supported.
    """
    for pattern, what in REFUSED:
        for key in keys:
            if pattern.search(key):
                way_out = "it reads GPT and BERT models, and T5 of megatron-core's"
                if what == ADAPTERS:
                    way_out = "merge them into the weights first, with the project that made them"
                raise InputError(
                    f"{where} holds {what} (parameter {key}), which mlm-eval does not compute; "
                    f"{way_out}"
                )
    if family_of(keys) == "t5" and not any(is_core(key) for key in keys):
        raise InputError(
            f"{where} holds an encoder-decoder model (T5) of Megatron's legacy code: it has "
            "encoder and decoder layers; mlm-eval reads T5 with megatron-core's names only"
        )


def is_ignored(key: str) -> bool:
    """Whether a key holds no weight: TransformerEngine's extra state, rotary tables."""
    return key.endswith(("_extra_state", "inv_freq")) or "._extra_state/" in key


def is_core(key: str) -> bool:
    """Whether a key is one that only megatron-core's layers have."""
    return any(part in key for part in (".linear_qkv.", ".linear_kv_up_proj.", ".mixer."))


def is_expert(key: str) -> bool:
    """Whether a key belongs to a routed expert."""
    return ".mlp.experts." in key


def is_left_out(key: str) -> bool:
    """Whether a key belongs to the heads of multi-token prediction, which the main head never sees.

    Source: docs/megatron.md, "Multi-token prediction".
    """
    return strip_prefixes(key).startswith("mtp.")


_PREDICTION_LAYER = ("transformer_layer.", "mtp_model_layer.")
"""How a head of multi-token prediction names its layer: up to core 0.16, and later."""


def prediction_name(key: str, where: str) -> str:
    """Return the canonical name of a key that belongs to a head of multi-token prediction.

    Raises:
        InputError: No GPT model has such a key.
    """
    name = strip_prefixes(key)
    match = PREDICTION_NAME.fullmatch(name)
    if match:
        for prefix in _PREDICTION_LAYER:
            rest = match["rest"].removeprefix(prefix)
            if rest != match["rest"]:
                part = canonical_name(f"decoder.layers.0.{rest}", "decoder", 0, where)
                part = part.removeprefix("decoder.layers.0.")
                return f"mtp.layers.{match['head']}.transformer_layer.{part}"
    return name


def strip_prefixes(key: str) -> str:
    """Return a flat key without what wrappers put into it, `model.` and `language_model.`."""
    return unwrapped(key).removeprefix("model.").removeprefix("language_model.")


def _top_name(key: str) -> str:
    """Return the canonical name of what stands outside the layers, other keys without prefixes."""
    name = strip_prefixes(key)
    return TOP_ALIASES.get(name, name)


def block_of(family: str) -> str | None:
    """Return the canonical prefix of a family's layers; None where it is the keys' own (T5)."""
    return {"gpt": "decoder", "bert": "encoder"}.get(family)


def without_second_names(keys: Collection[str], family: str) -> set[str]:
    """Return the keys but those of a T5 that name a parameter again, under a second name."""
    if family != "t5":
        return set(keys)
    found = {strip_prefixes(key) for key in keys}
    return {key for key in keys if SECOND_NAMES.get(strip_prefixes(key)) not in found}


def canonical_name(key: str, block: str | None, layer_offset: int, where: str) -> str:
    """Return the canonical name of a flat Megatron key.

    Args:
        key: Key below `model`, joined by dots.
        block: `decoder` (GPT) or `encoder` (BERT); None: the key's own (T5).
        layer_offset: Global index of the file's layer 0 (pipeline stages count from 0).
        where: The file, for messages.

    Raises:
        InputError: No model that is read has such a key.
    """
    name = _top_name(key)
    if name in TOP_NAMES:
        return name
    if match := FINAL_NORM.fullmatch(name):
        return f"{block or match['block']}.final_layernorm.{match['leaf']}"
    if match := LAYER.fullmatch(name):
        layer = f"{block or match['block']}.layers.{int(match['layer']) + layer_offset}."
        if match["rest"] in LAYER_NAMES:
            return layer + match["rest"]
        if expert := EXPERT.fullmatch(match["rest"]):
            number = expert["number"] or expert["glued"]
            numbered = f"{number}." if number else ""
            return f"{layer}mlp.experts.{numbered}{expert['linear']}.{expert['leaf']}"
        # The longest prefix wins: the norm inside a linear comes before the linear.
        for old in sorted(LAYER_ALIASES, key=len, reverse=True):
            leaf = match["rest"].removeprefix(old)
            if leaf != match["rest"] and leaf in ("weight", "bias"):
                return f"{layer}{LAYER_ALIASES[old]}{leaf}"
    raise InputError(
        f"{where} has a parameter that no GPT, BERT or T5 model of Megatron-LM has: {key}; "
        "mlm-eval would compute something else than the model did, so it stops here"
    )


def family_of(keys: list[str]) -> str:
    """Return `t5` where there are layers of both stacks, else `bert` or `gpt`.

    Some parameters only BERT has.
    """
    if {"encoder", "decoder"} <= {match["block"] for key in keys if (match := LAYER.search(key))}:
        return "t5"
    bert = any(
        _top_name(key).startswith(BERT_ONLY + TASK_HEADS) or key.startswith("encoder.layers")
        for key in keys
    )
    return "bert" if bert else "gpt"


def run_code(keys: list[str]) -> RunCode:
    """Return whose layers a run was made of: each named its QKV projection in its own way."""
    if any(is_core(key) for key in keys):
        return "core"
    if any(".layernorm_qkv." in key for key in keys):
        return "legacy with TransformerEngine"
    return "legacy"
