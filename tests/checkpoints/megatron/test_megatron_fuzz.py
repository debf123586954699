"""Random models of megatron-core, built, saved and run by its own code: what is read is the same.

`MLM_EVAL_FUZZ_SEEDS=1000:2000` runs that range of cases instead of the first few, so that a long
run is many ranges, one after another or beside each other; about six cases a second.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fuzz.core_process import PLAIN
from support.paths import ORACLES, PROJECT, SUPPORT
from support.random_models import all_log_probs
from torch import Tensor

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.engine.engine import load_model
from mlm_eval.model.tensor_parallel import SINGLE

FIRST, LAST = map(int, os.environ.get("MLM_EVAL_FUZZ_SEEDS", "0:60").split(":"))
BLOCK = 250  # cases of one process: to import megatron-core takes seconds
TOLERANCE = 1e-4
"""In nats or logits: float32 rounding of such models is below a third of it, an erf for a tanh
fifteen times as much."""
LEAST_READ = 0.8
"""Of the models that megatron-core builds: a fuzz that refuses everything proves nothing."""
PHRASES = {"num_experts": "moe_router_topk is", "softmax_type": "attention sinks"}
"""What a refusal says where the parameters give a model away before its args do."""

Case = dict[str, Any]

pytestmark = [
    pytest.mark.process,
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron.core") is None, reason="megatron-core is not installed"
    ),
]


@pytest.fixture(scope="module")
def outcomes() -> list[Case]:
    """What became of the cases so far."""
    return []


def make(folder: Path, first: int, last: int) -> list[Case]:
    """Have megatron-core make the cases of a range of seeds."""
    args = next(iter(sorted((ORACLES / "mcore016_gpt2_tp2_pp2").rglob("*.pt"))[1:]))
    script = SUPPORT / "fuzz" / "megatron_core_fuzz.py"
    command = [sys.executable, "-W", "ignore", script, folder, args]
    environment = {**os.environ, **PLAIN, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [*map(str, command), str(first), str(last)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]


def judge(folder: Path, case: Case) -> str:
    """Return `read`, `refused` or `impossible`, and fail where it is wrong."""
    if "impossible" in case:
        return "impossible"
    root = folder / str(case["seed"])
    try:
        checkpoint = open_checkpoint(root)
    except InputError as refusal:
        named = [name for name in case["newer"] if says(str(refusal), name)]
        assert named, f"refused, but not by what was drawn: {refusal} {case}"
        return "refused"
    if not case["golden"]:
        # Some of the newer layers need a GPU in megatron-core's own code.
        assert case["newer"], f"read, although megatron-core cannot run it here: {case}"
        return "impossible"
    gap = difference(checkpoint, torch.load(root / "golden.pt"))
    assert gap <= TOLERANCE, f"off by {gap:.2g}: {case}"
    return "read"


def says(message: str, name: str) -> bool:
    return f"args.{name} = " in message or PHRASES.get(name, "\n") in message


@torch.inference_mode()
def difference(checkpoint: Any, golden: dict[str, Tensor]) -> float:
    """Return the largest difference of a log-probability or logit from megatron-core's."""
    cpu = torch.device("cpu")
    model = load_model(checkpoint, SINGLE, device=cpu, dtype=torch.float32).eval()
    expected = golden["logits"].log_softmax(-1)
    if "tokentypes" not in golden:
        return worst(all_log_probs(model, model(golden["tokens"])), expected)
    states = model(golden["tokens"], golden["padding_mask"], golden["tokentypes"])
    real = golden["padding_mask"].bool()  # Megatron's own eras differ on rows of padding
    heads = model.head_logits(states)
    return max(
        worst(all_log_probs(model, states)[real], expected[real]),
        worst(heads["binary_head"], golden["binary_logits"]),
    )


def worst(actual: Tensor, expected: Tensor) -> float:
    gap = (actual - expected).abs().max().item()
    return gap if gap == gap else float("inf")


@pytest.mark.parametrize("first", range(FIRST, LAST, BLOCK))
def test_what_is_read_computes_what_megatron_core_computes(
    first: int, outcomes: list[Case], tmp_path: Path
) -> None:
    wrong = []
    for case in make(tmp_path, first, min(first + BLOCK, LAST)):
        try:
            outcomes.append(case | {"result": judge(tmp_path, case)})
        except AssertionError as fault:
            wrong.append(str(fault))
    assert not wrong, "\n".join(wrong)


def test_most_models_are_read(outcomes: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(case["result"] for case in outcomes)
    built = counts["read"] + counts["refused"]
    if not built:
        pytest.skip("run it with the cases")
    by_name = Counter(name for case in outcomes for name in case.get("newer", {}))
    with capsys.disabled():
        print(
            f"\nmegatron-core fuzz, cases {FIRST} to {LAST - 1}: {counts['read']} read and equal, "
            f"{counts['refused']} refused by name, {counts['impossible']} that megatron-core does "
            f"not build; {counts['read'] / built:.1%} read; newer layers drawn: {dict(by_name)}"
        )
    assert counts["impossible"] < len(outcomes) / 10
    assert counts["read"] >= LEAST_READ * built
    if built >= 500:
        fields = {name for case in outcomes for name in case.get("without_effect", {})}
        assert len(fields) > 100, "too few of the fields that are said to change nothing"
