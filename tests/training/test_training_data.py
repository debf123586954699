"""Order, dealing and padding of training samples."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.properties import thorough
from support.runs import training_runs

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.tasks.language.data import SampleRange, TextWindows, TokenizedText
from mlm_eval.training.data import (
    NO_LABEL,
    Plan,
    Sample,
    check_data,
    collate,
    deal,
    epoch_order,
    fingerprint,
)
from mlm_eval.training.settings import TrainSettings


def sample(*lengths: int, label: object = 0, index: int = 0) -> Sample:
    """Return a sample whose rows count up from 1, with segment ids 1 from the second token on."""
    rows = [torch.arange(1, length + 1) for length in lengths]
    return Sample(rows, [(row > 1).long() for row in rows], label, index)  # type: ignore[arg-type]


# --- Order ---------------------------------------------------------------------------------------


def test_an_order_is_a_permutation_that_seed_and_epoch_decide():
    orders = {(s, e): epoch_order(50, seed=s, epoch=e) for s in (1, 2) for e in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    assert epoch_order(50, seed=1, epoch=1) == orders[1, 1]


def test_an_order_stays_what_it_was():
    """A literal: another order would be another run, after an update in the middle of one."""
    assert epoch_order(10, seed=1234, epoch=0) == ORDER


ORDER = [7, 9, 4, 0, 3, 2, 1, 5, 6, 8]


def plan(samples: int, **changes: object) -> Plan:
    values = {"global_batch": 4, "epochs": 2, "max_steps": None, "keep_last": False, "seed": 5}
    settings = TrainSettings(**{**values, **changes})  # type: ignore[arg-type]
    return Plan.make(samples, settings)


def test_the_last_incomplete_batch_is_dropped_or_kept():
    dropped, kept = plan(10), plan(10, keep_last=True)
    assert (dropped.steps_per_epoch, dropped.total_steps, dropped.epochs) == (2, 4, 2)
    assert (kept.steps_per_epoch, kept.total_steps) == (3, 6)
    assert [len(numbers) for _, _, numbers in dropped.steps(0)] == [4, 4, 4, 4]
    assert [len(numbers) for _, _, numbers in kept.steps(0)] == [4, 4, 2, 4, 4, 2]
    first_epoch = [n for _, epoch, numbers in kept.steps(0) if epoch == 0 for n in numbers]
    assert sorted(first_epoch) == list(range(10))


def test_steps_from_the_middle_are_those_of_the_whole():
    whole = list(plan(10, epochs=3, keep_last=True).steps(0))
    for start in range(len(whole)):
        assert list(plan(10, epochs=3, keep_last=True).steps(start)) == whole[start:]


def test_a_number_of_steps_takes_as_many_epochs_as_it_needs():
    steps = plan(10, max_steps=5)
    assert (steps.total_steps, steps.epochs) == (5, 3)
    assert [steps.ends_epoch(step) for step in range(5)] == [False, True, False, True, True]


def test_too_few_samples_make_no_plan():
    with pytest.raises(InputError, match="3 training samples do not fill one global batch of 4"):
        plan(3)
    assert plan(3, keep_last=True).total_steps == 2


# --- Dealing -------------------------------------------------------------------------------------


def test_samples_are_dealt_as_the_module_draws_it():
    lengths = list(range(20, 10, -1))  # already longest first
    ranks = [deal(lengths, dp_rank=r, dp_size=2, micro_batch=2) for r in range(2)]
    assert ranks == [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7], [9]]]


@thorough(300)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    micro_batch=st.integers(1, 9) | st.just(100),
    dp_size=st.integers(1, 8),
)
@example(lengths=[1, 2], micro_batch=1, dp_size=8)  # more ranks than samples
@example(lengths=[3] * 13, micro_batch=3, dp_size=2)  # a last micro-batch that not all ranks have
def test_every_sample_is_dealt_once_and_ranks_keep_step(
    lengths: list[int], micro_batch: int, dp_size: int
):
    ranks = [
        deal(lengths, dp_rank=r, dp_size=dp_size, micro_batch=micro_batch) for r in range(dp_size)
    ]
    dealt = Counter(i for rank in ranks for batch in rank for i in batch)
    assert dealt == Counter(range(len(lengths)))
    assert len({len(rank) for rank in ranks}) == 1
    assert max(len(batch) for rank in ranks for batch in rank) <= micro_batch
    # No more micro-batches than needed, and no rank has two samples more than another.
    assert len(ranks[0]) == -(-len(lengths) // (dp_size * micro_batch))
    shares = [sum(map(len, rank)) for rank in ranks]
    assert max(shares) - min(shares) <= 1
    # At each step of the ranks no sample is shorter than one of the next step.
    steps = [[lengths[i] for rank in ranks for i in rank[k]] for k in range(len(ranks[0]))]
    for now, then in itertools.pairwise(steps):
        assert min(now) >= max(then, default=0)


def test_ranks_without_samples_get_empty_micro_batches():
    ranks = [deal([3, 9], dp_rank=r, dp_size=3, micro_batch=4) for r in range(3)]
    assert ranks == [[[1]], [[0]], [[]]]


# --- Batches -------------------------------------------------------------------------------------


def test_a_batch_is_padded_to_its_longest_row():
    batch = collate([sample(3, 1, label=1, index=4), sample(2, 2, label=0, index=9)])
    assert batch.tokens.tolist() == [[1, 2, 3], [1, 0, 0], [1, 2, 0], [1, 2, 0]]
    assert batch.tokentypes.tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert batch.padding_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert batch.labels.tolist() == [1, 0] and batch.samples == 2 and batch.rows == 2
    assert batch.row_numbers.tolist() == [8, 9, 18, 19]


def test_labels_of_tokens_and_of_answers():
    tokens = [sample(n, label=torch.arange(n), index=0) for n in (3, 2)]
    assert collate(tokens).labels.tolist() == [[0, 1, 2], [0, 1, NO_LABEL]]
    assert collate([sample(5, label=(2, 4)), sample(5, label=(0, 0))]).labels.tolist() == [
        [2, 4],
        [0, 0],
    ]


def test_a_width_can_be_rounded_up():
    batch = collate([sample(3, label=torch.arange(3))], multiple=8)
    assert batch.tokens.shape == batch.labels.shape == (1, 8)


# --- Checks --------------------------------------------------------------------------------------


LIMITS = {"positions": 16, "vocab_size": 50, "tokentypes": 2}


@pytest.mark.parametrize("kind", training_runs.OBJECTIVES)
def test_good_samples_pass(kind):
    check_data(training_runs.samples(kind, 600), **LIMITS)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"positions": 15}, "rows of 4 to 16 tokens, the model takes 1 to 15"),
        ({"vocab_size": 49}, "the token id 49, the model has a table of 49"),
        ({"tokentypes": 0}, "the segment id 1, the model has a table of 1"),
    ],
)
def test_samples_that_the_model_cannot_run_are_refused(limits, message):
    with pytest.raises(InputError, match=message):
        check_data(training_runs.samples("multichoice_head", 600), **(LIMITS | limits))


def test_no_samples_are_refused():
    with pytest.raises(InputError, match="hold no sample"):
        check_data([], **LIMITS)


def test_a_fingerprint_changes_with_what_it_stands_for():
    data = training_runs.samples("mlm", 200)
    before = fingerprint(data)
    assert fingerprint(training_runs.samples("mlm", 200)) == before
    assert fingerprint(data[:-1]) != before
    for index in range(len(data)):
        sample = data[index]
        for other in (
            dataclasses.replace(sample, rows=[sample.rows[0] + 1]),
            dataclasses.replace(sample, tokentypes=[1 - sample.tokentypes[0]]),
            dataclasses.replace(sample, label=sample.label + 1),  # type: ignore[operator]
        ):
            changed = [*data[:index], other, *data[index + 1 :]]
            assert fingerprint(changed) != before


@pytest.mark.parametrize("at", [0, 5_431, 9_999])
def test_a_fingerprint_changes_with_every_token_of_a_text(at: int):
    """Training on text has more samples than can be made: the text itself is looked at."""

    def data(tokens: torch.Tensor) -> SampleRange:
        text = TokenizedText(tokens, torch.tensor([0, 10_000]), torch.tensor([0, 10_000]))
        return SampleRange(TextWindows(text, length=8), 0, 1_000)

    tokens = torch.arange(10_000, dtype=torch.int32)
    changed = tokens.clone()
    changed[at] += 1
    assert fingerprint(data(tokens)) == fingerprint(data(tokens.clone()))
    assert fingerprint(data(tokens)) != fingerprint(data(changed))
