"""How requests become batches: literal tables, and what must hold for any input."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.ranks import run_ranks

from mlm_eval.engine.batching import in_order, map_batches, pack, pad_rows
from mlm_eval.engine.score import Request, Scores, ScoringBatch, riders
from mlm_eval.ranks.groups import make_mesh


def request(*tokens: int, scored: int) -> Request:
    return Request(torch.tensor(tokens), scored)


@pytest.mark.parametrize(
    ("lengths", "budget", "batches"),
    [
        ([], 8, []),
        ([3], 8, [[0]]),
        ([3, 5, 4], 100, [[1, 2, 0]]),  # longest first
        ([2, 2, 2, 2, 2], 4, [[0, 1], [2, 3], [4]]),  # of one length: in order
        ([4, 3, 1, 1, 1], 8, [[0, 1], [2, 3, 4]]),  # 2 x 4 padded tokens, then 3 x 1
        ([4, 3, 1, 1, 1], 7, [[0], [1, 2], [3, 4]]),  # 2 x 4 is over 7, 3 x 3 as well
        ([9, 2, 2], 4, [[0], [1, 2]]),  # longer than the budget: alone, not dropped
        ([2, 9], 1, [[1], [0]]),
    ],
)
def test_packing_is_as_drawn(lengths, budget, batches):
    assert pack(lengths, budget) == batches


def test_packing_takes_every_request_once_and_keeps_to_the_budget():
    chance = random.Random(0)
    for _ in range(300):
        lengths = [chance.randrange(1, 30) for _ in range(chance.randrange(40))]
        budget = chance.randrange(1, 120)
        batches = pack(lengths, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            width = max(lengths[i] for i in batch)
            assert len(batch) == 1 or width * len(batch) <= budget
        for batch, after in zip(batches, batches[1:], strict=False):
            # A batch ends only where the next request, never longer, no longer fits.
            width = max(lengths[i] for i in batch)
            assert width * (len(batch) + 1) > budget
            assert lengths[after[0]] <= lengths[batch[-1]]


def results_of_batches(dp: int, lengths: list[int]) -> tuple[list[int], list[int], list[Any]]:
    """Return the items that ran here, the results in order, and what was reported."""
    here: list[int] = []
    seen: list[Any] = []

    def run(batch: list[int]) -> torch.Tensor:
        here.extend(batch)
        return torch.tensor([10 * index for index in batch])

    found = map_batches(
        run,
        pack(lengths, 6),
        make_mesh(1, dp),
        work=lengths,
        already_done=5,
        on_progress=lambda *counts: seen.append(counts),
    )
    return here, [int(value) for value in in_order(found)], seen


@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[], [4], [3, 1, 2, 6, 5, 1, 1]])
def test_each_item_runs_once_and_all_ranks_have_all_results_in_order(dp, lengths):
    answers = run_ranks(dp, results_of_batches, dp, lengths)
    assert sorted(i for here, _, _ in answers for i in here) == list(range(len(lengths)))
    assert [found for _, found, _ in answers] == dp * [[10 * i for i in range(len(lengths))]]
    assert answers[0][2][-1] == (5 + sum(lengths), 5 + sum(lengths))
    assert all(seen == [] for _, _, seen in answers[1:])


def test_rows_are_padded_on_the_right_to_a_multiple():
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    assert pad_rows(rows).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert pad_rows(rows, value=-1, multiple=4).tolist() == [[1, 2, 3, -1], [4, -1, -1, -1]]


def test_collating_is_as_drawn():
    """Three requests, one unscored in the batch; `.` is padding, ^ the states that are needed.

    10 11 12 13 | 14    13 predicts 14          needs positions 3
    20 21 | 22 23       21, 22 predict 22, 23   needs positions 1, 2
    30 | 31             30 predicts 31          needs position 0
    """
    requests = [
        request(20, 21, 22, 23, scored=2),
        request(7, 7, 7, scored=1),
        request(10, 11, 12, 13, 14, scored=1),
        request(30, 31, scored=1),
    ]
    batch = ScoringBatch.of(requests, [2, 0, 3])
    assert batch.tokens.tolist() == [[10, 11, 12, 13], [20, 21, 22, 0], [30, 0, 0, 0]]
    assert batch.query_from == 0
    assert batch.rows.tolist() == [3, 4 + 1, 4 + 2, 8]
    assert batch.targets.tolist() == [14, 22, 23, 31]
    assert batch.indices == [2, 0, 3]


def test_collating_drops_the_states_that_nobody_needs():
    """Without the shortest request only the positions from 1 on are computed: three a line."""
    requests = [request(20, 21, 22, 23, scored=2), request(10, 11, 12, 13, 14, scored=1)]
    batch = ScoringBatch.of(requests, [1, 0])
    assert batch.query_from == 1
    assert batch.rows.tolist() == [2, 3 + 0, 3 + 1]
    assert batch.targets.tolist() == [14, 22, 23]


def test_neighbours_with_the_same_input_share_a_line():
    """10 11 12 predicts 13 or 14; the second 20 21 is no neighbour of the first."""
    requests = [
        request(20, 21, 22, scored=1),
        request(10, 11, 12, 13, scored=1),
        request(10, 11, 12, 14, scored=1),
        request(20, 21, 29, scored=2),
        request(10, 11, 12, 15, scored=2),
    ]
    assert riders(requests) == {2}
    lengths = [r.length for r in requests]
    assert pack(lengths, 3, riders(requests)) == [[1, 2], [4], [0], [3]]
    assert pack(lengths, 6, riders(requests)) == [[1, 2, 4], [0, 3]]
    batch = ScoringBatch.of(requests, [1, 2, 4, 0, 3])  # in a batch they may become neighbours
    assert batch.tokens.tolist() == [[10, 11, 12], [20, 21, 0]]
    assert batch.query_from == 0
    assert batch.rows.tolist() == [2, 2, 1, 2, 3 + 1, 3 + 0, 3 + 1]
    assert batch.targets.tolist() == [13, 14, 12, 15, 22, 21, 29]


def test_collating_reads_views_without_changing_them():
    tokens = torch.arange(10)
    requests = [Request(tokens[i : i + 5], 2) for i in range(4)]
    batch = ScoringBatch.of(requests, [0, 1, 2, 3])
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]
    assert batch.targets.tolist() == [3, 4, 4, 5, 5, 6, 6, 7]
    batch.tokens.zero_()
    assert tokens.tolist() == list(range(10))


def test_rows_of_any_batch_are_the_positions_before_the_targets():
    chance = random.Random(1)
    for _ in range(100):
        requests = []
        for _ in range(chance.randrange(1, 8)):
            length = chance.randrange(1, 12)
            tokens = torch.tensor([chance.randrange(1, 1000) for _ in range(length + 1)])
            requests.append(Request(tokens, chance.randrange(1, length + 1)))
        order = chance.sample(range(len(requests)), len(requests))
        batch = ScoringBatch.of(requests, order)
        # Let each state hold the token that stands there and its line: the rows must find it.
        lines = torch.arange(len(order)).unsqueeze(1).expand_as(batch.tokens) * 1000
        found = (lines + batch.tokens)[:, batch.query_from :].flatten()[batch.rows]
        before = [
            line * 1000 + requests[i].tokens[-requests[i].num_scored - 1 : -1]
            for line, i in enumerate(order)
        ]
        assert torch.equal(found, torch.cat(before))


def scores(logprobs: list[float], offsets: list[int], greedy: list[bool] | None = None) -> Scores:
    greedy = [True] * len(logprobs) if greedy is None else greedy
    return Scores(torch.tensor(logprobs), torch.tensor(greedy), torch.tensor(offsets), 1.0)


def test_sums_are_those_of_each_request_alone():
    """A big request before and broken ones beside leave a small sum exact to the last bit."""
    small = [-0.1, -0.7, -1e-7]
    nan, infinity = float("nan"), float("inf")
    several = scores([-3e37, *small, nan, *small, -infinity, *small], [0, 1, 4, 5, 8, 9, 9, 12])
    exact = -sum(torch.tensor(small).double().tolist())
    sums = several.nll_sums()
    assert sums.dtype == torch.float64
    assert sums[1].item() == sums[3].item() == sums[6].item() == exact
    assert sums[2].isnan() and sums[4].item() == infinity and sums[5].item() == 0


@pytest.mark.parametrize("requests", [3, 12_000])
def test_sums_do_not_depend_on_how_many_requests_there_are(requests):
    noise = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(requests * 2, generator=noise) * 10
    logprobs[0] = float("nan")
    many = Scores(logprobs, logprobs < 0, torch.arange(0, requests * 2 + 1, 2), 1.0)
    pairs = logprobs.double().view(-1, 2)
    sums = many.nll_sums()
    assert sums[0].isnan()
    assert torch.equal(sums[1:], -(pairs[1:, 0] + pairs[1:, 1]))


def test_a_request_is_greedy_when_all_of_its_tokens_are():
    several = scores([-1.0] * 6, [0, 2, 3, 3, 6], [True, False, True, True, True, True])
    assert several.all_greedy().tolist() == [False, True, True, True]


def test_no_requests_are_no_scores():
    none = Scores(torch.zeros(0), torch.zeros(0, dtype=torch.bool), torch.zeros(1).long(), 0.0)
    assert none.nll_sums().tolist() == [] and none.all_greedy().tolist() == []
