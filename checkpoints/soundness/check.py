"""Every byte of a checkpoint read once, and all that is wrong with it: `inspect --check`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import LazyTensor, runs
from mlm_eval.checkpoints.soundness.odd_values import OddValues
from mlm_eval.checkpoints.soundness.replicas import compare_replicas


@dataclass(frozen=True)
class Soundness:
    """What reading everything has found."""

    tensors: int
    nbytes: int
    """How many were read."""
    findings: tuple[str, ...]
    """A sentence or phrase each; empty where all is well."""

    def to_dict(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return {"tensors": self.tensors, "bytes": self.nbytes, "findings": list(self.findings)}


def check_everything(
    checkpoint: Checkpoint, *, on_progress: Callable[[int, int], None] | None = None
) -> Soundness:
    """Return what is wrong with a checkpoint's weights, a few megabytes in memory at a time.

    Compared are the checksums of all records (a zip archive has them, and so each entry of a
    `.distcp` file; safetensors, zarr and torch's older stream have none), and what several ranks
    hold; looked for are NaN, infinities and absurd values.
    """
    odd = OddValues()
    everything = {**checkpoint.tensors, **checkpoint.prediction_heads}
    known = checkpoint.provenance
    findings = [*known.odd_copies, *known.same_parts, *known.odd_replicas]
    nbytes, done = sum(tensor.nbytes for tensor in everything.values()), 0
    for name, tensor in everything.items():
        if damage := _read(name, tensor, odd):
            findings.append(damage)
        done += tensor.nbytes
        if on_progress is not None:
            on_progress(done, nbytes)
    where = checkpoint.provenance.path
    try:
        findings += compare_replicas(checkpoint.replicas, where)
    except InputError as error:
        findings.append(str(error))
    return Soundness(len(everything), nbytes, (*findings, *odd.phrases()))


def _read(name: str, tensor: LazyTensor, odd: OddValues) -> str | None:
    """Read a tensor; return why that is not possible, in words."""
    try:
        for values in runs(tensor):
            odd.look(name, values)
    except InputError as error:
        return f"{name}: {error}"
    return None
