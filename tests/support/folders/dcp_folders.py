"""Folders as Megatron's ranks leave them, written by torch.distributed.checkpoint itself.

megatron-core hands its tensors to torch's own FileSystemWriter, chunk by chunk; so do these
functions, in one process, for any keys, any cut into chunks and any values beside the tensors.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

Cuts = Sequence[int]
"""Into how many equal parts each dim of a tensor is cut; missing dims are not cut."""


class _Planner(SavePlanner):
    """Writes the given boxes of tensors and the given objects."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        cuts: Mapping[str, Cuts],
        objects: Mapping[str, Any],
        drop: int,
    ) -> None:
        self.tensors, self.cuts, self.objects, self.drop = tensors, cuts, objects, drop

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Nothing to set up: everything was given."""

    def create_local_plan(self) -> SavePlan:
        """Return one item a box and one an object."""
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.objects]
        for key, tensor in self.tensors.items():
            for offsets, sizes in boxes(tensor.shape, self.cuts.get(key, ())):
                items.append(
                    WriteItem(
                        MetadataIndex(key, offsets),
                        WriteItemType.SHARD,
                        tensor_data=TensorWriteData(
                            chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                            properties=TensorProperties(tensor.dtype),
                            size=tensor.shape,
                        ),
                    )
                )
        return SavePlan(items[: len(items) - self.drop])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return torch's own metadata for the plans, which Megatron keeps in it."""
        plans, metadata = create_default_global_save_plan(all_plans)
        metadata.all_local_plans = plans  # type: ignore[attr-defined]
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Return the values of one item."""
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save(self.objects[write_item.index.fqn], stream)
            return stream
        chunk = write_item.tensor_data.chunk
        tensor = self.tensors[write_item.index.fqn]
        for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            tensor = tensor.narrow(dim, start, size)
        return tensor.contiguous()


def boxes(shape: Sequence[int], cuts: Cuts) -> list[tuple[list[int], list[int]]]:
    """Return offsets and sizes of the parts of a tensor."""
    found: list[tuple[list[int], list[int]]] = [([], [])]
    for dim, size in enumerate(shape):
        parts = cuts[dim] if dim < len(cuts) else 1
        assert size % parts == 0, (shape, cuts)
        step = size // parts
        found = [
            ([*offsets, at], [*sizes, step])
            for offsets, sizes in found
            for at in range(0, size, step)
        ]
    return found


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    cuts: Mapping[str, Cuts] | None = None,
    objects: Mapping[str, Any] | None = None,
    common: Mapping[str, Any] | None = None,
    finished: bool = True,
    drop: int = 0,
) -> Path:
    """Write a folder and return it.

    Args:
        folder: To be made.
        tensors: By their key in the folder.
        cuts: How tensors are cut into chunks; whole if not named.
        objects: Entries that are not tensors.
        common: Contents of common.pt; None: there is none.
        finished: Whether to write metadata.json.
        drop: The last so many chunks are not saved.
    """
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=2)
    planner = _Planner(tensors, cuts or {}, objects or {}, drop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs in a single process
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    if common is not None:
        torch.save(dict(common), folder / "common.pt")
    if finished:
        text = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
        (folder / "metadata.json").write_text(text)
    return folder
