"""`mlm-eval score`: JSON lines in, one record a line out, and what is said of wrong lines."""

from __future__ import annotations

import json
import math
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_models
from support.ranks import run_ranks

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer
from mlm_eval.engine.engine import Engine
from mlm_eval.tasks.data.text import LONGEST_INPUT
from mlm_eval.tasks.zero_shot.score import score_lines, write_lines
from mlm_eval.tasks.zero_shot.sequences import GivenSequences, read_lines

GPT = random_models.config(vocab_size=300)  # 256 bytes and some padding
BERT = random_models.config(random_models.BERT, vocab_size=300)
CLASSIFIER = random_models.config(BERT, lm_head=False, binary_head=False, num_classes=3)
CHOOSER = random_models.config(BERT, lm_head=False, binary_head=False, multichoice_head=True)
POSITIONS = GPT.max_position_embeddings


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = random_models.byte_vocabulary(tmp_path_factory.mktemp("words") / "vocabulary")
    return load_tokenizer(directory=folder)


def load(config: ModelConfig, **settings: Any) -> Engine:
    return Engine.load(random_models.checkpoint(config), **settings)


def write(path: Path, *lines: Any) -> Path:
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return path


def score(
    tmp_path: Path,
    config: ModelConfig,
    *lines: Any,
    words: Tokenizer | None = None,
    stride: int | None = None,
) -> list[dict[str, Any]]:
    read = read_lines(write(tmp_path / "in.jsonl", *lines), words)
    return list(score_lines(load(config), read, stride=stride))


def given(context: list[int], token: int) -> float:
    """Return the log-probability of a token after a context, from a forward of just that."""
    engine = load(GPT)
    with torch.no_grad():
        states = engine.model(torch.tensor([context]))
        logits = states[0, -1] @ engine.model.output_layer.table.t()
    return float(logits.log_softmax(-1)[token])


def noise(count: int, seed: int = 0) -> list[int]:
    return torch.randint(300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- GPT ----------------------------------------------------------------------------------------


def test_each_token_is_scored_given_the_ones_before(tmp_path):
    tokens = noise(POSITIONS + 1)  # as many as one window takes
    [record] = score(tmp_path, GPT, {"tokens": tokens})
    assert list(record) == ["tokens", "logprobs", "greedy", "sum_logprob"]
    assert record["tokens"] == tokens
    expected = [given(tokens[:t], tokens[t]) for t in range(1, len(tokens))]
    assert record["logprobs"][0] is None
    assert record["logprobs"][1:] == pytest.approx(expected, abs=1e-5)
    assert record["sum_logprob"] == math.fsum(record["logprobs"][1:])
    assert record["greedy"][0] is None
    assert all(flag is False or flag is True for flag in record["greedy"][1:])


def test_greedy_continuations_are_greedy(tmp_path):
    engine = load(GPT)
    tokens = noise(3)
    for _ in range(6):
        states = engine.model(torch.tensor([tokens]))
        tokens.append(int((states[0, -1] @ engine.model.output_layer.table.t()).argmax()))
    [record] = score(tmp_path, GPT, {"tokens": tokens})
    assert record["greedy"][3:] == [True] * 6


@pytest.mark.long
@pytest.mark.parametrize(("stride", "used"), [(None, POSITIONS // 2), (3, 3), (16, 16), (1, 1)])
@pytest.mark.parametrize("length", [POSITIONS + 2, 2 * POSITIONS, 41])
def test_longer_sequences_are_scored_by_windows(tmp_path, stride, used, length):
    """The first window scores all of its 16 targets, each further one its last `stride`."""
    tokens = noise(length, seed=length)
    [record] = score(tmp_path, GPT, {"tokens": tokens}, stride=stride)
    expected = []
    for target in range(1, length):
        window = max(math.ceil((target - POSITIONS) / used), 0)
        expected.append(given(tokens[window * used : target], tokens[target]))
    assert record["logprobs"][0] is None and len(record["greedy"]) == length
    assert record["logprobs"][1:] == pytest.approx(expected, abs=1e-5)


def test_a_text_is_scored_as_its_tokens(tmp_path, words):
    text = "a caf\u00e9,\u2028two"  # JSON strings may hold what other programs take for a line end
    line = json.dumps({"text": text}, ensure_ascii=False)
    by_text, by_tokens = score(tmp_path, GPT, line, {"tokens": words.encode(text)}, words=words)
    assert by_text["tokens"] == by_tokens["tokens"]
    assert len(by_text["tokens"]) == len(text.encode())
    # Two rows of one batch: the same but for the last digits.
    assert by_text["logprobs"][1:] == pytest.approx(by_tokens["logprobs"][1:], abs=1e-5)


def test_records_stand_in_the_order_of_the_lines(tmp_path):
    """Long and short ones mixed, blank lines left out."""
    rows = [noise(n, seed=n) for n in (5, 1, 40, 2, 17, 9)]
    lines = [{"tokens": row} for row in rows]
    records = score(tmp_path, GPT, *lines[:3], "", "  ", *lines[3:])
    assert [record["tokens"] for record in records] == rows
    for row, record in zip(rows, records, strict=True):
        assert len(record["logprobs"]) == len(record["greedy"]) == len(row)
        if len(row) > 1:
            assert record["logprobs"][1] == pytest.approx(given(row[:1], row[1]), abs=1e-5)


def test_one_token_has_nothing_before_it(tmp_path):
    expected = {"tokens": [7], "logprobs": [None], "greedy": [None], "sum_logprob": 0.0}
    assert score(tmp_path, GPT, {"tokens": [7]}, {"tokens": [7]}) == [expected, expected]


@pytest.mark.parametrize("config", [GPT, BERT], ids=["gpt", "bert"])
def test_what_a_line_holds_comes_back_with_its_scores(tmp_path, words, config):
    """Fields of the caller, a line without a token among them; the scores' own names are ours."""
    mine = {"id": "q", "nested": {"a": [1, None, {"b": "\u00e9"}]}, "greedy": "no", "x": 2**70}
    lines = [{"text": "abc", **mine}, {"text": "", "id": 1}, {"id": 2, "tokens": []}]
    plain, *records = score(tmp_path, config, {"text": "abc"}, *lines, words=words)
    assert {name: records[0][name] for name in mine if name != "greedy"} == {
        name: value for name, value in mine.items() if name != "greedy"
    }
    for name, value in plain.items():  # the same but for the last digits: rows of one batch
        if name in ("logprobs", "sum_logprob"):
            value = pytest.approx(value, abs=1e-5)
        assert records[0][name] == value
    nothing = {"tokens": [], "logprobs": [], "greedy": [], "sum_logprob": 0.0}
    assert records[1:] == [{**lines[1], **nothing}, {"id": 2, **nothing}]
    assert score(tmp_path, config, *lines[1:], words=words) == records[1:]  # no input at all


def test_numbers_of_the_caller_that_json_does_not_have_are_null(tmp_path):
    [record] = score(tmp_path, GPT, '{"tokens": [1, 2], "a": [NaN, -Infinity], "b": {"c": NaN}}')
    assert record["a"] == [None, None] and record["b"] == {"c": None}


def test_text_has_a_record_for_every_line(tmp_path, words):
    (tmp_path / "in.txt").write_bytes(b"ab\r\n\n{}\nlast")
    lines = read_lines(tmp_path / "in.txt", words)
    assert [line.fields["text"] for line in lines] == ["ab", "", "{}", "last"]
    assert [len(line.rows[0]) for line in lines] == [2, 0, 2, 4]


def test_a_parquet_table_is_read_by_its_columns(tmp_path, words):
    import pyarrow
    import pyarrow.parquet

    columns = {
        "text": ["ab", None, None],
        "tokens": [None, [1, 2, 3], [7]],
        "day": [date(2020, 1, 2), None, None],
        "weight": [0.5, float("nan"), None],
        "price": [Decimal("1.50"), None, None],
    }
    path = tmp_path / "table"  # its content says what it is
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    by_table = list(score_lines(load(GPT), read_lines(path, words)))
    same = [{"text": "ab"}, {"tokens": [1, 2, 3]}, {"tokens": [7]}]
    for record, wanted in zip(by_table, score(tmp_path, GPT, *same, words=words), strict=True):
        assert record["tokens"] == wanted["tokens"]
        assert record["sum_logprob"] == pytest.approx(wanted["sum_logprob"], abs=1e-4)
    others = [[record[name] for name in ("day", "weight", "price")] for record in by_table]
    assert others == [["2020-01-02", 0.5, "1.50"], [None] * 3, [None] * 3]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "raw": [b"\0"]}), path)
    with pytest.raises(InputError, match="table, row 1: raw is of type bytes"):
        read_lines(path, words)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="table is cut off or damaged"):
        read_lines(path, words)


def test_formats_differ_in_what_identifies_them():
    """The same bytes as another format are other sequences."""
    found = {GivenSequences("x", b"[1]\n", form).digest for form in ("jsonl", "text", "parquet")}
    assert len(found) == 3
    marked = GivenSequences("x", b"\xef\xbb\xbf[1]\r\n").digest
    assert marked == GivenSequences("x", b"[1]\n").digest


def score_on_a_rank(path: Path, config: ModelConfig, tp: int, dp: int) -> list[dict[str, Any]]:
    return list(score_lines(load(config, tp=tp, dp=dp, batch_tokens=40), read_lines(path, None)))


@pytest.mark.parametrize("config", [GPT, BERT], ids=["gpt", "bert"])
@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (2, 2)])
def test_every_rank_has_the_same_records(tmp_path, config, tp, dp):
    lines = [{"tokens": noise(n, seed=n)} for n in (5, 1, 16, 2, 9, 12)]
    expected = score(tmp_path, config, *lines)
    for records in run_ranks(tp * dp, score_on_a_rank, tmp_path / "in.jsonl", config, tp, dp):
        for record, wanted in zip(records, expected, strict=True):
            assert record["greedy"] == wanted["greedy"]
            pairs = zip(record["logprobs"], wanted["logprobs"], strict=True)
            assert all(a == b or a == pytest.approx(b, abs=1e-5) for a, b in pairs)


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    weights = random_models.state_dict(GPT)
    weights["decoder.final_layernorm.bias"][3] = float("nan")
    engine = Engine.load(random_models.checkpoint(GPT, weights))
    read = read_lines(write(tmp_path / "in.jsonl", {"tokens": [1, 2, 3]}), None)
    write_lines(tmp_path / "out.jsonl", score_lines(engine, read))
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert record["logprobs"] == [None] * 3 and record["sum_logprob"] is None


# --- BERT ---------------------------------------------------------------------------------------


def bert_logits(
    config: ModelConfig, tokens: list[int], types: list[int] | None = None
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    model = load(config).model
    batch = torch.tensor([tokens])
    with torch.no_grad():
        states = model(
            batch, torch.ones_like(batch), None if types is None else torch.tensor([types])
        )
        heads = {name: x[0].tolist() for name, x in model.head_logits(states).items()}
        if not config.lm_head:
            return states, heads
        logits = model.lm_head(states[0]) @ model.output_layer.table.t() + model.output_layer.bias
        return logits.log_softmax(-1), heads


def test_bert_scores_every_token_given_all_of_them(tmp_path):
    tokens, types = noise(12), [0] * 5 + [1] * 7
    plain, typed = score(
        tmp_path, BERT, {"tokens": tokens}, {"tokens": tokens, "tokentypes": types}
    )
    for record, whole in [
        (plain, bert_logits(BERT, tokens)),
        (typed, bert_logits(BERT, tokens, types)),
    ]:
        names = [name for name in record if name != "tokentypes"]
        assert names == ["tokens", "logprobs", "greedy", "sum_logprob", "binary_logits"]
        assert record["sum_logprob"] == math.fsum(record["logprobs"])
        logprobs, heads = whole
        expected = logprobs[range(12), tokens].tolist()
        assert record["logprobs"] == pytest.approx(expected, abs=1e-5)
        assert record["greedy"] == (logprobs.argmax(-1) == torch.tensor(tokens)).tolist()
        assert record["binary_logits"] == pytest.approx(heads["binary_head"], abs=1e-5)
    assert plain["logprobs"] != pytest.approx(typed["logprobs"], abs=1e-2)


def test_a_padding_mask_hides_tokens_from_the_others(tmp_path):
    tokens = noise(12)
    padded, short = score(
        tmp_path,
        BERT,
        {"tokens": tokens, "padding_mask": [1] * 8 + [0] * 4},
        {"tokens": tokens[:8]},
    )
    assert padded["logprobs"][:8] == pytest.approx(short["logprobs"], abs=1e-5)
    assert padded["binary_logits"] == pytest.approx(short["binary_logits"], abs=1e-5)
    assert len(padded["logprobs"]) == 12
    assert padded["sum_logprob"] == pytest.approx(short["sum_logprob"], abs=1e-4)


def test_a_classification_head_gives_a_row_a_line(tmp_path):
    rows = [noise(9, seed=1), noise(4, seed=2)]
    records = score(tmp_path, CLASSIFIER, *({"tokens": row} for row in rows))
    for row, record in zip(rows, records, strict=True):
        heads = bert_logits(CLASSIFIER, row)[1]
        assert record["head_logits"] == pytest.approx(heads["classification_head"], abs=1e-5)
        # It has no such head.
        assert record["logprobs"] is record["greedy"] is record["sum_logprob"] is None
        assert "binary_logits" not in record


def test_a_multiple_choice_head_gives_a_logit_a_choice(tmp_path):
    rows = [noise(9, seed=1), noise(4, seed=2), noise(12, seed=3)]
    types = [[0] * (len(row) - 2) + [1] * 2 for row in rows]
    masks = [[1] * len(row) for row in rows]
    [record] = score(
        tmp_path, CHOOSER, {"choices": rows, "tokentypes": types, "padding_mask": masks}
    )
    assert record["choices"] == rows and "tokens" not in record
    expected = [
        bert_logits(CHOOSER, row, kinds)[1]["multichoice_head"][0]
        for row, kinds in zip(rows, types, strict=True)
    ]
    assert record["head_logits"] == pytest.approx(expected, abs=1e-5)


def test_choices_of_a_pretrained_bert_have_a_row_each(tmp_path):
    rows = [noise(9, seed=1), noise(4, seed=2)]
    together, *alone = score(tmp_path, BERT, {"choices": rows}, *({"tokens": r} for r in rows))
    for name in ("logprobs", "greedy", "sum_logprob", "binary_logits"):
        for row, single in zip(together[name], alone, strict=True):
            assert row == pytest.approx(single[name], abs=1e-4)


# --- Lines that are wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON .*; expected "),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", r"holds '\[1, 2\]'; expected"),
        ("{}", 'has neither "tokens", "text" nor "choices"'),
        ({"text": 5}, 'has neither "tokens", "text" nor "choices"'),
        ({"tokens": "1 2"}, "tokens must be a list of integers"),
        ({"tokens": None}, "tokens must be a list of integers"),
        ({"tokens": [1, 2.0]}, "tokens must be a list of integers"),
        ({"tokens": [1, True]}, "tokens must be a list of integers"),
        ({"tokens": [1, 10**30]}, "tokens must be a list of integers"),
        ({"tokens": [[1, 2]]}, "tokens must be a list of integers"),
        ({"choices": []}, "choices must be a list of lists of integers"),
        ({"choices": [1, 2]}, "choices must be a list of lists of integers"),
        ({"choices": [[1, 2], []]}, "holds an empty choice"),
        ({"tokens": [1, 2], "tokentypes": [0]}, "tokentypes and tokens differ in length"),
        ({"tokens": [1, 2], "padding_mask": [1, 1, 1]}, "padding_mask and tokens differ"),
        ({"choices": [[1], [2]], "tokentypes": [[0]]}, "tokentypes and tokens differ in length"),
        ({"tokens": [1], "tokentypes": 0}, "tokentypes must be a list"),
        ({"text": "a \ud800 b"}, "half of a surrogate pair"),
        (
            {"text": "x" * (LONGEST_INPUT + 1)},
            r'2,097,153 characters, .*; give it as \{"tokens": \[...\]\}, or as several lines',
        ),
    ],
)
def test_a_malformed_line_is_named(tmp_path, words, line, message):
    path = write(tmp_path / "in.jsonl", {"tokens": [1, 2]}, "", line)
    with pytest.raises(InputError, match=f"in\\.jsonl, line 3.*{message}") as caught:
        read_lines(path, words)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("config", "line", "message"),
    [
        (GPT, {"tokens": [1, 300]}, "holds token id 300, outside the model's vocabulary of 300"),
        (GPT, {"tokens": [-1]}, "holds token id -1"),
        (GPT, {"choices": [[1]]}, "has BERT fields .* GPT checkpoint"),
        (GPT, {"tokens": [1], "tokentypes": [0]}, "has BERT fields"),
        (GPT, {"tokens": [1], "padding_mask": [1]}, "has BERT fields"),
        (BERT, {"tokens": [1, 300]}, "holds a token id outside the vocabulary of 300 rows"),
        (BERT, {"choices": [[1], [-2]]}, "holds a token id outside the vocabulary"),
        (BERT, {"tokens": [1] * 17}, "has 17 tokens; this BERT takes 1 to 16"),
        (BERT, {"tokens": [1], "tokentypes": [2]}, "has tokentypes outside 0 to 1"),
        (BERT, {"tokens": [1, 2], "padding_mask": [1, 2]}, "has padding_mask outside 0 to 1"),
        (BERT, {"tokens": [1, 2], "padding_mask": [0, 0]}, "has a padding_mask that keeps no"),
    ],
)
def test_a_line_that_does_not_fit_the_model_is_named(tmp_path, config, line, message):
    with pytest.raises(InputError, match=f"in\\.jsonl, line 2 {message}"):
        score(tmp_path, config, {"tokens": [1]}, line)


@pytest.mark.parametrize("stride", [0, -1, POSITIONS + 1])
def test_a_stride_that_leaves_gaps_is_refused(tmp_path, stride):
    with pytest.raises(InputError, match=f"--stride {stride} must lie in 1 to 16"):
        score(tmp_path, GPT, {"tokens": noise(40)}, stride=stride)


def test_text_needs_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match="line 1 holds text, which needs --tokenizer"):
        score(tmp_path, GPT, {"text": "a"})


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl does not exist; give"):
        read_lines(tmp_path / "none.jsonl", None)
    with pytest.raises(InputError, match="is a folder where a file"):
        read_lines(tmp_path, None)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl, line 1 is not UTF-8 text"):
        read_lines(tmp_path / "latin.jsonl", None)
    with pytest.raises(InputError, match=r"in\.jsonl holds no lines"):
        read_lines(write(tmp_path / "in.jsonl", "", " "), None)


def test_a_limit_reads_the_first_lines_only(tmp_path):
    path = write(tmp_path / "in.jsonl", {"tokens": [1]}, "", {"tokens": [2]}, "{broken")
    assert [line.rows for line in read_lines(path, None, limit=2)] == [[[1]], [[2]]]
    with pytest.raises(InputError, match="line 4"):
        read_lines(path, None)


# --- Writing ------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "out.jsonl"
    write_lines(target, [{"a": 1}, {"b": [None, True]}])
    assert target.read_text() == '{"a": 1}\n{"b": [null, true]}\n'

    def failing() -> Any:
        yield {"a": 2}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_lines(target, failing())
    assert target.read_text().startswith('{"a": 1}')
    assert [path.name for path in target.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("place", ["file/out.jsonl", "folder"])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written .*; name another file with --output"):
        write_lines(tmp_path / place, [{}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
