"""What a conversion to Hugging Face will write: family, folds and refusals, before any byte.

transformers computes fewer things than Megatron. What another form of the same function expresses
is folded (a zero-centred gain, interleaved rotary channels, absent biases); what only nearly fits
needs `allow_approximate`; everything else is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig, YarnScaling
from mlm_eval.checkpoints.dtypes import dtype_name
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.config import (
    bias_settings,
    read_config,
    write_config,
)
from mlm_eval.checkpoints.huggingface.experts import (
    LATENT_EPSILON,
    choose_mixture,
    in_terms_of,
)
from mlm_eval.checkpoints.huggingface.families.bert import MEGATRON_BERT, ORIGINAL_BERT
from mlm_eval.checkpoints.huggingface.families.dense import (
    GPT2,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    STABLELM,
    STARCODER2,
)
from mlm_eval.checkpoints.huggingface.families.family import Family, entries
from mlm_eval.checkpoints.huggingface.families.gemma import GEMMA, GEMMA2, GEMMA3
from mlm_eval.checkpoints.huggingface.families.gpt_oss import GPT_OSS
from mlm_eval.checkpoints.huggingface.families.llama4 import LLAMA4
from mlm_eval.checkpoints.huggingface.families.nemotron import NEMOTRON_H
from mlm_eval.checkpoints.huggingface.families.neox import BLOOM, GPT_NEOX
from mlm_eval.checkpoints.huggingface.fields import DROPOUT_AND_INIT
from mlm_eval.checkpoints.huggingface.folds import (
    is_gain,
    with_centred_gains,
    with_halved_rotary,
    with_paired_rotary,
    with_plain_gains,
)
from mlm_eval.checkpoints.huggingface.layers.hybrids import why_no_hybrid
from mlm_eval.checkpoints.huggingface.layers.prediction import (
    COUNT,
    has_place_for_heads,
    unpack_heads,
)
from mlm_eval.checkpoints.huggingface.reader import Found
from mlm_eval.checkpoints.huggingface.t5 import (
    OUTPUT_BIAS,
    choose_t5,
    output_bias,
    queries_factor,
    t5_tensors,
    with_unscaled_scores,
)
from mlm_eval.checkpoints.huggingface.tokenizer import (
    TokenizerFiles,
    no_tokenizer_files,
    tokenizer_files,
)
from mlm_eval.checkpoints.lazy import LazyTensor, cast_to, zeros
from mlm_eval.checkpoints.parameters import (
    WORD_EMBEDDINGS,
    num_prediction_heads,
    parameters,
    stays_float32,
)
from mlm_eval.checkpoints.tokenizer import (
    Tokenizer,
    check_entries,
    check_fits,
    entries_within,
)
from mlm_eval.checkpoints.vocabulary import with_rows

WAY_OUT = "convert it --to megatron or --to torch_dist, which hold every model that mlm-eval reads"

WRITTEN = (
    "YaRN",
    "a mixture of experts",
    "latent attention",
    "Mamba layers",
    "layers of different kinds",
    "windows of attention",
    "capped attention scores or logits",
    "scaled embeddings or logits",
    "norms of its branches",
    "a rotary base of its windowed layers",
    "geglu activations",
    "geglu_tanh activations",
    "quick_geglu activations",
    "attention sinks",
    "layers without rotary positions",
    "L2-normed queries and keys",
    "L2 norms in some layers only",
    "clamped or shifted activations",
)
"""What a plain dense model has not, and some family of transformers has: `parts_beyond_dense`."""


@dataclass(frozen=True)
class HuggingFacePlan:
    """One conversion to Hugging Face, unwritten."""

    source: Checkpoint
    dtype: torch.dtype | None
    """Dtype of the weights to write; None keeps each tensor's."""
    model_class: str
    """transformers' class."""
    hf: dict[str, Any]
    """config.json."""
    tensors: dict[str, LazyTensor]
    """What to write, by Hugging Face name."""
    float32: frozenset[str]
    """Those of `tensors` that are float32 whatever `dtype` says."""
    tokenizer: TokenizerFiles
    notes: list[str]
    """Changes of form that leave the function as it is."""
    approximations: list[str]
    """What the target computes differently."""
    warnings: list[str]
    """What the user should know."""
    approximate: dict[str, Any]
    """Settings that the approximations change, with the values that they get; and parameters."""
    left_out: list[str]
    """Parts of the model that no output needs and the target lacks: `pooler`, `mtp`."""


def plan_huggingface(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    vocab: str | None = None,
    true_vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    allow_approximate: bool = False,
) -> HuggingFacePlan:
    """Return what to write for a checkpoint.

    Args:
        checkpoint: What to convert.
        dtype: The dtype that will be written; None keeps each tensor's.
        vocab: `true` leaves out the rows that only pad the vocabulary; `padded` keeps all stored
            rows; None is `true` where the true size is known and the source is Megatron's, which
            pads.
        true_vocab_size: The tokenizer's size; None: from `tokenizer`.
        tokenizer: The tokenizer to write into the folder.
        allow_approximate: Convert although transformers computes something slightly different.

    Raises:
        InputError: transformers has no model that computes the same, its config cannot say so, or
            the tokenizer does not fit.
    """
    config = checkpoint.config
    notes: list[str] = []
    warnings: list[str] = []
    if tokenizer is None:
        files = no_tokenizer_files(choose_family(config).model_type)
    else:
        files = tokenizer_files(
            tokenizer, family=config.family, max_length=config.max_position_embeddings
        )
        warnings += files.warnings
    source = _cut_padding(checkpoint, vocab, true_vocab_size, tokenizer, notes, warnings)
    family = choose_family(source.config)
    source = _fold_rotary(_fold_gains(source, family, dtype, notes), family, notes)
    if family.kind == "t5":
        source = with_unscaled_scores(source, notes)
    head = bert_head(source.config) if family.kind == "bert" else ""
    model_class = family.model_class + head
    approximations = _approximate_gelu(source.config, allow_approximate)
    approximations += _approximate_latents(source.config, family, allow_approximate)
    if config.family == "t5":
        approximations += output_bias(source, allow_approximate)
    written, switches = _expressed(source.config, family, model_class, dtype, notes)
    hf = write_config(written, family, model_class, switches=switches)
    _check_expressed(hf, family, written)
    tensors, float32 = _tensors(source, family, written, switches, notes)
    if family.kind == "t5":
        tensors = t5_tensors(tensors, written, keep_bias=bool(approximations))
    if head == "Model":  # a base model's names have no prefix
        tensors = {name.removeprefix(family.prefix): tensor for name, tensor in tensors.items()}
    left_out = ["pooler"] if source.config.pooler and not written.pooler else []
    if source.prediction_heads:
        if has_place_for_heads(family):
            heads, of_heads = unpack_heads(
                source.prediction_heads, family, written, switches, tensors
            )
            tensors, float32 = tensors | heads, float32 | of_heads
            hf[COUNT] = num_prediction_heads(source.prediction_heads)
            notes.append(
                f"{hf[COUNT]} head(s) of multi-token prediction stand behind the last layer, as "
                "DeepSeek stores them: transformers computes without them, and may list their "
                "weights as unexpected when it loads the folder"
            )
        else:
            left_out.append("mtp")
            notes.append(
                "the heads of multi-token prediction are left out: transformers' "
                f"{family.model_type} has no place for them"
            )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        index = files.token_ids.get(key)  # null where unknown, since defaults would be wrong
        hf[key] = index if index is not None and index < hf["vocab_size"] else None
    return HuggingFacePlan(
        source=checkpoint,
        dtype=dtype,
        model_class=model_class,
        hf=hf,
        tensors=tensors,
        float32=frozenset(float32),
        tokenizer=files,
        notes=notes,
        approximations=approximations,
        warnings=warnings,
        approximate=_approximate(written) if approximations else {},
        left_out=left_out,
    )


def _approximate(written: ModelConfig) -> dict[str, Any]:
    """Return what an approximation changes: settings, and parameters that are taken for zeros."""
    if written.family == "t5":
        return {OUTPUT_BIAS: 0.0}
    names = ("head_activation", "latent_layernorm_epsilon")
    return {name: getattr(written, name) for name in names}


def _cut_padding(
    checkpoint: Checkpoint,
    vocab: str | None,
    true_size: int | None,
    tokenizer: Tokenizer | None,
    notes: list[str],
    warnings: list[str],
) -> Checkpoint:
    """Return the checkpoint without the vocabulary's rows of padding, if their number is known.

    Megatron's softmax runs over the padding rows too: without them probabilities grow a little. A
    Hugging Face model has no such padding: its rows are kept unless `vocab` is `true`.
    """
    stored = checkpoint.config.vocab_size
    is_padded = checkpoint.provenance.format != "huggingface"
    if vocab == "padded" or not (is_padded or vocab == "true"):
        return checkpoint
    size = None if tokenizer is None else entries_within(tokenizer, stored)
    true_size = size if true_size is None else true_size
    if true_size is None:
        warnings.append(
            f"all {stored} stored rows of the vocabulary are kept, padding included, since no "
            "tokenizer says how many are true; give --tokenizer DIR"
        )
        return checkpoint
    check_entries(true_size, stored)
    if size is not None and size > true_size:
        raise InputError(
            f"the tokenizer has {size} entries where {true_size} rows are to be kept; "
            "this is not the tokenizer of this model, or the size is wrong"
        )
    if true_size == stored:
        return checkpoint
    doubts = tokenizer is not None and check_fits(tokenizer, stored, checkpoint.config.family)
    if vocab is None and doubts:
        warnings.append(
            f"all {stored} stored rows of the vocabulary are kept: the {true_size} entries of the "
            "tokenizer may not be this model's; --vocab true leaves the others out"
        )
        return checkpoint
    notes.append(
        f"{stored - true_size} rows that pad the vocabulary are left out: {true_size} remain"
    )
    return with_rows(checkpoint, true_size)


def _refused(what: str, why: str) -> InputError:
    return InputError(f"{what} cannot be converted to Hugging Face: {why}; {WAY_OUT}")


def choose_family(c: ModelConfig) -> Family:
    """Return the family of transformers that computes what the config says.

    Raises:
        InputError: There is none.
    """
    if c.family == "t5":
        return choose_t5(c)
    unwritten = [what for what in c.parts_beyond_dense if what not in WRITTEN]
    if unwritten:
        raise _refused(f"a model with {unwritten[0]}", "mlm-eval writes no class that has it")
    family = _bert_family(c) if c.family == "bert" else _gpt_family(c)
    if c.activation not in family.activations:
        raise _refused(
            f"a model with {c.activation} activations", f"{family.model_type} has none such"
        )
    plain = not family.latent  # latent attention has channels of its own
    if plain and c.rotary and c.rotary_percent != 1.0 and family.partial_rotary is None:
        raise _refused(
            f"a model that rotates {c.rotary_percent:.0%} of the channels",
            f"{family.model_type} models rotate all of them",
        )
    settings = {entry.setting for entry in family.fields}
    odd = plain and "kv_channels" not in settings
    if odd and c.kv_channels * c.num_attention_heads != c.hidden_size:
        raise _refused(
            f"a model with {c.num_attention_heads} heads of {c.kv_channels} and hidden size "
            f"{c.hidden_size}",
            f"{family.model_type} models have heads of hidden size / heads",
        )
    if c.hidden_size % c.num_attention_heads:
        raise _refused(
            f"a model with {c.num_attention_heads} heads and hidden size {c.hidden_size}",
            "transformers wants heads that divide the hidden size",
        )
    if plain and "num_query_groups" not in settings and c.num_query_groups != c.num_attention_heads:
        raise _refused("grouped-query attention here", f"{family.model_type} models have none")
    return family


def _gpt_family(c: ModelConfig) -> Family:
    if c.beyond_megatron:
        return _neox_family(c)
    if c.apply_residual_connection_post_layernorm:
        raise _refused(
            "a GPT model whose residual is the norm's output "
            "(apply_residual_connection_post_layernorm)",
            "no causal model of transformers has this order",
        )
    if c.num_tokentypes:
        raise _refused(
            "a GPT model with token types", "transformers' GPT models have none of their own"
        )
    if c.learned_positions and c.rotary:
        raise _refused(
            "a model with learned and rotary positions", "transformers has none with both"
        )
    if c.mamba_layers or c.branches_differ:
        if lacking := why_no_hybrid(c):
            raise _refused(
                "a model with Mamba layers or layers of different kinds",
                f"NemotronH, transformers' class of that kind, differs ({lacking})",
            )
        return NEMOTRON_H
    if c.num_experts and c.softmax_type == "learnable":
        return _gpt_oss(c)
    if c.num_experts and c.moe_apply_probs_on_input and not c.multi_latent_attention:
        return _llama4(c)
    if c.num_experts or c.multi_latent_attention:
        family, why = choose_mixture(c)
        if family is None:
            parts = ("a mixture of experts", "latent attention")
            has = " and ".join(part for part in parts if part in c.parts_beyond_dense)
            raise _refused(f"this model with {has}", f"transformers has no class for it: {why}")
        return family
    rms, plain = c.normalization == "RMSNorm", not c.gated
    if not c.rotary:
        if rms or c.gated or c.qk_layernorm:
            raise _refused(
                "a model with learned positions and "
                f"{'RMSNorm' if rms else c.activation if c.gated else 'QK norms'}",
                "GPT-2, transformers' model with learned positions, has LayerNorm and an ungated "
                "MLP",
            )
        return GPT2
    if rms and plain:
        raise _refused(
            f"a model with rotary positions, RMSNorm and {c.activation} activations",
            "transformers' models with RMSNorm have gated MLPs",
        )
    if rms and not plain and (c.branch_layernorm or c.embedding_multiplier != 1.0):
        return _gemma(c)
    if rms and c.qk_layernorm:
        if c.add_bias_linear or c.qk_layernorm_bias:
            raise _refused(
                "a model with QK norms and biases", "Qwen3, which has such norms, has no biases"
            )
        return QWEN3
    if c.qk_layernorm:
        raise _refused("a model with LayerNorm over queries and keys", "transformers has none")
    if rms and c.window_layers and not c.add_bias_linear:
        everywhere = len(c.window_layers) == c.num_layers
        return MISTRAL if everywhere and not c.add_qkv_bias else QWEN2
    if rms:
        return QWEN2 if c.add_qkv_bias and not c.add_bias_linear else LLAMA
    grouped = c.num_query_groups != c.num_attention_heads
    if c.gated:
        if c.add_bias_linear:
            raise _refused(
                "a model with LayerNorm, swiglu and biases in its linear layers",
                "StableLM, the model with LayerNorm and swiglu, has none there",
            )
        return STABLELM
    return STARCODER2 if c.window_layers or grouped else GPT_NEOX


def _llama4(c: ModelConfig) -> Family:
    """Return Llama 4, the family whose experts' inputs are weighed, if the model is one."""
    for lacks, what in (
        (c.normalization != "RMSNorm", "LayerNorm"),
        (c.moe_router_bias, "biases of routers"),
        (c.activation != "swiglu", f"{c.activation} activations"),
        (not c.rotary, "no rotary positions"),
        (c.qk_layernorm, "norms of queries and keys with gains"),
    ):
        if lacks:
            raise _refused(
                f"a model that weighs its experts' inputs, with {what}",
                "Llama 4, the class of transformers that does so, has none such",
            )
    return LLAMA4


def _gpt_oss(c: ModelConfig) -> Family:
    """Return gpt-oss, the family with experts and sinks, if the model is one."""
    for lacks, what in (
        (c.normalization != "RMSNorm", "LayerNorm"),
        (bool(c.dense_layers), "layers without experts"),
        (not c.add_bias_linear or not c.moe_router_bias, "experts or routers without biases"),
        (c.activation_func_clamp_value is None, "gates that are not clamped"),
        (not c.rotary, "no rotary positions"),
        (c.qk_layernorm, "norms of queries and keys"),
    ):
        if lacks:
            raise _refused(
                f"a model with experts, sinks and {what}",
                "gpt-oss, the class of transformers with experts and sinks, has none such",
            )
    return GPT_OSS


def _neox_family(c: ModelConfig) -> Family:
    """Return the family with the parallel residual, or the one with ALiBi."""
    bloom = c.alibi and c.embedding_layernorm and not c.parallel_residual
    neox = c.rotary and c.parallel_residual and not c.embedding_layernorm
    family = BLOOM if bloom else GPT_NEOX
    lacking = {
        "learned positions": c.learned_positions,
        "RMSNorm": c.normalization != "LayerNorm",
        f"{c.activation} activations": c.gated,
        "grouped-query attention": c.num_query_groups != c.num_attention_heads,
        "norms of queries and keys": c.qk_layernorm,
        "windows of attention": bool(c.window_layers),
        "token types": bool(c.num_tokentypes),
        f"an MLP of {c.ffn_hidden_size}": bloom and c.ffn_hidden_size != 4 * c.hidden_size,
    }
    odd = next((what for what, there in lacking.items() if there), None)
    if odd or not (bloom or neox):
        odd = f"{c.beyond_megatron} and {odd}" if odd else c.beyond_megatron
        raise InputError(
            f"a model with {odd} cannot be converted to Hugging Face: with a parallel residual "
            "transformers has GPT-NeoX (rotary positions, LayerNorm, an ungated MLP), with ALiBi "
            "BLOOM (a norm of the embeddings, LayerNorm, an ungated MLP of four times the hidden "
            "size), and no model of Megatron-LM has either; evaluate it where it is"
        )
    return family


def _gemma(c: ModelConfig) -> Family:
    """Return the Gemma with the model's norms."""
    if c.branch_layernorm and (c.add_bias_linear or c.add_qkv_bias):
        raise _refused(
            "a model with norms of its branches and biases", "Gemma 2 and 3 norm biases too"
        )
    if c.qk_layernorm_bias:
        raise _refused("a model with biases of QK norms", "Gemma 3, which has such norms, has none")
    if not c.branch_layernorm:
        if c.qk_layernorm:
            raise _refused(
                "a model with scaled embeddings, QK norms and no norms of branches",
                "Gemma 3, which has the two, has norms of branches too",
            )
        return GEMMA
    return GEMMA3 if c.qk_layernorm else GEMMA2


def _bert_family(c: ModelConfig) -> Family:
    for bad, what in (
        (c.normalization != "LayerNorm", "RMSNorm"),
        (c.gated, "swiglu"),
        (c.rotary, "rotary positions"),
        (c.qk_layernorm, "QK norms"),
        (c.untie_embeddings_and_output_weights, "an untied output table"),
    ):
        if bad:
            raise _refused(f"a BERT model with {what}", "transformers' BERT models have none")
    return ORIGINAL_BERT if c.apply_residual_connection_post_layernorm else MEGATRON_BERT


def bert_head(c: ModelConfig) -> str:
    """Return the part of the class name that says which heads a BERT model has.

    Raises:
        InputError: transformers has no model with these heads.
    """
    heads = {
        "ForSequenceClassification": bool(c.num_classes),
        "ForMultipleChoice": c.multichoice_head,
        "ForQuestionAnswering": c.qa_head,
        "ForPreTraining": c.lm_head and c.binary_head,
        "ForMaskedLM": c.lm_head and not c.binary_head,
        "ForNextSentencePrediction": c.binary_head and not c.lm_head,
    }
    names = [name for name, present in heads.items() if present]
    if len(names) > 1:
        raise _refused(
            f"a BERT model with the heads {' and '.join(names)}",
            "transformers has none with both",
        )
    needs_pooler = bool(c.num_classes) or c.multichoice_head or c.binary_head
    if needs_pooler and not c.pooler:
        raise _refused(
            "a BERT model with a sentence head but no pooler", "transformers' heads use it"
        )
    return names[0] if names else "Model"


def _approximate_gelu(c: ModelConfig, allow: bool) -> list[str]:
    if c.family != "bert" or not c.lm_head or c.activation == c.head_activation:
        return []
    kinds = {"gelu": "the exact GELU", "gelu_tanh": "the tanh GELU", "squared_relu": "squared ReLU"}
    what = (
        f"the MLPs use {kinds[c.activation]} and the LM head {kinds[c.head_activation]}, "
        "where transformers' BERT models have one activation (hidden_act) for both"
    )
    if c.activation == "squared_relu":
        raise _refused("this BERT model", what)
    if not allow:
        raise InputError(
            f"this BERT model cannot be converted to Hugging Face exactly: {what}; "
            "--allow-approximate uses the MLPs' in the LM head too (logits differ by about 1e-3) "
            "and records the measured difference"
        )
    return [f"{what}: the LM head gets {kinds[c.activation]} too"]


def _approximate_latents(c: ModelConfig, family: Family, allow: bool) -> list[str]:
    if not family.latent or _latent_epsilon(c) == LATENT_EPSILON:
        return []
    what = (
        f"the norms of latents have epsilon {_latent_epsilon(c):g} in this model and "
        f"{LATENT_EPSILON:g} in transformers' {family.model_type}"
    )
    if not allow:
        raise InputError(
            f"this model cannot be converted to Hugging Face exactly: {what}; --allow-approximate "
            "converts it and records the measured difference"
        )
    return [what]


def _latent_epsilon(c: ModelConfig) -> float:
    own = c.latent_layernorm_epsilon
    return c.layernorm_epsilon if own is None else own


def _fold_gains(
    checkpoint: Checkpoint, family: Family, dtype: torch.dtype | None, notes: list[str]
) -> Checkpoint:
    """Return the checkpoint with the family's kind of gains, and say what this has rounded."""
    centred = bool(family.constants.get("layernorm_zero_centered_gamma"))
    folded = (with_centred_gains if centred else with_plain_gains)(checkpoint, dtype)
    if folded is checkpoint:
        return checkpoint
    worst = 0.0
    for name, stored in checkpoint.tensors.items():
        if is_gain(name):
            exact = stored.read().float() + (-1 if centred else 1)
            worst = max(worst, (folded.tensors[name].read().float() - exact).abs().max().item())
    rounding = f" (rounded by up to {worst:.1g})" if worst else ""
    if centred:
        kind = f"{family.model_type} stores the norms' gains minus 1: 1 is subtracted"
    else:
        kind = "the norms' gains were stored minus 1 (layernorm_1p): 1 is added"
    notes.append(f"{kind}{rounding}")
    return folded


def _fold_rotary(checkpoint: Checkpoint, family: Family, notes: list[str]) -> Checkpoint:
    """Return the checkpoint with rotary pairs as the family has them, and say so."""
    paired = bool(family.constants.get("rotary_interleaved"))
    folded = (with_paired_rotary if paired else with_halved_rotary)(checkpoint)
    if folded is not checkpoint:
        kinds = ["(2i, 2i + 1)", "(i, i + d/2)"]
        before, after = reversed(kinds) if paired else kinds
        notes.append(f"rotary pairs {before} became {after}: queries and keys are reordered alike")
    return folded


def _expressed(
    c: ModelConfig,
    family: Family,
    model_class: str,
    dtype: torch.dtype | None,
    notes: list[str],
) -> tuple[ModelConfig, dict[str, bool]]:
    """Return the config of the same function in the family's terms, and its bias switches."""
    names = set(parameters(c))
    switches = {}
    for key in family.switches:
        modules = [row.canonical.replace("{i}", "0") for row in family.rows if row.bias == key]
        switches[key] = any(f"{module}.bias" in names for module in modules)
    changes: dict[str, Any] = {"params_dtype": dtype_name(dtype)} if dtype else {}
    changes.update(bias_settings(family, switches))
    changes["head_activation"] = c.activation if c.lm_head and family.kind == "bert" else "gelu"
    changes.update(in_terms_of(c, family))
    if family.latent:
        usual = c.layernorm_epsilon == LATENT_EPSILON
        changes["latent_layernorm_epsilon"] = None if usual else LATENT_EPSILON
    if c.position_embedding_type == "none" and not family.hybrid:
        changes["position_embedding_type"] = "learned_absolute"
    if not c.rotary:  # Megatron's args hold these settings whether or not anything is rotated
        for setting in dataclasses.fields(ModelConfig):
            if setting.name.startswith(("rotary_", "rope_")):
                changes[setting.name] = setting.default
    if family.kind == "t5":  # as it is read again
        changes["softmax_scale"] = None if queries_factor(c.kv_channels) else 1.0
    if family.kind == "bert":
        changes["num_tokentypes"] = c.num_tokentypes or 2
        if c.pooler and model_class.endswith(("ForMaskedLM", "ForQuestionAnswering")):
            changes["pooler"] = False
            notes.append(f"the pooler, which no head uses, is left out: {model_class} has none")
    return dataclasses.replace(c, **changes), switches


def _check_expressed(hf: Mapping[str, Any], family: Family, written: ModelConfig) -> None:
    """Refuse what config.json does not say: reading it back must give the same model.

    Raises:
        InputError: A setting was lost.
    """
    heads = ("lm_head", "pooler", "binary_head", "num_classes", "multichoice_head", "qa_head")
    found = Found(
        written.vocab_size,
        written.params_dtype,
        untied=written.untie_embeddings_and_output_weights if family.kind == "t5" else None,
        heads={name: getattr(written, name) for name in heads},
    )
    back = read_config(hf, family, found=found, overrides={}, where="config.json").config
    for setting in dataclasses.fields(ModelConfig):
        if setting.name in DROPOUT_AND_INIT:
            continue
        ours, theirs = getattr(written, setting.name), getattr(back, setting.name)
        if not _same_value(ours, theirs):
            raise _refused(
                f"a model with {setting.name} {ours!r}", f"{family.model_type} has {theirs!r} there"
            )


def _same_value(ours: Any, theirs: Any) -> bool:
    """Whether two values of a setting are the same, factors but for rounding."""
    if isinstance(ours, YarnScaling) and isinstance(theirs, YarnScaling):
        return ours.same_as(theirs)
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return bool(ours == theirs)


def _tensors(
    source: Checkpoint,
    family: Family,
    written: ModelConfig,
    switches: Mapping[str, bool],
    notes: list[str],
) -> tuple[dict[str, LazyTensor], set[str]]:
    """Return the tensors to write, and which of them stay in float32.

    They are zeros where the family has a parameter that the source lacks.
    """
    table = parameters(written)
    kept = source.tensors[WORD_EMBEDDINGS].dtype
    tensors: dict[str, LazyTensor] = {}
    wide: set[str] = set()
    filled, done = [], set()
    for entry in entries(
        family,
        written.num_layers,
        switches,
        experts=written.num_experts,
        decoder_layers=written.decoder_num_layers,
    ):
        if entry.canonical not in table:
            assert entry.optional, entry.canonical
            continue
        done.add(entry.canonical)
        if entry.canonical in source.tensors:
            parts = entry.layout.unpack(source.tensors[entry.canonical], written)
        else:
            shapes = entry.layout.shapes(table[entry.canonical].shape, written)
            parts = [zeros(shape, kept) for shape in shapes]
            filled.append(entry.canonical)
        if stays_float32(entry.canonical):
            parts = [cast_to(part, torch.float32) for part in parts]
            wide.update(entry.names)
        tensors.update(zip(entry.names, parts, strict=True))
    lost = [name for name in source.tensors if name not in done and not name.startswith("pooler.")]
    # Where transformers has biases in the attention alone, those of the MLP were read as zeros.
    for name in lost:
        if not name.endswith(".bias") or source.tensors[name].read().any():
            raise _refused(f"a model with {name}", f"{family.model_type} has no such parameter")
    if filled:
        kinds = sorted({".".join(name.split(".")[-2:]) for name in filled})
        notes.append(
            f"{len(filled)} parameter(s) that {family.model_type} has and this model lacks are "
            f"zeros ({', '.join(kinds[:4])})"
        )
    return tensors, wide
