"""What a measured series says: efficiencies, what limits them, the record, the table.

Weak scaling's efficiency is a rank's rate of floating-point operations relative to that of the
first point, as in the paper's Figure 5; strong scaling's speed-up is the first point's time for the
same step over that of a point, as in its Table 8.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from mlm_eval.checkpoints.parameters import num_parameters
from mlm_eval.planning.bench_options import INFER, TRAIN, BenchOptions
from mlm_eval.planning.bench_run import Measured
from mlm_eval.planning.bench_study import (
    WEAK,
    BenchPoint,
    BenchSeries,
    attention_share,
    step_flops,
)
from mlm_eval.reporting.environment import run_record
from mlm_eval.reporting.results import versions
from mlm_eval.reporting.text import aligned

UNSTEADY = 0.2
"""Steps that differ by more than this share of their median are reported."""

PAPER_LENGTH = 1024
"""Tokens of a row in the training of the paper's GPT-2 models."""

SETTINGS = ("mode", "dtype", "device", "batch", "steps", "warmup_steps", "seed", "ckpt")
TRAINING_SETTINGS = ("recompute", "hidden_dropout", "attention_dropout")
"""Options that the record repeats; those of training are None in inference."""

SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
"""What the record says of a point's model."""

AS_MEASURED = (
    "peak_tflops",
    "busy_over_alone",
    "load_seconds",
    "all_reduces",
    "all_reduce_bytes",
    "all_reduce_seconds",
)
"""Measured figures that the record holds as they are."""

CONVENTION = {
    INFER: "a forward pass over whole rows; multiply and add count as two, the output layer "
    "included, norms, activations and softmax left out",
    TRAIN: "three times the forward pass, and with recomputation the layers' forward pass once "
    "more; multiply and add count as two, the output layer included, norms, activations, softmax "
    "and the optimizer left out",
}


def bench_record(
    series: BenchSeries,
    options: BenchOptions,
    measured: Sequence[Measured],
    *,
    cores: int,
    failed: str | None = None,
) -> dict[str, Any]:
    """Return the record of a series.

    Args:
        series: The points.
        options: How they were measured.
        measured: Their figures, in the same order; fewer than points where one has failed.
        cores: Processor cores of a machine, which its ranks share.
        failed: Why the first point without figures has none.
    """
    pairs = zip(series.points, measured, strict=False)
    points = [_figures(point, options, figures, cores) for point, figures in pairs]
    _compare(points, series.kind)
    device_name = measured[0].device_name
    return {
        "task": "bench",
        "protocol": f"{series.kind}-scaling",
        "settings": _settings(series, options, measured[0], cores),
        "points": points,
        "limits": _limits(points, options.device, cores, failed),
        "not_as_in_the_paper": _differences(series, options, device_name) if series.paper else [],
        "versions": versions(),
        "run": run_record(),
    }


def _settings(
    series: BenchSeries, options: BenchOptions, first: Measured, cores: int
) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in (*SETTINGS, *TRAINING_SETTINGS)}
    of_training = dict.fromkeys(("micro_batch", *TRAINING_SETTINGS))
    scaling = (
        f"layers and hidden size x {series.scale:g} with as many heads, vocabulary x "
        f"{series.scale**2:g}, so that the output layer keeps its share of the work"
    )
    return {
        "study": series.kind,
        "title": series.title,
        "paper_study": series.paper,
        "scale": series.scale,
        "scaling": None if series.scale == 1.0 else scaling,
        "device_name": first.device_name,
        "cores": cores,
        "threads_per_rank": first.threads,
        **given,
        "seq_length": options.row_length(series.points[0].config),
        **({"micro_batch": options.forward_rows} if options.trains else of_training),
        "flops": CONVENTION[options.mode],
        "peak": "square matrix products in the same dtype with the same threads, the fastest of "
        "several sizes, on rank 0 while the others wait",
        "all_reduce": "an estimate: the all-reduces of a step timed apart from it, one after the "
        "other",
    }


# --- figures -------------------------------------------------------------------------------------


def _figures(
    point: BenchPoint, options: BenchOptions, measured: Measured, cores: int
) -> dict[str, Any]:
    config = point.config
    seconds = statistics.median(measured.step_seconds)
    flops = step_flops(config, options)
    rate = flops / seconds / point.tp / 1e12
    threads = point.tp * measured.threads
    return {
        "tp": point.tp,
        "model": point.model,
        "parameters": num_parameters(config),
        **{name: getattr(config, name) for name in SHAPE},
        "seconds_per_step": seconds,
        "fastest_step": min(measured.step_seconds),
        "slowest_step": max(measured.step_seconds),
        "tokens_per_second": options.batch * options.row_length(config) / seconds,
        "tflop_per_step": flops / 1e12,
        "tflops_per_rank": rate,
        "share_of_peak": rate / measured.peak_tflops,
        "cores_per_thread": min(1.0, cores / threads) if options.device == "cpu" else None,
        **{name: getattr(measured, name) for name in AS_MEASURED},
        "all_reduce_share": measured.all_reduce_seconds / seconds,
        "published": point.published,
    }


def _compare(points: Sequence[dict[str, Any]], kind: str) -> None:
    """Add how each point compares with the first one; a point alone compares with nothing."""
    first, alone = dict(points[0]), len(points) == 1
    for point in points:
        related: dict[str, float | None] = {}
        if kind == WEAK:
            related["efficiency"] = point["tflops_per_rank"] / first["tflops_per_rank"]
        else:
            speedup = first["seconds_per_step"] / point["seconds_per_step"]
            related |= {"speedup": speedup, "efficiency": speedup * first["tp"] / point["tp"]}
        published = point["published"]
        # The paper's figures are relative to one GPU; a series may start elsewhere.
        relative = None if published is None else published / first["published"]
        related["published_relative"] = relative
        point.update(dict.fromkeys(related) if alone else related)


# --- sentences -----------------------------------------------------------------------------------


def _limits(
    points: Sequence[Mapping[str, Any]], device: str, cores: int, failed: str | None
) -> list[str]:
    """Return what keeps the figures down, as far as it was measured: one sentence each."""
    found = []
    if device == "cpu" and points[-1]["tp"] > 1:
        found.append(
            "the ranks are processes of one machine that stand in for devices: they share its "
            f"{cores} core(s), its caches and its memory, and sum over the loopback interface"
        )
    for point in points:
        tp = point["tp"]
        if point["cores_per_thread"] is not None and point["cores_per_thread"] < 1:
            found.append(
                f"{tp} ranks share {cores} core(s): at most {point['cores_per_thread']:.2f} of a "
                "core for each thread, so at best that share of the rate of one rank alone"
            )
        if tp > 1:
            found.append(
                f"tp {tp}: with all ranks busy, a rank's matrix products run at "
                f"{point['busy_over_alone']:.0%} of their rate alone; the "
                f"{point['all_reduces']} all-reduces of a step "
                f"({point['all_reduce_bytes'] / 1e6:,.1f} MB) would take about "
                f"{point['all_reduce_share']:.0%} of it by themselves"
            )
    for point in points:
        spread = (point["slowest_step"] - point["fastest_step"]) / point["seconds_per_step"]
        if spread > UNSTEADY:
            found.append(
                f"tp {point['tp']}: its steps took {_seconds(point['fastest_step'])} to "
                f"{_seconds(point['slowest_step'])}; something else ran on the machine, or the "
                "steps are too short to time"
            )
    if failed is not None:
        found.append(failed)
    return found


def _differences(series: BenchSeries, options: BenchOptions, device: str) -> list[str]:
    """Return how a measurement differs from the paper's, one sentence each."""
    found = []
    first = series.points[0]
    length = options.row_length(first.config)
    if series.scale != 1.0:
        share = attention_share(first.config, length)
        found.append(
            f"models scaled by {series.scale:g}: not the paper's sizes; attention, which grows "
            f"with --seq-length, is {share:.0%} of the first one's operations"
        )
    if not options.trains:
        found.append("forward passes; the paper's figures are of training")
    if series.paper_batch not in (None, options.batch):
        found.append(f"{options.batch} rows a step, in the paper {series.paper_batch}")
    if length != PAPER_LENGTH:
        found.append(f"rows of {length:,} tokens, in the paper {PAPER_LENGTH:,}")
    if "V100" not in device:
        found.append(f"{device}; the paper's devices are V100 GPUs")
    if first.tp != 1:
        found.append(
            f"relative to tp {first.tp}, and so are the paper's figures here; the "
            "paper's own are relative to one GPU"
        )
    return found


# --- text ----------------------------------------------------------------------------------------


def headline(record: Mapping[str, Any]) -> str:
    """Return what was measured, in one line; a scaled series says so."""
    s = record["settings"]
    scale = "" if s["scale"] == 1.0 else f", SCALED BY {s['scale']:g}"
    mode = "inference" if s["mode"] == "infer" else "training"
    return f"{s['title']}{scale}: {mode}, {s['dtype']}, {s['device']}"


def how(record: Mapping[str, Any]) -> str:
    """Return how a step was measured, in one line."""
    s = record["settings"]
    threads = f", {s['threads_per_rank']} thread(s) a rank" if s["device"] == "cpu" else ""
    rows = f"{s['batch']} rows of {s['seq_length']:,} tokens"
    if s["mode"] == "train":
        rows += f", dropout {s['hidden_dropout']:g} and of attention {s['attention_dropout']:g}"
        if s["micro_batch"] < s["batch"]:
            rows += f", micro-batches of {s['micro_batch']}"
        if s["recompute"]:
            rows += ", activations recomputed"
    return (
        f"{rows}; median of {s['steps']} steps after {s['warmup_steps']}, on "
        f"{s['device_name']}{threads}"
    )


def notes(record: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return titles with the sentences that belong under the figures."""
    titles = {"limits": "what limits it", "not_as_in_the_paper": "not as in the paper"}
    return [(title, record[name]) for name, title in titles.items() if record[name]]


def bench_text(record: Mapping[str, Any]) -> str:
    """Return the table that the command prints, and below it what limits the figures."""
    rows = _rows(record)
    lines = [headline(record), *aligned([list(rows[0]), *(list(row.values()) for row in rows)])]
    lines.append(f"step: {how(record)}")
    for title, sentences in notes(record):
        lines.append(title)
        for sentence in sentences:
            lines += textwrap.wrap(sentence, 98, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join(lines)


def _rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    points, scale = record["points"], record["settings"]["scale"]
    factor, unit = rate_unit(points)
    weak = record["settings"]["study"] == WEAK
    rows = []
    for p in points:
        row = {
            "tp": str(p["tp"]),
            "model": p["model"] if scale == 1.0 else f"{p['model']} x {scale:g}",
            "parameters": f"{p['parameters']:,}",
            "layers x hidden": f"{p['num_layers']} x {p['hidden_size']:,}",
            "step": _seconds(p["seconds_per_step"]),
            "tokens/s": f"{p['tokens_per_second']:,.0f}",
            f"{unit} a rank": f"{p['tflops_per_rank'] * factor:,.1f}",
            "of peak": f"{p['share_of_peak']:.0%}",
        }
        if len(points) > 1 and not weak:
            row["speed-up"] = f"{p['speedup']:.2f}"
        if len(points) > 1:
            row["efficiency"] = f"{p['efficiency']:.0%}"
        if len(points) > 1 and record["settings"]["paper_study"]:
            row["paper"] = f"{p['published_relative']:{'.0%' if weak else '.2f'}}"
        rows.append(row)
    return rows


def rate_unit(points: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """Return the factor to TFLOP/s of the unit that suits the points' rates, and its name."""
    small = max(point["peak_tflops"] for point in points) < 1.0
    return (1e3, "GFLOP/s") if small else (1.0, "TFLOP/s")


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1.0 else f"{seconds:,.4g} s"
