"""Text to samples, new models, and short trainings of masked and causal language models."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import random_models
from support.ranks import run_ranks

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import num_parameters
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer
from mlm_eval.engine.engine import Engine
from mlm_eval.model.initial import new_checkpoint, with_head
from mlm_eval.model.sizes import SIZES, initial_config
from mlm_eval.tasks.language.data import (
    MaskedText,
    SampleRange,
    SpecialTokens,
    TextWindows,
    TokenizedText,
    read_documents,
    tokenize_documents,
)
from mlm_eval.tasks.language.pretraining import check_start, pretrain, start_from, text_metrics
from mlm_eval.tasks.language.settings import MaskedTextSettings, TextSettings
from mlm_eval.training.data import NO_LABEL, Sample, collate
from mlm_eval.training.objectives import CausalLM, MaskedLM
from mlm_eval.training.settings import TrainSettings

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "!", '"']
LETTERS = "abcdefghij"
PIECES += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
CLS, SEP, MASK = 2, 3, 4


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    """A WordPiece vocabulary of ten letters: every word is spelled."""
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    return load_tokenizer(vocab_file=path)


# --- Documents -----------------------------------------------------------------------------------


def test_documents_of_text_and_json_lines(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("a b.\nc d.\n \n\t\n\ne f.\n")
    lines.write_text('{"text": "g\\n\\nh"}\n\n{"text": "i", "title": "x"}\n{"text": " "}\n')
    found = list(read_documents([text, lines], whole_files=False))
    assert found == ["a b.\nc d.", "e f.\n", "g\n\nh", "i"]
    assert len(list(read_documents([text, lines], whole_files=True))) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt does not exist"),
        ("empty.txt", b" \n", "empty.txt holds no text"),
        ("latin.txt", b"caf\xe9", r"latin.txt, line 1 is not UTF-8 text \(byte 0xe9\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": 1}\n', "bad.jsonl, line 2: expected a JSON object"),
    ],
)
def test_files_that_are_no_text_are_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_documents([tmp_path / name], whole_files=False))


def test_sentences_and_documents_are_where_they_were(words):
    text = tokenize_documents(['ab c. "d!" e\nf', "g."], words, end=None, sentences=True)
    pieces = [PIECES[i] for i in text.tokens.tolist()]
    assert pieces == ["a", "##b", "c", ".", '"', "d", "!", '"', "e", "f", "g", "."]
    assert text.sentences.tolist() == [0, 4, 8, 9, 10, 12]
    assert text.documents.tolist() == [0, 10, 12]


def test_documents_end_with_the_end_of_text(words):
    text = tokenize_documents(["a b", "c"], words, end=1, sentences=False)
    assert [PIECES[i] for i in text.tokens.tolist()] == ["a", "b", "[UNK]", "c", "[UNK]"]
    assert text.documents.tolist() == [0, 3, 5]


# --- Masked text ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(words) -> TokenizedText:
    """Words of one to six letters in sentences of all lengths, some longer than a sample."""
    chance = np.random.default_rng(0)

    def sentence(count: int) -> str:
        letters = [chance.choice(list(LETTERS), size=chance.integers(1, 7)) for _ in range(count)]
        return " ".join("".join(word) for word in letters) + "."

    documents = [
        " ".join(sentence(int(chance.integers(1, 12))) for _ in range(int(chance.integers(1, 9))))
        for _ in range(60)
    ]
    documents += ["a", sentence(40)]
    return tokenize_documents(documents, words, end=None, sentences=True)


def masked(corpus: TokenizedText, words: Tokenizer, **changes: Any) -> MaskedText:
    values = {"length": 40, "seed": 3, "pairs": True}
    return MaskedText(corpus, SpecialTokens.of(words), **{**values, **changes})


def unmasked(sample: Sample) -> tuple[list[int], list[int], bool]:
    """Return segments A and B as they stand in the sample, and whether they were exchanged."""
    (row,), (types,) = sample.rows, sample.tokentypes
    assert isinstance(sample.label, torch.Tensor)
    hidden = sample.label.clone()
    hidden[0] = NO_LABEL
    tokens = torch.where(hidden == NO_LABEL, row, hidden).tolist()
    first = tokens.index(SEP)
    assert tokens[0] == CLS and tokens[-1] == SEP and tokens.count(SEP) == 2
    assert types.tolist() == [0] * (first + 1) + [1] * (len(tokens) - first - 1)
    return tokens[1:first], tokens[first + 1 : -1], bool(sample.label[0])


def test_a_sample_is_a_run_of_the_text_with_its_halves_exchanged_or_not(corpus, words):
    data = masked(corpus, words)
    tokens, covered, exchanged = corpus.tokens.tolist(), 0, 0
    sentences, documents = set(corpus.sentences.tolist()), corpus.documents.tolist()
    for index, sample in enumerate(data):
        first, second, swapped = unmasked(sample)
        start, stop = data.runs[index]
        if swapped:
            first, second = second, first
        assert first and second and first + second == tokens[start:stop]
        assert data.length(index) == sample.length <= 40 and sample.index == index
        assert not any(start < document < stop for document in documents)
        inside = [s for s in sentences if start < s < stop]
        assert start + len(first) in inside or (not inside and len(first) == (stop - start) // 2)
        covered, exchanged = covered + stop - start, exchanged + swapped
    # All but the document of a single token, and what a long sentence leaves over.
    assert len(tokens) - 5 < covered < len(tokens)
    assert 0.3 < exchanged / len(data) < 0.7


def test_a_share_of_whole_words_is_hidden(corpus, words):
    data = masked(corpus, words)
    special = SpecialTokens.of(words)
    kinds = {"mask": 0, "kept": 0, "other": 0}
    hidden_tokens = all_tokens = 0
    for epoch in range(4):
        data.set_epoch(epoch)
        for sample in data:
            assert isinstance(sample.label, torch.Tensor)
            row, label = sample.rows[0], sample.label
            first, second, _ = unmasked(sample)
            length = len(first) + len(second)
            hidden = label != NO_LABEL
            hidden[0] = False
            count = int(hidden.sum())
            assert 1 <= count <= max(1, round(0.15 * len(row)))
            hidden_tokens, all_tokens = hidden_tokens + count, all_tokens + length
            for place in hidden.nonzero().flatten().tolist():
                kind = "mask" if row[place] == MASK else "other"
                kinds["kept" if row[place] == label[place] else kind] += 1
                assert row[place] == MASK or row[place] in special.words
            original = torch.where(hidden, label, row)
            if count > 1:  # a single piece may be all that the share has room for
                for place in range(2, len(row)):
                    if special.continues[original[place]] and original[place - 1] != SEP:
                        assert hidden[place] == hidden[place - 1]
    assert 0.12 < hidden_tokens / all_tokens <= 0.16
    total = sum(kinds.values())
    assert kinds["mask"] / total == pytest.approx(0.8, abs=0.02)
    # One of 23 replacements is the token itself.
    assert kinds["kept"] / total == pytest.approx(0.1 + 0.1 / 23, abs=0.015)


def test_pieces_are_hidden_one_by_one_on_request(corpus, words):
    data = masked(corpus, words, whole_words=False)
    alone = 0
    for sample in data:
        label = sample.label
        assert isinstance(label, torch.Tensor)
        count = int((label[1:] != NO_LABEL).sum())
        # Of a full row of 40 the share is that of 37, [CLS] and both [SEP] left out.
        assert count == max(1, min(round(0.15 * sample.length), int(0.15 * 37)))
        original = torch.where(label == NO_LABEL, sample.rows[0], label)
        for place in range(2, sample.length):
            continues = SpecialTokens.of(words).continues[original[place]]
            alone += bool(
                continues and (label[place] != NO_LABEL) != (label[place - 1] != NO_LABEL)
            )
    assert alone > 50


def megatron_runs(word_lengths: list[int], wanted: float, chance: random.Random) -> set[int]:
    """Return which words Megatron hides, step by step as its data set does it.

    Source: `create_masked_lm_predictions` in Megatron-LM v2.5, megatron/data/dataset_utils.py.
    """
    hidden: set[int] = set()
    pieces = 0
    starts = list(range(len(word_lengths)))
    chance.shuffle(starts)
    for start in starts:
        if pieces >= wanted:
            break
        runs = [range(start, start + n) for n in (1, 2, 3) if start + n <= len(word_lengths)]
        choice = chance.choices(runs, [1 / len(run) for run in runs])[0]
        fitting = [
            run
            for run in runs[: len(choice)]
            if pieces + sum(word_lengths[word] for word in run) <= wanted
        ]
        if fitting and hidden.isdisjoint(fitting[-1]):
            hidden.update(fitting[-1])
            pieces += sum(word_lengths[word] for word in fitting[-1])
    return hidden


def run_lengths(hidden: set[int], count: int) -> list[int]:
    """Return the lengths of the runs of hidden words that stand together."""
    flags = "".join("x" if word in hidden else " " for word in range(count))
    return [len(run) for run in flags.split()]


@pytest.mark.long
@pytest.mark.parametrize("pieces", [(1,), (1, 1, 1, 2, 4)])
def test_runs_of_words_are_hidden_as_megatron_hides_them(words, pieces):
    """Lengths of runs and shares, against the rule step by step, over 400 rows of 512 tokens."""
    chance = random.Random(7)
    lengths = [chance.choice(pieces) for _ in range(210_000)]  # 411 rows and more
    tokens = [PIECES.index(name) for n in lengths for name in ("a", *["##b"] * (n - 1))]
    row = torch.tensor(tokens, dtype=torch.int32)
    ends = torch.tensor([0, len(tokens)])  # one long sentence, cut into rows
    data = masked(TokenizedText(row, ends, ends), words, length=512, pairs=False)
    ours, theirs, shares = Counter[int](), Counter[int](), Counter[str]()
    special = SpecialTokens.of(words)
    for sample in (data[index] for index in range(400)):
        assert isinstance(sample.label, torch.Tensor) and sample.length == 512
        at = (sample.label[1:-1] != NO_LABEL).tolist()
        original = torch.where(sample.label == NO_LABEL, sample.rows[0], sample.label)[1:-1]
        begins = np.flatnonzero(~special.continues[original] | (np.arange(len(original)) == 0))
        sizes = np.diff([*begins, len(original)]).tolist()
        hidden = {word for word, place in enumerate(begins) if at[place]}
        ours.update(run_lengths(hidden, len(sizes)))
        wanted = min(0.15 * 510, max(1, round(0.15 * 512)))
        expected = megatron_runs(sizes, wanted, chance)
        theirs.update(run_lengths(expected, len(sizes)))
        shares.update(ours=sum(at), theirs=sum(sizes[word] for word in expected))
    # Four standard errors of a share p of n runs on both sides, 4 sqrt(2 p (1 - p) / n).
    total, total_theirs = ours.total(), theirs.total()
    for length in range(1, 6):
        p = theirs[length] / total_theirs
        margin = 4 * (2 * p * (1 - p) / min(total, total_theirs)) ** 0.5
        assert ours[length] / total == pytest.approx(p, abs=margin), (ours, theirs)
    assert theirs[1] / total_theirs < 0.65  # one word after another would give 0.85
    assert shares["ours"] == pytest.approx(shares["theirs"], rel=0.005)


def test_seed_and_epoch_decide_what_is_hidden(corpus, words):
    data, again, other = (masked(corpus, words, seed=seed) for seed in (3, 3, 4))

    def same(one: MaskedText, two: MaskedText) -> float:
        return np.mean([torch.equal(a.rows[0], b.rows[0]) for a, b in zip(one, two, strict=True)])

    assert same(data, again) == 1.0 and same(data, other) < 0.2
    again.set_epoch(1)
    assert same(data, again) < 0.2
    again.set_epoch(0)
    assert same(data, again) == 1.0


def test_without_pairs_there_is_one_segment_and_no_order(corpus, words):
    for sample in masked(corpus, words, pairs=False):
        assert isinstance(sample.label, torch.Tensor)
        assert sample.label[0] == NO_LABEL and not sample.tokentypes[0].any()
        assert (sample.rows[0] == SEP).sum() == 1


def test_a_vocabulary_without_masks_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\na\n")
    with pytest.raises(InputError, match=r"has no \[MASK\]; masked-LM training needs a BERT"):
        SpecialTokens.of(load_tokenizer(directory=tmp_path))


# --- Windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "length"), [(13, 4), (12, 4), (2, 4), (5, 4), (6, 4)])
def test_windows_predict_every_token_once(tokens, length):
    row = torch.arange(tokens, dtype=torch.int32)
    data = TextWindows(TokenizedText(row, row, row), length=length)
    inputs = torch.cat([sample.rows[0] for sample in data])
    labels = torch.cat([sample.label for sample in data])  # type: ignore[misc]
    assert inputs.tolist() == list(range(tokens - 1))
    assert labels.tolist() == list(range(1, tokens))
    assert [data.length(i) for i in range(len(data))] == [sample.length for sample in data]


def test_a_part_of_a_data_set_is_numbered_anew(corpus, words):
    whole = masked(corpus, words)
    part = SampleRange(whole, 5, 9)
    assert len(part) == 4 and len(list(part)) == 4
    for index, sample in enumerate(part):
        assert sample.index == index and part.length(index) == sample.length
        assert torch.equal(sample.rows[0], whole[index + 5].rows[0])
    part.set_epoch(1)
    assert whole.epoch == 1


# --- Initial models ------------------------------------------------------------------------------


def test_initial_weights_are_megatrons():
    config = initial_config("bert-tiny", family="bert", vocab_entries=1000)
    assert config.vocab_size == 1024 and config.binary_head and config.ffn_hidden_size == 512
    tensors = {name: lazy.read() for name, lazy in new_checkpoint(config, seed=1).tensors.items()}
    for name, value in tensors.items():
        if name.endswith("bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = 0.02 / 2 if residual else 0.02  # two layers: 1 / sqrt(2 * 2)
            assert value.std().item() == pytest.approx(std, rel=0.12), name
    drawn = [v.flatten()[:200] for n, v in tensors.items() if v.dim() > 1 and "type" not in n]
    assert abs(torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)).max() < 0.4
    again = new_checkpoint(config, seed=1).tensors["pooler.dense.weight"].read()
    assert torch.equal(again, tensors["pooler.dense.weight"])
    other = new_checkpoint(config, seed=2).tensors["pooler.dense.weight"].read()
    assert not torch.equal(other, again)


def test_sizes_are_the_papers():
    found = {}
    for name in SIZES:
        family = "gpt" if name.startswith("gpt") else "bert"
        config = initial_config(name, family=family, vocab_entries=50257)
        found[name] = num_parameters(config) / 1e9
    assert found["gpt2-355m"] == pytest.approx(0.355, rel=0.01)
    assert found["gpt2-2.5b"] == pytest.approx(2.5, rel=0.02)
    assert found["gpt2-8.3b"] == pytest.approx(8.3, rel=0.01)
    assert found["gpt2-1.2b"] == pytest.approx(1.2, rel=0.02)
    assert found["gpt2-4.2b"] == pytest.approx(4.2, rel=0.01)


def test_a_file_describes_a_model_and_set_wins(tmp_path):
    path = tmp_path / "model.toml"
    path.write_text("num_layers = 2\nhidden_size = 12\nnum_attention_heads = 3\n")
    changes = {"apply_residual_connection_post_layernorm": True, "num_layers": 5}
    config = initial_config(path, family="bert", vocab_entries=130, overrides=changes)
    assert (config.num_layers, config.kv_channels, config.vocab_size) == (5, 4, 256)
    assert config.apply_residual_connection_post_layernorm


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("num_layers = 2\n", "does not describe a model"),
        ("num_layers = 2\nhidden_size = 8\nnum_attention_heads = 2\nwidth = 3\n", "width"),
        ('num_layers = 1\nhidden_size = 8\nnum_attention_heads = 2\nfamily = "gpt"\n', "is a gpt"),
        (
            "num_layers = 1\nhidden_size = 8\nnum_attention_heads = 2\nvocab_size = 9\n",
            "10 entries",
        ),
        ("num_layers = ", "is not a TOML file"),
    ],
)
def test_what_describes_no_model_is_refused(content, message, tmp_path):
    path = tmp_path / "model.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        initial_config(path, family="bert", vocab_entries=10)


def test_an_unknown_size_is_refused():
    with pytest.raises(InputError, match="bert-huge is neither a size nor a TOML file; sizes are"):
        initial_config("bert-huge", family="bert", vocab_entries=10)


def test_a_head_is_drawn_from_the_seed_and_kept_if_it_fits():
    source = random_models.checkpoint(random_models.BERT)
    first, again = (with_head(source, "classification_head", num_classes=3) for _ in range(2))
    head = first.tensors["classification_head.weight"].read()
    assert torch.equal(head, again.tensors["classification_head.weight"].read())
    assert 0.01 < head.std() < 0.03 and not first.tensors["classification_head.bias"].read().any()
    other = with_head(source, "classification_head", num_classes=3, seed=9)
    assert not torch.equal(head, other.tensors["classification_head.weight"].read())
    kept = with_head(first, "classification_head", num_classes=3, seed=9)
    assert torch.equal(head, kept.tensors["classification_head.weight"].read())
    assert not kept.provenance.warnings
    changed = with_head(first, "classification_head", num_classes=2)
    assert "has 3 outputs, this task needs 2" in changed.provenance.warnings[-1]
    for name in ("lm_head.dense.weight", "binary_head.weight", "output_layer.bias"):
        assert name in source.tensors and name not in first.tensors


def test_a_missing_pooler_is_drawn_with_a_warning():
    base = dataclasses.replace(random_models.BERT, pooler=False, binary_head=False)
    with_pooler = with_head(random_models.checkpoint(base), "multichoice_head")
    assert with_pooler.config.pooler and "no pooler" in with_pooler.provenance.warnings[-1]
    answers = with_head(random_models.checkpoint(random_models.BERT), "qa_head")
    assert not answers.config.pooler and not answers.provenance.warnings


def test_a_gpt_gets_no_task_head():
    with pytest.raises(InputError, match="is a GPT checkpoint; fine-tuning needs a BERT"):
        with_head(random_models.checkpoint(random_models.GPT), "qa_head")


# --- Whole trainings -----------------------------------------------------------------------------

SMALL = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}


STEPS = {"mlm": 40, "lm": 30}
TEXTS: dict[str, type[TextSettings]] = {"mlm": MaskedTextSettings, "lm": TextSettings}


def trained(tp: int, dp: int, kind: str, folder: Path) -> dict[str, Any]:
    """Train a small model on text that is easy to learn."""
    words = load_tokenizer(directory=folder)
    init = {"mlm": "bert-tiny", "lm": "gpt2-tiny"}[kind]
    given = TEXTS[kind](data=[folder / "text.txt"], dev_share=0.2)
    model = start_from(given, init=init, tokenizer=words, seed=1, overrides=SMALL)
    settings = TrainSettings(
        lr=1e-2,
        max_steps=STEPS[kind],
        global_batch=16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        evaluate_every=1000,
    )
    result = pretrain(
        Engine.load(model, tp=tp, dp=dp, dtype="float32"),
        words,
        given,
        settings,
        output_dir=folder / f"out-{tp}-{dp}",
    )
    return json.loads(result.to_json())


@pytest.fixture
def text(words, tmp_path) -> Path:
    """Documents of one letter each, which tells all that is hidden in them."""
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    lines = [" ".join([LETTERS[i % 10]] * 12) + "." for i in range(100)]
    (tmp_path / "text.txt").write_text("\n\n".join("\n".join([line] * 4) for line in lines))
    return tmp_path


@pytest.mark.parametrize("kind", ["mlm", "lm"])
def test_a_small_model_learns_and_the_layout_changes_nothing(kind, text):
    (one,) = run_ranks(1, trained, 1, 1, kind, text)
    metrics = one["metrics"]
    # Guessing one of eleven letters and marks would cost 2.4 nats.
    loss = metrics.get("lm_loss", metrics["loss"])
    assert loss < 1.5 and metrics["accuracy"] > 0.5
    assert metrics["perplexity"] == pytest.approx(np.exp(loss))
    assert one["counts"]["steps"] == STEPS[kind] and one["counts"]["dev_samples"] > 10
    for two in run_ranks(2, trained, 2, 1, kind, text):
        assert two["metrics"]["loss"] == pytest.approx(metrics["loss"], rel=1e-3)
    folder = text / "out-2-1"
    assert json.loads((folder / "result.json").read_text())["task"] == kind
    checkpoint = open_checkpoint(folder / "checkpoint")
    assert load_tokenizer(directory=folder / "checkpoint" / "tokenizer").vocab_size == len(PIECES)
    assert checkpoint.config.vocab_size == 128
    # A new BERT has Megatron v2.5's names, args and rows: 128 of them for one rank, not for two.
    source, args = checkpoint.provenance, checkpoint.provenance.args
    assert (source.names, source.tensor_parallel) == {"mlm": ("legacy", 1), "lm": ("core", 2)}[kind]
    assert args["tokenizer_type"] == "BertWordPieceLowerCase"
    assert args["padded_vocab_size"] == 128
    if kind == "mlm":
        assert args["make_vocab_size_divisible_by"] == 128
    engine = Engine.load(checkpoint)
    again = TEXTS[kind](data=[text / "text.txt"], dev_share=0.2)
    assert check_start(again, checkpoint, load_tokenizer(directory=text)) == []
    assert engine.config.family == again.family == {"mlm": "bert", "lm": "gpt"}[kind]


@pytest.mark.long
def test_a_measure_is_the_mean_over_tokens_of_any_batches(corpus, words):
    engine = Engine.load(random_models.checkpoint(random_models.BERT), batch_tokens=70)
    data = masked(corpus, words, length=16)
    found = text_metrics(engine, data)
    losses, orders, right, hits, count = 0.0, 0.0, 0.0, 0.0, 0
    for sample in data:
        batch = collate([sample])
        loss, hit, predicted, order = MaskedLM().parts(engine.model, batch, None)
        losses, hits = losses + float(loss), hits + float(hit)
        assert order is not None
        exchanged = batch.labels[:, 0]
        orders += float(torch.nn.functional.cross_entropy(order, exchanged))
        right, count = right + float(order.argmax() == exchanged), count + predicted
    assert found["lm_loss"] == pytest.approx(losses / count, rel=1e-5)
    assert found["order_loss"] == pytest.approx(orders / len(data), rel=1e-5)
    assert found["loss"] == found["lm_loss"] + found["order_loss"] == -found["score"]
    assert found["perplexity"] == pytest.approx(np.exp(found["lm_loss"]))
    assert found["accuracy"] == hits / count and found["order_accuracy"] == right / len(data)


def test_the_weight_of_a_sample_is_its_predicted_tokens(corpus, words):
    sample = masked(corpus, words)[0]
    assert isinstance(sample.label, torch.Tensor)
    assert MaskedLM().weight(sample) == int((sample.label[1:] != NO_LABEL).sum())
    assert CausalLM().weight(sample) == int((sample.label != NO_LABEL).sum())


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("mlm", random_models.GPT, "is a GPT model; train it with mlm-eval lm"),
        ("lm", random_models.BERT, "is a BERT model; train it with mlm-eval mlm"),
        (
            "mlm",
            dataclasses.replace(random_models.BERT, lm_head=False, binary_head=False),
            "has no language-model head",
        ),
        ("lm", dataclasses.replace(random_models.GPT, vocab_size=20), "28 entries"),
        (
            "lm",
            dataclasses.replace(random_models.GPT, no_mixer_layers=(1,)),
            "has layers of different kinds, which mlm-eval evaluates and does not train",
        ),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(kind, model, message, words):
    with pytest.raises(InputError, match=message):
        check_start(TEXTS[kind](data=[Path("a")]), random_models.checkpoint(model), words)


def test_impossible_text_settings_are_refused():
    with pytest.raises(InputError, match="--mask-probability is 1.5"):
        MaskedTextSettings(data=[Path("a")], mask_probability=1.5)
    with pytest.raises(InputError, match="no training text was given"):
        TextSettings(data=[])
