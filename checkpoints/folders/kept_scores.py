"""The folder beside an output that keeps what an unfinished run has scored, and when it is over.

`mlm_eval/engine/resume.py` fills it. Before the output appears, its digest is noted there: a run
that is killed in between, before it has removed what it kept, is known by it as a finished one.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from mlm_eval.checkpoints.errors import InputError

EXPECTED = "expected.sha256"
"""The digest of the output that ends the run."""

_CHUNK = re.compile(r"(\d+-\d+\.safetensors)|\.\d+-\d+\.safetensors\.partial-[0-9a-f]{12}")
"""Names of chunks, and of those that a killed process was writing."""


def kept_beside(output: Path) -> Path:
    """Return the folder that keeps the scores of an interrupted run of this output."""
    output = Path(os.path.realpath(output))
    return output.with_name(output.name + ".partial")


def kept_chunks(folder: Path) -> list[Path]:
    """Return the chunks of scores in a folder, in their order."""
    if not folder.is_dir():
        return []
    names = [(path, _CHUNK.fullmatch(path.name)) for path in folder.iterdir()]
    return sorted(path for path, match in names if match is not None and match[1])


def expect_output(folder: Path, content: str) -> None:
    """Note what is about to be written, after which nothing in the folder is needed."""
    digest = hashlib.sha256(content.encode("utf-8")).hexdigest()
    with suppress(OSError):  # a full disk: the run is then known as an interrupted one
        (folder / EXPECTED).write_text(digest, encoding="utf-8")


def is_written(output: Path) -> bool:
    """Return whether an output is the one that its run was about to write."""
    note = kept_beside(output) / EXPECTED
    try:
        if not note.is_file() or note.is_symlink():
            return False
        with note.open("rb") as expected, output.open("rb") as found:
            digest = hashlib.file_digest(found, "sha256").hexdigest()
            return expected.read(len(digest) + 1) == digest.encode()
    except OSError:
        return False


def discard_scores(folder: Path) -> None:
    """Remove the chunks in a folder, and nothing else that may be there.

    Raises:
        InputError: They cannot be removed.
    """
    try:
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name == EXPECTED or _CHUNK.fullmatch(path.name):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}, left by an interrupted run, cannot be removed ({error.strerror}); "
            "remove it, or give another --output"
        ) from None


def forget_finished(output: Path) -> None:
    """Remove what a run has kept that was killed after its output had appeared.

    Raises:
        InputError: It cannot be removed.
    """
    folder = kept_beside(output)
    if not folder.is_symlink() and is_written(output):
        discard_scores(folder)
        with suppress(OSError):
            (folder / "lock").unlink(missing_ok=True)
            folder.rmdir()
