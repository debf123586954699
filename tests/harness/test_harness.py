"""lm-evaluation-harness with our model class, against its own `hf` backend."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_models
from support.paths import ORACLES, SAMPLES
from support.ranks import run_ranks

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra lm-eval)")

import lm_eval
import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import mlm_eval
from mlm_eval import cli
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import find_tokenizer, load_tokenizer
from mlm_eval.engine.batching import pack
from mlm_eval.engine.engine import Engine
from mlm_eval.harness import model as harness
from mlm_eval.harness.hub_encoding import HubEncoding
from mlm_eval.harness.model import MegatronLM

GPT = SAMPLES / "gpt"  # 256 positions
BERT = ORACLES / "v25_bert_tp2_fusedgelu"
TOLERANCE = 1e-4
OF_A_SUM = 1e-6  # of a page's log-likelihood, the sum of a thousand float32 numbers

# --- A study: data, tasks, and the sample model in both forms -----------------------------------

YAML = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{data}.jsonl
  cache_dir: {folder}/cache
test_split: test
{more}"""
TASKS = {
    "local_cloze": (
        "passages",
        """output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
    ),
    "local_pages": (
        "pages",
        """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
""",
    ),
    # One of the other documents is drawn as an example; choices share their input but for one.
    "local_choices": (
        "questions",
        """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
num_fewshot: 1
fewshot_split: test
metric_list:
  - metric: acc
""",
    ),
    "local_writing": (
        "beginnings",
        """output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs:
  until: ["\\n", " is"]
  max_gen_toks: 24
metric_list:
  - metric: exact_match
""",
    ),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks/, their data, and the sample model converted to hf/."""
    folder = tmp_path_factory.mktemp("study")
    passages = [json.loads(line)["text"] for line in _read("lambada.sample.jsonl").splitlines()[:9]]
    passages += [
        "module",  # no context: the end-of-text token stands before it
        "<|endoftext|> the statement",  # read as the token
        " ".join(passages[:8]),  # longer than the positions: cut from the left
    ]
    text = _read("wiki.sample.tokens")
    pages = [text[:300], text[300:4000], "", text[4000:4300]]  # the second: several windows
    questions = [
        {"question": text[-300:], "choices": [" the", " of", " is a", "."], "answer": i % 4}
        for i, text in enumerate(passages[:6])
    ]
    _write(folder / "passages.jsonl", [{"text": text} for text in passages])
    _write(folder / "pages.jsonl", [{"page": page} for page in pages])
    _write(folder / "questions.jsonl", questions)
    # The last of them leaves no room for 24 tokens: cut from the left, too.
    beginnings = [text[: 40 + 9 * n] for n, text in enumerate(passages[:9])] + passages[-1:]
    _write(folder / "beginnings.jsonl", [{"text": text} for text in beginnings])
    (folder / "tasks").mkdir()
    for task, (data, more) in TASKS.items():
        yaml = YAML.format(task=task, folder=folder, data=data, more=more)
        (folder / "tasks" / f"{task}.yaml").write_text(yaml)
    checkpoint = mlm_eval.open_checkpoint(GPT)
    mlm_eval.convert(checkpoint, "hf", folder / "hf", vocab="padded", tokenizer=GPT / "tokenizer")
    return folder


def _read(name: str) -> str:
    return (SAMPLES / "text" / name).read_text(encoding="utf-8")


def _write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


Answers = dict[str, dict[int, list[Any]]]


def evaluate(model: Any, study: Path, **settings: Any) -> tuple[dict[str, Any], Answers]:
    """Return the harness' figures, and by task and document what the model answered."""
    tasks = TaskManager(include_path=str(study / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        # No bootstrap: it starts processes, and a rank of the tests is not allowed to.
        model=model,
        tasks=[*TASKS],
        task_manager=tasks,
        bootstrap_iters=0,
        **settings,
    )
    answers = {
        task: {sample["doc_id"]: sample["filtered_resps"] for sample in samples}
        for task, samples in found["samples"].items()
    }
    return found["results"], answers


@pytest.fixture(scope="module")
def expected(study: Path) -> tuple[dict[str, Any], Answers]:
    """What the hf backend says. In float32 its own sums over a page are off by more than 1e-4."""
    pytest.importorskip("accelerate", reason="the hf backend needs accelerate")
    about = f"pretrained={study / 'hf'},dtype=float32,softmax_dtype=float64"
    return evaluate("hf", study, model_args=about, device="cpu", batch_size=1)


def flat(answer: Any) -> Iterator[Any]:
    if isinstance(answer, list | tuple):
        for part in answer:
            yield from flat(part)
    else:
        yield answer


def near(value: float) -> Any:
    """Return what equals the value but for rounding; a token left out changes it by far more."""
    return pytest.approx(value, rel=OF_A_SUM, abs=TOLERANCE)


def assert_same(found: Answers, expected: Answers) -> None:
    """Log-likelihoods within the tolerance; flags and texts equal."""
    assert set(found) == set(expected)
    for task, documents in expected.items():
        assert set(found[task]) == set(documents)
        for document, answer in documents.items():
            pairs = list(zip(flat(found[task][document]), flat(answer), strict=True))
            assert pairs
            for ours, theirs in pairs:
                if isinstance(theirs, float):
                    assert ours == near(theirs), (task, document)
                else:
                    assert ours == theirs, (task, document)


def model(**settings: Any) -> MegatronLM:
    words = find_tokenizer(GPT)
    assert words is not None
    engine = Engine.load(mlm_eval.open_checkpoint(GPT), batch_tokens=settings.pop("budget", None))
    return MegatronLM(engine, words, **settings)


@pytest.fixture(scope="module")
def lm() -> MegatronLM:
    return model()


# --- Against the hf backend ---------------------------------------------------------------------


@pytest.mark.long
def test_the_study_asks_for_something(expected: tuple[dict[str, Any], Answers]) -> None:
    """The texts differ and some are long, flags of both kinds come up, pages span windows."""
    _, answers = expected
    texts = [text for text in flat([*answers["local_writing"].values()])]
    assert len(set(texts)) > 4 and max(map(len, texts)) > 15
    scored = [*answers["local_cloze"].values(), *answers["local_choices"].values()]
    assert {True, False} == {flag for flag in flat(scored) if isinstance(flag, bool)}
    assert min(flat([*answers["local_pages"].values()])) < -2000
    assert answers["local_pages"][2] == [0]  # the empty page


@pytest.mark.long
def test_answers_and_figures_are_those_of_the_hf_backend(
    lm: MegatronLM, study: Path, expected: tuple[dict[str, Any], Answers]
) -> None:
    figures, answers = evaluate(lm, study)
    assert_same(answers, expected[1])
    for task, metrics in expected[0].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert figures[task][name] == pytest.approx(value, rel=1e-5), (task, name)


def on_a_rank(study: Path, tp: int, dp: int) -> tuple[dict[str, Any], Answers] | None:
    words = find_tokenizer(GPT)
    assert words is not None
    engine = Engine.load(mlm_eval.open_checkpoint(GPT), tp=tp, dp=dp, batch_tokens=700)
    lm = MegatronLM(engine, words)
    return lm.lead(lambda: evaluate(lm, study))


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_answers_do_not_depend_on_the_layout(
    study: Path, expected: tuple[dict[str, Any], Answers], tp: int, dp: int
) -> None:
    first, *others = run_ranks(tp * dp, on_a_rank, study, tp, dp)
    assert_same(first[1], expected[1])
    assert others == [None] * (tp * dp - 1)


def without_lead(tp: int, dp: int) -> list[tuple[float, bool]]:
    words = find_tokenizer(GPT)
    assert words is not None
    lm = MegatronLM(Engine.load(mlm_eval.open_checkpoint(GPT), tp=tp, dp=dp), words)
    return lm.loglikelihood([request("loglikelihood", "A module", " is")])


def test_every_rank_may_make_the_same_calls(lm: MegatronLM) -> None:
    (expected,) = lm.loglikelihood([request("loglikelihood", "A module", " is")])
    for ((value, flag),) in run_ranks(2, without_lead, 2, 1):
        assert value == pytest.approx(expected[0], rel=0, abs=1e-5) and flag == expected[1]


def failing_in_the_harness() -> None:
    words = find_tokenizer(GPT)
    assert words is not None
    lm = MegatronLM(Engine.load(mlm_eval.open_checkpoint(GPT), dp=2), words)
    asked = [request("loglikelihood", "A module", " is")]
    assert lm.lead(lambda: lm.loglikelihood(asked) and 1 / 0) is None


def test_a_failure_of_the_harness_lets_the_other_ranks_go() -> None:
    """Else they wait for orders until a collective times out, or the pool ends them."""
    before = run_ranks(2, os.getpid)
    with pytest.raises(ZeroDivisionError):
        run_ranks(2, failing_in_the_harness)
    assert run_ranks(2, os.getpid) == before


def test_the_command_line_on_two_ranks(
    study: Path, expected: tuple[dict[str, Any], Answers], tmp_path: Path
) -> None:
    """As a user runs it: one table, one set of files, and the figures of the hf backend."""
    command = [sys.executable, "-P", "-m", "mlm_eval", "harness", "--ckpt", GPT, "--tp", "2", "--"]
    command += ["--tasks", ",".join(TASKS), "--include_path", study / "tasks", "--log_samples"]
    command += ["--output_path", tmp_path, "--seed", "0,7,7,1234"]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|local_cloze") == 1
    assert "tp 2 x dp 1" in done.stdout.splitlines()[-1]
    assert "%|" not in done.stderr  # no bars into a pipe
    (record,) = tmp_path.rglob("results_*.json")
    about = json.loads(record.read_text())
    assert about["config"]["mlm_eval"]["tp"] == 2
    digest = mlm_eval.open_checkpoint(GPT).provenance.digest
    assert about["config"]["mlm_eval"]["digest"] == digest
    assert f"digest {digest.rpartition(':')[2][:12]}" in done.stdout.splitlines()[-1]
    answers: Answers = {}
    for task in TASKS:
        (file,) = tmp_path.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        answers[task] = {row["doc_id"]: row["filtered_resps"] for row in rows}
    # Samples are written as text.
    theirs = json.loads(json.dumps(expected[1]))
    for task, documents in answers.items():
        for document, answer in documents.items():
            values = zip(flat(answer), flat(theirs[task][str(document)]), strict=True)
            for mine, other in values:
                if task == "local_writing":
                    assert mine == other
                else:
                    assert _number(mine) == near(_number(other))


def _number(value: Any) -> float:
    return {"True": 1.0, "False": 0.0}.get(str(value)) or float(str(value).replace("False", "0"))


# --- Which requests are run ---------------------------------------------------------------------


def request(kind: str, *arguments: Any, document: int = 0) -> Instance:
    about = ("local", document, 1)
    return Instance(kind, {}, tuple(arguments), 0, metadata=about)  # type: ignore[arg-type]


def test_each_distinct_request_is_scored_once(
    lm: MegatronLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    score = lm.engine.score
    monkeypatch.setattr(lm.engine, "score", lambda r, **k: asked.extend(r) or score(r, **k))
    pairs = [("a block is", " a piece"), ("a module", " is"), ("a block is", " a piece")]
    answers = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    assert answers[0] == answers[2] != answers[1]
    assert len(asked) == 2


def test_choices_of_one_token_share_a_forward_pass(
    lm: MegatronLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same numbers to the last bit as from a pass for each."""
    lines: list[int] = []
    forward = lm.engine.model.forward

    def counted(tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        lines.append(tokens.shape[0])
        return forward(tokens, *rest)

    pairs = [(f"A block number {n} is", choice) for n in range(3) for choice in (" a", " the", ".")]
    monkeypatch.setattr(lm.engine.model, "forward", counted)
    together = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    assert sum(lines) == 3
    apart = [lm.loglikelihood([request("loglikelihood", *pair)])[0] for pair in pairs]
    assert [flag for _, flag in together] == [flag for _, flag in apart]
    for (one, _), (other, _) in zip(together, apart, strict=True):
        assert one == pytest.approx(other, rel=0, abs=1e-5)


def test_what_shares_a_pass_costs_no_room_in_a_batch() -> None:
    assert pack([5] * 8, 10, {1, 2, 3, 5, 6, 7}) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert pack([5] * 8, 9, {1, 2, 3, 5, 6, 7}) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert pack([5, 6, 6], 6, {2}) == [[1, 2], [0]]


def test_a_context_leaves_room_for_what_is_to_be_written(
    lm: MegatronLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    write = harness.generate
    monkeypatch.setattr(harness, "generate", lambda e, p, **k: asked.extend(p) or write(e, p, **k))
    text = " ".join(f"word {n}" for n in range(200))
    lm.generate_until([request("generate_until", text, {"max_gen_toks": 24})])
    assert list(asked[0].tokens) == lm.tok_encode(text)[-(256 - 24) :]


@pytest.mark.long
def test_an_interrupted_run_goes_on_from_its_cache(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "CHUNK", 5)
    lm = model()
    score, calls = lm.engine.score, []

    def breaking(requests: Any, **settings: Any) -> Any:
        calls.append(len(requests))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(requests, **settings)

    monkeypatch.setattr(lm.engine, "score", breaking)
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, study, use_cache=str(tmp_path / "answers"))
    assert calls == [5, 5, 5]
    figures, answers = evaluate(lm, study, use_cache=str(tmp_path / "answers"))
    asked = sum(calls[3:])
    calls.clear()
    again, _ = evaluate(lm, study, use_cache=str(tmp_path / "answers"))
    assert calls == []  # all is known
    fresh, whole = evaluate(model(), study)
    assert_same(answers, whole)
    assert figures["local_pages"] == again["local_pages"]
    for name, value in fresh["local_pages"].items():  # which batched the rest in another way
        same = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        assert figures["local_pages"][name] == same, name
    lines = sum(len(documents) for documents in whole.values())
    assert asked > lines - 10 - len(whole["local_writing"]) and figures["local_cloze"]


def test_samples_have_seeds_of_their_own(lm: MegatronLM) -> None:
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    one, other = (request("generate_until", "The value of", settings, document=n) for n in range(2))
    torch.manual_seed(5)  # as the harness' --seed does
    twice = lm.generate_until([one, other, one])
    assert len(set(twice)) == 3
    assert model(budget=1).generate_until([other, one]) == [twice[1], twice[0]]
    torch.manual_seed(6)
    assert lm.generate_until([one])[0] not in twice
    assert model(seed=5).generate_until([one]) == twice[:1]
    assert lm.generate_until([request("generate_until", "The", {**settings, "seed": 5})] * 1)


def test_greedy_repeats_are_written_once(lm: MegatronLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    write = harness.generate
    monkeypatch.setattr(harness, "generate", lambda e, p, **k: asked.extend(p) or write(e, p, **k))
    texts = lm.generate_until([request("generate_until", "The", {"max_gen_toks": 3})] * 4)
    assert len(set(texts)) == 1 and len(asked) == 1


# --- Text and tokens ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json whose rules put <s> before a text, and its tokenizer_config.json."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("bos")
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate(["<s>", "</s>", *symbols])}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


TEXTS = ["a text", " a text ", "", "<s>a text", "one</s>two", "é € <s", "<|endoftext|>x"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_hf_backend(
    text: str, with_bos: Path, study: Path, lm: MegatronLM
) -> None:
    """Its rule: what the tokenizer adds is added, but where the text begins with BOS already."""
    from transformers import AutoTokenizer

    for folder, words in (
        (with_bos, load_tokenizer(directory=with_bos)),
        (study / "hf", lm.encoding.tokenizer),
    ):
        theirs = AutoTokenizer.from_pretrained(folder)
        encoding = HubEncoding(words)
        assert encoding.encode(text) == theirs.encode(text)
        assert encoding.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)
        ids = theirs.encode(text)
        assert encoding.decode([*ids, 10**6]) == theirs.decode(ids, skip_special_tokens=True)


def test_bos_stands_where_the_rules_want_it(with_bos: Path) -> None:
    words = load_tokenizer(directory=with_bos)
    config = random_models.config(vocab_size=258, max_position_embeddings=32)
    engine = Engine.load(random_models.checkpoint(config))
    lm = MegatronLM(engine, words)
    assert (lm.prefix_token_id, lm.eot_token_id) == (0, 1)
    assert lm.tok_encode("ab")[0] == 0 == lm.tok_encode("<s>ab")[0]
    assert lm.tok_encode("<s>ab") == lm.tok_encode("ab")
    without = MegatronLM(engine, words, add_bos_token=False, prefix_token_id=9)
    assert without.prefix_token_id == 9 and without.tok_encode("ab") == lm.tok_encode("ab")[1:]


def test_a_tokenizer_without_an_end_needs_a_prefix_only_where_one_is_used(tmp_path: Path) -> None:
    words = load_tokenizer(directory=random_models.byte_vocabulary(tmp_path / "bytes"))
    config = random_models.config(vocab_size=256, max_position_embeddings=32)
    lm = MegatronLM(Engine.load(random_models.checkpoint(config)), words)
    assert lm.loglikelihood([request("loglikelihood", "a", "b")])[0][0] < 0
    assert len(lm.generate_until([request("generate_until", "a", {"max_gen_toks": 4})])) == 1
    with pytest.raises(InputError, match="no BOS or end-of-text token.*prefix_token_id=N"):
        lm.loglikelihood([request("loglikelihood", "", "b")])


# --- What is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams=4, which is not supported"),
        ({"do_sample": True, "temperature": 0.0, "max_gen_toks": 9}, "at temperature 0"),
        ({"do_sample": True, "top_p": 2.0, "max_gen_toks": 9}, "top_p 2.0"),
        ({"max_gen_toks": 256}, "256 tokens, which leaves no room"),
        ({"max_gen_toks": 0}, "0 tokens"),
    ],
)
def test_texts_that_cannot_be_written(
    lm: MegatronLM, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        lm.generate_until([request("generate_until", "The", settings)])


def test_a_continuation_that_cannot_be_scored(lm: MegatronLM) -> None:
    with pytest.raises(InputError, match="continuation has 0 tokens"):
        lm.loglikelihood([request("loglikelihood", "a", "")])
    with pytest.raises(InputError, match="1 to 256 can be scored"):
        lm.loglikelihood([request("loglikelihood", "a", " the" * 300)])


def test_a_chat_template_is_not_there(lm: MegatronLM) -> None:
    assert lm.chat_template() is None
    with pytest.raises(InputError, match="no chat template"):
        lm.chat_template(True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_length": 257}, "must be 1 to 256"), ({"max_gen_toks": 0}, "must be 1 or more")],
)
def test_a_model_that_cannot_be_built(settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(**settings)


Ended = tuple[int, str, str]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run a command line here; without the harness' own tasks, whose index takes seconds."""
    begin = TaskManager.__init__

    def quick(self: TaskManager, *arguments: Any, **settings: Any) -> None:
        begin(self, *arguments, **{**settings, "include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", quick)
    # Else its handler, made once, would go on writing to the stderr of the first test.
    monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", False)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "handlers", [])

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mlm-eval", "harness", *map(str, arguments)])
        try:
            code = cli._main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        return code, *capsys.readouterr()

    return run


WRONG: dict[str, tuple[list[str], str]] = {
    "unknown argument": (["--task", "x", "--fewshots", "3"], "unrecognized arguments: --fewshots"),
    "names of tasks": (["ls", "tasks"], "ls tasks (`lm-eval ls tasks` lists them)"),
    "no tasks": (["--num_fewshot", "3"], "no task is named; give --tasks"),
    "model": (["--tasks", "x", "--model=hf"], "--model hf is not for the harness here"),
    "device": (["--tasks", "x", "--device", "cpu"], "--device cpu is not for the harness"),
    "batch size": (["--tasks", "x", "-b", "8"], "--batch_size 8 is not for the harness"),
    "model argument": (["--tasks", "x", "--model_args", "dtype=half"], "--model_args dtype is unk"),
    "no such task": (["--tasks", "no_such_task"], "ValueError: Tasks not found: no_such_task"),
    "no such yaml": (["--tasks", "local_cloze", "--config", "/no/such.yaml"], "/no/such.yaml"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_sentence(run: Callable[..., Ended], what: str) -> None:
    arguments, part = WRONG[what]
    code, out, err = run("--ckpt", GPT, "--", *arguments)
    assert code == 2 and out == ""
    said = [line for line in err.splitlines() if line.startswith("mlm-eval: ")]
    assert len(said) == 1 and part in said[0] and "Traceback" not in err, err


def test_data_that_is_not_there_is_named(run: Callable[..., Ended], study: Path) -> None:
    yaml = (study / "tasks" / "local_cloze.yaml").read_text()
    (study / "broken").mkdir()
    broken = yaml.replace("passages.jsonl", "none.jsonl").replace("local_cloze", "broken")
    (study / "broken" / "broken.yaml").write_text(broken)
    arguments = ["--tasks", "broken", "--include_path", study / "broken"]
    code, _, err = run("--ckpt", GPT, "--", *arguments)
    assert code == 2 and "none.jsonl" in err.splitlines()[-1] and "Traceback" not in err, err


def test_a_fault_of_ours_is_no_fault_of_the_user(
    run: Callable[..., Ended], study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlm_eval.engine.score.score_batch", lambda *_: 1 / 0)
    arguments = ["--tasks", "local_cloze", "--include_path", study / "tasks"]
    code, _, err = run("--ckpt", GPT, "--", *arguments)
    assert code == 1 and "ZeroDivisionError" in err


def test_a_bert_is_refused(run: Callable[..., Ended]) -> None:
    arguments = ["--tokenizer", GPT / "tokenizer", "--", "--tasks", "x"]
    code, _, err = run("--ckpt", BERT, *arguments)
    assert code == 2 and "is a BERT checkpoint" in err


def test_without_the_harness_it_says_how_to_get_it(
    run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run("--ckpt", GPT, "--", "--tasks", "x")
    assert code == 2 and "pip install lm_eval==0.4.13" in err


@pytest.mark.long
def test_settings_reach_the_model(run: Callable[..., Ended], study: Path, tmp_path: Path) -> None:
    arguments = ["--tasks", "local_pages", "--include_path", study / "tasks", "--limit", "1"]
    arguments += ["--model_args", "max_length=64,prefix_token_id=5", "--output_path", tmp_path]
    code, out, err = run("--ckpt", GPT, "--dtype", "bfloat16", "--vocab", "true", "--", *arguments)
    assert code == 0, err
    assert "windows of 64 tokens" in out and "vocab true" in out and "bfloat16" in out
    (record,) = tmp_path.rglob("results_*.json")
    config = json.loads(record.read_text())["config"]
    assert config["mlm_eval"]["max_length"] == 64 and config["device"] == "cpu"
    assert config["model_args"]["prefix_token_id"] == 5


def test_a_model_named_without_a_checkpoint_says_what_to_do() -> None:
    from lm_eval.api.registry import get_model

    from mlm_eval.harness.command import MODEL_NAME

    with pytest.raises(InputError, match="mlm-eval harness --ckpt"):
        get_model(MODEL_NAME).create_from_arg_obj({})
