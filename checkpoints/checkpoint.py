"""Checkpoint: a config, lazy tensors under canonical names, and where they came from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import WEIGHT_DTYPES
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import LazyTensor
from mlm_eval.checkpoints.parameters import num_parameters, parameters


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint comes from, and what the user should know about it."""

    path: Path
    """The folder or file that holds the weights (below the root that was given)."""
    format: str
    """`megatron-torch`, `megatron-torch-dist`, `megatron-torch-dcp`, `megatron-fsdp-dtensor`,
    `megatron-zarr`, `megatron-bridge`, `nemo`, `verl`, `deepspeed`, `huggingface`, or `memory`
    where no file is."""
    names: str | None = None
    """Whose parameter names the files have: `core` (megatron-core's) or `legacy` (Megatron's code
    before it); None: neither's."""
    checkpoint_version: float | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    iteration: int | str | None = None
    config_sources: Mapping[str, str] = field(default_factory=dict)
    """Setting -> where its value came from (shapes, args.NAME, assumed, --set)."""
    pickle_classes: list[str] = field(default_factory=list)
    """Pickled classes that are not on the allow-list: they became inert stubs."""
    hostile: list[str] = field(default_factory=list)
    """Pickled names that would run commands elsewhere."""
    warnings: list[str] = field(default_factory=list)
    odd_copies: list[str] = field(default_factory=list)
    """Copies of one table within the checkpoint that differ, a phrase each; the first is used."""
    same_parts: list[str] = field(default_factory=list)
    """Stages, layers or experts that are the same, in words: copied files, or meant so."""
    odd_replicas: list[str] = field(default_factory=list)
    """What several ranks should hold alike and do not, in words; the first rank's is used."""
    training_state: list[str] = field(default_factory=list)
    """What the files hold of the training run beside the weights; no writer carries it on."""
    notes: list[str] = field(default_factory=list)
    """Neutral remarks, such as the form of the files."""
    files: list[Path] = field(default_factory=list)
    digest: str = ""
    address: str = ""
    """Where the files were fetched from: `hf://org/name@commit`; empty: from nowhere."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Megatron's saved args as plain values, for the writers; empty elsewhere."""


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """One model, unread: `tensors[name].read()` touches the file."""

    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    provenance: Provenance
    prediction_heads: Mapping[str, LazyTensor] = field(default_factory=dict)
    """The heads of multi-token prediction, which the model's function does not need; see
    `parameters.prediction_parameters`."""
    replicas: Mapping[str, Mapping[str, LazyTensor]] = field(default_factory=dict)
    """What several ranks hold and nobody has compared: `soundness/replicas.py`."""

    def __repr__(self) -> str:
        found = self.provenance
        return (
            f"Checkpoint({self.config.family}, {self.num_parameters:,} parameters, {found.format}, "
            f"{str(found.path)!r})"
        )

    @property
    def num_parameters(self) -> int:
        """Weights in the model, padded vocabulary rows included, tied embeddings once."""
        return num_parameters(self.config)

    def length_warnings(self, longest: int) -> list[str]:
        """Return what to say of rows longer than those that the model was trained on.

        Saved args tell the length of the run's rows; positions may go further.

        Args:
            longest: Tokens of the longest row that the model is to read.
        """
        trained = self.provenance.args.get("seq_length")
        if type(trained) is not int or not 0 < trained < longest:
            return []
        return [
            f"rows of up to {longest:,} tokens are read, and the model was trained on rows of "
            f"{trained:,} (seq_length of its args); expect worse scores at the positions beyond"
        ]

    def check(self) -> Checkpoint:
        """Return itself after comparing the tensors with the table.

        Raises:
            InputError: A parameter is missing or superfluous, has another shape than the config
                says, or is not a floating-point tensor.
        """
        table = parameters(self.config)
        where = self.provenance.path
        for name, parameter in table.items():
            if name not in self.tensors:
                raise InputError(
                    f"{where} lacks the parameter {name} {list(parameter.shape)}; copy all files "
                    "of the checkpoint, or correct the settings with --set"
                )
            if self.tensors[name].shape != parameter.shape:
                raise InputError(
                    f"{where}: {name} has shape {list(self.tensors[name].shape)}, expected "
                    f"{list(parameter.shape)}; copy all ranks of one save, where ranks of two are "
                    "mixed, or correct the settings with --set"
                )
            check_weight_dtype(self.tensors[name], name, str(where))
        extra = sorted(set(self.tensors) - set(table))
        if extra:
            raise InputError(
                f"{where} has {len(extra)} parameter(s) that its settings do not call for, such as "
                f"{extra[0]}; correct the settings with --set"
            )
        return self


def with_each(
    checkpoint: Checkpoint, change: Callable[[str, LazyTensor], LazyTensor], **settings: Any
) -> Checkpoint:
    """Return the checkpoint with tensors and settings changed, those of heads of prediction too."""
    parts = (checkpoint.tensors, checkpoint.prediction_heads)
    tensors, heads = ({name: change(name, part[name]) for name in part} for part in parts)
    config = replace(checkpoint.config, **settings)
    return replace(checkpoint, config=config, tensors=tensors, prediction_heads=heads)


def with_warnings(checkpoint: Checkpoint, warnings: Iterable[str]) -> Checkpoint:
    """Return a checkpoint with more warnings; itself where there are none."""
    found = [*checkpoint.provenance.warnings, *warnings]
    if len(found) == len(checkpoint.provenance.warnings):
        return checkpoint
    return replace(checkpoint, provenance=replace(checkpoint.provenance, warnings=found))


_TRAINING_STATE = {
    "optimizer state": r"(^|\.)optimizer(_state_dict)?($|[./])|optim(izer_.*)?\.pt$",
    "learning-rate schedule": r"(^|\.)(lr_scheduler|opt_param_scheduler)($|[./])|^scheduler\.pt$",
    "random-number state": r"(^|[._])rng_(state|tracker_states)($|[_./])",
}


def training_state(names: Iterable[str]) -> list[str]:
    """Return, in words, what entries and files of these names hold beside the weights."""
    known = [name for name in names if isinstance(name, str)]
    return [
        what
        for what, pattern in _TRAINING_STATE.items()
        if any(re.search(pattern, name) for name in known)
    ]


def check_weight_dtype(tensor: LazyTensor, name: str, where: str) -> None:
    """Refuse integers and 8-bit floats: they come with scales, without which they mean others.

    Args:
        tensor: A weight.
        name: Its name.
        where: The file, for messages.

    Raises:
        InputError: It is of another dtype than those of weights.
    """
    if tensor.kind.name not in WEIGHT_DTYPES:
        raise InputError(
            f"{where}: {name} is stored as {tensor.kind}, which mlm-eval does not read; use a "
            "checkpoint in float32, bfloat16 or float16, not one of quantized weights"
        )


def cheap_digest(files: Mapping[str, tuple[int, list[int] | bytes]]) -> str:
    """Return a digest from names, sizes and the archives' own CRCs or header bytes: no weights."""
    state = hashlib.sha256()
    for name in sorted(files):
        size, marks = files[name]
        state.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        state.update(marks if isinstance(marks, bytes) else repr(marks).encode())
    return f"quick-sha256:{state.hexdigest()}"


def ends_of(path: Path, count: int) -> bytes:
    """Return the first and the last `count` bytes of a file that has no checksums."""
    with path.open("rb") as stream:
        head = stream.read(count)
        stream.seek(max(path.stat().st_size - count, 0))
        return head + stream.read()


def full_digest(checkpoint: Checkpoint) -> str:
    """Return a digest over every byte of the checkpoint's files."""
    state = hashlib.sha256()
    for path in sorted(checkpoint.provenance.files):
        about = f"{path.name}\0{path.stat().st_size}\0"
        state.update(about.encode("utf-8", "surrogateescape"))
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                state.update(block)
    return f"sha256:{state.hexdigest()}"
