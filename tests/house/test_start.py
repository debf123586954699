"""What a start costs, and the public Python API."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import configs, random_models
from support.folders.family_models import FAMILY_MODELS
from support.paths import ORACLES, SAMPLES
from support.reliability import damage

import mlm_eval

# --- what a start costs ---


def modules_after(statements: str) -> tuple[str, set[str]]:
    """Run statements in a fresh interpreter; return what it printed and which modules it loaded."""
    script = (
        "import json, sys\n"
        f"try:\n    exec({statements!r})\n"
        "except SystemExit as end:\n    assert not end.code, f'exit code {end.code}'\n"
        "print('\\nLOADED', json.dumps(sorted(name for name in sys.modules if '.' not in name)))\n"
    )
    # Elsewhere, so that the installed package is found and not the working folder.
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(sys.executable).parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    output, _, loaded = done.stdout.rpartition("\nLOADED ")
    return output, set(json.loads(loaded))


def command(*arguments: str) -> str:
    """Return the statements that run the command line, without ending the process with it."""
    return (
        f"import sys; sys.argv = {['mlm-eval', *arguments]!r}; "
        "from mlm_eval.cli import main; main()"
    )


def test_importing_the_package_does_not_import_torch():
    _, loaded = modules_after("import mlm_eval, mlm_eval.tasks, mlm_eval.checkpoints")
    assert "mlm_eval" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "datasets", "typer"}


# Each of these costs seconds that only the commands which use it may spend.
HEAVY = {"transformers", "datasets", "evaluate", "lm_eval", "matplotlib", "tensorboard"}


def test_help_is_quick_and_names_the_commands():
    output, loaded = modules_after(command("--help"))
    assert not loaded & HEAVY
    for name in ("inspect", "wikitext103", "lambada", "score"):
        assert name in output


def checkpoints_of_every_kind(folder: Path) -> Iterator[Path]:
    """Yield one of each format, and models of each family in the formats that are written."""
    yield from (SAMPLES / name for name in ("gpt", "bert", "moe"))
    yield from sorted(path for path in ORACLES.iterdir() if path.is_dir())
    for name, make in damage.FORMATS.items():
        (folder / name).mkdir()
        (folder / name).rmdir()
        yield make(folder / name, 3)
    models = {"gpt": configs.GPT, "bert": configs.BERT, "t5": configs.T5, **FAMILY_MODELS}
    sizes: dict[str, dict[str, int]] = {"hf": {}, "torch_dist": {}, "megatron": {"tp": 2, "pp": 2}}
    for (name, model), (to, layout) in itertools.product(models.items(), sizes.items()):
        with contextlib.suppress(mlm_eval.InputError):  # not every model has each form
            place = folder / f"{name} as {to}"
            mlm_eval.convert(random_models.checkpoint(model), to, place, **layout)
            yield place


def test_inspect_of_any_checkpoint_imports_no_torch(tmp_path: Path):
    """Each is described from headers, pickles and settings, and from bytes of files."""
    places = [str(path) for path in checkpoints_of_every_kind(tmp_path)]
    assert len(places) > 60
    output, _ = modules_after(
        "import sys\n"
        "from mlm_eval.cli import main\n"
        f"for place in {places!r}:\n"
        "    sys.argv = ['mlm-eval', 'inspect', '--ckpt', place, '--json']\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        assert not end.code, place\n"
        f"    found = {HEAVY | {'torch', 'numpy', 'pandas', 'tokenizers'}!r} & set(sys.modules)\n"
        "    assert not found, f'{place} is inspected with {found}'\n"
    )
    assert output.count('"format"') == len(places)


LINES = str(SAMPLES / "text" / "lambada.sample.jsonl")
GPT, BERT = (("--ckpt", str(SAMPLES / name)) for name in ("gpt", "bert"))
STARTS_RANKS = [
    ("score", *GPT, "--input", LINES, "--output", "scores.jsonl"),
    ("generate", *GPT, "--prompt", "The", "--max-new-tokens", "3"),
    ("lambada", *GPT, "--data", LINES),
    ("wikitext103", *GPT, "--data", str(SAMPLES / "text" / "wiki.sample.tokens")),
    ("race", *BERT, "--data", str(SAMPLES / "race"), "--output-dir", "out"),
]


@pytest.mark.parametrize("words", STARTS_RANKS, ids=lambda words: words[0])
def test_ranks_are_started_before_torch_is_imported(words: tuple[str, ...], tmp_path: Path):
    """The parent would need as long for it as a rank, and works no more."""
    here = str(tmp_path)
    line = command(*words, "--tp", "2", "--device", "cpu")
    _, loaded = modules_after(
        f"import os; os.chdir({here!r})\n"
        "import mlm_eval.cli.run as run\n"
        "run.launch = lambda argv, **sizes: print(sizes) or run.LaunchResult(0)\n" + line
    )
    assert "typer" in loaded
    assert "torch" not in loaded


@pytest.mark.parametrize("name", mlm_eval.__all__)
def test_every_public_name_is_found(name: str):
    assert getattr(mlm_eval, name)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = mlm_eval.Motor


def test_the_python_api_evaluates_the_sample():
    """The four lines of a user: open, load, evaluate, read; the tokenizer is the checkpoint's."""
    checkpoint = mlm_eval.open_checkpoint(SAMPLES / "gpt")
    engine = mlm_eval.Engine.load(checkpoint, tp=1)
    data = SAMPLES / "text" / "lambada.sample.jsonl"
    result = mlm_eval.evaluate("lambada", engine, data=data, limit=3)
    assert result.task == "lambada"
    assert result.counts["examples"] == 3
    assert result.metrics["num_correct"] in range(4)


def test_an_unknown_benchmark_is_refused_by_name():
    with pytest.raises(
        mlm_eval.InputError, match="no task 'glue'; evaluate knows wikitext103, lambada"
    ):
        mlm_eval.evaluate("glue", engine=None)
