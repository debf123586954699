"""verify and convert --verify: that they pass what is right and catch what is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paths import PROJECT

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.comparison import Comparison
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import find_tokenizer
from mlm_eval.engine.verify import TOLERANCE, compare, compare_checkpoints, verify_conversion

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
    assert done.comparison is not None
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


def test_models_of_two_kinds_are_not_compared(sample: Checkpoint) -> None:
    with pytest.raises(InputError, match="GPT model and .* BERT model"):
        compare_checkpoints(sample, open_checkpoint(ORACLES / "v25_bert_tp2_fusedgelu"))


def test_not_a_number_is_a_difference() -> None:
    inputs = {"tokens": torch.zeros(1, 2, dtype=torch.int64)}
    ours = {"logits": torch.zeros(1, 2, 4)}
    theirs = {"logits": torch.full((1, 2, 4), torch.nan)}
    assert not compare(ours, theirs, inputs).same


def test_padding_rows_of_a_vocabulary_do_not_count() -> None:
    inputs = {"tokens": torch.zeros(1, 2, dtype=torch.int64)}
    logits = torch.randn(1, 2, 6)
    assert compare({"logits": logits}, {"logits": logits[..., :4]}, inputs).max_difference == 0.0


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
