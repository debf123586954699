"""Result: one evaluation's figures with everything that is needed to repeat them, as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import visible_json
from mlm_eval.checkpoints.files.output import write_text
from mlm_eval.reporting.environment import gpu_versions, run_record

if TYPE_CHECKING:
    from mlm_eval.checkpoints.checkpoint import Checkpoint
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.resume import PartialScores
    from mlm_eval.engine.score import Request

LIBRARIES = ("torch", "tokenizers", "transformers", "safetensors", "datasets", "numpy")


@dataclass(frozen=True, repr=False)
class Result:
    """A result record; the names of its fields and of their entries are a public contract.

    `metrics` may hold infinities and NaN: a model can be that bad. JSON has no such numbers, so
    they are written as null with a `NAME_note` beside them.
    """

    task: str
    protocol: str
    metrics: dict[str, Any]
    counts: dict[str, Any]
    settings: dict[str, Any]
    checkpoint: dict[str, Any]
    timing: dict[str, Any]
    versions: dict[str, str]
    run: dict[str, Any] = dataclasses.field(default_factory=run_record, compare=False)
    """When, where and by what command: no part of the result itself."""

    def __repr__(self) -> str:
        figures = [f"{k}={v:.6g}" for k, v in self.metrics.items() if isinstance(v, (int, float))]
        sets = [name for name, value in self.metrics.items() if isinstance(value, dict)]
        told = ", ".join([*figures, *sets]) or "no metrics"
        return f"Result({self.task}, {self.protocol}: {told}; {str(self.checkpoint.get('path'))!r})"

    @property
    def warnings(self) -> list[str]:
        """What a reader of the figures must know: about the data first, then about the run."""
        data = self.settings.get("data") or {}
        return [*data.get("warnings", ()), *self.settings.get("warnings", ())]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        values: dict[str, Any] = _finite(dataclasses.asdict(self))
        return values

    def to_json(self) -> str:
        """Return the record as one JSON object, indented, with a newline at its end."""
        return _as_json(dataclasses.asdict(self))

    def write(self, path: str | Path) -> Path:
        """Write the record and return its path: the whole of it, or nothing.

        Raises:
            InputError: The file cannot be written.
        """
        return write_text(path, self.to_json())


def write_json(path: str | Path, record: dict[str, Any]) -> Path:
    """Write a record as JSON, infinities and NaN as null; see `write_text`."""
    return write_text(path, _as_json(record))


def _as_json(record: dict[str, Any]) -> str:
    text = json.dumps(_finite(record), indent=2, ensure_ascii=False, allow_nan=False)
    return visible_json(text) + "\n"


def exponential(exponent: float) -> float:
    """Return e to the `exponent`; infinity where that overflows a float64 (above 709.78)."""
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf


def versions() -> dict[str, str]:
    """Return the versions of what computed a result, without importing any of it."""
    from importlib import metadata  # here: the command line imports this module for its help

    from mlm_eval import __version__

    found = {"mlm_eval": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | gpu_versions()


def checkpoint_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a record says about the model that was evaluated."""
    provenance = checkpoint.provenance
    return {
        "path": str(provenance.path),
        "digest": provenance.digest,
        **({"address": provenance.address} if provenance.address else {}),
        "format": provenance.format,
        "num_parameters": checkpoint.num_parameters,
        "checkpoint_version": provenance.checkpoint_version,
        "tensor_parallel": provenance.tensor_parallel,
        "pipeline_parallel": provenance.pipeline_parallel,
        "iteration": provenance.iteration,
        **consumed(provenance.args),
        "config": checkpoint.config.to_dict(),
        "config_sources": dict(provenance.config_sources),
        "warnings": list(provenance.warnings),
    }


def consumed(args: Mapping[str, Any]) -> dict[str, int | None]:
    """Return how many samples and tokens the model was trained on, where saved args say so."""
    samples, length = args.get("consumed_train_samples"), args.get("seq_length")
    if type(samples) is not int or samples < 1:
        return {"consumed_samples": None, "consumed_tokens": None}
    tokens = samples * length if type(length) is int else None
    return {"consumed_samples": samples, "consumed_tokens": tokens}


def engine_settings(engine: Engine, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings that every task that scores text records."""
    return {**engine.describe(), "tokenizer": tokenizer.record()}


def timing_record(
    engine: Engine,
    requests: Sequence[Request],
    seconds: float,
    partial: PartialScores | None = None,
) -> dict[str, Any]:
    """Return speed figures of one scoring run; tokens are those that went through the model.

    `model_tflops` is the rate of the floating-point operations that were carried out, all ranks
    together, in units of 1e12 a second. What a resumed run took over from an earlier one is no work
    of its `seconds` and does not count.
    """
    earlier = partial.finished() if partial is not None else {}
    fresh = [request for index, request in enumerate(requests) if index not in earlier]
    tokens = sum(request.length for request in fresh)
    return {
        "load_seconds": engine.load_seconds,
        "eval_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "model_tflops": engine.flops(fresh) / seconds / 1e12 if seconds else None,
    }


def loss_warnings(nll_sum: float) -> list[str]:
    """Return a sentence if a sum of losses is not a number to report, else nothing."""
    if math.isfinite(nll_sum):
        return []
    return [
        f"the model's summed loss is {nll_sum}: its weights or the arithmetic of its dtype are "
        f"broken; try --dtype float32 and check the checkpoint with `mlm-eval inspect`"
    ]


def _finite(value: Any) -> Any:
    """Return `value` without infinities and NaN: null, and in a dict a note beside it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        finite: dict[str, Any] = {}
        for name, entry in value.items():
            finite[name] = _finite(entry)
            if isinstance(entry, float) and not math.isfinite(entry):
                finite[f"{name}_note"] = _why_not_finite(entry)
        return finite
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def _why_not_finite(value: float) -> str:
    if math.isnan(value):
        return "not a number: the model gave NaN, or the figure needs more than one example"
    sign = "minus infinity" if value < 0 else "infinity"
    return f"{sign}: beyond the range of a float64"
