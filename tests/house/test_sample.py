"""The sample that ships: its size, its texts, and that its model has really learned."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import re
import sys
from collections import Counter
from types import ModuleType

import pytest
import torch
from support.paths import PROJECT, SAMPLES

import mlm_eval
from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.tokenizer import Tokenizer, find_tokenizer
from mlm_eval.reporting.results import Result
from mlm_eval.tasks.zero_shot.wikitext103 import count_original_tokens, detokenize

WIKITEXT = SAMPLES / "text" / "wiki.sample.tokens"
LAMBADA = SAMPLES / "text" / "lambada.sample.jsonl"


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    """scripts/sample_corpus.py, which is not part of the package."""
    path = PROJECT / "scripts" / "sample_corpus.py"
    spec = importlib.util.spec_from_file_location("sample_corpus", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return mlm_eval.open_checkpoint(SAMPLES / "gpt")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = find_tokenizer(SAMPLES / "gpt")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def wikitext(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Result:
    engine = mlm_eval.Engine.load(checkpoint)
    return mlm_eval.evaluate("wikitext103", engine, data=WIKITEXT, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def lambada(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Result:
    engine = mlm_eval.Engine.load(checkpoint)
    return mlm_eval.evaluate("lambada", engine, data=LAMBADA, tokenizer=tokenizer)


def unigram_entropy(tokens: list[int]) -> float:
    """Nats per token of the best unigram model there is for these very tokens: their own counts."""
    counts = Counter(tokens)
    total = len(tokens)
    return -sum(n / total * math.log(n / total) for n in counts.values())


def test_the_sample_is_small() -> None:
    files = [path for path in SAMPLES.rglob("*") if path.is_file()]
    assert files
    assert sum(path.stat().st_size for path in files) < 9_000_000


def test_the_checkpoint_is_what_megatron_writes(checkpoint: Checkpoint) -> None:
    found = checkpoint.provenance
    assert found.format == "megatron-torch"
    assert (found.tensor_parallel, found.pipeline_parallel) == (2, 1)
    assert found.checkpoint_version == 3.0
    assert found.warnings == [] and found.pickle_classes == []
    tracker = (SAMPLES / "gpt" / "latest_checkpointed_iteration.txt").read_text()
    assert found.iteration == int(tracker) == found.args["iteration"]
    # Padding rows exist, so that --vocab padded and --vocab true are different things here.
    config = checkpoint.config
    assert config.vocab_size == found.args["padded_vocab_size"] == 2048
    assert config.activation == "gelu_tanh" and config.params_dtype == "float16"


def test_plain_torch_opens_the_files() -> None:
    """Seen without our reader: Megatron's nesting and names, half of the model in each file."""
    for rank in range(2):
        folder = next((SAMPLES / "gpt").glob("iter_*")) / f"mp_rank_{rank:02d}"
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(folder / "model_optim_rng.pt", weights_only=True)
        assert saved["checkpoint_version"] == 3.0
        args = saved["args"]
        assert (args.tensor_model_parallel_size, args.rank, args.num_layers) == (2, rank, 4)
        assert args.tokenizer_type == "GPT2BPETokenizer" and args.params_dtype == torch.float16
        model = saved["model"]["language_model"]
        table = model["embedding"]["word_embeddings"]["weight"]
        assert table.shape == (args.padded_vocab_size // 2, args.hidden_size)
        layer = model["encoder"]
        assert layer["layers.3.self_attention.query_key_value.weight"].shape == (3 * 128 // 2, 128)
        assert layer["layers.3.mlp.dense_4h_to_h.weight"].shape == (128, 512 // 2)
        assert layer["final_layernorm.bias"].dtype == torch.float16


@pytest.mark.parametrize(
    "text",
    [
        'The module\'s "import" system, as of 3.11 — naïve, 日本語, 🙂',
        " leading\t\r\n  and trailing  \n\n",
        "".join(map(chr, range(1, 0x250))),
        "x\x00y",
        "<|endoftext|> is a string like any other",
    ],
)
def test_the_tokenizer_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizer_is_like_gpt2s(tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    assert tokenizer.kind == "gpt2-bpe"
    assert tokenizer.eot_id == tokenizer.vocab_size - 1
    assert tokenizer.vocab_size <= checkpoint.config.vocab_size
    assert not tokenizer.missing_bytes
    merges = (SAMPLES / "gpt" / "tokenizer" / "merges.txt").read_text(encoding="utf-8")
    assert len(merges.splitlines()) - 1 == tokenizer.vocab_size - 256 - 1


def test_the_stored_texts_are_those_of_the_record() -> None:
    record = json.loads((SAMPLES / "text" / "corpus.json").read_text())
    for path in (WIKITEXT, LAMBADA):
        content = path.read_bytes()
        expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert record["files"][path.name] == expected


def test_the_text_has_wikitexts_form() -> None:
    text = WIKITEXT.read_text(encoding="utf-8")
    lines = text.split("\n")
    assert lines.pop() == ""
    assert all(line.startswith(" ") and line.endswith(" ") for line in lines)
    assert re.match(r" \n = [^=]+ = \n \n", text)
    words = text.split()
    assert 5_000 < len(words) < count_original_tokens(text) < 15_000
    assert 0.005 < words.count("<unk>") / len(words) < 0.03
    for mark in ("@-@", "@.@", "'s", ",", ".", ":", "(", ")", '"', "="):
        assert mark in words, mark


def test_the_detokenizer_has_work_to_do() -> None:
    """Its rules leave running text behind: what they are for is there before and gone after."""
    text = WIKITEXT.read_text(encoding="utf-8")
    running = detokenize(text)
    for spaced in (" @-@ ", " @.@ ", " , ", " . ", " ; ", "= =", " 's", "( ", " )", " \n", "\n "):
        assert spaced in text and spaced not in running, spaced
    assert "\n= Execution model =\n\n" in running
    assert running.count("\n== ") == text.count("\n = = ") - text.count("\n = = = ")


def test_cloze_passages_end_in_a_word_of_the_passage() -> None:
    passages = [json.loads(line)["text"] for line in LAMBADA.read_text().splitlines()]
    assert 60 <= len(passages) == len(set(passages)) <= 100
    for passage in passages:
        before, word = passage.rsplit(maxsplit=1)
        assert word.isalpha() and re.search(rf"\b{word}\b", before), passage


def test_words_are_split_as_wikitext_splits_them(corpus: ModuleType) -> None:
    text = (
        "An object's well-known sys.path (e.g. \"x.y\") costs 1,000 or 3.5, i.e. 'a lot'... Stop."
    )
    assert corpus.split_words(text) == (
        'An object \'s well @-@ known sys.path ( e.g. " x.y " ) costs 1 @,@ 000 or 3 @.@ 5 , i.e. '
        "' a lot ' ... Stop ."
    ).split(" ")


@pytest.mark.long
def test_nothing_held_out_is_in_the_training_text(corpus: ModuleType) -> None:
    """On this Python, whose topics may be others than those the sample was made from."""

    def runs(text: str) -> set[str]:
        words = re.findall(r"[a-z0-9]+|<unk>", text.lower())
        return {" ".join(words[i : i + 8]) for i in range(len(words) - 7)}

    training = corpus.training_articles()
    seen = set().union(*(runs(paragraph) for a in training for paragraph in a.paragraphs))
    assert len(seen) > 100_000
    held_out = re.sub(r" @(.)@ ", r"\1", WIKITEXT.read_text(encoding="utf-8")).splitlines()
    for line in LAMBADA.read_text(encoding="utf-8").splitlines():
        held_out += json.loads(line)["text"].split("\n")
    tested = set().union(*map(runs, held_out))
    assert len(tested) > 5_000
    assert not seen & tested


@pytest.mark.long
def test_perplexity_is_far_below_a_unigram_models(wikitext: Result, tokenizer: Tokenizer) -> None:
    """The baseline knows the counts of the very text that it is tested on; the model does not."""
    tokens = tokenizer.encode(detokenize(WIKITEXT.read_text(encoding="utf-8")))
    ratio = wikitext.metrics["token_ratio"]
    unigram = math.exp(unigram_entropy(tokens[1:]) * ratio)
    assert wikitext.counts["scored_tokens"] == len(tokens) - 1
    assert unigram > 1000
    assert wikitext.metrics["adjusted_ppl"] < unigram / 5


@pytest.mark.long
def test_the_held_out_text_is_not_known_by_heart(wikitext: Result) -> None:
    assert wikitext.metrics["adjusted_ppl"] > 30


def test_cloze_accuracy_is_neither_chance_nor_perfect(lambada: Result) -> None:
    passages = [json.loads(line)["text"] for line in LAMBADA.read_text().splitlines()]
    commonest = Counter(passage.split()[-1] for passage in passages).most_common(1)[0][1]
    assert lambada.counts["examples"] == len(passages)
    assert 2 * commonest < lambada.metrics["num_correct"] < 0.8 * len(passages)
