"""Float32 products by another library: as exact, taken for as long as they are needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mlm_eval.engine import products
from mlm_eval.engine.products import float32_products, product_error

SETTINGS = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Forget what was measured, and what a test has made of it."""
    products._onednn_is_exact.cache_clear()
    yield
    products._onednn_is_exact.cache_clear()


@pytest.mark.parametrize("shape", [(1, 32, 768), (1, 700, 64), (12, 100, 64), (3, 17, 1000)])
def test_products_keep_float32(shape: tuple[int, int, int]) -> None:
    with float32_products():
        assert product_error(*shape) < 2e-6


def test_the_setting_is_put_back() -> None:
    with float32_products(), float32_products():
        inside = SETTINGS.fp32_precision
    assert inside in ("bf16", "none")
    assert SETTINGS.fp32_precision == "none"
    with pytest.raises(KeyError), float32_products():
        raise KeyError
    assert SETTINGS.fp32_precision == "none"


def test_a_processor_that_rounds_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products are those of factors rounded to bfloat16."""
    plain = torch.Tensor.__matmul__

    def rounding(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if first.dtype == torch.float32 and SETTINGS.fp32_precision == "bf16":
            first, second = first.bfloat16().float(), second.bfloat16().float()
        return plain(first, second)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    with float32_products():
        assert SETTINGS.fp32_precision == "none"


def test_what_a_caller_has_set_stays() -> None:
    SETTINGS.fp32_precision = "ieee"
    try:
        with float32_products():
            assert SETTINGS.fp32_precision == "ieee"
    finally:
        SETTINGS.fp32_precision = "none"
