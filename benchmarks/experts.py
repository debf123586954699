"""Scoring with a mixture of experts against a dense model of the same active width, in turns.

16 experts of width 1,536, two for each token, against an MLP of width 3,072: 12 layers, hidden 768,
4,096 tokens a batch. Then the two ways to spread experts over tensor-parallel ranks, as the work of
the busiest rank: cut by columns, as they are (`mlm_eval/model/experts.py`), or dealt whole. Exits
with 1 where the mixture costs more than 1.35 x the dense model in float32.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common.results import Row, publish

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.engine.products import float32_products
from mlm_eval.model.experts import Experts
from mlm_eval.model.gpt import GPT
from mlm_eval.model.tensor_parallel import SINGLE

BOUND = 1.35
PAIRS = 7
BATCH, POSITIONS = 4, 1024
DENSE = ModelConfig(
    family="gpt",
    num_layers=12,
    hidden_size=768,
    num_attention_heads=12,
    num_query_groups=12,
    kv_channels=64,
    ffn_hidden_size=3072,
    vocab_size=1024,
    max_position_embeddings=POSITIONS,
)
MIXTURE = dataclasses.replace(
    DENSE,
    num_experts=16,
    moe_layers=tuple(range(12)),
    moe_ffn_hidden_size=1536,
    moe_router_topk=2,
)


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(first: Callable[[], object], second: Callable[[], object]) -> tuple[list[float], ...]:
    """Return the seconds of two calls, in turns, after one of each that does not count."""
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(PAIRS)]
    return tuple(list(times) for times in zip(*pairs, strict=True))


@float32_products()
def models(dtype: torch.dtype) -> Row:
    """Measure the two models, the mixture as what is compared."""
    tokens = torch.randint(DENSE.vocab_size, (BATCH, POSITIONS))
    dense, mixture = (random_weights(GPT(config, SINGLE), dtype) for config in (DENSE, MIXTURE))
    with torch.inference_mode():
        one, other = alternate(lambda: dense(tokens), lambda: mixture(tokens))
    bound = 1 / BOUND if dtype == torch.float32 else None
    work = f"16 experts, top 2, {dtype}".replace("torch.", "")
    return Row(work, "dense model of the same active width", "s", other, one, bound)


def random_weights(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Return the module with random weights, ready to be measured."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    return module.to(dtype).eval()


def spread(tp: int) -> None:
    """Measure the busiest rank's work in one layer, cut by columns and dealt whole."""
    counts = (
        torch.randn(BATCH * POSITIONS, MIXTURE.num_experts).topk(2).indices.flatten().bincount()
    )
    dealt = max(counts.view(tp, -1).unbind(), key=lambda own: int(own.sum()))
    cut = dataclasses.replace(MIXTURE, moe_ffn_hidden_size=MIXTURE.moe_ffn_hidden_size // tp)
    whole = dataclasses.replace(MIXTURE, num_experts=MIXTURE.num_experts // tp)
    ways = [(cut, counts), (whole, dealt)]
    with torch.inference_mode(), float32_products():
        runs = [layer_run(config, own) for config, own in ways]
        columns, experts = alternate(*runs)
    ratios = [b / a for a, b in zip(columns, experts, strict=True)]
    print(
        f"tp {tp}: cut by columns {1e3 * statistics.median(columns):.0f} ms, dealt whole "
        f"{1e3 * statistics.median(experts):.0f} ms (ratio {statistics.median(ratios):.2f}); "
        f"the busiest rank has {float(dealt.sum() / counts.sum() * tp):.2f} x the mean of tokens",
        flush=True,
    )


def layer_run(config: ModelConfig, counts: Tensor) -> Callable[[], object]:
    """Return a call of one layer's experts, on so many tokens for each."""
    layer = random_weights(Experts(config, SINGLE), torch.float32)
    rows = torch.randn(int(counts.sum()), config.hidden_size)
    return lambda: layer(rows, counts.tolist())


def main() -> int:
    """Measure, print, and return 1 where the bound is broken."""
    torch.manual_seed(1)
    print(f"{torch.get_num_threads()} threads, {PAIRS} pairs")
    rows = [models(dtype) for dtype in (torch.float32, torch.bfloat16)]
    met = publish("experts", rows, {"threads": torch.get_num_threads()})
    for tp in (2, 4):
        spread(tp)
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
