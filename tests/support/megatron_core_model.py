"""A process of its own in which megatron-core, not this project, reads checkpoints and runs them.

usage: python megatron_core_model.py SCRATCH FOLDER INPUTS OUTPUT [FOLDER INPUTS OUTPUT ...]

Each FOLDER is an `iter_*` folder in torch_dist format. The model is built from nothing but the
args that megatron-core itself loads from it, the weights come in through
`megatron.core.dist_checkpointing.load`, and the logits for the tokens in INPUTS (a torch.save file)
go to OUTPUT. One rank over gloo, on the CPU.
"""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec  # noqa: E402
from megatron.core.models.bert.bert_model import BertModel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from torch import Tensor, nn  # noqa: E402


def start(scratch: Path) -> None:
    """Start the one-rank process group that megatron-core cannot do without."""
    store = torch.distributed.FileStore(str(scratch / "rendezvous"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    get_cuda_rng_tracker().fork = lambda *_, **__: contextlib.nullcontext()


def transformer_config(args: Namespace) -> TransformerConfig:
    """Return megatron-core's config for saved args, as Megatron's training code derives it."""
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        kv_channels=args.kv_channels,
        ffn_hidden_size=args.ffn_hidden_size,
        normalization=args.normalization,
        layernorm_epsilon=args.layernorm_epsilon,
        layernorm_zero_centered_gamma=args.layernorm_zero_centered_gamma,
        qk_layernorm=args.qk_layernorm,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        gated_linear_unit=args.swiglu,
        activation_func=silu if args.swiglu else gelu,
        bias_activation_fusion=args.bias_gelu_fusion,
        rotary_interleaved=args.rotary_interleaved,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
    )


def build(args: Namespace, *, bert: bool) -> nn.Module:
    """Return megatron-core's model, its weights not loaded yet."""
    config = transformer_config(args)
    common: dict[str, Any] = {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "parallel_output": False,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
    }
    if bert:
        return BertModel(
            config,
            2,
            bert_layer_local_spec,
            add_binary_head=args.bert_binary_head,
            **common,
        )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization),
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        **common,
    )


def load(model: nn.Module, folder: str) -> None:
    """Load a torch_dist folder: megatron-core says what it wants, and refuses a missing entry."""
    loaded = dist_checkpointing.load(model.sharded_state_dict(), folder)  # type: ignore[operator]
    # Beside the model's state `loaded` holds the args and so on; a missing weight is refused here.
    state = {name: loaded[name] for name in model.state_dict() if name in loaded}
    model.load_state_dict(state, strict=True)


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor], *, bert: bool) -> dict[str, Tensor]:
    """Return the logits, `[batch, seq, vocab]`."""
    tokens = inputs["tokens"]  # [B, T]
    if bert:
        lm, binary = model(tokens, inputs["padding_mask"], inputs["tokentypes"])
        return {"logits": lm} | ({} if binary is None else {"binary_logits": binary})
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return {"logits": model(tokens, positions, hidden)}


def main(scratch: str, *triples: str) -> None:
    """Read and run one checkpoint after another."""
    start(Path(scratch))
    for folder, inputs, output in zip(triples[::3], triples[1::3], triples[2::3], strict=True):
        args = dist_checkpointing.load_common_state_dict(folder)["args"]
        given = torch.load(inputs)
        bert = "tokentypes" in given
        model = build(args, bert=bert)
        load(model, folder)
        torch.save(run(model.eval(), given, bert=bert), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
