"""How a checkpoint is laid out when Megatron's formats are written: names, parallel sizes, rows.

What Megatron could not load again is refused here, before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig, RopeScaling, yarn_mscale
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.megatron.layers.branches import lacking_branches
from mlm_eval.checkpoints.parameters import WORD_EMBEDDINGS, allowed_tp, check_tp
from mlm_eval.checkpoints.tokenizer import check_entries
from mlm_eval.checkpoints.tokenizers.tokenizer_type import LEGACY_TYPES

if TYPE_CHECKING:
    import torch

NAMES = ("core", "legacy")

DEFAULT_DIVISIBLE_BY = 128
"""Megatron's default of --make-vocab-size-divisible-by."""


@dataclass(frozen=True)
class ExpertLayout:
    """How experts lie over the tensor-parallel ranks of a pipeline stage, in the `torch` format.

    A rank holds one in `ep` experts, by local numbers, and of each of them one in `etp` parts of
    its width. Its folder is named after its tensor-parallel and its expert-parallel rank. Megatron
    writes those of the first `etp * ep` ranks alone, which hold all experts; what a run loads are
    the folders of all its ranks.
    Source: docs/megatron.md, "Mixtures of experts".
    """

    tp: int
    ep: int
    """Expert-parallel size: each rank holds one in so many experts, neighbours together."""
    etp: int
    """Expert-tensor-parallel size: so many ranks share the width of an expert."""

    @classmethod
    def of(cls, args: Mapping[str, Any], tp: int) -> ExpertLayout:
        """Return the layout that args say; before core 0.10 experts were cut as all else is."""
        ep = args.get("expert_model_parallel_size") or 1
        return cls(tp, ep, args.get("expert_tensor_parallel_size") or tp)

    @property
    def ranks(self) -> int:
        """The least number of ranks in a pipeline stage."""
        return math.lcm(self.tp, self.etp * self.ep)

    def folders(self) -> list[tuple[int, int]]:
        """Return the (tensor, expert) ranks of a stage's folders, in the order of its ranks."""
        return [(rank % self.tp, rank // self.etp % self.ep) for rank in range(self.ranks)]

    def holder(self, expert_rank: int, part: int) -> tuple[int, int]:
        """Return the (tensor, expert) ranks of the folder with a part of some experts."""
        return (expert_rank * self.etp + part) % self.tp, expert_rank

    def check(self, where: str, present: Collection[tuple[int, int]]) -> None:
        """Refuse folders in which a part of the model is missing because none was written of it.

        Args:
            where: The checkpoint, for messages.
            present: The (tensor, expert) ranks of the folders that are there.

        Raises:
            InputError: No folder of some tensor-parallel rank was ever written.
        """
        if self.etp < 1 or self.tp % self.etp:
            raise InputError(
                f"{where}: its args say expert-tensor size {self.etp} for a tensor-parallel size "
                f"of {self.tp}, which it must divide; the file is damaged, copy it again"
            )
        written = self.folders()[: self.etp * self.ep]
        lost = sorted({t for t, _ in self.folders()} - {t for t, _ in written})
        if lost and not set(present) >= set(self.folders()):
            raise InputError(
                f"{where} is only a part of its model: with tensor-parallel size {self.tp}, "
                f"expert-tensor size {self.etp} and expert size {self.ep} Megatron writes no "
                f"folder of the tensor-parallel ranks from {lost[0]} on, so their attention is on "
                "no disk; save the run in the torch_dist format, which is whole"
            )


@dataclass(frozen=True)
class SaveLayout:
    """How a checkpoint is laid out in files."""

    names: str
    """`core` (megatron-core's) or `legacy` (those of checkpoint version 3.0)."""
    experts: ExpertLayout
    """Tensor-parallel size, and how experts lie over the ranks."""
    pp: int
    vocab_size: int
    """Rows of the vocabulary in all files together."""
    divisible_by: int
    """Megatron's `make_vocab_size_divisible_by`: with `tp` it gives `vocab_size` again."""
    iteration: int | None
    """None: a release."""
    dtype: torch.dtype | None
    """Dtype of the weights; None keeps that of each."""
    params_dtype: torch.dtype
    """Dtype of the word embeddings, for the args."""
    notes: tuple[str, ...] = ()
    """Why the names are not the source's."""
    warnings: tuple[str, ...] = ()
    """What keeps Megatron from loading the files."""

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.experts.tp


class LayoutOptions(TypedDict, total=False):
    """The options of both writers that decide about the layout."""

    tp: int
    """Tensor-parallel size, 1 by default; must divide the heads and the MLP's width."""
    pp: int
    """Pipeline stages, 1 by default; must divide the layers."""
    ep: int
    """Expert-parallel size, 1 by default; must divide the experts."""
    etp: int | None
    """Ranks that share an expert's width; None: `tp`, or 1 where experts have biases, because
    megatron-core takes these whole only. Must divide `tp`."""
    dtype: torch.dtype | None
    """Dtype of the weights; None keeps that of each."""
    iteration: int | str | None
    """A number or `release`; None: the source's, `release` where it has none."""
    true_vocab_size: int | None
    """Size of the tokenizer's vocabulary, where it is known."""
    added_entries: int
    """Entries that Megatron's own tokenizer has beyond those: see `tokenizer_type`."""
    make_vocab_size_divisible_by: int | None
    """Megatron's divisor; see `padded_vocabulary`."""


def save_layout(
    checkpoint: Checkpoint, names: str | None, **options: Unpack[LayoutOptions]
) -> SaveLayout:
    """Return the layout that a writer was asked for.

    Raises:
        InputError: Megatron has no such model, or could not load it at these sizes.
    """
    config, source = checkpoint.config, checkpoint.provenance
    chosen = choose_names(config, names, source=source.names)
    tp, pp, dtype = options.get("tp", 1), options.get("pp", 1), options.get("dtype")
    check_sizes(config, tp, pp, chosen)
    experts = _expert_layout(config, tp, options.get("ep", 1), options.get("etp"))
    iteration = options.get("iteration")
    iteration = source.iteration if iteration is None else iteration
    true_size = options.get("true_vocab_size")
    rows, divisor = padded_vocabulary(
        checkpoint,
        tp,
        true_size,
        options.get("make_vocab_size_divisible_by"),
        added=options.get("added_entries", 0),
        for_v25=is_for_v25(config, names, source=source.names),
    )
    notes, warnings = [], []
    lacking = _lacking_in_v25(config)
    if chosen == "core" and names is None and source.names == "legacy":
        notes = [f"megatron-core's names: Megatron v2.5, whose the source's are, has no {lacking}"]
    elif chosen == "legacy" and lacking:
        warnings = [
            f"no release of Megatron-LM has this model: megatron-core has no "
            f"{lacking_in_core(config)}, and v2.5, whose names the files have, no {lacking}"
        ]
    elif chosen == "legacy":
        warnings = _doubts_of_v25(checkpoint, tp, rows, divisor, known=true_size is not None)
    return SaveLayout(
        names=chosen,
        experts=experts,
        pp=pp,
        vocab_size=rows,
        divisible_by=divisor,
        iteration=None if iteration in (None, "release") else int(iteration),
        dtype=dtype,
        params_dtype=dtype or checkpoint.tensors[WORD_EMBEDDINGS].dtype,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _expert_layout(config: ModelConfig, tp: int, ep: int, etp: int | None) -> ExpertLayout:
    """Return how the experts are laid out.

    Raises:
        InputError: There are none, or a size does not divide them.
    """
    count, width = config.num_experts, config.moe_ffn_hidden_size
    if not count:
        if ep != 1 or etp not in (None, tp):
            raise InputError("--ep and --etp are for mixtures of experts; leave them out")
        return ExpertLayout(tp, 1, tp)
    if ep < 1 or count % ep:
        allowed = [n for n in range(1, count + 1) if count % n == 0]
        raise InputError(
            f"cannot deal {count} experts to ep={ep} expert-parallel ranks; this model allows ep "
            f"in {', '.join(map(str, allowed))}"
        )
    if config.add_bias_linear and etp not in (None, 1):
        raise InputError(
            f"cannot share an expert over etp={etp} ranks: megatron-core has experts with biases "
            "on one rank only; leave --etp out"
        )
    if etp is None:
        etp = 1 if config.add_bias_linear else tp
    if etp < 1 or tp % etp or width % etp:
        allowed = [n for n in range(1, tp + 1) if tp % n == 0 and width % n == 0]
        raise InputError(
            f"cannot share experts of width {width} over etp={etp} ranks at tp={tp}, of which etp "
            f"must be a divisor; it allows etp in {', '.join(map(str, allowed))}"
        )
    return ExpertLayout(tp, ep, etp)


def _doubts_of_v25(
    checkpoint: Checkpoint, tp: int, rows: int, divisor: int, *, known: bool
) -> list[str]:
    """Return what may keep Megatron v2.5 from loading files with its names."""
    doubts = []
    kind = checkpoint.provenance.args.get("tokenizer_type")
    if kind not in LEGACY_TYPES:
        what = "the source names no tokenizer" if kind is None else f"the tokenizer is a {kind}"
        doubts = [f"{what}, and Megatron v2.5 loads with {', '.join(LEGACY_TYPES)} only"]
        if kind is None:
            doubts[0] += "; give --tokenizer"
    multiple = divisor * tp
    fewest = checkpoint.config.vocab_size - _saved_multiple(checkpoint) + 1
    if not known and -(-fewest // multiple) * multiple != rows:
        doubts.append(
            f"all {rows:,} rows of the vocabulary stay, where Megatron v2.5 takes the multiple of "
            f"{divisor} x {tp} that just holds its tokenizer's entries; give --tokenizer, without "
            "--vocab padded"
        )
    return doubts


def saved_ep(checkpoint: Checkpoint) -> int:
    """Return the expert-parallel size of the run that saved a checkpoint."""
    saved = checkpoint.provenance.args.get("expert_model_parallel_size")
    return saved if checkpoint.config.num_experts and isinstance(saved, int) and saved > 0 else 1


def choose_names(config: ModelConfig, names: str | None, *, source: str | None = None) -> str:
    """Return `core` or `legacy`: as asked for, else as the source has them.

    Legacy names are those of v2.5, and that version must be able to run the model. Where neither
    was asked for, a model that v2.5 lacks gets megatron-core's, and one that both lack (a head for
    question answering, say) v2.5's with what is beyond them.

    Args:
        config: The model.
        names: What was asked for.
        source: The names that the source has.

    Raises:
        InputError: Megatron has no such model under the names asked for, or under any.
    """
    assert names in (None, *NAMES), names
    if config.beyond_megatron:
        raise InputError(
            f"Megatron-LM has no model with {config.beyond_megatron}, so its formats cannot hold "
            "this one; keep the format that it has, or convert it --to hf"
        )
    not_core, not_v25, not_later = (
        lacking(config) for lacking in (lacking_in_core, _lacking_in_v25, _lacking_in_legacy)
    )
    if names is None:
        if source == "legacy" and not not_v25:
            return "legacy"
        if not not_core:
            return "core"
        if not not_later:
            return "legacy"
        raise InputError(
            f"Megatron-LM has no such model (megatron-core has no {not_core}, the code before it "
            f"no {not_later}), so its names cannot hold this model; keep the format it has"
        )
    lacking = not_v25 if names == "legacy" else not_core
    if lacking:
        what = "Megatron v2.5" if names == "legacy" else "megatron-core"
        other, possible = ("core", not not_core) if names == "legacy" else ("legacy", not not_v25)
        way_out = "keep the format it has" if not_later else "leave out --names"
        if possible:
            way_out = f"write {other} names"
        raise InputError(f"{what} has no {lacking}, so its names cannot hold this model; {way_out}")
    return names


def is_for_v25(config: ModelConfig, names: str | None, *, source: str | None = None) -> bool:
    """Whether Megatron v2.5 is to load what is written; see `choose_names`."""
    chosen = choose_names(config, names, source=source)
    return chosen == "legacy" and _lacking_in_v25(config) is None


def lacking_in_core(c: ModelConfig) -> str | None:
    """Return what megatron-core does not have, or None."""
    if c.apply_residual_connection_post_layernorm:
        return "residual connection after the norm (BERT's original order)"
    if c.num_classes or c.multichoice_head or c.qa_head:
        return "task heads (classification, multiple choice, question answering)"
    if c.family == "bert" and not c.lm_head:
        return "BERT without a language-model head"
    if c.family == "bert" and c.pooler != c.binary_head:
        return "pooler without a binary head"
    if c.family == "bert" and c.head_activation != "gelu":
        return "tanh GELU in BERT's language-model head"
    if c.activation == "gelu_tanh" and not c.add_bias_linear:
        return "tanh GELU without biases"
    if c.position_embedding_type == "learned_absolute+rope":
        return "learned and rotary positions together"
    if c.family == "bert" and c.position_embedding_type != "learned_absolute":
        return "BERT without learned positions"
    latents = c.multi_latent_attention
    if c.qk_layernorm and c.qk_layernorm_bias != (c.normalization == "LayerNorm") and not latents:
        return "norm of queries and keys that differs in kind from the other norms"
    return _newer_lacking_in_core(c) or lacking_branches(c) or _lacking_anywhere(c)


def _newer_lacking_in_core(c: ModelConfig) -> str | None:
    """Return what megatron-core does not have of experts, latent attention and activations.

    Source: megatron/core/transformer/transformer_config.py, mlp.py and moe (core 0.16).
    """
    usual = float((c.qk_head_dim + c.qk_pos_emb_head_dim or 1) ** -0.5)
    lacking = {
        "tanh GELU in experts": c.activation in ("gelu_tanh", "geglu_tanh") and c.num_experts,
        "clamped or shifted tanh GEGLU": c.activation == "geglu_tanh"
        and (c.activation_func_clamp_value is not None or c.glu_linear_offset),
        "bias in a router beside linear layers without": c.moe_router_bias
        and not c.add_bias_linear,
        "softmax over one chosen expert": c.num_experts
        and c.moe_router_topk == 1
        and c.moe_router_score_function == "softmax"
        and not c.moe_router_pre_softmax,
        "latent attention with gates of its output": c.multi_latent_attention
        and c.attention_output_gate,
        "latent attention with L2-normed queries and keys": c.multi_latent_attention
        and c.qk_l2_norm,
        "latent attention with a factor of scores of its own": c.multi_latent_attention
        and not math.isclose(c.softmax_scale or usual, _latent_scale(c), rel_tol=1e-6),
    }
    return next((what for what, lacks in lacking.items() if lacks), None)


def _latent_scale(c: ModelConfig) -> float:
    """Return the factor of scores that latent attention has of its sizes and its YaRN.

    Source: docs/megatron.md, "Multi-latent attention".
    """
    usual = float((c.qk_head_dim + c.qk_pos_emb_head_dim) ** -0.5)
    if c.yarn is None:
        return usual
    return usual * yarn_mscale(c.yarn.factor, c.yarn.mscale_all_dim or 0.0) ** 2


def _lacking_in_v25(c: ModelConfig) -> str | None:
    """Return what Megatron v2.5 (August 2021) does not have, or None."""
    lacking = {
        "rotary positions": c.rotary,
        "model without learned positions": c.position_embedding_type != "learned_absolute",
        "RMSNorm": c.normalization != "LayerNorm",
        "zero-centred gains (apply_layernorm_1p)": c.layernorm_zero_centered_gamma,
        "SwiGLU": c.activation == "swiglu",
        f"activation {c.activation}": c.activation not in ("gelu", "gelu_tanh"),
        "grouped-query attention": c.num_query_groups != c.num_attention_heads,
        "linear layers without biases": not (c.add_bias_linear and c.add_qkv_bias),
        "norm of queries and keys": c.qk_layernorm,
        "output table of its own (untied embeddings)": c.lm_head
        and c.untie_embeddings_and_output_weights,
        "head for question answering": c.qa_head,
    }
    if c.family == "bert":
        # A language model has both heads of pre-training and what these need, or the one alone; a
        # model for a task is an encoder with two token types and a pooler.
        whole = (c.num_tokentypes, c.pooler) == (2, True)
        bare = (c.num_tokentypes, c.pooler) == (0, False)
        lacking |= {
            "BERT without a pooler or without two token types": not whole
            and not (c.lm_head and not c.binary_head),
            "binary head without a language-model head": c.binary_head and not c.lm_head,
            "pooler or token types without a binary head": c.lm_head
            and not c.binary_head
            and not bare,
        }
    return next((what for what, lacks in lacking.items() if lacks), _lacking_in_legacy(c))


def _lacking_in_legacy(c: ModelConfig) -> str | None:
    """Return what no legacy model up to core 0.17 has, heads for question answering aside."""
    if c.family == "t5":
        return "T5 with the layers of megatron-core"
    if c.beyond_dense:
        return c.beyond_dense
    if c.activation == "relu":
        return "ReLU, only its square"
    if c.qk_layernorm:
        return "norm of queries and keys"
    if c.softmax_scale is not None:
        return "attention scale of its own"
    if c.rotary:
        # Its models make their tables of angles without these settings, whatever args say.
        if c.rotary_base != 10000.0:
            return "rotary base but 10000"
        if c.rotary_interleaved:
            return "interleaved rotary pairs"
        if c.rope_scaling is not None:
            return "scaling of rotary frequencies"
    if c.family == "bert" and needs_openai_gelu(c) != (c.head_activation == "gelu_tanh"):
        return f"BERT with {c.activation} in the MLP and {c.head_activation} in the head"
    return _lacking_anywhere(c)


def _lacking_anywhere(c: ModelConfig) -> str | None:
    scaling = c.rope_scaling
    if scaling is not None and RopeScaling(factor=scaling.factor) != scaling:
        return "rotary scaling with other constants than Llama 3.1's"
    if c.add_bias_linear and not c.add_qkv_bias and not c.multi_latent_attention:
        return "linear biases everywhere but in the QKV projection"
    return None


def needs_openai_gelu(c: ModelConfig) -> bool:
    """Whether legacy code needs `openai_gelu`: tanh in the MLP that the fused kernel cannot give.

    The fused kernel needs a bias, and leaves BERT's head at erf; `openai_gelu` makes both tanh.
    """
    if c.activation != "gelu_tanh":
        return False
    return not c.add_bias_linear or (c.family == "bert" and c.head_activation == "gelu_tanh")


def check_sizes(config: ModelConfig, tp: int, pp: int, names: str) -> None:
    """Refuse parallel sizes that Megatron could not load the model at.

    Raises:
        InputError: `tp` does not fit the heads, the MLP or the query groups, or `pp` the layers.
    """
    if tp < 1 or pp < 1:
        raise InputError(f"cannot write tp={tp} x pp={pp} files; both must be at least 1")
    check_tp(config, tp)
    groups = config.num_query_groups
    # With fewer groups than ranks megatron-core keeps even cuts of the packed rows and gathers them
    # when it runs.
    fitting = [
        n for n in allowed_tp(config) if groups % n == 0 or (names == "core" and n % groups == 0)
    ]
    if tp not in fitting:
        rule = "tp must divide them" if names == "legacy" else "one must divide the other"
        raise InputError(
            f"cannot write tp={tp} files with {names} names: the model has "
            f"{groups} query groups, and {rule}; it allows tp in {', '.join(map(str, fitting))}"
        )
    for what, width in _latent_widths(config).items():
        if width % tp:
            allowed = [n for n in allowed_tp(config) if width % n == 0]
            raise InputError(
                f"cannot write tp={tp} files: megatron-core's local layers cut {what} of width "
                f"{width} over the ranks; it allows tp in {', '.join(map(str, allowed))}"
            )
    if config.family == "t5" and pp > 1:
        raise InputError(
            f"cannot write a T5 in pp={pp} pipeline stages: megatron-core's pretrain_t5.py has "
            "none; leave --pp out"
        )
    if config.mamba_layers and config.mamba_num_groups % tp:
        raise InputError(
            f"cannot write tp={tp} files: Megatron wants tp to divide Mamba's "
            f"{config.mamba_num_groups} groups"
        )
    if config.num_layers % pp:
        allowed = [n for n in range(1, config.num_layers + 1) if config.num_layers % n == 0]
        raise InputError(
            f"cannot split {config.num_layers} layers over pp={pp} pipeline stages; "
            f"this model allows pp in {', '.join(map(str, allowed))}"
        )
    ends = range(config.num_layers // pp - 1, config.num_layers, config.num_layers // pp)
    bare = [n for n in ends if config.mixer(n) == config.feed_forward(n) == "none"]
    if pp > 1 and bare:
        raise InputError(
            f"cannot write pp={pp} stages: layer {bare[0]}, the last of its stage, has neither "
            "attention nor MLP, so that no file would tell of it; use another pp"
        )


def _latent_widths(c: ModelConfig) -> dict[str, int]:
    if not c.multi_latent_attention:
        return {}
    return {
        "the latent of keys and values, with its rotated key,": c.kv_lora_rank
        + c.qk_pos_emb_head_dim,
        "the latent of queries": c.q_lora_rank,
    }


def padded_vocabulary(
    checkpoint: Checkpoint,
    tp: int,
    true_size: int | None,
    divisible_by: int | None,
    *,
    added: int = 0,
    for_v25: bool = False,
) -> tuple[int, int]:
    """Return (rows to store, `make_vocab_size_divisible_by` that goes with them) for `tp` ranks.

    With a true size, or a divisor, given: Megatron's formula, the smallest multiple of divisor x tp
    that holds the vocabulary; the divisor is the source's unless given, 128 without one.

    With neither: the stored rows are kept exactly where `tp` divides them, so that changing tp back
    and forth loses nothing; the divisor then becomes the one from which Megatron's formula gives
    this same number of rows for any true size that the source may have had. Rows that `tp` does not
    divide are padded by the formula. So they all are for Megatron v2.5, with the source's divisor,
    because that version refuses another one than its run's.

    Args:
        checkpoint: With the stored rows, and the args of its source.
        tp: Ranks to write for.
        true_size: Entries of the tokenizer.
        divisible_by: The divisor.
        added: Entries that Megatron's own tokenizer has beyond `true_size`.
        for_v25: Megatron v2.5 is to load the files.

    Raises:
        InputError: `true_size` is more than there are rows, or a size is not positive.
    """
    rows = checkpoint.config.vocab_size
    if true_size is not None:
        check_entries(true_size, rows)
    if divisible_by is not None and divisible_by < 1:
        raise InputError(f"make_vocab_size_divisible_by is {divisible_by}; it must be at least 1")
    given = true_size is not None or divisible_by is not None
    if not given and not for_v25 and rows % tp == 0:
        return rows, math.lcm(_saved_multiple(checkpoint), tp) // tp
    saved = _saved_divisor(checkpoint)
    if for_v25 and saved == 1 and checkpoint.provenance.names != "legacy":
        saved = None  # a conversion that left its rows as they were; no run of v2.5's time had it
    divisor = divisible_by or saved or DEFAULT_DIVISIBLE_BY
    multiple = divisor * tp
    entries = rows if true_size is None else true_size + added
    return -(-entries // multiple) * multiple, divisor


def layout_with_same_rows(
    checkpoint: Checkpoint,
    tp: int,
    *,
    names: str | None = None,
    true_size: int | None = None,
    added: int = 0,
) -> LayoutOptions:
    """Return options for `tp` ranks that leave the vocabulary of a language model as it is.

    Rows that are added, or cut off, would change its softmax. With legacy names the files are for
    `tp` ranks, for those of the source, or for one: the first of these for which Megatron pads its
    vocabulary to the rows that are there. A model without a language-model head has no softmax, so
    with a known tokenizer its rows become those that Megatron v2.5 wants.

    Args:
        checkpoint: What is to be written.
        tp: Ranks of the run.
        names: As for `choose_names`.
        true_size: Entries of the tokenizer.
        added: Entries that Megatron's own tokenizer has beyond them.
    """
    config, source = checkpoint.config, checkpoint.provenance
    rows = config.vocab_size
    if is_for_v25(config, names, source=source.names):
        of_tokenizer: LayoutOptions = {"true_vocab_size": true_size, "added_entries": added}
        for size in dict.fromkeys((tp, source.tensor_parallel, 1)):
            padded, _ = padded_vocabulary(
                checkpoint, size, true_size, None, added=added, for_v25=True
            )
            if padded == rows or (true_size is not None and not config.lm_head):
                return {"tp": size, **of_tokenizer}
    size = tp if rows % tp == 0 else 1
    divisor = math.lcm(_saved_multiple(checkpoint), size) // size
    return {"tp": size, "make_vocab_size_divisible_by": divisor}


def _saved_divisor(checkpoint: Checkpoint) -> int | None:
    saved = checkpoint.provenance.args.get("make_vocab_size_divisible_by")
    return saved if isinstance(saved, int) and saved > 0 else None


def _saved_multiple(checkpoint: Checkpoint) -> int:
    """Return what the source's rows were padded to a multiple of; 1 where they were not."""
    args = checkpoint.provenance.args
    saved_tp = args.get("tensor_model_parallel_size", args.get("model_parallel_size"))
    multiple = (_saved_divisor(checkpoint) or 1) * (
        saved_tp or checkpoint.provenance.tensor_parallel
    )
    # Not padded by the formula: take the rows for the vocabulary.
    return 1 if checkpoint.config.vocab_size % multiple else multiple
