"""Makes small checkpoints as Megatron of any era wrote them, with torch.save and plain dicts.

Names, orders and splits are written down here a second time, from Megatron's own files and not
from the loader's tables: two independent descriptions that agree are right.
"""

from __future__ import annotations

import dataclasses
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.parameters import parameters
from support import configs

Model = dict[str, Tensor]
"""Whole tensors under canonical names."""

SIZES = {
    "num_layers": 4,  # so that pipeline stages have some each
    "hidden_size": 16,
    "kv_channels": 4,
    "ffn_hidden_size": 24,
    "vocab_size": 32,
    "max_position_embeddings": 8,
}
GPT, LLAMA, BERT, T5 = (
    dataclasses.replace(base, **SIZES)
    for base in (configs.GPT, configs.LLAMA, configs.BERT, configs.T5)
)


def random_model(config: ModelConfig, *, seed: int = 1) -> Model:
    """Return random weights for a model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in parameters(config).items()
    }


def args_of(config: ModelConfig, **more: Any) -> Namespace:
    """Return the args that such a model's run would have saved."""
    args = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.kv_channels,
        "max_position_embeddings": config.max_position_embeddings,
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "num_query_groups": 1,
        "swiglu": config.activation == "swiglu",
        "bias_gelu_fusion": config.activation == "gelu_tanh",
        "position_embedding_type": config.position_embedding_type,
        "normalization": config.normalization,
        "untie_embeddings_and_output_weights": config.untie_embeddings_and_output_weights,
        "params_dtype": torch.float32,
    }
    if config.family == "t5":
        args["num_layers"] = config.decoder_num_layers
        args["encoder_num_layers"] = config.num_layers
    if config.relative_positions:
        args["relative_attention_num_buckets"] = config.relative_attention_num_buckets
        args["relative_attention_max_distance"] = config.relative_attention_max_distance
    if args["group_query_attention"]:
        args["num_query_groups"] = config.num_query_groups
    return Namespace(**args | more)


# ---- names -------------------------------------------------------------------------------------

_LEGACY_LAYER = {
    "input_layernorm.": "input_layernorm.",
    "self_attention.linear_qkv.": "{attention}.query_key_value.",
    "self_attention.linear_proj.": "{attention}.dense.",
    "pre_mlp_layernorm.": "post_attention_layernorm.",
    "mlp.linear_fc1.": "mlp.dense_h_to_4h.",
    "mlp.linear_fc2.": "mlp.dense_4h_to_h.",
}
_LEGACY_TOP = {
    "lm_head.layer_norm.": "lm_head.layernorm.",
    "output_layer.bias": "lm_head.bias",
    "output_layer.weight": "language_model.output_layer.weight",
    "pooler.": "language_model.pooler.",
    "embedding.": "language_model.embedding.",
}
_TE_LAYER = {
    "input_layernorm.": "self_attention.layernorm_qkv.layer_norm_",
    "self_attention.linear_qkv.": "self_attention.layernorm_qkv.",
    "self_attention.linear_proj.": "self_attention.proj.",
    "pre_mlp_layernorm.": "layernorm_mlp.layer_norm_",
    "mlp.linear_fc1.": "layernorm_mlp.fc1_",
    "mlp.linear_fc2.": "layernorm_mlp.fc2_",
}
_CORE_TE_LAYER = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}

ERAS = {
    "2019": ("transformer", {k: v.format(attention="attention") for k, v in _LEGACY_LAYER.items()}),
    "v1": (
        "language_model.transformer",
        {k: v.format(attention="attention") for k, v in _LEGACY_LAYER.items()},
    ),
    "v2.5": (
        "language_model.encoder",
        {k: v.format(attention="self_attention") for k, v in _LEGACY_LAYER.items()},
    ),
    "2023-09": (
        "language_model.encoder",
        {k: v.format(attention="self_attention") for k, v in _LEGACY_LAYER.items()}
        | {"input_layernorm.": "input_norm.", "pre_mlp_layernorm.": "post_attention_norm."},
    ),
    "legacy TE": ("language_model.encoder", _TE_LAYER),
    "core of spring 2023": ("", {"pre_mlp_layernorm.": "post_self_attn_layernorm."}),
    "core": ("", {}),
    "core TE": ("", _CORE_TE_LAYER),
}
FINAL_NORM = {"2023-09": "final_norm", "legacy TE": "final_norm"}


def era_name(name: str, era: str) -> str:
    """Return a canonical name as an era wrote it, flat."""
    block, layer_names = ERAS[era]
    top = {} if era.startswith("core") else _LEGACY_TOP
    if era == "2019":
        top = {"embedding.": ""}
    match = re.fullmatch(r"(?:de|en)coder\.layers\.(\d+)\.(.+)", name)
    if match:
        rest = match[2]
        for new, old in layer_names.items():
            if rest.startswith(new):
                rest = old + rest.removeprefix(new)
                break
        return f"{block or name.partition('.')[0]}.layers.{match[1]}.{rest}"
    if ".final_layernorm." in name and block:
        return f"{block}.{FINAL_NORM.get(era, 'final_layernorm')}.{name.rpartition('.')[2]}"
    for new, old in top.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def nest(flat: Mapping[str, Any], era: str) -> dict[str, Any]:
    """Return flat names as the dicts that legacy Megatron nested them in.

    The transformer's dict and the heads' stay flat below their own names.
    """
    if era == "2019" or era.startswith("core"):
        return dict(flat)
    tree: dict[str, Any] = {}
    for name, tensor in flat.items():
        parts = name.split(".")
        if parts[0] == "language_model" and parts[1] == "embedding":
            path = [*parts[:-1], parts[-1]]
        elif parts[0] == "language_model":
            path = [*parts[:2], ".".join(parts[2:])]
        else:
            path = [parts[0], ".".join(parts[1:])]
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = tensor
    return tree


# ---- splits ------------------------------------------------------------------------------------


def rank_of(name: str, full: Tensor, rank: int, tp: int, *, gated: bool) -> Tensor:
    """Return one tensor-parallel rank's piece of a tensor, in group order."""
    if name.endswith(("word_embeddings.weight", "output_layer.weight", "output_layer.bias")):
        return full.chunk(tp)[rank]
    if "linear_fc1." in name and gated:
        return torch.cat([half.chunk(tp)[rank] for half in full.chunk(2)])
    if "linear_qkv." in name or "linear_fc1." in name:
        return full.chunk(tp)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return full.chunk(tp, dim=1)[rank]
    return full


def qkv_rows(rows: Tensor, version: float, heads: int) -> Tensor:
    """Return a rank's `[heads, 3, channels]` rows in the order of a checkpoint version."""
    parts = rows.reshape(heads, 3, -1, *rows.shape[1:])
    order = {0.0: (1, 0, 2), 1.0: (0, 2, 1)}.get(version, (0, 1, 2))
    return parts.permute(*order, *range(3, parts.ndim)).reshape(rows.shape)


def rank_tensors(
    model: Model, config: ModelConfig, rank: int, tp: int, *, version: float = 3.0
) -> Model:
    """Return one tensor-parallel rank's tensors under canonical names."""
    pieces = {}
    for name, full in model.items():
        piece = rank_of(name, full, rank, tp, gated=config.gated)
        if "linear_qkv." in name and version < 2:
            piece = qkv_rows(piece, version, config.num_attention_heads // tp)
        pieces[name] = piece.clone()
    return pieces


def stage_tensors(tensors: Model, layers: list[int], *, first: bool, last: bool) -> Model:
    """Return what one model chunk holds: its layers, counted from 0, and the ends of the model."""
    kept = {}
    for name, tensor in tensors.items():
        match = re.match(r"(\w+)\.layers\.(\d+)\.(.+)", name)
        if match:
            if int(match[2]) in layers:
                kept[f"{match[1]}.layers.{layers.index(int(match[2]))}.{match[3]}"] = tensor
        elif first if name.startswith("embedding.") else last:
            kept[name] = tensor
    return kept


def write(
    root: Path,
    model: Model,
    config: ModelConfig,
    *,
    tp: int = 1,
    era: str = "core",
    version: float | None = 3.0,
    order: float | None = None,
    stages: list[list[list[int]]] | None = None,
    args: Namespace | None = None,
    iteration: int = 5,
    **entries: Any,
) -> Path:
    """Write a checkpoint root and return it.

    Args:
        root: Folder to write into.
        model: Whole tensors under canonical names.
        config: The model's.
        tp: Tensor-parallel ranks.
        era: A key of `ERAS`.
        version: The `checkpoint_version` to store; None for none.
        order: QKV order, by the version that had it; None: that of `version`.
        stages: For each pipeline stage the layers of each of its chunks; None: one stage.
        args: Saved args; None for none. The parallel sizes are filled in.
        iteration: Of the save.
        entries: Further entries of every file.
    """
    if order is None:
        order = 0.0 if version is None else version
    stages = stages or [[list(range(config.num_layers))]]
    folder = root / f"iter_{iteration:07d}"
    for rank in range(tp):
        tensors = rank_tensors(model, config, rank, tp, version=order)
        for stage, chunks in enumerate(stages):
            contents: dict[str, Any] = {"iteration": iteration, **entries}
            if version is not None:
                contents["checkpoint_version"] = version
            if args is not None:
                number = rank + tp * stage
                sizes = {"tensor_model_parallel_size": tp, "rank": number}
                sizes["pipeline_model_parallel_size"] = len(stages)
                contents["args"] = Namespace(**vars(args) | sizes)
            for at, layers in enumerate(chunks):
                ends = {
                    "first": stage == 0 and at == 0,
                    "last": stage == len(stages) - 1 and at == len(chunks) - 1,
                }
                flat = stage_tensors(tensors, layers, **ends)
                named = {era_name(name, era): tensor for name, tensor in flat.items()}
                key = "model" if len(chunks) == 1 else f"model{at}"
                contents[key] = nest(named, era)
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if len(stages) > 1 else "")
            target = folder / name / "model_optim_rng.pt"
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(contents, target)
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return root


def change(file: Path, edit: Any) -> None:
    """Load one of our own files, let `edit` change its contents, and write it again."""
    contents = torch.load(file, weights_only=False)
    torch.save(edit(contents) or contents, file)


def rank_file(root: Path, rank: int = 0, stage: int | None = None, *, iteration: int = 5) -> Path:
    """Return the path of one rank's file."""
    name = f"mp_rank_{rank:02d}" + ("" if stage is None else f"_{stage:03d}")
    return root / f"iter_{iteration:07d}" / name / "model_optim_rng.pt"
