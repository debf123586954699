"""bench: how fast a model runs on this machine, and how that scales with tensor parallelism."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.app import app
from mlm_eval.cli.options import Config, Device, Output, Sets
from mlm_eval.cli.report import REPORTS
from mlm_eval.ranks.launch import LaunchResult, init_process_group, launch, shutdown
from mlm_eval.ranks.world import World, detect_world

if TYPE_CHECKING:
    from mlm_eval.checkpoints.config import ModelConfig
    from mlm_eval.planning.bench_options import BenchOptions
    from mlm_eval.planning.bench_run import Measured
    from mlm_eval.planning.bench_study import BenchPoint, BenchSeries


@app.command(rich_help_panel=REPORTS)
def bench(
    study: Annotated[
        str | None,
        typer.Option(help="The paper's scaling: weak (Table 1, Figure 5) or strong (Table 8)."),
    ] = None,
    ckpt: Annotated[str | None, typer.Option(help="Or a checkpoint, at each --tp.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Or a new model of a named size, such as gpt2-355m.")
    ] = None,
    tp: Annotated[
        str,
        typer.Option(
            help="Tensor-parallel sizes, such as 1,2,4,8; auto: those of 1,2,4,8 that the machine "
            "has GPUs (on the CPU: cores) for."
        ),
    ] = "auto",
    mode: Annotated[
        str, typer.Option(help="infer (forward passes) or train (whole training steps).")
    ] = "infer",
    scale: Annotated[
        str,
        typer.Option(
            help="Shrinks new models: layers and hidden size by about this factor, above 0 and up "
            "to 1; auto: the largest that fits the free memory."
        ),
    ] = "1",
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 8,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Training: rows of a forward pass; default: --batch.")
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a row; default: positions, at most 1024.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 10,
    warmup_steps: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 3,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the matrix products: auto (bfloat16 on CUDA, float32 on CPU), float32, "
            "bfloat16 or float16."
        ),
    ] = "auto",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Training with activation checkpointing.")
    ] = False,
    hidden_dropout: Annotated[float, typer.Option(help="Of training.")] = 0.1,
    attention_dropout: Annotated[float, typer.Option(help="Of training; 0 is faster.")] = 0.1,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this PNG file.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and tokens.")] = 1234,
    set_: Sets = None,
    config: Config = None,
    job: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure tokens/s, the share of the device's matrix-product peak, and how that scales.

    Each layout runs in ranks of its own. The peak is measured on the same ranks in the same dtype.

    Example: mlm-eval bench --study weak --tp 1,2 --scale 0.1 --output bench.json --plot bench.png
    """
    if job is not None:
        _rank(job)
        return
    from mlm_eval.checkpoints.dtypes import training_dtype
    from mlm_eval.planning.bench_options import BenchOptions, cores, parse_scale, parse_sizes
    from mlm_eval.planning.bench_plot import plot_bench
    from mlm_eval.planning.bench_report import bench_record, bench_text
    from mlm_eval.planning.bench_study import fit
    from mlm_eval.ranks.mesh import pick_device
    from mlm_eval.reporting.results import check_writable, write_json

    for path in filter(None, (output, plot)):
        check_writable(path)
    factor = parse_scale(scale)
    if ckpt is not None and factor != 1.0:
        raise InputError("--scale shrinks new models, a checkpoint has its size; leave it out")
    world = detect_world()
    kind = pick_device(device)
    options = BenchOptions(
        device=kind,
        dtype=training_dtype(dtype, kind),
        mode=mode,
        batch=batch,
        micro_batch=micro_batch,
        seq_length=seq_length,
        steps=steps,
        warmup_steps=warmup_steps,
        recompute=recompute,
        hidden_dropout=hidden_dropout,
        attention_dropout=attention_dropout,
        seed=seed,
        ckpt=ckpt,
        overrides=tuple(set_ or ()) if ckpt is not None else (),
    )
    sizes = _of_world(parse_sizes(tp), world)
    make = _source(study, ckpt, model, set_ or [], sizes, kind)
    local_ranks = None if world is None else world.local_size
    series = fit(make, options, scale=factor, local_ranks=local_ranks)
    is_main = world is None or world.is_main
    if is_main:
        _announce(series, options)
    failure = None
    if world is not None:
        measured = [_measure_here(series.points[0], options, world)]
    else:
        measured, failure = _on_fresh_ranks(series.points, options)
    if is_main and measured:
        failed = None
        if failure is not None:
            size = series.points[len(measured)].tp
            failed = f"tp {size} and what follows it was not measured: it failed"
        record = bench_record(series, options, measured, cores=cores(), failed=failed)
        print(bench_text(record))
        if output is not None:
            write_json(output, record)
        if plot is not None:
            plot_bench(record, plot)
    if failure is not None:
        if failure.message is not None:
            print(f"mlm-eval: {failure.message}", file=sys.stderr)
        raise SystemExit(failure.exit_code)


def _of_world(sizes: list[int] | None, world: World | None) -> list[int] | None:
    """Return the sizes that can be measured: of ranks that run already, one.

    Raises:
        InputError: Others are asked for.
    """
    if world is None or sizes == [world.size]:
        return sizes
    if sizes is None:
        return [world.size]
    raise InputError(
        f"{world.size} rank(s) are running, so only tp {world.size} can be measured; give --tp "
        f"{world.size}, or start mlm-eval without a launcher for --tp {','.join(map(str, sizes))}"
    )


def _source(
    study: str | None,
    ckpt: str | None,
    model: str | None,
    sets: list[str],
    sizes: list[int] | None,
    device: str,
) -> Callable[[float], BenchSeries]:
    """Return a function that makes the series at a scale.

    Raises:
        InputError: Not exactly one of them is given, or it does not exist.
    """
    from mlm_eval.checkpoints.config import apply_overrides, parse_overrides
    from mlm_eval.checkpoints.open import open_checkpoint
    from mlm_eval.model.sizes import named_config
    from mlm_eval.planning.bench_study import model_series, paper_series, usual_sizes

    if sum(given is not None for given in (study, ckpt, model)) != 1:
        raise InputError(
            "give one of --ckpt C, --model NAME (a new model of a named size), and --study weak "
            "or strong"
        )
    if study is not None:
        from mlm_eval.tasks.paper import load_paper

        if sets:
            raise InputError("--set changes a model, --study takes the paper's; leave it out")
        chosen = sizes or usual_sizes(device)
        return lambda scale: paper_series(study, load_paper(), chosen, scale=scale)
    overrides = parse_overrides(sets)
    if model is not None:
        # One vocabulary for all sizes: padded as Megatron pads it for the largest.
        found: ModelConfig = apply_overrides(named_config(model, tp=max(sizes or [8])), overrides)
    else:
        assert ckpt is not None
        found = open_checkpoint(ckpt, overrides).config
    name = model or Path(str(ckpt)).name
    chosen = sizes or usual_sizes(device, found)
    return lambda scale: model_series(name, found, chosen, scale=scale)


def _announce(series: BenchSeries, options: BenchOptions) -> None:
    """Print on stderr what is going to be measured."""
    from mlm_eval.planning.bench_study import step_flops

    count = options.steps + options.warmup_steps
    work = sum(step_flops(point.config, options) * count for point in series.points)
    shrunk = "" if series.scale == 1.0 else f", scaled by {series.scale:g}"
    sizes = ", ".join(str(point.tp) for point in series.points)
    print(
        f"work ahead: {series.title}{shrunk}, tp {sizes}, {work / 1e12:,.3g} TFLOP in all",
        file=sys.stderr,
    )


# --- ranks ---------------------------------------------------------------------------------------


def _rank(path: Path) -> None:
    """Measure the point of a job file, as one of its ranks; rank 0 writes the answer next to it."""
    import dataclasses

    from mlm_eval.checkpoints.config import ModelConfig
    from mlm_eval.planning.bench_options import BenchOptions
    from mlm_eval.planning.bench_study import BenchPoint
    from mlm_eval.reporting.results import write_json

    world = detect_world()
    assert world is not None, "a job is for ranks"
    job = json.loads(path.read_text(encoding="utf-8"))
    point = BenchPoint(job["tp"], job["model"], ModelConfig(**job["config"]))
    measured = _measure_here(point, BenchOptions(**job["options"]), world)
    if world.is_main:
        write_json(_answer(path), dataclasses.asdict(measured))


def _answer(path: Path) -> Path:
    return path.with_suffix(".measured.json")


def _measure_here(point: BenchPoint, options: BenchOptions, world: World) -> Measured:
    """Measure a point on the ranks that run, of which this process is one."""
    from mlm_eval.planning.bench_run import measure_point

    if world.size > 1:
        init_process_group(world, device=options.device)
    measured = measure_point(point, options)
    shutdown()
    return measured


def _on_fresh_ranks(
    points: Sequence[BenchPoint], options: BenchOptions
) -> tuple[list[Measured], LaunchResult | None]:
    """Measure each point in processes of its own; return also how the first to fail has failed."""
    import dataclasses

    from mlm_eval.planning.bench_options import cores
    from mlm_eval.planning.bench_run import Measured

    # A rank has as many threads at every size: else more ranks would be slower ranks.
    most = max(point.tp for point in points)
    threads = max(1, cores() // most) if options.device == "cpu" else None
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="mlm-eval-bench-") as folder:
        for point in points:
            print(f"measuring tp {point.tp} ...", file=sys.stderr)
            path = Path(folder, f"tp{point.tp}.json")
            job = {
                "tp": point.tp,
                "model": point.model,
                "config": point.config.to_dict(),
                "options": dataclasses.asdict(options),
            }
            path.write_text(json.dumps(job), encoding="utf-8")
            argv = ["bench", "--job", str(path)]
            result = launch(argv, ranks=point.tp, device=options.device, threads=threads)
            if result.exit_code == 128 + signal.SIGINT:
                raise KeyboardInterrupt
            if result.exit_code:
                return measured, result
            answer: dict[str, Any] = json.loads(_answer(path).read_text(encoding="utf-8"))
            measured.append(Measured(**answer))
    return measured, None
