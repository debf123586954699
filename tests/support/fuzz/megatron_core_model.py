"""A process of its own in which megatron-core, not this project, reads checkpoints and runs them.

usage: python megatron_core_model.py SCRATCH FOLDER INPUTS OUTPUT [FOLDER INPUTS OUTPUT ...]

Each FOLDER is an `iter_*` folder in torch_dist format. The model is built from nothing but the
args that megatron-core itself loads from it, the weights come in through
`megatron.core.dist_checkpointing.load`, and the logits for the tokens in INPUTS (a torch.save file)
go to OUTPUT. One rank over gloo, on the CPU: the few calls of CUDA on the way are neutralised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.fusions.fused_bias_geglu import quick_gelu  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec  # noqa: E402
from megatron.core.models.bert.bert_model import BertModel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402
from megatron.core.transformer import multi_latent_attention  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import (  # noqa: E402
    MoEAlltoAllTokenDispatcher,
)
from megatron.core.transformer.transformer_config import (  # noqa: E402
    MLATransformerConfig,
    TransformerConfig,
)
from torch import Tensor, nn  # noqa: E402


class Attention(DotProductAttention):
    """The local attention, which latent attention tells its sizes; they are in the config too."""

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **more: Any) -> None:
        super().__init__(*args, **more)


class NoStream:
    """Stands for a CUDA stream and its events, of which a CPU has none: nothing to wait for."""

    def wait_stream(self, other: object) -> None:
        """Return at once."""

    def record_event(self) -> NoStream:
        """Return what nobody has to wait for."""
        return self

    def synchronize(self) -> None:
        """Return at once."""


multi_latent_attention.HAVE_TE = False  # it compares classes that are not there
moe_utils.te_general_gemm = None  # a name that is looked up without TransformerEngine too
ones = torch.ones
torch.ones = lambda *shape, device=None, **more: ones(  # type: ignore[assignment]
    *shape, device=None if device == "cuda" else device, **more
)
LocalSpecProvider.core_attention = lambda self: Attention
torch.cuda.current_stream = NoStream  # type: ignore[assignment]
torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment, return-value]
MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = NoStream()


def start(scratch: Path) -> None:
    """Start the one-rank process group that megatron-core cannot do without."""
    store = torch.distributed.FileStore(str(scratch / "rendezvous"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    get_cuda_rng_tracker().fork = lambda *_, **__: contextlib.nullcontext()


def transformer_config(args: Namespace) -> TransformerConfig:
    """Return megatron-core's config for saved args, as Megatron's training code derives it.

    Whatever stands in args under the name of a field is copied (core_transformer_config_from_args
    in megatron/training/arguments.py, core 0.16); the rest follows from other arguments.
    """
    kind = MLATransformerConfig if getattr(args, "multi_latent_attention", False) else None
    kind = kind or TransformerConfig
    values = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(kind)
        if hasattr(args, field.name)
    }
    values |= {
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "num_moe_experts": getattr(args, "num_experts", None),
        "activation_func": torch.nn.functional.gelu,
        "bias_activation_fusion": args.bias_gelu_fusion,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": torch.float32,
        "use_cpu_initialization": True,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
    }
    if args.swiglu:
        values["activation_func"], values["gated_linear_unit"] = torch.nn.functional.silu, True
    elif args.quick_geglu:
        values["activation_func"], values["gated_linear_unit"] = quick_gelu, True
    config = kind(**values)
    for name, value in vars(args).items():  # YaRN of plain attention: no fields, set by hand
        if name.startswith("yarn_"):
            setattr(config, name, value)
    return config


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
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=False,
            normalization=args.normalization,
            qk_l2_norm=config.qk_l2_norm,
        )
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=args.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=args.normalization,
        )
    heads = None
    if config.mtp_num_layers:
        heads = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    return GPTModel(
        config,
        spec,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        mtp_block_spec=heads,
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
