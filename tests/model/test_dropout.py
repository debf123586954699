"""Masks that follow from numbers: right rates, no pattern, the same wherever they are drawn."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from support import random_models
from support.ranks import run_ranks
from support.runs import training_runs
from torch import Tensor

from mlm_eval.model.dropout import EMBEDDING, Dropout, sample_keys
from mlm_eval.training.data import collate

SAMPLES, LENGTH, WIDTH = 8, 64, 128


def keys(step: int = 3, seed: int = 1, first: int = 0) -> Tensor:
    return sample_keys(seed, step, torch.arange(first, first + SAMPLES))


def mask(dropout: Dropout, layer: int = 0, branch: int = 0, length: int = LENGTH) -> Tensor:
    """Return which units of a residual branch are kept."""
    ones = torch.ones(dropout.keys.numel(), length, WIDTH)
    return dropout.residual(ones, layer, branch) != 0


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_the_rate_is_kept_and_the_rest_scaled_up(rate):
    dropout = Dropout(keys(), rate, rate)
    for out in (
        dropout.residual(torch.ones(SAMPLES, LENGTH, WIDTH), 0, 0),
        dropout.attention_weights(torch.ones(SAMPLES, 4, LENGTH, LENGTH), 0, range(4)),
    ):
        kept = (out != 0).double().mean().item()
        deviation = (rate * (1 - rate) / out.numel()) ** 0.5
        assert abs(kept - (1 - rate)) <= 5 * deviation
        assert out[out != 0].unique().tolist() == [pytest.approx(1 / (1 - rate))]
    pooled = dropout.pooled(torch.ones(SAMPLES, 4096))
    assert abs((pooled != 0).double().mean().item() - (1 - rate)) < 0.02


def test_masks_of_all_places_are_unrelated():
    """Neighbours in every number that a mask depends on agree as often as chance has it."""
    half = Dropout(keys(), 0.5, 0.5)
    one = mask(half)
    others = {
        "unit": one.roll(1, 2),
        "position": one.roll(1, 1),
        "sample": one.roll(1, 0),
        "layer": mask(half, layer=1),
        "embedding": mask(half, layer=EMBEDDING),
        "branch": mask(half, branch=1),
        "step": mask(Dropout(keys(step=4), 0.5, 0.5)),
        "seed": mask(Dropout(keys(seed=2), 0.5, 0.5)),
        "distant sample": mask(Dropout(keys(first=1 << 40), 0.5, 0.5)),
    }
    heads = half.attention_weights(torch.ones(SAMPLES, 2, LENGTH, WIDTH), 0, [0, 1]) != 0
    others["attention"], others["head"] = heads[:, 0], heads[:, 1]
    others["query"], others["key"] = heads[:, 0].roll(1, 1), heads[:, 0].roll(1, 2)
    deviation = 0.5 / one.numel() ** 0.5
    for (name, first), (other, second) in itertools.combinations(
        [("itself", one), *others.items()], 2
    ):
        agreement = (first == second).double().mean().item()
        assert abs(agreement - 0.5) < 5 * deviation, f"{name} and {other}"
    # No unit, position or sample is dropped more often than others.
    for dims in itertools.combinations(range(3), 2):
        means = one.double().mean(dims)
        spread = 0.5 * (means.numel() / one.numel()) ** 0.5
        assert float((means - 0.5).abs().max()) < 5 * spread


def test_a_mask_belongs_to_its_sample_alone():
    """Other samples beside it, another order, more padding: the mask of a sample stays."""
    whole = mask(Dropout(keys(), 0.3, 0.3))
    numbers = torch.tensor([5, 2])
    part = mask(Dropout(sample_keys(1, 3, numbers), 0.3, 0.3), length=LENGTH - 7)
    assert torch.equal(part, whole[numbers][:, : LENGTH - 7])


def test_numbers_beyond_32_bits_are_told_apart():
    numbers = torch.tensor([7, 7 + (1 << 32), 7 + (1 << 33), (1 << 31) + 7, -1])
    found = sample_keys(1, 1 << 40, numbers)
    assert found.dtype == torch.int32 and found.unique().numel() == numbers.numel()
    assert not torch.equal(found, sample_keys(1 + (1 << 31), 1 << 40, numbers))


def test_the_same_numbers_give_the_same_mask_on_every_machine():
    """Literal values: a change of the hash would change the losses of runs to go on with."""
    assert sample_keys(1234, 0, torch.arange(4)).tolist() == KEYS
    kept = mask(Dropout(sample_keys(1234, 0, torch.arange(1)), 0.5, 0.5))[0, :2, :16]
    assert ["".join("x."[int(k)] for k in row) for row in kept.tolist()] == PATTERN


KEYS = [1998189286, 1969408885, 605539493, -1829981842]
PATTERN = ["....xx..xxx.xxx.", "x.x.xx.x.x...x.."]


def test_dropped_units_get_no_gradient():
    x = torch.ones(SAMPLES, LENGTH, WIDTH, requires_grad=True)
    out = Dropout(keys(), 0.4, 0.0).residual(x, 2, 1)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, out.detach())


def masks_on_a_rank() -> tuple[Tensor, Tensor]:
    """Return what a rank's first layer drops of a residual branch, and of its own heads."""
    from mlm_eval.engine.engine import Engine

    engine = Engine.load(training_runs.model_for("lm"), dtype="float32")
    attention = engine.model.decoder.layers[0].self_attention
    dropout = Dropout(keys(), 0.5, 0.5)
    weights = torch.ones(SAMPLES, len(attention.heads), LENGTH, LENGTH)
    return mask(dropout), dropout.attention_weights(weights, 0, attention.heads) != 0


def test_ranks_share_residual_masks_and_differ_in_those_of_their_heads():
    """The paper's appendix B.2."""
    (whole, all_heads), *_ = run_ranks(1, masks_on_a_rank)
    (residual, first), (other, second) = run_ranks(2, masks_on_a_rank)
    assert torch.equal(residual, whole) and torch.equal(other, whole)
    assert torch.equal(torch.cat([first, second], dim=1), all_heads)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("softmax_scale", [None, 0.9])
@pytest.mark.parametrize("kind", ["mlm", "lm", "classification_head"])
def test_the_explicit_attention_of_dropout_is_the_fused_one(kind, softmax_scale):
    """A rate so small that nothing is dropped takes the other path to the same loss."""
    from mlm_eval.engine.engine import Engine

    model = training_runs.model_for(kind, None)
    config = dataclasses.replace(model.config, softmax_scale=softmax_scale)
    engine = Engine.load(dataclasses.replace(model, config=config), dtype="float32")
    batch = collate(training_runs.samples(kind, 5), mean_weight=2.0)
    objective = training_runs.OBJECTIVES[kind]()
    dropout = Dropout(sample_keys(1, 0, batch.row_numbers), 0.0, 1e-12)
    explicit, hits, count = objective.loss_and_hits(engine.model, batch, dropout)
    fused, fused_hits, fused_count = objective.loss_and_hits(engine.model, batch, None)
    torch.testing.assert_close(explicit, fused, rtol=1e-5, atol=1e-6)
    assert torch.equal(hits, fused_hits) and count == fused_count


def test_every_place_of_the_paper_is_dropped():
    """Embedding, both branches of a layer, attention, and the state that a task head reads."""
    seen: list[tuple[str, int, int]] = []

    class Spy(Dropout):
        def residual(self, x: Tensor, layer: int, branch: int) -> Tensor:
            seen.append(("residual", layer, branch))
            return super().residual(x, layer, branch)

        def attention_weights(self, weights: Tensor, layer: int, heads: list[int]) -> Tensor:  # type: ignore[override]
            seen.append(("attention", layer, len(heads)))
            return super().attention_weights(weights, layer, heads)

        def pooled(self, x: Tensor) -> Tensor:
            seen.append(("pooled", 0, 0))
            return super().pooled(x)

    from mlm_eval.engine.engine import Engine

    engine = Engine.load(training_runs.model_for("multichoice_head"), dtype="float32")
    batch = collate(training_runs.samples("multichoice_head", 2))
    dropout = Spy(sample_keys(1, 0, batch.row_numbers), 0.1, 0.1)
    training_runs.OBJECTIVES["multichoice_head"]().loss_and_hits(engine.model, batch, dropout)
    layers = range(random_models.BERT.num_layers)
    expected = [("residual", EMBEDDING, 0)]
    for layer in layers:
        expected += [("attention", layer, 4), ("residual", layer, 0), ("residual", layer, 1)]
    assert seen == [*expected, ("pooled", 0, 0)]
