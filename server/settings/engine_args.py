"""Arguments of vLLM that are not for ``ENGINE_ARGS``, and why; ``engine_args_served`` has all others."""

from __future__ import annotations

# Engine arguments that the dispatcher depends on; setting them twice could only contradict.
OWNED_ENGINE_ARGS = {
    "model": "MODEL",
    "served_model_name": "SERVED_MODEL_NAME",
    "enable_lora": "GPU_SLOTS",
    "max_loras": "GPU_SLOTS",
    "max_cpu_loras": "HOST_SLOTS",
    "max_lora_rank": "MAX_LORA_RANK",
    "max_model_len": "MAX_MODEL_LEN",
    "worker_extension_cls": "nothing: it is how adapters are paged",
    "lora_modules": "the admin API",
}

_NO_FRONT_END = "Loraplex has its own HTTP server, and it would do nothing"
_TLS = "TLS ends in a proxy in front of Loraplex, and it would do nothing"
_LOGS = "prompts and answers never reach a log here"
_ONE = "adapters are paged in one engine only"
_MACHINE = "one machine runs the workers, whose processes are ended and started again after a crash"
_TEXT = "this server reads and writes text"
_KV = "the KV cache would leave the engine, where nothing keeps customers apart"
_LOG = "LOG_LEVEL and LOG_FORMAT are settings of their own"
_SLEEP = "nothing here puts the engine to sleep, and it would do nothing"
# Arguments of vLLM that do nothing here, or that would break paging or isolation; and why.
REFUSED_ENGINE_ARGS = {
    "ssl_keyfile": _TLS,
    "ssl_certfile": _TLS,
    "ssl_ca_certs": _TLS,
    "ssl_cert_reqs": _TLS,
    "ssl_ciphers": _TLS,
    "enable_ssl_refresh": _TLS,
    "api_key": "keys are those of customers, made by the admin API",
    "allowed_origins": _NO_FRONT_END,
    "allowed_methods": _NO_FRONT_END,
    "allowed_headers": _NO_FRONT_END,
    "allow_credentials": _NO_FRONT_END,
    "root_path": _NO_FRONT_END,
    "middleware": _NO_FRONT_END,
    "host": "HOST is a setting of its own",
    "port": "PORT is a setting of its own",
    "uds": _NO_FRONT_END,
    "uvicorn_log_level": _NO_FRONT_END,
    "disable_uvicorn_access_log": _NO_FRONT_END,
    "disable_fastapi_docs": _NO_FRONT_END,
    "enable_request_id_headers": _NO_FRONT_END,
    "sse_keep_alive_interval": _NO_FRONT_END,
    "h11_max_header_count": _NO_FRONT_END,
    "h11_max_incomplete_event_size": _NO_FRONT_END,
    "grpc": _NO_FRONT_END,
    "grpc_port": _NO_FRONT_END,
    "enable_scale_out": _NO_FRONT_END,
    "tool_parser_plugin": "only vLLM's own front end loads it, and it would do nothing",
    "config": "ENGINE_ARGS takes the arguments themselves, and it would do nothing",
    "model_tag": "MODEL is a setting of its own",
    "enable_offline_docs": _NO_FRONT_END,
    "enable_tokenizer_info_endpoint": _NO_FRONT_END,
    "enable_server_load_tracking": _NO_FRONT_END,
    "disable_access_log_for_endpoints": _NO_FRONT_END,
    "trust_request_chat_template": "no request brings a template of its own, and it would do nothing",
    "enable_prompt_embeds": "no request may send tensors, and it would do nothing",
    "enable_mm_embeds": "no request may send tensors, and it would do nothing",
    "tool_server": "clients call tools, never this server",
    "enable_log_requests": _LOGS,
    "enable_log_outputs": _LOGS,
    "enable_log_deltas": _LOGS,
    "max_log_len": _LOGS,
    "skip_tokenizer_init": _TEXT,
    "tokens_only": _TEXT,
    "default_mm_loras": "adapters are those of customers, uploaded to the admin API",
    "weight_transfer_config": "the base model would change under everybody's adapters",
    "headless": _ONE,
    "data_parallel_rank": _ONE,
    "data_parallel_start_rank": _ONE,
    "data_parallel_external_lb": _ONE,
    "data_parallel_hybrid_lb": _ONE,
    "data_parallel_multi_port_external_lb": _ONE,
    "data_parallel_supervisor_port": _ONE,
    "data_parallel_backend": _ONE,
    "data_parallel_address": _ONE,
    "data_parallel_rpc_port": _ONE,
    "dp_supervisor_probe_failure_threshold": _ONE,
    "dp_supervisor_probe_interval_s": _ONE,
    "dp_supervisor_probe_timeout_s": _ONE,
    "enable_elastic_ep": _ONE,
    "elastic_ep_max_dp_size": _ONE,
    "nnodes": _MACHINE,
    "node_rank": _MACHINE,
    "master_addr": _MACHINE,
    "kv_transfer_config": _KV,
    "kv_events_config": _KV,
    "kv_offloading_size": _KV,
    "kv_offloading_backend": _KV,
    "ec_transfer_config": _KV,
    "_api_process_count": _ONE,
    "_api_process_rank": _ONE,
    "dp_sync_interval": _ONE,
    "disable_nccl_for_dp_synchronization": _ONE,
    "aggregate_engine_logging": "there is one engine, and it would do nothing",
    "master_port": _MACHINE,
    "ray_workers_use_nsight": _MACHINE,
    "enable_fault_tolerance": _MACHINE,
    "fault_tolerance_config": _MACHINE,
    "allowed_local_media_path": "customers could have files of this machine read to them",
    "worker_cls": "adapters are paged by an extension of vLLM's own worker",
    "scheduler_cls": "Loraplex's own keeps what an adapter made of NaN from others",
    "scheduling_policy": "Loraplex decides who is next, and it would do nothing",
    "max_num_active_seqs": "MAX_RUNNING is a setting of its own",
    "max_num_queued_reqs": "MAX_QUEUED is a setting of its own; vLLM would refuse who has been let in",
    "max_num_queued_tokens": "MAX_QUEUED is a setting of its own; vLLM would refuse who has been let in",
    "kv_sharing_fast_prefill": "prompts' log-probabilities, by which uploads are tried, are wrong with it",
    "logging_config": _LOG,
    "log_level": _LOG,
    "log_config_file": _LOG,
    "enable_trace_replay": "no request may prescribe its answer, and it would do nothing",
    "return_sampling_mask": "no answer shows it, and greedy requests would be refused",
    "enable_sleep_mode": _SLEEP,
    "sleep_mode_offload_cudagraph": _SLEEP,
    "sleep_preserve_parameter_names": _SLEEP,
    "enable_nccl_comm_suspend": _SLEEP,
    "profiler_config": "nothing here starts a profile, and it would do nothing",
    "io_processor_plugin": "only a call that this server does not have uses it, and it would do nothing",
}
# Refused above 1: adapters are paged in the first engine only.
ONE_ENGINE_ARGS = ("data_parallel_size", "data_parallel_size_local", "api_server_count")
# Executors whose processes are not this server's to end and to start again.
REFUSED_EXECUTORS = {"ray": _MACHINE, "external_launcher": _MACHINE}
# With hashes that a customer can make collide, he could be given the cache of another one's prompt.
CACHE_HASHES = ("sha256", "sha256_cbor")
