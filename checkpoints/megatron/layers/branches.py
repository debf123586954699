"""Hybrids of Mamba-2, and heterogeneous layers: what each layer consists of, and its widths.

A hybrid's layer has one branch, and one letter in `hybrid_override_pattern`: `M` Mamba-2, `*`
attention, `-` an MLP, `E` experts. A heterogeneous model's layer may lack attention or MLP, have
one matrix in its place, or be of a width of its own; JSON in its args says so. The tensors tell all
of it; what args say must agree.
Source: docs/megatron.md, "Mamba-2 and hybrids", "Heterogeneous layers".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlm_eval.checkpoints.config import ConfigBuilder, ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.text_file import json_value

_Shapes = Mapping[str, tuple[int, ...]]
_Args = Mapping[str, Any]

JSON_CONTENT = "heterogeneous_layers_config_encoded_json"
JSON_PATH = "heterogeneous_layers_config_path"
PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")
"""A hybrid's letters, the newer name first."""

_LETTERS = {
    "M": ("mamba", "none"),
    "*": ("attention", "none"),
    "-": ("none", "plain MLP"),
    "E": ("none", "experts"),
}
_MIXERS = {
    ".mixer.in_proj.weight": "mamba",
    ".self_attention.weight": "linear",
    ".self_attention.linear_qkv.weight": "attention",
    ".self_attention.linear_kv_up_proj.weight": "attention",
}
_FEED_FORWARDS = {
    ".mlp.router.weight": "experts",
    ".mlp.weight": "linear",
    ".mlp.linear_fc1.weight": "plain MLP",
}

MAMBA_DEFAULTS = {"mamba_state_dim": 128, "mamba_head_dim": 64, "mamba_num_groups": 8}
"""Megatron's, where args lack them."""


@dataclass(frozen=True)
class Branches:
    """What one layer consists of."""

    mixer: str
    """As `ModelConfig.mixer` has it."""
    feed_forward: str
    query_groups: int | None = None
    """None: nothing says it."""
    ffn_hidden_size: int | None = None

    def differs(self, found: Branches) -> bool:
        """Return whether a layer that was found is not the one that is described here."""
        ours, theirs = ((b.mixer, b.feed_forward) for b in (self, found))
        pairs = (
            (self.query_groups, found.query_groups),
            (self.ffn_hidden_size, found.ffn_hidden_size),
        )
        return ours != theirs or any(a not in (None, b) and b is not None for a, b in pairs)

    def __str__(self) -> str:
        widths = (self.query_groups, self.ffn_hidden_size)
        names = (self.mixer, self.feed_forward)
        found = [f"{n} of {w}" if w else n for n, w in zip(names, widths, strict=True)]
        return " and ".join(name for name in found if name != "none") or "nothing"


def described_layers(args: _Args, where: str) -> list[Branches] | None:
    """Return what args say that each layer consists of; None: they describe no such model.

    Raises:
        InputError: They describe it in a form that Megatron does not take.
    """
    pattern = next((args[name] for name in PATTERNS if args.get(name)), None)
    if pattern is not None:
        letters = str(pattern).partition("/")[0].replace("|", "")  # stages, and what follows
        if unknown := sorted(set(letters) - set(_LETTERS)):
            raise InputError(
                f"{where} is a hybrid with layers of the kind {unknown[0]!r} (pattern {pattern}), "
                "which mlm-eval does not compute; it knows M, *, - and E"
            )
        return [Branches(*_LETTERS[letter]) for letter in letters]
    if args.get(JSON_PATH) and args.get(JSON_CONTENT):
        return _described_by_json(args, where)
    return None


def _described_by_json(args: _Args, where: str) -> list[Branches]:
    try:
        blocks = json_value(args[JSON_CONTENT])["block_configs"]
        return [_of_block(block, args) for block in blocks]
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
        raise InputError(
            f"{where} has heterogeneous layers, but args.{JSON_CONTENT} is not JSON with a list "
            "block_configs of attention and ffn; the file is damaged, copy it again"
        ) from None


def _of_block(block: Mapping[str, Any], args: _Args) -> Branches:
    attention, ffn = block["attention"], block.get("ffn") or block["mlp"]
    mixer, feed_forward = _kind(attention, "attention"), _kind(ffn, "plain MLP")
    per_group, heads = attention.get("n_heads_in_group"), args.get("num_attention_heads")
    groups = heads // per_group if per_group and heads and mixer == "attention" else None
    width, multiple = ffn.get("ffn_hidden_size"), ffn.get("ffn_mult")
    if width is None and multiple is not None and args.get("hidden_size"):
        # As NVIDIA's Hugging Face form of these models counts it.
        width = -(-int(2 * multiple * args["hidden_size"] / 3) // 256) * 256
    return Branches(mixer, feed_forward, groups, width if feed_forward == "plain MLP" else None)


def _kind(part: Mapping[str, Any], usual: str) -> str:
    if part.get("no_op"):
        return "none"
    return "linear" if part.get("replace_with_linear") else usual


def with_empty_layers(numbers: list[int], args: _Args, where: str) -> list[int]:
    """Return the numbers of a model's layers, given those that hold anything, in order."""
    described = described_layers(args, where) or []
    empty = {number for number, one in enumerate(described) if str(one) == "nothing"}
    return sorted({*numbers, *empty})


def read_branches(b: ConfigBuilder, args: _Args, shapes: _Shapes) -> bool:
    """Take which layers have which branches, and Mamba-2's sizes; return whether they may differ.

    A model that neither its args nor its parameters say anything special of is left as it is.

    Raises:
        InputError: A layer holds something else than args say.
    """
    described = described_layers(args, b.where)
    mamba = any(".mixer." in name for name in shapes)
    hybrid = mamba or bool(args.get("is_hybrid_model"))
    matrices = any(re.search(r"\.(self_attention|mlp)\.weight$", name) for name in shapes)
    if described is None and not hybrid and not matrices:
        return False
    if b.values["family"] != "gpt":
        raise InputError(
            f"{b.where} was trained with layers that differ, by args.is_hybrid_model, "
            f"{' or '.join(PATTERNS)} or {JSON_PATH}, which mlm-eval computes for GPT models only"
        )
    found = _found_layers(b, args, shapes)
    _check(b, described, found, hybrid=hybrid)
    for name, part, kind in (
        ("no_mixer_layers", "mixer", "none"),
        ("linear_mixer_layers", "mixer", "linear"),
        ("mamba_layers", "mixer", "mamba"),
        ("no_mlp_layers", "feed_forward", "none"),
        ("linear_mlp_layers", "feed_forward", "linear"),
    ):
        b.set(name, tuple(n for n, one in enumerate(found) if getattr(one, part) == kind), "shapes")
    if mamba:
        _read_mamba(b, args, shapes)
    return True


def _check(
    b: ConfigBuilder, described: list[Branches] | None, found: list[Branches], *, hybrid: bool
) -> None:
    if described is not None and len(described) != len(found):
        raise InputError(
            f"{b.where} holds {len(found)} layers where its args describe {len(described)}; if a "
            "pipeline stage or file is missing, copy all of one save"
        )
    for number, layer in enumerate(found):
        one = None if described is None else described[number]
        if one is None and hybrid and (layer.mixer == "none") == (layer.feed_forward == "none"):
            raise InputError(
                f"{b.where} is a hybrid model by its args (is_hybrid_model) or parameters, whose "
                f"layers have one branch each, but layer {number} has {layer}"
            )
        if one is not None and one.differs(layer):
            raise InputError(
                f"{b.where} has {layer} in layer {number} where its args describe {one}; two "
                "checkpoints may be mixed: copy all ranks of one save"
            )


def _found_layers(b: ConfigBuilder, args: _Args, shapes: _Shapes) -> list[Branches]:
    mixers, feed_forwards = (
        {n: kind for suffix, kind in kinds.items() for n in by_layer(shapes, suffix)}
        for kinds in (_MIXERS, _FEED_FORWARDS)
    )
    widths = {n: shape[1] for n, shape in by_layer(shapes, ".mlp.linear_fc2.weight").items()}
    heads = args.get("num_attention_heads")
    groups: dict[int, int] = {}
    rows = by_layer(shapes, ".self_attention.linear_qkv.weight")
    for n, (_, width) in by_layer(shapes, ".self_attention.linear_proj.weight").items():
        if heads and n in rows and width >= heads:
            own = 2 * heads if args.get("attention_output_gate") else heads
            groups[n] = (rows[n][0] // (width // heads) - own) // 2
    return [
        Branches(mixers.get(n, "none"), feed_forwards.get(n, "none"), groups.get(n), widths.get(n))
        for n in range(b.values["num_layers"])
    ]


def by_layer(shapes: _Shapes, suffix: str) -> dict[int, tuple[int, ...]]:
    """Return the shapes of a part of the decoder's layers, by layer number."""
    found = {}
    for name, shape in shapes.items():
        head, layers, rest = name.partition("decoder.layers.")
        if layers and not head and rest.endswith(suffix):
            number = rest.partition(".")[0]
            if rest == number + suffix:
                found[int(number)] = shape
    return found


def read_widths(b: ConfigBuilder, name: str, of_layers: Mapping[int, int]) -> int:
    """Take `num_query_groups` or `ffn_hidden_size`, in each layer where they differ.

    Args:
        b: Takes the settings.
        name: The setting of each layer.
        of_layers: The value of each layer that has one.

    Returns:
        The largest.
    """
    whole = {"layer_query_groups": "num_query_groups", "layer_ffn_hidden_sizes": "ffn_hidden_size"}
    most = max(of_layers.values())
    b.set(whole[name], most, "shapes")
    if len(set(of_layers.values())) > 1:
        b.set(name, tuple(of_layers.get(n, 0) for n in range(b.values["num_layers"])), "shapes")
    return most


def _read_mamba(b: ConfigBuilder, args: _Args, shapes: _Shapes) -> None:
    prefix = next((n for n in shapes if n.endswith(".mixer.A_log")), "").removesuffix("A_log")
    leaves = ("A_log", "out_proj.weight", "conv1d.weight")
    lost = [leaf for leaf in leaves if not shapes.get(f"{prefix}{leaf}", (0,))[0]]
    if lost:
        raise InputError(
            f"{b.where} has Mamba layers without {lost[0]}; copy all files of one save"
        )
    heads, width = shapes[f"{prefix}A_log"][0], shapes[f"{prefix}out_proj.weight"][1]
    channels, _, conv = shapes[f"{prefix}conv1d.weight"]
    sizes = {
        "mamba_num_heads": heads,
        "mamba_head_dim": width // heads,
        "mamba_conv_width": conv,
    }
    for name, value in sizes.items():
        saved = args.get(name)
        if saved not in (None, value) and name not in b.overrides:
            raise InputError(
                f"{b.where} has Mamba layers with {name} {value} where its args say {saved}; ranks "
                "of two checkpoints may be mixed: copy all ranks of one save"
            )
        b.set(name, value, "shapes")
    for name in ("mamba_state_dim", "mamba_num_groups"):
        source = "Megatron's default" if args.get(name) is None else f"args.{name}"
        value = MAMBA_DEFAULTS[name] if args.get(name) is None else args[name]
        b.set(name, value, source)
    for name in ("mamba_min_time_step", "mamba_norm_epsilon"):
        if args.get(name) is not None:
            b.set(name, args[name], f"args.{name}")
    both = b.values["mamba_num_groups"] * b.values["mamba_state_dim"]
    if width % heads or channels != width + 2 * both:
        raise InputError(
            f"{b.where}: the convolution of {channels} channels does not fit {width} channels of "
            f"heads with mamba_num_groups {b.values['mamba_num_groups']} and mamba_state_dim "
            f"{b.values['mamba_state_dim']}; correct them with --set"
        )


def args_of_branches(c: ModelConfig) -> dict[str, Any]:
    """Return the args of a hybrid or of heterogeneous layers; none that a plain model needs."""
    layers = range(c.num_layers)
    kinds = [(c.mixer(layer), c.feed_forward(layer)) for layer in layers]
    args: dict[str, Any] = {}
    if c.mamba_layers:
        args |= {
            "mamba_num_heads": c.mamba_num_heads,
            "mamba_head_dim": c.mamba_head_dim,
            "mamba_num_groups": c.mamba_num_groups,
            "mamba_state_dim": c.mamba_state_dim,
        }
        if c.mamba_min_time_step:
            args["mamba_min_time_step"] = c.mamba_min_time_step
        if c.mamba_norm_epsilon is not None:
            args["mamba_norm_epsilon"] = c.mamba_norm_epsilon
    if is_hybrid(c):
        letters = {kinds: letter for letter, kinds in _LETTERS.items()}
        pattern = "".join(letters[kind] for kind in kinds)
        return args | {"is_hybrid_model": True, "hybrid_override_pattern": pattern}
    if c.branches_differ:
        blocks = [_block(c, layer) for layer in layers]
        args |= {JSON_PATH: "config.json", JSON_CONTENT: json.dumps({"block_configs": blocks})}
    return args


def is_hybrid(c: ModelConfig) -> bool:
    """Return whether every layer has one branch, as Megatron's hybrids have."""
    kinds = [(c.mixer(layer), c.feed_forward(layer)) for layer in range(c.num_layers)]
    return c.branches_differ and all(kind in _LETTERS.values() for kind in kinds)


def _block(c: ModelConfig, layer: int) -> dict[str, Any]:
    mixer, feed_forward, own = c.mixer(layer), c.feed_forward(layer), c.of_layer(layer)
    per_group = own.num_attention_heads // own.num_query_groups
    return {
        "attention": {
            "no_op": mixer == "none",
            "replace_with_linear": mixer == "linear",
            "n_heads_in_group": per_group if mixer == "attention" else None,
        },
        "ffn": {
            "no_op": feed_forward == "none",
            "replace_with_linear": feed_forward == "linear",
            "ffn_hidden_size": own.ffn_hidden_size if feed_forward == "plain MLP" else None,
        },
    }


# ---- names in files ------------------------------------------------------------------------------

_INSIDE = {
    "mamba": "mixer.in_proj.layer_norm_",
    "attention": "self_attention.linear_qkv.layer_norm_",
    "linear": "self_attention.layer_norm_",
    "plain MLP": "mlp.linear_fc1.layer_norm_",
    "experts": "pre_mlp_layernorm.",
}
"""Where a norm is kept that stands inside the layer behind it."""

MAMBA_PARTS = {"in_proj": ("z", "x", "B", "C", "dt"), "conv1d": ("x", "B", "C")}
"""Mamba's packed tensors, in torch_dist: the keys of their parts, in their order."""


def norm_inside(c: ModelConfig, layer: int, part: str) -> str:
    """Return the name of a layer's part, a norm's that of the module behind it."""
    mixer, feed_forward = c.mixer(layer), c.feed_forward(layer)
    if part.startswith("input_layernorm.") and not (c.multi_latent_attention and mixer != "linear"):
        return part.replace("input_layernorm.", _INSIDE[mixer], 1)
    if part.startswith("pre_mlp_layernorm."):
        inside = "mlp.layer_norm_" if feed_forward == "linear" else _INSIDE[feed_forward]
        return part.replace("pre_mlp_layernorm.", inside, 1)
    return part


def names_of_hybrid(c: ModelConfig, name: str, layer: int | None) -> str:
    """Return what files call a parameter: hybrids have the names of TransformerEngine's layers.

    Args:
        c: The model.
        name: Canonical, but for the number of its layer.
        layer: Its layer's number in the whole model; None: it is in none.
    """
    if not is_hybrid(c):
        return name
    if layer is None:
        return name.replace("decoder.final_layernorm.", "decoder.final_norm.")
    block, layers, number, part = name.split(".", 3)
    return f"{block}.{layers}.{number}.{norm_inside(c, layer, part)}"


def stored_parts(c: ModelConfig, part: str) -> dict[str, slice] | None:
    """Return the ends of the keys of a packed tensor's parts, and their rows; None: it is whole."""
    match = re.fullmatch(r"mixer\.(in_proj|conv1d)\.(weight|bias)", part)
    if not match:
        return None
    names = MAMBA_PARTS[match[1]]
    sizes = {
        end: size for end, (size, _) in zip(MAMBA_PARTS["in_proj"], c.mamba_parts, strict=True)
    }
    found, start = {}, 0
    for name in names:
        found[name] = slice(start, start + sizes[name])
        start += sizes[name]
    return found


def lacking_branches(c: ModelConfig) -> str | None:
    """Return what megatron-core does not have of such layers, or None."""
    hybrid = is_hybrid(c)
    lacking = {
        "Mamba-2 in layers that have an MLP too": bool(c.mamba_layers) and not hybrid,
        "hybrid whose layers are of several widths": hybrid
        and bool(c.layer_query_groups or c.layer_ffn_hidden_sizes),
        "latent attention in such layers": c.multi_latent_attention
        and (hybrid or c.branches_differ),
        "experts in heterogeneous layers": c.branches_differ and not hybrid and bool(c.num_experts),
        "convolution but of 4 positions": bool(c.mamba_layers) and c.mamba_conv_width != 4,
    }
    return next((what for what, lacks in lacking.items() if lacks), None)
