"""What an installation needs: the short list for containers, extras, the sentence for a gap."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.command_line import Run, as_user, assert_one_sentence
from support.house import house_rules
from support.paths import PROJECT, SAMPLES

from mlm_eval.checkpoints.errors import PACKAGES, InputError, not_installed
from mlm_eval.checkpoints.projects.settings import read_yaml

pytest_plugins = ["support.command_line_fixtures"]

TEXT = SAMPLES / "text" / "wiki.sample.tokens"
CLOZE = SAMPLES / "text" / "lambada.sample.jsonl"
SHORT = {"typer", "annotated-doc", "shellingham", "safetensors", "tokenizers", "numpy"}
"""What the page on installing lists for a container that has torch."""
PAGE = PROJECT / "docs" / "installing.md"

# --- what is declared -----------------------------------------------------------------------------


def project() -> dict[str, list[Requirement]]:
    """Return what is declared: by the extra, and by "" what every installation brings."""
    table = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = {"": table["dependencies"], **table["optional-dependencies"]}
    return {name: [Requirement(text) for text in texts] for name, texts in lists.items()}


@pytest.mark.long
def test_every_package_that_may_be_missing_has_its_sentence():
    """All that the code imports: always there, or with a sentence that names the right command."""
    imported = {
        name.partition(".")[0]
        for module, source in house_rules.sources(PROJECT).items()
        for _, name in house_rules.imports(source, module)
    }
    foreign = imported - set(sys.stdlib_module_names) - {"mlm_eval", ""}
    through_torch = {"tensorboard"}  # torch.utils.tensorboard imports it
    always = {"torch", "numpy", "typer", "safetensors", "tokenizers"}
    assert foreign | through_torch == set(PACKAGES) | always

    declared = project()
    for package, (requirement, extra) in PACKAGES.items():
        wanted = Requirement(requirement)
        (found,) = (
            known
            for known in declared[extra or ""]
            if canonicalize_name(known.name) == canonicalize_name(wanted.name)
        )
        assert not wanted.specifier or wanted.specifier == found.specifier, package


def test_everything_but_the_tests_own_is_in_all():
    (everything,) = project()["all"]
    trackers = {"wandb", "trackio", "mlflow"}  # large, and one is enough
    others = {"", "all", "dev", "docs", "notebooks"}
    assert everything.extras == set(project()) - others - trackers


def floors() -> dict[str, str]:
    """Return the lowest release that is declared of each package that every installation brings."""
    return {
        requirement.name: bound.version
        for requirement in project()[""]
        for bound in requirement.specifier
        if bound.operator == ">="
    }


def test_the_page_on_installing_lists_every_floor():
    """The releases that the tests were run with, all at once, are those that are declared."""
    page = PAGE.read_text(encoding="utf-8")
    (line,) = re.findall(r"The floors, .*?: (.*?)\.$", page, re.MULTILINE | re.DOTALL)
    listed = dict(item.split() for item in line.split(","))
    assert {name: Version(release) for name, release in listed.items()} == {
        name: Version(release) for name, release in floors().items()
    }


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_what_is_said_to_fail_is_below_the_floor(package: str):
    """The page's table of releases: none that is admitted fails, and one that fails is named."""
    rows = re.findall(rf"^\| {package} ([^|]*)\|(.*)\|$", PAGE.read_text("utf-8"), re.MULTILINE)
    failing = [
        Version(release)
        for releases, result in rows
        if re.search(r"\bfail|cannot", result)
        for release in releases.strip().split(", ")
    ]
    assert failing and max(failing) < Version(floors()[package])


def test_no_text_names_an_index_that_does_not_have_the_package():
    """`pip install mlm-eval` finds nothing: a clone (`.`) or a git address has to be named."""
    wrong = re.compile(r"install [^`\n]*(?<![\w./])mlm-eval(\[[\w,-]+\])?(?=['\"`\n])")
    assert wrong.search("pip install 'mlm-eval[plots]'") and wrong.search("pip install mlm-eval`")
    assert not wrong.search("pip install 'mlm-eval[plots] @ git+https://x/y.git'")
    files = [*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md"), PROJECT / "Makefile"]
    files += [path for name in house_rules.FOLDERS for path in (PROJECT / name).rglob("*.py")]
    assert [path for path in files if wrong.search(path.read_text(encoding="utf-8"))] == []


# --- where a package is missing -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "words", "what"),
    [
        ("lm_eval", "harness --ckpt sample:gpt -- --tasks x", "mlm-eval harness needs"),
        ("matplotlib", "bench --model gpt2-tiny --plot OUT/a.png", "--plot needs"),
        ("matplotlib", "report RECORD --include-limited --format html", "--format html needs"),
        ("pandas", "report RECORD --include-limited --format csv", "this command needs"),
        ("jinja2", "report RECORD --include-limited", "this command needs"),
        ("datasets", "lambada --ckpt sample:gpt --device cpu", "needs datasets"),
        ("transformers", "convert --ckpt sample:gpt --to hf --output OUT/hf --verify", "--verify"),
    ],
)
def test_a_command_says_what_to_install(
    package: str,
    words: str,
    what: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    record = tmp_path / "record.json"
    if "RECORD" in words:
        made = run("lambada", "--ckpt", "sample:gpt", "--data", CLOZE, "--device", "cpu",
                   "--limit", 2, "--output", record)  # fmt: skip
        assert made.code == 0, made.err
    monkeypatch.setitem(sys.modules, package, None)
    line = words.replace("OUT", str(tmp_path)).replace("RECORD", str(record))
    ended = run(*line.split(" "))
    requirement, extra = PACKAGES[package]
    assert_one_sentence(ended, what, f"which is not installed: run `pip install {requirement}`")
    assert extra is None or f"`pip install '.[{extra}]'`" in ended.err
    assert not (tmp_path / "hf").exists() and not (tmp_path / "a.png").exists()


def test_settings_in_yaml_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run_config.yaml").write_text("model: {}")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(InputError, match="run_config.yaml needs pyyaml.*`pip install pyyaml`"):
        read_yaml(tmp_path / "run_config.yaml")


def test_the_sentence_says_what_else_can_be_done():
    said = str(not_installed("sentencepiece", "a.model", "give another"))
    assert said == (
        "a.model needs sentencepiece, which is not installed: run `pip install sentencepiece` "
        "(in a clone of mlm-eval: `pip install '.[sentencepiece]'`), or give another"
    )


@pytest.mark.parametrize("missing", [(), ("tensorboard",), ("tensorboard", "matplotlib")])
def test_training_goes_on_without_a_log_or_a_plot(
    missing: tuple[str, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    ended = run(
        "lm", "--init", "gpt2-tiny", "--data", TEXT, "--tokenizer", SAMPLES / "gpt" / "tokenizer",
        "--output-dir", tmp_path, "--seq-length", 16, "--max-steps", 2, "--global-batch", 2,
        "--device", "cpu",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    for package, made in (("tensorboard", "tensorboard"), ("matplotlib", "training.png")):
        assert (tmp_path / made).exists() == (package not in missing)
        said = f"needs {package}, which is not installed: run `pip install {package}`"
        assert ended.err.count(said) == (package in missing)
    assert ended.err.count("training goes on without it") == len(missing)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2]


# --- the short list -------------------------------------------------------------------------------


def closure(*names: str) -> Iterator[str]:
    """Yield distributions and all that they need, as they are installed here."""
    seen: set[str] = set()
    waiting = [*names]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        yield name
        for requirement in map(Requirement, needs):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with torch, the short list and the package, and nothing else.

    Made of links to what is installed here. A newer typer needs pydantic, so what typer needs is
    there; of tokenizers and safetensors there is the package alone.
    """
    place = tmp_path_factory.mktemp("container") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    for name in {*closure("torch", "typer"), *SHORT}:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    (site / "mlm_eval").symlink_to(PROJECT / "mlm_eval")
    return place / "bin" / "python"


def test_the_container_has_nothing_else(container: Path):
    script = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    names = [*PACKAGES, "huggingface_hub", "tokenizers"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([container, "-c", script, *names], capture_output=True, env=clean)
    assert done.stdout.decode().strip() in ("['tokenizers']", "['jinja2', 'tokenizers']"), done


RUN_ALL = """
import json, sys
from mlm_eval.cli import main
for sys.argv in json.loads(sys.argv[1]):
    print("RUN", *sys.argv)
    try:
        main()
    except SystemExit as end:
        print("ENDED", end.code)
"""


@pytest.mark.process
def test_the_short_list_runs_six_commands(
    container: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """inspect, convert, wikitext103, lambada on two ranks, score and generate; the help, too."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "executable", str(container))
    (tmp_path / "lines.jsonl").write_text('{"text": "An exception is raised"}\n')
    lines = f"""\
        --help
        inspect --ckpt sample:gpt
        convert --ckpt sample:gpt --to hf --output {tmp_path}/hf
        convert --ckpt sample:gpt --to megatron --output {tmp_path}/megatron --tp 4
        convert --ckpt sample:gpt --to torch_dist --output {tmp_path}/dist
        wikitext103 --ckpt {tmp_path}/dist --device cpu --data {TEXT} --limit 4
        lambada --ckpt {tmp_path}/hf --device cpu --data {CLOZE} --limit 4 --tp 2
        score --ckpt sample:gpt --device cpu --input {tmp_path}/lines.jsonl --output {tmp_path}/out
        generate --ckpt sample:gpt --device cpu --prompt raised --max-new-tokens 3"""
    commands = [["mlm-eval", *line.split()] for line in lines.splitlines()]
    ended = as_user(json.dumps(commands), command=("-P", "-c", RUN_ALL))
    assert ended.out.count("ENDED 0") == len(commands), ended
    for said in ("wikitext103", "megatron-torch", "adjusted perplexity", "(0 of 4"):
        assert said in ended.out
    assert json.loads((tmp_path / "out").read_text())["logprobs"]
