"""A plan as the tables that `mlm-eval plan` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlm_eval.planning.plan import layout_needs
from mlm_eval.reporting.text import aligned


def plan_text(plan: Mapping[str, Any]) -> str:
    """Return the tables of `mlm-eval plan`, from its record."""
    return "\n\n".join([_model_text(plan), _memory_text(plan), _work_text(plan)])


def _model_text(plan: Mapping[str, Any]) -> str:
    c = plan["config"]
    lines = [
        f"{plan['model']}: {plan['num_parameters']:,} parameters with {c['vocab_size']:,} rows of "
        "vocabulary",
        f"  {c['num_layers']} layers, hidden size {c['hidden_size']:,}, "
        f"{c['num_attention_heads']} heads, MLP {c['ffn_hidden_size']:,}, "
        f"{c['max_position_embeddings']:,} positions",
        f"  divides by tp {', '.join(map(str, plan['allowed_tp']))}",
    ]
    active = ""
    if plan["active_parameters"] != plan["num_parameters"]:
        active = f"{plan['active_parameters']:,} parameters for each token, "
        lines.insert(
            2,
            f"  {c['num_experts']} experts of {c['moe_ffn_hidden_size']:,} in "
            f"{len(c['moe_layers'])} layers, {c['moe_router_topk']} for each token",
        )
    lines.append(f"  {active}{plan['flops_per_token'] / 1e9:.3g} GFLOP a token of a full text")
    if plan["paper_parameters"] is not None:
        count = f"{plan['paper_parameters']:,}"
        lines.insert(1, f"  {count} as the paper counts them (without padding)")
    return "\n".join(lines)


def _memory_text(plan: Mapping[str, Any]) -> str:
    trained = [f"train {task}" for task in plan["layouts"][0]["training"]]
    rows = [["tp", "parameters", "weights", "evaluation", *trained]]
    marks = {None: "", True: "  ", False: " *"}
    for layout in plan["layouts"]:
        row = [
            str(layout["tp"]),
            f"{layout['parameters_per_rank']:,}",
            _bytes_text(layout["evaluation"]["weights"]),
        ]
        needs = layout_needs(layout).values()
        rows.append(row + [_bytes_text(need["total"]) + marks[need["fits"]] for need in needs])
    s = plan["settings"]
    lines = [
        f"memory of each rank on {s['device']}, on top of the bare process ({s.get('dtype')}, "
        f"{s['batch_tokens']:,} tokens a batch; training: AdamW on float32 weights, "
        f"micro-batch {s.get('micro_batch')}{_copies(s)})",
        *aligned(rows),
    ]
    if plan["device_memory"] is not None:
        memory, free = _bytes_text(plan["device_memory"]), _bytes_text(plan["left_free"])
        found = ", ".join(f"{need}: {tp or 'none'}" for need, tp in plan["smallest_tp"].items())
        lines.append(f"  * does not fit {memory}, {free} left free")
        lines.append(f"  smallest tp that fits: {found}")
        lines += [f"  {note}" for note in plan["notes"]]
    return "\n".join(lines)


def _copies(settings: Mapping[str, Any]) -> str:
    copies = settings.get("dp", 1)
    return "" if copies == 1 else f", {settings['dp_mode']} over dp {copies}"


def _work_text(plan: Mapping[str, Any]) -> str:
    throughput = plan["settings"]["throughput"]
    title = "floating-point operations, all ranks together"
    rows = [["task", "evaluation", "training"]]
    for work in plan["tasks"]:
        flops = [work["evaluation_flops"], work["training_flops"]]
        rows.append([work["title"], *map(_flops, flops)])
    if throughput is not None:
        copies = plan["settings"].get("dp", 1)
        ranks = "tp ranks" if copies == 1 else f"tp x {copies} ranks"
        title += f"; time at {throughput / 1e12:,.6g} TFLOP/s on each of {ranks}"
        rows[0] += ["time", "at tp"]
        for row, work in zip(rows[1:], plan["tasks"], strict=True):
            seconds = work["training_seconds"] or work["evaluation_seconds"]
            row += [_duration(seconds), str(work["tp"])]
    return "\n".join([title, *aligned(rows, left=1)])


def _bytes_text(count: float) -> str:
    if count < 1e9:
        return f"{count / 1e6:.3g} MB"
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
