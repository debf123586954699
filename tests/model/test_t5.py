"""T5: what its decoder sees, buckets of distances, and the same outputs when it is cut.

Megatron's own outputs are in tests/engine/test_family_parity.py.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support import configs, random_models
from support.ranks import run_ranks
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.engine.engine import load_model
from mlm_eval.model.t5 import relative_buckets
from mlm_eval.ranks.groups import make_mesh

LEARNED = dataclasses.replace(
    configs.T5,
    position_embedding_type="learned_absolute",
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
)
KINDS: dict[str, ModelConfig] = {
    "relative": configs.T5,
    "learned": LEARNED,
    "rotary": dataclasses.replace(LEARNED, position_embedding_type="rope"),
    "no biases, untied": dataclasses.replace(
        configs.T5,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=False,
        activation="geglu_tanh",
        untie_embeddings_and_output_weights=True,
        softmax_scale=1.0,
        kv_channels=6,
        logit_multiplier=0.25,
    ),
}


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return an encoder's tokens and mask, one row padded, and a decoder's tokens."""
    noise = torch.Generator().manual_seed(3)
    encoder = torch.randint(config.vocab_size, (2, 16), generator=noise)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 11:] = 0
    mask[0, 4] = 0
    return encoder, mask, torch.randint(config.vocab_size, (2, 9), generator=noise)


def log_probs(tp: int) -> dict[str, Tensor]:
    """Return the log-probabilities of every entry, by kind, on `tp` ranks."""
    found = {}
    for name, config in KINDS.items():
        rank = make_mesh(tp, 1).tensor_parallel
        checkpoint = random_models.checkpoint(config)
        model = load_model(checkpoint, rank, device=torch.device("cpu"), dtype=torch.float32)
        with torch.inference_mode():
            found[name] = random_models.all_log_probs(model, model(*inputs(config)))
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    [found] = run_ranks(1, log_probs, 1)
    return found


@pytest.mark.process
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_compute_what_one_does(tp: int, whole: dict[str, Tensor]):
    first, *others = run_ranks(tp, log_probs, tp)
    for name, expected in whole.items():
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=2e-5, msg=name)
        assert all(torch.equal(other[name], first[name]) for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_or_later_changes_nothing(kind: str):
    config = KINDS[kind]
    model = random_models.on_one_rank(config)
    encoder, mask, tokens = inputs(config)
    before = model(encoder, mask, tokens)
    hidden = encoder.where(mask.bool(), (encoder + 7) % config.vocab_size)
    torch.testing.assert_close(model(hidden, mask, tokens), before)
    padded = torch.cat([tokens, tokens[:, :3]], dim=1)
    torch.testing.assert_close(model(encoder, mask, padded)[:, : tokens.shape[1]], before)
    # A seen token, and an earlier one, do change it.
    seen = encoder.clone()
    seen[:, 0] = (seen[:, 0] + 7) % config.vocab_size
    assert not torch.allclose(model(seen, mask, tokens), before)
    earlier = tokens.clone()
    earlier[:, 3] = (earlier[:, 3] + 7) % config.vocab_size
    changed = (model(encoder, mask, earlier) - before).abs().amax(dim=(0, 2)) > 1e-4
    assert changed.tolist() == [position >= 3 for position in range(tokens.shape[1])]


def test_padding_of_the_encoder_changes_nothing():
    config = configs.T5
    model = random_models.on_one_rank(config)
    encoder, mask, tokens = inputs(config)
    short = model(encoder[1:, :11], mask[1:, :11], tokens[1:])
    torch.testing.assert_close(model(encoder, mask, tokens)[1:], short)


def test_buckets_are_exact_for_near_keys_and_grow_for_far_ones():
    both = relative_buckets(1, 200, both_ways=True, buckets=32, furthest=128)[0]
    # Keys behind the query are in the upper half: 8 buckets of one distance, 8 of ranges.
    assert both[:9].tolist() == [0, *range(17, 25)] and both[-1] == 31
    assert both[127] == both[128] == 31 and both[7] < both[8] <= both[15] < both[127]
    ahead = relative_buckets(200, 200, both_ways=True, buckets=32, furthest=128)[-1].flip(0)
    assert torch.equal(ahead[1:] + 16, both[1:])
    left = relative_buckets(200, 200, both_ways=False, buckets=32, furthest=128)
    assert left.triu(1).sum() == 0  # what the decoder does not see
    assert left[-1].flip(0)[:17].tolist() == list(range(17))
    expected = [
        min(31, 16 + int(math.log(distance / 16) / math.log(8) * 16))
        for distance in (20, 40, 60, 100, 150)
    ]
    assert left[-1].flip(0)[[20, 40, 60, 100, 150]].tolist() == expected
