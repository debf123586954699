"""Settings of DeepSpeed's projects that change nothing of what a saved model computes.

A setting that stands nowhere is told of, or refused where its name is about the model: a later
version of a project may have a new one.
Source: configs/neox_arguments.md and megatron/neox_arguments/ of EleutherAI/gpt-neox;
megatron/arguments.py of bigscience-workshop/Megatron-DeepSpeed and deepspeedai/Megatron-DeepSpeed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from mlm_eval.checkpoints.megatron.fields import ARG_FIELDS
from mlm_eval.checkpoints.projects.settings import not_heeded

_OF_THE_MODEL = re.compile(
    r"(?:^|_)(?:act|activation|attention|attn|alibi|bias|cap|channel|embed|embedding|expert"
    r"|feedforward|ffn|gate|gated|head|hidden|intermediate|kv|layer|logit|mask|mlp|moe|mult"
    r"|multiplier|pos|position|qk|qkv|residual|rope|rotary|scale|scaling|softcap|softmax|tied|tying"
    r"|window|[a-z]*glu|[a-z]*gelu|[a-z]*norm)s?(?:_|$)"
)
"""Words in the names of settings that may be about what a model computes."""

NEOX_HARMLESS = frozenset(
    # What the weights' shapes say, and what acts only beside a setting that is refused.
    """feedforward_size intermediate_size expansion_factor mlp_multiple_of padded_vocab_size
    output_layer_parallelism param_sharing_style sparsity_config sparse_attention rpe_num_buckets
    rpe_max_distance scalenorm_epsilon gmlp_attn_dim dim_att head_size ffn_dim extra_sentinel_tokens
    num_encoder_layers decoder_seq_length mup_init_scale mup_attn_temp mup_output_temp
    mup_embedding_mult mup_rp_embedding_mult mup_width_scale coord_check save_base_shapes
    base_shapes_file expert_interval moe_expert_interval moe_top_k moe_router_type moe_lbl_in_fp32
    moe_jitter_eps moe_loss_coeff moe_type moe_token_dropping moe_capacity_factor moe_bias moe_glu
    moe_expert_parallel_size moe_min_capacity moe_eval_capacity_factor moe_train_capacity_factor
    enable_expert_tensor_parallelism use_tutel mamba_selective_scan_fusion mamba_causal_conv_fusion
    mamba_inner_func_fusion mamba_selective_fp32_params mamba_use_bias_in_conv
    mamba_use_bias_in_linears"""
    # The same function by other kernels or in another precision.
    """ precision fp16 bf16 amp data_types grad_accum_dtype fp16_lm_cross_entropy
    attention_softmax_in_fp32 apply_query_key_layer_scaling
    scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion bias_dropout_fusion
    rope_fusion layernorm_fusion fused_layer_norm use_flashattn_swiglu te_columnparallel
    te_rowparallel te_fp8_mha te_fp8_format te_fp8_wgrad te_fp8_amax_history_len
    te_fp8_amax_compute_algo te_fp8_margin sequence_parallel"""
    # Ranks and machines.
    """ pipe_parallel_size pipe_partition_method world_size is_pipe_parallel context_parallel_size
    distributed_backend local_rank rank lazy_mpu_init use_cpu_initialization hostfile include
    exclude num_nodes num_gpus master_port master_addr launcher force_multi detect_nvlink_pairs
    no_ssh_check comment account user_script global_num_gpus deepspeed deepspeed_mpi deepspeed_slurm
    deepscale deepscale_config deepspeed_extra_args autotuning autotuning_run elasticity
    adlr_autoresume adlr_autoresume_interval git_hash communication_data_type fp32_allreduce
    prescale_gradients gradient_predivide_factor sparse_gradients zero_optimization zero_stage
    zero_reduce_scatter zero_contiguous_gradients zero_reduce_bucket_size zero_allgather_bucket_size
    zero_allow_untested_optimizer"""
    # How weights were drawn and trained.
    """ init_method output_layer_init_method optimizer optimizer_type use_bnb_optimizer scheduler lr
    min_lr lr_decay_style lr_decay_iters lr_decay_fraction warmup override_lr_scheduler
    use_checkpoint_lr_scheduler weight_decay momentum clip_grad gradient_clipping hysteresis
    dynamic_loss_scale loss_scale loss_scale_window min_scale train_iters train_epochs seed finetune
    batch_size train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gas
    eod_mask_loss loss_on_targets_only masked_lm_prob mean_noise_span_length packing pack_impl
    allow_chopped short_seq_prob curriculum_learning curriculum_seqlen data_efficiency
    compression_training checkpoint_activations checkpoint_num_layers contiguous_checkpointing
    checkpoint_in_cpu synchronize_each_layer profile_backward partition_activations
    deepspeed_activation_checkpointing activation_checkpointing dpo_fp32 dpo_beta dpo_reference_free
    kto_fp32 kto_beta kto_desirable_weight kto_undesirable_weight z_loss kl_impl kl_div_beta
    reinforce_leave_one_out fp32_reinforce precompute_model_name"""
    # Texts and tokenizers.
    """ data_path data_impl dataset_impl mmap_warmup split use_shared_fs num_workers
    weight_by_num_documents weighted_sampler_alpha tokenizer_type vocab_file merge_file
    train_data_paths valid_data_paths test_data_paths label_data_paths train_label_data_paths
    valid_label_data_paths test_label_data_paths train_reward_data_paths valid_reward_data_paths
    test_reward_data_paths train_data_weights valid_data_weights test_data_weights
    pos_train_data_paths neg_train_data_paths pos_valid_data_paths neg_valid_data_paths
    pos_test_data_paths neg_test_data_paths pos_train_label_data_paths neg_train_label_data_paths
    pos_valid_label_data_paths neg_valid_label_data_paths pos_test_label_data_paths
    neg_test_label_data_paths"""
    # What was saved, logged, evaluated and generated.
    """ save load iteration load_iteration config_files checkpoint checkpoint_factor
    checkpoint_scale checkpoint_validation_with_forward_pass extra_save_iters save_iters
    save_interval keep_last_n_checkpoints no_save_optim no_save_rng no_load_optim no_load_rng
    load_universal exit_interval s3_path s3_chunk_size do_train do_valid do_test eval_iters
    eval_interval eval_batch_size eval_tasks eval_results_prefix char_level_ppl log_dir log_interval
    log_grad_pct_zeros log_param_norm log_grad_norm log_optimizer_states log_gradient_noise_scale
    gradient_noise_scale_n_batches gradient_noise_scale_cpu_offload log_memory
    log_memory_alloc_counts tensorboard tensorboard_dir tensorboard_writer wandb use_wandb
    wandb_group wandb_team wandb_project wandb_host wandb_init_all_ranks wandb_run_name use_comet
    comet_workspace comet_project comet_experiment_name comet_tags comet_others comet_experiment
    csv_monitor comms_logger flops_profiler steps_per_print wall_clock_breakdown dump_state profile
    profile_step_start profile_step_stop memory_profiling memory_profiling_path
    peak_theoretical_tflops text_gen_type temperature top_p top_k return_logits maximum_tokens
    prompt_end sample_input_file sample_output_file num_samples recompute serve_model_weights
    weight_server_port online_dataset_ip""".split()
)
"""Names of gpt-neox's settings, with underscores."""

_FORK_HARMLESS = frozenset(
    """num_key_value_heads apply_wd_to_qk_layernorm checkpoint_activations checkpoint_num_layers
    deepspeed_activation_checkpointing distribute_checkpointed_activations partition_activations
    synchronize_each_layer dynamic_loss_scale loss_scale initial_loss_scale min_loss_scale
    min_scale loss_scale_window scaled_masked_softmax_fusion
    scaled_upper_triang_masked_softmax_fusion log_params_norm log_loss_scale_to_tensorboard
    embedding_path ict_head_size head_lr_mult dino_head_hidden_size dino_freeze_last_layer
    dino_norm_last_layer output_bert_embeddings layernorm_tp_auto_sync create_moe_param_group
    moe_loss_coeff moe_train_capacity_factor moe_eval_capacity_factor moe_min_capacity
    moe_expert_parallel_size enable_expert_tensor_parallelism expert_interval
    disable_moe_token_dropping disable_moe_top2_2nd_expert_sampling activation_checkpoint_func
    num_layers_teacher hidden_size_teacher num_attention_heads_teacher num_experts_teacher
    reweight_loss_based_on_position_frequency attention_mask_in_length batch_size_multiplier
    create_attention_mask_in_dataloader decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers""".split()
)
"""Megatron-DeepSpeed's args whose names are about the model, and which change nothing of it."""


def unknown_names(values: Mapping[str, Any], known: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the settings that are not known: those about the model by name, and the others.

    What is off or not given (false, null, nothing) is left out.
    """
    names = [
        name
        for name, value in values.items()
        if name not in known and not (value is None or value is False or value in ("", [], {}))
    ]
    about = {name for name in names if _OF_THE_MODEL.search(name)}
    return sorted(about), sorted(set(names) - about)


def unknown_args(args: Mapping[str, Any]) -> list[str]:
    """Return a warning that lists args of Megatron-DeepSpeed about the model that nobody knows."""
    about, _ = unknown_names(args, {*ARG_FIELDS, *_FORK_HARMLESS})
    return [not_heeded("the run's args have", about)] if about else []
