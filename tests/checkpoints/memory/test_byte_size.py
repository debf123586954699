"""Sizes in bytes as people write them."""

from __future__ import annotations

import pytest

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.memory.byte_size import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("80 gb", 80 * 10**9),
        ("500 MB", 5 * 10**8),
        ("1.5kb", 1500),
        ("1.5TB", 15 * 10**11),
        ("24GiB", 24 * 2**30),
        ("2k", 2000),
        (7, 7),
        ("8", 8),
        ("1000B", 1000),
    ],
)
def test_sizes_are_read(text: int | str, size: int) -> None:
    assert parse_bytes(text, "--size") == size


@pytest.mark.parametrize(
    "text", ["", "5XB", "GB", "-3GB", "0", 0, -1, "0GB", "0.1B", "3iB", "80 apples", "nan"]
)
def test_what_is_no_size_is_refused(text: int | str) -> None:
    with pytest.raises(InputError, match="--size .* is not a size; write 80GB"):
        parse_bytes(text, "--size")
