"""What is known of dtypes without torch is what torch says of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from mlm_eval.checkpoints.dtypes import STORED_DTYPES, WEIGHT_DTYPES, described, widest


@pytest.mark.parametrize("name", STORED_DTYPES)
def test_a_description_is_that_of_torch(name: str):
    kind = STORED_DTYPES[name]
    dtype = kind.torch_dtype
    assert str(kind) == str(dtype)
    assert (kind.itemsize, kind.is_floating_point) == (dtype.itemsize, dtype.is_floating_point)
    assert described(dtype) == described(kind) == kind


def test_weights_of_several_dtypes_are_promoted_as_torch_does():
    names = (*WEIGHT_DTYPES, "int64", "bool")
    for one, other in itertools.product(names, repeat=2):
        expected = torch.promote_types(getattr(torch, one), getattr(torch, other))
        assert widest([STORED_DTYPES[one], STORED_DTYPES[other]]).torch_dtype == expected
