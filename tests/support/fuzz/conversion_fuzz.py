"""Random models as Megatron trains them, to be written for transformers.

A case is a number. Most are close to a form that transformers has; what it lacks is refused.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.config import ModelConfig, RopeScaling
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.read import read_folder
from mlm_eval.engine.plain_transformers import transformers_outputs
from mlm_eval.engine.verify import outputs
from support import random_models
from support.configs import BERT, GPT
from support.fuzz.huggingface_fuzz import READ, REFUSED, Draw, Outcome, gap, probe


def draw_model(draw: Draw) -> ModelConfig:
    """Return the config of a random model."""
    heads, head = draw.one_of(1, 2, 4, 6), draw.one_of(4, 8, 12, 16)
    shared: dict[str, Any] = {
        "num_layers": draw.one_of(1, 2, 3),
        "hidden_size": heads * head,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": head,
        "ffn_hidden_size": draw.one_of(16, 24, 48),
        "vocab_size": draw.one_of(32, 50, 64),
        "max_position_embeddings": draw.one_of(16, 33),
        "layernorm_epsilon": draw.one_of(1e-5, 1e-6, 1e-2),
        "layernorm_zero_centered_gamma": draw.chance(0.3),
        # Saved args hold them whether or not the model rotates anything.
        "rotary_base": draw.one_of(10000.0, 500.0, 12345.5),
        "rotary_percent": draw.mostly(1.0, 0.5, share=0.1),
        "rotary_interleaved": draw.chance(0.2),
    }
    kind = draw.one_of("gpt2", "llama", "stablelm", "neox", "starcoder", "bert")
    if kind == "bert":
        return dataclasses.replace(BERT, **shared, **_bert(draw))
    biased = draw.chance(0.5)
    plain = draw.one_of("gelu", "gelu_tanh", "squared_relu")
    rotary = {"position_embedding_type": "rope", **_scaling(draw)}
    groups = draw.one_of(*(count for count in range(1, heads + 1) if heads % count == 0))
    kinds: dict[str, dict[str, Any]] = {
        "gpt2": {
            "position_embedding_type": draw.mostly("learned_absolute", "none", share=0.2),
            "activation": plain,
            **(_scaling(draw) if draw.chance(0.2) else {}),
        },
        "llama": {
            **rotary,
            "normalization": "RMSNorm",
            "activation": "swiglu",
            "num_query_groups": groups,
            "kv_channels": draw.mostly(head, 20, share=0.2),
            "qk_layernorm": draw.chance(0.3),
        },
        "stablelm": {
            **rotary,
            "activation": "swiglu",
            "num_query_groups": groups,
            "rotary_percent": draw.one_of(1.0, 0.5),
            "add_bias_linear": False,
        },
        "neox": {**rotary, "activation": plain, "rotary_percent": draw.one_of(1.0, 0.5)},
        "starcoder": {**rotary, "activation": plain, "num_query_groups": groups},
    }
    chosen = {"add_bias_linear": biased, **shared, **kinds[kind]}
    if chosen.get("qk_layernorm"):
        chosen["add_bias_linear"] = draw.chance(0.1)
    chosen["add_qkv_bias"] = chosen["add_bias_linear"] or draw.chance(0.4)
    chosen["untie_embeddings_and_output_weights"] = draw.chance(0.5)
    return dataclasses.replace(GPT, **chosen)


def _scaling(draw: Draw) -> dict[str, Any]:
    return draw.one_of(  # type: ignore[no-any-return]
        {},
        {"rotary_seq_len_interpolation_factor": 2.0},
        {"rope_scaling": RopeScaling(4.0, 1.0, 4.0, 16)},
    )


def _bert(draw: Draw) -> dict[str, Any]:
    head = draw.one_of("pre", "mlm", "nsp", "classes", "choices", "spans", "none")
    activation = draw.one_of("gelu", "gelu_tanh", "squared_relu")
    language = head in ("pre", "mlm")
    return {
        "num_tokentypes": draw.one_of(0, 2, 3),
        "activation": activation,
        "head_activation": draw.mostly(
            "gelu" if activation == "squared_relu" or not language else activation,
            "gelu",
            share=0.1,
        ),
        "apply_residual_connection_post_layernorm": draw.chance(0.4),
        "lm_head": language,
        "pooler": head in ("pre", "nsp", "classes", "choices") or draw.chance(0.3),
        "binary_head": head in ("pre", "nsp"),
        "num_classes": 3 if head == "classes" else 0,
        "multichoice_head": head == "choices",
        "qa_head": head == "spans",
    }


def convert_case(seed: int, folder: Path) -> Outcome:
    """Return what transformers, and our reader, make of a random model that we write."""
    config = draw_model(Draw(seed))
    checkpoint = random_models.checkpoint(config, seed=seed)
    text = json.dumps(dataclasses.asdict(config))
    try:
        convert(checkpoint, "hf", folder, vocab="padded", overwrite=True)
    except InputError as error:
        return Outcome(seed, config.family, REFUSED, why=str(error), config=text)
    inputs = probe(checkpoint, seed)
    ours, theirs = outputs(checkpoint, inputs), transformers_outputs(folder, inputs)
    back = outputs(read_folder(folder), inputs)
    mask = inputs.get("padding_mask")
    if "states" in ours and not config.pooler:  # transformers has one always, here of zeros
        theirs.pop("pooled", None)
        back.pop("pooled", None)
    return Outcome(
        seed, config.family, READ, max(gap(ours, theirs, mask), gap(ours, back, mask)), config=text
    )
