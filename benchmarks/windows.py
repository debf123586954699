"""WikiText-103's windows against the loop of transformers' documentation, and the machine's peak.

A GPT-2 of 124M parameters with random weights scores the last 32 tokens of windows of 1,024, by
`Engine.score` and by the loop (https://huggingface.co/docs/transformers/perplexity) at its best
batch size, in turns; both must find the same loss. The peak is that of the largest product of the
model, by the fastest library that torch has. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common.results import Row, alternate, publish

import mlm_eval
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.score import Request

LENGTH, STRIDE = 1024, 32
TARGETS = {"float32": (2.0, 0.75), "bfloat16": (4.0, 0.5)}
"""Against the loop; of the peak."""


def documented_loop(model: Any, tokens: Tensor, batch: int) -> float:
    """Return the mean loss of the last tokens of each window, as the documentation computes it."""
    losses = []
    with torch.no_grad():
        for start in range(0, len(tokens), batch):
            ids = tokens[start : start + batch, :-1]
            targets = ids.clone()
            targets[:, :-STRIDE] = -100
            losses += [model(ids, labels=targets).loss.item()] * len(ids)
    return statistics.mean(losses)


def our_loss(engine: Engine, tokens: Tensor) -> float:
    """Return the same of the engine.

    The documentation's loop scores the last tokens of its inputs: a window's last token is not
    seen by either.
    """
    requests = [Request(row[:-1], STRIDE) for row in tokens]
    return -engine.score(requests).logprobs.double().mean().item()


def peak(dtype: torch.dtype, seconds: Any) -> float:
    """Return the operations a second of the model's largest product, the best of two libraries."""
    x, weight = torch.randn(2048, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
    with torch.inference_mode():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        works = (
            lambda: F.linear(x, weight),
            lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        )
        best = min(statistics.median(seconds(work) for _ in range(15)) for work in works)
    return 2 * x.shape[0] * weight.numel() / best


def main() -> int:
    """Measure both dtypes; print; return 1 where a target is missed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtypes", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument(
        "--processor-time", action="store_true", help="where other work runs beside; one thread"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    clock = time.process_time if options.processor_time else time.perf_counter

    def seconds(work: Any) -> float:
        started = clock()
        work()
        return clock() - started

    tokens = torch.randint(50257, (options.windows, LENGTH + 1))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config(n_layer=options.layers)).save_pretrained(folder)
        checkpoint = mlm_eval.open_checkpoint(folder)
        for name in options.dtypes:
            dtype = getattr(torch, name)
            engine = Engine.load(checkpoint, dtype=dtype, device="cpu")
            model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
            sizes = [size for size in (1, 2, 4) if size <= options.windows]
            times = {
                s: seconds(lambda s=s, model=model: documented_loop(model, tokens, s))
                for s in sizes
            }
            batch = min(times, key=times.__getitem__)
            gap = abs(our_loss(engine, tokens) - documented_loop(model, tokens, batch))
            if gap > (1e-4 if name == "float32" else 2e-2):
                raise SystemExit(f"the losses differ by {gap}: this is not the same work")
            ours, theirs = alternate(
                lambda engine=engine: our_loss(engine, tokens),
                lambda model=model, batch=batch: documented_loop(model, tokens, batch),
                pairs=options.pairs,
                processor=options.processor_time,
            )
            work = f"windows of {LENGTH}, stride {STRIDE}, {name}"
            to_loop, to_peak = TARGETS[name]
            rows.append(Row(work, f"documented loop, batch {batch}", "s", ours, theirs, to_loop))
            flops = engine.flops([Request(row[:-1], STRIDE) for row in tokens])
            rates = [1e-9 * flops / time for time in ours]
            peaks = [1e-9 * peak(dtype, seconds) for _ in ours]
            # Of the peak: the ratio is ours / theirs, so the two change places.
            rows.append(Row(work, "peak of a product", "GFLOP/s", peaks, rates, to_peak))
    settings = {
        "threads": options.threads,
        "windows": options.windows,
        "layers": options.layers,
        "time": "processor" if options.processor_time else "wall",
    }
    return int(not publish("windows", rows, settings))


if __name__ == "__main__":
    sys.exit(main())
