"""Which layouts are measured: those of the paper's scaling study, or one model at several sizes.

Weak scaling: the four models of Table 1, each at its own tensor-parallel size. Strong scaling: one
model at all sizes, that of Table 8 or any other. The paper's figures are handed in by the caller
(`mlm_eval.tasks.paper`). `scaled` shrinks a series to the machine; what does not fit the free
memory is refused before anything starts.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import resolve_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.parameters import allowed_tp, check_tp
from mlm_eval.model.initial import DIVISIBLE_BY
from mlm_eval.model.sizes import named_config
from mlm_eval.planning.bench import MODES, Job

WEAK, STRONG = "weak", "strong"
STUDIES = (WEAK, STRONG)

USUAL_TP = (1, 2, 4, 8)
"""The paper's sizes. Those that the machine has devices for are measured, if none are named."""

CHANNELS = 8
"""A scaled head has a multiple of so many channels, for the matrix units."""


@dataclass(frozen=True)
class Layout:
    """One point of a series.

    Attributes:
        tp: Its tensor-parallel size.
        model: Name of the model.
        config: Its settings.
        published: The paper's figure: weak scaling's efficiency, strong scaling's speed-up; None
            where it has none.
    """

    tp: int
    model: str
    config: ModelConfig
    published: float | None = None


@dataclass(frozen=True)
class Series:
    """Layouts in the order of their size, and what is compared over them.

    Attributes:
        kind: `weak` (operations a second of a rank) or `strong` (time of the same step).
        title: What it is, for people.
        layouts: The points.
        paper: Whether they are the paper's, at their full sizes or scaled.
        paper_batch: Rows of a step in the paper, where its figures in paper.toml have them.
        scale: Factor of the sizes.
    """

    kind: str
    title: str
    layouts: Sequence[Layout]
    paper: bool = False
    paper_batch: int | None = None
    scale: float = 1.0


# --- series --------------------------------------------------------------------------------------


def paper_series(
    kind: str, paper: Mapping[str, Any], sizes: Sequence[int], *, scale: float = 1.0
) -> Series:
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
        published = {
            row["gpus"]: row["efficiency_percent"] / 100
            for row in paper["figure5"]["model_parallel"]
        }
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
    layouts = [
        Layout(tp, rows[tp]["size"], _table1_config(rows[tp], vocab), published[tp]) for tp in sizes
    ]
    return _scaled(Series(kind, title, layouts, paper=True, paper_batch=batch), scale)


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
) -> Series:
    """Return one model at several sizes.

    Raises:
        InputError: A size does not divide it.
    """
    layouts = [Layout(tp, model, config) for tp in sizes]
    what = "strong scaling" if len(layouts) > 1 else "throughput"
    return _scaled(Series(STRONG, f"{what} of {model}", layouts), scale)


def _scaled(series: Series, scale: float) -> Series:
    layouts = [
        dataclasses.replace(layout, config=scaled(layout.config, scale))
        for layout in series.layouts
    ]
    for layout in layouts:
        check_tp(layout.config, layout.tp)
    return dataclasses.replace(series, layouts=layouts, scale=scale)


def scaled(config: ModelConfig, factor: float) -> ModelConfig:
    """Return a smaller model with about `factor` of the layers and of the hidden size.

    The heads stay as many, so that the same tensor-parallel sizes divide it, and get narrower. The
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


def parse_sizes(text: str) -> list[int] | None:
    """Return the sizes of `--tp 1,2,4,8`, ascending; None for `auto`.

    Raises:
        InputError: One of them is no positive number.
    """
    if text == "auto":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(
            f"--tp {text!r}: give sizes divided by commas, such as 1,2,4,8, or auto"
        ) from None
    return sorted({int(part) for part in parts})


def parse_scale(text: str) -> float | None:
    """Return the factor of `--scale`; None for `auto`.

    Raises:
        InputError: It is no number in (0, 1].
    """
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise InputError(
            f"--scale {text!r}: give a number above 0 and up to 1, such as 0.1, or auto"
        )
    return value


def usual_sizes(device: str, config: ModelConfig | None = None) -> list[int]:
    """Return the paper's sizes that this machine has a device, or on the CPU a core, for.

    Args:
        device: `cpu` or `cuda`.
        config: Only those that divide this model.
    """
    if device == "cuda":
        import torch

        limit = torch.cuda.device_count()
    else:
        limit = cores()
    allowed = USUAL_TP if config is None else allowed_tp(config)
    return [tp for tp in USUAL_TP if tp <= limit and tp in allowed] or [1]


def cores() -> int:
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


# --- how to measure ------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchOptions:
    """How each layout is measured; see `bench.Job` for the meaning.

    `seq_length` None: the model's positions, at most 1,024. `micro_batch` None: the whole batch.
    """

    device: str
    dtype: str
    mode: str = "infer"
    batch: int = 8
    micro_batch: int | None = None
    seq_length: int | None = None
    steps: int = 10
    warmup_steps: int = 3
    recompute: bool = False
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    seed: int = 1234
    ckpt: str | None = None
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: One of them is impossible.
        """
        if self.mode not in MODES:
            raise InputError(f"--mode {self.mode!r} is unknown; use {' or '.join(MODES)}")
        resolve_dtype(self.dtype)
        if self.mode == "infer" and (self.micro_batch is not None or self.recompute):
            raise InputError("--micro-batch and --recompute belong to --mode train")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                option = name.replace("_", "-")
                raise InputError(f"--{option} is {getattr(self, name)}; it must lie in [0, 1)")


def make_job(layout: Layout, options: BenchOptions) -> Job:
    """Return the measurement of one layout.

    Raises:
        InputError: The model cannot be run or trained so.
    """
    config = layout.config
    length = options.seq_length or min(1024, config.max_position_embeddings)
    if length > config.max_position_embeddings:
        raise InputError(
            f"--seq-length {length} is more than the {config.max_position_embeddings} positions of "
            f"{layout.model}; lower it"
        )
    if options.mode == "train" and not config.lm_head:
        raise InputError(
            f"{layout.model} has no language-model head, which is what --mode train trains here; "
            "use --mode infer"
        )
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(BenchOptions)}
    values |= {
        "overrides": list(options.overrides),
        "seq_length": length,
        "micro_batch": min(options.micro_batch or options.batch, options.batch),
    }
    model = None if options.ckpt is not None else config.to_dict()
    return Job(**values, tp=layout.tp, model=model)
