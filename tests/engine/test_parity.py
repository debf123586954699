"""Parity with Megatron: the engine against the outputs of Megatron's own forward pass.

The checkpoints are genuine: written by the Megatron-LM revision that their names say, with random
weights everywhere, biases included, so that a wrong order or a bias added once per rank shows. A
few ship in tests/oracles; the others are used too where ../shared/oracles is. Each is computed
at every tensor-parallel size that it allows up to 4, whatever size saved it, on real ranks.
"""

from __future__ import annotations

import filecmp
import os
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from support.paths import ORACLES
from support.ranks import run_ranks
from torch import Tensor

from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import allowed_tp
from mlm_eval.engine.encode import BertInput
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.score import Request
from mlm_eval.model.bert import BERT

SHIPPED = ORACLES
TOLERANCE = 1e-4  # absolute, in nats or logits, at every position

Golden = dict[str, Tensor]


def names_in(folder: Path) -> list[str]:
    """Return the oracles of a folder."""
    return sorted(golden.parent.name for golden in folder.glob("*/golden.pt"))


def names_in_full_set() -> list[str]:
    """Return the further oracles beside the project; where there are none a name, to be skipped."""
    folder = Path(os.environ.get("MLM_EVAL_ORACLES", SHARED / "oracles"))
    return sorted({*names_in(folder)} - {*names_in(SHIPPED)}) or ["none"]


def read_golden(folder: Path) -> Golden:
    """Return the golden outputs; whole logits are reduced to what the shipped copies hold."""
    golden: Golden = torch.load(folder / "golden.pt", weights_only=True)
    logits = golden.get("logits", golden.get("lm_logits"))
    if logits is not None and "logits_positions" not in golden:
        best = logits.topk(2, dim=-1)
        golden["argmax"], golden["lead"] = best.indices[..., 0], best.values.diff(dim=-1)[..., 0]
        golden["lead"] = -golden["lead"]
        golden["logits_positions"] = torch.arange(logits.shape[1])
    return golden


def whole(golden: Golden) -> slice:
    """Return which of the golden positions, about five, have all of their logits compared."""
    return slice(None, None, max(golden["logits_positions"].numel() // 4, 1))


# ---- on the ranks ------------------------------------------------------------------------------


def run_gpt(folder: Path, tp: int, golden: Golden) -> dict[str, Tensor]:
    """Return what the engine says about the golden tokens, on one rank of `tp`.

    `loss` and `greedy` as Megatron's own evaluation sees the batch; `argmax` whether each golden
    argmax is ours too, asked for one context at a time; `whole` log-probabilities of every entry of
    the vocabulary at a few positions.
    """
    engine = Engine.load(open_checkpoint(folder), tp=tp)
    tokens = golden["tokens"]
    length = tokens.shape[1]
    rows = torch.cat([tokens, golden["labels"][:, -1:]], dim=1)  # [2, T + 1]
    scores = engine.score([Request(row, length) for row in rows])
    found = {
        "logprobs": scores.logprobs.view(tokens.shape),
        "greedy": scores.greedy.view(tokens.shape),
    }
    if "argmax" in golden:
        requests = [
            Request(torch.cat([row[: at + 1], best[at : at + 1]]), 1)
            for row, best in zip(tokens, golden["argmax"], strict=True)
            for at in range(length)
        ]
        found["argmax"] = engine.score(requests).greedy.view(tokens.shape)
    if golden["logits"].shape[-1] <= 2048:
        with torch.inference_mode():
            states = engine.model(tokens)[:, golden["logits_positions"][whole(golden)]]
            found["whole"] = whole_distribution(engine, states, golden["logits"].shape[-1])
    return found


def run_bert(folder: Path, tp: int, golden: Golden) -> dict[str, Tensor]:
    """Return what the engine says about the golden inputs, on one rank of `tp`."""
    engine = Engine.load(open_checkpoint(folder), tp=tp)
    parts = (golden["tokens"], golden["tokentype_ids"], golden["attention_mask"])
    inputs = [BertInput(*row) for row in zip(*parts, strict=True)]
    outputs = engine.encode(inputs, score=engine.config.lm_head)
    found = {name: torch.stack([o.heads[name] for o in outputs]) for name in outputs[0].heads}
    pooled = [output.pooled for output in outputs if output.pooled is not None]
    if pooled:
        found["pooled"] = torch.stack(pooled)
    if "lm_logits" in golden:
        assert isinstance(engine.model, BERT)
        with torch.inference_mode():
            states = engine.model(parts[0], parts[2], parts[1])  # [2, T, h]
            flat = states.flatten(0, 1)
            scored = engine.model.log_probs(flat, golden["labels"].flatten())
            found["logprobs"], found["greedy"] = (x.view(parts[0].shape) for x in scored)
            best = engine.model.log_probs(flat, golden["argmax"].flatten())[1]
            found["argmax"] = best.view(parts[0].shape)
            chosen = states[:, golden["logits_positions"][whole(golden)]]
            found["whole"] = whole_distribution(engine, chosen, golden["lm_logits"].shape[-1])
        own = [output.logprobs for output in outputs]
        found["own_logprobs"] = torch.stack([x for x in own if x is not None])
    return found


def whole_distribution(engine: Engine, states: Tensor, vocab: int) -> Tensor:
    """Return the log-probabilities of the whole vocabulary, `[2, P, V]`, through the public head.

    The head gives one target's at a time: every entry is asked for, as a target of its own.
    """
    rows = states.flatten(0, 1).repeat_interleave(vocab, dim=0)
    targets = torch.arange(vocab).repeat(states.shape[0] * states.shape[1])
    return engine.model.log_probs(rows, targets)[0].view(*states.shape[:2], vocab)


# ---- the comparison ----------------------------------------------------------------------------


def check(folder: Path, tp: int) -> None:
    """Compare one oracle at one tensor-parallel size with Megatron's outputs."""
    config = open_checkpoint(folder).config
    if tp not in allowed_tp(config):
        pytest.skip(f"tp={tp} does not divide the {config.num_attention_heads} heads")
    golden = read_golden(folder)
    run = run_gpt if config.family == "gpt" else run_bert
    first, *others = run_ranks(tp, run, folder, tp, golden)
    for other in others:
        assert other.keys() == first.keys()
        for name in first:
            assert torch.equal(first[name], other[name]), f"{name} differs between ranks"
    if config.family == "gpt":
        check_tokens(first, golden, golden["logits"], torch.ones_like(golden["tokens"]).bool())
    else:
        check_bert(first, golden)


def check_tokens(found: Golden, golden: Golden, logits: Tensor, real: Tensor) -> None:
    """Compare log-probabilities, greedy flags and argmax at the real positions."""
    close(found["logprobs"][real], -golden["token_loss"][real])
    at = golden["logits_positions"]
    labels, kept = golden["labels"][:, at], real[:, at]
    reference = logits.log_softmax(-1)  # [2, P, V]
    close(
        found["logprobs"][:, at][kept],
        reference.gather(-1, labels.unsqueeze(-1)).squeeze(-1)[kept],
    )
    assert torch.equal(found["greedy"][:, at][kept], (logits.argmax(-1) == labels)[kept])
    if "whole" in found:
        few = whole(golden)
        close(found["whole"][kept[:, few]], reference[:, few][kept[:, few]])
    if "argmax" in golden:
        # Where two logits are as near as the tolerance, either may come out on top.
        clear = real & (golden["lead"] > 2 * TOLERANCE)
        assert clear.sum() > 0.9 * real.sum()
        assert found["argmax"][clear].all()
        is_best = golden["labels"] == golden["argmax"]
        assert torch.equal(found["greedy"][clear], is_best[clear])


def check_bert(found: Golden, golden: Golden) -> None:
    """Compare the heads, and the masked-LM head where there is one, on rows that are no padding."""
    close(found["pooled"], golden["pooled"])
    if "nsp_logits" in golden:
        close(found["binary_head"], golden["nsp_logits"])
    if "head_logits" in golden:
        close(found["multichoice_head"].view(1, -1), golden["head_logits"])
    if "lm_logits" in golden:
        real = golden["attention_mask"].bool()
        check_tokens(found, golden, golden["lm_logits"], real)
        same = real & (golden["labels"] == golden["tokens"])
        close(found["own_logprobs"][same], found["logprobs"][same])
    else:
        assert "head_logits" in golden


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", names_in(SHIPPED))
def test_shipped_oracle(name: str, tp: int):
    check(SHIPPED / name, tp)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", names_in_full_set())
def test_full_set(name: str, tp: int, oracles: Path):
    check(oracles / name, tp)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["softmax_scale", "rope_interp4", "llama32_factor32"])
def test_settings_that_the_model_did_and_did_not_receive(name: str, tp: int, oracles: Path):
    """A fork's attention scale acted; two factors of args never reached megatron-core's model."""
    check(oracles / "families" / name, tp)


def test_shipped_copies_are_the_originals(oracles: Path):
    """Byte for byte; of the outputs, each that is left is the original's."""
    for name in names_in(SHIPPED):
        copies = [file for file in (SHIPPED / name).rglob("*") if file.is_file()]
        assert copies
        folder = oracles / name if (oracles / name).is_dir() else oracles / "families" / name
        for copy in copies:
            original = folder / copy.relative_to(SHIPPED / name)
            if copy.name != "golden.pt":
                assert filecmp.cmp(copy, original, shallow=False), copy
        whole, kept = read_golden(folder), read_golden(SHIPPED / name)
        for key, value in kept.items():
            if key in ("logits", "lm_logits"):
                assert torch.equal(value, whole[key][:, kept["logits_positions"]])
            elif key != "logits_positions":
                assert torch.equal(value, whole[key]), key


def test_the_older_form_of_torch_save_scores_the_same(tmp_path: Path):
    """The same genuine contents, saved again as a stream of pickles (torch before 1.6)."""
    source = SHIPPED / "v10_gpt_tp2"
    for file in source.glob("iter_*/mp_rank_*/*.pt"):
        target = tmp_path / file.relative_to(source)
        target.parent.mkdir(parents=True)
        # A file of ours, which holds no class that is not here.
        contents = torch.load(file, weights_only=False)
        torch.save(contents, target, _use_new_zipfile_serialization=False)
    golden = read_golden(source)
    [stream] = run_ranks(1, run_gpt, tmp_path, 1, golden)
    [archive] = run_ranks(1, run_gpt, source, 1, golden)
    for name in archive:
        assert torch.equal(stream[name], archive[name]), name
    assert "stream form" in " ".join(open_checkpoint(tmp_path).provenance.notes)


def test_the_shipped_copies_stay_small():
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert len(names_in(SHIPPED)) >= 9
    assert sum(file.stat().st_size for file in files) < 24_000_000


@pytest.mark.parametrize("name", ["v10_gpt_tp2", "v115_gpt_tp2"])
def test_a_wrong_order_would_show(name: str):
    """The comparison can fail: with the QKV order of another version it does, by far."""
    folder = SHIPPED / name
    golden = read_golden(folder)
    engine = Engine.load(open_checkpoint(folder, {"checkpoint_version": 2.0}))
    rows = torch.cat([golden["tokens"], golden["labels"][:, -1:]], dim=1)
    scores = engine.score([Request(row, row.numel() - 1) for row in rows])
    worst = (scores.logprobs + golden["token_loss"].flatten()).abs().max()
    assert worst > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("v25_gpt_tp2_fp16", {"activation": "gelu_tanh"}),
        ("v25_bert_tp2_fusedgelu", {"activation": "gelu"}),
        ("v25_bert_tp2_fusedgelu", {"head_activation": "gelu_tanh"}),
        ("v10_bert_tp2_postlnres", {"apply_residual_connection_post_layernorm": False}),
        ("mcore016_llama_tp2", {"layernorm_epsilon": 1e-5}),
        ("mcore016_llama_tp2", {"rotary_interleaved": True}),
    ],
)
def test_a_wrong_setting_would_show(name: str, change: dict):
    """The settings matter to the last digit that is compared: none of them may be guessed."""
    folder = SHIPPED / name
    golden = read_golden(folder)
    right, wrong = (Engine.load(open_checkpoint(folder, overrides)) for overrides in ({}, change))
    with torch.inference_mode():
        logprobs = []
        for engine in (right, wrong):
            if engine.config.family == "gpt":
                states = engine.model(golden["tokens"])
            else:
                parts = (golden["tokens"], golden["attention_mask"], golden["tokentype_ids"])
                states = engine.model(*parts)
            logprobs.append(engine.model.log_probs(states[0], golden["labels"][0])[0])
    assert (logprobs[0] - logprobs[1]).abs().max() > 5 * TOLERANCE
