"""Scoring and training never wait for the device within a step or between batches.

Each wait leaves a GPU idle until the host has queued work again. Here the device is one without
values (`support.runs.host_waits`): whatever would wait raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import configs, random_models
from support.runs import training_runs
from support.runs.host_waits import META, WaitError, engine_without_values, no_waits
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from mlm_eval.engine import encode as encoding
from mlm_eval.engine import score as scoring
from mlm_eval.engine.encode import BertInput
from mlm_eval.engine.resume import PartialScores
from mlm_eval.engine.score import PairRequest, Request
from mlm_eval.ranks.mesh import Mesh
from mlm_eval.tasks.language.pretraining import text_metrics
from mlm_eval.training.optimization import Schedule
from mlm_eval.training.settings import Counters
from mlm_eval.training.step import Stepper


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.long)], ids=["tp 1", "tp 2"])
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """The layout of one process, and of a second rank whose collectives send nothing."""
    if request.param == 1:
        yield Mesh()
        return
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        yield Mesh(2, 1, 1, init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")))
    finally:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` has no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def test_what_waits_is_found():
    x = torch.zeros(3, device=META)
    for wait in (
        lambda: x.sum().item(),
        lambda: x.cpu(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: bool(x.any()),
        lambda: x.tolist(),
        lambda: torch.tensor([1, 2], device=META),
        lambda: torch.zeros(2).to(META),
        lambda: x[[0, 1]],
        lambda: x[torch.tensor([0, 1])],
    ):
        with pytest.raises((WaitError, RuntimeError, NotImplementedError)), no_waits():
            wait()
    with no_waits():
        assert (x * 2 + torch.arange(3, device=META)).sum().device == META


# --- Training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recompute", [False, pytest.param(True, marks=pytest.mark.long)], ids=["", "recompute"]
)
@pytest.mark.parametrize("kind", training_runs.OBJECTIVES)
def test_a_step_waits_for_nothing_before_its_end(kind, recompute, mesh, monkeypatch):
    config = training_runs.model_for(kind).config
    engine = engine_without_values(config, mesh)
    settings = training_runs.settings(
        hidden_dropout=0.1, attention_dropout=0.1, recompute=recompute, micro_batch=2
    )
    stepper = Stepper(
        engine,
        training_runs.samples(kind, 6),
        training_runs.OBJECTIVES[kind](),
        settings,
        Schedule(1.0, 0.0, 1, 0.0),
        Counters(),
    )
    monkeypatch.setattr(stepper, "_mean_weight", lambda *_: 2.0)  # once a step, at its start
    with no_waits():
        sums = stepper._gradients(0, list(range(6)))
    assert sums.shape == (3,) and sums.device == META
    assert all(item.parameter.grad is not None for item in stepper.replicas.trained)


@pytest.mark.parametrize("kind", ["mlm", "lm"])
def test_an_evaluation_of_a_language_model_fetches_its_sums_at_the_end(kind, monkeypatch):
    engine = engine_without_values(training_runs.model_for(kind).config, batch_tokens=32)
    fetched = counting(monkeypatch, engine)
    with pytest.raises(NotImplementedError), no_waits():
        text_metrics(engine, training_runs.samples(kind, 12))
    assert len(fetched) > 3


# --- Scoring ------------------------------------------------------------------------------------

GPTS = {
    "gpt": random_models.GPT,
    "llama": random_models.LLAMA,
    "bloom": random_models.config(position_embedding_type="alibi", embedding_layernorm=True),
    "gemma": random_models.config(random_models.LLAMA, embedding_multiplier=3.0),
    "windows": random_models.config(random_models.LLAMA, window_size=3, window_layers=(1,)),
}


def counting(monkeypatch: pytest.MonkeyPatch, engine: Any) -> list[int]:
    """Return a list that gets an entry for each forward pass."""
    passes: list[int] = []
    forward = engine.model.forward

    def counted(*given: Any, **more: Any) -> Any:
        passes.append(1)
        return forward(*given, **more)

    monkeypatch.setattr(engine.model, "forward", counted)
    return passes


def tokens(length: int) -> Tensor:
    return torch.arange(length) % 40


@pytest.mark.parametrize("name", GPTS)
def test_scores_are_fetched_when_all_batches_are_on_their_way(name, mesh, monkeypatch, tmp_path):
    engine = engine_without_values(GPTS[name], mesh, batch_tokens=20)
    requests = [Request(tokens(n), 1 + n % 3) for n in (6, 9, 9, 12, 4, 14, 15)]
    batches = len(scoring._pending_batches(requests, (), engine.batch_tokens))
    passes = counting(monkeypatch, engine)
    partial = PartialScores(tmp_path / "kept", {}) if mesh.tp == 1 else None
    with pytest.raises(NotImplementedError), no_waits():
        engine.score(requests, partial=partial)
    assert len(passes) == batches > 3
    if partial is not None:
        partial.close()


def test_pairs_are_fetched_when_all_batches_are_on_their_way(monkeypatch):
    engine = engine_without_values(configs.T5, batch_tokens=20)
    requests = [
        PairRequest(tokens(n), n - 1, tokens(n + 1), torch.ones(n + 1, dtype=torch.int64))
        for n in (3, 5, 8, 9)
    ]
    passes = counting(monkeypatch, engine)
    with pytest.raises(NotImplementedError), no_waits():
        engine.score(requests)
    assert len(passes) > 1


@pytest.mark.parametrize("score", [False, True], ids=["states", "scores"])
def test_outputs_of_bert_are_fetched_one_batch_behind(score, mesh, monkeypatch):
    engine = engine_without_values(random_models.BERT, mesh, batch_tokens=20)
    passes = counting(monkeypatch, engine)
    with pytest.raises(NotImplementedError), no_waits():
        encoding.encode(
            engine.model,
            [BertInput(tokens(n)) for n in (6, 9, 9, 12)],
            mesh=mesh,
            device=META,
            batch_tokens=20,
            states=not score,
            score=score,
        )
    assert len(passes) == 2  # the second is on its way when the first is fetched
