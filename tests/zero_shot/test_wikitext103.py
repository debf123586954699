"""WikiText-103: detokenizer, windows, figures and data against Megatron's own rules and output."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.random_models import byte_vocabulary
from support.runs.scripted_engine import NothingDone, ScriptedEngine, log_prob

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer
from mlm_eval.engine.engine import Engine
from mlm_eval.reporting.results import Result
from mlm_eval.tasks.zero_shot import wikitext103
from mlm_eval.tasks.zero_shot.benchmark import Work
from mlm_eval.tasks.zero_shot.wikitext103 import WIKITEXT103, WikiTextOptions, token_ratio

SMALL_TEXT = (
    ' \n = A title = \n \n He said : " some @-@ thing , else " . It <unk> \'s 1 @,@ 234 @.@ 5 '
    "( so ) ! \n It went on ; and ended ? \n \n"
)


# --- Detokenizing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the dogs ' tails", "the dogs' tails"),
        ("see /' 7/ there", "see /'[0-9]/ there"),  # Megatron's slip, kept
        ("see /' x/ there", "see /' x/ there"),
        ("well @-@ known 1 @,@ 000 @.@ 5", "well-known 1,000.5"),
        ("a : b ; c . d ! e ? f , g", "a: b; c. d! e? f, g"),
        ("the end .", "the end ."),  # a mark at the very end has no space behind it
        ("x ( a b ) y", "x (a b) y"),
        ("x ( a [ b ) c ] y", "x (a [b) c] y"),  # to the next closing mark, nested or not
        ("f( a ( b ) c )", "f(a ( b) c )"),
        ("[ a ] { b }", "[a] {b}"),
        ('he said " one \n two " . " three " .', 'he said "one\ntwo". "three" .'),
        ("rock ' n ' roll", "rock 'n' roll"),
        ("( \n )", "()"),
        ("= = = = A = = = =", "==== A ===="),
        ("= = = A = = =", "=== A ==="),
        ("= = A = =", "== A =="),
        ("5 \N{DEGREE SIGN} C", "5\N{DEGREE SIGN}C"),
        (" \n = T = \n \n x \n", "\n= T =\n\nx\n"),
        ("a N b", "a 1 b"),
        ("the cat 's tail", "the cat's tail"),
        ("<unk> and <unk>", "<unk> and <unk>"),
        ("", ""),
    ],
)
def test_detokenizer_rules(text, expected):
    assert wikitext103.detokenize(text) == expected


def test_detokenizer_applies_its_rules_in_order():
    # "s '" goes first, so that the mark before "s" no longer opens a pair.
    assert wikitext103.detokenize("dogs ' tails ' end") == "dogs' tails ' end"[:4] + "'tails' end"
    # A number's " @,@ " has become "," before " , " is looked for.
    assert wikitext103.detokenize("1 @,@ 2 , 3") == "1,2, 3"


def their_detokenizer() -> Callable[[str], str]:
    """Return lm-evaluation-harness's copy of the same rules, loaded without its package."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or package.origin is None:
        pytest.skip("lm_eval is not installed")
    path = Path(package.origin).parent / "tasks" / "wikitext" / "preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("preprocess_wikitext", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda text: module.wikitext_detokenizer({"page": text})


def test_detokenizer_agrees_with_another_on_random_marks():
    theirs = their_detokenizer()
    pieces = list("()[]{}\"'s =/7aN:;.!?,\t\n\x1c\u00a0\N{DEGREE SIGN}")
    pieces += ["  ", " \n ", "@-@", "@,@", "@.@", "'s", "/' 7/"]
    generator = random.Random(0)
    for _ in range(4000):
        text = "".join(generator.choices(pieces, k=generator.randrange(24)))
        text = text if generator.random() < 0.5 else " ".join(text)
        assert wikitext103.detokenize(text) == theirs(text), repr(text)


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    ["wikitext-103/wiki.test.tokens", "wikitext-103/wiki.test.raw", "wikitext-2/wiki.test.tokens"],
)
def test_detokenizer_agrees_with_another_on_the_real_files(shared_data, name):
    text = (shared_data / name).read_bytes().decode()
    assert wikitext103.detokenize(text) == their_detokenizer()(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a b c", 3), (" \n a b \n ", 2), ("a \n b", 3), ("a  b", 3), ("a\nb", 1), ("one", 1)],
)
def test_words_are_what_stands_between_single_spaces(text, words):
    assert wikitext103.count_original_tokens(text) == words


# --- Windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "seq_length", "stride", "expected"),
    [
        (17, 8, 4, [(0, 9, 8), (4, 13, 4), (8, 17, 4)]),
        (18, 8, 4, [(0, 9, 8), (4, 13, 4), (8, 17, 4), (12, 18, 1)]),
        (16, 8, 4, [(0, 9, 8), (4, 13, 4), (8, 16, 3)]),
        (9, 8, 4, [(0, 9, 8)]),
        (5, 8, 4, [(0, 5, 4)]),  # fewer tokens than one window
        (2, 8, 4, [(0, 2, 1)]),
        (1, 8, 4, []),
        (12, 4, 4, [(0, 5, 4), (4, 9, 4), (8, 12, 3)]),  # stride = window: all targets of each
        (6, 3, 1, [(0, 4, 3), (1, 5, 1), (2, 6, 1)]),
        (4, 1, 1, [(0, 2, 1), (1, 3, 1), (2, 4, 1)]),
        (12, 5, 3, [(0, 6, 5), (3, 9, 3), (6, 12, 3)]),  # a stride that does not divide
    ],
)
def test_windows(num_tokens, seq_length, stride, expected):
    assert wikitext103.strided_windows(num_tokens, seq_length, stride) == expected


def megatron_targets(num_tokens: int, seq_length: int, overlap: int) -> dict[int, int]:
    """Return target -> first token of its context, from F.4's masks position by position."""
    found: dict[int, int] = {}
    count = max(math.ceil(max(num_tokens - 1 - overlap, 0) / overlap) + 1, 1)
    for window in range(count):
        start = window * overlap
        for position in range(1, seq_length + 1):  # labels of a window padded to its full length
            padded = start + position >= num_tokens
            kept = window == 0 or overlap == seq_length or position > seq_length - overlap
            if kept and not padded:
                assert start + position not in found
                found[start + position] = start
    return found


def our_targets(num_tokens: int, seq_length: int, stride: int) -> dict[int, int]:
    found: dict[int, int] = {}
    for start, stop, num_scored in wikitext103.strided_windows(num_tokens, seq_length, stride):
        assert 1 <= num_scored < stop - start <= seq_length + 1
        for target in range(stop - num_scored, stop):
            assert target not in found
            found[target] = start
    return found


def test_windows_score_each_target_once_in_megatrons_context():
    for num_tokens, seq_length in itertools.product(range(1, 34), range(1, 10)):
        for stride in range(1, seq_length + 1):
            expected = megatron_targets(num_tokens, seq_length, stride)
            assert our_targets(num_tokens, seq_length, stride) == expected
            assert sorted(expected) == list(range(1, num_tokens))


@pytest.mark.parametrize(
    ("num_tokens", "stride", "count"), [(270_330, 32, 8417), (270_330, 1024, 264), (8_527, 256, 34)]
)
def test_number_of_windows_on_the_papers_text(num_tokens, stride, count):
    assert (
        len(wikitext103.strided_windows(num_tokens, 1024 if stride != 256 else 256, stride))
        == count
    )


# --- Evaluating ---------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    """A byte-level vocabulary without merges: one id a byte."""
    return load_tokenizer(directory=byte_vocabulary(tmp_path / "vocabulary"))


def prepare(
    data: str | Path | None,
    *,
    tokenizer: Tokenizer,
    positions: int,
    limit: int | None = None,
    **options: Any,
) -> Work:
    """Return the requests for a model with this tokenizer's vocabulary."""
    sizes: Any = SimpleNamespace(
        family="gpt", vocab_size=tokenizer.vocab_size, max_position_embeddings=positions
    )
    own = WikiTextOptions(data=None if data is None else str(data), **options)
    return WIKITEXT103.work_for(sizes, own, tokenizer=tokenizer, limit=limit)


def tokens_of(work: Work) -> torch.Tensor:
    """Return the tensor that the windows are views of."""
    base = work.requests[0].tokens._base
    assert base is not None
    return base


@pytest.fixture
def small_file(tmp_path) -> Path:
    path = tmp_path / "wiki.small.tokens"
    path.write_bytes(SMALL_TEXT.encode())
    return path


@pytest.mark.parametrize(
    ("positions", "seq_length", "stride"),
    [(16, None, 5), (16, 16, 16), (16, 7, 1), (16, 8, 4), (4096, None, 32), (4096, 300, 32)],
)
def test_every_token_is_scored_once_in_its_window(
    small_file, tokenizer, positions, seq_length, stride
):
    engine = ScriptedEngine(positions=positions)
    result = WIKITEXT103.evaluate(
        engine, small_file, tokenizer=tokenizer, seq_length=seq_length, stride=stride
    )

    tokens = tokenizer.encode(wikitext103.detokenize(SMALL_TEXT))
    size = min(1024, positions) if seq_length is None else seq_length
    contexts = megatron_targets(len(tokens), size, stride)
    expected = -sum(
        log_prob(tuple(tokens[start:target]), tokens[target]) for target, start in contexts.items()
    )
    words = len(SMALL_TEXT.strip().split(" "))
    assert result.metrics["nll_sum"] == expected
    assert result.metrics["avg_loss"] == expected / (len(tokens) - 1)
    assert result.metrics["token_ratio"] == (len(tokens) - 1) / (words - 1)
    assert result.metrics["ppl"] == pytest.approx(math.exp(expected / (len(tokens) - 1)), rel=1e-12)
    assert result.metrics["adjusted_ppl"] == pytest.approx(
        math.exp(expected / (words - 1)), rel=1e-12
    )
    assert result.counts == {
        "original_tokens": words,
        "tokenized_tokens": len(tokens),
        "scored_tokens": len(tokens) - 1,
        "windows": len(engine.scored),
        "total_windows": len(engine.scored),
    }
    assert (result.settings["seq_length"], result.settings["stride"]) == (size, stride)


def test_windows_are_views_of_one_tensor_in_order(small_file, tokenizer):
    work = prepare(small_file, tokenizer=tokenizer, positions=16, stride=4)
    tokens = tokens_of(work)
    assert tokens.dtype == torch.int64
    storage = tokens.untyped_storage()
    assert storage.nbytes() == tokens.numel() * 8
    for number, request in enumerate(work.requests):
        assert request.tokens.untyped_storage().data_ptr() == storage.data_ptr()
        assert request.tokens.storage_offset() == number * 4


def test_limit_keeps_the_first_windows_and_says_so(small_file, tokenizer):
    whole, cut = ScriptedEngine(), ScriptedEngine()
    sizes: dict[str, Any] = {"tokenizer": tokenizer, "seq_length": 16, "stride": 4}
    everything = WIKITEXT103.evaluate(whole, small_file, **sizes)
    result = WIKITEXT103.evaluate(cut, small_file, **sizes, limit=3)
    assert [r.tokens.tolist() for r in cut.scored] == [r.tokens.tolist() for r in whole.scored[:3]]
    assert result.counts["scored_tokens"] == 16 + 4 + 4
    assert result.metrics["avg_loss"] == result.metrics["nll_sum"] / 24
    assert result.metrics["token_ratio"] == everything.metrics["token_ratio"]
    assert result.settings["limit"] == 3
    assert result.counts["windows"] == 3
    assert result.counts["total_windows"] == len(whole.scored)
    assert any("only the first 3 of" in warning for warning in result.warnings)
    assert not any("only the first" in warning for warning in everything.warnings)
    beyond = WIKITEXT103.evaluate(ScriptedEngine(), small_file, tokenizer=tokenizer, limit=10**6)
    assert not any("only the first" in warning for warning in beyond.warnings)


def test_record_has_the_fields_of_the_contract(small_file, tokenizer, tmp_path):
    engine = ScriptedEngine()
    progress, partial = object(), NothingDone()
    result = WIKITEXT103.evaluate(
        engine, small_file, tokenizer=tokenizer, on_progress=progress, partial=partial
    )  # fmt: skip
    assert engine.passed == {"on_progress": progress, "partial": partial}
    record = json.loads(result.write(tmp_path / "r.json").read_text())
    assert (record["task"], record["protocol"]) == ("wikitext103", "megatron-paper")
    assert {"adjusted_ppl", "ppl", "avg_loss", "nll_sum", "token_ratio"} <= set(record["metrics"])
    settings = record["settings"]
    assert (settings["vocab"], settings["dtype"], settings["tp"], settings["dp"]) == (
        "padded", "float32", 1, 1,
    )  # fmt: skip
    assert settings["limit"] is None
    assert settings["tokenizer"]["sha256"] == tokenizer.sha256
    data = settings["data"]
    assert data["path"] == str(small_file)
    assert data["bytes"] == len(SMALL_TEXT)
    assert (data["unk_count"], data["paper_file"]) == (1, False)
    assert len(data["warnings"]) == 1
    assert record["checkpoint"]["digest"] == "quick-sha256:0"
    assert record["timing"]["eval_seconds"] == 0.5
    tokens_run = sum(len(r.tokens) - 1 for r in engine.scored)
    assert record["timing"]["tokens_per_second"] == tokens_run / 0.5


@pytest.mark.parametrize(
    ("avg_loss", "ratio", "clamped"),
    [(2.0, 1.1, False), (19.0, 1.1, True), (20.0, 1.0, False), (20.5, 0.5, True)],
)
def test_figures_are_never_clamped_but_say_where_megatrons_would_be(avg_loss, ratio, clamped):
    metrics = wikitext103.perplexities(avg_loss * 8, scored_tokens=8, token_ratio=ratio)
    assert metrics["clamped_at_20"] is clamped
    assert metrics["ppl"] == pytest.approx(math.exp(avg_loss), rel=1e-12)
    assert metrics["adjusted_ppl"] == pytest.approx(math.exp(avg_loss * ratio), rel=1e-12)
    assert metrics["nll_sum"] == avg_loss * 8


def test_a_hopeless_model_still_gives_valid_json(small_file, tokenizer):
    result = WIKITEXT103.evaluate(ScriptedEngine(scale=1000.0), small_file, tokenizer=tokenizer)
    assert result.metrics["ppl"] == math.inf
    record = json.loads(result.to_json())
    assert record["metrics"]["ppl"] is None
    assert "infinity" in record["metrics"]["ppl_note"]
    assert record["metrics"]["avg_loss"] > 709
    broken = WIKITEXT103.evaluate(ScriptedEngine(scale=math.nan), small_file, tokenizer=tokenizer)
    assert json.loads(broken.to_json())["metrics"]["nll_sum"] is None
    assert any("summed loss is nan" in warning for warning in broken.warnings)


def result_with(metrics: dict[str, Any]) -> Result:
    return Result("wikitext103", "megatron-paper", metrics, {}, {}, {}, {}, {})


@pytest.mark.parametrize(
    ("avg_loss", "ratio", "line"),
    [
        (  # as Megatron v2.5 printed it for the small file (oracles/README.md)
            7.693278,
            1.075293227393114,
            "avg loss: 7.6933E+00 | ppl: 2.1936E+03 | adjusted ppl: 3.9148E+03 | "
            "token ratio: 1.075293227393114 |",
        ),
        (
            30.0,
            1.5,
            "avg loss: 3.0000E+01 | ppl: 4.8517E+08 | adjusted ppl: 4.8517E+08 | "
            "token ratio: 1.5 |",
        ),
    ],
)
def test_megatrons_line(avg_loss, ratio, line):
    result = result_with(wikitext103.perplexities(avg_loss * 4, scored_tokens=4, token_ratio=ratio))
    assert WIKITEXT103.megatron_line(result) == f" validation results on WIKITEXT103 | {line}"


def test_a_tokenizer_larger_than_the_model_is_refused_before_scoring(small_file, tokenizer):
    engine = ScriptedEngine(vocab_size=255)
    with pytest.raises(InputError, match="256 entries but the model has 255 rows"):
        WIKITEXT103.evaluate(engine, small_file, tokenizer=tokenizer)
    assert engine.scored == []


def test_a_doubtful_tokenizer_is_recorded(small_file, tokenizer):
    result = WIKITEXT103.evaluate(ScriptedEngine(vocab_size=50304), small_file, tokenizer=tokenizer)
    assert any("50304 rows" in warning for warning in result.settings["warnings"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 0}, "--stride 0: .* choose 1 to 16"),
        ({"stride": 17}, "--stride 17"),
        ({"seq_length": 8, "stride": 9}, "--stride 9: windows read 8 tokens; choose 1 to 8"),
        ({"seq_length": 17}, "--seq-length 17: the model has 16 positions"),
        ({"seq_length": 0}, "--seq-length 0"),
        ({"stride": 4, "limit": 0}, "--limit 0"),
    ],
)
def test_settings_out_of_range(small_file, tokenizer, settings, message):
    with pytest.raises(InputError, match=message):
        prepare(small_file, tokenizer=tokenizer, positions=16, **settings)


def test_default_stride_needs_a_window_of_its_size(small_file, tokenizer):
    with pytest.raises(InputError, match="--stride 32: windows read 16 tokens"):
        prepare(small_file, tokenizer=tokenizer, positions=16)


def test_a_text_that_memory_has_no_room_for_is_refused(small_file, tokenizer, monkeypatch):
    need = wikitext103.CHARACTER_BYTES * len(small_file.read_text())
    monkeypatch.setattr(wikitext103, "free_memory", lambda: need - 1)
    with pytest.raises(InputError, match=r"characters: .* takes about .* are free; give a part of"):
        prepare(small_file, tokenizer=tokenizer, positions=16, stride=4)
    for free in (need, None):
        monkeypatch.setattr(wikitext103, "free_memory", lambda free=free: free)
        assert prepare(small_file, tokenizer=tokenizer, positions=16, stride=4).requests


# --- Data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        ("caf\u00e9 au lait".encode("latin-1"), "not UTF-8 text"),
        (b"word", r"holds 1 word\(s\)"),
    ],
)
def test_unusable_files_are_named_with_the_reason(tmp_path, tokenizer, content, message):
    path = tmp_path / "wiki.test.tokens"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        prepare(path, tokenizer=tokenizer, positions=16, stride=4)
    assert str(path) in str(caught.value)


def hub_rows(text: str) -> list[str]:
    """Return the Hub's form of a file: its lines, but the blank ones as empty strings."""
    return [line if line.strip() else "" for line in text.splitlines(keepends=True)]


@pytest.mark.parametrize("text", [SMALL_TEXT, " a \n", " a \n \n \n b \n"])
def test_the_file_comes_back_from_the_hubs_rows(text):
    assert wikitext103.restore_text(hub_rows(text), "set") == text


def test_rows_without_newlines_are_lines():
    lines = SMALL_TEXT.split("\n")[:-1]
    assert wikitext103.restore_text(lines, "set") == SMALL_TEXT
    emptied = [line if line.strip() else "" for line in lines]
    assert wikitext103.restore_text(emptied, "set") == SMALL_TEXT


def test_rows_of_two_kinds_are_refused():
    with pytest.raises(InputError, match="set: 1 of 2 rows end with a newline"):
        wikitext103.restore_text([" a \n", " b "], "set")


def test_a_saved_set_is_read_as_the_file(tmp_path, tokenizer):
    import datasets

    rows = datasets.Dataset.from_dict({"text": hub_rows(SMALL_TEXT)})
    rows.save_to_disk(tmp_path / "set")
    work = prepare(tmp_path / "set", tokenizer=tokenizer, positions=64)
    assert tokens_of(work).tolist() == tokenizer.encode(wikitext103.detokenize(SMALL_TEXT))
    data = work.settings["data"]
    assert data["path"] == f"{tmp_path / 'set'}:test"
    assert data["sha256"] == hashlib.sha256(SMALL_TEXT.encode()).hexdigest()
    assert data["bytes"] == len(SMALL_TEXT)


@pytest.mark.parametrize(
    ("words", "unk", "says"),
    [
        (245_566, 15_218, "is WikiText-2's test file"),
        (245_566, 2_492, "but other bytes"),
        (245_570, 0, "is the raw form of the test set"),
        (244_101, 2_492, "without its blank lines"),
        (217_642, 1_657, "validation file"),
        (1_000, 0, "holds no <unk>"),
        (1_000, 7, "is another text"),
    ],
)
def test_other_texts_are_told_apart(words, unk, says):
    (warning,) = wikitext103.data_warnings("f.tokens", "0" * 64, words, unk)
    assert says in warning
    assert f"{words:,}" in warning and warning.startswith("f.tokens ")


# --- The real files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(shared_data) -> Tokenizer:
    return load_tokenizer(directory=shared_data / "gpt2")


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "words", "tokens", "unk", "count", "says"),
    [
        ("wikitext-103/wiki.test.tokens", 245_566, 270_330, 2_492, 8_417, None),
        ("wikitext-103/wiki.valid.tokens", 217_642, 236_892, 1_657, 7_372, "validation"),
        ("wikitext-103/wiki.test.raw", 245_570, 272_045, 0, 8_471, "raw form"),
        ("wikitext-2/wiki.test.tokens", 245_566, 278_365, 15_218, 8_668, "WikiText-2"),
    ],
)
def test_real_files(shared_data, gpt2, name, words, tokens, unk, count, says):
    work = prepare(shared_data / name, tokenizer=gpt2, positions=1024)
    data = work.settings["data"]
    assert data["original_tokens"] == words
    assert data["tokenized_tokens"] == tokens
    assert data["unk_count"] == unk
    assert len(work.requests) == work.counts["total_windows"] == count
    assert sum(request.num_scored for request in work.requests) == tokens - 1
    assert data["paper_file"] is (says is None)
    assert len(data["warnings"]) == (0 if says is None else 1)
    if says is None:
        assert data["bytes"] == 1_281_077
        assert f"{token_ratio(work):.10f}" == "1.1008449901"
    else:
        assert says in data["warnings"][0]


@pytest.mark.realdata
def test_the_papers_file_comes_back_from_a_set_with_the_hubs_rows(shared_data, gpt2, tmp_path):
    import datasets

    path = shared_data / "wikitext-103" / "wiki.test.tokens"
    text = path.read_bytes().decode()
    rows = hub_rows(text)
    assert rows.count("") == 1_467
    assert wikitext103.count_original_tokens("".join(rows)) == 244_101  # what a plain join gives
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "hub")
    work = prepare(tmp_path / "hub", tokenizer=gpt2, positions=1024)
    data = work.settings["data"]
    assert wikitext103.restore_text(rows, "set") == text
    assert data["original_tokens"] == 245_566
    assert data["paper_file"] is True
    assert data["sha256"] == wikitext103.PAPER_TEXT_DIGEST


@pytest.mark.realdata
def test_the_small_file_that_megatron_ran(shared_data, oracles, gpt2):
    path = oracles / "zeroshot" / "wiki_small.test.tokens"
    work = prepare(path, tokenizer=gpt2, positions=256)
    assert (work.counts["original_tokens"], tokens_of(work).numel()) == (7_930, 8_527)
    assert repr(token_ratio(work)) == "1.075293227393114"

    engine = Engine.load(open_checkpoint(oracles / "v25_gpt2vocab_tp2_trained"))
    result = WIKITEXT103.score(engine, work, tokenizer=gpt2)
    assert WIKITEXT103.megatron_line(result) == (
        " validation results on WIKITEXT103 | avg loss: 7.6933E+00 | ppl: 2.1936E+03 | "
        "adjusted ppl: 3.9148E+03 | token ratio: 1.075293227393114 |"
    )
