"""A zero-shot benchmark in one file: how many last bytes of a text's lines are greedy choices?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlm_eval.checkpoints.files.text_file import read_text
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.engine.score import Request, Scores
from mlm_eval.options import option
from mlm_eval.planning.plan import Passes, Workload
from mlm_eval.reporting.results import Result
from mlm_eval.reporting.tables import Column
from mlm_eval.tasks.data.text import sha256
from mlm_eval.tasks.zero_shot.benchmark import DataOption, PaperFigure, Work, ZeroShot


@dataclass(frozen=True, kw_only=True)
class LastBytesOptions(DataOption):
    """The options of `last-bytes`."""

    data: str | None = option("A text file.")
    scored: int = option("How many tokens of each line are scored.", 1, least=1)


class LastBytes(ZeroShot[LastBytesOptions]):
    """A line counts where its last tokens are greedy choices.

    Example: mlm-eval last-bytes --ckpt gpt --data lines.txt
    """

    name = "last-bytes"
    title = "Last bytes"
    unit = "lines"
    options = LastBytesOptions
    paper = PaperFigure(
        Column("last-bytes", "Hits", 1),
        metric="hits",
        file="the one true file",
        settings={"scored": 1, "vocab": "padded"},
        percent=True,
    )

    def prepare(
        self,
        options: LastBytesOptions,
        *,
        tokenizer: Tokenizer,
        positions: int,
        limit: int | None = None,
    ) -> Work:
        """Return a request for each line."""
        text = read_text(Path(options.data or ""))
        lines = text.splitlines()
        kept = [tokenizer.encode(line)[-positions:] for line in lines[:limit]]
        return Work(
            [Request(torch.tensor(tokens), options.scored) for tokens in kept],
            counts={"lines": len(kept)},
            settings={
                "scored": options.scored,
                "limit": limit,
                "data": {"path": options.data, "sha256": sha256([text])},
                "warnings": self.limit_warnings(limit, len(kept), len(lines)),
            },
        )

    def metrics(self, scores: Scores, nll_sum: float, work: Work) -> dict[str, Any]:
        """Return the share of hits."""
        return {"hits": float(scores.all_greedy().double().mean()), "nll_sum": nll_sum}

    def rows(self, result: Result) -> list[tuple[str, str]]:
        """Return the share of hits."""
        return [("hits", f"{100 * result.metrics['hits']:.1f} % of {result.counts['lines']}")]

    def workload(self, positions: int) -> Workload:
        """Return ten lines of a few tokens."""
        return Workload(self.name, "Last bytes, 10 lines", [Passes(10, 4, 1, 1)])


LAST_BYTES = LastBytes()
