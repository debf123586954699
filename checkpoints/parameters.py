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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Concat, Index, LazyTensor, RowOrder, Selected, rows_between

if TYPE_CHECKING:
    from torch import Tensor

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
"""The table that every model has; its rows are the vocabulary, its dtype the model's."""


@dataclass(frozen=True)
class ShardRule:
    """How one parameter is cut."""

    dim: int | None
    """The dim that is cut; None for a replicated parameter."""
    unit: str = "even"
    """What must stay whole: `even` (any equal cut), `vocab` (rows of ceil(V / tp), the last rank
    has the rest), `qkv` (whole query groups; key and value heads are copied where tp exceeds
    them) or `parts` (the units of each packed part; copied where tp exceeds them)."""
    blocks: int = 1
    """Packed equal blocks along `dim`, each cut on its own: 2 for `[gate; up]`."""
    heads: int = 0
    """Query heads, for `qkv`."""
    groups: int = 0
    """Key/value heads, for `qkv`."""
    gates: bool = False
    """Each group of `qkv` has as many heads of gates after its queries."""
    parts: tuple[tuple[int, int], ...] = ()
    """Of each packed part along `dim` its size and its units, for `parts`; cut on its own."""

    def merge(self, parts: Sequence[LazyTensor]) -> LazyTensor:
        """Return the whole parameter from equal parts, in rank order: the inverse of `part`."""
        if self.dim is None or len(parts) == 1:
            return parts[0]
        if self.blocks == 1 and not self.parts:
            return Concat(parts, self.dim)
        assert self.dim == 0, "packed blocks stand along dim 0 of what files hold"
        sizes = [size // len(parts) for size, _ in self.parts]
        sizes = sizes or [parts[0].shape[0] // self.blocks] * self.blocks
        if any(part.shape[0] != sum(sizes) for part in parts):
            return Concat(parts, 0)  # of another shape than the table's, which refuses it by name
        ends = itertools.accumulate(sizes)
        rows = [rows_between(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        return Concat([Selected(part, block) for block in rows for part in parts], 0)


REPLICATED = ShardRule(None)
COLUMN = ShardRule(0)
GATE_UP = ShardRule(0, blocks=2)
ROW = ShardRule(1)
VOCAB = ShardRule(0, "vocab")
EXPERT_COLUMN = ShardRule(1)
EXPERT_GATE_UP = ShardRule(1, blocks=2)
EXPERT_ROW = ShardRule(2)
"""Experts stand along dim 0; each rank holds a part of the width of every one."""

RELATIVE_BIASES = (
    "encoder_relative_pos_emb.relative_attention_bias.weight",
    "decoder_relative_pos_emb.relative_attention_bias.weight",
)
"""T5's tables of relative positions, one for all layers of a stack. Every rank has them whole and
takes the columns of its heads."""

MAMBA_VECTORS = ("A_log", "D", "dt_bias")
"""Numbers of the heads of Mamba-2, whose names end neither with weight nor with bias."""

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
        if rule.unit == "parts":
            return self._runs_of_units(tp_rank, tp_size)
        per_group = rule.heads // rule.groups
        own = per_group * (2 if rule.gates else 1)  # slots of a group before its key and value
        channels = self.shape[self.dim] // ((own + 2) * rule.groups)
        slots = []
        for heads, group in local_groups(rule.heads, rule.groups, tp_rank, tp_size):
            base = group * (own + 2)
            queries = [base + head - group * per_group for head in heads]
            slots += queries + ([slot + per_group for slot in queries] if rule.gates else [])
            slots += [base + own, base + own + 1]
        return [range(slot * channels, (slot + 1) * channels) for slot in slots]

    def _runs_of_units(self, tp_rank: int, tp_size: int) -> list[range]:
        runs, start = [], 0
        for size, units in self.rule.parts:
            width = size // units
            own = local_units(units, tp_rank, tp_size)
            runs.append(range(start + own.start * width, start + own.stop * width))
            start += size
        return runs

    def _equal_runs(self, tp_rank: int, tp_size: int) -> list[range]:
        if self.rule.parts:
            if lost := next((units for _, units in self.rule.parts if units % tp_size), None):
                raise InputError(
                    f"cannot split {self.name} over tp={tp_size}: a part of it has {lost} heads or "
                    f"groups, which {tp_size} does not divide"
                )
            return self._runs_of_units(tp_rank, tp_size)
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
    import torch

    return torch.cat([torch.arange(run.start, run.stop) for run in runs])


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Return the parameters of a model, by canonical name, in the order of the forward pass."""
    return {parameter.name: parameter for parameter in _all(config)}


def _all(c: ModelConfig) -> Iterator[Parameter]:
    yield Parameter(WORD_EMBEDDINGS, (c.vocab_size, c.hidden_size), VOCAB)
    if c.embedding_layernorm:
        yield from _norm(c, "embedding.word_embeddings_layernorm")
    if c.learned_positions:
        shape = (c.max_position_embeddings, c.hidden_size)
        yield Parameter("embedding.position_embeddings.weight", shape, REPLICATED)
    if c.num_tokentypes:
        shape = (c.num_tokentypes, c.hidden_size)
        yield Parameter("embedding.tokentype_embeddings.weight", shape, REPLICATED)
    if c.relative_positions:
        shape = (c.relative_attention_num_buckets, c.num_attention_heads)
        for name in RELATIVE_BIASES:
            yield Parameter(name, shape, REPLICATED)
    for layer in range(c.num_layers):
        yield from layer_parameters(c, layer)
    yield from _norm(c, f"{c.block}.final_layernorm")
    if c.family == "t5":
        yield from _t5_decoder(c)
    elif c.family == "gpt":
        if c.untie_embeddings_and_output_weights:
            yield Parameter("output_layer.weight", (c.vocab_size, c.hidden_size), VOCAB)
    else:
        yield from _bert_heads(c)


def layer_parameters(c: ModelConfig, layer: int) -> Iterator[Parameter]:
    """Yield the parameters of one transformer layer."""
    prefix, own = f"{c.block}.layers.{layer}.", c.of_layer(layer)
    mixer, feed_forward = c.mixer(layer), c.feed_forward(layer)
    if mixer != "none":
        yield from _norm(c, f"{prefix}input_layernorm")
    if mixer == "mamba":
        yield from _mamba(c, f"{prefix}mixer.")
    elif mixer == "linear":
        yield from _square(c, f"{prefix}self_attention")
    elif mixer == "attention":
        attention = _latent_attention if c.multi_latent_attention else _attention
        yield from attention(own, f"{prefix}self_attention.")
    if feed_forward != "none":
        yield from _norm(c, f"{prefix}pre_mlp_layernorm")
    if feed_forward == "experts":
        yield from _experts(c, f"{prefix}mlp.")
    elif feed_forward == "linear":
        yield from _square(c, f"{prefix}mlp")
    elif feed_forward == "plain MLP":
        yield from _mlp(c, f"{prefix}mlp.", own.ffn_hidden_size, bias=c.add_bias_linear)
        if c.branch_layernorm:
            yield from _norm(c, f"{prefix}mlp.linear_fc2.post_layernorm")


def _square(c: ModelConfig, name: str) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (c.hidden_size, c.hidden_size), COLUMN)
    if c.add_bias_linear:
        yield Parameter(f"{name}.bias", (c.hidden_size,), COLUMN)


def _mamba(c: ModelConfig, prefix: str) -> Iterator[Parameter]:
    packed, convolved = c.mamba_parts, c.mamba_parts[1:4]
    rows, channels = (sum(size for size, _ in parts) for parts in (packed, convolved))
    yield Parameter(f"{prefix}in_proj.weight", (rows, c.hidden_size), _parts(packed))
    shape = (channels, 1, c.mamba_conv_width)
    yield Parameter(f"{prefix}conv1d.weight", shape, _parts(convolved))
    yield Parameter(f"{prefix}conv1d.bias", (channels,), _parts(convolved))
    for name in MAMBA_VECTORS:
        yield Parameter(f"{prefix}{name}", (c.mamba_num_heads,), COLUMN)
    yield Parameter(f"{prefix}norm.weight", (c.mamba_width,), COLUMN)
    yield Parameter(f"{prefix}out_proj.weight", (c.hidden_size, c.mamba_width), ROW)


def _parts(parts: tuple[tuple[int, int], ...]) -> ShardRule:
    return ShardRule(0, "parts", parts=parts)


def _t5_decoder(c: ModelConfig) -> Iterator[Parameter]:
    """Yield T5's second stack, each layer with cross-attention, and what follows it."""
    for layer in range(c.decoder_num_layers):
        prefix = f"decoder.layers.{layer}."
        yield from _norm(c, f"{prefix}input_layernorm")
        yield from _attention(c, f"{prefix}self_attention.")
        yield from _norm(c, f"{prefix}pre_cross_attn_layernorm")
        yield from _cross_attention(c, f"{prefix}cross_attention.")
        yield from _norm(c, f"{prefix}pre_mlp_layernorm")
        yield from _mlp(c, f"{prefix}mlp.", c.ffn_hidden_size, bias=c.add_bias_linear)
    yield from _norm(c, "decoder.final_layernorm")
    if c.untie_embeddings_and_output_weights:  # then it has no bias
        yield Parameter("output_layer.weight", (c.vocab_size, c.hidden_size), VOCAB)
    else:
        yield Parameter("output_layer.bias", (c.vocab_size,), VOCAB)


def _cross_attention(c: ModelConfig, prefix: str) -> Iterator[Parameter]:
    """Yield queries of the decoder, keys and values of the encoder: of each head k, then v."""
    h, width = c.hidden_size, c.attention_width
    for name, rows in (("linear_q", width), ("linear_kv", 2 * width)):
        yield Parameter(f"{prefix}{name}.weight", (rows, h), COLUMN)
        if c.add_qkv_bias:
            yield Parameter(f"{prefix}{name}.bias", (rows,), COLUMN)
    yield from _projection(c, prefix)


def _attention(c: ModelConfig, prefix: str) -> Iterator[Parameter]:
    h, hn = c.hidden_size, c.kv_channels
    qkv = ShardRule(
        0,
        "qkv",
        heads=c.num_attention_heads,
        groups=c.num_query_groups,
        gates=c.attention_output_gate,
    )
    yield Parameter(f"{prefix}linear_qkv.weight", (c.qkv_size, h), qkv)
    if c.add_qkv_bias:
        yield Parameter(f"{prefix}linear_qkv.bias", (c.qkv_size,), qkv)
    if c.qk_layernorm:
        for name in ("q_layernorm", "k_layernorm"):
            yield Parameter(f"{prefix}{name}.weight", (hn,), REPLICATED)
            if c.qk_layernorm_bias:
                yield Parameter(f"{prefix}{name}.bias", (hn,), REPLICATED)
    yield from _sinks(c, prefix)
    yield from _projection(c, prefix)


def _latent_attention(c: ModelConfig, prefix: str) -> Iterator[Parameter]:
    h, n, positions = c.hidden_size, c.num_attention_heads, c.qk_pos_emb_head_dim
    queries = n * (c.qk_head_dim + positions)
    if c.q_lora_rank:
        yield Parameter(f"{prefix}linear_q_down_proj.weight", (c.q_lora_rank, h), REPLICATED)
        if c.qk_layernorm:
            yield from _norm(c, f"{prefix}q_layernorm", c.q_lora_rank)
        yield Parameter(f"{prefix}linear_q_up_proj.weight", (queries, c.q_lora_rank), COLUMN)
    else:
        yield Parameter(f"{prefix}linear_q_proj.weight", (queries, h), COLUMN)
    latent = c.kv_lora_rank + positions
    yield Parameter(f"{prefix}linear_kv_down_proj.weight", (latent, h), REPLICATED)
    if c.qk_layernorm:
        yield from _norm(c, f"{prefix}kv_layernorm", c.kv_lora_rank)
    rows = n * (c.qk_head_dim + c.v_head_dim)
    yield Parameter(f"{prefix}linear_kv_up_proj.weight", (rows, c.kv_lora_rank), COLUMN)
    yield from _sinks(c, prefix)
    yield from _projection(c, prefix)


def _sinks(c: ModelConfig, prefix: str) -> Iterator[Parameter]:
    if c.softmax_type == "learnable":
        name = f"{prefix}core_attention.softmax_offset"
        yield Parameter(name, (c.num_attention_heads,), COLUMN)


def _projection(c: ModelConfig, prefix: str) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}linear_proj.weight", (c.hidden_size, c.attention_width), ROW)
    if c.branch_layernorm:
        yield from _norm(c, f"{prefix}linear_proj.post_layernorm")
    if c.add_bias_linear:
        yield Parameter(f"{prefix}linear_proj.bias", (c.hidden_size,), REPLICATED)


def _mlp(c: ModelConfig, prefix: str, width: int, *, bias: bool) -> Iterator[Parameter]:
    rows, rule = (2 * width, GATE_UP) if c.gated else (width, COLUMN)
    yield Parameter(f"{prefix}linear_fc1.weight", (rows, c.hidden_size), rule)
    if bias:
        yield Parameter(f"{prefix}linear_fc1.bias", (rows,), rule)
    yield Parameter(f"{prefix}linear_fc2.weight", (c.hidden_size, width), ROW)
    if bias:
        yield Parameter(f"{prefix}linear_fc2.bias", (c.hidden_size,), REPLICATED)


def _experts(c: ModelConfig, prefix: str) -> Iterator[Parameter]:
    h, count, width = c.hidden_size, c.num_experts, c.moe_ffn_hidden_size
    yield Parameter(f"{prefix}router.weight", (count, h), REPLICATED)
    if c.moe_router_bias:
        yield Parameter(f"{prefix}router.bias", (count,), REPLICATED)
    if c.moe_router_enable_expert_bias:
        yield Parameter(f"{prefix}router.expert_bias", (count,), REPLICATED)
    rows, rule = (2 * width, EXPERT_GATE_UP) if c.gated else (width, EXPERT_COLUMN)
    yield Parameter(f"{prefix}experts.linear_fc1.weight", (count, rows, h), rule)
    if c.add_bias_linear:
        yield Parameter(f"{prefix}experts.linear_fc1.bias", (count, rows), rule)
    yield Parameter(f"{prefix}experts.linear_fc2.weight", (count, h, width), EXPERT_ROW)
    if c.add_bias_linear:
        yield Parameter(f"{prefix}experts.linear_fc2.bias", (count, h), REPLICATED)
    shared = c.moe_shared_expert_intermediate_size
    if shared:
        yield from _mlp(c, f"{prefix}shared_experts.", shared, bias=False)
        if c.moe_shared_expert_gate:
            yield Parameter(f"{prefix}shared_experts.gate_weight", (1, h), REPLICATED)


def prediction_parameters(c: ModelConfig, heads: int) -> dict[str, Parameter]:
    """Return the parameters of the heads of multi-token prediction, by name.

    Each holds a layer like the model's last. No evaluation needs them: they are for conversions.
    Source: docs/megatron.md, "Multi-token prediction".
    """
    found: list[Parameter] = []
    last = f"{c.block}.layers.{c.num_layers - 1}."
    for head in range(heads):
        prefix = f"mtp.layers.{head}."
        found += [*_norm(c, f"{prefix}enorm"), *_norm(c, f"{prefix}hnorm")]
        shape = (c.hidden_size, 2 * c.hidden_size)
        found.append(Parameter(f"{prefix}eh_proj.weight", shape, COLUMN))
        for parameter in layer_parameters(c, c.num_layers - 1):
            name = f"{prefix}transformer_layer.{parameter.name.removeprefix(last)}"
            found.append(Parameter(name, parameter.shape, parameter.rule))
        found += _norm(c, f"{prefix}final_layernorm")
    return {parameter.name: parameter for parameter in found}


def num_prediction_heads(names: Iterable[str]) -> int:
    """Return the number of heads of multi-token prediction, given their parameters' names."""
    return len({found["head"] for name in names if (found := PREDICTION_NAME.match(name))})


PREDICTION_NAME = re.compile(r"mtp\.layers\.(?P<head>\d+)\.(?P<rest>.+)")
"""A parameter of a head of multi-token prediction: which head's, and what of it."""


def _norm(c: ModelConfig, name: str, width: int | None = None) -> Iterator[Parameter]:
    shape = (width or c.hidden_size,)
    yield Parameter(f"{name}.weight", shape, REPLICATED)
    if c.normalization == "LayerNorm":
        yield Parameter(f"{name}.bias", shape, REPLICATED)


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
    experts = dict(
        num_experts=1,
        moe_layers=(0,),
        moe_router_topk=1,
        moe_ffn_hidden_size=1,
        moe_shared_expert_intermediate_size=1,
        softmax_type="learnable",
    )
    latents = dict(
        multi_latent_attention=True,
        kv_lora_rank=1,
        qk_head_dim=1,
        qk_pos_emb_head_dim=2,
        v_head_dim=1,
    )
    mamba = dict(
        mamba_layers=(0,),
        linear_mlp_layers=(0,),
        mamba_num_heads=1,
        mamba_head_dim=1,
        mamba_num_groups=1,
        mamba_state_dim=1,
        mamba_conv_width=1,
    )
    for family, more in (
        ("gpt", {}),
        ("bert", {}),
        ("t5", {"decoder_num_layers": 1}),
        ("gpt", mamba),
        ("gpt", {"linear_mixer_layers": (0,)}),
        ("gpt", experts),
        ("gpt", latents),
        ("gpt", latents | {"q_lora_rank": 1}),
    ):
        small = ModelConfig(
            family, 1, 1, 1, 1, 1, 1, 1, 1, untie_embeddings_and_output_weights=True, **more
        )
        rules |= {parameter.name: parameter.rule for parameter in _all(small)}
    return rules


def stays_float32(name: str) -> bool:
    """Whether a parameter is float32 whatever the dtype of the others: it decides close calls."""
    return name.endswith(".router.expert_bias")


def cut_dim(name: str) -> int | None:
    """Return the dim that tensor parallelism cuts of a parameter, whatever the model's config."""
    return _rules().get(re.sub(r"\.layers\.\d+\.", ".layers.0.", name), REPLICATED).dim


def num_parameters(config: ModelConfig) -> int:
    """Return the number of weights, tied embeddings counted once and padded rows included."""
    return sum(parameter.numel() for parameter in parameters(config).values())


def active_parameters(config: ModelConfig) -> int:
    """Return the weights that a token meets: all but those of experts that it is not sent to."""
    left_out = (config.num_experts - config.moe_router_topk) * len(config.moe_layers)
    matrices = 3 if config.gated else 2
    biases = config.moe_ffn_hidden_size * (matrices - 1) + config.hidden_size
    width = config.moe_ffn_hidden_size * config.hidden_size
    each = matrices * width + (biases if config.add_bias_linear else 0)
    return num_parameters(config) - left_out * each


def allowed_tp(config: ModelConfig, limit: int = 1024) -> list[int]:
    """Return the tensor-parallel sizes that a model can be cut into."""
    cut = _cut_widths(config).values()
    groups = config.mamba_num_groups if config.mamba_layers else 1
    return [
        n
        for n in range(1, min(max(cut, default=1), limit) + 1)
        if all(w % n == 0 for w in cut) and (groups % n == 0 or n % groups == 0)
    ]


def check_tp(config: ModelConfig, tp_size: int) -> None:
    """Refuse a tensor-parallel size that does not divide the model.

    Raises:
        InputError: `tp_size` does not divide the heads or a width that ranks share equally.
    """
    allowed = allowed_tp(config)
    if tp_size not in allowed:
        cut = list(_cut_widths(config))
        every = {1: "it", 2: "both"}.get(len(cut), "all of them")
        raise InputError(
            f"cannot split this model over tp={tp_size}: it has {' and '.join(cut)}, and tp must "
            f"divide {every}; it allows tp in {', '.join(map(str, allowed))}"
        )


def _cut_widths(config: ModelConfig) -> dict[str, int]:
    """Return what ranks share equally, in words and by number: heads and widths."""
    layers = range(config.num_layers)
    attends = any(config.mixer(layer) == "attention" for layer in layers)
    heads = {
        "attention heads": config.num_attention_heads if attends else 0,
        "Mamba heads": config.mamba_num_heads if config.mamba_layers else 0,
    }
    widths: dict[str, set[int]] = {
        "an MLP": set(config.layer_ffn_hidden_sizes or [config.ffn_hidden_size]),
        "experts": {config.moe_ffn_hidden_size},
        "a shared expert": {config.moe_shared_expert_intermediate_size},
        "a matrix in a branch's place": {config.hidden_size},
    }
    if not config.dense_layers:
        del widths["an MLP"]
    if not config.linear_mixer_layers and not config.linear_mlp_layers:
        del widths["a matrix in a branch's place"]
    found = {f"{count} {what}": count for what, count in heads.items() if count}
    for what, values in widths.items():
        found |= {f"{what} of width {width}": width for width in sorted(values) if width}
    return found


def local_units(units: int, tp_rank: int, tp_size: int) -> range:
    """Return which of some units one rank has: an equal share, or the one that it shares."""
    if units % tp_size == 0:
        return range(tp_rank * units // tp_size, (tp_rank + 1) * units // tp_size)
    assert tp_size % units == 0, (units, tp_size)
    own = tp_rank * units // tp_size
    return range(own, own + 1)


@functools.lru_cache(maxsize=8)
def group_order(heads: int, groups: int, channels: int) -> RowOrder:
    """Return where each QKV row in group order stands in `[all queries; all keys; all values]`."""
    return RowOrder((heads + 2 * groups) * channels, _group_order, heads, groups, channels)


def _group_order(heads: int, groups: int, channels: int) -> Tensor:
    import torch

    query = torch.arange(heads * channels).view(groups, heads // groups, channels)
    key = torch.arange(groups * channels).view(groups, 1, channels) + heads * channels
    return torch.cat([query, key, key + groups * channels], dim=1).reshape(-1)


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
