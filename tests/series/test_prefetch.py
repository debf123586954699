"""Which bytes are asked for ahead: those of the weights, of no optimizer, and harmlessly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support import random_models
from support.paths import ORACLES, SAMPLES

import mlm_eval
from mlm_eval.series import prefetch as ahead


@pytest.mark.parametrize(
    "path",
    [SAMPLES / "gpt", ORACLES / "mcore016_gpt2_tp2_dist"],
    ids=["torch", "torch_dist"],
)
def test_the_bytes_of_the_weights_are_asked_for(path: Path):
    checkpoint = mlm_eval.open_checkpoint(path)
    found = ahead.byte_ranges(checkpoint)
    count = sum(length for parts in found.values() for _, length in parts)
    weights = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert weights <= count < 1.1 * weights + 300 * 4096
    assert set(found) <= set(checkpoint.provenance.files)
    for file, parts in found.items():
        assert all(first + length <= file.stat().st_size for first, length in parts)


def test_of_a_hugging_face_folder_all_weights(tmp_path: Path):
    source = random_models.checkpoint(random_models.config(vocab_size=256))
    mlm_eval.convert(source, "hf", tmp_path / "hf")
    checkpoint = mlm_eval.open_checkpoint(tmp_path / "hf")
    [(file, parts)] = ahead.byte_ranges(checkpoint).items()
    assert file == tmp_path / "hf" / "model.safetensors"
    weights = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert weights <= sum(length for _, length in parts) <= file.stat().st_size


def test_what_fails_is_passed_over(monkeypatch, tmp_path: Path):
    checkpoint = mlm_eval.open_checkpoint(SAMPLES / "gpt")
    assert ahead.prefetch(checkpoint) > 0

    def no(*given: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "posix_fadvise", no)
    assert ahead.prefetch(checkpoint) == 0
    monkeypatch.delattr(os, "posix_fadvise")  # as on a Mac
    assert ahead.prefetch(checkpoint) == 0
    assert torch.isfinite(next(iter(checkpoint.tensors.values())).read()).all()
