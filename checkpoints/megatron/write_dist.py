"""Writes Megatron's `torch_dist` format, one chunk per layer, one tensor at a time.

The keys are megatron-core's sharded keys (docs/megatron.md, "torch_dist keys"): layers stacked on a
leading dim, norms under the linear that follows them. The files are those of
torch.distributed.checkpoint, made with its own metadata classes; its writer is not used, because it
keeps the last chunk of every key in memory until the file is closed. No process group is needed,
and any Megatron run can load the result, whatever its parallel sizes: `tp` and `pp` only stand in
the saved args.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Unpack

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what FileSystemReader looks for
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import ByteMeter, output_folder
from mlm_eval.checkpoints.files.torch_save import row_major_bytes, write_torch_file
from mlm_eval.checkpoints.lazy import LazyTensor, Selected
from mlm_eval.checkpoints.megatron.args import rank_args
from mlm_eval.checkpoints.megatron.iteration import iteration_folder, write_tracker
from mlm_eval.checkpoints.megatron.layers.branches import (
    is_hybrid,
    norm_inside,
    stored_parts,
)
from mlm_eval.checkpoints.megatron.layout import (
    ExpertLayout,
    LayoutOptions,
    lacking_in_core,
    save_layout,
)
from mlm_eval.checkpoints.megatron.write_torch import CORE_LINEAR, rank_tensors, with_second_names
from mlm_eval.checkpoints.vocabulary import with_rows

DATA_FILE = "__0_0.distcp"
"""rank 0, writer 0: torch.distributed.checkpoint's name for what a single process writes."""

ARCHIVE_ALIGNMENT = 64
"""An archive's first byte stands at a multiple of this. Inside it torch.save aligns the values, so
that they can be mapped."""

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

# megatron-core names norms in torch_dist by the TransformerEngine layer that holds them; those
# of layers with latent attention keep their names.
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_LAYER = re.compile(r"(?P<block>encoder|decoder)\.layers\.(?P<number>\d+)\.(?P<part>.+)")
_PREDICTION_LAYER = re.compile(r"(?P<prefix>mtp\.layers\.\d+\.transformer_layer\.)(?P<part>.+)")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(?P<number>\d+)\.(?P<part>.+)")

# Norms that are modules of their own with TransformerEngine have an `_extra_state`.
_STATELESS_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")

Axes = tuple[tuple[int, int], ...]
"""Place and size of each axis that stands before a tensor's own: its layer's, its expert's."""


@dataclass(frozen=True)
class StoredChunk:
    """One chunk to write: its key, its place in the tensor of that key, and its values."""

    key: str
    size: tuple[int, ...]
    """Shape of the whole tensor."""
    offsets: tuple[int, ...]
    values: LazyTensor


def write_torch_dist(
    checkpoint: Checkpoint,
    target: str | Path,
    *,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Unpack[LayoutOptions],
) -> Path:
    """Write `checkpoint` as a Megatron checkpoint folder in torch_dist format; return the folder.

    Args:
        checkpoint: What to write.
        target: Folder to make, with the tracker file and `iter_XXXXXXX` or `release` in it.
        overwrite: Replace a checkpoint that is at `target`.
        finish: Called with the complete folder before it becomes `target`.
        on_progress: Called with (bytes written, bytes in all).
        **options: See `LayoutOptions`. The saved args name `tp` and `pp`, and the vocabulary is
            padded for `tp`.

    Raises:
        InputError: megatron-core has no such model, a size does not divide it, or `target` exists.
    """
    config, target = checkpoint.config, Path(target)
    if lacking := lacking_in_core(config):
        raise InputError(
            f"torch_dist holds megatron-core models only, and megatron-core has no {lacking}; "
            "use --to megatron, which can write the names of Megatron's legacy code"
        )
    layout = save_layout(checkpoint, "core", **options)
    padded = with_rows(checkpoint, layout.vocab_size)
    alone = dataclasses.replace(layout, experts=ExpertLayout(1, 1, 1), pp=1)
    tensors = rank_tensors(padded, alone, 0, 0, 0)
    if config.family == "t5":
        tensors = with_second_names(tensors)
    entries, states = list(_entries(config, tensors)), list(_extra_states(config, tensors))
    _check_dtypes(entries, checkpoint)
    args = rank_args(padded, layout, 0, 0)
    args.ckpt_format = "torch_dist"
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": layout.iteration or 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False},
    }
    total = sum(entry.values.nbytes for entry in entries)
    sources = checkpoint.provenance.files
    with output_folder(
        target, overwrite=overwrite, needs=total, sources=sources, finish=finish
    ) as partial:
        folder = partial / iteration_folder(layout.iteration)
        folder.mkdir()
        write_torch_file(common, folder / "common.pt")
        metadata = _write_data(folder / DATA_FILE, entries, states, ByteMeter(total, on_progress))
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        # Megatron takes this file for the sign that a save has ended: it comes last.
        (folder / "metadata.json").write_text(json.dumps(_FORMAT))
        write_tracker(partial, layout.iteration)
    return target


def _check_dtypes(entries: list[StoredChunk], checkpoint: Checkpoint) -> None:
    """Refuse layers of different dtypes: stacked, they are one tensor with one dtype."""
    first: dict[str, torch.dtype] = {}
    for entry in entries:
        dtype = first.setdefault(entry.key, entry.values.dtype)
        if dtype != entry.values.dtype:
            raise InputError(
                f"{checkpoint.provenance.path} stores {entry.key} as {dtype} in one layer and as "
                f"{entry.values.dtype} in another, which torch_dist cannot; choose one with --dtype"
            )


def _place(config: ModelConfig, name: str) -> tuple[str, Axes]:
    """Return the key of a parameter or a module, and where it stands in the tensor of that key.

    Layers are stacked where all are of one kind, the experts of a layer always.
    Source: docs/megatron.md, "torch_dist keys".
    """
    axes: Axes = ()
    number = None
    if layer := _LAYER.fullmatch(name):
        prefix, part = f"{layer['block']}.layers.", layer["part"]
        number, count = int(layer["number"]), config.num_layers
        if config.family == "t5" and layer["block"] == "decoder":
            count = config.decoder_num_layers
        alike = len(config.moe_layers) in (0, config.num_layers)
        if alike and not config.branches_differ:
            axes = ((number, count),)
        else:
            prefix += f"{number}."
    elif layer := _PREDICTION_LAYER.fullmatch(name):
        prefix, part = layer["prefix"], layer["part"]
    else:
        return name, axes
    if expert := _LOCAL_EXPERT.fullmatch(part):
        axes = (*axes, (int(expert["number"]), config.num_experts))
        part = f"mlp.experts.experts.{expert['part']}"
    if config.branches_differ and number is not None:
        return prefix + norm_inside(config, number, part), axes
    if not config.multi_latent_attention:
        for norm, linear in _NORMS.items():
            part = part.replace(norm, linear, 1) if part.startswith(norm) else part
    return prefix + part, axes


def _entries(config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> Iterator[StoredChunk]:
    """Yield the chunks to write, in the order of the forward pass."""
    for name, tensor in tensors.items():
        key, axes = _place(config, name)
        for ending, part in _parts(config, name, tensor):
            yield StoredChunk(
                key + ending,
                (*(size for _, size in axes), *part.shape),
                (*(place for place, _ in axes), *(0 for _ in part.shape)),
                part,
            )


def _parts(config: ModelConfig, name: str, tensor: LazyTensor) -> list[tuple[str, LazyTensor]]:
    """Return a tensor's parts that have keys of their own, and what these end with."""
    layer = _LAYER.fullmatch(name)
    found = stored_parts(config, layer["part"]) if layer else None
    if found is None:
        return [("", tensor)]
    rows = torch.arange(tensor.shape[0])
    return [(f".{end}", Selected(tensor, rows[part])) for end, part in found.items()]


def _extra_states(config: ModelConfig, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values of the entries that Megatron asks for beside the weights.

    Megatron refuses to load without them, whatever is in them. The local spec asks for those of
    parallel linears, TransformerEngine's for more, depending on its version; what a run does not
    ask for is not read. The value of a stateless linear is what megatron-core writes for it; that
    of a norm is the empty tensor in which TransformerEngine keeps nothing.
    """
    empty = [torch.empty(0, dtype=torch.uint8)]
    modules: dict[str, Any] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if linear := CORE_LINEAR.fullmatch(name):
            modules[linear[1]] = [None]
            if module.endswith("attention.linear_proj"):
                modules[module.replace("linear_proj", "core_attention")] = [None]
        elif leaf == "weight" and module.endswith(_STATELESS_NORMS):
            modules[module] = empty
    for module, value in modules.items():
        key, axes = _place(config, f"{module}._extra_state")
        places = ".".join(str(place) for place, _ in axes) or "0"
        sizes = ".".join(str(size) for _, size in axes) or "1"
        yield f"{key}/shard_{places}_{sizes}", value
    final = "final_norm" if is_hybrid(config) else "final_layernorm"
    yield f"{config.block}.{final}._extra_state/shard_0_1", empty
    if config.family == "t5":
        yield "decoder.final_layernorm._extra_state/shard_0_1", empty
        yield "lm_head.output_layer._extra_state/shard_0_1", [None]
    if config.family != "gpt":
        yield "output_layer._extra_state/shard_0_1", [None]


def _write_data(
    path: Path,
    entries: list[StoredChunk],
    states: list[tuple[str, Any]],
    meter: ByteMeter,
) -> Metadata:
    """Write every entry as an archive of its own, and return where each one stands."""
    table: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    with path.open("wb") as stream:
        for key, value in states:
            table[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _write_archive(stream, path.name, value)
        for entry in entries:
            tensor = entry.values.read()
            assert tensor.shape == entry.values.shape and tensor.dtype == entry.values.dtype, (
                f"{entry.key}: read {tensor.shape} {tensor.dtype} of {entry.values}"
            )
            chunk = (1,) * (len(entry.size) - tensor.dim()) + tuple(tensor.shape)
            row = table.setdefault(
                entry.key,
                TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(entry.size), []),
            )
            index = MetadataIndex(entry.key, entry.offsets, len(row.chunks))
            row.chunks.append(ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(chunk)))
            storage[index] = _write_archive(stream, path.name, _own_storage(tensor).view(chunk))
            del tensor  # before the next one is read
            meter.add(entry.values.nbytes)
    return Metadata(table, storage_data=storage, storage_meta=StorageMeta(), version="1.0.0")


def _write_archive(stream: BinaryIO, name: str, value: Any) -> _StorageInfo:
    stream.write(bytes(-stream.tell() % ARCHIVE_ALIGNMENT))
    start = stream.tell()
    torch.save(value, stream)
    return _StorageInfo(name, start, stream.tell() - start)


def _own_storage(tensor: Tensor) -> Tensor:
    """Return the same values with a storage that holds nothing else: torch.save writes storages.

    A contiguous part of a mapped file is not copied for it.
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return torch.frombuffer(row_major_bytes(tensor), dtype=tensor.dtype).view(tensor.shape)
