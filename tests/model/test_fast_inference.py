"""What inference mode computes another way on the CPU is what is computed without it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support import random_models

from mlm_eval.engine.products import float32_products
from mlm_eval.model.attention import Context, SelfAttention
from mlm_eval.model.layers import MLP, POST_OPS
from mlm_eval.model.tensor_parallel import SINGLE, linear

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows", [(0,), (1,), (2, 7), (3, 100)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_layer(dtype: torch.dtype, rows: tuple[int, ...], biased: bool) -> None:
    x, weight = noise(*rows, 30, dtype=dtype)[..., 5:25], noise(50, 20, dtype=dtype)
    bias = noise(50, dtype=dtype) if biased else None
    expected = F.linear(x, weight, bias)
    with torch.inference_mode(), float32_products():
        found = linear(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype], atol=5 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("activation", [*POST_OPS, "squared_relu", "swiglu", "geglu_tanh"])
def test_an_mlp(dtype: torch.dtype, activation: str) -> None:
    """With its activation in the product where oneDNN has it, and after it where not."""
    config = dataclasses.replace(random_models.GPT, activation=activation)
    mlp = MLP(config, SINGLE)
    for number, parameter in enumerate(mlp.parameters()):
        generator = torch.Generator().manual_seed(number)
        torch.nn.init.normal_(parameter, 0, 0.3, generator=generator)
    mlp.to(dtype).requires_grad_(False)
    x = noise(2, 9, config.hidden_size, dtype=dtype)
    expected = mlp(x)
    with torch.inference_mode(), float32_products():
        found = mlp(x)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * ROUNDING[dtype] * scale)


@pytest.mark.parametrize("window", [0, 4])
def test_attention_of_half_precision(window: int) -> None:
    """It is as near to float64 as without."""
    config = dataclasses.replace(
        random_models.LLAMA, window_size=window, window_layers=(0,) if window else ()
    )
    attention = SelfAttention(config, SINGLE, 0)
    query, key, value = (noise(2, 4, 16, 8, dtype=torch.bfloat16) for _ in range(3))
    context = Context(causal=True)
    exact = attention.attend(*(part.double() for part in (query, key, value)), context, 0)
    plain = attention.attend(query, key, value, context, 0)
    with torch.inference_mode(), float32_products():
        found = attention.attend(query, key, value, context, 0)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 1.5 * (plain - exact).abs().max()
