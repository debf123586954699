"""Writes Megatron's `torch` format, at any tensor-parallel x pipeline size, one tensor at a time.

The names are megatron-core's (local spec, `checkpoint_version` 3.0), or those of the legacy code of
2021 to 2023 where megatron-core has no such model. Every file is a `torch.save` archive that
Megatron, torch and this project's reader open.
Source: docs/megatron.md, "Folders and files", "Pipeline stages", "Top-level keys",
"megatron-core names", "Tensor parallelism".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.dtypes import cast
from mlm_eval.checkpoints.files.output import ByteMeter, output_folder
from mlm_eval.checkpoints.files.torch_save import write_torch_file
from mlm_eval.checkpoints.lazy import Computed, Index, LazyTensor, Unstacked
from mlm_eval.checkpoints.megatron.args import rank_args
from mlm_eval.checkpoints.megatron.iteration import iteration_folder, write_tracker
from mlm_eval.checkpoints.megatron.layers.branches import names_of_hybrid
from mlm_eval.checkpoints.megatron.layout import LayoutOptions, SaveLayout, save_layout
from mlm_eval.checkpoints.megatron.names import HEAD_COPY, SECOND_NAMES
from mlm_eval.checkpoints.parameters import (
    COLUMN,
    WORD_EMBEDDINGS,
    Parameter,
    num_prediction_heads,
    parameters,
    prediction_parameters,
    stays_float32,
)
from mlm_eval.checkpoints.vocabulary import with_rows

# Canonical part of a layer -> its name in legacy checkpoints of version 3.0 (tag v2.5).
_LEGACY_LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}

CORE_LINEAR = re.compile(
    r"(.+\.(?:linear_\w+|eh_proj|mixer\.in_proj|mixer\.out_proj)"
    r"|decoder\.layers\.\d+\.(?:self_attention|mlp))\.weight"
)
"""A parallel linear of megatron-core, which has an `_extra_state` (None in the local spec)."""

_WIDE_IN_MEGATRON = (".mixer.A_log", ".mixer.D")
"""Ends the names of exponents that Megatron keeps in float32; transformers does not."""

_ROUTED = re.compile(r"(?P<head>.+\.mlp\.experts\.)(?P<tail>linear_fc[12]\.\w+)")


def write_megatron_torch(
    checkpoint: Checkpoint,
    target: str | Path,
    *,
    names: str | None = None,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Unpack[LayoutOptions],
) -> Path:
    """Write `checkpoint` as a Megatron checkpoint folder and return the folder.

    The vocabulary: without `true_vocab_size` and `make_vocab_size_divisible_by` its stored rows
    stay exactly as they are where `tp` divides them, so that tp 4 -> 1 -> 4 gives the same bytes.
    Otherwise it is padded by Megatron's formula, the smallest multiple of divisor x tp that holds
    the true size (or all stored rows where that is not known): rows beyond are cut off, new ones
    repeat the last, as Megatron's own converter does. See `padded_vocabulary`.

    Args:
        checkpoint: What to write.
        target: Folder to make, with the tracker file and `iter_XXXXXXX` or `release` in it.
        names: `core` or `legacy`; None: megatron-core's, legacy where megatron-core has no such
            model.
        overwrite: Replace a checkpoint that is at `target`.
        finish: Called with the complete folder before it becomes `target`.
        on_progress: Called with (bytes written, bytes in all).
        **options: See `LayoutOptions`.

    Raises:
        InputError: A size does not divide the model, Megatron has no such model, or `target`
            exists.
    """
    target = Path(target)
    layout = save_layout(checkpoint, names, **options)
    folder = iteration_folder(layout.iteration)
    columns = dict.fromkeys(layout.experts.folders())
    ranks = [(t, e, p) for p in range(layout.pp) for t, e in columns]
    padded = with_rows(checkpoint, layout.vocab_size)
    models = {(t, e, p): rank_tensors(padded, layout, t, e, p) for t, e, p in ranks}
    args = {
        (t, e, p): rank_args(padded, layout, layout.experts.folders().index((t, e)), p)
        for t, e, p in ranks
    }
    total = sum(lazy.nbytes for model in models.values() for lazy in model.values())
    progress = ByteMeter(total, on_progress)
    sources, family = checkpoint.provenance.files, checkpoint.config.family
    with output_folder(
        target, overwrite=overwrite, needs=total, sources=sources, finish=finish
    ) as partial:
        for (t, e, p), model in models.items():
            rank = f"mp_rank_{t:02d}" + (f"_{p:03d}" if layout.pp > 1 else "")
            rank += f"_{e:03d}" if layout.experts.ep > 1 else ""
            path = partial / folder / rank / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            contents = {
                "args": args[t, e, p],
                "checkpoint_version": 3.0,
                "iteration": layout.iteration or 0,
                "model": _core_model(model, last=p == layout.pp - 1, family=family)
                if layout.names == "core"
                else _legacy_model(model),
            }
            write_torch_file(contents, path, on_bytes=progress.add)
        write_tracker(partial, layout.iteration)
    return target


def rank_tensors(
    checkpoint: Checkpoint, layout: SaveLayout, tp_rank: int, ep_rank: int, pp_rank: int
) -> dict[str, LazyTensor]:
    """Return one file's tensors under canonical names, its layers and its experts from 0.

    The last of several stages needs a copy of a tied embedding for its logits, `HEAD_COPY`, and
    copies of all embeddings for the heads of multi-token prediction.
    """
    config = checkpoint.config
    per_stage = max(config.num_layers, config.decoder_num_layers) // layout.pp  # T5: one stage
    last = layout.pp - 1
    tensors: dict[str, LazyTensor] = {}
    for name, parameter in parameters(config).items():
        source = checkpoint.tensors[name]
        layer = re.fullmatch(r"(\w+\.layers\.)(\d+)(\..+)", name)
        local = name
        if layer:
            stage, number = divmod(int(layer[2]), per_stage)
            local = f"{layer[1]}{number}{layer[3]}"
            local = names_of_hybrid(config, local, int(layer[2]))
        else:
            local = names_of_hybrid(config, name, None)
            stage = 0 if name.startswith("embedding.") else last
        copied = name.startswith("embedding.") and checkpoint.prediction_heads and pp_rank == last
        if stage == pp_rank or copied:
            tensors |= _shards(local, source, parameter, tp_rank, ep_rank, layout)
        tied = config.lm_head and not config.untie_embeddings_and_output_weights
        if name == WORD_EMBEDDINGS and tied and pp_rank == last > 0:
            tensors |= _shards(HEAD_COPY, source, parameter, tp_rank, ep_rank, layout)
    if pp_rank == last:
        heads = prediction_parameters(config, num_prediction_heads(checkpoint.prediction_heads))
        for name, parameter in heads.items():
            source = checkpoint.prediction_heads[name]
            tensors |= _shards(name, source, parameter, tp_rank, ep_rank, layout)
    return tensors


def _shards(
    name: str,
    source: LazyTensor,
    parameter: Parameter,
    tp_rank: int,
    ep_rank: int,
    layout: SaveLayout,
) -> dict[str, LazyTensor]:
    """Return what one rank's file holds of a parameter: each of its experts' matrices alone."""
    to = layout.dtype or source.dtype
    if stays_float32(name) or name.endswith(_WIDE_IN_MEGATRON):
        to = torch.float32
    match = _ROUTED.fullmatch(name)
    if not match:
        if name.endswith("_down_proj.weight"):  # whole in our tables, cut by rows in local layers
            parameter = dataclasses.replace(parameter, rule=COLUMN)
        index = parameter.part(tp_rank, layout.tp)
        return {name: _cast(_part(source, parameter.dim, index), to, name)}
    experts = layout.experts
    held = source.shape[0] // experts.ep
    index, dim = parameter.part(tp_rank % experts.etp, experts.etp), parameter.dim - 1
    return {
        f"{match['head']}local_experts.{number}.{match['tail']}": _cast(
            _part(Unstacked(source, ep_rank * held + number), dim, index), to, name
        )
        for number in range(held)
    }


def _part(source: LazyTensor, dim: int, index: Index) -> LazyTensor:
    if index is None:
        return source
    shape = list(source.shape)
    shape[dim] = len(torch.arange(shape[dim])[index])
    return Computed(tuple(shape), source.dtype, lambda: source.read(dim, index))


def _cast(source: LazyTensor, to: torch.dtype, name: str) -> LazyTensor:
    if source.dtype == to:
        return source
    return Computed(source.shape, to, lambda: cast(source.read(), to, name))


def _core_model(
    tensors: dict[str, LazyTensor], *, last: bool, family: str
) -> dict[str, LazyTensor | None]:
    """Return the flat `model` entry with megatron-core's keys, its empty extra states included."""
    if family == "t5":
        tensors = with_second_names(tensors)
    model: dict[str, LazyTensor | None] = {}
    for name, tensor in tensors.items():
        model["output_layer.weight" if name == HEAD_COPY else name] = tensor
        if linear := CORE_LINEAR.fullmatch(name):
            model[f"{linear[1]}._extra_state"] = None
    if last:
        model["output_layer._extra_state"] = None
    if last and family == "t5":
        model["lm_head.output_layer._extra_state"] = None
    return model


def with_second_names(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors of a megatron-core T5 under the two names that some of them have.

    Its output layer is a part of its head; Megatron asks for both names of each.
    """
    first = {name: f"lm_head.{name}" for name in tensors if name.startswith("output_layer.")}
    found = {first.get(name, name): tensor for name, tensor in tensors.items()}
    again = {second: found[name] for second, name in SECOND_NAMES.items() if name in found}
    return found | again


def _legacy_model(tensors: dict[str, LazyTensor]) -> dict[str, Any]:
    """Return the nested `model` entry of checkpoint version 3.0 before megatron-core (tag v2.5)."""
    model: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, leaf = _legacy_path(name)
        place = model
        for key in path:
            place = place.setdefault(key, {})
        place[leaf] = tensor
    return model


def _legacy_path(name: str) -> tuple[str, ...]:
    """Return the keys that lead to a parameter: legacy modules save dicts with flat keys."""
    block, _, rest = name.partition(".")
    leaf = name.rpartition(".")[2]
    if layer := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", rest):
        part = _LEGACY_LAYER[layer[2]]
        return "language_model", "encoder", f"layers.{layer[1]}.{part}.{leaf}"
    if rest.startswith("final_layernorm."):
        return "language_model", "encoder", rest
    if block == "embedding":
        return "language_model", "embedding", *rest.split(".")
    if block == "pooler":
        return "language_model", "pooler", rest
    if name == "output_layer.weight":
        return "language_model", "output_layer", "weight"
    if name == "output_layer.bias":
        return "lm_head", "bias"
    return block, rest.replace("layer_norm.", "layernorm.")
