"""The questions: benchmarks turn data into requests or samples, and answers into figures.

    zero_shot/     WikiText-103, LAMBADA, given lines: scored, nothing is trained
    finetune/      RACE, MNLI, QQP, SQuAD: a BERT is trained for each
    language/      masked and causal language modelling on any text
    data/          where texts and data sets come from
    paper.py       the paper's tables (paper.toml) with measured figures in them
    comparison.py  any records side by side, and over training
    records.py     result records, read back
    workloads.py   the work of each benchmark, for `mlm-eval plan`

A new benchmark goes into `zero_shot/` or `finetune/`; their doors say how. The tasks import all of
`mlm_eval` except the command line, and only the command line imports the tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError

if TYPE_CHECKING:
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.engine import Engine
    from mlm_eval.reporting.results import Result


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
        options: `limit`, and the benchmark's own (`stride`, `target`, ...).

    Raises:
        InputError: No such benchmark, no tokenizer, or what the benchmark finds wrong.
    """
    # Imported here to keep `import mlm_eval` fast.
    from mlm_eval.tasks.zero_shot import benchmarks

    known = benchmarks()
    if task not in known:
        names = ", ".join(sorted(known))
        raise InputError(f"there is no benchmark {task!r}; evaluate knows {names}")
    return known[task].evaluate(engine, data, tokenizer=tokenizer or engine.tokenizer, **options)
