"""Makes DeepSpeed's folders as gpt-neox and Megatron-DeepSpeed write them.

Names, orders and splits are written down a second time, from those projects' files and not from the
reader's tables.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from support.folders.synthetic import Model, rank_tensors

LAYER = "decoder.layers."
ROW_BIASES = ("self_attention.linear_proj.bias", "mlp.linear_fc2.bias")

_POSITIONS = {"learned_absolute": "learned", "rope": "rotary", "alibi": "alibi", "none": "none"}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu", "swiglu": "swiglu", "geglu": "geglu"}

# Part of a layer -> gpt-neox's names, the first kind and those that came later.
NEOX_NAMES = {
    "self_attention.linear_qkv.": "attention.query_key_value.",
    "self_attention.linear_proj.": "attention.dense.",
    "pre_mlp_layernorm.": "post_attention_layernorm.",
    "mlp.linear_fc1.": "mlp.dense_h_to_4h.",
    "mlp.linear_fc2.": "mlp.dense_4h_to_h.",
}
NEWER_NAMES = {**NEOX_NAMES, "mlp.linear_fc1.": "mlp.linear1.", "mlp.linear_fc2.": "mlp.linear2."}
ENGINE_NAMES = {
    **NEOX_NAMES,
    "pre_mlp_layernorm.": "mlp.layer_norm_",
    "mlp.linear_fc1.": "mlp.fc1_",
    "mlp.linear_fc2.": "mlp.fc2_",
}
FORK_NAMES = {
    "self_attention.linear_qkv.": "self_attention.query_key_value.",
    "self_attention.linear_proj.": "self_attention.dense.",
    "pre_mlp_layernorm.": "post_attention_layernorm.",
    "mlp.linear_fc1.": "mlp.dense_h_to_4h.",
    "mlp.linear_fc2.": "mlp.dense_4h_to_h.",
}


def neox_settings(config: ModelConfig, tp: int, **more: Any) -> dict[str, Any]:
    """Return what a run's .yml would say, with dashes."""
    rms = config.normalization == "RMSNorm"
    values = {
        "num-layers": config.num_layers,
        "hidden-size": config.hidden_size,
        "num-attention-heads": config.num_attention_heads,
        "seq-length": config.max_position_embeddings,
        "max-position-embeddings": config.max_position_embeddings,
        "norm": "rmsnorm" if rms else "layernorm",
        "rms-norm-epsilon" if rms else "layernorm-epsilon": config.layernorm_epsilon,
        "pos-emb": _POSITIONS[config.position_embedding_type],
        "rotary-pct": config.rotary_percent,
        "rotary-emb-base": int(config.rotary_base),
        "no-weight-tying": config.untie_embeddings_and_output_weights,
        "activation": _ACTIVATIONS[config.activation],
        "bias-gelu-fusion": config.activation == "gelu_tanh",
        "gpt-j-residual": config.parallel_residual,
        "model-parallel-size": tp,
        "pipe-parallel-size": 1,
        "make-vocab-size-divisible-by": 8,
        "train-iters": 10,
        "optimizer": {"type": "Adam", "params": {"lr": 0.0006}},
        "data-path": "somewhere/else",
    }
    if config.num_query_groups != config.num_attention_heads:
        values["num-kv-heads"] = config.num_query_groups
    return values | {name.replace("_", "-"): value for name, value in more.items()}


def neox_layers(
    model: Model,
    config: ModelConfig,
    tp: int,
    *,
    names: Mapping[str, str] = NEOX_NAMES,
    llama: bool = False,
) -> list[dict[int, dict[str, Tensor]]]:
    """Return what gpt-neox's layers hold, by rank and by the place in the pipeline's list.

    Args:
        model: Whole tensors under canonical names.
        config: The model's.
        tp: Tensor-parallel ranks.
        names: Of a block's parts.
        llama: Whether the MLP has the three matrices of 2023's Llama.
    """
    ranks = []
    for rank in range(tp):
        layers: dict[int, dict[str, Tensor]] = {0: {}, 1: {}}
        for name, tensor in rank_tensors(model, config, rank, tp).items():
            if name.startswith("embedding."):
                layers[0][name.removeprefix("embedding.")] = tensor
            elif name.startswith(LAYER):
                number, _, part = name.removeprefix(LAYER).partition(".")
                block = layers.setdefault(2 + int(number), {})
                block.update(_neox_part(part, tensor, config, rank, tp, names, llama))
            elif "final_layernorm" in name:
                leaf = name.rpartition(".")[2]
                rms = config.normalization == "RMSNorm"
                norm = layers.setdefault(config.num_layers + 3, {})
                norm["norm.scale" if rms else f"norm.{leaf}"] = tensor
            else:
                layers[config.num_layers + 4] = {"final_linear.weight": tensor}
        ranks.append(layers)
    return ranks


def _neox_part(
    part: str,
    tensor: Tensor,
    config: ModelConfig,
    rank: int,
    tp: int,
    names: Mapping[str, str],
    llama: bool,
) -> dict[str, Tensor]:
    leaf = part.rpartition(".")[2]
    if part in ROW_BIASES and config.parallel_residual and tp > 1:
        # Every rank adds its own: they are not equal, and only their sum counts.
        own = torch.arange(len(tensor)) / 8 * (1 if rank else 1 - tp)
        tensor = (tensor if rank == 0 else torch.zeros_like(tensor)) + own
    if part.startswith("self_attention.linear_qkv."):
        groups = config.num_query_groups // tp
        if config.num_query_groups != config.num_attention_heads:
            rows = tensor.view(groups, -1, config.kv_channels, *tensor.shape[1:])
            kinds = (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])
            tensor = torch.cat([kind.reshape(-1, *tensor.shape[1:]) for kind in kinds])
    if part.startswith("mlp.linear_fc1.") and config.gated:
        gate, up = tensor.chunk(2)
        if llama:
            return {f"mlp.w1.{leaf}": gate.clone(), f"mlp.w3.{leaf}": up.clone()}
        tensor = torch.cat([gate, up] if names is ENGINE_NAMES else [up, gate])
    if part.startswith("mlp.linear_fc2.") and llama:
        return {f"mlp.w2.{leaf}": tensor}
    rms = config.normalization == "RMSNorm"
    for ours, theirs in names.items():
        if part.startswith(ours):
            part = theirs + part.removeprefix(ours)
            break
    return {part.removesuffix("weight") + "scale" if rms and "norm." in part else part: tensor}


def write_neox(
    root: Path,
    model: Model,
    config: ModelConfig,
    *,
    tp: int = 1,
    names: Mapping[str, str] = NEOX_NAMES,
    llama: bool = False,
    pipeline: bool = True,
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Write a gpt-neox root and return it.

    Args:
        root: Folder to write into.
        model: Whole tensors under canonical names.
        config: The model's.
        tp: Tensor-parallel ranks.
        names: See `neox_layers`.
        llama: See `neox_layers`.
        pipeline: Whether each layer has a file; else each rank has one.
        settings: The .yml; None: `neox_settings`.
        more: Further settings.
    """
    step = root / "global_step7"
    (step / "configs").mkdir(parents=True)
    (root / "latest").write_text("global_step7")
    if settings is None:
        settings = neox_settings(config, tp, **more)
    (step / "configs" / "run.yml").write_text(yaml.safe_dump(settings))
    for rank, layers in enumerate(neox_layers(model, config, tp, names=names, llama=llama)):
        state: dict[str, Any] = {"module": None, "iteration": 7, "dp_world_size": 1}
        state["args"] = {"num_layers": config.num_layers, "hidden_size": config.hidden_size}
        if pipeline:
            for place, layer in layers.items():
                if layer:
                    torch.save(layer, step / f"layer_{place:02d}-model_{rank:02d}-model_states.pt")
        else:
            state["module"] = {
                f"sequential.{place}.{name}": tensor
                for place, layer in layers.items()
                for name, tensor in layer.items()
            }
        torch.save(state, step / f"mp_rank_{rank:02d}_model_states.pt")
        zero = step / f"zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": {}}, zero)
    return root


def write_fork(
    root: Path,
    model: Model,
    config: ModelConfig,
    args: Namespace,
    *,
    tp: int = 1,
    first_block: int = 3,
    pipeline: bool = True,
) -> Path:
    """Write a root of Megatron-DeepSpeed and return it.

    Args:
        root: Folder to write into.
        model: Whole tensors under canonical names.
        config: The model's.
        args: Saved args.
        tp: Tensor-parallel ranks.
        first_block: Where the blocks begin in the pipeline's list.
        pipeline: Whether each layer has a file; else each rank has one.
    """
    step = root / "global_step7"
    step.mkdir(parents=True)
    (root / "latest").write_text("global_step7")
    for rank in range(tp):
        layers: dict[int, dict[str, Tensor]] = {}
        module: dict[str, Tensor] = {}
        for name, tensor in rank_tensors(model, config, rank, tp).items():
            if name.startswith("embedding."):
                key = name.removeprefix("embedding.").replace("_layernorm.", ".norm.")
                place, whole = 1, f"language_model.embedding.{key}"
            elif name.startswith(LAYER):
                number, _, part = name.removeprefix(LAYER).partition(".")
                for ours, theirs in FORK_NAMES.items():
                    if part.startswith(ours):
                        part = theirs + part.removeprefix(ours)
                key, place = part, first_block + int(number)
                whole = f"language_model.encoder.layers.{number}.{part}"
            elif "final_layernorm" in name:
                key, place = name.rpartition(".")[2], first_block + config.num_layers + 1
                whole = f"language_model.encoder.final_layernorm.{key}"
            else:
                key, place = "lm_head.weight", first_block + config.num_layers + 2
                whole = "language_model.output_layer.weight"
            layers.setdefault(place, {})[key] = tensor
            module[whole] = tensor
        state: dict[str, Any] = {"args": args, "iteration": 7, "checkpoint_version": 3.0}
        state |= {"module": None if pipeline else module, "dp_world_size": 1}
        torch.save(state, step / f"mp_rank_{rank:02d}_model_states.pt")
        for place, layer in layers.items() if pipeline else ():
            torch.save(layer, step / f"layer_{place:02d}-model_{rank:02d}-model_states.pt")
    return root
