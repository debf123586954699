"""lambada and the harness on a folder as gpt-neox leaves it, with the tokenizer found beside.

The same model in Hugging Face's form, which plain transformers loads, gives the same figures.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_models
from support.command_line import Ended, Run, read
from support.folders.deepspeed_folders import write_neox
from support.paths import SAMPLES

import mlm_eval
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import check_fits, find_tokenizer
from mlm_eval.engine.plain_transformers import transformers_outputs

pytest_plugins = ["support.command_line_fixtures"]

ROWS = 512
"""Of the vocabulary, padding included."""
NAME = "20B_tokenizer.json"

TASK = """task: local_cloze
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""


def write_tokenizer(path: Path) -> int:
    """Write a tokenizer of GPT-NeoX-20B's kind, and return its number of entries.

    A byte-level BPE behind NFC, whose added tokens are runs of spaces beside `<|endoftext|>`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (SAMPLES / "text" / "wiki.sample.tokens").read_text(encoding="utf-8")
    tokenizer.train_from_iterator(text.splitlines()[:400], trainer)
    spaces = [AddedToken(" " * count, normalized=True) for count in range(24, 1, -1)]
    tokenizer.add_tokens(spaces)
    tokenizer.save(str(path))
    return int(tokenizer.get_vocab_size())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a gpt-neox root, the same model for transformers, and passages."""
    folder = tmp_path_factory.mktemp("neox")
    config: ModelConfig = dataclasses.replace(
        random_models.GPT,
        vocab_size=ROWS,
        max_position_embeddings=64,
        position_embedding_type="rope",
        rotary_percent=0.25,
        parallel_residual=True,
        untie_embeddings_and_output_weights=True,
    )
    model = random_models.state_dict(config)
    root = write_neox(
        folder / "run",
        model,
        config,
        tp=2,
        vocab_file=f"/data/of/the/cluster/{NAME}",
        tokenizer_type="HFTokenizer",
    )
    write_tokenizer(root / NAME)
    texts = (SAMPLES / "text" / "lambada.sample.jsonl").read_text(encoding="utf-8").splitlines()
    shortened = [" ".join(json.loads(text)["text"].split(" ")[-10:]) for text in texts[:8]]
    shortened.append("two  spaces and a    run of them end here")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in shortened)
    (folder / "passages.jsonl").write_text(rows)
    mlm_eval.convert(open_checkpoint(root), "hf", folder / "hf", tokenizer=root / NAME)
    return folder


def metrics(ended: Ended, output: Path) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    found: dict[str, Any] = read(output)["metrics"]
    return found


@pytest.mark.parametrize("door", ["", "global_step7", "latest", "global_step7/configs"])
def test_the_tokenizer_beside_is_found_from_every_door(door: str, study: Path):
    if door.endswith("configs"):
        assert find_tokenizer(study / "run" / door) is None
        return
    found = find_tokenizer(study / "run" / door)
    assert found is not None
    assert found.kind == "tokenizer.json" and str(found.source).endswith(NAME)
    assert found.decode(found.encode("a  b    c")) == "a  b    c"
    padding = ROWS - found.vocab_size
    assert 0 < padding < 128  # the model has rows for none


def test_lambada_on_the_folder_as_it_is(study: Path, run: Run, tmp_path: Path):
    data = ("--data", study / "passages.jsonl", "--limit", 9)
    given = ("--tokenizer", study / "run" / NAME)
    figures = []
    for name, ckpt, more in (
        ("root", "run", ()),
        ("file", "run/global_step7/layer_02-model_01-model_states.pt", given),
        ("hf", "hf", ()),
    ):
        output = tmp_path / f"{name}.json"
        vocab = () if ckpt == "hf" else ("--vocab", "true")
        ended = run("lambada", "--ckpt", study / ckpt, *data, *more, *vocab, "--output", output)
        figures.append(metrics(ended, output))
    record = read(tmp_path / "root.json")
    assert record["checkpoint"]["format"] == "deepspeed"
    assert record["counts"]["examples"] == 9
    for found in figures:
        assert found["num_correct"] == figures[-1]["num_correct"]
        assert found["target_ppl"] == pytest.approx(figures[-1]["target_ppl"], rel=1e-5)


@pytest.mark.process
@pytest.mark.long
def test_the_harness_on_the_folder_as_it_is(study: Path, tmp_path: Path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra lm-eval)")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = TASK.format(data=study / "passages.jsonl", cache=tmp_path / "cache")
    (tasks / "local_cloze.yaml").write_text(task)
    command = [sys.executable, "-P", "-m", "mlm_eval", "harness", "--ckpt", study / "run"]
    command += ["--vocab", "true", "--", "--tasks", "local_cloze", "--include_path", tasks]
    command += ["--output_path", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(record.read_text())["results"]["local_cloze"]
    found = next(value for key, value in results.items() if key.startswith("perplexity,"))
    assert found == pytest.approx(cloze_perplexity(study), rel=1e-4)


def cloze_perplexity(study: Path) -> float:
    """Return e to the mean loss of the passages' last words, by plain transformers."""
    words = find_tokenizer(study / "hf")
    assert words is not None
    losses = []
    for line in (study / "passages.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = words.encode(text)
        context = len(words.encode(text.rpartition(" ")[0]))
        assert context < len(ids) <= 64
        logits = transformers_outputs(study / "hf", {"tokens": torch.tensor([ids])})["logits"][0]
        scores = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])
        losses.append(-scores[context - 1 :].sum().item())
    return math.exp(sum(losses) / len(losses))


def test_a_tokenizer_larger_than_the_model_is_refused(study: Path):
    found = find_tokenizer(study / "run")
    assert found is not None
    with pytest.raises(InputError, match="it is not the tokenizer of this model"):
        check_fits(found, found.vocab_size - 1)
