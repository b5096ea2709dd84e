"""The part of ``contract`` that is about the KV cache, and about who gets which of its blocks."""

from __future__ import annotations

from server.engine.source_names import Use

CACHE_USES: tuple[Use, ...] = (
    # adapters/worker/not_finite.py, adapters/worker/scheduler.py, server/engine/engine.py
    Use(
        "vllm.v1.engine.async_llm", "AsyncLLM", ("reset_prefix_cache",), "blocks that were cleaned hold zeros"
    ),
    Use(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        (
            "_get_nans_in_logits(logits)",
            "_pool(hidden_states, num_scheduled_tokens, num_scheduled_tokens_np)",
            "use_async_scheduling",
            "kv_caches",
            "kv_cache_config",
            "requests",
            "input_batch",
            "_init_kv_zero_meta()",
            "_zero_block_ids(block_ids)",
        ),
        "wrapped, to clean what a step made of NaN in the KV cache; or new blocks are zeroed",
    ),
    Use(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner",
        ("_init_kv_zero_meta()", "kv_block_zeroer"),
        "as above",
    ),
    Use(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        ("needs_kv_cache_zeroing", "_get_new_block_ids_to_zero()"),
        "as above",
    ),
    Use("vllm.v1.worker.gpu_input_batch", "CachedRequestState", ("block_ids",), "as above"),
)
