"""Commands around the numbers: report, plan, catalog."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.app import app
from mlm_eval.cli.options import Config, Sets

if TYPE_CHECKING:
    from mlm_eval.checkpoints.catalog import CatalogEntry
    from mlm_eval.checkpoints.config import ModelConfig

REPORTS = "Tables and planning"
"""Title of the group that `mlm-eval --help` shows."""


@app.command(rich_help_panel=REPORTS)
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Result records: what --output wrote, or a fine-tuning's result.json."),
    ],
    table: Annotated[
        int | None,
        typer.Option(help="3 (zero-shot) or 5 (fine-tuning); default: those of the records."),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="md, latex, csv or html (one page, with plots).")
    ] = "md",
    output: Annotated[
        Path | None, typer.Option(help="Write to this file instead of the terminal.")
    ] = None,
    include_limited: Annotated[
        bool,
        typer.Option("--include-limited", help="Take records of --limit runs, too, and mark them."),
    ] = False,
    config: Config = None,
) -> None:
    """Show measured figures among the paper's, with their differences and what is not comparable.

    Example: mlm-eval report wikitext103.json lambada.json --format html --output table3.html
    """
    from mlm_eval.checkpoints.files.output import write_text
    from mlm_eval.reporting.render import FORMATS, render
    from mlm_eval.reporting.results import check_writable
    from mlm_eval.tasks.paper import build_tables
    from mlm_eval.tasks.records import read_record

    if format_ not in FORMATS:
        raise InputError(f"--format {format_} is unknown; choose {', '.join(FORMATS)}")
    if output is not None:
        check_writable(output)
    records = [read_record(path) for path in results]
    tables = build_tables(records, number=table, include_limited=include_limited)
    text = render(tables, format_)
    if output is None:
        print(text, end="")
        return
    write_text(output, text)
    numbers = " and ".join(f"Table {table.number}" for table in tables)
    print(f"{numbers} with {len(records)} record(s): {output}")


@app.command(rich_help_panel=REPORTS)
def plan(
    ckpt: Annotated[str | None, typer.Option(help="A checkpoint; its settings are read.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Or a size by name, such as gpt2-8.3b or bert-336m.")
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Only this tensor-parallel size.")] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of a device, such as 80GB: tells what fits.")
    ] = None,
    throughput: Annotated[
        str | None,
        typer.Option(help="What a device sustains, such as 400TFLOPS: tells how long it takes."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Only this task: wikitext103, lambada, lm; race, mnli, qqp, squad, mlm."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (the checkpoint's; bfloat16 for a named size), float32, bfloat16, float16."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="What to plan for: cuda or cpu.")] = "cuda",
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of an evaluation's forward pass on a rank; default: the engine's."
        ),
    ] = None,
    micro_batch: Annotated[
        int, typer.Option(min=1, help="Samples of a training step's forward pass on a rank.")
    ] = 8,
    hidden_dropout: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of training.")] = 0.1,
    attention_dropout: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of training; 0 needs much less memory.")
    ] = 0.1,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Training with activation checkpointing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record.")] = False,
    set_: Sets = None,
    config: Config = None,
) -> None:
    """Tell what runs will need: memory of each rank, floating-point operations, time.

    Reads no weights.

    Example: mlm-eval plan --model gpt2-8.3b --device-memory 80GB --throughput 400TFLOPS
    """
    import json

    from mlm_eval.checkpoints.dtypes import dtype_name, evaluation_dtype
    from mlm_eval.checkpoints.files.byte_size import parse_bytes
    from mlm_eval.engine.batching import DEFAULT_BATCH_TOKENS
    from mlm_eval.model.memory import TrainingBatch
    from mlm_eval.planning.plan import make_plan, parse_throughput
    from mlm_eval.planning.plan_text import plan_text
    from mlm_eval.tasks.workloads import workloads

    if (ckpt is None) == (model is None):
        raise InputError("give --ckpt C, or --model NAME for a size without a checkpoint")
    if device not in DEFAULT_BATCH_TOKENS:
        raise InputError(f"--device {device!r} is unknown; plan for cuda or cpu")
    memory = None if device_memory is None else parse_bytes(device_memory, "--device-memory")
    rate = None if throughput is None else parse_throughput(throughput)
    name, config_of, paper_count = (
        _checkpoint(ckpt, set_ or []) if ckpt is not None else _named(model or "", set_ or [])
    )
    first = config_of(1)
    stored = "bfloat16" if ckpt is None else first.params_dtype
    precision = dtype_name(evaluation_dtype(dtype, stored, "cuda"))
    batch = TrainingBatch(
        rows=1,
        length=1,
        hidden_dropout=hidden_dropout,
        attention_dropout=attention_dropout,
        half=precision != "float32",
        recompute=recompute,
    )
    size = model if model is not None else _size_of(first)
    made = make_plan(
        name,
        config_of,
        workloads(first, task=task, size=size, micro_batch=micro_batch, batch=batch),
        itemsize=4 if precision == "float32" else 2,
        batch_tokens=batch_tokens or DEFAULT_BATCH_TOKENS[device],
        device=device,
        tp=tp,
        device_memory=memory,
        throughput=rate,
        paper_parameters=paper_count,
        settings={
            "dtype": precision,
            "micro_batch": micro_batch,
            "hidden_dropout": hidden_dropout,
            "attention_dropout": attention_dropout,
            "recompute": recompute,
            "throughput": rate,
        },
    )
    print(json.dumps(made.to_dict(), indent=2) if as_json else plan_text(made))


_Source = tuple[str, "Callable[[int], ModelConfig]", "int | None"]


def _checkpoint(ckpt: str, sets: list[str]) -> _Source:
    from mlm_eval.checkpoints.config import parse_overrides
    from mlm_eval.checkpoints.open import open_checkpoint

    checkpoint = open_checkpoint(ckpt, parse_overrides(sets))
    return ckpt, lambda tp: checkpoint.config, None


def _named(model: str, sets: list[str]) -> _Source:
    from mlm_eval.checkpoints.config import apply_overrides, parse_overrides
    from mlm_eval.model.sizes import named_config, paper_parameters

    overrides = parse_overrides(sets)
    count = paper_parameters(model)

    def config_of(tp: int) -> ModelConfig:
        return apply_overrides(named_config(model, tp=tp), overrides)

    return model, config_of, None if overrides else count


def _size_of(config: ModelConfig) -> str | None:
    """Return the named size that a model has, if any."""
    from mlm_eval.model.initial import SIZES

    shape = (config.num_layers, config.hidden_size, config.num_attention_heads)
    prefix = "gpt" if config.family == "gpt" else "bert"
    names = [name for name, size in SIZES.items() if size == shape and name.startswith(prefix)]
    return names[0] if names else None


@app.command(rich_help_panel=REPORTS)
def catalog(
    name: Annotated[str | None, typer.Argument(help="Tell all about this one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record.")] = False,
) -> None:
    """List the public checkpoints we know, how to get them, and what to expect of them.

    Their files are looked for in $MLM_EVAL_CATALOG; --ckpt catalog:NAME then opens them with the
    settings that they do not record.

    Example: mlm-eval catalog megatron-gpt2-345m
    """
    import dataclasses
    import json

    from mlm_eval.checkpoints.catalog import catalog_entries, find_entry, locate

    chosen = list(catalog_entries().values()) if name is None else [find_entry(name)]
    places = {entry.name: locate(entry) for entry in chosen}
    if as_json:
        records = [
            {**dataclasses.asdict(entry), "path": str(p) if (p := places[entry.name]) else None}
            for entry in chosen
        ]
        print(json.dumps(records, indent=2))
    elif name is None:
        _print_list(chosen, places)
    else:
        _print_entry(chosen[0], places[chosen[0].name])


def _print_list(entries: list[CatalogEntry], places: dict[str, Path | None]) -> None:
    from mlm_eval.checkpoints.catalog import FOLDER_VARIABLE, local_folder

    for entry in entries:
        found = places[entry.name]
        print(f"{entry.name}\n  {entry.title}\n  {'here: ' + str(found) if found else 'not here'}")
    folder = local_folder()
    print(f"\nlooked for in {folder} (${FOLDER_VARIABLE} names another folder)")
    print("`mlm-eval catalog NAME` tells more; `--ckpt catalog:NAME` opens what is here")


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
    print(rows_as_text(f"{entry.name}: {entry.title}", rows))
    print("\nreported figures")
    for item in entry.expect:
        unit = " %" if item.unit == "%" else ""
        note = f"; {item.note}" if item.note else ""
        print(f"  {item.task} {item.metric} {item.value:g}{unit}: {item.who} ({item.where}){note}")
