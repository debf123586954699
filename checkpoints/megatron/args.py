"""The `args` of a Megatron checkpoint that is written: what rebuilds the model.

The inverse of `megatron_config.py`: the reader there, and Megatron's own, must get the same model
back. Source: facts B.3 and E.5.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig, RopeScaling
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import check_entries

DEFAULT_DIVISIBLE_BY = 128
"""Megatron's default of --make-vocab-size-divisible-by."""

CARRIED_WORDS = frozenset(
    """tokenizer_type optimizer lr_decay_style weight_decay_incr_style dataloader_type data_impl
    DDP_impl""".split()
)
"""Words that are kept. Any other string may name a place, a person or a machine."""

NOT_CARRIED = frozenset(
    """model_parallel_size rank local_rank node_rank world_size data_parallel_size
    context_parallel_size expert_model_parallel_size expert_tensor_parallel_size sequence_parallel
    virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage
    num_virtual_stages_per_pipeline_rank pipeline_model_parallel_split_rank
    pipeline_model_parallel_layout decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split standalone_embedding_stage encoder_tensor_model_parallel_size
    encoder_pipeline_model_parallel_size use_cpu_initialization apply_layernorm_1p
    disable_bias_linear num_classes use_mcore_models use_legacy_models""".split()
)
"""About the machines and the layout of the run that saved the source, or said anew below."""


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is laid out in files."""

    names: str
    """`core` (megatron-core's) or `legacy` (those of checkpoint version 3.0)."""
    tp: int
    pp: int
    vocab_size: int
    """Rows of the vocabulary in all files together."""
    divisible_by: int
    """Megatron's `make_vocab_size_divisible_by`: with `tp` it gives `vocab_size` again."""
    iteration: int
    dtype: torch.dtype
    """Of the weights."""


def choose_names(config: ModelConfig, names: str | None) -> str:
    """Return `core` or `legacy`: as asked for, else megatron-core's wherever it can run the model.

    Raises:
        InputError: Megatron has no such model under the names asked for.
    """
    assert names in (None, "core", "legacy"), names
    not_core, not_legacy = _lacking_in_core(config), _lacking_in_legacy(config)
    chosen = names or ("legacy" if not_core else "core")
    lacking = not_core if chosen == "core" else not_legacy
    if lacking:
        other = "legacy" if chosen == "core" else "core"
        way_out = "keep the format it has" if not_core and not_legacy else f"write {other} names"
        what = "megatron-core" if chosen == "core" else "Megatron's legacy code"
        raise InputError(f"{what} has no {lacking}, so its names cannot hold this model; {way_out}")
    return chosen


def _lacking_in_core(c: ModelConfig) -> str | None:
    """Return what megatron-core does not have, or None."""
    if c.apply_residual_connection_post_layernorm:
        return "residual connection after the norm (BERT's original order)"
    if c.num_classes or c.multichoice_head or c.qa_head:
        return "task heads (classification, multiple choice, question answering)"
    if c.family == "bert" and not c.lm_head:
        return "BERT without a language-model head"
    if c.family == "bert" and c.pooler != c.binary_head:
        return "pooler without a binary head"
    if c.family == "bert" and c.head_activation != "gelu":
        return "tanh GELU in BERT's language-model head"
    if c.activation == "gelu_tanh" and not c.add_bias_linear:
        return "tanh GELU without biases"
    if c.position_embedding_type == "learned_absolute+rope":
        return "learned and rotary positions together"
    if c.qk_layernorm and c.qk_layernorm_bias != (c.normalization == "LayerNorm"):
        return "norm of queries and keys that differs in kind from the other norms"
    return _lacking_anywhere(c)


def _lacking_in_legacy(c: ModelConfig) -> str | None:
    """Return what the legacy models do not have, or None."""
    if c.qk_layernorm:
        return "norm of queries and keys"
    if c.family == "bert" and _openai_gelu(c) != (c.head_activation == "gelu_tanh"):
        return f"BERT with {c.activation} in the MLP and {c.head_activation} in the head"
    return _lacking_anywhere(c)


def _lacking_anywhere(c: ModelConfig) -> str | None:
    scaling = c.rope_scaling
    if scaling is not None and RopeScaling(factor=scaling.factor) != scaling:
        return "rotary scaling with other constants than Llama 3.1's"
    if c.add_bias_linear and not c.add_qkv_bias:
        return "linear biases everywhere but in the QKV projection"
    return None


def _openai_gelu(c: ModelConfig) -> bool:
    """Whether legacy code needs `openai_gelu`: tanh in the MLP that the fused kernel cannot give.

    The fused kernel needs a bias, and leaves BERT's head at erf; `openai_gelu` makes both tanh.
    """
    if c.activation != "gelu_tanh":
        return False
    return not c.add_bias_linear or (c.family == "bert" and c.head_activation == "gelu_tanh")


def padded_vocabulary(
    checkpoint: Checkpoint, tp: int, true_size: int | None, divisible_by: int | None
) -> tuple[int, int]:
    """Return (rows to store, `make_vocab_size_divisible_by` that goes with them) for `tp` ranks.

    With a true size, or a divisor, given: Megatron's formula, the smallest multiple of divisor x tp
    that holds the vocabulary; the divisor is the source's unless given, 128 without one. With
    neither: the stored rows are kept exactly where `tp` divides them, so that changing tp back and
    forth loses nothing; the divisor then becomes the one from which Megatron's formula gives this
    same number of rows for any true size that the source may have had. Rows that `tp` does not
    divide are padded by the formula.

    Raises:
        InputError: `true_size` is more than there are rows, or a size is not positive.
    """
    rows, args = checkpoint.config.vocab_size, checkpoint.provenance.args
    saved = args.get("make_vocab_size_divisible_by")
    saved = saved if isinstance(saved, int) and saved > 0 else None
    if true_size is not None:
        check_entries(true_size, rows)
    if divisible_by is not None and divisible_by < 1:
        raise InputError(f"make_vocab_size_divisible_by is {divisible_by}; it must be at least 1")
    if true_size is None and divisible_by is None and rows % tp == 0:
        saved_tp = args.get("tensor_model_parallel_size", args.get("model_parallel_size"))
        multiple = (saved or 1) * (saved_tp or checkpoint.provenance.tensor_parallel)
        if rows % multiple:  # not padded by the formula: take the rows for the vocabulary
            multiple = 1
        return rows, math.lcm(multiple, tp) // tp
    divisor = divisible_by or saved or DEFAULT_DIVISIBLE_BY
    multiple = divisor * tp
    return -(-(true_size or rows) // multiple) * multiple, divisor


def megatron_args(checkpoint: Checkpoint, layout: Layout, tp_rank: int, pp_rank: int) -> Namespace:
    """Return the `args` of one rank's file."""
    values = carried(checkpoint.provenance.args)
    values |= _sizes(checkpoint.config, layout, values.get("seq_length"))
    values |= _positions(checkpoint.config)
    values |= _norms_and_biases(checkpoint.config)
    values |= _activation(checkpoint.config, layout.names == "core")
    values |= _layout(layout, tp_rank, pp_rank)
    if checkpoint.config.family == "bert":
        values["bert_binary_head"] = checkpoint.config.binary_head
    return Namespace(**dict(sorted(values.items())))  # sorted: equal args are equal bytes


def carried(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved args that may go into another file: numbers, switches, a few known words."""
    return {name: value for name, value in args.items() if _is_carried(name, value)}


def _is_carried(name: str, value: Any) -> bool:
    if name in NOT_CARRIED:
        return False
    if isinstance(value, str):
        return name in CARRIED_WORDS
    return value is None or type(value) in (bool, int, float)


def _sizes(c: ModelConfig, layout: Layout, run_length: int | None) -> dict[str, Any]:
    length = run_length or c.max_position_embeddings
    grouped = c.num_query_groups != c.num_attention_heads
    groups = c.num_query_groups if grouped else 1  # Megatron's default, which then says nothing
    values: dict[str, Any] = {
        "num_layers": c.num_layers,
        "encoder_num_layers": c.num_layers,
        "decoder_num_layers": None,
        "hidden_size": c.hidden_size,
        "ffn_hidden_size": c.ffn_hidden_size,
        "num_attention_heads": c.num_attention_heads,
        "kv_channels": c.kv_channels,
        "group_query_attention": grouped,
        "num_query_groups": groups,
        "max_position_embeddings": c.max_position_embeddings,
        "seq_length": length,
        "encoder_seq_length": length,
        "decoder_seq_length": None,
        "padded_vocab_size": layout.vocab_size,
        "make_vocab_size_divisible_by": layout.divisible_by,
        "untie_embeddings_and_output_weights": c.untie_embeddings_and_output_weights,
        "hidden_dropout": c.hidden_dropout,
        "attention_dropout": c.attention_dropout,
        "init_method_std": c.init_method_std,
        "params_dtype": layout.dtype,
        "fp16": layout.dtype == torch.float16,
        "bf16": layout.dtype == torch.bfloat16,
    }
    if c.num_classes:
        values["num_classes"] = c.num_classes
    return values


def _positions(c: ModelConfig) -> dict[str, Any]:
    whole_base = float(c.rotary_base).is_integer()
    values: dict[str, Any] = {
        "position_embedding_type": c.position_embedding_type,
        # Megatron's default, and left on in rotary models too.
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_percent": c.rotary_percent,
        "rotary_base": int(c.rotary_base) if whole_base else c.rotary_base,
        "rotary_interleaved": c.rotary_interleaved,
        "rotary_seq_len_interpolation_factor": c.rotary_seq_len_interpolation_factor,
        "use_rope_scaling": c.rope_scaling is not None,
    }
    if c.rope_scaling is not None:
        values["rope_scaling_factor"] = c.rope_scaling.factor
    if c.position_embedding_type == "learned_absolute+rope":
        # Spring 2023: two switches and no type.
        values |= {"position_embedding_type": None, "use_rotary_position_embeddings": True}
    return values


def _norms_and_biases(c: ModelConfig) -> dict[str, Any]:
    return {
        "normalization": c.normalization,
        # Each under both of its names: Megatron changed them in 2023 and again in 2026.
        "norm_epsilon": c.layernorm_epsilon,
        "layernorm_epsilon": c.layernorm_epsilon,
        "apply_layernorm_1p": c.layernorm_zero_centered_gamma,
        "layernorm_zero_centered_gamma": c.layernorm_zero_centered_gamma,
        "add_bias_linear": c.add_bias_linear,
        "add_qkv_bias": c.add_qkv_bias,
        "qk_layernorm": c.qk_layernorm,
        "apply_residual_connection_post_layernorm": c.apply_residual_connection_post_layernorm,
        # A numerical device of the run, not a part of the model (facts E.4).
        "apply_query_key_layer_scaling": False,
    }


def _activation(c: ModelConfig, core: bool) -> dict[str, Any]:
    openai = not core and _openai_gelu(c)
    return {
        "swiglu": c.activation == "swiglu",
        "squared_relu": c.activation == "squared_relu",
        "openai_gelu": openai,
        "onnx_safe": None,
        "bias_gelu_fusion": c.activation == "gelu_tanh" and not openai,
    }


def _layout(layout: Layout, tp_rank: int, pp_rank: int) -> dict[str, Any]:
    core = layout.names == "core"
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "transformer_pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "sequence_parallel": False,
        "data_parallel_size": 1,
        "world_size": layout.tp * layout.pp,
        # Tensor-parallel ranks count fastest. It tells when folders were swapped.
        "rank": pp_rank * layout.tp + tp_rank,
        "transformer_impl": "local",
        "use_mcore_models": core,
        "use_legacy_models": not core,
        "ckpt_format": "torch",
        "iteration": layout.iteration,
        # These files hold weights only.
        "no_save_optim": True,
        "no_save_rng": True,
        "use_distributed_optimizer": False,
    }
