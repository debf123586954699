"""The sizes of new models: those known by name, and how a vocabulary is padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.config import (
    SETTING_KINDS,
    ModelConfig,
    apply_overrides,
    is_of_kind,
)
from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.text_file import read_toml
from mlm_eval.checkpoints.parameters import num_parameters

DIVISIBLE_BY = 128
"""A new model's vocabulary is padded to a multiple of this, whatever the layout of its training."""

# Layers, hidden size, heads: the paper's models (its Tables 1, 2 and 4), then small ones.
SIZES = {
    "gpt2-355m": (24, 1024, 16),
    "gpt2-1.2b": (40, 1536, 16),
    "gpt2-2.5b": (54, 1920, 20),
    "gpt2-4.2b": (64, 2304, 24),
    "gpt2-8.3b": (72, 3072, 24),
    "gpt2-small": (12, 768, 12),
    "gpt2-tiny": (4, 128, 4),
    "bert-336m": (24, 1024, 16),
    "bert-1.3b": (24, 2048, 32),
    "bert-3.9b": (48, 2560, 40),
    "bert-base": (12, 768, 12),
    "bert-mini": (4, 256, 4),
    "bert-tiny": (2, 128, 2),
}

VOCABULARY = {"gpt": 50_257, "bert": 30_522}
"""Entries of GPT-2's byte-level BPE, and of BERT's uncased WordPiece vocabulary."""


def size_family(name: str) -> str:
    """Return `gpt` or `bert`.

    Raises:
        InputError: No model has this name.
    """
    if name not in SIZES:
        raise InputError(f"no model is called {name!r}; known are {', '.join(SIZES)}")
    return "gpt" if name.startswith("gpt") else "bert"


def initial_config(
    name: str | Path,
    *,
    family: str,
    vocab_entries: int,
    added_entries: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Return the settings of a new model.

    BERT: 512 positions, exact GELU, pooler and sentence-order head. GPT: 1,024 positions and tanh
        GELU.

    Args:
        name: A size (`SIZES`), or a TOML file of `ModelConfig` fields of which `num_layers`,
            `hidden_size` and `num_attention_heads` must be there.
        family: `bert` or `gpt`.
        vocab_entries: Entries of the tokenizer; rows are added up to a multiple of 128.
        added_entries: Entries that Megatron's own tokenizer has beyond them, which get rows too.
        overrides: Settings that win (`--set`); `apply_residual_connection_post_layernorm` for
            BERT's original order.

    Raises:
        InputError: There is no such size, file or setting.
    """
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": -(-(vocab_entries + added_entries) // DIVISIBLE_BY) * DIVISIBLE_BY,
        "max_position_embeddings": 1024 if family == "gpt" else 512,
        "activation": "gelu_tanh" if family == "gpt" else "gelu",
    }
    if family == "bert":
        values |= {"num_tokentypes": 2, "pooler": True, "binary_head": True}
    values |= _named(name) | dict(overrides or {})
    for key, value in values.items():
        kind = SETTING_KINDS.get(key, "")
        if kind in ("int", "float", "bool", "str") and not is_of_kind(value, kind):
            raise InputError(
                f"--init {name} sets {key} to {shown(value)}; expected a value of type {kind}"
            )
    for loss in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        if values.pop(loss, 0):
            raise InputError(
                f"--init {name} with {loss}: mlm-eval trains experts on the task's loss alone; "
                "leave it out"
            )
    if values["family"] != family:
        raise InputError(
            f"--init {name} is a {values['family']} model, this command trains {family}"
        )
    if values["vocab_size"] < vocab_entries:
        raise InputError(
            f"--init {name} sets vocab_size {values['vocab_size']}, the tokenizer has "
            f"{vocab_entries} entries; leave vocab_size out"
        )
    try:
        hidden, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
        values.setdefault("num_query_groups", heads)
        latents = bool(values.get("multi_latent_attention"))
        channels = values.get("v_head_dim") if latents else hidden // max(heads, 1)
        values.setdefault("kv_channels", channels)
        if latents:
            values.setdefault("qk_layernorm", True)
            values.setdefault("add_qkv_bias", False)
            values.setdefault("position_embedding_type", "rope")
        values.setdefault("ffn_hidden_size", 4 * hidden)
        if values.get("num_experts"):
            values.setdefault("moe_layers", range(int(values["num_layers"])))
            values.setdefault("moe_ffn_hidden_size", values["ffn_hidden_size"])
            values.setdefault("moe_router_topk", 2)
        for key, kind in SETTING_KINDS.items():
            if kind.startswith("tuple") and key in values:
                values[key] = tuple(values[key])
        config = ModelConfig(**{k: v for k, v in values.items() if k != "checkpoint_version"})
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--init {name} does not describe a model ({error}); it must set num_layers, "
            "hidden_size and num_attention_heads, and only settings that --set knows"
        ) from None
    return apply_overrides(config, overrides or {})


def _named(name: str | Path) -> dict[str, Any]:
    if str(name) in SIZES:
        layers, hidden, heads = SIZES[str(name)]
        sizes = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
        return {"family": size_family(str(name)), **sizes}
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(
            f"--init {name} is neither a size nor a TOML file; sizes are {', '.join(SIZES)}"
        )
    return read_toml(path, "a TOML file of model settings")


def named_config(name: str, *, tp: int = 1) -> ModelConfig:
    """Return the settings of a named model, its vocabulary padded as Megatron pads it for `tp`.

    That is to a multiple of 128 x tp: 50,304 rows of GPT-2 on one rank, 51,200 on eight.
    Source: docs/megatron.md, "Vocabulary padding".
    """
    family = size_family(name)
    config = initial_config(name, family=family, vocab_entries=VOCABULARY[family])
    multiple = DIVISIBLE_BY * tp
    rows = -(-VOCABULARY[family] // multiple) * multiple
    return dataclasses.replace(config, vocab_size=rows)


def paper_parameters(name: str) -> int:
    """Return a model's parameters as the paper counts them: tied embeddings once, no padding.

    A BERT is counted with its pooler and both of its heads.
    """
    config = dataclasses.replace(named_config(name), vocab_size=VOCABULARY[size_family(name)])
    return num_parameters(config)
