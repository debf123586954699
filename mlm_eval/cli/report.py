"""Commands around the numbers: report, plan, catalog."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError, require
from mlm_eval.cli.checkpoints import InspectOptions
from mlm_eval.cli.command import command
from mlm_eval.cli.printing import show_text
from mlm_eval.cli.run import print_beside
from mlm_eval.options import DTYPES, PAGE, RunOptions, again, option
from mlm_eval.training.settings import DP_MODES

if TYPE_CHECKING:
    from mlm_eval.checkpoints.catalog import CatalogEntry
    from mlm_eval.checkpoints.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The options of `report`."""

    results: tuple[Path, ...] = option(
        "What --output wrote, of any command and of series; a training's result.json; lines of "
        "score; results of lm-evaluation-harness.",
        positional=True,
    )
    table: int | None = option(
        "3 (zero-shot) or 5 (fine-tuning); default: those of the records.", None
    )
    curve: bool = option(
        "Figures over iterations, samples and tokens, a line for each run.", False, flag="--curve"
    )
    format: str = option(
        "md, latex, csv, html (one page, with plots), or png with --curve; default: what the "
        "name of --output ends with.",
        "md",
        choices=("md", "latex", "csv", "html", "png"),
    )
    output: Path | None = option(
        "Write to this file instead of the terminal; a page of an earlier report is replaced.",
        None,
        writes=PAGE,
    )
    overwrite: bool = again(RunOptions, "overwrite")
    include_limited: bool = option(
        "Also take records of --limit runs, and mark them.", False, flag="--include-limited"
    )


@command("report", ReportOptions)
def report(options: ReportOptions) -> None:
    """A letter beside a figure leads to what keeps it from being the paper's.

    Example: mlm-eval report wikitext103.json lambada.json --format html --output table3.html
    """
    from mlm_eval.checkpoints.files.output import atomic_file, write_text
    from mlm_eval.reporting.render import render
    from mlm_eval.tasks.comparison import build_comparisons
    from mlm_eval.tasks.paper import build_tables
    from mlm_eval.tasks.records import read_results, tables_of_benchmarks

    fmt = _format(options)
    if fmt == "png" and not (options.curve and options.output):
        raise InputError("--format png draws curves: give --curve and --output FILE.png")
    if options.curve and options.table is not None:
        raise InputError("--curve and --table are two reports; give one of them")
    if fmt == "png":
        require("matplotlib", "--format png")
    records = [record for path in options.results for record in read_results(path)]
    limited = options.include_limited
    if options.curve:
        curves = build_comparisons(records, curve=True, include_limited=limited)
        if fmt == "png":
            from mlm_eval.reporting.curves import curve_png

            assert options.output is not None
            with atomic_file(options.output, option="--output") as partial:
                curve_png(curves, partial)
        text = "" if fmt == "png" else render(curves, fmt, curves=True)
        told = [f"curve of {curve.title}" for curve in curves]
    else:
        known = tables_of_benchmarks()
        inside = [r for r in records if options.table is not None or r.benchmark in known]
        others = [r for r in records if options.table is None and r.benchmark not in known]
        tables = []
        if inside or not others:
            tables = build_tables(inside, number=options.table, include_limited=limited)
        comparisons = build_comparisons(others, include_limited=limited)
        text = render([*tables, *comparisons], fmt)
        told = [f"Table {table.number}" for table in tables] + [c.title for c in comparisons]
    if options.output is None:
        show_text(text, end="")
        return
    if fmt != "png":
        write_text(options.output, text)
    shown = f"{' and '.join(told)} with {len(records)} record(s): {options.output}"
    print_beside(shown, options.output)


def _format(options: ReportOptions) -> str:
    """Return the format that is asked for, or that the output's name says."""
    endings = {".tex": "latex", ".csv": "csv", ".html": "html", ".htm": "html", ".png": "png"}
    named = endings.get(options.output.suffix.lower()) if options.output else None
    return named if named and options.format == "md" else options.format


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of `plan`."""

    ckpt: str | None = option("A checkpoint; its settings are read.", None, reads=True, once=True)
    model: str | None = option("Or a size by name.", None, names="sizes")
    tp: int | None = option("Only this tensor-parallel size.", None, least=1)
    device_memory: str | None = option("Memory of a device, such as 80GB: shows what fits.", None)
    throughput: str | None = option(
        "What a device sustains, such as 400TFLOPS: shows how long it takes.", None
    )
    task: str | None = option(
        "Only this task: wikitext103, lambada, lm; race, mnli, qqp, squad, mlm.",
        None,
        choices=("wikitext103", "lambada", "lm", "race", "mnli", "qqp", "squad", "mlm"),
    )
    dtype: str = option(
        "auto (the checkpoint's; bfloat16 for a named size), float32, bfloat16, float16.",
        "auto",
        choices=DTYPES,
    )
    device: str = option("What to plan for: cuda or cpu.", "cuda", choices=("cuda", "cpu"))
    batch_tokens: int | None = again(
        RunOptions, "batch_tokens", help="Tokens of an evaluation's forward pass on a rank."
    )
    micro_batch: int = option("Samples of a training step's forward pass on a rank.", 8, least=1)
    hidden_dropout: float = option(
        "Dropout of hidden states in training.", 0.1, least=0.0, most=1.0
    )
    attention_dropout: float = option(
        "Dropout of attention in training; 0 needs much less memory.", 0.1, least=0.0, most=1.0
    )
    recompute: bool = option("Train with activation checkpointing.", False, flag="--recompute")
    dp: int = option("Copies of the model in training.", 1, least=1)
    dp_mode: str = option(
        "ddp, or fsdp2: shard weights, gradients and moments over the --dp copies.",
        "ddp",
        choices=DP_MODES,
    )
    as_json: bool = again(InspectOptions, "as_json")
    overrides: tuple[str, ...] = again(RunOptions, "overrides")


@command("plan", PlanOptions)
def plan(options: PlanOptions) -> None:
    """Reads no weights.

    Example: mlm-eval plan --model gpt2-8.3b --device-memory 80GB --throughput 400TFLOPS
    """
    import json

    from mlm_eval.checkpoints.dtypes import dtype_name, evaluation_dtype
    from mlm_eval.checkpoints.memory.byte_size import parse_bytes
    from mlm_eval.engine.batching import DEFAULT_BATCH_TOKENS
    from mlm_eval.model.costs.memory import TrainingBatch
    from mlm_eval.planning.plan import parse_throughput, plan_record
    from mlm_eval.planning.plan_text import plan_text
    from mlm_eval.tasks.workloads import workloads

    if (options.ckpt is None) == (options.model is None):
        raise InputError("give --ckpt C, or --model NAME for a size without a checkpoint")
    memory, rate = options.device_memory, options.throughput
    config_of, paper_count = _source(options)
    first = config_of(1)
    stored = first.params_dtype if options.ckpt else "bfloat16"
    precision = dtype_name(evaluation_dtype(options.dtype, stored, "cuda"))
    training: dict[str, Any] = {
        "hidden_dropout": options.hidden_dropout,
        "attention_dropout": options.attention_dropout,
        "recompute": options.recompute,
    }
    batch = TrainingBatch(
        rows=options.micro_batch, length=1, half=precision != "float32", **training
    )
    record = plan_record(
        str(options.model or options.ckpt),
        config_of,
        workloads(first, task=options.task, size=options.model or _size_of(first), batch=batch),
        itemsize=4 if precision == "float32" else 2,
        batch_tokens=options.batch_tokens or DEFAULT_BATCH_TOKENS[options.device],
        device=options.device,
        tp=options.tp,
        dp=options.dp,
        sharded=options.dp_mode == "fsdp2",
        device_memory=None if memory is None else parse_bytes(memory, "--device-memory"),
        throughput=None if rate is None else parse_throughput(rate),
        paper_parameters=paper_count,
        settings={
            "dtype": precision,
            "micro_batch": options.micro_batch,
            **training,
            "dp": options.dp,
            "dp_mode": options.dp_mode,
        },
    )
    show_text(json.dumps(record, indent=2) if options.as_json else plan_text(record))


def _source(options: PlanOptions) -> tuple[Callable[[int], ModelConfig], int | None]:
    """Return the settings for a tensor-parallel size, and the paper's number of parameters."""
    from mlm_eval.checkpoints.config import apply_overrides, parse_overrides
    from mlm_eval.checkpoints.open import open_checkpoint
    from mlm_eval.model.sizes import named_config, paper_parameters

    overrides, model = parse_overrides(options.overrides), options.model
    if model is None:
        config = open_checkpoint(str(options.ckpt), overrides).config
        return lambda tp: config, None
    count = paper_parameters(model)
    return (
        lambda tp: apply_overrides(named_config(model, tp=tp), overrides),
        None if overrides else count,
    )


def _size_of(config: ModelConfig) -> str | None:
    """Return the named size that a model has, if any."""
    from mlm_eval.model.sizes import SIZES

    shape = (config.num_layers, config.hidden_size, config.num_attention_heads)
    names = [n for n, size in SIZES.items() if size == shape and n.startswith(config.family)]
    return names[0] if names else None


@dataclass(frozen=True, kw_only=True)
class CatalogOptions:
    """The options of `catalog`."""

    name: str | None = option("Show everything about this one.", None, positional=True)
    as_json: bool = again(InspectOptions, "as_json")


@command("catalog", CatalogOptions, config=False)
def catalog(options: CatalogOptions) -> None:
    """Their files are looked for in $MLM_EVAL_CATALOG.

    --ckpt catalog:NAME then opens them with the settings that they do not record.

    Example: mlm-eval catalog megatron-gpt2-345m
    """
    import dataclasses
    import json

    from mlm_eval.checkpoints.catalog import catalog_entries, find_entry, locate

    name = options.name
    chosen = list(catalog_entries().values()) if name is None else [find_entry(name)]
    places = {entry.name: locate(entry) for entry in chosen}
    if options.as_json:
        records = [
            {**dataclasses.asdict(entry), "path": str(p) if (p := places[entry.name]) else None}
            for entry in chosen
        ]
        show_text(json.dumps(records, indent=2))
    elif name is None:
        _print_list(chosen, places)
    else:
        _print_entry(chosen[0], places[chosen[0].name])


def _print_list(entries: list[CatalogEntry], places: dict[str, Path | None]) -> None:
    from mlm_eval.checkpoints.catalog import FOLDER_VARIABLE, local_folder

    for entry in entries:
        found = places[entry.name]
        show_text(
            f"{entry.name}\n  {entry.title}\n  {'here: ' + str(found) if found else 'not here'}"
        )
    folder = local_folder()
    show_text(f"\nlooked for in {folder} (${FOLDER_VARIABLE} names another folder)")
    show_text("`mlm-eval catalog NAME` shows more; `--ckpt catalog:NAME` opens what is here")


def _print_entry(entry: CatalogEntry, found: Path | None) -> None:
    from mlm_eval.reporting.text import rows_as_text

    settings = ", ".join(f"{name}={value}" for name, value in entry.settings.items())
    rows = [
        ("published by", entry.publisher),
        ("holds", entry.holds),
        ("tokenizer", entry.tokenizer),
        ("not recorded", f"{settings} (applied with --ckpt catalog:{entry.name})"),
        *(("to get it", command) for command in entry.get),
        ("files here", str(found) if found else "none"),
    ]
    show_text(rows_as_text(f"{entry.name}: {entry.title}", rows))
    show_text("\nreported figures")
    for item in entry.expect:
        unit = " %" if item.unit == "%" else ""
        note = f"; {item.note}" if item.note else ""
        show_text(
            f"  {item.task} {item.metric} {item.value:g}{unit}: {item.who} ({item.where}){note}"
        )
