"""Fuzz a reader under atheris, guided by coverage: `python scripts/fuzz_readers.py NAME [OPTIONS]`.

NAME is one of the readers of tests/support/reliability/fuzzed_readers.py, such as "torch zip".
OPTIONS are libFuzzer's, for example -runs=100000 or -max_total_time=600; what it finds it writes to
the current folder. atheris is no dependency of the project: `pip install atheris` first.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

with atheris.instrument_imports(include=["mlm_eval.checkpoints", "pickle", "zipfile", "yaml"]):
    from support.reliability import fuzzed_readers


def main() -> None:
    """Fuzz one reader, beginning with a right file."""
    name, *options = sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "right").write_bytes(fuzzed_readers.seeds(folder)[name])
    atheris.Setup(
        [sys.argv[0], "-max_len=8192", "-rss_limit_mb=3000", *options, str(corpus)],
        lambda data: fuzzed_readers.read(name, data, folder),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
