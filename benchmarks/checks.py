"""What the checks of weights cost while a model is loaded: with them and without, in turns.

All of them at once: the checksum of each record, odd values, copied files, replicas. What loading
takes is for information. A tenth of LAMBADA, 512 passages of 90 tokens, may take 5 % more, with no
import counted; its time follows from that of 16 passages. Processor time by default. Exits with 1
where it takes more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common.results import Row, alternate, processor_seconds, publish
from common.synthetic import SIZES, write_gpt2

from mlm_eval.checkpoints.lazy import Checksum
from mlm_eval.checkpoints.megatron import read_torch
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.soundness.odd_values import OddValues
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.score import Request

VOCAB = 50432
MOST = 1.05
"""Time with the checks, over time without them."""

TIMED, PASSAGES, LENGTH, ANSWER = 16, 512, 90, 2


@contextmanager
def without_checks() -> Iterator[None]:
    """Take all checks of weights out of this process."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Checksum, "compare", lambda self: None))
        stack.enter_context(mock.patch.object(OddValues, "look", lambda *_: None))
        for name in ("copied_stages", "copied_experts", "copied_ranks"):
            stack.enter_context(mock.patch.object(read_torch, name, lambda *_: None))
        stack.enter_context(mock.patch.object(read_torch, "compare_replicas", lambda *_: []))
        yield


def measure(source: Path, size: str, *, pairs: int, wall: bool) -> list[Row]:
    """Return the rows of one checkpoint."""
    clock = time.perf_counter if wall else processor_seconds

    def load() -> Engine:
        return Engine.load(open_checkpoint(source), device="cpu")

    def load_unchecked() -> None:
        with without_checks():
            load()

    engine = load()
    noise = torch.Generator().manual_seed(0)
    tokens = torch.randint(50_000, (TIMED, LENGTH), generator=noise)
    requests = [Request(row, ANSWER) for row in tokens]
    engine.score(requests)
    began = clock()
    engine.score(requests)
    scoring = (clock() - began) * PASSAGES / TIMED
    del engine
    ours, theirs = alternate(load, load_unchecked, pairs=pairs, processor=not wall)
    whole, bare = ([seconds + scoring for seconds in side] for side in (ours, theirs))
    return [
        Row(f"load {size}, fp16, tp 2", "without checks", "s", ours, theirs),
        Row(f"{PASSAGES} passages, {size}", "without checks", "s", whole, bare, 1 / MOST),
    ]


def main() -> int:
    """Measure; print; return 1 where scoring takes more than it may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--wall", action="store_true", help="the clock's time, on a quiet machine")
    parser.add_argument("--size", default=["124m", "345m"], nargs="+", choices=SIZES)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for size in options.size:
            source = write_gpt2(size, Path(name) / size, tp=2, vocab_size=VOCAB)
            rows += measure(source, size, pairs=options.pairs, wall=options.wall)
    settings = {"time": "wall" if options.wall else "processor", "threads": torch.get_num_threads()}
    return int(not publish("checks", rows, settings))


if __name__ == "__main__":
    sys.exit(main())
