"""A process of its own in which megatron-core reads a T5 that this project wrote, and runs it.

usage: python megatron_core_t5.py SCRATCH CHECKPOINT INPUTS OUTPUT [CHECKPOINT INPUTS OUTPUT ...]

Each CHECKPOINT is an `iter_*` folder in torch_dist format or the `model_optim_rng.pt` of the only
rank. The model is built from nothing but its args; its state must fit key by key. The logits for
`encoder_tokens`, `encoder_mask` (1: may be seen) and `tokens` of INPUTS go to OUTPUT. With relative
positions the weights are loaded and nothing is run: megatron-core's local attention has no place
for what they add to the scores.
Source: pretrain_t5.py of Megatron-LM core 0.16 (how the model is built, which masks it gets).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the tests' folder
from support.fuzz.megatron_core_model import load, start, transformer_config  # noqa: E402, I001

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.models.T5 import T5Model  # noqa: E402
from megatron.core.models.T5.t5_spec import (  # noqa: E402
    get_t5_decoder_with_local_block_spec,
    get_t5_encoder_with_local_block_spec,
)
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from torch import Tensor  # noqa: E402


def build(args: Namespace) -> T5Model:
    """Return megatron-core's model, its weights not loaded yet."""
    config, encoder = transformer_config(args), transformer_config(args)
    encoder.num_layers = args.encoder_num_layers or args.num_layers
    specs = (
        get_t5_encoder_with_local_block_spec(encoder.num_layers),
        get_t5_decoder_with_local_block_spec(config.num_layers),
    )
    for spec in specs:
        spec.layer_norm = WrappedTorchNorm  # TransformerEngine's stands there in local specs too
    return T5Model(
        config,
        encoder,
        *specs,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        relative_attention_num_buckets=getattr(args, "relative_attention_num_buckets", 32),
        relative_attention_max_distance=getattr(args, "relative_attention_max_distance", 128),
    )


@torch.no_grad()
def run(model: T5Model, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the logits, `[batch, seq, vocab]`; in masks True is what may not be seen."""
    seen, tokens = given["encoder_mask"].bool(), given["tokens"]  # [B, S], [B, T]
    length = tokens.shape[1]
    encoder = ~(seen[:, None, None, :] & seen[:, None, :, None])
    future = torch.ones(length, length, dtype=torch.bool).triu(1).expand(len(tokens), 1, -1, -1)
    across = ~seen[:, None, None, :].expand(-1, 1, length, -1)
    return {"logits": model(given["encoder_tokens"], tokens, encoder, future, across)}


def main(scratch: str, *triples: str) -> None:
    """Read and run one checkpoint after another."""
    start(Path(scratch))
    torch.serialization.add_safe_globals([Namespace])  # of Megatron's args, which we wrote
    for place, inputs, output in zip(triples[::3], triples[1::3], triples[2::3], strict=True):
        if Path(place).is_dir():
            args = dist_checkpointing.load_common_state_dict(place)["args"]
            model = build(args)
            load(model, place)
        else:
            saved = torch.load(place, weights_only=True)
            args = saved["args"]
            model = build(args)
            model.load_state_dict(saved["model"], strict=True)
        runs = args.position_embedding_type != "relative"
        torch.save(run(model.eval(), torch.load(inputs)) if runs else {}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
