"""README.md and docs/: every command shown is run, every link, file and option named is there.

Commands stand in fences (`sh`: one a line; `console`: after `$`, with their output) and in code
spans. What a word of a command stands for here is said by the tables below; a word that they do
not know fails its test, so that no command goes unnoticed. Output that is shown must come: every
line of it, in its order, `...` for any number of lines; numbers with a decimal point may differ
in the fourth digit, and lines of time are not compared.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import random_models, tiny_bert
from support.command_line import OF_A_LAUNCHER, TEXT, Ended, Run, as_user
from support.family_models import FAMILY_MODELS
from support.folders.result_records import zero_shot
from support.paths import PROJECT, SAMPLES

import mlm_eval
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.cli.app import commands as all_commands
from mlm_eval.cli.app import full_command

pytest_plugins = ["support.command_line_fixtures"]

FRONT = [PROJECT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")]
DOCUMENTS = [*FRONT, *sorted((PROJECT / "docs").glob("*.md"))]

# ---- what the words of the commands stand for ----------------------------------------------------

NOT_RUN = {
    "git clone <this repository> && cd mlm-eval": "needs the repository's address",
    ". .venv/bin/activate": "changes nothing but the shell that reads it",
}
OUTPUTS = {
    "D", "out", "gpt2_hf", "scores.jsonl", "bert_hf", "gpt_tp4", "gpt_tp2", "llama_dist",
    "mixtral_ep4", "dsv3_dist",
    "llama_hf", "gpt_v25", "gpt_core", "bench.json", "bench.png", "curve.png", "curve.json",
}  # fmt: skip
"""What a command is to make; it makes it in a folder of its own."""
WORDS = {
    "hf", "megatron", "torch_dist", "cpu", "true", "last-token", "bfloat16", "500MB", "gpt2-8.3b",
    "gpt2-tiny", "wikitext103", "megatron-gpt2-345m", "megatron-bert-345m-uncased",
    "race-megatron-336m", "checkpoint_version=2.0", "wikitext", "lambada_openai", "wiki_sample",
    "weak", "train", "core", "legacy", "Once upon a time", "all", "latest",
    "sample:gpt",
}  # fmt: skip
"""Names of formats, sizes, recipes, settings and tasks, and texts: no files."""
SMALL = {
    "bench": "--steps 1 --warmup-steps 1 --seq-length 16 --batch 1 --device cpu",
    "race": "--max-steps 1 --train-limit 32 --dev-limit 2 --test-limit 2 --seq-length 32",
    "lm": "--max-steps 1 --seq-length 16 --global-batch 2",
}
"""Options that keep a run short; the last one of a kind counts."""
ON_RANKS = {"wikitext103", "lambada", "score", "generate", "harness", "race", "lm"}
"""Commands whose --tp and --dp are ranks. They run on one, but for transcripts and torchrun."""
FOREIGN_OPTIONS = {
    "--overlapping-eval", "--strict-lambada", "--dist-ckpt-format", "--no-load-optim",
    "--no-load-rng", "--ckpt-format", "--ckpt-step", "--use-dist-ckpt", "--use-mcore-models",
    "--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss", "--keep-last",
    "--valid-data", "--yaml-cfg", "--gpu-bind", "--transformer-impl", "--kill-on-bad-exit",
    "--extra-index-url",
}  # fmt: skip
"""Megatron's, Slurm's and pip's."""
FOREIGN_FILES = {
    "tasks/zeroshot_gpt", "tasks/zeroshot_gpt/", "tasks/zeroshot_gpt2/", "tasks/data_utils.py",
    "tasks/zeroshot_gpt/detokenizer.py", "tasks/zeroshot_gpt/datasets.py",
}  # fmt: skip
"""Megatron's."""


Builder = Callable[[Path], None]
"""Makes what a placeholder stands for, at a path."""


def _gpt(place: Path) -> None:
    config = random_models.config(
        vocab_size=264, max_position_embeddings=32, num_attention_heads=8, kv_channels=4
    )
    write_megatron_torch(random_models.checkpoint(config), place, tp=2)
    _tokenizer(place / "tokenizer")


def _run(place: Path) -> None:
    """Three iterations of a run, as Megatron leaves them."""
    for iteration in (1000, 2000, 3000):
        made = place.with_name(f"{place.name}-{iteration}")
        _gpt(made)
        place.mkdir(exist_ok=True)
        (made / "release").rename(place / f"iter_{iteration:07d}")
    (made / "tokenizer").rename(place / "tokenizer")
    (place / "latest_checkpointed_iteration.txt").write_text("3000")


def _mixtral(place: Path) -> None:
    write_megatron_torch(random_models.checkpoint(FAMILY_MODELS["mixtral"]), place, tp=2)


def _tokenizer(place: Path) -> None:
    file = random_models.byte_vocabulary(place) / "vocab.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "<|endoftext|>": 256}))


def _bert(place: Path) -> None:
    tiny_bert.checkpoint(place, positions=64, num_attention_heads=8, kv_channels=4)
    tiny_bert.write_vocabulary(place)


def _converted(to: str, **sizes: int) -> Builder:
    def write(place: Path) -> None:
        _gpt(place.with_name(f"{place.name}-source"))
        source = mlm_eval.open_checkpoint(place.with_name(f"{place.name}-source"))
        mlm_eval.convert(source, to, place, **sizes)

    return write


def _lines(*rows: dict[str, object]) -> Builder:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return lambda place: _written(place, text)


def _written(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")


def _predictions(place: Path) -> None:
    head = {"predictions_of": "race", "set": "dev-middle", "role": "dev", "labelled": True}
    more = {"version": "", "examples": 1, "seed": 1, "recipe": "r", "checkpoint": CHECKPOINT}
    limits = dict.fromkeys(("train_limit", "dev_limit", "test_limit", "null_threshold"))
    row = {"id": "q", "label": 1, "probabilities": [0.1, 0.7, 0.1, 0.1]}
    header = {**head, **more, **limits, "threshold_is_fixed": False}
    _lines(header, row)(place / "dev-middle.jsonl")


CHECKPOINT = {"path": "bert", "digest": "d", "num_parameters": 336_000_000, "config": {}}


def _sample_record(task: str, data: str) -> Builder:
    def write(place: Path) -> None:
        engine = mlm_eval.Engine.load(mlm_eval.open_checkpoint("checkpoints/samples/gpt"))
        data_file = f"checkpoints/samples/text/{data}"
        mlm_eval.evaluate(task, engine, data=data_file).write(place)

    return write


def _series(place: Path) -> None:
    record = zero_shot("lambada", 40.0)
    record["checkpoint"]["iteration"] = 1000
    path = place.with_name("series.iter_0001000.json")
    _written(path, json.dumps(record))
    entry = {"checkpoint": "run1", "iteration": 1000, "record": path.name}
    _written(place, json.dumps({"task": "lambada", "series": [entry]}))


PLACES: dict[str, Builder] = {
    "C": _gpt,
    "A": _gpt,
    "B": _converted("megatron", tp=4),
    "T": _tokenizer,
    "models/gpt2_345m": _gpt,
    "models/gpt2": _tokenizer,
    "mixtral": _mixtral,
    "run1": _run,
    "run2": _run,
    "hf_folder": _converted("hf"),
    "bert_345m": _bert,
    "RACE": lambda place: place.symlink_to(SAMPLES / "race"),
    "wiki.test.tokens": lambda place: _written(place, TEXT),
    "lambada_test.jsonl": _lines({"text": "the cat saw a dog"}, {"text": "one two three"}),
    "lines.jsonl": _lines({"tokens": [1, 2, 3]}, {"text": "abc"}),
    "seed-1/predictions": _predictions,
    "seed-2/predictions": _predictions,
    "wikitext103.json": _sample_record("wikitext103", "wiki.sample.tokens"),
    "series.json": _series,
    "lambada.json": _sample_record("lambada", "lambada.sample.jsonl"),
}
"""Placeholder -> what makes it. /models/... are below the folder in which a command is run."""

TINY_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: lambada_test.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
HUB_TASKS = {"wikitext": "tiny_pages", "lambada_openai": "tiny_words"}
"""Tasks of the harness that fetch their data, and what stands for them."""

# ---- what the documents show ---------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A command: where it stands, its words, and its output where that is shown."""

    document: Path
    line: int
    text: str
    output: tuple[str, ...] | None = None

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}: {self.text}"


@dataclass
class Fence:
    """A fenced block: its line, what follows the three marks, its lines."""

    line: int
    info: str
    lines: list[str] = field(default_factory=list)


def fences(document: Path) -> list[Fence]:
    found: list[Fence] = []
    inside = False
    for number, line in enumerate(document.read_text(encoding="utf-8").split("\n"), start=1):
        if line.startswith("```"):
            inside = not inside
            if inside:
                found.append(Fence(number, line[3:].strip()))
        elif inside:
            found[-1].lines.append(line)
    assert not inside, f"{document.name}: a fence is not closed"
    return found


def prose(document: Path) -> str:
    """Return a document without its fenced blocks; lines keep their numbers."""
    lines = document.read_text(encoding="utf-8").split("\n")
    for fence in fences(document):
        for number in range(fence.line - 1, fence.line + len(fence.lines) + 1):
            lines[number] = ""
    return "\n".join(lines)


def spans(document: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of the code spans in a document's prose and tables."""
    text = prose(document)
    for match in re.finditer(r"`([^`]+)`", text):
        yield text.count("\n", 0, match.start()) + 1, re.sub(r"\s+", " ", match[1]).strip()


def without_comment(line: str) -> str:
    return re.sub(r"\s+#.*", "", line).strip()


def commands(document: Path) -> Iterator[Shown]:
    for fence in fences(document):
        if fence.info == "sh":
            begun = ""
            for number, line in enumerate(fence.lines, start=fence.line + 1):
                begun = f"{begun}{without_comment(line)}"
                if begun.endswith("\\"):  # it goes on in the next line
                    begun = begun.removesuffix("\\")
                elif begun:
                    yield Shown(document, number, begun)
                    begun = ""
        elif fence.info == "console":
            starts = [i for i, line in enumerate(fence.lines) if line.startswith("$ ")]
            assert starts[:1] == [0], f"{document.name}:{fence.line}: output before a command"
            for start, stop in zip(starts, [*starts[1:], len(fence.lines)], strict=True):
                output = tuple(fence.lines[start + 1 : stop])
                text = fence.lines[start].removeprefix("$ ")
                yield Shown(document, fence.line + 1 + start, text, output)
    for number, text in spans(document):
        program, *rest = text.split(" ")
        least = 2 if program in ("mlm-eval", "python") else 1
        if program in ("mlm-eval", "torchrun", "srun", "make", "pip", "pipx", "uv", "python"):
            if len(rest) >= least:
                yield Shown(document, number, text)


SHOWN = sorted(
    (shown for document in DOCUMENTS for shown in commands(document)),
    key=lambda shown: (shown.document.name, shown.line),
)
BLOCKS = [
    (document, fence)
    for document in DOCUMENTS
    for fence in fences(document)
    if fence.info == "python"
]


# ---- a place to run them in ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that placeholders stand for, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("documentation")
    for name in ("checkpoints", "tests"):
        (folder / name).symlink_to(PROJECT / name)
    return folder


@pytest.fixture
def place(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of one command."""
    for name in ("checkpoints", "tests"):
        (tmp_path / name).symlink_to(PROJECT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(places / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")  # the harness sets it, for good
    monkeypatch.delenv("MLM_EVAL_CATALOG", raising=False)
    yield tmp_path
    for handler in list(logging.root.handlers):  # the harness' own, on the stderr of one test
        if type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)


def provide(name: str, places: Path, place: Path) -> Path:
    """Put what a placeholder stands for into a working folder."""
    made, here = places / name, place / name
    if not made.exists():
        made.parent.mkdir(exist_ok=True)
        PLACES[name](made)
    if not here.exists():
        here.parent.mkdir(exist_ok=True)
        here.symlink_to(made)
    return here


def checked_words(words: list[str], places: Path, place: Path) -> list[str]:
    """Return the words of a command with its placeholders filled in; all of them must be known."""
    filled = []
    for before, word in zip(["", *words], words, strict=False):
        name = word.removeprefix("/")
        if name in PLACES and before != "--output":  # where it is written, nothing stands for it
            word = str(provide(name, places, place)) if word.startswith("/") else word
            provide(name, places, place)
        else:
            known = (
                word.startswith("-")
                or name in PLACES
                or word in OUTPUTS
                or word in WORDS
                or re.fullmatch(r"[\d.,e-]+", word)
                or (word.startswith(("checkpoints/", "tests/")) and (PROJECT / word).exists())
                or (place / word).is_dir()  # of a file that the document shows
            )
            assert known, (
                f"{word!r} is in none of the tables of {Path(__file__).name}; say there what "
                "it stands for"
            )
        filled.append(word)
    return filled


def write_files(document: Path, place: Path) -> None:
    """Write the files that a document shows: fences with a language and a path."""
    for fence in fences(document):
        if " " in fence.info:
            _written(place / fence.info.split(" ")[1], "\n".join(fence.lines) + "\n")


def ranks_of(words: list[str]) -> int:
    """Return tp x dp of a command."""
    sizes = [int(words[i + 1]) for i, word in enumerate(words) if word in ("--tp", "--dp")]
    return math.prod(sizes)


def run_it(words: list[str], run: Run, *, on_ranks: bool, launcher: list[str]) -> Ended:
    """Run a command of ours: in this process, or as a user does."""
    command = words[0]
    end = words.index("--") if "--" in words else len(words)
    more = shlex.split(SMALL.get(command, ""))
    if command in ON_RANKS and not on_ranks:
        more += ["--tp", "1", "--dp", "1"]
    if command in ON_RANKS - {"score"} and "--device" not in words:
        more += ["--device", "cpu"]
    words = [*words[:end], *more, *words[end:]]
    if launcher:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        count = launcher[launcher.index("--nproc-per-node") + 1]
        line = ["--nproc-per-node", count, "--master-port", port, "-m", "mlm_eval", *words]
        return as_user(*line, command=("-P", "-m", "torch.distributed.run"))
    return as_user(*words) if on_ranks else run(*words)


def hub_tasks(words: list[str], place: Path) -> list[str]:
    """Return a harness command with a task of its own data where it names one of the Hub's."""
    replaced = [HUB_TASKS.get(word, word) for word in words]
    if replaced == words:
        return words
    for name in HUB_TASKS.values():
        _written(place / "tiny_tasks" / f"{name}.yaml", TINY_TASK.format(name=name))
    return [*replaced, "--include_path", "tiny_tasks"]


# ---- the commands --------------------------------------------------------------------------------

ENDED: dict[tuple[str, ...], Ended] = {}
"""What has been run; a command that is shown twice is run once."""


def inner_command(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words of our own command, and of the launcher before it."""
    if words[0] == "mlm-eval":
        return words[1:], []
    if words[0] == "srun":
        end = words.index("mlm-eval")
        return words[end + 1 :], words[:end]
    end = words.index("mlm_eval")
    assert words[0] == "torchrun" and words[end - 1] == "-m", words
    return words[end + 1 :], words[: end - 1]


@pytest.mark.parametrize("shown", [s for s in SHOWN if s.text not in NOT_RUN], ids=str)
def test_command(shown: Shown, run: Run, places: Path, place: Path):
    program, *rest = shown.words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets)
        return
    if program in INSTALLERS:
        assert_installs(shown.text)
        return
    words, launcher = inner_command(shown.words)
    if words[0] == "harness":
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    write_files(shown.document, place)
    words = [words[0], *checked_words(words[1:], places, place)]
    if launcher:  # as many processes as ranks
        option = "--ntasks" if launcher[0] == "srun" else "--nproc-per-node"
        count = int(launcher[launcher.index(option) + 1])
        assert count == ranks_of(words), f"{count} processes, tp x dp is {ranks_of(words)}"
        if launcher[0] == "srun" or count > 2:
            launcher = []
    on_ranks = bool(launcher) or (shown.output is not None and ranks_of(words) == 2)
    if words[0] == "harness":
        if set(words) & set(HUB_TASKS):
            provide("lambada_test.jsonl", places, place)
        words = hub_tasks(words, place)
    key = (*launcher, str(on_ranks), *words)
    if key not in ENDED:
        ENDED[key] = run_it(words, run, on_ranks=on_ranks, launcher=launcher)
    ended = ENDED[key]
    assert ended.code == expected_code(shown), ended.err
    if shown.output is not None:
        assert_shown(shown.output, ended)


INSTALLERS = ("pip", "pipx", "uv")


def assert_installs(text: str) -> None:
    """Refuse other commands than the installation of the project, with or without extras.

    A clone is `.`, an address has `ADDRESS` in its place; the short list follows `--no-deps`.
    """
    what, *more = shlex.split(re.sub(r"^(pip|pipx|uv pip) install (--no-deps )?", "", text))
    match = re.fullmatch(r"(?:\.|mlm-eval)(?:\[(.+?)\])?(?: @ git\+ADDRESS)?", what)
    assert match and what.startswith(".") != what.endswith("ADDRESS"), text
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert not match[1] or set(match[1].split(",")) <= set(project["optional-dependencies"])
    assert bool(more) == ("--no-deps" in text), text


BATCHES = [
    (document, fence)
    for document in DOCUMENTS
    for fence in fences(document)
    if fence.info.startswith("bash ")
]
"""Scripts for Slurm."""
FAKES = {
    "srun": 'while [ "$1" != mlm-eval ]; do shift; done; exec "$@"',
    "mlm-eval": 'exec "$PYTHON" -P -m mlm_eval "$@" --tp 1 --dp 1 --device cpu',
}
"""What stands for a cluster: one task, on the CPU."""


@pytest.mark.process
@pytest.mark.parametrize(
    ("document", "fence"), BATCHES, ids=[fence.info.split(" ")[1] for _, fence in BATCHES]
)
def test_a_batch_script_runs(document: Path, fence: Fence, places: Path, place: Path):
    """As Slurm runs it, with the variable of an array's task; what it is to write is there."""
    source = "\n".join(fence.lines)
    names = "|".join(map(re.escape, sorted(PLACES, key=len, reverse=True)))
    source = re.sub(
        rf"(?<![\w./])/?({names})(?![\w./])",
        lambda match: str(provide(match[1], places, place)),
        source,
    )
    provide("models/gpt2_345m", places, place)
    task = re.search(r"^#SBATCH --array=(\d+)-", source, re.MULTILINE)
    (place / "models" / "run").mkdir(parents=True, exist_ok=True)
    iteration = place / "models" / "run" / f"iter_{int(task[1]) if task else 0:07d}"
    iteration.symlink_to((place / "models" / "gpt2_345m").resolve())
    source = source.replace("/models/run", str(place / "models" / "run"))
    for name, body in FAKES.items():
        _written(place / "bin" / name, f"#!/bin/sh\n{body}\n")
        (place / "bin" / name).chmod(0o755)
    _written(place / "script", source)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_A_LAUNCHER)}
    environment |= {"PYTHON": sys.executable, "PATH": f"{place / 'bin'}:{environment['PATH']}"}
    environment["SLURM_ARRAY_TASK_ID"] = task[1] if task else ""
    done = subprocess.run(
        ["bash", "script"], cwd=place, env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    (record,) = place.glob("*.json")
    assert task is None or iteration.name in record.name


def expected_code(shown: Shown) -> int:
    """Return the exit code that goes with the output that is shown."""
    for line in shown.output or ():
        if line.startswith("mlm-eval: "):
            return 2
        if line.startswith("verdict: DIFFERENT"):
            return 3
    return 0


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?")


def same_line(shown: str, real: str) -> bool:
    """Whether a line is the one that is shown, but for the rounding of its numbers."""
    if shown == real or (shown.startswith("  time ") and real.startswith("  time ")):
        return True
    if NUMBER.sub("#", shown) != NUMBER.sub("#", real):
        return False
    for one, other in zip(NUMBER.findall(shown), NUMBER.findall(real), strict=True):
        a, b = (float(number.replace(",", "")) for number in (one, other))
        if one != other and not ("." in one and math.isclose(a, b, rel_tol=2e-4)):
            return False
    return True


def assert_shown(output: tuple[str, ...], ended: Ended) -> None:
    """Refuse output that does not come; lines without `...` between them come together."""
    streams = {"out": ended.out.split("\n"), "err": ended.err.split("\n")}
    at = dict.fromkeys(streams, 0)
    skip = False
    for line in output:
        if line == "...":
            skip = True
            continue
        for name, lines in streams.items():
            stop = len(lines) if skip or name == "err" else at[name] + 1
            places = [
                i for i in range(at[name], min(stop, len(lines))) if same_line(line, lines[i])
            ]
            if places:
                at[name], skip = places[0] + 1, False
                break
        else:
            raise AssertionError(f"{line!r} was not printed there; printed was:\n{ended.out}")
    rest = streams["out"][at["out"] :]
    assert skip or not "".join(rest), f"more was printed: {rest}"


# ---- what compares must be able to fail ----------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "out", "good"),
    [
        (["a 1.2345"], "a 1.2346\n", True),
        (["a 1.2345"], "a 1.2445\n", False),
        (["a 1,024"], "a 1,025\n", False),
        (["a", "..."], "a\nb\n", True),
        (["a"], "a\nb\n", False),
        (["b"], "a\nb\n", False),
        (["...", "b"], "a\nb\n", True),
        (["a", "c"], "a\nb\nc\n", False),
        (["a", "...", "c"], "a\nb\nc\n", True),
        (["c", "...", "a"], "a\nb\nc\n", False),
        (["  time  1 s"], "  time  2 s\n", True),
        (["w"], "", True),
        (["v"], "", False),
    ],
)
def test_output_is_compared(output: list[str], out: str, good: bool):
    try:
        assert_shown(tuple(output), Ended(0, out, "w\n"))
    except AssertionError:
        assert not good
    else:
        assert good


def test_an_unknown_word_fails(place: Path, places: Path):
    with pytest.raises(AssertionError, match="'gpt9_345m' is in none of the tables"):
        checked_words(["inspect", "--ckpt", "gpt9_345m"][1:], places, place)


def test_commands_are_found(tmp_path: Path):
    document = tmp_path / "a.md"
    lines = [
        "```sh",
        "mlm-eval a \\",
        "  b  # c",
        "",
        "```",
        "`mlm-eval x",
        "y` `mlm-eval` `make z`",
    ]
    document.write_text("\n".join([*lines, "```console", "$ q", "r", "```"]))
    found = {(shown.line, shown.text, shown.output) for shown in commands(document)}
    assert found == {
        (3, "mlm-eval a b", None),
        (6, "mlm-eval x y", None),
        (7, "make z", None),
        (9, "q", ("r",)),
    }


# ---- Python, and the rest of the documents -------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "fence"), BLOCKS, ids=[f"{d.name}:{f.line}" for d, f in BLOCKS]
)
def test_python(
    document: Path,
    fence: Fence,
    places: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
):
    source = "\n".join(fence.lines)
    for name in PLACES:
        quoted = rf'"/?{re.escape(name)}"'
        if re.search(quoted, source):
            source = re.sub(quoted, json.dumps(str(provide(name, places, place))), source)
    exec(compile(source, f"{document.name}:{fence.line}", "exec"), {"__name__": "shown"})
    printed = capsys.readouterr().out
    assert all(text in printed for text in re.findall(r"# -> (.+)", source)), printed


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_fences_say_what_they_hold(document: Path):
    kinds = {"sh", "console", "python", "text", "yaml", "bash"}
    assert {fence.info.partition(" ")[0] for fence in fences(document)} <= kinds


def headings(document: Path) -> set[str]:
    """Return the anchors of a document's headings, by GitHub's rules."""
    found = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links(document: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path):
    folders = ("checkpoints/", "mlm_eval/", "tasks/", "tests/", "benchmarks/", "scripts/", ".ci/")
    for line, text in spans(document):
        if text.startswith(folders) and text not in FOREIGN_FILES and " " not in text:
            assert list(PROJECT.glob(text)), f"line {line}: {text}"


CITATION = re.compile(r'docs/(\w+\.md)((?:(?:,| and| to)? "[^"]+")*)')
"""A page of docs/ in the code, with the headings that are cited: docs/x.md, "A", "B" and "C"."""


def citations(source: str) -> Iterator[tuple[str, str | None]]:
    """Yield page and heading of every citation in a source; no heading: the page as a whole."""
    one_line = re.sub(r"\s*\n\s*(# )?", " ", source)
    for page, cited in CITATION.findall(one_line):
        for heading in re.findall(r'"([^"]+)"', cited) or [None]:
            yield page, heading


def test_citations_are_found():
    source = '''(docs/a.md, "B c")\n    # see docs/a.md, "D",\n    # "E" and "F"; docs/g.md "no"'''
    found = {("a.md", "B c"), ("a.md", "D"), ("a.md", "E"), ("a.md", "F"), ("g.md", "no")}
    assert set(citations(source)) == found


def test_citations_lead_to_a_heading():
    """Code cites sources that a reader can open: pages of docs/, by a heading that is there."""
    cited, faults = 0, []
    for folder in ("checkpoints", "mlm_eval", "tasks", "tests", "benchmarks", "scripts"):
        for file in (PROJECT / folder).rglob("*.py"):
            if file.is_relative_to(PROJECT / "tests" / "house"):
                continue
            source = file.read_text(encoding="utf-8")
            if found := re.findall(r"\b[Ff]acts [A-J]\b", source):
                faults.append(f"{file}: {found}: of which document?")
            for page, heading in citations(source):
                cited += 1
                path = PROJECT / "docs" / page
                titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
                if heading is not None and heading not in titles:
                    faults.append(f"{file}: {page} has no {heading!r}")
    assert not faults
    assert cited > 30


def test_the_map_names_every_module():
    named = [text for _, text in spans(PROJECT / "docs" / "code.md") if "/" in text]
    files = {path for text in named if not text.startswith("/") for path in PROJECT.glob(text)}
    missing = [
        str(module.relative_to(PROJECT))
        for folder in ("checkpoints", "mlm_eval", "tasks")
        for module in (PROJECT / folder).rglob("*.py")
        if module.name not in ("__init__.py", "__main__.py")
        and not {module, *module.parents} & files - {PROJECT / folder}
    ]
    assert not missing, f"docs/code.md does not say what is in {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_options_that_are_named_exist(document: Path):
    known = {
        option for name in all_commands() for p in full_command(name).params for option in p.opts
    }
    known |= FOREIGN_OPTIONS | {"--help", "--version", "--install-completion"}
    for line, text in spans(document):
        first, *rest = text.split(" ")
        if first == "mlm-eval" and rest and not rest[0].startswith("-"):
            assert rest[0] in all_commands(), f"line {line}: {text}"
        if first.startswith("--"):
            assert first.partition("=")[0] in known, f"line {line}: {text}"


def test_the_worked_example_repeats_its_transcripts():
    text = (PROJECT / "docs" / "protocols.md").read_text(encoding="utf-8")
    table = text.partition("## One model")[2].partition("| protocol |")[2].partition("\n\n")[0]
    figures = re.findall(r"\d[\d,]*\.\d\d\b", table)
    printed = [
        float(number.replace(",", ""))
        for fence in fences(PROJECT / "docs" / "protocols.md")
        if fence.info == "console"
        for number in NUMBER.findall("\n".join(fence.lines))
    ]
    assert len(figures) == 12
    for figure in figures:
        value = float(figure.replace(",", ""))
        assert any(round(number, 2) == value for number in printed), figure


def test_every_page_and_image_is_linked_and_small():
    """A page by the README, an image by any page."""
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    for file in (PROJECT / "docs").rglob("*.*"):
        if file.suffix == ".md":
            assert f"(docs/{file.name})" in readme, file
        else:
            assert f"images/{file.name})" in pages and file.stat().st_size < 60_000, file


def test_the_front_pages_name_the_versions_that_are_used():
    """A citation, a change log and the hooks before a commit go with one version of everything."""
    citation = (PROJECT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {mlm_eval.__version__}\n" in citation
    assert f"\n## {mlm_eval.__version__}" in (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    tested = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    hooks = (PROJECT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pinned = re.findall(r"[\w-]+==[\d.]+", hooks)
    assert len(pinned) == 3 and set(pinned) <= set(tested)


def test_every_gate_calls_targets_of_the_makefile():
    """The workflow, the gate and the hooks, none of which a test can run."""
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) *[?:]?=", makefile, re.MULTILINE))
    workflow = (PROJECT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    steps = re.findall(r"- run: (.*)", workflow)
    assert len(steps) >= 6
    for step in steps:
        make, target, *settings = step.split()
        assert make == "make" and target in targets, step
        assert {setting.partition("=")[0] for setting in settings} <= variables, step
    gate = (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
    (called,) = re.findall(r"^for target in (.*); do$", gate, re.MULTILINE)
    assert {step.split()[1] for step in steps} == set(called.split()) <= targets
    tested = re.findall(r'"(3\.\d+)"', workflow)
    project = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={tested[0]}"' in project
    lint = re.findall(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[0]
    hooks = (PROJECT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    entries = re.findall(r"entry: (\w+(?: \w+)?)", hooks)
    assert entries and all(entry in lint for entry in entries), entries


def test_nothing_in_the_tables_is_left_over():
    texts = {shown.text for shown in SHOWN}
    words = {word.removeprefix("/") for shown in SHOWN for word in shown.words}
    assert set(NOT_RUN) <= texts
    assert (WORDS | OUTPUTS | set(PLACES) | set(SMALL)) - words == set()
    assert os.path.commonpath([str(path) for path in DOCUMENTS]) == str(PROJECT)
