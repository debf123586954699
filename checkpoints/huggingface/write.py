"""Writer of Hugging Face folders that plain `from_pretrained` loads, a few tensors at a time.

The folder holds config.json, generation_config.json (causal models), model.safetensors or shards
with their index, the tokenizer where there is one, and a README.md that says what it was made from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlm_eval import __version__
from mlm_eval.checkpoints.files.output import ByteMeter, output_folder
from mlm_eval.checkpoints.files.safetensors_file import write_safetensors
from mlm_eval.checkpoints.huggingface.plan import HuggingFacePlan
from mlm_eval.checkpoints.lazy import LazyTensor
from mlm_eval.checkpoints.memory.byte_size import parse_bytes


def write_huggingface(
    plan: HuggingFacePlan,
    target: Path,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a Hugging Face folder.

    Args:
        plan: What to write.
        target: Folder to create.
        max_shard_size: Largest safetensors file, in bytes or like "500MB".
        overwrite: Replace an existing checkpoint.
        finish: Called with the complete folder before it becomes `target`.
        on_progress: Called with (bytes of weights written, bytes in all).

    Raises:
        InputError: The target exists or cannot be written, or `max_shard_size` is not a size.
    """
    kept = {plan.tensors[name] for name in plan.float32}

    def num_bytes(tensor: LazyTensor) -> int:
        dtype = None if tensor in kept else plan.dtype
        return tensor.numel * (dtype or tensor.dtype).itemsize

    sizes = {name: num_bytes(tensor) for name, tensor in plan.tensors.items()}
    files = shard_files(sizes, largest=parse_bytes(max_shard_size, "--max-shard-size"))
    total = sum(sizes.values())
    meter = ByteMeter(total, on_progress)
    sources = plan.source.provenance.files
    with output_folder(
        target, overwrite=overwrite, needs=total, sources=sources, finish=finish
    ) as folder:
        _write_json(folder / "config.json", plan.hf)
        if plan.source.config.family == "gpt":
            ids = {key: plan.hf[key] for key in plan.hf if key.endswith("_token_id")}
            known = {key: value for key, value in ids.items() if value is not None}
            _write_json(folder / "generation_config.json", {"_from_model_config": True, **known})
        for file, names in files.items():
            tensors = {name: plan.tensors[name] for name in names}
            write_safetensors(
                folder / file, tensors, dtype=plan.dtype, kept=plan.float32, on_bytes=meter.add
            )
        if len(files) > 1:
            count = sum(tensor.numel for tensor in plan.tensors.values())
            index = {
                "metadata": {"total_parameters": count, "total_size": total},
                "weight_map": dict(
                    sorted((n, file) for file, names in files.items() for n in names)
                ),
            }
            _write_json(folder / "model.safetensors.index.json", index)
        plan.tokenizer.write(folder)
        (folder / "README.md").write_text(_readme(plan), encoding="utf-8")


def shard_files(sizes: Mapping[str, int], *, largest: int) -> dict[str, list[str]]:
    """Return the names of the tensors in each file, by the file's name, in the order of writing.

    As in huggingface_hub: a file takes tensors in their order while they fit; a tensor that alone
    is larger has a file of its own.

    Args:
        sizes: Bytes of each tensor, by its name.
        largest: Bytes of a file.
    """
    groups: list[list[str]] = []
    open_group: list[str] = []
    room = largest
    for name, size in sizes.items():
        if size > largest:
            groups.append([name])
            continue
        if size > room:
            groups.append(open_group)
            open_group, room = [], largest
        open_group.append(name)
        room -= size
    if open_group:
        groups.append(open_group)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _readme(plan: HuggingFacePlan) -> str:
    """Return the model card: what the folder was made from, and what was changed."""
    p, c = plan.source.provenance, plan.source.config
    name = p.path.name
    if re.fullmatch(r"release|iter_\d+", name):
        name = f"{p.path.resolve().parent.name}/{name}"
    facts = [p.format]
    if p.checkpoint_version is not None:
        facts.append(f"checkpoint version {p.checkpoint_version:.1f}")
    if p.format != "huggingface":
        facts.append(
            f"tensor parallel {p.tensor_parallel} x pipeline parallel {p.pipeline_parallel}"
        )
    if isinstance(p.iteration, int):
        facts.append(f"iteration {p.iteration}")
    names = (
        "activation_function",
        "hidden_activation",
        "hidden_act",
        "feed_forward_proj",
        "mlp_hidden_act",
    )
    words = [f"`{plan.hf[name]}`" for name in names if name in plan.hf]
    activation = (
        f"`{c.activation}` (from {p.config_sources.get('activation', 'the model')}), "
        f"written as {words[0] if words else 'that of all such models'}"
    )
    rows = {
        "made from": f"{name}: {', '.join(facts)}",
        "digest of the source": f"`{p.digest}`",
        "weights": f"{plan.source.num_parameters:,} parameters, {plan.hf['dtype']}",
        "vocabulary": f"{plan.hf['vocab_size']} of the {c.vocab_size} rows that the source has",
        "activation": activation,
    }
    lines = [
        "---",
        "library_name: transformers",
        "---",
        "",
        f"# {plan.model_class}",
        "",
        f"Converted by mlm-eval {__version__}. Load it with "
        f"`transformers.{plan.model_class}.from_pretrained(folder)`; it needs no code of its own.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    for title, sentences in (
        ("Changes of form (the function is the same)", plan.notes),
        ("Approximations (the function differs)", plan.approximations),
        (
            "To know about the source",
            list(dict.fromkeys([*p.warnings, *plan.warnings, *plan.tokenizer.warnings])),
        ),
    ):
        if sentences:
            lines += ["", f"## {title}", "", *(f"- {sentence}" for sentence in sentences)]
    return "\n".join(lines) + "\n"
