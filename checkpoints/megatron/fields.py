"""Every saved setting that a Megatron model was given, and what is done with it here.

The names are the fields of megatron-core's TransformerConfig and MLATransformerConfig, the
arguments of Megatron-LM from v1.0 on that its models read, and those of its forks that change the
function. Whatever stands in `args` under the name of a config field was copied into the config, so
both kinds of names are looked up in `args`.

    read      it decides the function, or where its tensors are; `args.py` and the readers use it
    refused   it makes a function that is not computed here; its harmless values are listed
    numerics  the same function by another kernel or in another precision
    training  the course of the run: losses, dropout, initialization, memory, layout, schedules

Source: docs/megatron.md, "Arguments"; Megatron-LM, megatron/core/transformer/transformer_config.py
and megatron/training/arguments.py (core 0.16), and the code that its section names for each era.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

RunCode = Literal["core", "legacy", "legacy with TransformerEngine"]
"""Whose layers a run was made of. The parameter names tell."""

_LEGACY: tuple[RunCode, ...] = ("legacy", "legacy with TransformerEngine")


NOT_FOR_T5 = ("rotary_base", "rotary_seq_len_interpolation_factor", "use_rope_scaling")
"""What pretrain_t5.py does not pass on to its model: base 10000, and nothing that stretches."""

T5_UNTIL = "core 0.19"


@dataclass(frozen=True)
class ArgField:
    """What one saved setting means."""

    mark: Literal["read", "refused", "numerics", "training"]
    """`read`, `refused`, `numerics` or `training`."""
    reason: str
    """Why; of a refused one what the model was trained with, for the message."""
    harmless: tuple[Any, ...] = ()
    """Values of a refused one that leave the function as it is; a list is harmless where all its
    items are."""
    setting: str | None = None
    """The `--set` that takes the place of a refused one."""
    only_with: str | None = None
    """The refused one without which it has no effect; its value then does not count."""
    unreceived: tuple[RunCode, ...] = ()
    """The code whose model is never given it, whatever args say."""
    until: str = ""
    """The last revision of that code that is known not to pass it on."""

    def is_harmless(self, value: Any) -> bool:
        """Return whether a value of a refused field leaves the function as it is."""
        if any(value is one or value == one for one in self.harmless):
            return True
        return isinstance(value, list) and all(self.is_harmless(item) for item in value)


def _read(reason: str, *, unreceived: tuple[RunCode, ...] = (), until: str = "") -> ArgField:
    return ArgField("read", reason, unreceived=unreceived, until=until)


def _refused(what: str, *harmless: Any, setting: str | None = None) -> ArgField:
    return ArgField("refused", what, harmless=(None, *harmless), setting=setting)


def _only_with(other: str) -> ArgField:
    return ArgField("refused", f"Acts only with {other}, which is refused.", only_with=other)


def _numerics(reason: str) -> ArgField:
    return ArgField("numerics", reason)


def _training(reason: str) -> ArgField:
    return ArgField("training", reason)


_GROUPS: tuple[tuple[str, ArgField], ...] = (
    # ---- read: sizes -----------------------------------------------------------------------------
    (
        """num_layers encoder_num_layers decoder_num_layers hidden_size kv_channels num_query_groups
        group_query_attention normalization""",
        _read("The weights' shapes say it; args that contradict them are refused."),
    ),
    (
        """ffn_hidden_size padded_vocab_size add_bias_linear disable_bias_linear add_qkv_bias
        qk_layernorm bert_binary_head add_position_embedding embed_layernorm""",
        _read("The weights' shapes say it, whatever args say."),
    ),
    ("num_attention_heads", _read("How the attention's width is divided.")),
    ("max_position_embeddings seq_length", _read("The longest text, where no table says it.")),
    (
        "make_vocab_size_divisible_by",
        _read("How the vocabulary was padded: kept for files that are written."),
    ),
    (
        """model_parallel_size tensor_model_parallel_size pipeline_model_parallel_size
        expert_model_parallel_size rank""",
        _read("Which files there must be."),
    ),
    # ---- read: the function ----------------------------------------------------------------------
    (
        "position_embedding_type use_rotary_position_embeddings",
        _read("The kind of positions; core's BERT has a table whatever it says."),
    ),
    (
        "relative_attention_num_buckets relative_attention_max_distance",
        _read("T5's buckets of distances: the table tells how many, args how far they reach."),
    ),
    ("rotary_percent", _read("The share of the channels that are rotated.")),
    (
        "rotary_base",
        _read(
            "The rotary base. The legacy models make their tables without it: base 10000.",
            unreceived=_LEGACY,
            until="core 0.17, their last",
        ),
    ),
    (
        "rotary_interleaved",
        _read("Which channels are a pair. Legacy layers heed it and their tables do not: refused."),
    ),
    (
        "rotary_seq_len_interpolation_factor",
        _read(
            "Positions are divided by it. The legacy models are given it, megatron-core's is not.",
            unreceived=("core",),
            until="core 0.19",
        ),
    ),
    (
        "use_rope_scaling",
        _read(
            "Llama-3.1's scaling of rotary frequencies, which the legacy models do not have.",
            unreceived=_LEGACY,
            until="core 0.17, their last",
        ),
    ),
    (
        "rope_scaling_factor",
        _read(
            "The factor of that scaling. Megatron-LM makes its models without it: factor 8.",
            unreceived=("core", *_LEGACY),
            until="core 0.19",
        ),
    ),
    (
        "softmax_scale",
        _read("The factor of attention scores; legacy code has none, so it is refused there."),
    ),
    ("layernorm_epsilon norm_epsilon", _read("The epsilon of all norms.")),
    (
        "layernorm_zero_centered_gamma apply_layernorm_1p",
        _read("Whether gains are stored as their distance from 1."),
    ),
    (
        "apply_residual_connection_post_layernorm",
        _read(
            "The original BERT order. megatron-core has the field and reads it nowhere.",
            unreceived=("core",),
            until="core 0.19",
        ),
    ),
    (
        "untie_embeddings_and_output_weights",
        _read("Whether the output table is the embeddings' own."),
    ),
    ("swiglu", _read("The activation.")),
    (
        "squared_relu",
        _read(
            "The activation.",
            unreceived=("legacy with TransformerEngine",),
            until="core 0.17, their last",
        ),
    ),
    (
        "activation_func",
        _read("The activation, as a word in runs of --yaml-cfg; a function is not read: refused."),
    ),
    (
        "gated_linear_unit",
        _read("A gate beside an activation that is not silu is refused."),
    ),
    (
        "openai_gelu onnx_safe",
        _read(
            "Which GELU ran in legacy layers.",
            unreceived=("core", "legacy with TransformerEngine"),
            until="core 0.19",
        ),
    ),
    (
        "bias_gelu_fusion bias_activation_fusion",
        _read(
            "The fused kernel is the tanh GELU; it needs biases.",
            unreceived=("legacy with TransformerEngine",),
            until="core 0.17, their last",
        ),
    ),
    (
        "use_te_activation_func use_transformer_engine_op_fuser transformer_impl",
        _read("TransformerEngine's GELU is the tanh form; local layers have none of it."),
    ),
    (
        "yaml_cfg",
        _read("Runs of --yaml-cfg with biases take the exact GELU, whatever the fusion says."),
    ),
    ("spec", _read("Whose layers the run was made of: others than megatron-core's are told of.")),
    ("hidden_dropout attention_dropout init_method_std", _read("For training a model further.")),
    # ---- read: experts, latent attention, layers that differ (family_args.py) --------------------
    ("num_experts num_moe_experts", _read("The number of routed experts; the routers tell.")),
    (
        """moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size
        moe_shared_expert_gate moe_router_enable_expert_bias""",
        _read("Which experts there are: the shapes tell, and must agree."),
    ),
    (
        "expert_tensor_parallel_size",
        _read("How a run's files hold the experts."),
    ),
    (
        """moe_router_topk moe_router_pre_softmax moe_router_score_function moe_router_num_groups
        moe_router_group_topk moe_router_topk_scaling_factor moe_apply_probs_on_input
        moe_router_load_balancing_type""",
        _read("How a router chooses and weighs experts."),
    ),
    ("multi_latent_attention", _read("Latent attention: the parameter names tell.")),
    (
        "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim",
        _read("Sizes of latent attention: the shapes tell, and must agree."),
    ),
    (
        """rope_type rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow
        mscale mscale_all_dim""",
        _read("The rotary positions of latent attention, plain or YaRN; other args date its rule."),
    ),
    ("window_size window_attn_skip_freq", _read("Which layers see a window, and how wide.")),
    ("softmax_type", _read("Sinks of the attention's softmax.")),
    ("qk_l2_norm", _read("L2 norm of queries and keys; the local layers of dense models lack it.")),
    ("attention_output_gate", _read("Gates of the attention's output.")),
    ("no_rope_freq", _read("Which layers have no rotary positions.")),
    ("moe_router_force_load_balancing", _read("Random experts: refused in mixtures.")),
    (
        "quick_geglu activation_func_clamp_value glu_linear_offset",
        _read("The gated activation, and what is clamped and added in it."),
    ),
    ("bias_swiglu_fusion", _read("Its kernel neither clamps nor adds.")),
    (
        "attn_logit_softcapping final_logit_softcapping",
        _read("Caps of attention scores and of logits: Gemma's, in Megatron-Bridge and in forks."),
    ),
    ("query_pre_attn_scalar", _read("The factor of attention scores, as 1 / its root.")),
    (
        """use_mup mup_embedding_mult mup_output_mult mup_base_hidden_size mup_base_head_dim
        mup_attn_scale_power""",
        _read("Maximal-update scaling: factors of embeddings, logits and attention scores."),
    ),
    ("embedding_multiplier logit_multiplier", _read("Factors of embeddings and of logits.")),
    ("rotary_base_local", _read("The rotary base of the layers with a window, in Gemma 3.")),
    ("no_l2_norm_layers", _read("Layers without that norm, by a name of our own: Llama 4's.")),
    ("gated_gelu", _read("A name of our own for a GELU with a gate, which no arg says.")),
    # ---- read: layers that differ in what they consist of (layers/branches.py) -------------------
    (
        "is_hybrid_model hybrid_override_pattern hybrid_layer_pattern",
        _read("What each layer of a hybrid is: the parameters tell, and must agree."),
    ),
    (
        "mamba_num_heads mamba_head_dim",
        _read("Sizes of Mamba-2: the shapes tell, and must agree."),
    ),
    (
        "mamba_num_groups mamba_state_dim",
        _read("How Mamba-2's B and C are divided, of which the shapes tell the product."),
    ),
    (
        "mamba_min_time_step mamba_norm_epsilon",
        _read("What transformers has of Mamba-2 and Megatron has not: written here, not by it."),
    ),
    (
        "heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json",
        _read("Branches and widths of each layer: the shapes tell, and must agree with the JSON."),
    ),
    # ---- refused ---------------------------------------------------------------------------------
    ("moe_latent_size", _refused("experts that work in a latent width", 0)),
    ("moe_expert_capacity_factor", _refused("experts that drop tokens beyond their capacity")),
    (
        "moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size",
        _refused("gate and up branch in alternating blocks"),
    ),
    ("moe_single_grouped_weight", _refused("all experts of a layer in one parameter", False)),
    ("mla_down_proj_fusion", _refused("latent attention with fused down projections", False)),
    ("head_wise_attn_gate", _refused("gates of whole heads", False)),
    ("experimental_attention_variant", _refused("an experimental attention variant", "")),
    (
        """dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff
        dsa_indexer_use_sparse_loss linear_conv_kernel_dim linear_key_head_dim
        linear_value_head_dim linear_num_key_heads linear_num_value_heads""",
        _only_with("experimental_attention_variant"),
    ),
    ("linear_attention_freq", _refused("linear attention", 0)),
    ("linear_attention_type", _refused("linear attention", "")),
    ("rotary_base_per_layer", _refused("rotary bases of each layer's own")),
    ("mrope_section", _only_with("position_embedding_type")),  # mrope, which is refused
    ("layernorm_mlp_bias", _refused("an unknown MLP norm", False)),
    ("retro_add_retriever", _refused("retrieved texts (RETRO)", False)),
    ("enable_hyper_connections", _refused("hyper-connections", False)),
    # Of forks and of Megatron-Bridge, with their defaults: Megatron-DeepSpeed, Megatron-LLM,
    # MindSpeed-LLM. Where args hold one of another value, the fork's model heeded it.
    ("output_logit_softcapping", _refused("capped logits", 0)),
    ("glu_activation", _refused("a fork's gate, whose halves stand in another order", "")),
    ("geglu", _refused("the GEGLU activation", False)),
    ("gelu_tanh", _refused("a fork's tanh GELU", False, setting="activation")),
    ("parallel_attn", _refused("attention and MLP side by side", False)),
    ("parallel_layernorm use_post_ln post_norm", _refused("norms in other places", False)),
    ("input_embeds_norm", _refused("scaled embeddings", False)),
    ("embedding_multiplier_scale scale_emb", _refused("scaled embeddings", 1)),
    ("scale_depth dim_model_base", _refused("scaled branches")),
    ("output_multiplier_scale", _refused("scaled logits", 1)),
    (
        "add_rmsnorm_offset",
        _refused(
            "gains stored as their distance from 1", False, setting="layernorm_zero_centered_gamma"
        ),
    ),
    (
        "sliding_window_size interleave_sliding_window",
        _refused("sliding-window attention", 0, -1),
    ),
    ("rope_theta", _refused("a fork's rotary base", 10000, setting="rotary_base")),
    ("rope_scaling_type", _refused("a fork's rotary scaling", "")),
    # ---- numerics: layers that differ ------------------------------------------------------------
    (
        """use_mamba_mem_eff_path hybrid_attention_ratio hybrid_mlp_ratio
        heterogeneous_block_specs""",
        _numerics("Kernels, and ways to lay layers out that the parameters tell of."),
    ),
    # ---- numerics: experts -----------------------------------------------------------------------
    (
        """moe_router_dtype moe_grouped_gemm moe_use_legacy_grouped_gemm moe_permute_fusion
        moe_router_fusion use_fused_weighted_squared_relu cache_mla_latents moe_extended_tp
        moe_router_padding_for_quantization moe_router_padding_for_fp8""",
        _numerics("Kernels and layouts of the same experts; the parameter names tell which."),
    ),
    # ---- numerics --------------------------------------------------------------------------------
    (
        """fp16 bf16 params_dtype enable_autocast autocast_dtype fp32_residual_connection
        attention_softmax_in_fp32 disable_bf16_reduced_precision_matmul pipeline_dtype""",
        _numerics("Precision of the run; the weights have their own, and --dtype chooses ours."),
    ),
    (
        "apply_query_key_layer_scaling",
        _numerics("Scores are divided by the layer's number and multiplied again."),
    ),
    (
        """attention_backend masked_softmax_fusion persist_layer_norm memory_efficient_layer_norm
        bias_dropout_fusion apply_rope_fusion fused_single_qkv_rope
        cross_entropy_loss_fusion cross_entropy_fusion_impl fp16_lm_cross_entropy use_flash_attn
        no_persist_layer_norm fused_residual_rmsnorm fallback_to_eager_attn""",
        _numerics("Kernels of the same function."),
    ),
    (
        """fp8 fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval
        fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_dot_product_attention
        fp8_multi_head_attention tp_only_amax_red first_last_layers_bf16
        num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 use_kitchen use_kitchen_attention
        kitchen_attention_backend fp4 fp4_recipe fp4_param fp4_quantizer_factory quant_recipe
        activation_func_fp8_input_store""",
        _numerics("Products of the same weights in fewer bits."),
    ),
    (
        """deterministic_mode batch_invariant_mode flash_decode use_inference_optimized_layers
        inference_fuse_tp_communication mlp_chunks_for_prefill inference_rng_tracker
        inference_sampling_seed symmetric_ar_type""",
        _numerics("How the same sums are taken when text is generated or a run is repeated."),
    ),
    (
        "use_mcore_models use_legacy_models",
        _numerics("Whose layers ran: the parameter names say it more surely."),
    ),
    # ---- training: experts -----------------------------------------------------------------------
    (
        "moe_input_jitter_eps",
        _training("Noise on the routers' input: left out, with a warning in mixtures."),
    ),
    (
        """moe_shared_expert_overlap moe_enable_routing_replay moe_router_topk_limited_devices
        moe_router_bias_update_rate moe_aux_loss_coeff moe_z_loss_coeff moe_token_dropping
        moe_token_dispatcher_type
        moe_enable_deepep moe_flex_dispatcher_backend moe_per_layer_logging
        moe_pad_expert_input_to_capacity moe_token_drop_policy moe_layer_recompute
        moe_deepep_num_sms moe_hybridep_num_sms overlap_moe_expert_parallel_comm
        ep_overlap_early_attn_memory_release""",
        _training("Losses, layout and messages of experts in training; drops need a capacity."),
    ),
    (
        "mtp_num_layers mtp_loss_scaling_factor mtp_standalone",
        _training("Heads of multi-token prediction, which the main head never sees."),
    ),
    # ---- training --------------------------------------------------------------------------------
    (
        """pipeline_model_parallel_comm_backend virtual_pipeline_model_parallel_size
        sequence_parallel context_parallel_size hierarchical_context_parallel_sizes
        max_seqlen_per_dp_cp_rank hybrid_context_parallel cp_comm_type
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split hetereogenous_dist_checkpoint
        num_layers_per_virtual_pipeline_stage""",
        _training("Layout of the run: the files themselves say which layers they hold."),
    ),
    (
        """gradient_accumulation_fusion async_tensor_model_parallel_allreduce tp_comm_overlap
        tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs
        tp_comm_atomic_rs tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1
        tp_comm_bootstrap_backend delay_wgrad_compute variable_seq_lengths overlap_p2p_comm
        batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p deallocate_pipeline_outputs
        defer_embedding_wgrad_compute wgrad_deferral_limit overlap_p2p_comm_warmup_flush
        microbatch_group_size_per_vp_stage clone_scatter_output_in_embedding""",
        _training("How ranks talk to each other."),
    ),
    (
        """cpu_offloading cpu_offloading_num_layers _cpu_offloading_context
        cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering
        fine_grained_activation_offloading offload_modules min_offloaded_tensor_size
        num_microbatches_with_partial_activation_checkpoints recompute_granularity
        recompute_method recompute_num_layers recompute_modules distribute_saved_activations
        disable_parameter_transpose_cache""",
        _training("Memory of the backward pass."),
    ),
    (
        """enable_cuda_graph cuda_graph_use_single_mempool cuda_graph_retain_backward_graph
        cuda_graph_warmup_steps external_cuda_graph cuda_graph_impl cuda_graph_scope""",
        _training("How kernels are started."),
    ),
    (
        """timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func
        param_sync_func barrier_with_L1_time log_max_attention_logit config_logger_dir test_mode""",
        _training("Hooks, clocks and logs of the run."),
    ),
    (
        """perform_initialization use_cpu_initialization use_te_rng_tracker init_method
        output_layer_init_method embedding_init_method embedding_init_method_std
        init_model_with_meta_device init_method_xavier_uniform""",
        _training("How weights were drawn."),
    ),
    (
        """calculate_per_token_loss qk_clip qk_clip_alpha qk_clip_threshold reset_position_ids
        reset_attention_mask eod_mask_loss""",
        _training("Losses, data and updates of the run."),
    ),
    ("encoder_seq_length decoder_seq_length", _training("How long the run's texts were.")),
    (
        """vocab_size vocab_extra_ids tokenizer_type vocab_file merge_file tokenizer_model""",
        _training("The run's tokenizer, by paths of another machine; --tokenizer names ours."),
    ),
    ("bert_load", _training("Where the run took its start from.")),
)


def _table() -> dict[str, ArgField]:
    table: dict[str, ArgField] = {}
    for names, field in _GROUPS:
        for name in names.split():
            assert name not in table, name
            table[name] = field
    return table


ARG_FIELDS = _table()
"""Name in args -> what is done with it."""
