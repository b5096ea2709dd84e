"""Every argument of vLLM's engine that ``ENGINE_ARGS`` may have, by what it is about and what it needs.

With ``engine_args`` this is all that vLLM 0.32 has: a test fails for one that is in neither. One that a later
vLLM adds is handed on, with a warning that nobody has looked at it.
"""

from __future__ import annotations

_BASE = """
    model_weights tokenizer hf_config_path tokenizer_mode trust_remote_code download_dir load_format
    config_format safetensors_load_strategy safetensors_prefetch_num_threads safetensors_prefetch_block_size
    revision code_revision hf_token hf_overrides model_class_overrides tokenizer_revision
    model_loader_extra_config
    ignore_patterns pt_load_map_location use_tqdm_on_load max_parallel_loading_workers model_impl dtype
    quantization quantization_config allow_deprecated_quantization generation_config
    override_generation_config renderer_num_workers
"""
_VECTORS = "runner convert pooler_config"
_ANSWERS = """
    seed max_logprobs logprobs_mode logits_processors use_fp64_gumbel stream_interval watermark_config
    structured_outputs_config reasoning_parser reasoning_parser_plugin reasoning_config
"""
_ADAPTERS = """
    fully_sharded_loras lora_dtype lora_target_modules specialize_active_lora enable_mixed_moe_lora_format
    enable_moe_shared_loras max_lora_cls_labels additional_config
"""
_CACHE = """
    kv_cache_dtype kv_cache_dtype_skip_layers block_size enable_prefix_caching prefix_caching_hash_algo
    prefix_cache_retention_interval prefix_match_unit gpu_memory_utilization kv_cache_memory_bytes
    num_gpu_blocks_override disable_sliding_window disable_hybrid_kv_cache_manager swa_bounded_replay
    scheduler_reserve_full_isl watermark
"""
_STEPS = """
    max_num_batched_tokens max_num_scheduled_tokens max_num_seqs long_prefill_token_threshold
    long_prefill_token_threshold_adaptive enable_chunked_prefill prefill_schedule_interval async_scheduling
    shutdown_timeout fail_on_environ_validation
"""
_KERNELS = """
    cudagraph_capture_sizes max_cudagraph_capture_size enforce_eager compilation_config attention_config
    attention_backend kernel_config linear_backend sparse_indexer_topk_backend ir_op_priority
    enable_flashinfer_autotune disable_cascade_attn gdn_prefill_backend kda_prefill_backend kda_decode_backend
    optimization_level performance_mode enable_cumem_allocator
"""
_OFFLOADED = """
    offload_backend cpu_offload_gb cpu_offload_params offload_group_size offload_num_in_group
    offload_prefetch_step offload_params
"""
_WORKERS = """
    distributed_executor_backend tensor_parallel_size pipeline_parallel_size distributed_timeout_seconds
    cpu_distributed_timeout_seconds numa_bind numa_bind_nodes numa_bind_cpus device_ids
    prefill_context_parallel_size decode_context_parallel_size dcp_comm_backend dcp_q_replicate
    dcp_kv_cache_interleave_size cp_kv_cache_interleave_size enable_hc_sp enable_batch_sharded_sampling
    disable_custom_all_reduce enable_shm_tensor_arena enable_dbo ubatch_size dbo_decode_token_threshold
    dbo_prefill_token_threshold
"""
_EXPERTS = """
    enable_expert_parallel enable_ep_weight_filter moe_backend all2all_backend eplb_config enable_eplb
    expert_placement_strategy enable_return_routed_experts aux_output_config
"""
_STATES = """
    mamba_config mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode mamba_backend
    mamba_ssu_algorithm enable_mamba_shared_prefix_checkpoint enable_mamba_cache_stochastic_rounding
    mamba_cache_philox_rounds replayssm_buffer_len use_replayssm
"""
_MEDIA = """
    allowed_media_domains language_model_only limit_mm_per_prompt interleave_mm_strings media_io_kwargs
    mm_processor_kwargs mm_processor_cache_gb mm_processor_cache_type mm_hasher_algorithm
    mm_shm_cache_max_object_size_mb mm_encoder_only mm_encoder_tp_mode mm_encoder_attn_backend
    mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path
    mm_encoder_fp8_scale_save_margin skip_mm_profiling video_pruning_rate video_pruning_method mm_tensor_ipc
    mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize disable_chunked_mm_input
    enable_mm_processor_stats enable_tower_connector_lora ec_manager_config
"""
_DRAFTS = "speculative_config spec_method spec_model spec_tokens"
_METRICS = """
    disable_log_stats show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces
    per_request_spec_decode_metrics kv_cache_metrics kv_cache_metrics_sample custom_histogram_buckets
    cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics enable_logging_iteration_details
    jit_monitor_mode jit_monitor_verbose
"""
# What arguments are about, with what they need -> their names.
SERVED_ENGINE_ARGS: dict[str, tuple[str, ...]] = {
    "the base model, its files and its tokenizer": tuple(_BASE.split()),
    "embeddings, labels and scores: needs a base that makes them": tuple(_VECTORS.split()),
    "answers": tuple(_ANSWERS.split()),
    "adapters": tuple(_ADAPTERS.split()),
    "the KV cache": tuple(_CACHE.split()),
    "steps of the engine": tuple(_STEPS.split()),
    "kernels: most need a GPU": tuple(_KERNELS.split()),
    "weights in host memory: needs a GPU": tuple(_OFFLOADED.split()),
    "several workers: needs as many GPUs, or parts of a processor": tuple(_WORKERS.split()),
    "mixtures of experts: needs such a base, and a GPU": tuple(_EXPERTS.split()),
    "state space models: needs such a base": tuple(_STATES.split()),
    "images and sound: needs a multimodal base": tuple(_MEDIA.split()),
    "drafts: needs a model for them, or n-grams": tuple(_DRAFTS.split()),
    "bases of other kinds: needs such a base": ("diffusion_config", "engram_config"),
    "metrics and traces": tuple(_METRICS.split()),
}
