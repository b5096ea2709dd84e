"""What ``adapters/worker`` holds on to in vLLM; a part of the list in ``server.engine.contract``."""

from __future__ import annotations

from server.engine.source_names import Use

WORKERS: tuple[Use, ...] = (
    # Paging: adapters/worker/extension.py and host_memory.py
    Use(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin",
        ("lora_manager",),
        "how the worker extension finds the LoRA manager",
    ),
    Use(
        "vllm.lora.worker_manager",
        "LRUCacheWorkerLoRAManager",
        ("_adapter_manager", "_load_adapter(lora_request)", "lora_config"),
        "loads run in our threads; a load inside a step is counted",
    ),
    Use("vllm.lora.worker_manager", "PEFTHelper", ("__post_init__", "use_dora"), "refuses DoRA by itself"),
    Use("vllm.lora.utils", "parse_fine_tuned_lora_name(name, weights_mapper)", why="vLLM's name of a layer"),
    Use("vllm.model_executor.models.utils", "WeightsMapper", ("get_rename_mapper",), "as above"),
    Use(
        "vllm.lora.model_manager",
        "LRUCacheLoRAModelManager",
        (
            "_registered_adapters",
            "_active_adapters",
            "_last_mapping",
            "_classification_head",
            "_is_moe",
            "_is_3d_moe_model",
            "_enable_mixed_moe_lora_format",
            "_create_merged_loras_inplace(lora_model)",
            "_get_lora_layer_weights(lora_model, module_name)",
            "activate_adapter(lora_id)",
            "deactivate_adapter(adapter_id)",
            "remove_adapter(adapter_id)",
            "list_adapters",
            "lora_index_to_id",
            "lora_slots",
            "model",
            "modules",
            "packed_modules",
            "packed_modules_mapping",
            "punica_wrapper_mapping",
        ),
        "adapters are entered, activated and removed between steps",
    ),
    Use(
        "vllm.lora.layers.classifier",
        "ClassificationHeadWithLoRA",
        ("max_lora_cls_labels", "full_weight_stacked", "full_bias_stacked"),
        "how many labels an adapter's own head may have, and what it takes of a slot",
    ),
    Use("vllm.lora.lora_model", "LoRAModel", ("modules_to_save",), "the host memory of such a head"),
    Use(
        "vllm.lora.model_manager",
        "LoRAModelManager",
        ("_deactivate_adapter(lora_id)", "lora_config", "modules"),
        "replaced where adapters share slots",
    ),
    Use("vllm.lora.model_manager", "AdapterLRUCache", why="as above"),
    Use(
        "vllm.lora.model_manager",
        text=("module.reset_lora(index)", "module.set_lora(", "module.reset_module_to_save(index)"),
        why="adapters.worker.activation fills a slot in the same way, in slices, unless it has such a head",
    ),
    Use(
        "vllm.lora.punica_wrapper.punica_base",
        "PunicaWrapperBase",
        (
            "_update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)",
            "indices_len",
            "_sampler_indices",
            "_embeddings_indices",
        ),
        "rows learn which ranks of a slot are theirs",
    ),
    Use(
        "vllm.lora.punica_wrapper.punica_gpu",
        "PunicaWrapperGPU",
        text=("self.add_shrink(", "self.add_expand("),
        why="as above, on a GPU",
    ),
    # What other requests of a step must not change: adapters/worker/sampling.py
    Use(
        "vllm.v1.sample.sampler",
        "Sampler",
        (
            "gather_specific_token_logprobs(logprobs, logprob_token_ids, sampled)",
            "gather_logprobs(logprobs, num_logprobs, token_ids)",
        ),
        "the first is wrapped: it gives the whole step the columns of the requests that name tokens",
        text=("logprobs_tensors = logprob_token_ids_tensors",),
    ),
    Use(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        ("sample_tokens(grammar_output)", "discard_request_mask", "input_batch", "sampler"),
        "wrapped on a CPU, whose generators cannot be set back",
        text=("gen.set_offset(gen.get_offset() - 4)",),
    ),
    Use("vllm.v1.worker.gpu_input_batch", "InputBatch", ("generators", "max_num_logprobs"), "as above"),
    Use(
        "vllm.v1.worker.gpu_input_batch",
        text=("generators=self.generators,",),
        why="as above: what is taken out for a step is not drawn from in it",
    ),
    Use(
        "vllm.v1.sample.thinking_budget_state",
        "ThinkingBudgetStateHolder",
        ("sync_batch(batch_update)", "_state"),
        "wrapped: a budget does not stay in the row of a request that has ended",
        text=("for i1, i2, direction in batch_update.moved:",),
    ),
    Use("vllm.v1.worker.gpu_input_batch", "InputBatch", ("thinking_budget_state_holder",), "as above"),
    Use(
        "vllm.v1.sample.logits_processor.interface",
        "BatchUpdate",
        ("moved",),
        "as above: (from, to, direction)",
    ),
    Use("vllm.v1.sample.logits_processor.interface", "MoveDirectionality", ("SWAP",), "as above"),
    Use(
        "vllm.v1.worker.gpu.sample.logit_bias",
        text=("MAX_NUM_ALLOWED_TOKEN_IDS = 1024", "MAX_NUM_STOP_TOKEN_IDS = 128", "if min_tokens > 0 and"),
        why="more raise in the step; server/engine/validation.py refuses them",
    ),
    # Heads of prompts: adapters/worker/prompts.py
    Use(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        ("_get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)",),
        "wrapped: the head's kernels are told the adapters of a prompt's rows",
        text=("logits = self.model.compute_logits(prompt_hidden_states)",),
    ),
    Use(
        "vllm.v1.worker.gpu.sample.prompt_logprob",
        "PromptLogprobsWorker",
        (
            "compute_prompt_logprobs(logits_fn, hidden_states)",
            "compute_prompt_token_id_logprobs(logits_fn, hidden_states)",
        ),
        "as above, of the other runner",
        text=("logits_fn(prompt_hidden_states[start_idx:end_idx])",),
    ),
    Use(
        "vllm.v1.worker.gpu.model_runner",
        text=("self.prompt_logprobs_worker.compute_prompt_logprobs(", "self.model.compute_logits,"),
        why="as above",
    ),
    Use(
        "vllm.lora.ops.triton_ops.lora_kernel_metadata",
        "LoRAKernelMeta",
        ("prepare_tensors(token_lora_mapping)",),
        "as above, on a GPU",
    ),
    Use(
        "vllm.lora.punica_wrapper.punica_gpu",
        text=(
            "self.prompt_mapping_meta = LoRAKernelMeta.make(",
            "self.prompt_mapping_meta.prepare_tensors(self.sampler_indices)",
        ),
        why="as above",
    ),
    Use("vllm.platforms.interface", "Platform", ("get_punica_wrapper",), "says which wrapper a GPU has"),
    Use(
        "vllm.lora.layers.base_linear",
        "BaseLinearLayerWithLoRA",
        (
            "_apply_lora_to_output(x, output)",
            "set_mapping(punica_wrapper)",
            "output_slices",
            "apply(x, bias)",
        ),
        "wrapped: outputs are scaled where a GPU serves DoRA",
        text=("return self._apply_lora_to_output(x, output)",),
    ),
    Use(
        "vllm.v1.core.sched.scheduler", text=("self.lora_config.max_loras",), why="counts adapters, not slots"
    ),
    Use(
        "vllm.config.vllm", "VllmConfig", ("additional_config",), "tells workers and scheduler how many share"
    ),
    Use(
        "vllm.lora.lora_model",
        text=(
            "import safetensors",
            "safetensors.safe_open(lora_tensor_path, framework=",
        ),
        why="replaced by a reader into our own buffers",
    ),
    Use(
        "vllm.lora.layers",
        "ColumnParallelLinearWithLoRA",
        ("slice_lora_a(lora_a)", "slice_lora_b(lora_b)", "n_slices"),
        "wrapped: adapters are cut when they are read",
    ),
    Use(
        "vllm.lora.layers",
        "RowParallelLinearWithLoRA",
        ("slice_lora_a(lora_a)", "slice_lora_b(lora_b)", "n_slices"),
        "as above",
    ),
    Use(
        "vllm.lora.model_manager", text=("and PIN_MEMORY",), why="switched off where we pin the whole adapter"
    ),
    Use("vllm.lora.lora_model", text=("and PIN_MEMORY",), why="as above"),
    Use("vllm.lora.model_manager", "LoRAModelManager", ("_is_moe",), "its experts are put together anew"),
    Use("vllm.model_executor.models.utils", "PPMissingLayer", why="tells that there are pipeline stages"),
    Use("vllm.lora.request", "LoRARequest", ("is_3d_lora_weight", "lora_int_id", "lora_path"), "a load"),
    Use(
        "vllm.lora.layers.fused_moe",
        "FusedMoEWithLoRA",
        ("hidden_size", "global_num_experts", "intermediate_size_per_partition", "moe_config", "tp_size"),
        "the shapes of experts",
    ),
    Use("vllm.lora.layers", "BaseLayerWithLoRA", ("set_lora(index, lora_a, lora_b)", "reset_lora"), "slots"),
    Use(
        "vllm.model_executor.layers.linear",
        "LinearBase",
        ("input_size", "output_size", "skip_bias_add", "params_dtype"),
        "the shapes that adapters must have",
    ),
    Use(
        "vllm.model_executor.layers.linear",
        "QKVParallelLinear",
        ("total_num_heads", "total_num_kv_heads", "head_size", "v_head_size"),
        "the shapes of fused query, key and value",
    ),
    Use("vllm.model_executor.layers.linear", "MergedColumnParallelLinear", ("output_sizes",), "fused shapes"),
    Use(
        "vllm.v1.worker.worker_base",
        text=("worker_extension_cls", "__bases__"),
        why="mixes LoraplexWorker into the worker",
    ),
    # CPU only: adapters/worker/cpu
    Use(
        "vllm.lora.punica_wrapper.punica_cpu",
        "PunicaWrapperCPU",
        (
            "update_metadata(mapping, lora_index_to_id, max_loras, vocab_size)",
            "add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)",
            "add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale)",
            "add_lora_embedding(y, x, lora_b_stacked, add_inputs)",
            "add_shrink(y, x, lora_a_stacked, scale)",
            "add_expand(y, x, lora_b_stacked, output_slices, offset_start, add_inputs)",
            "token_lora_indices",
            "sampler_indices",
            "_token_lora_indices",
            "_seq_lengths",
        ),
        "replaced: vLLM's own CPU kernels add an adapter to tokens that have none",
    ),
    Use(
        "vllm.lora.layers.base_linear",
        "BaseLinearLayerWithLoRA",
        ("lora_a_stacked", "lora_b_stacked", "set_mapping", "tp_size"),
        "set_lora and reset_lora are wrapped to learn an adapter's own rank",
    ),
    Use(
        "vllm.lora.layers.base_linear",
        text=("self.device = _get_lora_device(self.base_layer)",),
        why="replaced: a weight of eight bits is packed away, and its device cannot be asked",
    ),
    Use("vllm.lora.layers", "LogitsProcessorWithLoRA", why="the head's kernels are replaced"),
    Use("vllm.lora.layers", "VocabParallelEmbeddingWithLoRA", why="the embedding's kernels are replaced"),
    Use(
        "vllm.v1.executor.multiproc_executor",
        "MultiprocExecutor",
        ("_init_executor", "response_mqs", "collective_rpc(method)"),
        "YieldingExecutor waits by sleeping while an adapter is loaded",
    ),
    Use(
        "vllm.distributed.device_communicators.shm_broadcast",
        "MessageQueue",
        ("_spin_condition",),
        "its wait is replaced while an adapter is loaded",
    ),
    Use(
        "vllm.distributed.device_communicators.shm_broadcast",
        "SpinCondition",
        ("wait(timeout_ms)",),
        "its wait is replaced while an adapter is loaded",
    ),
    Use(
        "vllm.model_executor.layers.utils",
        text=("layer.cpu_linear = ",),
        why="oneDNN's kernels are made ahead through it",
    ),
    Use(
        "vllm.v1.sample.sampler",
        text=("token_ranks = batched_count_greater_than(logprobs, token_logprobs)",),
        why="the count is replaced: it is compiled at the first log-probability",
    ),
)
