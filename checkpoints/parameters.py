"""THE TABLE: every parameter of a model, its full shape, and how tensor parallelism cuts it.

Names and layout are megatron-core's, with separate norms. QKV rows stand in group order `[groups,
heads / groups + 2, head]` (Megatron checkpoint versions 2 and 3), a gated fc1 is `[gate; up]`.
Source: Megatron-LM paper, section 3; docs/megatron.md, "megatron-core names", "Tensor parallelism".
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Concat, Index, LazyTensor, Selected


@dataclass(frozen=True)
class ShardRule:
    """How one parameter is cut."""

    dim: int | None
    """The dim that is cut; None for a replicated parameter."""
    unit: str = "even"
    """What must stay whole: `even` (any equal cut), `vocab` (rows of ceil(V / tp), the last rank
    has the rest) or `qkv` (whole query groups; key and value heads are copied where tp exceeds
    them)."""
    blocks: int = 1
    """Packed equal blocks along `dim`, each cut on its own: 2 for `[gate; up]`."""
    heads: int = 0
    """Query heads, for `qkv`."""
    groups: int = 0
    """Key/value heads, for `qkv`."""

    def merge(self, parts: Sequence[LazyTensor]) -> LazyTensor:
        """Return the whole parameter from equal parts, in rank order: the inverse of `part`."""
        if self.dim is None or len(parts) == 1:
            return parts[0]
        if self.blocks == 1:
            return Concat(parts, self.dim)
        assert self.dim == 0, "packed blocks stand along dim 0"
        size = parts[0].shape[0] // self.blocks
        rows = [torch.arange(b * size, (b + 1) * size) for b in range(self.blocks)]
        return Concat([Selected(part, block) for block in rows for part in parts], 0)


REPLICATED = ShardRule(None)
COLUMN = ShardRule(0)
GATE_UP = ShardRule(0, blocks=2)
ROW = ShardRule(1)
VOCAB = ShardRule(0, "vocab")

TASK_HEADS = ("multichoice_head", "classification_head", "qa_head")
"""Heads of fine-tuned BERT models."""


@dataclass(frozen=True)
class Parameter:
    """One canonical parameter: its name, its shape in the whole model, and its shard rule."""

    name: str
    shape: tuple[int, ...]
    rule: ShardRule

    @property
    def dim(self) -> int:
        """The dim along which `index` and `part` count."""
        return self.rule.dim or 0

    def index(self, tp_rank: int, tp_size: int) -> Index:
        """Return which entries along `dim` one rank computes with (None: all of them).

        Raises:
            InputError: `tp_size` does not divide a block.
        """
        if self.rule.dim is None or tp_size == 1:
            return None
        return _as_index(self._runs(tp_rank, tp_size))

    def part(self, tp_rank: int, tp_size: int) -> Index:
        """Return which entries along `dim` one rank's file holds (None: all of them).

        Megatron's files hold equal parts, also where ranks that compute hold copies of a key/value
        head.

        Raises:
            InputError: `tp_size` does not divide a block.
        """
        if self.rule.dim is None or tp_size == 1:
            return None
        return _as_index(self._equal_runs(tp_rank, tp_size))

    def read_shard(self, tensor: LazyTensor, tp_rank: int, tp_size: int) -> Tensor:
        """Return what one rank computes with of the whole `tensor`; no more is read."""
        return tensor.read(self.dim, self.index(tp_rank, tp_size))

    def numel(self, tp_size: int = 1) -> int:
        """Return the number of weights; cut by `tp_size`, that of the rank with the most."""
        count = math.prod(self.shape)
        if self.rule.dim is None or tp_size == 1:
            return count
        return count // self.shape[self.dim] * sum(map(len, self._runs(0, tp_size)))

    def _runs(self, tp_rank: int, tp_size: int) -> list[range]:
        rule = self.rule
        if rule.unit == "vocab":
            return [range(*vocab_range(self.shape[self.dim], tp_rank, tp_size))]
        if rule.unit == "even":
            return self._equal_runs(tp_rank, tp_size)
        per_group = rule.heads // rule.groups
        channels = self.shape[self.dim] // (rule.heads + 2 * rule.groups)
        slots = []
        for heads, group in local_groups(rule.heads, rule.groups, tp_rank, tp_size):
            base = group * (per_group + 2)
            slots += [base + head - group * per_group for head in heads]
            slots += [base + per_group, base + per_group + 1]
        return [range(slot * channels, (slot + 1) * channels) for slot in slots]

    def _equal_runs(self, tp_rank: int, tp_size: int) -> list[range]:
        size, blocks = self.shape[self.dim], self.rule.blocks
        block = size // blocks
        if block % tp_size:
            allowed = [n for n in range(1, block + 1) if block % n == 0]
            raise InputError(
                f"cannot split {self.name} over tp={tp_size}: dim {self.dim} is {size} = "
                f"{blocks} block(s) of {block}, not divisible by {tp_size}; "
                f"this parameter allows tp in {', '.join(map(str, allowed))}"
            )
        part = block // tp_size
        starts = [b * block + tp_rank * part for b in range(blocks)]
        return [range(start, start + part) for start in starts]


def _as_index(runs: list[range]) -> Index:
    """Return runs of entries as a slice where they follow on one another, else as numbers."""
    if all(left.stop == right.start for left, right in itertools.pairwise(runs)):
        return slice(runs[0].start, runs[-1].stop)
    return torch.cat([torch.arange(run.start, run.stop) for run in runs])


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
    fc1_rows, fc1_rule = (2 * f, GATE_UP) if c.gated else (f, COLUMN)
    qkv = ShardRule(0, "qkv", heads=c.num_attention_heads, groups=c.num_query_groups)
    yield from _norm(c, f"{prefix}input_layernorm")
    attention = f"{prefix}self_attention."
    yield Parameter(f"{attention}linear_qkv.weight", (c.qkv_size, h), qkv)
    if c.add_qkv_bias:
        yield Parameter(f"{attention}linear_qkv.bias", (c.qkv_size,), qkv)
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


@functools.cache
def _rules() -> dict[str, ShardRule]:
    """Return the rules of all parameters that are cut, by the names of a model with one layer."""
    rules: dict[str, ShardRule] = {}
    for family in ("gpt", "bert"):
        small = ModelConfig(
            family, 1, 1, 1, 1, 1, 1, 1, 1, untie_embeddings_and_output_weights=True
        )
        rules |= {parameter.name: parameter.rule for parameter in _all(small)}
    return rules


def cut_dim(name: str) -> int | None:
    """Return the dim that tensor parallelism cuts of a parameter, whatever the model's config."""
    return _rules().get(re.sub(r"\.layers\.\d+\.", ".layers.0.", name), REPLICATED).dim


def num_parameters(config: ModelConfig) -> int:
    """Return the number of weights, tied embeddings counted once and padded rows included."""
    return sum(parameter.numel() for parameter in parameters(config).values())


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


def local_groups(
    heads: int, groups: int, tp_rank: int, tp_size: int
) -> list[tuple[list[int], int]]:
    """Return the query groups that one rank computes: (its query heads, the key/value head).

    Heads go to ranks in contiguous runs. With `tp_size` up to the number of groups each rank holds
    whole groups. Beyond, a key/value head is copied to every rank that has a query of its group;
    where a rank's run would cover groups unevenly each query head gets its own copy, so that the
    groups of one rank all have the same size.
    """
    per_group = heads // groups
    ours = range(tp_rank * heads // tp_size, (tp_rank + 1) * heads // tp_size)
    if groups % tp_size == 0:
        whole = range(tp_rank * groups // tp_size, (tp_rank + 1) * groups // tp_size)
        return [(list(range(g * per_group, (g + 1) * per_group)), g) for g in whole]
    if tp_size % groups == 0:
        return [(list(ours), ours[0] // per_group)]
    return [([head], head // per_group) for head in ours]


def vocab_range(vocab_size: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    """Return the rows of the vocabulary that a rank owns: ceil(V / tp), the last ones the rest."""
    chunk = -(-vocab_size // tp_size)
    return min(tp_rank * chunk, vocab_size), min((tp_rank + 1) * chunk, vocab_size)
