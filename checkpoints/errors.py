"""The one error that is the user's to mend, and its sentence for a package that is missing."""

from __future__ import annotations

from importlib.util import find_spec


class InputError(ValueError):
    """A file, an option or a value given by the user is wrong.

    The message is one sentence: it names the file or the option, what was found, what was
    expected and what to do. The command line prints it without a traceback and exits with 2.
    Any other ValueError comes from a library, and is a bug of ours.
    """


PACKAGES = {
    "datasets": ("datasets", None),
    "evaluate": ("evaluate", None),
    "huggingface_hub": ("huggingface_hub", None),
    "jinja2": ("jinja2", None),
    "pandas": ("pandas", None),
    "pyarrow": ("pyarrow", None),
    "tqdm": ("tqdm", None),
    "transformers": ("transformers", None),
    "yaml": ("pyyaml", None),
    "lm_eval": ("lm_eval==0.4.13", "lm-eval"),
    "matplotlib": ("matplotlib", "plots"),
    "sentencepiece": ("sentencepiece", "sentencepiece"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "mlflow": ("mlflow", "mlflow"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
"""Packages that only some commands import: what pip calls each, and the extra that it comes with.

Those without an extra come with the package, but not with the short list for containers.
"""


def not_installed(package: str, what: str, instead: str = "") -> InputError:
    """Return the error for a package that is missing.

    Args:
        package: Its name in an `import`, one of `PACKAGES`.
        what: What needs it, as the subject of the sentence.
        instead: What else can be done, behind an "or".
    """
    requirement, extra = PACKAGES[package]
    clone = "" if extra is None else f" (in a clone of mlm-eval: `pip install '.[{extra}]'`)"
    return InputError(
        f"{what} needs {requirement.partition('=')[0]}, which is not installed: run `pip install "
        f"{requirement}`{clone}{instead and f', or {instead}'}"
    )


def require(package: str, what: str, instead: str = "") -> None:
    """Fail before any work where a package is missing; for the arguments see `not_installed`.

    Raises:
        InputError: It is not installed.
    """
    if find_spec(package) is None:
        raise not_installed(package, what, instead)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
