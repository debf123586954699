"""THE TABLE: every parameter of a model, its full shape, and how tensor parallelism cuts it.

Names and layout are megatron-core's, with separate norms. QKV rows stand in group order `[groups,
heads / groups + 2, head]` (Megatron checkpoint versions 2 and 3), a gated fc1 is `[gate; up]`.
Source: Megatron-LM paper, section 3; facts C.4 and D.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Index, as_index


@dataclass(frozen=True)
class ShardRule:
    """How one parameter is cut.

    Attributes:
        dim: The dim that is cut; None for a replicated parameter.
        unit: What must stay whole: `even` (any equal cut), `vocab` (rows of ceil(V / tp), the last
            rank has the rest) or `qkv` (whole query groups; key and value heads are copied where tp
            exceeds them).
        blocks: Packed equal blocks along `dim`, each cut on its own: 2 for `[gate; up]`.
    """

    dim: int | None
    unit: str = "even"
    blocks: int = 1


REPLICATED = ShardRule(None)
COLUMN = ShardRule(0)
GATED = ShardRule(0, blocks=2)
ROW = ShardRule(1)
VOCAB = ShardRule(0, "vocab")
QKV = ShardRule(0, "qkv")


@dataclass(frozen=True)
class Parameter:
    """One canonical parameter: its name, its shape in the whole model, and its shard rule."""

    name: str
    shape: tuple[int, ...]
    rule: ShardRule


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Return the parameters of a model, by canonical name, in the order of the forward pass."""
    return {parameter.name: parameter for parameter in _all(config)}


def _all(c: ModelConfig) -> Iterator[Parameter]:
    yield Parameter("embedding.word_embeddings.weight", (c.vocab_size, c.hidden_size), VOCAB)
    if c.learned_positions:
        shape = (c.max_position_embeddings, c.hidden_size)
        yield Parameter("embedding.position_embeddings.weight", shape, REPLICATED)
    if c.num_tokentypes:
        shape = (c.num_tokentypes, c.hidden_size)
        yield Parameter("embedding.tokentype_embeddings.weight", shape, REPLICATED)
    for layer in range(c.num_layers):
        yield from layer_parameters(c, layer)
    yield from _norm(c, f"{c.block}.final_layernorm")
    if c.family == "gpt":
        if c.untie_embeddings_and_output_weights:
            yield Parameter("output_layer.weight", (c.vocab_size, c.hidden_size), VOCAB)
    else:
        yield from _bert_heads(c)


def layer_parameters(c: ModelConfig, layer: int) -> Iterator[Parameter]:
    """Yield the parameters of one transformer layer."""
    h, f, hn = c.hidden_size, c.ffn_hidden_size, c.kv_channels
    prefix = f"{c.block}.layers.{layer}."
    fc1_rows, fc1_rule = (2 * f, GATED) if c.gated else (f, COLUMN)
    yield from _norm(c, f"{prefix}input_layernorm")
    attention = f"{prefix}self_attention."
    yield Parameter(f"{attention}linear_qkv.weight", (c.qkv_size, h), QKV)
    if c.add_qkv_bias:
        yield Parameter(f"{attention}linear_qkv.bias", (c.qkv_size,), QKV)
    if c.qk_layernorm:
        for name in ("q_layernorm", "k_layernorm"):
            yield Parameter(f"{attention}{name}.weight", (hn,), REPLICATED)
            if c.qk_layernorm_bias:
                yield Parameter(f"{attention}{name}.bias", (hn,), REPLICATED)
    yield Parameter(f"{attention}linear_proj.weight", (h, c.num_attention_heads * hn), ROW)
    if c.add_bias_linear:
        yield Parameter(f"{attention}linear_proj.bias", (h,), REPLICATED)
    yield from _norm(c, f"{prefix}pre_mlp_layernorm")
    yield Parameter(f"{prefix}mlp.linear_fc1.weight", (fc1_rows, h), fc1_rule)
    if c.add_bias_linear:
        yield Parameter(f"{prefix}mlp.linear_fc1.bias", (fc1_rows,), fc1_rule)
    yield Parameter(f"{prefix}mlp.linear_fc2.weight", (h, f), ROW)
    if c.add_bias_linear:
        yield Parameter(f"{prefix}mlp.linear_fc2.bias", (h,), REPLICATED)


def _norm(c: ModelConfig, name: str) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (c.hidden_size,), REPLICATED)
    if c.normalization == "LayerNorm":
        yield Parameter(f"{name}.bias", (c.hidden_size,), REPLICATED)


def _bert_heads(c: ModelConfig) -> Iterator[Parameter]:
    h = c.hidden_size
    if c.lm_head:
        yield Parameter("lm_head.dense.weight", (h, h), REPLICATED)
        yield Parameter("lm_head.dense.bias", (h,), REPLICATED)
        yield Parameter("lm_head.layer_norm.weight", (h,), REPLICATED)
        if c.normalization == "LayerNorm":
            yield Parameter("lm_head.layer_norm.bias", (h,), REPLICATED)
        if c.untie_embeddings_and_output_weights:
            yield Parameter("output_layer.weight", (c.vocab_size, h), VOCAB)
        yield Parameter("output_layer.bias", (c.vocab_size,), VOCAB)
    if c.pooler:
        yield from _linear("pooler.dense", h, h)
    if c.binary_head:
        yield from _linear("binary_head", 2, h)
    if c.num_classes:
        yield from _linear("classification_head", c.num_classes, h)
    if c.multichoice_head:
        yield from _linear("multichoice_head", 1, h)
    if c.qa_head:
        yield from _linear("qa_head", 2, h)


def _linear(name: str, rows: int, columns: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (rows, columns), REPLICATED)
    yield Parameter(f"{name}.bias", (rows,), REPLICATED)


def num_parameters(config: ModelConfig) -> int:
    """Return the number of weights, tied embeddings counted once and padded rows included."""
    total = 0
    for parameter in parameters(config).values():
        count = 1
        for size in parameter.shape:
            count *= size
        total += count
    return total


def allowed_tp(config: ModelConfig, limit: int = 1024) -> list[int]:
    """Return the tensor-parallel sizes that a model can be cut into."""
    heads, ffn = config.num_attention_heads, config.ffn_hidden_size
    return [n for n in range(1, min(heads, limit) + 1) if heads % n == 0 and ffn % n == 0]


def check_tp(config: ModelConfig, tp_size: int) -> None:
    """Refuse a tensor-parallel size that does not divide the model.

    Raises:
        InputError: `tp_size` does not divide the attention heads or the MLP's width.
    """
    allowed = allowed_tp(config)
    if tp_size not in allowed:
        raise InputError(
            f"cannot split this model over tp={tp_size}: it has {config.num_attention_heads} "
            f"attention heads and an MLP of width {config.ffn_hidden_size}, and tp must divide "
            f"both; it allows tp in {', '.join(map(str, allowed))}"
        )


def local_groups(config: ModelConfig, tp_rank: int, tp_size: int) -> list[tuple[list[int], int]]:
    """Return the query groups that one rank computes: (its query heads, the key/value head).

    Heads go to ranks in contiguous runs. With `tp_size` up to the number of groups each rank holds
    whole groups. Beyond, a key/value head is copied to every rank that has a query of its group;
    where a rank's run would cover groups unevenly each query head gets its own copy, so that the
    groups of one rank all have the same size.
    """
    n, ng = config.num_attention_heads, config.num_query_groups
    per_group = n // ng
    heads = range(tp_rank * n // tp_size, (tp_rank + 1) * n // tp_size)
    if ng % tp_size == 0:
        first, count = tp_rank * ng // tp_size, ng // tp_size
        return [
            (list(range(g * per_group, (g + 1) * per_group)), g)
            for g in range(first, first + count)
        ]
    if tp_size % ng == 0:
        return [(list(heads), heads[0] // per_group)]
    return [([head], head // per_group) for head in heads]


def shard_index(parameter: Parameter, config: ModelConfig, tp_rank: int, tp_size: int) -> Index:
    """Return which entries along `parameter.rule.dim` belong to one rank (None: all of them)."""
    rule = parameter.rule
    if rule.dim is None or tp_size == 1:
        return None
    size = parameter.shape[rule.dim]
    if rule.unit == "vocab":
        start, stop = vocab_range(size, tp_rank, tp_size)
        return slice(start, stop)
    if rule.unit == "qkv":
        return _qkv_index(config, tp_rank, tp_size)
    block = size // rule.blocks
    if block % tp_size:
        raise InputError(
            f"cannot split {parameter.name} over tp={tp_size}: dim {rule.dim} is {size} = "
            f"{rule.blocks} block(s) of {block}, not divisible by {tp_size}; "
            f"this model allows tp in {', '.join(map(str, allowed_tp(config)))}"
        )
    part = block // tp_size
    starts = [b * block + tp_rank * part for b in range(rule.blocks)]
    return as_index(torch.cat([torch.arange(start, start + part) for start in starts]))


def vocab_range(vocab_size: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    """Return the rows of the vocabulary that a rank owns: ceil(V / tp), the last ones the rest."""
    chunk = -(-vocab_size // tp_size)
    return min(tp_rank * chunk, vocab_size), min((tp_rank + 1) * chunk, vocab_size)


def _qkv_index(config: ModelConfig, tp_rank: int, tp_size: int) -> Index:
    n, ng, hn = config.num_attention_heads, config.num_query_groups, config.kv_channels
    per_group = n // ng
    channels = torch.arange(hn)
    runs = []
    for heads, group in local_groups(config, tp_rank, tp_size):
        base = group * (per_group + 2)
        slots = [base + head - group * per_group for head in heads]
        slots += [base + per_group, base + per_group + 1]
        runs += [slot * hn + channels for slot in slots]
    return as_index(torch.cat(runs))
