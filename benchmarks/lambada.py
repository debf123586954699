"""LAMBADA from the command line against lm-evaluation-harness' `hf`, at its best batch size.

A GPT-2 of 124M parameters with random weights, 512 passages, whole processes from their start to
their end, in turns. The harness gets a task file that names the same lines, none of its own tasks
to look through, and no bootstrap; both must find the same perplexity of the last words.

    python benchmarks/lambada.py --data DIR     # with lambada/lambada_test.jsonl and gpt2/ in it

Without --data (or $MLM_EVAL_DATA) the lines that ship are read again and again. Exits with 1 where
a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common.results import Row, processor_seconds, publish
from common.synthetic import gpt2

from mlm_eval.checkpoints.convert import convert

SAMPLES = Path(__file__).parents[1] / "checkpoints" / "samples"
VOCAB = 50257
TARGETS = {"float32": 2.3, "bfloat16": 4.5}
SAME = {"float32": 1e-5, "bfloat16": 0.1}
"""How far the perplexities may lie apart, relative: the harness' bfloat16 rounds logits too."""
BATCHES = (1, 4, 16, 32)
TRIED = 64
"""Lines with which the harness' batch sizes are compared."""

TASK = """task: cloze
dataset_path: json
dataset_kwargs:
  data_files:
    test: {lines}
  cache_dir: {cache}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.rsplit(none, 1)[0]}}}}"
doc_to_target: "{{{{' ' + text.rsplit(none, 1)[1]}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def harness(folder: Path, dtype: str, batch: int, limit: int) -> dict[str, Any]:
    """Return what lm-evaluation-harness finds, in this process."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "model"), "dtype": dtype},
        tasks=["cloze"],
        task_manager=TaskManager(include_path=str(folder / "task"), include_defaults=False),
        device="cpu",
        batch_size=batch,
        limit=limit,
        bootstrap_iters=0,
    )
    assert found is not None
    figures = found["results"]["cloze"]
    return {"ppl": figures["perplexity,none"], "accuracy": figures["acc,none"]}


def prepare(folder: Path, data: str | None, lines: int) -> str:
    """Write the model, the lines and the harness' task; return whose lines they are."""
    passages = SAMPLES / "text" / "lambada.sample.jsonl"
    tokenizer, whose = SAMPLES / "gpt" / "tokenizer", "the sample's"
    if data is not None:
        passages, tokenizer = Path(data, "lambada", "lambada_test.jsonl"), Path(data, "gpt2")
        whose = "LAMBADA's"
    found = passages.read_text(encoding="utf-8").splitlines()
    found = (found * -(-lines // len(found)))[:lines]
    (folder / "lines.jsonl").write_text("\n".join(found) + "\n", encoding="utf-8")
    checkpoint = gpt2("124m", vocab_size=VOCAB, dtype=torch.float32)
    convert(checkpoint, "hf", folder / "model", tokenizer=tokenizer)
    (folder / "task").mkdir()
    text = TASK.format(lines=folder / "lines.jsonl", cache=folder / "cache")
    (folder / "task" / "cloze.yaml").write_text(text)
    return whose


def run(*words: object) -> None:
    """Run a command of Python to its end; fails with its last words where it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words} failed:\n{done.stderr[-2000:]}")


def measure(folder: Path, dtype: str, options: argparse.Namespace) -> tuple[Row, int]:
    """Return the row of a dtype, and the harness' best batch size."""
    clock = processor_seconds if options.processor_time else time.perf_counter
    lines, batches = options.lines, options.batches

    def seconds_of(work: Callable[[], object]) -> float:
        started = clock()
        work()
        return clock() - started

    ours, theirs = folder / f"{dtype}.json", folder / f"harness-{dtype}.json"

    def us() -> None:
        run(
            *("-m", "mlm_eval", "lambada", "--ckpt", folder / "model", "--dtype", dtype),
            *("--data", folder / "lines.jsonl", "--device", "cpu", "--tp", 1),
            *("--output", ours, "--overwrite"),
        )

    def them(batch: int, limit: int = lines) -> None:
        run(__file__, "--harness", folder, dtype, batch, limit, theirs)

    best = batches[0]
    if len(batches) > 1:
        tried = {b: seconds_of(partial(them, b, min(TRIED, lines))) for b in batches}
        best = min(tried, key=tried.__getitem__)
        print(f"the harness' seconds by batch size: {tried}", flush=True)
    us()  # the files are in the kernel's cache from here on
    times = [(seconds_of(us), seconds_of(lambda: them(best))) for _ in range(options.pairs)]
    print(f"pairs of seconds: {times}", flush=True)
    metrics = json.loads(ours.read_text())["metrics"]
    mine, other = metrics["target_ppl"], json.loads(theirs.read_text())["ppl"]
    if abs(mine / other - 1) > SAME[dtype]:
        raise SystemExit(f"perplexities of {mine} and {other}: this is not the same work")
    work = f"LAMBADA, {lines} lines, end to end, {dtype}"
    first, second = ([pair[side] for pair in times] for side in (0, 1))
    return Row(work, "lm-evaluation-harness, hf", "s", first, second, TARGETS[dtype]), best


def main() -> int:
    """Measure; print; return 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("MLM_EVAL_DATA") or None)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--lines", type=int, default=512)
    parser.add_argument("--dtypes", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="the harness'")
    parser.add_argument("--more", action="store_true", help="add to the pairs of the day")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="where other work runs beside; with OMP_NUM_THREADS=1",
    )
    parser.add_argument("--harness", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.harness:
        folder, dtype, batch, limit, output = options.harness
        found = harness(Path(folder), dtype, int(batch), int(limit))
        Path(output).write_text(json.dumps(found))
        return 0
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    clock = "processor" if options.processor_time else "wall"
    met = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(folder / "home")
        whose = prepare(folder, options.data, options.lines)
        for dtype in options.dtypes:
            row, batch = measure(folder, dtype, options)
            settings = {
                "threads": torch.get_num_threads(),
                "lines": f"{options.lines} of {whose}",
                "the harness' best batch size": batch,
                "time": f"{clock}, start-up included, the harness without bootstrap",
            }
            met &= publish(f"lambada, {dtype}", [row], settings, more=options.more)
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
