"""ModelConfig: everything that is needed to rebuild one model, whatever file it came from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from mlm_eval.checkpoints.errors import InputError

ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu", "squared_relu")
"""`gelu` is the exact erf form, `gelu_tanh` the approximation; `swiglu` gates with silu."""

POSITION_TYPES = ("learned_absolute", "rope", "learned_absolute+rope", "none")
"""Megatron's names; the sum stands for runs of spring 2023, when both could be on."""


ROTARY_SETTINGS = (
    "rotary_percent",
    "rotary_base",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "rope_scaling",
)
"""Settings of rotary positions; a model without them has the defaults, whatever its file says."""

_SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "ffn_hidden_size",
    "vocab_size",
    "max_position_embeddings",
)
_RANGES = (
    ("rotary_percent", 1e-3, 1.0),
    ("rotary_base", 1.0, 1e12),
    ("rotary_seq_len_interpolation_factor", 1e-3, 1e6),
    ("softmax_scale", 1e-6, 1e6),
    ("layernorm_epsilon", 0.0, 1.0),
    ("hidden_dropout", 0.0, 1.0),
    ("attention_dropout", 0.0, 1.0),
    ("init_method_std", 0.0, 1e3),
    ("num_tokentypes", 0, 1 << 20),
    ("num_classes", 0, 1 << 20),
)
"""A value outside is a typo or damage; NaN is outside of every range."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's stretching of rotary frequencies (Megatron `use_rope_scaling`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """One model. Names are Megatron's; sizes are those of the whole model, never of a shard.

    `vocab_size` counts the stored rows, padding included. `ffn_hidden_size` is the width of one
    branch where the MLP is gated. `num_query_groups` equals `num_attention_heads` without grouped
    queries.
    """

    family: str  # "gpt" or "bert"
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    position_embedding_type: str = "learned_absolute"
    rotary_percent: float = 1.0
    rotary_base: float = 10000.0
    rotary_interleaved: bool = False
    rotary_seq_len_interpolation_factor: float | None = None
    rope_scaling: RopeScaling | None = None
    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    """The stored gain is (gain - 1), Megatron's `apply_layernorm_1p`."""
    activation: str = "gelu"
    head_activation: str = "gelu"
    """BERT's LM head: erf since v1.0, whatever the MLP uses (docs/megatron.md, "GELU")."""
    add_bias_linear: bool = True
    add_qkv_bias: bool = True
    qk_layernorm: bool = False
    qk_layernorm_bias: bool = False
    softmax_scale: float | None = None
    """Factor of the attention scores; None is 1 / sqrt(kv_channels)."""
    untie_embeddings_and_output_weights: bool = False
    apply_residual_connection_post_layernorm: bool = False
    """Take the residual after the norm: the original BERT order, the paper's Figure 7 (a)."""
    num_tokentypes: int = 0
    lm_head: bool = True
    """False for fine-tuned BERT files, which hold a task head instead."""
    pooler: bool = False
    binary_head: bool = False
    num_classes: int = 0
    """Outputs of `classification_head`; 0 without one."""
    multichoice_head: bool = False
    qa_head: bool = False
    params_dtype: str = "float32"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        """Check what the model code relies on.

        Raises:
            InputError: A setting is impossible or of an unknown kind.
        """
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name} is {getattr(self, name)}, but must be at least 1; correct it with "
                    f"--set {name}=N"
                )
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(
                    f"{name} is {value}, but must lie between {low:g} and {high:g}; correct it "
                    f"with --set {name}=X"
                )
        if self.rope_scaling is not None and not 1e-3 <= self.rope_scaling.factor <= 1e6:
            raise InputError(
                f"rope_scaling_factor is {self.rope_scaling.factor}, but must lie between 0.001 "
                "and 1e+06; correct it with --set rope_scaling_factor=X"
            )
        if self.rotary and int(self.kv_channels * self.rotary_percent) % 2:
            raise InputError(
                f"rotary_percent {self.rotary_percent} of heads of {self.kv_channels} channels is "
                "an odd number of them, but they are rotated in pairs; correct it with --set "
                "rotary_percent=X"
            )
        if self.num_query_groups < 1 or self.num_attention_heads % self.num_query_groups:
            raise InputError(
                f"num_query_groups {self.num_query_groups} does not divide "
                f"num_attention_heads {self.num_attention_heads}; correct it with --set"
            )
        for name, known in (
            ("family", ("gpt", "bert")),
            ("activation", ACTIVATIONS),
            ("head_activation", ("gelu", "gelu_tanh")),
            ("position_embedding_type", POSITION_TYPES),
            ("normalization", ("LayerNorm", "RMSNorm")),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name} {getattr(self, name)!r} is not supported; known are "
                    f"{', '.join(known)}, to be chosen with --set {name}=..."
                )

    @property
    def gated(self) -> bool:
        """Whether fc1 holds a gate and an up branch."""
        return self.activation == "swiglu"

    @property
    def learned_positions(self) -> bool:
        """Whether there is a table of position embeddings."""
        return "learned_absolute" in self.position_embedding_type

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated."""
        return "rope" in self.position_embedding_type

    @property
    def block(self) -> str:
        """Canonical prefix of the layers, as in core: `decoder` for GPT, `encoder` for BERT."""
        return "decoder" if self.family == "gpt" else "encoder"

    @property
    def qkv_size(self) -> int:
        """Rows of the packed QKV weight: (n + 2 ng) hn."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)


SETTING_KINDS = {f.name: str(f.type).split(" | ")[0] for f in dataclasses.fields(ModelConfig)}
"""The type of each setting: a key of `_KINDS`, but for `rope_scaling`."""

# Also accepted by --set; the readers use them before there is a config.
READER_SETTINGS = {"checkpoint_version": "float", "rope_scaling_factor": "float"}


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Return `--set field=value` pairs as typed values.

    Raises:
        InputError: A pair has no `=`, names no setting, or its value does not fit the setting.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise InputError(f"--set {pair!r} has no '='; write --set num_attention_heads=16")
        overrides[name] = _parse_value(name, _kind_of(name), text)
    return overrides


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Refuse overrides that are not settings, or do not have the setting's type.

    Raises:
        InputError: A name is unknown, or a value does not fit it.
    """
    for name, value in overrides.items():
        kind = _kind_of(name)
        if not is_of_kind(value, kind):
            raise InputError(f"{name} is set to {value!r}; expected {_KINDS[kind]}")


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a word",
}


def is_of_kind(value: Any, kind: str) -> bool:
    """Return whether a value is an `int`, `float` (a whole number also), `bool` or `str`."""
    types = {"int": int, "float": int | float, "bool": bool, "str": str}
    return isinstance(value, types[kind]) and isinstance(value, bool) == (kind == "bool")


def _kind_of(name: str) -> str:
    """Return the type of a setting: a key of `_KINDS`."""
    kinds = {**SETTING_KINDS, **READER_SETTINGS}
    if kinds.get(name) not in _KINDS:
        known = ", ".join(sorted(name for name in kinds if kinds[name] in _KINDS))
        raise InputError(f"--set {name} is not a model setting; known are {known}")
    return kinds[name]


def _parse_value(name: str, kind: str, text: str) -> Any:
    booleans = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        if kind == "bool":
            return booleans[text.lower()]
        value: Any = {"int": int, "float": float, "str": str}[kind](text)
        if kind == "float" and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        raise InputError(f"--set {name}={text}: expected {_KINDS[kind]}") from None


def apply_overrides(config: ModelConfig, overrides: Mapping[str, Any]) -> ModelConfig:
    """Return `config` with the overridden fields replaced."""
    known = {k: v for k, v in overrides.items() if k in SETTING_KINDS}
    if "rope_scaling_factor" in overrides and config.rotary:
        scaling = config.rope_scaling or RopeScaling()
        factor = overrides["rope_scaling_factor"]
        known["rope_scaling"] = dataclasses.replace(scaling, factor=factor)
    return dataclasses.replace(config, **known)


@dataclass
class ConfigBuilder:
    """Collects the settings of a model one by one, each with its source; `--set` wins."""

    overrides: Mapping[str, Any]
    where: str
    """The checkpoint, for messages."""
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """Setting -> where its value came from."""
    warnings: list[str] = field(default_factory=list)
    """What the user should know."""
    config: ModelConfig = field(init=False)

    def set(self, name: str, value: Any, source: str) -> Any:
        """Set `name`, and return its value: that of `--set` where there is one."""
        if name in self.overrides:
            value, source = self.overrides[name], "--set"
        self.values[name], self.sources[name] = value, source
        return value

    def finish(self) -> Self:
        """Return itself with `config`, once all settings are known.

        What the model does not use stands at its default: equal models have equal configs.

        Raises:
            InputError: A setting is impossible.
        """
        values = dict(self.values)
        if values.get("lm_head") is False:  # a head that is not there has no activation
            values.pop("head_activation", None)
        config = apply_overrides(ModelConfig(**values), self.overrides)
        scale, usual = config.softmax_scale, config.kv_channels**-0.5
        if scale is not None and math.isclose(scale, usual, rel_tol=1e-6):
            config = dataclasses.replace(config, softmax_scale=None)
        if not config.rotary:
            defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
            unused = {name: defaults[name] for name in ROTARY_SETTINGS}
            config = dataclasses.replace(config, **unused)
        self.config = config
        return self
