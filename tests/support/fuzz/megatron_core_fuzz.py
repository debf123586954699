"""A process in which megatron-core builds, saves and runs random models, for a range of seeds.

usage: python megatron_core_fuzz.py FOLDER ARGS FIRST LAST

ARGS is a file that holds the args of a genuine run, of which each seed changes some: sizes and
everything that decides the function, fields that are said to have no effect, and now and then one
of those that are refused. FOLDER/SEED then holds the checkpoint as Megatron lays it out and, where
the model runs on a CPU, `golden.pt` with its logits; a line of FOLDER/cases.jsonl says what was
changed. A drawn change that megatron-core itself refuses is left out and counted.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import random
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the tests' folder
from megatron.core.activations import squared_relu  # noqa: E402
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    ShardedTensor,
    apply_factories,
)
from megatron.core.fusions.fused_bias_geglu import quick_gelu  # noqa: E402
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec  # noqa: E402
from megatron.core.models.bert.bert_model import BertModel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mlm_eval.checkpoints.megatron.fields import ARG_FIELDS  # noqa: E402
from support.fuzz.megatron_core_model import run, start  # noqa: E402

Changes = dict[str, Any]

LAYOUT = frozenset(
    """tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    expert_model_parallel_size context_parallel_size sequence_parallel params_dtype fp16 bf16
    transformer_impl num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split moe_input_jitter_eps""".split()
)
"""Not drawn as fields without effect: one process of float32 runs here, without noise."""

ONE_RANK = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "world_size": 1,
    "rank": 0,
    "sequence_parallel": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
}


# ---- what is drawn -----------------------------------------------------------------------------


def draw_function(draw: random.Random) -> Changes:
    """Return what decides the function: sizes, positions, norms, biases, activation."""
    heads = draw.choice([1, 2, 4, 6])
    channels = draw.choice([4, 6, 8, 16])
    groups = draw.choice([n for n in (1, 2, 3, 4, 6) if heads % n == 0])
    grouped = draw.random() < 0.5
    activation = draw.choice(["gelu", "fused gelu", "swiglu", "squared_relu"])
    biased = activation == "fused gelu" or draw.random() < 0.5
    qkv_bias = draw.random() < 0.5
    changes: Changes = {
        "num_layers": draw.choice([1, 2, 3]),
        "hidden_size": draw.choice([heads * channels, 8, 20, 32]),
        "ffn_hidden_size": draw.choice([12, 24, 40]),
        "num_attention_heads": heads,
        "kv_channels": channels,
        "group_query_attention": grouped,
        "num_query_groups": groups if grouped else 1,
        "padded_vocab_size": draw.choice([16, 40, 64]),
        "normalization": draw.choice(["LayerNorm", "RMSNorm"]),
        "layernorm_epsilon": draw.choice([1e-5, 1e-6, 1e-2]),
        "swiglu": activation == "swiglu",
        "squared_relu": activation == "squared_relu",
        "bias_gelu_fusion": activation == "fused gelu",
        "bias_swiglu_fusion": draw.random() < 0.5,
        "add_bias_linear": biased,
        "add_qkv_bias": biased or qkv_bias,
        "qk_layernorm": draw.random() < 0.3,
        "untie_embeddings_and_output_weights": draw.random() < 0.5,
        "position_embedding_type": draw.choice(["learned_absolute", "rope", "rope", "none"]),
        "max_position_embeddings": draw.choice([16, 40]),
        "rotary_base": draw.choice([10000, 500, 500000]),
        # An odd number of rotated channels is refused.
        "rotary_percent": draw.choice([1.0, 0.5]) if channels % 4 == 0 else 1.0,
        "rotary_interleaved": draw.random() < 0.3,
        "use_rope_scaling": draw.random() < 0.3,
    }
    changes["encoder_num_layers"] = changes["num_layers"]
    for name, chance, values in (
        ("rope_scaling_factor", 0.3, [32.0, 4.0]),
        ("rotary_seq_len_interpolation_factor", 0.2, [4, 2.5]),
        ("softmax_scale", 0.2, [0.4, 0.05, 1.0, channels**-0.5]),
        ("apply_residual_connection_post_layernorm", 0.15, [True]),
        ("openai_gelu", 0.1, [True]),
        ("onnx_safe", 0.1, [True]),
        # Local layers have none of TransformerEngine's functions, and lose the gate with it.
        ("use_te_activation_func", 0.2 if activation == "gelu" else 0.0, [True]),
        ("hidden_dropout", 0.3, [0.1]),
        ("attention_dropout", 0.3, [0.1]),
    ):
        if draw.random() < chance:
            changes[name] = draw.choice(values)
    return changes


def draw_without_effect(draw: random.Random) -> Changes:
    """Return a few fields of the config that are said to change nothing, at other values."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(TransformerConfig)
        if field.name not in LAYOUT
    }
    entries = {name: ARG_FIELDS[name] for name in defaults if name in ARG_FIELDS}
    names = sorted(
        name
        for name, entry in entries.items()
        if entry.mark in ("numerics", "training") or entry.only_with
    )
    return {name: other_value(draw, defaults[name]) for name in draw.sample(names, k=4)}


def other_value(draw: random.Random, default: Any) -> Any:
    """Return a value of a field that is not its default."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + draw.choice([1, 2])
    if isinstance(default, float):
        return default + draw.choice([0.25, 1.0])
    if isinstance(default, enum.Enum):
        return draw.choice([one for one in type(default) if one is not default])
    return draw.choice([1, 2, True])


NEWER: dict[str, Callable[[random.Random, int], Any]] = {
    # Name -> a value, given the number of layers.
    "quick_geglu": lambda draw, layers: True,
    "activation_func_clamp_value": lambda draw, layers: draw.choice([0.1, 1.5]),
    "glu_linear_offset": lambda draw, layers: draw.choice([1.0, -0.5]),
    "qk_l2_norm": lambda draw, layers: True,
    "attention_output_gate": lambda draw, layers: True,
    "no_rope_freq": lambda draw, layers: draw.choice([2, [1] * layers]),
    "softmax_type": lambda draw, layers: draw.choice(["learnable", "off-by-one"]),
    "window_size": lambda draw, layers: [draw.choice([2, 5]), 0],
    "num_experts": lambda draw, layers: draw.choice([1, 2, 4]),
}


# ---- megatron-core's config and model ----------------------------------------------------------


def transformer_config(args: Namespace) -> TransformerConfig:
    """Return the config as Megatron-LM's core_transformer_config_from_args derives it (core 0.16).

    Whatever stands in args under a field's name is copied; the rest follows from other arguments.
    """
    values = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(TransformerConfig)
        if hasattr(args, field.name)
    }
    values |= {
        "persist_layer_norm": not args.no_persist_layer_norm,
        "deallocate_pipeline_outputs": True,
        "pipeline_dtype": args.params_dtype,
        "batch_p2p_comm": not args.overlap_p2p_comm,
        "num_moe_experts": args.num_experts,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "cp_comm_type": args.cp_comm_type[0],
    }
    if args.swiglu:
        values["activation_func"] = torch.nn.functional.silu
        values["gated_linear_unit"] = True
        values["bias_activation_fusion"] = args.bias_swiglu_fusion
    else:
        values["bias_activation_fusion"] = args.bias_gelu_fusion
    if args.squared_relu:
        assert not args.swiglu
        values["activation_func"] = squared_relu
    elif args.quick_geglu:
        assert not args.swiglu
        values["gated_linear_unit"] = True
        values["activation_func"] = quick_gelu
    return TransformerConfig(**values)


def build(args: Namespace, *, bert: bool) -> nn.Module:
    """Return the model as pretrain_gpt.py and pretrain_bert.py build it, with noise for weights.

    Both pass on few arguments beside the config: pretrain_bert.py no kind of positions.
    """
    config = transformer_config(args)
    common: dict[str, Any] = {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "parallel_output": False,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
    }
    if bert:
        model: nn.Module = BertModel(
            config, 2, bert_layer_local_spec, add_binary_head=args.bert_binary_head, **common
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=args.num_experts,
            qk_layernorm=args.qk_layernorm,
            normalization=args.normalization,
            # Megatron-LM's gpt_builders passes it on to local layers with experts only.
            qk_l2_norm=args.qk_l2_norm and args.num_experts is not None,
        )
        model = GPTModel(
            config,
            spec,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            **common,
        )
    return model


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Give every parameter noise: biases too, and norms gains about 1."""
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.3)
        if "norm" in name and name.endswith("weight"):
            parameter += 1


def inputs_of(seed: int, args: Namespace, *, bert: bool) -> dict[str, Tensor]:
    """Return two rows of 16 tokens; for BERT the second is padded after 11."""
    noise = torch.Generator().manual_seed(seed)
    tokens = torch.randint(args.padded_vocab_size, (2, 16), generator=noise)
    if not bert:
        return {"tokens": tokens}
    mask = torch.ones_like(tokens)
    mask[1, 11:] = 0
    types = torch.randint(2, tokens.shape, generator=noise)
    return {"tokens": tokens, "tokentypes": types, "padding_mask": mask}


# ---- a case ------------------------------------------------------------------------------------


def attempt(base: Namespace, changes: Changes, seed: int, *, bert: bool) -> tuple[Any, Any, Any]:
    """Return args, model and golden outputs; None for outputs that a CPU cannot compute.

    Raises:
        Exception: megatron-core refuses the settings.
    """
    args = copy.copy(base)
    vars(args).update(changes)
    model = build(args, bert=bert).eval()
    randomize(model, seed)
    inputs = inputs_of(seed, args, bert=bert)
    try:
        golden = inputs | run(model, inputs, bert=bert)
    except Exception:
        golden = None
    if golden is not None and not golden["logits"].isfinite().all():
        golden = None
    return args, model, golden


def make_case(folder: Path, base: Namespace, seed: int) -> dict[str, Any]:
    """Write one seed's checkpoint and outputs, and return what it is."""
    draw = random.Random(seed)
    bert = draw.random() < 0.15
    function = draw_function(draw)
    idle = draw_without_effect(draw)
    newer = {}
    if draw.random() < 0.16:
        name = draw.choice(sorted(NEWER))
        newer[name] = NEWER[name](draw, function["num_layers"])
    left_out: list[str] = []
    while True:
        try:
            args, model, golden = attempt(base, function | idle | newer, seed, bert=bert)
            if golden is None and idle and not newer:
                raise RuntimeError("cannot run here")
            break
        except Exception as reason:
            if idle:  # one by one, so that the others stay
                left_out.append(idle.popitem()[0])
            elif newer:
                left_out.append(newer.popitem()[0])
            else:
                return {"seed": seed, "impossible": f"{type(reason).__name__}: {reason}"[:200]}
    dist = draw.random() < 0.25 and not bert
    save(folder / str(seed), model, args, dist=dist)
    if golden is not None:
        torch.save(golden, folder / str(seed) / "golden.pt")
    return {
        "seed": seed,
        "bert": bert,
        "dist": dist,
        "golden": golden is not None,
        "function": {name: repr(value) for name, value in function.items()},
        "without_effect": {name: repr(value) for name, value in idle.items()},
        "newer": {name: repr(value) for name, value in newer.items()},
        "left_out": left_out,
    }


def save(root: Path, model: Any, args: Namespace, *, dist: bool) -> None:
    """Save a model as Megatron's checkpointing.py does, in its two formats.

    torch_dist goes by megatron-core's own keys, shapes and offsets; the files are written by
    torch.distributed.checkpoint, since megatron-core's writer starts processes for each save.
    """
    contents = {"args": args, "checkpoint_version": 3.0, "iteration": 1}
    folder = root / "iter_0000001"
    folder.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    if not dist:
        (folder / "mp_rank_00").mkdir()
        contents["model"] = model.state_dict_for_save_checkpoint()
        torch.save(contents, folder / "mp_rank_00" / "model_optim_rng.pt")
        return
    import torch.distributed.checkpoint as dcp

    state = model.sharded_state_dict()
    apply_factories(state)
    whole: dict[str, Tensor] = {}
    for shard in shards_in(state):
        if shard.key not in whole:
            whole[shard.key] = torch.zeros(shard.global_shape)
        axes = shard.prepend_axis_num
        sizes = (1,) * axes + tuple(shard.local_shape)
        at = tuple(slice(o, o + n) for o, n in zip(shard.global_offset, sizes, strict=True))
        whole[shard.key][at] = shard.data.detach().reshape(sizes)
    dcp.save(whole, storage_writer=dcp.FileSystemWriter(str(folder)), no_dist=True)
    torch.save(contents, folder / "common.pt")
    (folder / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )


def shards_in(state: Any) -> list[ShardedTensor]:
    """Return the sharded tensors of a nested state dict."""
    if isinstance(state, ShardedTensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [shard for part in parts for shard in shards_in(part)]


def main(folder: str, args: str, first: str, last: str) -> None:
    """Make the cases of a range of seeds."""
    import warnings

    warnings.simplefilter("ignore")
    room = Path(folder)
    start(room)
    base = torch.load(args, weights_only=False)["args"]
    vars(base).update(ONE_RANK, attention_backend=AttnBackend.auto)
    with (room / "cases.jsonl").open("w") as lines:
        for seed in range(int(first), int(last)):
            lines.write(json.dumps(make_case(room, base, seed)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
