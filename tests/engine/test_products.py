"""Float32 products by another library: as exact, taken for as long as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


def test_torch_can_still_be_asked_for_its_precision() -> None:
    """A callback, a compiler or another thread may ask while products are computed."""
    before = asked()
    assert before[0] == "highest"
    with float32_products():
        assert asked()[0] in ("medium", "highest")
    assert asked() == before


def asked() -> tuple[str, bool, bool, str, str]:
    """Return what torch says of its precision, by all of its ways."""
    gpus = torch.backends.cuda.matmul
    return (
        torch.get_float32_matmul_precision(),
        gpus.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        gpus.fp32_precision,
        SETTINGS.fp32_precision,
    )


def test_where_torch_sees_a_gpu_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = asked()
    with float32_products():
        assert asked() == before


@pytest.mark.parametrize("precision", ["high", "medium", "highest"])
def test_what_a_caller_has_set_stays(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    try:
        before = asked()
        with float32_products():
            assert asked() == before
        assert asked() == before
    finally:
        put_back()


@pytest.mark.parametrize("settings", [SETTINGS, torch.backends.cuda.matmul])
def test_what_a_caller_has_set_for_one_library_stays(settings: Any) -> None:
    settings.fp32_precision = "ieee"
    try:
        with float32_products():
            assert settings.fp32_precision == "ieee"
    finally:
        put_back()


def put_back() -> None:
    """Give torch the settings that it begins with."""
    torch.set_float32_matmul_precision("highest")
    SETTINGS.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
