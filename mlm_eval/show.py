"""What people read: tables and sentences built from records, for the command line to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.results import Result

if TYPE_CHECKING:
    from mlm_eval.verify import Comparison


def rows_as_text(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a title and aligned `name  value` lines."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def inspect_record(checkpoint: Checkpoint, digest: str) -> dict[str, Any]:
    """Return the JSON record of `mlm-eval inspect`."""
    provenance = checkpoint.provenance
    return {
        "path": str(provenance.path),
        "format": provenance.format,
        "checkpoint_version": provenance.checkpoint_version,
        "tensor_parallel": provenance.tensor_parallel,
        "pipeline_parallel": provenance.pipeline_parallel,
        "iteration": provenance.iteration,
        "config": checkpoint.config.to_dict(),
        "config_sources": dict(provenance.config_sources),
        "num_parameters": checkpoint.num_parameters,
        "digest": digest,
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


def inspect_text(record: Mapping[str, Any]) -> str:
    """Return the table of `mlm-eval inspect`."""
    sources = record["config_sources"]
    rows = [
        ("path", str(record["path"])),
        ("format", str(record["format"])),
        ("checkpoint version", _or_none(record["checkpoint_version"])),
        (
            "saved as",
            f"tensor-parallel {record['tensor_parallel']} x pipeline {record['pipeline_parallel']}",
        ),
        ("iteration", _or_none(record["iteration"])),
        ("parameters", f"{record['num_parameters']:,}"),
        ("digest", str(record["digest"])),
    ]
    config = [
        (name, f"{_plain(value):<20} {sources.get(name, '')}".rstrip())
        for name, value in record["config"].items()
        if value is not None
    ]
    parts = [
        rows_as_text("checkpoint", rows),
        rows_as_text("model (setting, value, where it came from)", config),
    ]
    for title, name in (
        ("pickled classes (inert here)", "pickle_classes"),
        ("notes", "notes"),
        ("warnings", "warnings"),
    ):
        if record[name]:
            parts.append("\n".join([title, *(f"  {item}" for item in record[name])]))
    return "\n\n".join(parts)


def _or_none(value: Any) -> str:
    return "not recorded" if value is None else str(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def result_text(result: Result) -> str:
    """Return what `wikitext103` and `lambada` print: numbers, then the protocol they belong to."""
    rows = (_wikitext_rows if result.task == "wikitext103" else _lambada_rows)(result)
    settings, checkpoint = result.settings, result.checkpoint
    rows += [
        ("model", f"{checkpoint['num_parameters']:,} parameters, {checkpoint['path']}"),
        (
            "run",
            f"{settings['dtype']}, tp {settings['tp']} x dp {settings['dp']}, "
            f"softmax over the {settings['vocab']} vocabulary ({settings['vocab_size']:,} rows)",
        ),
        ("time", _time(result)),
    ]
    title = {"wikitext103": "WikiText-103 perplexity", "lambada": "LAMBADA accuracy"}[result.task]
    if settings.get("limit") is not None:
        title += "  *** LIMITED RUN: not the number of the whole file ***"
    return rows_as_text(title, rows)


def _wikitext_rows(result: Result) -> list[tuple[str, str]]:
    m, c, s = result.metrics, result.counts, result.settings
    rows = [
        (
            "adjusted perplexity",
            f"{m['adjusted_ppl']:.4f}   per word of the original text, as the paper counts",
        ),
        ("plain perplexity", f"{m['ppl']:.4f}   per token"),
        ("average loss", f"{m['avg_loss']:.6f} nats per token, over {c['scored_tokens']:,} tokens"),
        (
            "token ratio",
            f"{m['token_ratio']:.10f} = ({c['tokenized_tokens']:,} - 1) / "
            f"({c['original_tokens']:,} - 1)",
        ),
        (
            "protocol",
            f"windows of {s['seq_length']:,} tokens, stride {s['stride']}, {c['windows']:,} "
            "windows",
        ),
        ("data", str(s["data"]["path"])),
    ]
    if m["clamped_at_20"]:
        rows.insert(
            1, ("", "Megatron would have clamped the exponent at 20; these are not clamped")
        )
    return rows


def _lambada_rows(result: Result) -> list[tuple[str, str]]:
    m, c, s = result.metrics, result.counts, result.settings
    target = "every token of the last word" if s["target"] == "word" else "the last token only"
    return [
        (
            "accuracy",
            f"{100 * m['accuracy']:.2f} % +- {100 * m['accuracy_stderr']:.2f} "
            f"({m['num_correct']:,} of {c['examples']:,})",
        ),
        ("target perplexity", f"{m['target_ppl']:.4f}   per target"),
        ("protocol", f"greedy match of {target}"),
        ("data", str(s["data"]["path"])),
    ]


def _time(result: Result) -> str:
    timing = result.timing
    speed = timing.get("tokens_per_second") or 0.0
    load, run = timing["load_seconds"], timing["eval_seconds"]
    return f"{run:.1f} s after {load:.1f} s of loading, {speed:,.0f} tokens/s"


def work_text(unit: str, count: int, tokens: int, flops: float) -> str:
    """Return the announcement of the work ahead."""
    work = f"{count:,} {unit}, {tokens:,} tokens through the model"
    return f"work ahead: {work}, {flops / 1e12:,.3g} TFLOP"


def training_text(result: Result) -> str:
    """Return what the commands that train print: each set's figures, then where they come from."""
    several = len(result.metrics.get("seeds", ())) > 1
    rows = [
        (name, _figures(value))
        for name, value in result.metrics.items()
        if name not in ("seeds", "median") or (name == "seeds" and several)
    ]
    rows.append(("model", str(result.checkpoint.get("path", ""))))
    settings = result.settings
    if "tp" in settings:
        rows.append(("run", f"{settings.get('dtype')}, tp {settings['tp']} x dp {settings['dp']}"))
    return rows_as_text(result.task.upper(), rows)


def _figures(value: Any) -> str:
    """Return figures in one line: counts as `12 of 40`, lists of names left out."""
    if isinstance(value, dict):
        if {"accuracy", "correct", "total"} <= value.keys():
            return f"{100 * value['accuracy']:.2f} % ({value['correct']:,} of {value['total']:,})"
        shown = {name: item for name, item in value.items() if not isinstance(item, list)}
        return ", ".join(f"{name} {_figures(item)}" for name, item in shown.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def comparison_text(comparison: Comparison) -> str:
    """Return what `verify` prints."""
    verdict = "the same" if comparison.same else "DIFFERENT"
    rows = [
        (
            "largest difference",
            f"{comparison.max_difference:.3g} (allowed: {comparison.tolerance:g})",
        ),
        ("mean difference", f"{comparison.mean_difference:.3g}"),
        ("same greedy token", f"{100 * comparison.greedy_agreement:.2f} % of positions"),
        *((f"  {name}", f"{gap:.3g}") for name, gap in comparison.by_output.items()),
    ]
    return rows_as_text(f"verdict: {verdict}", rows)
