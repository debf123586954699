"""A plan as the tables that `mlm-eval plan` shows."""

from __future__ import annotations

from mlm_eval.planning.plan import OUTSIDE, ResourcePlan
from mlm_eval.reporting.text import aligned


def plan_text(plan: ResourcePlan) -> str:
    """Return the tables of `mlm-eval plan`."""
    return "\n\n".join([_model_text(plan), _memory_text(plan), _work_text(plan)])


def _model_text(plan: ResourcePlan) -> str:
    c = plan.config
    lines = [
        f"{plan.name}: {plan.parameters:,} parameters with {c.vocab_size:,} rows of vocabulary",
        f"  {c.num_layers} layers, hidden size {c.hidden_size:,}, {c.num_attention_heads} heads, "
        f"MLP {c.ffn_hidden_size:,}, {c.max_position_embeddings:,} positions",
        f"  divides by tp {', '.join(map(str, plan.allowed_tp))}",
    ]
    if plan.paper_parameters is not None:
        lines.insert(1, f"  {plan.paper_parameters:,} as the paper counts them (without padding)")
    return "\n".join(lines)


def _memory_text(plan: ResourcePlan) -> str:
    tasks = list(plan.layouts[0].training)
    rows = [["tp", "parameters", "weights", "evaluation", *(f"train {task}" for task in tasks)]]
    for layout in plan.layouts:
        needs = [layout.evaluation, *layout.training.values()]
        rows.append(
            [
                str(layout.tp),
                f"{layout.parameters:,}",
                _gigabytes(layout.evaluation.weights),
                *(_gigabytes(need.total) + _mark(plan.fits(need)) for need in needs),
            ]
        )
    s = plan.settings
    lines = [
        f"memory of each rank on {s['device']}, on top of the bare process ({s.get('dtype')}, "
        f"{s['batch_tokens']:,} tokens a batch; training: AdamW on float32 weights, "
        f"micro-batch {s.get('micro_batch')})",
        *aligned(rows),
    ]
    if plan.device_memory is not None:
        lines.append(
            f"  * does not fit {_gigabytes(plan.device_memory)}, {_gigabytes(OUTSIDE)} left free"
        )
        told = ", ".join(f"{need}: {tp or 'none'}" for need, tp in plan.smallest_tp.items())
        lines.append(f"  smallest tp that fits: {told}")
    return "\n".join(lines)


def _mark(fits: bool | None) -> str:
    return "" if fits is None else "  " if fits else " *"


def _work_text(plan: ResourcePlan) -> str:
    timed = any(work.evaluation_seconds is not None for work in plan.work)
    rows = [["task", "evaluation", "training", *(["time", "at tp"] if timed else [])]]
    for work in plan.work:
        row = [work.title, _flops(work.evaluation_flops), _flops(work.training_flops)]
        if timed:
            seconds = (work.evaluation_seconds or 0.0) + (work.training_seconds or 0.0)
            if work.training_flops:
                seconds = work.training_seconds or 0.0
            row += [_duration(seconds), str(work.tp)]
        rows.append(row)
    title = "floating-point operations, all ranks together"
    if timed:
        title += f"; time at {plan.settings['throughput'] / 1e12:,.6g} TFLOP/s on each of tp ranks"
    return "\n".join([title, *aligned(rows, left=1)])


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count < 1e10 else f"{count / 1e9:.1f} GB"


def _flops(count: float) -> str:
    if not count:
        return "-"
    factor, unit = (
        (1e18, "EFLOP") if count >= 1e18 else (1e15, "PFLOP") if count >= 1e15 else (1e12, "TFLOP")
    )
    return f"{count / factor:.3g} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172_800 else f"{seconds / 86_400:.3g} days"
