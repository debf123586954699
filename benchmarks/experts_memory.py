"""Memory of a mixture of experts: loading at tp 2, and converting to Hugging Face.

A Mixtral-shaped checkpoint of 1.5 billion parameters in bfloat16, saved at tp 2 x ep 2, whose ranks
are loaded in bfloat16 at tp 2. No rank may occupy more than 1.2 times its own shard and 500 MB for
Python, torch and one tensor on its way; the conversion no more than 600 MB. Exits with 1 when one
does.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common.memory import measure
from common.synthetic import as_checkpoint
from convert import LARGE_BYTES, convert_command
from load_memory import load_on_a_rank, measure_ranks, show

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch

HIDDEN, WIDTH, LAYERS = 1024, 3584, 16
MIXTRAL = ModelConfig(
    family="gpt",
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    num_attention_heads=16,
    num_query_groups=4,
    kv_channels=64,
    ffn_hidden_size=WIDTH,
    vocab_size=32000,
    max_position_embeddings=4096,
    position_embedding_type="rope",
    rotary_base=1e6,
    normalization="RMSNorm",
    activation="swiglu",
    add_bias_linear=False,
    add_qkv_bias=False,
    untie_embeddings_and_output_weights=True,
    num_experts=8,
    moe_layers=tuple(range(LAYERS)),
    moe_ffn_hidden_size=WIDTH,
    moe_router_topk=2,
    params_dtype="bfloat16",
)


def main() -> int:
    """Run the measurements; 1 when a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", help="where to put the checkpoints (6 GB); default: a temporary folder"
    )
    parser.add_argument("--rank", nargs=2, metavar=("SOURCE", "REPORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        load_on_a_rank(*map(Path, options.rank), dtype="bfloat16")
        return 0
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        room = Path(scratch)
        source = write_megatron_torch(
            as_checkpoint(MIXTRAL, torch.bfloat16), room / "mixtral", tp=2, ep=2
        )
        ranks = measure_ranks(source, room, script=__file__)
        good = show(ranks, "bf16 at tp 2 x ep 2 on disk, loaded in bfloat16 at tp 2")
        usage = measure(convert_command(source, room / "hf"))
        print(
            f"to Hugging Face: {usage.seconds:.2f} s, {usage.peak_bytes / 1e6:.0f} MB anonymous "
            f"(bound {LARGE_BYTES / 1e6:.0f})"
        )
        return 0 if good and usage.peak_bytes <= LARGE_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
