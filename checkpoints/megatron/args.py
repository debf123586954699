"""Megatron's saved `args` and ModelConfig, both directions.

Reading: shapes win over args where both speak; a setting that neither holds is assumed, and the
assumption is kept in `sources`, so that `inspect` can show it. Writing is the inverse: our reader,
and Megatron's own, must get the same model back. Source: docs/megatron.md, "Arguments", "GELU".
"""

from __future__ import annotations

import dataclasses
import math
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import (
    GATED_ACTIVATIONS,
    ROTARY_SETTINGS,
    ConfigBuilder,
    ModelConfig,
    RopeScaling,
)
from mlm_eval.checkpoints.dtypes import dtype_name
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safe_pickle import Stub, attributes_of, printable
from mlm_eval.checkpoints.megatron import family_args
from mlm_eval.checkpoints.megatron.family_args import Shapes
from mlm_eval.checkpoints.megatron.fields import ARG_FIELDS, NOT_FOR_T5, T5_UNTIL, RunCode
from mlm_eval.checkpoints.megatron.layers import branches
from mlm_eval.checkpoints.megatron.layout import SaveLayout, needs_openai_gelu
from mlm_eval.checkpoints.parameters import (
    RELATIVE_BIASES,
    WORD_EMBEDDINGS,
    num_prediction_heads,
    parameters,
)
from mlm_eval.checkpoints.projects.settings import (
    ACTIVATION_ARGS,
    BESIDE,
    GATED_GELU,
    OF_PROVIDERS,
    PASSED_ON,
    RAN,
    SideSettings,
    not_heeded,
)

# Setting -> Megatron's default.
_SETTINGS: dict[str, Any] = {
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "rotary_percent": 1.0,
    "rotary_base": 10000.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "apply_residual_connection_post_layernorm": False,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "init_method_std": 0.02,
    "softmax_scale": None,
}
_ROTARY = (
    "rotary_percent",
    "rotary_base",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
)

# Settings that Megatron renamed (in 2023 and again in 2026) -> their names in args, newer first.
# All of them are written.
_RENAMED = {
    "layernorm_epsilon": ("norm_epsilon", "layernorm_epsilon"),
    "layernorm_zero_centered_gamma": ("layernorm_zero_centered_gamma", "apply_layernorm_1p"),
}

# Settings that are read from shapes and written under the same name.
_FROM_SHAPES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "max_position_embeddings",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
)

# Fields of args that are read as numbers here: one of another type comes from a damaged file.
_WHOLE_NUMBERS = frozenset(
    """num_layers encoder_num_layers decoder_num_layers relative_attention_num_buckets
    relative_attention_max_distance hidden_size ffn_hidden_size num_attention_heads
    num_query_groups kv_channels max_position_embeddings seq_length padded_vocab_size rank
    model_parallel_size tensor_model_parallel_size pipeline_model_parallel_size
    expert_model_parallel_size expert_tensor_parallel_size moe_router_topk moe_router_num_groups
    moe_router_group_topk q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    yarn_original_max_position_embeddings original_max_position_embeddings mamba_num_heads
    mamba_head_dim mamba_num_groups mamba_state_dim""".split()
)
_NUMBERS = frozenset(
    """rotary_percent rotary_base rotary_seq_len_interpolation_factor rope_scaling_factor
    softmax_scale norm_epsilon layernorm_epsilon hidden_dropout attention_dropout
    init_method_std mamba_min_time_step mamba_norm_epsilon""".split()
)

_CARRIED_WORDS = frozenset(
    """tokenizer_type optimizer lr_decay_style weight_decay_incr_style dataloader_type data_impl
    DDP_impl moe_router_load_balancing_type""".split()
)
"""Words that are kept. Any other string may name a place, a person or a machine."""

_NOT_CARRIED = frozenset(
    """model_parallel_size rank local_rank node_rank world_size data_parallel_size
    context_parallel_size expert_model_parallel_size expert_tensor_parallel_size sequence_parallel
    virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage
    num_virtual_stages_per_pipeline_rank pipeline_model_parallel_split_rank
    pipeline_model_parallel_layout decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split standalone_embedding_stage encoder_tensor_model_parallel_size
    encoder_pipeline_model_parallel_size use_cpu_initialization apply_layernorm_1p
    disable_bias_linear num_classes use_mcore_models use_legacy_models mtp_num_layers
    moe_extended_tp moe_use_legacy_grouped_gemm moe_permute_fusion moe_enable_deepep
    moe_shared_expert_overlap moe_layer_recompute moe_pad_expert_input_to_capacity
    moe_router_topk_limited_devices""".split()
)
"""About the machines and the layout of the run that saved the source, or said anew below."""


def saved_args(value: Any, where: str) -> dict[str, Any]:
    """Return Megatron's saved `args` as a dict of plain values; empty where there are none.

    Raises:
        InputError: A size is not a number.
    """
    args = attributes_of(value)
    _check_numbers(args, where)
    return args


def with_losses(args: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return args with the coefficients of auxiliary losses that `--set` gives.

    They are no settings of a model: who trains it looks them up in the args.
    """
    names = ("moe_aux_loss_coeff", "moe_z_loss_coeff")
    return dict(args) | {name: overrides[name] for name in names if name in overrides}


def _check_numbers(args: Mapping[str, Any], where: str) -> None:
    for name in sorted(args):
        found = args[name]
        if found is None or name not in _WHOLE_NUMBERS | _NUMBERS:
            continue
        whole = type(found) is int and 0 <= found < 2**31
        if not whole and not (name in _NUMBERS and type(found) in (int, float)):
            raise InputError(
                f"{where}: args.{name} is {found!r} where a number was expected; the file is "
                "damaged, copy it again"
            )


@dataclass
class _ArgsReader(ConfigBuilder):
    args: Mapping[str, Any] = field(default_factory=dict)
    code: RunCode = "core"
    layers_differ: bool = False
    """The model is a hybrid, or its layers are heterogeneous."""

    def receives(self, name: str) -> bool:
        """Return whether the code that ran passed an arg on to its model; warn where it did not.

        Nothing is said of one that is absent, or is set by hand.
        """
        entry = ARG_FIELDS[name]
        t5 = self.values["family"] == "t5" and name in NOT_FOR_T5
        received = self.code not in entry.unreceived and not t5
        if received or family_args.is_passed_on(self.args, name):
            return True
        models, until = ("T5 models", T5_UNTIL) if t5 else ("models", entry.until)
        self.warnings.append(
            f"args.{name} is {self.args[name]}, but the {models} of Megatron's {self.code} code "
            f"were built without it (up to {until}), so it is not applied; if this run's code did "
            f"apply it, use --set {_HAND_NAMES.get(name, f'{name}={self.args[name]}')}"
        )
        return False

    def from_args(self, name: str) -> None:
        """Take a setting of `_SETTINGS` from the first of its names that is in args."""
        default = _SETTINGS[name]
        for key in _RENAMED.get(name, (name,)):
            value = self.args.get(key)
            if value is None:
                continue
            if name in self.overrides or value == default or self.receives(key):
                self.set(name, value, f"args.{key}")
            else:
                self.set(name, default, f"Megatron's {self.code} code is not given args.{key}")
            return
        self.set(name, default, "assumed" if not self.args else "Megatron's default")


# What an arg that was not passed on is called by --set.
_HAND_NAMES = {"use_rope_scaling": "rope_scaling_factor=8"}


def build_config(
    shapes: Shapes,
    args: Mapping[str, Any],
    *,
    family: str,
    code: RunCode,
    overrides: Mapping[str, Any],
    where: str,
    params_dtype: str,
) -> ConfigBuilder:
    """Return the config of a Megatron checkpoint.

    Args:
        shapes: Full shapes of the parameters found, by canonical name.
        args: Megatron's saved args; empty for files without them.
        family: `gpt`, `bert` or `t5`.
        code: Whose layers the parameter names are: legacy and core code read args differently.
        overrides: `--set` values; they win over everything.
        where: The checkpoint, for messages.
        params_dtype: The stored dtype.

    Raises:
        InputError: A size or a setting that changes the function can be found nowhere, args and
            shapes contradict each other, or the model computes something else than ours.
    """
    _refuse_fields(args, overrides, where)
    _check_numbers(args, where)
    check_dims(shapes, where)
    if overrides.get("family", family) != family:
        raise InputError(
            f"{where} holds a {family.upper()} model by its parameters; give no --set family"
        )
    b = _ArgsReader(overrides, where, args=args, code=code)
    b.set("family", family, "parameter names")
    b.set("params_dtype", params_dtype, "weights")
    if code == "core":
        _refuse_unstated(b, shapes)
    for name in _SETTINGS:
        if name not in _ROTARY:
            b.from_args(name)
    _sizes(b, shapes)
    _positions(b, shapes)
    _rotary(b)
    if code == "core":
        family_args.read_layer_patterns(b, args)
        family_args.read_attention(b, args, shapes)
        family_args.read_scaling(b, args, shapes)
        family_args.read_experts(b, args, shapes)
        family_args.read_l2_norm(b, args)
        if b.values.get("multi_latent_attention"):
            family_args.read_latent_positions(b, args, overrides.get("mla_yarn"))
        elif args.get("multi_latent_attention"):
            raise InputError(
                f"{where} was trained with multi-latent attention (args.multi_latent_attention = "
                f"{args['multi_latent_attention']!r}), but its layers hold plain attention; copy "
                "all files of one save"
            )
    else:
        family_args.refuse_in_legacy(args, where)
    _norms_and_biases(b, shapes)
    _refuse_foreign_scale(b)
    _activation(b, shapes)
    _tying_and_heads(b, shapes)
    _tell_of_foreign_layers(b)
    return b.finish()


def _tell_of_foreign_layers(b: _ArgsReader) -> None:
    spec = b.args.get("spec")
    module = str(spec[0] if isinstance(spec, list) and spec else spec or "local")
    if b.code == "core" and module not in ("local", "te") and not module.startswith("megatron."):
        b.warnings.append(
            f"the run took its layers from {printable(module)} (args.spec), which is no part of "
            "Megatron: what they compute beyond their parameters and args is not known here"
        )


def _refuse_fields(args: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> None:
    """Refuse settings of a function that is not computed here, by name.

    Raises:
        InputError: Args hold one.
    """
    for name, entry in ARG_FIELDS.items():
        if entry.mark != "refused" or entry.only_with or name not in args:
            continue
        if entry.is_harmless(args[name]) or entry.setting in overrides:
            continue
        way_out = "score it with the code that trained it"
        if entry.setting:
            way_out = f"where the model has the like of it here, say so with --set {entry.setting}="
        said = f"{args[BESIDE]}: {name}" if BESIDE in args else f"args.{name}"
        raise InputError(
            f"{where} was trained with {entry.reason} ({said} = {args[name]!r}), which "
            f"mlm-eval does not compute; {way_out}"
        )


def _refuse_unstated(b: _ArgsReader, shapes: Shapes) -> None:
    """Refuse megatron-core checkpoints that do not say what changes the function.

    NVIDIA's releases of 2019 have no args either, but legacy names and known settings; with
    megatron-core's names, a missing setting stands in another file, and a guess is wrong.

    Raises:
        InputError: A setting stands neither in args nor in the tensors nor in `--set`.
    """
    kind = b.overrides.get("position_embedding_type", b.args.get("position_embedding_type"))
    no_table = not {"embedding.position_embeddings.weight", RELATIVE_BIASES[0]} & set(shapes)
    rms = not any(name.endswith(".final_layernorm.bias") for name in shapes)
    fc1 = _layer_shape(shapes, "linear_fc1.weight")
    fc2 = _layer_shape(shapes, "linear_fc2.weight")
    gated = fc1 is not None and fc2 is not None and fc1[-2] == 2 * fc2[-1]
    # A file of another project may hold a part of them only.
    stated = bool(b.args) and BESIDE not in b.args
    # Setting -> (whether it is needed, its names in args, what to write).
    needed = {
        "num_attention_heads": (True, "N"),
        "activation": (
            not stated and not any(b.args.get(name) is not None for name in ACTIVATION_ARGS),
            "swiglu" if gated else "gelu (exact), gelu_tanh or squared_relu",
        ),
        "position_embedding_type": (
            no_table and "use_rotary_position_embeddings" not in b.args,
            "rope or none",
        ),
        "rotary_base": (not stated and no_table and kind in (None, "rope"), "10000"),
        "max_position_embeddings": (not stated and no_table, "N"),
        "layernorm_epsilon": (not stated and rms, "1e-6 or 1e-5"),
    }
    missing = {
        name: example
        for name, (wanted, example) in needed.items()
        if wanted and name not in b.overrides and b.args.get(name) is None
    }
    if not missing:
        return
    lacks = "its args lack it" if b.args else "no args"
    if BESIDE in b.args:
        lacks = f"{b.args[BESIDE]} lacks it"
    raise InputError(
        f"{b.where} does not say what {', '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'}: {lacks} "
        "and no shape tells; give "
        + " ".join(f"--set {name}={example}" for name, example in missing.items())
    )


def unknown_settings(beside: SideSettings | None) -> list[str]:
    """Return a warning that lists the settings of another project's file that nobody knows here."""
    if beside is None:
        return []
    known = {*ARG_FIELDS, *OF_PROVIDERS, PASSED_ON, BESIDE, RAN}
    unknown = sorted(name for name, value in beside.args.items() if value and name not in known)
    if not unknown:
        return []
    return [not_heeded(f"{beside.path.name} has", unknown, most=6)]


def sources_beside(sources: Mapping[str, str], beside: SideSettings | None) -> Mapping[str, str]:
    """Return where settings came from, with the file of another project in the place of args."""
    if beside is None:
        return sources
    name = beside.path.name
    return {key: text.replace("args.", f"{name}: ") for key, text in sources.items()}


def check_dims(shapes: Shapes, where: str) -> None:
    """Refuse a tensor that is not a matrix, or not a vector, where one belongs.

    Raises:
        InputError: A tensor has the wrong number of dims.
    """
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        dims = 1 if leaf not in ("weight", "gate_weight") or module.endswith("norm") else 2
        dims += ".mlp.experts." in name or name.endswith(".conv1d.weight")
        if len(shape) != dims:
            raise InputError(
                f"{where}: {name} has shape {list(shape)}, expected {dims} dim(s); the checkpoint "
                "is damaged or was changed by another tool, use the original one"
            )


def layer_indices(shapes: Shapes, block: str = r"\w+") -> list[int]:
    """Return the layer numbers that occur in canonical names, in order; of one block, or of all."""
    found = {int(m[1]) for name in shapes if (m := re.match(rf"{block}\.layers\.(\d+)\.", name))}
    return sorted(found)


def _layer_shape(shapes: Shapes, suffix: str) -> tuple[int, ...] | None:
    for name, shape in shapes.items():
        if name.endswith(suffix) and ".layers." in name:
            return shape
    return None


def _sizes(b: _ArgsReader, shapes: Shapes) -> None:
    args, where = b.args, b.where
    t5 = b.values["family"] == "t5"
    layers = layer_indices(shapes, "encoder") if t5 else layer_indices(shapes)
    if not layers or WORD_EMBEDDINGS not in shapes:
        missing = "transformer layers" if not layers else "word embeddings"
        raise InputError(f"{where} holds no {missing}; it is not a whole GPT or BERT model")
    if b.code == "core" and not t5:
        layers = branches.with_empty_layers(layers, args, where)
    first, second = args.get("num_layers"), args.get("encoder_num_layers")
    _layers(b, "num_layers", layers, (second or first) if t5 else (first or second))
    if t5:  # megatron-core takes num_layers for the decoder
        saved = args.get("decoder_num_layers") or first
        _layers(b, "decoder_num_layers", layer_indices(shapes, "decoder"), saved)
    if b.code == "core":
        b.layers_differ = branches.read_branches(b, args, shapes)
    vocab, hidden = shapes[WORD_EMBEDDINGS]
    b.set("vocab_size", vocab, "shapes")
    b.set("hidden_size", hidden, "shapes")
    if args.get("hidden_size") not in (None, hidden):
        raise InputError(
            f"{where} has embeddings of width {hidden} where its args say hidden_size "
            f"{args['hidden_size']}; ranks of two checkpoints may be mixed: copy all ranks of one "
            "save"
        )
    _heads(b, shapes, hidden)


def _layers(b: _ArgsReader, name: str, layers: list[int], saved: int | None) -> None:
    """Set the number of a stack's layers, from the numbers of those that are there."""
    where, stack = b.where, "decoder " if name == "decoder_num_layers" else ""
    if layers != list(range(len(layers))):
        gap = next(i for i, layer in enumerate(layers) if layer != i)
        raise InputError(
            f"{where} lacks {stack}layer {gap} of {layers[-1] + 1}; if a pipeline stage is "
            "missing, copy all mp_rank folders of one save"
        )
    if saved and saved != len(layers) and name not in b.overrides:
        raise InputError(
            f"{where} holds {len(layers)} {stack}layers where its args say {saved}; if a pipeline "
            "stage or file is missing, copy all of one save, and if the run built no more than "
            f"these, use --set {name}={len(layers)}"
        )
    b.set(name, len(layers), "shapes")


def _heads(b: _ArgsReader, shapes: Shapes, hidden: int) -> None:
    args, where = b.args, b.where
    if family_args.is_latent(shapes):
        family_args.read_latents(b, args, shapes)
        return
    qkv = _layer_shape(shapes, "self_attention.linear_qkv.weight")
    proj = _layer_shape(shapes, "self_attention.linear_proj.weight")
    if b.layers_differ and qkv is None and proj is None:
        _heads_of_no_layer(b, hidden)
        return
    if qkv is None or proj is None:
        raise InputError(f"{where} holds layers without attention weights; it is not a whole model")
    saved_heads = args.get("num_attention_heads")
    source = "args.num_attention_heads" if saved_heads else "assumed: heads of 64"
    heads = b.set("num_attention_heads", saved_heads or max(proj[1] // 64, 1), source)
    if b.sources["num_attention_heads"] == "assumed: heads of 64":
        b.warnings.append(
            f"the file holds no args: {heads} heads of 64 assumed; correct it with --set "
            "num_attention_heads=N"
        )
    if heads < 1 or proj[1] < heads or proj[1] % heads:
        raise InputError(
            f"{where}: {heads} attention heads do not divide the attention width {proj[1]}; "
            "correct it with --set num_attention_heads=N"
        )
    channels = proj[1] // heads
    saved = args.get("kv_channels")
    if saved not in (None, channels) and b.sources["num_attention_heads"] != "--set":
        raise InputError(
            f"{where}: {heads} heads over an attention width of {proj[1]} have {channels} channels "
            f"each where its args say kv_channels {saved}; correct it with --set "
            "num_attention_heads=N"
        )
    b.set("kv_channels", channels, "shapes")
    own = 2 * heads if args.get("attention_output_gate") else heads  # queries, and their gates
    of_layers = branches.by_layer(shapes, ".self_attention.linear_qkv.weight")
    rows = {n: shape[0] for n, shape in of_layers.items()} if b.layers_differ else {0: qkv[0]}
    counts = {n: (count // channels - own) // 2 for n, count in rows.items()}
    groups = branches.read_widths(b, "layer_query_groups", counts)
    # The field is 1 for plain attention too: it counts with the flag only, or without any flag
    # where the weights bear it out (docs/megatron.md, "Arguments").
    expected = {heads}
    if args.get("group_query_attention"):
        expected = {args.get("num_query_groups") or heads}
    elif args.get("group_query_attention") is None:
        expected.add(args.get("num_query_groups") or heads)
    for n, count in counts.items():
        if (own + 2 * count) * channels != rows[n] or count < 1:
            raise InputError(
                f"{where}: {rows[n]} QKV rows do not fit {heads} heads of {channels}; "
                "correct it with --set num_attention_heads=N"
            )
    if b.layers_differ and args.get(branches.JSON_PATH):
        expected.add(groups)  # the JSON says it, and was compared
    by_hand = {"num_attention_heads", "num_query_groups", "kv_channels"} & set(b.overrides)
    if saved_heads and groups not in expected and not by_hand:
        raise InputError(
            f"{where}: the QKV weight has {groups} query groups where its args say "
            f"{max(expected)}; ranks of two checkpoints may be mixed: copy all ranks of one save, "
            f"or trust the weights with --set num_query_groups={groups}"
        )


def _heads_of_no_layer(b: _ArgsReader, hidden: int) -> None:
    """Set the sizes of attention of a model that has none."""
    heads = b.set("num_attention_heads", b.args.get("num_attention_heads") or 1, "no attention")
    b.set("num_query_groups", heads, "no attention")
    b.set("kv_channels", b.args.get("kv_channels") or max(hidden // heads, 1), "no attention")


def _positions(b: _ArgsReader, shapes: Shapes) -> None:
    args = b.args
    table = shapes.get("embedding.position_embeddings.weight")
    kind = args.get("position_embedding_type")
    if isinstance(kind, Stub):
        kind = _of_enum(kind)
    by_hand = "position_embedding_type" in b.overrides
    if b.code == "core" and b.values["family"] == "bert" and table is not None:
        # pretrain_bert.py never passes the kind on: megatron-core's BERT always has a table.
        b.set("position_embedding_type", "learned_absolute", "shapes")
        b.set("max_position_embeddings", table[0], "shapes")
        return
    if kind == "yarn" and b.code == "core" and not by_hand:
        kind = "rope"
        family_args.read_yarn(b, args)
    unknown = ("relative", "mrope", "yarn", *(["alibi"] if b.code == "core" else []))
    if kind in (None, "relative") and b.values["family"] == "t5" and not by_hand:
        kind = _relative_positions(b, shapes, kind)
    elif kind in unknown and not by_hand:
        raise InputError(
            f"{b.where} uses {kind} position embeddings, which mlm-eval does not compute; it reads "
            "models with learned_absolute or rope positions"
        )
    if kind is None:  # before 2023-07 the two were separate flags, and both could be on
        rotary = bool(args.get("use_rotary_position_embeddings"))
        kind = "+".join(name for name, on in (("learned_absolute", table), ("rope", rotary)) if on)
        source = "shapes and args" if args else "shapes"
        b.set("position_embedding_type", kind or "none", source)
    else:
        b.set("position_embedding_type", str(kind), "args.position_embedding_type")
    if table is not None:
        b.set("max_position_embeddings", table[0], "shapes")
    else:
        size = args.get("max_position_embeddings") or args.get("seq_length")
        if size is None and "max_position_embeddings" not in b.overrides:
            raise InputError(
                f"{b.where} does not record how many positions the model was trained for; "
                "give --set max_position_embeddings=N"
            )
        b.set("max_position_embeddings", size, "args.max_position_embeddings")


def _relative_positions(b: _ArgsReader, shapes: Shapes, kind: str | None) -> str | None:
    """Take T5's buckets of distances; return the kind of positions, which their table tells."""
    table = shapes.get(RELATIVE_BIASES[0])
    if table is None:
        return kind
    saved = b.args.get("relative_attention_num_buckets")
    if saved not in (None, table[0]):
        raise InputError(
            f"{b.where} has a table of {table[0]} relative positions where its args say "
            f"relative_attention_num_buckets {saved}; two checkpoints may be mixed: copy all files "
            "of one save"
        )
    b.set("relative_attention_num_buckets", table[0], "shapes")
    furthest = b.args.get("relative_attention_max_distance")
    source = "Megatron's default" if furthest is None else "args.relative_attention_max_distance"
    b.set("relative_attention_max_distance", furthest or 128, source)
    return "relative"


# The enum of BigScience's fork: its members, and their values in a pickle.
_FORK_POSITIONS = {
    **dict.fromkeys(("rotary", "1"), "rope"),
    **dict.fromkeys(("absolute", "2"), "learned_absolute"),
    **dict.fromkeys(("alibi", "3"), "alibi"),
}


def _of_enum(member: Stub) -> str:
    """Return the kind of positions that a fork's enum says, by value or by the member's name."""
    kind = str([member, *member.__dict__["stub_args"]][-1])
    names = [type(part).__name__ for part in [member, *member.__dict__["stub_args"]]]
    names += [p.__name__ for p in member.__dict__["stub_args"] if isinstance(p, type)]
    ours = any(name.endswith("PositionEmbeddingType") for name in names)
    return _FORK_POSITIONS.get(kind, kind) if ours else kind


def _rotary(b: _ArgsReader) -> None:
    """Take the settings of rotary positions, which count for a model that has them only."""
    args = b.args
    rotary = "rope" in str(b.values["position_embedding_type"])
    scaling = None
    if not rotary:
        for name in _ROTARY:
            b.set(name, _SETTINGS[name], "no rotary positions")
    else:
        for name in _ROTARY:
            b.from_args(name)
        b.values["rotary_base"] = float(b.values["rotary_base"])
        if (
            b.values["rotary_interleaved"]
            and b.code != "core"
            and "--set" not in b.sources["rotary_interleaved"]
        ):
            raise InputError(
                f"{b.where} was trained by Megatron's legacy code with rotary_interleaved, which "
                "its layers heeded and its tables of angles did not; mlm-eval does not compute "
                "that; if the run's code did it as megatron-core does, use --set "
                "rotary_interleaved=true"
            )
        by_hand = "rope_scaling_factor" in b.overrides
        if args.get("use_rope_scaling") and (by_hand or b.receives("use_rope_scaling")):
            factor = args.get("rope_scaling_factor")
            scaling = RopeScaling()
            if factor not in (None, scaling.factor) and not by_hand:
                if b.receives("rope_scaling_factor"):
                    scaling = RopeScaling(factor=float(factor))
    b.set("rope_scaling", scaling, "args.use_rope_scaling" if scaling else "Megatron's default")
    if rotary and not args:
        b.warnings.append(
            f"the file holds no args: rotary_percent {b.values['rotary_percent']:g}, "
            f"rotary_interleaved {b.values['rotary_interleaved']} and no scaling of rotary "
            "frequencies assumed; correct them with --set rotary_percent=X, "
            "rotary_interleaved=true, rope_scaling_factor=X"
        )


def _norms_and_biases(b: _ArgsReader, shapes: Shapes) -> None:
    block = "encoder" if b.values["family"] == "bert" else "decoder"
    has_norm_bias = f"{block}.final_layernorm.bias" in shapes
    b.set("normalization", "LayerNorm" if has_norm_bias else "RMSNorm", "shapes")
    saved = b.args.get("normalization")
    if saved and saved != b.values["normalization"] and "normalization" not in b.overrides:
        raise InputError(
            f"{b.where}: args say {saved}, but the final norm has {'a' if has_norm_bias else 'no'} "
            "bias; ranks of two checkpoints may be mixed: copy all ranks of one save"
        )
    if b.args.get("apply_layernorm_1p") and "layernorm_zero_centered_gamma" not in b.overrides:
        b.set("layernorm_zero_centered_gamma", True, "args.apply_layernorm_1p")
    for name, suffix in (
        ("add_bias_linear", "self_attention.linear_proj.bias"),
        ("add_qkv_bias", "self_attention.linear_qkv.bias"),
        ("qk_layernorm", "self_attention.q_layernorm.weight"),
        ("qk_layernorm_bias", "self_attention.q_layernorm.bias"),
    ):
        b.set(name, _layer_shape(shapes, suffix) is not None, "shapes")
    has_norm = "embedding.word_embeddings_layernorm.weight" in shapes
    b.set("embedding_layernorm", has_norm, "shapes")
    if b.layers_differ:
        ends = ("linear_proj.bias", "linear_fc1.bias", "self_attention.bias", "mlp.bias")
        b.set("add_bias_linear", any(name.endswith(ends) for name in shapes), "shapes")
        if _layer_shape(shapes, "self_attention.linear_qkv.weight") is None:
            b.set("add_qkv_bias", b.values["add_bias_linear"], "no attention")
    if _layer_shape(shapes, "self_attention.kv_layernorm.weight") is not None:
        b.set("qk_layernorm", True, "shapes")


def _refuse_foreign_scale(b: _ArgsReader) -> None:
    """Refuse a factor of attention scores that the code which ran cannot have had."""
    scale = b.values["softmax_scale"]
    if scale is not None and b.code != "core" and "softmax_scale" not in b.overrides:
        raise InputError(
            f"{b.where} has args.softmax_scale = {scale!r}, which Megatron's legacy code does not "
            f"have; say what its code did: --set softmax_scale={scale!r}, or the usual "
            f"--set softmax_scale={b.values['kv_channels'] ** -0.5:g}"
        )


def _activation(b: _ArgsReader, shapes: Shapes) -> None:
    args = b.args
    fc1 = _layer_shape(shapes, ".mlp.linear_fc1.weight")
    fc2 = _layer_shape(shapes, ".mlp.linear_fc2.weight")
    dense = fc1 is not None and fc2 is not None
    if not dense:
        fc1 = _layer_shape(shapes, ".mlp.experts.linear_fc1.weight")
        fc2 = _layer_shape(shapes, ".mlp.experts.linear_fc2.weight")
    if b.layers_differ and fc1 is None and fc2 is None:
        b.set("ffn_hidden_size", args.get("ffn_hidden_size") or b.values["hidden_size"], "no MLP")
        b.set("activation", *_activation_from_args(b))
        return
    if fc1 is None or fc2 is None:
        raise InputError(f"{b.where} holds layers without an MLP; it is not a whole model")
    ffn = fc2[-1]
    if dense and b.layers_differ:
        of_layers = branches.by_layer(shapes, ".mlp.linear_fc2.weight")
        widths = {n: shape[1] for n, shape in of_layers.items()}
        branches.read_widths(b, "layer_ffn_hidden_sizes", widths)
    else:
        b.set("ffn_hidden_size", ffn, "shapes" if dense else "the experts' width")
    gated = fc1[-2] == 2 * ffn
    if not args:
        guess = "swiglu" if gated else "gelu" if b.values["family"] == "bert" else "gelu_tanh"
        b.set("activation", guess, "assumed: the file holds no args")
        if b.sources["activation"] != "--set":
            b.warnings.append(
                f"the file holds no args: activation {guess} assumed; correct it with --set "
                "activation=gelu or gelu_tanh"
            )
    else:
        b.set("activation", *_activation_from_args(b))
    if (b.values["activation"] in GATED_ACTIVATIONS) != gated:
        raise InputError(
            f"{b.where}: activation {b.values['activation']} does not fit an MLP whose two weights "
            f"are {fc1[-2]} and {ffn} wide; correct it with --set activation=..."
        )
    if gated:
        for name in ("activation_func_clamp_value", "glu_linear_offset"):
            value = args.get(name)
            if value is not None and _acts_unfused(b, name, float(value)):
                b.set(name, float(value), f"args.{name}")
    # GPT has no such head: left at its default, so that equal models have equal configs.
    openai = bool(args.get("openai_gelu")) and b.code != "core" and b.values["family"] == "bert"
    b.set("head_activation", "gelu_tanh" if openai else "gelu", "Megatron's LM head")


def _acts_unfused(b: _ArgsReader, name: str, value: float) -> bool:
    """Return whether a clamp or an offset acted: the fused SwiGLU kernel takes neither."""
    fused = next(
        (key for key in ("bias_swiglu_fusion", "bias_activation_fusion") if b.args.get(key)), None
    )
    if b.values["activation"] != "swiglu" or fused is None or not value or name in b.overrides:
        return True
    b.warnings.append(
        f"args.{name} is {value:g}, which the fused kernel of args.{fused} ignores, so it is not "
        f"applied; if this run's code did apply it, use --set {name}={value:g}"
    )
    return False


# The words of --yaml-cfg, and what its code made of them.
# No run of Megatron-LM has `relu`: files that are written here have it.
_YAML_ACTIVATIONS = {
    "gelu": "gelu",
    "relu": "relu",
    "squaredrelu": "squared_relu",
    "swiglu": "swiglu",
}


def _activation_from_args(b: _ArgsReader) -> tuple[str, str]:
    """Return the activation that ran, and which field says so.

    Source: docs/megatron.md, "GELU", which has the legacy code's precedence too.

    Raises:
        InputError: It is none of ours.
    """
    args = b.args
    if args.get(RAN) is not None:
        return str(args[RAN]), f"args.{RAN}"
    if b.code == "legacy with TransformerEngine":
        # Its layer takes no other word than gelu, the tanh form, and swiglu.
        if args.get("swiglu"):
            return "swiglu", "args.swiglu"
        return "gelu_tanh", "TransformerEngine's GELU"
    if b.code == "legacy":
        if args.get("openai_gelu"):
            return "gelu_tanh", "args.openai_gelu"
        if args.get("onnx_safe"):
            return "gelu", "args.onnx_safe"
    on = [name for name in ("swiglu", "squared_relu", "quick_geglu") if args.get(name)]
    contradictory = on[:1] == ["swiglu"] and len(on) > 1 and b.code == "core"
    if contradictory and "activation" not in b.overrides:
        raise InputError(
            f"{b.where} has {' and '.join(f'args.{name} = {args[name]}' for name in on)}, which "
            f"Megatron refuses together; choose with --set activation={on[0]} or {on[1]}"
        )
    if on:
        return on[0], f"args.{on[0]}"
    if args.get(GATED_GELU) in ("geglu", "geglu_tanh"):
        return args[GATED_GELU], f"args.{GATED_GELU}"
    activation, source = _ungated_from_args(b)
    if args.get("gated_linear_unit") and activation != "swiglu" and "activation" not in b.overrides:
        raise InputError(
            f"{b.where} was trained with a gate (args.gated_linear_unit) beside another activation "
            "than silu, which mlm-eval does not compute; if it is silu, use --set activation=swiglu"
        )
    if activation == "gelu" and args.get("transformer_impl") != "local":
        for name in ("use_te_activation_func", "use_transformer_engine_op_fuser"):
            if args.get(name):
                return "gelu_tanh", f"args.{name}"
    return activation, source


def _ungated_from_args(b: _ArgsReader) -> tuple[str, str]:
    word = b.args.get("activation_func")
    if word is not None:
        known = isinstance(word, str) and word in _YAML_ACTIVATIONS
        if not known and "activation" not in b.overrides:
            raise InputError(
                f"{b.where} was trained with the activation args.activation_func = {word!r}, which "
                "mlm-eval does not know; if it is one of gelu, gelu_tanh, swiglu and squared_relu, "
                "use --set activation="
            )
        return _YAML_ACTIVATIONS[word] if known else "gelu", "args.activation_func"
    for name in ("bias_gelu_fusion", "bias_activation_fusion"):
        if b.args.get(name) is not None:
            # The fused kernel is the tanh form; it needs a bias to fuse.
            fused = bool(b.args[name]) and b.values["add_bias_linear"]
            if fused and name == "bias_activation_fusion" and b.args.get("yaml_cfg"):
                return "gelu", "args.yaml_cfg"
            return ("gelu_tanh" if fused else "gelu"), f"args.{name}"
    return "gelu", "Megatron's default"


def _tying_and_heads(b: _ArgsReader, shapes: Shapes) -> None:
    untied = b.args.get("untie_embeddings_and_output_weights")
    source = "shapes" if untied is None else "args.untie_embeddings_and_output_weights"
    untied = "output_layer.weight" in shapes if untied is None else untied
    b.set("untie_embeddings_and_output_weights", untied, source)
    bert = b.values["family"] == "bert"
    for name, table in (
        ("num_tokentypes", "embedding.tokentype_embeddings.weight"),
        ("num_classes", "classification_head.weight"),
    ):
        b.set(name, shapes[table][0] if table in shapes else 0, "shapes")
    b.set("lm_head", not bert or "lm_head.dense.weight" in shapes, "shapes")
    b.set("pooler", "pooler.dense.weight" in shapes, "shapes")
    for name in ("binary_head", "multichoice_head", "qa_head"):
        b.set(name, f"{name}.weight" in shapes, "shapes")


def rank_args(checkpoint: Checkpoint, layout: SaveLayout, column: int, pp_rank: int) -> Namespace:
    """Return the `args` of one rank's file.

    Args:
        checkpoint: What is written, with the rows that are stored.
        layout: Its sizes.
        column: The file's number within its pipeline stage; see `ExpertLayout.folders`.
        pp_rank: The stage.

    Raises:
        InputError: Args cannot say what the model computes.
    """
    c = checkpoint.config
    saved = checkpoint.provenance.args
    values = {name: value for name, value in saved.items() if _is_carried(name, value)}
    values |= _args_of_settings(c, layout.names == "core", values.get("seq_length"))
    if c.num_experts and values.get("moe_router_load_balancing_type") in (None, "sinkhorn"):
        values["moe_router_load_balancing_type"] = "none"  # what sinkhorn evaluates is written out
    if checkpoint.prediction_heads:
        values["mtp_num_layers"] = num_prediction_heads(checkpoint.prediction_heads)
    values |= _args_of_layout(c, layout, column, pp_rank)
    if layout.names == "core":
        check_args(c, values, where=str(checkpoint.provenance.path))
    return Namespace(**dict(sorted(values.items())))  # sorted: equal args are equal bytes


def check_args(
    c: ModelConfig, values: Mapping[str, Any] | None = None, *, where: str = "the model"
) -> None:
    """Refuse args from which another model would be read than the one that is written.

    Args:
        c: The model, under megatron-core's names.
        values: The args; None: those of its settings.
        where: The checkpoint, for messages.

    Raises:
        InputError: A setting is lost.
    """
    values = _args_of_settings(c, True, None) if values is None else values
    read = build_config(
        {name: parameter.shape for name, parameter in parameters(c).items()},
        values,
        family=c.family,
        code="core",
        overrides={},
        where=where,
        params_dtype=c.params_dtype,
    ).config
    unused = [] if c.dense_layers else ["ffn_hidden_size"]
    unused += [] if c.rotary else ROTARY_SETTINGS
    lost = [
        f.name
        for f in dataclasses.fields(ModelConfig)
        if f.name not in unused and not _is_alike(getattr(read, f.name), getattr(c, f.name))
    ]
    if lost:
        raise InputError(
            f"{where} has {lost[0]} = {getattr(c, lost[0])!r}, which Megatron's args cannot say, "
            "so no file of Megatron's can hold this model; keep the format it has"
        )


def _is_alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _is_carried(name: str, value: Any) -> bool:
    """Whether a saved arg may go into another file: numbers, switches, a few known words."""
    if name in _NOT_CARRIED:
        return False
    if isinstance(value, str):
        return name in _CARRIED_WORDS
    return value is None or type(value) in (bool, int, float)


def _args_of_settings(c: ModelConfig, core: bool, run_length: int | None) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(c, name) for name in _FROM_SHAPES}
    for setting in _SETTINGS:
        values |= dict.fromkeys(_RENAMED.get(setting, (setting,)), getattr(c, setting))
    both_positions = c.position_embedding_type == "learned_absolute+rope"
    openai = not core and needs_openai_gelu(c)
    length = run_length or c.max_position_embeddings
    grouped = c.num_query_groups != c.num_attention_heads
    values |= {
        "encoder_num_layers": c.num_layers,
        "decoder_num_layers": None,
        "group_query_attention": grouped,
        # Megatron's default, which then says nothing.
        "num_query_groups": c.num_query_groups if grouped else 1,
        "seq_length": length,
        "encoder_seq_length": length,
        "decoder_seq_length": None,
        "rotary_base": int(c.rotary_base) if float(c.rotary_base).is_integer() else c.rotary_base,
        # Spring 2023: two switches and no type.
        "position_embedding_type": None if both_positions else c.position_embedding_type,
        "use_rotary_position_embeddings": both_positions,
        # Megatron's default, and left on in rotary models too.
        "add_position_embedding": True,
        "use_rope_scaling": c.rope_scaling is not None,
        # A numerical device of the run, not a part of the model (docs/megatron.md, "Attention").
        "apply_query_key_layer_scaling": False,
        "swiglu": c.activation == "swiglu",
        "quick_geglu": c.activation == "quick_geglu",
        "squared_relu": c.activation == "squared_relu",
        "openai_gelu": openai,
        "onnx_safe": None,
        "bias_gelu_fusion": c.activation in ("gelu_tanh", "geglu_tanh") and not openai,
    }
    if c.family == "t5":
        values |= {"num_layers": c.decoder_num_layers, "decoder_seq_length": length}
    if c.activation == "relu":
        values["activation_func"] = "relu"
    # No argument of Megatron-LM: absent in files of ordinary models. Latent attention has its own.
    if c.softmax_scale is None or c.multi_latent_attention:
        del values["softmax_scale"]
    values |= family_args.args_of_family(c)
    if c.rope_scaling is not None:
        values["rope_scaling_factor"] = c.rope_scaling.factor
    if c.activation in ("geglu", "geglu_tanh"):
        values["gated_linear_unit"] = True
    if c.activation_func_clamp_value is not None or c.glu_linear_offset:
        values["bias_swiglu_fusion"] = False  # the fused kernel knows neither
    if core and (unheard := _unheard(c)):
        values[PASSED_ON] = sorted(unheard)
    if c.num_classes:
        values["num_classes"] = c.num_classes
    if c.family == "bert":
        values["bert_binary_head"] = c.binary_head
    return values


def _unheard(c: ModelConfig) -> dict[str, Any]:
    """Return the args that megatron-core's model needs and Megatron-LM does not pass on to it."""
    found: dict[str, Any] = {}
    if c.rotary_seq_len_interpolation_factor is not None:
        found["rotary_seq_len_interpolation_factor"] = c.rotary_seq_len_interpolation_factor
    if c.rope_scaling is not None and c.rope_scaling.factor != RopeScaling().factor:
        found["rope_scaling_factor"] = c.rope_scaling.factor
    if c.qk_l2_norm and not c.num_experts:
        found["qk_l2_norm"] = True
    if c.family == "t5" and c.rotary_base != 10000.0:
        found["rotary_base"] = c.rotary_base
    if c.family == "t5" and c.rope_scaling is not None:
        found["use_rope_scaling"] = True
    return found


def unheard_warnings(config: ModelConfig) -> list[str]:
    """Return what to tell whoever opens a megatron-core checkpoint of this model with Megatron."""
    warnings = [
        f"args.{name} is {value:g}, which Megatron-LM does not pass on to its model (up to "
        f"{ARG_FIELDS[name].until}): build the model with it by hand there; mlm-eval applies it"
        for name, value in _unheard(config).items()
        if ARG_FIELDS[name].until
    ]
    if config.qk_l2_norm and not config.num_experts:
        warnings.append(
            "args.qk_l2_norm is on, which Megatron-LM's local layers of a dense model leave out: "
            "build the model with it by hand there; mlm-eval applies it"
        )
    if config.activation in ("geglu", "geglu_tanh"):
        warnings.append(
            "the gate beside a GELU stands in args.gated_linear_unit, for which Megatron-LM has no "
            "option: it heeds the gate where it takes its args from the checkpoint's Namespace "
            "only; mlm-eval applies it"
        )
    if config.relative_positions:
        warnings.append(
            "Megatron-LM has the biases of relative positions in TransformerEngine's layers only "
            "(--transformer-impl transformer_engine)"
        )
    if config.softmax_scale is not None and config.family == "t5":
        warnings.append(
            f"args.softmax_scale is {config.softmax_scale:g}, for which pretrain_t5.py has no "
            "option: build the model with it by hand there; mlm-eval applies it"
        )
    by_hand = {
        "the ReLU": config.activation == "relu",
        "YaRN": config.yarn is not None and not config.multi_latent_attention,
        "capped attention scores or logits": config.attn_logit_softcapping is not None
        or config.final_logit_softcapping is not None,
        "a rotary base of windowed layers": config.rotary_base_local is not None,
        "norms of branches": config.branch_layernorm,
        "L2 norms of queries and keys in some layers only": bool(config.no_l2_norm_layers),
        "a lower bound of Mamba's time steps": bool(config.mamba_min_time_step),
        "an epsilon of its own of Mamba's gated norm": config.mamba_norm_epsilon is not None,
        "scaled embeddings or logits": (config.embedding_multiplier, config.logit_multiplier)
        != (1.0, 1.0),
    }
    warnings += [
        f"the model has {what}, for which Megatron-LM has no option (up to core 0.17): the args "
        "say it, but build the model with it by hand there; mlm-eval applies it"
        for what, there in by_hand.items()
        if there
    ]
    if config.num_experts and config.add_bias_linear and not config.moe_router_bias:
        warnings.append(
            "the routers have no bias beside linear layers that do, as up to core 0.14: newer "
            "versions of Megatron-LM miss it when they load the files"
        )
    return warnings


def _args_of_layout(
    c: ModelConfig, layout: SaveLayout, column: int, pp_rank: int
) -> dict[str, Any]:
    core, experts = layout.names == "core", layout.experts
    of_experts = {"expert_tensor_parallel_size": experts.etp} if c.num_experts else {}
    return of_experts | {
        "padded_vocab_size": layout.vocab_size,
        "make_vocab_size_divisible_by": layout.divisible_by,
        "params_dtype": layout.params_dtype,
        "fp16": dtype_name(layout.params_dtype) == "float16",
        "bf16": dtype_name(layout.params_dtype) == "bfloat16",
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "transformer_pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": experts.ep,
        "sequence_parallel": False,
        "data_parallel_size": experts.ranks // experts.tp,
        "world_size": experts.ranks * layout.pp,
        # Tensor-parallel ranks count fastest. It tells when folders were swapped.
        "rank": pp_rank * experts.ranks + column,
        "transformer_impl": "local",
        "use_mcore_models": core,
        "use_legacy_models": not core,
        "ckpt_format": "torch",
        "iteration": layout.iteration or 0,
        # These files hold weights only.
        "no_save_optim": True,
        "no_save_rng": True,
        "use_distributed_optimizer": False,
    }
