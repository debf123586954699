"""State dicts, whoever saved them: prefixes that wrappers leave, and values that are no weights.

`torch.compile`, DistributedDataParallel, FSDP and activation checkpointing each put a module of
their own around another, whose attribute then stands in the name of every parameter below it.
Source: `_orig_mod` in torch/_dynamo/eval_frame.py, `module` in torch/nn/parallel/distributed.py,
`FSDP_WRAPPED_MODULE` in torch/distributed/fsdp/_common_utils.py, `_CHECKPOINT_WRAPPED_MODULE` in
torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safe_pickle import Stub, printable, state_of
from mlm_eval.checkpoints.lazy import LazyTensor, StoredTensor

WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
"""Attributes that hold the wrapped module; no model of ours has a part of such a name."""

FLAT = "_flat_param"
"""In a name: FSDP's parameter that holds all of a module's, one after the other."""


def unwrapped(key: str) -> str:
    """Return a parameter's name without the parts that wrappers have put into it, anywhere."""
    if not any(part in key for part in WRAPPERS):
        return key
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def common_prefix(keys: Iterable[str], known: str) -> str:
    """Return what stands before every key, such as `model.`, where `known` follows it; else ''.

    Args:
        keys: All names of a state dict.
        known: A name that the model has.
    """
    keys = list(keys)
    ends = [key.removesuffix(known) for key in keys if key.endswith(f".{known}")]
    return next((end for end in ends if all(key.startswith(end) for key in keys)), "")


def plain_tensor(value: Any, key: str, where: str) -> LazyTensor | None:
    """Return the tensor that a state dict's value is, or None where it is none at all.

    Args:
        value: Of a state dict, as it was read.
        key: Its name.
        where: The file, for messages.

    Raises:
        InputError: It is a tensor of a kind that is not read, or an empty shell.
    """
    if isinstance(value, LazyTensor):
        if not value.numel:
            raise InputError(
                f"{where} holds {printable(key)} as an empty shell of shape {list(value.shape)}: "
                "the values are elsewhere, as DeepSpeed's ZeRO stage 3 and FSDP leave them; gather "
                "the weights when saving, or use the tools of the project that wrote the file"
            )
        if FLAT in key:
            raise InputError(
                f"{where} holds {printable(key)}, a flat parameter of FSDP that joins several; "
                "save the model's full state dict (StateDictType.FULL_STATE_DICT)"
            )
        return value
    if not isinstance(value, Stub):
        return None
    whole = _whole_of_wrapper(value)
    if whole is not None:
        return whole
    raise InputError(
        f"{where} holds {printable(key)} as {describe_stub(value)}, which mlm-eval does not read; "
        "load the model with the library that saved it, and save plain tensors in float32, "
        "bfloat16 or float16"
    )


def describe_stub(value: Stub) -> str:
    """Return what an object of a pickle was, in words that a user can look for."""
    # A rebuilder of tensors and its arguments, or an object of a class.
    names = [type(value).__name__]
    for part in value.__dict__["stub_args"][:4]:
        if isinstance(part, type) and issubclass(part, Stub):
            names.append(part.__name__)
    known = {
        "_rebuild_qtensor": "a quantized tensor of torch",
        "_rebuild_sparse_tensor": "a sparse tensor",
        "_rebuild_sparse_csr_tensor": "a sparse tensor",
        "_rebuild_meta_tensor_no_storage": "a tensor without values (device `meta`)",
        "_rebuild_device_tensor_from_numpy": "a tensor of another device (XLA)",
        "_rebuild_nested_tensor": "a nested tensor",
        "DTensor": "a DTensor, of which the file holds one rank's part",
        "ShardedTensor": "a ShardedTensor, of which the file holds one rank's part",
    }
    for name in names:
        if (what := known.get(name.rpartition(".")[2])) is not None:
            return what
    shown = next((n for n in names if n != "Stub"), "an unknown class")
    return f"an object of {shown}"


def _whole_of_wrapper(value: Stub) -> StoredTensor | None:
    """Return the values of a DTensor that one rank holds whole (replicated, or a mesh of one)."""
    args = value.__dict__["stub_args"]
    local = state_of(value).get("_local_tensor")
    if len(args) < 2 or not isinstance(local, StoredTensor) or not isinstance(args[1], tuple):
        return None
    shape = next((part for part in args[1] if isinstance(part, tuple)), None)
    return local if local.shape == shape else None
