"""NeMo 1: where its parts stand, and the words of its model_config.yaml.

A `.nemo` file is a tar archive of a folder: `model_config.yaml`, the tokenizer's files under hashed
names, and the weights, as `model_weights/` (torch_dist or zarr) or as one `model_weights.ckpt` for
each rank. Training leaves the same folders unpacked.
Source: docs/megatron.md, "Layouts without args"; NeMo r1.23,
nemo/collections/nlp/models/language_modeling/megatron_gpt_model.py (model_provider_func) and
megatron_base_model.py (build_transformer_config),
nemo/collections/nlp/modules/common/megatron/mlp.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError

NEMO_CONFIG = "model_config.yaml"
NEMO_FOLDER = "model_weights"
NEMO_FILE = "model_weights.ckpt"

_RANK = re.compile(r"mp_rank_(\d{2,})|tp_rank_(\d+)_pp_rank_(\d+)")
_REFERENCE = re.compile(r"\$\{(?:\.|model\.)?(\w+)\}")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")

_NORMS = {
    "layernorm": ("LayerNorm", False),
    "layernorm1p": ("LayerNorm", True),
    "rmsnorm": ("RMSNorm", False),
}

_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "transformer_block_type": ("norms in other places than before each branch", ("pre_ln",)),
    "attention_type": ("another attention than multi-head attention", ("multihead",)),
    "normalize_attention_scores": ("attention scores that are not divided", (True,)),
    "headscale": ("scaled heads", (False,)),
    "use_emha": ("extended multi-head attention", (False,)),
    "multi_query_attention": ("NeMo's own multi-query attention", (False,)),
    "hyena": ("Hyena layers", ()),
    "mcore_customization_config": ("layers of Falcon or Gemma 2", ({},)),
    "drop_layers": ("layers that are left out", ([],)),
}
"""Name -> what it asks for that is not computed, and the values that ask for nothing."""

_TRANSLATED = frozenset(
    """activation normalization bias position_embedding_type rotary_percentage encoder_seq_length
    openai_gelu onnx_safe bias_activation_fusion bias_gelu_fusion scale_positional_embedding
    mcore_gpt megatron_legacy apply_embedding_scaling layernorm_zero_centered_gamma""".split()
)

_WITHOUT_EFFECT = frozenset(
    """target nemo_version name precision tokenizer data optim peft nsys_profile memory_profile
    micro_batch_size global_batch_size rampup_batch_size resume_from_checkpoint restore_from_path
    restore_from_ckpt virtual_pipeline_model_parallel_size context_parallel_size megatron_amp_O2
    transformer_engine pre_process post_process persist_layer_norm grad_allreduce_chunk_size_mb
    grad_div_ar_fusion native_amp_init_scale native_amp_growth_interval hysteresis seed
    apex_transformer_log_level gradient_as_bucket_view sync_batch_comm use_cpu_initialization
    activations_checkpoint_granularity activations_checkpoint_method
    activations_checkpoint_num_layers activations_checkpoint_layers_per_pipeline
    num_micro_batches_with_partial_activation_checkpoints bias_dropout_add_fusion ffn_dropout
    get_attention_mask_from_fusion use_scaled_init_method do_layer_norm_weight_decay
    enforce_fp32_pos_idx use_flash_attention reduce_amax fp8 fp8_e4m3 fp8_hybrid
    fp8_params ub_tp_comm_overlap ub_tp_comm_overlap_cfg nccl_communicator_config_path fsdp
    fsdp_sharding_strategy fsdp_grad_reduce_dtype fsdp_sharded_checkpoint fsdp_use_orig_params
    dist_ckpt_format dist_ckpt_load_on_device dist_ckpt_parallel_save
    dist_ckpt_parallel_save_within_dp dist_ckpt_parallel_load dist_ckpt_torch_dist_multiproc
    dist_ckpt_assume_constant_structure dist_ckpt_parallel_dist_opt gc_interval gc_in_validation
    log_train_loss log_memory_usage answer_only_loss hidden_dropout_eval save_nemo_on_validation_end
    enable_megatron_timers megatron_timer_kwargs expert_model_parallel_size num_moe_experts_per_rank
    tokenizer_model vocab_file merge_file override_vocab_size use_loss_mask reset_lr reset_lr_steps
    validation_param_sync_overlap migrate_checkpoint defer_embedding_wgrad_compute
    wgrad_deferral_limit pipeline_model_parallel_split_rank inference perform_initialization
    lora_tuning adapter_tuning seq_length sequence_parallel overlap_p2p_comm batch_p2p_comm
    deterministic_mode skip_train share_token_embeddings share_decoder_tokens_head_embeddings
    attn_mask_type cpu_offloading cpu_offloading_num_layers fp32_residual_connection
    fp16_lm_cross_entropy masked_softmax_fusion gradient_accumulation_fusion
    apply_query_key_layer_scaling apply_rope_fusion cross_entropy_loss_fusion""".split()
)
"""Of the run, its data and its kernels; or said by the weights."""


def nemo_root(path: Path) -> Path | None:
    """Return the folder of a NeMo 1 checkpoint that a path is, or is a part of; else None.

    Args:
        path: That folder, its settings, its weights, or a file of them.
    """
    inside = ""
    for folder in (path, *path.parents[:3]):
        is_part = inside in ("", NEMO_CONFIG, NEMO_FOLDER, NEMO_FILE) or _RANK.fullmatch(inside)
        if is_part and folder.is_dir() and (folder / NEMO_CONFIG).is_file():
            held = (folder / NEMO_FOLDER).is_dir() or (folder / NEMO_FILE).is_file()
            return folder if held or nemo_ranks(folder) else None
        inside = folder.name
    return None


def nemo_ranks(root: Path) -> dict[tuple[int, int], Path]:
    """Return the files of ranks, by tensor-parallel rank and pipeline stage."""
    if (root / NEMO_FILE).is_file():
        return {(0, 0): root / NEMO_FILE}
    found = {}
    for entry in sorted(root.iterdir()):
        match = _RANK.fullmatch(entry.name)
        if match and (entry / NEMO_FILE).is_file():
            rank = (match[1], 0) if match[1] else (match[2], match[3])
            found[int(rank[0]), int(rank[1])] = entry / NEMO_FILE
    return found


def nemo_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what a model_config.yaml says, as fields of megatron-core's config.

    `activation` is one of our own words.

    Args:
        values: The file's, as plain data.
        where: The file, for messages.

    Raises:
        InputError: It asks for what is not computed, or refers to what it does not hold.
    """
    values = {name: _resolved(value, values) for name, value in values.items()}
    for name, (what, harmless) in _REFUSED.items():
        if values.get(name) is not None and values[name] not in harmless:
            raise InputError(
                f"{where} has {name} = {str(values[name])[:80]}: {what}, which mlm-eval does not "
                "compute"
            )
    norm = str(values.get("normalization") or "layernorm").lower()
    if norm not in _NORMS:
        raise InputError(f"{where} has normalization = {norm}, which mlm-eval does not compute")
    positions = str(values.get("position_embedding_type") or "learned_absolute")
    if positions not in ("learned_absolute", "rope", "alibi", "none"):
        raise InputError(
            f"{where} has position_embedding_type = {positions}, which mlm-eval does not compute"
        )
    kind, centred = _NORMS[norm]
    ran = _activation(values)
    left_out = _TRANSLATED | _WITHOUT_EFFECT | _REFUSED.keys()
    fields = {name: value for name, value in values.items() if name not in left_out}
    fields |= {
        "normalization": kind,
        "layernorm_zero_centered_gamma": centred
        or bool(values.get("layernorm_zero_centered_gamma")),
        "layernorm_epsilon": values.get("layernorm_epsilon") or 1e-5,
        "add_bias_linear": values.get("bias", True),
        **({"activation_func": values["activation"]} if ran is None else {"activation": ran}),
        "position_embedding_type": positions,
        "rotary_percent": values.get("rotary_percentage") or 1.0,
        "rotary_base": values.get("rotary_base") or 10000,
        "seq_length": values.get("encoder_seq_length"),
        "share_embeddings_and_output_weights": values.get(
            "share_embeddings_and_output_weights", True
        ),
    }
    if not values.get("max_position_embeddings"):
        fields["max_position_embeddings"] = values.get("encoder_seq_length")
    hidden = values.get("hidden_size")
    scaled = values.get("apply_embedding_scaling") and values.get("mcore_gpt")
    if scaled and type(hidden) is int and 0 < hidden < 1 << 31:
        fields["embedding_multiplier"] = hidden**0.5
    if values.get("scale_positional_embedding"):
        fields |= {"rope_scaling": True, "rope_scaling_factor": 8.0}
    return fields


def has_oldest_order(values: Mapping[str, Any]) -> bool:
    """Whether the QKV rows of a model with NeMo's own layers stand as in version 0.

    That is `[3, heads, head]`, for models that came from Megatron-LM's first releases.
    Source: NeMo r1.23, megatron/attention.py, ParallelAttention (megatron_legacy).
    """
    return bool(values.get("megatron_legacy"))


def _resolved(value: Any, values: Mapping[str, Any]) -> Any:
    """Return a value with a reference to another one followed, and a number taken as one.

    Files keep OmegaConf's references, such as `${.encoder_seq_length}`. What is not such a one is
    None, which the shapes of the weights answer. YAML takes 1e-5, without a point, for a text.
    """
    for _ in range(8):
        match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            break
        value = values.get(match[1])
    if isinstance(value, str) and value.startswith("${"):
        return None
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return value


def _activation(values: Mapping[str, Any]) -> str | None:
    """Return the activation that ran; None where it is none of ours.

    The fused kernel of GELU is the tanh form. It is on unless the file says otherwise, but needs a
    bias where there is no gate.
    """
    word = str(values.get("activation") or "gelu").removeprefix("fast-")
    gated = word.endswith("glu")
    if values.get("openai_gelu"):  # whatever the word says, but for the gate
        return "geglu_tanh" if gated else "gelu_tanh"
    fused = values.get("bias_activation_fusion", values.get("bias_gelu_fusion", True))
    if word == "gelu":
        return "gelu_tanh" if fused and values.get("bias", True) else "gelu"
    if word == "geglu":
        return "geglu_tanh" if fused else "geglu"
    if word in ("swiglu", "squared-relu"):
        return word.replace("-", "_")
    return None
