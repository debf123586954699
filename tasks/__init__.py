"""The benchmarks: one file turns one benchmark's data into requests and scores into a result."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError

if TYPE_CHECKING:
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.engine import Engine
    from mlm_eval.reporting.results import Result

ZERO_SHOT = ("lambada", "wikitext103")


def evaluate(
    task: str,
    engine: Engine,
    *,
    data: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> Result:
    """Return the result of a zero-shot benchmark on the engine's model.

    On several ranks each of them makes this call and gets the same result.

    Args:
        task: `wikitext103` or `lambada`.
        engine: The loaded model.
        data: A file or a `datasets` name; None: the benchmark's own test split from the Hub.
        tokenizer: None: the one stored with the checkpoint.
        options: The others of `evaluate` in the benchmark's module (`limit`, `stride`, ...).

    Raises:
        InputError: No such benchmark, no tokenizer, or what the benchmark finds wrong.
    """
    if task not in ZERO_SHOT:
        raise InputError(f"there is no benchmark {task!r}; evaluate knows {', '.join(ZERO_SHOT)}")
    if tokenizer is None:
        from mlm_eval.checkpoints.tokenizer import (
            find_tokenizer,  # here: the package is to import in no time
        )

        path = engine.checkpoint.provenance.path
        tokenizer = find_tokenizer(path)
        if tokenizer is None:
            raise InputError(
                f"no tokenizer is stored with {path}; give one, for example "
                f"tokenizer=mlm_eval.checkpoints.tokenizer.load_tokenizer(directory=...)"
            )
    benchmark = import_module(f"mlm_eval.tasks.zero_shot.{task}")
    result: Result = benchmark.evaluate(engine, data, tokenizer=tokenizer, **options)
    return result
