"""An engine without a model for the tests of the benchmarks: its answers are known beforehand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.score import Request, Scores
from mlm_eval.ranks.mesh import Mesh
from support import configs


def log_prob(context: tuple[int, ...], target: int) -> float:
    """Return a value that depends on every token of the context and sums exactly in float64."""
    return -(1 + hash((context, target)) % 4093) / 1024


class ScriptedEngine(Engine):
    """An engine whose log-probabilities are `log_prob`, times `scale`.

    A context too short or too long changes them. Every token is the greedy choice but those named
    in `misses`, as (request, place from its end): (1, 1) is the last token of the second request.
    `scored` holds the requests of the last call, `passed` its other arguments.
    """

    def __init__(
        self,
        misses: set[tuple[int, int]] = frozenset(),  # type: ignore[assignment]
        *,
        positions: int = 64,
        vocab_size: int = 256,
        scale: float = 1.0,
    ) -> None:
        config = configs.config(vocab_size=vocab_size, max_position_embeddings=positions)
        provenance = Provenance(Path("model"), "megatron-torch", digest="quick-sha256:0")
        model: Any = SimpleNamespace(config=config)
        super().__init__(
            Checkpoint(config, {}, provenance),
            model,
            mesh=Mesh(),
            device=torch.device("cpu"),
            dtype=torch.float32,
            vocab="padded",
            batch_tokens=64,
            load_seconds=0.25,
        )
        self.misses, self.scale = misses, scale
        self.scored: list[Request] = []
        self.passed: dict[str, Any] = {}

    def score(self, requests: Any, **passed: Any) -> Scores:
        """Return the scripted scores; they took half a second."""
        self.scored, self.passed = list(requests), passed
        values, greedy, ends = [], [], [0]
        for number, request in enumerate(requests):
            tokens = request.tokens.tolist()
            for place in range(len(tokens) - request.num_scored, len(tokens)):
                values.append(self.scale * log_prob(tuple(tokens[:place]), tokens[place]))
                greedy.append((number, len(tokens) - place) not in self.misses)
            ends.append(len(values))
        return Scores(torch.tensor(values), torch.tensor(greedy), torch.tensor(ends), seconds=0.5)


class NothingDone:
    """Stands for the scores kept by an interrupted run that had finished no request."""

    def finished(self) -> dict[int, Any]:
        """Return no scores."""
        return {}
