"""How a checkpoint is laid out when Megatron's formats are written: names, parallel sizes, rows.

What Megatron could not load again is refused here, before anything is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig, RopeScaling
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.parameters import allowed_tp, check_tp
from mlm_eval.checkpoints.tokenizer import check_entries

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"

DEFAULT_DIVISIBLE_BY = 128
"""Megatron's default of --make-vocab-size-divisible-by."""


@dataclass(frozen=True)
class SaveLayout:
    """How a checkpoint is laid out in files."""

    names: str
    """`core` (megatron-core's) or `legacy` (those of checkpoint version 3.0)."""
    tp: int
    pp: int
    vocab_size: int
    """Rows of the vocabulary in all files together."""
    divisible_by: int
    """Megatron's `make_vocab_size_divisible_by`: with `tp` it gives `vocab_size` again."""
    iteration: int | None
    """None: a release."""
    dtype: torch.dtype | None
    """Dtype of the weights; None keeps that of each."""
    params_dtype: torch.dtype
    """Dtype of the word embeddings, for the args."""


class LayoutOptions(TypedDict, total=False):
    """The options of both writers that decide about the layout."""

    tp: int
    """Tensor-parallel size, 1 by default; must divide the heads and the MLP's width."""
    pp: int
    """Pipeline stages, 1 by default; must divide the layers."""
    dtype: torch.dtype | None
    """Dtype of the weights; None keeps that of each."""
    iteration: int | str | None
    """A number or `release`; None: the source's, `release` where it has none."""
    true_vocab_size: int | None
    """Size of the tokenizer's vocabulary, where it is known."""
    make_vocab_size_divisible_by: int | None
    """Megatron's divisor; see `padded_vocabulary`."""


def save_layout(
    checkpoint: Checkpoint, names: str | None, **options: Unpack[LayoutOptions]
) -> SaveLayout:
    """Return the layout that a writer was asked for.

    Raises:
        InputError: Megatron has no such model, or could not load it at these sizes.
    """
    names = choose_names(checkpoint.config, names)
    tp, pp, dtype = options.get("tp", 1), options.get("pp", 1), options.get("dtype")
    check_sizes(checkpoint.config, tp, pp, names)
    iteration = options.get("iteration")
    iteration = checkpoint.provenance.iteration if iteration is None else iteration
    rows, divisor = padded_vocabulary(
        checkpoint, tp, options.get("true_vocab_size"), options.get("make_vocab_size_divisible_by")
    )
    return SaveLayout(
        names=names,
        tp=tp,
        pp=pp,
        vocab_size=rows,
        divisible_by=divisor,
        iteration=None if iteration in (None, "release") else int(iteration),
        dtype=dtype,
        params_dtype=dtype or checkpoint.tensors[WORD_EMBEDDINGS].dtype,
    )


def choose_names(config: ModelConfig, names: str | None) -> str:
    """Return `core` or `legacy`: as asked for, else megatron-core's wherever it can run the model.

    Raises:
        InputError: Megatron has no such model under the names asked for.
    """
    assert names in (None, "core", "legacy"), names
    not_core, not_legacy = lacking_in_core(config), _lacking_in_legacy(config)
    chosen = names or ("legacy" if not_core else "core")
    lacking = not_core if chosen == "core" else not_legacy
    if lacking:
        other = "legacy" if chosen == "core" else "core"
        way_out = "keep the format it has" if not_core and not_legacy else f"write {other} names"
        what = "megatron-core" if chosen == "core" else "Megatron's legacy code"
        raise InputError(f"{what} has no {lacking}, so its names cannot hold this model; {way_out}")
    return chosen


def lacking_in_core(c: ModelConfig) -> str | None:
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
    if c.family == "bert" and c.position_embedding_type != "learned_absolute":
        return "BERT without learned positions"
    if c.qk_layernorm and c.qk_layernorm_bias != (c.normalization == "LayerNorm"):
        return "norm of queries and keys that differs in kind from the other norms"
    return _lacking_anywhere(c)


def _lacking_in_legacy(c: ModelConfig) -> str | None:
    """Return what the legacy models do not have, or None."""
    if c.qk_layernorm:
        return "norm of queries and keys"
    if c.softmax_scale is not None:
        return "attention scale of its own"
    if c.rotary:
        # Its models make their tables of angles without these settings, whatever args say.
        if c.rotary_base != 10000.0:
            return "rotary base but 10000"
        if c.rotary_interleaved:
            return "interleaved rotary pairs"
        if c.rope_scaling is not None:
            return "scaling of rotary frequencies"
    if c.family == "bert" and needs_openai_gelu(c) != (c.head_activation == "gelu_tanh"):
        return f"BERT with {c.activation} in the MLP and {c.head_activation} in the head"
    return _lacking_anywhere(c)


def _lacking_anywhere(c: ModelConfig) -> str | None:
    scaling = c.rope_scaling
    if scaling is not None and RopeScaling(factor=scaling.factor) != scaling:
        return "rotary scaling with other constants than Llama 3.1's"
    if c.add_bias_linear and not c.add_qkv_bias:
        return "linear biases everywhere but in the QKV projection"
    return None


def needs_openai_gelu(c: ModelConfig) -> bool:
    """Whether legacy code needs `openai_gelu`: tanh in the MLP that the fused kernel cannot give.

    The fused kernel needs a bias, and leaves BERT's head at erf; `openai_gelu` makes both tanh.
    """
    if c.activation != "gelu_tanh":
        return False
    return not c.add_bias_linear or (c.family == "bert" and c.head_activation == "gelu_tanh")


def check_sizes(config: ModelConfig, tp: int, pp: int, names: str) -> None:
    """Refuse parallel sizes that Megatron could not load the model at.

    Raises:
        InputError: `tp` does not fit the heads, the MLP or the query groups, or `pp` the layers.
    """
    if tp < 1 or pp < 1:
        raise InputError(f"cannot write tp={tp} x pp={pp} files; both must be at least 1")
    check_tp(config, tp)
    groups = config.num_query_groups
    # With fewer groups than ranks megatron-core keeps even cuts of the packed rows and gathers them
    # when it runs.
    fitting = [
        n for n in allowed_tp(config) if groups % n == 0 or (names == "core" and n % groups == 0)
    ]
    if tp not in fitting:
        rule = "tp must divide them" if names == "legacy" else "one must divide the other"
        raise InputError(
            f"cannot write tp={tp} files with {names} names: the model has "
            f"{groups} query groups, and {rule}; it allows tp in {', '.join(map(str, fitting))}"
        )
    if config.num_layers % pp:
        allowed = [n for n in range(1, config.num_layers + 1) if config.num_layers % n == 0]
        raise InputError(
            f"cannot split {config.num_layers} layers over pp={pp} pipeline stages; "
            f"this model allows pp in {', '.join(map(str, allowed))}"
        )


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
