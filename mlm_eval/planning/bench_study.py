"""What `bench` measures: the paper's scaling study, or one model at several sizes, if it fits.

Weak scaling: the four models of Table 1, each at its own tensor-parallel size. Strong scaling: one
model at all sizes, that of Table 8 or any other. The paper's figures are handed in by the caller
(`mlm_eval.tasks.paper`). `scaled` shrinks a series to the machine; what does not fit the free
memory is refused before anything starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import resolve_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.memory.host import free_memory
from mlm_eval.checkpoints.parameters import allowed_tp, check_tp
from mlm_eval.model.costs.flops import forward_flops
from mlm_eval.model.costs.memory import OUTSIDE, TrainingBatch, evaluation_memory, training_memory
from mlm_eval.model.sizes import DIVISIBLE_BY, named_config
from mlm_eval.planning.bench_options import BenchOptions, cores
from mlm_eval.planning.plan import BACKWARD
from mlm_eval.ranks.layout import free_on_gpus

WEAK, STRONG = "weak", "strong"
STUDIES = (WEAK, STRONG)

USUAL_TP = (1, 2, 4, 8)
"""The paper's sizes. Without `--tp`, those are measured that the machine has devices for."""

CHANNELS = 8
"""A scaled head has a multiple of so many channels, for the matrix units."""

MASKED_EVERY = 7
"""One token of so many is hidden in a training row of BERT: its 15 %."""

PROCESS = 300 * 10**6
"""Bytes of a rank on the CPU without a model: Python and torch, gloo's buffers, the matrices whose
product is timed."""

SCALES = tuple(percent / 100 for percent in range(100, 4, -5))
"""What `--scale auto` chooses from."""


@dataclass(frozen=True)
class BenchPoint:
    """A model at one tensor-parallel size."""

    tp: int
    model: str
    """Its name."""
    config: ModelConfig
    published: float | None = None
    """The paper's figure: weak scaling's efficiency, strong scaling's speed-up."""


@dataclass(frozen=True)
class BenchSeries:
    """Points in the order of their size, and what is compared over them."""

    kind: str
    """`weak` (operations a second of a rank) or `strong` (time of the same step)."""
    title: str
    points: Sequence[BenchPoint]
    paper: bool = False
    """Whether they are the paper's, at their full sizes or scaled."""
    paper_batch: int | None = None
    """Rows of a step in the paper, where its figures in paper.toml have them."""
    scale: float = 1.0
    """Factor of the sizes."""


# --- series --------------------------------------------------------------------------------------


def paper_series(
    kind: str, paper: Mapping[str, Any], sizes: Sequence[int], *, scale: float = 1.0
) -> BenchSeries:
    """Return the weak scaling of Table 1 and Figure 5, or the strong scaling of Table 8.

    Args:
        kind: `weak` or `strong`.
        paper: The paper's figures, `table1`, `table8` and `figure5`.
        sizes: Tensor-parallel sizes, ascending.
        scale: Factor of the models' sizes.

    Raises:
        InputError: The study is unknown, or has no model for one of the sizes.
    """
    if kind not in STUDIES:
        raise InputError(f"--study {kind!r} is unknown; use {' or '.join(STUDIES)}")
    vocab, batch = paper["figure5"]["vocab_size"], None
    if kind == WEAK:
        efficiencies = paper["figure5"]["model_parallel"]
        published = {row["gpus"]: row["efficiency_percent"] / 100 for row in efficiencies}
        rows = {row["model_parallel_gpus"]: row for row in paper["table1"]["rows"]}
        batch = paper["figure5"]["batch_model_parallel"]
        title = "weak scaling of the models of the paper's Table 1"
    else:
        published = {row["gpus"]: row["speedup"] for row in paper["table8"]["rows"]}
        (row,) = (r for r in paper["table1"]["rows"] if r["size"] == paper["table8"]["size"])
        rows = dict.fromkeys(published, row)
        title = f"strong scaling of the {row['model']} model of the paper's Table 8"
    for tp in sizes:
        if tp not in rows:
            raise InputError(
                f"the paper's {kind} scaling has no figure for tp {tp}, only for "
                f"{', '.join(map(str, rows))}; choose --tp among them, or measure one model with "
                "--model NAME"
            )
    points = [
        BenchPoint(tp, rows[tp]["size"], _table1_config(rows[tp], vocab), published[tp])
        for tp in sizes
    ]
    return _scaled(BenchSeries(kind, title, points, paper=True, paper_batch=batch), scale)


def _table1_config(row: Mapping[str, Any], vocab: int) -> ModelConfig:
    """Return a model of Table 1: not that of Table 2, whose 8.3B has fewer heads."""
    hidden, heads = row["hidden_size"], row["num_attention_heads"]
    return dataclasses.replace(
        named_config(row["size"]),
        num_layers=row["num_layers"],
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // heads,
        vocab_size=vocab,
    )


def model_series(
    model: str, config: ModelConfig, sizes: Sequence[int], *, scale: float = 1.0
) -> BenchSeries:
    """Return one model at several sizes.

    Raises:
        InputError: A size does not divide it.
    """
    points = [BenchPoint(tp, model, config) for tp in sizes]
    what = "strong scaling" if len(points) > 1 else "throughput"
    return _scaled(BenchSeries(STRONG, f"{what} of {model}", points), scale)


def _scaled(series: BenchSeries, scale: float) -> BenchSeries:
    points = [dataclasses.replace(p, config=scaled(p.config, scale)) for p in series.points]
    for point in points:
        check_tp(point.config, point.tp)
    return dataclasses.replace(series, points=points, scale=scale)


def scaled(config: ModelConfig, factor: float) -> ModelConfig:
    """Return a smaller model with about `factor` of the layers and of the hidden size.

    It has as many heads, so that the same tensor-parallel sizes divide it, but narrower ones. The
    vocabulary shrinks by the square of the factor: the output layer keeps its share of the work,
    which would otherwise be most of it.
    """
    if factor == 1.0:
        return config
    steps = max(1, round(config.kv_channels * factor / CHANNELS))
    channels = min(CHANNELS * steps, config.kv_channels)
    hidden = config.num_attention_heads * channels
    rows = max(1, round(config.vocab_size * factor**2 / DIVISIBLE_BY)) * DIVISIBLE_BY
    return dataclasses.replace(
        config,
        num_layers=max(1, round(config.num_layers * factor)),
        hidden_size=hidden,
        kv_channels=channels,
        ffn_hidden_size=config.ffn_hidden_size * hidden // config.hidden_size,
        vocab_size=min(rows, config.vocab_size),
    )


def usual_sizes(device: str, config: ModelConfig | None = None) -> list[int]:
    """Return the paper's sizes that this machine has a device, or on the CPU a core, for.

    Args:
        device: `cpu` or `cuda`.
        config: Only those that divide this model.
    """
    limit = torch.cuda.device_count() if device == "cuda" else cores()
    allowed = USUAL_TP if config is None else allowed_tp(config)
    return [tp for tp in USUAL_TP if tp <= limit and tp in allowed] or [1]


# --- the work of a step --------------------------------------------------------------------------


def predicted_rows(config: ModelConfig, length: int, *, trains: bool) -> int:
    """Return the positions of a row whose logits over the vocabulary are computed."""
    if not config.lm_head:
        return 0
    if config.family == "bert" and trains:
        return len(range(1, length, MASKED_EVERY))
    return length


def step_flops(config: ModelConfig, options: BenchOptions) -> float:
    """Return the floating-point operations of a step, over all ranks.

    Inference: the forward pass, every row whole. Training: three times that, because the backward
    pass costs two forward passes; with recomputation the layers' forward pass once more.
    """
    length = options.row_length(config)
    head_rows = predicted_rows(config, length, trains=options.trains)
    forward = forward_flops(config, length, last_rows=length, head_rows=head_rows)
    if not options.trains:
        return options.batch * forward
    again = 0.0
    if options.recompute:
        again = forward_flops(config, length, last_rows=length, head_rows=0)
    return options.batch * ((1 + BACKWARD) * forward + again)


def attention_share(config: ModelConfig, length: int) -> float:
    """Return the share of scores and weighted values in the operations of a forward pass."""
    width = config.num_attention_heads * config.kv_channels
    attention = 4 * length**2 * width * config.num_layers
    head_rows = predicted_rows(config, length, trains=False)
    return attention / forward_flops(config, length, last_rows=length, head_rows=head_rows)


# --- whether it fits -----------------------------------------------------------------------------


def rank_bytes(point: BenchPoint, options: BenchOptions) -> int:
    """Return what each rank of a point needs, including what is there before the model."""
    config, length = point.config, options.row_length(point.config)
    predicted = predicted_rows(config, length, trains=options.trains)
    if options.trains:
        batch = TrainingBatch(
            rows=options.forward_rows,
            length=length,
            predicted=predicted * options.forward_rows,
            hidden_dropout=options.hidden_dropout,
            attention_dropout=options.attention_dropout,
            half=options.dtype != "float32",
            recompute=options.recompute,
            accumulates=options.forward_rows < options.batch,
        )
        need = training_memory(config, batch, tp=point.tp)
    else:
        need = evaluation_memory(
            config,
            tp=point.tp,
            itemsize=resolve_dtype(options.dtype).itemsize,
            batch_tokens=options.batch * length,
            scored_rows=options.batch * predicted,
        )
    return need.on_cpu().total + PROCESS if options.device == "cpu" else need.total + OUTSIDE


def free_bytes(device: str, ranks: int) -> int:
    """Return the memory that each of some ranks may take: an equal share on the CPU.

    Raises:
        InputError: There are fewer GPUs than ranks.
    """
    if device == "cpu":
        return (free_memory() or 1 << 62) // ranks  # where it is not told, all is tried
    count = torch.cuda.device_count()
    if ranks > count:
        raise InputError(
            f"tp {ranks} needs {ranks} GPUs, one for each rank, but {count} can be seen; leave it "
            "out of --tp, or use --device cpu"
        )
    return min(free_on_gpus()[:ranks])


def check_point(point: BenchPoint, options: BenchOptions) -> None:
    """Refuse a model that cannot be measured so.

    Raises:
        InputError: Its rows are too short, or it cannot be trained.
    """
    positions = point.config.max_position_embeddings
    if options.row_length(point.config) > positions:
        raise InputError(
            f"--seq-length {options.seq_length} is more than the {positions} positions of "
            f"{point.model}; lower it"
        )
    if options.trains and not point.config.lm_head:
        raise InputError(
            f"{point.model} has no language-model head, which is what --mode train trains here; "
            "use --mode infer"
        )


def fit(
    make: Callable[[float], BenchSeries],
    options: BenchOptions,
    *,
    local_ranks: int | None = None,
) -> BenchSeries:
    """Return a series that can be measured here: all of its points fit the free memory.

    Args:
        make: Returns the series at a scale.
        options: How to measure, and the scale; None: the largest one that fits.
        local_ranks: Ranks that share this machine; None: all of a point.

    Raises:
        InputError: It does not fit, or cannot be run so.
    """
    misfit = None
    for factor in SCALES if options.scale is None else (options.scale,):
        series = make(factor)
        for point in series.points:
            check_point(point, options)
        misfit = _first_misfit(series, options, local_ranks)
        if misfit is None:
            return series
    less = "leave it out of --tp, or give a smaller --batch or --seq-length"
    if options.trains:
        less += ", a --micro-batch, or --recompute"
    if options.scale is not None and options.ckpt is None:
        less = f"shrink the models with --scale (auto finds out how much), or {less}"
    raise InputError(f"{misfit}; {less}")


def _first_misfit(
    series: BenchSeries, options: BenchOptions, local_ranks: int | None
) -> str | None:
    """Return what does not fit the free memory, as the beginning of a sentence; None if all do."""
    for point in series.points:
        ranks = min(point.tp, local_ranks or point.tp)
        need, free = rank_bytes(point, options), free_bytes(options.device, ranks)
        if need > free:
            each = f" on each of {ranks} ranks" if ranks > 1 else ""
            share = " for each" if ranks > 1 else ""
            return (
                f"tp {point.tp} ({point.model}) needs {need / 1e9:.1f} GB{each}, "
                f"{free / 1e9:.1f} GB are free{share}"
            )
    return None
