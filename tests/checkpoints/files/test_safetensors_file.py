"""Headers of safetensors files: what the library reads is read, and what it refuses is refused."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safetensors_file import SAFETENSORS_DTYPES, read_safetensors

HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    "c": {"dtype": "U8", "shape": [0, 4], "data_offsets": [26, 26]},
    "d": {"dtype": "I64", "shape": [1], "data_offsets": [26, 34]},
}
VALUES = bytes(range(34))
ODD: tuple[Any, ...] = (
    *(0, 1, -1, 2, 24, 26, 34, 2**31, 2**63, 2**64, 1.0, True, None, "x", "F16", "F4", "F8_E8M0"),
    *([], [0], [0, 24], [3, 2], [24, 26], [26, 34], [26, 33], [-1, 24], {}, {"dtype": "F32"}),
)


def text(header: Any) -> bytes:
    """Return a header as bytes."""
    return json.dumps(header, separators=(",", ":")).encode()


def odd_header(draw: random.Random) -> bytes:
    """Return a header of which a value or a byte is another."""
    header = json.loads(text(HEADER))
    if draw.random() < 0.5:
        name = draw.choice(list(header))
        if draw.random() < 0.2:
            header[name] = draw.choice(ODD)
        else:
            header[name][draw.choice(list(header[name]))] = draw.choice(ODD)
        return text(header)
    found = bytearray(text(header))
    at = draw.randrange(len(found))
    found[at : at + draw.randrange(2)] = draw.choice([b"", b"9", b'"', b" ", b"\xff", b"{", b","])
    return bytes(found)


def the_library_reads(path: Path) -> bool:
    """Whether the library reads a file, and torch has its dtypes."""
    try:
        with safe_open(path, framework="pt") as file:
            codes = {file.get_slice(name).get_dtype() for name in file.keys()}
    except SafetensorError:
        return False
    return codes <= set(SAFETENSORS_DTYPES)


def check(path: Path) -> bool:
    """Read a file as we do and as the library does, and compare; return whether it is read."""
    if not the_library_reads(path):
        with pytest.raises(InputError, match="safetensors file|twice in its header|a form of quan"):
            read_safetensors(path)
        return False
    expected = load_file(path)
    found = read_safetensors(path).tensors
    assert list(found) == sorted(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype and torch.equal(found[name].read(), values), name
    return True


def test_odd_headers_are_judged_as_the_library_judges_them(tmp_path: Path):
    draw, path = random.Random(1), tmp_path / "x.safetensors"
    read = 0
    for _ in range(300):
        header = odd_header(draw)
        path.write_bytes(struct.pack("<Q", len(header)) + header + VALUES)
        read += check(path)
    assert 15 < read < 150


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("end", range(-3, 3))
def test_places_and_lengths(start: int, end: int, tmp_path: Path):
    """Spaces about the header are read, of which some move values to odd offsets; else nothing."""
    header = b" " * start + text(HEADER) + b" " * (3 - start)
    values = VALUES[:end] if end < 0 else VALUES + b"x" * end
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + values)
    assert check(path) is (end == 0)
    path.write_bytes(struct.pack("<Q", len(header) + 1 + end % 2 * 10**6) + header + VALUES)
    assert not check(path)


@pytest.mark.parametrize("shape", [[1] * 300_000, [2**61] * 40_000])
def test_a_tensor_of_more_dims_than_torch_has_is_refused_at_once(shape: list[int], tmp_path: Path):
    """The library takes it; strides and sizes of so many dims would be computed for hours."""
    header = {"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}}
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text(header))) + text(header) + b"\0")
    with pytest.raises(InputError, match=f"gives 'a' {len(shape)} dims"):
        read_safetensors(path)


def test_a_doubled_name_is_found_at_once(tmp_path: Path):
    names = [*(f"t{number}" for number in range(100_000)), "t99999"]
    header = ",".join(f'"{name}":{{}}' for name in names).join("{}").encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="names 't99999' twice in its header"):
        read_safetensors(path)
