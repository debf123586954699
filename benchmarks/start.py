"""What commands cost before they work: `--help`, `inspect`, the first batch, beside bare Python.

`--help` may take 0.2 s more than `python -c pass`, `inspect` of any format 0.4 s, and a score of
one line 2.5 times `import torch`. Processor time by default, in turns. Exits with 1 where one is
slower.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common.results import Row, alternate, publish
from common.synthetic import write_gpt2

VOCAB = 50432


def command(*words: str) -> Callable[[], object]:
    """Return a call that runs Python so, and fails where it fails."""
    return lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True)


def main() -> int:
    """Measure; print; return 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--wall", action="store_true", help="the clock's time, on a quiet machine")
    parser.add_argument("--tp", type=int, default=2, help="ranks of the run with a first batch")
    parser.add_argument("--size", default="345m", choices=["345m", "1.3b"])
    options = parser.parse_args()

    def measured(
        ours: Callable[[], object], theirs: Callable[[], object]
    ) -> tuple[list[float], ...]:
        return alternate(ours, theirs, pairs=options.pairs, processor=not options.wall)

    rows = []

    def extra(work: str, words: str, limit: float) -> None:
        ours, bare = measured(command("-m", "mlm_eval", *shlex.split(words)), command("-c", "pass"))
        more = [max(one - other, 1e-3) for one, other in zip(ours, bare, strict=True)]
        rows.append(Row(work, "its limit over bare Python", "s", more, [limit] * len(more), 1.0))

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        megatron = write_gpt2(options.size, scratch / "megatron", tp=2, vocab_size=VOCAB)
        places = {"torch": megatron, "hf": scratch / "hf", "torch_dist": scratch / "torch_dist"}
        for kind in ("hf", "torch_dist"):
            convert = ["-m", "mlm_eval", "convert", "--ckpt", str(megatron), "--to", kind]
            command(*convert, "--output", str(places[kind]))()
        lines = scratch / "lines.jsonl"
        lines.write_text('{"tokens": [1, 2, 3, 4]}\n')
        extra("mlm-eval --help", "--help", 0.2)
        for kind, path in places.items():
            extra(f"inspect, {options.size}, {kind}", f"inspect --ckpt {path}", 0.4)
        score = ["-m", "mlm_eval", "score", "--ckpt", str(megatron), "--input", str(lines)]
        score += ["--output", str(scratch / "scores.jsonl"), "--overwrite"]
        ours, torch_import = measured(
            command(*score, "--tp", str(options.tp)), command("-c", "import torch")
        )
        limits = [2.5 * time * (1 if options.wall else options.tp) for time in torch_import]
        work = f"first batch, {options.size}, tp {options.tp}"
        rows.append(Row(work, "2.5 x import torch on each rank", "s", ours, limits, 1.0))
    settings = {"time": "wall" if options.wall else "processor"}
    return int(not publish("start", rows, settings))


if __name__ == "__main__":
    sys.exit(main())
