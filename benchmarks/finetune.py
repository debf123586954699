"""Fine-tuning against transformers' Trainer: the seconds of a step, on the same rows of RACE.

The short form of race.py: a BERT of MiniLM's size with random weights, rows of at most 160 tokens,
batches of 8 questions of four rows, no dropout, in float32 and in bfloat16. Each run is a process
of its own, in turns; from the end of its first step to the end of its last one counts. Both must
have the same losses.

    python benchmarks/finetune.py --data DIR     # with race/ and bert/ in it

Without --data (or $MLM_EVAL_DATA) the questions that ship are taken. Exits with 1 where the target
is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common.results import Row, publish
from race import SETTINGS, Run

from mlm_eval.training.settings import Listener, TrainingProgress

TARGET = 1.5
SAME = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far the losses of a step may lie apart on average, by the dtype that both have."""
SAMPLES = Path(__file__).parents[1] / "checkpoints" / "samples"


class Stamps(Listener):
    """A clock's time at the end of each step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []

    def on_step(self, progress: TrainingProgress | None = None) -> None:
        """Note a step."""
        self.times.append(self.clock())

    @property
    def seconds(self) -> float:
        """Of a step, on average, without the first one."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def prepare(work: Path, data: str | None) -> Path:
    """Write the model that both start from into `published`; return the folder of the questions."""
    from transformers import BertConfig, BertModel

    vocabulary = SAMPLES / "bert" / "tokenizer" / "vocab.txt"
    if data is not None:
        vocabulary = Path(data, "bert", "bert-base-uncased-vocab.txt")
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    BertModel(config).save_pretrained(work / "published")
    shutil.copy(vocabulary, work / "published" / "vocab.txt")
    return SAMPLES / "race" if data is None else Path(data, "race")


def train(step: str, run: Run, stamps: Stamps) -> dict[str, Any]:
    """Train in this process; return the seconds of a step, and the losses."""
    if step == "ours":
        run.train_ours(stamps)
        log = map(json.loads, (run.ours / "metrics.jsonl").read_text().splitlines())
        losses = [entry["loss"] for entry in log if "loss" in entry]
        return {"seconds": stamps.seconds, "losses": losses}
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            stamps.on_step()

    losses = run.train_theirs([Callback()])["losses"]
    return {"seconds": stamps.seconds, "losses": losses}


def measured(step: str, work: Path, words: list[str]) -> dict[str, Any]:
    """Train in a process of its own, from the beginning; return what it found."""
    for name in ("ours", "trainer"):
        shutil.rmtree(work / name, ignore_errors=True)
    command = [sys.executable, __file__, *words, "--step", step, "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{step} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure; print; return 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("MLM_EVAL_DATA") or None)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="where other work runs beside; with OMP_NUM_THREADS=1",
    )
    parser.add_argument("--dtypes", nargs="+", default=list(SAME), choices=list(SAME))
    parser.add_argument("--step", choices=("ours", "trainer"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    batch = SETTINGS["global_batch"]
    settings = dict(SETTINGS) | {"questions": options.steps * batch, "dev_questions": batch}
    if options.step:
        settings["dtype"] = options.dtypes[-1]
        race = SAMPLES / "race" if options.data is None else options.work / "RACE"
        published = options.work / "published"
        run = Run(race, options.work, settings, "cpu", published)
        clock = time.process_time if options.processor_time else time.perf_counter
        print("\n" + json.dumps(train(options.step, run, Stamps(clock))), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        race = prepare(work, options.data)
        Run(race, work, settings, "cpu", work / "published").prepare_model()
        rows = [compare(dtype, work, options) for dtype in options.dtypes]
    told = {
        "threads": torch.get_num_threads(),
        "questions": "the sample's" if options.data is None else "RACE's",
        "steps": f"{options.steps} of {batch} questions, or all there are",
        "time": f"{'processor' if options.processor_time else 'wall'}, of a step after the first",
    }
    return int(not publish("finetune", rows, told))


def compare(dtype: str, work: Path, options: argparse.Namespace) -> Row:
    """Return the row of a dtype; ends where the two do not do the same work."""
    words = [*sys.argv[1:], "--dtypes", dtype]
    pairs = [
        [measured(step, work, words) for step in ("ours", "trainer")] for _ in range(options.pairs)
    ]
    for ours, theirs in pairs:
        gaps = [abs(a - float(b)) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
        if statistics.mean(gaps) > SAME[dtype]:
            raise SystemExit(f"the losses differ by {gaps}: this is not the same work")
    first, second = ([pair[side]["seconds"] for pair in pairs] for side in (0, 1))
    work_done = f"fine-tuning, RACE, MiniLM's size, {SETTINGS['seq_length']} tokens, {dtype}"
    return Row(work_done, "transformers' Trainer", "s", first, second, TARGET)


if __name__ == "__main__":
    sys.exit(main())
