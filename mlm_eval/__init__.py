"""Evaluate, convert and fine-tune Megatron-LM checkpoints.

The names below are the public Python API. They are looked up when first used, so that
`import mlm_eval` and `mlm-eval --help` cost no torch.

The rooms; each imports only from those listed before it (checkpoints/ and tasks/ stand at the top
of the project, and here are links to them):

    options.py     settings that stand once: a dataclass field with its default, help and bounds
    checkpoints/   what a checkpoint is
    model/         the mathematics: GPT and BERT over tensor-parallel layers
    ranks/         who the ranks are, and what they say outside the model
    engine/        a loaded model at work: scores, states, text
    training/      the trainer
    reporting/     results for machines and for people
    planning/      what a run will need, how fast a machine is
    harness/       lm-evaluation-harness on the engine
    series/        checkpoints one after the other
    tasks/         the benchmarks
    cli/           the commands, the only place that prints
"""

import os.path
from importlib import import_module
from typing import TYPE_CHECKING, Any

if not os.path.isdir(os.path.join(os.path.dirname(__file__), "checkpoints")):
    raise SystemExit(
        "mlm_eval/checkpoints is not the folder that it links to: git wrote the symbolic links of "
        "this clone as text files. Write them again: git config core.symlinks true && git checkout "
        "-- mlm_eval/checkpoints mlm_eval/tasks"
    )

if TYPE_CHECKING:
    from mlm_eval.checkpoints.convert import convert
    from mlm_eval.checkpoints.errors import InputError
    from mlm_eval.checkpoints.open import open_checkpoint
    from mlm_eval.checkpoints.tokenizer import load_tokenizer
    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.prompts import Sampling
    from mlm_eval.tasks.evaluation import evaluate

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "InputError",
    "Sampling",
    "__version__",
    "convert",
    "evaluate",
    "load_tokenizer",
    "open_checkpoint",
]

_HOME = {
    "Engine": "mlm_eval.engine.engine",
    "InputError": "mlm_eval.checkpoints.errors",
    "Sampling": "mlm_eval.engine.prompts",
    "convert": "mlm_eval.checkpoints.convert",
    "evaluate": "mlm_eval.tasks.evaluation",
    "load_tokenizer": "mlm_eval.checkpoints.tokenizer",
    "open_checkpoint": "mlm_eval.checkpoints.open",
}


def __getattr__(name: str) -> Any:
    """Return a public name from the module that defines it, importing that module now."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    """Return the public names, those not looked up yet included."""
    return sorted(__all__)
