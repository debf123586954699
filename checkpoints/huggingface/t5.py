"""What T5's config.json says otherwise than ModelConfig, both ways, and what T5 cannot hold.

transformers does not scale the scores of attention, so its queries hold the factor. Where that is a
power of two (heads of 4, 16, 64 or 256 channels) it is taken out of them and put back, exactly;
else the model keeps `softmax_scale` 1. Of a T5 whose logits are scaled, the factor d_model^-0.5 is
`logit_multiplier`: transformers' older versions apply it where the output table is tied. A tied
table without it, as Megatron's, is written a second time, as a table of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.huggingface.families.family import Family
from mlm_eval.checkpoints.huggingface.families.t5 import ACTIVATIONS_OF_T5, GATED_T5, PLAIN_T5
from mlm_eval.checkpoints.huggingface.reader import DEFAULT, Found, HubConfigReader
from mlm_eval.checkpoints.lazy import LazyTensor, Mapped, ScaledRows, runs

if TYPE_CHECKING:
    from torch import Tensor

OUTPUT_BIAS = "output_layer.bias"


def read_t5(r: HubConfigReader, family: Family, found: Found) -> None:
    """Take the settings that no single key of a T5's config.json says as ModelConfig does.

    Raises:
        InputError: Keys contradict each other.
    """
    if r.values["decoder_num_layers"] is None:
        count, source = r.values["num_layers"], "config.json num_layers"
        if "num_hidden_layers" in r.hf:
            # To transformers that is an alias of the encoder's number, set after the decoder's
            # was taken from num_layers.
            row, count, source = family.table["num_layers"], None, DEFAULT
            if row.key in r.hf:
                count, source = r.checked(row.key, r.hf[row.key], "int"), "config.json num_layers"
            count = row.default if count is None else count
        r.set("decoder_num_layers", count, source)
    word = r.look("feed_forward_proj", "str")[0]
    gated, kind = word.startswith("gated-"), word.removeprefix("gated-")
    for key, value in (
        ("is_gated_act", gated),
        ("dense_act_fn", "gelu_new" if word == "gated-gelu" else kind),
    ):
        if r.hf.get(key, value) != value:
            raise InputError(
                f"{r.where}: {key} is {r.hf[key]!r}, but feed_forward_proj is {word!r}; correct "
                "the file"
            )
    scaled, source = False, f"every {family.model_type} model"
    if family.model_type == "t5":
        scaled, source = r.hf.get("tie_word_embeddings") is not False, DEFAULT
        if "tie_word_embeddings" in r.hf:
            source = "config.json tie_word_embeddings"
        if "scale_decoder_outputs" in r.hf:
            scaled, source = r.look("scale_decoder_outputs", "bool")
    r.set("logit_multiplier", r.values["hidden_size"] ** -0.5 if scaled else 1.0, source)
    scale = None if queries_factor(r.values["kv_channels"]) else 1.0
    r.set("softmax_scale", scale, "T5's scores are not scaled")
    r.set("untie_embeddings_and_output_weights", bool(found.untied), "weights")


def queries_factor(channels: int) -> float | None:
    """Return sqrt(channels) where it is a power of two; None: it is not."""
    root = math.isqrt(channels)
    return float(root) if root * root == channels and root & (root - 1) == 0 else None


def with_scaled_queries(
    tensors: Mapping[str, LazyTensor], config: ModelConfig, factor: float
) -> dict[str, LazyTensor]:
    """Return a T5's tensors with all queries multiplied; the product is made in float32."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if ".linear_qkv." in name or ".linear_q." in name:
            kinds = 3 if ".linear_qkv." in name else 1  # q, k, v of each head, or q alone
            found[name] = ScaledRows(tensor, functools.partial(_factors, config, kinds, factor))
    return found


def _factors(config: ModelConfig, kinds: int, factor: float) -> Tensor:
    """Return a factor for each row of heads of so many kinds: 1 but for the queries, the first."""
    import torch

    factors = torch.ones(config.num_attention_heads, kinds, config.kv_channels)
    factors[:, 0] = factor
    return factors.flatten()


def with_unscaled_scores(checkpoint: Checkpoint, notes: list[str] | None = None) -> Checkpoint:
    """Return a T5 whose queries hold the factor of its scores, as transformers has them.

    Args:
        checkpoint: A T5.
        notes: Gets a sentence about what was changed.
    """
    c = checkpoint.config
    factor = c.softmax_scale or c.kv_channels**-0.5
    if factor == 1.0:
        return checkpoint
    tensors = with_scaled_queries(checkpoint.tensors, c, factor)
    if notes is not None:
        # A power of two changes no digit.
        rounding = "" if math.frexp(factor)[0] == 0.5 else ", rounded to their dtype"
        notes.append(
            f"queries are multiplied by {factor:g}{rounding}: transformers' T5 does not scale the "
            "scores of attention"
        )
    config = dataclasses.replace(c, softmax_scale=1.0)
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def with_plain_logits(checkpoint: Checkpoint) -> Checkpoint:
    """Return a T5 whose decoder's last norm holds the factor of its logits.

    The product is made in float32 and rounded to the gain's dtype.
    """
    c, name = checkpoint.config, "decoder.final_layernorm.weight"
    if c.logit_multiplier == 1.0:
        return checkpoint
    gain, factor = checkpoint.tensors[name], c.logit_multiplier
    scaled = Mapped(gain, lambda values: (values.float() * factor).to(gain.dtype), gain.kind)
    tensors = {**checkpoint.tensors, name: scaled}
    config = dataclasses.replace(c, logit_multiplier=1.0)
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def choose_t5(c: ModelConfig) -> Family:
    """Return the table of transformers' T5 that computes what the config says.

    Raises:
        InputError: There is none.
    """
    usual = c.softmax_scale in (None, 1.0)
    factors = (1.0, c.hidden_size**-0.5)
    scaled = c.logit_multiplier != 1.0
    for bad, what, why in (
        (
            not c.relative_positions,
            f"a T5 with {c.position_embedding_type} positions",
            "transformers' T5 has relative ones only",
        ),
        (
            c.normalization != "RMSNorm",
            f"a T5 with {c.normalization}",
            "transformers' T5 has RMSNorm",
        ),
        (c.add_bias_linear or c.add_qkv_bias, "a T5 with biases", "transformers' T5 has none"),
        (
            c.activation not in ACTIVATIONS_OF_T5.values(),
            f"a T5 with {c.activation} activations",
            "transformers' T5 has none such",
        ),
        (
            not usual,
            f"a T5 with softmax_scale {c.softmax_scale}",
            "transformers' T5 has no such setting",
        ),
        (
            scaled and c.untie_embeddings_and_output_weights,
            "a T5 with scaled logits and an output table of its own",
            "transformers' older versions scale those of a tied table only",
        ),
        (
            c.logit_multiplier not in factors or c.embedding_multiplier != 1.0,
            f"a T5 with factors of embeddings ({c.embedding_multiplier:g}) and logits "
            f"({c.logit_multiplier:g})",
            f"transformers' T5 has 1 and {c.hidden_size**-0.5:g}",
        ),
    ):
        if bad:
            raise InputError(
                f"{what} cannot be converted to Hugging Face: {why}; convert it --to megatron or "
                "--to torch_dist, which hold every T5 of Megatron's"
            )
    return GATED_T5 if c.gated else PLAIN_T5


def output_bias(checkpoint: Checkpoint, allow: bool) -> list[str]:
    """Return what leaving a T5's output bias out changes: nothing where it is zeros.

    Raises:
        InputError: It is not, and `allow` is off.
    """
    bias = checkpoint.tensors.get(OUTPUT_BIAS)
    if bias is None or not any(part.count_nonzero() for part in runs(bias)):
        return []
    what = "the output layer has a bias, which transformers' T5 has not"
    if not allow:
        raise InputError(
            f"this T5 cannot be converted to Hugging Face exactly: {what}; --allow-approximate "
            "leaves it out of the model, keeps it in the file as lm_head.bias and records the "
            "measured difference"
        )
    return [
        f"{what}: it stands in the file as lm_head.bias, which plain transformers passes over; add "
        "it to the logits (model.lm_head.bias = torch.nn.Parameter(bias))"
    ]


def t5_tensors(
    tensors: Mapping[str, LazyTensor], config: ModelConfig, *, keep_bias: bool
) -> dict[str, LazyTensor]:
    """Return the tensors to write: a tied table whose logits are not scaled comes twice.

    Args:
        tensors: By transformers' names.
        config: What is written.
        keep_bias: Keep the output's bias, which transformers passes over.
    """
    found = dict(tensors)
    if not keep_bias:
        found.pop("lm_head.bias", None)
    if not config.untie_embeddings_and_output_weights and config.logit_multiplier == 1.0:
        found["lm_head.weight"] = found["shared.weight"]
    return found


def write_t5(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that no setting of ModelConfig holds alone."""
    scaled = config.logit_multiplier != 1.0
    return {
        "is_encoder_decoder": True,
        "scale_decoder_outputs": scaled,
        # Versions before 5 scale where this is on, and take no table of its own then.
        "tie_word_embeddings": scaled,
    }
