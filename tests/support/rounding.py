"""How far two ways to the same number may be apart: by rounding, and by nothing else.

A kernel for another processor, another number of threads, another batch or layout adds the same
products in another order. A tolerance is therefore a number of units in the last place (ulp) of
the largest number, which says nothing of one machine. Sums of N(0, 1) products over the small
models of the tests are within a few ulp; what is wrong is off by 1e-2 and more.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_same_but_for_rounding(actual: Tensor, expected: Tensor, *, ulp: int = 32) -> None:
    """Compare element by element within `ulp` units in the last place of the largest element.

    Of at least 1.0: a log-probability near zero is the difference of logits that are not.
    """
    largest = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    allowed = ulp * torch.finfo(expected.dtype).eps * largest
    torch.testing.assert_close(actual, expected, rtol=0, atol=allowed)
