"""bench: how fast a model runs on this machine, and how that scales with tensor parallelism."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError, require
from mlm_eval.cli.command import command
from mlm_eval.cli.run import complain_of_ranks, print_beside
from mlm_eval.cli.screen import say
from mlm_eval.planning.bench_options import BenchOptions, cores
from mlm_eval.ranks.launch import (
    STOP_CODES,
    LaunchResult,
    init_process_group,
    launch,
    shutdown,
)
from mlm_eval.ranks.signals import STOPPED, raise_stopped
from mlm_eval.ranks.world import World, detect_world

if TYPE_CHECKING:
    from mlm_eval.checkpoints.config import ModelConfig
    from mlm_eval.planning.bench_run import Measured
    from mlm_eval.planning.bench_study import BenchPoint, BenchSeries


@command("bench", BenchOptions)
def bench(options: BenchOptions) -> None:
    """Each tensor-parallel size runs in ranks of its own.

    The peak is measured on the same ranks in the same dtype.

    Example: mlm-eval bench --study weak --tp 1,2 --scale 0.1 --output bench.json --plot bench.png
    """
    if options.job is not None:
        _measure_job(options.job)
        return
    from mlm_eval.checkpoints.dtypes import training_dtype
    from mlm_eval.checkpoints.files.output import STDOUT
    from mlm_eval.planning.bench_plot import plot_bench
    from mlm_eval.planning.bench_report import bench_record, bench_text
    from mlm_eval.planning.bench_study import fit
    from mlm_eval.ranks.layout import pick_device
    from mlm_eval.reporting.results import write_json

    if options.ckpt is not None and options.scale != 1.0:
        raise InputError("--scale shrinks new models, a checkpoint has its size; leave it out")
    if options.plot is not None:
        require("matplotlib", "--plot")
    world = detect_world()
    device = pick_device(options.device)
    dtype = training_dtype(options.dtype, device)
    options, output = dataclasses.replace(options, device=device, dtype=dtype), options.output
    make = _source(options, _of_world(options.tp, world))
    series = fit(make, options, local_ranks=None if world is None else world.local_size)
    is_main = world is None or world.is_main
    if is_main:
        _announce(series, options)
    failure = failed = None
    if world is not None:
        measured = [_measure_here(series.points[0], options, world)]
    else:
        measured, failure = _on_fresh_ranks(series.points, options)
    if failure is not None and measured:
        size = series.points[len(measured)].tp
        failed = f"tp {size} and what follows it was not measured: it failed"
    if is_main and measured:
        record = bench_record(series, options, measured, cores=cores(), failed=failed)
        print_beside(bench_text(record), STDOUT if STDOUT in (output, options.plot) else output)
        if output is not None:
            write_json(output, record)
        if options.plot is not None:
            plot_bench(record, options.plot)
    if failure is not None:
        complain_of_ranks(failure)
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


def _source(options: BenchOptions, sizes: list[int] | None) -> Callable[[float], BenchSeries]:
    """Return a function that makes the series at a scale.

    Raises:
        InputError: Not exactly one of study, checkpoint and model is given, or it does not exist.
    """
    from mlm_eval.checkpoints.config import apply_overrides, parse_overrides
    from mlm_eval.checkpoints.open import open_checkpoint
    from mlm_eval.model.sizes import named_config
    from mlm_eval.planning.bench_study import model_series, paper_series, usual_sizes

    study, ckpt, model = options.study, options.ckpt, options.model
    if sum(given is not None for given in (study, ckpt, model)) != 1:
        raise InputError(
            "give one of --ckpt C, --model NAME (a new model of a named size), and --study weak "
            "or strong"
        )
    if study is not None:
        from mlm_eval.tasks.paper import load_paper

        if options.overrides:
            raise InputError("--set changes a model, --study takes the paper's; leave it out")
        chosen = sizes or usual_sizes(options.device)
        return lambda scale: paper_series(study, load_paper(), chosen, scale=scale)
    overrides = parse_overrides(options.overrides)
    if model is not None:
        # One vocabulary for all sizes: padded as Megatron pads it for the largest.
        found: ModelConfig = apply_overrides(named_config(model, tp=max(sizes or [8])), overrides)
    else:
        found = open_checkpoint(str(ckpt), overrides).config
    if found.family == "t5":
        raise InputError(f"{ckpt} is a T5 checkpoint; bench measures GPT and BERT models")
    name = model or Path(str(ckpt)).name
    chosen = sizes or usual_sizes(options.device, found)
    return lambda scale: model_series(name, found, chosen, scale=scale)


def _announce(series: BenchSeries, options: BenchOptions) -> None:
    """Print on stderr what is going to be measured."""
    from mlm_eval.planning.bench_study import step_flops

    count = options.steps + options.warmup_steps
    work = sum(step_flops(point.config, options) * count for point in series.points)
    shrunk = "" if series.scale == 1.0 else f", scaled by {series.scale:g}"
    sizes = ", ".join(str(point.tp) for point in series.points)
    say(f"work ahead: {series.title}{shrunk}, tp {sizes}, {work / 1e12:,.3g} TFLOP in all")


# --- ranks ---------------------------------------------------------------------------------------


def _measure_job(path: Path) -> None:
    """Measure the point of a job file, as one of its ranks; rank 0 writes the answer next to it."""
    from mlm_eval.checkpoints.config import ModelConfig
    from mlm_eval.planning.bench_study import BenchPoint
    from mlm_eval.reporting.results import write_json

    world = detect_world()
    assert world is not None, "a job is for ranks"
    job = json.loads(path.read_text(encoding="utf-8"))
    options = BenchOptions(**job.pop("options"))
    point = BenchPoint(**{**job, "config": ModelConfig(**job["config"])})
    measured = _measure_here(point, options, world)
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
    from mlm_eval.planning.bench_run import Measured

    # A rank has as many threads at every size: else more ranks would be slower ranks.
    most = max(point.tp for point in points)
    threads = max(1, cores() // most) if options.device == "cpu" else None
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="mlm-eval-bench-") as folder:
        for point in points:
            say(f"measuring tp {point.tp} ...")
            path = Path(folder, f"tp{point.tp}.json")
            job = {**dataclasses.asdict(point), "options": dataclasses.asdict(options)}
            path.write_text(json.dumps(job, default=str), encoding="utf-8")
            argv = ["bench", "--job", str(path)]
            result = launch(argv, ranks=point.tp, device=options.device, threads=threads)
            if result.exit_code in STOP_CODES:
                raise_stopped(result.exit_code - STOPPED)
            if result.exit_code:
                return measured, result
            answer: dict[str, Any] = json.loads(_answer(path).read_text(encoding="utf-8"))
            measured.append(Measured(**answer))
    return measured, None
