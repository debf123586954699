"""Half precision: what is a sum or a difference of large numbers is computed in float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import random_models
from torch import Tensor, nn

from mlm_eval.model.attention import SelfAttention
from mlm_eval.model.bert import BERT
from mlm_eval.model.dropout import Dropout, sample_keys
from mlm_eval.model.layers import Norm
from mlm_eval.model.tensor_parallel import SINGLE, float32_product

HALF = [torch.bfloat16, torch.float16]
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit in the last place, relative: what rounding once may cost."""


# --- logits over the vocabulary ---


def shifted(dtype: torch.dtype, offset: float, rows: int = 200) -> tuple[Tensor, Tensor]:
    """Return states and a table whose logits are noise about a common offset."""
    noise = torch.Generator().manual_seed(3)
    states = torch.randn(rows, 64, generator=noise)
    table = torch.randn(1000, 64, generator=noise) * 0.1
    states[:, 0], table[:, 0] = 8.0, offset / 8.0
    return states.to(dtype), table.to(dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("offset", [0.0, -35.0, -100.0])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_far_from_zero_are_not_rounded(dtype: torch.dtype, offset: float, biased: bool):
    """GPT-2's logits lie around -100, where bfloat16's are half a nat apart."""
    states, table = shifted(dtype, offset)
    bias = torch.linspace(-1, 1, len(table)).to(dtype) if biased else None
    logits = states.double() @ table.double().t()
    exact = (logits if bias is None else logits + bias.double()).log_softmax(-1)
    head = random_models.vocab_head(table, bias)
    targets = torch.arange(len(states)) % len(table)
    found, _ = head.log_probs(states, targets)
    assert found.dtype == torch.float32
    # float32 products of numbers around 100 are right to 1e-4; rounded logits miss by up to 0.25.
    expected = exact.gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    best, first = exact.topk(2).values.T
    clear = best - first > 1e-3
    assert clear.sum() > 190
    _, greedy = head.log_probs(states, exact.argmax(-1))
    assert greedy[clear].all()
    assert torch.equal(head.argmax(states)[0][clear], exact.argmax(-1)[clear])
    torch.testing.assert_close(
        head.logits(states).log_softmax(-1).double(), exact, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("chunk", [None, 3000], ids=["whole", "chunks"])
def test_losses_under_autocast_see_exact_logits(
    dtype: torch.dtype, chunk: int | None, monkeypatch: pytest.MonkeyPatch
):
    """Weights in float32, products in half: only the operands are rounded."""
    if chunk is not None:
        monkeypatch.setattr("mlm_eval.model.tensor_parallel.LOGIT_CHUNK_ELEMENTS", chunk)
    states, table = (x.float() for x in shifted(torch.float32, -100.0, rows=10))
    targets = torch.arange(10)
    inputs = states.clone().requires_grad_()
    head = random_models.vocab_head(table, None)
    head.table.requires_grad_()
    with torch.autocast("cpu", dtype):
        losses, _ = head.losses(inputs, targets)
        (losses.sum() * 1024).backward()  # as a loss scale would, or float16's would vanish
    wide, wide_table = (x.to(dtype).double().requires_grad_() for x in (states, table))
    expected = nn.functional.cross_entropy(wide @ wide_table.t(), targets, reduction="none")
    (expected.sum() * 1024).backward()
    torch.testing.assert_close(losses.double(), expected, rtol=0, atol=1e-3)
    for actual, reference in ((inputs.grad, wide.grad), (head.table.grad, wide_table.grad)):
        assert actual is not None and reference is not None
        assert actual.dtype == torch.float32
        # Not the column of the offset: its gradient is a sum of large numbers that comes to 0.
        difference = (actual.double() - reference)[:, 1:]
        error = difference.norm() / reference[:, 1:].norm()
        assert error < 4 * ULP[dtype]  # the gradient of the logits, and the products' own rounding


@pytest.mark.parametrize("dtype", HALF)
def test_a_wide_product_does_not_depend_on_its_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    states, table = shifted(dtype, -35.0)
    exact = states.double() @ table.double().t()
    for block in (1, 64 * 7, 1 << 20):
        monkeypatch.setattr("mlm_eval.model.tensor_parallel.PRODUCT_BLOCK_ELEMENTS", block)
        found = float32_product(states, table, None)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    assert float32_product(states, table[:0], None).shape == (len(states), 0)


def test_a_wide_product_on_other_devices_asks_for_float32():
    """As for a GPU: one product of the half-precision operands, no copy of them in float32."""
    x, weight = (torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in (3, 5))
    out = float32_product(x, weight, None)
    assert out.dtype == torch.float32 and out.shape == (3, 5)


# --- heads ---

CONFIG = dataclasses.replace(
    random_models.BERT,
    num_classes=3,
    multichoice_head=True,
    qa_head=True,
    pooler=True,
    binary_head=True,
)


def heads(model: BERT, states: Tensor) -> dict[str, Tensor]:
    """Return all that BERT's heads make of the same states."""
    return {
        **model.head_logits(states),
        "qa_head": model.qa_logits(states),
        "pooler": model.pooler(states),
        "lm_head": model.lm_head(states),
    }


@pytest.mark.parametrize("dtype", HALF)
def test_heads_under_autocast_are_those_of_float32(dtype: torch.dtype):
    model = random_models.on_one_rank(CONFIG)
    states = torch.randn(4, 6, CONFIG.hidden_size, generator=torch.Generator().manual_seed(5))
    expected = heads(model, states)
    with torch.autocast("cpu", dtype):
        found = heads(model, states)
    for name, values in expected.items():
        assert found[name].dtype == torch.float32, name
        torch.testing.assert_close(found[name], values, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_heads_of_a_half_precision_model_are_computed_in_float32(dtype: torch.dtype):
    model = random_models.on_one_rank(CONFIG).to(dtype)
    states = torch.randn(4, 6, CONFIG.hidden_size).to(dtype)
    found = heads(model, states)
    expected = heads(model.float(), states.float())  # the same, already rounded, weights
    for name, values in expected.items():
        assert found[name].dtype == torch.float32, name
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5)


# --- norms ---


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_rounds_once(dtype: torch.dtype, kind: str, centred: bool):
    config = dataclasses.replace(
        random_models.GPT, normalization=kind, layernorm_zero_centered_gamma=centred
    )
    noise = torch.Generator().manual_seed(7)
    layer = Norm(config, 512, bias=kind == "LayerNorm")
    with torch.no_grad():
        layer.weight.copy_(torch.randn(512, generator=noise) * 0.05 + (not centred))
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(512, generator=noise) * 0.1)
    layer = layer.to(dtype)
    x = (torch.randn(64, 512, generator=noise) * 3).to(dtype)
    gain = layer.weight.double() + (1 if centred else 0)
    epsilon = config.layernorm_epsilon
    if kind == "LayerNorm":
        assert layer.bias is not None
        exact = nn.functional.layer_norm(x.double(), (512,), gain, layer.bias.double(), epsilon)
    else:
        exact = nn.functional.rms_norm(x.double(), (512,), gain, epsilon)
    found = layer(x)
    assert found.dtype == dtype
    # A value may lie half a unit from the exact one, and a hair more where float32 decides.
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * ULP[dtype], atol=1e-5)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_of_mixed_dtypes_keeps_the_wider(kind: str, centred: bool):
    config = dataclasses.replace(
        random_models.GPT, normalization=kind, layernorm_zero_centered_gamma=centred
    )
    layer = Norm(config, 32, bias=kind == "LayerNorm")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(32) * 0.1)
    x = torch.randn(4, 32)
    expected = layer(x.bfloat16().float())
    assert torch.equal(layer(x.bfloat16()), expected)
    assert layer.bfloat16()(x).dtype == torch.float32


# --- attention with dropout ---


@pytest.mark.parametrize("value", [50.0, 200.0])
def test_attention_scores_beyond_float16_do_not_overflow(value: float):
    """The products of queries and keys may; scaled queries, as everywhere, keep scores finite."""
    config = random_models.config(random_models.GPT, hidden_size=128, kv_channels=32)
    attention = SelfAttention(config, SINGLE, 0)
    query = torch.full((1, 4, 3, 32), value, dtype=torch.float16)
    key = query * torch.tensor([1.0, -1.0, 0.5], dtype=torch.float16).view(1, 1, 3, 1) * 50 / value
    assert (query.float() @ key.float().transpose(-1, -2)).amax() > 65_504
    values = torch.randn(1, 4, 3, 32).half()
    dropout = Dropout(sample_keys(1, 1, torch.arange(1)), 0.0, 1e-6)
    found = attention._by_steps(query, key, values, None, True, dropout)
    expected = nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), values.float(), is_causal=True
    )
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
