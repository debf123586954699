"""bench: how fast a model runs on this machine, and how that scales with tensor parallelism."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.app import app
from mlm_eval.cli.options import Config, Device, Output, Sets
from mlm_eval.cli.report import REPORTS
from mlm_eval.ranks.launch import PARENT, LaunchResult, init_process_group, launch, shutdown
from mlm_eval.ranks.world import LAUNCHED, World, detect_world

if TYPE_CHECKING:
    from mlm_eval.checkpoints.config import ModelConfig
    from mlm_eval.planning.bench import Job, Measured
    from mlm_eval.planning.bench_series import Series


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
    from mlm_eval.planning.bench_fit import fit
    from mlm_eval.planning.bench_plot import plot_bench
    from mlm_eval.planning.bench_record import bench_record, bench_text
    from mlm_eval.planning.bench_series import BenchOptions, cores, parse_scale, parse_sizes
    from mlm_eval.ranks.mesh import pick_device
    from mlm_eval.reporting.results import check_writable, write_json

    for path in filter(None, (output, plot)):
        check_writable(path)
    factor = parse_scale(scale)
    if ckpt is not None and factor != 1.0:
        raise InputError("--scale shrinks new models, a checkpoint has its size; leave it out")
    world = detect_world()
    is_main = world is None or world.is_main
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
    series, jobs = fit(
        make, options, scale=factor, local_ranks=None if world is None else world.local_size
    )
    if is_main:
        _announce(series, jobs)
    failure = None
    if world is not None:
        measured = [_measure_here(jobs[0], world)]
    else:
        measured, failure = _on_fresh_ranks(jobs)
    if is_main and measured:
        failed = None
        if failure is not None:
            failed = f"tp {jobs[len(measured)].tp} and what follows it was not measured: it failed"
        record = bench_record(series, jobs, measured, cores=cores(), failed=failed)
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
) -> Callable[[float], Series]:
    """Return what makes the series at a scale.

    Raises:
        InputError: Not exactly one of them is given, or it does not exist.
    """
    from mlm_eval.checkpoints.config import apply_overrides, parse_overrides
    from mlm_eval.checkpoints.open import open_checkpoint
    from mlm_eval.model.sizes import named_config
    from mlm_eval.planning.bench_series import model_series, paper_series, usual_sizes

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


def _announce(series: Series, jobs: Sequence[Job]) -> None:
    """Tell on stderr what is going to be measured."""
    from mlm_eval.planning.bench import step_flops

    work = [
        step_flops(
            layout.config,
            mode=job.mode,
            batch=job.batch,
            length=job.seq_length,
            recompute=job.recompute,
        )
        * (job.steps + job.warmup_steps)
        for layout, job in zip(series.layouts, jobs, strict=True)
    ]
    shrunk = "" if series.scale == 1.0 else f", scaled by {series.scale:g}"
    sizes = ", ".join(str(layout.tp) for layout in series.layouts)
    print(
        f"work ahead: {series.title}{shrunk}, tp {sizes}, {sum(work) / 1e12:,.3g} TFLOP in all",
        file=sys.stderr,
    )


# --- ranks ---------------------------------------------------------------------------------------


def _rank(path: Path) -> None:
    """Measure what a job file asks for, as one of its ranks; rank 0 leaves the answer beside it."""
    import dataclasses

    from mlm_eval.planning.bench import Job
    from mlm_eval.reporting.results import write_json

    world = detect_world()
    assert world is not None, "a job is for ranks"
    measured = _measure_here(Job(**json.loads(path.read_text(encoding="utf-8"))), world)
    if world.is_main:
        write_json(_answer(path), dataclasses.asdict(measured))


def _answer(path: Path) -> Path:
    return path.with_suffix(".measured.json")


def _measure_here(job: Job, world: World) -> Measured:
    """Measure a layout on the ranks that run, of which this process is one."""
    from mlm_eval.planning.bench import measure

    if world.size > 1:
        init_process_group(world, device=job.device)
    measured = measure(job)
    shutdown()
    return measured


def _on_fresh_ranks(jobs: Sequence[Job]) -> tuple[list[Measured], LaunchResult | None]:
    """Measure each layout in processes of its own; return also how the first to fail has failed."""
    import dataclasses

    from mlm_eval.planning.bench import Measured

    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="mlm-eval-bench-") as folder, _threads(jobs):
        for job in jobs:
            print(f"measuring tp {job.tp} ...", file=sys.stderr)
            path = Path(folder, f"tp{job.tp}.json")
            path.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
            argv = ["bench", "--job", str(path)]
            if job.tp == 1:
                result = _alone(argv)
            else:
                result = launch(argv, ranks=job.tp, device=job.device)
            if result.exit_code == 128 + signal.SIGINT:
                raise KeyboardInterrupt
            if result.exit_code:
                return measured, result
            answer: dict[str, Any] = json.loads(_answer(path).read_text(encoding="utf-8"))
            measured.append(Measured(**answer))
    return measured, None


@contextmanager
def _threads(jobs: Sequence[Job]) -> Iterator[None]:
    """Give a rank as many threads in every layout: else more ranks would be slower ranks."""
    from mlm_eval.planning.bench_series import cores

    name = "OMP_NUM_THREADS"
    given = os.environ.get(name)
    if given is None and jobs[0].device == "cpu":
        os.environ[name] = str(max(1, cores() // max(job.tp for job in jobs)))
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(name, None)


def _alone(argv: Sequence[str]) -> LaunchResult:
    """Run a command line as the only rank of a job, in a process that ends with this one."""
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    # It meets nobody; the address only makes the description of its place complete.
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mlm_eval", *argv],
        env={**os.environ, **world, **place, LAUNCHED: "1", PARENT: str(os.getpid())},
        check=False,
    )
    if done.returncode >= 0:  # what was wrong, it has printed itself
        return LaunchResult(done.returncode)
    if done.returncode == -signal.SIGINT:
        return LaunchResult(128 + signal.SIGINT)
    hint = " (often: out of memory)" if done.returncode == -signal.SIGKILL else ""
    return LaunchResult(
        1, f"the rank of tp 1 was killed by {signal.Signals(-done.returncode).name}{hint}"
    )
