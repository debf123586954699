"""Two checkpoints compared by their settings and by every element of their weights.

Both are read in canonical form, a few megabytes at a time, so that models of any size are compared
on a laptop. What one function has two forms of (gains stored minus 1, the order of rotary channels,
absent biases, a tied table) is brought to one form first, and only where the two differ in it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint, with_each
from mlm_eval.checkpoints.comparison import (
    ElementDifference,
    PaddingComparison,
    WeightComparison,
)
from mlm_eval.checkpoints.config import ModelConfig, YarnScaling
from mlm_eval.checkpoints.dtypes import dtype_name
from mlm_eval.checkpoints.huggingface.folds import (
    is_gain,
    with_halved_rotary,
    with_plain_gains,
)
from mlm_eval.checkpoints.huggingface.t5 import with_plain_logits, with_unscaled_scores
from mlm_eval.checkpoints.lazy import LazyTensor, cast_to
from mlm_eval.checkpoints.parameters import (
    WORD_EMBEDDINGS,
    num_prediction_heads,
    parameters,
    prediction_parameters,
)

BLOCK = 16 << 20
"""Bytes of one side that are compared at a time."""

HARMLESS = ("params_dtype", "hidden_dropout", "attention_dropout", "init_method_std")
"""Settings of storage and of training, which change no result."""

BY_WEIGHTS = (
    *("vocab_size", "max_position_embeddings", "position_embedding_type", "num_tokentypes"),
    *("add_bias_linear", "add_qkv_bias", "qk_layernorm_bias"),
    *("untie_embeddings_and_output_weights", "lm_head", "pooler", "binary_head", "num_classes"),
    *("multichoice_head", "qa_head"),
    *("moe_router_enable_expert_bias", "moe_shared_expert_intermediate_size"),
)
"""Settings that only say which tensors there are and how large: the tensors are compared."""

CLOSE = 1e-6
"""Relative difference of two numbers that are one number in float32, as some files write them."""

Labels = tuple[str, str]
"""What phrases call the two sides."""


def one_form(
    ours: Checkpoint, theirs: Checkpoint, *, rounded: bool = False
) -> tuple[Checkpoint, Checkpoint, list[str]]:
    """Return two checkpoints with their norms' gains and rotary pairs in the same form.

    Only where the two differ in it; what was changed comes last, a sentence each.

    Args:
        ours: A checkpoint.
        theirs: The other.
        rounded: Round gains to the wider of the two stored dtypes once 1 is added, as a writer
            does; else they stay in float32.
    """
    forms = []
    a, b = ours.config, theirs.config
    if a.layernorm_zero_centered_gamma != b.layernorm_zero_centered_gamma:
        ours, theirs = (
            _plain_gains(ours, theirs, rounded=rounded),
            _plain_gains(theirs, ours, rounded=rounded),
        )
        forms.append("one side stores the norms' gains minus 1: 1 is added")
    if a.rotary and b.rotary and a.rotary_interleaved != b.rotary_interleaved:
        ours, theirs = with_halved_rotary(ours), with_halved_rotary(theirs)
        forms.append(
            "one side rotates channels 2i and 2i + 1, the other i and i + d/2: queries and keys "
            "are reordered alike"
        )
    if a.family == b.family == "t5":
        if not _equal_values(a.softmax_scale, b.softmax_scale):
            ours, theirs = with_unscaled_scores(ours), with_unscaled_scores(theirs)
            forms.append("one side scales the scores of attention, the other its queries")
        if not _equal_values(a.logit_multiplier, b.logit_multiplier):
            ours, theirs = with_plain_logits(ours), with_plain_logits(theirs)
            forms.append("one side scales its logits, the other the decoder's last norm")
    return ours, theirs, forms


def _plain_gains(checkpoint: Checkpoint, other: Checkpoint, *, rounded: bool) -> Checkpoint:
    if not checkpoint.config.layernorm_zero_centered_gamma:
        return checkpoint
    known = {**other.prediction_heads, **other.tensors}

    def widened(name: str, tensor: LazyTensor) -> LazyTensor:
        if not is_gain(name):
            return tensor
        as_stored = rounded and name in known
        wide = torch.promote_types(tensor.dtype, known[name].dtype) if as_stored else torch.float32
        return cast_to(tensor, wide)

    return with_plain_gains(with_each(checkpoint, widened))


def compare_settings(
    ours: ModelConfig, theirs: ModelConfig, sides: Labels
) -> tuple[list[str], list[str]]:
    """Return the settings that differ and change the function, a phrase each, and remarks.

    Every field counts that is not listed as harmless or as told by the weights, but for those of a
    part that one of the models lacks: that is told already.
    """
    differing, remarks = [], []
    for setting in dataclasses.fields(ModelConfig):
        name = setting.name
        a, b = _meaning(name, ours), _meaning(name, theirs)
        if name in (*HARMLESS, *BY_WEIGHTS) or not (_in_use(name, ours) and _in_use(name, theirs)):
            continue
        if not _equal_values(a, b):
            differing.append(f"{name} is {a} in {sides[0]} and {b} in {sides[1]}")
    if ours.rotary != theirs.rotary:
        kinds = [config.position_embedding_type for config in (ours, theirs)]
        differing.append(
            f"position_embedding_type is {kinds[0]} in {sides[0]} and {kinds[1]} in {sides[1]}"
        )
    lengths = (ours.max_position_embeddings, theirs.max_position_embeddings)
    if lengths[0] != lengths[1]:
        remarks.append(
            f"{sides[0]} takes {lengths[0]:,} positions and {sides[1]} {lengths[1]:,}: the verdict "
            "is about those that both take"
        )
    return differing, remarks


def _in_use(name: str, config: ModelConfig) -> bool:
    """Whether a model has the part that a setting is about."""
    if name in ("rotary_percent", "rotary_interleaved", "kv_channels", "num_query_groups"):
        # Latent attention has channels of its own, all heads of keys, and pairs side by side.
        return not config.multi_latent_attention and (config.rotary or name[:6] != "rotary")
    if name == "latent_layernorm_epsilon":
        return config.multi_latent_attention
    if name == "moe_shared_expert_gate":
        return bool(config.moe_shared_expert_intermediate_size)
    if name.startswith(("rotary_", "rope_")):
        return config.rotary
    if name == "ffn_hidden_size":
        return bool(config.dense_layers)
    return name != "head_activation" or (config.family == "bert" and config.lm_head)


def _meaning(name: str, config: ModelConfig) -> Any:
    """Return the value of a setting, in one form where one function has two."""
    value = getattr(config, name)
    if name == "rotary_percent":
        return int(config.kv_channels * value) / config.kv_channels
    if name == "latent_layernorm_epsilon":
        return config.layernorm_epsilon if value is None else value
    return None if name == "rotary_seq_len_interpolation_factor" and value == 1.0 else value


def _equal_values(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float | int) and not isinstance(b, bool):
        return math.isclose(a, b, rel_tol=CLOSE)
    if isinstance(a, YarnScaling) and isinstance(b, YarnScaling):
        return a.same_as(b)
    return bool(a == b)


def compare_weights(
    ours: Checkpoint,
    theirs: Checkpoint,
    *,
    entries: int | None = None,
    sides: Labels = ("the first", "the second"),
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[WeightComparison, PaddingComparison | None]:
    """Return how far all weights of two models are apart, and their rows of padding.

    An absent bias counts as zeros, and so does an absent table of positions or token types, or an
    absent shared expert; the absent output table of a tied model is its word embeddings. Heads of
    multi-token prediction are compared where both have some.

    Args:
        ours: A checkpoint in the form of the other; see `one_form`.
        theirs: The other.
        entries: Rows of the vocabulary that are no padding; None: all of them.
        sides: What phrases call the two.
        on_progress: Called with (bytes compared, bytes in all).
    """
    tables = [parameters(side.config) for side in (ours, theirs)]
    if ours.prediction_heads and theirs.prediction_heads:
        ours, theirs = _with_heads_as_tensors(ours), _with_heads_as_tensors(theirs)
        for own, side in zip(tables, (ours, theirs), strict=True):
            count = num_prediction_heads(side.prediction_heads)
            own.update(prediction_parameters(side.config, count))
    rows = (ours.config.vocab_size, theirs.config.vocab_size)
    entries = max(rows) if entries is None else entries
    total = sum(tensor.nbytes for tensor in ours.tensors.values())
    done = 0
    count = elements = 0
    differing: list[str] = []
    structure: list[str] = []
    rounded_to: set[str] = set()
    first: ElementDifference | None = None
    largest = padding = 0.0
    for name in _in_forward_order(*tables):
        a, b = _tensor(ours, name), _tensor(theirs, name)
        if isinstance(a, _Missing) or isinstance(b, _Missing):
            has = sides[0] if isinstance(b, _Missing) else sides[1]
            structure.append(f"only {has} has {name}")
            continue
        known = a or b
        if known is None:
            continue
        table = tables[0].get(name) or tables[1][name]
        shapes = [known.shape if tensor is None else tensor.shape for tensor in (a, b)]
        cut = known.shape[0]
        if table.rule.unit == "vocab":
            cut = min(entries, *rows)
            shapes = [(min(shape[0], entries), *shape[1:]) for shape in shapes]
        if shapes[0] != shapes[1]:
            structure.append(
                f"{name} is {list(shapes[0])} in {sides[0]} and {list(shapes[1])} in {sides[1]}"
            )
            if shapes[0][1:] != shapes[1][1:] or table.rule.unit != "vocab":
                continue
        gap = _compare(a, b, 0, cut)
        count += 1
        elements += cut * math.prod(known.shape[1:])
        if gap.count:
            differing.append(name)
            largest = _larger(largest, gap.largest)
            if first is None:
                assert gap.first is not None
                first = ElementDifference(name, *gap.first)
        rounded_to |= {dtype_name(dtype) for dtype in gap.rounded_to}
        if table.rule.unit == "vocab":
            padding = _larger(padding, _compare(a, b, entries, min(rows)).largest)
        done += 0 if a is None else a.nbytes
        if on_progress is not None:
            on_progress(min(done, total), total)
    weights = WeightComparison(
        tensors=count,
        elements=elements,
        differing=tuple(differing),
        first=first,
        largest=largest,
        structure=_shortened(structure),
        rounded_to=tuple(sorted(rounded_to)),
    )
    spare = (max(rows[0] - entries, 0), max(rows[1] - entries, 0))
    return weights, PaddingComparison(entries, spare, padding) if any(spare) else None


def _with_heads_as_tensors(checkpoint: Checkpoint) -> Checkpoint:
    tensors = {**checkpoint.tensors, **checkpoint.prediction_heads}
    return dataclasses.replace(checkpoint, tensors=tensors)


def only_last_rows(weights: WeightComparison, ours: ModelConfig, theirs: ModelConfig) -> bool:
    """Whether all that differs are rows of the vocabulary that may be its padding."""
    vocabulary = {
        name
        for config in (ours, theirs)
        for name, parameter in parameters(config).items()
        if parameter.rule.unit == "vocab"
    }
    shapes = all(phrase.split(" is ")[0] in vocabulary for phrase in weights.structure)
    behind = weights.first is None or weights.first.index[0] > 0
    return not weights.same and shapes and behind and set(weights.differing) <= vocabulary


def evident_entries(ours: Checkpoint, theirs: Checkpoint) -> int | None:
    """Return the rows of the shorter vocabulary where the longer one's others evidently pad it.

    Writers fill them with zeros or with copies of one row. None where any two of them differ, or
    where both sides have the same number of rows: no trained entry may be taken for padding.
    """
    rows = (ours.config.vocab_size, theirs.config.vocab_size)
    if rows[0] == rows[1]:
        return None
    longer = ours if rows[0] > rows[1] else theirs
    for name, parameter in parameters(longer.config).items():
        if parameter.rule.unit == "vocab":
            first = longer.tensors[name].read(0, slice(min(rows), min(rows) + 1))
            for _, values, _ in _blocks(
                longer.tensors[name], None, longer.tensors[name], min(rows), max(rows)
            ):
                if not bool((values == first).all()):
                    return None
    return min(rows)


class _Missing:
    """A tensor that a model lacks and that no zeros stand for."""


def _tensor(checkpoint: Checkpoint, name: str) -> LazyTensor | _Missing | None:
    """Return what a model computes with under a canonical name; None for zeros."""
    if name in checkpoint.tensors:
        return checkpoint.tensors[name]
    module, _, leaf = name.rpartition(".")
    if name == "output_layer.weight" and checkpoint.config.lm_head:
        return checkpoint.tensors[WORD_EMBEDDINGS]
    if leaf == "bias" and f"{module}.weight" in checkpoint.tensors:
        return None
    if module in ("embedding.position_embeddings", "embedding.tokentype_embeddings"):
        return None
    mlp, found, part = name.partition(".mlp.")
    if part.startswith(("router.expert_bias", "shared_experts.")):
        there = f"{mlp}{found}router.weight" in checkpoint.tensors
        return None if there else _Missing()
    return _Missing()


def _in_forward_order(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the names of both; one that only the second has stands behind its predecessor."""
    order = list(ours)
    place = 0
    for name in theirs:
        if name in ours:
            place = order.index(name) + 1
        else:
            order.insert(place, name)
            place += 1
    return order


def _shortened(phrases: list[str], most: int = 5) -> tuple[str, ...]:
    if len(phrases) <= most:
        return tuple(phrases)
    return (*phrases[:most], f"{len(phrases) - most} more tensors that differ in shape or presence")


@dataclass
class _Gap:
    """How far two tensors are apart after one of them was rounded to a dtype."""

    rounded: torch.dtype | None = None
    """None: neither was."""
    count: int = 0
    first: tuple[tuple[int, ...], tuple[float, float]] | None = None
    largest: float = 0.0
    rounded_to: list[torch.dtype] = field(default_factory=list)

    def add(self, a: Tensor, b: Tensor, start: int) -> None:
        """Take in rows from `start` on."""
        pair = (
            (a, b) if self.rounded is None else (_round(a, self.rounded), _round(b, self.rounded))
        )
        if pair[0].dtype == pair[1].dtype and torch.equal(*pair):
            return
        different = pair[0] != pair[1]  # so is NaN
        count = int(different.sum())
        if not count:
            return
        ours, theirs = (values[different].double() for values in pair)
        self.count += count
        self.largest = _larger(self.largest, (ours - theirs).abs().max().item())
        if self.first is None:
            row, *rest = different.nonzero()[0].tolist()
            self.first = ((row + start, *rest), (ours[0].item(), theirs[0].item()))


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in a dtype; those beyond its range are not a number, which nothing equals."""
    if values.dtype == dtype:
        return values
    rounded = values.to(dtype)
    return rounded.masked_fill(rounded.isinf() & values.isfinite(), torch.nan)


def _compare(a: LazyTensor | None, b: LazyTensor | None, start: int, stop: int) -> _Gap:
    """Return how far rows `start` to `stop` of two tensors are apart; None stands for zeros.

    Where the dtypes differ, either may be the other one rounded.
    """
    known = a or b
    assert known is not None
    dtypes = [known.dtype if tensor is None else tensor.dtype for tensor in (a, b)]
    narrow_first = sorted(set(dtypes), key=lambda dtype: (dtype.itemsize, str(dtype)))
    gaps = [_Gap()]
    if len(narrow_first) == 2:
        gaps += [_Gap(dtype) for dtype in narrow_first]
    for low, ours, theirs in _blocks(a, b, known, start, stop):
        for gap in gaps:
            gap.add(ours, theirs, low)
    for gap in gaps:
        if not gap.count:
            gap.rounded_to = [] if gap.rounded is None else [gap.rounded]
            return gap
    return gaps[min(1, len(gaps) - 1)]  # what rounding to the narrower does not explain


def _blocks(
    a: LazyTensor | None, b: LazyTensor | None, known: LazyTensor, start: int, stop: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    per_row = max(tensor.nbytes // max(tensor.shape[0], 1) for tensor in (a, b) if tensor)
    rows = max(1, BLOCK // max(per_row, 1))
    for low in range(start, stop, rows):
        index = slice(low, min(low + rows, stop))
        ours, theirs = (None if tensor is None else tensor.read(0, index) for tensor in (a, b))
        zeros = torch.zeros(())
        if ours is None:
            assert theirs is not None
            ours = zeros.to(theirs.dtype).expand_as(theirs)
        yield low, ours, zeros.to(ours.dtype).expand_as(ours) if theirs is None else theirs


def _larger(a: float, b: float) -> float:
    """Return the larger of two differences; one that is not a number is beyond all others."""
    return b if math.isnan(b) or b > a else a
