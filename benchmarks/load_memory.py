"""Memory of loading: a 1.3-billion-parameter checkpoint, saved at tp 4, loaded at tp 2 on the CPU.

No rank may occupy more than 1.2 times its own shard in the compute dtype (float32), and 500 MB for
Python, torch and one tensor on its way. Exits with 1 when a rank does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common.memory import POLL_SECONDS, anonymous_bytes

from mlm_eval.ranks import launch
from mlm_eval.ranks.world import detect_world

SAVED_TP, LOADED_TP = 4, 2
VOCAB = 51200  # the paper's padding of 50,257
SHARD_FACTOR, OVERHEAD_BYTES = 1.2, 500e6


class Peak:
    """The largest anonymous memory of this process, sampled by a thread."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self.bytes = max(self.bytes, anonymous_bytes(os.getpid()))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes(os.getpid()))


def load_on_a_rank(source: Path, report: Path, *, dtype: str = "float32") -> None:
    """Load this rank's shard as `mlm-eval` does, and leave what it took in `report`."""
    world = detect_world()
    assert world is not None
    launch.prepare_worker()
    with launch.reporting_errors(world), Peak() as peak:
        launch.init_process_group(world, device="cpu")
        from mlm_eval.checkpoints.open import open_checkpoint
        from mlm_eval.engine.engine import Engine

        before = anonymous_bytes(os.getpid())
        started = time.perf_counter()
        engine = Engine.load(open_checkpoint(source), tp=LOADED_TP, dp=1, dtype=dtype, device="cpu")
        seconds = time.perf_counter() - started
        launch.shutdown()
    shard = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    facts = {
        "parameters": engine.checkpoint.num_parameters,
        "shard": shard,
        "before": before,
        "peak": peak.bytes,
        "seconds": seconds,
    }
    (report / f"rank{world.rank}.json").write_text(json.dumps(facts))


def measure(scratch: Path) -> list[dict[str, float]]:
    """Write the checkpoint, load it on real ranks, and return what each of them reported."""
    from common.synthetic import write_gpt2

    source = write_gpt2("1.3b", scratch / "gpt2-1.3b", tp=SAVED_TP, vocab_size=VOCAB)
    return measure_ranks(source, scratch, script=__file__)


def measure_ranks(source: Path, scratch: Path, *, script: str) -> list[dict[str, float]]:
    """Load a checkpoint on real ranks, by `script --rank`, and return what each reported."""
    command = [sys.executable, script, "--rank", str(source), str(scratch)]
    result = launch.launch([], ranks=LOADED_TP, device="cpu", command=command)
    if result.exit_code:
        raise RuntimeError(f"the ranks ended with {result.exit_code}: {result.message}")
    return [json.loads((scratch / f"rank{r}.json").read_text()) for r in range(LOADED_TP)]


def show(ranks: list[dict[str, float]], how: str) -> bool:
    """Print a table; return whether every rank keeps to the bound."""
    print(f"{ranks[0]['parameters'] / 1e9:.2f} billion parameters, {how}; anonymous memory in MB")
    print(f"  {'rank':<6}{'shard':>8}{'before':>8}{'peak':>8}{'bound':>8}{'seconds':>9}")
    good = True
    for rank, facts in enumerate(ranks):
        bound = SHARD_FACTOR * facts["shard"] + OVERHEAD_BYTES
        sizes = (facts["shard"], facts["before"], facts["peak"], bound)
        columns = "".join(f"{size / 1e6:8.0f}" for size in sizes)
        kept = facts["peak"] <= bound
        verdict = "" if kept else "  over the bound"
        print(f"  {rank:<6}{columns}{facts['seconds']:9.1f}{verdict}")
        good &= kept
    return good


def main() -> int:
    """Run the measurement; 1 when the bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", help="where to put the checkpoint (2.7 GB); default: a temporary folder"
    )
    parser.add_argument("--rank", nargs=2, metavar=("SOURCE", "REPORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        load_on_a_rank(*map(Path, options.rank))
        return 0
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        how = f"fp16 at tp {SAVED_TP} on disk, loaded in float32 at tp {LOADED_TP}"
        return 0 if show(measure(Path(scratch)), how) else 1


if __name__ == "__main__":
    sys.exit(main())
