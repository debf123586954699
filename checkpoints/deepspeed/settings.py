"""gpt-neox's settings: configs/*.yml of a step, as plain data, and the model that they describe.

The names are those of gpt-neox's NeoXArgs, with dashes or underscores. Each that changes what the
model computes stands in the tables below: read, or refused by its name. The others that are known
are about data, training, machines and kernels (`harmless.py`); what is known nowhere is told of, or
refused where its name is about the model.
Source: EleutherAI/gpt-neox, megatron/neox_arguments/neox_args.py and megatron/model/transformer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.config import ConfigBuilder, is_of_kind
from mlm_eval.checkpoints.deepspeed.harmless import NEOX_HARMLESS, unknown_names
from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.safe_pickle import is_scalar, printable
from mlm_eval.checkpoints.megatron.family_args import Shapes
from mlm_eval.checkpoints.parameters import WORD_EMBEDDINGS
from mlm_eval.checkpoints.projects.settings import neox_files, not_heeded, read_yaml

NEOX_READ = frozenset(
    """num_layers hidden_size num_attention_heads num_kv_heads seq_length max_position_embeddings
    norm layernorm_epsilon rms_norm_epsilon rmsnorm_fusion pos_emb rotary_pct rotary_emb_base
    no_weight_tying activation bias_gelu_fusion onnx_safe mlp_type gpt_j_residual gpt_j_tied
    use_bias_in_norms use_bias_in_attn_linear use_bias_in_mlp te_layernorm_mlp
    model_parallel_size make_vocab_size_divisible_by hidden_dropout attention_dropout
    init_method_std""".split()
)
"""What is read; the shapes say the rest (`intermediate_size`, ...)."""

NEOX_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "model_arch": ("another architecture than GPT", ("gpt2",)),
    "attention_config": ("attention that is not over all positions before", ()),
    "sliding_window_width": ("a sliding window", ()),
    "use_qk_layernorm": ("norms over the heads of queries and keys", (False,)),
    "opt_pos_emb_offset": ("shifted positions", (0,)),
    "num_unique_layers": ("layers that share their weights", ()),
    "soft_prompt_tuning": ("a soft prompt", ()),
    "use_mup": ("maximal-update scaling (muP)", (False,)),
    "moe_num_experts": ("a mixture of experts", (0, 1)),
    "num_experts": ("a mixture of experts", (0, 1)),
    "geglu": ("the GEGLU of 2021, which no field of later versions names", (False,)),
    "adapter_config": ("adapters", ()),
    "te_mha": ("TransformerEngine's attention", (False,)),
    "train_impl": ("another model than a language model", ("normal", "dpo", "kto", "reinforce")),
}
"""Setting -> what the model was trained with, and the values that change nothing (besides null)."""

_FULL_ATTENTION = ("global", "flash")

_POSITIONS = {
    "learned": "learned_absolute",
    "rotary": "rope",
    "alibi": "alibi",
    "none": "none",
}
_NORMS = {
    "layernorm": "LayerNorm",
    "te_layernorm": "LayerNorm",
    "rmsnorm": "RMSNorm",
    "te_rmsnorm": "RMSNorm",
}
_GATES = {
    "silu": "swiglu",
    "swish": "swiglu",
    "swiglu": "swiglu",
    "gelu": "geglu",
    "geglu": "geglu",
}
"""Activations of MLPs that are gated; those of `mlp_type: llama` name the gate's."""

_DEFAULTS: dict[str, Any] = {
    "norm": "layernorm",
    "layernorm_epsilon": 1e-5,
    "rms_norm_epsilon": 1e-8,
    "pos_emb": "learned",
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000.0,
    "no_weight_tying": False,
    "activation": "gelu",
    "bias_gelu_fusion": False,
    "onnx_safe": False,
    "mlp_type": "regular",
    "gpt_j_residual": False,
    "gpt_j_tied": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "init_method_std": 0.02,
}

_BIASES = ("use_bias_in_norms", "use_bias_in_attn_linear", "use_bias_in_mlp")

_KINDS = {
    **dict.fromkeys(
        """num_layers hidden_size num_attention_heads num_kv_heads seq_length model_parallel_size
        max_position_embeddings make_vocab_size_divisible_by""".split(),
        "int",
    ),
    **{name: type(value).__name__ for name, value in _DEFAULTS.items()},
    **dict.fromkeys(("rmsnorm_fusion", *_BIASES), "bool"),
}

_UNSTATED = {
    "parallel_residual": ("gpt_j_residual", "true"),
    "position_embedding_type": ("pos_emb", "rope"),
    "rotary_percent": ("rotary_pct", "0.25"),
    "activation": ("activation", "gelu"),
    "num_attention_heads": ("num_attention_heads", "N"),
}
"""Our name -> gpt-neox's of what no shape tells, and an example."""


@dataclass
class NeoxSettings:
    """The settings of a gpt-neox run."""

    values: dict[str, Any]
    """By gpt-neox's name, with underscores."""
    source: str
    """Where they come from."""
    where: str
    """The checkpoint, for messages."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = True
    """Whether what is absent has gpt-neox's default."""

    def get(self, name: str) -> tuple[Any, str]:
        """Return a value, checked, and where it comes from."""
        value = self.values.get(name)
        if value is None:
            return _DEFAULTS.get(name), "gpt-neox's default"
        kind = _KINDS[name]
        if kind == "float" and isinstance(value, str):  # YAML takes 1e-5 for a word
            try:
                value = float(value)
            except ValueError:
                pass
        if kind == "int" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not is_of_kind(value, kind):
            raise InputError(
                f"{self.where}: {name} is {shown(value)} in {self.source}, expected a "
                f"value of type {kind}; correct the file"
            )
        return (float(value) if kind == "float" else value), f"{self.source} {name}"

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP stand side by side."""
        given = self.overrides.get("parallel_residual")
        return bool(self.get("gpt_j_residual")[0] if given is None else given)

    @property
    def tied_norms(self) -> bool:
        """Whether the one norm before both is the attention's."""
        return self.parallel and bool(self.get("gpt_j_tied")[0])

    @property
    def layer_norm(self) -> bool:
        """Whether norms have a bias, be it of zeros."""
        return "rms" not in str(self.overrides.get("normalization", self.get("norm")[0])).lower()

    def may_lack_bias(self, part: str) -> bool:
        """Whether the run's norms, `attn_linear` or `mlp` have no biases, where others have some.

        Then they are zeros; else one that is not there is lost.
        """
        if part == "mlp" and self.get("mlp_type")[0] == "llama":
            return True
        stated = self.get(f"use_bias_in_{part}")[0]
        return not self.complete if stated is None else not stated

    @property
    def heads(self) -> int | None:
        """Query heads; None where no file says it."""
        given = self.overrides.get("num_attention_heads")
        return self.get("num_attention_heads")[0] if given is None else int(given)

    @property
    def groups(self) -> int | None:
        """Key and value heads; None: as many as query heads."""
        given = self.overrides.get("num_query_groups")
        return self.get("num_kv_heads")[0] if given is None else int(given)

    def check(self, where: str) -> None:
        """Refuse settings of a function that is not computed here, or that nothing tells.

        Raises:
            InputError: There is one.
        """
        for name, (what, harmless) in NEOX_REFUSED.items():
            value = self.values.get(name)
            if value is None or value in harmless or self._is_harmless(name, value):
                continue
            raise InputError(
                f"{where} was trained with {what} ({name} in {self.source}), which mlm-eval does "
                "not compute; it reads gpt-neox's dense GPT models"
            )
        about, _ = unknown_names(self.values, NEOX_KNOWN)
        if about:
            value = shown(self.values[about[0]])[:40]
            raise InputError(
                f"{where}: {self.source} says {about[0]}: {value}, a setting that mlm-eval does "
                "not know and that may change what the model computes; take it out of the file if "
                "it does not"
            )
        if self.complete:
            return
        missing = {
            ours: example
            for ours, (theirs, example) in _UNSTATED.items()
            if self.values.get(theirs) is None and ours not in self.overrides
        }
        if missing:
            raise InputError(
                f"{where} has no configs/ folder with the run's .yml file, which says what "
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'}; copy it too, or "
                "give " + " ".join(f"--set {name}={example}" for name, example in missing.items())
            )

    def _is_harmless(self, name: str, value: Any) -> bool:
        if name == "attention_config":
            return _words(value) <= {*_FULL_ATTENTION, "all"}
        if name == "num_unique_layers":
            return bool(value == self.values.get("num_layers"))
        if name == "soft_prompt_tuning":
            return isinstance(value, dict) and not value.get("enabled")
        return False


NEOX_KNOWN = frozenset({*NEOX_READ, *NEOX_REFUSED, *NEOX_HARMLESS})


def _words(value: Any, depth: int = 0) -> set[str]:
    """Return the words in nested lists, such as `[[["global"], 24]]`; a number is none."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, list) and depth < 4 and len(value) <= 4096:
        return {word for item in value for word in _words(item, depth + 1)}
    return set() if isinstance(value, int) else {"?"}


def read_settings(
    step: Path, saved: Mapping[str, Any], overrides: Mapping[str, Any]
) -> NeoxSettings:
    """Return the settings of a step: its configs/*.yml, those of the root, else what a rank saved.

    Args:
        step: The folder of the step.
        saved: The `args` in a rank's file.
        overrides: `--set` values.

    Raises:
        InputError: A file is no plain YAML, or two files contradict each other.
    """
    if files := neox_files(step):
        return NeoxSettings(_joined(files), _shown(files), str(step), overrides)
    values = {name.replace("-", "_"): value for name, value in saved.items()}
    return NeoxSettings(values, "the rank's args", str(step), overrides, complete=False)


def _shown(files: list[Path]) -> str:
    return f"{files[0].parent.name}/{', '.join(file.name for file in files[:3])}"


def _joined(files: list[Path]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for file in files:
        for key, value in read_yaml(file).items():
            name = str(key).replace("-", "_")
            plain = value if is_scalar(value) or name in NEOX_REFUSED else "a list or an object"
            if name in values and name in _KINDS and values[name] != plain:
                raise InputError(
                    f"{file} has another {name} than the other files in {file.parent}; leave the "
                    "files of one run there"
                )
            values[name] = plain
    return values


def neox_config(
    settings: NeoxSettings, shapes: Shapes, params_dtype: str, where: str
) -> ConfigBuilder:
    """Return the config of a gpt-neox model.

    Args:
        settings: Checked ones.
        shapes: Full shapes of the parameters found, by canonical name.
        params_dtype: The stored dtype.
        where: The checkpoint, for messages.

    Raises:
        InputError: Settings and shapes contradict each other, or the model is another than ours.
    """
    b = ConfigBuilder(settings.overrides, where)
    b.set("family", "gpt", "parameter names")
    b.set("params_dtype", params_dtype, "weights")
    _sizes(b, settings, shapes)
    _positions(b, settings, shapes)
    norm, source = _word(settings, "norm", _NORMS)
    b.set("normalization", norm, source)
    epsilon = "rms_norm_epsilon" if norm == "RMSNorm" else "layernorm_epsilon"
    b.set("layernorm_epsilon", *settings.get(epsilon))
    if b.values["layernorm_epsilon"] > 1e-7 and norm == "RMSNorm":
        if not settings.get("rmsnorm_fusion")[0]:
            b.warnings.append(
                f"gpt-neox's own RMSNorm adds its epsilon ({b.values['layernorm_epsilon']:g}) to "
                "the root of the mean square; as elsewhere, it is added below the root here"
            )
    _activation(b, settings, shapes)
    layer = "decoder.layers.0."
    b.set("add_bias_linear", f"{layer}mlp.linear_fc2.bias" in shapes, "shapes")
    b.set("add_qkv_bias", f"{layer}self_attention.linear_qkv.bias" in shapes, "shapes")
    b.set("parallel_residual", *settings.get("gpt_j_residual"))
    untied, source = settings.get("no_weight_tying")
    has_table = "output_layer.weight" in shapes
    if untied != has_table and settings.complete:
        raise InputError(
            f"{where} holds {'an' if has_table else 'no'} output table of its own where {source} "
            f"says no_weight_tying {untied}; copy all files of one save"
        )
    b.set("untie_embeddings_and_output_weights", has_table, "shapes")
    for name in ("hidden_dropout", "attention_dropout", "init_method_std"):
        b.set(name, *settings.get(name))
    if others := unknown_names(settings.values, NEOX_KNOWN)[1]:
        b.warnings.append(not_heeded(f"{settings.source} has", others))
    return b.finish()


def _word(settings: NeoxSettings, name: str, known: Mapping[str, str]) -> tuple[str, str]:
    value, source = settings.get(name)
    if value not in known:
        raise InputError(
            f"{settings.where}: {name} {shown(value)} ({settings.source}) is not "
            f"supported; known are {', '.join(known)}"
        )
    return known[value], source


def _sizes(b: ConfigBuilder, settings: NeoxSettings, shapes: Shapes) -> None:
    layers = {name.split(".")[2] for name in shapes if name.startswith("decoder.layers.")}
    vocab, hidden = shapes[WORD_EMBEDDINGS]
    b.set("num_layers", len(layers), "shapes")
    b.set("vocab_size", vocab, "shapes")
    b.set("hidden_size", hidden, "shapes")
    for name in ("num_layers", "hidden_size"):
        stated = settings.get(name)[0]
        if stated not in (None, b.values[name]) and name not in b.overrides:
            raise InputError(
                f"{b.where} has {name} {b.values[name]} by its weights, where {settings.source} "
                f"says {stated}; copy all files of one save"
            )
    layer = "decoder.layers.0."
    width = shapes[f"{layer}self_attention.linear_proj.weight"][1]
    rows = shapes[f"{layer}self_attention.linear_qkv.weight"][0]
    heads = settings.heads
    if heads is None:
        raise InputError(
            f"{b.where} does not say how many attention heads there are; give --set "
            "num_attention_heads=N"
        )
    groups = settings.groups or heads
    if heads < 1 or width % heads or rows != (heads + 2 * groups) * (width // heads):
        raise InputError(
            f"{b.where}: {rows} QKV rows and an attention width of {width} do not fit {heads} "
            f"heads in {groups} groups; correct it with --set num_attention_heads=N or "
            "num_query_groups=N"
        )
    b.set("num_attention_heads", heads, f"{settings.source} num_attention_heads")
    b.set("num_query_groups", groups, "shapes")
    b.set("kv_channels", width // heads, "shapes")
    b.set("ffn_hidden_size", shapes[f"{layer}mlp.linear_fc2.weight"][1], "shapes")


def _positions(b: ConfigBuilder, settings: NeoxSettings, shapes: Shapes) -> None:
    kind, source = _word(settings, "pos_emb", _POSITIONS)
    b.set("position_embedding_type", kind, source)
    table = shapes.get("embedding.position_embeddings.weight")
    length, source = settings.get("max_position_embeddings")
    if length is None:
        length, source = settings.get("seq_length")
    if table is not None:
        length, source = table[0], "shapes"
    if length is None and "max_position_embeddings" not in b.overrides:
        raise InputError(
            f"{b.where} does not record how many positions the model was trained for; give --set "
            "max_position_embeddings=N"
        )
    b.set("max_position_embeddings", length, source)
    b.set("rotary_percent", *settings.get("rotary_pct"))
    b.set("rotary_base", *settings.get("rotary_emb_base"))


def _activation(b: ConfigBuilder, settings: NeoxSettings, shapes: Shapes) -> None:
    layer = "decoder.layers.0.mlp."
    gated = shapes[f"{layer}linear_fc1.weight"][0] == 2 * b.values["ffn_hidden_size"]
    word, source = settings.get("activation")
    known = _GATES if gated else {"gelu": "gelu"}
    kind = known.get(word)
    if kind is None and "activation" not in b.overrides:
        raise InputError(
            f"{b.where}: the activation {printable(str(word))} ({source}) of "
            f"{'a gated' if gated else 'an ungated'} MLP is not computed here; known are "
            f"{', '.join(known)}"
        )
    fused = settings.get("bias_gelu_fusion")[0] and not settings.get("onnx_safe")[0]
    if kind in ("gelu", "geglu") and fused:
        kind, source = f"{kind}_tanh", f"{settings.source} bias_gelu_fusion"
        if "activation" not in b.overrides:
            b.warnings.append(
                "the run's fused kernel is the tanh GELU (bias_gelu_fusion); gpt-neox's converter "
                "to Hugging Face writes the exact one: to compare with its folders, use --set "
                f"activation={word}"
            )
    b.set("activation", kind, source)
