"""The one error that is the user's to mend, and what its sentences show of files and packages."""

from __future__ import annotations

import re
import reprlib
from importlib.util import find_spec
from typing import Any


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


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, 80, 80, 40
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 5

    def repr_int(self, x: int, level: int) -> str:
        """Return a number, or of how many bits it is: Python writes no endless ones."""
        return super().repr_int(x, level) if x.bit_length() < 200 else f"{x.bit_length()} bits"


_SHORT = _Short()


def shown(value: Any) -> str:
    """Return a value from a file as a short text for a message, whatever it is.

    Lists that hold one another take forever to print whole; they are cut at each level.
    """
    return _SHORT.repr(value)[:200]


_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters (but for tabs and line ends), marks that turn text round, surrogates."""


def visible(text: str) -> str:
    """Return a text with escapes in the place of what would command a terminal or hide in it."""
    return _HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text)


LONGEST_SENTENCE = 4000
"""Characters of a message."""


def one_line(text: object) -> str:
    """Return a message as one visible line; of a long one the middle is left out."""
    line = visible(str(text)).rstrip().replace("\n", "\\n")
    if len(line) <= LONGEST_SENTENCE:
        return line
    return f"{line[: LONGEST_SENTENCE - 300]} ... {line[-250:]}"


def visible_json(text: str) -> str:
    """Return a JSON text with JSON's own escapes in the place of what `visible` replaces."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
