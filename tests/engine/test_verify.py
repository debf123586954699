"""verify and convert --verify: that they pass what is right and catch what is not."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.configs import BERT, GPT, LLAMA
from support.paths import PROJECT
from support.random_models import checkpoint

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.comparison import Comparison
from mlm_eval.checkpoints.config import RopeScaling
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import find_tokenizer
from mlm_eval.engine import verify
from mlm_eval.engine.plain_transformers import transformers_outputs
from mlm_eval.engine.verify import (
    TOLERANCE,
    compare,
    compare_checkpoints,
    outputs,
    probe,
    verify_conversion,
)

SAMPLE = PROJECT / "checkpoints" / "samples" / "gpt"
ORACLES = PROJECT / "tests" / "oracles"


@pytest.fixture(scope="module")
def sample() -> Checkpoint:
    return open_checkpoint(SAMPLE)


@pytest.fixture(scope="module")
def converted(sample: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample as a Hugging Face folder, verified by plain transformers while it was made."""
    folder = tmp_path_factory.mktemp("converted") / "hf"
    done = convert(
        sample,
        "hf",
        folder,
        tokenizer=find_tokenizer(SAMPLE),
        verify=True,
        compare=verify_conversion,
    )
    assert done.comparison is not None and done.comparison.same
    assert done.comparison.greedy_agreement == 1.0
    return folder


def test_a_verified_folder_is_usable_by_its_tokenizer_and_model(converted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    logits = model(**tokenizer("A Python program is", return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer)


def test_one_changed_weight_is_found_by_a_fresh_process(
    sample: Checkpoint, converted: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in converted.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    state = load_file(broken / "model.safetensors")
    state["transformer.h.0.mlp.c_fc.bias"][3] += 1.0
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    comparison = verify_conversion(sample, broken, to="hf")
    assert not comparison.same
    assert comparison.max_difference > 1e-3


def test_a_conversion_that_differs_is_not_left_at_the_target(
    sample: Checkpoint, tmp_path: Path
) -> None:
    worse = Comparison(0.5, 0.1, 0.9, TOLERANCE, {"logits": 0.5})
    with pytest.raises(InputError, match=r"differs from its source by 0\.5.*was not written"):
        convert(
            sample, "megatron", tmp_path / "out", tp=1, verify=True, compare=lambda *_, **__: worse
        )
    assert list(tmp_path.iterdir()) == []


def test_rounding_that_was_asked_for_is_not_taken_for_a_fault(
    sample: Checkpoint, tmp_path: Path
) -> None:
    target = tmp_path / "bf16"
    done = convert(
        sample, "torch_dist", target, tp=1, dtype="bfloat16", verify=True, compare=verify_conversion
    )
    assert done.comparison is not None and done.comparison.same
    # Against the unrounded source the difference is there.
    assert compare_checkpoints(sample, open_checkpoint(target)).max_difference > 1e-4


def test_a_bert_with_two_gelus_is_refused_or_measured(tmp_path: Path) -> None:
    bert = open_checkpoint(ORACLES / "v25_bert_tp2_fusedgelu")
    with pytest.raises(InputError, match="allow-approximate"):
        convert(bert, "hf", tmp_path / "exact")
    assert not (tmp_path / "exact").exists()
    done = convert(bert, "hf", tmp_path / "near", allow_approximate=True, compare=verify_conversion)
    assert done.comparison is not None and not done.comparison.same
    assert done.comparison.verdict == "approximate, as allowed"
    assert done.comparison.differences() == done.approximations
    assert 5e-4 < done.comparison.max_difference < 5e-3
    readme = (tmp_path / "near" / "README.md").read_text()
    assert f"{done.comparison.max_difference:.3g}" in readme


def test_the_source_itself_is_never_replaced(sample: Checkpoint, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    convert(sample, "megatron", copy, tp=2)
    with pytest.raises(InputError, match="holds the checkpoint that is being converted"):
        convert(open_checkpoint(copy), "hf", copy, overwrite=True)
    assert compare_checkpoints(sample, open_checkpoint(copy)).max_difference == 0.0


def test_a_tokenizer_travels_with_a_megatron_checkpoint(sample: Checkpoint, tmp_path: Path) -> None:
    words = find_tokenizer(SAMPLE)
    convert(sample, "megatron", tmp_path / "out", tp=1, tokenizer=words)
    found = find_tokenizer(tmp_path / "out")
    assert found is not None and words is not None and found.sha256 == words.sha256


def test_a_conversion_without_verify_imports_no_model(tmp_path: Path) -> None:
    """Of torch.distributed only what torch imports itself."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from mlm_eval.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "new = sorted(set(sys.modules) - before)\n"
        "rooms = ('mlm_eval.model', 'mlm_eval.engine', 'mlm_eval.training', 'mlm_eval.tasks.',\n"
        "    'torch.distributed', 'transformers', 'datasets')\n"
        "found = [name for name in new if name.startswith(rooms)]\n"
        "print('imported:', *[name for name in found if name != 'mlm_eval.tasks.zero_shot'])\n"
    )
    for to in ("hf", "megatron"):  # torch_dist's metadata are objects of torch.distributed
        given = ["convert", "--ckpt", SAMPLE, "--to", to, "--output", tmp_path / to]
        command = [sys.executable, "-c", code, *map(str, given)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "imported:"


def test_a_fault_far_from_the_probe_is_found_in_the_result(tmp_path: Path) -> None:
    """A row of the input table that no token of the probe reads: the tensors are compared too."""
    model = dataclasses.replace(
        LLAMA, vocab_size=9_000, max_position_embeddings=4, num_layers=1, hidden_size=32
    )
    source = checkpoint(model)
    row = next(iter(set(range(9_000)) - set(probe(model, 9_000)["tokens"].flatten().tolist())))

    def compare_broken(source: Checkpoint, folder: Path, **expected: Any) -> Comparison:
        weights = folder / "model.safetensors"
        state = load_file(weights)
        state["model.embed_tokens.weight"][row, 3] += 1.0
        save_file(state, weights, metadata={"format": "pt"})
        return verify_conversion(source, folder, **expected)

    name = re.escape(f"embedding.word_embeddings.weight [{row}, 3]")
    with pytest.raises(InputError, match=f"differs from its source by .*{name}.*not written"):
        convert(source, "hf", tmp_path / "out", verify=True, compare=compare_broken)
    assert list(tmp_path.iterdir()) == []


SPREAD = {
    "gpt2": GPT,
    "llama": dataclasses.replace(LLAMA, rope_scaling=RopeScaling(2.0, 1.0, 4.0, 16)),
    "neox": dataclasses.replace(GPT, position_embedding_type="rope", rotary_percent=0.5),
    "bert": dataclasses.replace(BERT, apply_residual_connection_post_layernorm=True),
    "megatron-bert": BERT,
    "bert-model": dataclasses.replace(BERT, lm_head=False, binary_head=False),
    "choices": dataclasses.replace(BERT, lm_head=False, binary_head=False, multichoice_head=True),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", SPREAD)
@pytest.mark.parametrize("fits", [True, False])
def test_transformers_computes_the_same_up_to_the_last_position(
    kind: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the positions of the probe have gaps, because not all of them fit."""
    model = dataclasses.replace(SPREAD[kind], max_position_embeddings=64)
    if not fits:
        monkeypatch.setattr(verify, "PROBE_POSITIONS", 9)
    inputs = probe(model, model.vocab_size)
    assert ("positions" in inputs) == (not fits)
    source = checkpoint(model)
    convert(source, "hf", tmp_path / "hf")
    theirs = transformers_outputs(tmp_path / "hf", inputs)
    found = compare(outputs(source, inputs), theirs, inputs)
    assert found.same and found.last_position == 63
    assert found.tokens == int(inputs.get("padding_mask", torch.ones_like(inputs["tokens"])).sum())
    # The last position decides: without it the same tokens give something else.
    if not fits:
        ours = outputs(source, {**inputs, "positions": torch.arange(9)})
        assert not compare(ours, theirs, inputs).same


def test_models_of_two_kinds_are_not_compared(sample: Checkpoint) -> None:
    with pytest.raises(InputError, match="GPT model and .* BERT model"):
        compare_checkpoints(sample, open_checkpoint(ORACLES / "v25_bert_tp2_fusedgelu"))


def test_not_a_number_is_a_difference() -> None:
    inputs = {"tokens": torch.zeros(1, 2, dtype=torch.int64)}
    ours = {"logits": torch.zeros(1, 2, 4)}
    theirs = {"logits": torch.full((1, 2, 4), torch.nan)}
    assert not compare(ours, theirs, inputs).same


def test_logits_are_compared_over_the_rows_that_the_verdict_is_about() -> None:
    inputs = {"tokens": torch.zeros(1, 2, dtype=torch.int64)}
    logits = torch.randn(1, 2, 6)
    other = torch.cat([logits[..., :4], torch.randn(1, 2, 2)], -1)
    assert compare({"logits": logits}, {"logits": other}, inputs, entries=4).max_difference == 0.0
    assert not compare({"logits": logits}, {"logits": other}, inputs).same
    fewer = compare({"logits": logits}, {"logits": logits[..., :4]}, inputs)
    assert fewer.max_difference == 0.0


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_what_passes_is_relative_to_the_spread_of_the_outputs(scale: float) -> None:
    """Small weights give small logits: an absolute limit would pass everything."""
    draws = torch.Generator().manual_seed(3)
    inputs = {"tokens": torch.zeros(2, 8, dtype=torch.int64)}
    logits = torch.randn(2, 8, 50, generator=draws) * scale
    noise = torch.randn(2, 8, 50, generator=draws) * scale
    for name in ("logits", "states"):
        assert compare({name: logits}, {name: logits + 1e-5 * noise}, inputs).same
        assert not compare({name: logits}, {name: logits + 1e-3 * noise}, inputs).same


def test_outputs_that_one_side_alone_gives_are_a_difference() -> None:
    inputs = {"tokens": torch.zeros(1, 2, dtype=torch.int64)}
    states, head = {"states": torch.randn(1, 2, 4)}, {"binary_head": torch.randn(1, 2)}
    found = compare(states | head, states, inputs)
    assert found.max_difference == 0.0 and not found.same
    assert found.differences() == ["only --ckpt gives binary_head"]
    assert compare(states, head, inputs).differences() == [
        "only --ckpt gives states",
        "only --against gives binary_head",
    ]


def test_the_probe_reaches_the_last_position_and_takes_each_id_once() -> None:
    for model, rows in ((GPT, 2), (BERT, 2)):
        inputs = probe(model, model.vocab_size)
        assert inputs["tokens"].shape == (rows, model.max_position_embeddings)
        assert inputs["tokens"].unique().numel() == min(inputs["tokens"].numel(), model.vocab_size)
    long = dataclasses.replace(LLAMA, max_position_embeddings=131_072, vocab_size=128_256)
    inputs = probe(long, long.vocab_size)
    assert inputs["tokens"].numel() * 4 * long.vocab_size <= verify.PROBE_BYTES
    assert inputs["tokens"].unique().numel() == inputs["tokens"].numel()
    positions = inputs["positions"]
    assert (int(positions[0]), int(positions[-1])) == (0, 131_071)
    assert bool((positions.diff() > 0).all())
    bloom = dataclasses.replace(long, position_embedding_type="alibi")
    assert "positions" not in probe(bloom, bloom.vocab_size)
    gpt2 = dataclasses.replace(GPT, max_position_embeddings=1024, vocab_size=50_257)
    assert probe(gpt2, gpt2.vocab_size)["tokens"].shape == (1, 1024)


def test_unknown_options_of_a_conversion(sample: Checkpoint, tmp_path: Path) -> None:
    for options, part in (
        ({"dtype": "int8"}, "--dtype 'int8' is unknown"),
        ({"vocab": "true"}, "needs the tokenizer's size"),
    ):
        with pytest.raises(InputError, match=part):
            convert(sample, "hf", tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--to 'onnx' is unknown"):
        convert(sample, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_computed_on_the_cpu_also_where_there_is_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr("mlm_eval.engine.engine.default_device", lambda: "cuda:0")
    found = outputs(checkpoint(GPT), {"tokens": torch.tensor([[1, 2, 3]])})
    assert found["logits"].device.type == "cpu"
