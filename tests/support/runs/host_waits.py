"""Finds where the host would wait for a device, without a device.

Tensors of the device `meta` have no values: whatever asks for one (`.item()`, `.cpu()`, `nonzero`,
a mask as an index) raises. Copies to a GPU of what lies in pageable memory wait as well, and raise
under `no_waits`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.engine.engine import Engine
from mlm_eval.model.bert import BERT
from mlm_eval.model.gpt import GPT
from mlm_eval.model.t5 import T5
from mlm_eval.ranks.mesh import Mesh
from support import random_models

META = torch.device("meta")
KINDS = {"gpt": GPT, "bert": BERT, "t5": T5}


class WaitError(Exception):
    """The host would wait for the device here."""


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


class _Copies(TorchFunctionMode):
    """Refuses copies from the host to `meta`, but for those of `to_device`."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        on_meta = any(x.device == META for x in _tensors(result))
        if not on_meta or self._called_by_to_device():
            return result
        given = [x for x in _tensors([*args, *(kwargs or {}).values()]) if x.device != META]
        if name in ("tensor", "as_tensor", "scalar_tensor") or any(x.dim() for x in given):
            raise WaitError(f"{name} copies from the host to the device")
        if name == "__getitem__" and self._has_list(args[1]):
            raise WaitError("an index that is a list is copied to the device")
        return result

    def _called_by_to_device(self) -> bool:
        frame: Any = sys._getframe(2)
        return bool(frame.f_code.co_name == "to_device")

    def _has_list(self, index: Any) -> bool:
        return any(isinstance(part, list) for part in (index if type(index) is tuple else (index,)))


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Raise where the body would have the host wait for the device `meta`."""
    with _Copies():
        yield


def engine_without_values(config: ModelConfig, mesh: Mesh | None = None, **settings: Any) -> Engine:
    """Return an engine whose model is on `meta`."""
    mesh = mesh or Mesh()
    with META:
        model = KINDS[config.family](config, mesh.tensor_parallel)
    values = {"vocab": "padded", "batch_tokens": 64, "load_seconds": 0.0, **settings}
    checkpoint = random_models.checkpoint(config)
    model.to_empty(device=META)  # some parts of it are made on the CPU, whatever the default is
    return Engine(checkpoint, model.eval(), mesh, META, torch.float32, **values)
