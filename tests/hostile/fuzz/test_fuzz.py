"""Random input for each reader: a right value, or one sentence; nothing else, and nothing runs.

hypothesis makes the inputs, the same ones on every machine. `MLM_EVAL_FUZZ_EXAMPLES=100000` makes
as many for each reader; scripts/fuzz_readers.py runs the same readers under atheris, which is
guided by coverage.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.properties import thorough
from support.reliability import fuzzed_readers
from support.reliability.fuzzed_readers import READERS, Seeds

EXAMPLES = int(os.environ.get("MLM_EVAL_FUZZ_EXAMPLES", "100"))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    """A right file of each kind."""
    return fuzzed_readers.seeds(tmp_path_factory.mktemp("seeds"))


def edits() -> st.SearchStrategy[list[tuple[float, bytes]]]:
    """Return places (shares of a file's length) and what is put there."""
    return st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9)), max_size=6)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_have_one_sentence(name: str, seeds: Seeds, tmp_path: Path):
    @thorough(EXAMPLES)
    @given(edits(), st.floats(0, 1))
    def check(changes: list[tuple[float, bytes]], kept: float) -> None:
        data = bytearray(seeds[name])
        for share, content in changes:
            at = int(share * len(data))
            data[at : at + len(content)] = content
        length = len(data) if kept > 0.5 else int(2 * kept * len(data))
        fuzzed_readers.read(name, bytes(data[:length]), tmp_path)

    check()


@pytest.mark.parametrize("name", READERS)
def test_bytes_of_any_kind_have_one_sentence(name: str, tmp_path: Path):
    @thorough(EXAMPLES)
    @given(st.binary(max_size=200))
    def check(data: bytes) -> None:
        fuzzed_readers.read(name, data, tmp_path)

    check()


def opcodes() -> st.SearchStrategy[bytes]:
    """Return runs of opcodes of pickles, with arguments that are right more often than not."""
    from pickletools import opcodes as known

    texts = st.sampled_from([b"os\nsystem\n", b"torch\nSize\n", b"1\n", b"S'a'\n"])
    codes = st.sampled_from([code.code.encode("latin-1") for code in known])
    return st.lists(st.one_of(codes, texts, st.binary(max_size=4)), max_size=40).map(b"".join)


@pytest.mark.parametrize("name", ["pickle", "torch zip", "torch stream"])
def test_opcodes_in_any_order_have_one_sentence(name: str, tmp_path: Path):
    wrap: Callable[[bytes], bytes] = fuzzed_readers.WRAPPED[name]

    @thorough(5 * EXAMPLES)
    @given(opcodes())
    def check(code: bytes) -> None:
        fuzzed_readers.read(name, wrap(b"\x80\x04" + code + b"."), tmp_path)

    check()
