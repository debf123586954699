"""The engine: the same scores whatever the layout and the batches are, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import random_models
from support.ranks import run_ranks
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import evaluation_dtype, training_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Index, InMemory
from mlm_eval.checkpoints.parameters import parameters
from mlm_eval.checkpoints.vocabulary import with_rows
from mlm_eval.engine.engine import Engine, load_model
from mlm_eval.engine.score import Request, Scores
from mlm_eval.model.tensor_parallel import TensorParallel
from mlm_eval.ranks.groups import make_mesh

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]
MODELS = {
    "gpt": random_models.config(vocab_size=50),  # 13, 13, 13 and 11 rows on four ranks
    "llama": random_models.LLAMA,  # two groups: copied to four ranks
    # A rank of two has heads 0, 1, 2 of groups 0, 0, 1: every head gets its own key and value.
    "three groups": random_models.config(
        random_models.LLAMA, num_attention_heads=6, num_query_groups=3, ffn_hidden_size=48
    ),
}
POSITIONS = random_models.GPT.max_position_embeddings


def some_requests(count: int = 40, *, seed: int = 0, vocab: int = 50) -> list[Request]:
    """Return requests of all lengths, some of them windows of one tensor, in no order."""
    noise = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=noise))

    text = torch.randint(vocab, (200,), generator=noise)
    requests = []
    for _ in range(count):
        length = 1 + below(POSITIONS)
        start = below(200 - length)
        requests.append(Request(text[start : start + length + 1], 1 + below(length)))
    return requests


def one_by_one(config: ModelConfig, requests: list[Request], vocab: int) -> list[Tensor]:
    """Return each request's log-probabilities over `vocab` ids, from a forward of it alone."""
    model = load_model(
        random_models.checkpoint(config),
        TensorParallel(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    ).eval()
    expected = []
    with torch.no_grad():
        for request in requests:
            states = model(request.tokens[:-1].unsqueeze(0))[0]
            whole = (states @ model.output_layer.table.t())[:, :vocab].log_softmax(-1)
            scored = whole.gather(1, request.tokens[1:].unsqueeze(1)).squeeze(1)
            expected.append(scored[-request.num_scored :])
    return expected


def score_on_a_rank(
    config: ModelConfig, tp: int, dp: int, requests: list[Request], **settings: Any
) -> tuple[Scores, list[tuple[int, int]]]:
    progress: list[tuple[int, int]] = []
    engine = Engine.load(random_models.checkpoint(config), tp=tp, dp=dp, **settings)
    assert (engine.tp, engine.dp) == (tp, dp)
    scores = engine.score(requests, on_progress=lambda *seen: progress.append(seen))
    return scores, progress


def keywords(config: ModelConfig, tp: int, dp: int, requests: list[Request], settings: dict) -> Any:
    return score_on_a_rank(config, tp, dp, requests, **settings)


def score(
    config: ModelConfig, tp: int, dp: int, requests: list[Request], **settings: Any
) -> list[tuple[Scores, list[tuple[int, int]]]]:
    return run_ranks(tp * dp, keywords, config, tp, dp, requests, settings)


@pytest.mark.parametrize(
    ("name", "tp", "dp"),
    [
        (name, tp, dp)
        for name, config in MODELS.items()
        for tp, dp in LAYOUTS
        if config.num_attention_heads % tp == 0
    ],
)
def test_scores_do_not_depend_on_the_layout_or_the_batches(name, tp, dp):
    config = MODELS[name]
    requests = some_requests()
    expected = one_by_one(config, requests, config.vocab_size)
    sums = torch.stack([-values.double().sum() for values in expected])
    assert torch.cat(expected).std() > 0.5

    for batch_tokens in [1, 70, 100_000]:
        answers = score(config, tp, dp, requests, batch_tokens=batch_tokens)
        for scores, _ in answers:
            assert scores.offsets.diff().tolist() == [r.num_scored for r in requests]
            # In the order of the requests, every one of them once.
            torch.testing.assert_close(scores.logprobs, torch.cat(expected), rtol=0, atol=2e-5)
            torch.testing.assert_close(scores.nll_sums(), sums, rtol=1e-6, atol=1e-5)
            total, wanted = scores.nll_sums().sum().item(), sums.sum().item()
            assert abs(total - wanted) <= 1e-6 * wanted
        for scores, _ in answers[1:]:  # the very same on every rank
            assert torch.equal(scores.logprobs, answers[0][0].logprobs)
            assert torch.equal(scores.greedy, answers[0][0].greedy)


@pytest.mark.parametrize(("tp", "dp"), LAYOUTS)
def test_greedy_is_the_argmax(tp, dp):
    config = MODELS["gpt"]
    model = load_model(
        random_models.checkpoint(config),
        TensorParallel(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    requests = []
    for request in some_requests(20):
        with torch.no_grad():
            logits = model(request.tokens[:-1].unsqueeze(0))[0, -1] @ model.output_layer.table.t()
        best = request.tokens.clone()
        best[-1] = logits.argmax()
        requests += [Request(best, 1), Request(request.tokens, 1)]
    for scores, _ in score(config, tp, dp, requests):
        hits = scores.all_greedy().tolist()
        assert hits[::2] == [True] * 20
        pairs = zip(requests[::2], requests[1::2], strict=True)
        expected = [torch.equal(best.tokens, given.tokens) for best, given in pairs]
        assert hits[1::2] == expected and not all(expected)


@pytest.mark.parametrize("true_size", [37, 50])
@pytest.mark.parametrize(("name", "tp"), [("gpt", 1), ("gpt", 4), ("llama", 2), ("llama", 4)])
def test_the_true_vocabulary_leaves_the_padding_out_of_the_softmax(name, tp, true_size):
    """37 rows on four ranks: 10, 10, 10 and 7, other rows than those of the padded table."""
    config = MODELS[name]
    requests = some_requests(vocab=37)
    expected = torch.cat(one_by_one(config, requests, true_size))
    padded = torch.cat(one_by_one(config, requests, 50))
    assert true_size == 50 or (expected - padded).min() > 1e-3
    for scores, _ in score(config, tp, 1, requests, vocab="true", true_vocab_size=true_size):
        torch.testing.assert_close(scores.logprobs, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("tp", "dp"), LAYOUTS)
def test_bfloat16_is_close(tp, dp):
    config = MODELS["llama"]
    requests = some_requests()
    expected = torch.cat(one_by_one(config, requests, 50))
    for scores, _ in score(config, tp, dp, requests, dtype="bfloat16"):
        error = (scores.logprobs - expected).abs()
        assert scores.logprobs.dtype == torch.float32
        assert 1e-4 < error.mean() < 0.03 and error.max() < 0.25


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 2)])
def test_neighbours_that_differ_in_the_last_token_are_scored_as_if_alone(tp, dp):
    requests = []
    for request in some_requests(12):
        for last in (request.tokens[-1], 7, 7, 11):
            requests.append(Request(request.tokens.clone(), request.num_scored))
            requests[-1].tokens[-1] = last
    expected = torch.cat(one_by_one(MODELS["llama"], requests, 50))
    for scores, _ in score(MODELS["llama"], tp, dp, requests, batch_tokens=40):
        torch.testing.assert_close(scores.logprobs, expected, rtol=0, atol=2e-5)


def test_more_copies_of_the_model_than_requests():
    requests = some_requests(1)
    [expected] = one_by_one(MODELS["gpt"], requests, 50)
    for scores, _ in score(MODELS["gpt"], 1, 4, requests):
        torch.testing.assert_close(scores.logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 2)])
def test_no_requests_have_no_scores(tp, dp):
    for scores, progress in score(MODELS["gpt"], tp, dp, []):
        assert scores.logprobs.shape == (0,) and scores.offsets.tolist() == [0]
        assert all(seen == (0, 0) for seen in progress)


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)])
@pytest.mark.parametrize("batch_tokens", [5, 50])
def test_progress_goes_up_to_the_total_on_rank_0_only(tp, dp, batch_tokens):
    requests = some_requests()
    total = sum(request.tokens.numel() - 1 for request in requests)
    first, *others = score(MODELS["gpt"], tp, dp, requests, batch_tokens=batch_tokens)
    done = [seen for seen, _ in first[1]]
    assert {of for _, of in first[1]} == {total}
    assert len(done) > 3 and done == sorted(done) and done[-1] == total
    assert 0 < done[0] < total / 2
    assert all(progress == [] for _, progress in others)


# --- What is read -------------------------------------------------------------------------------


class Watched(InMemory):
    """A tensor that counts the elements that were read of it."""

    read_elements = 0

    def read(self, dim: int = 0, index: Index = None) -> Tensor:
        piece = super().read(dim, index)
        self.read_elements += piece.numel()
        return piece


@pytest.mark.parametrize("vocab", ["padded", "true"])
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_reads_its_own_slices_only(name, vocab):
    config = MODELS[name]
    weights = random_models.state_dict(config)
    tensors = {name: Watched(tensor) for name, tensor in weights.items()}
    checkpoint = dataclasses.replace(random_models.checkpoint(config), tensors=tensors)
    if vocab == "true":
        checkpoint = with_rows(checkpoint, 41)
    for rank in range(2):
        for tensor in tensors.values():
            tensor.read_elements = 0
        model = load_model(
            checkpoint,
            TensorParallel(rank, 2),
            device=torch.device("cpu"),
            dtype=torch.float16,
        )
        found = dict(model.named_parameters())
        assert set(found) == set(tensors) == set(parameters(config))
        for parameter, tensor in tensors.items():
            assert tensor.read_elements == found[parameter].numel(), parameter
            assert found[parameter].dtype == torch.float16
    rows = 41 if vocab == "true" else 50
    assert found["embedding.word_embeddings.weight"].shape[0] == rows - -(-rows // 2)
    halves = [p for p, t in tensors.items() if found[p].numel() < t.numel]
    assert len(halves) > len(tensors) / 3


def test_the_weights_are_the_engines_own():
    """No parameter may alias the mapped file, even where dtype and layout are already right."""
    checkpoint = random_models.checkpoint(MODELS["gpt"])
    engine = Engine.load(checkpoint)
    for name, parameter in engine.model.named_parameters():
        lazy = checkpoint.tensors[name]
        assert isinstance(lazy, InMemory)
        assert parameter.data_ptr() != lazy.tensor.data_ptr(), name
        assert torch.equal(parameter, lazy.tensor) and not parameter.requires_grad


# --- What is refused ----------------------------------------------------------------------------


def request(*tokens: int, scored: int = 1) -> Request:
    return Request(torch.tensor(tokens, dtype=torch.int64), scored)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(3), r"sequence 1 has 1 token\(s\) of which 1 are to be scored; at least one"),
        (request(3, 4, scored=2), r"sequence 1 has 2 token\(s\) of which 2 are to be scored"),
        (request(3, 4, scored=0), r"sequence 1 has 2 token\(s\) of which 0 are to be scored"),
        (request(), r"sequence 1 has 0 token\(s\)"),
        (
            request(*range(18)),
            r"sequence 1 has 18 tokens, the model takes at most 17; cut it, or score it by windows",
        ),
        (request(3, 50), "token id 50 is outside the model's vocabulary of 50 rows"),
        (request(-1, 3), "token id -1 is outside the model's vocabulary of 50 rows"),
    ],
)
def test_requests_that_the_model_cannot_run_are_refused(bad, message):
    engine = Engine.load(random_models.checkpoint(MODELS["gpt"]))
    with pytest.raises(InputError, match=message):
        engine.score([request(1, 2), bad])


def test_the_longest_request_has_one_token_more_than_positions():
    longest = request(*range(POSITIONS + 1), scored=POSITIONS)
    [expected] = one_by_one(MODELS["gpt"], [longest], 50)
    scores = Engine.load(random_models.checkpoint(MODELS["gpt"])).score([longest])
    torch.testing.assert_close(scores.logprobs, expected, rtol=0, atol=1e-5)


def test_an_id_of_the_padding_is_outside_the_true_vocabulary():
    engine = Engine.load(random_models.checkpoint(MODELS["gpt"]), vocab="true", true_vocab_size=37)
    assert engine.vocab_size == 37
    with pytest.raises(InputError, match="token id 37 is outside the model's vocabulary of 37"):
        engine.score([request(36, 37)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 3}, "tp 3 x dp 1 needs 3 ranks, 1 are running"),
        ({"dp": 2}, "needs 2 ranks, 1 are running"),
        ({"tp": 0}, "tp 0 x dp 1"),
        ({"dp": -1}, "tp 1 x dp -1"),
        ({"dtype": "float64"}, "--dtype 'float64' is unknown; use auto, float32"),
        ({"vocab": "all"}, "--vocab 'all' is unknown; use padded or true"),
        ({"vocab": "true"}, "--vocab true needs the tokenizer's size"),
        (
            {"vocab": "true", "true_vocab_size": 51},
            "the tokenizer has 51 entries but the model has 50 rows",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Engine.load(random_models.checkpoint(MODELS["gpt"]), **settings)


def test_a_tp_that_does_not_divide_the_heads_is_refused_on_every_rank():
    with pytest.raises(InputError, match=r"tp=3.*4 attention heads.*allows tp in 1, 2, 4"):
        score(MODELS["gpt"], 3, 1, [])


def test_a_bert_scores_no_continuations():
    engine = Engine.load(random_models.checkpoint(random_models.BERT))
    with pytest.raises(InputError, match="BERT checkpoint"):
        engine.score([request(1, 2)])


def mesh_on_a_rank(tp: int | None, dp: int | None) -> tuple[int, int, int, int]:
    mesh = make_mesh(tp, dp)
    return mesh.tp, mesh.dp, mesh.tp_rank, mesh.dp_rank


@pytest.mark.parametrize(
    ("tp", "dp", "expected"),
    [
        (2, 2, [(2, 2, 0, 0), (2, 2, 1, 0), (2, 2, 0, 1), (2, 2, 1, 1)]),
        (None, 2, [(2, 2, 0, 0), (2, 2, 1, 0), (2, 2, 0, 1), (2, 2, 1, 1)]),
        (1, None, [(1, 4, 0, rank) for rank in range(4)]),
        (None, None, [(4, 1, rank, 0) for rank in range(4)]),
    ],
)
def test_tensor_parallel_ranks_are_neighbours(tp, dp, expected):
    assert run_ranks(4, mesh_on_a_rank, tp, dp) == expected


@pytest.mark.parametrize(("tp", "dp"), [(3, None), (None, 3), (2, 1), (None, 8)])
def test_sizes_that_do_not_fill_the_ranks_are_refused(tp, dp):
    with pytest.raises(InputError, match="ranks, 4 are running"):
        run_ranks(4, mesh_on_a_rank, tp, dp)


def test_auto_is_the_checkpoints_dtype_on_a_gpu_and_float32_on_the_cpu():
    for stored in ("float16", "bfloat16", "float32"):
        assert evaluation_dtype("auto", stored, "cpu") == torch.float32
        assert str(evaluation_dtype("auto", stored, "cuda")) == f"torch.{stored}"
    assert evaluation_dtype("auto", "float64", "cuda") == torch.float32
    assert evaluation_dtype("bfloat16", "float32", "cpu") == torch.bfloat16
    assert evaluation_dtype(torch.float16, "float32", "cpu") == torch.float16


def test_auto_is_bfloat16_on_a_gpu_in_training():
    assert training_dtype("auto", "cuda") == "bfloat16"
    assert training_dtype("auto", "cpu") == "float32"
    assert training_dtype("float16", "cpu") == "float16"


# --- Counted work -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_flops_are_those_that_torch_counts(name):
    """Against torch, which counts matrix products: attention must be made of them for that."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    engine = Engine.load(random_models.checkpoint(MODELS[name]), batch_tokens=1)
    requests = some_requests(6)

    def of_linear(x: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
        return 2 * math.prod(x) * weight[0]

    engine.score(requests)  # the first time it looks at the processor's products
    unknown = {torch.ops.mkldnn._linear_pointwise: of_linear}
    counting = FlopCounterMode(display=False, custom_mapping=unknown)
    with counting as counter, sdpa_kernel(SDPBackend.MATH):
        engine.score(requests)
    assert engine.flops(requests) == counter.get_total_flops()


def test_what_an_engine_says_of_itself():
    checkpoint: Checkpoint = random_models.checkpoint(MODELS["gpt"])
    engine = Engine.load(checkpoint, dtype="bfloat16", batch_tokens=7)
    assert engine.is_main and engine.checkpoint is checkpoint and engine.load_seconds > 0
    assert engine.describe() == {
        "vocab": "padded",
        "vocab_size": 50,
        "dtype": "bfloat16",
        "device": "cpu",
        "tp": 1,
        "dp": 1,
        "batch_tokens": 7,
    }
