"""Parity with Megatron for the families beyond dense GPT: experts, latent attention, variants.

The checkpoints stand beside the project (../shared/oracles/families); each folder holds the logits
of Megatron's own forward pass. One set of ranks computes them all, at each tensor-parallel size.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SHARED
from support.ranks import run_ranks

from mlm_eval.checkpoints.config import parse_overrides
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import allowed_tp
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.plain_transformers import transformers_outputs
from mlm_eval.engine.score import PairRequest, Request
from mlm_eval.model.t5 import T5

FAMILIES = SHARED / "oracles" / "families"
TOLERANCE = 1e-4  # absolute, in nats, at every position and entry of the vocabulary

# What no file says: a gate with tanh GELU, and nothing in args about either.
BY_HAND = {"geglu": ["activation=geglu_tanh"]}

REFUSED = {
    "moe_tp2_etp1_incomplete": "only a part of its model.*torch_dist",
}


@pytest.fixture(scope="session")
def families() -> Path:
    """Return the folder of the genuine checkpoints; skip where it is not."""
    if not FAMILIES.is_dir():
        pytest.skip(f"{FAMILIES} is not here")
    return FAMILIES


def read_names(families: Path) -> list[str]:
    return sorted({golden.parent.name for golden in families.glob("*/golden.pt")} - {*REFUSED})


def gaps(families: Path, tp: int) -> dict[str, float]:
    """Return the largest difference from Megatron of any log-probability, by folder."""
    found: dict[str, float] = {}
    for name in read_names(families):
        checkpoint = open_checkpoint(families / name, parse_overrides(BY_HAND.get(name, [])))
        if tp not in allowed_tp(checkpoint.config):
            continue
        engine = Engine.load(checkpoint, tp=tp)
        golden = torch.load(families / name / "golden.pt", weights_only=True)
        tokens, labels, logits = golden["tokens"], golden["labels"], golden["logits"]
        inputs = [tokens]
        if isinstance(engine.model, T5):
            inputs = [golden["encoder_tokens"], golden["encoder_mask"], tokens]
        with torch.inference_mode():
            states = engine.model(*inputs).flatten(0, 1)
            ours = engine.model.output_layer.logits(states).view(logits.shape).log_softmax(-1)
        theirs = logits.log_softmax(-1)
        rows = torch.cat([tokens, labels[:, -1:]], dim=1)  # [2, T + 1]
        requests = [Request(row, tokens.shape[1]) for row in rows]
        if isinstance(engine.model, T5):
            sides = zip(rows, golden["encoder_tokens"], golden["encoder_mask"], strict=True)
            requests = [PairRequest(row, len(row) - 1, *encoder) for row, *encoder in sides]
        scores = engine.score(requests)
        of_labels = theirs.gather(-1, labels[..., None]).squeeze(-1)
        worst = [ours - theirs, scores.logprobs.view(labels.shape) - of_labels]
        found[name] = max(difference.abs().max().item() for difference in worst)
    return found


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_log_probabilities_are_megatrons(tp: int, families: Path):
    first, *others = run_ranks(tp, gaps, families, tp)
    assert all(other == first for other in others)
    assert {name: gap for name, gap in first.items() if not gap < TOLERANCE} == {}
    assert len(first) >= 46


@pytest.mark.long
@pytest.mark.parametrize("name", ["neox_tp2", "bloom_tp2"])
def test_a_converted_model_of_deepspeed_has_the_logits_of_the_source(
    name: str, families: Path, tmp_path: Path
):
    """In plain transformers; rows of padding are kept, since no tokenizer says which they are."""
    convert(open_checkpoint(families / name), "hf", tmp_path / "hf", vocab="padded")
    golden = torch.load(families / name / "golden.pt", weights_only=True)
    theirs = transformers_outputs(tmp_path / "hf", {"tokens": golden["tokens"]})["logits"]
    gap = theirs.log_softmax(-1) - golden["logits"].log_softmax(-1)
    assert gap.abs().max().item() < 2 * TOLERANCE


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_computed_is_refused_by_name(name: str, families: Path):
    with pytest.raises(InputError, match=REFUSED[name]):
        open_checkpoint(families / name)
