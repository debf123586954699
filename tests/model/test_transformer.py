"""The parts of the models: rotary tables, norms, activations, heads, and rows that are left out.

Against other people's code where there is some, or against the formula; whole models are compared
with transformers in test_models.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from support import random_models
from support.random_models import all_log_probs, bert_inputs, on_one_rank
from support.rounding import assert_same_but_for_rounding
from torch import nn
from torch.nn import functional as F

from mlm_eval.checkpoints.config import ModelConfig, RopeScaling
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.model import attention
from mlm_eval.model.attention import alibi_bias, alibi_slopes, rotary_tables, rotate
from mlm_eval.model.dropout import Dropout, sample_keys
from mlm_eval.model.layers import Activation, Norm, activate

POSITIONS, VOCAB = random_models.GPT.max_position_embeddings, random_models.GPT.vocab_size
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED = RopeScaling(**LLAMA3, original_max_position=32)


def gpt(**changes: Any) -> ModelConfig:
    return random_models.config(random_models.GPT, **changes)


def llama(**changes: Any) -> ModelConfig:
    return random_models.config(random_models.LLAMA, **{"layernorm_epsilon": 1e-6, **changes})


VARIANTS = {
    "gpt": gpt(),
    "gpt, residual after the norm": gpt(apply_residual_connection_post_layernorm=True),
    "llama": llama(),
    "llama, partial and interleaved": llama(rotary_percent=0.5, rotary_interleaved=True),
    "llama, norms of queries and keys": llama(qk_layernorm=True),
    "ALiBi and a norm of embeddings": gpt(
        position_embedding_type="alibi", embedding_layernorm=True
    ),
    "parallel residual": gpt(parallel_residual=True),
    "positions of both kinds": gpt(position_embedding_type="learned_absolute+rope"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("query_from", [1, 7, POSITIONS - 1])
def test_the_last_layer_can_compute_the_last_rows_only(variant, query_from):
    config = VARIANTS[variant]
    model = on_one_rank(config, random_models.state_dict(config))
    tokens = torch.randint(VOCAB, (3, POSITIONS), generator=torch.Generator().manual_seed(4))
    whole = model(tokens)
    assert whole.shape == (3, POSITIONS, config.hidden_size)
    trimmed = model(tokens, query_from)
    assert_same_but_for_rounding(trimmed, whole[:, query_from:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_position_sees_a_later_one(variant):
    config = VARIANTS[variant]
    model = on_one_rank(config, random_models.state_dict(config))
    tokens = torch.randint(VOCAB, (1, POSITIONS), generator=torch.Generator().manual_seed(5))
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    assert_same_but_for_rounding(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax(dim=(0, 2)).min() > 1e-2
    # A shorter input is the same as one padded on the right.
    assert_same_but_for_rounding(model(tokens[:, :10]), before[:, :10])


def test_rotary_tables_are_those_of_transformers():
    from transformers.models.llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    length = 64
    base = {"num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": length}
    for theirs, changes in [
        ({"rope_type": "default"}, {}),
        ({"rope_type": "linear", "factor": 2.5}, {"rotary_seq_len_interpolation_factor": 2.5}),
        (
            {"rope_type": "llama3", "original_max_position_embeddings": 32, **LLAMA3},
            {"rope_scaling": SCALED},
        ),
    ]:
        rope = {"rope_theta": 20000.0, **theirs}
        embedding = LlamaRotaryEmbedding(LlamaConfig(**base, rope_parameters=rope))
        expected = embedding(torch.zeros(1), torch.arange(length).unsqueeze(0))
        actual = rotary_tables(
            llama(kv_channels=16, rotary_base=20000.0, **changes), length, torch.device("cpu")
        )
        for table, wanted in zip(actual, expected, strict=True):
            # The angles go up to 64, and a frequency is known to an ulp.
            assert_same_but_for_rounding(table, wanted[0], ulp=2 * length)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 20])
def test_alibi_is_that_of_transformers(heads):
    """But for a number for each query, which the softmax does not see."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    config = gpt(num_attention_heads=heads, position_embedding_type="alibi")
    theirs = build_alibi_tensor(torch.ones(1, 9), heads, torch.float32)  # [heads, 1, keys]
    slopes = alibi_slopes(heads)
    assert slopes == pytest.approx(theirs[:, 0, 1].tolist(), rel=1e-6)
    ours = alibi_bias(config, range(heads), torch.arange(9)[None], 9)[0]
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    gap = (ours - theirs).masked_fill(~seen, 0.0)
    first = gap[:, :, :1]  # what each query has more of, the same for all of its keys
    assert_same_but_for_rounding(gap, first.expand_as(gap).masked_fill(~seen, 0.0))
    assert (ours == -torch.inf).equal((~seen).expand_as(ours))


def test_slopes_of_alibi_are_the_papers():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6) == pytest.approx([0.25, 0.0625, 2**-6, 2**-8, 0.5, 0.125])


@pytest.mark.parametrize("variant", ["gpt", "ALiBi and a norm of embeddings", "parallel residual"])
def test_dropout_that_drops_nothing_changes_nothing(variant):
    config = VARIANTS[variant]
    model = on_one_rank(config, random_models.state_dict(config))
    tokens = torch.randint(VOCAB, (2, POSITIONS), generator=torch.Generator().manual_seed(6))
    dropout = Dropout(sample_keys(1, 0, torch.arange(2)), 1e-9, 1e-9)
    assert_same_but_for_rounding(model(tokens, 0, dropout), model(tokens), ulp=64)


@pytest.mark.parametrize(
    "changes",
    [
        {"window_size": 3, "window_layers": (0,)},
        {"softmax_type": "off-by-one"},
        {"family": "bert"},
    ],
)
def test_alibi_goes_with_plain_causal_attention_only(changes):
    with pytest.raises(InputError, match="position_embedding_type alibi goes with plain causal"):
        gpt(position_embedding_type="alibi", **changes)
    with pytest.raises(InputError, match="parallel_residual and apply_residual"):
        gpt(parallel_residual=True, apply_residual_connection_post_layernorm=True)


def test_llama3_scaling_reaches_all_three_of_its_ranges():
    """The pair above has frequencies that are kept, blended and divided, so that each is shown."""
    plain = llama(kv_channels=16, rotary_base=20000.0)
    scaled = dataclasses.replace(plain, rope_scaling=SCALED)
    exponents = torch.arange(0, 16, 2) / 16
    wavelengths = 2 * math.pi * 20000.0**exponents
    low, high = 32 / 1.0, 32 / 4.0
    ranges = [(wavelengths < high).sum(), (wavelengths > low).sum()]
    assert ranges[0] >= 1 and ranges[1] >= 1 and sum(ranges) < len(wavelengths)
    angle = [torch.acos(rotary_tables(c, 2, torch.device("cpu"))[0][1]) for c in (plain, scaled)]
    ratio = (angle[0] / angle[1])[: len(wavelengths)]
    kept, divided = wavelengths < high, wavelengths > low
    torch.testing.assert_close(ratio[kept], torch.ones(int(kept.sum())), rtol=1e-3, atol=0)
    torch.testing.assert_close(ratio[divided][:1], torch.full((1,), 8.0), rtol=1e-2, atol=0)
    assert 1 < ratio[~kept & ~divided].min() and ratio[~kept & ~divided].max() < 8


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [1.0, 0.5, 0.25])
def test_rotation_turns_each_pair_by_its_angle(interleaved, percent):
    """Each pair of channels is a complex number times e^(i position / base^(2j/d)).

    Which channels make a pair: docs/megatron.md, "Norms and rotary positions".
    """
    config = llama(kv_channels=16, rotary_percent=percent, rotary_interleaved=interleaved)
    x = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(6))  # [B, heads, T, d]
    cos, sin = rotary_tables(config, 12, torch.device("cpu"))
    actual = rotate(x, cos, sin, interleaved=interleaved)

    rotated = int(16 * percent)
    order = torch.arange(rotated)
    if not interleaved:  # pairs (i, i + d/2)
        order = order.view(2, -1).t().flatten()
    pairs = torch.view_as_complex(x[..., order].double().unflatten(-1, (-1, 2)).contiguous())
    speed = 10000.0 ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    angles = torch.arange(12, dtype=torch.float64).unsqueeze(1) * speed
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    expected = x.clone()
    expected[..., order] = turned.float()
    assert_same_but_for_rounding(actual, expected, ulp=4 * 12)  # angles up to 12


def test_interleaved_rotation_is_gpt_js():
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    config = llama(kv_channels=8, rotary_interleaved=True)
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(7))
    cos, sin = rotary_tables(config, 5, torch.device("cpu"))
    half = [table[:, ::2].unsqueeze(0).expand(2, -1, -1) for table in (sin, cos)]
    expected = apply_rotary_pos_emb(x.transpose(1, 2), *half).transpose(1, 2)
    actual = rotate(x, cos, sin, interleaved=True)
    assert_same_but_for_rounding(actual, expected)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norms_are_torchs(kind, centred):
    config = gpt(normalization=kind, layernorm_zero_centered_gamma=centred, layernorm_epsilon=1e-3)
    noise = torch.Generator().manual_seed(8)
    norm = Norm(config, 32, bias=kind == "LayerNorm")
    gain, bias, x = (torch.randn(32, generator=noise) for _ in range(3))
    with torch.no_grad():
        norm.weight.copy_(gain)
        if norm.bias is not None:
            norm.bias.copy_(bias)
    x = x.expand(4, 32) * torch.tensor([1e-3, 0.1, 1.0, 100.0]).unsqueeze(1)  # epsilon counts
    stored = gain + 1 if centred else gain
    if kind == "LayerNorm":
        expected = nn.functional.layer_norm(x, (32,), stored, bias, 1e-3)
    else:
        expected = nn.functional.rms_norm(x, (32,), stored, 1e-3)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)


def test_rms_statistics_are_float32_whatever_the_states_are():
    norm = Norm(llama(), 32, bias=False).to(torch.float16)
    nn.init.ones_(norm.weight)
    x = torch.full((1, 32), 300.0, dtype=torch.float16)  # its square is beyond float16
    torch.testing.assert_close(norm(x), torch.ones(1, 32, dtype=torch.float16), rtol=0, atol=1e-3)


def test_activations_are_their_formulas():
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    erf = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    tanh = x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    assert (erf - tanh).abs().max() > 1e-4  # they can be told apart
    for kind, expected in [("gelu", erf), ("gelu_tanh", tanh), ("squared_relu", x.clamp(0) ** 2)]:
        torch.testing.assert_close(activate(x, kind), expected, rtol=0, atol=1e-12)
    gate, up = x, x.flip(0) + 1
    expected = gate / (1 + torch.exp(-gate)) * up
    config = dataclasses.replace(random_models.BERT, activation="swiglu")
    actual = Activation(config)(torch.cat([gate, up]))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_megatrons_head_keeps_its_gelu_when_the_mlp_has_the_other():
    """BERT's LM head is erf even where the MLP is fused tanh (docs/megatron.md, "GELU")."""
    weights = random_models.state_dict(random_models.BERT)
    tokens, mask, types = bert_inputs()
    by_head = {}
    for head in ("gelu", "gelu_tanh"):
        config = random_models.config(
            random_models.BERT, activation="gelu_tanh", head_activation=head
        )
        model = on_one_rank(config, weights)
        states = model(tokens, mask, types)
        by_head[head] = all_log_probs(model, states)
    difference = (by_head["gelu"] - by_head["gelu_tanh"]).abs().max()
    assert 1e-4 < difference < 1e-1


def test_heads_of_fine_tuned_models_read_the_pooled_state():
    config = random_models.config(
        random_models.BERT, lm_head=False, binary_head=False, num_classes=3, multichoice_head=True
    )
    weights = random_models.state_dict(config)
    model = on_one_rank(config, weights)
    tokens, mask, types = bert_inputs()
    states = model(tokens, mask, types)
    pooled = torch.tanh(
        states[:, 0] @ weights["pooler.dense.weight"].t() + weights["pooler.dense.bias"]
    )
    heads = model.head_logits(states)
    assert set(heads) == {"classification_head", "multichoice_head"}
    for name, logits in heads.items():
        expected = pooled @ weights[f"{name}.weight"].t() + weights[f"{name}.bias"]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


KINDS_OF_MASKS = ["whole", "causal", "padded", "causal and padded"]


class Attending:
    """Inputs of an attention of three texts, and what it gives with its gradients."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        *self.inputs, self.grad = (torch.randn(3, 2, 60, 12) for _ in range(4))
        self.mask = None
        if "padded" in kind:
            self.mask = torch.arange(60) < torch.tensor([60, 41, 7])[:, None, None, None]
        self.causal, self.scale = kind == "causal", 0.3
        if kind == "causal and padded":
            self.mask = self.mask & torch.ones(60, 60, dtype=torch.bool).tril()

    def gradients(self, attend: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in self.inputs]
        out = attend(*inputs)
        return [out, *torch.autograd.grad(out, inputs, self.grad.to(dtype))]

    def plain(self, *inputs: torch.Tensor) -> torch.Tensor:
        return attention._PlainAttention.apply(*inputs, self.mask, self.causal, self.scale)

    def sdpa(self, *inputs: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            *inputs, attn_mask=self.mask, is_causal=self.causal, scale=self.scale
        )


@pytest.mark.parametrize("kind", KINDS_OF_MASKS)
def test_attention_of_training_is_sdpa_and_what_cancels_is_small(kind):
    """All queries' shares of a key's bias cancel: what is left of its gradient is rounding."""
    attending = Attending(kind)
    exact = attending.gradients(attending.sdpa, torch.float64)
    ours = attending.gradients(attending.plain, torch.float32)
    for mine, wanted in zip(ours, exact, strict=True):
        assert_same_but_for_rounding(mine, wanted.float())
    # A key's bias adds one vector to all keys: by each query, the softmax's gradient sums to 0.
    bias = ours[2].sum(dim=2)
    assert bias.abs().max() < 1e-5 * ours[2].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS_OF_MASKS)
def test_attention_of_half_precision_trains_in_float32_and_is_rounded_once(
    kind, dtype, monkeypatch
):
    attending = Attending(kind)
    attending.inputs = [x.to(dtype) for x in attending.inputs]
    attending.grad = attending.grad.to(dtype)
    wanted = [x.to(dtype) for x in attending.gradients(attending.plain, torch.float32)]
    for texts in (1, 2, 3):  # at a time
        monkeypatch.setattr(attention, "TEXT_SCORE_ELEMENTS", texts * 2 * 60 * 60)
        with torch.autocast("cpu", dtype):
            ours = attending.gradients(attending.plain, dtype)
        for mine, expected in zip(ours, wanted, strict=True):
            # Products of other numbers of texts may add in another order.
            torch.testing.assert_close(mine, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("amx", [False, True], ids=["no AMX", "AMX"])
def test_half_precision_trains_by_plain_attention_where_sdpa_multiplies_it_slowly(amx, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *x, **y: calls.append(1) or sdpa(*x, **y)
    )
    config = random_models.config(random_models.BERT)
    model = on_one_rank(config, random_models.state_dict(config)).requires_grad_()
    for dtype, steps in ((torch.float32, 0), (torch.bfloat16, config.num_layers if amx else 0)):
        calls.clear()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(*bert_inputs())
        assert len(calls) == steps, dtype
