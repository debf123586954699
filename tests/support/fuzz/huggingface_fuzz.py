"""Random config.json files of every family, as transformers and hands write them, and their models.

A case is a number: the same one gives the same file, weights and tokens everywhere. Values that
change the function in a way that is not computed are rare, so that most cases are read.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.families import FAMILIES
from mlm_eval.checkpoints.huggingface.families.family import Family
from mlm_eval.checkpoints.huggingface.families.t5 import ACTIVATIONS_OF_T5
from mlm_eval.checkpoints.huggingface.fields import GATED, GELU, Use
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.engine.plain_transformers import transformers_outputs
from mlm_eval.engine.verify import outputs
from support.huggingface_models import BERT_MODELS, randomize

READ, REFUSED, UNLOADABLE = "read", "refused", "transformers does not load it"
TOLERANCE = 1e-4
"""Of the outputs' largest value; rounding of these sizes stays below 2e-5."""
GEMMAS = ("gemma", "gemma2", "gemma3_text")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")
RMS = ("llama", "mistral", "qwen2", "qwen3", "gpt_oss", "llama4_text", *GEMMAS, *MIXTURES)


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    seed: int
    family: str
    result: str
    gap: float = 0.0
    """The largest difference of an output, as a share of the largest value."""
    why: str = ""
    """The message of a refusal."""
    config: str = ""
    """config.json."""


class Draw:
    """Chances and choices of one case."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def one_of(self, *values: Any) -> Any:
        return self.random.choice(values)

    def mostly(self, usual: Any, *rare: Any, share: float = 0.03) -> Any:
        return self.one_of(*rare) if self.chance(share) else usual


def model_class(draw: Draw, family: Family) -> str:
    if family.kind != "bert":
        return family.model_class
    names = [name for name in BERT_MODELS if name.startswith(family.model_class)]
    return str(draw.one_of(*names))


def draw_config(draw: Draw, family: Family) -> dict[str, Any]:
    """Return a config.json: sizes, then what its family reads, then what any file may carry."""
    heads = draw.one_of(1, 2, 3, 4, 6, 8)
    head = draw.one_of(4, 8, 12, 16, 20)
    hf: dict[str, Any] = {
        "model_type": family.model_type,
        "vocab_size": draw.one_of(37, 64, 101),
    }
    positions = draw.one_of(17, 32, 40)
    if family.model_type == "gpt2":
        hf |= _gpt2(draw, heads, head, positions)
    elif family.model_type == "bloom":
        hf |= _bloom(draw, heads, head, positions)
    elif family.hybrid:
        hf |= _hybrid(draw, heads, head, positions)
    elif family.kind == "bert":
        hf |= _bert(draw, heads, head, positions)
    elif family.kind == "t5":
        hf |= _t5(draw, family, heads, head, positions)
    else:
        hf |= _llama_like(draw, family, heads, head, positions)
        if family.model_type in MIXTURES:
            hf |= _mixture(draw, family, hf)
        channels = hf["qk_rope_head_dim"] if family.latent else hf.get("head_dim") or head
        rotary = _rotary(draw, family, channels)
        hf |= rotary if family.local_theta is None else _two_bases(draw, rotary)
    for row in family.table.values():
        if row.use is Use.REFUSED and row.key not in hf:
            if draw.chance(0.05):
                hf[row.key] = draw.one_of(*row.harmless)
            elif draw.chance(0.005):
                hf[row.key] = not row.harmless[0] if row.harmless[0] in (True, False) else {"0": {}}
        elif "drop" in row.key and row.key not in hf and draw.chance(0.1):
            hf[row.key] = draw.one_of(0.0, 0.3)
        elif row.use in (Use.NUMERICS, Use.METADATA) and row.key in HARMLESS and draw.chance(0.05):
            hf[row.key] = draw.one_of(*HARMLESS[row.key])
    if draw.chance(0.1):
        hf["a_key_of_our_own"] = draw.one_of(None, 3, "text", {"a": 1})
    if draw.chance(0.2):
        hf["tie_word_embeddings"] = draw.one_of(True, False)
    return hf


HARMLESS: dict[str, tuple[Any, ...]] = {
    "torch_dtype": ("float32",),
    "dtype": ("float32",),
    "use_cache": (True, False),
    "bos_token_id": (None, 0, 5),
    "eos_token_id": (None, 1, [1, 2]),
    "pad_token_id": (None, 0, 3),
    "transformers_version": ("4.40.0",),
    "_name_or_path": ("models/a",),
    "output_past": (True, False),
    "n_ctx": (5, 1024),
    "reorder_and_upcast_attn": (True, False),
    "pretraining_tp": (1, 2),
    "chunk_size_feed_forward": (0, 1),
    "is_decoder": (True, False),
    "summary_type": ("mean", "cls_index"),
    "directionality": ("bidi",),
    "task_specific_params": ({"text-generation": {"do_sample": True}},),
    "max_length": (20,),
}
"""Values of keys that decide nothing."""


def _some(draw: Draw, share: float, **values: Any) -> dict[str, Any]:
    """Each value with a chance; elsewhere transformers' default stands in."""
    return {key: value for key, value in values.items() if draw.chance(share)}


def _gpt2(draw: Draw, heads: int, head: int, positions: int) -> dict[str, Any]:
    names = {
        "n_embd": ("hidden_size", heads * head),
        "n_layer": ("num_hidden_layers", draw.one_of(1, 2, 3)),
        "n_head": ("num_attention_heads", heads),
        "n_positions": ("max_position_embeddings", positions),
    }
    hf: dict[str, Any] = {}
    for name, (alias, value) in names.items():
        kind = draw.mostly("own", "alias", "both", share=0.15)
        if kind != "alias":
            hf[name] = draw.one_of(1, 4) * value if kind == "both" else value
        if kind != "own":
            hf[alias] = value
    activations = (*GELU, "gelu_new", "gelu_new", *(["relu", "quick_gelu"] * draw.chance(0.1)))
    layers = names["n_layer"][1]
    hf |= _windows(draw, FAMILIES["gpt2"], layers, positions)
    hf |= _some(draw, 0.1, head_dim=draw.mostly(head, None, 2 * head, share=0.1))
    return hf | _some(
        draw,
        0.7,
        n_inner=draw.one_of(None, 24, 56),
        activation_function=draw.one_of(*activations),
        layer_norm_epsilon=draw.one_of(1e-5, 1e-3, 1e-6, 1e-1),
        scale_attn_weights=draw.mostly(True, False),
        scale_attn_by_inverse_layer_idx=draw.mostly(False, True),
        tie_word_embeddings=draw.one_of(True, False),
    )


def _bloom(draw: Draw, heads: int, head: int, positions: int) -> dict[str, Any]:
    names = {
        "hidden_size": ("n_embed", heads * head),
        "n_layer": ("num_hidden_layers", draw.one_of(1, 2, 3)),
        "n_head": ("num_attention_heads", heads),
    }
    hf: dict[str, Any] = {}
    for name, (alias, value) in names.items():
        kind = draw.mostly("own", "alias", "both", share=0.3)
        if kind != "alias":
            hf[name] = draw.one_of(1, 4) * value if kind == "both" else value
        if kind != "own":
            hf[alias] = value
    hf |= _windows(draw, FAMILIES["bloom"], names["n_layer"][1], positions)
    hf |= _some(draw, 0.1, head_dim=draw.mostly(head, None, 2 * head, share=0.1))
    return hf | _some(
        draw,
        0.6,
        seq_length=positions,
        layer_norm_epsilon=draw.one_of(1e-5, 1e-3, 1e-1),
        apply_residual_connection_post_layernorm=draw.one_of(True, False),
        pretraining_tp=draw.one_of(1, 2),
        slow_but_exact=False,
        n_inner=None,
        offset_alibi=100,
    )


def _bert(draw: Draw, heads: int, head: int, positions: int) -> dict[str, Any]:
    hf = {
        "hidden_size": heads * head,
        "num_hidden_layers": draw.one_of(1, 2, 3),
        "num_attention_heads": heads,
        "intermediate_size": draw.one_of(24, 56),
        "max_position_embeddings": positions,
    }
    labels = draw.one_of(2, 3, 5)
    return hf | _some(
        draw,
        0.7,
        hidden_act=draw.mostly(draw.one_of(*GELU), "relu", "silu"),
        type_vocab_size=draw.one_of(1, 2, 3),
        layer_norm_eps=draw.one_of(1e-12, 1e-5, 1e-3, 1e-1),
        id2label={str(index): f"LABEL_{index}" for index in range(labels)},
        position_embedding_type="absolute",
        is_decoder=draw.mostly(False, True),
        is_causal=draw.mostly(None, False, True),
        tie_word_embeddings=draw.mostly(True, False),
    )


def _t5(draw: Draw, family: Family, heads: int, head: int, positions: int) -> dict[str, Any]:
    names = {
        "d_model": ("hidden_size", draw.one_of(12, 16, 24)),
        "num_heads": ("num_attention_heads", heads),
        "num_layers": ("num_hidden_layers", draw.one_of(1, 2, 3)),
        "d_kv": ("head_dim", head),
    }
    hf: dict[str, Any] = {"d_ff": draw.one_of(24, 56)}
    for name, (alias, value) in names.items():
        hf[draw.mostly(name, alias)] = value
    word = draw.one_of(*ACTIVATIONS_OF_T5)
    gated, kind = word.startswith("gated-"), word.removeprefix("gated-")
    kind = "gelu_new" if word == "gated-gelu" else kind
    if draw.chance(0.7):
        hf["feed_forward_proj"] = draw.mostly(word, "gated-relu", "tanh")
        hf |= _some(draw, 0.3, is_gated_act=gated, dense_act_fn=draw.mostly(kind, "relu"))
    return hf | _some(
        draw,
        0.6,
        num_decoder_layers=draw.one_of(None, 1, 2, 3),
        relative_attention_num_buckets=draw.one_of(8, 10, 32),
        relative_attention_max_distance=draw.one_of(20, 64, 128),
        layer_norm_epsilon=draw.one_of(1e-6, 1e-3, 1e-1),
        n_positions=positions,
        tie_word_embeddings=draw.one_of(True, False),
        scale_decoder_outputs=draw.one_of(True, False),
        is_encoder_decoder=True,
    )


def _llama_like(
    draw: Draw, family: Family, heads: int, head: int, positions: int
) -> dict[str, Any]:
    layers, name = draw.one_of(1, 2, 3), family.model_type
    plain = name in (*RMS, "stablelm")
    hf: dict[str, Any] = {
        "hidden_size": heads * head,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": draw.one_of(24, 56),
    }
    if name != "gpt_neox":
        groups = [count for count in range(1, heads + 1) if heads % count == 0]
        hf["num_key_value_heads"] = draw.one_of(*groups)
        default = family.table["num_key_value_heads"].default
        if default in (None, heads) and draw.chance(0.5):
            del hf["num_key_value_heads"]
        elif name in ("llama", "qwen2", "qwen3") and draw.chance(0.2):
            hf["num_key_value_heads"] = None
    if family.latent:
        hf["num_key_value_heads"] = draw.mostly(heads, 2 * heads)
        if name == "deepseek_v2":
            hf |= _some(draw, 0.1, head_dim=head)
    elif name in ("qwen3", "gpt_oss", "llama4_text", *GEMMAS) or (
        name in (*RMS, "starcoder2") and draw.chance(0.5)
    ):
        hf["head_dim"] = draw.one_of(4, 8, 10, 16, head)
    elif name in ("llama", "mistral", "starcoder2") and draw.chance(0.2):
        hf["head_dim"] = None
    elif name in ("stablelm", "gpt_neox") and draw.chance(0.2):
        hf["head_dim"] = draw.mostly(head, 2 * head, head + 1, share=0.1)
    usual: tuple[str, ...] = ("silu", "swish") if plain else (*GELU,)
    rare = ("gelu", "relu") if plain else ("relu", "silu")
    usual = (*GATED,) if name in GEMMAS or draw.chance(0.1) and plain else usual
    activations = draw.mostly(draw.one_of(*usual), *rare)
    norm = "rms_norm_eps" if name in RMS else "norm_epsilon"
    norm = norm if name in (*RMS, "starcoder2") else "layer_norm_eps"
    switches = {key: draw.one_of(True, False) for key in family.switches}
    hf |= _some(
        draw,
        0.75,
        max_position_embeddings=positions,
        **({family.activation.key: activations} if family.activation else {}),
        tie_word_embeddings=draw.one_of(True, False),
        **{norm: draw.one_of(1e-6, 1e-5, 1e-2, 1e-1)},
        **switches,
    )
    if name == "llama4_text":
        hf |= {
            "intermediate_size_mlp": draw.one_of(16, 40),
            "num_local_experts": draw.one_of(1, 4),
            "num_experts_per_tok": draw.mostly(1, 2),
        }
        hf |= _some(
            draw,
            0.4,
            use_qk_norm=draw.one_of(True, False),
            moe_layers=draw.one_of(None, [], [0], [layers - 1]),
            interleave_moe_layer_step=draw.mostly(draw.one_of(1, 2), 0),
            no_rope_layers=draw.one_of(None, [], [draw.one_of(0, 1) for _ in range(layers)]),
            no_rope_layer_interval=draw.one_of(1, 2, 4),
            attention_chunk_size=draw.mostly(draw.one_of(7, 8192), None),
            attn_temperature_tuning=draw.one_of(True, False),
            floor_scale=draw.one_of(8, 8192),
            attn_scale=draw.one_of(0.1, 0.5, 0.0),
        )
    if name == "gpt_oss":
        experts = draw.one_of(1, 4, 5)
        chosen = draw.one_of(1, min(experts, 2), experts)
        hf |= {draw.mostly("num_local_experts", "num_experts", share=0.2): experts}
        hf |= {"num_experts_per_tok": chosen, "hidden_act": draw.mostly("silu", "gelu")}
        hf |= _some(draw, 0.7, swiglu_limit=draw.one_of(7.0, 0.5))
        hf |= _some(draw, 0.02, quantization_config=draw.one_of(None, {"quant_method": "fp8"}))
    if name in ("gemma2", "gemma3_text"):
        hf |= _some(
            draw,
            0.7,
            query_pre_attn_scalar=draw.mostly(draw.one_of(5, head, 256), 0),
            final_logit_softcapping=draw.one_of(None, 3.0, 30.0),
        )
    if name == "gemma2":
        hf |= _some(
            draw, 0.7, attn_logit_softcapping=draw.mostly(draw.one_of(None, 2.0, 50.0), 0.0)
        )
    if name == "stablelm":
        hf |= _some(draw, 0.5, qk_layernorm=draw.mostly(False, True))
        hf |= _some(draw, 0.5, use_parallel_residual=draw.mostly(False, True))
    if name == "gpt_neox":
        hf |= _some(draw, 0.8, use_parallel_residual=draw.one_of(True, False))
    return hf | _windows(draw, family, layers, positions)


def _mixture(draw: Draw, family: Family, hf: dict[str, Any]) -> dict[str, Any]:
    """Experts, which layers have them, how they are chosen; and latents."""
    experts, name = draw.one_of(4, 6, 8), family.model_type
    chosen = draw.one_of(1, 2, 3, 4)
    keys = {row.setting: row for row in family.fields if row.setting}
    count = keys["num_experts"]
    more: dict[str, Any] = {
        draw.one_of(count.key, *count.aliases): experts,
        "num_experts_per_tok": chosen,
    }
    if name == "mixtral":
        return more
    more["moe_intermediate_size"] = draw.one_of(8, 20)
    layers = hf["num_hidden_layers"]
    if not family.latent:
        more |= _some(draw, 0.7, norm_topk_prob=draw.one_of(True, False))
        more |= _some(draw, 0.3, decoder_sparse_step=draw.mostly(draw.one_of(1, 2), 0))
        dense = [layer for layer in range(layers) if draw.chance(0.3)]
        more |= _some(draw, 0.3, mlp_only_layers=draw.mostly(dense, None))
        if name == "qwen2_moe":
            more["shared_expert_intermediate_size"] = draw.one_of(12, 24)
        return more
    more |= {
        "first_k_dense_replace": draw.one_of(0, 1, layers),
        "n_shared_experts": draw.one_of(1, 2),
        "q_lora_rank": draw.one_of(None, 12),
        "kv_lora_rank": draw.one_of(6, 10),
        "qk_nope_head_dim": draw.one_of(6, 8),
        "qk_rope_head_dim": draw.one_of(4, 8),
        "v_head_dim": draw.one_of(6, 9),
    }
    width = more["qk_nope_head_dim"] + more["qk_rope_head_dim"]
    more |= _some(draw, 0.1, qk_head_dim=draw.mostly(width, width + 2))
    more |= _some(draw, 0.5, routed_scaling_factor=draw.mostly(draw.one_of(1.0, 2.5), 0.0))
    groups, kept = draw.mostly(draw.one_of((2, 1), (2, 2), (1, 1)), (None, None))
    if name == "deepseek_v2":
        grouped = groups and draw.chance(0.5)
        if grouped or draw.chance(0.2):
            more |= {"n_group": groups, "topk_group": kept}
        method = "group_limited_greedy" if grouped else "greedy"
        more |= _some(draw, 0.9 if grouped else 0.4, topk_method=method)
        return more
    more |= {"n_group": groups, "topk_group": kept}
    more |= _some(draw, 0.5, rope_interleave=draw.one_of(True, False))
    more |= _some(draw, 0.1, head_dim=draw.mostly(more["qk_rope_head_dim"], None, 2))
    usual = chosen > 1  # of one expert's sigmoid score there is nothing to add up
    more["norm_topk_prob"] = draw.mostly(usual, not usual)
    predicted = draw.one_of("num_nextn_predict_layers", "num_mtp_layers")
    return more | _some(draw, 0.2, **{predicted: draw.one_of(0, 1)})


def _hybrid(draw: Draw, heads: int, head: int, positions: int) -> dict[str, Any]:
    """A hybrid of Mamba-2, attention, MLPs and experts."""
    letters = [draw.one_of("M", "M", "*", "-", "E") for _ in range(draw.one_of(1, 2, 3, 4))]
    names = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
    kinds = [draw.mostly(names[letter], "sliding_attention", share=0.01) for letter in letters]
    groups, per_group = draw.one_of(1, 2, 3), draw.one_of(1, 2)
    own_groups = [count for count in range(1, heads + 1) if heads % count == 0]
    hf: dict[str, Any] = {
        "hidden_size": draw.one_of(16, 24, 40),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.one_of(*own_groups),
        "head_dim": head,
        "intermediate_size": draw.one_of(24, 56),
        "max_position_embeddings": positions,
        "mamba_num_heads": groups * per_group,
        "mamba_head_dim": draw.one_of(4, 6),
        "n_groups": groups,
        "ssm_state_size": draw.one_of(3, 8),
        "moe_intermediate_size": draw.one_of(8, 20),
        "moe_shared_expert_intermediate_size": draw.one_of(12, 24),
    }
    as_pattern = draw.chance(0.3)
    key = (
        "hybrid_override_pattern" if as_pattern else draw.one_of("layer_types", "layers_block_type")
    )
    hf[key] = "".join(letters) if as_pattern else kinds
    chosen, experts = draw.one_of(1, 2, 3), draw.one_of(4, 6)
    hf |= {
        draw.one_of("n_routed_experts", "num_local_experts"): experts,
        "num_experts_per_tok": chosen,
        "norm_topk_prob": draw.mostly(chosen > 1, chosen == 1),
    }
    kept = draw.one_of(1, 2)
    if draw.chance(0.3):
        hf |= {"n_group": 2, "topk_group": kept}
    return hf | _some(
        draw,
        0.6,
        conv_kernel=draw.one_of(2, 3, 4),
        time_step_min=draw.one_of(1e-9, 0.001, 0.5),
        layer_norm_epsilon=draw.one_of(1e-5, 1e-2),
        mlp_hidden_act=draw.mostly(draw.one_of("relu2", "gelu"), "relu"),
        num_hidden_layers=len(letters),
        num_nextn_predict_layers=0,
        routed_scaling_factor=draw.mostly(draw.one_of(1.0, 2.5), 0.0),
        sliding_window=draw.mostly(None, 7, 4096),
        tie_word_embeddings=draw.one_of(True, False),
    )


def _windows(draw: Draw, family: Family, layers: int, positions: int) -> dict[str, Any]:
    hf: dict[str, Any] = {}
    name = family.model_type
    if name in ("mistral", "starcoder2", "mixtral"):
        hf |= _some(draw, 0.7, sliding_window=draw.one_of(None, 7, positions, 4096))
    elif name in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        hf |= _some(
            draw,
            0.7,
            use_sliding_window=draw.one_of(False, False, True),
            sliding_window=draw.one_of(None, 7, 4096),
            max_window_layers=draw.one_of(0, 1, 28),
        )
    elif family.windows == "alternate":
        hf |= _some(draw, 0.8, sliding_window=draw.mostly(draw.one_of(7, positions, 4096), None, 1))
        if "sliding_window_pattern" in family.table:
            hf |= _some(draw, 0.6, sliding_window_pattern=draw.mostly(draw.one_of(2, 3), 0))
    elif draw.chance(0.1):
        hf["sliding_window"] = draw.one_of(None, 7)
    if draw.chance(0.15):
        kinds = ["full_attention", "full_attention", "sliding_attention"]
        wanted = kinds if draw.chance(0.5) else kinds[:1]
        hf["layer_types"] = [draw.one_of(*wanted) for _ in range(layers)]
    hf |= _some(draw, 0.03, is_causal=draw.one_of(True, False))
    if draw.chance(0.02):
        hf["per_layer_config"] = {"0": {"intermediate_size": 8}}
    return hf


def _rotary(draw: Draw, family: Family, head: int) -> dict[str, Any]:
    """Rotary settings in all spellings; several at once, as files have them that were upgraded."""
    base_key, share_key = family.rotary_keys
    partial = family.partial_rotary is not None
    shares = [share for share in (1.0, 0.5, 0.25) if int(head * share) % 2 == 0]
    shares = shares if draw.chance(0.98) else [0.25]
    kind = draw.mostly(
        draw.one_of("default", "linear", "llama3", "yarn"), "dynamic", "longrope", share=0.08
    )
    part: dict[str, Any] = {draw.mostly("rope_type", "type", share=0.3): kind}
    if kind != "default":
        part["factor"] = draw.one_of(2.0, 4.0, 1.5)
    if kind == "llama3":
        part |= {"low_freq_factor": draw.one_of(1.0, 2.0), "high_freq_factor": 4.0}
    if kind in ("llama3", "yarn") and draw.chance(0.6):
        part["original_max_position_embeddings"] = draw.one_of(8, 16, 40)
    if kind == "yarn":
        part |= _some(
            draw,
            0.4,
            beta_fast=draw.one_of(32, 4.0, 0, None),
            beta_slow=draw.one_of(1, 0.5, None),
            mscale=draw.one_of(1.0, 0.707, 0.0, None),
            mscale_all_dim=draw.one_of(1.0, 0.5, 0.0, None),
            attention_factor=draw.one_of(None, 1.5, 0.8),
            truncate=draw.one_of(True, False),
        )
    if kind == "longrope":
        part |= {"short_factor": [1.0] * (head // 2), "long_factor": [2.0] * (head // 2)}
        part["original_max_position_embeddings"] = 8
    base = draw.one_of(10000.0, 500.0, 1000000, 77)
    part |= _some(draw, 0.5, rope_theta=base)
    part |= _some(draw, 0.3 if partial else 0.01, partial_rotary_factor=draw.one_of(*shares))
    hf: dict[str, Any] = {}
    where = draw.one_of("none", "rope_parameters", "rope_scaling", "both")
    if where == "both":
        hf = {"rope_parameters": part, "rope_scaling": draw.one_of(None, {}, dict(LINEAR))}
    elif where != "none":
        hf = {where: part}
    hf |= _some(draw, 0.5, **{base_key: draw.one_of(base, 123.0)})
    stated = 0.4 if 0.25 in shares else 0.95
    hf |= _some(draw, stated if partial else 0.01, **{share_key: draw.one_of(*shares)})
    hf |= _some(draw, 0.15, original_max_position_embeddings=draw.one_of(8, 16))
    if family.model_type == "gpt_neox":  # as transformers 4 wrote them
        copies = {"rope_theta": hf.get(base_key), "partial_rotary_factor": hf.get(share_key)}
        hf |= {key: value for key, value in copies.items() if value and draw.chance(0.1)}
    return hf


def _two_bases(draw: Draw, one_base: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3's rotary settings: a set for either kind of layers, or the older keys beside them."""
    hf = {key: value for key, value in one_base.items() if key != "rope_parameters"}
    hf |= _some(draw, 0.5, rope_local_base_freq=draw.one_of(10000, 50.0))
    both = {}
    if "rope_parameters" in one_base:
        both["full_attention"] = one_base["rope_parameters"]
    if draw.chance(0.5):
        base = _some(draw, 0.7, rope_theta=draw.one_of(10000.0, 99.0))
        both["sliding_attention"] = {"rope_type": "default", **base}
        if draw.chance(0.02):
            both["sliding_attention"] |= {"rope_type": "linear", "factor": 2.0}
    return hf | ({"rope_parameters": both} if both else {})


LINEAR = {"type": "linear", "factor": 3.0}


def make_model(seed: int, folder: Path) -> tuple[Family, dict[str, Any]] | Outcome:
    """Write a case's folder, by transformers, with config.json as drawn or as it saves it."""
    import transformers

    draw = Draw(seed)
    family = tuple(FAMILIES.values())[seed % len(FAMILIES)]
    name = model_class(draw, family)
    hf = draw_config(draw, family) | {"architectures": [name]}
    if name.endswith("QuestionAnswering"):
        hf.pop("id2label", None)  # it has a start and an end
    text = json.dumps(hf)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = getattr(transformers, name)(config).eval()
        randomize(model, seed=seed)
        model.save_pretrained(folder)
    except Exception as error:  # whatever it is, there is nothing to compare with
        return Outcome(seed, family.model_type, UNLOADABLE, why=str(error), config=text)
    if draw.chance(0.6):
        (folder / "config.json").write_text(text)
    return family, json.loads((folder / "config.json").read_text())


def probe(checkpoint: Checkpoint, seed: int) -> dict[str, Tensor]:
    """Return random tokens, up to the whole length; for BERT with padding and token types."""
    generator = torch.Generator().manual_seed(seed)
    longest = min(checkpoint.config.max_position_embeddings, 48)
    length = (1, 2, longest, longest, longest)[seed % 5]
    tokens = torch.randint(checkpoint.config.vocab_size, (2, length), generator=generator)
    if checkpoint.config.family == "gpt":
        return {"tokens": tokens}
    if checkpoint.config.family == "t5":
        shape = (2, longest)
        encoder = torch.randint(checkpoint.config.vocab_size, shape, generator=generator)
        seen = (torch.rand(shape, generator=generator) < 0.8).long()
        seen[:, 0] = 1
        return {"encoder_tokens": encoder, "encoder_mask": seen, "tokens": tokens}
    kinds = max(checkpoint.config.num_tokentypes, 1)
    mask = torch.ones_like(tokens)
    mask[1, length - length // 3 :] = 0
    types = torch.randint(kinds, tokens.shape, generator=generator)
    return {"tokens": tokens, "padding_mask": mask, "tokentypes": types}


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor], mask: Tensor | None) -> float:
    """Return the largest difference, as a share of the largest value; infinite if outputs lack."""
    if set(ours) != set(theirs):
        return float("inf")
    worst = 0.0
    for name, expected in theirs.items():
        a, b = ours[name], expected
        if mask is not None and b.dim() == 3:  # states of padding mean nothing
            a, b = a[mask.bool()], b[mask.bool()]
        difference = (a - b).abs().max().item() / max(1.0, b.abs().max().item())
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def names_a_key(outcome: Outcome) -> bool:
    """Whether a refusal names a key of config.json; a default refuses too."""
    hf = json.loads(outcome.config)
    parts = [value for value in hf.values() if isinstance(value, dict)]
    known = {*FAMILIES[outcome.family].table, *(key for part in parts for key in part)}
    return outcome.result == REFUSED and any(key in outcome.why for key in known)


def run_case(seed: int, folder: Path) -> Outcome:
    """Return what our reader makes of a case, against transformers."""
    made = make_model(seed, folder)
    if isinstance(made, Outcome):
        return made
    family, hf = made
    text = json.dumps(hf)
    try:
        checkpoint = open_checkpoint(folder)
    except InputError as error:
        why = str(error).replace(str(folder), "")
        return Outcome(seed, family.model_type, REFUSED, why=why, config=text)
    inputs = probe(checkpoint, seed)
    try:
        theirs = transformers_outputs(folder, inputs)
    except Exception as error:
        return Outcome(seed, family.model_type, UNLOADABLE, why=str(error), config=text)
    worst = gap(outputs(checkpoint, inputs), theirs, inputs.get("padding_mask"))
    return Outcome(seed, family.model_type, READ, gap=worst, config=text)


def write_case(seed: int, folder: Path) -> Outcome:
    """Return what transformers makes of what we write for a case, against ours."""
    made = make_model(seed, folder / "theirs")
    if isinstance(made, Outcome):
        return made
    family, hf = made
    text = json.dumps(hf)
    try:
        checkpoint = open_checkpoint(folder / "theirs")
    except InputError as error:
        return Outcome(seed, family.model_type, UNLOADABLE, why=str(error), config=text)
    try:
        convert(checkpoint, "hf", folder / "ours", vocab="padded", overwrite=True)
    except InputError as error:
        return Outcome(seed, family.model_type, REFUSED, why=str(error), config=text)
    inputs = probe(checkpoint, seed)
    ours, theirs = outputs(checkpoint, inputs), transformers_outputs(folder / "ours", inputs)
    worst = gap(ours, theirs, inputs.get("padding_mask"))
    return Outcome(seed, family.model_type, READ, gap=worst, config=text)
