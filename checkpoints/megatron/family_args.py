"""Settings of megatron-core's newer layers: experts, latent attention, windows, sinks, YaRN.

They are read for megatron-core models only: legacy layers have none of them. Where layers differ,
args hold a number ("every k-th") or a list with one entry a layer; a config holds layer numbers.
Source: docs/megatron.md, "Mixtures of experts", "Multi-latent attention", "Dense variants".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlm_eval.checkpoints.config import (
    ConfigBuilder,
    ModelConfig,
    YarnScaling,
    mscale_of,
    yarn_mscale,
)
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.megatron.layers.branches import JSON_PATH, PATTERNS, args_of_branches
from mlm_eval.checkpoints.projects.settings import GATED_GELU, PASSED_ON

Shapes = Mapping[str, tuple[int, ...]]
"""Canonical name -> full shape."""

_CORE_014 = (
    "save_retain_interval",
    "cache_mla_latents",
    "full_validation",
    "moe_router_fusion",
    "use_megatron_fsdp",
)
"""Args that Megatron-LM got in the weeks after its latent attention changed YaRN (July 2025)."""

_CORE_013 = ("encoder_tensor_model_parallel_size", "encoder_pipeline_model_parallel_size")
"""Args that it lost in those weeks."""

MLA_YARN = ("core-0.13", "core-0.14")
"""What `--set mla_yarn` takes: up to the first, and from the second on."""


_CORE_ONLY: dict[str, tuple[Any, ...]] = {
    "window_size": (-1, [-1, 0]),
    "softmax_type": ("vanilla",),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "no_rope_freq": (0,),
    "quick_geglu": (False,),
    "activation_func_clamp_value": (),
    "glu_linear_offset": (0,),
    "multi_latent_attention": (False,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "query_pre_attn_scalar": (),
    "use_mup": (False,),
    "embedding_multiplier": (1,),
    "logit_multiplier": (1,),
    "rotary_base_local": (),
    "is_hybrid_model": (False,),
    **dict.fromkeys((*PATTERNS, JSON_PATH), ("",)),
}
"""What legacy layers do not have -> values that ask for none of it."""


def is_passed_on(args: Mapping[str, Any], name: str) -> bool:
    """Return whether a file says that the code which ran passed an arg on to its model."""
    listed = args.get(PASSED_ON)
    return isinstance(listed, list) and name in listed


def refuse_in_legacy(args: Mapping[str, Any], where: str) -> None:
    """Refuse settings that Megatron's legacy layers do not have: a fork's code heeded them.

    Raises:
        InputError: Args hold one.
    """
    for name, harmless in _CORE_ONLY.items():
        value = args.get(name)
        if value is not None and not any(value == one for one in harmless):
            raise InputError(
                f"{where} was trained with args.{name} = {value!r}, which Megatron's legacy layers "
                "do not have; mlm-eval reads it with megatron-core's parameter names only"
            )
    _refuse_lost_experts(args, where)


def _refuse_lost_experts(args: Mapping[str, Any], where: str) -> None:
    """Refuse args of a mixture of experts where no layer has a router.

    One expert is an ordinary MLP; the default of Megatron-DeepSpeed is the list [1].
    """
    for name in ("num_experts", "num_moe_experts"):
        saved = args.get(name)
        counts = saved if isinstance(saved, list) else [saved]
        if any(count not in (None, 0, 1) for count in counts):
            raise InputError(
                f"{where} was trained with a mixture of experts (args.{name} = {saved!r}), but no "
                "layer has a router of megatron-core's; copy all files of one save"
            )


def read_layer_patterns(b: ConfigBuilder, args: Mapping[str, Any]) -> None:
    """Take which layers have a window, and which have no rotary positions.

    Raises:
        InputError: A pattern or a window is none that Megatron takes.
    """
    layers = b.values["num_layers"]
    window = args.get("window_size")
    if window not in (None, -1) and list(_pair(b, window)) != [-1, 0]:
        before, after = _pair(b, window)
        if before < 1 or after != 0:
            raise InputError(
                f"{b.where} has args.window_size = {window!r}; mlm-eval computes windows of keys "
                "before a query, [w, 0], only"
            )
        if b.values["family"] != "gpt":
            # megatron-core puts a causal window in the place of the padding mask.
            raise InputError(
                f"{b.where} has args.window_size = {window!r}, but is no GPT model, the only one "
                "whose windows mlm-eval computes"
            )
        skip = args.get("window_attn_skip_freq")
        windows = [True] * layers
        if isinstance(skip, int) and skip:
            windows = [(number + 1) % skip != 0 for number in range(layers)]
        elif skip:
            windows = _flags(b, "window_attn_skip_freq", skip)
        b.set("window_size", before, "args.window_size")
        source = "args.window_attn_skip_freq" if skip else "args.window_size"
        b.set("window_layers", _numbers(windows), source)
        if not any(windows):
            b.set("window_size", 0, source)
    freq = args.get("no_rope_freq")
    if freq:
        if isinstance(freq, int):
            without = [(number + 1) % freq == 0 for number in range(layers)]
        else:
            without = _flags(b, "no_rope_freq", freq)
        b.set("no_rope_layers", _numbers(without), "args.no_rope_freq")


def _pair(b: ConfigBuilder, window: Any) -> tuple[int, int]:
    if isinstance(window, list | tuple) and len(window) == 2:
        before, after = window
        if type(before) is int and type(after) is int:
            return before, after
    raise InputError(f"{b.where} has args.window_size = {window!r}, expected two numbers")


def _flags(b: ConfigBuilder, name: str, pattern: Any) -> list[bool]:
    layers = b.values["num_layers"]
    if not isinstance(pattern, list | tuple) or len(pattern) != layers:
        raise InputError(
            f"{b.where} has args.{name} = {pattern!r}; expected a number, or a list with 0 or 1 "
            f"for each of {layers} layers"
        )
    return [bool(flag) for flag in pattern]


def _numbers(flags: list[bool]) -> tuple[int, ...]:
    return tuple(number for number, flag in enumerate(flags) if flag)


def read_attention(b: ConfigBuilder, args: Mapping[str, Any], shapes: Shapes) -> None:
    """Take sinks, gates and the L2 norm of queries and keys.

    Raises:
        InputError: The tensors do not bear out what args say.
    """
    kind = str(args.get("softmax_type") or "vanilla")
    learned = any(name.endswith("core_attention.softmax_offset") for name in shapes)
    b.set("softmax_type", kind, _source(args, "softmax_type"))
    if learned != (b.values["softmax_type"] == "learnable"):
        raise InputError(
            f"{b.where}: softmax_type is {b.values['softmax_type']}, but the layers hold "
            f"{'a' if learned else 'no'} softmax_offset; correct it with --set softmax_type=..."
        )
    gate = bool(args.get("attention_output_gate"))
    b.set("attention_output_gate", gate, _source(args, "attention_output_gate"))


def read_scaling(b: ConfigBuilder, args: Mapping[str, Any], shapes: Shapes) -> None:
    """Take what is scaled or capped, and norms of branches: Gemma, and maximal-update scaling.

    Source: docs/megatron.md, "Dense variants".

    Raises:
        InputError: A setting is no number.
    """
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        b.set(name, _positive(b, args, name), _source(args, name))
    normed = any(name.endswith(".linear_proj.post_layernorm.weight") for name in shapes)
    b.set("branch_layernorm", normed, "shapes")
    for name in ("embedding_multiplier", "logit_multiplier"):
        b.set(name, _positive(b, args, name) or 1.0, _source(args, name))
    if args.get("use_mup"):
        _read_mup(b, args)
    scalar = _positive(b, args, "query_pre_attn_scalar")
    if scalar is not None:
        b.set("softmax_scale", scalar**-0.5, "args.query_pre_attn_scalar")
    local = _positive(b, args, "rotary_base_local")
    windowed = bool(b.values.get("window_layers")) and "rope" in b.values["position_embedding_type"]
    b.set("rotary_base_local", local if windowed else None, _source(args, "rotary_base_local"))


def _read_mup(b: ConfigBuilder, args: Mapping[str, Any]) -> None:
    """Take maximal-update scaling, as megatron-core's config completes it (core 0.19)."""
    width = b.values["hidden_size"] / (
        _positive(b, args, "mup_base_hidden_size") or b.values["hidden_size"]
    )
    logits = _positive(b, args, "mup_output_mult") or 1.0
    b.set("embedding_multiplier", _positive(b, args, "mup_embedding_mult") or 1.0, "args.use_mup")
    b.set("logit_multiplier", 1.0 / width if logits == 1.0 else logits, "args.use_mup")
    if args.get("softmax_scale") is None:
        base = _positive(b, args, "mup_base_head_dim") or 1.0
        power = _given(args, "mup_attn_scale_power", 1.0)
        if type(power) not in (int, float) or not 0 <= power <= 8:
            raise InputError(
                f"{b.where} has args.mup_attn_scale_power = {power!r}, expected a number, 0 to 8"
            )
        b.set("softmax_scale", base**0.5 / b.values["kv_channels"] ** power, "args.use_mup")


def _positive(b: ConfigBuilder, args: Mapping[str, Any], name: str) -> float | None:
    """Return a number of args; None where there is none, or 0."""
    value = args.get(name)
    if value is not None and (type(value) not in (int, float) or not 0 <= value < math.inf):
        raise InputError(f"{b.where} has args.{name} = {value!r}, expected a number from 0 up")
    return float(value) if value else None


def read_l2_norm(b: ConfigBuilder, args: Mapping[str, Any]) -> None:
    """Take the L2 norm of queries and keys, which a dense model's local layers leave out.

    Source: docs/megatron.md, "Dense variants".
    """
    asked = bool(args.get("qk_l2_norm"))
    fused = args.get("transformer_impl") not in (None, "local")
    acts = asked and (bool(b.values.get("num_experts")) or fused)
    acts = acts or is_passed_on(args, "qk_l2_norm")
    if asked and not acts and "qk_l2_norm" not in b.overrides:
        b.warnings.append(
            "args.qk_l2_norm is on, but the local layers of a dense model do not heed it, so it is "
            "not applied; if this run's code did apply it, use --set qk_l2_norm=true"
        )
    b.set("qk_l2_norm", acts, _source(args, "qk_l2_norm"))
    left_out = args.get("no_l2_norm_layers")
    if acts and isinstance(left_out, list | tuple):
        if any(type(number) is not int for number in left_out):
            raise InputError(
                f"{b.where} has args.no_l2_norm_layers = {left_out!r}, expected numbers of layers"
            )
        b.set("no_l2_norm_layers", tuple(left_out), "args.no_l2_norm_layers")


def read_yarn(b: ConfigBuilder, args: Mapping[str, Any]) -> None:
    """Take YaRN of plain attention (`position_embedding_type` yarn), which becomes rotary.

    Raises:
        InputError: Args lack its factor or its original length.
    """
    factor = args.get("yarn_rotary_scaling_factor")
    length = args.get("yarn_original_max_position_embeddings")
    if not factor or not length:
        raise InputError(
            f"{b.where} uses yarn position embeddings, but its args lack "
            "yarn_rotary_scaling_factor or yarn_original_max_position_embeddings"
        )
    rounded = args.get("yarn_correction_range_round_to_int")
    yarn = YarnScaling(
        factor=float(factor),
        original_max_position=int(length),
        beta_fast=float(_given(args, "yarn_beta_fast", 32.0)),
        beta_slow=float(_given(args, "yarn_beta_slow", 1.0)),
        mscale=_optional(args.get("yarn_mscale")),
        mscale_all_dim=_optional(args.get("yarn_mscale_all_dim")),
        round_range=True if rounded is None else bool(rounded),
    )
    b.set("yarn", yarn, "args.yarn_rotary_scaling_factor")


def _source(args: Mapping[str, Any], name: str) -> str:
    return "Megatron's default" if args.get(name) is None else f"args.{name}"


def _given(args: Mapping[str, Any], name: str, default: Any) -> Any:
    value = args.get(name)
    return default if value is None else value


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


# ---- experts -------------------------------------------------------------------------------------


def read_experts(b: ConfigBuilder, args: Mapping[str, Any], shapes: Shapes) -> None:
    """Take the settings of a mixture of experts; sizes, and which layers, from the shapes.

    Raises:
        InputError: Args contradict the shapes, or say what is not computed here.
    """
    routers = _by_layer(shapes, ".mlp.router.weight")
    if not routers:
        _refuse_lost_experts(args, b.where)
        return
    count = next(iter(routers.values()))[0]
    saved = args.get("num_experts", args.get("num_moe_experts"))
    if saved not in (None, count) and "num_experts" not in b.overrides:
        raise InputError(
            f"{b.where} has routers of {count} experts where its args say {saved}; ranks of two "
            "checkpoints may be mixed: copy all ranks of one save"
        )
    if args.get("moe_router_force_load_balancing"):
        raise InputError(
            f"{b.where} was trained with args.moe_router_force_load_balancing = True: random "
            "experts for each token, a benchmark of speed; there is no function to evaluate"
        )
    if args.get("moe_input_jitter_eps") is not None:
        b.warnings.append(
            f"args.moe_input_jitter_eps is {args['moe_input_jitter_eps']}, noise on the routers' "
            "input, which Megatron adds in evaluation too; mlm-eval computes without it"
        )
    b.set("num_experts", count, "shapes")
    b.set("moe_layers", tuple(sorted(routers)), "shapes")
    _check_layer_freq(b, args)
    for name in (".mlp.experts.linear_fc1.weight", ".mlp.experts.linear_fc2.weight"):
        held = _by_layer(shapes, name)
        lost = [layer for layer in routers if held.get(layer, (0,))[0] != count]
        if lost:
            raise InputError(
                f"{b.where} has a router of {count} experts in layer {lost[0]}, and "
                f"{held.get(lost[0], (0,))[0]} experts; copy all files of one save"
            )
    width = next(iter(_by_layer(shapes, ".mlp.experts.linear_fc2.weight").values()))[2]
    b.set("moe_ffn_hidden_size", width, "shapes")
    shared = _by_layer(shapes, ".mlp.shared_experts.linear_fc2.weight")
    width = next(iter(shared.values()))[1] if shared else 0
    b.set("moe_shared_expert_intermediate_size", width, "shapes")
    gate = bool(_by_layer(shapes, ".mlp.shared_experts.gate_weight"))
    b.set("moe_shared_expert_gate", gate, "shapes")
    b.set("moe_router_bias", bool(_by_layer(shapes, ".mlp.router.bias")), "shapes")
    _read_routing(b, args, shapes)


def _check_layer_freq(b: ConfigBuilder, args: Mapping[str, Any]) -> None:
    """Refuse layers with experts that are not those of `moe_layer_freq`."""
    freq = args.get("moe_layer_freq")
    if freq is None or b.values.get("no_mlp_layers"):  # a hybrid's pattern says it
        return
    layers = b.values["num_layers"]
    if isinstance(freq, int):
        expected = tuple(range(0, layers, max(freq, 1)))
    else:
        expected = _numbers(_flags(b, "moe_layer_freq", freq))
    if b.values["moe_layers"] != expected:
        raise InputError(
            f"{b.where} has experts in the layers {_listed(b.values['moe_layers'])} where "
            f"args.moe_layer_freq = {freq} says {_listed(expected)}; two checkpoints may be mixed: "
            "copy all ranks of one save"
        )


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _read_routing(b: ConfigBuilder, args: Mapping[str, Any], shapes: Shapes) -> None:
    if args.get("moe_router_topk") is None and "moe_router_topk" not in b.overrides:
        raise InputError(
            f"{b.where} does not say how many experts a token is sent to; give --set "
            "moe_router_topk=N, and moe_router_score_function, moe_router_pre_softmax and "
            "moe_router_topk_scaling_factor where they are not softmax, false and 1"
        )
    if args.get("moe_expert_capacity_factor") is not None:
        raise InputError(
            f"{b.where} was trained with args.moe_expert_capacity_factor = "
            f"{args['moe_expert_capacity_factor']!r}: experts drop the tokens beyond it, which "
            "mlm-eval does not compute"
        )
    topk = args.get("moe_router_topk")
    b.set("moe_router_topk", topk, "args.moe_router_topk")
    score = str(args.get("moe_router_score_function") or "softmax")
    pre_softmax = bool(args.get("moe_router_pre_softmax"))
    if args.get("moe_router_load_balancing_type") in ("sinkhorn", ["sinkhorn"]):
        # Its evaluation takes these, whatever else args say (megatron/core/transformer/moe/router).
        score, pre_softmax = ("sigmoid", False) if topk == 1 else ("softmax", True)
    b.set("moe_router_score_function", score, _source(args, "moe_router_score_function"))
    b.set("moe_router_pre_softmax", pre_softmax, _source(args, "moe_router_pre_softmax"))
    groups, kept = args.get("moe_router_num_groups"), args.get("moe_router_group_topk")
    if kept:
        b.set("moe_router_num_groups", groups or 0, "args.moe_router_num_groups")
        b.set("moe_router_group_topk", kept, "args.moe_router_group_topk")
    factor = args.get("moe_router_topk_scaling_factor")
    if factor:
        b.set(
            "moe_router_topk_scaling_factor", float(factor), "args.moe_router_topk_scaling_factor"
        )
    biased = bool(_by_layer(shapes, ".mlp.router.expert_bias"))
    b.set("moe_router_enable_expert_bias", biased, "shapes")
    on_input = bool(args.get("moe_apply_probs_on_input"))
    b.set("moe_apply_probs_on_input", on_input, _source(args, "moe_apply_probs_on_input"))


def _by_layer(shapes: Shapes, suffix: str) -> dict[int, tuple[int, ...]]:
    """Return the shapes of a part of the layers, by layer number."""
    return {
        int(name.split(".layers.")[1].split(".")[0]): shape
        for name, shape in shapes.items()
        if name.endswith(suffix) and ".layers." in name
    }


# ---- latent attention ----------------------------------------------------------------------------


def is_latent(shapes: Shapes) -> bool:
    """Return whether the layers have multi-latent attention."""
    return any(name.endswith(".linear_kv_up_proj.weight") for name in shapes)


def read_latents(b: ConfigBuilder, args: Mapping[str, Any], shapes: Shapes) -> None:
    """Take the sizes of multi-latent attention, its YaRN and the factor of its scores.

    Raises:
        InputError: Args lack a size, contradict the shapes, or do not tell which YaRN ran.
    """
    heads = args.get("num_attention_heads")
    if heads is None and "num_attention_heads" not in b.overrides:
        raise InputError(
            f"{b.where} does not say how many attention heads it has; give --set "
            "num_attention_heads=N"
        )
    heads = b.set("num_attention_heads", heads, "args.num_attention_heads")
    b.set("multi_latent_attention", True, "shapes")
    up = _first(b, shapes, ".linear_kv_up_proj.weight")
    down = _first(b, shapes, ".linear_kv_down_proj.weight")
    proj = _first(b, shapes, ".self_attention.linear_proj.weight")
    values, latent, turned = proj[1] // heads, up[1], down[0] - up[1]
    plain = up[0] // heads - values
    queries = _first(b, shapes, ".linear_q_proj.weight", ".linear_q_up_proj.weight")
    narrow = any(name.endswith(".linear_q_up_proj.weight") for name in shapes)
    b.set("q_lora_rank", queries[1] if narrow else 0, "shapes")
    b.set("kv_lora_rank", latent, "shapes")
    b.set("qk_pos_emb_head_dim", turned, "shapes")
    b.set("qk_head_dim", plain, "shapes")
    b.set("v_head_dim", values, "shapes")
    b.set("kv_channels", values, "shapes")
    b.set("num_query_groups", heads, "shapes")
    fits = proj[1] == heads * values and up[0] == heads * (plain + values)
    if not fits or min(plain, turned, values) < 1 or queries[0] != heads * (plain + turned):
        raise InputError(
            f"{b.where}: the latent attention's weights do not fit {heads} heads; correct it with "
            "--set num_attention_heads=N"
        )
    for name in ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
        if args.get(name) not in (None, b.values[name]) and name not in b.overrides:
            raise InputError(
                f"{b.where} has weights of {name} {b.values[name]} where its args say "
                f"{args[name]}; ranks of two checkpoints may be mixed: copy all ranks of one save"
            )


def _first(b: ConfigBuilder, shapes: Shapes, *suffixes: str) -> tuple[int, ...]:
    for name, shape in shapes.items():
        if name.endswith(suffixes):
            return shape
    raise InputError(f"{b.where} lacks {suffixes[-1].strip('.')} of its latent attention")


def read_latent_positions(b: ConfigBuilder, args: Mapping[str, Any], era: str | None) -> None:
    """Take how latent attention rotates: plainly, or by YaRN.

    YaRN's meaning changed between core 0.13 and 0.14: before, the scores' factor follows from
    `mscale` and the original length is `max_position_embeddings`; later they are `mscale_all_dim`
    and 4096. No field names the version, but args that came and went in those weeks date a file.
    Source: docs/megatron.md, "Multi-latent attention".

    Args:
        b: Takes the settings.
        args: Megatron's.
        era: `--set mla_yarn`, where it is given.

    Raises:
        InputError: YaRN acts, and nothing tells which.
    """
    b.set("position_embedding_type", "rope", "latent attention is always rotary")
    b.set("softmax_scale", None, "latent attention has its own")
    plain, turned = b.values["qk_head_dim"], b.values["qk_pos_emb_head_dim"]
    scale = (plain + turned) ** -0.5
    kind, factor = args.get("rope_type"), float(_given(args, "rotary_scaling_factor", 1.0))
    if era not in (None, *MLA_YARN):
        raise InputError(f"--set mla_yarn={era} is unknown; use {' or '.join(MLA_YARN)}")
    if kind not in (None, "yarn") or factor == 1.0:
        return
    new = (_yarn_era(b, args) if era is None else era) == MLA_YARN[1]
    mscale = float(_given(args, "mscale", 1.0))
    mscale_all_dim = float(_given(args, "mscale_all_dim", 0.0 if new else 1.0))
    length = b.values["max_position_embeddings"]
    if new:
        length = int(_given(args, "original_max_position_embeddings", 4096))
    if not new and mscale != mscale_all_dim:
        # The same factors of scores and of angles, in the newer terms.
        scores = yarn_mscale(factor, mscale)
        angles = scores / yarn_mscale(factor, mscale_all_dim)
        mscale, mscale_all_dim = mscale_of(factor, angles * scores), mscale
    yarn = YarnScaling(
        factor=factor,
        original_max_position=length,
        beta_fast=float(_given(args, "beta_fast", 32.0)),
        beta_slow=float(_given(args, "beta_slow", 1.0)),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )
    b.set("yarn", yarn, f"args.rotary_scaling_factor, as {MLA_YARN[new]} reads it")
    stretched = yarn_mscale(factor, mscale_all_dim)
    b.set("softmax_scale", scale * stretched**2, f"args.mscale, as {MLA_YARN[new]} reads it")


def _yarn_era(b: ConfigBuilder, args: Mapping[str, Any]) -> str:
    """Return which of `MLA_YARN` the other args date the file to."""
    newer = any(name in args for name in _CORE_014) or args.get("mscale_all_dim") == 0.0
    older = any(name in args for name in _CORE_013)
    if newer == older:
        raise InputError(
            f"{b.where} has latent attention with YaRN, whose meaning changed between core 0.13 "
            "and 0.14, and its args do not say which ran; give --set mla_yarn=core-0.13 or "
            "--set mla_yarn=core-0.14"
        )
    return MLA_YARN[newer]


# ---- writing -------------------------------------------------------------------------------------


def args_of_family(c: ModelConfig) -> dict[str, Any]:
    """Return the args of a model's newer layers; none that a plain model does not need."""
    args: dict[str, Any] = {}
    if c.window_layers:
        args["window_size"] = (c.window_size, 0)
        every = len(c.window_layers) == c.num_layers
        args["window_attn_skip_freq"] = None if every else _pattern(c, c.window_layers)
    if c.relative_positions:
        args["relative_attention_num_buckets"] = c.relative_attention_num_buckets
        args["relative_attention_max_distance"] = c.relative_attention_max_distance
    if c.no_rope_layers:
        args["no_rope_freq"] = _pattern(c, c.no_rope_layers)
    if c.softmax_type != "vanilla":
        args["softmax_type"] = c.softmax_type
    if c.attention_output_gate:
        args["attention_output_gate"] = True
    if c.qk_l2_norm:
        args["qk_l2_norm"] = True
    if c.no_l2_norm_layers:
        args["no_l2_norm_layers"] = list(c.no_l2_norm_layers)
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "rotary_base_local"):
        if getattr(c, name) is not None:
            args[name] = getattr(c, name)
    if (c.embedding_multiplier, c.logit_multiplier) != (1.0, 1.0):
        args |= {
            "use_mup": True,
            "mup_embedding_mult": c.embedding_multiplier,
            "mup_output_mult": c.logit_multiplier,
            "softmax_scale": c.kv_channels**-0.5 if c.softmax_scale is None else c.softmax_scale,
        }
    if c.activation in ("geglu", "geglu_tanh"):
        args[GATED_GELU] = c.activation
    if c.activation_func_clamp_value is not None:
        args["activation_func_clamp_value"] = c.activation_func_clamp_value
    if c.glu_linear_offset:
        args["glu_linear_offset"] = c.glu_linear_offset
    if c.num_experts:
        args |= _args_of_experts(c)
    args |= args_of_branches(c)
    if c.multi_latent_attention:
        args |= _args_of_latents(c)
    elif c.yarn is not None:
        args |= {
            "position_embedding_type": "yarn",
            "yarn_rotary_scaling_factor": c.yarn.factor,
            "yarn_original_max_position_embeddings": c.yarn.original_max_position,
            "yarn_beta_fast": c.yarn.beta_fast,
            "yarn_beta_slow": c.yarn.beta_slow,
            "yarn_mscale": c.yarn.mscale,
            "yarn_mscale_all_dim": c.yarn.mscale_all_dim,
            "yarn_correction_range_round_to_int": c.yarn.round_range,
        }
    return args


def _pattern(c: ModelConfig, layers: tuple[int, ...]) -> list[int]:
    return [int(number in layers) for number in range(c.num_layers)]


def _args_of_experts(c: ModelConfig) -> dict[str, Any]:
    every = len(c.moe_layers) == c.num_layers
    return {
        "num_experts": c.num_experts,
        "moe_layer_freq": 1 if every else _pattern(c, c.moe_layers),
        "moe_ffn_hidden_size": c.moe_ffn_hidden_size,
        "moe_router_topk": c.moe_router_topk,
        "moe_router_score_function": c.moe_router_score_function,
        "moe_router_pre_softmax": c.moe_router_pre_softmax,
        "moe_router_num_groups": c.moe_router_num_groups or None,
        "moe_router_group_topk": c.moe_router_group_topk or None,
        "moe_router_topk_scaling_factor": c.moe_router_topk_scaling_factor,
        "moe_router_enable_expert_bias": c.moe_router_enable_expert_bias,
        "moe_apply_probs_on_input": c.moe_apply_probs_on_input,
        "moe_shared_expert_intermediate_size": c.moe_shared_expert_intermediate_size or None,
        "moe_shared_expert_gate": c.moe_shared_expert_gate,
        # Layouts and kernels that any run of Megatron's has, without TransformerEngine too.
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
        "moe_use_legacy_grouped_gemm": False,
        "moe_shared_expert_overlap": False,
        "moe_permute_fusion": False,
    }


def _args_of_latents(c: ModelConfig) -> dict[str, Any]:
    args: dict[str, Any] = {
        "multi_latent_attention": True,
        "q_lora_rank": c.q_lora_rank or None,
        "kv_lora_rank": c.kv_lora_rank,
        "qk_head_dim": c.qk_head_dim,
        "qk_pos_emb_head_dim": c.qk_pos_emb_head_dim,
        "v_head_dim": c.v_head_dim,
        "rope_type": "rope" if c.yarn is None else "yarn",
        "rotary_scaling_factor": 1.0,
        "cache_mla_latents": False,
    }
    if c.yarn is not None:
        args |= {
            "rotary_scaling_factor": c.yarn.factor,
            "original_max_position_embeddings": c.yarn.original_max_position,
            "beta_fast": c.yarn.beta_fast,
            "beta_slow": c.yarn.beta_slow,
            "mscale": c.yarn.mscale,
            "mscale_all_dim": c.yarn.mscale_all_dim,
        }
    return args
