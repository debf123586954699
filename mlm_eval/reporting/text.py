"""What people read: tables and sentences built from records, for the command line to print."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import NEWER_SETTINGS, ModelConfig
from mlm_eval.checkpoints.parameters import active_parameters
from mlm_eval.reporting.results import Result, checkpoint_record

if TYPE_CHECKING:
    from mlm_eval.checkpoints.comparison import Comparison, WeightComparison


def aligned(rows: Sequence[Sequence[str]], *, left: int = 0) -> list[str]:
    """Return the rows of a table as indented lines.

    Args:
        rows: The texts of the columns, with titles in the first row where there are any.
        left: The first so many columns are aligned to the left, the others to the right.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        columns = enumerate(zip(row, widths, strict=True))
        cells = [f"{text:{'<' if i < left else '>'}{width}}" for i, (text, width) in columns]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def rows_as_text(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a title and aligned `name  value` lines."""
    return "\n".join([title, *aligned(rows, left=2)])


def inspect_record(checkpoint: Checkpoint, digest: str) -> dict[str, Any]:
    """Return the JSON record of `mlm-eval inspect`."""
    provenance = checkpoint.provenance
    return {
        **checkpoint_record(checkpoint),
        "active_parameters": active_parameters(checkpoint.config),
        "digest": digest,
        "names": provenance.names,
        "pickle_classes": provenance.pickle_classes,
        "hostile_names": provenance.hostile,
        "warnings": inspect_warnings(checkpoint),
        "notes": provenance.notes,
    }


def inspect_warnings(checkpoint: Checkpoint) -> list[str]:
    """Return the checkpoint's warnings, and one for each harmful name that its pickles ask for."""
    hostile = [
        f"the pickle asks for {name}, which no Megatron checkpoint needs: nothing was run, do not "
        "trust this file"
        for name in checkpoint.provenance.hostile
    ]
    return [*hostile, *checkpoint.provenance.warnings]


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
"""Values of settings that a model without the newer layers has; they are not shown."""


def _left_out(name: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Whether a setting is one of newer layers that the model does not have."""
    routed = name.startswith("moe_") and config["num_experts"]
    if name not in NEWER_SETTINGS or routed:
        return False
    if name.startswith("relative_") and config["position_embedding_type"] == "relative":
        return False
    default = _DEFAULTS[name]
    return bool(value == (list(default) if isinstance(default, tuple) else default))


def inspect_text(record: Mapping[str, Any]) -> str:
    """Return the table of `mlm-eval inspect`."""
    sources = record["config_sources"]
    rows = [
        ("path", str(record["path"])),
        ("format", str(record["format"])),
        *([("parameter names", record["names"])] if record["names"] else []),
        ("checkpoint version", _or_none(record["checkpoint_version"])),
        (
            "saved as",
            f"tensor-parallel {record['tensor_parallel']} x pipeline {record['pipeline_parallel']}",
        ),
        ("iteration", _or_none(record["iteration"])),
        ("parameters", _parameters_text(record)),
        ("digest", str(record["digest"])),
    ]
    config = [
        (name, f"{_plain(value):<20} {sources.get(name, '')}".rstrip())
        for name, value in record["config"].items()
        if value is not None and not _left_out(name, value, record["config"])
    ]
    parts = [
        *_titled("warnings", record["warnings"]),  # before the long list of settings
        rows_as_text("checkpoint", rows),
        rows_as_text("model (setting, value, where it came from)", config),
        *_titled("pickled classes (inert here)", record["pickle_classes"]),
        *_titled("notes", record["notes"]),
    ]
    if "check" in record:
        checked = record["check"]
        read = f"{checked['tensors']} tensors, {checked['bytes'] / 1e6:,.1f} MB read"
        found = [f"  {text}" for text in checked["findings"]] or ["  nothing is wrong with them"]
        parts.append("\n".join([f"check: {read}", *found]))
    return "\n\n".join(parts)


def _titled(title: str, items: Sequence[str]) -> list[str]:
    """Return a title with its items as one part of a text; nothing without items."""
    return ["\n".join([title, *(f"  {item}" for item in items)])] if items else []


def _parameters_text(record: Mapping[str, Any]) -> str:
    """Return the number of weights, and of experts how many a token meets."""
    text = f"{record['num_parameters']:,}"
    if record["active_parameters"] != record["num_parameters"]:
        text += f", of which {record['active_parameters']:,} for each token"
    return text


def _or_none(value: Any) -> str:
    return "not recorded" if value is None else str(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def result_text(result: Result, title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return what a zero-shot benchmark prints: its figures, then what they belong to.

    Args:
        result: Of the benchmark.
        title: The benchmark's.
        rows: Its figures and its protocol.
    """
    settings, checkpoint = result.settings, result.checkpoint
    if settings.get("limit") is not None:
        title += "  *** LIMITED RUN: not the number of the whole file ***"
    rows = [
        *rows,
        ("data", str(settings["data"]["path"])),
        ("model", f"{checkpoint['num_parameters']:,} parameters, {checkpoint['path']}"),
        (
            "run",
            f"{settings['dtype']}, tp {settings['tp']} x dp {settings['dp']}, "
            f"softmax over the {settings['vocab']} vocabulary ({settings['vocab_size']:,} rows)",
        ),
        ("time", _time(result)),
    ]
    return rows_as_text(title, rows)


def _time(result: Result) -> str:
    timing = result.timing
    speed = timing.get("tokens_per_second") or 0.0
    load, run = timing["load_seconds"], timing["eval_seconds"]
    return f"{run:.1f} s after {load:.1f} s of loading, {speed:,.0f} tokens/s"


def work_text(unit: str, count: int, tokens: int, flops: float | None) -> str:
    """Return the announcement of the work ahead."""
    work = f"work ahead: {count:,} {unit}, {tokens:,} tokens through the model"
    return work if flops is None else f"{work}, {flops / 1e12:,.3g} TFLOP"


def training_text(result: Result, *, folder: Path | None = None) -> str:
    """Return what the commands that train print: each set's figures, then where they come from.

    Args:
        result: Of a fine-tuning, of a language model's training, or of an ensemble.
        folder: Where the run has written its files.
    """
    settings = result.settings
    title = {"mlm": "Masked language model", "lm": "Language model", "squad": "SQuAD"}.get(
        result.task, result.task.upper()
    )
    title += f" {settings['version']}" if settings.get("version") else ""
    title += f", ensemble of {settings['ensemble']} models" if "ensemble" in settings else ""
    if any(settings.get(f"{role}_limit") is not None for role in ("train", "dev", "test")):
        title += "  *** LIMITED RUN: not the figures of the whole data ***"
    rows = (_language_model_rows if result.task in ("mlm", "lm") else _task_rows)(result)
    trained = "lr" in settings and not settings.get("eval_only")
    told = [str(settings["recipe"])] if "recipe" in settings else []
    told += [training_plan(settings)] if trained else []
    rows.append(("recipe" if "recipe" in settings else "training", ", ".join(told)))
    data = settings["data"]["path"]
    rows.append(("data", data if isinstance(data, str) else f"{len(data)} files of predictions"))
    rows.append(("model", _trained_model(result)))
    if "tp" in settings:
        dtype = settings["dtype"]
        if settings.get("eval_dtype", dtype) != dtype:
            dtype += f", evaluated in {settings['eval_dtype']}"
        rows.append(("run", f"{dtype}, tp {settings['tp']} x dp {settings['dp']}"))
    rows += _training_time(result.timing)
    if folder is not None:
        rows.append(("written to", str(folder)))
    return rows_as_text(title, rows)


def _trained_model(result: Result) -> str:
    """Return the parameters of the model whose figures these are, and where it comes from."""
    stored, path = result.checkpoint["num_parameters"], result.checkpoint["path"]
    used = result.counts.get("model_parameters", stored)
    if used == stored:
        return f"{stored:,} parameters, {path}"
    return f"{used:,} parameters with its head, from the {stored:,} of {path}"


def sets_to_show(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the sets whose figures a reader needs, a role's pooled ones at its end.

    Where a role has one set only, its pooled figures are that set's: they are left out.
    """
    names = []
    for role in ("dev", "test"):
        parts = [name for name in metrics if name.startswith(f"{role}-")]
        names += parts
        pooled = metrics.get(role)
        if pooled is not None and [metrics[name]["total"] for name in parts] != [pooled["total"]]:
            names.append(role)
    return names


def _task_rows(result: Result) -> list[tuple[str, str]]:
    """Return the figures of a fine-tuning: of one seed, or the medians over seeds and each."""
    metrics = result.metrics
    seeds: Mapping[str, Any] = metrics.get("seeds", {})
    names = sets_to_show(metrics)
    if len(seeds) < 2:
        rows = [(name, _figures(metrics[name])) for name in names]
        return rows + [
            ("checkpoint-best", text)
            for run in seeds.values()
            if (text := _best(run["best"], result))
        ]
    median = metrics["median"]
    rows = []
    for name in names:
        of = f"median of {len(seeds)} seeds"
        if not name.startswith("dev"):
            of = f"of seed {median['seed']}, chosen by the median on dev"
        rows.append((name, f"{_figures(median[name])}   {of}"))
    for seed, found in seeds.items():
        pooled = [name for name in ("dev", "test") if name in found]
        rows.append((f"seed {seed}", "; ".join(f"{n} {_figures(found[n])}" for n in pooled)))
    return rows


def _best(best: Mapping[str, Any] | None, result: Result) -> str:
    """Return the best evaluation where it is not the last, whose figures are the result."""
    if best is None or best["step"] == result.counts["steps"]:
        return ""
    score = best["score"] if result.task == "squad" else 100 * best["score"]
    return f"dev {score:.2f} % after step {best['step']:,}, epoch {best['epoch']}"


def _figures(entry: Mapping[str, Any]) -> str:
    """Return a set's figures in a line; a median over seeds has no count of its own."""
    if "accuracy" in entry:
        told = f"{100 * entry['accuracy']:.2f} %"
        if "correct" in entry:
            told += f" ({entry['correct']:,} of {entry['total']:,})"
        return told + (f", F1 {100 * entry['f1']:.2f} %" if "f1" in entry else "")
    told = f"exact {entry['exact']:.2f} %, F1 {entry['f1']:.2f} % of {entry['total']:,}"
    if entry.get("null_threshold") is not None:
        told += f", no answer above the threshold {entry['null_threshold']:.4f}"
    return told


def _language_model_rows(result: Result) -> list[tuple[str, str]]:
    """Return the figures of a language model's training."""
    m, c = result.metrics, result.counts
    what = "hidden" if result.task == "mlm" else "predicted"
    rows = [("dev loss", f"{m['loss']:.4f}   nats, over {c['dev_samples']:,} samples")]
    if "order_loss" in m:
        rows.append(("", f"= {m['lm_loss']:.4f} per {what} token + {m['order_loss']:.4f} of order"))
    rows += [
        ("perplexity", f"{large(m['perplexity'])}   per {what} token"),
        ("accuracy", f"{100 * m['accuracy']:.2f} %   of the {what} tokens"),
    ]
    if "order_accuracy" in m:
        rows.append(("order", f"{100 * m['order_accuracy']:.2f} %   of the segments' orders"))
    if m["best"] is not None and m["best"]["step"] != c["steps"]:
        best = f"loss {m['best']['loss']:.4f} after step {m['best']['step']:,}"
        rows.append(("checkpoint-best", best))
    rows.append(("last step", f"loss {m['final_training_loss']:.4f} in training"))
    return rows


def training_plan(settings: Mapping[str, Any]) -> str:
    """Return the settings of a training that a reader asks for first."""
    steps = settings["max_steps"]
    length = _counted(settings["epochs"], "epoch") if steps is None else _counted(steps, "step")
    return (
        f"{length}, batch {settings['global_batch']}, learning rate {settings['lr']:g}, rows of "
        f"{settings['seq_length']:,} tokens"
    )


def large(number: float) -> str:
    """Return a figure that can be beyond all bounds."""
    return f"{number:.4f}" if number < 1e6 else f"{number:.4g}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _training_time(timing: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how long a run took; nothing for an ensemble, which runs no model."""
    if "train_seconds" in timing:
        speed = timing["samples_per_second"]
        return [("time", f"{timing['train_seconds']:.1f} s of training, {speed:,.1f} samples/s")]
    if "eval_seconds" in timing:
        return [("time", f"{timing['eval_seconds']:.1f} s of evaluation")]
    return []


def comparison_text(comparison: Comparison) -> str:
    """Return what `verify` prints."""
    c = comparison
    rows = [("differs", phrase) for phrase in c.differences()]
    if c.weights is not None:
        rows.append(("weights", _weights_text(c.weights)))
    if c.padding is not None:
        rows.append(("padding", str(c.padding)))
    if not c.measured:
        rows.append(("outputs", "not computed: the same weights and settings give the same ones"))
    rows += [
        ("largest difference", f"{c.max_difference:.3g}"),
        ("mean difference", f"{c.mean_difference:.3g}"),
        ("same greedy token", f"{100 * c.greedy_agreement:.2f} % of positions"),
    ]
    for name, gap in c.by_output.items():
        limit = c.allowed.get(name, float("inf"))
        rows.append((f"  {name}", f"{gap:.3g}" + f" (allowed: {limit:.3g})" * (limit < math.inf)))
    if c.measured and c.last_position is not None:
        rows.append(("measured on", f"{c.tokens:,} tokens, up to position {c.last_position:,}"))
    rows += [("note", note) for note in c.notes]
    return rows_as_text(f"verdict: {c.verdict}", rows)


def _weights_text(weights: WeightComparison) -> str:
    """Return what became of the weights' comparison, in one line."""
    counted = f"{weights.elements:,} in {weights.tensors:,} tensors compared"
    if not weights.same:
        return f"{counted}, {len(weights.differing):,} tensors differ"
    after = [f"after rounding to {name}" for name in weights.rounded_to]
    return ", ".join([counted, " ".join(["all the same", *after]), *weights.forms])
