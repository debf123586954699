"""What a start costs, and the public Python API."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import SAMPLES

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


def test_inspect_reads_the_sample_without_heavy_imports():
    sample = SAMPLES / "gpt"
    output, loaded = modules_after(command("inspect", "--ckpt", str(sample), "--json"))
    assert json.loads(output)["format"] == "megatron-torch"
    assert not loaded & HEAVY


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
