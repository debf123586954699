"""ModelConfig: everything that is needed to rebuild one model, whatever file it came from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from mlm_eval.checkpoints.errors import InputError

GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "quick_geglu")
"""Of `[gate; up]`: silu, GELU or x sigmoid(1.702 x) of the gate, times the up branch."""

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "squared_relu", *GATED_ACTIVATIONS)
"""`gelu` and `geglu` take the exact erf form, `gelu_tanh` and `geglu_tanh` the approximation."""

SOFTMAX_TYPES = ("vanilla", "off-by-one", "learnable")
"""What the attention's softmax divides by besides its scores: nothing, exp(0), or one learned logit
for each head (a sink), whose share is dropped."""

SCORE_FUNCTIONS = ("softmax", "sigmoid")
"""How a router turns logits into scores."""

MODEL_FAMILIES = ("gpt", "bert", "t5")
"""Kinds of models: left to right, both ways, and an encoder with a decoder that looks at it."""

POSITION_TYPES = (
    "learned_absolute",
    "rope",
    "learned_absolute+rope",
    "alibi",
    "relative",
    "none",
)
"""Megatron's names; the sum stands for runs of spring 2023, when both could be on. `alibi` adds a
line to the scores, with a slope of its own for each head (arXiv 2108.12409). `relative` is T5's: a
bias for each head and each bucket of distances, added to the scores of self-attention."""


PARALLEL_RESIDUAL = "attention and MLP side by side (a parallel residual)"

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
_LARGEST = (("num_layers", 10_000), ("hidden_size", 1 << 24), ("vocab_size", 1 << 31))
"""Far beyond any model; tables with an entry a layer are made before the weights are looked at."""

_RANGES = (
    ("rotary_percent", 1e-3, 1.0),
    ("rotary_base", 1.0, 1e12),
    ("rotary_seq_len_interpolation_factor", 1e-3, 1e6),
    ("softmax_scale", 1e-6, 1e6),
    ("rotary_base_local", 1.0, 1e12),
    ("attn_logit_softcapping", 1e-3, 1e6),
    ("final_logit_softcapping", 1e-3, 1e6),
    ("embedding_multiplier", 1e-6, 1e6),
    ("logit_multiplier", 1e-6, 1e6),
    ("layernorm_epsilon", 0.0, 1.0),
    ("hidden_dropout", 0.0, 1.0),
    ("attention_dropout", 0.0, 1.0),
    ("init_method_std", 0.0, 1e3),
    ("num_tokentypes", 0, 1 << 20),
    ("num_classes", 0, 1 << 20),
    ("window_size", 0, 1 << 30),
    ("activation_func_clamp_value", 0.0, 1e6),
    ("glu_linear_offset", -1e6, 1e6),
    ("num_experts", 0, 1 << 16),
    ("moe_ffn_hidden_size", 0, 1 << 30),
    ("moe_router_topk", 0, 1 << 16),
    ("moe_router_num_groups", 0, 1 << 16),
    ("moe_router_group_topk", 0, 1 << 16),
    ("moe_router_group_experts", 0, 1 << 16),
    ("moe_router_topk_scaling_factor", 0.0, 1e6),
    ("moe_shared_expert_intermediate_size", 0, 1 << 30),
    ("latent_layernorm_epsilon", 0.0, 1.0),
    ("q_lora_rank", 0, 1 << 30),
    ("kv_lora_rank", 0, 1 << 30),
    ("qk_head_dim", 0, 1 << 30),
    ("qk_pos_emb_head_dim", 0, 1 << 30),
    ("v_head_dim", 0, 1 << 30),
    ("decoder_num_layers", 0, 1 << 20),
    ("relative_attention_num_buckets", 4, 1 << 20),
    ("relative_attention_max_distance", 1, 1 << 30),
    ("mamba_num_heads", 0, 1 << 20),
    ("mamba_head_dim", 0, 1 << 20),
    ("mamba_num_groups", 0, 1 << 20),
    ("mamba_state_dim", 0, 1 << 20),
    ("mamba_conv_width", 0, 1 << 10),
    ("mamba_norm_epsilon", 0.0, 1.0),
    ("mamba_min_time_step", 0.0, 1e6),
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
class YarnScaling:
    """YaRN's stretching of rotary frequencies (arXiv 2309.00071; Megatron `rope_type` yarn)."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    round_range: bool = True
    """Round the ends of the range of channels that are blended to whole channels."""

    @property
    def attention_factor(self) -> float:
        """Factor of cosines and sines: m(mscale) / m(mscale_all_dim), or m(1) without the two."""
        if self.mscale is None or self.mscale_all_dim is None:
            return yarn_mscale(self.factor, 1.0)
        return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)

    def same_as(self, other: YarnScaling) -> bool:
        """Whether both stretch and scale alike, whichever mscales they say it with."""
        factors = (self.attention_factor, other.attention_factor)
        alike = dataclasses.replace(other, mscale=self.mscale, mscale_all_dim=self.mscale_all_dim)
        return self == alike and math.isclose(*factors, rel_tol=1e-9)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's m: 0.1 mscale ln(factor) + 1 for factors above 1, else 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def mscale_of(factor: float, m: float) -> float:
    """Return the mscale whose `yarn_mscale` is `m`."""
    return (m - 1.0) / (0.1 * math.log(factor)) if factor > 1 else 0.0


@dataclass(frozen=True)
class ModelConfig:
    """One model. Names are Megatron's; sizes are those of the whole model, never of a shard.

    `vocab_size` counts the stored rows, padding included. `ffn_hidden_size` is the width of one
    branch where the MLP is gated. `num_query_groups` equals `num_attention_heads` without grouped
    queries. Where layers differ, a setting holds the numbers of the layers that have it, from 0.
    """

    family: str  # "gpt", "bert" or "t5"
    num_layers: int  # of T5's encoder
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
    yarn: YarnScaling | None = None
    rotary_base_local: float | None = None
    """Rotary base of `window_layers`, whose frequencies are then not scaled; None: as elsewhere."""
    no_rope_layers: tuple[int, ...] = ()
    """Layers without rotary positions."""
    window_size: int = 0
    """Keys before its own position that a query of `window_layers` sees; 0: all of them."""
    window_layers: tuple[int, ...] = ()
    softmax_type: str = "vanilla"
    attn_logit_softcapping: float | None = None
    """Attention scores become c tanh(score / c)."""
    final_logit_softcapping: float | None = None
    """The same of the output's logits, after their multiplier."""
    embedding_multiplier: float = 1.0
    """Multiplies the sum of the embeddings (Gemma's sqrt(hidden_size), muP)."""
    logit_multiplier: float = 1.0
    """Multiplies the output's logits."""
    attention_output_gate: bool = False
    """The attention's output is multiplied by the sigmoid of gates, heads beside the queries."""
    branch_layernorm: bool = False
    """Attention and MLP have a norm of their own for what their last matrix gives, before its bias
    and before the residual."""
    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    """The stored gain is (gain - 1), Megatron's `apply_layernorm_1p`."""
    activation: str = "gelu"
    head_activation: str = "gelu"
    """BERT's LM head: erf since v1.0, whatever the MLP uses (docs/megatron.md, "GELU")."""
    activation_func_clamp_value: float | None = None
    """Gated activations: the gate is clamped from above, the up branch to +- this value."""
    glu_linear_offset: float = 0.0
    """Gated activations: added to the up branch."""
    add_bias_linear: bool = True
    add_qkv_bias: bool = True
    qk_layernorm: bool = False
    qk_layernorm_bias: bool = False
    """With multi-latent attention these two are the norms of the latents."""
    softmax_scale: float | None = None
    """Factor of the attention scores; None is 1 / sqrt(kv_channels), of latent attention
    1 / sqrt(qk_head_dim + qk_pos_emb_head_dim)."""
    qk_l2_norm: bool = False
    """Queries and keys are divided by the root of their mean square."""
    no_l2_norm_layers: tuple[int, ...] = ()
    """Layers that leave this out."""
    num_experts: int = 0
    """Routed experts of the layers in `moe_layers`; 0: a dense model."""
    moe_layers: tuple[int, ...] = ()
    moe_ffn_hidden_size: int = 0
    """Width of one expert, of one branch where it is gated."""
    moe_router_topk: int = 0
    """Experts that a token is sent to."""
    moe_router_score_function: str = "softmax"
    moe_router_pre_softmax: bool = False
    """The softmax runs over all experts, before the choice; else over the chosen."""
    moe_router_num_groups: int = 0
    """Experts are chosen within `moe_router_group_topk` of so many groups; 0: among all."""
    moe_router_group_topk: int = 0
    moe_router_group_experts: int = 0
    """A group counts by the sum of so many of its best experts (DeepSeek V2: 1, V3: 2); 0:
    `moe_router_topk // moe_router_group_topk`, as Megatron has it."""
    moe_router_topk_scaling_factor: float | None = None
    """Multiplies the weights of the chosen experts; None: 1."""
    moe_router_enable_expert_bias: bool = False
    """A bias for each expert decides the choice, not the weights."""
    moe_router_bias: bool = False
    """The router's logits have a bias."""
    moe_apply_probs_on_input: bool = False
    """The one chosen expert's weight multiplies its input, not its output."""
    moe_shared_expert_intermediate_size: int = 0
    """Width of the expert that every token is sent to; 0: there is none."""
    moe_shared_expert_gate: bool = False
    """The shared expert's output is multiplied by the sigmoid of one logit."""
    multi_latent_attention: bool = False
    """Queries and keys come from low-rank latents (DeepSeek V2, arXiv 2405.04434)."""
    q_lora_rank: int = 0
    """Width of the queries' latent; 0: they come from the states."""
    kv_lora_rank: int = 0
    """Width of the latent of keys and values."""
    qk_head_dim: int = 0
    """Channels of a query or key head without position."""
    qk_pos_emb_head_dim: int = 0
    """Rotated channels of a query head, and of the one key that all heads share."""
    v_head_dim: int = 0
    """Channels of a value head."""
    latent_layernorm_epsilon: float | None = None
    """Of the norms of latents; None: `layernorm_epsilon`."""
    decoder_num_layers: int = 0
    """Layers of T5's decoder; 0 in the other families."""
    relative_attention_num_buckets: int = 32
    """Rows of the table of relative positions."""
    relative_attention_max_distance: int = 128
    """Distances from here on share the last bucket."""
    no_mixer_layers: tuple[int, ...] = ()
    """Layers without a mixer, which is attention or what stands in its place."""
    linear_mixer_layers: tuple[int, ...] = ()
    """Layers with one square matrix in attention's place."""
    mamba_layers: tuple[int, ...] = ()
    """Layers with Mamba-2 (arXiv 2405.21060) in attention's place."""
    no_mlp_layers: tuple[int, ...] = ()
    """Layers without an MLP or anything in its place."""
    linear_mlp_layers: tuple[int, ...] = ()
    """Layers with one square matrix in the MLP's place."""
    layer_query_groups: tuple[int, ...] = ()
    """Query groups of each layer, 0 where it has no attention; empty: `num_query_groups` in all."""
    layer_ffn_hidden_sizes: tuple[int, ...] = ()
    """Width of each layer's MLP, 0 where it has no plain one; empty: `ffn_hidden_size` in all."""
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    """Channels of a head of Mamba-2."""
    mamba_num_groups: int = 0
    """Heads of one group share what goes into the state, and what is read from it."""
    mamba_state_dim: int = 0
    """Numbers in the state of a channel."""
    mamba_conv_width: int = 0
    """Positions that the convolution before the scan looks at, its own included."""
    mamba_norm_epsilon: float | None = None
    """Epsilon of the gated norm behind the scan; None: 1e-5, Megatron's."""
    mamba_min_time_step: float = 0.0
    """Time steps are no shorter; transformers has a bound, Megatron none."""
    untie_embeddings_and_output_weights: bool = False
    apply_residual_connection_post_layernorm: bool = False
    """Take the residual after the norm: the original BERT order, the paper's Figure 7 (a)."""
    parallel_residual: bool = False
    """Attention and MLP side by side: x + attention(norm(x)) + MLP(norm(x)), a norm for each."""
    embedding_layernorm: bool = False
    """A norm over the word embeddings, before anything is added to them."""
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
        for name, most in _LARGEST:
            if getattr(self, name) > most:
                raise InputError(f"{name} is {getattr(self, name)}, more than any model has")
        if self.rope_scaling is not None:
            self._check_rope_scaling(self.rope_scaling)
        if self.yarn is not None:
            self._check_yarn(self.yarn)
        latent = self.multi_latent_attention  # which has a check of its own
        if self.rotary and not latent and self.rotated_channels % 2:
            raise InputError(
                f"rotary_percent {self.rotary_percent} of heads of {self.kv_channels} channels is "
                "an odd number of them, but they are rotated in pairs; correct it with --set "
                "rotary_percent=X"
            )
        self._check_layers()
        self._check_arrangement()
        self._check_branches()
        self._check_experts()
        self._check_latents()
        self._check_stacks()
        if self.num_query_groups < 1 or self.num_attention_heads % self.num_query_groups:
            raise InputError(
                f"num_query_groups {self.num_query_groups} does not divide "
                f"num_attention_heads {self.num_attention_heads}; correct it with --set"
            )
        for name, known in (
            ("family", MODEL_FAMILIES),
            ("activation", ACTIVATIONS),
            ("head_activation", ("gelu", "gelu_tanh")),
            ("position_embedding_type", POSITION_TYPES),
            ("normalization", ("LayerNorm", "RMSNorm")),
            ("softmax_type", SOFTMAX_TYPES),
            ("moe_router_score_function", SCORE_FUNCTIONS),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name} {getattr(self, name)!r} is not supported; known are "
                    f"{', '.join(known)}, to be chosen with --set {name}=..."
                )

    def _check_rope_scaling(self, scaling: RopeScaling) -> None:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if not 0 < low < high < 1e6:
            raise InputError(
                f"the rotary settings have low_freq_factor {low} and high_freq_factor {high}, of "
                "which the first must be above 0 and below the second; correct the file"
            )
        if not 1 <= scaling.original_max_position <= 1 << 40:
            raise InputError(
                "the rotary settings have original_max_position_embeddings "
                f"{scaling.original_max_position}, which must be at least 1; correct the file"
            )
        if not 1e-3 <= scaling.factor <= 1e6:
            raise InputError(
                f"rope_scaling_factor is {scaling.factor}, but must lie between 0.001 and 1e+06; "
                "correct it with --set rope_scaling_factor=X"
            )

    def _check_yarn(self, yarn: YarnScaling) -> None:
        for name, value, low in (
            ("factor", yarn.factor, 1e-3),
            ("original_max_position_embeddings", yarn.original_max_position, 1.0),
            ("beta_fast", yarn.beta_fast, 1e-3),
            ("beta_slow", yarn.beta_slow, 1e-3),
        ):
            if not low <= value <= 1e9:
                raise InputError(f"yarn {name} is {value}, but must lie between {low:g} and 1e9")
        if not self.rotary_base > 1.0:
            raise InputError(
                f"rotary_base is {self.rotary_base}, but YaRN needs a base above 1; correct it "
                "with --set rotary_base=X"
            )

    def _check_layers(self) -> None:
        for name in (
            "no_rope_layers",
            "window_layers",
            "moe_layers",
            "no_mixer_layers",
            "linear_mixer_layers",
            "mamba_layers",
            "no_mlp_layers",
            "linear_mlp_layers",
            "no_l2_norm_layers",
        ):
            layers = getattr(self, name)
            if list(layers) != sorted({n for n in layers if 0 <= n < self.num_layers}):
                raise InputError(
                    f"{name} is {','.join(map(str, layers))}, but must hold numbers of the "
                    f"{self.num_layers} layers, ascending from 0; correct it with --set {name}=0,2"
                )
        if self.rotary_base_local is not None and not (self.window_layers and self.rotary):
            raise InputError(
                f"rotary_base_local is {self.rotary_base_local}, but no rotary layer has a window; "
                "set window_size and window_layers too, with --set"
            )
        if self.branch_layernorm and (self.num_experts or self.family == "bert"):
            raise InputError(
                "branch_layernorm is true, but only dense GPT models have norms of their branches; "
                "correct it with --set branch_layernorm=false"
            )
        if bool(self.window_size) != bool(self.window_layers):
            raise InputError(
                f"window_size is {self.window_size} for {len(self.window_layers)} layer(s); set "
                "both window_size and window_layers, or neither, with --set"
            )

    def _check_arrangement(self) -> None:
        """Refuse parts that no model has together."""
        if self.parallel_residual and self.apply_residual_connection_post_layernorm:
            raise InputError(
                "parallel_residual and apply_residual_connection_post_layernorm exclude one "
                "another; turn one of them off with --set"
            )
        masked = self.window_layers or self.softmax_type != "vanilla"
        if self.alibi and (masked or self.family != "gpt" or self.multi_latent_attention):
            raise InputError(
                "position_embedding_type alibi goes with plain causal attention only, without "
                "windows, sinks or latents; correct it with --set"
            )

    def _check_branches(self) -> None:
        """Check that each branch of a layer is of one kind, and has the sizes of its kind."""
        for names in (
            ("no_mixer_layers", "linear_mixer_layers", "mamba_layers"),
            ("no_mlp_layers", "linear_mlp_layers", "moe_layers"),
        ):
            numbers = [number for name in names for number in getattr(self, name)]
            if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
                raise InputError(
                    f"layer {twice[0]} is in several of {', '.join(names)}; correct them with --set"
                )
        self._check_widths("layer_query_groups", "num_query_groups", self.mixer, "attention")
        self._check_widths(
            "layer_ffn_hidden_sizes", "ffn_hidden_size", self.feed_forward, "plain MLP"
        )
        for groups in self.layer_query_groups:
            if groups and self.num_attention_heads % groups:
                raise InputError(
                    f"layer_query_groups holds {groups}, which does not divide "
                    f"num_attention_heads {self.num_attention_heads}; correct it with --set"
                )
        special = self.branches_differ or bool(self.mamba_layers)
        if special and (self.family != "gpt" or self.alibi or self.parallel_residual):
            raise InputError(
                "layers without attention or MLP, with other things in their place or of widths of "
                "their own go with GPT models only, without ALiBi and parallel residuals; correct "
                "it with --set"
            )
        heads, kinds = self.mamba_num_heads, ("num_heads", "head_dim", "num_groups", "state_dim")
        for name in (*(f"mamba_{kind}" for kind in kinds), "mamba_conv_width"):
            if self.mamba_layers and getattr(self, name) < 1:
                raise InputError(
                    f"{name} is {getattr(self, name)}, but Mamba layers need at least 1; correct "
                    f"it with --set {name}=N"
                )
        if self.mamba_layers and heads % self.mamba_num_groups:
            raise InputError(
                f"mamba_num_groups {self.mamba_num_groups} does not divide mamba_num_heads {heads};"
                " correct it with --set"
            )

    def _check_widths(self, name: str, most: str, kind: Callable[[int], str], counted: str) -> None:
        """Check that a setting of each layer fits the layers, and the setting of the whole."""
        values = getattr(self, name)
        if not values:
            return
        layers = [kind(number) == counted for number in range(self.num_layers)]
        if [value > 0 for value in values] != layers or max(values) != getattr(self, most):
            raise InputError(
                f"{name} is {','.join(map(str, values))}, but must hold a number for each of "
                f"{self.num_layers} layers, 0 for those without {counted}, and {most} as the "
                "largest; correct it with --set"
            )

    def _check_experts(self) -> None:
        if not self.num_experts:
            if self.moe_layers:
                raise InputError("moe_layers needs num_experts; set it with --set num_experts=N")
            return
        groups, kept = self.moe_router_num_groups, self.moe_router_group_topk
        within = self.num_experts // groups if groups else 0  # experts of one group
        rules = (
            (1 <= self.moe_router_topk <= self.num_experts, "moe_router_topk", "1 to num_experts"),
            (self.moe_ffn_hidden_size >= 1, "moe_ffn_hidden_size", "at least 1"),
            (bool(groups) == bool(kept), "moe_router_group_topk", "set with moe_router_num_groups"),
            (
                not groups or (self.num_experts % groups == 0 and kept <= groups),
                "moe_router_num_groups",
                "a divisor of num_experts, and no less than moe_router_group_topk",
            ),
            (
                not kept or 1 <= self.group_experts <= within,
                "moe_router_group_topk",
                "at most moe_router_topk, with as many experts in the kept groups",
            ),
            (
                not kept or self.moe_router_topk <= kept * within,
                "moe_router_topk",
                "at most the number of experts in the kept groups",
            ),
            (
                not self.moe_apply_probs_on_input or self.moe_router_topk == 1,
                "moe_apply_probs_on_input",
                "false unless moe_router_topk is 1",
            ),
            (
                not self.moe_router_enable_expert_bias
                or self.moe_router_score_function == "sigmoid",
                "moe_router_enable_expert_bias",
                "false unless moe_router_score_function is sigmoid",
            ),
        )
        for holds, name, bounds in rules:
            if not holds:
                raise InputError(
                    f"{name} is {getattr(self, name)}, but must be {bounds}; correct it with --set"
                )

    def _check_latents(self) -> None:
        if not self.multi_latent_attention:
            return
        for name in ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name} is {getattr(self, name)}, but multi-latent attention needs at least "
                    f"1; correct it with --set {name}=N"
                )
        if self.qk_pos_emb_head_dim % 2:
            raise InputError(
                f"qk_pos_emb_head_dim is {self.qk_pos_emb_head_dim}, but channels are rotated in "
                "pairs; correct it with --set qk_pos_emb_head_dim=N"
            )

    def _check_stacks(self) -> None:
        """Check what T5 has and the other families have not, and the other way round."""
        t5 = self.family == "t5"
        if t5 != bool(self.decoder_num_layers):
            raise InputError(
                f"decoder_num_layers is {self.decoder_num_layers}, but must be "
                f"{'at least 1' if t5 else '0'} in a model of family {self.family}; correct it "
                "with --set decoder_num_layers=N"
            )
        if self.position_embedding_type == "relative":
            if not t5:
                raise InputError(
                    f"position_embedding_type is relative, which family {self.family} does not "
                    "have; correct it with --set position_embedding_type=..."
                )
            # Half of the buckets are for keys behind the query, half of those for each distance.
            exact = self.relative_attention_num_buckets // 2
            if self.relative_attention_max_distance <= exact:
                raise InputError(
                    f"relative_attention_max_distance is {self.relative_attention_max_distance}, "
                    f"but must be more than {exact}, half of the buckets; correct it with --set "
                    "relative_attention_max_distance=N"
                )
        if t5 and self.num_query_groups != self.num_attention_heads:
            raise InputError(
                f"num_query_groups is {self.num_query_groups}, but cross-attention has a key head "
                f"for each of {self.num_attention_heads} query heads; correct it with --set "
                f"num_query_groups={self.num_attention_heads}"
            )
        known = (f"{self.activation} activations", "scaled embeddings or logits")
        more = [what for what in self.parts_beyond_dense if what not in known]
        more += [self.beyond_megatron] if self.beyond_megatron else []
        more += ["norms of queries and keys"] * self.qk_layernorm
        more += ["residuals after the norms"] * self.apply_residual_connection_post_layernorm
        if t5 and more:
            raise InputError(f"a T5 model with {more[0]} is not supported")

    @property
    def gated(self) -> bool:
        """Whether fc1 holds a gate and an up branch."""
        return self.activation in GATED_ACTIVATIONS

    @property
    def learned_positions(self) -> bool:
        """Whether there is a table of position embeddings."""
        return "learned_absolute" in self.position_embedding_type

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated."""
        return "rope" in self.position_embedding_type

    @property
    def alibi(self) -> bool:
        """Whether a line over the keys' positions is added to the scores."""
        return self.position_embedding_type == "alibi"

    @property
    def relative_positions(self) -> bool:
        """Whether self-attention adds a bias for the distance of query and key."""
        return self.position_embedding_type == "relative"

    @property
    def block(self) -> str:
        """Canonical prefix of the layers, as in core: `encoder` for BERT and T5's first stack."""
        return "decoder" if self.family == "gpt" else "encoder"

    @property
    def group_experts(self) -> int:
        """Best experts of a group of experts that it counts by; 0 without groups."""
        usual = self.moe_router_topk // max(self.moe_router_group_topk, 1)
        return (self.moe_router_group_experts or usual) if self.moe_router_num_groups else 0

    @property
    def qkv_size(self) -> int:
        """Rows of the packed QKV weight: (n + 2 ng) hn, (2 n + 2 ng) hn with output gates."""
        heads = self.num_attention_heads * (2 if self.attention_output_gate else 1)
        return (heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def rotated_channels(self) -> int:
        """Channels of a head that are rotated by position."""
        if self.multi_latent_attention:
            return self.qk_pos_emb_head_dim
        return int(self.kv_channels * self.rotary_percent)

    @property
    def attention_width(self) -> int:
        """Width of the attention's output before its projection."""
        channels = self.v_head_dim if self.multi_latent_attention else self.kv_channels
        return self.num_attention_heads * channels

    def mixer(self, layer: int) -> str:
        """Return what a layer has first: `attention`, `mamba`, `linear` or `none`."""
        kinds = {
            "none": self.no_mixer_layers,
            "linear": self.linear_mixer_layers,
            "mamba": self.mamba_layers,
        }
        return next((kind for kind, layers in kinds.items() if layer in layers), "attention")

    def feed_forward(self, layer: int) -> str:
        """Return what a layer has second: `plain MLP`, `experts`, `linear` or `none`."""
        kinds = {
            "none": self.no_mlp_layers,
            "linear": self.linear_mlp_layers,
            "experts": self.moe_layers,
        }
        return next((kind for kind, layers in kinds.items() if layer in layers), "plain MLP")

    def of_layer(self, layer: int) -> ModelConfig:
        """Return the settings of a model all of whose layers are as wide as this one."""
        if not self.layer_query_groups and not self.layer_ffn_hidden_sizes:
            return self
        widths: dict[str, Any] = {}
        if self.layer_query_groups and self.layer_query_groups[layer]:
            widths["num_query_groups"] = self.layer_query_groups[layer]
        if self.layer_ffn_hidden_sizes and self.layer_ffn_hidden_sizes[layer]:
            widths["ffn_hidden_size"] = self.layer_ffn_hidden_sizes[layer]
        return dataclasses.replace(self, layer_query_groups=(), layer_ffn_hidden_sizes=(), **widths)

    @property
    def branches_differ(self) -> bool:
        """Whether layers lack a branch, have a matrix in its place, or are of other widths."""
        return bool(
            self.no_mixer_layers
            or self.linear_mixer_layers
            or self.no_mlp_layers
            or self.linear_mlp_layers
            or self.layer_query_groups
            or self.layer_ffn_hidden_sizes
        )

    @property
    def mamba_width(self) -> int:
        """Channels of all heads of Mamba-2."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_parts(self) -> tuple[tuple[int, int], ...]:
        """Packed rows of Mamba-2's first matrix, z, x, B, C, dt: of each its size and its units.

        A unit is a head, or of B and C a group. The convolution has x, B and C.
        """
        heads, groups, width = self.mamba_num_heads, self.mamba_num_groups, self.mamba_width
        states = (groups * self.mamba_state_dim, groups)
        return ((width, heads), (width, heads), states, states, (heads, heads))

    @property
    def beyond_dense(self) -> str | None:
        """What the model has that a plain dense model has not, in words; None: nothing."""
        return next(iter(self.parts_beyond_dense), None)

    @property
    def parts_beyond_dense(self) -> tuple[str, ...]:
        """All that the model has and a plain dense model has not, in words."""
        parts = {
            "a mixture of experts": bool(self.num_experts),
            "latent attention": self.multi_latent_attention,
            "Mamba layers": bool(self.mamba_layers),
            "layers of different kinds": self.branches_differ,
            "windows of attention": bool(self.window_layers),
            "layers without rotary positions": bool(self.no_rope_layers),
            "capped attention scores or logits": self.attn_logit_softcapping is not None
            or self.final_logit_softcapping is not None,
            "scaled embeddings or logits": (self.embedding_multiplier, self.logit_multiplier)
            != (1.0, 1.0),
            "norms of its branches": self.branch_layernorm,
            "a rotary base of its windowed layers": self.rotary_base_local is not None,
            "attention sinks": self.softmax_type != "vanilla",
            "gates of the attention's output": self.attention_output_gate,
            "L2-normed queries and keys": self.qk_l2_norm,
            "L2 norms in some layers only": bool(self.no_l2_norm_layers),
            "YaRN": self.yarn is not None,
            f"{self.activation} activations": self.gated and self.activation != "swiglu",
            "clamped or shifted activations": self.activation_func_clamp_value is not None
            or bool(self.glu_linear_offset),
        }
        return tuple(what for what, there in parts.items() if there)

    @property
    def beyond_megatron(self) -> str | None:
        """What the model has that no model of Megatron-LM has, in words; None: nothing."""
        parts = {
            PARALLEL_RESIDUAL: self.parallel_residual,
            "ALiBi positions": self.alibi,
            "norm of the embeddings": self.embedding_layernorm,
        }
        return next((what for what, there in parts.items() if there), None)

    @property
    def dense_layers(self) -> int:
        """Number of the layers that have a plain MLP."""
        others = (*self.moe_layers, *self.no_mlp_layers, *self.linear_mlp_layers)
        return self.num_layers - len(others)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


NEWER_SETTINGS = frozenset(
    """decoder_num_layers relative_attention_num_buckets relative_attention_max_distance
    yarn rotary_base_local no_rope_layers window_size window_layers softmax_type
    attn_logit_softcapping final_logit_softcapping embedding_multiplier logit_multiplier
    branch_layernorm attention_output_gate
    activation_func_clamp_value glu_linear_offset qk_l2_norm no_l2_norm_layers
    num_experts moe_layers
    moe_ffn_hidden_size moe_router_topk moe_router_score_function moe_router_pre_softmax
    moe_router_num_groups moe_router_group_topk moe_router_group_experts
    moe_router_topk_scaling_factor latent_layernorm_epsilon
    moe_router_enable_expert_bias moe_router_bias moe_apply_probs_on_input
    moe_shared_expert_intermediate_size moe_shared_expert_gate multi_latent_attention q_lora_rank
    kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim parallel_residual
    embedding_layernorm no_mixer_layers linear_mixer_layers
    mamba_layers no_mlp_layers linear_mlp_layers layer_query_groups layer_ffn_hidden_sizes
    mamba_num_heads mamba_head_dim mamba_num_groups mamba_state_dim mamba_conv_width
    mamba_norm_epsilon mamba_min_time_step""".split()
)
"""Settings of megatron-core's newer layers, which most models have at their defaults."""

SETTING_KINDS = {f.name: str(f.type).split(" | ")[0] for f in dataclasses.fields(ModelConfig)}
"""The type of each setting: a key of `_KINDS`, but for `rope_scaling` and `yarn`."""

# Also accepted by --set; the readers use them before there is a config.
READER_SETTINGS = {
    "checkpoint_version": "float",
    "rope_scaling_factor": "float",
    "mla_yarn": "str",
    "moe_aux_loss_coeff": "float",
    "moe_z_loss_coeff": "float",
}


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
    "tuple[int, ...]": "comma-separated whole numbers",
}


def is_of_kind(value: Any, kind: str) -> bool:
    """Return whether a value is of a kind: a key of `_KINDS`; a `float` may be a whole number."""
    if kind == "tuple[int, ...]":
        return isinstance(value, tuple) and all(is_of_kind(number, "int") for number in value)
    types = {"int": int, "float": int | float, "bool": bool, "str": str}
    if not isinstance(value, types[kind]) or isinstance(value, bool) != (kind == "bool"):
        return False
    if isinstance(value, str):
        return len(value) <= _LONGEST_WORD
    return abs(value) < _LARGEST_NUMBER if isinstance(value, int) else math.isfinite(value)


_LONGEST_WORD = 10_000
_LARGEST_NUMBER = 1 << 62


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
        if kind == "tuple[int, ...]":
            return tuple(int(number) for number in text.split(",") if number.strip())
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
            told, value, source = value, self.overrides[name], "--set"
            if name == "max_position_embeddings" and type(told) is int and value > told:
                self.warnings.append(
                    f"--set {name}={value} goes beyond the {told} positions that the checkpoint "
                    "tells; nothing says that the model was trained on later ones"
                )
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
        channels, latent = config.kv_channels, config.multi_latent_attention
        if latent:
            channels = config.qk_head_dim + config.qk_pos_emb_head_dim
        scale, usual = config.softmax_scale, channels**-0.5
        if scale is not None and math.isclose(scale, usual, rel_tol=1e-6):
            config = dataclasses.replace(config, softmax_scale=None)
        config = dataclasses.replace(config, **_unused_routing(config))
        if config.latent_layernorm_epsilon == config.layernorm_epsilon or not latent:
            config = dataclasses.replace(config, latent_layernorm_epsilon=None)
        if not config.rotary:
            defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
            unused = {name: defaults[name] for name in ROTARY_SETTINGS}
            config = dataclasses.replace(config, **unused)
        if not config.relative_positions:
            config = dataclasses.replace(
                config, relative_attention_num_buckets=32, relative_attention_max_distance=128
            )
        self.config = config
        return self


def _unused_routing(c: ModelConfig) -> dict[str, Any]:
    """Return settings of a router that act on nothing, at their defaults."""
    unused: dict[str, Any] = {}
    if not c.num_experts:
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
        return {name: value for name, value in defaults.items() if name.startswith("moe_")}
    if c.moe_router_score_function == "sigmoid":
        unused["moe_router_pre_softmax"] = False
    if c.moe_router_topk_scaling_factor == 1.0:
        unused["moe_router_topk_scaling_factor"] = None
    if c.moe_router_num_groups == c.moe_router_group_topk:  # all groups are kept
        unused |= dict.fromkeys(
            ("moe_router_num_groups", "moe_router_group_topk", "moe_router_group_experts"), 0
        )
    elif c.moe_router_group_experts == c.moe_router_topk // c.moe_router_group_topk:
        unused["moe_router_group_experts"] = 0
    return unused
