"""A mixture of experts against a dense model of the same active width and transformers' mixture.

16 experts of width 1,536, two for each token, against an MLP of width 3,072: 12 layers, hidden 768,
4,096 tokens a batch. Then a Mixtral of these sizes against transformers' own, with the fastest of
its ways to run experts; both must find the same log-probabilities. Then the two ways to spread
experts over tensor-parallel ranks, as the work of the busiest rank: cut by columns, as they are
(`mlm_eval/model/experts.py`), or dealt whole. Exits with 1 where the mixture costs more than 1.35 x
the dense model in float32, or is not 1.5 x as fast as transformers'.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common.results import Row, alternate, publish

import mlm_eval
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.products import float32_products
from mlm_eval.engine.score import Request
from mlm_eval.model.experts import Experts
from mlm_eval.model.gpt import GPT
from mlm_eval.model.tensor_parallel import SINGLE

MOST_TIME, LEAST_SPEEDUP = 1.35, 1.5
"""Of the dense model's time; of transformers' own mixture."""

WAYS = ("eager", "grouped_mm")
"""Of transformers to run experts on a CPU; `batched_mm` copies an expert for every token."""

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


@float32_products()
def beside_dense(dtype: torch.dtype, alternating: dict[str, Any]) -> Row:
    """Measure the two models, the mixture as what is compared."""
    tokens = torch.randint(DENSE.vocab_size, (BATCH, POSITIONS))
    dense, mixture = (random_weights(GPT(config, SINGLE), dtype) for config in (DENSE, MIXTURE))
    with torch.inference_mode():
        one, other = alternate(lambda: dense(tokens), lambda: mixture(tokens), **alternating)
    bound = 1 / MOST_TIME if dtype == torch.float32 else None
    work = f"16 experts, top 2, {dtype}".replace("torch.", "")
    return Row(work, "dense model of the same active width", "s", other, one, bound)


def beside_transformers(dtypes: list[torch.dtype], alternating: dict[str, Any]) -> list[Row]:
    """Measure scoring with a Mixtral in each dtype, the engine's and transformers'."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = MixtralConfig(
        vocab_size=MIXTURE.vocab_size,
        hidden_size=MIXTURE.hidden_size,
        intermediate_size=MIXTURE.moe_ffn_hidden_size,
        num_hidden_layers=MIXTURE.num_layers,
        num_attention_heads=MIXTURE.num_attention_heads,
        num_key_value_heads=MIXTURE.num_query_groups,
        num_local_experts=MIXTURE.num_experts,
        num_experts_per_tok=MIXTURE.moe_router_topk,
        max_position_embeddings=POSITIONS,
    )
    tokens = torch.randint(MIXTURE.vocab_size, (BATCH, POSITIONS + 1))
    requests = [Request(row, POSITIONS) for row in tokens]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        MixtralForCausalLM(sizes).save_pretrained(folder)
        checkpoint = mlm_eval.open_checkpoint(folder)
        for dtype in dtypes:
            engine = Engine.load(checkpoint, dtype=dtype, device="cpu")
            model = MixtralForCausalLM.from_pretrained(folder, dtype=dtype).eval()

            def theirs(way: str, model: Any = model) -> Tensor:
                model.set_experts_implementation(way)
                return logprobs(model, tokens)

            once = alternating | {"pairs": 1}
            first, second = alternate(*(partial(theirs, way) for way in WAYS), **once)
            best = WAYS[first > second]
            times = alternate(partial(engine.score, requests), partial(theirs, best), **alternating)
            name = str(dtype).replace("torch.", "")
            gap = (engine.score(requests).logprobs - theirs(best)).abs().max()
            if dtype == torch.float32 and gap > 1e-4:
                raise SystemExit(f"log-probabilities differ by {gap}: this is not the same work")
            bound = LEAST_SPEEDUP if dtype == torch.float32 else None
            rows.append(Row(f"Mixtral, {name}", f"transformers, {best}", "s", *times, bound))
    return rows


def logprobs(model: Any, tokens: Tensor) -> Tensor:
    """Return the log-probabilities of all tokens but the first of each row, flat, float32."""
    with torch.inference_mode():
        logits = model(tokens[:, :-1]).logits.float()
    found: Tensor = logits.log_softmax(dim=-1).gather(2, tokens[:, 1:, None]).flatten()
    return found


def random_weights(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Return the module with random weights, ready to be measured."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    return module.to(dtype).eval()


def spread(tp: int, alternating: dict[str, Any]) -> None:
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
        columns, experts = alternate(*runs, **alternating)
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
    """Measure, print, and return 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--processor-time", action="store_true", help="where other work runs beside; one thread"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    alternating = {"pairs": options.pairs, "processor": options.processor_time}
    dtypes = [torch.float32, torch.bfloat16]
    rows = [beside_dense(dtype, alternating) for dtype in dtypes]
    rows += beside_transformers(dtypes, alternating)
    settings = {
        "threads": options.threads,
        "time": "processor" if options.processor_time else "wall",
    }
    met = publish("experts", rows, settings)
    for tp in (2, 4):
        spread(tp, alternating)
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
