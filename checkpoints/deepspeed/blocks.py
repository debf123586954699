"""gpt-neox's transformer blocks as Megatron's: names, gates, query groups, biases.

Everything here is done rank by rank, before ranks are joined: a rank's packed rows belong together.
Source: megatron/model/transformer.py of EleutherAI/gpt-neox; docs/megatron.md, "DeepSpeed".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.deepspeed.settings import NeoxSettings
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Concat, LazyTensor, RowOrder, Selected, Summed, zeros
from mlm_eval.checkpoints.parameters import group_order

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, LazyTensor]

_NAMES = (
    ("attention.query_key_value.", "self_attention.linear_qkv."),
    ("attention.dense.", "self_attention.linear_proj."),
    ("post_attention_layernorm.", "pre_mlp_layernorm."),
    ("mlp.dense_h_to_4h.", "mlp.linear_fc1."),
    ("mlp.dense_4h_to_h.", "mlp.linear_fc2."),
    ("mlp.linear1.", "mlp.linear_fc1."),
    ("mlp.linear2.", "mlp.linear_fc2."),
    ("mlp.w2.", "mlp.linear_fc2."),
    # TransformerEngine's LayerNormMLP
    ("mlp.layer_norm_", "pre_mlp_layernorm."),
    ("mlp.fc1_", "mlp.linear_fc1."),
    ("mlp.fc2_", "mlp.linear_fc2."),
)
_ENGINES_MLP = "mlp.fc1_"
_BUFFERS = re.compile(r"attention\.(rotary_emb\.inv_freq|alibi_embed\.slopes|(masked_)?bias)")
_FC1, _QKV = "mlp.linear_fc1.", "self_attention.linear_qkv."
_MATRICES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_ROW_BIASES = ("self_attention.linear_proj.bias", "mlp.linear_fc2.bias")


def megatron_blocks(blocks: Sequence[Tensors], settings: NeoxSettings, where: str) -> list[Tensors]:
    """Return the block of each tensor-parallel rank under megatron-core's names and in its order.

    - A gated matrix is `[up; gate]` here, `[gate; up]` there; TransformerEngine's is as there.
    - With grouped queries a rank's rows are all its queries, all its keys, all its values.
    - With the parallel residual every rank adds its own bias of the row-parallel layers before the
      sum over ranks: the true bias is the sum. With the sequential one each has a copy.
    - Biases that only some of the linear layers have, or the norms have not, are zeros, where the
      settings say that they are not there.

    Args:
        blocks: By rank, under gpt-neox's names below the block.
        settings: Of the run.
        where: The checkpoint, for messages.
    """
    of_engine = any(name.startswith(_ENGINES_MLP) for name in blocks[0])
    if of_engine:
        _check_engines_mlp(settings, where)
    renamed = [_renamed(block, where) for block in blocks]
    for block in renamed:
        _check_matrices(block, where)
        if not of_engine:
            _order_gate(block)
        _order_groups(block, settings, len(blocks), where)
        if settings.tied_norms:
            for leaf in ("weight", "bias"):
                block.pop(f"pre_mlp_layernorm.{leaf}", None)
                if f"input_layernorm.{leaf}" in block:
                    block[f"pre_mlp_layernorm.{leaf}"] = block[f"input_layernorm.{leaf}"]
        _fill_biases(block, settings)
    if settings.parallel and len(blocks) > 1:
        for name in _ROW_BIASES:
            parts = [block[name] for block in renamed if name in block]
            if len(parts) == len(renamed):
                whole = Summed(parts)
                for block in renamed:
                    block[name] = whole
    return renamed


def megatron_norm(tensors: Mapping[str, LazyTensor], *, zero_bias: bool) -> Tensors:
    """Return a norm's parameters by Megatron's names: gpt-neox's RMSNorm has a `scale`."""
    norm = {("weight" if leaf == "scale" else leaf): tensor for leaf, tensor in tensors.items()}
    if zero_bias and "weight" in norm and "bias" not in norm:
        norm["bias"] = zeros(norm["weight"].shape[:1], norm["weight"].kind)
    return norm


def _renamed(block: Mapping[str, LazyTensor], where: str) -> Tensors:
    found: Tensors = {}
    for key, tensor in block.items():
        if _BUFFERS.fullmatch(key):
            continue
        name = key.removesuffix("scale") + "weight" if key.endswith("norm.scale") else key
        for old, new in _NAMES:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        if name in found:
            raise InputError(
                f"{where} has {name} under two names, one of them {key}; the files may be of two "
                "models: copy all files of one save"
            )
        found[name] = tensor
    for leaf in ("weight", "bias"):  # Llama's in gpt-neox: gate and up branch
        gate, up = found.pop(f"mlp.w1.{leaf}", None), found.pop(f"mlp.w3.{leaf}", None)
        if (gate and gate.shape) != (up and up.shape):
            raise InputError(
                f"{where}: mlp.w1.{leaf} and mlp.w3.{leaf}, gate and up branch, are not of one "
                "shape; copy all files of one save"
            )
        if gate is not None and up is not None:
            found[f"{_FC1}{leaf}"] = Concat([up, gate], 0)
    return found


def _check_engines_mlp(settings: NeoxSettings, where: str) -> None:
    """Refuse TransformerEngine's MLPs unless what they compute is stated.

    Its kernels activate the first half of a gated matrix, which are gpt-neox's second half, and its
    GELU is the tanh form; the epsilon of the norm in such an MLP is a constant of gpt-neox.
    Source: megatron/model/transformer_engine.py of EleutherAI/gpt-neox (`TELayerNormMLP`);
    transformer_engine/common/util/vectorized_pointwise.h of NVIDIA/TransformerEngine.
    """
    given = settings.overrides
    name, constant = ("layernorm", 1e-5) if settings.layer_norm else ("rms_norm", 1e-8)
    epsilon = given.get("layernorm_epsilon", settings.get(f"{name}_epsilon")[0])
    if "activation" not in given or float(epsilon) != constant:
        same = "" if float(epsilon) == constant else f" --set layernorm_epsilon={constant:g}"
        raise InputError(
            f"{where} has TransformerEngine's MLPs (te_layernorm_mlp), whose GELU is the tanh form "
            f"and whose norm has epsilon {constant:g} whatever the settings say; mlm-eval was not "
            "compared with such a run: say what it computed with --set activation=gelu_tanh, "
            f"geglu_tanh or swiglu{same and ' and'}{same}"
        )


def _check_matrices(block: Tensors, where: str) -> None:
    for name in _MATRICES:
        weight = block.get(f"{name}.weight")
        if weight is None or len(weight.shape) != 2:
            found = "none" if weight is None else f"one of shape {list(weight.shape)}"
            raise InputError(
                f"{where} should hold a matrix {name} (by Megatron's name) in each layer, and "
                f"holds {found}; copy all files of one save"
            )
        bias = block.get(f"{name}.bias")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise InputError(
                f"{where}: the bias of {name} (by Megatron's name) is {list(bias.shape)} beside a "
                f"matrix of {weight.shape[0]} rows; copy all files of one save"
            )


def _order_gate(block: Tensors) -> None:
    fc1, width = block[f"{_FC1}weight"], block["mlp.linear_fc2.weight"].shape[1]
    if fc1.shape[0] != 2 * width:
        return
    order = RowOrder(2 * width, _halves_exchanged, width)
    for leaf in ("weight", "bias"):
        if f"{_FC1}{leaf}" in block:
            block[f"{_FC1}{leaf}"] = Selected(block[f"{_FC1}{leaf}"], order)


def _halves_exchanged(width: int) -> Tensor:
    import torch

    return torch.arange(2 * width).roll(width)


def _order_groups(block: Tensors, settings: NeoxSettings, ranks: int, where: str) -> None:
    heads, groups = settings.heads, settings.groups
    if heads is None or groups is None or groups == heads:
        return  # [heads, 3, channels]: group order as it is
    qkv = block[f"{_QKV}weight"]
    if groups < 1 or heads < 1 or heads % groups or groups % ranks:
        raise InputError(
            f"{where}: {groups} key and value heads of {heads} query heads are not shared evenly "
            f"by {ranks} tensor-parallel ranks; correct it with --set num_query_groups=N"
        )
    heads, groups = heads // ranks, groups // ranks
    channels, rest = divmod(qkv.shape[0], heads + 2 * groups)
    if rest:
        raise InputError(
            f"{where}: {qkv.shape[0]} QKV rows of a rank do not fit {heads} query heads and "
            f"{groups} key and value heads; correct it with --set num_query_groups=N"
        )
    order = group_order(heads, groups, channels)
    for leaf in ("weight", "bias"):
        if f"{_QKV}{leaf}" in block:
            block[f"{_QKV}{leaf}"] = Selected(block[f"{_QKV}{leaf}"], order)


def _fill_biases(block: Tensors, settings: NeoxSettings) -> None:
    absent = []
    if settings.layer_norm and settings.may_lack_bias("norms"):
        absent += ["input_layernorm", "pre_mlp_layernorm"]
    if any(f"{name}.bias" in block for name in _MATRICES[1:]):
        absent += _MATRICES[1:2] if settings.may_lack_bias("attn_linear") else ()
        absent += _MATRICES[2:] if settings.may_lack_bias("mlp") else ()
    for name in absent:
        weight = block.get(f"{name}.weight")
        if weight is not None and f"{name}.bias" not in block:
            block[f"{name}.bias"] = zeros(weight.shape[:1], weight.kind)
