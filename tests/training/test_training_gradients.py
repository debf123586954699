"""Gradients of sharded training against plain transformers, and layouts against each other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support import random_models
from support.ranks import run_ranks
from support.runs import training_runs
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.model import tensor_parallel
from mlm_eval.training.data import Batch, collate

COUNT = 7  # of samples: no layout divides it
ORIGINAL_ORDER = dataclasses.replace(
    random_models.BERT, apply_residual_connection_post_layernorm=True
)


def transformers_gradients(
    kind: str, base: ModelConfig | None, folder: Path
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of the same model and samples, by canonical names.

    Our reader maps gradients as it maps weights: all it does to either is to reorder and to pack.
    """
    import transformers

    checkpoint = training_runs.model_for(kind, base)
    convert(checkpoint, "hf", folder / "weights", vocab="padded")
    [class_name] = json.loads((folder / "weights" / "config.json").read_text())["architectures"]
    model_class: Any = getattr(transformers, class_name)
    model = model_class.from_pretrained(folder / "weights", attn_implementation="eager").eval()
    vocab = checkpoint.config.vocab_size
    batch = collate(training_runs.samples(kind, COUNT, vocab=vocab))
    loss = transformers_loss(kind, model, batch)
    loss.backward()

    shutil.copytree(folder / "weights", folder / "gradients")
    stored = load_file(folder / "weights" / "model.safetensors")
    parameters = model.state_dict(keep_vars=True)
    for name in stored:
        gradient = parameters[name].grad
        stored[name] = torch.zeros_like(stored[name]) if gradient is None else gradient.contiguous()
    save_file(stored, folder / "gradients" / "model.safetensors", metadata={"format": "pt"})
    lazy = open_checkpoint(folder / "gradients").tensors
    return loss.item(), {name: tensor.read() for name, tensor in lazy.items()}


def transformers_loss(kind: str, model: Any, batch: Batch) -> Tensor:
    """Return the mean loss, computed from the logits as the task defines it."""
    if kind == "lm":
        logits = model(batch.tokens, attention_mask=batch.padding_mask).logits
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    names = {
        "input_ids": batch.tokens,
        "attention_mask": batch.padding_mask,
        "token_type_ids": batch.tokentypes,
    }
    if kind == "multichoice_head":
        names = {name: value.view(COUNT, batch.rows, -1) for name, value in names.items()}
    out = model(**names)
    if kind == "qa_head":
        padding = batch.padding_mask == 0
        ends = [out.start_logits, out.end_logits]
        ends = [logits.masked_fill(padding, -torch.inf) for logits in ends]
        return sum(F.cross_entropy(e, batch.labels[:, i]) for i, e in enumerate(ends)) / 2
    if kind == "mlm":
        hidden = batch.labels.clone()
        hidden[:, 0] = -100
        tokens = F.cross_entropy(out.prediction_logits.flatten(0, 1), hidden.flatten())
        return tokens + F.cross_entropy(out.seq_relationship_logits, batch.labels[:, 0])
    return F.cross_entropy(out.logits, batch.labels)


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare each tensor within 1e-4 of its largest gradient.

    The floor is for gradients that are zero but for rounding: softmax does not see a key's bias.
    """
    assert set(actual) == set(expected)
    for name, gradient in actual.items():
        allowed = 1e-4 * float(expected[name].abs().max()) + 3e-7
        worst = float((gradient - expected[name]).abs().max())
        assert worst <= allowed, f"{name}: {worst:.2e} off, largest {allowed / 1e-4:.2e}"


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("multichoice_head", None),
        ("multichoice_head", ORIGINAL_ORDER),
        ("classification_head", None),
        ("qa_head", None),
        ("mlm", None),
        ("lm", None),
    ],
    ids=["choice", "choice-original-order", "classes", "answers", "masked-lm", "causal-lm"],
)
def test_gradients_are_those_of_transformers(kind, base, tmp_path):
    loss, expected = transformers_gradients(kind, base, tmp_path)
    for tp, dp in [(1, 1), (2, 1), (1, 2)]:
        for actual, gradients in run_ranks(tp * dp, gradients_on_a_rank, tp, dp, kind, base):
            assert actual == pytest.approx(loss, rel=1e-5)
            assert_same_gradients(gradients, expected)


def gradients_on_a_rank(
    tp: int, dp: int, kind: str, base: ModelConfig | None
) -> tuple[float, dict[str, Tensor]]:
    return training_runs.gradients(tp, dp, kind, {"micro_batch": 2}, base=base)


# What transformers has no model for is compared with one process of ours.
VARIANTS = {
    "grouped-gated-untied": training_runs.llama(),
    "zero-centred-qk-norms": training_runs.llama(
        qk_layernorm=True,
        qk_layernorm_bias=True,
        normalization="LayerNorm",
        layernorm_zero_centered_gamma=True,
        add_bias_linear=True,
        add_qkv_bias=True,
    ),
    "uneven-vocabulary": dataclasses.replace(random_models.GPT, vocab_size=51),
    "vocabulary-of-one-rank": dataclasses.replace(random_models.GPT, vocab_size=1),
}


def variant(tp: int, dp: int, name: str, changes: dict[str, Any]) -> Any:
    return training_runs.gradients(tp, dp, "lm", changes, base=VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_of_shards_are_those_of_one_process(name):
    loss, expected = variant(1, 1, name, {})
    for actual, gradients in run_ranks(2, variant, 2, 1, name, {}):
        assert actual == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(gradients, expected)
        assert name == "vocabulary-of-one-rank" or all(g.any() for g in gradients.values())


DROPPED = {"hidden_dropout": 0.3, "attention_dropout": 0.2}
WAYS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "micro-batches of 1": (1, 1, {"micro_batch": 1}),
    "one micro-batch, padded to the longest of all": (1, 1, {"micro_batch": COUNT}),
    "recomputed": (1, 1, {"recompute": True}),
    "tp 2": (2, 1, {}),
    "tp 2, recomputed": (2, 1, {"recompute": True}),
    "dp 2": (1, 2, {}),
    "dp 2, more ranks than samples in the last micro-batch": (1, 2, {"micro_batch": 1}),
    "fsdp2": (1, 2, {"dp_mode": "fsdp2"}),
    "fsdp2, recomputed": (1, 2, {"dp_mode": "fsdp2", "recompute": True}),
}


@pytest.fixture(scope="module")
def dropped() -> dict[str, tuple[float, dict[str, Tensor]]]:
    """One process's loss and gradients with dropout on."""
    return {
        kind: training_runs.gradients(1, 1, kind, DROPPED) for kind in ("multichoice_head", "lm")
    }


@pytest.mark.parametrize("kind", ["multichoice_head", "lm"])
@pytest.mark.parametrize("way", WAYS)
def test_with_dropout_no_layout_changes_a_gradient(kind, way, dropped):
    """Masks belong to samples and places: with dropout, too, no layout changes anything."""
    tp, dp, changes = WAYS[way]
    loss, expected = dropped[kind]
    for actual, gradients in run_ranks(
        tp * dp, training_runs.gradients, tp, dp, kind, DROPPED | changes
    ):
        assert actual == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(gradients, expected)


def in_chunks(tp: int, kind: str) -> tuple[float, dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tensor_parallel, "LOGIT_CHUNK_ELEMENTS", 130)  # five rows at tp 2
        return training_runs.gradients(tp, 1, kind, {})


@pytest.mark.parametrize("kind", ["mlm", "lm"])
def test_logits_in_chunks_have_the_same_gradients(kind):
    loss, expected = training_runs.gradients(1, 1, kind, {})
    for tp in (1, 2):
        for actual, gradients in run_ranks(tp, in_chunks, tp, kind):
            assert actual == pytest.approx(loss, rel=1e-5)
            assert_same_gradients(gradients, expected)


def test_dropout_does_something(dropped):
    without, _ = training_runs.gradients(1, 1, "lm", {})
    assert abs(dropped["lm"][0] - without) > 1e-3


def test_copied_key_value_heads_are_refused():
    with pytest.raises(InputError, match="tp=4: it has 2 query groups.*allows tp in 1, 2"):
        run_ranks(4, four_ranks)


def four_ranks() -> None:
    training_runs.gradients(4, 1, "lm", {}, base=training_runs.llama())
